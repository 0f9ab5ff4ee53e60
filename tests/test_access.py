"""Who may do what: every role at every rpc in every kind of place; tokens; certificates; what nobody gets to see."""

import logging
import socket
import ssl
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from certificates import LOOPBACK, Authority
from service import Failure, WireClient, failure_of, prepare_by_wire, push_by_wire, serving, write_messages

from lamella_engine.content_store.acting import new_push_id
from lamella_engine.errors import AlreadyExistsError, CorruptionError, InvalidInputError, NotFoundError
from lamella_engine.format.version import version_id
from lamella_engine.objects import open_objects
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service import server as server_module
from lamella_engine.service import tokens as tokens_module
from lamella_engine.service.access import NOBODY, POLICY, Principal
from lamella_engine.service.listening import Tls
from lamella_engine.service.server import Answered, Server
from lamella_engine.service.tokens import FRESH_S, Tokens
from lamella_engine.wire import METHODS

Status = grpc.StatusCode

# -- what is expected, in the words of the threat model ----------------------------------------------------------------

OPENING = {"Repositories.Describe"}
READING = {
    "Repositories.Stats",
    "Versions.Resolve",
    "Versions.Get",
    "Versions.Ancestors",
    "Versions.Models",
    "Versions.Refs",
    "Versions.Watch",
    "Versions.Locate",
    "Versions.Read",
    "Jobs.Diff",
    "Jobs.Distance",
}
PUSHING = {
    "Pushes.Begin",
    "Pushes.Consider",
    "Pushes.Plan",
    "Pushes.Write",
    "Pushes.Grant",
    "Pushes.Commit",
    "Pushes.Part",
    "Pushes.Join",
    "Pushes.Outcome",
    "Pushes.Abandon",
}
MOVING_REFS = {"Versions.UpdateRefs"}
VERIFYING = {"Jobs.Verify"}
AUDITING = {"Jobs.Audit"}
CREATING = {"Repositories.Create"}
MANAGING = {"Access.CreateToken", "Access.ListTokens", "Access.RevokeToken"}
IDENTIFYING = {"Access.WhoAmI"}
ANYBODYS = OPENING | IDENTIFYING
OF_A_REPOSITORY = OPENING | READING | PUSHING | MOVING_REFS | VERIFYING | AUDITING | CREATING
EVERYTHING = OF_A_REPOSITORY | MANAGING | IDENTIFYING

MAY = {
    "reader": ANYBODYS | READING,
    "writer": ANYBODYS | READING | PUSHING,
    "maintainer": ANYBODYS | READING | PUSHING | MOVING_REFS | VERIFYING,
    "gc-operator": ANYBODYS | READING | VERIFYING,
    "auditor": ANYBODYS | VERIFYING | AUDITING,
    # Of some repositories only: whoever could make tokens could make one for all.
    "admin": OF_A_REPOSITORY | IDENTIFYING,
    "admin of everything": EVERYTHING,
}

OWN, SHARED, OTHERS, MISSING = "team/alpha", "pool/shared", "team2/beta", "team2/none"
GRANTED = ("team/*", SHARED)
EXISTING = (OWN, SHARED, OTHERS)
IN_THE_GRANT = (OWN, SHARED)
BADLY_NAMED_IN_THE_GRANT = ("team/", "team/../team2/beta", "team/alpha/log", "team/Alpha", "team/alpha\n", "team/*")
NAMES_OF_NONE = ("team/nihil", *BADLY_NAMED_IN_THE_GRANT)
BADLY_NAMED = (
    *BADLY_NAMED_IN_THE_GRANT,
    *("", "/", "..", "../team2/beta", "team2/beta/", "TEAM2/beta", "team2//beta", "*", "team2/b\x00ta"),
)
PLACES = (*EXISTING, MISSING, "team/nihil", *BADLY_NAMED)

WEIGHTS = {"w": np.arange(64, dtype=np.float32)}


def test_every_rpc_is_in_the_table():
    assert set(METHODS) == EVERYTHING


# -- the matrix --------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A server over TLS with two repositories that have a version each, and somebody of every role."""

    root: Path
    server: Server
    answered: list[Answered]
    authority: Authority
    clients: dict[str, WireClient] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    """Repository -> id of its version."""
    pushes: dict[str, str] = field(default_factory=dict)
    """Repository -> id of a push that an admin has under way."""

    def client(self, **options: Any) -> WireClient:
        roots = grpc.ssl_channel_credentials(self.authority.certificate)
        return WireClient(self.server.address, credentials=roots, **options)


@contextmanager
def tls_server(directory: Path, authority: Authority, **options: Any) -> Iterator[Server]:
    certificate, key = authority.issue("server", LOOPBACK).write(directory, "server")
    with serving(directory / "root", tls=Tls(certificate, key, options.pop("client_ca", None)), **options) as server:
        yield server


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("access")
    authority, answered = Authority(), []
    with ExitStack() as stack:
        server = stack.enter_context(tls_server(directory, authority, observe=answered.append))
        world = World(directory / "root", server, answered, authority)
        tokens = Tokens(open_objects(str(world.root)))
        for role in MAY:
            everything = role == "admin of everything"
            repositories = ("*",) if everything else GRANTED
            secret, _ = tokens.create(role, role.split()[0], repositories=repositories)
            world.secrets[role] = secret
            world.clients[role] = stack.enter_context(world.client(token=secret))
        admin = world.clients["admin of everything"]
        for repository in (OWN, SHARED, OTHERS):
            admin.call("Repositories.Create", pb.CreateRequest(repository=repository, max_depth=8))
            world.versions[repository] = version_id(push_by_wire(admin, repository, "bert@main", WEIGHTS).description)
            world.pushes[repository] = new_push_id()
            admin.call("Pushes.Begin", begin(repository, world.pushes[repository]))
        yield world


