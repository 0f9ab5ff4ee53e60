"""Bases come from the nearest version, which sketches tell without reading weights."""

import ml_dtypes
import numpy as np
import pytest
from faults import CountingObjects
from support import bits, copies_in, names_of, new_repository, noise, open_again, store_of

from lamella_engine.dtypes import dtype_of_numpy
from lamella_engine.format.digests import chunk_id
from lamella_engine.model import TensorSpec
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.sketches import FEWEST_ELEMENTS, Sketch, parse, runs, sketched, take


def spec_of(name: str, array: np.ndarray) -> TensorSpec:
    return TensorSpec(name, dtype_of_numpy(array.dtype), array.shape)


def sketch_of(tensors: dict[str, np.ndarray]) -> Sketch:
    specs = [spec_of(name, tensors[name]) for name in sorted(tensors)]
    return take(specs, lambda spec, run: np.ascontiguousarray(tensors[spec.name][run.slices]).tobytes())


def tuned(array: np.ndarray, seed: int, *, by: float = 1e-4) -> np.ndarray:
    return array + noise(seed, *array.shape, dtype=array.dtype) * array.dtype.type(by)


def base_of(objects: MemoryObjects, repo, tensor: np.ndarray) -> bytes | None:
    for pack in store_of(repo).log.refresh().packs():
        copy = copies_in(objects, pack.name).get(chunk_id(tensor.tobytes()))
        if copy is not None:
            return copy.row.base
    raise AssertionError("no such chunk is stored")


@pytest.mark.parametrize("shape", [(1,), (7,), (1000,), (3, 5), (40, 1), (1, 100), (6, 7, 33)])
def test_runs_lie_inside_the_tensor_and_are_what_their_boxes_say(shape):
    array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    for run in runs(spec_of("w", array), count=8, elements=16):
        assert array[run.slices].size
        assert array[run.slices].tobytes() == array.tobytes()[run.start : run.stop]


def test_a_sketch_comes_back_from_its_lanes_and_others_make_none():
    tensors = {"a": noise(0, 200, 100), "b": noise(1, 200, 100).astype(np.float16), "c": noise(2, 300, 90)}
    specs = [spec_of(name, array) for name, array in tensors.items()]
    lanes = sketch_of(tensors).lanes()
    assert sorted(lanes) == [2, 4]
    assert parse(specs, lanes) == sketch_of(tensors)
    assert parse(specs, {**lanes, 2: lanes[2][:-2]}) == Sketch({})
    assert parse(specs, {4: lanes[4]}) == Sketch({})
    assert parse(specs, {**lanes, 8: bytes(8)}) == Sketch({})


