"""From a path or URL to a repository: in a directory, a bucket, a service or memory."""

import os
from os import PathLike, fspath
from pathlib import Path

from lamella_engine.chunk_index import index_path
from lamella_engine.content_store.log import DEFAULT_MAX_DEPTH, check_max_depth
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.errors import AlreadyExistsError, InvalidInputError, RepositoryNotFoundError
from lamella_engine.executor import DEFAULT_MEMORY_NBYTES, ThreadExecutor
from lamella_engine.heads import Pin
from lamella_engine.objects import open_objects
from lamella_engine.remote.place import SCHEMES
from lamella_engine.repository import Repository, on_objects
from lamella_engine.signing import Signer, load_key


def init(
    url: "str | PathLike[str]",
    *,
    max_depth: int = DEFAULT_MAX_DEPTH,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    signing_key: "str | PathLike[str] | None" = None,
) -> Repository:
    """Make a repository.

    Parameters
    ----------
    url
        A directory path or ``file:///path``; ``s3://bucket/prefix``, also ``gs://`` and ``az://`` (untested), for an
        object store; ``grpc://host:port/name`` for one of a service; or ``memory://name`` for one that lives as long as
        the process.
    max_depth
        Longest chain of deltas from version to version, 0 to 31, for as long as the repository lives. Longer chains
        take fewer bytes, and more time to check out.
    memory_nbytes
        Bound of the memory for work in flight.
    signing_key
        File of a key, as ``keygen`` makes it, that signs what is recorded; by default the one that the environment's
        ``LAMELLA_SIGNING_KEY`` names, if it does. A service signs by itself.

    Raises
    ------
    AlreadyExistsError
        There is one already.
    NotFoundError
        There is no such file of a key.
    InvalidInputError
        ``max_depth`` is out of bounds, the file holds no key or others may read it, or a key is given for a service.
    StorageError
        The place fails, or does not keep the promises that a repository needs.
    """
    check_max_depth(max_depth)
    place = _place_of(url)
    if _is_remote(place):
        return _remote(place, memory_nbytes, signing_key, new_max_depth=max_depth)
    signer = _signer(signing_key)
    objects = open_objects(place, create=True)
    executor = ThreadExecutor(memory_nbytes=memory_nbytes)
    try:
        store = PackedStore.create(
            objects, executor, index_path=index_path(objects, place), max_depth=max_depth, signer=signer
        )
        if objects.store_name:
            Pin(place, objects.store_name).replace(store.log.state.head)
        return on_objects(store, location=_location(place))
    except AlreadyExistsError:
        raise AlreadyExistsError(
            f"{url} is a repository already: use it as it is, or choose another place",
            kind="repository_exists",
            url=str(url),
        ) from None


def open_repository(
    url: "str | PathLike[str]",
    *,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    signing_key: "str | PathLike[str] | None" = None,
) -> Repository:
    """Open a repository; see :func:`init` for its parameters.

    Raises RepositoryNotFoundError if there is none, and CorruptionError (``rollback``, ``fork``) if one in a bucket or
    of a service is not what this user has seen of it before.
    """
    place = _place_of(url)
    if _is_remote(place):
        return _remote(place, memory_nbytes, signing_key)
    signer = _signer(signing_key)
    try:
        objects = open_objects(place)
        executor = ThreadExecutor(memory_nbytes=memory_nbytes)
        # Who can write to a directory can write to what is remembered of it too.
        pin = Pin(place, objects.store_name) if objects.store_name else None
        seen = [pin.seen] if pin is not None and pin.seen is not None else []
        trusted = [key for head in seen for key in head.signers]
        store = PackedStore(objects, executor, index_path=index_path(objects, place), signer=signer, trusted=trusted)
        if pin is not None:
            pin.advance(store.log.state.head, store.log.digest_at)
        return on_objects(store, seen=seen, location=_location(place))
    except RepositoryNotFoundError as error:
        if error.kind == "bucket_not_found":
            raise
        raise RepositoryNotFoundError(
            f"there is no repository at {url}: check the path, or make one with init", url=str(url)
        ) from None


def _location(place: str) -> str | None:
    """Return what any process can open a place by, wherever it stands; None if only this one can."""
    scheme, separator, _ = place.partition("://")
    if not separator:
        return os.path.abspath(place)
    return None if scheme == "memory" else place


def _is_remote(place: str) -> bool:
    return place.partition("://")[0] in SCHEMES


def _signer(signing_key: "str | PathLike[str] | None") -> Signer | None:
    """Return the key that is given, or that the environment names, or None."""
    path = signing_key or os.environ.get("LAMELLA_SIGNING_KEY")
    return None if not path else load_key(Path(path))


def _remote(
    place: str,
    memory_nbytes: int,
    signing_key: "str | PathLike[str] | None",
    *,
    new_max_depth: int | None = None,
) -> Repository:
    """Return a repository of a service."""
    if signing_key is not None:
        raise InvalidInputError("a service signs with a key of its own: see serve --signing-key", kind="bad_option")
    try:
        from lamella_engine.remote.opening import connect  # on use: grpc takes 0.2 s to import, and may be absent
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("grpc", "google"):
            raise
        raise InvalidInputError(
            "a repository of a service needs gRPC: pip install 'lamella[service]'", kind="missing_extra"
        ) from None
    executor = ThreadExecutor(memory_nbytes=memory_nbytes)
    store, jobs = connect(place, executor, new_max_depth=new_max_depth)
    return Repository(store, executor, jobs, location=place)


def _place_of(url: "str | PathLike[str]") -> str:
    place = url if isinstance(url, str) else fspath(url) if isinstance(url, PathLike) else None
    if not isinstance(place, str):
        raise InvalidInputError(f"{url!r} is no path or URL: give text or a path", kind="bad_url")
    return place
