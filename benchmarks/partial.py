"""A part of one checkpoint out of a repository, beside safetensors' ``safe_open`` on the file that was pushed.

    python -m benchmarks.partial [--rounds N] [--folder DIR]

One encoder layer, one tensor, and 128 rows of the embedding; out of the first version (nothing is a delta), its child,
and its child's grandchild. Both give torch tensors in memory of the caller's own: a mapped file moves no bytes. Shown
are multiples of safetensors, of medians over rounds in which the two take turns, each in a fresh process:

``cold``   the files are not in the page cache; the first read of the process, opening included
``again``  the same in the same process, so the files are in the page cache
``kept``   with the repository, or the file, kept open
"""

import argparse
import ctypes
import hashlib
import mmap
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

import lamella
from benchmarks import corpora
from benchmarks.corpora import Checkpoint, Precision

ROUNDS = 5
"""Odd; a read takes milliseconds, and a disturbed one several times as long."""

REPEATS = 15
"""Reads of which ``again`` and ``kept`` are the median, in each round."""

VERSIONS = ("base", "main-1", "main-3")
"""What is read: with no delta, one and three to decode before each cell."""

ROWS = 128
"""Of the embedding, from its middle: what a batch of a few sentences touches, were they neighbours."""

_WIDTH = 130  # also where the output is no terminal

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """What is read of a checkpoint."""

    title: str
    tensors: str
    """What the names begin with."""
    rows: bool = False
    """Only ``ROWS`` rows, from the middle."""


PARTS = (
    Part("one layer", "encoder.layer.1."),
    Part("one tensor", "encoder.layer.1.intermediate.dense.weight"),
    Part(f"{ROWS} rows", "embeddings.word_embeddings.weight", rows=True),
)


@dataclass(frozen=True, slots=True)
class Taken:
    """What one contender took in one fresh process: seconds, and bytes of its cold read."""

    cold: float
    again: float
    kept: float
    asked_nbytes: int
    """Bytes that the process asked the system for; a mapped file is not asked for."""
    device_nbytes: int
    """Bytes that had to come from the disk, read ahead of need included."""
    digest: str
    """Of what was read."""
    dropped: bool
    """Whether the page cache held none of the files when it began."""


@dataclass(frozen=True, slots=True)
class Row:
    """One part of one version: medians over the rounds."""

    part: str
    version: str
    nbytes: int
    seconds: Mapping[str, tuple[float, float]]
    """By temperature: of safetensors, of lamella. So are the two below, of the cold read."""
    asked_nbytes: tuple[float, float]
    device_nbytes: tuple[float, float]
    dropped: bool


TEMPERATURES = ("cold", "again", "kept")


def _open_file(place: str) -> Any:
    return safe_open(place, framework="pt")


def _from_file(file: Any, _revision: str, part: Part) -> dict[str, Tensor]:
    if part.rows:
        data = file.get_slice(part.tensors)
        return {part.tensors: data[_middle(data.get_shape()[0])].clone()}
    return {name: file.get_tensor(name).clone() for name in file.keys() if name.startswith(part.tensors)}  # noqa: SIM118


def _open_repository(place: str) -> Any:
    return lamella.open(place)


def _from_repository(repository: Any, revision: str, part: Part) -> dict[str, Tensor]:
    if part.rows:
        lazy = repository.version(revision)[part.tensors]
        return {part.tensors: _as_torch(lazy[_middle(lazy.shape[0])])}
    return dict(repository.checkout(revision, include=f"{part.tensors}*", framework="torch"))


def _as_torch(array: Any) -> Tensor:
    if array.dtype.name == "bfloat16":  # which NumPy knows from ml_dtypes, and torch does not take from there
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _middle(length: int) -> slice:
    first = max(length - ROWS, 0) // 2
    return slice(first, min(first + ROWS, length))


CONTENDERS: Mapping[str, tuple[Callable[[str], Any], Callable[[Any, str, Part], dict[str, Tensor]]]] = {
    "safetensors": (_open_file, _from_file),
    "lamella": (_open_repository, _from_repository),
}
"""How each opens, and what it then reads."""


def measure(contender: str, place: str, revision: str, part: Part) -> Taken:
    """Take the files out of the page cache, then read a part over and over."""
    torch.set_num_threads(1)  # copies of a few MiB gain nothing by a second, and lose much by waiting for a busy core
    begin, read = CONTENDERS[contender]
    files = [Path(place)] if Path(place).is_file() else [file for file in Path(place).rglob("*") if file.is_file()]
    for file in files:
        _drop(file)
    dropped = not any(map(_resident_pages, files))
    before = _read_so_far()
    cold, tensors = _timed(lambda: read(begin(place), revision, part))
    asked, device = (after - start for after, start in zip(_read_so_far(), before, strict=True))
    # What was read is held on to, so that every read has to find fresh memory, as a user's does.
    again = [_timed(lambda: read(begin(place), revision, part)) for _ in range(REPEATS)]
    opened = begin(place)
    read(opened, revision, part)
    kept = [_timed(lambda: read(opened, revision, part)) for _ in range(REPEATS)]
    return Taken(
        cold=cold,
        again=statistics.median(seconds for seconds, _ in again),
        kept=statistics.median(seconds for seconds, _ in kept),
        asked_nbytes=asked,
        device_nbytes=device,
        digest=_digest(tensors),
        dropped=dropped,
    )


