"""What is asked of a whole repository is done by the nodes of a Ray cluster, with the same answers."""

import _thread
import json
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import ray
from cluster import Nodes, wait_until
from safetensors.numpy import save_file
from service import serving
from support import Array, new_repository

import lamella
import lamella.ray.workers
from lamella.cli import run
from lamella.ray import LamellaUpload
from lamella.ray.workers import Workers
from lamella_engine import spreading
from lamella_engine.errors import InvalidInputError, StorageError
from lamella_engine.repository import Repository

pytestmark = pytest.mark.ray


@pytest.fixture
def place(tmp_path: Path) -> str:
    place = str(tmp_path / "repository")
    lamella.init(place).close()
    return place


def weights(step: float) -> dict[str, Array]:
    rng, drift = np.random.default_rng(0), np.random.default_rng(1)

    def tensor(*shape: int, dtype: Any = np.float32) -> Array:
        moved = rng.standard_normal(shape, np.float32) + np.float32(step) * drift.standard_normal(shape, np.float32)
        return moved.astype(dtype)

    return {
        "long": tensor(2100, 1000),  # three cells, in tasks of their own
        "half": tensor(300, 2100, dtype=ml_dtypes.bfloat16),
        "frozen": np.arange(500_000, dtype=np.float64),
        **{f"layer.{number}.bias": tensor(700) for number in range(50)},
        "step": np.array(step, np.float32),
        "empty": np.zeros((0, 5), np.float32),
    }


def pushed(repo: Repository) -> Repository:
    for step in (0.0, 1e-3, 2e-3):
        repo.push(weights(step), "llm@main", message=f"at {step}")
    return repo


def test_a_distance_has_the_bits_of_one_process(nodes: Nodes, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "TASK_NBYTES", 3 << 20)
    with pushed(lamella.open(place)) as repo:
        spread = repo.distance("llm@v1", "llm@v3", executor="ray")
        alone = repo.distance("llm@v1", "llm@v3")
        assert spread == alone
        assert spread.per_tensor == alone.per_tensor
        assert spread.cosine.hex() == alone.cosine.hex()
        some = repo.distance("llm@v3", "llm@v1", include="layer.*", executor="ray")
        assert some.per_tensor == repo.distance("llm@v3", "llm@v1", include="layer.*").per_tensor
        assert len(some.per_tensor) == 50


def test_nodes_measure_what_a_service_keeps_and_leave_verifying_to_it(nodes: Nodes, tmp_path: Path) -> None:
    with serving(tmp_path) as server, pushed(lamella.init(f"grpc://{server.address}/team")) as repo:
        spread = repo.distance("llm@v1", "llm@v3", executor="ray")
        assert spread == repo.distance("llm@v1", "llm@v3")
        with pytest.raises(InvalidInputError) as caught:
            repo.verify(deep=True, executor="ray")
        assert caught.value.kind == "not_shared"


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def test_what_is_wrong_is_found_as_by_one_process(nodes: Nodes, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "TASK_NBYTES", 3 << 20)
    with pushed(lamella.open(place)) as repo:
        whole = repo.verify(deep=True, executor="ray")
        assert whole.ok
        assert whole == repo.verify(deep=True)
        oldest, *_, newest = sorted((Path(place) / "packs").iterdir())
        damage(oldest)  # what stands on it is damaged too
        newest.unlink()
        (metadata,) = (Path(place) / "meta").glob(f"{repo.version('llm@v1').id}-*")
        damage(metadata)
        for deep in (True, False):
            found = repo.verify(deep=deep, executor="ray")
            assert len({problem.where for problem in found.problems}) > 3
            assert found == repo.verify(deep=deep)


