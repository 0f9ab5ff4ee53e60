"""Torch tensors as bytes and back. The one module that imports torch, and only once somebody has a tensor.

``import lamella`` must not cost an import of torch, so nothing here imports it at the top: that something is no tensor
can be told without it, because a program that holds a tensor has imported torch already.
"""

import os
import sys
import weakref
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np

from lamella_engine.dtypes import DTYPES, Dtype, dtype_named
from lamella_engine.errors import InvalidInputError, LimitError

if TYPE_CHECKING:
    import torch

    from lamella_engine.model import Buffer

# Two f4 elements in a byte; the only torch dtype whose elements are not the elements of a lamella dtype.
_PACKED_F4 = "float4_e2m1fn_x2"


def is_torch_tensor(value: object) -> "TypeGuard[torch.Tensor]":
    """Whether ``value`` is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


@lru_cache
def dtype_of_torch(dtype: "torch.dtype") -> Dtype:
    """Look a dtype up by its torch dtype; raises InvalidInputError (``unknown_dtype``)."""
    name = str(dtype).removeprefix("torch.")
    if name == _PACKED_F4:
        return dtype_named("f4")
    if name not in _TORCH_NAMES:
        raise InvalidInputError(
            f"tensors of dtype {dtype} cannot be stored; convert to a plain dtype", kind="unknown_dtype", dtype=name
        )
    return dtype_named(name)


def torch_dtype_of(dtype: Dtype) -> "torch.dtype":
    """Return torch's dtype for ``dtype``; raises InvalidInputError (``unknown_dtype``) if this torch has none."""
    import torch

    found = getattr(torch, _PACKED_F4 if dtype.name == "f4" else dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise InvalidInputError(
            f"torch {torch.__version__} has no dtype for {dtype.name}: check out as arrays",
            kind="unknown_dtype",
            dtype=dtype.name,
        )
    return found


def check_storable(tensor: "torch.Tensor") -> None:
    """Raise InvalidInputError unless ``tensor`` is a plain run of elements in memory, of whatever strides and device.

    The kinds are ``meta_tensor``, ``distributed_tensor``, ``wrapped_tensor`` (a subclass that is no tensor in memory
    itself), ``uninitialized_tensor``, ``quantized_tensor``, ``sparse_tensor``, ``nested_tensor``, ``freed_tensor`` and
    ``unknown_dtype``.
    """
    import torch

    def refuse(problem: str, kind: str) -> InvalidInputError:
        return InvalidInputError(problem, kind=kind)

    if isinstance(tensor, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer):
        raise refuse("it is a parameter without a shape yet: run the module once", "uninitialized_tensor")
    if hasattr(type(tensor), "full_tensor"):
        raise refuse("it is a distributed tensor: give its full_tensor()", "distributed_tensor")
    if tensor.is_nested:
        raise refuse("it is a nested tensor: give its components, or pad it", "nested_tensor")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise refuse(
            f"a {type(tensor).__name__} holds no elements itself: give the plain tensors that it is made of",
            "wrapped_tensor",
        )
    if tensor.is_meta:
        raise refuse("it is a meta tensor, without data: materialize the model first", "meta_tensor")
    if tensor.is_quantized:
        raise refuse("it is quantized: give its int_repr(), scales and zero points", "quantized_tensor")
    if tensor.layout is not torch.strided:
        raise refuse(f"its layout is {tensor.layout}: give its indices and values, or to_dense()", "sparse_tensor")
    dtype = dtype_of_torch(tensor.dtype)
    if dtype.opaque and not tensor.dim():
        raise refuse("a scalar cannot hold packed elements: give it an axis", "unknown_dtype")
    _check_alive(tensor)


def shape_of(tensor: "torch.Tensor") -> tuple[int, ...]:
    """Shape in elements; torch counts packed elements (f4) by the byte."""
    shape = tuple(tensor.shape)
    if dtype_of_torch(tensor.dtype).opaque:
        return (*shape[:-1], 2 * shape[-1])
    return shape


def change_count(tensor: "torch.Tensor") -> int:
    """Return how often the tensor was changed in place, as far as torch counts (not under inference_mode)."""
    return 0 if tensor.is_inference() else tensor._version


def count_change(tensor: "torch.Tensor") -> None:
    """Have torch count a change in place that it has not seen, so that autograd refuses to use what it saved before."""
    import torch

    if not tensor.is_inference():  # for those, torch neither counts nor saves anything
        torch.autograd.graph.increment_version(tensor)


def memory_of(tensor: "torch.Tensor") -> object:
    """Return what is equal for tensors that are one memory, read alike, as tied parameters are."""
    alike = tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), *alike


def shares_memory(tensor: "torch.Tensor") -> bool:
    """Whether :func:`array_of` gives views of the tensor, not copies."""
    return tensor.device.type == "cpu" and not (tensor.is_conj() or tensor.is_neg())


