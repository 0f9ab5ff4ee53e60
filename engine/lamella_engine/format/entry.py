"""Log entries: every change of a repository, one after the other (FORMAT.md, "Log").

An entry is one object: a line of canonical JSON, and a line with the digest of the first. It names the digest of the
entry before it; its own is there because nothing else vouches for the newest one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from lamella_engine.chunking import MAX_CELL_ELEMENTS, MAX_CELL_NBYTES
from lamella_engine.errors import CorruptionError, LimitError, UnsupportedFormatError
from lamella_engine.format import canonical
from lamella_engine.format.digests import DIGEST_NBYTES, Context, digest
from lamella_engine.format.fold import MAX_BLOCK_NBYTES, decode_signers
from lamella_engine.format.names import audit_number, check_named, fold_number, metadata_version, parse_pack_name
from lamella_engine.format.pack import MAX_DEPTH
from lamella_engine.model import PushId, RefKind, VersionId

ENTRY_FORMAT = 0
MAX_ENTRY_NBYTES = 4 << 20

VERIFIED_BY_STORE = "store"
"""Verifier of a pack whose every blob was decoded and compared with its chunk id before the entry that says so."""

VERIFIED_BY_WRITER = "writer"
"""Verifier of a pack that nobody but whoever wrote it has decoded: no other push may stand on it."""

KNOWN_FEATURES: frozenset[str] = frozenset()
"""Features a genesis entry may require of whoever opens the repository. None exists yet."""


@dataclass(frozen=True, slots=True)
class Genesis:
    """Entry 0: what holds for the whole repository, for ever."""

    repository: str
    """32 hex digits, drawn at random."""
    max_depth: int
    """Longest chain of deltas through versions; less than ``MAX_DEPTH``, as a base in the same version adds one."""
    created: str
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RefChange:
    """One ref moved, made (``old`` is None) or deleted (``new`` is None)."""

    model: str
    name: str
    kind: RefKind
    old: int | None
    """Number of the version it stood at."""
    new: int | None


@dataclass(frozen=True, slots=True)
class VersionAdded:
    """A version entered the repository."""

    model: str
    number: int
    metadata: str
    """Name of its metadata object, which carries its id."""
    nbytes: int
    digest: bytes
    """Of the whole metadata object."""
    decoded_nbytes: int
    """Bytes of the version's tensors."""

    @property
    def id(self) -> VersionId:
        """The version's id."""
        return metadata_version(self.metadata)


@dataclass(frozen=True, slots=True)
class PackAdded:
    """A pack entered the repository; its name carries the digest of its index."""

    name: str
    nbytes: int
    verifier: str
    """``store`` if every blob was decoded and compared with its chunk id before this entry, ``writer`` if not yet."""


@dataclass(frozen=True, slots=True)
class FoldRef:
    """A fold: the state that entries up to ``number`` add up to."""

    name: str
    start: int
    """First byte of its root in the object."""
    nbytes: int
    """Bytes of the root, which ends the object."""
    digest: bytes
    """Of the root."""

    @property
    def number(self) -> int:
        """The last entry folded in."""
        return fold_number(self.name)


