"""Checkpoints from several ranks: how fast, how small, and how much memory, beside torch's own files.

    python -m benchmarks.ranks [--rounds 5] [--models 4] [--checkpoints 20] [--steps 10] [--memory-mib 1024]

A small GPT (``gpt``) is trained with AdamW, and its whole state saved every few steps: weights, both moments, steps.
Two processes of one gloo group hold states in shards, as FSDP2 has it. In every round each contender saves the same
states of several moments of the training at once, of which those before are saved already, once: ``dcp.save`` by
lamella on two ranks and on one, two pushes of half of it each that know nothing of each other, ``dcp.save`` to files on
two ranks and on one, and ``torch.save``. All of them sync what they write. What is shown are medians. Then all
checkpoints go through one repository, and the bytes that they take are set beside those of files. At last both ranks
save noise that lies so that every cell is shared, and their memory is watched.
"""

import argparse
import gc
import json
import os
import shutil
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

import lamella
from benchmarks import corpora, gpt
from benchmarks.memory import measured
from lamella.torch import LamellaWriter

RANKS = 2
SHAPE = gpt.Shape(6, 384)
"""10.7 million parameters: 128 MB with both moments, as large as two cores save in a second or so."""

STEPS = 400
"""Of the whole training, by which its rate falls."""

_MIB = 1 << 20


def nested(flat: dict[str, torch.Tensor], mesh: DeviceMesh | None) -> dict[str, Any]:
    """Return a state as a training loop has it; with a mesh, its matrices and vectors cut by rows."""
    state: dict[str, Any] = {"lr": 1e-3, "groups": [{"betas": [0.9, 0.999]}]}
    for name, tensor in flat.items():
        placed: Any = tensor
        if mesh is not None:
            placement = Shard(0) if tensor.dim() else Replicate()
            placed = distribute_tensor(tensor, mesh, [placement], src_data_rank=None)
        state[name] = placed
    return state


