"""The tools that ``peers`` compares, each used as its own documentation says; run by whichever Python has the tool.

    python -m benchmarks.contenders JOB     one tool, once; JOB is the path of a Job in JSON, the answer goes beside it

Only the standard library is imported before a tool is asked for.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, ClassVar, Literal

ANSWER = "answer.json"
"""What a run leaves beside its job: an Answer, unless it failed."""

_CHECKPOINT = "model.safetensors"
"""Where a training run of the tools that version a working directory keeps its one file."""


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint of the family that is stored."""

    name: str
    parent: str | None
    """Name of the checkpoint that it was trained from, an earlier one."""
    branch: str
    path: str


@dataclass(frozen=True, slots=True)
class Job:
    """What a run does: store all sources into ``place``, or write all of them into the folder ``out``."""

    contender: str
    place: str
    sources: Sequence[Source]
    precision: Literal["float32", "bfloat16"]
    out: str | None
    """None to store."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run took."""

    seconds: float
    """Until every byte is synced; imports are left out, processes that the tool starts are not."""
    version: str


class Contender:
    """Keeps checkpoints in a folder of its own."""

    version: ClassVar[str]
    """A command that prints the tool's version, or the name of its Python package."""
    layer_alone: ClassVar[str] = "no"
    """Whether one layer of a stored version can be read without reading or decoding the whole."""

    def __init__(self, place: Path, job: Job) -> None:
        self.place = place
        self.precision = job.precision

    def begin(self) -> None:
        """Import what is needed, and make or find the store. Not timed."""

    def prepare(self, source: Source) -> None:
        """Put a checkpoint where the tool expects it to have been saved. Not timed."""

    def store(self, source: Source) -> None:
        """Store the next checkpoint."""
        raise NotImplementedError

    def load(self, source: Source, out: Path) -> None:
        """Write a checkpoint to the path ``out``; those before it in the family lie beside it."""
        raise NotImplementedError

    def end(self) -> None:
        """Take away what is not stored but the caller's. Not timed."""


class Copy(Contender):
    """``cp``: what tools that keep whole files do at least."""

    version = "cp --version"
    layer_alone = "yes"

    def store(self, source: Source) -> None:
        shutil.copyfile(source.path, self.place / source.name)

    def load(self, source: Source, out: Path) -> None:
        shutil.copyfile(self.place / source.name, out)


class Zstd(Contender):
    """``zstd -3`` on all cores, each file by itself."""

    version = "zstd --version"

    def store(self, source: Source) -> None:
        _run("zstd", "-q", "-3", "-T0", source.path, "-o", self.place / source.name)

    def load(self, source: Source, out: Path) -> None:
        _run("zstd", "-q", "-d", self.place / source.name, "-o", out)


class ZstdPatch(Contender):
    """``zstd -3 --patch-from`` the parent: the parent's file is a dictionary."""

    version = "zstd --version"

    def begin(self) -> None:
        self._paths: dict[str, str] = {}

    def store(self, source: Source) -> None:
        self._paths[source.name] = source.path
        _run("zstd", "-q", "-3", "-T0", *self._from(source), source.path, "-o", self.place / source.name)

    def load(self, source: Source, out: Path) -> None:
        self._paths[source.name] = str(out)
        _run("zstd", "-q", "-d", *self._from(source), self.place / source.name, "-o", out)

    def _from(self, source: Source) -> list[str]:
        return [] if source.parent is None else ["--long=31", f"--patch-from={self._paths[source.parent]}"]


