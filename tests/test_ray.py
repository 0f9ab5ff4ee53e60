"""A checkpoint in pieces on the nodes of a Ray cluster becomes one version, whoever dies meanwhile.

``LAMELLA_RAY_KILLS`` says how many pushes are to lose an encoder at a random moment: 10 by default, 1000 in a campaign;
``LAMELLA_RAY_DRIVERS`` how many drivers are killed in the middle of a push: 2, and 100.
"""

import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import ray
import s3
from cluster import STORE_NBYTES, Nodes, wait_until
from safetensors.numpy import save_file
from service import serving
from support import Array, bits, names_of, new_repository, noise, store_of
from workers import split

import lamella
import lamella.ray
from lamella.ray import Group, Place, Shard, pushes, refs
from lamella.ray.encoders import RESTARTS
from lamella.ray.refs import got
from lamella.ray.shards import LENT_HELD
from lamella_engine.chunking import Region
from lamella_engine.errors import InvalidInputError, StorageError
from lamella_engine.model import Progress
from lamella_engine.repository import Repository

pytestmark = pytest.mark.ray

KILLS = int(os.environ.get("LAMELLA_RAY_KILLS", "10"))

DRIVERS = int(os.environ.get("LAMELLA_RAY_DRIVERS", "2"))

BATCH_NBYTES = 1 << 20


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes, "BATCH_NBYTES", BATCH_NBYTES)


@pytest.fixture
def place(tmp_path: Path) -> str:
    place = str(tmp_path / "repository")
    lamella.init(place).close()
    return place


def weights(seed: int = 0, step: float = 0.0) -> dict[str, Array]:
    rng, drift = np.random.default_rng(seed), np.random.default_rng(99)

    def tensor(*shape: int, dtype: Any = np.float32) -> Array:
        base = rng.standard_normal(shape, np.float32)
        return (base + np.float32(step) * drift.standard_normal(shape, np.float32)).astype(dtype)

    return {
        "embed": tensor(1031, 640),  # one cell of 2.6 MB, cut anywhere
        "layer.weight": tensor(501, 2100),  # two cells, which no node's rows line up with
        "state.layer.weight.exp_avg": tensor(301, 700) * np.float32(1e-3),
        "state.layer.weight.exp_avg_sq": tensor(301, 700) ** 2 * np.float32(1e-6),
        "half": tensor(300, 2100, dtype=ml_dtypes.bfloat16),
        "bias": tensor(2100),
        "step": np.array(7.0, np.float32),
        "empty": np.zeros((0, 5), np.float32),
    }


def axes(name: str) -> int | None:
    return {"bias": None, "step": None, "empty": None, "half": 1}.get(name, 0)


Held = tuple[dict[str, Array], dict[str, Place]]


def parts(tensors: Mapping[str, Array], nodes: int) -> list[Held]:
    """Cut tensors as they would lie on nodes: the boxes of each, and their places."""
    return [
        (
            {name: np.asarray(array) for name, _, array in held},
            {name: (tensors[name].shape, tuple(first for first, _ in box)) for name, box, _ in held},
        )
        for held in split(tensors, nodes, axes)
    ]


def lent(nodes: Nodes, tensors: Mapping[str, Array], count: int) -> list[Shard]:
    """Return shards of tensors that actors on so many nodes hold."""
    held = parts(tensors, count)
    return [got(holder.shard.remote(*mine)) for holder, mine in zip(nodes.holders[:count], held, strict=True)]


def blobs(repo: Repository) -> Counter[bytes]:
    """Return how often each chunk is stored, in whatever pack."""
    store = store_of(repo)
    names = [name for name in names_of(store.objects) if name.startswith("packs/")]
    return Counter(row.chunk for name in names for row in store.packs.index(name).rows)


def test_what_lies_on_two_or_four_nodes_becomes_the_version_that_one_push_makes(nodes: Nodes, place: str) -> None:
    plain = new_repository()
    seen: list[Progress] = []
    at_work: set[int] = set()

    def look(progress: Progress) -> None:
        seen.append(progress)
        at_work.update(nodes.encoders().values())

    for count, step in ((2, 0.0), (4, 1e-3)):
        at_work.clear()
        tensors = weights(step=step)
        expected = plain.push(tensors, "llm@main")
        version = lamella.ray.push(lent(nodes, tensors, count), "llm@main", place, message="a step", progress=look)
        assert (version.parameters_id, version.structure_id) == (expected.parameters_id, expected.structure_id)
        nbytes = sum(array.nbytes for array in tensors.values())
        assert (seen[-1].done_nbytes, seen[-1].total_nbytes) == (nbytes, nbytes)
        assert at_work == set(range(count))
    with lamella.open(place) as repo:
        assert bits(repo.checkout("llm@main")) == bits(tensors)
        assert repo.version("llm@main").message == "a step"
        assert repo.verify(deep=True).ok
        assert max(blobs(repo).values()) == 1
        assert repo.stats().stored_nbytes < 1.1 * plain.stats().stored_nbytes  # the second is deltas of the first


