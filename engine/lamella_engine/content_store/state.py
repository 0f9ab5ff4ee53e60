"""The state of a repository: what the entries of its log, up to one of them, add up to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from heapq import merge
from typing import Any

from lamella_engine.errors import CorruptionError, NotFoundError
from lamella_engine.format import fold as folds
from lamella_engine.format.entry import (
    VERIFIED_BY_STORE,
    VERIFIED_BY_WRITER,
    Entry,
    FoldRef,
    Genesis,
    PackAdded,
    VersionAdded,
)
from lamella_engine.heads import Head
from lamella_engine.model import PushId, RefKind
from lamella_engine.objects import Objects


@dataclass(frozen=True, slots=True)
class Ref:
    """Where a ref stands."""

    kind: RefKind
    number: int


class Blocks:
    """Reads the blocks of folds, and keeps them: they never change. Safe for several threads."""

    KEPT = 1024
    """Blocks kept in memory: with their rows parsed, some 10 MB."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._rows: dict[folds.BlockRef, folds.Rows] = {}

    def load(self, ref: folds.BlockRef) -> folds.Rows:
        """Return the rows of a block; raises CorruptionError if it is missing or damaged."""
        rows = self._rows.get(ref)
        if rows is None:
            rows = folds.parse_block(part_of(self._objects, ref.object, ref.start, ref.nbytes), ref)
            if len(self._rows) >= self.KEPT:
                self._rows.clear()
            self._rows[ref] = rows
        return rows


def part_of(objects: Objects, name: str, start: int, nbytes: int) -> bytes:
    """Return bytes of an object that the log names; raises CorruptionError if it is missing or shorter."""
    try:
        return objects.get_range(name, start, start + nbytes)
    except NotFoundError:
        raise CorruptionError(
            f"{name} is missing, though the log names it", kind="missing_object", object=name
        ) from None


