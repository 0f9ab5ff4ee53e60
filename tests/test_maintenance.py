"""Verify says what is wrong, wherever it is; stats count what lies in the directory; a push shows that it lives."""

import os
from dataclasses import replace

import numpy as np
import pytest
from support import append_entry, bits, names_of, new_repository, noise, open_again, store_of

import lamella
from lamella_engine.chunk_index import INDEX_PATH
from lamella_engine.content_store import push as push_module
from lamella_engine.format.entry import PackAdded, RefChange
from lamella_engine.objects.memory import MemoryObjects


@pytest.fixture
def objects():
    """Return objects with two versions, a tag and a branch that is no longer at the tip."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": noise(0, 5_000)}, "m@main")
    repo.push({"w": noise(1, 5_000)}, "m@main")
    repo.tag("m@released", "m@v1")
    return objects


def kinds(repo):
    return {problem.kind for problem in repo.verify(deep=True).problems}


def rows(objects):
    state = store_of(open_again(objects)).log.state
    return {version.number: version for version in state.versions()}, list(state.packs())


CONTRADICTIONS = {
    "a version number twice": lambda versions, packs: {"versions": (replace(versions[1], number=2),)},
    "a pack twice": lambda versions, packs: {"packs": (PackAdded(packs[0].name, packs[0].nbytes, "store"),)},
    "a pack condemned that is not live": lambda versions, packs: {"condemned": (packs[0].name[:-64] + "0" * 64,)},
    "a pack replaced by one that is not live": lambda versions, packs: {
        "replaced": {packs[0].name: (packs[0].name[:-64] + "0" * 64,)}
    },
    "a tag moved": lambda versions, packs: {"refs": (RefChange("m", "released", "tag", 1, 2),)},
    "a branch turned into a tag": lambda versions, packs: {"refs": (RefChange("m", "main", "tag", 2, 1),)},
    "a ref to a version that is not there": lambda versions, packs: {
        "refs": (RefChange("m", "side", "branch", None, 9),)
    },
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_an_entry_that_no_writer_would_add_is_named(what, objects):
    number = store_of(open_again(objects)).log.state.number + 1
    append_entry(objects, **CONTRADICTIONS[what](*rows(objects)))
    problems = open_again(objects).verify().problems
    assert ("broken_log", f"log/{number:020d}") in {(problem.kind, problem.where) for problem in problems}


def test_a_version_on_a_condemned_pack_is_found(objects):
    append_entry(objects, condemned=(rows(objects)[1][0].name,))
    assert "missing_pack" in kinds(open_again(objects))


def test_a_handle_that_has_read_everything_still_verifies_what_is_stored(objects):
    repo = open_again(objects)
    repo.checkout("m@main")
    assert repo.verify(deep=True).ok
    name = rows(objects)[1][0].name
    data = bytearray(objects.get(name))
    data[-30] ^= 1
    objects.delete(name)
    objects.put_if_absent(name, [data])
    assert not repo.verify().ok


def test_bytes_after_the_end_are_found(objects):
    longer = [name for name in names_of(objects) if name.startswith(("packs/", "meta/"))]
    assert len(longer) == 4
    for name in longer:
        data = objects.get(name)
        objects.delete(name)
        objects.put_if_absent(name, [data, b"x"])
        assert not open_again(objects).verify().ok
        objects.delete(name)
        objects.put_if_absent(name, [data])
    assert open_again(objects).verify(deep=True).ok


def test_the_loss_of_every_fold_costs_nothing_but_reads():
    objects = MemoryObjects()
    repo = new_repository(objects)
    for number in range(20):
        repo.push({"w": noise(number, 50)}, "m@main", message=str(number))
    before = bits(repo.checkout("m@v3"))
    folds = [name for name in names_of(objects) if name.startswith("fold/")]
    assert folds
    for name in folds:
        objects.delete(name)
    repo = open_again(objects)
    assert bits(repo.checkout("m@v3")) == before
    for number in range(20, 30):
        repo.push({"w": noise(number, 50)}, "m@main", message=str(number))
    assert len([name for name in names_of(objects) if name.startswith("fold/")]) >= 1
    assert open_again(objects).version("m@latest").number == 30


def test_a_log_without_its_first_entry_is_damaged_and_not_a_place_for_a_new_repository(objects):
    objects.delete("log/00000000000000000000")
    for attempt in (open_again, new_repository):
        with pytest.raises(lamella.CorruptionError, match="entry 0"):
            attempt(objects)
    assert "log/00000000000000000000" not in names_of(objects)


def test_stats_are_the_sizes_of_the_files(tmp_path):
    repo = lamella.init(tmp_path / "r")
    for number in range(10):
        repo.push({"w": noise(number, 3_000)}, "m@main")
    files = [path for path in (tmp_path / "r").rglob("*") if path.is_file()]
    derived = (tmp_path / "r" / INDEX_PATH).parent
    stats = repo.stats()
    assert stats.stored_nbytes == sum(path.stat().st_size for path in files if path.parent != derived)
    assert any(path.parent == derived for path in files)
    assert (stats.versions, stats.models, stats.decoded_nbytes) == (10, 1, 10 * 12_000)


@pytest.mark.parametrize(
    "spoil",
    [lambda path: path.unlink(), lambda path: path.write_bytes(b"no database" * 1000)],
    ids=["deleted", "damaged"],
)
def test_the_chunk_index_may_be_lost_at_any_time(spoil, tmp_path):
    tensors = {"w": noise(0, 3_000)}
    with lamella.init(tmp_path / "r") as repo:
        repo.push(tensors, "m@main")
    spoil(tmp_path / "r" / INDEX_PATH)
    with lamella.open(tmp_path / "r") as repo:
        repo.push(tensors, "other@main")
        assert repo.stats().packs == 1  # found again in the newest packs
        assert bits(repo.checkout("other@main")) == bits(tensors)
        assert repo.verify(deep=True).ok


def test_a_long_push_leaves_heartbeats(monkeypatch):
    monkeypatch.setattr(push_module, "HEARTBEAT_S", 0.0)
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({f"t{number}": noise(number, 100) for number in range(3)}, "m@main")
    beats = [name for name in names_of(objects) if name.startswith("sessions/")]
    assert len(beats) >= 3
    assert len({name.rpartition("-")[0] for name in beats}) == 1


def test_a_closed_repository_says_so(tmp_path):
    repo = lamella.init(tmp_path / "r")
    repo.push({"w": noise(0, 3_000)}, "m@main")
    repo.close()
    repo.close()
    with pytest.raises(lamella.InvalidInputError) as caught:
        repo.checkout("m@main")
    assert caught.value.kind == "closed"


def test_a_forked_child_can_use_the_repository_of_its_parent(tmp_path):
    repo = lamella.init(tmp_path / "r")
    repo.push({"w": noise(0, 3_000)}, "m@main")
    child = os.fork()
    if child == 0:
        try:
            repo.push({"w": repo.checkout("m@main")["w"] + np.float32(1)}, "m@child")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert repo.version("m@child").number == 2
    assert repo.verify(deep=True).ok
