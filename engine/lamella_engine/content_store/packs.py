"""Packs at work: filling them, finding blobs in them, and following deltas to their bases."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from lamella_engine.content_store.seam import COMPANION_REACH, Blob
from lamella_engine.errors import CorruptionError, NotFoundError
from lamella_engine.executor import Executor
from lamella_engine.format.digests import Context, blob_digest, digest
from lamella_engine.format.names import PackName
from lamella_engine.format.pack import (
    FOOTER_NBYTES,
    MAX_BASE_PACKS,
    BlobRow,
    PackIndex,
    decode_footer,
    decode_pack_index,
    encode_footer,
    encode_pack_index,
)
from lamella_engine.format.version import PackRef
from lamella_engine.model import Buffer, ChunkId, PushId
from lamella_engine.objects import Objects

# A pack is closed once its blobs pass this. Large enough that a checkpoint is few objects and the 6 ms of a durable put
# are nothing beside it; small enough to be held in memory twice, one filling while one is written.
PACK_NBYTES = 64 << 20

PACK_BLOBS = 1 << 15
"""Most blobs of a pack: their rows, some 20 MB while it is filled, are read together by whoever wants one of them."""

# Ranges of a pack that lie at most this far apart are read as one: a read costs about as much as so many bytes do, and
# the bytes between are paid for by the caller, whose reads are promised to stay within 1.1x of the blobs.
NEIGHBOUR_NBYTES = 4 << 10

READ_NBYTES = 4 << 20
"""Longest single read of neighbouring blobs: larger ones cost fresh memory and gain nothing."""

RANGES_AT_ONCE = 16
"""Ranges of a pack that are asked for together, which object stores answer at the same time."""

ROWS_KEPT = 100_000
"""Rows of parsed pack indexes kept, some 50 MB; the index used last is kept whatever its length."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """One copy of a chunk: a row of a pack."""

    pack: str
    row: BlobRow


Resolve = Callable[[str], Sequence[str]]
"""Given the name of a pack, the packs that hold its blobs by now."""


class Packs:
    """Reads packs. Safe for several threads.

    Parameters
    ----------
    objects
        Where they lie.
    nbytes_of
        Tells the size of a live pack from the log; raises CorruptionError if it is not live.
    """

    def __init__(self, objects: Objects, nbytes_of: Callable[[str], int]) -> None:
        self._objects = objects
        self._nbytes_of = nbytes_of
        self._refs: dict[str, PackRef] = {}
        self._indexes: OrderedDict[str, PackIndex] = OrderedDict()
        self._rows_kept = 0
        self._lock = threading.Lock()

    def learn(self, refs: Iterable[PackRef]) -> None:
        """Remember the sizes of packs and of their indexes: each saves a read."""
        for ref in refs:
            self._refs.setdefault(ref.name, ref)

    def ref(self, pack: str) -> PackRef:
        """Return a pack with the size of its index."""
        ref = self._refs.get(pack)
        if ref is None:
            nbytes = self._nbytes_of(pack)
            footer = self.range(pack, max(nbytes - FOOTER_NBYTES, 0), nbytes)
            ref = PackRef(pack, nbytes, decode_footer(footer, pack=pack, pack_nbytes=nbytes))
            self._refs[pack] = ref
        return ref

    def index(self, pack: str) -> PackIndex:
        """Return the checked index of a pack; raises CorruptionError if it is missing or damaged."""
        with self._lock:
            index = self._indexes.get(pack)
            if index is not None:
                self._indexes.move_to_end(pack)
                return index
        index = self._read_index(pack)
        with self._lock:
            if pack not in self._indexes:
                self._indexes[pack] = index
                self._rows_kept += len(index.chunks)
            while self._rows_kept > ROWS_KEPT and len(self._indexes) > 1:
                _, dropped = self._indexes.popitem(last=False)
                self._rows_kept -= len(dropped.chunks)
        return index

    def _read_index(self, pack: str) -> PackIndex:
        ref = self.ref(pack)
        stop = ref.nbytes - FOOTER_NBYTES
        index = decode_pack_index(self.range(pack, stop - ref.index_nbytes, stop), pack=pack)
        if index.blobs_nbytes != stop - ref.index_nbytes:
            raise CorruptionError(f"{pack} is not as long as its index says", kind="bad_pack", object=pack)
        return index

    def range(self, pack: str, start: int, stop: int) -> bytes:
        """Return bytes of a pack; raises CorruptionError if it is missing or ends before ``stop``."""
        return self._ranges(pack, [(start, stop)])[0]

    def _ranges(self, pack: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        try:
            return self._objects.get_ranges(pack, ranges)
        except NotFoundError:
            raise CorruptionError(
                f"{pack} is missing, though a version names it", kind="missing_object", object=pack
            ) from None

    def find(self, chunk: ChunkId, packs: Iterable[str], *, below: int | None = None) -> StoredBlob:
        """Return the copy of a chunk in ``packs`` that takes the fewest decodes.

        The one place where a chunk becomes a copy. A delta of depth k asks with ``below=k``: only copies of a smaller
        depth may be its base, so bases never form a circle, whatever copies come and go.

        Raises CorruptionError if there is no such copy.
        """
        copies = [StoredBlob(pack, row) for pack in packs if (row := self.index(pack).find(chunk)) is not None]
        allowed = [copy for copy in copies if below is None or copy.row.depth < below]
        if not allowed:
            why = "is missing" if not copies else "has only copies that are no shallower than the delta"
            kind = "missing_chunk" if not copies else "base_too_deep"
            raise CorruptionError(f"chunk {chunk.hex()[:12]} {why}: restore the pack from a copy", kind=kind)
        return min(allowed, key=lambda copy: (copy.row.depth, copy.pack))

    def chain(self, blob: StoredBlob, where_is: Resolve) -> tuple[StoredBlob, ...]:
        """Return what has to be decoded for a blob.

        A full copy comes first, each is the base of the next, the blob itself is the last. Raises CorruptionError.
        """
        chain = [blob]
        while (row := chain[-1].row).base is not None:
            named = row.base_pack or chain[-1].pack
            chain.append(self.find(row.base, where_is(named), below=row.depth))
        return tuple(reversed(chain))

    def payloads(self, blobs: Iterable[StoredBlob], executor: Executor) -> dict[StoredBlob, memoryview]:
        """Read the payloads of blobs, neighbours in one read, and check their digests; raises CorruptionError."""
        found: dict[StoredBlob, memoryview] = {}
        for part in executor.map(self._payloads_in, _requests(set(blobs))):
            found.update(part)
        return found

    def payload(self, blob: StoredBlob) -> memoryview:
        """Read the payload of one blob, in the caller's thread; raises CorruptionError."""
        return self._payloads_in([[blob]])[blob]

    def _payloads_in(self, runs: Sequence[Sequence[StoredBlob]]) -> dict[StoredBlob, memoryview]:
        """Read runs of neighbours of one pack."""
        found: dict[StoredBlob, memoryview] = {}
        ranges = [(run[0].row.start, run[-1].row.stop) for run in runs]
        for run, (start, _), data in zip(runs, ranges, self._ranges(runs[0][0].pack, ranges), strict=True):
            view = memoryview(data)
            found |= {blob: view[blob.row.start - start : blob.row.stop - start] for blob in run}
        for blob, payload in found.items():
            if blob_digest(payload) != blob.row.digest:
                raise CorruptionError(
                    f"{blob.pack} is damaged at bytes {blob.row.start} to {blob.row.stop}: restore it from a copy",
                    kind="bad_digest",
                    object=blob.pack,
                    start=blob.row.start,
                    stop=blob.row.stop,
                )
        return found


