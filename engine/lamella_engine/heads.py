"""The newest log entry that this user has seen of a repository, so that a store or service that goes back is found out.

One small file for each place under ``$XDG_STATE_HOME/lamella/heads`` (or ``~/.local/state``) holds the repository's id,
number and digest of the entry, and the keys that had to sign then; opening a repository compares it, and brings it up
to date. Entries are chained by their digests, so a log that still has the pinned entry still has all that came before
it. That its newest entry stands on the pinned one would take reading all between, as an audit does. Here only the
pinned one is asked for: that finds a log that went back, or that was made anew from some earlier entry on, but not one
that forks after the pin. Where entries must be signed, a reader of the log itself finds that too: it trusts the keys
that it has seen, and no others that these did not let sign.
"""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lamella_engine.errors import CorruptionError

logger = logging.getLogger("lamella")


@dataclass(frozen=True, slots=True)
class Head:
    """A repository's newest entry at some time."""

    repository: str
    """The repository's id, 32 hex digits."""
    number: int
    digest: bytes
    """32 bytes."""
    signers: tuple[bytes, ...] = ()
    """Public keys, one of which must sign the next entry, as far as the place says."""


class Pin:
    """What was seen at a place. Make it before asking for the head: others of this user may see newer ones meanwhile.

    Parameters
    ----------
    place
        URL of the repository, without secrets.
    store
        What tells apart stores in which there is such a place.
    """

    def __init__(self, place: str, store: str = "") -> None:
        self._place = place
        folder = _state()
        name = hashlib.sha256(f"{store}\n{place.rstrip('/')}".encode()).hexdigest()[:32]
        self._path = None if folder is None else folder / "lamella" / "heads" / name
        self.seen = self._read()
        """The newest head that was seen here, or None."""

    def advance(self, head: Head, digest_at: Callable[[int], bytes | None]) -> None:
        """Check that ``head`` may follow what was seen, and remember it.

        Parameters
        ----------
        head
            The newest entry that the place shows now.
        digest_at
            Returns the digest of an entry that the place shows, or None if it shows none of that number. Asked only
            for the number that was seen, if the head is a later one.

        Raises
        ------
        CorruptionError
            ``rollback``: the head is older than what was seen. ``fork``: what was seen is not there any more.
        """
        if self.seen is not None and self.seen != head:
            self._check(self.seen, head, digest_at)
        newest = self._read()
        if newest is None or newest == self.seen or newest.number < head.number:
            self._write(head)

    def replace(self, head: Head) -> None:
        """Remember the head of a repository that this user has just made here, whatever was here before."""
        self._write(head)

    def _check(self, seen: Head, head: Head, digest_at: Callable[[int], bytes | None]) -> None:
        told = (
            f"do not use it before its keeper has said why; if this is meant, as after a restore, delete {self._path}"
        )
        if head.repository != seen.repository:
            raise CorruptionError(
                f"there is another repository at {self._place} than before: {told}",
                kind="fork",
                expected=seen.repository,
                actual=head.repository,
            )
        if head.number < seen.number:
            raise CorruptionError(
                f"the log at {self._place} went back from entry {seen.number}, which was seen, to {head.number}: "
                f"{told}",
                kind="rollback",
                expected=seen.number,
                actual=head.number,
            )
        actual = head.digest if head.number == seen.number else digest_at(seen.number)
        if actual != seen.digest:
            raise CorruptionError(
                f"entry {seen.number} of the log at {self._place} is not the one that was seen: {told}",
                kind="fork",
                expected=seen.digest.hex(),
                actual=None if actual is None else actual.hex(),
            )

    def _read(self) -> Head | None:
        if self._path is None:
            return None
        try:
            found = json.loads(self._path.read_bytes())
            signers = tuple(map(bytes.fromhex, found["signers"]))
            return Head(str(found["repository"]), int(found["number"]), bytes.fromhex(found["digest"]), signers)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("what was seen of %s is not known, as %s cannot be read: %s", self._place, self._path, error)
            return None

    def _write(self, head: Head) -> None:
        """Write the file, all or nothing. What cannot be written is not remembered: no reason to fail anybody."""
        if self._path is None:
            return
        beside = self._path.with_name(f".{self._path.name}-{secrets.token_hex(8)}")
        document = {
            "digest": head.digest.hex(),
            "number": head.number,
            "repository": head.repository,
            "signers": [key.hex() for key in head.signers],
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(document))
            beside.replace(self._path)
        except OSError as error:
            logger.debug("the head of %s is not remembered: %s", self._place, error)
            with suppress(OSError):
                beside.unlink()


def _state() -> Path | None:
    """Return the directory that the XDG Base Directory Specification gives to state, if this user has one."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    if given.is_absolute():
        return given
    home = Path(os.path.expanduser("~"))
    return home / ".local" / "state" if home.is_absolute() else None
