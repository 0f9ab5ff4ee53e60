"""A user remembers what was seen of a repository, and is told of one that went back or is another."""

import shutil
import threading
from dataclasses import replace

import pytest
import s3
import service
from support import noise

import lamella
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.committing import Change
from lamella_engine.content_store.entries import FOLD_EVERY, Entries
from lamella_engine.content_store.log import Log
from lamella_engine.content_store.trust import Trust
from lamella_engine.errors import CorruptionError
from lamella_engine.format.entry import Entry, RefChange, encode_entry
from lamella_engine.format.names import fold_number, log_name
from lamella_engine.heads import Head, Pin
from lamella_engine.objects import open_objects
from lamella_engine.signing import generate_key, load_key

PLACE = "grpc://host:7443/team"
FIVE = Head("ab" * 16, 5, b"5" * 32, (b"k" * 32,))
NINE = Head("ab" * 16, 9, b"9" * 32)


@pytest.fixture
def state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def never(number):
    raise AssertionError(f"entry {number} need not be asked for")


def refused(head, digest_at=never):
    with pytest.raises(CorruptionError) as caught:
        Pin(PLACE).advance(head, digest_at)
    return caught.value


def files(state):
    return [path for path in state.rglob("*") if path.is_file()]


def test_what_is_seen_first_is_believed_and_remembered(state):
    assert Pin(PLACE).seen is None
    Pin(PLACE).advance(FIVE, never)
    assert Pin(PLACE).seen == FIVE
    assert Pin(PLACE + "/").seen == FIVE
    assert len(files(state)) == 1
    assert files(state)[0].parent == state / "lamella" / "heads"


def test_places_are_remembered_apart(state):
    Pin(PLACE).advance(FIVE, never)
    assert Pin("grpc://host:7443/other").seen is None
    assert Pin(PLACE, "another store").seen is None


def test_the_same_head_and_one_that_still_has_what_was_seen_are_right(state):
    Pin(PLACE).advance(FIVE, never)
    Pin(PLACE).advance(FIVE, never)
    asked = []

    def digest_at(number):
        asked.append(number)
        return FIVE.digest

    Pin(PLACE).advance(NINE, digest_at)
    assert asked == [5]
    assert Pin(PLACE).seen == NINE


def test_a_log_that_went_back_is_a_rollback(state):
    Pin(PLACE).advance(NINE, never)
    error = refused(FIVE)
    assert error.kind == "rollback"
    assert (error.context["expected"], error.context["actual"]) == (9, 5)
    (file,) = files(state)
    assert f"delete {file}" in error.message
    file.unlink()
    Pin(PLACE).advance(FIVE, never)


@pytest.mark.parametrize("digest", [b"x" * 32, None], ids=["another", "none"])
def test_a_log_in_which_what_was_seen_is_another_entry_is_a_fork(digest, state):
    Pin(PLACE).advance(FIVE, never)
    assert refused(NINE, lambda number: digest).kind == "fork"
    assert refused(Head(FIVE.repository, 5, b"x" * 32)).kind == "fork"
    assert Pin(PLACE).seen == FIVE


def test_another_repository_at_a_place_is_a_fork_unless_this_user_made_it(state):
    Pin(PLACE).advance(FIVE, never)
    other = Head("cd" * 16, 0, b"0" * 32)
    assert refused(other).kind == "fork"
    Pin(PLACE).replace(other)
    assert Pin(PLACE).seen == other


def test_a_slower_process_of_the_same_user_is_no_rollback_and_forgets_nothing(state):
    Pin(PLACE).advance(FIVE, never)
    slow = Pin(PLACE)
    Pin(PLACE).advance(NINE, lambda number: FIVE.digest)
    slow.advance(Head(FIVE.repository, 7, b"7" * 32), lambda number: FIVE.digest)
    assert Pin(PLACE).seen == NINE


def test_processes_that_remember_at_once_leave_one_whole_file(state):
    heads = [Head(FIVE.repository, number, bytes([number]) * 32) for number in range(1, 30)]
    threads = [threading.Thread(target=Pin(PLACE).replace, args=(head,)) for head in heads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Pin(PLACE).seen in heads
    assert len(files(state)) == 1


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"digest": "zz", "number": 5, "repository": "ab"}', b"null"]
)
def test_a_file_that_cannot_be_read_is_nothing_known(content, state, caplog):
    Pin(PLACE).advance(FIVE, never)
    files(state)[0].write_bytes(content)
    assert Pin(PLACE).seen is None
    assert "cannot be read" in caplog.text
    Pin(PLACE).advance(NINE, never)
    assert Pin(PLACE).seen == NINE


