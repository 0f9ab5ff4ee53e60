"""Repositories behind a service for tests, and a proxy on the way there that counts, cuts and swallows."""

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, finalize

import grpc
import pytest
from certificates import LOOPBACK, Authority
from faults import SimulatedCrash
from service import serving

from lamella_engine.content_store.log import DEFAULT_MAX_DEPTH
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.executor import Executor, InlineExecutor
from lamella_engine.objects import Objects
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.remote import channel
from lamella_engine.remote.opening import connect
from lamella_engine.repository import Repository
from lamella_engine.service.listening import Tls
from lamella_engine.service.server import Server

PIECE_NBYTES = 1 << 16


@dataclass
class Proxy:
    """Passes bytes on between clients and one server."""

    server: tuple[str, int]
    sent: int = 0
    """Bytes of all clients so far."""
    received: int = 0
    """Bytes for all clients so far."""
    cut_sent_at: int | None = None
    """When clients have sent so many bytes, the connection that it happens on is cut, once."""
    cut_received_at: int | None = None
    """The same of what they receive."""
    cuts: int = 0
    _listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    _open: list[socket.socket] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def cut_next_reply(self) -> None:
        """Let nothing more of what the server says come through on the connection on which it speaks next."""
        self.cut_received_at = self.received

    def run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self.server)
                except OSError:
                    client.close()
                    continue
                self._open += [client, server]
                for pair, sent in ((client, server), True), ((server, client), False):
                    threading.Thread(target=self._pass, args=(*pair, sent), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, sent: bool) -> None:
        with suppress(OSError):
            while data := source.recv(PIECE_NBYTES):
                if self._cuts(len(data), sent):
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cuts(self, nbytes: int, sent: bool) -> bool:
        with self._lock:
            if sent:
                self.sent += nbytes
                cut = self.cut_sent_at is not None and self.sent >= self.cut_sent_at
                self.cut_sent_at = None if cut else self.cut_sent_at
            else:
                self.received += nbytes
                cut = self.cut_received_at is not None and self.received >= self.cut_received_at
                self.cut_received_at = None if cut else self.cut_received_at
            self.cuts += cut
            return cut

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for end in (self._listener, *self._open):
            end.close()


