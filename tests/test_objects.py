"""What every implementation of Objects promises, the probe that tries it, and the doubles that tests put in front."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from threading import Barrier, Thread, local

import numpy as np
import pytest
import s3
from faults import CountingObjects, Fault, FaultyObjects, SimulatedCrash
from hypothesis import given
from hypothesis import strategies as st

from lamella_engine.errors import (
    AlreadyExistsError,
    CorruptionError,
    InvalidInputError,
    LamellaError,
    NotFoundError,
    RepositoryNotFoundError,
    StorageError,
)
from lamella_engine.model import Buffer
from lamella_engine.objects import ObjectInfo, Objects, check_object_name, open_objects
from lamella_engine.objects.local import LocalObjects
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.objects.probe import probe

DATA = bytes(range(256)) * 3


@pytest.fixture(params=["memory", "local", "counting", "faulty", "seaweedfs", "moto"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, use: Callable[[s3.Server], None]) -> Iterator[Objects]:
    def in_a_bucket() -> Objects:
        use(request.getfixturevalue(request.param))
        return open_objects(s3.new_url())

    made: dict[str, Callable[[], Objects]] = {
        "memory": MemoryObjects,
        "local": lambda: LocalObjects.create(tmp_path / "objects"),
        "counting": lambda: CountingObjects(MemoryObjects()),
        "faulty": lambda: FaultyObjects(MemoryObjects(), -1, Fault.CRASH_BEFORE),
        "seaweedfs": in_a_bucket,
        "moto": in_a_bucket,
    }
    opened = made[request.param]()
    yield opened
    opened.close()


def names(objects: Objects, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
    return [info.name for info in objects.list(prefix, after=after, limit=limit)]


# -- every implementation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b""],
        [b"a", b"", b"bc"],
        [bytearray(b"xy"), memoryview(b"z0"), np.arange(256, dtype=np.uint8), np.empty(0, np.uint8)],
        [memoryview(bytes(56)).cast("Q"), b"x"],
        [bytes([i % 251]) for i in range(2500)],  # more than one call to the kernel takes
    ],
    ids=["nothing", "empty", "bytes", "every-buffer", "wide-items", "many"],
)
def test_an_object_is_its_parts_one_after_another(objects: Objects, parts: list[Buffer]) -> None:
    expected = b"".join(bytes(part) for part in parts)
    objects.put_if_absent("packs/a", parts)
    assert objects.get("packs/a") == expected
    assert objects.size("packs/a") == len(expected)


def test_a_stored_object_is_independent_of_the_buffers_it_came_from(objects: Objects) -> None:
    buffer = bytearray(DATA)
    objects.put_if_absent("packs/a", [buffer])
    buffer[:] = bytes(len(buffer))
    assert objects.get("packs/a") == DATA


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (5, 300), (767, 768), (768, 768), (0, 768)])
def test_a_range_is_exactly_the_bytes_asked_for(objects: Objects, start: int, stop: int) -> None:
    objects.put_if_absent("packs/a", [DATA])
    assert objects.get_range("packs/a", start, stop) == DATA[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(0, 769), (768, 769), (900, 900), (0, 1 << 62)])
def test_a_range_beyond_the_end_is_corruption(objects: Objects, start: int, stop: int) -> None:
    objects.put_if_absent("packs/a", [DATA])
    with pytest.raises(CorruptionError) as caught:
        objects.get_range("packs/a", start, stop)
    assert caught.value.kind == "short_object"


def test_ranges_that_are_read_together_are_those_that_are_read_alone(objects: Objects) -> None:
    objects.put_if_absent("packs/a", [DATA])
    ranges = [(700, 768), (0, 9), (5, 20), (5, 20), (300, 300), (20, 21), (0, 768)]
    for some in (ranges, ranges[:4], ranges[:1], []):
        assert list(objects.get_ranges("packs/a", some)) == [DATA[start:stop] for start, stop in some]


@pytest.mark.parametrize("beyond", [(767, 769), (768, 769), (900, 1000)])
def test_ranges_of_which_one_is_beyond_the_end_are_corruption(objects: Objects, beyond: tuple[int, int]) -> None:
    objects.put_if_absent("packs/a", [DATA])
    with pytest.raises(CorruptionError) as caught:
        objects.get_ranges("packs/a", [(0, 5), beyond])
    assert caught.value.kind == "short_object"
    with pytest.raises(NotFoundError) as missing:
        objects.get_ranges("packs/b", [(0, 5), (7, 9)])
    assert missing.value.kind == "object_not_found"


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (-3, -1)])
def test_what_is_no_range_is_refused(objects: Objects, start: int, stop: int) -> None:
    objects.put_if_absent("packs/a", [DATA])
    with pytest.raises(InvalidInputError) as caught:
        objects.get_range("packs/a", start, stop)
    assert caught.value.kind == "bad_range"


def test_a_taken_name_keeps_its_first_bytes(objects: Objects) -> None:
    objects.put_if_absent("log/0", [b"first"])
    for data in (b"second", b"first"):
        with pytest.raises(AlreadyExistsError) as caught:
            objects.put_if_absent("log/0", [data])
        assert caught.value.kind == "object_exists"
    assert objects.get("log/0") == b"first"


@pytest.mark.parametrize("absent", ["log/0", "packs", "packs/a/b", "new/deep/er"])
def test_reading_what_is_absent_is_not_found(objects: Objects, absent: str) -> None:
    objects.put_if_absent("packs/a", [DATA])
    reads: list[Callable[[], object]] = [
        lambda: objects.get(absent),
        lambda: objects.get_range(absent, 0, 0),
        lambda: objects.size(absent),
    ]
    for read in reads:
        with pytest.raises(NotFoundError) as caught:
            read()
        assert caught.value.kind == "object_not_found"
        assert caught.value.context["name"] == absent


def test_a_deleted_object_is_gone_and_deleting_it_again_is_fine(objects: Objects) -> None:
    objects.put_if_absent("packs/a", [DATA])
    objects.delete("packs/a")
    objects.delete("packs/a")
    objects.delete("packs")
    objects.delete("packs/a/b")
    assert names(objects, "packs/") == []
    with pytest.raises(NotFoundError):
        objects.get("packs/a")
    objects.put_if_absent("packs/a", [b"again"])
    assert objects.get("packs/a") == b"again"


def test_a_listing_is_one_directory_in_ascending_order(objects: Objects) -> None:
    for name in ["log/10", "log/02", "log/1", "logs/0", "lo", "log/deep/1", "log/A_-.z"]:
        objects.put_if_absent(name, [name.encode()])
    assert names(objects, "log/") == ["log/02", "log/1", "log/10", "log/A_-.z"]
    assert list(objects.list("log/deep/")) == [ObjectInfo("log/deep/1", 10)]
    assert names(objects, "") == ["lo"]
    assert names(objects, "none/") == []
    assert names(objects, "lo/") == []


def test_a_listing_starts_and_stops_where_it_is_told(objects: Objects) -> None:
    every = [f"log/{n:04}" for n in range(0, 40, 2)]
    for name in reversed(every):
        objects.put_if_absent(name, [b""])
    assert names(objects, "log/003") == every[15:]
    assert names(objects, "log/", after="log/0020") == every[11:]
    assert names(objects, "log/", after="log/0021") == every[11:]
    assert names(objects, "log/", after="log/0021", limit=1) == ["log/0022"]
    assert names(objects, "log/", limit=0) == []
    assert names(objects, "log/", limit=99) == every
    assert names(objects, "log/", after="log/9") == []


def test_a_listing_sees_what_was_written_a_moment_ago(objects: Objects) -> None:
    for n in range(20):
        objects.put_if_absent(f"log/{n:02}", [b""])
        assert names(objects, "log/", after=f"log/{n - 1:02}" if n else "") == [f"log/{n:02}"]


BAD_NAMES = [
    "",
    "/",
    "/etc/passwd",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "../a",
    "a/..b",
    "a..b",
    ".tmp-0",
    "a/.tmp-0",
    "a b",
    "a\n",
    "a\0b",
    "a\\b",
    "a:b",
    "ä",
    "a" * 256,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_leave_or_break_the_store_is_refused_by_every_call(objects: Objects, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: objects.get(name),
        lambda: objects.get_range(name, 0, 0),
        lambda: objects.put_if_absent(name, [DATA]),
        lambda: objects.size(name),
        lambda: objects.delete(name),
    ]
    if name not in ("", "a/"):  # prefixes both
        calls.append(lambda: objects.list(name))
    for call in calls:
        with pytest.raises(InvalidInputError) as caught:
            call()
        assert caught.value.kind == "bad_object_name"


def test_one_of_many_threads_wins_a_name_and_its_bytes_stay(objects: Objects) -> None:
    start, turns = Barrier(8), 3  # of up to three seconds each in SeaweedFS, where losers wait for whole ones

    def race(writer: int) -> list[bool]:
        won = []
        for turn in range(turns):
            start.wait()
            try:
                objects.put_if_absent(f"race/{turn}", [bytes([writer]) * 1000])
                won.append(True)
            except AlreadyExistsError:
                won.append(False)
        return won

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(race, range(8)))
    for turn in range(turns):
        winners = [writer for writer in range(8) if outcomes[writer][turn]]
        assert len(winners) == 1
        assert objects.get(f"race/{turn}") == bytes(winners) * 1000


def test_a_sound_store_passes_the_probe_and_is_left_as_it_was(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamella_engine.objects.probe._sound", set())
    objects.put_if_absent("log/0", [DATA])
    probe(objects)
    probe(objects)
    assert names(objects, "probe/") == []
    assert objects.get("log/0") == DATA


# -- names and urls ----------------------------------------------------------------------------------------------------


@given(name=st.one_of(st.text(), st.text(alphabet="a.0/-_", min_size=1)))
def test_no_accepted_name_leaves_the_root_or_is_a_half_written_file(name: str) -> None:
    try:
        check_object_name(name)
    except InvalidInputError:
        return
    path = PurePosixPath(os.path.normpath(f"/place/{name}"))
    assert str(path) == f"/place/{name}"
    assert not any(part.startswith(".") for part in path.parts)


def test_a_directory_can_be_named_by_path_or_url(tmp_path: Path) -> None:
    root = tmp_path / "my weights"
    open_objects(str(root), create=True).put_if_absent("log/0", [DATA])
    for url in (str(root), root.as_uri(), f"file://localhost{root.as_uri().removeprefix('file://')}"):
        assert open_objects(url).get("log/0") == DATA


def test_memory_of_one_name_is_one_store(tmp_path: Path) -> None:
    name = f"memory://{tmp_path.name}"
    open_objects(name).put_if_absent("log/0", [DATA])
    assert open_objects(name).get("log/0") == DATA
    assert names(open_objects(f"{name}-other"), "log/") == []


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("S3://bucket", "unsupported_url"),
        ("s3://", "bad_url"),
        ("s3:///prefix", "bad_url"),
        ("s3://user@bucket/prefix", "bad_url"),
        ("s3://bucket:80/prefix", "bad_url"),
        ("s3://bucket/a//b", "bad_url"),
        ("s3://bucket/../other", "bad_url"),
        ("s3://bucket/.hidden", "bad_url"),
        ("s3://bucket/prefix?versionId=1", "bad_url"),
        ("gs://bucket/a b", "bad_url"),
        ("az://", "bad_url"),
        ("https://host/x", "unsupported_url"),
        ("://x", "unsupported_url"),
        ("", "bad_url"),
        ("memory://", "bad_url"),
        ("file://", "bad_url"),
        ("file://host/x", "bad_url"),
        ("file:///x?y", "bad_url"),
        ("file:///x%00", "bad_url"),
        ("a\0b", "bad_url"),
    ],
)
def test_a_url_that_names_no_place_is_refused(url: str, kind: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        open_objects(url, create=True)
    assert caught.value.kind == kind


def test_opening_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        open_objects(str(tmp_path / "absent"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
@pytest.mark.parametrize("create", [False, True])
def test_a_file_is_no_place_for_objects(tmp_path: Path, below: str, create: bool) -> None:
    (tmp_path / "file").write_bytes(DATA)
    with pytest.raises(InvalidInputError) as caught:
        open_objects(str(tmp_path / "file" / below), create=create)
    assert caught.value.kind == "not_a_directory"


# -- the probe refuses -------------------------------------------------------------------------------------------------


class Replacing(MemoryObjects):
    """Accepts the condition and ignores it."""

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self.delete(name)
        super().put_if_absent(name, parts)


class ReplacingQuietly(MemoryObjects):
    """Refuses the second writer, but keeps the second writer's bytes."""

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        try:
            super().put_if_absent(name, parts)
        except AlreadyExistsError:
            self.delete(name)
            super().put_if_absent(name, parts)
            raise


