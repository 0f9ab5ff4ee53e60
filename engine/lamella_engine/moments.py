"""What two chunks measure against each other: the sums that distances are made of. Pure functions."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamella_engine import _kernels
from lamella_engine.dtypes import Dtype
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What two runs of elements a and b measure against each other, from one pass over both.

    Sums are float64 over lanes (a complex number is two), in an order that depends on the lengths alone: the same on
    every CPU, bit for bit. Lanes with the same bits differ by 0, even if they are NaN or infinite. Add the moments of
    consecutive runs in their order to get those of the whole.
    """

    count: int = 0
    """Elements."""
    changed: int = 0
    """Elements whose bits differ."""
    squared_difference: float = 0.0
    """Sum of (a - b)^2."""
    absolute_difference: float = 0.0
    """Sum of |a - b|."""
    largest_difference: float = 0.0
    """Maximum of |a - b|; NaN if any difference is."""
    dot: float = 0.0
    """Sum of a * b."""
    squared_a: float = 0.0
    """Sum of a^2."""
    squared_b: float = 0.0
    """Sum of b^2."""

    @classmethod
    def equal(cls, chunk: Buffer, dtype: Dtype) -> "Moments":
        """Return the moments of a chunk against itself; see :func:`moments`."""
        return moments(chunk, chunk, dtype)

    def __add__(self, later: "Moments") -> "Moments":
        largest = max(self.largest_difference, later.largest_difference)
        nan = math.isnan(self.largest_difference) or math.isnan(later.largest_difference)
        return Moments(
            count=self.count + later.count,
            changed=self.changed + later.changed,
            squared_difference=self.squared_difference + later.squared_difference,
            absolute_difference=self.absolute_difference + later.absolute_difference,
            largest_difference=math.nan if nan else largest,
            dot=self.dot + later.dot,
            squared_a=self.squared_a + later.squared_a,
            squared_b=self.squared_b + later.squared_b,
        )


_KINDS = {
    "int16": _kernels.Kind.INT16,
    "uint16": _kernels.Kind.UINT16,
    "int32": _kernels.Kind.INT32,
    "uint32": _kernels.Kind.UINT32,
    "int64": _kernels.Kind.INT64,
    "uint64": _kernels.Kind.UINT64,
    "float16": _kernels.Kind.FLOAT16,
    "bfloat16": _kernels.Kind.BFLOAT16,
    "float32": _kernels.Kind.FLOAT32,
    "float64": _kernels.Kind.FLOAT64,
    "complex64": _kernels.Kind.COMPLEX64,
    "complex128": _kernels.Kind.COMPLEX128,
}


@cache
def _byte_values(dtype: "np.dtype[Any]") -> NDArray[np.float64]:
    """Return the value of each of the 256 elements of a one-byte dtype."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)


def moments(a: Buffer, b: Buffer, dtype: Dtype) -> Moments:
    """Measure two chunks against each other in one pass.

    64-bit integers are rounded to float64 first.

    Parameters
    ----------
    a, b
        Decoded bytes of one length, whole elements of ``dtype``.

    Raises
    ------
    InvalidInputError
        The lengths break these rules, or the dtype is opaque.
    """
    left, right = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    if dtype.numpy is None:
        raise InvalidInputError(
            f"{dtype.name} elements have no value to measure: compare their bytes",
            kind="opaque_dtype",
            dtype=dtype.name,
        )
    if left.size != right.size or left.size % dtype.numpy.itemsize:
        raise InvalidInputError(
            f"chunks of {left.size} and {right.size} bytes are not as many elements of {dtype.name}",
            kind="chunk_length",
        )
    kind = _KINDS.get(dtype.name, _kernels.Kind.TABLE8)
    table = _byte_values(dtype.numpy) if kind is _kernels.Kind.TABLE8 else None
    count, changed, squared, absolute, largest, dot, squared_a, squared_b = _kernels.moments(left, right, kind, table)
    return Moments(
        count=count,
        changed=changed,
        squared_difference=squared,
        absolute_difference=absolute,
        largest_difference=largest,
        dot=dot,
        squared_a=squared_a,
        squared_b=squared_b,
    )
