"""A version as a Zarr group: every bit of it, lazily, under names that Zarr can hold; and as a plain directory."""

import asyncio
import json
import pickle
import re
from urllib.parse import unquote

import dask.array
import ml_dtypes
import numpy as np
import pytest
import xarray
import zarr
from faults import CountingObjects
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors
from support import bits, new_repository, noise, open_again
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync

from lamella_engine.checkpoints import SafetensorsLayout
from lamella_engine.chunking import grid
from lamella_engine.dtypes import DTYPES, dtype_named
from lamella_engine.errors import CorruptionError, InvalidInputError
from lamella_engine.executor import ThreadExecutor
from lamella_engine.model import TensorSpec
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.zarr_arrays import array_metadata, fill_from_json, fill_to_json, node_name, register_dtypes
from lamella_engine.zarr_store import VersionStore

ARRAYS = {
    "rows": noise(1, 2100, 1000),  # three cells, the last of them short
    "columns": noise(2, 3, 1_300_000).astype(ml_dtypes.float8_e5m2),  # cut on the last axis
    "layers.0/weight": noise(3, 5, 7).astype(ml_dtypes.bfloat16),
    "scalar": np.float32(-0.0),
    "empty": np.zeros((4, 0, 3), np.int32),
    "": np.array([True, False]),
    "zarr.json": np.arange(3, dtype=np.complex128),
    "c": np.arange(5, dtype=np.uint64),
}

# Whatever a tensor may be called: any text without half surrogates.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def version():
    return new_repository().push(ARRAYS, "m@main")


def fetch(store, key, byte_range=None):
    """Return the bytes that a store has under a key, or None."""
    found = sync(store.get(key, default_buffer_prototype(), byte_range))
    return None if found is None else found.to_bytes()


def listed(keys):
    async def collect():
        return [key async for key in keys]

    return sync(collect())


# -- names -------------------------------------------------------------------------------------------------------------


@given(NAMES)
def test_a_node_name_is_legal_and_gives_the_name_back(name):
    node = node_name(name)
    assert unquote(node) == name if name else node == "%"
    assert node not in ("", "zarr.json")
    assert node[0] not in "._"
    assert not re.search(r"[/\\\x00-\x1f\x7f]", node)


@given(st.lists(st.one_of(NAMES, st.text("%._/2F5E", max_size=6)), unique=True))
def test_no_two_names_have_one_node_name(names):
    assert len({node_name(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("encoder.layer.0.weight", "encoder.layer.0.weight"),
        ("a/b", "a%2Fb"),
        ("a\\b", "a%5Cb"),
        ("100%", "100%25"),
        ("%2F", "%252F"),
        (".hidden", "%2Ehidden"),
        ("__init__", "%5F_init__"),
        ("..", "%2E."),
        ("a\nb\x7f", "a%0Ab%7F"),
        ("\u202ea", "%E2%80%AEa"),
        ("zarr.json", "%7Aarr.json"),
        ("zarr.jsonl", "zarr.jsonl"),
        ("层.权重", "层.权重"),
        ("", "%"),
    ],
)
def test_names_are_escaped_only_where_zarr_needs_it(name, node):
    assert node_name(name) == node


def test_a_name_that_no_file_could_have_is_refused():
    assert node_name("x" * 255) == "x" * 255
    for name in ("x" * 256, "/" * 86, "层" * 86):
        with pytest.raises(InvalidInputError, match="longer than 255 bytes") as caught:
            node_name(name)
        assert caught.value.kind == "bad_tensor_name"


# -- bits --------------------------------------------------------------------------------------------------------------


def test_a_version_reads_back_bit_for_bit(version):
    group = version.zarr()
    assert bits({name: group[node_name(name)][...] for name in ARRAYS}) == bits(ARRAYS)
    assert set(group.array_keys()) == {node_name(name) for name in ARRAYS}


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.numpy is not None], ids=lambda dtype: dtype.name)
@given(data=st.data())
def test_every_dtype_reads_back_bit_for_bit(dtype, data):
    array = data.draw(tensors(dtype))
    if dtype.name == "bool":  # NumPy makes 1 of any other byte when it copies a scalar
        array = (array.view(np.uint8) & 1).view(np.bool_)
    group = new_repository().push({"a": array}, "m@main").zarr()
    assert bits({"a": group["a"][...]}) == bits({"a": array})


def test_names_dtypes_and_axes_stand_in_the_metadata(version):
    group = version.zarr()
    array = group["layers.0%2Fweight"]
    assert group.attrs["lamella"]["version"] == version.id
    assert group.attrs["lamella"]["parameters"] == version.parameters_id
    assert array.attrs["lamella"] == {"name": "layers.0/weight"}
    assert array.metadata.to_dict()["data_type"] == "bfloat16"
    names = [name for array in group.array_values() for name in array.metadata.dimension_names]
    assert len(set(names)) == len(names) == sum(array.ndim for array in group.array_values())


