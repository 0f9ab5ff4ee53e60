"""One checkpoint that several workers hold: each stores a part of it, and one of them records the version.

    coordinator   SharedPush(...)         who stores what; nothing is visible yet
    each worker   store_part(...)         samples and pieces of cells are exchanged, cells hashed, encoded and stored
    coordinator   SharedPush.commit(...)  the version

What travels between them, assignments and parts, pickles, and is small: an id of 32 bytes for each cell. Workers are
ranks of a process group or actors of a cluster; how they reach each other is an :class:`Exchange`.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from lamella_engine.boxes import Box, box_of, paste
from lamella_engine.checkpoints.shards import Shards
from lamella_engine.chunking import Region
from lamella_engine.companions import in_order, moments
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.seam import ContentStore, Planned, Push, Recorded
from lamella_engine.errors import InvalidInputError, LamellaError, StorageError
from lamella_engine.executor import Executor
from lamella_engine.format.digests import chunk_id
from lamella_engine.format.manifest import INLINE_NBYTES
from lamella_engine.model import Attachment, Buffer, Cell, ChunkId, PushId, TensorSpec, VersionId
from lamella_engine.pushing import ManifestWriter, Notes, abandoning, recorded, row_of
from lamella_engine.sharding import Piece, Round, Share, share_out
from lamella_engine.sketches import Sketch, parse, runs, sketched, take
from lamella_engine.storing import Chunk, Pipeline, Place, cell_place

CHUNK_ID_NBYTES = 32

ROUNDS_AHEAD = 4
"""Rounds whose cells wait to be stored: enough that one is always there, little beside the memory of a push."""


class Exchange(Protocol):
    """How the workers of a push reach each other. Calls are made in the same order by all, one at a time each."""

    def merge(self, mine: bytearray) -> Buffer:
        """Return, byte by byte, the greatest of what all workers gave: each as many bytes, of any value.

        Raises StorageError if one cannot be reached.
        """

    def swap(self, number: int, sends: Mapping[int, Buffer], receives: Mapping[int, int]) -> Mapping[int, Buffer]:
        """Send each worker its bytes, and return what each sent: so many bytes as ``receives`` says.

        A worker takes part in those rounds only in which it sends or receives, in ascending order of ``number``. Raises
        StorageError if one cannot be reached.
        """


class Alone:
    """The exchange of a push with one worker."""

    def merge(self, mine: bytearray) -> Buffer:
        """See :class:`Exchange`."""
        return mine

    def swap(self, number: int, sends: Mapping[int, Buffer], receives: Mapping[int, int]) -> Mapping[int, Buffer]:
        """See :class:`Exchange`. There is nobody."""
        raise AssertionError("there is no other worker")


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one worker is told. Pickles."""

    push: PushId
    """The coordinator's."""
    model: str
    branch: str
    parent: VersionId | None
    structure: tuple[TensorSpec, ...]
    share: Share


