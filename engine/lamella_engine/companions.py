"""Companions: which tensors of a checkpoint tell much about another one, element by element.

Two kinds are known. A checkpoint of mixed-precision training holds the same weights in two types, where one is the cast
of the other. And Adam keeps two moments for each weight, of which the second says how large the first will be. Either
is a guess, from names, shapes and a few elements: a wrong one costs time, never bits.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import merge

import numpy as np

from lamella_engine import casts
from lamella_engine.casts import Cast
from lamella_engine.chunking import Region
from lamella_engine.model import Buffer, TensorSpec
from lamella_engine.sketches import runs

MOST_FOLLOWERS = 4
"""So many tensors at most have one companion: what they are made against has to be kept until they are."""

_FEWEST_ELEMENTS = 64
"""Of a tensor that is worth a companion: shorter ones take little as they are."""

# Elements that are compared, from the beginning and from the middle of a tensor: the beginning of an embedding may be
# padding, and what agrees in so many floats of 16 bits does not by chance.
_RUN = 32

_CASTS = {
    ("float32", "bfloat16"): Cast.FLOAT32_TO_BFLOAT16,
    ("float32", "float16"): Cast.FLOAT32_TO_FLOAT16,
    ("bfloat16", "float32"): Cast.BFLOAT16_TO_FLOAT32,
    ("float16", "float32"): Cast.FLOAT16_TO_FLOAT32,
}

_OF_OPTIMIZERS = ("exp_avg", "momentum")
"""In names of what optimizers keep for each weight, of its shape: no weights."""

Read = Callable[[TensorSpec, Region], Buffer]


def expected(structure: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    """Find those companions that the structure alone tells, for workers none of which has all elements.

    Names tell of Adam's moments. Of casts they tell less, so more of these are expected than there are; see
    :func:`companions` for what is returned.
    """
    specs = {spec.name: spec for spec in structure}
    return _paired(structure, (*_moments(specs), *_namesakes(structure)))


def companions(structure: Sequence[TensorSpec], read: Read) -> dict[str, TensorSpec]:
    """Find companions.

    Parameters
    ----------
    structure
        The tensors of a checkpoint.
    read
        Returns any box of a tensor that is one run of bytes. Called only for tensors that have the shape of another one
        in another type.

    Returns
    -------
    dict
        Name of a tensor -> its companion, which has none itself and the same cells.
    """
    specs = {spec.name: spec for spec in structure}
    return _paired(structure, (*_moments(specs), *_casts(structure, read)))


def _paired(structure: Sequence[TensorSpec], pairs: Iterable[tuple[str, TensorSpec]]) -> dict[str, TensorSpec]:
    """Return those of ``pairs``, followers and companions, that can all be."""
    specs = {spec.name: spec for spec in structure}
    found: dict[str, TensorSpec] = {}
    followers: defaultdict[str, int] = defaultdict(int)
    for follower, companion in pairs:
        if follower in found or companion.name in found or followers[follower] or follower == companion.name:
            continue
        if followers[companion.name] < MOST_FOLLOWERS and _same_cells(specs[follower], companion):
            found[follower] = companion
            followers[companion.name] += 1
    return found


def in_order(
    structure: Sequence[TensorSpec],
    companion_of: Mapping[str, TensorSpec],
    numbers: Callable[[TensorSpec], Iterable[int]],
) -> Iterator[tuple[TensorSpec, int, bool]]:
    """Yield cells in the order in which they are stored: by tensor, but what has a companion right behind its cells.

    Parameters
    ----------
    structure
        The tensors, by name.
    companion_of
        What :func:`companions` found.
    numbers
        The cells of a tensor that are wanted, ascending.

    Yields
    ------
    tensor, number of its cell, and whether the last cell that did not follow another one is its companion
    """
    followers: defaultdict[str, list[TensorSpec]] = defaultdict(list)
    for spec in structure:
        if spec.name in companion_of:
            followers[companion_of[spec.name].name].append(spec)
    for spec in structure:
        if spec.name in companion_of:
            continue
        family = (spec, *followers[spec.name])
        last = -1
        for number, place in merge(*([(number, at) for number in numbers(each)] for at, each in enumerate(family))):
            last = last if place else number
            yield family[place], number, bool(place) and last == number


def _moments(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, TensorSpec]]:
    """Yield Adam's first moments with the second ones: torch.optim names them so, at the end of whatever path."""
    for name, spec in specs.items():
        second = specs.get(f"{name}_sq") if name.endswith("exp_avg") else None
        if second is not None and second.dtype == spec.dtype and spec.dtype.floating and _is_worth_it(spec):
            yield name, second


