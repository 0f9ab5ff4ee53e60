"""A checkpoint that several workers hold becomes the version that one worker with all of it would have pushed."""

import pickle
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from faults import CountingObjects
from hypothesis import given
from hypothesis import strategies as st
from service import serving
from support import PATIENCE_S, Array, bits, names_of, new_repository, open_again, store_of
from workers import Held, Meeting, ThreadExchange, cut, push_shared, shard, split, structure_of

import lamella
from lamella_engine import sharding
from lamella_engine.boxes import Box, box_of
from lamella_engine.checkpoints.shards import Shards
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.dtypes import dtype_named
from lamella_engine.errors import (
    ConflictError,
    InvalidInputError,
    LamellaError,
    LimitError,
    StorageError,
    TensorNotFoundError,
)
from lamella_engine.exchanging import Alone
from lamella_engine.model import Cell, TensorSpec
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.repository import Repository
from lamella_engine.service.quotas import PUSHES_OF_ONE, Quotas
from lamella_engine.sharding import ROUND_NBYTES, Share, share_out


def weights(step: float = 0.0) -> dict[str, Array]:
    rng, drift = np.random.default_rng(0), np.random.default_rng(99)

    def tensor(*shape: int, dtype: Any = np.float32) -> Array:
        base = rng.standard_normal(shape).astype(np.float32)
        moved: Array = (base + np.float32(step) * drift.standard_normal(shape).astype(np.float32)).astype(dtype)
        return moved

    return {
        "cube": tensor(6, 50, 70),
        "embed": tensor(1031, 640),  # one cell, which every worker has a part of
        "empty": np.zeros((0, 5), np.float32),
        "half": tensor(300, 4100, dtype=ml_dtypes.bfloat16),
        "layer.bias": tensor(2100),
        "layer.weight": tensor(700, 2100),  # cells that no worker's rows line up with
        "odd": np.frombuffer(b"\x01\x00\xc0\x7f\x00\x00\x00\x80" * 40, np.float32).reshape(8, 10).copy(),
        "state.layer.weight.exp_avg": tensor(700, 2100) * np.float32(1e-3),
        "state.layer.weight.exp_avg_sq": tensor(700, 2100) ** 2 * np.float32(1e-6),
        "state.layer.weight.step": np.float32(7.0).reshape(()),
    }


AXES = {"layer.bias": None, "state.layer.weight.step": None, "empty": None, "cube": 1, "half": 1}


def axis_of(name: str) -> int | None:
    return AXES.get(name, 0)


def pack_nbytes(repo: Repository) -> int:
    return sum(nbytes for name, nbytes in names_of(store_of(repo).objects).items() if name.startswith("packs/"))


# -- the same version --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_every_number_of_workers_makes_the_same_version_as_one_push(workers: int) -> None:
    first, second = weights(), weights(step=1e-3)
    plain = new_repository()
    plain.push(first, "m@main")
    expected = plain.push(second, "m@main")

    repo = new_repository()
    push_shared([repo] * workers, "m@main", first, split(first, workers, axis_of))
    version, _ = push_shared([repo] * workers, "m@main", second, split(second, workers, axis_of), message="second")

    assert (version.parameters_id, version.structure_id) == (expected.parameters_id, expected.structure_id)
    assert (version.message, version.number) == ("second", 2)
    assert bits(repo.checkout("m@main")) == bits(second)
    assert bits(repo.checkout("m@main~1")) == bits(first)
    assert repo.verify(deep=True).ok
    before = pack_nbytes(repo)
    push_shared([repo] * workers, "m@main", second, split(second, workers, axis_of), message="second")
    assert pack_nbytes(repo) == before


def test_a_delta_is_as_small_in_parts_as_in_one_push() -> None:
    first, second = weights(), weights(step=1e-3)
    sizes = []
    for workers in (0, 1, 4):
        repo = new_repository()
        before = 0
        for tensors in (first, second):
            before = pack_nbytes(repo)
            if workers:
                push_shared([repo] * workers, "m@main", tensors, split(tensors, workers, axis_of))
            else:
                repo.push(tensors, "m@main")
        sizes.append(pack_nbytes(repo) - before)
    assert max(sizes) < 1.03 * min(sizes)


