"""Values in Ray's object store, and what its errors mean."""

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from lamella_engine.errors import LamellaError, StorageError

PATIENCE_S = 300.0
"""How long an encoder waits for bytes of another node: one that is being started again takes seconds, one that waits
for room in a full object store may wait for ever."""


def got(ref: Any, timeout_s: float | None = None) -> Any:
    """Return what a ref stands for. Raises what its task raised, StorageError for what befell it, or RayTaskError."""
    try:
        return ray.get(ref, timeout=timeout_s)
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
        return StorageError(
            "a node's object store is full, and so is the disk that it spills to: free some of it, or push files",
            kind="object_store_full",
            transient=True,
        )
    if isinstance(error, RayTaskError):
        return error
    what = (
        "a node did not answer, or has no room in its object store"
        if isinstance(error, GetTimeoutError)
        else "a worker, or what it held, is gone"
    )
    why = str(error).partition("\n")[0]
    return StorageError(f"{what}: push again when the cluster is whole ({why})", kind="worker_lost", transient=True)
