"""Shards: what one worker of several has of a checkpoint, boxes of tensors in its memory."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from lamella_engine.boxes import Box, box_nbytes, intersection, local, paste
from lamella_engine.checkpoints.tensors import MemoryCheckpoint
from lamella_engine.chunking import Region
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import Buffer, TensorSpec


class Shards:
    """Boxes of tensors. Reading is safe from several threads.

    Parameters
    ----------
    held
        Name of a tensor, the place of a box in it, and the box: a NumPy array or torch tensor of any strides and
        device, as :class:`~lamella_engine.checkpoints.tensors.MemoryCheckpoint` takes it.

    Raises
    ------
    InvalidInputError
        A box has another shape than its place (``bad_shards``), or what MemoryCheckpoint raises.
    """

    def __init__(self, held: Iterable[tuple[str, Box, object]]) -> None:
        self._boxes: defaultdict[str, list[tuple[Box, TensorSpec]]] = defaultdict(list)
        memory: dict[str, object] = {}
        places: list[tuple[str, Box]] = []
        for at, (name, box, tensor) in enumerate(held):
            memory[f"{name} #{at}"] = tensor
            places.append((name, box))
        self._memory = MemoryCheckpoint(memory)
        specs = {spec.name: spec for spec in self._memory.structure}
        for (name, box), key in zip(places, memory, strict=True):
            spec = specs[key]
            if spec.shape != tuple(stop - first for first, stop in box):
                raise InvalidInputError(
                    f"a shard of {name[:80]!r} has shape {spec.shape}, and its place is {box}: give the offset of each "
                    "shard in its tensor",
                    kind="bad_shards",
                    tensor=name,
                )
            whole = ((0, spec.nbytes),) if spec.dtype.opaque else box
            self._boxes[name].append((whole, spec))

    def parts(self, spec: TensorSpec, box: Box) -> Iterator[Box]:
        """Yield what is here of a box of a tensor."""
        for held, _ in self._boxes.get(spec.name, ()):
            common = intersection(held, box)
            if common is not None:
                yield common

    def read(self, spec: TensorSpec, box: Box, out: Buffer | None = None) -> Buffer:
        """Return the bytes of a box, little-endian and in C order: a view where they lie so, else copied.

        ``out`` is memory to use for a copy. Raises InvalidInputError (``bad_shards``) if the box is not here in whole,
        and what a checkpoint's ``read`` raises.
        """
        nbytes = box_nbytes(spec, box)
        for held, shard in self._boxes.get(spec.name, ()):
            if intersection(held, box) == box:
                return self._memory.read(shard, Region(local(box, held), 0, nbytes), out)
        target = np.empty(nbytes, np.uint8) if out is None else np.frombuffer(out, np.uint8, nbytes)
        if self.fill(spec, box, target) != nbytes:
            raise InvalidInputError(f"the shards of {spec.name[:80]!r} are not here", kind="bad_shards")
        return target.data

    def fill(self, spec: TensorSpec, box: Box, out: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> int:
        """Copy what is here of a box into ``out``, the box's bytes; return how many bytes that was."""
        done = 0
        for part in self.parts(spec, box):
            done += paste(spec, box, out, part, self.read(spec, part))
        return done

    def check_unchanged(self) -> None:
        """Raise InvalidInputError (``source_changed``) if a tensor was seen to change since this was made."""
        self._memory.check_unchanged()
