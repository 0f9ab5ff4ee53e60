"""Packs: many blobs in one object, with an index at the end (FORMAT.md, "Pack").

    blob 0 | blob 1 | ... | index | footer

Blobs follow one another without holes from byte 0. The pack's digest is the digest of its index, which holds every
blob's digest, so any range that is read can be checked up to the log.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.errors import CorruptionError, LimitError, UnsupportedFormatError
from lamella_engine.format.digests import DIGEST_NBYTES, Context, digest
from lamella_engine.format.names import parse_pack_name
from lamella_engine.model import Buffer, ChunkId

PACK_MAGIC = b"\x93LPK"
PACK_FORMAT = 0
MAX_DEPTH = 32
"""No repository may allow deeper chains than this, whatever its setting says."""
MAX_ENCODED_NBYTES = MAX_CELL_NBYTES + 1024
"""Longest payload: the encoder keeps the smallest form, and raw is one of them; some slack for headers."""
MAX_INDEX_NBYTES = 1 << 28

_HEADER = struct.Struct("<4sBBHIQ")  # magic, format, zero, base packs, rows, bytes of blobs
_ROW = struct.Struct("<32s32s16sQIIHBBB3s")  # see BlobRow; the last three bytes are zero
_FOOTER = struct.Struct("<I4s")  # bytes of the index, magic
FOOTER_NBYTES = _FOOTER.size

_RESERVED = bytes(3)
_NO_BASE = 0xFFFF
_THIS_PACK = 0xFFFE
MAX_BASE_PACKS = _THIS_PACK
"""Base packs that one pack can name; a writer starts a new pack before it would pass this."""


@dataclass(frozen=True, slots=True)
class BlobRow:
    """One row of a pack's index: where a blob lies and how it is decoded."""

    chunk: ChunkId
    """Digest of the decoded bytes."""
    start: int
    """First byte of the blob in the pack."""
    encoded_nbytes: int
    decoded_nbytes: int
    encoding: int
    """See codecs.Encoding."""
    width: int
    """Bytes of one lane: 1, 2, 4 or 8."""
    depth: int
    """How many bases are decoded first; 0 for a full blob."""
    base: ChunkId | None
    """What a delta is against; None for a full blob."""
    base_pack: str | None
    """The pack in which that base stood when the delta was made; None for a full blob, "" for this pack."""
    digest: bytes
    """16-byte digest of the payload."""

    @property
    def stop(self) -> int:
        """One past the blob's last byte."""
        return self.start + self.encoded_nbytes


@dataclass(frozen=True, slots=True)
class PackIndex:
    """A parsed index: its rows in the order of their blobs, found by chunk."""

    rows: Sequence[BlobRow]
    by_chunk: dict[ChunkId, BlobRow]
    blobs_nbytes: int


def encode_pack_index(rows: Iterable[BlobRow]) -> bytes:
    """Return the index of a pack whose blobs are ``rows``, which follow one another from byte 0.

    Raises LimitError if it would be longer than any reader accepts.
    """
    rows = list(rows)
    base_packs = sorted({row.base_pack for row in rows if row.base_pack})
    number = {name: at for at, name in enumerate(base_packs)} | {"": _THIS_PACK, None: _NO_BASE}
    blobs_nbytes = rows[-1].stop if rows else 0
    parts = [_HEADER.pack(PACK_MAGIC, PACK_FORMAT, 0, len(base_packs), len(rows), blobs_nbytes)]
    for name in base_packs:
        text = name.encode()
        parts += (struct.pack("<H", len(text)), text)
    parts += (
        _ROW.pack(
            row.chunk,
            row.base or bytes(DIGEST_NBYTES),
            row.digest,
            row.start,
            row.encoded_nbytes,
            row.decoded_nbytes,
            number[row.base_pack],
            row.encoding,
            row.width,
            row.depth,
            _RESERVED,
        )
        for row in rows
    )
    index = b"".join(parts)
    if len(index) > MAX_INDEX_NBYTES:
        raise LimitError(f"{len(rows)} blobs are too many for one pack", kind="pack_limit")
    return index


