"""A repository behind a service behaves like a local one, whatever happens on the way."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from remote import Proxy, proxied, secure_service
from safetensors.numpy import save_file
from service import WireClient, serving
from support import bits, noise

import lamella
from lamella import cli
from lamella_engine import wire
from lamella_engine.checkpoints import open_checkpoint
from lamella_engine.codecs import Encoding
from lamella_engine.content_store import packed
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.committing import Change
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.content_store.seam import Push, Reading
from lamella_engine.executor import InlineExecutor
from lamella_engine.format.digests import chunk_id
from lamella_engine.format.entry import RefChange, VersionAdded
from lamella_engine.format.manifest import MAX_NAME_NBYTES
from lamella_engine.format.names import metadata_name
from lamella_engine.model import Cell
from lamella_engine.notes import Notes
from lamella_engine.pushing import push_checkpoint
from lamella_engine.remote import channel, opening
from lamella_engine.remote.cache import ChunkCache
from lamella_engine.remote.channel import Channel
from lamella_engine.remote.place import Credentials, Place, parse_url
from lamella_engine.remote.push import WINDOW_NBYTES, RemotePush
from lamella_engine.remote.store import _Pages
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service import quotas, rpcs, sessions
from lamella_engine.service.server import Server
from lamella_engine.service.sessions import Session, Sessions

TENSORS = {
    "embedding": noise(1, 1500, 1024),
    "layer.weight": noise(2, 700, 1024),
    "norm": noise(3, 64),
    "scalar": np.float64(3.5),
    "step": np.array([7], np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


def nudged(tensors, seed=9, share=0.01):
    """Return tensors of which some elements have moved a little."""
    random = np.random.default_rng(seed)
    moved = {}
    for name, tensor in tensors.items():
        array = np.array(tensor)
        if array.dtype == np.float32:
            where = random.random(array.shape) < share
            array[where] *= np.float32(1.001)
        moved[name] = array
    return moved


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in [name for name in os.environ if name.startswith("LAMELLA_")]:
        if name != "LAMELLA_HYPOTHESIS_PROFILE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(channel, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(opening, "OPENING_PATIENCE_S", 0.2)


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    with serving(tmp_path / "root") as server:
        yield server


@pytest.fixture
def proxy(server) -> Iterator[Proxy]:
    with proxied(server.address) as proxy:
        yield proxy


@pytest.fixture
def repo(server) -> Iterator[lamella.Repository]:
    with lamella.init(f"grpc://{server.address}/team") as repo:
        yield repo


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMELLA_CACHE_NBYTES", "0")


@pytest.fixture
def far(proxy, repo) -> Iterator[lamella.Repository]:
    """The same repository, by way of the proxy."""
    with lamella.open(f"grpc://{proxy.address}/team") as far:
        yield far


@pytest.fixture
def local() -> Iterator[lamella.Repository]:
    with lamella.init(f"memory://{os.urandom(8).hex()}") as local:
        yield local


# -- like a local one --------------------------------------------------------------------------------------------------


def test_what_is_pushed_comes_back_bit_for_bit(repo):
    repo.push(TENSORS, "bert@main", message="first", metrics={"loss": 0.5}, recipe={"a": [1]}, files={"x.txt": b"abc"})
    assert bits(repo.checkout("bert@main")) == bits(TENSORS)
    version = repo.version("bert@main")
    assert (version.message, dict(version.metrics), version.number) == ("first", {"loss": 0.5}, 1)
    assert version["layer.weight"][3:5, 7].tobytes() == TENSORS["layer.weight"][3:5, 7].tobytes()


def test_files_come_back_byte_for_byte(repo, tmp_path):
    repo.push(TENSORS, "bert@main", files={"config.json": b"{}", "sub/long.bin": bytes(range(256)) * 40_000})
    repo.checkout("bert@main", tmp_path / "out")
    assert (tmp_path / "out/sub/long.bin").read_bytes() == bytes(range(256)) * 40_000


def test_a_diff_of_more_names_than_a_message_holds_comes_whole(repo, local, monkeypatch):
    monkeypatch.setattr(rpcs, "_NAMES_AT_ONCE", 3)
    monkeypatch.setattr(rpcs, "_NAMES_NBYTES", 20)
    one = {f"a.{number}": np.full(1, number) for number in range(12)} | {"shaped": np.zeros(3)}
    two = {f"a.{number}": np.full(1, number % 7) for number in range(4, 16)} | {"shaped": np.zeros(4)}
    for place in repo, local:
        place.push(one, "m@main")
        place.push(two, "m@main")
    found = repo.diff("m@v1", "m@v2")
    assert found == local.diff("m@v1", "m@v2")
    assert [len(names) for names in (found.added, found.removed, found.reshaped, found.changed, found.same)] == [
        4,
        4,
        1,
        5,
        3,
    ]


def test_models_and_refs_that_no_message_holds_come_whole(repo, local, server, monkeypatch):
    """Seven thousand of them in messages of half a kilobyte each: with the bounds as they are, millions."""
    monkeypatch.setattr(rpcs, "_NAMES_NBYTES", 512)
    refs = tuple(RefChange("m", f"r{number:04d}-{'x' * 40}", "alias", None, 1) for number in range(4000))
    versions = tuple(
        VersionAdded(f"n{number:04d}-{'y' * 40}", 1, metadata_name("0" * 64, "0" * 32, number), 1, bytes(32), 1)
        for number in range(3000)
    )
    for place in repo, local:
        place.push({"w": np.zeros(3)}, "m@main")
    for store in server._rpcs._repositories.open(repo._store.repository), local._store:
        store.log.commit(new_push_id(), lambda state: Change(refs=refs, versions=versions))
    assert repo.refs("m") == local.refs("m")
    assert repo.models() == local.models()
    assert (len(repo.refs("m")), len(repo.models())) == (4001, 3001)
    request = pb.RefsRequest(repository=repo._store.repository, model="m")
    with WireClient(server.address) as client:
        replies = client.call("Versions.Refs", request)
    assert max(reply.ByteSize() for reply in replies) < 1024
    assert sum(len(reply.refs) for reply in replies) == 4001
    assert repo.refs("nothing") == []


def test_a_verification_says_how_far_it_has_come(repo, server, monkeypatch):
    monkeypatch.setattr(rpcs, "_PROGRESS_S", 0.0)
    repo.push(TENSORS, "m@main")
    with WireClient(server.address) as client:
        *updates, last = client.call("Jobs.Verify", pb.VerifyRequest(repository="team", deep=True))
    assert [update.done for update in updates] == [False] * len(updates)
    assert [(update.entries, update.packs) for update in updates] == [(0, 0), (1, 1), (1, 1)]
    assert (last.done, last.entries, last.versions, last.packs) == (True, 1, 1, 1)
    assert repo.verify(deep=True).ok


def test_log_diff_stats_and_distance_are_those_of_a_local_repository(repo, local):
    second = nudged(TENSORS)
    for place in repo, local:
        place.push(TENSORS, "bert@main", message="one")
        place.push(second, "bert@main", message="two")
        place.tag("bert@good", "bert@v1")
    assert [(v.number, v.message) for v in repo.log("bert@main")] == [(2, "two"), (1, "one")]
    assert repo.diff("bert@v1", "bert@v2") == local.diff("bert@v1", "bert@v2")
    assert repo.refs("bert") == local.refs("bert")
    assert repo.models() == local.models()
    assert repo.stats().decoded_nbytes == local.stats().decoded_nbytes
    assert repo.cost("bert@v2") == local.cost("bert@v2")
    ours, theirs = (place.distance("bert@v1", "bert@v2") for place in (repo, local))
    assert ours == theirs
    assert ours.cosine == theirs.cosine
    assert ours.per_tensor["norm"].cosine == theirs.per_tensor["norm"].cosine
    assert repo.verify(deep=True).ok


def test_errors_are_those_of_a_local_repository(repo, local):
    for place in repo, local:
        place.push(TENSORS, "bert@main")
        place.tag("bert@good", "bert@v1")

    def said(place, call):
        with pytest.raises(lamella.LamellaError) as error:
            call(place)
        return type(error.value), error.value.kind, error.value.message

    calls = [
        lambda place: place.version("bert@nope"),
        lambda place: place.version("brt@main"),
        lambda place: place.version("bert@v9"),
        lambda place: place.version("deadbeefdead"),
        lambda place: place.version("no revision"),
        lambda place: place.version("bert@v1~3"),
        lambda place: place.checkout("bert@main", include="nothing*"),
        lambda place: place.version("bert@main")["nothing"],
        lambda place: place.delete_ref("bert@nope"),
        lambda place: place.push(TENSORS, "bert@good"),
        lambda place: place.push({"x": noise(1, 3)}, "bert@v3"),
        lambda place: place.distance("bert@main", "bert@main", include="nothing"),
    ]
    assert [said(repo, call) for call in calls] == [said(local, call) for call in calls]


def test_a_repository_that_is_not_there_is_not_found(server):
    with pytest.raises(lamella.RepositoryNotFoundError):
        lamella.open(f"grpc://{server.address}/other")


def test_a_repository_is_made_once(server, repo):
    with pytest.raises(lamella.AlreadyExistsError):
        lamella.init(f"grpc://{server.address}/team")


def test_a_repository_that_was_closed_says_so(repo):
    repo.close()
    repo.close()
    with pytest.raises(lamella.InvalidInputError) as error:
        repo.models()
    assert error.value.kind == "closed"


def test_a_branch_that_moved_is_a_conflict(repo, server):
    repo.push(TENSORS, "bert@main")
    with lamella.open(f"grpc://{server.address}/team") as other:
        push = repo._begin("bert", "main", None)
        other.push(nudged(TENSORS), "bert@main")
        with pytest.raises(lamella.ConflictError):
            go_on_with(push, TENSORS)
    assert repo.version("bert@main").number == 2


def go_on_with(push: Push, tensors):
    with open_checkpoint(tensors) as checkpoint:
        return push_checkpoint(push, checkpoint, InlineExecutor(), Notes())


def test_pushing_the_same_again_records_nothing(repo):
    first = repo.push(TENSORS, "bert@main")
    assert repo.push(TENSORS, "bert@main").id == first.id
    assert repo.version("bert@latest").number == 1


def test_a_repository_takes_as_many_bytes_as_a_local_one(repo, local):
    for place in repo, local:
        for number in range(3):
            place.push(nudged(TENSORS, number), "bert@main", message=str(number))
    ours, theirs = repo.stats().stored_nbytes, local.stats().stored_nbytes
    assert abs(ours - theirs) < 0.01 * theirs


def test_every_verb_of_the_command_line_takes_a_service(server, tmp_path, capsys):
    place = f"grpc://{server.address}/models/small"
    save_file({"w": noise(1, 50, 40)}, tmp_path / "a.safetensors")
    save_file({"w": noise(2, 50, 40)}, tmp_path / "b.safetensors")
    verbs = [
        ["init", place],
        ["-C", place, "push", str(tmp_path / "a.safetensors"), "m@main", "-m", "one"],
        ["-C", place, "push", str(tmp_path / "b.safetensors"), "m@main", "-m", "two"],
        ["-C", place, "log", "m@main"],
        ["-C", place, "show", "m@main"],
        ["-C", place, "diff", "m@v1", "m@v2"],
        ["-C", place, "distance", "m@v1", "m@v2"],
        ["-C", place, "tag", "m@good", "m@v1"],
        ["-C", place, "stats"],
        ["-C", place, "verify", "--deep"],
        ["-C", place, "checkout", "m@good", str(tmp_path / "out")],
    ]
    for verb in verbs:
        assert cli.run(verb) == 0, (verb, capsys.readouterr().err)
    assert (tmp_path / "out/a.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert cli.run(["-C", place, "show", "m@nope"]) == lamella.NotFoundError.exit_code


# -- what travels ------------------------------------------------------------------------------------------------------


def test_what_the_service_has_is_not_sent_again(far, proxy):
    far.push(TENSORS, "bert@main")
    before = proxy.sent
    far.push({**TENSORS, "norm": noise(8, 64)}, "bert@main")
    assert proxy.sent - before < 40_000


def test_one_layer_costs_its_own_bytes(uncached, far, proxy):
    far.push(TENSORS, "bert@main")
    before = proxy.received
    got = far.checkout("bert@main", include="layer.*")
    assert bits(got) == bits({"layer.weight": TENSORS["layer.weight"]})
    assert proxy.received - before < 1.02 * TENSORS["layer.weight"].nbytes


def test_memory_that_holds_a_version_is_sent_only_what_changed(far, proxy):
    second = nudged(TENSORS)
    far.push(TENSORS, "bert@main")
    far.push(second, "bert@main")
    held = {name: np.array(tensor) for name, tensor in TENSORS.items()}
    before = proxy.received
    far.checkout("bert@v2", into=held, have="bert@v1")
    assert bits(held) == bits(second)
    assert proxy.received - before < 0.05 * sum(tensor.nbytes for tensor in TENSORS.values())


def test_memory_that_does_not_hold_what_it_is_said_to_is_found_out(repo):
    repo.push(TENSORS, "bert@main")
    repo.push(nudged(TENSORS), "bert@main")
    with pytest.raises(lamella.InvalidInputError) as error:
        repo.checkout("bert@v2", into={name: np.zeros_like(tensor) for name, tensor in TENSORS.items()}, have="bert@v1")
    assert error.value.kind == "not_held"


# -- what goes wrong ---------------------------------------------------------------------------------------------------

LONG = {f"w{number}": np.random.default_rng(number).integers(0, 256, 4 << 20, np.uint8) for number in range(8)}
LONG_NBYTES = sum(tensor.nbytes for tensor in LONG.values())


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_push_whose_stream_is_cut_goes_on_where_it_was(far, proxy, share):
    proxy.cut_sent_at = int(share * LONG_NBYTES)
    version = far.push(LONG, "bert@main")
    assert proxy.cuts == 1
    assert bits(far.checkout(version.id)) == bits(LONG)
    # What is sent again is at most what was under way: a window, and what lay in sockets.
    assert proxy.sent < LONG_NBYTES + WINDOW_NBYTES


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_checkout_whose_stream_is_cut_goes_on_where_it_was(uncached, far, proxy, share):
    far.push(LONG, "bert@main")
    before = proxy.received
    proxy.cut_received_at = before + int(share * LONG_NBYTES)
    assert bits(far.checkout("bert@main")) == bits(LONG)
    assert proxy.cuts == 1
    assert proxy.received - before < 1.6 * LONG_NBYTES


def test_a_commit_whose_answer_is_lost_happens_once(far, proxy, repo, monkeypatch):
    commit = Session.commit

    def committed(session, description):
        recorded = commit(session, description)
        if not proxy.cuts:
            proxy.cut_next_reply()
        return recorded

    monkeypatch.setattr(Session, "commit", committed)
    version = far.push(TENSORS, "bert@main")
    assert proxy.cuts == 1
    assert version.number == 1
    assert [found.id for found in repo.log("bert@main")] == [version.id]


def test_a_commit_whose_answer_and_session_are_lost_is_asked_for(far, proxy, repo, monkeypatch):
    commit, found = Session.commit, []

    def committed(session, description):
        recorded = commit(session, description)
        proxy.cut_next_reply()
        found[0]._sessions.clear()
        return recorded

    begin = Sessions.begin

    def began(held, *arguments, **options):
        found.append(held)
        return begin(held, *arguments, **options)

    monkeypatch.setattr(Session, "commit", committed)
    monkeypatch.setattr(Sessions, "begin", began)
    version = far.push(TENSORS, "bert@main")
    assert proxy.cuts == 1
    assert [found.id for found in repo.log("bert@main")] == [version.id]


@pytest.mark.parametrize("call", ["plan", "receive", "flush", "commit"])
def test_a_push_that_the_service_forgot_begins_anew(repo, server, monkeypatch, call):
    real, forgotten = getattr(Session, call), []

    def forget(session, *arguments):
        if not forgotten:
            forgotten.append(session)
            server._rpcs.sessions._sessions.clear()
            raise lamella.NotFoundError("gone", kind="no_session")
        return real(session, *arguments)

    monkeypatch.setattr(Session, call, forget)
    version = repo.push(TENSORS, "bert@main")
    assert len(forgotten) == 1
    assert bits(repo.checkout(version.id)) == bits(TENSORS)
    assert [found.id for found in repo.log("bert@main")] == [version.id]


def test_a_push_that_the_service_keeps_forgetting_is_given_up(repo, server, monkeypatch):
    def forget(session, *arguments):
        raise lamella.NotFoundError("gone", kind="no_session")

    monkeypatch.setattr(Session, "plan", forget)
    with pytest.raises(lamella.StorageError) as error:
        repo.push(TENSORS, "bert@main")
    assert (error.value.kind, error.value.transient) == ("session_lost", True)


def test_a_push_goes_on_when_the_server_is_started_anew(tmp_path, repo, server, monkeypatch):
    """Its sessions are gone then, and all that was not committed."""
    servers = [server]
    plan, wait = Session.plan, channel.Patience.wait

    def planned(session, first, cells):
        if len(servers) == 1:
            raise lamella.StorageError("about to go down", transient=True)
        return plan(session, first, cells)

    def restart(patience, error):
        if len(servers) == 1:
            server.stop(grace_s=0)
            servers.append(Server(str(tmp_path / "root"), server.address, insecure_loopback=True))
            servers[1].start()
        wait(patience, error)

    monkeypatch.setattr(Session, "plan", planned)
    monkeypatch.setattr(channel.Patience, "wait", restart)
    try:
        version = repo.push(TENSORS, "bert@main")
        assert bits(repo.checkout(version.id)) == bits(TENSORS)
        assert len(servers) == 2
    finally:
        servers[-1].stop(grace_s=0)


def test_a_deletion_whose_answer_is_lost_is_done(far, proxy, repo, monkeypatch):
    far.push(TENSORS, "bert@main")
    far.tag("bert@good", "bert@v1")
    real = PackedStore.update_refs

    def update(store, updates):
        real(store, updates)
        if not proxy.cuts:
            proxy.cut_next_reply()

    monkeypatch.setattr(PackedStore, "update_refs", update)
    far.delete_ref("bert@good")
    assert proxy.cuts == 1
    assert [ref.name for ref in repo.refs("bert")] == ["main"]


def test_a_service_that_is_not_there_is_one_line_for_people(server, tmp_path):
    address = server.address
    server.stop(grace_s=0)
    main = "import sys; from lamella.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "-C", f"grpc://{address}/team", "stats"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == lamella.StorageError.exit_code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lamella: cannot reach the service at {address}: check the address")


# -- places and secrets ------------------------------------------------------------------------------------------------


def test_a_loopback_host_is_spoken_to_in_the_clear_and_others_are_not():
    assert parse_url("grpc://localhost/a/b") == Place("localhost", 7443, "a/b", secure=False)
    assert parse_url("grpc://[::1]:80/a").address == "[::1]:80"
    assert not parse_url("grpc://127.0.0.1:1/a").secure
    assert parse_url("grpc://example.org/a").secure
    assert parse_url("grpcs://localhost/a").secure
    assert parse_url("grpc://127.0.0.1.example.org/a").secure


@pytest.mark.parametrize(
    "url",
    [
        "grpc://lml_s3cret@host/a",
        "grpc://user:lml_s3cret@host/a",
        "grpc://host/a?token=lml_s3cret",
        "grpc://host/a#lml_s3cret",
        "grpc://host",
        "grpc:///a",
        "grpc://host:99999999/a",
        "grpc://host:0/a",
    ],
)
def test_a_url_that_holds_a_secret_or_no_repository_is_refused_without_repeating_it(url):
    with pytest.raises(lamella.InvalidInputError) as error:
        lamella.open(url)
    assert error.value.kind == "bad_url"
    assert "s3cret" not in f"{error.value!r} {error.value.context}"


def test_a_token_is_shown_to_the_server_and_to_nobody_else(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(tmp_path / "root") as server:
        secret, _ = server._tokens.create("ann", "admin")
        weak, _ = server._tokens.create("bob", "reader")
        monkeypatch.setenv("LAMELLA_TOKEN", secret)
        with lamella.init(f"grpc://{server.address}/team") as repo:
            repo.push(TENSORS, "bert@main")
            seen = [repr(repo), repr(repo._store), repr(repo._store.channel), repr(vars(repo._store.channel))]
            seen.append(repr(repo._store.channel._credentials))
        monkeypatch.setenv("LAMELLA_TOKEN", weak)
        with (
            lamella.open(f"grpc://{server.address}/team") as repo,
            pytest.raises(lamella.PermissionDeniedError) as error,
        ):
            repo.push(nudged(TENSORS), "bert@main")
        seen += [repr(error.value), str(error.value.context)]
        monkeypatch.setenv("LAMELLA_TOKEN", "lml_wrong")
        with pytest.raises(lamella.LamellaError) as error:
            lamella.open(f"grpc://{server.address}/team")
        seen += [repr(error.value), caplog.text]
    assert not any(text in one for text in (secret, weak, "lml_wrong") for one in seen)


def test_a_token_may_be_renewed_in_its_file(tmp_path, monkeypatch):
    with serving(tmp_path / "root") as server:
        first, _ = server._tokens.create("ann", "admin")
        second, _ = server._tokens.create("bob", "reader")
        file = tmp_path / "token"
        file.write_text(f"{first}\n")
        monkeypatch.setenv("LAMELLA_TOKEN_FILE", str(file))
        with lamella.init(f"grpc://{server.address}/team") as repo:
            file.write_text(second)
            with pytest.raises(lamella.PermissionDeniedError):
                repo.push(TENSORS, "bert@main")
            file.unlink()
            with pytest.raises(lamella.InvalidInputError, match="LAMELLA_TOKEN_FILE"):
                repo.models()


def test_with_tls_and_a_token_all_is_as_without(tmp_path, monkeypatch):
    with secure_service(tmp_path) as service:
        service.be_known(monkeypatch)
        with lamella.init(f"grpcs://{service.server.address}/team") as repo:
            repo.push(TENSORS, "bert@main")
            assert bits(repo.checkout("bert@main")) == bits(TENSORS)


def test_a_server_that_nobody_vouches_for_is_not_spoken_to(tmp_path, monkeypatch):
    with secure_service(tmp_path) as service:
        service.be_known(monkeypatch)
        monkeypatch.delenv("LAMELLA_CA")
        with pytest.raises(lamella.StorageError):
            lamella.open(f"grpcs://{service.server.address}/team")
        with pytest.raises(lamella.StorageError):
            lamella.open(f"grpc://{service.server.address}/team")


def test_a_token_that_cannot_be_one_is_not_repeated(monkeypatch):
    monkeypatch.setenv("LAMELLA_TOKEN", "s3cret with\nline")
    with pytest.raises(lamella.InvalidInputError) as error:
        Credentials.of().metadata()
    assert "s3cret" not in str(error.value)
    assert "s3cret" not in repr(Credentials.of())


def test_a_certificate_wants_its_key(monkeypatch):
    monkeypatch.setenv("LAMELLA_CLIENT_CERT", "/nowhere")
    with pytest.raises(lamella.InvalidInputError, match="LAMELLA_CLIENT_KEY"):
        Credentials.of()


def test_files_that_cannot_be_read_are_named(monkeypatch):
    monkeypatch.setenv("LAMELLA_CA", "/nowhere/ca.pem")
    with pytest.raises(lamella.InvalidInputError, match="LAMELLA_CA"):
        Channel(parse_url("grpcs://localhost/a"), Credentials.of())


def test_without_grpc_it_is_said_what_to_install():
    code = (
        "import sys; sys.modules['grpc'] = None\n"
        "import lamella\n"
        "try: lamella.open('grpc://localhost/a')\n"
        "except lamella.InvalidInputError as error: print(error.kind)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["missing_extra"]


def test_grpc_is_imported_for_such_a_url_only():
    code = "import sys, lamella; lamella.init('memory://x'); print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False"]


# -- the cache ---------------------------------------------------------------------------------------------------------


def cached_files(tmp_path):
    return [path for path in (tmp_path / "cache/lamella/chunks").glob("*/*/*") if path.is_file()]


def test_what_was_checked_out_once_is_not_sent_again(server, proxy, repo, monkeypatch, tmp_path):
    repo.push(LONG, "bert@main")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    url = f"grpc://{proxy.address}/team"
    with lamella.open(url) as first:
        first.checkout("bert@main")
    before = proxy.received
    with lamella.open(url) as second:
        assert bits(second.checkout("bert@main")) == bits(LONG)
    assert proxy.received - before < 4_000


def test_a_version_that_follows_a_cached_one_is_sent_as_deltas(proxy, repo, monkeypatch, tmp_path):
    weights = {f"w{number}": noise(number, 1024, 1024) for number in range(4)}
    second = nudged(weights)
    repo.push(weights, "bert@main")
    repo.push(second, "bert@main")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with lamella.open(f"grpc://{proxy.address}/team") as far:
        far.checkout("bert@v1")
        before = proxy.received
        assert bits(far.checkout("bert@v2")) == bits(second)
        assert proxy.received - before < 0.05 * 4 * (4 << 20)


def test_what_was_pushed_is_the_base_of_the_next_push(far, proxy):
    weights = {f"w{number}": noise(number, 1024, 1024) for number in range(4)}
    second = nudged(weights)
    far.push(weights, "bert@main")
    before = proxy.sent
    far.push(second, "bert@main")
    assert proxy.sent - before < 0.05 * 4 * (4 << 20)
    assert bits(far.checkout("bert@v2")) == bits(second)


def test_every_second_version_of_a_run_is_kept_as_deltas(far, proxy, tmp_path):
    versions = [{f"w{number}": noise(number, 1024, 1024) for number in range(4)}]
    kept = []
    for number in range(4):
        far.push(versions[-1], "bert@main")
        kept.append(sum(path.stat().st_size for path in cached_files(tmp_path)))
        versions.append(nudged(versions[-1], seed=number))
    whole = 4 * (4 << 20)
    added = np.diff([0, *kept]) / whole
    assert [round(share) for share in added] == [1, 0, 1, 0]
    assert max(added[1], added[3]) < 0.05
    before = proxy.sent
    far.push(versions[4], "bert@main")  # its base is a delta here
    assert proxy.sent - before < 0.05 * whole
    before = proxy.received
    with lamella.open(f"grpc://{proxy.address}/team") as again:
        for number, version in enumerate(versions, 1):
            assert bits(again.checkout(f"bert@v{number}")) == bits(version)
    assert proxy.received - before < 0.01 * whole


@pytest.mark.parametrize("harm", ["flip", "header", "cut", "empty", "base"])
def test_a_damaged_delta_in_the_cache_is_as_good_as_none(far, proxy, tmp_path, harm):
    first = {f"w{number}": noise(number, 1024, 1024) for number in range(4)}
    second = nudged(first)
    third = nudged(second, seed=3)
    far.push(first, "bert@main")
    far.push(second, "bert@main")
    deltas = [path for path in cached_files(tmp_path) if path.suffix == ".delta"]
    assert len(deltas) == 4
    for path in deltas:
        data = bytearray(path.read_bytes())
        if harm == "base":
            path.parent.parent.joinpath(data[:1].hex(), data[:32].hex()).unlink()
        elif harm in ("flip", "header"):
            data[len(data) // 2 if harm == "flip" else 35] ^= 0xFF
            path.write_bytes(data)
        else:
            path.write_bytes({"cut": data[:-1], "empty": b""}[harm])
    before = proxy.sent
    far.push(third, "bert@main")
    assert proxy.sent - before > 0.5 * 4 * (4 << 20)
    with lamella.open(f"grpc://{proxy.address}/team") as again:
        assert bits(again.checkout("bert@v2")) == bits(second)
        assert bits(again.checkout("bert@v3")) == bits(third)


def test_without_a_cache_chunks_are_sent_whole_and_stored_as_deltas(uncached, far, proxy, tmp_path, local):
    weights = {f"w{number}": noise(number, 1024, 1024) for number in range(4)}
    second = nudged(weights)
    for place in far, local:
        place.push(weights, "bert@main")
    before = proxy.sent
    for place in far, local:
        place.push(second, "bert@main")
    assert proxy.sent - before > 0.5 * 4 * (4 << 20)
    assert bits(far.checkout("bert@v2")) == bits(second)
    ours, theirs = far.stats().stored_nbytes, local.stats().stored_nbytes
    assert abs(ours - theirs) < 0.01 * theirs
    assert cached_files(tmp_path) == []


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove", "directory"])
def test_a_damaged_cache_is_as_good_as_none(repo, server, tmp_path, harm):
    first = {f"w{number}": noise(number, 1024, 1024) for number in range(4)}
    second = nudged(first)
    repo.push(first, "bert@main")
    for path in cached_files(tmp_path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()
        if harm == "directory":
            path.mkdir()
        elif harm != "remove":
            path.write_bytes({"flip": data, "cut": data[:-1], "empty": b""}[harm])
    repo.push(second, "bert@main")
    with lamella.open(f"grpc://{server.address}/team") as again:
        assert bits(again.checkout("bert@v1")) == bits(first)
        assert bits(again.checkout("bert@v2")) == bits(second)


def test_a_cache_without_room_is_no_error(repo, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ChunkCache, "_write", staticmethod(full))
    repo.push(TENSORS, "bert@main")
    assert bits(repo.checkout("bert@main")) == bits(TENSORS)
    assert cached_files(tmp_path) == []


def test_what_is_said_to_be_a_chunk_and_is_not_is_not_believed(tmp_path):
    cache = ChunkCache(tmp_path / "chunks", 1 << 20, "host:7443")
    real, other = bytes(5000), bytes(4999) + b"x"
    cache.add(chunk_id(real), other)
    assert cache.has(chunk_id(real))
    assert cache.get(chunk_id(real)) is None
    assert not cache.has(chunk_id(real))


def test_a_cache_keeps_to_its_bound_and_what_was_used_last(tmp_path):
    cache = ChunkCache(tmp_path / "chunks", 1 << 20, "host:7443")
    chunks = [bytes([number]) * 10_000 for number in range(250)]
    for number, chunk in enumerate(chunks):
        cache.add(chunk_id(chunk), chunk)
        os.utime(cache._path(chunk_id(chunk)), (number, number))
        assert cache.get(chunk_id(chunks[0])) == chunks[0]
    kept = [path.stat().st_size for path in (tmp_path / "chunks").glob("*/*/*")]
    assert 0.7 * (1 << 20) < sum(kept) < 1.1 * (1 << 20)
    assert cache.get(chunk_id(chunks[-1])) == chunks[-1]
    assert cache.get(chunk_id(chunks[1])) is None


def test_a_process_that_adds_little_does_not_count_what_is_there(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(ChunkCache, "_evict", counted.append)
    for number in range(20):
        data = bytes([number]) * 10_000
        ChunkCache(tmp_path / "chunks", 1 << 50, "host:7443").add(chunk_id(data), data)
    assert counted == []


def test_a_cache_is_for_its_user_alone(repo, tmp_path):
    repo.push(TENSORS, "bert@main")
    assert cached_files(tmp_path)
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "cache/lamella/chunks").glob("**/*")} == {0}


@pytest.mark.parametrize("size", ["x", "-1", "1e9"])
def test_a_size_that_is_no_number_is_refused(monkeypatch, size):
    monkeypatch.setenv("LAMELLA_CACHE_NBYTES", size)
    with pytest.raises(lamella.InvalidInputError, match="LAMELLA_CACHE_NBYTES"):
        ChunkCache.of("host:7443")


def test_a_trainer_may_push_as_often_as_it_likes(repo, monkeypatch):
    monkeypatch.setattr(quotas, "PUSHES_OF_ONE", 10)
    monkeypatch.setattr(sessions, "RECORDED_KEPT", 5)
    for number in range(15):
        repo.push({"w": np.array([number])}, "m@main")
    assert repo.version("m@main").number == 15


def test_names_may_be_as_long_as_anywhere(uncached, repo):
    """More of them, and longer ones, than a message has room for."""
    tensors = {f"{number}" + "é" * (MAX_NAME_NBYTES // 2 - 8): np.full(9, number, np.int64) for number in range(600)}
    repo.push(tensors, "bert@main")
    assert bits(repo.checkout("bert@main")) == bits(tensors)


# -- a service that is not to be trusted -------------------------------------------------------------------------------


def test_bytes_that_are_not_what_the_version_names_are_not_taken(uncached, repo, monkeypatch, tmp_path):
    """A service can say of any bytes that they are the chunk, with a digest that fits."""
    repo.push(TENSORS, "bert@main")

    def another(reading):
        *_, last = reading.chain
        wrong = replace(last, encoding=Encoding.RAW, payload=bytes(last.decoded_nbytes), base=None, digest=None)
        weights = reading.cell.tensor == "embedding"
        return wire.encode_reading(reading._replace(chain=(wrong,)) if weights else reading)

    monkeypatch.setattr(rpcs, "encode_reading", another)
    memory = {name: np.array(tensor) for name, tensor in TENSORS.items()}
    for read in (
        lambda: repo.checkout("bert@main"),
        lambda: repo.checkout("bert@main", into=memory),
        lambda: repo.checkout("bert@main", out=tmp_path / "files"),
        lambda: repo.version("bert@main")["embedding"][3],
    ):
        with pytest.raises(lamella.CorruptionError) as error:
            read()
        assert error.value.kind == "bad_chunk"
    assert bits(repo.checkout("bert@main", include="layer.*")) == bits({"layer.weight": TENSORS["layer.weight"]})


@pytest.mark.parametrize("way", ["memory", "cache"])
def test_a_service_cannot_leave_out_what_has_changed(way, repo, monkeypatch):
    """It would keep whoever follows at old weights, and nobody would notice."""
    weights = {"w": noise(1, 1024, 1024)}
    repo.push(weights, "bert@main")
    memory = repo.checkout("bert@v1")
    repo.push(nudged(weights), "bert@main")

    def nothing(reading):
        return wire.encode_reading(reading._replace(chain=()) if reading.cell.tensor else reading)

    monkeypatch.setattr(rpcs, "encode_reading", nothing)
    if way == "cache":  # the second version is not there, but the first, on which it stands
        first = chunk_id(weights["w"].tobytes())
        path = repo._store.cache._path
        monkeypatch.setattr(repo._store.cache, "_path", lambda chunk: path(chunk) if chunk == first else None)
    with pytest.raises(lamella.CorruptionError) as error:
        repo.checkout("bert@v2", **({"into": memory, "have": "bert@v1"} if way == "memory" else {}))
    assert error.value.kind == "another_chunk"


def test_a_service_learns_nothing_of_what_is_cached_of_another(repo, monkeypatch, tmp_path):
    """By a base that it names, a service could have a delta made against weights that it was never shown."""
    secret = {"w": noise(1, 1024, 1024)}
    repo.push(secret, "bert@main")
    named = chunk_id(secret["w"].tobytes())

    def ask_for_more(missing):
        answer = wire.encode_answer(missing)
        return pb.Answer(missing=True, base=named) if answer.missing else answer

    monkeypatch.setattr(rpcs, "encode_answer", ask_for_more)
    sent = []
    monkeypatch.setattr(
        RemotePush, "base", lambda push, missing, base=RemotePush.base: sent.append(base(push, missing))
    )
    with serving(tmp_path / "other") as other, lamella.init(f"grpc://{other.address}/team") as curious:
        curious.push(nudged(secret), "bert@main")
    assert sent == [None] * len(sent) != []


def test_a_version_of_another_name_than_was_asked_for_is_not_taken(repo, monkeypatch):
    repo.push({"w": np.array([1])}, "bert@main")
    repo.push({"w": np.array([2])}, "gpt@main")
    repo.push({"w": np.array([3])}, "bert@main")
    resolve = PackedStore.resolve
    for asked, answered in (("bert@main", "gpt@main"), ("bert@v1", "bert@v2")):
        monkeypatch.setattr(PackedStore, "resolve", lambda self, text, answered=answered: resolve(self, answered))
        with pytest.raises(lamella.CorruptionError) as error:
            repo.version(asked)
        assert error.value.kind == "another_version"


def test_threads_that_read_one_manifest_at_once_all_have_it(uncached, repo, monkeypatch):
    repo.push(TENSORS, "bert@main")
    store = repo._store
    pages = _Pages(store, store.version(store.resolve("bert@main")))
    both = threading.Barrier(2, timeout=60)

    def set_together(self, name, value):
        object.__setattr__(self, name, value)
        both.wait()

    monkeypatch.setattr(_Pages, "__setattr__", set_together)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(pages.load, (0, 0))
    assert first == second


# -- following ---------------------------------------------------------------------------------------------------------


def test_a_follower_is_given_versions_as_they_are_published(repo, server):
    first = repo.push({"w": np.array([1])}, "m@main")
    with lamella.open(f"grpc://{server.address}/team") as other:
        followed = other.watch("m@main")
        assert next(followed).id == first.id
        for number in range(3):
            pushed = repo.push({"w": np.array([number])}, "m@main", message=str(number))
            assert next(followed).id == pushed.id
        followed.close()
        second = other.watch("m@main", after="m@v1")
        assert next(second).id == pushed.id
        repo.branch("m@main", "m@v1")
        assert next(second).number == 1


def test_a_follower_goes_on_after_a_cut(far, proxy, repo):
    repo.push({"w": np.array([1])}, "m@main")
    followed = far.watch("m@main")
    next(followed)
    proxy.cut_next_reply()
    pushed = repo.push({"w": np.array([2])}, "m@main")
    assert next(followed).id == pushed.id
    assert proxy.cuts == 1


def test_a_call_that_ends_with_its_deadline_is_renewed(repo, server, monkeypatch):
    first = repo.push({"w": np.array([1])}, "m@main")
    asked = []
    stream = Channel.stream

    def short(channel, name, request):
        replies = stream(channel, name, request)
        if name != "Versions.Watch":
            return replies
        asked.append(request.after)
        return replies if len(asked) > 1 else (message for message in [next(replies)])

    with lamella.open(f"grpc://{server.address}/team") as other:
        monkeypatch.setattr(Channel, "stream", short)
        followed = other.watch("m@main")
        assert next(followed).id == first.id
        pushed = repo.push({"w": np.array([2])}, "m@main")
        assert next(followed).id == pushed.id
    assert asked == [0, 1]


def test_a_local_repository_is_followed_too(local, monkeypatch):
    first = local.push({"w": np.array([1])}, "m@main")
    followed = local.watch("m@main")
    assert next(followed).id == first.id
    pushed = []
    monkeypatch.setattr(
        packed.time, "sleep", lambda _: pushed.append(local.push({"w": np.array([2])}, "m@main", message="two"))
    )
    assert next(followed).id == pushed[0].id


def test_what_is_followed_has_to_be_there_and_of_one_model(repo, local):
    for place in repo, local:
        place.push({"w": np.array([1])}, "m@main")
        place.push({"w": np.array([1])}, "n@main")
        with pytest.raises(lamella.RefNotFoundError):
            next(place.watch("m@other"))
        with pytest.raises(lamella.InvalidInputError, match="a version of n"):
            next(place.watch("m@main", after="n@v1"))


def test_a_follower_needs_little_more_than_the_deltas(far, proxy, repo):
    """An RL-like step changes 1 % of the elements of a model that a follower holds."""
    weights = {f"w{number}": noise(number, 1024, 1024, dtype=ml_dtypes.bfloat16) for number in range(4)}
    total = sum(tensor.nbytes for tensor in weights.values())
    repo.push(weights, "m@main")
    held = {name: tensor.copy() for name, tensor in far.checkout("m@main").items()}
    followed = far.watch("m@main", after="m@v1")
    random = np.random.default_rng(5)
    for _ in range(2):
        for tensor in weights.values():
            bits = tensor.view(np.uint16)
            bits[random.random(bits.shape) < 0.01] += 1
        pushed = repo.push(weights, "m@main")
        before = proxy.received
        version = next(followed)
        assert version.id == pushed.id
        far.checkout(version.id, into=held, have=f"m@v{version.number - 1}")
        assert all(held[name].tobytes() == weights[name].tobytes() for name in weights)
        assert proxy.received - before < 0.012 * total


# -- a service that lies -----------------------------------------------------------------------------------------------


def test_another_version_than_was_asked_for_is_not_taken(repo, monkeypatch):
    first = repo.push({"w": np.array([1])}, "m@main")
    second = repo.push({"w": np.array([2])}, "m@main")
    real = PackedStore.version
    monkeypatch.setattr(PackedStore, "version", lambda store, id: real(store, {first.id: second.id}.get(id, id)))
    repo._store._versions.clear()
    with pytest.raises(lamella.CorruptionError) as error:
        repo._store.version(first.id)
    assert error.value.kind == "another_version"


def test_another_chunk_than_the_version_names_is_not_taken(uncached, repo, server, monkeypatch):
    weights = {"a": noise(1, 5000), "b": noise(2, 5000)}
    repo.push(weights, "m@main")
    real = PackedStore.read

    def lying(store, id, cells, have=None, *, held=None):
        swapped = {"a": "b", "b": "a", None: None}
        for cell, chain in real(store, id, [Cell(swapped[cell.tensor], cell.number) for cell in cells]):
            yield Reading(Cell(swapped[cell.tensor], cell.number), chain)

    monkeypatch.setattr(PackedStore, "read", lying)
    with (
        lamella.open(f"grpc://{server.address}/team") as again,
        pytest.raises(lamella.CorruptionError) as error,
    ):
        again.checkout("m@main")
    assert error.value.kind == "another_chunk"


def test_other_bytes_than_the_chunk_are_found_by_who_checks(uncached, repo, server, monkeypatch):
    weights = {"a": noise(1, 5000)}
    repo.push(weights, "m@main")
    real = PackedStore.read

    def lying(store, id, cells, have=None, *, held=None):
        for cell, (blob,) in real(store, id, cells):
            wrong = (
                blob
                if cell.tensor is None
                else replace(blob, encoding=Encoding.RAW, digest=None, payload=bytes(20_000))
            )
            yield Reading(cell, (wrong,))

    monkeypatch.setattr(PackedStore, "read", lying)
    with lamella.open(f"grpc://{server.address}/team") as again:
        with pytest.raises(lamella.CorruptionError) as error:
            again.checkout("m@main", verify="chunk")
        assert error.value.kind == "bad_chunk"


def test_a_page_that_is_another_is_found_always(uncached, repo, server, monkeypatch):
    repo.push({"a": noise(1, 5000)}, "m@main")
    real = PackedStore.read

    def lying(store, id, cells, have=None, *, held=None):
        for cell, (blob,) in real(store, id, cells):
            yield Reading(
                cell, (replace(blob, encoding=Encoding.RAW, digest=None, width=1, payload=bytes(blob.decoded_nbytes)),)
            )

    monkeypatch.setattr(PackedStore, "read", lying)
    with (
        lamella.open(f"grpc://{server.address}/team") as again,
        pytest.raises(lamella.CorruptionError) as error,
    ):
        list(again.version("m@main"))
    assert error.value.kind == "bad_chunk"
