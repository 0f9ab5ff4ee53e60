"""Calls that are answered together: while some are worked on others gather, and one of these works for all of them.

There is no thread of its own: whoever comes when nobody leads, leads. A leader works until its own call is settled and
then hands over to the call that has waited longest.
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Waiting(Generic[Item, Answer]):
    """A call that waits. It is settled by the first of :meth:`answer` and :meth:`fail`."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.leads = False
        self._result: Callable[[], Answer] | None = None
        self._woken = threading.Event()

    @property
    def settled(self) -> bool:
        """Whether the caller has its answer."""
        return self._result is not None

    def answer(self, answer: Answer) -> None:
        """Have the call return ``answer``."""
        self._settle(lambda: answer)

    def fail(self, error: Exception) -> None:
        """Have the call raise ``error``, which must belong to it alone: raising changes an exception."""

        def raise_it() -> Answer:
            raise error

        self._settle(raise_it)

    def _settle(self, result: Callable[[], Answer]) -> None:
        if self._result is None:
            self._result = result
        self._woken.set()

    def appoint(self) -> None:
        """Have the call lead."""
        self.leads = True
        self._woken.set()

    def wait(self) -> None:
        """Return when the call is settled, or leads."""
        self._woken.wait()

    def result(self) -> Answer:
        """Return the answer of a settled call, or raise its error."""
        assert self._result is not None
        return self._result()


class Together(Generic[Item, Answer]):
    """See the module.

    Parameters
    ----------
    work
        Given all calls that wait, the oldest first, settles at least one of them or brings that nearer. Called by one
        thread at a time. What it raises is raised by the call that leads; another leads then, and the others wait on.
    """

    def __init__(self, work: Callable[[Sequence[Waiting[Item, Answer]]], None]) -> None:
        self._work = work
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._led = False
        self._waiting: list[Waiting[Item, Answer]] = []

    def call(self, item: Item) -> Answer:
        """Return the answer to ``item``, or raise its error.

        Raises whatever else is raised in this thread meanwhile, such as KeyboardInterrupt. The call waits no longer
        then, but if another one leads, it may have been answered, or may be about to be.
        """
        if self._process != os.getpid():  # a fork has the calls, but not the threads that make them
            self._begin()
        mine: Waiting[Item, Answer] = Waiting(item)
        try:
            with self._lock:
                self._waiting.append(mine)
                if not self._led:
                    self._led = True
                    mine.appoint()
            mine.wait()
            while not mine.settled:
                with self._lock:
                    waiting = [one for one in self._waiting if not one.settled]
                self._work(waiting)
        finally:
            self._leave(mine)
        return mine.result()

    def _leave(self, mine: Waiting[Item, Answer]) -> None:
        with self._lock:
            self._waiting = [one for one in self._waiting if one is not mine]
            if not mine.leads:
                return
            successor = next((one for one in self._waiting if not one.settled), None)
            self._led = successor is not None
            if successor is not None:
                successor.appoint()