def test_a_dtype_below_a_byte_shows_its_bytes_and_says_what_it_is(tmp_path):
    specs = [TensorSpec("a", dtype_named("f4"), (3, 4)), TensorSpec("b", dtype_named("f6_e2m3"), (4, 5))]
    layout = SafetensorsLayout.canonical(specs)
    data = bytes(range(sum(spec.nbytes for spec in specs)))
    (tmp_path / "model.safetensors").write_bytes(layout.header + data)
    group = new_repository().push(tmp_path / "model.safetensors", "m@main").zarr()
    found = b"".join(group[tensor.spec.name][...].tobytes() for tensor in layout.tensors)
    assert found == data
    assert group["a"].dtype == np.uint8
    assert group["a"].attrs["lamella"] == {"name": "a", "dtype": "f4", "shape": [3, 4]}


@given(st.sampled_from([dtype for dtype in DTYPES if dtype.numpy is not None]), st.data())
def test_a_fill_value_keeps_every_bit_in_json(dtype, data):
    element = data.draw(st.binary(min_size=dtype.bits // 8, max_size=dtype.bits // 8))
    if dtype.name == "bool":
        element = bytes([element[0] & 1])
    assert fill_from_json(dtype, json.loads(json.dumps(fill_to_json(dtype, element)))) == element


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.floating and dtype.bits <= 16])
def test_every_small_float_survives_as_a_fill_value(dtype):
    for number in range(0, 1 << dtype.bits, 1 if dtype.bits == 8 else 7):
        element = number.to_bytes(dtype.bits // 8, "little")
        assert fill_from_json(dtype, fill_to_json(dtype, element)) == element


@pytest.mark.parametrize(
    ("dtype", "said", "element"),
    [
        ("bfloat16", "NaN", "c07f"),
        ("bfloat16", "0x7fc1", "c17f"),
        ("bfloat16", "-Infinity", "80ff"),
        ("bfloat16", -0.0, "0080"),
        ("bfloat16", 1, "803f"),
        ("float8_e4m3fn", "NaN", "7f"),
        ("float8_e5m2", "Infinity", "7c"),
        ("float8_e8m0fnu", "0x00", "00"),
        ("float32", "0x7fa00001", "0100a07f"),
        ("complex64", ["NaN", -0.0], "0000c07f00000080"),
        ("int8", -1, "ff"),
        ("uint16", 3.0, "0300"),
        ("bool", True, "01"),
    ],
)
def test_fill_values_are_those_of_the_specification(dtype, said, element):
    assert fill_from_json(dtype_named(dtype), said).hex() == element


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("bfloat16", "nan"),
        ("bfloat16", "0x7fc"),
        ("bfloat16", "0x7fc00000"),
        ("bfloat16", "1.0"),
        ("bfloat16", None),
        ("bfloat16", True),
        ("bfloat16", [1]),
        ("float16", 1e6),
        ("float32", 10**400),
        ("float8_e4m3fn", "Infinity"),
        ("float8_e8m0fnu", 0),
        ("complex64", [1]),
        ("complex64", 1.0),
        ("int8", 128),
        ("uint8", -1),
        ("int8", 0.5),
        ("int8", float("inf")),
        ("int8", float("nan")),
        ("int8", True),
        ("bool", 1),
    ],
)
def test_a_fill_value_that_the_dtype_cannot_have_is_refused(dtype, said):
    with pytest.raises(InvalidInputError) as caught:
        fill_from_json(dtype_named(dtype), said)
    assert caught.value.kind == "bad_fill_value"