@dataclass(frozen=True, slots=True)
class Part:
    """What one worker has stored. Pickles."""

    push: PushId
    """The coordinator's."""
    worker: int
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
    ) -> None:
        self._structure = tuple(sorted(structure, key=lambda spec: spec.name))
        self._executor = executor
        self._shares = share_out(self._structure, holdings, workers)
        self._push = store.begin(model, branch, parent=parent, push_id=new_push_id())
        head = self._push.parents[0].id if self._push.parents else None
        self.assignments = tuple(
            Assignment(self._push.id, model, branch, head, self._structure, share) for share in self._shares
        )
        """What each worker is to be told."""

    def abandon(self) -> None:
        """Give up. What workers have stored is left to a collection of garbage; raises nothing."""
        self._push.abandon()

    def commit(self, parts: Sequence[Part], notes: Notes, *, files: Sequence[Attachment] = ()) -> Recorded:
        """Record the version.

        Parameters
        ----------
        parts
            What the workers stored, in any order.
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
        by_worker = {part.worker: part for part in parts}
        if by_worker.keys() != {share.worker for share in self._shares}:
            raise _bad_part("parts of some workers are missing")
        cells = [(name, share.worker) for share in self._shares for name in share.cells]
        workers_of: dict[str, list[int]] = {}
        for name, worker in cells:
            workers_of.setdefault(name, []).append(worker)

        def describe(created: str) -> Any:
            manifest = ManifestWriter(self._push, self._executor, self._structure, files)
            sketch = parse(self._structure, by_worker[0].lanes)
            self._push.consider(sketch)
            for part in by_worker.values():
                self._push.join(part.receipt)

            def planned() -> Iterator[Planned]:
                for spec in self._structure:
                    rows = self._rows(spec, [by_worker[worker] for worker in workers_of.get(spec.name, ())])
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
            for number in self._shares[part.worker].cells[spec.name]:
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
        shards = Shards(held())
        samples = _samples(assignment.structure, shards)
        push = store.begin(
            assignment.model, assignment.branch, parent=assignment.parent, push_id=new_push_id(), part=True
        )
    except BaseException:
        exchange.merge(_samples(assignment.structure, None))  # whoever fails still answers the others, who would wait
        raise
    with abandoning(push):
        merged = exchange.merge(samples)
        if merged[0]:
            raise worker_failed()
    sketch = _sketch(assignment.structure, merged)
    while True:
        try:
            with abandoning(push), _Mail(assignment, shards, exchange) as mail:
                return _stored(push, executor, assignment, shards, mail, sketch)
        except LamellaError as error:
            if assignment.share.rounds or not push.restart(error):  # what was exchanged is gone
                raise


def worker_failed() -> StorageError:
    """Return the error for a push that another worker has given up."""
    return StorageError(
        "another worker could not store its part, and says why itself: push again when that is mended",
        kind="worker_failed",
        transient=True,
    )


def _stored(
    push: Push, executor: Executor, assignment: Assignment, shards: Shards, mail: "_Mail", sketch: Sketch
) -> Part:
    share, structure = assignment.share, assignment.structure
    rows: dict[str, list[bytes]] = {}
    pipeline = Pipeline(push, executor)
    push.consider(sketch)

    cells = in_order(structure, moments(structure), lambda spec: share.cells.get(spec.name, ()))
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
            read: Callable[[memoryview | None], Buffer] = partial(shards.read, spec, box)
            if mail.brings(cell):
                if not (waits or mail.has(cell)):
                    return
                read = partial(_given, mail.take(cell))
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
    mail.close()
    shards.check_unchanged()
    return Part(
        assignment.push,
        share.worker,
        push.part(),
        {name: b"".join(some) for name, some in rows.items()},
        sketch.lanes(),
        share.sent_nbytes,
        pipeline.stored_nbytes,
    )


def _given(data: Buffer, memory: memoryview | None) -> Buffer:
    return data


# -- samples -----------------------------------------------------------------------------------------------------------


def _runs(structure: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, Region, int]]:
    """Yield the runs of the version's sketch, with the place of each in what workers merge: after a byte of status."""
    at = 1
    for spec, _ in sketched(structure):
        for run in runs(spec):
            yield spec, run, at
            at += run.nbytes


def _samples(structure: Sequence[TensorSpec], shards: Shards | None) -> bytearray:
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


# -- pieces ------------------------------------------------------------------------------------------------------------


