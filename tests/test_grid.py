"""The grid, against the words of FORMAT.md: it is part of every id, so any change of it is a change of every id."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella_engine import chunking
from lamella_engine.chunking import MAX_CELL_ELEMENTS, MAX_CELL_NBYTES, Grid, grid
from lamella_engine.dtypes import dtype_named
from lamella_engine.model import TensorSpec

ITEM_SIZES = (1, 2, 4, 8, 16)

SHAPES = (
    (),
    (0,),
    (1,),
    (5, 0, 7),
    (0, 1 << 30),
    (7,),
    (1 << 20,),
    ((1 << 20) + 1,),
    (3_000_000,),
    (30_522, 384),
    (30_528, 384),
    (50_257, 768),
    (50_304, 768),
    (128_256, 4_096),
    (768, 3_072),
    (4_096, 14_336),
    (3, 3),
    (64, 3, 7, 7),
    (1, 1 << 20),
    (1, (1 << 20) + 1),
    (2, 1_500_000),
    (3, 5, 1_000_000),
    (8, 14_336, 4_096),
    (16, 1 << 21),
    (5, 3, 1_048_577),
    (1, 1, 1, 1),
    (1, 1, 5_000_001, 2),
    (1_000_003,),
    (999_983, 3),
    (2, 2, 2, 2_097_152),
)

# The sha256 of the table that `table_of_grids` makes. It may never change: versions cut by another grid share no chunk
# with those in existing repositories, and the same weights would have another parameters id.
GOLDEN = "73d7678c9ecf1ea315540ea4438fd6e3aca71345f05b6d0ac2444d6d110cba99"


def table_of_grids() -> str:
    """Write down the grid of every shape with every item size: its cut, and its first and last two cells."""
    lines = []
    for shape, itemsize in product(SHAPES, ITEM_SIZES):
        cells = grid(shape, itemsize)
        count = cells.cell_count
        shown = sorted({index for index in (0, 1, count - 2, count - 1) if 0 <= index < count})
        places = [(at, region.start, region.nbytes) for at in shown for region in [cells.region(at)]]
        lines.append(f"{list(shape)} {itemsize}: axis {cells.axis} length {cells.length} cells {count} {places}\n")
    return "".join(lines)


def test_the_grid_of_a_table_of_shapes_never_changes():
    assert hashlib.sha256(table_of_grids().encode()).hexdigest() == GOLDEN


def lengths_by_the_words(shape: tuple[int, ...], itemsize: int, elements: int, nbytes: int) -> tuple[int, ...]:
    """Return the shape of a full cell, step by step as FORMAT.md has it, for any N."""
    n = min(elements, nbytes // itemsize)
    k = min(axis for axis in range(len(shape)) if prod(shape[axis + 1 :]) <= n)
    r = n // prod(shape[k + 1 :])
    if k == 0:
        power = max(1 << bit for bit in range(64) if 1 << bit <= r)
        length = min(shape[0], power)
    else:
        parts = next(parts for parts in range(1, shape[k] + 1) if parts * r >= shape[k])  # ceil(shape[k] / r)
        length = next(each for each in range(1, shape[k] + 1) if each * parts >= shape[k])
    return (1,) * k + (length,) + shape[k + 1 :]


def boxes(shape: tuple[int, ...], cell: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield the boxes into which cells of one shape cut an array, in C order."""
    axes = [
        [slice(at, min(at + step, length)) for at in range(0, length, step)]
        for length, step in zip(shape, cell, strict=True)
    ]
    yield from product(*axes)


@contextmanager
def small_cells(elements: int, nbytes: int) -> Iterator[None]:
    """Cut much smaller cells, so that small arrays have many."""
    patch = pytest.MonkeyPatch()
    patch.setattr(chunking, "MAX_CELL_ELEMENTS", elements)
    patch.setattr(chunking, "MAX_CELL_NBYTES", nbytes)
    try:
        yield
    finally:
        patch.undo()


shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
limits = st.tuples(st.integers(1, 64), st.sampled_from([16, 32, 64, 128]))


@given(shape=shapes, itemsize=st.sampled_from(ITEM_SIZES), limit=limits)
def test_cells_are_the_boxes_that_the_rule_describes(shape, itemsize, limit):
    with small_cells(*limit):
        cells = grid.__wrapped__(shape, itemsize)
    expected = lengths_by_the_words(shape, itemsize, *limit)
    assert cells.cell_shape == expected
    assert [region.slices for region in cells.regions()] == list(boxes(shape, expected))


