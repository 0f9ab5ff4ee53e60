"""What a server is sent that no client of ours would send: it is answered in kind, and others all the same."""

import socket
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest
from certificates import LOOPBACK, Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from service import Failure, WireClient, failure_of, prepare_by_wire, push_by_wire, serving, take_apart, write_messages
from support import noise

import lamella
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.format.version import version_id
from lamella_engine.objects import open_objects
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service import admission
from lamella_engine.service.admission import CALLS
from lamella_engine.service.listening import Tls
from lamella_engine.service.server import Answered, Server
from lamella_engine.service.tokens import Tokens
from lamella_engine.wire import MAX_MESSAGE_NBYTES, METHODS

Status = grpc.StatusCode
WEIGHTS = {"w": noise(1, 5000)}
TEAM = pb.RepositoryRequest(repository="team")


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Server, str]]:
    """A server, and the token of somebody who behaves."""
    root = tmp_path_factory.mktemp("abused")
    with serving(root) as server, WireClient(server.address) as client:
        client.call("Repositories.Create", pb.CreateRequest(repository="team", max_depth=8))
        push_by_wire(client, "team", "m@main", WEIGHTS)
        yield server, Tokens(open_objects(str(root))).create("good", "writer")[0]


@pytest.fixture
def address(served: tuple[Server, str]) -> Iterator[str]:
    """The server's address; when the test is over, others must be answered as ever."""
    yield served[0].address
    answers_others(served)


def answers_others(served: tuple[Server, str]) -> None:
    with WireClient(served[0].address, token=served[1]) as client:
        assert "m" in client.call("Versions.Models", TEAM, timeout=20.0)[0].models
        push_by_wire(client, "team", f"good@{new_push_id()}x", {"w": noise(2, 300)})


@contextmanager
def channel(address: str, **options: Any) -> Iterator[grpc.Channel]:
    named = [(f"grpc.{name}", value) for name, value in options.items()]
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), *named]) as channel:
        yield channel


def refused(channel: grpc.Channel, rpc: str, message: Any, **options: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(METHODS[rpc].path)(message, **{"timeout": 20.0, **options})
    return failure_of(error.value)


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_message_that_is_too_long_is_refused(address: str):
    with channel(address, max_send_message_length=-1) as client:
        longest = MAX_MESSAGE_NBYTES + (64 << 10)
        assert refused(client, "Repositories.Describe", b"\xff" * longest).kind == "bad_message"
        assert refused(client, "Repositories.Describe", b"\xff" * (longest + 1)).status is Status.RESOURCE_EXHAUSTED


def test_a_message_that_is_compressed_is_not_opened(address: str):
    with channel(address) as client:
        bomb = pb.RepositoryRequest(repository="x" * 1_000_000).SerializeToString()
        failure = refused(client, "Repositories.Describe", bomb, compression=grpc.Compression.Gzip)
    assert failure.status is Status.UNIMPLEMENTED


def test_metadata_that_is_too_long_is_refused(address: str):
    with channel(address) as client:
        failure = refused(client, "Repositories.Describe", b"", metadata=[("x-long", "x" * (64 << 10))])
    assert failure.status in (Status.RESOURCE_EXHAUSTED, Status.INTERNAL, Status.UNAVAILABLE)


def test_a_call_without_a_deadline_is_refused(address: str):
    with channel(address) as client:
        for timeout in (None, 10.0 * 86_400):
            failure = refused(client, "Repositories.Describe", TEAM.SerializeToString(), timeout=timeout)
            assert (failure.status, failure.kind) == (Status.INVALID_ARGUMENT, "no_deadline")


def test_an_rpc_that_there_is_not_is_refused(address: str):
    with channel(address) as client:
        for path in ("/lamella.v1.Versions/Delete", "/lamella.v2.Versions/Get", "/x/y", "/lamella.v1.Versions/Get/"):
            with pytest.raises(grpc.RpcError) as error:
                client.unary_unary(path)(b"", timeout=20.0)
            assert error.value.code() is Status.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["x" * 2_000_000, "🙂" * 500_000, "\x00\n" * 100_000, "a/../" * 1000])
