"""Clients of a service put packs straight into its bucket; nobody else stands on them until they have been decoded."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import s3
from remote import proxied
from service import Failure, WireClient, serving, take_apart, write_messages
from support import Array, bits, noise, store_of
from workers import push_shared, split

import lamella
from lamella_engine import codecs, maintenance
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.incoming import AHEAD, PUT_S, IncomingPacks, sweep
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.content_store.packing import Described, described
from lamella_engine.content_store.seam import COMPANION_REACH, Blob, Planned
from lamella_engine.errors import CorruptionError, InvalidInputError, OutcomeUnknownError
from lamella_engine.format.digests import blob_digest, chunk_id
from lamella_engine.maintenance import Verification, verifying
from lamella_engine.model import Cell
from lamella_engine.remote import direct
from lamella_engine.repository import Repository
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service import sessions
from lamella_engine.service.server import Server
from lamella_engine.service.verifying import Verifier
from lamella_engine.wire import encode_header, encode_planned, encode_record

Use = Callable[[s3.Server], None]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have packs that are soon full, and no push that is too small to go its own way."""
    monkeypatch.setattr(direct, "PACK_NBYTES", 1 << 19)
    monkeypatch.setattr(direct, "WORTH_NBYTES", 0)


@pytest.fixture
def root(seaweedfs: s3.Server, use: Use) -> str:
    use(seaweedfs)
    return s3.new_url()


@pytest.fixture
def server(root: str) -> Iterator[Server]:
    with serving(root, direct=True) as found:
        yield found


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a service whose verifier does nothing."""
    monkeypatch.setattr(Verifier, "start", lambda self: None)


def weights() -> dict[str, Array]:
    """Return some 5 MiB that do not compress, an Adam state, which has companions, and what stands in its row."""
    state = {"layer.weight": noise(1, 600, 500)}
    state["state.layer.weight.exp_avg"] = noise(2, 600, 500) * np.float32(1e-3)
    state["state.layer.weight.exp_avg_sq"] = noise(3, 600, 500) ** 2 * np.float32(1e-6)
    return state | {f"more.{at}": noise(10 + at, 300, 300) for at in range(4)} | {"short": np.arange(3.0)}


def doubts(root: str, *, name: str = "team") -> list[bool]:
    """Return, for each live pack, whether nobody but its writer has decoded it."""
    repo = lamella.open(f"{root}/{name}")
    return [pack.verifier == "writer" for pack in store_of(repo).log.refresh().packs()]


def incoming(root: str) -> list[str]:
    repo = lamella.open(f"{root}/team")
    return [info.name for info in store_of(repo).objects.list("incoming/")]


def stored_nbytes(root: str) -> int:
    return lamella.open(f"{root}/team").stats().stored_nbytes


@contextmanager
def puts_are(monkeypatch: pytest.MonkeyPatch, put: Callable[[str, Sequence[bytes]], None]) -> Iterator[None]:
    """Have ``put`` do in this block what is done with a pack and its URL."""
    with monkeypatch.context() as patch:
        patch.setattr(direct, "_send", lambda url, parts, md5, **_: put(url, [bytes(part) for part in parts]))
        yield


def urls_of_a_push(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Push ``weights`` to m@main; return where each pack was put."""
    urls: list[str] = []

    def put(url: str, parts: Sequence[bytes]) -> None:
        urls.append(url)
        really_put(url, b"".join(parts))

    with puts_are(monkeypatch, put):
        repo.push(weights(), "m@main")
    return urls


def really_put(url: str, data: bytes) -> None:
    with urlopen(Request(url, data, method="PUT"), timeout=60) as answer:
        assert answer.status == 200


# -- the way -----------------------------------------------------------------------------------------------------------


