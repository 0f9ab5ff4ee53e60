"""Zarr directories that are damaged or out to harm: each is refused with a typed error, in little memory."""

import contextlib
import gzip
import json
import os
import shutil
import socket
import tracemalloc

import numpy as np
import pytest
import zarr
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.blosc import compress
from support import noise
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from lamella_engine.checkpoints import zarr_directories
from lamella_engine.checkpoints.zarr_groups import ZarrCheckpoint
from lamella_engine.errors import InvalidInputError, LamellaError, LimitError, StorageError

ARRAY = noise(1, 10, 4)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("pristine")
    write(path)
    return path


@pytest.fixture
def root(pristine, tmp_path):
    """Return a directory with two arrays, one of them in a nested group."""
    return shutil.copytree(pristine, tmp_path / "good")


def write(path, **way):
    group = zarr.create_group(path)
    for name in ("a", "g/b"):
        group.create_array(name, shape=(10, 4), dtype="f4", **{"chunks": (5, 4), "compressors": None} | way)[...] = (
            ARRAY
        )


def read(root):
    """Read everything; return the bytes of every tensor."""
    with ZarrCheckpoint(root) as checkpoint:
        return {
            spec.name: b"".join(bytes(checkpoint.read(spec, region)) for region in spec.grid.regions())
            for spec in checkpoint.structure
        }


def refused(root, kind, error=InvalidInputError):
    """Check that a directory is refused, with a message that tells where and what to do; return the message."""
    with pytest.raises(error) as caught:
        read(root)
    assert caught.value.kind == kind
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path, **fields):
    """Set fields of a zarr.json; a value that is a function gets the field as it is."""
    document = json.loads(path.read_text())
    for name, value in fields.items():
        document[name] = value(document.get(name)) if callable(value) else value
    path.write_text(json.dumps(document))


def test_the_directory_that_the_others_are_made_of_is_good(root):
    assert read(root) == {"a": ARRAY.tobytes(), "g/b": ARRAY.tobytes()}


# -- 49, 50: which metadata there is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["", "g", "a"])
def test_a_node_without_metadata_is_refused(root, node):
    (root / node / "zarr.json").unlink()
    assert "zarr.json" in refused(root, "not_zarr")


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StorageError):
        ZarrCheckpoint(tmp_path / "nothing")


@pytest.mark.parametrize("node", ["", "a", "g", "g/b"])
@pytest.mark.parametrize("name", [".zarray", ".zgroup", ".zattrs", ".zmetadata"])
def test_metadata_of_format_2_beside_that_of_format_3_is_refused(root, node, name):
    (root / node / name).write_text("{}")
    assert "convert it to format 3" in refused(root, "not_zarr_v3")


def test_a_directory_of_format_2_is_refused(tmp_path):
    zarr.create_group(tmp_path, zarr_format=2).create_array("a", shape=(1,), dtype="i4")
    assert "convert it to format 3" in refused(tmp_path, "not_zarr_v3")
    with pytest.raises(InvalidInputError, match="convert it to format 3") as caught:
        ZarrCheckpoint(zarr.open_group(tmp_path, mode="r"))
    assert caught.value.kind == "not_zarr_v3"


@pytest.mark.parametrize("node", ["", "a"])
@pytest.mark.parametrize("said", [2, 4, "3", None, True, [3]])
def test_another_format_is_refused(root, node, said):
    edit(root / node / "zarr.json", zarr_format=said)
    refused(root, "not_zarr_v3")


@pytest.mark.parametrize("said", ["file", None, 3, ["array"]])
def test_another_type_of_node_is_refused(root, said):
    edit(root / "a" / "zarr.json", node_type=said)
    refused(root, "bad_metadata")


def test_one_array_is_no_group(root):
    assert "give the group" in refused(root / "a", "not_a_group")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5_000],
    ids=range(10),
)
@pytest.mark.parametrize("node", ["", "a"])
def test_what_is_no_json_object_is_refused(root, node, text):
    (root / node / "zarr.json").write_bytes(text)
    refused(root, "bad_metadata")


def test_a_key_that_stands_there_twice_is_refused(root):
    text = (root / "a/zarr.json").read_text()
    (root / "a/zarr.json").write_text(text.replace('"shape"', '"shape": [1], "shape"', 1))
    refused(root, "duplicate_key")


def test_metadata_without_end_is_not_even_read(root):
    with open(root / "a/zarr.json", "r+b") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    refused(root, "metadata_too_long", LimitError)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