def write_part(tensor: "torch.Tensor", slices: tuple[slice, ...], data: memoryview) -> None:
    """Write a part of a tensor on any device; autograd does not see it (:func:`count_change` tells it).

    Parameters
    ----------
    tensor
        Passed :func:`check_storable`; contiguous if its dtype is opaque.
    slices
        The part, as for :func:`array_of`.
    data
        The part's little-endian bytes in C order, aligned to an element; not empty.
    """
    import torch

    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        octets = torch.frombuffer(data, dtype=torch.uint8)
        if dtype_of_torch(tensor.dtype).opaque:
            tensor.detach().view(torch.uint8).reshape(-1)[slices].copy_(octets)
            return
        part = tensor.detach()[slices]
        part.copy_(octets.view(tensor.dtype).reshape(part.shape))


def array_of(tensor: "torch.Tensor", slices: tuple[slice, ...]) -> "np.ndarray[Any, np.dtype[Any]]":
    """Return a part of a storable tensor as an array.

    Parameters
    ----------
    tensor
        Passed :func:`check_storable`. On any device; may require grad.
    slices
        The part, one slice for each axis; for an opaque dtype one slice of the tensor's bytes. None for the whole.

    Returns
    -------
    array of the dtype's NumPy dtype, or uint8, 1-d, for an opaque dtype
        Shares the tensor's memory if that is the CPU's and no lazy conjugation or negation is pending, else a copy of
        this part only. The tensor's own strides.

    Raises
    ------
    InvalidInputError
        The tensor's memory was freed meanwhile (``freed_tensor``).
    """
    part = _carried(tensor, slices)
    if part.device.type != "cpu":
        part = part.contiguous().cpu()
    # DLPack and not Tensor.numpy(), which would forbid the caller's storage ever to be resized, as FSDP does.
    array: np.ndarray[Any, np.dtype[Any]] = np.from_dlpack(part)
    dtype = dtype_of_torch(tensor.dtype)
    return array if dtype.numpy is None else array.view(dtype.numpy)


def _carried(tensor: "torch.Tensor", slices: tuple[slice, ...]) -> "torch.Tensor":
    """Return a part, sliced as for :func:`array_of`, on the tensor's device and in a dtype that moves without change.

    NumPy knows few of torch's dtypes, but integers of every width; and as integers, bools keep bits that make no bool.
    Detached, so autograd sees nothing of what is done with it.
    """
    import torch

    _check_alive(tensor)
    if dtype_of_torch(tensor.dtype).opaque:
        return tensor.detach().view(torch.uint8).reshape(-1)[slices]
    part = tensor.detach()
    if slices:
        part = part[slices]
    part = part.resolve_conj().resolve_neg()
    carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(part.itemsize)
    return part.view(carrier) if carrier else part


class Waitable(Protocol):
    """A stream, or a place in the queue of one."""

    def synchronize(self) -> None:
        """Wait until everything that was queued before has run."""


