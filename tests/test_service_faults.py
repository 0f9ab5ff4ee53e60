"""No fault between a client and a service, or of the service itself, loses what was acknowledged or doubles it."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import numpy as np
import pytest
import s3
from network import Harm, proxy
from safetensors.numpy import save
from service import Failure, WireClient, prepare_by_wire, serving, take_apart, write_messages
from support import bits, noise

import lamella
from lamella_engine import maintenance, pushing, version_files
from lamella_engine.checkpoints import safetensors
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.state import State
from lamella_engine.errors import ConflictError, InvalidInputError, LamellaError, LimitError
from lamella_engine.format.digests import chunk_id
from lamella_engine.format.version import AttachmentPages, decode_description, encode_description, version_id
from lamella_engine.remote import channel
from lamella_engine.remote.push import WINDOW_NBYTES
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service.server import Answered
from lamella_engine.wire import METHODS, encode_planned

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


def test_a_push_whose_payload_was_changed_on_its_way_may_send_it_again(tmp_path: Path) -> None:
    with serving(tmp_path) as server, WireClient(server.address) as client:
        client.call("Repositories.Create", pb.CreateRequest(repository="r", max_depth=8))
        push = new_push_id()
        client.call("Pushes.Begin", pb.BeginRequest(repository="r", push=push, model="m", branch="main"))
        taken = take_apart({"w": noise(1, 100)}, "m", push)
        cells = [encode_planned(planned) for planned in taken.planned]
        client.call("Pushes.Plan", pb.PlanRequest(repository="r", push=push, cells=cells))
        records = taken.records()
        with pytest.raises(Failure) as error:
            client.call("Pushes.Write", write_messages("r", push, records[:-1] + b"q"))
        assert (error.value.status, error.value.kind) == (grpc.StatusCode.UNAVAILABLE, "changed_on_its_way")
        client.call("Pushes.Write", write_messages("r", push, records))
        commit = pb.CommitRequest(repository="r", push=push, description=taken.description)
        assert client.call("Pushes.Commit", commit).number == 1


def test_what_a_push_only_talks_of_takes_little_memory(tmp_path: Path) -> None:
    """A message may be full of one name of nothing, and a session lives for minutes: many would fill the server."""
    with serving(tmp_path) as server, WireClient(server.address) as client:
        client.call("Repositories.Create", pb.CreateRequest(repository="r", max_depth=8))
        push = new_push_id()
        client.call("Pushes.Begin", pb.BeginRequest(repository="r", push=push, model="m", branch="main"))
        tracemalloc.start()
        try:
            for number in range(32):
                cell = pb.PlannedCell(
                    tensor=f"{number}" + "x" * (1 << 20), chunk=chunk_id(number.to_bytes(2, "little"))
                )
                client.call("Pushes.Plan", pb.PlanRequest(repository="r", push=push, first=number, cells=[cell]))
            gc.collect()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 12 << 20  # the eight that may be companions, and what lies about
        again = client.call("Pushes.Plan", pb.PlanRequest(repository="r", push=push, first=31, cells=[cell]))
        assert again.answers[0].missing


def test_what_came_of_a_write_that_broke_off_is_not_held(tmp_path: Path) -> None:
    """Less than is stored in one go comes from each of many pushes, and then nothing."""
    with serving(tmp_path) as server, WireClient(server.address) as client:
        client.call("Repositories.Create", pb.CreateRequest(repository="r", max_depth=8))
        push = new_push_id()
        client.call("Pushes.Begin", pb.BeginRequest(repository="r", push=push, model="m", branch="main"))
        taken = take_apart({"a": noise(1, 500_000), "b": noise(2, 500_000)}, "m", push)
        cells = [encode_planned(planned) for planned in taken.planned]
        client.call("Pushes.Plan", pb.PlanRequest(repository="r", push=push, cells=cells))
        records = taken.records()

        def half() -> Iterator[bytes]:
            yield from write_messages("r", push, records[: 3 << 20])
            yield b"no position"

        tracemalloc.start()
        try:
            with pytest.raises(Failure):
                client.call("Pushes.Write", half())
            gc.collect()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 1 << 20
        client.call("Pushes.Write", write_messages("r", push, records))
        assert client.call("Pushes.Commit", pb.CommitRequest(repository="r", push=push, description=taken.description))


def test_a_verification_ends_with_its_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that breaks off and comes again would else have the server read everything as often."""
    begun, ended = threading.Event(), threading.Event()
    outlived = []

    def endless(self: maintenance._Checker, state: State) -> Iterator[None]:
        begun.set()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            yield
        outlived.append(state)

    observed: list[Answered] = []

    def observe(answered: Answered) -> None:
        observed.append(answered)
        if answered.rpc == "Jobs.Verify":
            ended.set()

    with serving(tmp_path, observe=observe) as server, WireClient(server.address) as client:
        with lamella.init(f"grpc://{server.address}/r") as repo:
            repo.push(BASE, "m@main")
        monkeypatch.setattr(maintenance._Checker, "packs", endless)
        stream = client.channel.unary_stream(METHODS["Jobs.Verify"].path)
        call = stream(pb.VerifyRequest(repository="r").SerializeToString(), timeout=60)
        assert begun.wait(60)
        call.cancel()
        assert ended.wait(60)
        assert not outlived
        assert observed[-1].kind == "cancelled"


