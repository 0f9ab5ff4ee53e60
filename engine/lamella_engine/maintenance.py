"""Looking after a repository. Today: verify, which reads everything, and vouches for what only its writer has read."""

import logging
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, TypeVar

from lamella_engine.content_store.acting import acting_as
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.content_store.packs import StoredBlob
from lamella_engine.content_store.state import State
from lamella_engine.errors import (
    CorruptionError,
    LamellaError,
    NotFoundError,
    UnsupportedFormatError,
)
from lamella_engine.format.entry import VERIFIED_BY_WRITER, FoldRef, PackAdded, VersionAdded
from lamella_engine.format.fold import TABLES
from lamella_engine.format.names import log_name
from lamella_engine.reading import Reader
from lamella_engine.version_files import VersionFiles

Result = TypeVar("Result")

logger = logging.getLogger("lamella")

BLOBS_AT_ONCE = 256
"""Blobs whose checks are handed out at a time; each thread holds one payload."""

VOUCHED_AT_ONCE = 64
"""Doubtful packs that are recorded together once they are proven right: 4 GiB, so that others wait for no more, and no
more is read again when a process dies."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be."""

    __module__ = "lamella"

    kind: str
    """The kind of the error that reading it raises."""
    message: str
    where: str
    """The object, or the version as ``model@v<number>``."""


@dataclass(slots=True)
class Verification:
    """What verify looked at and what it found."""

    __module__ = "lamella"

    deep: bool
    entries: int = 0
    versions: int = 0
    packs: int = 0
    blobs: int = 0
    read_nbytes: int = 0
    """Bytes of blobs that were read."""
    problems: list[Problem] = field(default_factory=list)
    vouched: int = 0
    """Packs that any push may stand on from now on: until now nobody but their writers had decoded them."""
    proven: list[str] = field(default_factory=list, repr=False)
    """Names of packs that nobody but their writers had decoded, and that are right: until they are recorded as such."""

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def add_packs(self, found: "Verification") -> None:
        """Add what :func:`verify_packs` found."""
        self.packs += found.packs
        self.blobs += found.blobs
        self.read_nbytes += found.read_nbytes
        self.problems += found.problems
        self.proven += found.proven


CheckPacks: TypeAlias = Callable[[Iterable[PackAdded]], Iterable[Verification]]
"""Checks packs as :func:`verify_packs` does, some at a time and in their order, in this process or in others."""


def verify(
    store: PackedStore, *, deep: bool = False, doubtful: bool = False, check_packs: CheckPacks | None = None
) -> Verification:
    """Check a repository against FORMAT.md, from the log to the last blob.

    Always: the chain of entries, each against the state before it, every fold, every version's metadata, pages and
    parameters id, every cell's copy and everything it stands on, every pack's index and the digest of every blob. With
    ``deep`` every blob is also decoded and its chunk id computed again, and packs that only their writers had decoded
    are recorded as verified, if they are right and this process may write. With ``doubtful`` only those are checked,
    deeply.

    A problem is noted, and what does not depend on it is still checked. Raises CorruptionError only if the log itself
    cannot be read, for then nothing can be said at all.
    """
    report = Verification(deep or doubtful)
    deque(verifying(store, report, doubtful=doubtful, check_packs=check_packs), maxlen=0)
    return report


def verifying(
    store: PackedStore,
    report: Verification,
    *,
    doubtful: bool = False,
    known: Container[str] = (),
    by: str | None = None,
    check_packs: CheckPacks | None = None,
) -> Generator[None]:
    """Do what :func:`verify` does, into ``report``; yield now and then, so that who asks can look at it, or stop.

    Of doubtful packs those that are ``known`` to be wrong are passed over. What has been proven is recorded as it goes,
    and when whoever asks closes this, as done by the principal ``by``, or by this machine's user.
    """
    # A store of its own: what is read must come from where it is stored, not from what this process remembers.
    checker = _Checker(PackedStore(store.objects, store.executor), report)
    if doubtful:
        packs: Iterable[PackAdded] = (pack for pack in doubtful_packs(store.log.refresh()) if pack.name not in known)
    else:
        state = yield from checker.log()
        packs = state.packs()
    try:
        for _ in checker.packs(packs) if check_packs is None else map(report.add_packs, check_packs(packs)):
            yield
            if len(report.proven) >= VOUCHED_AT_ONCE:
                _vouch(store, report, by)
        if not doubtful:
            yield from checker.versions(state)
    finally:
        _vouch(store, report, by)


def _vouch(store: PackedStore, report: Verification, by: str | None) -> None:
    proven, report.proven = report.proven, []
    try:
        with nullcontext() if by is None else acting_as(by):
            report.vouched += store.vouch(proven)
    except LamellaError as error:  # what was found is as true
        logger.warning("packs that are right stay doubtful: %s", error)


def doubtful_packs(state: State) -> Iterator[PackAdded]:
    """Yield the live packs that nobody but their writers has decoded, by name. Looks at all packs."""
    return (pack for pack in state.packs() if pack.verifier == VERIFIED_BY_WRITER)


def verify_packs(store: PackedStore, packs: Iterable[PackAdded], *, deep: bool) -> Verification:
    """Check only the index of each of these packs, and every blob in it with all that it stands on."""
    report = Verification(deep)
    deque(_Checker(PackedStore(store.objects, store.executor), report).packs(packs), maxlen=0)
    return report


