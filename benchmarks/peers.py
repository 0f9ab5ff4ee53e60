"""A family of checkpoints in lamella, and in what people use today.

    python -m benchmarks.peers [--peers-venv DIR] [--rounds N] [--only NAME ...] [--folder DIR]

Every contender stores the checkpoints one after another, then writes all of them back as files. What is shown: bytes of
its folder over bytes that went in, caches and metadata included; seconds, synced, as a multiple of ``cp`` in the same
round; whether what came back is what went in. ``contenders`` says how each is used.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors import deserialize

from benchmarks import corpora
from benchmarks.contenders import ANSWER, CONTENDERS, Answer, Job, Source
from benchmarks.corpora import Checkpoint, Precision

ROUNDS = 3
"""Enough that one disturbed round does not move the median."""

PATIENCE = 60.0
"""Seconds. A contender that took longer than this in one round is not asked again; so much noise does not matter."""

_FIRST = "cp"
_WIDTH = 130  # also where the output is no terminal


@dataclass(frozen=True, slots=True)
class Outcome:
    """One contender on one precision of the family."""

    version: str
    stored_nbytes: int
    storing: float
    """Median over the rounds of its seconds over those of ``cp``."""
    loading: float
    seconds: tuple[float, float]
    """Medians: to store, to load."""
    rounds: int
    back: str
    """``file`` if every file came back byte for byte, ``tensors`` if every tensor did, else ``changed``."""


Outcomes = Mapping[str, Outcome | str]
"""By contender; a string says why there is no outcome."""


@dataclass(frozen=True, slots=True)
class _Round:
    """Seconds, or multiples of those of ``cp``."""

    storing: float
    loading: float


def compare(
    family: Sequence[Checkpoint],
    precision: Precision,
    *,
    folder: Path,
    rounds: int,
    names: Iterable[str] = tuple(CONTENDERS),
    python: Path = Path(sys.executable),
) -> Outcomes:
    """Run contenders in turn, ``rounds`` times, in scratch directories under ``folder``.

    ``python`` is the interpreter that has the peers; lamella and ``cp`` run in this one.
    """
    sources = [Source(item.name, item.parent, item.branch, str(item.path(precision).resolve())) for item in family]
    taken: dict[str, list[_Round]] = defaultdict(list)
    ratios: dict[str, list[_Round]] = defaultdict(list)
    outcomes: dict[str, Outcome | str] = {}
    names = [_FIRST, *(name for name in names if name != _FIRST)]
    for number in range(rounds):
        # In another order each time, so that nobody always comes after the same one; cp, the measure, is the first.
        turn = names[:1] + names[1:][number:] + names[1:][:number]
        for name in turn:
            so_far = outcomes.get(name)
            if isinstance(so_far, str) or (
                number and max(item.storing + item.loading for item in taken[name]) > PATIENCE
            ):
                continue
            interpreter = Path(sys.executable) if name in (_FIRST, "lamella") else python
            with TemporaryDirectory(dir=folder, prefix="peers-") as scratch:
                run = _Run(Path(scratch).resolve(), interpreter, Job(name, "", sources, precision, None))
                try:
                    stored, stored_nbytes = run.store()
                    loaded, back = run.load(check=number == 0)
                except _FailedError as error:
                    outcomes[name] = str(error)
                    continue
            taken[name].append(_Round(stored.seconds, loaded.seconds))
            measure = taken[_FIRST][number]
            ratios[name].append(_Round(stored.seconds / measure.storing, loaded.seconds / measure.loading))
            outcomes[name] = Outcome(
                version=stored.version,
                stored_nbytes=stored_nbytes,
                storing=statistics.median(item.storing for item in ratios[name]),
                loading=statistics.median(item.loading for item in ratios[name]),
                seconds=(
                    statistics.median(item.storing for item in taken[name]),
                    statistics.median(item.loading for item in taken[name]),
                ),
                rounds=len(taken[name]),
                back=back or (so_far.back if isinstance(so_far, Outcome) else ""),
            )
    return {name: outcomes[name] for name in names}


class _FailedError(Exception):
    """Why a contender has no outcome, in a line."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One contender, once, in a scratch directory of its own."""

    scratch: Path
    python: Path
    job: Job

    def store(self) -> tuple[Answer, int]:
        """Store everything; return what it took, and bytes stored."""
        place = self.scratch / "place"
        place.mkdir()
        answer = self._do(replace(self.job, place=str(place)))
        return answer, sum(file.lstat().st_size for file in place.rglob("*") if file.is_file())

    def load(self, *, check: bool) -> tuple[Answer, str]:
        """Load everything; return what it took, and what came back if that is to be checked."""
        out = self.scratch / "out"
        out.mkdir()
        answer = self._do(replace(self.job, place=str(self.scratch / "place"), out=str(out)))
        return answer, what_came_back(self.job.sources, out) if check else ""

    def _do(self, job: Job) -> Answer:
        path = self.scratch / "job.json"
        path.write_text(json.dumps(asdict(job)), encoding="utf-8")
        (self.scratch / ANSWER).unlink(missing_ok=True)
        # A home of its own, in what is counted: no tool touches the user's settings, and its caches are its own bytes.
        home = Path(job.place, "home")
        home.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "DVC_SITE_CACHE_DIR": str(home / "dvc"),
            "DVC_NO_ANALYTICS": "1",
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
        }
        command = [str(self.python), "-W", "ignore", "-m", "benchmarks.contenders", str(path)]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise _FailedError(_why(done.stderr))
        return Answer(**json.loads((self.scratch / ANSWER).read_text(encoding="utf-8")))


