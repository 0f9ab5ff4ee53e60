"""One process of the service: gRPC around :class:`~lamella_engine.service.rpcs.Rpcs`.

Every call goes through :meth:`Server._answered`: who calls, within which deadline, whether they may, what came of it.
Nothing else knows of gRPC.
"""

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import grpc

from lamella_engine.errors import InvalidInputError, LamellaError, StorageError
from lamella_engine.executor import DEFAULT_MEMORY_NBYTES, ThreadExecutor
from lamella_engine.objects import open_objects
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service.access import AUDITED, NOBODY, POLICY, Resource, authorize, identified
from lamella_engine.service.admission import Admission, Refusal
from lamella_engine.service.audit import SEGMENT_S, VOUCHED_S
from lamella_engine.service.callers import Callers
from lamella_engine.service.listening import OPTIONS, Health, Tls, check_listen, listen_at, reflect
from lamella_engine.service.quotas import Quotas
from lamella_engine.service.repositories import Repositories
from lamella_engine.service.rpcs import Call, Rpcs
from lamella_engine.service.slots import come_again
from lamella_engine.service.streams import WINDOW_S, Streams
from lamella_engine.service.tokens import Tokens
from lamella_engine.service.verifying import Verifier
from lamella_engine.signing import load_key
from lamella_engine.wire import (
    ERROR_TRAILER,
    METHODS,
    RETRY_AFTER,
    RETRY_TRAILER,
    Method,
    encode_error,
    parse,
)
from lamella_engine.wire import status_of as status_of_error

logger = logging.getLogger("lamella.service")

# A deadline is what ends a call whose client is gone; longer ones are cut.
_LONGEST_S, _LONGEST_STREAM_S = 600.0, 7200.0

_SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())

