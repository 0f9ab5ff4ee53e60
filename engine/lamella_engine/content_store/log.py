"""The log: the one growing thing of a repository, and the state that it adds up to.

An entry is created once, by put-if-absent, and never changed; there is no lock and no head object (FORMAT.md, "Log").
Everything that decides whether a change is right is read from a :class:`State`, and the put of the next entry fails if
that state is no longer the newest. This is the only commit point there is.
"""

import copy
import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from types import MappingProxyType
from typing import TypeAlias

from lamella_engine.content_store.acting import new_push_id, now, principal
from lamella_engine.content_store.state import Blocks, State, part_of
from lamella_engine.content_store.together import Together, Waiting
from lamella_engine.content_store.trust import Trust, signer_list
from lamella_engine.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    InvalidInputError,
    LamellaError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    RepositoryNotFoundError,
    StorageError,
)
from lamella_engine.format import fold as folds
from lamella_engine.format.entry import (
    MAX_ENTRY_NBYTES,
    Entry,
    FoldRef,
    Genesis,
    PackAdded,
    RefChange,
    VersionAdded,
    decode_entry,
    decode_genesis,
    encode_entry,
    encode_genesis,
    entry_digest,
)
from lamella_engine.format.names import fold_number, log_name, log_number
from lamella_engine.format.pack import MAX_DEPTH
from lamella_engine.model import PushId
from lamella_engine.objects import Objects
from lamella_engine.signing import Signer

logger = logging.getLogger("lamella")

# Entries between two folds: an opener reads at most this many, one by one, of some 800 bytes each. With 8, and the
# blocks of format.fold, one of 10,000 versions opens with less than twice the reads and bytes of one of 10, and a fold
# adds about 2 KB to each push; tests/test_open_cost.py prints the former.
FOLD_EVERY = 8

# Tries of one commit. Each lost race means that somebody else's commit went through, so the repository moves on.
COMMIT_TRIES = 64

# Puts of one entry, as long as answers do not say whether it was written.
UNKNOWN_TRIES = 5

# Commits of one entry, each encoded on its own, add up to at most so much; an entry repeats no more than the principal
# of each, so that it stays below its own limit.
TOGETHER_NBYTES = MAX_ENTRY_NBYTES // 2

# Threads that store what one entry names: a store takes its time for each object, and a disk syncs several at once.
STORE_THREADS = 16

DEFAULT_MAX_DEPTH = 8
"""Longest chain of deltas unless a repository says otherwise at its making."""


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


def check_max_depth(max_depth: int) -> None:
    """Raise InvalidInputError unless chains of a repository may be so long."""
    if not 0 <= max_depth < MAX_DEPTH:
        raise InvalidInputError(f"chains may be 0 to {MAX_DEPTH - 1} deltas long, not {max_depth}", kind="bad_option")


