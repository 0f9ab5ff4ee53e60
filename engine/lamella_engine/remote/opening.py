"""From a URL to a repository that a service has."""

from lamella_engine.errors import LamellaError
from lamella_engine.executor import Executor
from lamella_engine.heads import Head, Pin
from lamella_engine.jobs import Jobs
from lamella_engine.remote.cache import ChunkCache
from lamella_engine.remote.channel import OPENING_PATIENCE_S, Channel, Patience
from lamella_engine.remote.jobs import RemoteJobs
from lamella_engine.remote.place import Credentials, parse_url
from lamella_engine.remote.store import RemoteStore
from lamella_engine.rpc import lamella_pb2 as pb


def connect(url: str, executor: Executor, *, new_max_depth: int | None = None) -> tuple[RemoteStore, Jobs]:
    """Open a repository of a service.

    Parameters
    ----------
    url
        See :mod:`lamella_engine.remote.place`, which also says what the environment has to do with it;
        ``LAMELLA_CACHE_NBYTES`` bounds what is kept on this machine (4 GiB; 0 for nothing).
    executor
        Runs what is done for each chunk.
    new_max_depth
        Makes the repository first, whose chains may be so long.

    Raises
    ------
    InvalidInputError
        The URL names no repository, or a credential cannot be read.
    RepositoryNotFoundError
        There is none of that name, or none that the caller may read.
    AlreadyExistsError
        There is one already that was to be made.
    CorruptionError
        The repository is not what this user has seen of it before (``rollback``, ``fork``).
    StorageError
        Nobody answers there.
    """
    place = parse_url(url)
    cache = ChunkCache.of(place.address)
    channel = Channel(place, Credentials.of())
    pin = Pin(f"grpc://{place.address}/{place.repository}")
    try:
        if new_max_depth is not None:  # tried once: a second call would find what the first one made
            request = pb.CreateRequest(repository=place.repository, max_depth=new_max_depth)
            info = channel.call_once("Repositories.Create", request)
            head = _head(info)
            pin.replace(head)
            seen = [head]
        else:
            known = pb.DescribeRequest(repository=place.repository, seen=pin.seen.number if pin.seen else None)
            info = channel.call("Repositories.Describe", known, patience=Patience(OPENING_PATIENCE_S))
            head = _head(info)
            pin.advance(head, lambda _: info.seen_digest or None)
            seen = [head] if pin.seen is None else [pin.seen, head]
    except LamellaError:
        channel.close()
        raise
    store = RemoteStore(channel, place.repository, executor, cache, direct=info.grants)
    return store, RemoteJobs(channel, place.repository, seen=seen)


def _head(info: pb.RepositoryInfo) -> Head:
    return Head(info.id, info.head, info.head_digest)
