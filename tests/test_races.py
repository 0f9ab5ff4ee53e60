"""Several writers at once: one of them wins each branch, and nobody's version is lost."""

import multiprocessing
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import s3
from support import bits, names_of, new_repository, noise, open_again, store_of

import lamella
from lamella_engine.content_store.committing import COMMIT_TRIES
from lamella_engine.content_store.entries import FOLD_EVERY
from lamella_engine.content_store.seam import RefUpdate
from lamella_engine.errors import AlreadyExistsError, ConflictError, LamellaError, RefNotFoundError
from lamella_engine.objects.memory import MemoryObjects

ROUNDS = 6


class HeldAtCommit:
    """Objects that wait at a barrier before their first put of a log entry; everybody has validated by then."""

    def __init__(self, inner, barrier):
        self._inner = inner
        self._barrier = barrier

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put_if_absent(self, name, parts):
        if name.startswith("log/") and self._barrier is not None:
            barrier, self._barrier = self._barrier, None
            barrier.wait()
        self._inner.put_if_absent(name, parts)


def push_in_a_process(url, targets, seed, barriers, results):
    """Push once to each of ``targets``, held before each commit until the other process is there too."""
    from lamella_engine.chunk_index import index_path
    from lamella_engine.content_store.packed import PackedStore
    from lamella_engine.executor import InlineExecutor
    from lamella_engine.objects import open_objects
    from lamella_engine.repository import on_objects

    for number, (target, barrier) in enumerate(zip(targets, barriers, strict=True)):
        objects = open_objects(url)
        executor = InlineExecutor()
        store = PackedStore(HeldAtCommit(objects, barrier), executor, index_path=index_path(objects, url))
        repo = on_objects(store)
        try:
            version = repo.push({"w": noise(100 * seed + number, 300)}, target, message=f"{seed}")
            results.put((number, "pushed", version.number))
        except ConflictError as error:
            results.put((number, error.kind, None))
        repo.close()


def push_or_tell(url, targets, seed, barriers, results):
    """Push in a process; what it dies of is told to who waits for results, and nobody waits for its next commit."""
    try:
        push_in_a_process(url, targets, seed, barriers, results)
    except BaseException:
        results.put((None, traceback.format_exc(), None))
        for barrier in barriers:
            barrier.abort()
        raise


def race_of_processes(url, targets_of):
    """Return what each process got in each round."""
    spawn = multiprocessing.get_context("spawn")
    barriers = [spawn.Barrier(len(targets_of), timeout=60) for _ in targets_of[0]]
    results = spawn.Queue()
    processes = [
        spawn.Process(target=push_or_tell, args=(url, targets, seed, barriers, results))
        for seed, targets in enumerate(targets_of)
    ]
    for process in processes:
        process.start()
    found = []
    for _ in range(len(targets_of) * len(barriers)):
        found.append(results.get(timeout=120))
        number, what, _ = found[-1]
        assert number is not None, what
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [[(what, at) for number, what, at in found if number == wanted] for wanted in range(len(barriers))]


@pytest.fixture(params=["disk", "seaweedfs"])
def url(request, tmp_path, use):
    """Return where a repository can be that other processes find too."""
    if request.param == "disk":
        return str(tmp_path / "repository")
    use(request.getfixturevalue("seaweedfs"))
    return s3.new_url()


def test_two_processes_at_one_branch_end_in_one_success_and_one_conflict(url):
    repo = lamella.init(url)
    repo.push({"w": noise(0, 300)}, "m@main")
    rounds = race_of_processes(url, [["m@main"] * ROUNDS] * 2)
    for number, results in enumerate(rounds):
        assert Counter(what for what, _ in results) == {"pushed": 1, "ref_moved": 1}, number
    history = list(repo.log("m@main"))
    assert [version.number for version in history] == list(range(ROUNDS + 1, 0, -1))
    assert repo.stats().versions == ROUNDS + 1
    assert repo.verify(deep=True).problems == []


def test_two_processes_at_two_branches_both_succeed(url):
    repo = lamella.init(url)
    rounds = race_of_processes(url, [["m@left"] * ROUNDS, ["m@right"] * ROUNDS])
    for number, results in enumerate(rounds):
        assert sorted(results) == [("pushed", 2 * number + 1), ("pushed", 2 * number + 2)]
    for seed, branch in enumerate(("left", "right")):
        history = list(repo.log(f"m@{branch}"))
        assert [version.message for version in history] == [str(seed)] * ROUNDS
        for number, version in enumerate(reversed(history)):
            assert bits(repo.checkout(version.id)) == bits({"w": noise(100 * seed + number, 300)})
    assert repo.verify(deep=True).problems == []


def at_once(*tasks):
    """Run tasks in threads, and return what each returned or raised."""

    def run(task):
        try:
            return task()
        except LamellaError as error:
            return error

    with ThreadPoolExecutor(len(tasks)) as threads:
        return list(threads.map(run, tasks))


@pytest.mark.parametrize("writers", [2, 8])
def test_threads_with_their_own_stores_at_one_branch_end_in_one_success(writers):
    objects = MemoryObjects()
    new_repository(objects).push({"w": noise(0, 100)}, "m@main")
    for number in range(ROUNDS):
        barrier = Barrier(writers)
        repos = [open_again(HeldAtCommit(objects, barrier)) for _ in range(writers)]
        results = at_once(
            *(
                lambda repo=repo, seed=seed: repo.push({"w": noise(seed, 100)}, "m@main")
                for seed, repo in enumerate(repos, start=1 + number * writers)
            )
        )
        pushed = [result for result in results if not isinstance(result, LamellaError)]
        conflicts = [result for result in results if isinstance(result, ConflictError)]
        assert (len(pushed), len(conflicts)) == (1, writers - 1)
        head = open_again(objects).version("m@main")
        assert head.id == pushed[0].id
        assert all(conflict.context["actual"] == head.id for conflict in conflicts)
    assert open_again(objects).verify(deep=True).problems == []


