"""Parameters that several verbs share."""

from typing import Annotated

import typer

import lamella
from lamella.cli import completion

AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON document.")]
Executor = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Who does it: ray is the Ray cluster that RAY_ADDRESS names. By default this process."
    ),
]

Include = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Only tensors whose names match; may be given several times.")
]

REVISION_HELP = "model@branch, model@v12, model@latest, model@best:metric (the greatest) or an id; each with ~N."
Revision = Annotated[str, typer.Argument(metavar="REV", autocompletion=completion.revisions, help=REVISION_HELP)]
Revisions = Annotated[list[str], typer.Argument(metavar="REV", autocompletion=completion.revisions, help=REVISION_HELP)]


def open_repository(context: typer.Context) -> lamella.Repository:
    """Open the repository that the command line is about."""
    return lamella.open(context.obj)
