"""What a service costs beside the embedded engine: pushes, checkouts, small calls, TLS, and a hundred clients at once.

    python -m benchmarks.service [--rounds N] [--clients 100] [--follow-mib 1024] [--folder DIR]

The MiniLM family in float32, in one run on one machine, client and server each a process. Every contender moves the
same checkpoints: the engine embedded; through a service on loopback, in the clear and with TLS; the encoded bytes alone
over a TCP connection; each whole file to an HTTP server, as uploads of files do. In every round each runs once, in
turn; what is shown are medians. Before each round the caches of clients are empty.
"""

import argparse
import http.client
import http.server
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import lamella
from benchmarks import corpora
from benchmarks.corpora import Checkpoint
from benchmarks.memory import rss_anon
from lamella_engine.objects import open_objects
from lamella_engine.service.server import Answered, Server
from lamella_engine.service.tokens import Tokens

ROUNDS = 5
CLIENTS = 100

# What each of many clients pushes: a small model of its own, 4 MiB.
_SMALL_SHAPE = (1024, 1024)
CALLS = 300
"""Small calls, for their percentiles."""

_READ_NBYTES = 1 << 20
_MIB = 1 << 20


@dataclass(frozen=True)
class Service:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    url: str

    def anonymous_nbytes(self) -> int:
        """Return the memory that it holds, without that of files."""
        return rss_anon(self.process.pid)


