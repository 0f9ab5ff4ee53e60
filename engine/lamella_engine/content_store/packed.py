"""The content store on objects: packs, metadata objects and the log."""

import logging
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from lamella_engine.chunk_index import ChunkIndex
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.committing import Change
from lamella_engine.content_store.log import DEFAULT_MAX_DEPTH, Log
from lamella_engine.content_store.manifest import Manifest
from lamella_engine.content_store.packs import Packs
from lamella_engine.content_store.push import PackedPush, PushContext
from lamella_engine.content_store.reader import OpenVersion, PackedReader
from lamella_engine.content_store.revisions import Revision, parse_revision
from lamella_engine.content_store.seam import Reading, Recorded, RefUpdate, Stored
from lamella_engine.content_store.state import State
from lamella_engine.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    InvalidInputError,
    PermissionDeniedError,
    RefNotFoundError,
    VersionNotFoundError,
)
from lamella_engine.executor import Executor
from lamella_engine.format.entry import VERIFIED_BY_STORE, VERIFIED_BY_WRITER, PackAdded, RefChange, VersionAdded
from lamella_engine.model import Cell, ChunkId, PushId, RefInfo, VersionId, check_name, check_ref_name
from lamella_engine.objects import Objects
from lamella_engine.objects.probe import probe
from lamella_engine.signing import Signer

logger = logging.getLogger("lamella")

# So many of the newest packs (and all that the parent stands on) are looked at before a push, and the indexes of
# those that other processes wrote are read for the sake of deduplication. One costs about a millisecond; what lies
# further back and is unknown is only stored again.
INDEX_CATCH_UP = 64

# So many packs, some 130 bytes each, are named by one entry.
_VOUCHED_AT_ONCE = 10_000

WATCH_S = 1.0
"""How often whoever follows a ref looks at the log: a listing of it."""