def mixed_precision(step: int) -> dict[str, Array]:
    """Masters, their moments, and the weights that a model computes with, which sort before them or behind."""
    rng = np.random.default_rng(step)
    tensors: dict[str, Array] = {}
    for at, (name, shape) in enumerate({"a": (700, 2100), "b": (700, 2100), "norm": (2100,)}.items()):
        drift = np.float32(1e-3 * step) * rng.standard_normal(shape).astype(np.float32)
        master = np.random.default_rng(100 + at).standard_normal(shape).astype(np.float32) + drift
        tensors[f"optim.master.{name}"] = master
        tensors[f"optim.{name}.exp_avg"] = rng.standard_normal(shape).astype(np.float32) * np.float32(1e-3)
        tensors[f"model.{name}"] = master.astype(ml_dtypes.bfloat16)
        tensors[f"z.{name}.half"] = master.astype(np.float16)
    return tensors


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_casts_take_as_little_in_parts_as_in_one_push(workers: int) -> None:
    plain, repo = new_repository(), new_repository()
    sizes: list[tuple[int, int]] = []
    for step in range(2):
        tensors = mixed_precision(step)
        expected = plain.push(tensors, "m@main")
        version, _ = push_shared([repo] * workers, "m@main", tensors, split(tensors, workers, lambda name: 0))
        assert version.parameters_id == expected.parameters_id
        sizes.append((pack_nbytes(plain), pack_nbytes(repo)))
    # A worker's own packs and their heads, at each step.
    assert all(shared < alone + (step + 1) * workers * 1000 for step, (alone, shared) in enumerate(sizes))
    assert bits(repo.checkout("m@main", verify="chunk")) == bits(tensors)


def test_what_is_only_near_its_master_is_stored_against_what_it_was_where_that_is_nearer() -> None:
    grown = []
    for workers in (0, 2):
        repo = new_repository()
        for step in range(2):
            before = pack_nbytes(repo)
            tensors = mixed_precision(step)
            for name, first in mixed_precision(0).items():
                if name.startswith("model."):
                    nearly = first.astype(np.float32) * np.float32(1.05) + np.float32(1e-4 * step)
                    tensors[name] = nearly.astype(ml_dtypes.bfloat16)
            if workers:
                push_shared([repo] * workers, "m@main", tensors, split(tensors, workers, lambda name: 0))
            else:
                repo.push(tensors, "m@main")
        grown.append(pack_nbytes(repo) - before)
    assert grown[1] < 1.002 * grown[0]


def test_workers_that_have_opened_the_repository_by_themselves_make_one_version() -> None:
    objects = MemoryObjects()
    new_repository(objects)
    tensors = weights()
    repos = [open_again(objects) for _ in range(3)]
    version, _ = push_shared(repos, "m@main", tensors, split(tensors, 3, axis_of))
    assert bits(open_again(objects).checkout(version.id)) == bits(tensors)


def test_what_all_workers_have_is_stored_once_and_shared_out_evenly() -> None:
    tensors = {f"w{number}": np.random.default_rng(number).standard_normal((64, 1024)) for number in range(16)}
    repo = new_repository()
    _, parts = push_shared([repo] * 4, "m@main", tensors, split(tensors, 4, lambda name: None))
    stored = [part.stored_nbytes for part in parts]
    assert sum(part.sent_nbytes for part in parts) == 0
    assert max(stored) < 1.1 * min(stored)
    alone = new_repository()
    alone.push(tensors, "m@main")
    assert pack_nbytes(repo) < 1.01 * pack_nbytes(alone)


def test_what_travels_between_workers_pickles() -> None:
    tensors = weights()
    held = split(tensors, 2, axis_of)
    repo = new_repository()
    holdings = holdings_of(held)
    shared = repo.sharing.begin("m@main", structure_of(tensors), holdings, 2)
    assert pickle.loads(pickle.dumps(shared.assignments)) == shared.assignments
    _, parts = push_shared([repo] * 2, "m@main", tensors, held)
    assert pickle.loads(pickle.dumps(parts)) == parts


def test_a_worker_finds_what_was_recorded_on_another_branch_meanwhile() -> None:
    objects = MemoryObjects()
    repo = new_repository(objects)
    tensors = weights()

    def push_it_elsewhere(worker: int, mine: Repository) -> Repository:
        if worker == 0:
            mine.push(tensors, "m@other")
        return mine

    before = pack_nbytes(repo)
    repos = [open_again(objects) for _ in range(2)]
    version, _ = push_shared(repos, "m@main", tensors, split(tensors, 2, axis_of), each=push_it_elsewhere)
    assert bits(repo.checkout(version.id)) == bits(tensors)
    assert pack_nbytes(repo) > before


