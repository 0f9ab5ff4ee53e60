"""torch.distributed.checkpoint: every rank stores and loads its own shards, and the result is an ordinary version.

    dcp.save(state, storage_writer=LamellaWriter(repo, "llm@run-7", message="step 2000"))
    dcp.load(state, storage_reader=LamellaReader(repo, "llm@run-7"))

Tensors are named as ``dcp`` flattens the state, as :func:`lamella.torch.push` names them too; what is no tensor is
kept in :data:`~lamella.torch.STATE_FILE`. So :func:`lamella.torch.state` and ``lamella checkout`` read what ranks have
saved, ``dcp.load`` reads what was pushed otherwise, and the same state has the same ids whatever the number of ranks.
Nothing is pickled into a repository, nor unpickled out of one.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from lamella.places import Place
from lamella.torch.process_groups import Group, exchange
from lamella.torch.states import STATE_FILE, document_of, flatten, names_in, node_of, rebuilt
from lamella_engine.boxes import Box
from lamella_engine.content_store.revisions import parse_target
from lamella_engine.errors import ConflictError, InvalidInputError, LamellaError
from lamella_engine.model import TensorSpec
from lamella_engine.parts import Assignment, Part, SharedPush
from lamella_engine.repository import Repository
from lamella_engine.torch_tensors import dtype_of_torch, torch_dtype_of
from lamella_engine.versions import Version


@dataclass(frozen=True)
class _Stored:
    """What a rank has done; travels to the coordinator."""

    part: Part
    objects: dict[str, Any]
    """Those of the state that are no tensors, by name: numbers, text, lists and dicts."""


class LamellaWriter(StorageWriter):
    """Saves a state that ranks hold in shards as one version: for ``dcp.save`` and ``dcp.async_save``.

    Each rank hashes, encodes and stores the cells that it has most of, and sends the pieces of others to the ranks that
    store those, over a gloo group of its own. The coordinator records the version at the end: until then nothing is
    visible, and a rank that dies leaves nothing visible.

    Parameters
    ----------
    repo
        A repository that every rank has opened, or its location, which ``async_save`` in a process of its own needs.
    target
        ``"model@branch"``; ``checkpoint_id`` of ``dcp.save`` takes its place if that is given.
    message, metrics, recipe, parent
        As :meth:`Repository.push <lamella.Repository.push>` takes them.

    The planner has to be the default one, or one made of it. In errors of ``dcp`` (CheckpointException, which is no
    Exception) those of lamella stand by rank.
    """

    def __init__(
        self,
        repo: Repository | str,
        target: str,
        *,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        recipe: Any = None,
        parent: str | None = None,
    ) -> None:
        parse_target(target)
        self._place = Place(repo)
        self._target = target
        self._notes = {"message": message, "metrics": metrics, "recipe": recipe}
        self._parent = parent
        self._shared: SharedPush | None = None
        self._group: tuple[tuple[int, ...], str] = (), ""
        """The ranks of the save, and how their group is called."""
        self.version: Version | None = None
        """What the last save recorded, on the rank that coordinates."""
        self.sent_nbytes = 0
        """Bytes of pieces that this rank sent to others in the last save."""
        self.stored_nbytes = 0
        """Bytes, encoded, that this rank gave to the store in the last save."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shared": None, "version": None}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether a ``checkpoint_id`` names a branch."""
        try:
            parse_target(str(checkpoint_id))
        except LamellaError:
            return False
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        """Forget a save that failed, and go to another branch if one is given."""
        if checkpoint_id:
            parse_target(str(checkpoint_id))
            self._target = str(checkpoint_id)
        if self._shared is not None:
            self._shared.abandon()
            self._shared = None
        self.version = None

    def storage_meta(self) -> StorageMeta | None:
        """Return what identifies a save to ``dcp``."""
        return StorageMeta(checkpoint_id=self._target)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take part in a save; ``kwargs`` is what ``dcp`` looks for to say more."""
        if not kwargs.get("use_collectives", True):
            raise InvalidInputError(
                "ranks that do not talk to each other cannot make one version: leave use_collectives on",
                kind="bad_option",
            )
        self._place.open()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Say in a plan which rank of the job this is: ranks of a group are numbered anew."""
        return replace(_shared(plan), storage_data=dist.get_rank() if dist.is_initialized() else 0)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the push, and say which rank stores what. Only the coordinator does."""
        if not all(getattr(plan, "usable", True) for plan in plans):
            raise InvalidInputError(
                "every save is planned anew, against what is stored: use a planner with enable_plan_caching=False",
                kind="bad_option",
            )
        structure: dict[str, TensorSpec] = {}
        holdings: dict[str, list[tuple[Box, int]]] = {}
        for worker, plan in enumerate(plans):
            for item in _tensors(plan):
                spec, box = _described(item)
                if structure.setdefault(spec.name, spec) != spec:
                    raise InvalidInputError(
                        f"{spec.name[:80]!r} is not of one dtype and shape on all ranks", kind="bad_shards"
                    )
                holdings.setdefault(spec.name, []).append((box, worker))
        self._shared = self._place.open().sharing.begin(
            self._target, list(structure.values()), holdings, len(plans), parent=self._parent
        )
        ranks = tuple(plan.storage_data for plan in plans)
        name = Group.taken(ranks)
        self._group = ranks, name
        return [
            replace(plan, storage_data=(assignment, name, len(plans)))
            for plan, assignment in zip(plans, self._shared.assignments, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Store what is this rank's to store."""
        assignment: Assignment
        assignment, name, workers = plan.storage_data
        objects: dict[str, Any] = {}

        def held() -> Iterator[tuple[str, Box, object]]:
            objects.update((item.index.fqn, _object(planner, item)) for item in plan.items if _is_object(item))
            for item in _tensors(plan):
                spec, box = _described(item)
                yield spec.name, box, planner.resolve_data(item)

        with exchange(name, assignment.share.worker, workers) as others:
            part = self._place.open().sharing.store_part(assignment, held, others)
        self.sent_nbytes, self.stored_nbytes = part.sent_nbytes, part.stored_nbytes
        done: Future[list[WriteResult]] = Future()
        # One, whatever the items: nobody but finish() looks at it, and a rank that holds nothing has a part too.
        done.set_result([WriteResult(MetadataIndex(""), part.stored_nbytes, _Stored(part, objects))])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Record the version. Only the coordinator does."""
        assert self._shared is not None
        stored = [one.storage_data for (one,) in results]
        objects = {name: value for one in stored for name, value in one.objects.items()}
        document = _document(metadata, objects)
        self.version = self._place.open().sharing.record(
            self._shared,
            [one.part for one in stored],
            files=None if document is None else {STATE_FILE: document},
            **self._notes,
        )
        Group.give_back(*self._group)
        self._shared = None


class LamellaReader(StorageReader):
    """Loads a version into a state that ranks hold in shards, however many there are: for ``dcp.load``.

    Every rank reads the cells that its shards touch, and decodes them into their memory. Any version will do whose
    tensors have the names of the flattened state.

    Parameters
    ----------
    repo
        A repository that every rank has opened, or its location.
    revision
        Which version; ``checkpoint_id`` of ``dcp.load`` takes its place if that is given.
    """

    def __init__(self, repo: Repository | str, revision: str) -> None:
        self._place = Place(repo)
        self._revision = revision
        self._version: Version | None = None
        self._specs: dict[str, TensorSpec] = {}
        self._objects: dict[str, Callable[[], Any]] = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether a ``checkpoint_id`` could be a revision: all text could."""
        return isinstance(checkpoint_id, str)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Forget what was read of another version, and go to one if it is given."""
        if checkpoint_id:
            self._revision = str(checkpoint_id)
        self._version = None

    def read_metadata(self, *args: Any) -> Metadata:
        """Return what ``dcp`` plans with: every tensor as one chunk, whatever wrote it."""
        self._version = self._place.open().version(self._revision)
        found: dict[str, Any] = {}
        self._specs = {spec.name: spec for spec in self._version.structure}
        for name, spec in self._specs.items():
            size = torch.Size(_torch_shape(spec))
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            found[name] = TensorStorageMetadata(TensorProperties(dtype=torch_dtype_of(spec.dtype)), size, [chunk])
        self._objects, paths = _objects_of(self._version)
        found |= dict.fromkeys(self._objects, BytesStorageMetadata())
        return Metadata(found, planner_data={name: (name,) for name in found} | paths)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any) -> None:
        """Take part in a load."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave a plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Tell all ranks which version the coordinator has found."""
        assert self._version is not None
        return [replace(plan, storage_data=self._version.id) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank's shards need."""
        assert self._version is not None
        if plan.storage_data != self._version.id:
            raise ConflictError(
                f"{self._revision} moved while ranks began to load it: load again, or give a version's id",
                expected=plan.storage_data,
                actual=self._version.id,
            )
        targets: list[tuple[str, Box, torch.Tensor]] = []
        tensors: list[tuple[ReadItem, torch.Tensor]] = []
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                stream = io.BytesIO()
                torch.save(self._objects[name](), stream)  # what the default planner reads; it never was in a store
                stream.seek(0)
                planner.load_bytes(item, stream)
                continue
            tensor = planner.resolve_tensor(item).detach()
            tensors.append((item, tensor))
            targets.append((name, _box(self._specs[name], item.storage_offsets, item.lengths), tensor))
        self._place.open().sharing.fill_boxes(self._version.id, targets)
        for item, tensor in tensors:
            planner.commit_tensor(item, tensor)
        done: Future[None] = Future()
        done.set_result(None)
        return done


# -- plans -------------------------------------------------------------------------------------------------------------


def _is_object(item: WriteItem) -> bool:
    return item.type is WriteItemType.BYTE_IO


def _tensors(plan: SavePlan) -> list[WriteItem]:
    return [item for item in plan.items if not _is_object(item)]


def _shared(plan: SavePlan) -> SavePlan:
    """Return a plan in which tensors of one shape, cut alike, are described once: the layers of a model are few kinds.

    Plans travel pickled, and the coordinator makes those of all ranks while they wait for it. An item takes 14 objects
    without this and 6 with it; and so many live ones may have Python look for garbage, which takes 0.2 s in a process
    that has imported torch: with 1,216 items on each of two ranks it did in every save.
    """
    known: dict[Any, TensorWriteData] = {}

    def described_once(item: WriteItem) -> WriteItem:
        data = item.tensor_data
        if data is None:
            return item
        key = (data.chunk.offsets, data.chunk.sizes, data.size, *vars(data.properties).values())
        return replace(item, tensor_data=known.setdefault(key, data))

    return replace(plan, items=[described_once(item) for item in plan.items])


def _described(item: WriteItem) -> tuple[TensorSpec, Box]:
    """Return the tensor that an item is of, and the place of the item in it."""
    data = item.tensor_data
    assert data is not None
    dtype = dtype_of_torch(data.properties.dtype)
    packed = 2 if dtype.opaque else 1
    size = tuple(data.size)
    spec = TensorSpec(item.index.fqn, dtype, (*size[:-1], size[-1] * packed) if size else ())
    return spec, _box(spec, data.chunk.offsets, data.chunk.sizes)


def _box(spec: TensorSpec, offsets: torch.Size, sizes: torch.Size) -> Box:
    """Return a place in a tensor; torch counts packed elements in pairs."""
    box = [(int(first), int(first + length)) for first, length in zip(offsets, sizes, strict=True)]
    if spec.dtype.opaque:
        box[-1] = box[-1][0] * 2, box[-1][1] * 2
    return tuple(box)


def _torch_shape(spec: TensorSpec) -> tuple[int, ...]:
    return (*spec.shape[:-1], spec.shape[-1] // 2) if spec.dtype.opaque else spec.shape


def _object(planner: SavePlanner, item: WriteItem) -> Any:
    """Return what is no tensor, as it is in the state; raises InvalidInputError if it could not be kept."""
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        raise InvalidInputError(
            f"a {type(planner).__name__} gives objects pickled only: use torch's DefaultSavePlanner, or one made of it",
            kind="bad_option",
        )
    value = look_up(item.index)
    inner: dict[str, Any] = {}
    node_of(value, (item.index.fqn,), inner)
    if inner:
        raise InvalidInputError(
            f"{item.index.fqn[:80]!r} is a {type(value).__name__} that holds arrays, or tensors in a tuple: make it a "
            "tensor, or a list or dict of tensors",
            kind="not_storable",
            path=item.index.fqn,
        )
    return value


# -- nested states -----------------------------------------------------------------------------------------------------


def _document(metadata: Metadata, objects: Mapping[str, Any]) -> bytes | None:
    """Return the file that holds what of a saved state is no tensor; None if that is nothing."""
    paths = metadata.planner_data or {}
    state: dict[str, Any] = {}
    for name, kind in metadata.state_dict_metadata.items():
        stands = isinstance(kind, TensorStorageMetadata)
        set_element(state, paths.get(name, (name,)), torch.empty(0) if stands else objects[name])
    return flatten(state)[1]


def _objects_of(version: Version) -> tuple[dict[str, Callable[[], Any]], dict[str, tuple[str | int, ...]]]:
    """Return what ``dcp`` may ask of a version that is no tensor, each as a call that gives it; and paths of names."""
    node = document_of(version)
    if node is None:
        return {}, {}
    stands = {name: torch.empty(0, device="meta") for name in names_in(node, "$tensor")}
    arrays = {name: _Array(version, name) for name in names_in(node, "$array")}
    state = rebuilt(node, stands | arrays)
    if not isinstance(state, dict):
        return {}, {}
    flat, paths = flatten_state_dict(state)
    objects = {name: value for name, value in flat.items() if not isinstance(value, torch.Tensor)}
    return {name: partial(_given, value) for name, value in objects.items()}, paths


@dataclass(frozen=True)
class _Array:
    """Stands for an array of NumPy until somebody asks for it."""

    version: Version
    name: str


def _given(value: Any) -> Any:
    match value:
        case _Array():
            return value.version[value.name].numpy()
        case dict():
            return {key: _given(item) for key, item in value.items()}
        case list():
            return [_given(item) for item in value]
        case tuple():
            return tuple(_given(item) for item in value)
    return value
