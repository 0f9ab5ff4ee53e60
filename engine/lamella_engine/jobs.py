"""What is done to a whole repository, where its bytes lie: here, or behind a service."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from lamella_engine import maintenance
from lamella_engine.auditing import Act, NotedRead, audit, stored
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.distance import Distance, measure
from lamella_engine.executor import Executor
from lamella_engine.heads import Head
from lamella_engine.maintenance import Problem, Verification
from lamella_engine.model import VersionId
from lamella_engine.reading import Reader, Selection

OBJECT_DIRECTORIES = ("audit", "fold", "log", "meta", "packs", "sessions")
"""Every object of a repository lies in one of these."""


@dataclass(frozen=True, slots=True)
class Stats:
    """How large a repository is."""

    __module__ = "lamella"

    models: int
    versions: int
    packs: int
    decoded_nbytes: int
    """Bytes of the tensors of all versions, as if each were kept by itself."""
    stored_nbytes: int
    """Bytes of every object: blobs, indexes, manifests, log, folds. Derived indexes are left out."""

    @property
    def ratio(self) -> float:
        """Decoded bytes for each stored one."""
        return self.decoded_nbytes / self.stored_nbytes


@dataclass(frozen=True, slots=True)
class Diff:
    """Which tensors of version b differ from version a, by name."""

    __module__ = "lamella"

    added: tuple[str, ...]
    """In b only."""
    removed: tuple[str, ...]
    """In a only."""
    reshaped: tuple[str, ...]
    """Of another shape or dtype."""
    changed: tuple[str, ...]
    """Of equal shape and dtype, with other bytes."""
    same: tuple[str, ...]


class Jobs(Protocol):
    """Work on one repository, wherever it runs. Safe for several threads."""

    def stats(self) -> Stats:
        """Return how large the repository is; lists every object."""

    def diff(self, a: VersionId, b: VersionId) -> Diff:
        """Say which tensors differ between two versions; reads no weights."""

    def distance(self, a: VersionId, b: VersionId, selection: Selection) -> Distance:
        """See :func:`lamella_engine.distance.measure`."""

    def verify(self, *, deep: bool, doubtful: bool) -> Verification:
        """See :func:`lamella_engine.maintenance.verify`."""

    def audit(self) -> Iterator[Act | NotedRead | Problem]:
        """See :func:`lamella_engine.auditing.audit`; what was seen of the repository before is known."""

    def signers(self) -> tuple[bytes, ...]:
        """Return the public keys, one of which must sign the next entry; none if it need not be signed."""

    def require_signed(self, keys: Sequence[bytes]) -> tuple[bytes, ...]:
        """See :meth:`lamella_engine.content_store.packed.PackedStore.require_signed`."""


class LocalJobs:
    """:class:`Jobs` in this process.

    Parameters
    ----------
    store
        The repository.
    executor
        Runs what is done for each chunk.
    seen
        Entries of its log that this user has seen before.
    """

    def __init__(self, store: PackedStore, executor: Executor, *, seen: Collection[Head] = ()) -> None:
        self._store = store
        self._executor = executor
        self._seen = tuple(seen)

    def stats(self) -> Stats:
        """See :class:`Jobs`."""
        state = self._store.log.refresh()
        decoded = [version.decoded_nbytes for version in state.versions()]
        infos = (info for name in OBJECT_DIRECTORIES for info in self._store.objects.list(f"{name}/"))
        return Stats(
            models=len(state.models()),
            versions=len(decoded),
            packs=sum(1 for _ in state.packs()),
            decoded_nbytes=sum(decoded),
            stored_nbytes=sum(info.nbytes for info in infos),
        )

    def diff(self, a: VersionId, b: VersionId) -> Diff:
        """See :class:`Jobs`."""
        left, right = self._store.manifest(a), self._store.manifest(b)
        ours = {spec.name: spec for spec in left.specs()}
        theirs = {spec.name: spec for spec in right.specs()}
        both = sorted(ours.keys() & theirs.keys())
        alike = [name for name in both if ours[name] == theirs[name]]
        equal = {
            name
            for name in alike
            if all(one.content == other.content for one, other in zip(left.rows(name), right.rows(name), strict=True))
        }
        return Diff(
            added=tuple(sorted(theirs.keys() - ours.keys())),
            removed=tuple(sorted(ours.keys() - theirs.keys())),
            reshaped=tuple(name for name in both if ours[name] != theirs[name]),
            changed=tuple(name for name in alike if name not in equal),
            same=tuple(name for name in alike if name in equal),
        )

    def distance(self, a: VersionId, b: VersionId, selection: Selection) -> Distance:
        """See :class:`Jobs`."""
        return measure(Reader(self._store, self._executor), a, b, selection)

    def verify(self, *, deep: bool, doubtful: bool) -> Verification:
        """See :class:`Jobs`."""
        return maintenance.verify(self._store, deep=deep, doubtful=doubtful)

    def audit(self) -> Iterator[Act | NotedRead | Problem]:
        """See :class:`Jobs`."""
        return audit(partial(stored, self._store.objects), (*self._seen, self._store.log.refresh().head))

    def signers(self) -> tuple[bytes, ...]:
        """See :class:`Jobs`."""
        return self._store.log.refresh().signers

    def require_signed(self, keys: Sequence[bytes]) -> tuple[bytes, ...]:
        """See :class:`Jobs`."""
        return self._store.require_signed(keys)
