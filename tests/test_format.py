"""Bytes <-> model: what is written comes back, and whatever else could lie there is refused by name."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella_engine.dtypes import DTYPES, dtype_named
from lamella_engine.errors import CorruptionError, InvalidInputError, LimitError, UnsupportedFormatError
from lamella_engine.format import canonical, fold, manifest, names, pack, version
from lamella_engine.format import entry as entries
from lamella_engine.format.digests import Context, blob_digest, chunk_id, digest
from lamella_engine.format.entry import Entry, FoldRef, Genesis, PackAdded, RefChange, VersionAdded
from lamella_engine.format.fold import TABLES, BlockRef, FoldWriter
from lamella_engine.format.manifest import INLINE_NBYTES, PAGE_NBYTES, CellPage, CellTable, StructurePage
from lamella_engine.format.pack import BlobRow, decode_footer, decode_pack_index, encode_footer, encode_pack_index
from lamella_engine.format.version import AttachmentPages, Description, Locator, PackRef
from lamella_engine.model import ChunkId, PushId, TensorSpec, VersionId

REPOSITORY = "0f" * 16
PUSH = PushId("ab" * 16)
VERSION = VersionId("cd" * 32)
METADATA = f"meta/{VERSION}-{PUSH}-0"
PACK = f"packs/{PUSH}-0-{'12' * 32}"
OTHER_PACK = f"packs/{PUSH}-1-{'34' * 32}"
CHUNK = ChunkId(bytes(range(32)))
OTHER_CHUNK = ChunkId(bytes(range(1, 33)))

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(texts.filter(lambda key: key != "$float"), inner, max_size=4)
    ),
    max_leaves=12,
)


def refuses(error: type[Exception], kind: str, act: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        act()
    assert caught.value.kind == kind


def parts_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every part of a JSON value."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from parts_of(item, (*at, key))


def changed(value: Any, at: tuple[Any, ...], to: Any) -> Any:
    """Return a copy of a JSON value with the part at a path replaced."""
    if not at:
        return to
    value = deepcopy(value)
    inside = value
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = to
    return value


@st.composite
def damage(draw: st.DrawFn, value: Any) -> bytes:
    """Draw canonical bytes of ``value`` with a part replaced by some other JSON, or a key more."""
    at = draw(st.sampled_from(list(parts_of(value))))
    to = draw(
        json_values
        | st.integers(0, 2**80)
        | st.sampled_from(["", "a b", "zz" * 16, "0" * 32, "0" * 64, PACK, METADATA, [], {}, [[]], [0, 0], -1])
    )
    if draw(st.booleans()):
        return canonical.dumps(changed(value, at, to))
    inside = value
    for key in at:
        inside = inside[key]
    if isinstance(inside, dict):
        return canonical.dumps(changed(value, at, {**inside, "later": to}))
    if isinstance(inside, list):
        return canonical.dumps(changed(value, at, [*inside, *inside, to]))
    return canonical.dumps(changed(value, at, [inside]))


def reads_or_refuses(read: Callable[[], Any]) -> None:
    """Whatever is there, reading ends in a value or in one of the two errors that FORMAT.md names."""
    with suppress(CorruptionError, UnsupportedFormatError):
        read()


# -- canonical JSON ----------------------------------------------------------------------------------------------------


@given(value=json_values)
def test_json_comes_back_and_has_one_form(value):
    data = canonical.dumps(value)
    back = canonical.loads(data, what="it")
    assert canonical.dumps(back) == data
    assert repr(back) == repr(sorted_keys(value))


def sorted_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ({"b": 1, "a": [True, False, None], "B": {}}, b'{"B":{},"a":[true,false,null],"b":1}'),
        ('" \\ / \b\f\n\r\t \x00\x1f\x7f é 😀', '"\\" \\\\ / \\b\\f\\n\\r\\t \\u0000\\u001f\x7f é 😀"'.encode()),
        ({"\uffff": 0, "\U00010000": 1}, '{"\uffff":0,"\U00010000":1}'.encode()),
        (
            [1.0, -0.0, 0.1, 1e16, 1e15, 1e-4, 1e-5, 5e-324],
            b"[1.0,-0.0,0.1,1e+16,1000000000000000.0,0.0001,1e-05,5e-324]",
        ),
        ([math.nan, math.inf, -math.inf], b'[{"$float":"NaN"},{"$float":"Infinity"},{"$float":"-Infinity"}]'),
        (-(2**64), b"-18446744073709551616"),
    ],
)
def test_canonical_json_is_these_bytes(value, data):
    assert canonical.dumps(value) == data
    assert repr(canonical.loads(data, what="it")) == repr(sorted_keys(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" 1",
        b"1 ",
        b"1\n",
        b"01",
        b"-0",
        b"1E5",
        b"1.50",
        b"1e999",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b'{"b":1,"a":2}',
        b'{"a":1,"a":1}',
        b'{"a": 1}',
        b'"\\u00e9"',
        b'"\\/"',
        b'"\\ud800"',
        b'"a\nb"',
        b'"\xff"',
        b'\xef\xbb\xbf"bom"',
        b'{"$float":"nan"}',
        b'{"$float":1.0}',
        b'{"$float":[]}',
        b'{"$float":{}}',
        b'{"$float":"NaN","a":1}',
        b"[" * 100_000,
        b"[" * 65 + b"]" * 65,
        b"1" * 5_000,
        b"[1,2",
        b"[1]]",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_what_is_not_canonical_json_is_corruption(data):
    refuses(CorruptionError, "bad_json", lambda: canonical.loads(data, what="it"))


@given(data=st.binary(max_size=40))
def test_bytes_are_canonical_json_or_corruption(data):
    reads_or_refuses(lambda: canonical.loads(data, what="it"))
    reads_or_refuses(lambda: canonical.load_lines(data, what="it"))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({1: 2}, "bad_key"),
        ({"$float": 1}, "bad_key"),
        (b"bytes", "bad_value"),
        ({1, 2}, "bad_value"),
        ("\ud800", "bad_text"),
        ({"\udfff": 1}, "bad_text"),
        ([10**5000], "bad_value"),
    ],
)
def test_what_json_cannot_hold_is_refused_before_it_is_written(value, kind):
    refuses(InvalidInputError, kind, lambda: canonical.dumps(value))


def test_nesting_has_a_limit_on_both_sides():
    deepest: Any = 1
    for _ in range(canonical.MAX_DEPTH - 1):
        deepest = [deepest]
    assert canonical.loads(canonical.dumps(deepest), what="it") == deepest
    refuses(InvalidInputError, "too_deep", lambda: canonical.dumps([deepest]))


@given(values=st.lists(json_values, max_size=5))
def test_lines_come_back(values):
    data = b"".join(canonical.dumps(value) + b"\n" for value in values)
    assert canonical.dumps(canonical.load_lines(data, what="it")) == canonical.dumps(values)


@pytest.mark.parametrize(
    "data", [b"[1]", b"\n", b"[1],[2]\n", b"[1\n2]\n", b"[1]\n\n", b"[1] \n", b"[1]\r\n", b'["a\nb"]\n']
)
def test_lines_have_one_form_too(data):
    refuses(CorruptionError, "bad_json", lambda: canonical.load_lines(data, what="it"))


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        (-1, int),
        (True, int),
        (1.0, int),
        (True, float),
        ("1", float),
        (1, str),
        (1, bool),
        (None, str),
        ([1, "a"], [int]),
        ([1], (int, int)),
        ([1, 2, 3], (int, int)),
        ({}, [int]),
        ([], {"a": int}),
        ({}, {"a": int}),
        ({"a": "b"}, {"a": int}),
        ({"a": "b"}, {str: int}),
        ("b", {int, None}),
    ],
)
def test_a_field_of_another_type_is_corruption(value, schema):
    refuses(CorruptionError, "bad_field", lambda: canonical.conform(value, schema, what="it"))


def test_an_unknown_field_is_of_a_newer_format():
    refuses(
        UnsupportedFormatError,
        "unsupported_format",
        lambda: canonical.conform({"a": 1, "b": 2}, {"a": int}, what="it"),
    )


def test_fields_that_fit_pass():
    value = {"a": [1, 2.5], "b": [["x", True]], "c": None, "d": {"k": 1}, "e": [None]}
    schema = {"a": [float], "b": [(str, bool)], "c": {str, None}, "d": {str: int}, "e": object}
    canonical.conform(value, schema, what="it")


# -- digests and names -------------------------------------------------------------------------------------------------


def test_equal_bytes_of_two_kinds_have_unequal_digests():
    found = {digest(context, b"bytes") for context in Context}
    assert len(found) == len(Context)
    assert chunk_id(b"bytes") == digest(Context.CHUNK, b"bytes")
    assert blob_digest(b"bytes") == digest(Context.BLOB, b"bytes")[:16]


@pytest.mark.parametrize(
    ("parse", "name"),
    [
        (names.log_number, "log/1"),
        (names.log_number, f"log/{'0' * 21}"),
        (names.log_number, f"log/{'٣' * 20}"),
        (names.log_number, f"log/{'0' * 20}\n"),
        (names.fold_number, f"fold/{'9' * 20}-{'0' * 15}"),
        (names.fold_number, f"log/{'9' * 20}-{'0' * 16}"),
        (names.parse_pack_name, PACK.upper()),
        (names.parse_pack_name, PACK[:-1]),
        (names.parse_pack_name, f"packs/{PUSH}--{'12' * 32}"),
        (names.parse_pack_name, f"packs/../{PUSH}-0-{'12' * 32}"),
        (names.metadata_version, METADATA + "x"),
        (names.metadata_version, f"meta/{VERSION}"),
        (names.metadata_version, ""),
    ],
)
def test_a_name_that_lamella_never_gives_is_corruption(parse, name):
    refuses(CorruptionError, "bad_object_name", lambda: parse(name))


def test_names_hold_what_they_were_made_of():
    assert names.log_number(names.log_name(17)) == 17
    assert names.metadata_version(names.metadata_name(VERSION, PUSH, 3)) == VERSION
    assert str(names.parse_pack_name(PACK)) == PACK
    assert names.fold_number(names.fold_name(256, bytes(32))) == 256


@given(numbers=st.lists(st.integers(0, 10**20 - 1), min_size=2, max_size=9, unique=True))
def test_the_newest_fold_is_the_first_of_a_listing_and_the_oldest_entry_too(numbers):
    assert sorted(map(names.log_name, numbers)) == [names.log_name(n) for n in sorted(numbers)]
    listed = sorted(names.fold_name(n, bytes(32)) for n in numbers)
    assert [names.fold_number(name) for name in listed] == sorted(numbers, reverse=True)


# -- log entries -------------------------------------------------------------------------------------------------------

GENESIS = Genesis(REPOSITORY, 8, "2026-11-21T00:00:00.000000Z")
FOLD = FoldRef(names.fold_name(16, b"\x07" * 32), 100, 500, b"\x07" * 32)
ENTRY = Entry(
    repository=REPOSITORY,
    number=17,
    previous=b"\x11" * 32,
    fold=FOLD,
    refs=(RefChange("bert", "main", "branch", 3, 4), RefChange("bert", "old", "tag", 1, None)),
    versions=(VersionAdded("bert", 4, METADATA, 1234, b"\x22" * 32, 10**12),),
    packs=(PackAdded(PACK, 5678, "store"),),
    replaced={PACK: (OTHER_PACK,)},
    condemned=(OTHER_PACK,),
    fenced=(PushId("01" * 16),),
    pushes=(PUSH,),
    principal="somebody",
    time="2026-11-21T00:00:01.000000Z",
)


FULL_ENTRY = replace(
    ENTRY,
    pushes=(PUSH, PushId("02" * 16)),
    by=("somebody", "another"),
    movers=(0, 1),
    signers=(b"\x31" * 32, b"\x32" * 32),
    signature=entries.Signature(b"\x31" * 32, b"\x33" * 64),
    audit={names.audit_name("ab" * 8, 7): b"\x34" * 32},
)
"""With every field that stands only where it is needed."""


def read_entry(data: bytes, previous: bytes | None = ENTRY.previous) -> Entry:
    return entries.decode_entry(data, number=17, repository=REPOSITORY, previous=previous)


def sealed(line: bytes) -> bytes:
    return line + b"\n" + digest(Context.ENTRY, line).hex().encode() + b"\n"


ENTRY_JSON = json.loads(entries.encode_entry(ENTRY).split(b"\n")[0])
GENESIS_JSON = json.loads(entries.encode_genesis(GENESIS).split(b"\n")[0])


FULL_ENTRY_JSON = json.loads(entries.encode_entry(FULL_ENTRY).split(b"\n")[0])


def entry_with(at: tuple[Any, ...], to: Any, value: Any = ENTRY_JSON) -> bytes:
    return sealed(canonical.dumps(changed(value, at, to)))


def genesis_with(at: str, to: Any) -> bytes:
    return sealed(canonical.dumps(GENESIS_JSON | {at: to}))


def test_an_entry_is_a_line_of_json_and_its_digest():
    data = entries.encode_entry(ENTRY)
    line = canonical.dumps(ENTRY_JSON)
    assert data == sealed(line)
    assert entries.entry_digest(data) == digest(Context.ENTRY, line)


@pytest.mark.parametrize(
    "data", [entries.encode_entry(ENTRY), entries.encode_genesis(GENESIS)], ids=["entry", "genesis"]
)
def test_an_entry_with_any_other_byte_is_corruption(data):
    read = read_entry if data.startswith(b'{"cond') else entries.decode_genesis
    read(data)
    for at in range(len(data)):
        refuses(CorruptionError, "bad_digest", lambda at=at: read(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]))
        refuses(CorruptionError, "bad_digest", lambda at=at: read(data[:at]))
    refuses(CorruptionError, "bad_digest", lambda: read(data + b"\n"))


def test_entries_come_back():
    assert read_entry(entries.encode_entry(ENTRY)) == ENTRY
    assert read_entry(entries.encode_entry(ENTRY), previous=None) == ENTRY
    assert read_entry(entries.encode_entry(FULL_ENTRY)) == FULL_ENTRY
    assert FULL_ENTRY_JSON.keys() - ENTRY_JSON.keys() == entries._WHERE_NEEDED.keys()
    plain = Entry(REPOSITORY, 17, ENTRY.previous, None)
    assert read_entry(entries.encode_entry(plain)) == plain
    assert entries.decode_genesis(entries.encode_genesis(GENESIS)) == GENESIS
    assert ENTRY.versions[0].id == VERSION
    assert FOLD.number == 16


@pytest.mark.parametrize(
    ("at", "to", "kind"),
    [
        (("n",), 18, "bad_entry"),
        (("n",), "17", "bad_field"),
        (("repository",), "1f" * 16, "bad_entry"),
        (("previous",), "12" * 32, "broken_log"),
        (("previous",), "11" * 31, "bad_entry"),
        (("previous",), "AB" * 32, "bad_entry"),
        (("previous",), " ".join(["11"] * 32), "bad_entry"),
        (("fold", "name"), names.fold_name(17, b"\x07" * 32), "bad_entry"),
        (("fold", "name"), "fold/1", "bad_object_name"),
        (("fold", "digest"), "07", "bad_entry"),
        (("fold", "nbytes"), fold.MAX_BLOCK_NBYTES + 1, "bad_entry"),
        (("fold", "start"), -1, "bad_field"),
        (("fold",), 1, "bad_field"),
        (("refs", 0, 0), "a b", "bad_entry"),
        (("refs", 0, 1), "v12", "bad_entry"),
        (("refs", 0, 3), 0, "bad_entry"),
        (("refs", 0, 4), 10**18, "bad_entry"),
        (("refs", 0), ["bert", "main", "branch", 1], "bad_field"),
        (("versions", 0, 0), "", "bad_entry"),
        (("versions", 0, 1), 0, "bad_entry"),
        (("versions", 0, 2), "meta/x", "bad_object_name"),
        (("versions", 0, 4), "22" * 33, "bad_entry"),
        (("packs", 0, 0), "packs/x", "bad_object_name"),
        (("packs", 0, 1), 1.5, "bad_field"),
        (("condemned",), ["packs/x"], "bad_object_name"),
        (("replaced",), {"packs/x": []}, "bad_object_name"),
        (("replaced",), {PACK: ["packs/x"]}, "bad_object_name"),
        (("fenced",), ["01"], "bad_entry"),
        (("pushes",), ["xy" * 16], "bad_entry"),
        (("time",), 5, "bad_field"),
        ((), [], "bad_entry"),
    ],
)
def test_a_malformed_entry_is_corruption(at, to, kind):
    refuses(CorruptionError, kind, lambda: read_entry(entry_with(at, to)))


@pytest.mark.parametrize(
    ("at", "to", "kind"),
    [
        (("audit",), {}, "bad_entry"),
        (("audit",), {"audit/x": "34" * 32}, "bad_object_name"),
        (("audit",), {names.audit_name("ab" * 8, 7): "34"}, "bad_entry"),
        (("by",), [], "bad_entry"),
        (("by",), ["somebody"], "bad_entry"),
        (("by",), ["somebody", "somebody"], "bad_entry"),
        (("by", 0), 1, "bad_field"),
        (("movers",), [0], "bad_entry"),
        (("movers",), [0, 2], "bad_entry"),
        (("movers",), [0, -1], "bad_field"),
        (("signature", "key"), "31", "bad_entry"),
        (("signature", "value"), "33" * 32, "bad_entry"),
        (("signature",), None, "bad_field"),
        (("signers",), [], "bad_entry"),
        (("signers",), ["32" * 32, "31" * 32], "bad_entry"),
        (("signers",), ["31" * 32] * 2, "bad_entry"),
        (("signers",), ["31"], "bad_entry"),
        (("signers",), [f"{n:064x}" for n in range(65)], "bad_entry"),
    ],
)
def test_a_field_that_stands_where_it_is_needed_is_checked_like_the_others(at, to, kind):
    refuses(CorruptionError, kind, lambda: read_entry(entry_with(at, to, FULL_ENTRY_JSON)))


def test_who_asked_and_who_moved_stand_together():
    for field in ("by", "movers"):
        value = {key: part for key, part in FULL_ENTRY_JSON.items() if key != field}
        refuses(CorruptionError, "bad_entry", lambda value=value: read_entry(sealed(canonical.dumps(value))))


def test_what_is_signed_is_the_line_without_its_signature():
    value = {key: part for key, part in FULL_ENTRY_JSON.items() if key != "signature"}
    assert entries.to_sign(FULL_ENTRY) == digest(Context.TO_SIGN, canonical.dumps(value))


@pytest.mark.parametrize(
    ("at", "to"),
    [
        (("format",), 1),
        (("format",), None),
        (("later",), 1),
        (("fold", "later"), 1),
        (("refs", 0, 2), "bookmark"),
        (("packs", 0, 2), "auditor"),
    ],
)
def test_an_entry_of_a_newer_format_is_unsupported(at, to):
    refuses(UnsupportedFormatError, "unsupported_format", lambda: read_entry(entry_with(at, to)))


@pytest.mark.parametrize(
    ("at", "to", "kind"),
    [
        ("n", 1, "bad_entry"),
        ("max_depth", pack.MAX_DEPTH, "bad_entry"),
        ("repository", "0f", "bad_entry"),
        ("created", None, "bad_field"),
        ("features", "none", "bad_field"),
        ("grid", [1], "bad_field"),
    ],
)
def test_a_malformed_genesis_is_corruption(at, to, kind):
    refuses(CorruptionError, kind, lambda: entries.decode_genesis(genesis_with(at, to)))


@pytest.mark.parametrize(
    ("at", "to"), [("format", 1), ("digest", "sha256"), ("grid", [1, 2]), ("features", ["signed"]), ("later", 1)]
)
def test_a_genesis_of_a_newer_format_is_unsupported(at, to):
    refuses(UnsupportedFormatError, "unsupported_format", lambda: entries.decode_genesis(genesis_with(at, to)))


@given(data=(damage(ENTRY_JSON) | damage(FULL_ENTRY_JSON)).map(sealed))
def test_an_entry_with_anything_in_any_place_reads_or_is_refused(data):
    reads_or_refuses(lambda: read_entry(data))


@given(data=damage(GENESIS_JSON).map(sealed))
def test_a_genesis_with_anything_in_any_place_reads_or_is_refused(data):
    reads_or_refuses(lambda: entries.decode_genesis(data))


def test_an_entry_that_no_reader_would_take_is_never_written():
    many = tuple(PackAdded(f"packs/{PUSH}-{n}-{'12' * 32}", 1, "store") for n in range(40_000))
    refuses(LimitError, "entry_limit", lambda: entries.encode_entry(replace(ENTRY, packs=many)))
    longest = b'"' + b"a" * entries.MAX_ENTRY_NBYTES + b'"'
    refuses(CorruptionError, "bad_entry", lambda: read_entry(longest))


def test_the_next_entry_follows_from_the_bytes_of_the_one_before():
    first = entries.encode_genesis(GENESIS)
    second = entries.encode_entry(Entry(REPOSITORY, 1, entries.entry_digest(first), None))
    entries.decode_entry(second, number=1, repository=REPOSITORY, previous=entries.entry_digest(first))
    other = entries.entry_digest(genesis_with("created", "later"))
    refuses(
        CorruptionError,
        "broken_log",
        lambda: entries.decode_entry(second, number=1, repository=REPOSITORY, previous=other),
    )


# -- folds -------------------------------------------------------------------------------------------------------------


class Folds:
    """Fold objects in a dict, and every fold of them read back from bytes."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.root: fold.FoldRoot | None = None
        self.reads = 0

    def load(self, ref: BlockRef) -> fold.Rows:
        self.reads += 1
        data = self.objects[ref.object]
        return fold.parse_block(data[ref.start : ref.start + ref.nbytes], ref)

    def add(self, number: int, changes: dict[str, dict[str, Any]]) -> int:
        """Write the next fold; return its bytes without the root."""
        writer = FoldWriter(self.load)
        for table in TABLES:
            writer.update(table, None if self.root is None else self.root.tables[table], changes.get(table, {}))
        name, parts, start, root_digest = writer.finish(repository=REPOSITORY, number=number, entry=b"\x01" * 32)
        self.objects[name] = b"".join(parts)
        root = self.objects[name][start:]
        self.root = fold.parse_root(root, name=name, expected=root_digest, repository=REPOSITORY)
        return start

    def top(self, table: str) -> BlockRef | None:
        assert self.root is not None
        return self.root.tables[table]

    def rows(self, table: str, **bounds: Any) -> list[tuple[str, Any]]:
        return list(fold.scan(self.top(table), self.load, **bounds))