# How often pushes are looked for that nobody calls for any more, and calls whose clients are too slow.
_SWEEP_S, _PACE_S = 30.0, WINDOW_S / 4


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
    direct
        Whether clients may put packs into the bucket by themselves, for which ``root`` has to be one of S3 or Google
        Cloud Storage. This server decodes them when a version is recorded.
    quotas
        Bounds of what one principal may hold and write; those of ``Quotas()`` unless they are given.
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
        direct: bool = False,
        quotas: Quotas | None = None,
        memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    ) -> None:
        if direct and not root.startswith(("s3://", "gs://")):
            raise InvalidInputError(
                "only into a bucket can clients put anything by themselves: leave out --direct, or give a --root of "
                "s3://...",
                kind="bad_option",
            )
        host = check_listen(listen, tls=tls, insecure_loopback=insecure_loopback)
        self._observe = observe
        self._executor = ThreadExecutor(memory_nbytes=memory_nbytes)
        self._tokens = Tokens(open_objects(root, create=True))
        certified = tls is not None and tls.client_ca is not None
        self._callers = Callers(self._tokens, trusts_loopback=insecure_loopback, certified=certified)
        self._audits = audit
        signer = None if signing_key is None else load_key(signing_key)
        repositories = Repositories(root, self._executor, signer=signer, require_signed=require_signed)
        self._quotas = quotas or Quotas()
        self._verifier = Verifier() if direct else None
        self._rpcs = Rpcs(repositories, self._tokens, self._executor, self._quotas, self._verifier)
        self._streams = Streams()
        self._stopped = threading.Event()
        self._admission = Admission(self._handlers(), self._callers.believed)
        self._grpc = grpc.server(self._admission.calls, (self._admission,), options=OPTIONS)
        self._health = Health(self._grpc, _SERVICES)
        if reflection:
            reflect(self._grpc, _SERVICES)
        self.address = f"{host}:{listen_at(self._grpc, listen, tls)}"
        """Where clients find it."""

    def start(self) -> None:
        """Begin to answer."""
        self._grpc.start()
        for often_s, work in ((_SWEEP_S, self._sweep), (_PACE_S, self._streams.end_silent)):
            threading.Thread(target=self._repeat, args=[often_s, work], daemon=True).start()
        if self._verifier is not None:
            self._verifier.start()
        self._health.serving = True

    def stop(self, grace_s: float = 30.0) -> None:
        """End: take no new calls, let those that run go on for ``grace_s`` seconds, then end them. Idempotent.

        What was acknowledged is recorded; a push that was not can be begun again at another server.
        """
        self._stopped.set()
        self._health.serving = False
        self._grpc.stop(grace_s).wait()
        self._admission.close()
        self._rpcs.keep_audits()
        if self._verifier is not None:
            self._verifier.stop()
        self._executor.close()

    @property
    def pushes(self) -> int:
        """How many pushes are under way."""
        return len(self._rpcs.sessions)

    def verified(self, timeout_s: float = 60.0) -> bool:
        """Return whether, within so long, nothing is left to be decoded that clients have put by themselves."""
        return self._verifier is None or self._verifier.wait(timeout_s)

    def wait(self) -> None:
        """Return when the server has been stopped."""
        self._grpc.wait_for_termination()

    def _repeat(self, often_s: float, work: Callable[[], None]) -> None:
        while not self._stopped.wait(often_s):
            work()

    def _sweep(self) -> None:
        with suppress(LamellaError):
            self._rpcs.sessions.sweep()
        self._rpcs.keep_audits(written_s=SEGMENT_S, vouched_s=VOUCHED_S)

    # -- calls --------------------------------------------------------------------------------------------------------

    def _handlers(self) -> dict[str, tuple[grpc.RpcMethodHandler, Refusal]]:
        """Return what answers each path, and what refuses it.

        An rpc without a row in the policy, or without a method, is a bug.
        """
        if unmatched := set(METHODS) ^ set(POLICY):  # not an assertion, which -O would take away
            raise RuntimeError(f"rpcs without a policy, or policies without an rpc: {sorted(unmatched)}")
        return {method.path: self._handler(method) for method in METHODS.values()}

    def _handler(self, method: Method) -> tuple[grpc.RpcMethodHandler, Refusal]:
        answer = getattr(self._rpcs, _snake(method.name))

        # All take streams: gRPC would have a thread wait for the one message of an rpc before we hear of the call.
        def stream(incoming: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._answered(method, answer, incoming, context)

        def unary(incoming: Any, context: grpc.ServicerContext) -> bytes:
            (reply,) = self._answered(method, answer, incoming, context)
            return reply

        def refuse(incoming: Any, context: grpc.ServicerContext) -> bytes:
            (reply,) = self._answered(method, answer, incoming, context, admitted=False)
            return reply

        if method.streams_replies:
            return grpc.stream_stream_rpc_method_handler(stream), refuse
        return grpc.stream_unary_rpc_method_handler(unary), refuse

    def _answered(
        self,
        method: Method,
        answer: Callable[[Any, Call], Any],
        incoming: Any,
        context: grpc.ServicerContext,
        *,
        admitted: bool = True,
    ) -> Iterator[bytes]:
        """Yield what is sent for one call; every rpc goes through here.

        One that is not ``admitted`` is told who it is not, or to come again.
        """
        began = time.monotonic()
        stream = self._streams.opened(context.cancel)
        principal, repository = NOBODY, ""
        failure: LamellaError | None = None
        try:
            deadline = began + _time_limit(method, context)
            # Before a message has come: a thread would wait for it.
            principal = identified(self._callers.principal(context))
            _check_admitted(admitted)
            call = Call(
                principal,
                context.is_active,
                lambda: deadline - time.monotonic(),
                context.peer(),
                self._stopped.is_set,
            )
            with self._quotas.call(principal.name):
                request, header = _request(method, stream.received(incoming))
                repository = getattr(header, "repository", "")
                authorize(principal, POLICY[method.name], _resource(header))
                if self._audits and method.name in AUDITED:
                    self._rpcs.note(method.name, repository, _about(header), call)
                replies = answer(request, call)
                for reply in replies if method.streams_replies else (replies,):
                    self._callers.check(context, principal)
                    data = reply if isinstance(reply, bytes) else reply.SerializeToString()
                    with stream.sending(len(data)):
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
                    stream.received_nbytes,
                    stream.sent_nbytes,
                )
            )
        if failure is not None:
            _abort(context, failure)


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


def _check_admitted(admitted: bool) -> None:
    if not admitted:
        raise come_again("the server answers as many calls as it can: try again", kind="busy")


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise StorageError("the call took too long: ask for less", kind="deadline", transient=True)


def _abort(context: grpc.ServicerContext, failure: LamellaError) -> NoReturn:
    trailers: list[tuple[str, str | bytes]] = [(ERROR_TRAILER, encode_error(failure))]
    if RETRY_AFTER in failure.context:
        trailers.append((RETRY_TRAILER, str(failure.context[RETRY_AFTER])))
    context.set_trailing_metadata(tuple(trailers))
    # The text beside the status is for people with other clients; gRPC takes a few KiB of it, and has three bytes for
    # one that is not printable ASCII.
    context.abort(status_of_error(failure), failure.message[:500].encode("ascii", "replace").decode())
    raise AssertionError("abort raises")


def _snake(name: str) -> str:
    """Return the name of the method that answers an rpc: ``Versions.UpdateRefs`` -> ``versions_update_refs``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace(".", "_").lower()
