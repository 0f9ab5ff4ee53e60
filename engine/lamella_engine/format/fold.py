"""Folds: the state of a repository as sorted tables in immutable blocks (FORMAT.md, "Fold").

A fold is one object: the blocks that changed since the fold before, then a root. Blocks form a tree for each table; a
block names its children by object, place and digest, so those that did not change stay where they were written. Looking
a key up reads one block for each level, and what a new fold writes grows with what changed, not with the repository.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from lamella_engine.errors import CorruptionError, LimitError, UnsupportedFormatError
from lamella_engine.format import canonical
from lamella_engine.format.digests import Context, digest
from lamella_engine.format.names import fold_name, fold_number, metadata_version
from lamella_engine.model import RefKind

FOLD_FORMAT = 0

# A leaf of 2 KiB holds some ten versions: small, because opening a version reads one block on each level of a table or
# two, and each fold writes the last path of most tables again. Inner blocks have a dozen children, so 10,000 versions
# make a tree of four levels.
BLOCK_NBYTES = 2 << 10
MAX_BLOCK_NBYTES = 256 << 10
MAX_HEIGHT = 16
MAX_SIGNERS = 64

_PACK_KEY = re.compile("packs/[0-9a-f]{32}-[0-9]{1,9}-[0-9a-f]{64}")
_DIGEST = re.compile("[0-9a-f]{64}")
_PUSH_KEY = re.compile("[0-9a-f]{32}")

# For each table, what its keys look like and the schema of its rows; keys are text, in code-point order.
_TABLES: Mapping[str, tuple[re.Pattern[str], Any]] = {
    "condemned": (_PACK_KEY, int),
    "fenced": (_PUSH_KEY, int),
    "packs": (_PACK_KEY, (int, str)),
    "pushes": (_PUSH_KEY, int),
    "refs": (re.compile("[^ ]+ [^ ]+"), (str, int)),
    "replaced": (_PACK_KEY, [str]),
    "versions": (re.compile("[^ ]+ [0-9]{20}"), (str, int, str, int)),
}

TABLES = tuple(_TABLES)
"""Every fold has these tables. Rows are in FORMAT.md."""


@dataclass(frozen=True, slots=True)
class BlockRef:
    """Where a block lies."""

    object: str
    start: int
    nbytes: int
    digest: bytes
    height: int
    """0 for a leaf."""
    table: str

    def row(self) -> list[Any]:
        """Return the place as JSON; height and table are the parent's to know."""
        return [self.object, self.start, self.nbytes, self.digest.hex()]


@dataclass(frozen=True, slots=True)
class FoldRoot:
    """The state after entry ``number``, by reference."""

    repository: str
    number: int
    entry: bytes
    """Digest of entry ``number``."""
    tables: Mapping[str, BlockRef | None]
    """The top block of each table; None for an empty one."""
    signers: tuple[bytes, ...] = ()
    """Public keys, one of which must sign every entry after this one; empty if none need be signed."""


Rows = list[tuple[str, Any]]
"""Rows of a leaf, or first key and place of each child of an inner block; keys ascend strictly."""

Load = Callable[[BlockRef], Rows]
"""How the tree is read: gives the checked rows of a block."""


def parse_block(data: bytes, ref: BlockRef) -> Rows:
    """Parse the bytes of the block at ``ref``; raises CorruptionError."""
    what = f"a block of {ref.object}"
    if digest(Context.FOLD, data) != ref.digest:
        raise CorruptionError(f"{what} is not the one its parent names", kind="bad_digest", object=ref.object)
    value = canonical.loads(data, what=what)
    canonical.conform(value, [(str, object)], what=what)
    if not value or any(left[0] >= right[0] for left, right in pairwise(value)):
        raise CorruptionError(f"{what} is not in order", kind="bad_fold", object=ref.object)
    if ref.height:
        return [(key, _child(item, ref.height - 1, ref.table, ref.object)) for key, item in value]
    for key, row in value:
        _check_row(ref.table, key, row, what)
    return [(key, row) for key, row in value]


def _check_row(table: str, key: str, row: Any, what: str) -> None:
    key_pattern, schema = _TABLES[table]
    canonical.conform(row, schema, what=what)
    if table == "refs" and row[0] not in get_args(RefKind):
        raise UnsupportedFormatError(f"{what} has a ref of kind {row[0]!r}: upgrade lamella")
    if table == "versions":
        metadata_version(row[0])
    if key_pattern.fullmatch(key) is None or (table == "versions" and _DIGEST.fullmatch(row[2]) is None):
        raise CorruptionError(f"{what} has a row that cannot be", kind="bad_fold")


