"""torch.distributed.checkpoint: what ranks save is one ordinary version, which any number of ranks loads."""

import hashlib
import io
import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from support import new_repository
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import lamella
import lamella.torch
from lamella.torch import LamellaReader, LamellaWriter
from lamella_engine.errors import ConflictError, InvalidInputError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of which every release has others

WORLDS = (1, 2, 4, 8)

# Name -> shape, dtype, placements on a mesh of one axis, and on one of two.
LAYOUTS: dict[str, tuple[tuple[int, ...], torch.dtype, list[Placement], list[Placement]]] = {
    "model.embed": ((331, 640), torch.float32, [Shard(0)], [Shard(0), Shard(1)]),
    "model.columns": ((70, 901), torch.float32, [Shard(1)], [Replicate(), Shard(1)]),
    "model.deep": ((6, 5, 130), torch.float64, [Shard(2)], [Shard(2), Shard(0)]),
    "model.norm": ((640,), torch.float32, [Replicate()], [Replicate(), Replicate()]),
    "model.half": ((1031, 1100), torch.bfloat16, [Shard(0)], [Shard(0), Shard(0)]),
    "model.few": ((3, 7), torch.int64, [Shard(0)], [Shard(0), Replicate()]),
    "optim.state.embed.exp_avg": ((331, 640), torch.float32, [Shard(0)], [Shard(0), Shard(1)]),
    "optim.state.embed.exp_avg_sq": ((331, 640), torch.float32, [Shard(0)], [Shard(0), Shard(1)]),
}


def whole(name: str) -> torch.Tensor:
    """Return a tensor's elements, every bit of which is drawn: NaN payloads and -0.0 too."""
    shape, dtype, _, _ = LAYOUTS[name]
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    octets = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    return torch.frombuffer(bytearray(octets), dtype=dtype).reshape(shape)


def state_on(mesh: DeviceMesh | None, *, blank: bool = False) -> dict[str, Any]:
    """Return a nested state whose tensors are spread over a mesh; without one, as they are."""
    state: dict[str, Any] = {
        "optim": {
            "state": {"embed": {"step": torch.tensor(0.0 if blank else 3.0)}},
            "param_groups": [{"lr": 0.0 if blank else 0.1, "betas": (0.0, 0.0) if blank else (0.9, 0.99)}],
        },
        "epoch": 0 if blank else 7,
        "note": "" if blank else "é",
    }
    for name, (_, _, flat, grid) in LAYOUTS.items():
        tensor: Any = torch.zeros_like(whole(name)) if blank else whole(name)
        if mesh is not None:
            tensor = distribute_tensor(tensor, mesh, flat if mesh.ndim == 1 else grid, src_data_rank=None)
        *path, last = name.split(".")
        inner = state
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = tensor
    return state


