"""Workers: the actors, one on each node of a cluster, that do the parts of what is asked of a whole repository."""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import islice
from operator import methodcaller
from types import TracebackType
from typing import Any, Self, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import lamella
from lamella.ray.encoders import RESTARTS
from lamella.ray.refs import got
from lamella_engine.errors import StorageError
from lamella_engine.repository import Repository
from lamella_engine.spreading import Result, Task

TRIES = 3
"""On so many nodes is something begun whose workers die: what kills three of them is no accident."""

Call: TypeAlias = Callable[[Repository], Any]
"""What a worker does: pickled, and called with the repository."""


class _Worker:
    """Opens a repository on its node, with the credentials that are there."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._repo: Repository | None = None

    def do(self, call: Call) -> Any:
        self._repo = self._repo or lamella.open(self._location)
        return call(self._repo)


_new_worker: Any = ray.remote(num_cpus=0, max_restarts=RESTARTS, max_task_retries=-1)(_Worker)


class Workers:
    """Workers at one repository, started when there is something to do for them, and gone when the block ends.

    Each does one thing at a time, in threads for all cores of its node. What a worker that is lost was at is done by
    another one.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._nodes = deque(_node_ids())
        self._idle: list[Any] = []
        self._waiting: deque[tuple[Hashable, Call]] = deque()
        self._running: dict[Any, tuple[Any, Hashable, Call]] = {}
        self._losses: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        """How many there are, or may be."""
        return len(self._nodes) + len(self._idle) + len(self._running)

    def begin(self, key: Hashable, call: Call) -> None:
        """Have something done."""
        self._waiting.append((key, call))

    def ended(self) -> Iterator[tuple[Hashable, Any]]:
        """Yield the key of each thing that ends with what came of it, or the exception, until all have ended.

        Meanwhile more may be begun. Raises StorageError (``worker_lost``) if no worker is left.
        """
        while self._waiting or self._running:
            while self._waiting and (self._idle or self._nodes):
                key, call = self._waiting.popleft()
                worker = self._idle.pop() if self._idle else self._started(self._nodes.popleft())
                self._running[worker.do.remote(call)] = worker, key, call
            (ref,), _ = ray.wait(list(self._running), num_returns=1)
            worker, key, call = self._running.pop(ref)
            try:
                result = got(ref)
            except Exception as error:
                result = error
            if not _is_loss(result):
                self._idle.append(worker)
                del self._losses[key]  # what is begun under the same key is something else
                yield key, result
                continue
            ray.kill(worker)
            self._losses[key] += 1
            if not len(self):
                raise result
            if self._losses[key] < TRIES:
                self._waiting.appendleft((key, call))
            else:
                yield key, result

    def _started(self, node: str) -> Any:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        return _new_worker.options(scheduling_strategy=here).remote(self._location)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in [*self._idle, *(worker for worker, _, _ in self._running.values())]:
            ray.kill(worker)


_nodes: Any = ray.nodes  # it has no types


def _is_loss(result: object) -> bool:
    return isinstance(result, StorageError) and result.kind == "worker_lost"


def _node_ids() -> list[str]:
    """Return the nodes that work is for: a head that is given no CPUs coordinates only, unless there are no others."""
    if not ray.is_initialized():
        ray.init()
    nodes: list[dict[str, Any]] = _nodes()
    alive = [node for node in nodes if node["Alive"]]
    workers = [node for node in alive if node["Resources"].get("CPU")]
    return [node["NodeID"] for node in workers or alive]


class _Cluster:
    """See :class:`~lamella_engine.spreading.Cluster`: all nodes of the Ray cluster that this process belongs to."""

    def map(self, location: str, tasks: Iterable[Task[Result]]) -> Iterator[Result]:
        calls = enumerate(methodcaller("run_task", task) for task in tasks)
        found: dict[Hashable, Result] = {}
        following = 0
        with Workers(location) as workers:
            for number, call in islice(calls, 2 * len(workers)):  # so that no worker waits for the next to be made
                workers.begin(number, call)
            for ended, result in workers.ended():
                if isinstance(result, Exception):
                    raise result
                found[ended] = result
                for number, call in islice(calls, 1):
                    workers.begin(number, call)
                while following in found:
                    yield found.pop(following)
                    following += 1


cluster = _Cluster()
"""What ``executor="ray"`` stands for."""
