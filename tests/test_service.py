"""The server: whose turn it is, which repositories there are, what a push remembers, and what abuse it survives."""

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from service import (
    Failure,
    WireClient,
    prepare_by_wire,
    push_by_wire,
    serving,
    take_apart,
)
from support import new_repository, noise, store_of

from lamella_engine.codecs import Encoding
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.content_store.seam import Blob, Planned
from lamella_engine.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    LimitError,
    NotFoundError,
    OutcomeUnknownError,
    RepositoryNotFoundError,
    StorageError,
)
from lamella_engine.executor import InlineExecutor
from lamella_engine.format.digests import chunk_id
from lamella_engine.format.version import decode_description, version_id
from lamella_engine.maintenance import verify
from lamella_engine.model import Cell, ChunkId
from lamella_engine.opening import open_repository
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service import repositories as repositories_module
from lamella_engine.service import rpcs as rpcs_module
from lamella_engine.service import sessions as sessions_module
from lamella_engine.service.quotas import PUSHES_OF_ONE, Quotas
from lamella_engine.service.repositories import Repositories
from lamella_engine.service.server import Server
from lamella_engine.service.sessions import Session, Sessions
from lamella_engine.service.slots import Slots
from lamella_engine.wire import (
    FLOATING,
    METHODS,
    TRIED_BASE,
    decode_readings,
    decode_version,
    encode_cells,
    encode_record,
)

Status = grpc.StatusCode

# -- slots -------------------------------------------------------------------------------------------------------------


def hold(slots: Slots, owner: str, stack: ExitStack) -> bool:
    try:
        stack.enter_context(slots.taken(owner))
    except LimitError:
        return False
    return True


def test_one_owner_holds_half_of_the_slots_and_others_the_rest():
    slots = Slots(4, patience_s=0)
    with ExitStack() as stack:
        assert [hold(slots, "a", stack) for _ in range(3)] == [True, True, False]
        assert [hold(slots, "b", stack) for _ in range(3)] == [True, True, False]
        assert not hold(slots, "c", stack)
    with ExitStack() as stack:
        assert hold(slots, "c", stack)


def test_the_only_slot_goes_to_whoever_comes():
    slots = Slots(1, patience_s=0)
    with ExitStack() as stack:
        assert hold(slots, "a", stack)
        assert not hold(slots, "b", stack)


def test_a_slot_is_given_back_by_whoever_fails():
    slots = Slots(2, patience_s=0)
    for _ in range(5):
        with pytest.raises(ZeroDivisionError), slots.taken("a"):
            raise ZeroDivisionError
    with ExitStack() as stack:
        assert hold(slots, "a", stack)


