"""The distance of two stored versions, beside torch's of the same tensors in memory.

    python -m benchmarks.distance [--rounds N] [--folder DIR]

lamella reads, decodes and measures what it stored: L2, L1, the largest difference, how many elements changed, and what
the cosine takes, in float64. torch has both checkpoints in memory and gives L2 alone, in float32: ``torch.dist``, or
the norm of the difference after an upcast of bfloat16. Both use as many threads, and no more cores. Shown is how many
times as fast as torch lamella is, of medians over rounds in which they take turns:

``kept``    the repository stays open, so what it knows of the versions is not read again; packs are in the page cache
``anew``    it is opened for each call
"""

import argparse
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lamella
from benchmarks import corpora, minilm
from benchmarks.corpora import Checkpoint, Precision

ROUNDS = 11
"""Odd; a call takes tens of milliseconds, and a disturbed one twice as long."""

THREADS = (1, 2)

PART = "base-part"
"""The base, but for one feed-forward block that is ``main-1``'s: a fine-tune that leaves over nine tenths as it was."""

PAIRS = (
    ("base", "main-1"),
    ("main-2", "main-3"),
    ("base", "main-3"),
    ("main-1", "frozen-1"),
    ("base", "frozen-1"),
    ("base", PART),
)
"""A child; one of a grandchild; three steps at once; siblings; and two that share much."""

_WIDTH = 130  # also where the output is no terminal

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """One pair of versions, with some number of threads: seconds, medians over the rounds."""

    pair: tuple[str, str]
    threads: int
    shared: float
    """Share of the bytes that are in tensors which are the same in both."""
    theirs: float
    kept: float
    anew: float


def l2(a: Tensors, b: Tensors) -> float:
    """Return the distance of two checkpoints' floats, as one computes it in torch."""
    squared = 0.0
    for name, one in a.items():
        other = b[name]
        if one.dtype == torch.float32:
            squared += torch.dist(one, other).item() ** 2
        elif one.is_floating_point():
            squared += (one.float() - other.float()).norm().item() ** 2
    return math.sqrt(squared)


def measure(
    place: str, revisions: Mapping[str, str], tensors: Mapping[str, Tensors], threads: int, rounds: int
) -> list[Row]:
    """Measure every pair, on ``threads`` cores of those that this process may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # which lamella looks at
    torch.set_num_threads(threads)
    with lamella.open(place) as kept:
        return [_row(kept, place, revisions, tensors, pair, threads, rounds) for pair in PAIRS]


def _row(
    kept: lamella.Repository,
    place: str,
    revisions: Mapping[str, str],
    tensors: Mapping[str, Tensors],
    pair: tuple[str, str],
    threads: int,
    rounds: int,
) -> Row:
    a, b = (revisions[name] for name in pair)

    def opened() -> float:
        with lamella.open(place) as repository:
            return repository.distance(a, b).l2

    ways: tuple[Callable[[], float], ...] = (
        lambda: l2(tensors[pair[0]], tensors[pair[1]]),
        lambda: kept.distance(a, b).l2,
        opened,
    )
    found = [way() for way in ways]  # once without a clock
    if not all(math.isclose(one, found[0], rel_tol=1e-3) for one in found):
        raise AssertionError(f"{pair}: torch and lamella measure {found}")
    theirs, ours, anew = zip(*(tuple(map(_seconds, ways)) for _ in range(rounds)), strict=True)
    return Row(
        pair=pair,
        threads=threads,
        shared=_nbytes(tensors[pair[0]], kept.diff(a, b).same) / _nbytes(tensors[pair[0]], tensors[pair[0]]),
        theirs=statistics.median(theirs),
        kept=statistics.median(ours),
        anew=statistics.median(anew),
    )


def _seconds(way: Callable[[], float]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def _nbytes(tensors: Tensors, names: Iterable[str]) -> int:
    return sum(tensors[name].nbytes for name in names)


def compare(family: Sequence[Checkpoint], precision: Precision, *, folder: Path, rounds: int) -> list[Row]:
    """Push a family to a repository in a scratch directory under ``folder``; measure its pairs."""
    tensors: dict[str, Tensors] = {checkpoint.name: checkpoint.tensors(precision) for checkpoint in family}
    tensors[PART] = _partly(tensors["base"], tensors["main-1"])
    fresh = multiprocessing.get_context("spawn")
    rows = []
    with TemporaryDirectory(dir=folder) as scratch:
        place = str(Path(scratch, "repository"))
        revisions: dict[str, str] = {}
        with lamella.init(place) as repository:
            for name, parent, branch in [
                *((checkpoint.name, checkpoint.parent, checkpoint.branch) for checkpoint in family),
                (PART, "base", "part"),
            ]:
                at = None if parent is None else revisions[parent]
                version = repository.push(tensors[name], f"minilm@{branch}", parent=at)
                revisions[name] = f"minilm@v{version.number}"
        for threads in THREADS:
            with fresh.Pool(1) as pool:
                rows += pool.apply(measure, (place, revisions, tensors, threads, rounds))
    return rows


def _partly(base: Tensors, trained: Tensors) -> Tensors:
    last = f"encoder.layer.{minilm.layers(base) - 1}."
    return {
        name: trained[name] if name.startswith((f"{last}intermediate.", f"{last}output.")) else tensor
        for name, tensor in base.items()
    }


def table(rows: Sequence[Row], title: str) -> Table:
    """Return what a reader wants to see of a comparison."""
    result = Table("", title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("threads", "shared", "kept", "anew", "torch, kept, anew, ms"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            " to ".join(row.pair),
            str(row.threads),
            f"{row.shared:.1%}",
            f"{row.theirs / row.kept:.2f} x",
            f"{row.theirs / row.anew:.2f} x",
            " : ".join(f"{1000 * seconds:.1f}" for seconds in (row.theirs, row.kept, row.anew)),
        )
    return result


def main() -> None:
    """Compare on the published model's family, in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="where to write")
    arguments = parser.parse_args()
    console = Console(width=_WIDTH)
    family = corpora.minilm_family(report=console.print)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for precision in corpora.PRECISIONS:
        rows = compare(family, precision, folder=arguments.folder, rounds=arguments.rounds)
        console.print(table(rows, f"{precision}: how many times as fast as torch"))


if __name__ == "__main__":
    main()