@contextmanager
def proxied(address: str) -> Iterator[Proxy]:
    """Run a proxy before a server."""
    host, _, port = address.rpartition(":")
    proxy = Proxy((host, int(port)))
    threading.Thread(target=proxy.run, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.close()


# -- the engine's own tests, with a wire in between --------------------------------------------------------------------

CARRIED = (
    "test_audit",
    "test_bases",
    "test_batches",
    "test_checkout",
    "test_crash",
    "test_companions",
    "test_cost",
    "test_diff",
    "test_directories",
    "test_distance",
    "test_distance_delta",
    "test_filling",
    "test_maintenance",
    "test_model",
    "test_parts",
    "test_push",
    "test_races",
    "test_sketches",
    "test_staging",
    "test_torch_modules",
    "test_transaction",
    "test_zarr_push",
    "test_zarr_view",
)
"""Modules whose tests hold of a repository behind a service too: ``LAMELLA_CARRIER=remote pytest`` runs them so."""

NOT_CARRIED = {
    "test_parts_count_among_what_is_not_committed_until_the_version_is": "has a service of its own",
    "test_a_chunk_that_is_encoded_wrongly_is_stored_raw_and_reported": "a service cannot read the chunk again",
    "test_a_lazy_slice_reads_the_chunks_alone_that_hold_it": "counts reads, and pages are read too",
    "test_a_program_that_ends_has_its_pushes_recorded_in_a_bucket": "has a bucket of its own",
    "test_a_program_that_ends_has_its_pushes_recorded_by_a_service": "has a service of its own, without tokens",
    "test_a_push_that_was_fenced_after_it_committed_has_committed": "a client tries again",
    "test_a_header_longer_than_any_is_not_read": "a service does not record such a version",
    "test_a_gap_in_the_log_is_corruption_and_never_the_state_before_it": "the service opens it, and nobody calls",
    "test_a_refusal_names_the_tensor_and_changes_nothing": "takes reads away, and pages are read too",
    "test_an_init_whose_reply_is_lost_is_no_failure": "it is made beneath the service",
    "test_attachments_of_other_lengths_than_are_listed_are_damage": "a service does not record such a version",
    "test_every_write_of_init_may_fail": "it is made beneath the service",
    "test_names_are_compared_before_anything_is_read": "takes reads away, and pages are read too",
    "test_refs_are_updated_all_or_none": "calls what lies beneath",
    "test_transformers_loads_a_version_without_a_file": "counts reads, and pages are read too",
    "test_transformers_reads_the_tensors_alone_that_it_needs": "counts reads, and pages are read too",
    "test_two_processes_at_one_branch_end_in_one_success_and_one_conflict": "each opens the objects itself",
    "test_two_processes_at_two_branches_both_succeed": "each opens the objects itself",
}
"""Tests of those modules that look at what a service does otherwise, and why."""


def is_carried(item: pytest.Item) -> bool:
    """Whether a test holds of a repository behind a service."""
    return item.path.stem in CARRIED and item.originalname not in NOT_CARRIED


@dataclass(frozen=True)
class Service:
    """A server that speaks TLS, and what it takes to be let in by it."""

    server: Server
    ca: Path
    token: str

    def be_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the environment that of a user of it."""
        monkeypatch.setenv("LAMELLA_CA", str(self.ca))
        monkeypatch.setenv("LAMELLA_TOKEN", self.token)


@contextmanager
def secure_service(directory: Path, *, role: str = "admin") -> Iterator[Service]:
    """Run a server with a certificate and one token."""
    authority = Authority()
    certificate, key = authority.issue("localhost", LOOPBACK).write(directory, "server")
    ca = directory / "ca.crt"
    ca.write_bytes(authority.certificate)
    with serving(directory / "root", tls=Tls(certificate, key)) as server:
        secret, _ = server._tokens.create("tests", role)
        yield Service(server, ca, secret)


_names = (f"r{number}" for number in itertools.count())
_left: list[str] = []
"""Repositories that nobody has any more. Who collects garbage may hold any lock, so another thread forgets them."""
_stores: "WeakKeyDictionary[Repository, PackedStore]" = WeakKeyDictionary()


def put_a_wire_between(module: ModuleType, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module of tests have its repositories behind a service, with the objects it looks at on the other side."""

    def served(store: PackedStore, executor: Executor | None) -> Repository:
        while _left:
            _forget(server, _left.pop())
        name = next(_names)
        server._rpcs._repositories._kept(name, store)
        executor = executor or InlineExecutor()
        remote, jobs = connect(f"grpcs://{server.address}/{name}", executor)
        repo = Repository(remote, executor, jobs)
        _stores[repo] = store
        finalize(remote, _left.append, name)  # versions hold it, and may outlive the repository
        return repo

    def new_repository(
        objects: Objects | None = None,
        executor: Executor | None = None,
        *,
        max_depth: int = DEFAULT_MAX_DEPTH,
        index_path: Path | None = None,
    ) -> Repository:
        objects = objects or MemoryObjects()
        store = PackedStore.create(objects, InlineExecutor(), max_depth=max_depth, index_path=index_path)
        return served(store, executor)

    def open_again(objects: Objects, executor: Executor | None = None, *, index_path: Path | None = None) -> Repository:
        return served(PackedStore(objects, InlineExecutor(), index_path=index_path), executor)

    for stand_in in new_repository, open_again:
        monkeypatch.setattr(module, stand_in.__name__, stand_in, raising=False)
    monkeypatch.setattr(module, "store_of", _stores.__getitem__, raising=False)
    monkeypatch.setattr(server, "_answered", _mortal(server._answered))
    # What fails here fails once, or for good: a second try, whose pause is always shorter, is enough.
    monkeypatch.setattr(channel, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(channel, "PATIENCE_S", 0.02)


def _mortal(answered: Callable[..., Iterator[bytes]]) -> Callable[..., Iterator[bytes]]:
    """Return what answers calls, but for those at which the process dies: their clients lose the connection."""

    def answer(method: Any, call: Any, incoming: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            yield from answered(method, call, incoming, context)
        except SimulatedCrash:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the process is gone")

    return answer


def _forget(server: Server, name: str) -> None:
    """Let go of a repository that nobody has any more, as the end of a process does, and of what was pushed to it."""
    rpcs = server._rpcs
    store = rpcs._repositories._recent.pop(name)
    for pushed, push in list(rpcs.sessions._sessions):
        if pushed is store:
            rpcs.sessions.end(pushed, push)
