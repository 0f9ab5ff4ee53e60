"""The safetensors reader refuses what breaks a rule of the format, before it allocates, and sees a file change."""

import json
import os
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save

from lamella_engine.checkpoints import SafetensorsLayout, open_checkpoint
from lamella_engine.checkpoints.safetensors import MAX_ENTRIES
from lamella_engine.errors import (
    InvalidInputError,
    LimitError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
    TensorNotFoundError,
)


def file_of(header: object, data: bytes = b"", *, announced: int | None = None) -> bytes:
    """A file whose header is JSON of anything, or these very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if announced is None else announced) + text + data


def one(shape: object = (4,), *, dtype: object = "U8", offsets: object = (0, 4)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def raw(shape: str = "[4]", *, dtype: str = '"U8"', offsets: str = "[0,4]") -> bytes:
    """A header of one tensor with values that json would not write."""
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'.encode()


GOOD = file_of(one(), b"1234")
TWO = {"a": one()["a"], "b": one(offsets=[4, 8])["a"]}

REFUSED = {
    # 31: no room for a length
    "empty": (b"", "truncated"),
    "seven bytes": (b"\x02" + bytes(6), "truncated"),
    # 32: lengths
    "no header": (bytes(8), "bad_header"),
    "length beyond the file": (file_of(one(), b"", announced=500), "truncated"),
    "length at the limit": (file_of(one(), b"", announced=100_000_000), "truncated"),
    "length over the limit": (file_of(one(), b"", announced=100_000_001), "header_too_long"),
    "length 2^63": (file_of(one(), b"", announced=1 << 63), "header_too_long"),
    "length 2^64-1": (file_of(one(), b"", announced=(1 << 64) - 1), "header_too_long"),
    # 33: not one JSON object
    "list": (file_of(b"[]"), "bad_header"),
    "space first": (file_of(b" {}"), "bad_header"),
    "BOM": (file_of(b"\xef\xbb\xbf{}"), "bad_header"),
    "UTF-16": (file_of("{}".encode("utf-16-le")), "bad_header"),
    "NUL padding": (file_of(b"{}\0\0"), "bad_header"),
    "newline padding": (file_of(b"{}\n"), "bad_header"),
    "trailing junk": (file_of(b'{}"x"'), "bad_header"),
    "two objects": (file_of(b"{}{}"), "bad_header"),
    "unclosed": (file_of(b'{"a":{}'), "bad_header"),
    "comma at the end": (file_of(raw()[:-1] + b",}", b"1234"), "bad_header"),
    "comment": (file_of(b"{/**/}"), "bad_header"),
    "control character in a string": (file_of(b'{"a\n":1}'), "bad_header"),
    "invalid UTF-8 in a name": (file_of(raw().replace(b'"a"', b'"\xff"'), b"1234"), "bad_header"),
    "overlong UTF-8 in a name": (file_of(raw().replace(b'"a"', b'"\xc0\xaf"'), b"1234"), "bad_header"),
    "lone surrogate in a name": (file_of(raw().replace(b'"a"', rb'"\ud800"'), b"1234"), "bad_header"),
    "encoded surrogate in a name": (file_of(raw().replace(b'"a"', b'"\xed\xa0\x80"'), b"1234"), "bad_header"),
    "bad escape in a name": (file_of(raw().replace(b'"a"', rb'"\x41"'), b"1234"), "bad_header"),
    "name is a number": (file_of(b"{1:{}}"), "bad_header"),
    # 34: duplicates, of tensors, fields and metadata, spelled alike or not
    "tensor twice": (file_of(raw()[:-1] + b"," + raw()[1:], b"1234"), "duplicate_key"),
    "tensor twice, escaped": (
        file_of(raw()[:-1] + b"," + raw()[1:].replace(b'"a"', rb'"\u0061"'), b"1234"),
        "duplicate_key",
    ),
    "field twice": (file_of(raw().replace(b'"shape"', b'"dtype":"U8","shape"'), b"1234"), "duplicate_key"),
    "metadata twice": (file_of(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate_key"),
    "metadata key twice": (file_of(b'{"__metadata__":{"a":"1","a":"2"}}'), "duplicate_key"),
    # 35: nesting
    "deep lists": (file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "bad_header"),
    "deep objects": (file_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "bad_header"),
    "deep shape": (file_of(raw("[" * 100_000 + "]" * 100_000), b"1234"), "bad_shape"),
    "deep metadata": (file_of({"__metadata__": {"a": {"b": "c"}}}), "bad_metadata"),
    # 37: rank
    "rank 33": (file_of(one([1] * 33, offsets=[0, 1]), b"1"), "bad_shape"),
    "rank 1000": (file_of(one([1] * 1000, offsets=[0, 1]), b"1"), "bad_shape"),
    # 38: shapes
    "product overflow": (file_of(one([1 << 62, 1 << 62]), b"1234"), "bad_shape"),
    "product overflow to the right length": (file_of(one([1 << 32, 1 << 32, 4], offsets=[0, 0])), "bad_shape"),
    "overflow next to a zero": (file_of(one([1 << 63, 4, 0], offsets=[0, 0])), "bad_shape"),
    "length 2^64": (file_of(one([1 << 64, 0], offsets=[0, 0])), "bad_shape"),
    "numeral of 100,000 digits": (file_of(raw("[" + "9" * 100_000 + "]"), b"1234"), "bad_shape"),
    "negative": (file_of(one([-4]), b"1234"), "bad_shape"),
    "minus zero": (file_of(raw("[-0]", offsets="[0,0]")), "bad_shape"),
    "float": (file_of(one([4.0]), b"1234"), "bad_shape"),
    "1e400": (file_of(raw("[1e400]"), b"1234"), "bad_shape"),
    "leading zero": (file_of(raw("[04]"), b"1234"), "bad_shape"),
    "string": (file_of(one(["4"]), b"1234"), "bad_shape"),
    "bool": (file_of(one([True]), b"1234"), "bad_shape"),
    "null shape": (file_of(one(None), b"1234"), "bad_shape"),
    "shape is a number": (file_of(one(4), b"1234"), "bad_shape"),
    "NaN": (file_of(raw("[NaN]"), b"1234"), "bad_shape"),
    "Infinity": (file_of(raw("[Infinity]"), b"1234"), "bad_shape"),
    # 39: dtypes
    "unknown dtype": (file_of(one(dtype="F128"), b"1234"), "unknown_dtype"),
    "lower-case dtype": (file_of(one(dtype="u8"), b"1234"), "unknown_dtype"),
    "dtype is a number": (file_of(one(dtype=8), b"1234"), "unknown_dtype"),
    # 40: offsets
    "begin after end": (file_of(one(offsets=[4, 0]), b"1234"), "bad_offsets"),
    "overlap": (file_of({**TWO, "b": one(offsets=[2, 6])["a"]}, b"123456"), "bad_offsets"),
    "same bytes twice": (file_of({**TWO, "b": one()["a"]}, b"1234"), "bad_offsets"),
    "hole": (file_of({**TWO, "b": one(offsets=[6, 10])["a"]}, b"1234567890"), "bad_offsets"),
    "hole at the start": (file_of(one(offsets=[4, 8]), b"12345678"), "bad_offsets"),
    "end beyond the file": (file_of(one([8], offsets=[0, 8]), b"1234"), "truncated"),
    "negative offset": (file_of(one(offsets=[-4, 0]), b"1234"), "bad_offsets"),
    "offset 2^64": (file_of(one(offsets=[1 << 64, (1 << 64) + 4]), b"1234"), "bad_offsets"),
    "three offsets": (file_of(one(offsets=[0, 4, 4]), b"1234"), "bad_offsets"),
    "one offset": (file_of(one(offsets=[4]), b"1234"), "bad_offsets"),
    "float offset": (file_of(one(offsets=[0, 4.0]), b"1234"), "bad_offsets"),
    # 41, 42: sizes
    "too few bytes for the shape": (file_of(one([5]), b"1234"), "wrong_length"),
    "too many bytes for the shape": (file_of(one([3]), b"1234"), "wrong_length"),
    "sub-byte tensor ends inside a byte": (file_of(one([7], dtype="F4"), b"1234"), "misaligned_tensor"),
    "six-bit tensor ends inside a byte": (
        file_of(one([3], dtype="F6_E2M3", offsets=[0, 2]), b"12"),
        "misaligned_tensor",
    ),
    # 43: coverage
    "one byte short": (GOOD[:-1], "truncated"),
    "one byte more": (GOOD + b"5", "trailing_bytes"),
    "bytes of no tensor": (file_of({}, b"1"), "trailing_bytes"),
    # 44: other formats, and one behind a good file
    "ZIP": (b"PK\x03\x04" + bytes(100), "not_safetensors"),
    "ELF": (b"\x7fELF\x02\x01\x01" + bytes(100), "not_safetensors"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "not_safetensors"),
    "pickle": (b"\x80\x02}q\x00." + bytes(700), "not_safetensors"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "not_safetensors"),
    "NumPy": (b"\x93NUMPY\x01\x00" + bytes(100), "not_safetensors"),
    "ZIP behind a good file": (GOOD + b"PK\x05\x06" + bytes(18), "trailing_bytes"),
    # 45: metadata
    "metadata is a list": (file_of({"__metadata__": []}), "bad_metadata"),
    "metadata is a string": (file_of({"__metadata__": "x"}), "bad_metadata"),
    "metadata value is a number": (file_of({"__metadata__": {"a": 1}}), "bad_metadata"),
    "metadata value is null": (file_of({"__metadata__": {"a": None}}), "bad_metadata"),
    # 48: what a clone without Git LFS leaves
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64, "not_safetensors"),
    # fields
    "no dtype": (file_of({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"1234"), "bad_header"),
    "no shape": (file_of({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234"), "bad_header"),
    "no offsets": (file_of({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "bad_header"),
    "extra field": (file_of({"a": {**one()["a"], "strides": [1]}}, b"1234"), "bad_header"),
    "tensor is a list": (file_of({"a": ["U8", [4], [0, 4]]}, b"1234"), "bad_header"),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def refusal(path, error=InvalidInputError):
    """What opening ``path`` is refused with; no descriptor may stay open."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    assert set(os.listdir("/proc/self/fd")) <= before
    assert "\n" not in caught.value.message
    return caught.value


