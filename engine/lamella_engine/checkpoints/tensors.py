"""Tensors in memory: arrays and torch tensors by name as a checkpoint, and decoded bytes as arrays."""

from collections import deque
from collections.abc import Mapping
from math import prod
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np

from lamella_engine.boxes import Octets
from lamella_engine.checkpoints.arrivals import Arrivals
from lamella_engine.checkpoints.pages import ALIGNMENT
from lamella_engine.chunking import Region
from lamella_engine.dtypes import Dtype, dtype_of_numpy
from lamella_engine.errors import InvalidInputError, TensorNotFoundError
from lamella_engine.model import Attachment, Buffer, TensorSpec
from lamella_engine.torch_tensors import (
    CUDA,
    Device,
    Transfers,
    array_of,
    change_count,
    check_storable,
    dtype_of_torch,
    is_torch_tensor,
    memory_of,
    shape_of,
)

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
CELLS_AHEAD = 4
"""So many cells of a tensor that is read whole are on their way from a GPU while one is copied: 16 MiB."""


class MemoryCheckpoint:
    """A mapping of names to NumPy arrays and torch tensors as a checkpoint.

    The mapping is copied (not the tensors), so that adding and removing names afterwards has no effect. Arrays may have
    any strides and either byte order; torch tensors any strides and device, and may require grad. Tied tensors are
    simply read twice.

    Parameters
    ----------
    tensors
        Names may be any strings without half surrogates, the empty one included.
    device
        What the tensors that do not lie in this machine's memory may lie on. They are read as they are when all has run
        that the thread which makes this has queued there.

    Raises
    ------
    InvalidInputError
        A name is no string (``bad_tensor_name``), a value no tensor, such as a masked array (``not_a_tensor``), its
        dtype none of lamella's (``unknown_dtype``), or a kind of
        :func:`~lamella_engine.torch_tensors.check_storable`. The message names the tensor.
    """

    def __init__(self, tensors: Mapping[str, object], device: Device = CUDA) -> None:
        self._tensors: dict[str, Any] = {}
        specs: list[TensorSpec] = []
        for name, value in dict(tensors).items():
            specs.append(_spec_of(_check_tensor_name(name), value))
            # Scalars of NumPy have no memory of their own.
            self._tensors[name] = np.asarray(value) if isinstance(value, np.generic) else value
        self.structure: tuple[TensorSpec, ...] = tuple(sorted(specs, key=lambda spec: spec.name))
        self.random_access = True
        self.attachments: tuple[Attachment, ...] = ()
        self._of_torch = frozenset(name for name, value in self._tensors.items() if is_torch_tensor(value))
        self._change_counts = self._count_changes()
        self._closed = False
        self._on_gpu = frozenset(name for name in self._of_torch if device.holds(self._tensors[name]))
        self.device = device if self._on_gpu else None
        """Where tensors lie that do not lie in this machine's memory; None if there are none."""
        self._transfers = Transfers(device)
        for name in self._on_gpu:
            self._transfers.follow(self._tensors[name])
        far = [spec for spec in specs if spec.name in self._on_gpu]
        nbytes = sum(spec.nbytes + spec.grid.cell_count * ALIGNMENT for spec in far)
        self._arrivals = Arrivals(device, self._transfers, nbytes)

    def expect(self, tensor: TensorSpec, region: Region) -> None:
        """Have a part that will be read soon be copied already, if it lies on a GPU; raises what :meth:`read` does."""
        if tensor.name in self._on_gpu and region.nbytes:
            with _Naming(tensor.name):
                key = tensor.name, region.start, region.stop
                self._arrivals.expect(key, self._value(tensor.name), region.slices, region.nbytes)

    def read(self, tensor: TensorSpec, region: Region, out: Buffer | None = None) -> Buffer:
        """See :meth:`Checkpoint.read`; a view of contiguous tensors in the CPU's memory."""
        on_gpu = tensor.name in self._on_gpu
        part = None if on_gpu else self._part(tensor, region.slices)
        octets = None if part is None else _octets(part)
        if octets is not None:
            return octets.data
        target = np.empty(region.nbytes, np.uint8) if out is None else np.frombuffer(out, np.uint8, region.nbytes)
        if part is not None:
            _lay_out(part, tensor.dtype, target)
        elif region.nbytes:
            with _Naming(tensor.name):
                key = tensor.name, region.start, region.stop
                self._arrivals.read(key, self._value(tensor.name), region.slices, target)
        return target.data

    def whole(self, tensor: TensorSpec) -> Buffer:
        """Return all bytes of a tensor, as :meth:`read` returns those of a cell."""
        if tensor.name not in self._on_gpu:
            return self.read(tensor, Region(tuple(slice(0, length) for length in tensor.grid.shape), 0, tensor.nbytes))
        out = np.empty(tensor.nbytes, np.uint8)
        coming: deque[Region] = deque()

        def take_oldest() -> None:
            region = coming.popleft()
            self.read(tensor, region, out[region.start : region.stop].data)

        for region in tensor.grid.regions():
            self.expect(tensor, region)
            coming.append(region)
            if len(coming) > CELLS_AHEAD:
                take_oldest()
        while coming:
            take_oldest()
        return out.data

    def memory(self, tensor: TensorSpec) -> object:
        """Return what is equal for tensors that are one memory, read alike, as tied parameters are."""
        value = self._value(tensor.name)
        if tensor.name in self._of_torch:
            return memory_of(value)
        return value.ctypes.data, value.dtype, value.shape, value.strides

    def copy(self, tensor: TensorSpec, out: Octets) -> None:
        """Copy a whole tensor; one that lies on a GPU has been copied when :meth:`wait` returns.

        Parameters
        ----------
        tensor
            One of ``structure``.
        out : uint8, 1-d, contiguous, aligned to an element
            Becomes the tensor's little-endian bytes in C order, which it must be as long as.

        Raises what :meth:`read` does.
        """
        if tensor.name in self._on_gpu:
            with _Naming(tensor.name):
                self._transfers.begin(self._value(tensor.name), (), out)
            return
        part = self._part(tensor, ())
        octets = _octets(part)
        if octets is None:
            _lay_out(part, tensor.dtype, out)
        else:
            np.copyto(out, octets)

    def wait(self) -> None:
        """Wait for what :meth:`copy` has begun."""
        self._transfers.wait()

    def _value(self, name: str) -> Any:
        if self._closed:
            raise InvalidInputError("the checkpoint was closed: open it again", kind="closed")
        value = self._tensors.get(name)
        if value is None:
            raise TensorNotFoundError(f"there is no tensor {name[:80]!r}", tensor=name)
        return value

    def _part(self, tensor: TensorSpec, slices: tuple[slice, ...]) -> Array:
        value = self._value(tensor.name)
        if tensor.name not in self._of_torch:
            return np.asarray(value[(*slices, ...)])
        with _Naming(tensor.name):
            return array_of(value, slices)

    def check_unchanged(self) -> None:
        """See :meth:`Checkpoint.check_unchanged`: torch counts changes in place; those of NumPy arrays go unnoticed."""
        now = self._count_changes()
        changed = next((name for name, count in self._change_counts.items() if now[name] != count), None)
        if changed is not None:
            raise InvalidInputError(
                f"tensor {changed[:80]!r} changed while it was read: push a copy, or between training steps",
                kind="source_changed",
                tensor=changed,
            )

    def close(self) -> None:
        """Let go of the tensors, once nothing is copied from them any more. Doing it twice is harmless."""
        try:
            self._arrivals.close()
        finally:
            self._closed = True
            self._tensors = {}
            self._of_torch = frozenset()
            self._change_counts = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count_changes(self) -> dict[str, int]:
        return {name: change_count(self._tensors[name]) for name in self._of_torch}


