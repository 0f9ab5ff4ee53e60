"""Audit segments: who read what, a chain of objects for each server process (FORMAT.md, "Log entries")."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from lamella_engine.errors import CorruptionError, UnsupportedFormatError
from lamella_engine.format import canonical
from lamella_engine.format.digests import Context, digest

SEGMENT_FORMAT = 0
MAX_SEGMENT_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Read:
    """One thing that somebody read, or changed."""

    time: str
    """UTC, ISO 8601."""
    principal: str
    peer: str
    """Address that the call came from."""
    rpc: str
    what: str
    """What of the repository: a revision, a version, or nothing."""
    status: str
    """What was said to it: ``ALLOWED``, before it is answered. What is refused stands in the server's log."""


_HEADER = {"format": int, "previous": str, "repository": str}
_READ = {field.name: str for field in fields(Read)}


def encode_read(read: Read) -> bytes:
    """Return a read as a line of a segment."""
    return canonical.dumps(asdict(read)) + b"\n"


def encode_segment(reads: Sequence[bytes], *, repository: str, previous: bytes | None) -> bytes:
    """Return a segment of reads that are encoded already; ``previous`` is the digest of the one before."""
    header = {
        "format": SEGMENT_FORMAT,
        "previous": "" if previous is None else previous.hex(),
        "repository": repository,
    }
    return canonical.dumps(header) + b"\n" + b"".join(reads)


def decode_segment(data: bytes, *, name: str, repository: str, previous: bytes | None) -> list[Read]:
    """Parse the segment that follows the one with the digest ``previous``; raises CorruptionError."""
    if len(data) > MAX_SEGMENT_NBYTES:
        raise CorruptionError(f"{name} is longer than {MAX_SEGMENT_NBYTES} bytes", kind="bad_audit")
    lines = canonical.load_lines(data, what=name)
    if not lines:
        raise CorruptionError(f"{name} is empty", kind="bad_audit")
    header, *rows = lines
    if isinstance(header, dict) and header.get("format") != SEGMENT_FORMAT:
        raise UnsupportedFormatError(f"{name} has format {header.get('format')!r}: upgrade lamella")
    canonical.conform(header, _HEADER, what=name)
    follows = "" if previous is None else previous.hex()
    if header["repository"] != repository or header["previous"] != follows or not rows:
        raise CorruptionError(f"{name} does not follow the segment before it", kind="bad_audit")
    for row in rows:
        canonical.conform(row, _READ, what=f"a read of {name}")
    return [Read(**row) for row in rows]


def segment_digest(data: bytes) -> bytes:
    """Return the digest that the next segment, and an entry, name a segment by."""
    return digest(Context.AUDIT, data)
