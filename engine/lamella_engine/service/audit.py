"""Who did what: reads are noted in chained segments that the log vouches for; what was changed, the log says itself."""

import logging
import secrets
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate

from lamella_engine.content_store.log import Log
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.errors import (
    AlreadyExistsError,
    CorruptionError,
    LamellaError,
    NotFoundError,
    StorageError,
    UnsupportedFormatError,
)
from lamella_engine.format.audit import (
    MAX_SEGMENT_NBYTES,
    Read,
    decode_segment,
    encode_read,
    encode_segment,
    segment_digest,
)
from lamella_engine.format.entry import Entry
from lamella_engine.format.names import audit_name, audit_number, metadata_push
from lamella_engine.maintenance import Problem

logger = logging.getLogger("lamella.service")

SEGMENT_READS = 1000
SEGMENT_S = 60.0
"""A segment is written when it has so many reads, or is so old: what a crash loses is not more."""

# Reads that may wait where the store takes no segment: then reading ends, rather than being forgotten.
_MOST_WAITING = 10 * SEGMENT_READS

# Characters kept of each text, so that a read takes a few KB at most.
_MOST_TEXT = 200

_SEGMENT_NBYTES = MAX_SEGMENT_NBYTES - 4096
"""Bytes of the reads of a segment; the rest is more than its first line takes."""


class ReadAudit:
    """Notes the reads of one repository, for one server process. Safe for several threads.

    It outlives the store that it is made with, which may be closed and opened again.
    """

    def __init__(self, store: PackedStore) -> None:
        self._objects = store.objects
        self._repository = store.log.state.genesis.repository
        self._log = weakref.ref(store.log)
        self._server = secrets.token_hex(8)
        self._reads: list[bytes] = []
        self._oldest = 0.0
        self._written: tuple[str, bytes] | None = None
        """Name and digest of the newest segment."""
        self._unsure: tuple[bytes, int] | None = None
        """A segment that may be in the store already, so that nothing else can have its name, and its reads."""
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    def go_on(self, log: Log) -> None:
        """Have the next entry of ``log``, which may have been opened since, vouch for what was noted."""
        if self._log() is not log:
            with self._writing:
                self._log = weakref.ref(log)
                if self._written is not None:
                    log.carry(*self._written, instead_of=None)

    def note(self, read: Read) -> None:
        """Note a read; writes a segment if one is full.

        Raises StorageError (``audit_full``) if far too many wait because the store takes none.
        """
        line = encode_read(Read(**{name: _plain(text) for name, text in asdict(read).items()}))
        with self._lock:
            if len(self._reads) >= _MOST_WAITING:
                raise StorageError(
                    "nothing can be read while it cannot be noted: try again later", kind="audit_full", transient=True
                )
            if not self._reads:
                self._oldest = time.monotonic()
            self._reads.append(line)
            full = len(self._reads) % SEGMENT_READS == 0
        if full:
            self.flush()

    def flush(self, *, older_than_s: float = 0.0) -> None:
        """Write the reads that wait, if the first of them has waited so long. What cannot be written waits on."""
        with self._writing:
            while True:
                with self._lock:
                    due = self._reads and time.monotonic() - self._oldest >= older_than_s
                    sizes = accumulate(map(len, self._reads[:SEGMENT_READS]))
                    reads = [line for line, size in zip(self._reads, sizes, strict=False) if size <= _SEGMENT_NBYTES]
                if not due:
                    return
                try:
                    written = self._write(reads)
                except LamellaError as error:
                    logger.warning("reads of a repository are not noted yet: %s", error)
                    return
                with self._lock:
                    del self._reads[:written]
                    self._oldest = time.monotonic()

    def _write(self, reads: list[bytes]) -> int:
        number = 0 if self._written is None else audit_number(self._written[0])[1] + 1
        previous = None if self._written is None else self._written[1]
        if self._unsure is None:
            self._unsure = encode_segment(reads, repository=self._repository, previous=previous), len(reads)
        data, count = self._unsure
        name = audit_name(self._server, number)
        try:
            self._objects.put_if_absent(name, [data])
        except AlreadyExistsError:
            logger.debug("%s was written, though nobody said so", name)
        digest = segment_digest(data)
        if (log := self._log()) is not None:
            log.carry(name, digest, instead_of=None if self._written is None else self._written[0])
        self._written, self._unsure = (name, digest), None
        return count


def _plain(text: str) -> str:
    return text[:_MOST_TEXT].encode(errors="replace").decode()


