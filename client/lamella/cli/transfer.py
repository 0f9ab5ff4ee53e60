"""Into a repository and out of it: init, push, checkout."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import lamella
from lamella.cli import completion, terminal, text
from lamella.cli.documents import answer, of_version
from lamella.cli.parameters import AsJson, Include, Revision, open_repository
from lamella_engine.content_store.log import DEFAULT_MAX_DEPTH


def init(
    context: typer.Context,
    path: Annotated[
        str | None, typer.Argument(metavar="REPO", help="Directory or URL; by default as for the other verbs.")
    ] = None,
    max_depth: Annotated[
        int,
        typer.Option(help="Longest chain of deltas, 0 to 31: longer ones take fewer bytes, and longer to check out."),
    ] = DEFAULT_MAX_DEPTH,
    as_json: AsJson = False,
) -> None:
    """Make a repository."""
    url = context.obj if path is None else path
    with lamella.init(url, max_depth=max_depth):
        answer({"repository": url}, lambda _: [f"made a repository in {url}"], as_json=as_json)


def push(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .safetensors file, a directory (hidden and empty ones in it are left out), or a Zarr v3 directory.",
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL@BRANCH",
            autocompletion=completion.branches,
            help="The branch is made if it is not there.",
        ),
    ],
    message: Annotated[str, typer.Option("-m", "--message", metavar="TEXT", help="What to say about it.")] = "",
    parent: Annotated[
        str | None,
        typer.Option(
            metavar="REV",
            autocompletion=completion.revisions,
            help="Where a new branch starts, or where the branch must stand.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A measurement; may be given several times.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE.json", help="What made it, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Store a checkpoint as a new version on a branch."""
    metrics = _metrics(metric or [])
    made_by = None if recipe is None else _read_json(recipe)
    with open_repository(context) as repo, terminal.progress(f"pushing {target}") as progress:
        before = _id_of(repo, target)
        version = repo.push(
            source, target, message=message, parent=parent, metrics=metrics, recipe=made_by, progress=progress
        )
        document = of_version(version) | {"new": version.id != before}
    answer(document, text.push, as_json=as_json)


def checkout(
    context: typer.Context,
    revision: Revision,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A directory, made if it is not there.")],
    include: Include = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Not these tensors; may be given several times.")
    ] = None,
    format: Annotated[
        Literal["files", "zarr"], typer.Option(help="The files that were pushed, or a Zarr v3 directory.")
    ] = "files",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that differ.")] = False,
    verify: Annotated[
        Literal["blob", "chunk"],
        typer.Option(help="Check the digest of what is read, or also the id of what it decodes to."),
    ] = "blob",
    as_json: AsJson = False,
) -> None:
    """Get a version's files back, or some of its tensors as one file."""
    with (
        open_repository(context) as repo,
        terminal.progress(f"checking out {revision}") as progress,
    ):
        version = repo.version(revision)
        files = repo.checkout(
            version.id,  # not the revision: the branch may move meanwhile
            out,
            include=include,
            exclude=exclude,
            format=format,
            overwrite=overwrite,
            verify=verify,
            progress=progress,
        )
        document = {
            "model": version.model,
            "number": version.number,
            "id": version.id,
            "out": str(out),
            "format": format,
            "files": [{"path": path, "nbytes": place.stat().st_size} for path, place in files.items()],
        }
    answer(document, text.checkout, as_json=as_json)


def _id_of(repo: lamella.Repository, target: str) -> str | None:
    """Return the id of the version that a branch stands at; None if it is not there, or can be none."""
    try:
        return repo.version(target).id
    except (lamella.NotFoundError, lamella.InvalidInputError):
        return None


def _metrics(given: Iterable[str]) -> dict[str, float]:
    """Parse ``name=value`` pairs; whole numbers stay whole."""
    metrics: dict[str, float] = {}
    for pair in given:
        name, _, value = pair.rpartition("=")
        if not name:
            raise lamella.InvalidInputError(f"{pair!r} is no metric: write --metric name=value", kind="bad_metric")
        if name in metrics:
            raise lamella.InvalidInputError(f"the metric {name!r} is given twice: give it once", kind="bad_metric")
        metrics[name] = _number(name, value)
    return metrics


def _number(name: str, value: str) -> float:
    for parse in (int, float):
        with suppress(ValueError):
            return parse(value)
    raise lamella.InvalidInputError(
        f"{value!r} is no number, for the metric {name!r}: write --metric name=value", kind="bad_metric"
    )


def _read_json(path: Path) -> Any:
    """Read a recipe. Raises NotFoundError if there is no file, InvalidInputError if it is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except FileNotFoundError:
        raise lamella.NotFoundError(f"there is no file {path}: check --recipe", kind="file_not_found") from None
    except OSError as error:
        raise lamella.InvalidInputError(
            f"{path} cannot be read ({error.strerror}): check --recipe", kind="unreadable"
        ) from None
    except (ValueError, RecursionError) as error:
        raise lamella.InvalidInputError(f"{path} is no JSON ({error}): mend it", kind="bad_json") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse(constant: str) -> Iterator[Any]:
    raise ValueError(f"it has no {constant}")
