"""What a version costs is what is stored for it, and what a checkout reads."""

import numpy as np
import pytest
from faults import CountingObjects
from support import new_repository, noise, open_again

import lamella
from lamella_engine.objects.memory import MemoryObjects


def nudged(array, step):
    return (array.view(np.uint32) + np.uint32(step)).view(np.float32)


@pytest.fixture
def objects():
    return CountingObjects(MemoryObjects())


@pytest.fixture
def repo(objects):
    repo = new_repository(objects)
    frozen, moving = noise(0, 1000, 100), noise(1, 1000, 100)
    for step in range(3):
        repo.push(
            {
                "frozen": frozen,
                "moving": nudged(moving, step),
                "tied": frozen,
                "tiny": np.ones(3),
                "empty": np.ones((0, 3)),
            },
            "m@main",
            message=f"{step}",
        )
    return repo


def payload_nbytes(objects, act):
    """Return how many bytes of packs an action reads beyond the tables that say where they lie."""
    objects.reset()
    act()
    return objects.read_nbytes


def test_a_deeper_version_stores_less_and_reads_more(repo):
    first, _, third = (repo.cost(f"m@v{number}") for number in (1, 2, 3))
    assert first.decoded_nbytes == third.decoded_nbytes == 3 * 400_000 + 24
    assert (first.max_depth, third.max_depth) == (0, 2)
    assert first.encoded_nbytes == first.read_nbytes
    assert third.encoded_nbytes < first.encoded_nbytes < third.read_nbytes
    assert (first.blob_count, third.blob_count) == (2, 4)


def test_each_tensor_has_its_own_cost(repo):
    cost = repo.cost("m@v3")
    parts = cost.per_tensor
    assert list(parts) == ["empty", "frozen", "moving", "tied", "tiny"]
    assert (parts["frozen"].max_depth, parts["moving"].max_depth) == (0, 2)
    assert parts["tied"] == parts["frozen"]
    assert parts["tiny"].encoded_nbytes == parts["empty"].read_nbytes == 0
    assert cost.encoded_nbytes == parts["frozen"].encoded_nbytes + parts["moving"].encoded_nbytes
    only = repo.cost("m@v3", include=["moving", "tiny"])
    assert (only.read_nbytes, only.blob_count) == (parts["moving"].read_nbytes, 3)


def test_a_checkout_reads_what_the_cost_says(repo, objects):
    again = open_again(objects)
    cost = again.cost("m@main")
    assert payload_nbytes(objects, lambda: again.cost("m@main")) < 1000  # known by now: the log alone is looked at
    read = payload_nbytes(objects, lambda: again.checkout("m@main"))
    assert cost.read_nbytes <= read < cost.read_nbytes + 1000


def test_telling_the_cost_reads_no_weights(repo, objects):
    again = open_again(objects)
    assert payload_nbytes(objects, lambda: again.cost("m@main")) < repo.cost("m@main").read_nbytes / 20


def test_progress_of_a_checkout_counts_what_is_read(repo, tmp_path):
    for act in (
        lambda **options: repo.checkout("m@main", **options),
        lambda **options: repo.checkout("m@main", tmp_path / "files", **options),
        lambda **options: repo.checkout("m@main", tmp_path / "selected", include="*", **options),
        lambda **options: repo.checkout("m@main", into=repo.checkout("m@v1"), **options),
    ):
        seen: list[lamella.Progress] = []
        act(progress=seen.append)
        assert {one.total_nbytes for one in seen} == {repo.version("m@main").nbytes}
        assert seen[-1].done_nbytes == seen[-1].total_nbytes
        cost = repo.cost("m@main")
        assert cost.read_nbytes <= seen[-1].stored_nbytes <= cost.read_nbytes + cost.per_tensor["tied"].read_nbytes + 24