def to_numpy(data: Buffer, dtype: Dtype, shape: tuple[int, ...]) -> Array:
    """View decoded bytes as an array, without copying.

    Parameters
    ----------
    data
        Exactly the tensor's little-endian C-order bytes. The array is writable if they are.
    dtype, shape
        Of the tensor.

    Returns
    -------
    array of ``dtype.numpy`` and ``shape``
        NumPy has no elements smaller than a byte: an opaque dtype gives its bytes as they are, uint8, 1-d.

    Raises
    ------
    InvalidInputError
        ``data`` is too long or too short (``wrong_length``).
    """
    octets = np.frombuffer(data, np.uint8)
    if octets.nbytes * 8 != dtype.bits * prod(shape):
        raise InvalidInputError(
            f"{octets.nbytes} bytes are no {dtype.name} tensor of shape {shape}", kind="wrong_length"
        )
    return octets if dtype.numpy is None else octets.view(dtype.numpy).reshape(shape)


def _check_tensor_name(name: object) -> str:
    if not isinstance(name, str):
        raise InvalidInputError(f"{name!r} is no name: tensors are named by strings", kind="bad_tensor_name")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(
            f"{name[:80]!r} is no valid Unicode: rename the tensor", kind="bad_tensor_name"
        ) from None
    return str(name)


def _spec_of(name: str, value: object) -> TensorSpec:
    with _Naming(name):
        if is_torch_tensor(value):
            check_storable(value)
            return TensorSpec(name, dtype_of_torch(value.dtype), shape_of(value))
        if isinstance(value, np.ndarray | np.generic) and not isinstance(value, np.ma.MaskedArray):
            return TensorSpec(name, dtype_of_numpy(value.dtype), value.shape)
    raise InvalidInputError(
        f"{name[:80]!r} is a {type(value).__name__}: give one flat mapping of names to torch tensors or NumPy "
        "arrays; lamella.torch.push takes nested ones",
        kind="not_a_tensor",
        tensor=name,
    )


class _Naming:  # no function with a yield, which takes longer than what it guards
    """Have what is refused of a tensor say which one it is."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        """Nothing is refused yet."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, InvalidInputError):
            raise InvalidInputError(
                f"tensor {self._name[:80]!r}: {error}", kind=error.kind, tensor=self._name, **error.context
            ) from None


def _octets(array: Array) -> Octets | None:
    """View an array as a tensor's bytes; None if they do not lie as they are stored."""
    if not array.flags.c_contiguous or array.dtype.byteorder == ">":
        return None
    return array.reshape(-1).view(np.uint8)


def _lay_out(array: Array, dtype: Dtype, out: Octets) -> None:
    """Write an array as a tensor's bytes."""
    # Between dtypes that differ at most in byte order this moves bytes and computes nothing.
    np.copyto(out.view(dtype.numpy or np.uint8).reshape(array.shape), array)
