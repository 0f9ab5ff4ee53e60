"""Zarr groups as sources: whatever chunks, codecs, orders and nesting, the version is that of the same tensors."""

import contextlib
import threading
import warnings
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors
from support import bits, new_repository, noise
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore

from lamella_engine.checkpoints import MemoryCheckpoint, SafetensorsLayout, zarr_metadata
from lamella_engine.checkpoints.zarr_groups import ZarrCheckpoint
from lamella_engine.checkpoints.zarr_metadata import stored_array
from lamella_engine.checkpoints.zarr_spool import Spool
from lamella_engine.dtypes import DTYPES, dtype_named
from lamella_engine.errors import InvalidInputError, LimitError, NotFoundError, TensorNotFoundError
from lamella_engine.executor import ThreadExecutor
from lamella_engine.model import TensorSpec
from lamella_engine.zarr_arrays import fill_to_json, node_name, register_dtypes

ARRAYS = {
    "rows": noise(1, 300, 40),
    "layers.0.weight": noise(2, 33, 17).astype(ml_dtypes.bfloat16),
    "layers.0/bias": noise(3, 65).astype(ml_dtypes.float8_e4m3fn),
    "cube": noise(4, 5, 6, 7).astype(np.float16),
    "scalar": np.int64(-3),
    "empty": np.zeros((3, 0), np.uint8),
    "": np.array([True, False, True]),
    "waves": noise(5, 10).astype(np.complex64),
}

# How people write arrays: chunks that fit nowhere, shards, every codec, another order of axes or bytes.
WAYS = {
    "plain": {"compressors": None},
    "default": {},
    "gzip": {"compressors": GzipCodec(level=1)},
    "zstd": {"compressors": ZstdCodec(level=3, checksum=True)},
    "blosc": {"compressors": BloscCodec(cname="lz4", shuffle="bitshuffle", clevel=5)},
    "two": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "big": {"serializer": BytesCodec(endian="big")},
    "v2 keys": {"chunk_key_encoding": {"name": "v2", "separator": "."}},
    "dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
}


def id_of(source):
    """Return the parameters id of what is pushed: a dict, a group or a directory."""
    return new_repository().push(source, "m@main").parameters_id


def new_group(store=None):
    register_dtypes()
    return zarr.create_group(store or MemoryStore())


