"""What a service notes of who did what, and what it signs."""

import dataclasses
import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from remote import proxied
from service import Failure, WireClient, serving
from support import account, noise

import lamella
from lamella.cli import run
from lamella_engine.auditing import STORED_NBYTES
from lamella_engine.errors import CorruptionError, InvalidInputError, PermissionDeniedError
from lamella_engine.format.entry import decode_entry, encode_entry
from lamella_engine.remote.jobs import RemoteJobs
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service import repositories as repositories_module
from lamella_engine.service.server import Server
from lamella_engine.signing import generate_key
from lamella_engine.wire import decode_objects


def test_what_is_read_and_changed_through_a_service_is_noted_with_who_and_from_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    with serving(root, audit=True) as server, WireClient(server.address) as admin:
        made = admin.call("Access.CreateToken", pb.CreateTokenRequest(principal="ana", role="writer"))
        with lamella.init(f"grpc://{server.address}/team"), pytest.MonkeyPatch.context() as patch:
            patch.setenv("LAMELLA_TOKEN", made.secret)
            with lamella.open(f"grpc://{server.address}/team") as repo:
                version = repo.push({"w": noise(1, 300)}, "m@main")
                repo.checkout("m@main")
                with pytest.raises(PermissionDeniedError):
                    next(repo.audit())
    found = account(lamella.open(root / "team"))
    assert (found.unvouched, found.problems) == (0, [])  # the server has seen to that as it stopped
    (act,) = found.acts
    assert (act.principal, act.did[-1]) == ("ana", f"recorded m@v1 ({version.id[:12]})")
    noted = {(read.principal, read.rpc): read for read in found.reads}
    assert {("ana", "Pushes.Commit"), ("ana", "Versions.Read")} <= noted.keys()
    assert noted["ana", "Versions.Read"].what == version.id
    assert noted["ana", "Versions.Read"].peer.startswith("ipv4:127.0.0.1:")
    assert made.secret not in "".join(path.read_text("latin-1") for path in root.rglob("*") if path.is_file())

    assert run(["-C", str(root / "team"), "audit"]) == 0
    said = capsys.readouterr().out
    assert "ana from ipv4:127.0.0.1:" in said
    assert "no problems in 1 act" in said
    segment = min((root / "team" / "audit").iterdir())
    segment.write_bytes(segment.read_bytes().replace(b"ana", b"eve"))
    assert run(["-C", str(root / "team"), "audit", "--json"]) == CorruptionError.exit_code
    assert json.loads(capsys.readouterr().out)["problems"]


def test_what_was_noted_of_a_repository_that_was_closed_since_is_vouched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repositories_module, "KEPT_OPEN", 1)
    monkeypatch.setenv("LAMELLA_CACHE_NBYTES", "0")
    with serving(tmp_path / "root", audit=True) as server:
        urls = [f"grpc://{server.address}/{name}" for name in ("team", "other")]
        repos = [lamella.init(url) for url in urls]
        for turn in range(3):
            for repo in repos:
                repo.push({"w": noise(turn, 300)}, "m@main")
                repo.checkout("m@main")
                server._rpcs.flush_audits()
            server._rpcs.sessions.sweep(idle_s=0)
            gc.collect()
            assert len(server._rpcs._repositories._open) == 1
        for repo in repos:
            repo.push({"w": noise(3, 300)}, "m@main")
            repo.close()
    for name in ("team", "other"):
        account = lamella.open(tmp_path / "root" / name).audit()
        assert account.problems == []
        assert [read.rpc for read in account.reads].count("Versions.Read") >= 3
        assert account.unvouched <= 1  # of the last push
        assert len({path.name.split("-")[0] for path in (tmp_path / "root" / name / "audit").iterdir()}) == 1


