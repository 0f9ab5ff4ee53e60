"""Objects as files of one directory, safe against crashes and power cuts (Linux file systems with hard links).

The order in :meth:`LocalObjects.put_if_absent` is the whole of it: each step is durable before the next makes it count.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from lamella_engine.errors import (
    CorruptionError,
    InvalidInputError,
    LamellaError,
    NotFoundError,
    PermissionDeniedError,
    RepositoryNotFoundError,
    StorageError,
)
from lamella_engine.model import Buffer
from lamella_engine.objects import (
    ObjectInfo,
    byte_views,
    check_object_name,
    check_range,
    check_small,
    is_object_name,
    object_exists,
    object_not_found,
    split_prefix,
)

# IOV_MAX of Linux: writev refuses more buffers than this in one call.
_MAX_BUFFERS = 1024

# Neither follows a link planted in the repository nor waits for the writer of a planted pipe.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class LocalObjects:
    """:class:`~lamella_engine.objects.Objects` in a directory; object ``a/b`` is the file ``a/b``.

    Holds no descriptor between calls. Files whose names begin with a dot are not objects; a crash can leave one
    (``.tmp-*``) behind.

    After a failed fsync this instance writes no more (StorageError, kind ``poisoned``): the kernel reports such a
    failure once and may then drop the data, so a later success would mean nothing. Reads go on.

    Parameters
    ----------
    root
        An existing directory; :meth:`create` makes one. Relative to the working directory of this moment.

    Raises
    ------
    RepositoryNotFoundError
        There is nothing at ``root``.
    InvalidInputError
        Kind ``not_a_directory``: there is something else.
    """

    store_name = ""

    def __init__(self, root: Path) -> None:
        self.root = _absolute(root)
        self._poisoned = False
        self._settled: set[Path] = set()
        with _os_errors(f"open {self.root}"):
            try:
                mode = self.root.stat().st_mode
            except FileNotFoundError:
                raise RepositoryNotFoundError(
                    f"there is no directory {self.root}: check the path, or create a repository there",
                    path=str(self.root),
                ) from None
            except NotADirectoryError:
                raise _not_a_directory(self.root) from None
        if not stat.S_ISDIR(mode):
            raise _not_a_directory(self.root)

    @classmethod
    def create(cls, root: Path) -> "LocalObjects":
        """Make the directory and its parents, durably, and open it. Idempotent: one that is there is opened."""
        root = _absolute(root)
        with _os_errors(f"create {root}"):
            try:
                _make_directories(root)
            except NotADirectoryError:
                raise _not_a_directory(root) from None
        return cls(root)

    def get(self, name: str) -> bytes:
        """Read the file; nothing is cached."""
        with self._open(name) as (fd, nbytes):
            check_small(name, nbytes)
            return _read(fd, name, 0, nbytes)

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Read a part of the file; a reader of much memory at once pays for its pages, so ask for a few MiB."""
        return self.get_ranges(name, [(start, stop)])[0]

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Read parts of the file, opened once."""
        with self._open(name) as (fd, nbytes):
            for start, stop in ranges:
                check_range(name, start, stop, nbytes=nbytes)
            return [_read(fd, name, start, stop) for start, stop in ranges]

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write a file beside its place, then give it its name. Costs two waits for the disk besides the bytes."""
        path = self._path(name)
        self._check_not_poisoned()
        with _os_errors(f"write {path}"):
            self._settle(path.parent)
            created = self._write_and_link(path, parts)
            # For the loser too: its winner may have died before this line, and the loser may be told that it had won.
            self._sync_directory(path.parent)
        # Another thread's fsync of this directory may have been given the failure that was ours.
        self._check_not_poisoned()
        if not created:
            raise object_exists(name)

    def size(self, name: str) -> int:
        """Ask the file system."""
        with self._open(name) as (_, nbytes):
            return nbytes

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """Read the directory at once, and each file's size when it is reached."""
        directory, start = split_prefix(prefix)
        parent = f"{directory}/" if directory else ""
        with _os_errors(f"list {self.root / directory}"):
            try:
                entries = os.scandir(self.root / directory)
            except (FileNotFoundError, NotADirectoryError):
                return iter(())
            with entries:
                names = sorted(
                    parent + entry.name
                    for entry in entries
                    if entry.name.startswith(start)
                    and parent + entry.name > after
                    and is_object_name(entry.name)
                    and entry.is_file(follow_symlinks=False)
                )
        return islice(self._infos(names), limit)

    def delete(self, name: str) -> None:
        """Remove the file; the directory is not synced, since an object that comes back is only deleted again."""
        path = self._path(name)
        self._check_not_poisoned()
        with _os_errors(f"delete {path}"), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()

    def close(self) -> None:
        """Nothing is held between calls."""

    def _path(self, name: str) -> Path:
        return self.root / check_object_name(name)

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[int, int]]:
        """Descriptor and size of an object, for as long as it is read."""
        path = self._path(name)
        with _os_errors(f"read {path}"):
            try:
                fd = os.open(path, _READ_FLAGS)
            except (FileNotFoundError, NotADirectoryError):
                raise object_not_found(name) from None
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
                    raise _not_a_file(name) from None
                raise
            try:
                status = os.fstat(fd)
                if stat.S_ISDIR(status.st_mode):
                    raise object_not_found(name)
                if not stat.S_ISREG(status.st_mode):
                    raise _not_a_file(name)
                yield fd, status.st_size
            finally:
                os.close(fd)

    def _infos(self, names: Sequence[str]) -> Iterator[ObjectInfo]:
        """Sizes are looked up as they are asked for, so a listing that is cut short costs little."""
        for name in names:
            path = self.root / name
            with _os_errors(f"list {path}"):
                try:
                    nbytes = path.lstat().st_size
                except FileNotFoundError:  # deleted meanwhile
                    continue
            yield ObjectInfo(name, nbytes)

    def _settle(self, directory: Path) -> None:
        """Make an object's directory and be sure that it is durable.

        Once for each directory and instance even if it exists, because whoever made it may not have come to sync it.
        """
        if directory in self._settled or directory == self.root:
            return
        self._settle(directory.parent)
        with suppress(FileExistsError):
            directory.mkdir()
        self._sync_directory(directory.parent)
        self._settled.add(directory)

    def _write_and_link(self, path: Path, parts: Sequence[Buffer]) -> bool:
        """Put durable bytes under a name that may be taken; return whether this call took it. Leaves nothing else."""
        temp = str(path.with_name(f".tmp-{secrets.token_hex(8)}"))
        fd = -1
        # A signal's exception can come after any call: so the file is made inside, and goes by the very first one.
        try:
            try:
                fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
                _write_all(fd, parts)
                self._fsync(fd)
            finally:
                if fd >= 0:
                    os.close(fd)
            # Unlike rename, link never replaces: it is the one step that two writers cannot both do.
            try:
                os.link(temp, path)
            except FileExistsError:
                return False
            return True
        finally:
            try:  # noqa: SIM105 (making the context manager would be a call before)
                os.unlink(temp)
            except OSError:  # what is left is no object, and hides no failure
                pass

    def _fsync(self, fd: int) -> None:
        try:
            os.fsync(fd)
        except OSError:
            self._poisoned = True
            raise

    def _sync_directory(self, directory: Path) -> None:
        with _directory(directory) as fd:
            self._fsync(fd)

    def _check_not_poisoned(self) -> None:
        if self._poisoned:
            raise StorageError(
                f"an earlier write to {self.root} was not made durable: check the disk, then open the repository anew",
                kind="poisoned",
                transient=False,
                path=str(self.root),
            )


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _make_directories(path: Path) -> None:
    """Make what is missing on the way down to ``path``, each directory durable before the next is made."""
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    except FileNotFoundError:
        _make_directories(path.parent)
        with suppress(FileExistsError):
            path.mkdir()
        with _directory(path.parent) as fd:
            os.fsync(fd)