class Dvc(Contender):
    """``dvc add`` in a Git repository; a commit and a tag for each version."""

    version = "dvc --version"
    layer_alone = "yes"

    def begin(self) -> None:
        self._work = self.place / "work"
        if not self._work.exists():
            _git_repository(self._work)
            _run("dvc", "init", "-q", at=self._work)

    def prepare(self, source: Source) -> None:
        shutil.copyfile(source.path, self._work / _CHECKPOINT)

    def store(self, source: Source) -> None:
        _run("dvc", "add", "-q", _CHECKPOINT, at=self._work)
        _git_commit(self._work, source.name)

    def load(self, source: Source, out: Path) -> None:
        _run("git", "checkout", "-q", source.name, at=self._work)
        _run("dvc", "checkout", "-q", at=self._work)
        (self._work / _CHECKPOINT).rename(out)

    def end(self) -> None:
        (self._work / _CHECKPOINT).unlink(missing_ok=True)


class GitTheta(Contender):
    """``git add`` through git-theta's filter; a commit and a tag for each version."""

    version = "git-theta"

    def begin(self) -> None:
        os.environ["GIT_THETA_CHECKPOINT_TYPE"] = "safetensors"
        self._work = self.place / "work"
        if not self._work.exists():
            _git_repository(self._work)
            for command in (("lfs", "install"), ("theta", "install"), ("theta", "track", _CHECKPOINT)):
                _run("git", *command, at=self._work)

    def prepare(self, source: Source) -> None:
        shutil.copyfile(source.path, self._work / _CHECKPOINT)

    def store(self, source: Source) -> None:
        _git_commit(self._work, source.name)

    def load(self, source: Source, out: Path) -> None:
        _run("git", "checkout", "-q", "-f", source.name, at=self._work)
        (self._work / _CHECKPOINT).rename(out)

    def end(self) -> None:
        (self._work / _CHECKPOINT).unlink(missing_ok=True)


class Borg(Contender):
    """``borg create --compression zstd,3``, an archive for each version, not encrypted."""

    version = "borg --version"
    layer_alone = "by mount"

    def begin(self) -> None:
        self._repository = self.place / "repository"
        if not self._repository.exists():
            _run("borg", "init", "-e", "none", self._repository)

    def store(self, source: Source) -> None:
        path = Path(source.path)
        _run(
            "borg", "create", "--compression", "zstd,3", f"{self._repository}::{source.name}", path.name, at=path.parent
        )

    def load(self, source: Source, out: Path) -> None:
        _run("borg", "extract", f"{self._repository}::{source.name}", at=out.parent)
        (out.parent / Path(source.path).name).rename(out)


class Restic(Contender):
    """``restic backup``, a snapshot for each version; its repository format 2 compresses."""

    version = "restic version"
    layer_alone = "by mount"

    def begin(self) -> None:
        repository = self.place / "repository"
        os.environ |= {"RESTIC_REPOSITORY": str(repository), "RESTIC_PASSWORD": "benchmark"}
        if not repository.exists():
            _run("restic", "-q", "init", "--repository-version", "2")

    def store(self, source: Source) -> None:
        path = Path(source.path)
        _run("restic", "-q", "backup", "--tag", source.name, path.name, at=path.parent)

    def load(self, source: Source, out: Path) -> None:
        _run("restic", "-q", "restore", "latest", "--tag", source.name, "--target", out.parent)
        (out.parent / Path(source.path).name).rename(out)


class Xet(Contender):
    """Hugging Face's own chunking, deduplication and compression, its store in a folder instead of behind a server."""

    version = "hf-xet"
    layer_alone = "by byte range"

    def begin(self) -> None:
        self._xet = import_module("hf_xet")
        self._endpoint = f"local://{self.place / 'store'}"

    def store(self, source: Source) -> None:
        (info,) = self._xet.upload_files([source.path], self._endpoint, None, None, None, None)
        # What a pointer file holds.
        (self.place / source.name).write_text(json.dumps([info.hash, info.file_size]), encoding="utf-8")

    def load(self, source: Source, out: Path) -> None:
        hash, nbytes = json.loads((self.place / source.name).read_text(encoding="utf-8"))
        wanted = self._xet.PyXetDownloadInfo(str(out), hash, nbytes)
        self._xet.download_files([wanted], self._endpoint, None, None, None)


