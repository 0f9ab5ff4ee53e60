"""So many at a time, in the order in which they came, none of whom takes most; who waits too long may come again."""

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lamella_engine.errors import LimitError
from lamella_engine.wire import RETRY_AFTER

PATIENCE_S = 20.0
"""How long a call waits for its turn before it is sent away: its thread is one that others lack meanwhile."""

AFTER_S = 1.0
"""When whoever was sent away as one too many should come again; clients add jitter."""


def come_again(message: str, *, kind: str, after_s: float = AFTER_S, **context: Any) -> LimitError:
    """Make the error for what is too much now and may not be so in a while."""
    return LimitError(message, kind=kind, **context, **{RETRY_AFTER: int(after_s * 1000)})


class Slots:
    """A semaphore that is fair, and whose queue is bounded in time. Safe for several threads.

    Parameters
    ----------
    count
        How many there are; of more than one, a single owner may hold half.
    """

    def __init__(self, count: int, *, patience_s: float = PATIENCE_S) -> None:
        self._free = count
        self._most = max(1, count // 2)
        self._patience_s = patience_s
        self._held: Counter[str] = Counter()
        self._waiting: deque[tuple[object, str]] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, owner: str) -> Iterator[None]:
        """Hold a slot; raises LimitError (``busy``) if none comes free for this owner in time."""
        ticket = object()
        with self._changed:
            self._waiting.append((ticket, owner))
            ours = self._changed.wait_for(lambda: self._next() is ticket, self._patience_s)
            self._waiting.remove((ticket, owner))
            if ours:
                self._free -= 1
                self._held[owner] += 1
            self._changed.notify_all()
        if not ours:
            raise come_again("the server is busy: try again", kind="busy")
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._held[owner] -= 1
                if not self._held[owner]:
                    del self._held[owner]
                self._changed.notify_all()

    def _next(self) -> object | None:
        """Return the ticket of whoever is to have a slot now, if anybody."""
        if not self._free:
            return None
        return next((ticket for ticket, owner in self._waiting if self._held[owner] < self._most), None)
