"""Whatever write a change of a repository dies at, what is found afterwards is the old state or the new one."""

from collections.abc import Callable
from contextlib import suppress
from itertools import count

import numpy as np
import pytest
import s3
from faults import CountingObjects, Fault, FaultyObjects, SimulatedCrash
from support import bits, copy_into, copy_of, names_of, new_repository, noise, open_again, store_of

from lamella_engine.content_store import packing, packs
from lamella_engine.content_store.entries import FOLD_EVERY
from lamella_engine.errors import (
    AlreadyExistsError,
    CorruptionError,
    LamellaError,
    OutcomeUnknownError,
    RepositoryNotFoundError,
    StorageError,
)
from lamella_engine.executor import ThreadExecutor
from lamella_engine.objects import open_objects
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.repository import Repository

SOUND = [fault for fault in Fault if fault is not Fault.TORN_VISIBLE]

OLD = {"w": noise(0, 40, 50), "frozen": noise(1, 2_000)}
NEW = {"w": OLD["w"] + np.float32(1e-3), "frozen": OLD["frozen"], "added": noise(2, 900)}


def push(repo: Repository) -> None:
    repo.push(NEW, "m@main", message="new", metrics={"loss": 1.0})


OPERATIONS: dict[str, Callable[[Repository], None]] = {
    "push": push,
    "push to a new branch": lambda repo: repo.push(NEW, "m@side", parent="m@v1", message="new"),
    "push without a pack": lambda repo: repo.push(OLD, "m@main", message="again"),
    "branch": lambda repo: repo.branch("m@main", "m@v1"),
    "tag": lambda repo: repo.tag("m@release", "m@v1"),
    "alias": lambda repo: repo.alias("m@production", "m@v2"),
    "delete": lambda repo: repo.delete_ref("m@production"),
}


def seen(repo: Repository) -> object:
    """Return everything that a user can see, but for ids and times."""
    return [
        (model, [(ref.name, ref.kind, ref.number) for ref in repo.refs(model)], [
            (version.number, version.message, version.metrics, version.parameters_id, len(version.parents))
            for version in (repo.version(f"{model}@v{number + 1}") for number in range(repo.stats().versions))
        ])
        for model in repo.models()
    ]  # fmt: skip


