"""How long a server waits for its clients: by a clock of these tests, which stands unless they move it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
import pytest
from service import Failure, WireClient, serving, take_apart, write_messages
from support import bits, noise

import lamella
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.errors import LimitError, StorageError
from lamella_engine.remote import channel
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service import streams as streams_module
from lamella_engine.service.server import Answered
from lamella_engine.service.slots import come_again
from lamella_engine.service.streams import MIN_RATE, WINDOW_S, Stream, Streams
from lamella_engine.wire import FRAME_NBYTES, encode_planned


@dataclass
class Clock:
    now: float = 1000.0
    step_s: float = 0.0
    """How far it goes whenever it is looked at, which is once when a server begins to wait, and once at the end."""

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


@dataclass
class Client:
    """Sends messages of some length after some seconds each, unless it is cut off."""

    clock: Clock
    sends: list[tuple[float, int]]
    cut: list[str] = field(default_factory=list)

    def messages(self, streams: Streams) -> Iterator[bytes]:
        for pause_s, nbytes in self.sends:
            self.clock.now += pause_s
            streams.end_silent()
            if self.cut:
                raise grpc.RpcError
            yield bytes(nbytes)


def received(clock: Clock, sends: list[tuple[float, int]], *, working_s: float = 0.0) -> Stream:
    """Let a server that works on each message for a while receive all of them."""
    streams = Streams(clock)
    client = Client(clock, sends)
    stream = streams.opened(lambda: client.cut.append("off"))
    for _ in stream.received(client.messages(streams)):
        clock.now += working_s
        streams.end_silent()
    return stream


@pytest.mark.parametrize("nbytes", [MIN_RATE, FRAME_NBYTES])
def test_a_writer_at_the_least_rate_goes_on_for_hours(nbytes: int):
    stream = received(Clock(), [(nbytes / MIN_RATE, nbytes)] * (7200 * MIN_RATE // nbytes))
    assert stream.received_nbytes == 7200 * MIN_RATE


@pytest.mark.parametrize(("pause_s", "nbytes"), [(1.0, 1), (30.0, 1), (59.0, 100_000), (17.0, FRAME_NBYTES)])
def test_a_writer_below_the_least_rate_is_told_so_once_it_has_had_its_time(pause_s: float, nbytes: int):
    clock = Clock()
    began, each = clock.now, pause_s - nbytes / MIN_RATE
    with pytest.raises(LimitError) as error:
        received(clock, [(pause_s, nbytes)] * 1000)
    assert error.value.kind == "too_slow"
    times = int(WINDOW_S / each)
    assert clock.now - began <= (times + 2) * pause_s


def test_a_writer_that_says_nothing_is_cut_off():
    clock = Clock()
    with pytest.raises(LimitError) as error:
        received(clock, [(1.0, FRAME_NBYTES), (WINDOW_S + 1.0, FRAME_NBYTES)])
    assert error.value.kind == "too_slow"


def test_a_writer_that_says_nothing_for_less_may_go_on_and_again_if_it_sends_enough_between():
    stream = received(Clock(), [(WINDOW_S - 1.0, FRAME_NBYTES), *[(0.0, FRAME_NBYTES)] * 4] * 50)
    assert stream.received_nbytes == 250 * FRAME_NBYTES


def test_haste_now_is_no_leave_to_idle_later():
    with pytest.raises(LimitError):
        received(Clock(), [*[(0.0, FRAME_NBYTES)] * 1000, (WINDOW_S + 1.0, 1)])


def test_the_time_in_which_the_server_takes_nothing_is_not_the_client_s():
    stream = received(Clock(), [(0.01, 1000)] * 100, working_s=3600.0)
    assert stream.received_nbytes == 100_000


def test_a_client_that_is_gone_is_not_said_to_be_slow():
    def gone() -> Iterator[bytes]:
        yield b"1"
        raise grpc.RpcError

    with pytest.raises(StorageError) as error:
        list(Streams(Clock()).opened(lambda: None).received(gone()))
    assert error.value.kind == "cancelled"


def sent(clock: Clock, times: int, nbytes: int, pause_s: float) -> int:
    streams = Streams(clock)
    cut: list[str] = []
    stream = streams.opened(lambda: cut.append("off"))
    for _ in range(times):
        with stream.sending(nbytes):
            clock.now += pause_s
            streams.end_silent()
            if cut:
                raise grpc.RpcError
    return stream.sent_nbytes


def test_a_reader_below_the_least_rate_is_ended_and_small_messages_of_a_busy_server_are_not():
    assert sent(Clock(), 1000, 100, 0.9) == 100_000
    assert sent(Clock(), 450, FRAME_NBYTES, FRAME_NBYTES / MIN_RATE) == 450 * FRAME_NBYTES
    with pytest.raises(LimitError):
        sent(Clock(), 1000, FRAME_NBYTES, 20.0)
    with pytest.raises(grpc.RpcError):
        sent(Clock(), 1, FRAME_NBYTES, WINDOW_S + 1.0)


def test_calls_that_end_leave_nothing_behind():
    clock = Clock()
    streams = Streams(clock)
    for number in range(3):
        stream = streams.opened(lambda: pytest.fail("it has ended"))
        messages = stream.received(iter([b"1", b"2"]))
        next(messages)
        if number:
            messages.close()
    with pytest.raises(ZeroDivisionError), streams.opened(lambda: pytest.fail("it has ended")).sending(1):
        raise ZeroDivisionError
    clock.now += 10 * WINDOW_S
    streams.end_silent()


# -- over the wire -----------------------------------------------------------------------------------------------------


def test_a_slow_stream_is_answered_in_kind_and_its_push_goes_on_in_another(tmp_path: Path):
    clock = Clock()
    with serving(tmp_path) as server, WireClient(server.address) as client:
        server._streams.clock = clock
        client.call("Repositories.Create", pb.CreateRequest(repository="r", max_depth=8))
        push = new_push_id()
        client.call("Pushes.Begin", pb.BeginRequest(repository="r", push=push, model="m", branch="main"))
        taken = take_apart({"w": noise(1, 1000)}, "m", push)
        cells = [encode_planned(planned) for planned in taken.planned]
        client.call("Pushes.Plan", pb.PlanRequest(repository="r", push=push, cells=cells))
        records = taken.records()

        def slowly() -> Iterator[bytes]:
            header, first, *_ = write_messages("r", push, records)
            yield header
            for at in range(100):
                yield (at * 8).to_bytes(8, "little") + first[8 + at * 8 : 16 + at * 8]
                clock.now += 10.0

        with pytest.raises(Failure) as failure:
            client.call("Pushes.Write", slowly())
        assert (failure.value.status, failure.value.kind) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too_slow")
        assert failure.value.trailers["retry-after-ms"]
        client.call("Pushes.Write", write_messages("r", push, records))
        assert client.call("Pushes.Commit", pb.CommitRequest(repository="r", push=push, description=taken.description))


def test_a_push_whose_encoding_takes_long_takes_its_stream_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channel, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(streams_module, "come_again", partial(come_again, after_s=0.001))
    tensors = {f"w{number}": noise(number, 512, 512) for number in range(16)}
    answered: list[Answered] = []
    with (
        serving(tmp_path / "root", observe=answered.append) as server,
        lamella.init(f"grpc://{server.address}/team") as repo,
    ):
        server._streams.clock = Clock(step_s=1.1 * FRAME_NBYTES / MIN_RATE)
        repo.push(tensors, "m@main")
        assert bits(repo.checkout("m@main")) == bits(tensors)
    assert "too_slow" in {one.kind for one in answered if one.rpc == "Pushes.Write"}
