"""Distances are those of the definition in float64, over what differs and over what does not."""

import math

import numpy as np
import pytest
from faults import CountingObjects
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors as drawn_tensors
from support import new_repository, noise, open_again

from lamella_engine.dtypes import DTYPES, Dtype
from lamella_engine.errors import InvalidInputError, TensorNotFoundError
from lamella_engine.executor import ThreadExecutor
from lamella_engine.objects.memory import MemoryObjects

NUMBERS = [dtype for dtype in DTYPES if dtype.numpy is not None]


def lanes_of(array):
    """Return an array's numbers as float64; a complex one is two."""
    if array.dtype.kind == "c":
        array = np.ascontiguousarray(array).reshape(-1).view(f"f{array.dtype.itemsize // 2}")
    with np.errstate(invalid="ignore", over="ignore"):
        return array.reshape(-1).astype(np.float64)


def definition(pairs):
    """Return l2, l1, linf, changed and cosine of pairs of arrays, straight from their definitions."""
    changed = count = 0
    a, b, same = [], [], []
    for left, right in pairs:
        left, right = np.ascontiguousarray(left).reshape(-1), np.ascontiguousarray(right).reshape(-1)
        size = left.dtype.itemsize
        octets = [array.view(np.uint8).reshape(-1, size) for array in (left, right)]
        changed += int((octets[0] != octets[1]).any(axis=1).sum())
        count += left.size
        a.append(lanes_of(left))
        b.append(lanes_of(right))
        lane = size // 2 if left.dtype.kind == "c" else size
        same.append((left.view(np.uint8).reshape(-1, lane) == right.view(np.uint8).reshape(-1, lane)).all(axis=1))
    a, b, same = (np.concatenate(parts) if parts else np.zeros(0) for parts in (a, b, same))
    with np.errstate(all="ignore"):
        difference = np.where(same.astype(bool), 0.0, np.abs(a - b))
        norms = math.sqrt(np.sum(a * a)) * math.sqrt(np.sum(b * b))
        return {
            "l2": math.sqrt(np.sum(difference**2)),
            "l1": float(np.sum(difference)),
            "linf": float(np.max(difference, initial=0.0)),
            "changed": changed / count if count else 0.0,
            "cosine": float(np.sum(a * b)) / norms if norms else math.nan,
        }


def close(found, expected, *, terms):
    """Whether two sums of so many terms agree as well as float64 in another order can."""
    if math.isnan(expected) or math.isinf(expected):
        return math.isnan(found) == math.isnan(expected) and (math.isnan(expected) or found == expected)
    return math.isclose(found, expected, rel_tol=1e-15 * (terms + 10), abs_tol=1e-300)


def check(distance, pairs, *, cosine=True):
    expected = definition(pairs)
    terms = sum(left.size for left, _ in pairs)
    for what in ("l2", "l1"):
        assert close(getattr(distance, what), expected[what], terms=terms), what
    assert repr(distance.linf) == repr(expected["linf"])
    assert distance.changed == expected["changed"]
    if cosine and not math.isinf(expected["cosine"]):
        found = distance.cosine
        if math.isnan(expected["cosine"]):
            assert math.isnan(found)
        else:  # terms of both signs may cancel
            assert abs(found - expected["cosine"]) <= 1e-15 * (terms + 10)


def measured(pairs, executor=None):
    """Push both sides of named pairs, and return the distance between them."""
    repo = new_repository(MemoryObjects(), executor)
    repo.push({name: left for name, (left, _) in pairs.items()}, "m@main", message="a")
    repo.push({name: right for name, (_, right) in pairs.items()}, "m@main", message="b")
    return repo.distance("m@v1", "m@v2")