class Device(Protocol):
    """What copies from a kind of device need of it: the seam at which tests and benchmarks put the CPU in its place."""

    def holds(self, tensor: "torch.Tensor") -> bool:
        """Whether a tensor lies on such a device."""

    def stream(self, tensor: "torch.Tensor") -> Waitable:
        """Return a new stream of a tensor's device, which waits for all that this thread has queued there."""

    def queuing(self, stream: Any) -> AbstractContextManager[object]:
        """Have what this thread does to tensors in the block be queued on a stream."""

    def mark(self, stream: Any) -> Waitable:
        """Return the place that a stream's queue has reached."""

    def pin(self, memory: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
        """Lock pages of this machine's memory while the array lives, so that a device writes to them by itself.

        Raises LimitError (``not_pinned``) if the system does not allow so much.
        """


class Cuda:
    """See :class:`Device`: torch's GPUs.

    Threads of our own have the first GPU for their current one, which may be another rank's: whatever made it one of
    ours would take memory there for nothing. So each call names a device that tensors lie on.
    """

    def __init__(self) -> None:
        self._used: torch.device | None = None
        """One that a stream was made for."""

    def holds(self, tensor: "torch.Tensor") -> bool:
        """See :class:`Device`."""
        return tensor.is_cuda

    def stream(self, tensor: "torch.Tensor") -> Waitable:
        """See :class:`Device`."""
        import torch

        self._used = tensor.device
        stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        return stream

    def queuing(self, stream: Any) -> AbstractContextManager[object]:
        """See :class:`Device`."""
        import torch

        stack = ExitStack()
        stack.enter_context(torch.cuda.device(stream.device))
        stack.enter_context(torch.cuda.stream(stream))
        return stack

    def mark(self, stream: Any) -> Waitable:
        """See :class:`Device`."""
        import torch

        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits leaves the core to others
        event.record(stream)
        return event

    def pin(self, memory: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
        """See :class:`Device`. Registered, and not had from torch, which would round up to a power of two."""
        import torch

        address, device = memory.ctypes.data, self._used
        # 1: cudaHostRegisterPortable, pinned for all GPUs.
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            error = int(runtime.cudaHostRegister(address, memory.nbytes, 1))
            if error:
                with suppress(RuntimeError):  # CUDA remembers the error for whoever asks this thread's GPU next: here
                    torch.empty(1, device=device).fill_(0)
        if error:
            raise LimitError(
                f"{memory.nbytes} bytes of memory cannot be pinned (CUDA error {error}): allow the process more locked "
                "memory, or push with wait=True",
                kind="not_pinned",
            )
        weakref.finalize(memory, _unpin, address, device, os.getpid()).atexit = False


CUDA = Cuda()


def _unpin(address: int, device: "torch.device | None", process: int) -> None:
    import torch

    if process == os.getpid():  # a fork has the memory, but not the GPU
        with torch.cuda.device(device):
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


class Transfers:
    """Copies from devices into memory of this machine, which go on beside what the devices do, on streams of their own.

    A copy sees its tensor as it is when all has run that was queued when its device was followed (:meth:`follow`). The
    tensor must neither change nor be freed until what was begun has been waited for.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._streams: dict[torch.device, Waitable] = {}

    def follow(self, tensor: "torch.Tensor") -> None:
        """Have copies from a tensor's device wait for what this thread has queued there; only the first call counts."""
        if tensor.device not in self._streams:
            self._streams[tensor.device] = self._device.stream(tensor)

    def begin(
        self, tensor: "torch.Tensor", slices: tuple[slice, ...], out: "np.ndarray[Any, np.dtype[np.uint8]]"
    ) -> Waitable:
        """Begin to copy the little-endian bytes, in C order, of a part of a tensor; return what waits for them.

        What does not lie so on the device is gathered there, beside the tensor, before it is copied in one run.

        Parameters
        ----------
        tensor
            On a device that is followed; passed :func:`check_storable`.
        slices
            The part, as for :func:`array_of`; not empty.
        out : uint8, 1-d, contiguous
            As long as the part, aligned to its elements. If it is not pinned (:meth:`Device.pin`), the copy may have
            ended when this returns.

        Raises
        ------
        InvalidInputError
            The tensor's memory was freed (``freed_tensor``).
        """
        import torch

        stream = self._streams[tensor.device]
        with self._device.queuing(stream):
            source = _carried(tensor, slices)
            torch.from_numpy(out).view(source.dtype).view(source.shape).copy_(source, non_blocking=True)
            return self._device.mark(stream)

    def wait(self) -> None:
        """Wait for every copy that was begun."""
        for stream in self._streams.values():
            stream.synchronize()


def to_torch(
    data: "Buffer", dtype: Dtype, shape: tuple[int, ...], *, device: "torch.device | str | None" = None
) -> "torch.Tensor":
    """Make a tensor of decoded bytes.

    Parameters
    ----------
    data
        Exactly the tensor's little-endian C-order bytes. Writable and aligned to an element, it becomes the tensor's
        memory; otherwise it is copied.
    dtype, shape
        Of the tensor; f4 becomes torch's packed dtype, with half the length on its last axis.
    device
        Where the tensor shall be; None for the CPU.

    Raises
    ------
    InvalidInputError
        Torch has no such dtype, or packed elements do not fill the bytes of each row (``unknown_dtype``); ``data`` is
        too long or too short (``wrong_length``).
    """
    try:
        import torch
    except ImportError:
        raise InvalidInputError(
            "torch is not installed: install lamella[torch], or take NumPy arrays", kind="missing_extra"
        ) from None

    target = torch_dtype_of(dtype)
    if dtype.opaque:
        if not shape or shape[-1] % 2:
            raise InvalidInputError(
                f"torch packs {dtype.name} in pairs on the last axis, which shape {shape} does not allow: check out as "
                "arrays",
                kind="unknown_dtype",
                dtype=dtype.name,
            )
        shape = (*shape[:-1], shape[-1] // 2)
    octets = np.frombuffer(data, np.uint8)
    if octets.nbytes != target.itemsize * int(np.prod(shape, dtype=object)):
        raise InvalidInputError(
            f"{octets.nbytes} bytes are no {dtype.name} tensor of shape {shape}", kind="wrong_length"
        )
    if not octets.nbytes:
        return torch.empty(shape, dtype=target, device=device)
    if not octets.flags.writeable or octets.ctypes.data % target.itemsize:
        octets = octets.copy()
    tensor = torch.from_numpy(octets).view(target).reshape(shape)
    return tensor if device is None else tensor.to(device)


def _check_alive(tensor: "torch.Tensor") -> None:
    """Raise InvalidInputError if the tensor's elements lie outside its storage, as after ``resize_(0)``."""
    count = tensor.numel()
    if not count:
        return
    if not tensor.is_contiguous():
        count = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + count) * tensor.itemsize
    if end > tensor.untyped_storage().nbytes():
        raise InvalidInputError("its memory has been freed: gather the parameters first", kind="freed_tensor")


_TORCH_NAMES = frozenset(dtype.name for dtype in DTYPES if not dtype.opaque)
