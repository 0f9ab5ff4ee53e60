"""Repositories written once: they stay readable, and no damage to them reads as anything but itself."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import bits, copy_of, names_of, open_again

import lamella
from lamella_engine.content_store.log import Log
from lamella_engine.errors import CorruptionError, RepositoryNotFoundError, UnsupportedFormatError
from lamella_engine.format import entry, fold, manifest, pack, version
from lamella_engine.format.names import fold_number, log_name, log_number, metadata_version
from lamella_engine.objects.memory import MemoryObjects

GOLDEN = Path(__file__).parent / "golden"
V0 = GOLDEN / "v0"
REPOSITORIES = ("replaced", "small", "tiny", "tuned")


def golden(name: str) -> MemoryObjects:
    """Return a golden repository as objects."""
    objects = MemoryObjects()
    for path in sorted((V0 / name).rglob("*")):
        if path.is_file():
            objects.put_if_absent(path.relative_to(V0 / name).as_posix(), [path.read_bytes()])
    return objects


def expected_of(name: str) -> dict[str, dict[str, Any]]:
    """Return what was pushed to a golden repository: ``model@v<number>`` -> digests."""
    return json.loads((V0 / f"{name}.json").read_text())


def digests(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: [dtype, list(shape), hashlib.sha256(data).hexdigest()]
        for name, (dtype, shape, data) in sorted(bits(tensors).items())
    }


# -- they stay readable ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_golden_repository_opens_verifies_and_checks_out_to_what_was_pushed(name, tmp_path):
    shutil.copytree(V0 / name, tmp_path / "repository")
    with lamella.open(tmp_path / "repository") as repo:
        report = repo.verify(deep=True)
        assert report.problems == []
        for at, (revision, expected) in enumerate(expected_of(name).items()):
            assert repo.version(revision).id == expected["id"]
            if "tensors" in expected:
                assert digests(repo.checkout(revision, verify="chunk")) == expected["tensors"]
                continue
            for file, path in repo.checkout(revision, tmp_path / str(at)).items():
                assert hashlib.sha256(path.read_bytes()).hexdigest() == expected["files"].pop(file)
            assert not expected["files"]
        assert report.versions == len(expected_of(name))


def test_golden_refs_and_notes_are_where_they_were():
    repo = open_again(golden("small"))
    assert repo.models() == ["file", "net", "other", "pipeline"]
    assert [(ref.name, ref.kind, ref.number) for ref in repo.refs("net")] == [
        ("main", "branch", 5),
        ("production", "alias", 7),
        ("release", "tag", 2),
        ("tuned", "branch", 8),
    ]
    tuned = repo.version("net@tuned")
    assert tuned.message == "cut"
    assert [version.number for version in repo.log("net@tuned")] == [8, 3, 2, 1]
    assert repr(repo.version("net@v3").metrics) == "{'loss': 0.5, 'step': 2, 'worst': nan}"
    assert repo.version("net@v1").recipe == {"seed": 1, "tags": ["a", None, 0.1]}


def test_later_entries_are_obeyed_though_nothing_writes_them_yet():
    objects = golden("replaced")
    state = Log(objects).state
    (condemned, at) = next(state.table("condemned"))
    assert (state.pack(condemned), at) == (None, 7)
    replaced = dict(state.table("replaced"))
    assert all(state.pack(old) is None for old in replaced)
    first = next(old for old, new in replaced.items() if len(new) == 2)
    assert all(state.pack(name) is not None for name in state.where_is(first))
    assert set(replaced) | {condemned} == {
        name for table in ("replaced", "condemned") for name, _ in state.table(table)
    } - set(names_of(objects))
    assert state.is_fenced("0b" * 16)
    assert state.committed_at("0a" * 16) == 4


# -- they are written as they were -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_again(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("golden") / "v0"
    module.make(out)
    return out


def test_every_byte_that_does_not_depend_on_zstd_is_written_again(made_again):
    files = {path.relative_to(V0) for path in (V0 / "tiny").rglob("*") if path.is_file()}
    assert {path.relative_to(made_again) for path in (made_again / "tiny").rglob("*") if path.is_file()} == files
    for file in files:
        assert (made_again / file).read_bytes() == (V0 / file).read_bytes(), file


@pytest.mark.parametrize("name", REPOSITORIES)
def test_ids_are_computed_as_they_were(made_again, name):
    assert (made_again / f"{name}.json").read_text() == (V0 / f"{name}.json").read_text()


@pytest.mark.parametrize("name", REPOSITORIES)
def test_every_object_parsed_and_written_again_is_the_same(name):
    objects = golden(name)
    genesis = entry.decode_genesis(objects.get(log_name(0)))
    assert entry.encode_genesis(genesis) == objects.get(log_name(0))
    for found in names_of(objects):
        data = objects.get(found)
        if found.startswith("log/") and log_number(found):
            parsed = entry.decode_entry(data, number=log_number(found), repository=genesis.repository, previous=None)
            assert entry.encode_entry(parsed) == data
        elif found.startswith("packs/"):
            index_nbytes = pack.decode_footer(data[-pack.FOOTER_NBYTES :], pack=found, pack_nbytes=len(data))
            stored = data[-pack.FOOTER_NBYTES - index_nbytes :]
            index = pack.decode_pack_index(stored[: -pack.FOOTER_NBYTES], pack=found)
            again = pack.encode_pack_index(index.rows)
            assert again + pack.encode_footer(again) == stored
        elif found.startswith("meta/"):
            description, locator = version.decode_metadata(data, expected=metadata_version(found))
            assert version.encode_metadata(version.encode_description(description), locator) == data


def test_structure_pages_parsed_and_written_again_are_the_same():
    repo = open_again(golden("small"))
    for revision in expected_of("small"):
        read = repo._store.manifest(repo._store.resolve(revision))
        pages = [read._load(read._chunk_places[at]) for at in range(len(read.description.pages))]
        specs = [spec for page in pages for spec in manifest.parse_structure_page(page)]
        assert [page for page, _ in manifest.structure_pages(specs)] == pages
        assert manifest.structure_id(pages) == read.description.structure_id


def test_folds_follow_from_the_entries_alone():
    objects = golden("small")
    written = {name: objects.get(name) for name in names_of(objects) if name.startswith("fold/")}
    assert len(written) >= 2
    bare = copy_of(objects)
    for name in written:
        bare.delete(name)
    states = {state.number: (seen, state) for _, seen, state in Log(bare).history()}
    root = None
    for name in sorted(written, reverse=True):  # the oldest first
        number = fold_number(name)
        _, state = states[number]

        def load(ref: fold.BlockRef) -> fold.Rows:
            return fold.parse_block(written[ref.object][ref.start : ref.start + ref.nbytes], ref)

        writer = fold.FoldWriter(load)
        for table in fold.TABLES:
            top = None if root is None else root.tables[table]
            rows = dict(state.table(table))
            before = dict(fold.scan(top, load))
            changes = {key: row for key, row in rows.items() if before.get(key) != row} | dict.fromkeys(
                before.keys() - rows.keys()
            )
            writer.update(table, top, changes)
        found, parts, start, digest = writer.finish(
            repository=state.genesis.repository, number=number, entry=state.digest
        )
        assert (found, b"".join(parts)) == (name, written[name])
        root = fold.parse_root(written[name][start:], name=name, expected=digest, repository=state.genesis.repository)


# -- damage ------------------------------------------------------------------------------------------------------------

REFUSALS = (CorruptionError, UnsupportedFormatError)


def read_everything(objects: MemoryObjects, name: str) -> list[Exception]:
    """Read each version of a damaged golden repository; return what was raised.

    Whatever is not refused by name is exactly what was pushed.
    """
    try:
        repo = open_again(objects)
    except (*REFUSALS, RepositoryNotFoundError) as error:
        return [error]
    errors: list[Exception] = []
    for revision, expected in expected_of(name).items():
        try:
            found = repo.version(revision)
            tensors = digests(repo.checkout(revision))
        except REFUSALS as error:
            errors.append(error)
        else:
            assert found.id == expected["id"]
            assert tensors == expected.get("tensors", tensors)
    return errors


def what_verify_says(objects: MemoryObjects) -> str:
    """Return all that verify finds fault with, as text."""
    try:
        report = open_again(objects).verify(deep=True)
    except (*REFUSALS, RepositoryNotFoundError) as error:
        return f"{error} {error.context}"
    return "\n".join(f"{problem.where}: {problem.kind}: {problem.message}" for problem in report.problems)


def is_named(name: str, text: str) -> bool:
    """Whether a complaint says which object is meant: by its name, or as ``entry <number>``."""
    return name in text or (name.startswith("log/") and f"entry {log_number(name)} " in text + " ")


def flip(at: float) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        place = int(at * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ 0x04]) + data[place + 1 :]

    return damage


def truncate(at: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(at * (len(data) - 1))]


def with_damage(objects: MemoryObjects, name: str, damage: Callable[[bytes], bytes]) -> MemoryObjects:
    copy = copy_of(objects)
    data = copy.get(name)
    copy.delete(name)
    copy.put_if_absent(name, [damage(data)])
    return copy


def without(objects: MemoryObjects, name: str) -> MemoryObjects:
    copy = copy_of(objects)
    copy.delete(name)
    return copy


OBJECTS = [(repository, name) for repository in REPOSITORIES for name in names_of(golden(repository))]
NEWEST = {max(pair for pair in OBJECTS if pair[0] == repository and "log/" in pair[1]) for repository in REPOSITORIES}
each_object = pytest.mark.parametrize(("repository", "name"), OBJECTS, ids=lambda text: text[:26])


def check(objects: MemoryObjects, repository: str, *damaged: str) -> None:
    """Fail if damage is read as anything, or if verify does not say where it is."""
    errors = read_everything(objects, repository)
    if all(name.startswith("fold/") for name in damaged):
        # Folds are derived: one whose root is lost, or that no other stands on, costs time and nothing else.
        assert all(any(is_named(name, str(error)) for name in damaged) for error in errors)
    assert any(is_named(name, what_verify_says(objects)) for name in damaged)


@each_object
@pytest.mark.parametrize(
    "damage",
    [flip(0.0), flip(0.5), flip(1.0), truncate(0), truncate(0.5), truncate(1.0)],
    ids=["first byte", "middle byte", "last byte", "cut to nothing", "cut to half", "cut by one"],
)
def test_verify_names_a_damaged_object_and_reading_gives_no_other_bytes(repository, name, damage):
    check(with_damage(golden(repository), name, damage), repository, name)


@each_object
def test_verify_names_an_object_that_grew_and_reading_gives_no_other_bytes(repository, name):
    check(with_damage(golden(repository), name, lambda data: data + b"\n"), repository, name)


@given(where=st.sampled_from(OBJECTS), at=st.floats(0, 1), bit=st.integers(0, 7))
def test_any_bit_of_any_object_may_flip(where, at, bit):
    repository, name = where

    def damage(data: bytes) -> bytes:
        place = int(at * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    check(with_damage(golden(repository), name, damage), repository, name)


@each_object
def test_verify_names_an_object_that_is_gone(repository, name):
    objects = golden(repository)
    objects.delete(name)
    if (repository, name) not in NEWEST:
        check(objects, repository, name)


def test_a_repository_that_loses_its_newest_entry_is_the_one_before():
    objects = golden("tiny")
    objects.delete(log_name(2))
    repo = open_again(objects)
    assert repo.verify(deep=True).problems == []
    expected = expected_of("tiny")["tiny@v1"]
    assert (repo.version("tiny@main").id, digests(repo.checkout("tiny@main"))) == (expected["id"], expected["tensors"])


SWAPS = [
    (repository, one, two)
    for (repository, one), (other, two) in pairwise(OBJECTS)
    if repository == other and one.partition("/")[0] == two.partition("/")[0]
]


@pytest.mark.parametrize(("repository", "one", "two"), SWAPS, ids=lambda text: text[:26])
def test_two_objects_that_changed_places_are_named(repository, one, two):
    objects = golden(repository)
    first, second = objects.get(one), objects.get(two)
    check(with_damage(with_damage(objects, one, lambda _: second), two, lambda _: first), repository, one, two)


LOG_1, LOG_2 = log_name(1), log_name(2)
META = next(name for _, name in OBJECTS if name == next(n for n in names_of(golden("tiny")) if n.startswith("meta/")))
PACK = next(name for name in names_of(golden("tiny")) if name.startswith("packs/"))


def at(place: int) -> Callable[[bytes], bytes]:
    """Flip a bit of one byte, counted from the end if ``place`` is negative."""

    def damage(data: bytes) -> bytes:
        index = place % len(data)
        return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

    return damage


def footer_at(objects: MemoryObjects) -> int:
    data = objects.get(PACK)
    return -pack.FOOTER_NBYTES - pack.decode_footer(data[-pack.FOOTER_NBYTES :], pack=PACK, pack_nbytes=len(data))


@pytest.mark.parametrize(
    ("name", "damage", "kind"),
    [
        (log_name(0), at(10), "bad_digest"),
        (LOG_1, at(10), "bad_digest"),
        (LOG_1, at(-2), "bad_digest"),
        (LOG_1, lambda data: data[:-1], "bad_digest"),
        (LOG_1, lambda _: golden("tiny").get(LOG_2), "bad_entry"),
        (LOG_1, lambda _: golden("small").get(LOG_1), "bad_entry"),
        (LOG_1, None, "log_gap"),
        (log_name(0), None, "log_gap"),
        (META, at(10), "bad_digest"),
        (META, at(-10), "bad_digest"),
        (META, lambda data: data[:-1], "short_object"),
        (META, None, "missing_object"),
        (PACK, at(0), "bad_digest"),
        (PACK, at(footer_at(golden("tiny"))), "bad_digest"),
        (PACK, lambda data: data[: len(data) // 2], "short_object"),
        (PACK, None, "missing_object"),
    ],
    ids=[
        "genesis",
        "entry",
        "digest of an entry",
        "entry cut",
        "entry of another number",
        "entry of another repository",
        "entry gone",
        "genesis gone",
        "description",
        "locator",
        "metadata cut",
        "metadata gone",
        "blob",
        "pack index",
        "pack cut",
        "pack gone",
    ],
)
def test_reading_says_what_kind_of_damage_it_is(name, damage, kind):
    objects = golden("tiny")
    objects = without(objects, name) if damage is None else with_damage(objects, name, damage)
    kinds = {error.kind for error in read_everything(objects, "tiny") if isinstance(error, CorruptionError)}
    assert kinds == {kind}


@pytest.mark.parametrize("place", [-1, -5], ids=["magic number", "length"])
def test_a_damaged_footer_is_found_by_whoever_needs_it(place):
    objects = with_damage(golden("tiny"), PACK, at(place))
    # A locator says how long the index is, so readers of versions do without the footer.
    assert read_everything(objects, "tiny") == []
    assert f"{PACK}: bad_" in what_verify_says(objects)
