"""Versions into memory that is there already: tensors filled in place, and moved from one version to another.

Whatever can be wrong with a call is found before anything is read or written. After that only the store can fail, or
memory that does not hold the version it was said to hold.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lamella_engine.chunking import Region
from lamella_engine.content_store.decoding import check_chunk, decode_chain
from lamella_engine.content_store.manifest import Manifest
from lamella_engine.content_store.seam import Reading
from lamella_engine.dtypes import Dtype, dtype_of_numpy
from lamella_engine.errors import CorruptionError, InvalidInputError
from lamella_engine.executor import map_batched
from lamella_engine.format.digests import chunk_id
from lamella_engine.model import Cell, TensorSpec, VersionId
from lamella_engine.reading import CellPair, Reader, Selection
from lamella_engine.torch_tensors import (
    array_of,
    check_storable,
    count_change,
    dtype_of_torch,
    is_torch_tensor,
    shape_of,
    shares_memory,
    write_part,
)

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

# Whether two views share an element is hard in general; beyond so many steps they are taken to. Views of one fused
# weight, which is what people have, take a handful.
OVERLAP_STEPS = 1_000_000

_staging = CellPair()


def fill(
    reader: Reader,
    version: VersionId,
    into: Mapping[str, Any],
    selection: Selection,
    *,
    have: VersionId | None = None,
) -> dict[str, Any]:
    """Decode the selected tensors of a version into the caller's memory.

    Parameters
    ----------
    reader
        With ``check``, the id of every cell is computed again, of those that are left as they are too.
    into
        Name -> writable NumPy array or torch tensor: exactly the selected tensors, each with the dtype and shape that
        it has in the version; what the selection leaves out is not looked at. Any strides, byte order and device;
        tensors may require grad. Contiguous memory of the CPU is decoded into directly, other memory by way of one
        cell for each thread. Tied names, which are the same memory, must be tied in the version too.
    have
        A version that the memory holds. Cells that are equal in both are neither read nor touched, others are decoded
        against what is there if they are deltas of it, and then checked.

    Returns
    -------
    dict
        Name -> the array or tensor of ``into``, for the selected names.

    Raises
    ------
    InvalidInputError
        Before anything is changed: ``structure_mismatch`` (names, dtypes or shapes differ), ``not_a_tensor``,
        ``read_only``, ``overlapping_memory``, ``tied_tensors`` (tied in memory and not in the version), or a kind of
        :func:`~lamella_engine.torch_tensors.check_storable`. Later: ``not_held``, the memory did not hold ``have``;
        that cell is as it was, others may have been moved.
    TensorNotFoundError
        A pattern of the selection matches nothing.
    CorruptionError
        Stored bytes are damaged. The content of ``into`` is undefined then, as it is if the store fails.
    """
    manifest = reader.store.manifest(version)
    specs = _match(list(selection.tensors(manifest)), into, selection)
    memories = {spec.name: _memory(spec, into[spec.name]) for spec in specs}
    _check_no_overlap(memories)
    untied = _untied(specs, memories, manifest, None if have is None else reader.store.manifest(have))
    _Filling(reader, version, have, memories).run(untied, into)
    return {spec.name: into[spec.name] for spec in specs}


class _Filling:
    """One fill, after all checks."""

    def __init__(
        self, reader: Reader, version: VersionId, have: VersionId | None, memories: Mapping[str, "_Memory"]
    ) -> None:
        self._reader = reader
        self._version = version
        self._have = have
        self._memories = memories
        self._regions: dict[Cell, Region] = {}

    def run(self, specs: list[TensorSpec], into: Mapping[str, Any]) -> None:
        touched: set[str] = set()

        def cells() -> Iterator[Cell]:
            for spec in specs:
                for number, region in enumerate(spec.grid.regions()):
                    cell = Cell(spec.name, number)
                    self._regions[cell] = region
                    yield cell

        def readings() -> Iterator[Reading]:
            for reading in self._reader.read(self._version, cells(), self._have):
                if reading.chain:
                    touched.add(reading.cell.tensor or "")
                yield reading

        def nbytes(reading: Reading) -> int:
            return self._regions[reading.cell].nbytes

        try:
            for _ in map_batched(self._reader.executor, self._fill_cell, readings(), nbytes=nbytes):
                pass
        finally:
            for name in touched:
                if is_torch_tensor(into[name]):
                    count_change(into[name])

    def _fill_cell(self, reading: Reading) -> None:
        cell, chain = reading
        region = self._regions.pop(cell)
        memory = self._memories[cell.tensor or ""]
        run = memory.run(region)
        if chain and chain[0].base is None:
            out = _staging.left.data[: region.nbytes] if run is None else run
            decode_chain(chain, out, check=self._reader.checks)
            if run is None:
                memory.write(region, out)
        elif chain or self._reader.check:
            self._move_cell(reading, region, memory, memory.read(region, _staging.right) if run is None else run)

    def _move_cell(self, reading: Reading, region: Region, memory: "_Memory", held: memoryview) -> None:
        """Move a cell from the version that it is said to hold; if it does not hold that, it stays as it is."""
        cell, chain = reading
        try:
            if not chain:
                row = self._reader.store.manifest(self._version).row(cell.tensor or "", cell.number)
                check_chunk(chunk_id(row.content) if row.chunk is None else row.chunk, held)
                return
            out = _staging.left.data[: region.nbytes]
            decode_chain(chain, out, base=held, check=True)
        except CorruptionError as error:
            # The payload's digest was checked, so what does not fit it, even where a decoder trips, is the memory.
            if error.kind not in ("bad_chunk", "bad_payload"):
                raise
            raise InvalidInputError(
                f"the memory of {cell.tensor!r} does not hold version {self._have}: check out again without have, for "
                "other tensors may have been moved already",
                kind="not_held",
                tensor=cell.tensor,
            ) from None
        memory.write(region, out)


def _match(specs: list[TensorSpec], into: Mapping[str, Any], selection: Selection) -> list[TensorSpec]:
    """Return the selected tensors if ``into`` has them and no others that are selected."""
    if not isinstance(into, Mapping):
        raise InvalidInputError(
            f"into is a {type(into).__name__}: give a mapping of names to tensors, such as a state dict",
            kind="bad_option",
        )
    names = {spec.name for spec in specs}
    lacking = [spec.name for spec in specs if spec.name not in into]
    if lacking:
        raise _mismatch(
            lacking[0],
            f"into lacks {len(lacking)} of the version's tensors, such as {lacking[0]!r}: add them, or exclude them",
        )
    surplus = [name for name in into if name not in names and (not isinstance(name, str) or selection.has(name))]
    if surplus:
        raise _mismatch(
            surplus[0],
            f"the version lacks {len(surplus)} of the tensors in into, such as {surplus[0]!r}: take them out, or "
            "exclude them",
        )
    return specs


def _mismatch(name: object, message: str) -> InvalidInputError:
    return InvalidInputError(message, kind="structure_mismatch", tensor=str(name))


@dataclass(frozen=True, slots=True)
class _Extent:
    """Which memory a tensor is, by addresses."""

    device: str
    start: int
    stop: int
    """One past the last byte."""
    layout: object
    """Equal for two tensors of equal extent if and only if each element is the same in both."""


@dataclass(frozen=True, slots=True)
class _ArrayMemory:
    """Memory that an array can share, by the cells of its tensor's grid."""

    array: Array
    """Of the version's dtype in either byte order, or of integers as wide; uint8, 1-d, if that is opaque."""
    extent: _Extent

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
class _TensorMemory:
    """Memory that no array can share: a tensor on another device, or lazily conjugated or negated."""

    tensor: "torch.Tensor"
    extent: _Extent

    def run(self, region: Region) -> memoryview | None:
        return None

    def read(self, region: Region, out: Array) -> memoryview:
        part = array_of(self.tensor, region.slices)
        np.copyto(out[: region.nbytes].view(part.dtype).reshape(part.shape), part)
        return out.data[: region.nbytes]

    def write(self, region: Region, data: memoryview) -> None:
        write_part(self.tensor, region.slices, data)


