"""Push and full checkout of the MiniLM family, beside what else one could do with the same files.

    python -m benchmarks.push_checkout [--rounds N] [--folder DIR]

Writing, from files: ``cp``; ``zstd -3`` with one thread, and with one a core; push to a new repository. Each ends
synced on the same disk. Reading, into tensors: safetensors' loader on the copies, mapped and copied; zstd (into bytes);
checkout.
In every round each contender runs once, in turn, its input in the page cache. What is shown are medians over the
rounds, and each as a multiple of ``cp`` or of safetensors.
"""

import argparse
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from mmap import PAGESIZE
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import torch
import zstandard
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import lamella
from benchmarks import corpora
from benchmarks.corpora import Checkpoint, Precision

ROUNDS = 5
"""Enough that one disturbed round does not move the median."""

_ZSTD_LEVEL = 3
_MIB = 1 << 20

Contender: TypeAlias = Callable[[Sequence[Checkpoint], Precision, Path], None]
"""Writes a family into an empty folder, synced, or reads all of it from the folder that a writer left."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one contender took for the whole family."""

    seconds: float
    """Median over the rounds."""
    stored_nbytes: int
    """Bytes of the folder it wrote or read."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The contenders on one precision of a family; the first of each kind is what the others are compared with."""

    decoded_nbytes: int
    """Bytes of the files that went in."""
    writing: Mapping[str, Result]
    reading: Mapping[str, Result]


def compare(family: Sequence[Checkpoint], precision: Precision, *, folder: Path, rounds: int) -> Comparison:
    """Run every contender ``rounds`` times on ``family``, in scratch directories under ``folder``."""
    sources = [checkpoint.path(precision) for checkpoint in family]
    seconds: dict[str, list[float]] = defaultdict(list)
    stored: dict[str, int] = {}
    for _ in range(rounds):
        with TemporaryDirectory(dir=folder) as scratch:
            for name, write in WRITERS.items():
                place = Path(scratch, name)
                place.mkdir()
                os.sync()  # so that nobody waits for what the one before left to be written
                seconds[name].append(_seconds(write, sources, family, precision, place))
                stored[name] = sum(file.stat().st_size for file in _files(place))
            for name, (writer, read) in READERS.items():
                place = Path(scratch, writer)
                seconds[name].append(_seconds(read, _files(place), family, precision, place))
                stored[name] = stored[writer]
    results = {name: Result(statistics.median(values), stored[name]) for name, values in seconds.items()}
    return Comparison(
        decoded_nbytes=sum(source.stat().st_size for source in sources),
        writing={name: results[name] for name in WRITERS},
        reading={name: results[name] for name in READERS},
    )


def _seconds(
    contender: Contender, files: Sequence[Path], family: Sequence[Checkpoint], precision: Precision, place: Path
) -> float:
    for file in files:  # into the page cache
        file.read_bytes()
    start = time.perf_counter()
    contender(family, precision, place)
    return time.perf_counter() - start


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def copy(family: Sequence[Checkpoint], precision: Precision, place: Path) -> None:
    """``cp``, then ``sync`` of each file."""
    for checkpoint in family:
        shutil.copyfile(checkpoint.path(precision), target := place / checkpoint.name)
        with target.open("r+b") as file:
            os.fsync(file.fileno())


def compress(family: Sequence[Checkpoint], precision: Precision, place: Path, *, threads: int) -> None:
    """``zstd -3``, then ``sync`` of each file. ``threads`` is zstandard's: 0 for none, -1 for one a core."""
    for checkpoint in family:
        with checkpoint.path(precision).open("rb") as source, (place / checkpoint.name).open("wb") as target:
            zstandard.ZstdCompressor(level=_ZSTD_LEVEL, threads=threads).copy_stream(source, target)
            target.flush()
            os.fsync(target.fileno())


def push(family: Sequence[Checkpoint], precision: Precision, place: Path) -> None:
    """Push of each file to a new repository, on the branches of the family."""
    repo = lamella.init(str(place / "repository"))
    numbers: dict[str, int] = {}
    for checkpoint in family:
        parent = None if checkpoint.parent is None else f"minilm@v{numbers[checkpoint.parent]}"
        version = repo.push(checkpoint.path(precision), f"minilm@{checkpoint.branch}", parent=parent)
        numbers[checkpoint.name] = version.number


def load(family: Sequence[Checkpoint], _precision: Precision, place: Path) -> None:
    """safetensors' own loader, which maps the file; then a byte of every page, so that all of it is there."""
    for checkpoint in family:
        for tensor in load_file(place / checkpoint.name).values():
            tensor.reshape(-1).view(torch.uint8)[::PAGESIZE].sum()


def load_copy(family: Sequence[Checkpoint], _precision: Precision, place: Path) -> None:
    """The same, into memory that is the caller's own, as a checkout's is."""
    for checkpoint in family:
        _ = {name: tensor.clone() for name, tensor in load_file(place / checkpoint.name).items()}


def decompress(family: Sequence[Checkpoint], _precision: Precision, place: Path) -> None:
    """``zstd -d`` of each file into one buffer."""
    for checkpoint in family:
        zstandard.ZstdDecompressor().decompressobj().decompress((place / checkpoint.name).read_bytes())


def checkout(family: Sequence[Checkpoint], _precision: Precision, place: Path) -> None:
    """Checkout of every version into torch tensors, from a repository opened for it."""
    repo = lamella.open(str(place / "repository"))
    for number in range(1, len(family) + 1):
        repo.checkout(f"minilm@v{number}", framework="torch")


WRITERS: Mapping[str, Contender] = {
    "cp": copy,
    "zstd -3": partial(compress, threads=0),
    "zstd -3 -T0": partial(compress, threads=-1),
    "lamella push": push,
}
READERS: Mapping[str, tuple[str, Contender]] = {
    "safetensors load": ("cp", load),
    "safetensors copy": ("cp", load_copy),
    "zstd -d": ("zstd -3", decompress),
    "lamella checkout": ("lamella push", checkout),
}
"""Each with the name of the writer whose folder it reads."""


def table(comparison: Comparison, title: str) -> Table:
    """Return what a reader wants to see of a comparison."""
    result = Table("", title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("seconds", "MiB/s", "time", "stored"):
        result.add_column(heading, justify="right")
    for row in _rows(comparison):
        result.add_row(*row)
    return result


def _rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    decoded_nbytes = comparison.decoded_nbytes
    for results in (comparison.writing, comparison.reading):
        first = next(iter(results.values()))
        for name, result in results.items():
            yield (
                name,
                f"{result.seconds:.3f}",
                f"{decoded_nbytes / _MIB / result.seconds:,.0f}",
                f"{result.seconds / first.seconds:.2f} x",
                f"{result.stored_nbytes / decoded_nbytes:.1%}",
            )


def main() -> None:
    """Compare on the published model's family, in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="where to write; its disk is measured")
    arguments = parser.parse_args()
    console = Console()
    family = corpora.minilm_family(report=console.print)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for precision in corpora.PRECISIONS:
        comparison = compare(family, precision, folder=arguments.folder, rounds=arguments.rounds)
        console.print(
            table(
                comparison,
                f"{len(family)} checkpoints, {precision}, {comparison.decoded_nbytes / _MIB:,.0f} MiB decoded",
            )
        )


if __name__ == "__main__":
    main()