@pytest.mark.parametrize("paths", [["../x"], ["/x"], ["x", "x"], ["x", "x/y"]], ids=" ".join)
def test_files_that_no_checkout_could_write_are_not_recorded(paths: list[str], tmp_path: Path) -> None:
    """Whoever verifies the repository would be told of damage for ever."""
    with serving(tmp_path) as server, WireClient(server.address) as client:
        client.call("Repositories.Create", pb.CreateRequest(repository="r", max_depth=8))
        commit = prepare_by_wire(client, "r", "m@main", {"w": noise(1, 100)}, new_push_id())
        right = decode_description(commit.description, expected=version_id(commit.description))
        (page,) = right.pages
        files = tuple(AttachmentPages(path, "file", ((page.chunk, page.nbytes),)) for path in paths)
        commit.description = encode_description(replace(right, attachments=files))
        with pytest.raises(Failure) as error:
            client.call("Pushes.Commit", commit)
        assert error.value.status is grpc.StatusCode.INVALID_ARGUMENT


def header_of(**tensors: np.ndarray) -> bytes:
    """Return all that comes before the tensors in a safetensors file."""
    data = save(tensors)
    return data[: 8 + int.from_bytes(data[:8], "little")]


W, V = noise(1, 100), noise(2, 50)
WRONG_HEADERS: dict[str, list[tuple[bytes, str]]] = {
    "no header": [(b"nothing of the kind", "")],
    "cut short": [(header_of(w=W, v=V)[:-1], "")],
    "announced as endless": [((1 << 62).to_bytes(8, "little") + b"{}", "")],
    "of another shape": [(header_of(w=W[:50], v=V), "")],
    "of another name": [(header_of(w=W, u=V), "")],
    "of fewer tensors": [(header_of(w=W), "")],
    "of more tensors": [(header_of(w=W, v=V, x=V), "")],
    "of one tensor twice": [(header_of(w=W, v=V), ""), (header_of(v=V), "")],
    "of a prefix that no tensor has": [(header_of(w=W, v=V), "a.")],
}


def push_with_headers(repo: lamella.Repository, headers: list[tuple[bytes, str]], *, times: int = 1) -> lamella.Version:
    """Push two tensors and say that these, each ``times`` over, with a prefix, are headers of safetensors files."""
    real = pushing.Description

    def description(**fields: Any) -> Any:
        attachments = tuple(
            replace(item, role="safetensors_header", prefix=headers[int(item.path)][1], chunks=item.chunks * times)
            for item in fields["attachments"]
        )
        return real(**fields | {"attachments": attachments})

    with patch.object(pushing, "Description", description):
        return repo.push({"w": W, "v": V}, "m@main", files={str(at): data for at, (data, _) in enumerate(headers)})