class PackedStore:
    """See :class:`~lamella_engine.content_store.seam.ContentStore`. One that nobody holds any more has no file open.

    Parameters
    ----------
    objects
        Where the repository lies.
    executor
        Runs what is done for each chunk.
    index_path
        File of the chunk index; None keeps it in memory.
    signer, trusted
        See :class:`~lamella_engine.content_store.log.Log`.
    """

    vouches = True

    def __init__(
        self,
        objects: Objects,
        executor: Executor,
        *,
        index_path: Path | None = None,
        signer: Signer | None = None,
        trusted: Iterable[bytes] = (),
    ) -> None:
        self.objects = objects
        self.executor = executor
        self.log = Log(objects, signer=signer, trusted=trusted)
        self._own_key = () if signer is None else (signer.public,)
        self.packs = Packs(objects, partial(_row_of, self.log))  # no method: nothing here holds the store itself
        self.reader = PackedReader(objects, self.log, self.packs, executor)
        self._index = ChunkIndex(index_path)
        weakref.finalize(self, self._index.close)
        self._probed = False

    @classmethod
    def create(
        cls,
        objects: Objects,
        executor: Executor,
        *,
        index_path: Path | None = None,
        max_depth: int = DEFAULT_MAX_DEPTH,
        signer: Signer | None = None,
    ) -> "PackedStore":
        """Make a repository.

        Raises AlreadyExistsError if there is one, StorageError if the place does not keep what Objects promises.
        """
        probe(objects)
        Log.create(objects, max_depth=max_depth)
        store = cls(objects, executor, index_path=index_path, signer=signer)
        store._probed = True
        return store

    def close(self) -> None:
        """Release what is held. Idempotent."""
        self._index.close()
        self.executor.close()
        self.objects.close()

    # -- versions -----------------------------------------------------------------------------------------------------

    def resolve(self, revision: str) -> VersionId:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        parsed = parse_revision(revision)
        state = self.log.refresh()
        added = self._named(state, parsed)
        id = self.reader.remember(added)
        for _ in range(parsed.ancestors):
            parents = self.reader.open(id).recorded.parents
            if not parents:
                raise VersionNotFoundError(
                    f"{revision} goes back past the first version: log shows how many there are", revision=revision
                )
            row = state.version(parents[0].model, parents[0].number)
            if row is None or row.id != parents[0].id:
                raise _lost_parent(id)
            id = self.reader.remember(row)
        return id

    def _named(self, state: State, revision: Revision) -> VersionAdded:
        model = revision.model
        if revision.id_prefix is not None:
            return self.reader.find(revision.id_prefix, model=model)
        assert model is not None
        if revision.best is not None:
            return self._best(state, model, revision.best)
        number = revision.number
        if revision.latest:
            number = state.last_number(model)
        if revision.ref is not None:
            ref = state.ref(model, revision.ref)
            if ref is None:
                raise _no_ref(state, model, revision.ref)
            number = ref.number
        assert number is not None
        added = state.version(model, number)
        if added is None and revision.ref is not None:
            raise CorruptionError(
                f"{model}@{revision.ref} stands at v{number}, which is not there", kind="missing_version"
            )
        if added is None:
            last = state.last_number(model)
            raise VersionNotFoundError(
                _no_model(state, model) or f"there is no {model}@v{number}: its versions are v1 to v{last}",
                model=model,
                number=number,
            )
        return added

    def _best(self, state: State, model: str, metric: str) -> VersionAdded:
        """Return the version with the greatest ``metric``, the newest of several.

        Reads the metadata of every version of the model.
        """
        best: tuple[float, VersionAdded] | None = None
        for added in state.versions(model):
            # NaN, which does not equal itself, is never the best; a metric may be an int of any size, so no math.isnan.
            value = self.reader.open_added(added).recorded.description.metrics.get(metric)
            if value is not None and value == value and (best is None or value >= best[0]):
                best = value, added
        if best is None:
            raise VersionNotFoundError(
                f"no version of {model} has the metric {metric!r}: see show for those it has",
                model=model,
                metric=metric,
            )
        return best[1]

    def version(self, id: VersionId) -> Recorded:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        return self.reader.open(id).recorded

    def ancestors(self, id: VersionId) -> Iterator[Recorded]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        recorded = self.reader.open(id).recorded
        yield recorded
        while recorded.parents:
            parent = recorded.parents[0]
            row = self.log.state.version(parent.model, parent.number)
            if row is None or row.id != parent.id:
                raise _lost_parent(recorded.id)
            recorded = self.reader.open_added(row).recorded
            yield recorded

    def manifest(self, id: VersionId) -> Manifest:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        return self.reader.open(id).manifest

    def models(self) -> list[str]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        return self.log.refresh().models()

    def refs(self, model: str) -> list[RefInfo]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        return [RefInfo(model, name, ref.kind, ref.number) for name, ref in self.log.refresh().refs(model)]

    def watch(self, model: str, ref: str, after: int) -> Iterator[Recorded]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`. Looks at the log every second."""
        check_name(model, what="model")
        check_ref_name(ref)
        while True:
            state = self.log.refresh()
            at = state.ref(model, ref)
            if at is None:
                raise _no_ref(state, model, ref)
            added = state.version(model, at.number)
            if added is not None and at.number != after:
                after = at.number
                yield self.reader.open_added(added).recorded
            else:
                time.sleep(WATCH_S)

    def read(
        self,
        id: VersionId,
        cells: Iterable[Cell],
        have: VersionId | None = None,
        *,
        held: Mapping[Cell, ChunkId] = MappingProxyType({}),
    ) -> Iterator[Reading]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`.

        ``held`` names, for some cells, a chunk that the caller holds, in addition to those of ``have``. It is looked at
        when a cell is.
        """
        return self.reader.read(id, cells, have, held)

    def locate(self, id: VersionId, cells: Iterable[Cell]) -> Iterator[tuple[Cell, tuple[Stored, ...]]]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        return self.reader.locate(id, cells)

    # -- changes ------------------------------------------------------------------------------------------------------

    def begin(
        self,
        model: str,
        branch: str,
        *,
        parent: VersionId | None,
        push_id: PushId,
        part: bool = False,
        writer_id: PushId | None = None,
    ) -> PackedPush:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`; ``writer_id`` is explained at PackedPush."""
        check_name(model, what="model")
        check_ref_name(branch)
        self._probe_once()
        state = self.log.refresh()
        head = state.ref(model, branch)
        if head is not None and head.kind != "branch":
            raise AlreadyExistsError(f"{model}@{branch} is a {head.kind}: push to a branch", kind="not_a_branch")
        at = None if head is None else state.version(model, head.number)
        if head is not None and at is None:
            raise CorruptionError(
                f"{model}@{branch} stands at a version that is not in the log", kind="missing_version"
            )
        if parent is not None and at is not None and parent != at.id:
            raise ConflictError(
                f"{model}@{branch} is at v{at.number} ({at.id[:12]}), not at the parent given ({parent[:12]}): look at "
                "it, then push again",
                expected=parent,
                actual=at.id,
            )
        opened = None
        if at is not None:
            opened = self.reader.open_added(at)
        elif parent is not None:
            opened = self.reader.open(parent)
        self._catch_up(state, None if part else opened)  # a thousand ranks would read a thousand times what one does
        context = PushContext(self.objects, self.executor, self.log, self.packs, self.reader, self._index)
        return PackedPush(
            context,
            model=model,
            branch=branch,
            push_id=push_id,
            writer_id=writer_id or push_id,
            state=state,
            head=head,
            parent=opened,
        )

    def pushed(self, push_id: PushId) -> Recorded | None:
        """Return the version that a push recorded; None if it has not, or found its branch's head to be equal."""
        number = self.log.refresh().committed_at(push_id)
        added = () if number is None else self.log.entry(number).versions
        found = (self.reader.open_added(version).recorded for version in added)
        return next((version for version in found if version.description.push == push_id), None)

    def _probe_once(self) -> None:
        if not self._probed:
            probe(self.objects)
            self._probed = True

    def _catch_up(self, state: State, parent: OpenVersion | None) -> None:
        """Tell the chunk index of those of the newest packs, and of the parent's packs, that it does not know."""
        wanted = {pack.name for pack in islice(state.newest_packs(), INDEX_CATCH_UP)}
        if parent is not None:
            wanted |= {name for pack in parent.locator.packs for name in state.where_is(pack.name)}
        for name in sorted(wanted - self._index.known(wanted)):
            if state.pack(name) is None:
                continue
            try:
                self._index.add(name, self.packs.index(name).chunks)
            except CorruptionError as error:  # whoever needs that pack will be told
                logger.warning("a pack cannot be used for deduplication: %s", error)

    def update_refs(self, updates: Sequence[RefUpdate]) -> None:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        for update in updates:
            check_name(update.model, what="model")
            check_ref_name(update.name)
        if len({(update.model, update.name) for update in updates}) != len(updates):
            raise InvalidInputError("a ref can be set once at a time", kind="ref_twice")
        self._probe_once()

        def make(state: State) -> Change | None:
            changes = tuple(change for update in updates if (change := _ref_change(state, update)) is not None)
            return Change(refs=changes) if changes else None

        self.log.commit(new_push_id(), make)

    def vouch(self, packs: Sequence[str]) -> int:
        """Record that every blob of ``packs`` is right, which nobody but their writers had decoded; return how many.

        Any push may stand on them from then on. Those of which the log says so already, or that are not live any more,
        are left as they are.
        """
        vouched = 0
        for some in (packs[at : at + _VOUCHED_AT_ONCE] for at in range(0, len(packs), _VOUCHED_AT_ONCE)):
            added: tuple[PackAdded, ...] = ()

            def make(state: State, some: Sequence[str] = some) -> Change | None:
                nonlocal added
                rows = (state.pack(name) for name in some)
                doubtful = (row for row in rows if row is not None and row.verifier == VERIFIED_BY_WRITER)
                added = tuple(replace(row, verifier=VERIFIED_BY_STORE) for row in doubtful)
                return Change(packs=added) if added else None

            self.log.commit(new_push_id(), make)
            vouched += len(added)
        return vouched

    def require_signed(self, keys: Sequence[bytes] = ()) -> tuple[bytes, ...]:
        """Have every entry from now on be signed by one of ``keys``, or by this store's own; return the keys.

        Raises what :meth:`~lamella_engine.content_store.log.Log.require_signed` does, and PermissionDeniedError
        (``no_signing_key``) if there is no key at all.
        """
        listed = tuple(keys) or self._own_key
        if not listed:
            raise PermissionDeniedError(
                "who requires signatures has to sign: open the repository with a key that keygen made",
                kind="no_signing_key",
            )
        self._probe_once()
        return self.log.require_signed(listed).signers


