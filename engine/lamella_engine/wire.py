"""How nouns, blobs and errors travel between a client and a server: ``proto/lamella.proto``, in Python.

Both sides of the wire are made from the same descriptors: :data:`METHODS` lists every rpc with what it takes and
returns, so no code is generated but the messages.
"""

import json
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from lamella_engine import errors
from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.content_store.packing import Described, described
from lamella_engine.content_store.seam import Blob, Missing, Parent, Planned, Reading, Recorded
from lamella_engine.errors import CorruptionError, InvalidInputError, LamellaError
from lamella_engine.format.digests import DIGEST_NBYTES, blob_digest
from lamella_engine.format.pack import MAX_DEPTH, MAX_ENCODED_NBYTES
from lamella_engine.format.version import decode_description, version_id
from lamella_engine.model import Buffer, Cell, ChunkId, VersionId
from lamella_engine.rpc import lamella_pb2 as pb

Item = TypeVar("Item")

MAX_MESSAGE_NBYTES = 4 << 20
"""Longest message that either side takes: what gRPC itself allows by default."""

FRAME_NBYTES = 1 << 20
"""Longest message of a raw stream: larger ones cost fresh memory, smaller ones a call for each."""

LANE_WIDTHS = (1, 2, 4, 8)
"""Bytes that a lane may have."""

CELLS_AT_ONCE = 65_536
"""Most cells of a ReadRequest."""

ERROR_TRAILER = "lamella-error-bin"
RETRY_TRAILER = "retry-after-ms"

RETRY_AFTER = "retry_after_ms"
"""In the context of a LimitError: the same call may succeed after so many milliseconds."""

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_NBYTES + (64 << 10)),
    ("grpc.max_receive_message_length", MAX_MESSAGE_NBYTES + (64 << 10)),
)
"""Of both sides; a little more than a message, for what goes around one."""


# -- rpcs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Method:
    """One rpc."""

    path: str
    """As gRPC calls it: ``/lamella.v1.Versions/Resolve``."""
    request: type[Message] | None
    """None for raw bytes."""
    reply: type[Message] | None
    streams_requests: bool
    streams_replies: bool

    @property
    def name(self) -> str:
        """Without the package: ``Versions.Resolve``."""
        return self.path.removeprefix("/lamella.v1.").replace("/", ".")

    @property
    def shape(self) -> Literal["unary_unary", "unary_stream", "stream_unary", "stream_stream"]:
        """As gRPC calls the four ways to call."""
        asked = "stream" if self.streams_requests else "unary"
        answered = "stream" if self.streams_replies else "unary"
        return f"{asked}_{answered}"  # type: ignore[return-value]


def _methods() -> Iterator[Method]:
    def message(descriptor: Any) -> type[Message] | None:
        return None if descriptor.name == "Raw" else GetMessageClass(descriptor)

    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            yield Method(
                f"/{service.full_name}/{method.name}",
                message(method.input_type),
                message(method.output_type),
                method.client_streaming,
                method.server_streaming,
            )


METHODS = {method.name: method for method in _methods()}
"""Every rpc of the wire by its name, such as ``Versions.Resolve``."""


def parse(message: type[Message], data: bytes) -> Any:
    """Parse a message; raises InvalidInputError."""
    try:
        return message.FromString(data)
    except DecodeError:
        raise InvalidInputError(f"these bytes are no {message.DESCRIPTOR.name}", kind="bad_message") from None


# -- errors ------------------------------------------------------------------------------------------------------------