# -- who does what -----------------------------------------------------------------------------------------------------


def holdings_of(held: list[Held]) -> Mapping[str, list[tuple[Box, int]]]:
    found: defaultdict[str, list[tuple[Box, int]]] = defaultdict(list)
    for worker, mine in enumerate(held):
        for name, box, _ in mine:
            found[name].append((box, worker))
    return found


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[TensorSpec], dict[str, list[tuple[Box, int]]], int]:
    """Draw tensors whose boxes are cut on any axes, some of which lie with several workers."""
    workers = draw(st.integers(1, 6))
    structure, holdings = [], {}
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 3000), max_size=3)))
        spec = TensorSpec(f"t{number}", dtype_named(draw(st.sampled_from(["float32", "bfloat16", "uint8"]))), shape)
        boxes: list[Box] = [tuple((0, length) for length in shape)]
        for axis in range(len(shape)):
            cuts = draw(st.lists(st.integers(0, shape[axis]), max_size=2))
            ends = sorted({0, shape[axis], *cuts})
            spans = list(pairwise(ends)) or [(0, 0)]
            boxes = [(*box[:axis], span, *box[axis + 1 :]) for box in boxes for span in spans]
        structure.append(spec)
        some = st.sets(st.integers(0, workers - 1), min_size=1, max_size=2)
        holdings[spec.name] = [(box, worker) for box in boxes for worker in sorted(draw(some))]
    return structure, holdings, workers


@given(layouts())
def test_every_cell_is_stored_once_by_a_worker_that_is_given_what_it_lacks(
    layout: tuple[list[TensorSpec], dict[str, list[tuple[Box, int]]], int],
) -> None:
    structure, holdings, workers = layout
    shares = share_out(structure, holdings, workers)
    stored = [(name, number) for share in shares for name, numbers in share.cells.items() for number in numbers]
    assert sorted(stored) == [(spec.name, number) for spec in structure for number in range(spec.grid.cell_count)]
    specs = {spec.name: spec for spec in structure}
    for share in shares:
        given_to: defaultdict[Cell, int] = defaultdict(int)
        for one in share.rounds.values():
            for pieces in one.receives.values():
                for piece in pieces:
                    given_to[piece.cell] += piece.nbytes
        for name, numbers in share.cells.items():
            own = {box for box, worker in holdings[name] if worker == share.worker}
            for number in numbers:
                region = specs[name].grid.region(number)
                held = sum(common_nbytes(specs[name], box, box_of(region)) for box in own)
                assert held + given_to.pop(Cell(name, number), 0) == region.nbytes
        assert not given_to


def common_nbytes(spec: TensorSpec, a: Box, b: Box) -> int:
    nbytes = spec.grid.itemsize
    for (p, q), (r, s) in zip(a, b, strict=True):
        nbytes *= max(0, min(q, s) - max(p, r))
    return nbytes


@given(layouts())
def test_what_is_sent_is_received_in_the_same_round_and_no_round_is_large(
    layout: tuple[list[TensorSpec], dict[str, list[tuple[Box, int]]], int],
) -> None:
    structure, holdings, workers = layout
    shares = share_out(structure, holdings, workers)
    for share in shares:
        assert list(share.rounds) == sorted(share.rounds)
        for number, one in share.rounds.items():
            for target, pieces in one.sends.items():
                assert shares[target].rounds[number].receives[share.worker] == pieces
                have = [box for box, worker in holdings[pieces[0].cell.tensor or ""] if worker == share.worker]
                assert have
            for source, pieces in one.receives.items():
                assert shares[source].rounds[number].sends[share.worker] == pieces
            for way in (one.sends, one.receives):
                assert sum(piece.nbytes for pieces in way.values() for piece in pieces) <= ROUND_NBYTES
    sent = sum(share.sent_nbytes for share in shares)
    assert sent <= sum(spec.nbytes for spec in structure)