def lookup(top: BlockRef | None, key: str, load: Load) -> Any | None:
    """Return the row of ``key``, or None."""
    if top is None:
        return None
    rows, end = load(top), None
    for height in range(top.height, -1, -1):
        at = bisect_right(rows, key, key=_key) - 1
        if at < 0:
            return None
        if height == 0:
            return rows[at][1] if rows[at][0] == key else None
        rows, end = _below(rows, at, end, load)
    return None


def scan(
    top: BlockRef | None, load: Load, *, start: str = "", stop: str | None = None, backwards: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield the rows with ``start`` <= key < ``stop`` in order, or from the last to the first.

    Only blocks that hold them are read, and only when their rows are asked for.
    """

    def visit(rows: Rows, height: int, end: str | None) -> Iterator[tuple[str, Any]]:
        first = max(bisect_right(rows, start, key=_key) - 1, 0)
        last = len(rows) if stop is None else bisect_left(rows, stop, key=_key)
        for at in reversed(range(first, last)) if backwards else range(first, last):
            if height:
                below, below_end = _below(rows, at, end, load)
                yield from visit(below, height - 1, below_end)
            elif rows[at][0] >= start:
                yield rows[at]

    if top is not None:
        yield from visit(load(top), top.height, None)


def _below(rows: Rows, at: int, end: str | None, load: Load) -> tuple[Rows, str | None]:
    """Return the rows of child ``at`` of an inner block, and the key before which they end (None: nowhere).

    Raises CorruptionError if the child holds keys that are not its own: no block can then stand in a tree twice, and
    no tree takes longer to walk than to write.
    """
    key, ref = rows[at]
    if at + 1 < len(rows):
        end = rows[at + 1][0]
    below = load(ref)
    if below[0][0] != key or (end is not None and below[-1][0] >= end):
        raise CorruptionError(
            f"a block of {ref.object} holds keys of its neighbours", kind="bad_fold", object=ref.object
        )
    return below, end


def _key(row: tuple[str, Any]) -> str:
    return row[0]


class FoldWriter:
    """Builds one fold: takes changes for each table, collects new blocks, ends with the root.

    Parameters
    ----------
    load
        Reads blocks of earlier folds.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._blocks: list[bytes] = []
        self._nbytes = 0
        self._tables: dict[str, _Pending | BlockRef | None] = {}

    def update(self, table: str, top: BlockRef | None, changes: Mapping[str, Any]) -> None:
        """Set the rows of ``table``: those under ``top``, with each change made (None deletes a row)."""
        ordered = sorted(changes.items())
        if not ordered:
            self._tables[table] = top
            return
        if top is None:
            nodes = self._split(_present(ordered), 0)
        else:
            nodes = self._merge(self._load(top), top.height, None, ordered)
        while len(nodes) > 1:
            nodes = self._split([(key, ref) for key, ref in nodes], nodes[0][1].height + 1)
        self._tables[table] = nodes[0][1] if nodes else None

    def _merge(
        self, rows: Rows, height: int, end: str | None, changes: Rows
    ) -> list[tuple[str, "_Pending | BlockRef"]]:
        if height == 0:
            merged = dict(rows) | dict(changes)
            return self._split(_present(sorted(merged.items())), 0)
        children: list[tuple[str, Any]] = []
        for at, (key, child) in enumerate(rows):
            next_key = rows[at + 1][0] if at + 1 < len(rows) else None
            mine = [
                change
                for change in changes
                if (at == 0 or change[0] >= key) and (next_key is None or change[0] < next_key)
            ]
            if mine:
                below, below_end = _below(rows, at, end, self._load)
                children += self._merge(below, height - 1, below_end, mine)
            else:
                children.append((key, child))
        # All children are of one height: one whose rows were all deleted is simply gone.
        return self._split(children, height)

    def _split(self, rows: Rows, height: int) -> list[tuple[str, "_Pending | BlockRef"]]:
        """Cut rows into new blocks of at most BLOCK_NBYTES, and return their first keys and places.

        A leaf has at least one row and an inner block two, however long they are: so every level has fewer blocks.
        """
        least = 2 if height else 1
        nodes: list[tuple[str, _Pending | BlockRef]] = []
        encoded = [canonical.dumps([key, item.row() if height else item]) for key, item in rows]
        first = nbytes = 0
        for at in range(len(rows) + 1):
            if at < len(rows) and (at - first < least or nbytes + len(encoded[at]) < BLOCK_NBYTES):
                nbytes += len(encoded[at]) + 1
                continue
            if at > first:
                nodes.append((rows[first][0], self._add(b"[" + b",".join(encoded[first:at]) + b"]", height)))
            if at < len(rows):
                first, nbytes = at, len(encoded[at]) + 1
        return nodes

    def _add(self, block: bytes, height: int) -> "_Pending":
        if len(block) > MAX_BLOCK_NBYTES:
            raise LimitError("a row of a fold is longer than a block may be", kind="fold_limit")
        ref = _Pending(self._nbytes, len(block), digest(Context.FOLD, block), height)
        self._blocks.append(block)
        self._nbytes += len(block)
        return ref

    def finish(
        self, *, repository: str, number: int, entry: bytes, signers: Sequence[bytes] = ()
    ) -> tuple[str, list[bytes], int, bytes]:
        """Return the fold's name, the parts of its object, where its root starts, and the root's digest."""
        root = canonical.dumps(
            {
                "entry": entry.hex(),
                "format": FOLD_FORMAT,
                "n": number,
                "repository": repository,
                "tables": {
                    table: None if (top := self._tables.get(table)) is None else [*top.row(), top.height]
                    for table in TABLES
                },
            }
            | ({"signers": [key.hex() for key in signers]} if signers else {})
        )
        root_digest = digest(Context.FOLD, root)
        return fold_name(number, root_digest), [*self._blocks, root], self._nbytes, root_digest


@dataclass(frozen=True, slots=True)
class _Pending:
    """A block of the fold that is being written, whose object has no name yet."""

    start: int
    nbytes: int
    digest: bytes
    height: int

    def row(self) -> list[Any]:
        return ["", self.start, self.nbytes, self.digest.hex()]


def _present(rows: Iterable[tuple[str, Any]]) -> Rows:
    return [(key, item) for key, item in rows if item is not None]


_ROOT = {"entry": str, "format": int, "n": int, "repository": str, "tables": dict.fromkeys(TABLES, object)}

_WHERE_NEEDED: dict[str, Any] = {"signers": [str]}
"""Fields that stand only in roots which they tell something of."""


def parse_root(data: bytes, *, name: str, expected: bytes, repository: str) -> FoldRoot:
    """Parse the root of the fold called ``name`` whose digest is ``expected``; raises CorruptionError."""
    what = f"the root of {name}"
    if digest(Context.FOLD, data) != expected or fold_name(fold_number(name), expected) != name:
        raise CorruptionError(f"{what} is not the one the log names", kind="bad_digest", object=name)
    value = canonical.loads(data, what=what)
    if not isinstance(value, dict):
        raise CorruptionError(f"{what} is no root", kind="bad_field", object=name)
    if value.get("format") != FOLD_FORMAT:
        raise UnsupportedFormatError(f"{what} has format {value.get('format')!r}: upgrade lamella")
    canonical.conform(value, _ROOT | {name: _WHERE_NEEDED[name] for name in _WHERE_NEEDED.keys() & value}, what=what)
    if value["n"] != fold_number(name) or value["repository"] != repository:
        raise CorruptionError(f"{what} belongs elsewhere", kind="bad_fold", object=name)
    if _DIGEST.fullmatch(value["entry"]) is None:
        raise CorruptionError(f"{what} names no entry", kind="bad_fold", object=name)
    tables: dict[str, BlockRef | None] = {}
    for table, top in value["tables"].items():
        if top is None:
            tables[table] = None
            continue
        canonical.conform(top, (str, int, int, str, int), what=what)
        tables[table] = _child(top[:4], top[4], table, name)
    signers = decode_signers(value["signers"], what=what, kind="bad_fold") if "signers" in value else ()
    return FoldRoot(repository, value["n"], bytes.fromhex(value["entry"]), tables, signers)


def decode_signers(value: Sequence[str], *, what: str, kind: str) -> tuple[bytes, ...]:
    """Parse the public keys that may sign entries; raises CorruptionError of this kind."""
    ordered = all(a < b for a, b in pairwise(value))
    if not (0 < len(value) <= MAX_SIGNERS and ordered and all(map(_DIGEST.fullmatch, value))):
        raise CorruptionError(f"{what} lists signers that cannot be", kind=kind)
    return tuple(map(bytes.fromhex, value))


def _child(value: Any, height: int, table: str, parent: str) -> BlockRef:
    what = f"a block of {parent}"
    canonical.conform(value, (str, int, int, str), what=what)
    name, start, nbytes, text = value
    fold_number(name or parent)
    if height > MAX_HEIGHT or nbytes > MAX_BLOCK_NBYTES or _DIGEST.fullmatch(text) is None:
        raise CorruptionError(f"{what} names a block that cannot be", kind="bad_fold", object=parent)
    return BlockRef(name or parent, start, nbytes, bytes.fromhex(text), height, table)
