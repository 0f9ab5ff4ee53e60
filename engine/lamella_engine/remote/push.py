"""A push to a service: planned in batches that overlap, written in one stream that can be taken up again."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

from lamella_engine.content_store.seam import Blob, Missing, Parent, Planned, Recorded
from lamella_engine.errors import (
    ConflictError,
    CorruptionError,
    LamellaError,
    NotFoundError,
    OutcomeUnknownError,
    StorageError,
)
from lamella_engine.format.manifest import structure_pages
from lamella_engine.format.version import Description, encode_description, version_id
from lamella_engine.model import Buffer, ChunkId, PushId, VersionId
from lamella_engine.remote.cache import ChunkCache
from lamella_engine.remote.channel import Channel, Patience, Pending, may_succeed_later
from lamella_engine.remote.direct import NOT_PUT, DirectPacks, Way
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.sketches import Sketch
from lamella_engine.wire import (
    FLOATING,
    MAX_MESSAGE_NBYTES,
    POSITION,
    TRIED_BASE,
    batches,
    decode_answer,
    decode_parents,
    decode_version,
    encode_planned,
    encode_record,
    frames,
)

PLANNED_CELLS, PLANNED_NBYTES = 512, 4 << 20
"""A batch of a plan ends with so many cells or bytes of them: whoever pushes holds them until the answer comes."""

PLANS_AHEAD = 4
"""Batches of a plan under way at a time."""

WINDOW_NBYTES = 16 << 20
"""Bytes of records that may be sent before the service has taken the first of them: they are held, to be sent again.
Twice of what a service collects before it takes any."""

COMMITS = 3
"""How often a commit is tried for a minute each, if the service, asked what became of it, knows nothing of it."""

RESTARTS = 3
"""How often a push is begun anew because the service forgot it."""


class RemotePush:
    """See :class:`~lamella_engine.content_store.seam.Push`.

    Parameters
    ----------
    channel, repository
        Where to.
    cache
        Chunks that are here: of those that are pushed, the bases of the next ones.
    model, branch, parent, push_id, part
        As for ``ContentStore.begin``.
    way
        The one that blobs take.
    keep
        Told of the version that is recorded: nothing that fails after that may look like a failure of the push.
    """

    def __init__(
        self,
        channel: Channel,
        repository: str,
        cache: ChunkCache,
        *,
        model: str,
        branch: str,
        parent: VersionId | None,
        push_id: PushId,
        part: bool = False,
        keep: Callable[[Recorded], Recorded],
        way: Way,
    ) -> None:
        self._way = way
        self._channel = channel
        self._repository = repository
        self._cache = cache
        self._keep = keep
        self.model = model
        self.branch = branch
        self.id = push_id
        self._is_part = part
        self._restarts = 0
        self._direct: DirectPacks | None = None
        """Packs that this machine puts into the bucket of the service by itself, if it may."""
        self.parents = self._begin(parent, again=False)

    def _begin(self, parent: VersionId | None, *, again: bool) -> tuple[Parent, ...]:
        request = pb.BeginRequest(
            repository=self._repository,
            push=self.id,
            model=self.model,
            branch=self.branch,
            parent=parent or "",
            again=again,
            part=self._is_part,
        )
        reply = self._channel.call("Pushes.Begin", request)
        self._planned = 0
        self._untried: set[ChunkId] = set()
        """Chunks that were offered a base which is not to be had here."""
        self._position = 0
        if self._direct is not None:
            self._direct.close()
        self._direct = DirectPacks(self._channel, self._repository, self.id, self._way) if self._way.direct else None
        return decode_parents(reply.parents)

    def _push(self) -> pb.PushRequest:
        return pb.PushRequest(repository=self._repository, push=self.id)

    # -- plan ---------------------------------------------------------------------------------------------------------

    def consider(self, sketch: Sketch) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        if not sketch.tensors:
            return
        specs = [spec for spec, _ in sketch.tensors.values()]
        pages = [page for page, _ in structure_pages(specs)]
        request = pb.ConsiderRequest(repository=self._repository, push=self.id, pages=pages, lanes=sketch.lanes())
        if request.ByteSize() <= MAX_MESSAGE_NBYTES:  # else bases are the parent's
            with _losing():
                self._channel.call("Pushes.Consider", request)

    def plan(self, cells: Iterable[Planned]) -> Iterator[Missing | None]:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        asked: deque[tuple[list[Planned], pb.PlanRequest, Pending]] = deque()
        try:
            for batch in batches(cells, PLANNED_CELLS, nbytes=_nbytes, most_nbytes=PLANNED_NBYTES):
                request = pb.PlanRequest(
                    repository=self._repository,
                    push=self.id,
                    first=self._planned,
                    cells=[encode_planned(planned) for planned in batch],
                )
                self._planned += len(batch)
                asked.append((batch, request, self._channel.begin("Pushes.Plan", request)))
                if len(asked) == PLANS_AHEAD:
                    yield from self._answers(*asked.popleft())
            while asked:
                yield from self._answers(*asked.popleft())
        finally:
            for _, _, pending in asked:
                pending.cancel()

    def _answers(self, batch: list[Planned], request: pb.PlanRequest, pending: Pending) -> Iterator[Missing | None]:
        with _losing():
            try:
                reply = pending.reply()
            except LamellaError as error:
                # One that waited too long for the batch before it, which had to be sent twice, comes in turn now.
                if not may_succeed_later(error) and error.kind != "out_of_turn":
                    raise
                reply = self._channel.call("Pushes.Plan", request)
        if len(reply.answers) != len(batch):
            raise CorruptionError("the service answered another plan", kind="bad_reply")
        yield from map(decode_answer, batch, reply.answers)

    def base(self, missing: Missing) -> Buffer | None:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        data = None if missing.base is None else self._cache.get(missing.base)
        if data is None:
            self._untried.add(missing.chunk)
        return data

    def keep(self, blob: Blob, data: Buffer) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        if not self._cache.add_delta(blob):
            self._cache.add(blob.chunk, data)

    # -- write --------------------------------------------------------------------------------------------------------

    def write(self, blobs: Iterable[Blob]) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`.

        A blob that does not decode to its chunk is refused, for it cannot be read again from here.
        """
        self._send(self._not_direct(blobs))

    def _not_direct(self, blobs: Iterable[Blob]) -> Iterator[Blob]:
        """Put straight into the bucket what goes there; yield the rest."""
        for blob in blobs:
            if self._direct is not None and self._direct.takes(blob, tried=blob.chunk not in self._untried):
                self._direct.add(blob)
            else:
                yield blob

    def _finish_direct(self) -> None:
        if self._direct is not None:
            with _losing():
                left = self._direct.finish()
            if left:
                self._send(left)

    def _send(self, blobs: Iterable[Blob]) -> None:
        """Send blobs to the service; return when it has them."""
        with _losing():
            upload = _Upload(self._channel, self._repository, self.id, self._position)
            try:
                for message in frames(self._records(blobs), position=self._position):
                    upload.send(message)
                upload.finish()
            finally:
                upload.close()
            self._position = upload.end

    def _records(self, blobs: Iterable[Blob]) -> Iterator[Buffer]:
        for blob in blobs:
            tried = 0 if blob.chunk in self._untried else TRIED_BASE
            yield from encode_record(blob, tried | (FLOATING if blob.floating else 0))

    # -- the end ------------------------------------------------------------------------------------------------------

    def commit(self, description: Description) -> Recorded:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        try:
            self._finish_direct()
        except BaseException:  # of what fails later nobody knows what it left; this has recorded nothing
            self.abandon()
            raise
        data = encode_description(description)
        request = pb.CommitRequest(repository=self._repository, push=self.id, description=data)
        for _ in range(COMMITS):
            try:
                with _losing():
                    return self._checked(self._channel.call("Pushes.Commit", request), version_id(data))
            except (StorageError, OutcomeUnknownError) as error:
                outcome = self._outcome()
                if outcome is not None:
                    return self._checked(outcome, version_id(data))
                if error.kind == "session_lost" or _is_refusal(error):
                    raise
        raise self._unknown()

    def part(self) -> bytes:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        self._finish_direct()
        with _losing():
            part: bytes = self._channel.call("Pushes.Part", self._push()).part
        return part

    def join(self, part: bytes) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        with _losing():
            self._channel.call("Pushes.Join", pb.JoinRequest(repository=self._repository, push=self.id, part=part))

    def _checked(self, reply: pb.Version, id: VersionId) -> Recorded:
        """Return what was recorded: this version, or, if that was equal, the one that it follows."""
        recorded = decode_version(reply)
        if recorded.id not in (id, *(parent.id for parent in self.parents)):
            raise CorruptionError("the service recorded another version than it was given", kind="another_version")
        return self._keep(recorded)

    def _outcome(self) -> pb.Version | None:
        try:
            reply = self._channel.call("Pushes.Outcome", self._push())
        except StorageError as error:
            raise self._unknown() from error
        return reply.version if reply.HasField("version") else None

    def _unknown(self) -> OutcomeUnknownError:
        return OutcomeUnknownError(
            "the service did not say whether the version was recorded: look at the branch before you push again",
            push_id=self.id,
        )

    def restart(self, error: LamellaError) -> bool:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        if error.kind not in (NOT_PUT, "session_lost") or self._restarts == RESTARTS:
            return False
        self._restarts += 1
        parents = self._begin(self.parents[0].id if self.parents else None, again=True)
        if parents != self.parents:
            raise ConflictError(
                f"{self.model}@{self.branch} moved while this push ran: look at it, then push again",
                expected=self.parents[0].id if self.parents else None,
                actual=parents[0].id if parents else None,
            )
        return True

    def abandon(self) -> None:
        """See :class:`~lamella_engine.content_store.seam.Push`."""
        if self._direct is not None:
            self._direct.close()
        with suppress(LamellaError):  # tried once: a push that nobody calls for is given up anyway
            self._channel.call_once("Pushes.Abandon", self._push())