@dataclass(frozen=True, slots=True)
class Act:
    """What somebody changed by one entry of the log."""

    number: int
    """Of the entry."""
    time: str
    principal: str
    signer: str
    """Public key that signed the entry, in hex; empty for none."""
    did: tuple[str, ...]
    """A line for each change."""


@dataclass(slots=True)
class Account:
    """What a repository says of who did what, and whether that holds together."""

    acts: list[Act] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    """By process, each in its order."""
    unvouched: int = 0
    """Reads at the ends of chains, for which no entry vouches yet: if some are gone, nobody can tell."""
    problems: list[Problem] = field(default_factory=list)


def account(store: PackedStore) -> Account:
    """List who did what, and check it: the log from its first entry, and every audit segment.

    A segment that is wrong is a problem. Raises CorruptionError if the log itself is.
    """
    found = Account()
    vouched: dict[str, bytes] = {}
    for _, entry, _ in store.log.history():
        found.acts += _acts(entry)
        for name, digest in entry.audit.items():
            if vouched.setdefault(name, digest) != digest:
                found.problems.append(Problem("bad_audit", "the log vouches for two of this name", name))
    chains: defaultdict[str, _Chain] = defaultdict(_Chain)
    for name in vouched:
        server, number = audit_number(name)
        chains[server].vouched.add(number)
    for info in store.objects.list("audit/"):
        try:
            server, number = audit_number(info.name)
        except CorruptionError as error:
            found.problems.append(Problem(error.kind, error.message, info.name))
        else:
            chains[server].there.add(number)
    for server, chain in sorted(chains.items()):
        _follow(store, server, chain, vouched, found)
    return found


@dataclass(slots=True)
class _Chain:
    """Numbers of the segments of one process: of those that the log vouches for, and of those that are stored."""

    vouched: set[int] = field(default_factory=set)
    there: set[int] = field(default_factory=set)


def _follow(store: PackedStore, server: str, chain: _Chain, vouched: dict[str, bytes], found: Account) -> None:
    last = max(chain.vouched, default=-1)
    previous: bytes | None = None
    for number in range(max(last, *chain.there, -1) + 1):
        name = audit_name(server, number)
        try:
            reads, previous = _segment(store, name, previous, vouched.get(name))
        except (CorruptionError, UnsupportedFormatError) as error:
            found.problems.append(Problem(error.kind, error.message, name))
            return  # whatever follows, nothing says that it followed what was there
        found.reads += reads
        found.unvouched += len(reads) if number > last else 0


def _segment(store: PackedStore, name: str, previous: bytes | None, expected: bytes | None) -> tuple[list[Read], bytes]:
    """Return the reads of a segment, and its digest, which is to be the one ``expected`` if the log vouches for one."""
    try:
        data = store.objects.get(name)
    except NotFoundError:
        raise CorruptionError(f"{name} is missing, though later ones were written", kind="bad_audit") from None
    reads = decode_segment(data, name=name, repository=store.log.state.genesis.repository, previous=previous)
    found = segment_digest(data)
    if expected not in (None, found):
        raise CorruptionError(f"{name} is not the one that the log vouches for", kind="bad_audit")
    return reads, found


def _acts(entry: Entry) -> Iterator[Act]:
    """Yield what each principal did by an entry."""
    did: defaultdict[str, list[str]] = defaultdict(list)
    by = dict(zip(entry.pushes, entry.by, strict=False))
    for at, ref in enumerate(entry.refs):
        who = entry.by[entry.movers[at]] if entry.by else entry.principal
        did[who].append(f"{ref.kind} {ref.model}@{ref.name}: {_version(ref.old)} -> {_version(ref.new)}")
    for version in entry.versions:
        who = by.get(metadata_push(version.metadata), entry.principal)
        did[who].append(f"recorded {version.model}@v{version.number} ({version.id[:12]})")
    whole = did[entry.principal]
    whole += [f"condemned {name}" for name in entry.condemned]
    whole += [f"replaced {name}" for name in entry.replaced]
    whole += [f"fenced off push {push}" for push in entry.fenced]
    whole += [f"let {key.hex()} sign" for key in entry.signers]
    signer = "" if entry.signature is None else entry.signature.key.hex()
    for who, lines in did.items():
        if lines:
            yield Act(entry.number, entry.time, who, signer, tuple(lines))


def _version(number: int | None) -> str:
    return "nothing" if number is None else f"v{number}"
