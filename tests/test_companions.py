"""A tensor that is a cast of another one of the same checkpoint stores no payload, wherever the two stand."""

import ml_dtypes
import numpy as np
import pytest
from support import Copy, bits, copies_in, new_repository, noise, open_again, store_of

from lamella_engine.codecs import Encoding
from lamella_engine.companions import MOST_FOLLOWERS, companions, expected
from lamella_engine.dtypes import dtype_named, dtype_of_numpy
from lamella_engine.executor import ThreadExecutor
from lamella_engine.format.digests import chunk_id
from lamella_engine.model import TensorSpec
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.repository import Repository


def found(tensors: dict[str, np.ndarray]) -> dict[str, str]:
    specs = {name: TensorSpec(name, dtype_of_numpy(array.dtype), array.shape) for name, array in tensors.items()}
    pairs = companions(
        [specs[name] for name in sorted(specs)],
        lambda spec, region: np.ascontiguousarray(tensors[spec.name][region.slices]).tobytes(),
    )
    return {name: spec.name for name, spec in pairs.items()}


def copies(objects: MemoryObjects, repo: Repository) -> dict[bytes, list[Copy]]:
    everything: dict[bytes, list[Copy]] = {}
    for pack in store_of(repo).log.refresh().packs():
        for chunk, copy in copies_in(objects, pack.name).items():
            everything.setdefault(chunk, []).append(copy)
    return everything


def test_casts_are_found_in_either_order_and_the_shorter_of_two_equal_ones_is_kept():
    master = noise(0, 40, 50)
    short = master.astype(ml_dtypes.bfloat16)
    assert found({"a": master, "z": short}) == {"z": "a"}
    assert found({"a": short, "z": master}) == {"a": "z"}
    assert found({"a": short, "z": short.astype(np.float32)}) == {"z": "a"}
    assert found({"a": master.astype(np.float16), "z": master, "zz": short}) == {"a": "z", "zz": "z"}


def test_tensors_that_only_look_alike_have_no_companions():
    master = noise(0, 40, 50)
    assert found({"a": master, "z": noise(1, 40, 50).astype(np.float16)}) == {}
    assert found({"a": master, "z": master.astype(np.float16).reshape(50, 40)}) == {}
    assert found({"a": np.zeros((40, 50), np.float32), "z": np.zeros((40, 50), np.float16)}) == {}
    assert found({"a": master[0, :40], "z": master[0, :40].astype(np.float16)}) == {}


def test_moments_are_found_by_their_names():
    first, second = noise(0, 40, 50), noise(1, 40, 50) ** 2
    assert found({"state.0.exp_avg": first, "state.0.exp_avg_sq": second}) == {"state.0.exp_avg": "state.0.exp_avg_sq"}
    assert found({"state.0.exp_avg": first, "state.1.exp_avg_sq": second}) == {}
    assert found({"0.exp_avg": first, "0.exp_avg_sq": second.astype(np.float64)}) == {}


def test_casts_are_expected_where_as_many_tensors_of_a_shape_sort_alike():
    def guessed(*names: str, shape: tuple[int, ...] = (40, 50)) -> dict[str, str]:
        kinds = {"16": "bfloat16", "h": "float16", "d": "float64"}
        dtypes = {name: dtype_named(kinds.get(name.rpartition(":")[2], "float32")) for name in names}
        return {
            name: spec.name
            for name, spec in expected([TensorSpec(name, dtypes[name], shape) for name in sorted(names)]).items()
        }

    assert guessed("master.a", "master.b", "a:16", "b:16") == {"a:16": "master.a", "b:16": "master.b"}
    assert guessed("a.master", "b.master", "a:16", "a:h") == {}
    assert guessed("a.master", "a:16", "a:h") == {"a:16": "a.master", "a:h": "a.master"}
    assert guessed("a.fp32", "a.momentum_buffer", "exp_avg.a", "a:16") == {"a:16": "a.fp32"}
    assert guessed("a:d", "a:16") == {}
    assert guessed("a.master", "a:16", shape=(7,)) == {}


def test_a_companion_has_none_itself_and_few_followers():
    master = noise(0, 40, 50)
    many = {f"copy {number}": master.astype(np.float16) for number in range(MOST_FOLLOWERS + 3)}
    pairs = found({"master": master, **many})
    assert set(pairs.values()) == {"master"}
    assert len(pairs) == MOST_FOLLOWERS


