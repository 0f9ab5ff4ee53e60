"""The files that a checkout makes: where they may stand, and writing them whole or not at all."""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from lamella_engine.errors import (
    AlreadyExistsError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
)
from lamella_engine.model import Buffer

DRAFT_PREFIX = ".lamella-"
"""How the names of files begin that are being written; one that a killed process left may be deleted."""

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
    control character, no ``.git`` and no draft of a checkout, and short enough for a Linux file system.
    """
    parts = path.split("/")
    good = (
        not _FORBIDDEN.search(path)
        and len(path.encode()) <= _MAX_PATH_NBYTES
        and all(part not in ("", ".", "..") and len(part.encode()) <= _MAX_PART_NBYTES for part in parts)
        # What git and this module would take for their own.
        and not any(part.lower() == ".git" or part.startswith(DRAFT_PREFIX) for part in parts)
    )
    if not good:
        raise InvalidInputError(
            f"{path[:80]!r} cannot be the path of a stored file: use a relative path without '..', backslashes or "
            "control characters",
            kind="bad_path",
        )
    return path


REPOSITORY_PARTS = frozenset(("", "fold", "index", "log", "meta", "packs", "probe", "sessions"))
"""A repository's directory itself, and what is in it: nothing else may be written there."""


def is_repository(directory: "str | os.PathLike[str]") -> bool:
    """Whether a directory is a lamella repository: files of a model have no place in it, nor it in a model."""
    return os.path.lexists(os.path.join(directory, "log", "0" * 20))