def _casts(structure: Sequence[TensorSpec], read: Read) -> Iterator[tuple[str, TensorSpec]]:
    """Yield narrow tensors with the wide ones that they are casts of; or the reverse, where that is exact as well."""
    by_shape: defaultdict[tuple[int, ...], list[TensorSpec]] = defaultdict(list)
    for spec in structure:
        if spec.dtype.name in ("float32", "bfloat16", "float16") and _is_worth_it(spec):
            by_shape[spec.shape].append(spec)
    for specs in by_shape.values():
        if len({spec.dtype.name for spec in specs}) == 1:
            continue
        samples = {spec.name: _sample(spec, read) for spec in specs}
        narrow: defaultdict[tuple[str, bytes], list[TensorSpec]] = defaultdict(list)
        for spec in specs:
            alike = narrow[spec.dtype.name, samples[spec.name]]
            # Norms that are all ones are alike in their hundreds.
            if spec.dtype.name != "float32" and any(samples[spec.name]) and len(alike) < MOST_FOLLOWERS:
                alike.append(spec)
        for spec in specs:
            for name in ("bfloat16", "float16") if spec.dtype.name == "float32" else ():
                for other in narrow.get((name, _cast("float32", name, samples[spec.name])), ()):
                    if _cast(name, "float32", samples[other.name]) == samples[spec.name]:
                        yield spec.name, other  # the narrow one is the shorter one to store
                    else:
                        yield other.name, spec


def _namesakes(structure: Sequence[TensorSpec]) -> Iterator[tuple[str, TensorSpec]]:
    """Yield narrow tensors with the wide ones that may be their masters: as many of a shape, the same place by name.

    Whatever stands before or behind the names of a model's tensors, they sort alike.
    """
    by_shape: defaultdict[tuple[int, ...], defaultdict[str, list[TensorSpec]]] = defaultdict(lambda: defaultdict(list))
    for spec in sorted(structure, key=lambda spec: spec.name):
        if _is_worth_it(spec) and not any(word in spec.name for word in _OF_OPTIMIZERS):
            by_shape[spec.shape][spec.dtype.name].append(spec)
    for by_type in by_shape.values():
        masters = by_type.get("float32", [])
        for name in ("bfloat16", "float16"):
            if len(by_type.get(name, ())) == len(masters):
                yield from ((spec.name, master) for spec, master in zip(by_type[name], masters, strict=True))


def _is_worth_it(spec: TensorSpec) -> bool:
    return spec.nbytes * 8 >= _FEWEST_ELEMENTS * spec.dtype.bits


def _same_cells(a: TensorSpec, b: TensorSpec) -> bool:
    return (a.shape, a.grid.axis, a.grid.length) == (b.shape, b.grid.axis, b.grid.length)


def _sample(spec: TensorSpec, read: Read) -> bytes:
    """Return the bytes of some elements, at the same places for all tensors of a shape."""
    return b"".join(bytes(read(spec, run)) for run in runs(spec, count=2, elements=_RUN))


def _cast(before: str, after: str, data: bytes) -> bytes:
    cast = _CASTS[before, after]
    out = np.empty(len(data) // cast.source_width * cast.width, np.uint8)
    casts.apply(cast, np.frombuffer(data, np.uint8), out)
    return out.tobytes()