@contextmanager
def _losing() -> Iterator[None]:
    """Say of a push that the service does not know any more that it was lost, and may be begun anew."""
    try:
        yield
    except NotFoundError as error:
        if error.kind != "no_session":
            raise
        raise StorageError(
            "the service forgot this push, as one does that is started anew: push again",
            kind="session_lost",
            transient=True,
        ) from error


def _is_refusal(error: LamellaError) -> bool:
    """Whether the service itself said that it failed, and would again."""
    return isinstance(error, StorageError) and not error.transient and error.kind != "service_failed"


def _nbytes(planned: Planned) -> int:
    """Return what a planned cell holds here, and twice what its names take: a batch of them is one message."""
    named = (planned.cell, planned.companion)
    return planned.nbytes + 2 * sum(len((cell.tensor or "").encode()) for cell in named if cell is not None)


class _Upload:
    """A run of records on its way to the service. What has not been taken is kept, and sent again after a break.

    Parameters
    ----------
    channel, repository, push_id
        Where to.
    position
        Of the first byte, in all that the push sends.
    """

    def __init__(self, channel: Channel, repository: str, push_id: PushId, position: int) -> None:
        self._channel = channel
        self._header = pb.WriteHeader(repository=repository, push=push_id).SerializeToString()
        self._kept: deque[bytes] = deque()
        self._taken = self.end = position
        self._patience = Patience()
        self._outgoing: SimpleQueue[bytes | None] | None = None
        """To gRPC's thread, until None; None while no stream is open."""
        self._answers: Generator[bytes] = _nothing()

    def send(self, message: bytes) -> None:
        """Send a message, whose position follows the one before; wait while too much is under way."""
        self._opened().put(message)
        self._kept.append(message)
        self.end += len(message) - POSITION.size
        while self.end - self._taken > WINDOW_NBYTES:
            self._await_answer()

    def finish(self) -> None:
        """Return when the service has taken everything."""
        while self._taken < self.end:
            self._opened().put(None)
            self._await_answer()
        if self._outgoing is not None:
            self._outgoing.put(None)
            with suppress(LamellaError):  # it has all
                deque(self._answers, maxlen=0)

    def close(self) -> None:
        """End the call, whatever came of it."""
        if self._outgoing is not None:
            self._outgoing.put(None)
            self._outgoing = None
            self._answers.close()

    def _await_answer(self) -> None:
        self._opened()
        try:
            self._note_answer()
        except LamellaError as error:
            self.close()
            self._patience.wait(error)

    def _opened(self) -> "SimpleQueue[bytes | None]":
        """Return what goes to the service, in a new stream if there is none: first what was sent and not taken."""
        while self._outgoing is None:
            self._outgoing = SimpleQueue()
            self._outgoing.put(self._header)
            self._answers = self._channel.stream("Pushes.Write", iter(self._outgoing.get, None))
            try:
                self._note_answer()
            except LamellaError as error:
                self.close()
                self._patience.wait(error)
            else:
                for message in self._kept:
                    self._outgoing.put(message)
        return self._outgoing

    def _note_answer(self) -> None:
        """Wait for the next answer; forget what has been taken."""
        data = next(self._answers, None)
        if data is None:
            raise StorageError("the service ended a stream too early", kind="short_stream", transient=True)
        taken = POSITION.unpack(data)[0] if len(data) == POSITION.size else -1
        if not self._taken <= taken <= self.end:
            raise CorruptionError("the service took what was not sent", kind="bad_reply")
        if taken > self._taken:
            self._patience.renew()
        self._taken = taken
        while self._kept and _end_of(self._kept[0]) <= taken:
            self._kept.popleft()


def _end_of(message: bytes) -> int:
    """Return the position after the last byte of a message of a write."""
    return int(POSITION.unpack_from(message)[0]) + len(message) - POSITION.size


def _nothing() -> Generator[bytes]:
    yield from ()
