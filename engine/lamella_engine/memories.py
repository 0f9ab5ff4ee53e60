"""Memory that versions are written into, cell by cell: arrays and tensors of any strides, byte order and device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lamella_engine.chunking import Region
from lamella_engine.dtypes import Dtype, dtype_of_numpy
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import TensorSpec
from lamella_engine.torch_tensors import (
    array_of,
    check_storable,
    dtype_of_torch,
    is_torch_tensor,
    shape_of,
    shares_memory,
    write_part,
)

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True, slots=True)
class Extent:
    """Which memory a tensor is, by addresses."""

    device: str
    start: int
    stop: int
    """One past the last byte."""
    layout: object
    """Equal for two tensors of equal extent if and only if each element is the same in both."""


@dataclass(frozen=True, slots=True)
class ArrayMemory:
    """Memory that an array can share, by the cells of its tensor's grid."""

    array: Array
    """Of the version's dtype in either byte order, or of integers as wide; uint8, 1-d, if that is opaque."""
    extent: Extent

    def run(self, region: Region) -> memoryview | None:
        """Return the memory of a cell if it is one run, in the order of the cell's bytes."""
        part = self._part(region)
        if not part.flags.c_contiguous or part.dtype.byteorder == ">":
            return None
        return part.reshape(-1).view(np.uint8).data

    def read(self, region: Region, out: Array) -> memoryview:
        """Copy a cell's bytes to the start of ``out``, uint8, and return them."""
        part = self._part(region)
        np.copyto(self._cell(part, out[: region.nbytes]), part)
        return out.data[: region.nbytes]

    def write(self, region: Region, data: memoryview) -> None:
        """Set a cell to these bytes."""
        part = self._part(region)
        np.copyto(part, self._cell(part, np.frombuffer(data, np.uint8)))

    def _part(self, region: Region) -> Array:
        place: Any = (*region.slices, ...)  # with the ellipsis, a scalar is a view too
        part: Array = self.array[place]
        return part

    @staticmethod
    def _cell(part: Array, octets: Array) -> Array:
        """View a cell's bytes as what they are; to copy between dtypes that differ in byte order computes nothing."""
        return octets.view(part.dtype.newbyteorder("<")).reshape(part.shape)


@dataclass(frozen=True, slots=True)
class TensorMemory:
    """Memory that no array can share: a tensor on another device, or lazily conjugated or negated."""

    tensor: "torch.Tensor"
    extent: Extent

    def run(self, region: Region) -> memoryview | None:
        """See :class:`ArrayMemory`. There is none."""
        return None

    def read(self, region: Region, out: Array) -> memoryview:
        """See :class:`ArrayMemory`."""
        part = array_of(self.tensor, region.slices)
        np.copyto(out[: region.nbytes].view(part.dtype).reshape(part.shape), part)
        return out.data[: region.nbytes]

    def write(self, region: Region, data: memoryview) -> None:
        """See :class:`ArrayMemory`."""
        write_part(self.tensor, region.slices, data)


Memory: TypeAlias = ArrayMemory | TensorMemory


def memory_of(spec: TensorSpec, value: Any) -> Memory:
    """Return the memory of a tensor; raises InvalidInputError unless a tensor like ``spec`` can be written there."""
    try:
        if is_torch_tensor(value):
            check_storable(value)
            _check_like(spec, dtype_of_torch(value.dtype), shape_of(value))
            return _memory_of_torch(spec, value)
        if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
            opaque = spec.dtype.opaque and (value.dtype, value.shape) == (np.uint8, (spec.nbytes,))
            _check_like(
                spec, spec.dtype if opaque else dtype_of_numpy(value.dtype), spec.shape if opaque else value.shape
            )
            return _memory_of_array(value.view(np.ndarray))  # a matrix, say, would keep its own rules of shape
    except InvalidInputError as error:
        raise InvalidInputError(
            f"tensor {spec.name[:80]!r}: {error}", kind=error.kind, tensor=spec.name, **error.context
        ) from None
    raise InvalidInputError(
        f"{spec.name[:80]!r} is a {type(value).__name__}: give torch tensors or NumPy arrays to be filled",
        kind="not_a_tensor",
        tensor=spec.name,
    )


def _check_like(spec: TensorSpec, dtype: Dtype, shape: tuple[int, ...]) -> None:
    if (dtype, shape) != (spec.dtype, spec.shape):
        raise InvalidInputError(
            f"it is {spec.dtype.name} of shape {spec.shape} in the version and {dtype.name} of shape {shape} here: "
            "convert it first, as module.to(dtype) does, or exclude it",
            kind="structure_mismatch",
        )


def _memory_of_torch(spec: TensorSpec, tensor: "torch.Tensor") -> Memory:
    strides = tuple(stride * tensor.itemsize for stride in tensor.stride())
    layout = (tensor.dtype, tensor.shape, strides, tensor.is_conj(), tensor.is_neg())
    extent = _extent(str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), strides, tensor.itemsize, layout)
    if spec.dtype.opaque and not tensor.is_contiguous():
        raise InvalidInputError("packed elements are filled in contiguous memory only: clone it", kind="not_contiguous")
    if not shares_memory(tensor):
        return TensorMemory(tensor, extent)
    axes = 1 if spec.dtype.opaque else tensor.dim()
    array = array_of(tensor, (slice(None),) * axes)
    if not array.flags.writeable:  # before torch 2.9, and with NumPy 2.0, what torch lends is to be read only
        return TensorMemory(tensor, extent)
    return ArrayMemory(_plain(array), extent)


def _memory_of_array(array: Array) -> Memory:
    if not array.flags.writeable:
        raise InvalidInputError("it is read-only: give a writable array", kind="read_only")
    layout = (array.dtype, array.shape, array.strides)
    extent = _extent("cpu", array.ctypes.data, array.shape, array.strides, array.itemsize, layout)
    return ArrayMemory(_plain(array), extent)


def _plain(array: Array) -> Array:
    """View elements of ml_dtypes as integers, which NumPy copies fast, without the GIL, and in either byte order."""
    if np.dtype(array.dtype.type).isbuiltin == 1:
        return array
    return array.view(np.dtype(f"u{array.itemsize}").newbyteorder(array.dtype.byteorder))


def _extent(
    device: str, address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, layout: object
) -> Extent:
    """Return where a tensor lies; raises InvalidInputError if elements of it share memory, as in an expanded tensor."""
    if 0 in shape:
        return Extent(device, 0, 0, layout)
    covered = itemsize
    for stride, length in sorted((abs(stride), length) for stride, length in zip(strides, shape, strict=True)):
        if length > 1:
            if stride < covered:
                raise InvalidInputError(
                    "its elements share memory, as those of an expanded tensor do: clone it", kind="overlapping_memory"
                )
            covered += (length - 1) * stride
    below = sum((length - 1) * stride for stride, length in zip(strides, shape, strict=True) if stride < 0)
    return Extent(device, address + below, address + below + covered, layout)