@contextmanager
def small_blocks(nbytes: int) -> Iterator[None]:
    """Cut much smaller blocks, so that small tables make tall trees."""
    patch = pytest.MonkeyPatch()
    patch.setattr(fold, "BLOCK_NBYTES", nbytes)
    try:
        yield
    finally:
        patch.undo()


def ref_key(number: int) -> str:
    return f"m{number % 3} r{number:03d}"


ref_changes = st.dictionaries(
    st.integers(0, 120).map(ref_key), st.none() | st.integers(1, 99).map(lambda n: ["branch", n]), max_size=40
)


@given(
    steps=st.lists(ref_changes, min_size=1, max_size=12), nbytes=st.sampled_from([1, 120, 400, 4096]), data=st.data()
)
def test_many_folds_add_up_to_a_plain_dict(steps, nbytes, data):
    expected: dict[str, Any] = {}
    folds = Folds()
    with small_blocks(nbytes):
        for number, changes in enumerate(steps, 1):
            folds.add(number, {"refs": changes})
            expected |= changes
            expected = {key: row for key, row in expected.items() if row is not None}
            assert folds.rows("refs") == sorted(expected.items())
    for key in [ref_key(n) for n in range(0, 121, 7)] + ["", "m0", "zzz"]:
        assert fold.lookup(folds.top("refs"), key, folds.load) == expected.get(key)
    start = data.draw(st.integers(-1, 121).map(ref_key) | st.just(""))
    stop = data.draw(st.integers(-1, 121).map(ref_key) | st.none())
    within = [(k, row) for k, row in sorted(expected.items()) if k >= start and (stop is None or k < stop)]
    assert folds.rows("refs", start=start, stop=stop) == within
    assert folds.rows("refs", start=start, stop=stop, backwards=True) == within[::-1]


