"""What each rpc of the wire does: messages in, nouns to the engine, messages out."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from lamella_engine.auditing import stored
from lamella_engine.checkpoints import check_attachment_paths
from lamella_engine.content_store.acting import acting_as, now
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.content_store.seam import Recorded, RefUpdate
from lamella_engine.distance import common, sums
from lamella_engine.errors import CorruptionError, InvalidInputError, LimitError, RefNotFoundError, StorageError
from lamella_engine.executor import Executor
from lamella_engine.format.audit import Read
from lamella_engine.format.manifest import parse_structure_page
from lamella_engine.format.version import decode_description, encode_description, version_id
from lamella_engine.jobs import LocalJobs
from lamella_engine.maintenance import Verification, verifying
from lamella_engine.model import Cell, ChunkId, PushId, VersionId, check_name, check_ref_name
from lamella_engine.reading import Reader, select
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.service.access import Principal, Resource, Verb, authorize
from lamella_engine.service.audit import ReadAudit
from lamella_engine.service.quotas import Quotas
from lamella_engine.service.repositories import Repositories
from lamella_engine.service.sessions import Session, Sessions
from lamella_engine.service.slots import Slots
from lamella_engine.service.tokens import Grant, Tokens
from lamella_engine.service.verifying import Verifier
from lamella_engine.sketches import parse as parse_sketch
from lamella_engine.wire import (
    POSITION,
    batches,
    decode_cells,
    decode_headers,
    decode_planned,
    encode_answer,
    encode_object,
    encode_parents,
    encode_reading,
    encode_version,
    frames,
    parse,
)

Item = TypeVar("Item")

PLANNED_AT_ONCE = 4096
"""Most cells of a PlanRequest."""

# Cells whose chains are answered in one message of Locate.
_LOCATED_AT_ONCE = 1024

# Names in one message, and their characters.
_NAMES_AT_ONCE, _NAMES_NBYTES = 10_000, 512 << 10

# How often a job says how far it has come.
_PROGRESS_S = 1.0

# How often a follower looks for versions that another server published; those of this one wake it.
_WATCH_S = 1.0

# Streams of blobs at a time, in either direction: a push may hold two packs of 64 MiB, a read a window of 16 MiB.
_WRITERS, _READERS = 8, 16
# Calls that wait for a version to be published: each holds a thread.
_WATCHERS = 64


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of a call besides its message."""

    principal: Principal
    active: Callable[[], bool]
    """Whether somebody still waits for the answer."""
    remaining_s: Callable[[], float]
    """Seconds until its deadline."""
    peer: str = ""
    """The address that it came from."""
    stopping: Callable[[], bool] = lambda: False
    """Whether the server is being stopped, which those that only wait shall not hold up."""

    def check(self) -> None:
        """Raise StorageError if nobody waits for the answer any more."""
        if not self.active() or self.remaining_s() <= 0:
            raise StorageError("the client has gone, or its deadline has come", kind="cancelled", transient=True)


