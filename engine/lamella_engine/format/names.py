"""Names of objects (FORMAT.md, "Names").

No name is ever used twice: each carries the push or the entry that made it.
"""

import re
from dataclasses import dataclass

from lamella_engine.errors import CorruptionError, InvalidInputError
from lamella_engine.model import PushId, VersionId, check_name, check_ref_name

_LAST_ENTRY = 10**20 - 1
"""Greatest entry number that fits the 20 digits of a log name."""

MAX_NUMBER = 10**18 - 1
"""Greatest number of a version: sorts as text among the 20 digits of its key, and fits 64 bits."""


def push_id(text: str) -> PushId:
    """Return ``text`` if it is a push id; raises CorruptionError."""
    _match("[0-9a-f]{32}", text)
    return PushId(text)


def log_name(number: int) -> str:
    """Return the name of log entry ``number``."""
    return f"log/{number:020d}"


def log_number(name: str) -> int:
    """Return the number of the log entry called ``name``; raises CorruptionError if none can be called that."""
    return int(_match(r"log/([0-9]{20})", name)[1])


def session_name(push: PushId, beat: int) -> str:
    """Return the name of heartbeat ``beat`` (from 0) of a push that lives long."""
    return f"sessions/{push}-{beat}"


def audit_name(server: str, number: int) -> str:
    """Return the name of audit segment ``number`` (from 0) of a server process, 16 hex digits."""
    return f"audit/{server}-{number:09d}"


def audit_number(name: str) -> tuple[str, int]:
    """Return the server process and the number of an audit segment; raises CorruptionError."""
    found = _match(r"audit/([0-9a-f]{16})-([0-9]{9})", name)
    return found[1], int(found[2])


def metadata_name(version: VersionId, push: PushId, attempt: int) -> str:
    """Return the name of a version's metadata object, written for try ``attempt`` of a push's commit."""
    return f"meta/{version}-{push}-{attempt}"


def metadata_version(name: str) -> VersionId:
    """Return the version that a metadata object describes."""
    return VersionId(_match(_METADATA, name)[1])


def metadata_push(name: str) -> PushId:
    """Return the push that wrote a metadata object."""
    return PushId(_match(_METADATA, name)[2])


_METADATA = r"meta/([0-9a-f]{64})-([0-9a-f]{32})-[0-9]{1,9}"


@dataclass(frozen=True, slots=True)
class PackName:
    """The parts of a pack's name."""

    push: PushId
    number: int
    """Counts the packs of one push, from 0."""
    digest: bytes
    """Digest of the pack's index: who knows the name can check every byte of the pack."""

    def __str__(self) -> str:
        return f"packs/{self.push}-{self.number}-{self.digest.hex()}"


def parse_pack_name(name: str) -> PackName:
    """Take a pack's name apart; raises CorruptionError."""
    found = _match(r"packs/([0-9a-f]{32})-([0-9]{1,9})-([0-9a-f]{64})", name)
    return PackName(PushId(found[1]), int(found[2]), bytes.fromhex(found[3]))


def incoming_name(pack: str) -> str:
    """Return where a pack is put by whoever may not write packs; raises CorruptionError for what is no pack's name."""
    parse_pack_name(pack)
    return f"incoming/{pack.removeprefix('packs/')}"


def incoming_time(name: str) -> float:
    """Return when the push began that was to put something there, in seconds since 1970; raises CorruptionError."""
    return int(_match(r"incoming/([0-9a-f]{12})[0-9a-f]{20}-[0-9]{1,9}-[0-9a-f]{64}", name)[1], 16) / 1000


def fold_name(number: int, root_digest: bytes) -> str:
    """Return the name of the fold of entries up to ``number``.

    The number is written as its distance from 10^20 - 1, so that the newest fold comes first in a listing and is found
    by listing one name.
    """
    return f"fold/{_LAST_ENTRY - number:020d}-{root_digest[:8].hex()}"


def fold_number(name: str) -> int:
    """Return the number of the last entry that a fold holds; raises CorruptionError."""
    return _LAST_ENTRY - int(_match(r"fold/([0-9]{20})-[0-9a-f]{16}", name)[1])


def check_named(model: str, *numbers: int | None, ref: str | None = None, what: str, kind: str) -> None:
    """Raise CorruptionError of ``kind``, naming ``what``, unless a model, its ref and its versions can be called so.

    A number that is None names nothing.
    """
    try:
        check_name(model, what="model")
        if ref is not None:
            check_ref_name(ref)
    except InvalidInputError as error:
        raise CorruptionError(f"{what} is damaged: {error.message}", kind=kind) from None
    if not all(number is None or 1 <= number <= MAX_NUMBER for number in numbers):
        raise CorruptionError(f"{what} has a version with a number that cannot be", kind=kind)


def _match(pattern: str, name: str) -> re.Match[str]:
    found = re.fullmatch(pattern, name)
    if found is None:
        raise CorruptionError(f"{name!r} is not a name that lamella gives", kind="bad_object_name", name=name)
    return found
