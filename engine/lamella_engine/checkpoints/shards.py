"""Shards: what one worker of several has of a checkpoint, boxes of tensors in its memory or its files."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

import numpy as np

from lamella_engine.boxes import Box, box_nbytes, intersection, local, paste
from lamella_engine.checkpoints import Checkpoint, expect
from lamella_engine.checkpoints.tensors import MemoryCheckpoint
from lamella_engine.chunking import Region
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import Buffer, TensorSpec


class Shards:
    """Boxes of tensors. Reading is safe from several threads.

    Parameters
    ----------
    sources
        Checkpoints with random access, each with the places of its tensors: name in the checkpoint -> name of the
        tensor that it is a box of, and the box. One that comes again is a copy, and not read. They are closed by
        whoever opened them, those of :meth:`in_memory` by :meth:`close`.

    Raises
    ------
    InvalidInputError
        A box has another shape than its place (``bad_shards``).
    """

    def __init__(self, sources: Iterable[tuple[Checkpoint, Mapping[str, tuple[str, Box]]]]) -> None:
        self._boxes: defaultdict[str, dict[Box, tuple[TensorSpec, Checkpoint]]] = defaultdict(dict)
        self._checkpoints: list[Checkpoint] = []
        self._opened: Checkpoint | None = None
        for checkpoint, places in sources:
            self._checkpoints.append(checkpoint)
            for spec in checkpoint.structure:
                name, box = places[spec.name]
                if spec.shape != tuple(stop - first for first, stop in box):
                    raise InvalidInputError(
                        f"a shard of {name[:80]!r} has shape {spec.shape}, and its place is {box}: give the offset of "
                        "each shard in its tensor",
                        kind="bad_shards",
                        tensor=name,
                    )
                whole = ((0, spec.nbytes),) if spec.dtype.opaque else box
                self._boxes[name].setdefault(whole, (spec, checkpoint))

    @classmethod
    def in_memory(cls, held: Iterable[tuple[str, Box, object]]) -> Self:
        """Return shards of this process: name of a tensor, the place of a box in it, and the box.

        Boxes are NumPy arrays or torch tensors of any strides and device, and refused, as
        :class:`~lamella_engine.checkpoints.tensors.MemoryCheckpoint` does.
        """
        memory: dict[str, object] = {}
        places: dict[str, tuple[str, Box]] = {}
        for at, (name, box, tensor) in enumerate(held):
            memory[f"{name} #{at}"] = tensor
            places[f"{name} #{at}"] = name, box
        checkpoint = MemoryCheckpoint(memory)
        shards = cls([(checkpoint, places)])
        shards._opened = checkpoint
        return shards

    def parts(self, spec: TensorSpec, box: Box) -> Iterator[Box]:
        """Yield what is here of a box of a tensor."""
        for held in self._boxes.get(spec.name, ()):
            common = intersection(held, box)
            if common is not None:
                yield common

    def read(self, spec: TensorSpec, box: Box, out: Buffer | None = None) -> Buffer:
        """Return the bytes of a box, little-endian and in C order: a view where they lie so, else copied.

        The box has to be what a shard shares with a cell, or with a run of a sketch: that is one run of the shard's
        bytes, as files need it. ``out`` is memory to use for a copy. Raises InvalidInputError (``bad_shards``) if the
        box is not here in whole, and what a checkpoint's ``read`` raises.
        """
        run = self._run(spec, box)
        if run is not None:
            checkpoint, shard, region = run
            return checkpoint.read(shard, region, out)
        nbytes = box_nbytes(spec, box)
        target = np.empty(nbytes, np.uint8) if out is None else np.frombuffer(out, np.uint8, nbytes)
        if self.fill(spec, box, target) != nbytes:
            raise InvalidInputError(f"the shards of {spec.name[:80]!r} are not here", kind="bad_shards")
        return target.data

    def fill(self, spec: TensorSpec, box: Box, out: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> int:
        """Copy what is here of a box into ``out``, the box's bytes; return how many bytes that was."""
        done = 0
        self.expect(spec, box)
        for part in self.parts(spec, box):
            done += paste(spec, box, out, part, self.read(spec, part))
        return done

    def expect(self, spec: TensorSpec, box: Box) -> None:
        """Say that a box, or what is here of it, will be read soon: what lies on a GPU is on its way from then on."""
        run = self._run(spec, box)
        runs = [run] if run is not None else [self._run(spec, part) for part in self.parts(spec, box)]
        for checkpoint, shard, region in filter(None, runs):
            expect(checkpoint, shard, region)

    def _run(self, spec: TensorSpec, box: Box) -> tuple[Checkpoint, TensorSpec, Region] | None:
        """Return the part of a shard that a box is; None if it lies in no single one."""
        for held, (shard, checkpoint) in self._boxes.get(spec.name, {}).items():
            if intersection(held, box) == box:
                part = local(box, held)
                first = 0
                for axis, length in zip(part, shard.grid.shape, strict=True):
                    first = first * length + axis.start
                return checkpoint, shard, Region(part, first * shard.grid.itemsize, box_nbytes(spec, box))
        return None

    def check_unchanged(self) -> None:
        """Raise InvalidInputError (``source_changed``) if a tensor or file was seen to change since this was made."""
        for checkpoint in self._checkpoints:
            checkpoint.check_unchanged()

    def close(self) -> None:
        """Let go of the tensors of :meth:`in_memory`, once nothing is copied from them any more."""
        if self._opened is not None:
            self._opened.close()
