"""Where per-chunk work runs: in the caller's thread, or in threads around kernels that release the GIL.

A map keeps the order of its items and looks only a bounded way ahead, so memory stays bounded whatever comes in.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

from lamella_engine.errors import InvalidInputError

Item = TypeVar("Item")
Result = TypeVar("Result")

# What one unit of work may hold at a time: a chunk, its base, the planes of both forms that are compared, and the
# payload, each at most 4 MiB.
TASK_NBYTES = 24 << 20

DEFAULT_MEMORY_NBYTES = 256 << 20
"""Memory for work in flight, unless a caller says otherwise. With a pack being filled and one being written (64 MiB
each) and the bases kept by a push (64 MiB), a push stays below 512 MiB."""


class Executor(Protocol):
    """Runs functions over items. Its methods are called from the thread that consumes the results."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield ``function(item)`` in the order of ``items``, which is drawn from in the caller's thread.

        The first exception, of ``function`` or of ``items``, ends the map; nothing of it runs on when it is raised.
        """

    def submit(self, function: Callable[[], Result]) -> "Future[Result]":
        """Start ``function``; its future tells how it ended."""

    def close(self) -> None:
        """Wait for what runs, and release the threads. Idempotent."""


# Small items are handed to threads together, up to so many bytes and items: below that, handing over costs more than
# the work (20 us a time; hashing a row of LayerNorm takes 2).
BATCH_NBYTES = 1 << 20
BATCH_ITEMS = 512


def map_batched(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], *, nbytes: Callable[[Item], int]
) -> Iterator[Result]:
    """Yield ``function(item)`` in the order of ``items``, as :meth:`Executor.map` does, small items several at a time.

    ``nbytes`` tells how large an item is.
    """
    small = batches(items, nbytes, most_nbytes=BATCH_NBYTES, most_items=BATCH_ITEMS)
    for results in executor.map(lambda batch: [function(item) for item in batch], small):
        yield from results


def batches(
    items: Iterable[Item], nbytes: Callable[[Item], int], *, most_nbytes: int, most_items: int
) -> Iterator[list[Item]]:
    """Yield consecutive items together: each batch ends with the item that makes it so long."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += nbytes(item)
        if total >= most_nbytes or len(batch) == most_items:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class ThreadExecutor:
    """Threads of this process.

    Parameters
    ----------
    memory_nbytes
        Bound of the memory that work in flight may hold; fewer threads are used where many would pass it.
    threads
        At most so many; by default one for each core that this process may use.
    """

    def __init__(self, *, memory_nbytes: int = DEFAULT_MEMORY_NBYTES, threads: int | None = None) -> None:
        tasks = max(2, memory_nbytes // TASK_NBYTES)
        cores = threads or len(os.sched_getaffinity(0))
        # A push runs two maps at a time, one feeding the other: half of the tasks each, and a spare one beyond the
        # running ones, so that a thread finds its next item waiting.
        self._ahead = max(1, min(tasks // 2, cores + 2))
        self._threads = min(cores, tasks)
        self._pool = self._new_pool()
        self._process = os.getpid()
        self._closed = False

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="lamella")

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See :class:`Executor`."""
        running: deque[tuple[Future[Result], Item]] = deque()

        def oldest() -> Result:
            future, item = running.popleft()
            # What no thread has begun is done here: all threads may be waiting for this very map, as when a source
            # that is pushed is itself read from a repository.
            return function(item) if future.cancel() else future.result()

        try:
            for item in items:
                running.append((self.submit(partial(function, item)), item))
                if len(running) > self._ahead:
                    yield oldest()
            while running:
                yield oldest()
        finally:
            for future, _ in running:
                future.cancel()
            for future, _ in running:
                if not future.cancelled():
                    future.exception()

    def submit(self, function: Callable[[], Result]) -> "Future[Result]":
        """See :class:`Executor`."""
        if self._process != os.getpid():  # a fork has this object, but not its threads
            self._pool, self._process = self._new_pool(), os.getpid()
        try:
            return self._pool.submit(function)
        except RuntimeError:
            if not self._closed:  # the interpreter ends and its pools have ended: what still runs does without them
                return InlineExecutor().submit(function)
            raise InvalidInputError("this repository was closed: open it again", kind="closed") from None

    def close(self) -> None:
        """See :class:`Executor`."""
        self._closed = True
        self._pool.shutdown()


class InlineExecutor:
    """The caller's own thread: one thing after the other, for tests and for calls that are too small to share out."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See :class:`Executor`."""
        return map(function, items)

    def submit(self, function: Callable[[], Result]) -> "Future[Result]":
        """See :class:`Executor`."""
        future: Future[Result] = Future()
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """See :class:`Executor`."""
