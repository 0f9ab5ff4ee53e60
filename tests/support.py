"""Repositories for tests: on any objects, opened again at will, and with entries and packs written by hand."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from lamella_engine.auditing import Act, NotedRead
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.log import DEFAULT_MAX_DEPTH, Log
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.content_store.together import Waiting
from lamella_engine.executor import Executor, InlineExecutor
from lamella_engine.format.audit import Read
from lamella_engine.format.digests import Context, blob_digest, digest
from lamella_engine.format.entry import Entry, PackAdded, encode_entry
from lamella_engine.format.names import PackName, log_name
from lamella_engine.format.pack import BlobRow, encode_footer, encode_pack_index
from lamella_engine.jobs import OBJECT_DIRECTORIES
from lamella_engine.maintenance import Problem
from lamella_engine.model import ChunkId
from lamella_engine.objects import Objects
from lamella_engine.objects.memory import MemoryObjects
from lamella_engine.repository import Repository, on_objects

PATIENCE_S = 60
"""How long a test waits for what must come: only a test that fails ever does."""

Array = np.ndarray[Any, np.dtype[Any]]


def new_repository(
    objects: Objects | None = None,
    executor: Executor | None = None,
    *,
    max_depth: int = DEFAULT_MAX_DEPTH,
    index_path: Path | None = None,
) -> Repository:
    """Make a repository on ``objects``; without an executor everything runs in this thread, in one order."""
    executor = executor or InlineExecutor()
    objects = objects or MemoryObjects()
    return on_objects(PackedStore.create(objects, executor, max_depth=max_depth, index_path=index_path))


def open_again(objects: Objects, executor: Executor | None = None, *, index_path: Path | None = None) -> Repository:
    """Open the repository on ``objects`` as another process would, knowing nothing but a chunk index."""
    executor = executor or InlineExecutor()
    return on_objects(PackedStore(objects, executor, index_path=index_path))


def store_of(repo: Repository) -> PackedStore:
    """Return what lies beneath a repository."""
    return repo._store


class Account(NamedTuple):
    """All that an audit tells."""

    acts: list[Act]
    reads: list[Read]
    unvouched: int
    problems: list[Problem]


def account(repo: Repository) -> Account:
    """Audit a repository to the end."""
    found = list(repo.audit())
    noted = [one for one in found if isinstance(one, NotedRead)]
    return Account(
        [one for one in found if isinstance(one, Act)],
        [Read(*(getattr(one, field.name) for field in fields(Read))) for one in noted],
        sum(not one.vouched for one in noted),
        [one for one in found if isinstance(one, Problem)],
    )


def names_of(objects: Objects) -> dict[str, int]:
    """Return the name and size of every object of a repository."""
    return {info.name: info.nbytes for part in OBJECT_DIRECTORIES for info in objects.list(f"{part}/")}


def copy_of(objects: Objects) -> MemoryObjects:
    """Return a copy that goes its own way."""
    copy = MemoryObjects()
    copy_into(copy, objects)
    return copy


def copy_into(copy: Objects, objects: Objects) -> None:
    """Put every object of a repository into another place."""
    for name in names_of(objects):
        copy.put_if_absent(name, [objects.get(name)])


def bits(tensors: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return dtype, shape and little-endian bytes of each tensor: what has to come back, NaN payloads and all."""
    found = {}
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        found[name] = (array.dtype.name, array.shape, array.tobytes())
    return found


def noise(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    """Return normally distributed numbers: they do not compress, so sizes mean something."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def append_entry(objects: Objects, **fields: Any) -> None:
    """Write the next log entry by hand."""
    state = Log(objects).refresh()
    entry = Entry(state.genesis.repository, state.number + 1, state.digest, state.fold, **fields)
    objects.put_if_absent(log_name(entry.number), [encode_entry(entry)])


class Arrivals:
    """Counts the calls that have come to be answered together with others, as commits are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._count = 0
        self._changed = threading.Condition()
        wait = Waiting.wait

        def wait_visibly(waiting: Waiting[Any, Any]) -> None:
            with self._changed:
                self._count += 1
                self._changed.notify_all()
            wait(waiting)

        monkeypatch.setattr(Waiting, "wait", wait_visibly)

    def until(self, count: int) -> None:
        """Wait until so many have come, from the beginning."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, PATIENCE_S)


class Copy(NamedTuple):
    """A blob as it lies in a pack: its row, and its payload."""

    row: BlobRow
    payload: bytes


def copies_in(objects: Objects, pack: str) -> dict[ChunkId, Copy]:
    """Return the blobs of a pack by chunk."""
    store = PackedStore(objects, InlineExecutor())
    found = {}
    for row in store.packs.index(pack).rows:
        found[row.chunk] = Copy(row, objects.get_range(pack, row.start, row.stop))
    return found


def write_pack(objects: Objects, copies: Iterable[Copy]) -> PackAdded:
    """Write a pack that holds these blobs, whatever their rows claim; return it as an entry adds it."""
    rows: list[BlobRow] = []
    payloads: list[bytes] = []
    start = 0
    for row, payload in copies:
        rows.append(replace(row, start=start, encoded_nbytes=len(payload), digest=blob_digest(payload)))
        payloads.append(payload)
        start += len(payload)
    index = encode_pack_index(rows)
    name = str(PackName(new_push_id(), 0, digest(Context.PACK_INDEX, index)))
    data = b"".join([*payloads, index, encode_footer(index)])
    objects.put_if_absent(name, [data])
    return PackAdded(name, len(data), "store")
