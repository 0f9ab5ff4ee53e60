"""Tensors in memory and in files go through a checkpoint and come back bit for bit, layouts and refusals included."""

import json
import os
import subprocess
import sys
from math import prod

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from lamella_engine.checkpoints import NewFile, SafetensorsLayout, open_checkpoint, to_numpy, write_files
from lamella_engine.checkpoints.files import check_attachment_path, check_attachment_paths
from lamella_engine.dtypes import DTYPES, dtype_named
from lamella_engine.errors import (
    AlreadyExistsError,
    InvalidInputError,
    StorageError,
    TensorNotFoundError,
)
from lamella_engine.model import TensorSpec
from lamella_engine.torch_tensors import dtype_of_torch, to_torch, torch_dtype_of

ARRAY_DTYPES = [dtype for dtype in DTYPES if not dtype.opaque]
FILE_DTYPES = [dtype for dtype in DTYPES if dtype.safetensors is not None]
TORCH_DTYPES = [dtype for dtype in DTYPES if isinstance(getattr(torch, dtype.name, None), torch.dtype)]


def read_all(checkpoint, spec):
    """All bytes of a tensor, cell by cell, through memory that is used again."""
    scratch = np.empty(4 << 20, np.uint8)
    return b"".join(bytes(checkpoint.read(spec, region, scratch)) for region in spec.grid.regions())


def only(source):
    """The spec and bytes of a checkpoint's one tensor."""
    with open_checkpoint(source) as checkpoint:
        (spec,) = checkpoint.structure
        octets = read_all(checkpoint, spec)
        assert octets == b"".join(bytes(checkpoint.read(spec, region)) for region in spec.grid.regions())
        return spec, octets