def _timed(read: Callable[[], dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    start = time.perf_counter()
    tensors = read()
    return time.perf_counter() - start, tensors


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_so_far() -> tuple[int, int]:
    """Return the bytes that this process has asked for, and those that came from the disk."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    counts = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return counts["rchar"], counts["read_bytes"]


def _drop(file: Path) -> None:
    """Take a file out of the page cache, if its file system has one."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)  # pages that are not on the disk yet stay
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _resident_pages(file: Path) -> int:
    """Return how many pages of a file the page cache holds."""
    if not (nbytes := file.stat().st_size):
        return 0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), nbytes, flags=mmap.MAP_PRIVATE) as mapped:
        state = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
        start = (ctypes.c_ubyte * nbytes).from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(start), ctypes.c_size_t(nbytes), state)
        del start  # or the file cannot be unmapped
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(page & 1 for page in state)


def compare(family: Sequence[Checkpoint], precision: Precision, *, folder: Path, rounds: int) -> list[Row]:
    """Push a family to a repository in a scratch directory under ``folder``; read every part of some versions."""
    fresh = multiprocessing.get_context("spawn")
    rows = []
    with TemporaryDirectory(dir=folder) as scratch:
        place = str(Path(scratch, "repository"))
        revisions = _push(family, precision, place)
        for version in VERSIONS:
            source = next(item for item in family if item.name == version).path(precision)
            places = {"safetensors": str(source), "lamella": place}
            for part in PARTS:
                taken: dict[str, list[Taken]] = defaultdict(list)
                for _ in range(rounds):
                    for contender, at in places.items():
                        with fresh.Pool(1) as pool:  # its imports are done when the job begins
                            job = (contender, at, revisions[version], part)
                            taken[contender].append(pool.apply(measure, job))
                rows.append(_row(part, version, _nbytes(source, part), taken))
    return rows


def _push(family: Sequence[Checkpoint], precision: Precision, place: str) -> dict[str, str]:
    revisions: dict[str, str] = {}
    with lamella.init(place) as repository:
        for checkpoint in family:
            parent = None if checkpoint.parent is None else revisions[checkpoint.parent]
            version = repository.push(checkpoint.path(precision), f"minilm@{checkpoint.branch}", parent=parent)
            revisions[checkpoint.name] = f"minilm@v{version.number}"
    return revisions


def _nbytes(source: Path, part: Part) -> int:
    return sum(tensor.nbytes for tensor in _from_file(_open_file(str(source)), "", part).values())


def _row(part: Part, version: str, nbytes: int, taken: Mapping[str, list[Taken]]) -> Row:
    raw, stored = taken["safetensors"], taken["lamella"]
    if len({item.digest for item in raw + stored}) != 1:
        raise AssertionError(f"{part.title} of {version} is not what was pushed")

    def medians(of: Callable[[Taken], float]) -> tuple[float, float]:
        return statistics.median(map(of, raw)), statistics.median(map(of, stored))

    return Row(
        part=part.title,
        version=version,
        nbytes=nbytes,
        seconds={
            "cold": medians(lambda item: item.cold),
            "again": medians(lambda item: item.again),
            "kept": medians(lambda item: item.kept),
        },
        asked_nbytes=medians(lambda item: item.asked_nbytes),
        device_nbytes=medians(lambda item: item.device_nbytes),
        dropped=all(item.dropped for item in raw + stored),
    )


def table(rows: Sequence[Row], title: str) -> Table:
    """Return what a reader wants to see of a comparison."""
    cold = "cold" if all(row.dropped for row in rows) else "cold (but still cached)"
    result = Table("", title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in (
        "version",
        "KiB",
        cold,
        *TEMPERATURES[1:],
        "asked for, KiB",
        "from disk, KiB",
        "cold, again, kept, ms",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            row.part,
            row.version,
            f"{row.nbytes / 1024:,.0f}",
            *(f"{ours / theirs:.1f} x" for theirs, ours in row.seconds.values()),
            *(" : ".join(f"{nbytes / 1024:,.0f}" for nbytes in pair) for pair in (row.asked_nbytes, row.device_nbytes)),
            "  ".join(" : ".join(f"{1000 * seconds:.1f}" for seconds in pair) for pair in row.seconds.values()),
        )
    return result


def main() -> None:
    """Compare on the published model's family, in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="where to write; its disk is measured")
    arguments = parser.parse_args()
    console = Console(width=_WIDTH)
    family = corpora.minilm_family(report=console.print)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for precision in corpora.PRECISIONS:
        rows = compare(family, precision, folder=arguments.folder, rounds=arguments.rounds)
        console.print(
            table(
                rows,
                f"{precision}: lamella's time as a multiple of safetensors'; in the last columns safetensors : lamella",
            )
        )


if __name__ == "__main__":
    main()
