"""The documents are true: what they show is run and compared, and what they name exists.

In README.md and docs/tutorial.md every ``console`` block is typed into a shell, and every ``python`` block runs, from
top to bottom, in one directory and one namespace for each document. What a document shows of the output is compared
with it: that of a ``python`` block in the ``text`` block below it, if there is one. A line ``...`` stands for any
lines. Run as a program, this file writes what is printed into documents, to be read before it is believed:

    .venv/bin/python tests/test_documents.py README.md docs/tutorial.md
"""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from safetensors.numpy import save_file
from support import noise

import lamella
from lamella.cli import run
from lamella.cli.app import app
from lamella.filesystem import LamellaFileSystem

ROOT = Path(__file__).parents[1]
TUTORIAL = Path("docs/tutorial.md")
README = Path("README.md")
EXECUTED = [README, TUTORIAL]
DOCUMENTS = [
    README,
    TUTORIAL,
    Path(".github/CONTRIBUTING.md"),
    Path("benchmarks/README.md"),
    Path("engine/FORMAT.md"),
    Path("engine/README.md"),
]

SHELL_SYNTAX = re.compile(r"[|&;<>$`*?]")

# How far a number may lie from the one in a document: other processors add floats up in another order, and another zstd
# makes other sizes of them.
DECIMALS_TOLERANCE = 0.05
SIZE_TOLERANCE = 0.25

HOME = "/home/ada"
"""What documents show for the directory that they are run in."""

UNITS = {"byte": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SIZE = re.compile(rf"(\d[\d,]*(?:\.\d+)?) ({'|'.join(UNITS)})\b")
DECIMALS = re.compile(r"\b\d+\.\d+(?:e[-+]\d+)?\b")


@dataclass
class Block:
    """A fenced block of a document."""

    language: str
    start: int
    """Number of its first line, from 0."""
    lines: list[str]


@dataclass
class Session:
    """Someone who works through a document: a directory, a shell's settings, and an interpreter that stays open."""

    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    code: int = 0
    """What the last command exited with."""

    def type(self, command: str) -> str:
        """Run a command; return what it prints, errors included."""
        words = shlex.split(command)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            os.environ[name] = value
            return ""
        if words[0] == "lamella" and not SHELL_SYNTAX.search(command):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                self.code = run(words[1:])
            return printed.getvalue()
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", f"(exit {self.code}); {command}"],
            check=False,
            env=os.environ | {"PATH": search},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.code = done.returncode
        return done.stdout

    def execute(self, code: str, place: str, *, shown: bool) -> str:
        """Run Python as at its prompt; return what it prints, values of expressions and an exception included."""
        printed = io.StringIO()
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(io.StringIO()),  # other libraries' progress
            mock.patch("sys.displayhook", lambda value: value is None or print(repr(value))),
        ):
            try:
                for node in ast.parse(code).body:
                    exec(compile(ast.Interactive([node]), place, "single"), self.namespace)
            except lamella.LamellaError as error:
                if not shown:  # a block without output that fails is a document that lies
                    raise
                printed.writelines(traceback.format_exception_only(error))
        return printed.getvalue()


def blocks(text: str) -> list[Block]:
    found: list[Block] = []
    opened: Block | None = None
    for number, line in enumerate(text.split("\n")):
        if opened is None and line.startswith("```"):
            opened = Block(line[3:], number + 1, [])
        elif opened is not None and line == "```":
            found.append(opened)
            opened = None
        elif opened is not None:
            opened.lines.append(line)
    assert opened is None, f"the block at line {opened.start} has no end"
    return found


