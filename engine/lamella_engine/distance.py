"""Distances between versions: exact, in float64, over the chunks that differ."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from types import MappingProxyType
from typing import TypeAlias

from lamella_engine.dtypes import Dtype
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import Cell, TensorSpec, VersionId
from lamella_engine.moments import Moments
from lamella_engine.reading import Reader, Selection

Pairs: TypeAlias = Callable[[Iterable[tuple[Cell, Dtype]]], Iterator[tuple[Cell, Moments]]]
"""Measures what stands in cells of two versions, as :meth:`Reader.measure_pairs` does, in this process or in others."""


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


def measure(
    reader: Reader, a: VersionId, b: VersionId, selection: Selection, *, pairs: Pairs | None = None
) -> Distance:
    """Measure two versions against each other. Chunks with equal ids are not read.

    Parameters
    ----------
    pairs
        Measures cells; by default this process does. The sums are made here, in the order of the cells, so they have
        the same bits whoever did.

    Raises
    ------
    InvalidInputError
        Kind ``structure_mismatch``: a selected tensor is in one version only, or has another dtype or shape there; kind
        ``opaque_dtype``: it has no elements to measure.
    TensorNotFoundError
        A pattern of the selection matches nothing.
    """
    specs = common(reader, a, b, selection)
    different = [
        (spec.name, prod(spec.shape), found) for spec, found in sums(reader, a, b, specs, equal=False, pairs=pairs)
    ]

    def complete(names: Collection[str]) -> Moments:
        wanted = [spec for spec in specs if spec.name in names]
        ours = (found for name, _, found in different if name in names)
        return sum((found for _, found in sums(reader, a, b, wanted, equal=True, pairs=pairs)), sum(ours, Moments()))

    return assembled(different, complete)


def assembled(
    different: Sequence[tuple[str, int, Moments]], complete: Callable[[Collection[str]], Moments]
) -> Distance:
    """Return the distance of two versions.

    Parameters
    ----------
    different
        Of each tensor its name, the number of its elements, and the moments of its chunks that differ.
    complete
        Given names of tensors, returns the moments of all their chunks.
    """
    parts = {name: _distance(found, count, {}, partial(complete, {name})) for name, count, found in different}
    whole = sum((found for _, _, found in different), Moments())
    return _distance(whole, sum(count for _, count, _ in different), parts, partial(complete, parts.keys()))


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


def common(reader: Reader, a: VersionId, b: VersionId, selection: Selection) -> list[TensorSpec]:
    """Return the selected tensors of both versions, which must be the same ones; raises what :func:`measure` does."""
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


def sums(
    reader: Reader,
    a: VersionId,
    b: VersionId,
    specs: Sequence[TensorSpec],
    *,
    equal: bool,
    pairs: Pairs | None = None,
) -> Iterator[tuple[TensorSpec, Moments]]:
    """Yield each tensor with the moments of those cells that are equal, or of those that differ, in both versions."""
    left, right = reader.store.manifest(a), reader.store.manifest(b)

    def cells() -> Iterator[tuple[Cell, Dtype]]:
        for spec in specs:
            for one, other in zip(left.rows(spec.name), right.rows(spec.name), strict=True):
                if (one.content == other.content) == equal:
                    yield one.cell, spec.dtype

    measured = (pairs or partial(reader.measure_pairs, a, b))(cells())
    item = next(measured, None)
    for spec in specs:
        total = Moments()
        while item is not None and item[0].tensor == spec.name:
            total += item[1]
            item = next(measured, None)
        yield spec, total