@pytest.fixture(params=["bucket", "service"])
def anywhere(
    request: pytest.FixtureRequest, seaweedfs: s3.Server, use: Callable[[s3.Server], None], tmp_path: Path
) -> Iterator[str]:
    if request.param == "bucket":
        use(seaweedfs)
        yield s3.new_url()
    else:
        with serving(tmp_path) as server:
            yield f"grpc://{server.address}/team"


def test_files_and_memory_go_into_buckets_and_services(nodes: Nodes, anywhere: str, tmp_path: Path) -> None:
    tensors = weights()
    expected = new_repository().push(tensors, "llm@main")
    lamella.init(anywhere).close()
    (memory, memory_places), (file, file_places) = parts(tensors, 2)
    save_file(file, tmp_path / "shard.safetensors")
    path = str(tmp_path / "shard.safetensors")
    shards = [
        got(nodes.holders[0].shard.remote(memory, memory_places)),
        got(nodes.holders[1].file.remote(path, file_places)),
    ]
    version = lamella.ray.push(shards, "llm@main", anywhere, files={"config.json": b"{}"})
    assert version.parameters_id == expected.parameters_id
    with lamella.open(anywhere) as repo:
        assert bits(repo.checkout("llm@main")) == bits(tensors)
        assert repo.verify(deep=True).ok


def test_encoders_put_packs_into_the_bucket_of_a_service(
    nodes: Nodes, seaweedfs: s3.Server, use: Callable[[s3.Server], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushes, "BATCH_NBYTES", 16 << 20)  # what is small goes through the service
    tensors = {f"w{number}": noise(number, 1000, 1500) for number in range(4)}
    use(seaweedfs)
    root = s3.new_url()
    with serving(root, direct=True) as server:
        place = f"grpc://{server.address}/team"
        lamella.init(place).close()
        version = lamella.ray.push(lent(nodes, tensors, 2), "llm@main", place)
        assert server.verified()
    with lamella.open(f"{root}/team") as repo:
        log = store_of(repo).log
        first = [pack.verifier for pack in log.entry(1).packs]
        assert first.count("writer") >= 2  # each of the two encoders put one
        assert {pack.verifier for pack in log.state.packs()} == {"store"}
        assert version.parameters_id == new_repository().push(tensors, "llm@main").parameters_id
        assert bits(repo.checkout("llm@main")) == bits(tensors)
        assert repo.verify(deep=True, executor="ray").ok


def test_copies_of_a_box_are_read_once(nodes: Nodes, place: str) -> None:
    tensors = weights()
    whole = lent(nodes, tensors, 1)
    shards = [*lent(nodes, tensors, 2), *lent(nodes, tensors, 2), got(nodes.holders[2].shard.remote({}, {}))]
    ids = {lamella.ray.push(some, "llm@main", place).parameters_id for some in (whole, [*whole, *whole], shards)}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda tensors, places: tensors.pop("half"), "bad_shards"),
        (lambda tensors, places: places.update(half=((300, 2100), (0, 1))), "bad_shards"),
        (lambda tensors, places: places.update(half=((300, 2101), (0, 0))), "bad_shards"),
        (lambda tensors, places: places.update(half=((300,), (0,))), "bad_shards"),
    ],
)
def test_shards_that_do_not_make_their_tensors_are_refused(
    nodes: Nodes, place: str, change: Callable[[Any, Any], None], kind: str
) -> None:
    held = parts(weights(), 2)
    change(*held[0])
    held[0][1].pop("half") if "half" not in held[0][0] else None
    shards = [got(holder.shard.remote(*mine)) for holder, mine in zip(nodes.holders, held, strict=False)]
    with pytest.raises(InvalidInputError) as caught:
        lamella.ray.push(shards, "llm@main", place)
    assert caught.value.kind == kind
    assert not lamella.open(place).models()


