"""Ctrl-C and SIGTERM, at whichever system call they come: one line, the right exit code, and nothing half-written.

A command is run again and again, and the signal comes one call later each time, until the command ends before it does.
Whoever sends it is impatient: it comes again at every call that follows, also while the command tidies up.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from itertools import count

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import bits, noise

import lamella
from lamella import cli
from lamella.cli import main

SYSTEM_CALLS = ("open", "pread", "mkdir", "writev", "fsync", "link", "replace")
"""What reads, writes and names files."""

TIDYING_UP = ("unlink", "rmdir")
"""What removes them; only the second signal comes here, and later ones."""


SIGNALS = (
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "terminated"),
    (signal.SIGHUP, 129, "hung up"),
)
"""Signal, exit code, what is said; sweeps take them in turn."""


@pytest.fixture(autouse=True)
def _handlers():
    """Afterwards signals do again what they did: pytest wants to be interrupted as well."""
    before = {number: signal.getsignal(number) for number, _, _ in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_watchers_of_the_garbage_collector():
    """Hypothesis times collections with a callback; an exception that a signal raises inside one is lost."""
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = callbacks


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """No power fails here, and these tests would do little but wait."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command as the script does; returns code, stdout, stderr."""

    def call(*arguments):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as a new process has them
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        monkeypatch.setattr(sys, "argv", ["lamella", *map(str, arguments)])
        code = main()
        # A thread of the probe that was being started is in nobody's list; a process waits for it before it ends.
        for thread in threading.enumerate():
            if thread.name.startswith("ThreadPoolExecutor"):
                thread.join()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def interrupted(call, monkeypatch):
    """Run a command with a signal at its n-th system call and later; returns None if it ended before that."""

    def interrupted(number, n, *arguments):
        calls = count()
        sent = []

        def stopping(name, real):
            def stopped(*given, **options):
                if sent or (name in SYSTEM_CALLS and next(calls) == n):
                    sent.append(name)
                    signal.raise_signal(number)
                return real(*given, **options)

            return stopped

        with monkeypatch.context() as patched:
            for name in SYSTEM_CALLS + TIDYING_UP:
                patched.setattr(os, name, stopping(name, getattr(os, name)))
            done = call(*arguments)
        return done if sent else None

    return interrupted


@pytest.fixture
def weights(tmp_path):
    """A repository on disk with a file and a directory of two files; returns it with what was pushed."""
    file = tmp_path / "model.safetensors"
    save_file({"w": np.arange(100_000, dtype=np.float32), "b": np.ones(5, np.float32)}, file)
    directory = tmp_path / "model"
    (directory / "part").mkdir(parents=True)
    save_file({"w": np.arange(70_000, dtype=np.float32)}, directory / "part" / "one.safetensors")
    (directory / "config.json").write_text(json.dumps({"layers": 1}))
    with lamella.init(tmp_path / "weights") as repo:
        repo.push(file, "bert@file")
        repo.push(directory, "bert@directory")
    return tmp_path / "weights", {"file": file, "directory": directory}


def files_in(place):
    """Return path and bytes of every file below a directory, hidden ones too; nothing if it is not there."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if not path.is_dir()}


def assert_sound(repository):
    """Check that a repository is whole, and holds no file that was half-written."""
    assert not [path for path in files_in(repository) if "/." in f"/{path}"]
    with lamella.open(repository) as repo:
        assert repo.verify(deep=True).ok


def test_an_interrupted_push_leaves_a_sound_repository_to_push_to_again(weights, tmp_path, interrupted, call):
    tensors = {"w": noise(1, 50_000)}
    save_file(tensors, tmp_path / "next.safetensors")
    for n in count():
        number, code, said = SIGNALS[n % 3]
        repository = shutil.copytree(weights[0], tmp_path / f"weights-{n}")
        push = ("-C", repository, "push", tmp_path / "next.safetensors", "bert@file")
        done = interrupted(number, n, *push)
        if done is None:
            break
        assert done == (code, "", f"lamella: {said}\n")
        assert_sound(repository)
        assert call(*push)[0] == 0
        with lamella.open(repository) as repo:
            assert repo.version("bert@file").number == 3
            assert bits(repo.checkout("bert@file")) == bits(tensors)
    assert n > 10


@pytest.mark.parametrize("branch", ["file", "directory"])
def test_an_interrupted_checkout_leaves_all_files_or_none(branch, weights, tmp_path, interrupted):
    repository, pushed = weights
    source = pushed[branch]
    whole = files_in(source) if source.is_dir() else {source.name: source.read_bytes()}
    nothing = 0
    for n in count():
        number, code, said = SIGNALS[n % 3]
        out = tmp_path / f"out-{n}"
        done = interrupted(number, n, "-C", repository, "checkout", f"bert@{branch}", out)
        if done is None:
            break
        assert done == (code, "", f"lamella: {said}\n")
        left = files_in(out)
        assert left in ({}, whole)
        nothing += not left
    assert nothing > 5
    assert files_in(out) == whole


def test_an_interrupted_init_can_be_done_again(tmp_path, interrupted, call):
    for n in count():
        number, code, said = SIGNALS[n % 3]
        place = tmp_path / f"new-{n}"
        done = interrupted(number, n, "init", place)
        if done is None:
            break
        assert done == (code, "", f"lamella: {said}\n")
        assert call("init", place)[0] in (0, lamella.AlreadyExistsError.exit_code)
        with lamella.open(place) as repo:
            repo.push({"w": noise(n, 100)}, "bert@main")
        assert_sound(place)
    assert n > 3


@pytest.mark.parametrize(("number", "code", "said"), SIGNALS)
def test_an_interruption_is_an_error_document_with_json(number, code, said, weights, interrupted):
    repository, _ = weights
    ended, out, err = interrupted(number, 0, "-C", repository, "stats", "--json")
    assert (ended, out) == (code, "")
    assert json.loads(err) == {"error": {"kind": said, "message": said, "context": {}}}


def test_an_interruption_at_the_last_moment_is_reported_too(weights, call, monkeypatch):
    repository, _ = weights
    monkeypatch.setattr(cli, "run", lambda _: signal.raise_signal(signal.SIGINT))
    assert call("-C", repository, "stats") == (130, "", "lamella: interrupted\n")


def test_a_signal_that_is_ignored_stays_so(weights, call, monkeypatch):
    """As below ``nohup``, and for what a script runs in the background."""
    repository, _ = weights
    real = lamella.open

    def opening(url):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        cli._listen()
        signal.raise_signal(signal.SIGINT)
        return real(url)

    monkeypatch.setattr(lamella, "open", opening)
    assert call("-C", repository, "stats")[0] == 0


def test_a_process_that_is_interrupted_says_one_line_and_exits_with_130(weights):
    """The signal comes when the repository is opened, sent by the process to itself: no clock is involved."""
    repository, _ = weights
    program = (
        "import os, signal, sys\nimport lamella\nfrom lamella.cli import main\nreal = lamella.open\n"
        "lamella.open = lambda url: (signal.raise_signal(signal.SIGINT), real(url))[1]\nsys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "-C", str(repository), "stats"], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"lamella: interrupted\n")
