"""LocalObjects against crashes, full disks and other processes: the order of its system calls, and what they leave."""

import errno
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from lamella_engine.errors import (
    AlreadyExistsError,
    CorruptionError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
)
from lamella_engine.objects.local import LocalObjects

DATA = bytes(range(256)) * 16


class Disk:
    """Stands in for the calls of ``os`` that write: records them by path, and fails the one it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root
        self.calls: list[str] = []
        self.failures: dict[str, int] = {}
        """errno by call, such as ``"fsync temp"``; it fails once."""
        self._opened: dict[int, str] = {}
        real_open, real_close, real_fsync, real_writev = os.open, os.close, os.fsync, os.writev
        real_link, real_unlink, real_mkdir = os.link, os.unlink, os.mkdir

        def open_(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
            if flags & os.O_CREAT:
                assert flags & os.O_EXCL
                assert flags & os.O_NOFOLLOW
                self._record("open", self._label(path))
            fd = real_open(path, flags, mode, **more)
            self._opened[fd] = self._label(path)
            return fd

        def close(fd: int) -> None:
            name = self._opened.pop(fd, None)
            real_close(fd)
            if name == "temp":
                self._record("close", name)

        def fsync(fd: int) -> None:
            self._record("fsync", self._opened[fd])
            real_fsync(fd)

        def writev(fd: int, buffers: Sequence[Any]) -> int:
            self._record("write", self._opened[fd])
            return real_writev(fd, buffers)

        def link(source: Any, target: Any, **more: Any) -> None:
            self._record("link", self._label(target))
            real_link(source, target, **more)

        def unlink(path: Any, **more: Any) -> None:
            self._record("unlink", self._label(path))
            real_unlink(path, **more)

        def mkdir(path: Any, *more: Any, **named: Any) -> None:
            self._record("mkdir", self._label(path))
            real_mkdir(path, *more, **named)

        for stand_in in (open_, close, fsync, writev, link, unlink, mkdir):
            monkeypatch.setattr(os, stand_in.__name__.rstrip("_"), stand_in)

    @property
    def open_files(self) -> list[str]:
        return list(self._opened.values())

    def _label(self, path: Any) -> str:
        name = os.path.relpath(path, self.root)
        return "temp" if Path(name).name.startswith(".tmp-") else name

    def _record(self, call: str, name: str) -> None:
        line = f"{call} {name}"
        self.calls.append(line)
        if line in self.failures:
            code = self.failures.pop(line)
            raise OSError(code, os.strerror(code))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    return Disk(monkeypatch, tmp_path)


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects.create(tmp_path)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


PUT = ["open temp", "write temp", "fsync temp", "close temp", "link log/0", "unlink temp", "fsync log"]


# -- order -------------------------------------------------------------------------------------------------------------


def test_bytes_are_durable_before_their_name_and_the_name_before_the_return(objects: LocalObjects, disk: Disk) -> None:
    objects.put_if_absent("log/1", [b"makes the directory known"])
    disk.calls.clear()
    objects.put_if_absent("log/0", [DATA])
    assert disk.calls == PUT
    assert disk.open_files == []


def test_a_new_directory_is_durable_before_anything_in_it(objects: LocalObjects, disk: Disk) -> None:
    objects.put_if_absent("a/b/0", [DATA])
    assert disk.calls[:4] == ["mkdir a", "fsync .", "mkdir a/b", "fsync a"]
    assert disk.calls[4] == "open temp"


def test_a_directory_that_another_made_is_synced_once_before_it_is_used(tmp_path: Path, disk: Disk) -> None:
    (tmp_path / "log").mkdir()
    objects = LocalObjects(tmp_path)
    disk.calls.clear()
    objects.put_if_absent("log/0", [DATA])
    assert disk.calls == ["mkdir log", "fsync .", *PUT]


def test_the_loser_of_a_race_returns_only_when_the_winner_is_durable(objects: LocalObjects, disk: Disk) -> None:
    objects.put_if_absent("log/0", [DATA])
    disk.calls.clear()
    with pytest.raises(AlreadyExistsError):
        objects.put_if_absent("log/0", [b"late"])
    assert disk.calls == PUT
    assert files(objects.root) == ["log/0"]


def test_a_new_root_is_durable_with_every_parent_it_needed(tmp_path: Path, disk: Disk) -> None:
    LocalObjects.create(tmp_path / "team" / "weights")
    assert disk.calls == ["mkdir team", "fsync .", "mkdir team/weights", "fsync team"]
    disk.calls.clear()
    LocalObjects.create(tmp_path / "team" / "weights")
    assert disk.calls == []


def test_a_root_given_relatively_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objects = LocalObjects.create(Path("weights"))
    monkeypatch.chdir("/")
    objects.put_if_absent("log/0", [DATA])
    assert files(tmp_path) == ["weights/log/0"]


# -- failure at every step ---------------------------------------------------------------------------------------------


KINDS = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EROFS: "read_only",
    errno.EIO: "io_error",
}


@pytest.mark.parametrize("code", KINDS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", ["mkdir log", "fsync .", *PUT[:5]])
def test_a_failure_before_the_name_exists_leaves_nothing(
    objects: LocalObjects, disk: Disk, step: str, code: int
) -> None:
    disk.failures[step] = code
    with pytest.raises(StorageError) as caught:
        objects.put_if_absent("log/0", [DATA])
    assert not disk.failures
    assert caught.value.kind == KINDS[code]
    assert not caught.value.transient
    assert files(objects.root) == []
    assert disk.open_files == []
    assert disk.calls.count("fsync temp") <= 1
    reopened = LocalObjects(objects.root)
    reopened.put_if_absent("log/0", [DATA])
    assert reopened.get("log/0") == DATA


def test_a_failed_directory_sync_takes_nothing_back(objects: LocalObjects, disk: Disk) -> None:
    """Others may have seen the name, so only its durability is in doubt; putting again settles that."""
    disk.failures["fsync log"] = errno.EIO
    with pytest.raises(StorageError):
        objects.put_if_absent("log/0", [DATA])
    assert files(objects.root) == ["log/0"]
    disk.calls.clear()
    with pytest.raises(AlreadyExistsError):
        LocalObjects(objects.root).put_if_absent("log/0", [DATA])
    assert disk.calls[-1] == "fsync log"


def test_a_leftover_that_cannot_be_removed_does_not_undo_a_put(objects: LocalObjects, disk: Disk) -> None:
    disk.failures["unlink temp"] = errno.EIO
    objects.put_if_absent("log/0", [DATA])
    assert objects.get("log/0") == DATA
    assert [info.name for info in objects.list("log/")] == ["log/0"]


@pytest.mark.parametrize("step", ["fsync .", "fsync temp", "fsync log"])
def test_after_a_failed_fsync_an_instance_reads_but_never_writes(objects: LocalObjects, disk: Disk, step: str) -> None:
    LocalObjects(objects.root).put_if_absent("packs/a", [DATA])
    disk.failures[step] = errno.EIO
    with pytest.raises(StorageError):
        objects.put_if_absent("log/0", [DATA])
    disk.calls.clear()
    writes: list[Callable[[], object]] = [
        lambda: objects.put_if_absent("log/1", [DATA]),
        lambda: objects.delete("packs/a"),
    ]
    for write in writes:
        with pytest.raises(StorageError) as caught:
            write()
        assert caught.value.kind == "poisoned"
        assert not caught.value.transient
    assert disk.calls == []
    assert objects.get("packs/a") == DATA


def test_a_put_that_overlaps_a_failed_fsync_of_the_instance_is_not_called_durable(
    objects: LocalObjects, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a failure once, so the other thread may have had the report that was this put's."""
    recorded_fsync = os.fsync

    def fsync(fd: int) -> None:
        monkeypatch.setattr(os, "fsync", recorded_fsync)
        disk.failures["fsync temp"] = errno.EIO
        with pytest.raises(StorageError):
            objects.put_if_absent("log/1", [DATA])
        recorded_fsync(fd)

    objects.put_if_absent("log/2", [DATA])
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError) as caught:
        objects.put_if_absent("log/0", [DATA])
    assert caught.value.kind == "poisoned"


