"""Packs: many blobs in one object, with an index at the end (FORMAT.md, "Pack").

    blob 0 | blob 1 | ... | index | footer

Blobs follow one another without holes from byte 0. The pack's digest is the digest of its index, which holds every
blob's digest, so any range that is read can be checked up to the log.
"""

import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
_ROW_DTYPE = np.dtype(
    [
        ("chunk", "u1", 32),
        ("base", "u1", 32),
        ("digest", "u1", 16),
        ("start", "<u8"),
        ("encoded_nbytes", "<u4"),
        ("decoded_nbytes", "<u4"),
        ("base_pack", "<u2"),
        ("encoding", "u1"),
        ("width", "u1"),
        ("depth", "u1"),
        ("reserved", "u1", 3),
    ]
)
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


class PackIndex:
    """A parsed index: its rows in the order of their blobs, found by chunk.

    Rows are made when they are asked for: a reader wants some of the thousands.
    """

    def __init__(
        self, rows: bytes, places: Mapping[ChunkId, int], base_packs: Sequence[str], blobs_nbytes: int
    ) -> None:
        self._rows = rows
        self._places = places
        self._base_packs = base_packs
        self.blobs_nbytes = blobs_nbytes

    @property
    def chunks(self) -> Collection[ChunkId]:
        """The chunks of all rows, in order."""
        return self._places.keys()

    @property
    def rows(self) -> Sequence[BlobRow]:
        """Every row, made anew."""
        return [self._row(place) for place in range(len(self._places))]

    def find(self, chunk: ChunkId) -> BlobRow | None:
        """Return the row of a chunk, or None if the pack has none."""
        place = self._places.get(chunk)
        return None if place is None else self._row(place)

    def _row(self, place: int) -> BlobRow:
        chunk, base, blob, start, encoded, decoded, base_pack, encoding, width, depth, _ = _ROW.unpack_from(
            self._rows, place * _ROW.size
        )
        if base_pack == _NO_BASE:
            return BlobRow(ChunkId(chunk), start, encoded, decoded, encoding, width, depth, None, None, blob)
        of_base = "" if base_pack == _THIS_PACK else self._base_packs[base_pack]
        return BlobRow(ChunkId(chunk), start, encoded, decoded, encoding, width, depth, ChunkId(base), of_base, blob)


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
    rows = data[at:]
    table = np.frombuffer(rows, _ROW_DTYPE)
    full = table["base_pack"] == _NO_BASE
    starts = np.zeros(len(table) + 1, np.uint64)
    np.cumsum(table["encoded_nbytes"], out=starts[1:])
    width = table["width"]
    known_width = (width == 1) | (width == 2) | (width == 4) | (width == 8)
    good = (
        (table["start"] == starts[:-1])
        & (table["encoded_nbytes"] <= MAX_ENCODED_NBYTES)
        & (table["decoded_nbytes"] > 0)
        & (table["decoded_nbytes"] <= MAX_CELL_NBYTES)
        & known_width
        & (table["decoded_nbytes"] % np.where(known_width, width, 1) == 0)
        & (table["depth"] <= MAX_DEPTH)
        & (full == (table["depth"] == 0))
        & (full == ~table["base"].any(axis=1))
        & (full | (table["base_pack"] == _THIS_PACK) | (table["base_pack"] < base_count))
        & ~table["reserved"].any(axis=1)
    )
    if not good.all():
        raise _corrupt(pack, f"row {int(np.argmin(good))} of its index breaks a rule")
    places = {
        ChunkId(rows[start : start + DIGEST_NBYTES]): at for at, start in enumerate(range(0, len(rows), _ROW.size))
    }
    if len(places) != row_count:
        raise _corrupt(pack, "its index has a chunk twice")
    if starts[-1] != blobs_nbytes:
        raise _corrupt(pack, "its blobs do not fill it")
    return PackIndex(rows, places, base_packs, blobs_nbytes)


def _corrupt(pack: str, why: str) -> CorruptionError:
    return CorruptionError(f"{pack} is damaged: {why}", kind="bad_pack", object=pack)
