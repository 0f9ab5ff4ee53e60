"""Bases: what the chunks of a push may be made against.

A base is a live copy of smaller depth. Mostly it stands at the same place in the parent; for a tensor of which the
parent saves little, in the version that is nearest by their sketches.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from lamella_engine.chunk_index import ChunkIndex
from lamella_engine.content_store.packs import Packs, StoredBlob
from lamella_engine.content_store.reader import OpenVersion, PackedReader
from lamella_engine.content_store.seam import COMPANION_REACH
from lamella_engine.content_store.state import State
from lamella_engine.errors import CorruptionError
from lamella_engine.format.entry import VERIFIED_BY_STORE
from lamella_engine.model import Buffer, Cell, ChunkId
from lamella_engine.sketches import Sketch

logger = logging.getLogger("lamella")

GOOD_FIT = 0.5
"""A parent that saves this share of what tensors take alone, or more, is taken without looking for a nearer version."""

CLEARLY_NEARER = 0.9
"""Of two versions one is nearer if it takes at most this share of the other's bits: less is within a sketch's error."""

LONGEST_CHAIN = 4
"""Bytes of a chain to those of the full blob that it begins with: where deltas save little, chains are short. 3 takes 2
to 5 % more bytes and an eighth to a quarter less time to check out (``benchmarks.chains``)."""

MOST_CANDIDATES = 16
"""Versions whose sketches are looked at; reading one that is not in memory takes some milliseconds."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a missing chunk may be made against."""

    base: StoredBlob | None
    companion: StoredBlob | ChunkId | None
    """A copy that is live, or the chunk of a blob that is given shortly before."""