def test_a_large_matrix_is_exchanged_in_many_rounds() -> None:
    spec = TensorSpec("w", dtype_named("float32"), (40_000, 4_099))
    workers = 7
    holdings = {"w": [(box, worker) for worker, box in enumerate(cut(spec.shape, 1, workers))]}
    shares = share_out([spec], holdings, workers)
    assert min(len(share.rounds) for share in shares) > 2
    stored = [sum(spec.grid.cell_nbytes(number) for number in share.cells["w"]) for share in shares]
    assert max(stored) < 1.1 * min(stored)


def test_little_pieces_of_many_cells_are_exchanged_a_few_cells_at_a_time() -> None:
    structure = [TensorSpec(f"t{number:03}", dtype_named("float32"), (1000, 1000)) for number in range(100)]
    boxes: list[tuple[Box, int]] = [(((0, 999), (0, 1000)), 0), (((999, 1000), (0, 1000)), 1)]
    shares = share_out(structure, {spec.name: boxes for spec in structure}, 2)
    for one in shares[0].rounds.values():
        cells = {piece.cell for pieces in one.receives.values() for piece in pieces}
        assert sum(structure[0].grid.cell_nbytes(cell.number) for cell in cells) <= ROUND_NBYTES


def test_adam_moments_are_stored_where_each_other_is() -> None:
    tensors = {name: array for name, array in weights().items() if "exp_avg" in name}
    shares: list[Share] = share_out(structure_of(tensors), holdings_of(split(tensors, 2, axis_of)), 2)
    for share in shares:
        cells = list(share.cells.values())
        assert len(cells) in (0, 2)
        assert all(one == cells[0] for one in cells)


def test_a_cast_is_stored_where_its_master_is() -> None:
    tensors = {name: array for name, array in mixed_precision(0).items() if "exp_avg" not in name}
    shares = share_out(structure_of(tensors), holdings_of(split(tensors, 2, lambda name: 0)), 2)
    for share in shares:
        for name in ("a", "b", "norm"):
            assert share.cells.get(f"model.{name}") == share.cells.get(f"optim.master.{name}")
            assert share.cells.get(f"z.{name}.half") == share.cells.get(f"optim.master.{name}")


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [((0, 3), (0, 5))],
        [((0, 3), (0, 5)), ((2, 4), (0, 5))],
        [((0, 4), (0, 5)), ((0, 3), (0, 5))],
        [((0, 2), (0, 5)), ((0, 2), (0, 5)), ((3, 5), (0, 5))],
        [((0, 4),)],
        [((-1, 3), (0, 5))],
    ],
)
def test_boxes_that_do_not_make_their_tensor_are_refused(boxes: list[Box]) -> None:
    spec = TensorSpec("w", dtype_named("float32"), (4, 5))
    with pytest.raises(InvalidInputError) as caught:
        share_out([spec], {"w": [(box, worker) for worker, box in enumerate(boxes)]}, max(1, len(boxes)))
    assert caught.value.kind == "bad_shards"
    assert "'w'" in str(caught.value)


def test_a_shard_of_another_shape_than_its_place_is_refused_by_all_workers() -> None:
    tensors = {"w": np.zeros((4, 5), np.float32)}
    held: list[Held] = [[("w", ((0, 2), (0, 5)), tensors["w"][:2])], [("w", ((2, 4), (0, 5)), tensors["w"][:1])]]
    repo = new_repository()
    with pytest.raises((InvalidInputError, StorageError)) as caught:
        push_shared([repo] * 2, "m@main", tensors, held)
    assert caught.value.kind in ("bad_shards", "worker_failed")
    assert repo.models() == []


# -- failures ----------------------------------------------------------------------------------------------------------


def failing(worker: int, wrap: Callable[[Repository], Repository]) -> Callable[[int, Repository], Repository]:
    return lambda at, repo: wrap(repo) if at == worker else repo


def test_a_worker_that_is_interrupted_keeps_nobody_waiting() -> None:
    repo = new_repository()
    tensors = {"w": np.zeros((4, 5), np.float32)}
    held = split(tensors, 2, axis_of)
    shared = repo.sharing.begin("m@main", structure_of(tensors), holdings_of(held), 2)
    meeting = Meeting(2)

    def interrupted() -> Held:
        raise KeyboardInterrupt

    def work(worker: int) -> BaseException | None:
        given = interrupted if worker else lambda: held[0]
        try:
            repo.sharing.store_part(shared.assignments[worker], given, meeting.exchange(worker))
        except BaseException as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(work, range(2)))
    assert isinstance(errors[0], StorageError)
    assert errors[0].kind == "worker_failed"
    assert isinstance(errors[1], KeyboardInterrupt)


