"""Pages: memory of our own that is used for long."""

import mmap

import numpy as np

from lamella_engine.boxes import Octets
from lamella_engine.torch_tensors import Device

ALIGNMENT = 64
"""Where things in it begin: a line of the processor's cache, which is a multiple of every element's size."""


def aligned(nbytes: int) -> int:
    """Return how much memory something takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Pages:
    """Memory in huge pages, whose first touch takes a third of the time that small ones take.

    Parameters
    ----------
    nbytes
        How much; a page at least.
    pinned_by
        A device that shall write to it by itself; None if there is none.

    Raises what :meth:`Device.pin <lamella_engine.torch_tensors.Device.pin>` does.
    """

    def __init__(self, nbytes: int, pinned_by: Device | None) -> None:
        pages = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        self.octets: Octets = np.frombuffer(pages, np.uint8)
        self.pinned = pinned_by is not None
        if pinned_by is not None:
            pinned_by.pin(self.octets)
