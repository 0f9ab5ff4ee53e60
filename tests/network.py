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
        self._channel = grpc.insecure_channel(target, (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)))
        self._threads = ThreadPoolExecutor(32)
        self._server = grpc.server(self._threads, (_Handlers(self),), options=CHANNEL_OPTIONS)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

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
        gone = threading.Event()
        context.add_callback(gone.set)
        metadata = tuple(item for item in context.invocation_metadata() if item[0] == "authorization")
        call = getattr(self._channel, method.shape)(method.path)
        options = {"timeout": context.time_remaining(), "metadata": metadata}
        try:
            sent = self._treated(method, "up", iter([incoming]) if isinstance(incoming, bytes) else incoming, gone)
            if method.streams_requests:
                answered = call(sent, **options)
                context.add_callback(answered.cancel)
            else:
                requests = list(sent)
                for request in requests[:-1]:
                    self._once(method, call, request, options)
                answered = call(requests[-1], **options)
            replies = answered if method.streams_replies else iter([answered])
            yield from self._treated(method, "down", replies, gone)
        except grpc.RpcError as error:
            if not isinstance(error, grpc.Call):  # the client has gone
                return
            context.set_trailing_metadata(error.trailing_metadata() or ())
            context.abort(error.code(), error.details() or "")
        except _Cut:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")

    def _once(self, method: Method, call: Any, request: bytes, options: dict[str, Any]) -> None:
        """Make a call whose answer nobody sees."""
        try:
            answered = call(request, **options)
            for _ in answered if method.streams_replies else ():
                pass
        except grpc.RpcError:
            pass

    def _treated(self, method: Method, way: str, messages: Iterator[bytes], gone: threading.Event) -> Iterator[bytes]:
        for message in messages:
            with self._lock:
                number = len(self.messages)
                self.messages.append((method.name, way, len(message)))
            harm = self.treat(number, method.name, way)
            if harm is Harm.CUT:
                raise _Cut
            if harm is Harm.LATE:
                gone.wait(30)
            if harm is Harm.REPEAT and (way == "up" or method.streams_replies):
                yield message
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
