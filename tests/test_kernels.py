"""Every variant of every kernel equals a line or two of NumPy, bit for bit, on any bits."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import ChunkPair, chunk_pairs

from lamella_engine import _kernels
from lamella_engine.dtypes import DTYPES, Dtype, dtype_named
from lamella_engine.moments import moments

MEASURED = tuple(dtype for dtype in DTYPES if not dtype.opaque)


def variants() -> list[str]:
    """Name the variants that this build and CPU have."""
    found = []
    before = _kernels.isa()
    for isa in ("scalar", "avx2"):
        try:
            _kernels.set_isa(isa)
        except ValueError:
            continue
        found.append(isa)
    _kernels.set_isa(before)
    return found


@pytest.fixture(scope="module", params=variants())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _kernels.isa()
    _kernels.set_isa(request.param)
    yield request.param
    _kernels.set_isa(before)


def ordered(u):
    sign = u.dtype.type(1 << (8 * u.itemsize - 1))
    return np.where(u & sign, u ^ (sign - u.dtype.type(1)), u)


def residual(x, base):
    sign = x.dtype.type(1 << (8 * x.itemsize - 1))
    d = ordered(x) - ordered(base)
    d = np.where(base & sign, -d, d)
    return d << x.dtype.type(1) ^ np.where(d & sign, ~np.zeros_like(d), np.zeros_like(d))


def planes_of(lanes):
    return lanes.view(np.uint8).reshape(lanes.size, lanes.itemsize).T


RELATIONS = {
    "plain": (
        lambda x, base: x,
        lambda x, base, planes: _kernels.split_planes(x, planes),
        lambda planes, base, out: _kernels.merge_planes(planes, out),
    ),
    "xor": (lambda x, base: x ^ base, _kernels.xor_split, _kernels.xor_merge),
    "residual": (residual, _kernels.residual_split, _kernels.residual_merge),
}


def as_lanes(pair: ChunkPair) -> tuple[np.ndarray, np.ndarray]:
    lane = f"<u{pair.dtype.lane}"
    return np.frombuffer(pair.chunk, lane), np.frombuffer(pair.base, lane)


@pytest.mark.parametrize("relation", RELATIONS)
@given(pair=chunk_pairs())
def test_splitting_equals_numpy_and_merging_undoes_it(isa, relation, pair):
    reference, split, merge = RELATIONS[relation]
    x, base = as_lanes(pair)
    planes = np.empty((x.itemsize, x.size), np.uint8)
    split(x.view(np.uint8), base.view(np.uint8), planes)
    assert planes.tobytes() == planes_of(reference(x, base)).tobytes()
    out = np.empty(x.nbytes, np.uint8)
    merge(list(planes), base.view(np.uint8), out)
    assert out.tobytes() == pair.chunk


@pytest.mark.parametrize("width", [1, 2])
def test_the_residual_of_every_pair_of_small_lanes_is_undone(isa, width):
    # All pairs for bytes; for two bytes, every lane against bases around each edge of the order.
    every = np.arange(1 << 8 * width, dtype=f"<u{width}")
    sign = 1 << (8 * width - 1)
    bases = every if width == 1 else [0, 1, sign - 1, sign, sign + 1, 2 * sign - 1]
    for base in bases:
        against = np.full_like(every, base)
        planes = np.empty((width, every.size), np.uint8)
        _kernels.residual_split(every.view(np.uint8), against.view(np.uint8), planes)
        assert planes.tobytes() == planes_of(residual(every, against)).tobytes()
        out = np.empty(every.nbytes, np.uint8)
        _kernels.residual_merge(list(planes), against.view(np.uint8), out)
        assert out.tobytes() == every.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_a_step_away_from_zero_is_2_and_a_step_towards_it_is_1_on_both_sides(isa, dtype):
    numpy = dtype_named(dtype).numpy
    base = np.array([1.5, -1.5], numpy)
    lane = f"<u{base.itemsize}"
    for step, expected in ((1, 2), (-1, 1)):
        x = (base.view(lane) + np.array(step).astype(lane)).view(np.uint8)
        planes = np.empty((base.itemsize, 2), np.uint8)
        _kernels.residual_split(x, base.view(np.uint8), planes)
        assert planes[0].tolist() == [expected, expected]
        assert not planes[1:].any()


def test_planes_may_lie_apart_and_be_one_another(isa):
    high, low = np.full(70, 1, np.uint8), np.arange(70, dtype=np.uint8)
    out = np.empty(280, np.uint8)
    _kernels.merge_planes([low, high, low, high], out)
    assert out.tobytes() == bytes(byte for i in range(70) for byte in (i, 1, i, 1))


@given(pair=chunk_pairs())
def test_a_chunk_is_constant_if_its_lanes_are_one(pair):
    lanes, _ = as_lanes(pair)
    assert _kernels.is_constant(lanes.view(np.uint8), lanes.itemsize) == (len(set(lanes.tolist())) <= 1)


def float64_bits(values) -> list[bytes]:
    """Return the bits of each, so that -0.0 and NaN are told apart."""
    return [struct.pack("<d", value) for value in values]


def reference_moments(pair: ChunkPair):
    assert pair.dtype.numpy is not None
    a, b = (np.frombuffer(side, pair.dtype.numpy) for side in (pair.chunk, pair.base))
    width = pair.dtype.numpy.itemsize
    changed = sum(pair.chunk[i : i + width] != pair.base[i : i + width] for i in range(0, len(pair.chunk), width))
    same = np.equal(*as_lanes(pair))
    if a.dtype.kind == "c":
        a, b = (side.view(side.real.dtype) for side in (a, b))
    with np.errstate(all="ignore"):
        x, y = a.astype(np.float64), b.astype(np.float64)
        difference = np.where(same, 0.0, x - y)
        terms = (difference**2, abs(difference), x * y, x * x, y * y)
        squared, absolute, dot, squared_a, squared_b = map(strided_sum, terms)
    largest = np.max(abs(difference), initial=0.0)
    largest = np.nan if np.isnan(largest) else largest
    return [len(pair.chunk) // width, changed], [squared, absolute, largest, dot, squared_a, squared_b]


def strided_sum(terms) -> float:
    """Add up in the kernels' order: eight sums by index, then those."""
    rows = np.concatenate([terms, np.zeros(-len(terms) % 8)]).reshape(-1, 8)
    s = reduce(np.add, rows, np.zeros(8))
    total = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
    return np.nan if np.isnan(total) else total