def octets_of(tensor):
    """What a torch tensor holds, told by torch alone."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


@st.composite
def arrays(draw, dtypes=tuple(ARRAY_DTYPES)):
    """Raw bit patterns as a contiguous array, NaN payloads and negative zeros included."""
    dtype = draw(st.sampled_from(dtypes))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    nbytes = prod(shape) * dtype.bits // 8
    return to_numpy(bytearray(draw(st.binary(min_size=nbytes, max_size=nbytes))), dtype, shape)


def spaced(array):
    wide = np.zeros([2 * length for length in array.shape], array.dtype)
    view = wide[(*(slice(None, None, 2) for _ in array.shape), ...)]
    view[...] = array
    return view


def reversed_(array):
    every = (*(slice(None, None, -1) for _ in array.shape), ...)
    return array[every].copy()[every]


ARRANGEMENTS = {
    "as it is": lambda array: array,
    "Fortran order": lambda array: array.copy(order="F"),
    "every other element": spaced,
    "negative strides": reversed_,
    "big-endian": lambda array: array.byteswap().view(array.dtype.newbyteorder(">")),
    "big-endian, spaced": lambda array: spaced(array.byteswap().view(array.dtype.newbyteorder(">"))),
    "read-only": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
    "unaligned": lambda array: (
        np.frombuffer(b"." + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)
    ),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@given(array=arrays())
def test_an_array_in_any_arrangement_gives_its_c_order_little_endian_bytes(arrangement, array):
    spec, octets = only({"a": ARRANGEMENTS[arrangement](array)})
    assert octets == array.tobytes()
    assert (spec.name, spec.dtype.numpy, spec.shape) == ("a", array.dtype, array.shape)
    assert to_numpy(octets, spec.dtype, spec.shape).tobytes() == array.tobytes()


def test_cells_of_a_large_arranged_array_are_its_parts():
    array = np.random.default_rng(0).integers(0, 1 << 16, (1500, 2, 1000), np.uint16)
    for view in (array, array.transpose(2, 0, 1), array[::-1, :, ::-3], array.astype(">u2"), array.T):
        spec, octets = only({"a": view})
        assert spec.grid.cell_count > 1 or view.size < 1 << 20
        assert octets == view.astype("<u2").tobytes()


def test_a_broadcast_array_is_read_without_being_made():
    _, octets = only({"a": np.broadcast_to(np.float32(1.5), (3, 5))})
    assert octets == np.full((3, 5), 1.5, np.float32).tobytes()


@pytest.mark.parametrize("arrangement", ["negative strides", "big-endian", "Fortran order"])
def test_a_copy_uses_the_memory_it_is_given_and_no_more_of_it(arrangement):
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    scratch = bytearray(b"." * 20)
    with open_checkpoint({"a": ARRANGEMENTS[arrangement](array)}) as checkpoint:
        (spec,) = checkpoint.structure
        assert bytes(checkpoint.read(spec, spec.grid.region(0), scratch)) == array.tobytes()
    assert scratch == array.tobytes() + b"." * 8


@pytest.mark.parametrize("make", [lambda array: array, torch.from_numpy, lambda array: torch.from_numpy(array).half()])
def test_a_contiguous_tensor_is_lent_and_not_copied(make):
    tensor = make(np.arange(8, dtype=np.float32))
    with open_checkpoint({"a": tensor}) as checkpoint:
        (spec,) = checkpoint.structure
        lent = checkpoint.read(spec, spec.grid.region(0))
        tensor[0] = -1
        assert bytes(lent) == octets_of(torch.as_tensor(tensor))


def test_scalars_and_empty_tensors_are_tensors():
    source = {"s": np.float64(-0.0), "z": np.array(3, np.int8), "e": np.empty((3, 0, 2)), "t": torch.tensor(True)}
    with open_checkpoint(source) as checkpoint:
        found = {spec.name: (spec.dtype.name, spec.shape, read_all(checkpoint, spec)) for spec in checkpoint.structure}
    assert found == {
        "e": ("float64", (3, 0, 2), b""),
        "s": ("float64", (), np.float64(-0.0).tobytes()),
        "t": ("bool", (), b"\x01"),
        "z": ("int8", (), b"\x03"),
    }
    assert list(found) == ["e", "s", "t", "z"]


def test_an_empty_mapping_is_an_empty_checkpoint():
    with open_checkpoint({}) as checkpoint:
        assert checkpoint.structure == checkpoint.attachments == ()


def test_names_are_data_sorted_by_code_point():
    names = ["", "/", "../x", "__metadata__", "__proto__", "\0", "\U0001f600", "\uffff", "a\nb", "é", "e\u0301"]
    with open_checkpoint({name: np.zeros(1) for name in names}) as checkpoint:
        assert [spec.name for spec in checkpoint.structure] == sorted(names)


def test_names_added_and_removed_later_do_not_count():
    source = {"a": np.zeros(2, np.uint8), "b": np.ones(2, np.uint8)}
    with open_checkpoint(source) as checkpoint:
        del source["a"]
        source["b"] = None
        source["c"] = None
        assert [read_all(checkpoint, spec) for spec in checkpoint.structure] == [b"\0\0", b"\1\1"]


# --- torch


@given(array=arrays(tuple(dtype for dtype in TORCH_DTYPES if not dtype.opaque)))
def test_a_torch_tensor_goes_there_and_back(array):
    dtype = next(dtype for dtype in DTYPES if dtype.numpy == array.dtype)
    tensor = to_torch(array.tobytes(), dtype, array.shape)
    assert tensor.dtype == torch_dtype_of(dtype)
    assert dtype_of_torch(tensor.dtype) is dtype
    assert tuple(tensor.shape) == array.shape
    assert only({"a": tensor}) == (TensorSpec("a", dtype, array.shape), array.tobytes())
    axes = tuple(reversed(range(array.ndim)))
    assert only({"a": tensor.permute(axes)})[1] == array.transpose(axes).tobytes()


def test_torch_knows_the_dtypes_that_users_have():
    names = {dtype.name for dtype in TORCH_DTYPES}
    assert names >= {"bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64", "bool"}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(24.0)[::5],
        torch.arange(3.0).expand(4, 3),
        torch.nn.Parameter(torch.arange(4.0)),
        torch.nn.Buffer(torch.arange(4.0)),
        torch.arange(4.0).requires_grad_() * 2,
        torch.randn(3, 4, dtype=torch.complex64).conj(),
        torch.randn(3, 4, dtype=torch.complex128).mH,
        torch.randn(3, 4, dtype=torch.complex64).conj().imag,
        torch.randn(4, 6, dtype=torch.bfloat16)[1:, ::2],
        torch.randn(4, 6).to(torch.float8_e4m3fn).T,
        torch.arange(10)[3:7],
        torch.empty(0, 3).T,
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.stride())}",
)
def test_a_torch_tensor_in_any_arrangement_gives_its_bytes(tensor):
    spec, octets = only({"a": tensor})
    assert octets == octets_of(tensor)
    assert spec.shape == tuple(tensor.shape)


def test_cells_of_a_large_conjugated_tensor_are_its_parts():
    tensor = torch.randn(3, 300_000, dtype=torch.complex64).conj()
    spec, octets = only({"a": tensor})
    assert spec.grid.cell_count > 1
    assert octets == tensor.resolve_conj().numpy().tobytes()


def test_tied_tensors_are_two_tensors():
    weight = torch.arange(4.0)
    with open_checkpoint({"a": weight, "b": weight}) as checkpoint:
        assert [read_all(checkpoint, spec) for spec in checkpoint.structure] == [weight.numpy().tobytes()] * 2


def test_an_inference_tensor_is_read():
    with torch.inference_mode():
        tensor = torch.arange(4.0)
    with open_checkpoint({"a": tensor}) as checkpoint:
        assert read_all(checkpoint, checkpoint.structure[0]) == np.arange(4, dtype=np.float32).tobytes()
        checkpoint.check_unchanged()


def test_a_training_step_during_a_read_is_noticed():
    weight = torch.nn.Parameter(torch.ones(3))
    with open_checkpoint({"frozen": torch.ones(1), "weight": weight}) as checkpoint:
        read_all(checkpoint, checkpoint.structure[1])
        checkpoint.check_unchanged()
        weight.sum().backward()
        torch.optim.SGD([weight], lr=0.1).step()
        with pytest.raises(InvalidInputError, match="weight") as caught:
            checkpoint.check_unchanged()
    assert caught.value.kind == "source_changed"


def test_reading_leaves_the_callers_storage_resizable():
    tensor = torch.arange(4.0)
    with open_checkpoint({"a": tensor}) as checkpoint:
        bytes(checkpoint.read(checkpoint.structure[0], checkpoint.structure[0].grid.region(0)))
        tensor.untyped_storage().resize_(0)
        with pytest.raises(InvalidInputError) as caught:
            checkpoint.read(checkpoint.structure[0], checkpoint.structure[0].grid.region(0))
    assert caught.value.kind == "freed_tensor"


def test_packed_f4_is_counted_in_elements_and_comes_back():
    packed = torch.arange(12, dtype=torch.uint8).reshape(2, 6).view(torch.float4_e2m1fn_x2)
    spec, octets = only({"a": packed})
    assert (spec.dtype.name, spec.shape) == ("f4", (2, 12))
    assert octets == bytes(range(12))
    back = to_torch(octets, spec.dtype, spec.shape)
    assert back.dtype == torch.float4_e2m1fn_x2
    assert back.view(torch.uint8).tolist() == packed.view(torch.uint8).tolist()
    assert only({"a": packed.view(torch.uint8).T.view(torch.float4_e2m1fn_x2)})[1] == bytes(
        np.arange(12, dtype=np.uint8).reshape(2, 6).T.tobytes()
    )


def test_a_tensor_made_of_writable_bytes_shares_them():
    octets = bytearray(8)
    tensor = to_torch(octets, dtype_named("int32"), (2,))
    octets[0] = 7
    assert tensor.tolist() == [7, 0]
    assert to_torch(bytes(octets), dtype_named("int32"), (2,)).add_(1).tolist() == [8, 1]
    assert to_torch(memoryview(bytearray(9))[1:], dtype_named("int32"), (2,), device="cpu").tolist() == [0, 0]


@pytest.mark.parametrize(
    ("dtype", "shape", "kind"),
    [
        ("float8_e3m4", (1,), "unknown_dtype"),
        ("f6_e2m3", (4,), "unknown_dtype"),
        ("f4", (2, 1), "unknown_dtype"),
        ("f4", (), "unknown_dtype"),
        ("int8", (2,), "wrong_length"),
        ("int16", (1,), "wrong_length"),
    ],
)
def test_what_torch_cannot_hold_is_refused(dtype, shape, kind):
    with pytest.raises(InvalidInputError) as caught:
        to_torch(b"1", dtype_named(dtype), shape)
    assert caught.value.kind == kind


def test_opaque_bytes_are_a_flat_array_of_bytes():
    assert to_numpy(b"abc", dtype_named("f6_e3m2"), (2, 2)).tolist() == list(b"abc")
    with pytest.raises(InvalidInputError) as caught:
        to_numpy(b"abc", dtype_named("int16"), (1,))
    assert caught.value.kind == "wrong_length"


def nested():
    return torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def fake():
    with FakeTensorMode():
        return torch.ones(2)


class Everywhere(torch.Tensor):
    """As DTensor: a tensor that other processes hold the rest of."""

    def full_tensor(self):
        return self


def freed():
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    return tensor


NO_TENSORS = {
    "None": (lambda: None, "not_a_tensor"),
    "list": (lambda: [1.0, 2.0], "not_a_tensor"),
    "float": (lambda: 1.0, "not_a_tensor"),
    "string": (lambda: "x", "not_a_tensor"),
    "mapping": (lambda: {"w": np.zeros(1)}, "not_a_tensor"),
    "generator": (lambda: (n for n in range(3)), "not_a_tensor"),
    "masked array": (lambda: np.ma.masked_array([1.0], [True]), "not_a_tensor"),
    "objects": (lambda: np.array([None]), "unknown_dtype"),
    "text": (lambda: np.array(["a"]), "unknown_dtype"),
    "bytes": (lambda: np.array([b"a"]), "unknown_dtype"),
    "void": (lambda: np.zeros(1, "V4"), "unknown_dtype"),
    "records": (lambda: np.zeros(1, "f4,i4"), "unknown_dtype"),
    "dates": (lambda: np.zeros(1, "M8[s]"), "unknown_dtype"),
    "long double": (lambda: np.zeros(1, np.longdouble), "unknown_dtype"),
    "int4": (lambda: np.zeros(1, ml_dtypes.int4), "unknown_dtype"),
    "half complex": (lambda: torch.zeros(1, dtype=torch.complex32), "unknown_dtype"),
    "meta": (lambda: torch.empty(2, device="meta"), "meta_tensor"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "sparse_tensor"),
    "sparse rows": (lambda: torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1)), "sparse_tensor"),
    "quantized": (
        lambda: torch._empty_affine_quantized([2], scale=0.1, zero_point=0, dtype=torch.quint8),
        "quantized_tensor",
    ),
    "nested": (nested, "nested_tensor"),
    "freed": (freed, "freed_tensor"),
    "fake": (fake, "wrapped_tensor"),
    "distributed": (lambda: torch.ones(2).as_subclass(Everywhere), "distributed_tensor"),
    "without shape": (lambda: torch.nn.LazyLinear(2).weight, "uninitialized_tensor"),
    "packed scalar": (lambda: torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "unknown_dtype"),
}


@pytest.mark.filterwarnings("ignore")  # torch warns of nearly everything that is made here
@pytest.mark.parametrize("name", NO_TENSORS)
def test_what_is_no_tensor_is_refused_by_name(name):
    make, kind = NO_TENSORS[name]
    with pytest.raises(InvalidInputError) as caught:
        open_checkpoint({"good": np.zeros(1), "layer.weight": make()})
    assert caught.value.kind == kind
    assert "'layer.weight'" in caught.value.message


@pytest.mark.parametrize("name", [1, None, b"a", ("a",), "\ud800"])
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(InvalidInputError) as caught:
        open_checkpoint({name: np.zeros(1)})
    assert caught.value.kind == "bad_tensor_name"


@pytest.mark.parametrize("source", [None, 3, b"model.safetensors", [("a", np.zeros(1))], np.zeros(1), iter(())])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(InvalidInputError) as caught:
        open_checkpoint(source)
    assert caught.value.kind == "bad_source"


def test_a_closed_checkpoint_and_an_unknown_tensor_say_so():
    checkpoint = open_checkpoint({"a": np.zeros(1)})
    (spec,) = checkpoint.structure
    with pytest.raises(TensorNotFoundError):
        checkpoint.read(TensorSpec("b", spec.dtype, spec.shape), spec.grid.region(0))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(InvalidInputError) as caught:
        checkpoint.read(spec, spec.grid.region(0))
    assert caught.value.kind == "closed"


def test_checkpoints_do_without_torch(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from lamella_engine.checkpoints import open_checkpoint\n"
        "open_checkpoint({'a': np.zeros(1)}).close()\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=False).returncode == 0


# --- layouts and files


def parts_of(layout, tensors):
    """The parts of a file: its header, then each tensor's bytes in file order."""
    yield layout.header
    for placed in layout.tensors:
        yield tensors[placed.spec.name]


