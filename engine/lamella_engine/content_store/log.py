"""The log: the one growing thing of a repository, and the state that it adds up to.

An entry is created once, by put-if-absent, and never changed; there is no lock and no head object (FORMAT.md, "Log").
Everything that decides whether a change is right is read from a :class:`State`, and the put of the next entry fails if
that state is no longer the newest. This is the only commit point there is.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from lamella_engine.content_store.acting import new_push_id, now
from lamella_engine.content_store.committing import Change, Committer
from lamella_engine.content_store.entries import Entries, Newest, check_no_log
from lamella_engine.content_store.state import State
from lamella_engine.content_store.trust import Trust, signer_list
from lamella_engine.errors import AlreadyExistsError, InvalidInputError, NotFoundError, StorageError
from lamella_engine.format.entry import Entry, FoldRef, Genesis, encode_genesis
from lamella_engine.format.names import log_name
from lamella_engine.format.pack import MAX_DEPTH
from lamella_engine.model import PushId
from lamella_engine.objects import Objects
from lamella_engine.signing import Signer

DEFAULT_MAX_DEPTH = 8
"""Longest chain of deltas unless a repository says otherwise at its making."""


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
        trust = Trust(signer, trusted)
        self._entries = Entries(objects, trust)
        self._newest = Newest(self._entries)
        self._committer = Committer(objects, self._entries, self._newest, trust)

    @classmethod
    def create(cls, objects: Objects, *, max_depth: int = DEFAULT_MAX_DEPTH) -> "Log":
        """Start a log.

        Raises AlreadyExistsError if there is one, InvalidInputError as :func:`check_max_depth`.
        """
        check_max_depth(max_depth)
        check_no_log(objects)
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
        return self._newest.state

    def refresh(self) -> State:
        """Read the entries that others have added, and return the newest state. Costs one read if there are none."""
        return self._newest.refresh()

    def history(self) -> Iterator[tuple[State, Entry, State]]:
        """Yield every entry from the first, with the states before and after it, rebuilt from the entries alone."""
        return self._entries.history()

    def entry(self, number: int) -> Entry:
        """Read an entry after the first, which is there; raises CorruptionError."""
        return self._entries.entry(number, repository=self.state.genesis.repository)

    def digest_at(self, number: int) -> bytes | None:
        """Return the digest of an entry up to the newest that was seen, or None if there is none of this number."""
        state = self.state
        if number >= state.number:
            return state.digest if number == state.number else None
        return self._entries.digest(number)

    def check_fold(self, fold: FoldRef) -> None:
        """Read every byte of a fold that an entry names; raise CorruptionError if any is not as it was written."""
        self._entries.check_fold(fold, repository=self.state.genesis.repository)

    def check_tail(self, state: State) -> None:
        """Raise CorruptionError if an entry lies beyond a gap after ``state``."""
        self._entries.check_tail(state)

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
            The push was fenced, or races were lost :data:`~lamella_engine.content_store.committing.COMMIT_TRIES` times.
        OutcomeUnknownError
            The store did not say whether the entry was written, and could not be asked.
        """
        return self._committer.commit((push,) if writer is None else (push, writer), make)

    def carry(self, segment: str, digest: bytes, *, instead_of: str | None) -> None:
        """Have the next entry carry the digest of an audit segment, which vouches for those before it, as well."""
        self._committer.carry(segment, digest, instead_of=instead_of)

    @property
    def carries(self) -> bool:
        """Whether the next entry carries the digest of an audit segment, for which none vouches yet."""
        return self._committer.carries

    def vouch(self) -> State:
        """Add an entry that carries the digests of audit segments and changes nothing, if no other does first."""
        return self.commit(new_push_id(), lambda state: Change() if self.carries else None)

    def require_signed(self, keys: Iterable[bytes]) -> State:
        """Have every entry after the next be signed by one of ``keys`` (public, 32 bytes each).

        There is no way back: the list can be replaced, by whoever holds a key of it, but it never becomes empty. This
        log's own signer must be on the list that holds now, or on the first one.

        Raises InvalidInputError for no keys or too many, PermissionDeniedError without a key that may do this.
        """
        signers = signer_list(keys)
        return self.commit(new_push_id(), lambda state: None if state.signers == signers else Change(signers=signers))
