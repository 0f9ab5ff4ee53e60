"""The log: the one growing thing of a repository, and the state that it adds up to.

An entry is created once, by put-if-absent, and never changed; there is no lock and no head object (FORMAT.md, "Log").
Everything that decides whether a change is right is read from a :class:`State`, and the put of the next entry fails if
that state is no longer the newest. This is the only commit point there is.
"""

import getpass
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import MappingProxyType

from lamella_engine.content_store.state import Blocks, State, part_of
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

logger = logging.getLogger("lamella")

# Entries between two folds: an opener reads at most this many, one by one, of some 800 bytes each. With 8, and the
# blocks of format.fold, one of 10,000 versions opens with less than twice the reads and bytes of one of 10, and a fold
# adds about 2 KB to each push; tests/test_open_cost.py prints the former.
FOLD_EVERY = 8

# Tries of one commit. Each lost race means that somebody else's commit went through, so the repository moves on.
COMMIT_TRIES = 64

# Puts of one entry, as long as answers do not say whether it was written.
UNKNOWN_TRIES = 5

DEFAULT_MAX_DEPTH = 8
"""Longest chain of deltas unless a repository says otherwise at its making."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a commit wants the next entry to say; the log adds the rest."""

    refs: tuple[RefChange, ...] = ()
    versions: tuple[VersionAdded, ...] = ()
    packs: tuple[PackAdded, ...] = ()


def check_max_depth(max_depth: int) -> None:
    """Raise InvalidInputError unless chains of a repository may be so long."""
    if not 0 <= max_depth < MAX_DEPTH:
        raise InvalidInputError(f"chains may be 0 to {MAX_DEPTH - 1} deltas long, not {max_depth}", kind="bad_option")


class Log:
    """A repository's log. Safe for several threads and processes."""

    def __init__(self, objects: Objects) -> None:
        """Open the log that ``objects`` holds. Raises RepositoryNotFoundError if there is none."""
        self._objects = objects
        self._blocks = Blocks(objects)
        self._lock = threading.Lock()
        self._state = self._load()

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

        Parameters
        ----------
        push
            Names the commit. If an entry that commits it is found, the commit has succeeded: repeating one is safe.
        make
            Given the newest state, returns what to change, or None for nothing; raises if the change is not right any
            more. Called again after every lost race.
        writer
            The id in the names of what the push has written, if that is another one.

        Raises
        ------
        ConflictError
            The push was fenced, or races were lost :data:`COMMIT_TRIES` times.
        OutcomeUnknownError
            The store did not say whether the entry was written, and could not be asked.
        """
        for _ in range(COMMIT_TRIES):
            state = self.refresh()
            if state.committed_at(push) is not None:
                return self._durable(state)
            pushes = (push,) if writer is None else (push, writer)
            if any(map(state.is_fenced, pushes)):
                raise ConflictError("this push was fenced off as abandoned: push again", kind="fenced", push_id=push)
            change = make(state)
            if change is None:
                return self._durable(state)
            entry = self._entry(state, pushes, change)
            data = encode_entry(entry)
            # Everything that can fail is done before the entry is published: afterwards it has happened.
            after = self._after(state, entry, entry_digest(data))
            self._check_gap(entry.number)
            if self._publish(entry.number, data, push):
                with self._lock:
                    if self._state.number < after.number:
                        self._state = after
                return after
        raise ConflictError(f"lost {COMMIT_TRIES} races in a row: push again", kind="contention", push_id=push)

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

    def _publish(self, number: int, data: bytes, push: PushId) -> bool:
        """Put entry ``number``; return whether it is ours and durable, or somebody else's.

        An answer that does not come is asked for by putting the same bytes again: AlreadyExists promises that the
        object of that name is durable, which reading it would not.
        """
        name = log_name(number)
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
        return replace(state, number=root.number, digest=root.entry, fold=fold, root=root, changes={})

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
                state = folded if folded.digest == state.digest else state
        return state.after(entry, digest)

    def _next(self, state: State, data: bytes | None = None) -> tuple[Entry, bytes] | None:
        """Return the entry after ``state`` with its digest, or None if there is none yet."""
        number = state.number + 1
        data = data or self._entry_bytes(number)
        if data is None:
            return None
        entry = decode_entry(data, number=number, repository=state.genesis.repository, previous=state.digest)
        return entry, entry_digest(data)

    def _entry(self, state: State, pushes: tuple[PushId, ...], change: Change) -> Entry:
        fold = state.fold
        if state.number - (0 if fold is None else fold.number) >= FOLD_EVERY:
            fold = self._write_fold(state)
        return Entry(
            repository=state.genesis.repository,
            number=state.number + 1,
            previous=state.digest,
            fold=fold,
            refs=change.refs,
            versions=change.versions,
            packs=change.packs,
            pushes=pushes,
            principal=principal(),
            time=now(),
        )

    def _write_fold(self, state: State) -> FoldRef:
        """Write the fold of ``state``, or find it written: its bytes, and so its name, follow from the log alone."""
        writer = folds.FoldWriter(self._blocks.load)
        for table in folds.TABLES:
            top = None if state.root is None else state.root.tables[table]
            writer.update(table, top, state.changes.get(table, {}))
        name, parts, start, digest = writer.finish(
            repository=state.genesis.repository, number=state.number, entry=state.digest
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


def _unknown(push: PushId) -> OutcomeUnknownError:
    return OutcomeUnknownError(
        f"the store did not say whether push {push} was recorded: open the repository again and look at the branch "
        "before pushing again",
        push_id=push,
    )


def now() -> str:
    """Return the time as entries and versions write it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def new_push_id() -> PushId:
    """Return a fresh push id: 48 bits of milliseconds since 1970, then 80 random bits.

    The time is there for locality alone (ids made one after the other sort side by side in the fold's tables); no rule
    depends on it, and a wrong clock does no harm.
    """
    return PushId(f"{time.time_ns() // 1_000_000 & (1 << 48) - 1:012x}{secrets.token_hex(10)}")


_acting: ContextVar[str | None] = ContextVar("acting", default=None)


@contextmanager
def acting_as(name: str) -> Iterator[None]:
    """Have entries that are written in this block, by this thread, say that ``name`` acted: on behalf of a caller."""
    token = _acting.set(name)
    try:
        yield
    finally:
        _acting.reset(token)


def principal() -> str:
    """Return who is acting, as far as is known: by :func:`acting_as`, or else by the machine."""
    if (name := _acting.get()) is not None:
        return name
    try:
        return getpass.getuser().encode(errors="replace").decode()
    except (OSError, KeyError):  # a uid without a name, as in many containers
        return ""
