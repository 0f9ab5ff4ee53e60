"""Jobs spread over a cluster: each of its nodes opens the repository by its location, and does a part of them."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import entry_points
from typing import Protocol, TypeAlias, TypeVar

from lamella_engine.content_store.packed import PackedStore
from lamella_engine.content_store.seam import ContentStore
from lamella_engine.distance import Distance, measure
from lamella_engine.dtypes import Dtype
from lamella_engine.errors import InvalidInputError
from lamella_engine.executor import Executor, batches
from lamella_engine.format.entry import PackAdded
from lamella_engine.maintenance import Verification, verify, verify_packs
from lamella_engine.model import Cell, VersionId
from lamella_engine.moments import Moments
from lamella_engine.reading import Reader, Selection

GROUP = "lamella.executors"
"""The entry points that name clusters: each is a :class:`Cluster`."""

TASK_NBYTES = 256 << 20
"""About how much one task reads: some seconds of work, so that handing it over takes nothing, and what a node that dies
was at is soon done anew."""

TASK_ITEMS = 1 << 16
"""At most so many cells or packs are in one task, however small: they travel with it."""

Item = TypeVar("Item")
Result = TypeVar("Result")

Task: TypeAlias = Callable[[ContentStore, Executor], Result]
"""A part of a job, called with a repository: it can be pickled, and changes nothing."""


class Cluster(Protocol):
    """Processes that can open a repository, with credentials of their own."""

    def map(self, location: str, tasks: Iterable[Task[Result]]) -> Iterator[Result]:
        """Yield what tasks return, in their order, each called where the repository has been opened.

        Raises what a task raises, and StorageError (``worker_lost``) if nobody is left to do it.
        """


def cluster_named(name: str) -> Cluster:
    """Return the cluster of a name. Raises InvalidInputError (``bad_executor``, ``missing_extra``)."""
    for found in entry_points(group=GROUP, name=name):
        try:
            cluster: Cluster = found.load()
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise InvalidInputError(
                f"the executor {name!r} needs a package that is not installed: pip install 'lamella[{name}]'",
                kind="missing_extra",
            ) from None
        return cluster
    known = sorted(found.name for found in entry_points(group=GROUP))
    raise InvalidInputError(f"there is no executor {name!r}: there is {', '.join(known)}", kind="bad_executor")


class SpreadJobs:
    """What of :class:`~lamella_engine.jobs.Jobs` can be spread.

    Parameters
    ----------
    store, executor
        The repository, as this process has it: it makes the tasks, and puts together what they return.
    cluster
        Does them.
    location
        Where the repository is, for all.
    """

    def __init__(self, store: ContentStore, executor: Executor, cluster: Cluster, location: str) -> None:
        self._store = store
        self._executor = executor
        self._cluster = cluster
        self._location = location

    def distance(self, a: VersionId, b: VersionId, selection: Selection) -> Distance:
        """See :func:`lamella_engine.distance.measure`."""

        def pairs(cells: Iterable[tuple[Cell, Dtype]]) -> Iterator[tuple[Cell, Moments]]:
            manifest = self._store.manifest(a)

            def nbytes(item: tuple[Cell, Dtype]) -> int:
                cell, _ = item
                assert cell.tensor is not None
                return manifest.spec(cell.tensor).grid.cell_nbytes(cell.number)

            tasks = (partial(_measured, a, b, some) for some in _parts(cells, nbytes))
            for measured in self._cluster.map(self._location, tasks):
                yield from measured

        return measure(Reader(self._store, self._executor), a, b, selection, pairs=pairs)

    def verify(self, *, deep: bool, doubtful: bool) -> Verification:
        """See :func:`lamella_engine.maintenance.verify`; raises InvalidInputError (``not_shared``) behind a service."""
        if not isinstance(self._store, PackedStore):
            raise InvalidInputError(
                "a service verifies its repositories where their bytes lie: leave executor out", kind="not_shared"
            )

        def check_packs(packs: Iterable[PackAdded]) -> Iterator[Verification]:
            tasks = (partial(_verified, deep or doubtful, some) for some in _parts(packs, lambda pack: pack.nbytes))
            return self._cluster.map(self._location, tasks)

        return verify(self._store, deep=deep, doubtful=doubtful, check_packs=check_packs)


def _measured(
    a: VersionId, b: VersionId, cells: list[tuple[Cell, Dtype]], store: ContentStore, executor: Executor
) -> list[tuple[Cell, Moments]]:
    return list(Reader(store, executor).measure_pairs(a, b, cells))


def _verified(deep: bool, packs: list[PackAdded], store: ContentStore, executor: Executor) -> Verification:
    assert isinstance(store, PackedStore)
    return verify_packs(store, packs, deep=deep)


def _parts(items: Iterable[Item], nbytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    return batches(items, nbytes, most_nbytes=TASK_NBYTES, most_items=TASK_ITEMS)