class CheckingPerConnection(MemoryObjects):
    """Judges the condition by what the same thread wrote, as a caching proxy might."""

    def __init__(self) -> None:
        super().__init__()
        self._mine = local()

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        mine = self._mine.__dict__.setdefault("names", set())
        if name not in mine:
            self.delete(name)
        super().put_if_absent(name, parts)
        mine.add(name)


class Refusing(MemoryObjects):
    """Takes every name for taken."""

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        super().put_if_absent(name, parts)
        raise AlreadyExistsError("taken")


class Forgetting(MemoryObjects):
    """Says that it wrote."""

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        pass


class ListingLate(MemoryObjects):
    """Lists all but the newest."""

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        return iter(list(super().list(prefix, after=after, limit=limit))[:-1])


class ListingWrongSizes(MemoryObjects):
    """Lists every object as empty."""

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        return (ObjectInfo(info.name, 0) for info in super().list(prefix, after=after, limit=limit))


class IgnoringRanges(MemoryObjects):
    """Answers a range with the whole."""

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        return self.get(name)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (Replacing, "create_once"),
        (ReplacingQuietly, "create_once"),
        (Refusing, "create_once"),
        (CheckingPerConnection, "one_winner"),
        (Forgetting, "read_after_write"),
        (ListingLate, "list_after_write"),
        (ListingWrongSizes, "list_after_write"),
        (IgnoringRanges, "range_read"),
    ],
)
def test_the_probe_names_the_promise_that_a_store_breaks(broken: type[MemoryObjects], promise: str) -> None:
    objects = broken()
    with pytest.raises(StorageError) as caught:
        probe(objects)
    assert caught.value.kind == "unsafe_store"
    assert caught.value.context["promise"] == promise
    assert not caught.value.transient
    assert list(MemoryObjects.list(objects, "probe/")) == []