def test_a_name_of_any_length_and_letters_is_answered_in_a_trailer_that_arrives(address: str, name: str):
    with channel(address) as client:
        failure = refused(client, "Repositories.Describe", pb.RepositoryRequest(repository=name).SerializeToString())
    assert (failure.status, failure.kind) == (Status.NOT_FOUND, "repository_not_found")


# -- streams -----------------------------------------------------------------------------------------------------------


def silent(event: threading.Event, *first: bytes) -> Iterator[bytes]:
    yield from first
    event.wait(60.0)


def test_streams_without_number_that_say_nothing_leave_others_their_share(address: str, served):
    """Of one principal, on several connections, more than there are threads."""
    watch = pb.WatchRequest(repository="team", model="m", ref="main", after=1).SerializeToString()
    end, refused_at_once = threading.Event(), threading.Semaphore(0)

    def done(call: grpc.Future) -> None:
        if not call.cancelled():
            assert call.code() is Status.RESOURCE_EXHAUSTED
            assert dict(call.trailing_metadata()).get("retry-after-ms")
        refused_at_once.release()

    with ExitStack() as stack:
        calls = []
        for number in range(6):
            client = stack.enter_context(channel(address))
            for turn in range(120):
                if turn % 3 == 0:  # an rpc that takes one message, which never comes
                    calls.append(client.stream_unary(METHODS["Versions.Models"].path).future(silent(end), timeout=60.0))
                elif number % 2:
                    calls.append(client.unary_stream(METHODS["Versions.Watch"].path)(watch, timeout=60.0))
                else:
                    calls.append(client.stream_stream(METHODS["Pushes.Write"].path)(silent(end), timeout=60.0))
                calls[-1].add_done_callback(lambda call=calls[-1]: done(call))
        assert refused_at_once.acquire(timeout=60.0)
        answers_others(served)
        end.set()
        for call in calls:
            call.cancel()


WRONG = [("authorization", "Bearer lml_wrong")]


def test_streams_of_nobody_hold_nothing(address: str, served):
    end = threading.Event()
    with channel(address) as client:
        calls = [
            client.stream_stream(METHODS["Pushes.Write"].path)(silent(end), timeout=60.0, metadata=WRONG)
            for _ in range(400)
        ]
        health = health_pb2_grpc.HealthStub(client)
        calls += [health.Watch(health_pb2.HealthCheckRequest(), timeout=60.0) for _ in range(400)]
        for call in calls:
            with pytest.raises(grpc.RpcError):  # in so great a number some are cut off without a word
                next(call)
            assert call.code() is not Status.DEADLINE_EXCEEDED
        answers_others(served)
        end.set()


