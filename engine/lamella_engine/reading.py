"""From versions to memory: decoded cells, whole tensors, and boxes cut out of tensors.

Blobs are read in the caller's thread and decoded by the executor's, straight to where they belong.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import tee
from math import prod
from typing import TypeAlias, TypeVar

import numpy as np

from lamella_engine.chunking import MAX_CELL_NBYTES, POOLED_NBYTES
from lamella_engine.content_store.decoding import decode_chain, measure_chains
from lamella_engine.content_store.manifest import Manifest
from lamella_engine.content_store.seam import ContentStore, Reading
from lamella_engine.dtypes import Dtype
from lamella_engine.errors import InvalidInputError, LimitError, TensorNotFoundError
from lamella_engine.executor import Executor, map_batched
from lamella_engine.model import Cell, TensorSpec, VersionId
from lamella_engine.moments import Moments

Result = TypeVar("Result")

Patterns: TypeAlias = str | Sequence[str] | None
"""A glob over tensor names (``*``, ``?``, ``[...]``, case matters), several of them, or None for no restriction."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tensors are meant: those that match any of ``include``, and none of ``exclude``."""

    include: tuple[str, ...] | None
    exclude: tuple[str, ...]

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self.include is None and not self.exclude

    def tensors(self, manifest: Manifest) -> Iterator[TensorSpec]:
        """Yield the selected tensors by name, reading only the pages that can hold them.

        Raises TensorNotFoundError if a pattern of ``include`` matches no tensor: a partial load that silently leaves
        out what was asked for is worse than none.
        """
        wanted: dict[str, TensorSpec] = {}
        if self.include is None:
            wanted = {spec.name: spec for spec in manifest.specs()}
        for pattern in self.include or ():
            literal = _literal(pattern)
            glob = literal != pattern
            found = [spec for spec in manifest.specs(literal) if fnmatchcase(spec.name, pattern)] if glob else []
            if manifest.has(pattern):  # a name may hold what a glob would take for a wildcard
                found.append(manifest.spec(pattern))
            if not found:
                raise TensorNotFoundError(f"no tensor matches {pattern!r}: see show for the names", pattern=pattern)
            wanted |= {spec.name: spec for spec in found}
        for name in sorted(wanted):
            if not _matches(name, self.exclude):
                yield wanted[name]

    def has(self, name: str) -> bool:
        """Whether a tensor of that name would be selected."""
        return (self.include is None or _matches(name, self.include)) and not _matches(name, self.exclude)


def select(include: Patterns = None, exclude: Patterns = None) -> Selection:
    """Return the selection that these patterns make."""
    return Selection(None if include is None else _several(include), _several(exclude))


def _several(patterns: Patterns) -> tuple[str, ...]:
    several = () if patterns is None else (patterns,) if isinstance(patterns, str) else patterns
    if isinstance(several, Sequence | Set) and all(isinstance(pattern, str) for pattern in several):
        return tuple(several)
    raise InvalidInputError("include and exclude take a glob, or several of them", kind="bad_option")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _literal(pattern: str) -> str:
    """Return what every name that matches begins with."""
    return pattern[: min((at for at in map(pattern.find, "*?[") if at >= 0), default=len(pattern))]