def modest(dtype: Dtype, seed: int, count: int):
    """Return finite numbers of a dtype whose squares are finite too."""
    random = np.random.default_rng(seed)
    if dtype.numpy.kind == "b":
        return random.integers(0, 2, count).astype(bool)
    if dtype.numpy.kind in "iu":
        low = -100 if dtype.numpy.kind == "i" else 0
        return random.integers(low, 100, count).astype(dtype.numpy)
    if dtype.numpy.kind == "c":
        return (random.standard_normal(count) + 1j * random.standard_normal(count)).astype(dtype.numpy)
    return np.exp2(random.uniform(-3, 3, count)).astype(dtype.numpy)


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
def test_every_dtype_is_measured_as_float64(dtype):
    left, right = modest(dtype, 0, 5_000), modest(dtype, 1, 5_000)
    right[::3] = left[::3]
    pairs = {"w": (left, right), "same": (left, left), "short": (left[:3], right[:3])}
    distance = measured(pairs)
    check(distance, list(pairs.values()))
    assert 0 < distance.changed < 1
    for name, pair in pairs.items():
        check(distance.per_tensor[name], [pair])
    assert distance.per_tensor["same"].l2 == 0


@given(st.data())
def test_any_bits_of_any_dtype_are_measured_by_the_definition(data):
    dtype = data.draw(st.sampled_from(NUMBERS))
    left, other = data.draw(drawn_tensors(dtype)), data.draw(drawn_tensors(dtype))
    right = np.resize(other, left.shape) if other.size else left
    distance = measured({"w": (left, right)})
    expected = definition([(left, right)])
    assert distance.changed == expected["changed"]
    assert repr(distance.linf) == repr(expected["linf"])
    for what in ("l2", "l1"):
        assert close(getattr(distance, what), expected[what], terms=left.size), what


def test_equal_nans_and_infinities_are_no_distance_and_others_are():
    special = np.array([math.nan, math.inf, -math.inf, -0.0, 1.0], np.float32)
    another_nan = (special.view(np.uint32) + np.array([1, 0, 0, 0, 0], np.uint32)).view(np.float32)
    others = {
        "equal": (special, special.copy(), 0.0, 0.0),
        "zeros of both signs": (special, special * np.array([1, 1, 1, -1, 1], np.float32), 0.0, 0.2),
        "another nan": (special, another_nan, math.nan, 0.2),
        "infinity and one": (special, np.array([math.nan, 1, -math.inf, -0.0, 1], np.float32), math.inf, 0.2),
    }  # fmt: skip
    for what, (left, right, l2, changed) in others.items():
        pad = np.ones(20, np.float32)  # long enough to be a blob
        distance = measured({"w": (left, right), "long": (np.concatenate([left, pad]), np.concatenate([right, pad]))})
        for part in (distance.per_tensor["w"], distance.per_tensor["long"]):
            assert (part.l2 == l2) or (math.isnan(l2) and math.isnan(part.l2)), what
            assert (part.linf == l2) or (math.isnan(l2) and math.isnan(part.linf)), what
        assert distance.per_tensor["w"].changed == changed, what


@pytest.mark.parametrize("threads", [None, 3], ids=["inline", "threads"])
def test_equal_chunks_are_left_out_and_change_nothing(threads):
    """Of three cells one differs: the distance is that of whole arrays, and only that one's blobs are read."""
    executor = None if threads is None else ThreadExecutor(threads=threads)
    left = noise(0, 2_600, 1_000)
    right = left.copy()
    right[1_500:1_600] *= 1.5
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": left, "frozen": left[:500]}, "m@main")
    repo.push({"w": right, "frozen": left[:500]}, "m@main")
    counting = CountingObjects(objects)
    reader = open_again(counting, executor)
    distance = reader.distance("m@v1", "m@v2")
    check(distance, [(left, right), (left[:500], left[:500])], cosine=False)
    assert counting.read_nbytes < 2 * left[:1_024].nbytes  # a full blob for the one, a base and a delta for the other
    without_cosine = counting.read_nbytes
    check(distance, [(left, right), (left[:500], left[:500])])
    assert counting.read_nbytes > without_cosine
    check(distance.per_tensor["w"], [(left, right)])
    assert distance.cosine != distance.per_tensor["w"].cosine
    reader.close()