@given(data=st.data())
def test_every_file_dtype_goes_through_a_file(data, tmp_path_factory):
    dtypes = data.draw(st.lists(st.sampled_from(FILE_DTYPES), max_size=4))
    structure = []
    for number, dtype in enumerate(dtypes):
        shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=2)))
        structure.append(TensorSpec(str(number), dtype, (*shape, 8) if dtype.bits % 8 else shape))
    tensors = {spec.name: data.draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes)) for spec in structure}
    layout = SafetensorsLayout.canonical(structure)
    path = tmp_path_factory.getbasetemp() / "through.safetensors"
    path.write_bytes(b"".join(parts_of(layout, tensors)))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.structure == tuple(structure)
        assert {spec.name: read_all(checkpoint, spec) for spec in structure} == tensors


def zoo():
    """Tensors of every dtype that torch and the reference can save, named against the grain."""
    tensors = {}
    for number, dtype in enumerate(dtype for dtype in TORCH_DTYPES if dtype.safetensors is not None):
        octets = np.random.default_rng(number).integers(0, 256, 48, np.uint8)
        tensors[f"{(7 * number) % 25}-é\x7f\n"] = to_torch(octets, dtype, (3, 128 // dtype.bits))
    return {**tensors, "": torch.tensor(1.5), "empty": torch.empty(0, 3), "z": torch.arange(3), "Z": torch.arange(4)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {'"\\\x00\x1f\x7f\b/é\u2028': "\U0001f600\t"}, {}])
def test_a_canonical_file_is_what_torch_would_save(tmp_path, metadata):
    tensors = zoo()
    expected = safetensors.torch.save(tensors, metadata)
    with open_checkpoint(tensors) as checkpoint:
        layout = SafetensorsLayout.canonical(checkpoint.structure, metadata=metadata)
        assert layout.metadata == metadata
        octets = {spec.name: read_all(checkpoint, spec) for spec in checkpoint.structure}
    assert b"".join(parts_of(layout, octets)) == expected
    assert layout.nbytes == len(expected)


@given(array=arrays((dtype_named("float32"), dtype_named("int8"), dtype_named("bool"), dtype_named("uint64"))))
def test_a_canonical_file_is_what_numpy_would_save(array):
    tensors = {"b": array, "a": np.zeros(1, np.float16)}
    with open_checkpoint(tensors) as checkpoint:
        layout = SafetensorsLayout.canonical(checkpoint.structure)
        octets = {spec.name: read_all(checkpoint, spec) for spec in checkpoint.structure}
    assert b"".join(parts_of(layout, octets)) == safetensors.numpy.save(tensors)


def test_a_canonical_file_without_tensors_is_what_the_reference_would_save():
    assert SafetensorsLayout.canonical([]).header == safetensors.numpy.save({})


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if dtype.safetensors is None], ids=lambda dtype: dtype.name
)
def test_a_dtype_that_files_lack_is_refused_by_tensor(dtype):
    with pytest.raises(InvalidInputError, match=r"'layer\.weight'") as caught:
        SafetensorsLayout.canonical([TensorSpec("layer.weight", dtype, (1,))])
    assert caught.value.kind == "unknown_dtype"


