"""Decoded chunks kept on this machine: what was read or pushed once need not travel again.

Like the chunk index it is derived and deletable at any time. A file is what its name says or it is nothing: its chunk
id is computed whenever it is read. So nothing that goes wrong with it is worth an error.

A chunk is kept whole, or as a delta against one that is: then what a push writes here is less than half as long, and
reading it takes one decode. Of two versions that follow each other, every second one is kept so.

Each service has a part of its own. Which chunks are here is told to the service that is read from, and deltas against
them are sent to the one that is pushed to: neither may learn so of weights that came from another.
"""

import contextlib
import glob
import hashlib
import logging
import os
import random
import secrets
import struct
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lamella_engine import codecs
from lamella_engine.chunk_index import user_cache
from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.content_store.seam import Blob
from lamella_engine.errors import InvalidInputError, LamellaError
from lamella_engine.format.digests import chunk_id
from lamella_engine.model import Buffer, ChunkId

logger = logging.getLogger("lamella")

DEFAULT_NBYTES = 4 << 30
"""Unless ``LAMELLA_CACHE_NBYTES`` says otherwise: the weights of two versions of a model of a billion parameters."""

SMALLEST_NBYTES = 4096
"""Shorter chunks are not kept: a file of their own takes as much room, and as long to open as they take to travel."""

SHORT_DELTA = 0.5
"""A delta is kept if it is at most this share of its chunk: the bytes that are not written pay for the decode."""

# What a delta's file begins with: its base, its encoding, bytes of a lane, bytes of the chunk. The payload follows.
_DELTA = struct.Struct("<32sBBI")

# What is there is counted when so much of the bound has been added since: other processes add too, and each can pass
# it by that much. To count takes as long as there are files, so a process begins somewhere in between: of many short
# ones, each of which adds a little, one in so many counts.
_RECOUNT = 16

# What is evicted at a time, so that it is seldom done.
_EVICTED = 8


