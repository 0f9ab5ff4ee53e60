"""The nouns, frozen. Plain values that every other module speaks in; no bytes on disk, files or threads here."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, NewType, Self, TypeAlias

from lamella_engine.chunking import Grid, grid
from lamella_engine.dtypes import Dtype, nbytes
from lamella_engine.errors import InvalidInputError

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes that are read in place."""

ChunkId = NewType("ChunkId", bytes)
"""32 bytes: the digest of a chunk's decoded bytes."""

VersionId = NewType("VersionId", str)
"""64 lower-case hex digits: the digest of a version's stored description."""

PushId = NewType("PushId", str)
"""32 lower-case hex digits; begins with the time of its making, so that the ids of a repository sort by age."""

RefKind: TypeAlias = Literal["branch", "tag", "alias"]
"""A branch moves by pushes, a tag never moves, an alias is moved by hand."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one tensor."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, decoded."""
        return nbytes(self.dtype, self.shape)

    @property
    def grid(self) -> Grid:
        """The tensor's cells; an opaque dtype is cut as a run of single bytes."""
        if self.dtype.opaque:
            return grid((self.nbytes,), 1)
        return grid(self.shape, self.dtype.bits // 8)


class Cell(NamedTuple):
    """A place: one element of a tensor's grid."""

    tensor: str | None
    """Name of the tensor; None for the chunks of a version's own manifest."""
    number: int
    """Number of the element in C order; for the manifest, the place in ``Description.manifest_chunks``. A push, which
    does not know the places of sketches yet, gives them minus the width of their lanes."""


AttachmentRole: TypeAlias = Literal["file", "safetensors_header"]
"""What an attachment's bytes are: a whole file, or all of a safetensors file that comes before its tensors."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """Opaque bytes kept with a version so that its files come back byte for byte."""

    path: str
    """Where the file stood, relative, ``/`` between parts."""
    role: AttachmentRole
    nbytes: int
    read: Callable[[int, int], Buffer] = field(repr=False, compare=False)
    """Returns the bytes from the first number to before the second; raises as ``Checkpoint.read`` does."""
    prefix: str = ""
    """What the version's names of a safetensors file's tensors have before the names that the file gives them."""

    @classmethod
    def of_bytes(cls, path: str, role: AttachmentRole, data: bytes, *, prefix: str = "") -> Self:
        """Return an attachment whose bytes are in memory."""
        return cls(path, role, len(data), lambda start, stop: memoryview(data)[start:stop], prefix)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a push or a checkout has come."""

    __module__ = "lamella"

    done_nbytes: int
    """Bytes of tensors and files, decoded, that have been dealt with."""
    total_nbytes: int
    """All of them."""
    stored_nbytes: int
    """Bytes, encoded, that were written (push) or read (checkout) for them."""


@dataclass(frozen=True, slots=True)
class RefInfo:
    """A ref and the version that it stands at."""

    __module__ = "lamella"

    model: str
    name: str
    kind: RefKind
    number: int
    """The version's number in its model."""


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
_RESERVED_REF = re.compile(r"latest|v[0-9]+|best:.*|[0-9a-f]{8,64}")


def check_name(name: str, *, what: str) -> str:
    """Return ``name`` if it can name a model or a ref, else raise InvalidInputError (git's rules, ASCII only)."""
    good = _NAME.fullmatch(name) and not (
        ".." in name or "//" in name or "/." in name or "./" in name or name.endswith((".lock", "/", "."))
    )
    good = good and not any(part.endswith(".lock") for part in name.split("/"))
    if not good:
        raise InvalidInputError(
            f"{name!r} cannot name a {what}: use letters, digits and . _ / - (at most 255, no '..', no '.lock')",
            kind="bad_name",
            name=name,
        )
    return name


def check_ref_name(name: str) -> str:
    """Return ``name`` if a ref may have it: a name that no other form of revision could be taken for."""
    check_name(name, what="ref")
    if _RESERVED_REF.fullmatch(name):
        raise InvalidInputError(
            f"{name!r} would read as a version, not as a ref: choose another name", kind="bad_name", name=name
        )
    return name