_STATUS = (
    (errors.InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (errors.ConflictError, grpc.StatusCode.ABORTED),
    (errors.PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.CorruptionError, grpc.StatusCode.DATA_LOSS),
    (errors.UnsupportedFormatError, grpc.StatusCode.UNIMPLEMENTED),
    (errors.OutcomeUnknownError, grpc.StatusCode.UNKNOWN),
    (errors.LimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
)

_CLASSES = {
    name: found for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, LamellaError)
}


def status_of(error: LamellaError) -> grpc.StatusCode:
    """Return the gRPC status that stands for an error."""
    if isinstance(error, errors.StorageError):
        return grpc.StatusCode.UNAVAILABLE if error.transient else grpc.StatusCode.INTERNAL
    return next((status for kind, status in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def encode_error(error: LamellaError) -> bytes:
    """Return an error as the trailer ``lamella-error-bin`` carries it."""
    context = {
        name: value
        for name, value in error.context.items()
        if value is None or isinstance(value, str | int | float | bool)
    }
    fields = {"class": type(error).__name__, "message": error.message, "kind": error.kind, "context": context}
    data = json.dumps(fields).encode()
    if len(data) > _MAX_ERROR_NBYTES:
        fields |= {"message": error.message[:500].encode("ascii", "replace").decode() + "...", "context": {}}
        data = json.dumps(fields).encode()
    return data


# gRPC refuses metadata of more than 8 to 16 KiB; base64 makes four of three.
_MAX_ERROR_NBYTES = 4096


def decode_error(data: bytes) -> LamellaError:
    """Return the error that a trailer carries; one that is nothing of the kind is a StorageError."""
    try:
        fields = json.loads(data)
        found = _CLASSES[fields["class"]](str(fields["message"]), kind=str(fields["kind"]), **fields["context"])
    except (ValueError, KeyError, TypeError):
        return errors.StorageError(
            "the server failed in a way that it could not say", kind="bad_error", transient=False
        )
    return found


# -- versions ----------------------------------------------------------------------------------------------------------


def encode_version(recorded: Recorded, description: bytes) -> pb.Version:
    """Return a version as it travels; ``description`` is its stored line."""
    return pb.Version(
        description=description, model=recorded.model, number=recorded.number, parents=encode_parents(recorded.parents)
    )


def decode_version(message: pb.Version) -> Recorded:
    """Return a version, whose id is computed from its description; raises CorruptionError if that is damaged."""
    id = version_id(message.description)
    description = decode_description(message.description, expected=id)
    parents = decode_parents(message.parents)
    if description.model != message.model or description.parents != tuple(parent.id for parent in parents):
        raise CorruptionError("the server sent a version that is not what it says", kind="bad_version")
    return Recorded(id, message.model, message.number, description, parents)


def encode_parents(parents: Iterable[Parent]) -> list[pb.Parent]:
    """Return parents as they travel."""
    return [pb.Parent(id=parent.id, model=parent.model, number=parent.number) for parent in parents]


def decode_parents(messages: Iterable[pb.Parent]) -> tuple[Parent, ...]:
    """Return parents."""
    return tuple(Parent(VersionId(item.id), item.model, item.number) for item in messages)


# -- cells -------------------------------------------------------------------------------------------------------------


def encode_cells(cells: Iterable[tuple[Cell, ChunkId | None]]) -> list[pb.CellRun]:
    """Return cells, each with a chunk that the caller holds or None, as runs."""
    runs: list[pb.CellRun] = []
    for cell, held in cells:
        last = runs[-1] if runs else None
        alike = last is not None and not held and not last.held and _tensor_of(last) == cell.tensor
        if last is not None and alike and cell.number == last.first + last.count:
            last.count += 1
            continue
        runs.append(pb.CellRun(tensor=cell.tensor, first=cell.number, count=1, held=held or b""))
    return runs


def decode_cells(runs: Sequence[pb.CellRun]) -> Iterator[tuple[Cell, ChunkId | None]]:
    """Yield the cells of runs, each with the chunk that the caller holds; raises InvalidInputError."""
    if sum(run.count for run in runs) > CELLS_AT_ONCE:
        raise InvalidInputError(f"at most {CELLS_AT_ONCE} cells can be asked for at a time", kind="too_many_cells")
    for run in runs:
        held = _chunk(run.held) if run.held else None
        for number in range(run.first, run.first + run.count):
            yield Cell(_tensor_of(run), number), held


def _tensor_of(message: "pb.CellRun | pb.PlannedCell") -> str | None:
    return message.tensor if message.HasField("tensor") else None


def _chunk(data: bytes) -> ChunkId:
    if len(data) != DIGEST_NBYTES:
        raise InvalidInputError(f"{len(data)} bytes are no chunk id", kind="bad_message")
    return ChunkId(data)


def encode_planned(planned: Planned) -> pb.PlannedCell:
    """Return a planned cell as it travels."""
    message = pb.PlannedCell(tensor=planned.cell.tensor, number=planned.cell.number, chunk=planned.chunk)
    if planned.companion is not None:
        message.companion.tensor = planned.companion.tensor or ""
        message.companion.number = planned.companion.number
    return message


def decode_planned(message: pb.PlannedCell) -> Planned:
    """Return a planned cell; raises InvalidInputError."""
    if message.number < 0 and (message.HasField("tensor") or -message.number not in LANE_WIDTHS):
        raise InvalidInputError("a cell with such a number cannot be planned", kind="bad_message")
    companion = Cell(message.companion.tensor, message.companion.number) if message.HasField("companion") else None
    return Planned(Cell(_tensor_of(message), message.number), _chunk(message.chunk), companion)


def encode_answer(missing: Missing | None) -> pb.Answer:
    """Return what a store says of a planned cell as it travels."""
    if missing is None:
        return pb.Answer()
    return pb.Answer(missing=True, base=missing.base or b"", companion=missing.companion or b"")


def decode_answer(planned: Planned, answer: pb.Answer) -> Missing | None:
    """Return what a store says of a planned cell; raises InvalidInputError."""
    if not answer.missing:
        return None
    base, companion = (_chunk(data) if data else None for data in (answer.base, answer.companion))
    return Missing(planned.cell, planned.chunk, base, companion)


# -- blobs -------------------------------------------------------------------------------------------------------------

POSITION = struct.Struct("<Q")
"""A position in what a push sends: before each piece of it, and in each answer."""

_RECORD = struct.Struct("<32s32s16sIIBBBx")  # see proto/lamella.proto
_CHAIN = struct.Struct("<H")
_NO_CHUNK = bytes(DIGEST_NBYTES)

# A chunk, its companion, and what that stands on: no repository has longer ones, and a reader holds all of one.
_LONGEST_CHAIN = MAX_DEPTH + 2

# Neighbours that are both shorter are joined: whoever sends a blob byte by byte costs no list of four million pieces.
_SMALL_NBYTES = 4096

HAS_BASE, FLOATING, TRIED_BASE = 1, 2, 4
"""Flags of a record."""


def encode_record(blob: Blob, flags: int = 0) -> list[Buffer]:
    """Return a blob as a record: its header and its payload."""
    return [encode_header(described(blob, blob.payload), flags), blob.payload]


def encode_header(blob: Described, flags: int = 0) -> bytes:
    """Return the header of a record."""
    return _RECORD.pack(
        blob.chunk,
        blob.base or _NO_CHUNK,
        blob.digest,
        blob.decoded_nbytes,
        blob.encoded_nbytes,
        blob.encoding,
        blob.width,
        flags | (0 if blob.base is None else HAS_BASE),
    )


def _decode_header(data: Buffer) -> tuple[Described, int]:
    """Return what a header says, and its flags; raises CorruptionError (``bad_record``) if it breaks a rule."""
    chunk, base, digest, decoded_nbytes, encoded_nbytes, encoding, width, flags = _RECORD.unpack(data)
    if (
        encoded_nbytes > MAX_ENCODED_NBYTES
        or not 0 < decoded_nbytes <= MAX_CELL_NBYTES
        or width not in LANE_WIDTHS
        or decoded_nbytes % width
        or bool(flags & HAS_BASE) == (base == _NO_CHUNK)
    ):
        raise CorruptionError("a blob came with a header that breaks the rules of the wire", kind="bad_record")
    of = ChunkId(base) if flags & HAS_BASE else None
    return Described(ChunkId(chunk), of, digest, decoded_nbytes, encoded_nbytes, encoding, width), flags


def decode_headers(data: Buffer) -> list[Described]:
    """Return what headers say, one after another; raises CorruptionError (``bad_record``)."""
    view = memoryview(data)
    if view.nbytes % _RECORD.size:
        raise CorruptionError("there is a piece of a header at the end", kind="bad_record")
    return [_decode_header(view[at : at + _RECORD.size])[0] for at in range(0, view.nbytes, _RECORD.size)]


def encode_reading(reading: Reading) -> list[Buffer]:
    """Return what it takes to have a cell as it travels."""
    parts: list[Buffer] = [_CHAIN.pack(len(reading.chain))]
    for blob in reading.chain:
        parts += encode_record(blob)
    return parts


def frames(parts: Iterable[Buffer], *, position: int | None = None) -> Iterator[bytes]:
    """Cut a run of bytes into messages of :data:`FRAME_NBYTES`, the last shorter.

    With ``position``, which is that of the first byte, each message begins with its own (:data:`POSITION`).
    """
    waiting: list[Buffer] = []
    nbytes = 0

    def message(last: memoryview) -> bytes:
        nonlocal position
        head = []
        if position is not None:
            head = [POSITION.pack(position)]
            position += nbytes + last.nbytes
        return b"".join([*head, *waiting, last])

    for part in parts:
        view = memoryview(part)
        while nbytes + view.nbytes >= FRAME_NBYTES:
            cut = FRAME_NBYTES - nbytes
            yield message(view[:cut])
            waiting, nbytes, view = [], 0, view[cut:]
        if view.nbytes:
            waiting.append(view)
            nbytes += view.nbytes
    if waiting:
        yield message(memoryview(b""))


class RecordParser:
    """Finds records in a run of bytes that comes in pieces, cut anywhere."""

    def __init__(self) -> None:
        self._pieces: deque[memoryview] = deque()
        self._nbytes = 0

    def feed(self, piece: Buffer) -> None:
        """Take the next piece."""
        view = memoryview(piece)
        self._nbytes += view.nbytes
        if self._pieces and max(view.nbytes, self._pieces[-1].nbytes) < _SMALL_NBYTES:
            view = memoryview(b"".join((self._pieces.pop(), view)))
        if view.nbytes:
            self._pieces.append(view)

    @property
    def waiting_nbytes(self) -> int:
        """Bytes that belong to what is not whole yet."""
        return self._nbytes

    def record(self) -> tuple[Blob, int] | None:
        """Return the next blob with its flags, or None until all of it has come.

        Raises CorruptionError for a record that breaks a rule, or whose payload is not what was sent.
        """
        if self._nbytes < _RECORD.size:
            return None
        found, flags = _decode_header(self._peek(_RECORD.size))
        if self._nbytes < _RECORD.size + found.encoded_nbytes:
            return None
        self._take(_RECORD.size)
        payload = self._take(found.encoded_nbytes)
        if blob_digest(payload) != found.digest:
            raise CorruptionError("a blob was changed on its way: try again", kind="changed_on_its_way")
        blob = Blob(
            found.chunk, found.encoding, found.width, found.decoded_nbytes, payload, found.base, digest=found.digest
        )
        return blob, flags

    def chain_length(self) -> int | None:
        """Return the number of blobs of the next cell, or None until it has come."""
        if self._nbytes < _CHAIN.size:
            return None
        (count,) = _CHAIN.unpack(self._take(_CHAIN.size))
        return int(count)

    def _peek(self, nbytes: int) -> bytes:
        found = bytearray()
        for piece in self._pieces:
            found += piece[: nbytes - len(found)]
            if len(found) == nbytes:
                break
        return bytes(found)

    def _take(self, nbytes: int) -> Buffer:
        """Return the next bytes: in place if they lie in one piece."""
        self._nbytes -= nbytes
        if self._pieces and self._pieces[0].nbytes > nbytes:
            first = self._pieces[0]
            self._pieces[0] = first[nbytes:]
            return first[:nbytes]
        taken: list[memoryview] = []
        while nbytes:
            piece = self._pieces[0]
            if piece.nbytes <= nbytes:
                taken.append(self._pieces.popleft())
            else:
                taken.append(piece[:nbytes])
                self._pieces[0] = piece[nbytes:]
            nbytes -= taken[-1].nbytes
        return taken[0] if len(taken) == 1 else b"".join(taken)


def decode_readings(messages: Iterable[bytes], cells: Iterable[Cell]) -> Iterator[Reading]:
    """Yield what it takes to have each of ``cells`` from the messages of a Read.

    Raises CorruptionError if they end early, go on too long, or break a rule.
    """
    parser = RecordParser()
    source = iter(messages)

    def wait(found: Callable[[], Item | None]) -> Item:
        while (item := found()) is None:
            piece = next(source, None)
            if piece is None:
                raise CorruptionError("the server stopped before all was read: try again", kind="short_stream")
            parser.feed(piece)
        return item

    for cell in cells:
        count = wait(parser.chain_length)
        if count > _LONGEST_CHAIN:
            raise CorruptionError(f"the server sent a chain of {count} blobs", kind="bad_chain")
        yield Reading(cell, tuple(wait(parser.record)[0] for _ in range(count)))
    if parser.waiting_nbytes or any(source):
        raise CorruptionError("the server sent more than was asked for", kind="long_stream")


# -- objects -----------------------------------------------------------------------------------------------------------


def encode_object(name: str, data: bytes) -> Iterator[pb.AuditReply]:
    """Yield an object as it travels."""
    for start in range(0, max(len(data), 1), FRAME_NBYTES):
        yield pb.AuditReply(name="" if start else name, data=data[start : start + FRAME_NBYTES])


def decode_objects(messages: Iterable[pb.AuditReply], *, most_nbytes: int) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each object; raises CorruptionError for one that is longer, or has no name."""
    name, data = "", bytearray()
    for message in messages:
        if message.name:
            if name:
                yield name, bytes(data)
            name, data = message.name, bytearray()
        data += message.data
        if not name or len(data) > most_nbytes:
            raise CorruptionError("the server sent what is no object", kind="bad_reply")
    if name:
        yield name, bytes(data)


def batches(
    items: Iterable[Item], size: int, *, nbytes: Callable[[Item], int] = lambda item: 0, most_nbytes: int = 1
) -> Iterator[list[Item]]:
    """Yield lists of ``size`` items, the last shorter; one ends before that with the item that makes most_nbytes."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += nbytes(item)
        if len(batch) == size or total >= most_nbytes:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
