"""Versions as users hold them: metadata, and tensors that are read when they are touched."""

import operator
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from lamella_engine.checkpoints import to_numpy
from lamella_engine.content_store.seam import Recorded
from lamella_engine.errors import InvalidInputError, TensorNotFoundError
from lamella_engine.model import TensorSpec, VersionId
from lamella_engine.reading import Reader
from lamella_engine.torch_tensors import to_torch, torch_dtype_of
from lamella_engine.version_files import VersionFiles

if TYPE_CHECKING:
    import torch
    import zarr


class LazyTensor:
    """One tensor of a version. Nothing is read before it is asked for, and then only the chunks that hold it.

    ``tensor[...]`` takes integers, slices and an ellipsis, as ``safetensors``' ``get_slice`` does, and returns a
    NumPy array; bfloat16 and float8 come as ml_dtypes. A dtype smaller than a byte has no elements to pick:
    ``numpy()`` gives its bytes, uint8, 1-d.
    """

    __module__ = "lamella"
    __slots__ = ("_reader", "_spec", "_version")

    def __init__(self, reader: Reader, version: VersionId, spec: TensorSpec) -> None:
        self._reader = reader
        self._version = version
        self._spec = spec

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self._spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in elements."""
        return self._spec.shape

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Its NumPy dtype; uint8 for a dtype smaller than a byte (see :attr:`dtype_name`)."""
        return self._spec.dtype.numpy or np.dtype(np.uint8)

    @property
    def dtype_name(self) -> str:
        """Its dtype's name, such as ``"bfloat16"`` or ``"f4"``."""
        return self._spec.dtype.name

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self._spec.nbytes

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def __iter__(self) -> "Iterator[np.ndarray[Any, np.dtype[Any]]]":
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.dtype_name}, {self.shape})"

    def __getitem__(self, key: Any) -> "np.ndarray[Any, np.dtype[Any]]":
        spec = self._spec
        if spec.dtype.opaque:
            raise InvalidInputError(
                f"{spec.name!r} is {spec.dtype.name}, which has no elements to pick: take numpy()", kind="opaque_dtype"
            )
        ranges, picks = _box(spec, key)
        data = self._reader.box(self._version, spec, ranges)
        box = to_numpy(data, spec.dtype, tuple(len(wanted) for wanted in ranges))
        return np.asarray(box[picks])

    def _data(self) -> memoryview:
        ((_, data),) = self._reader.tensors(self._version, [self._spec])
        return data

    def numpy(self) -> "np.ndarray[Any, np.dtype[Any]]":
        """Return the whole tensor as an array of its own memory."""
        return to_numpy(self._data(), self._spec.dtype, self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "np.ndarray[Any, np.dtype[Any]]":
        if copy is False:
            raise ValueError("a stored tensor can only be had as a copy")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def torch(self, device: "torch.device | str | None" = None) -> "torch.Tensor":
        """Return the whole tensor as a torch tensor on ``device`` (the CPU by default). Needs ``lamella[torch]``."""
        return to_torch(self._data(), self._spec.dtype, self.shape, device=device)


class LazySlice:
    """A stored tensor as safetensors' ``get_slice`` gives it, which loaders such as transformers' take for a tensor.

    ``slice[...]`` takes what :class:`LazyTensor` takes, reads the chunks that hold it, and returns a torch tensor.
    """

    __module__ = "lamella"
    __slots__ = ("_tensor",)

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """Return its shape in elements."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Return its dtype's name in safetensors, such as ``"BF16"``; lamella's own where that format has none."""
        dtype = self._tensor._spec.dtype
        return dtype.safetensors or dtype.name

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of what it gives; transformers takes the first floating one for the model's."""
        return torch_dtype_of(self._tensor._spec.dtype)

    def is_floating_point(self) -> bool:
        """Whether :attr:`dtype` is, as torch sees it."""
        return self.dtype.is_floating_point

    def __repr__(self) -> str:
        return f"LazySlice({self._tensor.name!r}, {self.get_dtype()}, {self.get_shape()})"

    def __getitem__(self, key: Any) -> "torch.Tensor":
        if key is Ellipsis:
            return self._tensor.torch()
        array = np.asarray(self._tensor[key], order="C")
        return to_torch(array.reshape(-1).view(np.uint8).data, self._tensor._spec.dtype, array.shape)


def _box(spec: TensorSpec, key: Any) -> tuple[list[range], tuple[Any, ...]]:
    """Return the smallest box that holds what an index picks, and the index that picks it out of the box."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if sum(item is Ellipsis for item in keys) > 1:
        raise IndexError("an index can only have a single ellipsis")
    at = next((place for place, item in enumerate(keys) if item is Ellipsis), len(keys))
    missing = len(spec.shape) - len(keys) + (at < len(keys))
    if missing < 0:
        raise IndexError(f"too many indices for {spec.name!r} of {len(spec.shape)} axes")
    keys[at : at + 1] = [slice(None)] * missing
    ranges: list[range] = []
    picks: list[Any] = []
    for axis, (item, length) in enumerate(zip(keys, spec.shape, strict=True)):
        if isinstance(item, slice):
            wanted = range(length)[item]
            low, high = sorted((wanted[0], wanted[-1])) if wanted else (0, -1)
            ranges.append(range(low, high + 1))
            picks.append(slice(None, None, wanted.step))
            continue
        try:
            index = range(length)[_integer(item)]
        except IndexError:
            raise IndexError(f"index {item} is out of bounds for axis {axis} with size {length}") from None
        ranges.append(range(index, index + 1))
        picks.append(0)
    return ranges, tuple(picks)


def _integer(item: Any) -> int:
    if not isinstance(item, bool | np.bool_):
        with suppress(TypeError):
            return operator.index(item)
    raise InvalidInputError(
        f"a stored tensor is indexed by integers and slices, not by a {type(item).__name__}: read a slice, then pick",
        kind="bad_index",
    )


class Version(Mapping[str, LazyTensor]):
    """One version: a mapping of tensor names to :class:`LazyTensor`, with what was recorded about it."""

    __module__ = "lamella"

    def __init__(self, recorded: Recorded, reader: Reader) -> None:
        self._recorded = recorded
        self._reader = reader
        self._manifest = reader.store.manifest(recorded.id)

    @property
    def id(self) -> VersionId:
        """64 hex digits: the digest of everything recorded here."""
        return self._recorded.id

    @property
    def parameters_id(self) -> str:
        """The digest of structure and contents alone: equal for equal tensors, wherever they came from."""
        return self._recorded.description.parameters_id

    @property
    def structure_id(self) -> str:
        """The digest of names, dtypes and shapes."""
        return self._recorded.description.structure_id

    @property
    def model(self) -> str:
        """The model that this is a version of."""
        return self._recorded.model

    @property
    def number(self) -> int:
        """Its number in the model, from 1: ``model@v<number>``."""
        return self._recorded.number

    @property
    def parents(self) -> tuple[VersionId, ...]:
        """Ids of the versions it was made from, usually one."""
        return self._recorded.description.parents

    @property
    def message(self) -> str:
        """What its author said about it."""
        return self._recorded.description.message

    @property
    def author(self) -> str:
        """Who pushed it, as far as the machine could tell."""
        return self._recorded.description.author

    @property
    def created(self) -> str:
        """When it was pushed: UTC, ISO 8601."""
        return self._recorded.description.created

    @property
    def metrics(self) -> dict[str, Any]:
        """Measurements, as given."""
        return dict(self._recorded.description.metrics)

    @property
    def recipe(self) -> Any:
        """What made it, as given; None if nothing was."""
        return deepcopy(self._recorded.description.recipe)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the files that were pushed; empty if it was pushed from memory."""
        return tuple(attachment.path for attachment in self._recorded.description.attachments)

    def file(self, path: str, *, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of a file, or from ``start`` to before ``stop`` of it; only the chunks of those are read.

        Tensors that were pushed from memory are the file ``model.safetensors``. Raises NotFoundError.
        """
        return self._files.read(path, start, stop)

    @property
    def file_sizes(self) -> dict[str, int]:
        """Path and length in bytes of each file that a checkout writes, by path."""
        return {path: file.nbytes for path, file in self._files.files.items()}

    @cached_property
    def _files(self) -> VersionFiles:
        return VersionFiles(self._reader, self.id)

    def zarr(self) -> "zarr.Group":
        """Open the version as a Zarr v3 group of arrays: read-only, each chunk decoded when it is touched.

        Names of arrays are those of tensors, percent-encoded where Zarr cannot hold them; ``array.attrs["lamella"]``
        has the original. Chunks are the cells of the grid.
        """
        from lamella_engine.zarr_store import open_group

        about = {"model": self.model, "number": self.number, "version": self.id, "parameters": self.parameters_id}
        return open_group(self._reader, self.id, self._manifest.specs(), {"lamella": about})

    @property
    def structure(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of every tensor, by name."""
        return tuple(self._manifest.specs())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, decoded."""
        return self._recorded.description.decoded_nbytes

    def state_dict(self) -> dict[str, LazySlice]:
        """Return every tensor by name, each to be read when it is used.

        It serves loaders that take tensors one by one, such as transformers'
        ``BertModel.from_pretrained(None, config=config, state_dict=version.state_dict())``.
        """
        return {name: LazySlice(tensor) for name, tensor in self.items()}

    def __getitem__(self, name: str) -> LazyTensor:
        if not isinstance(name, str):
            raise TensorNotFoundError(f"tensors have names, not {name!r}", kind="tensor_not_found")
        return LazyTensor(self._reader, self.id, self._manifest.spec(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._manifest.has(name)

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self._manifest.specs())

    def __len__(self) -> int:
        return self._recorded.description.tensor_count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"Version({self.model}@v{self.number}, {self.id[:12]}, {len(self)} tensors, {self.nbytes} bytes)"
