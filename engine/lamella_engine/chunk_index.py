"""The chunk index: which packs hold a chunk. Derived from packs, local, and deletable at any time.

It only saves bytes: a chunk that it does not know is stored again, and what it says is believed only of packs that the
log calls live. So it needs no transactions with anything, and a damaged file is thrown away.
"""

import contextlib
import hashlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lamella_engine.model import ChunkId
from lamella_engine.objects import Objects
from lamella_engine.objects.local import LocalObjects

logger = logging.getLogger("lamella")

_SCHEMA = """
create table if not exists packs (number integer primary key, name text not null unique) strict;
create table if not exists chunks (chunk blob not null, pack integer not null, primary key (chunk, pack)) strict,
without rowid;
"""

# SQLite's limit on the variables of one statement is 32,766; a few hundred already hide the cost of a statement.
_NAMES_AT_ONCE = 500


INDEX_PATH = Path("index", "chunks.sqlite")
"""Where a repository on a disk keeps its chunk index, which is no object."""


def index_path(objects: Objects, place: str) -> Path | None:
    """Return the file for the chunk index of the repository at ``place``: in its directory, or in the user's cache.

    None if there is nothing that outlives the process to keep it for, or nowhere to keep it.
    """
    if isinstance(objects, LocalObjects):
        return objects.root / INDEX_PATH
    cache = user_cache()
    if not objects.store_name or cache is None:
        return None
    # Of two names for one place, each gets an index: both are derived.
    key = hashlib.sha256(f"{objects.store_name}\n{place.rstrip('/')}".encode()).hexdigest()[:32]
    return cache / "lamella" / "index" / key / INDEX_PATH.name


def user_cache() -> Path | None:
    """Return the directory that the XDG Base Directory Specification gives to caches, if this user has one."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given
    home = Path(os.path.expanduser("~"))
    return home / ".cache" if home.is_absolute() else None


class ChunkIndex:
    """Chunk id -> names of packs. Safe for several threads, and for several processes on one file.

    Parameters
    ----------
    path
        The file, made if it is absent; None keeps the index in memory. So does a file that cannot be used; one that is
        damaged is removed.
    """

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._path = path
        self._process = os.getpid()
        self._connection = self._open()

    def find(self, chunk: ChunkId) -> list[str]:
        """Return the packs known to hold a chunk."""
        rows = self._run("select name from chunks join packs on pack = number where chunk = ?", [bytes(chunk)])
        return [name for (name,) in rows]

    def known(self, packs: Iterable[str]) -> set[str]:
        """Return those of ``packs`` that the index knows."""
        found: set[str] = set()
        names = list(packs)
        for at in range(0, len(names), _NAMES_AT_ONCE):
            some = names[at : at + _NAMES_AT_ONCE]
            rows = self._run(f"select name from packs where name in ({','.join('?' * len(some))})", some)
            found.update(name for (name,) in rows)
        return found

    def add(self, pack: str, chunks: Iterable[ChunkId]) -> None:
        """Record that ``pack`` holds ``chunks``, all of them at once. Recording a pack twice changes nothing."""
        rows = [bytes(chunk) for chunk in chunks]

        def insert(connection: sqlite3.Connection) -> list[Any]:
            with connection:
                connection.execute("insert or ignore into packs (name) values (?)", [pack])
                (number,) = connection.execute("select number from packs where name = ?", [pack]).fetchone()
                connection.executemany("insert or ignore into chunks values (?, ?)", ((row, number) for row in rows))
            return []

        self._use(insert)

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            self._connection.close()

    def _run(self, statement: str, values: Sequence[object]) -> list[Any]:
        return self._use(lambda connection: connection.execute(statement, values).fetchall())

    def _use(self, work: Callable[[sqlite3.Connection], list[Any]]) -> list[Any]:
        with self._lock:
            if self._process != os.getpid():  # SQLite's connections do not survive a fork
                self._connection, self._process = _prepared(":memory:"), os.getpid()
            try:
                return work(self._connection)
            except sqlite3.Error as error:
                self._set_aside(error)
                self._connection.close()
                self._connection = _prepared(":memory:")
                return work(self._connection)

    def _open(self) -> sqlite3.Connection:
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                return _prepared(self._path)
            except (sqlite3.Error, OSError) as error:
                self._set_aside(error)
        return _prepared(":memory:")

    def _set_aside(self, error: Exception) -> None:
        """Do without the file from now on; remove it if it is damaged, so that the next process makes it anew."""
        logger.info("the chunk index is kept in memory: %s", error)
        # Subclasses are circumstances (locked for long, out of room, closed); DatabaseError itself is damage.
        if self._path is not None and type(error) is sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)


def _prepared(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, timeout=10)
    try:
        # What a power cut takes from a derived file is found again, so nothing waits for the disk.
        connection.execute("pragma synchronous = off")
        connection.execute("pragma journal_mode = wal")
        connection.executescript(_SCHEMA)
    except sqlite3.Error:
        connection.close()
        raise
    return connection