_Memory: TypeAlias = _ArrayMemory | _TensorMemory


def _memory(spec: TensorSpec, value: Any) -> _Memory:
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


def _memory_of_torch(spec: TensorSpec, tensor: "torch.Tensor") -> _Memory:
    strides = tuple(stride * tensor.itemsize for stride in tensor.stride())
    layout = (tensor.dtype, tensor.shape, strides, tensor.is_conj(), tensor.is_neg())
    extent = _extent(str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), strides, tensor.itemsize, layout)
    if spec.dtype.opaque and not tensor.is_contiguous():
        raise InvalidInputError("packed elements are filled in contiguous memory only: clone it", kind="not_contiguous")
    if not shares_memory(tensor):
        return _TensorMemory(tensor, extent)
    axes = 1 if spec.dtype.opaque else tensor.dim()
    array = array_of(tensor, (slice(None),) * axes)
    if not array.flags.writeable:  # before torch 2.9, and with NumPy 2.0, what torch lends is to be read only
        return _TensorMemory(tensor, extent)
    return _ArrayMemory(_plain(array), extent)


def _memory_of_array(array: Array) -> _Memory:
    if not array.flags.writeable:
        raise InvalidInputError("it is read-only: give a writable array", kind="read_only")
    layout = (array.dtype, array.shape, array.strides)
    extent = _extent("cpu", array.ctypes.data, array.shape, array.strides, array.itemsize, layout)
    return _ArrayMemory(_plain(array), extent)


