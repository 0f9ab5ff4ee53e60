"""The codecs for plain Zarr arrays: found by name, bit for bit, and never fooled."""

import ml_dtypes
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import MemoryStore

import lamella.zarr
from lamella.array_codecs import NumcodecsFloats, ZarrFloats, decode, encode
from lamella_engine import codecs
from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.errors import CorruptionError, InvalidInputError, UnsupportedFormatError

assert lamella.zarr

DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "int32")} | {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
COMPRESSOR = {"name": "lamella", "configuration": {}}


def values(dtype: str, shape: tuple[int, ...] = (300, 500)) -> np.ndarray:
    random = np.random.default_rng(0).standard_normal(shape) * 0.05
    return (random * 1000 if dtype == "int32" else random).astype(np.float32).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_of_zarr_v3_comes_back_bit_for_bit_and_smaller(dtype):
    array, store = values(dtype), MemoryStore()
    written = zarr.create_array(
        store, shape=array.shape, chunks=(128, 200), dtype=array.dtype, filters=None, compressors=[COMPRESSOR]
    )
    written[:] = array
    found = zarr.open_array(store, mode="r")
    assert found[:].tobytes() == array.tobytes()
    assert found[7:200, ::3].tobytes() == array[7:200, ::3].tobytes()
    assert sum(len(chunk) for key, chunk in store._store_dict.items() if "c/" in key) < array.nbytes


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_an_array_of_zarr_v2_comes_back_bit_for_bit(dtype):
    array, store = values(dtype), MemoryStore()
    codec = numcodecs.get_codec({"id": "lamella"})
    written = zarr.create_array(
        store, shape=array.shape, chunks=(128, 200), dtype=array.dtype, zarr_format=2, compressors=codec
    )
    written[:] = array
    assert zarr.open_array(store, mode="r")[:].tobytes() == array.tobytes()


def test_the_metadata_of_an_array_name_the_codec_and_its_width():
    store = MemoryStore()
    zarr.create_array(store, shape=(10,), dtype="float16", compressors=[COMPRESSOR])
    codecs = zarr.open_array(store).metadata.to_dict()["codecs"]
    assert codecs[-1] == {"name": "lamella", "configuration": {"width": 2}}
    assert isinstance(zarr.open_array(store).compressors[0], ZarrFloats)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4), ("float64", 8), ("complex64", 4)])
def test_the_width_of_lanes_is_that_of_the_dtype(dtype, width):
    array = values(dtype)
    stored = NumcodecsFloats().encode(array)
    assert stored[8] == width
    assert stored == NumcodecsFloats(width).encode(array.view(np.uint8))
    assert NumcodecsFloats().decode(stored).tobytes() == array.tobytes()


def test_bfloat16_takes_two_thirds():
    array = values("bfloat16", (1 << 18,))
    assert len(NumcodecsFloats().encode(array)) < 0.67 * array.nbytes


def test_a_buffer_is_decoded_in_place():
    array = values("float32")
    out = np.empty_like(array)
    assert NumcodecsFloats().decode(NumcodecsFloats().encode(array), out) is out
    assert out.tobytes() == array.tobytes()
    with pytest.raises(CorruptionError, match="not 4 bytes"):
        NumcodecsFloats().decode(NumcodecsFloats().encode(array), np.empty(1, np.float32))


def test_an_array_in_the_order_of_fortran_comes_back():
    array = np.asfortranarray(values("float32"))
    out = np.empty_like(array)
    NumcodecsFloats().decode(NumcodecsFloats().encode(array), out)
    assert out.tobytes(order="A") == array.tobytes(order="A")


@pytest.mark.parametrize("nbytes", [0, 1, 3, MAX_CELL_NBYTES, MAX_CELL_NBYTES + 6, 2 * MAX_CELL_NBYTES + 1])
def test_bytes_of_any_length_come_back(nbytes):
    chunk = np.resize(np.frombuffer(values("float32").tobytes(), np.uint8), nbytes)
    out = np.empty_like(chunk)
    decode(np.frombuffer(encode(chunk, 4), np.uint8), out)
    assert out.tobytes() == chunk.tobytes()


