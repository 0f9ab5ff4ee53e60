"""Filling memory that is there: every kind of it, in place, from nothing or from another version, or not at all."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch
from faults import CountingObjects
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors
from support import bits, copy_of, new_repository, noise, open_again, store_of

from lamella_engine.content_store.packed import PackedStore
from lamella_engine.dtypes import DTYPES
from lamella_engine.errors import CorruptionError, InvalidInputError, TensorNotFoundError
from lamella_engine.executor import InlineExecutor, ThreadExecutor
from lamella_engine.objects.memory import MemoryObjects

ROWS = (3_000, 400)  # float32: cells of 2,048 rows and the rest


def noise_like(array):
    """Return other bits of the same shape and dtype."""
    octets = np.random.default_rng(7).integers(0, 2, max(array.nbytes, 1), np.uint8)[: array.nbytes]
    return octets.view(array.dtype).reshape(array.shape)


def trained(tensors, seed, *names):
    """Return tensors of which only ``names`` moved, each element a little."""
    moved = {name: tensors[name] + noise(seed, *tensors[name].shape) * np.float32(1e-4) for name in names}
    return {name: np.array(array) for name, array in (tensors | moved).items()}


FIRST = {
    "frozen": noise(1, *ROWS),
    "trained": noise(2, *ROWS),
    "head": noise(3, 5, 7),
    "tiny": noise(4, 3),  # stands in its row
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}
SECOND = trained(FIRST, 5, "trained", "tiny")
THIRD = trained(SECOND, 6, "trained", "head")


@pytest.fixture(scope="module")
def history():
    """Return the objects of a repository with three versions of one training."""
    made = MemoryObjects()
    repo = new_repository(made)
    for number, checkpoint in enumerate((FIRST, SECOND, THIRD), 1):
        repo.push(checkpoint, "m@main", message=str(number))
    return made


@pytest.fixture
def objects(history):
    return CountingObjects(copy_of(history))


@pytest.fixture(params=[InlineExecutor, lambda: ThreadExecutor(threads=3)], ids=["inline", "threads"])
def repo(request, objects):
    with open_again(objects, request.param()) as opened:
        yield opened


def memory_of(tensors):
    """Return writable copies."""
    return {name: np.array(array) for name, array in tensors.items()}


def fresh_memory(tensors=FIRST):
    return {name: noise_like(array) for name, array in tensors.items()}


def test_a_matrix_is_filled_as_the_array_that_it_is(repo):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        into = {"trained": fresh_memory()["trained"].view(np.matrix)}
        repo.checkout("m@v3", into=into, include="trained")
    assert into["trained"].tobytes() == THIRD["trained"].tobytes()


@pytest.mark.parametrize(
    "options",
    [
        {"format": "zarr"},
        {"framework": "torch", "out": "x"},
        {"framework": "torch", "into": {}},
        {"out": "x", "into": {}},
        {"have": "m@v1"},
        {"format": "tar", "out": "x"},
    ],
)
def test_options_that_would_have_no_effect_are_refused(repo, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError) as caught:
        repo.checkout("m@v3", **options)
    assert caught.value.kind == "bad_option"
    assert list(tmp_path.iterdir()) == []


def test_a_version_fills_arrays_in_place(repo):
    into = fresh_memory()
    addresses = {name: array.ctypes.data for name, array in into.items()}
    found = repo.checkout("m@v3", into=into)
    assert bits(into) == bits(THIRD)
    assert all(found[name] is into[name] for name in THIRD)
    assert {name: array.ctypes.data for name, array in into.items()} == addresses


def test_a_version_fills_parameters_that_require_grad(repo):
    into = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in fresh_memory().items()}
    repo.checkout("m@v2", into=into)
    assert bits({name: tensor.detach().numpy() for name, tensor in into.items()}) == bits(SECOND)
    assert all(tensor.requires_grad and tensor.grad_fn is None for tensor in into.values())


def test_contiguous_memory_is_decoded_into_without_staging(repo, monkeypatch):
    monkeypatch.setattr("lamella_engine.filling._staging", None)
    into = fresh_memory()
    repo.checkout("m@v3", into=into)
    assert bits(into) == bits(THIRD)


@given(st.data())
def test_memory_of_any_layout_takes_any_bits(data):
    array = data.draw(st.sampled_from(DTYPES).flatmap(tensors))
    other = data.draw(st.sampled_from([array, noise_like(array)]))
    repo = new_repository()
    repo.push({"w": other}, "m@main")
    repo.push({"w": array}, "m@main")
    memory = data.draw(layouts(other))
    have = data.draw(st.sampled_from([None, "m@v1"]))
    repo.checkout("m@latest", into={"w": memory}, have=have, verify=data.draw(st.sampled_from(["blob", "chunk"])))
    assert bits({"w": memory}) == bits({"w": array})


@st.composite
def layouts(draw, array):
    """Draw writable memory that holds an array: strided, reversed, transposed or big-endian."""
    layout = draw(st.sampled_from(["C", "F", "step", "reversed", "big-endian"]))
    if layout == "big-endian":
        return array.astype(array.dtype.newbyteorder(">"))
    if layout in "CF" or not array.ndim:
        return np.array(array, order=layout if layout in "CF" else "C")
    room = np.zeros([2 * length for length in array.shape], array.dtype)
    place = (slice(None, None, 2),) * array.ndim if layout == "step" else (slice(None, None, -2),) * array.ndim
    room[place] = array
    return room[place]


@pytest.mark.parametrize("dtype", ["f4", "c8", "c16", "i2", ml_dtypes.bfloat16, ml_dtypes.float8_e5m2], ids=str)
def test_big_endian_memory_moves_in_place(dtype):
    little = [noise(seed, 40, 30).astype(dtype) for seed in (1, 2)]
    repo = new_repository()
    for array in little:
        repo.push({"w": array}, "m@main")
    into = np.zeros((40, 30), np.dtype(dtype).newbyteorder(">"))
    repo.checkout("m@v1", into={"w": into})
    repo.checkout("m@v2", into={"w": into}, have="m@v1")
    lane = into.itemsize // (2 if into.dtype.kind == "c" else 1)
    assert into.view(f"u{lane}").byteswap().tobytes() == little[1].tobytes()


@pytest.mark.parametrize("make", [
    lambda: torch.zeros(2_000, 1_500).t(),
    lambda: torch.zeros(1_500, 4_000)[:, 1::2],
    lambda: torch.zeros(1_501, 2_000)[1:],
], ids=["transposed", "strided", "offset"])  # fmt: skip
def test_tensors_of_any_strides_move_in_place(make):
    wanted = [noise(seed, 1_500, 2_000) for seed in (1, 2)]
    repo = new_repository()
    repo.push({"w": wanted[0]}, "m@main")
    repo.push({"w": wanted[0] + wanted[1] * np.float32(1e-5)}, "m@main")
    tensor = make()
    repo.checkout("m@v1", into={"w": tensor})
    assert tensor.numpy().tobytes() == wanted[0].tobytes()
    repo.checkout("m@v2", into={"w": tensor}, have="m@v1")
    assert tensor.numpy().tobytes() == (wanted[0] + wanted[1] * np.float32(1e-5)).tobytes()


# -- from one version to another ---------------------------------------------------------------------------------------


def nbytes_of_blobs(repo, revision, *names):
    """Return the encoded bytes of the tensors' own blobs, and assert that they are deltas of depth 1 or more."""
    store = store_of(repo)
    version = store.reader.open(store.resolve(revision))
    rows = [store.reader.copy_of_row(version, row).row for name in names for row in version.manifest.rows(name)]
    assert all(row.depth for row in rows)
    return sum(row.encoded_nbytes for row in rows)


