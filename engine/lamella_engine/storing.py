"""The pipeline of a push: read and hash cells (threads), plan (the store), encode (threads), write (the store).

A bounded number of cells is in it. They go through in the order in which they are given, so blobs lie in packs as they
will be read.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from lamella_engine import codecs
from lamella_engine.chunking import MAX_CELL_NBYTES, POOLED_NBYTES
from lamella_engine.content_store.seam import Blob, Missing, Planned, Push
from lamella_engine.errors import CorruptionError
from lamella_engine.executor import Executor, map_batched
from lamella_engine.format.digests import chunk_id
from lamella_engine.model import Buffer, Cell, ChunkId, TensorSpec

logger = logging.getLogger("lamella")


@dataclass(frozen=True, slots=True)
class Place:
    """Some bytes that are still to be read: a cell's, or a part of the version's own manifest."""

    cell: Cell
    nbytes: int
    read: Callable[[memoryview | None], Buffer]
    """Returns the bytes; may use the memory it is given."""
    width: int = 1
    floating: bool = False
    companion: "Place | None" = None


def cell_place(
    spec: TensorSpec, number: int, read: Callable[[memoryview | None], Buffer], companion: Place | None = None
) -> Place:
    """Return the place of a tensor's cell."""
    nbytes = spec.grid.cell_nbytes(number)
    return Place(Cell(spec.name, number), nbytes, read, spec.dtype.lane, spec.dtype.floating, companion)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk on its way into the store."""

    place: Place
    id: ChunkId
    data: Buffer
    memory: memoryview | None
    """The memory that ``data`` lies in, if it is to be used again."""


class Pipeline:
    """Brings chunks into the store of one push.

    Parameters
    ----------
    push
        Is asked what it lacks, and given that.
    executor
        Where cells are read, hashed and encoded.
    """

    def __init__(self, push: Push, executor: Executor) -> None:
        self._push = push
        self._executor = executor
        self._free: list[memoryview] = []
        self.stored_nbytes = 0
        """Bytes, encoded, that the store was given."""

    def chunks(self, places: Iterable[Place]) -> Iterator[Chunk]:
        """Yield each place with its bytes and their id, in order."""
        return map_batched(self._executor, self._read_and_hash, places, nbytes=lambda place: place.nbytes)

    def _read_and_hash(self, place: Place) -> Chunk:
        memory = self._memory() if place.nbytes >= POOLED_NBYTES else None
        data = place.read(memory)
        return Chunk(place, chunk_id(data), data, memory)

    def _memory(self) -> memoryview:
        try:
            return self._free.pop()
        except IndexError:
            return np.empty(MAX_CELL_NBYTES, np.uint8).data

    def _release(self, memory: memoryview | None) -> None:
        if memory is not None:
            self._free.append(memory)

    def store(self, chunks: Iterable[Chunk]) -> None:
        """Give the store those of ``chunks`` that it lacks."""
        asked: deque[Chunk] = deque()

        def cells() -> Iterator[Planned]:
            for chunk in chunks:
                asked.append(chunk)
                companion = chunk.place.companion
                beside = None if companion is None else companion.cell
                yield Planned(chunk.place.cell, chunk.id, beside, len(chunk.data))

        def missing() -> Iterator[tuple[Chunk, Missing]]:
            for answer in self._push.plan(cells()):
                chunk = asked.popleft()
                if answer is None:
                    self._release(chunk.memory)
                else:
                    yield chunk, answer

        def blobs() -> Iterator[Blob]:
            encoded = map_batched(self._executor, self._encode, missing(), nbytes=lambda wanted: len(wanted[0].data))
            for blob in encoded:
                self.stored_nbytes += len(blob.payload)
                yield blob

        self._push.write(blobs())

    def _base_of(self, missing: Missing) -> Buffer | None:
        try:
            return None if missing.base is None else self._push.base(missing)
        except CorruptionError as error:  # this version need not stand on it; whoever reads that one will be told
            logger.warning("a chunk is stored without its base: %s", error)
            return None

    def _encode(self, wanted: tuple[Chunk, Missing]) -> Blob:
        chunk, missing = wanted
        place, nbytes = chunk.place, len(chunk.data)
        memory: memoryview | None = None
        guide: Buffer | None = None
        if missing.companion is not None and place.companion is not None:
            memory = self._memory() if place.companion.nbytes >= POOLED_NBYTES else None
            guide = place.companion.read(memory)
        encoded, against = self._smallest(chunk, missing, guide)
        again = partial(place.read, None)
        blob = Blob(chunk.id, encoded.encoding, place.width, nbytes, encoded.payload, against, again, place.floating)
        self._push.keep(blob, chunk.data)
        self._release(chunk.memory)
        self._release(memory)
        return blob

    def _smallest(self, chunk: Chunk, missing: Missing, guide: Buffer | None) -> tuple[codecs.Encoded, ChunkId | None]:
        """Return the payload of a chunk, and the chunk that it is made against; ``guide`` is that of its companion."""
        place, nbytes = chunk.place, len(chunk.data)
        encode = partial(codecs.encode, chunk.data, width=place.width, floating=place.floating)
        cast: codecs.Encoded | None = None
        if guide is not None and len(guide) != nbytes:  # of the same weights in another type, or was expected to be
            if codecs.is_near_cast(chunk.data, guide, width=place.width):
                found = encode(base=guide)
                cast = found if found.encoding is codecs.Encoding.CAST else None
                if cast is not None and len(cast.payload) == 1:  # nothing but which cast it is
                    return cast, missing.companion
            guide = None
        base = self._base_of(missing)
        if base is None and missing.base is not None:
            cast = None  # the store, which has that base, may do better
        if base is not None and not codecs.fits(len(base), nbytes, floating=place.floating):
            base = None  # the tensor grew or shrank at this place
        encoded = encode(base=base, guide=guide)
        if cast is not None and len(cast.payload) < len(encoded.payload):
            return cast, missing.companion
        against = {
            codecs.Against.NOTHING: None,
            codecs.Against.BASE: missing.base,
            codecs.Against.GUIDE: missing.companion,
        }
        return encoded, against[encoded.against]