def test_a_codec_is_what_its_configuration_says():
    codec = numcodecs.get_codec({"id": "lamella", "width": 2})
    assert isinstance(codec, NumcodecsFloats)
    assert codec.get_config() == {"id": "lamella", "width": 2}
    assert ZarrFloats.from_dict({"name": "lamella"}) == ZarrFloats()
    assert ZarrFloats(8).to_dict() == {"name": "lamella", "configuration": {"width": 8}}


def from_metadata(width: object) -> ZarrFloats:
    return ZarrFloats.from_dict({"name": "lamella", "configuration": {"width": width}})


@pytest.mark.parametrize("make", [NumcodecsFloats, ZarrFloats, from_metadata])
@pytest.mark.parametrize("width", [0, 3, 16, "4", 2.0])
def test_a_width_that_no_lane_has_is_refused(make, width):
    with pytest.raises(InvalidInputError, match="width"):
        make(width)


STORED = NumcodecsFloats().encode(values("float32", (5000,)))


@pytest.mark.parametrize(
    ("stored", "lie"),
    [
        (b"", "header"),
        (STORED[:8], "header"),
        (STORED[:8] + b"\x03" + STORED[9:], "lanes of 3"),
        (b"\xff" * 8 + STORED[8:], "parts or fewer"),
        (STORED[:12], "parts or fewer"),
        (STORED[:-1], "ends within a payload"),
        (STORED + b"\x00", "1 bytes after"),
        ((5 << 20).to_bytes(8, "little") + STORED[8:], "tops|ends|lanes|states|raw"),
    ],
)
def test_a_chunk_that_lies_is_corruption(stored, lie):
    with pytest.raises(CorruptionError, match=lie):
        NumcodecsFloats().decode(stored)


def test_a_chunk_of_a_newer_lamella_asks_for_an_upgrade():
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        NumcodecsFloats().decode(STORED[:9] + b"\xc8" + STORED[10:])


@given(data=st.binary(max_size=200), width=st.sampled_from([1, 2, 4, 8]), nbytes=st.integers(0, 4000))
def test_bytes_that_are_no_chunk_are_corruption_or_another_chunk(data, width, nbytes):
    stored = nbytes.to_bytes(8, "little") + bytes([width]) + data
    try:
        assert len(NumcodecsFloats().decode(stored)) == nbytes
    except (CorruptionError, UnsupportedFormatError):
        return


def test_damage_to_an_array_is_corruption():
    array, store = values("float32"), MemoryStore()
    zarr.create_array(store, data=array, chunks=array.shape, compressors=[COMPRESSOR])
    (key,) = (key for key in store._store_dict if "c/" in key)
    chunk = store._store_dict[key]
    store._store_dict[key] = type(chunk).from_bytes(chunk.to_bytes()[:-3])
    with pytest.raises(CorruptionError, match="ends within"):
        zarr.open_array(store)[:]


def test_memory_that_is_not_contiguous_is_refused_rather_than_left_alone():
    codec = numcodecs.get_codec({"id": "lamella"})
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    with pytest.raises(InvalidInputError):
        codec.decode(codec.encode(array), out=np.zeros((3, 8), np.float32)[:, :4])


def test_bytes_and_nothing_come_back():
    codec = numcodecs.get_codec({"id": "lamella"})
    for data in (b"", b"abc"):
        assert bytes(codec.decode(codec.encode(data))) == data


def test_a_payload_that_would_not_come_back_is_not_written(monkeypatch):
    lie = codecs.Encoded(codecs.Encoding.CONSTANT, b"\0\0\0\0")
    monkeypatch.setattr("lamella.array_codecs.codecs.encode", lambda *_, **__: lie)
    codec = numcodecs.get_codec({"id": "lamella"})
    array = np.arange(12, dtype=np.float32)
    assert bytes(codec.decode(codec.encode(array))) == array.tobytes()