class Held:
    """Observes calls, and holds up the thread of one of nobody until it is told to go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.holds = threading.Event()

    def __call__(self, answered: Answered) -> None:
        if not answered.principal:
            self.holds.set()
            assert self.go_on.wait(60.0)


def test_calls_of_nobody_take_no_thread_of_others(tmp_path):
    """More of them than there are threads, of which none is refused yet."""
    observe, number = Held(), 2 * CALLS
    with serving(tmp_path, observe=observe) as server, ExitStack() as stack:
        stack.callback(observe.go_on.set)
        with WireClient(server.address) as good:
            good.call("Repositories.Create", pb.CreateRequest(repository="team", max_depth=8))
            calls = []
            for at in range(number):
                if at % 100 == 0:
                    client = stack.enter_context(channel(server.address))
                ask = client.unary_unary(METHODS["Versions.Models"].path)
                calls.append(ask.future(TEAM.SerializeToString(), timeout=60.0, metadata=WRONG))
            assert observe.holds.wait(60.0)
            for at in range(20):
                push_by_wire(good, "team", f"m{at}@main", WEIGHTS)
            assert not any(call.done() for call in calls)
            observe.go_on.set()
            assert {call.code() for call in calls} == {Status.PERMISSION_DENIED}


def made_up(number: int) -> list[tuple[str, str]]:
    """Return metadata with a token that is whole, and that nobody was given."""
    body = f"lml_{number:040x}"
    return [("authorization", f"Bearer {body}{zlib.crc32(body.encode()):08x}")]


def test_calls_with_tokens_that_are_made_up_take_no_thread_of_others(tmp_path):
    observe, number = Held(), 2 * CALLS
    with serving(tmp_path, observe=observe) as server, ExitStack() as stack:
        stack.callback(observe.go_on.set)
        secret, _ = Tokens(open_objects(str(tmp_path))).create("good", "admin")
        good = stack.enter_context(WireClient(server.address, token=secret))
        good.call("Repositories.Create", pb.CreateRequest(repository="team", max_depth=8))
        calls = []
        for at in range(number):
            if at % 100 == 0:
                client = stack.enter_context(channel(server.address))
            ask = client.unary_unary(METHODS["Versions.Models"].path)
            calls.append(ask.future(TEAM.SerializeToString(), timeout=60.0, metadata=made_up(at)))
        assert observe.holds.wait(60.0)
        for at in range(20):
            push_by_wire(good, "team", f"m{at}@main", WEIGHTS)
        assert not any(call.done() for call in calls)
        observe.go_on.set()
        assert {call.code() for call in calls} == {Status.PERMISSION_DENIED}


def test_of_too_many_newcomers_the_last_come_again_when_they_are_known(tmp_path, monkeypatch):
    with serving(tmp_path) as server:
        monkeypatch.setattr(admission, "_NEWCOMERS", 0)
        secret, _ = Tokens(open_objects(str(tmp_path))).create("ann", "reader")
        with WireClient(server.address, token=secret) as client:
            with pytest.raises(Failure) as failure:
                client.call("Access.WhoAmI", pb.Empty())
            assert failure.value.kind == "busy"
            assert client.call("Access.WhoAmI", pb.Empty()).principal == "ann"


def test_of_too_many_calls_of_nobody_the_last_are_sent_away_without_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(admission, "_STRANGERS", 3)
    observe = Held()
    with serving(tmp_path, observe=observe) as server, channel(server.address) as client:
        ask = client.unary_unary(METHODS["Versions.Models"].path)
        calls, ended = [ask.future(b"", timeout=60.0, metadata=WRONG) for _ in range(6)], threading.Semaphore(0)
        for call in calls:
            call.add_done_callback(lambda call: ended.release())
        for _ in range(3):
            assert ended.acquire(timeout=60.0)
        observe.go_on.set()
        codes = Counter(call.code() for call in calls)
    assert codes == {Status.UNIMPLEMENTED: 3, Status.PERMISSION_DENIED: 3}


def test_who_comes_when_all_threads_are_taken_is_asked_to_come_again(tmp_path, monkeypatch):
    monkeypatch.setattr(admission, "CALLS", 1)
    with serving(tmp_path) as server, WireClient(server.address) as client:
        client.call("Repositories.Create", pb.CreateRequest(repository="team", max_depth=8))
        push_by_wire(client, "team", "m@main", WEIGHTS)
        watch = pb.WatchRequest(repository="team", model="m", ref="main").SerializeToString()
        stream = client.channel.unary_stream(METHODS["Versions.Watch"].path)(watch, timeout=60.0)
        next(stream)
        for rpc, message in (("Versions.Models", TEAM), ("Pushes.Write", []), ("Versions.Watch", watch)):
            with pytest.raises(Failure) as failure:
                client.call(rpc, message)
            assert (failure.value.status, failure.value.kind) == (Status.RESOURCE_EXHAUSTED, "busy")
            assert failure.value.trailers["retry-after-ms"]
        stream.cancel()
        with lamella.open(f"grpc://{server.address}/team") as repo:  # which comes again by itself
            assert repo.version("m@main").number == 1


def test_a_stream_that_ends_within_a_record_has_what_came_whole(address: str):
    with WireClient(address) as client:
        push = new_push_id()
        begin = pb.BeginRequest(repository="team", push=push, model="half", branch="main")
        client.call("Pushes.Begin", begin)
        taken = take_apart(WEIGHTS, "half", push)
        cells = [pb.PlannedCell(tensor=item.cell.tensor, number=0, chunk=item.chunk) for item in taken.planned[:1]]
        assert client.call("Pushes.Plan", pb.PlanRequest(repository="team", push=push, cells=cells)).answers
        records = taken.records()
        for end in (0, 5, 91, 92, 2000):
            *_, last = client.call("Pushes.Write", write_messages("team", push, records[:end]))
            assert int.from_bytes(last, "little") == 0
        assert client.call("Pushes.Begin", begin).taken == 0


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [b""],
        [b"\xff\xff"],
        [pb.WriteHeader(repository="team").SerializeToString()],
        [pb.WriteHeader(repository="team", push="0" * 32).SerializeToString()],
    ],
)
def test_a_write_that_does_not_say_what_of_is_refused(address: str, messages: list[bytes]):
    with WireClient(address) as client, pytest.raises(Failure) as failure:
        client.call("Pushes.Write", messages)
    assert failure.value.status in (Status.NOT_FOUND, Status.INVALID_ARGUMENT)
    assert failure.value.kind


def test_a_message_of_a_write_without_a_position_is_refused(address: str):
    with WireClient(address) as client:
        push = new_push_id()
        client.call("Pushes.Begin", pb.BeginRequest(repository="team", push=push, model="m", branch="short"))
        header = pb.WriteHeader(repository="team", push=push).SerializeToString()
        for message in (b"", b"1234567"):
            with pytest.raises(Failure) as failure:
                client.call("Pushes.Write", [header, message])
            assert failure.value.kind == "bad_message"


def test_a_client_that_is_gone_leaves_a_push_that_others_can_go_on_with(address: str, served):
    push = new_push_id()
    end = threading.Event()
    with WireClient(address, token=served[1]) as client:
        begin = pb.BeginRequest(repository="team", push=push, model="gone", branch="main")
        for _ in range(20):  # more often than there are slots
            with WireClient(address, token=served[1]) as leaving:
                leaving.call("Pushes.Begin", begin)
                header = pb.WriteHeader(repository="team", push=push).SerializeToString()
                messages = silent(end, header, bytes(8) + b"\x01" * 50)
                leaving.channel.stream_stream(METHODS["Pushes.Write"].path)(
                    messages, timeout=60.0, metadata=leaving.metadata
                )
        end.set()
        commit = prepare_by_wire(client, "team", "gone@main", WEIGHTS, push)
        assert client.call("Pushes.Commit", commit).number == 1


# -- sockets -----------------------------------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\x00" * 10_000,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        PREFACE[:10],
        PREFACE,
        PREFACE + b"\xff" * 10_000,
        PREFACE + bytes(9) + b"\x00\x40\x00\x01\x04\x00\x00\x00\x01" + b"\x82" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(512),
    ],
    ids=["nothing", "zeros", "HTTP/1", "half a preface", "a preface", "noise", "half of a header", "TLS"],
)
def test_connections_that_say_nothing_or_nonsense_hold_up_nobody(address: str, served, sent: bytes):
    host, port = address.rsplit(":", 1)
    with ExitStack() as stack:
        for _ in range(50):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=20.0))
            connection.sendall(sent)
        answers_others(served)


def test_connections_that_begin_a_handshake_hold_up_nobody(tmp_path):
    authority = Authority()
    pair = authority.issue("server", LOOPBACK).write(tmp_path, "server")
    secret, _ = Tokens(open_objects(str(tmp_path / "root"), create=True)).create("ann", "reader")
    credentials = grpc.ssl_channel_credentials(authority.certificate)
    with ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path / "root", tls=Tls(*pair)))
        host, port = server.address.rsplit(":", 1)
        for number in range(60):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=20.0))
            connection.sendall((b"", PREFACE, b"\x16\x03\x01\x02\x00")[number % 3])
        with WireClient(server.address, credentials=credentials, token=secret) as client:
            assert client.call("Access.WhoAmI", pb.Empty()).principal == "ann"


# -- anything ----------------------------------------------------------------------------------------------------------

strings = st.sampled_from(["", "team", "m", "main", "m@main", "m@v1", "m@v1~1", "tag", "branch", "w", "*", "reader"])
hexes = st.sampled_from(["0" * 32, "f" * 64, "0" * 16])
numbers = {
    "uint32": st.sampled_from([0, 1, 2, 31, 2**32 - 1]),
    "uint64": st.sampled_from([0, 1, 4, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1]),
    "sint64": st.sampled_from([0, 1, -1, -4, -(2**63), 2**63 - 1]),
}


def anything(message: type[Any], *, known: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Draw messages of a kind, many of whose fields mean something."""
    return st.fixed_dictionaries(
        {}, optional={field.name: value_of(field, known) for field in message.DESCRIPTOR.fields}
    ).map(lambda fields: message(**fields))


