"""Staged copies: tensors in memory, copied into memory of our own so that their owner may go on changing them."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lamella_engine.checkpoints.pages import Pages, aligned
from lamella_engine.checkpoints.tensors import MemoryCheckpoint
from lamella_engine.chunking import Region
from lamella_engine.errors import InvalidInputError, TensorNotFoundError
from lamella_engine.model import Attachment, Buffer, TensorSpec
from lamella_engine.torch_tensors import Device

STAGED_COPIES = 2
"""One that is being stored, and one that the next push is copied into meanwhile."""


class Staging:
    """Memory for at most :data:`STAGED_COPIES` copies at a time, used again and again. Safe for several threads.

    First touch of fresh memory takes several times as long as a copy. So memory is given back only to make room for
    more, until :meth:`close`: it comes to twice the largest checkpoint that was copied.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = 0
        self._free: list[Pages] = []

    def copy(self, source: MemoryCheckpoint) -> "StagedCheckpoint":
        """Copy a checkpoint, once there is room; what :meth:`StagedCheckpoint.wait` raises is raised here if it can be.

        Tensors that are one memory are copied once. Raises LimitError (``not_pinned``) if tensors lie on a GPU and the
        system locks no such amount of memory.
        """
        starts: dict[str, int] = {}
        known: dict[object, int] = {}
        nbytes = 0
        for spec in source.structure:
            start = starts[spec.name] = known.setdefault(source.memory(spec), nbytes)
            if start == nbytes:
                nbytes += aligned(spec.nbytes)
        memory = self._take(nbytes, source.device)
        staged = StagedCheckpoint(source, starts, memory, self._give_back)
        try:
            staged.fill()
        except BaseException:
            staged.close()
            raise
        return staged

    def _take(self, nbytes: int, pinned_by: Device | None) -> Pages:
        with self._changed:
            self._changed.wait_for(lambda: self._taken < STAGED_COPIES)
            self._taken += 1
            fitting = [one for one in self._free if one.octets.nbytes >= nbytes and (one.pinned or pinned_by is None)]
            if self._free:  # what does not fit makes room for what will
                taken = min(fitting or self._free, key=lambda memory: memory.octets.nbytes)
                self._free.remove(taken)
                if fitting:
                    return taken
        try:
            return Pages(nbytes, pinned_by)
        except BaseException:
            self._give_back(None)
            raise

    def _give_back(self, memory: Pages | None) -> None:
        with self._changed:
            self._taken -= 1
            if memory is not None:
                self._free.append(memory)
            self._changed.notify_all()

    def close(self) -> None:
        """Give the memory back to the system, once all copies are closed."""
        with self._changed:
            self._free.clear()


class StagedCheckpoint:
    """A copy of a checkpoint in memory; made by :meth:`Staging.copy`. What it promises says ``Checkpoint``."""

    def __init__(
        self,
        source: MemoryCheckpoint,
        starts: dict[str, int],
        memory: Pages,
        give_back: Callable[[Pages], None],
    ) -> None:
        self.structure = source.structure
        self.random_access = True
        self.attachments: tuple[Attachment, ...] = ()
        self._source = source
        self._starts = starts
        self._memory: Pages | None = memory
        self._give_back = give_back
        self._lock = threading.Lock()
        self._whole = False

    def fill(self) -> None:
        """Copy what lies in this machine's memory; begin to copy what lies on a GPU."""
        assert self._memory is not None
        filled: set[int] = set()
        for spec in self.structure:
            start = self._starts[spec.name]
            if start not in filled and spec.nbytes:
                self._source.copy(spec, self._memory.octets[start : start + spec.nbytes])
                filled.add(start)
        if self._source.device is None:
            self.wait()

    @property
    def whole(self) -> bool:
        """Whether everything has been copied, so that :meth:`wait` returns at once."""
        return self._whole

    def wait(self) -> None:
        """Wait until everything has been copied, and the source may change.

        Raises InvalidInputError (``source_changed``) if a tensor changed before.
        """
        with self._lock:
            if not self._whole:
                self._source.wait()
                self._source.check_unchanged()
                self._source.close()
                self._whole = True

    def read(self, tensor: TensorSpec, region: Region, out: Buffer | None = None) -> Buffer:
        """See :meth:`Checkpoint.read`; a view. Waits, and raises, as :meth:`wait` does."""
        if not self._whole:
            self.wait()
        memory = self._memory
        if memory is None:
            raise InvalidInputError("the checkpoint was closed: open it again", kind="closed")
        if tensor.name not in self._starts:
            raise TensorNotFoundError(f"there is no tensor {tensor.name[:80]!r}", tensor=tensor.name)
        start = self._starts[tensor.name]
        return memory.octets[start + region.start : start + region.stop].data

    def check_unchanged(self) -> None:
        """See :meth:`Checkpoint.check_unchanged`: the copy is nobody else's."""

    def close(self) -> None:
        """Let go of the copy, whose memory is used again. Doing it twice is harmless."""
        with self._lock:
            memory, self._memory = self._memory, None
            if memory is None:
                return
            try:
                self._source.close()
            finally:  # a GPU that fails writes nothing any more
                self._give_back(memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