@dataclass(frozen=True, slots=True)
class Signature:
    """Who vouches for an entry."""

    key: bytes
    """The public key, 32 bytes."""
    value: bytes
    """64 bytes: the Ed25519 signature of :func:`to_sign`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Entry n > 0. Everything that must agree stands in one entry."""

    repository: str
    number: int
    previous: bytes
    """Digest of entry n-1."""
    fold: FoldRef | None
    """The newest fold when this entry was made; its number is at most n-1."""
    refs: tuple[RefChange, ...] = ()
    versions: tuple[VersionAdded, ...] = ()
    packs: tuple[PackAdded, ...] = ()
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Old pack -> the packs that hold its blobs from now on; the old one is no longer live."""
    condemned: tuple[str, ...] = ()
    """Packs that are no longer live and will be deleted."""
    fenced: tuple[PushId, ...] = ()
    """Pushes that may not commit any more."""
    pushes: tuple[PushId, ...] = ()
    """Pushes that this entry commits."""
    principal: str = ""
    """Who acted, as far as the writer knew."""
    by: tuple[str, ...] = ()
    """Who asked for each of ``pushes``, if not all are ``principal``."""
    movers: tuple[int, ...] = ()
    """With ``by``, for each of ``refs`` the place in ``pushes`` of the one that moved it."""
    time: str = ""
    """UTC, ISO 8601; information only."""
    signers: tuple[bytes, ...] = ()
    """If any: public keys, one of which must sign every entry after this one."""
    signature: Signature | None = None
    audit: Mapping[str, bytes] = field(default_factory=dict)
    """Name and digest of the newest audit segments that the writer knew."""


_GENESIS = {
    "created": str,
    "digest": str,
    "features": [str],
    "format": int,
    "grid": (int, int),
    "max_depth": int,
    "n": int,
    "repository": str,
}

_FOLD = {"digest": str, "name": str, "nbytes": int, "start": int}

_ENTRY = {
    "condemned": [str],
    "fenced": [str],
    "fold": object,
    "format": int,
    "n": int,
    "packs": [(str, int, str)],
    "previous": str,
    "principal": str,
    "pushes": [str],
    "refs": [object],
    "replaced": {str: [str]},
    "repository": str,
    "time": str,
    "versions": [(str, int, str, int, str, int)],
}

_WHERE_NEEDED: dict[str, Any] = {
    "audit": {str: str},
    "by": [str],
    "movers": [int],
    "signature": {"key": str, "value": str},
    "signers": [str],
}
"""Fields that stand only in entries which they tell something of."""


def entry_digest(data: bytes) -> bytes:
    """Return the digest of an entry's first line, which the next entry names."""
    return digest(Context.ENTRY, data[:-_SEAL_NBYTES])


def encode_genesis(genesis: Genesis) -> bytes:
    """Return the bytes of entry 0."""
    return _sealed(
        {
            "created": genesis.created,
            "digest": "blake3-256",
            "features": sorted(genesis.features),
            "format": ENTRY_FORMAT,
            "grid": [MAX_CELL_ELEMENTS, MAX_CELL_NBYTES],
            "max_depth": genesis.max_depth,
            "n": 0,
            "repository": genesis.repository,
        }
    )


def decode_genesis(data: bytes) -> Genesis:
    """Parse entry 0; raises CorruptionError or, for a repository made by a newer lamella, UnsupportedFormatError."""
    what = "entry 0"
    value = _parse(data, what)
    features = value.get("features")
    if isinstance(features, list) and (unknown := {str(item) for item in features} - KNOWN_FEATURES):
        raise UnsupportedFormatError(f"this repository requires {', '.join(sorted(unknown))}: upgrade lamella")
    canonical.conform(value, _GENESIS, what=what)
    if value["digest"] != "blake3-256" or value["grid"] != [MAX_CELL_ELEMENTS, MAX_CELL_NBYTES]:
        raise UnsupportedFormatError("this repository uses another digest or grid: upgrade lamella")
    if value["n"] != 0 or not value["max_depth"] < MAX_DEPTH:
        raise CorruptionError("entry 0 is damaged", kind="bad_entry")
    _hex(value["repository"], 16, what)
    return Genesis(value["repository"], value["max_depth"], value["created"], tuple(value["features"]))


def encode_entry(entry: Entry) -> bytes:
    """Return the bytes of an entry after the first.

    Raises LimitError if they would be more than any reader accepts: such an entry would end the log for everybody.
    """
    data = _sealed(_plain(entry))
    if len(data) > MAX_ENTRY_NBYTES:
        raise LimitError(
            f"this commit is {len(data)} bytes long, and {MAX_ENTRY_NBYTES} are the limit: split it", kind="entry_limit"
        )
    return data