@pytest.mark.parametrize("place", ["read", "fill"])
def test_a_worker_whose_device_fails_in_a_round_takes_part_in_the_others(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "ROUND_NBYTES", 100_000)
    repo = new_repository()
    tensors = weights()
    real, calls = getattr(Shards, place), []

    def broken(*args: Any) -> Any:
        if threading.current_thread().name == "lamella-exchange":
            calls.append(args)
            if len(calls) == 2:
                raise RuntimeError("out of memory, of no kind that lamella knows")
        return real(*args)

    monkeypatch.setattr(Shards, place, broken)
    with pytest.raises((RuntimeError, StorageError)) as caught:  # where it lasts for ever, queue.Empty
        push_shared([repo] * 3, "m@main", tensors, split(tensors, 3, axis_of))
    assert isinstance(caught.value, RuntimeError) or caught.value.kind == "worker_failed"
    assert repo.models() == []


def test_parts_of_two_pushes_of_one_structure_make_no_version() -> None:
    repo = new_repository()
    held = [split(weights(step), 2, axis_of) for step in (0.0, 1.0)]
    parts = [push_shared([repo] * 2, f"m@{at}", weights(), held[at])[1] for at in range(2)]
    shared = repo.sharing.begin("m@main", structure_of(weights()), holdings_of(held[0]), 2)
    with pytest.raises(InvalidInputError) as caught:
        repo.sharing.record(shared, [parts[0][0], parts[1][1]])
    assert caught.value.kind == "bad_part"


def test_a_part_that_two_pushes_join_is_recorded_once_in_the_log() -> None:
    repo = new_repository()
    tensors = {"w": np.random.default_rng(0).standard_normal((300, 300))}
    held = split(tensors, 1, axis_of)
    shares = [repo.sharing.begin(f"m@{at}", structure_of(tensors), holdings_of(held), 1) for at in range(2)]
    part = repo.sharing.store_part(shares[0].assignments[0], lambda: held[0], Alone())
    for at, shared in enumerate(shares):
        repo.sharing.record(shared, [replace(part, push=shared.assignments[0].push)], message=str(at))
    assert repo.verify(deep=True).problems == []
    assert bits(repo.checkout("m@1")) == bits(tensors)


@pytest.mark.parametrize("worker", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1])
def test_a_worker_that_fails_fails_the_push_for_all_and_leaves_nothing(worker: int, after: int) -> None:
    objects = MemoryObjects()
    repo = new_repository(objects)
    first = weights()
    repo.push(first, "m@main")
    second = weights(step=1e-3)
    failures: list[LamellaError] = []

    def broken(mine: Repository) -> Repository:
        store = store_of(open_again(objects))
        real, calls = store.begin, []

        def begin(*args: Any, **kwargs: Any) -> Any:
            if not after:
                raise StorageError("the disk is gone", kind="test")
            push = real(*args, **kwargs)
            inner = push.write

            def write(blobs: Any) -> None:
                calls.append(next(iter(blobs)))
                raise StorageError("the disk is gone", kind="test")

            push.write = write  # type: ignore[method-assign]
            assert inner is not push.write
            return push

        store.begin = begin  # type: ignore[method-assign]
        mine.sharing._store = store
        return mine

    repos = [open_again(objects) for _ in range(3)]
    with pytest.raises(StorageError) as caught:
        push_shared(repos, "m@main", second, split(second, 3, axis_of), each=failing(worker, broken))
    failures.append(caught.value)
    assert failures[0].kind in ("test", "worker_failed")
    assert repo.version("m@main").number == 1
    assert repo.verify(deep=True).ok
    version, _ = push_shared([open_again(objects) for _ in range(3)], "m@main", second, split(second, 3, axis_of))
    assert bits(repo.checkout(version.id)) == bits(second)


