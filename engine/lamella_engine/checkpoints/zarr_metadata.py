"""Metadata of Zarr v3 arrays that others wrote: one strict parser, and codecs that cannot be made to burst.

What may stand there is a list, not what some registry happens to hold: parsing runs no foreign code. Every array
becomes one of unsigned integers as wide as its elements (complex ones stay), so that fill values and byte orders are
matters of bits, and of codecs that check how much they would decode before they do.

Importing this module imports zarr, so modules that are loaded with ``lamella`` import it on use only.
"""

import asyncio
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zstandard
from numcodecs import blosc  # type: ignore[import-untyped]
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec, Codec
from zarr.abc.store import ByteGetter, ByteRequest, RangeByteRequest
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.core.metadata import ArrayV3Metadata
from zarr.dtype import Complex64, Complex128, UInt8, UInt16, UInt32, UInt64

from lamella_engine.chunking import Grid
from lamella_engine.dtypes import Dtype, dtype_named
from lamella_engine.errors import InvalidInputError, LimitError
from lamella_engine.zarr_arrays import fill_from_json

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, BufferPrototype, NDBuffer
    from zarr.core.indexing import SelectorTuple

MAX_RANK = 32
"""Most axes of an array: as many as a safetensors file may have."""

MAX_CHUNKS = 1 << 20
"""Most chunks of one array, those inside of shards counted, for zarr keeps something for each: 128 GiB of an array in
its usual chunks of 128 KiB."""

MAX_BAND_NBYTES = 2 << 30
"""Most bytes that have to be decoded at once, because chunks cannot be decoded in part."""

# What is decoded at a time where chunks allow it: enough of them to keep zarr's threads busy.
_BAND_NBYTES = 64 << 20

# How many chunks, if one row of them has fewer. zarr takes some 2.5 KB for each that it decodes at a time.
_BAND_CHUNKS = 4096

# What an encoding may add to the bytes of a chunk: headers of frames and blocks.
_SLACK_NBYTES = 1 << 20

# An entry of a shard's index, and what codecs may add to it.
_INDEX_ENTRY_NBYTES = 32

# Most codecs in a row, and shards in one another: nobody needs three of the latter.
_MAX_CODECS = 16
_MAX_DEPTH = 3

# Longest array in bytes, counting axes of length 0 as 1: what array libraries address with a signed 64-bit int.
_MAX_ARRAY_NBYTES = (1 << 63) - 1