def played(text: str) -> Iterator[tuple[int, int, list[str]]]:
    """Work through a document; yield, for each output that it shows, the range of its lines, and what came really."""
    torch.manual_seed(0)
    session = Session()
    found = blocks(text)
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.language == "console":
            starts = [number for number, line in enumerate(block.lines) if line.startswith("$ ")]
            assert starts[:1] == [0], f"the block at line {block.start} begins with output"
            for start, stop in zip(starts, [*starts[1:], len(block.lines)], strict=True):
                printed = session.type(block.lines[start].removeprefix("$ "))
                yield block.start + start + 1, block.start + stop, _lines(printed)
        elif block.language == "python":
            # Padded, so that an error says at which line of the document it happened.
            end = block.start + len(block.lines)
            shown = following is not None and following.language == "text" and following.start == end + 3
            printed = session.execute("\n" * block.start + "\n".join(block.lines), "<document>", shown=shown)
            if shown:
                yield following.start, following.start + len(following.lines), _lines(printed)


def _lines(printed: str) -> list[str]:
    return printed.replace(os.getcwd(), HOME).splitlines()


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """A new directory to work in, as someone whose environment sets nothing."""
    environment = dict(os.environ)
    for name in ("LAMELLA_REPO", "LAMELLA_DEBUG"):
        os.environ.pop(name, None)
    os.environ |= {"LOGNAME": "ada", "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}
    try:
        LamellaFileSystem.clear_instance_cache()  # it knows repositories by the paths that they were opened with
        with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of other libraries are no part of what is shown
            yield
    finally:
        os.environ.clear()
        os.environ |= environment


def alike(shown: list[str], real: list[str]) -> bool:
    """Whether output is what a document shows, for all that may differ from machine to machine and from day to day."""
    if not shown:
        return not real
    if shown[0] == "...":
        return any(alike(shown[1:], real[skipped:]) for skipped in range(len(real) + 1))
    return bool(real) and alike_line(shown[0], real[0]) and alike(shown[1:], real[1:])


def alike_line(shown: str, real: str) -> bool:
    words, sizes, decimals = zip(*map(_taken_apart, (shown, real)), strict=True)
    return (
        words[0] == words[1]
        and all(a == pytest.approx(b, rel=SIZE_TOLERANCE, abs=16) for a, b in zip(*sizes, strict=True))
        and all(a == pytest.approx(b, rel=DECIMALS_TOLERANCE) for a, b in zip(*decimals, strict=True))
    )


def _taken_apart(line: str) -> tuple[str, list[float], list[float]]:
    """Return a line without what may differ, then the sizes and the other numbers with decimals that were in it."""
    line = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "<time>", line)
    line = re.sub(r"\b(?:[0-9a-f]{64}|[0-9a-f]{12})\b", "<id>", line)
    sizes = [float(number.replace(",", "")) * UNITS[unit] for number, unit in SIZE.findall(line)]
    line = SIZE.sub("<size>", line)
    decimals = [float(number) for number in DECIMALS.findall(line)]
    return " ".join(DECIMALS.sub("<number>", line).split()), sizes, decimals


@pytest.mark.parametrize("document", EXECUTED, ids=str)
def test_what_a_document_shows_is_what_happens(document):
    text = (ROOT / document).read_text()
    lines = text.split("\n")
    with elsewhere():
        for start, stop, real in played(text):
            shown = lines[start:stop]
            assert alike(shown, real), "\n".join(
                [f"{document}:{start + 1} shows", *shown, "", "but this is printed:", *real]
            )


def test_the_comparison_sees_what_is_wrong():
    line = "pushed bert@v2 5ba8c9e1f20d: 23 tensors, 317.0 KiB at 2026-11-21T06:51:36.030322Z, 0.6473"
    assert alike([line], [line.replace("5ba8c9e1f20d", "000000000000").replace("T06", "T07").replace("317", "320")])
    for right, wrong in [("v2", "v3"), ("23", "24"), ("317.0 KiB", "31.7 KiB"), ("0.6473", "0.7"), ("at", "to")]:
        assert not alike([line], [line.replace(right, wrong)])
    assert not alike([line], [])
    assert not alike([], [line])
    assert alike(["a", "...", "d"], ["a", "b", "c", "d"])
    assert alike(["a", "...", "d"], ["a", "d"])
    assert not alike(["a", "...", "d"], ["a", "b", "c"])