def value_of(field: Any, known: dict[str, Any]) -> st.SearchStrategy[Any]:
    kinds = {field.TYPE_UINT32: "uint32", field.TYPE_UINT64: "uint64", field.TYPE_SINT64: "sint64"}
    if field.name == "lanes":
        return st.dictionaries(numbers["uint32"], st.binary(max_size=200), max_size=3)
    if field.type in kinds:
        one: st.SearchStrategy[Any] = numbers[kinds[field.type]]
    elif field.type == field.TYPE_STRING:
        one = strings | hexes | st.text(max_size=5) | (st.just(known[field.name]) if field.name in known else strings)
    elif field.type == field.TYPE_BYTES:
        one = st.binary(max_size=40) | st.binary(min_size=32, max_size=32)
        one |= st.sampled_from(known[field.name]) if field.name in known else one
    elif field.type == field.TYPE_BOOL:
        one = st.booleans()
    else:
        one = anything(pb.__dict__[field.message_type.name], known=known)
    return st.lists(one, max_size=3) if field.is_repeated else one


@pytest.fixture(scope="module")
def known(served: tuple[Server, str]) -> dict[str, Any]:
    """Values of fields that mean something: a version, and a push under way."""
    push = new_push_id()
    with WireClient(served[0].address) as client:
        at = client.call("Versions.Resolve", pb.ResolveRequest(repository="team", revision="m@main"))
        client.call("Pushes.Begin", pb.BeginRequest(repository="team", push=push, model="m", branch="fuzzed"))
    id = version_id(at.description)
    taken = take_apart(WEIGHTS, "m", push)
    chunks = [item.chunk for item in taken.planned]
    return {"repository": "team", "push": push, "id": id, "version": id, "have": id, "parent": id, "chunk": chunks} | {
        "description": [at.description, taken.description],
        "pages": [data for data, _ in taken.chunks.values()],
        "held": chunks,
    }


@pytest.mark.parametrize("rpc", sorted(name for name, method in METHODS.items() if not method.streams_requests))
@given(data=st.data())
def test_no_message_is_answered_by_a_bug(served: tuple[Server, str], known: dict[str, Any], rpc: str, data: Any):
    request = METHODS[rpc].request
    assert request is not None
    message = data.draw(anything(request, known=known))
    found = None
    with WireClient(served[0].address) as client:
        try:
            client.call(rpc, message, timeout=0.2 if rpc == "Versions.Watch" else 20.0)
        except Failure as failure:
            found = failure
    if found is not None and not (rpc == "Versions.Watch" and found.status is Status.DEADLINE_EXCEEDED):
        assert found.error is not None
        assert found.kind not in ("bug", "bad_error")