def test_a_worker_that_waits_for_another_has_stored_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "ROUND_NBYTES", 2_000_000)  # one cell
    tensors = {f"w{number}": np.random.default_rng(number).standard_normal((500, 500)) for number in range(6)}
    boxes: list[Box] = [((0, 490), (0, 500)), ((490, 500), (0, 500))]
    held: list[Held] = [[(name, box, shard(array, box)) for name, array in tensors.items()] for box in boxes]
    repo = new_repository()
    stored = threading.Event()
    real_begin, real_swap = repo._store.begin, ThreadExchange.swap

    def begin(*args: Any, **kwargs: Any) -> Any:
        push = real_begin(*args, **kwargs)
        real_write = push.write

        def write(blobs: Any) -> None:
            written: list[Any] = []
            real_write(written.append(blob) or blob for blob in blobs)  # type: ignore[func-returns-value]
            if written:  # not by the worker that has nothing to store
                stored.set()

        push.write = write  # type: ignore[method-assign]
        return push

    def swap(self: ThreadExchange, number: int, *given: Any) -> Any:
        assert number == 0 or self.worker != 0 or stored.wait(PATIENCE_S / 4)
        return real_swap(self, number, *given)

    monkeypatch.setattr(repo._store, "begin", begin)
    monkeypatch.setattr(ThreadExchange, "swap", swap)
    push_shared([repo] * 2, "m@main", tensors, held)
    assert bits(repo.checkout("m@main")) == bits(tensors)


def test_a_branch_that_moves_meanwhile_is_a_conflict() -> None:
    objects = MemoryObjects()
    repo = new_repository(objects)
    tensors = weights()
    repo.push({"w": np.zeros(3)}, "m@main")

    def move(worker: int, mine: Repository) -> Repository:
        if worker == 1:
            repo.push({"w": np.ones(3)}, "m@main")
        return mine

    with pytest.raises((ConflictError, StorageError)):
        push_shared([open_again(objects) for _ in range(2)], "m@main", tensors, split(tensors, 2, axis_of), each=move)
    assert repo.version("m@main").number == 2


def test_a_tensor_that_changes_meanwhile_fails_the_push() -> None:
    repo = new_repository()
    tensor = torch.zeros(1000, 100)

    store = store_of(repo)
    real = store.begin

    def begin(*args: Any, **kwargs: Any) -> Any:
        push = real(*args, **kwargs)
        if kwargs["push_id"] and begin_calls:
            tensor.add_(1)
        begin_calls.append(1)
        return push

    begin_calls: list[int] = []
    store.begin = begin  # type: ignore[method-assign]
    held: list[Held] = [[("w", ((0, 1000), (0, 100)), tensor)]]
    with pytest.raises(InvalidInputError) as caught:
        push_shared([repo], "m@main", {"w": np.zeros((1000, 100), np.float32)}, held)
    assert caught.value.kind == "source_changed"


def test_parts_of_other_pushes_are_refused() -> None:
    tensors = weights()
    held = split(tensors, 2, axis_of)
    repo = new_repository()
    _, parts = push_shared([repo] * 2, "m@main", tensors, held)
    shared = repo.sharing.begin("m@main", structure_of(tensors), holdings_of(held), 2)
    with pytest.raises(InvalidInputError) as caught:
        repo.sharing.record(shared, parts[:1])
    assert caught.value.kind == "bad_part"
    short = {"w": np.zeros((2, 3), np.float32)}
    other = repo.sharing.begin("m@main", structure_of(short), {"w": [(((0, 2), (0, 3)), 0)]}, 2)
    with pytest.raises(InvalidInputError) as caught:
        repo.sharing.record(other, parts)
    assert caught.value.kind == "bad_part"


@pytest.mark.parametrize(
    "part",
    [b"", b"{}", b"[]", b'{"live":[],"written":[["packs/x",1,1]]}', b'{"live":["meta/1"],"written":[]}', b"\xff"],
)
def test_what_is_no_part_is_refused(part: bytes) -> None:
    push = store_of(new_repository()).begin("m", "main", parent=None, push_id="0" * 32)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError) as caught:
        push.join(part)
    assert caught.value.kind == "bad_part"


def begun(repo: Repository, **options: Any) -> Any:
    return repo._store.begin("m", "main", parent=None, push_id=new_push_id(), **options)


def test_a_push_that_ended_as_a_part_is_over_and_says_the_same_again() -> None:
    repo = new_repository()
    push = begun(repo, part=True)
    part = push.part()
    assert push.part() == part
    push.abandon()
    later = begun(repo)
    later.join(part)
    later.join(part)
    later.abandon()