class _Mail:
    """Takes part in the rounds of a push, in a thread of its own, and hands out the cells that they bring.

    A context manager: whoever leaves it by an error still takes part in the rounds that are left, saying that it
    failed, so that nobody waits for it.
    """

    def __init__(self, assignment: Assignment, shards: Shards, exchange: Exchange) -> None:
        self._share = assignment.share
        self._specs = {spec.name: spec for spec in assignment.structure}
        self._shards = shards
        self._exchange = exchange
        self._brought = {
            piece.cell for one in self._share.rounds.values() for pieces in one.receives.values() for piece in pieces
        }
        self._changed = threading.Condition()
        self._cells: dict[Cell, tuple[int, Buffer]] = {}
        self._left: dict[int, int] = {}
        """Number of a round -> how many of its cells have not been taken."""
        self._failed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="lamella-exchange", daemon=True)

    def __enter__(self) -> "_Mail":
        if self._share.rounds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._share.rounds:
            self._fail(None)
            self._thread.join()

    def close(self) -> None:
        """Return when all rounds are over. Raises what one of them raised, or another worker's failure."""
        if self._share.rounds:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def brings(self, cell: Cell) -> bool:
        """Whether pieces of a cell come from other workers."""
        return cell in self._brought

    def has(self, cell: Cell) -> bool:
        """Whether :meth:`take` does not wait."""
        with self._changed:
            return cell in self._cells or self._error is not None

    def take(self, cell: Cell) -> Buffer:
        """Return the bytes of a cell, once. Cells have to be taken in the order in which they are stored."""
        with self._changed:
            self._changed.wait_for(lambda: cell in self._cells or self._error is not None)
            if cell not in self._cells:
                assert self._error is not None
                raise self._error
            number, data = self._cells.pop(cell)
            self._left[number] -= 1
            if not self._left[number]:
                del self._left[number]
                self._changed.notify_all()
            return data

    def _fail(self, error: Exception | None) -> None:
        with self._changed:
            self._failed = True
            self._error = self._error or error
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for number, one in self._share.rounds.items():
                with self._changed:
                    self._changed.wait_for(lambda: self._failed or len(self._left) < ROUNDS_AHEAD)
                sends = {worker: self._message(pieces) for worker, pieces in one.sends.items()}
                lengths = {worker: 1 + _total(pieces) for worker, pieces in one.receives.items()}
                received = self._exchange.swap(number, sends, lengths)
                if any(data[0] for data in received.values()):
                    self._fail(worker_failed())
                elif not self._failed:
                    try:
                        self._deliver(number, one, received)
                    except Exception as error:  # the rounds that are left are others' too
                        self._fail(error)
        except Exception as error:  # raised by whoever waits for a cell, or for the end
            self._fail(error)

    def _message(self, pieces: Sequence[Piece]) -> memoryview:
        """Return a byte that says whether this worker has failed, and the bytes of the pieces."""
        out = np.empty(1 + _total(pieces), np.uint8)
        at = 1
        try:
            for piece in () if self._failed else pieces:
                data = self._shards.read(self._specs[piece.cell.tensor or ""], piece.box)
                out[at : at + piece.nbytes] = np.frombuffer(data, np.uint8)
                at += piece.nbytes
        except Exception as error:  # of a device too: the others wait for this message all the same
            self._fail(error)
        out[0] = self._failed
        return out.data

    def _deliver(self, number: int, one: Round, received: Mapping[int, Buffer]) -> None:
        cells: dict[Cell, np.ndarray[tuple[int], np.dtype[np.uint8]]] = {}
        for worker, pieces in one.receives.items():
            at = 1
            for piece in pieces:
                spec = self._specs[piece.cell.tensor or ""]
                region = spec.grid.region(piece.cell.number)
                if piece.cell not in cells:
                    cells[piece.cell] = np.empty(region.nbytes, np.uint8)
                    self._shards.fill(spec, box_of(region), cells[piece.cell])
                data = memoryview(received[worker])[at : at + piece.nbytes]
                paste(spec, box_of(region), cells[piece.cell], piece.box, data)
                at += piece.nbytes
        with self._changed:
            if cells:
                self._left[number] = len(cells)
                self._cells.update((cell, (number, data.data)) for cell, data in cells.items())
            self._changed.notify_all()


def _total(pieces: Sequence[Piece]) -> int:
    return sum(piece.nbytes for piece in pieces)
