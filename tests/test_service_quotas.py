"""What one principal may hold of a server, and write to it."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from service import Failure, WireClient, prepare_by_wire, push_by_wire, serving, take_apart
from support import bits, new_repository, noise, store_of

import lamella
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.errors import ConflictError, InvalidInputError, LimitError, OutcomeUnknownError, StorageError
from lamella_engine.format.version import decode_description, version_id
from lamella_engine.objects import open_objects
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service.quotas import CALLS_OF_ONE, PUSHES, PUSHES_OF_ONE, Quotas
from lamella_engine.service.sessions import Session, Sessions
from lamella_engine.service.tokens import Tokens

DAY_S = 86_400.0


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def refused(quotas: Quotas, owner: str, nbytes: int) -> LimitError | None:
    claim = quotas.push(owner)
    try:
        claim.take(nbytes)
    except LimitError as error:
        return error
    finally:
        claim.release()
    return None


# -- counting ----------------------------------------------------------------------------------------------------------


def test_calls_are_counted_for_each_principal_and_given_back():
    quotas = Quotas()
    for _ in range(2):
        with ExitStack() as stack:
            for _ in range(CALLS_OF_ONE):
                stack.enter_context(quotas.call("ann"))
            with pytest.raises(LimitError) as error, quotas.call("ann"):
                pass
            assert error.value.kind == "too_many_calls"
            stack.enter_context(quotas.call("bob"))


def test_pushes_are_counted_for_each_principal_and_in_all():
    quotas = Quotas()
    claims = [quotas.push("ann") for _ in range(PUSHES_OF_ONE)]
    with pytest.raises(LimitError):
        quotas.push("ann")
    others = [quotas.push(f"other-{number}") for number in range(PUSHES - PUSHES_OF_ONE)]
    with pytest.raises(LimitError) as error:
        quotas.push("bob")
    assert error.value.kind == "too_many_pushes"
    others[0].release()
    others[0].release()
    quotas.push("bob")
    with pytest.raises(LimitError):
        quotas.push("bob")
    claims[0].release()
    quotas.push("ann")


def test_uncommitted_bytes_are_those_of_all_pushes_of_one_principal():
    quotas = Quotas(uncommitted_nbytes=100)
    first, second = quotas.push("ann"), quotas.push("ann")
    first.take(60)
    with pytest.raises(LimitError) as error:
        second.take(41)
    assert (error.value.kind, error.value.context) == ("uncommitted_quota", {"limit_nbytes": 100})
    assert "--max-uncommitted" in error.value.message
    second.take(40)
    quotas.push("bob").take(100)
    first.release()
    second.take(60)


def test_a_claim_that_was_released_holds_nothing_any_more():
    quotas = Quotas(uncommitted_nbytes=100)
    claim = quotas.push("ann")
    claim.take(100)
    claim.release()
    claim.take(100)
    assert refused(quotas, "ann", 100) is None


def test_what_may_be_written_in_a_day_comes_back_over_a_day():
    clock = Clock()
    quotas = Quotas(daily_nbytes=24_000, clock=clock)
    assert refused(quotas, "ann", 24_000) is None
    error = refused(quotas, "ann", 3000)
    assert error is not None
    assert error.kind == "daily_quota"
    assert error.context == {"limit_nbytes": 24_000, "retry_after_ms": 3 * 3_600_000}
    assert "180 minutes" in error.message
    assert "--max-daily" in error.message
    assert refused(quotas, "bob", 24_000) is None
    clock.now += 3 * 3600.0 - 1.0
    assert refused(quotas, "ann", 3000) is not None
    clock.now += 1.0
    assert refused(quotas, "ann", 3000) is None
    assert refused(quotas, "ann", 1) is not None
    clock.now += 10 * DAY_S
    assert refused(quotas, "ann", 24_000) is None
    assert refused(quotas, "ann", 1) is not None


def test_what_is_larger_than_a_day_s_bytes_comes_through_on_its_own_and_counts_in_full():
    clock = Clock()
    quotas = Quotas(daily_nbytes=1000, clock=clock)
    assert refused(quotas, "ann", 3000) is None
    clock.now += 2 * DAY_S
    assert refused(quotas, "ann", 1) is not None
    clock.now += DAY_S
    assert refused(quotas, "ann", 1000) is None


def test_no_bound_is_none():
    assert refused(Quotas(uncommitted_nbytes=0, daily_nbytes=0), "ann", 1 << 60) is None


@pytest.mark.parametrize("wrong", [{"uncommitted_nbytes": -1}, {"daily_nbytes": -1}])
def test_a_bound_is_not_negative(wrong: dict[str, int]):
    with pytest.raises(InvalidInputError):
        Quotas(**wrong)


# -- pushes ------------------------------------------------------------------------------------------------------------

WEIGHTS = {"a": noise(1, 5000)}
PUSHED = 25_000
"""More than a push of them holds, and less than two."""


@pytest.fixture
def store() -> PackedStore:
    return store_of(new_repository())


class Pusher:
    """Pushes the same again and again, of which nothing is stored before it is committed."""

    def __init__(self, store: PackedStore) -> None:
        self.store = store
        self.sessions = Sessions(Quotas(uncommitted_nbytes=PUSHED))

    def written(self, message: str = "", *, push: Any = None, again: bool = False) -> tuple[Session, Any]:
        push = push or new_push_id()
        session, _ = self.sessions.begin(self.store, "ann", push, model="m", branch="main", parent=None, again=again)
        parents = session.push.parents
        parent = parents[0].id if parents else ""
        taken = take_apart({"w": noise(len(message), 5000)}, "m", push, parent=parent, message=message)
        session.plan(0, taken.planned)
        session.receive(0, memoryview(taken.records()))
        session.flush()
        return session, decode_description(taken.description, expected=version_id(taken.description))


def test_a_push_holds_its_bytes_until_it_is_committed(store: PackedStore):
    pusher = Pusher(store)
    for number in range(3):
        session, description = pusher.written("." * number)
        with pytest.raises(LimitError) as error:
            pusher.written("." * (number + 1))
        assert error.value.kind == "uncommitted_quota"
        pusher.sessions.sweep(idle_s=1e9)
        session.commit(description)
        session.commit(description)
        for key in [key for key, other in pusher.sessions._sessions.items() if other is not session]:
            pusher.sessions._sessions[key].abandon()


def ended_by_abandon(pusher: Pusher, session: Session, description: Any) -> None:
    session.abandon()


def ended_by_sweep(pusher: Pusher, session: Session, description: Any) -> None:
    pusher.sessions.sweep(idle_s=0)


def ended_by_beginning_anew(pusher: Pusher, session: Session, description: Any) -> None:
    again, _ = pusher.written(push=session.push.id, again=True)
    again.abandon()


def ended_with_an_outcome_that_nobody_knows(pusher: Pusher, session: Session, description: Any) -> None:
    def lost(description: Any) -> Any:
        raise OutcomeUnknownError("nobody knows")

    session.push.commit = lost
    with pytest.raises(OutcomeUnknownError):
        session.commit(description)
    pusher.sessions.sweep(idle_s=0)
    with pytest.raises(OutcomeUnknownError):
        session.commit(description)


@pytest.mark.parametrize(
    "end",
    [ended_by_abandon, ended_by_sweep, ended_by_beginning_anew, ended_with_an_outcome_that_nobody_knows],
)
def test_a_push_that_ends_in_any_way_holds_nothing(store: PackedStore, end: Any):
    pusher = Pusher(store)
    for number in range(3):
        end(pusher, *pusher.written("." * number))
    assert pusher.sessions._quotas._pushes == 0
    assert [held.uncommitted_nbytes for held in pusher.sessions._quotas._held.values()] == [0]


@pytest.mark.parametrize("error", [StorageError("away"), ConflictError("no")])
def test_a_push_that_cannot_begin_holds_nothing(store: PackedStore, monkeypatch: pytest.MonkeyPatch, error: Exception):
    pusher = Pusher(store)

    def failing(*arguments: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(store, "begin", failing)
    with pytest.raises(type(error)):
        pusher.written()
    assert pusher.sessions._quotas._pushes == 0


def test_of_two_calls_that_begin_one_push_one_holds_it(store: PackedStore, monkeypatch: pytest.MonkeyPatch):
    pusher, push = Pusher(store), new_push_id()
    begin, first = store.begin, []

    def slowly(*arguments: Any, **named: Any) -> Any:
        if not first:
            first.append(None)
            first[0] = pusher.sessions.begin(store, "ann", push, model="m", branch="main", parent=None, again=False)
        return begin(*arguments, **named)

    monkeypatch.setattr(store, "begin", slowly)
    second = pusher.sessions.begin(store, "ann", push, model="m", branch="main", parent=None, again=False)
    assert first == [second]
    assert pusher.sessions._quotas._pushes == 1


# -- over the wire -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bounded(tmp_path: Path) -> Iterator[tuple[str, Clock]]:
    """A server of little room, its clock, and a repository in it."""
    clock = Clock()
    quotas = Quotas(uncommitted_nbytes=50_000, daily_nbytes=120_000, clock=clock)
    with serving(tmp_path, quotas=quotas) as server, WireClient(server.address) as client:
        client.call("Repositories.Create", pb.CreateRequest(repository="r", max_depth=8))
        yield server.address, clock


def test_a_client_is_told_which_quota_it_met_and_what_to_do(bounded: tuple[str, Clock]):
    address, clock = bounded
    with lamella.open(f"grpc://{address}/r") as repo:
        with pytest.raises(lamella.LimitError) as error:
            repo.push({"w": noise(1, 20_000)}, "m@main")
        assert error.value.kind == "uncommitted_quota"
        assert "--max-uncommitted" in str(error.value)
        for number in range(3):
            repo.push({"w": noise(number, 9000)}, "m@main")
        with pytest.raises(lamella.LimitError) as error:
            repo.push({"w": noise(3, 9000)}, "m@main")
        assert error.value.kind == "daily_quota"
        assert error.value.context["retry_after_ms"] > 60_000
        assert "--max-daily" in str(error.value)
        assert len(list(repo.log("m@main"))) == 3
        clock.now += DAY_S
        repo.push({"w": noise(3, 9000)}, "m@main")
        assert bits(repo.checkout("m@main")) == bits({"w": noise(3, 9000)})


def test_other_clients_are_told_when_to_come_again_and_whether(bounded: tuple[str, Clock]):
    with WireClient(bounded[0]) as client:
        with pytest.raises(Failure) as error:
            prepare_by_wire(client, "r", "m@main", {"w": noise(1, 20_000)}, new_push_id())
        assert (error.value.status, error.value.kind) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "uncommitted_quota")
        assert "retry-after-ms" not in error.value.trailers
        for number in range(3):
            push_by_wire(client, "r", "m@main", {"w": noise(number, 9000)})
        with pytest.raises(Failure) as error:
            push_by_wire(client, "r", "m@main", {"w": noise(4, 9000)})
        assert (error.value.status, error.value.kind) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "daily_quota")
        assert int(error.value.trailers["retry-after-ms"]) > 60_000


def test_what_one_principal_holds_keeps_nobody_else_from_pushing(tmp_path: Path):
    tokens = Tokens(open_objects(str(tmp_path), create=True))
    ann, bob = (tokens.create(name, "writer")[0] for name in ("ann", "bob"))
    with serving(tmp_path, quotas=Quotas(uncommitted_nbytes=50_000)) as server:
        with WireClient(server.address) as client:
            client.call("Repositories.Create", pb.CreateRequest(repository="r", max_depth=8))
        with WireClient(server.address, token=ann) as client:
            prepare_by_wire(client, "r", "ann@main", {"w": noise(1, 10_000)}, new_push_id())
            with pytest.raises(Failure):
                prepare_by_wire(client, "r", "ann@main", {"w": noise(2, 10_000)}, new_push_id())
        with WireClient(server.address, token=bob) as client:
            push_by_wire(client, "r", "bob@main", {"w": noise(2, 10_000)})
