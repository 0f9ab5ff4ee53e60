"""What comes out: whole versions, some of their tensors, slices of one, in memory and as files."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
import torch
from faults import CountingObjects
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support import bits, new_repository, noise, open_again, store_of

from lamella_engine.chunking import grid
from lamella_engine.dtypes import DTYPES
from lamella_engine.errors import AlreadyExistsError, InvalidInputError, NotFoundError, TensorNotFoundError
from lamella_engine.executor import ThreadExecutor
from lamella_engine.objects.memory import MemoryObjects

# Several cells each: cut on the first axis, on the last, on one between, and on one whose last cell is short.
LARGE = {
    "columns": ((3, 1_300_000), np.uint8),
    "middle": ((2, 5, 600_000), np.uint8),
    "rows": ((2_100, 1_000), np.bool_),
    "line": ((2_500_001,), np.int8),
    "wide": ((3, 2, 300, 4_100), ml_dtypes.float8_e5m2),
    "complex": ((2, 300_000), np.complex128),
}
SMALL = {
    "scalar": ((), np.float32),
    "one": ((1, 1), ml_dtypes.bfloat16),
    "row": ((9,), np.float64),
    "empty": ((4, 0, 3), np.int32),
    "cube": ((5, 6, 7), ml_dtypes.bfloat16),
}


def anything(name, shape, dtype):
    """Return noise bits of a shape and dtype; no byte of a bool is neither 0 nor 1."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(len(name)).integers(0, 2 if dtype.kind == "b" else 256, nbytes, np.uint8)
    return data.view(dtype).reshape(shape)


@pytest.fixture(scope="module")
def sliceable():
    """Return arrays, and a version that holds them; half of their cells are deltas."""
    arrays = {name: anything(name, *what) for name, what in (LARGE | SMALL).items()}
    repo = new_repository()
    mirrored = {name: array[..., ::-1] if array.ndim else array for name, array in arrays.items()}
    repo.push(mirrored, "m@main")
    return arrays, repo.push(arrays, "m@main")


def test_the_large_tensors_of_this_file_have_several_cells():
    cuts = {name: grid(shape, np.dtype(dtype).itemsize) for name, (shape, dtype) in LARGE.items()}
    assert all(cut.cell_count > 2 for cut in cuts.values())
    assert {cut.axis for cut in cuts.values()} == {0, 1, 2}


def indexes(length):
    """Draw an index of an axis: integers and slices, of both signs, also out of bounds for slices."""
    within = st.integers(-length, length - 1) if length else st.nothing()
    ends = st.none() | st.integers(-length - 2, length + 2)
    few = st.builds(  # most slices of a long axis are short ones, so that the test reads little
        lambda start, count, step: slice(start, start + count * step, step),
        st.integers(0, max(length - 1, 0)), st.integers(0, 4), st.integers(1, 3),
    )  # fmt: skip
    step = st.none() | st.sampled_from([1, 2, 3, 7, -1, -2, -5, length + 1, -length - 1])
    return within | few | st.builds(slice, ends, ends, step) | within.map(np.int64)


@given(st.data())
def test_a_slice_of_a_stored_tensor_equals_the_slice_of_the_array(sliceable, data):
    arrays, version = sliceable
    name = data.draw(st.sampled_from(sorted(arrays)))
    array, lazy = arrays[name], version[name]
    key = [data.draw(indexes(length)) for length in array.shape[: data.draw(st.integers(0, array.ndim))]]
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(key)))
        lengths = array.shape[array.ndim - (len(key) - at) :] if at < len(key) else ()
        key = [*key[:at], ..., *(data.draw(indexes(length)) for length in lengths)]
    key = tuple(key)
    if len(key) == 1 and data.draw(st.booleans()):
        key = key[0]
    expected = np.asarray(array[key])
    found = lazy[key]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (name, key)
    assert found.tobytes() == expected.tobytes(), (name, key)


KEYS = [
    slice(None), slice(None, None, -1), slice(None, None, 2), slice(None, None, -3), slice(1, None),
    slice(-2, None, -1), slice(3, 1), slice(1, 3, 5), slice(-100, 100), slice(None, None, 10**7),
    0, -1, np.int64(0), ...,
]  # fmt: skip


@pytest.mark.parametrize("name", [*LARGE, "row", "cube"])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_slice_of_the_first_and_of_the_last_axis(name, key, sliceable):
    """The other axes are cut short, so that little is read of a large tensor."""
    arrays, version = sliceable
    array, lazy = arrays[name], version[name]
    for place in {0, array.ndim - 1}:
        whole = tuple(key if axis == place and key is not ... else slice(-1, None) for axis in range(array.ndim))
        expected = np.asarray(array[whole])
        found = lazy[whole]
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    assert lazy[key].tobytes() == array[key].tobytes()


