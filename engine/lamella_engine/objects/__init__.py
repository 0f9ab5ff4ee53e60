"""Objects: dumb named bytes at rest, and the promises that everything above is built on.

An object is created once, never changed and never replaced; only garbage collection removes one. Whether a place keeps
these promises is not believed but tried (:func:`lamella_engine.objects.probe.probe`) before anything is written to it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from lamella_engine.errors import AlreadyExistsError, CorruptionError, InvalidInputError, NotFoundError
from lamella_engine.model import Buffer


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One line of a listing."""

    name: str
    nbytes: int


MAX_GET_NBYTES = 64 << 20
"""Longest object that ``get`` returns; what is longer is read by ranges, whose lengths the caller knows."""


CREATE_ONCE_NBYTES = 16 << 20
"""Longest object of which a name is created once whoever asks. Uploads in parts, which longer ones take, know no such
condition in most object stores."""


class Objects(Protocol):
    """Named bytes. Safe for use from several threads.

    A name is relative, with ``/`` between its parts; a part is at most 255 of ``A-Z a-z 0-9 . _ -``, does not begin
    with a dot and holds no ``..``. No name may be the directory of another (``a/b`` beside ``a/b/c``): a disk could not
    hold both.

    Every call raises InvalidInputError (kind ``bad_object_name``) for another name or prefix, and StorageError or
    PermissionDeniedError where the place fails; ``transient`` says whether the same call may succeed later.
    """

    store_name: str
    """What keeps these promises, or does not, for many places at once, such as a bucket and its endpoint; ``""`` where
    each place does so for itself. Says nothing that is secret."""

    def get(self, name: str) -> bytes:
        """Return the whole of a small object: at most :data:`MAX_GET_NBYTES`.

        Raises
        ------
        CorruptionError
            Kind ``long_object``: it is longer, and nothing was allocated for it.
        NotFoundError
            Kind ``object_not_found``: there is no such object.
        """

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes ``start`` to ``stop`` (one past the last): exactly ``stop - start`` of them.

        Raises
        ------
        NotFoundError
            Kind ``object_not_found``: there is no such object.
        CorruptionError
            Kind ``short_object``: the object ends before ``stop``. Nothing is allocated for the missing bytes.
        InvalidInputError
            Kind ``bad_range``: not ``0 <= start <= stop``.
        """

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Return several ranges, each as :meth:`get_range` does; raises as it does."""

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        """Create the object as the concatenation of ``parts``, which must not change meanwhile.

        Atomic: no one ever sees a part of it, and of several calls for one name, in any processes, exactly one
        succeeds; but if it is longer than :data:`CREATE_ONCE_NBYTES`, the name must be one that nobody else would use,
        such as a pack's, which has its push's id. Durable when it returns. Not idempotent: a repeated call raises
        AlreadyExistsError, even after its own success, so callers recognise their own bytes by reading them.

        Raises
        ------
        AlreadyExistsError
            Kind ``object_exists``: the name is taken; nothing was changed, and the object that has it is durable.
        StorageError
            Either nothing was stored, or the whole object was and only the answer (or its durability) is missing. Never
            delete on its account: put again, and AlreadyExistsError then says that a durable object has the name.
        """

    def size(self, name: str) -> int:
        """Return the object's length in bytes.

        Raises
        ------
        NotFoundError
            Kind ``object_not_found``: there is no such object.
        """

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """Yield the objects of one directory, by ascending name.

        Complete: sees every put that returned before the call. Objects that come or go meanwhile may or may not be
        seen.

        Parameters
        ----------
        prefix
            ``"log/"`` or ``"log/0000"``: a directory, then the first characters of what is listed there. Objects in
            directories below that one are not listed.
        after
            A full name; only greater names are yielded.
        limit
            At most so many; None for all.
        """

    def delete(self, name: str) -> None:
        """Remove the object. Idempotent: an absent one is fine.

        Not durable: after a power cut the object may be there again, whole.
        """

    def close(self) -> None:
        """Release what is held. Idempotent; no other call may follow."""


