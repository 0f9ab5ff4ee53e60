"""Sketches: a few elements of each tensor, by which the nearest of many versions is found without reading weights.

A sketch takes a few hundred bytes a tensor and is kept with its version (FORMAT.md, "Sketches"). All sketches of a
tensor have its elements at the same places, so two of them are a sample of the residuals that one version would have
against the other.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lamella_engine.chunking import Region
from lamella_engine.model import Buffer, TensorSpec

# 64 lanes tell the mean length of a residual to about a third of a bit, and whole models are judged by all their
# tensors. Runs cost a read each, so they are few; rows of a tensor differ more than neighbours, so they are several.
RUNS = 4
RUN_ELEMENTS = 16

FEWEST_ELEMENTS = 1 << 14
"""Shorter tensors have no sketch: what it could save would hardly pay for it."""

MAX_SKETCH_NBYTES = 1 << 20
"""Of the lanes of one width, in one version; tensors past it, by name, have none."""

# What rANS takes for a residual beyond its logarithm: the entropy of a normal distribution is log2(s) + 2.05 bits, the
# mean of log2(2 |x|) is log2(s) + 0.08.
_SPREAD_BITS = 1.97
# Entropy of sign and exponent of weights: 1 + 2.6 bits (all-MiniLM-L6-v2 has 2.63 in every float type).
_SIGN_AND_EXPONENT_BITS = 3.6


def runs(spec: TensorSpec, *, count: int = RUNS, elements: int = RUN_ELEMENTS) -> Iterator[Region]:
    """Yield places of a tensor that are one run of bytes each: ``count`` of them, evenly spread, along its last axis.

    Each has ``elements`` elements, or all of the axis where that is shorter. They lie at the same places in all tensors
    of a shape.
    """
    width = spec.shape[-1] if spec.shape else 1
    itemsize = spec.dtype.bits // 8
    total = spec.nbytes // itemsize
    length = min(elements, width)
    for number in range(count):
        row, column = divmod(total * number // count, width)
        column = min(column, width - length)
        place = np.unravel_index(row, spec.shape[:-1]) if len(spec.shape) > 1 else ()
        leading = tuple(slice(int(at), int(at) + 1) for at in place)
        box = (*leading, slice(column, column + length)) if spec.shape else ()
        yield Region(box, (row * width + column) * itemsize, length * itemsize)


def sketched(structure: Iterable[TensorSpec]) -> Iterator[tuple[TensorSpec, int]]:
    """Yield those tensors of a version that have a sketch, with its bytes, in the order of their names."""
    taken: defaultdict[int, int] = defaultdict(int)
    for spec in structure:
        if not spec.dtype.floating or spec.nbytes * 8 < FEWEST_ELEMENTS * spec.dtype.bits:
            continue
        nbytes = RUNS * min(RUN_ELEMENTS, spec.shape[-1]) * spec.dtype.bits // 8
        taken[spec.dtype.lane] += nbytes
        if taken[spec.dtype.lane] <= MAX_SKETCH_NBYTES:
            yield spec, nbytes


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is known of a version's tensors without reading them."""

    tensors: Mapping[str, tuple[TensorSpec, bytes]]
    """Name -> tensor, and some of its elements, little-endian."""

    def lanes(self) -> dict[int, bytes]:
        """Return the samples of all tensors of each width of a lane, one after another by name: as they are stored."""
        found: defaultdict[int, list[bytes]] = defaultdict(list)
        for spec, sample in self.tensors.values():
            found[spec.dtype.lane].append(sample)
        return {width: b"".join(found[width]) for width in sorted(found)}

    def bits_against(self, other: "Sketch") -> dict[str, float]:
        """Return about how many bits a lane of each tensor takes as a delta against the same tensor of another version.

        Tensors that the other version does not have, or has in another type or shape, are left out.
        """
        found: dict[str, float] = {}
        shared = [name for name, (spec, _) in self.tensors.items() if other.tensors.get(name, (None,))[0] == spec]
        for width in sorted({self.tensors[name][0].dtype.lane for name in shared}):
            names = [name for name in shared if self.tensors[name][0].dtype.lane == width]
            ours, theirs = (
                _ordered(b"".join(sketch.tensors[name][1] for name in names), width) for sketch in (self, other)
            )
            residuals = np.abs(ours - theirs)
            bits = np.where(residuals == 0, 0.0, np.log2(1 + 2 * residuals) + _SPREAD_BITS)
            counts = np.array([len(self.tensors[name][1]) // width for name in names])
            sums = np.add.reduceat(bits, np.cumsum(counts) - counts)
            found.update(zip(names, (sums / counts).tolist(), strict=True))
        return found

    def bits_alone(self, name: str) -> float:
        """Return about how many bits a lane of a tensor takes without a base."""
        dtype = self.tensors[name][0].dtype
        assert dtype.numpy is not None
        mantissa_bits = int(ml_dtypes.finfo(dtype.numpy).nmant)  # type: ignore[no-untyped-call]
        return mantissa_bits + _SIGN_AND_EXPONENT_BITS


def take(structure: Iterable[TensorSpec], read: Callable[[TensorSpec, Region], Buffer]) -> Sketch:
    """Sketch a version. ``read`` returns any place of a tensor that is one run of bytes."""
    return Sketch(
        {spec.name: (spec, b"".join(bytes(read(spec, run)) for run in runs(spec))) for spec, _ in sketched(structure)}
    )


def parse(structure: Iterable[TensorSpec], lanes: Mapping[int, bytes]) -> Sketch:
    """Return the sketch whose lanes these are; an empty one if they are not as long as the structure has it.

    Sketches only guide the choice of bases, so one that makes no sense is no damage.
    """
    tensors: dict[str, tuple[TensorSpec, bytes]] = {}
    places: defaultdict[int, int] = defaultdict(int)
    for spec, nbytes in sketched(structure):
        width = spec.dtype.lane
        at = places[width]
        tensors[spec.name] = spec, lanes.get(width, b"")[at : at + nbytes]
        places[width] += nbytes
    return Sketch(tensors if places == {width: len(data) for width, data in lanes.items()} else {})


def _ordered(sample: bytes, width: int) -> NDArray[np.float64]:
    """Return the order-preserving integers of floats (``codecs``), as float64: 64 bits are rounded."""
    bits = np.frombuffer(sample, f"<i{width}")
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits).astype(np.float64)