def content(path):
    """Every tensor's dtype, shape and bytes, read cell by cell."""
    with open_checkpoint(path) as checkpoint:
        return {
            spec.name: (
                spec.dtype.safetensors,
                spec.shape,
                b"".join(bytes(checkpoint.read(spec, region)) for region in spec.grid.regions()),
            )
            for spec in checkpoint.structure
        }


def test_the_file_that_the_bad_ones_are_made_from_is_good(path):
    path.write_bytes(GOOD)
    assert content(path) == {"a": ("U8", (4,), b"1234")}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_with_its_cause(path, name):
    data, kind = REFUSED[name]
    path.write_bytes(data)
    refused = refusal(path)
    assert refused.kind == kind
    assert str(path) in refused.message


@pytest.mark.parametrize(
    ("header", "data", "names"),
    [
        (b"{}", b"", []),
        (b"{}      ", b"", []),
        (raw("[]", offsets="[0,1]"), b"1", ["a"]),
        (raw("[0,9223372036854775807]", offsets="[0,0]"), b"", ["a"]),
        (raw("[ 2 ,\t2\r\n]", offsets=" [ 0 , 4 ] "), b"1234", ["a"]),
        (raw().replace(b'"a"', b'""'), b"1234", [""]),
        (raw().replace(b'"a"', rb'"\u0000\ud83d\ude00\/"'), b"1234", ["\0\U0001f600/"]),
        (raw().replace(b'"dtype"', rb'"\u0064type"'), b"1234", ["a"]),
        (raw(str([1] * 32), offsets="[0,1]"), b"1", ["a"]),
        (raw("[8]", dtype='"F4"'), b"1234", ["a"]),
        (json.dumps({"__proto__": TWO["b"], "../x": TWO["a"]}).encode(), b"12345678", ["../x", "__proto__"]),
    ],
)
def test_what_is_odd_but_good_is_read(path, header, data, names):
    path.write_bytes(file_of(header, data))
    found = content(path)
    assert list(found) == names
    assert b"".join(octets for _, _, octets in found.values()) in (data, data[4:] + data[:4])


