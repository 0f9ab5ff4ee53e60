"""A transaction records what its group holds in the end, or nothing."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from support import bits, new_repository, noise

import lamella
from lamella_engine.executor import ThreadExecutor


@pytest.fixture(params=["inline", "threads"])
def repo(request):
    return new_repository(executor=None if request.param == "inline" else ThreadExecutor(threads=2))


def test_arrays_become_the_version_of_the_same_tensors(repo):
    tensors = {"w": noise(0, 300, 70), "b": np.arange(7), "half": noise(1, 9).astype(ml_dtypes.bfloat16)}
    transaction = repo.transaction("m@main", message="first", metrics={"loss": 0.5}, recipe={"lr": 1})
    with transaction as group:
        for name, array in tensors.items():
            group.create_array(name, data=array)
    version = transaction.version
    assert version == repo.version("m@main")
    assert (version.message, version.metrics, version.recipe) == ("first", {"loss": 0.5}, {"lr": 1})
    assert version.parameters_id == repo.push(tensors, "m@pushed").parameters_id
    assert bits(repo.checkout("m@main")) == bits(tensors)
    assert repo.verify(deep=True).ok


@pytest.mark.parametrize(
    "array",
    [
        np.full(64, -0.0, ml_dtypes.bfloat16),
        np.full(64, -0.0, np.float32),
        np.full(64, 0x7FC1, np.uint16).view(ml_dtypes.bfloat16),
        np.full(64, 0x7F800001, np.uint32).view(np.float32),
        np.zeros(64, np.float32),
        np.full(64, 0x80, np.uint8).view(ml_dtypes.float8_e4m3fn),
    ],
    ids=str,
)
def test_chunks_that_zarr_takes_for_empty_keep_their_bits(repo, array):
    with repo.transaction("m@main") as group:
        target = group.create_array("a", shape=array.shape, dtype=array.dtype, chunks=(16,))
        target[:] = array
    assert bits({"a": repo.version("m@main")["a"]}) == bits({"a": array})


def test_a_copy_of_a_version_array_by_array_is_the_same_model(repo):
    tensors = {"a/b": noise(0, 50, 3), "": np.float32(1.5), "_x": np.empty((0, 4), np.int8), "é%": np.array([True])}
    version = repo.push(tensors, "m@main")
    with repo.transaction("m@copy") as group:
        for node, array in version.zarr().arrays():
            group.create_array(node, data=array[...], attributes=array.attrs.asdict())
    assert repo.version("m@copy").parameters_id == version.parameters_id
    assert repo.push(version.zarr(), "m@pushed").parameters_id == version.parameters_id


def test_a_plain_directory_goes_out_and_comes_in_as_the_same_model(repo, tmp_path):
    version = repo.push({"w": noise(0, 2000, 700), "b/c": noise(1, 5)}, "m@main")
    files = repo.checkout("m@main", tmp_path / "out", format="zarr")
    assert {"zarr.json", "w/zarr.json", "w/c/0/0", "b%2Fc/c/0"} <= set(files)
    assert repo.push(tmp_path / "out", "m@again").parameters_id == version.parameters_id
    assert repo.checkout("m@main", tmp_path / "out", format="zarr") == files  # what is there already is left alone
    repo.checkout("m@main", tmp_path / "part", format="zarr", include="b*")
    assert not (tmp_path / "part" / "w").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_block_records_nothing(repo, error, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    transaction = repo.transaction("m@main")

    def fail() -> None:
        with transaction as group:
            group.create_array("a", data=np.arange(5))
            raise error

    with pytest.raises(error):
        fail()
    assert repo.models() == []
    with pytest.raises(lamella.InvalidInputError):
        _ = transaction.version
    assert os.listdir(tmp_path) == []


def test_a_branch_that_moves_meanwhile_is_a_conflict(repo):
    repo.push({"a": np.arange(3)}, "m@main")

    def overtaken() -> None:
        with repo.transaction("m@main") as group:
            group.create_array("a", data=np.arange(5))
            repo.push({"a": np.arange(4)}, "m@main")

    with pytest.raises(lamella.ConflictError):
        overtaken()
    assert repo.version("m@main").number == 2


def test_an_array_may_shrink_and_grow_again(repo):
    with repo.transaction("m@main") as group:
        array = group.create_array("a", shape=(10,), chunks=(2,), dtype="float32")
        array[:] = 1
        array.resize((4,))
        array.resize((10,))
    assert repo.version("m@main")["a"][:].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_an_empty_group_is_refused(repo):
    with pytest.raises(lamella.InvalidInputError) as caught, repo.transaction("m@main"):
        pass
    assert caught.value.kind == "empty_source"


def test_a_transaction_is_good_for_one_block_and_its_group_ends_with_it(repo):
    transaction = repo.transaction("m@main")
    with transaction as group:
        group.create_array("a", data=np.arange(5))
    with pytest.raises(lamella.InvalidInputError), transaction:
        pass
    with pytest.raises(Exception, match=r"."):
        group.create_array("b", data=np.arange(5))
    assert list(repo.version("m@main")) == ["a"]


def test_bad_notes_are_refused_before_the_block(repo):
    with pytest.raises(lamella.InvalidInputError):
        repo.transaction("m")
    with pytest.raises(lamella.InvalidInputError):
        repo.transaction("m@main", metrics={"a": "text"})
    with pytest.raises(lamella.NotFoundError):
        repo.transaction("m@main", parent="m@none")


def test_two_transactions_can_be_open_at_a_time(repo):
    with repo.transaction("m@one") as one, repo.transaction("m@two") as two:
        for group, value in ((one, 1), (two, 2)):
            group.create_array("a", data=np.full(5, value))
    assert [repo.version(f"m@{name}")["a"][0] for name in ("one", "two")] == [1, 2]


def test_an_exported_directory_of_bfloat16_opens_in_a_process_that_imports_lamella_zarr(repo, tmp_path):
    array = noise(0, 64, 3).astype(ml_dtypes.bfloat16)
    repo.push({"w": array}, "m@main")
    repo.checkout("m@main", tmp_path / "out", format="zarr")
    code = "import lamella.zarr, zarr, sys; print(zarr.open_group(sys.argv[1], mode='r')['w'][:].tobytes().hex())"
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == array.tobytes().hex()