def some_history(*, entries: int) -> MemoryObjects:
    """Return a repository whose log ends with entry number ``entries``: two versions, the rest moves of an alias."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push(OLD, "m@main")
    repo.push(OLD | {"w": OLD["w"] * 2}, "m@main")
    for number in range(entries - 2):
        repo.alias("m@production", f"m@v{(entries - 3 - number) % 2 + 1}")
    assert store_of(repo).log.refresh().number == entries
    return objects


class ProbeApart:
    """Faulty objects whose probe never fails: its writes are many, and test_every_write_of_init_may_fail has them."""

    def __init__(self, faulty):
        self._faulty = faulty
        self.store_name = faulty.store_name

    def __getattr__(self, call):
        def passed_on(name, *args, **options):
            place = self._faulty.inner if name.startswith("probe/") else self._faulty
            return getattr(place, call)(name, *args, **options)

        return passed_on


def outcome(faulty: FaultyObjects, operation: Callable[[Repository], object], **options: object) -> str:
    """Run an operation in a process of its own, and say how it ended for whoever called it."""
    try:
        operation(open_again(ProbeApart(faulty), **options))
    except (SimulatedCrash, LamellaError) as error:
        if faulty.crashed:  # whoever is in another process only sees that nobody answers
            return "crashed"
        if not isinstance(error, StorageError):
            raise
        return "failed"
    return "done"


@pytest.mark.parametrize("fault", SOUND, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("entries", [3, FOLD_EVERY], ids=["plain", "with a fold"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_write_may_fail(name, entries, fault, monkeypatch):
    monkeypatch.setattr("lamella_engine.content_store.packing.PACK_NBYTES", 4_000)  # several packs for one push
    operation = OPERATIONS[name]
    base = some_history(entries=entries)
    old = seen(open_again(base))
    target = copy_of(base)
    operation(open_again(target))
    new = seen(open_again(target))
    assert new != old
    outcomes = set()
    for fail_at in count():
        objects = copy_of(base)
        faulty = FaultyObjects(objects, fail_at, fault)
        ended = outcome(faulty, operation)
        outcomes.add(ended)
        after = open_again(objects)
        assert seen(after) in {"done": [new], "failed": [old], "crashed": [old, new]}[ended], fail_at
        assert after.verify(deep=True).problems == [], fail_at
        if seen(after) == old:  # the way ahead is open
            operation(after)
            assert seen(open_again(objects)) == new
            assert after.verify(deep=True).problems == [], fail_at
        if faulty.writes <= fail_at:
            assert ended == "done"
            break
    assert ("crashed" in outcomes) == (fault not in (Fault.ERROR_BEFORE, Fault.APPLIED_BUT_ERROR))


@pytest.mark.parametrize("fault", SOUND, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_every_write_of_a_push_may_fail_where_others_can_see_it(place, fault, request, tmp_path, use):
    if place == "bucket":
        use(request.getfixturevalue("seaweedfs"))
    base = some_history(entries=FOLD_EVERY)
    old = seen(open_again(base))
    for fail_at in count():
        url = str(tmp_path / str(fail_at)) if place == "disk" else s3.new_url()
        objects = open_objects(url, create=True)
        copy_into(objects, base)
        faulty = FaultyObjects(objects, fail_at, fault)
        ended = outcome(faulty, push)
        after = open_again(open_objects(url))
        if ended != "done" and seen(after) == old:
            push(after)
        assert after.version("m@main").message == "new"
        assert after.stats().versions == 3
        assert bits(after.checkout("m@main")) == bits(NEW)
        assert after.verify(deep=True).problems == []
        if faulty.writes <= fail_at:
            break
    assert fail_at == 4  # a pack, the metadata, a fold, the entry


@pytest.mark.parametrize("fault", SOUND, ids=lambda fault: fault.name.lower())
def test_every_write_of_a_push_may_fail_among_threads(fault):
    base = some_history(entries=FOLD_EVERY)
    old = seen(open_again(base))
    for fail_at in count():
        objects = copy_of(base)
        faulty = FaultyObjects(objects, fail_at, fault)
        executor = ThreadExecutor(threads=2)
        ended = outcome(faulty, push, executor=executor)
        executor.close()
        after = open_again(objects)
        assert (
            (after.version("m@latest").number == 3) if ended == "done" else (ended == "crashed" or seen(after) == old)
        )
        assert after.verify(deep=True).problems == []
        if faulty.writes <= fail_at:
            break


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_store_that_shows_torn_objects_gives_no_wrong_bytes(name):
    """Such a store breaks its promises, so all that is asked for is the old state, the new one, or Corruption."""
    base = some_history(entries=FOLD_EVERY)
    old = seen(open_again(base))
    target = copy_of(base)
    OPERATIONS[name](open_again(target))
    new = seen(open_again(target))
    for fail_at in count():
        objects = copy_of(base)
        faulty = FaultyObjects(objects, fail_at, Fault.TORN_VISIBLE)
        ended = outcome(faulty, OPERATIONS[name])
        try:
            after = open_again(objects)
        except CorruptionError:
            assert f"log/{FOLD_EVERY + 1:020d}" in names_of(objects)
            continue
        assert seen(after) in (old, new)
        assert after.verify(deep=True).problems == []
        if faulty.writes <= fail_at:
            assert ended == "done"
            break


def commit_of(base: MemoryObjects, operation: Callable[[Repository], object]) -> int:
    """Return the number of the write that puts the log entry."""
    objects = CountingObjects(copy_of(base))
    operation(open_again(objects))
    writes = [name for call, name in objects.trace if call in ("put_if_absent", "delete")]
    (at,) = [number for number, name in enumerate(writes) if name.startswith("log/")]
    assert at == len(writes) - 1
    return at


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("entries", [3, FOLD_EVERY], ids=["plain", "with a fold"])
@pytest.mark.parametrize("fault", [Fault.APPLIED_BUT_ERROR, Fault.ERROR_BEFORE], ids=["applied", "not applied"])
def test_a_commit_whose_reply_is_lost_succeeds_once(name, entries, fault):
    base = some_history(entries=entries)
    operation = OPERATIONS[name]
    objects = copy_of(base)
    faulty = FaultyObjects(objects, commit_of(base, operation), fault)
    operation(open_again(faulty))
    log = [name for name in names_of(objects) if name.startswith("log/")]
    assert len(log) == entries + 2
    after = open_again(objects)
    expected = copy_of(base)
    operation(open_again(expected))
    assert seen(after) == seen(open_again(expected))
    assert after.verify(deep=True).problems == []


class Interrupted:
    """Objects that do something once, just before a chosen put of a log entry; passes every call on."""

    def __init__(self, inner, interruption, *, after=False):
        self._inner = inner
        self._interruption = interruption
        self._after = after

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put_if_absent(self, name, parts):
        interruption = self._interruption if name.startswith("log/") else None
        if interruption is not None:
            self._interruption = None
            if not self._after:
                interruption()
        self._inner.put_if_absent(name, parts)
        if interruption is not None and self._after:
            interruption()


def test_a_reply_lost_after_a_lost_race_succeeds_once():
    objects = some_history(entries=3)
    base = copy_of(objects)
    other = open_again(objects)
    faulty = FaultyObjects(objects, commit_of(base, push) + 1, Fault.APPLIED_BUT_ERROR)
    repo = open_again(Interrupted(faulty, lambda: other.tag("m@meanwhile", "m@v1")))
    version = repo.push(NEW, "m@main", message="new", metrics={"loss": 1.0})
    assert faulty.writes > faulty.fail_at
    assert version.number == 3
    assert [(ref.name, ref.number) for ref in other.refs("m")] == [("main", 3), ("meanwhile", 1), ("production", 1)]
    assert other.stats().versions == 3
    assert other.verify(deep=True).problems == []


def test_a_reply_lost_before_another_commit_is_no_conflict():
    """The entry landed, its reply was lost, and the branch has moved on before the pusher could look."""
    objects = some_history(entries=3)
    other = open_again(objects)
    faulty = FaultyObjects(objects, commit_of(objects, push), Fault.APPLIED_BUT_ERROR)

    class MovedOn(FaultyObjects):
        def put_if_absent(self, name, parts):
            try:
                faulty.put_if_absent(name, parts)
            except StorageError:
                other.push(OLD | {"w": noise(9, 40, 50)}, "m@main", message="the next")
                raise

    version = open_again(MovedOn(faulty, -1, Fault.CRASH_BEFORE)).push(NEW, "m@main", message="new")
    assert (version.number, version.message) == (3, "new")
    assert [version.message for version in other.log("m@main")] == ["the next", "new", "", ""]


class Mute:
    """Objects that answer nothing any more from the moment that ``silence`` is called."""

    def __init__(self, inner):
        self._inner = inner
        self.store_name = inner.store_name
        self._silent = False

    def silence(self):
        self._silent = True

    def __getattr__(self, name):
        def call(*args, **options):
            if self._silent:
                raise StorageError("the store did not answer: try again", kind="simulated", transient=True)
            return getattr(self._inner, name)(*args, **options)

        return call


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_commit_that_cannot_be_asked_about_is_of_unknown_outcome_never_failed(name):
    objects = some_history(entries=3)
    mute = Mute(objects)
    repo = open_again(Interrupted(mute, mute.silence))
    with pytest.raises(OutcomeUnknownError) as caught:
        OPERATIONS[name](repo)
    assert len(caught.value.context["push_id"]) == 32
    assert open_again(objects).verify(deep=True).problems == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_commit_that_went_through_is_never_called_failed_when_the_store_then_falls_silent(name):
    """The put of the entry succeeded: whatever happens to the reads that follow, "try again" would be a lie."""
    objects = some_history(entries=3)
    mute = Mute(objects)
    repo = open_again(Interrupted(mute, mute.silence, after=True))
    with suppress(OutcomeUnknownError):
        OPERATIONS[name](repo)
    assert store_of(open_again(objects)).log.refresh().number == 4


def test_a_push_that_went_through_does_not_fail_for_the_sake_of_a_derived_index(monkeypatch):
    """What the chunk index wants to know may have to be read again by then, and nobody may be there to answer."""
    monkeypatch.setattr(packing, "PACK_BLOBS", 1)  # many packs,
    monkeypatch.setattr(packs, "ROWS_KEPT", 0)  # of which the index of one is remembered
    objects = some_history(entries=3)
    mute = Mute(objects)
    repo = open_again(Interrupted(mute, mute.silence, after=True))
    version = repo.push(NEW, "m@main", message="new")
    assert open_again(objects).version("m@main").id == version.id
    assert open_again(objects).verify(deep=True).problems == []


def test_a_commit_that_the_disk_refuses_for_good_but_applied_is_no_failure():
    """An fsync of the directory may fail after the link: the entry is there, and others build on it."""
    objects = some_history(entries=3)
    faulty = FaultyObjects(objects, commit_of(objects, push), Fault.APPLIED_BUT_ERROR)

    class ForGood(FaultyObjects):
        def put_if_absent(self, name, parts):
            try:
                faulty.put_if_absent(name, parts)
            except StorageError as error:
                raise StorageError(error.message, kind="io_error", transient=False) from None

    with suppress(OutcomeUnknownError):
        push(open_again(ForGood(faulty, -1, Fault.CRASH_BEFORE)))
    assert open_again(objects).version("m@main").number == 3


class Delayed:
    """Objects whose first put of a log entry times out and lands only when ``land`` is called; then they refuse puts.

    ``refused`` begins the names of what is refused for good after the time-out.
    """

    def __init__(self, inner, refused):
        self._inner = inner
        self._refused = refused
        self._pending = None

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put_if_absent(self, name, parts):
        if name.startswith("log/") and self._pending is None:
            self._pending = name, [bytes(part) for part in parts]
            raise StorageError("timed out", kind="simulated", transient=True)
        if self._pending is not None and name.startswith(self._refused):
            raise StorageError("no room", kind="disk_full", transient=False)
        self._inner.put_if_absent(name, parts)

    def land(self):
        self._inner.put_if_absent(*self._pending)


@pytest.mark.parametrize("refused", ["log/", "fold/"])
def test_a_commit_that_may_still_land_is_of_unknown_outcome_whatever_fails_afterwards(refused):
    """A put that timed out may be under way: that a second one is refused says nothing about the first."""
    objects = some_history(entries=FOLD_EVERY)
    delayed = Delayed(objects, refused)
    with suppress(OutcomeUnknownError):
        push(open_again(delayed))
    with suppress(AlreadyExistsError):
        delayed.land()
    after = open_again(objects)
    assert after.version("m@main").message == "new"
    assert after.stats().versions == 3
    assert after.verify(deep=True).problems == []


class VisibleNotDurable:
    """Objects whose first log entry is there to be read, but is not durable before a put of its name says it exists."""

    def __init__(self, inner):
        self._inner = inner
        self.volatile = None

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put_if_absent(self, name, parts):
        try:
            self._inner.put_if_absent(name, parts)
        except AlreadyExistsError:
            self.volatile = None if name == self.volatile else self.volatile
            raise
        if name.startswith("log/") and self.volatile is None:
            self.volatile = name
            raise StorageError("too many open files", kind="too_many_files", transient=True)


def test_a_commit_is_called_done_only_when_its_entry_is_durable():
    """After an error an entry that can be read may still be lost to a power cut: Objects says to put it again."""
    objects = VisibleNotDurable(some_history(entries=3))
    push(open_again(objects))
    assert objects.volatile is None
    assert open_again(objects).stats().versions == 3


def test_a_commit_that_is_refused_for_good_is_known_to_have_failed():
    objects = some_history(entries=3)
    old = seen(open_again(objects))
    faulty = FaultyObjects(objects, commit_of(objects, push), Fault.ERROR_BEFORE)

    class ForGood(FaultyObjects):
        def put_if_absent(self, name, parts):
            try:
                faulty.put_if_absent(name, parts)
            except StorageError as error:
                raise StorageError(error.message, kind="disk_full", transient=False) from None

    with pytest.raises(StorageError) as caught:
        push(open_again(ForGood(faulty, -1, Fault.CRASH_BEFORE)))
    assert caught.value.kind == "disk_full"
    assert seen(open_again(objects)) == old


@pytest.mark.parametrize("fault", SOUND, ids=lambda fault: fault.name.lower())
def test_every_write_of_init_may_fail(fault):
    for fail_at in count():
        objects = MemoryObjects()
        faulty = FaultyObjects(objects, fail_at, fault)
        try:
            new_repository(faulty)
            ended = "done"
        except SimulatedCrash:
            ended = "crashed"
        except StorageError:
            ended = "failed"
        try:
            after = open_again(objects)
        except RepositoryNotFoundError:
            assert ended != "done"
            after = new_repository(objects)
        after.push(OLD, "m@main")
        assert bits(open_again(objects).checkout("m@main")) == bits(OLD)
        assert after.verify(deep=True).problems == []
        if faulty.writes <= fail_at:
            assert ended == "done"
            break
    assert fail_at > 0


def test_an_init_whose_reply_is_lost_is_no_failure():
    objects = CountingObjects(MemoryObjects())
    new_repository(objects)
    writes = [name for call, name in objects.trace if call in ("put_if_absent", "delete")]
    fresh = MemoryObjects()
    repo = new_repository(FaultyObjects(fresh, writes.index("log/00000000000000000000"), Fault.APPLIED_BUT_ERROR))
    repo.push(OLD, "m@main")
    assert open_again(fresh).version("m@main").number == 1


def test_a_gap_in_the_log_is_corruption_and_never_the_state_before_it():
    objects = some_history(entries=6)
    objects.delete("log/00000000000000000005")
    with pytest.raises(CorruptionError) as caught:
        open_again(objects)
    assert caught.value.kind == "log_gap"
