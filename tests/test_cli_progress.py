"""Someone at a terminal sees how far the work has come; a pipe sees nothing of it."""

import io
import sys

import pytest

import lamella
from lamella.cli import terminal, text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal_at_stderr(monkeypatch):
    """Put a terminal of 200 columns at stderr; returns what it has been sent. To be called in the test: until it runs,
    stderr belongs to pytest."""

    def terminal_at_stderr():
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return terminal_at_stderr


@pytest.fixture
def clock(monkeypatch):
    """The time that is measured, in seconds: a list of one number."""
    now = [100.0]
    monkeypatch.setattr(terminal, "monotonic", lambda: now[0])
    return now


def test_a_terminal_shows_bytes_ratio_and_rate(terminal_at_stderr, clock):
    seen = terminal_at_stderr()
    with terminal.progress("pushing [bold]\x1b") as report:
        clock[0] += 2
        report(lamella.Progress(done_nbytes=64 << 20, total_nbytes=64 << 20, stored_nbytes=16 << 20))
    shown = seen.getvalue()
    assert "pushing [bold]\\x1b" in shown
    assert "64.0 MiB of 64.0 MiB, 4.0x smaller, 32.0 MiB/s" in shown


def test_what_is_shown_changes_at_most_so_often_and_at_the_end(terminal_at_stderr, clock, monkeypatch):
    said = []
    terminal_at_stderr()
    monkeypatch.setattr(text, "progress", lambda done, *_, **__: said.append(done) or "")
    with terminal.progress("pushing") as report:
        for done in range(1, 1001):
            clock[0] += 0.001
            report(lamella.Progress(done_nbytes=done, total_nbytes=1000, stored_nbytes=0))
    assert said[-1] == 1000
    assert 9 <= len(said) <= 11


@pytest.mark.parametrize(
    ("done", "stored", "seconds", "said"),
    [
        (0, 0, 0, "0 bytes of 2.0 KiB"),
        (1024, 0, 0.5, "1.0 KiB of 2.0 KiB, 2.0 KiB/s"),
        (1024, 2048, 0, "1.0 KiB of 2.0 KiB, 0.5x smaller"),
        (2048, 512, 4, "2.0 KiB of 2.0 KiB, 4.0x smaller, 512 bytes/s"),
    ],
)
def test_only_what_is_known_is_said(done, stored, seconds, said):
    assert text.progress(done, 2048, stored, seconds=seconds) == said


def test_work_that_does_not_tell_how_far_it_is_shows_what_it_does(terminal_at_stderr):
    seen = terminal_at_stderr()
    with terminal.waiting("verifying [bold]\x1b"):
        pass
    assert "verifying [bold]\\x1b" in seen.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_nothing_is_shown_where_there_is_no_terminal(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal.progress("pushing") as report:
        assert report is None
    with terminal.waiting("verifying"):
        pass
    assert stream is None or stream.getvalue() == ""


def test_a_narrow_terminal_still_shows_the_numbers(terminal_at_stderr, clock, monkeypatch):
    seen = terminal_at_stderr()
    monkeypatch.setenv("COLUMNS", "80")
    with terminal.progress("pushing " + "x" * 80) as report:
        clock[0] += 1
        report(lamella.Progress(done_nbytes=1000 << 20, total_nbytes=1000 << 20, stored_nbytes=100 << 20))
    assert "1000.0 MiB of 1000.0 MiB, 10.0x smaller, 1000.0 MiB/s" in seen.getvalue()
