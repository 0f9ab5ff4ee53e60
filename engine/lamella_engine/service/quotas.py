"""What each principal holds of a server and has written to it, and how much that may be.

Counted by each server process for itself: where several serve one root, whoever calls all of them has as often as much,
and a server that is started anew has forgotten what was written before.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

from lamella_engine.errors import InvalidInputError, LimitError
from lamella_engine.service.slots import come_again

CALLS_OF_ONE = 128
"""Calls that one principal may have at a time: half of what a server answers at once, so that others are answered."""

PUSHES, PUSHES_OF_ONE = 512, 128
"""Pushes under way at a time, of all and of one principal: each takes little memory until it writes."""

PARTS, PARTS_OF_ONE = 8192, 2048
"""The same of pushes that end as parts: a job has one for each rank, all at a time."""

DEFAULT_UNCOMMITTED_NBYTES = 1 << 40
"""Bytes that one principal may have stored in pushes that are not committed, unless a server is told otherwise.

As much as a training state of 70 billion parameters with Adam's moments takes before it is encoded. Without a bound,
whoever pushes and never commits fills the disk."""

_DAY_S = 86_400.0


@dataclass(slots=True)
class _Held:
    """Of one principal."""

    calls: int = 0
    pushes: int = 0
    parts: int = 0
    uncommitted_nbytes: int = 0
    written_nbytes: float = 0.0
    """As far as they still counted at ``counted``: in a day as much is forgotten as may be written in one."""
    counted: float = 0.0


class Quotas:
    """Counts what each principal holds; refuses what would be too much, at once. Safe for several threads.

    Parameters
    ----------
    uncommitted_nbytes
        Most bytes that one principal may have stored in pushes that are not committed; 0 for no bound.
    daily_nbytes
        Most bytes that one principal may write in one go; as many come back, evenly, in a day. 0 for no bound.
    clock
        Seconds, from whenever.
    """

    def __init__(
        self,
        *,
        uncommitted_nbytes: int = DEFAULT_UNCOMMITTED_NBYTES,
        daily_nbytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if uncommitted_nbytes < 0 or daily_nbytes < 0:
            raise InvalidInputError("a quota is a number of bytes, or 0 for none", kind="bad_option")
        self._uncommitted_nbytes = uncommitted_nbytes
        self._daily_nbytes = daily_nbytes
        self._clock = clock
        self._held: defaultdict[str, _Held] = defaultdict(_Held)
        """By principal: there are only as many as admins have made tokens for."""
        self._pushes = self._parts = 0
        self._lock = threading.Lock()

    @contextmanager
    def call(self, owner: str) -> Iterator[None]:
        """Hold a call in this block; raises LimitError (``too_many_calls``)."""
        with self._lock:
            held = self._held[owner]
            if held.calls >= CALLS_OF_ONE:
                raise come_again("too many calls of yours run at once: try again", kind="too_many_calls")
            held.calls += 1
        try:
            yield
        finally:
            with self._lock:
                held.calls -= 1

    def push(self, owner: str, *, part: bool = False) -> "Claim":
        """Return what a push holds from its beginning on; raises LimitError (``too_many_pushes``)."""
        with self._lock:
            held = self._held[owner]
            if part:
                full = self._parts >= PARTS or held.parts >= PARTS_OF_ONE
            else:
                full = self._pushes >= PUSHES or held.pushes >= PUSHES_OF_ONE
            if full:
                raise come_again("too many pushes are under way: try again in a minute", kind="too_many_pushes")
            self._count(held, 1, part=part)
        return Claim(self, owner, part)

    def _count(self, held: _Held, more: int, *, part: bool) -> None:
        if part:
            held.parts += more
            self._parts += more
        else:
            held.pushes += more
            self._pushes += more

    def take(self, claim: "Claim", nbytes: int) -> None:
        """See :meth:`Claim.take`."""
        with self._lock:
            if claim.released:  # whoever waited while their push was given up may try its commit once more
                return
            held = self._held[claim.owner]
            most = self._uncommitted_nbytes
            if most and held.uncommitted_nbytes + nbytes > most:
                raise LimitError(
                    f"your pushes under way may hold {most:,} bytes in all and would hold more: commit or abandon one, "
                    "push less at a time, or ask whoever runs the service to raise its --max-uncommitted",
                    kind="uncommitted_quota",
                    limit_nbytes=most,
                )
            self._write(held, nbytes)
            held.uncommitted_nbytes += nbytes
            claim.nbytes += nbytes

    def _write(self, held: _Held, nbytes: int) -> None:
        most, now = self._daily_nbytes, self._clock()
        if not most:
            return
        written = max(0.0, held.written_nbytes - (now - held.counted) / _DAY_S * most)
        if (over := written + min(nbytes, most) - most) > 0:  # what is larger than the bound may come on its own
            wait_s = over / most * _DAY_S
            raise come_again(
                f"you may write {most:,} bytes a day, and have: come again in {ceil(wait_s / 60)} minutes, push less "
                "at a time, or ask whoever runs the service to raise its --max-daily",
                kind="daily_quota",
                after_s=wait_s,
                limit_nbytes=most,
            )
        held.written_nbytes, held.counted = written + nbytes, now

    def release(self, claim: "Claim") -> None:
        """See :meth:`Claim.release`."""
        with self._lock:
            self._end(claim)
            if not claim.released:
                claim.released = True
                self._held[claim.owner].uncommitted_nbytes -= claim.nbytes

    def end(self, claim: "Claim") -> None:
        """See :meth:`Claim.end`."""
        with self._lock:
            self._end(claim)

    def _end(self, claim: "Claim") -> None:
        if not claim.ended:
            claim.ended = True
            self._count(self._held[claim.owner], -1, part=claim.part)


@dataclass(slots=True, eq=False)
class Claim:
    """What one push holds, until it is committed or given up. Safe for several threads."""

    quotas: Quotas
    owner: str
    """Name of the principal whose push it is."""
    part: bool = False
    """Whether it is to end as a part of another one."""
    nbytes: int = 0
    ended: bool = False
    released: bool = False

    def take(self, nbytes: int) -> None:
        """Hold ``nbytes`` more, which are about to be stored.

        Raises LimitError: ``uncommitted_quota``, which only the caller can mend, or ``daily_quota``.
        """
        self.quotas.take(self, nbytes)

    def end(self) -> None:
        """Hold the bytes that are stored, but no place among pushes any more. Idempotent."""
        self.quotas.end(self)

    def release(self) -> None:
        """Hold nothing any more. Idempotent."""
        self.quotas.release(self)
