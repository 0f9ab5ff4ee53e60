"""What a commit says of itself: its id, the time, and who has asked for it."""

import getpass
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from lamella_engine.model import PushId


def now() -> str:
    """Return the time as entries and versions write it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def new_push_id() -> PushId:
    """Return a fresh push id: 48 bits of milliseconds since 1970, then 80 random bits.

    The time is there for locality alone (ids made one after the other sort side by side in the fold's tables); no rule
    depends on it, and a wrong clock does no harm.
    """
    return PushId(f"{time.time_ns() // 1_000_000 & (1 << 48) - 1:012x}{secrets.token_hex(10)}")


_acting: ContextVar[str | None] = ContextVar("acting", default=None)


@contextmanager
def acting_as(name: str) -> Iterator[None]:
    """Have entries say that ``name`` asked for what this thread commits in this block, on behalf of a caller."""
    token = _acting.set(name)
    try:
        yield
    finally:
        _acting.reset(token)


def principal() -> str:
    """Return who is acting, as far as is known: by :func:`acting_as`, or else by the machine."""
    if (name := _acting.get()) is not None:
        return name
    try:
        return getpass.getuser().encode(errors="replace").decode()
    except (OSError, KeyError):  # a uid without a name, as in many containers
        return ""
