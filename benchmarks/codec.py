"""Lamella's codec on pairs of real checkpoints, beside what else codes floats.

    python -m benchmarks.codec [--what sizes speed repositories] [--seed N] [--only WORD ...] [--rounds N]
                               [--peers-venv DIR] [--folder DIR]

``sizes``
    Bits a parameter of each coder, after everything came back bit for bit.
``speed``
    GB/s of decoded bytes on one core, encode / decode: from CPU seconds, which suffer least from what else the machine
    does; medians of rounds in which the coders take turns over the whole checkpoint and write to 64 MB of warm memory.
    Of lamella's codec also the share of what ``memcpy`` of the same cells does in the same process, and what two
    threads do as a share of two processes at the same time.
``repositories``
    By how much a repository that has the base grows, all files counted, when the checkpoint is pushed.

Lamella codes the cells of each tensor; the others get the tensors in a row, cut every 2^20 values. ``coders`` says how
each is used. Integers (a few position ids) are left out.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import lamella
from benchmarks import corpora
from benchmarks.coders import CODERS, Job, Seconds
from benchmarks.corpora import Pair
from lamella_engine.chunking import MAX_CELL_ELEMENTS, grid

ROUNDS = 5
"""Enough that one disturbed round does not move the median."""

_OURS, _MEASURE, _COPY = "lamella", "BitX", "memcpy"
_PEERS = ("ZipNN", "pcodec of delta")  # lamella does not bring these along
_STEPS = ("encode", "decode")
_PARTS = ("w", "m", "v")  # weights, and the two moments that Adam has of each
_WIDTH = 160  # also where the output is no terminal


@dataclass(frozen=True, slots=True)
class Size:
    """What a pair, or one part of it, takes."""

    part: str
    values: int
    nbytes: int
    """Decoded."""
    stored: Mapping[str, int]
    """Bytes by coder; coders that are not installed are left out."""

    def bits(self, coder: str) -> float:
        """Return the bits that a coder stores for each value."""
        return 8 * self.stored[coder] / self.values


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast the coders go over one pair."""

    rates: Mapping[tuple[str, str], float]
    """Decoded bytes a CPU second, by coder and step, ``memcpy``'s by that and ``decode``."""
    scaling: Mapping[str, float]
    """By step: two threads as a share of two processes."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured of one pair."""

    sizes: Sequence[Size]
    """The whole; if an optimizer's state belongs to it, then each of its parts."""
    speed: Speed | None
    pushed: int | None
    """Bytes that the repository grew by."""
    versions: Mapping[str, str | None]
    """Of every coder; None if it is not installed."""


def measure(
    pair: Pair,
    what: Collection[str] = ("sizes", "speed", "repositories"),
    *,
    folder: Path,
    rounds: int = ROUNDS,
    python: Path = Path(sys.executable),
) -> Outcome:
    """Measure a pair, in scratch directories under ``folder``; ``python`` is the interpreter that has the peers.

    Raises RuntimeError if a coder fails, or does not give back what it was given.
    """
    with TemporaryDirectory(dir=folder, prefix="codec-") as scratch, ExitStack() as processes:
        material = _Material(pair, Path(scratch))

        def start(coder: str) -> _Process:
            interpreter = python if coder in _PEERS else Path(sys.executable)
            return processes.enter_context(_process(material.job(coder), interpreter))

        all_running = {coder: start(coder) for coder in CODERS}
        versions = {coder: process.version() for coder, process in all_running.items()}
        running = {coder: process for coder, process in all_running.items() if versions[coder] is not None}
        stored = {coder: process.check() for coder, process in running.items()}
        speed = None
        if "speed" in what:
            speed = _race(running, start(_OURS), material.nbytes, rounds)
        pushed = _growth(pair, Path(scratch)) if "repositories" in what else None
    return Outcome(material.sizes(stored), speed, pushed, versions)