_KEYS = {
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "fill_value",
    "codecs",
    "attributes",
    "dimension_names",
    "storage_transformers",
}


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array as its metadata describes it."""

    dtype: Dtype
    shape: tuple[int, ...]
    metadata: ArrayV3Metadata
    """As zarr is to read it: of unsigned integers, with codecs that are bounded."""
    key: "re.Pattern[str]"
    """What the keys of chunks look like, relative to the array; a group for each axis."""
    counts: tuple[int, ...]
    """Number of stored chunks (or shards) on each axis."""
    max_encoded_nbytes: int
    """Most bytes that a stored chunk of this shape can honestly take."""
    attributes: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, decoded."""
        return prod(self.shape) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.dtype.bits // 8

    @property
    def chunk_count(self) -> int:
        """Chunks of the grid, those inside of shards counted."""
        return prod(-(-length // step) for length, step in zip(self.shape, self.metadata.chunks, strict=True))

    def has_chunk(self, key: str) -> bool:
        """Whether ``key``, relative to the array, is that of a chunk of its grid."""
        found = self.key.fullmatch(key)
        return found is not None and all(int(at) < n for at, n in zip(found.groups(), self.counts, strict=True))

    def bands(self) -> Grid:
        """Cut the array into runs of C-order bytes that are made of whole chunks, some 64 MiB long.

        Raises LimitError (``chunk_too_large``) if one would take more than MAX_BAND_NBYTES.
        """
        chunk = self.metadata.chunks  # the inner ones of shards
        if not self.shape or 0 in self.shape:
            return Grid(self.shape, self.itemsize, 0, 1)
        axis, row = 0, self._row_nbytes(0)
        while row > _BAND_NBYTES and axis + 1 < len(chunk) and min(chunk[axis], self.shape[axis]) == 1:
            axis += 1
            row = self._row_nbytes(axis)
        if row > MAX_BAND_NBYTES:
            raise LimitError(
                f"{row} bytes have to be decoded at once, more than {MAX_BAND_NBYTES}: write the array with chunks "
                "that are shorter on the first axis",
                kind="chunk_too_large",
            )
        across = prod(-(-self.shape[other] // chunk[other]) for other in range(axis + 1, len(chunk)))
        rows = max(1, min(_BAND_NBYTES // row, _BAND_CHUNKS // across))
        return Grid(self.shape, self.itemsize, axis, min(self.shape[axis], chunk[axis] * rows))

    def _row_nbytes(self, axis: int) -> int:
        """Bytes of one row of chunks: as long as a chunk on ``axis``, whole on the axes after it."""
        return min(self.metadata.chunks[axis], self.shape[axis]) * prod(self.shape[axis + 1 :]) * self.itemsize


def stored_array(document: object, fill: bytes | None = None) -> StoredArray:
    """Parse the metadata of an array.

    Parameters
    ----------
    document
        What its ``zarr.json`` says, or zarr's ``metadata.to_dict()``.
    fill
        The bits of the fill value, if they are known better than the document can say them.

    Raises
    ------
    InvalidInputError
        The kinds are ``not_zarr_v3``, ``bad_metadata``, ``unknown_dtype``, ``bad_shape``, ``unknown_chunk_grid``,
        ``bad_chunk_shape``, ``unknown_key_encoding``, ``bad_fill_value``, ``unknown_codec`` and ``bad_codec``.
    LimitError
        Too many chunks (``too_many_chunks``), or too large ones (``chunk_too_large``).
    """
    fields = _fields(document)
    dtype = _dtype(fields.get("data_type"))
    shape = _naturals(fields.get("shape"), "shape", "bad_shape")
    if prod(max(1, n) for n in shape) * dtype.bits // 8 > _MAX_ARRAY_NBYTES:
        raise InvalidInputError("it has more bytes than an array can have", kind="bad_shape")
    grid_name, grid = _named(fields.get("chunk_grid"), "chunk_grid")
    if grid_name != "regular":
        raise InvalidInputError(
            f"its chunk grid is {grid_name[:80]!r}: write the array with a regular one", kind="unknown_chunk_grid"
        )
    chunk = _naturals(grid.get("chunk_shape"), "chunk_shape", "bad_chunk_shape")
    if len(chunk) != len(shape) or 0 in chunk:
        raise InvalidInputError(f"its chunks have shape {chunk}, the array {shape}", kind="bad_chunk_shape")
    counts = tuple(-(-length // step) for length, step in zip(shape, chunk, strict=True))
    if fields.get("storage_transformers"):
        raise InvalidInputError("it uses storage transformers: write it without", kind="unknown_codec")
    itemsize = dtype.bits // 8
    codecs, inner_count = _codecs(fields.get("codecs"), chunk)
    if prod(counts) * inner_count > MAX_CHUNKS:
        raise LimitError(
            f"it has {prod(counts) * inner_count} chunks, more than {MAX_CHUNKS}: write it with larger ones",
            kind="too_many_chunks",
        )
    key_encoding, key = _keys(fields.get("chunk_key_encoding"), len(shape))
    bits = fill_from_json(dtype, fields.get("fill_value")) if fill is None else fill
    lanes, carrier = _CARRIERS[dtype.name if dtype.name.startswith("complex") else dtype.bits]
    attributes = fields.get("attributes", {})
    if not isinstance(attributes, Mapping):
        raise InvalidInputError("its attributes are no object", kind="bad_metadata")
    with refusing("bad_metadata"):
        metadata = ArrayV3Metadata(
            shape=shape,
            data_type=lanes,
            chunk_grid={"name": "regular", "configuration": {"chunk_shape": chunk}},
            chunk_key_encoding=key_encoding,
            fill_value=np.frombuffer(bits, carrier)[0],
            codecs=codecs,
            attributes=dict(attributes),
            dimension_names=cast("Any", fields.get("dimension_names")),
        )
    whole = not isinstance(codecs[0], ShardingCodec) or len(codecs) > 1
    decoded = prod(chunk if whole else metadata.chunks) * itemsize
    if decoded > MAX_BAND_NBYTES:
        raise LimitError(
            f"its chunks have {decoded} bytes, more than {MAX_BAND_NBYTES}: write it with smaller ones",
            kind="chunk_too_large",
        )
    most = 2 * prod(chunk) * itemsize + _INDEX_ENTRY_NBYTES * inner_count + _SLACK_NBYTES
    return StoredArray(dtype, shape, metadata, key, counts, most, attributes)


_CARRIERS: "dict[str | int, tuple[Any, str]]" = {
    8: (UInt8(), "u1"),
    16: (UInt16(), "<u2"),
    32: (UInt32(), "<u4"),
    64: (UInt64(), "<u8"),
    "complex64": (Complex64(), "<c8"),
    "complex128": (Complex128(), "<c16"),
}
"""By bits or name: the data type that an array is read as, and the NumPy dtype of its fill value."""


def _fields(document: object) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise InvalidInputError("it is no object", kind="bad_metadata")
    if document.get("zarr_format") != 3:
        raise InvalidInputError("it is not of Zarr format 3: convert it", kind="not_zarr_v3")
    for key in document.keys() - _KEYS:
        extra = document[key]
        if not (isinstance(extra, Mapping) and extra.get("must_understand") is False):
            raise InvalidInputError(f"it has a field {str(key)[:80]!r} that must be understood", kind="bad_metadata")
    return document


def _dtype(name: object) -> Dtype:
    try:
        dtype = dtype_named(name) if isinstance(name, str) else None
    except InvalidInputError:
        dtype = None
    if dtype is None or dtype.opaque:
        shown = name if isinstance(name, str) else json.dumps(name, default=str)
        raise InvalidInputError(
            f"its data type is {shown[:80]}, which cannot be stored: convert it to a number", kind="unknown_dtype"
        )
    return dtype


def _naturals(value: object, what: str, kind: str) -> tuple[int, ...]:
    short = isinstance(value, list | tuple) and len(value) <= MAX_RANK
    if not short or not all(type(n) is int and 0 <= n <= _MAX_ARRAY_NBYTES for n in cast("tuple[int, ...]", value)):
        raise InvalidInputError(f"its {what} is no list of at most {MAX_RANK} natural numbers", kind=kind)
    return tuple(cast("tuple[int, ...]", value))


def _named(value: object, what: str, kind: str = "bad_metadata") -> tuple[str, Mapping[str, Any]]:
    """Return name and configuration of what metadata gives by name."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        configuration = value.get("configuration", {})
        if isinstance(configuration, Mapping) and value.keys() <= {"name", "configuration", "must_understand"}:
            return value["name"], configuration
    raise InvalidInputError(f"its {what} has no name, or is no object", kind=kind)


def _keys(value: object, rank: int) -> "tuple[Any, re.Pattern[str]]":
    """Return how the keys of chunks are encoded, for zarr, and what they look like."""
    name, configuration = _named(value, "chunk_key_encoding")
    usual = {"default": "/", "v2": "."}
    separator = configuration.get("separator", usual.get(name))
    if name not in usual or separator not in ("/", ".") or configuration.keys() - {"separator"}:
        raise InvalidInputError(
            f"its chunk keys are encoded as {name[:80]!r} with {str(separator)[:80]!r}, which is not known: write it "
            "with the default encoding",
            kind="unknown_key_encoding",
        )
    numbers = re.escape(separator).join(["(0|[1-9][0-9]{0,18})"] * rank)
    if name == "default":
        numbers = f"c{re.escape(separator)}{numbers}" if rank else "c"
    pattern = re.compile(numbers or "0")
    return {"name": name, "configuration": {"separator": separator}}, pattern


@contextmanager
def refusing(kind: str) -> Iterator[None]:
    """Make an InvalidInputError of what zarr raises when it is given nonsense; nothing else may run inside."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InvalidInputError(f"zarr cannot read it: {str(error)[:200]}", kind=kind) from error


# -- codecs ------------------------------------------------------------------------------------------------------------


def _codecs(
    value: object, chunk: tuple[int, ...], *, index: bool = False, depth: int = 0
) -> tuple[tuple[Codec, ...], int]:
    """Return bounded codecs for chunks of a shape, and the number of the smallest chunks in one of them.

    ``index`` says that they are for the index of a shard, ``depth`` how many shards they lie in.
    """
    if not isinstance(value, list | tuple) or len(value) > _MAX_CODECS or depth > _MAX_DEPTH:
        raise InvalidInputError("its codecs are no list, or too many", kind="bad_codec")
    allowed = _ALLOWED_IN_INDEX if index else _ALLOWED
    codecs: list[Codec] = []
    inner_count = 1
    for item in value:
        name, configuration = _named(item, "codec", "bad_codec")
        make = allowed.get(name)
        if make is None:
            raise InvalidInputError(
                f"its codec {name[:80]!r} is not known: write the array with one of {', '.join(allowed)}",
                kind="unknown_codec",
            )
        if make is _BoundedSharding:
            codec, inner_count = _sharding(configuration, chunk, depth)
        else:
            with refusing("bad_codec"):
                codec = make.from_dict({"name": name, "configuration": dict(configuration)})
        if isinstance(codec, TransposeCodec):
            if sorted(codec.order) != list(range(len(chunk))):
                raise InvalidInputError(f"it is transposed by {codec.order}, which is no order", kind="bad_codec")
            chunk = tuple(chunk[axis] for axis in codec.order)
        codecs.append(codec)
    steps = [
        0 if isinstance(codec, ArrayArrayCodec) else 1 if isinstance(codec, ArrayBytesCodec) else 2 for codec in codecs
    ]
    if steps.count(1) != 1 or steps != sorted(steps):
        raise InvalidInputError("its codecs do not lead from an array to bytes", kind="bad_codec")
    return tuple(codecs), inner_count


def _sharding(configuration: Mapping[str, Any], chunk: tuple[int, ...], depth: int) -> tuple[Codec, int]:
    inner = _naturals(configuration.get("chunk_shape"), "inner chunk_shape", "bad_chunk_shape")
    if len(inner) != len(chunk) or 0 in inner or any(n % step for n, step in zip(chunk, inner, strict=True)):
        raise InvalidInputError(f"its shards of shape {chunk} have chunks of shape {inner}", kind="bad_chunk_shape")
    count = prod(chunk) // prod(inner)
    codecs, deeper = _codecs(configuration.get("codecs"), inner, depth=depth + 1)
    index, _ = _codecs(configuration.get("index_codecs"), (*chunk, 2), index=True)
    with refusing("bad_codec"):
        codec = _BoundedSharding(
            chunk_shape=inner,
            codecs=codecs,
            index_codecs=index,
            index_location=cast("Any", configuration.get("index_location", "end")),
        )
    return codec, count * deeper


def _bad_chunk(problem: str) -> InvalidInputError:
    return InvalidInputError(f"a chunk {problem}: fetch or write the array again", kind="bad_chunk")


def _most_nbytes(spec: "ArraySpec") -> int:
    """Return the most bytes that a compressor may give for a chunk; further codecs may have added to it."""
    return 2 * _nbytes(spec) + _SLACK_NBYTES


def _nbytes(spec: "ArraySpec") -> int:
    """Return the bytes of a chunk that is not encoded."""
    return prod(spec.shape) * spec.dtype.to_native_dtype().itemsize


class _Bounded:
    """A compressor that checks how much it would decode first."""

    def _decode_sync(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec") -> "Buffer":
        most = _most_nbytes(chunk_spec)
        data = self._decompress(chunk_bytes, chunk_spec, most)
        if len(data) > most:
            raise _bad_chunk(f"decodes to more than {most} bytes, which its array has no room for")
        return data

    async def _decode_single(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec") -> "Buffer":
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _decompress(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec", most: int) -> "Buffer":
        """Decode, but no more than a little over ``most`` bytes."""
        raise NotImplementedError


class _BoundedZstd(_Bounded, ZstdCodec):
    def _decompress(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec", most: int) -> "Buffer":
        try:
            source = chunk_bytes.as_numpy_array().data
            with zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True) as reader:
                data = reader.read(most + 1)
        except zstandard.ZstdError as error:
            raise _bad_chunk(f"is no zstd frame ({error})") from error
        return chunk_spec.prototype.buffer.from_bytes(data)


class _BoundedGzip(_Bounded, GzipCodec):
    def _decompress(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec", most: int) -> "Buffer":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(chunk_bytes.to_bytes())) as file:
                data = file.read(most + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise _bad_chunk(f"is no gzip file ({error})") from error
        return chunk_spec.prototype.buffer.from_bytes(data)


_BLOSC_HEADER_NBYTES = 16


class _BoundedBlosc(_Bounded, BloscCodec):
    def _decompress(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec", most: int) -> "Buffer":
        # Version and flags (4 bytes), then three lengths: decoded, of a block, encoded. The library believes them.
        header = chunk_bytes[:_BLOSC_HEADER_NBYTES].to_bytes()
        decoded, block, encoded = (int.from_bytes(header[at : at + 4], "little") for at in (4, 8, 12))
        if len(header) < _BLOSC_HEADER_NBYTES or encoded != len(chunk_bytes) or decoded > most or block > most:
            raise _bad_chunk("is no blosc buffer, or one that decodes to more than its array has room for")
        try:
            data = blosc.decompress(chunk_bytes.as_numpy_array())
        except RuntimeError as error:
            raise _bad_chunk(f"is no blosc buffer ({error})") from error
        return chunk_spec.prototype.buffer.from_bytes(data)


@dataclass(frozen=True)
class _ExactGetter(ByteGetter):
    """Gives what was asked for or nothing: sharding takes an empty answer for a chunk that was never written."""

    getter: ByteGetter

    async def get(self, prototype: "BufferPrototype", byte_range: ByteRequest | None = None) -> "Buffer | None":
        found = await self.getter.get(prototype, byte_range)
        wanted = byte_range.end - byte_range.start if isinstance(byte_range, RangeByteRequest) else None
        if found is not None and (not len(found) or wanted not in (None, len(found))):
            raise _bad_chunk("lies beyond the end of its shard")
        return found


class _BoundedSharding(ShardingCodec):
    def resolve_metadata(self, chunk_spec: "ArraySpec") -> "ArraySpec":
        """Describe an encoded shard, for the compressors that may follow."""
        count = prod(self._get_chunks_per_shard(chunk_spec))
        nbytes = _nbytes(chunk_spec) + _INDEX_ENTRY_NBYTES * count
        return replace(chunk_spec, shape=(nbytes,), dtype=_CARRIERS[8][0])

    async def _decode_partial_single(
        self, byte_getter: ByteGetter, selection: "SelectorTuple", shard_spec: "ArraySpec"
    ) -> "NDBuffer | None":
        return await super()._decode_partial_single(_ExactGetter(byte_getter), selection, shard_spec)

    async def _decode_shard_index(self, index_bytes: "Buffer", chunks_per_shard: tuple[int, ...]) -> Any:
        index = await super()._decode_shard_index(index_bytes, chunks_per_shard)
        starts, lengths = index.offsets_and_lengths[..., 0], index.offsets_and_lengths[..., 1]
        absent = (starts == _ABSENT) & (lengths == _ABSENT)
        if not np.all(absent | ((lengths > 0) & (lengths < 1 << 62) & (starts < 1 << 62))):
            raise _bad_chunk("of a shard has no place that could be")
        return index


# Place and length of a chunk that a shard does not hold.
_ABSENT = (1 << 64) - 1

_ALLOWED: "dict[str, type[Codec]]" = {
    "bytes": BytesCodec,
    "transpose": TransposeCodec,
    "sharding_indexed": _BoundedSharding,
    "crc32c": Crc32cCodec,
    "zstd": _BoundedZstd,
    "gzip": _BoundedGzip,
    "blosc": _BoundedBlosc,
}
_ALLOWED_IN_INDEX: "dict[str, type[Codec]]" = {"bytes": BytesCodec, "crc32c": Crc32cCodec}
