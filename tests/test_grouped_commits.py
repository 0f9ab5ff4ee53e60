"""Commits that wait for one another are recorded by one entry, and each ends as it would have alone."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count

import pytest
from faults import CountingObjects, Fault, FaultyObjects, SimulatedCrash
from support import PATIENCE_S, Arrivals, bits, copy_of, names_of, new_repository, noise, open_again, store_of

from lamella_engine.checkpoints import open_checkpoint
from lamella_engine.content_store import committing
from lamella_engine.content_store.acting import acting_as, new_push_id
from lamella_engine.content_store.entries import FOLD_EVERY
from lamella_engine.content_store.seam import RefUpdate
from lamella_engine.content_store.together import Waiting
from lamella_engine.errors import (
    AlreadyExistsError,
    ConflictError,
    LamellaError,
    OutcomeUnknownError,
    StorageError,
    VersionNotFoundError,
)
from lamella_engine.notes import Notes
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.pushing import push_checkpoint

SOUND = [fault for fault in Fault if fault is not Fault.TORN_VISIBLE]


class Gathering:
    """Objects whose first put of a log entry waits until ``calls`` commits have come, its own too."""

    def __init__(self, inner, calls, monkeypatch):
        self.inner = inner
        self._calls = calls
        self.arrivals = Arrivals(monkeypatch)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def put_if_absent(self, name, parts):
        if name.startswith("log/"):
            self.arrivals.until(self._calls)
        self.inner.put_if_absent(name, parts)


def outcome(task):
    try:
        return task()
    except (LamellaError, SimulatedCrash) as error:
        return error


def at_once(tasks):
    """Run tasks in threads; return what each returned or raised. Nobody may wait for ever."""
    with ThreadPoolExecutor(len(tasks)) as threads:
        return [future.result(PATIENCE_S) for future in [threads.submit(outcome, task) for task in tasks]]


def entries_of(objects):
    return sum(name.startswith("log/") for name in names_of(objects)) - 1


def some_history(*, entries=3):
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": noise(0, 100)}, "m@main")
    for number in range(entries - 1):
        repo.alias(f"m@alias{number}", "m@v1")
    assert entries_of(objects) == entries
    return objects


def gathered(objects, tasks, monkeypatch):
    """Run tasks on one repository: the first leads, and the others come while its entry is put."""
    gathering = Gathering(objects, len(tasks), monkeypatch)
    repo = open_again(gathering)
    with ThreadPoolExecutor(len(tasks)) as threads:
        running = []
        for task in tasks:
            running.append(threads.submit(outcome, partial(task, repo)))
            gathering.arrivals.until(1)
        return [future.result(PATIENCE_S) for future in running]


def push_to(branch, seed):
    return lambda repo: repo.push({"w": noise(seed, 100)}, f"m@{branch}", parent="m@v1", message=str(seed))


@pytest.mark.parametrize("writers", [2, 8, 16])
def test_pushes_to_many_branches_share_an_entry(writers, monkeypatch):
    objects = some_history()
    results = gathered(objects, [push_to(f"b{seed}", seed) for seed in range(writers)], monkeypatch)
    assert sorted(version.number for version in results) == list(range(2, writers + 2))
    assert entries_of(objects) == 3 + 2  # one that led, and all others
    fresh = open_again(objects)
    for seed, version in enumerate(results):
        assert fresh.version(f"m@b{seed}").id == version.id
        assert bits(fresh.checkout(f"m@b{seed}")) == bits({"w": noise(seed, 100)})
    assert fresh.verify(deep=True).problems == []


def test_pushes_without_pause_need_far_fewer_entries_than_versions(monkeypatch):
    objects = some_history()
    writers, pushes = 8, 6
    repo = open_again(Gathering(objects, writers, monkeypatch))

    def line(branch):
        for number in range(pushes):
            repo.push({"w": noise(100 * branch + number, 100)}, f"m@b{branch}", message=str(number))

    assert at_once([lambda branch=branch: line(branch) for branch in range(writers)]) == [None] * writers
    assert entries_of(objects) - 3 < writers * pushes
    fresh = open_again(objects)
    for branch in range(writers):
        assert [int(version.message) for version in fresh.log(f"m@b{branch}")] == list(reversed(range(pushes)))
    assert fresh.stats().versions == 1 + writers * pushes
    assert fresh.verify(deep=True).problems == []


def test_of_pushes_to_one_branch_one_wins_and_the_others_are_told_by_what(monkeypatch):
    objects = some_history()
    tasks = [lambda repo, seed=seed: repo.push({"w": noise(seed, 100)}, "m@main") for seed in range(1, 9)]
    results = gathered(objects, tasks, monkeypatch)
    (winner,) = (result for result in results if not isinstance(result, LamellaError))
    conflicts = [result for result in results if isinstance(result, ConflictError)]
    assert len(conflicts) == 7
    assert {conflict.context["actual"] for conflict in conflicts} == {winner.id}
    assert entries_of(objects) == 3 + 1
    assert open_again(objects).version("m@main").id == winner.id


def test_commits_that_move_one_ref_go_to_entries_of_their_own_in_the_order_of_arrival(monkeypatch):
    objects = some_history()
    repo = open_again(objects)
    for seed in range(1, 5):
        repo.push({"w": noise(seed, 100)}, "m@main")
    before = entries_of(objects)

    def moves(repo):
        return [lambda number=number: repo.alias("m@production", f"m@v{number}") for number in (2, 3, 4, 5)]

    results = gathered(objects, [lambda repo, at=at: moves(repo)[at]() for at in range(4)], monkeypatch)
    assert results == [None] * 4
    assert entries_of(objects) == before + 4
    history = [entry for _, entry, _ in store_of(open_again(objects)).log.history()][before:]
    olds, news = zip(*((entry.refs[0].old, entry.refs[0].new) for entry in history), strict=True)
    assert sorted(news) == [2, 3, 4, 5]
    assert olds == (None, *news[:-1])


def test_of_tags_of_one_name_one_is_made(monkeypatch):
    objects = some_history()
    open_again(objects).push({"w": noise(1, 100)}, "m@main")
    results = gathered(objects, [lambda repo, n=n: repo.tag("m@t", f"m@v{n}") for n in (1, 2, 1, 2)], monkeypatch)
    at = open_again(objects).version("m@t").number
    assert [isinstance(result, AlreadyExistsError) for result in results] == [n != at for n in (1, 2, 1, 2)]


def test_a_commit_that_fails_fails_alone(monkeypatch):
    objects = some_history()
    missing = RefUpdate("m", "nowhere", "alias", 77)
    tasks = [push_to(f"b{seed}", seed) for seed in range(4)]
    tasks.insert(2, lambda repo: store_of(repo).update_refs([missing]))
    results = gathered(objects, tasks, monkeypatch)
    assert isinstance(results[2], VersionNotFoundError)
    assert sorted(result.number for result in results[:2] + results[3:]) == [2, 3, 4, 5]
    assert open_again(objects).verify(deep=True).problems == []


def test_a_bug_in_a_commit_is_raised_by_that_commit(monkeypatch):
    objects = some_history()

    def buggy(repo):
        def make(state):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            store_of(repo).log.commit(new_push_id(), make)
        return "raised"

    results = gathered(objects, [push_to("a", 1), buggy, push_to("b", 2), buggy], monkeypatch)
    assert [result for result in results if result == "raised"] == ["raised"] * 2
    assert open_again(objects).stats().versions == 3


class Begun:
    """A push of which everything is written but its commit."""

    def __init__(self, push):
        self._push = push

    def __getattr__(self, name):
        return getattr(self._push, name)

    def commit(self, description):
        self.description = description

    def commit_now(self):
        return self._push.commit(self.description)


def begun(store, branch, seed, **ids):
    push = Begun(store.begin("m", branch, parent=None, push_id=ids.pop("push_id", None) or new_push_id(), **ids))
    with open_checkpoint({"w": noise(seed, 100)}) as checkpoint:
        push_checkpoint(push, checkpoint, store.executor, Notes())
    push._writer.finish()
    return push


def test_one_push_that_is_under_way_twice_is_recorded_once(monkeypatch):
    """As after a client has lost its connection: two sessions of one push, each with what it wrote itself."""
    objects = some_history()
    repo = open_again(Gathering(objects, 4, monkeypatch))
    id = new_push_id()
    sessions = [begun(store_of(repo), "side", 5, push_id=id, writer_id=new_push_id()) for _ in range(3)]
    for session in sessions:
        session.description = sessions[0].description
    results = at_once([*(session.commit_now for session in sessions), lambda: push_to("other", 6)(repo)])
    assert len({result.id for result in results[:3]}) == 1
    fresh = open_again(objects)
    assert fresh.stats().versions == 3
    assert bits(fresh.checkout("m@side")) == bits({"w": noise(5, 100)})
    assert fresh.verify(deep=True).problems == []


def test_entries_say_of_each_commit_who_asked_for_it(monkeypatch):
    objects = some_history()
    names = ["ada", "bob", "cyd", "ada"]

    def task(repo, name, seed):
        with acting_as(name):
            return push_to(f"b{seed}", seed)(repo)

    results = gathered(objects, [lambda repo, n=n, s=s: task(repo, n, s) for s, n in enumerate(names)], monkeypatch)
    log = store_of(open_again(objects)).log
    found = {}
    for _, entry, _ in log.history():
        assert len(entry.by) in (0, len(entry.pushes))
        assert len(entry.movers) == (len(entry.refs) if entry.by else 0)
        assert not entry.by or set(entry.by) != {entry.principal}
        found |= zip(entry.pushes, entry.by or (entry.principal,) * len(entry.pushes), strict=True)
    asked = {name: log.state.version("m", result.number).metadata for name, result in zip(names, results, strict=True)}
    for name, metadata in asked.items():
        assert found[metadata.split("-")[1]] == name


def test_commits_of_one_caller_name_it_once(monkeypatch):
    objects = some_history()
    gathered(objects, [push_to(f"b{seed}", seed) for seed in range(3)], monkeypatch)
    assert [entry.by for _, entry, _ in store_of(open_again(objects)).log.history()] == [()] * 5


def test_what_does_not_fit_in_one_entry_goes_to_the_next(monkeypatch):
    objects = some_history()
    monkeypatch.setattr(committing, "TOGETHER_NBYTES", 2_000)  # two pushes
    results = gathered(objects, [push_to(f"b{seed}", seed) for seed in range(9)], monkeypatch)
    assert sorted(version.number for version in results) == list(range(2, 11))
    assert entries_of(objects) == 3 + 1 + 4


def test_a_commit_alone_asks_the_store_for_no_more_than_it_must():
    objects = some_history()
    counting = CountingObjects(objects)
    repo = open_again(counting)
    repo.push({"w": noise(1, 100)}, "m@main")
    counting.reset()
    repo.push({"w": noise(2, 100)}, "m@main")
    writes = [name.partition("/")[0] for call, name in counting.trace if call == "put_if_absent"]
    assert writes == ["packs", "meta", "log"]
    at = next(place for place, (_, name) in enumerate(counting.trace) if name.startswith("packs/"))
    entry, after = (f"log/{number:020d}" for number in (5, 6))
    rest = [(call, name) for call, name in counting.trace[at:] if name.startswith("log/")]
    assert rest == [("get", entry), ("size", after), ("put_if_absent", entry)]


class Failing:
    """Objects whose puts go through ``hook(name, put)`` instead."""

    def __init__(self, inner, hook):
        self._inner = inner
        self._hook = hook

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put_if_absent(self, name, parts):
        self._hook(name, lambda: self._inner.put_if_absent(name, parts))


def test_metadata_that_cannot_be_stored_fails_its_own_push_alone(monkeypatch):
    objects = some_history()
    stored = []

    def hook(name, put):
        if name.startswith("meta/"):
            stored.append(name)
            if len(stored) == 4:
                raise StorageError("the disk is full: make room", kind="disk_full")
        put()

    results = gathered(Failing(objects, hook), [push_to(f"b{seed}", seed) for seed in range(6)], monkeypatch)
    (failed,) = (result for result in results if isinstance(result, LamellaError))
    assert failed.kind == "disk_full"
    numbers = [result.number for result in results if not isinstance(result, LamellaError)]
    assert sorted(numbers) == [2, 3, 4, 5, 6]
    assert open_again(objects).verify(deep=True).problems == []


def lose_answers_from_entry(first):
    """Return a hook that never says whether an entry from this number on was written."""

    def hook(name, put):
        if name.startswith("log/") and int(name[4:]) >= first:
            raise StorageError("the store did not answer", kind="simulated", transient=True)
        put()

    return hook


def test_an_unknown_outcome_is_told_to_everybody_with_the_push_that_it_is_about(monkeypatch):
    objects = some_history()
    results = gathered(
        Failing(objects, lose_answers_from_entry(5)), [push_to(f"b{seed}", seed) for seed in range(5)], monkeypatch
    )
    unknown = [result for result in results if isinstance(result, OutcomeUnknownError)]
    assert len(unknown) == 4
    assert len({error.context["push_id"] for error in unknown}) == 4
    assert all(error.context["push_id"] in error.message for error in unknown)
    assert open_again(objects).stats().versions == 2


def test_an_entry_that_is_refused_fails_each_of_its_commits_with_an_error_of_its_own(monkeypatch):
    objects = some_history()

    def hook(name, put):
        if name == f"log/{5:020d}":
            raise StorageError("the disk is full: make room", kind="disk_full")
        put()

    results = gathered(Failing(objects, hook), [push_to(f"b{seed}", seed) for seed in range(5)], monkeypatch)
    failed = [result for result in results if isinstance(result, StorageError)]
    assert [error.kind for error in failed] == ["disk_full"] * 4
    assert len(set(map(id, failed))) == 4


def test_a_log_that_cannot_be_read_fails_a_commit_with_what_the_store_says():
    objects = some_history()
    repo = open_again(objects)

    def refuse(name):
        raise StorageError("the store does not answer: try again", kind="no_answer", transient=True)

    objects.get = refuse
    with pytest.raises(StorageError) as error:
        store_of(repo).log.commit(new_push_id(), lambda state: None)
    assert error.value.kind == "no_answer"


def refuse_entry_5_once():
    refused = []

    def hook(name, put):
        if name == f"log/{5:020d}" and not refused:
            refused.append(name)
            raise StorageError("the disk is full: make room", kind="disk_full")
        put()

    return hook


def test_nobody_is_told_of_a_conflict_with_what_was_never_recorded(monkeypatch):
    objects = some_history()
    tasks = [push_to("side", 3)]
    tasks += [lambda repo, seed=seed: repo.push({"w": noise(seed, 100)}, "m@main") for seed in (1, 2)]
    _, *results = gathered(Failing(objects, refuse_entry_5_once()), tasks, monkeypatch)
    (refused,) = (result for result in results if isinstance(result, LamellaError))
    (pushed,) = (result for result in results if result is not refused)
    assert refused.kind == "disk_full"
    assert open_again(objects).version("m@main").id == pushed.id


def test_nothing_to_do_is_said_only_of_what_is_recorded(monkeypatch):
    """Two commits want one alias; the entry that would have set it for the first of them is refused."""
    objects = some_history()
    tasks = [push_to("side", 3), *[lambda repo: repo.alias("m@production", "m@v1")] * 2]
    results = gathered(Failing(objects, refuse_entry_5_once()), tasks, monkeypatch)
    assert [type(result) for result in results].count(StorageError) == 1
    assert "production" in {ref.name for ref in open_again(objects).refs("m")}


def test_a_lost_race_is_lost_and_run_again_by_all_of_the_group(monkeypatch):
    objects = some_history()
    other = open_again(objects)
    raced = []

    def hook(name, put):
        if name == f"log/{5:020d}" and not raced:
            raced.append(name)
            other.push({"w": noise(99, 100)}, "m@other")
        put()

    results = gathered(Failing(objects, hook), [push_to(f"b{seed}", seed) for seed in range(5)], monkeypatch)
    assert sorted([*(result.number for result in results), other.version("m@other").number]) == list(range(2, 8))
    assert entries_of(objects) == 3 + 3
    assert open_again(objects).verify(deep=True).problems == []


@pytest.mark.parametrize("landed", [False, True], ids=["before the put", "after the put"])
def test_when_the_thread_that_records_for_others_dies_they_are_recorded_all_the_same(landed, monkeypatch):
    objects = some_history()
    died = []

    def hook(name, put):
        if name == f"log/{5:020d}" and not died:
            died.append(name)
            if landed:
                put()
            raise SimulatedCrash
        put()

    results = gathered(Failing(objects, hook), [push_to(f"b{seed}", seed) for seed in range(6)], monkeypatch)
    assert [type(result) for result in results].count(SimulatedCrash) == 1
    numbers = {result.number for result in results if not isinstance(result, SimulatedCrash)}
    fresh = open_again(objects)
    assert len(numbers) == 5
    assert fresh.stats().versions == (7 if landed else 6)
    assert fresh.verify(deep=True).problems == []


@pytest.mark.parametrize("fault", SOUND, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("entries", [3, FOLD_EVERY - 1], ids=["plain", "with a fold"])
def test_every_write_may_fail_with_a_group_in_flight(entries, fault, monkeypatch):
    """Each push is there if its caller was told so, absent if it failed, and the repository is whole in any case."""
    base = some_history(entries=entries)
    wait = Waiting.wait
    branches = ["b0", "b1", "b2", "b3"]
    for fail_at in count():
        objects = copy_of(base)
        monkeypatch.setattr(Waiting, "wait", wait)
        gathering = Gathering(objects, len(branches) + 1, monkeypatch)
        store = store_of(open_again(gathering))
        sessions = [begun(store, branch, seed) for seed, branch in enumerate(branches)]
        faulty = gathering.inner = FaultyObjects(objects, fail_at, fault)
        tag = RefUpdate("m", "t", "tag", 1)
        results = at_once([*(session.commit_now for session in sessions), partial(store.update_refs, [tag])])
        after = open_again(objects)
        there = {ref.name for ref in after.refs("m")}
        for name, result in zip([*branches, "t"], results, strict=True):
            if not isinstance(result, SimulatedCrash):
                assert (name in there) == (not isinstance(result, LamellaError)), (fail_at, name, result)
        assert after.stats().versions == 1 + len(there & set(branches)), fail_at
        assert after.verify(deep=True).problems == [], fail_at
        for seed, branch in enumerate(branches):
            if branch not in there:
                begun(store_of(after), branch, seed).commit_now()
            assert bits(open_again(objects).checkout(f"m@{branch}")) == bits({"w": noise(seed, 100)})
        if faulty.writes <= fail_at:
            break
    assert fail_at >= len(branches) + 2  # a metadata object each, and at least two entries
