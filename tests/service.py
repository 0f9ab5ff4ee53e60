"""A service for tests, and a client that knows nothing but the wire."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from lamella_engine.errors import LamellaError
from lamella_engine.service.server import Server
from lamella_engine.wire import CHANNEL_OPTIONS, ERROR_TRAILER, METHODS, decode_error


@contextmanager
def serving(root: Path | str, listen: str = "127.0.0.1:0", **options: Any) -> Iterator[Server]:
    """Run a server in this process; without TLS it trusts the loopback address."""
    server = Server(str(root), listen, **{"insecure_loopback": "tls" not in options, **options})
    server.start()
    try:
        yield server
    finally:
        server.stop(grace_s=0)


@dataclass(frozen=True)
class Failure(Exception):
    """What a server answered in place of a reply."""

    status: grpc.StatusCode
    details: str
    error: LamellaError | None
    trailers: dict[str, Any]

    @property
    def kind(self) -> str:
        return "" if self.error is None else self.error.kind


class WireClient:
    """Calls rpcs by their names with messages, or raw bytes."""

    def __init__(
        self, address: str, *, token: str = "", credentials: grpc.ChannelCredentials | None = None, options: Any = ()
    ) -> None:
        options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1), *options)
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            self.channel = grpc.secure_channel(address, credentials, options)
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def __enter__(self) -> "WireClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.channel.close()

    def call(self, name: str, request: Any, *, timeout: float | None = 20.0, metadata: Any = None) -> Any:
        """Return the reply, or the list of replies; raises Failure."""
        method = METHODS[name]
        stub = getattr(self.channel, method.shape)(method.path)
        given = self.metadata if metadata is None else metadata
        data: Any = _bytes(request)
        if method.streams_requests:
            data = map(_bytes, request)
        try:
            found = stub(data, timeout=timeout, metadata=given)
            replies = list(found) if method.streams_replies else [found]
        except grpc.RpcError as error:
            raise _failure(error) from None
        if method.reply is not None:
            replies = [method.reply.FromString(reply) for reply in replies]
        return replies if method.streams_replies else replies[0]


def _bytes(message: Any) -> Any:
    if isinstance(message, bytes) or not hasattr(message, "SerializeToString"):
        return message
    return message.SerializeToString()


def _failure(error: Any) -> Failure:
    trailers = dict(error.trailing_metadata() or ())
    data = trailers.get(ERROR_TRAILER)
    return Failure(error.code(), error.details(), None if data is None else decode_error(data), trailers)
