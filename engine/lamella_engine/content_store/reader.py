"""Reading versions from objects: from an id to its metadata, its cells, and the copies that hold them."""

import logging
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from lamella_engine import sketches
from lamella_engine.codecs import Encoding
from lamella_engine.content_store.decoding import decode_chain, lend
from lamella_engine.content_store.log import Log
from lamella_engine.content_store.manifest import Manifest, Row
from lamella_engine.content_store.packs import Packs, StoredBlob
from lamella_engine.content_store.seam import Blob, Parent, Reading, Recorded, Stored
from lamella_engine.errors import CorruptionError, InvalidInputError, NotFoundError, VersionNotFoundError
from lamella_engine.executor import Executor
from lamella_engine.format.digests import Context, chunk_id, digest
from lamella_engine.format.entry import VersionAdded
from lamella_engine.format.names import metadata_version
from lamella_engine.format.version import MAX_METADATA_NBYTES, Locator, decode_metadata
from lamella_engine.model import Buffer, Cell, ChunkId, TensorSpec, VersionId
from lamella_engine.objects import Objects
from lamella_engine.sketches import Sketch

logger = logging.getLogger("lamella")

Result = TypeVar("Result")

VERSIONS_KEPT = 16
"""Opened versions kept with their parsed pages."""

BASES_KEPT = 16
"""Decoded bases kept, for all pushes of a process into one repository: each is wanted twice, by the encoder and by the
check of what it made. At most 64 MiB."""

SKETCHES_KEPT = 64
"""Sketches of versions kept in memory, each a few hundred bytes for a tensor, 2 MiB at most for each width of lanes."""

# What is read at a time, in encoded bytes and cells: enough that neighbouring blobs come in long reads, little enough
# to be a small part of the memory that work in flight may hold.
WINDOW_NBYTES = 16 << 20
WINDOW_CELLS = 256

ID_DIGITS = 64


@dataclass(frozen=True, slots=True)
class OpenVersion:
    """A version with what reading it takes."""

    added: VersionAdded
    recorded: Recorded
    locator: Locator
    manifest: Manifest
    manifest_stops: list[int]
    """One past the last place of each run of ``locator.manifest_runs``."""
    cell_stops: list[int]

    def pack_of_manifest(self, place: int) -> str:
        """Return the pack that a manifest chunk was written to, by its place in ``Description.manifest_chunks``."""
        run = self.locator.manifest_runs[bisect_right(self.manifest_stops, place)]
        return self.locator.packs[run[1]].name

    def pack_of_cell(self, position: int) -> str:
        """Return the pack that a cell was written to, by its number in the version."""
        run = self.locator.cell_runs[bisect_right(self.cell_stops, position)]
        return self.locator.packs[run[1]].name


@dataclass(frozen=True, slots=True)
class _Located:
    """A cell, and either its bytes, which stand in its row, or the blobs that it takes to have it."""

    cell: Cell
    content: bytes | None
    chain: tuple[StoredBlob, ...]

    def reading(self, payloads: Mapping[StoredBlob, memoryview], packs: Packs) -> Reading:
        if self.content is not None:
            raw = Blob(chunk_id(self.content), Encoding.RAW, 1, len(self.content), self.content, None)
            return Reading(self.cell, (raw,))
        return Reading(self.cell, tuple(packs.blob(link, payloads[link]) for link in self.chain))


