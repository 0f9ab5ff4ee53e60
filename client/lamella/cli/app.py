"""The verbs. Each opens the repository, asks it for one thing, and answers with one document, as JSON or as text."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version as installed_version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

import lamella
from lamella.cli import terminal, text
from lamella_engine.model import RefKind

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help: it starts in a third of the time and survives a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Verb = TypeVar("Verb", bound=Callable[..., None])

_VERSION_KEYS = """model, number, id, parameters_id, structure_id, parents [id], message, author, created, metrics,
recipe, files [path], decoded_nbytes, tensor_count"""

_REF_KEYS = "refs [{model, name, kind, number}]; ref {...} where one was set; deleted {...} and dry_run with --delete"

AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON document.")]
Include = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Only tensors whose names match; may be given several times.")
]
Revision = Annotated[
    str,
    typer.Argument(
        metavar="REV", help="model@branch, model@v12, model@latest, model@best:metric or an id; each with ~N."
    ),
]
RefName = Annotated[str | None, typer.Argument(metavar="NAME", help="model@name.")]
RefRevision = Annotated[str | None, typer.Argument(metavar="REV", help="The version that it shall stand at.")]
Delete = Annotated[bool, typer.Option("--delete", help="Delete NAME. Versions stay.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="With --delete: only say what would be deleted.")]


def _verb(example: str, *, answer: str) -> Callable[[Verb], Verb]:
    """Register a verb whose help ends with the keys of its JSON document and one example."""
    return app.command(epilog=f"With --json: {answer}.\n\n\b\nExample:\n  {example}")


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


@_verb("lamella init weights", answer="repository")
def init(
    context: typer.Context,
    path: Annotated[
        str | None, typer.Argument(metavar="PATH", help="Where; by default as for the other verbs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a repository."""
    url = context.obj if path is None else path
    with lamella.init(url):
        _answer({"repository": url}, lambda _: [f"made a repository in {url}"], as_json=as_json)


