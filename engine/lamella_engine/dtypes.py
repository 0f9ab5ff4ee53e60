"""Element types: one table of every dtype that lamella stores, and the names others give them.

The name (``"float32"``, ``"bfloat16"``, ``"float8_e4m3fn"``) is part of a structure's id, so a row is never renamed.
Names are those of NumPy, ml_dtypes and zarr-extensions; sub-byte types keep their safetensors name in lower case and
are opaque: bytes without elements.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lamella_engine.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type."""

    name: str
    bits: int
    """Bits of one element; a multiple of 8 unless the type is opaque."""
    numpy: "np.dtype[Any] | None"
    """The little-endian NumPy dtype, or None for an opaque type."""
    safetensors: str | None
    """Its name in a safetensors header, or None if that format lacks it."""
    lane: int
    """Bytes of one machine number in an element: 1, 2, 4 or 8. The width that codecs and kernels work in."""
    floating: bool
    """Whether a lane is an IEEE-like float, whose bits order like its values."""

    @property
    def opaque(self) -> bool:
        """Whether elements cannot be addressed singly (sub-byte types)."""
        return self.numpy is None


def _row(name: str, safetensors: str | None, lane: int, *, floating: bool, numpy: Any = None) -> Dtype:
    dtype = np.dtype(numpy if numpy is not None else name)
    return Dtype(name, dtype.itemsize * 8, dtype, safetensors, lane, floating)


def _float8(name: str, safetensors: str | None) -> Dtype:
    return _row(name, safetensors, 1, floating=True, numpy=getattr(ml_dtypes, name))


DTYPES: tuple[Dtype, ...] = (
    _row("bool", "BOOL", 1, floating=False),
    _row("int8", "I8", 1, floating=False),
    _row("int16", "I16", 2, floating=False),
    _row("int32", "I32", 4, floating=False),
    _row("int64", "I64", 8, floating=False),
    _row("uint8", "U8", 1, floating=False),
    _row("uint16", "U16", 2, floating=False),
    _row("uint32", "U32", 4, floating=False),
    _row("uint64", "U64", 8, floating=False),
    _row("float16", "F16", 2, floating=True),
    _row("float32", "F32", 4, floating=True),
    _row("float64", "F64", 8, floating=True),
    _row("bfloat16", "BF16", 2, floating=True, numpy=ml_dtypes.bfloat16),
    _row("complex64", "C64", 4, floating=True),
    _row("complex128", None, 8, floating=True),
    _float8("float8_e4m3fn", "F8_E4M3"),
    _float8("float8_e5m2", "F8_E5M2"),
    _float8("float8_e8m0fnu", "F8_E8M0"),
    _float8("float8_e4m3fnuz", "F8_E4M3FNUZ"),
    _float8("float8_e5m2fnuz", "F8_E5M2FNUZ"),
    _float8("float8_e4m3", None),
    _float8("float8_e3m4", None),
    _float8("float8_e4m3b11fnuz", None),
    Dtype("f4", 4, None, "F4", 1, floating=False),
    Dtype("f6_e2m3", 6, None, "F6_E2M3", 1, floating=False),
    Dtype("f6_e3m2", 6, None, "F6_E3M2", 1, floating=False),
)

_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES if dtype.safetensors is not None}
_BY_NUMPY = {dtype.numpy: dtype for dtype in DTYPES if dtype.numpy is not None}


def dtype_named(name: str) -> Dtype:
    """Look a dtype up by its lamella name; raises InvalidInputError."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise InvalidInputError(f"there is no dtype {name!r}", kind="unknown_dtype", dtype=name) from None


def dtype_of_safetensors(name: str) -> Dtype:
    """Look a dtype up by its name in a safetensors header; raises InvalidInputError."""
    try:
        return _BY_SAFETENSORS[name]
    except KeyError:
        raise InvalidInputError(
            f"{name!r} is no safetensors dtype that lamella knows", kind="unknown_dtype", dtype=name
        ) from None


def dtype_of_numpy(dtype: "np.dtype[Any]") -> Dtype:
    """Look a dtype up by its NumPy dtype, of either byte order.

    Raises InvalidInputError for objects, strings and records.
    """
    found = _BY_NUMPY.get(dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype)
    if found is None:
        raise InvalidInputError(
            f"arrays of dtype {dtype} cannot be stored; convert to a numeric dtype",
            kind="unknown_dtype",
            dtype=str(dtype),
        )
    return found


def nbytes(dtype: Dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises InvalidInputError if a sub-byte tensor does not fill its last byte."""
    bits = dtype.bits
    for length in shape:
        bits *= length
    if bits % 8:
        raise InvalidInputError(
            f"a {dtype.name} tensor of shape {shape} does not end on a byte", kind="misaligned_tensor", dtype=dtype.name
        )
    return bits // 8
