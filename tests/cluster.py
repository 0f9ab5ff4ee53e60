"""Ray clusters for tests: nodes on this machine, actors that hold tensors on them, and the processes of encoders."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from support import PATIENCE_S, Array

from lamella.ray import Group, Place, Shard, refs
from lamella.ray.refs import got
from lamella_engine.chunking import Region
from lamella_engine.errors import StorageError

STORE_NBYTES = 80 << 20
"""Of each node's object store: about as small as Ray lets it be."""


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        threading.Event().wait(0.05)


class Holder:
    """Has tensors on a node, as a worker that trains would."""

    def shard(self, tensors: Mapping[str, Array], places: Mapping[str, Place]) -> Shard:
        return Shard.of_tensors(tensors, places=places)

    def fill(self, nbytes: int) -> Shard:
        return Shard.of_tensors({"w": np.zeros(nbytes, np.uint8)})

    def fill_up(self) -> list[Shard]:
        """Lend until there is no room for another 110 KiB: less does not come into the object store."""
        lent = []
        for nbytes in (2 << 20, 256 << 10, 110 << 10):
            with suppress(StorageError):
                while True:
                    lent.append(self.fill(nbytes))
        return lent

    def hold_too_much(self, room_s: float) -> int:
        """Lend twice what the object store holds, some of which is spilled; read it and hold what was read."""
        refs.ROOM_S = room_s
        lent: list[Shard] = []
        while len(lent) < 10:
            with suppress(StorageError):  # as long as others are being spilled
                lent.append(self.fill(STORE_NBYTES // 5))
        opened = [shard.source.open() for shard in lent]
        return len([source.read(source.structure[0], Region((slice(0, 1),), 0, 1)) for source in opened])

    def file(self, path: str, places: Mapping[str, Place]) -> Shard:
        return Shard.of_file(path, places=places)

    def give(self, group: Group, rank: int, tensors: Any, places: Mapping[str, Place], target: str, key: str) -> str:
        version: str = got(group.push(rank, [self.shard(tensors, places)], target, key=key, message=f"by {rank}"))
        return version


@dataclass(frozen=True)
class Nodes:
    """A cluster that this process is connected to."""

    address: str
    environment: Mapping[str, str]
    """What a process needs that connects to it too."""
    ids: tuple[str, ...]
    raylets: tuple[int, ...]
    """Their process ids."""
    spilled: Path
    """Where nodes put what does not fit into their object stores, each in a directory of its own."""

    @cached_property
    def holders(self) -> tuple[Any, ...]:
        """One on each node."""
        return tuple(self.new_holder(number) for number in range(len(self.ids)))

    def new_holder(self, number: int) -> Any:
        """Start a :class:`Holder` on a node."""
        new: Any = ray.remote(num_cpus=0)(Holder)
        return new.options(
            max_concurrency=2, scheduling_strategy=NodeAffinitySchedulingStrategy(self.ids[number], soft=False)
        ).remote()

    @contextmanager
    def full(self, number: int) -> Iterator[None]:
        """Fill the object store of a node that has spilled nothing, and have nobody write where it spills to."""
        place = self.spilled / f"ray_spilled_objects_{self.ids[number]}"
        place.parent.mkdir(exist_ok=True)
        place.symlink_to("/proc/self")  # there is no file to be made here, not even by root
        try:
            filling = got(self.holders[number].fill_up.remote())
            yield
            del filling
        finally:
            place.unlink()
            place.mkdir()

    def encoders(self) -> dict[int, int]:
        """Return the processes of encoders at work: process id -> number of the node."""
        return self.actors("_Encoder")

    def actors(self, name: str) -> dict[int, int]:
        """Return the processes of actors of a class: process id -> number of the node."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                title = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue
            if title.startswith(f"ray::{name}".encode()) and parent in self.raylets:
                found[int(entry.name)] = self.raylets.index(parent)
        return found


@contextmanager
def running(nodes: int, environment: Mapping[str, str]) -> Iterator[Nodes]:
    """Start nodes, whose workers find ``environment``, and connect to them."""
    with tempfile.TemporaryDirectory(prefix="lr") as folder:  # a short path: sockets lie in it
        Path(folder, "ray").mkdir()  # Ray notes there which cluster is the newest, and expects to find it
        settings = {
            "RAY_TMPDIR": folder,
            "RAY_object_spilling_directory": f"{folder}/spilled",
            "PYTHONPATH": str(Path(__file__).parent),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "XDG_CACHE_HOME": f"{folder}/cache",
            "XDG_STATE_HOME": f"{folder}/state",
            **environment,
        }
        with mock.patch.dict(os.environ, settings):
            cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 1,
                    "object_store_memory": STORE_NBYTES,
                    "include_dashboard": False,
                    "temp_dir": folder,
                    # Every disk counts as full, so that objects are in memory, or spilled, and not in mapped files.
                    "_system_config": {"local_fs_capacity_threshold": 0.0},
                },
            )
            try:
                for _ in range(nodes - 1):
                    cluster.add_node(wait=False, num_cpus=1, object_store_memory=STORE_NBYTES)
                cluster.wait_for_nodes()
                ray.init(address=cluster.address, log_to_driver=False, include_dashboard=False)
                try:
                    started = cluster.list_all_nodes()
                    raylets = tuple(node.all_processes["raylet"][0].process.pid for node in started)
                    yield Nodes(
                        cluster.address,
                        settings,
                        tuple(node.node_id for node in started),
                        raylets,
                        Path(folder, "spilled"),
                    )
                finally:
                    ray.shutdown()
            finally:
                cluster.shutdown()
