"""Bases: deltas never form a circle, packs may be replaced under them, and a commit stands on live packs only."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from faults import Fault, FaultyObjects
from support import Copy, append_entry, bits, copies_in, copy_of, names_of, new_repository, noise, open_again, store_of
from support import write_pack as write

from lamella_engine import codecs
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.bases import LONGEST_CHAIN
from lamella_engine.content_store.packs import StoredBlob
from lamella_engine.errors import ConflictError, CorruptionError, InvalidInputError, StorageError
from lamella_engine.format.digests import chunk_id
from lamella_engine.format.pack import MAX_DEPTH, BlobRow
from lamella_engine.model import Cell
from lamella_engine.objects.memory import MemoryObjects

X = noise(0, 3_000)
Y = X + np.float32(1e-4)
IDS = {"X": chunk_id(X.tobytes()), "Y": chunk_id(Y.tobytes())}


def packs_of(repo):
    return {pack.name for pack in store_of(repo).log.refresh().packs()}


def circle(monkeypatch):
    """Return a repository with the two-push circle, and the packs of its four copies.

    One line of pushes stores X full and Y on X, another Y full and X on Y. Each push is made by a process that knows
    only its parent's closure, as one is that began before the other line was there to be seen.
    """
    monkeypatch.setattr("lamella_engine.content_store.packed.INDEX_CATCH_UP", 0)
    objects = MemoryObjects()
    new_repository(objects)
    where = {}
    for branch, lines in (("left", (("X full", X), ("Y on X", Y))), ("right", (("Y full", Y), ("X on Y", X)))):
        for what, array in lines:
            repo = open_again(objects)
            before = packs_of(repo)
            repo.push({"w": array}, f"m@{branch}")
            (where[what],) = packs_of(repo) - before
    for what, pack in where.items():
        row = copies_in(objects, pack)[IDS[what[0]]].row
        assert row.depth == (0 if "full" in what else 1), what
    monkeypatch.undo()
    return objects, where


ALL = ("X full", "Y on X", "Y full", "X on Y")
NEEDS = {"Y on X": "X", "X on Y": "Y"}


def subsets():
    return [kept for size in range(1, 5) for kept in combinations(ALL, size)]


def decodable(kept, chunk):
    """Whether the copies left can give a chunk: a full one, or a delta of depth 1 whose base is there in full."""
    return f"{chunk} full" in kept or any(
        copy in kept and f"{base} full" in kept for copy, base in NEEDS.items() if copy[0] == chunk
    )


@pytest.mark.parametrize("kept", subsets(), ids=lambda kept: " & ".join(kept))
def test_whatever_copies_of_a_circle_are_dropped_reads_are_right_or_corruption(kept, monkeypatch):
    objects, where = circle(monkeypatch)
    renewed = []
    for what, pack in where.items():
        copies = copies_in(objects, pack)
        if what not in kept:
            copies.pop(IDS[what[0]])
        renewed.append(write(objects, copies.values()))
    everywhere = tuple(pack.name for pack in renewed)
    append_entry(objects, packs=tuple(renewed), replaced=dict.fromkeys(where.values(), everywhere))
    for pack in where.values():
        objects.delete(pack)
    repo = open_again(objects)
    held = {"X": decodable(kept, "X"), "Y": decodable(kept, "Y")}
    for revision, chunk, array in (
        ("m@left~1", "X", X), ("m@left", "Y", Y), ("m@right~1", "Y", Y), ("m@right", "X", X),
    ):  # fmt: skip
        if held[chunk]:
            assert repo.checkout(revision, verify="chunk")["w"].tobytes() == array.tobytes()
        else:
            with pytest.raises(CorruptionError) as caught:
                repo.checkout(revision)
            assert caught.value.kind in ("missing_chunk", "base_too_deep")
    within_the_rule = all(f"{base} full" in kept for copy, base in NEEDS.items() if copy in kept)
    if within_the_rule and all(held.values()):
        assert repo.verify(deep=True).problems == []
    else:
        assert repo.verify().problems


def test_the_smallest_copies_of_a_circle_are_corruption_and_no_endless_descent(monkeypatch):
    """Both deltas, in the very packs that they were written to: ids alone would have the one stand on the other."""
    objects, where = circle(monkeypatch)
    for full, delta in (("X full", "X on Y"), ("Y full", "Y on X")):
        append_entry(objects, replaced={where[full]: (where[delta],)})
    repo = open_again(objects)
    for revision in ("m@left", "m@right", "m@left~1", "m@right~1"):
        with pytest.raises(CorruptionError):
            repo.checkout(revision)
    assert {problem.kind for problem in repo.verify(deep=True).problems} >= {"base_too_deep"}


def delta(array, base, *, base_pack, depth):
    """Return a delta made by hand, with whatever depth and pack of its base."""
    data, against = array.tobytes(), base.tobytes()
    encoding, payload = codecs.encode(data, width=4, floating=True, base=against)
    assert codecs.needs_base(encoding)
    ids = chunk_id(data), chunk_id(against)
    return Copy(BlobRow(ids[0], 0, 0, len(data), encoding, 4, depth, ids[1], base_pack, bytes(16)), bytes(payload))


@pytest.mark.parametrize("depths", [(1, 1), (2, 2), (1, 2), (8, 8)], ids=str)
@pytest.mark.parametrize("one_pack", [True, False], ids=["one pack", "two packs"])
def test_a_repository_made_by_hand_that_breaks_the_depth_rule_is_corruption(depths, one_pack):
    """X stands on Y and Y on X: whatever depths they claim, one of the two claims is a lie."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    for number, array in enumerate((X, Y), 1):
        repo.push({"w": array}, "m@main", message=str(number))
    manifests = []
    for pack in sorted(packs_of(repo)):
        manifests += [copy for chunk, copy in copies_in(objects, pack).items() if chunk not in IDS.values()]
    manifest_pack = write(objects, manifests)
    old = sorted(packs_of(repo))
    if one_pack:
        both = write(
            objects,
            [delta(X, Y, base_pack="", depth=depths[0]), delta(Y, X, base_pack="", depth=depths[1])],
        )
        new = (both,)
    else:
        # A name holds the digest of its pack's index, so two packs cannot name each other; but both can name a pack
        # that has been replaced by the two.
        new = (
            write(objects, [delta(X, Y, base_pack=old[0], depth=depths[0])]),
            write(objects, [delta(Y, X, base_pack=old[0], depth=depths[1])]),
        )
    names = tuple(pack.name for pack in (*new, manifest_pack))
    append_entry(objects, packs=(*new, manifest_pack), replaced=dict.fromkeys(old, names))
    repo = open_again(objects)
    for revision in ("m@v1", "m@v2"):
        with pytest.raises(CorruptionError) as caught:
            repo.checkout(revision)
        assert caught.value.kind == "base_too_deep"
    assert "base_too_deep" in {problem.kind for problem in repo.verify().problems}