def test_an_object_too_long_to_be_got_whole_has_a_size(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamella_engine.objects.MAX_GET_NBYTES", 3)
    objects.put_if_absent("packs/a", [b"12345"])
    assert objects.size("packs/a") == 5
    assert objects.get_range("packs/a", 1, 5) == b"2345"
    with pytest.raises(CorruptionError):
        objects.get("packs/a")


def test_a_probe_that_cannot_start_all_its_threads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Thread] = []

    def start(thread: Thread) -> None:
        if len(started) == 2:
            raise KeyboardInterrupt
        real(thread)
        started.append(thread)

    real = Thread.start
    monkeypatch.setattr(Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        probe(MemoryObjects())
    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)


def test_the_probe_passes_on_the_failure_of_a_store_it_cannot_judge() -> None:
    with pytest.raises(StorageError) as caught:
        probe(FaultyObjects(MemoryObjects(), 0, Fault.ERROR_BEFORE))
    assert caught.value.kind == "simulated"


# -- the doubles -------------------------------------------------------------------------------------------------------


def test_counting_counts_calls_and_bytes() -> None:
    objects = CountingObjects(MemoryObjects())
    objects.put_if_absent("a/b", [DATA])
    objects.get("a/b")
    objects.get_range("a/b", 3, 10)
    objects.size("a/b")
    assert names(objects, "a/") == ["a/b"]
    objects.delete("a/b")
    with pytest.raises(NotFoundError):
        objects.get("a/b")
    assert (objects.reads, objects.read_nbytes, objects.writes) == (5, len(DATA) + 7 + len("a/b"), 2)
    assert objects.trace == [
        ("put_if_absent", "a/b"),
        ("get", "a/b"),
        ("get_range", "a/b"),
        ("size", "a/b"),
        ("list", "a/"),
        ("delete", "a/b"),
        ("get", "a/b"),
    ]
    objects.reset()
    assert (objects.reads, objects.read_nbytes, objects.writes, objects.trace) == (0, 0, 0, [])


