"""Directories come back byte for byte, and what cannot be a model is refused."""

import json
import os
import resource
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
from faults import CountingObjects
from hypothesis import given
from hypothesis import strategies as st
from support import bits, names_of, new_repository, noise, open_again, store_of

import lamella
from lamella_engine import pushing
from lamella_engine.checkpoints import directories
from lamella_engine.content_store import locating
from lamella_engine.errors import InvalidInputError, LamellaError, LimitError
from lamella_engine.executor import ThreadExecutor
from lamella_engine.objects.memory import MemoryObjects

TENSORS = {f"layer.{n}.weight": noise(n, 64, 48) for n in range(4)}


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def sharded(tmp_path):
    """A model as people have it: two shards, their index, and other files."""
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    names = sorted(TENSORS)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, held in shards.items():
        safetensors.numpy.save_file({name: TENSORS[name] for name in held}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"hidden": 48}')
    (folder / "tokenizer.model").write_bytes(bytes(range(256)) * 40_000)  # more than a chunk
    (folder / "1_Pooling" / "config.json").write_bytes(b"")
    (folder / ".gitattributes").write_text("*.bin filter=lfs")
    return folder


@pytest.fixture
def repo():
    return new_repository()


def test_a_sharded_directory_comes_back_byte_for_byte_and_is_the_model_of_its_state_dict(repo, sharded, tmp_path):
    version = repo.push(sharded, "m@main")
    assert set(version.files) == set(contents(sharded))
    written = repo.checkout("m@main", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(sharded)
    assert {path: where.read_bytes() for path, where in written.items()} == contents(sharded)
    assert version.parameters_id == repo.push(TENSORS, "m@dict").parameters_id
    assert bits(repo.checkout("m@main")) == bits(TENSORS)
    assert repo.verify(deep=True).ok


def test_a_directory_pushed_twice_stores_nothing_new(repo, sharded):
    first = repo.push(sharded, "m@main")
    assert repo.push(str(sharded), "m@main").id == first.id


def test_threads_write_the_same_directory(sharded, tmp_path):
    objects = MemoryObjects()
    new_repository(objects, ThreadExecutor(threads=3)).push(sharded, "m@main")
    open_again(objects, ThreadExecutor(threads=3)).checkout("m@main", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(sharded)


def test_a_cache_of_symbolic_links_is_the_directory_it_points_to(repo, sharded, tmp_path):
    snapshot = tmp_path / "snapshot"
    for path in sharded.rglob("*"):
        if path.is_file():
            link = snapshot / path.relative_to(sharded)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(path, link.parent))
    (tmp_path / "main").symlink_to(snapshot)
    assert repo.push(tmp_path / "main", "m@links").parameters_id == repo.push(sharded, "m@files").parameters_id
    repo.checkout("m@links", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(sharded)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def pipeline(folder: Path, files: dict[str, dict[str, np.ndarray]]) -> Path:
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, folder / name)
    return folder


def test_models_side_by_side_have_their_directories_in_their_names(repo, tmp_path):
    folder = pipeline(
        tmp_path / "sd",
        {
            "unet/diffusion.safetensors": {"conv.weight": TENSORS["layer.0.weight"]},
            "vae/diffusion.safetensors": {"conv.weight": TENSORS["layer.1.weight"], "only": np.arange(3)},
        },
    )
    (folder / "model_index.json").write_text("{}")
    version = repo.push(folder, "sd@main")
    assert list(version) == ["unet/conv.weight", "vae/conv.weight", "vae/only"]
    assert bits({"": version["vae/conv.weight"]}) == bits({"": TENSORS["layer.1.weight"]})
    repo.checkout("sd@main", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    assert repo.verify(deep=True).ok


@pytest.mark.parametrize(
    "files",
    [
        {"m.safetensors": ["w", "b"], "m.fp16.safetensors": ["w", "b"]},
        {"m.safetensors": ["d/w"], "d/m.safetensors": ["w"]},
        {"d/m.safetensors": ["w", "e/w"], "d/e/m.safetensors": ["w"], "m.safetensors": ["w"]},
    ],
)
def test_one_name_in_two_files_is_told_apart_by_the_path_of_the_file(repo, tmp_path, files):
    tensors = {
        path: {name: noise(n + 7 * m, 3, 4) for m, name in enumerate(names)}
        for n, (path, names) in enumerate(files.items())
    }
    folder = pipeline(tmp_path / "in", tensors)
    version = repo.push(folder, "m@main")
    assert {name: tensor.numpy().tobytes() for name, tensor in version.items()} == {
        f"{path}/{name}": tensor.tobytes() for path, held in tensors.items() for name, tensor in held.items()
    }
    repo.checkout("m@main", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)


@given(data=st.data())
def test_any_tree_of_files_comes_back(tmp_path_factory, data):
    parts = st.sampled_from(["a", "b", "c.json", "d.safetensors", "é", ".hidden"])
    paths = data.draw(st.sets(st.lists(parts, min_size=1, max_size=3).map("/".join), max_size=6))
    folder = tmp_path_factory.mktemp("tree")
    for path in sorted(paths):
        if any(part.startswith(".") for part in path.split("/")[:-1]):
            continue
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path.endswith(".safetensors"):
                (folder / path).write_bytes(safetensors.numpy.save({"w": np.arange(data.draw(st.integers(0, 9)))}))
            else:
                (folder / path).write_bytes(data.draw(st.binary(max_size=9)))
        except OSError:  # another path has a file where this one needs a directory, or the other way round
            continue
    repo = new_repository()
    if not contents(folder):
        with pytest.raises(InvalidInputError):
            repo.push(folder, "m@main")
        return
    repo.push(folder, "m@main")
    repo.checkout("m@main", folder.parent / f"{folder.name}-out")
    assert contents(folder.parent / f"{folder.name}-out") == contents(folder)


def test_a_directory_without_tensors_is_a_version(repo, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.txt").write_text("a\nb\n")
    version = repo.push(folder, "t@main")
    assert len(version) == version.nbytes == 0
    repo.checkout("t@main", tmp_path / "out")
    assert contents(tmp_path / "out") == {"vocab.txt": b"a\nb\n"}
    assert repo.checkout("t@main") == {}


def test_hidden_directories_and_drafts_are_left_out(repo, sharded, tmp_path):
    before = contents(sharded)
    (sharded / ".git" / "objects").mkdir(parents=True)
    (sharded / ".git" / "HEAD").write_text("ref")
    (sharded / ".lamella-00.part").write_text("half")
    (sharded / "empty").mkdir()
    repo.push(sharded, "m@main")
    repo.checkout("m@main", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_selection_is_one_canonical_file_with_its_index(repo, sharded, tmp_path):
    repo.push(sharded, "m@main")
    written = repo.checkout("m@main", tmp_path / "out", include="layer.[12].*")
    assert set(written) == {"model.safetensors", "model.safetensors.index.json"}
    wanted = {name: TENSORS[name] for name in ("layer.1.weight", "layer.2.weight")}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == safetensors.numpy.save(wanted)
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 2 * 64 * 48 * 4},
        "weight_map": dict.fromkeys(wanted, "model.safetensors"),
    }


def test_files_pushed_with_tensors_stand_beside_the_canonical_file(repo, tmp_path):
    version = repo.push(TENSORS, "m@main", files={"config.json": b"{}", "sub/x": b"x" * 9_000_000})
    assert version.files == ("config.json", "sub/x")
    repo.checkout("m@main", tmp_path / "out")
    assert contents(tmp_path / "out") == {
        "config.json": b"{}", "sub/x": b"x" * 9_000_000, "model.safetensors": safetensors.numpy.save(TENSORS)
    }  # fmt: skip
    assert version.file("config.json") == b"{}"
    assert version.file("sub/x", start=4_194_300, stop=4_194_310) == b"x" * 10
    assert repo.verify(deep=True).ok


@pytest.mark.parametrize(
    "files", [{"../x": b""}, {"a": b"", "a/b": b""}, {"model.safetensors": b""}, {"a": "text"}, {3: b""}]
)
def test_files_that_no_checkout_could_write_are_refused(repo, files):
    with pytest.raises(InvalidInputError):
        repo.push(TENSORS, "m@main", files=files)
    assert repo.models() == []


@given(bounds=st.tuples(st.integers(0, 60_000), st.integers(0, 60_000)))
def test_any_bytes_of_a_file_can_be_read_alone(bounds):
    repo = new_repository()
    version = repo.push(TENSORS, "m@main")
    whole = safetensors.numpy.save(TENSORS)
    start, stop = bounds
    assert version.file("model.safetensors", start=start, stop=stop) == whole[start:stop]


def test_reading_the_middle_of_a_file_reads_its_chunks_only(tmp_path):
    objects = CountingObjects(MemoryObjects())
    repo = new_repository(objects)
    tensors = {name: noise(n, 1 << 20) for n, name in enumerate("abcd")}
    repo.push(tensors, "m@main")
    again = open_again(objects)
    version = again.version("m@main")
    version.file("model.safetensors", stop=8)
    objects.reset()
    head = int.from_bytes(version.file("model.safetensors", stop=8), "little") + 8
    got = version.file("model.safetensors", start=head + (1 << 22), stop=head + (1 << 22) + 4096)
    assert got == tensors["b"].tobytes()[:4096]
    assert objects.read_nbytes < 5 << 20


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_long_reads_of_a_file_are_right_while_other_threads_decode(threads, tmp_path):
    data = np.random.default_rng(0).bytes(70 << 20)
    tensors = {"w": np.frombuffer(data, np.float32)}
    objects = MemoryObjects()
    new_repository(objects, ThreadExecutor(threads=threads)).push(tensors, "m@main", files={"opaque.bin": data})
    version = open_again(objects, ThreadExecutor(threads=threads)).version("m@main")
    assert version.file("opaque.bin") == data
    assert version.file("opaque.bin", start=1_000_001, stop=41_000_003) == data[1_000_001:41_000_003]
    assert version.file("model.safetensors") == safetensors.numpy.save(tensors)


def test_a_link_inside_of_out_is_not_written_through(repo, sharded, tmp_path):
    repo.push(sharded, "m@main")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(lamella.AlreadyExistsError):
        repo.checkout("m@main", tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "elsewhere") == {}
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    repo.checkout("m@main", tmp_path / "link")  # the directory that was named may be one
    assert contents(tmp_path / "elsewhere") == contents(sharded)


def test_more_shards_than_files_can_be_open_is_said_as_it_is(repo, tmp_path):
    for n in range(30):
        safetensors.numpy.save_file({f"{n}": np.arange(3)}, tmp_path / f"{n}.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, limits[1]))
    try:
        with pytest.raises(lamella.StorageError, match="Too many open files"):
            repo.push(tmp_path, "m@main")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    repo.push(tmp_path, "m@main")


def described(change):
    """Return a repository with a version whose attachments were ``change``d as its description was written."""
    objects = MemoryObjects()
    repo = new_repository(objects)
    real = pushing.Description

    def description(**fields):
        return real(**{**fields, "attachments": change(fields["attachments"])})

    # A writer would refuse most of it; what is to be seen is whether readers do.
    unchecked = patch.object(locating, "as_long_as", lambda nbytes, blob: blob)
    with patch.object(pushing, "Description", description), unchecked:
        repo.push(TENSORS, "m@main", files={"a": noise(9, 3_000_000).tobytes()})
    return open_again(objects)


def test_a_version_that_lists_a_chunk_as_longer_than_it_is_is_not_recorded():
    repo = new_repository()
    real = pushing.Description

    def description(**fields):
        (item,) = fields["attachments"]
        ((chunk, nbytes),) = item.chunks
        return real(**{**fields, "attachments": (replace(item, chunks=((chunk, nbytes + 1),)),)})

    with patch.object(pushing, "Description", description), pytest.raises(InvalidInputError) as caught:
        repo.push(TENSORS, "m@main", files={"a": b"short"})
    assert caught.value.kind == "wrong_description"
    assert repo.models() == []


@pytest.mark.parametrize("by", [3, -3])
def test_attachments_of_other_lengths_than_are_listed_are_damage(by, tmp_path):
    def shifted(attachments):
        (item,) = attachments
        (first, one), (second, two), *rest = item.chunks
        return (replace(item, chunks=((first, one - by), (second, two + by), *rest)),)

    repo = described(shifted)
    assert {problem.kind for problem in repo.verify().problems} == {"bad_length"}
    with pytest.raises(lamella.CorruptionError):
        repo.version("m@main").file("a")
    with pytest.raises(lamella.CorruptionError):
        repo.checkout("m@main", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_header_longer_than_any_is_not_read():
    def endless(attachments):
        (item,) = attachments
        return (replace(item, path="b.safetensors", role="safetensors_header", chunks=item.chunks[:1] * 30),)

    repo = described(endless)
    with pytest.raises(lamella.CorruptionError, match="longer than any"):
        _ = repo.version("m@main").file_sizes
    assert {problem.kind for problem in repo.verify().problems} == {"bad_attachment"}


def test_a_checkout_does_not_write_among_the_objects_of_a_repository(sharded, tmp_path):
    with lamella.init(tmp_path / "weights") as repo:
        repo.push(sharded, "m@main")
        before = contents(tmp_path / "weights")
        for place in ("", "log", "packs/deeper", "index"):
            for options in ({}, {"overwrite": True}, {"include": "*"}, {"format": "zarr"}):
                with pytest.raises(InvalidInputError) as caught:
                    repo.checkout("m@main", tmp_path / "weights" / place, **options)
                assert caught.value.kind == "nested_repository"
        with pytest.raises(InvalidInputError):
            repo.checkout("m@main", "")
        assert contents(tmp_path / "weights") == before
        repo.checkout("m@main", tmp_path / "weights" / "out")
        assert contents(tmp_path / "weights" / "out") == contents(sharded)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_push_that_fails_takes_its_packs_with_it(repo, error):
    def fail(progress):
        if progress.done_nbytes > progress.total_nbytes * 0.9:
            raise error

    tensors = {name: noise(n, 5_000_000) for n, name in enumerate("abcdefgh")}  # more than a pack
    with pytest.raises(error):
        repo.push(tensors, "m@main", progress=fail)
    assert names_of(store_of(repo).objects).keys() == {"log/" + "0" * 20}
    repo.push(tensors, "m@main")
    assert repo.stats().packs > 1
    assert repo.verify(deep=True).ok


def test_a_push_that_meets_a_conflict_takes_its_packs_with_it(repo):
    repo.push(TENSORS, "m@main")

    def overtake(progress):
        if progress.done_nbytes == progress.total_nbytes and repo.version("m@main").number == 1:
            repo.push({"w": noise(5, 100)}, "m@main")

    with pytest.raises(lamella.ConflictError):
        repo.push({"w": noise(6, 100)}, "m@main", progress=overtake)
    assert len(list(store_of(repo).objects.list("packs/"))) == repo.stats().packs == 2


def refused(repo, folder: Path) -> str:
    with pytest.raises(LamellaError) as caught:
        repo.push(folder, "m@main")
    assert repo.models() == []
    return caught.value.kind


def test_a_missing_shard_is_named(repo, sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert refused(repo, sharded) == "missing_shard"


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "[" * 100_000, '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_just_a_file(repo, sharded, text):
    (sharded / "x.safetensors.index.json").write_text(text)
    assert "x.safetensors.index.json" in repo.push(sharded, "m@main").files


def test_damaged_shards_and_pointers_are_refused(repo, sharded):
    shard = sharded / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    for data, kind in [
        (whole[:-1], "truncated"),
        (whole + b"x", "trailing_bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "not_safetensors"),
        (b"", "truncated"),
    ]:
        shard.write_bytes(data)
        assert refused(repo, sharded) == kind


def test_links_to_directories_loops_pipes_and_dangling_links_are_refused(repo, sharded):
    for name, make in {
        "loop": lambda path: path.symlink_to("."),
        "folder": lambda path: path.symlink_to("1_Pooling"),
        "dangling": lambda path: path.symlink_to("nowhere"),
        "self": lambda path: path.symlink_to("self"),
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
    }.items():
        make(sharded / name)
        assert refused(repo, sharded) == "not_a_file", name
        (sharded / name).unlink()


def test_names_that_no_checkout_could_create_are_refused(repo, sharded):
    for name in (b"a\nb", b"\xff", b"a\\b", b"\x1b[2J"):
        path = os.path.join(os.fsencode(sharded), name)
        Path(os.fsdecode(path)).write_bytes(b"")
        assert refused(repo, sharded) == "bad_path"
        os.unlink(path)


def test_a_repository_inside_is_refused(sharded, tmp_path):
    with lamella.init(sharded / "weights") as repo:
        assert refused(repo, sharded) == "nested_repository"
        assert refused(repo, sharded / "weights") == "nested_repository"


def test_an_empty_directory_holds_nothing_to_push(repo, tmp_path):
    assert refused(repo, tmp_path) == "empty_source"


def test_too_many_files_and_too_deep_directories_are_refused(repo, tmp_path, monkeypatch):
    deep = tmp_path / "/".join("d" * (directories.MAX_DEPTH + 1))
    deep.mkdir(parents=True)
    assert refused(repo, tmp_path) == "too_deep"
    monkeypatch.setattr(directories, "MAX_FILES", 2)
    for n in range(3):
        (tmp_path / f"{n}").write_text("")
    (tmp_path / "d").rename(tmp_path / ".d")
    with pytest.raises(LimitError):
        repo.push(tmp_path, "m@main")


@pytest.mark.parametrize("name", ["tokenizer.model", "model-00001-of-00002.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["append", "replace", "remove"])
def test_a_file_that_changes_while_it_is_read_fails_the_push(repo, sharded, name, how, monkeypatch):
    path = sharded / name
    data = path.read_bytes()

    def change(progress):
        if how == "remove":
            path.unlink(missing_ok=True)
        elif how == "append":
            path.write_bytes(data + b"x")
        else:
            (sharded / "new").write_bytes(data)
            (sharded / "new").replace(path)

    changed = iter([change])
    with pytest.raises(InvalidInputError) as caught:
        repo.push(sharded, "m@main", progress=lambda progress: next(changed, lambda _: None)(progress))
    assert caught.value.kind == "source_changed"
    assert repo.models() == []


def test_progress_ends_with_everything(repo, sharded, tmp_path):
    seen = []
    repo.push(sharded, "m@main", progress=seen.append)
    total = 4 * 64 * 48 * 4 + sum(
        len(data) for path, data in contents(sharded).items() if not path.endswith(".safetensors")
    )
    headers = seen[-1].total_nbytes - total
    assert 0 < headers < 2000
    assert seen[-1].done_nbytes == seen[-1].total_nbytes
    assert 0 < seen[-1].stored_nbytes < seen[-1].total_nbytes
    assert [one.done_nbytes for one in seen] == sorted(one.done_nbytes for one in seen)
    seen.clear()
    repo.checkout("m@main", tmp_path / "out", progress=seen.append)
    assert seen[-1].done_nbytes == seen[-1].total_nbytes == total
    assert 0 < seen[-1].stored_nbytes < total


def test_a_checkout_that_meets_damage_leaves_nothing(sharded, tmp_path):
    objects = MemoryObjects()
    new_repository(objects).push(sharded, "m@main")
    (pack,) = objects.list("packs/")
    data = bytearray(objects.get(pack.name))
    data[20_000] ^= 1
    objects.delete(pack.name)
    objects.put_if_absent(pack.name, [bytes(data)])
    with pytest.raises(lamella.CorruptionError):
        open_again(objects).checkout("m@main", tmp_path / "out")
    assert not (tmp_path / "out").exists()
