"""Objects that count what is asked of them, and objects that fail at a chosen write."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Enum, auto
from threading import Lock

from lamella_engine.errors import LamellaError, StorageError
from lamella_engine.model import Buffer
from lamella_engine.objects import ObjectInfo, Objects, byte_views
from lamella_engine.objects.local import LocalObjects


class CountingObjects:
    """Passes every call on and counts it. Not counted: ``close``."""

    def __init__(self, inner: Objects) -> None:
        self.inner = inner
        self.store_name = inner.store_name
        self._lock = Lock()
        self.reset()

    def reset(self) -> None:
        """Start again from nothing."""
        self.reads = 0
        """Calls of get, get_range, size and list, failed ones too."""
        self.read_nbytes = 0
        """Bytes of the objects that get and get_range returned, and of the names that list yielded."""
        self.writes = 0
        """Calls of put_if_absent and delete, failed ones too."""
        self.trace: list[tuple[str, str]] = []
        """Every call, in order: its name, and the object's name or the prefix."""

    def get(self, name: str) -> bytes:
        self._count("get", name, reads=1)
        return self._counted(self.inner.get(name))

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        self._count("get_range", name, reads=1)
        return self._counted(self.inner.get_range(name, start, stop))

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        for _ in ranges:
            self._count("get_range", name, reads=1)
        return [self._counted(data) for data in self.inner.get_ranges(name, ranges)]

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self._count("put_if_absent", name, writes=1)
        self.inner.put_if_absent(name, parts)

    def size(self, name: str) -> int:
        self._count("size", name, reads=1)
        return self.inner.size(name)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        self._count("list", prefix, reads=1)
        return self._counted_names(self.inner.list(prefix, after=after, limit=limit))

    def delete(self, name: str) -> None:
        self._count("delete", name, writes=1)
        self.inner.delete(name)

    def close(self) -> None:
        self.inner.close()

    def _count(self, call: str, name: str, *, reads: int = 0, writes: int = 0) -> None:
        with self._lock:
            self.reads += reads
            self.writes += writes
            self.trace.append((call, name))

    def _counted(self, data: bytes) -> bytes:
        with self._lock:
            self.read_nbytes += len(data)
        return data

    def _counted_names(self, infos: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        for info in infos:
            self._counted(info.name.encode())
            yield info


class SimulatedCrash(BaseException):
    """The process is gone. Not an Exception, so that no handler of errors can carry on after it."""


class Fault(Enum):
    """What happens at the chosen write."""

    CRASH_BEFORE = auto()
    """The process dies and the write never happened."""
    CRASH_AFTER = auto()
    """The write happened and the process dies before it hears so."""
    TORN = auto()
    """The process dies in the middle of a put: on disk, half of the bytes lie in a file that is no object."""
    TORN_VISIBLE = auto()
    """As no sound store would: half of the bytes lie under the object's name. For tests of readers."""
    ERROR_BEFORE = auto()
    """A transient StorageError, once; the write never happened."""
    APPLIED_BUT_ERROR = auto()
    """A transient StorageError, once, for a write that happened: its reply was lost."""


class FaultyObjects:
    """Passes every call on, but for the write with number ``fail_at``.

    Writes are calls of put_if_absent and delete, from 0; a delete cannot be torn and crashes before it instead. After a
    crash every call but ``close`` raises SimulatedCrash again.
    """

    def __init__(self, inner: Objects, fail_at: int, fault: Fault) -> None:
        self.inner = inner
        self.store_name = inner.store_name
        self.fail_at = fail_at
        self.fault = fault
        self.writes = 0
        """Writes seen so far, the failed one too."""
        self.crashed = False
        self._lock = Lock()

    def get(self, name: str) -> bytes:
        self._check_alive()
        return self.inner.get(name)

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        self._check_alive()
        return self.inner.get_range(name, start, stop)

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        self._check_alive()
        return self.inner.get_ranges(name, ranges)

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        if not self._is_next_to_fail():
            self.inner.put_if_absent(name, parts)
            return
        with suppress(LamellaError):  # whatever the store says, nobody hears it
            if self.fault in (Fault.CRASH_AFTER, Fault.APPLIED_BUT_ERROR):
                self.inner.put_if_absent(name, parts)
            elif self.fault is Fault.TORN_VISIBLE:
                self.inner.put_if_absent(name, [_half(parts)])
            elif self.fault is Fault.TORN and isinstance(self.inner, LocalObjects):
                temp = (self.inner.root / name).with_name(".tmp-torn")
                temp.parent.mkdir(parents=True, exist_ok=True)
                temp.write_bytes(_half(parts))
        self._fail()

    def size(self, name: str) -> int:
        self._check_alive()
        return self.inner.size(name)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        self._check_alive()
        return self.inner.list(prefix, after=after, limit=limit)

    def delete(self, name: str) -> None:
        if not self._is_next_to_fail():
            self.inner.delete(name)
            return
        with suppress(LamellaError):
            if self.fault in (Fault.CRASH_AFTER, Fault.APPLIED_BUT_ERROR):
                self.inner.delete(name)
        self._fail()

    def close(self) -> None:
        self.inner.close()

    def _check_alive(self) -> None:
        if self.crashed:
            raise SimulatedCrash

    def _is_next_to_fail(self) -> bool:
        """Count a write and say whether it is the one."""
        with self._lock:
            self._check_alive()
            self.writes += 1
            chosen = self.writes - 1 == self.fail_at
            # From here on other threads are as dead as this one.
            self.crashed = chosen and self.fault not in (Fault.ERROR_BEFORE, Fault.APPLIED_BUT_ERROR)
            return chosen

    def _fail(self) -> None:
        self._check_alive()
        raise StorageError("the store did not answer: try again", kind="simulated", transient=True)


def _half(parts: Sequence[Buffer]) -> bytes:
    data = b"".join(byte_views(parts))
    return data[: len(data) // 2]