def _why(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it said nothing"]
    missing = ("PackageNotFoundError", "ModuleNotFoundError", "FileNotFoundError: [Errno 2] No such file or directory")
    if any(kind in lines[-1] for kind in missing):
        return "not installed"
    error = next((line for line in reversed(lines) if "Error" in line), lines[-1])
    return f"fails: {error[:80]}"


def what_came_back(sources: Sequence[Source], out: Path) -> str:
    """Compare what lies in ``out`` with the sources; see ``Outcome.back``."""
    pairs = [(Path(source.path).read_bytes(), (out / source.name).read_bytes()) for source in sources]
    if all(hashlib.sha256(before).digest() == hashlib.sha256(after).digest() for before, after in pairs):
        return "file"
    return "tensors" if all(_tensors(before) == _tensors(after) for before, after in pairs) else "changed"


def _tensors(file: bytes) -> dict[str, Any]:
    tensors: list[tuple[str, Any]] = deserialize(file)  # type: ignore[no-untyped-call]
    return dict(tensors)


def table(comparisons: Mapping[Precision, Outcomes], decoded_nbytes: Mapping[Precision, int]) -> Table:
    """Return what a reader wants to see of the comparisons, why something is missing under it."""
    result = Table("", box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
    result.title = "; ".join(_title(precision, comparisons, decoded_nbytes) for precision in comparisons)
    for precision in comparisons:
        for heading in ("stored", "store", "load"):
            result.add_column(f"{precision}\n{heading}", justify="right", no_wrap=True)
    result.add_column("what came\nback equal")
    result.add_column("one layer\nalone")
    missing = []
    for name in next(iter(comparisons.values())):
        outcomes = {precision: comparison[name] for precision, comparison in comparisons.items()}
        cells = [
            cell
            for precision, outcome in outcomes.items()
            for cell in _cells(outcome, decoded_nbytes[precision], _first(comparisons[precision]).rounds)
        ]
        missing += [f"{name}, {precision}: {why}" for precision, why in outcomes.items() if isinstance(why, str)]
        measured = [outcome for outcome in outcomes.values() if isinstance(outcome, Outcome)]
        if measured:
            back = ", ".join(sorted({outcome.back for outcome in measured}))
            result.add_row(f"{name} {measured[0].version}", *cells, back, CONTENDERS[name].layer_alone)
    result.caption = "\n".join(missing)
    return result


def _title(
    precision: Precision, comparisons: Mapping[Precision, Outcomes], decoded_nbytes: Mapping[Precision, int]
) -> str:
    storing, loading = _first(comparisons[precision]).seconds
    mib = decoded_nbytes[precision] / (1 << 20)
    return f"{precision}: {mib:,.0f} MiB, which {_FIRST} stores in {storing:.2f} s and loads in {loading:.2f} s"


def _first(outcomes: Outcomes) -> Outcome:
    first = outcomes[_FIRST]
    assert isinstance(first, Outcome), first
    return first


def _cells(outcome: Outcome | str, decoded_nbytes: int, rounds: int) -> tuple[str, str, str]:
    if isinstance(outcome, str):
        return "-", "-", "-"
    share = f"{outcome.stored_nbytes / decoded_nbytes:.1%}"
    once = ", once" if outcome.rounds < rounds else ""
    return share, f"{outcome.storing:.1f} x{once}", f"{outcome.loading:.1f} x"


def main() -> None:
    """Compare on the published model's family, in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers-venv", type=Path, help="a virtual environment that has the peers; see the README")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="where to write; its disk is measured")
    arguments = parser.parse_args()
    console = Console(width=_WIDTH)
    family = corpora.minilm_family(report=console.print)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    python = Path(sys.executable) if arguments.peers_venv is None else arguments.peers_venv.absolute() / "bin/python"
    comparisons = {
        precision: compare(
            family, precision, folder=arguments.folder, rounds=arguments.rounds, names=arguments.only, python=python
        )
        for precision in corpora.PRECISIONS
    }
    decoded = {
        precision: sum(item.path(precision).stat().st_size for item in family) for precision in corpora.PRECISIONS
    }
    console.print(table(comparisons, decoded), crop=False)


if __name__ == "__main__":
    main()
