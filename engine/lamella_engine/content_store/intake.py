"""Intake: every blob that a push is given is decoded and compared before it counts.

Of blobs that lie elsewhere only a description is given, and nothing is known but that it can be right.
"""

import logging
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lamella_engine.codecs import Encoding, needs_base
from lamella_engine.content_store.bases import Bases, Offer
from lamella_engine.content_store.decoding import check_blob
from lamella_engine.content_store.packing import Described
from lamella_engine.content_store.packs import StoredBlob
from lamella_engine.content_store.seam import COMPANION_REACH, Blob
from lamella_engine.errors import CorruptionError, InvalidInputError
from lamella_engine.executor import Executor, map_batched
from lamella_engine.format.digests import chunk_id
from lamella_engine.model import Buffer, ChunkId

logger = logging.getLogger("lamella")


@dataclass(frozen=True, slots=True)
class _Given:
    """A blob that was handed in, with the copy that it is a delta of, if it is one."""

    blob: Blob
    base: StoredBlob | None


class Intake:
    """The chunks that one push asked for, and the blobs that it is given for them.

    Parameters
    ----------
    bases
        Has the bytes of what was offered.
    executor
        Where blobs are checked.
    """

    def __init__(self, bases: Bases, executor: Executor) -> None:
        self._bases = bases
        self._executor = executor
        self._wanted: dict[ChunkId, Offer] = {}
        self._given: OrderedDict[ChunkId, _Given] = OrderedDict()
        """The blobs given last: bases of the next ones."""
        self._described: OrderedDict[ChunkId, bool] = OrderedDict()
        """The blobs described last, and whether others may be made against each."""

    @property
    def outstanding(self) -> int:
        """How many chunks were asked for and have not come."""
        return len(self._wanted)

    def ask(self, chunk: ChunkId, offer: Offer) -> None:
        """Expect a blob of a chunk, which may be made against what is offered."""
        self._wanted[chunk] = offer

    def base(self, chunk: ChunkId) -> Buffer:
        """Return the bytes of the base that was offered for a chunk."""
        base = self._wanted[chunk].base
        if base is None:
            raise InvalidInputError("no base was offered for this chunk", kind="no_base")
        return self._bases.decoded(base)

    def checked(
        self, blobs: Iterable[Blob], planned: Container[ChunkId]
    ) -> Iterator[tuple[Blob, StoredBlob | ChunkId | None]]:
        """Yield what is to be stored, in order and once each, with what it is a delta of.

        Parameters
        ----------
        blobs
            As for :meth:`~lamella_engine.content_store.seam.Push.write`.
        planned
            All chunks of the push, some of which may be given once more.

        Raises
        ------
        InvalidInputError
            Nobody asked for a blob, or it is a delta against something else than was offered, or it does not decode to
            its chunk and that cannot be had otherwise.
        """

        def given() -> Iterator[tuple[Blob, Offer | None, _Given | None]]:
            for blob in blobs:
                offer = self._wanted.get(blob.chunk)
                if offer is None and blob.chunk not in planned:
                    raise _unplanned()
                base = None if offer is None else offer.base
                own = base if base is not None and base.row.chunk == blob.base else None
                if offer is not None:  # else it is not stored now, and nothing that is may be made against it
                    self._given[blob.chunk] = _Given(blob, own)
                    if len(self._given) > COMPANION_REACH:
                        self._given.popitem(last=False)
                yield blob, offer, None if blob.base is None else self._given.get(blob.base)

        checked = map_batched(self._executor, self._check, given(), nbytes=lambda item: item[0].decoded_nbytes)
        for blob, base in checked:
            if self._wanted.pop(blob.chunk, None) is not None:  # else it was given twice
                yield blob, base

    def described(self, blobs: Sequence[Described]) -> list[tuple[Described, StoredBlob | ChunkId | None]]:
        """Take blobs for given of which nobody here sees a payload; return each with what it is a delta of.

        All or none: raises InvalidInputError if nobody asked for one (``unplanned_blob``), it is a delta against
        something else than was offered (``wrong_base``), or no blob is like that (``bad_record``).
        """
        found: dict[ChunkId, tuple[Described, StoredBlob | ChunkId | None]] = {}
        recent = self._described.copy()
        for blob in blobs:
            offer = self._wanted.get(blob.chunk)
            if offer is None or blob.chunk in found:
                raise _unplanned()
            if blob.encoding not in set(Encoding) or needs_base(blob.encoding) != (blob.base is not None):
                raise InvalidInputError("a blob is described as none can be", kind="bad_record")
            base = None if blob.base is None else _offered(blob.base, offer)
            if isinstance(base, bytes) and not recent.get(base, False):
                raise _wrong_base()
            found[blob.chunk] = blob, base
            recent[blob.chunk] = base is None or base is offer.base  # as with those that are given
            if len(recent) > COMPANION_REACH:
                recent.popitem(last=False)
        for chunk in found:
            del self._wanted[chunk]
        self._described = recent
        return list(found.values())

    def _check(self, item: tuple[Blob, Offer | None, _Given | None]) -> tuple[Blob, StoredBlob | ChunkId | None]:
        blob, offer, before = item
        if offer is None:
            return blob, None  # given twice: the first was checked
        base, data = self._base_of(blob, offer, before)
        right = _right(blob, data)
        if right is blob:
            return blob, base
        logger.warning(
            "a payload of encoding %d was wrong when it was made, so chunk %s is stored raw; please report this",
            blob.encoding,
            blob.chunk.hex()[:12],
        )
        return right, None

    def _base_of(
        self, blob: Blob, offer: Offer, before: _Given | None
    ) -> tuple[StoredBlob | ChunkId | None, Buffer | None]:
        """Return what a blob is a delta of, a copy or a chunk whose blob was given before, and its bytes."""
        if blob.base is None:
            return None, None
        base = _offered(blob.base, offer)
        if isinstance(base, StoredBlob):
            return base, self._bases.lent(base)
        if before is None or (before.blob.base is None) != (before.base is None):
            raise _wrong_base()
        data = bytearray(before.blob.decoded_nbytes)
        _right(before.blob, None if before.base is None else self._bases.lent(before.base), data)
        return base, data


