"""Packs that a client puts into the bucket of its service by itself: their bytes do not pass through the service.

The service is told what blobs a pack has, and answers with a URL at which this machine may put it, and that alone, for
some minutes. Blobs whose base is not here go through the service as ever: it has the base, and makes deltas of them.
"""

import base64
import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from lamella_engine.content_store.incoming import GRANTED_BLOBS
from lamella_engine.content_store.packing import PACK_NBYTES, described
from lamella_engine.content_store.seam import COMPANION_REACH, Blob
from lamella_engine.errors import StorageError
from lamella_engine.hosts import is_loopback
from lamella_engine.model import Buffer, ChunkId, PushId
from lamella_engine.remote.channel import OPENING_PATIENCE_S, PATIENCE_S, Channel, Patience
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.wire import encode_header

WORTH_NBYTES = 4 << 20
"""A push of fewer bytes goes through the service, all of it: it is one pack then, and verified at once."""

PUTS_AT_ONCE = 2
"""Packs on their way while another is filled, each in memory: one connection to S3 carries 50 to 90 MB/s."""

NOT_PUT = "not_put"
"""Kind of the error that a bucket could not be reached from here."""

LAST_WAIT_S = 2.0
"""How long whoever gives up waits for what is on its way: what comes later is deleted a week later."""

# How long the store may be silent.
_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Way:
    """Which way the blobs of a repository's pushes take."""

    direct: bool
    """Whether straight into the bucket, as far as they can."""
    in_the_clear: bool
    """Whether this machine itself serves: then its own bucket may be spoken to without TLS."""
    proven: bool = False
    """Whether that has worked once."""


class DirectPacks:
    """The packs of one push that go straight into the bucket. For one thread.

    Parameters
    ----------
    channel, repository, push_id
        Whose push it is.
    way
        Told that it works, once it has.
    """

    def __init__(self, channel: Channel, repository: str, push_id: PushId, way: Way) -> None:
        self._way = way
        self._channel = channel
        self._repository = repository
        self._push_id = push_id
        self._recent: OrderedDict[ChunkId, bool] = OrderedDict()
        """The blobs that came last, and whether they were taken: what is made against one goes the way it went."""
        self._held: list[Blob] = []
        """What the next pack will have so far."""
        self._nbytes = 0
        self._granted = 0
        self._puts: deque[_Put] = deque()

    def takes(self, blob: Blob, *, tried: bool) -> bool:
        """Whether a blob goes straight into the bucket; if so, :meth:`add` it.

        ``tried`` says whether the base that it was offered, if any, was here.
        """
        way = tried if blob.base is None else self._recent.get(blob.base, tried)
        self._recent[blob.chunk] = way
        if len(self._recent) > COMPANION_REACH:
            self._recent.popitem(last=False)
        return way

    def add(self, blob: Blob) -> None:
        """Put a blob into the next pack; wait while too many are on their way.

        Raises what :meth:`finish` does.
        """
        payload = bytes(blob.payload)  # it was lent
        self._held.append(replace(blob, payload=payload))
        self._nbytes += len(payload)
        if self._nbytes >= PACK_NBYTES or len(self._held) == GRANTED_BLOBS:
            self._put()

    def finish(self) -> Sequence[Blob]:
        """Return when everything is in the bucket, or blobs that go through the service after all.

        Raises StorageError (``not_put``) if the bucket cannot be reached from here, and what the service answers.
        """
        if not self._granted and self._nbytes < WORTH_NBYTES:
            held, self._held, self._nbytes = self._held, [], 0
            return held
        if self._held:
            self._put()
        while self._puts:
            self._puts.popleft().result()
        return ()

    def _put(self) -> None:
        while len(self._puts) >= PUTS_AT_ONCE:
            self._puts.popleft().result()
        request = pb.GrantRequest(
            repository=self._repository,
            push=self._push_id,
            number=self._granted,
            blobs=b"".join(encode_header(described(blob, blob.payload)) for blob in self._held),
            arrived=self._granted - len(self._puts),
        )
        held, self._held, self._nbytes = self._held, [], 0
        reply = self._channel.call("Pushes.Grant", request)
        self._granted += 1
        self._puts.append(_Put(reply.url, [*(blob.payload for blob in held), reply.tail], self._way))

    def close(self) -> None:
        """Give up what is on its way, as far as that can be. Raises nothing."""
        for put in self._puts:
            put.stop()
        until = time.monotonic() + LAST_WAIT_S
        for put in self._puts:
            put.wait(max(until - time.monotonic(), 0))
        self._puts.clear()


class _Put:
    """One pack on its way, in a thread of its own.

    Parameters
    ----------
    url
        Where to. A secret: it is in no error.
    parts
        What is put there, one after another.
    way
        Told that it works, once it has, or that it does not.
    """

    def __init__(self, url: str, parts: Sequence[Buffer], way: Way) -> None:
        self._url = url
        self._parts = parts
        self._way = way
        self._error: Exception | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="lamella-put", daemon=True)
        self._thread.start()

    def result(self) -> None:
        """Return when it is there; raises StorageError (``not_put``) if it cannot be: then the way is given up."""
        self._thread.join()
        if self._error is not None:
            self._way.direct = False
            raise self._error

    def stop(self) -> None:
        """Do not begin once more."""
        self._stopped = True

    def wait(self, seconds: float) -> None:
        """Return when it has ended, whatever came of it, or so much later."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            checksum = hashlib.md5(usedforsecurity=False)
            for part in self._parts:
                checksum.update(part)
            patience = Patience(PATIENCE_S if self._way.proven else OPENING_PATIENCE_S)
            while not self._stopped:
                try:
                    _send(self._url, self._parts, checksum.digest(), in_the_clear=self._way.in_the_clear)
                except StorageError as error:
                    patience.wait(error)
                else:
                    self._way.proven = True
                    return
        except Exception as error:  # told to whoever waits
            self._error = error
        finally:
            self._parts = ()


def _send(url: str, parts: Sequence[Buffer], md5: bytes, *, in_the_clear: bool) -> None:
    """Put one object; raises StorageError (``not_put``)."""
    try:
        place = urlsplit(url)
    except ValueError:
        raise _not_put("its endpoint has no address", transient=False) from None
    here = in_the_clear and place.scheme == "http" and is_loopback(place.hostname or "")
    if place.scheme != "https" and not here:
        raise _not_put("its endpoint speaks no https", transient=False)
    headers = {
        "Content-Length": str(sum(map(len, parts))),
        "Content-Type": "application/octet-stream",
        # The store compares what arrives with it.
        "Content-MD5": base64.b64encode(md5).decode(),
    }
    try:
        _exchange(Request(url, map(bytes, parts), headers, method="PUT"), here=here)
    except HTTPError as error:
        error.close()
        raise _not_put(f"it answers {error.code}", transient=error.code in _PASSING or error.code >= 500) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise _not_put(f"{type(reason).__name__}", transient=True) from None


def _exchange(request: Request, *, here: bool) -> None:
    """Send a request, by a proxy of the environment unless it is for this machine itself; its answer is not read."""
    handlers = (ProxyHandler({}),) if here else ()
    build_opener(*handlers).open(request, timeout=_TIMEOUT_S).close()


# Statuses with which stores say that a transfer failed, or that they have too much to do.
_PASSING = (400, 408, 409, 429)


def _not_put(reason: str, *, transient: bool) -> StorageError:
    return StorageError(
        f"the bucket of the service takes nothing from this machine ({reason}): pushes of this process go through the "
        "service from now on; push again",
        kind=NOT_PUT,
        transient=transient,
    )