def _requests(blobs: Iterable[StoredBlob]) -> Iterator[list[list[StoredBlob]]]:
    """Group runs of one pack that are asked for together: a single one if it is long."""
    request: list[list[StoredBlob]] = []
    nbytes = 0
    for run in _neighbours(blobs):
        length = run[-1].row.stop - run[0].row.start
        if request and (
            run[0].pack != request[0][0].pack or nbytes + length > READ_NBYTES or len(request) == RANGES_AT_ONCE
        ):
            yield request
            request, nbytes = [], 0
        request.append(run)
        nbytes += length
    if request:
        yield request


def _neighbours(blobs: Iterable[StoredBlob]) -> Iterator[list[StoredBlob]]:
    """Group blobs into runs of one pack that are worth a single read."""
    run: list[StoredBlob] = []
    for blob in sorted(blobs, key=lambda blob: (blob.pack, blob.row.start)):
        if run and (
            blob.pack != run[-1].pack
            or blob.row.start - run[-1].row.stop > NEIGHBOUR_NBYTES
            or blob.row.stop - run[0].row.start > READ_NBYTES
        ):
            yield run
            run = []
        run.append(blob)
    if run:
        yield run


def as_blob(stored: StoredBlob, payload: Buffer) -> Blob:
    """Return a stored blob as it travels; ``payload`` has been compared with its row."""
    row = stored.row
    return Blob(row.chunk, row.encoding, row.width, row.decoded_nbytes, payload, row.base, digest=row.digest)


