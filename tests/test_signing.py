"""Signed logs: what is forged, moved, stripped or signed by somebody else is refused, from a fold on too."""

import builtins
import pickle
import stat
from dataclasses import replace

import pytest
from service import serving
from support import copy_of, names_of, new_repository, noise, open_again, store_of

import lamella
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.committing import Change
from lamella_engine.content_store.entries import FOLD_EVERY, Entries
from lamella_engine.content_store.log import Log
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.content_store.trust import Trust
from lamella_engine.errors import (
    AlreadyExistsError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedFormatError,
)
from lamella_engine.executor import InlineExecutor
from lamella_engine.format.entry import RefChange, Signature, decode_entry, encode_entry, to_sign
from lamella_engine.format.names import log_name
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.repository import on_objects
from lamella_engine.signing import Signer, generate_key, load_key


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Signer]:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ada", "bob", "eve"):
        generate_key(folder / name)
    return {name: load_key(folder / name) for name in ("ada", "bob", "eve")}


def alias(log, name, number=1):
    """Commit the smallest change there is."""
    return log.commit(new_push_id(), lambda state: Change(refs=(RefChange("m", name, "alias", None, number),)))


@pytest.fixture
def signed(keys):
    """Return objects whose log has required Ada's signature since entry 3, of 6."""
    objects = MemoryObjects()
    new_repository(objects).push({"w": noise(0, 100)}, "m@main")
    log = Log(objects, signer=keys["ada"])
    alias(log, "before")
    log.require_signed([keys["ada"].public])
    for number in range(3):
        alias(log, f"after{number}")
    assert log.state.number == 6
    return objects


def entry_at(objects, number):
    repository = Log(objects).state.genesis.repository
    return decode_entry(objects.get(log_name(number)), number=number, repository=repository, previous=None)


def replace_object(objects, name, data):
    objects.delete(name)
    objects.put_if_absent(name, [data])


def appended(objects, signer=None, **fields):
    """Return a copy with one more entry, written by somebody who keeps to no rule."""
    state = Log(objects).refresh()
    copy = copy_of(objects)
    last = entry_at(objects, state.number)
    fields = {"refs": (), "versions": (), "packs": (), "pushes": (new_push_id(),), "signers": ()} | fields
    entry = replace(last, number=state.number + 1, previous=state.digest, signature=None, **fields)
    if signer is not None:
        entry = replace(entry, signature=Signature(signer.public, signer.sign(to_sign(entry))))
    copy.put_if_absent(log_name(entry.number), [encode_entry(entry)])
    return copy


def refused(objects, **options):
    with pytest.raises(CorruptionError) as caught:
        Log(objects, **options)
    return caught.value.kind


def test_every_entry_of_a_log_with_a_key_is_signed_and_says_by_whom(signed, keys):
    assert entry_at(signed, 1).signature is None
    for number in range(2, 7):
        entry = entry_at(signed, number)
        assert entry.signature.key == keys["ada"].public
        assert encode_entry(entry) == signed.get(log_name(number))
    assert Log(signed).state.signers == (keys["ada"].public,)
    assert open_again(signed).verify(deep=True).problems == []


def test_pushes_are_signed_like_everything_else(signed, keys):
    repo = on_objects(PackedStore(signed, InlineExecutor(), signer=keys["ada"]))
    repo.push({"w": noise(1, 100)}, "m@main")
    assert open_again(signed).version("m@main").number == 2
    assert open_again(signed).verify(deep=True).problems == []


@pytest.mark.parametrize("who", [None, "eve"])
def test_a_writer_without_the_right_key_is_refused_before_it_writes(who, signed, keys):
    before = names_of(signed)
    log = Log(signed, signer=keys[who] if who else None)
    with pytest.raises(PermissionDeniedError) as caught:
        alias(log, "x")
    assert caught.value.kind == "not_a_signer"
    assert names_of(signed) == before


def test_an_entry_that_nobody_signed_is_refused(signed):
    assert refused(appended(signed)) == "unsigned"


def test_an_entry_that_another_key_signed_is_refused(signed, keys):
    assert refused(appended(signed, keys["eve"])) == "bad_signature"


def test_a_signature_that_is_not_that_of_its_key_is_refused(signed, keys):
    forger = Signer(keys["eve"]._key)
    forger.public = keys["ada"].public
    assert refused(appended(signed, forger)) == "bad_signature"
    assert Log(appended(signed, keys["ada"])).state.number == 7


@pytest.mark.parametrize("number", range(3, 7))
def test_a_signed_entry_that_was_changed_is_refused(number, signed):
    entry = entry_at(signed, number)
    replace_object(signed, log_name(number), encode_entry(replace(entry, principal="eve")))
    assert refused(signed) == "bad_signature"