def test_the_command_line_has_nodes_do_it_too(nodes: Nodes, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    pushed(lamella.open(place)).close()
    for command in (["distance", "llm@v1", "llm@v2", "--cosine"], ["verify", "--deep"]):
        answers = []
        for executor in ([], ["--executor", "ray"]):
            assert run(["-C", place, *command, *executor, "--json"]) == 0
            answers.append(json.loads(capsys.readouterr().out))
        assert answers[0] == answers[1]


def test_what_no_node_could_open_is_refused(nodes: Nodes, place: str) -> None:
    with pushed(new_repository()) as repo, pytest.raises(InvalidInputError) as caught:
        repo.distance("llm@v1", "llm@v2", executor="ray")
    assert caught.value.kind == "not_shared"
    with lamella.open(place) as repo, pytest.raises(InvalidInputError) as caught:
        repo.verify(executor="abacus")
    assert caught.value.kind == "bad_executor"


def test_nodes_open_a_directory_that_was_opened_by_a_relative_path(
    nodes: Nodes, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(place).parent)
    with pushed(lamella.open("repository")) as repo:
        monkeypatch.chdir("/")
        assert repo.distance("llm@v1", "llm@v2", executor="ray") == repo.distance("llm@v1", "llm@v2")


def node(_: Repository) -> str:
    return str(ray.get_runtime_context().get_node_id())


class Once:
    """Does something to the first process that is called."""

    def __init__(self, mark: Path, action: Callable[[], object]) -> None:
        self.mark = mark
        self.action = action

    def __call__(self, repo: Repository) -> str:
        if not self.mark.exists():
            self.mark.touch()
            self.action()
        return node(repo)


def leave(_: Repository) -> None:
    ray.actor.exit_actor()


def refuse(repo: Repository) -> None:
    repo.version("llm@nowhere")


def test_every_node_works_and_what_a_killed_worker_was_at_is_done(nodes: Nodes, place: str, tmp_path: Path) -> None:
    with Workers(place) as workers:
        for number in range(2 * len(nodes.ids)):
            workers.begin(number, node)
        workers.begin("killed", Once(tmp_path / "killed", os.abort))
        workers.begin("refused", refuse)
        ended = dict(workers.ended())
        assert len(workers) == len(nodes.ids)
        assert isinstance(ended.pop("refused"), lamella.RefNotFoundError)
        assert set(ended.values()) == set(nodes.ids)
        assert len(ended) == 2 * len(nodes.ids) + 1


def test_what_ends_every_worker_is_given_up_and_the_rest_done(
    nodes: Nodes, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lamella.ray.workers, "TRIES", 2)
    with Workers(place) as workers:
        workers.begin("moved", Once(tmp_path / "left", ray.actor.exit_actor))
        workers.begin("deadly", leave)
        workers.begin("harmless", node)
        ended = dict(workers.ended())
        assert isinstance(ended["deadly"], StorageError)
        assert {ended["moved"], ended["harmless"]} <= set(nodes.ids)
        assert len(workers) == len(nodes.ids) - 1 - 2
        workers.begin("deadly too", leave)
        with pytest.raises(StorageError) as caught:
            list(workers.ended())
        assert caught.value.kind == "worker_lost"


def go_on(_: Repository) -> None:
    threading.Event().wait()


def test_what_is_interrupted_leaves_no_worker_behind(nodes: Nodes, place: str) -> None:
    over = threading.Event()

    def interrupt() -> None:
        while len(nodes.actors("_Worker.do")) < 2 and not over.wait(0.05):
            pass
        _thread.interrupt_main()

    def work() -> None:
        with Workers(place) as workers:
            for number in range(2):
                workers.begin(number, go_on)
            list(workers.ended())

    watch = threading.Thread(target=interrupt)
    watch.start()
    with pytest.raises(KeyboardInterrupt):
        work()
    over.set()
    watch.join()
    wait_until(lambda: not nodes.actors("_Worker"))


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, list[Path]]:
    """Return checkpoints of two models, two of each."""
    found: dict[str, list[Path]] = {}
    for model in ("a", "b"):
        for step in (1, 2):
            path = tmp_path / f"{model}-{step}.safetensors"
            save_file({"w": np.full((3, 1000), step, np.float32)}, path)
            found.setdefault(f"{model}@main", []).append(path)
    return found