def to_sign(entry: Entry) -> bytes:
    """Return what the signature of an entry signs: the 32-byte digest of its line without the signature."""
    return digest(Context.TO_SIGN, canonical.dumps(_plain(replace(entry, signature=None))))


def _plain(entry: Entry) -> dict[str, Any]:
    value: dict[str, Any] = {
        "condemned": entry.condemned,
        "fenced": entry.fenced,
        "fold": None if entry.fold is None else encode_fold_ref(entry.fold),
        "format": ENTRY_FORMAT,
        "n": entry.number,
        "packs": [[pack.name, pack.nbytes, pack.verifier] for pack in entry.packs],
        "previous": entry.previous.hex(),
        "principal": entry.principal,
        "pushes": entry.pushes,
        "refs": [[ref.model, ref.name, ref.kind, ref.old, ref.new] for ref in entry.refs],
        "replaced": {old: list(new) for old, new in entry.replaced.items()},
        "repository": entry.repository,
        "time": entry.time,
        "versions": [
            [v.model, v.number, v.metadata, v.nbytes, v.digest.hex(), v.decoded_nbytes] for v in entry.versions
        ],
    }
    if entry.by:
        value |= {"by": entry.by, "movers": entry.movers}
    if entry.signers:
        value["signers"] = [key.hex() for key in entry.signers]
    if entry.audit:
        value["audit"] = {name: found.hex() for name, found in entry.audit.items()}
    if entry.signature is not None:
        value["signature"] = {"key": entry.signature.key.hex(), "value": entry.signature.value.hex()}
    return value


def decode_entry(data: bytes, *, number: int, repository: str, previous: bytes | None) -> Entry:
    """Parse entry ``number`` and check that it follows the entry whose digest is ``previous`` (None: not known yet).

    Raises CorruptionError, or UnsupportedFormatError for a field or format that this lamella does not know.
    """
    what = f"entry {number}"
    value = _parse(data, what)
    canonical.conform(value, _ENTRY | {name: _WHERE_NEEDED[name] for name in _WHERE_NEEDED.keys() & value}, what=what)
    if value["n"] != number or value["repository"] != repository:
        raise CorruptionError(f"{what} belongs elsewhere", kind="bad_entry")
    follows = _hex(value["previous"], 32, what)
    if previous is not None and follows != previous:
        raise CorruptionError(f"{what} does not follow entry {number - 1}: the log is broken there", kind="broken_log")
    fold = None if value["fold"] is None else decode_fold_ref(value["fold"], what)
    if fold is not None and fold.number >= number:
        raise CorruptionError(f"{what} names a fold of its own future", kind="bad_entry")
    refs = []
    for row in value["refs"]:
        canonical.conform(row, (str, str, str, {int, None}, {int, None}), what=f"a ref of {what}")
        if row[2] not in get_args(RefKind):
            raise UnsupportedFormatError(f"{what} has a ref of kind {row[2]!r}: upgrade lamella")
        refs.append(RefChange(*row))
        check_named(row[0], row[3], row[4], ref=row[1], what=what, kind="bad_entry")
    versions = tuple(
        VersionAdded(model, at, metadata, nbytes, _hex(text, 32, what), decoded_nbytes)
        for model, at, metadata, nbytes, text, decoded_nbytes in value["versions"]
    )
    for version in versions:
        metadata_version(version.metadata)
        check_named(version.model, version.number, what=what, kind="bad_entry")
    packs = tuple(PackAdded(*row) for row in value["packs"])
    for pack in packs:
        if pack.verifier not in (VERIFIED_BY_STORE, VERIFIED_BY_WRITER):
            raise UnsupportedFormatError(f"{what} has a pack verified by {pack.verifier!r}: upgrade lamella")
    for name in (
        *(pack.name for pack in packs),
        *value["condemned"],
        *value["replaced"],
        *(new for names in value["replaced"].values() for new in names),
    ):
        parse_pack_name(name)
    for push in (*value["pushes"], *value["fenced"]):
        _hex(push, 16, what)
    by, movers = tuple(value.get("by", ())), tuple(value.get("movers", ()))
    if ("by" in value) != ("movers" in value) or (
        "by" in value
        and (
            len(by) != len(value["pushes"])
            or set(by) <= {value["principal"]}
            or len(movers) != len(refs)
            or any(at >= len(by) for at in movers)
        )
    ):
        raise CorruptionError(f"{what} does not say who asked for each of its changes", kind="bad_entry")
    audit = {name: _hex(text, 32, what) for name, text in value.get("audit", {}).items()}
    for name in audit:
        audit_number(name)
    if "audit" in value and not audit:
        raise CorruptionError(f"{what} vouches for no audit segment, but says that it does", kind="bad_entry")
    signature = None
    if "signature" in value:
        parts = value["signature"]
        signature = Signature(_hex(parts["key"], 32, what), _hex(parts["value"], 64, what))
    return Entry(
        repository=repository,
        number=number,
        previous=follows,
        fold=fold,
        refs=tuple(refs),
        versions=versions,
        packs=packs,
        replaced={old: tuple(new) for old, new in value["replaced"].items()},
        condemned=tuple(value["condemned"]),
        fenced=tuple(map(PushId, value["fenced"])),
        pushes=tuple(map(PushId, value["pushes"])),
        principal=value["principal"],
        by=by,
        movers=movers,
        time=value["time"],
        signers=decode_signers(value["signers"], what=what, kind="bad_entry") if "signers" in value else (),
        signature=signature,
        audit=audit,
    )