class Bases:
    """What the cells of one push may be made against. For one thread, but for :meth:`decoded` and :meth:`lent`.

    Parameters
    ----------
    state
        The newest state when the push began: bases are live in it.
    model
        The model that is pushed to.
    parent
        The version that the new one follows, or None.
    reader, packs, index
        The parts of the store that copies are found with.
    """

    def __init__(
        self,
        state: State,
        *,
        model: str,
        parent: OpenVersion | None,
        reader: PackedReader,
        packs: Packs,
        index: ChunkIndex,
    ) -> None:
        self._state = state
        self._model = model
        self._parent = parent
        self._reader = reader
        self._packs = packs
        self._index = index
        self._nearest: dict[str, OpenVersion] = {}
        """For tensors whose bases are not the parent's, the versions that have them."""
        self._planned: OrderedDict[Cell, StoredBlob | ChunkId] = OrderedDict()
        """The cells planned last, which may be companions."""
        self._live: dict[str, bool] = {}

    def consider(self, sketch: Sketch) -> None:
        """Choose versions for tensors, as :meth:`~lamella_engine.content_store.seam.Push.consider` does."""
        if not sketch.tensors:
            return
        least: dict[str, float] = {}
        if self._parent is not None:
            least = sketch.bits_against(self._reader.sketch(self._parent))
            alone = sum(sketch.bits_alone(name) for name in least)
            if sum(least.values()) <= GOOD_FIT * alone:
                return  # also if nothing is known of the parent
        for version in self._candidates():
            for name, bits in sketch.bits_against(self._reader.sketch(version)).items():
                if bits < least.get(name, sketch.bits_alone(name)) * CLEARLY_NEARER:
                    least[name] = bits
                    self._nearest[name] = version

    def _candidates(self) -> Iterator[OpenVersion]:
        """Yield versions that may be near: where refs stand, of this model first, then those before the parent."""
        models = sorted(self._state.models(), key=lambda model: model != self._model)
        heads = ((model, sorted((ref.number for _, ref in self._state.refs(model)), reverse=True)) for model in models)
        numbers = dict.fromkeys((model, number) for model, newest_first in heads for number in newest_first)
        before = 0 if self._parent is None else self._parent.added.number
        numbers |= dict.fromkeys((self._model, number) for number in range(before - 1, 0, -1)[:MOST_CANDIDATES])
        for model, number in islice(numbers, MOST_CANDIDATES):
            added = self._state.version(model, number)
            if added is not None and (self._parent is None or added.id != self._parent.added.id):
                try:
                    yield self._reader.open_added(added)
                except CorruptionError as error:  # whoever asks for that version will be told
                    logger.warning("a version cannot serve as a base: %s", error)

    def at(self, cell: Cell) -> StoredBlob | None:
        """Return the copy that stands at the same place in the version that a cell's base is taken from, if any."""
        version = self._parent if cell.tensor is None else self._nearest.get(cell.tensor, self._parent)
        if version is None:
            return None
        try:
            if cell.tensor is None:
                return self._sketch_base(version, -cell.number)
            return self._copy_at(version, cell.tensor, cell.number)
        except CorruptionError as error:
            # What this push does not stand on anyway may be damaged: whoever reads it will be told.
            if version is self._parent and cell.tensor is not None:
                raise
            logger.warning("a base is done without: %s", error)
            return None

    def note(self, cell: Cell, chunk: StoredBlob | ChunkId) -> None:
        """Remember the copy of a cell that was planned, or its chunk if that is yet to be given, for its companions."""
        self._planned[cell] = chunk
        if len(self._planned) > COMPANION_REACH:
            self._planned.popitem(last=False)

    def offer(self, base: StoredBlob | None, beside: Cell | None) -> Offer:
        """Return what a chunk may be made against: of a base and a companion, those on which a delta may stand."""
        longest = self._state.genesis.max_depth
        if base is not None and (base.row.depth >= longest or not self._may_grow(base)):
            base = None  # start a new chain
        companion = None if beside is None else self._planned.get(beside)
        if isinstance(companion, StoredBlob) and companion.row.depth > longest:
            companion = None
        return Offer(base, companion)

    def decoded(self, base: StoredBlob) -> Buffer:
        """Return the chunk of a copy. Safe for several threads."""
        return self._reader.base(base)

    def lent(self, base: StoredBlob) -> Buffer:
        """Return the chunk of a copy, valid until this thread asks again. Safe for several threads."""
        return self._reader.lent_base(base)

    def find_live(self, chunk: ChunkId) -> StoredBlob | None:
        """Return a live copy of a chunk in any version, if the index knows of one."""
        for pack in self._index.find(chunk):
            # The index is derived and may be wrong, so the pack itself is asked; if that is damaged, the chunk is
            # stored once more.
            try:
                if self._pack_is_live(pack) and (row := self._packs.index(pack).find(chunk)) is not None:
                    copy = StoredBlob(pack, row)
                    if self._is_live(copy):
                        return copy
            except CorruptionError as error:
                logger.warning("a chunk is stored again: %s", error)
        return None

    def _copy_at(self, version: OpenVersion, tensor: str, number: int) -> StoredBlob | None:
        if not version.manifest.has(tensor) or number >= version.manifest.spec(tensor).grid.cell_count:
            return None
        row = version.manifest.row(tensor, number)
        if row.chunk is None:
            return None
        copy = self._reader.copy_of_row(version, row)
        return copy if self._is_live(copy) else None

    def _sketch_base(self, version: OpenVersion, width: int) -> StoredBlob | None:
        """Return the copy of a version's sketch of lanes of that width."""
        description = version.recorded.description
        for at, lanes in enumerate(reversed(description.sketches), 1):
            if lanes.width == width:
                copy = self._reader.copy_of_manifest(version, len(description.manifest_chunks) - at)
                return copy if self._is_live(copy) else None
        return None

    def _may_grow(self, base: StoredBlob) -> bool:
        """Whether reading a chunk with one more delta like the last, its whole chain, stays near reading it alone."""
        full, *deltas = (link.row.encoded_nbytes for link in self._reader.chain(base))
        return full + sum(deltas) + sum(deltas[-1:]) <= LONGEST_CHAIN * full

    def _is_live(self, copy: StoredBlob) -> bool:
        """Whether a copy and everything it stands on is live."""
        return all(self._pack_is_live(link.pack) for link in self._reader.chain(copy))

    def _pack_is_live(self, pack: str) -> bool:
        live = self._live.get(pack)
        if live is None:
            live = self._live[pack] = serves_all(self._state, pack)
        return live


def serves_all(state: State, pack: str) -> bool:
    """Whether a pack is live and may serve any push: not one that only its writer has verified so far."""
    row = state.pack(pack)
    return row is not None and row.verifier == VERIFIED_BY_STORE