@pytest.mark.parametrize("field", ["surprise", "consolidated_metadata"])
def test_a_field_that_must_be_understood_is_refused(root, field):
    edit(root / "a/zarr.json", **{field: {"must_understand": True}})
    refused(root, "bad_metadata")


@pytest.mark.parametrize("node", ["", "a"])
def test_a_field_that_need_not_be_understood_is_left_out(root, node):
    edit(root / node / "zarr.json", surprise={"must_understand": False})
    assert read(root)["a"] == ARRAY.tobytes()


# -- 51, 53: codecs ----------------------------------------------------------------------------------------------------

BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


@pytest.mark.parametrize(
    "name",
    [
        "pickle",
        "numcodecs.pickle",
        "numcodecs.zlib",
        "numcodecs.zfpy",
        "vlen-utf8",
        "vlen-bytes",
        "json2",
        "../x",
        "",
        "zst",
    ],
)
@pytest.mark.parametrize("place", ["first", "last", "inner", "index"])
def test_a_codec_that_is_not_on_the_list_is_refused_wherever_it_stands(root, name, place):
    shards = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": [5, 4], "codecs": [BYTES], "index_codecs": [BYTES], "index_location": "end"},
    }
    hostile = {"name": name, "configuration": {}}
    codecs = {"first": [hostile, BYTES], "last": [BYTES, hostile]}.get(place, [shards])
    if place == "inner":
        shards["configuration"]["codecs"] = [BYTES, hostile]
    if place == "index":
        shards["configuration"]["index_codecs"] = [BYTES, hostile]
    edit(root / "g/b/zarr.json", codecs=codecs)
    assert "g/b" in refused(root, "unknown_codec")


def test_a_compressor_of_a_shards_index_is_refused(root):
    shards = {"chunk_shape": [5, 4], "codecs": [BYTES], "index_codecs": [BYTES, {"name": "gzip"}]}
    edit(root / "a/zarr.json", codecs=[{"name": "sharding_indexed", "configuration": shards}])
    refused(root, "unknown_codec")


@pytest.mark.parametrize(
    "codecs",
    [
        None,
        [],
        {},
        "bytes",
        [None],
        [3],
        [{}],
        [{"name": 3}],
        [{"name": "bytes", "configuration": 3}],
        [{"name": "bytes", "configuration": {"endian": "middle"}}],
        [{"name": "bytes", "configuration": {"endian": 3}}],
        [{"name": "bytes", "configuration": {"surprise": 3}}],
        [BYTES, BYTES],
        [{"name": "zstd", "configuration": {"level": 0, "checksum": False}}],
        [{"name": "gzip", "configuration": {"level": 1}}, BYTES],
        [BYTES, {"name": "transpose", "configuration": {"order": [1, 0]}}],
        [{"name": "transpose", "configuration": {"order": [0]}}, BYTES],
        [{"name": "transpose", "configuration": {"order": [0, 0]}}, BYTES],
        [{"name": "transpose", "configuration": {"order": [0, 2]}}, BYTES],
        [{"name": "transpose", "configuration": {"order": "F"}}, BYTES],
        [{"name": "transpose"}, BYTES],
        [BYTES, {"name": "gzip", "configuration": {"level": 99}}],
        [BYTES, {"name": "gzip", "configuration": {"level": "x"}}],
        [BYTES, {"name": "zstd", "configuration": {"level": 99}}],
        [BYTES, {"name": "blosc", "configuration": {"cname": "pickle"}}],
        [BYTES, {"name": "blosc", "configuration": {"typesize": -1}}],
        [BYTES] + [{"name": "crc32c"}] * 1000,
    ],
    ids=range(27),
)
def test_codecs_that_mean_nothing_are_refused(root, codecs):
    edit(root / "a/zarr.json", codecs=codecs)
    refused(root, "bad_codec")


def nested(depth):
    codecs = [BYTES]
    for _ in range(depth):
        shards = {"chunk_shape": [5, 4], "codecs": codecs, "index_codecs": [BYTES, {"name": "crc32c"}]}
        codecs = [{"name": "sharding_indexed", "configuration": shards}]
    return codecs


