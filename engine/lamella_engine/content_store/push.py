"""A push into objects: what is missing, packs for it, and the one entry that makes it a version."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import TypeVar

from lamella_engine.chunk_index import ChunkIndex
from lamella_engine.content_store.decoding import check_blob
from lamella_engine.content_store.log import Change, Log
from lamella_engine.content_store.manifest import Manifest
from lamella_engine.content_store.packs import Packs, PackWriter, StoredBlob
from lamella_engine.content_store.reader import OpenVersion, PackedReader
from lamella_engine.content_store.seam import COMPANION_REACH, Blob, Missing, Parent, Planned, Recorded
from lamella_engine.content_store.state import Ref, State
from lamella_engine.errors import AlreadyExistsError, ConflictError, CorruptionError, InvalidInputError, LamellaError
from lamella_engine.executor import Executor, map_batched
from lamella_engine.format import canonical
from lamella_engine.format.digests import Context, digest
from lamella_engine.format.entry import VERIFIED_BY_STORE, PackAdded, RefChange, VersionAdded
from lamella_engine.format.names import metadata_name, session_name
from lamella_engine.format.version import Description, Locator, PackRef, encode_description, encode_metadata, version_id
from lamella_engine.model import Buffer, Cell, ChunkId, PushId, VersionId
from lamella_engine.objects import Objects
from lamella_engine.sketches import Sketch

logger = logging.getLogger("lamella")

Key = TypeVar("Key")
Value = TypeVar("Value")

BASES_KEPT = 16
"""Decoded bases kept: each is wanted twice, by the encoder and by the check of what it made. At most 64 MiB."""

GOOD_FIT = 0.5
"""A parent that saves this share of what tensors take alone, or more, is taken without looking for a nearer version."""

CLEARLY_NEARER = 0.9
"""Of two versions one is nearer if it takes at most this share of the other's bits: less is within a sketch's error."""

LONGEST_CHAIN = 4
"""Bytes of a chain to those of the full blob that it begins with: where deltas save little, chains are short. 3 takes 2
to 5 % more bytes and an eighth to a quarter less time to check out (``benchmarks.chains``)."""

MOST_CANDIDATES = 16
"""Versions whose sketches are looked at; reading one that is not in memory takes some milliseconds."""

HEARTBEAT_S = 60.0
"""A push that lives longer shows that it does by a session object, one every minute, so that its packs are not
swept."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a missing chunk may be made against."""

    base: StoredBlob | None
    companion: "StoredBlob | ChunkId | None"
    """A copy that is live, or the chunk of a blob that is given shortly before."""


@dataclass(frozen=True, slots=True)
class _Given:
    """A blob that was handed in, with the copy that it is a delta of, if it is one."""

    blob: Blob
    base: StoredBlob | None


@dataclass(frozen=True, slots=True)
class PushContext:
    """The parts of a store that a push works with."""

    objects: Objects
    executor: Executor
    log: Log
    packs: Packs
    reader: PackedReader
    index: ChunkIndex


