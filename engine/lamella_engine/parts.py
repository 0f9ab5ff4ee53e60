"""One checkpoint that several workers hold: each stores a part of it, and one of them records the version.

    coordinator   SharedPush(...)         who stores what; nothing is visible yet
    each worker   store_part(...)         samples and pieces of cells are exchanged, cells hashed, encoded and stored
    coordinator   SharedPush.commit(...)  the version

What travels between them, assignments and parts, pickles, and is small: an id of 32 bytes for each cell. Workers go
through it in step, as ranks of a process group do (:func:`store_part`), or each by itself, as actors of a cluster do:
these ask whoever has it for what they lack (:func:`store_batch`), so one that dies can be replaced, and only the batch
that it was at is stored again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from lamella_engine.boxes import Box, box_of
from lamella_engine.checkpoints.shards import Shards
from lamella_engine.chunking import Region
from lamella_engine.companions import expected, in_order
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.seam import ContentStore, Planned, Push, Recorded
from lamella_engine.errors import InvalidInputError, LamellaError, StorageError
from lamella_engine.exchanging import Elsewhere, Exchange, Fetch, Fetched, Mail, worker_failed
from lamella_engine.executor import Executor
from lamella_engine.format.digests import chunk_id
from lamella_engine.format.manifest import INLINE_NBYTES
from lamella_engine.model import Attachment, Buffer, Cell, ChunkId, PushId, TensorSpec, VersionId
from lamella_engine.notes import Notes
from lamella_engine.pushing import ManifestWriter, abandoning, recorded, row_of
from lamella_engine.sharding import Share, batches, share_out
from lamella_engine.sketches import Sketch, parse, runs, sketched, take
from lamella_engine.storing import Chunk, Pipeline, Place, cell_place

CHUNK_ID_NBYTES = 32


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one worker is told. Pickles."""

    push: PushId
    """The coordinator's."""
    number: int
    """Its place among those of a push."""
    model: str
    branch: str
    parent: VersionId | None
    structure: tuple[TensorSpec, ...]
    share: Share

    @property
    def nbytes(self) -> int:
        """Bytes of its cells, decoded."""
        grids = {spec.name: spec.grid for spec in self.structure if spec.name in self.share.cells}
        return sum(grids[name].cell_nbytes(number) for name, some in self.share.cells.items() for number in some)


@dataclass(frozen=True, slots=True)
class Part:
    """What one worker has stored. Pickles."""

    push: PushId
    """The coordinator's."""
    number: int
    """That of its assignment."""
    receipt: bytes
    """What ``Push.join`` takes."""
    rows: Mapping[str, bytes]
    """Name of a tensor -> what stands for the cells of this worker in its table, one after another."""
    lanes: Mapping[int, bytes]
    """The version's sketch; every worker has the same."""
    sent_nbytes: int
    """Bytes of pieces that went to other workers."""
    stored_nbytes: int
    """Bytes, encoded, that were given to the store."""