@pytest.mark.parametrize("depth", [5, 100])
def test_shards_in_shards_without_end_are_refused(root, depth):
    edit(root / "a/zarr.json", codecs=nested(depth))
    refused(root, "bad_codec")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"chunk_shape": [0, 4]}, "bad_chunk_shape"),
        ({"chunk_shape": [3, 4]}, "bad_chunk_shape"),
        ({"chunk_shape": [10, 4]}, "bad_chunk_shape"),
        ({"chunk_shape": [5]}, "bad_chunk_shape"),
        ({"chunk_shape": None}, "bad_chunk_shape"),
        ({"chunk_shape": [-5, 4]}, "bad_chunk_shape"),
        ({"codecs": None}, "bad_codec"),
        ({"index_codecs": []}, "bad_codec"),
        ({"index_location": "middle"}, "bad_codec"),
    ],
)
def test_shards_that_do_not_fit_are_refused(root, change, kind):
    (codec,) = nested(1)
    codec["configuration"] |= change
    edit(root / "a/zarr.json", codecs=[codec])
    refused(root, kind)


@pytest.mark.parametrize("transformers", [[{"name": "x"}], "x"])
def test_storage_transformers_are_refused(root, transformers):
    edit(root / "a/zarr.json", storage_transformers=transformers)
    refused(root, "unknown_codec")


# -- 52: data types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "object",
        "string",
        "|O",
        "<f4",
        "O",
        "r64",
        "float128",
        "f4",
        "variable_length_bytes",
        "numpy.datetime64",
        {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}},
        {"name": "fixed_length_utf32", "configuration": {"length_bytes": 4}},
        {"name": "structured", "configuration": {"fields": [["a", "int32"]]}},
        {"name": "float32"},
        ["float32"],
        None,
        3,
    ],
    ids=str,
)
def test_what_is_no_number_is_refused(root, name):
    edit(root / "a/zarr.json", data_type=name)
    refused(root, "unknown_dtype")


def test_an_open_group_with_metadata_that_zarr_cannot_read_is_refused(root):
    group = zarr.open_group(root, mode="r")
    edit(root / "a/zarr.json", codecs=[{"name": "unheard of"}])
    with pytest.raises(InvalidInputError) as caught:
        ZarrCheckpoint(group)
    assert caught.value.kind == "bad_metadata"


@pytest.mark.parametrize("dtype", ["U4", "S4", "M8[s]", [("a", "i4")]])
@pytest.mark.filterwarnings("ignore")  # zarr has something to say on each of them
def test_what_is_no_number_in_an_open_group_is_refused(dtype):
    group = zarr.create_group(zarr.storage.MemoryStore())
    group.create_array("a", shape=(2,), dtype=np.dtype(dtype))
    with pytest.raises(InvalidInputError) as caught:
        ZarrCheckpoint(group)
    assert caught.value.kind == "unknown_dtype"


# -- 54, 55, 58: grids and keys ----------------------------------------------------------------------------------------


def grid(*chunk):
    return {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}


@pytest.mark.parametrize(
    "chunk", [(0, 4), (5, 0), (5,), (5, 4, 1), (-5, 4), (5.0, 4), ("5", 4), (True, 4), (10**4000, 10**4000)]
)
def test_chunks_of_an_impossible_shape_are_refused(root, chunk):
    edit(root / "a/zarr.json", chunk_grid=grid(*chunk))
    refused(root, "bad_chunk_shape")


def test_a_chunk_that_is_larger_than_its_array_is_read(tmp_path):
    write(tmp_path, chunks=(16, 9))
    assert read(tmp_path)["a"] == ARRAY.tobytes()


@pytest.mark.parametrize("shape", [None, [-1, 4], [10.0, 4], "10", [True, 4], [1 << 63, 1 << 63], [1] * 33, {"10": 4}])
def test_an_impossible_shape_is_refused(root, shape):
    edit(root / "a/zarr.json", shape=shape, chunk_grid=grid(*[1] * 33) if shape == [1] * 33 else grid(5, 4))
    refused(root, "bad_shape")


@pytest.mark.parametrize("said", [{"name": "rectangular", "configuration": {}}, "irregular", {"name": ""}])
def test_another_chunk_grid_is_refused(root, said):
    edit(root / "a/zarr.json", chunk_grid=said)
    refused(root, "unknown_chunk_grid")


@pytest.mark.parametrize(
    "said",
    [
        {"name": "zigzag"},
        "zigzag",
        {"name": "default", "configuration": {"separator": "//"}},
        {"name": "default", "configuration": {"separator": ".."}},
        {"name": "v2", "configuration": {"separator": ["/"]}},
        {"name": "default", "configuration": {"prefix": "../../"}},
    ],
)
def test_another_encoding_of_keys_is_refused(root, said):
    edit(root / "a/zarr.json", chunk_key_encoding=said)
    refused(root, "unknown_key_encoding")


