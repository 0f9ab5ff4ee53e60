"""Imports: many checkpoints, each read and pushed by one of the nodes."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import lamella
from lamella.ray.workers import Workers
from lamella_engine.content_store.revisions import parse_target
from lamella_engine.errors import RefNotFoundError
from lamella_engine.repository import Repository


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of an import."""

    versions: Mapping[str, tuple[str, ...]]
    """By target, the ids of its versions, in the order of the checkpoints: as many as are there now."""
    failures: Mapping[str, Exception]
    """By target, what its next checkpoint raised; those after it were not tried."""


def import_checkpoints(
    checkpoints: "Mapping[str, Sequence[str | os.PathLike[str]]]",
    repo: str,
    *,
    progress: Callable[[str, str], None] | None = None,
) -> Imported:
    """Push many checkpoints, spread over the nodes of a cluster: those of one branch in their order, branches at once.

    Call it again after a failure: what is there, under the message that it was imported with, is not pushed again.

    Parameters
    ----------
    checkpoints
        For each ``"model@branch"`` the paths of its checkpoints, files or directories as ``Repository.push`` takes
        them, which every node can read. A path, made absolute, is the message of its version.
    repo
        Where to; see :func:`push`.
    progress
        Is called, in this thread, with target and path of each checkpoint that is there. What it raises ends the
        import; what is recorded stays.

    Raises
    ------
    InvalidInputError
        A target is none.
    RepositoryNotFoundError
        There is no such repository.
    StorageError
        No node is left (``worker_lost``).
    """
    for target in checkpoints:
        parse_target(target)
    lamella.open(repo).close()
    paths = {target: [os.path.abspath(path) for path in given] for target, given in checkpoints.items()}
    versions: dict[str, list[str]] = {target: [] for target in paths}
    failures: dict[str, Exception] = {}
    there: dict[str, Mapping[str, str]] = {}

    def advance(target: str) -> None:
        """Go on with a branch, after what is there."""
        for path in paths[target][len(versions[target]) :]:
            if path not in there[target]:
                workers.begin(target, partial(_pushed, path, target))
                return
            arrived(target, there[target][path])

    def arrived(target: str, version: str) -> None:
        versions[target].append(version)
        if progress is not None:
            progress(target, paths[target][len(versions[target]) - 1])

    with Workers(repo) as workers:
        for target in paths:
            workers.begin(target, partial(_imported, target))
        for key, result in workers.ended():
            target = str(key)
            if isinstance(result, Exception):
                failures[target] = result
                continue
            if target in there:
                arrived(target, result)
            else:
                there[target] = result
            advance(target)
    return Imported({target: tuple(ids) for target, ids in versions.items()}, failures)


def _imported(target: str, repo: Repository) -> dict[str, str]:
    """Return the versions of a branch by their messages."""
    try:
        return {version.message: version.id for version in repo.log(target)}
    except RefNotFoundError:
        return {}


def _pushed(path: str, target: str, repo: Repository) -> str:
    return repo.push(path, target, message=path).id