class CellPair(threading.local):
    """Two cells' worth of memory for each thread, used again because first touch of fresh memory is slow."""

    def __init__(self) -> None:
        self.left = np.empty(MAX_CELL_NBYTES, np.uint8)
        self.right = np.empty(MAX_CELL_NBYTES, np.uint8)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads decoded cells of one store.

    Parameters
    ----------
    store
        Where blobs come from.
    executor
        What decodes them.
    check
        Whether to compute every chunk's id again, whatever the store vouches for.
    watch
        Is told of everything that is read, in the caller's thread, before it is decoded.
    """

    store: ContentStore
    executor: Executor
    check: bool = False
    watch: Callable[[Reading], None] | None = None

    @property
    def checks(self) -> bool:
        """Whether the ids of chunks that are decoded are computed again: as asked, or as the store vouches for none."""
        return self.check or not self.store.vouches

    def read(self, version: VersionId, cells: Iterable[Cell], have: VersionId | None = None) -> Iterator[Reading]:
        """Yield what ``ContentStore.read`` does."""
        for reading in self.store.read(version, cells, have):
            if self.watch is not None:
                self.watch(reading)
            yield reading

    def read_into(self, version: VersionId, targets: Iterable[tuple[Cell, memoryview]]) -> None:
        """Decode each cell into its target, which is writable and exactly as long as the cell.

        Raises CorruptionError; then the content of the targets is undefined.
        """
        places: dict[Cell, memoryview] = {}

        def cells() -> Iterator[Cell]:
            for cell, target in targets:
                places[cell] = target
                yield cell

        def decode(reading: Reading) -> None:
            decode_chain(reading.chain, places.pop(reading.cell), check=self.checks)

        for _ in self._decoded(decode, self.read(version, cells())):
            pass

    def _decoded(self, decode: Callable[[Reading], Result], readings: Iterable[Reading]) -> Iterator[Result]:
        return map_batched(self.executor, decode, readings, nbytes=lambda reading: reading.chain[-1].decoded_nbytes)

    def stream(self, version: VersionId, cells: Iterable[Cell]) -> Iterator[tuple[Cell, memoryview]]:
        """Yield each cell with its decoded bytes, in order. The bytes are valid until the next item is asked for."""
        free: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []

        def decode(reading: Reading) -> tuple[Cell, memoryview, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
            nbytes = reading.chain[-1].decoded_nbytes
            try:
                memory = free.pop() if nbytes >= POOLED_NBYTES else np.empty(nbytes, np.uint8)
            except IndexError:
                memory = np.empty(MAX_CELL_NBYTES, np.uint8)
            out = memory.data[:nbytes]
            decode_chain(reading.chain, out, check=self.checks)
            return reading.cell, out, memory

        for cell, out, memory in self._decoded(decode, self.read(version, cells)):
            yield cell, out
            if out.nbytes >= POOLED_NBYTES:
                free.append(memory)

    def measure_pairs(
        self, a: VersionId, b: VersionId, cells: Iterable[tuple[Cell, Dtype]]
    ) -> Iterator[tuple[Cell, Moments]]:
        """Yield each cell with the moments of what stands in it in a and in b, in order.

        Where the chain of the newer version's chunk goes through the older one's, only what follows it is read. What
        both chunks stand on is decoded once, and a chunk that is measured while it is decoded is written nowhere.

        Parameters
        ----------
        cells
            In both versions as long, with the dtype of their elements.
        """
        ours, theirs, cells = tee(cells, 3)
        older, newer = sorted((a, b), key=lambda version: self.store.version(version).number)

        def measure(item: tuple[tuple[Cell, Dtype], Reading, Reading]) -> tuple[Cell, Moments]:
            (cell, dtype), first, second = item
            found = measure_chains(first.chain, second.chain, dtype, check=self.checks)
            return cell, found if older == a else found.swapped

        first = self.read(older, (cell for cell, _ in ours))
        second = self.read(newer, (cell for cell, _ in theirs), have=older)
        pairs = zip(cells, first, second, strict=True)
        return map_batched(self.executor, measure, pairs, nbytes=lambda item: item[1].chain[-1].decoded_nbytes)

    def tensors(self, version: VersionId, specs: Iterable[TensorSpec]) -> Iterator[tuple[TensorSpec, memoryview]]:
        """Yield whole tensors: their little-endian C-order bytes, in new memory, writable.

        Raises LimitError if they do not fit into memory.
        """
        specs = list(specs)
        memory = {spec.name: _fresh(spec.nbytes) for spec in specs}

        def targets() -> Iterator[tuple[Cell, memoryview]]:
            for spec in specs:
                out = memory[spec.name]
                for number, region in enumerate(spec.grid.regions()):
                    yield Cell(spec.name, number), out[region.start : region.stop]

        self.read_into(version, targets())
        for spec in specs:
            yield spec, memory.pop(spec.name)

    def box(self, version: VersionId, spec: TensorSpec, ranges: Sequence[range]) -> memoryview:
        """Return the C-order bytes of a box of a tensor, decoding only the cells that it touches.

        Parameters
        ----------
        spec
            A tensor whose dtype is not opaque.
        ranges
            For each axis, the consecutive indexes wanted.
        """
        itemsize = spec.dtype.bits // 8
        shape = tuple(len(wanted) for wanted in ranges)
        data = _fresh(prod(shape) * itemsize)
        if not data.nbytes:
            return data
        out = np.frombuffer(data, np.uint8).reshape((*shape, itemsize))
        grid = spec.grid
        numbers = grid.cells_in([(wanted.start, wanted.stop) for wanted in ranges])
        cells = (Cell(spec.name, number) for number in numbers)
        for cell, cell_bytes in self.stream(version, cells):
            place = grid.region(cell.number).slices
            chunk = np.frombuffer(cell_bytes, np.uint8).reshape((*(part.stop - part.start for part in place), itemsize))
            inner, outer = [], []
            for part, wanted in zip(place, ranges, strict=True):
                first, stop = max(part.start, wanted.start), min(part.stop, wanted.stop)
                inner.append(slice(first - part.start, stop - part.start))
                outer.append(slice(first - wanted.start, stop - wanted.start))
            out[tuple(outer)] = chunk[tuple(inner)]
        return data


def _fresh(nbytes: int) -> memoryview:
    """Return new memory that is not cleared first: it will be written anyway."""
    try:
        return np.empty(nbytes, np.uint8).data
    except MemoryError:
        raise LimitError(f"{nbytes} bytes do not fit into memory: select less", kind="out_of_memory") from None