@pytest.mark.parametrize("field", ["chunk_grid", "chunk_key_encoding"])
@pytest.mark.parametrize("said", [None, 3, [], {}, {"name": None}, {"name": "regular", "configuration": []}])
def test_grids_and_keys_that_mean_nothing_are_refused(root, field, said):
    edit(root / "a/zarr.json", **{field: said})
    refused(root, "bad_metadata")


@pytest.mark.parametrize("names", [None, ["a", "b"], ["a", None]])
def test_names_of_axes_do_not_matter(root, names):
    edit(root / "a/zarr.json", dimension_names=names)
    assert read(root)["a"] == ARRAY.tobytes()


@pytest.mark.parametrize("names", [3, ["a"], [1, 2]])
def test_names_of_axes_that_are_none_are_refused(root, names):
    edit(root / "a/zarr.json", dimension_names=names)
    refused(root, "bad_metadata")


@pytest.mark.parametrize(
    "key",
    [
        "c/2/0",
        "c/0/1",
        "c/00/0",
        "c/-1/0",
        "c/0",
        "c/0/0/0",
        "c/1../0",
        "c/0 /0",
        "c/\u0660/0",
        "c/99999999999999999999/0",
        "c.0.0",
        "0.0",
        "c/0/zarr.json",
        "below/zarr.json",
        "readme",
        "c/0/0.123.partial",
    ],
)
def test_a_file_below_an_array_that_is_no_chunk_of_its_grid_is_refused(root, key):
    path = root / "a" / key
    if key in ("c/0", "c/0/0/0"):
        (root / "a/c/0/0").unlink()
        (root / "a/c/0").rmdir() if key == "c/0" else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    assert str(path) in refused(root, "stray_chunk")


def test_a_file_beside_the_nodes_of_a_group_is_refused(root):
    (root / "g" / "notes.txt").write_text("x")
    assert "notes.txt" in refused(root, "stray_file")


def test_hidden_files_are_left_out(root):
    for path in (root / ".DS_Store", root / "a/.hidden", root / "a/c/.nfs01"):
        path.write_text("x")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("x")
    assert read(root)["a"] == ARRAY.tobytes()


def test_a_node_with_a_hidden_name_is_not_left_out(root):
    os.rename(root / "g", root / ".g")
    assert set(read(root)) == {"a", ".g/b"}


def test_a_billion_chunks_are_refused(root):
    edit(root / "a/zarr.json", shape=[10**9], data_type="int8", chunk_grid=grid(1), fill_value=0, codecs=["bytes"])
    refused(root, "too_many_chunks", LimitError)


def test_many_arrays_of_many_chunks_are_refused(root):
    edit(root / "a/zarr.json", shape=[10**6], data_type="int8", chunk_grid=grid(1), fill_value=0, codecs=["bytes"])
    shutil.rmtree(root / "a/c")
    for name in "xy":
        shutil.copytree(root / "a", root / name)
    refused(root, "too_many_chunks", LimitError)


def test_a_billion_chunks_in_shards_are_refused(root):
    (shards,) = nested(1)
    shards["configuration"]["chunk_shape"] = [1]
    fields = {"shape": [10**9], "data_type": "int8", "chunk_grid": grid(10**9), "fill_value": 0}
    edit(root / "a/zarr.json", **fields, codecs=[shards])
    refused(root, "too_many_chunks", LimitError)


def test_petabytes_that_no_file_holds_are_refused(root):
    edit(root / "a/zarr.json", shape=[1 << 50, 4], chunk_grid=grid(1 << 25, 4))
    for path in (root / "a/c").rglob("*"):
        path.unlink() if path.is_file() else None
    edit(root / "a/zarr.json", shape=[1 << 40, 4])
    assert "write every chunk" in refused(root, "too_little_stored", LimitError)


def test_chunks_of_many_gigabytes_are_refused(root):
    edit(root / "a/zarr.json", chunk_grid=grid(1 << 28, 4))
    refused(root, "chunk_too_large", LimitError)


# -- 56: consolidated metadata -----------------------------------------------------------------------------------------


@pytest.fixture
def consolidated(root):
    with pytest.warns(match="Consolidated metadata is currently not part"):
        zarr.consolidate_metadata(root)
    return root


