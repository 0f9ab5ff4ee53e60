"""Distances between versions: exact, in float64, over the chunks that differ."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import MappingProxyType

from lamella_engine.dtypes import Dtype
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import Cell, TensorSpec, VersionId
from lamella_engine.moments import Moments
from lamella_engine.reading import Reader, Selection


@dataclass(frozen=True)
class Distance:
    """How far two versions, or one tensor in two versions, lie apart.

    Over elements a of the one and b of the other, as float64 (complex numbers as pairs): elements with equal bits
    differ by 0, even if they are NaN; any other NaN makes the result NaN.
    """

    __module__ = "lamella"

    count: int
    """Elements compared."""
    changed_count: int
    """Elements whose bits differ."""
    l2: float
    """sqrt(sum (a - b)^2), the Euclidean distance."""
    l1: float
    """sum |a - b|."""
    linf: float
    """max |a - b|."""
    per_tensor: Mapping[str, "Distance"] = field(repr=False, hash=False)
    """The same for each tensor; empty for a single one."""
    _complete: Callable[[], Moments] = field(repr=False, compare=False)

    @property
    def changed(self) -> float:
        """Fraction of the elements whose bits differ; 0.0 if there are none."""
        return self.changed_count / self.count if self.count else 0.0

    @cached_property
    def cosine(self) -> float:
        """Cosine similarity: sum ab / (|a| |b|); NaN if either is all zeros or not finite.

        Unlike the rest it depends on chunks that are equal in both versions too, so asking for it reads them, once.
        """
        whole = self._complete()
        norms = math.sqrt(whole.squared_a) * math.sqrt(whole.squared_b)
        # Rounding may carry two equal vectors past 1. A NaN has to come first: min and max keep what they cannot order.
        return min(max(whole.dot / norms, -1.0), 1.0) if norms else math.nan


def measure(reader: Reader, a: VersionId, b: VersionId, selection: Selection) -> Distance:
    """Measure two versions against each other. Chunks with equal ids are not read.

    Raises
    ------
    InvalidInputError
        Kind ``structure_mismatch``: a selected tensor is in one version only, or has another dtype or shape there; kind
        ``opaque_dtype``: it has no elements to measure.
    TensorNotFoundError
        A pattern of the selection matches nothing.
    """
    specs = _common(reader, a, b, selection)
    different = _sums(reader, a, b, specs, equal=False)

    def completer(spec: TensorSpec) -> Callable[[], Moments]:
        return lambda: different[spec.name] + _sums(reader, a, b, [spec], equal=True)[spec.name]

    parts = {spec.name: _distance(different[spec.name], prod(spec.shape), {}, completer(spec)) for spec in specs}
    whole = sum(different.values(), Moments())
    return _distance(
        whole,
        sum(part.count for part in parts.values()),
        parts,
        lambda: sum(_sums(reader, a, b, specs, equal=True).values(), whole),
    )


def _distance(
    found: Moments, count: int, per_tensor: Mapping[str, Distance], complete: Callable[[], Moments]
) -> Distance:
    return Distance(
        count=count,
        changed_count=found.changed,
        l2=math.sqrt(found.squared_difference),
        l1=found.absolute_difference,
        linf=found.largest_difference,
        per_tensor=MappingProxyType(dict(per_tensor)),
        _complete=complete,
    )


def _common(reader: Reader, a: VersionId, b: VersionId, selection: Selection) -> list[TensorSpec]:
    """Return the selected tensors of both versions, which must be the same ones."""
    left = {spec.name: spec for spec in selection.tensors(reader.store.manifest(a))}
    right = {spec.name: spec for spec in selection.tensors(reader.store.manifest(b))}
    odd = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    if odd:
        raise InvalidInputError(
            f"{len(odd)} tensors differ in name, dtype or shape, such as {odd[0]!r}: select others with include",
            kind="structure_mismatch",
            tensor=odd[0],
        )
    opaque = next((spec for spec in left.values() if spec.dtype.opaque), None)
    if opaque is not None:
        raise InvalidInputError(
            f"{opaque.name!r} is {opaque.dtype.name}, which has no elements to measure: select others with include",
            kind="opaque_dtype",
            tensor=opaque.name,
        )
    return list(left.values())


def _sums(
    reader: Reader, a: VersionId, b: VersionId, specs: Iterable[TensorSpec], *, equal: bool
) -> dict[str, Moments]:
    """Return, for each tensor, the moments of those cells that are equal, or of those that differ, in both versions."""
    sums = {spec.name: Moments() for spec in specs}
    dtypes = {spec.name: spec.dtype for spec in specs}

    def cells() -> Iterator[tuple[Cell, Dtype]]:
        left, right = reader.store.manifest(a), reader.store.manifest(b)
        for name in sums:
            for one, other in zip(left.rows(name), right.rows(name), strict=True):
                if (one.content == other.content) == equal:
                    yield one.cell, dtypes[name]

    for cell, found in reader.measure_pairs(a, b, cells()):
        sums[cell.tensor or ""] += found
    return sums