@pytest.mark.parametrize("number", range(3, 7))
def test_a_signature_that_was_removed_is_missed(number, signed):
    replace_object(signed, log_name(number), encode_entry(replace(entry_at(signed, number), signature=None)))
    assert refused(signed) == "unsigned"


def test_a_signature_holds_at_one_number_of_one_repository_and_after_one_entry(signed, keys):
    old = entry_at(signed, 5)
    state = Log(signed).state
    for changes in (
        {"number": 7, "previous": state.digest},  # an old entry at the end of the same log
        {"number": 7, "previous": state.digest, "repository": state.genesis.repository},
    ):
        copy = copy_of(signed)
        copy.put_if_absent(log_name(7), [encode_entry(replace(old, **changes))])
        assert refused(copy) == "bad_signature"
    copy = copy_of(signed)
    copy.put_if_absent(log_name(7), [signed.get(log_name(5))])
    assert refused(copy) == "bad_entry"
    other = MemoryObjects()
    new_repository(other)
    Log(other, signer=keys["ada"]).require_signed([keys["ada"].public])
    theirs = Log(other)
    moved = replace(old, repository=theirs.state.genesis.repository, number=2, previous=theirs.state.digest)
    other.put_if_absent(log_name(2), [encode_entry(replace(moved, refs=()))])
    assert refused(other) == "bad_signature"


def test_whoever_starts_to_require_signatures_must_be_on_the_list(keys):
    objects = MemoryObjects()
    new_repository(objects)
    for signer in (None, keys["eve"]):
        with pytest.raises(PermissionDeniedError):
            Log(objects, signer=signer).require_signed([keys["ada"].public])
        forged = appended_to_nothing(objects, signer, signers=(keys["ada"].public,))
        assert refused(forged) == ("unsigned" if signer is None else "bad_signature")


def appended_to_nothing(objects, signer, **fields):
    copy = copy_of(objects)
    alias_log = Log(copy)
    alias_log.commit(new_push_id(), lambda state: Change(refs=(RefChange("m", "x", "alias", None, 1),)))
    return appended(copy, signer, **fields)


def test_the_list_is_replaced_only_by_those_on_it_and_never_emptied(signed, keys):
    ada, bob, eve = (keys[name] for name in ("ada", "bob", "eve"))
    assert refused(appended(signed, eve, signers=(eve.public,))) == "bad_signature"
    log = Log(signed, signer=ada)
    for wrong in ([], [b"short"], [bytes([n]) * 32 for n in range(65)]):
        with pytest.raises(InvalidInputError):
            log.require_signed(wrong)
    log.require_signed([bob.public])
    with pytest.raises(PermissionDeniedError):
        alias(log, "late")
    assert refused(appended(signed, ada)) == "bad_signature"
    alias(Log(signed, signer=bob), "next")
    assert Log(signed).state.signers == (bob.public,)
    assert open_again(signed).verify().problems == []
    number = Log(signed).state.number
    log = Log(signed, signer=bob)
    log.require_signed([bob.public])  # as it is
    assert log.state.number == number


def test_an_empty_list_is_no_list_that_can_be_written(signed, keys):
    entry = replace(entry_at(signed, 6), signers=(keys["bob"].public, keys["ada"].public))
    wrong = tuple(sorted(entry.signers, reverse=True))
    data = encode_entry(replace(entry, signers=wrong))
    with pytest.raises(CorruptionError) as caught:
        decode_entry(data, number=6, repository=entry.repository, previous=None)
    assert caught.value.kind == "bad_entry"


@pytest.fixture
def folded(signed, keys):
    """Return objects with a fold that lies after the entry that requires signatures, and its number."""
    log = Log(signed, signer=keys["ada"])
    for number in range(2 * FOLD_EVERY):
        alias(log, f"more{number}")
    fold = Log(signed).state.fold
    assert fold.number > 3
    return signed, fold.number


def forge_from_fold(objects, number, *, signers, signer):
    """Cut a log at a fold, and go on with a fold and entries of one's own."""
    copy = copy_of(objects)
    for name in list(names_of(copy)):
        if name.startswith("fold/") or (name.startswith("log/") and int(name[4:]) > number):
            copy.delete(name)
    entries = Entries(copy, Trust(None, ()))
    honest = entries.newest()
    assert honest.number == number
    forged = replace(honest, signers=signers)
    fold = entries.fold(forged)
    assert fold.number == number
    entry = replace(
        entry_at(copy, number),
        number=number + 1,
        previous=forged.digest,
        fold=fold,
        refs=(RefChange("m", "forged", "alias", None, 1),),
        pushes=(new_push_id(),),
        signature=None,
    )
    if signer is not None:
        entry = replace(entry, signature=Signature(signer.public, signer.sign(to_sign(entry))))
    copy.put_if_absent(log_name(entry.number), [encode_entry(entry)])
    return copy