def test_consolidated_metadata_that_agrees_is_read(consolidated):
    assert read(consolidated)["g/b"] == ARRAY.tobytes()


def test_consolidated_metadata_may_say_the_same_in_other_words(consolidated):
    edit(consolidated / "a/zarr.json", codecs=["bytes"], chunk_key_encoding={"name": "default"}, fill_value=0)
    assert read(consolidated)["a"] == ARRAY.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda nodes: nodes.pop("a"),
        lambda nodes: nodes.pop("g/b"),
        lambda nodes: nodes.update(more=nodes["a"]),
        lambda nodes: nodes.update({"../a": nodes["a"]}),
        lambda nodes: nodes["a"].update(shape=[10, 3]),
        lambda nodes: nodes["a"].update(data_type="int32", fill_value=0),
        lambda nodes: nodes["a"].update(fill_value=1.0),
        lambda nodes: nodes["a"].update(attributes={"lamella": {"name": "b"}}),
        lambda nodes: nodes["g"].update(attributes={"a": 1}),
        lambda nodes: nodes.update(a=nodes["g"]),
        lambda nodes: nodes.update(a=3),
    ],
    ids=range(11),
)
def test_consolidated_metadata_that_differs_is_refused(consolidated, change):
    def of_group(field):
        change(field["metadata"])
        return field

    edit(consolidated / "zarr.json", consolidated_metadata=of_group)
    assert "consolidate it again" in refused(consolidated, "stale_metadata")


def test_a_hostile_codec_in_consolidated_metadata_alone_is_refused(consolidated):
    def of_group(field):
        field["metadata"]["a"]["codecs"] = [BYTES, {"name": "pickle"}]
        return field

    edit(consolidated / "zarr.json", consolidated_metadata=of_group)
    refused(consolidated, "unknown_codec")


@pytest.mark.parametrize("said", [3, [], {}, {"kind": "inline"}, {"kind": "x", "metadata": {}}, {"metadata": []}])
def test_consolidated_metadata_that_means_nothing_is_refused(root, said):
    edit(root / "zarr.json", consolidated_metadata=said)
    refused(root, "stale_metadata")


# -- 57: chunks --------------------------------------------------------------------------------------------------------

COMPRESSORS = {
    "none": None,
    "zstd": ZstdCodec(checksum=True),
    "gzip": GzipCodec(),
    "blosc": BloscCodec(cname="zstd"),
    "crc32c": Crc32cCodec(),
}


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("damage", ["empty", "cut", "one byte", "more", "noise", "far too long"])
def test_a_damaged_chunk_is_refused(name, damage, tmp_path):
    write(tmp_path, compressors=COMPRESSORS[name])
    path = tmp_path / "a/c/1/0"
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": data[:-5],
            "one byte": data[:1],
            "more": data + b"more",
            "noise": noise(1, len(data)).tobytes()[: len(data) - 1],
            "far too long": data + bytes(2 << 20),
        }[damage]
    )
    refused(tmp_path, "stray_chunk" if damage == "far too long" else "bad_chunk")


@pytest.mark.parametrize("outer", [None, GzipCodec()])
@pytest.mark.parametrize("chunks", [(10, 4), (5, 4)])
@pytest.mark.parametrize("damage", ["empty", "cut", "one byte", "noise", "beyond", "nowhere", "overflow", "nothing"])
@pytest.mark.filterwarnings("ignore:Combining")
def test_a_damaged_shard_is_refused(damage, chunks, outer, tmp_path, monkeypatch):
    sharding = ShardingCodec(chunk_shape=(5, 2), codecs=[BytesCodec()], index_codecs=[BytesCodec()])
    write(tmp_path, chunks=chunks, serializer=sharding, compressors=outer)
    path = tmp_path / "a/c/0/0"
    data = path.read_bytes() if outer is None else gzip.decompress(path.read_bytes())
    count = chunks[0] // 5 * 2
    index = np.frombuffer(data[-16 * count :], "<u8").reshape(count, 2).copy()
    if damage in ("beyond", "nowhere", "overflow", "nothing"):
        place = {"beyond": (1 << 30, 40), "nowhere": (1 << 63, 40), "overflow": (2**64 - 2, 40), "nothing": (0, 0)}
        index[0] = place[damage]
        data = data[: -16 * count] + index.tobytes()
    else:
        data = {"empty": b"", "cut": data[:-50], "one byte": data[:1], "noise": noise(1, 50).tobytes()}[damage]
    path.write_bytes(data if outer is None else gzip.compress(data) if damage != "empty" else b"")
    refused(tmp_path, "bad_chunk")
    for nbytes in (20, 1 << 20):  # in bands smaller than a shard, and in one
        monkeypatch.setattr("lamella_engine.checkpoints.zarr_metadata._BAND_NBYTES", nbytes)
        refused(tmp_path, "bad_chunk")


