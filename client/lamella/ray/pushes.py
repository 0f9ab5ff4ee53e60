"""Pushes: one process tells encoders what to store, and records the version when all is there."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import lamella
from lamella.ray.encoders import Holding, Told, Work, new_encoder, same
from lamella.ray.refs import got, put
from lamella.ray.shards import Shard
from lamella_engine.boxes import Box
from lamella_engine.content_store.revisions import parse_target
from lamella_engine.errors import InvalidInputError, StorageError
from lamella_engine.model import Progress, TensorSpec
from lamella_engine.parts import Assignment, Part, SharedPush
from lamella_engine.repository import Repository
from lamella_engine.versions import Version

BATCH_NBYTES = 512 << 20
"""What an encoder stores at a time: what is lost with it at most, and how fine progress is. A batch takes a read of the
log, and its last pack is seldom full, so it should be several packs of 64 MiB."""

TRIES = 3
"""So often is one batch begun that fails for a reason which may pass. Encoders that die count as RESTARTS say."""

POLL_S = 0.5
"""How often whoever pushes is shown progress at least, and so may stop."""


def push(
    shards: Iterable[Shard],
    target: str,
    repo: str,
    *,
    message: str = "",
    parent: str | None = None,
    metrics: Mapping[str, float] | None = None,
    recipe: Any = None,
    files: Mapping[str, bytes] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Version:
    """Store a checkpoint whose shards lie on the nodes of a cluster as a new version at the tip of a branch.

    Parameters
    ----------
    shards
        All of its tensors, in any order. Where copies of a box are given, one of them is read.
    target
        ``"model@branch"``.
    repo
        Where the repository is, as :func:`lamella.open` takes it, for every node: a directory that all share, a bucket,
        or one of a service. Each node needs the credentials in its environment.
    message, parent, metrics, recipe, files
        As :meth:`Repository.push <lamella.Repository.push>` takes them.
    progress
        Is called, in this thread, about twice a second with how far the push is. What it raises ends the push, as
        KeyboardInterrupt does, and ``ray.cancel`` of a task that pushes: nothing is visible then.

    Returns
    -------
    Version
        As ``Repository.push`` returns it; the same tensors have the same ids, however they are cut.

    Raises
    ------
    InvalidInputError
        The shards of a tensor do not make it (``bad_shards``), or a file changed (``source_changed``).
    StorageError
        A node is gone, or an encoder died too often (``worker_lost``), or an object store is full
        (``object_store_full``). What was stored is left to a collection of garbage.
    ConflictError, OutcomeUnknownError
        As ``Repository.push`` raises them.
    """
    parse_target(target)
    by_node: defaultdict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        by_node[shard.node].append(shard)
    repository = lamella.open(repo)
    encoders: list[Any] = []
    try:
        for worker, node in enumerate(by_node):
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            encoders.append(new_encoder.options(scheduling_strategy=here).remote(repo, worker))
        shared, work = _planned(repository, encoders, list(by_node.values()), target, parent)
        try:
            parts = _stored(work, progress)
        except BaseException:
            shared.abandon()
            raise
        return repository.sharing.record(shared, parts, message=message, metrics=metrics, recipe=recipe, files=files)
    except BaseException:
        repository.close()
        raise
    finally:
        for encoder in encoders:
            ray.kill(encoder)


def _planned(
    repository: Repository,
    encoders: Sequence[Any],
    shards: Sequence[Sequence[Shard]],
    target: str,
    parent: str | None,
) -> tuple[SharedPush, Work]:
    """Begin a push of what lies with encoders."""
    asked = [encoder.describe.remote(given) for encoder, given in zip(encoders, shards, strict=True)]
    holdings: list[Holding] = [got(ref) for ref in asked]
    structure: dict[str, TensorSpec] = {}
    held: defaultdict[str, list[tuple[Box, int]]] = defaultdict(list)
    for worker, holding in enumerate(holdings):
        for spec, box in holding.boxes:
            held[same(structure, spec).name].append((box, worker))
    if not structure:
        raise InvalidInputError("there is nothing to push: the shards hold no tensors", kind="empty_source")
    shared = repository.sharing.begin(
        target, list(structure.values()), held, len(encoders), parent=parent, batch_nbytes=BATCH_NBYTES
    )
    return shared, Work(
        shared.assignments,
        tuple(encoders),
        tuple(shards),
        tuple(holding.fingerprints for holding in holdings),
    )


def _stored(work: Work, progress: Callable[[Progress], None] | None) -> list[Part]:
    """Have encoders store everything; return their parts when all is there, and every file is still what it was."""
    told = Told(put(work))
    samples = [got(ref) for ref in [encoder.samples.remote(told) for encoder in work.encoders]]
    told = told._replace(merged=put(np.maximum.reduce(samples)))
    tries = [0] * len(work.assignments)
    pending: dict[Any, Assignment] = {}
    parts: list[Part] = []
    done_nbytes = 0
    total_nbytes = sum(spec.nbytes for spec in work.assignments[0].structure)

    def begin(assignment: Assignment) -> None:
        tries[assignment.number] += 1
        pending[work.encoders[assignment.share.worker].store.remote(told, assignment.number)] = assignment

    def report() -> None:
        if progress is not None:
            progress(Progress(done_nbytes, total_nbytes, sum(part.stored_nbytes for part in parts)))

    for assignment in work.assignments:
        begin(assignment)
    while pending:
        report()
        ended, _ = ray.wait(list(pending), num_returns=1, timeout=POLL_S)
        for ref in ended:
            assignment = pending.pop(ref)
            try:
                parts.append(got(ref))
                done_nbytes += assignment.nbytes
            except StorageError as error:
                if not error.transient or tries[assignment.number] == TRIES:
                    raise
                begin(assignment)
    for ref in [encoder.check_unchanged.remote(told) for encoder in work.encoders]:
        got(ref)
    report()
    return parts