def test_names_that_a_file_cannot_hold_are_refused():
    spec = TensorSpec("__metadata__", dtype_named("int8"), (1,))
    twice = TensorSpec("a", dtype_named("int8"), (1,))
    for structure, kind in (([spec], "bad_tensor_name"), ([twice, twice], "duplicate_key")):
        with pytest.raises(InvalidInputError) as caught:
            SafetensorsLayout.canonical(structure)
        assert caught.value.kind == kind


FOREIGN_HEADERS = {
    "odd order and space": b'{ "b" : {"data_offsets":[ 0, 4 ],\n"shape":[2,2], "dtype":"U8"},\t"a": {"dtype":"I16",'
    b'"shape":[1],"data_offsets":[4,6]} , "__metadata__":{"k":"v"} }   ',
    "unaligned length": b'{"a":{"dtype":"I16","shape":[1],"data_offsets":[4,6]},"b":'
    b'{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "escapes": rb'{"\u0061":{"dtype":"I16","shape":[1],"data_offsets":[0,2]},"b":'
    rb'{"d\u0074ype":"U8","shape":[4],"data_offsets":[2,6]},"__metadata__":{"\/":"\u2028"}}',
}


@pytest.mark.parametrize("name", [*FOREIGN_HEADERS, "torch"])
def test_a_file_is_rebuilt_byte_for_byte(tmp_path, name):
    source = tmp_path / "model.safetensors"
    if name == "torch":
        safetensors.torch.save_file(zoo(), source, {"format": "pt", "step": "7"})
    else:
        source.write_bytes(len(FOREIGN_HEADERS[name]).to_bytes(8, "little") + FOREIGN_HEADERS[name] + b"123456")
    with open_checkpoint(source) as checkpoint:
        (attachment,) = checkpoint.attachments
        octets = {spec.name: read_all(checkpoint, spec) for spec in checkpoint.structure}
    assert (attachment.path, attachment.role) == ("model.safetensors", "safetensors_header")
    layout = SafetensorsLayout.from_header(bytes(attachment.read(0, attachment.nbytes)))
    assert layout.structure == tuple(sorted(layout.structure, key=lambda spec: spec.name))
    target = tmp_path / "rebuilt.safetensors"
    write_file(target, parts_of(layout, octets), nbytes=layout.nbytes, overwrite=False)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "change", [lambda header: header[:-1], lambda header: header + b" ", lambda header: header[:7]]
)
def test_a_stored_header_of_another_length_is_refused(change):
    with pytest.raises(InvalidInputError) as caught:
        SafetensorsLayout.from_header(change(SafetensorsLayout.canonical([]).header))
    assert caught.value.kind == "truncated"