class Rpcs:
    """The rpcs of one server process, each a method named like it; raise LamellaError. Safe for several threads.

    With a ``verifier`` clients may put packs into the bucket by themselves, which it is told of.
    """

    def __init__(
        self,
        repositories: Repositories,
        tokens: Tokens,
        executor: Executor,
        quotas: Quotas,
        verifier: Verifier | None = None,
    ) -> None:
        self._repositories = repositories
        self._verifier = verifier
        self._tokens = tokens
        self._executor = executor
        self.sessions = Sessions(quotas)
        self._writers = Slots(_WRITERS)
        self._readers = Slots(_READERS)
        self._watchers = Slots(_WATCHERS)
        self._published: WeakKeyDictionary[PackedStore, threading.Condition] = WeakKeyDictionary()
        self._audits: dict[str, ReadAudit] = {}
        """By repository; unlike it they stay, for what they have noted has to be vouched for."""
        self._audits_lock = threading.Lock()

    # -- audit --------------------------------------------------------------------------------------------------------

    def note(self, rpc: str, repository: str, what: str, call: Call) -> None:
        """Note a call that is allowed, before it is answered: nothing that was read goes unnoted."""
        store = self._repositories.open(repository)
        with self._audits_lock:
            audit = self._audits.get(repository) or self._audits.setdefault(repository, ReadAudit(store))
        audit.go_on(store.log)
        audit.note(Read(now(), call.principal.name, call.peer, rpc, what, "ALLOWED"))

    def keep_audits(self, *, written_s: float = 0.0, vouched_s: float = 0.0) -> None:
        """Write what was noted so long ago, and have logs vouch for what was written so long ago."""
        with self._audits_lock:
            audits = list(self._audits.values())
        for audit in audits:
            audit.flush(older_than_s=written_s)
            audit.vouch(older_than_s=vouched_s)

    # -- repositories -------------------------------------------------------------------------------------------------

    def repositories_create(self, request: pb.CreateRequest, call: Call) -> pb.RepositoryInfo:
        """Make a repository."""
        return self._info(self._repositories.create(request.repository, max_depth=request.max_depth))

    def repositories_describe(self, request: pb.DescribeRequest, call: Call) -> pb.RepositoryInfo:
        """Say what a client has to know."""
        store = self._repositories.open(request.repository)
        store.log.refresh()
        info = self._info(store)
        if request.HasField("seen"):
            info.seen_digest = store.log.digest_at(request.seen) or b""
        return info

    def _info(self, store: PackedStore) -> pb.RepositoryInfo:
        state = store.log.state
        genesis = state.genesis
        return pb.RepositoryInfo(
            id=genesis.repository,
            max_depth=genesis.max_depth,
            head=state.number,
            head_digest=state.digest,
            grants=self._verifier is not None,
        )

    def repositories_stats(self, request: pb.RepositoryRequest, call: Call) -> pb.StatsReply:
        """Say how large a repository is."""
        found = LocalJobs(self._repositories.open(request.repository), self._executor).stats()
        return pb.StatsReply(
            models=found.models,
            versions=found.versions,
            packs=found.packs,
            decoded_nbytes=found.decoded_nbytes,
            stored_nbytes=found.stored_nbytes,
        )

    # -- versions -----------------------------------------------------------------------------------------------------

    def versions_resolve(self, request: pb.ResolveRequest, call: Call) -> pb.Version:
        """Return the version that a revision names."""
        store = self._repositories.open(request.repository)
        return _version(store.version(store.resolve(request.revision)))

    def versions_get(self, request: pb.VersionRequest, call: Call) -> pb.Version:
        """Return a version by its id."""
        store = self._repositories.open(request.repository)
        store.log.refresh()
        return _version(store.version(_version_id(request.id)))

    def versions_ancestors(self, request: pb.VersionRequest, call: Call) -> Iterator[pb.Version]:
        """Yield a version and those before it."""
        store = self._repositories.open(request.repository)
        return map(_version, store.ancestors(_version_id(request.id)))

    def versions_models(self, request: pb.RepositoryRequest, call: Call) -> Iterator[pb.ModelsReply]:
        """Yield the names of all models."""
        models = self._repositories.open(request.repository).models()
        return (pb.ModelsReply(models=some) for some in _by_message(models, nbytes=len))

    def versions_refs(self, request: pb.RefsRequest, call: Call) -> Iterator[pb.RefsReply]:
        """Yield the refs of a model."""
        refs = self._repositories.open(request.repository).refs(request.model)
        for some in _by_message(refs, nbytes=lambda ref: len(ref.name)):
            yield pb.RefsReply(refs=[pb.Ref(name=ref.name, kind=ref.kind, number=ref.number) for ref in some])

    def versions_update_refs(self, request: pb.UpdateRefsRequest, call: Call) -> pb.Empty:
        """Set or delete refs."""
        store = self._repositories.open(request.repository)
        updates = [
            RefUpdate(item.model, item.name, _kind(item.kind), item.number if item.HasField("number") else None)
            for item in request.updates
        ]
        with acting_as(call.principal.name):
            store.update_refs(updates)
        self._publish(store)
        return pb.Empty()

    def versions_watch(self, request: pb.WatchRequest, call: Call) -> Iterator[pb.Version]:
        """Yield versions as a ref comes to stand at them."""
        store = self._repositories.open(request.repository)
        check_name(request.model, what="model")
        check_ref_name(request.ref)
        published = self._publications(store)
        last = request.after
        with self._watchers.taken(call.principal.name):
            while call.active() and call.remaining_s() > 0 and not call.stopping():
                ref = store.log.refresh().ref(request.model, request.ref)
                if ref is None:
                    raise RefNotFoundError(f"there is no {request.model}@{request.ref}", ref=request.ref)
                if ref.number != last:
                    last = ref.number
                    yield _version(store.version(store.resolve(f"{request.model}@v{last}")))
                else:
                    with published:
                        published.wait(min(_WATCH_S, max(call.remaining_s(), 0.0)))

    def _publications(self, store: PackedStore) -> threading.Condition:
        return self._published.setdefault(store, threading.Condition())  # atomic, unlike a defaultdict of these

    def _publish(self, store: PackedStore) -> None:
        published = self._publications(store)
        with published:
            published.notify_all()

    def versions_locate(self, request: pb.ReadRequest, call: Call) -> Iterator[pb.LocateReply]:
        """Yield what it takes to have cells."""
        store = self._repositories.open(request.repository)
        cells = (cell for cell, _ in decode_cells(request.cells))
        located = store.locate(_version_id(request.version), cells)
        for batch in batches(located, _LOCATED_AT_ONCE):
            chains = [pb.Chain(blobs=[pb.StoredBlob(**blob._asdict()) for blob in chain]) for _, chain in batch]
            yield pb.LocateReply(chains=chains)

    def versions_read(self, request: pb.ReadRequest, call: Call) -> Iterator[bytes]:
        """Yield what it takes to have cells, with payloads."""
        store = self._repositories.open(request.repository)
        have = _version_id(request.have) if request.have else None
        held: dict[Cell, ChunkId] = {}

        def cells() -> Iterator[Cell]:
            for cell, chunk in decode_cells(request.cells):
                if chunk is not None:
                    held[cell] = chunk
                yield cell

        with self._readers.taken(call.principal.name):
            readings = store.read(_version_id(request.version), cells(), have, held=held)
            yield from frames(part for reading in readings for part in encode_reading(reading))

    # -- pushes -------------------------------------------------------------------------------------------------------

    def pushes_begin(self, request: pb.BeginRequest, call: Call) -> pb.BeginReply:
        """Start a push, or find it started."""
        store = self._repositories.open(request.repository)
        if self._verifier is not None:
            self._verifier.look_once(store)
        parent = _version_id(request.parent) if request.parent else None
        session, taken = self.sessions.begin(
            store,
            call.principal.name,
            _push_id(request.push),
            model=request.model,
            branch=request.branch,
            parent=parent,
            again=request.again,
            part=request.part,
        )
        return pb.BeginReply(parents=encode_parents(session.push.parents), taken=taken)

    def _session(self, repository: str, push: str, call: Call) -> tuple[PackedStore, Session]:
        store = self._repositories.open(repository)
        session = self.sessions.get(store, call.principal.name, _push_id(push))
        # Somebody may have several tokens, not all of them for this branch.
        branch = f"{session.push.model}@{session.push.branch}"
        authorize(call.principal, Verb.PUSH, Resource(repository, (branch,)))
        return store, session

    def pushes_consider(self, request: pb.ConsiderRequest, call: Call) -> pb.Empty:
        """Let bases be chosen by a sketch."""
        _, session = self._session(request.repository, request.push, call)
        with _handed_in():
            structure = [spec for page in request.pages for spec in parse_structure_page(page)]
        session.consider(parse_sketch(structure, dict(request.lanes)))
        return pb.Empty()

    def pushes_plan(self, request: pb.PlanRequest, call: Call) -> pb.PlanReply:
        """Say which chunks are missing."""
        _, session = self._session(request.repository, request.push, call)
        if len(request.cells) > PLANNED_AT_ONCE:
            raise LimitError(f"at most {PLANNED_AT_ONCE} cells can be planned at a time", kind="too_many_cells")
        answers = session.plan(request.first, [decode_planned(cell) for cell in request.cells])
        return pb.PlanReply(answers=[encode_answer(answer) for answer in answers])

    def pushes_write(self, messages: Iterator[bytes], call: Call) -> Iterator[bytes]:
        """Take blobs."""
        header = parse(pb.WriteHeader, next(messages, b""))
        _, session = self._session(header.repository, header.push, call)
        with self._writers.taken(call.principal.name), session.stream() as position:
            yield POSITION.pack(position)
            for message in messages:
                if len(message) < POSITION.size:
                    raise InvalidInputError("a message of a write begins with its position", kind="bad_message")
                (position,) = POSITION.unpack_from(message)
                taken = session.receive(position, memoryview(message)[POSITION.size :])
                if taken is not None:
                    yield POSITION.pack(taken)
            yield POSITION.pack(session.flush())

    def pushes_grant(self, request: pb.GrantRequest, call: Call) -> pb.GrantReply:
        """Say where the client may put a pack by itself."""
        _, session = self._session(request.repository, request.push, call)
        if self._verifier is None:
            raise InvalidInputError("this service takes packs by Write only", kind="no_grants")
        with _handed_in():
            blobs = decode_headers(request.blobs)
        granted, url = session.grant(request.number, blobs, request.arrived)
        return pb.GrantReply(url=url, tail=b"".join(granted.tail))

    def pushes_commit(self, request: pb.CommitRequest, call: Call) -> pb.Version:
        """Record the version."""
        store, session = self._session(request.repository, request.push, call)
        with _handed_in():
            description = decode_description(request.description, expected=version_id(request.description))
        check_attachment_paths([item.path for item in description.attachments])
        with acting_as(call.principal.name):
            recorded = session.commit(description)
        self.sessions.release_parts(session)
        if self._verifier is not None and session.push.is_doubtful:
            self._verifier.look_at(store)
        self._publish(store)
        return _version(recorded)

    def pushes_part(self, request: pb.PushRequest, call: Call) -> pb.PartReply:
        """End a push as a part of another one."""
        store, session = self._session(request.repository, request.push, call)
        return pb.PartReply(part=self._tokens.sealed(store.log.state.genesis.repository, session.part()))

    def pushes_join(self, request: pb.JoinRequest, call: Call) -> pb.Empty:
        """Take over what a part has stored."""
        store, session = self._session(request.repository, request.push, call)
        session.join(self._tokens.unsealed(store.log.state.genesis.repository, request.part))
        return pb.Empty()

    def pushes_outcome(self, request: pb.PushRequest, call: Call) -> pb.OutcomeReply:
        """Say what became of a push."""
        recorded = self._repositories.open(request.repository).pushed(_push_id(request.push))
        return pb.OutcomeReply(version=None if recorded is None else _version(recorded))

    def pushes_abandon(self, request: pb.PushRequest, call: Call) -> pb.Empty:
        """Give up a push."""
        store, session = self._session(request.repository, request.push, call)
        session.abandon()
        self.sessions.end(store, session.push.id)
        return pb.Empty()

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def jobs_diff(self, request: pb.PairRequest, call: Call) -> Iterator[pb.DiffReply]:
        """Say which tensors differ."""
        store = self._repositories.open(request.repository)
        found = LocalJobs(store, self._executor).diff(store.resolve(request.a), store.resolve(request.b))
        names = ((field, name) for field in found.__dataclass_fields__ for name in getattr(found, field))
        for some in _by_message(names, nbytes=lambda item: len(item[1])):
            reply = pb.DiffReply()
            for field, name in some:
                getattr(reply, field).append(name)
            yield reply

    def jobs_distance(self, request: pb.PairRequest, call: Call) -> Iterator[pb.DistanceUpdate]:
        """Measure two versions, tensor by tensor."""
        store = self._repositories.open(request.repository)
        a, b = store.resolve(request.a), store.resolve(request.b)
        reader = Reader(store, self._executor)
        selection = select(list(request.include) or None, list(request.exclude))
        specs = common(reader, a, b, selection)
        with self._readers.taken(call.principal.name):
            for spec, found in sums(reader, a, b, specs, equal=request.equal):
                if not call.active():
                    return
                fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
                message = pb.TensorMoments(name=spec.name, elements=prod(spec.shape), **fields)
                yield pb.DistanceUpdate(tensors=[message])

    def jobs_verify(self, request: pb.VerifyRequest, call: Call) -> Iterator[pb.VerifyUpdate]:
        """Check everything that is stored."""
        store = self._repositories.open(request.repository)
        with self._readers.taken(call.principal.name):
            report = Verification(request.deep or request.doubtful)
            told = time.monotonic()
            with closing(verifying(store, report, doubtful=request.doubtful, by=call.principal.name)) as steps:
                for _ in steps:
                    call.check()
                    if time.monotonic() - told >= _PROGRESS_S:
                        yield _verified(report, done=False)
                        told = time.monotonic()
        yield _verified(report, done=True)

    def jobs_audit(self, request: pb.AuditRequest, call: Call) -> Iterator[pb.AuditReply]:
        """Yield what is stored of who did what."""
        store = self._repositories.open(request.repository)
        with self._readers.taken(call.principal.name):
            for name, data in stored(store.objects, request.after):
                yield from encode_object(name, data)

    # -- access -------------------------------------------------------------------------------------------------------

    def access_create_token(self, request: pb.CreateTokenRequest, call: Call) -> pb.CreateTokenReply:
        """Make a token."""
        secret, grant = self._tokens.create(
            request.principal,
            request.role,
            repositories=tuple(request.repositories) or ("*",),
            refs=tuple(request.refs) or ("*",),
            ttl_s=request.ttl_s,
        )
        return pb.CreateTokenReply(secret=secret, token=_token(grant))

    def access_list_tokens(self, request: pb.Empty, call: Call) -> pb.ListTokensReply:
        """List tokens."""
        return pb.ListTokensReply(tokens=[_token(grant) for grant in self._tokens.list()])

    def access_revoke_token(self, request: pb.RevokeTokenRequest, call: Call) -> pb.Empty:
        """End a token."""
        self._tokens.revoke(request.id)
        return pb.Empty()

    def access_who_am_i(self, request: pb.Empty, call: Call) -> pb.Token:
        """Say as whom the caller is known."""
        who = call.principal
        return pb.Token(principal=who.name, role=who.role, repositories=who.repositories, refs=who.refs)


