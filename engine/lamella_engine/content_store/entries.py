"""The entries of a log as they lie in a store, and the states that they add up to.

From entry 0, or from a fold that a later entry vouches for, one entry leads to the next, until there is none.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from lamella_engine.content_store.state import Blocks, State, part_of
from lamella_engine.content_store.trust import Trust
from lamella_engine.errors import AlreadyExistsError, CorruptionError, NotFoundError, RepositoryNotFoundError
from lamella_engine.format import fold as folds
from lamella_engine.format.entry import Entry, FoldRef, decode_entry, decode_genesis, entry_digest
from lamella_engine.format.names import fold_number, log_name, log_number
from lamella_engine.objects import Objects

logger = logging.getLogger("lamella")

# Entries between two folds: an opener reads at most this many, one by one, of some 800 bytes each. With 8, and the
# blocks of format.fold, one of 10,000 versions opens with less than twice the reads and bytes of one of 10, and a fold
# adds about 2 KB to each push; tests/test_open_cost.py prints the former.
FOLD_EVERY = 8


class Entries:
    """Reads entries and folds, and writes folds. Keeps only what never changes. Safe for several threads.

    Parameters
    ----------
    objects
        Hold the log.
    trust
        Checks how every entry that leads from one state to the next is signed.
    """

    def __init__(self, objects: Objects, trust: Trust) -> None:
        self._objects = objects
        self._trust = trust
        self._blocks = Blocks(objects)

    # -- from state to state ------------------------------------------------------------------------------------------

    def newest(self) -> State:
        """Return the newest state, found without knowing any.

        Raises RepositoryNotFoundError if there is no log, CorruptionError if it is damaged or not to be trusted.
        """
        state = self._genesis()
        read: dict[int, bytes] = {}
        newest = next(self._objects.list("fold/", limit=1), None)
        if newest is not None:
            # A fold found by listing is only a hint at where to look: the entry after it vouches for one by its digest.
            # If that entry does not exist yet, entry n itself vouches for the fold before. (That the entries really
            # follow one another is checked as they are added to the fold.)
            number = fold_number(newest.name)
            for at in (number + 1, number):
                data = self._bytes(at)
                if data is not None:
                    read[at] = data
                    entry = decode_entry(data, number=at, repository=state.genesis.repository, previous=None)
                    if entry.fold is not None:
                        state = self._at_or_replayed(state, entry.fold)
                    break
        state = self.follow(state, read)
        if not self._trust.satisfied:
            # No entry since that fold is signed by a key that the caller knows: an older one may list its signers.
            for _, _, replayed in self.history():
                state = replayed
        self._trust.check_satisfied()
        self.check_tail(state)
        return state

    def follow(self, state: State, read: Mapping[int, bytes] = MappingProxyType({})) -> State:
        """Return the newest state; ``read`` holds entries that need not be read again."""
        while (step := self._next(state, read.get(state.number + 1))) is not None:
            state = self.after(state, *step)
        return state

    def after(self, state: State, entry: Entry, digest: bytes) -> State:
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

    def history(self) -> Iterator[tuple[State, Entry, State]]:
        """Yield every entry from the first, with the states before and after it, rebuilt from the entries alone."""
        state = self._genesis()
        while (step := self._next(state)) is not None:
            before, (entry, digest) = state, step
            state = before.after(entry, digest)
            yield before, entry, state

    def _genesis(self) -> State:
        data = self._bytes(0)
        if data is None:
            check_no_log(self._objects)
            raise RepositoryNotFoundError("there is no repository here: make one with init")
        return State(decode_genesis(data), 0, entry_digest(data), self._blocks)

    def _next(self, state: State, data: bytes | None = None) -> tuple[Entry, bytes] | None:
        """Return the entry after ``state`` with its digest, or None if there is none yet."""
        number = state.number + 1
        data = data or self._bytes(number)
        if data is None:
            return None
        entry = decode_entry(data, number=number, repository=state.genesis.repository, previous=state.digest)
        self._trust.check(state.signers, entry)
        return entry, entry_digest(data)

    # -- single entries -----------------------------------------------------------------------------------------------

    def entry(self, number: int, *, repository: str) -> Entry:
        """Read an entry after the first, which is there; raises CorruptionError."""
        data = self._bytes(number)
        if data is None:
            raise _gap(number)
        return decode_entry(data, number=number, repository=repository, previous=None)

    def digest(self, number: int) -> bytes | None:
        """Return the digest of an entry, or None if it does not exist yet."""
        data = self._bytes(number)
        return None if data is None else entry_digest(data)

    def check_tail(self, state: State) -> None:
        """Raise CorruptionError if an entry lies beyond a gap after ``state``.

        To write into the gap would be to lose somebody's commit.
        """
        expected = state.number + 1
        for info in self._objects.list("log/", after=log_name(state.number), limit=2):
            if log_number(info.name) != expected:
                raise _gap(expected)
            expected += 1

    def check_gap(self, number: int) -> None:
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

    def _bytes(self, number: int) -> bytes | None:
        """Return the bytes of an entry, or None if it does not exist yet."""
        try:
            return self._objects.get(log_name(number))
        except NotFoundError:
            return None

    # -- folds --------------------------------------------------------------------------------------------------------

    def fold(self, state: State) -> FoldRef | None:
        """Return the fold that the entry after ``state`` has to name; write it if the last one is too old."""
        fold = state.fold
        if state.number - (0 if fold is None else fold.number) >= FOLD_EVERY:
            fold = self._write_fold(state)
        return fold

    def check_fold(self, fold: FoldRef, *, repository: str) -> None:
        """Read every byte of a fold that an entry names; raise CorruptionError if any is not as it was written."""
        waiting = [top for top in self._root(fold, repository).tables.values() if top is not None]
        while waiting:
            ref = waiting.pop()
            if ref.object != fold.name:
                continue  # written with an earlier fold, like everything below it
            rows = self._blocks.load(ref)
            waiting += [child for _, child in rows] if ref.height else []

    def _root(self, fold: FoldRef, repository: str) -> folds.FoldRoot:
        data = part_of(self._objects, fold.name, fold.start, fold.nbytes)
        return folds.parse_root(data, name=fold.name, expected=fold.digest, repository=repository)

    def _at(self, state: State, fold: FoldRef) -> State:
        """Return the state that a fold holds, of the repository of ``state``."""
        root = self._root(fold, state.genesis.repository)
        return replace(
            state, number=root.number, digest=root.entry, fold=fold, root=root, changes={}, signers=root.signers
        )

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


class Newest:
    """The newest state that this process has seen. Safe for several threads."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self._lock = threading.Lock()
        self.state = entries.newest()

    def refresh(self) -> State:
        """Read the entries that others have added, and return the newest state. Costs one read if there are none."""
        with self._lock:
            self.state = self._entries.follow(self.state)
            return self.state

    def advance(self, state: State) -> None:
        """Know of a state that this process itself has brought about."""
        with self._lock:
            if self.state.number < state.number:
                self.state = state


def check_no_log(objects: Objects) -> None:
    """Raise CorruptionError if there are entries, but not the first: a new one would take its name for good."""
    first = next(objects.list("log/", limit=1), None)
    if first is not None and first.name != log_name(0):
        raise CorruptionError("entry 0 of this repository is missing: restore it from a copy", kind="log_gap")


def _gap(number: int) -> CorruptionError:
    return CorruptionError(f"entry {number} is missing from the log: restore it from a copy", kind="log_gap")
