"""What leaves the command line: lines and JSON, escaped, and a sign of life while someone waits."""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO


def printable(text: str) -> str:
    r"""Return ``text`` with everything that could drive a terminal, or be no character at all, as ``\x1b`` and alike.

    Escaped are control and format characters (line ends and the overrides of writing direction among them), odd spaces,
    and the halves of characters that stand for undecodable bytes in names. Applying it twice changes nothing more.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


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
        stream.writelines(f"{printable(line)}\n" for line in lines)


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


def table(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> Iterator[str]:
    """Yield rows as lines with their columns aligned, those of ``right`` at their right edge."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    flush_right = set(right)
    for row in rows:
        cells = (
            cell.rjust(width) if place in flush_right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """Show ``doing``, a spinner and the time on stderr for as long as the block runs; nothing if it is no terminal.

    How far the work has come is not known here, so none of it is claimed.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    # Imported on use: it takes longer than many a verb.
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(printable(doing), total=None)
        yield
