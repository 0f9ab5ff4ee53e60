"""Shells complete verbs, options, paths and revisions; a shell that asks in vain hears nothing."""

import os
import subprocess
import sys

import numpy as np
import pytest
import typer

import lamella
from lamella.cli import completion, run
from lamella.cli.app import app

PROGRAM = "import sys; from lamella.cli import main; sys.exit(main())"


@pytest.fixture
def place(tmp_path):
    """A directory with an executable ``lamella``, a repository in ``weights``, and a file."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "lamella"
    program.write_text(f"#!{sys.executable}\n{PROGRAM}\n")
    program.chmod(0o755)
    (tmp_path / "model.safetensors").touch()
    with lamella.init(tmp_path / "weights") as repo:
        for model, branch in (("bert", "main"), ("bert", "trial"), ("gpt", "main")):
            repo.push({"w": np.ones(3, np.float32)}, f"{model}@{branch}", message=branch)
        repo.tag("bert@release-1", "bert@v1")
    return tmp_path


@pytest.fixture
def complete(place, monkeypatch, capsys):
    """Ask as a shell does what could stand at the end of a line; returns the candidates, having heard nothing else."""

    def complete(line, shell="complete_fish"):
        monkeypatch.chdir(place)
        monkeypatch.setenv(completion.VARIABLE, shell)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        completion.reply(typer.main.get_group(app))
        captured = capsys.readouterr()
        assert captured.err == ""
        return [candidate.split("\t")[0] for candidate in captured.out.splitlines() if candidate]

    return complete


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("lamella ch", ["checkout"]),
        ("lamella -C weights ve", ["verify", "version"]),
        ("lamella stats --j", ["--json"]),
        ("lamella checkout --verify ", ["blob", "chunk"]),
        ("lamella schema pu", ["push"]),
        ("lamella completion ", ["bash", "zsh", "fish"]),
        ("lamella -C weights show gpt", ["gpt@main", "gpt@latest"]),
        ("lamella -C weights show bert@", ["bert@main", "bert@release-1", "bert@trial", "bert@latest"]),
        ("lamella -C weights show gpt@main bert@t", ["bert@trial"]),
        ("lamella -C weights log g", ["gpt", "gpt@main", "gpt@latest"]),
        ("lamella -C weights diff bert@main bert@r", ["bert@release-1"]),
        ("lamella -C weights push model.safetensors b", ["bert@main", "bert@trial"]),
        ("lamella -C weights push --parent gpt@l", ["gpt@latest"]),
        ("lamella -C weights tag --delete ", ["bert@release-1"]),
        ("lamella -C weights branch bert@trial gpt@m", ["gpt@main"]),
        ("lamella -C weights push ", []),  # a path: that is for the shell
        ("lamella -C weights show 'bert@m", ["bert@main"]),
    ],
)
def test_a_word_is_completed(line, candidates, complete):
    assert complete(line) == candidates


def test_the_repository_is_that_of_the_environment(complete, place, monkeypatch):
    monkeypatch.setenv("LAMELLA_REPO", str(place / "weights"))
    assert complete("lamella show gpt@m") == ["gpt@main"]


@pytest.mark.parametrize(
    "line",
    ["lamella -C nowhere show b", "lamella show b", "lamella stats x", "lamella -C '' show ", "lamella show \0"],
)
def test_a_shell_that_asks_in_vain_hears_nothing(line, complete):
    assert complete(line.replace("\0", "b\x1b@\udc80")) == []


def test_a_repository_that_is_damaged_says_nothing(complete, place):
    for entry in (place / "weights" / "log").iterdir():
        entry.write_bytes(b"nonsense")
    assert complete("lamella -C weights show b") == []


def test_a_shell_that_is_not_known_hears_nothing(complete):
    assert complete("lamella sh", shell="complete_csh") == []
    assert complete("lamella sh", shell="nonsense") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_asks_for_what_is_answered(shell, capsys):
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"{completion.VARIABLE}=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS=" in script


@pytest.mark.parametrize(
    ("line", "words", "reply"),
    [
        ("lamella ch", ["lamella", "ch"], ["checkout"]),
        # bash puts the reply behind the @ at which it parted the word
        ("lamella -C weights show gpt@", ["lamella", "-C", "weights", "show", "gpt", "@"], ["main", "latest"]),
        ("lamella -C weights show gpt@m", ["lamella", "-C", "weights", "show", "gpt", "@", "m"], ["main"]),
        ("lamella -C weights push mo", ["lamella", "-C", "weights", "push", "mo"], []),
    ],
)
def test_the_script_of_bash_does_what_bash_expects(line, words, reply, place):
    """Calls the function as bash does; an empty reply lets it complete paths."""
    program = """
        eval "$(lamella completion bash)" && COMP_LINE=$1 COMP_POINT=${#1} && shift
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _lamella_completion lamella "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\\n' "${#COMPREPLY[@]}" "${COMPREPLY[@]}"; complete -p lamella
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", line, *words],
        env=os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}"},
        cwd=place,
        capture_output=True,
        text=True,
    )
    count, *found, registered = done.stdout.splitlines()
    assert (done.stderr, found[: int(count)]) == ("", reply)
    assert registered == "complete -o default -F _lamella_completion lamella"