@_verb(
    'lamella push model.safetensors bert@main -m "step 2000" --metric loss=0.31',
    answer=f"{_VERSION_KEYS}, new (false if the branch's head is this already)",
)
def push(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A .safetensors file.")],
    target: Annotated[str, typer.Argument(metavar="MODEL@BRANCH", help="The branch is made if it is not there.")],
    message: Annotated[str, typer.Option("-m", "--message", metavar="TEXT", help="What to say about it.")] = "",
    parent: Annotated[
        str | None, typer.Option(metavar="REV", help="Where a new branch starts, or where the branch must stand.")
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
    with _open(context) as repo, terminal.waiting(f"pushing {source} to {target}"):
        before = _id_of(repo, target)
        version = repo.push(source, target, message=message, parent=parent, metrics=metrics, recipe=made_by)
        document = _version(version) | {"new": version.id != before}
    _answer(document, text.push, as_json=as_json)


@_verb(
    'lamella checkout bert@main~1 out --include "encoder.layer.0.*"',
    answer="model, number, id, out, files [{path, nbytes}]",
)
def checkout(
    context: typer.Context,
    revision: Revision,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A directory, made if it is not there.")],
    include: Include = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Not these tensors; may be given several times.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that differ.")] = False,
    verify: Annotated[
        Literal["blob", "chunk"],
        typer.Option(help="Check the digest of what is read, or also the id of what it decodes to."),
    ] = "blob",
    as_json: AsJson = False,
) -> None:
    """Get a version's files back, or some of its tensors as one file."""
    with _open(context) as repo, terminal.waiting(f"checking out {revision} into {out}"):
        version = repo.version(revision)
        # By id: the branch may move meanwhile.
        files = repo.checkout(version.id, out, include=include, exclude=exclude, overwrite=overwrite, verify=verify)
        document = {
            "model": version.model,
            "number": version.number,
            "id": version.id,
            "out": str(out),
            "files": [{"path": path, "nbytes": place.stat().st_size} for path, place in files.items()],
        }
    _answer(document, text.checkout, as_json=as_json)


@_verb(
    "lamella distance bert@v1 bert@main",
    answer="a, b, count, changed (fraction of elements), l2, l1, linf, cosine (null without --cosine), "
    "per_tensor {name: the same}",
)
def distance(
    context: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="A revision.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    include: Include = None,
    cosine: Annotated[
        bool, typer.Option("--cosine", help="Also the cosine, which has to read what is equal too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how far two versions lie apart."""
    with _open(context) as repo, terminal.waiting(f"measuring {a} against {b}"):
        found = repo.distance(a, b, include=include)
        document = {
            "a": a,
            "b": b,
            **_distance(found, cosine=cosine),
            "per_tensor": {name: _distance(item, cosine=cosine) for name, item in found.per_tensor.items()},
        }
    _answer(document, text.distance, as_json=as_json)


@_verb("lamella log bert@main -n 5", answer=f"versions [{{{_VERSION_KEYS}}}]")
def log(
    context: typer.Context,
    revision: Revision,
    number: Annotated[int | None, typer.Option("-n", min=1, metavar="N", help="At most so many.")] = None,
    as_json: AsJson = False,
) -> None:
    """List a version and its ancestors, newest first."""
    with _open(context) as repo:
        versions = (_version(version) for version in islice(repo.log(revision), number))
        if as_json:
            terminal.show_json({"versions": list(versions)})
        else:  # as they are read: the history may be long
            terminal.show(map(text.log_line, versions))


@_verb("lamella show bert@v3", answer=f"{_VERSION_KEYS}, tensors [{{name, dtype, shape, nbytes}}]")
def show(context: typer.Context, revision: Revision, as_json: AsJson = False) -> None:
    """Show what is recorded about a version, and its tensors."""
    with _open(context) as repo:
        version = repo.version(revision)
        tensors = [
            {"name": name, "dtype": tensor.dtype_name, "shape": tensor.shape, "nbytes": tensor.nbytes}
            for name, tensor in version.items()
        ]
        document = _version(version) | {"tensors": tensors}
    _answer(document, text.show, as_json=as_json)


@_verb(
    "lamella diff bert@v1 bert@main", answer="a, b, and the names of tensors in added, removed, reshaped, changed, same"
)
def diff(
    context: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="A revision.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """List the tensors that differ between two versions. Reads none of them."""
    with _open(context) as repo:
        found = repo.diff(a, b)
    names = {key: getattr(found, key) for key in ("added", "removed", "reshaped", "changed", "same")}
    _answer({"a": a, "b": b, **names}, text.diff, as_json=as_json)


@_verb("lamella branch bert@trial bert@v3", answer=_REF_KEYS)
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


@_verb("lamella tag bert@release-1 bert@main", answer=_REF_KEYS)
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


@_verb("lamella alias bert@production bert@v3", answer=_REF_KEYS)
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


@_verb("lamella -C weights stats", answer="models, versions, packs, decoded_nbytes, stored_nbytes, ratio")
def stats(context: typer.Context, as_json: AsJson = False) -> None:
    """Say how large the repository is."""
    with _open(context) as repo:
        found = repo.stats()
    keys = ("models", "versions", "packs", "decoded_nbytes", "stored_nbytes", "ratio")
    _answer({key: getattr(found, key) for key in keys}, text.stats, as_json=as_json)


@_verb(
    "lamella verify --deep",
    answer="ok, deep, entries, versions, packs, blobs, read_nbytes, problems [{kind, message, where}]",
)
def verify(
    context: typer.Context,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode everything and compute its ids again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check everything that is stored. Changes nothing; exits with 6 if there are problems."""
    with _open(context) as repo, terminal.waiting("verifying"):
        found = repo.verify(deep=deep)
    keys = ("ok", "deep", "entries", "versions", "packs", "blobs", "read_nbytes")
    problems = [{"kind": one.kind, "message": one.message, "where": one.where} for one in found.problems]
    _answer({key: getattr(found, key) for key in keys} | {"problems": problems}, text.verify, as_json=as_json)
    if not found.ok:
        raise typer.Exit(lamella.CorruptionError.exit_code)


@_verb("lamella version", answer="version")
def version(as_json: AsJson = False) -> None:
    """Print the version of lamella."""
    _answer({"version": installed_version("lamella")}, lambda found: [f"lamella {found['version']}"], as_json=as_json)


def _open(context: typer.Context) -> lamella.Repository:
    return lamella.open(context.obj)


def _answer(document: Mapping[str, Any], lines: Callable[[Mapping[str, Any]], Iterable[str]], *, as_json: bool) -> None:
    if as_json:
        terminal.show_json(document)
    else:
        terminal.show(lines(document))


def _version(version: lamella.Version) -> dict[str, Any]:
    """Return the keys of :data:`_VERSION_KEYS`."""
    return {
        "model": version.model,
        "number": version.number,
        "id": version.id,
        "parameters_id": version.parameters_id,
        "structure_id": version.structure_id,
        "parents": version.parents,
        "message": version.message,
        "author": version.author,
        "created": version.created,
        "metrics": version.metrics,
        "recipe": version.recipe,
        "files": version.files,
        "decoded_nbytes": version.nbytes,
        "tensor_count": len(version),
    }


def _distance(found: lamella.Distance, *, cosine: bool) -> dict[str, Any]:
    keys = ("count", "changed", "l2", "l1", "linf")
    return {key: getattr(found, key) for key in keys} | {"cosine": found.cosine if cosine else None}


def _id_of(repo: lamella.Repository, target: str) -> str | None:
    """Return the id of the version that a branch stands at; None if it is not there, or can be none."""
    try:
        return repo.version(target).id
    except (lamella.NotFoundError, lamella.InvalidInputError):
        return None


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
    with _open(context) as repo:
        if name is None:
            found = [ref for model in repo.models() for ref in repo.refs(model) if ref.kind == kind]
            _answer({"refs": [_ref(ref) for ref in found]}, text.refs, as_json=as_json)
        elif delete:
            ref = _ref_named(repo, name, kind)
            if not dry_run:
                repo.delete_ref(name)
            _answer({"deleted": _ref(ref), "dry_run": dry_run}, text.ref_deleted, as_json=as_json)
        elif revision is not None:
            {"branch": repo.branch, "tag": repo.tag, "alias": repo.alias}[kind](name, revision)
            _answer({"ref": _ref(_ref_named(repo, name, kind))}, text.ref_set, as_json=as_json)


def _ref_named(repo: lamella.Repository, name: str, kind: RefKind) -> lamella.RefInfo:
    """Return a ref. Raises RefNotFoundError, and InvalidInputError if it is of another kind."""
    model, _, wanted = name.partition("@")
    for ref in repo.refs(model):
        if ref.name == wanted:
            if ref.kind != kind:
                raise lamella.InvalidInputError(f"{name} is no {kind}: use lamella {ref.kind}", kind="another_kind")
            return ref
    raise lamella.RefNotFoundError(f"there is no {kind} {name}: lamella {kind} lists them", name=name)


def _ref(ref: lamella.RefInfo) -> dict[str, Any]:
    return {"model": ref.model, "name": ref.name, "kind": ref.kind, "number": ref.number}


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
    except (ValueError, RecursionError) as error:
        raise lamella.InvalidInputError(f"{path} is no JSON: {error}: mend it", kind="bad_json") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse(constant: str) -> Iterator[Any]:
    raise ValueError(f"it has no {constant}")