def test_offsets_of_a_layout_are_places_in_the_file():
    structure = [TensorSpec("a", dtype_named("int8"), (3,)), TensorSpec("b", dtype_named("float64"), (2,))]
    layout = SafetensorsLayout.canonical(structure)
    start = len(layout.header)
    assert [(spec.name, a, b) for spec, a, b in layout.tensors] == [
        ("b", start, start + 16),
        ("a", start + 16, start + 19),
    ]
    assert layout.nbytes == start + 19
    assert json.loads(layout.header[8:])["a"]["data_offsets"] == [16, 19]


# --- writing


def write_file(target, parts, *, nbytes, overwrite):
    """Write one file through :func:`write_files`."""
    (written,) = write_files(
        target.parent, [NewFile(target.name or ".", nbytes, lambda: parts)], overwrite=overwrite
    ).values()
    assert written == target


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "model.safetensors"


@pytest.fixture(autouse=True)
def _nothing_half_written(request, tmp_path):
    (tmp_path / "out").mkdir()
    yield
    assert [name for name in os.listdir(tmp_path / "out") if name.endswith(".part")] == []


def test_a_buffer_may_be_filled_again_between_parts(target):
    scratch = bytearray(2)

    def parts():
        for n in range(3):
            scratch[:] = bytes([n, n])
            yield scratch
        yield np.empty(0, np.uint8)
        yield b""

    write_file(target, parts(), nbytes=6, overwrite=False)
    assert target.read_bytes() == bytes([0, 0, 1, 1, 2, 2])
    write_file(target, parts(), nbytes=6, overwrite=False)