@pytest.mark.parametrize("wrong", WRONG_HEADERS)
def test_headers_of_files_that_no_checkout_could_write_are_not_recorded(wrong: str, tmp_path: Path) -> None:
    with serving(tmp_path) as server, lamella.init(f"grpc://{server.address}/r") as repo:
        with pytest.raises(InvalidInputError) as error:
            push_with_headers(repo, WRONG_HEADERS[wrong])
        assert error.value.kind == "wrong_description"
        assert repo.models() == []
        version = push_with_headers(repo, [(header_of(v=V), ""), (header_of(w=W), "")])
        assert version.file("1") == save({"w": W})
        assert repo.verify(deep=True).problems == []
    with lamella.init(tmp_path / "here") as repo:  # who can write here can write anything
        push_with_headers(repo, WRONG_HEADERS[wrong])
        assert {problem.kind for problem in repo.verify().problems} == {"bad_attachment"}


def test_a_header_is_read_no_further_than_there_are_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may name a million of them in a version of two."""
    read = []
    real = safetensors._placed_tensor
    monkeypatch.setattr(safetensors, "_placed_tensor", lambda *given: read.append(given) or real(*given))
    header = header_of(**{f"x{number}": V for number in range(1000)})
    with (
        serving(tmp_path) as server,
        lamella.init(f"grpc://{server.address}/r") as repo,
        pytest.raises(InvalidInputError, match="more than 2 entries"),
    ):
        push_with_headers(repo, [(header, "")])
    assert len(read) == 2


def test_headers_that_would_take_long_to_read_are_refused_before_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk is stored once, and named as often as one likes."""
    calls: list[Answered] = []
    monkeypatch.setattr(version_files.SafetensorsLayout, "from_header", None)
    with serving(tmp_path, observe=calls.append) as server, lamella.init(f"grpc://{server.address}/r") as repo:
        with pytest.raises(LimitError) as error:
            push_with_headers(repo, [(bytes(1 << 20), "")] * 3, times=16)
        assert error.value.kind == "headers_limit"
    assert [call.status for call in calls if call.rpc == "Pushes.Commit"] == ["RESOURCE_EXHAUSTED"]


@pytest.mark.parametrize("wrong", ["cell_count", "decoded_nbytes", "parameters_id", "pages"])
def test_a_description_that_does_not_fit_is_refused_and_leaves_nothing(wrong: str, tmp_path: Path) -> None:
    """It is the call that is wrong, not the repository that is damaged; and what was written for it is removed."""
    with serving(tmp_path) as server, WireClient(server.address) as client:
        client.call("Repositories.Create", pb.CreateRequest(repository="r", max_depth=8))
        push = new_push_id()
        commit = prepare_by_wire(client, "r", "m@main", {"w": noise(1, 100)}, push)
        right = decode_description(commit.description, expected=version_id(commit.description))
        (page,) = right.pages
        other = {
            "cell_count": 2,
            "decoded_nbytes": 1 << 60,
            "parameters_id": "0" * 64,
            "pages": (replace(page, nbytes=1 << 50),),
        }
        commit.description = encode_description(replace(right, **{wrong: other[wrong]}))
        with pytest.raises(Failure) as error:
            client.call("Pushes.Commit", commit)
        assert (error.value.status, error.value.kind) == (grpc.StatusCode.INVALID_ARGUMENT, "wrong_description")
        assert list((tmp_path / "r/packs").iterdir())
        client.call("Pushes.Abandon", pb.PushRequest(repository="r", push=push))
        assert not [path for path in (tmp_path / "r/packs").rglob("*") if path.is_file()]
