"""From a checkpoint to a version: hash every cell, encode what the store lacks, record the rest by reference.

A pipeline with a bounded number of cells in it: read and hash (threads), plan (the store), encode (threads), write
(the store, which decodes again and compares). Cells go through it in manifest order, so blobs lie in packs as they
will be read.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from lamella_engine import codecs
from lamella_engine.checkpoints import Checkpoint
from lamella_engine.chunking import MAX_CELL_NBYTES, Region
from lamella_engine.content_store.log import now, principal
from lamella_engine.content_store.seam import Blob, Missing, Push, Recorded
from lamella_engine.errors import InvalidInputError
from lamella_engine.executor import Executor, map_batched
from lamella_engine.format.digests import Context, Digester, chunk_id
from lamella_engine.format.manifest import (
    INLINE_NBYTES,
    CellPage,
    CellTable,
    StructurePage,
    structure_id,
    structure_pages,
)
from lamella_engine.format.version import AttachmentPages, Description
from lamella_engine.model import Buffer, Cell, ChunkId, TensorSpec

POOLED_NBYTES = 1 << 16
"""Cells from this length on are read into memory that is used again; shorter ones are cheap to have anew."""


@dataclass(frozen=True, slots=True)
class Notes:
    """What is recorded beside the tensors."""

    message: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    recipe: Any = None


@dataclass(frozen=True, slots=True)
class _Place:
    """A cell that is still to be read."""

    table: CellTable
    spec: TensorSpec
    number: int
    region: Region


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk on its way into the store."""

    cell: Cell
    id: ChunkId
    data: Buffer
    width: int
    floating: bool
    memory: bytearray | None = None
    """The memory that ``data`` lies in, if it is to be used again."""


def push_checkpoint(push: Push, checkpoint: Checkpoint, executor: Executor, notes: Notes) -> Recorded:
    """Store a checkpoint and record it as a version.

    Raises InvalidInputError if the checkpoint changes meanwhile, and whatever ``push`` raises.
    """
    try:
        return _Pushing(push, checkpoint, executor).run(notes)
    except InvalidInputError as error:
        if error.kind != "wrong_blob":
            raise
        # Found when the store decoded what it was given: the bytes were others when they were hashed.
        raise InvalidInputError(
            "a tensor changed while it was pushed: push again when nothing writes to it", kind="source_changed"
        ) from error


class _Pushing:
    def __init__(self, push: Push, checkpoint: Checkpoint, executor: Executor) -> None:
        self._push = push
        self._checkpoint = checkpoint
        self._executor = executor
        self._parameters = Digester(Context.PARAMETERS)
        self._free: list[bytearray] = []

    def run(self, notes: Notes) -> Recorded:
        structure = self._checkpoint.structure
        cut = list(structure_pages(structure))
        structure_digest = structure_id(page for page, _ in cut)
        self._parameters.update(bytes.fromhex(structure_digest))
        counts = (sum(spec.grid.cell_count for spec in specs) for _, specs in cut)
        *firsts, cell_count = accumulate(counts, initial=0)
        tables = [CellTable(first) for first in firsts]

        def places() -> Iterator[_Place]:
            for (_, specs), table in zip(cut, tables, strict=True):
                for spec in specs:
                    for number, region in enumerate(spec.grid.regions()):
                        yield _Place(table, spec, number, region)

        self._store(self._chunks(places()))
        manifest: list[bytes] = []

        def keep(data: bytes) -> ChunkId:
            manifest.append(data)
            return chunk_id(data)

        pages: list[StructurePage] = []
        for (page, specs), table in zip(cut, tables, strict=True):
            chunk = keep(page)
            cells = tuple(CellPage(keep(rows), len(rows), first) for rows, first in table.pages())
            pages.append(StructurePage(chunk, len(page), specs[0].name, table.first_cell, cells))
        attachments: list[AttachmentPages] = []
        for attachment in self._checkpoint.attachments:
            pieces = (
                attachment.data[at : at + MAX_CELL_NBYTES] for at in range(0, len(attachment.data), MAX_CELL_NBYTES)
            )
            chunks = tuple((keep(piece), len(piece)) for piece in pieces)
            attachments.append(AttachmentPages(attachment.path, attachment.role, chunks))
        self._store(_Chunk(Cell(None, at), chunk_id(data), data, 1, False) for at, data in enumerate(manifest))
        self._checkpoint.check_unchanged()
        return self._push.commit(
            Description(
                model=self._push.model,
                push=self._push.id,
                structure_id=structure_digest,
                parameters_id=self._parameters.digest().hex(),
                tensor_count=len(structure),
                cell_count=cell_count,
                decoded_nbytes=sum(spec.nbytes for spec in structure),
                pages=tuple(pages),
                attachments=tuple(attachments),
                parents=tuple(parent.id for parent in self._push.parents),
                message=notes.message,
                author=principal(),
                created=now(),
                metrics=notes.metrics,
                recipe=notes.recipe,
            )
        )

    def _chunks(self, places: Iterable[_Place]) -> Iterator[_Chunk]:
        """Enter every cell in its table and in the digest; yield those that do not stand in their row."""
        hashed = map_batched(self._executor, self._read_and_hash, places, nbytes=lambda place: place.region.nbytes)
        for place, chunk in hashed:
            self._parameters.update(chunk.id)
            if place.region.nbytes <= INLINE_NBYTES:
                place.table.add(bytes(chunk.data))
            else:
                place.table.add(chunk.id)
                yield chunk

    def _read_and_hash(self, place: _Place) -> tuple[_Place, _Chunk]:
        memory = self._memory() if place.region.nbytes >= POOLED_NBYTES else None
        data = self._checkpoint.read(place.spec, place.region, memory)
        dtype = place.spec.dtype
        cell = Cell(place.spec.name, place.number)
        return place, _Chunk(cell, chunk_id(data), data, dtype.lane, dtype.floating, memory)

    def _memory(self) -> bytearray:
        try:
            return self._free.pop()
        except IndexError:
            return bytearray(MAX_CELL_NBYTES)

    def _release(self, chunk: _Chunk) -> None:
        if chunk.memory is not None:
            self._free.append(chunk.memory)

    def _store(self, chunks: Iterable[_Chunk]) -> None:
        """Give the store those of ``chunks`` that it lacks."""
        asked: deque[_Chunk] = deque()

        def cells() -> Iterator[tuple[Cell, ChunkId]]:
            for chunk in chunks:
                asked.append(chunk)
                yield chunk.cell, chunk.id

        def missing() -> Iterator[tuple[_Chunk, Missing]]:
            for answer in self._push.plan(cells()):
                chunk = asked.popleft()
                if answer is None:
                    self._release(chunk)
                else:
                    yield chunk, answer

        self._push.write(
            map_batched(self._executor, self._encode, missing(), nbytes=lambda wanted: len(wanted[0].data))
        )

    def _encode(self, wanted: tuple[_Chunk, Missing]) -> Blob:
        chunk, missing = wanted
        base = self._push.base(missing) if missing.base is not None else None
        if base is not None and len(base) != len(chunk.data):
            base = None  # the tensor grew or shrank at this place
        encoding, payload = codecs.encode(chunk.data, width=chunk.width, floating=chunk.floating, base=base)
        nbytes = len(chunk.data)
        self._release(chunk)
        against = missing.base if codecs.needs_base(encoding) else None
        return Blob(chunk.id, encoding, chunk.width, nbytes, payload, against)