@pytest.mark.parametrize("step", ["write temp", "link log/0"])
def test_a_full_disk_that_was_emptied_takes_the_same_object(objects: LocalObjects, disk: Disk, step: str) -> None:
    disk.failures[step] = errno.ENOSPC
    with pytest.raises(StorageError):
        objects.put_if_absent("log/0", [DATA])
    objects.put_if_absent("log/0", [DATA])
    assert objects.get("log/0") == DATA


def test_an_interrupt_leaves_no_file(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int, buffers: Sequence[Any]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "writev", interrupt)
    with pytest.raises(KeyboardInterrupt):
        objects.put_if_absent("log/0", [DATA])
    assert files(objects.root) == []


def test_errors_that_others_can_mend_say_so(objects: LocalObjects, disk: Disk) -> None:
    disk.failures["open temp"] = errno.EMFILE
    with pytest.raises(StorageError) as full:
        objects.put_if_absent("log/0", [DATA])
    assert full.value.transient
    disk.failures["open temp"] = errno.EACCES
    with pytest.raises(PermissionDeniedError):
        objects.put_if_absent("log/0", [DATA])
    disk.failures["link log/0"] = errno.EPERM
    with pytest.raises(StorageError, match="hard links"):
        objects.put_if_absent("log/0", [DATA])


