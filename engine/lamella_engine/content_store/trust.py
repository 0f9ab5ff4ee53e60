"""Who may sign the entries of a log, and whether anybody whom the caller knows has."""

from collections.abc import Iterable
from dataclasses import replace

from lamella_engine.content_store.state import State
from lamella_engine.errors import CorruptionError, InvalidInputError, PermissionDeniedError
from lamella_engine.format.entry import Entry, Signature, to_sign
from lamella_engine.format.fold import MAX_SIGNERS
from lamella_engine.signing import KEY_NBYTES, Signer, can_verify, is_signed


class Trust:
    """What a process signs with, and what it believes. It remembers whether an entry that it checked was vouched for.

    Parameters
    ----------
    signer
        Signs what this process commits; None leaves it unsigned.
    trusted
        Public keys (32 bytes each) that the caller knows from elsewhere; none to hold a log only against itself.
    """

    def __init__(self, signer: Signer | None, trusted: Iterable[bytes]) -> None:
        self._signer = signer
        self._trusted = frozenset(trusted)
        self._vouched = False
        """Whether a trusted key has signed an entry that was checked, after which signatures were required."""

    @property
    def satisfied(self) -> bool:
        """Whether a trusted key vouches for the log, as far as it was read, or the caller knows none."""
        return self._vouched or not self._trusted

    def check(self, signers: tuple[bytes, ...], entry: Entry) -> None:
        """Raise CorruptionError unless an entry is signed as it may be where ``signers``, if any, have to sign."""
        allowed = signers or entry.signers
        signature = entry.signature
        if signature is None:
            if allowed:
                raise CorruptionError(
                    f"entry {entry.number} is not signed, and must be: whoever wrote it was not allowed to",
                    kind="unsigned",
                )
            return
        if allowed and signature.key not in allowed:
            raise CorruptionError(
                f"entry {entry.number} is signed by a key that the repository does not list: whoever wrote it was not "
                "allowed to",
                kind="bad_signature",
            )
        # Where no signature is required, a reader without the means to check one may go on.
        if (allowed or can_verify()) and not is_signed(to_sign(entry), key=signature.key, signature=signature.value):
            raise CorruptionError(f"the signature of entry {entry.number} is forged", kind="bad_signature")
        if allowed and signature.key in self._trusted:
            self._vouched = True

    def check_satisfied(self) -> None:
        """Raise CorruptionError if the caller trusts keys, and none of them vouches for what was read of the log."""
        if not self.satisfied:
            raise CorruptionError(
                "no key that you trust vouches for this repository: ask for its public keys where you trust the "
                "answer, and do not use what is stored here before",
                kind="not_trusted",
            )

    def sign(self, state: State, entry: Entry) -> Entry:
        """Return ``entry``, which is to follow ``state``, signed if there is a key.

        Raises PermissionDeniedError if it must be signed by a key that this process does not have.
        """
        allowed = state.signers or entry.signers
        key = None if self._signer is None else self._signer.public
        if allowed and key not in allowed:
            raise PermissionDeniedError(
                "this repository takes only entries that are signed by a key it lists: give such a key",
                kind="not_a_signer",
            )
        if self._signer is None:
            return entry
        return replace(entry, signature=Signature(self._signer.public, self._signer.sign(to_sign(entry))))


def signer_list(keys: Iterable[bytes]) -> tuple[bytes, ...]:
    """Return public keys as an entry lists them: ascending, each once.

    Raises InvalidInputError if there are none, too many, or any is not 32 bytes long.
    """
    signers = tuple(sorted(set(keys)))
    if not 0 < len(signers) <= MAX_SIGNERS or any(len(key) != KEY_NBYTES for key in signers):
        raise InvalidInputError(f"1 to {MAX_SIGNERS} public keys may sign", kind="bad_signers")
    return signers
