"""Lamella's nouns in Zarr v3: names as node names, dtypes as data types, tensors as array metadata.

Importing this module imports zarr, so modules that are loaded with ``lamella`` import it on use only.

Zarr knows neither bfloat16 nor float8. They are registered under the names that zarr-extensions gives them, which are
lamella's, with the rules for fill values that the specification has for floats: a number, ``"NaN"``, ``"Infinity"``,
``"-Infinity"``, or the bits in hex. Nothing here compares or converts values where bits are meant, so that -0.0 and the
payloads of NaNs survive.
"""

import re
import sys
from dataclasses import dataclass
from math import isinf, isnan
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import numpy as np
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

from lamella_engine.dtypes import Dtype, dtype_named
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import TensorSpec

if TYPE_CHECKING:
    from zarr.core.common import JSON, ZarrFormat
    from zarr.core.dtype.common import DTypeJSON

ATTRIBUTE = "lamella"
"""Key of the attribute in which an array says what a Zarr node cannot: the tensor's name, and an opaque dtype."""

# -- names -------------------------------------------------------------------------------------------------------------

# What a node's name must not hold: separators, the escape itself, and what check_attachment_path refuses in a file's
# name (characters that drive a terminal or turn its text round).
_ESCAPED = re.compile("[%/\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

# Zarr reserves names of dots and of a leading "__"; a leading dot also hides a file; and in a group "zarr.json" is the
# metadata itself. Escaping the first character makes an ordinary name of each.
_ESCAPED_FIRST = re.compile(r"[._]|zarr\.json\Z")

# Longest node name in UTF-8 bytes: NAME_MAX of Linux, so that what can be viewed can be exported.
_MAX_NODE_NBYTES = 255


def node_name(name: str) -> str:
    """Return the name of the node that holds the tensor ``name``: the name, percent-encoded where Zarr needs it.

    No two names have one node name: :func:`urllib.parse.unquote` gives the name back (``%`` alone is the empty name).

    Raises InvalidInputError (``bad_tensor_name``) if no file could be named so.
    """
    escaped = _ESCAPED.sub(lambda found: _percent(found[0]), name)
    if _ESCAPED_FIRST.match(escaped):
        escaped = _percent(escaped[0]) + escaped[1:]
    if len(escaped.encode()) > _MAX_NODE_NBYTES:
        raise InvalidInputError(
            f"the tensor name {name[:80]!r}... is longer than {_MAX_NODE_NBYTES} bytes, which no Zarr directory can "
            "hold: rename the tensor",
            kind="bad_tensor_name",
        )
    return escaped or "%"


def _percent(characters: str) -> str:
    return "".join(f"%{byte:02X}" for byte in characters.encode())


# -- arrays ------------------------------------------------------------------------------------------------------------


def array_metadata(spec: TensorSpec) -> dict[str, "JSON"]:
    """Return the Zarr v3 metadata of a tensor whose chunks are its cells, plain bytes, edge chunks padded.

    An opaque dtype is shown as its bytes, uint8, 1-d; dtype and shape then stand beside the name in the attribute.
    """
    dtype, shape = spec.dtype, spec.shape
    described: dict[str, JSON] = {"name": spec.name}
    if dtype.opaque:
        described |= {"dtype": dtype.name, "shape": list(shape)}
        dtype, shape = dtype_named("uint8"), (spec.nbytes,)
    node = node_name(spec.name)
    codec: dict[str, JSON] = {"name": "bytes"}
    if dtype.bits > 8:
        codec["configuration"] = {"endian": "little"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape(spec))}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_to_json(dtype, bytes(dtype.bits // 8)),
        "codecs": [codec],
        "attributes": {ATTRIBUTE: described},
        # Tools such as xarray take equal names for equal axes. A slash, which no node name has, keeps these apart from
        # the names of arrays, which would make coordinates of them.
        "dimension_names": [f"{node}/{axis}" for axis in range(len(shape))],
    }


def chunk_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Return the shape of a tensor's full cells as Zarr wants it, where even an empty array has chunks."""
    return tuple(max(1, length) for length in spec.grid.cell_shape)


# -- fill values -------------------------------------------------------------------------------------------------------

_HEX = re.compile(r"0x([0-9a-fA-F]{2,16})")
_NAMED = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def fill_from_json(dtype: Dtype, value: object) -> bytes:
    """Return the little-endian bytes of one element that metadata describes as ``value``.

    ``dtype`` is not opaque. Raises InvalidInputError (``bad_fill_value``) for what the specification does not allow,
    and for a number that the dtype cannot hold.
    """
    if dtype.name == "bool" and isinstance(value, bool):
        return bytes([value])
    if dtype.name.startswith("complex") and isinstance(value, list | tuple) and len(value) == 2:
        return b"".join(_float_bits(dtype_named(f"float{dtype.lane * 8}"), part) for part in value)
    if dtype.floating and not dtype.name.startswith("complex"):
        return _float_bits(dtype, value)
    if not dtype.floating and isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        limits = np.iinfo(cast("Any", dtype.numpy)) if dtype.name != "bool" else None
        if limits is not None and limits.min <= value <= limits.max:
            return int(value).to_bytes(dtype.bits // 8, "little", signed=limits.min < 0)
    raise _bad_fill(dtype, value)


def _float_bits(dtype: Dtype, value: object) -> bytes:
    if isinstance(value, str):
        found = _HEX.fullmatch(value)
        if found and len(found[1]) == dtype.bits // 4:
            return bytes.fromhex(found[1])[::-1]
        number = _NAMED.get(value)
    else:
        number = float(value) if isinstance(value, float) or (type(value) is int and abs(value) < 1 << 1000) else None
    if number is None:
        raise _bad_fill(dtype, value)
    with np.errstate(all="ignore"):
        element = np.array(number, np.float64).astype(dtype.numpy)
    got = float(element)
    if isnan(got) != isnan(number) or isinf(got) != isinf(number):
        raise _bad_fill(dtype, value)
    return element.tobytes()


def _bad_fill(dtype: Dtype, value: object) -> InvalidInputError:
    return InvalidInputError(
        f"{str(value)[:80]!r} is no fill value of {dtype.name}: write the array anew", kind="bad_fill_value"
    )


def fill_to_json(dtype: Dtype, bits: bytes) -> "JSON":
    """Return what metadata says of one element, given its little-endian bytes: exact, whatever its bits are."""
    if dtype.name.startswith("complex"):
        part = dtype_named(f"float{dtype.lane * 8}")
        return [fill_to_json(part, bits[: dtype.lane]), fill_to_json(part, bits[dtype.lane :])]
    element = np.frombuffer(bits, dtype.numpy)[0]
    if dtype.name == "bool":
        return bool(element)
    if not dtype.floating:
        return int(element)
    number = float(element)
    for name, meant in _NAMED.items():
        if (number == meant or (isnan(number) and isnan(meant))) and bits == _float_bits(dtype, name):
            return name
    return f"0x{bits[::-1].hex()}" if isnan(number) else number


# -- data types --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _MlFloat(ZDType["np.dtype[Any]", np.generic], HasItemSize):
    """A float of ml_dtypes as a Zarr data type; Zarr's name for it is lamella's."""

    @classmethod
    def _dtype(cls) -> Dtype:
        return dtype_named(cls._zarr_v3_name)

    @property
    def item_size(self) -> int:
        return self._dtype().bits // 8

    def to_native_dtype(self) -> "np.dtype[Any]":
        return cast("np.dtype[Any]", self._dtype().numpy)

    @classmethod
    def from_native_dtype(cls, dtype: "np.dtype[Any]") -> Self:
        if dtype != cls._dtype().numpy:
            raise DataTypeValidationError(f"{dtype} is not {cls._zarr_v3_name}")
        return cls()

    @classmethod
    def _from_json_v2(cls, data: "DTypeJSON") -> Self:
        raise DataTypeValidationError(f"Zarr format 2 has no {cls._zarr_v3_name}")

    @classmethod
    def _from_json_v3(cls, data: "DTypeJSON") -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name}")
        return cls()

    def to_json(self, zarr_format: "ZarrFormat") -> Any:
        if zarr_format != 3:
            raise ValueError(f"Zarr format {zarr_format} has no {self._zarr_v3_name}: use format 3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, str | float | int | np.generic)

    def cast_scalar(self, data: object) -> np.generic:
        native = self._dtype().numpy
        if isinstance(data, np.generic) and data.dtype == native:
            return data
        if isinstance(data, np.generic):
            data = float(cast("Any", data))
        try:
            return self._of_bits(fill_from_json(self._dtype(), data))
        except InvalidInputError as error:
            raise TypeError(str(error)) from None

    def default_scalar(self) -> np.generic:
        return self._of_bits(bytes(self.item_size))

    def from_json_scalar(self, data: "JSON", *, zarr_format: "ZarrFormat") -> np.generic:
        return self._of_bits(fill_from_json(self._dtype(), data))

    def to_json_scalar(self, data: object, *, zarr_format: "ZarrFormat") -> "JSON":
        return fill_to_json(self._dtype(), np.asarray(self.cast_scalar(data), self._dtype().numpy).tobytes())

    def _of_bits(self, bits: bytes) -> np.generic:
        return cast("np.generic", np.frombuffer(bits, self._dtype().numpy)[0])


@dataclass(frozen=True, kw_only=True)
class BFloat16(_MlFloat, HasEndianness):
    """bfloat16, of either byte order."""

    _zarr_v3_name: ClassVar[str] = "bfloat16"

    def to_native_dtype(self) -> "np.dtype[Any]":
        """See :class:`zarr.dtype.ZDType`."""
        return super().to_native_dtype().newbyteorder(">" if self.endianness == "big" else "<")

    @classmethod
    def from_native_dtype(cls, dtype: "np.dtype[Any]") -> Self:
        """See :class:`zarr.dtype.ZDType`."""
        super().from_native_dtype(dtype.newbyteorder("="))
        orders: dict[str, Literal["little", "big"]] = {"<": "little", ">": "big"}
        return cls(endianness=orders.get(dtype.byteorder, sys.byteorder))


class Float8E4M3FN(_MlFloat):
    """float8_e4m3fn."""

    _zarr_v3_name: ClassVar[str] = "float8_e4m3fn"


class Float8E5M2(_MlFloat):
    """float8_e5m2."""

    _zarr_v3_name: ClassVar[str] = "float8_e5m2"


class Float8E8M0FNU(_MlFloat):
    """float8_e8m0fnu."""

    _zarr_v3_name: ClassVar[str] = "float8_e8m0fnu"


class Float8E4M3FNUZ(_MlFloat):
    """float8_e4m3fnuz."""

    _zarr_v3_name: ClassVar[str] = "float8_e4m3fnuz"


class Float8E5M2FNUZ(_MlFloat):
    """float8_e5m2fnuz."""

    _zarr_v3_name: ClassVar[str] = "float8_e5m2fnuz"


class Float8E4M3(_MlFloat):
    """float8_e4m3."""

    _zarr_v3_name: ClassVar[str] = "float8_e4m3"


class Float8E3M4(_MlFloat):
    """float8_e3m4."""

    _zarr_v3_name: ClassVar[str] = "float8_e3m4"


class Float8E4M3B11FNUZ(_MlFloat):
    """float8_e4m3b11fnuz."""

    _zarr_v3_name: ClassVar[str] = "float8_e4m3b11fnuz"


_DATA_TYPES: tuple[type[_MlFloat], ...] = (
    BFloat16,
    Float8E4M3FN,
    Float8E5M2,
    Float8E8M0FNU,
    Float8E4M3FNUZ,
    Float8E5M2FNUZ,
    Float8E4M3,
    Float8E3M4,
    Float8E4M3B11FNUZ,
)


def register_dtypes() -> None:
    """Teach zarr bfloat16 and float8, where it does not know them. Doing it twice is harmless."""
    for data_type in _DATA_TYPES:
        if data_type._zarr_v3_name not in data_type_registry.contents:
            data_type_registry.register(data_type._zarr_v3_name, cast("Any", data_type))