def test_every_row_of_every_table_comes_back():
    rows = {
        "condemned": {PACK: 7},
        "fenced": {PUSH: 8},
        "packs": {PACK: [123, "store"]},
        "pushes": {PUSH: 9},
        "refs": {"bert main": ["branch", 4]},
        "replaced": {PACK: [OTHER_PACK]},
        "versions": {f"bert {4:020d}": [METADATA, 1234, "22" * 32, 10**12]},
    }
    assert tuple(rows) == TABLES
    folds = Folds()
    folds.add(5, rows)
    assert {table: dict(folds.rows(table)) for table in TABLES} == rows
    assert folds.root is not None
    assert (folds.root.number, folds.root.entry) == (5, b"\x01" * 32)


def test_a_table_that_loses_all_rows_is_empty_and_can_grow_again():
    folds = Folds()
    with small_blocks(100):
        folds.add(1, {"refs": {ref_key(n): ["tag", 1] for n in range(50)}})
        folds.add(2, {"refs": {ref_key(n): None for n in range(60)}})
        assert folds.top("refs") is None
        assert folds.rows("refs") == []
        assert fold.lookup(folds.top("refs"), ref_key(1), folds.load) is None
        folds.add(3, {"refs": {ref_key(7): ["tag", 2]}})
    assert folds.rows("refs") == [(ref_key(7), ["tag", 2])]