def begin(repository: str, push: str) -> pb.BeginRequest:
    return pb.BeginRequest(repository=repository, push=push, model="bert", branch="dev-1")


def request(world: World, rpc: str, repository: str, push: str) -> Any:
    """Return a request that succeeds, if it is allowed and ``push`` is the caller's; but see ``expected``."""
    version = world.versions.get(repository, world.versions[OWN])
    whole = pb.RepositoryRequest(repository=repository)
    one = pb.VersionRequest(repository=repository, id=version)
    cells = pb.ReadRequest(repository=repository, version=version, cells=[pb.CellRun(tensor="w", count=1)])
    pair = pb.PairRequest(repository=repository, a="bert@v1", b="bert@main")
    pushed = pb.PushRequest(repository=repository, push=push)
    update = pb.RefUpdate(model="bert", name="released", kind="tag", number=1)
    return {
        "Repositories.Create": lambda: pb.CreateRequest(repository=repository, max_depth=99),
        "Repositories.Describe": lambda: whole,
        "Repositories.Stats": lambda: whole,
        "Versions.Resolve": lambda: pb.ResolveRequest(repository=repository, revision="bert@main"),
        "Versions.Get": lambda: one,
        "Versions.Ancestors": lambda: one,
        "Versions.Models": lambda: whole,
        "Versions.Refs": lambda: pb.RefsRequest(repository=repository, model="bert"),
        "Versions.UpdateRefs": lambda: pb.UpdateRefsRequest(repository=repository, updates=[update]),
        "Versions.Watch": lambda: pb.WatchRequest(repository=repository, model="bert", ref="main"),
        "Versions.Locate": lambda: cells,
        "Versions.Read": lambda: cells,
        "Pushes.Begin": lambda: begin(repository, push),
        "Pushes.Consider": lambda: pb.ConsiderRequest(repository=repository, push=push),
        "Pushes.Plan": lambda: pb.PlanRequest(repository=repository, push=push),
        "Pushes.Write": lambda: write_messages(repository, push, b""),
        "Pushes.Grant": lambda: pb.GrantRequest(repository=repository, push=push),
        "Pushes.Commit": lambda: pb.CommitRequest(repository=repository, push=push, description=b"none"),
        "Pushes.Part": lambda: pushed,
        "Pushes.Join": lambda: pb.JoinRequest(repository=repository, push=push, part=b"none"),
        "Pushes.Outcome": lambda: pushed,
        "Pushes.Abandon": lambda: pushed,
        "Jobs.Diff": lambda: pair,
        "Jobs.Distance": lambda: pair,
        "Jobs.Verify": lambda: pb.VerifyRequest(repository=repository, deep=True),
        "Jobs.Audit": lambda: pb.AuditRequest(repository=repository, after="log/"),
        "Access.CreateToken": lambda: pb.CreateTokenRequest(principal="p", role="reader"),
        "Access.ListTokens": lambda: pb.Empty(),
        "Access.RevokeToken": lambda: pb.RevokeTokenRequest(id=token_id(world)),
        "Access.WhoAmI": lambda: pb.Empty(),
    }[rpc]()


def token_id(world: World) -> str:
    return Tokens(open_objects(str(world.root))).create("short-lived", "reader")[1].id


def ask(client: WireClient, rpc: str, message: Any, **options: Any) -> Any:
    """Return the answer; of a follower, who would wait for more, the first version only."""
    if rpc != "Versions.Watch":
        return client.call(rpc, message, **options)
    metadata = options.get("metadata", client.metadata)
    stream = client.channel.unary_stream(METHODS[rpc].path)
    call = stream(message.SerializeToString(), timeout=20.0, metadata=metadata)
    try:
        return next(call)
    except grpc.RpcError as error:
        raise failure_of(error) from None
    finally:
        call.cancel()


def denial(client: WireClient, rpc: str, message: Any, **options: Any) -> Failure | None:
    try:
        ask(client, rpc, message, **options)
    except Failure as failure:
        return failure
    return None


def denied(client: WireClient, rpc: str, message: Any, **options: Any) -> Failure:
    with pytest.raises(Failure) as failure:
        ask(client, rpc, message, **options)
    return failure.value


NOT_FOUND = (Status.NOT_FOUND, "repository_not_found")
NOT_ALLOWED = (Status.PERMISSION_DENIED, "not_allowed")
# What is said of the requests below where they are allowed: these four change nothing, on purpose.
BAD_DEPTH = (Status.INVALID_ARGUMENT, "bad_option")
BAD_DESCRIPTION = (Status.INVALID_ARGUMENT, "bad_json")
BAD_PART = (Status.INVALID_ARGUMENT, "bad_part")
NO_GRANTS = (Status.INVALID_ARGUMENT, "no_grants")


def expected(role: str, rpc: str, place: str) -> tuple[Status, str] | None:
    if role != "admin of everything" and place not in (*IN_THE_GRANT, *NAMES_OF_NONE):
        return NOT_FOUND
    if rpc not in MAY[role]:
        return NOT_ALLOWED
    if rpc == "Repositories.Create":
        return (Status.INVALID_ARGUMENT, "bad_repository_name") if place in BADLY_NAMED else BAD_DEPTH
    if place not in EXISTING:
        return NOT_FOUND
    return {"Pushes.Commit": BAD_DESCRIPTION, "Pushes.Join": BAD_PART, "Pushes.Grant": NO_GRANTS}.get(rpc)


