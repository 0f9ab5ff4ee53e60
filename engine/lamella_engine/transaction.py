"""A version written through Zarr: a group to fill, and one push of what it holds in the end."""

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from lamella_engine.content_store.seam import Push
from lamella_engine.errors import InvalidInputError
from lamella_engine.executor import Executor
from lamella_engine.notes import Notes
from lamella_engine.pushing import push_checkpoint
from lamella_engine.reading import Reader
from lamella_engine.versions import Version

if TYPE_CHECKING:
    import zarr


class Transaction:
    """Made by :meth:`lamella.Repository.transaction`; good for one ``with`` block."""

    __module__ = "lamella"

    def __init__(self, reader: Reader, executor: Executor, notes: Notes, begin: Callable[[], Push]) -> None:
        self._reader = reader
        self._executor = executor
        self._notes = notes
        self._begin = begin
        self._push: Push | None = None
        self._opened = ExitStack()
        self._version: Version | None = None

    @property
    def version(self) -> Version:
        """The version that was recorded; raises InvalidInputError (``not_committed``) if none was."""
        if self._version is None:
            raise InvalidInputError(
                "the transaction has recorded no version: its block must end first", kind="not_committed"
            )
        return self._version

    def __enter__(self) -> "zarr.Group":
        from lamella_engine.checkpoints.zarr_spool import Spool  # on use: zarr takes 0.4 s to import

        if self._push is not None:
            raise InvalidInputError("a transaction is good for one block: begin another", kind="closed")
        self._push = self._begin()  # now, so that a branch that moves meanwhile is a conflict
        self._spool = self._opened.enter_context(Spool())
        return self._spool.group

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._opened:
            if error is not None or self._push is None:
                return
            with self._spool.checkpoint() as checkpoint:
                if not checkpoint.structure:
                    raise InvalidInputError(
                        "there is nothing to record: the group has no arrays: create some in the block",
                        kind="empty_source",
                    )
                recorded = push_checkpoint(self._push, checkpoint, self._executor, self._notes)
            self._version = Version(recorded, self._reader)
