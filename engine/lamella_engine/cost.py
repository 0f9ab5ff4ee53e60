"""What a version costs: bytes kept for it, and what a checkout has to read. No weights are read to tell."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from lamella_engine.content_store.seam import ContentStore, Stored
from lamella_engine.model import Cell, TensorSpec, VersionId


@dataclass(frozen=True)
class Cost:
    """What some tensors of a version take to keep and to read."""

    __module__ = "lamella"

    decoded_nbytes: int
    """Bytes of the tensors."""
    encoded_nbytes: int
    """Bytes of the blobs that are these tensors' own chunks, each counted once; other versions may share them."""
    read_nbytes: int
    """Bytes of blobs that a checkout reads: those and all that they stand on, each counted once."""
    blob_count: int
    """How many blobs these are."""
    max_depth: int
    """The most deltas that have to be decoded for one cell; 0 if all are full."""
    per_tensor: Mapping[str, "Cost"] = field(repr=False, hash=False)
    """The same for each tensor; empty for a single one."""


class _Tally:
    """Blobs that have been seen."""

    def __init__(self) -> None:
        self._own: dict[Stored, None] = {}
        self._read: dict[Stored, None] = {}
        self._max_depth = 0

    def add(self, chain: tuple[Stored, ...]) -> None:
        if chain:
            self._own[chain[-1]] = None
            self._read.update(dict.fromkeys(chain))
            self._max_depth = max(self._max_depth, len(chain) - 1)

    def cost(self, decoded_nbytes: int, per_tensor: Mapping[str, Cost]) -> Cost:
        return Cost(
            decoded_nbytes=decoded_nbytes,
            encoded_nbytes=sum(blob.encoded_nbytes for blob in self._own),
            read_nbytes=sum(blob.encoded_nbytes for blob in self._read),
            blob_count=len(self._read),
            max_depth=self._max_depth,
            per_tensor=MappingProxyType(dict(per_tensor)),
        )


def cost_of(store: ContentStore, version: VersionId, specs: Iterable[TensorSpec]) -> Cost:
    """Return what tensors of a version cost; reads the pages and pack indexes that tell where they lie."""
    specs = list(specs)

    def cells() -> Iterator[Cell]:
        for spec in specs:
            for number in range(spec.grid.cell_count):
                yield Cell(spec.name, number)

    whole = _Tally()
    parts = {spec.name: _Tally() for spec in specs}
    for cell, chain in store.locate(version, cells()):
        whole.add(chain)
        parts[cell.tensor or ""].add(chain)
    per_tensor = {spec.name: parts[spec.name].cost(spec.nbytes, {}) for spec in specs}
    return whole.cost(sum(spec.nbytes for spec in specs), per_tensor)
