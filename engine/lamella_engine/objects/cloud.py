"""Objects in a bucket of an object store: S3 and what speaks its protocol; Google Cloud Storage and Azure untested.

Requests, signatures, retries with jitter and parallel transfers are obstore's. What is here is what a repository needs
beyond them: errors that say what to do, exact lengths, listings that are known to be in order.
"""

import os
import random
import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any

import obstore
from obstore import exceptions as failures
from obstore.store import ObjectStore, from_url

from lamella_engine.errors import (
    InvalidInputError,
    LamellaError,
    PermissionDeniedError,
    RepositoryNotFoundError,
    StorageError,
)
from lamella_engine.model import Buffer
from lamella_engine.objects import (
    CREATE_ONCE_NBYTES,
    ObjectInfo,
    byte_views,
    check_object_name,
    check_range,
    check_small,
    is_object_name,
    object_exists,
    object_not_found,
    split_prefix,
)

# Parts of an upload: S3 takes none below 5 MiB, and a part that fails is sent again whole.
_PART_NBYTES = 8 << 20
# Parts on their way at a time. One connection to S3 carries 50 to 90 MB/s. They are sent from the caller's buffers.
_PARTS_AT_ONCE = 4

# Ranges that lie at most this far apart are asked for as one: a request waits 10 to 30 ms for its first byte, and in
# that time a connection carries 1 MB.
_NEIGHBOUR_NBYTES = 256 << 10

# S3 gives at most so many names in an answer, which are looked at together.
_PAGE_NAMES = 1000

# A request is tried again after 0.1 s, 0.2 s ... 5 s, each with jitter, as long as all of them take less than a minute:
# what lasts longer is no hiccup, and a push can be repeated.
_MAX_RETRIES = 10
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_RETRY_S = 60.0

# A request carries at most 16 MiB (but for the metadata of millions of cells), and the parts of an upload that are on
# their way together 32 MiB: what sends 560 kB/s is fast enough.
_TIMEOUT = "60s"
_CONNECT_TIMEOUT = "10s"

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# Others would make obstore panic, or carry a password into the texts of errors.
_ENDPOINT = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(?::\d+)?(?:/[A-Za-z0-9._~-]+)*/?")