def test_nothing_fails_because_there_is_nowhere_to_remember_it(state, monkeypatch):
    state.write_text("a file")
    Pin(PLACE).advance(FIVE, never)
    assert Pin(PLACE).seen is None
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "relative")
    Pin(PLACE).advance(FIVE, never)


# -- whole ------------------------------------------------------------------------------------------------------------


def push(url, seed):
    with lamella.open(url) as repo:
        repo.push({"w": noise(seed, 100)}, "m@main")


def kind_of_opening(url):
    with pytest.raises(CorruptionError) as caught:
        lamella.open(url)
    return caught.value.kind


def test_a_service_whose_root_went_back_or_was_forked_is_found_out(state, tmp_path):
    root, old = tmp_path / "root", tmp_path / "old"
    with service.serving(root) as server:
        url = f"grpc://{server.address}/team"
        lamella.init(url).close()
        push(url, 0)
        push(url, 1)
        shutil.copytree(root, old)
        push(url, 2)
        lamella.open(url).close()
        address = server.address
    with service.serving(old, address) as server:
        assert kind_of_opening(url) == "rollback"
        (file,) = files(state)
        seen = file.read_bytes()
        file.unlink()
        push(url, 3)
        push(url, 4)
        file.write_bytes(seen)
        assert kind_of_opening(url) == "fork"
    with service.serving(root, address):
        file.write_bytes(seen)
        lamella.open(url).close()
        push(url, 5)
        lamella.open(url).close()


def test_a_bucket_whose_newest_entry_is_gone_is_a_rollback(state, moto, use):
    use(moto)
    url = s3.new_url()
    lamella.init(url).close()
    for seed in range(3):
        push(url, seed)
    lamella.open(url).close()
    open_objects(url).delete("log/00000000000000000003")
    assert kind_of_opening(url) == "rollback"


def test_a_bucket_that_required_signatures_when_it_was_seen_still_must(state, moto, use, tmp_path):
    """Who can write to it forges a fold and what follows, after the entry that is remembered."""
    use(moto)
    url = s3.new_url()
    lamella.init(url).close()
    push(url, 0)
    generate_key(tmp_path / "key")
    objects = open_objects(url)
    log = Log(objects, signer=load_key(tmp_path / "key"))
    log.require_signed([load_key(tmp_path / "key").public])
    lamella.open(url).close()
    for number in range(2 * FOLD_EVERY):
        log.commit(
            new_push_id(), lambda state, number=number: Change(refs=(RefChange("m", f"a{number}", "alias", None, 1),))
        )
    lamella.open(url).close()
    at = next(iter(open_objects(url).list("fold/"))).name
    number = fold_number(at)
    assert Pin(url, objects.store_name).seen.number > number
    seen = replace(Pin(url, objects.store_name).seen, number=number, digest=log.digest_at(number))
    Pin(url, objects.store_name).replace(seen)
    lamella.open(url).close()
    Pin(url, objects.store_name).replace(seen)

    for info in list(objects.list("log/", after=log_name(number))):
        objects.delete(info.name)
    objects.delete(at)
    entries = Entries(objects, Trust(None, ()))
    fold = entries.fold(replace(entries.newest(), signers=()))
    assert fold.number == number
    forged = Entry(seen.repository, number + 1, seen.digest, fold, pushes=(new_push_id(),))
    objects.put_if_absent(log_name(number + 1), [encode_entry(forged)])
    assert Log(objects).state.signers == ()  # to whoever comes for the first time all is well
    assert kind_of_opening(url) == "unsigned"


def test_a_repository_that_was_made_anew_in_a_bucket_is_another_and_its_maker_knows(state, moto, use):
    use(moto)
    url = s3.new_url()
    lamella.init(url).close()
    push(url, 0)
    lamella.open(url).close()
    (file,) = files(state)
    objects = open_objects(url)
    for name in ("log/", "meta/", "packs/"):
        for info in list(objects.list(name)):
            objects.delete(info.name)
    seen = file.read_bytes()
    lamella.init(url).close()
    lamella.open(url).close()
    file.write_bytes(seen)
    assert kind_of_opening(url) == "fork"


def test_a_directory_is_not_remembered(state, tmp_path):
    lamella.init(tmp_path / "r").close()
    lamella.open(tmp_path / "r").close()
    assert not state.exists()
