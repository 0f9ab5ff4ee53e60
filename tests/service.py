"""A service for tests, and a client that knows nothing but the wire."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from lamella_engine.codecs import Encoding
from lamella_engine.content_store.acting import new_push_id, now
from lamella_engine.content_store.seam import Blob, Planned
from lamella_engine.dtypes import dtype_of_numpy
from lamella_engine.errors import LamellaError
from lamella_engine.format.digests import Context, chunk_id, digest
from lamella_engine.format.manifest import CellPage, CellTable, StructurePage, structure_id, structure_pages
from lamella_engine.format.version import Description, encode_description
from lamella_engine.model import Cell, PushId, TensorSpec, VersionId
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service.server import Server
from lamella_engine.wire import CHANNEL_OPTIONS, ERROR_TRAILER, METHODS, decode_error, encode_planned, encode_record


@contextmanager
def serving(root: Path | str, listen: str = "127.0.0.1:0", **options: Any) -> Iterator[Server]:
    """Run a server in this process; without TLS it trusts the loopback address."""
    server = Server(str(root), listen, **{"insecure_loopback": "tls" not in options, **options})
    server.start()
    try:
        yield server
    finally:
        server.stop(grace_s=0)


@dataclass(frozen=True)
class Failure(Exception):
    """What a server answered in place of a reply."""

    status: grpc.StatusCode
    details: str
    error: LamellaError | None
    trailers: dict[str, Any]

    @property
    def kind(self) -> str:
        return "" if self.error is None else self.error.kind


class WireClient:
    """Calls rpcs by their names with messages, or raw bytes."""

    def __init__(
        self, address: str, *, token: str = "", credentials: grpc.ChannelCredentials | None = None, options: Any = ()
    ) -> None:
        options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1), *options)
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            self.channel = grpc.secure_channel(address, credentials, options)
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def __enter__(self) -> "WireClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.channel.close()

    def call(self, name: str, request: Any, *, timeout: float | None = 20.0, metadata: Any = None) -> Any:
        """Return the reply, or the list of replies; raises Failure."""
        method = METHODS[name]
        stub = getattr(self.channel, method.shape)(method.path)
        given = self.metadata if metadata is None else metadata
        data: Any = _bytes(request)
        if method.streams_requests:
            data = map(_bytes, request)
        try:
            found = stub(data, timeout=timeout, metadata=given)
            replies = list(found) if method.streams_replies else [found]
        except grpc.RpcError as error:
            raise failure_of(error) from None
        if method.reply is not None:
            replies = [method.reply.FromString(reply) for reply in replies]
        return replies if method.streams_replies else replies[0]


def _bytes(message: Any) -> Any:
    if isinstance(message, bytes) or not hasattr(message, "SerializeToString"):
        return message
    return message.SerializeToString()


def failure_of(error: Any) -> Failure:
    """Return what an error of gRPC says."""
    trailers = dict(error.trailing_metadata() or ())
    data = trailers.get(ERROR_TRAILER)
    return Failure(error.code(), error.details(), None if data is None else decode_error(data), trailers)


@dataclass(frozen=True)
class Taken:
    """A version taken apart by hand: what a client of another make would send."""

    planned: list[Planned]
    chunks: dict[bytes, tuple[bytes, int]]
    """Chunk id -> its bytes, and the bytes of a lane."""
    description: bytes

    def records(self, *, skip: int = 0) -> bytes:
        """Return every chunk as a record, in full, without the first ``skip``."""
        blobs = [Blob(id, Encoding.RAW, width, len(data), data, None) for id, (data, width) in self.chunks.items()]
        return b"".join(part for blob in blobs[skip:] for part in map(bytes, encode_record(blob)))


def take_apart(
    tensors: Mapping[str, np.ndarray], model: str, push: PushId, *, parent: str = "", message: str = ""
) -> Taken:
    """Take tensors of one cell each, none so short that it stands in its row, apart."""
    structure = [TensorSpec(name, dtype_of_numpy(tensors[name].dtype), tensors[name].shape) for name in sorted(tensors)]
    assert all(spec.grid.cell_count == 1 and spec.nbytes > 32 for spec in structure)
    ((page, _),) = structure_pages(structure)
    cells = [(Cell(spec.name, 0), tensors[spec.name].tobytes(), spec.dtype.lane) for spec in structure]
    table = CellTable(0)
    for _, data, _ in cells:
        table.add(chunk_id(data))
    ((rows, _),) = table.pages()
    cells += [(Cell(None, 0), page, 1), (Cell(None, 1), rows, 1)]
    shape = structure_id([page])
    ids = b"".join(chunk_id(data) for cell, data, _ in cells if cell.tensor is not None)
    description = Description(
        model=model,
        push=push,
        structure_id=shape,
        parameters_id=digest(Context.PARAMETERS, bytes.fromhex(shape) + ids).hex(),
        tensor_count=len(structure),
        cell_count=len(structure),
        decoded_nbytes=sum(spec.nbytes for spec in structure),
        pages=(
            StructurePage(chunk_id(page), len(page), structure[0].name, 0, (CellPage(chunk_id(rows), len(rows), 0),)),
        ),
        attachments=(),
        parents=(VersionId(parent),) if parent else (),
        message=message,
        author="somebody",
        created=now(),
        metrics={},
        recipe=None,
    )
    planned = [Planned(cell, chunk_id(data)) for cell, data, _ in cells]
    return Taken(planned, {chunk_id(data): (data, lane) for _, data, lane in cells}, encode_description(description))


def write_messages(repository: str, push: str, records: bytes, *, start: int = 0) -> Iterator[bytes]:
    """Yield the messages of a Write that carries ``records`` from their byte ``start`` on."""
    yield pb.WriteHeader(repository=repository, push=push).SerializeToString()
    for at in range(start, len(records), 1 << 20):
        yield at.to_bytes(8, "little") + records[at : at + (1 << 20)]


def push_by_wire(
    client: WireClient, repository: str, target: str, tensors: Mapping[str, np.ndarray], *, message: str = ""
) -> pb.Version:
    """Push tensors, each in full, by nothing but the wire; return the version."""
    push = new_push_id()
    commit = prepare_by_wire(client, repository, target, tensors, push, message=message)
    return client.call("Pushes.Commit", commit)


def prepare_by_wire(
    client: WireClient,
    repository: str,
    target: str,
    tensors: Mapping[str, np.ndarray],
    push: PushId,
    *,
    message: str = "",
) -> pb.CommitRequest:
    """Do all of a push but its commit; return what is to be committed."""
    model, branch = target.split("@")
    begin = pb.BeginRequest(repository=repository, push=push, model=model, branch=branch)
    parents = client.call("Pushes.Begin", begin).parents
    taken = take_apart(tensors, model, push, parent=parents[0].id if parents else "", message=message)
    cells = [encode_planned(planned) for planned in taken.planned]
    plan = client.call("Pushes.Plan", pb.PlanRequest(repository=repository, push=push, cells=cells))
    wanted = {item.chunk for item, answer in zip(taken.planned, plan.answers, strict=True) if answer.missing}
    lacking = Taken([], {id: chunk for id, chunk in taken.chunks.items() if id in wanted}, b"")
    records = lacking.records()
    *_, last = client.call("Pushes.Write", write_messages(repository, push, records))
    assert int.from_bytes(last, "little") == len(records)
    return pb.CommitRequest(repository=repository, push=push, description=taken.description)