@pytest.mark.parametrize("rpc", sorted(OF_A_REPOSITORY))
@pytest.mark.parametrize("role", MAY)
def test_a_role_may_do_in_each_place_what_it_is_for_and_nothing_else(world: World, role: str, rpc: str):
    client = world.clients[role]
    for place in PLACES:
        push = world.pushes.get(place, world.pushes[OWN])
        if rpc in PUSHING and expected(role, "Pushes.Begin", place) is None:
            push = new_push_id()
            client.call("Pushes.Begin", begin(place, push))
        failure = denial(client, rpc, request(world, rpc, place, push))
        found = None if failure is None else (failure.status, failure.kind)
        assert found == expected(role, rpc, place), place


@pytest.mark.parametrize("rpc", sorted(MANAGING | IDENTIFYING))
@pytest.mark.parametrize("role", MAY)
def test_a_role_may_do_to_the_server_what_it_is_for_and_nothing_else(world: World, role: str, rpc: str):
    failure = denial(world.clients[role], rpc, request(world, rpc, "", ""))
    assert (failure is None) == (rpc in MAY[role])
    if failure is not None:
        assert (failure.status, failure.kind) == NOT_ALLOWED


def test_an_admin_makes_a_repository_where_the_grant_says(world: World):
    make = pb.CreateRequest(repository="team/fresh", max_depth=3)
    assert world.clients["admin"].call("Repositories.Create", make).max_depth == 3
    assert denied(world.clients["admin"], "Repositories.Create", make).status is Status.ALREADY_EXISTS


@pytest.mark.parametrize("rpc", sorted(OF_A_REPOSITORY))
def test_what_is_forbidden_and_what_is_missing_cannot_be_told_apart(world: World, rpc: str):
    for role in set(MAY) - {"admin of everything"}:
        client = world.clients[role]
        hidden, missing = (
            denied(client, rpc, request(world, rpc, place, world.pushes[OTHERS])) for place in (OTHERS, MISSING)
        )
        assert told(hidden, OTHERS) == told(missing, MISSING)
        assert nbytes(hidden) == nbytes(missing)


def told(failure: Failure, name: str) -> tuple[Any, ...]:
    """Return everything by which a caller can tell two denials apart, but for the name that it gave itself."""
    trailers = {key: str(value).replace(name, "NAME") for key, value in failure.trailers.items()}
    return failure.status, failure.details.replace(name, "NAME"), trailers


def nbytes(failure: Failure) -> int:
    return len(failure.details) + sum(len(key) + len(value) for key, value in failure.trailers.items())


def test_names_in_these_tests_are_of_one_length():
    assert len(OTHERS) == len(MISSING)


# -- nobody ------------------------------------------------------------------------------------------------------------


