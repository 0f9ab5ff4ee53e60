"""Packs in the making: rows for the blobs that go into one, and bytes where they pass through here."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from lamella_engine.content_store.packs import StoredBlob
from lamella_engine.content_store.seam import COMPANION_REACH, Blob
from lamella_engine.executor import Executor
from lamella_engine.format.digests import Context, blob_digest, digest
from lamella_engine.format.names import PackName
from lamella_engine.format.pack import FOOTER_NBYTES, MAX_BASE_PACKS, BlobRow, encode_footer, encode_pack_index
from lamella_engine.format.version import PackRef
from lamella_engine.model import Buffer, ChunkId, PushId
from lamella_engine.objects import Objects

# A pack is closed once its blobs pass this. Large enough that a checkpoint is few objects and the 6 ms of a durable put
# are nothing beside it; small enough to be held in memory twice, one filling while one is written.
PACK_NBYTES = 64 << 20

PACK_BLOBS = 1 << 15
"""Most blobs of a pack: their rows, some 20 MB while it is filled, are read together by whoever wants one of them."""


class Described(NamedTuple):
    """A blob without its payload."""

    chunk: ChunkId
    base: ChunkId | None
    """What a delta is against; None for a full blob."""
    digest: bytes
    """Of the payload."""
    decoded_nbytes: int
    encoded_nbytes: int
    encoding: int
    width: int


@dataclass(frozen=True, slots=True)
class ClosedPack:
    """A pack to which nothing will be added."""

    ref: PackRef
    chunks: tuple[ChunkId, ...]
    tail: tuple[bytes, bytes]
    """Its last bytes, after the payloads: index and footer."""


class PackRows:
    """The rows of packs that are filled one after another. For one thread.

    Parameters
    ----------
    push
        The push whose packs these are.
    numbers
        Counts them, together with others of that push.
    """

    def __init__(self, push: PushId, numbers: Iterator[int]) -> None:
        self._push = push
        self._numbers = numbers
        self._closed: list[str] = []
        self._latest: OrderedDict[ChunkId, tuple[int, BlobRow]] = OrderedDict()
        self._begin()

    def _begin(self) -> None:
        self._rows: list[BlobRow] = []
        self._base_packs: set[str] = set()
        self.nbytes = 0
        """Bytes of the blobs of the pack that is being filled."""

    def __len__(self) -> int:
        """Return the number of blobs of the pack that is being filled."""
        return len(self._rows)

    @property
    def full(self) -> bool:
        """Whether the next blob belongs into another pack."""
        return self.nbytes >= PACK_NBYTES or len(self) == PACK_BLOBS or len(self._base_packs) == MAX_BASE_PACKS

    def add(self, blob: Described, *, base: StoredBlob | ChunkId | None) -> None:
        """Append a blob whose base, for a delta, is a copy in another pack, or a chunk that this holds."""
        if isinstance(base, bytes):
            number, row = self._latest[base]
            base = StoredBlob("" if number == len(self._closed) else self._closed[number], row)
        row = BlobRow(
            chunk=blob.chunk,
            start=self.nbytes,
            encoded_nbytes=blob.encoded_nbytes,
            decoded_nbytes=blob.decoded_nbytes,
            encoding=blob.encoding,
            width=blob.width,
            depth=0 if base is None else base.row.depth + 1,
            base=None if base is None else base.row.chunk,
            base_pack=None if base is None else base.pack,
            digest=blob.digest,
        )
        self._rows.append(row)
        self.nbytes += blob.encoded_nbytes
        if base is not None and base.pack:
            self._base_packs.add(base.pack)
        self._latest[blob.chunk] = len(self._closed), row
        if len(self._latest) > COMPANION_REACH:
            self._latest.popitem(last=False)

    def close(self) -> ClosedPack:
        """Return the pack that is being filled, which has a blob; begin another."""
        index = encode_pack_index(self._rows)
        name = str(PackName(self._push, next(self._numbers), digest(Context.PACK_INDEX, index)))
        ref = PackRef(name, self.nbytes + len(index) + FOOTER_NBYTES, len(index))
        closed = ClosedPack(ref, tuple(row.chunk for row in self._rows), (index, encode_footer(index)))
        self._closed.append(name)
        self._begin()
        return closed


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
    numbers
        As for :class:`PackRows`.
    """

    def __init__(
        self,
        objects: Objects,
        executor: Executor,
        push: PushId,
        closed: Callable[[str, Iterable[ChunkId]], None],
        numbers: Iterator[int] | None = None,
    ) -> None:
        self._objects = objects
        self._executor = executor
        self._closed = closed
        self._rows = PackRows(push, count() if numbers is None else numbers)
        self._payloads: list[Buffer] = []
        self._writing: Future[None] | None = None
        self.written: dict[str, PackRef] = {}
        """The packs so far, by name; the last may still be on its way to the disk."""

    def add(self, blob: Blob, *, base: StoredBlob | ChunkId | None) -> None:
        """Append a blob whose base, for a delta, is a copy in an earlier pack, or one of the blobs added last."""
        if self._rows.full:
            self.close_pack()
        payload = bytes(blob.payload)
        self._rows.add(described(blob, payload), base=base)
        self._payloads.append(payload)

    @property
    def filled_nbytes(self) -> int:
        """Bytes held of the pack that is being filled."""
        return self._rows.nbytes

    def finish(self) -> None:
        """Write what is left; every pack is durable when this returns. Raises what writing one raised."""
        self.close_pack()
        self.wait()

    def close_pack(self) -> None:
        """Start writing the pack that is being filled, if it holds anything. Waits for the one before.

        Raises what writing that one raised.
        """
        if not len(self._rows):
            return
        pack = self._rows.close()
        parts, self._payloads = [*self._payloads, *pack.tail], []
        self.wait()
        self.written[pack.ref.name] = pack.ref
        self._closed(pack.ref.name, pack.chunks)
        self._writing = self._executor.submit(lambda: self._objects.put_if_absent(pack.ref.name, parts))

    def wait(self) -> None:
        """Wait until the packs that are full are durable; raises what writing one raised."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def described(blob: Blob, payload: Buffer) -> Described:
    """Return what a pack says of a blob, whose payload is ``payload``, a run of bytes."""
    return Described(
        chunk=blob.chunk,
        base=blob.base,
        digest=blob.digest or blob_digest(payload),
        decoded_nbytes=blob.decoded_nbytes,
        encoded_nbytes=len(payload),
        encoding=blob.encoding,
        width=blob.width,
    )
