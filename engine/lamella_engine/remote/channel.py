"""Calls of a service: by name, with a deadline, with the errors that a local repository would raise, and with patience.

One gRPC channel carries everything: two carried 4 % more, a median of six times 192 MiB of chunks that do not compress,
from another process on two cores.
"""

import random
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from lamella_engine.errors import InvalidInputError, LamellaError, StorageError
from lamella_engine.remote.place import Credentials, Place, read
from lamella_engine.wire import CHANNEL_OPTIONS, ERROR_TRAILER, METHODS, RETRY_AFTER, RETRY_TRAILER, decode_error

Result = TypeVar("Result")

PATIENCE_S = 60.0
"""How long what failed, and may succeed later, is tried again."""

OPENING_PATIENCE_S = 2.0
"""The same for the first call of all: if nobody answers that, the address is wrong, or the service is down."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0

UNARY_S, STREAM_S = 60.0, 7200.0
"""Deadlines of calls. A peer that is gone is found by keepalive, much sooner."""

# Others: the server may do these for as long as it lets any call last; and nobody waits for what only tidies up.
_LONG = ("Pushes.Commit", "Pushes.Part", "Pushes.Join", "Repositories.Stats")
_DEADLINES_S = dict.fromkeys(_LONG, 600.0) | {"Pushes.Abandon": 5.0}

_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),  # repositories do not share a connection, nor its credentials
    # After so long without an answer a ping is sent, while calls are under way; the server allows one in 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC would wait up to two minutes before it connects again; it is Patience that decides.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Whatever its name says, so long may one attempt take, the handshake of TLS included.
    ("grpc.min_reconnect_backoff_ms", int(LONGEST_PAUSE_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(LONGEST_PAUSE_S * 1000)),
    ("grpc.enable_retries", 0),
)


def may_succeed_later(error: LamellaError) -> bool:
    """Whether the same call may succeed if it is made again."""
    return (isinstance(error, StorageError) and error.transient) or RETRY_AFTER in error.context


class Patience:
    """How long something is tried again, after pauses that grow, and are partly random: not all come back at once.

    Parameters
    ----------
    total_s
        So long, from the first failure on; :data:`PATIENCE_S` unless it is given.
    """

    def __init__(self, total_s: float | None = None) -> None:
        self._total_s = PATIENCE_S if total_s is None else total_s
        self.renew()

    def renew(self) -> None:
        """Forget all failures: something went well."""
        self._end: float | None = None
        self._pause_s = FIRST_PAUSE_S

    def wait(self, error: LamellaError) -> None:
        """Return when it is time to try again; raises ``error`` if there is no point in it, or no time left."""
        if not may_succeed_later(error):
            raise error
        now = time.monotonic()
        self._end = self._end or now + self._total_s
        asked_s = float(error.context.get(RETRY_AFTER, 0)) / 1000
        # Never sooner than was asked for.
        pause_s = max(self._pause_s, asked_s) * random.uniform(0.5, 1.0) + asked_s / 2
        if now + pause_s > self._end:
            raise error
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def patiently(job: Callable[[], Result], patience: Patience | None = None) -> Result:
    """Return what a job returns that may be repeated; one that breaks off is done again from its beginning."""
    patience = patience or Patience()
    while True:
        try:
            return job()
        except LamellaError as error:
            patience.wait(error)


class Pending:
    """A call that has been made and may not be answered yet."""

    def __init__(self, future: Any, translate: Callable[[grpc.RpcError], LamellaError]) -> None:
        self._future = future
        self._translate = translate

    def reply(self) -> Any:
        """Wait for the answer; raises what the server said, or StorageError."""
        try:
            return self._future.result()
        except grpc.RpcError as error:
            raise self._translate(error) from None
        except grpc.FutureCancelledError:
            raise _closed() from None

    def cancel(self) -> None:
        """Do without the answer."""
        self._future.cancel()


class Channel:
    """Calls one service. Safe for several threads.

    Parameters
    ----------
    place
        Where it is.
    credentials
        Who calls. Files are read now, but for that of the token.
    """

    def __init__(self, place: Place, credentials: Credentials) -> None:
        self._place = place
        self._credentials = credentials
        self._open = True
        # A proxy of the environment is not asked for this machine itself.
        options = (*_OPTIONS, ("grpc.enable_http_proxy", int(place.secure)))
        if place.secure:
            self._grpc = grpc.secure_channel(place.address, _tls(credentials), options)
        else:
            self._grpc = grpc.insecure_channel(place.address, options)
        self._stubs = {name: self._stub(name) for name in METHODS}

    @property
    def secure(self) -> bool:
        """Whether it speaks TLS; without, only to this machine."""
        return self._place.secure

    def __repr__(self) -> str:
        return f"Channel({self._place.address})"

    def _stub(self, name: str) -> Any:
        method = METHODS[name]
        return getattr(self._grpc, method.shape)(
            method.path,
            request_serializer=None if method.request is None else method.request.SerializeToString,
            response_deserializer=None if method.reply is None else method.reply.FromString,
        )

    def close(self) -> None:
        """End, with all that is under way. Idempotent."""
        self._open = False
        self._grpc.close()

    def call(self, name: str, request: Message, *, patience: Patience | None = None) -> Any:
        """Return the reply to an rpc that may be repeated, which it is as long as ``patience`` (a minute) lasts.

        Raises what the server said; StorageError if it said nothing; InvalidInputError if the channel was closed.
        """
        return patiently(lambda: self.call_once(name, request), patience)

    def call_once(self, name: str, request: Message) -> Any:
        """Return the reply to an rpc; raises what :meth:`call` does."""
        return self.begin(name, request).reply()

    def begin(self, name: str, request: Message) -> Pending:
        """Make a call without waiting for the answer."""
        return Pending(self._made(self._stubs[name].future, request, _DEADLINES_S.get(name, UNARY_S)), self._translate)

    def stream(self, name: str, request: "Message | Iterable[bytes]") -> Generator[Any]:
        """Yield the replies to an rpc; closing the iterator ends the call. Raises what :meth:`call` does."""
        call = self._made(self._stubs[name], request, STREAM_S)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._translate(error) from None
        finally:
            call.cancel()

    def _made(self, stub: Any, request: Any, timeout_s: float) -> Any:
        metadata = self._credentials.metadata()
        try:
            return stub(request, timeout=timeout_s, metadata=metadata)
        except ValueError:  # all that gRPC says of a closed channel
            raise _closed() from None

    def _translate(self, error: grpc.RpcError) -> LamellaError:
        """Return what a local repository would have raised."""
        if not self._open:
            return _closed()
        trailers = dict(error.trailing_metadata() or ())
        data = trailers.get(ERROR_TRAILER)
        if isinstance(data, bytes):
            found = decode_error(data)
            after = str(trailers.get(RETRY_TRAILER, ""))
            if after.isascii() and after.isdigit():
                found.context[RETRY_AFTER] = int(after)
            return found
        code, said = error.code(), " ".join(str(error.details() or "").split())[:300]
        if code is grpc.StatusCode.UNAVAILABLE:
            cause = "check the address, and that the service runs"
            message = f"cannot reach the service at {self._place.address}: {cause} ({said})"
        else:
            message = f"the service at {self._place.address} failed ({code.name}: {said})"
        return StorageError(message, kind="service_failed", transient=_is_transient(code, said), status=code.name)


def _is_transient(code: grpc.StatusCode, said: str) -> bool:
    """Whether a call may succeed later that failed without a word of lamella's: in gRPC, or on the way."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return "larger than max" not in said
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        return "RST_STREAM" in said or "Stream removed" in said  # the connection broke at an unusual place
    return code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def _closed() -> InvalidInputError:
    return InvalidInputError("this repository was closed: open it again", kind="closed")


def _tls(credentials: Credentials) -> grpc.ChannelCredentials:
    ca = None if credentials.ca is None else read(credentials.ca, "LAMELLA_CA")
    if credentials.certificate is None or credentials.key is None:
        return grpc.ssl_channel_credentials(ca)
    certificate = read(credentials.certificate, "LAMELLA_CLIENT_CERT")
    return grpc.ssl_channel_credentials(ca, read(credentials.key, "LAMELLA_CLIENT_KEY"), certificate)
