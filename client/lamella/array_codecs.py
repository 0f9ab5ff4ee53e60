"""Lamella's float coder for any Zarr array: a Zarr v3 codec and a numcodecs codec, both named ``lamella``.

Nobody needs to import this module. Where lamella is installed, zarr and numcodecs find the codecs by their name:

    zarr.create_array(store, data=w, compressors=[{"name": "lamella", "configuration": {}}])
    zarr.create_array(store, data=w, compressors=numcodecs.get_codec({"id": "lamella"}), zarr_format=2)

What is stored for a chunk is a header and parts. The header is the number of bytes decoded, 8 bytes, and the width of a
lane, 1 byte. Parts stand for at most 4 MiB each, the last one for what is left; each is an encoding, 1 byte, the length
of a payload, 4 bytes, and the payload, as FORMAT.md, section 12, defines them. Integers are little-endian.
"""

import asyncio
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numcodecs.abc import Codec  # type: ignore[import-untyped]
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.core.common import JSON, parse_named_configuration

from lamella_engine import codecs
from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.errors import CorruptionError, InvalidInputError

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer

NAME = "lamella"

_HEADER = struct.Struct("<QB")
_PART = struct.Struct("<BI")
_WIDTHS = (1, 2, 4, 8)

Bytes = NDArray[np.uint8]


def width_of(dtype: "np.dtype[Any]") -> int:
    """Return how many bytes one machine number of a dtype has; 1 if that is none that the coder knows."""
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return width if width in _WIDTHS else 1


def encode(chunk: Bytes, width: int) -> bytes:
    """Encode bytes of any length.

    Parameters
    ----------
    chunk
        Contiguous; little-endian lanes of ``width`` bytes, if they are whole ones. If not, they are taken for bytes.
    width
        1, 2, 4 or 8.
    """
    if chunk.size % width:
        width = 1
    parts = [_HEADER.pack(chunk.size, width)]
    for start in range(0, chunk.size, MAX_CELL_NBYTES):
        part = chunk[start : start + MAX_CELL_NBYTES]
        encoding, payload = codecs.encode(part.data, width=width, floating=True)
        if not _comes_back(part, encoding, payload, width):
            encoding, payload = codecs.Encoding.RAW, part.tobytes()
        parts += (_PART.pack(encoding, len(payload)), payload)
    return b"".join(parts)


def _comes_back(part: Bytes, encoding: int, payload: bytes, width: int) -> bool:
    """Whether a payload decodes to the part. Compressors have bugs, and Zarr, unlike a push, does not look."""
    out = np.empty(part.size, np.uint8)
    try:
        codecs.decode(encoding, payload, out, width=width)
    except CorruptionError:
        return False
    return np.array_equal(out, part)


def decoded_nbytes(stored: Bytes) -> int:
    """Return how long a chunk is decoded, if its header is right.

    Raises
    ------
    CorruptionError
        There is no header, or it says more than as many parts could hold.
    """
    _check(stored.size >= _HEADER.size, "shorter than a header")
    nbytes, width = _HEADER.unpack_from(stored.data)
    _check(width in _WIDTHS, f"lanes of {width} bytes")
    # A part has at least one byte of payload.
    parts = (stored.size - _HEADER.size) // (_PART.size + 1)
    _check(nbytes <= parts * MAX_CELL_NBYTES, f"{nbytes} bytes from {parts} parts or fewer")
    return int(nbytes)


def decode(stored: Bytes, out: Bytes) -> None:
    """Decode into ``out``, which is as long as :func:`decoded_nbytes` says.

    Raises
    ------
    CorruptionError
        These bytes are not what :func:`encode` returned.
    UnsupportedFormatError
        A newer lamella wrote them.
    """
    _check(decoded_nbytes(stored) == out.size, f"not {out.size} bytes long")
    _, width = _HEADER.unpack_from(stored.data)
    at = _HEADER.size
    for start in range(0, out.size, MAX_CELL_NBYTES):
        _check(stored.size - at >= _PART.size, "ends within a part")
        encoding, nbytes = _PART.unpack_from(stored.data, at)
        at += _PART.size
        _check(nbytes <= stored.size - at, "ends within a payload")
        codecs.decode(encoding, stored[at : at + nbytes].data, out[start : start + MAX_CELL_NBYTES], width=width)
        at += nbytes
    _check(at == stored.size, f"{stored.size - at} bytes after the last part")


