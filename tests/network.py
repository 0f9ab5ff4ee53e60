"""A network for tests: a proxy between a client and a service that does harm to single messages."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from typing import Any

import grpc

from lamella_engine.wire import CHANNEL_OPTIONS, METHODS, Method


class Harm(Enum):
    """What is done to a message."""

    NONE = "passed on"
    CUT = "lost, and the call with it"
    REPEAT = "sent twice"
    LATE = "held until the client has given up, then passed on"


Treatment = Callable[[int, str, str], Harm]
"""Of each message its number, the rpc, and ``up`` or ``down``; returns what is done to it."""


class Proxy:
    """Passes every rpc of the wire on, message by message. A context manager, like the channel that it holds."""

    def __init__(self, target: str, treat: Treatment) -> None:
        self.treat = treat
        self.messages: list[tuple[str, str, int]] = []
        """What went through: rpc, ``up`` or ``down``, and bytes."""
        self._lock = threading.Lock()
        self.turn_to(target)
        self._threads = ThreadPoolExecutor(32)
        self._server = grpc.server(self._threads, (_Handlers(self),), options=CHANNEL_OPTIONS)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def turn_to(self, target: str) -> None:
        """Pass what comes from now on to another server."""
        self.target = target
        self._channel = grpc.insecure_channel(target, (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)))

    def __enter__(self) -> "Proxy":
        self._server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop(0).wait()
        self._channel.close()
        self._threads.shutdown()

    @property
    def sent_nbytes(self) -> int:
        """Bytes of all messages that a client sent."""
        return sum(nbytes for _, way, nbytes in self.messages if way == "up")

    def handle(self, method: Method, incoming: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Pass one call on."""
        gone, cut = threading.Event(), threading.Event()
        context.add_callback(gone.set)
        metadata = tuple(item for item in context.invocation_metadata() if item[0] == "authorization")
        call = getattr(self._channel, method.shape)(method.path)
        options = {"timeout": context.time_remaining(), "metadata": metadata}
        sent = self._treated(method, "up", iter([incoming]) if isinstance(incoming, bytes) else incoming, gone, cut)
        try:
            if method.streams_requests:
                answered = call(self._until_cut(sent, lambda: answered.cancel()), **options)
                context.add_callback(answered.cancel)
            else:
                *repeated, request = sent
                for once in repeated:
                    self._once(method, call, once, options)
                answered = call(request, **options)
            replies = answered if method.streams_replies else iter([answered])
            yield from self._treated(method, "down", replies, gone, cut)
        except _Cut:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        except grpc.RpcError as error:
            if cut.is_set():
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            if isinstance(error, grpc.Call):  # else the client has gone
                context.set_trailing_metadata(error.trailing_metadata() or ())
                context.abort(error.code(), error.details() or "")

    def _until_cut(self, messages: Iterator[bytes], cancel: Callable[[], object]) -> Iterator[bytes]:
        """Yield messages; a cut, or a client that goes, ends the call that they belong to."""
        try:
            yield from messages
        except (_Cut, grpc.RpcError):
            cancel()

    def _once(self, method: Method, call: Any, request: bytes, options: dict[str, Any]) -> None:
        """Make a call whose answer nobody sees."""
        try:
            answered = call(request, **options)
            for _ in answered if method.streams_replies else ():
                pass
        except grpc.RpcError:
            pass

    def _treated(
        self, method: Method, way: str, messages: Iterator[bytes], gone: threading.Event, cut: threading.Event
    ) -> Iterator[bytes]:
        first = True
        for message in messages:
            if cut.is_set():
                raise _Cut
            with self._lock:
                number = len(self.messages)
                self.messages.append((method.name, way, len(message)))
            harm = self.treat(number, method.name, way)
            if harm is Harm.CUT:
                cut.set()
                raise _Cut
            if harm is Harm.LATE:
                gone.wait(30)
            # A stream keeps its order: only what its client says twice comes twice, a part of a write, not its header.
            if harm is Harm.REPEAT and way == "up" and not (method.streams_requests and first):
                yield message
            first = False
            yield message


class _Cut(Exception):
    pass


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, proxy: Proxy) -> None:
        self._handlers = {method.path: self._handler(proxy, method) for method in METHODS.values()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)

    def _handler(self, proxy: Proxy, method: Method) -> grpc.RpcMethodHandler:
        def stream(incoming: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            return proxy.handle(method, incoming, context)

        def unary(incoming: Any, context: grpc.ServicerContext) -> bytes:
            return next(proxy.handle(method, incoming, context))

        return getattr(grpc, f"{method.shape}_rpc_method_handler")(stream if method.streams_replies else unary)


@contextmanager
def proxy(target: str, treat: Treatment = lambda number, rpc, way: Harm.NONE) -> Iterator[Proxy]:
    """Run a proxy before a service."""
    with Proxy(target, treat) as running:
        yield running