def test_a_delta_that_stands_on_itself_is_corruption():
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": X}, "m@main")
    (old,) = packs_of(repo)
    copies = copies_in(objects, old)
    row = replace(copies[IDS["X"]].row, depth=1, base=IDS["X"], base_pack="", encoding=codecs.Encoding.XOR_PLANES)
    copies[IDS["X"]] = Copy(row, copies[IDS["X"]].payload)
    new = write(objects, copies.values())
    append_entry(objects, packs=(new,), replaced={old: (new.name,)})
    with pytest.raises(CorruptionError) as caught:
        open_again(objects).checkout("m@main")
    assert caught.value.kind == "base_too_deep"


def test_replacements_in_a_circle_are_corruption_and_no_endless_descent():
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": X}, "m@main")
    (old,) = packs_of(repo)
    new = write(objects, copies_in(objects, old).values())
    append_entry(objects, packs=(new,), replaced={old: (new.name,)})
    append_entry(objects, replaced={new.name: (old,)})
    with pytest.raises(CorruptionError):
        open_again(objects).checkout("m@main")


def test_a_blob_that_decodes_to_something_else_is_never_a_wrong_byte_to_those_who_check():
    """A pack that lies about its contents, with every digest in order: only the chunk id can tell."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": X}, "m@main")
    (old,) = packs_of(repo)
    copies = copies_in(objects, old)
    lie = codecs.encode(Y.tobytes(), width=4, floating=True)
    copies[IDS["X"]] = Copy(replace(copies[IDS["X"]].row, encoding=lie.encoding), bytes(lie.payload))
    new = write(objects, copies.values())
    append_entry(objects, packs=(new,), replaced={old: (new.name,)})
    repo = open_again(objects)
    with pytest.raises(CorruptionError) as caught:
        repo.checkout("m@main", verify="chunk")
    assert caught.value.kind == "bad_chunk"
    assert repo.verify().problems == []
    assert [problem.kind for problem in repo.verify(deep=True).problems] == ["bad_chunk"]


@pytest.mark.parametrize("max_depth", [0, 1, 3, 8])
def test_chains_stop_at_the_depth_that_the_repository_allows(max_depth):
    objects = MemoryObjects()
    repo = new_repository(objects, max_depth=max_depth)
    weights = X.copy()
    expected = []
    for number in range(12):
        weights[number] += 1
        expected.append(weights.tobytes())
        if number % 4 == 0:
            repo = open_again(objects)
        repo.push({"w": weights.copy()}, "m@main")
    store = store_of(open_again(objects))
    by_chunk = {}
    for pack in store.log.state.packs():
        by_chunk |= {row.chunk: StoredBlob(pack.name, row) for row in store.packs.index(pack.name).rows}
    depths = [by_chunk[chunk_id(data)].row.depth for data in expected]
    assert depths == [number % (max_depth + 1) for number in range(12)]
    for number, data in enumerate(expected):
        assert repo.checkout(f"m@v{number + 1}")["w"].tobytes() == data
        assert len(store.reader.chain(by_chunk[chunk_id(data)])) == depths[number] + 1
    assert repo.verify(deep=True).problems == []


def test_chains_are_short_where_deltas_save_little():
    objects = MemoryObjects()
    repo = new_repository(objects)
    store = store_of(repo)
    weights = noise(0, 20_000)
    depths = []
    for seed in range(1, 13):
        id = repo.push({"w": weights}, "m@main").id
        (located,) = store.locate(id, [Cell("w", 0)])
        full, *deltas = (blob.encoded_nbytes for blob in located[1])
        assert full + sum(deltas) <= 1.01 * LONGEST_CHAIN * full  # the last is as long as the one before, about
        depths.append(len(deltas))
        weights = weights * (1 + noise(seed, 20_000) * np.float32(0.1))
    assert depths == [0, 1, 2, 3] * 3


@pytest.mark.parametrize("max_depth", [-1, MAX_DEPTH])
def test_a_repository_deeper_than_the_format_allows_is_refused_before_anything_is_written(max_depth):
    objects = MemoryObjects()
    with pytest.raises(InvalidInputError):
        new_repository(objects, max_depth=max_depth)
    assert names_of(objects) == {}


def replaced_in_full(objects):
    """Move every blob of every pack into one new pack, as a repack would; return its name."""
    repo = open_again(objects)
    old = sorted(packs_of(repo))
    gathered = {}
    for pack in old:
        gathered |= copies_in(objects, pack)
    new = write(objects, gathered.values())
    append_entry(objects, packs=(new,), replaced=dict.fromkeys(old, (new.name,)))
    return old, new.name


def test_readers_and_pushes_follow_a_replaced_pack():
    objects = MemoryObjects()
    repo = new_repository(objects)
    history = [X, Y, Y + 1]
    for array in history:
        repo.push({"w": array, "frozen": X * 2}, "m@main")
    old, new = replaced_in_full(objects)
    for pack in old:
        objects.delete(pack)
    for reader in (open_again(objects), repo):
        for number, array in enumerate(history, 1):
            assert bits(reader.checkout(f"m@v{number}")) == bits({"w": array, "frozen": X * 2})
        assert reader.verify(deep=True).problems == []
    for pusher in (open_again(objects), repo):
        before = packs_of(pusher)
        following = history[-1] + np.float32(len(history))
        history.append(following)
        version = pusher.push({"w": following, "frozen": X * 2}, "m@main")
        assert bits(pusher.checkout("m@main")) == bits({"w": following, "frozen": X * 2})
        (added,) = packs_of(pusher) - before
        assert chunk_id((X * 2).tobytes()) not in store_of(pusher).packs.index(added).chunks
        closure = {pack.name for pack in store_of(pusher).reader.open(version.id).locator.packs}
        assert closure <= packs_of(pusher)
        assert new in closure
    assert open_again(objects).verify(deep=True).problems == []


def test_a_pack_that_was_replaced_twice_is_followed():
    objects = MemoryObjects()
    repo = new_repository(objects)
    for array in (X, Y):
        repo.push({"w": array}, "m@main")
    gone = []
    for _ in range(3):
        old, _ = replaced_in_full(objects)
        gone += old
    for pack in gone:
        objects.delete(pack)
    for number, array in enumerate((X, Y), 1):
        assert bits(open_again(objects).checkout(f"m@v{number}")) == bits({"w": array})
    assert open_again(objects).verify(deep=True).problems == []


def test_a_reader_with_an_open_version_follows_a_pack_that_is_replaced_and_deleted_meanwhile():
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": X}, "m@main")
    lazy = open_again(objects).version("m@main")
    old, _ = replaced_in_full(objects)
    for pack in old:
        objects.delete(pack)
    assert lazy["w"].numpy().tobytes() == X.tobytes()


class BeforeCommit:
    """Objects that do something once, just before the first put of a log entry; passes every call on."""

    def __init__(self, inner, interruption):
        self._inner = inner
        self._interruption = interruption

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put_if_absent(self, name, parts):
        if name.startswith("log/") and self._interruption is not None:
            interruption, self._interruption = self._interruption, None
            interruption()
        self._inner.put_if_absent(name, parts)


def pushed_packs(objects):
    return {name for name in names_of(objects) if name.startswith("packs/")}


def test_a_fenced_push_cannot_commit():
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": X}, "m@main")
    before = pushed_packs(objects)

    def fence():
        (pack,) = pushed_packs(objects) - before
        append_entry(objects, fenced=(pack.removeprefix("packs/").partition("-")[0],))

    with pytest.raises(ConflictError) as caught:
        open_again(BeforeCommit(objects, fence)).push({"w": Y}, "m@main")
    assert caught.value.kind == "fenced"
    after = open_again(objects)
    assert after.stats().versions == 1
    assert after.verify(deep=True).problems == []
    assert after.push({"w": Y}, "m@main").number == 2


def test_a_push_that_was_fenced_after_it_committed_has_committed():
    """Its reply is lost, and the sweeper comes between: the entry counts."""
    objects = MemoryObjects()
    new_repository(objects).push({"w": X}, "m@main")
    base = copy_of(objects)
    count = FaultyObjects(base, -1, Fault.ERROR_BEFORE)
    open_again(count).push({"w": Y}, "m@main")

    class Swept(FaultyObjects):
        def put_if_absent(self, name, parts):
            try:
                super().put_if_absent(name, parts)
            except StorageError:
                push = store_of(open_again(objects)).log.state
                (mine,) = [key for key, at in push.table("pushes") if at == push.number]
                append_entry(objects, fenced=(mine,))
                raise

    version = open_again(Swept(objects, count.writes - 1, Fault.APPLIED_BUT_ERROR)).push({"w": Y}, "m@main")
    assert version.number == 2
    assert open_again(objects).stats().versions == 2


def test_another_push_may_commit_though_some_other_was_fenced():
    objects = MemoryObjects()
    repo = new_repository(objects)
    append_entry(objects, fenced=(new_push_id(),))
    assert repo.push({"w": X}, "m@main").number == 1


@pytest.mark.parametrize("what", ["condemned", "replaced"])
@pytest.mark.parametrize("stands_on", ["chunk", "base"])
def test_a_push_that_stands_on_a_pack_that_is_no_longer_live_cannot_commit(what, stands_on):
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": X}, "m@main")
    (old,) = packs_of(repo)

    def lose():
        if what == "condemned":
            append_entry(objects, condemned=(old,))
        else:
            new = write(objects, copies_in(objects, old).values())
            append_entry(objects, packs=(new,), replaced={old: (new.name,)})

    late = open_again(BeforeCommit(objects, lose))
    weights = {"w": X, "new": Y * 3} if stands_on == "chunk" else {"w": Y}
    with pytest.raises(ConflictError) as caught:
        late.push(weights, "m@main")
    assert caught.value.kind == "pack_not_live"
    assert caught.value.context["object"] == old
    assert open_again(objects).stats().versions == 1
    version = late.push(weights, "m@side")  # a new push sees what is live, and stores what it lacks
    assert bits(late.checkout(version.id)) == bits(weights)
    assert bits(open_again(objects).checkout("m@side", verify="chunk")) == bits(weights)


def test_a_push_that_stands_on_no_lost_pack_may_commit():
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": X}, "m@other")
    (old,) = packs_of(repo)
    late = open_again(BeforeCommit(objects, lambda: append_entry(objects, condemned=(old,))))
    assert late.push({"different": noise(5, 700)}, "n@main").number == 1


def test_what_was_condemned_is_stored_again():
    """A condemned pack is there until it is deleted, but nothing new may stand on it."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": X}, "m@main")
    (old,) = packs_of(repo)
    append_entry(objects, condemned=(old,))
    for pusher, branch in ((repo, "a"), (open_again(objects), "b")):
        pusher.push({"w": X}, f"n@{branch}")
    objects.delete(old)
    assert bits(open_again(objects).checkout("n@a")) == bits({"w": X})
    assert bits(open_again(objects).checkout("n@b")) == bits({"w": X})
