"""From a checkpoint to a version: store what is new of its cells, record the rest by reference."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

from lamella_engine.checkpoints import Checkpoint, expect
from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.companions import companions, in_order
from lamella_engine.content_store.acting import now, principal
from lamella_engine.content_store.seam import Push, Recorded
from lamella_engine.errors import ConflictError, InvalidInputError, LamellaError
from lamella_engine.executor import Executor
from lamella_engine.format.digests import Context, Digester, chunk_id
from lamella_engine.format.manifest import (
    INLINE_NBYTES,
    CellPage,
    CellTable,
    StructurePage,
    structure_id,
    structure_pages,
)
from lamella_engine.format.version import AttachmentPages, Description, SketchLanes
from lamella_engine.model import Attachment, Buffer, Cell, ChunkId, Progress, TensorSpec
from lamella_engine.notes import Notes
from lamella_engine.sketches import Sketch, take
from lamella_engine.storing import Chunk, Pipeline, Place, cell_place


class _Parameters:
    """The cell tables and the digest over all cells, in manifest order, whatever order the cells come in.

    Parameters
    ----------
    structure
        The structure's id, with which the digest begins.
    pages
        The table of each structure page, with its tensors.
    """

    def __init__(self, structure: str, pages: Iterable[tuple[CellTable, Sequence[TensorSpec]]]) -> None:
        self._digester = Digester(Context.PARAMETERS)
        self._digester.update(bytes.fromhex(structure))
        self._turns = ((spec.name, spec.grid.cell_count, table) for table, specs in pages for spec in specs)
        self._waiting: defaultdict[str | None, deque[tuple[bytes, ChunkId]]] = defaultdict(deque)
        self._tensor: str | None = None
        self._cells_left = 0
        self._table = CellTable(0)

    def add(self, cell: Cell, row: bytes, chunk: ChunkId) -> None:
        """Enter the next cell of its tensor."""
        self._waiting[cell.tensor].append((row, chunk))
        while True:
            while not self._cells_left:
                turn = next(self._turns, None)
                if turn is None:
                    return
                self._waiting.pop(self._tensor, None)
                self._tensor, self._cells_left, self._table = turn
            waiting = self._waiting[self._tensor]
            if not waiting:
                return
            row, chunk = waiting.popleft()
            self._table.add(row)
            self._digester.update(chunk)
            self._cells_left -= 1

    def id(self) -> str:
        """Return the digest, once all cells are in."""
        return self._digester.digest().hex()


def push_checkpoint(
    push: Push,
    checkpoint: Checkpoint,
    executor: Executor,
    notes: Notes,
    *,
    files: Sequence[Attachment] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Recorded:
    """Store a checkpoint and record it as a version.

    Parameters
    ----------
    files
        What is kept with it besides the checkpoint's own attachments.
    progress
        Is told, in the caller's thread, how far it is.

    Raises InvalidInputError if the checkpoint changes meanwhile, and whatever ``push`` raises.
    """

    def describe(created: str) -> Description:
        manifest = ManifestWriter(push, executor, checkpoint.structure, (*checkpoint.attachments, *files), progress)
        sketch = Sketch({})
        companion_of: dict[str, TensorSpec] = {}
        if checkpoint.random_access:
            sketch = take(checkpoint.structure, checkpoint.read)
            push.consider(sketch)
            companion_of = companions(checkpoint.structure, checkpoint.read)

        def places() -> Iterator[Place]:
            beside: Place | None = None
            for spec, number, follows in in_order(checkpoint.structure, companion_of, _all_cells):
                region = spec.grid.region(number)
                expect(checkpoint, spec, region)
                read = partial(checkpoint.read, spec, region)
                place = cell_place(spec, number, read, beside if follows else None)
                beside = beside if follows else place
                yield place

        manifest.pipeline.store(manifest.entered(manifest.pipeline.chunks(places())))
        return manifest.description(notes, created, sketch, checkpoint.check_unchanged)

    return recorded(push, describe)


def _all_cells(spec: TensorSpec) -> Iterable[int]:
    return range(spec.grid.cell_count)


def recorded(push: Push, describe: Callable[[str], Description]) -> Recorded:
    """Record what ``describe``, which is given the time, stores and returns; begin anew where that makes sense."""
    created = now()  # once: a push that is begun anew makes the same version, also if it was recorded before
    while True:
        try:
            return _recorded_once(push, describe, created)
        except LamellaError as error:
            if not push.restart(error):
                raise


def _recorded_once(push: Push, describe: Callable[[str], Description], created: str) -> Recorded:
    with abandoning(push):
        description = describe(created)
    try:
        return push.commit(description)
    except (ConflictError, InvalidInputError):  # of others nobody knows what they left
        push.abandon()
        raise


@contextmanager
def abandoning(push: Push) -> Iterator[None]:
    """Give a push up if this block, in which what is pushed is stored, fails; say what the failure means."""
    try:
        yield
    except BaseException as error:
        push.abandon()
        if isinstance(error, InvalidInputError) and error.kind == "wrong_blob":
            # The store decoded what it was given, and read the chunk again: it was another when it was hashed.
            raise InvalidInputError(
                "a tensor changed while it was pushed: push again when nothing writes to it", kind="source_changed"
            ) from error
        raise


class ManifestWriter:
    """What is recorded of a version: its cells by row, and with them its structure, files and sketch.

    Parameters
    ----------
    push, executor
        What it is stored by.
    structure
        The tensors, by name.
    attachments
        Kept with them.
    progress
        As for :func:`push_checkpoint`.
    """

    def __init__(
        self,
        push: Push,
        executor: Executor,
        structure: Sequence[TensorSpec],
        attachments: Iterable[Attachment],
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.pipeline = Pipeline(push, executor)
        self._push = push
        self._structure = structure
        self._attachments = sorted(attachments, key=lambda item: item.path)
        self._cut = list(structure_pages(structure))
        self._structure_id = structure_id(page for page, _ in self._cut)
        counts = (sum(spec.grid.cell_count for spec in specs) for _, specs in self._cut)
        *firsts, self._cell_count = accumulate(counts, initial=0)
        self._tables = [CellTable(first) for first in firsts]
        pages = zip(self._tables, (specs for _, specs in self._cut), strict=True)
        self._parameters = _Parameters(self._structure_id, pages)
        self._progress = progress
        self._decoded_nbytes = sum(spec.nbytes for spec in structure)
        self._total_nbytes = self._decoded_nbytes + sum(item.nbytes for item in self._attachments)
        self._done_nbytes = 0

    def add(self, cell: Cell, row: bytes, chunk: ChunkId, nbytes: int) -> None:
        """Enter the next cell of its tensor, which is ``nbytes`` long."""
        self._parameters.add(cell, row, chunk)
        self._report(nbytes)

    def entered(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Enter every cell; yield those that do not stand in their row."""
        for chunk in chunks:
            self.add(chunk.place.cell, row_of(chunk), chunk.id, len(chunk.data))
            if len(chunk.data) > INLINE_NBYTES:
                yield chunk

    def description(
        self, notes: Notes, created: str, sketch: Sketch, check_unchanged: Callable[[], None] | None = None
    ) -> Description:
        """Store everything but the version; return what it is to be recorded as. All cells have been entered.

        ``check_unchanged`` is called last; what it raises is raised.
        """
        own: list[bytes] = []

        def keep(data: bytes) -> ChunkId:
            own.append(data)
            return chunk_id(data)

        pages: list[StructurePage] = []
        for (page, specs), table in zip(self._cut, self._tables, strict=True):
            chunk = keep(page)
            cells = tuple(CellPage(keep(rows), len(rows), first) for rows, first in table.pages())
            pages.append(StructurePage(chunk, len(page), specs[0].name, table.first_cell, cells))
        attachments, lanes = self._store(own, sketch.lanes())
        if check_unchanged is not None:
            check_unchanged()
        return Description(
            model=self._push.model,
            push=self._push.id,
            structure_id=self._structure_id,
            parameters_id=self._parameters.id(),
            tensor_count=len(self._structure),
            cell_count=self._cell_count,
            decoded_nbytes=self._decoded_nbytes,
            pages=tuple(pages),
            attachments=attachments,
            parents=tuple(parent.id for parent in self._push.parents),
            message=notes.message,
            author=principal(),
            created=created,
            metrics=notes.metrics,
            recipe=notes.recipe,
            sketches=lanes,
        )

    def _store(
        self, pages: Sequence[bytes], lanes: Mapping[int, bytes]
    ) -> tuple[tuple[AttachmentPages, ...], tuple[SketchLanes, ...]]:
        """Store the version's pages, attachments and sketch; return the last two as the version lists them."""
        chunks: dict[Cell, tuple[ChunkId, int]] = {}
        cells: list[list[Cell]] = []

        def places() -> Iterator[Place]:
            for place, page in enumerate(pages):
                yield Place(Cell(None, place), len(page), partial(_page, page))
            place = len(pages)
            for item in self._attachments:
                cells.append([])
                for start in range(0, item.nbytes, MAX_CELL_NBYTES):
                    stop = min(start + MAX_CELL_NBYTES, item.nbytes)
                    cells[-1].append(Cell(None, place))
                    yield Place(cells[-1][-1], stop - start, partial(_piece, item, start, stop))
                    place += 1
            for width, sketch in lanes.items():
                yield Place(Cell(None, -width), len(sketch), partial(_page, sketch), width, floating=True)

        def noted() -> Iterator[Chunk]:
            for at, chunk in enumerate(self.pipeline.chunks(places())):
                chunks[chunk.place.cell] = chunk.id, len(chunk.data)
                yield chunk
                self._report(len(chunk.data) if at >= len(pages) and chunk.place.cell.number >= 0 else 0)

        self.pipeline.store(noted())
        attachments = tuple(
            AttachmentPages(item.path, item.role, tuple(chunks[cell] for cell in mine), item.prefix)
            for item, mine in zip(self._attachments, cells, strict=True)
        )
        return attachments, tuple(SketchLanes(*chunks[Cell(None, -width)], width) for width in lanes)

    def _report(self, nbytes: int) -> None:
        self._done_nbytes += nbytes
        if self._progress is not None:
            self._progress(Progress(self._done_nbytes, self._total_nbytes, self.pipeline.stored_nbytes))


def row_of(chunk: Chunk) -> bytes:
    """Return what stands for a cell in its table: its bytes if they are short, else the id of its chunk."""
    return bytes(chunk.data) if len(chunk.data) <= INLINE_NBYTES else chunk.id


def _page(data: bytes, memory: memoryview | None) -> Buffer:
    return data


def _piece(item: Attachment, start: int, stop: int, memory: memoryview | None) -> Buffer:
    return item.read(start, stop)
