"""A repository against a plain dict, driven by Hypothesis: whatever is done in whatever order, they agree."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule
from support import bits, names_of, new_repository, open_again, store_of

from lamella_engine.chunk_index import INDEX_PATH
from lamella_engine.errors import AlreadyExistsError, ConflictError, InvalidInputError, NotFoundError
from lamella_engine.executor import InlineExecutor, ThreadExecutor
from lamella_engine.objects.local import LocalObjects
from lamella_engine.objects.memory import MemoryObjects

MODELS = ("m", "m-2", "n/x")
REFS = ("main", "side", "a/b", "release")

values = st.floats(width=32, allow_nan=True) | st.sampled_from([0.0, -0.0, 1.0])
small = st.lists(values, max_size=12).map(lambda items: np.array(items, np.float32))
seeded = st.builds(
    lambda seed, rows: np.random.default_rng(seed).standard_normal((rows, 7)).astype(np.float32),
    st.integers(0, 3), st.integers(0, 40),
)  # fmt: skip
halves = st.builds(
    lambda seed: np.random.default_rng(seed).integers(0, 1 << 16, 300, np.uint16).view(np.float16), st.integers(0, 3)
)
tensor = small | seeded | halves | st.integers(-3, 3).map(np.int64)
names = st.sampled_from(["w", "b", "layer.0.w", "layer.0.b", "layer.1.w", ""])
metrics = st.dictionaries(st.sampled_from(["loss", "top"]), st.floats(allow_nan=False) | st.integers(-3, 3), max_size=2)
recipes = st.none() | st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3) | st.none(), max_size=2)


@dataclass
class Expected:
    """What the model knows of a version."""

    model: str
    number: int
    id: str
    tensors: dict
    parent: "Expected | None"
    said: tuple


class RepositoryMachine(RuleBasedStateMachine):
    versions = Bundle("versions")

    def __init__(self):
        super().__init__()
        self.numbers: dict[str, list[Expected]] = {}
        self.refs: dict[tuple[str, str], tuple[str, Expected]] = {}
        self.objects = self.make()
        self.repo = new_repository(self.objects, max_depth=3, index_path=self.index())

    def make(self):
        return MemoryObjects()

    def index(self):
        return None

    def expect(self, source, model, said, parent, version):
        """Enter a new version into the model."""
        numbers = self.numbers.setdefault(model, [])
        expected = Expected(model, len(numbers) + 1, version.id, bits(source), parent, said)
        numbers.append(expected)
        assert (version.model, version.number) == (model, expected.number)
        assert version.parents == (() if parent is None else (parent.id,))
        return expected

    def push(self, source, model, branch, said, parent=None):
        message, metrics, recipe = said
        before = names_of(self.objects)
        head = self.refs.get((model, branch))
        start = head[1] if head is not None else parent
        revision = None if parent is None else f"{parent.model}@v{parent.number}"
        push = lambda: self.repo.push(  # noqa: E731
            source, f"{model}@{branch}", message=message, metrics=metrics, recipe=recipe, parent=revision
        )
        if head is not None and head[0] != "branch":
            with pytest.raises(AlreadyExistsError):
                push()
            return multiple()
        if head is not None and parent is not None and parent.id != head[1].id:
            with pytest.raises(ConflictError):
                push()
            return multiple()
        version = push()
        if head is not None and (head[1].tensors, repr(head[1].said)) == (bits(source), repr(said)):
            assert version.id == head[1].id
            assert names_of(self.objects) == before
            return multiple()
        expected = self.expect(source, model, said, start, version)
        self.refs[model, branch] = "branch", expected
        return expected

    @initialize(target=versions, source=st.dictionaries(names, seeded, min_size=2))
    def first(self, source):
        return self.push(source, "m", "main", ("", {}, None))

    @rule(
        target=versions,
        source=st.dictionaries(names, tensor, min_size=1, max_size=5),
        model=st.sampled_from(MODELS),
        branch=st.sampled_from(REFS),
        said=st.tuples(st.text(max_size=4), metrics.map(lambda found: dict(sorted(found.items()))), st.none()),
    )
    def push_anything(self, source, model, branch, said):
        return self.push(source, model, branch, said)

    @rule(
        target=versions,
        parent=versions,
        name=names,
        value=tensor,
        branch=st.sampled_from(REFS),
        model=st.none() | st.sampled_from(MODELS),
    )
    def push_a_change(self, parent, name, value, branch, model):
        """A fine-tune: everything as in the parent but for one tensor, and one element of each other."""
        source = {name: array.copy() for name, array in self.repo.checkout(parent.id).items()}
        for array in source.values():
            if array.size and array.dtype == np.float32:
                array.reshape(-1)[0] += 1
        return self.push(source | {name: value}, model or parent.model, branch, ("tune", {}, None), parent=parent)

    @rule(target=versions, model=st.sampled_from(MODELS), branch=st.sampled_from(REFS), recipe=recipes)
    def push_the_head_again(self, model, branch, recipe):
        """With the same recipe nothing happens, with another one a version without a pack does."""
        head = self.refs.get((model, branch))
        if head is None:
            return multiple()
        source = self.repo.checkout(f"{model}@{branch}")
        message, metrics, last = head[1].said
        packs = self.repo.stats().packs
        pushed = self.push(source, model, branch, (message, metrics, last if recipe is None else recipe))
        assert self.repo.stats().packs == packs
        return pushed

    def set_ref(self, kind, model, name, version):
        at = self.refs.get((model, name))
        call = lambda: getattr(self.repo, kind)(f"{model}@{name}", f"{version.model}@v{version.number}")  # noqa: E731
        if version.model != model:
            with pytest.raises(InvalidInputError):
                call()
        elif at is not None and (at[0] != kind or (kind == "tag" and at[1].id != version.id)):
            with pytest.raises(AlreadyExistsError):
                call()
        else:
            call()
            self.refs[model, name] = kind, version

    @rule(
        kind=st.sampled_from(["branch", "tag", "alias"]), version=versions, name=st.sampled_from([*REFS, "production"])
    )
    def name_a_version(self, kind, version, name):
        self.set_ref(kind, version.model, name, version)

    @rule(kind=st.sampled_from(["branch", "tag", "alias"]), version=versions, model=st.sampled_from(MODELS))
    def name_a_version_of_another_model(self, kind, version, model):
        if model != version.model:
            self.set_ref(kind, model, "side", version)

    @rule(model=st.sampled_from(MODELS), name=st.sampled_from(REFS))
    def move_a_branch_back(self, model, name):
        at = self.refs.get((model, name))
        if at is not None and at[0] == "branch" and at[1].parent is not None and at[1].parent.model == model:
            self.set_ref("branch", model, name, at[1].parent)

    @rule(model=st.sampled_from(MODELS), name=st.sampled_from([*REFS, "production"]))
    def delete_a_ref(self, model, name):
        if self.refs.pop((model, name), None) is None:
            with pytest.raises(NotFoundError):
                self.repo.delete_ref(f"{model}@{name}")
        else:
            self.repo.delete_ref(f"{model}@{name}")

    @rule(threads=st.booleans(), keep_index=st.booleans())
    def reopen(self, threads, keep_index):
        self.repo.close()
        if not keep_index and self.index() is not None:
            shutil.rmtree(self.index().parent)
        executor = ThreadExecutor(threads=2) if threads else InlineExecutor()
        self.repo = open_again(self.objects, executor, index_path=self.index())

    @rule(version=versions, verify=st.sampled_from(["blob", "chunk"]), by_number=st.booleans())
    def checkout(self, version, verify, by_number):
        revision = f"{version.model}@v{version.number}" if by_number else version.id
        assert bits(self.repo.checkout(revision, verify=verify)) == version.tensors

    @rule(version=versions, prefix=st.sampled_from(["layer.", "layer.0.", "w", ""]))
    def checkout_a_part(self, version, prefix):
        wanted = {name: what for name, what in version.tensors.items() if name.startswith(prefix)}
        if wanted:
            assert bits(self.repo.checkout(version.id, include=f"{prefix}*")) == wanted
        else:
            with pytest.raises(NotFoundError):
                self.repo.checkout(version.id, include=f"{prefix}*")

    @rule(version=versions, start=st.integers(-9, 9), stop=st.integers(-9, 9), step=st.sampled_from([1, 2, -1]))
    def slice(self, version, start, stop, step):
        lazy = self.repo.version(version.id)
        assert list(lazy) == sorted(version.tensors)
        for name, (dtype, shape, data) in version.tensors.items():
            if shape:
                expected = np.frombuffer(data, dtype).reshape(shape)[start:stop:step]
                assert lazy[name][start:stop:step].tobytes() == expected.tobytes()

    @rule(a=versions, b=versions)
    def diff(self, a, b):
        found = self.repo.diff(a.id, b.id)
        both = a.tensors.keys() & b.tensors.keys()
        alike = {name for name in both if a.tensors[name][:2] == b.tensors[name][:2]}
        same = {name for name in alike if a.tensors[name] == b.tensors[name]}
        assert set(found.added) == b.tensors.keys() - a.tensors.keys()
        assert set(found.removed) == a.tensors.keys() - b.tensors.keys()
        assert set(found.reshaped) == both - alike
        assert set(found.changed) == alike - same
        assert set(found.same) == same
        if both == a.tensors.keys() == b.tensors.keys() == alike:
            assert (self.repo.distance(a.id, b.id).changed == 0) == (same == alike)

    @rule(version=versions)
    def log(self, version):
        expected = []
        while version is not None:
            expected.append(version)
            version = version.parent
        found = list(self.repo.log(f"{expected[0].model}@v{expected[0].number}"))
        assert [(at.id, at.model, at.number) for at in found] == [(at.id, at.model, at.number) for at in expected]
        for at, one in zip(found, expected, strict=True):
            assert (at.message, at.metrics, at.recipe) == one.said

    @invariant()
    def refs_agree(self):
        for model in MODELS:
            found = {ref.name: (ref.kind, ref.number) for ref in self.repo.refs(model)}
            assert found == {
                name: (kind, at.number) for (owner, name), (kind, at) in self.refs.items() if owner == model
            }
        assert self.repo.models() == sorted(self.numbers)

    @precondition(lambda self: self.numbers)
    @invariant()
    def nothing_is_lost(self):
        for model, numbers in self.numbers.items():
            assert self.repo.version(f"{model}@latest").id == numbers[-1].id

    def teardown(self):
        everything = [version for numbers in self.numbers.values() for version in numbers]
        for version in everything:
            assert bits(self.repo.checkout(version.id, verify="chunk")) == version.tensors
        assert self.repo.verify(deep=True).problems == []
        stats = self.repo.stats()
        assert (stats.models, stats.versions) == (len(self.numbers), len(everything))
        assert stats.stored_nbytes == sum(names_of(self.objects).values())
        assert stats.decoded_nbytes == sum(
            len(data) for version in everything for _, _, data in version.tensors.values()
        )
        store = store_of(self.repo)
        depths = (row.depth for pack in store.log.state.packs() for row in store.packs.index(pack.name).rows)
        deepest = max(depths, default=0)
        assert deepest <= 3
        self.repo.close()


class DiskMachine(RepositoryMachine):
    """The same on a disk, with a chunk index that outlives the process, or does not."""

    def make(self):
        self.root = Path(tempfile.mkdtemp())
        return LocalObjects.create(self.root)

    def index(self):
        return self.root / INDEX_PATH

    def teardown(self):
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.root)


TestInMemory = RepositoryMachine.TestCase
TestOnDisk = DiskMachine.TestCase
