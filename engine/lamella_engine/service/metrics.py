"""What a server counts, for Prometheus: names begin with ``lamella_``."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from lamella_engine.errors import InvalidInputError
from lamella_engine.service.server import Answered

# From an answer out of memory to a push of many minutes.
_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0)


class Metrics:
    """Counts calls, and tells whoever asks over HTTP. Nothing in it names a principal or a repository.

    Parameters
    ----------
    listen
        ``HOST:PORT`` of the HTTP server; port 0 takes a free one.
    pushes
        Counts the pushes under way, whenever somebody wants to know.

    Raises
    ------
    InvalidInputError
        The address is none, or cannot be had.
    """

    def __init__(self, listen: str, *, pushes: Callable[[], int]) -> None:
        host, _, port = listen.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()):
            raise InvalidInputError(f"{listen!r} is no address: give HOST:PORT", kind="bad_address")
        registry = CollectorRegistry()  # not the global one, which a second server in this process would share
        self._calls = Counter("lamella_calls", "Calls that have ended.", ("rpc", "status", "kind"), registry=registry)
        self._seconds = Histogram(
            "lamella_call_seconds", "How long calls took.", ("rpc",), buckets=_SECONDS, registry=registry
        )
        self._received = Counter(
            "lamella_received_bytes", "Bytes of messages from clients.", ("rpc",), registry=registry
        )
        self._sent = Counter("lamella_sent_bytes", "Bytes of messages to clients.", ("rpc",), registry=registry)
        Gauge("lamella_pushes", "Pushes under way.", registry=registry).set_function(pushes)
        try:
            self._http, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except (OSError, OverflowError) as error:
            raise InvalidInputError(f"cannot listen at {listen}: {error}", kind="cannot_listen") from error
        self.address = f"{host}:{self._http.server_port}"
        """Where it is told: ``http://ADDRESS/metrics``."""

    def observe(self, answered: Answered) -> None:
        """Count a call."""
        self._calls.labels(answered.rpc, answered.status, answered.kind).inc()
        self._seconds.labels(answered.rpc).observe(answered.seconds)
        self._received.labels(answered.rpc).inc(answered.received_nbytes)
        self._sent.labels(answered.rpc).inc(answered.sent_nbytes)

    def close(self) -> None:
        """Stop telling."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