def _check(holds: bool, lie: str) -> None:
    if not holds:
        raise CorruptionError(
            f"chunk of a Zarr array is damaged: {lie}; restore it from another copy", kind="bad_payload"
        )


def _check_width(width: JSON) -> int | None:
    if width is None or (isinstance(width, int) and width in _WIDTHS):
        return width
    raise InvalidInputError(
        f"width {width!r} is none that a lane can have: 1, 2, 4 or 8, or leave it out", kind="bad_width"
    )


class NumcodecsFloats(Codec):  # type: ignore[misc]
    """The codec for numcodecs, and so for arrays of Zarr v2.

    Parameters
    ----------
    width
        Bytes of a lane: 1, 2, 4 or 8. None is that of the dtype of what is encoded.
    """

    codec_id = NAME

    def __init__(self, width: int | None = None) -> None:
        self.width = _check_width(width)

    def encode(self, buf: Any) -> bytes:
        """Encode a buffer, or an array in either order."""
        array = buf if isinstance(buf, np.ndarray) else np.frombuffer(buf, np.uint8)
        width = width_of(array.dtype) if self.width is None else self.width
        return encode(array.ravel(order="K").view(np.uint8), width)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Decode into ``out``, or into new memory, and return it.

        Raises
        ------
        CorruptionError
            The bytes are not what :meth:`encode` returned, or not as many as ``out`` has.
        """
        stored = np.frombuffer(buf, np.uint8)
        decoded: Bytes
        decoded = np.empty(decoded_nbytes(stored), np.uint8) if out is None else _octets_of(np.asarray(out))
        decode(stored, decoded)
        return decoded if out is None else out


def _octets_of(out: "np.ndarray[Any, Any]") -> Bytes:
    """Return the memory of an array as bytes, in the order in which it lies."""
    if not (out.flags.c_contiguous or out.flags.f_contiguous):
        raise InvalidInputError("out is not contiguous memory: decode into new memory, and copy", kind="not_contiguous")
    return out.reshape(-1, order="A").view(np.uint8)


@dataclass(frozen=True)
class ZarrFloats(BytesBytesCodec):
    """The codec for Zarr v3, to stand after ``bytes``.

    Parameters
    ----------
    width
        Bytes of a lane: 1, 2, 4 or 8. None, until zarr tells the array's data type.
    """

    is_fixed_size: ClassVar[bool] = False  # type: ignore[misc]

    width: int | None = None

    def __post_init__(self) -> None:
        _check_width(self.width)

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """Return the codec of an array's metadata."""
        _, configuration = parse_named_configuration(data, NAME, require_configuration=False)
        return cls(_check_width((configuration or {}).get("width")))

    def to_dict(self) -> dict[str, JSON]:
        """Return what an array's metadata say of the codec."""
        return {"name": NAME, "configuration": {} if self.width is None else {"width": self.width}}

    def evolve_from_array_spec(self, array_spec: "ArraySpec") -> Self:
        """Return the codec with the width of the array's lanes."""
        return self if self.width is not None else replace(self, width=width_of(array_spec.dtype.to_native_dtype()))

    async def _encode_single(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec") -> "Buffer | None":
        return await asyncio.to_thread(self._encode_sync, chunk_bytes, chunk_spec)

    def _encode_sync(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec") -> "Buffer":
        chunk = chunk_bytes.as_numpy_array().view(np.uint8)
        return chunk_spec.prototype.buffer.from_bytes(encode(chunk, self.width or 1))

    async def _decode_single(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec") -> "Buffer":
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _decode_sync(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec") -> "Buffer":
        stored = chunk_bytes.as_numpy_array().view(np.uint8)
        decoded = np.empty(decoded_nbytes(stored), np.uint8)
        decode(stored, decoded)
        return chunk_spec.prototype.buffer.from_array_like(decoded)

    def compute_encoded_size(self, input_byte_length: int, _chunk_spec: "ArraySpec") -> int:
        """Raise: how short floats become depends on them."""
        raise NotImplementedError
