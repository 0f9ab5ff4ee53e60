"""The command line: ``lamella VERB ...``, one verb for each thing that a repository does.

What a program can count on:

* With ``--json`` a verb that succeeds writes one JSON document to stdout, and one that fails writes one to stderr, on
  one line, and nothing to stdout. ``schema.json`` says what is in them; ``lamella schema`` prints it.
* The exit code is that of the error's class (:mod:`lamella_engine.errors`): 0 done, 2 usage, 3 not found, 4 conflict,
  5 permission, 6 damage, 7 storage, 8 outcome unknown, 9 limit; 70 for a bug of lamella. 129, 130, 143 and 141 are a
  terminal that went away, Ctrl-C, SIGTERM and a reader of stdout that went away. (In the first third of a second, while
  Python imports, a signal ends the process as it ends any.)
* Text for people has no such promise. What is not printable in it is escaped: a name cannot drive a terminal.

Errors are one line, ``lamella: <message>``. A traceback is shown only where ``LAMELLA_DEBUG=1`` is set.

Read upwards:

    app                                         the verbs put together
    transfer  history  refs  upkeep  service    the verbs: from arguments to a document
    documents  schema                           nouns as JSON, and what is promised of it
    parameters  completion                      what verbs share; what a shell may ask
    terminal                                    bytes to stdout and stderr
    text  graph                                 documents as lines for people; a history as a picture
"""

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from itertools import takewhile
from types import FrameType
from typing import NoReturn

import typer

from lamella.cli import completion, terminal
from lamella.cli.app import app
from lamella_engine.errors import (
    BUG_EXIT_CODE,
    InvalidInputError,
    LamellaError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
)

PROGRAM = "lamella"

# What a shell reports of a process that a signal ended.
_SIGNALLED = 128

# Signals that end a command, and what is said then. The last comes where a terminal goes away.
_SIGNALS: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}

# Whoever asks twice is no reason to stop tidying up half-way, which waits for a few chunks at most. Whoever asks again
# after so many seconds means it.
_TIDYING_UP_S = 10.0


def main() -> int:
    """Run this process's command line; the script's entry point. Returns the exit code."""
    _listen()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what gRPC has to say is no line of ours
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without the character is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        if completion.VARIABLE in os.environ:
            completion.reply(typer.main.get_group(app))
            code = 0
        else:
            code = run(sys.argv[1:])
        if sys.stdout is not None:  # it is None where the caller closed it
            sys.stdout.flush()
    except BrokenPipeError:
        code = _SIGNALLED + signal.SIGPIPE
        terminal.discard(sys.stdout)
    except (KeyboardInterrupt, _Stopped) as stop:
        code = _report_stop(stop, as_json=_wants_json(sys.argv))
    except OSError as error:
        code = _report(_from_os(error), as_json=_wants_json(sys.argv))
        terminal.discard(sys.stdout)
    return code


def run(arguments: Sequence[str]) -> int:
    """Run one command in this process.

    Parameters
    ----------
    arguments
        What follows the program's name, such as ``["-C", "weights", "stats", "--json"]``.

    Returns
    -------
    int
        The exit code. Whatever went wrong has been reported on stderr.

    Raises
    ------
    BrokenPipeError
        Nobody reads stdout any more.
    """
    as_json = _wants_json(arguments)
    try:
        return _invoke(arguments)
    except LamellaError as error:
        return _report(error, as_json=as_json)
    except (KeyboardInterrupt, _Stopped) as stop:
        return _report_stop(stop, as_json=as_json)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _report(_from_os(error), as_json=as_json)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        _say(
            f"this is a bug in lamella: {said} (run with LAMELLA_DEBUG=1 for the traceback)",
            kind="bug",
            as_json=as_json,
        )
        return BUG_EXIT_CODE


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether errors shall be JSON; has to be known before the arguments are parsed, for that may be what fails."""
    return "--json" in takewhile(lambda argument: argument != "--", arguments)


def _invoke(arguments: Sequence[str]) -> int:
    """Parse and execute, without the error pages, tracebacks and exits that typer would add."""
    command = typer.main.get_command(app)
    try:
        with command.make_context(PROGRAM, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as error:
        where = getattr(getattr(error, "ctx", None), "command_path", None)
        if where is None:
            verb = next((argument for argument in arguments if argument in getattr(command, "commands", ())), "")
            where = f"{PROGRAM} {verb}".rstrip()
        said = " ".join(error.format_message().split())  # typer lists choices over several lines
        said = said.replace("Value error, ", "").replace("Input should be", "it must be")
        said = f"{said[:1].lower()}{said[1:]}".rstrip(".")
        advice = f" See {where} --help" if said.endswith("?") else f": see {where} --help"
        raise InvalidInputError(said + advice, kind="usage") from None
    return 0


def _from_os(error: OSError) -> LamellaError:
    """Return what the operating system refused as an error of the tree: it is no bug, wherever it surfaced."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return NotFoundError(
            "the working directory was deleted: change to one that exists, or give absolute paths",
            kind="no_working_directory",
        )
    said = (error.strerror or str(error)) + (f": {error.filename}" if error.filename else "")
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"{said}: ask for access, or choose another place")
    return StorageError(f"{said}: check that the place exists, has room and can be written", kind="os_error")


def _report(error: LamellaError, *, as_json: bool) -> int:
    _say(error.message, kind=error.kind, context=error.context, as_json=as_json)
    return error.exit_code


def _report_stop(stop: BaseException, *, as_json: bool) -> int:
    number = stop.number if isinstance(stop, _Stopped) else signal.SIGINT
    said = _SIGNALS[number]
    _say(said, kind=said, as_json=as_json)
    return _SIGNALLED + number


def _say(message: str, *, kind: str, as_json: bool, context: dict[str, object] | None = None) -> None:
    """Report a failure; inside an ``except``."""
    if os.environ.get("LAMELLA_DEBUG") == "1":
        terminal.warn(traceback.format_exc().splitlines())
    if as_json:
        terminal.warn_json({"error": {"kind": kind, "message": message, "context": context or {}}})
    else:
        terminal.warn([f"{PROGRAM}: {message}"])


class _Stopped(BaseException):
    """A signal came. An exception, as Ctrl-C is, so that what is half-written is removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _listen() -> None:
    """Let signals end the command, unless whoever started it has them ignored."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    patience = time.monotonic() + _TIDYING_UP_S

    def again(signum: int, frame: FrameType | None) -> None:
        if time.monotonic() > patience:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    for number in _SIGNALS:
        signal.signal(number, again)
    raise KeyboardInterrupt if signum == signal.SIGINT else _Stopped(signum)