def test_without_the_setting_nothing_is_noted(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as server, lamella.init(f"grpc://{server.address}/team") as repo:
        repo.push({"w": noise(1, 300)}, "m@main")
        repo.checkout("m@main")
    assert account(lamella.open(tmp_path / "root" / "team")).reads == []


def test_a_service_with_a_key_signs_and_can_have_nothing_else_be_taken(tmp_path: Path) -> None:
    public = generate_key(tmp_path / "key")
    with (
        serving(tmp_path / "root", signing_key=tmp_path / "key", require_signed=True) as server,
        lamella.init(f"grpc://{server.address}/team") as repo,
    ):
        repo.push({"w": np.zeros(3)}, "m@main")
    with lamella.open(tmp_path / "root" / "team") as repo:
        assert [act.signer for act in account(repo).acts] == [public.hex()] * 2
        with pytest.raises(PermissionDeniedError):
            repo.push({"w": np.ones(3)}, "m@main")
    with pytest.raises(InvalidInputError, match="give a key"), serving(tmp_path / "root", require_signed=True):
        pass


# -- through the service -----------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Server, str, Path]]:
    """Yield a server that notes reads, the URL of a repository with two versions and some reads, and its directory."""
    with serving(tmp_path / "root", audit=True) as server:
        url = f"grpc://{server.address}/team"
        with lamella.init(url) as repo:
            for seed in range(2):
                repo.push({"w": noise(seed, 300)}, "m@main")
                repo.checkout("m@main")
        server._rpcs.keep_audits(vouched_s=math.inf)
        yield server, url, tmp_path / "root" / "team"


def test_an_account_is_the_same_through_a_service_as_where_the_repository_lies(
    served: tuple[Server, str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, url, place = served
    documents = []
    for at in (str(place), url):
        assert run(["-C", at, "audit", "--json"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    here, there = documents
    assert here == there
    assert len(here["acts"]) == 2
    assert here["unvouched"] == len(here["reads"]) > 0
    assert not any(read["vouched"] for read in here["reads"])
    assert run(["-C", url, "audit"]) == 0
    *_, read, last = capsys.readouterr().out.splitlines()
    assert read.endswith("[not vouched for yet]")
    assert last.endswith(f"of which {len(here['reads'])} not vouched for yet")


def test_an_audit_is_noted_too(served: tuple[Server, str, Path]) -> None:
    server, url, _ = served
    with lamella.open(url) as repo:
        before = len(account(repo).reads)
        server._rpcs.keep_audits()
        noted = account(repo).reads[before:]
    assert [(read.rpc, read.what) for read in noted] == [("Jobs.Audit", "log/"), ("Jobs.Audit", "audit/")]


def test_an_auditor_audits_and_verifies_and_reads_nothing(served: tuple[Server, str, Path]) -> None:
    server, url, _ = served
    secret, _ = server._tokens.create("ada", "auditor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMELLA_TOKEN", secret)
        with lamella.open(url) as repo:
            assert len(account(repo).acts) == 2
            assert repo.verify().ok
            for read in (repo.models, repo.stats, lambda: repo.version("m@main")):
                with pytest.raises(PermissionDeniedError):
                    read()


def write_anew(entry: Path) -> None:
    """Have an entry say that somebody else acted; it is right in itself."""
    data = entry.read_bytes()
    line = json.loads(data.splitlines()[0])
    value = decode_entry(data, number=line["n"], repository=line["repository"], previous=None)
    entry.write_bytes(encode_entry(dataclasses.replace(value, principal="nobody")))


def test_a_client_finds_what_its_service_does_not_tell(served: tuple[Server, str, Path]) -> None:
    """The server has read the log before, and hands out what lies there: it is the client that looks."""
    server, url, place = served
    server._rpcs.keep_audits()
    with lamella.open(url) as repo:
        assert account(repo).problems == []
        segment = min((place / "audit").iterdir())
        data = segment.read_bytes()
        segment.write_bytes(data.replace(b"Versions.Read", b"Versions.Ride"))
        assert {problem.kind for problem in account(repo).problems} == {"bad_audit"}
        segment.write_bytes(data)
        write_anew(sorted((place / "log").iterdir())[1])
        with pytest.raises(CorruptionError) as caught:
            account(repo)
        assert caught.value.kind == "broken_log"


def test_a_client_finds_a_log_that_was_written_anew_since_it_was_seen(served: tuple[Server, str, Path]) -> None:
    _, url, place = served
    with lamella.open(url) as repo:
        write_anew(max((place / "log").iterdir()))
        with pytest.raises(CorruptionError) as caught:
            account(repo)
        assert caught.value.kind == "fork"


def test_an_account_goes_on_where_a_connection_broke(served: tuple[Server, str, Path]) -> None:
    server, _, _ = served
    with proxied(server.address) as proxy, lamella.open(f"grpc://{proxy.address}/team") as repo:
        whole = account(repo)
        proxy.cut_received_at = proxy.received + 1500
        assert account(repo) == whole
        assert proxy.cuts == 1


def test_an_object_of_any_length_comes_in_messages_of_a_mebibyte(served: tuple[Server, str, Path]) -> None:
    server, url, place = served
    (place / "audit" / f"{'f' * 16}-000000000").write_bytes(bytes(STORED_NBYTES + 5))
    with WireClient(server.address) as client:
        replies = client.call("Jobs.Audit", pb.AuditRequest(repository="team", after=f"audit/{'e' * 16}"))
        assert [len(reply.data) for reply in replies] == [1 << 20] * 4 + [1]
        assert [bool(reply.name) for reply in replies] == [True, False, False, False, False]
        with pytest.raises(Failure) as failure:
            client.call("Jobs.Audit", pb.AuditRequest(repository="team", after="meta/"))
    assert failure.value.kind == "bad_message"
    with lamella.open(url) as repo:
        assert {problem.kind for problem in account(repo).problems} == {"bad_audit"}


@pytest.mark.parametrize(
    "replies",
    [
        [pb.AuditReply(data=b"x")],
        [pb.AuditReply(name="log/x", data=bytes(1 << 20))] + [pb.AuditReply(data=bytes(1 << 20))] * 4,
    ],
    ids=["without a name", "too long"],
)
def test_what_is_no_object_is_refused(replies: list[pb.AuditReply]) -> None:
    with pytest.raises(CorruptionError) as caught:
        list(decode_objects(replies, most_nbytes=(4 << 20) + 1))
    assert caught.value.kind == "bad_reply"


@pytest.mark.parametrize("names", [["meta/x"], ["log/b", "log/a"], ["log/a", "log/a"]], ids=str)
def test_what_was_not_asked_for_is_refused(names: list[str]) -> None:
    class Lying:
        def stream(self, name: str, request: pb.AuditRequest) -> Iterator[pb.AuditReply]:
            yield from (pb.AuditReply(name=name, data=b"x") for name in names)

    with pytest.raises(CorruptionError) as caught:
        list(RemoteJobs(Lying(), "team", seen=[])._stored("log/"))  # type: ignore[arg-type]
    assert caught.value.kind == "bad_reply"