class CloudObjects:
    """:class:`~lamella_engine.objects.Objects` in a bucket, under a prefix; object ``a/b`` has the key ``PREFIX/a/b``.

    Parameters
    ----------
    store
        The bucket and its prefix.
    once
        The same, but each request is made once.
    place
        How to call it in errors.
    store_name
        Names the bucket, wherever its endpoint is.
    """

    def __init__(self, store: ObjectStore, *, once: ObjectStore, place: str, store_name: str) -> None:
        self._store = store
        self._once = once
        self.place = place
        self.store_name = store_name

    @classmethod
    def open(cls, url: str) -> "CloudObjects":
        """Open ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``; nothing is asked yet.

        Credentials, region and endpoint come from the environment, by the names that the vendors' own tools use:
        ``AWS_ACCESS_KEY_ID``, ``AWS_REGION``, ``AWS_ENDPOINT_URL`` and so on, or a machine's role.

        Raises
        ------
        InvalidInputError
            Kind ``bad_url`` for a URL without bucket, or with other signs than names of objects have; ``bad_endpoint``
            for an endpoint that is no plain ``http://`` or ``https://`` address, ``bad_credentials`` for an access key
            or session token that no request can carry, such as one that ends with a line break.
        """
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        if not _BUCKET.fullmatch(bucket) or not (not prefix or is_object_name(prefix)):
            raise InvalidInputError(
                f"{url!r} names no place: give {scheme}://bucket/prefix, of letters, digits and . _ - / only",
                kind="bad_url",
                url=url,
            )
        options: Any = {"timeout": _TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT}
        config: Any = None
        endpoint = ""
        if scheme == "s3":
            # The store compares what arrives with this digest, of each part.
            config = {"checksum_algorithm": "SHA256"}
            _check_credentials()
            endpoint = _endpoint()
            if endpoint:
                config["endpoint"] = endpoint
                # Whoever writes http:// into the endpoint means it.
                options["allow_http"] = endpoint.startswith("http://")
        place = f"{scheme}://{bucket}/{prefix}".rstrip("/")
        with _store_errors(f"open {place}"):
            store, once = (
                from_url(place, client_options=options, retry_config=_retries(most), config=config)
                for most in (_MAX_RETRIES, 0)
            )
        return cls(store, once=once, place=place, store_name=f"{scheme}://{bucket} {endpoint}".strip())

    def get(self, name: str) -> bytes:
        """Ask for the object; its length comes before its bytes."""
        check_object_name(name)
        with self._errors("read", name):
            answer = obstore.get(self._store, name)
            check_small(name, int(answer.meta["size"]))
            return answer.bytes().to_bytes()

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Ask for a range in one request."""
        check_object_name(name)
        if not 0 <= start < stop:  # no request can ask for nothing, and only a size tells whether it is there
            check_range(name, start, stop, nbytes=self.size(name))
            return b""
        try:
            with self._errors("read", name):
                data = obstore.get_range(self._store, name, start=start, end=stop).to_bytes()
        except StorageError as error:
            self._check_refused(name, stop, error)
            raise
        check_range(name, start, stop, nbytes=start + len(data))
        return data

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Ask for ranges in several requests at a time, for neighbours in one."""
        if len(ranges) < 2 or any(not 0 <= start < stop for start, stop in ranges):
            return [self.get_range(name, start, stop) for start, stop in ranges]
        check_object_name(name)
        # Not left to obstore, which panics if an object ends before one of the ranges that it has put together.
        runs = _neighbours(ranges)
        try:
            with self._errors("read", name):
                found = obstore.get_ranges(
                    self._store, name, starts=[start for start, _ in runs], ends=[stop for _, stop in runs], coalesce=0
                )
        except StorageError as error:
            self._check_refused(name, runs[-1][1], error)
            raise
        for data, (start, stop) in zip(found, runs, strict=True):
            check_range(name, start, stop, nbytes=start + len(data))
        firsts = [start for start, _ in runs]
        pieces = []
        for start, stop in ranges:
            run = bisect_right(firsts, start) - 1
            pieces.append(bytes(memoryview(found[run])[start - firsts[run] : stop - firsts[run]]))
        return pieces

    def _check_refused(self, name: str, stop: int, error: StorageError) -> None:
        """Raise CorruptionError if a range was refused because the object ends before it.

        Stores refuse one that begins behind the end, in words that differ from store to store.
        """
        if not error.transient:
            check_range(name, 0, stop, nbytes=self.size(name))

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write under a condition, in one request; what is longer than ``CREATE_ONCE_NBYTES`` in parts, without."""
        check_object_name(name)
        views = byte_views(parts)
        nbytes = sum(view.nbytes for view in views)
        if nbytes > CREATE_ONCE_NBYTES:
            self._upload(name, views, nbytes)
            return
        self._create(name, b"".join(views))

    def _create(self, name: str, data: bytes) -> None:
        """Put under the condition that the name is free, until an answer says what came of it.

        The tries are made here and not by obstore: only who makes them all can tell a name that is another's from one
        that an earlier try took whose answer was lost.
        """
        pauses = _pauses()
        lost: StorageError | None = None
        while True:
            try:
                if self._is_created(name, data, may_be_ours=lost is not None):
                    return
            except (StorageError, PermissionDeniedError) as error:
                if not (isinstance(error, StorageError) and error.transient):
                    # A refusal says nothing about an earlier try, which may still be carried out.
                    if lost is not None:
                        raise lost from error
                    raise
                lost = error
            pause = next(pauses, None)
            if pause is None:
                raise lost or StorageError(
                    f"{self.place} says that {name} exists, and that it does not: try again",
                    kind="inconsistent_store",
                    transient=True,
                    name=name,
                )
            time.sleep(pause)

    def _is_created(self, name: str, data: bytes, *, may_be_ours: bool) -> bool:
        """Try once to create an object, and return whether it is created; False if the store could not tell.

        Raises AlreadyExistsError if it is there already, and not from this caller.
        """
        try:
            with self._errors("write", name):
                obstore.put(self._once, name, data, mode="create")
        except failures.AlreadyExistsError:
            # Some stores answer so when they only could not tell, because of another writer at that moment.
            if not self._exists(name):
                return False
            if may_be_ours and self.get(name) == data:
                return True
            raise object_exists(name) from None
        return True

    def _upload(self, name: str, views: Sequence[memoryview], nbytes: int) -> None:
        # Stores differ in whether they heed a condition at the end of an upload in parts, so none is relied on: the
        # name is the caller's alone.
        if self._exists(name):
            raise object_exists(name)
        try:
            with self._errors("write", name):
                obstore.put(
                    self._store,
                    name,
                    _pieces(views),
                    use_multipart=True,
                    chunk_size=_PART_NBYTES,
                    max_concurrency=_PARTS_AT_ONCE,
                )
        except StorageError as error:
            # The last request may have been carried out, and the next one not understood: the upload is over then.
            if not self._exists(name):
                raise error from None
        stored = self.size(name)
        if stored != nbytes:
            raise StorageError(
                f"{self.place} has {stored} of the {nbytes} bytes of {name} that it said it stored: do not trust it",
                kind="short_write",
                transient=False,
                name=name,
            )

    def size(self, name: str) -> int:
        """Ask for the object's head."""
        check_object_name(name)
        with self._errors("read", name):
            return int(obstore.head(self._store, name)["size"])

    def _exists(self, name: str) -> bool:
        try:
            self.size(name)
        except LamellaError as error:
            if error.kind != "object_not_found":
                raise
            return False
        return True

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """Ask for a thousand names at a time, as they are wanted.

        Raises StorageError (``unordered_listing``) if they do not come in order, as from S3's directory buckets.
        """
        directory, start = split_prefix(prefix)
        # Whatever begins with the prefix follows what the prefix begins with.
        return self._listed(directory, prefix, max(after, prefix[:-1]) if start else after, limit)

    def _listed(self, directory: str, prefix: str, after: str, limit: int | None) -> Iterator[ObjectInfo]:
        last = ""
        for page in self._pages(directory, after) if limit != 0 else ():
            # What others left there is no object, and what lies deeper is in no listing.
            infos = [info for info in page if info.name.rpartition("/")[0] == directory and is_object_name(info.name)]
            names = [last, *(info.name for info in infos)]
            if any(name < before for before, name in pairwise(names)):
                raise StorageError(
                    f"{self.place} lists names in no order, and a repository needs them in order: use another bucket",
                    kind="unordered_listing",
                    transient=False,
                )
            last = names[-1]
            for info in infos:
                if info.name <= after or info.name < prefix:
                    continue
                if not info.name.startswith(prefix):
                    return
                yield info
                if limit is not None:
                    limit -= 1
                    if not limit:
                        return

    def _pages(self, directory: str, after: str) -> Iterator[Sequence[ObjectInfo]]:
        with self._errors("list", directory or "the top"):
            if not directory:  # beside everything below it, which nobody wants to go through
                yield _infos(obstore.list_with_delimiter(self._store)["objects"])
                return
            for page in obstore.list(self._store, directory, offset=after or None, chunk_size=_PAGE_NAMES):
                yield _infos(page)

    def delete(self, name: str) -> None:
        """Ask for it to be removed. Where a bucket keeps versions, it keeps this one too."""
        check_object_name(name)
        with self._errors("delete", name):
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError:
                return

    def put_url(self, name: str, seconds: float) -> str:
        """Return a URL at which whoever has it may put this object, and do nothing else, for so long. It is a secret.

        Not for Azure. What is put there is under no condition: it replaces what was put before, also after that time if
        it was begun within it.
        """
        check_object_name(name)
        with self._errors("sign a URL for", name):
            store: Any = self._store
            return str(obstore.sign(store, "PUT", name, timedelta(seconds=seconds)))

    def copy(self, source: str, name: str) -> None:
        """Have the store copy an object as it is now to a name that only the caller uses. Durable, and atomic.

        Raises NotFoundError (``object_not_found``) if there is no such object.
        """
        check_object_name(source)
        check_object_name(name)
        with _store_errors(f"copy {source} in {self.place}", source):
            obstore.copy(self._store, source, name, overwrite=True)

    def close(self) -> None:
        """Hold nothing: connections end when they have been idle for a while."""

    @contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        with _store_errors(f"{verb} {name} in {self.place}", name if verb == "read" else None):
            yield