def test_small_tensors_and_integers_have_no_sketch():
    tensors = {"few": noise(0, FEWEST_ELEMENTS - 1), "enough": noise(0, FEWEST_ELEMENTS)}
    tensors["int"] = np.zeros(FEWEST_ELEMENTS, np.int32)
    assert [spec.name for spec, _ in sketched(spec_of(name, array) for name, array in tensors.items())] == ["enough"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_estimates_order_versions_as_their_deltas_do(dtype):
    base = noise(0, 400, 400) * np.float32(0.02)
    own = sketch_of({"w": base.astype(dtype)})
    near, far, other = (
        own.bits_against(sketch_of({"w": array.astype(dtype)}))["w"]
        for array in (tuned(base, 1, by=1e-5), tuned(base, 2, by=1e-3), noise(3, 400, 400) * np.float32(0.02))
    )
    assert near < far < other
    assert far < own.bits_alone("w") < other
    assert own.bits_against(own) == {"w": 0}


def test_what_is_of_another_shape_or_type_is_not_compared():
    own = sketch_of({"w": noise(0, 200, 100)})
    for array in (noise(0, 100, 200), noise(0, 200, 100).astype(np.float64)):
        assert own.bits_against(sketch_of({"w": array})) == {}
    assert own.bits_against(sketch_of({"v": noise(0, 200, 100)})) == {}


def test_a_push_without_a_parent_is_a_delta_of_the_nearest_version():
    objects = MemoryObjects()
    repo = new_repository(objects)
    base, stranger = noise(0, 300, 100), noise(1, 300, 100)
    far = tuned(base, 2, by=1e-2)
    for branch, array in (("base", base), ("stranger", stranger), ("far", far)):
        repo.push({"w": array}, f"m@{branch}")
    near = tuned(base, 3)
    repo = open_again(objects)
    version = repo.push({"w": near}, "another@main")
    assert base_of(objects, repo, near) == chunk_id(base.tobytes())
    assert version.parents == ()
    assert bits(open_again(objects).checkout("another@main", verify="chunk")) == {"w": bits({"w": near})["w"]}
    assert repo.verify(deep=True).ok


def test_a_parent_that_fits_badly_is_passed_over_tensor_by_tensor():
    objects = MemoryObjects()
    repo = new_repository(objects)
    base = {"a": noise(0, 300, 100), "b": noise(1, 300, 100)}
    repo.push(base, "m@main")
    parent = {"a": noise(2, 300, 100), "b": tuned(base["b"], 3, by=1e-5)}
    repo.push(parent, "m@main")
    child = {"a": tuned(base["a"], 4), "b": tuned(parent["b"], 5, by=1e-7)}
    repo.push(child, "m@main")
    assert base_of(objects, repo, child["a"]) == chunk_id(base["a"].tobytes())
    assert base_of(objects, repo, child["b"]) == chunk_id(parent["b"].tobytes())
    assert bits(open_again(objects).checkout("m@main", verify="chunk")) == bits(child)


def test_a_parent_that_fits_costs_no_look_at_others():
    objects = CountingObjects(MemoryObjects())
    repo = new_repository(objects)
    base = noise(0, 300, 100)
    for other in range(8):
        repo.push({"w": noise(other, 300, 100)}, f"m@other{other}")
    repo.push({"w": base}, "m@main")

    def push(branch: str) -> int:
        again = open_again(objects)
        objects.reset()
        again.push({"w": tuned(base, 9)}, branch, parent="m@main" if branch != "m@main" else None)
        return objects.read_nbytes

    assert push("m@fits") < 200_000


def test_sketches_read_no_weights():
    objects = CountingObjects(MemoryObjects())
    repo = new_repository(objects)
    for other in range(8):
        repo.push({"w": noise(other, 1000, 300)}, f"m@other{other}")
    again = open_again(objects)
    objects.reset()
    again.push({"w": noise(100, 1000, 300)}, "another@main")
    assert objects.read_nbytes < 8 * 10_000
    assert base_of(objects, again, noise(100, 1000, 300)) is None


def test_a_sketch_is_a_delta_of_the_parents():
    repo = new_repository()
    tensors = {f"{name}": noise(name, 200, 100).astype(ml_dtypes.bfloat16) for name in range(50)}
    tensors["0"][0] = 0
    repo.push(tensors, "m@main")
    before = repo.stats().stored_nbytes
    tensors["0"][0] = 1
    repo.push(tensors, "m@main")
    assert repo.stats().stored_nbytes - before < 50_000 + 4_000


def damage(objects: MemoryObjects, repo, chunk: bytes) -> MemoryObjects:
    """Return a copy of a repository in which the payload of a chunk has one flipped bit."""
    copy = MemoryObjects()
    for name in names_of(objects):
        data = bytearray(objects.get(name))
        if name.startswith("packs/") and (row := store_of(repo).packs.index(name).find(chunk)) is not None:
            data[row.start] ^= 1
        copy.put_if_absent(name, [bytes(data)])
    return copy


def test_damage_in_a_version_that_is_only_near_does_not_stop_a_push():
    objects = MemoryObjects()
    repo = new_repository(objects)
    base = noise(0, 300, 100)
    repo.push({"w": base}, "m@main")
    damaged = damage(objects, repo, chunk_id(base.tobytes()))
    again = open_again(damaged)
    near = {"w": tuned(base, 3)}
    again.push(near, "another@main")
    assert bits(open_again(damaged).checkout("another@main", verify="chunk")) == bits(near)


def test_a_damaged_sketch_of_the_parent_does_not_stop_a_push():
    objects = MemoryObjects()
    repo = new_repository(objects)
    base = noise(0, 300, 100)
    version = repo.push({"w": base}, "m@main")
    (lanes,) = store_of(repo).version(version.id).description.sketches
    damaged = damage(objects, repo, lanes.chunk)
    child = {"w": tuned(base, 3)}
    open_again(damaged).push(child, "m@main")
    assert bits(open_again(damaged).checkout("m@main", verify="chunk")) == bits(child)