def test_a_job_has_as_many_parts_as_ranks_and_they_leave_room_for_pushes() -> None:
    repo = new_repository()
    parts = [begun(repo, part=True) for _ in range(PUSHES_OF_ONE + 1)]
    repo.push({"w": np.zeros(3)}, "m@main")
    for part in parts:
        part.part()
    repo.push({"w": np.ones(3)}, "m@main")


def test_a_part_whose_pack_is_gone_cannot_be_joined() -> None:
    objects = MemoryObjects()
    repo = new_repository(objects)
    tensors = {"w": np.random.default_rng(0).standard_normal((100, 100))}
    held: list[Held] = [[("w", ((0, 100), (0, 100)), tensors["w"])]]
    shared = repo.sharing.begin("m@main", structure_of(tensors), holdings_of(held), 1)
    part = repo.sharing.store_part(shared.assignments[0], lambda: held[0], Alone())
    for name in names_of(objects):
        if name.startswith("packs/"):
            objects.delete(name)
    with pytest.raises(LamellaError):
        repo.sharing.record(shared, [part])
    assert repo.models() == []


# -- boxes -------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_boxes_of_a_version_fill_memory_of_any_strides(data: st.DataObject) -> None:
    tensors = weights()
    repo = CACHED.setdefault("repo", new_repository())
    if not repo.models():
        repo.push(tensors, "m@main")
    targets, expected = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        array = tensors[name]
        spans = [sorted(data.draw(st.tuples(*[st.integers(0, length)] * 2))) for length in array.shape]
        box = tuple((first, stop) for first, stop in spans)
        want = shard(array, box)
        memory = np.empty([length + 1 for length in want.shape], want.dtype)[(*(slice(n) for n in want.shape), ...)]
        if data.draw(st.booleans()):
            memory = np.empty(want.shape, want.dtype)
        targets.append((name, box, memory))
        expected.append(want)
    repo.sharing.fill_boxes("m@main", targets)
    for (_, _, memory), want in zip(targets, expected, strict=True):
        assert memory.tobytes() == want.tobytes()


CACHED: dict[str, Repository] = {}


def test_boxes_are_read_without_the_cells_that_they_do_not_touch() -> None:
    objects = CountingObjects(MemoryObjects())
    new_repository(objects).push({"w": np.random.default_rng(0).standard_normal((4096, 2048))}, "m@main")
    whole = sum(nbytes for name, nbytes in names_of(objects).items() if name.startswith("packs/"))
    repo = open_again(objects)
    objects.reset()
    repo.sharing.fill_boxes("m@main", [("w", ((700, 710), (0, 2048)), np.empty((10, 2048)))])
    assert objects.read_nbytes < whole / 8


def test_boxes_of_what_is_not_there_are_refused() -> None:
    repo = new_repository()
    repo.push({"w": np.zeros((4, 5), np.float32)}, "m@main")
    with pytest.raises(TensorNotFoundError):
        repo.sharing.fill_boxes("m@main", [("v", ((0, 1),), np.zeros(1, np.float32))])
    for memory in (np.zeros((2, 5), np.float64), np.zeros((3, 5), np.float32)):
        with pytest.raises(InvalidInputError) as caught:
            repo.sharing.fill_boxes("m@main", [("w", ((0, 2), (0, 5)), memory)])
        assert caught.value.kind == "structure_mismatch"


def test_parts_count_among_what_is_not_committed_until_the_version_is(tmp_path: Path) -> None:
    tensors = {"w": np.random.default_rng(0).standard_normal(300_000)}
    held: list[Held] = [[("w", ((0, 300_000),), tensors["w"])]]
    with serving(tmp_path, quotas=Quotas(uncommitted_nbytes=4_000_000)) as server:
        repo = lamella.init(f"grpc://{server.address}/team")
        for step in range(3):
            tensors["w"][:] = np.random.default_rng(step).standard_normal(300_000)
            push_shared([repo], "m@main", tensors, held)
        shared = repo.sharing.begin("m@main", structure_of(tensors), holdings_of(held), 1)
        for step in range(2):
            tensors["w"][:] = np.random.default_rng(9 + step).standard_normal(300_000)
            if step:
                with pytest.raises(LimitError) as caught:
                    repo.sharing.store_part(shared.assignments[0], lambda: held[0], Alone())
                assert caught.value.kind == "uncommitted_quota"
            else:
                repo.sharing.store_part(shared.assignments[0], lambda: held[0], Alone())
        repo.close()
