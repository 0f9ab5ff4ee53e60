"""The repository as a whole, and the command line itself: stats, verify, audit, keygen, signers, schema and more."""

from collections.abc import Iterator
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import lamella
from lamella.cli import completion as shells
from lamella.cli import schema as schemas
from lamella.cli import terminal, text
from lamella.cli.documents import answer, of_account, of_problem
from lamella.cli.parameters import AsJson, Executor, open_repository
from lamella_engine.signing import generate_key


def stats(context: typer.Context, as_json: AsJson = False) -> None:
    """Say how large the repository is."""
    with open_repository(context) as repo:
        found = repo.stats()
    keys = ("models", "versions", "packs", "decoded_nbytes", "stored_nbytes", "ratio")
    answer({key: getattr(found, key) for key in keys}, text.stats, as_json=as_json)


def verify(
    context: typer.Context,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode everything and compute its ids again.")] = False,
    doubtful: Annotated[
        bool, typer.Option("--doubtful", help="Only packs that nobody but their writers has decoded; deeply.")
    ] = False,
    executor: Executor = None,
    as_json: AsJson = False,
) -> None:
    """Check everything that is stored; exits with 6 if there are problems."""
    with open_repository(context) as repo, terminal.waiting("verifying"):
        found = repo.verify(deep=deep, doubtful=doubtful, executor=executor)
    keys = ("ok", "deep", "entries", "versions", "packs", "blobs", "read_nbytes", "vouched")
    problems = {"problems": [of_problem(one) for one in found.problems]}
    answer({key: getattr(found, key) for key in keys} | problems, text.verify, as_json=as_json)
    if not found.ok:
        raise typer.Exit(lamella.CorruptionError.exit_code)


def audit(context: typer.Context, as_json: AsJson = False) -> None:
    """Say who did what, and check that nothing of it was changed; exits with 6 if something was."""
    problems = 0

    def counted(found: Iterator[lamella.Act | lamella.NotedRead | lamella.Problem]) -> Iterator[Any]:
        nonlocal problems
        for one in found:
            problems += isinstance(one, lamella.Problem)
            yield one

    with open_repository(context) as repo:
        found = counted(repo.audit())
        if as_json:
            terminal.show_json(of_account(found))
        else:
            terminal.show(text.audit(found))
    if problems:
        raise typer.Exit(lamella.CorruptionError.exit_code)


def keygen(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; nothing may be there yet.")],
    as_json: AsJson = False,
) -> None:
    """Make a key that signs what is recorded (Ed25519; PEM, for its owner's eyes alone). Prints its public half."""
    document = {"path": str(file), "public_key": generate_key(file).hex()}
    answer(document, text.keygen, as_json=as_json)


def signers(
    context: typer.Context,
    key: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="With --require: public keys that may sign; by default one's own."),
    ] = None,
    require: Annotated[
        bool, typer.Option("--require", help="Take nothing any more that none of them signed: for good.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say whose signatures are required, or require some. LAMELLA_SIGNING_KEY names the file of one's own key."""
    if key and not require:
        raise lamella.InvalidInputError("keys are listed to require them: give --require too", kind="usage")
    with open_repository(context) as repo:
        found = repo.require_signed(key or []) if require else repo.signers()
    answer({"signers": found}, text.signers, as_json=as_json)


def schema(
    context: typer.Context,
    verb: Annotated[
        str | None,
        typer.Argument(
            metavar="VERB",
            autocompletion=shells.verbs,
            help="A verb, or 'error' for what a failure writes to stderr; by default everything.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the JSON Schema of what --json answers with."""
    if verb is None:
        terminal.show_json(schemas.schema())
        return
    known = [*shells.verbs(context), schemas.ERROR]
    if verb not in known:
        raise lamella.InvalidInputError(f"there is no verb {verb!r}: write one of {', '.join(known)}", kind="usage")
    terminal.show_json(schemas.schema_of(verb))


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
    as_json: AsJson = False,
) -> None:
    """Print the script that makes a shell complete verbs, options, paths and revisions."""
    document = {"shell": shell, "script": shells.script(shell)}
    answer(document, lambda found: found["script"].split("\n"), as_json=as_json)


def version(as_json: AsJson = False) -> None:
    """Print the version of lamella."""
    answer({"version": installed_version("lamella")}, lambda found: [f"lamella {found['version']}"], as_json=as_json)