def encode_fold_ref(fold: FoldRef) -> dict[str, Any]:
    """Return a fold reference as JSON."""
    return {"digest": fold.digest.hex(), "name": fold.name, "nbytes": fold.nbytes, "start": fold.start}


def decode_fold_ref(value: Any, what: str) -> FoldRef:
    """Parse a fold reference; raises CorruptionError."""
    canonical.conform(value, _FOLD, what=f"the fold of {what}")
    fold = FoldRef(value["name"], value["start"], value["nbytes"], _hex(value["digest"], 32, what))
    fold_number(fold.name)
    if fold.nbytes > MAX_BLOCK_NBYTES:
        raise CorruptionError(f"{what} names a fold with a root that cannot be so long", kind="bad_entry")
    return fold


_SEAL_NBYTES = 2 + 2 * DIGEST_NBYTES  # a line feed, the digest in hex, a line feed


def _sealed(value: dict[str, Any]) -> bytes:
    line = canonical.dumps(value)
    return line + _seal(line)


def _seal(line: bytes) -> bytes:
    return f"\n{digest(Context.ENTRY, line).hex()}\n".encode()


def _parse(data: bytes, what: str) -> dict[str, Any]:
    if len(data) > MAX_ENTRY_NBYTES:
        raise CorruptionError(f"{what} is longer than {MAX_ENTRY_NBYTES} bytes", kind="bad_entry")
    line = data[:-_SEAL_NBYTES]
    if data[-_SEAL_NBYTES:] != _seal(line):
        raise CorruptionError(f"{what} is not what was written: restore it from a copy", kind="bad_digest")
    value = canonical.loads(line, what=what)
    if not isinstance(value, dict):
        raise CorruptionError(f"{what} is no entry", kind="bad_entry")
    if value.get("format") != ENTRY_FORMAT:
        raise UnsupportedFormatError(f"{what} has format {value.get('format')!r}: upgrade lamella")
    return value


def _hex(text: str, nbytes: int, what: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != nbytes or value.hex() != text:
        raise CorruptionError(f"{what} has {text[:80]!r} where {nbytes} bytes in hex belong", kind="bad_entry")
    return value
