"""Repositories in buckets, and what comes between them and the store: failures, damage, and stores that lie."""

import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
from s3 import BUCKET, Answer, PassOn, Proxy, Request, Server, Treatment, new_url
from support import bits, noise

import lamella
from lamella.cli import run
from lamella_engine.errors import (
    AlreadyExistsError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    RepositoryNotFoundError,
    StorageError,
)
from lamella_engine.objects import CREATE_ONCE_NBYTES, Objects, open_objects
from lamella_engine.objects import cloud as cloud_module
from lamella_engine.objects import probe as probe_module
from lamella_engine.objects.probe import probe

OLD = {"w": noise(0, 40, 50), "frozen": noise(1, 2_000)}
NEW = {"w": OLD["w"] + np.float32(1e-3), "frozen": OLD["frozen"], "added": noise(2, 900)}

LONG = noise(3, CREATE_ONCE_NBYTES // 4 + 1).tobytes()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is tried three times, at once."""
    monkeypatch.setattr(cloud_module, "_MAX_RETRIES", 2)
    monkeypatch.setattr(cloud_module, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(cloud_module, "_LONGEST_PAUSE_S", 0.002)


TRIES = 3


def before(server: Server, use: Callable[[Server], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Put a proxy before a server, which is known to be sound."""
    with Proxy(server) as proxy:
        use(proxy.server)
        monkeypatch.setattr(probe_module, "_sound", {open_objects(new_url()).store_name})
        yield proxy


@pytest.fixture
def proxy(moto: Server, use: Callable[[Server], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Return a proxy before moto, which believes whatever the proxy makes of a request."""
    yield from before(moto, use, monkeypatch)


@pytest.fixture
def strict_proxy(seaweedfs: Server, use: Callable[[Server], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Return a proxy before SeaweedFS, which compares signatures and checksums."""
    yield from before(seaweedfs, use, monkeypatch)


@pytest.fixture(params=["proxy", "strict_proxy"])
def either(request: pytest.FixtureRequest) -> Proxy:
    return request.getfixturevalue(request.param)


@pytest.fixture
def objects(proxy: Proxy) -> Objects:
    return open_objects(new_url())


def is_put(request: Request) -> bool:
    return request.method in ("PUT", "POST")


def at(number: int, fault: Treatment, *, which: Callable[[Request], bool] = is_put) -> Treatment:
    """Treat the request with that number, from 0, of a kind; pass the others on."""
    numbers, lock = count(), Lock()

    def treat(request: Request, pass_on: PassOn) -> Answer | None:
        with lock:
            chosen = which(request) and next(numbers) == number
        return fault(request, pass_on) if chosen else pass_on(request)

    return treat


def at_every_put(fault: Treatment) -> Treatment:
    return lambda request, pass_on: fault(request, pass_on) if request.method == "PUT" else pass_on(request)


def lose_the_answer(request: Request, pass_on: PassOn) -> None:
    pass_on(request)


def apply_and_fail(request: Request, pass_on: PassOn) -> Answer:
    pass_on(request)
    return Answer.error(503, "SlowDown")


def cut(request: Request, pass_on: PassOn) -> None:
    pass


def slow_down(request: Request, pass_on: PassOn) -> Answer:
    return Answer.error(503, "SlowDown")


def flip_a_bit(request: Request, pass_on: PassOn) -> Answer:
    request.body = damaged(request.body)
    return pass_on(request)


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


# -- objects -----------------------------------------------------------------------------------------------------------


def test_a_long_object_goes_up_in_parts_and_comes_back(either: Proxy) -> None:
    objects = open_objects(new_url())
    cuts = [0, 3, 5 << 20, 15 << 20, len(LONG)]
    objects.put_if_absent("packs/a", [LONG[a:b] for a, b in pairwise(cuts)])
    parts = [request for request in either.requests if "partNumber=" in request.target]
    assert len(parts) == 3
    assert max(len(request.body) for request in either.requests) == 8 << 20
    assert objects.size("packs/a") == len(LONG)
    assert objects.get("packs/a") == LONG
    middle = (8 << 20) - 5
    assert objects.get_range("packs/a", middle, middle + 10) == LONG[middle : middle + 10]


def test_a_taken_long_name_is_refused(objects: Objects) -> None:
    for first, second in [(b"short", LONG), (LONG, LONG), (LONG, b"short")]:
        name = f"packs/{len(first)}-{len(second)}"
        objects.put_if_absent(name, [first])
        with pytest.raises(AlreadyExistsError) as caught:
            objects.put_if_absent(name, [second])
        assert caught.value.kind == "object_exists"
        assert objects.get(name) == first


@pytest.mark.parametrize("fault", [lose_the_answer, apply_and_fail])
def test_an_upload_in_parts_whose_answers_are_lost_is_there(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: Treatment
) -> None:
    monkeypatch.setattr(cloud_module, "CREATE_ONCE_NBYTES", 10)
    for fail_at in count():
        objects = open_objects(new_url())
        proxy.treat, proxy.requests = at(fail_at, fault), []
        objects.put_if_absent("packs/a", [LONG[:20_000]])
        assert objects.get("packs/a") == LONG[:20_000]
        if sum(map(is_put, proxy.requests)) <= fail_at:
            break
    assert fail_at == 3  # begin, one part, complete


def test_an_upload_that_is_stored_shorter_is_not_trusted(
    objects: Objects, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_module, "CREATE_ONCE_NBYTES", 10)

    def shorten(request: Request, pass_on: PassOn) -> Answer:
        request.body = request.body[:-1] if "partNumber=" in request.target else request.body
        request.headers["content-length"] = str(len(request.body))
        return pass_on(request)

    proxy.treat = shorten
    with pytest.raises(StorageError) as caught:
        objects.put_if_absent("packs/a", [LONG[:20_000]])
    assert caught.value.kind == "short_write"


CALLS: dict[str, Callable[[Objects], object]] = {
    "get": lambda objects: objects.get("packs/a"),
    "get_range": lambda objects: objects.get_range("packs/a", 1, 3),
    "get_ranges": lambda objects: objects.get_ranges("packs/a", [(0, 2), (3, 4)]),
    "put": lambda objects: objects.put_if_absent("packs/b", [b"abc"]),
    "long put": lambda objects: objects.put_if_absent("packs/long", [LONG]),
    "size": lambda objects: objects.size("packs/a"),
    "list": lambda objects: [info.name for info in objects.list("packs/")],
    "list the top": lambda objects: [info.name for info in objects.list("")],
    "delete": lambda objects: objects.delete("packs/a"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_stays_busy_ends_in_an_error_that_says_so(objects: Objects, proxy: Proxy, call: str) -> None:
    objects.put_if_absent("packs/a", [b"abcde"])
    proxy.treat, proxy.requests = slow_down, []
    with pytest.raises(StorageError) as caught:
        CALLS[call](objects)
    assert caught.value.transient
    assert caught.value.kind == "store_failed"
    assert "; try again" in str(caught.value)
    assert len(proxy.requests) == TRIES


@pytest.mark.parametrize("fault", [slow_down, cut])
@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_is_busy_for_a_moment_is_not_noticed(
    objects: Objects, proxy: Proxy, call: str, fault: Treatment
) -> None:
    objects.put_if_absent("packs/a", [b"abcde"])
    failed: set[str] = set()

    def at_first(request: Request, pass_on: PassOn) -> Answer | None:
        again = request.target in failed
        failed.add(request.target)
        return pass_on(request) if again else fault(request, pass_on)

    expected = CALLS[call](open_objects(new_url()) if "put" in call else objects)
    proxy.treat = at_first
    assert CALLS[call](objects) == expected
    assert failed


@pytest.mark.parametrize("call", CALLS)
def test_an_answer_that_never_comes_is_waited_for_so_long(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(cloud_module, "_TIMEOUT", "60ms")
    monkeypatch.setattr(cloud_module, "_MAX_RETRIES", 1)
    objects = open_objects(new_url())
    proxy.treat = lambda request, pass_on: pass_on(request) if proxy.ended.wait(60) else None
    with pytest.raises(StorageError) as caught:
        CALLS[call](objects)
    assert caught.value.transient
    assert "no answer in time; try again" in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_a_connection_that_is_refused_is_an_error_that_may_pass(
    moto: Server, use: Callable[[Server], None], call: str
) -> None:
    with Proxy(moto) as gone:
        use(gone.server)
    with pytest.raises(StorageError) as caught:
        CALLS[call](open_objects(new_url()))
    assert caught.value.transient
    assert "the endpoint cannot be reached" in str(caught.value)


@pytest.mark.parametrize("call", ["get", "get_range", "get_ranges"])
def test_an_answer_that_ends_too_soon_is_asked_for_again(objects: Objects, proxy: Proxy, call: str) -> None:
    def halve(request: Request, pass_on: PassOn) -> Answer:
        answer = pass_on(request)
        answer.body = answer.body[: len(answer.body) // 2]
        return answer

    objects.put_if_absent("packs/a", [b"abcde"])
    expected = CALLS[call](objects)
    proxy.treat = at(0, halve, which=lambda request: request.method == "GET")
    assert CALLS[call](objects) == expected
    proxy.treat = halve
    with pytest.raises(StorageError) as caught:
        CALLS[call](objects)
    assert caught.value.transient


def test_what_a_store_cannot_do_is_no_reason_to_try_again(objects: Objects, proxy: Proxy) -> None:
    proxy.treat = lambda request, pass_on: Answer.error(501, "NotImplemented")
    with pytest.raises(StorageError) as caught:
        objects.put_if_absent("log/0", [b"abc"])
    assert not caught.value.transient
    assert len(proxy.requests) == 1


# -- names that are taken ----------------------------------------------------------------------------------------------


def conflict(request: Request, pass_on: PassOn) -> Answer:
    return Answer.error(409, "ConditionalRequestConflict")


def test_a_conflict_is_not_taken_for_a_name_that_is_taken(objects: Objects, proxy: Proxy) -> None:
    """Nothing was stored: another writer was at it at that moment, and may have failed too."""
    proxy.treat = at(0, conflict)
    objects.put_if_absent("log/0", [b"mine"])
    assert [request.method for request in proxy.requests] == ["PUT", "HEAD", "PUT"]
    assert objects.get("log/0") == b"mine"


def test_a_conflict_that_lasts_may_pass(objects: Objects, proxy: Proxy) -> None:
    proxy.treat = at_every_put(conflict)
    with pytest.raises(StorageError) as caught:
        objects.put_if_absent("log/0", [b"mine"])
    assert (caught.value.kind, caught.value.transient) == ("inconsistent_store", True)
    assert sum(map(is_put, proxy.requests)) == TRIES


def test_a_conflict_with_whoever_has_the_name_by_now_is_lost(objects: Objects, proxy: Proxy) -> None:
    objects.put_if_absent("log/0", [b"theirs"])
    proxy.treat = at(0, conflict)
    with pytest.raises(AlreadyExistsError):
        objects.put_if_absent("log/0", [b"mine"])
    assert objects.get("log/0") == b"theirs"


@pytest.mark.parametrize("fault", [lose_the_answer, apply_and_fail])
def test_a_put_whose_answer_is_lost_knows_its_own_bytes(objects: Objects, proxy: Proxy, fault: Treatment) -> None:
    proxy.treat = at(0, fault)
    objects.put_if_absent("log/0", [b"mine"])
    assert objects.get("log/0") == b"mine"
    with pytest.raises(AlreadyExistsError):  # a call of its own, which was told that it lost
        objects.put_if_absent("log/0", [b"mine"])


def test_a_put_that_was_lost_does_not_take_what_is_another_s(objects: Objects, proxy: Proxy) -> None:
    def overtaken(request: Request, pass_on: PassOn) -> None:
        pass_on(Request("PUT", request.target, {"content-length": "6"}, b"theirs"))

    proxy.treat = at(0, overtaken)
    with pytest.raises(AlreadyExistsError):
        objects.put_if_absent("log/0", [b"mine"])
    assert objects.get("log/0") == b"theirs"


@pytest.mark.parametrize("status", [400, 403, 501])
def test_a_refusal_says_nothing_about_the_try_before_it(objects: Objects, proxy: Proxy, status: int) -> None:
    """The first try may still be carried out: to call it refused would be to promise that it will not."""
    faults = iter([cut, lambda request, pass_on: Answer.error(status, "Whatever")])
    proxy.treat = lambda request, pass_on: next(faults)(request, pass_on)
    with pytest.raises(StorageError) as caught:
        objects.put_if_absent("log/0", [b"mine"])
    assert caught.value.transient


# -- whether a store is safe -------------------------------------------------------------------------------------------


def ignore_the_condition(request: Request, pass_on: PassOn) -> Answer:
    request.headers.pop("if-none-match", None)
    return pass_on(request)


@pytest.fixture
def nothing_known(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stores have been found sound is forgotten."""
    monkeypatch.setattr(probe_module, "_sound", set())


@pytest.mark.usefixtures("nothing_known")
def test_a_store_that_ignores_conditions_is_refused(objects: Objects, proxy: Proxy) -> None:
    proxy.treat = ignore_the_condition
    url = new_url()
    for refused in (lambda: probe(objects), lambda: lamella.init(url)):
        with pytest.raises(StorageError) as caught:
            refused()
        assert (caught.value.kind, caught.value.context["promise"]) == ("unsafe_store", "create_once")
    assert list(open_objects(url).list("log/")) == []
    proxy.treat = lambda request, pass_on: pass_on(request)
    probe(objects)
    lamella.init(url).close()


@pytest.mark.usefixtures("nothing_known")
def test_a_repository_is_not_written_to_where_conditions_are_ignored(proxy: Proxy) -> None:
    url = new_url()
    lamella.init(url).push(OLD, "m@main")
    probe_module._sound.clear()
    proxy.treat = ignore_the_condition
    with pytest.raises(StorageError) as caught:
        lamella.open(url).push(NEW, "m@main")
    assert caught.value.kind == "unsafe_store"
    assert bits(lamella.open(url).checkout("m@main")) == bits(OLD)


@pytest.mark.usefixtures("nothing_known")
def test_a_sound_bucket_is_tried_once_in_a_process(objects: Objects, proxy: Proxy) -> None:
    probe(objects)
    proxy.requests.clear()
    probe(objects)
    probe(open_objects(new_url()))
    assert proxy.requests == []


def test_buckets_of_one_name_at_two_endpoints_are_two_stores(
    moto: Server, proxy: Proxy, use: Callable[[Server], None]
) -> None:
    through_the_proxy = open_objects(new_url()).store_name
    use(moto)
    assert open_objects(new_url()).store_name not in ("", through_the_proxy)


# -- listings and ranges -----------------------------------------------------------------------------------------------


def test_a_listing_out_of_order_is_refused(objects: Objects, proxy: Proxy) -> None:
    for name in ("log/0", "log/1", "log/2"):
        objects.put_if_absent(name, [b""])

    def reverse(request: Request, pass_on: PassOn) -> Answer:
        answer = pass_on(request)
        head, *rest = answer.body.split(b"<Contents>")
        entries = [entry.partition(b"</Contents>")[0] for entry in rest]
        tail = rest[-1].partition(b"</Contents>")[2]
        body = b"".join(b"<Contents>" + entry + b"</Contents>" for entry in reversed(entries))
        return Answer(answer.status, head + body + tail)

    proxy.treat = reverse
    for prefix in ("log/", "log/1", "log/2"):
        with pytest.raises(StorageError) as caught:
            list(objects.list(prefix))
        assert (caught.value.kind, caught.value.transient) == ("unordered_listing", False)


def test_what_begins_with_a_prefix_is_asked_for_and_not_what_comes_before(objects: Objects, proxy: Proxy) -> None:
    for name in ("meta/aa", "meta/ab", "meta/b"):
        objects.put_if_absent(name, [b""])
    proxy.requests.clear()
    assert [info.name for info in objects.list("meta/ab")] == ["meta/ab"]
    (request,) = proxy.requests
    assert request.target.partition("start-after=")[2].endswith("meta%2Fa")


def test_neighbouring_ranges_come_in_one_request_and_distant_ones_side_by_side(objects: Objects, proxy: Proxy) -> None:
    objects.put_if_absent("packs/a", [LONG])
    near = [(start, start + 1000) for start in range(0, 3 << 20, 200 << 10)]
    far = [(start, start + 1000) for start in range(0, 16 << 20, 4 << 20)]
    for ranges, requests in ((near, 1), (far, len(far)), (near + far[1:], len(far)), (near[::-1], 1)):
        proxy.requests.clear()
        assert list(objects.get_ranges("packs/a", ranges)) == [LONG[start:stop] for start, stop in ranges]
        assert len(proxy.requests) == requests


# -- addresses and credentials -----------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there_is_told_apart_from_a_repository_that_is_not(either: Proxy) -> None:
    for url, kind in ((f"s3://no-{BUCKET}/place", "bucket_not_found"), (new_url(), "not_found")):
        with pytest.raises(RepositoryNotFoundError) as caught:
            lamella.open(url)
        assert (caught.value.kind == "bucket_not_found") == (kind == "bucket_not_found")
    absent = open_objects(f"s3://no-{BUCKET}/place")
    for call in ("get", "get_range", "get_ranges", "put", "list"):
        with pytest.raises(RepositoryNotFoundError) as caught:
            CALLS[call](absent)
        assert caught.value.kind == "bucket_not_found"
    with pytest.raises(RepositoryNotFoundError):
        lamella.init(f"s3://no-{BUCKET}/place")


@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
@pytest.mark.parametrize("call", CALLS)
def test_wrong_credentials_are_refused_and_told_to_nobody(
    seaweedfs: Server, use: Callable[[Server], None], monkeypatch: pytest.MonkeyPatch, wrong: str, call: str
) -> None:
    use(seaweedfs)
    monkeypatch.setenv(wrong, "wrongwrongwrong")
    with pytest.raises(PermissionDeniedError) as caught:
        CALLS[call](open_objects(new_url()))
    assert caught.value.kind == "store_refuses"
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value.context)
    assert seaweedfs.secret_key not in told
    assert wrong == "AWS_ACCESS_KEY_ID" or "wrongwrongwrong" not in told


def test_a_session_that_has_expired_is_a_matter_of_rights(objects: Objects, proxy: Proxy) -> None:
    proxy.treat = lambda request, pass_on: Answer.error(400, "ExpiredToken")
    with pytest.raises(PermissionDeniedError):
        objects.get("log/0")


def test_no_credentials_at_all_are_named(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", proxy.server.endpoint)
    proxy.treat = lambda request, pass_on: Answer(404)
    with pytest.raises(PermissionDeniedError) as caught:
        open_objects(new_url()).get("log/0")
    assert caught.value.kind == "no_credentials"


@pytest.mark.parametrize(
    "endpoint",
    ["nowhere", "ftp://host", "http://", "http://a b", "http://ada:pa55word@host", "https://host/?token=pa55word"],
)
def test_what_is_no_endpoint_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(InvalidInputError) as caught:
        open_objects(new_url())
    assert caught.value.kind == "bad_endpoint"
    assert "pa55word" not in str(caught.value)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"])
@pytest.mark.parametrize("value", ["pa55word\n", "pa55word\u00e9"])
def test_what_no_request_can_carry_is_no_credential(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError) as caught:
        open_objects(new_url())
    assert caught.value.kind == "bad_credentials"
    assert "pa55word" not in str(caught.value)


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["s3://bucket/new", ""], ids=["another", "its parent's"])
def test_a_fork_is_told_that_it_cannot_use_its_parents_connections(objects: Objects, url: str) -> None:
    """It would wait for ever, and what it did would make its parent crash."""
    objects.put_if_absent("log/0", [b"abc"])
    child = os.fork()
    if not child:
        with suppress(BaseException):
            try:
                (open_objects(url) if url else objects).get("log/0")
            except StorageError as error:
                os._exit(42 if (error.kind, error.transient) == ("forked", False) else 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert objects.get("log/0") == b"abc"


# -- repositories ------------------------------------------------------------------------------------------------------


def repository(url: str) -> None:
    with lamella.init(url) as repo:
        repo.push(OLD, "m@main", message="old")


def holds(url: str, tensors: object) -> None:
    """Check that everything is sound and the branch stands at ``tensors``."""
    with lamella.open(url) as repo:
        assert bits(repo.checkout("m@main")) == bits(tensors)
        assert repo.verify(deep=True).problems == []


@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "in parts"])
@pytest.mark.parametrize("fault", [lose_the_answer, apply_and_fail])
def test_a_push_does_not_notice_that_an_answer_is_lost(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: Treatment, in_parts: bool
) -> None:
    if in_parts:
        monkeypatch.setattr(cloud_module, "CREATE_ONCE_NBYTES", 4000)  # packs are longer, and nothing else is
    for fail_at in count():
        url = new_url()
        repository(url)
        proxy.treat, proxy.requests = at(fail_at, fault), []
        with lamella.open(url) as repo:
            assert repo.push(NEW, "m@main").number == 2
        puts = sum(map(is_put, proxy.requests))
        holds(url, NEW)
        if puts <= fail_at:
            break
    assert fail_at >= 3


def test_a_push_whose_store_falls_silent_at_any_put_ends_cleanly_and_can_be_repeated(proxy: Proxy) -> None:
    """The put is carried out, its answer is lost, and so is every answer after it."""
    endings = set()
    for fail_at in count():
        url = new_url()
        repository(url)
        silent = []

        def fall_silent(request: Request, pass_on: PassOn, silent: list[bool] = silent) -> None:
            silent.append(True)
            pass_on(request)

        until_then = at(fail_at, fall_silent)
        proxy.treat = lambda request, pass_on, silent=silent, until_then=until_then: (  # type: ignore[misc]
            None if silent else until_then(request, pass_on)
        )
        ended: str = "done"
        with lamella.open(url) as repo:
            try:
                repo.push(NEW, "m@main")
            except (StorageError, OutcomeUnknownError) as error:
                ended = type(error).__name__
        endings.add(ended)
        proxy.treat = lambda request, pass_on: pass_on(request)
        with lamella.open(url) as repo:
            assert repo.stats().versions in ((1, 2) if ended == "OutcomeUnknownError" else (1,) if silent else (2,))
            assert repo.push(NEW, "m@main").number == 2
        holds(url, NEW)
        if not silent:
            break
    assert endings == {"StorageError", "OutcomeUnknownError", "done"}


@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "in parts"])
def test_an_upload_that_is_damaged_on_its_way_is_refused_and_sent_again(
    strict_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, in_parts: bool
) -> None:
    objects = open_objects(new_url())
    if in_parts:
        monkeypatch.setattr(cloud_module, "CREATE_ONCE_NBYTES", 4000)
    strict_proxy.treat = at_every_put(flip_a_bit)
    with pytest.raises(StorageError) as caught:
        objects.put_if_absent("packs/a", [LONG[:20_000]])
    assert caught.value.transient
    with pytest.raises(NotFoundError):
        objects.size("packs/a")
    strict_proxy.treat = at(0, flip_a_bit, which=lambda request: not in_parts)
    objects.put_if_absent("packs/a", [LONG[:20_000]])
    assert objects.get("packs/a") == LONG[:20_000]


def test_a_damaged_upload_to_a_store_that_does_not_look_is_never_read_back_as_good(proxy: Proxy) -> None:
    found = set()
    for fail_at in count():
        url = new_url()
        repository(url)
        proxy.treat, proxy.requests = at(fail_at, flip_a_bit), []
        with lamella.open(url) as repo, suppress(CorruptionError):
            repo.push(NEW, "m@main")
        puts = sum(map(is_put, proxy.requests))
        try:
            with lamella.open(url) as repo:
                assert bits(repo.checkout("m@main")) == bits(NEW)
            found.add("whole")
        except CorruptionError:
            found.add("damaged")
        if puts <= fail_at:
            break
    assert found == {"whole", "damaged"}


def test_a_damaged_download_is_corruption(proxy: Proxy) -> None:
    url = new_url()
    repository(url)

    def damage(request: Request, pass_on: PassOn) -> Answer:
        answer = pass_on(request)
        answer.body = damaged(answer.body)
        return answer

    repo = lamella.open(url)
    proxy.treat = at(0, damage, which=lambda request: "/packs/" in request.target)
    with pytest.raises(CorruptionError):
        repo.checkout("m@main")
    assert bits(repo.checkout("m@main")) == bits(OLD)


FOREIGN = [
    "",
    "README.txt",
    "other/deep/er",
    "log/",
    "log/old/00000000000000000009",
    "log/.hidden",
    "packs/with space.txt",
    "packs/%C3%A4",
    "meta/a~b",
    "fold/0..0",
    "probe/",
]


def test_foreign_files_under_the_prefix_do_no_harm(proxy: Proxy) -> None:
    url = new_url()
    for key in FOREIGN:
        target = f"/{url.removeprefix('s3://')}/{key}".replace(" ", "%20")
        assert proxy._pass_on(Request("PUT", target, {"content-length": "7"}, b"foreign")).status == 200
    repository(url)
    with lamella.open(url) as repo:
        repo.push(NEW, "m@main")
        assert repo.stats().versions == 2
    holds(url, NEW)


def test_the_command_line_takes_a_url(proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = new_url()
    repository(url)
    assert run(["-C", url, "checkout", "m@main", str(tmp_path / "out")]) == 0
    assert run(["-C", url, "log", "m"]) == 0
    assert run(["init", url]) == AlreadyExistsError.exit_code
    assert run(["-C", f"s3://no-{BUCKET}/x", "log", "m"]) == RepositoryNotFoundError.exit_code
    assert "no such bucket" in capsys.readouterr().err


# -- the chunk index ---------------------------------------------------------------------------------------------------


def pack_reads_of_a_push(proxy: Proxy, url: str) -> int:
    """Push as a new process would, and count what is read of packs for it."""
    proxy.requests.clear()
    with lamella.open(url) as repo:
        repo.push({"bias": noise(9, 100)}, "another@main")
    return sum(request.method == "GET" and "/packs/" in request.target for request in proxy.requests)


def test_the_chunk_index_of_a_bucket_outlives_the_process(proxy: Proxy, tmp_path: Path) -> None:
    lost, kept = new_url(), new_url()
    for url in (lost, kept):
        with lamella.init(url) as repo:
            for seed in range(4):
                repo.push({"w": noise(seed, 500)}, f"m@{seed}-line")
        (index,) = (tmp_path / "cache" / "lamella" / "index").glob("*/chunks.sqlite")
        if url == lost:
            shutil.rmtree(index.parent)
    # Of each pack the end, then the index.
    assert pack_reads_of_a_push(proxy, lost) == pack_reads_of_a_push(proxy, f"{kept}/") + 4 * 2


@pytest.mark.parametrize("cache", ["a file", "no home", "relative"])
def test_without_a_place_for_it_the_chunk_index_is_in_memory(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", {"a file": str(tmp_path / "file"), "no home": "", "relative": "here"}[cache])
    url = new_url()
    repository(url)
    assert pack_reads_of_a_push(proxy, url) > 0
    holds(url, OLD)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_repositories_of_one_bucket_have_an_index_each(proxy: Proxy, tmp_path: Path) -> None:
    for _ in range(2):
        repository(new_url())
    assert len(list((tmp_path / "cache" / "lamella" / "index").iterdir())) == 2
