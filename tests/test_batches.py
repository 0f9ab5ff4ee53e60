"""Shares stored in batches, by workers that ask each other for pieces, make the version that one push makes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from support import Array, bits, new_repository
from test_parts import axis_of, weights
from workers import Held, split, structure_of

from lamella_engine.boxes import Box
from lamella_engine.checkpoints.shards import Shards
from lamella_engine.companions import expected
from lamella_engine.errors import InvalidInputError, StorageError
from lamella_engine.exchanging import pieces_of
from lamella_engine.model import Buffer
from lamella_engine.parts import Assignment, Part, SharedPush, samples_of
from lamella_engine.repository import Repository
from lamella_engine.sharding import Piece, batches, share_out

BATCH_NBYTES = 1 << 20


def holdings(held: Sequence[Held]) -> dict[str, list[tuple[Box, int]]]:
    found: defaultdict[str, list[tuple[Box, int]]] = defaultdict(list)
    for worker, mine in enumerate(held):
        for name, box, _ in mine:
            found[name].append((box, worker))
    return found


class Workers:
    """Workers of one push, in this thread."""

    def __init__(self, repo: Repository, tensors: Mapping[str, Array], count: int) -> None:
        held = split(tensors, count, axis_of)
        self.repo = repo
        self.shards = [Shards.in_memory(mine) for mine in held]
        self.shared: SharedPush = repo.sharing.begin(
            "m@main", structure_of(tensors), holdings(held), count, batch_nbytes=BATCH_NBYTES
        )
        self.assignments = self.shared.assignments
        structure = self.assignments[0].structure
        self._specs = {spec.name: spec for spec in structure}
        samples = [np.frombuffer(samples_of(structure, shards), np.uint8) for shards in self.shards]
        self._merged = np.maximum.reduce(samples).tobytes()
        self.asked: set[int] = set()
        """Who was asked for pieces."""

    def store(self, assignment: Assignment) -> Part:
        shards = self.shards[assignment.share.worker]
        return self.repo.sharing.store_batch(assignment, shards, self._merged, self.fetch)

    def fetch(self, wanted: Mapping[int, Sequence[Piece]]) -> dict[int, Buffer]:
        found: dict[int, Buffer] = {}
        for worker, pieces in wanted.items():
            out = np.empty(sum(piece.nbytes for piece in pieces), np.uint8)
            pieces_of(self._specs, self.shards[worker], pieces, out)
            found[worker] = out.data
            self.asked.add(worker)
        return found


@pytest.mark.parametrize("count", [1, 3])
def test_batches_in_any_order_make_the_version_that_one_push_makes(count: int) -> None:
    plain, repo = new_repository(), new_repository()
    for step in (0.0, 1e-3):
        tensors = weights(step=step)
        expected = plain.push(tensors, "m@main")
        workers = Workers(repo, tensors, count)
        parts = [workers.store(assignment) for assignment in reversed(workers.assignments)]
        version = repo.sharing.record(workers.shared, parts)
        assert len(parts) > 2 * count
        assert version.parameters_id == expected.parameters_id
        assert bits(repo.checkout("m@main")) == bits(tensors)
        assert workers.asked == (set(range(count)) if count > 1 else set())
    assert repo.verify(deep=True).ok


def test_a_batch_may_be_stored_again_by_another_worker_with_the_same_shards() -> None:
    tensors = weights()
    repo = new_repository()
    workers = Workers(repo, tensors, 2)
    for assignment in workers.assignments:
        workers.store(assignment)
    repo.sharing.record(workers.shared, [workers.store(assignment) for assignment in workers.assignments])
    assert bits(repo.checkout("m@main")) == bits(tensors)
    assert repo.verify(deep=True).ok


def test_a_batch_whose_pieces_cannot_be_had_fails_and_can_be_stored_later(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = weights()
    repo = new_repository()
    workers = Workers(repo, tensors, 2)
    lacking = next(assignment for assignment in workers.assignments if assignment.share.rounds)

    def gone(wanted: Mapping[int, Sequence[Piece]]) -> dict[int, Buffer]:
        raise StorageError("gone", kind="worker_lost", transient=True)

    reachable = workers.fetch
    monkeypatch.setattr(workers, "fetch", gone)
    with pytest.raises(StorageError) as caught:
        workers.store(lacking)
    assert caught.value.kind == "worker_lost"
    monkeypatch.setattr(workers, "fetch", reachable)
    repo.sharing.record(workers.shared, [workers.store(assignment) for assignment in workers.assignments])
    assert bits(repo.checkout("m@main")) == bits(tensors)


def test_a_version_needs_the_part_of_every_batch() -> None:
    workers = Workers(new_repository(), weights(), 2)
    parts = [workers.store(assignment) for assignment in workers.assignments]
    for some in (parts[:-1], parts[1:], [*parts[1:], parts[1]]):
        with pytest.raises(InvalidInputError) as caught:
            workers.repo.sharing.record(workers.shared, some)
        assert caught.value.kind == "bad_part"
    assert not workers.repo.models()


@pytest.mark.parametrize("nbytes", [1, 3 << 20, 1 << 30])
def test_batches_are_the_share_with_companions_side_by_side(nbytes: int) -> None:
    tensors = weights()
    structure = sorted(structure_of(tensors), key=lambda spec: spec.name)
    for share in share_out(structure, holdings(split(tensors, 3, axis_of)), 3):
        cut = batches(structure, share, nbytes)
        cells = [{(name, number) for name, some in one.cells.items() for number in some} for one in cut]
        assert sorted(cell for one in cells for cell in one) == sorted(
            (name, number) for name, some in share.cells.items() for number in some
        )
        assert len(cut) == 1 or all(cells)
        for follower, companion in expected(structure).items():
            for one in cells:
                for name, number in one:
                    beside = number in share.cells.get(companion.name, ())
                    assert name != follower or not beside or (companion.name, number) in one
        brought = [one.brought() for one in cut]
        assert {cell: pieces for one in brought for cell, pieces in one.items()} == share.brought()
    assert nbytes > 1 << 20 or len(cut) > 1
