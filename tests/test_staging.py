"""Pushes that nobody waits for: what they record, what they hold, in which order, and how their failures are seen."""

import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest
import s3
import torch
from gpus import FakeGpu, playing
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from service import serving
from strategies import tensors as drawn_tensors
from support import PATIENCE_S, bits, new_repository, noise

import lamella
import lamella.torch
from lamella_engine.checkpoints import MemoryCheckpoint
from lamella_engine.checkpoints.staging import STAGED_COPIES, Staging
from lamella_engine.dtypes import DTYPES
from lamella_engine.errors import ConflictError, InvalidInputError, LimitError, StorageError
from lamella_engine.executor import ThreadExecutor
from lamella_engine.objects.memory import MemoryObjects

NAN_WITH_A_PAYLOAD = 0x7FC0BEEF


class GatedObjects(MemoryObjects):
    """Objects that keep a push from its end until they are told to let it, or have it fail."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Semaphore(0)
        self.broken = False

    def put_if_absent(self, name, parts) -> None:
        if name.startswith("packs/"):
            self.reached.release()
            assert self.open.wait(PATIENCE_S)
            if self.broken:
                raise StorageError("the disk is full", kind="write_failed")
        super().put_if_absent(name, parts)


@pytest.fixture
def objects() -> Iterator[GatedObjects]:
    objects = GatedObjects()
    yield objects
    objects.open.set()


@pytest.fixture
def repo(objects: GatedObjects) -> Iterator[lamella.Repository]:
    repo = new_repository(objects, ThreadExecutor(threads=2))
    yield repo
    objects.open.set()
    objects.broken = False
    try:
        repo.close()
    except StorageError:
        repo.close()


def published(handle: lamella.PushHandle) -> lamella.Version:
    return handle.published.result(PATIENCE_S)


def spoil(tensors) -> None:
    """Fill every tensor with NaNs that have a payload, or the same bits of whatever it is."""
    for tensor in tensors.values():
        array = tensor.detach().numpy() if isinstance(tensor, torch.Tensor) else tensor
        array.view(np.uint32)[...] = NAN_WITH_A_PAYLOAD


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_what_the_tensors_were_when_they_were_staged(repo, objects):
    weights = {"array": noise(0, 300, 200), "tensor": torch.from_numpy(noise(1, 100, 50))}
    kept = bits({"array": weights["array"].copy(), "tensor": weights["tensor"].clone().numpy()})
    expected = new_repository().push(weights, "m@main")
    objects.open.clear()
    before = repo.push({"w": noise(2, 100, 100)}, "other@main", wait=False)
    handle = repo.push(weights, "m@main", wait=False)
    handle.staged.result(0)
    spoil(weights)
    assert not before.published.done()  # so nothing of the other has been read yet
    objects.open.set()
    version = published(handle)
    assert version.parameters_id == expected.parameters_id
    assert bits(repo.checkout("m@main")) == kept


@given(st.data())
def test_every_dtype_layout_and_bit_is_staged_as_it_is_pushed(data):
    """NumPy's arrays, of any strides and byte order, and torch's where it has the dtype."""
    weights: dict[str, object] = {}
    for number, dtype in enumerate(data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=5))):
        if dtype.numpy is None:
            continue
        array = data.draw(drawn_tensors(dtype))
        weights[f"array.{number}"] = array
        weights[f"swapped.{number}"] = (
            array.astype(array.dtype.newbyteorder(">")) if array.dtype.kind in "iuf" else array
        )
        if hasattr(torch, dtype.name) and array.size:
            octets = torch.frombuffer(bytearray(np.ascontiguousarray(array).tobytes()), dtype=torch.uint8)
            tensor = octets.view(getattr(torch, dtype.name)).reshape(array.shape)
            weights[f"tensor.{number}"] = tensor.transpose(0, -1) if tensor.dim() > 1 else tensor
            if tensor.is_complex():
                weights[f"conjugate.{number}"] = tensor.conj()
    if not weights:
        return
    with MemoryCheckpoint(weights) as direct, Staging().copy(MemoryCheckpoint(weights)) as staged:
        assert staged.structure == direct.structure
        for spec in direct.structure:
            for region in spec.grid.regions():
                assert bytes(staged.read(spec, region)) == bytes(direct.read(spec, region)), spec


def test_packed_floats_are_staged_too(repo):
    weights = {"w": torch.arange(64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    assert published(repo.push(weights, "m@main", wait=False)).parameters_id == (
        new_repository().push(weights, "m@main").parameters_id
    )


def test_tied_tensors_are_staged_once_and_views_that_differ_are_not_mixed_up():
    table = torch.from_numpy(noise(0, 1000, 64))
    array = noise(1, 512, 64)
    weights = {
        "in": table,
        "out": table,
        "part": table[:10],
        "turned": table.t(),
        "bits": table.view(torch.int32),
        "a": array,
        "again": array,
        "backwards": array[::-1],
    }
    staging = Staging()
    with staging.copy(MemoryCheckpoint(weights)) as staged, MemoryCheckpoint(weights) as direct:
        for spec in direct.structure:
            for region in spec.grid.regions():
                assert bytes(staged.read(spec, region)) == bytes(direct.read(spec, region)), spec.name
    held = sum(memory.octets.nbytes for memory in staging._free)
    distinct = 3 * table.nbytes + table[:10].nbytes + 2 * array.nbytes
    assert distinct <= held < distinct + table.nbytes // 2


def test_a_recipe_that_changes_afterwards_is_recorded_as_it_was(repo, objects):
    objects.open.clear()
    recipe = {"lr": 1.0, "betas": [0.9]}
    handle = repo.push({"w": noise(0, 100)}, "m@main", recipe=recipe, wait=False)
    recipe["lr"] = 2.0
    recipe["betas"].append(0.5)
    objects.open.set()
    assert published(handle).recipe == {"lr": 1.0, "betas": [0.9]}


def test_a_file_needs_no_staging_and_must_stay_as_it_is(repo, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": noise(0, 200, 200)}, path)
    rewritten = threading.Event()
    handle = repo.push(path, "m@main", progress=lambda _: rewritten.wait(PATIENCE_S), wait=False)
    handle.staged.result(0)
    save_file({"w": noise(1, 200, 200)}, path)
    rewritten.set()
    with pytest.raises(InvalidInputError) as refusal:
        published(handle)
    assert refusal.value.kind == "source_changed"


def test_modules_optimizers_and_nested_states_are_staged(repo):
    module = torch.nn.Linear(30, 20)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(30)).sum().backward()
    optimizer.step()
    handles = [
        lamella.torch.push(module, repo, "m@main", wait=False),
        lamella.torch.push(optimizer, repo, "adam@main", wait=False),
        lamella.torch.push({"step": 3, "state": [{"w": np.ones(4)}]}, repo, "all@main", wait=False),
    ]
    weight = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.zero_()
    for handle in handles:
        published(handle)
    assert torch.equal(lamella.torch.state(repo, "m@main")["weight"], weight)
    assert lamella.torch.state(repo, "adam@main")["state"][0]["step"] == 1
    assert lamella.torch.state(repo, "all@main")["step"] == 3


def test_a_push_that_equals_the_head_gives_the_head(repo):
    weights = {"w": noise(0, 100)}
    first = repo.push(weights, "m@main")
    assert published(repo.push(weights, "m@main", wait=False)) == first


def test_progress_is_told(repo):
    seen: list[lamella.Progress] = []
    weights = {"w": noise(0, 100, 100)}
    published(repo.push(weights, "m@main", progress=seen.append, wait=False))
    assert seen[-1].done_nbytes == seen[-1].total_nbytes == weights["w"].nbytes


# -- order and room ----------------------------------------------------------------------------------------------------


def test_each_push_stands_on_the_one_before_and_one_that_waits_comes_last(repo):
    weights = {"w": noise(0, 400, 100)}
    handles = []
    for step in range(5):
        weights["w"] += 1
        handles.append(repo.push(weights, "m@main", message=str(step), wait=False))
    last = repo.push({"w": weights["w"] * 2}, "m@main", message="5")
    assert all(handle.published.done() for handle in handles)
    assert [version.message for version in repo.log("m@main")] == ["5", "4", "3", "2", "1", "0"]
    assert last.number == 6


def test_a_transaction_stands_on_the_pushes_before_it(repo, objects):
    handle = repo.push({"w": noise(0, 100, 100)}, "m@main", wait=False)
    with repo.transaction("m@main") as group:
        group.create_array("w", data=noise(1, 10))
    assert repo.version("m@main").parents == (published(handle).id,)


def test_a_push_without_room_waits_for_it(repo, objects, monkeypatch):
    changed = repo._background._staging._changed
    wait_for, without_room = changed.wait_for, threading.Event()

    def wait_visibly(has_room: Callable[[], bool]) -> bool:
        if not has_room():
            without_room.set()
        return wait_for(has_room, PATIENCE_S)

    monkeypatch.setattr(changed, "wait_for", wait_visibly)
    objects.open.clear()
    handles = [repo.push({"w": noise(seed, 200, 200)}, "m@main", wait=False) for seed in range(STAGED_COPIES)]
    late: list[lamella.PushHandle] = []
    third = threading.Thread(target=lambda: late.append(repo.push({"w": noise(9, 200, 200)}, "m@main", wait=False)))
    third.start()
    assert without_room.wait(PATIENCE_S)
    assert not late
    assert not any(handle.published.done() for handle in handles)
    objects.open.set()
    third.join(PATIENCE_S)
    assert published(late[0]).number == 3


def test_memory_is_used_again_and_never_more_than_two_copies(repo):
    addresses = set()
    staging = repo._background._staging
    for seed in range(8):
        rows = 300 if seed < 4 else 400
        published(repo.push({"w": noise(seed, rows, 100)}, "m@main", wait=False))
        addresses |= {memory.octets.ctypes.data for memory in staging._free}
        assert len(staging._free) == 1
    assert len(addresses) <= 2
    repo.close()
    assert not staging._free


def test_a_larger_checkpoint_takes_the_place_of_memory_that_is_too_small():
    staging = Staging()
    copies = [staging.copy(MemoryCheckpoint({"w": np.zeros(size, np.uint8)})) for size in (10_000, 20_000)]
    for copy in copies:
        copy.close()
        copy.close()
    with staging.copy(MemoryCheckpoint({"w": np.zeros(30_000, np.uint8)})):
        assert [memory.octets.nbytes for memory in staging._free] == [20_032]
    with staging.copy(MemoryCheckpoint({"w": np.zeros(20_000, np.uint8)})) as copy:
        assert copy._memory.octets.nbytes == 20_032


def test_a_copy_that_was_closed_is_refused():
    weights = {"w": noise(0, 10)}
    copy = Staging().copy(MemoryCheckpoint(weights))
    (spec,) = copy.structure
    copy.close()
    with pytest.raises(InvalidInputError) as refusal:
        copy.read(spec, spec.grid.region(0))
    assert refusal.value.kind == "closed"


# -- refusals and failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "options", "kind"),
    [
        ({"w": "text"}, "m@main", {}, "not_a_tensor"),
        ({}, "m@main", {}, "empty_source"),
        ({"w": np.zeros(1)}, "m@v1", {}, "bad_name"),
        ({"w": np.zeros(1)}, "m@main", {"metrics": {"loss": "low"}}, "bad_metric"),
        ({"w": torch.zeros(1, device="meta")}, "m@main", {}, "meta_tensor"),
    ],
)
def test_what_no_push_takes_is_refused_by_the_call(repo, source, target, options, kind):
    with pytest.raises(InvalidInputError) as refusal:
        repo.push(source, target, wait=False, **options)
    assert refusal.value.kind == kind


def test_a_failure_is_raised_by_the_next_push_to_the_branch_alone_and_once(repo, objects, caplog):
    objects.broken = True
    handle = repo.push({"w": noise(0, 100, 100)}, "m@main", wait=False)
    assert wait([handle.published], PATIENCE_S).done
    objects.broken = False
    published(repo.push({"w": noise(1, 100, 100)}, "m@other", wait=False))
    with pytest.raises(StorageError) as failure:
        repo.push({"w": noise(2, 100, 100)}, "m@main", wait=False)
    assert "m@main" in failure.value.__notes__[0]
    assert repo.push({"w": noise(2, 100, 100)}, "m@main").number == 2
    assert "m@main" in caplog.text


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_a_failure_that_was_asked_for_is_not_raised_again(repo, objects, ask):
    objects.broken = True
    handle = repo.push({"w": noise(0, 100, 100)}, "m@main", wait=False)
    if ask == "result":
        with pytest.raises(StorageError):
            published(handle)
    else:
        assert isinstance(handle.published.exception(PATIENCE_S), StorageError)
    objects.broken = False
    assert repo.push({"w": noise(0, 100, 100)}, "m@main").number == 1
    repo.close()


def test_close_waits_and_raises_what_nobody_has_seen(repo, objects):
    objects.open.clear()
    good = repo.push({"w": noise(0, 100, 100)}, "m@main", wait=False)
    closing = threading.Thread(target=repo.close)
    closing.start()
    objects.open.set()
    closing.join(PATIENCE_S)
    assert good.published.result(0).number == 1
    with pytest.raises(InvalidInputError) as refusal:
        repo.push({"w": noise(0, 100, 100)}, "m@main", wait=False)
    assert refusal.value.kind == "closed"


def test_the_end_of_a_with_block_raises_a_failure_but_covers_no_other_error():
    def fail(error: Exception | None) -> None:
        objects = GatedObjects()
        objects.broken = True
        with new_repository(objects) as repo:
            repo.push({"w": noise(0, 100, 100)}, "m@main", wait=False)
            if error is not None:
                raise error

    with pytest.raises(StorageError):
        fail(None)
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_a_branch_that_is_not_where_it_was_expected_is_a_conflict(repo):
    first = repo.push({"w": noise(0, 10)}, "m@main")
    repo.push({"w": noise(1, 10)}, "m@main")
    handle = repo.push({"w": noise(2, 10)}, "m@main", parent=first.id, wait=False)
    assert isinstance(handle.published.exception(PATIENCE_S), ConflictError)


def test_a_push_that_has_not_begun_can_be_taken_back(repo, objects):
    objects.open.clear()
    first = repo.push({"w": noise(0, 100, 100)}, "m@main", wait=False)
    assert objects.reached.acquire(timeout=PATIENCE_S)
    second = repo.push({"w": noise(1, 100, 100)}, "m@main", wait=False)
    assert second.published.cancel()
    assert not first.published.cancel()
    assert repo._background._staging._taken == 1
    third = repo.push({"w": noise(2, 100, 100)}, "m@main", wait=False)
    objects.open.set()
    with pytest.raises(CancelledError):
        published(second)
    assert published(third).parents == (published(first).id,)


# -- processes ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import numpy as np
import lamella

repo = lamella.{verb}(sys.argv[1])
weights = np.random.default_rng(0).standard_normal((2000, 1000)).astype(np.float32)
for step in range(2):
    repo.push({{"w": weights + step}}, "m@main", message=str(step), wait=False)
{end}
"""