def test_slots_go_in_the_order_of_coming_but_past_owners_who_have_their_share():
    slots = Slots(2, patience_s=30.0)
    got: list[str] = []
    release = {name: threading.Event() for name in ("a2", "b1", "b2")}

    def come(owner: str, name: str) -> None:
        with slots.taken(owner):
            got.append(name)
            release[name].wait(30.0)

    with ThreadPoolExecutor(3) as pool, slots.taken("a"):
        waiting = []
        for number, (owner, name) in enumerate((("a", "a2"), ("b", "b1"), ("b", "b2"))):
            waiting.append(pool.submit(come, owner, name))
            until(lambda number=number: len(slots._waiting) + len(got) == number + 1)
        until(lambda: got == ["b1"])  # a has its half
        release["b1"].set()
        until(lambda: got == ["b1", "b2"])
        assert len(slots._waiting) == 1
        release["b2"].set()
        waiting[2].result(30.0)
        release["a2"].set()
    assert got == ["b1", "b2", "a2"]


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that other threads are about to do; fails if they do not."""
    pause = threading.Event()
    for _ in range(6000):
        if holds():
            return
        pause.wait(0.005)
    pytest.fail("nothing happened")


# -- repositories ------------------------------------------------------------------------------------------------------


@pytest.fixture
def repositories(tmp_path: Path) -> Repositories:
    return Repositories(str(tmp_path / "root"), InlineExecutor())


@pytest.mark.parametrize("name", ["a", "team/bert", "a/b/c/d", "0.1_x-y", "a" * 63, "access-x", "logs"])
def test_a_repository_is_made_found_again_and_not_made_twice(repositories: Repositories, tmp_path: Path, name: str):
    made = repositories.create(name, max_depth=3)
    assert repositories.open(name) is made
    assert (tmp_path / "root" / name / "log").is_dir()
    again = Repositories(str(tmp_path / "root"), InlineExecutor())
    assert again.open(name).log.state.genesis == made.log.state.genesis
    with pytest.raises(AlreadyExistsError):
        again.create(name, max_depth=3)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/", "a/", "/a", "a//b", "a/..", "../a", "a/../b", "a..b", "./a", ".a", "-a", "a/.b"),
        *("A", "é", "a b", "a\n", "a\x00", "a\\b", "~", "~root", "%2e%2e", "a/b/c/d/e", "a" * 64, "s3://bucket", "*"),
        *("log", "access", "team/log", "log/x", "packs", "audit", "index", "a/meta", "probe", "incoming"),
    ],
)
def test_a_name_that_leads_elsewhere_is_none(repositories: Repositories, tmp_path: Path, name: str):
    with pytest.raises(InvalidInputError) as error:
        repositories.create(name, max_depth=3)
    assert error.value.kind == "bad_repository_name"
    with pytest.raises(RepositoryNotFoundError):
        repositories.open(name)
    assert not (tmp_path / "root").exists()


def test_one_repository_may_lie_in_the_directory_of_another(repositories: Repositories):
    outer, inner = repositories.create("a", max_depth=3), repositories.create("a/b", max_depth=4)
    assert outer.log.state.genesis.repository != inner.log.state.genesis.repository
    assert repositories.open("a/b") is inner


def test_a_directory_that_is_no_repository_is_none(repositories: Repositories, tmp_path: Path):
    (tmp_path / "root/empty").mkdir(parents=True)
    with pytest.raises(RepositoryNotFoundError) as error:
        repositories.open("empty")
    assert str(tmp_path) not in error.value.message


def test_repositories_that_nothing_uses_are_closed_but_for_the_newest(
    repositories: Repositories, monkeypatch: pytest.MonkeyPatch
):
    """At once, not when garbage is collected next."""
    monkeypatch.setattr(repositories_module, "KEPT_OPEN", 2)
    opened = [weakref.ref(repositories.create(name, max_depth=3)) for name in "abc"]
    assert [store() is None for store in opened] == [True, False, False]
    assert repositories.open("a").log.state.genesis.max_depth == 3
    assert repositories.open("c") is opened[2]()
    assert opened[1]() is None


def test_a_repository_that_somebody_holds_is_not_opened_a_second_time(
    repositories: Repositories, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(repositories_module, "KEPT_OPEN", 1)
    held = repositories.create("held", max_depth=3)
    for number in range(5):
        repositories.create(f"r{number}", max_depth=3)
        assert repositories.open("held") is held


def test_closed_repositories_hold_no_files(repositories: Repositories, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(repositories_module, "KEPT_OPEN", 1)
    open_files = []
    for number in range(6):
        repositories.create(f"r{number}", max_depth=3)
        open_files.append(len(os.listdir("/proc/self/fd")))
    assert open_files[1:] == [open_files[1]] * 5


# -- sessions ----------------------------------------------------------------------------------------------------------

WEIGHTS = {"a": noise(1, 5000), "b": noise(2, 3000)}


@pytest.fixture
def store() -> PackedStore:
    return store_of(new_repository())


def begin(sessions: Sessions, store: PackedStore, push: Any, *, owner: str = "ann", again: bool = False, **where: Any):
    place = {"model": "m", "branch": "main", "parent": None, **where}
    return sessions.begin(store, owner, push, again=again, **place)


def planned(session: Session, tensors: Any = WEIGHTS, message: str = "") -> Any:
    """Plan all of a version; return it, taken apart."""
    parents = session.push.parents
    taken = take_apart(
        tensors, session.push.model, session.push.id, parent=parents[0].id if parents else "", message=message
    )
    session.plan(0, taken.planned)
    return taken


def write(session: Session, records: bytes, start: int = 0) -> int:
    session.receive(start, memoryview(records)[start:])
    return session.flush()


def described(taken: Any) -> Any:
    return decode_description(taken.description, expected=version_id(taken.description))


def objects_of(store: PackedStore) -> set[str]:
    return {info.name for info in store.objects.list("packs/")}


def test_a_push_that_is_begun_twice_is_one(store: PackedStore):
    sessions, push = Sessions(Quotas()), new_push_id()
    session, taken = begin(sessions, store, push)
    records = planned(session).records()
    assert taken == 0
    written = write(session, records)
    assert written == len(records)
    assert begin(sessions, store, push) == (session, written)
    with pytest.raises(InvalidInputError) as error:
        begin(sessions, store, push, branch="other")
    assert error.value.kind == "push_reused"


def test_a_plan_that_is_repeated_is_answered_alike(store: PackedStore):
    session, _ = begin(Sessions(Quotas()), store, new_push_id())
    cells = take_apart(WEIGHTS, "m", session.push.id).planned
    answers = session.plan(0, cells)
    assert all(answer is not None for answer in answers)
    assert session.plan(0, cells) == answers
    assert session.plan(len(cells), cells) == [None] * len(cells)  # other cells with the same chunks


def test_batches_that_overtake_each_other_are_planned_in_order(store: PackedStore):
    session, _ = begin(Sessions(Quotas()), store, new_push_id())
    cells = take_apart(WEIGHTS, "m", session.push.id).planned
    with ThreadPoolExecutor(3) as pool:
        late = [pool.submit(session.plan, first, cells[first : first + 1]) for first in (2, 1)]
        answers = [session.plan(0, cells[:1]), late[1].result(30.0), late[0].result(30.0)]
    assert [answer.chunk for (answer,) in answers if answer is not None] == [cell.chunk for cell in cells[:3]]


@pytest.mark.parametrize("first", [0, 1])
def test_cells_that_are_planned_out_of_turn_are_refused(store: PackedStore, monkeypatch, first: int):
    monkeypatch.setattr(sessions_module, "_ORDER_PATIENCE_S", 0.0)
    session, _ = begin(Sessions(Quotas()), store, new_push_id())
    cells = take_apart(WEIGHTS, "m", session.push.id).planned
    if not first:
        session.plan(0, cells[:2])
    with pytest.raises(InvalidInputError) as error:
        session.plan(first, cells[2:])
    assert error.value.kind == "out_of_turn"


def test_a_push_has_so_many_cells_at_most(store: PackedStore, monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_PLANNED", 2)
    session, _ = begin(Sessions(Quotas()), store, new_push_id())
    cells = [Planned(Cell("w", number), ChunkId(bytes([number]) * 32)) for number in range(3)]
    session.plan(0, cells[:2])
    with pytest.raises(LimitError) as caught:
        session.plan(2, cells[2:])
    assert caught.value.kind == "push_limit"


def test_bytes_that_leave_a_gap_are_refused_and_those_that_came_before_are_skipped(store: PackedStore):
    session, _ = begin(Sessions(Quotas()), store, new_push_id())
    taken = planned(session)
    records = taken.records()
    session.receive(0, memoryview(records[:1000]))
    with pytest.raises(InvalidInputError) as error:
        session.receive(1001, memoryview(records[1001:]))
    assert error.value.kind == "gap"
    session.receive(500, memoryview(records[500:800]))
    session.receive(200, memoryview(records)[200:])
    assert session.flush() == len(records)
    assert session.commit(described(taken)).number == 1


def test_a_stream_that_breaks_is_taken_up_where_the_last_answer_was(store: PackedStore):
    sessions = Sessions(Quotas())
    session, _ = begin(sessions, store, new_push_id())
    taken = planned(session)
    records = taken.records()
    first = len(records) - len(taken.records(skip=1))
    session.receive(0, memoryview(records[: first + 7]))
    assert session.flush() == first
    again, position = begin(sessions, store, session.push.id)
    assert (again, position) == (session, first)
    assert write(session, records, first) == len(records)
    assert session.commit(described(taken)).number == 1


def wrong(taken: Any, kind: str) -> bytes:
    (id, (data, width)), *_ = taken.chunks.items()
    if kind == "wrong_blob":
        return b"".join(map(bytes, encode_record(Blob(id, Encoding.RAW, width, len(data), bytes(len(data)), None))))
    if kind == "wrong_base":
        base = chunk_id(b"base")
        return b"".join(map(bytes, encode_record(Blob(id, Encoding.RAW, width, len(data), data, base))))
    unplanned = b"never planned"
    blob = Blob(chunk_id(unplanned), Encoding.RAW, 1, len(unplanned), unplanned, None)
    return b"".join(map(bytes, encode_record(blob)))


@pytest.mark.parametrize("kind", ["wrong_blob", "wrong_base", "unplanned_blob"])
def test_a_blob_that_is_not_what_was_asked_for_is_refused_and_the_push_goes_on(store: PackedStore, kind: str):
    session, _ = begin(Sessions(Quotas()), store, new_push_id())
    taken = planned(session)
    with pytest.raises(InvalidInputError) as error:
        write(session, wrong(taken, kind))
    assert error.value.kind == kind
    with pytest.raises(InvalidInputError) as error:
        session.commit(described(taken))
    assert error.value.kind == "incomplete_push"
    assert write(session, taken.records(), session.rewind()) == len(taken.records())
    assert session.commit(described(taken)).number == 1


def test_bytes_that_are_no_record_are_refused_and_damaged_ones_may_come_again(store: PackedStore):
    session, _ = begin(Sessions(Quotas()), store, new_push_id())
    taken = planned(session)
    with pytest.raises(InvalidInputError) as invalid:
        write(session, b"\xff" * 200)
    assert invalid.value.kind == "bad_record"
    session.rewind()
    records = taken.records()
    with pytest.raises(StorageError) as damaged:
        write(session, records[:-1] + bytes([records[-1] ^ 1]))
    assert (damaged.value.kind, damaged.value.transient) == ("changed_on_its_way", True)
    assert write(session, records, session.rewind()) == len(records)


def test_a_push_that_is_begun_anew_plans_and_writes_everything_again(store: PackedStore):
    sessions, push = Sessions(Quotas()), new_push_id()
    session, _ = begin(sessions, store, push)
    write(session, planned(session).records())
    again, taken = begin(sessions, store, push, again=True)
    assert again is not session
    assert taken == 0
    version = planned(again)
    write(again, version.records())
    assert again.commit(described(version)).number == 1
    assert objects_of(store) == set(again.push._writer.written)


def test_a_call_that_waited_while_its_push_was_given_up_changes_nothing(store: PackedStore):
    """Else a commit that comes late would record a version whose packs are deleted."""
    sessions, push = Sessions(Quotas()), new_push_id()
    session, _ = begin(sessions, store, push)
    taken = planned(session)
    write(session, taken.records())
    begin(sessions, store, push, again=True)
    for call in (
        lambda: session.commit(described(taken)),
        lambda: session.plan(99, []),
        lambda: session.receive(0, memoryview(b"")),
        session.flush,
        session.rewind,
    ):
        with pytest.raises(NotFoundError) as error:
            call()
        assert error.value.kind == "no_session"
    assert store.log.refresh().number == 0


def test_a_batch_that_waits_for_its_turn_ends_with_its_push(store: PackedStore):
    session, _ = begin(Sessions(Quotas()), store, new_push_id())
    cells = take_apart(WEIGHTS, "m", session.push.id).planned
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(session.plan, 1, cells[1:])
        until(lambda: bool(session._turn._waiters))
        session.abandon()
        with pytest.raises(NotFoundError):
            waiting.result(10.0)


def test_a_plan_that_failed_half_way_is_begun_again(store: PackedStore, monkeypatch: pytest.MonkeyPatch):
    sessions, push = Sessions(Quotas()), new_push_id()
    session, _ = begin(sessions, store, push)
    plan = session.push.plan

    def breaking(cells: Any) -> Iterator[Any]:
        yield next(plan(cells))
        raise StorageError("away", transient=True)

    monkeypatch.setattr(session.push, "plan", breaking)
    with pytest.raises(StorageError):
        planned(session)
    with pytest.raises(NotFoundError):
        sessions.get(store, "ann", push)
    again, _ = begin(sessions, store, push)
    taken = planned(again)
    write(again, taken.records())
    assert again.commit(described(taken)).number == 1


def test_a_commit_whose_answer_was_lost_is_repeated(store: PackedStore):
    sessions = Sessions(Quotas())
    session, _ = begin(sessions, store, new_push_id())
    taken = planned(session)
    write(session, taken.records())
    recorded = session.commit(described(taken))
    assert session.commit(described(taken)) == recorded
    session.abandon()
    assert objects_of(store)
    # ... and by a client that had to begin again, at this server or another
    for again, _ in (
        begin(sessions, store, session.push.id, again=True),
        begin(Sessions(Quotas()), store, session.push.id),
    ):
        assert again is not session
    assert store.pushed(session.push.id) == recorded


@pytest.mark.parametrize("then", [InvalidInputError("no"), ConflictError("no")])
def test_what_may_have_been_recorded_is_never_deleted(store: PackedStore, monkeypatch, then: Exception):
    """The commit went through and its answer was lost; what is said of a later one is said of that one alone."""
    sessions = Sessions(Quotas())
    session, _ = begin(sessions, store, new_push_id())
    taken = planned(session)
    write(session, taken.records())
    commit = session.push.commit

    def lost(description: Any, **options: Any) -> Any:
        commit(description, **options)
        raise OutcomeUnknownError("nobody knows")

    monkeypatch.setattr(session.push, "commit", lost)
    with pytest.raises(OutcomeUnknownError):
        session.commit(described(taken))

    def refused(description: Any, **options: Any) -> Any:
        raise then

    monkeypatch.setattr(session.push, "commit", refused)
    with pytest.raises(type(then)):
        session.commit(replace(described(taken), model="other"))
    session.abandon()
    sessions.sweep(idle_s=0)
    assert objects_of(store) == set(session.push._writer.written)
    assert problems(store) == []


def problems(store: PackedStore) -> list[str]:
    return [problem.message for problem in verify(store, deep=True).problems]


def test_a_push_that_lost_its_race_leaves_nothing(store: PackedStore):
    sessions = Sessions(Quotas())
    pushes = [begin(sessions, store, new_push_id())[0] for _ in range(2)]
    versions = [planned(session, message=str(number)) for number, session in enumerate(pushes)]
    for session, taken in zip(pushes, versions, strict=True):
        write(session, taken.records())
    assert pushes[0].commit(described(versions[0])).number == 1
    with pytest.raises(ConflictError):
        pushes[1].commit(described(versions[1]))
    pushes[1].abandon()
    assert objects_of(store) == set(pushes[0].push._writer.written)


def test_what_nobody_calls_for_is_swept_and_what_is_used_stays(store: PackedStore):
    sessions = Sessions(Quotas())
    idle, used = (begin(sessions, store, new_push_id())[0] for _ in range(2))
    write(idle, planned(idle).records())
    idle.push._writer.finish()
    assert objects_of(store)
    idle.used -= 601.0
    sessions.sweep()
    assert objects_of(store) == set()
    with pytest.raises(NotFoundError) as error:
        sessions.get(store, "ann", idle.push.id)
    assert error.value.kind == "no_session"
    assert sessions.get(store, "ann", used.push.id) is used


def test_one_principal_has_so_many_pushes_at_most(store: PackedStore):
    sessions = Sessions(Quotas())
    for _ in range(PUSHES_OF_ONE):
        begin(sessions, store, new_push_id())
    with pytest.raises(LimitError) as error:
        begin(sessions, store, new_push_id())
    assert error.value.kind == "too_many_pushes"
    begin(sessions, store, new_push_id(), owner="bob", branch="bob")


BASE = np.float32(1.0) + noise(3, 40_000) * np.float32(0.01)
NEAR = BASE * np.float32(1.0001)


def test_a_full_blob_that_was_offered_a_base_is_encoded_against_it(store: PackedStore):
    """By the server, as the client cannot: it does not have the base."""
    stored = {}
    for flags in (FLOATING, FLOATING | TRIED_BASE):
        sessions, branch = Sessions(Quotas()), f"tried-{flags & TRIED_BASE}"
        for number, tensor in enumerate((BASE, NEAR)):
            session, _ = begin(sessions, store, new_push_id(), branch=branch)
            taken = planned(session, {"w": tensor + np.float32(flags)}, message=str(flags))
            missing = set(session.push._intake._wanted)
            records = b"".join(
                part
                for chunk, (data, width) in taken.chunks.items()
                if chunk in missing
                for part in map(bytes, encode_record(Blob(chunk, Encoding.RAW, width, len(data), data, None), flags))
            )
            write(session, records)
            version = session.commit(described(taken))
            assert version.number == number + 1 + 2 * len(stored)
        ((_, chain),) = store.locate(version.id, [Cell("w", 0)])
        stored[flags] = [blob.encoded_nbytes for blob in chain]
    assert len(stored[FLOATING]) == 2
    assert stored[FLOATING][-1] < 0.7 * NEAR.nbytes
    assert stored[FLOATING | TRIED_BASE] == [NEAR.nbytes]
    assert problems(store) == []


@given(width=st.sampled_from([1, 2, 4, 8]), floating=st.booleans(), shorter=st.integers(0, 9))
def test_a_blob_is_taken_whatever_its_sender_says_of_its_lanes(width: int, floating: bool, shorter: int):
    store, data = store_of(new_repository()), BASE.tobytes()[: 4096 - 8 * shorter]
    for number, chunk in enumerate((BASE.tobytes()[:4096], data[:-8] + bytes(8))):
        session, _ = begin(Sessions(Quotas()), store, new_push_id())
        (missing,) = session.plan(0, [first_cell(chunk)])
        assert missing is not None
        flags = FLOATING if floating else 0
        blob = Blob(missing.chunk, Encoding.RAW, width, len(chunk), chunk, None)
        records = b"".join(map(bytes, encode_record(blob, flags)))
        assert write(session, records) == len(records), number


def first_cell(chunk: bytes) -> Planned:
    return Planned(Cell("w", 0), chunk_id(chunk))


# -- a whole push and read, by nothing but the wire --------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Server, Path]]:
    root = tmp_path_factory.mktemp("served")
    with serving(root, reflection=True) as server, WireClient(server.address) as client:
        client.call("Repositories.Create", pb.CreateRequest(repository="team", max_depth=8))
        yield server, root


@pytest.fixture
def client(served: tuple[Server, Path]) -> Iterator[WireClient]:
    with WireClient(served[0].address) as client:
        yield client


def read(client: WireClient, version: str, cells: list[Cell], **request: Any) -> list[Any]:
    runs = encode_cells((cell, None) for cell in cells)
    message = pb.ReadRequest(repository="team", version=version, cells=runs, **request)
    return list(decode_readings(client.call("Versions.Read", message), cells))


def test_a_push_and_a_read_need_nothing_but_the_wire(client: WireClient, served: tuple[Server, Path]):
    recorded = decode_version(push_by_wire(client, "team", "wire@main", WEIGHTS, message="by hand"))
    assert recorded.description.message == "by hand"
    readings = read(client, recorded.id, [Cell("a", 0), Cell("b", 0), Cell(None, 0)])
    assert [len(reading.chain) for reading in readings] == [1, 1, 1]
    assert bytes(readings[0].chain[0].payload) == WEIGHTS["a"].tobytes()
    with open_repository(served[1] / "team") as repo:
        version = repo.version("wire@main")
        assert version["b"][:].tobytes() == WEIGHTS["b"].tobytes()
        assert repo.verify(deep=True).ok
    outcome = client.call("Pushes.Outcome", pb.PushRequest(repository="team", push=recorded.description.push))
    assert decode_version(outcome.version) == recorded


def test_a_second_push_follows_the_first_and_what_is_held_does_not_travel(client: WireClient):
    first = decode_version(push_by_wire(client, "team", "next@main", {"w": BASE}))
    second = decode_version(push_by_wire(client, "team", "next@main", {"w": NEAR}))
    assert [parent.id for parent in second.parents] == [first.id]
    (whole,) = read(client, second.id, [Cell("w", 0)])
    (rest,) = read(client, second.id, [Cell("w", 0)], have=first.id)
    (same,) = read(client, first.id, [Cell("w", 0)], have=first.id)
    assert [blob.chunk for blob in whole.chain] == [chunk_id(BASE.tobytes()), chunk_id(NEAR.tobytes())]
    assert rest.chain == whole.chain[1:]
    assert same.chain == ()
    ancestors = client.call("Versions.Ancestors", pb.VersionRequest(repository="team", id=second.id))
    assert [message.number for message in ancestors] == [2, 1]


def test_two_servers_share_a_repository_and_a_push_can_go_on_at_the_other(tmp_path: Path):
    with serving(tmp_path) as one, serving(tmp_path) as two, WireClient(one.address) as a, WireClient(two.address) as b:
        a.call("Repositories.Create", pb.CreateRequest(repository="team", max_depth=8))
        push_by_wire(a, "team", "m@main", {"w": BASE})
        assert push_by_wire(b, "team", "m@main", {"w": NEAR}).number == 2
        push = new_push_id()
        commit = prepare_by_wire(a, "team", "m@main", {"w": BASE + 1}, push)
        with pytest.raises(Failure) as failure:
            b.call("Pushes.Commit", commit)
        assert failure.value.kind == "no_session"
        assert prepare_by_wire(b, "team", "m@main", {"w": BASE + 1}, push).push == push
        recorded = b.call("Pushes.Commit", commit)
        assert recorded.number == 3
        assert a.call("Pushes.Outcome", pb.PushRequest(repository="team", push=push)).version == recorded


def test_a_push_and_a_follower_keep_their_repository_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(repositories_module, "KEPT_OPEN", 1)
    monkeypatch.setattr(rpcs_module, "_WATCH_S", 60.0)  # so that only the commit itself wakes a follower
    with serving(tmp_path) as server, WireClient(server.address) as client:
        for name in ("team", "other"):
            client.call("Repositories.Create", pb.CreateRequest(repository=name, max_depth=8))
        push_by_wire(client, "team", "m@main", {"w": BASE})
        request = pb.WatchRequest(repository="team", model="m", ref="main").SerializeToString()
        stream = client.channel.unary_stream(METHODS["Versions.Watch"].path)(request, timeout=30.0)
        assert pb.Version.FromString(next(stream)).number == 1
        commit = prepare_by_wire(client, "team", "m@main", {"w": NEAR}, new_push_id())
        push_by_wire(client, "other", "m@main", {"w": NEAR})
        gc.collect()
        assert client.call("Pushes.Commit", commit).number == 2
        assert pb.Version.FromString(next(stream)).number == 2
        stream.cancel()


def test_a_follower_is_told_of_versions_as_they_come(client: WireClient):
    first = push_by_wire(client, "team", "followed@main", {"w": BASE})
    request = pb.WatchRequest(repository="team", model="followed", ref="main").SerializeToString()
    stream = client.channel.unary_stream(METHODS["Versions.Watch"].path)(request, timeout=30.0)
    assert pb.Version.FromString(next(stream)) == first
    second = push_by_wire(client, "team", "followed@main", {"w": NEAR})
    assert pb.Version.FromString(next(stream)) == second
    stream.cancel()


def test_health_and_the_description_of_the_rpcs_are_there_for_those_who_ask(client: WireClient):
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    stub = health_pb2_grpc.HealthStub(client.channel)
    for service in ("", "lamella.v1.Pushes"):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20.0)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as error:
        stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=20.0)
    assert error.value.code() is Status.NOT_FOUND
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = reflection_pb2_grpc.ServerReflectionStub(client.channel).ServerReflectionInfo(iter([ask]), timeout=20.0)
    names = {service.name for answer in answers for service in answer.list_services_response.service}
    assert {"lamella.v1.Versions", "lamella.v1.Pushes"} <= names