def test_a_fold_writes_what_changed_and_a_look_up_reads_a_path():
    folds = Folds()
    version_rows = {f"m {n:020d}": [METADATA, n, "22" * 32, n] for n in range(1, 5_001)}
    first = folds.add(1, {"versions": version_rows})
    second = folds.add(2, {"versions": {f"m {5_001:020d}": [METADATA, 1, "22" * 32, 1]}})
    assert first > 1_000_000
    top = folds.top("versions")
    assert top is not None
    assert second < (top.height + 1) * (fold.BLOCK_NBYTES + 512)
    folds.reads = 0
    assert fold.lookup(top, f"m {1_234:020d}", folds.load) == version_rows[f"m {1_234:020d}"]
    assert folds.reads == top.height + 1
    folds.reads = 0
    assert next(fold.scan(top, folds.load, start="m ", stop="m!", backwards=True))[0] == f"m {5_001:020d}"
    assert folds.reads == top.height + 1


def test_two_writers_of_one_fold_write_the_same_bytes():
    one, two = Folds(), Folds()
    for folds in (one, two):
        folds.add(1, {"refs": {ref_key(n): ["tag", n] for n in range(1, 40)}})
        folds.add(2, {"refs": {ref_key(n): ["tag", 1] for n in range(20, 60)}})
    assert one.objects == two.objects


def read_block(rows: Any, *, height: int = 0, table: str = "refs") -> fold.Rows:
    data = rows if isinstance(rows, bytes) else canonical.dumps(rows)
    ref = BlockRef(FOLD.name, 0, len(data), digest(Context.FOLD, data), height, table)
    return fold.parse_block(data, ref)


CHILD = ["", 0, 10, "07" * 32]


@pytest.mark.parametrize(
    ("rows", "height", "table", "kind"),
    [
        ([], 0, "refs", "bad_fold"),
        ([["b x", ["tag", 1]], ["a x", ["tag", 1]]], 0, "refs", "bad_fold"),
        ([["a x", ["tag", 1]], ["a x", ["tag", 1]]], 0, "refs", "bad_fold"),
        ([["a", ["tag", 1]]], 0, "refs", "bad_fold"),
        ([["a x", ["tag", "1"]]], 0, "refs", "bad_field"),
        ([["a x", None]], 0, "refs", "bad_field"),
        ([["a x", 5]], 0, "versions", "bad_field"),
        ([["a b", [METADATA, 1, "22" * 32, 1]]], 0, "versions", "bad_fold"),
        ([[f"a {1:020d}", [METADATA, 1, "22" * 31, 1]]], 0, "versions", "bad_fold"),
        ([[f"a {1:020d}", ["meta/x", 1, "22" * 32, 1]]], 0, "versions", "bad_object_name"),
        ([["packs/x", [1, "store"]]], 0, "packs", "bad_fold"),
        ([["zz", 1]], 0, "pushes", "bad_fold"),
        ([[1, 1]], 0, "pushes", "bad_field"),
        ({}, 0, "refs", "bad_field"),
        ([["a x", ["tag", 1]]], 1, "refs", "bad_field"),
        ([["a x", ["fold/x", 0, 10, "07" * 32]]], 1, "refs", "bad_object_name"),
        ([["a x", ["", 0, fold.MAX_BLOCK_NBYTES + 1, "07" * 32]]], 1, "refs", "bad_fold"),
        ([["a x", ["", 0, 10, "07" * 31]]], 1, "refs", "bad_fold"),
        (b"[", 0, "refs", "bad_json"),
    ],
)
def test_a_malformed_block_is_corruption(rows, height, table, kind):
    refuses(CorruptionError, kind, lambda: read_block(rows, height=height, table=table))


