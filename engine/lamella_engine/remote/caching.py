"""Reading by way of the cache: what is there, or leads to what is wanted, is not sent."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from lamella_engine.codecs import Encoding
from lamella_engine.content_store.manifest import Manifest
from lamella_engine.content_store.seam import Blob, Reading, Stored
from lamella_engine.executor import Executor
from lamella_engine.model import Cell, ChunkId, VersionId
from lamella_engine.remote.cache import SMALLEST_NBYTES, ChunkCache
from lamella_engine.wire import batches

# Cells that are looked for, and asked for, at a time.
_CELLS_AT_ONCE = 4096


class Source(Protocol):
    """Where the rest comes from; see :class:`~lamella_engine.remote.store.RemoteStore`."""

    executor: Executor

    def manifest(self, id: VersionId) -> Manifest:
        """Return a version's manifest."""

    def locate(self, id: VersionId, cells: Iterable[Cell]) -> Iterator[tuple[Cell, tuple[Stored, ...]]]:
        """Yield each cell with the blobs of its chain."""

    def fetch(self, id: VersionId, cells: Iterable[Cell], *, held: Mapping[Cell, ChunkId] = ...) -> Iterator[Reading]:
        """Yield what it takes to have each cell, without what precedes the chunk that is held for it."""


def read_through(cache: ChunkCache, source: Source, id: VersionId, cells: Iterable[Cell]) -> Iterator[Reading]:
    """Yield what it takes to have each of ``cells``, in their order; what is decoded of it is kept.

    A chunk that is cached stands in a chain as a blob that is raw.
    """
    for some in batches(cells, _CELLS_AT_ONCE):
        yield from _read(cache, source, id, some)


def _read(cache: ChunkCache, source: Source, id: VersionId, cells: Sequence[Cell]) -> Iterator[Reading]:
    manifest = source.manifest(id)
    wanted = {cell: _chunk(manifest, cell) for cell in cells}
    here = {cell: chunk for cell, chunk in wanted.items() if chunk is not None and cache.has(chunk)}
    missing = [cell for cell in cells if cell not in here]
    held: dict[Cell, ChunkId] = {}
    for cell, stored in source.locate(id, [cell for cell in missing if wanted[cell] is not None]):
        before = [blob.chunk for blob in stored[:-1] if cache.has(blob.chunk)]
        if before:
            held[cell] = before[-1]
    sent = source.fetch(id, missing, held=held)
    near = here | held
    loaded = source.executor.map(lambda cell: cache.get(near[cell]), [cell for cell in cells if cell in near])
    for cell in cells:
        chain = () if cell in here else next(sent).chain
        if cell in near:
            data = next(loaded)
            if data is None:  # it was removed meanwhile, or was damaged
                (whole,) = source.fetch(id, [cell])
                chain = whole.chain
            else:
                chain = (Blob(near[cell], Encoding.RAW, 1, len(data), data, None), *chain)
        if wanted[cell] is not None and not cache.has(chain[-1].chunk):
            chain = (*chain[:-1], replace(chain[-1], keep=partial(cache.add, chain[-1].chunk)))
        yield Reading(cell, chain)


def _chunk(manifest: Manifest, cell: Cell) -> ChunkId | None:
    """Return the chunk that stands in a cell, or None if it is so short that none like it is ever kept."""
    if cell.tensor is None:
        chunk, nbytes = manifest.description.manifest_chunks[cell.number]
    else:
        row = manifest.row(cell.tensor, cell.number)
        chunk, nbytes = ChunkId(row.content), row.nbytes
    return chunk if nbytes >= SMALLEST_NBYTES else None