@pytest.mark.parametrize("name", [*LARGE, *SMALL])
def test_a_lazy_tensor_knows_itself_and_gives_itself_whole(name, sliceable):
    arrays, version = sliceable
    array, lazy = arrays[name], version[name]
    assert (lazy.shape, lazy.dtype, lazy.nbytes) == (array.shape, array.dtype, array.nbytes)
    assert lazy.numpy().tobytes() == lazy[...].tobytes() == np.asarray(lazy).tobytes() == array.tobytes()
    assert lazy.numpy().flags.writeable
    if array.ndim:
        assert len(lazy) == len(array)


def test_a_slice_reads_only_the_cells_that_it_touches():
    objects = MemoryObjects()
    array = anything("rows", (2_100, 1_000), np.uint8)
    repo = new_repository(objects)
    repo.push({"w": array}, "m@main")
    counting = CountingObjects(objects)
    lazy = open_again(counting).version("m@main")["w"]
    assert lazy.shape == (2_100, 1_000)
    per_cell = lazy._spec.grid.length * 1_000
    for key, cells in ((slice(0, 3), 1), (slice(1_023, 1_025), 2), ((slice(None), 5), 3), (-1, 1), (slice(0, 0), 0)):
        lazy[0]  # pages and indexes are read once
        counting.reset()
        assert lazy[key].tobytes() == array[key].tobytes()
        assert counting.read_nbytes <= cells * per_cell + 100, key
        assert counting.reads <= cells, key


@pytest.mark.parametrize("key", [5, -6, (0, 6), (0, 0, 0, 0), (..., ...), np.int64(5)], ids=str)
def test_an_index_that_numpy_refuses_is_an_index_error(key, sliceable):
    arrays, version = sliceable
    with pytest.raises(IndexError):
        arrays["cube"][key]
    with pytest.raises(IndexError):
        version["cube"][key]


@pytest.mark.parametrize("key", [None, True, [0, 1], np.array([0]), 1.0, "a", (0, None), np.bool_(True)], ids=str)
def test_an_index_beyond_integers_and_slices_is_refused(key, sliceable):
    with pytest.raises(InvalidInputError):
        sliceable[1]["cube"][key]


def test_a_slice_with_step_zero_is_refused_as_numpy_does(sliceable):
    with pytest.raises(ValueError, match="zero"):
        sliceable[1]["cube"][::0]


def test_slices_come_as_memory_of_their_own():
    repo = new_repository()
    version = repo.push({"w": noise(0, 50)}, "m@main")
    version["w"][:][0] = 7
    assert version["w"][:].tobytes() == noise(0, 50).tobytes()


# -- which tensors ----------------------------------------------------------------------------------------------------

NAMES = ["a.bias", "a.weight", "a[1]", "b.weight", "ab", "é.weight", ""]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, NAMES),
        ("*", None, NAMES),
        ("a.*", None, ["a.bias", "a.weight"]),
        (["a.*", "*.weight"], "b*", ["a.bias", "a.weight", "é.weight"]),
        ("a[[]1]", None, ["a[1]"]),
        ("?b", None, ["ab"]),
        ("", None, [""]),
        (None, ["*.weight", "a*"], [""]),
        ("a*", "*", []),
        ("é*", None, ["é.weight"]),
    ],
)
def test_include_and_exclude_are_globs(include, exclude, expected):
    repo = new_repository()
    weights = {name: noise(at, 40) for at, name in enumerate(NAMES)}
    repo.push(weights, "m@main")
    out = repo.checkout("m@main", include=include, exclude=exclude)
    assert bits(out) == bits({name: weights[name] for name in expected})
    assert list(out) == sorted(expected)


def test_a_pattern_that_matches_nothing_is_not_found():
    repo = new_repository()
    repo.push({"a": noise(0, 40)}, "m@main")
    for include in ("b*", ["a", "b"], "A"):
        with pytest.raises(TensorNotFoundError):
            repo.checkout("m@main", include=include)
    with pytest.raises(TensorNotFoundError):
        repo.version("m@main")["b"]
    assert "b" not in repo.version("m@main")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_torch_and_numpy_get_the_same_bits(dtype):
    if dtype.numpy is None:
        return  # has no tensors of its own in memory; files of it are in test_checkpoints
    repo = new_repository()
    array = anything(dtype.name, (3, 37), dtype.numpy)
    repo.push({"w": array}, "m@main")
    try:
        out = repo.checkout("m@main", framework="torch")["w"]
    except InvalidInputError:
        assert not hasattr(torch, dtype.name)
        return
    assert tuple(out.shape) == (3, 37)
    assert out.contiguous().view(torch.uint8).numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(threads, sliceable):
    arrays, _ = sliceable
    objects = MemoryObjects()
    repo = new_repository(objects, ThreadExecutor(threads=threads))
    weights = {f"{i:03d}": noise(i, 1 + 37 * i) for i in range(120)} | {"columns": arrays["columns"]}
    repo.push(weights, "m@main")
    nudged = {name: array + array.dtype.type(1) for name, array in weights.items()}
    repo.push(nudged, "m@main")
    assert bits(repo.checkout("m@v1", verify="chunk")) == bits(weights)
    assert bits(open_again(objects).checkout("m@v2")) == bits(nudged)
    assert repo.verify(deep=True).problems == []
    repo.close()


