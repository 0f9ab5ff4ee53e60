"""Where arrays wait that are written through Zarr, until they are pushed together.

Importing this module imports zarr, so modules that are loaded with ``lamella`` import it on use only.
"""

import json
import os
from contextlib import ExitStack, suppress
from tempfile import TemporaryDirectory
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import zarr
from zarr.storage import LocalStore

from lamella_engine.checkpoints.zarr_directories import ZarrDirectory
from lamella_engine.checkpoints.zarr_groups import ZarrCheckpoint
from lamella_engine.checkpoints.zarr_metadata import stored_array
from lamella_engine.errors import InvalidInputError, LimitError
from lamella_engine.zarr_arrays import register_dtypes

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.core.buffer import Buffer


class _WriteEmptyChunks:
    """While anybody is inside, zarr writes chunks that equal their fill value.

    Left to itself it drops them, and it compares values: a chunk of bfloat16 -0.0 would come back as +0.0, and one of
    other NaNs than the fill value as that one. The setting is one for the process; arrays take it when they are opened.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._count = 0
        self._before: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._count:
                self._before = zarr.config.get("array.write_empty_chunks")
                zarr.config.set({"array.write_empty_chunks": True})
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                zarr.config.set({"array.write_empty_chunks": self._before})


_write_empty_chunks = _WriteEmptyChunks()


class _SpoolStore(LocalStore):
    """A directory that notes which keys zarr deleted, and that takes nothing any more once its time is over."""

    def __init__(self, root: "Path | str", *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.deleted: set[str] = set()
        """Keys that were deleted one by one: chunks that zarr did not want to keep."""

    async def delete(self, key: str) -> None:
        self.deleted.add(key)
        await super().delete(key)

    async def set(self, key: str, value: "Buffer") -> None:
        await super().set(key, value)
        if key.endswith("/zarr.json"):  # an array that was cut drops what lies outside of it, and may grow again
            self._forget_outside(key.removesuffix("/zarr.json"), value.to_bytes())

    def _forget_outside(self, node: str, metadata: bytes) -> None:
        deleted = {key for key in self.deleted if key.startswith(f"{node}/")}
        if deleted:
            with suppress(InvalidInputError, LimitError):  # then the commit refuses it
                array = stored_array(json.loads(metadata))
                self.deleted -= {key for key in deleted if not array.has_chunk(key.removeprefix(f"{node}/"))}

    async def delete_dir(self, prefix: str) -> None:
        self.deleted = {key for key in self.deleted if not key.startswith(f"{prefix.rstrip('/')}/")}
        await super().delete_dir(prefix)

    def _check_writable(self) -> None:
        if self.read_only:
            raise InvalidInputError("the transaction has ended: begin another", kind="closed")

    def refuse_writes(self) -> None:
        """Take nothing any more."""
        self._read_only = True


class Spool:
    """A temporary directory as a writable group, for as long as a ``with`` block lasts.

    Several may be open at a time, in any threads.

    Parameters
    ----------
    parent
        Where the directory is made; by default where the system keeps temporary files.
    """

    def __init__(self, parent: "str | os.PathLike[str] | None" = None) -> None:
        self._parent = parent
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        register_dtypes()
        with ExitStack() as opened:
            self._root = opened.enter_context(TemporaryDirectory(prefix="lamella-", dir=self._parent))
            opened.enter_context(_write_empty_chunks)
            self._store = _SpoolStore(self._root)
            opened.callback(self._store.refuse_writes)
            self.group = zarr.create_group(self._store)
            """The root, empty at first."""
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def checkpoint(self) -> ZarrCheckpoint:
        """Return what was written so far as a checkpoint; it can be read until the block ends.

        Raises
        ------
        InvalidInputError
            A chunk was written and dropped by zarr because it equalled the fill value, which must have been asked for
            (``dropped_chunk``; inside of a shard it goes unnoticed); or a kind of
            :class:`~lamella_engine.checkpoints.zarr_groups.ZarrCheckpoint`.
        """
        directory = ZarrDirectory(self._root)
        for key in sorted(self._store.deleted):
            if directory.lacks_chunk(key):
                raise InvalidInputError(
                    f"zarr did not keep the chunk {key[:80]!r}, for its values equal the fill value, though its bits "
                    "may not: write the array without the option write_empty_chunks=False",
                    kind="dropped_chunk",
                )
        return ZarrCheckpoint(directory)
