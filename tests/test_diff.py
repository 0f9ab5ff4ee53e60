"""Diffs and logs: what changed between versions, read from manifests alone."""

from itertools import pairwise

import numpy as np
import pytest
from faults import CountingObjects
from support import new_repository, noise, open_again

from lamella_engine.errors import NotFoundError
from lamella_engine.objects.memory import MemoryObjects


def test_a_diff_sorts_every_tensor_into_one_of_five():
    repo = new_repository()
    ours = {
        "gone": noise(0, 50), "retyped": noise(1, 50), "reshaped": noise(2, 50), "changed": noise(3, 50),
        "changed short": np.float32(1), "same": noise(4, 50), "same short": np.float32(2), "empty": np.zeros((0, 3)),
        "zero": np.zeros(20),
    }  # fmt: skip
    theirs = ours | {
        "retyped": ours["retyped"].view(np.int32), "reshaped": ours["reshaped"].reshape(5, 10), "new": noise(5, 50),
        "changed": ours["changed"] + np.eye(1, 50, 49, dtype=np.float32)[0], "changed short": np.float32(-1),
        "zero": -np.zeros(20),
    }  # fmt: skip
    del theirs["gone"]
    repo.push(ours, "m@main")
    repo.push(theirs, "m@main")
    diff = repo.diff("m@v1", "m@v2")
    assert diff.added == ("new",)
    assert diff.removed == ("gone",)
    assert diff.reshaped == ("reshaped", "retyped")
    assert diff.changed == ("changed", "changed short", "zero")
    assert diff.same == ("empty", "same", "same short")
    back = repo.diff("m@v2", "m@v1")
    assert (back.added, back.removed, back.reshaped) == (diff.removed, diff.added, diff.reshaped)
    assert (back.changed, back.same) == (diff.changed, diff.same)


def test_one_cell_of_many_makes_a_tensor_changed():
    repo = new_repository()
    large = np.zeros((5, 600_000), np.uint8)
    repo.push({"w": large}, "m@main")
    large[4, -1] = 1
    repo.push({"w": large}, "m@main")
    assert repo.diff("m@v1", "m@v2").changed == ("w",)


def test_a_diff_reads_no_weights_and_knows_other_models():
    objects = MemoryObjects()
    repo = new_repository(objects)
    repo.push({"w": noise(0, 500_000)}, "a@main")
    repo.push({"w": noise(1, 500_000)}, "b@main")
    counting = CountingObjects(objects)
    assert open_again(counting).diff("a@main", "b@main").changed == ("w",)
    assert counting.read_nbytes < 20_000
    with pytest.raises(NotFoundError):
        repo.diff("a@main", "c@main")


def test_a_log_goes_from_the_newest_along_first_parents_over_every_page_of_history():
    repo = new_repository()
    count = 40  # more than two folds and more than the versions kept open
    for number in range(1, count + 1):
        repo.push({"w": np.float32(number)}, "m@main", message=f"step {number}")
        if number == 20:
            repo.push({"w": np.float32(-1)}, "m@side", parent="m@main", message="side")
    assert [version.message for version in repo.log("m@main")] == [f"step {n}" for n in range(count, 0, -1)]
    assert [version.message for version in repo.log("m@side")] == ["side", *(f"step {n}" for n in range(20, 0, -1))]
    versions = list(repo.log("m@main"))
    assert all(child.parents == (parent.id,) for child, parent in pairwise(versions))
    assert [float(version["w"][()]) for version in versions] == [float(n) for n in range(count, 0, -1)]
