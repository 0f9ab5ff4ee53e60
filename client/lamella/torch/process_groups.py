"""The way of ranks to each other while they save: gloo groups of their own, which saves take turns to have."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from lamella_engine.errors import StorageError
from lamella_engine.exchanging import Alone, Exchange
from lamella_engine.model import Buffer


class Group:
    """A gloo group of the ranks of a save. Made once for the same ranks, as it connects all; one save has it at a time.

    None of torch's own groups: those are named by counting, and ranks that save in threads, or not all, would count
    differently; and what ranks say to each other here must not mix with what training says, nor with another save.
    """

    _known: ClassVar[dict[str, "Group"]] = {}
    _free: ClassVar[dict[tuple[int, ...], list[tuple[Any, str]]]] = {}
    """By ranks, on the one that coordinates: groups that no save has now, each with the job that it was made in."""
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, name: str, worker: int, workers: int) -> None:
        # A connection of its own, where torch has that (2.8): who waits for others on one lets nobody else use it, and
        # two ranks that make two groups at once, each in another order, would wait for each other.
        store: Any = _get_default_store()
        store = PrefixStore(f"lamella/{name}", store.clone() if hasattr(store, "clone") else store)
        # As torch has it: its stubs know of gloo what it adds to a group, not what a group can do.
        self.gloo: Any = dist.ProcessGroupGloo(store, worker, workers, dist.default_pg_timeout)

    @classmethod
    def taken(cls, ranks: tuple[int, ...]) -> str:
        """Return how the coordinator calls a group of these ranks, which is this save's until it is given back."""
        if len(ranks) == 1:
            return ""
        with cls._lock:
            free = cls._free.setdefault(ranks, [])
            free[:] = [(world, name) for world, name in free if world is dist.group.WORLD]  # else the job began anew
            return free.pop()[1] if free else uuid4().hex

    @classmethod
    def give_back(cls, ranks: tuple[int, ...], name: str) -> None:
        """Let another save have a group. Not one in which a rank failed: nobody knows what is still under way there."""
        if name:
            with cls._lock:
                cls._free[ranks].append((dist.group.WORLD, name))

    @classmethod
    def of(cls, name: str, worker: int, workers: int) -> "Group":
        """Return the group that the coordinator has called so; all its ranks have to ask for it."""
        group = cls._known.get(name)
        if group is None:  # no lock: two saves that begin at once make two groups, in any order
            group = cls._known[name] = cls(name, worker, workers)
        return group

    @classmethod
    def forget(cls, name: str) -> None:
        """Close a group in which this rank failed."""
        cls._known.pop(name, None)


@contextmanager
def exchange(name: str, worker: int, workers: int) -> Iterator[Exchange]:
    """Give the way of one rank to the others, for one save."""
    if workers == 1:
        yield Alone()
        return
    try:
        yield _GlooExchange(Group.of(name, worker, workers))
    except BaseException:
        Group.forget(name)
        raise


class _GlooExchange:
    """See :class:`~lamella_engine.exchanging.Exchange`."""

    def __init__(self, group: Group) -> None:
        self._gloo = group.gloo

    def merge(self, mine: bytearray) -> Buffer:
        merged = torch.frombuffer(mine, dtype=torch.uint8)
        with _reaching():
            self._gloo.allreduce([merged], dist.ReduceOp.MAX).wait()
        return merged.numpy().data

    def swap(self, number: int, sends: Mapping[int, Buffer], receives: Mapping[int, int]) -> Mapping[int, Buffer]:
        with _reaching():
            tag = number % (1 << 31)
            got = {worker: torch.empty(nbytes, dtype=torch.uint8) for worker, nbytes in receives.items()}
            works = [self._gloo.recv([tensor], worker, tag) for worker, tensor in got.items()]
            works += [
                self._gloo.send([torch.frombuffer(data, dtype=torch.uint8)], worker, tag)
                for worker, data in sends.items()
            ]
            for work in works:
                work.wait()
        return {worker: tensor.numpy().data for worker, tensor in got.items()}


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise StorageError(
            f"another rank cannot be reached any more: save again when the job is whole ({reason})",
            kind="worker_lost",
            transient=True,
        ) from error
