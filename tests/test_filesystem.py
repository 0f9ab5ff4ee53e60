"""lamella:// is a read-only file system of versions."""

import errno
import io
import json
import subprocess
import sys

import fsspec
import numpy as np
import pandas
import pytest
import safetensors.numpy
import torch
import torch.distributed.checkpoint as dcp
from fsspec.core import url_to_fs
from support import noise
from torch.distributed.checkpoint.api import CheckpointException

import lamella
from lamella.filesystem import LamellaFileSystem

TENSORS = {"w": noise(0, 2000, 30), "b": noise(1, 30)}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A repository below the working directory, with a directory that was pushed and tensors from memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAMELLA_REPO", raising=False)
    LamellaFileSystem.clear_instance_cache()
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden": 30}')
    (folder / "sub" / "scores.csv").write_text("step,loss\n1,0.5\n2,0.25\n")
    safetensors.numpy.save_file(TENSORS, folder / "model.safetensors")
    with lamella.init("weights") as repo:
        repo.push(folder, "org/bert@main")
        repo.push(TENSORS, "plain@main")
        repo.tag("plain@v-first", "plain@v1")
        yield repo


def test_fsspec_finds_it_by_its_entry_point(weights):
    code = "import fsspec; print(fsspec.open('lamella://weights/plain@main/model.safetensors').fs.protocol)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "lamella"


def test_lamella_does_not_import_fsspec(weights):
    code = "import lamella, sys; print('fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("url", "options", "variable"),
    [
        ("lamella://weights/{}", {}, None),
        ("lamella://{}", {"repo": "weights"}, None),
        ("lamella://{}", {}, "weights"),
        ("lamella://{here}/weights/{}", {}, "elsewhere"),
    ],
)
def test_a_repository_is_named_in_the_url_by_an_option_or_by_the_environment(
    weights, tmp_path, monkeypatch, url, options, variable
):
    if variable is not None:
        monkeypatch.setenv("LAMELLA_REPO", variable)
    url = url.format("org%2Fbert@main/config.json", here=tmp_path)
    with fsspec.open(url, **options) as file:
        assert json.load(file) == {"hidden": 30}