class _Material:
    """The floats of a pair as two files of raw bytes: part after part, tensor after tensor."""

    def __init__(self, pair: Pair, scratch: Path) -> None:
        self._pair = pair
        self._scratch = scratch
        self._cells: list[tuple[int, int]] = []
        self._spans: dict[str, tuple[int, int]] = {}
        self.nbytes = 0
        children, bases = load_file(pair.child), load_file(pair.base)
        names = [name for name, tensor in children.items() if tensor.is_floating_point()]
        self._width = children[names[0]].itemsize
        with (scratch / "child").open("wb") as child, (scratch / "base").open("wb") as base:
            for part in _PARTS:
                start = self.nbytes
                for name in names:
                    if _part(name) == part:
                        self._append(children[name])
                        child.write(_raw(children[name]))
                        base.write(_raw(bases[name]))
                if self.nbytes > start:
                    self._spans[part] = start, self.nbytes

    def _append(self, tensor: torch.Tensor) -> None:
        regions = grid(tuple(tensor.shape), tensor.itemsize).regions()
        self._cells += ((self.nbytes + region.start, self.nbytes + region.stop) for region in regions)
        self.nbytes += tensor.nbytes

    def _runs(self, coder: str) -> list[tuple[int, int]]:
        if CODERS[coder].whole_tensors:
            return self._cells
        step = MAX_CELL_ELEMENTS * self._width
        return [(at, min(at + step, stop)) for start, stop in self._spans.values() for at in range(start, stop, step)]

    def job(self, coder: str) -> Job:
        """Return what a coder has to do."""
        runs = self._runs(coder)
        guides = [self._guide(start) for start, _ in runs]
        return Job(coder, str(self._scratch), self._pair.dtype, self._width, runs, guides)

    def _guide(self, start: int) -> int | None:
        """Return where the second moments of first moments begin: both parts have the same tensors in one order."""
        first, stop = self._spans.get("m", (0, 0))
        return self._spans["v"][0] + start - first if first <= start < stop else None

    def sizes(self, stored: Mapping[str, Sequence[int]]) -> list[Size]:
        """Return the sizes of the whole and of its parts from those of each run, by coder."""
        spans = {"": (0, self.nbytes)} | (self._spans if len(self._spans) > 1 else {})
        return [
            Size(
                part=part,
                values=(stop - start) // self._width,
                nbytes=stop - start,
                stored={
                    coder: sum(
                        nbytes
                        for nbytes, (at, _) in zip(all_nbytes, self._runs(coder), strict=True)
                        if start <= at < stop
                    )
                    for coder, all_nbytes in stored.items()
                },
            )
            for part, (start, stop) in spans.items()
        ]


def _part(name: str) -> str:
    if name.endswith(".exp_avg_sq"):
        return "v"
    return "m" if name.endswith(".exp_avg") else "w"


