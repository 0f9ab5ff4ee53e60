"""What leaves the command line: lines and JSON, escaped, and how far the work has come while someone waits."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, TextIO

from lamella.cli import text

if TYPE_CHECKING:
    import lamella

REFRESH_SECONDS = 0.1
"""How often what is shown may change: work reports each of its cells, and an eye takes in less."""

BAR_WIDTH = 12
"""In characters: with it a terminal of 80 has room for the numbers, and for what is being done in a word or two."""


def show(lines: Iterable[str]) -> None:
    """Write lines to stdout."""
    _write(sys.stdout, lines)


def show_json(document: Mapping[str, Any]) -> None:
    """Write one document to stdout, in ASCII."""
    _write(sys.stdout, json.dumps(_plain(document), indent=2, allow_nan=False).split("\n"))


def warn(lines: Iterable[str]) -> None:
    """Write lines to stderr; if that cannot be written either, there is nobody left to tell, and nothing happens."""
    try:
        _write(sys.stderr, lines)
    except OSError:
        discard(sys.stderr)


def warn_json(document: Mapping[str, Any]) -> None:
    """Write one document to stderr as :func:`warn` does, on one line: warnings of others may stand beside it."""
    warn([json.dumps(_plain(document), allow_nan=False)])


def _write(stream: TextIO | None, lines: Iterable[str]) -> None:
    # Not typer.echo: where the encoding is ASCII it writes UTF-8 all the same, whose bytes can be control characters
    # to a terminal that does not know it.
    if stream is not None:  # as it is where the caller closed it
        stream.writelines(f"{text.printable(line)}\n" for line in lines)


def discard(stream: TextIO) -> None:
    """Send what ``stream`` still holds nowhere, or the interpreter would fail at it once more on its way out."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    return str(value)


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """Show ``doing``, a spinner and the time on stderr for as long as the block runs; nothing if it is no terminal.

    For work that does not tell how far it has come; :func:`progress` is for work that does.
    """
    with _live(doing):
        yield


@contextmanager
def progress(doing: str) -> "Iterator[Callable[[lamella.Progress], None] | None]":
    """Show ``doing``, a bar, bytes, ratio and rate on stderr for as long as the block runs.

    Yields what is to be called whenever the work has come further; None if stderr is no terminal, and nothing is shown.
    It costs next to nothing, however often it is called.
    """
    with _live(doing) as update:
        yield None if update is None else _throttled(update)


def _throttled(update: Callable[..., None]) -> "Callable[[lamella.Progress], None]":
    began = shown = monotonic()

    def report(at: "lamella.Progress") -> None:
        nonlocal shown
        now = monotonic()
        if now - shown >= REFRESH_SECONDS or at.done_nbytes == at.total_nbytes:
            shown = now
            said = text.progress(at.done_nbytes, at.total_nbytes, at.stored_nbytes, seconds=now - began)
            update(completed=at.done_nbytes, total=at.total_nbytes, said=said)

    return report


@contextmanager
def _live(doing: str) -> Iterator[Callable[..., None] | None]:
    """Show a line that moves; yields what updates it, or None if stderr is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    # Imported on use: it takes longer than many a verb.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    # In a narrow terminal what is known already gives way to what is not.
    yielding = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=yielding),
        BarColumn(bar_width=BAR_WIDTH),
        TextColumn("{task.fields[said]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as live:
        task = live.add_task(text.printable(doing), total=None, said="")
        yield partial(live.update, task)
