"""Digests: BLAKE3-256, each kind of thing under its own key-derivation context.

The contexts keep kinds apart: bytes that are a valid version can never pass for a chunk with the same digest.
"""

from enum import Enum

from blake3 import blake3

from lamella_engine.model import Buffer, ChunkId

DIGEST_NBYTES = 32
BLOB_DIGEST_NBYTES = 16
"""A blob's digest is vouched for by its pack's 32-byte digest; 16 bytes find damage just as surely."""


class Context(Enum):
    """What a digest is of. The strings are part of the format: never change one."""

    CHUNK = "lamella 2026-11-21 chunk"
    STRUCTURE = "lamella 2026-11-21 structure"
    PARAMETERS = "lamella 2026-11-21 parameters"
    VERSION = "lamella 2026-11-21 version"
    METADATA = "lamella 2026-11-21 metadata object"
    ENTRY = "lamella 2026-11-21 log entry"
    TO_SIGN = "lamella 2026-11-21 log entry to sign"
    AUDIT = "lamella 2026-11-21 audit segment"
    PACK_INDEX = "lamella 2026-11-21 pack index"
    BLOB = "lamella 2026-11-21 blob"
    FOLD = "lamella 2026-11-21 fold block"


class Digester:
    """A digest in the making, for bytes that come in pieces."""

    def __init__(self, context: Context) -> None:
        self._hasher = blake3(derive_key_context=context.value)

    def update(self, part: Buffer) -> None:
        """Add the next bytes."""
        self._hasher.update(part)

    def digest(self) -> bytes:
        """Return the 32-byte digest of everything added so far."""
        return self._hasher.digest()


def digest(context: Context, data: Buffer) -> bytes:
    """Return the 32-byte digest of ``data``. Releases the GIL for large inputs."""
    return blake3(data, derive_key_context=context.value).digest()


def chunk_id(data: Buffer) -> ChunkId:
    """Return the id of a chunk from its decoded little-endian bytes."""
    return ChunkId(digest(Context.CHUNK, data))


def blob_digest(payload: Buffer) -> bytes:
    """Return the 16-byte digest of a blob's payload."""
    return blake3(payload, derive_key_context=Context.BLOB.value).digest(BLOB_DIGEST_NBYTES)
