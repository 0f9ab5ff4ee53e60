"""Pushes of tensors on a GPU: how fast they are read, how long a call keeps a loop, what steps notice of it.

    python -m benchmarks.gpu [--device cuda|cpu] [--rounds N] [--layers N] [--width N] [--folder DIR]

Needs a CUDA device, and says so where there is none; ``--device cpu`` goes through the same code with tensors of the
CPU, which shows that it runs and says nothing of a GPU. First the weights of a GPT are brought to this machine's
memory: in one copy for each tensor, pinned and not; and as a push reads them, cell by cell, hashed by all cores, either
through the ring of pinned memory, ahead of time, or each copied when it is its turn, unpinned, which is what a push did
before there was the ring.

Then each contender saves them in every round, in turn, while nothing else runs: a copy into pinned memory that is there
(what nothing that takes a true copy can be faster than), ``dcp.async_save`` with pinned memory that it uses again,
``torch.save``, ``push(..., wait=False)``; and those that a loop waits for, ``dcp.save`` to files and into a repository,
and ``push``. Then steps of the GPU, products of matrices, are timed by themselves and while a push that nobody waits
for copies tensors and stores them. In the end a version that was pushed so is compared with one that was waited for,
its tensors having been overwritten as soon as they were staged.
"""

import argparse
import logging
import os
import statistics
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_to_the_end

import lamella
from benchmarks import corpora, gpt
from lamella.torch import LamellaWriter
from lamella_engine.boxes import Octets
from lamella_engine.checkpoints import MemoryCheckpoint, expect
from lamella_engine.checkpoints.pages import Pages, aligned
from lamella_engine.chunking import MAX_CELL_NBYTES, Region
from lamella_engine.executor import ThreadExecutor, map_batched
from lamella_engine.format.digests import chunk_id
from lamella_engine.model import TensorSpec
from lamella_engine.torch_tensors import CUDA, Device, Transfers, array_of

ROUNDS = 6
"""The first of which is told apart: it pins memory."""

SHAPE = gpt.Shape(layers=24, width=1024)
"""GPT-2's medium: 1.2 GB of float32."""

STEPS = 20
"""Products that are timed together."""

_SIDE = 8192  # of the matrices of a step: some ms on a GPU of today
_MIB = 1 << 20

NOT_RUN = (
    "There is no CUDA device here, so nothing was run and nothing measured: not the copies from the GPU, pinned or "
    "not, not the ring, not the time of the calls, not what steps notice of them, not whether the same is "
    "recorded. --device cpu goes through the same code without one."
)

NO_FIGURES = "[bold]No GPU: these are the CPU's tensors, so no figure here says anything of one.[/bold]"

State: TypeAlias = Mapping[str, Tensor]
Save: TypeAlias = Callable[[State], tuple[Callable[[], object], Callable[[], object]]]
"""Begins to save; returns what waits until tensors may change, and what waits until everything is stored."""


class Host:
    """See :class:`~lamella_engine.torch_tensors.Device`: the CPU in a GPU's place, whose copies end when they begin."""

    def holds(self, tensor: Tensor) -> bool:
        """See the class."""
        return True

    def stream(self, tensor: Tensor) -> "Host":
        """See the class."""
        return self

    def queuing(self, stream: Any) -> AbstractContextManager[object]:
        """See the class."""
        return nullcontext()

    def mark(self, stream: Any) -> "Host":
        """See the class."""
        return self

    def pin(self, memory: Octets) -> None:
        """See the class."""

    def synchronize(self) -> None:
        """See the class."""


