"""Shards: what lies on one node, in a file or in memory, and how it is read there."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import ray

from lamella.ray.refs import brought, put
from lamella_engine.boxes import Octets
from lamella_engine.checkpoints import MemoryCheckpoint, SafetensorsCheckpoint
from lamella_engine.chunking import Region
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import Attachment, Buffer, TensorSpec

LENT_NBYTES = 32 << 20
"""Tensors are lent together up to so many bytes: an object takes Ray about a millisecond."""

LENT_HELD = 16
"""Objects that an encoder holds at a time, of all shards together: what is held cannot be spilled. A small tensor may
lie in as many objects as there are processes that train on the node, eight as a rule, and the next one in the same."""

Place: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""The shape of a whole tensor, and the offset of a shard in it."""


@dataclass(frozen=True, slots=True)
class _File:
    """A safetensors file on a node."""

    path: str

    def open(self) -> SafetensorsCheckpoint:
        return SafetensorsCheckpoint(self.path)


@dataclass(frozen=True, slots=True)
class _Lent:
    """Tensors as bytes in Ray's object store."""

    structure: tuple[TensorSpec, ...]
    objects: tuple[Any, ...]
    """Refs to lists of arrays of uint8."""
    places: Mapping[str, tuple[int, int]]
    """Name of a tensor -> the number of its object, and its number in that."""

    def open(self) -> "LentTensors":
        return LentTensors(self)


@dataclass(frozen=True, slots=True)
class Shard:
    """Tensors, or boxes of tensors, that lie on one node: a file there, or memory of a process. Small; pickles.

    Made by :meth:`of_file` and :meth:`of_tensors`.
    """

    node: str
    """The id of the node, as ``ray.get_runtime_context().get_node_id()`` gives it."""
    source: _File | _Lent
    places: Mapping[str, Place] = field(default_factory=dict)
    """Where the boxes lie; tensors that are not named are whole."""

    @classmethod
    def of_file(
        cls, path: "str | os.PathLike[str]", *, node: str | None = None, places: Mapping[str, Place] | None = None
    ) -> Self:
        """Return what a ``.safetensors`` file holds; it is read on its node only, and not before the push.

        Parameters
        ----------
        path
            Absolute, as that node sees it.
        node
            Its id; by default that of the process which calls this.
        places
            For each tensor of which the file has only a box, the shape of the whole, and the box's offset in it.
        """
        if not os.path.isabs(path):
            raise InvalidInputError(
                f"{os.fspath(path)!r} is no absolute path: another process will open it", kind="bad_path"
            )
        return cls(node or _this_node(), _File(os.fspath(path)), dict(places or {}))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, object], *, places: Mapping[str, Place] | None = None) -> Self:
        """Return tensors of this process, copied into the object store of its node as bytes: they may change at once.

        The copy lives as long as this process and anybody who has the result.

        Parameters
        ----------
        tensors
            NumPy arrays and torch tensors by name, of any strides and device.
        places
            As for :meth:`of_file`.

        Raises
        ------
        InvalidInputError
            Something is no tensor that can be stored, as ``Repository.push`` has it.
        StorageError
            The object store is full, and what it spills to is too (``object_store_full``).
        """
        with MemoryCheckpoint(tensors) as checkpoint:
            objects: list[Any] = []
            found: dict[str, tuple[int, int]] = {}
            batch: list[Octets] = []
            for spec in checkpoint.structure:
                found[spec.name] = len(objects), len(batch)
                batch.append(np.frombuffer(checkpoint.whole(spec), np.uint8))
                if sum(octets.nbytes for octets in batch) >= LENT_NBYTES:
                    objects.append(put(batch))
                    batch = []
            if batch:
                objects.append(put(batch))
            checkpoint.check_unchanged()
            return cls(_this_node(), _Lent(checkpoint.structure, tuple(objects), found), dict(places or {}))


def _this_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


@lru_cache(LENT_HELD)
def _held(ref: Any, nbytes: int) -> list[Octets]:
    octets: list[Octets] = brought(ref, nbytes)
    return octets


class LentTensors:
    """See :class:`~lamella_engine.checkpoints.Checkpoint`: reads from this node's shared memory, without a copy."""

    def __init__(self, lent: _Lent) -> None:
        self.structure = lent.structure
        self.attachments: tuple[Attachment, ...] = ()
        self.random_access = True
        self.fingerprint: tuple[int, ...] = ()
        self._lent = lent
        self._lengths = Counter[int]()
        """Of its objects."""
        for spec in lent.structure:
            self._lengths[lent.places[spec.name][0]] += spec.nbytes

    def read(self, tensor: TensorSpec, region: Region, out: Buffer | None = None) -> Buffer:
        """See :meth:`Checkpoint.read`; a view. Raises StorageError if its lender is gone, or it finds no room."""
        number, at = self._lent.places[tensor.name]
        octets: Octets = _held(self._lent.objects[number], self._lengths[number])[at]
        return octets[region.start : region.stop].data

    def check_unchanged(self) -> None:
        """Objects never change."""

    def close(self) -> None:
        """Let go of what is held, for others too: they fetch it again."""
        _held.cache_clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