@pytest.mark.parametrize(("a", "b"), [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 3)])
def test_what_two_versions_stand_on_is_read_once(a, b):
    objects = MemoryObjects()
    repo = new_repository(objects)
    arrays = {1: noise(0, 300, 400)}
    for step in (2, 3):
        arrays[step] = (arrays[step - 1].view(np.uint32) + np.uint32(step)).view(np.float32)
    for array in arrays.values():
        repo.push({"w": array, "tiny": array[0, :3]}, "m@main")
    counting = CountingObjects(objects)
    reader = open_again(counting)
    cost = reader.cost(f"m@v{max(a, b)}")
    assert cost.max_depth == max(a, b) - 1
    reader.cost(f"m@v{min(a, b)}")  # from here on the pages of both are known
    counting.reset()
    distance = reader.distance(f"m@v{a}", f"m@v{b}")
    assert counting.read_nbytes < (cost.read_nbytes if a != b else 0) + 1_000
    check(distance, [(arrays[a], arrays[b]), (arrays[a][0, :3], arrays[b][0, :3])])


def test_the_distance_to_itself_is_zero_and_reads_no_weights():
    objects = MemoryObjects()
    new_repository(objects).push({"w": noise(0, 100_000), "nan": np.full(100, np.nan)}, "m@main")
    counting = CountingObjects(objects)
    distance = open_again(counting).distance("m@main", "m@v1", include="w")
    assert (distance.l2, distance.l1, distance.linf, distance.changed, distance.count) == (0.0, 0.0, 0.0, 0.0, 100_000)
    assert counting.read_nbytes < 10_000
    assert math.isclose(distance.cosine, 1.0, rel_tol=1e-12)


def test_a_distance_is_symmetric_and_the_same_bit_for_bit_with_any_threads():
    objects = MemoryObjects()
    repo = new_repository(objects)
    for seed in range(2):
        repo.push({f"{i}": noise(10 * seed + i, 70_001) for i in range(8)}, "m@main")

    def numbers(repo, a, b):
        distance = repo.distance(a, b)
        return repr([(d.l2, d.l1, d.linf, d.cosine, d.changed) for d in (distance, *distance.per_tensor.values())])

    expected = numbers(repo, "m@v1", "m@v2")
    assert numbers(repo, "m@v2", "m@v1") == expected
    for threads in (1, 2, 5):
        reader = open_again(objects, ThreadExecutor(threads=threads))
        assert numbers(reader, "m@v1", "m@v2") == expected
        reader.close()


def test_cosine_is_nan_of_zeros_and_of_nothing():
    zeros = np.zeros(100, np.float32)
    assert math.isnan(measured({"w": (zeros, noise(0, 100))}).cosine)
    assert math.isnan(measured({"w": (zeros[:0], zeros[:0]), "s": (np.float32(0), np.float32(1))}).cosine)


def test_include_selects_and_globs():
    repo = new_repository()
    left, right = noise(0, 100), noise(1, 100)
    repo.push({"a.w": left, "b.w": left}, "m@main")
    repo.push({"a.w": right, "b.w": left}, "m@main")
    assert list(repo.distance("m@v1", "m@v2", include="b*").per_tensor) == ["b.w"]
    assert repo.distance("m@v1", "m@v2", include="b*").l2 == 0
    check(repo.distance("m@v1", "m@v2", include=["a*", "b*"]), [(left, right), (left, left)])
    with pytest.raises(TensorNotFoundError):
        repo.distance("m@v1", "m@v2", include="c*")


@pytest.mark.parametrize(
    "other",
    [{"w": noise(0, 9), "more": noise(0, 9)}, {}, {"w": noise(0, 3, 3)}, {"w": noise(0, 9).astype(np.float64)}],
    ids=["added", "removed", "reshaped", "another dtype"],
)
def test_versions_of_other_structure_have_no_distance_but_their_common_tensors_have(other):
    repo = new_repository()
    repo.push({"w": noise(0, 9), "common": noise(1, 9)}, "m@main")
    repo.push(other | {"common": noise(2, 9)}, "m@main")
    for a, b in (("m@v1", "m@v2"), ("m@v2", "m@v1")):
        with pytest.raises(InvalidInputError) as caught:
            repo.distance(a, b)
        assert caught.value.kind == "structure_mismatch"
    check(repo.distance("m@v1", "m@v2", include="common"), [(noise(1, 9), noise(2, 9))])
