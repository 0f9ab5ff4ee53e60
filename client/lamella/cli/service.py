"""A service for a team: serve, token."""

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import lamella
from lamella.cli import text
from lamella.cli.documents import answer, of_grant
from lamella.cli.parameters import AsJson

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SIZES = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


def serve(
    root: Annotated[str, typer.Option(metavar="ROOT", help="Directory or URL under which the repositories lie.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to answer; port 0 takes a free one.")],
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key, PEM.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Who signs the certificates that clients have to show, PEM.")
    ] = None,
    insecure_loopback: Annotated[
        bool,
        typer.Option(
            "--insecure-loopback", help="No TLS, at a loopback address: whoever reaches it without a token is an admin."
        ),
    ] = False,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where to tell Prometheus of it, over HTTP.")
    ] = None,
    reflection: Annotated[
        bool, typer.Option("--reflection", help="Describe the rpcs to whoever asks (needs grpcio-reflection).")
    ] = False,
    traces: Annotated[
        bool, typer.Option("--traces", help="Make a span of OpenTelemetry for each call (needs opentelemetry-api).")
    ] = False,
    signing_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Key of keygen that signs what is recorded.")
    ] = None,
    require_signed: Annotated[
        bool, typer.Option("--require-signed", help="Have repositories take nothing unsigned any more, for good.")
    ] = False,
    audit: Annotated[
        bool, typer.Option("--audit", help="Note in each repository who read or changed what, from where.")
    ] = False,
    direct: Annotated[
        bool,
        typer.Option(
            "--direct", help="Let clients put packs into the bucket by themselves, by URLs that are good for one each."
        ),
    ] = False,
    max_uncommitted: Annotated[
        str,
        typer.Option(metavar="SIZE", help="What one principal may store in pushes under way, 0 for any: 500GiB, 8TiB."),
    ] = "1TiB",
    max_daily: Annotated[
        str, typer.Option(metavar="SIZE", help="What one principal may write in a day, 0 for any.")
    ] = "0",
    as_json: AsJson = False,
) -> None:
    """Answer clients until a signal ends it, once what runs is done. Logs a line of JSON for each call to stderr."""
    if (tls_cert is None) != (tls_key is None) or (client_ca is not None and tls_cert is None):
        raise lamella.InvalidInputError(
            "a certificate and its key belong together, and --client-ca to them: give --tls-cert and --tls-key",
            kind="usage",
        )
    with _needing("lamella[service]"):
        from lamella_engine.service.listening import Tls
        from lamella_engine.service.logs import log_call, log_to
        from lamella_engine.service.memory import keep_freed_memory
        from lamella_engine.service.quotas import Quotas
        from lamella_engine.service.server import Answered, Server
    keep_freed_memory()
    observers: list[Callable[[Answered], None]] = [log_call]

    def observe(answered: Answered) -> None:
        for observer in observers:
            observer(answered)

    with ExitStack() as stack:
        if traces:
            with _needing("opentelemetry-api"):
                from lamella_engine.service.traces import Traces
            observers.append(Traces().observe)
        if sys.stderr is not None:  # as it is where the caller closed it
            log_to(sys.stderr)
        with _needing("grpcio-reflection"):
            server = Server(
                root,
                listen,
                tls=None if tls_cert is None or tls_key is None else Tls(tls_cert, tls_key, client_ca),
                insecure_loopback=insecure_loopback,
                reflection=reflection,
                observe=observe,
                signing_key=signing_key,
                require_signed=require_signed,
                audit=audit,
                direct=direct,
                quotas=Quotas(uncommitted_nbytes=_nbytes(max_uncommitted), daily_nbytes=_nbytes(max_daily)),
            )
        stack.callback(server.stop, grace_s=0)
        told = None
        if metrics is not None:
            with _needing("lamella[service]"):
                from lamella_engine.service.metrics import Metrics
            told = Metrics(metrics, pushes=lambda: server.pushes)
            stack.callback(told.close)
            observers.append(told.observe)
        stopping = _signals()
        server.start()
        document = {"root": root, "address": server.address, "metrics": None if told is None else told.address}
        answer(document, text.serve, as_json=as_json)
        if sys.stdout is not None:
            sys.stdout.flush()
        stopping.wait()
        for number in _ENDING:  # whoever asks twice does not want to wait
            signal.signal(number, lambda *_: server.stop(grace_s=0))
        server.stop()