def nbytes_read(repo, objects, revision, have, **options):
    """Return what a move in place reads when the pages of both versions and the indexes of their packs are known."""
    into = {}
    for _ in range(2):
        into = memory_of({"m@v1": FIRST, "m@v2": SECOND, "m@v3": THIRD}[have])
        objects.reset()
        repo.checkout(revision, into=into, have=have, **options)
    return objects.read_nbytes


def test_a_move_reads_only_the_deltas_of_what_changed(repo, objects):
    assert nbytes_read(repo, objects, "m@v2", "m@v1") == nbytes_of_blobs(repo, "m@v2", "trained")
    assert nbytes_read(repo, objects, "m@v3", "m@v2") == nbytes_of_blobs(repo, "m@v3", "trained", "head")


def test_a_move_over_two_versions_reads_the_deltas_of_both(repo, objects):
    both = nbytes_of_blobs(repo, "m@v2", "trained") + nbytes_of_blobs(repo, "m@v3", "trained", "head")
    assert nbytes_read(repo, objects, "m@v3", "m@v1") == both


def test_what_did_not_change_is_not_read(repo, objects):
    assert nbytes_read(repo, objects, "m@v3", "m@v2", include="frozen") == 0
    assert nbytes_read(repo, objects, "m@v2", "m@v2") == 0


