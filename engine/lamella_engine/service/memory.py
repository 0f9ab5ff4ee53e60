"""Memory of a process that serves: what one push frees, the next one finds mapped."""

import ctypes

# Of glibc's malloc.h, with what they are set to: how much free memory at the end of a heap is kept; the length from
# which on a block is mapped and unmapped by itself, at most 32 MiB; how many heaps all threads have among them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_OPTIONS = {_TRIM_THRESHOLD: 256 << 20, _MMAP_THRESHOLD: 32 << 20, _ARENA_MAX: 1}


def keep_freed_memory() -> None:
    """Have this process keep up to 256 MiB of what it frees, where the C library lets that be said (glibc).

    Payloads, bases and messages of a few MiB come and go. Given back to the system each time, each of their pages costs
    a fault when it is touched again: five pushes of MiniLM took 79,000 of them on the service, and take 38,000.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _OPTIONS.items():
            mallopt(option, value)