class ZipNN(Contender):
    """ZipNN on the bytes of each file, told their dtype, with a thread for each core."""

    version = "zipnn"

    def begin(self) -> None:
        self._codec = import_module("zipnn").ZipNN(bytearray_dtype=self.precision, threads=os.cpu_count())

    def store(self, source: Source) -> None:
        (self.place / source.name).write_bytes(self._codec.compress(Path(source.path).read_bytes()))

    def load(self, source: Source, out: Path) -> None:
        out.write_bytes(self._codec.decompress((self.place / source.name).read_bytes()))


class Z4ai(Contender):
    """z4ai: the first file by itself, each other as a delta against its parent, tensor by tensor."""

    version = "z4ai"

    def begin(self) -> None:
        self._delta, self._full = import_module("z4ai.model_delta"), import_module("z4ai.safetensors")
        self._paths: dict[str, str] = {}

    def store(self, source: Source) -> None:
        self._paths[source.name] = source.path
        stored = str(self.place / source.name)
        if source.parent is None:
            self._full.compress_file(source.path, stored)
        else:
            self._delta.compress_file(source.path, self._paths[source.parent], stored)

    def load(self, source: Source, out: Path) -> None:
        self._paths[source.name] = str(out)
        stored = str(self.place / source.name)
        if source.parent is None:
            self._full.decompress_file(stored, str(out))
        else:
            self._delta.decompress_file(stored, self._paths[source.parent], str(out))


class BigSmall(Contender):
    """BigSmall: the first file by itself, each other as a delta against its parent."""

    version = "bigsmall"

    def begin(self) -> None:
        self._tool = import_module("bigsmall")
        self._paths: dict[str, Path] = {}

    def store(self, source: Source) -> None:
        path = self._paths[source.name] = Path(source.path)
        stored = self.place / f"{source.name}.bs"
        if source.parent is None:
            self._tool.compress(path, stored, progress=False)
        else:
            self._tool.compress_delta(path, self._paths[source.parent], stored, progress=False)

    def load(self, source: Source, out: Path) -> None:
        self._paths[source.name] = out
        stored = self.place / f"{source.name}.bs"
        if source.parent is None:
            self._tool.decompress(stored, out, progress=False)
        else:
            self._tool.decompress_delta(stored, self._paths[source.parent], out, progress=False)


class Glyd(Contender):
    """Glyd's store, which finds the base of each object itself."""

    version = "glyd"

    def begin(self) -> None:
        self._store = import_module("glyd").Store(str(self.place / "store"))

    def store(self, source: Source) -> None:
        self._store.put(source.name, Path(source.path).read_bytes())
        self._store.flush()

    def load(self, source: Source, out: Path) -> None:
        out.write_bytes(self._store.get(self._store.id_of(source.name)))

    def end(self) -> None:
        self._store.close()


class Icechunk(Contender):
    """Icechunk: every tensor a Zarr array as ``create_array`` makes it, a commit and a tag for each version.

    Zarr has no bfloat16 of its own, so such a tensor is kept as the uint16 of its bits.
    """

    version = "icechunk"
    layer_alone = "yes"

    def begin(self) -> None:
        icechunk = import_module("icechunk")
        self._zarr, self._torch = import_module("zarr"), import_module("torch")
        self._files = import_module("safetensors.torch")
        place = self.place / "repository"
        storage = icechunk.local_filesystem_storage(str(place))
        repository = icechunk.Repository
        self._repository = repository.open(storage) if place.exists() else repository.create(storage)

    def store(self, source: Source) -> None:
        session = self._repository.writable_session("main")
        group = self._zarr.open_group(session.store, mode="a")
        for name, tensor in self._files.load_file(source.path).items():
            halved = tensor.dtype == self._torch.bfloat16
            array = (tensor.view(self._torch.uint16) if halved else tensor).numpy()
            group.create_array(name, data=array, overwrite=True)
        self._repository.create_tag(source.name, snapshot_id=session.commit(source.name))

    def load(self, source: Source, out: Path) -> None:
        session = self._repository.readonly_session(tag=source.name)
        group = self._zarr.open_group(session.store, mode="r")
        tensors = {name: self._torch.from_numpy(array[...]) for name, array in group.arrays()}
        if self.precision == "bfloat16":
            unsigned = self._torch.uint16
            tensors = {
                name: tensor.view(self._torch.bfloat16) if tensor.dtype == unsigned else tensor
                for name, tensor in tensors.items()
            }
        self._files.save_file(tensors, out, metadata={"format": "pt"})