def test_a_million_entries_are_the_limit(path):
    lines = ",".join(f'"{n}":""' for n in range(MAX_ENTRIES + 1))
    path.write_bytes(file_of(f'{{"__metadata__":{{{lines}}}}}'.encode()))
    assert refusal(path, LimitError).kind == "too_many_entries"


def test_metadata_of_64_MiB_is_kept(path):
    path.write_bytes(file_of({"__metadata__": {"notes": "n" * (64 << 20)}}))
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.layout.metadata["notes"]) == 64 << 20
        assert checkpoint.attachments[0].read(0, checkpoint.attachments[0].nbytes) == path.read_bytes()


@pytest.mark.parametrize(
    "data",
    [
        file_of(b"", announced=99_999_999),
        file_of(raw("[" + "1," * (1 << 20) + "1]"), b"1234"),
        file_of(raw("[" + "[]," * (1 << 20) + "[]]"), b"1234"),
        file_of(raw("[" + "9" * (2 << 20) + "]"), b"1234"),
        file_of(raw("[1099511627776]", offsets="[0,1099511627776]"), b"1234"),
    ],
    ids=["length", "long list", "lists", "numeral", "terabyte"],
)
def test_a_refusal_holds_little_more_than_the_header(path, data):
    path.write_bytes(data)
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(data) + (1 << 16)
    finally:
        tracemalloc.stop()