class Log:
    """A repository's log. Safe for several threads and processes.

    Parameters
    ----------
    objects
        Hold the log.
    signer
        Signs what this process commits; None leaves it unsigned.
    trusted
        Public keys (32 bytes each) that the caller knows from elsewhere. If there are any, the log must require
        signatures, and what it says must be vouched for by one of them: by an entry that it signed, or by keys that
        such an entry, or one vouched for in turn, has listed. Without any, a log is only held against itself: whoever
        can write to the store can replace it by another.

    Raises
    ------
    RepositoryNotFoundError
        There is no log.
    CorruptionError
        An entry is not what was written, or is not signed as it must be (``unsigned``, ``bad_signature``,
        ``not_trusted``).
    """

    def __init__(self, objects: Objects, *, signer: Signer | None = None, trusted: Iterable[bytes] = ()) -> None:
        self._objects = objects
        self._trust = Trust(signer, trusted)
        self._blocks = Blocks(objects)
        self._lock = threading.Lock()
        self._state = self._load()
        self._audit: dict[str, bytes] = {}
        self._commits = Together(self._commit_together)

    @classmethod
    def create(cls, objects: Objects, *, max_depth: int = DEFAULT_MAX_DEPTH) -> "Log":
        """Start a log.

        Raises AlreadyExistsError if there is one, InvalidInputError as :func:`check_max_depth`.
        """
        check_max_depth(max_depth)
        _check_no_log(objects)
        data = encode_genesis(Genesis(secrets.token_hex(16), max_depth, now()))
        try:
            objects.put_if_absent(log_name(0), [data])
        except AlreadyExistsError:
            raise AlreadyExistsError(
                "there is a repository at this place already: open it, or choose another place",
                kind="repository_exists",
            ) from None
        except StorageError:
            # The id is random: if these very bytes are there, the put went through and only its answer was lost.
            with suppress(NotFoundError):
                if objects.get(log_name(0)) == data:
                    return cls(objects)
            raise
        return cls(objects)

    @property
    def state(self) -> State:
        """The newest state that this process has seen."""
        return self._state

    def refresh(self) -> State:
        """Read the entries that others have added, and return the newest state. Costs one read if there are none."""
        with self._lock:
            self._state = self._follow(self._state)
            return self._state

    def commit(self, push: PushId, make: Callable[[State], Change | None], *, writer: PushId | None = None) -> State:
        """Add an entry that commits ``push``: the only way in which a repository changes.

        Commits of several threads are recorded together: while one entry is put, others gather for the next.

        Parameters
        ----------
        push
            Names the commit. If an entry that commits it is found, the commit has succeeded: repeating one is safe.
        make
            Given the newest state, returns what to change, or None for nothing; raises if the change is not right any
            more. The state has what earlier commits add to the same entry: a change is recorded with them, but None
            and an error count only when they are recorded. Changes nothing itself; called again as often as needed,
            not always by the same thread.
        writer
            The id in the names of what the push has written, if that is another one.

        Raises
        ------
        ConflictError
            The push was fenced, or races were lost :data:`COMMIT_TRIES` times.
        OutcomeUnknownError
            The store did not say whether the entry was written, and could not be asked.
        """
        return self._commits.call(_Commit((push,) if writer is None else (push, writer), make, principal()))

    def _commit_together(self, waiting: Sequence[_WaitingCommit]) -> None:
        """Settle the commits that need no entry, and those whose changes the next entry can hold together."""
        with _failing(waiting):
            state = self.refresh()
            parts = self._parts(state, waiting)
        if not parts or not self._store(parts):
            return
        with _failing([part.waiting for part in parts]):
            entry = self._trust.sign(state, self._entry(state, parts))
            data = encode_entry(entry)
            # Everything that can fail is done before the entry is published: afterwards it has happened.
            after = self._after(state, entry, entry_digest(data))
            self._check_gap(entry.number)
            if not self._publish(entry, data):
                for part in parts:
                    part.commit.lost_races += 1
                    if part.commit.lost_races == COMMIT_TRIES:
                        part.waiting.fail(_contention(part.commit.pushes[0]))
                return
            with self._lock:
                if self._state.number < after.number:
                    self._state = after
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

    def _check_gap(self, number: int) -> None:
        """Raise CorruptionError if entry ``number``, about to be written, is absent but the one after it is not.

        Opening a repository looks further; this is for a process that has had it open while an entry was lost.
        """
        if self._has(number + 1) and not self._has(number):
            raise _gap(number)

    def _has(self, number: int) -> bool:
        try:
            self._objects.size(log_name(number))
        except NotFoundError:
            return False
        return True

    def entry(self, number: int) -> Entry:
        """Read an entry after the first, which is there; raises CorruptionError."""
        data = self._entry_bytes(number)
        if data is None:
            raise _gap(number)
        return decode_entry(data, number=number, repository=self._state.genesis.repository, previous=None)

    def digest_at(self, number: int) -> bytes | None:
        """Return the digest of an entry up to the newest that was seen, or None if there is none of this number."""
        state = self._state
        if number >= state.number:
            return state.digest if number == state.number else None
        data = self._entry_bytes(number)
        return None if data is None else entry_digest(data)

    def check_fold(self, fold: FoldRef) -> None:
        """Read every byte of a fold that an entry names; raise CorruptionError if any is not as it was written."""
        data = part_of(self._objects, fold.name, fold.start, fold.nbytes)
        root = folds.parse_root(data, name=fold.name, expected=fold.digest, repository=self._state.genesis.repository)
        waiting = [top for top in root.tables.values() if top is not None]
        while waiting:
            ref = waiting.pop()
            if ref.object != fold.name:
                continue  # written with an earlier fold, like everything below it
            rows = self._blocks.load(ref)
            waiting += [child for _, child in rows] if ref.height else []

    def history(self) -> Iterator[tuple[State, Entry, State]]:
        """Yield every entry from the first, with the states before and after it, rebuilt from the entries alone."""
        state = self._genesis()
        while (step := self._next(state)) is not None:
            before, (entry, digest) = state, step
            state = before.after(entry, digest)
            yield before, entry, state

    def check_tail(self, state: State) -> None:
        """Raise CorruptionError if an entry lies beyond a gap after ``state``.

        To write into the gap would be to lose somebody's commit.
        """
        expected = state.number + 1
        for info in self._objects.list("log/", after=log_name(state.number), limit=2):
            if log_number(info.name) != expected:
                raise _gap(expected)
            expected += 1

    def _load(self) -> State:
        state = self._genesis()
        read: dict[int, bytes] = {}
        newest = next(self._objects.list("fold/", limit=1), None)
        if newest is not None:
            # A fold found by listing is only a hint at where to look: the entry after it vouches for one by its digest.
            # If that entry does not exist yet, entry n itself vouches for the fold before. (That the entries really
            # follow one another is checked as they are added to the fold.)
            number = fold_number(newest.name)
            for at in (number + 1, number):
                data = self._entry_bytes(at)
                if data is not None:
                    read[at] = data
                    entry = decode_entry(data, number=at, repository=state.genesis.repository, previous=None)
                    if entry.fold is not None:
                        state = self._at_or_replayed(state, entry.fold)
                    break
        state = self._follow(state, read)
        if not self._trust.satisfied:
            # No entry since that fold is signed by a key that the caller knows: an older one may list its signers.
            for _, _, replayed in self.history():
                state = replayed
        self._trust.check_satisfied()
        self.check_tail(state)
        return state

    def _genesis(self) -> State:
        data = self._entry_bytes(0)
        if data is None:
            _check_no_log(self._objects)
            raise RepositoryNotFoundError("there is no repository here: make one with init")
        return State(decode_genesis(data), 0, entry_digest(data), self._blocks)

    def _entry_bytes(self, number: int) -> bytes | None:
        """Return the bytes of an entry, or None if it does not exist yet."""
        try:
            return self._objects.get(log_name(number))
        except NotFoundError:
            return None

    def _at_or_replayed(self, state: State, fold: FoldRef) -> State:
        """Return the state that a fold holds; if it is lost, what the entries up to there add up to."""
        try:
            return self._at(state, fold)
        except CorruptionError as error:
            logger.warning("reading the whole log, because a fold is lost: %s", error)
        for _, _, replayed in self.history():
            state = replayed
            if state.number == fold.number:
                break
        return state

    def _at(self, state: State, fold: FoldRef) -> State:
        data = part_of(self._objects, fold.name, fold.start, fold.nbytes)
        root = folds.parse_root(data, name=fold.name, expected=fold.digest, repository=state.genesis.repository)
        return replace(
            state, number=root.number, digest=root.entry, fold=fold, root=root, changes={}, signers=root.signers
        )

    def _follow(self, state: State, read: Mapping[int, bytes] = MappingProxyType({})) -> State:
        """Return the newest state; ``read`` holds entries that need not be read again."""
        while (step := self._next(state, read.get(state.number + 1))) is not None:
            state = self._after(state, *step)
        return state

    def _after(self, state: State, entry: Entry, digest: bytes) -> State:
        """Return the state with one more entry, on the fold that this entry is the first to name, if it is.

        A fold is derived: without it, this process goes on from what it has.
        """
        fold = entry.fold
        if fold is not None and fold.number == state.number and fold != state.fold:
            try:
                folded = self._at(state, fold)
            except CorruptionError as error:
                logger.warning("a fold is left out: %s", error)
            else:
                state = folded if (folded.digest, folded.signers) == (state.digest, state.signers) else state
        return state.after(entry, digest)

    def _next(self, state: State, data: bytes | None = None) -> tuple[Entry, bytes] | None:
        """Return the entry after ``state`` with its digest, or None if there is none yet."""
        number = state.number + 1
        data = data or self._entry_bytes(number)
        if data is None:
            return None
        entry = decode_entry(data, number=number, repository=state.genesis.repository, previous=state.digest)
        self._trust.check(state, entry)
        return entry, entry_digest(data)

    def _entry(self, state: State, parts: Sequence[_Part]) -> Entry:
        fold = state.fold
        if state.number - (0 if fold is None else fold.number) >= FOLD_EVERY:
            fold = self._write_fold(state)
        with self._lock:
            audit = dict(sorted(self._audit.items()))
        return replace(self._joined(state, fold, parts), time=now(), audit=audit)

    def _joined(self, state: State, fold: FoldRef | None, parts: Sequence[_Part]) -> Entry:
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

    def carry(self, segment: str, digest: bytes, *, instead_of: str | None) -> None:
        """Have the next entry carry the digest of an audit segment, which vouches for those before it, as well."""
        with self._lock:
            if instead_of is not None:
                self._audit.pop(instead_of, None)
            self._audit[segment] = digest

    def require_signed(self, keys: Iterable[bytes]) -> State:
        """Have every entry after the next be signed by one of ``keys`` (public, 32 bytes each).

        There is no way back: the list can be replaced, by whoever holds a key of it, but it never becomes empty. This
        log's own signer must be on the list that holds now, or on the first one.

        Raises InvalidInputError for no keys or too many, PermissionDeniedError without a key that may do this.
        """
        signers = signer_list(keys)
        return self.commit(new_push_id(), lambda state: None if state.signers == signers else Change(signers=signers))

    def _write_fold(self, state: State) -> FoldRef:
        """Write the fold of ``state``, or find it written: its bytes, and so its name, follow from the log alone."""
        writer = folds.FoldWriter(self._blocks.load)
        for table in folds.TABLES:
            top = None if state.root is None else state.root.tables[table]
            writer.update(table, top, state.changes.get(table, {}))
        name, parts, start, digest = writer.finish(
            repository=state.genesis.repository, number=state.number, entry=state.digest, signers=state.signers
        )
        try:
            self._objects.put_if_absent(name, parts)
        except AlreadyExistsError:
            logger.debug("%s was written by somebody else", name)
        return FoldRef(name, start, len(parts[-1]), digest)


def _check_no_log(objects: Objects) -> None:
    """Raise CorruptionError if there are entries, but not the first: a new one would take its name for good."""
    first = next(objects.list("log/", limit=1), None)
    if first is not None and first.name != log_name(0):
        raise CorruptionError("entry 0 of this repository is missing: restore it from a copy", kind="log_gap")


def _gap(number: int) -> CorruptionError:
    return CorruptionError(f"entry {number} is missing from the log: restore it from a copy", kind="log_gap")


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
