"""Pushes under way: what a server remembers between the calls of one, so that each can be repeated."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from lamella_engine import codecs
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.decoding import decode_chain
from lamella_engine.content_store.incoming import AHEAD, GRANTED_BLOBS, PUT_S
from lamella_engine.content_store.manifest import Manifest
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.content_store.packing import PACK_NBYTES, ClosedPack, Described
from lamella_engine.content_store.push import PackedPush
from lamella_engine.content_store.seam import Blob, Missing, Planned, Recorded
from lamella_engine.errors import (
    ConflictError,
    CorruptionError,
    InvalidInputError,
    LamellaError,
    LimitError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    StorageError,
)
from lamella_engine.format.version import Description, encode_description
from lamella_engine.model import Cell, ChunkId, PushId, VersionId
from lamella_engine.service.quotas import PARTS_OF_ONE, Claim, Quotas
from lamella_engine.service.slots import Slots
from lamella_engine.sketches import Sketch
from lamella_engine.version_files import layouts
from lamella_engine.wire import FLOATING, TRIED_BASE, RecordParser

IDLE_S = 600.0
"""A session that nobody calls for so long is given up."""

PART_IDLE_S = 7200.0
"""The same of one that is to end as a part: its worker may have stored all and wait for another one."""

RECORDED_KEPT = 64
"""Sessions whose version is recorded that are kept besides, to answer a repeated commit: the log answers for others."""

# What is decoded and stored in one go, so many bytes of records or of decoded chunks: enough for two threads, and so
# little that the plans that wait for it come soon. With 4 MiB of records alone, which are 14 MiB of chunks where deltas
# save three quarters, the clients of five pushes of MiniLM waited 0.47 s for their plans, and 0.29 s with both bounds.
_BATCH_NBYTES, _BATCH_DECODED_NBYTES = 4 << 20, 8 << 20

# What a blob takes besides its payload, for quotas: its row in the index of its pack.
_ROW_NBYTES = 104

FILLED_NBYTES = 256 << 20
"""What packs that are being filled may hold, in all pushes together. Beyond it they are written before they fill."""

MAX_PLANNED = 1 << 21
"""Cells of one push: 8 TB of weights. A server remembers some hundred bytes of each until the push ends."""

MAX_HEADERS_NBYTES = 32 << 20
"""Headers of the safetensors files of one version, together: of some 300,000 tensors, where the largest models have
100,000. They are parsed before it is recorded, which took 27 us and 650 bytes of memory a tensor on one core."""

# Versions whose headers are parsed at a time: Python does it in one thread after the other, and it takes memory.
_CHECKERS = 2

# Batches of a plan whose answers are kept, in case a reply was lost.
_ANSWERS_KEPT = 64

_SOME_CELL = Cell(None, 0)

# How long a batch of a plan waits for those before it, which travel at the same time.
_ORDER_PATIENCE_S = 30.0


class Session:
    """One push. Safe for several threads: its calls take turns.

    Parameters
    ----------
    store
        The repository.
    push
        What is pushed there.
    claim
        What it holds, for the principal whose push it is.
    crowded
        Tells whether all pushes together hold too much.
    checkers
        One is held while headers are read.
    """

    def __init__(
        self, store: PackedStore, push: PackedPush, claim: Claim, crowded: Callable[[], bool], checkers: Slots
    ) -> None:
        self.push = push
        self.claim = claim
        self.used = time.monotonic()
        self._part: bytes | None = None
        self.joined: set[bytes] = set()
        """The parts that were joined to it."""
        self.recorded: Recorded | None = None
        """The version, once it is committed."""
        self.over = False
        """Whether it was given up, or what is stored of it is not known any more: then all has to come again."""
        self._may_be_recorded = False
        self._crowded = crowded
        self._checkers = checkers
        self._store = store
        self._turn = threading.Condition(threading.RLock())
        self._planned = 0
        self._answers: OrderedDict[int, tuple[int, list[Missing | None]]] = OrderedDict()
        """For each batch by its first cell: a hash of it, and what was said. Whoever finds another batch of that hash
        is told what is wrong for their own push, no more."""
        self._untried: dict[ChunkId, Missing] = {}
        """What was offered a base, and has not been stored."""
        self._grants = 0
        self._granted: tuple[int, ClosedPack] | None = None
        """The newest pack that the client puts by itself, and a hash of what it was asked for with."""
        self._parser = RecordParser()
        self._received = self._taken = 0
        self._batch: list[tuple[Blob, int]] = []
        self._batch_nbytes = 0
        """Of its chunks, decoded."""
        self._stream: object = None
        """The newest of them."""

    @property
    def idle_s(self) -> float:
        """For how long nobody may call for it before it is given up."""
        if self.claim.part and self._part is None:
            return PART_IDLE_S
        return IDLE_S if self._granted is None else PUT_S + IDLE_S  # whoever puts a pack has nothing to call for

    def is_any_of(self, parts: Container[bytes]) -> bool:
        """Whether it has ended as one of ``parts``."""
        return self._part is not None and self._part in parts

    @property
    def ended(self) -> bool:
        """Whether all that it does from now on is to say once more what came of it."""
        return self.recorded is not None or self._part is not None

    @contextmanager
    def _our_turn(self) -> Iterator[None]:
        with self._turn:
            self._check_it_runs()
            self.used = time.monotonic()
            yield

    def _check_it_runs(self) -> None:
        if self.over:  # since this call found it
            raise _no_session(self.push.id)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Take records in this block, from the position that it is given on.

        What came and was not taken is forgotten when it ends: held for each push that stopped half-way, it would fill
        the memory. But not if the client has begun another stream meanwhile, which goes on from there.
        """
        stream = object()
        with self._our_turn():
            self._rewind()
            self._stream = stream
            taken = self._taken
        try:
            yield taken
        finally:
            with self._turn:
                if self._stream is stream:
                    self._rewind()

    def rewind(self) -> int:
        """Forget what came of a stream but was not taken; return the position from which on it has to come again."""
        with self._our_turn():
            self._rewind()
            return self._taken

    def _rewind(self) -> None:
        self._parser = RecordParser()
        self._batch, self._batch_nbytes = [], 0
        self._received = self._taken

    def consider(self, sketch: Sketch) -> None:
        """Let bases be chosen by a sketch of what is pushed, as long as nothing has been planned."""
        with self._our_turn():
            if not self._planned:  # else a repeated call
                self.push.consider(sketch)

    def plan(self, first: int, cells: Sequence[Planned]) -> list[Missing | None]:
        """Return what the store says of ``cells``, the first of which has number ``first`` in this push."""
        with self._our_turn():
            asked = hash(tuple(cells))
            known = self._answers.get(first)
            if known is not None and known[0] == asked:
                return known[1]
            self._turn.wait_for(lambda: self.over or self._planned >= first, _ORDER_PATIENCE_S)
            self._check_it_runs()
            if self.ended:
                raise _push_over()
            if self._planned != first:
                raise InvalidInputError(
                    f"cell {first} was planned out of turn, after {self._planned}: begin again", kind="out_of_turn"
                )
            if first + len(cells) > MAX_PLANNED:
                raise LimitError(f"a push has at most {MAX_PLANNED} cells here: push less at a time", kind="push_limit")
            try:
                # Names of tensors, which may be long and name nothing, are not kept: nobody asks for them again.
                answers = [found and found._replace(cell=_SOME_CELL) for found in self.push.plan(cells)]
            except LamellaError:  # nobody knows how many of these cells the push takes for planned
                self.over = True
                raise
            self._untried.update((found.chunk, found) for found in answers if found is not None and found.base)
            self._planned += len(cells)
            self._answers[first] = asked, answers
            if len(self._answers) > _ANSWERS_KEPT:
                self._answers.popitem(last=False)
            self._turn.notify_all()
            return answers

    def receive(self, position: int, data: memoryview) -> int | None:
        """Take bytes of records; return up to where they have been stored, if that has changed."""
        with self._our_turn():
            before = self._taken
            if position > self._received:
                raise InvalidInputError(f"bytes {self._received} to {position} of this push never came", kind="gap")
            data = data[self._received - position :]
            self._parser.feed(data)
            self._received += data.nbytes
            while (record := self._record()) is not None:
                self._batch.append(record)
                self._batch_nbytes += record[0].decoded_nbytes
                records_nbytes = self._received - self._taken - self._parser.waiting_nbytes
                if records_nbytes >= _BATCH_NBYTES or self._batch_nbytes >= _BATCH_DECODED_NBYTES:
                    self._store_batch()
            return None if self._taken == before else self._taken

    def _record(self) -> tuple[Blob, int] | None:
        try:
            return self._parser.record()
        except CorruptionError as error:  # nothing that is stored is damaged
            if error.kind == "changed_on_its_way":
                raise StorageError(error.message, kind=error.kind, transient=True) from None
            raise InvalidInputError(error.message, kind=error.kind) from None

    def flush(self) -> int:
        """Store all that has come whole; return up to where."""
        with self._our_turn():
            self._store_batch()
            return self._taken

    def _store_batch(self, *, last: bool = False) -> None:
        batch: dict[ChunkId, Blob] = {}
        whole: list[Blob] = []
        for blob, flags in self._batch:  # what came twice is not decoded twice, however little it takes to say it again
            if blob.chunk not in batch:
                batch[blob.chunk] = blob
                if blob.base is None and blob.chunk in self._untried and not flags & TRIED_BASE:
                    whole.append(replace(blob, floating=bool(flags & FLOATING)))
        self._batch, self._batch_nbytes = [], 0
        end = self._received - self._parser.waiting_nbytes
        try:
            for blob in self._store.executor.map(self._against_base, whole):
                batch[blob.chunk] = blob
            self.claim.take(sum(len(blob.payload) + _ROW_NBYTES for blob in batch.values()))
            self.push.write(batch.values())
            if last:
                self.push.finish()
            elif self._crowded():
                self.push.close_pack()
        except LamellaError as error:
            self._rewind()
            self.over = isinstance(error, StorageError)  # nobody knows which blobs are stored
            raise
        for chunk in batch:
            self._untried.pop(chunk, None)
        self._taken = end

    def _against_base(self, blob: Blob) -> Blob:
        """Return as a delta, if that is smaller, a blob that was sent in full because its sender could not make one."""
        missing = self._untried[blob.chunk]
        chunk = bytearray(blob.decoded_nbytes)
        try:
            decode_chain([blob], memoryview(chunk), check=True)
            base = self.push.base(missing)
        except CorruptionError:  # the store will say of the blob what is wrong with it; without a base it is as good
            return blob
        if not codecs.fits(len(base), len(chunk), floating=blob.floating):
            return blob
        encoded = codecs.encode(chunk, width=blob.width, floating=blob.floating, base=base)
        if encoded.against is not codecs.Against.BASE or len(encoded.payload) >= len(blob.payload):
            return blob
        return Blob(blob.chunk, encoded.encoding, blob.width, blob.decoded_nbytes, encoded.payload, missing.base)

    def grant(self, number: int, blobs: Sequence[Described], arrived: int) -> tuple[ClosedPack, str]:
        """Return pack ``number`` of those that the client puts by itself, and a URL for it.

        The first ``arrived`` of them have been put. The newest may be asked for again.
        """
        with self._our_turn():
            if self.ended:
                raise _push_over()
            nbytes = sum(blob.encoded_nbytes for blob in blobs)
            if not 0 < len(blobs) <= GRANTED_BLOBS or nbytes - blobs[-1].encoded_nbytes >= PACK_NBYTES:
                raise InvalidInputError(
                    f"such a pack has 1 to {GRANTED_BLOBS} blobs, and ends where they reach {PACK_NBYTES} bytes",
                    kind="bad_record",
                )
            asked = hash(tuple(blobs))
            if self._granted is None or number != self._grants - 1 or self._granted[0] != asked:
                if number != self._grants or not number - AHEAD < arrived <= number:
                    raise InvalidInputError(
                        f"pack {number} was asked for out of turn, after {self._grants} of which {arrived} have "
                        "arrived: begin again",
                        kind="out_of_turn",
                    )
                self.push.arrived(arrived)
                self.claim.take(nbytes + len(blobs) * _ROW_NBYTES)
                self._granted = asked, self.push.grant(blobs)
                self._grants += 1
                for blob in blobs:
                    self._untried.pop(blob.chunk, None)
            return self._granted[1], self.push.put_url(self._granted[1])

    def commit(self, description: Description) -> Recorded:
        """Record the version, if a checkout could write its files; a repeated call returns it again."""
        with self._our_turn():
            if self.recorded is None:
                headers_nbytes = _headers_nbytes(description)
                self._store_batch(last=True)
                self.claim.take(len(encode_description(description)))
                before, self._may_be_recorded = self._may_be_recorded, True
                try:
                    self.recorded = self.push.commit(description, check=partial(self._check_files, headers_nbytes))
                    self.claim.release()
                except (ConflictError, InvalidInputError, LimitError):
                    # Of others nobody knows what they left, then or before.
                    self._may_be_recorded = before
                    raise
                except StorageError as error:
                    if before:  # this commit failed, and the one before it may still land
                        raise OutcomeUnknownError(error.message, push_id=self.push.id) from error
                    self._may_be_recorded = False
                    self.over = not error.transient  # one that was sent before, and comes late, finds nothing to commit
                    raise
            return self.recorded

    def part(self) -> bytes:
        """End as a part of another push; a repeated call returns the same again."""
        with self._our_turn():
            if self._part is None:
                self._store_batch(last=True)
                self._part = self.push.part()
                self.claim.end()
            return self._part

    def join(self, part: bytes) -> None:
        """Take what a part has stored for planned and written."""
        with self._our_turn():
            self.push.join(part)
            self.joined.add(part)

    def _check_files(self, headers_nbytes: int, manifest: Manifest) -> None:
        with self._checkers.taken(self.claim.owner) if headers_nbytes else nullcontext():
            layouts(manifest)

    def abandon(self) -> None:
        """Give up, unless it has been committed, or may have been; calls that wait for their turn find it gone."""
        with self._turn:
            self.claim.release()
            if not self._may_be_recorded:
                self.over = True
                self._turn.notify_all()
                self.push.abandon()


