"""Packs at work: finding blobs in them, and following deltas to their bases. ``packing`` fills them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lamella_engine.content_store.seam import Blob
from lamella_engine.errors import CorruptionError, NotFoundError
from lamella_engine.executor import Executor
from lamella_engine.format.digests import blob_digest
from lamella_engine.format.entry import VERIFIED_BY_STORE, PackAdded
from lamella_engine.format.pack import FOOTER_NBYTES, BlobRow, PackIndex, decode_footer, decode_pack_index
from lamella_engine.format.version import PackRef
from lamella_engine.model import Buffer, ChunkId
from lamella_engine.objects import Objects

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
    row_of
        Tells what the log says of a pack; None if it is not live.
    """

    def __init__(self, objects: Objects, row_of: Callable[[str], PackAdded | None]) -> None:
        self._objects = objects
        self._row_of = row_of
        self._decoded: set[str] = set()
        self._refs: dict[str, PackRef] = {}
        self._indexes: OrderedDict[str, PackIndex] = OrderedDict()
        self._rows_kept = 0
        self._lock = threading.Lock()

    def learn(self, refs: Iterable[PackRef]) -> None:
        """Remember the sizes of packs and of their indexes: each saves a read."""
        for ref in refs:
            self._refs.setdefault(ref.name, ref)

    def trust(self, packs: Iterable[str]) -> None:
        """Remember that others than their writers have decoded these packs: each saves a look into the log."""
        self._decoded.update(packs)

    def ref(self, pack: str) -> PackRef:
        """Return a pack with the size of its index."""
        ref = self._refs.get(pack)
        if ref is None:
            row = self._row_of(pack)
            if row is None:
                raise CorruptionError(f"{pack} is named, but is not live", kind="missing_pack", object=pack)
            nbytes = row.nbytes
            footer = self.range(pack, max(nbytes - FOOTER_NBYTES, 0), nbytes)
            ref = PackRef(pack, nbytes, decode_footer(footer, pack=pack, pack_nbytes=nbytes))
            self._refs[pack] = ref
        return ref

    def _is_decoded(self, pack: str) -> bool:
        """Whether every blob of a pack has been decoded and compared with its chunk id by more than its writer."""
        if pack in self._decoded:
            return True
        row = self._row_of(pack)
        if row is not None and row.verifier == VERIFIED_BY_STORE:
            self._decoded.add(pack)  # and it stays so
        return pack in self._decoded

    def blob(self, stored: StoredBlob, payload: Buffer) -> Blob:
        """Return a stored blob as it travels; ``payload`` has been compared with its row."""
        row = stored.row
        return Blob(
            row.chunk,
            row.encoding,
            row.width,
            row.decoded_nbytes,
            payload,
            row.base,
            digest=row.digest,
            doubtful=not self._is_decoded(stored.pack),
        )

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
