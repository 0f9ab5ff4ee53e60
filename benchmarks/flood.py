"""What a well-behaved client of a service notices of a flood: its latencies in quiet and in flooded spells, by turns.

    python -m benchmarks.flood [--seconds 3600] [--spell 5] [--floods NAME ...] [--rate 500] [--folder DIR]

The service, whoever floods it and the client that is measured are a process each, on one machine. Whoever floods is of
the lowest priority, for on a machine of its own it would take no core from the service, and makes at most --rate
attempts a second; 0 lets it make as many as it can. The client resolves a branch, pushes a small model and checks it
out, one after another. In each round every flood has its turn: a quiet spell, then a flooded one; the first second of
each does not count. What is asked for is that p99 of what the client does stays below twice of what it is in quiet.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import lamella
from benchmarks import corpora
from benchmarks.service import serving
from lamella_engine.objects import open_objects
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service.tokens import PREFIX, Tokens
from lamella_engine.wire import MAX_MESSAGE_NBYTES, METHODS

SECONDS = 3600.0
SPELL_S = 5.0
RATE = 500.0
"""Attempts of a flood in a second."""

WARM_UP_S = 1.0
"""Of each spell, in which a flood begins, or what it left ends."""

MOST = 2.0
"""The ratio of p99 that is asked for."""

# Calls that whoever floods has under way at a time, on each of its connections: what a server allows on one.
_AT_ONCE, _CONNECTIONS = 100, 4

# Open connections that say nothing more.
_SILENT = 200

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
_PING = b"\x00\x00\x08\x06\x00" + bytes(4) + bytes(8)

# -- floods ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Flood:
    """What a flood is told, and what it says of itself."""

    address: str
    token: str
    """Of a reader, who is somebody; others are refused as nobody."""
    rate: float
    """Most attempts a second; 0 for as many as it can."""
    over: threading.Event = field(default_factory=threading.Event)
    attempts: int = 0
    began: float = field(default_factory=time.monotonic)

    def on(self) -> bool:
        """Count an attempt when it is time for it; whether there is to be one."""
        if self.rate:
            ahead_s = self.began + self.attempts / self.rate - time.monotonic()
            if ahead_s > 0:
                self.over.wait(ahead_s)
        self.attempts += 1
        return not self.over.is_set()

    def channels(self) -> list[grpc.Channel]:
        """Connect, several times."""
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))
        return [grpc.insecure_channel(self.address, options) for _ in range(_CONNECTIONS)]

    def connect(self) -> socket.socket:
        """Connect without gRPC."""
        host, port = self.address.rsplit(":", 1)
        return socket.create_connection((host, int(port)), timeout=10.0)


def calls(flood: Flood, kinds: Sequence[Callable[[grpc.Channel], grpc.Future]]) -> None:
    """Make calls of some kinds by turns, as many at a time as are allowed."""
    free = threading.Semaphore(_AT_ONCE * _CONNECTIONS)
    channels = flood.channels()
    for number in count():
        if not flood.on():
            break
        free.acquire()
        kinds[number % len(kinds)](channels[number % len(channels)]).add_done_callback(lambda call: free.release())
    for channel in channels:
        channel.close()


def _call(rpc: str, message: bytes, **options: object) -> Callable[[grpc.Channel], grpc.Future]:
    return lambda channel: channel.unary_unary(METHODS[rpc].path).future(message, **{"timeout": 10.0, **options})


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


_TEAM = pb.RepositoryRequest(repository="team").SerializeToString()
_NONE = pb.RepositoryRequest(repository="none").SerializeToString()


def of_nobody(flood: Flood) -> None:
    """Calls with a token that is none, with one in the wrong place, and with one of another scheme."""
    somebody = flood.token
    calls(
        flood,
        [
            _call("Versions.Models", _TEAM, metadata=_bearer("lml_" + "0" * 48)),
            _call("Versions.Models", _TEAM, metadata=(*_bearer(somebody), *_bearer(somebody))),
            _call("Versions.Models", _TEAM, metadata=(("authorization", f"Basic {somebody}"),)),
        ],
    )


def made_up(flood: Flood) -> None:
    """Calls with tokens that are as tokens are, and that nobody was given: each has to be looked up."""
    numbers = count(time.monotonic_ns())

    def ask(channel: grpc.Channel) -> grpc.Future:
        body = f"{PREFIX}{next(numbers):040x}"
        metadata = _bearer(f"{body}{zlib.crc32(body.encode()):08x}")
        return _call("Versions.Models", _TEAM, metadata=metadata)(channel)

    calls(flood, [ask])


def refused(flood: Flood) -> None:
    """Calls of somebody that are refused: no message, nothing that is there, no deadline, compressed, no such rpc."""
    somebody = _bearer(flood.token)
    gzip = grpc.Compression.Gzip
    bomb = pb.RepositoryRequest(repository="x" * 1_000_000).SerializeToString()
    calls(
        flood,
        [
            _call("Versions.Models", b"\xff" * 100, metadata=somebody),
            _call("Versions.Models", _NONE, metadata=somebody),
            _call("Versions.Models", _TEAM, metadata=somebody, timeout=None),
            _call("Pushes.Begin", pb.BeginRequest(repository="team").SerializeToString(), metadata=somebody),
            _call("Versions.Models", bomb, metadata=somebody, compression=gzip),
            lambda channel: channel.unary_unary("/lamella.v1.Versions/Delete").future(b"", timeout=10.0),
            _call("Versions.Models", b"", metadata=(*somebody, ("x-long", "x" * (64 << 10)))),
        ],
    )


def too_long(flood: Flood) -> None:
    """Messages that are longer than allowed by a byte."""
    calls(flood, [_call("Versions.Models", bytes(MAX_MESSAGE_NBYTES + (64 << 10) + 1), metadata=_bearer(flood.token))])


def resets(flood: Flood) -> None:
    """Calls that are cancelled as soon as they have been made."""
    ask = _call("Versions.Models", _TEAM, metadata=_bearer(flood.token))

    def cancelled(channel: grpc.Channel) -> grpc.Future:
        call = ask(channel)
        call.cancel()
        return call

    calls(flood, [cancelled])


def streams(flood: Flood) -> None:
    """Streams without number that say nothing, of somebody and of nobody."""
    ways = [_bearer(flood.token), _bearer("lml_wrong")]

    def silent() -> Iterator[bytes]:
        flood.over.wait()
        yield from ()

    free = threading.Semaphore(_AT_ONCE * _CONNECTIONS)
    channels = flood.channels()
    for number in count():
        if not flood.on():
            break
        while not free.acquire(timeout=0.1) and not flood.over.is_set():
            pass
        write = channels[number % len(channels)].stream_stream(METHODS["Pushes.Write"].path)
        call = write(silent(), timeout=30.0, metadata=ways[number % len(ways)])
        call.add_done_callback(lambda call: free.release())
    for channel in channels:
        channel.close()


def connections(flood: Flood) -> None:
    """Connections that begin HTTP/2 or TLS, send a byte now and then, or nonsense, and are begun anew when they end."""
    sent = (_PREFACE, b"\x16\x03\x01\x02\x00", b"", _PREFACE + b"\xff" * 1000, b"GET / HTTP/1.1\r\n\r\n")
    held: list[socket.socket] = []
    while flood.on():
        with suppress(OSError):
            connection = flood.connect()
            connection.sendall(sent[flood.attempts % len(sent)])
            held.append(connection)
        if len(held) > _SILENT:
            held.pop(0).close()
    for connection in held:
        connection.close()


def pings(flood: Flood) -> None:
    """Pings of HTTP/2 as fast as a connection takes them, and another connection when it is closed."""
    while flood.on():
        with suppress(OSError), flood.connect() as connection:
            connection.sendall(_PREFACE)
            while flood.on():
                connection.sendall(_PING * 10)


FLOODS = {
    flood.__name__: flood for flood in (of_nobody, made_up, refused, too_long, resets, streams, connections, pings)
}
"""What comes over a service, each as long as it is told to."""


def _flooding(orders: Connection, address: str, token: str, rate: float) -> None:
    """Flood, in a process of its own, when and as it is told to; answer with the number of attempts."""
    os.nice(19)
    while (name := orders.recv()) is not None:
        flood = Flood(address, token, rate)
        thread = threading.Thread(target=FLOODS[name], args=[flood])
        thread.start()
        orders.recv()
        flood.over.set()
        thread.join()
        orders.send(flood.attempts)


# -- the client --------------------------------------------------------------------------------------------------------


def behave(url: str) -> Iterator[tuple[str, float]]:
    """Do what people do, one thing after another; yield what it was, and the seconds that it took."""
    weights = {f"layer.{number}": np.zeros((128, 128), np.float32) for number in range(4)}
    with lamella.open(url) as repo:

        def push() -> None:
            weights["layer.0"] += 1
            repo.push(weights, "small@main")

        def resolve() -> None:
            repo.version("small@main")

        def checkout() -> None:
            repo.checkout("small@main", framework="numpy")

        push()
        while True:
            for do in (*[resolve] * 20, push, checkout):
                began = time.perf_counter()
                do()
                yield do.__name__, time.perf_counter() - began


@dataclass(slots=True)
class Seconds:
    """How long one thing took, in quiet and while something came over the service."""

    quiet: list[float] = field(default_factory=list)
    flooded: list[float] = field(default_factory=list)

    def percentiles(self, percent: int) -> tuple[float, float]:
        """Return a percentile of both, in seconds."""
        return _percentile(self.quiet, percent), _percentile(self.flooded, percent)


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else float("nan")


@dataclass(slots=True)
class Told:
    """What was measured."""

    seconds: dict[tuple[str, str], Seconds] = field(default_factory=lambda: defaultdict(Seconds))
    """By flood, and what the client did."""
    attempts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Of each flood."""
    flooded_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By how much more CPU the server took in flooded spells than in quiet ones."""


def measure(folder: Path, *, seconds: float, spell_s: float, floods: Sequence[str], rate: float) -> Told:
    """Return what a client notices of some floods, each of which has its turn at least once."""
    told = Told()
    root = folder / "flooded"
    root.mkdir()
    tokens = Tokens(open_objects(str(root)))
    good, _ = tokens.create("good", "admin")
    bad, _ = tokens.create("bad", "reader")
    with serving(root) as service:
        os.environ["LAMELLA_TOKEN"] = good
        url = f"{service.url}/team"
        with lamella.init(url):
            pass
        spawn = multiprocessing.get_context("spawn")
        orders, theirs = spawn.Pipe()
        address = service.url.partition("://")[2]
        flooder = spawn.Process(target=_flooding, args=[theirs, address, bad, rate], daemon=True)
        flooder.start()
        done = behave(url)

        def spell() -> Iterator[tuple[str, float]]:
            began = time.monotonic()
            while time.monotonic() < began + WARM_UP_S:
                next(done)
            while time.monotonic() < began + WARM_UP_S + spell_s:
                yield next(done)

        end = time.monotonic() + seconds
        for turn in count():
            name = floods[turn % len(floods)]
            if turn >= len(floods) and time.monotonic() > end:
                break
            cpu_s = [_cpu_s(service.process.pid)]
            for did, took in spell():
                told.seconds[name, did].quiet.append(took)
            cpu_s.append(_cpu_s(service.process.pid))
            orders.send(name)
            began = time.monotonic()
            for did, took in spell():
                told.seconds[name, did].flooded.append(took)
            cpu_s.append(_cpu_s(service.process.pid))
            told.flooded_s[name] += time.monotonic() - began
            orders.send("enough")
            told.attempts[name] += orders.recv()
            told.cpu_s[name] += cpu_s[2] - 2 * cpu_s[1] + cpu_s[0]
        orders.send(None)
        flooder.join()
    os.environ.pop("LAMELLA_TOKEN")
    return told


def _cpu_s(pid: int) -> float:
    """Return the seconds of CPU that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def table(told: Told) -> Table:
    """Return what a reader wants to see."""
    result = Table("flood", box=SIMPLE_HEAD)
    for heading in (
        "a second",
        "server's CPU, ms each",
        "what",
        "times",
        "p50 quiet, ms",
        "flooded",
        "ratio",
        "p99 quiet, ms",
        "flooded",
        "ratio",
    ):
        result.add_column(heading, justify="right")
    for (flood, did), seconds in told.seconds.items():
        cells = []
        for percent in (50, 99):
            quiet, flooded = seconds.percentiles(percent)
            cells += [f"{quiet * 1e3:.1f}", f"{flooded * 1e3:.1f}", f"{flooded / quiet:.2f}"]
        a_second = f"{told.attempts[flood] / told.flooded_s[flood]:,.0f}"
        cpu_ms = f"{told.cpu_s[flood] / told.attempts[flood] * 1e3:.2f}"
        result.add_row(flood, a_second, cpu_ms, did, str(len(seconds.flooded)), *cells)
    return result


def main() -> None:
    """Run it and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long in all, about")
    parser.add_argument("--spell", type=float, default=SPELL_S, help="seconds of a spell")
    parser.add_argument("--floods", nargs="+", choices=FLOODS, default=list(FLOODS), help="which; all unless given")
    parser.add_argument("--rate", type=float, default=RATE, help="most attempts a second; 0 for as many as it can")
    parser.add_argument("--folder", type=Path, default=corpora.DATA, help="where to write")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.folder) as scratch:
        told = measure(
            Path(scratch), seconds=options.seconds, spell_s=options.spell, floods=options.floods, rate=options.rate
        )
    console = Console(width=140)
    console.print(table(told))
    worst = max(flooded / quiet for quiet, flooded in (one.percentiles(99) for one in told.seconds.values()))
    console.print(f"p99 grew by a factor of {worst:.2f} at most; below {MOST:.0f} is asked for")


if __name__ == "__main__":
    main()
