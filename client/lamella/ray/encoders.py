"""Encoders: the actors, one for each node, that read, hash, encode and store what lies there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import ray

import lamella
from lamella.ray.refs import brought
from lamella.ray.shards import Shard
from lamella_engine.boxes import Box, Octets
from lamella_engine.checkpoints import Checkpoint
from lamella_engine.checkpoints.shards import Shards
from lamella_engine.checkpoints.sources import source_changed
from lamella_engine.errors import InvalidInputError
from lamella_engine.exchanging import pieces_of
from lamella_engine.model import Buffer, TensorSpec
from lamella_engine.parts import Assignment, Part, samples_of
from lamella_engine.repository import Repository
from lamella_engine.sharding import Piece

RESTARTS = 4
"""So often is one encoder started again in a push: more deaths have a cause that starting it again does not mend."""

READERS = 4
"""Threads of an encoder that read pieces for others while it stores: each holds one piece of at most 4 MiB."""

Fingerprints: TypeAlias = tuple[tuple[int, ...], ...]
"""What each file of a node was when the push began: it must be the same if it is opened again."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What an encoder says of the shards of its node."""

    boxes: tuple[tuple[TensorSpec, Box], ...]
    """The tensors that they are of, and which parts."""
    fingerprints: Fingerprints


@dataclass(frozen=True, slots=True)
class Work:
    """What all encoders of a push are told."""

    assignments: tuple[Assignment, ...]
    encoders: tuple[Any, ...]
    shards: tuple[Sequence[Shard], ...]
    """By encoder, as what follows."""
    fingerprints: tuple[Fingerprints, ...]


class Told(NamedTuple):
    """What encoders are called with: refs that Ray does not look into, so that an encoder fetches each once."""

    work: Any
    """To :class:`Work`."""
    merged: Any = None
    """To the samples of all encoders, merged, as an array of uint8."""


class _Node:
    """The shards of one node, open for reading."""

    def __init__(self, given: Sequence[Shard]) -> None:
        opened = [(shard, shard.source.open()) for shard in given]
        self.fingerprints: Fingerprints = tuple(source.fingerprint for _, source in opened)
        self.structure: dict[str, TensorSpec] = {}
        boxes: list[tuple[TensorSpec, Box]] = []
        sources: list[tuple[Checkpoint, Mapping[str, tuple[str, Box]]]] = []
        for shard, source in opened:
            unknown = shard.places.keys() - {spec.name for spec in source.structure}
            if unknown:
                raise InvalidInputError(
                    f"a place is given for {min(unknown)[:80]!r}, which is not in its shard: check the names",
                    kind="bad_shards",
                )
            places: dict[str, tuple[str, Box]] = {}
            for spec in source.structure:
                shape, offset = shard.places.get(spec.name, (spec.shape, (0,) * len(spec.shape)))
                if not len(shape) == len(offset) == len(spec.shape):
                    raise InvalidInputError(
                        f"a shard of {spec.name[:80]!r} has shape {spec.shape}, and its place is in {shape}: give the "
                        "shape of the whole tensor, and an offset for each axis",
                        kind="bad_shards",
                        tensor=spec.name,
                    )
                box = tuple((first, first + length) for first, length in zip(offset, spec.shape, strict=True))
                places[spec.name] = spec.name, box
                whole = TensorSpec(spec.name, spec.dtype, tuple(shape))
                boxes.append((same(self.structure, whole), box))
            sources.append((source, places))
        self.boxes = tuple(boxes)
        self.shards = Shards(sources)


def same(structure: dict[str, TensorSpec], spec: TensorSpec) -> TensorSpec:
    """Enter a tensor, or return the one that is there; raises InvalidInputError if that is another."""
    if structure.setdefault(spec.name, spec) != spec:
        raise InvalidInputError(
            f"{spec.name[:80]!r} is not of one dtype and shape in all shards: give the places of those that are parts",
            kind="bad_shards",
            tensor=spec.name,
        )
    return structure[spec.name]


class _Encoder:
    """Reads, hashes, encodes and stores what lies on one node. It knows nothing that it could not be told again."""

    def __init__(self, location: str, worker: int) -> None:
        self._location = location
        self._worker = worker
        self._lock = Lock()
        self._opened: _Node | None = None
        self._repo: Repository | None = None
        self._work: Work | None = None

    @ray.method(concurrency_group="reading")
    def describe(self, shards: Sequence[Shard]) -> Holding:
        """Say what lies here."""
        node = self._node(shards)
        return Holding(node.boxes, node.fingerprints)

    @ray.method(concurrency_group="reading")
    def samples(self, told: Told) -> Octets:
        """Return what is here of the version's sketch."""
        work, node = self._known(told)
        return np.frombuffer(samples_of(work.assignments[0].structure, node.shards), np.uint8)

    @ray.method(concurrency_group="reading")
    def pieces(self, told: Told, pieces: Sequence[Piece]) -> Octets:
        """Return pieces that another encoder needs, one after another."""
        _, node = self._known(told)
        out = np.empty(sum(piece.nbytes for piece in pieces), np.uint8)
        pieces_of(node.structure, node.shards, pieces, out)
        return out

    @ray.method(concurrency_group="storing")
    def store(self, told: Told, number: int) -> Part:
        """Store one assignment."""
        work, node = self._known(told)
        self._repo = self._repo or lamella.open(self._location)
        merged: Octets = brought(told.merged)
        fetch = partial(_fetched, work.encoders, told)
        return self._repo.sharing.store_batch(work.assignments[number], node.shards, merged.data, fetch)

    @ray.method(concurrency_group="reading")
    def check_unchanged(self, told: Told) -> None:
        """Raise InvalidInputError (``source_changed``) if a file is another than it was."""
        self._known(told)[1].shards.check_unchanged()

    def _known(self, told: Told) -> tuple[Work, _Node]:
        """Return what this push is, and the shards of this node, which are what they were when it began."""
        with self._lock:
            self._work = self._work or brought(told.work)
        shards = self._work.shards[self._worker]
        node = self._node(shards)
        if node.fingerprints != self._work.fingerprints[self._worker]:
            raise source_changed(f"a file on node {shards[0].node}")
        return self._work, node

    def _node(self, shards: Sequence[Shard]) -> _Node:
        with self._lock:
            self._opened = self._opened or _Node(shards)
            return self._opened


_remote: Any = ray.remote  # its types know no concurrency groups

# What a process had begun when it was lost, the next one begins anew.
new_encoder = _remote(
    num_cpus=0, max_restarts=RESTARTS, max_task_retries=-1, concurrency_groups={"reading": READERS, "storing": 1}
)(_Encoder)


def _fetched(encoders: Sequence[Any], told: Told, wanted: Mapping[int, Sequence[Piece]]) -> dict[int, Buffer]:
    """See :data:`~lamella_engine.exchanging.Fetch`."""
    refs = {worker: encoders[worker].pieces.remote(told, pieces) for worker, pieces in wanted.items()}
    return {worker: brought(ref, sum(piece.nbytes for piece in wanted[worker])).data for worker, ref in refs.items()}
