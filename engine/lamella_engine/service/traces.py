"""A span of OpenTelemetry for each call.

Only the API is needed; where spans go is for its SDK to know, as when ``opentelemetry-instrument`` starts the server.
"""

import time

from opentelemetry import trace

from lamella_engine.service.server import Answered


class Traces:
    """Makes a span when a call has ended, with the time at which it began. Nothing in it is secret.

    Parameters
    ----------
    provider
        Where spans go; the process's own if None.
    """

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("lamella.service", tracer_provider=provider)

    def observe(self, answered: Answered) -> None:
        """Make the span of a call."""
        end = time.time_ns()
        service, _, method = answered.rpc.partition(".")
        span = self._tracer.start_span(
            f"lamella.v1.{service}/{method}",
            kind=trace.SpanKind.SERVER,
            start_time=end - int(answered.seconds * 1e9),
            attributes={
                "rpc.system": "grpc",
                "rpc.service": f"lamella.v1.{service}",
                "rpc.method": method,
                "rpc.grpc.status": answered.status,
                "lamella.principal": answered.principal,
                "lamella.repository": answered.repository,
                "lamella.received_nbytes": answered.received_nbytes,
                "lamella.sent_nbytes": answered.sent_nbytes,
            },
        )
        if answered.status != "OK":
            span.set_status(trace.StatusCode.ERROR, answered.kind)
        span.end(end)
