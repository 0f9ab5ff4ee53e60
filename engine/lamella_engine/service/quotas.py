"""What each principal holds of a server, and how much that may be."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lamella_engine.errors import LimitError

CALLS_OF_ONE = 128
"""Calls that one principal may have at a time: half of what a server answers at once, so that others are answered."""


class Quotas:
    """Counts what each principal holds; refuses what would be too much, at once. Safe for several threads."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def call(self, owner: str) -> Iterator[None]:
        """Hold a call in this block; raises LimitError (``too_many_calls``)."""
        with self._lock:
            if self._calls[owner] >= CALLS_OF_ONE:
                raise LimitError("too many calls of yours run at once: try again", kind="too_many_calls")
            self._calls[owner] += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[owner] -= 1
                if not self._calls[owner]:
                    del self._calls[owner]
