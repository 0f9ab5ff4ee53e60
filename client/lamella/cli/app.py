"""The verbs put together: their order, the end of their help, and what stands before them."""

from collections.abc import Callable
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

import lamella
from lamella.cli import terminal
from lamella.cli.history import diff, distance, log, show
from lamella.cli.refs import alias, branch, tag
from lamella.cli.schema import keys
from lamella.cli.service import serve, token
from lamella.cli.transfer import checkout, init, push
from lamella.cli.upkeep import audit, completion, keygen, schema, signers, stats, verify, version

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help: it starts in a third of the time and survives a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_VERBS: tuple[tuple[Callable[..., None], str], ...] = (
    (init, "lamella init weights"),
    (push, 'lamella push model.safetensors bert@main -m "step 2000" --metric loss=0.31'),
    (checkout, 'lamella checkout bert@main~1 out --include "encoder.layer.0.*"'),
    (log, "lamella log bert --graph -n 20"),
    (show, "lamella show bert@v3"),
    (diff, "lamella diff bert@v1 bert@main -n 10"),
    (distance, "lamella distance bert@v1 bert@main --by linf"),
    (branch, "lamella branch bert@trial bert@v3"),
    (tag, "lamella tag bert@release-1 bert@main"),
    (alias, "lamella alias bert@production bert@v3"),
    (stats, "lamella -C weights stats"),
    (verify, "lamella verify --deep"),
    (audit, "lamella -C weights audit"),
    (serve, "lamella serve --root weights --listen 127.0.0.1:7443 --insecure-loopback"),
    (token, "lamella token create --root weights --principal ada --role writer --ref 'bert@dev-*' --ttl 30d"),
    (keygen, "lamella keygen ada.pem"),
    (signers, "LAMELLA_SIGNING_KEY=ada.pem lamella -C weights signers --require"),
    (schema, "lamella schema push"),
    (completion, "lamella completion bash >> ~/.bashrc"),
    (version, "lamella version"),
)
"""In the order of the help, each with the example that its own help ends with."""

for _verb, _example in _VERBS:
    app.command(epilog=f"With --json: {keys(_verb.__name__)}.\n\n\b\nExample:\n  {_example}")(_verb)


@app.callback(
    invoke_without_command=True,
    epilog="Exit codes: 2 usage, 3 not found, 4 conflict, 5 permission, 6 damage, 7 storage, 8 outcome unknown, "
    '9 limit, 70 a bug. With --json an error is {"error": {kind, message, context}} on stderr.\n\n'
    "\b\nExample:\n  lamella init weights\n  lamella -C weights push model.safetensors bert@main",
)
def lamella_(
    context: typer.Context,
    repository: Annotated[
        str, typer.Option("-C", metavar="REPO", envvar="LAMELLA_REPO", help="Directory or URL of the repository.")
    ] = ".",
    version: Annotated[bool, typer.Option("--version", help="Print the version of lamella.")] = False,
) -> None:
    """Version control for neural-network weights."""
    context.obj = repository
    if version:
        terminal.show([f"lamella {installed_version('lamella')}"])
    elif context.invoked_subcommand is None:
        terminal.warn(context.get_help().split("\n"))
        raise typer.Exit(lamella.InvalidInputError.exit_code)
