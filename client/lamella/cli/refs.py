"""Names for versions: branch, tag, alias."""

from typing import Annotated

import typer

import lamella
from lamella.cli import completion, text
from lamella.cli.documents import answer, of_ref
from lamella.cli.parameters import AsJson, open_repository
from lamella_engine.model import RefKind

RefName = Annotated[
    str | None, typer.Argument(metavar="NAME", autocompletion=completion.refs_of_verb, help="model@name.")
]
RefRevision = Annotated[
    str | None,
    typer.Argument(metavar="REV", autocompletion=completion.revisions, help="The version that it shall stand at."),
]
Delete = Annotated[bool, typer.Option("--delete", help="Delete NAME. Versions stay.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="With --delete: only say what would be deleted.")]


def branch(
    context: typer.Context,
    name: RefName = None,
    revision: RefRevision = None,
    delete: Delete = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """List branches, or set one: made, or moved, also back."""
    _refs(context, "branch", name, revision, delete=delete, dry_run=dry_run, as_json=as_json)


def tag(
    context: typer.Context,
    name: RefName = None,
    revision: RefRevision = None,
    delete: Delete = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """List tags, or make one, which never moves."""
    _refs(context, "tag", name, revision, delete=delete, dry_run=dry_run, as_json=as_json)


def alias(
    context: typer.Context,
    name: RefName = None,
    revision: RefRevision = None,
    delete: Delete = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """List aliases, or set one: made, or moved."""
    _refs(context, "alias", name, revision, delete=delete, dry_run=dry_run, as_json=as_json)


def _refs(
    context: typer.Context,
    kind: RefKind,
    name: str | None,
    revision: str | None,
    *,
    delete: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """List the refs of a kind, set one, or delete one."""
    if (delete and (name is None or revision is not None)) or (dry_run and not delete):
        raise lamella.InvalidInputError(f"to delete, write lamella {kind} --delete NAME [--dry-run]", kind="usage")
    if not delete and name is not None and revision is None:
        raise lamella.InvalidInputError(
            f"which version? Write lamella {kind} NAME REV, or lamella {kind} alone for a list", kind="usage"
        )
    with open_repository(context) as repo:
        if name is None:
            found = [ref for model in repo.models() for ref in repo.refs(model) if ref.kind == kind]
            answer({"refs": [of_ref(ref) for ref in found]}, text.refs, as_json=as_json)
        elif delete:
            ref = _ref_named(repo, name, kind)
            if not dry_run:
                repo.delete_ref(name)
            answer({"deleted": of_ref(ref), "dry_run": dry_run}, text.ref_deleted, as_json=as_json)
        elif revision is not None:
            {"branch": repo.branch, "tag": repo.tag, "alias": repo.alias}[kind](name, revision)
            answer({"ref": of_ref(_ref_named(repo, name, kind))}, text.ref_set, as_json=as_json)


def _ref_named(repo: lamella.Repository, name: str, kind: RefKind) -> lamella.RefInfo:
    """Return a ref. Raises RefNotFoundError, and InvalidInputError if it is of another kind."""
    model, _, wanted = name.partition("@")
    for ref in repo.refs(model):
        if ref.name == wanted:
            if ref.kind != kind:
                raise lamella.InvalidInputError(f"{name} is no {kind}: use lamella {ref.kind}", kind="another_kind")
            return ref
    raise lamella.RefNotFoundError(f"there is no {kind} {name}: lamella {kind} lists them", name=name)