# -- files ------------------------------------------------------------------------------------------------------------


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_pushed_file_checks_out_byte_for_byte(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"z": noise(0, 30, 40), "a": noise(1, 700), "s": np.full((), 3, np.float32)}, path, {"format": "pt"})
    repo = new_repository()
    version = repo.push(path, "m@main")
    assert version.files == ("model.safetensors",)
    repo.push({"z": noise(2, 30, 40)}, "m@other")
    out = repo.checkout("m@main", tmp_path / "out")
    assert {name: sha256(place) for name, place in out.items()} == {"model.safetensors": sha256(path)}
    in_memory = repo.checkout("m@main")
    assert bits(in_memory)["z"] == bits({"z": noise(0, 30, 40)})["z"]


def test_a_file_that_differs_is_refused_and_kept_unless_overwritten(tmp_path):
    repo = new_repository()
    repo.push({"w": noise(0, 400)}, "m@main")
    (place,) = repo.checkout("m@main", tmp_path).values()
    good = place.read_bytes()
    assert repo.checkout("m@main", tmp_path) == {place.name: place}  # the same file again is no difference
    place.write_bytes(b"mine")
    with pytest.raises(AlreadyExistsError):
        repo.checkout("m@main", tmp_path)
    assert place.read_bytes() == b"mine"
    repo.checkout("m@main", tmp_path, overwrite=True)
    assert place.read_bytes() == good
    assert [item.name for item in tmp_path.iterdir()] == [place.name]


def test_equal_tensors_are_one_version_of_parameters_wherever_they_come_from(tmp_path):
    weights = {"a": noise(0, 30, 40), "b": noise(1, 700)}
    save_file(weights, tmp_path / "model.safetensors")
    repo = new_repository()
    from_dict = repo.push(weights, "m@main")
    from_file = repo.push(tmp_path / "model.safetensors", "m@file")
    from_torch = repo.push({name: torch.from_numpy(array) for name, array in weights.items()}, "m@torch")
    assert from_dict.parameters_id == from_file.parameters_id == from_torch.parameters_id
    assert from_dict.structure_id == from_file.structure_id
    assert from_dict.id != from_file.id
    assert store_of(repo).log.state.last_number("m") == 3


# -- revisions --------------------------------------------------------------------------------------------------------


def test_every_way_to_name_a_version():
    repo = new_repository()
    versions = [repo.push({"w": noise(at, 40)}, "m@main", metrics={"x": -at}) for at in range(4)]
    other = repo.push({"w": noise(9, 40)}, "model-2@main")
    repo.tag("m@rel/1.0", "m@v2")
    names = {
        "m@main": 3, "m@v1": 0, "m@latest": 3, "m@best:x": 0, "m@rel/1.0": 1, "m@main~1": 2, "m@main~3": 0, "m@v2~1": 0,
        "m@main~0": 3, versions[1].id: 1, versions[1].id[:12]: 1,
        f"m@{versions[2].id[:8]}": 2, f"{versions[2].id}~1": 1,
    }  # fmt: skip
    missing_ones = [
        "m@v5", "m@v0", "m@main~4", "m@gone", "n@main", "n@latest", "f" * 64, f"m@{other.id}", "m@best:y",
    ]  # fmt: skip
    wrong_ones = [
        "m", "m@main~", "m@main~x", "m@~1", "deadbee", "@main", "m@main@x", "m@ma in", "m~1@main", "", 3, None,
    ]  # fmt: skip
    for reader in (repo, open_again(store_of(repo).objects)):
        assert {name: reader.version(name).id for name in names} == {
            name: versions[at].id for name, at in names.items()
        }
        for missing in missing_ones:
            with pytest.raises(NotFoundError):
                reader.version(missing)
        for wrong in wrong_ones:
            with pytest.raises(InvalidInputError):
                reader.version(wrong)
