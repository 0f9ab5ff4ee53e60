"""No fault between a client and a service, or of the service itself, loses what was acknowledged or doubles it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import s3
from network import Harm, proxy
from service import serving
from support import bits, noise

import lamella
from lamella_engine.errors import ConflictError, LamellaError
from lamella_engine.remote import channel
from lamella_engine.remote.push import WINDOW_NBYTES

BASE = {"embedding": noise(1, 600, 900), "norm": noise(2, 64), "scalar": np.float64(2.5)}
NEXT = {**BASE, "embedding": BASE["embedding"] + np.float32(1e-3), "new": noise(3, 300, 700)}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Try again at once; know nothing from before."""
    monkeypatch.setattr(channel, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(channel, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Once:
    """Does harm to message ``number`` of those that go through a proxy, and to no other."""

    def __init__(self, number: int, harm: Harm) -> None:
        self.number = number
        self.harm = harm
        self.done = ""

    def __call__(self, number: int, rpc: str, way: str) -> Harm:
        if number != self.number:
            return Harm.NONE
        self.done = f"{rpc} {way}"
        return self.harm


@pytest.mark.parametrize("harm", [Harm.CUT, Harm.REPEAT], ids=lambda harm: harm.name.lower())
def test_a_push_whose_any_message_is_lost_or_repeated_is_recorded_once(harm: Harm, tmp_path: Path) -> None:
    with serving(tmp_path / "root") as server:
        for number in count():
            fault = Once(number, harm)
            name = f"r{number}"
            with proxy(server.address, fault) as between:
                url = f"grpc://{between.address}/{name}"
                with lamella.init(f"grpc://{server.address}/{name}") as direct, lamella.open(url) as far:
                    direct.push(BASE, "m@main")
                    if number == 0:
                        fault.number = len(between.messages)  # opening is another test's
                    version = far.push(NEXT, "m@main", message="next")
                    assert version.number == 2, fault.done
                    assert [one.number for one in direct.log("m@main")] == [2, 1], fault.done
                    assert bits(direct.checkout("m@main")) == bits(NEXT), fault.done
            if not fault.done and number:
                break
        assert number > 10


def test_a_push_that_is_cut_sends_little_again(tmp_path: Path) -> None:
    tensors = {f"w{number}": noise(number, 1024, 1024) for number in range(12)}
    with serving(tmp_path / "root") as server:
        sent = []
        for cut in (False, True):
            waiting = [cut]

            def treat(number: int, rpc: str, way: str, waiting: list[bool] = waiting) -> Harm:
                if rpc == "Pushes.Write" and way == "up" and number > 40 and waiting[0]:
                    waiting[0] = False
                    return Harm.CUT
                return Harm.NONE

            with proxy(server.address, treat) as between, lamella.init(f"grpc://{between.address}/r{cut:d}") as repo:
                repo.push(tensors, "m@main")
                assert bits(repo.checkout("m@main")) == bits(tensors)
                assert not waiting[0]
                sent.append(between.sent_nbytes)
        assert sent[1] - sent[0] <= WINDOW_NBYTES + (1 << 20)  # whatever the push's size


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_two_servers_over_one_root_serve_the_same_repositories(
    place: str, tmp_path: Path, request: pytest.FixtureRequest, use: Callable[[s3.Server], None]
) -> None:
    root = str(tmp_path / "root")
    if place == "bucket":
        use(request.getfixturevalue("seaweedfs"))
        root = s3.new_url()
    with (
        serving(root) as one,
        serving(root) as other,
        lamella.init(f"grpc://{one.address}/team") as first,
        lamella.open(f"grpc://{other.address}/team") as second,
    ):
        repos = [first, second]
        for number in range(4):
            pushed = repos[number % 2].push({"w": noise(number, 500)}, "m@main")
            assert repos[(number + 1) % 2].version("m@main").id == pushed.id
        with pytest.raises(ConflictError):
            second.push({"w": noise(9, 500)}, "m@main", parent="m@v1")
        barrier = threading.Barrier(2)
        outcomes: list[str] = []

        def race(repo: lamella.Repository, seed: int) -> None:
            barrier.wait()
            for turn in range(3):
                repo.push({"w": noise(seed + turn, 500)}, f"m@branch-{seed}")
                outcomes.append("pushed")

        threads = [threading.Thread(target=race, args=(repo, 100 * at)) for at, repo in enumerate(repos, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes == ["pushed"] * 6
        assert first.stats().versions == second.stats().versions == 10
        assert first.verify(deep=True).problems == second.verify(deep=True).problems == []


def test_a_push_begun_at_one_server_is_finished_at_another(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as one, serving(tmp_path / "root") as other:
        with lamella.init(f"grpc://{one.address}/team"):
            pass
        targets = [one.address, other.address]
        with proxy(targets[0]) as between, lamella.open(f"grpc://{between.address}/team") as repo:

            def move(number: int, rpc: str, way: str) -> Harm:
                if rpc == "Pushes.Commit" and way == "up" and between.target == targets[0]:
                    between.turn_to(targets[1])
                    return Harm.CUT
                return Harm.NONE

            between.treat = move
            version = repo.push(BASE, "m@main")
            assert between.target == targets[1]
        with lamella.open(f"grpc://{other.address}/team") as repo:
            assert [one.id for one in repo.log("m@main")] == [version.id]
            assert bits(repo.checkout("m@main")) == bits(BASE)
            assert repo.verify(deep=True).problems == []


SERVE = """
import sys
from lamella_engine.service.server import Server
server = Server(sys.argv[1], sys.argv[2], insecure_loopback=True)
server.start()
print(server.address, flush=True)
server.wait()
"""


@contextlib.contextmanager
def process(root: Path, listen: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Run a server in a process of its own."""
    running = subprocess.Popen([sys.executable, "-c", SERVE, str(root), listen], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        yield running, running.stdout.readline().strip()
    finally:
        running.kill()
        running.communicate()


KILLS = int(os.environ.get("LAMELLA_KILLS", "30"))
"""How often a server is killed; a campaign takes more."""


def load(address: str, seed: int, acknowledged: list[tuple[str, str]], enough: threading.Semaphore) -> None:
    """Push to a branch of one's own until the server is gone."""
    with contextlib.suppress(LamellaError), lamella.open(f"grpc://{address}/team") as repo:
        for number in count():
            pushed = repo.push({"w": noise(1000 * seed + number, 300, 200)}, f"m@b{seed}")
            acknowledged.append((f"m@b{seed}", pushed.id))
            enough.release()


def test_a_server_that_is_killed_under_load_has_lost_no_push_that_it_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "PATIENCE_S", 0.0)  # nobody comes back at that address
    root = tmp_path / "root"
    acknowledged: list[tuple[str, str]] = []
    random = np.random.default_rng(7)
    with process(root, "127.0.0.1:0") as (running, address):
        with lamella.init(f"grpc://{address}/team"):
            pass
        running.send_signal(signal.SIGKILL)
    for turn in range(KILLS):
        with process(root, "127.0.0.1:0") as (running, address):
            # Killed when so many have been acknowledged by threads that go on: at another point of a push each time.
            enough = threading.Semaphore(0)
            threads = [
                threading.Thread(target=load, args=(address, 10 * turn + at, acknowledged, enough)) for at in range(2)
            ]
            for thread in threads:
                thread.start()
            for _ in range(int(random.integers(1, 6))):
                enough.acquire()
            running.send_signal(signal.SIGKILL)
            running.wait()
            for thread in threads:
                thread.join()
    with lamella.open(root / "team") as repo:
        for branch, id in acknowledged:
            assert id in {version.id for version in repo.log(branch)}
        assert repo.verify(deep=True).problems == []
    assert len(acknowledged) >= KILLS
