"""Trying a place's promises before trusting it with writes.

Some object stores and proxies accept the condition of a conditional write and ignore it. Every commit would then
succeed, and the last one would win.
"""

import secrets
from concurrent.futures import Future
from contextlib import suppress
from threading import Barrier, Thread

from lamella_engine.errors import AlreadyExistsError, LamellaError, NotFoundError, StorageError
from lamella_engine.objects import Objects

# The check-then-write of a broken store is open for less than a round trip: it takes several writers at once, and more
# than one attempt, to be seen. A disk pays one fsync for each writer, about 50 ms for all of them.
_RACERS = 8
_RACES = 2

# The names of stores that were found sound. One that stops to be so while a process lives would not be caught by a
# probe at its start either.
_sound: set[str] = set()


def probe(objects: Objects) -> None:
    """Return if a place keeps the promises of :class:`~lamella_engine.objects.Objects` that commits rest on.

    Writes a few objects under ``probe/`` and removes them; but a store that has a name, and was found sound, is not
    tried again as long as the process lives.

    Raises
    ------
    StorageError
        Kind ``unsafe_store``, with the broken ``promise`` in its context: ``create_once``, ``one_winner``,
        ``read_after_write``, ``list_after_write`` or ``range_read``. Any other kind: the place failed before it could
        be judged.
    """
    if objects.store_name in _sound:
        return
    run = secrets.token_hex(8)
    names = [f"probe/{run}-{i}" for i in range(1 + _RACES)]
    try:
        _try_one_writer(objects, names[0])
        for name in names[1:]:
            _try_racing_writers(objects, name)
        listed = {info.name: info.nbytes for info in objects.list(f"probe/{run}-")}
        _require(sorted(listed) == names, "list_after_write", "a listing lacks an object that was written before it")
        _require(
            all(nbytes == len(objects.get(name)) for name, nbytes in listed.items()),
            "list_after_write",
            "a listing gives an object another size than it has",
        )
    finally:
        with suppress(LamellaError):  # what is left harms nobody and hides no verdict
            for name in names:
                objects.delete(name)
    if objects.store_name:
        _sound.add(objects.store_name)


def _try_one_writer(objects: Objects, name: str) -> None:
    data = bytes(range(256))
    _require(_create(objects, name, data), "create_once", "a name that was never used cannot be created")
    _require(_read(objects, name) == data, "read_after_write", "an object does not read back as it was written")
    _require(not _create(objects, name, b"second"), "create_once", "an object was created twice under one name")
    _require(_read(objects, name) == data, "create_once", "a refused write replaced the object")
    _require(objects.get_range(name, 7, 99) == data[7:99], "range_read", "a range reads as other bytes than its own")


def _try_racing_writers(objects: Objects, name: str) -> None:
    start = Barrier(_RACERS)
    bids = [f"{name} from writer {i}".encode() for i in range(_RACERS)]

    outcomes: list[Future[bool]] = [Future() for _ in bids]

    def race(bid: bytes, outcome: Future[bool]) -> None:
        try:
            start.wait()
            outcome.set_result(_create(objects, name, bid))
        except BaseException as error:
            outcome.set_exception(error)

    # Threads of no pool: when a program ends, pools end before the pushes that still go on.
    threads = [Thread(target=race, args=racer) for racer in zip(bids, outcomes, strict=True)]
    try:
        for thread in threads:
            thread.start()
        won = [outcome.result() for outcome in outcomes]
    except BaseException:  # a signal, or no thread to be had: those who wait for the others would wait for ever
        start.abort()
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    winners = [bid for bid, has_won in zip(bids, won, strict=True) if has_won]
    _require(
        len(winners) == 1,
        "one_winner",
        f"{len(winners)} of {_RACERS} simultaneous writers of one name were told they won",
    )
    _require(_read(objects, name) == winners[0], "one_winner", "the bytes kept are not those of the writer that won")


def _create(objects: Objects, name: str, data: bytes) -> bool:
    try:
        objects.put_if_absent(name, [data])
    except AlreadyExistsError:
        return False
    return True


def _read(objects: Objects, name: str) -> bytes | None:
    try:
        return objects.get(name)
    except NotFoundError:
        return None


def _require(kept: bool, promise: str, finding: str) -> None:
    if not kept:
        raise StorageError(
            f"this place is not safe for a repository, for {finding}: choose another place",
            kind="unsafe_store",
            transient=False,
            promise=promise,
        )
