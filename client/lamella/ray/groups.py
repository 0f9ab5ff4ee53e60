"""Groups: workers that train together, whose shards make one version each time."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import ray

from lamella.ray.pushes import push
from lamella.ray.shards import Shard
from lamella_engine.errors import StorageError


class Group:
    """The pushes of a group of workers, such as those of a Ray Train job, in an actor that is theirs.

    Made by whoever starts the workers, and given to each of them: it pickles, and lives as long as its maker's process
    knows it. It pushes while they train on, as what they give is a copy.

    Parameters
    ----------
    repo
        Where to; see :func:`push`.
    size
        How many workers there are.
    """

    def __init__(self, repo: str, size: int) -> None:
        self._coordinator = _new_coordinator.remote(repo, size)

    def push(self, rank: int, shards: Iterable[Shard], target: str, *, key: str, **notes: Any) -> Any:
        """Give one worker's shards; when all have given theirs, they are pushed.

        Parameters
        ----------
        rank
            Which worker this is, from 0.
        shards, target
            As :func:`push` takes them; ``target`` is the same for all.
        key
            What all workers call this version, such as ``"step 2000"``. A worker that was started again may give its
            shards once more under it. What some gave and others did not is let go of when all have given a later one.
        **notes
            ``message``, ``metrics``, ``recipe``, ``files`` and ``parent`` of :func:`push`; those of worker 0 count.

        Returns
        -------
        ray.ObjectRef of str
            The id of the version; ``ray.get`` of it waits, and raises what :func:`push` does, or StorageError
            (``worker_lost``) if others did not give theirs.
        """
        return self._coordinator.push.remote(key, rank, list(shards), target, notes)


class _Gathering:
    """What the workers of a group have given of one version."""

    def __init__(self) -> None:
        self.given: dict[int, tuple[Sequence[Shard], Mapping[str, Any]]] = {}
        self.pushed: asyncio.Future[asyncio.Future[str]] = asyncio.get_running_loop().create_future()
        """How the push ends, once it has begun."""


class _Coordinator:
    """Waits for the shards of a group, and pushes them."""

    def __init__(self, repo: str, size: int) -> None:
        self._repo = repo
        self._size = size
        self._gatherings: dict[str, _Gathering] = {}

    async def push(self, key: str, rank: int, shards: Sequence[Shard], target: str, notes: Mapping[str, Any]) -> str:
        """See :meth:`Group.push`."""
        gathering = self._gatherings.setdefault(key, _Gathering())
        gathering.given[rank] = shards, notes
        if gathering.given.keys() == set(range(self._size)):
            for stale in takewhile(lambda begun: begun != key, list(self._gatherings)):
                self._gatherings.pop(stale).pushed.set_exception(_not_given(stale))
            del self._gatherings[key]
            whole = [shard for some, _ in gathering.given.values() for shard in some]
            pushing = asyncio.to_thread(_pushed, whole, target, self._repo, gathering.given[0][1])
            gathering.pushed.set_result(asyncio.ensure_future(pushing))
        return await asyncio.shield(await asyncio.shield(gathering.pushed))


def _not_given(key: str) -> StorageError:
    return StorageError(
        f"some workers did not give their shards of {key!r}, and all gave later ones: were they started again?",
        kind="worker_lost",
    )


_new_coordinator: Any = ray.remote(num_cpus=0)(_Coordinator)


def _pushed(shards: Sequence[Shard], target: str, repo: str, notes: Mapping[str, Any]) -> str:
    return push(shards, target, repo, **notes).id
