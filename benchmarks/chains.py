"""What bounds on chains of deltas save and cost: versions of one run of training, in repositories with other bounds.

    python -m benchmarks.chains [--depths N ...] [--longest-chain X ...] [--only WORD ...] [--versions N] [--rounds N]
                                [--folder DIR]

A push stores a chunk whole, not as a delta, where its chain would have more deltas than the repository's ``max_depth``,
or more bytes than ``LONGEST_CHAIN`` times those of the full blob that it begins with (``inf`` switches that off). For
each pair of bounds, as multiples of what ``max_depth`` 0 takes in the same run:

``stored``      bytes of the repository, closed, all files counted
``push``        CPU seconds of all pushes
``checkout``    CPU seconds of a checkout, the mean of all versions and the worst: medians over rounds in which the
                repositories take turns; they stay open
``read``        bytes that it reads, as ``cost`` tells them

The newest version of a repository in use stands anywhere in its chain: over time, reading it costs the mean.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest.mock import patch

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import lamella
from benchmarks import corpora
from lamella_engine.content_store import bases

ROUNDS = 3
"""Enough that one disturbed checkout does not move the median."""

DEPTHS = (0, 1, 2, 4, 8, 16, 31)
"""From none to the longest that the format allows."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MIB = 1 << 20
_WIDTH = 130  # also where the output is no terminal


class Bounds(NamedTuple):
    """What a chain may come to; a ``max_depth`` of 0 is what the others are compared with."""

    max_depth: int
    longest_chain: float = bases.LONGEST_CHAIN
    """Its bytes to those of the full blob that it begins with."""


@dataclass(frozen=True, slots=True)
class Result:
    """What the versions took in one repository."""

    stored_nbytes: int
    push_seconds: float
    checkout_seconds: Sequence[float]
    """Of each version, as are the two below."""
    read_nbytes: Sequence[int]
    depths: Sequence[int]
    """The most deltas that one cell takes."""


def measure(
    paths: Sequence[Path], dtype: torch.dtype, all_bounds: Iterable[Bounds], *, folder: Path, rounds: int
) -> dict[Bounds, Result]:
    """Push float32 checkpoints, rounded, to a repository for each of ``all_bounds``, and check all of them out."""
    revisions = [f"chain@v{number}" for number in range(1, len(paths) + 1)]
    pushes: dict[Bounds, list[float]] = defaultdict(list)
    checkouts: dict[tuple[Bounds, str], list[float]] = defaultdict(list)
    with TemporaryDirectory(dir=folder, prefix="chains-") as scratch:
        places = {bounds: Path(scratch, str(number)) for number, bounds in enumerate(all_bounds)}
        with ExitStack() as opened:
            repositories = {
                bounds: opened.enter_context(lamella.init(place, max_depth=bounds.max_depth))
                for bounds, place in places.items()
            }
            for path in paths:
                tensors = corpora.rounded(load_file(path), dtype)
                for bounds, repository in repositories.items():
                    with patch.object(bases, "LONGEST_CHAIN", bounds.longest_chain):
                        pushes[bounds].append(_cpu_seconds(partial(repository.push, tensors, "chain@main")))
        with ExitStack() as opened:
            repositories = {bounds: opened.enter_context(lamella.open(place)) for bounds, place in places.items()}
            for _, revision in product(range(rounds), revisions):
                for bounds, repository in repositories.items():
                    checkout = partial(repository.checkout, revision, framework="torch")
                    checkouts[bounds, revision].append(_cpu_seconds(checkout))
            costs = {
                bounds: [repository.cost(revision) for revision in revisions]
                for bounds, repository in repositories.items()
            }
        return {
            bounds: Result(
                stored_nbytes=sum(file.stat().st_size for file in place.rglob("*") if file.is_file()),
                push_seconds=sum(pushes[bounds]),
                checkout_seconds=[median(checkouts[bounds, revision]) for revision in revisions],
                read_nbytes=[cost.read_nbytes for cost in costs[bounds]],
                depths=[cost.max_depth for cost in costs[bounds]],
            )
            for bounds, place in places.items()
        }


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def table(results: Mapping[Bounds, Result], title: str) -> Table:
    """Return what a reader wants to see of one chain."""
    full = next(result for bounds, result in results.items() if not bounds.max_depth)
    versions = len(full.depths)
    found = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in (
        "max_depth",
        "longest chain",
        "deepest",
        "MiB a version",
        "stored",
        "push",
        "checkout mean",
        "worst",
        "read mean",
        "worst",
        "checkout, ms",
    ):
        found.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for bounds, result in results.items():
        seconds, usual_seconds = result.checkout_seconds, fmean(full.checkout_seconds)
        nbytes, usual_nbytes = result.read_nbytes, fmean(full.read_nbytes)
        found.add_row(
            str(bounds.max_depth),
            f"{bounds.longest_chain:g}" if bounds.max_depth else "",
            str(max(result.depths)),
            f"{result.stored_nbytes / versions / _MIB:.2f}",
            f"{result.stored_nbytes / full.stored_nbytes:.3f}",
            f"{result.push_seconds / full.push_seconds:.2f}",
            *(f"{value / usual_seconds:.2f}" for value in (fmean(seconds), max(seconds))),
            *(f"{value / usual_nbytes:.2f}" for value in (fmean(nbytes), max(nbytes))),
            f"{1000 * fmean(seconds):.0f}",
        )
    return found


def main() -> None:
    """Measure every chain in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, metavar="N", help="besides 0")
    parser.add_argument("--longest-chain", type=float, nargs="+", default=[bases.LONGEST_CHAIN], metavar="X")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="chains whose name or dtype has one")
    parser.add_argument("--versions", type=int, default=corpora.CHAIN_LENGTH, help="how many of each chain")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="for repositories: 20 GB, or less")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # CPU seconds of two threads depend on one another
    console = Console(width=_WIDTH)
    depths = sorted({*arguments.depths} - {0})
    all_bounds = [Bounds(0), *(Bounds(*pair) for pair in product(depths, arguments.longest_chain))]

    def wanted(name: str) -> bool:
        return any(word in name for word in arguments.only)

    for chain in corpora.chains(
        wanted=lambda name: any(wanted(f"{name} {dtype}") for dtype in _DTYPES), report=console.print
    ):
        for dtype in filter(lambda dtype: wanted(f"{chain.name} {dtype}"), _DTYPES):
            paths = chain.paths[: arguments.versions]
            results = measure(paths, _DTYPES[dtype], all_bounds, folder=arguments.folder, rounds=arguments.rounds)
            console.print(table(results, f"{chain.name}, {dtype}: {len(paths)} versions"))


if __name__ == "__main__":
    main()