COMMAND = typer.main.get_command(app)
VERBS = list(COMMAND.commands)


def example_of(verb: str) -> str:
    """Return the one example at the end of a verb's help."""
    (example,) = re.findall(r"Example:\n  (.+)\Z", COMMAND.commands[verb].epilog)
    return example


def test_every_example_of_the_help_runs():
    def checkpoint(seed):
        return {"encoder.layer.0.weight": noise(seed, 8, 8), "pooler.bias": noise(seed, 100)}

    with elsewhere():
        with lamella.init(".") as repo:
            for seed in range(3):
                repo.push(checkpoint(seed), "bert@main")
        save_file(checkpoint(3), "model.safetensors")
        session = Session()
        for verb in VERBS:
            if verb == "serve":  # it goes on until a signal comes; test_cli_service.py runs it
                continue
            command, _, _ = example_of(verb).partition(" >> ")
            printed = session.type(command)
            assert session.code == 0, f"{command}\n{printed}"


def test_every_verb_has_an_example_of_itself():
    for verb in VERBS:
        assert verb in shlex.split(example_of(verb)), verb


def linked(document: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(document: Path) -> list[str]:
    """Return the anchors that a forge gives to the headings of a document."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_to_files_and_headings(document):
    for link in linked(document):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            place = (ROOT / document).parent / path if path else ROOT / document
            assert place.exists(), f"{document} links to {link}"
            assert not anchor or anchor in anchors(place), f"{document} links to {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_paths_that_are_named_exist(document):
    folders = "engine|client|tests|benchmarks|cpp_ext|docs|examples|.ci|.github".replace(".", r"\.")
    made_by_use = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", (ROOT / document).read_text()):
        assert (ROOT / path).exists() or path.rstrip("/") in made_by_use, f"{document} names {path}"


def test_every_verb_and_every_public_name_is_in_the_readme_or_the_tutorial():
    text = "\n".join((ROOT / document).read_text() for document in EXECUTED)
    missing = [verb for verb in VERBS if not re.search(rf"\blamella (?:-C \S+ )?{verb}\b", text)]
    missing += [name for name in lamella.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_the_errors_in_the_tutorial_are_the_errors_that_there_are():
    rows = re.findall(r"^\| `(\w+Error)` \| (\d+) \|", (ROOT / TUTORIAL).read_text(), re.MULTILINE)
    codes = {name: int(code) for name, code in rows}
    real = {
        name: value.exit_code
        for name, value in vars(lamella).items()
        if isinstance(value, type) and lamella.LamellaError in value.__bases__
    }
    assert codes == real


def test_the_readme_and_the_makefile_know_the_same_commands():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for document in DOCUMENTS:
        named = re.findall(r"^make (\w+)|`make (\w+)`", (ROOT / document).read_text(), re.MULTILINE)
        assert {name for pair in named for name in pair if name} <= set(targets), document


def test_the_floors_of_the_architecture_are_those_that_the_linter_holds_us_to():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == ["lamella_engine"])
    (picture,) = (
        block.lines
        for block in blocks((ROOT / "engine/README.md").read_text())
        if any(line.split()[:1] == ["repository"] for line in block.lines)
    )
    floors = [set(re.split(r" {3,}", line)[0].split()) for line in picture if line]
    assert floors == [set(layer.split(" | ")) for layer in layers]


def rewritten(text: str) -> str:
    """Return a document with the outputs that it shows replaced by the real ones; what is left out stays left out."""
    lines = text.split("\n")
    for start, stop, real in reversed(list(played(text))):
        shown = lines[start:stop]
        if "..." in shown and alike(shown, real):
            head = shown.index("...")
            real[head : len(real) - (len(shown) - head - 1)] = ["..."]
        lines[start:stop] = real
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        before = (ROOT / name).read_text()
        with elsewhere():
            after = rewritten(before)
        (ROOT / name).write_text(after)