@pytest.mark.parametrize("who", ["eve", None])
def test_a_forged_fold_with_other_signers_is_caught_by_verify_and_by_whoever_knows_a_key(who, folded, keys):
    """Without a key from elsewhere a reader that starts there sees a log that agrees with itself."""
    objects, number = folded
    signer = keys[who] if who else None
    forged = forge_from_fold(objects, number, signers=(signer.public,) if signer else (), signer=signer)
    assert Log(forged).state.ref("m", "forged") is not None
    assert refused(forged, trusted=[keys["ada"].public]) in ("unsigned", "bad_signature")
    with pytest.raises(CorruptionError):
        open_again(forged).verify()


def test_a_log_that_is_open_takes_no_signers_from_a_fold(folded, keys):
    objects, number = folded
    forged = forge_from_fold(objects, number, signers=(keys["eve"].public,), signer=keys["ada"])
    cut = copy_of(objects)
    for name in list(names_of(cut)):
        if name.startswith("log/") and int(name[4:]) > number:
            cut.delete(name)
    log = Log(cut)
    for name in names_of(forged).keys() - names_of(cut).keys():
        cut.put_if_absent(name, [forged.get(name)])
    state = log.refresh()
    assert (state.number, state.signers) == (number + 1, (keys["ada"].public,))


def test_a_trusted_key_vouches_for_what_it_signed_and_for_the_keys_that_it_listed(folded, keys):
    objects, _ = folded
    ada, bob = keys["ada"], keys["bob"]
    assert Log(objects, trusted=[ada.public]).state.number == Log(objects).state.number
    Log(objects, signer=ada).require_signed([bob.public])
    log = Log(objects, signer=bob)
    for number in range(2 * FOLD_EVERY):
        alias(log, f"bobs{number}")
    for trusted in (ada, bob):  # Ada's entries lie before the fold by now, so all are read
        state = Log(objects, trusted=[trusted.public]).state
        assert (state.number, state.signers) == (log.state.number, (bob.public,))
    assert refused(objects, trusted=[keys["eve"].public]) == "not_trusted"


def test_a_log_that_requires_nothing_is_not_trusted_whoever_signed_its_entries(keys):
    objects = MemoryObjects()
    new_repository(objects)
    alias(Log(objects, signer=keys["ada"]), "x")
    assert refused(objects, trusted=[keys["ada"].public]) == "not_trusted"
    assert Log(objects).state.number == 1


def test_a_forged_signature_is_refused_where_none_is_required_too(keys):
    objects = MemoryObjects()
    new_repository(objects)
    alias(Log(objects, signer=keys["ada"]), "x")
    replace_object(objects, log_name(1), encode_entry(replace(entry_at(objects, 1), principal="eve")))
    assert refused(objects) == "bad_signature"


@pytest.fixture
def without_cryptography(monkeypatch):
    real = builtins.__import__

    def import_(name, *args, **options):
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", import_)


def test_a_reader_without_cryptography_says_what_to_install(signed, without_cryptography):
    with pytest.raises(UnsupportedFormatError, match=r"pip install 'lamella\[service\]'"):
        Log(signed)


def test_a_log_that_requires_nothing_needs_no_cryptography(keys, request):
    objects = MemoryObjects()
    new_repository(objects)
    alias(Log(objects, signer=keys["ada"]), "x")
    request.getfixturevalue("without_cryptography")
    assert Log(objects).state.number == 1


# -- key files ---------------------------------------------------------------------------------------------------------


def test_a_key_file_is_its_owners_alone_and_never_written_over(tmp_path):
    path = tmp_path / "key"
    public = generate_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path).public == public
    before = path.read_bytes()
    with pytest.raises(AlreadyExistsError):
        generate_key(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o666])
def test_a_key_that_others_may_read_is_refused(mode, tmp_path):
    path = tmp_path / "key"
    generate_key(path)
    path.chmod(mode)
    with pytest.raises(InvalidInputError) as caught:
        load_key(path)
    assert caught.value.kind == "open_key_file"


def test_what_is_no_key_file_is_named(tmp_path):
    with pytest.raises(NotFoundError):
        load_key(tmp_path / "none")
    path = tmp_path / "text"
    path.touch(0o600)
    path.write_text("-----BEGIN PRIVATE KEY-----\nno\n-----END PRIVATE KEY-----\n")
    for wrong in (path, tmp_path):
        with pytest.raises(InvalidInputError) as caught:
            load_key(wrong)
        assert caught.value.kind == "bad_key_file"
    with pytest.raises(InvalidInputError):
        generate_key(tmp_path / "missing" / "key")


