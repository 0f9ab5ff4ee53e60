"""Reads are noted in chains that the log vouches for: nothing noted is lost, and nothing changed goes unseen."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
from faults import Fault, FaultyObjects
from support import Arrivals, account, copy_of, names_of, new_repository, noise, open_again, store_of

from lamella_engine.auditing import STORED_NBYTES, audit, stored
from lamella_engine.content_store.acting import acting_as, new_push_id
from lamella_engine.content_store.committing import Change
from lamella_engine.content_store.log import Log
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.errors import (
    CorruptionError,
    InvalidInputError,
    PermissionDeniedError,
    StorageError,
    UnsupportedFormatError,
)
from lamella_engine.executor import InlineExecutor
from lamella_engine.format.audit import Read, decode_segment, encode_read, encode_segment, segment_digest
from lamella_engine.format.entry import RefChange, decode_entry, encode_entry, entry_digest
from lamella_engine.format.names import audit_name, log_name
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.service import audit as audit_module
from lamella_engine.service.audit import ReadAudit
from lamella_engine.signing import generate_key, load_key


def read(number, **changes):
    fields = {
        "time": "2026-11-21T00:00:00Z",
        "principal": "ann",
        "peer": "ipv4:10.0.0.7:1",
        "rpc": "Versions.Read",
        "what": f"m@v{number}",
        "status": "OK",
    }
    return Read(**fields | changes)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(audit_module, "SEGMENT_READS", 10)
    monkeypatch.setattr(audit_module, "_MOST_WAITING", 100)


@pytest.fixture
def objects():
    objects = MemoryObjects()
    new_repository(objects).push({"w": noise(0, 100)}, "m@main")
    return objects


def opened(objects):
    return PackedStore(objects, InlineExecutor())


def segments(objects):
    return [name for name in names_of(objects) if name.startswith("audit/")]


def change(store, name):
    """Commit something, so that the log vouches for what was noted."""
    store.log.commit(new_push_id(), lambda state: Change(refs=(RefChange("m", name, "alias", None, 1),)))


def noted(objects, reads, *, vouched=True):
    """Note reads through a store of its own, and have the log vouch for them."""
    store = opened(objects)
    notes = ReadAudit(store)
    for one in reads:
        notes.note(one)
    notes.flush()
    if vouched:
        change(store, f"a{len(names_of(objects))}")
    return notes


def kinds(objects):
    return {problem.kind for problem in account(open_again(objects)).problems}


def replace_object(objects, name, data):
    objects.delete(name)
    objects.put_if_absent(name, [data])


def test_reads_come_back_in_their_order_and_the_log_vouches_for_them(objects):
    reads = [read(number) for number in range(35)]
    noted(objects, reads)
    assert len(segments(objects)) == 4
    found = account(open_again(objects))
    assert found.reads == reads
    assert (found.unvouched, found.problems) == (0, [])
    (carried,) = [entry.audit for _, entry, _ in Log(objects).history() if entry.audit]
    assert list(carried) == [segments(objects)[-1]]
    assert open_again(objects).verify(deep=True).problems == []


def test_a_segment_is_written_when_it_is_full_or_old_or_at_the_end(objects):
    store = opened(objects)
    notes = ReadAudit(store)
    for number in range(9):
        notes.note(read(number))
    notes.flush(older_than_s=3600)
    assert segments(objects) == []
    notes.note(read(9))
    assert len(segments(objects)) == 1
    notes.note(read(10))
    notes.flush()
    notes.flush()
    assert len(segments(objects)) == 2


def test_several_processes_keep_chains_of_their_own(objects):
    for server in range(3):
        noted(objects, [read(number, principal=f"p{server}") for number in range(15)])
    found = account(open_again(objects))
    assert found.problems == []
    for server in range(3):
        mine = [one.what for one in found.reads if one.principal == f"p{server}"]
        assert mine == [f"m@v{number}" for number in range(15)]


def test_threads_note_at_once_and_nothing_is_lost(objects):
    store = opened(objects)
    notes = ReadAudit(store)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(notes.note, (read(number) for number in range(500))))
    notes.flush()
    assert sorted(one.what for one in account(open_again(objects)).reads) == sorted(f"m@v{n}" for n in range(500))


def test_what_no_entry_vouches_for_is_counted(objects):
    noted(objects, [read(number) for number in range(15)])
    noted(objects, [read(number) for number in range(12)], vouched=False)
    found = account(open_again(objects))
    assert (len(found.reads), found.unvouched, found.problems) == (27, 12, [])


def test_an_entry_vouches_for_the_newest_segment_only_once(objects):
    store = opened(objects)
    notes = ReadAudit(store)
    for number in range(30):
        notes.note(read(number))
    change(store, "one")
    change(store, "two")
    assert [len(entry.audit) for _, entry, _ in Log(objects).history()] == [0, 1, 0]


@pytest.mark.parametrize("which", range(3))
def test_a_segment_that_is_changed_or_deleted_is_named(which, objects):
    noted(objects, [read(number) for number in range(30)])
    name = segments(objects)[which]
    data = objects.get(name)
    replace_object(objects, name, data.replace(b'"ann"', b'"bob"', 1))
    wrong = account(open_again(objects)).problems
    assert {problem.kind for problem in wrong} == {"bad_audit"}
    objects.delete(name)
    (missing,) = account(open_again(objects)).problems
    assert (missing.kind, missing.where) == ("bad_audit", name)
    objects.put_if_absent(name, [data])
    assert account(open_again(objects)).problems == []


def test_all_segments_of_a_process_are_missed_if_the_log_vouches_for_one(objects):
    noted(objects, [read(number) for number in range(30)])
    for name in segments(objects):
        objects.delete(name)
    assert kinds(objects) == {"bad_audit"}


def test_a_chain_that_is_written_again_from_some_segment_on_is_found(objects):
    noted(objects, [read(number) for number in range(30)])
    repository = Log(objects).state.genesis.repository
    names = segments(objects)
    previous = segment_digest(objects.get(names[0]))
    for name in names[1:]:
        data = encode_segment([encode_read(read(0, principal="nobody"))], repository=repository, previous=previous)
        replace_object(objects, name, data)
        previous = segment_digest(data)
    assert kinds(objects) == {"bad_audit"}


def test_what_is_no_segment_is_named(objects):
    objects.put_if_absent("audit/x", [b"x"])
    objects.put_if_absent(audit_name("ab" * 8, 0), [b'{"format":0}\n{}\n'])
    assert kinds(objects) == {"bad_object_name", "bad_field"}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", CorruptionError),
        (b"x", CorruptionError),
        (b"[]\n", CorruptionError),
        (b'{"format":1}\n', UnsupportedFormatError),
        (b'{"format":0,"previous":"","repository":"r"}\n', CorruptionError),
        (encode_segment([encode_read(read(0))], repository="other", previous=None), CorruptionError),
        (encode_segment([encode_read(read(0))], repository="r", previous=b"x" * 32), CorruptionError),
        (b'{"format":0,"previous":"","repository":"r"}\n{}\n', CorruptionError),
        (b'{"format":0,"more":1,"previous":"","repository":"r"}\n{}\n', UnsupportedFormatError),
    ],
)
def test_a_segment_that_breaks_a_rule_is_refused(data, error):
    with pytest.raises(error):
        decode_segment(data, name="audit/x", repository="r", previous=None)


def test_a_segment_of_any_reads_comes_back_and_stays_below_its_limit(objects, monkeypatch):
    monkeypatch.setattr(audit_module, "SEGMENT_READS", 1000)
    monkeypatch.setattr(audit_module, "_MOST_WAITING", 10_000)
    wild = "\ud800 \U0001f600\x00\n" + "x\x01" * 5_000
    reads = [read(n, principal=wild, peer=wild, rpc=wild, what=wild, status=wild, time=wild) for n in range(1000)]
    noted(objects, reads)
    found = account(open_again(objects))
    assert (len(found.reads), found.problems) == (1000, [])
    assert len(segments(objects)) == 2


@pytest.mark.parametrize("fault", [Fault.ERROR_BEFORE, Fault.APPLIED_BUT_ERROR], ids=["not applied", "applied"])
def test_a_segment_whose_answer_is_lost_is_written_once(fault, objects):
    for fail_at in count():
        copy = copy_of(objects)
        faulty = FaultyObjects(copy, fail_at, fault)
        store = opened(faulty)
        notes = ReadAudit(store)
        for number in range(25):
            notes.note(read(number))
        notes.flush()
        notes.flush()  # the first may have met the fault
        found = account(open_again(copy))
        assert [one.what for one in found.reads] == [f"m@v{number}" for number in range(25)]
        assert found.problems == []
        if faulty.writes <= fail_at:
            break
    assert fail_at == 3


def test_a_segment_that_landed_unheard_is_not_taken_for_one_with_later_reads(objects):
    store = opened(objects)
    notes = ReadAudit(store)
    notes._objects = FaultyObjects(objects, 0, Fault.APPLIED_BUT_ERROR)
    notes.note(read(0))
    notes.flush()
    notes.note(read(1))
    notes.flush()
    assert len(segments(objects)) == 2
    found = account(open_again(objects))
    assert ([one.what for one in found.reads], found.problems) == (["m@v0", "m@v1"], [])


def test_reading_ends_before_notes_are_dropped(objects):
    store = opened(objects)
    notes = ReadAudit(store)
    real = store.objects.put_if_absent

    def down(name, parts):
        raise StorageError("no answer", transient=True)

    notes._objects = type("Down", (), {"put_if_absent": staticmethod(down)})
    for number in range(audit_module._MOST_WAITING):
        notes.note(read(number))
    with pytest.raises(StorageError) as caught:
        notes.note(read(0))
    assert caught.value.kind == "audit_full"
    notes._objects = type("Up", (), {"put_if_absent": staticmethod(real)})
    notes.flush()
    assert len(account(open_again(objects)).reads) == audit_module._MOST_WAITING


def test_an_entry_that_lost_its_race_is_vouched_by_the_next(objects):
    store = opened(objects)
    other = opened(objects)
    notes = ReadAudit(store)
    for number in range(10):
        notes.note(read(number))
    change(other, "first")
    change(store, "second")
    assert account(open_again(objects)).unvouched == 0


# -- what was changed --------------------------------------------------------------------------------------------------


def test_the_log_says_who_changed_what_and_who_signed_it(objects, tmp_path):
    generate_key(tmp_path / "key")
    signer = load_key(tmp_path / "key")
    store = PackedStore(objects, InlineExecutor(), signer=signer)
    with acting_as("ann"):
        change(store, "production")
        store.log.require_signed([signer.public])
    first, alias, required = account(open_again(objects)).acts
    assert any("recorded m@v1" in line for line in first.did)
    assert "branch m@main: nothing -> v1" in first.did
    assert first.signer == ""
    assert (alias.principal, alias.did) == ("ann", ("alias m@production: nothing -> v1",))
    assert (required.signer, required.did) == (signer.public.hex(), (f"let {signer.public.hex()} sign",))


def test_what_several_did_by_one_entry_is_told_apart(objects, monkeypatch):
    arrivals = Arrivals(monkeypatch)
    store = opened(objects)
    commits = store.log._committer._together
    work = commits._work
    together = []

    def gather(waiting):
        if not together:
            together.append(True)
            with ThreadPoolExecutor(3) as threads:
                calls = [threads.submit(commit, name) for name in ("bob", "cyd")]
                arrivals.until(3)
                work([*commits._waiting])
                assert [call.result(60) for call in calls] == [None, None]
        else:
            work(waiting)

    def commit(name):
        with acting_as(name):
            change(store, f"of-{name}")

    monkeypatch.setattr(commits, "_work", gather)
    commit("ann")
    acts = account(open_again(objects)).acts[1:]
    assert {act.number for act in acts} == {2}
    assert {act.principal: act.did for act in acts} == {
        name: (f"alias m@of-{name}: nothing -> v1",) for name in ("ann", "bob", "cyd")
    }


# -- the log is checked by whoever asks --------------------------------------------------------------------------------


def told(objects, *known):
    return list(audit(partial(stored, objects), known))


def replaced(objects, number, **changes):
    """Return a copy in which an entry says something else, and so do, by their digests, all that follow it."""
    copy = copy_of(objects)
    genesis = Log(objects).state.genesis.repository
    for at in range(number, Log(objects).state.number + 1):
        data = copy.get(log_name(at))
        previous = entry_digest(copy.get(log_name(at - 1)))
        entry = decode_entry(data, number=at, repository=genesis, previous=None)
        replace_object(copy, log_name(at), encode_entry(replace(entry, previous=previous, **changes)))
        changes = {}
    return copy


@pytest.fixture
def moved(objects):
    for name in ("one", "two", "three"):
        change(opened(objects), name)
    return objects


def test_a_log_that_was_written_anew_is_found_by_an_entry_that_was_seen(moved):
    seen = Log(moved).state.head
    other = replaced(moved, 2, principal="somebody else")
    assert len(told(other)) == len(told(moved, seen)) == 4  # it holds together, so nothing but the digest tells
    with pytest.raises(CorruptionError) as caught:
        told(other, seen)
    assert caught.value.kind == "fork"


def test_a_log_that_ends_before_what_was_seen_is_found(moved):
    seen = Log(moved).state.head
    moved.delete(log_name(seen.number))
    with pytest.raises(CorruptionError) as caught:
        told(moved, seen)
    assert caught.value.kind == "rollback"


@pytest.mark.parametrize(
    ("number", "kind"), [(0, "log_gap"), (2, "log_gap"), (4, "rollback")], ids=["first", "middle", "last"]
)
def test_an_entry_that_is_missing_is_found(number, kind, moved):
    seen = Log(moved).state.head
    moved.delete(log_name(number))
    with pytest.raises(CorruptionError) as caught:
        told(moved, seen)
    assert caught.value.kind == kind


@pytest.mark.parametrize("number", range(5))
def test_an_entry_that_was_changed_is_found_though_nobody_saw_the_log_before(number, moved):
    data = moved.get(log_name(number))
    replace_object(moved, log_name(number), data.replace(b'"n":', b'"n": ', 1))
    with pytest.raises(CorruptionError) as caught:
        told(moved)
    assert caught.value.kind == "bad_digest"


def test_an_entry_that_is_not_signed_as_it_must_be_is_found(objects, tmp_path):
    generate_key(tmp_path / "key")
    store = PackedStore(objects, InlineExecutor(), signer=load_key(tmp_path / "key"))
    store.log.require_signed([store.log._committer._trust._signer.public])
    change(store, "production")
    seen = Log(objects).state
    assert told(objects, seen.head)[-1].signer
    for signature, kind in ((None, "unsigned"), (Log(objects).entry(2).signature, "bad_signature")):
        with pytest.raises(CorruptionError) as caught:
            told(replaced(objects, 3, signature=signature))
        assert caught.value.kind == kind


def test_no_more_of_an_object_is_read_than_it_may_have(objects):
    name = audit_name("ab" * 8, 0)
    objects.put_if_absent(name, [bytes(STORED_NBYTES + 1000)])
    ((found, data),) = stored(objects, "audit/")
    assert (found, len(data)) == (name, STORED_NBYTES)
    assert kinds(objects) == {"bad_audit"}


@pytest.mark.parametrize("after", ["", "log", "audit", "meta/", "packs/x", "/log/", "../log/"])
def test_an_account_is_made_of_nothing_else(after, objects):
    with pytest.raises(InvalidInputError):
        next(stored(objects, after))


# -- an entry of their own ---------------------------------------------------------------------------------------------


def test_reads_are_vouched_for_by_an_entry_of_their_own_if_no_other_comes(objects):
    notes = noted(objects, [read(number) for number in range(12)], vouched=False)
    notes.vouch(older_than_s=3600)
    assert account(open_again(objects)).unvouched == 12
    notes.vouch()
    found = account(open_again(objects))
    assert (len(found.reads), found.unvouched, found.problems) == (12, 0, [])
    assert [act.number for act in found.acts] == [1]
    assert open_again(objects).verify(deep=True).problems == []


def test_no_entry_is_made_if_there_is_nothing_to_vouch_for(objects):
    store = opened(objects)
    notes = ReadAudit(store)
    notes.vouch()
    notes.note(read(1))
    notes.flush()
    change(store, "one")
    notes.vouch()
    assert Log(objects).state.number == 2


def test_what_cannot_be_vouched_for_now_is_vouched_for_later(objects, monkeypatch):
    notes = noted(objects, [read(1)], vouched=False)

    def refused(push, make):
        raise PermissionDeniedError("no key", kind="not_a_signer")

    with monkeypatch.context() as patch:
        patch.setattr(notes._log, "commit", refused)
        notes.vouch()
    assert account(open_again(objects)).unvouched == 1
    notes.vouch(older_than_s=3600)  # it was tried just now
    assert account(open_again(objects)).unvouched == 1
    notes.vouch()
    assert account(open_again(objects)).unvouched == 0


def test_lines_of_a_segment_are_json_for_other_programs_too(objects):
    noted(objects, [read(1)])
    header, line = objects.get(segments(objects)[0]).splitlines()
    assert json.loads(header)["repository"] == store_of(open_again(objects)).log.state.genesis.repository
    assert json.loads(line)["what"] == "m@v1"
