"""From a checkpoint to a version: hash every cell, encode what the store lacks, record the rest by reference.

A pipeline with a bounded number of cells in it: read and hash (threads), plan (the store), encode (threads), write
(the store, which decodes again and compares). Cells go through it in manifest order, so blobs lie in packs as they
will be read.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from lamella_engine import codecs
from lamella_engine.checkpoints import Checkpoint
from lamella_engine.chunking import MAX_CELL_NBYTES, POOLED_NBYTES
from lamella_engine.companions import companions
from lamella_engine.content_store.acting import now, principal
from lamella_engine.content_store.seam import Blob, Missing, Planned, Push, Recorded
from lamella_engine.errors import ConflictError, CorruptionError, InvalidInputError, LamellaError
from lamella_engine.executor import Executor, map_batched
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
from lamella_engine.sketches import Sketch, take

logger = logging.getLogger("lamella")


@dataclass(frozen=True, slots=True)
class Notes:
    """What is recorded beside the tensors."""

    message: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    recipe: Any = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Some bytes that are still to be read: a cell's, or a part of the version's own manifest."""

    cell: Cell
    nbytes: int
    read: Callable[[memoryview | None], Buffer]
    """Returns the bytes; may use the memory it is given."""
    width: int = 1
    floating: bool = False
    companion: "_Place | None" = None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk on its way into the store."""

    place: _Place
    id: ChunkId
    data: Buffer
    memory: memoryview | None
    """The memory that ``data`` lies in, if it is to be used again."""


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
    created = now()  # once: a push that is begun anew makes the same version, also if it was recorded before
    while True:
        try:
            return _push_once(push, _Pushing(push, checkpoint, executor, files, progress), notes, created)
        except LamellaError as error:
            if not push.restart(error):
                raise


def _push_once(push: Push, pushing: "_Pushing", notes: Notes, created: str) -> Recorded:
    try:
        description = pushing.run(notes, created)
    except BaseException as error:
        push.abandon()
        if isinstance(error, InvalidInputError) and error.kind == "wrong_blob":
            # The store decoded what it was given, and read the chunk again: it was another when it was hashed.
            raise InvalidInputError(
                "a tensor changed while it was pushed: push again when nothing writes to it", kind="source_changed"
            ) from error
        raise
    try:
        return push.commit(description)
    except (ConflictError, InvalidInputError):  # of others nobody knows what they left
        push.abandon()
        raise


class _Pushing:
    def __init__(
        self,
        push: Push,
        checkpoint: Checkpoint,
        executor: Executor,
        files: Sequence[Attachment],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._push = push
        self._checkpoint = checkpoint
        self._executor = executor
        self._attachments = sorted((*checkpoint.attachments, *files), key=lambda item: item.path)
        self._free: list[memoryview] = []
        self._progress = progress
        self._decoded_nbytes = sum(spec.nbytes for spec in checkpoint.structure)
        self._total_nbytes = self._decoded_nbytes + sum(item.nbytes for item in self._attachments)
        self._done_nbytes = 0
        self._stored_nbytes = 0

    def run(self, notes: Notes, created: str) -> Description:
        """Store everything but the version; return what it is to be recorded as."""
        structure = self._checkpoint.structure
        cut = list(structure_pages(structure))
        structure_digest = structure_id(page for page, _ in cut)
        counts = (sum(spec.grid.cell_count for spec in specs) for _, specs in cut)
        *firsts, cell_count = accumulate(counts, initial=0)
        tables = [CellTable(first) for first in firsts]
        sketch = Sketch({})
        if self._checkpoint.random_access:
            sketch = take(structure, self._checkpoint.read)
            self._push.consider(sketch)
        parameters = _Parameters(structure_digest, zip(tables, (specs for _, specs in cut), strict=True))
        self._store(self._cells(parameters))
        own: list[bytes] = []

        def keep(data: bytes) -> ChunkId:
            own.append(data)
            return chunk_id(data)

        pages: list[StructurePage] = []
        for (page, specs), table in zip(cut, tables, strict=True):
            chunk = keep(page)
            cells = tuple(CellPage(keep(rows), len(rows), first) for rows, first in table.pages())
            pages.append(StructurePage(chunk, len(page), specs[0].name, table.first_cell, cells))
        attachments, lanes = self._store_manifest(own, sketch.lanes())
        self._checkpoint.check_unchanged()
        return Description(
            model=self._push.model,
            push=self._push.id,
            structure_id=structure_digest,
            parameters_id=parameters.id(),
            tensor_count=len(structure),
            cell_count=cell_count,
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

    def _cells(self, parameters: _Parameters) -> Iterator[_Chunk]:
        """Enter every cell; yield those that do not stand in their row."""
        for chunk in self._chunks(self._places()):
            short = len(chunk.data) <= INLINE_NBYTES
            parameters.add(chunk.place.cell, bytes(chunk.data) if short else chunk.id, chunk.id)
            if not short:
                yield chunk
            self._report(len(chunk.data))

    def _places(self) -> Iterator[_Place]:
        """Yield every cell: tensors by name, but what has a companion cell by cell behind it."""
        companion_of: dict[str, TensorSpec] = {}
        if self._checkpoint.random_access:
            companion_of = companions(self._checkpoint.structure, self._checkpoint.read)
        followers: defaultdict[str, list[TensorSpec]] = defaultdict(list)
        for spec in self._checkpoint.structure:
            if spec.name in companion_of:
                followers[companion_of[spec.name].name].append(spec)

        def place(spec: TensorSpec, number: int, companion: _Place | None = None) -> _Place:
            region = spec.grid.region(number)
            read = partial(self._checkpoint.read, spec, region)
            return _Place(Cell(spec.name, number), region.nbytes, read, spec.dtype.lane, spec.dtype.floating, companion)

        for spec in self._checkpoint.structure:
            if spec.name in companion_of:
                continue
            for number in range(spec.grid.cell_count):
                first = place(spec, number)
                yield first
                yield from (place(follower, number, first) for follower in followers[spec.name])

    def _store_manifest(
        self, pages: Sequence[bytes], lanes: Mapping[int, bytes]
    ) -> tuple[tuple[AttachmentPages, ...], tuple[SketchLanes, ...]]:
        """Store the version's pages, attachments and sketch; return the last two as the version lists them."""
        chunks: dict[Cell, tuple[ChunkId, int]] = {}
        cells: list[list[Cell]] = []

        def places() -> Iterator[_Place]:
            for place, page in enumerate(pages):
                yield _Place(Cell(None, place), len(page), partial(_page, page))
            place = len(pages)
            for item in self._attachments:
                cells.append([])
                for start in range(0, item.nbytes, MAX_CELL_NBYTES):
                    stop = min(start + MAX_CELL_NBYTES, item.nbytes)
                    cells[-1].append(Cell(None, place))
                    yield _Place(cells[-1][-1], stop - start, partial(_piece, item, start, stop))
                    place += 1
            for width, sketch in lanes.items():
                yield _Place(Cell(None, -width), len(sketch), partial(_page, sketch), width, floating=True)

        def noted() -> Iterator[_Chunk]:
            for at, chunk in enumerate(self._chunks(places())):
                chunks[chunk.place.cell] = chunk.id, len(chunk.data)
                yield chunk
                self._report(len(chunk.data) if at >= len(pages) and chunk.place.cell.number >= 0 else 0)

        self._store(noted())
        attachments = tuple(
            AttachmentPages(item.path, item.role, tuple(chunks[cell] for cell in mine), item.prefix)
            for item, mine in zip(self._attachments, cells, strict=True)
        )
        return attachments, tuple(SketchLanes(*chunks[Cell(None, -width)], width) for width in lanes)

    def _chunks(self, places: Iterable[_Place]) -> Iterator[_Chunk]:
        return map_batched(self._executor, self._read_and_hash, places, nbytes=lambda place: place.nbytes)

    def _read_and_hash(self, place: _Place) -> _Chunk:
        memory = self._memory() if place.nbytes >= POOLED_NBYTES else None
        data = place.read(memory)
        return _Chunk(place, chunk_id(data), data, memory)

    def _report(self, nbytes: int) -> None:
        self._done_nbytes += nbytes
        if self._progress is not None:
            self._progress(Progress(self._done_nbytes, self._total_nbytes, self._stored_nbytes))

    def _memory(self) -> memoryview:
        try:
            return self._free.pop()
        except IndexError:
            return np.empty(MAX_CELL_NBYTES, np.uint8).data

    def _release(self, memory: memoryview | None) -> None:
        if memory is not None:
            self._free.append(memory)

    def _store(self, chunks: Iterable[_Chunk]) -> None:
        """Give the store those of ``chunks`` that it lacks."""
        asked: deque[_Chunk] = deque()

        def cells() -> Iterator[Planned]:
            for chunk in chunks:
                asked.append(chunk)
                companion = chunk.place.companion
                beside = None if companion is None else companion.cell
                yield Planned(chunk.place.cell, chunk.id, beside, len(chunk.data))

        def missing() -> Iterator[tuple[_Chunk, Missing]]:
            for answer in self._push.plan(cells()):
                chunk = asked.popleft()
                if answer is None:
                    self._release(chunk.memory)
                else:
                    yield chunk, answer

        def blobs() -> Iterator[Blob]:
            encoded = map_batched(self._executor, self._encode, missing(), nbytes=lambda wanted: len(wanted[0].data))
            for blob in encoded:
                self._stored_nbytes += len(blob.payload)
                yield blob

        self._push.write(blobs())

    def _base_of(self, missing: Missing) -> Buffer | None:
        try:
            return None if missing.base is None else self._push.base(missing)
        except CorruptionError as error:  # this version need not stand on it; whoever reads that one will be told
            logger.warning("a chunk is stored without its base: %s", error)
            return None

    def _encode(self, wanted: tuple[_Chunk, Missing]) -> Blob:
        chunk, missing = wanted
        place, nbytes = chunk.place, len(chunk.data)
        memory: memoryview | None = None
        guide: Buffer | None = None
        if missing.companion is not None and place.companion is not None:
            memory = self._memory() if place.companion.nbytes >= POOLED_NBYTES else None
            guide = place.companion.read(memory)
        encode = partial(codecs.encode, chunk.data, width=place.width, floating=place.floating)
        encoded, against = codecs.Encoded(codecs.Encoding.RAW, b""), None
        if guide is not None and len(guide) != nbytes:  # of the same weights in another type
            encoded, against, guide = encode(base=guide), missing.companion, None
        if encoded.encoding is not codecs.Encoding.CAST:
            base = self._base_of(missing)
            if base is not None and not codecs.fits(len(base), nbytes, floating=place.floating):
                base = None  # the tensor grew or shrank at this place
            encoded = encode(base=base, guide=guide)
            against = {
                codecs.Against.NOTHING: None,
                codecs.Against.BASE: missing.base,
                codecs.Against.GUIDE: missing.companion,
            }[encoded.against]
        again = partial(place.read, None)
        blob = Blob(chunk.id, encoded.encoding, place.width, nbytes, encoded.payload, against, again, place.floating)
        self._push.keep(blob, chunk.data)
        self._release(chunk.memory)
        self._release(memory)
        return blob


def _page(data: bytes, memory: memoryview | None) -> Buffer:
    return data


def _piece(item: Attachment, start: int, stop: int, memory: memoryview | None) -> Buffer:
    return item.read(start, stop)