class ChunkCache:
    """Chunk id -> bytes, those used last. Safe for several threads, and for several processes on one directory.

    Parameters
    ----------
    directory
        Made when something is kept; readable by this user alone. None keeps nothing.
    limit_nbytes
        About how much may be kept of all services; 0 keeps nothing.
    service
        Where the chunks come from, or go: no other service's are had.
    """

    def __init__(self, directory: Path | None, limit_nbytes: int, service: str) -> None:
        self._directory = directory if limit_nbytes else None
        self._part = hashlib.sha256(service.encode()).hexdigest()[:16]
        self._limit_nbytes = limit_nbytes
        self._lock = threading.Lock()
        self._added_nbytes = random.randrange(limit_nbytes // _RECOUNT + 1)
        """Since what is there was counted, by this process or, as it is taken, another."""

    @classmethod
    def of(cls, service: str, environment: Mapping[str, str] = os.environ) -> "ChunkCache":
        """Return this user's cache for a service, of the size that the environment says; raises InvalidInputError."""
        given = environment.get("LAMELLA_CACHE_NBYTES") or str(DEFAULT_NBYTES)
        if not (given.isascii() and given.isdigit()):
            raise InvalidInputError(f"LAMELLA_CACHE_NBYTES is no number of bytes: {given!r}", kind="bad_option")
        root = user_cache()
        return cls(None if root is None else root / "lamella" / "chunks", int(given), service)

    @property
    def on(self) -> bool:
        """Whether anything may ever be kept."""
        return self._directory is not None

    def has(self, chunk: ChunkId) -> bool:
        """Whether a chunk seems to be here; :meth:`get` may still not have it."""
        path = self._path(chunk)
        return path is not None and (os.path.exists(path) or os.path.exists(_delta_path(path)))

    def get(self, chunk: ChunkId) -> Buffer | None:
        """Return the bytes of a chunk, or None; a file that does not lead to that chunk is removed."""
        path = self._path(chunk)
        if path is None:
            return None
        for read, file in ((self._read, path), (self._decoded, _delta_path(path))):
            data = read(file)
            if data is None:
                continue
            if chunk_id(data) == chunk:
                return data
            logger.info("a chunk in the cache was damaged and is removed")
            with contextlib.suppress(OSError):
                os.unlink(file)
        return None

    def add(self, chunk: ChunkId, data: Buffer) -> None:
        """Keep a chunk, whose bytes these are said to be."""
        path = self._path(chunk)
        if path is not None and len(data) >= SMALLEST_NBYTES and not os.path.exists(path):
            self._keep(path, data)

    def add_delta(self, blob: Blob) -> bool:
        """Keep the chunk of a delta that is short, if its base is kept whole; return whether it is that."""
        path = self._path(blob.chunk)
        base = None if blob.base is None else self._path(blob.base)
        if path is None or base is None or blob.decoded_nbytes < SMALLEST_NBYTES:
            return False
        if len(blob.payload) > SHORT_DELTA * blob.decoded_nbytes or not os.path.exists(base):
            return False
        if not self.has(blob.chunk):
            header = _DELTA.pack(blob.base, blob.encoding, blob.width, blob.decoded_nbytes)
            self._keep(_delta_path(path), header + blob.payload)
        return True

    def _read(self, path: str) -> bytes | None:
        try:
            with open(path, "rb") as file:
                data = file.read()
                os.utime(file.fileno())  # used last
        except OSError:
            return None
        return data

    def _decoded(self, path: str) -> Buffer | None:
        """Return what a delta leads to, nothing that could be a chunk if it leads nowhere, or None if there is none."""
        data = self._read(path)
        if data is None:
            return None
        try:
            base, encoding, width, nbytes = _DELTA.unpack_from(data)
            whole = self._read(str(self._path(base)))
            if whole is None or nbytes > MAX_CELL_NBYTES:
                return b""
            out = np.empty(nbytes, np.uint8)
            codecs.decode(encoding, memoryview(data)[_DELTA.size :], out, width=width, base=whole)
        except (struct.error, LamellaError):
            return b""
        return out.data

    def _keep(self, path: str, data: Buffer) -> None:
        """Write a file whole, or not at all."""
        half_written = f"{path}.{secrets.token_hex(4)}"
        try:
            try:
                self._write(half_written, data)
            except FileNotFoundError:
                for folder in (f"{self._directory}/{self._part}", os.path.dirname(path)):
                    os.makedirs(folder, mode=0o700, exist_ok=True)
                self._write(half_written, data)
            os.replace(half_written, path)
            self._count(len(data))
        except OSError as error:  # no room, no right: then it is not kept
            logger.info("a chunk is not kept in the cache: %s", error)
            with contextlib.suppress(OSError):
                os.unlink(half_written)

    def _path(self, chunk: ChunkId) -> str | None:
        name = chunk.hex()
        return None if self._directory is None else f"{self._directory}/{self._part}/{name[:2]}/{name}"

    @staticmethod
    def _write(path: str, data: Buffer) -> None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
            view = memoryview(data).cast("B")
            while view.nbytes:
                view = view[file.write(view) :]

    def _count(self, nbytes: int) -> None:
        """Note what was added; if it may be too much by now, remove what was not used for longest."""
        with self._lock:
            self._added_nbytes += nbytes
            if self._added_nbytes > self._limit_nbytes // _RECOUNT:
                self._added_nbytes = 0
                self._evict()

    def _evict(self) -> None:
        files = []
        for path in glob.iglob(f"{glob.escape(str(self._directory))}/*/*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(nbytes for _, nbytes, _ in files)
        if total <= self._limit_nbytes:
            return
        for _, nbytes, path in sorted(files):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= nbytes
            if total <= self._limit_nbytes - self._limit_nbytes // _EVICTED:
                return


def _delta_path(path: str) -> str:
    """Return where a delta of the chunk stands that has this path where it is whole."""
    return f"{path}.delta"