class PackedPush:
    """See :class:`~lamella_engine.content_store.seam.Push`.

    Parameters
    ----------
    context
        The store.
    model, branch
        Where to.
    state
        The newest state when the push began: chunks are planned against what is live in it.
    head
        The branch's head at that time; None for a branch that is not there yet.
    parent
        The version that this one follows: the head, or where a new branch starts, or None.
    """

    def __init__(
        self,
        context: PushContext,
        *,
        model: str,
        branch: str,
        push_id: PushId,
        state: State,
        head: Ref | None,
        parent: OpenVersion | None,
    ) -> None:
        self._store = context
        self.model = model
        self._branch = branch
        self.id = push_id
        self._state = state
        self._head = head
        self._parent = parent
        recorded = None if parent is None else parent.recorded
        self.parents: tuple[Parent, ...] = ()
        if recorded is not None:
            self.parents = (Parent(recorded.id, recorded.model, recorded.number),)
        self._nearest: dict[str, OpenVersion] = {}
        """For tensors whose bases are not the parent's, the versions that have them."""
        self._writer = PackWriter(context.objects, context.executor, push_id, self._note_pack)
        self._packs: dict[ChunkId, str] = {}
        """The pack that holds each chunk planned so far; "" for one that this push has yet to store."""
        self._wanted: dict[ChunkId, _Offer] = {}
        """Chunks that were called missing and have not come, with the bases that were offered."""
        self._planned: OrderedDict[Cell, StoredBlob | ChunkId] = OrderedDict()
        """The cells planned last that may be companions: the copy of each, or its chunk if it is yet to be given."""
        self._given: OrderedDict[ChunkId, _Given] = OrderedDict()
        """The blobs given last: bases of the next ones."""
        self._live: dict[str, bool] = {}
        self._bases: OrderedDict[StoredBlob, Buffer] = OrderedDict()
        self._bases_lock = threading.Lock()
        self._next_beat = time.monotonic() + HEARTBEAT_S
        self._beats = 0
        self._attempt = 0

    # -- bases --------------------------------------------------------------------------------------------------------

    def consider(self, sketch: Sketch) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        if not sketch.tensors:
            return
        least: dict[str, float] = {}
        if self._parent is not None:
            least = sketch.bits_against(self._store.reader.sketch(self._parent))
            alone = sum(sketch.bits_alone(name) for name in least)
            if sum(least.values()) <= GOOD_FIT * alone:
                return  # also if nothing is known of the parent
        for version in self._candidates():
            for name, bits in sketch.bits_against(self._store.reader.sketch(version)).items():
                if bits < least.get(name, sketch.bits_alone(name)) * CLEARLY_NEARER:
                    least[name] = bits
                    self._nearest[name] = version

    def _candidates(self) -> Iterator[OpenVersion]:
        """Yield versions that may be near: where refs stand, of this model first, then those before the parent."""
        models = sorted(self._state.models(), key=lambda model: model != self.model)
        heads = ((model, sorted((ref.number for _, ref in self._state.refs(model)), reverse=True)) for model in models)
        numbers = dict.fromkeys((model, number) for model, newest_first in heads for number in newest_first)
        before = 0 if self._parent is None else self._parent.added.number
        numbers |= dict.fromkeys((self.model, number) for number in range(before - 1, 0, -1)[:MOST_CANDIDATES])
        for model, number in islice(numbers, MOST_CANDIDATES):
            added = self._state.version(model, number)
            if added is not None and (self._parent is None or added.id != self._parent.added.id):
                try:
                    yield self._store.reader.open_added(added)
                except CorruptionError as error:  # whoever asks for that version will be told
                    logger.warning("a version cannot serve as a base: %s", error)

    # -- plan ---------------------------------------------------------------------------------------------------------

    def plan(self, cells: Iterable[Planned]) -> Iterator[Missing | None]:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        for cell, chunk, beside, _ in cells:
            self._beat_if_due()
            if chunk in self._packs:
                yield None
                continue
            natural = self._natural_base(cell)
            copy = natural if natural is not None and natural.row.chunk == chunk else self._find_live(chunk)
            self._packs[chunk] = "" if copy is None else copy.pack
            _remember(self._planned, cell, chunk if copy is None else copy)
            if copy is not None:
                yield None
                continue
            limit = self._state.genesis.max_depth
            base = natural
            if base is not None and (base.row.depth >= limit or not self._may_grow(base)):
                base = None  # start a new chain
            companion = None if beside is None else self._planned.get(beside)
            if isinstance(companion, StoredBlob) and companion.row.depth > limit:
                companion = None
            self._wanted[chunk] = _Offer(base, companion)
            offered = companion.row.chunk if isinstance(companion, StoredBlob) else companion
            yield Missing(cell, chunk, None if base is None else base.row.chunk, offered)

    def _natural_base(self, cell: Cell) -> StoredBlob | None:
        """Return the copy that stands at the same place in the version that a cell's base is taken from, if any."""
        version = self._parent if cell.tensor is None else self._nearest.get(cell.tensor, self._parent)
        if version is None:
            return None
        try:
            if cell.tensor is None:
                return self._sketch_base(version, -cell.number)
            return self._copy_at(version, cell.tensor, cell.number)
        except CorruptionError as error:
            # What this push does not stand on anyway may be damaged: whoever reads it will be told.
            if version is self._parent and cell.tensor is not None:
                raise
            logger.warning("a base is done without: %s", error)
            return None

    def _copy_at(self, version: OpenVersion, tensor: str, number: int) -> StoredBlob | None:
        if not version.manifest.has(tensor) or number >= version.manifest.spec(tensor).grid.cell_count:
            return None
        row = version.manifest.row(tensor, number)
        if row.chunk is None:
            return None
        copy = self._store.reader.copy_of_row(version, row)
        return copy if self._is_live(copy) else None

    def _sketch_base(self, version: OpenVersion, width: int) -> StoredBlob | None:
        """Return the copy of a version's sketch of lanes of that width."""
        description = version.recorded.description
        for at, lanes in enumerate(reversed(description.sketches), 1):
            if lanes.width == width:
                copy = self._store.reader.copy_of_manifest(version, len(description.manifest_chunks) - at)
                return copy if self._is_live(copy) else None
        return None

    def _may_grow(self, base: StoredBlob) -> bool:
        """Whether reading a chunk with one more delta like the last, its whole chain, stays near reading it alone."""
        full, *deltas = (link.row.encoded_nbytes for link in self._store.reader.chain(base))
        return full + sum(deltas) + sum(deltas[-1:]) <= LONGEST_CHAIN * full

    def _find_live(self, chunk: ChunkId) -> StoredBlob | None:
        for pack in self._store.index.find(chunk):
            # The index is derived and may be wrong, so the pack itself is asked; if that is damaged, the chunk is
            # stored once more.
            try:
                if self._pack_is_live(pack) and (row := self._store.packs.index(pack).find(chunk)) is not None:
                    copy = StoredBlob(pack, row)
                    if self._is_live(copy):
                        return copy
            except CorruptionError as error:
                logger.warning("a chunk is stored again: %s", error)
        return None

    def _is_live(self, copy: StoredBlob) -> bool:
        """Whether a copy and everything it stands on is live."""
        return all(self._pack_is_live(link.pack) for link in self._store.reader.chain(copy))

    def _pack_is_live(self, pack: str) -> bool:
        live = self._live.get(pack)
        if live is None:
            live = self._live[pack] = _serves_all(self._state, pack)
        return live

    # -- write --------------------------------------------------------------------------------------------------------

    def base(self, missing: Missing) -> Buffer:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        base = self._wanted[missing.chunk].base
        if base is None:
            raise InvalidInputError("no base was offered for this chunk", kind="no_base")
        return self._decoded(base)

    def _decoded(self, base: StoredBlob) -> Buffer:
        with self._bases_lock:
            data = self._bases.get(base)
        if data is None:
            data = self._store.reader.decoded(base, base.row.decoded_nbytes)
            with self._bases_lock:
                self._bases[base] = data
                if len(self._bases) > BASES_KEPT:
                    self._bases.popitem(last=False)
        return data

    def write(self, blobs: Iterable[Blob]) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`."""

        def given() -> Iterator[tuple[Blob, _Offer | None, _Given | None]]:
            for blob in blobs:
                offer = self._wanted.get(blob.chunk)
                if offer is None and blob.chunk not in self._packs:
                    raise InvalidInputError("a blob was written that nobody asked for", kind="unplanned_blob")
                base = None if offer is None else offer.base
                own = base if base is not None and base.row.chunk == blob.base else None
                _remember(self._given, blob.chunk, _Given(blob, own))
                yield blob, offer, None if blob.base is None else self._given.get(blob.base)

        checked = map_batched(self._store.executor, self._checked, given(), nbytes=lambda item: item[0].decoded_nbytes)
        for blob, base in checked:
            if self._wanted.pop(blob.chunk, None) is not None:  # else it was given twice
                self._writer.add(blob, base=base)

    def _checked(self, item: tuple[Blob, _Offer | None, _Given | None]) -> tuple[Blob, StoredBlob | ChunkId | None]:
        """Decode a blob and compare; return it with what it is a delta of: a copy, or a blob given before."""
        blob, offer, before = item
        if offer is None:
            return blob, None  # given twice: the first was checked
        if blob.base is None:
            self._check(blob, None)
            return blob, None
        for copy in (offer.base, offer.companion):
            if isinstance(copy, StoredBlob) and copy.row.chunk == blob.base:
                self._check(blob, self._decoded(copy))
                return blob, copy
        if offer.companion != blob.base or before is None or (before.blob.base is None) != (before.base is None):
            raise InvalidInputError("a delta was made against another base than the one offered", kind="wrong_base")
        self._check(blob, self._decoded_given(before))
        return blob, blob.base

    def _decoded_given(self, given: _Given) -> Buffer:
        blob = given.blob
        out = bytearray(blob.decoded_nbytes)
        self._check(blob, None if given.base is None else self._decoded(given.base), out)
        return out

    def _check(self, blob: Blob, base: Buffer | None, out: bytearray | None = None) -> None:
        try:
            check_blob(blob, base, out)
        except CorruptionError as error:  # nothing stored is damaged: it is what was handed in that is wrong
            raise InvalidInputError(
                f"a blob is not what it is said to be, and was not stored: {error}", kind="wrong_blob"
            ) from error

    def _note_pack(self, name: str, chunks: Iterable[ChunkId]) -> None:
        self._packs.update(dict.fromkeys(chunks, name))

    def _beat_if_due(self) -> None:
        if time.monotonic() < self._next_beat:
            return
        self._store.objects.put_if_absent(session_name(self.id, self._beats), [b""])
        self._beats += 1
        self._next_beat = time.monotonic() + HEARTBEAT_S

    def abandon(self) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`. No entry names these packs, and none ever will."""
        with suppress(LamellaError):
            self._writer.wait()
        for name in self._writer.written:
            with suppress(LamellaError):
                self._store.objects.delete(name)

    # -- commit -------------------------------------------------------------------------------------------------------

    def commit(self, description: Description) -> Recorded:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        if self._wanted:
            raise InvalidInputError(f"{len(self._wanted)} chunks were never written", kind="incomplete_push")
        if (description.model, description.push) != (self.model, self.id):
            raise InvalidInputError("a version names the model and the push that it belongs to", kind="wrong_push")
        if description.parents != tuple(parent.id for parent in self.parents):
            raise InvalidInputError("a version's parents are those that its push began with", kind="wrong_parents")
        self._writer.finish()
        self._store.packs.learn(self._writer.written.values())
        data = encode_description(description)
        packs, manifest_runs, cell_runs = self._located(description)
        equal: list[VersionAdded] = []
        added: list[tuple[VersionAdded, bytes]] = []

        def make(state: State) -> Change | None:
            equal.clear()
            head = state.ref(self.model, self._branch)
            self._check_head(state, head)
            if head is not None and (same := self._same_as_head(state, head, description)) is not None:
                equal.append(same)
                return None
            self._check_live(state, packs)
            number = state.last_number(self.model) + 1
            if not added or added[-1][0].number != number:
                locator = Locator(
                    number=number,
                    parents=tuple((parent.model, parent.number) for parent in self.parents),
                    packs=packs,
                    manifest_runs=manifest_runs,
                    cell_runs=cell_runs,
                )
                added.append(self._write_metadata(data, locator, description))
            return Change(
                refs=(RefChange(self.model, self._branch, "branch", head.number if head else None, number),),
                versions=(added[-1][0],),
                packs=tuple(
                    PackAdded(ref.name, ref.nbytes, VERIFIED_BY_STORE) for ref in self._writer.written.values()
                ),
            )

        state = self._store.log.commit(self.id, make)
        if equal:
            return self._store.reader.open_added(equal[0]).recorded
        if not added:  # an earlier call with this push id has committed it already
            return self._store.reader.open(version_id(data)).recorded
        self._tell_index()
        for version, metadata in added:
            if state.version(version.model, version.number) == version:
                return self._store.reader.adopt(version, metadata).recorded
        raise CorruptionError("a commit went through, but its version is not in the log", kind="broken_log")

    def _tell_index(self) -> None:
        """Tell the chunk index of this push's packs. It is derived, so nothing that happens here can fail the push."""
        try:
            for name in self._writer.written:
                self._store.index.add(name, self._store.packs.index(name).chunks)
        except LamellaError as error:
            logger.warning("a pack is not known to the chunk index yet: %s", error)

    def _check_head(self, state: State, head: Ref | None) -> None:
        if head is not None and head.kind != "branch":
            raise AlreadyExistsError(
                f"{self.model}@{self._branch} is a {head.kind}: push to a branch", kind="not_a_branch"
            )
        if head != self._head:
            expected, actual = (self._name(state, ref) for ref in (self._head, head))
            raise ConflictError(
                f"{self.model}@{self._branch} moved while this push ran: it is at {actual or 'nothing'}, not at "
                f"{expected or 'nothing'}; look at it, then push again",
                expected=expected,
                actual=actual,
            )

    def _name(self, state: State, ref: Ref | None) -> VersionId | None:
        version = None if ref is None else state.version(self.model, ref.number)
        return None if version is None else version.id

    def _same_as_head(self, state: State, head: Ref, description: Description) -> VersionAdded | None:
        row = state.version(self.model, head.number)
        assert row is not None
        there = self._store.reader.open_added(row).recorded.description
        same = (
            there.parameters_id == description.parameters_id
            and there.attachments == description.attachments
            and there.message == description.message
            # compared as stored, so that NaN equals NaN and a tuple equals the list it was stored as
            and _as_stored(there.recipe) == _as_stored(description.recipe)
            and _as_stored(there.metrics) == _as_stored(description.metrics)
        )
        return row if same else None

    def _check_live(self, state: State, packs: Iterable[PackRef]) -> None:
        for pack in packs:
            if pack.name not in self._writer.written and not _serves_all(state, pack.name):
                raise ConflictError(
                    f"{pack.name}, which this version stands on, was condemned while the push ran: push again",
                    kind="pack_not_live",
                    object=pack.name,
                )

    def _write_metadata(self, line: bytes, locator: Locator, description: Description) -> tuple[VersionAdded, bytes]:
        data = encode_metadata(line, locator)
        name = metadata_name(version_id(line), self.id, self._attempt)
        self._attempt += 1
        self._store.objects.put_if_absent(name, [data])
        added = VersionAdded(
            self.model, locator.number, name, len(data), digest(Context.METADATA, data), description.decoded_nbytes
        )
        return added, data

    def _located(
        self, description: Description
    ) -> tuple[tuple[PackRef, ...], tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """Return the packs of the closure, and the runs of manifest chunks and cells over them."""
        numbers: dict[str, int] = {}
        closure: set[tuple[ChunkId, str]] = set()

        def number_of(pack: str) -> int:
            return numbers.setdefault(pack, len(numbers))

        def pack_name(chunk: ChunkId) -> str:
            pack = self._packs.get(chunk)
            if not pack:
                raise InvalidInputError(
                    f"the version names chunk {chunk.hex()[:12]}, which was never planned", kind="unplanned_chunk"
                )
            return pack

        def pack_of(chunk: ChunkId) -> int:
            pack = pack_name(chunk)
            closure.add((chunk, pack))
            return number_of(pack)

        def load(place: int) -> bytes:
            chunk, nbytes = description.manifest_chunks[place]
            return bytes(self._store.reader.decoded(self._store.packs.find(chunk, [pack_name(chunk)]), nbytes))

        manifest_runs = _runs(pack_of(chunk) for chunk, _ in description.manifest_chunks)
        manifest = Manifest(description, load)
        manifest.check()
        cell_runs = _runs(None if row.chunk is None else pack_of(row.chunk) for row in manifest.all_rows())
        for chunk, pack in sorted(closure, key=itemgetter(1)):  # pack by pack, so that each index is parsed once
            for link in self._store.reader.chain(self._store.packs.find(chunk, [pack])):
                number_of(link.pack)
        refs = [self._store.packs.ref(name) for name in numbers]
        return tuple(refs), manifest_runs, cell_runs


def _remember(latest: "OrderedDict[Key, Value]", key: Key, value: Value) -> None:
    """Keep as many of the latest as may be companions of the next."""
    latest[key] = value
    if len(latest) > COMPANION_REACH:
        latest.popitem(last=False)


def _runs(numbers: Iterable[int | None]) -> tuple[tuple[int, int], ...]:
    """Join equal neighbours into (count, number); None joins whatever is before it."""

    def filled() -> Iterator[int]:
        last = 0
        for number in numbers:
            last = last if number is None else number
            yield last

    return tuple((sum(1 for _ in run), number) for number, run in groupby(filled()))


def _serves_all(state: State, pack: str) -> bool:
    """Whether a pack is live and may serve any push: not one that only its writer has verified so far."""
    row = state.pack(pack)
    return row is not None and row.verifier == VERIFIED_BY_STORE


def _as_stored(value: object) -> bytes:
    return canonical.dumps(value)