def test_a_signer_shows_its_public_key_only(keys):
    assert repr(keys["ada"]) == f"Signer({keys['ada'].public.hex()})"
    with pytest.raises(TypeError):
        pickle.dumps(keys["ada"])


def test_a_store_hands_its_key_to_the_log(signed, keys):
    assert store_of(on_objects(PackedStore(signed, InlineExecutor(), trusted=[keys["ada"].public]))).log.state.signers


# -- as users hold it --------------------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path):
    return {name: (tmp_path / name, generate_key(tmp_path / name).hex()) for name in ("ann", "ben")}


def test_a_repository_takes_nothing_unsigned_once_its_owner_says_so(tmp_path, key_file):
    path, public = key_file["ann"]
    with lamella.init(tmp_path / "r", signing_key=path) as repo:
        repo.push({"w": noise(1, 100)}, "m@main")
        assert repo.signers() == []
        assert repo.require_signed() == repo.signers() == [public]
        repo.push({"w": noise(2, 100)}, "m@main")
        assert [act.signer for act in repo.audit()] == [public] * 3
    with lamella.open(tmp_path / "r") as repo:
        assert repo.version("m@main").number == 2
        with pytest.raises(PermissionDeniedError) as caught:
            repo.push({"w": noise(3, 100)}, "m@main")
        assert caught.value.kind == "not_a_signer"
    with lamella.open(tmp_path / "r", signing_key=path) as repo:
        assert repo.push({"w": noise(3, 100)}, "m@main").number == 3
        assert repo.verify(deep=True).ok


def test_who_has_a_key_may_list_others_in_its_place_and_nobody_may_list_none(tmp_path, key_file):
    (ann, public), (ben, other) = key_file["ann"], key_file["ben"]
    with lamella.init(tmp_path / "r", signing_key=ann) as repo:
        with pytest.raises(PermissionDeniedError):
            repo.require_signed([other])  # or who says it could not go on
        assert repo.require_signed([other, public]) == sorted([other, public])
        assert repo.require_signed([other]) == [other]
        with pytest.raises(PermissionDeniedError):
            repo.require_signed()
    with lamella.open(tmp_path / "r", signing_key=ben) as repo:
        assert repo.require_signed() == [other]


def test_who_has_no_key_cannot_require_signatures(tmp_path, key_file):
    with lamella.init(tmp_path / "r") as repo:
        with pytest.raises(PermissionDeniedError) as caught:
            repo.require_signed()
        assert caught.value.kind == "no_signing_key"
        with pytest.raises(PermissionDeniedError) as caught:
            repo.require_signed([key_file["ann"][1]])
        assert caught.value.kind == "not_a_signer"
        for wrong in ("", "ab", "A" * 64, "g" * 64, 5):
            with pytest.raises(InvalidInputError):
                repo.require_signed([wrong])
        assert repo.signers() == []


def test_the_environment_names_the_key(tmp_path, key_file, monkeypatch):
    path, public = key_file["ann"]
    monkeypatch.setenv("LAMELLA_SIGNING_KEY", str(path))
    with lamella.init(tmp_path / "r") as repo:
        assert repo.require_signed() == [public]
    with lamella.open(tmp_path / "r") as repo:
        repo.push({"w": noise(1, 100)}, "m@main")
    with pytest.raises(PermissionDeniedError), lamella.open(tmp_path / "r", signing_key=key_file["ben"][0]) as repo:
        repo.push({"w": noise(2, 100)}, "m@main")
    monkeypatch.setenv("LAMELLA_SIGNING_KEY", "")
    with lamella.open(tmp_path / "r") as repo:
        assert repo.signers() == [public]
    monkeypatch.setenv("LAMELLA_SIGNING_KEY", str(tmp_path / "none"))
    with pytest.raises(NotFoundError):
        lamella.open(tmp_path / "r")


def test_a_service_signs_by_itself(tmp_path, key_file, monkeypatch):
    monkeypatch.setenv("LAMELLA_SIGNING_KEY", str(key_file["ann"][0]))
    with serving(tmp_path / "root") as server:
        url = f"grpc://{server.address}/team"
        with lamella.init(url) as repo:
            for ask in (repo.signers, repo.require_signed):
                with pytest.raises(InvalidInputError) as caught:
                    ask()
                assert caught.value.kind == "remote_signers"
        for make in (lamella.init, lamella.open):
            with pytest.raises(InvalidInputError) as caught:
                make(url, signing_key=key_file["ann"][0])
            assert caught.value.kind == "bad_option"