class SharedPush:
    """A push by several workers, seen by the one that coordinates them.

    Parameters
    ----------
    store, executor
        Where to, and what does the work.
    model, branch, parent
        As for ``ContentStore.begin``.
    structure
        The tensors of the checkpoint; sorted by name here.
    holdings, workers
        See :func:`~lamella_engine.sharding.share_out`.
    batch_nbytes
        Cut what each worker stores into assignments of about so many bytes, for :func:`store_batch`; by default each
        worker has one, for :func:`store_part`.

    Raises what ``ContentStore.begin`` and ``share_out`` raise.
    """

    def __init__(
        self,
        store: ContentStore,
        executor: Executor,
        *,
        model: str,
        branch: str,
        parent: VersionId | None,
        structure: Sequence[TensorSpec],
        holdings: Mapping[str, Sequence[tuple[Box, int]]],
        workers: int,
        batch_nbytes: int | None = None,
    ) -> None:
        self._structure = tuple(sorted(structure, key=lambda spec: spec.name))
        self._executor = executor
        shares = share_out(self._structure, holdings, workers)
        if batch_nbytes is not None:
            shares = [batch for share in shares for batch in batches(self._structure, share, batch_nbytes)]
        self._push = store.begin(model, branch, parent=parent, push_id=new_push_id())
        head = self._push.parents[0].id if self._push.parents else None
        self.assignments = tuple(
            Assignment(self._push.id, number, model, branch, head, self._structure, share)
            for number, share in enumerate(shares)
        )
        """What workers are to be told, by number: one each, in their order, or their batches."""

    def abandon(self) -> None:
        """Give up. What workers have stored is left to a collection of garbage; raises nothing."""
        self._push.abandon()

    def commit(self, parts: Sequence[Part], notes: Notes, *, files: Sequence[Attachment] = ()) -> Recorded:
        """Record the version.

        Parameters
        ----------
        parts
            What the workers stored, one for each assignment, in any order.
        files
            What is kept with the tensors.

        Raises
        ------
        InvalidInputError
            Parts are missing, or not those of these assignments (``bad_part``).
        ConflictError, StorageError, OutcomeUnknownError
            As a push raises them.
        """
        if any(part.push != self._push.id for part in parts):  # rows of two steps would make a version of neither
            raise _bad_part("a part is of another push")
        by_number = {part.number: part for part in parts}
        if sorted(by_number) != list(range(len(self.assignments))):
            raise _bad_part("parts of some workers are missing")
        parts_of: dict[str, list[Part]] = {}
        for assignment in self.assignments:
            for name in assignment.share.cells:
                parts_of.setdefault(name, []).append(by_number[assignment.number])

        def describe(created: str) -> Any:
            manifest = ManifestWriter(self._push, self._executor, self._structure, files)
            sketch = parse(self._structure, by_number[0].lanes)
            self._push.consider(sketch)
            for part in by_number.values():
                self._push.join(part.receipt)

            def planned() -> Iterator[Planned]:
                for spec in self._structure:
                    rows = self._rows(spec, parts_of.get(spec.name, ()))
                    for number, row in enumerate(rows):
                        nbytes = spec.grid.cell_nbytes(number)
                        short = nbytes <= INLINE_NBYTES
                        chunk = chunk_id(row) if short else ChunkId(row)
                        manifest.add(Cell(spec.name, number), row, chunk, nbytes)
                        if not short:
                            yield Planned(Cell(spec.name, number), chunk)

            for missing in self._push.plan(planned()):
                if missing is not None:
                    raise StorageError(
                        f"a cell of {missing.cell.tensor!r} that a worker stored is not there: push again",
                        kind="part_lost",
                    )
            return manifest.description(notes, created, sketch)

        return recorded(self._push, describe)

    def _rows(self, spec: TensorSpec, parts: Sequence[Part]) -> list[bytes]:
        """Return what stands for each cell of a tensor; raises InvalidInputError unless parts make it whole."""
        rows = [b""] * spec.grid.cell_count
        for part in parts:
            joined = part.rows.get(spec.name, b"")
            at = 0
            for number in self.assignments[part.number].share.cells[spec.name]:
                nbytes = spec.grid.cell_nbytes(number)
                length = nbytes if nbytes <= INLINE_NBYTES else CHUNK_ID_NBYTES
                rows[number] = joined[at : at + length]
                at += length
            if at != len(joined):
                raise _bad_part(f"a part does not have its cells of {spec.name[:80]!r}")
        return rows


def _bad_part(problem: str) -> InvalidInputError:
    return InvalidInputError(f"{problem}: give the parts of all workers of this push", kind="bad_part")


def store_part(
    store: ContentStore,
    executor: Executor,
    assignment: Assignment,
    held: Callable[[], Iterable[tuple[str, Box, object]]],
    exchange: Exchange,
) -> Part:
    """Store what one worker is to store; all workers of a push call this, and wait for one another in it.

    Parameters
    ----------
    store, executor
        Where to, and what does the work.
    assignment
        This worker's, of the coordinator.
    held
        Returns the boxes that the worker has, as the coordinator was told: see
        :class:`~lamella_engine.checkpoints.shards.Shards`.
    exchange
        The way to the other workers.

    Raises
    ------
    InvalidInputError
        A tensor is not as it was said to be, or changed meanwhile.
    ConflictError
        The branch moved.
    StorageError
        The store failed, or another worker did (``worker_failed``). The push has to be made again.
    """
    try:
        shards = Shards.in_memory(held())
        samples = samples_of(assignment.structure, shards)
        push = store.begin(
            assignment.model, assignment.branch, parent=assignment.parent, push_id=new_push_id(), part=True
        )
    except BaseException:
        exchange.merge(samples_of(assignment.structure, None))  # whoever fails still answers the others, who would wait
        raise
    with closing(shards):
        with abandoning(push):
            merged = exchange.merge(samples)
            if merged[0]:
                raise worker_failed()
        sketch = _sketch(assignment.structure, merged)
        while True:
            try:
                with abandoning(push), Mail(assignment.share, assignment.structure, shards, exchange) as mail:
                    return _stored(push, executor, assignment, shards, mail, sketch)
            except LamellaError as error:
                if assignment.share.rounds or not push.restart(error):  # what was exchanged is gone
                    raise


