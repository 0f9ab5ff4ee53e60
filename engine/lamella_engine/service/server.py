"""One process of the service: gRPC around :class:`~lamella_engine.service.rpcs.Rpcs`.

Every call goes through :meth:`Server._answered`: who calls, within which deadline, whether they may, what came of it.
Nothing else knows of gRPC.
"""

import ipaddress
import logging
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lamella_engine.errors import InvalidInputError, LamellaError, LimitError, StorageError
from lamella_engine.executor import DEFAULT_MEMORY_NBYTES, ThreadExecutor
from lamella_engine.objects import open_objects
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service.access import AUDITED, LOCAL, NOBODY, POLICY, Principal, Resource, authorize, identified
from lamella_engine.service.audit import SEGMENT_S, VOUCHED_S
from lamella_engine.service.repositories import Repositories
from lamella_engine.service.rpcs import Call, Rpcs
from lamella_engine.service.tokens import Tokens
from lamella_engine.signing import load_key
from lamella_engine.wire import CHANNEL_OPTIONS, ERROR_TRAILER, METHODS, RETRY_TRAILER, Method, encode_error, parse
from lamella_engine.wire import status_of as status_of_error

logger = logging.getLogger("lamella.service")

# Calls at a time, each in a thread: followers, readers, writers, those that wait for a slot, and the short ones.
_CALLS = 256

# Of those, one principal may have so many at a time.
_CALLS_OF_ONE = 128

# A deadline is what ends a call whose client is gone; longer ones are cut.
_LONGEST_S, _LONGEST_STREAM_S = 600.0, 7200.0

# How long a stream may wait for its client before it is ended: it can be taken up again.
_STALLED_S = 60.0

_SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())

_SWEEP_S = 30.0
"""How often pushes are looked for that nobody calls for any more."""

RETRY_AFTER_MS = 1000
"""When whoever was sent away as one too many should come again; clients add jitter."""

# Kinds of LimitError that say so: what is too long, or too much for one push, is that the next time too.
_PASSING = frozenset({"busy", "too_many_calls", "too_many_pushes"})

_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),  # a second server on one port is a mistake, not a cluster
    ("grpc.max_concurrent_streams", 128),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.absolute_max_metadata_size", 32 << 10),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 5),
    ("grpc.max_connection_idle_ms", 30 * 60_000),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what is sent is compressed, and bombs are not opened
)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of PEM with which a server proves who it is."""

    certificate: Path
    key: Path = field(repr=False)
    client_ca: Path | None = None
    """Who signs the certificates that clients have to show; None if they show none."""

    def credentials(self) -> grpc.ServerCredentials:
        """Read the files; raises InvalidInputError for one that cannot be read."""
        try:
            pair = self.key.read_bytes(), self.certificate.read_bytes()
            ca = None if self.client_ca is None else self.client_ca.read_bytes()
        except OSError as error:
            message = f"cannot read {error.filename}: {error.strerror}"
            raise InvalidInputError(message, kind="bad_certificate") from error
        return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of a call: for logs and metrics."""

    rpc: str
    principal: str
    repository: str
    peer: str
    status: str
    """The gRPC status."""
    kind: str
    """Of the error; empty if there was none."""
    seconds: float
    received_nbytes: int
    sent_nbytes: int


