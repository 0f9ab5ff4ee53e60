"""Objects in a bucket of an object store: S3 and what speaks its protocol; Google Cloud Storage and Azure untested.

Requests, signatures, retries with jitter and parallel transfers are obstore's. What is here is what a repository needs
beyond them: errors that say what to do, exact lengths, listings that are known to be in order.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from os import environ
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
# Parts on their way at a time. One connection to S3 carries some 50 to 90 MB/s; each holds its part in memory.
_PARTS_AT_ONCE = 4

# Ranges that lie at most this far apart are asked for as one: a request waits 10 to 30 ms for its first byte, and in
# that time a connection carries 1 MB.
_NEIGHBOUR_NBYTES = 256 << 10

# A request is tried again after 0.1 s, 0.2 s ... 5 s, each with jitter, as long as all of them take less than a minute:
# what lasts longer is no hiccup, and a push can be repeated.
_RETRIES: Any = {
    "max_retries": 10,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
# A request carries at most 16 MiB, for which a minute asks 270 kB/s.
_TIMEOUTS = {"timeout": "60s", "connect_timeout": "10s"}

# Tries of a conditional write whose answer says neither that it was done nor that the name is taken.
_CREATE_TRIES = 5

# What passes by itself: the server's own faults, too many requests, and connections that break.
_TRANSIENT = re.compile(r"non-2xx status code: (?:5\d\d|408|409|429)|HTTP error|timed? ?out|connection", re.IGNORECASE)


class CloudObjects:
    """:class:`~lamella_engine.objects.Objects` in a bucket, under a prefix; object ``a/b`` has the key ``PREFIX/a/b``.

    Parameters
    ----------
    store
        The bucket and its prefix.
    place
        How to call it in errors.
    """

    def __init__(self, store: ObjectStore, place: str) -> None:
        self._store = store
        self.place = place

    @classmethod
    def open(cls, url: str) -> "CloudObjects":
        """Open ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``; nothing is asked yet.

        Credentials, region and endpoint come from the environment, by the names that the vendors' own tools use:
        ``AWS_ACCESS_KEY_ID``, ``AWS_REGION``, ``AWS_ENDPOINT_URL`` and so on, or a machine's role.

        Raises InvalidInputError (``bad_url``) for a URL without bucket, or with a query or a fragment.
        """
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        if not bucket or any(sign in rest for sign in "?#@%\\ ") or not (not prefix or is_object_name(prefix)):
            raise InvalidInputError(
                f"{url!r} names no place: give {scheme}://bucket/prefix, of letters, digits and . _ - / only",
                kind="bad_url",
                url=url,
            )
        options: Any = dict(_TIMEOUTS)
        # Whoever writes http:// into the endpoint means it.
        if environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            options["allow_http"] = True
        # The store compares what arrives with this digest, of each part.
        config: Any = {"checksum_algorithm": "SHA256"} if scheme == "s3" else None
        place = f"{scheme}://{bucket}/{prefix}".rstrip("/")
        with _store_errors(f"open {place}"):
            store = from_url(place, client_options=options, retry_config=_RETRIES, config=config)
        return cls(store, place)

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
        except StorageError:
            # A range that begins behind the end is refused, in words that differ from store to store.
            check_range(name, start, stop, nbytes=self.size(name))
            raise
        check_range(name, start, stop, nbytes=start + len(data))
        return data

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Ask for ranges in several requests at a time, for neighbours in one."""
        if len(ranges) < 2 or any(not 0 <= start < stop for start, stop in ranges):
            return [self.get_range(name, start, stop) for start, stop in ranges]
        check_object_name(name)
        starts, stops = zip(*ranges, strict=True)
        try:
            with self._errors("read", name):
                found = obstore.get_ranges(self._store, name, starts=starts, ends=stops, coalesce=_NEIGHBOUR_NBYTES)
        except StorageError:
            check_range(name, max(starts), max(stops), nbytes=self.size(name))
            raise
        for data, (start, stop) in zip(found, ranges, strict=True):
            check_range(name, start, stop, nbytes=start + len(data))
        return [data.to_bytes() for data in found]

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write under a condition, in one request; what is longer than ``CREATE_ONCE_NBYTES`` in parts, without."""
        check_object_name(name)
        views = byte_views(parts)
        nbytes = sum(view.nbytes for view in views)
        if nbytes > CREATE_ONCE_NBYTES:
            self._upload(name, views, nbytes)
            return
        data = b"".join(views)
        for _ in range(_CREATE_TRIES):
            try:
                with self._errors("write", name):
                    obstore.put(self._store, name, data, mode="create")
                    return
            except failures.AlreadyExistsError:
                # Some stores answer so when they only could not tell, because of another writer at that moment.
                if self._exists(name):
                    raise object_exists(name) from None
        raise StorageError(
            f"{self.place} says that {name} exists, and that it does not: try again",
            kind="inconsistent_store",
            transient=True,
            name=name,
        )

    def _upload(self, name: str, views: Sequence[memoryview], nbytes: int) -> None:
        # Stores differ in whether they heed a condition at the end of an upload in parts, so none is relied on: the
        # name is the caller's alone.
        if self._exists(name):
            raise object_exists(name)
        with self._errors("write", name):
            obstore.put(
                self._store,
                name,
                _pieces(views),
                use_multipart=True,
                chunk_size=_PART_NBYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
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
        return self._listed(directory, prefix, _just_below(prefix) if start and after < prefix else after, limit)

    def _listed(self, directory: str, prefix: str, after: str, limit: int | None) -> Iterator[ObjectInfo]:
        before = ""
        for info in self._names_in(directory, after) if limit != 0 else ():
            if not info.name.startswith(prefix):
                if info.name > prefix:
                    return
                continue
            if info.name < before:
                raise StorageError(
                    f"{self.place} lists names in no order, and a repository needs them in order: use another bucket",
                    kind="unordered_listing",
                    transient=False,
                )
            before = info.name
            # What others left there is no object, and what lies deeper is in no listing.
            if info.name <= after or info.name.rpartition("/")[0] != directory or not is_object_name(info.name):
                continue
            yield info
            if limit is not None:
                limit -= 1
                if not limit:
                    return

    def _names_in(self, directory: str, after: str) -> Iterator[ObjectInfo]:
        with self._errors("list", directory or "the top"):
            if not directory:  # beside everything below it, which nobody wants to go through
                found = obstore.list_with_delimiter(self._store)["objects"]
                yield from (ObjectInfo(item["path"], int(item["size"])) for item in found)
                return
            for page in obstore.list(self._store, directory, offset=after or None):
                yield from (ObjectInfo(item["path"], int(item["size"])) for item in page)

    def delete(self, name: str) -> None:
        """Ask for it to be removed. Where a bucket keeps versions, it keeps this one too."""
        check_object_name(name)
        with self._errors("delete", name):
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError:
                return

    def close(self) -> None:
        """Hold nothing: connections end when they have been idle for a while."""

    @contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        with _store_errors(f"{verb} {name} in {self.place}", name):
            yield


def _pieces(views: Sequence[memoryview]) -> Iterator[memoryview]:
    """Cut buffers so that what is gathered for one part is never much longer than a part."""
    for view in views:
        for start in range(0, view.nbytes, _PART_NBYTES):
            yield view[start : start + _PART_NBYTES]


def _just_below(prefix: str) -> str:
    """Return text that sorts behind every name before those that begin with ``prefix``, and before those."""
    return f"{prefix[:-1]}{chr(ord(prefix[-1]) - 1)}~"  # no name has a "~", which follows all that a name may have


@contextmanager
def _store_errors(action: str, name: str | None = None) -> Iterator[None]:
    """Turn what obstore raises into the error that says what its catcher can do. That a name is taken passes."""
    try:
        yield
    except failures.AlreadyExistsError:
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise _no_bucket(action) from error
        raise object_not_found(name or action) from error
    except (failures.PermissionDeniedError, failures.UnauthenticatedError) as error:
        raise PermissionDeniedError(
            f"cannot {action}: the store refuses ({_code(error)}); check the credentials in the environment and what "
            "they allow",
            kind="store_refuses",
        ) from error
    except (failures.BaseError, ValueError, OSError) as error:
        if "NoSuchBucket" in str(error):
            raise _no_bucket(action) from error
        transient = _TRANSIENT.search(str(error)) is not None
        advice = "try again, and if it lasts check the endpoint and the network" if transient else "check the address"
        raise StorageError(
            f"cannot {action}: {_code(error)}; {advice}", kind="store_failed", transient=transient
        ) from error


def _no_bucket(action: str) -> LamellaError:
    return RepositoryNotFoundError(f"cannot {action}: there is no such bucket; make it, or check its name")


def _code(error: BaseException) -> str:
    """Return what is worth saying of an error of obstore: the store's own code, else the first line."""
    text = str(error)
    if found := re.search(r"<Code>(\w+)</Code>", text):
        return found[1]
    return text.split("Debug source")[0].strip().splitlines()[0][:200] if text.strip() else type(error).__name__