_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _signals() -> threading.Event:
    """Return what is set by a signal that asks the process to end: it does, but it is no failure."""
    stopping = threading.Event()
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: stopping.set())
    return stopping


def token(
    context: typer.Context,
    action: Annotated[Literal["create", "list", "revoke"], typer.Argument(metavar="create|list|revoke")],
    id: Annotated[str | None, typer.Argument(metavar="ID", help="Of the token to revoke, as the list has it.")] = None,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="ROOT",
            help="Of the service, on its own machine; by default the service of -C is asked, by an admin.",
        ),
    ] = None,
    principal: Annotated[str | None, typer.Option(metavar="NAME", help="Whom it stands for.")] = None,
    role: Annotated[
        str | None,
        typer.Option(metavar="ROLE", help="reader, writer, maintainer, gc-operator, auditor or admin."),
    ] = None,
    repository: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Repositories that it is for; by default all.")
    ] = None,
    ref: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Where it may push and set refs, such as 'bert@dev-*'; by default anywhere."),
    ] = None,
    ttl: Annotated[str, typer.Option(metavar="TIME", help="How long it lasts: 90s, 15m, 12h, 30d; 0 for ever.")] = "0",
    certificate: Annotated[
        str,
        typer.Option(
            metavar="KIND:NAME",
            help="Of client certificates, which take the place of a secret: dns:HOST, cn:NAME, uri:...",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Make, list and revoke tokens. A new one is printed once and kept nowhere."""
    if (action == "revoke") != (id is not None):
        raise lamella.InvalidInputError("revoke takes the id of a token, the others take none", kind="usage")
    if action == "create" and (principal is None or role is None):
        raise lamella.InvalidInputError("a token stands for somebody: give --principal and --role", kind="usage")
    with _needing("lamella[service]"), _tokens(context.obj, root) as tokens:
        document: dict[str, Any]
        if action == "create":
            globs = {"repositories": repository or ["*"], "refs": ref or ["*"]}
            secret, made = tokens.create(principal, role, **globs, ttl_s=_seconds(ttl), certificate=certificate)
            document = {"secret": secret or None, "token": of_grant(made)}
        elif action == "list":
            document = {"tokens": [of_grant(grant) for grant in tokens.list()]}
        else:
            tokens.revoke(id)
            document = {"revoked": id}
    answer(document, text.token, as_json=as_json)


@contextmanager
def _tokens(url: str, root: str | None) -> Iterator[Any]:
    """Yield what makes tokens: those of a root, or those of the service that ``url`` names."""
    if root is not None:
        from lamella_engine.objects import open_objects
        from lamella_engine.service.tokens import Tokens

        yield Tokens(open_objects(root, create=True))
        return
    if not url.startswith(("grpc://", "grpcs://")):
        raise lamella.InvalidInputError(
            "whose tokens? give --root on the service's machine, or -C grpc://HOST:PORT/NAME", kind="usage"
        )
    from lamella_engine.remote.tokens import RemoteTokens

    with RemoteTokens(url) as tokens:
        yield tokens


def _seconds(text: str) -> int:
    """Return how many seconds a time such as ``30d`` has."""
    found = re.fullmatch(r"(\d{1,9})([smhd]?)", text, re.ASCII)
    if found is None:
        raise lamella.InvalidInputError(f"{text!r} is no time: write 90s, 15m, 12h, 30d or 0", kind="usage")
    return int(found[1]) * _UNITS[found[2] or "s"]


def _nbytes(text: str) -> int:
    """Return how many bytes a size such as ``8TiB`` has."""
    found = re.fullmatch(r"0|(\d{1,9})([KMGT]iB)", text, re.ASCII)
    if found is None:
        raise lamella.InvalidInputError(f"{text!r} is no size: write 500GiB, 8TiB or 0", kind="usage")
    return int(found[1] or 0) << _SIZES.get(found[2], 0)


# Top-level modules of what may not be installed.
_OPTIONAL = ("grpc", "grpc_health", "grpc_reflection", "google", "prometheus_client", "opentelemetry")


@contextmanager
def _needing(distribution: str) -> Iterator[None]:
    """Turn an import that fails for want of a distribution into an error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OPTIONAL:
            raise
        raise lamella.InvalidInputError(
            f"this needs a package that is not installed: pip install '{distribution}'", kind="missing_extra"
        ) from None