class PackedReader:
    """Reads the versions of one repository on objects. Safe for several threads."""

    def __init__(self, objects: Objects, log: Log, packs: Packs, executor: Executor) -> None:
        self._objects = objects
        self._log = log
        self._packs = packs
        self._executor = executor
        self._lock = threading.Lock()
        self._open: OrderedDict[VersionId, OpenVersion] = OrderedDict()
        self._places: dict[VersionId, tuple[str, int]] = {}
        self._bases: OrderedDict[StoredBlob, Buffer] = OrderedDict()
        self._sketches: OrderedDict[VersionId, Sketch] = OrderedDict()
        self._structure_kept: tuple[str, list[TensorSpec]] = "", []

    def remember(self, added: VersionAdded) -> VersionId:
        """Note where a version stands, so that its id need not be looked for; return the id."""
        if len(self._places) > 100_000:
            self._places.clear()
        self._places[added.id] = (added.model, added.number)
        return added.id

    def find(self, id_prefix: str, *, model: str | None = None) -> VersionAdded:
        """Return the version whose id begins so. Raises VersionNotFoundError, or InvalidInputError if several do.

        Names of metadata objects begin with the id, so a listing finds them; only those that the log confirms count.
        """
        known = self._places.get(VersionId(id_prefix)) if len(id_prefix) == ID_DIGITS else None
        if known is not None and (added := self._log.state.version(*known)) is not None:
            found = {added.id: added}
        else:
            found = {}
            for info in self._objects.list(f"meta/{id_prefix}"):
                added = self._confirmed(info.name, info.nbytes)
                if added is not None:
                    found[added.id] = added
        if model is not None:
            found = {id: added for id, added in found.items() if added.model == model}
        if not found:
            raise VersionNotFoundError(
                f"there is no version {id_prefix}: check the digits, or see log", version=id_prefix
            )
        if len(found) > 1:
            raise InvalidInputError(
                f"{id_prefix} begins the ids of {len(found)} versions: give more digits", kind="ambiguous_id"
            )
        added = next(iter(found.values()))
        self.remember(added)
        return added

    def _confirmed(self, name: str, nbytes: int) -> VersionAdded | None:
        id = metadata_version(name)
        try:
            data = self._metadata(name, nbytes)
        except NotFoundError:
            return None
        description, locator = decode_metadata(data, expected=id)
        added = self._log.state.version(description.model, locator.number)
        return added if added is not None and added.metadata == name else None

    def _metadata(self, name: str, nbytes: int) -> bytes:
        if nbytes > MAX_METADATA_NBYTES:
            raise CorruptionError(f"{name} is longer than any metadata may be", kind="bad_metadata", object=name)
        return self._objects.get_range(name, 0, nbytes)

    def open(self, id: VersionId) -> OpenVersion:
        """Return a version by its full id; raises VersionNotFoundError."""
        with self._lock:
            version = self._open.get(id)
            if version is not None:
                self._open.move_to_end(id)
                return version
        return self.open_added(self.find(id))

    def open_added(self, added: VersionAdded) -> OpenVersion:
        """Return a version by its row in the log; raises CorruptionError if its metadata is missing or damaged."""
        with self._lock:
            version = self._open.get(added.id)
        if version is None or version.added != added:
            version = self._load(added)
            self._keep(version)
        return version

    def _load(self, added: VersionAdded) -> OpenVersion:
        try:
            data = self._metadata(added.metadata, added.nbytes)
        except NotFoundError:
            raise CorruptionError(
                f"{added.metadata} is missing, though the log names it", kind="missing_object", object=added.metadata
            ) from None
        if digest(Context.METADATA, data) != added.digest:
            raise CorruptionError(
                f"{added.metadata} is not the object that the log names", kind="bad_digest", object=added.metadata
            )
        return self._assembled(added, data)

    def adopt(self, added: VersionAdded, data: bytes) -> OpenVersion:
        """Return a version whose metadata object this process has just written: nothing is read."""
        version = self._assembled(added, data)
        self._keep(version)
        return version

    def _keep(self, version: OpenVersion) -> None:
        with self._lock:
            self._open[version.added.id] = version
            if len(self._open) > VERSIONS_KEPT:
                self._open.popitem(last=False)
        self.remember(version.added)

    def _assembled(self, added: VersionAdded, data: bytes) -> OpenVersion:
        description, locator = decode_metadata(data, expected=added.id)
        if (description.model, locator.number) != (added.model, added.number):
            raise CorruptionError(f"{added.metadata} belongs to another version", kind="bad_metadata")
        self._packs.learn(locator.packs)
        self._packs.trust(pack.name for at, pack in enumerate(locator.packs) if at not in locator.doubtful)
        parents = tuple(
            Parent(id, model, number) for id, (model, number) in zip(description.parents, locator.parents, strict=True)
        )
        chunks = description.manifest_chunks

        def load(place: int) -> bytes:
            chunk, nbytes = chunks[place]
            pack = version.pack_of_manifest(place)
            return bytes(self._following_packs(lambda: self.decoded(self.copy(chunk, pack), nbytes, check=True)))

        version = OpenVersion(
            added,
            Recorded(added.id, added.model, added.number, description, parents),
            locator,
            Manifest(description, load),
            list(accumulate(count for count, _ in locator.manifest_runs)),
            list(accumulate(count for count, _ in locator.cell_runs)),
        )
        return version

    def sketch(self, version: OpenVersion) -> Sketch:
        """Return a version's sketch; an empty one if it has none, or one that cannot be read."""
        with self._lock:
            found = self._sketches.get(version.added.id)
        if found is not None:
            return found
        description = version.recorded.description
        first = len(description.manifest_chunks) - len(description.sketches)
        try:
            lanes = {item.width: version.manifest.chunk(first + at) for at, item in enumerate(description.sketches)}
            found = sketches.parse(self._structure(version), lanes)
        except CorruptionError as error:  # only the choice of bases suffers
            logger.warning("the sketch of a version cannot be used: %s", error)
            found = Sketch({})
        with self._lock:
            self._sketches[version.added.id] = found
            if len(self._sketches) > SKETCHES_KEPT:
                self._sketches.popitem(last=False)
        return found

    def _structure(self, version: OpenVersion) -> list[TensorSpec]:
        """Return a version's tensors, those of the structure asked for last without reading."""
        id, specs = self._structure_kept
        if id != version.recorded.description.structure_id:
            id, specs = version.recorded.description.structure_id, list(version.manifest.specs())
            self._structure_kept = id, specs
        return specs

    def copy(self, chunk: ChunkId, pack: str) -> StoredBlob:
        """Return the copy of a chunk that was written to ``pack``, wherever it lies by now."""
        return self._packs.find(chunk, self._log.state.where_is(pack))

    def chain(self, blob: StoredBlob) -> tuple[StoredBlob, ...]:
        """Return what has to be decoded for a blob, in order."""
        return self._packs.chain(blob, self._log.state.where_is)

    def decoded(self, blob: StoredBlob, nbytes: int, *, check: bool = False) -> memoryview:
        """Return the decoded bytes of a blob that is ``nbytes`` long decoded; raises CorruptionError.

        Reads and decodes in the caller's thread. With ``check`` the chunk's id is computed again.
        """
        out = np.empty(blob.row.decoded_nbytes, np.uint8).data
        if len(out) != nbytes:
            raise CorruptionError(f"a chunk of {len(out)} bytes stands where {nbytes} belong", kind="bad_length")
        decode_chain(self._blobs(blob), out, check=check)
        return out

    def _blobs(self, blob: StoredBlob) -> list[Blob]:
        """Read what has to be decoded for a blob, in the caller's thread."""
        return [self._packs.blob(link, self._packs.payload(link)) for link in self.chain(blob)]

    def base(self, blob: StoredBlob) -> Buffer:
        """Return the chunk of a copy that several blobs are made against, or one of them more than once."""
        with self._lock:
            data = self._bases.get(blob)
        if data is None:
            data = self.decoded(blob, blob.row.decoded_nbytes)
            with self._lock:
                self._bases[blob] = data
                if len(self._bases) > BASES_KEPT:
                    self._bases.popitem(last=False)
        return data

    def lent_base(self, blob: StoredBlob) -> Buffer:
        """Return the chunk of a copy that is wanted once, valid until this thread asks for another.

        A service, which does not encode, decodes a base for each delta that it is given: new memory for each took it a
        tenth of its time.
        """
        with self._lock:
            data = self._bases.get(blob)
        return lend(self._blobs(blob)) if data is None else data

    def read(
        self,
        id: VersionId,
        cells: Iterable[Cell],
        have: VersionId | None = None,
        held: Mapping[Cell, ChunkId] = MappingProxyType({}),
    ) -> Iterator[Reading]:
        """See ``PackedStore.read``."""
        version = self.open(id)
        whole = None if have is None else self.open(have)
        locate = partial(self._locate, version, whole=whole, held=held)
        window: list[_Located] = []
        nbytes = 0
        for cell in cells:
            located = self._following_packs(partial(locate, cell))
            window.append(located)
            nbytes += sum(link.row.encoded_nbytes for link in located.chain)
            if nbytes >= WINDOW_NBYTES or len(window) >= WINDOW_CELLS:
                yield from self._readings(locate, window)
                window, nbytes = [], 0
        yield from self._readings(locate, window)

    def locate(self, id: VersionId, cells: Iterable[Cell]) -> Iterator[tuple[Cell, tuple[Stored, ...]]]:
        """See ``ContentStore.locate``."""
        version = self.open(id)
        for cell in cells:
            chain = self._following_packs(partial(self._locate, version, cell)).chain
            rows = (link.row for link in chain)
            yield cell, tuple(Stored(row.chunk, row.decoded_nbytes, row.encoded_nbytes) for row in rows)

    def _readings(self, locate: Callable[[Cell], _Located], window: Sequence[_Located]) -> Iterator[Reading]:
        located = iter([window])

        def fetch() -> list[Reading]:
            # The second time round, when a pack was missing, every cell is located again.
            cells = next(located, None) or [locate(item.cell) for item in window]
            payloads = self._packs.payloads((link for item in cells for link in item.chain), self._executor)
            return [item.reading(payloads, self._packs) for item in cells]

        return iter(self._following_packs(fetch) if window else ())

    def _following_packs(self, read: Callable[[], Result]) -> Result:
        """Return ``read()``; if a pack is missing, it may have been replaced meanwhile: look, and try once more."""
        try:
            return read()
        except CorruptionError as error:
            if error.kind != "missing_object":
                raise
            self._log.refresh()
        return read()

    def _locate(
        self,
        version: OpenVersion,
        cell: Cell,
        whole: OpenVersion | None = None,
        held: Mapping[Cell, ChunkId] = MappingProxyType({}),
    ) -> _Located:
        if cell.tensor is None:
            if not 0 <= cell.number < len(version.recorded.description.manifest_chunks):
                raise _no_cell(cell)
            return _Located(cell, None, self.chain(self.copy_of_manifest(version, cell.number)))
        try:
            row = version.manifest.row(cell.tensor, cell.number)
        except IndexError:
            raise _no_cell(cell) from None
        have: set[bytes | None] = {held.get(cell)}
        if whole is not None:
            have.add(_content_of(whole.manifest, version.manifest.spec(cell.tensor), cell.number))
        if row.content in have:
            return _Located(cell, None, ())
        if row.chunk is None:
            return _Located(cell, row.content, ())
        chain = self.chain(self.copy_of_row(version, row))
        following = max((at for at, link in enumerate(chain, 1) if link.row.chunk in have), default=0)
        return _Located(cell, None, chain[following:])

    def copy_of_row(self, version: OpenVersion, row: Row) -> StoredBlob:
        """Return the copy that a row of the cell table means; raises CorruptionError if it is of another length."""
        assert row.chunk is not None
        return as_long_as(row.nbytes, self.copy(row.chunk, version.pack_of_cell(row.position)))

    def copy_of_manifest(self, version: OpenVersion, place: int) -> StoredBlob:
        """Return the copy of a manifest chunk; raises CorruptionError if it is of another length than is listed."""
        chunk, nbytes = version.recorded.description.manifest_chunks[place]
        return as_long_as(nbytes, self.copy(chunk, version.pack_of_manifest(place)))


def as_long_as(nbytes: int, blob: StoredBlob) -> StoredBlob:
    """Return a copy if its chunk is as long as the place where it stands; raises CorruptionError."""
    if blob.row.decoded_nbytes != nbytes:
        raise CorruptionError(
            f"a chunk of {blob.row.decoded_nbytes} bytes stands where {nbytes} belong", kind="bad_length"
        )
    return blob


def _no_cell(cell: Cell) -> InvalidInputError:
    what = "the manifest" if cell.tensor is None else repr(cell.tensor)
    return InvalidInputError(f"{what} has no cell {cell.number}: ask for one that there is", kind="no_cell")


def _content_of(manifest: Manifest, spec: TensorSpec, number: int) -> bytes | None:
    """Return what stands in the row of a cell, or None if the version has no such tensor."""
    return manifest.row(spec.name, number).content if manifest.holds(spec) else None