def odd_chunks(shape):
    return tuple(max(1, length // 3 + 1) for length in shape)


def write(group, arrays, **way):
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, value in arrays.items():
            value = np.asarray(value)
            node = node_name(name)
            options = {"chunks": odd_chunks(value.shape), "attributes": {"lamella": {"name": name}}, **way}
            if value.dtype.itemsize == 1:
                options.pop("serializer", None)
            array = group.create_array(node, shape=value.shape, dtype=value.dtype, **options)
            array[...] = value


def read_all(checkpoint):
    """Return everything that a checkpoint hands out, by tensor."""
    found = {}
    for spec in checkpoint.structure:
        data = b"".join(bytes(checkpoint.read(spec, region)) for region in spec.grid.regions())
        found[spec.name] = (spec.dtype.name, spec.shape, data)
    return found


# -- the same version --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_group_is_the_version_of_its_tensors(way, tmp_path):
    write(new_group(LocalStore(tmp_path)), ARRAYS, **WAYS[way])
    assert id_of(tmp_path) == id_of(ARRAYS)
    assert id_of(zarr.open_group(tmp_path, mode="r")) == id_of(ARRAYS)


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize(
    "inner", [[BytesCodec()], [TransposeCodec(order=(1, 0)), BytesCodec(endian="big"), ZstdCodec()]]
)
@pytest.mark.parametrize("outer", [[], [GzipCodec()]])
def test_shards_are_the_version_of_their_tensors(location, inner, outer, tmp_path):
    arrays = {"a": noise(1, 50, 30), "b": noise(2, 20, 20).astype(ml_dtypes.bfloat16)}
    sharding = ShardingCodec(chunk_shape=(4, 5), codecs=inner, index_location=location)
    with warnings.catch_warnings(action="ignore"):  # zarr tells those who write such arrays that they are slow
        write(new_group(LocalStore(tmp_path)), arrays, chunks=(12, 10), serializer=sharding, compressors=outer or None)
    assert id_of(tmp_path) == id_of(arrays)


def test_shards_in_shards_and_in_another_order_are_the_version_of_their_tensors(tmp_path):
    arrays = {"a": noise(1, 48, 36)}
    inner = ShardingCodec(chunk_shape=(2, 3), codecs=[BytesCodec(), ZstdCodec()])
    outer = ShardingCodec(chunk_shape=(6, 6), codecs=[inner])
    write(new_group(LocalStore(tmp_path)), arrays, chunks=(12, 12), serializer=outer, compressors=None)
    assert id_of(tmp_path) == id_of(arrays)
    turned = ShardingCodec(chunk_shape=(6, 4))
    group = new_group()
    with warnings.catch_warnings(action="ignore"):
        write(
            group, arrays, chunks=(12, 24), filters=[TransposeCodec(order=(1, 0))], serializer=turned, compressors=None
        )
    assert id_of(group) == id_of(arrays)


@pytest.mark.parametrize("order", list(range(6)))
def test_axes_in_any_order_are_the_version_of_their_tensors(order):
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    group = new_group()
    write(group, {"a": ARRAYS["cube"]}, filters=[TransposeCodec(order=orders[order])])
    assert id_of(group) == id_of({"a": ARRAYS["cube"]})


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.numpy is not None], ids=lambda dtype: dtype.name)
@given(data=st.data())
def test_every_dtype_is_pushed_bit_for_bit(dtype, data):
    array = data.draw(tensors(dtype))
    if dtype.name == "bool":  # NumPy makes 1 of any other byte when it copies a scalar
        array = (array.view(np.uint8) & 1).view(np.bool_)
    group = new_group()
    write(
        group,
        {"a": array},
        chunks=tuple(data.draw(st.integers(max(1, length // 3), length + 1)) for length in array.shape),
    )
    with ZarrCheckpoint(group) as checkpoint, MemoryCheckpoint({"a": array}) as expected:
        assert read_all(checkpoint) == read_all(expected)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.integers(0, 9), max_size=5))
def test_tensors_come_back_from_a_view_under_their_names(lengths):
    arrays = {name: np.arange(length) for name, length in lengths.items()} | {"always": np.zeros(1)}
    version = new_repository().push(arrays, "m@main")
    again = new_repository().push(version.zarr(), "m@main")
    assert again.parameters_id == version.parameters_id
    assert bits({name: again[name].numpy() for name in arrays}) == bits(arrays)


def test_an_opaque_dtype_comes_back_from_a_view(tmp_path):
    specs = [TensorSpec("a", dtype_named("f4"), (3, 4)), TensorSpec("b", dtype_named("f6_e3m2"), (4, 5))]
    layout = SafetensorsLayout.canonical(specs)
    (tmp_path / "m.safetensors").write_bytes(layout.header + bytes(range(sum(spec.nbytes for spec in specs))))
    version = new_repository().push(tmp_path / "m.safetensors", "m@main")
    assert id_of(version.zarr()) == version.parameters_id


def test_the_exported_directory_is_the_same_version(tmp_path):
    version = new_repository().push(ARRAYS, "m@main")
    for key, data in version.zarr().store.files():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    assert id_of(tmp_path) == version.parameters_id == id_of(ARRAYS)
    assert id_of(str(tmp_path)) == id_of(ARRAYS)


def test_chunks_that_were_never_written_are_fill_values(tmp_path):
    group = new_group(LocalStore(tmp_path))
    fills = {"float32": -0.0, "bfloat16": "0x7fc1", "float8_e5m2": "NaN", "int16": -2, "bool": True}
    for name, fill in fills.items():
        array = group.create_array(name, shape=(10, 4), chunks=(3, 3), dtype=name, fill_value=fill)
        array[0, 0] = 1
    expected = {name: group[name][...] for name in fills}
    assert expected["bfloat16"].view(np.uint16)[9, 3] == 0x7FC1
    assert id_of(tmp_path) == id_of(group) == id_of(expected)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.floating], ids=lambda dtype: dtype.name)