def run_script(url: str, verb: str = "init", end: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(verb=verb, end=textwrap.dedent(end)), url],
        check=False, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip


def test_a_program_that_ends_has_its_pushes_recorded(tmp_path):
    done = run_script(str(tmp_path / "r"), end="del repo\nraise SystemExit")
    assert (done.returncode, done.stderr) == (0, "")
    repo = lamella.open(str(tmp_path / "r"))
    assert [version.message for version in repo.log("m@main")] == ["1", "0"]
    assert not repo.verify(deep=True).problems


def test_a_program_that_ends_has_its_pushes_recorded_by_a_service(tmp_path):
    with serving(tmp_path) as server:
        done = run_script(url := f"grpc://{server.address}/r")
        assert (done.returncode, done.stderr) == (0, "")
        assert lamella.open(url).version("m@main").message == "1"


def test_a_program_that_ends_has_its_pushes_recorded_in_a_bucket(moto, use):
    use(moto)
    lamella.init(url := s3.new_url())
    done = run_script(url, verb="open")  # whose first write tries what the bucket keeps
    assert (done.returncode, done.stderr) == (0, "")
    assert lamella.open(url).version("m@main").message == "1"


def test_a_failure_that_nobody_waited_for_is_printed(tmp_path):
    done = run_script(
        str(tmp_path / "r"),
        end="repo._store.begin = lambda *_, **__: 1 / 0\nrepo.push({'w': weights}, 'm@main', wait=False)",
    )
    assert "m@main" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_a_fork_has_pushes_of_its_own_and_not_its_parents(tmp_path):
    repo = lamella.init(str(tmp_path / "r"))
    begun, go_on = threading.Event(), threading.Event()

    def hold(_: lamella.Progress) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)

    handle = repo.push({"w": noise(0, 100, 100)}, "m@main", progress=hold, wait=False)
    assert begun.wait(PATIENCE_S)
    child = os.fork()
    if not child:  # pragma: no cover
        try:
            mine = repo.push({"w": noise(1, 100, 100)}, "m@child", wait=False)
            good = mine.published.result(PATIENCE_S).message == ""
            try:
                handle.published.result(PATIENCE_S)
            except InvalidInputError as error:
                os._exit(42 if good and error.kind == "forked" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    go_on.set()
    published(handle)
    assert {ref.name for ref in repo.refs("m")} == {"main", "child"}
    repo.close()


def test_a_handle_does_not_pickle(repo):
    handle = repo.push({"w": noise(0, 10)}, "m@main", wait=False)
    with pytest.raises(TypeError):
        pickle.dumps(handle)
    published(handle)


# -- GPUs, played by the CPU -------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with playing(monkeypatch) as gpu:
        yield gpu


def test_tensors_on_a_gpu_are_staged_when_their_copies_have_arrived(gpu, repo):
    weights = {
        "w": torch.from_numpy(noise(0, 300, 200)),
        "turned": torch.from_numpy(noise(1, 50, 40)).t(),
        "half": torch.from_numpy(noise(2, 1000)).bfloat16(),
        "step": torch.tensor(3.0),
        "array": noise(3, 10, 10),
    }
    with gpu.landing_at_once():
        expected = new_repository().push(
            {name: tensor.copy() if name == "array" else tensor.clone() for name, tensor in weights.items()}, "m@a"
        )
    handle = repo.push(weights, "m@main", wait=False)
    stream = gpu.streams[-1]
    assert stream.waits_for == gpu.entered
    assert len(stream.queue) == 4
    assert not handle.staged.done()
    assert not handle.published.done()
    gpu.let_all_land()
    handle.staged.result(PATIENCE_S)
    spoil({"w": weights["w"], "array": weights["array"].view(np.uint32)})
    assert published(handle).parameters_id == expected.parameters_id


def test_a_tensor_on_a_gpu_that_changes_before_it_is_staged_is_refused(gpu, repo):
    weights = {"w": torch.zeros(100)}
    handle = repo.push(weights, "m@main", wait=False)
    weights["w"].add_(1)
    gpu.let_all_land()
    for future in (handle.staged, handle.published):
        error = future.exception(PATIENCE_S)
        assert isinstance(error, InvalidInputError)
        assert error.kind == "source_changed"


def test_memory_for_a_gpu_is_pinned_once_and_unpinned_in_the_end(gpu, repo):
    for step in range(3):
        handle = repo.push({"w": torch.full((1000,), float(step))}, "m@main", wait=False)
        gpu.let_all_land()
        published(handle)
    assert len(gpu.pinned) == 1
    assert next(iter(gpu.pinned.values())) >= 4000
    repo.close()
    del handle
    gc.collect()
    assert not gpu.pinned


def test_memory_that_is_not_pinned_is_not_given_to_a_gpu(gpu, repo):
    published(repo.push({"w": noise(0, 5000)}, "m@main", wait=False))
    handle = repo.push({"w": torch.from_numpy(noise(1, 1000))}, "m@main", wait=False)
    assert len(gpu.pinned) == 1
    gpu.let_all_land()
    published(handle)


def test_a_system_that_pins_no_memory_refuses_and_keeps_its_room(gpu, repo):
    gpu.registering_fails = 2
    for _ in range(STAGED_COPIES + 1):
        with pytest.raises(LimitError) as refusal:
            repo.push({"w": torch.zeros(100)}, "m@main", wait=False)
        assert refusal.value.kind == "not_pinned"
    gpu.registering_fails = 0
    handle = repo.push({"w": torch.zeros(100)}, "m@main", wait=False)
    gpu.let_all_land()
    assert published(handle).number == 1


def test_a_push_that_is_taken_back_gives_its_memory_back_when_its_copies_have_arrived(gpu, repo, objects):
    objects.open.clear()
    first = repo.push({"w": noise(0, 100, 100)}, "m@main", wait=False)
    assert objects.reached.acquire(timeout=PATIENCE_S)
    second = repo.push({"w": torch.zeros(1000)}, "m@main", wait=False)
    gpu.let_all_land()
    assert second.published.cancel()
    assert not gpu.streams[0].queue
    objects.open.set()
    assert published(first).number == 1


def test_a_copy_whose_source_cannot_be_let_go_gives_its_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: MemoryCheckpoint) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    staging = Staging()
    with monkeypatch.context() as patch:
        patch.setattr(MemoryCheckpoint, "close", fail)
        for _ in range(STAGED_COPIES):
            with pytest.raises(RuntimeError, match="launch failure"):
                staging.copy(MemoryCheckpoint({"w": np.zeros(4)}))
    assert staging._taken == 0
    staging.copy(MemoryCheckpoint({"w": np.zeros(4)})).close()