def writes_before_the_fault(objects: Objects) -> int:
    """Put, delete, put; return how many of them were heard to succeed."""
    writes: list[Callable[[], object]] = [
        lambda: objects.put_if_absent("a/0", [DATA]),
        lambda: objects.delete("a/0"),
        lambda: objects.put_if_absent("a/2", [DATA]),
    ]
    for done, write in enumerate(writes):
        try:
            write()
        except (SimulatedCrash, StorageError):
            return done
    return len(writes)


@pytest.mark.parametrize("fail_at", range(3))
@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("place", ["memory", "local"])
def test_a_fault_comes_at_its_write_and_does_what_it_says(
    tmp_path: Path, fail_at: int, fault: Fault, place: str
) -> None:
    inner: Objects = MemoryObjects() if place == "memory" else LocalObjects.create(tmp_path)
    faulty = FaultyObjects(inner, fail_at, fault)
    assert writes_before_the_fault(faulty) == fail_at
    assert faulty.writes == fail_at + 1
    applied = fail_at + (fault in (Fault.CRASH_AFTER, Fault.APPLIED_BUT_ERROR))
    torn = fault is Fault.TORN_VISIBLE and fail_at != 1
    stored = {info.name: inner.get(info.name) for info in inner.list("a/")}
    expected = [{}, {"a/0": DATA}, {}, {"a/2": DATA}][applied]
    if torn:
        expected = {f"a/{fail_at}": DATA[: len(DATA) // 2]}
    assert stored == expected
    leftovers = [path.read_bytes() for path in tmp_path.rglob(".tmp-*")]
    half_written = fault is Fault.TORN and place == "local" and fail_at != 1
    assert leftovers == ([DATA[: len(DATA) // 2]] if half_written else [])


@pytest.mark.parametrize("fault", [Fault.CRASH_BEFORE, Fault.CRASH_AFTER, Fault.TORN, Fault.TORN_VISIBLE])
def test_nothing_works_after_a_crash(fault: Fault) -> None:
    objects = FaultyObjects(MemoryObjects(), 0, fault)
    with pytest.raises(SimulatedCrash):
        objects.put_if_absent("a/0", [DATA])
    calls: list[Callable[[], object]] = [
        lambda: objects.get("a/0"),
        lambda: objects.get_range("a/0", 0, 1),
        lambda: objects.put_if_absent("a/1", [DATA]),
        lambda: objects.size("a/0"),
        lambda: objects.list("a/"),
        lambda: objects.delete("a/0"),
    ]
    for call in calls:
        with pytest.raises(SimulatedCrash):
            call()
    assert objects.writes == 1


def test_an_error_comes_once_and_the_same_write_then_succeeds() -> None:
    objects = FaultyObjects(MemoryObjects(), 0, Fault.ERROR_BEFORE)
    with pytest.raises(StorageError) as caught:
        objects.put_if_absent("a/0", [DATA])
    assert caught.value.transient
    objects.put_if_absent("a/0", [DATA])
    assert objects.get("a/0") == DATA


def test_a_lost_reply_leaves_the_name_taken() -> None:
    objects = FaultyObjects(MemoryObjects(), 0, Fault.APPLIED_BUT_ERROR)
    with pytest.raises(StorageError):
        objects.put_if_absent("a/0", [DATA])
    with pytest.raises(LamellaError) as caught:
        objects.put_if_absent("a/0", [DATA])
    assert caught.value.kind == "object_exists"
    assert objects.get("a/0") == DATA