def arrive(state: State, device: Device, *, rounds: int) -> dict[str, list[float]]:
    """Return how many seconds each way to this machine's memory takes, a round each."""
    checkpoint = MemoryCheckpoint(state, device)
    starts: dict[str, int] = {}
    nbytes = 0
    for spec in checkpoint.structure:
        starts[spec.name] = nbytes
        nbytes += aligned(spec.nbytes)
    memory = {"pinned": Pages(nbytes, device), "unpinned": Pages(nbytes, None)}
    buffers = threading.local()
    executor = ThreadExecutor()

    def copy(pages: Pages) -> None:
        transfers = Transfers(device)
        for spec in checkpoint.structure:
            start = starts[spec.name]
            transfers.follow(state[spec.name])
            transfers.begin(state[spec.name], (), pages.octets[start : start + spec.nbytes])
        transfers.wait()

    def cells(reader: MemoryCheckpoint | None) -> Iterator[tuple[TensorSpec, Region]]:
        for spec in checkpoint.structure:
            for region in spec.grid.regions():
                if reader is not None:
                    expect(reader, spec, region)
                yield spec, region

    def hash_all(read: Callable[[TensorSpec, Region], Any], reader: MemoryCheckpoint | None) -> None:
        def hashed(cell: tuple[TensorSpec, Region]) -> bytes:
            return chunk_id(read(*cell))

        for _ in map_batched(executor, hashed, cells(reader), nbytes=lambda cell: cell[1].nbytes):
            pass

    def through_the_ring() -> None:
        def read(spec: TensorSpec, region: Region) -> Any:
            if not hasattr(buffers, "memory"):
                buffers.memory = np.empty(MAX_CELL_NBYTES, np.uint8).data
            return reader.read(spec, region, buffers.memory)

        with MemoryCheckpoint(state, device) as reader:
            hash_all(read, reader)

    def cell_by_cell() -> None:
        def read(spec: TensorSpec, region: Region) -> Any:
            return np.ascontiguousarray(array_of(state[spec.name], region.slices)).reshape(-1).view(np.uint8).data

        hash_all(read, None)

    ways: dict[str, Callable[[], None]] = {
        "each tensor in one copy, pinned": lambda: copy(memory["pinned"]),
        "each tensor in one copy, unpinned": lambda: copy(memory["unpinned"]),
        "cells, hashed, through the ring": through_the_ring,
        "cells, hashed, one by one, unpinned": cell_by_cell,
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, way in ways.items():
            synchronize()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    executor.close()
    return dict(seconds)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from the call of one contender, a round each."""

    returned: list[float]
    staged: list[float]
    stored: list[float]


def measure(state: State, repo: lamella.Repository, folder: Path, device: Device, *, rounds: int) -> dict[str, Times]:
    """Time every contender, in turn."""
    on_gpu = device is CUDA
    pinned = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu) for name, tensor in state.items()}
    stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))

    def nothing() -> None:
        """Wait for what has ended already."""

    def copy(state: State) -> tuple[Callable[[], object], Callable[[], object]]:
        stream: Any = device.stream(next(iter(state.values())))
        with device.queuing(stream):
            for name, tensor in state.items():
                pinned[name].copy_(tensor, non_blocking=True)
        return stream.synchronize, nothing

    def torch_save(state: State) -> tuple[Callable[[], object], Callable[[], object]]:
        torch.save(state, folder / "torch.pt")
        return nothing, nothing

    def dcp_save(state: State) -> tuple[Callable[[], object], Callable[[], object]]:
        saved: Any = async_save(dict(state), checkpoint_id=str(folder / "dcp"), async_stager=stager, no_dist=True)
        return nothing, saved.result

    def dcp_save_to_files(state: State) -> tuple[Callable[[], object], Callable[[], object]]:
        save_to_the_end(dict(state), checkpoint_id=str(folder / "dcp files"), no_dist=True)
        return nothing, nothing

    def dcp_save_to_lamella(state: State) -> tuple[Callable[[], object], Callable[[], object]]:
        save_to_the_end(dict(state), storage_writer=LamellaWriter(repo, "dcp@main"), no_dist=True)
        return nothing, nothing

    def push(state: State) -> tuple[Callable[[], object], Callable[[], object]]:
        repo.push(state, "pushed@main")
        return nothing, nothing

    contenders: dict[str, Save] = {
        "copy into pinned memory": copy,
        "torch.save": torch_save,
        "dcp.async_save": dcp_save,
        "lamella, wait=False": pushing(repo),
        "dcp.save to files": dcp_save_to_files,
        "dcp.save to lamella": dcp_save_to_lamella,
        "lamella": push,
    }
    times: dict[str, Times] = defaultdict(lambda: Times([], [], []))
    for _ in range(rounds):
        for name, save in contenders.items():
            os.sync()  # so that nobody waits for what the one before left to be written
            train(state)
            synchronize()
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


def arrivals_table(seconds: Mapping[str, list[float]], title: str, nbytes: int) -> Table:
    """Return how fast bytes arrive in each way."""
    result = Table("", title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("first", "median", "GB/s"):
        result.add_column(heading, justify="right")
    for name, found in seconds.items():
        median = statistics.median(found[1:])
        result.add_row(name, f"{found[0] * 1e3:.0f} ms", f"{median * 1e3:.1f} ms", f"{nbytes / median / 1e9:.1f}")
    return result


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
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only see that everything runs")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--width", type=int, default=SHAPE.width)
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="where to write; its disk is measured")
    arguments = parser.parse_args()
    device: Device = CUDA if arguments.device == "cuda" else Host()
    if device is CUDA and not torch.cuda.is_available():
        raise SystemExit(NOT_RUN)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)  # that nothing is distributed here
    shape = gpt.Shape(arguments.layers, arguments.width)
    state = {name: tensor.to(arguments.device) for name, tensor in gpt.initial(shape, "gpu").items()}
    nbytes = sum(tensor.nbytes for tensor in state.values())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    with (
        TemporaryDirectory(dir=arguments.folder) as scratch,
        warnings.catch_warnings(),
        lamella.init(str(Path(scratch, "repository"))) as repo,
    ):
        warnings.filterwarnings("ignore", module="torch.distributed")
        name = torch.cuda.get_device_name() if device is CUDA else "the CPU"
        title = f"{nbytes / _MIB:,.0f} MiB in {len(state)} tensors on {name}"
        if device is not CUDA:
            console.print(NO_FIGURES)
        arrived = arrive(state, device, rounds=arguments.rounds)
        console.print(arrivals_table(arrived, f"{title}: into this machine's memory", nbytes))
        times = measure(state, repo, Path(scratch), device, rounds=arguments.rounds)
        console.print(table(times, f"{title}: saved", nbytes))
        if device is CUDA:
            alone = step_seconds(lambda: None)
            beside = step_seconds(lambda: pushing(repo)(state))
            console.print(f"a step of the GPU: {alone * 1e3:.2f} ms alone, {beside * 1e3:.2f} ms beside a push")
        console.print(f"recorded what it was when it was staged: {'yes' if same_bits(state, repo) else 'NO'}")


if __name__ == "__main__":
    main()