def test_a_block_is_the_one_that_its_parent_names_or_corruption():
    data = canonical.dumps([["a x", ["tag", 1]]])
    refuses(
        CorruptionError,
        "bad_digest",
        lambda: fold.parse_block(data, BlockRef(FOLD.name, 0, len(data), b"\x07" * 32, 0, "refs")),
    )


def test_a_ref_of_a_newer_kind_is_unsupported():
    refuses(UnsupportedFormatError, "unsupported_format", lambda: read_block([["a x", ["bookmark", 1]]]))


@pytest.mark.parametrize("parent_key", ["a a", "a c"])
def test_a_block_that_does_not_begin_where_its_parent_says_is_corruption(parent_key):
    blocks = {b"1" * 32: [("a b", ["tag", 1])], b"2" * 32: [("a d", ["tag", 1])]}
    left = BlockRef(FOLD.name, 0, 1, b"1" * 32, 0, "refs")
    right = BlockRef(FOLD.name, 0, 1, b"2" * 32, 0, "refs")
    top = BlockRef(FOLD.name, 0, 1, b"3" * 32, 1, "refs")
    blocks[b"3" * 32] = [(parent_key, left), ("a d", right)]
    refuses(CorruptionError, "bad_fold", lambda: list(fold.scan(top, lambda ref: blocks[ref.digest])))
    refuses(CorruptionError, "bad_fold", lambda: fold.lookup(top, "a cc", lambda ref: blocks[ref.digest]))


def test_a_tree_that_names_one_block_over_and_over_is_corruption_before_it_takes_for_ever():
    leaf = [("a a", ["tag", 1]), ("a z", ["tag", 1])]
    blocks: dict[int, Any] = {0: leaf}
    for height in range(1, fold.MAX_HEIGHT + 1):
        below = BlockRef(FOLD.name, 0, 1, b"", height - 1, "refs")
        blocks[height] = [("a a", below)] + [(f"a b{n}", below) for n in range(50)]
    top = BlockRef(FOLD.name, 0, 1, b"", fold.MAX_HEIGHT, "refs")
    refuses(CorruptionError, "bad_fold", lambda: list(fold.scan(top, lambda ref: blocks[ref.height])))


ROOT = {
    "entry": "01" * 32,
    "format": 0,
    "n": 16,
    "repository": REPOSITORY,
    "tables": dict.fromkeys(TABLES) | {"refs": [*CHILD, 0]},
}


def read_root(data: bytes, number: int = 16) -> fold.FoldRoot:
    expected = digest(Context.FOLD, data)
    return fold.parse_root(data, name=names.fold_name(number, expected), expected=expected, repository=REPOSITORY)


def test_a_root_comes_back():
    root = read_root(canonical.dumps(ROOT))
    assert root.number == 16
    assert root.tables["refs"] == BlockRef(
        names.fold_name(16, digest(Context.FOLD, canonical.dumps(ROOT))), 0, 10, b"\x07" * 32, 0, "refs"
    )


@pytest.mark.parametrize(
    ("at", "to", "kind"),
    [
        (("entry",), "zz" * 32, "bad_fold"),
        (("entry",), "01" * 31, "bad_fold"),
        (("n",), 17, "bad_fold"),
        (("repository",), "1f" * 16, "bad_fold"),
        (("tables", "refs"), 5, "bad_field"),
        (("tables", "refs", 4), fold.MAX_HEIGHT + 1, "bad_fold"),
        (("tables", "refs", 4), -1, "bad_field"),
        (("tables",), {}, "bad_field"),
        ((), [], "bad_field"),
    ],
)
def test_a_malformed_root_is_corruption(at, to, kind):
    refuses(CorruptionError, kind, lambda: read_root(canonical.dumps(changed(ROOT, at, to))))


@pytest.mark.parametrize("at", [("format",), ("later",), ("tables", "later")])
def test_a_root_of_a_newer_format_is_unsupported(at):
    refuses(UnsupportedFormatError, "unsupported_format", lambda: read_root(canonical.dumps(changed(ROOT, at, 1))))


def test_a_root_is_the_one_that_the_log_names_or_corruption():
    data = canonical.dumps(ROOT)
    expected = digest(Context.FOLD, data)
    for name, claimed in [(names.fold_name(16, b"\x09" * 32), expected), (names.fold_name(16, expected), b"\x09" * 32)]:
        refuses(
            CorruptionError,
            "bad_digest",
            lambda name=name, claimed=claimed: fold.parse_root(
                data, name=name, expected=claimed, repository=REPOSITORY
            ),
        )


@given(data=damage(ROOT))
def test_a_root_with_anything_in_any_place_reads_or_is_refused(data):
    reads_or_refuses(lambda: read_root(data))


@given(
    data=damage([[f"a {1:020d}", [METADATA, 1, "22" * 32, 1]], [f"a {2:020d}", [METADATA, 1, "22" * 32, 1]]]),
    table=st.sampled_from(TABLES),
    height=st.integers(0, 2),
)
def test_a_block_with_anything_in_any_place_reads_or_is_refused(data, table, height):
    reads_or_refuses(lambda: read_block(data, table=table, height=height))


def test_a_row_that_no_block_could_hold_is_never_written():
    long = {PACK: [f"packs/{PUSH}-{n}-{'12' * 32}" for n in range(3_000)]}
    writer = FoldWriter(Folds().load)
    refuses(LimitError, "fold_limit", lambda: writer.update("replaced", None, long))


# -- packs -------------------------------------------------------------------------------------------------------------

ROWS = [
    BlobRow(CHUNK, 0, 10, 40, 2, 4, 0, None, None, b"a" * 16),
    BlobRow(OTHER_CHUNK, 10, 0, 40, 3, 4, 1, CHUNK, "", b"b" * 16),
    BlobRow(ChunkId(b"x" * 32), 10, 7, 8, 4, 8, 32, CHUNK, PACK, b"c" * 16),
]


def read_index(data: bytes) -> pack.PackIndex:
    return decode_pack_index(data, pack=f"packs/{PUSH}-0-{digest(Context.PACK_INDEX, data).hex()}")


