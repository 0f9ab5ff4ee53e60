"""Moments add up, tell equal bits from equal values, and count whole elements; test_kernels.py has their definition."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from strategies import chunk_pairs

from lamella_engine.dtypes import DTYPES, dtype_named
from lamella_engine.errors import InvalidInputError
from lamella_engine.moments import Moments, moments

MEASURED = tuple(dtype for dtype in DTYPES if not dtype.opaque)


def bits(found: Moments) -> tuple[int, int, bytes]:
    sums = (found.squared_difference, found.absolute_difference, found.largest_difference, found.dot)
    return found.count, found.changed, struct.pack("<6d", *sums, found.squared_a, found.squared_b)


@given(pair=chunk_pairs(MEASURED))
def test_equal_chunks_are_at_distance_zero_even_if_not_finite(pair):
    found = moments(pair.chunk, pair.chunk, pair.dtype)
    assert bits(found) == bits(moments(pair.chunk, bytearray(pair.chunk), pair.dtype))  # equal bytes in another place
    assert found.changed == 0
    assert found.squared_difference == found.absolute_difference == found.largest_difference == 0


def test_moments_of_parts_add_up_to_those_of_the_whole():
    a = np.arange(-50, 50, dtype=np.float32)
    b = a[::-1].copy()
    parts = [
        moments(a[i : i + 30].tobytes(), b[i : i + 30].tobytes(), dtype_named("float32")) for i in range(0, 100, 30)
    ]
    # Sums of small whole numbers are exact, so that their order cannot show.
    assert sum(parts, Moments()) == moments(a.tobytes(), b.tobytes(), dtype_named("float32"))


def test_a_nan_stays_in_the_largest_difference_of_a_sum_whichever_part_has_it():
    nan = Moments(largest_difference=math.nan)
    for total in (nan + Moments(largest_difference=1.0), Moments(largest_difference=1.0) + nan):
        assert math.isnan(total.largest_difference)


def test_complex_elements_are_counted_whole():
    a = np.array([1 + 2j, 3 + 4j], np.complex64)
    b = np.array([1 + 3j, 5 + 6j], np.complex64)
    found = moments(a.tobytes(), b.tobytes(), dtype_named("complex64"))
    assert (found.count, found.changed) == (2, 2)
    assert (found.squared_difference, found.largest_difference, found.squared_a) == (9.0, 2.0, 30.0)


@pytest.mark.parametrize(
    ("a", "b", "dtype"), [(b"abcd", b"ab", "int8"), (b"abc", b"abc", "int16"), (b"abc", b"abc", "f4")]
)
def test_chunks_that_are_not_as_many_elements_are_invalid_input(a, b, dtype):
    with pytest.raises(InvalidInputError):
        moments(a, b, dtype_named(dtype))