def check_attachment_paths(paths: Sequence[str]) -> None:
    """Raise InvalidInputError unless a checkout can create all of ``paths`` below one directory.

    Each passes :func:`check_attachment_path`, none is there twice (``duplicate_path``), and none is a directory of
    another.
    """
    known = {check_attachment_path(path) for path in paths}
    if len(known) != len(paths):
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise InvalidInputError(f"there are two files {twice[:80]!r}: rename one", kind="duplicate_path")
    for path in paths:
        folder = path
        while folder := folder.rpartition("/")[0]:
            if folder in known:
                raise InvalidInputError(
                    f"{folder[:80]!r} cannot be both a file and a directory: rename one", kind="duplicate_path"
                )


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be written."""

    path: str
    """Below the directory; passes :func:`check_attachment_paths` together with its companions."""
    nbytes: int
    """Length of the whole content."""
    parts: Callable[[], Iterable[Buffer]]
    """Returns the content in order. Each is used before the next is asked for, so one buffer may be filled again."""


def write_files(directory: Path, files: Iterable[NewFile], *, overwrite: bool) -> dict[str, Path]:
    """Write files into a directory: all of them, whole and durable, or none.

    The bytes go to hidden files beside their targets and are synced; when the last is there, all take their names.
    Whatever is raised meanwhile, KeyboardInterrupt and errors of ``parts`` included, removes what was made, directories
    too. (Files that were replaced before an error in the very last step stay replaced.)

    Parameters
    ----------
    directory
        Made if it is not there, with its parents.
    overwrite
        Whether files that stand there may be replaced. If not, each is compared with what it should hold, and is left
        alone if it does. A symbolic link, directory or device there is never replaced or written through.

    Returns
    -------
    dict
        Path of each file below the directory -> where it is, in the order given.

    Raises
    ------
    AlreadyExistsError
        Something else stands at a target, or ``overwrite`` is off and its content differs; or a directory to be made is
        a file.
    InvalidInputError
        ``parts`` has more or fewer bytes than ``nbytes`` (``wrong_length``), the path holds a NUL (``bad_path``), or
        the directory is a repository, or one of its own (``nested_repository``).
    PermissionDeniedError
        A directory may not be made.
    StorageError
        The file system failed or is full.
    """
    if "\0" in str(directory):
        raise InvalidInputError(f"{str(directory)[:80]!r} cannot be the name of a directory", kind="bad_path")
    place = directory.absolute()
    for above, part in zip((place, *place.parents), ("", *reversed(place.parts)), strict=False):
        if is_repository(above) and part in REPOSITORY_PARTS:
            raise InvalidInputError(
                f"{directory} is where a lamella repository keeps its objects: choose another place",
                kind="nested_repository",
            )
    with _Writing(directory, overwrite=overwrite) as writing:
        for file in files:
            writing.add(file)
        return writing.finish()


class _Writing:
    """Files on their way: drafts beside their targets, undone unless all of them take their names."""

    def __init__(self, directory: Path, *, overwrite: bool) -> None:
        self._directory = directory
        self._overwrite = overwrite
        self._made: list[Path] = []
        """Directories made, parents first."""
        self._drafts: list[tuple[Path, Path]] = []
        """Drafts with their targets."""
        self._named: set[Path] = set()
        """New files that have their names already, or are about to."""
        self._targets: dict[str, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._tidy_up()
        except BaseException:  # a signal came just now, perhaps the first one: what is half-written goes all the same
            self._tidy_up()
            raise

    def _tidy_up(self) -> None:
        """Remove drafts, and, unless the files were finished, everything that was made."""
        for draft, path in self._drafts:
            with contextlib.suppress(OSError):
                # A draft that was linked to its target is still there, one that was renamed is not.
                if path in self._named and (not os.path.lexists(draft) or os.path.samefile(draft, path)):
                    os.unlink(path)
            with contextlib.suppress(OSError):
                os.unlink(draft)
        for made in reversed(self._made):
            with contextlib.suppress(OSError):  # somebody else has put something into it, or it was never made
                os.rmdir(made)

    def add(self, file: NewFile) -> None:
        """Write the draft of a file, unless the target holds its bytes already."""
        path = self._directory / file.path
        self._targets[file.path] = path
        self._make(path.parent)
        self._check_below(path.parent)
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            self._draft(path, file)
            return
        except OSError as error:
            raise _failed(path, error) from error
        if not stat.S_ISREG(mode):
            raise AlreadyExistsError(f"{path} exists and is no regular file: choose another name", kind="not_a_file")
        if self._overwrite:
            self._draft(path, file)
        elif not _holds(path, _exactly(file.parts(), file.nbytes), nbytes=file.nbytes):
            raise _exists(path)

    def finish(self) -> dict[str, Path]:
        """Let every draft take its name; return where each file is."""
        path = self._directory
        try:
            for draft, path in self._drafts:
                if self._overwrite:
                    os.replace(draft, path)
                else:
                    self._named.add(path)
                    _claim(draft, path)
            path = self._directory
            for directory in {path.parent for _, path in self._drafts} | {made.parent for made in self._made}:
                _sync_directory(directory)
        except FileExistsError as error:
            raise _exists(path) from error
        except OSError as error:
            raise _failed(path, error) from error
        self._named, self._made = set(), []
        return self._targets

    def _make(self, directory: Path) -> None:
        missing = [directory]
        while not missing[-1].is_dir() and missing[-1] != missing[-1].parent:
            missing.append(missing[-1].parent)
        for path in reversed(missing[:-1]):
            self._made.append(path)
            try:
                path.mkdir()
            except FileExistsError:
                if path.is_dir():
                    self._made.pop()  # it is somebody else's
                    continue
                raise AlreadyExistsError(
                    f"{path} is a file: give a directory, or remove it", kind="not_a_directory"
                ) from None
            except NotADirectoryError:
                raise AlreadyExistsError(
                    f"{path} lies below a file: give a directory", kind="not_a_directory"
                ) from None
            except PermissionError:
                raise PermissionDeniedError(f"{path} may not be made: give another directory") from None
            except FileNotFoundError:
                raise NotFoundError(
                    "the working directory was deleted: change to one that exists, or give absolute paths",
                    kind="no_working_directory",
                ) from None
            except OSError as error:
                raise StorageError(f"{path} cannot be made: {error.strerror}", kind="write_failed") from None

    def _check_below(self, folder: Path) -> None:
        """Raise AlreadyExistsError if a directory below the one that was named is a link to somewhere else."""
        while folder != self._directory:
            if folder.is_symlink():
                raise AlreadyExistsError(
                    f"{folder} is a link to another directory: remove it, or choose another place", kind="not_a_file"
                )
            folder = folder.parent

    def _draft(self, path: Path, file: NewFile) -> None:
        draft = path.with_name(f"{DRAFT_PREFIX}{secrets.token_hex(8)}.part")
        self._drafts.append((draft, path))
        try:
            # "x" never opens what someone else put there, and leaves the permissions to the umask.
            with open(draft, "xb") as out:
                for part in _exactly(file.parts(), file.nbytes):
                    out.write(part)
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise _failed(path, error) from error


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
        f"{path} exists with other content: choose another place, or allow it with overwrite", path=str(path)
    )


def _failed(path: Path, error: OSError) -> NotFoundError | PermissionDeniedError | StorageError:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDeniedError(
            f"{path} may not be written ({error.strerror}): choose another place", path=str(path)
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFoundError(f"there is no directory {path.parent}: make it first", kind="directory_not_found")
    kind = "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "write_failed"
    return StorageError(f"cannot write {path}: {error.strerror or error}", kind=kind, path=str(path))