def _row_of(log: Log, pack: str) -> PackAdded | None:
    return log.state.pack(pack)


def _lost_parent(id: VersionId) -> CorruptionError:
    return CorruptionError(f"the parent of version {id[:12]} is not in the log", kind="missing_version")


def _no_ref(state: State, model: str, ref: str) -> RefNotFoundError:
    said = _no_model(state, model) or f"there is no {model}@{ref}: log {model} shows its refs; a number is {model}@v1"
    return RefNotFoundError(said, model=model, ref=ref)


def _no_model(state: State, model: str) -> str:
    """Return what to say if there is no such model; nothing if there is."""
    if state.last_number(model):
        return ""
    models = state.models()
    near = get_close_matches(model, models, n=1)
    advice = (
        f"did you mean {near[0]}?" if near else f"there are {', '.join(models[:5])}" if models else "push one first"
    )
    return f"there is no model {model}: {advice}"


def _ref_change(state: State, update: RefUpdate) -> RefChange | None:
    """Return what an update changes now, or None if the ref stands as it should already."""
    at = state.ref(update.model, update.name)
    name = f"{update.model}@{update.name}"
    if at is None and update.number is None:
        raise RefNotFoundError(f"there is no {name}", model=update.model, ref=update.name)
    if update.number is not None:
        if state.version(update.model, update.number) is None:
            raise VersionNotFoundError(f"there is no {update.model}@v{update.number}")
        if at is not None and at.kind != update.kind:
            raise AlreadyExistsError(f"{name} is a {at.kind}: choose another name", kind="ref_of_another_kind")
        if at is not None and at.number == update.number:
            return None
        if at is not None and at.kind == "tag":
            raise AlreadyExistsError(
                f"the tag {name} stands at v{at.number}, and tags never move: choose another name, or delete it first",
                kind="tag_exists",
            )
    kind = update.kind if at is None else at.kind
    return RefChange(update.model, update.name, kind, None if at is None else at.number, update.number)
