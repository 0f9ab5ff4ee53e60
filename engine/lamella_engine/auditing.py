"""Who did what: the log says what was changed, and services note in ``audit/`` what was read.

Objects are taken as they are stored, wherever that is: whoever asks checks the chain of entries, their signatures and
the segments that they vouch for, and need not believe who hands them out. What is held is one object at a time, and a
digest for each segment that the log names.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TypeAlias

from lamella_engine.content_store.trust import Trust
from lamella_engine.errors import CorruptionError, InvalidInputError, NotFoundError, UnsupportedFormatError
from lamella_engine.format.audit import MAX_SEGMENT_NBYTES, Read, decode_segment, segment_digest
from lamella_engine.format.entry import (
    MAX_ENTRY_NBYTES,
    VERIFIED_BY_WRITER,
    Entry,
    decode_entry,
    decode_genesis,
    entry_digest,
)
from lamella_engine.format.names import audit_name, audit_number, log_name, metadata_push
from lamella_engine.heads import Head
from lamella_engine.maintenance import Problem
from lamella_engine.objects import Objects

LOG, SEGMENTS = "log/", "audit/"
"""The directories of what an audit reads."""

STORED_NBYTES = max(MAX_ENTRY_NBYTES, MAX_SEGMENT_NBYTES) + 1
"""So much of an object is read: one that is longer is damaged, whatever follows."""

Stored: TypeAlias = tuple[str, bytes]
"""Name and bytes of an object."""


@dataclass(frozen=True, slots=True)
class Act:
    """What somebody changed by one entry of the log."""

    __module__ = "lamella"

    number: int
    """Of the entry."""
    time: str
    principal: str
    signer: str
    """Public key that signed the entry, in hex; empty for none."""
    did: tuple[str, ...]
    """A line for each change."""


@dataclass(frozen=True, slots=True)
class NotedRead(Read):
    """Something that a service noted: who read or changed what, and from where."""

    __module__ = "lamella"

    vouched: bool
    """Whether an entry of the log vouches for it. Of those for which none does yet, nobody can tell whether others were
    taken away."""


def stored(objects: Objects, after: str) -> Iterator[Stored]:
    """Yield the objects of a directory whose names come after one, by name.

    Raises InvalidInputError unless ``after`` begins with ``log/`` or ``audit/``.
    """
    directory = after.partition("/")[0] + "/"
    if directory not in (LOG, SEGMENTS) or after == directory[:-1]:
        raise InvalidInputError(f"an account is made of what lies in {LOG} and {SEGMENTS}", kind="bad_message")
    for info in objects.list(directory, after=after):
        try:
            yield info.name, objects.get_range(info.name, 0, min(info.nbytes, STORED_NBYTES))
        except NotFoundError:
            continue  # gone since it was listed: whoever checks will miss it


def audit(read: Callable[[str], Iterator[Stored]], known: Iterable[Head]) -> Iterator[Act | NotedRead | Problem]:
    """Yield every act of the log, then every noted read, those of each process in their order, and what is wrong.

    Nothing is checked before it is asked for: only who goes on to the end knows that all is well.

    Parameters
    ----------
    read
        Yields the objects of ``log/`` and ``audit/``, as :func:`stored` does.
    known
        Entries that were seen of this log, whose digests it has to lead to. With one of them the log is known up to
        there, keys that have to sign included.

    Raises
    ------
    CorruptionError
        An entry is not what was written, is not signed as it must be, or does not follow the one before; one is missing
        (``log_gap``); the log ends before one that is known (``rollback``), or has another in its place (``fork``).
    """
    vouched: dict[str, bytes] = {}
    repository = yield from _acts(read(LOG), list(known), vouched)
    yield from _reads(read(SEGMENTS), repository, vouched)


# -- the log -----------------------------------------------------------------------------------------------------------


def _acts(
    entries: Iterator[Stored], known: list[Head], vouched: dict[str, bytes]
) -> Generator[Act | Problem, None, str]:
    """Yield what entries say; enter the segments that they vouch for; return the repository's id."""
    trust = Trust(None, ())
    repository, digest, number = "", b"", -1
    signers: tuple[bytes, ...] = ()
    doubtful: set[str] = set()
    for number, (name, data) in enumerate(entries):
        if name != log_name(number):
            raise CorruptionError(f"entry {number} is missing from the log: restore it from a copy", kind="log_gap")
        if number == 0:
            repository = decode_genesis(data).repository
        else:
            entry = decode_entry(data, number=number, repository=repository, previous=digest)
            trust.check(signers, entry)
            signers = entry.signers or signers
            yield from _acts_of(entry, doubtful)
            yield from _conflicting(entry, vouched)
        digest = entry_digest(data)
        for head in known:
            if number == head.number and (repository, digest) != (head.repository, head.digest):
                raise CorruptionError(
                    f"entry {number} of the log is not the one that was seen before: ask its keeper why",
                    kind="fork",
                    expected=head.digest.hex(),
                    actual=digest.hex(),
                )
    seen = max((head.number for head in known), default=0)
    if number < seen:
        raise CorruptionError(
            f"the log ends before entry {seen}, which was seen: ask its keeper why",
            kind="rollback",
            expected=seen,
            actual=number,
        )
    return repository