def _infos(items: Iterable[Any]) -> list[ObjectInfo]:
    return [ObjectInfo(item["path"], int(item["size"])) for item in items]


def _neighbours(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Put ranges together that are worth a single request; return what to ask for, in order."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if runs and start - runs[-1][1] <= _NEIGHBOUR_NBYTES:
            runs[-1] = runs[-1][0], max(stop, runs[-1][1])
        else:
            runs.append((start, stop))
    return runs


def _pieces(views: Sequence[memoryview]) -> Iterator[memoryview]:
    """Cut buffers so that what is gathered for one part is never much longer than a part."""
    for view in views:
        for start in range(0, view.nbytes, _PART_NBYTES):
            yield view[start : start + _PART_NBYTES]


def _endpoint() -> str:
    """Return where S3 is spoken, if the environment says so, else nothing."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return ""
    if not _ENDPOINT.fullmatch(os.environ[name]):
        raise InvalidInputError(
            f"the value of {name} is no endpoint: give http://host:port or https://host, without user and password",
            kind="bad_endpoint",
        )
    return os.environ[name].rstrip("/")


def _check_credentials() -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"):
        value = os.environ.get(name, "")
        if not (value.isascii() and value.isprintable()):  # obstore would panic
            raise InvalidInputError(
                f"the value of {name} has signs that no credential has: set it without line breaks",
                kind="bad_credentials",
            )


def _pauses() -> Iterator[float]:
    """Yield, for each further try that is worth it, how many seconds to wait before."""
    began = time.monotonic()
    for number in range(_MAX_RETRIES):
        pause = random.uniform(0.5, 1) * min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**number)
        if time.monotonic() + pause - began > _RETRY_S:
            return
        yield pause


def _retries(most: int) -> Any:
    """Return the same to obstore's liking, of ``most`` further tries."""
    return {
        "max_retries": most,
        "retry_timeout": timedelta(seconds=_RETRY_S),
        "backoff": {
            "init_backoff": timedelta(seconds=_FIRST_PAUSE_S),
            "max_backoff": timedelta(seconds=_LONGEST_PAUSE_S),
            "base": 2,
        },
    }


class _Connections:
    """Whose obstore's connections are.

    Threads wait for them, which a fork does not have, at a descriptor, which it shares: a request of a fork would never
    end, and make its parent crash.
    """

    def __init__(self) -> None:
        self._in_use = False
        self._inherited = False
        os.register_at_fork(after_in_child=self._forked)

    def use(self, action: str) -> None:
        """Raise StorageError if they are another process's."""
        if self._inherited:
            raise StorageError(
                f"cannot {action}: this process was forked from one that had used a bucket, and cannot share its "
                "connections; start processes with 'spawn' or 'forkserver'",
                kind="forked",
                transient=False,
            )
        self._in_use = True

    def _forked(self) -> None:
        self._inherited = self._in_use


_connections = _Connections()


@contextmanager
def _store_errors(action: str, name: str | None = None) -> Iterator[None]:
    """Turn what obstore raises into the error that says what its catcher can do. That a name is taken passes.

    ``name`` is the object that is read, if one is.
    """
    _connections.use(action)
    try:
        yield
    except failures.AlreadyExistsError:
        raise
    except (failures.BaseError, ValueError, OSError) as error:
        raise _explained(error, action, name) from error


def _explained(error: Exception, action: str, name: str | None) -> LamellaError:
    text = str(error)
    cause = _cause(text)
    if cause == "NoSuchBucket":
        return RepositoryNotFoundError(
            f"cannot {action}: there is no such bucket; make it, or check its name", kind="bucket_not_found"
        )
    if name is not None and isinstance(error, FileNotFoundError):
        return object_not_found(name)
    if _METADATA_SERVICE in text:
        return PermissionDeniedError(
            f"cannot {action}: there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            kind="no_credentials",
        )
    status = int(found[1]) if (found := re.search(r"status code: (\d+)", text)) else None
    if status in (401, 403) or cause in _REFUSALS:
        return PermissionDeniedError(
            f"cannot {action}: the store refuses ({cause}); check the credentials in the environment, and their rights",
            kind="store_refuses",
        )
    transient = (
        cause in _FAULTS_OF_TRANSFER
        or status in (408, 409, 429)
        or (status is not None and status >= 500 and status != 501)  # 501: the store cannot do that, ever
        or (status is None and "HTTP error" in text)
    )
    advice = (
        "try again, and if it lasts check the endpoint and the network"
        if transient
        else "check bucket, region and endpoint"
    )
    return StorageError(f"cannot {action}: {cause}; {advice}", kind="store_failed", transient=transient)


# Answers of S3 that do not have the status that other stores, and it itself, give to their kind.
_REFUSALS = {"ExpiredToken", "InvalidToken"}
_FAULTS_OF_TRANSFER = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}

# Where a machine in the cloud is told its credentials, which is asked for if the environment has none.
_METADATA_SERVICE = "/latest/api/token"

_CAUSES = [
    (re.compile(r"<Code>(\w+)</Code>"), r"\1"),
    (re.compile(r"status code: (\d+(?: [A-Z][A-Za-z]*)*)"), r"\1"),
    (re.compile(r"kind: Connect\b"), "the endpoint cannot be reached"),
    (re.compile(r"kind: Timeout\b"), "no answer in time"),
    (re.compile(r"HTTP error"), "the connection broke"),
    (re.compile(r"\A(.{1,200})"), r"\1"),
]


def _cause(text: str) -> str:
    """Return what is worth saying of an error of obstore: the store's own code, or what kind of failure it is."""
    return next((found.expand(words) for sign, words in _CAUSES if (found := sign.search(text))), "no reason given")