def test_the_same_content_leaves_a_file_alone(target):
    target.write_bytes(b"12345")
    os.utime(target, ns=(0, 0))
    write_file(target, [b"12", b"345"], nbytes=5, overwrite=False)
    assert target.stat().st_mtime_ns == 0


@pytest.mark.parametrize("parts", [[b"12", b"3x5"], [b"x2345"], [b"12345", b"6"], [b"1234"], []])
def test_other_content_is_not_replaced_unless_allowed(target, parts):
    target.write_bytes(b"12345")
    nbytes = sum(map(len, parts))
    with pytest.raises(AlreadyExistsError):
        write_file(target, parts, nbytes=nbytes, overwrite=False)
    assert target.read_bytes() == b"12345"
    write_file(target, parts, nbytes=nbytes, overwrite=True)
    assert target.read_bytes() == b"".join(parts)


def test_a_file_that_appears_meanwhile_is_not_replaced(target):
    def parts():
        target.write_bytes(b"theirs")
        yield b"ours"

    with pytest.raises(AlreadyExistsError):
        write_file(target, parts(), nbytes=4, overwrite=False)
    assert target.read_bytes() == b"theirs"


@pytest.mark.parametrize("taken", [False, True])
def test_a_file_system_without_links_is_served(target, monkeypatch, taken):
    def no_links(*_):
        if taken:
            target.write_bytes(b"theirs")
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    if taken:
        with pytest.raises(AlreadyExistsError):
            write_file(target, [b"ours"], nbytes=4, overwrite=False)
    else:
        write_file(target, [b"ours"], nbytes=4, overwrite=False)
    assert target.read_bytes() == (b"theirs" if taken else b"ours")


