"""Pushes of tensors on a GPU: how long the call keeps a loop, when tensors may change, what steps notice of it.

    python -m benchmarks.gpu [--rounds N] [--layers N] [--width N] [--folder DIR]

Needs a CUDA device, and says so where there is none. In every round each contender saves the weights of a GPT, in turn,
while nothing else runs: a copy into pinned memory that is there (what nothing that takes a true copy can be faster
than), ``dcp.async_save`` with pinned memory that it uses again, ``torch.save``, and ``push(..., wait=False)``. Then
steps of the GPU, products of matrices, are timed by themselves and while such a push copies tensors and stores them.
In the end a version that was pushed so is compared with one that was waited for, its tensors having been overwritten
as soon as they were staged.
"""

import argparse
import logging
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

import lamella
from benchmarks import corpora, gpt

ROUNDS = 6
"""The first of which is told apart: it pins memory."""

SHAPE = gpt.Shape(layers=24, width=1024)
"""GPT-2's medium: 1.2 GB of float32."""

STEPS = 20
"""Products that are timed together."""

_SIDE = 8192  # of the matrices of a step: some ms on a GPU of today
_MIB = 1 << 20

NOT_RUN = (
    "There is no CUDA device here, so nothing was run and nothing measured: not the time of the call, not the copies "
    "from the GPU into pinned memory, not what steps notice of them, not the comparison of what was recorded."
)

State: TypeAlias = Mapping[str, Tensor]
Save: TypeAlias = Callable[[State], tuple[Callable[[], object], Callable[[], object]]]
"""Begins to save; returns what waits until tensors may change, and what waits until everything is stored."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from the call of one contender, a round each."""

    returned: list[float]
    staged: list[float]
    stored: list[float]


def measure(state: State, repo: lamella.Repository, folder: Path, *, rounds: int) -> dict[str, Times]:
    """Time every contender, in turn."""
    pinned = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in state.items()}
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stager = DefaultStager(StagingOptions(True, False, False, True))

    def nothing() -> None:
        """Wait for what has ended already."""

    def copy(state: State) -> tuple[Callable[[], object], Callable[[], object]]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for name, tensor in state.items():
                pinned[name].copy_(tensor, non_blocking=True)
        return stream.synchronize, nothing

    def torch_save(state: State) -> tuple[Callable[[], object], Callable[[], object]]:
        torch.save(state, folder / "torch.pt")
        return nothing, nothing

    def dcp_save(state: State) -> tuple[Callable[[], object], Callable[[], object]]:
        saved: Any = async_save(dict(state), checkpoint_id=str(folder / "dcp"), async_stager=stager, no_dist=True)
        return nothing, saved.result

    contenders: dict[str, Save] = {
        "copy into pinned memory": copy,
        "torch.save": torch_save,
        "dcp.async_save": dcp_save,
        "lamella": pushing(repo),
    }
    times: dict[str, Times] = defaultdict(lambda: Times([], [], []))
    for _ in range(rounds):
        for name, save in contenders.items():
            os.sync()  # so that nobody waits for what the one before left to be written
            train(state)
            torch.cuda.synchronize()
            start = time.perf_counter()
            staged, stored = save(state)
            times[name].returned.append(time.perf_counter() - start)
            staged()
            times[name].staged.append(time.perf_counter() - start)
            stored()
            times[name].stored.append(time.perf_counter() - start)
    return dict(times)


def pushing(repo: lamella.Repository) -> Save:
    """Return what pushes to a repository without waiting."""

    def push(state: State) -> tuple[Callable[[], object], Callable[[], object]]:
        handle = repo.push(state, "gpt@main", wait=False)
        return handle.staged.result, handle.published.result

    return push


def train(state: State) -> None:
    """Change every weight a little, as a step with a small learning rate does."""
    for tensor in state.values():
        tensor.mul_(1 + 1e-4 * torch.rand((), device=tensor.device))


def step_seconds(begin: Callable[[], object]) -> float:
    """Return how long a step takes of the GPU after ``begin``, by its own clock."""
    matrix = torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(matrix)
    torch.matmul(matrix, matrix, out=product)  # what is chosen and loaded at the first call
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin()
    first.record()
    for _ in range(STEPS):
        torch.matmul(matrix, matrix, out=product)
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / STEPS


def same_bits(state: State, repo: lamella.Repository) -> bool:
    """Whether a push whose tensors are overwritten once they are staged records what one that is waited for does."""
    expected = repo.push(state, "waited@main").parameters_id
    kept = {name: tensor.clone() for name, tensor in state.items()}
    handle = repo.push(kept, "staged@main", wait=False)
    handle.staged.result()
    for tensor in kept.values():
        tensor.fill_(float("nan"))
    return handle.published.result().parameters_id == expected


def table(times: Mapping[str, Times], title: str, nbytes: int) -> Table:
    """Return what a reader wants to see of times: of calls, then of when tensors may change, and of what is stored."""
    result = Table("", title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("first call", "call", "worst", "may change after", "GB/s", "stored after"):
        result.add_column(heading, justify="right")
    for name, found in times.items():
        staged = statistics.median(found.staged[1:])
        result.add_row(
            name,
            f"{found.returned[0] * 1e3:.0f} ms",
            f"{statistics.median(found.returned[1:]) * 1e3:.1f} ms",
            f"{max(found.returned[1:]) * 1e3:.1f} ms",
            f"{staged * 1e3:.1f} ms",
            f"{nbytes / staged / 1e9:.1f}",
            f"{statistics.median(found.stored[1:]):.2f} s",
        )
    return result


def main() -> None:
    """Measure on the first GPU; exit with 1, having said what was not run, if there is none."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--width", type=int, default=SHAPE.width)
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="where to write; its disk is measured")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(NOT_RUN)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)  # that nothing is distributed here
    shape = gpt.Shape(arguments.layers, arguments.width)
    state = {name: tensor.cuda() for name, tensor in gpt.initial(shape, "gpu").items()}
    nbytes = sum(tensor.nbytes for tensor in state.values())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    with (
        TemporaryDirectory(dir=arguments.folder) as scratch,
        warnings.catch_warnings(),
        lamella.init(str(Path(scratch, "repository"))) as repo,
    ):
        warnings.filterwarnings("ignore", module="torch.distributed")
        times = measure(state, repo, Path(scratch), rounds=arguments.rounds)
        title = f"{nbytes / _MIB:,.0f} MiB in {len(state)} tensors on {torch.cuda.get_device_name()}"
        console.print(table(times, title, nbytes))
        alone = step_seconds(lambda: None)
        beside = step_seconds(lambda: pushing(repo)(state))
        console.print(f"a step of the GPU: {alone * 1e3:.2f} ms alone, {beside * 1e3:.2f} ms beside a push")
        console.print(f"recorded what it was when it was staged: {'yes' if same_bits(state, repo) else 'NO'}")


if __name__ == "__main__":
    main()