def _write_all(fd: int, parts: Sequence[Buffer]) -> None:
    views = byte_views(parts)
    first = 0
    while first < len(views):
        written = os.writev(fd, views[first : first + _MAX_BUFFERS])
        if not written:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        while first < len(views) and written >= views[first].nbytes:
            written -= views[first].nbytes
            first += 1
        if written:
            views[first] = views[first][written:]


def _read(fd: int, name: str, start: int, stop: int) -> bytes:
    """Read bytes that fstat says are there; one call gives at most 2 GiB."""
    pieces = []
    while start < stop:
        piece = os.pread(fd, stop - start, start)
        if not piece:
            check_range(name, start, stop, nbytes=start)
        pieces.append(piece)
        start += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


# What the catcher can do, by errno: kind, next step. Everything else is an io_error.
_CAUSES = {
    errno.ENOSPC: ("disk_full", "free some space and try again"),
    errno.EDQUOT: ("disk_full", "free some of your quota and try again"),
    errno.EFBIG: ("file_too_large", "raise the limit on file sizes"),
    errno.EROFS: ("read_only", "mount the file system for writing"),
    errno.EPERM: ("not_permitted", "check that the file system has hard links and the file is not locked"),
    errno.EMFILE: ("too_many_files", "close some files or raise the limit, and try again"),
    errno.ENFILE: ("too_many_files", "close some files or raise the limit, and try again"),
}
# Only these pass without somebody's doing. EIO does not: the kernel has tried again already.
_TRANSIENT = {errno.EMFILE, errno.ENFILE}


@contextmanager
def _os_errors(action: str) -> Iterator[None]:
    """Turn an OSError into the error that says what its catcher can do."""
    try:
        yield
    except OSError as error:
        raise _explained(error, action) from error


def _explained(error: OSError, action: str) -> LamellaError:
    code = error.errno or errno.EIO
    if code == errno.EACCES:
        return PermissionDeniedError(f"cannot {action}: you lack the right; ask its owner")
    kind, advice = _CAUSES.get(code, ("io_error", "check the disk and its mount"))
    return StorageError(
        f"cannot {action}: {error.strerror or error}; {advice}",
        kind=kind,
        transient=code in _TRANSIENT,
        errno=errno.errorcode.get(code, str(code)),
    )


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except FileNotFoundError:
        raise NotFoundError(
            "the working directory was deleted: change to another", kind="no_working_directory"
        ) from None


def _not_a_directory(path: Path) -> InvalidInputError:
    return InvalidInputError(
        f"{path} is not a directory: a repository is one; give another path", kind="not_a_directory", path=str(path)
    )


def _not_a_file(name: str) -> CorruptionError:
    return CorruptionError(
        f"{name} is a link or a device, and objects are plain files: restore it from a copy",
        kind="not_a_file",
        name=name,
    )