def _raw(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


class _Process:
    """A coder at work in a process of its own; see ``coders``."""

    def __init__(self, job: Job, process: "subprocess.Popen[str]", errors: Path) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._job = job
        self._commands, self._answers, self._errors = process.stdin, process.stdout, errors

    def tell(self, command: str) -> None:
        print(command, file=self._commands, flush=True)

    def hear(self) -> Any:
        """Return the next answer. Raises RuntimeError if none comes."""
        if line := self._answers.readline():
            return json.loads(line)
        raise RuntimeError(f"{self._job.coder} fails: {self._errors.read_text()}")

    def version(self) -> str | None:
        version: str | None = self.hear()
        return version

    def check(self) -> list[int]:
        self.tell("check")
        nbytes: list[int] = self.hear()
        return nbytes

    def seconds(self, step: str, threads: int) -> Seconds:
        self.tell(f"{step} {threads}")
        return Seconds(**self.hear())


@contextmanager
def _process(job: Job, python: Path) -> Iterator[_Process]:
    # What is freed stays mapped, so that a coder that returns new memory for each run does not pay for its pages again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    with TemporaryDirectory(dir=job.folder) as folder:
        path, errors = Path(folder, "job.json"), Path(folder, "errors")
        path.write_text(json.dumps(asdict(job)), encoding="utf-8")
        with (
            errors.open("w") as file,
            subprocess.Popen(
                [str(python), "-W", "ignore", "-m", "benchmarks.coders", str(path)],
                cwd=Path(__file__).parents[1],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            ) as process,
        ):
            yield _Process(job, process, errors)


def _race(running: Mapping[str, _Process], twin: _Process, nbytes: int, rounds: int) -> Speed:
    """Let the coders take turns; ``twin`` is another process of lamella's, at work on the same."""
    ours = running[_OURS]
    twin.version()
    twin.check()
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for coder, process in running.items():
            for step in _STEPS:
                seconds[coder, step].append(process.seconds(step, 1).cpu)
        seconds[_COPY, "copy"].append(ours.seconds("copy", 1).cpu)
        for step in _STEPS:
            for process in (ours, twin):
                process.tell(f"{step} 1")
            both = max(Seconds(**process.hear()).wall for process in (ours, twin))
            shares[step].append(both / (2 * ours.seconds(step, 2).wall))
    return Speed(
        rates={key: nbytes / median(values) for key, values in seconds.items()},
        scaling={step: median(values) for step, values in shares.items()},
    )


def _growth(pair: Pair, scratch: Path) -> int:
    """Return the bytes that the second push of a pair adds to a new repository."""
    root = scratch / "repository"
    lamella.init(str(root)).close()
    sizes = []
    for checkpoint in (pair.base, pair.child):
        with lamella.open(str(root)) as repository:  # an open one has a log of its chunk index beside it
            repository.push(checkpoint, "pair@main")
        sizes.append(sum(file.stat().st_size for file in root.rglob("*") if file.is_file()))
    return sizes[1] - sizes[0]


def size_table(outcomes: Mapping[Pair, Outcome]) -> Table:
    """Return bits a parameter, and what they come to; which coders these are stands below."""
    table = _table("bits a parameter", "pair", "", *CODERS, f"{_MEASURE} / {_OURS}", "decoded / stored")
    for pair, outcome in outcomes.items():
        for size in outcome.sizes:
            bits = [f"{size.bits(coder):.3f}" if coder in size.stored else "-" for coder in CODERS]
            ratios = (size.stored[_MEASURE] / size.stored[_OURS], size.nbytes / size.stored[_OURS])
            table.add_row(f"{pair.name} {size.part}", pair.dtype, *bits, *(f"{ratio:.3f}" for ratio in ratios))
        packages = (
            f"{CODERS[coder].package} {version}" if version else f"{coder} is not installed"
            for coder, version in outcome.versions.items()
        )
        table.caption = ", ".join(dict.fromkeys(packages))
    return table


def speed_table(outcomes: Mapping[Pair, Outcome]) -> Table:
    """Return GB/s, and what lamella's are as a share of ``memcpy``, and on two threads of two processes."""
    table = _table("GB/s, encode / decode", "pair", "", *CODERS, _COPY, f"of {_COPY}", "2 threads of 2 processes")
    for pair, outcome in outcomes.items():
        if (speed := outcome.speed) is None:
            continue
        copied = speed.rates[_COPY, "copy"]
        rates = [
            _both(f"{speed.rates[coder, step] / 1e9:.2f}" for step in _STEPS)
            if (coder, _STEPS[0]) in speed.rates
            else "-"
            for coder in CODERS
        ]
        shares = _both(f"{speed.rates[_OURS, step] / copied:.3f}" for step in _STEPS)
        table.add_row(
            pair.name,
            pair.dtype,
            *rates,
            f"{copied / 1e9:.1f}",
            shares,
            _both(f"{speed.scaling[step]:.2f}" for step in _STEPS),
        )
    return table


def _both(values: Iterable[str]) -> str:
    return "/".join(values)


def repository_table(outcomes: Mapping[Pair, Outcome]) -> Table:
    """Return what a push adds to a repository, beside what the codec and BitX alone come to."""
    table = _table("bytes of a push", "pair", "", "decoded", "codec", "repository", "more", f"{_MEASURE} / repository")
    for pair, outcome in outcomes.items():
        if (pushed := outcome.pushed) is None:
            continue
        size = outcome.sizes[0]
        coded = size.stored[_OURS]
        table.add_row(
            pair.name,
            pair.dtype,
            *(f"{n:,}" for n in (size.nbytes, coded, pushed)),
            f"{pushed / coded - 1:.2%}, {pushed - coded:,}",
            f"{size.stored[_MEASURE] / pushed:.2f}",
        )
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for number, heading in enumerate(headings):
        # Words below one another: what is below a heading is narrower than it.
        table.add_column(heading.replace(" ", "\n"), justify="left" if number < 2 else "right", no_wrap=True)
    return table


_TABLES: Mapping[str, Callable[[Mapping[Pair, Outcome]], Table]] = {
    "sizes": size_table,
    "speed": speed_table,
    "repositories": repository_table,
}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", nargs="+", choices=tuple(_TABLES), default=tuple(_TABLES))
    parser.add_argument("--seed", type=int, default=0, help="of the pairs: 0 for development, others for judging")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="pairs whose name or dtype has one of these"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peers-venv", type=Path, help="a virtual environment that has the peers; see the README")
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="for scratch files")
    arguments = parser.parse_args()
    console = Console(width=_WIDTH)
    python = Path(sys.executable) if arguments.peers_venv is None else arguments.peers_venv.absolute() / "bin/python"
    outcomes: dict[Pair, Outcome] = {}
    for pair in corpora.pairs(
        seed=arguments.seed,
        wanted=lambda pair: any(word in pair for word in arguments.only),
        report=console.print,
    ):
        outcomes[pair] = measure(pair, arguments.what, folder=arguments.folder, rounds=arguments.rounds, python=python)
        console.print(f"{pair.name}, {pair.dtype}: {outcomes[pair].sizes[0].bits(_OURS):.3f} bits a parameter")
    for name in arguments.what:
        console.print(_TABLES[name](outcomes))


if __name__ == "__main__":
    main()
