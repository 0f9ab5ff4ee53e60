"""A checkpoint that several workers hold becomes the version that one worker with all of it would have pushed."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import Array, bits, names_of, new_repository, store_of
from workers import push_shared, split

from lamella_engine.repository import Repository

RNG = np.random.default_rng(7)


def weights(seed: int = 0, step: float = 0.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    drift = np.random.default_rng(99)

    def tensor(*shape: int, dtype: Any = np.float32) -> Array:
        base = rng.standard_normal(shape).astype(np.float32)
        return (base + np.float32(step) * drift.standard_normal(shape).astype(np.float32)).astype(dtype)

    return {
        "embed": tensor(1031, 640),  # 2.6 MB: one cell, cut anywhere
        "layer.weight": tensor(700, 2100),  # 5.9 MB: several cells that no rank's rows line up with
        "layer.bias": tensor(2100),
        "state.layer.weight.exp_avg": tensor(700, 2100) * np.float32(1e-3),
        "state.layer.weight.exp_avg_sq": tensor(700, 2100) ** 2 * np.float32(1e-6),
        "state.layer.weight.step": np.float32(7.0).reshape(()),
        "half": tensor(300, 4100, dtype=ml_dtypes.bfloat16),
        "cube": tensor(6, 50, 70),
        "empty": np.zeros((0, 5), np.float32),
        "odd": np.frombuffer(b"\x01\x00\xc0\x7f\x00\x00\x00\x80" * 40, np.float32).reshape(8, 10).copy(),
    }


def axes(name: str) -> int | None:
    return {"layer.bias": None, "state.layer.weight.step": None, "empty": None, "cube": 1, "half": 1}.get(name, 0)


def pack_nbytes(repo: Repository) -> int:
    return sum(nbytes for name, nbytes in names_of(store_of(repo).objects).items() if name.startswith("packs/"))


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8])
def test_every_number_of_workers_makes_the_same_version_as_one_push(workers: int) -> None:
    first, second = weights(), weights(step=1e-3)
    plain = new_repository()
    plain.push(first, "m@main")
    expected = plain.push(second, "m@main")

    repo = new_repository()
    repos = [repo] * workers
    push_shared(repos, "m@main", first, split(first, workers, axes))
    version, parts = push_shared(repos, "m@main", second, split(second, workers, axes))

    assert version.parameters_id == expected.parameters_id
    assert version.structure_id == expected.structure_id
    assert bits(repo.checkout("m@main")) == bits(second)
    assert bits(repo.checkout("m@main~1")) == bits(first)
    assert repo.verify(deep=True).ok
    before = pack_nbytes(repo)
    push_shared(repos, "m@main", second, split(second, workers, axes))
    assert pack_nbytes(repo) == before


def test_a_delta_is_as_small_in_parts_as_in_one_push() -> None:
    first, second = weights(), weights(step=1e-3)
    sizes = []
    for workers in (0, 1, 4):
        repo = new_repository()
        for tensors in (first, second):
            before = pack_nbytes(repo)
            if workers:
                push_shared([repo] * workers, "m@main", tensors, split(tensors, workers, axes))
            else:
                repo.push(tensors, "m@main")
        sizes.append(pack_nbytes(repo) - before)
    assert max(sizes) < 1.03 * min(sizes)