@dataclass(frozen=True, slots=True)
class State:
    """What entries 0 to ``number`` add up to: the newest fold, and the few entries after it."""

    genesis: Genesis
    number: int
    digest: bytes
    """Of entry ``number``."""
    blocks: Blocks
    fold: FoldRef | None = None
    root: folds.FoldRoot | None = None
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For each table, the rows set since the fold; None where one was deleted."""
    signers: tuple[bytes, ...] = ()
    """Public keys, one of which must sign the next entry; empty if it need not be signed."""

    @property
    def head(self) -> Head:
        """What is remembered of it outside of the repository."""
        return Head(self.genesis.repository, self.number, self.digest, self.signers)

    def ref(self, model: str, name: str) -> Ref | None:
        """Return where a ref stands, or None if there is none."""
        row = self._get("refs", f"{model} {name}")
        return None if row is None else Ref(row[0], row[1])

    def refs(self, model: str) -> Iterator[tuple[str, Ref]]:
        """Yield the refs of a model by name."""
        for key, row in self._scan("refs", start=f"{model} ", stop=f"{model}!"):
            yield key.partition(" ")[2], Ref(row[0], row[1])

    def models(self) -> list[str]:
        """Return the models that have versions, by name."""
        found: list[str] = []
        start = ""
        while (row := next(self._scan("versions", start=start), None)) is not None:
            model = row[0].partition(" ")[0]
            found.append(model)
            start = f"{model}!"  # the character after the space that ends a model's name
        return found

    def version(self, model: str, number: int) -> VersionAdded | None:
        """Return where a version's metadata lies, or None if the model has no such number."""
        row = self._get("versions", version_key(model, number))
        return None if row is None else _version(version_key(model, number), row)

    def versions(self, model: str = "") -> Iterator[VersionAdded]:
        """Yield the versions of a model (of all models if none is named) by number."""
        start, stop = (f"{model} ", f"{model}!") if model else ("", None)
        for key, row in self._scan("versions", start=start, stop=stop):
            yield _version(key, row)

    def last_number(self, model: str) -> int:
        """Return the highest version number of a model, 0 if it has none."""
        newest = next(self._scan("versions", start=f"{model} ", stop=f"{model}!", backwards=True), None)
        return 0 if newest is None else int(newest[0].partition(" ")[2])

    def pack(self, name: str) -> PackAdded | None:
        """Return the row of a live pack, or None if the pack is not live."""
        row = self._get("packs", name)
        return None if row is None else PackAdded(name, row[0], row[1])

    def packs(self) -> Iterator[PackAdded]:
        """Yield the live packs by name, which is by age, as far as the clocks of their makers agree."""
        for name, row in self._scan("packs"):
            yield PackAdded(name, row[0], row[1])

    def newest_packs(self) -> Iterator[PackAdded]:
        """Yield the live packs, the newest first."""
        for name, row in self._scan("packs", backwards=True):
            yield PackAdded(name, row[0], row[1])

    def was_taken_away(self, pack: str) -> bool:
        """Whether a pack was live once and never will be again."""
        return self._get("condemned", pack) is not None or self._get("replaced", pack) is not None

    def where_is(self, pack: str) -> tuple[str, ...]:
        """Return the packs that hold the blobs of ``pack`` by now: itself, or what has replaced it.

        Raises CorruptionError if packs replace one another in a circle.
        """
        found: dict[str, None] = {}
        seen: set[str] = set()
        waiting = [pack]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            row = self._get("replaced", name)
            if row is None:
                found[name] = None
            else:
                waiting += reversed(row)
        if not found:
            raise CorruptionError(f"{pack} is replaced by packs that it replaces", kind="bad_replacement", object=pack)
        return tuple(found)

    def is_fenced(self, push: PushId) -> bool:
        """Whether a push may not commit any more."""
        return self._get("fenced", push) is not None

    def committed_at(self, push: PushId) -> int | None:
        """Return the number of the entry that commits a push, or None if none does."""
        row = self._get("pushes", push)
        return None if row is None else int(row)

    def table(self, table: str) -> Iterator[tuple[str, Any]]:
        """Yield all rows of a table (see ``format.fold.TABLES``)."""
        return self._scan(table)

    def _get(self, table: str, key: str) -> Any | None:
        changed = self.changes.get(table, {})
        if key in changed:
            return changed[key]
        return None if self.root is None else folds.lookup(self.root.tables[table], key, self.blocks.load)

    def _scan(
        self, table: str, *, start: str = "", stop: str | None = None, backwards: bool = False
    ) -> Iterator[tuple[str, Any]]:
        """Yield the rows with ``start`` <= key < ``stop`` in order, or from the last to the first."""
        changed = self.changes.get(table, {})
        fresh = sorted(
            ((key, row) for key, row in changed.items() if key >= start and (stop is None or key < stop)),
            reverse=backwards,
            key=_key,
        )
        top = None if self.root is None else self.root.tables[table]
        folded = folds.scan(top, self.blocks.load, start=start, stop=stop, backwards=backwards)
        kept = (item for item in folded if item[0] not in changed)
        return (item for item in merge(fresh, kept, key=_key, reverse=backwards) if item[1] is not None)

    def check(self, entry: Entry) -> None:
        """Raise CorruptionError if no writer would have added ``entry`` to this state.

        More than readers need: it looks up what an entry adds, which costs reads that opening must not pay for.
        """
        added = {(version.model, version.number) for version in entry.versions}
        live = {pack.name for pack in entry.packs}
        for version in entry.versions:
            if self.version(version.model, version.number) is not None or len(added) != len(entry.versions):
                raise _contradiction(entry, f"records {version.model}@v{version.number} once more")
        for pack in entry.packs:
            there = self.pack(pack.name)
            if there is not None and (there.verifier, pack) != (VERIFIED_BY_WRITER, _verified(there)):
                raise _contradiction(entry, f"adds {pack.name} once more")
        for name in (*entry.condemned, *entry.replaced):
            if self.pack(name) is None:
                raise _contradiction(entry, f"takes {name} away, which is not live")
        for new in (name for names in entry.replaced.values() for name in names):
            if self.pack(new) is None and new not in live:
                raise _contradiction(entry, f"puts {new} in another's place, which is not live")
        for ref in entry.refs:
            at = self.ref(ref.model, ref.name)
            if at is not None and (at.kind != ref.kind or (at.kind == "tag" and ref.new is not None)):
                raise _contradiction(entry, f"makes something else of the {at.kind} {ref.model}@{ref.name}")
            if not ((ref.model, ref.new) in added or ref.new is None or self.version(ref.model, ref.new) is not None):
                raise _contradiction(entry, f"moves {ref.model}@{ref.name} to v{ref.new}, which is not there")

    def after(self, entry: Entry, digest: bytes) -> "State":
        """Return the state with one more entry; raises CorruptionError if the entry contradicts this state."""
        changes = {table: dict(rows) for table, rows in self.changes.items()}

        def put(table: str, key: str, row: Any) -> None:
            changes.setdefault(table, {})[key] = row

        for ref in entry.refs:
            at = self.ref(ref.model, ref.name)
            if (None if at is None else at.number) != ref.old:
                raise _contradiction(entry, f"moves {ref.model}@{ref.name} from where it is not")
            put("refs", f"{ref.model} {ref.name}", None if ref.new is None else [ref.kind, ref.new])
        for version in entry.versions:
            key = version_key(version.model, version.number)
            put("versions", key, [version.metadata, version.nbytes, version.digest.hex(), version.decoded_nbytes])
        for pack in entry.packs:
            put("packs", pack.name, [pack.nbytes, pack.verifier])
        for old, new in entry.replaced.items():
            put("packs", old, None)
            put("replaced", old, list(new))
        for name in entry.condemned:
            put("packs", name, None)
            put("condemned", name, entry.number)
        for push in entry.fenced:
            put("fenced", push, entry.number)
        for push in entry.pushes:
            put("pushes", push, entry.number)
        return replace(self, number=entry.number, digest=digest, changes=changes, signers=entry.signers or self.signers)


def _verified(pack: PackAdded) -> PackAdded:
    return replace(pack, verifier=VERIFIED_BY_STORE)


def _key(item: tuple[str, Any]) -> str:
    return item[0]


def _contradiction(entry: Entry, what: str) -> CorruptionError:
    return CorruptionError(f"entry {entry.number} {what}: the log is damaged there", kind="broken_log")


def version_key(model: str, number: int) -> str:
    """Return the key of a version in its table: numbers of one model sort by value."""
    return f"{model} {number:020d}"


def _version(key: str, row: Any) -> VersionAdded:
    model, _, number = key.partition(" ")
    return VersionAdded(model, int(number), row[0], row[1], bytes.fromhex(row[2]), row[3])