@pytest.mark.parametrize(
    "name", [dtype.name for dtype in DTYPES if dtype.name == "bfloat16" or dtype.name.startswith("float8")]
)
def test_zarr_writes_and_reads_arrays_of_the_dtypes_that_it_lacks(name):
    register_dtypes()
    register_dtypes()
    dtype = dtype_named(name).numpy
    data = np.arange(256, dtype=np.uint8).view(dtype)
    store = zarr.storage.MemoryStore()
    fill = data[-1]
    array = zarr.create_array(store, shape=data.shape, chunks=(10,), dtype=dtype, fill_value=fill)
    array[: data.size // 2] = data[: data.size // 2]
    found = zarr.open_array(store)
    assert found.dtype == dtype
    expected = np.concatenate([data[: data.size // 2], np.full(data.size // 2, fill)])
    assert found[...].tobytes() == expected.tobytes()
    assert json.loads(fetch(store, "zarr.json"))["data_type"] == name


def test_a_data_type_pickles_and_compares():
    register_dtypes()
    array = zarr.create_array(zarr.storage.MemoryStore(), shape=(3,), dtype=ml_dtypes.bfloat16)
    again = pickle.loads(pickle.dumps(array.metadata))
    assert again.data_type == array.metadata.data_type
    assert again.to_dict() == array.metadata.to_dict()


# -- only what is touched ----------------------------------------------------------------------------------------------


@pytest.fixture
def counted():
    """Return a view of noise, and what counts its reads; nothing of the tensors has been read."""
    objects = CountingObjects(MemoryObjects())
    new_repository(objects).push(ARRAYS, "m@main")
    group = open_again(objects).version("m@main").zarr()
    objects.reset()
    return group, objects


def test_opening_a_view_reads_no_tensor():
    objects = CountingObjects(MemoryObjects())
    new_repository(objects).push(ARRAYS, "m@main")
    version = open_again(objects).version("m@main")
    objects.reset()
    version.zarr()
    assert objects.read_nbytes < 10_000


def test_a_slice_reads_the_chunks_that_hold_it(counted):
    group, objects = counted
    assert group["rows"][2050:2060, 5].tobytes() == ARRAYS["rows"][2050:2060, 5].tobytes()
    cell = grid((2100, 1000), 4).region(2)
    assert cell.nbytes // 2 < objects.read_nbytes < cell.nbytes + 20_000


def test_xarray_opens_a_version_lazily_and_reads_one_layer(counted):
    group, objects = counted
    with xarray.open_zarr(group.store) as dataset:
        assert objects.read_nbytes == 0
        assert dataset["layers.0%2Fweight"].values.tobytes() == ARRAYS["layers.0/weight"].tobytes()
        assert objects.read_nbytes < 20_000
        assert dataset["rows"][1500].values.tobytes() == ARRAYS["rows"][1500].tobytes()


def test_dask_opens_an_array_lazily_and_reads_one_row(counted):
    group, objects = counted
    lazy = dask.array.from_zarr(group["rows"])
    assert objects.read_nbytes == 0
    assert lazy.chunks[0] == (1024, 1024, 52)
    assert lazy[2099].compute().tobytes() == ARRAYS["rows"][2099].tobytes()
    assert objects.read_nbytes < 52 * 1000 * 4 + 20_000
    assert dask.array.from_zarr(group["columns"]).compute().tobytes() == ARRAYS["columns"].tobytes()


def test_many_chunks_are_read_at_a_time_from_one_thread_of_the_repository():
    repo = new_repository(executor=ThreadExecutor(threads=1))
    group = repo.push(ARRAYS, "m@main").zarr()
    assert group["columns"][...].tobytes() == ARRAYS["columns"].tobytes()


# -- the store ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 6), st.integers(0, 6))
def test_part_of_a_chunk_is_part_of_the_whole(version, start, length):
    store = version.zarr().store
    for key in ("zarr.json", "layers.0%2Fweight/c/0/0"):
        whole = fetch(store, key)
        assert fetch(store, key, RangeByteRequest(start, start + length)) == whole[start : start + length]
        assert fetch(store, key, OffsetByteRequest(start)) == whole[start:]
        assert fetch(store, key, SuffixByteRequest(length)) == whole[len(whole) - length :]


def test_an_edge_chunk_is_padded_with_zeros(version):
    store = version.zarr().store
    last = fetch(store, "rows/c/2/0")
    assert len(last) == len(fetch(store, "rows/c/0/0")) == 1024 * 1000 * 4
    assert last == ARRAYS["rows"][2048:].tobytes() + bytes((1024 - 52) * 1000 * 4)


@pytest.mark.parametrize(
    "key",
    [
        "rows/c/3/0",
        "rows/c/0/1",
        "rows/c/00/0",
        "rows/c/-1/0",
        "rows/c/+0/0",
        "rows/c/0/\u0660",
        "rows/c/0",
        "rows/c/0/0/0",
        "rows/c/../0",
        "rows/c",
        "rows/",
        "rows",
        "",
        "other/zarr.json",
        "empty/c/0/0/0",
        "../zarr.json",
        "rows/.zarray",
    ],
)
def test_a_key_of_nothing_has_nothing(version, key):
    store = version.zarr().store
    assert fetch(store, key) is None
    assert not sync(store.exists(key))
    with pytest.raises(FileNotFoundError):
        sync(store.getsize(key))


def test_listing_names_every_key_with_its_size(version):
    store = version.zarr().store
    files = {key: bytes(data) for key, data in store.files()}
    assert sorted(listed(store.list())) == sorted(files)
    assert {key: sync(store.getsize(key)) for key in files} == {key: len(data) for key, data in files.items()}
    assert {key: fetch(store, key) for key in files} == files
    assert all(sync(store.exists(key)) for key in files)
    for prefix in ("rows", "rows/", "rows/c/2", "ro", "c", "c/", "nothing", "z"):
        assert set(listed(store.list_prefix(prefix))) == {key for key in files if key.startswith(prefix)}
    assert set(listed(store.list_dir(""))) == {key.partition("/")[0] for key in files}
    assert set(listed(store.list_dir("rows"))) == {"zarr.json", "c"}
    assert listed(store.list_dir("rows/c/")) == ["0", "1", "2"]
    assert listed(store.list_dir("nothing")) == []


def test_two_reads_at_a_time_give_both(version):
    store = version.zarr().store
    keys = [("rows/c/0/0", None), ("nothing", None), ("scalar/c", RangeByteRequest(2, 4))]
    first, nothing, last = sync(store.get_partial_values(default_buffer_prototype(), keys))
    assert first.to_bytes() == ARRAYS["rows"][:1024].tobytes()
    assert nothing is None
    assert last.to_bytes() == b"\x00\x80"


def test_a_view_cannot_be_written_to(version):
    group = version.zarr()
    assert group.read_only
    for write in (
        lambda: group.create_array("new", shape=(1,), dtype="i4"),
        lambda: group.create_group("new"),
        lambda: group["rows"].__setitem__(0, 1),
        lambda: group["rows"].resize((1, 1)),
        lambda: group.attrs.__setitem__("a", 1),
        lambda: group.__delitem__("rows"),
        lambda: zarr.open_group(group.store, mode="w"),
        lambda: sync(group.store.set("rows/c/0/0", default_buffer_prototype().buffer.from_bytes(b""))),
        lambda: sync(group.store.delete("rows/c/0/0")),
    ):
        with pytest.raises((ValueError, NotImplementedError)):
            write()
    assert group["rows"][0].tobytes() == ARRAYS["rows"][0].tobytes()


def test_stores_are_equal_if_they_show_the_same(version):
    repo = new_repository()
    one, other = repo.push({"a": np.zeros(3)}, "m@main"), repo.push({"a": np.ones(3)}, "m@main")
    assert one.zarr().store == one.zarr().store
    assert hash(one.zarr().store) == hash(one.zarr().store)
    assert one.zarr()["a"] == one.zarr()["a"]
    assert one.zarr().store != other.zarr().store
    assert one.zarr().store != version.zarr().store
    assert one.zarr().store != VersionStore(one._reader, one.id, [], {})


def test_a_view_says_that_it_cannot_be_pickled(version):
    with pytest.raises(TypeError, match="open the version again"):
        pickle.dumps(version.zarr())


def test_a_damaged_chunk_is_an_error_and_not_zeros():
    objects = MemoryObjects()
    new_repository(objects).push(ARRAYS, "m@main")
    (pack,) = (info.name for info in objects.list("packs/"))
    data = bytearray(objects.get(pack))
    data[len(data) // 3] ^= 1
    objects.delete(pack)
    objects.put_if_absent(pack, [data])
    group = open_again(objects).version("m@main").zarr()
    with pytest.raises(CorruptionError):
        [array[...] for array in group.array_values()]


def test_reading_in_an_event_loop_of_the_callers_own_works(version):
    store = version.zarr().store

    async def read():
        return await asyncio.gather(*(store.get(f"rows/c/{at}/0", default_buffer_prototype()) for at in range(3)))

    assert [len(found) for found in asyncio.run(read())] == [1024 * 1000 * 4] * 3


# -- as files ----------------------------------------------------------------------------------------------------------


def test_the_files_of_a_view_are_a_zarr_directory(version, tmp_path):
    for key, data in version.zarr().store.files():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    for consolidated in (True, False):
        group = zarr.open_group(tmp_path, mode="r", use_consolidated=consolidated)
        assert bits({name: group[node_name(name)][...] for name in ARRAYS}) == bits(ARRAYS)


def test_an_empty_array_of_endless_rows_takes_no_memory():
    version = new_repository().push({"a": np.zeros((0, 1 << 50), np.int8)}, "m@main")
    assert [key for key, _ in version.zarr().store.files()] == ["zarr.json", "a/zarr.json"]
    assert version.zarr()["a"].shape == (0, 1 << 50)


def test_metadata_is_that_of_format_3_and_nothing_more():
    metadata = array_metadata(TensorSpec("a/b", dtype_named("bfloat16"), (4096, 4096)))
    assert metadata == {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [4096, 4096],
        "data_type": "bfloat16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [256, 4096]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {"lamella": {"name": "a/b"}},
        "dimension_names": ["a%2Fb/0", "a%2Fb/1"],
    }
