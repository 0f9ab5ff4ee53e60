"""Where a server listens, within which bounds, how it proves who it is, and what any gRPC server says of itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lamella_engine.errors import InvalidInputError
from lamella_engine.hosts import is_loopback
from lamella_engine.wire import CHANNEL_OPTIONS

OPTIONS = (
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
"""Of a server, for gRPC."""


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


def check_listen(listen: str, *, tls: Tls | None, insecure_loopback: bool) -> str:
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
    if insecure_loopback and not is_loopback(host.strip("[]")):
        raise InvalidInputError(
            f"{host} is no loopback address, and others could call without a token: listen at 127.0.0.1",
            kind="not_loopback",
        )
    return host


def listen_at(server: grpc.Server, listen: str, tls: Tls | None) -> int:
    """Have a server listen; return the port. Raises InvalidInputError."""
    try:
        if tls is None:
            return int(server.add_insecure_port(listen))
        return int(server.add_secure_port(listen, tls.credentials()))
    except RuntimeError as error:
        raise InvalidInputError(
            f"cannot listen at {listen}: the port is taken, or the certificate and its key do not fit",
            kind="cannot_listen",
        ) from error


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The standard health service, for probes; anybody may ask.

    Not the servicer that comes with it: many streams of ``Watch`` that are cancelled at once can stop its server for
    good (seen with 1.85: the thread of all events waits for its lock).

    Parameters
    ----------
    server
        Answers it.
    services
        Names of all others that it answers.
    """

    def __init__(self, server: grpc.Server, services: Sequence[str]) -> None:
        self.serving = False
        """Whether new calls are taken."""
        self._services = ("", *services)
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Say whether new calls are taken."""
        if request.service not in self._services:
            context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        status = health_pb2.HealthCheckResponse.ServingStatus
        return health_pb2.HealthCheckResponse(status=status.SERVING if self.serving else status.NOT_SERVING)

    def Watch(self, request: Any, context: grpc.ServicerContext) -> NoReturn:
        """Refuse, as the protocol allows: it would hold a thread for whoever asks."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask with Check")
        raise AssertionError("abort raises")


def reflect(server: grpc.Server, services: Sequence[str]) -> None:
    """Have a server describe services to whoever asks."""
    from grpc_reflection.v1alpha import reflection

    reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server)