blob_rows = st.builds(
    BlobRow,
    chunk=st.binary(min_size=32, max_size=32).map(ChunkId),
    start=st.just(0),
    encoded_nbytes=st.integers(0, pack.MAX_ENCODED_NBYTES),
    decoded_nbytes=st.integers(1, (4 << 20) // 8).map(lambda n: n * 8),
    encoding=st.integers(0, 255),
    width=st.sampled_from([1, 2, 4, 8]),
    depth=st.integers(1, pack.MAX_DEPTH),
    base=st.binary(min_size=32, max_size=32).filter(any).map(ChunkId),
    base_pack=st.sampled_from(["", PACK, OTHER_PACK]),
    digest=st.binary(min_size=16, max_size=16),
) | st.builds(
    BlobRow,
    chunk=st.binary(min_size=32, max_size=32).map(ChunkId),
    start=st.just(0),
    encoded_nbytes=st.integers(0, pack.MAX_ENCODED_NBYTES),
    decoded_nbytes=st.integers(1, (4 << 20) // 8).map(lambda n: n * 8),
    encoding=st.integers(0, 255),
    width=st.sampled_from([1, 2, 4, 8]),
    depth=st.just(0),
    base=st.none(),
    base_pack=st.none(),
    digest=st.binary(min_size=16, max_size=16),
)


@given(drawn=st.lists(blob_rows, max_size=8, unique_by=lambda row: row.chunk))
def test_an_index_comes_back(drawn):
    rows: list[BlobRow] = []
    for row in drawn:
        rows.append(replace(row, start=rows[-1].stop if rows else 0))
    data = encode_pack_index(rows)
    index = read_index(data)
    assert list(index.rows) == rows
    assert [index.find(row.chunk) for row in rows] == rows
    assert list(index.chunks) == [row.chunk for row in rows]
    assert index.blobs_nbytes == (rows[-1].stop if rows else 0)
    footer = encode_footer(data)
    assert decode_footer(footer, pack=PACK, pack_nbytes=index.blobs_nbytes + len(data) + len(footer)) == len(data)


@pytest.mark.parametrize(
    "broken",
    [
        {"start": 1},
        {"encoded_nbytes": pack.MAX_ENCODED_NBYTES + 1},
        {"decoded_nbytes": 0},
        {"decoded_nbytes": (4 << 20) + 4},
        {"decoded_nbytes": 41},
        {"width": 0},
        {"width": 3},
        {"width": 16},
        {"depth": 1},
        {"base": OTHER_CHUNK},
        {"base_pack": PACK},
        {"base_pack": ""},
        {"base": OTHER_CHUNK, "base_pack": "", "depth": 0},
        {"base": OTHER_CHUNK, "base_pack": "", "depth": pack.MAX_DEPTH + 1},
        {"base_pack": "", "depth": 1},
        {"chunk": ROWS[2].chunk},
    ],
    ids=str,
)
def test_a_row_that_breaks_a_rule_is_corruption(broken):
    rows = [replace(ROWS[0], **broken), *ROWS[1:]]
    refuses(CorruptionError, "bad_pack", lambda: read_index(encode_pack_index(rows)))


INDEX = encode_pack_index(ROWS)
HEADER_NBYTES = 20
NAME_NBYTES = 2 + len(PACK)


def patched(at: int, to: bytes, data: bytes = INDEX) -> bytes:
    return data[:at] + to + data[at + len(to) :]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "bad_pack"),
        (INDEX[: HEADER_NBYTES - 1], "bad_pack"),
        (INDEX[:HEADER_NBYTES], "bad_pack"),
        (INDEX[: HEADER_NBYTES + 1], "bad_pack"),
        (INDEX[:-1], "bad_pack"),
        (INDEX + b"\0", "bad_pack"),
        (patched(0, b"\x92"), "bad_pack"),
        (patched(5, b"\1"), "bad_pack"),
        (patched(6, b"\2\0"), "bad_object_name"),
        (patched(6, b"\xfe\xff"), "bad_object_name"),
        (patched(6, b"\xff\xff"), "bad_pack"),
        (patched(8, b"\2"), "bad_pack"),
        (patched(8, b"\xff\xff\xff\xff"), "bad_pack"),
        (patched(12, b"\0"), "bad_pack"),
        (patched(HEADER_NBYTES, b"\1\0"), "bad_object_name"),
        (patched(HEADER_NBYTES + 2, b"\xff"), "bad_object_name"),
        (
            INDEX[:HEADER_NBYTES]
            + INDEX[HEADER_NBYTES : HEADER_NBYTES + NAME_NBYTES] * 2
            + INDEX[HEADER_NBYTES + NAME_NBYTES :],
            "bad_pack",
        ),
        (patched(len(INDEX) - 1, b"\1"), "bad_pack"),
        (patched(len(INDEX) - 8, b"\1\0"), "bad_pack"),
    ],
    ids=[
        "nothing",
        "part of a header",
        "no base packs",
        "half a length",
        "short",
        "long",
        "magic",
        "zero byte",
        "one base pack more",
        "very many base packs",
        "too many base packs",
        "one row less",
        "very many rows",
        "bytes of blobs",
        "length of a name",
        "bytes of a name",
        "a name twice",
        "reserved bytes",
        "number of a base pack",
    ],
)
def test_a_malformed_index_is_corruption(data, kind):
    if data == INDEX[:HEADER_NBYTES]:
        assert INDEX[6:8] == b"\1\0"
    refuses(CorruptionError, kind, lambda: read_index(data))


def test_base_packs_stand_once_and_in_order():
    two = encode_pack_index([ROWS[0], replace(ROWS[2], start=10), replace(ROWS[1], start=17, base_pack=OTHER_PACK)])
    first = two[HEADER_NBYTES : HEADER_NBYTES + NAME_NBYTES]
    second = two[HEADER_NBYTES + NAME_NBYTES : HEADER_NBYTES + 2 * NAME_NBYTES]
    rest = two[HEADER_NBYTES + 2 * NAME_NBYTES :]
    read_index(two)
    for pair in (second + first, first + first):
        refuses(CorruptionError, "bad_pack", lambda pair=pair: read_index(two[:HEADER_NBYTES] + pair + rest))


def test_an_index_of_a_newer_format_is_unsupported():
    refuses(UnsupportedFormatError, "unsupported_format", lambda: read_index(patched(4, b"\1")))


def test_an_index_is_the_one_that_its_pack_is_named_after_or_corruption():
    refuses(CorruptionError, "bad_digest", lambda: decode_pack_index(INDEX, pack=PACK))


@given(data=st.data())
def test_an_index_with_any_bytes_in_any_place_reads_or_is_refused(data):
    at = data.draw(st.integers(0, len(INDEX) - 1))
    to = data.draw(st.binary(min_size=1, max_size=8))
    cut = data.draw(st.integers(0, len(INDEX)))
    reads_or_refuses(lambda: read_index(patched(at, to)))
    reads_or_refuses(lambda: read_index(INDEX[:cut]))


@pytest.mark.parametrize(
    ("footer", "pack_nbytes"),
    [
        (b"", 0),
        (encode_footer(INDEX)[:-1], 1 << 20),
        (encode_footer(INDEX), len(INDEX) + 7),
        (encode_footer(b"short"), 1 << 20),
        (b"\xff\xff\xff\xff" + pack.PACK_MAGIC, 1 << 40),
        (encode_footer(INDEX)[:4] + b"LPK\x93", 1 << 20),
    ],
)
def test_a_malformed_footer_is_corruption(footer, pack_nbytes):
    refuses(CorruptionError, "bad_pack", lambda: decode_footer(footer, pack=PACK, pack_nbytes=pack_nbytes))


# -- manifest ----------------------------------------------------------------------------------------------------------

FLOAT32 = dtype_named("float32")

specs = st.builds(
    TensorSpec,
    texts,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 50).map(lambda n: n * 8), max_size=4).map(tuple),
).filter(lambda spec: spec.shape or not spec.dtype.opaque)


@given(drawn=st.lists(specs, max_size=20, unique_by=lambda spec: spec.name))
def test_structure_pages_come_back(drawn):
    structure = sorted(drawn, key=lambda spec: spec.name)
    pages = list(manifest.structure_pages(structure))
    assert [spec for page, _ in pages for spec in manifest.parse_structure_page(page)] == structure
    assert [spec for _, part in pages for spec in part] == structure


def test_pages_are_full_and_a_long_row_has_one_of_its_own():
    structure = [TensorSpec(f"layer.{n:05d}", FLOAT32, (n,)) for n in range(5_000)]
    long = TensorSpec("m" * manifest.MAX_NAME_NBYTES, FLOAT32, (1,) * manifest.MAX_RANK)
    pages = list(manifest.structure_pages([*structure, long]))
    assert all(len(page) <= PAGE_NBYTES for page, _ in pages)
    for (page, _), (_, following) in itertools.pairwise(pages):
        assert len(page) + len(manifest.structure_row(following[0])) > PAGE_NBYTES
    longest = TensorSpec("\x01" * manifest.MAX_NAME_NBYTES, FLOAT32, ())
    alone = list(manifest.structure_pages([longest, *structure]))
    assert len(alone[0][0]) > PAGE_NBYTES
    assert alone[0][1] == [longest]


