"""The files that a checkout makes: where they may stand, and writing them whole or not at all."""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lamella_engine.errors import AlreadyExistsError, InvalidInputError, NotFoundError, StorageError
from lamella_engine.model import Buffer

# What a path must not hold: the separators of another system, characters that drive a terminal or turn its text round
# (C0, DEL, C1, line separators, bidirectional overrides), and half characters, which no UTF-8 can spell.
_FORBIDDEN = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Longest part and longest path, in UTF-8 bytes: NAME_MAX and PATH_MAX (less its NUL) of Linux.
_MAX_PART_NBYTES = 255
_MAX_PATH_NBYTES = 4095

# How much of an existing file is compared at a time.
_COMPARED_NBYTES = 1 << 20

# link(2) says one of these where the file system has no hard links (FAT, some network mounts).
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def check_attachment_path(path: str) -> str:
    """Return ``path`` if a checkout may create it below its target, else raise InvalidInputError (``bad_path``).

    Good is a relative path of ordinary parts joined by ``/``: nothing empty, no ``.`` or ``..``, no backslash, NUL or
    control character, and short enough for a Linux file system.
    """
    parts = path.split("/")
    good = (
        not _FORBIDDEN.search(path)
        and len(path.encode()) <= _MAX_PATH_NBYTES
        and all(part not in ("", ".", "..") and len(part.encode()) <= _MAX_PART_NBYTES for part in parts)
    )
    if not good:
        raise InvalidInputError(
            f"{path[:80]!r} cannot be the path of a stored file: use a relative path without '..', backslashes or "
            "control characters",
            kind="bad_path",
        )
    return path


def write_file(path: Path, parts: Iterable[Buffer], *, nbytes: int, overwrite: bool) -> bool:
    """Write ``parts``, one after another, to ``path``: whole and durable, or not at all.

    The bytes go to a hidden file in the same directory, are synced, and take the name in one step. Whatever is raised
    meanwhile, KeyboardInterrupt and errors of ``parts`` included, removes that file and leaves ``path`` as it was.

    Parameters
    ----------
    path
        The target. A symbolic link, directory or device there is never replaced or written through.
    parts
        The content in order. Each is used before the next is asked for, so one buffer may be filled again and again.
    nbytes
        Length of the whole content.
    overwrite
        Whether a file that stands there may be replaced. If not, ``parts`` is compared with it instead.

    Returns
    -------
    bool
        Whether the file was written; False if ``overwrite`` is off and the target already holds these very bytes.

    Raises
    ------
    AlreadyExistsError
        Something else stands there, or ``overwrite`` is off and its content differs.
    InvalidInputError
        ``parts`` has more or fewer bytes than ``nbytes`` (``wrong_length``).
    NotFoundError
        The directory does not exist.
    StorageError
        The file system failed or is full.
    """
    if "\0" in str(path):
        raise InvalidInputError(f"{str(path)[:80]!r} cannot be the name of a file", kind="bad_path")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return _write_new(path, _exactly(parts, nbytes), overwrite=overwrite)
    except OSError as error:
        raise _failed(path, error) from error
    if not stat.S_ISREG(mode):
        raise AlreadyExistsError(f"{path} exists and is no regular file: choose another name", kind="not_a_file")
    if overwrite:
        return _write_new(path, _exactly(parts, nbytes), overwrite=True)
    if not _holds(path, _exactly(parts, nbytes), nbytes=nbytes):
        raise _exists(path)
    return False


def _exactly(parts: Iterable[Buffer], nbytes: int) -> Iterable[memoryview]:
    """Yield ``parts`` as bytes; raise before the first byte too many, and at the end if some are missing."""
    left = nbytes
    for part in parts:
        octets = np.frombuffer(part, np.uint8).data
        left -= octets.nbytes
        if left < 0:
            break
        yield octets
    if left:
        raise InvalidInputError(
            f"the content is {'longer' if left < 0 else 'shorter'} than the {nbytes} bytes announced",
            kind="wrong_length",
        )


def _holds(path: Path, parts: Iterable[memoryview], *, nbytes: int) -> bool:
    """Whether the regular file at ``path`` holds exactly ``parts``; stops reading at the first difference."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if os.fstat(file.fileno()).st_size != nbytes:
                return False
            for part in parts:
                for start in range(0, part.nbytes, _COMPARED_NBYTES):
                    piece = part[start : start + _COMPARED_NBYTES]
                    if file.read(piece.nbytes) != piece:
                        return False
            return True
    except OSError as error:
        raise _failed(path, error) from error


def _write_new(path: Path, parts: Iterable[memoryview], *, overwrite: bool) -> bool:
    draft = path.with_name(f".lamella-{secrets.token_hex(8)}.part")
    try:
        try:
            # "x" never opens what someone else put there, and leaves the permissions to the umask.
            with open(draft, "xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(draft, path)
            else:
                _claim(draft, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
        _sync_directory(path.parent)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise _failed(path, error) from error
    return True


def _claim(draft: Path, path: Path) -> None:
    """Give ``draft`` the name ``path`` unless something has it; raises FileExistsError."""
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Not in one step, but all that such a file system offers.
        if os.path.lexists(path):
            raise FileExistsError(path) from error
        os.rename(draft, path)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(path: Path) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"{path} exists with other content: choose another name, or allow overwriting", path=str(path)
    )


def _failed(path: Path, error: OSError) -> NotFoundError | StorageError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFoundError(f"there is no directory {path.parent}: make it first", kind="directory_not_found")
    kind = "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "write_failed"
    return StorageError(f"cannot write {path}: {error.strerror or error}", kind=kind, path=str(path))
