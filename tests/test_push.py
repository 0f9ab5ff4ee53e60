"""What a push stores, what it does not store, and what it refuses."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from faults import CountingObjects
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors as drawn_tensors
from support import bits, copies_in, names_of, new_repository, noise, open_again, store_of

from lamella_engine import codecs
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.dtypes import DTYPES
from lamella_engine.errors import AlreadyExistsError, ConflictError, InvalidInputError
from lamella_engine.executor import ThreadExecutor
from lamella_engine.format.digests import chunk_id
from lamella_engine.objects.memory import MemoryObjects

ELEMENT_DTYPES = [dtype for dtype in DTYPES if dtype.numpy is not None]


def chunks_in_packs(repo):
    """Return the id of every blob that any pack holds, once for each copy."""
    store = store_of(repo)
    return [row.chunk for pack in store.log.refresh().packs() for row in store.packs.index(pack.name).rows]


def pack_names(repo):
    return [pack.name for pack in store_of(repo).log.refresh().packs()]


def test_the_golden_case_of_the_users():
    """Three versions: two with other parameters, and a third that is the second, measured otherwise."""
    repo = new_repository()
    first = {"w": np.array([0.5, -0.2, 0.8], np.float32), "b": np.array([0.1], np.float32)}
    second = {"w": np.array([0.6, -0.3, 0.9], np.float32), "b": np.array([0.2], np.float32)}
    repo.push(first, "golden@main", metrics={"accuracy": 0.80})
    v2 = repo.push(second, "golden@main", metrics={"accuracy": 0.85})
    packs = pack_names(repo)
    v3 = repo.push(second, "golden@main", metrics={"accuracy": 0.90})
    assert round(repo.distance("golden@v1", "golden@v2", include="w").l2, 3) == 0.173
    assert round(repo.distance("golden@v1", "golden@v2").l2, 3) == 0.200
    assert v3.number == 3
    assert v3.id != v2.id
    assert v3.parameters_id == v2.parameters_id
    assert v3.parents == (v2.id,)
    assert repo.version("golden@best:accuracy").id == v3.id
    assert pack_names(repo) == packs
    assert bits(repo.checkout("golden@v1")) == bits(first)
    assert bits(repo.checkout("golden@v3")) == bits(second)


@pytest.mark.parametrize("reopened", [False, True], ids=["same process", "another process"])
def test_a_push_equal_to_the_head_adds_no_object(reopened):
    objects = MemoryObjects()
    repo = new_repository(objects)
    weights = {"w": noise(0, 300, 200), "scale": np.float32(3)}
    recipe = {"lr": (1e-3, None), "on": True}
    said = {"message": "one", "metrics": {"loss": math.nan, "top": math.inf}, "recipe": recipe}
    head = repo.push(weights, "m@main", **said)
    before = names_of(objects)
    if reopened:
        repo = open_again(objects)
    again = repo.push(weights, "m@main", **said)
    assert again.id == head.id
    assert again.number == 1
    assert names_of(objects) == before


@pytest.mark.parametrize(
    "other",
    [{"message": "other"}, {"metrics": {"loss": 1.5}}, {"recipe": {"lr": 2}}],
    ids=["message", "metrics", "recipe"],
)
def test_an_unchanged_checkpoint_with_another_note_stores_less_than_8_kb(other):
    objects = MemoryObjects()
    repo = new_repository(objects)
    weights = {f"layer.{i}.weight": noise(i, 64, 1024) for i in range(40)}
    first = repo.push(weights, "m@main", message="one", metrics={"loss": 1.0}, recipe={"lr": 1})
    before = names_of(objects)
    second = repo.push(weights, "m@main", **({"message": "one", "metrics": {"loss": 1.0}, "recipe": {"lr": 1}} | other))
    added = {name: nbytes for name, nbytes in names_of(objects).items() if name not in before}
    assert second.number == 2
    assert second.parameters_id == first.parameters_id
    assert not [name for name in added if name.startswith("packs/")]
    assert sum(added.values()) < 8_000


@pytest.mark.parametrize("reopened", [False, True], ids=["same process", "another process"])
def test_a_frozen_fine_tune_stores_no_blob_for_frozen_tensors(reopened):
    objects = MemoryObjects()
    repo = new_repository(objects)
    frozen = {f"embed.{i}": noise(i, 700, 2000) for i in range(3)}
    repo.push(frozen | {"head.weight": noise(10, 100, 100)}, "m@main")
    before = set(pack_names(repo))
    if reopened:
        repo = open_again(objects)
    tuned = {name: array.copy() for name, array in frozen.items()} | {"head.weight": noise(11, 100, 100)}
    version = repo.push(tuned, "m@tuned", parent="m@main")
    store = store_of(repo)
    (added,) = set(pack_names(repo)) - before
    stored = {row.chunk for row in store.packs.index(added).rows}
    frozen_chunks = {row.chunk for name in frozen for row in store.manifest(version.id).rows(name)}
    head = {row.chunk for row in store.manifest(version.id).rows("head.weight")}
    assert len(frozen_chunks) > len(frozen)  # some tensors have several cells
    assert not stored & frozen_chunks
    assert stored >= head
    assert bits(repo.checkout("m@tuned")) == bits(tuned)


def test_a_hundred_thousand_scalars_are_under_5_mb_and_no_blob_holds_one():
    objects = MemoryObjects()
    repo = new_repository(objects)
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    weights = {f"gate.{i:06d}": values[i] for i in range(len(values))}
    version = repo.push(weights, "m@main")
    assert sum(names_of(objects).values()) < 5_000_000
    store = store_of(repo)
    manifest = {chunk for chunk, _ in store.version(version.id).description.manifest_chunks}
    assert set(chunks_in_packs(repo)) == manifest
    some = [version[f"gate.{i:06d}"][()] for i in range(0, len(values), 9_973)]
    assert np.array(some).tobytes() == values[::9_973].tobytes()
    out = repo.checkout("m@main")
    assert np.stack([out[name] for name in weights]).tobytes() == values.tobytes()


def test_equal_tensors_of_one_push_are_stored_once():
    repo = new_repository()
    wte = torch.randn(400, 30)
    repo.push({"a.wte": wte, "z.lm_head": wte, "copy": wte.clone(), "bits": wte.view(torch.int32)}, "m@main")
    stored = chunks_in_packs(repo)
    assert stored.count(chunk_id(wte.numpy().tobytes())) == 1
    out = repo.checkout("m@main", framework="torch")
    assert out["a.wte"].numpy().tobytes() == out["z.lm_head"].numpy().tobytes() == wte.numpy().tobytes()
    assert out["a.wte"].data_ptr() != out["z.lm_head"].data_ptr()


def test_equal_tensors_are_stored_once_over_branches_models_and_processes():
    objects = MemoryObjects()
    weights = {"w": noise(0, 500)}
    new_repository(objects).push(weights, "a@main")
    open_again(objects).push(weights, "b@other", message="another model")
    repo = open_again(objects)
    repo.push({"renamed": weights["w"]}, "c@main")
    assert chunks_in_packs(repo).count(chunk_id(weights["w"].tobytes())) == 1
    for revision in ("a@main", "b@other"):
        assert bits(repo.checkout(revision)) == bits(weights)


def test_a_small_push_writes_three_objects():
    objects = CountingObjects(MemoryObjects())
    repo = new_repository(objects)
    repo.push({"w": noise(0, 500)}, "m@main")
    objects.reset()
    repo.push({"w": noise(1, 500)}, "m@main")
    written = [name.partition("/")[0] for call, name in objects.trace if call == "put_if_absent"]
    assert written == ["packs", "meta", "log"]


@given(st.data())
def test_every_dtype_round_trips_bit_for_bit(data):
    repo = new_repository()
    for version in range(2):  # the second is stored against the first where their shapes agree
        given_tensors = {
            dtype.name: data.draw(drawn_tensors(dtype), label=dtype.name)
            for dtype in data.draw(st.lists(st.sampled_from(ELEMENT_DTYPES), unique=True, min_size=1, max_size=6))
        }
        repo.push(given_tensors, "m@main", message=str(version))
        assert bits(repo.checkout("m@main", verify="chunk")) == bits(given_tensors)
    assert repo.verify(deep=True).problems == []


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=lambda dtype: dtype.name)
def test_a_delta_of_every_dtype_round_trips_bit_for_bit(dtype):
    repo = new_repository()
    random = np.random.default_rng(7)
    nbytes = 3_000 * dtype.numpy.itemsize
    first = random.bytes(nbytes)
    flipped = bytearray(first)
    for at in random.integers(0, nbytes, 200):
        flipped[at] ^= 1 << int(random.integers(8))
    for data in (first, bytes(flipped)):
        repo.push({"w": np.frombuffer(data, dtype.numpy)}, "m@main")
    store = store_of(repo)
    assert any(row.depth for pack in pack_names(repo) for row in store.packs.index(pack).rows)
    assert repo.checkout("m@v1")["w"].tobytes() == first
    assert repo.checkout("m@v2")["w"].tobytes() == bytes(flipped)
    assert repo.checkout("m@v2")["w"].dtype == dtype.numpy


def test_layout_in_memory_leaves_no_trace():
    """Strides and byte order of the source change neither what comes back nor what it is called."""
    plain = np.arange(2 * 3 * 700, dtype=np.float64).reshape(2, 3, 700) * 1.7
    repo = new_repository()
    expected = repo.push({"w": plain}, "m@main").parameters_id
    several = {
        "transposed": np.ascontiguousarray(plain.T).T,
        "big endian": plain.astype(">f8"),
        "reversed": np.ascontiguousarray(plain[:, ::-1])[:, ::-1],
        "every other": np.repeat(plain, 2, axis=2)[..., ::2],
        "torch": torch.from_numpy(plain).permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "requires grad": torch.from_numpy(plain.copy()).requires_grad_(),
    }
    for number, (what, array) in enumerate(several.items()):
        version = repo.push({"w": array}, f"m@layout-{number}", message=what)
        assert version.parameters_id == expected, what
        assert bits(repo.checkout(version.id)) == bits({"w": plain}), what


def test_scalars_and_empty_tensors_come_back():
    repo = new_repository()
    weights = {
        "": np.zeros((0,), np.float32),
        "empty/rows": np.zeros((0, 7), ml_dtypes.bfloat16),
        "empty/columns": np.zeros((3, 0, 2), np.int8),
        "scalar": np.array(-0.0, np.float16),
        "numpy scalar": np.float64(1e-310),
        "torch scalar": torch.tensor(3, dtype=torch.int64),
        "one": np.ones((1, 1, 1), np.bool_),
        "32 bytes": np.arange(8, dtype=np.float32),
        "33 bytes": np.arange(33, dtype=np.uint8),
        "complex": np.array([complex(-0.0, math.nan)], np.complex128),
    }
    version = repo.push(weights, "m@main")
    assert bits(repo.checkout("m@main")) == bits(weights)
    assert {name: version[name].numpy().tobytes() for name in version} == {
        name: np.asarray(array).tobytes() for name, array in weights.items()
    }
    assert len(version) == len(weights) == len(list(version))


def test_a_push_of_nothing_is_refused():
    with pytest.raises(InvalidInputError) as caught:
        new_repository().push({}, "m@main")
    assert caught.value.kind == "empty_source"


def test_a_tensor_that_grows_keeps_its_full_cells():
    repo = new_repository()
    wte = noise(0, 5_000, 512)
    repo.push({"wte": wte}, "m@main")
    before = set(pack_names(repo))
    grown = np.concatenate([wte, noise(1, 8, 512)])
    version = repo.push({"wte": grown}, "m@main")
    store = store_of(repo)
    (added,) = set(pack_names(repo)) - before
    cells = [row.chunk for row in store.manifest(version.id).rows("wte")]
    assert len(cells) == 3
    assert [row.chunk for row in store.packs.index(added).rows if row.chunk in cells] == cells[-1:]
    assert bits(repo.checkout("m@main")) == bits({"wte": grown})


@pytest.mark.parametrize("threads", [None, 3], ids=["inline", "threads"])
def test_blobs_lie_in_manifest_order(threads):
    executor = None if threads is None else ThreadExecutor(threads=threads)
    repo = new_repository(MemoryObjects(), executor)
    version = repo.push({f"{i:03d}": noise(i, 10 + 997 * (i % 7)) for i in range(200)}, "m@main")
    manifest = store_of(repo).manifest(version.id)
    (pack,) = pack_names(repo)
    stored = [row.chunk for row in store_of(repo).packs.index(pack).rows]
    cells = [row.chunk for row in manifest.all_rows() if row.chunk is not None]
    assert stored[: len(cells)] == cells
    repo.close()


def test_what_is_said_comes_back_as_it_was_said():
    repo = new_repository()
    recipe = {"name": "é\u2028\n", "nan": math.nan, "nested": [{"a": [1, -0.0, 1e-320]}, None, False], "seed": 2**63}
    metrics = {"loss": np.float32(0.25), "bad": math.nan, "top": -math.inf, "step": 3}
    repo.push({"w": noise(0, 3)}, "m@main", message="zwei\nZeilen", metrics=metrics, recipe=recipe)
    version = repo.version("m@main")
    assert version.message == "zwei\nZeilen"
    assert repr(version.recipe) == repr(recipe)
    assert list(version.metrics) == sorted(metrics)
    assert version.metrics["loss"] == 0.25
    assert math.isnan(version.metrics["bad"])
    assert version.metrics["top"] == -math.inf
    assert version.metrics["step"] == 3


def test_changing_what_a_version_returned_changes_no_version():
    repo = new_repository()
    head = repo.push({"w": noise(0, 3)}, "m@main", metrics={"loss": 1.0}, recipe={"lr": [1]})
    head.recipe["lr"].append(2)
    head.recipe["more"] = 3
    head.metrics["loss"] = 0.0
    assert repo.version("m@main").recipe == {"lr": [1]}
    assert repo.push({"w": noise(0, 3)}, "m@main", metrics={"loss": 1.0}, recipe={"lr": [1]}).number == 1


@pytest.mark.parametrize(
    "note",
    [
        {"recipe": {"w": np.zeros(3)}},
        {"recipe": {1: 2}},
        {"recipe": {"n": 10**5_000}},
        {"metrics": {"loss": "small"}},
        {"metrics": {"loss": True}},
        {"message": "\ud800"},
        {"message": b"bytes"},
    ],
    ids=["array", "key", "long integer", "text", "truth", "surrogate", "octets"],
)
def test_notes_that_cannot_be_kept_are_refused_before_anything_is_stored(note):
    objects = MemoryObjects()
    repo = new_repository(objects)
    before = names_of(objects)
    with pytest.raises(InvalidInputError):
        repo.push({"w": noise(0, 500)}, "m@main", **note)
    assert names_of(objects) == before


def test_best_finds_the_greatest_metric_and_the_newest_of_equals():
    repo = new_repository()
    for seed, accuracy in enumerate((0.5, math.nan, 0.75, 0.75, -math.inf)):
        repo.push({"w": noise(seed, 3)}, "m@main", metrics={"accuracy": accuracy})
    repo.push({"w": noise(0, 3)}, "m@main", metrics={"loss": 3, "tokens": 10**400})
    assert repo.version("m@best:accuracy").number == 4
    assert repo.version("m@best:loss").number == 6
    assert repo.version("m@best:tokens").number == 6


def test_a_parent_that_is_not_the_head_is_a_conflict_that_names_both():
    repo = new_repository()
    first = repo.push({"w": noise(0, 50)}, "m@main")
    second = repo.push({"w": noise(1, 50)}, "m@main", parent="m@v1")
    with pytest.raises(ConflictError) as caught:
        repo.push({"w": noise(2, 50)}, "m@main", parent="m@v1")
    assert caught.value.kind == "ref_moved"
    assert caught.value.context == {"expected": first.id, "actual": second.id}
    assert repo.version("m@main").id == second.id


def test_a_new_branch_starts_at_its_parent_and_at_nothing_without_one():
    repo = new_repository()
    first = repo.push({"w": noise(0, 50)}, "m@main")
    repo.push({"w": noise(1, 50)}, "m@main")
    assert repo.push({"w": noise(2, 50)}, "m@side", parent="m@v1").parents == (first.id,)
    assert repo.push({"w": noise(3, 50)}, "m@orphan").parents == ()
    assert repo.push({"w": noise(4, 50)}, "other@main", parent="m@v1").parents == (first.id,)
    assert [version.model for version in repo.log("other@main")] == ["other", "m"]


def test_only_a_branch_can_be_pushed_to():
    repo = new_repository()
    repo.push({"w": noise(0, 50)}, "m@main")
    repo.tag("m@release", "m@v1")
    repo.alias("m@production", "m@v1")
    for target in ("m@release", "m@production"):
        with pytest.raises(AlreadyExistsError) as caught:
            repo.push({"w": noise(1, 50)}, target)
        assert caught.value.kind == "not_a_branch"
    for target in ("m", "m@v3", "m@latest", "m@best:x", "m@deadbeef", "m@a@b", "m@", "@main", "m@../x", "m@-x"):
        with pytest.raises(InvalidInputError):
            repo.push({"w": noise(1, 50)}, target)
    assert repo.stats().versions == 1


def test_a_push_after_the_branch_was_moved_back_goes_on_from_there():
    repo = new_repository()
    first = repo.push({"w": noise(0, 50)}, "m@main")
    repo.push({"w": noise(1, 50)}, "m@main")
    repo.branch("m@main", "m@v1")
    third = repo.push({"w": noise(2, 50)}, "m@main")
    assert (third.number, third.parents) == (3, (first.id,))
    assert repo.version("m@v2").number == 2


def test_versions_pushed_in_one_instant_keep_their_models(monkeypatch):
    """Equal descriptions have equal ids, in however many models they stand."""
    monkeypatch.setattr("lamella_engine.pushing.now", lambda: "2026-01-01T00:00:00.000000Z")
    repo = new_repository()
    weights = {"w": noise(0, 50)}
    assert repo.push(weights, "a@main").model == "a"
    assert repo.push(weights, "b@main").model == "b"
    assert repo.version("b@main").model == "b"
    assert repo.push({"w": noise(1, 50)}, "b@main").number == 2
    assert [(version.model, version.number) for version in repo.log("b@main")] == [("b", 2), ("b", 1)]


def test_push_ids_are_well_formed_and_differ():
    ids = [new_push_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(len(push) == 32 and bytes.fromhex(push).hex() == push for push in ids)


def test_an_array_that_changes_between_hash_and_store_is_said_to_have_changed(monkeypatch):
    repo, array = new_repository(), noise(0, 5_000)
    encode = codecs.encode

    def late(chunk, **options):
        array[7] += 1  # somebody trains on
        return encode(chunk, **options)

    monkeypatch.setattr(codecs, "encode", late)
    with pytest.raises(InvalidInputError) as caught:
        repo.push({"w": array}, "m@main")
    assert caught.value.kind == "source_changed"
    assert repo.models() == []


@pytest.mark.parametrize("wrong", ["master", "short", "other"])
def test_a_chunk_that_is_encoded_wrongly_is_stored_raw_and_reported(wrong, monkeypatch, caplog):
    objects = MemoryObjects()
    repo, master = new_repository(objects), noise(0, 5_000)
    weights = {"master": master, "other": noise(1, 5_000), "short": master.astype(ml_dtypes.bfloat16)}
    chunk = weights[wrong].tobytes()
    encode = codecs.encode

    def broken(data, **options):
        encoded = encode(data, **options)
        if bytes(data) != chunk:
            return encoded
        return encoded._replace(payload=encoded.payload[:-1] + bytes([encoded.payload[-1] ^ 1]))

    monkeypatch.setattr(codecs, "encode", broken)
    repo.push(weights, "m@main")
    assert bits(repo.checkout("m@main")) == bits(weights)
    assert repo.verify(deep=True).ok
    (pack,) = store_of(repo).log.refresh().packs()
    stored = copies_in(objects, pack.name)
    assert [row.encoding for row, _ in stored.values() if row.chunk == chunk_id(chunk)] == [codecs.Encoding.RAW]
    assert stored[chunk_id(weights["short"].tobytes())].row.encoding == (
        codecs.Encoding.RAW if wrong == "short" else codecs.Encoding.CAST
    )
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "please report this" in record.getMessage()
