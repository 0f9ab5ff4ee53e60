"""What a service notes of who read or changed what: chained segments, for which the log vouches."""

import logging
import secrets
import threading
import time
import weakref
from dataclasses import asdict
from itertools import accumulate

from lamella_engine.content_store.log import Log
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.errors import AlreadyExistsError, LamellaError, StorageError
from lamella_engine.format.audit import MAX_SEGMENT_NBYTES, Read, encode_read, encode_segment, segment_digest
from lamella_engine.format.names import audit_name, audit_number

logger = logging.getLogger("lamella.service")

SEGMENT_READS = 1000
SEGMENT_S = 60.0
"""A segment is written when it has so many reads, or is so old: what a crash loses is not more."""

VOUCHED_S = 3600.0
"""A segment for which no entry has vouched for so long gets one of its own: who only reads adds 24 entries a day."""

# Reads that may wait where the store takes no segment: then reading ends, rather than being forgotten.
_MOST_WAITING = 10 * SEGMENT_READS

# Characters kept of each text, so that a read takes a few KB at most.
_MOST_TEXT = 200

_SEGMENT_NBYTES = MAX_SEGMENT_NBYTES - 4096
"""Bytes of the reads of a segment; the rest is more than its first line takes."""


class ReadAudit:
    """Notes the reads of one repository, for one server process. Safe for several threads.

    It outlives the store that it is made with, which may be closed and opened again.
    """

    def __init__(self, store: PackedStore) -> None:
        self._objects = store.objects
        self._repository = store.log.state.genesis.repository
        self._log = weakref.ref(store.log)
        self._server = secrets.token_hex(8)
        self._reads: list[bytes] = []
        self._oldest = 0.0
        self._written: tuple[str, bytes] | None = None
        """Name and digest of the newest segment."""
        self._unsure: tuple[bytes, int] | None = None
        """A segment that may be in the store already, so that nothing else can have its name, and its reads."""
        self._unvouched = 0.0
        """Since when the log has had a segment to vouch for, if it has one."""
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    def go_on(self, log: Log) -> None:
        """Have the next entry of ``log``, which may have been opened since, vouch for what was noted."""
        if self._log() is not log:
            with self._writing:
                self._log = weakref.ref(log)
                if self._written is not None:
                    self._unvouched = time.monotonic()
                    log.carry(*self._written, instead_of=None)

    def note(self, read: Read) -> None:
        """Note a read; writes a segment if one is full.

        Raises StorageError (``audit_full``) if far too many wait because the store takes none.
        """
        line = encode_read(Read(**{name: _plain(text) for name, text in asdict(read).items()}))
        with self._lock:
            if len(self._reads) >= _MOST_WAITING:
                raise StorageError(
                    "nothing can be read while it cannot be noted: try again later", kind="audit_full", transient=True
                )
            if not self._reads:
                self._oldest = time.monotonic()
            self._reads.append(line)
            full = len(self._reads) % SEGMENT_READS == 0
        if full:
            self.flush()

    def flush(self, *, older_than_s: float = 0.0) -> None:
        """Write the reads that wait, if the first of them has waited so long. What cannot be written waits on."""
        with self._writing:
            while True:
                with self._lock:
                    due = self._reads and time.monotonic() - self._oldest >= older_than_s
                    sizes = accumulate(map(len, self._reads[:SEGMENT_READS]))
                    reads = [line for line, size in zip(self._reads, sizes, strict=False) if size <= _SEGMENT_NBYTES]
                if not due:
                    return
                try:
                    written = self._write(reads)
                except LamellaError as error:
                    logger.warning("reads of a repository are not noted yet: %s", error)
                    return
                with self._lock:
                    del self._reads[:written]
                    self._oldest = time.monotonic()

    def _write(self, reads: list[bytes]) -> int:
        number = 0 if self._written is None else audit_number(self._written[0])[1] + 1
        previous = None if self._written is None else self._written[1]
        if self._unsure is None:
            self._unsure = encode_segment(reads, repository=self._repository, previous=previous), len(reads)
        data, count = self._unsure
        name = audit_name(self._server, number)
        try:
            self._objects.put_if_absent(name, [data])
        except AlreadyExistsError:
            logger.debug("%s was written, though nobody said so", name)
        digest = segment_digest(data)
        if (log := self._log()) is not None:
            if not log.carries:
                self._unvouched = time.monotonic()
            log.carry(name, digest, instead_of=None if self._written is None else self._written[0])
        self._written, self._unsure = (name, digest), None
        return count

    def vouch(self, *, older_than_s: float = 0.0) -> None:
        """Have the log vouch for what was written, if that has waited so long. What fails is tried again later."""
        with self._writing:
            log = self._log()
            if log is None or not log.carries or time.monotonic() - self._unvouched < older_than_s:
                return
            try:
                log.vouch()
            except LamellaError as error:
                logger.warning("the log does not vouch yet for reads of a repository: %s", error)
                self._unvouched = time.monotonic()


def _plain(text: str) -> str:
    return text[:_MOST_TEXT].encode(errors="replace").decode()