def sha256(tensor: torch.Tensor) -> str:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return hashlib.sha256(full.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def leaves(state: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(state, dict):
        return {path: sha256(state) if isinstance(state, torch.Tensor) else state}
    return {name: leaf for key, inner in state.items() for name, leaf in leaves(inner, f"{path}.{key}").items()}


# -- every number of ranks ---------------------------------------------------------------------------------------------


def save_and_load_on_all(rank: int, world: int, place: str) -> dict[str, Any]:
    """Save on 1, 2, 4 and 8 ranks, flat and on a grid of ranks, and load each on 1, 2, 4 and 8."""
    repo = lamella.open(place)
    groups = {n: dist.new_group(list(range(n))) for n in WORLDS}
    meshes = {(n, 1): DeviceMesh("cpu", torch.arange(n)) for n in WORLDS}
    meshes |= {(n, 2): DeviceMesh("cpu", torch.arange(n).reshape(2, n // 2)) for n in (4, 8)}
    found: dict[str, Any] = {"saved": {}, "loaded": {}, "sent": {}, "packs": {}}
    for (n, axes), mesh in meshes.items():
        if rank < n:
            writer = LamellaWriter(repo, f"llm@{n}x{axes}", message="saved")
            dcp.save(state_on(mesh), storage_writer=writer, process_group=groups[n])
            found["sent"][n, axes] = writer.sent_nbytes
            if rank == 0:
                assert writer.version is not None
                found["saved"][n, axes] = writer.version.parameters_id
                found["packs"][n, axes] = repo.stats().stored_nbytes
        dist.barrier()
    for n, axes in meshes:
        for m, mesh in ((m, mesh) for (m, flat), mesh in meshes.items() if flat == 1):
            if rank < m:
                state = state_on(mesh, blank=True)
                dcp.load(state, storage_reader=LamellaReader(repo, f"llm@{n}x{axes}"), process_group=groups[m])
                found["loaded"][n, axes, m] = leaves(state)
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    place = str(folder / "repository")
    lamella.init(place)
    return place, run_ranks(save_and_load_on_all, max(WORLDS), folder, place)


def test_ranks_of_any_number_make_the_version_that_one_push_makes(
    everywhere: tuple[str, list[dict[str, Any]]],
) -> None:
    _, found = everywhere
    alone = lamella.torch.push(state_on(None), new_repository(), "llm@main")
    assert set(found[0]["saved"].values()) == {alone.parameters_id}
    assert len(found[0]["saved"]) == 6


def test_a_second_save_on_other_ranks_stores_no_tensor_again(everywhere: tuple[str, list[dict[str, Any]]]) -> None:
    _, found = everywhere
    sizes = list(found[0]["packs"].values())
    assert sizes[0] > 1_000_000
    assert sizes[-1] - sizes[0] < 5 * 8_000  # manifests, entries, folds


def test_whatever_ranks_saved_ranks_of_any_number_load(everywhere: tuple[str, list[dict[str, Any]]]) -> None:
    _, found = everywhere
    expected = leaves(state_on(None))
    for rank, one in enumerate(found):
        assert {m for _, _, m in one["loaded"]} == {m for m in WORLDS if rank < m}
        for pair, loaded in one["loaded"].items():
            assert loaded == expected, pair


def test_ranks_exchange_what_others_store(everywhere: tuple[str, list[dict[str, Any]]]) -> None:
    _, found = everywhere
    total = sum(whole(name).nbytes for name in LAYOUTS)
    for n in (2, 4, 8):
        sent = sum(one["sent"].get((n, 1), 0) for one in found)
        assert 0 < sent < total
    assert found[0]["sent"][1, 1] == 0


def test_what_ranks_saved_is_checked_out_as_any_version(
    everywhere: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    place, _ = everywhere
    repo = lamella.open(place)
    from safetensors.torch import load_file

    repo.checkout("llm@4x1", tmp_path / "out")
    files = load_file(tmp_path / "out" / "model.safetensors")
    for name in LAYOUTS:
        assert sha256(files[name]) == sha256(whole(name))
    assert leaves(lamella.torch.state(repo, "llm@8x2")) == leaves(state_on(None))
    assert repo.verify(deep=True).ok


def test_nothing_that_was_saved_is_a_pickle(everywhere: tuple[str, list[dict[str, Any]]]) -> None:
    place, _ = everywhere
    document = lamella.open(place).version("llm@8x1").file(lamella.torch.STATE_FILE)
    assert b'"epoch": 7' in document
    for path in Path(place).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"PK\x03\x04" not in data[:4]
            assert not data.startswith(b"\x80")


# -- without a process group -------------------------------------------------------------------------------------------


@pytest.fixture
def repo() -> lamella.Repository:
    return new_repository()


def test_one_process_needs_no_group(repo: lamella.Repository) -> None:
    writer = LamellaWriter(repo, "llm@main", message="m", metrics={"loss": 0.5}, recipe={"seed": 1})
    dcp.save(state_on(None), storage_writer=writer)
    assert writer.version is not None
    assert (writer.version.message, writer.version.metrics, writer.version.recipe) == ("m", {"loss": 0.5}, {"seed": 1})
    state = state_on(None, blank=True)
    dcp.load(state, storage_reader=LamellaReader(repo, "llm@main"))
    assert leaves(state) == leaves(state_on(None))
    state = state_on(None, blank=True)
    dcp.load(state, checkpoint_id="llm@v1", storage_reader=LamellaReader(repo, "other@main"))
    assert leaves(state) == leaves(state_on(None))


def test_a_plan_that_travels_describes_tensors_that_are_alike_once(repo: lamella.Repository) -> None:
    planner = dcp.DefaultSavePlanner()
    state = {f"w{at}": torch.ones(3, 4) for at in range(20)} | {"half": torch.ones(3, 4).bfloat16(), "n": 1}
    planner.set_up_planner(state, is_coordinator=True)
    plan = planner.create_local_plan()
    found = pickle.loads(pickle.dumps(LamellaWriter(repo, "llm@main").prepare_local_plan(plan)))
    assert found.items == plan.items
    assert len({id(item.tensor_data) for item in found.items if item.tensor_data is not None}) == 2


def test_a_checkpoint_id_names_the_branch(repo: lamella.Repository) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id="llm@run-7", storage_writer=LamellaWriter(repo, "llm@main"))
    assert repo.version("llm@run-7")["w"].numpy().tolist() == [1, 1, 1]
    assert repo.version("llm@run-7").files == ()  # tensors by name alone


def test_a_part_of_a_state_is_loaded_by_reading_a_part(tmp_path: Path) -> None:
    repo = lamella.init(str(tmp_path / "r"))
    dcp.save(state_on(None), storage_writer=LamellaWriter(repo, "llm@main"))
    state = {"model": {"norm": torch.zeros(640)}}
    dcp.load(state, storage_reader=LamellaReader(repo, "llm@main"))
    assert sha256(state["model"]["norm"]) == sha256(whole("model.norm"))


def test_versions_that_were_pushed_otherwise_are_loaded(repo: lamella.Repository) -> None:
    repo.push({"model.norm": whole("model.norm")}, "flat@main")
    state: dict[str, Any] = {"model": {"norm": torch.zeros(640)}}
    dcp.load(state, storage_reader=LamellaReader(repo, "flat@main"))
    assert sha256(state["model"]["norm"]) == sha256(whole("model.norm"))

    nested = {"groups": [{"w": torch.arange(3.0), "lr": 0.5}], "table": np.arange(4), "pair": (1, "a")}
    lamella.torch.push(nested, repo, "nested@main")
    blank: dict[str, Any] = {"groups": [{"w": torch.zeros(3), "lr": 0.0}], "table": None, "pair": None}
    dcp.load(blank, storage_reader=LamellaReader(repo, "nested@main"))
    assert blank["groups"][0]["w"].tolist() == [0, 1, 2]
    assert (blank["groups"][0]["lr"], blank["pair"], blank["table"].tolist()) == (0.5, (1, "a"), [0, 1, 2, 3])


def test_an_empty_state_is_made_from_what_is_there(repo: lamella.Repository) -> None:
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    dcp.save(state_on(None), storage_writer=LamellaWriter(repo, "llm@main"))
    found = _load_state_dict_from_keys(storage_reader=LamellaReader(repo, "llm@main"))
    assert leaves(found) == leaves(state_on(None))


class Odd:
    """Of no type that can be kept."""


@pytest.mark.parametrize(
    "value",
    [Odd(), b"bytes", {1, 2}, (torch.ones(2), 1), np.zeros(3), 1j, torch.float32, "\ud800"],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_kept_is_refused_by_name(repo: lamella.Repository, value: Any) -> None:
    error = failure_of({"w": torch.ones(3), "extra": {"thing": value}}, storage_writer=LamellaWriter(repo, "llm@main"))
    assert isinstance(error, InvalidInputError)
    assert error.kind == "not_storable"
    assert repo.models() == []


def failure_of(state: dict[str, Any], **options: Any) -> BaseException:
    """Return what a rank raised, of what dcp makes of it: CheckpointException, which is no Exception."""
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, **options)
    found: BaseException = next(iter(caught.value.failures.values()))[0]
    return found


def test_a_planner_that_only_pickles_is_refused(repo: lamella.Repository) -> None:
    class Pickling(dcp.DefaultSavePlanner):
        lookup_object = None  # type: ignore[assignment]

        def resolve_data(self, write_item: Any) -> Any:
            return io.BytesIO(b"")

    error = failure_of({"n": 1}, storage_writer=LamellaWriter(repo, "llm@main"), planner=Pickling())
    assert isinstance(error, InvalidInputError)


def test_cached_plans_and_ranks_that_do_not_talk_are_refused(repo: lamella.Repository) -> None:
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    writer = LamellaWriter(repo, "llm@main")
    dcp.save({"w": torch.ones(3)}, storage_writer=writer, planner=planner)
    error = failure_of({"w": torch.ones(3)}, storage_writer=writer, planner=planner)
    assert "enable_plan_caching" in str(error)
    with pytest.raises(InvalidInputError, match="use_collectives"):
        dcp.save({"w": torch.ones(3)}, storage_writer=writer, use_collectives=False)


def test_a_moved_branch_is_a_conflict_and_the_next_save_succeeds(repo: lamella.Repository) -> None:
    class Moving(LamellaWriter):
        moves = True

        def write_data(self, plan: Any, planner: Any) -> Any:
            if self.moves:
                repo.push({"other": np.zeros(3)}, "llm@main")
            return super().write_data(plan, planner)

    writer = Moving(repo, "llm@main")
    assert isinstance(failure_of({"w": torch.ones(3)}, storage_writer=writer), ConflictError)
    assert repo.version("llm@main").number == 1
    writer.moves = False
    dcp.save({"w": torch.ones(3)}, storage_writer=writer)
    assert repo.version("llm@main").number == 2


def test_a_writer_goes_to_another_process_by_the_location_alone(repo: lamella.Repository, tmp_path: Path) -> None:
    lamella.init(str(tmp_path / "r"))
    writer = pickle.loads(pickle.dumps(LamellaWriter(str(tmp_path / "r"), "llm@main")))
    dcp.save({"w": torch.ones(3)}, storage_writer=writer)
    assert writer.version is not None
    with pytest.raises(InvalidInputError) as caught:
        pickle.dumps(LamellaWriter(repo, "llm@main"))
    assert caught.value.kind == "not_picklable"


@pytest.mark.parametrize("target", ["", "llm", "llm@", "@main", "../x@main"])
def test_what_names_no_branch_is_refused_at_once(repo: lamella.Repository, target: str) -> None:
    with pytest.raises(InvalidInputError):
        LamellaWriter(repo, target)
    assert not LamellaWriter.validate_checkpoint_id(target)


# -- training ----------------------------------------------------------------------------------------------------------


def train_with_fsdp(rank: int, world: int, place: str) -> dict[str, Any]:
    """Train a model that is sharded, save it in all three ways while it goes on, and come back to each."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    model = torch.nn.Sequential(torch.nn.Embedding(301, 64), torch.nn.Linear(64, 301), torch.nn.LayerNorm(301))
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        model(torch.randint(0, 301, (4, 8))).float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def held() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optim": moments}

    found: dict[str, Any] = {"expected": {}, "loaded": {}, "ids": {}}
    group = dist.new_group(backend="gloo")
    for name in ("save", "thread", "process"):
        step()
        state = held()
        found["expected"][name] = leaves(state)
        writer = LamellaWriter(place, "llm@main", message=name)
        if name == "save":
            dcp.save(state, storage_writer=writer)
        else:
            kind = getattr(dcp.state_dict_saver.AsyncCheckpointerType, name.upper())
            dcp.async_save(state, storage_writer=writer, process_group=group, async_checkpointer_type=kind).result()
    dist.barrier()
    repo = lamella.open(place)
    for number, name in enumerate(("save", "thread", "process"), 1):
        state = held()
        dcp.load(state, storage_reader=LamellaReader(repo, f"llm@v{number}"))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        found["loaded"][name] = leaves(held())
        found["ids"][name] = repo.version(f"llm@v{number}").message
    return found


def test_fsdp_with_adamw_is_saved_in_every_way_and_comes_back(tmp_path: Path) -> None:
    place = str(tmp_path / "repository")
    lamella.init(place)
    for one in run_ranks(train_with_fsdp, 2, tmp_path, place):
        assert one["loaded"] == one["expected"]
        assert one["ids"] == {"save": "save", "thread": "thread", "process": "process"}
        assert len({str(state) for state in one["expected"].values()}) == 3


# -- saves at once, and of some ranks ----------------------------------------------------------------------------------


def save_two_at_once(rank: int, world: int, place: str) -> list[bool]:
    """Save two states of one structure, which ranks come to in different orders."""
    mesh = init_device_mesh("cpu", (world,))
    groups = [dist.new_group(list(range(world))) for _ in range(2)]
    repo = lamella.open(place)
    others_stored = threading.Event()

    class InOrder(LamellaWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            if self._target != f"m@{rank}":
                others_stored.wait(1.0)  # where saves take turns this never comes
            result = super().write_data(plan, planner)
            others_stored.set()
            return result

    def save(at: int) -> bool:
        tensor = distribute_tensor(numbered(at), mesh, [Shard(0)], src_data_rank=None)
        dcp.save({"w": tensor}, storage_writer=InOrder(repo, f"m@{at}"), process_group=groups[at])
        return True

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(save, range(2)))


def numbered(at: int) -> torch.Tensor:
    return torch.arange(101 * 1000, dtype=torch.float32).reshape(101, 1000) + at * 1e6


def test_two_saves_at_once_do_not_mix_whatever_order_ranks_come_to_them_in(tmp_path: Path) -> None:
    place = str(tmp_path / "repository")
    repo = lamella.init(place)
    assert run_ranks(save_two_at_once, 2, tmp_path, place) == [[True, True]] * 2
    for at in range(2):
        assert sha256(torch.from_numpy(repo.version(f"m@{at}")["w"].numpy())) == sha256(numbered(at))


def save_on_pairs(rank: int, world: int, place: str) -> int:
    """Save on pairs of ranks that one rank is in, one after the other, and on the first again."""
    pairs = [(0, 1), (0, 2)]
    groups = [dist.new_group(list(pair)) for pair in pairs]
    meshes = [DeviceMesh("cpu", torch.tensor(pair)) for pair in pairs]
    saved = 0
    for number, at in enumerate((0, 1, 0)):
        if rank in pairs[at]:
            tensor = distribute_tensor(numbered(number), meshes[at], [Shard(0)], src_data_rank=None)
            dcp.save({"w": tensor}, storage_writer=LamellaWriter(place, f"m@{number}"), process_group=groups[at])
            saved += 1
    return saved


def test_pairs_of_ranks_with_one_in_common_save_one_after_the_other(tmp_path: Path) -> None:
    place = str(tmp_path / "repository")
    repo = lamella.init(place)
    assert run_ranks(save_on_pairs, 3, tmp_path, place) == [3, 2, 1]
    for number in range(3):
        assert sha256(torch.from_numpy(repo.version(f"m@{number}")["w"].numpy())) == sha256(numbered(number))


# -- failures ----------------------------------------------------------------------------------------------------------


def fail_on_a_rank(rank: int, world: int, place: str) -> list[Any]:
    """Save with a rank that fails at each stage, then as it should be."""
    mesh = init_device_mesh("cpu", (world,))
    repo = lamella.open(place)

    class Broken(LamellaWriter):
        stage = ""

        def set_up_storage_writer(self, *args: Any, **kwargs: Any) -> None:
            if rank == 1 and self.stage == "set up":
                raise OSError("set up")
            super().set_up_storage_writer(*args, **kwargs)

        def write_data(self, plan: Any, planner: Any) -> Any:
            if rank == 1 and self.stage == "resolve":
                planner.resolve_data = lambda item: (_ for _ in ()).throw(OSError("resolve"))
            return super().write_data(plan, planner)

    found: list[Any] = []
    for stage in ("set up", "resolve", ""):
        writer = Broken(repo, "llm@main")
        writer.stage = stage
        try:
            dcp.save(state_on(mesh), storage_writer=writer)
        except BaseException as error:
            found.append((stage, sorted(type(inner[0]).__name__ for inner in error.failures.values())))  # type: ignore[attr-defined]
        else:
            found.append((stage, []))
        dist.barrier()
        found.append(len(list(repo.log("llm@main"))) if repo.models() else 0)
    return found


def test_a_rank_that_fails_leaves_nothing_visible_and_the_next_save_succeeds(tmp_path: Path) -> None:
    place = str(tmp_path / "repository")
    lamella.init(place)
    for found in run_ranks(fail_on_a_rank, 3, tmp_path, place):
        assert found[0][0] == "set up"
        assert "OSError" in found[0][1]
        assert found[1] == 0
        assert "OSError" in found[2][1]
        assert found[3] == 0
        assert found[4:] == [("", []), 1]
    assert lamella.open(place).verify(deep=True).ok


def die_while_others_save(rank: int, world: int, place: str) -> str:
    mesh = init_device_mesh("cpu", (world,))
    state = state_on(mesh)
    if rank == world - 1:

        class Dying(LamellaWriter):
            def write_data(self, plan: Any, planner: Any) -> Any:
                os.kill(os.getpid(), signal.SIGKILL)

        dcp.save(state, storage_writer=Dying(place, "llm@main"))
    try:
        dcp.save(state, storage_writer=LamellaWriter(place, "llm@main"))
    except BaseException:
        os._exit(3)
    return "saved"


def test_a_rank_that_dies_leaves_nothing_visible(tmp_path: Path) -> None:
    from torch.multiprocessing.spawn import ProcessExitedException

    place = str(tmp_path / "repository")
    repo = lamella.init(place)
    with pytest.raises(ProcessExitedException):
        run_ranks(die_while_others_save, 2, tmp_path, place)
    assert repo.models() == []
    assert repo.verify(deep=True).ok
    dcp.save(state_on(None), storage_writer=LamellaWriter(repo, "llm@main"))
    assert leaves(lamella.torch.state(repo, "llm@main")) == leaves(state_on(None))