@pytest.mark.parametrize("executor", [None, ThreadExecutor()])
@pytest.mark.parametrize("short", [np.float16, ml_dtypes.bfloat16])
def test_a_checkpoint_in_two_types_costs_one(executor, short):
    objects = MemoryObjects()
    repo = new_repository(objects, executor)
    masters = {f"model.{name}": noise(name, 1100, 1000) for name in range(3)}
    tensors = masters | {f"a.{name}": array.astype(short) for name, array in masters.items()}
    alone = new_repository()
    alone.push(masters, "m@main")
    repo.push(tensors, "m@main")
    assert bits(open_again(objects).checkout("m@main", verify="chunk")) == bits(tensors)
    for name in masters:
        shorter = tensors[f"a.{name}"]
        for cell in (shorter[:1024], shorter[1024:]):
            (copy,) = copies(objects, repo)[chunk_id(cell.tobytes())]
            assert (copy.row.encoding, copy.row.encoded_nbytes) == (Encoding.CAST, 1)
    # A row of a pack and of the cell table for each of six cells, and their share of the structure.
    assert repo.stats().stored_nbytes < alone.stats().stored_nbytes + 6 * 200 + 1000


def test_casts_stay_casts_over_many_versions_whatever_the_depth():
    objects = MemoryObjects()
    repo = new_repository(objects, max_depth=2)
    for step in range(6):
        master = noise(0, 200, 100) + np.float32(step) * noise(1, 200, 100) * np.float32(1e-4)
        tensors = {"master": master, "a": master.astype(ml_dtypes.bfloat16)}
        repo.push(tensors, "m@main")
        (copy,) = copies(objects, repo)[chunk_id(tensors["a"].tobytes())]
        assert (copy.row.encoding, copy.row.depth) == (Encoding.CAST, step % 3 + 1)
        assert bits(open_again(objects).checkout("m@main", verify="chunk")) == bits(tensors)
    assert repo.verify(deep=True).ok


def test_a_branch_in_another_type_stores_no_payload():
    objects = MemoryObjects()
    repo = new_repository(objects)
    master = {"w": noise(0, 300, 100)}
    repo.push(master, "m@main")
    short = {"w": master["w"].astype(ml_dtypes.bfloat16)}
    repo.push(short, "m@short", parent="m@main")
    repo.push({"w": short["w"].astype(np.float32)}, "m@wide", parent="m@short")
    for tensors, branch in ((short, "short"), ({"w": short["w"].astype(np.float32)}, "wide")):
        (copy,) = copies(objects, repo)[chunk_id(tensors["w"].tobytes())]
        assert (copy.row.encoding, copy.row.encoded_nbytes) == (Encoding.CAST, 1)
        assert bits(open_again(objects).checkout(f"m@{branch}")) == bits(tensors)


def test_a_companion_may_have_been_stored_long_ago():
    objects = MemoryObjects()
    repo = new_repository(objects)
    master = noise(0, 300, 100)
    repo.push({"w": master}, "m@main")
    repo = open_again(objects)
    both = {"w": master, "a": master.astype(np.float16)}
    repo.push(both, "m@main")
    (copy,) = copies(objects, repo)[chunk_id(both["a"].tobytes())]
    assert (copy.row.encoding, copy.row.encoded_nbytes) == (Encoding.CAST, 1)
    assert bits(open_again(objects).checkout("m@main", verify="chunk")) == bits(both)


def test_a_companion_whose_chunk_repeats_another_one_is_done_without():
    objects = MemoryObjects()
    repo = new_repository(objects)
    master = noise(0, 300, 100)
    tensors = {"a": master, "b": master.copy(), "c": master.astype(np.float16), "d": master.astype(np.float16)}
    repo.push(tensors, "m@main")
    assert bits(open_again(objects).checkout("m@main", verify="chunk")) == bits(tensors)


def test_packs_may_end_between_a_companion_and_its_follower(monkeypatch):
    monkeypatch.setattr("lamella_engine.content_store.packing.PACK_NBYTES", 1)
    objects = MemoryObjects()
    repo = new_repository(objects, ThreadExecutor())
    tensors = {}
    for name in range(5):
        tensors[f"{name}"] = noise(name, 300, 100)
        tensors[f"{name} short"] = tensors[f"{name}"].astype(np.float16)
    repo.push(tensors, "m@main")
    assert len({pack.name for pack in store_of(repo).log.refresh().packs()}) > 10
    again = open_again(objects)
    assert bits(again.checkout("m@main", verify="chunk")) == bits(tensors)
    assert again.verify(deep=True).ok
    assert again.distance("m@main", "m@main").l2 == 0


def test_the_manifest_is_in_order_whatever_order_tensors_are_stored_in():
    objects = MemoryObjects()
    repo = new_repository(objects, ThreadExecutor())
    tensors = {"a": noise(0, 200).astype(np.float16), "b": noise(1, 3), "c.exp_avg": noise(2, 2100, 600)}
    tensors |= {"c.exp_avg_sq": noise(3, 2100, 600), "d": np.ones(4), "e": noise(0, 200)}
    version = repo.push(tensors, "m@main")
    assert list(version) == sorted(tensors)
    assert bits(open_again(objects).checkout("m@main", verify="chunk")) == bits(tensors)
    assert repo.verify().ok  # computes the parameters id from the cells in their order