def test_the_structure_id_does_not_depend_on_where_pages_end():
    structure = [TensorSpec(f"layer.{n:05d}", FLOAT32, (n,)) for n in range(5_000)]
    rows = b"".join(map(manifest.structure_row, structure))
    pages = [page for page, _ in manifest.structure_pages(structure)]
    assert len(pages) > 1
    assert manifest.structure_id(pages) == manifest.structure_id([rows]) == digest(Context.STRUCTURE, rows).hex()


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        (b"", "bad_manifest"),
        (b"\n", "bad_json"),
        (b'["a","float32",[1]]', "bad_json"),
        (b'["a","float32",[1]]\n\n', "bad_json"),
        (b'["a","float32",[1]],["b","float32",[1]]\n', "bad_json"),
        (b'["a"\n"float32",[1]]\n', "bad_json"),
        (b'["x]]\n[","float32",[]],["y","float32",[]]\n', "bad_json"),
        (b'["b","float32",[1]]\n["a","float32",[1]]\n', "bad_manifest"),
        (b'["a","float32",[1]]\n["a","float32",[2]]\n', "bad_manifest"),
        (b'["a","float32",[-1]]\n', "bad_field"),
        (b'["a","float32",[1.0]]\n', "bad_field"),
        (b'["a","float32"]\n', "bad_field"),
        (b'["a",1,[1]]\n', "bad_field"),
        (b'{"a":1}\n', "bad_field"),
        (b'["a","f4",[1]]\n', "bad_manifest"),
        (b'["a","float32",[72057594037927937]]\n', "bad_manifest"),
        (b'["a","float32",[72057594037927936,2,0]]\n', "bad_manifest"),
        (b'["a","float32",[' + b",".join([b"1"] * 33) + b"]]\n", "bad_manifest"),
        (b'["' + b"a" * 16385 + b'","float32",[1]]\n', "bad_manifest"),
    ],
    ids=lambda value: repr(value[:50]) if isinstance(value, bytes) else value,
)
def test_a_malformed_structure_page_is_corruption(page, kind):
    refuses(CorruptionError, kind, lambda: manifest.parse_structure_page(page))


def test_a_dtype_that_is_not_known_yet_is_unsupported():
    page = b'["a","float2",[1]]\n'
    refuses(UnsupportedFormatError, "unsupported_format", lambda: manifest.parse_structure_page(page))


@given(data=st.data())
def test_a_structure_page_with_any_bytes_in_any_place_reads_or_is_refused(data):
    page = b'["a","float32",[1]]\n["b","int8",[2,3]]\n'
    at = data.draw(st.integers(0, len(page)))
    to = data.draw(st.sampled_from([b"\n", b",", b"]", b"[", b'"', b"0", b"\\", b"\xff", b""]))
    reads_or_refuses(lambda: manifest.parse_structure_page(page[:at] + to + page[at + len(to) :]))


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("a" * (manifest.MAX_NAME_NBYTES + 1), FLOAT32, ()),
        TensorSpec("é" * (manifest.MAX_NAME_NBYTES // 2 + 1), FLOAT32, ()),
        TensorSpec("a", FLOAT32, (1,) * (manifest.MAX_RANK + 1)),
        TensorSpec("a", FLOAT32, (manifest.MAX_ELEMENTS + 1,)),
        TensorSpec("a", FLOAT32, (1 << 40, 1 << 40, 0)),
    ],
    ids=["name", "bytes of a name", "rank", "elements", "empty but huge"],
)
def test_a_tensor_past_a_limit_is_never_written(spec):
    refuses(LimitError, "tensor_limit", lambda: manifest.structure_row(spec))


def test_a_name_that_is_no_text_is_never_written():
    refuses(InvalidInputError, "bad_text", lambda: manifest.structure_row(TensorSpec("\ud800", FLOAT32, ())))


@given(lengths=st.lists(st.integers(1, 100), max_size=50), first=st.integers(0, 1000))
def test_rows_of_cells_come_back(lengths, first):
    table = CellTable(first)
    rows = [bytes([n % 256]) * (length if length <= INLINE_NBYTES else 32) for n, length in enumerate(lengths)]
    for row in rows:
        table.add(row)
    found = []
    for page, first_cell in table.pages():
        assert first_cell == first + len(found)
        found += manifest.cell_rows(page, lengths[len(found) :][: _rows_in(page, lengths[len(found) :])])
    assert found == rows


def _rows_in(page: bytes, lengths: list[int]) -> int:
    at = count = 0
    while at < len(page):
        at += manifest.row_nbytes(lengths[count])
        count += 1
    return count


def test_cell_pages_end_before_the_row_that_would_not_fit():
    table = CellTable(5)
    for n in range(5_000):
        table.add(bytes([n % 256]) * 32)
    pages = table.pages()
    assert [(len(page), first) for page, first in pages] == [
        (1 << 16, 5),
        (1 << 16, 2053),
        (5_000 * 32 - (2 << 16), 4101),
    ]


@pytest.mark.parametrize(
    ("page", "lengths"),
    [
        (b"", [4]),
        (b"abc", [4]),
        (b"abcde", [4]),
        (b"a" * 33, [33]),
        (b"a" * 31, [1000]),
        (b"abcd", []),
        (b"a", iter([1, 1])),
    ],
)
def test_a_cell_page_of_another_length_is_corruption(page, lengths):
    refuses(CorruptionError, "bad_manifest", lambda: list(manifest.cell_rows(page, lengths)))


# -- versions ----------------------------------------------------------------------------------------------------------

HEX = CHUNK.hex()
DESCRIPTION = Description(
    model="bert",
    push=PUSH,
    structure_id=HEX,
    parameters_id=OTHER_CHUNK.hex(),
    tensor_count=7,
    cell_count=12,
    decoded_nbytes=4096,
    pages=(
        StructurePage(CHUNK, 100, "a", 0, (CellPage(CHUNK, 50, 0), CellPage(OTHER_CHUNK, 60, 3))),
        StructurePage(CHUNK, 101, "b", 10, ()),
        StructurePage(OTHER_CHUNK, 102, "c", 10, (CellPage(CHUNK, 5, 10),)),
    ),
    attachments=(AttachmentPages("model.safetensors", "safetensors_header", ((CHUNK, 4), (OTHER_CHUNK, 5))),),
    parents=(VERSION,),
    message="step 2000\nand on",
    author="somebody",
    created="2026-11-21T00:00:00.000000Z",
    metrics={"loss": 0.5, "steps": 3, "diverged": -math.inf},
    recipe={"lr": 1e-5, "tags": ["a"], "none": None},
)
LOCATOR = Locator(
    number=4,
    parents=(("bert", 3),),
    packs=(PackRef(PACK, 10_000, 500), PackRef(OTHER_PACK, 508, 500)),
    manifest_runs=((6, 0), (2, 1)),
    cell_runs=((12, 1),),
)
DESCRIPTION_JSON = canonical.loads(version.encode_description(DESCRIPTION), what="it")
LOCATOR_JSON = json.loads(version.encode_metadata(b"", LOCATOR).split(b"\n")[1])


def read_metadata(first: bytes, second: bytes, rest: bytes = b"") -> tuple[Description, Locator]:
    return version.decode_metadata(first + b"\n" + second + b"\n" + rest, expected=version.version_id(first))


