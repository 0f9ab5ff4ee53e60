"""What two chunks measure against each other: the sums that distances are made of. Pure functions."""

import math
from dataclasses import dataclass, replace
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
    def of_kernel(cls, found: tuple[int, int, float, float, float, float, float, float]) -> "Moments":
        """Return what a kernel returned, with names."""
        count, changed, squared, absolute, largest, dot, squared_a, squared_b = found
        return cls(
            count=count,
            changed=changed,
            squared_difference=squared,
            absolute_difference=absolute,
            largest_difference=largest,
            dot=dot,
            squared_a=squared_a,
            squared_b=squared_b,
        )

    @property
    def swapped(self) -> "Moments":
        """The moments of b and a."""
        return replace(self, squared_a=self.squared_b, squared_b=self.squared_a)

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
    kind, table = elements(dtype, left.size, right.size)
    return Moments.of_kernel(_kernels.moments(left, right, kind, table))


def elements(dtype: Dtype, *nbytes: int) -> tuple[_kernels.Kind, NDArray[np.float64] | None]:
    """Return what elements of a dtype are to the kernels, and the value of each byte if they are one.

    Raises InvalidInputError unless chunks of ``nbytes`` are equally many elements, or if the dtype is opaque.
    """
    if dtype.numpy is None:
        raise InvalidInputError(
            f"{dtype.name} elements have no value to measure: compare their bytes",
            kind="opaque_dtype",
            dtype=dtype.name,
        )
    if len(set(nbytes)) != 1 or nbytes[0] % dtype.numpy.itemsize:
        raise InvalidInputError(
            f"chunks of {' and '.join(map(str, nbytes))} bytes are not as many elements of {dtype.name}",
            kind="chunk_length",
        )
    kind = _KINDS.get(dtype.name)
    return (_kernels.Kind.TABLE8, _byte_values(dtype.numpy)) if kind is None else (kind, None)