def _acts_of(entry: Entry, doubtful: set[str]) -> Iterator[Act]:
    """Yield what each principal did by an entry; keep account of packs that nobody but their writers has decoded."""
    did: defaultdict[str, list[str]] = defaultdict(list)
    by = dict(zip(entry.pushes, entry.by, strict=False))
    for at, ref in enumerate(entry.refs):
        who = entry.by[entry.movers[at]] if entry.by else entry.principal
        did[who].append(f"{ref.kind} {ref.model}@{ref.name}: {_version(ref.old)} -> {_version(ref.new)}")
    for version in entry.versions:
        who = by.get(metadata_push(version.metadata), entry.principal)
        did[who].append(f"recorded {version.model}@v{version.number} ({version.id[:12]})")
    verified = doubtful.intersection(pack.name for pack in entry.packs)
    if verified:
        did[_verifier(entry)].append(f"found {len(verified)} packs right, which only their writers had decoded")
    doubtful -= verified
    doubtful |= {pack.name for pack in entry.packs if pack.verifier == VERIFIED_BY_WRITER}
    whole = did[entry.principal]
    whole += [f"condemned {name}" for name in entry.condemned]
    whole += [f"replaced {name}" for name in entry.replaced]
    whole += [f"fenced off push {push}" for push in entry.fenced]
    whole += [f"let {key.hex()} sign" for key in entry.signers]
    signer = "" if entry.signature is None else entry.signature.key.hex()
    for who, lines in did.items():
        if lines:
            yield Act(entry.number, entry.time, who, signer, tuple(lines))


def _verifier(entry: Entry) -> str:
    """Return who had an entry say that packs are right: of those who share it, whoever did nothing else."""
    recorded = {metadata_push(version.metadata) for version in entry.versions}
    acted = zip(entry.pushes, entry.by, strict=True) if entry.by else ()
    others = {who for at, (push, who) in enumerate(acted) if at not in entry.movers and push not in recorded}
    return ", ".join(sorted(others)) or entry.principal


def _version(number: int | None) -> str:
    return "nothing" if number is None else f"v{number}"


def _conflicting(entry: Entry, vouched: dict[str, bytes]) -> Iterator[Problem]:
    """Enter the segments that an entry vouches for; yield those for which another one vouched otherwise."""
    for name, digest in entry.audit.items():
        if vouched.setdefault(name, digest) != digest:
            yield Problem("bad_audit", "the log vouches for two of this name", name)


# -- segments ----------------------------------------------------------------------------------------------------------


def _reads(segments: Iterator[Stored], repository: str, vouched: dict[str, bytes]) -> Iterator[NotedRead | Problem]:
    """Yield what segments say, in the order of their names."""
    last: dict[str, int] = {}
    for name in vouched:
        writer, number = audit_number(name)
        last[writer] = max(last.get(writer, -1), number)
    for process, chain in groupby(segments, key=lambda item: _process(item[0])):
        if process is None:
            for name, _ in chain:
                yield Problem("bad_object_name", f"{name!r} is not a name that lamella gives", name)
        else:
            yield from _chain(process, chain, last.pop(process, -1), repository, vouched)
    yield from (_missing(audit_name(lost, 0)) for lost in sorted(last))


def _process(name: str) -> str | None:
    """Return the process that wrote a segment, or None if the object can be none."""
    try:
        return audit_number(name)[0]
    except CorruptionError:
        return None


def _chain(
    process: str, segments: Iterator[Stored], last: int, repository: str, vouched: dict[str, bytes]
) -> Iterator[NotedRead | Problem]:
    """Yield what the segments of one process say, for the one with number ``last`` of which the log vouches.

    Ends at the first that is wrong: whatever follows, nothing says that it followed what was there.
    """
    previous: bytes | None = None
    number = -1
    for number, (name, data) in enumerate(segments):
        expected = audit_name(process, number)
        if name != expected:
            yield _missing(expected)
            return
        try:
            reads = decode_segment(data, name=name, repository=repository, previous=previous)
        except (CorruptionError, UnsupportedFormatError) as error:
            yield Problem(error.kind, error.message, name)
            return
        previous = segment_digest(data)
        if vouched.get(name, previous) != previous:
            yield Problem("bad_audit", f"{name} is not the one that the log vouches for", name)
            return
        yield from (NotedRead(**asdict(one), vouched=number <= last) for one in reads)
    if number < last:
        yield _missing(audit_name(process, number + 1))


def _missing(name: str) -> Problem:
    return Problem("bad_audit", f"{name} is missing, though later ones were written", name)
