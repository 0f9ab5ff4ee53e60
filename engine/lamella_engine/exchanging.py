"""How a worker of a shared push comes by the pieces of its cells that others have: in rounds, or by asking for them."""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from lamella_engine.boxes import Octets, box_of, paste
from lamella_engine.checkpoints.shards import Shards
from lamella_engine.errors import StorageError
from lamella_engine.model import Buffer, Cell, TensorSpec
from lamella_engine.sharding import Piece, Round, Share

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


Read = Callable[[memoryview | None], Buffer]
"""Returns the bytes of a cell; may use the memory it is given."""

Fetch = Callable[[Mapping[int, Sequence[Piece]]], Mapping[int, Buffer]]
"""Given a worker's number -> pieces of one cell that it has, returns what :func:`pieces_of` gives there."""


class Elsewhere(Protocol):
    """The cells of which other workers have pieces."""

    def reader(self, cell: Cell) -> Read | None:
        """Return what reads a cell; None if all of it is here. Asked once, in the order in which cells are stored."""

    def has(self, cell: Cell) -> bool:
        """Whether :meth:`reader` does not wait for other workers."""

    def close(self) -> None:
        """Return when this worker has done its part. Raises what went wrong meanwhile."""


def worker_failed() -> StorageError:
    """Return the error for a push that another worker has given up."""
    return StorageError(
        "another worker could not store its part, and says why itself: push again when that is mended",
        kind="worker_failed",
        transient=True,
    )


def pieces_of(structure: Mapping[str, TensorSpec], shards: Shards, pieces: Sequence[Piece], out: Octets) -> None:
    """Write the bytes of some pieces into ``out``, one after another, which is as long as they are."""
    at = 0
    for piece in pieces:
        shards.expect(structure[piece.cell.tensor or ""], piece.box)
    for piece in pieces:
        data = shards.read(structure[piece.cell.tensor or ""], piece.box)
        out[at : at + piece.nbytes] = np.frombuffer(data, np.uint8)
        at += piece.nbytes


class _Whole:
    """A cell that is put together of what is here and what others have."""

    def __init__(self, spec: TensorSpec, number: int, shards: Shards) -> None:
        self._spec = spec
        region = spec.grid.region(number)
        self._box = box_of(region)
        self.octets = np.empty(region.nbytes, np.uint8)
        shards.fill(spec, self._box, self.octets)

    def paste(self, pieces: Sequence[Piece], data: memoryview) -> None:
        """Enter pieces, whose bytes follow one another."""
        at = 0
        for piece in pieces:
            paste(self._spec, self._box, self.octets, piece.box, data[at : at + piece.nbytes])
            at += piece.nbytes


class Fetched:
    """See :class:`Elsewhere`: asks for the pieces of a cell whenever it is read."""

    def __init__(self, share: Share, structure: Sequence[TensorSpec], shards: Shards, fetch: Fetch) -> None:
        self._brought = share.brought()
        self._specs = {spec.name: spec for spec in structure}
        self._shards = shards
        self._fetch = fetch

    def reader(self, cell: Cell) -> Read | None:
        """See :class:`Elsewhere`; may be asked again, in any order."""
        return partial(self._read, cell) if cell in self._brought else None

    def has(self, cell: Cell) -> bool:
        """See :class:`Elsewhere`. It never does."""
        return True

    def close(self) -> None:
        """See :class:`Elsewhere`. There is nothing that others wait for."""

    def _read(self, cell: Cell, memory: memoryview | None) -> Buffer:
        wanted: dict[int, list[Piece]] = {}
        for worker, piece in self._brought[cell]:
            wanted.setdefault(worker, []).append(piece)
        whole = _Whole(self._specs[cell.tensor or ""], cell.number, self._shards)
        for worker, data in self._fetch(wanted).items():
            whole.paste(wanted[worker], memoryview(data))
        return whole.octets.data


class Mail:
    """See :class:`Elsewhere`: takes part in the rounds of a push, in a thread of its own.

    A context manager: whoever leaves it by an error still takes part in the rounds that are left, saying that it
    failed, so that nobody waits for it.
    """

    def __init__(self, share: Share, structure: Sequence[TensorSpec], shards: Shards, exchange: Exchange) -> None:
        self._share = share
        self._specs = {spec.name: spec for spec in structure}
        self._shards = shards
        self._exchange = exchange
        self._brought = self._share.brought().keys()
        self._changed = threading.Condition()
        self._cells: dict[Cell, tuple[int, Buffer]] = {}
        self._left: dict[int, int] = {}
        """Number of a round -> how many of its cells have not been taken."""
        self._failed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="lamella-exchange", daemon=True)

    def __enter__(self) -> "Mail":
        if self._share.rounds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._share.rounds:
            self._fail(None)
            self._thread.join()

    def close(self) -> None:
        """See :class:`Elsewhere`: when all rounds are over. Raises what one of them did, or another's failure."""
        if self._share.rounds:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def reader(self, cell: Cell) -> Read | None:
        """See :class:`Elsewhere`. Waits for the round that brings the cell, and raises what that raised."""
        return partial(_given, self._take(cell)) if cell in self._brought else None

    def has(self, cell: Cell) -> bool:
        """See :class:`Elsewhere`."""
        with self._changed:
            return cell not in self._brought or cell in self._cells or self._error is not None

    def _take(self, cell: Cell) -> Buffer:
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
        try:
            if not self._failed:
                pieces_of(self._specs, self._shards, pieces, out[1:])
        except Exception as error:  # of a device too: the others wait for this message all the same
            self._fail(error)
        out[0] = self._failed
        return out.data

    def _deliver(self, number: int, one: Round, received: Mapping[int, Buffer]) -> None:
        cells: dict[Cell, _Whole] = {}
        for worker, pieces in one.receives.items():
            at = 1
            for piece in pieces:
                cell = piece.cell
                if cell not in cells:
                    cells[cell] = _Whole(self._specs[cell.tensor or ""], cell.number, self._shards)
                cells[cell].paste([piece], memoryview(received[worker])[at : at + piece.nbytes])
                at += piece.nbytes
        with self._changed:
            if cells:
                self._left[number] = len(cells)
                self._cells.update((cell, (number, whole.octets.data)) for cell, whole in cells.items())
            self._changed.notify_all()


def _given(data: Buffer, memory: memoryview | None) -> Buffer:
    return data


def _total(pieces: Sequence[Piece]) -> int:
    return sum(piece.nbytes for piece in pieces)