def nobodies(world: World) -> dict[str, tuple[tuple[str, str | bytes], ...]]:
    """Return metadata that stands for nobody, by what is wrong with it."""
    tokens = Tokens(open_objects(str(world.root)))
    good = world.secrets["admin of everything"]
    revoked, grant = tokens.create("somebody", "admin")
    tokens.revoke(grant.id)
    with at_time(1000.0):
        expired, _ = tokens.create("somebody", "admin", ttl_s=60)
    forged = f"lml_{'0' * 40}"
    last = "0" if good[-1] != "0" else "1"

    def bearer(token: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {token}"),)

    return {
        "nothing": (),
        "expired": bearer(expired),
        "revoked": bearer(revoked),
        "a wrong checksum": bearer(good[:-1] + last),
        "a wrong digit": bearer(good[:10] + ("0" if good[10] != "0" else "1") + good[11:]),
        "never made": bearer(f"{forged}{zlib.crc32(forged.encode()):08x}"),
        "in capitals": bearer(good.upper()),
        "cut short": bearer(good[:-1]),
        "too long": bearer(f"{good} "),
        "empty": bearer(""),
        "another scheme": (("authorization", f"Basic {good}"),),
        "no scheme": (("authorization", good),),
        "another header": (("x-token", good),),
        "a binary header": (("authorization-bin", f"Bearer {good}".encode()),),
        "twice": bearer(good) * 2,
        "with another": bearer(good) + bearer(revoked),
        "a certificate's": bearer("certificate cn:admin"),
        "its hash": bearer(tokens.list()[0].id),
    }


@contextmanager
def at_time(now: float) -> Iterator[None]:
    """Have tokens believe that it is so many seconds after 1970, and after the machine started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "time", SimpleNamespace(time=lambda: now, monotonic=lambda: now))
        yield


NOBODIES = (
    "nothing",
    "expired",
    "revoked",
    "a wrong checksum",
    "a wrong digit",
    "never made",
    "in capitals",
    "cut short",
    "too long",
    "empty",
    "another scheme",
    "no scheme",
    "another header",
    "a binary header",
    "twice",
    "with another",
    "a certificate's",
    "its hash",
)


@pytest.fixture(scope="module")
def of_nobody(world: World) -> dict[str, tuple[tuple[str, str | bytes], ...]]:
    found = nobodies(world)
    assert tuple(found) == NOBODIES
    return found


@pytest.mark.parametrize("wrong", NOBODIES)
def test_nobody_may_do_anything_and_everything_is_denied_in_the_same_words(world: World, of_nobody, wrong: str):
    found = set()
    before = len(world.answered)
    with world.client() as client:
        for rpc in sorted(EVERYTHING):
            for place in (OWN, MISSING, "") if rpc in OF_A_REPOSITORY else ("",):
                message = request(world, rpc, place, world.pushes[OWN])
                failure = denied(client, rpc, message, metadata=of_nobody[wrong])
                assert (failure.status, failure.kind) == NOT_ALLOWED
                found.add((failure.details, nbytes(failure)))
    assert len(found) == 1
    # Calls that tests before this one broke off may end now; these were all answered.
    assert {one.principal for one in world.answered[before:] if one.kind == "not_allowed"} == {""}


def test_a_token_in_the_address_is_no_token(world: World):
    with world.client() as client:
        call = client.channel.unary_unary(f"{METHODS['Access.WhoAmI'].path}?token={world.secrets['admin']}")
        with pytest.raises(grpc.RpcError) as error:
            call(b"", timeout=20.0)
    assert error.value.code() is Status.UNIMPLEMENTED


def test_whoever_is_nobody_is_told_before_a_message_has_come(world: World):
    """Else nobody could hold as many threads as there are, by streams that say nothing."""
    with world.client() as client, pytest.raises(grpc.RpcError) as error:
        next(client.channel.stream_stream(METHODS["Pushes.Write"].path)(silence(), timeout=20.0))
    assert error.value.code() is Status.PERMISSION_DENIED


def silence() -> Iterator[bytes]:
    threading.Event().wait(30.0)
    yield b""


# -- refs and pushes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(world: World) -> Iterator[Callable[..., WireClient]]:
    """Return what makes a client with a token of its own."""
    tokens = Tokens(open_objects(str(world.root)))
    with ExitStack() as stack:

        def client(principal: str, role: str, *refs: str) -> WireClient:
            secret, _ = tokens.create(principal, role, repositories=[OWN], refs=refs or ["*"])
            return stack.enter_context(world.client(token=secret))

        yield client


def begin_at(target: str, push: str) -> pb.BeginRequest:
    model, branch = target.rsplit("@", 1)
    return pb.BeginRequest(repository=OWN, push=push, model=model, branch=branch)


@pytest.mark.parametrize("target", ["bert@main", "gpt@dev-1", "bert@dev", "bert@x/dev-1", "BERT@dev-1", "a/bert@dev-1"])
def test_a_writer_pushes_to_its_own_refs_only(limited, target: str):
    client = limited("worker", "writer", "bert@dev-*", "bert@scratch")
    failure = denied(client, "Pushes.Begin", begin_at(target, new_push_id()))
    assert (failure.status, failure.kind) == NOT_ALLOWED
    assert target in failure.details
    client.call("Pushes.Begin", begin_at("bert@dev-2", new_push_id()))


def test_a_model_cannot_be_named_so_that_its_ref_seems_to_be_another(limited):
    """``bert@dev-1@main`` matches the glob; that nothing can be called so is what keeps it from being main."""
    client = limited("worker", "writer", "bert@dev-*")
    for model, branch in (("bert@dev-1", "main"), ("bert", "dev-1@main"), ("bert", "dev-1/../main")):
        begin = pb.BeginRequest(repository=OWN, push=new_push_id(), model=model, branch=branch)
        failure = denied(client, "Pushes.Begin", begin)
        assert failure.status is Status.INVALID_ARGUMENT


def test_a_push_is_not_committed_with_a_token_that_is_not_for_its_branch(world: World, limited):
    """Somebody has two tokens, and the wider one began the push."""
    wide, narrow = limited("both", "writer"), limited("both", "writer", "bert@dev-*")
    push = new_push_id()
    commit = prepare_by_wire(wide, OWN, "bert@narrow", {"w": WEIGHTS["w"] + 1}, push)
    session = pb.PushRequest(repository=OWN, push=push)
    for rpc, message in (
        ("Pushes.Consider", pb.ConsiderRequest(repository=OWN, push=push)),
        ("Pushes.Plan", pb.PlanRequest(repository=OWN, push=push)),
        ("Pushes.Write", write_messages(OWN, push, b"")),
        ("Pushes.Part", session),
        ("Pushes.Join", pb.JoinRequest(repository=OWN, push=push, part=b"none")),
        ("Pushes.Abandon", session),
        ("Pushes.Commit", commit),
    ):
        failure = denied(narrow, rpc, message)
        assert (failure.status, failure.kind) == NOT_ALLOWED
    assert wide.call("Pushes.Commit", commit).model == "bert"


def test_a_push_cannot_be_touched_by_anybody_else(limited):
    mine, theirs = limited("me", "writer"), limited("them", "maintainer")
    push = new_push_id()
    commit = prepare_by_wire(mine, OWN, "bert@mine", {"w": WEIGHTS["w"] + 2}, push)
    again = pb.BeginRequest(repository=OWN, push=push, model="bert", branch="mine", again=True)
    for rpc, message in (
        ("Pushes.Begin", again),
        ("Pushes.Consider", pb.ConsiderRequest(repository=OWN, push=push)),
        ("Pushes.Plan", pb.PlanRequest(repository=OWN, push=push)),
        ("Pushes.Write", write_messages(OWN, push, b"")),
        ("Pushes.Part", pb.PushRequest(repository=OWN, push=push)),
        ("Pushes.Join", pb.JoinRequest(repository=OWN, push=push, part=b"none")),
        ("Pushes.Abandon", pb.PushRequest(repository=OWN, push=push)),
        ("Pushes.Commit", commit),
    ):
        failure = denied(theirs, rpc, message)
        assert (failure.status, failure.kind) == NOT_ALLOWED
    assert mine.call("Pushes.Commit", commit).model == "bert"


def test_refs_are_set_where_the_grant_says_and_all_or_none(limited):
    client = limited("keeper", "maintainer", "bert@release-*")

    def update(*names: str) -> Failure | None:
        updates = [pb.RefUpdate(model="bert", name=name, kind="tag", number=1) for name in names]
        return denial(client, "Versions.UpdateRefs", pb.UpdateRefsRequest(repository=OWN, updates=updates))

    failure = update("release-1", "stable")
    assert failure is not None
    assert (failure.status, failure.kind) == NOT_ALLOWED
    (reply,) = client.call("Versions.Refs", pb.RefsRequest(repository=OWN, model="bert"))
    assert not any(ref.name == "release-1" for ref in reply.refs)
    assert update("release-1", "release-2") is None


def test_an_admin_of_some_refs_does_not_manage_access(limited):
    failure = denied(limited("a", "admin", "bert@*"), "Access.ListTokens", pb.Empty())
    assert (failure.status, failure.kind) == NOT_ALLOWED


def test_who_pushed_is_in_the_log_whatever_the_author_says(world: World, limited):
    push_by_wire(limited("carol", "writer"), OWN, "bert@carol", {"w": WEIGHTS["w"] + 3})
    log = (world.root / OWN / "log").iterdir()
    assert any(b'"carol"' in entry.read_bytes() for entry in log if entry.is_file())


def test_a_stream_that_is_open_ends_with_its_token(world: World, limited):
    """A follower, whose call lasts two hours, is told of no version that comes after the revocation."""
    admin, follower = world.clients["admin of everything"], limited("follower", "reader")
    push_by_wire(admin, OWN, "bert@followed", {"w": WEIGHTS["w"] + 4})
    request = pb.WatchRequest(repository=OWN, model="bert", ref="followed")
    call = follower.channel.unary_stream(METHODS["Versions.Watch"].path)
    stream = call(request.SerializeToString(), timeout=60.0, metadata=follower.metadata)
    next(stream)
    (grant,) = (token for token in admin.call("Access.ListTokens", pb.Empty()).tokens if token.principal == "follower")
    admin.call("Access.RevokeToken", pb.RevokeTokenRequest(id=grant.id))
    push_by_wire(admin, OWN, "bert@followed", {"w": WEIGHTS["w"] + 5})
    with pytest.raises(grpc.RpcError) as error:
        next(stream)
    assert failure_of(error.value).kind == "token_ended"
    assert denied(follower, "Versions.Watch", request).status is Status.PERMISSION_DENIED


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(MemoryObjects())


def test_a_token_has_a_prefix_160_bits_and_a_checksum(tokens: Tokens):
    secret, grant = tokens.create("ann", "writer", repositories=["team/*"], refs=["bert@*"])
    assert len(secret) == 4 + 40 + 8
    assert secret.startswith("lml_")
    assert int(secret[-8:], 16) == zlib.crc32(secret[:-8].encode())
    assert tokens.principal(secret) == Principal("ann", "writer", ("team/*",), ("bert@*",))
    assert grant.id not in secret
    assert len({tokens.create("ann", "reader")[0] for _ in range(100)}) == 100


def test_no_prefix_of_a_token_is_one(tokens: Tokens):
    secret, _ = tokens.create("ann", "writer")
    assert all(tokens.principal(secret[:end]) is NOBODY for end in range(len(secret)))
    assert all(tokens.principal(wrong) is NOBODY for wrong in ("", "lml_", "lml_" + "é" * 48, secret * 2))


def test_a_secret_is_kept_nowhere(tmp_path: Path):
    with serving(tmp_path) as server, WireClient(server.address) as client:
        request = pb.CreateTokenRequest(principal="ann", role="reader", repositories=["team/*"])
        made = client.call("Access.CreateToken", request)
        with WireClient(server.address, token=made.secret) as ann:
            assert ann.call("Access.WhoAmI", pb.Empty()).principal == "ann"
        listed = client.call("Access.ListTokens", pb.Empty())
    stored = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(made.token.id in str(path) for path in stored)
    random = made.secret[4:-8]
    for data in (*stored.values(), *(str(path).encode() for path in stored), listed.SerializeToString()):
        assert random.encode() not in data
        assert bytes.fromhex(random) not in data


def test_the_list_tells_of_every_token_and_of_no_secret(tokens: Tokens):
    secrets = [tokens.create(name, "reader", refs=[f"{name}@*"])[0] for name in ("ann", "bob")]
    tokens.revoke(tokens.list()[0].id)
    grants = {grant.principal: grant for grant in tokens.list()}
    assert {name: grant.refs for name, grant in grants.items()} == {"ann": ("ann@*",), "bob": ("bob@*",)}
    assert sorted(grant.revoked for grant in grants.values()) == [False, True]
    assert not any(secret[4:-8] in repr((grants, tokens)) for secret in secrets)


def test_a_token_ends_at_its_time_and_not_before(tokens: Tokens):
    with at_time(1000.0):
        secret, grant = tokens.create("ann", "reader", ttl_s=60)
        assert grant.expires == 1060
        assert tokens.principal(secret).name == "ann"
    with at_time(1059.9):
        assert tokens.principal(secret).name == "ann"
    with at_time(1060.0):
        assert tokens.principal(secret) is NOBODY


def test_a_revoked_token_ends_elsewhere_within_a_minute():
    objects = MemoryObjects()
    here, there = Tokens(objects), Tokens(objects)
    secret, grant = here.create("ann", "reader")
    assert FRESH_S < 60
    with at_time(5000.0):
        assert there.principal(secret).name == "ann"
        here.revoke(grant.id)
        assert here.principal(secret) is NOBODY
    with at_time(5000.0 + FRESH_S):
        assert there.principal(secret) is NOBODY


def test_a_token_is_read_once_in_a_while_and_not_at_each_call(tokens: Tokens, monkeypatch: pytest.MonkeyPatch):
    secret, _ = tokens.create("ann", "reader")
    tokens.principal(secret)
    monkeypatch.setattr(tokens, "_objects", None)
    assert tokens.principal(secret).name == "ann"


def test_a_token_is_revoked_twice_and_what_is_none_not_at_all(tokens: Tokens):
    _, grant = tokens.create("ann", "reader")
    for _ in range(2):
        tokens.revoke(grant.id)
    for id in ("", "0" * 16, "../key", "key", grant.id.upper() + "0", "*"):
        with pytest.raises(NotFoundError) as error:
            tokens.revoke(id)
        assert error.value.kind == "token_not_found"


@pytest.mark.parametrize(
    "grant",
    [
        {"principal": ""},
        {"principal": "x" * 256},
        {"principal": "a\nb"},
        {"role": "root"},
        {"role": "nobody"},
        {"ttl_s": -1},
        {"ttl_s": 1 << 63},
        {"repositories": [""]},
        {"refs": ["bert@*", ""]},
    ],
)
def test_a_token_that_makes_no_sense_is_not_made(tokens: Tokens, grant: dict[str, Any]):
    with pytest.raises(InvalidInputError):
        tokens.create(**{"principal": "ann", "role": "reader", **grant})
    assert tokens.list() == []


def test_a_damaged_token_lets_nobody_in_and_can_still_be_revoked(caplog: pytest.LogCaptureFixture):
    objects = MemoryObjects()
    secret, grant = Tokens(objects).create("ann", "admin")
    _, other = Tokens(objects).create("bob", "reader")
    name = f"access/grant-{grant.id}"
    for damaged in (b"", b"{}", b"[]", b"\xff", objects.get(name).replace(b'"hash"', b'"hush"')):
        objects.delete(name)
        objects.put_if_absent(name, [damaged])
        tokens = Tokens(objects)
        with pytest.raises(CorruptionError):
            tokens.principal(secret)
        assert tokens.list() == [other]
        assert grant.id in caplog.text
    tokens.revoke(grant.id)
    assert secret not in caplog.text


def test_a_grant_under_another_name_stands_for_nobody():
    """Whoever can copy objects but not make hashes cannot move a grant onto a token that it has."""
    objects = MemoryObjects()
    tokens = Tokens(objects)
    _, grant = tokens.create("ann", "admin")
    mine, weak = tokens.create("bob", "reader")
    data = objects.get(f"access/grant-{grant.id}")
    objects.delete(f"access/grant-{weak.id}")
    objects.put_if_absent(f"access/grant-{weak.id}", [data])
    assert tokens.principal(mine) is NOBODY


def test_a_key_that_is_damaged_is_said_and_not_replaced():
    objects = MemoryObjects()
    Tokens(objects)
    objects.delete("access/key")
    objects.put_if_absent("access/key", [b"short"])
    with pytest.raises(CorruptionError) as error:
        Tokens(objects)
    assert error.value.kind == "bad_key"


def test_two_servers_on_one_root_know_the_same_tokens(tmp_path: Path):
    with serving(tmp_path) as one, serving(tmp_path) as two, WireClient(one.address) as client:
        made = client.call("Access.CreateToken", pb.CreateTokenRequest(principal="ann", role="reader"))
        for server in (one, two):
            with WireClient(server.address, token=made.secret) as ann:
                assert ann.call("Access.WhoAmI", pb.Empty()).principal == "ann"


def test_a_bad_token_on_a_trusted_address_is_not_as_good_as_none(tmp_path: Path):
    with serving(tmp_path) as server, WireClient(server.address) as client:
        assert client.call("Access.WhoAmI", pb.Empty()).role == "admin"
        for metadata in ((("authorization", "Bearer lml_x"),), (("authorization", ""),)):
            failure = denied(client, "Access.WhoAmI", pb.Empty(), metadata=metadata)
            assert (failure.status, failure.kind) == NOT_ALLOWED


# -- TLS and certificates ----------------------------------------------------------------------------------------------


@dataclass
class Mutual:
    """A server that wants certificates of its clients, and grants for two names in them."""

    address: str
    authority: Authority
    tokens: Tokens

    def who(self, certificate: str, names: tuple[str, ...] = (), *, token: str = "", **issue: Any) -> pb.Token:
        pem = issue.pop("authority", self.authority).issue(certificate, names, **issue)
        credentials = grpc.ssl_channel_credentials(self.authority.certificate, pem.key, pem.certificate)
        with WireClient(self.address, credentials=credentials, token=token) as client:
            return client.call("Access.WhoAmI", pb.Empty())


@pytest.fixture(scope="module")
def mutual(tmp_path_factory) -> Iterator[Mutual]:
    directory = tmp_path_factory.mktemp("mutual")
    authority = Authority()
    ca = directory / "ca.crt"
    ca.write_bytes(authority.certificate)
    with tls_server(directory, authority, client_ca=ca) as server:
        tokens = Tokens(open_objects(str(directory / "root")))
        assert tokens.create("trainer", "writer", repositories=["team/*"], certificate="cn:trainer-7")[0] == ""
        tokens.create("follower", "reader", certificate="dns:follower.example.org")
        yield Mutual(server.address, authority, tokens)


def test_a_certificate_stands_for_whom_a_grant_names(mutual: Mutual):
    found = mutual.who("trainer-7")
    assert (found.principal, found.role, list(found.repositories)) == ("trainer", "writer", ["team/*"])
    assert mutual.who("whatever", ("unknown.example.org", "follower.example.org")).principal == "follower"


def test_a_certificate_without_a_grant_is_nobody(mutual: Mutual):
    for name in ("stranger", "trainer", "trainer-7 ", "certificate trainer-7", "cn:trainer-7", "*"):
        with pytest.raises(Failure) as failure:
            mutual.who(name)
        assert (failure.value.status, failure.value.kind) == NOT_ALLOWED


NAMES = (
    "dns:host.example.org",
    "uri:spiffe://example.org/host",
    "email:host@example.org",
    "ip:192.0.2.7",
    "ip:2001:db8::7",
)


@pytest.mark.parametrize("name", [*NAMES, "cn:host"])
def test_a_name_of_any_kind_may_be_granted(mutual: Mutual, name: str):
    mutual.tokens.create(f"who has {name}", "reader", certificate=name)
    kind, _, rest = name.partition(":")
    found = mutual.who(rest) if kind == "cn" else mutual.who("whatever", (rest,))
    assert found.principal == f"who has {name}"


@pytest.mark.parametrize(
    ("granted", "common_name", "names"),
    [
        ("dns:a.example.org", "a.example.org", ()),
        ("cn:b.example.org", "whatever", ("b.example.org",)),
        ("uri:spiffe://example.org/c", "spiffe://example.org/c", ()),
        ("cn:spiffe://example.org/d", "whatever", ("spiffe://example.org/d",)),
        ("email:e@example.org", "e@example.org", ()),
        ("ip:192.0.2.8", "192.0.2.8", ()),
        ("dns:192.0.2.9", "whatever", ("192.0.2.9",)),
        ("dns:f.example.org", "dns:f.example.org", ()),
        ("cn:dns:g.example.org", "whatever", ("g.example.org",)),
    ],
)
def test_a_name_of_another_kind_is_another_name(mutual: Mutual, granted: str, common_name: str, names: tuple[str, ...]):
    mutual.tokens.create("somebody", "admin", certificate=granted)
    with pytest.raises(Failure) as failure:
        mutual.who(common_name, names)
    assert (failure.value.status, failure.value.kind) == NOT_ALLOWED


@pytest.mark.parametrize(
    "name", ["host", "cn:", ":host", "CN:host", "san:host", "dns:a\nb", "host.example.org:443", " "]
)
def test_a_grant_is_for_a_name_of_a_kind(tokens: Tokens, name: str):
    with pytest.raises(InvalidInputError) as error:
        tokens.create("ann", "reader", certificate=name)
    assert error.value.kind == "bad_certificate_name"


def test_a_token_goes_before_a_certificate(mutual: Mutual):
    with pytest.raises(Failure) as failure:
        mutual.who("trainer-7", token="lml_wrong")
    assert (failure.value.status, failure.value.kind) == NOT_ALLOWED


@pytest.mark.parametrize("wrong", ["expired", "another authority"])
def test_a_certificate_that_is_not_valid_does_not_connect(mutual: Mutual, wrong: str):
    issue: dict[str, Any] = {"expired": True} if wrong == "expired" else {"authority": Authority()}
    with pytest.raises(Failure) as failure:
        mutual.who("trainer-7", **issue)
    assert failure.value.status is Status.UNAVAILABLE


def test_no_certificate_does_not_connect_where_one_is_wanted(mutual: Mutual):
    credentials = grpc.ssl_channel_credentials(mutual.authority.certificate)
    with WireClient(mutual.address, credentials=credentials) as client, pytest.raises(Failure) as failure:
        client.call("Access.WhoAmI", pb.Empty())
    assert failure.value.status is Status.UNAVAILABLE


def test_of_a_token_is_believed_what_was_found_when_it_was_looked_up(tokens: Tokens):
    secret, grant = tokens.create("ann", "reader")
    stranger, _ = Tokens(MemoryObjects()).create("bob", "admin")
    with at_time(1000.0):
        for wrong in ("", "lml_wrong", secret[:-1], secret.upper()):
            assert tokens.believed(wrong) is False
        assert tokens.believed(secret) is tokens.believed(stranger) is None  # which nobody has looked for yet
        assert tokens.principal(secret).name == "ann"
        assert tokens.principal(stranger) is NOBODY
        assert (tokens.believed(secret), tokens.believed(stranger)) == (True, False)
    with at_time(1000.0 + FRESH_S):
        assert (tokens.believed(secret), tokens.believed(stranger)) == (True, None)
        tokens.revoke(grant.id)
        assert tokens.believed(secret) is None
        assert tokens.principal(secret) is NOBODY
        assert tokens.believed(secret) is False


def test_tokens_that_nobody_gave_drive_out_none_that_somebody_has(tokens: Tokens):
    secret, _ = tokens.create("ann", "reader")
    assert tokens.principal(secret).name == "ann"
    for number in range(10_002):
        tokens._look_up(f"{number:016x}")
    assert len(tokens._known) < 10_000
    assert tokens.believed(secret)


def test_a_certificate_has_one_grant_for_ever(tokens: Tokens):
    """What was given out once may be in somebody's log; after a revocation the name must not come alive again."""
    _, grant = tokens.create("ann", "reader", certificate="cn:machine-1")
    tokens.revoke(grant.id)
    assert tokens.principal_of_certificate("cn:machine-1") is NOBODY
    with pytest.raises(AlreadyExistsError):
        tokens.create("bob", "admin", certificate="cn:machine-1")


def test_a_grant_for_a_certificate_that_has_called_before_holds_at_once(tokens: Tokens):
    assert tokens.principal_of_certificate("cn:machine-1") is NOBODY
    tokens.create("ann", "reader", certificate="cn:machine-1")
    assert tokens.principal_of_certificate("cn:machine-1").name == "ann"


@pytest.mark.parametrize("wrong", ["expired", "self-signed", "another host"])
def test_a_server_that_cannot_prove_who_it_is_gets_no_token(tmp_path: Path, wrong: str):
    authority = Authority()
    signs = Authority() if wrong == "self-signed" else authority
    names = ("elsewhere.example.org",) if wrong == "another host" else LOOPBACK
    pair = signs.issue("server", names, expired=wrong == "expired").write(tmp_path, "server")
    credentials = grpc.ssl_channel_credentials(authority.certificate)
    answered: list[Answered] = []
    with (
        serving(tmp_path / "root", tls=Tls(*pair), observe=answered.append) as server,
        WireClient(server.address, credentials=credentials, token="lml_secret") as client,
        pytest.raises(Failure) as failure,
    ):
        client.call("Access.WhoAmI", pb.Empty(), timeout=5.0)
    assert failure.value.status is Status.UNAVAILABLE
    assert answered == []


@pytest.mark.parametrize(("version", "spoken"), [("TLSv1", False), ("TLSv1_1", False), ("TLSv1_2", True)])
def test_tls_is_spoken_from_1_2_on(world: World, version: str, spoken: bool):
    host, port = world.server.address.rsplit(":", 1)
    context = ssl.create_default_context(cadata=world.authority.certificate.decode())
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.set_alpn_protocols(["h2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=host)
    with socket.create_connection((host, int(port)), timeout=20.0) as connection:
        assert shakes_hands(client, connection, incoming, outgoing) == spoken


def shakes_hands(client: ssl.SSLObject, connection: socket.socket, incoming: Any, outgoing: Any) -> bool:
    """Whether the server agrees; raises SSLError for what this machine's own OpenSSL refuses to say."""
    while True:
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            connection.sendall(outgoing.read())
            data = connection.recv(1 << 16)
            if not data:
                return False
            incoming.write(data)
        except ssl.SSLError as error:
            if "ALERT" not in str(error.reason):
                raise
            return False
        else:
            return True


def test_a_client_that_speaks_in_the_clear_is_not_answered_by_a_server_with_tls(world: World):
    with WireClient(world.server.address, token="lml_secret") as client, pytest.raises(Failure) as failure:
        client.call("Access.WhoAmI", pb.Empty(), timeout=5.0)
    assert failure.value.status is Status.UNAVAILABLE


@pytest.mark.parametrize(
    ("listen", "options", "kind"),
    [
        ("127.0.0.1:0", {}, "no_tls"),
        ("0.0.0.0:0", {"insecure_loopback": True}, "not_loopback"),
        ("[::]:0", {"insecure_loopback": True}, "not_loopback"),
        ("example.org:0", {"insecure_loopback": True}, "not_loopback"),
        ("127.0.0.1:0", {"insecure_loopback": True, "tls": Tls(Path("a"), Path("b"))}, "bad_option"),
        ("127.0.0.1:0", {"tls": Tls(Path("missing.crt"), Path("missing.key"))}, "bad_certificate"),
        ("127.0.0.1", {"insecure_loopback": True}, "bad_address"),
        (":7443", {"insecure_loopback": True}, "bad_address"),
        ("127.0.0.1:http", {"insecure_loopback": True}, "bad_address"),
        ("127.0.0.1:65536", {"insecure_loopback": True}, "bad_address"),
    ],
)
def test_a_server_does_not_listen_where_it_could_not_be_trusted(tmp_path, listen: str, options: Any, kind: str):
    with pytest.raises(InvalidInputError) as error:
        Server(str(tmp_path), listen, **options)
    assert error.value.kind == kind


def test_files_that_are_no_certificate_and_a_key_that_is_another_s_are_refused(tmp_path: Path):
    authority = Authority()
    certificate, _ = authority.issue("server", LOOPBACK).write(tmp_path, "one")
    _, key = authority.issue("server", LOOPBACK).write(tmp_path, "two")
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk")
    for pair in ((certificate, key), (junk, key), (certificate, junk)):
        with pytest.raises(InvalidInputError) as error:
            Server(str(tmp_path / "root"), "127.0.0.1:0", tls=Tls(*pair))
        assert error.value.kind == "cannot_listen"


# -- what keeps it so --------------------------------------------------------------------------------------------------


def test_a_server_with_an_rpc_that_has_no_policy_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for policy in (
        {name: verb for name, verb in POLICY.items() if name != "Versions.Read"},
        {**POLICY, "Versions.Reed": POLICY["Versions.Read"]},
    ):
        monkeypatch.setattr(server_module, "POLICY", policy)
        with pytest.raises(RuntimeError, match=r"Versions\.Re"):
            Server(str(tmp_path), "127.0.0.1:0", insecure_loopback=True)


def test_a_token_is_in_no_log_no_text_and_nothing_that_is_observed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    answered: list[Answered] = []
    with serving(tmp_path, observe=answered.append) as server, WireClient(server.address) as local:
        secret = local.call("Access.CreateToken", pb.CreateTokenRequest(principal="ann", role="reader")).secret
        local.call("Repositories.Create", pb.CreateRequest(repository="team", max_depth=8))
        texts = []
        with WireClient(server.address, token=secret) as ann:
            for rpc, message in (
                ("Access.WhoAmI", pb.Empty()),
                ("Access.ListTokens", pb.Empty()),
                ("Versions.Models", pb.RepositoryRequest(repository="team")),
                ("Versions.Models", pb.RepositoryRequest(repository="none")),
                ("Versions.Models", b"\xff"),
            ):
                failure = denial(ann, rpc, message)
                texts.append(str((failure, failure and failure.trailers)))
            monkey = pytest.MonkeyPatch()
            with monkey.context() as patch:
                patch.setattr(server._rpcs._repositories, "open", None)  # a bug
                failure = denied(ann, "Versions.Models", pb.RepositoryRequest(repository="team"))
            assert failure.kind == "bug"
            texts.append(str((failure, failure.trailers)))
        texts += map(repr, (answered, server, server._tokens, Tls(Path("a"), Path("/secret/key"))))
    assert answered[-1].principal == "ann"
    for text in (*texts, caplog.text):
        assert secret[4:-8] not in text
        assert "/secret/key" not in text


def test_a_bug_is_told_to_the_log_and_not_to_the_caller(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with serving(tmp_path) as server, WireClient(server.address) as client:
        server._rpcs._repositories.open = lambda name: {}["/some/path"]
        failure = denied(client, "Versions.Models", pb.RepositoryRequest(repository="team"))
    assert (failure.status, failure.kind) == (Status.INTERNAL, "bug")
    assert "/some/path" not in str(failure.trailers) + failure.details
    assert "/some/path" in caplog.text
    mark = failure.details.split("see ")[1].split()[0]
    assert mark in caplog.text