def test_a_fill_value_is_pushed_bit_for_bit(dtype, tmp_path):
    import json

    lane = (0b0111_1111 << (8 * dtype.lane - 8) | 0xFFFFFFFFFFFFFFFF >> (72 - 8 * dtype.lane) | 1).to_bytes(
        dtype.lane, "little"
    )
    for element in {lane, lane[:-1] + b"\xff", bytes(dtype.lane - 1) + b"\x80"}:
        element = element * (dtype.bits // 8 // dtype.lane)
        root = tmp_path / element.hex()
        register_dtypes()
        zarr.create_group(root).create_array("a", shape=(3,), dtype=dtype.name)
        document = json.loads((root / "a/zarr.json").read_text())
        document["fill_value"] = fill_to_json(dtype, element)
        (root / "a/zarr.json").write_text(json.dumps(document))
        with ZarrCheckpoint(root) as checkpoint:
            assert read_all(checkpoint)["a"][2] == element * 3


# -- names -------------------------------------------------------------------------------------------------------------


def names_in(group):
    with ZarrCheckpoint(group) as checkpoint:
        return [spec.name for spec in checkpoint.structure]


def test_the_path_of_a_nested_array_is_its_name():
    group = new_group()
    for path in ("z", "encoder/layer/0/weight", "encoder/bias", "a%2Fb"):
        group.create_array(path, shape=(1,), dtype="i4")
    assert names_in(group) == ["a%2Fb", "encoder/bias", "encoder/layer/0/weight", "z"]
    assert names_in(group["encoder"]) == ["bias", "layer/0/weight"]
    with ZarrCheckpoint(group["encoder"]) as checkpoint:
        assert read_all(checkpoint)["bias"] == ("int32", (1,), bytes(4))


@pytest.mark.parametrize(
    ("node", "attribute", "name"),
    [
        ("a%2Fb", {"name": "a/b"}, "a/b"),
        ("ema/a%2Fb", {"name": "a/b"}, "ema/a/b"),
        ("%", {"name": ""}, ""),
        ("moved", {"name": "a/b"}, "moved"),
        ("a%2fb", {"name": "a/b"}, "a%2fb"),
        ("a", {"name": 3}, "a"),
        ("a", {"name": "\ud800"}, "a"),
        ("a", {"name": "x" * 300}, "a"),
        ("a", "a name", "a"),
        ("a", None, "a"),
    ],
)
def test_the_attribute_names_a_tensor_only_where_the_node_agrees(node, attribute, name):
    group = new_group()
    group.create_array(node, shape=(1,), dtype="i4", attributes={"lamella": attribute})
    assert names_in(group) == [name]


def test_two_arrays_of_one_name_are_refused():
    group = new_group()
    group.create_array("a/b", shape=(1,), dtype="i4")
    group.create_array("a%2Fb", shape=(1,), dtype="i4", attributes={"lamella": {"name": "a/b"}})
    with pytest.raises(InvalidInputError, match="two arrays are named 'a/b'") as caught:
        ZarrCheckpoint(group)
    assert caught.value.kind == "duplicate_name"


@pytest.mark.parametrize(
    "attribute",
    [
        {"name": "a", "dtype": "f4", "shape": [9]},
        {"name": "a", "dtype": "f4", "shape": [-8]},
        {"name": "a", "dtype": "f4"},
        {"name": "a", "dtype": "f5", "shape": [8]},
        {"name": "a", "dtype": "float32", "shape": [1]},
        {"name": "a", "dtype": 4, "shape": [8]},
        {"name": "a", "dtype": "f4", "shape": ["8"]},
    ],
)
def test_an_attribute_that_does_not_fit_its_bytes_is_refused(attribute):
    group = new_group()
    group.create_array("a", shape=(4,), dtype="u1", attributes={"lamella": attribute})
    with pytest.raises(InvalidInputError) as caught:
        ZarrCheckpoint(group)
    assert caught.value.kind == "bad_attribute"


# -- bands -------------------------------------------------------------------------------------------------------------


class CountingStore(MemoryStore):
    """Counts how often each chunk is asked for."""

    def __init__(self):
        super().__init__()
        self.asked = {}
        self.lock = threading.Lock()

    async def get(self, key, prototype, byte_range=None):
        with self.lock:
            self.asked[key] = self.asked.get(key, 0) + 1
        return await super().get(key, prototype, byte_range)


@pytest.mark.parametrize("chunks", [(7, 11), (1, 20), (60, 1), (13, 20), (1, 3)])
@pytest.mark.parametrize("threads", [1, 4])
def test_each_chunk_is_read_once_and_by_whole_bands(chunks, threads, monkeypatch):
    monkeypatch.setattr(zarr_metadata, "_BAND_NBYTES", 400)
    store = CountingStore()
    arrays = {"a": noise(1, 60, 20)}
    write(new_group(store), arrays, chunks=chunks)
    group = zarr.open_group(store, mode="r+")
    store.asked.clear()
    with ZarrCheckpoint(group) as checkpoint:
        (spec,) = checkpoint.structure
        bands = stored_array(group["a"].metadata.to_dict(), bytes(4)).bands()
        assert bands.cell_count > 1 or chunks[0] == 60
        runs = [bands.region(number) for number in range(bands.cell_count)]
        pieces = [(at, min(at + 97, spec.nbytes)) for at in range(0, spec.nbytes, 97)]
        assert max(run.nbytes for run in runs) <= max(400, chunks[0] * 80)

        def read(piece):
            start, stop = piece
            return bytes(checkpoint.read(spec, type(runs[0])((), start, stop - start)))

        executor = ThreadExecutor(threads=threads)
        assert b"".join(executor.map(read, pieces)) == arrays["a"].tobytes()
        executor.close()
    asked = {key: count for key, count in store.asked.items() if "/c/" in key}
    assert len(asked) == -(-60 // chunks[0]) * -(-20 // chunks[1])
    assert set(asked.values()) == {1}


@given(st.data())
def test_cells_and_chunks_may_lie_in_any_way(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    chunks = tuple(data.draw(st.integers(1, length + 2)) for length in shape)
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    group = new_group()
    write(group, {"a": array}, chunks=chunks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_metadata, "_BAND_NBYTES", data.draw(st.integers(1, 300)))
        with ZarrCheckpoint(group) as checkpoint:
            (spec,) = checkpoint.structure
            start = data.draw(st.integers(0, spec.nbytes - 1))
            stop = data.draw(st.integers(start + 1, spec.nbytes))
            region = type(spec.grid.region(0))((), start, stop - start)
            out = bytearray(spec.nbytes + 5)
            assert bytes(checkpoint.read(spec, region, out)) == array.tobytes()[start:stop]
            assert bytes(checkpoint.read(spec, region)) == array.tobytes()[start:stop]


@pytest.mark.parametrize(
    ("shape", "chunks", "axis", "length"),
    [
        ((50_000, 4_096), (1_000, 4_096), 0, 4_000),
        ((50_000, 4_096), (1_000, 100), 0, 4_000),
        ((64, 1 << 12, 1 << 12), (1, 100, 100), 0, 1),
        ((64, 1 << 14, 1 << 12), (1, 100, 100), 1, 4_000),
        ((1, 1 << 14, 1 << 12), (5, 128, 1 << 12), 1, 4_096),
        ((64, 1 << 14, 1 << 12), (2, 100, 100), 0, 2),
        ((10,), (1_000,), 0, 10),
    ],
)
def test_bands_are_rows_of_whole_chunks(shape, chunks, axis, length):
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0,
        "codecs": ["bytes"],
    }
    bands = stored_array(metadata).bands()
    assert (bands.axis, bands.length) == (axis, length)


def test_a_band_that_no_memory_could_hold_is_refused():
    group = new_group()
    group.create_array("a", shape=(4, 1 << 15, 1 << 15), chunks=(2, 1 << 10, 1 << 10), dtype="f4")
    with pytest.raises(LimitError, match="shorter on the first axis") as caught:
        ZarrCheckpoint(group)
    assert caught.value.kind == "chunk_too_large"


def test_memory_stays_bounded_while_bands_pass(monkeypatch):
    from lamella_engine.checkpoints import zarr_groups

    monkeypatch.setattr(zarr_metadata, "_BAND_NBYTES", 4_000)
    monkeypatch.setattr(zarr_groups, "_KEPT_NBYTES", 10_000)
    group = new_group()
    write(group, {"a": noise(1, 300, 100)}, chunks=(7, 11))
    with ZarrCheckpoint(group) as checkpoint:
        read_all(checkpoint)
        (spec,) = checkpoint.structure
        for start in range(0, spec.nbytes, 1000):
            checkpoint.read(spec, type(spec.grid.region(0))((), start, 1000))
            kept = [nbytes for nbytes, _ in checkpoint._bands._kept.values()]
            assert sum(kept) <= 10_000 or len(kept) == 2


# -- a checkpoint like any other ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_closed_reads_nothing(tmp_path):
    write(new_group(LocalStore(tmp_path)), ARRAYS)
    checkpoint = ZarrCheckpoint(tmp_path)
    spec = checkpoint.structure[0]
    with pytest.raises(TensorNotFoundError):
        checkpoint.read(TensorSpec("other", spec.dtype, spec.shape), spec.grid.region(0))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(InvalidInputError) as caught:
        checkpoint.read(spec, spec.grid.region(0))
    assert caught.value.kind == "closed"


@pytest.mark.parametrize("change", ["chunk", "metadata", "new chunk", "no chunk", "new array"])
def test_a_directory_that_changes_is_noticed(change, tmp_path):
    group = new_group(LocalStore(tmp_path))
    array = group.create_array("a", shape=(10,), chunks=(5,), dtype="i4")
    array[:5] = 1
    with ZarrCheckpoint(tmp_path) as checkpoint:
        checkpoint.check_unchanged()
        (spec,) = checkpoint.structure
        if change == "chunk":
            array[:5] = 2
        elif change == "metadata":
            array.attrs["a"] = 1
        elif change == "new chunk":
            array[5:] = 2
        elif change == "no chunk":
            (tmp_path / "a/c/0").unlink()
        else:
            group.create_array("b", shape=(1,), dtype="i4")
        with pytest.raises(InvalidInputError) as caught:
            checkpoint.check_unchanged()
        assert caught.value.kind == "source_changed"
        if change in ("chunk", "no chunk"):
            with pytest.raises(InvalidInputError) as caught:
                checkpoint.read(spec, spec.grid.region(0))
            assert caught.value.kind == "source_changed"


@pytest.mark.parametrize("threads", [1, 3])
def test_a_version_is_pushed_to_another_branch_through_its_own_view(threads):
    """Every thread that pushes waits for zarr then, which waits for the repository to read."""
    repo = new_repository(executor=ThreadExecutor(threads=threads))
    version = repo.push({str(at): noise(at, 600, 600) for at in range(12)}, "m@main")
    assert repo.push(version.zarr(), "m@other").parameters_id == version.parameters_id


# -- transactions ------------------------------------------------------------------------------------------------------


def spooled(write_into):
    """Return what a version holds that was written through a transaction."""
    with Spool() as spool:
        write_into(spool.group)
        with spool.checkpoint() as checkpoint:
            return read_all(checkpoint)


# Chunks that zarr drops when it is left alone, for they equal the fill value 0 or NaN.
LOST = {
    "bf16 -0.0": np.full((4, 4), 0x8000, np.uint16).view(ml_dtypes.bfloat16),
    "e4m3 -0.0": np.full((4, 4), 0x80, np.uint8).view(ml_dtypes.float8_e4m3fn),
    "complex -0.0": np.full((4, 4), complex(-0.0, -0.0), np.complex64),
    "f32 NaN payload": np.full((4, 4), 0x7FC00123, np.uint32).view(np.float32),
    "f16 sNaN": np.full((4, 4), 0x7C01, np.uint16).view(np.float16),
    "bf16 NaN payload": np.full((4, 4), 0xFFC1, np.uint16).view(ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("shards", [None, (4, 4)])
@pytest.mark.parametrize("name", LOST)
def test_a_chunk_that_equals_the_fill_value_keeps_its_bits(name, shards):
    value = LOST[name]
    fill = {"fill_value": float("nan")} if "f32" in name or "f16" in name else {}

    def write_into(group):
        group.create_array("made", shape=(4, 4), dtype=value.dtype, chunks=(2, 2), shards=shards, **fill)[...] = value
        group.create_array("given", data=value, chunks=(2, 2), shards=shards, **fill)
        group["set"] = value
        group.require_array("parts", shape=(4, 4), dtype=value.dtype, chunks=(2, 2), **fill)
        for row, column in product(range(4), range(4)):
            group["parts"][row, column] = value[row, column]
        zarr.save_array(group.store, value, path="saved")

    found = spooled(write_into)
    assert {tensor: data for tensor, (_, _, data) in found.items()} == dict.fromkeys(
        ["given", "made", "parts", "saved", "set"], value.tobytes()
    )


def test_zarr_alone_would_lose_such_chunks():
    lost = 0
    for name, value in LOST.items():
        fill = {"fill_value": float("nan")} if "f32" in name or "f16" in name else {}
        group = new_group()
        group.create_array("a", shape=(4, 4), dtype=value.dtype, chunks=(2, 2), **fill)[...] = value
        lost += group["a"][...].tobytes() != value.tobytes()
    assert lost


def test_a_transaction_is_the_version_of_its_tensors():
    def write_into(group):
        write(group, ARRAYS)

    with MemoryCheckpoint(ARRAYS) as expected:
        assert spooled(write_into) == read_all(expected)


def test_a_chunk_that_was_dropped_on_demand_is_refused():
    def write_into(group):
        array = group.create_array("a", shape=(4,), chunks=(2,), dtype="f4", config={"write_empty_chunks": False})
        array[...] = 0

    with pytest.raises(InvalidInputError, match="write_empty_chunks") as caught:
        spooled(write_into)
    assert caught.value.kind == "dropped_chunk"


def test_chunks_that_a_transaction_does_not_need_any_more_are_not_missed():
    def write_into(group):
        lazy = {"config": {"write_empty_chunks": False}}
        group.create_array("shrunk", data=np.arange(10), chunks=(2,)).resize((3,))
        group.create_array("gone", shape=(4,), chunks=(2,), dtype="f4", **lazy)[...] = 0
        del group["gone"]
        group.create_array("again", shape=(4,), chunks=(2,), dtype="f4", **lazy)[...] = 0
        group.create_array("again", shape=(4,), chunks=(2,), dtype="f4", overwrite=True)
        group.create_array("late", shape=(4,), chunks=(2,), dtype="f4", **lazy)[...] = 0
        group["late"][...] = 1

    found = spooled(write_into)
    assert sorted(found) == ["again", "late", "shrunk"]
    assert found["shrunk"][2] == np.arange(3).tobytes()


def test_the_setting_of_zarr_is_put_back_when_the_last_transaction_ends():
    assert zarr.config.get("array.write_empty_chunks") is False
    with Spool():
        with Spool():
            assert zarr.config.get("array.write_empty_chunks") is True
        assert zarr.config.get("array.write_empty_chunks") is True
    assert zarr.config.get("array.write_empty_chunks") is False


def test_transactions_in_threads_each_keep_their_bits():
    found = {}
    inside = threading.Barrier(4)

    def run(number):
        def write_into(group):
            inside.wait()
            group["a"] = np.full((number + 1, 4), 0x8000, np.uint16).view(ml_dtypes.bfloat16)

        found[number] = spooled(write_into)["a"][2]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: b"\x00\x80" * 4 * (number + 1) for number in range(4)}
    assert zarr.config.get("array.write_empty_chunks") is False


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_a_transaction_ends(error, tmp_path):
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected, Spool(tmp_path) as spool:
        group = spool.group
        group["a"] = np.zeros(3)
        assert any(tmp_path.iterdir())
        if error:
            raise error
    assert not any(tmp_path.iterdir())
    assert zarr.config.get("array.write_empty_chunks") is False
    for write_late in (
        lambda: group.create_array("b", shape=(1,), dtype="i4"),
        lambda: group["a"].__setitem__(0, 1),
        lambda: group.attrs.update(a=1),
    ):
        with pytest.raises((InvalidInputError, KeyError, NotFoundError, ValueError)):
            write_late()
    assert not any(tmp_path.iterdir())


def test_an_empty_transaction_has_no_tensors():
    assert spooled(lambda group: None) == {}
