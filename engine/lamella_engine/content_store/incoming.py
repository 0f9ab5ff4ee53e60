"""Packs that a client of a service puts into the bucket by itself: their bytes pass through nobody else.

A client may write one object for a while, below ``incoming/``, where nothing counts. What it has put there the store
copies to the pack's name, which no client can write, and only the copy is looked at: whatever is put afterwards, even
by an upload that was begun in time and ends hours later, changes no pack. That a pack's blobs decode to their chunks is
its writer's word; until somebody else has decoded them, no other push stands on it.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, cast

from lamella_engine.content_store.packing import ClosedPack, Described, PackRows
from lamella_engine.content_store.packs import Packs, StoredBlob
from lamella_engine.errors import CorruptionError, InvalidInputError, LamellaError, NotFoundError
from lamella_engine.format.names import incoming_name, incoming_time
from lamella_engine.format.pack import FOOTER_NBYTES, decode_footer
from lamella_engine.format.version import PackRef
from lamella_engine.model import ChunkId, PushId
from lamella_engine.objects import Objects

GRANTED_BLOBS = 1 << 14
"""Most blobs of such a pack: its description, and its index, which goes back, are one message each."""

PUT_S = 900.0
"""For how long a URL is good: 64 MiB at 75 kB/s, though a put that was begun in time may end later."""

AHEAD = 8
"""Most packs of a push that are granted and have not arrived: each may lie in the bucket and never be asked for."""

LEFT_S = 7 * 86_400.0
"""After so long nothing comes of what lies below ``incoming/`` any more: it was put late, or its push is over."""

# What the store does for one push at a time: each takes a request or three, and no time of this machine's.
_THREADS = 4


class Bucket(Objects, Protocol):
    """Objects of which others may put single ones: see :class:`~lamella_engine.objects.cloud.CloudObjects`."""

    def put_url(self, name: str, seconds: float) -> str:
        """Return a URL at which to put an object, for so long."""

    def copy(self, source: str, name: str) -> None:
        """Copy an object within the store."""


class IncomingPacks:
    """The packs of one push that come so. For one thread.

    Parameters
    ----------
    objects
        Where they go. Only packs that are granted make it a :class:`Bucket`.
    packs
        Checks their indexes.
    push, numbers
        As for :class:`~lamella_engine.content_store.packing.PackRows`.
    """

    def __init__(self, objects: Objects, packs: Packs, push: PushId, numbers: Iterator[int]) -> None:
        self._objects = objects
        self._packs = packs
        self._rows = PackRows(push, numbers)
        self._waiting: deque[PackRef] = deque()
        """Those that were granted and not taken over yet, the first first."""
        self._taking: list[Future[None]] = []
        self._threads: ThreadPoolExecutor | None = None
        """Of its own: what waits for the store must not keep others from working."""
        self.written: dict[str, PackRef] = {}
        """Those that were granted, by name; only after :meth:`finish` they are all there."""

    def grant(self, blobs: Sequence[tuple[Described, StoredBlob | ChunkId | None]]) -> ClosedPack:
        """Make a pack of blobs in this order, each with what it is a delta of."""
        for blob, base in blobs:
            self._rows.add(blob, base=base)
        pack = self._rows.close()
        self.written[pack.ref.name] = pack.ref
        self._waiting.append(pack.ref)
        return pack

    def put_url(self, granted: ClosedPack) -> str:
        """Return where to put a pack, a secret."""
        return self._bucket.put_url(incoming_name(granted.ref.name), PUT_S)

    @property
    def _bucket(self) -> Bucket:
        return cast("Bucket", self._objects)

    def take(self, packs: int) -> None:
        """Begin to take over those that have been put, the first ``packs`` of all that were granted.

        Raises what has come of those before: InvalidInputError (``not_uploaded``) for one that is not what was
        described, or StorageError.
        """
        while self._waiting and len(self._taking) < packs:
            self._taking.append(self._pool.submit(self._take, self._waiting.popleft()))
        for taking in self._taking:
            if taking.done():
                taking.result()

    @property
    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, "lamella-incoming")
        return self._threads

    def finish(self) -> None:
        """Take over what is left; raises as :meth:`take` does."""
        self.take(len(self.written))
        for taking in self._taking:
            taking.result()
        self._end()

    def _end(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _take(self, ref: PackRef) -> None:
        incoming = incoming_name(ref.name)
        try:
            self._check_size(incoming, ref)  # a URL bounds no length: what is far too long is not even copied
            self._bucket.copy(incoming, ref.name)
            self._check_size(ref.name, ref)
            footer = self._packs.range(ref.name, ref.nbytes - FOOTER_NBYTES, ref.nbytes)
            if decode_footer(footer, pack=ref.name, pack_nbytes=ref.nbytes) != ref.index_nbytes:
                raise _not_uploaded()
            self._packs.learn([ref])
            self._packs.index(ref.name)
        except (NotFoundError, CorruptionError) as error:
            raise _not_uploaded() from error
        self._delete(incoming)

    def _delete(self, name: str) -> None:
        with suppress(LamellaError):  # it is in nobody's way
            self._objects.delete(name)

    def _check_size(self, name: str, ref: PackRef) -> None:
        if self._objects.size(name) != ref.nbytes:
            raise _not_uploaded()

    def discard(self) -> None:
        """Delete all of it, when nothing is being copied any more; raises nothing."""
        for taking in self._taking:
            taking.exception()
        if self.written:
            names = [name for pack in self.written for name in (incoming_name(pack), pack)]
            deque(self._pool.map(self._delete, names), maxlen=0)
        self._end()


def sweep(objects: Objects) -> None:
    """Delete what has lain below ``incoming/`` for :data:`LEFT_S`, by the time in its name."""
    before = time.time() - LEFT_S
    for info in objects.list("incoming/"):
        if incoming_time(info.name) > before:
            return  # so are those that follow
        objects.delete(info.name)


def _not_uploaded() -> InvalidInputError:
    return InvalidInputError(
        "a pack that was to be put into the bucket is not there, or not what was described: push again",
        kind="not_uploaded",
    )
