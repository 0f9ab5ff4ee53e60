"""The grid: how a tensor is cut into cells. Shape and item size alone decide (FORMAT.md, "Grid").

Because ranks, files and callers' own chunks have no say, the same tensor has the same chunk ids wherever it comes from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

# Longest cell in elements and in bytes. 1 Mi elements is where a delta stops gaining from more context (256 Ki costs
# 2.4 %, 4 Mi gains 0.3 % on bf16 fine-tunes); 4 MiB bounds what one decode has to hold. Both are part of every
# version's id: never change them.
MAX_CELL_ELEMENTS = 1 << 20
MAX_CELL_NBYTES = 4 << 20

POOLED_NBYTES = 1 << 16
"""Cells from this length on are worth memory that is used again; shorter ones are cheap to have anew."""


@dataclass(frozen=True, slots=True)
class Region:
    """The place of one cell in its tensor: a box, and the run of C-order bytes that it is."""

    slices: tuple[slice, ...]
    """One slice for each axis, in elements; ``array[slices]`` is the cell."""
    start: int
    """First byte of the cell in the tensor's C-order bytes."""
    nbytes: int

    @property
    def stop(self) -> int:
        """One past the cell's last byte."""
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of a tensor of ``shape`` with ``itemsize`` bytes an element.

    An opaque tensor (sub-byte dtype) is gridded as ``(nbytes,)`` with ``itemsize`` 1.
    """

    shape: tuple[int, ...]
    itemsize: int
    axis: int
    """The axis that is cut (k in FORMAT.md); cells are 1 long before it and whole after it."""
    length: int
    """Cell length on that axis; the last cell of a row of cells may be shorter."""

    @property
    def cell_shape(self) -> tuple[int, ...]:
        """Shape of a full cell, one entry for each axis."""
        return (1,) * self.axis + (self.length,) * bool(self.shape) + self.shape[self.axis + 1 :]

    @property
    def cell_count(self) -> int:
        """Number of cells: 1 for a scalar, 0 for an empty tensor."""
        if not self.shape:
            return 1
        if 0 in self.shape:
            return 0
        return prod(self.shape[: self.axis]) * -(-self.shape[self.axis] // self.length)

    @property
    def tail_nbytes(self) -> int:
        """Bytes of one step on the cut axis."""
        return prod(self.shape[self.axis + 1 :]) * self.itemsize

    def cell_nbytes(self, index: int) -> int:
        """Return how long cell ``index`` is: ``region(index).nbytes``, found faster."""
        if not self.shape:
            return self.itemsize
        last = -(-self.shape[self.axis] // self.length) - 1
        if index % (last + 1) < last:
            return self.length * self.tail_nbytes
        return (self.shape[self.axis] - last * self.length) * self.tail_nbytes

    def region(self, index: int) -> Region:
        """Return the place of cell ``index`` (C order over the grid). Raises IndexError outside the grid."""
        if not 0 <= index < self.cell_count:
            raise IndexError(f"cell {index} of a grid of {self.cell_count}")
        if not self.shape:
            return Region((), 0, self.itemsize)
        per_row = -(-self.shape[self.axis] // self.length)
        row, column = divmod(index, per_row)
        first = column * self.length
        last = min(first + self.length, self.shape[self.axis])
        leading: list[slice] = []
        rest = row
        for length in reversed(self.shape[: self.axis]):
            rest, at = divmod(rest, length)
            leading.append(slice(at, at + 1))
        slices = (*reversed(leading), slice(first, last), *(slice(0, n) for n in self.shape[self.axis + 1 :]))
        start = (row * self.shape[self.axis] + first) * self.tail_nbytes
        return Region(slices, start, (last - first) * self.tail_nbytes)

    def regions(self) -> Iterator[Region]:
        """Yield the place of every cell in order; their byte runs follow one another without a hole."""
        return (self.region(index) for index in range(self.cell_count))

    def cells_in(self, box: Sequence[tuple[int, int]]) -> Iterator[int]:
        """Yield the indexes, ascending, of the cells that hold any element of a box.

        ``box`` has (first, stop) for each axis, within the shape.
        """
        if not self.cell_count or any(first >= stop for first, stop in box):
            return
        if not self.shape:
            yield 0
            return
        per_row = -(-self.shape[self.axis] // self.length)
        first, stop = box[self.axis]
        columns = range(first // self.length, (stop - 1) // self.length + 1)
        for leading in product(*(range(*span) for span in box[: self.axis])):
            row = 0
            for at, length in zip(leading, self.shape, strict=False):
                row = row * length + at
            yield from range(row * per_row + columns.start, row * per_row + columns.stop)

    def cells_between(self, start: int, stop: int) -> range:
        """Return the indexes of the cells that hold any of the tensor's bytes ``start`` to ``stop`` (half-open)."""
        if start >= stop or not self.cell_count:
            return range(0)
        if not self.shape:
            return range(1)
        return range(self._cell_at(start), self._cell_at(stop - 1) + 1)

    def _cell_at(self, byte: int) -> int:
        row, offset = divmod(byte, self.shape[self.axis] * self.tail_nbytes)
        return row * -(-self.shape[self.axis] // self.length) + offset // (self.length * self.tail_nbytes)


@lru_cache(4096)
def grid(shape: tuple[int, ...], itemsize: int) -> Grid:
    """Cut a tensor of ``shape`` (each >= 0) with ``itemsize`` bytes an element (1 to 16).

    With N = min(2^20, 4 MiB / itemsize), the cut axis is the first whose trailing axes hold at most N elements; on it,
    with r = N // trailing, cells are as long as the largest power of two <= r when it is axis 0 (a vocabulary that
    grows keeps its full cells, and row shards of 2^n ranks line up with cells), else as even as ceil(length / r)
    cells can be.
    """
    limit = min(MAX_CELL_ELEMENTS, MAX_CELL_NBYTES // itemsize)
    if not shape or 0 in shape:
        return Grid(shape, itemsize, 0, 1)
    axis = 0
    trailing = prod(shape[1:])
    while trailing > limit:
        axis += 1
        trailing //= shape[axis]
    longest = limit // trailing
    if axis == 0:
        length = min(shape[0], 1 << (longest.bit_length() - 1))
    else:
        length = -(-shape[axis] // -(-shape[axis] // longest))
    return Grid(shape, itemsize, axis, length)