def store_batch(
    store: ContentStore,
    executor: Executor,
    assignment: Assignment,
    shards: Shards,
    merged: Buffer,
    fetch: Fetch,
) -> Part:
    """Store what an assignment says, without waiting for others; doing it again is harmless, here or elsewhere.

    Parameters
    ----------
    store, executor
        Where to, and what does the work.
    assignment
        This worker's, of the coordinator.
    shards
        What this worker has.
    merged
        Byte by byte the greatest of what :func:`samples_of` gives every worker.
    fetch
        The way to the other workers; called by several threads at a time.

    Raises
    ------
    InvalidInputError
        A tensor is not as it was said to be, or changed meanwhile.
    ConflictError
        The branch moved.
    StorageError
        The store failed, or what ``fetch`` raises.
    """
    push = store.begin(assignment.model, assignment.branch, parent=assignment.parent, push_id=new_push_id(), part=True)
    sketch = _sketch(assignment.structure, merged)
    fetched = Fetched(assignment.share, assignment.structure, shards, fetch)
    while True:
        try:
            with abandoning(push):
                return _stored(push, executor, assignment, shards, fetched, sketch)
        except LamellaError as error:
            if not push.restart(error):
                raise


def _stored(
    push: Push, executor: Executor, assignment: Assignment, shards: Shards, elsewhere: Elsewhere, sketch: Sketch
) -> Part:
    share, structure = assignment.share, assignment.structure
    rows: dict[str, list[bytes]] = {}
    pipeline = Pipeline(push, executor)
    push.consider(sketch)

    cells = in_order(structure, expected(structure), lambda spec: share.cells.get(spec.name, ()))
    upcoming = next(cells, None)
    beside: Place | None = None

    def places() -> Iterator[Place]:
        """Yield the next cell, waiting for it, and those after it as long as they are here."""
        nonlocal upcoming, beside
        waits = True
        while upcoming is not None:
            spec, number, follows = upcoming
            cell = Cell(spec.name, number)
            box = box_of(spec.grid.region(number))
            if not (waits or elsewhere.has(cell)):
                return
            read = elsewhere.reader(cell)
            if read is None:
                shards.expect(spec, box)
                read = partial(shards.read, spec, box)
            found = cell_place(spec, number, read, beside if follows else None)
            beside = beside if follows else found
            upcoming, waits = next(cells, None), False
            yield found

    def entered() -> Iterator[Chunk]:
        for chunk in pipeline.chunks(places()):
            assert chunk.place.cell.tensor is not None
            rows.setdefault(chunk.place.cell.tensor, []).append(row_of(chunk))
            if len(chunk.data) > INLINE_NBYTES:
                yield chunk

    # What a push holds while it stores, such as one of the few streams of a service, the worker may need that this one
    # waits for: so whoever waits has stored all it had.
    while upcoming is not None:
        pipeline.store(entered())
    elsewhere.close()
    shards.check_unchanged()
    return Part(
        assignment.push,
        assignment.number,
        push.part(),
        {name: b"".join(some) for name, some in rows.items()},
        sketch.lanes(),
        share.sent_nbytes,
        pipeline.stored_nbytes,
    )


# -- samples -----------------------------------------------------------------------------------------------------------


def _runs(structure: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, Region, int]]:
    """Yield the runs of the version's sketch, with the place of each in what workers merge: after a byte of status."""
    at = 1
    for spec, _ in sketched(structure):
        for run in runs(spec):
            yield spec, run, at
            at += run.nbytes


def samples_of(structure: Sequence[TensorSpec], shards: Shards | None) -> bytearray:
    """Return the elements of the sketch that are here, zeros for the others; without shards, that there are none."""
    length = 1 + sum(run.nbytes for _, run, _ in _runs(structure))
    out = bytearray(length)
    if shards is None:
        out[0] = 1
        return out
    for spec, run, at in _runs(structure):
        box = box_of(run)
        for part in shards.parts(spec, box):
            start = at + (part[-1][0] - box[-1][0]) * spec.grid.itemsize
            data = shards.read(spec, part)
            out[start : start + len(data)] = data
    return out


def _sketch(structure: Sequence[TensorSpec], merged: Buffer) -> Sketch:
    places = {(spec.name, run.start): at for spec, run, at in _runs(structure)}

    def read(spec: TensorSpec, run: Region) -> Buffer:
        at = places[spec.name, run.start]
        return merged[at : at + run.nbytes]

    return take(structure, read)