def encode_footer(index: bytes) -> bytes:
    """Return the bytes that end a pack, after its index."""
    return _FOOTER.pack(len(index), PACK_MAGIC)


def decode_footer(footer: bytes, *, pack: str, pack_nbytes: int) -> int:
    """Return the bytes of the index of a pack of ``pack_nbytes``; raises CorruptionError."""
    if len(footer) != FOOTER_NBYTES:
        raise _corrupt(pack, "it is shorter than its footer")
    index_nbytes, magic = _FOOTER.unpack(footer)
    if magic != PACK_MAGIC or not _HEADER.size <= index_nbytes <= min(pack_nbytes - FOOTER_NBYTES, MAX_INDEX_NBYTES):
        raise _corrupt(pack, "its footer is damaged")
    return int(index_nbytes)


def decode_pack_index(data: Buffer, *, pack: str) -> PackIndex:
    """Parse and check the index of the pack called ``pack``.

    Raises CorruptionError if the digest in the name is not that of ``data`` or any rule of FORMAT.md is broken, and
    UnsupportedFormatError if the index is of a newer format.
    """
    data = bytes(data)
    if digest(Context.PACK_INDEX, data) != parse_pack_name(pack).digest:
        raise CorruptionError(f"the index of {pack} is not the one its name promises", kind="bad_digest", object=pack)
    if len(data) < _HEADER.size:
        raise _corrupt(pack, "its index is too short")
    magic, version, zero, base_count, row_count, blobs_nbytes = _HEADER.unpack_from(data)
    if magic != PACK_MAGIC:
        raise _corrupt(pack, "its index does not begin with the magic number")
    if version != PACK_FORMAT:
        raise UnsupportedFormatError(f"{pack} has index format {version}: upgrade lamella", object=pack)
    if zero or base_count > MAX_BASE_PACKS:
        raise _corrupt(pack, "its index is inconsistent")
    at = _HEADER.size
    base_packs: list[str] = []
    for _ in range(base_count):
        if at + 2 > len(data):
            raise _corrupt(pack, "its base packs run past the index")
        (length,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 2 + length].decode("ascii", "replace")
        parse_pack_name(name)
        base_packs.append(name)
        at += 2 + length
    if at + row_count * _ROW.size != len(data) or base_packs != sorted(set(base_packs)):
        raise _corrupt(pack, "its index is inconsistent")
    rows: list[BlobRow] = []
    by_chunk: dict[ChunkId, BlobRow] = {}
    expected_start = 0
    for fields in _ROW.iter_unpack(data[at:]):
        chunk, base, blob, start, encoded, decoded, base_pack, encoding, width, depth, reserved = fields
        full = base_pack == _NO_BASE
        if (
            start != expected_start
            or encoded > MAX_ENCODED_NBYTES
            or not 0 < decoded <= MAX_CELL_NBYTES
            or width not in (1, 2, 4, 8)
            or decoded % width
            or depth > MAX_DEPTH
            or full != (depth == 0)
            or full != (base == bytes(DIGEST_NBYTES))
            or not (full or base_pack == _THIS_PACK or base_pack < base_count)
            or reserved != _RESERVED
            or chunk in by_chunk
        ):
            raise _corrupt(pack, f"row {len(rows)} of its index breaks a rule")
        name_of_base = None if full else "" if base_pack == _THIS_PACK else base_packs[base_pack]
        row = BlobRow(
            ChunkId(chunk), start, encoded, decoded, encoding, width, depth,
            None if full else ChunkId(base), name_of_base, blob,
        )  # fmt: skip
        rows.append(row)
        by_chunk[row.chunk] = row
        expected_start = row.stop
    if expected_start != blobs_nbytes:
        raise _corrupt(pack, "its blobs do not fill it")
    return PackIndex(rows, by_chunk, blobs_nbytes)


def _corrupt(pack: str, why: str) -> CorruptionError:
    return CorruptionError(f"{pack} is damaged: {why}", kind="bad_pack", object=pack)