def _push_over() -> InvalidInputError:
    return InvalidInputError("this push has ended: begin another", kind="push_over")


def _headers_nbytes(description: Description) -> int:
    """Return how long the headers of a version's files are; raises LimitError if reading them would take long."""
    nbytes = sum(item.nbytes for item in description.attachments if item.role == "safetensors_header")
    if nbytes > MAX_HEADERS_NBYTES:
        raise LimitError(
            f"the headers of the files take {nbytes} bytes, and {MAX_HEADERS_NBYTES} are the limit here: push fewer "
            "tensors at a time, or from memory",
            kind="headers_limit",
        )
    return nbytes


class Sessions:
    """The pushes of one server process. Safe for several threads.

    Parameters
    ----------
    quotas
        Bounds how many there may be, and what they hold.
    """

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        self._sessions: dict[tuple[PackedStore, PushId], Session] = {}
        self._checkers = Slots(_CHECKERS)
        self._lock = threading.Lock()

    def begin(
        self,
        store: PackedStore,
        owner: str,
        push_id: PushId,
        *,
        model: str,
        branch: str,
        parent: VersionId | None,
        again: bool,
        part: bool = False,
    ) -> tuple[Session, int]:
        """Start a push or find it started; return it, and the position from which on records have to come.

        Raises what ``ContentStore.begin`` does, and LimitError for one too many.
        """
        with self._lock:
            session = self._sessions.get((store, push_id))
        if session is not None:
            self._check_owner(session, owner)
            if (session.push.model, session.push.branch) != (model, branch):
                raise InvalidInputError(f"push {push_id} goes to another branch", kind="push_reused")
            if not (again or session.over):
                return session, session.rewind()
            self.end(store, push_id)
            session.abandon()
        claim = self._quotas.push(owner, part=part)
        try:
            # What this session writes has names of its own: the same push may be under way at another server.
            push = store.begin(model, branch, parent=parent, push_id=push_id, part=part, writer_id=new_push_id())
            with self._lock:
                self._forget_ended()
                session = self._sessions.setdefault(
                    (store, push_id), Session(store, push, claim, self._crowded, self._checkers)
                )
        finally:
            if session is None or session.claim is not claim:  # it failed, or another call was faster
                claim.release()
        return session, 0

    def release_parts(self, session: Session) -> None:
        """Let the parts of a push that is recorded hold nothing any more, as far as they were stored by this server."""
        with self._lock:
            parts = [other for other in self._sessions.values() if other.is_any_of(session.joined)]
        for part in parts:
            part.claim.release()

    def _forget_ended(self) -> None:
        ended = [key for key, session in self._sessions.items() if session.ended]
        recorded = [key for key in ended if self._sessions[key].recorded is not None]
        parts = [key for key in ended if self._sessions[key].recorded is None]
        for key in (*recorded[:-RECORDED_KEPT], *parts[:-PARTS_OF_ONE]):
            self._sessions.pop(key).claim.release()

    def _crowded(self) -> bool:
        with self._lock:
            return sum(session.push.filled_nbytes for session in self._sessions.values()) > FILLED_NBYTES

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._sessions)

    def get(self, store: PackedStore, owner: str, push_id: PushId) -> Session:
        """Return a push that was begun; raises NotFoundError (``no_session``)."""
        with self._lock:
            session = self._sessions.get((store, push_id))
        if session is None or session.over:
            raise _no_session(push_id)
        self._check_owner(session, owner)
        return session

    def end(self, store: PackedStore, push_id: PushId) -> None:
        """Forget a push, which holds nothing any more."""
        with self._lock:
            session = self._sessions.pop((store, push_id), None)
        if session is not None:
            session.claim.release()

    def sweep(self, idle_s: float | None = None) -> None:
        """Give up what nobody has called for its ``idle_s``, or for the seconds that are given."""
        now = time.monotonic()
        with self._lock:
            idle = [
                key
                for key, session in self._sessions.items()
                if now - session.used >= (session.idle_s if idle_s is None else idle_s)
            ]
            given_up = [self._sessions.pop(key) for key in idle]
        for session in given_up:
            session.abandon()

    def _check_owner(self, session: Session, owner: str) -> None:
        if session.claim.owner != owner:
            raise PermissionDeniedError("this push is somebody else's", kind="not_allowed")


def _no_session(push_id: PushId) -> NotFoundError:
    return NotFoundError(f"push {push_id} is not known here: begin it again", kind="no_session", push_id=push_id)