def _plain(array: Array) -> Array:
    """View elements of ml_dtypes as integers, which NumPy copies fast, without the GIL, and in either byte order."""
    if np.dtype(array.dtype.type).isbuiltin == 1:
        return array
    return array.view(np.dtype(f"u{array.itemsize}").newbyteorder(array.dtype.byteorder))


def _extent(
    device: str, address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, layout: object
) -> _Extent:
    """Return where a tensor lies; raises InvalidInputError if elements of it share memory, as in an expanded tensor."""
    if 0 in shape:
        return _Extent(device, 0, 0, layout)
    covered = itemsize
    for stride, length in sorted((abs(stride), length) for stride, length in zip(strides, shape, strict=True)):
        if length > 1:
            if stride < covered:
                raise InvalidInputError(
                    "its elements share memory, as those of an expanded tensor do: clone it", kind="overlapping_memory"
                )
            covered += (length - 1) * stride
    below = sum((length - 1) * stride for stride, length in zip(strides, shape, strict=True) if stride < 0)
    return _Extent(device, address + below, address + below + covered, layout)


def _check_no_overlap(memories: Mapping[str, _Memory]) -> None:
    """Raise InvalidInputError if two tensors share some of their memory; sharing all of it is being tied."""
    placed = sorted(
        ((memory.extent.device, memory.extent.start, memory.extent.stop, name) for name, memory in memories.items())
    )
    open_names: list[str] = []
    for device, start, stop, name in placed:
        if start == stop:
            continue
        open_names = [
            other
            for other in open_names
            if memories[other].extent.device == device and memories[other].extent.stop > start
        ]
        for other in open_names:
            if memories[other].extent != memories[name].extent and _share_elements(memories[other], memories[name]):
                raise InvalidInputError(
                    f"{other[:80]!r} and {name[:80]!r} share some of their memory: give each its own",
                    kind="overlapping_memory",
                    tensor=name,
                )
        open_names.append(name)


def _share_elements(one: _Memory, other: _Memory) -> bool:
    """Whether two memories of overlapping extent have an element in common, as far as it can be told."""
    if not (isinstance(one, _ArrayMemory) and isinstance(other, _ArrayMemory)):
        return True
    try:
        return np.shares_memory(one.array, other.array, max_work=OVERLAP_STEPS)  # type: ignore[arg-type]  # stubs know -1 and 0
    except np.exceptions.TooHardError:
        return True


def _untied(
    specs: list[TensorSpec], memories: Mapping[str, _Memory], manifest: Manifest, held: Manifest | None
) -> list[TensorSpec]:
    """Return one tensor for each memory; raises InvalidInputError if names that share one differ in a version."""
    firsts: dict[_Extent, TensorSpec] = {}
    for spec in specs:
        first = firsts.setdefault(memories[spec.name].extent, spec) if spec.nbytes else spec
        if first is spec:
            continue
        names = f"{first.name[:80]!r} and {spec.name[:80]!r}"
        if _contents(manifest, first) != _contents(manifest, spec):
            raise InvalidInputError(
                f"{names} are tied, but differ in the version: untie them, or exclude one",
                kind="tied_tensors",
                tensor=spec.name,
            )
        before = held and (_contents(held, first), _contents(held, spec))
        if before and None not in before and before[0] != before[1]:
            raise InvalidInputError(
                f"{names} are tied, but differ in the version that they are said to hold: check out without have",
                kind="not_held",
                tensor=spec.name,
            )
    return list(firsts.values())


def _contents(manifest: Manifest, spec: TensorSpec) -> list[bytes] | None:
    """Return what stands in a tensor's rows, or None if the version has no such tensor."""
    return [row.content for row in manifest.rows(spec.name)] if manifest.holds(spec) else None
