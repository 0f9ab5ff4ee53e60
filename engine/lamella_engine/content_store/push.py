"""A push into objects: what is missing, packs for it, and the one entry that makes it a version."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from lamella_engine.chunk_index import ChunkIndex
from lamella_engine.content_store.bases import Bases, serves_all
from lamella_engine.content_store.committing import Change
from lamella_engine.content_store.incoming import IncomingPacks
from lamella_engine.content_store.intake import Intake
from lamella_engine.content_store.locating import locate
from lamella_engine.content_store.log import Log
from lamella_engine.content_store.manifest import Manifest
from lamella_engine.content_store.packing import ClosedPack, Described, PackWriter
from lamella_engine.content_store.packs import Packs, StoredBlob
from lamella_engine.content_store.reader import OpenVersion, PackedReader
from lamella_engine.content_store.seam import Blob, Missing, Parent, Planned, Recorded
from lamella_engine.content_store.state import Ref, State
from lamella_engine.errors import AlreadyExistsError, ConflictError, CorruptionError, InvalidInputError, LamellaError
from lamella_engine.executor import Executor
from lamella_engine.format import canonical
from lamella_engine.format.digests import Context, digest
from lamella_engine.format.entry import VERIFIED_BY_STORE, VERIFIED_BY_WRITER, PackAdded, RefChange, VersionAdded
from lamella_engine.format.names import metadata_name, parse_pack_name, session_name
from lamella_engine.format.version import Description, Locator, PackRef, encode_description, encode_metadata, version_id
from lamella_engine.model import Buffer, ChunkId, PushId, VersionId
from lamella_engine.objects import Objects
from lamella_engine.sketches import Sketch

logger = logging.getLogger("lamella")

HEARTBEAT_S = 60.0
"""A push that lives longer shows that it does by a session object, one every minute, so that its packs are not
swept."""


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
    writer_id
        In the names of what is written. Not the push's own id where that may be under way in several places: what one
        of them gives up must not be what another commits.
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
        writer_id: PushId,
        state: State,
        head: Ref | None,
        parent: OpenVersion | None,
    ) -> None:
        self._store = context
        self.model = model
        self.branch = branch
        self.id = push_id
        self._writer_id = writer_id
        self._head = head
        recorded = None if parent is None else parent.recorded
        self.parents: tuple[Parent, ...] = ()
        if recorded is not None:
            self.parents = (Parent(recorded.id, recorded.model, recorded.number),)
        self._bases = Bases(
            state,
            model=model,
            parent=parent,
            reader=context.reader,
            packs=context.packs,
            index=context.index,
        )
        numbers = count()
        self._writer = PackWriter(context.objects, context.executor, writer_id, self._note_pack, numbers)
        self._incoming = IncomingPacks(context.objects, context.packs, writer_id, numbers)
        self._packs: dict[ChunkId, str] = {}
        """The pack that holds each chunk planned so far; "" for one that this push has yet to store."""
        self._intake = Intake(self._bases, context.executor)
        self._joined: dict[str, PackRef] = {}
        """The packs that parts have written, by name."""
        self._joined_undecoded: set[str] = set()
        """Those of them that only their writers have decoded."""
        self._joined_packs: set[str] = set()
        """Names of these, and of those that parts have found live."""
        self._part: bytes | None = None
        """What it ended as: then what is written belongs to another push."""
        self._next_beat = time.monotonic() + HEARTBEAT_S
        self._beats = 0
        self._attempt = 0

    # -- plan ---------------------------------------------------------------------------------------------------------

    def consider(self, sketch: Sketch) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        self._bases.consider(sketch)

    def plan(self, cells: Iterable[Planned]) -> Iterator[Missing | None]:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        for cell, chunk, beside, _ in cells:
            self._beat_if_due()
            if chunk in self._packs:
                yield None
                continue
            base = self._bases.at(cell)
            copy = base if base is not None and base.row.chunk == chunk else self._bases.find_live(chunk)
            self._packs[chunk] = "" if copy is None else copy.pack
            self._bases.note(cell, chunk if copy is None else copy)
            if copy is not None:
                yield None
                continue
            offer = self._bases.offer(base, beside)
            self._intake.ask(chunk, offer)
            yield Missing(cell, chunk, _chunk_of(offer.base), _chunk_of(offer.companion))

    # -- write --------------------------------------------------------------------------------------------------------

    def base(self, missing: Missing) -> Buffer:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        return self._intake.base(missing.chunk)

    def keep(self, blob: Blob, data: Buffer) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`. Here everything is near."""

    def write(self, blobs: Iterable[Blob]) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        for blob, base in self._intake.checked(blobs, self._packs):
            self._writer.add(blob, base=base)

    @property
    def filled_nbytes(self) -> int:
        """Bytes held of the pack that is being filled."""
        return self._writer.filled_nbytes

    def close_pack(self) -> None:
        """Take the pack that is being filled for full: its memory is wanted for something else."""
        self._writer.close_pack()

    def grant(self, blobs: Sequence[Described]) -> ClosedPack:
        """Make a pack of blobs that whoever asks has, in this order, and will put into the bucket without our help.

        They count as written; nobody has decoded them, so that no other push may stand on them until somebody has.

        Raises InvalidInputError as :meth:`write` does, as far as that shows without a payload.
        """
        granted = self._incoming.grant(self._intake.described(blobs))
        self._note_pack(granted.ref.name, granted.chunks)
        return granted

    def put_url(self, granted: ClosedPack) -> str:
        """Return a URL at which the bytes of a granted pack may be put for a while. It is a secret."""
        return self._incoming.put_url(granted)

    def arrived(self, packs: int) -> None:
        """Take over so many of the packs that were granted, the first ones: they have been put where they were to."""
        self._incoming.take(packs)

    @property
    def is_doubtful(self) -> bool:
        """Whether nobody but their writers has decoded some of its packs."""
        return bool(self._undecoded)

    def finish(self) -> None:
        """Return when all packs are written, as :meth:`commit` does first.

        Raises InvalidInputError (``not_uploaded``) if one that was granted is not there, or not what was described.
        """
        self._writer.finish()
        self._incoming.finish()

    def _note_pack(self, name: str, chunks: Iterable[ChunkId]) -> None:
        self._packs.update(dict.fromkeys(chunks, name))

    def _beat_if_due(self) -> None:
        if time.monotonic() < self._next_beat:
            return
        self._store.objects.put_if_absent(session_name(self._writer_id, self._beats), [b""])
        self._beats += 1
        self._next_beat = time.monotonic() + HEARTBEAT_S

    # -- parts --------------------------------------------------------------------------------------------------------

    def part(self) -> bytes:
        """See :class:`~lamella_engine.content_store.seam.Push`. Names packs: those written, and those found live."""
        if self._part is None:
            self._check_complete()
            self.finish()
            written = self._written
            self._part = canonical.dumps(
                {
                    "written": [[ref.name, ref.nbytes, ref.index_nbytes] for ref in written.values()],
                    "undecoded": sorted(self._undecoded),
                    "live": sorted({name for name in self._packs.values() if name not in written}),
                }
            )
            self._packs.clear()
        return self._part

    def join(self, part: bytes) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        written, undecoded, live = _parse_part(part)
        self._store.packs.learn(written)
        self._joined_undecoded.update(undecoded)
        self._joined.update((ref.name, ref) for ref in written)
        self._store.log.refresh()  # the part may have found what was recorded since this push began
        names = [name for name in (*live, *(ref.name for ref in written)) if name not in self._joined_packs]
        try:
            indexes = list(self._store.executor.map(self._store.packs.index, names))
        except CorruptionError as error:
            if error.kind != "missing_pack":
                raise
            raise ConflictError(
                f"{error.context['object']}, which a part stands on, was condemned while the push ran: push again",
                kind="pack_not_live",
            ) from error
        for name, index in zip(names, indexes, strict=True):
            self._packs.update(dict.fromkeys(index.chunks, name))
        self._joined_packs.update(names)

    @property
    def _written(self) -> dict[str, PackRef]:
        """The packs of this push and its parts, by name."""
        return self._joined | self._writer.written | self._incoming.written

    @property
    def _undecoded(self) -> set[str]:
        """Names of those of them that only their writers have decoded."""
        return self._joined_undecoded.union(self._incoming.written)

    # -- the end ------------------------------------------------------------------------------------------------------

    def restart(self, error: LamellaError) -> bool:
        """See :class:`~lamella_engine.content_store.seam.Push`. What this push knows lives as long as itself."""
        return False

    def abandon(self) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`. No entry names these packs, and none ever will."""
        if self._part is not None:
            return
        with suppress(LamellaError):
            self._writer.wait()
        for name in self._writer.written:
            with suppress(LamellaError):
                self._store.objects.delete(name)
        self._incoming.discard()

    # -- commit -------------------------------------------------------------------------------------------------------

    def commit(
        self, description: Description, *, check: Callable[[Manifest], None] = lambda manifest: None
    ) -> Recorded:
        """See :class:`~lamella_engine.content_store.seam.Push`; ``check`` as for :func:`locate`."""
        self._check_complete()
        if self._part is not None:
            raise InvalidInputError("this push has ended as a part of another one: begin another", kind="push_over")
        if (description.model, description.push) != (self.model, self.id):
            raise InvalidInputError("a version names the model and the push that it belongs to", kind="wrong_push")
        if description.parents != tuple(parent.id for parent in self.parents):
            raise InvalidInputError("a version's parents are those that its push began with", kind="wrong_parents")
        self.finish()
        written, undecoded = self._written, self._undecoded
        self._store.packs.learn(written.values())
        data = encode_description(description)
        located = locate(description, self._pack_of, self._store.packs, self._store.reader, check)
        equal: list[VersionAdded] = []
        added: list[tuple[VersionAdded, bytes]] = []

        def make(state: State) -> Change | None:
            equal.clear()
            head = state.ref(self.model, self.branch)
            self._check_head(state, head)
            if head is not None and (same := self._same_as_head(state, head, description)) is not None:
                equal.append(same)
                return None
            self._check_live(state, located.packs)
            number = state.last_number(self.model) + 1
            if not added or added[-1][0].number != number:
                locator = Locator(
                    number=number,
                    parents=tuple((parent.model, parent.number) for parent in self.parents),
                    packs=located.packs,
                    manifest_runs=located.manifest_runs,
                    cell_runs=located.cell_runs,
                    doubtful=tuple(
                        at
                        for at, pack in enumerate(located.packs)
                        if pack.name in undecoded and not serves_all(state, pack.name)
                    ),
                )
                added.append(self._metadata(data, locator, description))
            version, metadata = added[-1]
            return Change(
                refs=(RefChange(self.model, self.branch, "branch", head.number if head else None, number),),
                versions=(version,),
                packs=tuple(
                    PackAdded(ref.name, ref.nbytes, VERIFIED_BY_WRITER if ref.name in undecoded else VERIFIED_BY_STORE)
                    for ref in written.values()
                    if state.pack(ref.name) is None and not state.was_taken_away(ref.name)
                ),
                objects=((version.metadata, metadata),),
            )

        writer = None if self._writer_id == self.id else self._writer_id
        state = self._store.log.commit(self.id, make, writer=writer)
        if equal:
            return self._store.reader.open_added(equal[0]).recorded
        for version, metadata in added:
            if state.version(version.model, version.number) == version:
                self._tell_index()
                return self._store.reader.adopt(version, metadata).recorded
        # Another call with this push id has committed it.
        return self._store.reader.open(version_id(data)).recorded

    def _check_complete(self) -> None:
        if self._intake.outstanding:
            raise InvalidInputError(f"{self._intake.outstanding} chunks were never written", kind="incomplete_push")

    def _tell_index(self) -> None:
        """Tell the chunk index of this push's packs. It is derived, so nothing that happens here can fail the push."""
        try:
            for name in self._written:
                self._store.index.add(name, self._store.packs.index(name).chunks)
        except LamellaError as error:
            logger.warning("a pack is not known to the chunk index yet: %s", error)

    def _check_head(self, state: State, head: Ref | None) -> None:
        if head is not None and head.kind != "branch":
            raise AlreadyExistsError(
                f"{self.model}@{self.branch} is a {head.kind}: push to a branch", kind="not_a_branch"
            )
        if head != self._head:
            expected, actual = (self._name(state, ref) for ref in (self._head, head))
            raise ConflictError(
                f"{self.model}@{self.branch} moved while this push ran: it is at {actual or 'nothing'}, not at "
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
        opened = self._store.reader.open_added(row)
        there = opened.recorded.description
        # Nobody knows that a doubtful pack holds what its writer said: what was pushed now may be all that there is.
        packs = (name for pack in opened.locator.packs for name in state.where_is(pack.name))
        same = (
            there.parameters_id == description.parameters_id
            and there.attachments == description.attachments
            and there.message == description.message
            # compared as stored, so that NaN equals NaN and a tuple equals the list it was stored as
            and _as_stored(there.recipe) == _as_stored(description.recipe)
            and _as_stored(there.metrics) == _as_stored(description.metrics)
            and all(serves_all(state, name) for name in packs)
        )
        return row if same else None

    def _check_live(self, state: State, packs: Iterable[PackRef]) -> None:
        written = self._written
        for pack in packs:
            fresh = pack.name in written and not state.was_taken_away(pack.name)  # another push may have joined it
            if not fresh and not serves_all(state, pack.name):
                raise ConflictError(
                    f"{pack.name}, which this version stands on, was condemned while the push ran: push again",
                    kind="pack_not_live",
                    object=pack.name,
                )

    def _metadata(self, line: bytes, locator: Locator, description: Description) -> tuple[VersionAdded, bytes]:
        data = encode_metadata(line, locator)
        name = metadata_name(version_id(line), self._writer_id, self._attempt)
        self._attempt += 1
        added = VersionAdded(
            self.model, locator.number, name, len(data), digest(Context.METADATA, data), description.decoded_nbytes
        )
        return added, data

    def _pack_of(self, chunk: ChunkId) -> str:
        pack = self._packs.get(chunk)
        if not pack:
            raise InvalidInputError(
                f"the version names chunk {chunk.hex()[:12]}, which was never planned", kind="unplanned_chunk"
            )
        return pack


class _Receipt(NamedTuple):
    """What a part stands on."""

    written: list[PackRef]
    """Packs of its own."""
    undecoded: list[str]
    """Names of those of them that only their writer has decoded."""
    live: list[str]
    """Names of packs that others wrote."""


def _parse_part(part: bytes) -> _Receipt:
    """Return what a part stands on; raises InvalidInputError."""
    try:
        fields = canonical.loads(part, what="a part of a push")
        written = [
            PackRef(str(name), int(nbytes), int(index_nbytes)) for name, nbytes, index_nbytes in fields["written"]
        ]
        undecoded, live = ([str(name) for name in fields[field]] for field in ("undecoded", "live"))
        for name in (*live, *(ref.name for ref in written)):
            parse_pack_name(name)
    except (CorruptionError, LookupError, TypeError, ValueError) as error:
        raise InvalidInputError("this is no part of a push to this repository", kind="bad_part") from error
    return _Receipt(written, undecoded, live)


def _chunk_of(base: StoredBlob | ChunkId | None) -> ChunkId | None:
    return base.row.chunk if isinstance(base, StoredBlob) else base


def _as_stored(value: object) -> bytes:
    return canonical.dumps(value)
