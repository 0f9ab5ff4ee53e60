"""What ``--json`` answers with: nouns as plain values, under the keys that ``schema.json`` promises."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import lamella
from lamella.cli import terminal

_COST = ("decoded_nbytes", "encoded_nbytes", "read_nbytes", "blob_count", "max_depth")
_DISTANCE = ("count", "changed", "l2", "l1", "linf")


def answer(document: Mapping[str, Any], lines: Callable[[Mapping[str, Any]], Iterable[str]], *, as_json: bool) -> None:
    """Write a document to stdout: as JSON, or as the lines that ``lines`` makes of it."""
    if as_json:
        terminal.show_json(document)
    else:
        terminal.show(lines(document))


def of_version(version: lamella.Version) -> dict[str, Any]:
    """Return what is recorded about a version."""
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


def of_tensor(tensor: lamella.LazyTensor) -> dict[str, Any]:
    """Return what a tensor is, without reading it."""
    return {"dtype": tensor.dtype_name, "shape": tensor.shape, "decoded_nbytes": tensor.nbytes}


def of_cost(cost: lamella.Cost) -> dict[str, Any]:
    """Return what a checkout costs."""
    return {key: getattr(cost, key) for key in _COST}


def of_distance(found: lamella.Distance, *, cosine: bool) -> dict[str, Any]:
    """Return measures; the cosine, which has to read more, only if it is wanted."""
    return {key: getattr(found, key) for key in _DISTANCE} | {"cosine": found.cosine if cosine else None}


def of_ref(ref: lamella.RefInfo) -> dict[str, Any]:
    """Return a ref and where it stands."""
    return {"model": ref.model, "name": ref.name, "kind": ref.kind, "number": ref.number}


def of_problem(problem: lamella.Problem) -> dict[str, Any]:
    """Return what is wrong."""
    return asdict(problem)


def of_account(found: Iterable[lamella.Act | lamella.NotedRead | lamella.Problem]) -> dict[str, Any]:
    """Return who did what."""
    document: dict[str, Any] = {"acts": [], "reads": [], "unvouched": 0, "problems": []}
    for one in found:
        match one:
            case lamella.Act():
                document["acts"].append(asdict(one) | {"did": list(one.did)})
            case lamella.NotedRead():
                document["reads"].append(asdict(one))
                document["unvouched"] += not one.vouched
            case lamella.Problem():
                document["problems"].append(of_problem(one))
    return document


def of_grant(grant: Any) -> dict[str, Any]:
    """Return what a token stands for; as the service keeps it, or as it travels."""
    found: dict[str, Any] = {key: getattr(grant, key) for key in ("id", "principal", "role", "expires", "revoked")}
    return found | {"repositories": list(grant.repositories), "refs": list(grant.refs)}