@contextmanager
def serving(root: Path, *options: str) -> Iterator[Service]:
    """Run ``lamella serve`` on a free port of the loopback address."""
    scheme = "grpc"
    os.environ.pop("LAMELLA_TOKEN", None)
    if options:
        scheme = "grpcs"
        os.environ["LAMELLA_TOKEN"], _ = Tokens(open_objects(str(root))).create("benchmark", "admin")
    command = [sys.executable, "-c", "from lamella.cli import main; main()", "serve", "--root", str(root)]
    command += ["--listen", "127.0.0.1:0", *(options or ["--insecure-loopback"])]
    with (
        (root / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            yield Service(process, f"{scheme}://{process.stdout.readline().split()[-1]}")
        finally:
            process.terminate()


def push(family: Sequence[Checkpoint], url: str) -> None:
    """Push every checkpoint to a new repository, on the branches of the family."""
    with lamella.init(url) as repo:
        numbers: dict[str, int] = {}
        for checkpoint in family:
            parent = None if checkpoint.parent is None else f"minilm@v{numbers[checkpoint.parent]}"
            version = repo.push(checkpoint.path("float32"), f"minilm@{checkpoint.branch}", parent=parent)
            numbers[checkpoint.name] = version.number


def checkout(family: Sequence[Checkpoint], url: str) -> None:
    """Check every version out into torch tensors."""
    with lamella.open(url) as repo:
        for number in range(1, len(family) + 1):
            repo.checkout(f"minilm@v{number}", framework="torch")


def over_tcp(data: Sequence[bytes]) -> None:
    """Send bytes through a connection, to a thread that receives them into one buffer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = threading.Thread(target=_receive, args=[listener])
        receiver.start()
        with socket.create_connection(listener.getsockname()) as connection:
            for part in data:
                connection.sendall(part)
        receiver.join()


def _receive(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    buffer = bytearray(_READ_NBYTES)
    with connection:
        while connection.recv_into(buffer):
            pass


class _Uploads(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path

    def do_PUT(self) -> None:
        """Write what comes to a file, synced."""
        left = int(self.headers["Content-Length"])
        with (self.folder / Path(self.path).name).open("wb") as file:
            while left:
                left -= file.write(self.rfile.read(min(left, _READ_NBYTES)))
            file.flush()
            os.fsync(file.fileno())
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def over_http(family: Sequence[Checkpoint], folder: Path) -> None:
    """Upload every checkpoint as a file."""
    handler = type("Uploads", (_Uploads,), {"folder": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        for checkpoint in family:
            with checkpoint.path("float32").open("rb") as file:
                connection.request("PUT", f"/{checkpoint.name}", file, {"Content-Length": str(_size(checkpoint))})
                connection.getresponse().read()
        connection.close()
        server.shutdown()


def _size(checkpoint: Checkpoint) -> int:
    return checkpoint.path("float32").stat().st_size


def compare(family: Sequence[Checkpoint], *, rounds: int, folder: Path) -> dict[str, float]:
    """Return the median seconds of each contender."""
    seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        os.sync()
        start = time.perf_counter()
        yield
        seconds[name].append(time.perf_counter() - start)

    for _ in range(rounds):
        with TemporaryDirectory(dir=folder) as scratch:
            place = Path(scratch)
            os.environ["XDG_CACHE_HOME"] = str(place / "cache")
            for checkpoint in family:
                checkpoint.path("float32").read_bytes()  # into the page cache
            embedded = str(place / "embedded")
            with timed("push, embedded"):
                push(family, embedded)
            with timed("checkout, embedded"):
                checkout(family, embedded)
            for name, options in (("grpc", ()), ("grpc + TLS", certificate(place))):
                (root := place / name).mkdir()
                with serving(root, *options) as service:
                    url = f"{service.url}/family"
                    with timed(f"push, {name}"):
                        push(family, url)
                    with timed(f"checkout, {name}, warm cache"):
                        checkout(family, url)
                    shutil.rmtree(place / "cache", ignore_errors=True)
                    with timed(f"checkout, {name}"):
                        checkout(family, url)
                    with timed(f"checkout, {name}, again"):
                        checkout(family, url)
            packs = [path.read_bytes() for path in Path(embedded, "packs").iterdir()]
            with timed("encoded bytes over TCP"):
                over_tcp(packs)
            (uploads := place / "uploads").mkdir()
            with timed("whole files over HTTP"):
                over_http(family, uploads)
    return {name: statistics.median(values) for name, values in seconds.items()}


def certificate(folder: Path) -> tuple[str, ...]:
    """Make a certificate for the loopback address that this process believes; return the options of a server."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1,DNS:localhost -keyout {key} -out {cert}".split(),
        check=True,
        capture_output=True,
    )
    os.environ["LAMELLA_CA"] = str(cert)
    return ("--tls-cert", str(cert), "--tls-key", str(key))


@dataclass(frozen=True, slots=True)
class Crowd:
    """Many clients at once."""

    seconds: list[float]
    """Of each, from its start to the end of its checkout."""
    peak_nbytes: int
    """Anonymous memory of the server."""
    failures: list[str]


def crowd(clients: int, folder: Path) -> Crowd:
    """Let clients push a model each and check it out, all at once, each in a thread with a connection of its own."""
    seconds: list[float] = []
    failures: list[str] = []
    peak = 0
    done = threading.Event()
    (root := folder / "crowd").mkdir()
    with serving(root) as service:
        with lamella.init(f"{service.url}/crowd"):
            pass

        def work(number: int) -> None:
            start = time.perf_counter()
            try:
                tensor = np.random.default_rng(number).standard_normal(_SMALL_SHAPE, np.float32)
                with lamella.open(f"{service.url}/crowd") as repo:
                    repo.push({"w": tensor}, f"model-{number}@main")
                    found = repo.checkout(f"model-{number}@main", framework="numpy")
                if found["w"].tobytes() != tensor.tobytes():
                    failures.append(f"client {number} got other bytes")
            except lamella.LamellaError as error:
                failures.append(f"client {number}: {error}")
            seconds.append(time.perf_counter() - start)

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, service.anonymous_nbytes())

        threads = [threading.Thread(target=work, args=[number]) for number in range(clients)]
        watcher = threading.Thread(target=watch)
        for thread in (watcher, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        watcher.join()
    return Crowd(seconds, peak, failures)


def small_calls(calls: int, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of many resolves, and of many reads of a branch's log of ten versions."""
    (root := folder / "small").mkdir()
    found: dict[str, list[float]] = defaultdict(list)
    with serving(root) as service, lamella.init(f"{service.url}/small") as repo:
        for number in range(10):
            repo.push({"w": np.full(100, number, np.float32)}, "m@main")
        for _ in range(calls):
            start = time.perf_counter()
            repo.version("m@main")
            found["resolve"].append(time.perf_counter() - start)
            start = time.perf_counter()
            list(repo.log("m@main"))
            found["log of 10 versions"].append(time.perf_counter() - start)
    return found


@dataclass(frozen=True, slots=True)
class Followed:
    """A step that reached a follower."""

    decoded_nbytes: int
    """Of the model."""
    changed: float
    """Share of its values that the step changed."""
    received_nbytes: int
    """All that the follower was sent, messages without the headers of HTTP."""
    seconds: float
    """From the version's being published to its standing in the follower's tensors."""


def follow(nbytes: int, folder: Path) -> Followed:
    """Let a follower that holds a bfloat16 model receive a step that moves one value in a hundred by one ulp.

    The model is random numbers of weights' sizes, not trained: a real model of a gigabyte is not to be had here.
    """
    sent = 0

    def count(answered: Answered) -> None:
        nonlocal sent
        sent += answered.sent_nbytes

    random = np.random.default_rng(0)
    shape = (nbytes // 2 // 4096 // 8, 4096)
    first = {
        f"layer.{at}": (random.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16) for at in range(8)
    }
    then = {}
    for name, tensor in first.items():
        bits = tensor.view(np.uint16).copy()
        where = random.random(shape, np.float32) < 0.01
        bits[where] += random.choice(np.array([1, 0xFFFF], np.uint16), int(where.sum()))
        then[name] = bits.view(ml_dtypes.bfloat16)
    changed = sum(int((then[name].view(np.uint16) != first[name].view(np.uint16)).sum()) for name in first)
    server = Server(str(folder / "follow"), "127.0.0.1:0", insecure_loopback=True, observe=count)
    server.start()
    url = f"grpc://{server.address}/follow"
    with lamella.init(url) as trainer, lamella.open(url) as follower:
        trainer.push(first, "policy@main")
        held = {name: np.empty_like(tensor) for name, tensor in first.items()}
        follower.checkout("policy@v1", into=held)
        trainer.push(then, "policy@main")
        sent = 0
        start = time.perf_counter()
        version = next(follower.watch("policy@main", after="policy@v1"))
        follower.checkout(f"policy@v{version.number}", into=held, have="policy@v1")
        seconds = time.perf_counter() - start
        assert all(held[name].tobytes() == then[name].tobytes() for name in then)
    server.stop(0)
    total = sum(tensor.nbytes for tensor in first.values())
    return Followed(total, changed / (total / 2), sent, seconds)


def tables(seconds: dict[str, float], decoded_nbytes: int) -> Table:
    """Return what a reader wants to see of a comparison: throughput of decoded bytes, and the share of the embedded."""
    result = Table("", title="the MiniLM family, float32", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("seconds", "MiB/s", "of embedded"):
        result.add_column(heading, justify="right")
    for name, value in seconds.items():
        verb = name.partition(",")[0]
        base = seconds.get(f"{verb}, embedded", seconds["push, embedded"])
        result.add_row(name, f"{value:.3f}", f"{decoded_nbytes / _MIB / value:,.0f}", f"{base / value:.2f}")
    return result


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--follow-mib", type=int, default=1024, help="size of the model that is followed")
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="where to write; its disk is measured")
    options = parser.parse_args()
    console = Console()
    family = corpora.minilm_family(report=console.print)
    options.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.folder) as scratch:
        seconds = compare(family, rounds=options.rounds, folder=Path(scratch))
        console.print(tables(seconds, sum(map(_size, family))))
        for name, values in small_calls(CALLS, Path(scratch)).items():
            cuts = statistics.quantiles(values, n=100)
            console.print(f"{name}: p50 {cuts[49] * 1e3:.2f} ms, p99 {cuts[98] * 1e3:.2f} ms")
        step = follow(options.follow_mib * _MIB, Path(scratch))
        console.print(
            f"a step that changes {step.changed:.2%} of a bfloat16 model of {step.decoded_nbytes / _MIB:,.0f} MiB "
            f"reached a follower in {step.seconds:.2f} s with {step.received_nbytes / step.decoded_nbytes:.2%} of its "
            "bytes"
        )
        found = crowd(options.clients, Path(scratch))
        console.print(
            f"{options.clients} clients at once: {len(found.failures)} failed, the server held "
            f"{found.peak_nbytes / _MIB:.0f} MiB at most; "
            f"a client took {min(found.seconds):.1f} to {max(found.seconds):.1f} s"
        )
        for failure in found.failures[:10]:
            console.print(failure)


if __name__ == "__main__":
    main()
