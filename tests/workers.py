"""Workers of a shared push for tests: threads that exchange pieces by queues."""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
from support import PATIENCE_S, Array

from lamella_engine.boxes import Box
from lamella_engine.dtypes import dtype_of_numpy
from lamella_engine.model import Buffer, TensorSpec
from lamella_engine.parts import Part
from lamella_engine.repository import Repository
from lamella_engine.versions import Version


class Meeting:
    """Where the threads of one push meet."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.sent_nbytes = 0
        self._barrier = threading.Barrier(workers, timeout=PATIENCE_S)
        self._merged: list[Any] = [None] * workers
        self._queues: defaultdict[tuple[int, int, int], SimpleQueue[bytes]] = defaultdict(SimpleQueue)
        self._lock = threading.Lock()

    def exchange(self, worker: int) -> "ThreadExchange":
        return ThreadExchange(self, worker)

    def merge(self, worker: int, mine: bytearray) -> bytes:
        self._merged[worker] = np.frombuffer(mine, np.uint8)
        self._barrier.wait()
        return np.max(self._merged, axis=0).tobytes()

    def queue(self, number: int, source: int, target: int) -> "SimpleQueue[bytes]":
        with self._lock:
            return self._queues[number, source, target]


@dataclass
class ThreadExchange:
    meeting: Meeting
    worker: int
    most_nbytes: int = field(default=0)
    """Of one round, sent or received."""

    def merge(self, mine: bytearray) -> bytes:
        return self.meeting.merge(self.worker, mine)

    def swap(self, number: int, sends: Mapping[int, Buffer], receives: Mapping[int, int]) -> Mapping[int, Buffer]:
        sent = sum(len(memoryview(data)) for data in sends.values())
        self.most_nbytes = max(self.most_nbytes, sent, sum(receives.values()))
        for target, data in sends.items():
            self.meeting.queue(number, self.worker, target).put(bytes(data))
        got = {source: self.meeting.queue(number, source, self.worker).get(timeout=PATIENCE_S) for source in receives}
        assert {source: len(data) for source, data in got.items()} == dict(receives)
        return got


Held = Sequence[tuple[str, Box, Any]]


def shard(array: Array, box: Box) -> Array:
    found: Array = array[tuple(slice(first, stop) for first, stop in box)]
    return found


def cut(shape: Sequence[int], axis: int, workers: int) -> list[Box]:
    """Cut a shape as ``torch.chunk`` does: as many rows to each as to the first, fewer or none to the last."""
    length = -(-shape[axis] // workers)
    ends = [min(length * worker, shape[axis]) for worker in range(workers + 1)]
    return [
        tuple((ends[worker], ends[worker + 1]) if at == axis else (0, size) for at, size in enumerate(shape))
        for worker in range(workers)
    ]


def structure_of(tensors: Mapping[str, Array]) -> list[TensorSpec]:
    return [TensorSpec(name, dtype_of_numpy(array.dtype), array.shape) for name, array in tensors.items()]


def push_shared(
    repos: Sequence[Repository],
    target: str,
    tensors: Mapping[str, Array],
    held: Sequence[Held],
    *,
    each: Callable[[int, Repository], Repository] = lambda worker, repo: repo,
    **notes: Any,
) -> tuple[Version, list[Part]]:
    """Push what worker i holds, ``held[i]``, through repository i; the first one coordinates."""
    workers = len(held)
    meeting = Meeting(workers)
    holdings: defaultdict[str, list[tuple[Box, int]]] = defaultdict(list)
    for worker, mine in enumerate(held):
        for name, box, _ in mine:
            holdings[name].append((box, worker))
    shared = repos[0].sharing.begin(target, structure_of(tensors), holdings, workers)

    def work(worker: int) -> Part:
        repo = each(worker, repos[worker])
        return repo.sharing.store_part(shared.assignments[worker], lambda: held[worker], meeting.exchange(worker))

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, worker) for worker in range(workers)]
    try:
        parts = [future.result() for future in futures]
    except BaseException:
        shared.abandon()
        raise
    return repos[0].sharing.record(shared, parts, **notes), parts


def split(tensors: Mapping[str, Array], workers: int, axis_of: Callable[[str], int | None]) -> list[Held]:
    """Give every worker its shard of each tensor along an axis; the tensors without an axis to all."""
    held: list[list[tuple[str, Box, Any]]] = [[] for _ in range(workers)]
    for name, array in tensors.items():
        axis = axis_of(name)
        whole = tuple((0, length) for length in array.shape)
        for worker, box in enumerate([whole] * workers if axis is None else cut(array.shape, axis, workers)):
            held[worker].append((name, box, shard(array, box).copy() if worker % 2 else shard(array, box)))
    return held
