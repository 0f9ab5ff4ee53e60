"""Boxes: rectangular parts of tensors, and their bytes."""

from typing import Any, TypeAlias

import numpy as np

from lamella_engine.chunking import Region
from lamella_engine.model import Buffer, TensorSpec

Box: TypeAlias = tuple[tuple[int, int], ...]
"""A part of a tensor: (first, stop) for each axis, in elements. All of an opaque tensor is one box, of its bytes."""

Octets: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


def box_of(region: Region) -> Box:
    """Return the box that a region is."""
    return tuple((part.start, part.stop) for part in region.slices)


def box_nbytes(spec: TensorSpec, box: Box) -> int:
    """Return how many bytes a box of a tensor has."""
    nbytes = spec.grid.itemsize
    for first, stop in box:
        nbytes *= stop - first
    return nbytes


def intersection(a: Box, b: Box) -> Box | None:
    """Return what two boxes share; None if that is nothing."""
    common = tuple((max(p, q), min(r, s)) for (p, r), (q, s) in zip(a, b, strict=True))
    return common if all(first < stop for first, stop in common) else None


def local(part: Box, box: Box) -> tuple[slice, ...]:
    """Return where a part of a box lies in the box."""
    return tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(part, box, strict=True))


def paste(spec: TensorSpec, box: Box, out: Octets, part: Box, data: Buffer) -> int:
    """Copy the bytes of a part of a box to where they belong in ``out``, the box's bytes; return how many they are."""
    source = _elements(spec, part, np.frombuffer(data, np.uint8))
    _elements(spec, box, out)[local(part, box)] = source
    return source.nbytes


def copied(spec: TensorSpec, box: Box, data: Buffer, part: Box) -> memoryview:
    """Return the bytes of a part of a box, in C order, given the box's bytes."""
    found = _elements(spec, box, np.frombuffer(data, np.uint8))[local(part, box)]
    return np.ascontiguousarray(found).reshape(-1).data


def _elements(spec: TensorSpec, box: Box, octets: Octets) -> Octets:
    """View the bytes of a box as its elements, each an axis of bytes at the end."""
    return octets.reshape((*(stop - first for first, stop in box), spec.grid.itemsize))
