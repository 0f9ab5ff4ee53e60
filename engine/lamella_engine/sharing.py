"""What workers that hold a checkpoint together do with a repository: push it in parts, and fill parts of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lamella_engine.boxes import Box
from lamella_engine.checkpoints.shards import Shards
from lamella_engine.content_store.revisions import parse_target
from lamella_engine.content_store.seam import ContentStore
from lamella_engine.exchanging import Exchange, Fetch
from lamella_engine.executor import Executor
from lamella_engine.filling import fill_boxes
from lamella_engine.model import Buffer, TensorSpec
from lamella_engine.notes import attachments_of, notes_of
from lamella_engine.parts import Assignment, Part, SharedPush, store_batch, store_part
from lamella_engine.reading import Reader
from lamella_engine.version_files import check_files
from lamella_engine.versions import Version


class Sharing:
    """See the module. Had as ``Repository.sharing``.

    Parameters
    ----------
    store, executor, reader
        The parts of a repository.
    """

    def __init__(self, store: ContentStore, executor: Executor, reader: Reader) -> None:
        self._store = store
        self._executor = executor
        self._reader = reader

    def begin(
        self,
        target: str,
        structure: Sequence[TensorSpec],
        holdings: Mapping[str, Sequence[tuple[Box, int]]],
        workers: int,
        *,
        parent: str | None = None,
        batch_nbytes: int | None = None,
    ) -> SharedPush:
        """Begin a push of tensors that lie with several workers; ``LamellaWriter`` and ``lamella.ray`` are made of it.

        Parameters
        ----------
        target, parent
            As ``Repository.push`` takes them.
        structure, holdings, workers
            The tensors, where their boxes lie, and how many workers there are: see
            :func:`lamella_engine.sharding.share_out`.
        batch_nbytes
            For workers that call :meth:`store_batch`: about how much each stores at a time.

        Raises
        ------
        InvalidInputError
            Boxes do not make their tensor (``bad_shards``).
        ConflictError
            The branch is not where it was expected.
        """
        model, branch = parse_target(target)
        return SharedPush(
            self._store,
            self._executor,
            model=model,
            branch=branch,
            parent=None if parent is None else self._store.resolve(parent),
            structure=structure,
            holdings=holdings,
            workers=workers,
            batch_nbytes=batch_nbytes,
        )

    def store_part(
        self, assignment: Assignment, held: Callable[[], Iterable[tuple[str, Box, object]]], exchange: Exchange
    ) -> Part:
        """Store what one worker of a shared push has; see :func:`lamella_engine.parts.store_part`."""
        return store_part(self._store, self._executor, assignment, held, exchange)

    def store_batch(self, assignment: Assignment, shards: Shards, merged: Buffer, fetch: Fetch) -> Part:
        """Store a batch of what one worker of a shared push has; see :func:`lamella_engine.parts.store_batch`."""
        return store_batch(self._store, self._executor, assignment, shards, merged, fetch)

    def record(
        self,
        shared: SharedPush,
        parts: Sequence[Part],
        *,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        recipe: Any = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Version:
        """Record what the workers of a shared push have stored as a version. Raises as ``Repository.push`` does."""
        attached = attachments_of(files)
        check_files(attached, has_tensors=True)
        return Version(shared.commit(parts, notes_of(message, metrics, recipe), files=attached), self._reader)

    def fill_boxes(self, revision: str, targets: Sequence[tuple[str, Box, Any]]) -> None:
        """Fill memory with parts of tensors; ``lamella.torch.LamellaReader`` is made of it.

        ``targets`` are names of tensors, a box of each ((first, stop) for each axis), and a writable NumPy array or
        torch tensor of the box's shape. Only the cells that boxes touch are read. Raises TensorNotFoundError, and
        InvalidInputError if memory is not as its box is.
        """
        id = self._store.resolve(revision)
        manifest = self._store.manifest(id)
        fill_boxes(self._reader, id, [(manifest.spec(name), box, memory) for name, box, memory in targets])
