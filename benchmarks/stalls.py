"""How long a training loop stands still for a checkpoint: lamella with ``wait=False``, and what people use today.

    python -m benchmarks.stalls [--rounds N] [--layers N] [--width N] [--folder DIR]

A loop changes every weight of a GPT in the CPU's memory, then saves it. What is measured is how long the call that
saves keeps the loop: a copy of every tensor into memory that is there (``memcpy``, which nothing that takes a true copy
can be faster than), ``torch.save``, ``dcp.async_save`` to files as it comes and with memory that it uses again, and
``push(..., wait=False)``. In every round each contender runs once, in turn, and the loop goes on when what was saved is
stored: as if checkpoints were minutes apart. At the end the same is measured of ``memcpy`` and lamella while a push is
being stored, which takes every core.

Each call is compared with a ``memcpy`` right before it. First calls, which touch fresh memory, stand in a column of
their own, and are in neither median nor worst.
"""

import argparse
import copy
import logging
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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

import lamella
from benchmarks import corpora, gpt

ROUNDS = 9
"""The first of which is told apart; enough of the others for a worst one."""

SHAPE = gpt.Shape(layers=12, width=768)
"""GPT-2's smallest: 340 MB of float32 in 148 tensors."""

_MIB = 1 << 20

State: TypeAlias = Mapping[str, Tensor]
Save: TypeAlias = Callable[[State], Callable[[], object]]
"""Saves a state; returns, as soon as the state may change, what waits until it is stored."""


@dataclass(frozen=True, slots=True)
class Pauses:
    """How long the calls of one contender took, in seconds."""

    first: float
    others: tuple[float, ...]
    times_memcpy: float
    """Median of what the others took as a multiple of a ``memcpy`` right before."""
    stored: float
    """Median of the time from the call until everything was stored."""

    @property
    def median(self) -> float:
        """Of all but the first."""
        return statistics.median(self.others)


def measure(state: State, folder: Path, *, rounds: int) -> tuple[dict[str, Pauses], dict[str, Pauses]]:
    """Return the pauses of each contender by itself, and of those with any to tell while a push is being stored."""
    copied = copy.deepcopy(dict(state))
    # No pinned or shared memory and no threads, which need a GPU or gain nothing without one.
    stager = DefaultStager(StagingOptions(False, False, False, False))

    def memcpy(state: State) -> Callable[[], object]:
        for name, tensor in state.items():
            np.copyto(copied[name].numpy(), tensor.numpy())
        return lambda: None

    def torch_save(state: State) -> Callable[[], object]:
        torch.save(state, folder / "torch.pt")
        return lambda: None

    def dcp_save(state: State, stager: DefaultStager | None = None) -> Callable[[], object]:
        saved: Any = async_save(dict(state), checkpoint_id=str(folder / "dcp"), async_stager=stager, no_dist=True)
        return lambda: saved.result()

    with lamella.init(str(folder / "repository")) as repo:

        def push(state: State) -> Callable[[], object]:
            handle = repo.push(state, "gpt@main", wait=False)
            handle.staged.result()
            return handle.published.result

        contenders: dict[str, Save] = {
            "memcpy": memcpy,
            "torch.save": torch_save,
            "dcp.async_save": dcp_save,
            "dcp.async_save, warm": partial(dcp_save, stager=stager),
            "lamella": push,
        }
        alone = _measure(state, contenders, rounds)
        return alone, _measure(state, {"memcpy": memcpy, "lamella": push}, rounds, beside=push)


def _measure(
    state: State, contenders: Mapping[str, Save], rounds: int, beside: Save | None = None
) -> dict[str, Pauses]:
    pauses: dict[str, list[float]] = defaultdict(list)
    copies: dict[str, list[float]] = defaultdict(list)
    stored: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, save in contenders.items():
            os.sync()  # so that nobody waits for what the one before left to be written
            train(state)
            finish_other = None if beside is None else beside(state)
            train(state)
            start = time.perf_counter()
            contenders["memcpy"](state)
            copies[name].append(time.perf_counter() - start)
            train(state)
            start = time.perf_counter()
            finish = save(state)
            pauses[name].append(time.perf_counter() - start)
            finish()
            stored[name].append(time.perf_counter() - start)
            if finish_other is not None:
                finish_other()
    return {
        name: Pauses(
            seconds[0],
            tuple(seconds[1:]),
            statistics.median(pause / copy for pause, copy in zip(seconds[1:], copies[name][1:], strict=True)),
            statistics.median(stored[name]),
        )
        for name, seconds in pauses.items()
    }


def train(state: State) -> None:
    """Change every weight a little, as a step with a small learning rate does."""
    for tensor in state.values():
        tensor.mul_(1 + 1e-4 * torch.rand(()))


def table(pauses: Mapping[str, Pauses], title: str) -> Table:
    """Return what a reader wants to see of pauses."""
    result = Table("", title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("first", "median", "worst", "memcpys", "stored after"):
        result.add_column(heading, justify="right")
    for name, pause in pauses.items():
        result.add_row(
            name,
            f"{pause.first * 1e3:.0f} ms",
            f"{pause.median * 1e3:.1f} ms",
            f"{max(pause.others) * 1e3:.1f} ms",
            f"{pause.times_memcpy:.2f}",
            f"{pause.stored:.2f} s",
        )
    return result


def main() -> None:
    """Measure on a GPT of a given size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--width", type=int, default=SHAPE.width)
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="where to write; its disk is measured")
    arguments = parser.parse_args()
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)  # that nothing is distributed here
    state = gpt.initial(gpt.Shape(arguments.layers, arguments.width), "stalls")
    nbytes = sum(tensor.nbytes for tensor in state.values())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=arguments.folder) as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        alone, busy = measure(state, Path(scratch), rounds=arguments.rounds)
    console = Console()
    console.print(table(alone, f"a pause for {nbytes / _MIB:,.0f} MiB in {len(state)} tensors"))
    console.print(table(busy, "while another push is being stored"))


if __name__ == "__main__":
    main()