@contextmanager
def _handed_in() -> Iterator[None]:
    """Say of what is read here that the call is wrong, not that something stored is damaged."""
    try:
        yield
    except CorruptionError as error:
        raise InvalidInputError(error.message, kind=error.kind) from error


def _by_message(items: Iterable[Item], *, nbytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield as many items at a time as go into one message; ``nbytes`` says how long the name of one is."""
    return batches(items, _NAMES_AT_ONCE, nbytes=nbytes, most_nbytes=_NAMES_NBYTES)


def _version(recorded: Recorded) -> pb.Version:
    return encode_version(recorded, encode_description(recorded.description))


def _version_id(text: str) -> VersionId:
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise InvalidInputError("a version is named by 64 lower-case hex digits here", kind="bad_message")
    return VersionId(text)


def _push_id(text: str) -> PushId:
    if len(text) != 32 or not set(text) <= set("0123456789abcdef"):
        raise InvalidInputError("a push is named by 32 lower-case hex digits", kind="bad_message")
    return PushId(text)


def _kind(text: str) -> Any:
    if text not in ("branch", "tag", "alias"):
        raise InvalidInputError(f"{text!r} is no kind of ref", kind="bad_message")
    return text


def _token(grant: Grant) -> pb.Token:
    return pb.Token(
        id=grant.id,
        principal=grant.principal,
        role=grant.role,
        repositories=grant.repositories,
        refs=grant.refs,
        expires=grant.expires,
        revoked=grant.revoked,
    )


def _verified(found: Verification, *, done: bool) -> pb.VerifyUpdate:
    """Return how far a verification has come; problems are told at its end."""
    problems = found.problems if done else ()
    return pb.VerifyUpdate(
        entries=found.entries,
        versions=found.versions,
        packs=found.packs,
        blobs=found.blobs,
        read_nbytes=found.read_nbytes,
        vouched=found.vouched,
        problems=[pb.Problem(kind=one.kind, message=one.message, where=one.where) for one in problems],
        done=done,
    )
