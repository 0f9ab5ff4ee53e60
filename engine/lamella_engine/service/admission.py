"""Which calls are given a thread: not those of nobody, and not more than a server can do at once.

Whoever may call should not notice how many others try. So calls whose metadata show that they are of nobody wait for a
thread of their own, which refuses them one by one, before any message of theirs is read. Those with a token that has
not been looked up yet have threads of their own too, for there are as many of these as anybody cares to make up.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc

CALLS = 256
"""Calls at a time, each in a thread: followers, readers, writers, those that wait for a slot, and the short ones."""

_NEWCOMERS = 8
"""Calls at a time with a token that is not known yet: few, for all threads that run take turns at one lock.

Of those that are more, each is looked up and asked to come again, and is known then."""

# After each call that is refused its thread rests, so that at most 500 are in a second: each takes 0.3 ms of CPU, much
# of it under that lock. A connection may have 128 that wait, and no more.
_PAUSE_S = 0.002

_STRANGERS = 1024
"""Calls of nobody that may wait to be refused; more are sent away by gRPC without a word of ours."""


class Lane(ThreadPoolExecutor):
    """Threads, and how many calls they have or have yet to begin."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self.under_way = 0
        self._counting = threading.Lock()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        """See :class:`concurrent.futures.Executor`."""
        with self._counting:
            self.under_way += 1
        try:
            future = super().submit(function, *arguments, **named)
        except RuntimeError:  # it has been shut down
            self._ended()
            raise
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: object = None) -> None:
        with self._counting:
            self.under_way -= 1


Refusal = Callable[[Any, grpc.ServicerContext], bytes]
"""Ends a call with an error, without reading its messages."""


class Admission(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Chooses who answers a call, and in which thread. For gRPC's thread of all events: it waits for nothing.

    Parameters
    ----------
    handlers
        By path, what answers a call, and what refuses it.
    believed
        Whether a call with some metadata is of somebody; None if that is not known without a look.
    """

    def __init__(
        self,
        handlers: Mapping[str, tuple[grpc.RpcMethodHandler, Refusal]],
        believed: Callable[[Sequence[tuple[str, str | bytes]]], bool | None],
    ) -> None:
        self.calls = Lane(CALLS, "rpc")
        """The threads that answer."""
        self._believed = believed
        self._newcomers, self._strangers, self._surplus = lanes = (
            Lane(_NEWCOMERS, "newcomers"),
            Lane(1, "strangers"),
            Lane(1, "surplus"),
        )
        self._lanes = lanes
        self._answering = {path: answer for path, (answer, _) in handlers.items()}
        self._meeting = {path: _in_lane(answer, self._newcomers) for path, (answer, _) in handlers.items()}
        self._refusing = {path: _refusing(refuse, self._strangers) for path, (_, refuse) in handlers.items()}
        self._sending_away = {path: _refusing(refuse, self._surplus) for path, (_, refuse) in handlers.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return what answers a call; None for no such rpc."""
        path = handler_call_details.method
        if path not in self._answering:
            return None
        believed = self._believed(handler_call_details.invocation_metadata)
        if believed is False:
            return self._refusing[path] if self._strangers.under_way < _STRANGERS else None
        if believed is None:
            return (self._meeting if self._newcomers.under_way < _NEWCOMERS else self._sending_away)[path]
        return (self._answering if self.calls.under_way < CALLS else self._sending_away)[path]

    def close(self) -> None:
        """Refuse nothing any more. Idempotent."""
        for lane in self._lanes:
            lane.shutdown(wait=False)


def _refusing(refuse: Refusal, lane: Lane) -> grpc.RpcMethodHandler:
    """Return a handler that runs in a lane of its own, for rpcs of every shape: it takes any number of messages."""

    def refusing(incoming: Any, context: grpc.ServicerContext) -> bytes:
        try:
            return refuse(incoming, context)
        finally:
            time.sleep(_PAUSE_S)

    return _in_lane(grpc.stream_unary_rpc_method_handler(refusing), lane)


def _in_lane(handler: grpc.RpcMethodHandler, lane: Lane) -> grpc.RpcMethodHandler:
    """Return a handler that does what another does in the threads of a lane.

    By an experiment of gRPC's (1.85 has it): if that ends, it does so in the threads of all others.
    """
    ways = handler.request_streaming, handler.response_streaming
    shape = "_".join("stream" if streams else "unary" for streams in ways)
    behavior = getattr(handler, shape)

    def moved(incoming: Any, context: grpc.ServicerContext) -> Any:
        return behavior(incoming, context)

    moved.experimental_thread_pool = lane  # type: ignore[attr-defined]
    return getattr(grpc, f"{shape}_rpc_method_handler")(moved)
