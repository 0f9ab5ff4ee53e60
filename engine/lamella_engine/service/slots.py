"""So many at a time, in the order in which they came; whoever waits too long is asked to come again."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from lamella_engine.errors import LimitError

PATIENCE_S = 5.0
"""How long a call waits for its turn before it is sent away: its thread is one that others lack meanwhile."""


class Slots:
    """A semaphore that is fair, and whose queue is bounded in time. Safe for several threads."""

    def __init__(self, count: int, *, patience_s: float = PATIENCE_S) -> None:
        self._free = count
        self._patience_s = patience_s
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold a slot; raises LimitError (``busy``) if none comes free in time."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            ours = self._changed.wait_for(lambda: self._free > 0 and self._waiting[0] is ticket, self._patience_s)
            self._waiting.remove(ticket)
            self._changed.notify_all()
            if not ours:
                raise LimitError("the server is busy: try again", kind="busy")
            self._free -= 1
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