def zeros(nbytes):
    return bytes(nbytes)


BOMBS = {
    "zstd": lambda: zstandard.ZstdCompressor().compress(zeros(1 << 28)),
    "zstd of unknown size": lambda: zstandard.ZstdCompressor(write_content_size=False).compress(zeros(1 << 28)),
    "many zstd frames": lambda: zstandard.ZstdCompressor().compress(zeros(1 << 20)) * 256,
    "gzip": lambda: gzip.compress(zeros(1 << 28)),
    "many gzip members": lambda: gzip.compress(zeros(1 << 20)) * 256,
    "blosc": lambda: compress(zeros(1 << 28), b"zstd", 9),
    "blosc that lies": lambda: b"\x02\x01\x11\x01\xff\xff\xff\x7f\x00\x00\x10\x00\x14\x00\x00\x00....",
    "blosc with long blocks": lambda: b"\x02\x01\x11\x01\xa0\x00\x00\x00\xff\xff\xff\x7f\x14\x00\x00\x00....",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_does_not_go_off(name, tmp_path):
    codec = next(codec for key, codec in COMPRESSORS.items() if key in name)
    write(tmp_path, compressors=codec)
    (tmp_path / "a/c/0/0").write_bytes(BOMBS[name]())
    tracemalloc.start()
    refused(tmp_path, "bad_chunk")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.filterwarnings("ignore:Combining")
def test_a_bomb_in_a_shard_does_not_go_off(tmp_path):
    sharding = ShardingCodec(chunk_shape=(5, 4), codecs=[BytesCodec(), ZstdCodec()], index_codecs=[BytesCodec()])
    write(tmp_path, serializer=sharding)
    bomb = BOMBS["zstd"]()
    (tmp_path / "a/c/0/0").write_bytes(bomb + np.array([0, len(bomb)], "<u8").tobytes())
    tracemalloc.start()
    refused(tmp_path, "bad_chunk")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def test_several_frames_and_members_are_read(tmp_path):
    write(tmp_path, compressors=ZstdCodec())
    data = ARRAY[:5].tobytes()
    squeeze = zstandard.ZstdCompressor().compress
    (tmp_path / "a/c/0/0").write_bytes(squeeze(data[:30]) + squeeze(data[30:]))
    assert read(tmp_path)["a"] == ARRAY.tobytes()


@pytest.mark.parametrize("name", COMPRESSORS)
@given(data=st.data())
def test_a_chunk_with_any_damage_is_refused_or_read(name, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("zarr")
    write(root, compressors=COMPRESSORS[name])
    path = root / "a/c/0/0"
    chunk = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        chunk[data.draw(st.integers(0, len(chunk) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(chunk)
    try:
        found = read(root)["a"]
    except InvalidInputError as error:
        found = error.kind
    assert found == "bad_chunk" or len(found) == ARRAY.nbytes


# -- 59: what lies in a directory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [".", "..", "a", "/", "nothing", "loop"])
@pytest.mark.parametrize("place", ["loop", "g/loop", "a/c/loop", "a/loop", "a/c/2"])
def test_links_to_directories_and_to_nothing_are_refused(root, place, target):
    (root / place).symlink_to(target)
    assert str(root / place) in refused(root, "not_a_file")


def test_links_to_files_are_followed(root, tmp_path):
    for path in [path for path in root.rglob("*") if path.is_file()]:
        kept = tmp_path / f"blob-{len(list(tmp_path.iterdir()))}"
        os.rename(path, kept)
        path.symlink_to(kept)
    assert read(root)["a"] == ARRAY.tobytes()


def test_a_link_to_the_directory_itself_is_followed(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert read(tmp_path / "link")["a"] == ARRAY.tobytes()


@pytest.mark.parametrize("place", ["a/c/0/0", "a/zarr.json", "zarr.json", "g/.hidden", "a/c/.hidden"])
@pytest.mark.parametrize("what", ["fifo", "socket", "device", "directory"])
def test_what_is_no_file_is_refused(root, place, what):
    path = root / place
    if path.exists():
        path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            os.chdir(path.parent)
            listening.bind(path.name)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    if what == "directory" and ".hidden" in place:
        assert read(root)["a"] == ARRAY.tobytes()
        return
    if what == "directory" and place == "a/c/0/0":
        with ZarrCheckpoint(root) as checkpoint:  # an empty directory is nothing at all
            checkpoint.check_unchanged()
        return
    refused(root, "not_a_file")


def test_directories_in_directories_without_end_are_refused(root):
    path = root / "a/c"
    for _ in range(70):
        path = path / "0"
        path.mkdir(exist_ok=True) if not path.is_file() else None
        if path.is_file():
            path.unlink()
            path.mkdir()
    refused(root, "too_deep", LimitError)


def test_groups_in_groups_without_end_are_refused(root):
    path = root / "g"
    for _ in range(70):
        path = path / "g"
        path.mkdir()
        (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    refused(root, "too_deep", LimitError)


def test_metadata_that_is_long_together_is_refused(root, monkeypatch):
    nbytes = sum(path.stat().st_size for path in root.rglob("zarr.json"))
    monkeypatch.setattr(zarr_directories, "MAX_METADATA_NBYTES", nbytes)
    assert read(root)["a"] == ARRAY.tobytes()
    monkeypatch.setattr(zarr_directories, "MAX_METADATA_NBYTES", nbytes - 1)
    refused(root, "metadata_too_long", LimitError)


def test_too_many_files_are_refused(root, monkeypatch):
    monkeypatch.setattr(zarr_directories, "MAX_FILES", 4)
    refused(root, "too_many_files", LimitError)


@pytest.mark.parametrize("name", [b"\xff", b"a\xe9"])
def test_a_name_that_is_no_unicode_is_refused(root, name):
    os.rename(root / "a", os.path.join(os.fsencode(root), name))
    refused(root, "bad_tensor_name")


def test_a_hostile_name_is_only_a_name(root):
    for name in ("..a", "a b", "$(touch x)", "a%2F..%2Fb", "-rf", "C:\\x", "\x1b[2J"):
        os.rename(root / "a", root / name) if (root / "a").exists() else None
        assert set(read(root)) == {name, "g/b"}
        os.rename(root / name, root / "a")


# -- 60: fill values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    ["nan", "inf", "-inf", "+Infinity", "NAN", "0x7fc0", "0xzzzzzzzz", "1e400", "", "0", None, [], {}, True, [0.0, 0.0],
     "0x" + "f" * 10_000, 10**400],
    ids=range(17),
)  # fmt: skip
def test_text_that_is_no_fill_value_is_refused(root, said):
    edit(root / "a/zarr.json", fill_value=said)
    refused(root, "bad_fill_value")


def test_metadata_without_a_fill_value_is_refused(root):
    document = json.loads((root / "a/zarr.json").read_text())
    del document["fill_value"]
    (root / "a/zarr.json").write_text(json.dumps(document))
    refused(root, "bad_fill_value")


@pytest.mark.parametrize(
    ("said", "bits"),
    [
        ('"NaN"', 0x7FC00000),
        ("NaN", 0x7FC00000),
        ('"Infinity"', 0x7F800000),
        ("-Infinity", 0xFF800000),
        ('"0x7fa00001"', 0x7FA00001),
        ('"0xFFC00001"', 0xFFC00001),
        ("-0.0", 0x80000000),
        ("1", 0x3F800000),
    ],
)
def test_every_way_to_say_a_fill_value_is_read(root, said, bits):
    path = root / "a/zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fill_value": "HERE"}).replace('"HERE"', said))
    (root / "a/c/1/0").unlink()
    assert read(root)["a"][80:] == np.full(20, bits, "<u4").tobytes()


# -- anything ----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["regular", "bytes", "array", "NaN", ""]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["name", "configuration"]), values),
    max_leaves=6,
)
FIELDS = ["shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs", "attributes",
          "dimension_names", "storage_transformers", "node_type", "zarr_format", "more"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2))
def test_metadata_of_any_kind_is_refused_or_read(tmp_path_factory, fields):
    root = tmp_path_factory.mktemp("zarr")
    write(root)
    edit(root / "a/zarr.json", **fields)
    with contextlib.suppress(LamellaError):
        read(root)