class Lamella(Contender):
    """Push of each file, and checkout as files."""

    version = "lamella"
    layer_alone = "yes"

    def __init__(self, place: Path, job: Job) -> None:
        super().__init__(place, job)
        self._revisions = {source.name: f"minilm@v{number}" for number, source in enumerate(job.sources, 1)}

    def begin(self) -> None:
        import lamella

        path = self.place / "repository"
        self._repository = lamella.open(str(path)) if path.exists() else lamella.init(str(path))

    def store(self, source: Source) -> None:
        parent = None if source.parent is None else self._revisions[source.parent]
        self._repository.push(source.path, f"minilm@{source.branch}", parent=parent)

    def load(self, source: Source, out: Path) -> None:
        files = self._repository.checkout(self._revisions[source.name], out=out.parent)
        files[Path(source.path).name].rename(out)


CONTENDERS: Mapping[str, type[Contender]] = {
    "cp": Copy,
    "zstd -3": Zstd,
    "zstd --patch-from": ZstdPatch,
    "DVC": Dvc,
    "git-theta": GitTheta,
    "borg": Borg,
    "restic": Restic,
    "Xet": Xet,
    "Icechunk": Icechunk,
    "ZipNN": ZipNN,
    "z4ai": Z4ai,
    "BigSmall": BigSmall,
    "Glyd": Glyd,
    "lamella": Lamella,
}


def work(job: Job) -> Answer:
    """Do a job. Raises FileNotFoundError or ImportError if the tool is not there, else whatever it fails with."""
    kind = CONTENDERS[job.contender]
    version = _version(kind.version)
    contender = kind(Path(job.place), job)
    contender.begin()
    seconds = 0.0
    for source in job.sources:
        if job.out is None:
            contender.prepare(source)
            Path(source.path).read_bytes()  # into the page cache
        os.sync()  # so that nobody waits for what was to be written before
        start = time.perf_counter()
        if job.out is None:
            contender.store(source)
            _sync(Path(job.place))
        else:
            contender.load(source, out := Path(job.out, source.name))
            _sync(out)
        seconds += time.perf_counter() - start
    contender.end()
    return Answer(seconds, version)


def _version(of: str) -> str:
    command = of.split()
    if len(command) == 1:
        return package_version(of)
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition("\n")[0]
    return next((word.strip("v,") for word in line.split() if word.strip("v,")[:1].isdigit()), line)


def _sync(path: Path) -> None:
    """Sync a file, or every file below a folder: what the tool has synced by itself costs nothing again."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _run(*command: str | Path, at: Path | None = None) -> None:
    done = subprocess.run(command, cwd=at, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")


def _git_repository(place: Path) -> None:
    place.mkdir()
    _run("git", "init", "-q", at=place)
    _run("git", "config", "user.name", "benchmark", at=place)
    _run("git", "config", "user.email", "benchmark@localhost", at=place)


def _git_commit(place: Path, tag: str) -> None:
    _run("git", "add", "-A", at=place)
    _run("git", "commit", "-q", "--allow-empty", "-m", tag, at=place)
    _run("git", "tag", tag, at=place)


def main() -> None:
    """Do the job whose path is the only argument."""
    path = Path(sys.argv[1])
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    job = Job(**{**fields, "sources": [Source(**source) for source in fields["sources"]]})
    answer = work(job)
    path.with_name(ANSWER).write_text(json.dumps(asdict(answer)), encoding="utf-8")


if __name__ == "__main__":
    main()