def test_blobs_go_into_the_bucket_and_not_through_the_service(root: str, server: Server) -> None:
    tensors = weights()
    with proxied(server.address) as proxy:
        repo = lamella.init(f"grpc://{proxy.address}/team")
        version = repo.push(tensors, "m@main")
        sent = proxy.sent
    repo = lamella.open(f"grpc://{server.address}/team")
    stored = stored_nbytes(root)
    assert sent < 0.05 * stored
    assert len(doubts(root)) >= 5
    assert version.parameters_id == lamella.init("memory://plain-of-direct").push(tensors, "m@main").parameters_id
    assert bits(repo.checkout("m@main")) == bits(tensors)
    assert bits(lamella.open(f"{root}/team").checkout("m@main")) == bits(tensors)
    assert server.verified()
    assert not any(doubts(root))
    assert incoming(root) == []
    assert repo.verify(deep=True).problems == []


def test_a_step_goes_the_same_way_as_deltas_and_what_has_no_base_here_through_the_service(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    tensors = weights()
    moved = {name: (array * np.float32(1 + 1e-3)).astype(array.dtype) for name, array in tensors.items()}
    with proxied(server.address) as proxy:
        repo = lamella.init(f"grpc://{proxy.address}/team")
        repo.push(tensors, "m@main")
        assert server.verified()
        first, sent = stored_nbytes(root), proxy.sent
        repo.push(moved, "m@main")
        by_deltas = stored_nbytes(root) - first
        assert by_deltas < 0.5 * first
        assert proxy.sent - sent < 0.1 * by_deltas + 20_000
        assert server.verified()
        # Another machine has no base: the service, which has it, makes the deltas.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
        again = {name: (array * np.float32(1 + 2e-3)).astype(array.dtype) for name, array in tensors.items()}
        before, sent = stored_nbytes(root), proxy.sent
        lamella.open(f"grpc://{proxy.address}/team").push(again, "m@main")
        assert stored_nbytes(root) - before < 0.5 * first
        assert proxy.sent - sent > 0.5 * first
    assert server.verified()
    repo = lamella.open(f"{root}/team")
    for name, expected in (("m@v1", tensors), ("m@v2", moved), ("m@v3", again)):
        assert bits(repo.checkout(name)) == bits(expected)
    assert repo.verify(deep=True).problems == []


def test_a_small_push_goes_through_the_service_and_is_verified_at_once(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "PACK_NBYTES", 64 << 20)
    monkeypatch.setattr(direct, "WORTH_NBYTES", 64 << 20)
    repo = lamella.init(f"grpc://{server.address}/team")
    with puts_are(monkeypatch, lambda url, parts: pytest.fail("it was put")):
        repo.push(weights(), "m@main")
    assert doubts(root) == [False]
    assert bits(repo.checkout("m@main")) == bits(weights())


def test_parts_go_the_same_way(root: str, server: Server) -> None:
    tensors = weights()
    lamella.init(f"grpc://{server.address}/team")
    with proxied(server.address) as proxy:
        repos = [lamella.open(f"grpc://{proxy.address}/team") for _ in range(3)]
        version, _ = push_shared(
            repos, "m@main", tensors, split(tensors, 3, lambda name: None if name == "short" else 0)
        )
        assert proxy.sent < 0.1 * stored_nbytes(root)
    assert version.parameters_id == lamella.init("memory://parts-of-direct").push(tensors, "m@main").parameters_id
    assert server.verified()
    assert not any(doubts(root))
    assert bits(lamella.open(f"{root}/team").checkout("m@main")) == bits(tensors)


# -- who may stand on what ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("idle")
def test_nobody_stands_on_a_pack_that_only_its_writer_has_decoded(root: str, server: Server) -> None:
    tensors = weights()
    repo = lamella.init(f"grpc://{server.address}/team")
    repo.push(tensors, "m@main")
    once = stored_nbytes(root)
    assert any(doubts(root))
    assert bits(repo.checkout("m@main")) == bits(tensors)  # it serves its own push
    repo.push(tensors, "m@other")
    assert stored_nbytes(root) > 1.95 * once
    moved = {name: (array * np.float32(1 + 1e-6)).astype(array.dtype) for name, array in tensors.items()}
    repo.push(moved, "m@main")
    assert stored_nbytes(root) > 2.9 * once  # no deltas either
    report = repo.verify(doubtful=True)
    assert (report.problems, report.versions, report.vouched) == ([], 0, len(doubts(root)))
    assert not any(doubts(root))
    before = stored_nbytes(root)
    repo.push(tensors, "m@third")
    assert stored_nbytes(root) < before + 0.01 * once
    assert repo.verify(deep=True).vouched == 0


@pytest.mark.usefixtures("idle")
def test_a_deep_check_from_anywhere_vouches_for_packs(root: str, server: Server) -> None:
    repo = lamella.init(f"grpc://{server.address}/team")
    repo.push(weights(), "m@main")
    here = lamella.open(f"{root}/team")
    assert here.verify().vouched == 0
    assert any(doubts(root))
    count = sum(doubts(root))
    report = here.verify(deep=True)
    assert (report.problems, report.vouched) == ([], count)
    assert not any(doubts(root))
    assert here.verify(deep=True).problems == []  # the log is as it should be


def test_what_another_server_left_is_verified_by_the_next(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Verifier, "start", lambda self: None)
        with serving(root, direct=True) as server:
            lamella.init(f"grpc://{server.address}/team").push(weights(), "m@main")
    assert any(doubts(root))
    with serving(root, direct=True) as server:
        lamella.open(f"grpc://{server.address}/team").push({"w": noise(5, 50)}, "n@main")
        assert server.verified()
    assert not any(doubts(root))


def test_what_has_been_proven_when_a_server_is_stopped_is_not_proven_again(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Verifier, "start", lambda self: None)
        with serving(root, direct=True) as server:
            lamella.init(f"grpc://{server.address}/team").push(weights(), "m@main")
    store, report = store_of(lamella.open(f"{root}/team")), Verification(deep=True)
    count = sum(doubts(root))
    with closing(verifying(store, report, doubtful=True)) as steps:
        for _ in steps:
            if report.packs == 4:  # three have been decoded
                break
    assert report.vouched == 3
    assert sum(doubts(root)) == count - 3
    monkeypatch.setattr(maintenance, "VOUCHED_AT_ONCE", 1)
    with closing(verifying(store, report, doubtful=True)) as steps:
        for _ in steps:
            assert len(report.proven) <= 1
    assert not any(doubts(root))


# -- who lies ----------------------------------------------------------------------------------------------------------


def lie(monkeypatch: pytest.MonkeyPatch, *, about: int) -> None:
    """Have the client send other bytes for blob ``about`` of those that it puts, whose digest is right."""
    real, seen = direct.DirectPacks.add, []

    def add(self: direct.DirectPacks, blob: Blob) -> None:
        seen.append(blob.chunk)
        if len(seen) == about + 1:
            other = bytes(blob.decoded_nbytes)
            blob = replace(blob, encoding=0, payload=other, base=None, digest=blob_digest(other))
        real(self, blob)

    monkeypatch.setattr(direct.DirectPacks, "add", add)


def test_a_chunk_that_is_not_what_its_writer_said_harms_nobody_else(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    tensors = weights()
    repo = lamella.init(f"grpc://{server.address}/team")
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        lie(patch, about=1)
        repo.push(tensors, "m@main")
        assert server.verified()
    assert "stays doubtful" in caplog.text
    assert sum(doubts(root)) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))  # where nothing is remembered
    repo = lamella.open(f"grpc://{server.address}/team")
    for reader in (repo, lamella.open(f"{root}/team")):
        with pytest.raises(CorruptionError) as caught:
            reader.checkout("m@main")
        assert caught.value.kind == "bad_chunk"
    assert {problem.kind for problem in repo.verify(deep=True).problems} == {"bad_chunk"}
    honest = repo.push(tensors, "honest@main")
    assert server.verified()
    assert bits(repo.checkout("honest@main")) == bits(tensors)
    assert honest.parameters_id == repo.version("m@main").parameters_id
    assert sum(doubts(root)) == 1


