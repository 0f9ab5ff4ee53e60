"""Files that are read for a push: with pread, so that one cut short is an error and not a signal, and unchanged."""

import errno
import os
import stat
from types import TracebackType
from typing import Self

from lamella_engine.errors import InvalidInputError, NotFoundError, PermissionDeniedError, StorageError

# What opening can fail of that is no fault of the file: too many are open, in this process or in all.
_OF_THE_SYSTEM = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}


class SourceFile:
    """A regular file, or a symbolic link to one, open for reading. Safe for several threads, but for closing.

    Raises
    ------
    InvalidInputError
        Not a regular file (``not_a_file``), or not readable (``unreadable``).
    NotFoundError
        There is no such file (``file_not_found``).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = _open_regular(path)
        self._opened = _fingerprint(os.fstat(self._descriptor))

    @property
    def nbytes(self) -> int:
        """Its length when it was opened."""
        return self._opened[2]

    @property
    def fingerprint(self) -> tuple[int, ...]:
        """What the file was when it was opened: equal again in another process if it is that still."""
        return self._opened

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes between two places of the file; raises as :meth:`read_into` does."""
        out = bytearray(stop - start)
        self.read_into(memoryview(out), start)
        return bytes(out)

    def read_into(self, out: memoryview, start: int) -> None:
        """Read ``out`` full from byte ``start`` of the file.

        Raises InvalidInputError if the file ends before (``source_changed``) or was closed (``closed``), StorageError
        if it cannot be read.
        """
        done = 0
        while done < out.nbytes:
            try:
                count = os.preadv(self._open_descriptor(), [out[done:]], start + done)
            except OSError as error:
                raise StorageError(f"cannot read {self.path}: {error.strerror}", kind="read_failed") from error
            if not count:
                raise source_changed(self.path)
            done += count

    def check_unchanged(self) -> None:
        """Raise InvalidInputError (``source_changed``) unless the open file and its name are what they were."""
        try:
            same = self._opened == _fingerprint(os.fstat(self._open_descriptor())) == _fingerprint(os.stat(self.path))
        except OSError:
            same = False
        if not same:
            raise source_changed(self.path)

    def opened_again(self) -> "SourceFile":
        """Open the file once more; raise InvalidInputError (``source_changed``) if it is another by now."""
        try:
            found = SourceFile(self.path)
        except (NotFoundError, InvalidInputError):
            raise source_changed(self.path) from None
        if found._opened != self._opened:
            found.close()
            raise source_changed(self.path)
        return found

    def close(self) -> None:
        """Let go of the file. Doing it twice is harmless."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise InvalidInputError(f"{self.path} was closed: open it again", kind="closed")
        return self._descriptor


def source_changed(path: str) -> InvalidInputError:
    """Return the error for a source that is another than it was."""
    return InvalidInputError(
        f"{path} changed while it was read: push again when its writer has finished", kind="source_changed"
    )


def _open_regular(path: str) -> int:
    """Open a regular file for reading; never waits for the other end of a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}: check the path", kind="file_not_found", path=path) from None
    except PermissionError as error:
        raise PermissionDeniedError(f"{path} may not be read: ask for access, or leave it out", path=path) from error
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in _OF_THE_SYSTEM:
            raise StorageError(f"cannot open {path}: {error}: try again with less", kind="read_failed") from error
        raise InvalidInputError(f"cannot open {path!r}: {error}", kind="unreadable", path=path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidInputError(f"{path} is no regular file: name one .safetensors file", kind="not_a_file", path=path)
    return descriptor


def _fingerprint(status: os.stat_result) -> tuple[int, int, int, int, int]:
    """Return what a file is and when it last changed; reading it leaves this as it is."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
