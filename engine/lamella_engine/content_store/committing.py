"""From a change that somebody wants to an entry that says so, and is there to stay.

Whoever finds an entry being made waits; those who wait are recorded together by the next (see
:mod:`~lamella_engine.content_store.together`).
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TypeAlias

from lamella_engine.content_store.acting import now, principal
from lamella_engine.content_store.entries import Entries, Newest
from lamella_engine.content_store.state import State
from lamella_engine.content_store.together import Together, Waiting
from lamella_engine.content_store.trust import Trust
from lamella_engine.errors import (
    AlreadyExistsError,
    ConflictError,
    LamellaError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    StorageError,
)
from lamella_engine.format.entry import (
    MAX_ENTRY_NBYTES,
    Entry,
    FoldRef,
    PackAdded,
    RefChange,
    VersionAdded,
    encode_entry,
    entry_digest,
)
from lamella_engine.format.names import log_name
from lamella_engine.model import PushId
from lamella_engine.objects import Objects

# Tries of one commit. Each lost race means that somebody else's commit went through, so the repository moves on.
COMMIT_TRIES = 64

# Puts of one entry, as long as answers do not say whether it was written.
UNKNOWN_TRIES = 5

# Commits of one entry, each encoded on its own, add up to at most so much; an entry repeats no more than the principal
# of each, so that it stays below its own limit.
TOGETHER_NBYTES = MAX_ENTRY_NBYTES // 2

# Threads that store what one entry names: a store takes its time for each object, and a disk syncs several at once.
STORE_THREADS = 16


@dataclass(frozen=True, slots=True)
class Change:
    """What a commit wants the next entry to say; the log adds the rest."""

    refs: tuple[RefChange, ...] = ()
    versions: tuple[VersionAdded, ...] = ()
    packs: tuple[PackAdded, ...] = ()
    objects: tuple[tuple[str, bytes], ...] = ()
    """Names and bytes of what the log has to store before an entry may say so."""
    signers: tuple[bytes, ...] = ()
    """Public keys, ascending, that may sign the entries that follow; empty to leave it as it is."""


@dataclass(eq=False, slots=True)
class _Commit:
    """A commit that somebody has asked for."""

    pushes: tuple[PushId, ...]
    """What the entry says that it commits; the first names the commit."""
    make: Callable[[State], Change | None]
    principal: str
    stored: set[str] = field(default_factory=set)
    """Objects of its changes that are in the store already."""
    lost_races: int = 0


_WaitingCommit: TypeAlias = Waiting[_Commit, State]


@dataclass(frozen=True, slots=True)
class _Part:
    """What one commit adds to the entry that is being made."""

    waiting: _WaitingCommit
    change: Change

    @property
    def commit(self) -> _Commit:
        return self.waiting.item


class Committer:
    """Makes the entries of a log. Safe for several threads and processes.

    Parameters
    ----------
    objects
        Hold the log.
    entries
        Know what is in it.
    newest
        Is told of each state that is reached.
    trust
        Signs.
    """

    def __init__(self, objects: Objects, entries: Entries, newest: Newest, trust: Trust) -> None:
        self._objects = objects
        self._entries = entries
        self._newest = newest
        self._trust = trust
        self._together = Together(self._commit_together)
        self._lock = threading.Lock()
        self._audit: dict[str, bytes] = {}
        """Digests of audit segments that the next entry carries."""

    def commit(self, pushes: tuple[PushId, ...], make: Callable[[State], Change | None]) -> State:
        """Return the state after the entry that commits ``pushes``, the first of which names the commit.

        See :meth:`~lamella_engine.content_store.log.Log.commit`.
        """
        return self._together.call(_Commit(pushes, make, principal()))

    def carry(self, segment: str, digest: bytes, *, instead_of: str | None) -> None:
        """Have the next entry carry the digest of an audit segment, which vouches for those before it, as well."""
        with self._lock:
            if instead_of is not None:
                self._audit.pop(instead_of, None)
            self._audit[segment] = digest

    @property
    def carries(self) -> bool:
        """Whether the next entry carries the digest of an audit segment."""
        return bool(self._audit)

    def _commit_together(self, waiting: Sequence[_WaitingCommit]) -> None:
        """Settle the commits that need no entry, and those whose changes the next entry can hold together."""
        parts: list[_Part] = []
        with _failing(waiting):
            state = self._newest.refresh()
            parts = self._parts(state, waiting)
        if not parts or not self._store(parts):
            return
        with _failing([part.waiting for part in parts]):
            entry = self._trust.sign(state, self._entry(state, parts))
            data = encode_entry(entry)
            # Everything that can fail is done before the entry is published: afterwards it has happened.
            after = self._entries.after(state, entry, entry_digest(data))
            self._entries.check_gap(entry.number)
            if not self._publish(entry, data):
                for part in parts:
                    part.commit.lost_races += 1
                    if part.commit.lost_races == COMMIT_TRIES:
                        part.waiting.fail(_contention(part.commit.pushes[0]))
                return
            self._newest.advance(after)
            with self._lock:
                for name in entry.audit:
                    self._audit.pop(name, None)
            for part in parts:
                part.waiting.answer(after)

    def _parts(self, state: State, waiting: Sequence[_WaitingCommit]) -> list[_Part]:
        """Return what one entry after ``state`` can hold, in order; settle the commits that need no entry.

        No ref is named twice, and the changes of each commit are right given those before it. A commit that fails, or
        has nothing to change, because of one before it must wait: that one is not recorded yet.
        """
        parts: list[_Part] = []
        refs: set[tuple[str, str]] = set()
        nbytes = 0
        expected = state
        durable: State | None = None
        for one in waiting:
            try:
                change = _change(one.item, expected)
                if change is None:
                    if not parts:
                        durable = durable or self._durable(state)
                        one.answer(durable)
                    continue
                part = _Part(one, change)
                alone = self._joined(state, None, [part])
                nbytes_with = nbytes + len(encode_entry(alone))
                named = {(ref.model, ref.name) for ref in change.refs}
                if change.signers:
                    named.add(("", "signers"))  # no model has this name
                if parts and (named & refs or nbytes_with > TOGETHER_NBYTES):
                    continue
                expected = expected.after(alone, b"")
            except Exception as error:
                if not parts:
                    one.fail(error)
                continue
            parts.append(part)
            refs |= named
            nbytes = nbytes_with
        return parts

    def _store(self, parts: Sequence[_Part]) -> bool:
        """Store what the entry will name; return whether all of it is there, and fail the commits of which it is not.

        If one is not, the entry has to be made without it, and the numbers of versions may be others then.
        """

        def store(part: _Part) -> None:
            try:
                for name, data in part.change.objects:
                    if name not in part.commit.stored:
                        self._objects.put_if_absent(name, [data])
                        part.commit.stored.add(name)
            except Exception as error:
                part.waiting.fail(error)

        if len(parts) == 1:
            store(parts[0])
        else:
            with ThreadPoolExecutor(min(len(parts), STORE_THREADS), "lamella-log") as threads:
                list(threads.map(store, parts))
        return not any(part.waiting.settled for part in parts)

    def _durable(self, state: State) -> State:
        """Return ``state`` once its newest entry is sure to survive a power cut.

        Another process may have given the entry its name and not have synced it yet. Putting the same bytes again
        tells: AlreadyExists promises an object that is durable.
        """
        if state.number:
            name = log_name(state.number)
            with suppress(AlreadyExistsError):
                self._objects.put_if_absent(name, [self._objects.get(name)])
        return state

    def _publish(self, entry: Entry, data: bytes) -> bool:
        """Put an entry; return whether it is ours and durable, or somebody else's of the same number.

        An answer that does not come is asked for by putting the same bytes again: AlreadyExists promises that the
        object of that name is durable, which reading it would not.
        """
        name = log_name(entry.number)
        push = entry.pushes[0]
        may_land = False
        for _ in range(UNKNOWN_TRIES):
            try:
                self._objects.put_if_absent(name, [data])
            except AlreadyExistsError:
                return may_land and self._is_there(name, data, push)
            except (StorageError, PermissionDeniedError) as error:
                if isinstance(error, StorageError) and error.transient:
                    may_land = True
                    continue
                # Refused outright. If nothing is there and nothing else was sent, it is known to have failed.
                if may_land or self._is_there(name, data, push):
                    raise _unknown(push) from error
                raise
            else:
                return True
        raise _unknown(push)

    def _is_there(self, name: str, data: bytes, push: PushId) -> bool:
        try:
            return self._objects.get(name) == data
        except NotFoundError:
            return False
        except LamellaError as error:
            raise _unknown(push) from error

    def _entry(self, state: State, parts: Sequence[_Part]) -> Entry:
        """Return the whole entry after ``state``, but for its signature; write the fold that it has to name."""
        fold = self._entries.fold(state)
        with self._lock:
            audit = dict(sorted(self._audit.items()))
        return replace(self._joined(state, fold, parts), time=now(), audit=audit)

    def _joined(self, state: State, fold: FoldRef | None, parts: Sequence[_Part]) -> Entry:
        """Return an entry after ``state`` that says what the parts add."""
        acted = [part.commit.principal for part in parts for _ in part.commit.pushes]
        first = list(accumulate((len(part.commit.pushes) for part in parts), initial=0))
        movers = tuple(at for at, part in zip(first, parts, strict=False) for _ in part.change.refs)
        several = len(set(acted)) > 1
        return Entry(
            repository=state.genesis.repository,
            number=state.number + 1,
            previous=state.digest,
            fold=fold,
            refs=tuple(ref for part in parts for ref in part.change.refs),
            versions=tuple(version for part in parts for version in part.change.versions),
            packs=tuple(pack for part in parts for pack in part.change.packs),
            pushes=tuple(push for part in parts for push in part.commit.pushes),
            signers=tuple(key for part in parts for key in part.change.signers),
            principal=acted[0],
            by=tuple(acted) if several else (),
            movers=movers if several else (),
        )


def _change(commit: _Commit, state: State) -> Change | None:
    """Return what a commit changes in ``state``, or None for nothing; raises if it may not be."""
    push = commit.pushes[0]
    if state.committed_at(push) is not None:
        return None
    if any(map(state.is_fenced, commit.pushes)):
        raise ConflictError("this push was fenced off as abandoned: push again", kind="fenced", push_id=push)
    return commit.make(state)


@contextmanager
def _failing(waiting: Sequence[_WaitingCommit]) -> Iterator[None]:
    """Have every commit that is not settled raise what is raised in this block, each an error of its own."""
    try:
        yield
    except LamellaError as error:
        for one in waiting:
            unknown = isinstance(error, OutcomeUnknownError)
            own = _unknown(one.item.pushes[0]) if unknown else copy.copy(error)
            own.__cause__ = error
            one.fail(own)


def _contention(push: PushId) -> ConflictError:
    return ConflictError(f"lost {COMMIT_TRIES} races in a row: push again", kind="contention", push_id=push)


def _unknown(push: PushId) -> OutcomeUnknownError:
    return OutcomeUnknownError(
        f"the store did not say whether push {push} was recorded: open the repository again and look at the branch "
        "before pushing again",
        push_id=push,
    )