def test_an_error_message_shows_a_long_name_in_part(path):
    path.write_bytes(file_of(raw("[5]").replace(b'"a"', b'"' + b"a" * (1 << 20) + b'"'), b"1234"))
    assert len(refusal(path).message) < 1000


def test_a_file_cut_short_after_it_was_opened_is_an_error(path):
    path.write_bytes(GOOD)
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, len(GOOD) - 2)
        (spec,) = checkpoint.structure
        with pytest.raises(InvalidInputError) as caught:
            checkpoint.read(spec, spec.grid.region(0))
        assert caught.value.kind == "source_changed"


def rewrite(path):
    path.write_bytes(GOOD[:-1] + b"x")
    os.utime(path, ns=(0, 0))


def replace(path):
    path.with_suffix(".new").write_bytes(GOOD)
    os.replace(path.with_suffix(".new"), path)


def grow(path):
    with open(path, "ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("change", [rewrite, replace, grow, os.unlink])
def test_a_change_of_the_file_is_noticed(path, change):
    path.write_bytes(GOOD)
    with open_checkpoint(path) as checkpoint:
        checkpoint.check_unchanged()
        change(path)
        with pytest.raises(InvalidInputError) as caught:
            checkpoint.check_unchanged()
        assert caught.value.kind == "source_changed"


def test_a_link_that_turns_to_another_file_is_noticed(path):
    for name in ("one", "two"):
        path.with_name(name).write_bytes(GOOD)
    path.symlink_to("one")
    with open_checkpoint(path) as checkpoint:
        path.unlink()
        path.symlink_to("two")
        with pytest.raises(InvalidInputError) as caught:
            checkpoint.check_unchanged()
        assert caught.value.kind == "source_changed"


def test_reading_is_no_change(path):
    path.write_bytes(GOOD)
    with open_checkpoint(path) as checkpoint:
        (spec,) = checkpoint.structure
        checkpoint.read(spec, spec.grid.region(0))
        checkpoint.check_unchanged()


def test_a_file_that_shrinks_while_its_header_is_read_is_noticed(path, monkeypatch):
    path.write_bytes(GOOD)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    assert refusal(path).kind == "source_changed"


def test_a_disk_that_fails_is_a_storage_error(path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    path.write_bytes(GOOD)
    with open_checkpoint(path) as checkpoint:
        monkeypatch.setattr(os, "preadv", fail)
        (spec,) = checkpoint.structure
        with pytest.raises(StorageError) as caught:
            checkpoint.read(spec, spec.grid.region(0))
        assert caught.value.kind == "read_failed"


def test_reads_that_come_in_pieces_are_put_together(path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: preadv(descriptor, [buffers[0][:3]], at))
    path.write_bytes(GOOD)
    assert content(path)["a"][2] == b"1234"


def test_a_symbolic_link_to_a_file_is_read(path):
    path.with_name("blob").write_bytes(GOOD)
    path.symlink_to("blob")
    assert content(path)["a"][2] == b"1234"
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.attachments[0].path == "model.safetensors"


def test_what_is_no_regular_file_is_refused_without_waiting(path, tmp_path):
    os.mkfifo(path)
    for special in (path, tmp_path, "/dev/zero", "/dev/null"):
        assert refusal(special).kind == "not_a_file"


def test_a_loop_of_links_is_refused(path):
    path.symlink_to(path.name)
    assert refusal(path).kind == "unreadable"


def test_a_file_that_may_not_be_read_is_refused(path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path.write_bytes(GOOD)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionDeniedError):
        open_checkpoint(path)


def test_a_missing_file_is_not_found(path):
    assert refusal(path, NotFoundError).kind == "file_not_found"


@pytest.mark.parametrize("name", ["a\nb.safetensors", "a\\b.safetensors", "\x1b[2J.safetensors", "\udcff.safetensors"])
def test_a_file_name_that_no_checkout_may_create_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD)
    assert refusal(tmp_path / name).kind == "bad_path"


def test_a_path_with_a_nul_is_refused(tmp_path):
    assert refusal(f"{tmp_path}/a\0b.safetensors").kind == "bad_path"
    assert refusal(f"{tmp_path}/a\0b/c.safetensors").kind == "unreadable"


def test_a_sparse_terabyte_costs_nothing_to_open(path):
    path.write_bytes(bytes(8))
    os.truncate(path, 1 << 40)
    assert refusal(path).kind == "bad_header"
    header = raw("[1099511627776]", offsets="[0,1099511627776]")
    path.write_bytes(file_of(header))
    os.truncate(path, 8 + len(header) + (1 << 40))
    with open_checkpoint(path) as checkpoint:
        (spec,) = checkpoint.structure
        assert bytes(checkpoint.read(spec, spec.grid.region(spec.grid.cell_count - 1))) == bytes(1 << 20)


def test_a_cell_goes_into_the_callers_memory(path):
    path.write_bytes(GOOD)
    scratch = bytearray(b"." * 6)
    with open_checkpoint(path) as checkpoint:
        (spec,) = checkpoint.structure
        assert bytes(checkpoint.read(spec, spec.grid.region(0), scratch)) == b"1234"
    assert scratch == b"1234.."


def test_threads_read_the_same_file_at_once(path):
    data = b"".join(bytes([n]) * 256 for n in range(64))
    path.write_bytes(file_of({chr(n): one([256], offsets=[256 * n, 256 * n + 256])["a"] for n in range(64)}, data))
    with open_checkpoint(path) as checkpoint, ThreadPoolExecutor(8) as threads:
        read = threads.map(lambda spec: bytes(checkpoint.read(spec, spec.grid.region(0))), checkpoint.structure * 8)
        assert b"".join(read) == data * 8


def test_a_closed_checkpoint_says_so(path):
    path.write_bytes(GOOD)
    checkpoint = open_checkpoint(path)
    (spec,) = checkpoint.structure
    checkpoint.close()
    checkpoint.close()
    for use in (lambda: checkpoint.read(spec, spec.grid.region(0)), checkpoint.check_unchanged):
        with pytest.raises(InvalidInputError) as caught:
            use()
        assert caught.value.kind == "closed"


def test_a_tensor_that_the_file_lacks_is_not_found(path):
    path.write_bytes(GOOD)
    other = SafetensorsLayout.from_header(file_of(raw().replace(b'"a"', b'"b"'))).structure[0]
    with open_checkpoint(path) as checkpoint, pytest.raises(TensorNotFoundError):
        checkpoint.read(other, other.grid.region(0))


def test_metadata_of_a_file_from_torch_is_read(path):
    path.write_bytes(save({"w": torch.arange(6.0).reshape(2, 3)}, {"format": "pt"}))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.layout.metadata == {"format": "pt"}
    assert content(path)["w"] == ("F32", (2, 3), torch.arange(6.0).numpy().tobytes())
