"""GPUs, played by the CPU: what torch.cuda is asked for, and copies that arrive as late as they may."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from support import PATIENCE_S


@dataclass
class FakeStream:
    """A stream whose copies are made when it is waited for, as late as those of a GPU may be."""

    device: torch.device
    queue: list[Callable[[], object]] = field(default_factory=list)
    waits_for: list["FakeStream"] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of those who wait."""
    done: int = 0

    def wait_stream(self, other: "FakeStream") -> None:
        self.waits_for.append(other)

    def synchronize(self) -> None:
        self.run_to(self.done + len(self.queue))

    def run_to(self, place: int) -> None:
        assert place <= self.done or self.gate.wait(PATIENCE_S)
        with self.lock:
            while self.queue and self.done < place:
                self.done += 1
                try:
                    self.queue.pop(0)()
                except RuntimeError:  # of a GPU that fails nothing comes any more
                    self.queue.clear()
                    raise


@dataclass
class FakeEvent:
    """A place in the queue of a stream."""

    blocking: bool
    stream: FakeStream | None = None
    place: int = 0

    def record(self, stream: FakeStream) -> None:
        with stream.lock:
            self.stream, self.place = stream, stream.done + len(stream.queue)

    def synchronize(self) -> None:
        assert self.stream is not None
        self.stream.run_to(self.place)


@dataclass
class FakeGpu:
    """Has tensors of the CPU pass for a GPU's. Each thread has a stream of its own as the current one."""

    streams: list[FakeStream] = field(default_factory=list)
    pinned: dict[int, int] = field(default_factory=dict)
    most_pinned: int = 0
    """Bytes, at any time."""
    registering_fails: int = 0
    latched: bool = False
    """Whether an error waits for whoever uses the GPU next, as CUDA keeps those of its runtime."""
    devices: list[object] = field(default_factory=list)
    """Those that were made current."""
    lands_at_once: bool = False
    copies: int = 0
    """That were queued."""
    queued: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released for each of them."""
    unpinned_copies: int = 0
    """Of those, into memory that a GPU does not write to by itself."""
    broken_after: int | None = None
    """So many copies are made, the others fail."""
    _threads: threading.local = field(default_factory=threading.local)

    @property
    def entered(self) -> list[FakeStream]:
        if not hasattr(self._threads, "streams"):
            self._threads.streams = [FakeStream(torch.device("cpu"))]
        return self._threads.streams

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.entered[-1]

    @contextmanager
    def landing_at_once(self) -> Iterator[None]:
        """Have streams that are made in this block run as soon as they are waited for, without being told to."""
        self.lands_at_once = True
        yield
        self.lands_at_once = False

    def stream_of(self, device: torch.device) -> FakeStream:
        self.streams.append(FakeStream(device))
        if self.lands_at_once:
            self.streams[-1].gate.set()
        return self.streams[-1]

    @contextmanager
    def queuing(self, stream: FakeStream) -> Iterator[None]:
        self.entered.append(stream)
        try:
            yield
        finally:
            self.entered.pop()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy on the current stream."""
        self.check_latch()
        self.copies += 1
        number, address = self.copies, target.data_ptr()
        pinned = any(start <= address < start + nbytes for start, nbytes in self.pinned.items())
        self.unpinned_copies += not pinned

        def run() -> None:
            if self.broken_after is not None and number > self.broken_after:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            _copy(target, source)

        self.entered[-1].queue.append(run)
        self.queued.release()

    def check_latch(self) -> None:
        latched, self.latched = self.latched, False
        if latched:
            raise RuntimeError("CUDA error: out of memory")

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        assert isinstance(device, torch.device), "the current GPU of a thread of ours is not of our choice"
        self.devices.append(device)
        yield

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 1
        if not self.registering_fails:
            self.pinned[address] = nbytes
            self.most_pinned = max(self.most_pinned, sum(self.pinned.values()))
        self.latched = bool(self.registering_fails)
        return self.registering_fails

    def cudaHostUnregister(self, address: int) -> int:
        assert not any(stream.queue for stream in self.streams), "memory is unpinned that a GPU still writes to"
        del self.pinned[address]
        return 0

    def let_all_land(self) -> None:
        for stream in self.streams:
            stream.gate.set()


_copy, _fill = torch.Tensor.copy_, torch.Tensor.fill_


@contextmanager
def playing(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Have all tensors of torch pass for a GPU's; see in the end that no memory is left pinned."""
    gpu = FakeGpu()

    def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return _copy(target, source)
        gpu.copy(target, source)
        return target

    def fill(target: torch.Tensor, value: float) -> torch.Tensor:
        gpu.check_latch()
        return _fill(target, value)

    monkeypatch.setattr(torch.Tensor, "fill_", fill)
    monkeypatch.setattr(torch.cuda, "device", gpu.device)
    monkeypatch.setattr(torch.cuda, "Stream", gpu.stream_of)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", gpu.queuing)
    monkeypatch.setattr(torch.cuda, "current_stream", gpu.current_stream)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: gpu)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    yield gpu
    gc.collect()
    assert not gpu.pinned