# -- partial reads and writes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_disk_that_takes_little_at_a_time_gets_every_byte(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real_writev = os.writev

    def writev(fd: int, buffers: Sequence[memoryview]) -> int:
        return real_writev(fd, [b"".join(buffers)[:most]])

    monkeypatch.setattr(os, "writev", writev)
    parts = [b"a", b"", b"bcde", bytes(range(250)), b"z"]
    objects.put_if_absent("log/0", parts)
    assert objects.get("log/0") == b"".join(parts)


def test_a_disk_that_takes_nothing_is_an_error(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    def writev(fd: int, buffers: Sequence[Any]) -> int:
        return 0

    monkeypatch.setattr(os, "writev", writev)
    with pytest.raises(StorageError):
        objects.put_if_absent("log/0", [DATA])
    assert files(objects.root) == []


def test_a_disk_that_gives_little_at_a_time_gives_every_byte(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put_if_absent("log/0", [DATA])
    real_pread = os.pread

    def pread(fd: int, count: int, offset: int) -> bytes:
        return real_pread(fd, min(count, 1000), offset)

    monkeypatch.setattr(os, "pread", pread)
    assert objects.get("log/0") == DATA
    assert objects.get_range("log/0", 5, 4000) == DATA[5:4000]


def test_a_file_cut_short_while_it_is_read_is_corruption(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put_if_absent("log/0", [DATA])
    real_pread = os.pread

    def pread(fd: int, count: int, offset: int) -> bytes:
        os.truncate(objects.root / "log/0", 10)
        return real_pread(fd, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(CorruptionError) as caught:
        objects.get("log/0")
    assert caught.value.kind == "short_object"


def test_a_disk_that_cannot_read_is_a_storage_error(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.put_if_absent("log/0", [DATA])

    def pread(fd: int, count: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(StorageError) as caught:
        objects.get("log/0")
    assert caught.value.kind == "io_error"
    assert not caught.value.transient


# -- what else lies in the directory -----------------------------------------------------------------------------------


def test_files_that_are_no_objects_are_not_listed(objects: LocalObjects) -> None:
    objects.put_if_absent("log/0", [DATA])
    log = objects.root / "log"
    for name in [".tmp-0123", ".DS_Store", "two words", "a..b"]:
        (log / name).write_bytes(DATA)
    (log / "directory").mkdir()
    (log / "link").symlink_to(log / "0")
    os.mkfifo(log / "pipe")
    assert [info.name for info in objects.list("log/")] == ["log/0"]


def test_links_pipes_and_sockets_are_never_followed_nor_waited_for(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put_if_absent("log/0", [DATA])
    log = objects.root / "log"
    (log / "link").symlink_to(log / "0")
    (log / "dangling").symlink_to(log / "absent")
    os.mkfifo(log / "pipe")
    monkeypatch.chdir(log)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ["link", "dangling", "pipe", "socket"]:
            with pytest.raises(CorruptionError) as caught:
                objects.get(f"log/{name}")
            assert caught.value.kind == "not_a_file"
            with pytest.raises(AlreadyExistsError):
                objects.put_if_absent(f"log/{name}", [DATA])
    assert not (log / "absent").exists()


def test_an_object_deleted_during_a_listing_is_left_out(objects: LocalObjects) -> None:
    for n in range(3):
        objects.put_if_absent(f"log/{n}", [DATA])
    listing = objects.list("log/", limit=2)
    objects.delete("log/1")
    assert [info.name for info in listing] == ["log/0", "log/2"]


def test_reads_hold_no_descriptor(objects: LocalObjects, disk: Disk) -> None:
    objects.put_if_absent("log/0", [DATA])
    objects.get("log/0")
    objects.size("log/0")
    with pytest.raises(CorruptionError):
        objects.get_range("log/0", 0, 1 << 40)
    with pytest.raises(NotFoundError):
        objects.get("log")
    assert disk.open_files == []


# -- two processes -----------------------------------------------------------------------------------------------------

ROUNDS = 25
_start: Barrier


def _share(start: Barrier) -> None:
    global _start  # how an initializer hands a worker what cannot be pickled later
    _start = start


def _race(root: Path, writer: int) -> list[bool]:
    objects = LocalObjects(root)
    won = []
    for turn in range(ROUNDS):
        _start.wait()
        try:
            objects.put_if_absent(f"log/{turn:02}", [bytes([writer]) * 1000])
            won.append(True)
        except AlreadyExistsError:
            won.append(False)
    return won


def test_of_two_processes_exactly_one_wins_each_name(objects: LocalObjects) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=_share, initargs=(spawn.Barrier(2),)) as workers:
        outcomes = list(workers.map(_race, [objects.root] * 2, range(2)))
    for turn in range(ROUNDS):
        winners = [writer for writer in range(2) if outcomes[writer][turn]]
        assert len(winners) == 1
        assert objects.get(f"log/{turn:02}") == bytes(winners) * 1000
    assert files(objects.root) == [f"log/{turn:02}" for turn in range(ROUNDS)]