class Server:
    """The service at one address, over all repositories below a root.

    Parameters
    ----------
    root
        A directory, or a URL of an object store.
    listen
        ``HOST:PORT``; port 0 takes a free one.
    tls
        None to speak in the clear, for which ``insecure_loopback`` has to be given.
    insecure_loopback
        Trust whoever can reach a loopback address: a call without a token is one of ``local``, an admin.
    reflection
        Whether to describe the rpcs to whoever asks.
    observe
        Told of every call when it has ended.
    signing_key
        File of a key (see :mod:`lamella_engine.signing`) that signs what is recorded.
    require_signed
        Whether repositories are made to take nothing any more that is not signed.
    audit
        Whether to note in each repository who read or changed what, from where.
    memory_nbytes
        Bound of the memory for work in flight.

    Raises
    ------
    InvalidInputError
        The address is none, or cannot be had; there is neither TLS nor a loopback address to trust; a file is no
        certificate.
    """

    def __init__(
        self,
        root: str,
        listen: str,
        *,
        tls: Tls | None = None,
        insecure_loopback: bool = False,
        reflection: bool = False,
        observe: Callable[[Answered], None] = lambda answered: None,
        signing_key: Path | None = None,
        require_signed: bool = False,
        audit: bool = False,
        memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    ) -> None:
        host = _check_listen(listen, tls=tls, insecure_loopback=insecure_loopback)
        self._trusts_loopback = insecure_loopback
        self._observe = observe
        self._executor = ThreadExecutor(memory_nbytes=memory_nbytes)
        self._tokens = Tokens(open_objects(root, create=True))
        self._audits = audit
        signer = None if signing_key is None else load_key(signing_key)
        repositories = Repositories(root, self._executor, signer=signer, require_signed=require_signed)
        self._rpcs = Rpcs(repositories, self._tokens, self._executor)
        self._stalls = _Stalls()
        self._shares = _Shares()
        self._health = _Health()
        self._stopped = threading.Event()
        self._grpc = grpc.server(
            ThreadPoolExecutor(_CALLS, thread_name_prefix="rpc"),
            options=_OPTIONS,
            maximum_concurrent_rpcs=_CALLS,
        )
        self._grpc.add_generic_rpc_handlers((_Handlers(self._handlers()),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if reflection:
            _reflect(self._grpc)
        try:
            if tls is None:
                port = self._grpc.add_insecure_port(listen)
            else:
                port = self._grpc.add_secure_port(listen, tls.credentials())
        except RuntimeError as error:
            raise InvalidInputError(
                f"cannot listen at {listen}: the port is taken, or the certificate and its key do not fit",
                kind="cannot_listen",
            ) from error
        self.address = f"{host}:{port}"
        """Where clients find it."""

    def start(self) -> None:
        """Begin to answer."""
        self._grpc.start()
        threading.Thread(target=self._sweep, name="sweep", daemon=True).start()
        self._health.serving = True

    def stop(self, grace_s: float = 30.0) -> None:
        """End: take no new calls, let those that run go on for ``grace_s`` seconds, then end them. Idempotent.

        What was acknowledged is recorded; a push that was not can be begun again at another server.
        """
        self._stopped.set()
        self._health.serving = False
        self._grpc.stop(grace_s).wait()
        self._rpcs.keep_audits()
        self._stalls.close()
        self._executor.close()

    @property
    def pushes(self) -> int:
        """How many pushes are under way."""
        return len(self._rpcs.sessions)

    def wait(self) -> None:
        """Return when the server has been stopped."""
        self._grpc.wait_for_termination()

    def _sweep(self) -> None:
        while not self._stopped.wait(_SWEEP_S):
            with suppress(LamellaError):
                self._rpcs.sessions.sweep()
            self._rpcs.keep_audits(written_s=SEGMENT_S, vouched_s=VOUCHED_S)

    # -- calls --------------------------------------------------------------------------------------------------------

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """Return what answers each path. An rpc without a row in the policy, or without a method, is a bug."""
        if unmatched := set(METHODS) ^ set(POLICY):  # not an assertion, which -O would take away
            raise RuntimeError(f"rpcs without a policy, or policies without an rpc: {sorted(unmatched)}")
        return {method.path: self._handler(method) for method in METHODS.values()}

    def _handler(self, method: Method) -> grpc.RpcMethodHandler:
        answer = getattr(self._rpcs, _snake(method.name))
        make = getattr(grpc, f"{method.shape}_rpc_method_handler")

        def stream(incoming: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._answered(method, answer, incoming, context)

        def unary(incoming: Any, context: grpc.ServicerContext) -> bytes:
            (reply,) = self._answered(method, answer, incoming, context)
            return reply

        return make(stream if method.streams_replies else unary)

    def _answered(
        self, method: Method, answer: Callable[[Any, Call], Any], incoming: Any, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """Yield what is sent for one call; every rpc goes through here."""
        began = time.monotonic()
        traffic = _Traffic()
        principal, repository = NOBODY, ""
        failure: LamellaError | None = None
        try:
            with self._stalls.watched(context) as waiting:
                deadline = began + _time_limit(method, context)
                principal = identified(self._caller(context))  # before a message has come: a thread would wait for it
                call = Call(
                    principal,
                    context.is_active,
                    lambda: deadline - time.monotonic(),
                    context.peer(),
                    self._stopped.is_set,
                )
                with self._shares.taken(principal.name):
                    request, header = _request(method, traffic.received(incoming, waiting))
                    repository = getattr(header, "repository", "")
                    authorize(principal, POLICY[method.name], _resource(header))
                    if self._audits and method.name in AUDITED:
                        self._rpcs.note(method.name, repository, _about(header), call)
                    replies = answer(request, call)
                    for reply in replies if method.streams_replies else (replies,):
                        self._check_caller(context, principal)
                        data = reply if isinstance(reply, bytes) else reply.SerializeToString()
                        traffic.sent_nbytes += len(data)
                        with waiting():
                            yield data
                        _check_time(deadline)
        except LamellaError as error:
            failure = error
        except GeneratorExit:
            failure = StorageError("the client has gone", kind="cancelled", transient=True)
            raise
        except Exception as error:  # a bug: the client is told where to look for it, and nothing else
            mark = secrets.token_hex(4)
            logger.exception("bug %s in %s", mark, method.name)
            failure = LamellaError(f"the server failed (a bug, see {mark} in its log)", kind="bug")
            failure.__cause__ = error
        finally:
            status = grpc.StatusCode.OK if failure is None else status_of_error(failure)
            self._observe(
                Answered(
                    method.name,
                    principal.name,
                    repository,
                    context.peer(),
                    status.name,
                    "" if failure is None else failure.kind,
                    time.monotonic() - began,
                    traffic.received_nbytes,
                    traffic.sent_nbytes,
                )
            )
        if failure is not None:
            _abort(context, failure)

    def _check_caller(self, context: grpc.ServicerContext, principal: Principal) -> None:
        """Raise StorageError if the credential of a call means somebody else by now: streams outlive tokens.

        To call again may help: the client may have a new token, and is told if it has none.
        """
        if self._caller(context) != principal:
            raise StorageError("your token has ended, or changed: call again", kind="token_ended", transient=True)

    def _caller(self, context: grpc.ServicerContext) -> Principal:
        given = [value for name, value in context.invocation_metadata() if name == "authorization"]
        if given:
            scheme, _, token = given[0].partition(" ") if isinstance(given[0], str) else ("", "", "")
            return self._tokens.principal(token) if scheme.lower() == "bearer" and len(given) == 1 else NOBODY
        if self._trusts_loopback:
            return LOCAL
        identity = context.auth_context()
        names = [*identity.get("x509_subject_alternative_name", ()), *identity.get("x509_common_name", ())]
        found = (self._tokens.principal_of_certificate(name.decode(errors="replace")) for name in names)
        return next((principal for principal in found if principal is not NOBODY), NOBODY)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The standard health service, for probes; anybody may ask.

    Not the servicer that comes with it: many streams of ``Watch`` that are cancelled at once can stop its server for
    good (seen with 1.85: the thread of all events waits for its lock).
    """

    def __init__(self) -> None:
        self.serving = False

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Say whether new calls are taken."""
        if request.service not in ("", *_SERVICES):
            context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        status = health_pb2.HealthCheckResponse.ServingStatus
        return health_pb2.HealthCheckResponse(status=status.SERVING if self.serving else status.NOT_SERVING)

    def Watch(self, request: Any, context: grpc.ServicerContext) -> NoReturn:
        """Refuse, as the protocol allows: it would hold a thread for whoever asks."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask with Check")
        raise AssertionError("abort raises")


@dataclass(slots=True)
class _Traffic:
    received_nbytes: int = 0
    sent_nbytes: int = 0

    def received(self, incoming: Any, waiting: Callable[[], Any]) -> Iterator[bytes]:
        """Yield the messages of a client."""
        messages = iter([incoming]) if isinstance(incoming, bytes) else incoming
        while True:
            try:
                with waiting():
                    data = next(messages, None)
            except grpc.RpcError:
                raise StorageError("the client has gone", kind="cancelled", transient=True) from None
            if data is None:
                return
            self.received_nbytes += len(data)
            yield data


class _Shares:
    """How many calls of each principal run; refuses one too many at once, so that others are answered."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, owner: str) -> Iterator[None]:
        with self._lock:
            if self._running[owner] >= _CALLS_OF_ONE:
                raise LimitError("too many calls of yours run at once: try again", kind="too_many_calls")
            self._running[owner] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[owner] -= 1
                if not self._running[owner]:
                    del self._running[owner]


class _Stalls:
    """Ends streams whose clients neither send nor take anything for too long: others wait for their slots."""

    def __init__(self) -> None:
        self._since: dict[grpc.ServicerContext, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="stalls", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def watched(self, context: grpc.ServicerContext) -> "_Watched":
        return _Watched(self, context)

    def _watch(self) -> None:
        while not self._closed.wait(_STALLED_S / 4):
            late = time.monotonic() - _STALLED_S
            with self._lock:
                stalled = [context for context, since in self._since.items() if since < late]
            for context in stalled:
                context.cancel()

    def begin(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            self._since[context] = time.monotonic()

    def end(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            self._since.pop(context, None)


@dataclass(frozen=True, slots=True)
class _Watched:
    """One call: a context manager for its whole life that gives one for each time that its client is waited for."""

    stalls: _Stalls
    context: grpc.ServicerContext

    def __enter__(self) -> "Callable[[], _Waiting]":
        return lambda: _Waiting(self.stalls, self.context)

    def __exit__(self, *exception: object) -> None:
        self.stalls.end(self.context)


@dataclass(frozen=True, slots=True)
class _Waiting:
    stalls: _Stalls
    context: grpc.ServicerContext

    def __enter__(self) -> None:
        self.stalls.begin(self.context)

    def __exit__(self, *exception: object) -> None:
        self.stalls.end(self.context)


def _request(method: Method, messages: Iterator[bytes]) -> tuple[Any, Any]:
    """Return what an rpc is called with, and the message that says what it is about."""
    first = next(messages, b"")
    if method.request is None:
        return chain([first], messages), parse(pb.WriteHeader, first)
    request = parse(method.request, first)
    return request, request


def _resource(message: Any) -> Resource:
    """Return what a message is about."""
    if isinstance(message, pb.BeginRequest):
        return Resource(message.repository, (f"{message.model}@{message.branch}",))
    if isinstance(message, pb.UpdateRefsRequest):
        return Resource(message.repository, tuple(f"{item.model}@{item.name}" for item in message.updates))
    return Resource(getattr(message, "repository", None))


def _about(message: Any) -> str:
    """Return what of a repository a message asks for, for people."""
    if isinstance(message, pb.UpdateRefsRequest):
        return " ".join(f"{item.model}@{item.name}" for item in message.updates)
    names = ("revision", "version", "push", "a", "b", "after")
    return " ".join(str(value) for name in names if (value := getattr(message, name, "")))


def _time_limit(method: Method, context: grpc.ServicerContext) -> float:
    """Return how many seconds a call may take; raises InvalidInputError if its client set no deadline."""
    remaining: float | None = context.time_remaining()
    longest = _LONGEST_STREAM_S if method.streams_requests or method.streams_replies else _LONGEST_S
    if remaining is None or remaining > 10 * _LONGEST_STREAM_S:
        raise InvalidInputError("a call needs a deadline: set one, of two hours at most", kind="no_deadline")
    return min(remaining, longest)


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise StorageError("the call took too long: ask for less", kind="deadline", transient=True)


def _abort(context: grpc.ServicerContext, failure: LamellaError) -> NoReturn:
    trailers: list[tuple[str, str | bytes]] = [(ERROR_TRAILER, encode_error(failure))]
    if isinstance(failure, LimitError) and failure.kind in _PASSING:
        trailers.append((RETRY_TRAILER, str(RETRY_AFTER_MS)))
    context.set_trailing_metadata(tuple(trailers))
    # The text beside the status is for people with other clients; gRPC takes a few KiB of it, and has three bytes for
    # one that is not printable ASCII.
    context.abort(status_of_error(failure), failure.message[:500].encode("ascii", "replace").decode())
    raise AssertionError("abort raises")


def _snake(name: str) -> str:
    """Return the name of the method that answers an rpc: ``Versions.UpdateRefs`` -> ``versions_update_refs``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace(".", "_").lower()


def _reflect(server: grpc.Server) -> None:
    from grpc_reflection.v1alpha import reflection

    reflection.enable_server_reflection([*_SERVICES, reflection.SERVICE_NAME], server)


def _check_listen(listen: str, *, tls: Tls | None, insecure_loopback: bool) -> str:
    """Return the host of an address at which a server may listen; raises InvalidInputError."""
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise InvalidInputError(f"{listen!r} is no address: give HOST:PORT", kind="bad_address")
    if tls is not None and insecure_loopback:
        raise InvalidInputError("give a certificate, or trust the loopback address, not both", kind="bad_option")
    if tls is None and not insecure_loopback:
        raise InvalidInputError(
            "a service needs a certificate and its key; without, give --insecure-loopback and a loopback address",
            kind="no_tls",
        )
    if insecure_loopback and not _is_loopback(host.strip("[]")):
        raise InvalidInputError(
            f"{host} is no loopback address, and others could call without a token: listen at 127.0.0.1",
            kind="not_loopback",
        )
    return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
