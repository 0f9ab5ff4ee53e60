"""Objects in this process's memory: for tests and for repositories that need not outlive it."""

from collections.abc import Iterator, Sequence
from itertools import islice
from threading import Lock
from typing import ClassVar

from lamella_engine.model import Buffer
from lamella_engine.objects import (
    ObjectInfo,
    byte_views,
    check_object_name,
    check_range,
    check_small,
    object_exists,
    object_not_found,
    split_prefix,
)


class MemoryObjects:
    """:class:`~lamella_engine.objects.Objects` in a dict. Durable as long as the process; never raises StorageError."""

    _shared: ClassVar[dict[str, "MemoryObjects"]] = {}
    _shared_lock: ClassVar[Lock] = Lock()

    store_name = ""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = Lock()

    @classmethod
    def shared(cls, name: str) -> "MemoryObjects":
        """Return this process's store of that name, empty at first."""
        with cls._shared_lock:
            return cls._shared.setdefault(name, cls())

    def get(self, name: str) -> bytes:
        """Return the stored bytes themselves, which nobody can change."""
        data = self._data(name)
        check_small(name, len(data))
        return data

    def _data(self, name: str) -> bytes:
        check_object_name(name)
        with self._lock:
            data = self._objects.get(name)
        if data is None:
            raise object_not_found(name)
        return data

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Copy a part of the stored bytes."""
        data = self._data(name)
        check_range(name, start, stop, nbytes=len(data))
        return data[start:stop]

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Copy the parts."""
        return [self.get_range(name, start, stop) for start, stop in ranges]

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        """Copy the parts into one run of bytes."""
        check_object_name(name)
        data = b"".join(byte_views(parts))
        with self._lock:
            if name in self._objects:
                raise object_exists(name)
            self._objects[name] = data

    def size(self, name: str) -> int:
        """Count the stored bytes."""
        return len(self._data(name))

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """List what was there at the moment of the call."""
        directory, _ = split_prefix(prefix)
        with self._lock:
            found = sorted(
                (name, len(data))
                for name, data in self._objects.items()
                if name > after and name.startswith(prefix) and name.rpartition("/")[0] == directory
            )
        return islice((ObjectInfo(name, nbytes) for name, nbytes in found), limit)

    def delete(self, name: str) -> None:
        """Forget the bytes; those who read them before keep them."""
        check_object_name(name)
        with self._lock:
            self._objects.pop(name, None)

    def close(self) -> None:
        """Nothing is held but the bytes, which others that share them still want."""