def test_a_move_back_reads_the_whole_of_what_changed(repo, objects):
    full = sum(array.nbytes for name, array in FIRST.items() if name in ("trained", "head"))
    assert 0.8 * full < nbytes_read(repo, objects, "m@v1", "m@v3") < full


@pytest.mark.parametrize("have", ["m@v1", "m@v2", "m@v3"])
@pytest.mark.parametrize("revision", ["m@v1", "m@v2", "m@v3"])
@pytest.mark.parametrize("verify", ["blob", "chunk"])
def test_memory_moves_from_any_version_to_any(repo, revision, have, verify):
    versions = {"m@v1": FIRST, "m@v2": SECOND, "m@v3": THIRD}
    into = memory_of(versions[have])
    repo.checkout(revision, into=into, have=have, verify=verify)
    assert bits(into) == bits(versions[revision])


def test_cells_that_did_not_change_are_not_touched(repo):
    """Which can be told, because what is skipped is only checked if one asks."""
    into = memory_of(SECOND)
    into["frozen"][:] = 0
    repo.checkout("m@v3", into=into, have="m@v2")
    assert not into["frozen"].any()
    into = memory_of(SECOND)
    into["frozen"][2_999, 399] += 1
    with pytest.raises(InvalidInputError) as caught:
        repo.checkout("m@v3", into=into, have="m@v2", verify="chunk")
    assert caught.value.kind == "not_held"
    assert caught.value.context == {"tensor": "frozen"}


@pytest.mark.parametrize(
    "layout", [np.array, lambda array: np.array(array, order="F"), lambda array: array.astype(">f4")]
)
def test_memory_that_does_not_hold_the_version_is_found_out_and_left_as_it_is(repo, layout):
    into = {name: layout(array) for name, array in SECOND.items()}
    into["trained"][0, 0] += 1
    before = into["trained"].tobytes()
    with pytest.raises(InvalidInputError, match="without have") as caught:
        repo.checkout("m@v3", into=into, have="m@v2", include="trained")
    assert caught.value.kind == "not_held"
    assert (
        into["trained"][:2_048].tobytes()
        == np.frombuffer(before, into["trained"].dtype).reshape(ROWS)[:2_048].tobytes()
    )
    repo.checkout("m@v3", into=into)
    assert bits(into) == bits(THIRD)


def test_tensors_that_the_held_version_lacks_come_whole(repo):
    grown = THIRD | {"more": noise(9, 300), "head": noise(10, 5, 8)}
    repo.push(grown, "m@main")
    into = memory_of(grown) | fresh_memory({"more": grown["more"], "head": grown["head"]})
    into["trained"] = np.array(SECOND["trained"])
    repo.checkout("m@v4", into=into, have="m@v2")
    assert bits(into) == bits(grown)


def test_a_tensor_of_another_shape_is_not_held_whatever_its_bytes_are(repo):
    turned = THIRD | {"head": THIRD["head"].reshape(7, 5), "tiny": THIRD["tiny"].reshape(3, 1)}
    repo.push(turned, "m@main")
    into = memory_of(THIRD) | {"head": np.zeros((7, 5), np.float32), "tiny": np.zeros((3, 1), np.float32)}
    repo.checkout("m@v4", into=into, have="m@v3")
    assert bits(into) == bits(turned)


def test_a_held_version_of_another_model_will_do(repo):
    repo.push(trained(SECOND, 8, "frozen"), "other@main", parent="m@v2")
    into = memory_of(THIRD)
    repo.checkout("other@main", into=into, have="m@v3")
    assert bits(into) == bits(trained(SECOND, 8, "frozen"))


def test_torch_counts_a_change_of_those_tensors_alone_that_were_written(repo):
    into = {name: torch.from_numpy(array) for name, array in memory_of(SECOND).items()}
    before = {name: tensor._version for name, tensor in into.items()}
    repo.checkout("m@v3", into=into, have="m@v2")
    changed = {name for name, tensor in into.items() if tensor._version != before[name]}
    assert changed == {"trained", "head"}


def test_inference_tensors_are_filled(repo):
    with torch.inference_mode():
        into = {name: torch.zeros(array.shape) for name, array in FIRST.items()}
    repo.checkout("m@v3", into=into)
    assert bits(into) == bits(THIRD)


