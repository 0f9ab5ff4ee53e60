"""Hypothesis strategies that draw bits, not values: whatever a lane can hold, a tensor here may hold."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from lamella_engine.dtypes import DTYPES, Dtype

# Lengths around the edges of what kernels treat specially (8 and 32 lanes), and one longer than a zstd header's cost.
_LENGTHS = st.one_of(
    st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 1000]), st.integers(0, 300)
)

# For each lane width, the layouts of its float types as (exponent bits, mantissa bits).
_LAYOUTS = {1: [(4, 3), (5, 2), (3, 4)], 2: [(5, 10), (8, 7)], 4: [(8, 23)], 8: [(11, 52)]}


def _special_lanes(width: int) -> list[int]:
    """Bit patterns that float code likes to get wrong, of both signs, for every layout of this width."""
    patterns = {0, 1, (1 << (8 * width - 1)) - 1}
    for exponent_bits, mantissa_bits in _LAYOUTS[width]:
        infinity = ((1 << exponent_bits) - 1) << mantissa_bits
        quiet = infinity | 1 << (mantissa_bits - 1)
        largest_subnormal = (1 << mantissa_bits) - 1
        one = ((1 << (exponent_bits - 1)) - 1) << mantissa_bits
        patterns |= {infinity, quiet, quiet | 1, infinity | 1, infinity - 1, largest_subnormal, one}
    sign = 1 << (8 * width - 1)
    return sorted(patterns | {pattern | sign for pattern in patterns})


def lanes(width: int, length: int) -> st.SearchStrategy["np.ndarray[Any, Any]"]:
    """Draw ``length`` unsigned lanes of ``width`` bytes: noise, specials, runs and repeats in any mixture."""
    dtype = np.dtype(f"<u{width}")
    lane = st.one_of(st.sampled_from(_special_lanes(width)), st.integers(0, (1 << 8 * width) - 1))

    def fill(alphabet: list[int], seed: int, noisy: bool) -> "np.ndarray[Any, Any]":
        random = np.random.default_rng(seed)
        chosen = np.array(alphabet, dtype)[random.integers(0, len(alphabet), length)]
        noise = np.frombuffer(random.bytes(length * width), dtype)
        return np.where(random.random(length) < 0.5, noise, chosen).astype(dtype) if noisy else chosen

    return st.builds(fill, st.lists(lane, min_size=1, max_size=12), st.integers(0, 2**32 - 1), st.booleans())


@st.composite
def tensors(draw: st.DrawFn, dtype: Dtype) -> "np.ndarray[Any, Any]":
    """Draw a tensor of ``dtype``: 0-d to 3-d, empty, C-ordered or not. An opaque dtype gives its bytes, 1-d."""
    if dtype.numpy is None:
        # Three bytes end on an element for every sub-byte type.
        return draw(lanes(1, 3 * draw(st.integers(0, 100))))
    shape = tuple(draw(st.lists(st.one_of(st.integers(0, 7), st.just(33)), max_size=3)))
    per_element = dtype.numpy.itemsize // dtype.lane
    flat = draw(lanes(dtype.lane, int(np.prod(shape)) * per_element)).view(dtype.numpy)
    if draw(st.booleans()):
        return flat.reshape(shape[::-1]).T
    return flat.reshape(shape)


class ChunkPair(NamedTuple):
    """Two chunks of one dtype and length."""

    chunk: bytes
    base: bytes
    dtype: Dtype


@st.composite
def chunk_pairs(draw: st.DrawFn, dtypes: tuple[Dtype, ...] = DTYPES) -> ChunkPair:
    """Draw a chunk and a base for it: the same, nudged, partly replaced, unrelated or constant."""
    dtype = draw(st.sampled_from(dtypes))
    per_element = 1 if dtype.numpy is None else dtype.numpy.itemsize // dtype.lane
    length = draw(_LENGTHS) * per_element
    base = draw(lanes(dtype.lane, length))
    other = draw(lanes(dtype.lane, length))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    relation = draw(st.sampled_from(["equal", "nudged", "replaced", "unrelated", "constant"]))
    if relation == "equal":
        chunk = base
    elif relation == "nudged":
        chunk = base + random.integers(0, 3, length).astype(base.dtype)
    elif relation == "replaced":
        chunk = np.where(random.random(length) < 0.1, other, base)
    elif relation == "unrelated":
        chunk = other
    else:
        chunk = np.repeat(other[:1], length)
    return ChunkPair(chunk.tobytes(), base.tobytes(), dtype)