def test_a_file_that_changes_meanwhile_is_noticed(nodes: Nodes, place: str, tmp_path: Path) -> None:
    tensors = weights()
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    shard = got(nodes.holders[1].file.remote(str(path), {}))

    def change(progress: Progress) -> None:
        if progress.done_nbytes:
            os.utime(path, ns=(0, 0))

    with pytest.raises(InvalidInputError) as caught:
        lamella.ray.push([shard], "llm@main", place, progress=change)
    assert caught.value.kind == "source_changed"
    lamella.ray.push([shard], "llm@main", place)


def kill(process: int) -> bool:
    """Kill a process; return whether there was one."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:  # its push may be over
        return False
    return True


class Killer:
    """Kills one encoder of a push a random time after encoders appear, or after they are told what to store.

    :meth:`look` is to see the progress of the push. Only what dies while there is something to store counts.
    """

    def __init__(self, nodes: Nodes, *, storing: bool, within_s: float | None) -> None:
        self._nodes = nodes
        self._earlier = nodes.encoders().keys()  # of the push before, about to end
        self._storing = storing
        self.moment_s = None if within_s is None else random.uniform(0, within_s)
        """None lets all live."""
        self.killed = False
        self.found = ""
        """How far the push was when an encoder was killed."""
        self.starting_s = self.storing_s = math.inf
        """How long encoders were there until they were told, and from there until all was stored."""
        self._done_nbytes = 0
        self._told, self._stored = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def look(self, progress: Progress) -> None:
        self._done_nbytes = progress.done_nbytes
        self._told.set()
        if progress.done_nbytes == progress.total_nbytes:
            self._stored.set()

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._told.set()
        self._stored.set()
        self._thread.join()

    def _alive(self) -> list[int]:
        return sorted(self._nodes.encoders().keys() - self._earlier)

    def _run(self) -> None:
        while not self._alive():
            if self._stored.wait(0.01):
                return
        appeared = time.monotonic()
        if not self._storing:
            self._kill()
        self._told.wait()
        told = time.monotonic()
        if self._storing:
            self._kill()
        self._stored.wait()
        if not self.killed:
            self.starting_s, self.storing_s = told - appeared, time.monotonic() - told

    def _kill(self) -> None:
        if self.moment_s is None:
            return
        (self._stored if self._storing else self._told).wait(self.moment_s)
        alive = self._alive()
        if alive and not self._stored.is_set():
            self.found = (
                "nobody told" if not self._told.is_set() else "some stored" if self._done_nbytes else "all told"
            )
            self.killed = kill(random.choice(alive)) and not self._stored.is_set()


@pytest.mark.parametrize("campaign", range(-(-KILLS // 10)))
def test_an_encoder_that_dies_at_any_moment_harms_nothing(nodes: Nodes, place: str, campaign: int) -> None:
    with Killer(nodes, storing=False, within_s=None) as spared:
        lamella.ray.push(lent(nodes, weights(), 2), "llm@main", place, progress=spared.look)
    starting_s, storing_s = spared.starting_s, spared.storing_s
    number = 0
    ends: Counter[str] = Counter()
    while ends["killed"] < 10:
        number += 1
        assert number < 100, "all is stored before an encoder can be killed"
        storing = number % 4 > 0
        tensors = weights(seed=100 * campaign + number)
        shards = lent(nodes, tensors, 2)
        completed = False
        with (
            Killer(nodes, storing=storing, within_s=storing_s if storing else starting_s) as killer,
            suppress(StorageError),
        ):
            lamella.ray.push(shards, "llm@main", place, message=f"step {number}", progress=killer.look)
            completed = True
        if killer.killed:
            ends.update(["killed", "completed" if completed else "failed", killer.found])
        assert completed or killer.killed
        # The first push of all is slower than others: their end is not to be missed for ever.
        starting_s, storing_s = min(starting_s, killer.starting_s), min(storing_s, killer.storing_s)
        if not completed:
            lamella.ray.push(shards, "llm@main", place, message=f"step {number}")
        with lamella.open(place) as repo:
            assert repo.version("llm@main").number == 1 + number, killer.moment_s
            assert bits(repo.checkout("llm@main")) == bits(tensors), killer.moment_s
    with lamella.open(place) as repo:
        assert repo.verify(deep=True).ok
        assert repo.stats().versions == 1 + number
    print(f"of {number} pushes: {dict(ends)}")


def test_what_had_arrived_is_not_sent_again(nodes: Nodes, place: str) -> None:
    tensors = weights()
    done: list[int] = []
    victim: list[int] = []

    def look(progress: Progress) -> None:
        done.append(progress.done_nbytes)
        if progress.done_nbytes and not victim:
            victim.append(min(nodes.encoders()))
            kill(victim[0])

    lamella.ray.push(lent(nodes, tensors, 2), "llm@main", place, progress=look)
    assert victim
    assert done == sorted(done)
    with lamella.open(place) as repo:
        twice = [chunk for chunk, count in blobs(repo).items() if count > 1]
        assert len(twice) <= 1  # of the batch that was under way: a cell is longer than a batch
        assert repo.verify(deep=True).ok


def test_a_push_whose_encoders_always_die_ends_and_says_so(nodes: Nodes, place: str) -> None:
    shards = lent(nodes, weights(), 2)
    over = threading.Event()
    dead: set[int] = set()

    def kill_all() -> None:
        while not over.wait(0.02):
            for process in nodes.encoders():
                dead.add(process)
                kill(process)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(StorageError) as caught:
            lamella.ray.push(shards, "llm@main", place)
    finally:
        over.set()
        killer.join()
    assert caught.value.kind == "worker_lost"
    assert len(dead) > RESTARTS
    assert not lamella.open(place).models()
    lamella.ray.push(shards, "llm@main", place)
    assert lamella.open(place).verify(deep=True).ok


def test_tensors_whose_process_is_gone_cannot_be_pushed(nodes: Nodes, place: str) -> None:
    held = parts(weights(), 2)
    mortal = nodes.new_holder(1)
    shards = [got(holder.shard.remote(*mine)) for holder, mine in zip((nodes.holders[0], mortal), held, strict=True)]

    ray.kill(mortal)

    def refused() -> bool:
        try:
            lamella.ray.push(shards, "llm@main", place)
        except StorageError as error:
            return error.kind == "worker_lost"
        return False  # Ray has not noticed yet

    wait_until(refused)


class Cancelled(Exception):
    pass


def test_a_push_can_be_cancelled(nodes: Nodes, place: str) -> None:
    shards = lent(nodes, weights(), 2)

    def cancel(progress: Progress) -> None:
        if progress.done_nbytes:
            raise Cancelled

    with pytest.raises(Cancelled):
        lamella.ray.push(shards, "llm@main", place, progress=cancel)
    assert not lamella.open(place).models()
    wait_until(lambda: not nodes.encoders())
    lamella.ray.push(shards, "llm@main", place)


def test_a_full_object_store_is_said_to_be_full(nodes: Nodes, place: str) -> None:
    with pytest.raises(StorageError) as caught:
        got(nodes.holders[3].fill.remote(2 * STORE_NBYTES))
    assert caught.value.kind == "object_store_full"
    assert lamella.ray.push([got(nodes.holders[3].fill.remote(STORE_NBYTES // 4))], "llm@main", place).number == 1


def test_a_push_through_full_object_stores_fails_and_a_later_one_does_not(nodes: Nodes, place: str) -> None:
    held = parts(weights(), 2)
    shards = [got(holder.shard.remote(*mine)) for holder, mine in zip(nodes.holders[2:], held, strict=True)]
    with nodes.full(2), nodes.full(3):
        with pytest.raises(StorageError) as caught:
            lamella.ray.push(shards, "llm@main", place)
        assert caught.value.kind == "object_store_full"
        assert not lamella.open(place).models()
    lamella.ray.push(shards, "llm@main", place)
    with lamella.open(place) as repo:
        assert bits(repo.checkout("llm@main")) == bits(weights())
        assert repo.verify(deep=True).ok


def test_what_was_spilled_and_finds_no_room_is_not_waited_for_for_ever(nodes: Nodes) -> None:
    with pytest.raises(StorageError) as caught:
        got(nodes.new_holder(1).hold_too_much.remote(room_s=1.0))
    assert caught.value.kind == "object_store_full"


def test_few_objects_are_held_of_however_many_shards(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[weakref.ref[Array]] = []

    def brought(ref: Any, nbytes: int) -> list[Array]:
        found: list[Array] = refs.brought(ref, nbytes)
        assert sum(array.nbytes for array in found) == nbytes
        fetched.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(lamella.ray.shards, "brought", brought)
    lent = [Shard.of_tensors({"w": np.full(200_000, number, np.uint8)}) for number in range(3 * LENT_HELD)]
    opened = [shard.source.open() for shard in lent]
    for number, source in enumerate(opened):
        assert bytes(source.read(source.structure[0], Region((slice(7, 8),), 7, 1))) == bytes([number])
    assert len(fetched) == len(lent)
    assert sum(array() is not None for array in fetched) <= LENT_HELD


DRIVER = """
import sys, ray
import lamella.ray
from lamella.ray import Shard, pushes
from test_ray import BATCH_NBYTES, parts, weights