class _Checker:
    """Its checks yield now and then."""

    def __init__(self, store: PackedStore, report: Verification) -> None:
        self._store = store
        self._report = report

    def _try(self, where: str, check: Callable[[], Result]) -> Result | None:
        try:
            return check()
        except (CorruptionError, UnsupportedFormatError) as error:
            self._report.problems.append(Problem(error.kind, error.message, where))
        return None

    def log(self) -> Generator[None, None, State]:
        """Rebuild the state from the entries alone, and compare it with what readers see."""
        seen = self._store.log.refresh()
        rebuilt: State | None = None
        for before, entry, state in self._store.log.history():
            yield
            self._report.entries += 1
            self._try(log_name(entry.number), partial(before.check, entry))
            if entry.fold is not None and entry.fold.number == before.number:  # the first entry to name it
                self._try(entry.fold.name, partial(self._fold, entry.fold))
            rebuilt = state
            if entry.number == seen.number:
                break
        if seen.number and (rebuilt is None or rebuilt.number < seen.number):
            missing = 1 if rebuilt is None else rebuilt.number + 1
            self._report.problems.append(Problem("log_gap", "is missing: restore it from a copy", log_name(missing)))
        if rebuilt is None or rebuilt.number < seen.number:
            return seen
        for table in TABLES:
            self._try(f"fold, table {table}", partial(_compare, table, seen, rebuilt))
        if seen.signers != rebuilt.signers:
            self._report.problems.append(Problem("bad_fold", "lists other signers than the entries do", "fold"))
        for model in rebuilt.models():
            for name, ref in rebuilt.refs(model):
                if rebuilt.version(model, ref.number) is None:
                    self._report.problems.append(
                        Problem("missing_version", f"stands at v{ref.number}, which is not there", f"{model}@{name}")
                    )
        self._try("log", lambda: self._store.log.check_tail(self._store.log.refresh()))
        return rebuilt

    def _fold(self, fold: FoldRef) -> None:
        self._check_size(fold.name, fold.start + fold.nbytes)
        self._store.log.check_fold(fold)

    def packs(self, packs: Iterable[PackAdded]) -> Iterator[None]:
        """Check the index of each pack, and every blob in it."""
        for pack in packs:
            self._report.packs += 1
            known = len(self._report.problems)
            self._try(pack.name, partial(self._check_size, pack.name, pack.nbytes))
            index = self._try(pack.name, partial(self._store.packs.index, pack.name))
            if index is None:
                continue
            blobs = [StoredBlob(pack.name, row) for row in index.rows]
            for at in range(0, len(blobs), BLOBS_AT_ONCE):
                yield
                self._blobs(blobs[at : at + BLOBS_AT_ONCE])
            if self._report.deep and pack.verifier == VERIFIED_BY_WRITER and len(self._report.problems) == known:
                self._report.proven.append(pack.name)

    def _blobs(self, blobs: list[StoredBlob]) -> None:
        self._report.blobs += len(blobs)
        self._report.read_nbytes += sum(blob.row.encoded_nbytes for blob in blobs)

        def check(blob: StoredBlob) -> LamellaError | None:
            try:
                self._check_blob(blob)
            except (CorruptionError, UnsupportedFormatError) as error:
                return error
            return None

        for blob, error in zip(blobs, self._store.executor.map(check, blobs), strict=True):
            if error is not None:
                self._report.problems.append(Problem(error.kind, error.message, blob.pack))

    def _check_blob(self, blob: StoredBlob) -> None:
        chain = self._store.reader.chain(blob)
        if self._report.deep:
            self._store.reader.decoded(blob, blob.row.decoded_nbytes, check=True)
        else:
            self._store.packs.payload(chain[-1])

    def versions(self, state: State) -> Iterator[None]:
        """Check that every version can be read: its metadata, its pages, and a live copy for each cell."""
        for added in state.versions():
            yield
            self._report.versions += 1
            self._try(f"{added.model}@v{added.number}", partial(self._version, state, added))

    def _version(self, state: State, added: VersionAdded) -> None:
        self._check_size(added.metadata, added.nbytes)
        version = self._store.reader.open_added(added)
        version.manifest.check()
        named = {live for pack in version.locator.packs for live in state.where_is(pack.name)}
        for row in version.manifest.all_rows():
            if row.chunk is not None:
                self._check_closure(self._store.reader.copy_of_row(version, row), named, state)
        for place in range(len(version.recorded.description.manifest_chunks)):
            self._check_closure(self._store.reader.copy_of_manifest(version, place), named, state)
        VersionFiles(Reader(self._store, self._store.executor), added.id).check()
        for parent in version.recorded.parents:
            row_of_parent = state.version(parent.model, parent.number)
            if row_of_parent is None or row_of_parent.id != parent.id:
                raise CorruptionError(f"its parent {parent.id[:12]} is not in the log", kind="missing_version")

    def _check_closure(self, blob: StoredBlob, named: set[str], state: State) -> None:
        for link in self._store.reader.chain(blob):
            if link.pack not in named:
                raise CorruptionError(f"{link.pack} is not in the closure that the version names", kind="bad_closure")
            if state.pack(link.pack) is None:
                raise CorruptionError(f"{link.pack}, which the version stands on, is not live", kind="missing_pack")

    def _check_size(self, name: str, nbytes: int) -> None:
        try:
            found = self._store.objects.size(name)
        except NotFoundError:
            raise CorruptionError(f"{name} is missing: restore it from a copy", kind="missing_object") from None
        if found != nbytes:
            raise CorruptionError(f"{name} has {found} bytes, not {nbytes}: restore it", kind="bad_length")


def _compare(table: str, seen: State, rebuilt: State) -> None:
    if list(seen.table(table)) != list(rebuilt.table(table)):
        raise CorruptionError(
            "the fold is not what the entries add up to: without the objects below fold/ it is made anew",
            kind="bad_fold",
        )
