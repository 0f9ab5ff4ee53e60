"""Calls as a server sees them pass: what has come and gone, and how long each client has kept its server waiting."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from lamella_engine.errors import StorageError
from lamella_engine.service.slots import come_again

WINDOW_S = 60.0
"""So long a server waits for a client: without a word in one go, and in all beyond what :data:`MIN_RATE` gives it."""

MIN_RATE = 64 << 10
"""Bytes that give a client a second more.

A stream holds one of a few slots. So whoever sends a byte a minute loses it with the second one, and whoever wants it
for the two hours of a stream moves half a GB. A link of half a megabit a second is fast enough."""

# What is sent is taken when gRPC says so, which on a busy server is later: so much of each wait is not the client's.
_OURS_S = 1.0


class Streams:
    """The calls of a server that wait for their clients. Safe for several threads.

    Parameters
    ----------
    clock
        Seconds, from whenever.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._since: dict[Stream, float] = {}
        """The calls whose clients are waited for."""
        self._lock = threading.Lock()

    def opened(self, cancel: Callable[[], object]) -> "Stream":
        """Return a call that has begun; ``cancel`` ends it while its thread waits."""
        return Stream(self, cancel)

    @contextmanager
    def waiting(self, stream: "Stream") -> Iterator[float]:
        """Wait for the client of a call in this block, which is given the time at which it begins."""
        began = self.clock()
        with self._lock:
            self._since[stream] = began
        try:
            yield began
        finally:
            with self._lock:
                del self._since[stream]

    def end_silent(self) -> None:
        """Cancel the calls whose clients let them wait too long in one go. To be called again and again."""
        late = self.clock() - WINDOW_S
        with self._lock:
            silent = [stream for stream, since in self._since.items() if since < late]
        for stream in silent:
            stream.cancel()


class Stream:
    """One call, for one thread at a time.

    A client's time passes only while its server waits for it, not while the server works or takes nothing. It begins
    with :data:`WINDOW_S` and never has more; each :data:`MIN_RATE` bytes, in either direction, give a second back.

    Parameters
    ----------
    streams
        Those of the server.
    cancel
        Ends the call from another thread.
    """

    def __init__(self, streams: Streams, cancel: Callable[[], object]) -> None:
        self.received_nbytes = 0
        self.sent_nbytes = 0
        self.cancel = cancel
        self._streams = streams
        self._left_s = WINDOW_S

    def received(self, incoming: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the messages of the client.

        Raises StorageError (``cancelled``) if it has gone, LimitError (``too_slow``) if its time is over.
        """
        while True:
            try:
                with self._waiting():
                    data = next(incoming, None)
            except grpc.RpcError:
                self._check_time()
                raise StorageError("the client has gone", kind="cancelled", transient=True) from None
            if data is None:
                return
            self.received_nbytes += len(data)
            self._gain(len(data))
            yield data

    @contextmanager
    def sending(self, nbytes: int) -> Iterator[None]:
        """Have the client take ``nbytes`` in this block; raises LimitError (``too_slow``) then if its time is over."""
        self.sent_nbytes += nbytes
        with self._waiting(ours_s=_OURS_S):
            yield
        self._gain(nbytes)

    @contextmanager
    def _waiting(self, *, ours_s: float = 0.0) -> Iterator[None]:
        with self._streams.waiting(self) as began:
            try:
                yield
            finally:
                self._left_s -= max(0.0, self._streams.clock() - began - ours_s)

    def _gain(self, nbytes: int) -> None:
        self._left_s = min(WINDOW_S, self._left_s + nbytes / MIN_RATE)
        self._check_time()

    def _check_time(self) -> None:
        if self._left_s < 0:
            raise come_again(
                f"this stream moved less than {MIN_RATE >> 10} KiB a second for {WINDOW_S:.0f} s while others wait: "
                "begin another, which goes on where it ended",
                kind="too_slow",
            )