@given(shape=shapes, itemsize=st.sampled_from(ITEM_SIZES), limit=limits)
def test_a_cell_is_one_run_of_bytes_and_cells_tile_the_tensor_without_a_hole(shape, itemsize, limit):
    with small_cells(*limit):
        cells = grid.__wrapped__(shape, itemsize)
    tensor = np.random.default_rng(0).integers(0, 256, (*shape, itemsize), np.uint8)
    whole = tensor.tobytes()
    at = 0
    for number, region in enumerate(cells.regions()):
        assert region.start == at
        assert region.nbytes == cells.cell_nbytes(number)
        assert whole[region.start : region.stop] == tensor[region.slices].tobytes()
        assert 0 < region.nbytes <= min(limit[0] * itemsize, limit[1])
        at = region.stop
    assert at == len(whole)


@given(shape=shapes, itemsize=st.sampled_from(ITEM_SIZES), limit=limits, data=st.data())
def test_cells_between_are_those_that_overlap(shape, itemsize, limit, data):
    with small_cells(*limit):
        cells = grid.__wrapped__(shape, itemsize)
    nbytes = prod(shape) * itemsize
    start = data.draw(st.integers(0, nbytes))
    stop = data.draw(st.integers(0, nbytes))
    overlapping = [n for n, region in enumerate(cells.regions()) if region.start < stop and start < region.stop]
    expected = overlapping if start < stop else []
    assert list(cells.cells_between(start, stop)) == expected


big = st.lists(st.integers(1, 5_000_000), min_size=1, max_size=3).map(tuple)


@given(shape=big, itemsize=st.sampled_from(ITEM_SIZES), data=st.data())
def test_real_cells_hold_at_most_the_limit_and_neighbours_touch(shape, itemsize, data):
    cells = grid(shape, itemsize)
    limit = min(MAX_CELL_ELEMENTS * itemsize, MAX_CELL_NBYTES)
    index = data.draw(st.integers(0, cells.cell_count - 1))
    region = cells.region(index)
    assert 0 < region.nbytes <= limit
    assert region.nbytes == prod(part.stop - part.start for part in region.slices) * itemsize
    before = cells.region(index - 1).stop if index else 0
    assert region.start == before
    assert cells.region(cells.cell_count - 1).stop == prod(shape) * itemsize
    assert list(cells.cells_between(region.start, region.stop)) == [index]


@given(shape=big, itemsize=st.sampled_from(ITEM_SIZES))
def test_real_cells_follow_the_rule(shape, itemsize):
    cells = grid(shape, itemsize)
    n = min(1 << 20, (4 << 20) // itemsize)
    assert prod(cells.cell_shape) <= n
    assert all(prod(shape[axis + 1 :]) > n for axis in range(cells.axis))
    if cells.axis == 0:
        assert cells.length == shape[0] or cells.length & (cells.length - 1) == 0
        assert cells.length == shape[0] or 2 * cells.length * prod(shape[1:]) > n
    else:
        parts = -(-shape[cells.axis] // cells.length)
        assert (parts - 1) * (n // prod(shape[cells.axis + 1 :])) < shape[cells.axis]  # no fewer cells would do
        assert parts == 1 or (cells.length - 1) * parts < shape[cells.axis]  # no shorter cells would do


@given(rows=st.integers(1, 10_000_000), more=st.integers(0, 1_000_000), width=st.sampled_from([1, 64, 384, 4096]))
def test_a_grown_vocabulary_keeps_its_full_cells(rows, more, width):
    old, new = grid((rows, width), 4), grid((rows + more, width), 4)
    for index in {0, old.cell_count // 2, old.cell_count - 2} & set(range(old.cell_count - 1)):
        assert old.region(index) == new.region(index)


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
def test_a_scalar_is_one_cell(itemsize):
    cells = grid((), itemsize)
    assert (cells.cell_count, cells.cell_shape) == (1, ())
    assert [(region.slices, region.start, region.nbytes) for region in cells.regions()] == [((), 0, itemsize)]
    assert list(cells.cells_between(0, itemsize)) == [0]


@pytest.mark.parametrize("shape", [(0,), (5, 0), (0, 5, 7), (1 << 40, 0)])
def test_an_empty_tensor_has_no_cells(shape):
    cells = grid(shape, 4)
    assert (cells.cell_count, list(cells.regions()), list(cells.cells_between(0, 100))) == (0, [], [])


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_cell_outside_the_grid(index):
    cells = grid((3_000_000,), 1)
    assert cells.cell_count == 3
    with pytest.raises(IndexError):
        cells.region(index)


def test_sub_byte_tensors_are_cut_as_bytes():
    spec = TensorSpec("w", dtype_named("f6_e2m3"), (4, 1 << 20))
    assert spec.grid == grid((3 << 20,), 1) == Grid((3 << 20,), 1, 0, 1 << 20)