class Rank:
    """One of the processes that save."""

    def __init__(self, rank: int, states: Sequence[Path], scratch: Path) -> None:
        self.rank = rank
        self._states = states
        self._scratch = scratch
        self._alone = [dist.new_group([other]) for other in range(RANKS)]
        self._mesh = DeviceMesh("cpu", list(range(RANKS)))

    def flat(self, *numbers: int) -> dict[str, torch.Tensor]:
        """Return states as training left them, as one."""
        return {
            f"{at}.{name}": tensor
            for at, number in enumerate(numbers)
            for name, tensor in load_file(self._states[number]).items()
        }

    def save(self, state: dict[str, Any], place: Path, *, rank: int | None = None, files: bool = False) -> None:
        """Save a state on all ranks, or on one of them alone."""
        if rank not in (None, self.rank):
            return
        writer: Any = FileSystemWriter(place) if files else LamellaWriter(str(place), "gpt@main")
        save(state, storage_writer=writer, process_group=None if rank is None else self._alone[rank])

    def contenders(self, flat: dict[str, torch.Tensor]) -> dict[str, Callable[[Path], None]]:
        """Return what saves a state to a place, by name."""
        spread, whole = nested(flat, self._mesh), nested(flat, None)
        half = {
            name: tensor[self.rank * len(tensor) // RANKS : (self.rank + 1) * len(tensor) // RANKS]
            for name, tensor in flat.items()
            if tensor.dim()
        }

        def torch_save(place: Path) -> None:
            if self.rank == 0:
                place.mkdir(parents=True, exist_ok=True)
                with (place / "state.pt").open("wb") as file:
                    torch.save(whole, file)
                    file.flush()
                    os.fsync(file.fileno())

        return {
            "lamella, 2 ranks": lambda place: self.save(spread, place),
            "lamella, 1 rank": lambda place: self.save(whole, place, rank=0),
            "lamella, 2 pushes of a half": lambda place: self.save(
                half, place.with_name(f"{place.name}-{self.rank}"), rank=self.rank
            ),
            "dcp files, 2 ranks": lambda place: self.save(spread, place, files=True),
            "dcp files, 1 rank": lambda place: self.save(whole, place, rank=0, files=True),
            "torch.save": torch_save,
        }

    def rounds(self, rounds: int, models: int) -> dict[str, list[float]]:
        """Return the seconds that each contender took in each round, the slowest rank's."""
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        for number in range(rounds):
            pairs = len(self._states) - 1
            at = [(7 * number + each * pairs // models) % pairs for each in range(models)]
            before, after = (self.contenders(self.flat(*(one + later for one in at))) for later in (0, 1))
            for name in after:
                place = self._scratch / "place"
                for one in (place, *(place.with_name(f"place-{rank}") for rank in range(RANKS))):
                    if self.rank == 0:
                        shutil.rmtree(one, ignore_errors=True)
                        if name.startswith("lamella"):
                            lamella.init(str(one)).close()
                dist.barrier()
                if name.startswith("lamella"):
                    before[name](place)
                dist.barrier()
                start = time.perf_counter()
                after[name](place)
                dist.barrier()
                seconds[name].append(time.perf_counter() - start)
            del before, after
            gc.collect()
        return dict(seconds)

    def sizes(self) -> dict[str, list[int]]:
        """Return how large what each contender keeps is after each checkpoint."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        place, files = self._scratch / "all", self._scratch / "files"
        if self.rank == 0:
            lamella.init(str(place)).close()
        dist.barrier()
        for number in range(len(self._states)):
            contenders = self.contenders(self.flat(number))
            contenders["lamella, 2 ranks"](place)
            contenders["dcp files, 2 ranks"](files)
            contenders["torch.save"](files / "whole")
            dist.barrier()
            if self.rank == 0:
                whole = _size(files / "whole")
                found["lamella, 2 ranks"].append(_size(place))
                found["dcp files, 2 ranks"].append(_size(files) - whole)
                found["torch.save"].append(whole)
                shutil.rmtree(files)
            dist.barrier()
        return dict(found)

    def memory(self, mib: int) -> dict[str, int]:
        """Return by how much this rank grew while it saved a shard of noise, of which it has parts of every cell."""
        columns = 4096
        shard = torch.randint(0, 256, (mib * _MIB // columns // 4, columns * 4), dtype=torch.uint8).view(torch.float32)
        state = {"noise": DTensor.from_local(shard, self._mesh, [Shard(1)])}
        place = self._scratch / "noise"
        if self.rank == 0:
            lamella.init(str(place)).close()
        dist.barrier()
        writer = LamellaWriter(str(place), "noise@main")
        watched = measured(lambda: save(state, storage_writer=writer))
        return {"shard": shard.nbytes, "grew": watched.nbytes, "sent": writer.sent_nbytes}


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def work(rank: int, port: int, states: Sequence[Path], scratch: Path, rounds: int, models: int, mib: int) -> None:
    """Be one of the ranks; the results of each go to a file."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    mine = Rank(rank, states, scratch)
    found = {
        "seconds": mine.rounds(rounds, models),
        "sizes": mine.sizes(),
        "memory": mine.memory(mib) if mib else {},
    }
    (scratch / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(states: Sequence[Path], scratch: Path, rounds: int, models: int, mib: int) -> list[dict[str, Any]]:
    """Run the ranks; return what each has found."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spawn(work, (port, states, scratch, rounds, models, mib), nprocs=RANKS)  # type: ignore[no-untyped-call]
    return [json.loads((scratch / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


def tables(found: list[dict[str, Any]], state_nbytes: int, models: int) -> Iterator[Table]:
    """Yield what was found."""
    first = found[0]
    medians = {name: statistics.median(values) for name, values in first["seconds"].items()}
    table = Table("save", "seconds", "MB/s of state", "against two pushes of a half", box=SIMPLE_HEAD)
    saved = models * state_nbytes
    table.title = f"A state of {saved / 1e6:.0f} MB whose neighbour is stored, medians"
    halves = medians["lamella, 2 pushes of a half"]
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds:.2f}", f"{saved / seconds / 1e6:.0f}", f"{halves / seconds:.2f}")
    yield table
    sizes = first["sizes"]
    count = len(next(iter(sizes.values())))
    table = Table("keep", "MB in all", "share of the state", box=SIMPLE_HEAD)
    table.title = f"{count} consecutive checkpoints"
    totals = {name: values[-1] if name.startswith("lamella") else sum(values) for name, values in sizes.items()}
    for name, total in totals.items():
        table.add_row(name, f"{total / 1e6:.0f}", f"{total / (count * state_nbytes):.1%}")
    yield table
    if first["memory"]:
        table = Table("rank", "shard, MiB", "sent to the other, MiB", "memory beyond the shard, MiB", box=SIMPLE_HEAD)
        table.title = "A matrix of noise, cut by columns: both ranks have parts of every cell"
        for rank, one in enumerate(found):
            columns = (one["memory"][key] / _MIB for key in ("shard", "sent", "grew"))
            table.add_row(str(rank), *(f"{value:.0f}" for value in columns))
        yield table


def main() -> None:
    """Train, save, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--memory-mib", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    asked = parser.parse_args()
    console = Console()
    runs = corpora.Pretrainings(SHAPE, asked.folder, steps=STEPS, seed=0, report=console.print)
    states = runs.states(asked.checkpoints, asked.steps)
    with TemporaryDirectory(dir=asked.folder) as scratch:
        found = measure(states, Path(scratch), asked.rounds, asked.models, asked.memory_mib)
    for table in tables(found, sum(tensor.nbytes for tensor in load_file(states[0]).values()), asked.models):
        console.print(table)


if __name__ == "__main__":
    main()