def test_lazily_conjugated_tensors_are_filled():
    wanted = [noise(seed, 700, 900).view(np.complex64) for seed in (1, 2)]
    repo = new_repository()
    repo.push({"w": wanted[0]}, "m@main")
    repo.push({"w": np.where(np.arange(450) < 9, wanted[1], wanted[0])}, "m@main")
    tensor = torch.zeros(700, 450, dtype=torch.complex64).conj()
    repo.checkout("m@v1", into={"w": tensor})
    repo.checkout("m@v2", into={"w": tensor}, have="m@v1")
    assert tensor.resolve_conj().numpy().tobytes() == np.where(np.arange(450) < 9, wanted[1], wanted[0]).tobytes()
    assert tensor._version > 0


def test_packed_elements_are_filled():
    packed = torch.arange(24, dtype=torch.uint8).reshape(4, 6).view(torch.float4_e2m1fn_x2)
    repo = new_repository()
    repo.push({"w": packed}, "m@main")
    into = torch.zeros(4, 6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    repo.checkout("m@main", into={"w": into})
    octets = np.zeros(24, np.uint8)
    repo.checkout("m@main", into={"w": octets})
    assert into.view(torch.uint8).numpy().tobytes() == octets.tobytes() == bytes(range(24))
    turned = torch.zeros(6, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).t()
    with pytest.raises(InvalidInputError) as caught:
        repo.checkout("m@main", into={"w": turned})
    assert caught.value.kind == "not_contiguous"


# -- tied tensors and overlaps -----------------------------------------------------------------------------------------


@pytest.fixture
def tied():
    """Return a repository: in v1 and v3 the names are tied, in v2 not."""
    repo = new_repository()
    for number, (one, other) in enumerate(((1, 1), (1, 2), (3, 3)), 1):
        repo.push({"a": noise(one, 40, 5), "b": noise(other, 40, 5)}, "m@main", message=str(number))
    return repo


def test_tied_names_are_filled_where_the_version_ties_them(tied):
    memory = torch.zeros(40, 5)
    tied.checkout("m@v1", into={"a": memory, "b": memory.detach()})
    assert memory.numpy().tobytes() == noise(1, 40, 5).tobytes()
    tied.checkout("m@v3", into={"a": memory, "b": memory}, have="m@v1")
    assert memory.numpy().tobytes() == noise(3, 40, 5).tobytes()


def test_tied_names_cannot_hold_two_contents(tied):
    memory = torch.zeros(40, 5)
    with pytest.raises(InvalidInputError) as caught:
        tied.checkout("m@v2", into={"a": memory, "b": memory})
    assert caught.value.kind == "tied_tensors"
    assert not memory.any()
    with pytest.raises(InvalidInputError) as caught:
        tied.checkout("m@v3", into={"a": memory, "b": memory}, have="m@v2")
    assert caught.value.kind == "not_held"
    assert not memory.any()


def fused(rows, columns):
    room = np.zeros((rows, columns), np.float32)
    return room, torch.from_numpy(room)


@pytest.mark.parametrize("parts", [
    lambda numpy, _: (numpy[:40], numpy[40:]),
    lambda numpy, _: (numpy.reshape(40, 10)[:, :5], numpy.reshape(40, 10)[:, 5:]),
    lambda _, torch: (torch.reshape(40, 10)[:, ::2], torch.reshape(40, 10)[:, 1::2]),
    lambda numpy, torch: (numpy[:40], torch[40:]),
], ids=["rows", "columns", "interleaved", "both kinds"])  # fmt: skip
def test_views_of_one_fused_weight_are_filled(tied, parts):
    one, other = parts(*fused(80, 5))
    tied.checkout("m@v2", into={"a": one, "b": other})
    assert (np.asarray(one).tobytes(), np.asarray(other).tobytes()) == (
        noise(1, 40, 5).tobytes(),
        noise(2, 40, 5).tobytes(),
    )


@pytest.mark.parametrize("parts", [
    lambda numpy, _: (numpy[:40], numpy[39:79]),
    lambda _, torch: (torch[:40], torch[39:79]),
    lambda numpy, _: (numpy[20:60], numpy[:39:-1]),
    lambda _, torch: (torch[:40], torch[:40].reshape(5, 40).t()),
    lambda _, torch: (torch[:1].expand(40, 5), torch[40:]),
    lambda numpy, _: (np.lib.stride_tricks.as_strided(numpy, (40, 5), (4, 4)), numpy[40:]),
    lambda numpy, torch: (numpy[:40], torch[:40]),
], ids=["arrays", "tensors", "reversed", "turned", "expanded", "windows", "both kinds"])  # fmt: skip
def test_memory_that_overlaps_is_refused(tied, parts):
    room, same_room = fused(80, 5)
    one, other = parts(room, same_room)
    with pytest.raises(InvalidInputError) as caught:
        tied.checkout("m@v2", into={"a": one, "b": other})
    assert caught.value.kind == "overlapping_memory"
    assert not room.any()


# -- refusals ----------------------------------------------------------------------------------------------------------


def without(name):
    return {key: value for key, value in fresh_memory().items() if key != name}


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(("into", "kind", "words"), [
    (lambda: without("head"), "structure_mismatch", ["'head'", "exclude"]),
    (lambda: fresh_memory() | {"more": np.zeros(3)}, "structure_mismatch", ["'more'", "take them out"]),
    (lambda: fresh_memory() | {3: np.zeros(3)}, "structure_mismatch", ["3"]),
    (lambda: fresh_memory() | {"head": np.zeros((5, 7))}, "structure_mismatch", ["float32", "float64", "module.to"]),
    (lambda: fresh_memory() | {"head": torch.zeros(7, 5)}, "structure_mismatch", ["(5, 7)", "(7, 5)"]),
    (lambda: fresh_memory() | {"head": np.zeros((5, 7), np.int32)}, "structure_mismatch", ["int32"]),
    (lambda: fresh_memory() | {"head": np.zeros(140, np.uint8)}, "structure_mismatch", ["uint8"]),
    (lambda: fresh_memory() | {"head": [1.0]}, "not_a_tensor", ["list"]),
    (lambda: fresh_memory() | {"scalar": np.float32(1)}, "not_a_tensor", ["float32"]),
    (lambda: fresh_memory() | {"head": np.ma.zeros((5, 7), np.float32)}, "not_a_tensor", ["MaskedArray"]),
    (lambda: fresh_memory() | {"head": np.zeros((5, 7), "U1")}, "unknown_dtype", ["'head'"]),
    (lambda: fresh_memory() | {"head": read_only(np.zeros((5, 7), np.float32))}, "read_only", ["writable"]),
    (lambda: fresh_memory() | {"head": torch.zeros(5, 7, device="meta")}, "meta_tensor", ["'head'"]),
    (lambda: fresh_memory() | {"head": torch.zeros(5, 7).to_sparse()}, "sparse_tensor", ["'head'"]),
    (lambda: list(fresh_memory().values()), "bad_option", ["mapping"]),
])  # fmt: skip
def test_a_refusal_names_the_tensor_and_changes_nothing(repo, monkeypatch, into, kind, words):
    memory = into()
    before = (
        {name: np.array(memory[name]).tobytes() for name in ("frozen", "trained", "tiny")}
        if isinstance(memory, dict)
        else {}
    )
    monkeypatch.delattr(PackedStore, "read")
    with pytest.raises(InvalidInputError) as caught:
        repo.checkout("m@v3", into=memory)
    assert caught.value.kind == kind
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert {name: np.array(memory[name]).tobytes() for name in before} == before


def test_what_the_selection_leaves_out_is_not_looked_at(repo):
    into = fresh_memory() | {"more": "anything", "head": "anything"}
    found = repo.checkout("m@v3", into=into, include=["t*", "frozen"], exclude="tiny")
    assert sorted(found) == ["frozen", "trained"]
    assert bits(found) == bits({"frozen": THIRD["frozen"], "trained": THIRD["trained"]})
    assert into["tiny"].tobytes() == fresh_memory()["tiny"].tobytes()
    found = repo.checkout("m@v3", into=fresh_memory() | {"more": 1}, exclude="more")
    assert bits(found) == bits(THIRD)
    with pytest.raises(TensorNotFoundError):
        repo.checkout("m@v3", into=into, include="nothing*")


def test_damage_in_a_pack_is_found_and_counted_as_a_change(repo, objects, monkeypatch):
    tensor = torch.zeros(ROWS)
    monkeypatch.setattr("lamella_engine.content_store.packs.blob_digest", lambda _: b"\0" * 16)
    with pytest.raises(CorruptionError):
        repo.checkout("m@v3", into={"frozen": tensor}, include="frozen")


def test_many_threads_fill_their_own_memory_from_one_repository(repo):
    with ThreadPoolExecutor(4) as pool:
        moves = [
            pool.submit(lambda: bits(repo.checkout("m@v3", into=memory_of(SECOND), have="m@v2"))) for _ in range(8)
        ]
        assert all(move.result() == bits(THIRD) for move in moves)