def _offered(base: ChunkId, offer: Offer) -> StoredBlob | ChunkId:
    """Return what was offered as the base of that name; raises InvalidInputError if nothing was."""
    for copy in (offer.base, offer.companion):
        if isinstance(copy, StoredBlob) and copy.row.chunk == base:
            return copy
    if offer.companion != base:
        raise _wrong_base()
    return base


def _unplanned() -> InvalidInputError:
    return InvalidInputError("a blob was written that nobody asked for", kind="unplanned_blob")


def _wrong_base() -> InvalidInputError:
    return InvalidInputError("a delta was made against another base than the one offered", kind="wrong_base")


def _right(blob: Blob, base: Buffer | None, out: bytearray | None = None) -> Blob:
    """Return a blob that decodes to the chunk it names: this one, or the chunk itself where the payload is wrong.

    ``base`` is the decoded chunk ``blob.base``, None for a full blob. ``out`` gets the chunk, if it is given. Raises
    InvalidInputError if the chunk cannot be read again, or has changed since it was hashed.
    """
    try:
        check_blob(blob, base, out)
    except CorruptionError as error:  # nothing stored is damaged: it is what was handed in that is wrong
        data = None if blob.read is None else bytes(blob.read())  # a copy: what was lent may change after it was hashed
        if data is None or chunk_id(data) != blob.chunk:
            raise InvalidInputError(
                f"a blob is not what it is said to be, and was not stored: {error}", kind="wrong_blob"
            ) from error
        if out is not None:
            out[:] = data
        return replace(blob, encoding=Encoding.RAW, payload=data, base=None, digest=None)
    return blob