def test_checkpoints_are_imported_in_the_order_of_their_branch_and_once(
    nodes: Nodes, place: str, checkpoints: dict[str, list[Path]]
) -> None:
    damaged = checkpoints["b@main"][0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    seen: list[tuple[str, str]] = []
    first = lamella.ray.import_checkpoints(checkpoints, place, progress=lambda *one: seen.append(one))
    assert seen == [("a@main", str(path)) for path in checkpoints["a@main"]]
    assert [*first.failures] == ["b@main"]
    assert isinstance(first.failures["b@main"], InvalidInputError)
    assert [len(ids) for ids in first.versions.values()] == [2, 0]

    damaged.write_bytes(whole)
    second = lamella.ray.import_checkpoints(checkpoints, place)
    assert not second.failures
    assert second.versions["a@main"] == first.versions["a@main"]
    with lamella.open(place) as repo:
        for target, paths in checkpoints.items():
            versions = list(repo.log(target))[::-1]
            assert tuple(version.id for version in versions) == second.versions[target]
            assert [version.message for version in versions] == [str(path) for path in paths]
            assert [version["w"][0, 0] for version in versions] == [1, 2]


def test_an_import_into_nothing_is_refused_at_once(tmp_path: Path, checkpoints: dict[str, list[Path]]) -> None:
    with pytest.raises(lamella.RepositoryNotFoundError):
        lamella.ray.import_checkpoints(checkpoints, str(tmp_path / "nowhere"))
    with pytest.raises(InvalidInputError):
        lamella.ray.import_checkpoints({"no target": []}, str(tmp_path / "nowhere"))


@dataclass
class Directory:
    """Stands for ray.train.Checkpoint, which needs pyarrow."""

    path: Path

    @classmethod
    def from_directory(cls, path: str) -> "Directory":
        return cls(Path(path))

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        yield str(self.path)


class Run:
    """Stands for the context and the storage of a worker of Ray Train."""

    def __init__(self, rank: int, storage: Path) -> None:
        self.rank = rank
        self.storage = storage

    def get_world_rank(self) -> int:
        return self.rank

    def get_storage(self) -> "Run":
        return self

    def persist_current_checkpoint(self, checkpoint: Directory, name: str) -> Directory:
        return Directory(shutil.copytree(checkpoint.path, self.storage / name, dirs_exist_ok=True))


def test_what_is_reported_to_ray_train_becomes_a_version(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInputError):
        LamellaUpload(place, "no target")
    upload = pickle.loads(pickle.dumps(LamellaUpload(place, "llm@rank-{rank}")))
    for rank in (0, 1):
        run = Run(rank, tmp_path / "storage")
        train = SimpleNamespace(Checkpoint=Directory, get_context=lambda run=run: run)
        monkeypatch.setitem(sys.modules, "ray.train", train)
        monkeypatch.setattr(ray, "train", train, raising=False)
        reported = tmp_path / f"reported-{rank}"
        reported.mkdir()
        save_file({"w": np.full(1000, rank, np.float32)}, reported / "model.safetensors")
        (reported / "epoch.txt").write_text("7")
        kept = upload(Directory(reported), "checkpoint_000007")
        assert kept.path == tmp_path / "storage" / "checkpoint_000007"
        note = json.loads((kept.path / f"lamella-{rank}.json").read_text())
        with lamella.open(note["repository"]) as repo:
            version = repo.version(note["revision"])
            assert version == repo.version(f"llm@rank-{rank}")
            assert version.message == "checkpoint_000007"
            out = repo.checkout(note["revision"], tmp_path / f"out-{rank}")
        assert {name: path.read_bytes() for name, path in out.items()} == {
            path.name: path.read_bytes() for path in reported.iterdir()
        }
    assert len(list(kept.path.iterdir())) == 2