class PackWriter:
    """Fills packs with the blobs of one push, and writes each while the next is filled. For one thread.

    Parameters
    ----------
    objects, executor
        Where packs go, and what writes them.
    push
        The push whose packs these are.
    closed
        Told of each pack that is full: its name and its chunks.
    """

    def __init__(
        self,
        objects: Objects,
        executor: Executor,
        push: PushId,
        closed: Callable[[str, Iterable[ChunkId]], None],
    ) -> None:
        self._objects = objects
        self._executor = executor
        self._push = push
        self._closed = closed
        self._parts: list[bytes] = []
        self._rows: list[BlobRow] = []
        self._nbytes = 0
        self._base_packs: set[str] = set()
        self._writing: Future[None] | None = None
        self._latest: OrderedDict[ChunkId, tuple[int, BlobRow]] = OrderedDict()
        self.written: dict[str, PackRef] = {}
        """The packs so far, by name; the last may still be on its way to the disk."""

    def add(self, blob: Blob, *, base: StoredBlob | ChunkId | None) -> None:
        """Append a blob whose base, for a delta, is a copy in an earlier pack, or one of the blobs added last."""
        if self._nbytes >= PACK_NBYTES or len(self._rows) == PACK_BLOBS or len(self._base_packs) == MAX_BASE_PACKS:
            self.close_pack()
        if isinstance(base, bytes):
            number, row = self._latest[base]
            base = StoredBlob("" if number == len(self.written) else list(self.written)[number], row)
        payload = bytes(blob.payload)
        row = BlobRow(
            chunk=blob.chunk,
            start=self._nbytes,
            encoded_nbytes=len(payload),
            decoded_nbytes=blob.decoded_nbytes,
            encoding=blob.encoding,
            width=blob.width,
            depth=0 if base is None else base.row.depth + 1,
            base=None if base is None else base.row.chunk,
            base_pack=None if base is None else base.pack,
            digest=blob.digest or blob_digest(payload),
        )
        self._parts.append(payload)
        self._rows.append(row)
        self._nbytes += len(payload)
        if base is not None and base.pack:
            self._base_packs.add(base.pack)
        self._latest[blob.chunk] = len(self.written), row
        if len(self._latest) > COMPANION_REACH:
            self._latest.popitem(last=False)

    @property
    def filled_nbytes(self) -> int:
        """Bytes held of the pack that is being filled."""
        return self._nbytes

    def finish(self) -> None:
        """Write what is left; every pack is durable when this returns. Raises what writing one raised."""
        self.close_pack()
        self.wait()

    def close_pack(self) -> None:
        """Start writing the pack that is being filled, if it holds anything. Waits for the one before.

        Raises what writing that one raised.
        """
        if not self._rows:
            return
        index = encode_pack_index(self._rows)
        name = str(PackName(self._push, len(self.written), digest(Context.PACK_INDEX, index)))
        parts = [*self._parts, index, encode_footer(index)]
        ref = PackRef(name, self._nbytes + len(index) + FOOTER_NBYTES, len(index))
        self.wait()
        self.written[name] = ref
        self._closed(name, (row.chunk for row in self._rows))
        self._writing = self._executor.submit(lambda: self._objects.put_if_absent(name, parts))
        self._parts, self._rows, self._nbytes, self._base_packs = [], [], 0, set()

    def wait(self) -> None:
        """Wait until the packs that are full are durable; raises what writing one raised."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