def test_what_a_liar_has_put_is_read_once(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repo = lamella.init(f"grpc://{server.address}/team")
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        lie(patch, about=1)
        repo.push(weights(), "m@main")
        assert server.verified()
    for at in range(2):
        repo.push({"w": noise(50 + at, 500, 500)}, f"other{at}@main")
        assert server.verified()
    assert sum(doubts(root)) == 1
    assert caplog.text.count("stays doubtful") == 1
    assert len(repo.verify(doubtful=True).problems) == 1  # whoever asks is told


def test_a_manifest_that_is_not_what_its_writer_said_is_not_recorded(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = lamella.init(f"grpc://{server.address}/team")
    tensors = weights()
    with monkeypatch.context() as patch:
        lie(patch, about=len(tensors) - 1)  # after the cells that do not stand in their rows
        with pytest.raises(InvalidInputError) as caught:
            repo.push(tensors, "m@main")
    assert caught.value.kind == "wrong_description"
    assert repo.models() == []
    repo.push(tensors, "m@main")


@pytest.mark.parametrize("harm", ["nothing", "short", "other tail", "other footer", "long"])
def test_a_pack_that_is_not_there_or_not_as_described_is_not_recorded(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    repo = lamella.init(f"grpc://{server.address}/team")

    def put(url: str, parts: Sequence[bytes]) -> None:
        data = b"".join(parts)
        if harm != "nothing":
            changed = {
                "short": data[:-1],
                "other tail": data[:-50] + bytes(50),
                "other footer": data[:-8] + bytes(8),
                "long": data + b"\0",
            }
            really_put(url, changed[harm])

    with puts_are(monkeypatch, put), pytest.raises(InvalidInputError) as caught:
        repo.push(weights(), "m@main")
    assert caught.value.kind == "not_uploaded"
    assert repo.models() == []
    assert [info.name for info in store_of(lamella.open(f"{root}/team")).objects.list("packs/")] == []
    assert incoming(root) == []
    repo.push(weights(), "m@main")
    assert server.verified()
    assert bits(repo.checkout("m@main")) == bits(weights())


def test_weights_that_a_liar_has_recorded_before_are_recorded_again(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    repo = lamella.init(f"grpc://{server.address}/team")
    with monkeypatch.context() as patch:
        lie(patch, about=1)
        liar = repo.push(weights(), "m@main")
        assert server.verified()
    honest = repo.push(weights(), "m@main")
    assert honest.number == liar.number + 1
    assert honest.parameters_id == liar.parameters_id
    assert server.verified()
    assert repo.push(weights(), "m@main") == honest
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert bits(lamella.open(f"grpc://{server.address}/team").checkout("m@main")) == bits(weights())


def test_what_is_put_after_a_pack_was_taken_over_changes_nothing(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = lamella.init(f"grpc://{server.address}/team")
    urls = urls_of_a_push(repo, monkeypatch)
    assert server.verified()
    for url in urls:
        really_put(url, b"something else")
    assert len(urls) == len(incoming(root)) >= 4
    fresh = lamella.open(f"{root}/team")
    assert fresh.verify(deep=True).problems == []
    assert bits(fresh.checkout("m@main")) == bits(weights())


def test_a_url_is_good_for_its_object_and_for_putting_it(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = lamella.init(f"grpc://{server.address}/team")
    urls = urls_of_a_push(repo, monkeypatch)
    url = urls[0]
    assert f"X-Amz-Expires={PUT_S:.0f}&" in url
    name = url.partition("?")[0].rpartition("/incoming/")[2]
    for method, other in (
        ("GET", url),
        ("DELETE", url),
        ("PUT", url.replace(f"incoming/{name}", f"packs/{name}")),
        ("PUT", url.replace(f"incoming/{name}", f"log/{7:020d}")),
        ("PUT", url.replace(name, name[:-1] + ("0" if name[-1] != "0" else "1"))),
    ):
        with pytest.raises(URLError) as caught:
            urlopen(Request(other, b"" if method == "PUT" else None, method=method), timeout=60)
        assert isinstance(caught.value, HTTPError)
        assert caught.value.code == 403
        caught.value.close()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["unreachable", "refused", "no https"])
def test_a_bucket_that_takes_nothing_from_here_is_done_without(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    monkeypatch.setattr(direct, "OPENING_PATIENCE_S", 0.0)
    tried: list[str] = []
    if problem == "no https":
        monkeypatch.setattr(direct, "is_loopback", lambda host: bool(tried.append(host)))
    else:

        def fail(request: Request, **_: Any) -> Any:
            tried.append(request.full_url)
            if problem == "refused":
                return urlopen(Request(request.full_url.replace("Signature=", "Signature=0"), b"", method="PUT"))
            raise URLError(OSError("no route"))

        monkeypatch.setattr(direct, "_exchange", fail)
    repo = lamella.init(f"grpc://{server.address}/team")
    repo.push(weights(), "m@main")
    assert tried
    assert doubts(root) == [False]
    assert bits(repo.checkout("m@main")) == bits(weights())
    assert incoming(root) == []
    tried.clear()
    repo.push({"w": noise(7, 500, 500)}, "m@main")
    assert tried == []  # it is known by now


def test_workers_that_cannot_reach_the_bucket_push_through_the_service_the_next_time(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    lamella.init(f"grpc://{server.address}/team")
    repos = [lamella.open(f"grpc://{server.address}/team") for _ in range(3)]
    tensors = weights()
    shares = split(tensors, 3, lambda name: None if name == "short" else 0)

    def put(url: str, parts: Sequence[bytes]) -> None:
        raise direct._not_put("no route", transient=False)

    with puts_are(monkeypatch, put):
        for _ in repos:  # what was exchanged is gone each time that one finds out
            with suppress(lamella.StorageError):
                push_shared(repos, "m@main", tensors, shares)
    assert bits(repos[0].checkout("m@main")) == bits(tensors)


def test_a_url_that_is_none_is_done_without(root: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IncomingPacks, "put_url", lambda self, granted: "https://[::1/x")
    repo = lamella.init(f"grpc://{server.address}/team")
    repo.push(weights(), "m@main")
    assert doubts(root) == [False]


def test_a_push_is_not_given_up_while_a_pack_is_put(root: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(url: str, parts: Sequence[bytes]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sessions, "IDLE_S", 0.0)
            server._rpcs.sessions.sweep()
        really_put(url, b"".join(parts))

    repo = lamella.init(f"grpc://{server.address}/team")
    with puts_are(monkeypatch, put):
        repo.push(weights(), "m@main")
    assert len(doubts(root)) >= 5


def test_a_check_tells_what_it_found_also_if_it_cannot_be_recorded(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vouch(self: PackedStore, packs: Sequence[str]) -> int:
        raise OutcomeUnknownError("nobody knows")

    lamella.init(f"grpc://{server.address}/team").push(weights(), "m@main")
    monkeypatch.setattr(PackedStore, "vouch", vouch)
    report = lamella.open(f"{root}/team").verify(deep=True)
    assert (report.problems, report.versions, report.vouched) == ([], 1, 0)


def test_a_bug_in_one_check_ends_no_other(root: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Verifier._verify, []

    def verify(self: Verifier, store: PackedStore) -> None:
        seen.append(store)
        if len(seen) == 1:
            raise OverflowError
        real(self, store)

    monkeypatch.setattr(Verifier, "_verify", verify)
    repo = lamella.init(f"grpc://{server.address}/team")
    repo.push(weights(), "m@main")
    assert server.verified()
    repo.push(weights(), "n@main")
    assert server.verified()
    assert not any(doubts(root))


def test_a_transfer_that_breaks_is_made_again(root: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    broken: list[str] = []

    def fail_once(request: Request, **options: Any) -> Any:
        if request.full_url not in broken:
            broken.append(request.full_url)
            raise ConnectionResetError
        urlopen(request, timeout=60).close()

    monkeypatch.setattr(direct, "_exchange", fail_once)
    repo = lamella.init(f"grpc://{server.address}/team")
    repo.push(weights(), "m@main")
    assert len(broken) >= 4
    assert len(doubts(root)) >= 4
    assert bits(repo.checkout("m@main")) == bits(weights())


def test_urls_are_in_no_error(root: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "OPENING_PATIENCE_S", 0.0)
    monkeypatch.setattr(direct.Way, "direct", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr(direct, "_exchange", lambda request, **_: (_ for _ in ()).throw(URLError(request.full_url)))
    repo = lamella.init(f"grpc://{server.address}/team")
    with pytest.raises(lamella.StorageError) as caught:
        repo.push(weights(), "m@main")
    assert caught.value.kind == "not_put"
    shown = f"{caught.getrepr(style='long')}"
    assert "Signature" not in shown.replace("request.full_url", "")


def test_a_push_that_is_given_up_leaves_nothing_in_the_bucket(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = lamella.init(f"grpc://{server.address}/team")

    real = direct.DirectPacks.finish

    def finish(self: direct.DirectPacks) -> Sequence[Blob]:
        real(self)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(direct.DirectPacks, "finish", finish)
        with pytest.raises(InterruptedError):
            repo.push(weights(), "m@main")
    objects = store_of(lamella.open(f"{root}/team")).objects
    assert [info.name for directory in ("packs/", "incoming/") for info in objects.list(directory)] == []


def test_what_was_put_and_never_asked_for_is_deleted_after_a_week(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    lamella.init(f"grpc://{server.address}/team")
    objects = store_of(lamella.open(f"{root}/team")).objects
    old, young = (f"{int((time.time() - days * 86_400) * 1000):012x}{'7' * 20}-0-{'0' * 64}" for days in (7.1, 6.9))
    for name in (old, young):
        objects.put_if_absent(f"incoming/{name}", [b"late"])
    sweep(objects)
    assert incoming(root) == [f"incoming/{young}"]


def test_a_service_elsewhere_cannot_have_this_machine_speak_to_itself() -> None:
    with pytest.raises(lamella.StorageError, match="https"):
        direct._send("http://127.0.0.1:1/x", [b"data"], bytes(16), in_the_clear=False)


def test_what_goes_to_this_machine_goes_by_no_proxy(root: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = lamella.init(f"grpc://{server.address}/team")
    with monkeypatch.context() as patch:  # the service has looked at its environment by now
        patch.setenv("http_proxy", "http://127.0.0.1:1")  # where nobody listens
        patch.delenv("no_proxy", raising=False)
        repo.push(weights(), "m@main")
    assert len(doubts(root)) >= 5


@pytest.mark.usefixtures("idle")
def test_an_audit_says_who_found_packs_right(root: str, server: Server) -> None:
    repo = lamella.init(f"grpc://{server.address}/team")
    repo.push(weights(), "m@main")
    count = sum(doubts(root))
    repo.verify(doubtful=True)
    acts = [act for act in repo.audit() if isinstance(act, lamella.Act)]
    assert (acts[-1].principal, acts[-1].did) == (
        "local",
        (f"found {count} packs right, which only their writers had decoded",),
    )


# -- the wire ----------------------------------------------------------------------------------------------------------


def begun(client: WireClient, tensors: dict[str, Array]) -> tuple[str, list[Described]]:
    """Plan a push of ``tensors`` by nothing but the wire; return its id, and what its blobs would be, in full."""
    push = new_push_id()
    client.call("Pushes.Begin", pb.BeginRequest(repository="team", push=push, model="m", branch="main"))
    taken = take_apart(tensors, "m", push)
    cells = [encode_planned(planned) for planned in taken.planned]
    client.call("Pushes.Plan", pb.PlanRequest(repository="team", push=push, cells=cells))
    blobs = [Blob(id, 0, width, len(data), data, None) for id, (data, width) in taken.chunks.items()]
    return push, [described(blob, blob.payload) for blob in blobs]


def asking(push: str, number: int, blobs: Sequence[Described], arrived: int = 0) -> pb.GrantRequest:
    data = b"".join(map(encode_header, blobs))
    return pb.GrantRequest(repository="team", push=push, number=number, blobs=data, arrived=arrived)


def test_grants_are_given_in_turn_and_the_newest_again(root: str, server: Server) -> None:
    lamella.init(f"grpc://{server.address}/team")
    with WireClient(server.address) as client:
        push, blobs = begun(client, {name: noise(at, 100) for at, name in enumerate("abc")})
        first = client.call("Pushes.Grant", asking(push, 0, blobs[:1]))
        again = client.call("Pushes.Grant", asking(push, 0, blobs[:1]))
        assert first.tail == again.tail
        assert first.url.partition("?")[0] == again.url.partition("?")[0]
        for request, kind in (
            (asking(push, 0, blobs[1:2]), "out_of_turn"),
            (asking(push, 2, blobs[1:2]), "out_of_turn"),
            (asking(push, 1, blobs[1:2], arrived=2), "out_of_turn"),
            (asking(push, 1, blobs[:1]), "unplanned_blob"),
            (asking(push, 1, [blobs[1], blobs[1]]), "unplanned_blob"),
            (asking(push, 1, [blobs[1]._replace(chunk=bytes(32))]), "unplanned_blob"),
            (asking(push, 1, [blobs[1]._replace(base=blobs[0].chunk, encoding=5)]), "wrong_base"),
            (asking(push, 1, [blobs[1]._replace(base=blobs[0].chunk)]), "bad_record"),
            (asking(push, 1, [blobs[1]._replace(encoding=5)]), "bad_record"),
            (asking(push, 1, [blobs[1]._replace(encoding=99)]), "bad_record"),
            (asking(push, 1, [blobs[1]._replace(decoded_nbytes=5 << 20)]), "bad_record"),
            (asking(push, 1, [blobs[1]._replace(encoded_nbytes=5 << 20)]), "bad_record"),
            (asking(push, 1, []), "bad_record"),
            (pb.GrantRequest(repository="team", push=push, number=1, blobs=b"x" * 50), "bad_record"),
        ):
            with pytest.raises(Failure) as caught:
                client.call("Pushes.Grant", request)
            assert caught.value.kind == kind
        client.call("Pushes.Grant", asking(push, 1, blobs[1:]))
        with pytest.raises(Failure) as caught:
            client.call("Pushes.Part", pb.PushRequest(repository="team", push=push))
        assert caught.value.kind == "not_uploaded"


def row_of_companions(count: int) -> tuple[list[Planned], list[Described]]:
    """Return cells each of which is a companion of the one before, and blobs: the first in full, each next a delta."""
    chunks = [chunk_id(at.to_bytes(200, "little")) for at in range(count)]
    planned = [
        Planned(Cell(f"t{at}", 0), chunk, Cell(f"t{at - 1}", 0) if at else None) for at, chunk in enumerate(chunks)
    ]
    bases = [None, *chunks[:-1]]
    return planned, [
        Described(one, base, bytes(16), 200, 9, 5 if base else 0, 4) for one, base in zip(chunks, bases, strict=True)
    ]


def planned_push(client: WireClient, planned: Sequence[Planned]) -> str:
    push = new_push_id()
    client.call("Pushes.Begin", pb.BeginRequest(repository="team", push=push, model="m", branch="main"))
    cells = [encode_planned(one) for one in planned]
    client.call("Pushes.Plan", pb.PlanRequest(repository="team", push=push, cells=cells))
    return push


@pytest.mark.parametrize("together", [True, False])
def test_companions_stand_on_none_that_stands_on_one(root: str, server: Server, together: bool) -> None:
    lamella.init(f"grpc://{server.address}/team")
    planned, blobs = row_of_companions(3)
    with WireClient(server.address) as client:
        push = planned_push(client, planned)
        if not together:
            client.call("Pushes.Grant", asking(push, 0, blobs[:2]))
        with pytest.raises(Failure) as caught:
            client.call("Pushes.Grant", asking(push, 0, blobs) if together else asking(push, 1, blobs[2:]))
        assert caught.value.kind == "wrong_base"
        client.call("Pushes.Grant", asking(push, 0, blobs[:2]))  # nothing of what was refused is left


def test_a_companion_that_was_granted_long_ago_is_none(root: str, server: Server) -> None:
    lamella.init(f"grpc://{server.address}/team")
    planned, blobs = row_of_companions(2 + COMPANION_REACH)
    others = [blob._replace(base=None, encoding=0) for blob in blobs[2:]]
    with WireClient(server.address) as client:
        push = planned_push(client, planned)
        client.call("Pushes.Grant", asking(push, 0, blobs[:1]))
        with pytest.raises(Failure) as caught:
            client.call("Pushes.Grant", asking(push, 1, [*others, blobs[1]]))
        assert caught.value.kind == "wrong_base"
        client.call("Pushes.Grant", asking(push, 1, [*others[1:], blobs[1]]))


def test_what_was_granted_is_no_companion_of_what_is_written(root: str, server: Server) -> None:
    lamella.init(f"grpc://{server.address}/team")
    first, data = noise(1, 1000), noise(1, 1000) * np.float32(1.0001)
    encoded = codecs.encode(data.tobytes(), width=4, floating=True, base=first.tobytes())
    assert encoded.against is codecs.Against.BASE
    one = Blob(chunk_id(first.tobytes()), 0, 4, first.nbytes, first.tobytes(), None)
    two = Blob(chunk_id(data.tobytes()), encoded.encoding, 4, data.nbytes, encoded.payload, one.chunk)
    with WireClient(server.address) as client:
        push = planned_push(client, [Planned(Cell("a", 0), one.chunk), Planned(Cell("b", 0), two.chunk, Cell("a", 0))])
        client.call("Pushes.Grant", asking(push, 0, [described(one, one.payload)]))
        records = b"".join(bytes(part) for blob in (one, two) for part in encode_record(blob))
        with pytest.raises(Failure) as caught:
            client.call("Pushes.Write", write_messages("team", push, records))
        assert caught.value.kind == "wrong_base"


def test_a_pack_ends_when_it_is_full(root: str, server: Server) -> None:
    lamella.init(f"grpc://{server.address}/team")
    planned, blobs = row_of_companions(18)
    full = [blob._replace(base=None, encoding=0, encoded_nbytes=4 << 20) for blob in blobs]
    with WireClient(server.address) as client:
        push = planned_push(client, planned)
        with pytest.raises(Failure) as caught:
            client.call("Pushes.Grant", asking(push, 0, full[:17]))
        assert caught.value.kind == "bad_record"
        client.call("Pushes.Grant", asking(push, 0, full[:16]))


def test_a_service_that_does_not_offer_it_refuses_it(tmp_path: Any) -> None:
    with serving(tmp_path) as server:
        repo = lamella.init(f"grpc://{server.address}/team")
        repo.push(weights(), "m@main")
        with WireClient(server.address) as client:
            push, blobs = begun(client, {"w": noise(1, 100)})
            with pytest.raises(Failure) as caught:
                client.call("Pushes.Grant", asking(push, 0, blobs))
            assert caught.value.kind == "no_grants"
        with pytest.raises(InvalidInputError, match="bucket"):
            Server(str(tmp_path), "127.0.0.1:0", insecure_loopback=True, direct=True)


def test_a_client_is_granted_a_few_packs_before_it_has_put_any(root: str, server: Server) -> None:
    lamella.init(f"grpc://{server.address}/team")
    with WireClient(server.address) as client:
        push, blobs = begun(client, {f"w{at}": noise(at, 100) for at in range(AHEAD + 4)})
        for at in range(AHEAD):
            client.call("Pushes.Grant", asking(push, at, blobs[at : at + 1]))
        with pytest.raises(Failure) as caught:
            client.call("Pushes.Grant", asking(push, AHEAD, blobs[AHEAD : AHEAD + 1]))
        assert caught.value.kind == "out_of_turn"

        def go_on() -> None:
            client.call("Pushes.Grant", asking(push, AHEAD, blobs[AHEAD : AHEAD + 1], arrived=1))
            client.call("Pushes.Part", pb.PushRequest(repository="team", push=push))

        with pytest.raises(Failure) as caught:
            go_on()
        assert caught.value.kind == "not_uploaded"  # who says that one has come is found out, now or at the end
