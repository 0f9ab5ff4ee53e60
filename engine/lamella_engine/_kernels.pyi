"""
Per-chunk loops. cpp_ext/kernels.hpp defines each; all of them let go of the GIL.
"""

from collections.abc import Sequence
import enum
from typing import Annotated

import numpy
from numpy.typing import NDArray


class Kind(enum.Enum):
    """What a lane is to moments."""

    TABLE8 = 0

    INT16 = 1

    UINT16 = 2

    INT32 = 3

    UINT32 = 4

    INT64 = 5

    UINT64 = 6

    FLOAT16 = 7

    BFLOAT16 = 8

    FLOAT32 = 9

    FLOAT64 = 10

    COMPLEX64 = 11

    COMPLEX128 = 12

class Cast(enum.Enum):
    """A conversion between floats."""

    FLOAT32_TO_BFLOAT16 = 0

    FLOAT32_TO_FLOAT16 = 1

    BFLOAT16_TO_FLOAT32 = 2

    FLOAT16_TO_FLOAT32 = 3

def isa() -> str:
    """Name of the variant in use: "avx2" or "scalar"."""

def set_isa(isa: str) -> None:
    """
    Use this variant from now on, in all threads; they differ in speed only. Raises ValueError.
    """

def split_planes(src: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], planes: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """planes[p, i] = byte p of lane i of src; planes is (width, lanes)."""

def xor_split(src: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], base: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], planes: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """split_planes of src ^ base."""

def residual_split(src: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], base: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], planes: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """split_planes of the residual of src against base."""

def merge_planes(planes: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Inverse of split_planes; 1, 2, 4 or 8 planes, which may lie apart."""

def xor_merge(planes: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], base: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Inverse of xor_split."""

def residual_merge(planes: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], base: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Inverse of residual_split."""

def coder_workspace(nbytes: int, width: int) -> int:
    """
    Bytes of workspace that the coders below take for chunks of up to nbytes.
    """

def residual_encode(src: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], base: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], width: int, workspace: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> int:
    """
    Write the RESIDUAL_RANS payload of src to the front of out; return its bytes, or 0 if out is too short.
    """

def residual_decode(payload: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], base: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], width: int, workspace: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> str | None:
    """
    Inverse of residual_encode. Return None, or what is wrong with the payload: then out is undefined.
    """

def cast(src: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], how: Cast, out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Convert lanes, each to one lane of out."""

def float_encode(src: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], guide: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, width: int, workspace: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> int:
    """
    Write the FLOAT_RANS payload of src, or GUIDED_RANS with a guide, to the front of out; return its bytes, or 0 if out is too short.
    """

def float_decode(payload: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], guide: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, width: int, workspace: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> str | None:
    """
    Inverse of float_encode. Return None, or what is wrong with the payload: then out is undefined.
    """

def decay(base: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], factor: int, halvings: int, out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """out = base * factor / 2^(32 + halvings), lanes being float32."""

def decay_fold(src: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], decayed: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """
    Move lanes that are above a decayed base such that their residuals have no sign.
    """

def decay_unfold(folded: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], decayed: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Inverse of decay_fold; out may be folded."""

def is_constant(src: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], width: int) -> bool:
    """Whether all lanes of src are equal."""

def moments(a: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], b: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], kind: Kind, table: Annotated[NDArray[numpy.float64], dict(shape=(256), order='C', device='cpu', writable=False)] | None = None) -> tuple[int, int, float, float, float, float, float, float]:
    """
    Return (count, changed, sum (a-b)^2, sum |a-b|, max |a-b|, sum ab, sum a^2, sum b^2).
    """

def residual_moments(a: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], payload: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], base: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], width: int, workspace: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], kind: Kind, table: Annotated[NDArray[numpy.float64], dict(shape=(256), order='C', device='cpu', writable=False)] | None = None) -> tuple[int, int, float, float, float, float, float, float] | str:
    """
    Return moments of a and of what residual_decode gives, or what is wrong with the payload.
    """