@pytest.mark.parametrize("dtype", MEASURED, ids=lambda dtype: dtype.name)
@given(data=st.data())
def test_moments_equal_numpy_added_in_the_same_order(isa, dtype: Dtype, data):
    pair = data.draw(chunk_pairs((dtype,)))
    found = moments(pair.chunk, pair.base, dtype)
    counts, sums = reference_moments(pair)
    assert [found.count, found.changed] == counts
    assert float64_bits(
        [
            found.squared_difference,
            found.absolute_difference,
            found.largest_difference,
            found.dot,
            found.squared_a,
            found.squared_b,
        ]
    ) == float64_bits(sums)


def test_two_byte_floats_all_have_numpys_values(isa):
    every = np.arange(1 << 16, dtype="<u2")
    for name in ("float16", "bfloat16"):
        dtype = dtype_named(name)
        one = np.full(every.size, 1.0, dtype.numpy)
        with np.errstate(invalid="ignore"):  # half of the NaNs are signalling
            finite = np.isfinite(every.view(dtype.numpy))
        lanes = np.where(finite, every, 0).astype("<u2")
        counts, sums = reference_moments(ChunkPair(lanes.tobytes(), one.tobytes(), dtype))
        found = moments(lanes.tobytes(), one.tobytes(), dtype)
        assert [found.changed, found.dot, found.squared_a] == [counts[1], sums[3], sums[4]]


def test_kernels_refuse_memory_that_does_not_fit():
    eight, four = np.zeros(8, np.uint8), np.zeros(4, np.uint8)
    planes = np.zeros((2, 4), np.uint8)
    strided = np.zeros(16, np.uint8)[::2]
    read_only = np.zeros(8, np.uint8)
    read_only.flags.writeable = False
    refused = [
        lambda: _kernels.split_planes(four, planes),
        lambda: _kernels.split_planes(eight, np.zeros((8, 2), np.uint8)),
        lambda: _kernels.split_planes(np.zeros(9, np.uint8), np.zeros((3, 3), np.uint8)),
        lambda: _kernels.xor_split(eight, four, planes),
        lambda: _kernels.xor_split(four, four, planes),
        lambda: _kernels.residual_split(eight, four, planes),
        lambda: _kernels.residual_split(four, four, planes),
        lambda: _kernels.merge_planes([], eight),
        lambda: _kernels.merge_planes([four], eight),
        lambda: _kernels.merge_planes([four, eight], np.zeros(12, np.uint8)),
        lambda: _kernels.merge_planes([four, four, four], np.zeros(12, np.uint8)),
        lambda: _kernels.xor_merge([four, four], four, eight),
        lambda: _kernels.residual_merge([four, four], four, eight),
        lambda: _kernels.is_constant(eight, 0),
        lambda: _kernels.is_constant(eight, 3),
        lambda: _kernels.moments(eight, four, _kernels.Kind.INT16, None),
        lambda: _kernels.moments(four, four, _kernels.Kind.INT64, None),
        lambda: _kernels.moments(four, four, _kernels.Kind.TABLE8, None),
        lambda: _kernels.moments(four, four, _kernels.Kind.INT16, np.zeros(256)),
        lambda: _kernels.set_isa("avx1024"),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=r"must|goes|no such"):
            call()
    for call in (
        lambda: _kernels.split_planes(strided, planes),
        lambda: _kernels.merge_planes([eight], strided),
        lambda: _kernels.merge_planes([eight], read_only),
        lambda: _kernels.merge_planes([strided], eight),
    ):
        with pytest.raises(TypeError):
            call()


def test_the_environment_can_force_the_scalar_variant():
    command = [sys.executable, "-c", "from lamella_engine import _kernels; print(_kernels.isa())"]
    environment = {**os.environ, "LAMELLA_ISA": "scalar"}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "scalar\n"
