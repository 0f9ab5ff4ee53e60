"""Whatever lamella accepts as a safetensors file, the reference accepts too, with the same tensors."""

import json
import struct
from math import prod

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from lamella_engine.checkpoints import SafetensorsLayout, open_checkpoint
from lamella_engine.dtypes import DTYPES
from lamella_engine.errors import InvalidInputError, LimitError

BITS = {dtype.safetensors: dtype.bits for dtype in DTYPES if dtype.safetensors is not None}


@st.composite
def documents(draw):
    """The header of a good file as a dict, in an order of its own, and the file's data."""
    names = draw(st.lists(st.text(max_size=4).filter(lambda name: name != "__metadata__"), max_size=4, unique=True))
    header = {}
    end = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if prod(shape) * BITS[dtype] % 8:
            shape.append(8)
        start, end = end, end + prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    order = draw(st.permutations(list(header)))
    return {name: header[name] for name in order}, draw(st.binary(min_size=end, max_size=end))


@st.composite
def texts(draw, header):
    """One of the many ways to write a header as JSON."""
    text = json.dumps(
        header,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 0, 1])),
        separators=draw(st.sampled_from([(",", ":"), (" , ", "\t: ")])),
    )
    return text.encode() + b" " * draw(st.integers(0, 9))


odd_values = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([1 << 31, 1 << 63, 1 << 64, -1, 0.0, 4.0, 1e300, None, True, "", "U8", [], {}, [0], [0, 0], ["0"]]),
    st.lists(st.integers(0, 8), max_size=3),
)


@st.composite
def spoiled_documents(draw):
    """A header with one value, field or tensor that is something else."""
    header, data = draw(documents())
    tensors = [name for name in header if name != "__metadata__"]
    if tensors and draw(st.integers(0, 4)):
        tensor = header[draw(st.sampled_from(tensors))]
        tensor[draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))] = draw(odd_values)
    else:
        header[draw(st.text(max_size=2) | st.just("__metadata__"))] = draw(odd_values)
    text = draw(texts(header))
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def spoiled_files(draw):
    """A good file with some of its bytes changed, added, lost or doubled, and perhaps an honest length again."""
    header, data = draw(documents())
    text = bytearray(draw(texts(header)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        until = min(len(text), at + draw(st.integers(0, 6)))
        piece = draw(
            st.sampled_from(
                [b"", b'"', b"}", b"]", b",", b" ", b"\0", b"\\", b"\\u00e9", b"\\ud800", b"0", b"-", b".5"]
            )
            | st.binary(max_size=2)
            | st.just(bytes(text[at:until]) * 2)
        )
        text[at:until] = piece
    length = len(text) if draw(st.integers(0, 9)) else draw(st.integers(0, 300))
    return struct.pack("<Q", length) + bytes(text) + data + draw(st.sampled_from([b"", b"", b"\0"]))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("differential") / "model.safetensors"


def read_here(path, data):
    """Name -> dtype, shape, bytes as lamella reads them; None if it refuses."""
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(path)
    except (InvalidInputError, LimitError):
        return None
    with checkpoint:
        return {
            spec.name: (
                spec.dtype.safetensors,
                list(spec.shape),
                b"".join(bytes(checkpoint.read(spec, region)) for region in spec.grid.regions()),
            )
            for spec in checkpoint.structure
        }


def read_by_reference(data):
    """The same as the reference reads them; None if it refuses."""
    try:
        found = deserialize(data)
    except SafetensorError:
        return None
    return {name: (view["dtype"], view["shape"], bytes(view["data"])) for name, view in found}


@given(data=st.data(), document=documents())
def test_every_way_to_write_a_good_file_reads_alike(path, data, document):
    header, tensors = document
    text = data.draw(texts(header))
    file = struct.pack("<Q", len(text)) + text + tensors
    found = read_here(path, file)
    assert found is not None
    assert found == read_by_reference(file)
    layout = SafetensorsLayout.from_header(file[: 8 + len(text)])
    assert layout.header + b"".join(file[tensor.start : tensor.stop] for tensor in layout.tensors) == file


@given(file=spoiled_documents() | spoiled_files())
def test_what_lamella_accepts_the_reference_accepts_alike(path, file):
    found = read_here(path, file)
    event("refused" if found is None else "accepted")
    if found is not None:
        assert found == read_by_reference(file)


@given(file=st.binary(max_size=64))
def test_random_bytes_raise_nothing_but_a_typed_error(path, file):
    found = read_here(path, file)
    if found is not None:
        assert found == read_by_reference(file)
