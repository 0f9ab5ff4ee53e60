"""Arrivals: parts of tensors on a GPU that are on their way into this machine's memory before somebody reads them.

They come into a ring of pinned memory, which a GPU writes to by itself, on a stream of their own. So the parts that a
push reads next are copied while it hashes and encodes those before.
"""

import logging
import threading
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lamella_engine.boxes import Octets
from lamella_engine.checkpoints.pages import Pages, aligned
from lamella_engine.errors import LimitError
from lamella_engine.torch_tensors import Device, Transfers, Waitable

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("lamella")

RING_NBYTES = 64 << 20
"""Most memory that is pinned for one push. A push with an executor's usual memory asks for six batches of cells ahead
(``executor.map_batched``), each of at most 5 MiB, and for a message of 8 MiB to other workers: 38 MiB, and room for the
gaps between parts that are given back in another order."""


class Arrivals:
    """See the module. Safe for several threads, but for :meth:`close`.

    What is asked for and never read stays in the ring until the end. Nothing waits for room: what finds none is copied
    when it is read.

    Parameters
    ----------
    device
        Where the tensors lie.
    transfers
        What copies from there.
    nbytes
        Memory for all that may be asked for: a ring need not be longer.
    """

    def __init__(self, device: Device, transfers: Transfers, nbytes: int) -> None:
        self._device = device
        self._transfers = transfers
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._ring: Ring | None = None
        self._begun: dict[Hashable, tuple[Span, Waitable]] = {}

    def expect(self, key: Hashable, tensor: "torch.Tensor", slices: tuple[slice, ...], nbytes: int) -> None:
        """Begin to copy a part of a tensor, which is read soon.

        Parameters
        ----------
        key
            What it is read by. Asked for again before it is read, it is copied once.
        tensor, slices
            As for :meth:`Transfers.begin`, which raises the same.
        nbytes
            How long it is; not 0.
        """
        with self._lock:
            if key in self._begun:
                return
            if self._ring is None:
                self._ring = self._new_ring()
            span = self._ring.take(nbytes)
            if span is None:
                return
            try:
                self._begun[key] = span, self._transfers.begin(tensor, slices, span.octets)
            except BaseException:
                self._ring.give_back(span)
                raise

    def read(self, key: Hashable, tensor: "torch.Tensor", slices: tuple[slice, ...], out: Octets) -> None:
        """Copy a part of a tensor into ``out``, which is as long; waits for it if it is on its way.

        Raises what :meth:`Transfers.begin` does, and what the device says of a copy that failed.
        """
        with self._lock:
            found = self._begun.pop(key, None)
        if found is None:
            self._transfers.begin(tensor, slices, out).synchronize()
            return
        span, arrived = found
        try:
            arrived.synchronize()
            # Not lent: whoever reads may hold what it read for long, and nothing would arrive meanwhile.
            np.copyto(out, span.octets)
        finally:
            with self._lock:
                assert self._ring is not None
                self._ring.give_back(span)

    def close(self) -> None:
        """Give the ring back, once nothing is written to it any more. Doing it twice is harmless."""
        try:
            self._transfers.wait()
        finally:  # a GPU that fails writes nothing any more
            self._begun.clear()
            self._ring = None

    def _new_ring(self) -> "Ring":
        nbytes = min(self._nbytes, RING_NBYTES)
        try:
            return Ring(Pages(nbytes, self._device))
        except LimitError as error:
            logger.info("parts are copied from the GPU as they are read: %s", error)
            return Ring(None)


@dataclass(slots=True, eq=False)
class Span:
    """A piece of a ring."""

    start: int
    stop: int
    octets: Octets
    given_back: bool = False


class Ring:
    """Memory that is taken in pieces of any length, and given back in about the same order. For one thread.

    Parameters
    ----------
    pages
        The memory; without any, no piece is found.
    """

    def __init__(self, pages: Pages | None) -> None:
        self._memory = np.empty(0, np.uint8) if pages is None else pages.octets
        self._spans: deque[Span] = deque()

    def take(self, nbytes: int) -> Span | None:
        """Take a piece, of at least a byte; None if there is no room behind the last one."""
        length = aligned(nbytes)
        first, last = (self._spans[0].start, self._spans[-1].stop) if self._spans else (0, 0)
        wrapped = bool(self._spans) and last <= first
        start = last
        if not wrapped and start + length > self._memory.nbytes:
            start, wrapped = 0, True
        if start + length > (first if wrapped else self._memory.nbytes):
            return None
        span = Span(start, start + length, self._memory[start : start + nbytes])
        self._spans.append(span)
        return span

    def give_back(self, span: Span) -> None:
        """Have a piece taken again, at once or when those beside it have been given back."""
        span.given_back = True
        while self._spans and self._spans[0].given_back:
            self._spans.popleft()
        while self._spans and self._spans[-1].given_back:
            self._spans.pop()
