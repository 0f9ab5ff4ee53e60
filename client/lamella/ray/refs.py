"""Values in Ray's object store, and what its errors mean."""

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from lamella_engine.errors import LamellaError, StorageError

PATIENCE_S = 300.0
"""How long an encoder waits for what another one does: one that is being started again takes seconds."""

ROOM_S = 60.0
"""How long what is there already may take to come into the object store of this node, beside the time to move it. What
Ray has spilled it brings back when there is room, and until then it says nothing, for ever if need be; that a node is
gone it says within half a minute."""

SLOWEST = 10 << 20
"""Bytes a second: a busy hard disk, or a network of 100 Mbit/s."""


def got(ref: Any) -> Any:
    """Return what a ref stands for. Raises what its task raised, StorageError for what befell it, or RayTaskError."""
    try:
        return ray.get(ref)
    except RayError as error:
        raise _understood(error) from error


def brought(ref: Any, nbytes: int = 0) -> Any:
    """Return about so many bytes, which another process has, or soon will have; they take room in this node's store.

    Raises as :func:`got` does, and StorageError (``worker_lost``, ``object_store_full``) if they do not come.
    """
    there, _ = ray.wait([ref], timeout=PATIENCE_S, fetch_local=False)
    if not there:
        raise _lost("a node did not answer", f"in {PATIENCE_S:.0f} s")
    try:
        return ray.get(ref, timeout=ROOM_S + nbytes / SLOWEST)
    except GetTimeoutError as error:
        raise _full("what another process holds did not come: ") from error
    except RayError as error:
        raise _understood(error) from error


def put(value: Any) -> Any:
    """Return a ref to a value. Raises StorageError (``object_store_full``)."""
    try:
        return ray.put(value)
    except RayError as error:
        raise _understood(error) from error


def _understood(error: RayError) -> Exception:
    """Return what an error of Ray means: what a call raised, a full object store, or something that is gone."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, LamellaError):
        return error.cause
    if isinstance(error, ObjectStoreFullError | OutOfDiskError):
        return _full()
    if isinstance(error, RayTaskError):
        return error
    return _lost("a worker, or what it held, is gone", str(error).partition("\n")[0])


def _full(symptom: str = "") -> StorageError:
    return StorageError(
        f"{symptom}a node's object store is full, and so is the disk that it spills to: free some of it, or push files",
        kind="object_store_full",
    )


def _lost(what: str, why: str) -> StorageError:
    return StorageError(f"{what}: push again when the cluster is whole ({why})", kind="worker_lost", transient=True)
