"""The content of a repository that a service has. What is read is what the version names, whoever answers."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from types import MappingProxyType
from typing import TypeVar

from lamella_engine.content_store.decoding import decode_chain
from lamella_engine.content_store.manifest import Manifest
from lamella_engine.content_store.revisions import parse_revision
from lamella_engine.content_store.seam import Reading, Recorded, RefUpdate, Stored
from lamella_engine.errors import CorruptionError, LamellaError, RefNotFoundError, StorageError
from lamella_engine.executor import Executor
from lamella_engine.model import Cell, ChunkId, PushId, RefInfo, RefKind, VersionId, check_name, check_ref_name
from lamella_engine.remote.cache import ChunkCache
from lamella_engine.remote.caching import read_through
from lamella_engine.remote.channel import PATIENCE_S, Channel, Patience, patiently
from lamella_engine.remote.direct import Way
from lamella_engine.remote.push import RemotePush
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.wire import MAX_MESSAGE_NBYTES, batches, decode_readings, decode_version, encode_cells

Item = TypeVar("Item")
Answer = TypeVar("Answer")

VERSIONS_KEPT = 16
"""Versions kept with their parsed pages: they never change."""

# Cells that are asked for at a time. Blobs come as they are taken, whatever their number, so this only bounds the
# request, and how long one call keeps others from their turn.
_CELLS_AT_ONCE = 4096

# Pages of a manifest that are read together: all of a model of a few hundred tensors, little of one of many.
_PAGES_NBYTES = 256 << 10


class RemoteStore:
    """See :class:`~lamella_engine.content_store.seam.ContentStore`.

    Parameters
    ----------
    channel
        The service.
    repository
        The repository's name there.
    executor
        Runs what is done for each chunk; closed with the store.
    cache
        Chunks that are here.
    direct
        Whether the service lets clients put packs into its bucket by themselves.
    """

    vouches = False  # the digest of a payload is the service's own word

    def __init__(
        self, channel: Channel, repository: str, executor: Executor, cache: ChunkCache, *, direct: bool = False
    ) -> None:
        self.channel = channel
        self.repository = repository
        self.executor = executor
        self.cache = cache
        self._way = Way(direct, in_the_clear=not channel.secure)
        self._versions: OrderedDict[VersionId, tuple[Recorded, Manifest]] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Release what is held. Idempotent."""
        self.channel.close()
        self.executor.close()

    # -- versions -----------------------------------------------------------------------------------------------------

    def resolve(self, revision: str) -> VersionId:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        parsed = parse_revision(revision)
        request = pb.ResolveRequest(repository=self.repository, revision=revision)
        found = decode_version(self.channel.call("Versions.Resolve", request))
        if not parsed.ancestors and not (
            found.id.startswith(parsed.id_prefix or "")
            and found.model == (parsed.model or found.model)
            and found.number == (parsed.number or found.number)
        ):
            raise _another_version()
        self._keep(found)
        return found.id

    def version(self, id: VersionId) -> Recorded:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        return self._opened(id)[0]

    def manifest(self, id: VersionId) -> Manifest:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        return self._opened(id)[1]

    def _opened(self, id: VersionId) -> tuple[Recorded, Manifest]:
        with self._lock:
            found = self._versions.get(id)
            if found is not None:
                self._versions.move_to_end(id)
                return found
        request = pb.VersionRequest(repository=self.repository, id=id)
        recorded = decode_version(self.channel.call("Versions.Get", request))
        if recorded.id != id:
            raise _another_version()
        return self._keep(recorded)

    def _keep(self, recorded: Recorded) -> tuple[Recorded, Manifest]:
        with self._lock:
            found = self._versions.get(recorded.id)
            if found is None:
                found = recorded, Manifest(recorded.description, _Pages(self, recorded).load)
                self._versions[recorded.id] = found
                if len(self._versions) > VERSIONS_KEPT:
                    self._versions.popitem(last=False)
            return found

    def ancestors(self, id: VersionId) -> Iterator[Recorded]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        following: VersionId | None = id

        def ask() -> Iterator[Recorded]:
            request = pb.VersionRequest(repository=self.repository, id=following or "")
            return map(decode_version, self.channel.stream("Versions.Ancestors", request))

        patience = Patience()
        while following is not None:
            try:
                for recorded in ask():
                    if recorded.id != following:
                        raise _another_version()
                    following = recorded.parents[0].id if recorded.parents else None
                    patience.renew()
                    yield recorded
                if following is not None:
                    raise CorruptionError(f"the service has no parent {following[:12]}", kind="missing_version")
            except LamellaError as error:
                patience.wait(error)

    def models(self) -> list[str]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        request = pb.RepositoryRequest(repository=self.repository)
        replies = patiently(lambda: list(self.channel.stream("Versions.Models", request)))
        return [name for reply in replies for name in reply.models]

    def refs(self, model: str) -> list[RefInfo]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        request = pb.RefsRequest(repository=self.repository, model=model)
        replies = patiently(lambda: list(self.channel.stream("Versions.Refs", request)))
        return [RefInfo(model, ref.name, _kind(ref.kind), ref.number) for reply in replies for ref in reply.refs]

    def watch(self, model: str, ref: str, after: int) -> Iterator[Recorded]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        patience = Patience()
        while True:
            began = time.monotonic()
            request = pb.WatchRequest(repository=self.repository, model=model, ref=ref, after=after)
            try:
                with closing(self.channel.stream("Versions.Watch", request)) as versions:
                    for message in versions:
                        recorded = decode_version(message)
                        if recorded.model != model:
                            raise _another_version()
                        self._keep(recorded)
                        after = recorded.number
                        patience.renew()
                        yield recorded
            except LamellaError as error:
                if time.monotonic() - began > PATIENCE_S:  # it was well for long, such as until its deadline
                    patience.renew()
                patience.wait(error)

    # -- cells --------------------------------------------------------------------------------------------------------

    def read(self, id: VersionId, cells: Iterable[Cell], have: VersionId | None = None) -> Iterator[Reading]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`.

        What the cache has is not asked for. It is left alone where the caller has a version to go on from: whoever
        follows one version after another would only write there.
        """
        if have is None and self.cache.on:
            return read_through(self.cache, self, id, cells)
        return self.fetch(id, cells, have)

    def fetch(
        self,
        id: VersionId,
        cells: Iterable[Cell],
        have: VersionId | None = None,
        *,
        held: Mapping[Cell, ChunkId] = MappingProxyType({}),
    ) -> Iterator[Reading]:
        """Yield what :meth:`read` does, all of it from the service.

        ``held`` names, for some cells, a chunk that the caller holds, in addition to those of ``have``.
        """
        manifest = self.manifest(id)
        whole = None if have is None else self.manifest(have)

        def ask(request: pb.ReadRequest, some: Sequence[Cell]) -> Generator[Reading]:
            with closing(self.channel.stream("Versions.Read", request)) as messages:
                for reading in decode_readings(messages, some):
                    if reading.chain or not _is_held(manifest, reading.cell, held.get(reading.cell), whole):
                        _check_names(manifest, reading)
                    yield reading

        return self._asked(id, cells, ask, have=have, held=held)

    def locate(self, id: VersionId, cells: Iterable[Cell]) -> Iterator[tuple[Cell, tuple[Stored, ...]]]:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""

        def ask(request: pb.ReadRequest, some: Sequence[Cell]) -> Generator[tuple[Cell, tuple[Stored, ...]]]:
            replies = self.channel.stream("Versions.Locate", request)
            chains = (chain for reply in replies for chain in reply.chains)
            for cell, chain in zip(some, chains, strict=False):
                blobs = (Stored(ChunkId(blob.chunk), blob.decoded_nbytes, blob.encoded_nbytes) for blob in chain.blobs)
                yield cell, tuple(blobs)

        return self._asked(id, cells, ask)

    def _asked(
        self,
        id: VersionId,
        cells: Iterable[Cell],
        ask: Callable[[pb.ReadRequest, Sequence[Cell]], Generator[Answer]],
        *,
        have: VersionId | None = None,
        held: Mapping[Cell, ChunkId] = MappingProxyType({}),
    ) -> Iterator[Answer]:
        """Yield one answer for each cell; ask again, from the first that was not answered, when that may help."""
        for some in batches(cells, _CELLS_AT_ONCE, nbytes=_name_nbytes, most_nbytes=MAX_MESSAGE_NBYTES // 2):
            patience = Patience()
            while some:
                runs = encode_cells((cell, held.get(cell)) for cell in some)
                request = pb.ReadRequest(repository=self.repository, version=id, have=have or "", cells=runs)
                answered = 0
                try:
                    with closing(ask(request, some)) as answers:
                        for answer in answers:
                            answered += 1
                            yield answer
                    if answered < len(some):
                        raise CorruptionError("the service stopped before all was read", kind="short_stream")
                except LamellaError as error:
                    if answered:
                        patience.renew()
                    patience.wait(_lost_on_the_way(error))
                some = some[answered:]

    # -- changes ------------------------------------------------------------------------------------------------------

    def begin(
        self, model: str, branch: str, *, parent: VersionId | None, push_id: PushId, part: bool = False
    ) -> RemotePush:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`. A service looks at packs once for all parts."""
        check_name(model, what="model")
        check_ref_name(branch)
        return RemotePush(
            self.channel,
            self.repository,
            self.cache,
            model=model,
            branch=branch,
            parent=parent,
            push_id=push_id,
            part=part,
            keep=lambda recorded: self._keep(recorded)[0],
            way=self._way,
        )

    def update_refs(self, updates: Sequence[RefUpdate]) -> None:
        """See :class:`~lamella_engine.content_store.seam.ContentStore`."""
        items = [pb.RefUpdate(model=item.model, name=item.name, kind=item.kind, number=item.number) for item in updates]
        request = pb.UpdateRefsRequest(repository=self.repository, updates=items)
        patience = Patience()
        unanswered = False
        while True:
            try:
                self.channel.call_once("Versions.UpdateRefs", request)
            except LamellaError as error:
                if unanswered and isinstance(error, RefNotFoundError) and self._stand(updates):
                    return  # the call before this one, whose answer was lost, deleted them
                patience.wait(error)
                unanswered = True
            else:
                return

    def _stand(self, updates: Iterable[RefUpdate]) -> bool:
        """Whether all refs stand as they were to."""
        return all(
            {ref.name: ref.number for ref in self.refs(update.model)}.get(update.name) == update.number
            for update in updates
        )


def _name_nbytes(cell: Cell) -> int:
    return len((cell.tensor or "").encode())


class _Pages:
    """Reads the pages of one version's manifest, and some that follow with each.

    Parameters
    ----------
    store
        Where from.
    recorded
        The version.
    """

    def __init__(self, store: RemoteStore, recorded: Recorded) -> None:
        self._store = store
        self._id = recorded.id
        self._chunks = recorded.description.manifest_chunks
        self._page_count = sum(1 + len(page.cells) for page in recorded.description.pages)
        self._ahead: dict[int, bytes] = {}

    def load(self, place: int) -> bytes:
        """Return the bytes of a manifest chunk; raises CorruptionError unless they are what the version names."""
        known = self._ahead.pop(place, None) or self._store.cache.get(self._chunks[place][0])
        if known is not None:
            return bytes(known)
        cells = [Cell(None, place)]
        nbytes = self._chunks[place][1]
        for following in range(place + 1, self._page_count if place < self._page_count else 0):
            nbytes += self._chunks[following][1]
            if nbytes > _PAGES_NBYTES:
                break
            cells.append(Cell(None, following))
        found = {cell.number: page for cell, page in self._read(cells)}
        data = found.pop(place)
        self._ahead = found  # another thread may do the same: what it read ahead is then read again
        return data

    def _read(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, bytes]]:
        for cell, chain in self._store.fetch(self._id, cells):
            chunk, nbytes = self._chunks[cell.number]
            out = bytearray(nbytes)
            decode_chain(chain, memoryview(out), check=True)
            self._store.cache.add(chunk, out)
            yield cell, bytes(out)


def _is_held(manifest: Manifest, cell: Cell, held: ChunkId | None, whole: Manifest | None) -> bool:
    """Whether a cell is the chunk that the caller holds for it, or the same as in a version that they hold."""
    if cell.tensor is None:
        return False
    content = manifest.row(cell.tensor, cell.number).content
    if whole is not None and whole.holds(manifest.spec(cell.tensor)):
        return content in (held, whole.row(cell.tensor, cell.number).content)
    return content == held


def _check_names(manifest: Manifest, reading: Reading) -> None:
    """Raise CorruptionError unless a chain is said to lead to the chunk that the version names."""
    cell, chain = reading
    if cell.tensor is None:
        named: object = manifest.description.manifest_chunks[cell.number][0]
    else:
        row = manifest.row(cell.tensor, cell.number)
        named = row.content
        if row.inline is not None and chain:
            named = chain[-1].chunk if bytes(chain[-1].payload) == row.inline else None
    if not chain or chain[-1].chunk != named:
        raise CorruptionError(
            "the service sent another chunk than the version names", kind="another_chunk", tensor=cell.tensor
        )


def _lost_on_the_way(error: LamellaError) -> LamellaError:
    """Return an error as one that may pass, if what was damaged is not what is stored, but what was sent."""
    if isinstance(error, CorruptionError) and error.kind in ("changed_on_its_way", "short_stream"):
        return StorageError(error.message, kind=error.kind, transient=True)
    return error


def _another_version() -> CorruptionError:
    return CorruptionError("the service sent another version than was asked for", kind="another_version")


def _kind(text: str) -> RefKind:
    if text not in ("branch", "tag", "alias"):
        raise CorruptionError(f"the service has a ref of kind {text!r}", kind="bad_reply")
    return text  # type: ignore[return-value]
