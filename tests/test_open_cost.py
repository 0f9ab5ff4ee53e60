"""What opening and reading cost: they grow with what is asked for, never with the repository."""

from collections import Counter

import numpy as np
import pytest
from faults import CountingObjects
from support import bits, copy_of, new_repository, noise, open_again, store_of

from lamella_engine.content_store.entries import FOLD_EVERY
from lamella_engine.objects.memory import MemoryObjects

FEW, MANY = 10, 10_000


LAYER = noise(0, 64, 64)


def small_version(number):
    """Return a version's tensors: one layer of 16 KB, a number of it other than in the version before, and a bias."""
    weight = LAYER.copy()
    weight[number % 64, 7] = number
    return {"weight": weight, "bias": np.float32(number)}


@pytest.fixture(scope="module")
def repositories():
    """Return two repositories, of few and of many small versions, each pushed one by one to one branch."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    few = None
    for number in range(1, MANY + 1):
        repo.push(small_version(number), "m@main", metrics={"step": number})
        if number == FEW:
            few = copy_of(objects)
    return {FEW: few, MANY: objects}


def cost(objects, revision, number):
    """Open a repository and check a version out, knowing nothing; return the reads and bytes that it took."""
    counting = CountingObjects(objects)
    assert bits(open_again(counting).checkout(revision)) == bits(small_version(number))
    return counting.reads, counting.read_nbytes, Counter(name.partition("/")[0] for _, name in counting.trace)


@pytest.mark.parametrize("which", ["newest", "oldest", "middle"])
def test_a_version_among_ten_thousand_costs_at_most_twice_what_it_costs_among_ten(which, repositories, capsys):
    found = {}
    for count, objects in repositories.items():
        number = {"newest": count, "oldest": 1, "middle": count // 2}[which]
        revision = "m@main" if which == "newest" else f"m@v{number}"
        found[count] = cost(objects, revision, number)
        with capsys.disabled():
            reads, nbytes, parts = found[count]
            print(f"\n{which} of {count}: {reads} reads, {nbytes} bytes; {dict(parts)}", end="")
    assert found[MANY][0] <= 2 * found[FEW][0]
    assert found[MANY][1] <= 2 * found[FEW][1]


def test_opening_costs_the_same_at_every_distance_from_the_last_fold():
    """The log's tail is bounded: at most one fold's worth of entries and a few, wherever a repository stands."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push(small_version(0), "m@main")
    reads = []
    for number in range(3 * FOLD_EVERY):
        if number % 2:
            repo.alias("m@production", f"m@v{1 + number // 2 % 2}")
        else:
            repo.push(small_version(number + 1), "m@main")
        counting = CountingObjects(objects)
        open_again(counting)
        reads.append(counting.reads)
    assert max(reads[FOLD_EVERY:]) <= FOLD_EVERY + 8


def test_a_push_costs_the_same_in_a_repository_of_ten_thousand(repositories):
    """Reads and writes of a push by a process that knows nothing, but for the packs whose indexes it catches up on."""
    found = {}
    for count, objects in repositories.items():
        counting = CountingObjects(copy_of(objects))
        repo = open_again(counting)
        repo.push(small_version(count + 1), "m@main")
        counting.reset()
        repo.push(small_version(count + 2), "m@main")
        found[count] = counting.reads, counting.read_nbytes, counting.writes
    assert found[MANY][0] <= 2 * found[FEW][0] + FOLD_EVERY
    assert found[MANY][2] <= found[FEW][2] + 1


LAYERS = 12


@pytest.fixture(scope="module")
def layered():
    """Return a repository of three fine-tunes, each a delta of the one before, and the newest one's tensors."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    weights = {
        f"layer.{layer:02d}.{part}": noise(10 * layer + place, *shape)
        for layer in range(LAYERS)
        for place, (part, shape) in enumerate({"bias": (256,), "norm": (256,), "weight": (512, 1024)}.items())
    }
    weights["embedding"] = noise(1_000, 4_000, 300)
    for step in range(3):
        random = np.random.default_rng(step)
        for name, array in weights.items():
            weights[name] = array + random.standard_normal(array.shape).astype(np.float32) * np.float32(1e-4)
        repo.push(weights, "m@main")
    return objects, weights


@pytest.mark.parametrize("include", ["layer.07.*", "layer.07.weight", "embedding", "layer.*.bias"])
@pytest.mark.parametrize("revision", ["m@v1", "m@v3"])
def test_one_layer_reads_its_blobs_their_bases_and_pages_of_structure(include, revision, layered, capsys):
    objects, newest = layered
    counting = CountingObjects(objects)
    ranges = []

    class Recording:
        def __getattr__(self, name):
            return getattr(counting, name)

        def get_range(self, name, start, stop):
            ranges.append((name, start, stop))
            return counting.get_range(name, start, stop)

        def get_ranges(self, name, asked):
            ranges.extend((name, start, stop) for start, stop in asked)
            return counting.get_ranges(name, asked)

    out = open_again(Recording()).checkout(revision, include=include)
    if revision == "m@v3":
        assert bits(out) == bits({name: newest[name] for name in out})

    store = store_of(open_again(objects))
    id = store.resolve(revision)
    manifest = store.manifest(id)
    version = store.reader.open(id)
    wanted = {
        link
        for name in out
        for row in manifest.rows(name)
        for link in store.reader.chain(store.reader.copy_of_row(version, row))
    }
    assert len({link.pack for link in wanted}) == int(revision[-1])
    pages = {
        (copy.pack, copy.row.start, copy.row.stop)
        for place, (chunk, _) in enumerate(version.recorded.description.manifest_chunks)
        for copy in store.reader.chain(store.reader.copy(chunk, version.pack_of_manifest(place)))
    }
    read = Counter()
    for name, start, stop in ranges:
        if not name.startswith("packs/"):
            kind = name.partition("/")[0]
        elif start >= store.packs.index(name).blobs_nbytes:
            kind = "pack index"
        else:
            kind = "pages" if (name, start, stop) in pages else "blobs"
        read[kind] += stop - start
    read["log"] = counting.read_nbytes - sum(read.values())
    wanted_nbytes = sum(link.row.encoded_nbytes for link in wanted)
    with capsys.disabled():
        print(f"\n{include} of {revision}: blobs and bases {wanted_nbytes}, read {dict(read)}", end="")
    assert wanted_nbytes <= read["blobs"] <= 1.1 * wanted_nbytes
    assert read["pages"] <= sum(stop - start for _, start, stop in pages)
    assert read["pack index"] <= 16_000 * len({link.pack for link in wanted})
    assert read["meta"] <= 16_000
    assert read["log"] <= 16_000
    assert set(read) <= {"blobs", "pages", "pack index", "meta", "log", "fold"}


def test_a_layer_of_a_large_structure_reads_its_own_pages_only():
    """20,000 tensors make many pages: one of them costs a page of structure, one of cells, and no other."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({f"expert.{i:05d}.weight": np.full(20, i, np.float32) for i in range(20_000)}, "m@main")
    store = store_of(repo)
    pages = len(store.version(store.resolve("m@main")).description.manifest_chunks)
    assert pages > 20
    counting = CountingObjects(objects)
    out = open_again(counting).checkout("m@main", include="expert.01234.*")
    assert bits(out) == bits({"expert.01234.weight": np.full(20, 1234, np.float32)})
    assert sum(1 for call, name in counting.trace if name.startswith("packs/")) <= 4
