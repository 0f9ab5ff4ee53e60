"""What a service notes of who did what, and what it signs."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
from service import WireClient, serving
from support import noise

import lamella
from lamella.cli import run
from lamella_engine.errors import CorruptionError, InvalidInputError, PermissionDeniedError
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service import repositories as repositories_module
from lamella_engine.signing import generate_key


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
                with pytest.raises(InvalidInputError, match="where the repository lies"):
                    repo.audit()
                server._rpcs.flush_audits()  # as it does every minute; the next entry vouches for it
                repo.push({"w": noise(2, 300)}, "m@main")
    account = lamella.open(root / "team").audit()
    assert account.problems == []
    act, _ = account.acts
    assert (act.principal, act.did[-1]) == ("ana", f"recorded m@v1 ({version.id[:12]})")
    noted = {(read.principal, read.rpc): read for read in account.reads}
    assert {("ana", "Pushes.Commit"), ("ana", "Versions.Read")} <= noted.keys()
    assert noted["ana", "Versions.Read"].what == version.id
    assert noted["ana", "Versions.Read"].peer.startswith("ipv4:127.0.0.1:")
    assert made.secret not in "".join(path.read_text("latin-1") for path in root.rglob("*") if path.is_file())

    assert run(["-C", str(root / "team"), "audit"]) == 0
    said = capsys.readouterr().out
    assert "ana from ipv4:127.0.0.1:" in said
    assert "no problems in 2 acts" in said
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
    assert lamella.open(tmp_path / "root" / "team").audit().reads == []


def test_a_service_with_a_key_signs_and_can_have_nothing_else_be_taken(tmp_path: Path) -> None:
    public = generate_key(tmp_path / "key")
    with (
        serving(tmp_path / "root", signing_key=tmp_path / "key", require_signed=True) as server,
        lamella.init(f"grpc://{server.address}/team") as repo,
    ):
        repo.push({"w": np.zeros(3)}, "m@main")
    with lamella.open(tmp_path / "root" / "team") as repo:
        assert [act.signer for act in repo.audit().acts] == [public.hex()] * 2
        with pytest.raises(PermissionDeniedError):
            repo.push({"w": np.ones(3)}, "m@main")
    with pytest.raises(InvalidInputError, match="give a key"), serving(tmp_path / "root", require_signed=True):
        pass