@pytest.mark.parametrize("error", [KeyboardInterrupt, InvalidInputError("x"), GeneratorExit, MemoryError])
@pytest.mark.parametrize("before", [None, b"before"])
def test_an_interrupted_write_leaves_what_was_there(target, error, before):
    if before is not None:
        target.write_bytes(before)

    def parts():
        yield b"12"
        raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        write_file(target, parts(), nbytes=4, overwrite=True)
    assert (target.read_bytes() if target.exists() else None) == before


@pytest.mark.parametrize("parts", [[b"12"], [b"12", b"34", b"5"], []])
@pytest.mark.parametrize("overwrite", [False, True])
def test_content_of_another_length_is_never_written(target, parts, overwrite):
    with pytest.raises(InvalidInputError) as caught:
        write_file(target, parts, nbytes=4, overwrite=overwrite)
    assert caught.value.kind == "wrong_length"
    assert not target.exists()


@pytest.mark.parametrize(("number", "kind"), [(28, "disk_full"), (5, "write_failed")])
def test_a_disk_that_fails_leaves_nothing(target, monkeypatch, number, kind):
    def fail(_):
        raise OSError(number, "failed")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError) as caught:
        write_file(target, [b"1234"], nbytes=4, overwrite=False)
    assert caught.value.kind == kind
    assert not target.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_directories_and_pipes_are_not_written_through(target, overwrite):
    (target.parent / "elsewhere").write_bytes(b"1234")
    (target.parent / "link").symlink_to("elsewhere")
    (target.parent / "dangling").symlink_to("nowhere")
    os.mkfifo(target.parent / "pipe")
    for name in ("link", "dangling", "pipe", "."):
        with pytest.raises(AlreadyExistsError):
            write_file(target.parent / name, [b"abcd"], nbytes=4, overwrite=overwrite)
    assert (target.parent / "elsewhere").read_bytes() == b"1234"
    assert not (target.parent / "nowhere").exists()