def test_a_version_comes_back():
    first = version.encode_description(DESCRIPTION)
    data = version.encode_metadata(first, LOCATOR)
    description, locator = version.decode_metadata(data, expected=version.version_id(first))
    assert (description, locator) == (DESCRIPTION, LOCATOR)
    assert version.version_id(first) == digest(Context.VERSION, first).hex()
    assert description.attachments[0].nbytes == 9


@pytest.mark.parametrize("doubtful", [(0,), (1,), (0, 1)])
def test_a_version_says_which_of_its_packs_are_doubtful(doubtful: tuple[int, ...]):
    first = version.encode_description(DESCRIPTION)
    data = version.encode_metadata(first, replace(LOCATOR, doubtful=doubtful))
    assert version.decode_metadata(data, expected=version.version_id(first))[1].doubtful == doubtful


@pytest.mark.parametrize("doubtful", [[], [2], [1, 0], [0, 0], [-1], ["0"], None])
def test_a_version_that_calls_no_pack_of_its_own_doubtful_is_refused(doubtful: object):
    first = version.encode_description(DESCRIPTION)
    with pytest.raises(CorruptionError) as caught:
        read_metadata(first, canonical.dumps(LOCATOR_JSON | {"doubtful": doubtful}))
    assert caught.value.kind in ("bad_metadata", "bad_field")


def test_manifest_chunks_are_pages_each_with_its_cells_then_attachments():
    assert [nbytes for _, nbytes in DESCRIPTION.manifest_chunks] == [100, 50, 60, 101, 102, 5, 4, 5]


def test_a_version_without_tensors_comes_back():
    empty = replace(DESCRIPTION, tensor_count=0, cell_count=0, decoded_nbytes=0, pages=(), attachments=(), parents=())
    nowhere = Locator(1, (), (), (), ())
    first = version.encode_description(empty)
    assert version.decode_metadata(version.encode_metadata(first, nowhere), expected=version.version_id(first)) == (
        empty,
        nowhere,
    )


@pytest.mark.parametrize(
    ("at", "to", "kind"),
    [
        (("structure", "id"), "00", "bad_metadata"),
        (("push",), "00", "bad_object_name"),
        (("parameters",), HEX.upper(), "bad_metadata"),
        (("parents", 0), "x" * 64, "bad_metadata"),
        (("structure", "pages", 0, 0), HEX + " ", "bad_metadata"),
        (("structure", "pages", 0, 4, 0, 0), "", "bad_metadata"),
        (("attachments", 0, "chunks", 0, 0), "0", "bad_metadata"),
        (("structure", "pages", 1, 2), "a", "bad_metadata"),
        (("structure", "pages", 1, 2), "d", "bad_metadata"),
        (("structure", "pages", 0, 3), 1, "bad_metadata"),
        (("structure", "pages", 1, 3), 13, "bad_metadata"),
        (("structure", "pages", 2, 3), 13, "bad_metadata"),
        (("structure", "pages", 0, 4, 0, 2), 1, "bad_metadata"),
        (("structure", "pages", 0, 4, 1, 2), 0, "bad_metadata"),
        (("structure", "pages", 2, 4, 0, 2), 12, "bad_metadata"),
        (("structure", "pages"), [], "bad_metadata"),
        (("structure", "cells"), 10, "bad_metadata"),
        (("structure", "cells"), version.MAX_CELLS + 1, "bad_metadata"),
        (("structure", "tensors"), -1, "bad_field"),
        (("metrics",), {"loss": "low"}, "bad_field"),
        (("metrics",), {"loss": True}, "bad_field"),
        (("message",), None, "bad_field"),
        (("model",), "a b", "bad_metadata"),
        ((), [], "bad_field"),
    ],
)
def test_a_malformed_description_is_corruption(at, to, kind):
    first = canonical.dumps(changed(DESCRIPTION_JSON, at, to))
    refuses(CorruptionError, kind, lambda: read_metadata(first, canonical.dumps(LOCATOR_JSON)))


@pytest.mark.parametrize(
    ("at", "to"),
    [(("format",), 1), (("later",), 1), (("structure", "later"), 1), (("attachments", 0, "role"), "tokenizer")],
)
def test_a_description_of_a_newer_format_is_unsupported(at, to):
    first = canonical.dumps(changed(DESCRIPTION_JSON, at, to))
    refuses(UnsupportedFormatError, "unsupported_format", lambda: read_metadata(first, canonical.dumps(LOCATOR_JSON)))


@pytest.mark.parametrize(
    ("at", "to", "kind"),
    [
        (("packs", 0, 0), "packs/x", "bad_object_name"),
        (("packs", 0, 1), 507, "bad_metadata"),
        (("packs", 0, 2), pack.MAX_INDEX_NBYTES + 1, "bad_metadata"),
        (("manifest",), [[8, 2]], "bad_metadata"),
        (("manifest",), [[9, 0]], "bad_metadata"),
        (("cells",), [[11, 0]], "bad_metadata"),
        (("cells",), [[13, 0]], "bad_metadata"),
        (("cells", 0, 1), 2, "bad_metadata"),
        (("cells", 0, 0), "12", "bad_field"),
        (("parents",), [], "bad_metadata"),
        (("parents",), [["bert", 3], ["bert", 2]], "bad_metadata"),
        (("parents",), [["", 3]], "bad_metadata"),
        (("parents", 0, 1), 10**18, "bad_metadata"),
        (("number",), 0, "bad_metadata"),
        (("number",), -1, "bad_field"),
        ((), 1, "bad_field"),
    ],
)
def test_a_malformed_locator_is_corruption(at, to, kind):
    second = canonical.dumps(changed(LOCATOR_JSON, at, to))
    refuses(CorruptionError, kind, lambda: read_metadata(canonical.dumps(DESCRIPTION_JSON), second))


@pytest.mark.parametrize("rest", [b"x", b"\n", b"{}\n"])
def test_metadata_is_two_lines_and_no_more(rest):
    first, second = canonical.dumps(DESCRIPTION_JSON), canonical.dumps(LOCATOR_JSON)
    read_metadata(first, second)
    refuses(CorruptionError, "bad_metadata", lambda: read_metadata(first, second, rest))
    cut = first + b"\n" + second
    refuses(CorruptionError, "bad_metadata", lambda: version.decode_metadata(cut, expected=version.version_id(first)))


def test_metadata_of_another_version_is_corruption():
    data = version.encode_metadata(version.encode_description(DESCRIPTION), LOCATOR)
    refuses(CorruptionError, "bad_digest", lambda: version.decode_metadata(data, expected=VERSION))


@given(data=damage(DESCRIPTION_JSON))
def test_a_description_with_anything_in_any_place_reads_or_is_refused(data):
    reads_or_refuses(lambda: read_metadata(data, canonical.dumps(LOCATOR_JSON)))


@given(data=damage(LOCATOR_JSON))
def test_a_locator_with_anything_in_any_place_reads_or_is_refused(data):
    reads_or_refuses(lambda: read_metadata(canonical.dumps(DESCRIPTION_JSON), data))


def test_metadata_that_no_reader_would_take_is_never_written(monkeypatch):
    monkeypatch.setattr(version, "MAX_METADATA_NBYTES", 1_000)
    first = version.encode_description(replace(DESCRIPTION, recipe="x" * 1_000))
    refuses(LimitError, "metadata_limit", lambda: version.encode_metadata(first, LOCATOR))
