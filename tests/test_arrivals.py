"""What a push reads from a GPU, which the CPU plays: the same bytes, ahead of time, within bounds."""

import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from gpus import FakeGpu, playing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import tensors as drawn_tensors
from support import PATIENCE_S, new_repository, noise
from workers import push_shared, split

import lamella
import lamella.torch
from lamella_engine.boxes import Octets
from lamella_engine.checkpoints import MemoryCheckpoint, arrivals, expect
from lamella_engine.checkpoints.arrivals import RING_NBYTES, Arrivals, Ring, Span
from lamella_engine.checkpoints.pages import Pages
from lamella_engine.dtypes import DTYPES
from lamella_engine.errors import InvalidInputError
from lamella_engine.executor import ThreadExecutor
from lamella_engine.torch_tensors import Cuda

MIB = 1 << 20
CELL_NBYTES = 1 * MIB
"""Of a tensor of bytes: a cell has 2^20 elements."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with playing(monkeypatch) as gpu, gpu.landing_at_once():
        yield gpu


@pytest.fixture
def small_ring(monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the length of a ring that has room for two cells, and a piece that is of no use."""
    monkeypatch.setattr(arrivals, "RING_NBYTES", nbytes := 2 * CELL_NBYTES + CELL_NBYTES // 2)
    return nbytes


def octets(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def weights() -> dict[str, torch.Tensor]:
    """Return tensors of several cells and of parts of one, and such as lie otherwise than they are stored."""
    return {
        "bytes": octets(0, 5, CELL_NBYTES),
        "turned": torch.from_numpy(noise(1, 300, 500)).t(),
        "every other": torch.from_numpy(noise(2, 4000, 100))[::2],
        "half": torch.from_numpy(noise(3, 1000, 100)).bfloat16(),
        "conjugate": torch.from_numpy(noise(4, 40, 20)).to(torch.complex64).conj(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        **{f"short.{number}": torch.from_numpy(noise(number, 10)) for number in range(20)},
    }


def parameters_on_the_cpu(tensors: dict[str, torch.Tensor]) -> str:
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Cuda, "holds", lambda self, tensor: False)
        return new_repository().push(tensors, "m@main").parameters_id


# -- the same bytes ----------------------------------------------------------------------------------------------------


class Near(Cuda):
    """Tensors of the CPU, whatever is played."""

    def holds(self, tensor: torch.Tensor) -> bool:
        return False


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_dtype_layout_and_bit_arrives_as_it_is_read_otherwise(gpu: FakeGpu, data: st.DataObject) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for number, dtype in enumerate(data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))):
        drawn = data.draw(drawn_tensors(dtype))
        if dtype.numpy is None or not hasattr(torch, dtype.name):
            continue
        bits = torch.frombuffer(bytearray(np.ascontiguousarray(drawn).tobytes() or b"\0" * 16), dtype=torch.uint8)
        tensor = bits[: drawn.nbytes].view(getattr(torch, dtype.name)).reshape(drawn.shape)
        tensors[f"{number}"] = tensor
        if tensor.dim() > 1:
            tensors[f"{number}.turned"] = tensor.transpose(0, -1)
            tensors[f"{number}.part"] = tensor[:, 1::2]
        if tensor.is_complex():
            tensors[f"{number}.conjugate"] = tensor.conj()
    if hasattr(torch, "float4_e2m1fn_x2"):
        tensors["packed"] = torch.arange(64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with MemoryCheckpoint(tensors, Near()) as direct:
        cells = [(spec, region) for spec in direct.structure for region in spec.grid.regions()]
        expected = [bytes(direct.read(spec, region)) for spec, region in cells]
    order = data.draw(st.permutations(range(len(cells))))
    unexpected = data.draw(st.sets(st.sampled_from(order))) if cells else set()
    before = gpu.unpinned_copies
    with MemoryCheckpoint(tensors) as far:
        for at, (spec, region) in enumerate(cells):
            if at not in unexpected:
                expect(far, spec, region)
        for at in order:
            assert bytes(far.read(*cells[at])) == expected[at], cells[at]
            assert bytes(far.read(*cells[at])) == expected[at], "read once more"
    assert gpu.unpinned_copies - before == len(cells) + len(unexpected)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_push_from_a_gpu_records_what_one_from_the_cpu_does(gpu: FakeGpu, threads: int) -> None:
    state = weights()
    repo = new_repository(executor=ThreadExecutor(threads=threads))
    assert repo.push(state, "m@main").parameters_id == parameters_on_the_cpu(state)
    assert repo.verify(deep=True).ok


def test_a_ring_that_is_shorter_than_what_is_asked_for_makes_the_same_version(gpu: FakeGpu, small_ring: int) -> None:
    state = weights()
    repo = new_repository(executor=ThreadExecutor(threads=4))
    assert repo.push(state, "m@main").parameters_id == parameters_on_the_cpu(state)
    assert gpu.most_pinned == small_ring


def test_a_tensor_that_is_larger_than_the_ring_is_read_whole(gpu: FakeGpu, small_ring: int) -> None:
    state = weights()
    with MemoryCheckpoint(state) as far:
        for spec in far.structure:
            tensor = state[spec.name].resolve_conj().contiguous().reshape(-1)
            assert bytes(far.whole(spec)) == bytes(tensor.view(torch.uint8).numpy()), spec.name


@pytest.mark.parametrize("workers", [1, 3])
def test_shards_on_gpus_make_the_version_that_one_push_makes(gpu: FakeGpu, workers: int) -> None:
    arrays = {"a": noise(0, 900, 700), "b": noise(1, 64, 3000), "c": noise(2, 5)}
    held = [
        # A shard that was cut across its rows does not lie in one piece on its device.
        [(name, box, torch.from_numpy(np.asfortranarray(part) if name == "b" else part)) for name, box, part in some]
        for some in split(arrays, workers, lambda name: {"b": 1, "c": None}.get(name, 0))
    ]
    repo = new_repository()
    version, _ = push_shared([repo] * workers, "m@main", arrays, held)
    assert version.parameters_id == new_repository().push(arrays, "m@main").parameters_id
    assert len(gpu.streams) == workers
    assert gpu.most_pinned


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that it is alone
def test_dcp_saves_from_a_gpu_what_lamella_pushes(gpu: FakeGpu) -> None:
    repo = new_repository(executor=ThreadExecutor(threads=2))
    state = {"w": octets(0, 3, CELL_NBYTES), "b": torch.from_numpy(noise(1, 30)), "step": 7}
    dcp.save(state, storage_writer=lamella.torch.LamellaWriter(repo, "m@main"), no_dist=True)
    assert repo.version("m@main").parameters_id == parameters_on_the_cpu({"w": state["w"], "b": state["b"]})
    assert gpu.copies - gpu.unpinned_copies == 4


# -- ahead, and within bounds ------------------------------------------------------------------------------------------


def test_cells_are_on_their_way_before_those_in_front_of_them_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    with playing(monkeypatch) as gpu:
        repo = new_repository(executor=ThreadExecutor(threads=2))
        pushed: list[lamella.Version] = []
        push = threading.Thread(target=lambda: pushed.append(repo.push({"w": octets(0, 12, CELL_NBYTES)}, "m@main")))
        push.start()
        for _ in range(5):  # two threads wait for the first two, which do not come
            assert gpu.queued.acquire(timeout=PATIENCE_S)
        gpu.let_all_land()
        push.join(PATIENCE_S)
        assert pushed
        assert gpu.copies == 12
        assert not gpu.unpinned_copies


def test_no_more_memory_is_pinned_than_the_ring_may_have_or_the_tensors_need(gpu: FakeGpu) -> None:
    with MemoryCheckpoint({"w": octets(0, 4 * RING_NBYTES // CELL_NBYTES, 1).expand(-1, CELL_NBYTES)}) as far:
        (spec,) = far.structure
        for region in spec.grid.regions():
            expect(far, spec, region)
        assert gpu.most_pinned == RING_NBYTES
        assert gpu.copies == RING_NBYTES // CELL_NBYTES
    gc.collect()
    gpu.most_pinned = 0
    new_repository().push({"w": octets(0, 100_000)}, "m@main")
    assert 100_000 <= gpu.most_pinned < 100_100


def test_room_of_what_was_read_is_used_again(gpu: FakeGpu, small_ring: int) -> None:
    new_repository().push({"w": octets(0, 12, CELL_NBYTES)}, "m@main")
    assert gpu.most_pinned == small_ring
    assert gpu.copies == 12
    assert not gpu.unpinned_copies


def test_a_cell_that_is_asked_for_twice_is_copied_once(gpu: FakeGpu) -> None:
    with MemoryCheckpoint({"w": octets(0, 10)}) as far:
        (spec,) = far.structure
        for _ in range(3):
            expect(far, spec, spec.grid.region(0))
        assert bytes(far.read(spec, spec.grid.region(0))) == octets(0, 10).numpy().tobytes()
        assert gpu.copies == 1


def test_copies_wait_for_the_stream_of_the_thread_that_pushes_whatever_thread_reads(gpu: FakeGpu) -> None:
    mine = gpu.stream_of(torch.device("cpu"))
    with gpu.queuing(mine):
        new_repository(executor=ThreadExecutor(threads=3)).push(weights(), "m@main")
    _, *others = gpu.streams
    assert [stream.waits_for for stream in others] == [[mine]]
    assert others[0].done == gpu.copies


def test_a_system_that_pins_no_memory_is_pushed_from_all_the_same(gpu: FakeGpu) -> None:
    gpu.registering_fails = 2
    state = weights()
    assert new_repository().push(state, "m@main").parameters_id == parameters_on_the_cpu(state)
    assert gpu.unpinned_copies == gpu.copies


def test_tensors_of_the_cpu_are_neither_copied_nor_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {name: tensor.contiguous() for name, tensor in weights().items() if name != "conjugate"}
    read = MemoryCheckpoint.read
    found: list[bool] = []

    def seen(self, tensor, region, out=None):  # type: ignore[no-untyped-def]
        data = read(self, tensor, region, out)
        own = state[tensor.name].reshape(-1).view(torch.uint8).numpy()
        found.append(np.shares_memory(np.frombuffer(data, np.uint8), own))
        return data

    def never(*_: object) -> None:
        raise AssertionError("nothing lies on a GPU")

    monkeypatch.setattr(MemoryCheckpoint, "read", seen)
    for owner, name in ((Cuda, "stream"), (Cuda, "pin"), (Arrivals, "expect"), (Arrivals, "read"), (Pages, "__init__")):
        monkeypatch.setattr(owner, name, never)
    new_repository(executor=ThreadExecutor(threads=2)).push(state, "m@main")
    assert len(found) > 25
    assert all(found)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_copy_that_fails_ends_the_push_and_gives_the_memory_back(gpu: FakeGpu) -> None:
    gpu.broken_after = 7
    repo = new_repository(executor=ThreadExecutor(threads=2))
    with pytest.raises(RuntimeError, match="CUDA error"):
        repo.push({"w": octets(0, 12, CELL_NBYTES)}, "m@main")
    assert repo.models() == []
    gc.collect()
    assert not gpu.pinned


def test_a_tensor_that_changes_while_its_cells_arrive_is_refused(gpu: FakeGpu) -> None:
    tensor = octets(0, 12, CELL_NBYTES)
    repo = new_repository(executor=ThreadExecutor(threads=2))
    with pytest.raises(InvalidInputError) as refusal:
        repo.push({"w": tensor}, "m@main", progress=lambda _: tensor[-1].add_(1))
    assert refusal.value.kind == "source_changed"
    assert repo.models() == []


def test_a_tensor_that_was_freed_is_named_when_it_is_asked_for(gpu: FakeGpu) -> None:
    state = {"w": octets(0, 100).clone()}
    with MemoryCheckpoint(state) as far:
        (spec,) = far.structure
        state["w"].untyped_storage().resize_(0)
        for ask in (expect, MemoryCheckpoint.read):
            with pytest.raises(InvalidInputError, match="'w'") as refusal:
                ask(far, spec, spec.grid.region(0))
            assert refusal.value.kind == "freed_tensor"
    assert not gpu.copies


@pytest.mark.parametrize("shared", [False, True])
def test_what_was_asked_for_and_never_read_is_waited_for(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    read = MemoryCheckpoint.read

    def interrupted(self, tensor, region, out=None):  # type: ignore[no-untyped-def]
        if region.start >= 2 * CELL_NBYTES:
            raise KeyboardInterrupt
        return read(self, tensor, region, out)

    monkeypatch.setattr(MemoryCheckpoint, "read", interrupted)
    arrays = {"w": octets(0, 8, CELL_NBYTES).numpy()}
    repo = new_repository(executor=ThreadExecutor(threads=2))
    tensor = torch.from_numpy(arrays["w"])

    def push() -> object:
        held = [[("w", ((0, 8), (0, CELL_NBYTES)), tensor)]]
        return push_shared([repo], "m@main", arrays, held) if shared else repo.push({"w": tensor}, "m@main")

    with pytest.raises(KeyboardInterrupt):
        push()
    (stream,) = gpu.streams
    assert gpu.copies > 2
    assert not stream.queue
    gc.collect()
    assert gpu.most_pinned
    assert not gpu.pinned


# -- the ring ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.integers(1, 900), st.tuples(st.integers(0, 8))), max_size=60))
def test_pieces_of_a_ring_lie_apart_and_its_room_comes_back(steps: "list[int | tuple[int]]") -> None:
    pages = Pages(4096, None)
    ring = Ring(pages)
    held: list[tuple[Span, Octets]] = []
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            if held:
                ring.give_back(held.pop(step[0] % len(held))[0])
            continue
        span = ring.take(step)
        if span is not None:
            span.octets[:] = number % 256
            held.append((span, span.octets.copy()))
        else:
            assert held
        assert all((span.octets == written).all() for span, written in held)
        assert sum(span.octets.nbytes for span, _ in held) <= 4096
    for span, _ in held:
        ring.give_back(span)
    everything = ring.take(4096)
    assert everything is not None
    assert ring.take(1) is None


def test_a_ring_without_memory_has_room_for_nothing() -> None:
    assert Ring(None).take(1) is None