def test_threads_of_one_repository_at_their_own_branches_all_succeed():
    """Enough of them that folds are written in the middle of it."""
    objects = MemoryObjects()
    writers, pushes = 4, FOLD_EVERY
    repo = new_repository(objects)

    def line(branch):
        for number in range(pushes):
            repo.push({"w": noise(100 * branch + number, 100)}, f"m@{branch}-line", message=f"{number}")

    assert at_once(*(lambda branch=branch: line(branch) for branch in range(writers))) == [None] * writers
    for branch in range(writers):
        history = list(open_again(objects).log(f"m@{branch}-line"))
        assert [int(version.message) for version in history] == list(reversed(range(pushes)))
    assert repo.stats().versions == writers * pushes
    assert repo.version("m@latest").number == writers * pushes
    assert [name for name in names_of(objects) if name.startswith("fold/")]
    assert open_again(objects).verify(deep=True).problems == []


def test_readers_see_whole_versions_while_writers_go_on():
    objects = MemoryObjects()
    writer = new_repository(objects)
    writer.push({"a": np.zeros(200), "b": np.zeros(300)}, "m@main")

    def write():
        for number in range(1, 30):
            writer.push({"a": np.full(200, number * 1.1), "b": np.full(300, number * 1.1)}, "m@main")

    def read():
        reader = open_again(objects)
        for _ in range(40):
            out = reader.checkout("m@main")
            assert len({*out["a"].tolist(), *out["b"].tolist()}) == 1

    assert at_once(write, read, read) == [None, None, None]


def test_of_two_tags_of_one_name_one_is_made():
    objects = MemoryObjects()
    repo = new_repository(objects)
    for seed in range(2):
        repo.push({"w": noise(seed, 100)}, "m@main")
    barrier = Barrier(2)
    repos = [open_again(HeldAtCommit(objects, barrier)) for _ in range(2)]
    tag = "m@release"
    results = at_once(
        *(lambda repo=repo, number=number: repo.tag(tag, f"m@v{number}") for number, repo in enumerate(repos, 1))
    )
    assert sorted(map(repr, map(type, results))) == sorted(map(repr, (type(None), AlreadyExistsError)))
    winner = results.index(None) + 1
    assert repo.version("m@release").number == winner


@pytest.fixture
def with_refs():
    """Return a repository of two versions with a branch, a tag and an alias."""
    repo = new_repository()
    for seed in range(2):
        repo.push({"w": noise(seed, 100)}, "m@main")
    repo.tag("m@release", "m@v1")
    repo.alias("m@production", "m@v1")
    return repo


def test_refs_are_updated_all_or_none(with_refs):
    before = with_refs.refs("m")
    good = [RefUpdate("m", "main", "branch", 1), RefUpdate("m", "new", "alias", 2)]
    with pytest.raises(AlreadyExistsError):
        store_of(with_refs).update_refs([*good, RefUpdate("m", "release", "tag", 2)])
    assert with_refs.refs("m") == before


def test_a_tag_never_moves_and_the_others_do(with_refs):
    with pytest.raises(AlreadyExistsError) as caught:
        with_refs.tag("m@release", "m@v2")
    assert caught.value.kind == "tag_exists"
    with_refs.tag("m@release", "m@v1")  # where it stands
    with_refs.alias("m@production", "m@v2")
    with_refs.branch("m@main", "m@v1")
    assert [(ref.name, ref.number) for ref in with_refs.refs("m")] == [("main", 1), ("production", 2), ("release", 1)]


def test_a_ref_keeps_its_kind_until_it_is_deleted(with_refs):
    kinds = {"m@main": "branch", "m@release": "tag", "m@production": "alias"}
    for name, own in kinds.items():
        for kind in {"branch", "tag", "alias"} - {own}:
            with pytest.raises(AlreadyExistsError):
                getattr(with_refs, kind)(name, "m@v1")
    for name in kinds:
        with_refs.delete_ref(name)
        with pytest.raises(RefNotFoundError):
            with_refs.delete_ref(name)
    with_refs.alias("m@main", "m@v2")
    assert [(ref.name, ref.kind) for ref in with_refs.refs("m")] == [("main", "alias")]
    assert with_refs.stats().versions == 2


def test_a_push_that_loses_every_race_says_so():
    """Somebody else commits before each of its tries."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": noise(0, 100)}, "m@main")
    other = open_again(objects)

    class AlwaysLate(HeldAtCommit):
        moves = 0

        def put_if_absent(self, name, parts):
            if name.startswith("log/"):
                self.moves += 1
                other.alias("m@" + ("odd" if self.moves % 2 else "even") + str(self.moves), "m@v1")
            self._inner.put_if_absent(name, parts)

    late = AlwaysLate(objects, None)
    with pytest.raises(ConflictError) as caught:
        open_again(late).push({"w": noise(1, 100)}, "m@main")
    assert caught.value.kind == "contention"
    assert late.moves == COMMIT_TRIES
    assert other.version("m@main").number == 1
    assert other.verify(deep=True).problems == []