def open_objects(url: str, *, create: bool = False) -> Objects:
    """Open the place that a URL names.

    Parameters
    ----------
    url
        A path or ``file:///path`` for a directory; ``s3://bucket/prefix`` for an object store, also ``gs://`` and
        ``az://``; ``memory://name`` for a store that lives as long as this process and is the same one for every
        caller that gives the same name.
    create
        Make the directory, with its parents, durably, if it is not there. A store in memory is always there, a bucket
        has to be.

    Raises
    ------
    InvalidInputError
        Kind ``unsupported_url`` for another scheme, ``bad_url`` for one that names no place, ``not_a_directory`` for a
        path to something else, ``bad_endpoint`` for an object store's address in the environment that is none.
    RepositoryNotFoundError
        There is no directory at that path, and ``create`` was not given.
    """
    # Imported here because both import this module.
    from lamella_engine.objects.local import LocalObjects
    from lamella_engine.objects.memory import MemoryObjects

    scheme, separator, rest = url.partition("://")
    if not separator:
        path = url
    elif scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise _bad_url(url)
        path = unquote(parts.path)
    elif scheme == "memory":
        if not rest:
            raise _bad_url(url)
        return MemoryObjects.shared(rest)
    elif scheme in ("s3", "gs", "az"):
        from lamella_engine.objects.cloud import CloudObjects

        return CloudObjects.open(url)
    else:
        raise InvalidInputError(
            f"cannot open {url!r}: give a directory, file:///path, s3://bucket/prefix, gs://..., az://... or "
            "memory://name",
            kind="unsupported_url",
            url=url,
        )
    if not path or "\0" in path:
        raise _bad_url(url)
    return LocalObjects.create(Path(path)) if create else LocalObjects(Path(path))


def _bad_url(url: str) -> InvalidInputError:
    return InvalidInputError(
        f"{url!r} names no place: give a directory, file:///absolute/path, s3://bucket/prefix or memory://name",
        kind="bad_url",
        url=url,
    )


# 255 is the longest file name on every Linux file system. A leading dot is kept for what is not an object, such as the
# half-written files of LocalObjects.
_PART = r"(?!\.)(?![A-Za-z0-9._-]*\.\.)[A-Za-z0-9._-]{1,255}"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_PREFIX = re.compile(rf"(?:{_PART}/)*(?:{_PART})?")


def is_object_name(name: str) -> bool:
    """Whether an object may have this name."""
    return _NAME.fullmatch(name) is not None


def check_object_name(name: str) -> str:
    """Return ``name`` if an object may have it, else raise InvalidInputError (kind ``bad_object_name``)."""
    if not is_object_name(name):
        raise InvalidInputError(
            f"{name!r} cannot name an object: use letters, digits and . _ - in parts with / between them, "
            "no leading dot and no '..'",
            kind="bad_object_name",
            name=name,
        )
    return name


def split_prefix(prefix: str) -> tuple[str, str]:
    """Return the directory that a prefix names (``""`` for the top), and how the names listed there begin.

    Raises InvalidInputError (kind ``bad_object_name``) for what no object's name begins with.
    """
    if not _PREFIX.fullmatch(prefix):
        raise InvalidInputError(
            f"{prefix!r} is no prefix of object names: give 'directory/' or 'directory/first-characters'",
            kind="bad_object_name",
            name=prefix,
        )
    directory, _, start = prefix.rpartition("/")
    return directory, start


def check_range(name: str, start: int, stop: int, *, nbytes: int) -> None:
    """Return if ``start`` to ``stop`` lies within an object of ``nbytes`` bytes.

    Raises InvalidInputError (kind ``bad_range``) for what is no range, CorruptionError (kind ``short_object``) for one
    that goes beyond the end.
    """
    if not 0 <= start <= stop:
        raise InvalidInputError(f"{start} to {stop} is no range of bytes of {name}", kind="bad_range", name=name)
    if stop > nbytes:
        raise CorruptionError(
            f"{name} ends after {nbytes} bytes, and {stop} were to be there: it was cut short; restore it from a copy",
            kind="short_object",
            name=name,
            nbytes=nbytes,
        )


def byte_views(parts: Sequence[Buffer]) -> list[memoryview]:
    """Return the parts as runs of bytes, in place. Empty ones are left out: an empty array cannot be seen so."""
    views = [memoryview(part) for part in parts]
    return [view.cast("B") for view in views if view.nbytes]


def check_small(name: str, nbytes: int) -> None:
    """Raise CorruptionError for an object that is too long to be got whole."""
    if nbytes > MAX_GET_NBYTES:
        raise CorruptionError(
            f"{name} has {nbytes} bytes, more than any object of its kind: restore it from a copy",
            kind="long_object",
            name=name,
        )


def object_not_found(name: str) -> NotFoundError:
    """Make the error for reading an object that is not there."""
    return NotFoundError(
        f"there is no object {name}: it was never written, or was deleted", kind="object_not_found", name=name
    )


def object_exists(name: str) -> AlreadyExistsError:
    """Make the error for creating an object that is there."""
    return AlreadyExistsError(
        f"there is an object {name} already, and objects are never replaced: read it, or choose another name",
        kind="object_exists",
        name=name,
    )
