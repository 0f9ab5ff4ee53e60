"""What is in a repository: log, show, diff, distance."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal

import typer

import lamella
from lamella.cli import completion, graph, terminal, text
from lamella.cli.documents import answer, of_cost, of_distance, of_tensor, of_version
from lamella.cli.parameters import REVISION_HELP, AsJson, Executor, Include, Revision, Revisions, open_repository

Most = Annotated[int | None, typer.Option("-n", min=1, metavar="N", help="Show at most so many; --json has them all.")]


def log(
    context: typer.Context,
    revisions: Annotated[
        list[str],
        typer.Argument(
            metavar="REV",
            autocompletion=completion.histories,
            help=f"{REVISION_HELP} A model alone is all of its refs.",
        ),
    ],
    with_graph: Annotated[bool, typer.Option("--graph", help="Draw how they descend from each other.")] = False,
    number: Annotated[int | None, typer.Option("-n", min=1, metavar="N", help="At most so many.")] = None,
    as_json: AsJson = False,
) -> None:
    """List versions and their ancestors, newest first."""
    with open_repository(context) as repo:
        refs = _Refs(repo)
        heads = [head for revision in revisions for head in _heads(repo, revision)]
        # One line of descent is read as it is shown: it may be long.
        alone = len(heads) == 1 and not with_graph
        shown = islice(repo.log(heads[0]) if alone else _newest_first(repo, heads), number)
        if as_json:
            terminal.show_json({"versions": [of_version(version) | refs.at(version) for version in shown]})
        elif with_graph:
            terminal.show(_drawn(list(shown), refs))
        else:
            terminal.show(text.log_line(of_version(version) | refs.at(version)) for version in shown)


def show(context: typer.Context, revisions: Revisions, as_json: AsJson = False) -> None:
    """Show what is recorded about versions, their tensors, and what a checkout costs."""
    with open_repository(context) as repo:
        refs = _Refs(repo)
        document = {"versions": [_shown(repo, repo.version(revision), refs) for revision in revisions]}
    answer(document, text.show, as_json=as_json)


def diff(
    context: typer.Context,
    a: Revision,
    b: Annotated[
        str | None,
        typer.Argument(metavar="[REV]", autocompletion=completion.revisions, help="Without it: from A's parent to A."),
    ] = None,
    by: Annotated[Literal["size", "name"], typer.Option(help="Sorted by what.")] = "size",
    most: Most = None,
    as_json: AsJson = False,
) -> None:
    """List the tensors that differ between two versions, the largest first. Reads none of them."""
    with open_repository(context) as repo:
        if b is None:
            if not repo.version(a).parents:
                raise lamella.VersionNotFoundError(f"{a} has no parent to compare it with: name two revisions")
            a, b = f"{a}~1", a
        # By id: a branch may move meanwhile.
        left, right = repo.version(a), repo.version(b)
        found = repo.diff(left.id, right.id)
        changes = {name: change for change in _CHANGES for name in getattr(found, change)}
        tensors = [
            {
                "name": name,
                "change": changes[name],
                "a": of_tensor(left[name]) if name in left else None,
                "b": of_tensor(right[name]) if name in right else None,
            }
            for name in sorted(changes)
        ]
    answer({"a": a, "b": b, "tensors": tensors}, partial(text.diff, by=by, most=most), as_json=as_json)


_ID = re.compile(r"[0-9a-f]{8,64}(~.*)?")
"""What names a version without its model."""

_CHANGES = ("added", "removed", "reshaped", "changed", "same")


def distance(
    context: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", autocompletion=completion.revisions, help="A revision.")],
    b: Annotated[str, typer.Argument(metavar="B", autocompletion=completion.revisions, help="Another.")],
    include: Include = None,
    cosine: Annotated[
        bool, typer.Option("--cosine", help="Also the cosine, which has to read what is equal too.")
    ] = False,
    by: Annotated[Literal["l2", "l1", "linf", "changed", "name"], typer.Option(help="Sorted by what.")] = "l2",
    most: Most = None,
    executor: Executor = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far two versions lie apart, the tensors with the largest change first."""
    with open_repository(context) as repo, terminal.waiting(f"measuring {a} against {b}"):
        found = repo.distance(a, b, include=include, executor=executor)
        document = {
            "a": a,
            "b": b,
            **of_distance(found, cosine=cosine),
            "per_tensor": {name: of_distance(item, cosine=cosine) for name, item in found.per_tensor.items()},
        }
    answer(document, partial(text.distance, by=by, most=most), as_json=as_json)


class _Refs:
    """The names of the refs at versions, each model's read once."""

    def __init__(self, repo: lamella.Repository) -> None:
        self._repo = repo
        self._of_model: dict[str, list[lamella.RefInfo]] = {}

    def at(self, version: lamella.Version) -> dict[str, list[str]]:
        """Return what a document says about the refs at a version."""
        if version.model not in self._of_model:
            self._of_model[version.model] = self._repo.refs(version.model)
        return {"refs": [ref.name for ref in self._of_model[version.model] if ref.number == version.number]}


def _heads(repo: lamella.Repository, revision: str) -> list[str]:
    """Return a revision, or the revisions at all refs of a model; its latest version if it has none."""
    if "@" in revision or (revision not in repo.models() and _ID.fullmatch(revision)):
        return [revision]
    return [f"{revision}@{ref.name}" for ref in repo.refs(revision)] or [f"{revision}@latest"]


def _newest_first(repo: lamella.Repository, revisions: Sequence[str]) -> Iterator[lamella.Version]:
    """Yield versions and all of their ancestors, each before its parents. Reads the metadata of all of them."""
    found: dict[str, lamella.Version] = {}
    waiting = list(revisions)
    while waiting:
        version = repo.version(waiting.pop())
        if version.id not in found:
            found[version.id] = version
            waiting += version.parents
    nodes = {id: graph.Node(version.model, version.number, version.parents) for id, version in found.items()}
    return (found[id] for id in graph.newest_first(nodes))


def _drawn(versions: Sequence[lamella.Version], refs: _Refs) -> Iterator[str]:
    by_id: dict[str, lamella.Version] = {version.id: version for version in versions}
    for drawing, id in graph.draw((version.id, version.parents) for version in versions):
        version = by_id.get(id or "")
        yield drawing if version is None else f"{drawing} {text.log_line(of_version(version) | refs.at(version))}"


def _shown(repo: lamella.Repository, version: lamella.Version, refs: _Refs) -> dict[str, Any]:
    cost = repo.cost(version.id)
    tensors = [
        {"name": name, **of_tensor(tensor), **of_cost(cost.per_tensor[name])} for name, tensor in version.items()
    ]
    return of_version(version) | refs.at(version) | {"checkout": of_cost(cost), "tensors": tensors}