def test_directories_are_made_and_removed_again_if_it_fails(target):
    write_file(target.parent / "a" / "b" / "x", [b"12"], nbytes=2, overwrite=False)
    assert (target.parent / "a" / "b" / "x").read_bytes() == b"12"
    with pytest.raises(InvalidInputError):
        write_file(target.parent / "a" / "c" / "d" / "x", [b"1"], nbytes=2, overwrite=False)
    assert [path.name for path in (target.parent / "a").iterdir()] == ["b"]


def test_several_files_come_all_or_none(target):
    folder = target.parent / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "taken").write_bytes(b"theirs")

    def new(path, data):
        return NewFile(path, len(data), lambda: [data])

    files = [new("first", b"1"), new("deep/er/second", b"22"), new("sub/taken", b"ours")]
    with pytest.raises(AlreadyExistsError):
        write_files(folder, files, overwrite=False)
    assert sorted(path.name for path in folder.rglob("*")) == ["sub", "taken"]
    written = write_files(folder, files, overwrite=True)
    assert {path: where.read_bytes() for path, where in written.items()} == {
        "first": b"1", "deep/er/second": b"22", "sub/taken": b"ours"
    }  # fmt: skip
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("call", range(3))
def test_an_interrupt_while_files_take_their_names_takes_them_back(target, monkeypatch, call):
    folder = target.parent / "out"
    claimed = []

    def claim(draft, path):
        if len(claimed) == call:
            raise KeyboardInterrupt
        claimed.append(path)
        link(draft, path)

    link = os.link
    monkeypatch.setattr(os, "link", claim)
    with pytest.raises(KeyboardInterrupt):
        write_files(folder, [NewFile(f"{n}/x", 1, lambda: [b"x"]) for n in range(3)], overwrite=False)
    assert not folder.exists()


def test_a_written_file_has_the_permissions_of_the_umask(target):
    before = os.umask(0o027)
    try:
        write_file(target, [], nbytes=0, overwrite=False)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o640


GOOD_PATHS = [
    "a",
    "model.safetensors",
    "a/b/c.json",
    ".config",
    "a..b",
    "..a",
    "é/\U0001f600",
    "a b",
    "-rf",
    "%2e%2e%2f",
]
BAD_PATHS = [
    "", ".", "..", "/", "/abs", "../x", "a/..", "a/../../b", "a//b", "a/", "./a", "a/./b", "a\\b", "C:\\x", "\\\\?\\x",
    "a\0b", "a\nb", "\x1b[2J", "a\x07", "a\x7f", "a\x85b", "\u202etxt.exe", "a\u2028b", "\ud800", "x" * 256, "é" * 128,
    "x/" * 2048 + "x", ".git/hooks/post-checkout", "a/.GIT", ".lamella-00.part",
]  # fmt: skip


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_an_ordinary_relative_path_is_good(path):
    assert check_attachment_path(path) == path


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: ascii(path[:20]))
def test_a_path_that_leads_elsewhere_or_hides_something_is_refused(path):
    with pytest.raises(InvalidInputError) as caught:
        check_attachment_path(path)
    assert caught.value.kind == "bad_path"


def test_a_path_with_a_nul_is_refused(target):
    with pytest.raises(InvalidInputError) as caught:
        write_file(target.parent / "a\0b" / "x", [], nbytes=0, overwrite=False)
    assert caught.value.kind == "bad_path"


@pytest.mark.parametrize("paths", [["a", "a"], ["a", "a/b"], ["a/b/c", "d", "a"], ["../a"]])
def test_paths_that_cannot_stand_beside_each_other_are_refused(paths):
    with pytest.raises(InvalidInputError):
        check_attachment_paths(paths)
    check_attachment_paths(["a/b", "a/c", "a.b", "ab"])
