"""The chunk index: which packs hold a chunk. Derived from packs, local, and deletable at any time.

It only saves bytes: a chunk that it does not know is stored again, and what it says is believed only of packs that the
log calls live. So it needs no transactions with anything, and a damaged file is thrown away.
"""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lamella_engine.model import ChunkId

logger = logging.getLogger("lamella")

_SCHEMA = """
create table if not exists packs (number integer primary key, name text not null unique) strict;
create table if not exists chunks (chunk blob not null, pack integer not null, primary key (chunk, pack)) strict,
without rowid;
"""

# SQLite's limit on the variables of one statement is 32,766; a few hundred already hide the cost of a statement.
_FIND_AT_ONCE = 500


class ChunkIndex:
    """Chunk id -> names of packs. Safe for several threads, and for several processes on one file.

    Parameters
    ----------
    path
        The file, made if it is absent; None keeps the index in memory. A file that cannot be used (damaged, read-only,
        no room) leaves an index that knows nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._path = path
        self._connection = self._connect()

    def find(self, chunks: Sequence[ChunkId]) -> dict[ChunkId, list[str]]:
        """Return the packs known to hold each of ``chunks``; chunks that are not known are left out."""
        found: dict[ChunkId, list[str]] = {}
        for at in range(0, len(chunks), _FIND_AT_ONCE):
            some = chunks[at : at + _FIND_AT_ONCE]
            rows = self._run(
                "select chunk, name from chunks join packs on pack = number "
                f"where chunk in ({','.join('?' * len(some))})",
                [bytes(chunk) for chunk in some],
            )
            for chunk, name in rows:
                found.setdefault(ChunkId(chunk), []).append(name)
        return found

    def add(self, pack: str, chunks: Iterable[ChunkId]) -> None:
        """Record that ``pack`` holds ``chunks``, all of them at once. Recording a pack twice changes nothing."""
        with self._lock:
            if self._connection is None:
                return
            try:
                with self._connection:
                    self._connection.execute("insert or ignore into packs (name) values (?)", [pack])
                    (number,) = self._connection.execute("select number from packs where name = ?", [pack]).fetchone()
                    self._connection.executemany(
                        "insert or ignore into chunks values (?, ?)", ((bytes(chunk), number) for chunk in chunks)
                    )
            except sqlite3.Error as error:
                self._give_up(error)

    def known(self, packs: Sequence[str]) -> set[str]:
        """Return those of ``packs`` (at most a few hundred) that the index knows."""
        rows = self._run(f"select name from packs where name in ({','.join('?' * len(packs))})", packs)
        return {name for (name,) in rows}

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _run(self, statement: str, values: Sequence[object]) -> list[Any]:
        with self._lock:
            if self._connection is None:
                return []
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                self._give_up(error)
                return []

    def _connect(self) -> sqlite3.Connection | None:
        try:
            return self._prepared()
        except (sqlite3.Error, OSError) as error:
            logger.info("the chunk index is made anew: %s", error)
        with contextlib.suppress(OSError):
            if self._path is not None:
                self._path.unlink(missing_ok=True)
        try:
            return self._prepared()
        except (sqlite3.Error, OSError) as error:
            logger.info("no chunk index can be kept: %s", error)
            return None

    def _prepared(self) -> sqlite3.Connection:
        if self._path is not None:
            self._path.parent.mkdir(exist_ok=True)
        connection = sqlite3.connect(self._path or ":memory:", check_same_thread=False, timeout=10)
        try:
            # What a power cut takes from a derived file is found again, so nothing waits for the disk.
            connection.execute("pragma synchronous = off")
            connection.execute("pragma journal_mode = wal")
            connection.executescript(_SCHEMA)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _give_up(self, error: sqlite3.Error) -> None:
        logger.info("the chunk index is not used any more: %s", error)
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        # OperationalError is a matter of circumstances (locked, disk full); the other errors mean that the file is
        # damaged.
        if self._path is not None and not isinstance(error, sqlite3.OperationalError):
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
