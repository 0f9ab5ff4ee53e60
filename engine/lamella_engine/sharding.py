"""Sharding: who of several workers stores which cell of a checkpoint, and which pieces of cells go to whom first.

The grid does not know of ranks, so a cell may lie in parts with several of them. It is stored by the worker that has
most of it; the others send theirs, in rounds, so that no worker ever holds more than a bounded number of bytes that are
not its own.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from lamella_engine.boxes import Box, box_nbytes, box_of, intersection
from lamella_engine.companions import expected, in_order
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import Cell, TensorSpec

ROUND_NBYTES = 8 << 20
"""What one worker sends in one round at most, and the cells come to that it is sent pieces of: a few, so that the first
ones come soon."""

# Of the most that any has of a cell: a worker with so much may store it too. The last of several ranks often has a few
# rows less than the others, and would never store anything.
_NEARLY = 7 / 8


class Piece(NamedTuple):
    """A part of a cell."""

    cell: Cell
    box: Box
    """Its place in the tensor, not in the cell."""
    nbytes: int


@dataclass(slots=True)
class Round:
    """What one worker sends and is sent at a time, by worker. Pieces of a pair travel in this order, as one message."""

    sends: dict[int, list[Piece]] = field(default_factory=dict)
    receives: dict[int, list[Piece]] = field(default_factory=dict)


@dataclass(slots=True)
class Share:
    """What one worker does in a push."""

    worker: int
    cells: dict[str, list[int]] = field(default_factory=dict)
    """Name of a tensor -> the cells of it that this worker stores, ascending."""
    rounds: dict[int, Round] = field(default_factory=dict)
    """Those that it takes part in, by number, ascending."""

    def brought(self) -> dict[Cell, list[tuple[int, Piece]]]:
        """Return the cells of which other workers have pieces that this one lacks: those pieces, and who has each."""
        found: defaultdict[Cell, list[tuple[int, Piece]]] = defaultdict(list)
        for one in self.rounds.values():
            for worker, pieces in one.receives.items():
                for piece in pieces:
                    found[piece.cell].append((worker, piece))
        return dict(found)

    @property
    def sent_nbytes(self) -> int:
        """Bytes that go to other workers."""
        pieces = (piece for one in self.rounds.values() for some in one.sends.values() for piece in some)
        return sum(piece.nbytes for piece in pieces)


class _Lying(NamedTuple):
    """How a cell lies with workers."""

    boxes: tuple[tuple[Box, tuple[int, ...], int], ...]
    """Each box of the cell, who has it, and its bytes."""
    candidates: tuple[int, ...]
    """The workers that have most of the cell, or nearly."""


def _lie(boxes: Sequence[tuple[Box, tuple[int, ...], int]]) -> _Lying:
    held: defaultdict[int, int] = defaultdict(int)
    for _, workers, nbytes in boxes:
        for worker in workers:
            held[worker] += nbytes
    most = max(held.values())
    return _Lying(tuple(boxes), tuple(sorted(worker for worker, nbytes in held.items() if nbytes >= most * _NEARLY)))


def share_out(
    structure: Sequence[TensorSpec], holdings: Mapping[str, Sequence[tuple[Box, int]]], workers: int
) -> list[Share]:
    """Say what each worker does.

    Parameters
    ----------
    structure
        The tensors of the checkpoint, by name.
    holdings
        For each tensor its boxes, and the number (from 0) of a worker that has each. The same box may lie with several
        workers: one of them stores or sends it.
    workers
        How many there are.

    Raises
    ------
    InvalidInputError
        The boxes of a tensor do not make the tensor (``bad_shards``).
    """
    shares = [Share(worker) for worker in range(workers)]
    rounds = _Rounds(shares)
    stored = [0] * workers
    owners: dict[Cell, int] = {}
    companion_of = expected(structure)
    layouts: dict[object, list[_Lying]] = {}
    lying: dict[str, list[_Lying]] = {}
    for spec in structure:
        held = tuple(holdings.get(spec.name, ()))
        layout = (spec.shape, spec.dtype.bits, held)
        if layout not in layouts:  # the layers of a model are few kinds of tensors
            layouts[layout] = _lying(spec, _boxes(held))
        lying[spec.name] = layouts[layout]
    for spec, number, follows in in_order(structure, companion_of, lambda spec: range(spec.grid.cell_count)):
        here = lying[spec.name][number]
        cell = Cell(spec.name, number)
        owner = min(here.candidates, key=stored.__getitem__)
        if follows:  # a chunk can be made against its companion only where that is
            beside = owners[Cell(companion_of[spec.name].name, number)]
            owner = beside if beside in here.candidates else owner
        owners[cell] = owner
        stored[owner] += spec.grid.cell_nbytes(number)
        shares[owner].cells.setdefault(spec.name, []).append(number)
        rounds.send(owner, cell, here)
    return shares


def batches(structure: Sequence[TensorSpec], share: Share, nbytes: int) -> list[Share]:
    """Cut a share into shares of about ``nbytes`` each, at least one: what is stored, and lost, at a time.

    A cell and those that may be made against it stay together. What a batch lacks stands in its one round; nothing is
    said of what it sends.
    """
    brought = share.brought()
    found = [Share(share.worker)]
    filled = 0
    for spec, number, follows in in_order(structure, expected(structure), lambda spec: share.cells.get(spec.name, ())):
        if filled >= nbytes and not follows:
            found.append(Share(share.worker))
            filled = 0
        filled += spec.grid.cell_nbytes(number)
        found[-1].cells.setdefault(spec.name, []).append(number)
        for worker, piece in brought.get(Cell(spec.name, number), ()):
            found[-1].rounds.setdefault(0, Round()).receives.setdefault(worker, []).append(piece)
    return found


def _boxes(held: Iterable[tuple[Box, int]]) -> tuple[tuple[Box, tuple[int, ...]], ...]:
    """Return each box once, with those who have it."""
    holders: defaultdict[Box, set[int]] = defaultdict(set)
    for box, worker in held:
        holders[tuple((int(first), int(stop)) for first, stop in box)].add(worker)
    return tuple((box, tuple(sorted(holders[box]))) for box in sorted(holders))


def _lying(spec: TensorSpec, boxes: Sequence[tuple[Box, tuple[int, ...]]]) -> list[_Lying]:
    """Return how each cell of a tensor lies with workers; raises InvalidInputError unless boxes make the tensor."""
    boxes = [(box, workers) for box, workers in boxes if all(first < stop for first, stop in box)]
    _check_whole(spec, [box for box, _ in boxes])
    grid = spec.grid
    if spec.dtype.opaque and boxes:
        boxes = [(((0, spec.nbytes),), boxes[0][1])]
    found: list[list[tuple[Box, tuple[int, ...], int]]] = [[] for _ in range(grid.cell_count)]
    for box, workers in boxes:
        for number in grid.cells_in(box):
            part = intersection(box, box_of(grid.region(number)))
            assert part is not None
            found[number].append((part, workers, box_nbytes(spec, part)))
    return [_lie(parts) for parts in found]


def _check_whole(spec: TensorSpec, boxes: Sequence[Box]) -> None:
    """Raise InvalidInputError unless boxes cover a tensor, each element once."""

    def refuse(problem: str) -> InvalidInputError:
        return InvalidInputError(
            f"the shards of {spec.name[:80]!r} {problem} its shape {spec.shape}: give each rank's own part of it",
            kind="bad_shards",
            tensor=spec.name,
        )

    if any(len(box) != len(spec.shape) for box in boxes):
        raise refuse("have other axes than")
    if spec.dtype.opaque and boxes and list(boxes) != [tuple((0, length) for length in spec.shape)]:
        raise InvalidInputError(
            f"{spec.name[:80]!r} has packed elements, which are pushed whole: replicate it", kind="bad_shards"
        )
    if any(
        not 0 <= first < stop <= length for box in boxes for (first, stop), length in zip(box, spec.shape, strict=True)
    ):
        raise refuse("lie outside of")
    if sum(prod(stop - first for first, stop in box) for box in boxes) != prod(spec.shape):
        raise refuse("do not add up to")
    if len(boxes) > 1:  # as many elements as the tensor has, so they cover it if none lies in two
        ends = np.array(boxes)
        first, stop = ends[:, :, 0], ends[:, :, 1]
        for at in range(len(boxes) - 1):
            if (np.maximum(first[at], first[at + 1 :]) < np.minimum(stop[at], stop[at + 1 :])).all(axis=1).any():
                raise refuse("overlap in")


class _Rounds:
    """Shares the exchange out over rounds.

    Every worker takes part in its rounds in ascending order, and waits in each for those only that take part in it too,
    so no two ever wait for each other.
    """

    def __init__(self, shares: Sequence[Share]) -> None:
        self._shares = shares
        self._latest = [0] * len(shares)
        self._sent = [0] * len(shares)
        self._received = [0] * len(shares)
        """Bytes in the latest round of each: of pieces that are sent, and of cells that pieces are received of."""

    def send(self, owner: int, cell: Cell, lying: _Lying) -> None:
        """Have the pieces of a cell that its owner lacks sent to it, all in one round."""
        pieces: list[tuple[int, Piece]] = []
        for box, workers, nbytes in lying.boxes:
            if owner not in workers:
                sender = workers[0]
                if len(workers) > 1:
                    sender = min(workers, key=lambda worker: (self._latest[worker], self._sent[worker]))
                pieces.append((sender, Piece(cell, box, nbytes)))
        if not pieces:
            return
        number = max(self._latest[worker] for worker in (owner, *(sender for sender, _ in pieces)))
        outgoing: defaultdict[int, int] = defaultdict(int)
        for sender, piece in pieces:
            outgoing[sender] += piece.nbytes
        incoming = sum(nbytes for *_, nbytes in lying.boxes)  # all of the cell: it is put together in memory
        full = self._in(self._received, owner, number) + incoming > ROUND_NBYTES or any(
            self._in(self._sent, sender, number) + nbytes > ROUND_NBYTES for sender, nbytes in outgoing.items()
        )
        number += full
        for worker in (owner, *outgoing):
            if self._latest[worker] < number:
                self._latest[worker], self._sent[worker], self._received[worker] = number, 0, 0
        self._received[owner] += incoming
        for sender, piece in pieces:
            self._sent[sender] += piece.nbytes
            self._round(sender, number).sends.setdefault(owner, []).append(piece)
            self._round(owner, number).receives.setdefault(sender, []).append(piece)

    def _in(self, nbytes: Sequence[int], worker: int, number: int) -> int:
        return nbytes[worker] if self._latest[worker] == number else 0

    def _round(self, worker: int, number: int) -> Round:
        return self._shares[worker].rounds.setdefault(number, Round())