place, address, seed, path, node = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
pushes.BATCH_NBYTES = BATCH_NBYTES
(held, places), (_, filed) = parts(weights(int(seed)), 2)
shards = [Shard.of_tensors(held, places=places), Shard.of_file(path, node=node, places=filed)]
print("ready", flush=True)
sys.stdin.readline()
lamella.ray.push(shards, "llm@main", place, progress=lambda now: print(now.done_nbytes, flush=True))
print("pushed", flush=True)
"""


def new_driver(nodes: Nodes, place: str, seed: int) -> "subprocess.Popen[bytes]":
    """Start a process that pushes weights, half of which it has itself, and half in a file on node 1."""
    path = f"{place}-{seed}.safetensors"
    save_file(parts(weights(seed), 2)[1][0], path)
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, place, nodes.address, str(seed), path, nodes.ids[1]],
        env=os.environ | nodes.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_a_driver_that_is_killed_at_any_moment_leaves_nothing_or_a_version(nodes: Nodes, place: str) -> None:
    ends: Counter[str] = Counter()
    number = seed = 0

    def push_here() -> tuple[float, float]:
        """Push from this process; return how long it took until encoders were told what to store, and from there."""
        nonlocal number, seed
        number, seed = number + 1, seed + 1
        tensors = weights(seed)
        moments = [time.monotonic()]
        lamella.ray.push(
            lent(nodes, tensors, 2), "llm@main", place, progress=lambda _: moments.append(time.monotonic())
        )
        with lamella.open(place) as repo:
            assert repo.version("llm@main").number == number
            assert bits(repo.checkout("llm@main")) == bits(tensors)
        return moments[1] - moments[0], moments[-1] - moments[1]

    while ends["killed"] < DRIVERS:
        storing = bool(ends["killed"] % 2)
        with new_driver(nodes, place, seed + 2) as driver:
            assert driver.stdin is not None
            assert driver.stdout is not None
            moment_s = random.uniform(0, push_here()[storing])
            assert driver.stdout.readline() == b"ready\n"
            driver.stdin.write(b"\n")
            driver.stdin.flush()
            said = [driver.stdout.readline()] if storing else []
            threading.Event().wait(moment_s)
            driver.kill()
            said += driver.stdout.read().split()
        wait_until(lambda: not nodes.encoders())
        seed += 1
        with lamella.open(place) as repo:
            there = repo.version("llm@main").number > number
            assert not there or bits(repo.checkout("llm@main")) == bits(weights(seed)), moment_s
        number += there
        if b"pushed" in said:
            assert there
        else:
            found = "nobody told" if not said else "something stored" if int(said[-1]) else "all told"
            ends.update(["killed", found, "a version" if there else "nothing"])
    push_here()
    with lamella.open(place) as repo:
        assert repo.verify(deep=True).ok
        assert repo.stats().versions == number
    print(dict(ends))


def test_a_group_of_workers_makes_one_version_each_time(nodes: Nodes, place: str) -> None:
    group = Group(place, 2)
    plain = new_repository()
    lost = nodes.holders[0].give.remote(group, 0, *parts(weights(), 2)[0], "llm@main", "step 0")
    for key, step in (("step 1", 0.0), ("step 2", 1e-3)):
        tensors = weights(step=step)
        held = parts(tensors, 2)
        refs = [
            holder.give.remote(group, rank, *held[rank], "llm@main", key)
            for rank, holder in enumerate(nodes.holders[:2])
        ]
        ids = {got(ref) for ref in refs}
        version = lamella.open(place).version("llm@main")
        assert ids == {version.id}
        assert version.parameters_id == plain.push(tensors, "llm@main").parameters_id
        assert version.message == "by 0"
    with pytest.raises(StorageError) as caught:
        got(lost)
    assert caught.value.kind == "worker_lost"


def test_what_a_push_raises_is_raised_to_every_worker_of_a_group(nodes: Nodes, place: str) -> None:
    group = Group(place, 2)
    (tensors, places), _ = parts(weights(), 2)
    refs = [
        holder.give.remote(group, rank, tensors, places, "llm@main", "half of it")
        for rank, holder in enumerate(nodes.holders[:2])
    ]
    for ref in refs:
        with pytest.raises(InvalidInputError) as caught:
            got(ref)
        assert caught.value.kind == "bad_shards"


def test_only_lamella_ray_imports_ray() -> None:
    code = "import sys, lamella, lamella.cli, lamella_engine.repository; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