def test_a_version_is_a_directory(weights, tmp_path):
    fs, root = url_to_fs("lamella://weights/org%2Fbert@v1")
    assert sorted(fs.find(root)) == [
        f"{root}/{path}" for path in ("config.json", "model.safetensors", "sub/scores.csv")
    ]
    assert [(entry["name"], entry["type"]) for entry in fs.ls(root)] == [
        (f"{root}/config.json", "file"), (f"{root}/model.safetensors", "file"), (f"{root}/sub", "directory"),
    ]  # fmt: skip
    assert fs.info(f"{root}/config.json")["size"] == 14
    assert fs.isdir(f"{root}/sub")
    assert not fs.exists(f"{root}/none")
    fs.get(root, str(tmp_path / "got"), recursive=True)
    assert (tmp_path / "got" / "sub" / "scores.csv").read_bytes() == b"step,loss\n1,0.5\n2,0.25\n"
    assert (tmp_path / "got" / "model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()


def test_a_repository_lists_its_refs(weights):
    fs, _ = url_to_fs("lamella://weights")
    assert fs.ls("weights", detail=False) == [
        "weights/org%2Fbert@main", "weights/plain@main", "weights/plain@v-first"
    ]  # fmt: skip
    fs = LamellaFileSystem(repo="weights")
    assert fs.ls("", detail=False) == ["org%2Fbert@main", "plain@main", "plain@v-first"]


def test_tensors_from_memory_are_a_safetensors_file(weights):
    fs = LamellaFileSystem(repo="weights")
    data = fs.cat_file("plain@main/model.safetensors")
    assert data == safetensors.numpy.save(TENSORS)
    assert fs.cat_file("plain@main/model.safetensors", 3, -5) == data[3:-5]
    assert fs.cat_ranges(["plain@main/model.safetensors"] * 2, [0, 100], [8, 300]) == [data[:8], data[100:300]]
    with fs.open("plain@main/model.safetensors") as file:
        file.seek(-100, io.SEEK_END)
        assert file.read() == data[-100:]
        file.seek(0)
        assert file.read() == data


def test_pandas_reads_a_table_inside_a_version(weights):
    table = pandas.read_csv("lamella://org%2Fbert@main/sub/scores.csv", storage_options={"repo": "weights"})
    assert list(table["loss"]) == [0.5, 0.25]


def test_an_open_file_stays_at_its_version(weights):
    fs = LamellaFileSystem(repo="weights")
    before = fs.ukey("plain@main/model.safetensors")
    with fs.open("plain@main/model.safetensors", block_size=64) as file:
        head = file.read(10)
        weights.push({"w": np.zeros(5)}, "plain@main")
        assert head + file.read() == safetensors.numpy.save(TENSORS)
    assert fs.ukey("plain@main/model.safetensors") != before


@pytest.mark.parametrize(
    "path",
    ["none@main/x", "plain@none/x", "plain@main/none", "plain@v9/x", "plain@/x", "plain@main~7/x"],
)
def test_what_is_not_there_is_a_missing_file(weights, path):
    fs = LamellaFileSystem(repo="weights")
    with pytest.raises(FileNotFoundError):
        fs.cat_file(path)
    with pytest.raises(FileNotFoundError):
        fs.open(path)
    assert not fs.exists(path)


def test_a_missing_repository_is_a_missing_file(weights):
    with pytest.raises(FileNotFoundError):
        LamellaFileSystem(repo="nowhere").ls("")


def test_a_directory_is_no_file_and_a_repository_is_named_once(weights):
    fs = LamellaFileSystem(repo="weights")
    with pytest.raises(IsADirectoryError):
        fs.cat_file("plain@main")
    with pytest.raises(ValueError, match="twice"):
        fs.ls("weights/plain@main")


@pytest.mark.parametrize(
    "write",
    [
        lambda fs, path: fs.open(path, "wb"),
        lambda fs, path: fs.open(path, "ab"),
        lambda fs, path: fs.pipe_file(path, b"x"),
        lambda fs, path: fs.rm(path),
        lambda fs, path: fs.touch(path),
        lambda fs, path: fs.makedirs("plain@main", exist_ok=True),
        lambda fs, path: fs.mkdir("plain@main/d"),
        lambda fs, path: fs.rmdir("plain@main"),
        lambda fs, path: fs.cp_file(path, "plain@main/y"),
        lambda fs, path: fs.mv(path, "plain@main/y"),
    ],
)
def test_nothing_can_be_written(weights, write):
    fs = LamellaFileSystem(repo="weights")
    with pytest.raises(OSError, match="read-only") as caught:
        write(fs, "plain@main/model.safetensors")
    assert caught.value.errno == errno.EROFS


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_not_silently_written_through_it(weights):
    versions = weights.stats().versions
    with pytest.raises(CheckpointException, match="lamella:// is read-only"):
        dcp.save({"w": torch.zeros(3)}, checkpoint_id="lamella://weights/plain@main/step-1", no_dist=True)
    assert weights.stats().versions == versions


def test_a_repository_that_is_made_anew_is_opened_anew(weights, tmp_path):
    fs = LamellaFileSystem()
    assert fs.cat_file("weights/org%2Fbert@main/config.json") == b'{"hidden": 30}'
    (tmp_path / "weights").rename(tmp_path / "before")
    with lamella.init("weights") as other:
        other.push({"w": np.zeros(3)}, "org/bert@main", files={"config.json": b"{}"})
    assert fs.cat_file("weights/org%2Fbert@main/config.json") == b"{}"


def test_repositories_and_revisions_are_directories(weights):
    fs = LamellaFileSystem()
    for path in ("weights", "weights/plain@main"):
        assert fs.isdir(path)
        assert fs.info(path) == {"name": path, "size": 0, "type": "directory"}
    assert not fs.exists("weights/plain@none")
    assert not fs.exists("nowhere")


def test_a_relative_repository_is_meant_from_the_directory_of_the_moment(weights, tmp_path, monkeypatch):
    fs = LamellaFileSystem()
    assert fs.cat_file("weights/org%2Fbert@main/config.json") == b'{"hidden": 30}'
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with lamella.init("weights") as other:
        other.push({"w": np.zeros(3)}, "org/bert@main", files={"config.json": b"{}"})
    assert fs.cat_file("weights/org%2Fbert@main/config.json") == b"{}"
