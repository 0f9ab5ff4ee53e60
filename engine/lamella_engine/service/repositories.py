"""The repositories below one root, opened when they are first asked for."""

import re
import threading
from pathlib import Path

from lamella_engine.chunk_index import index_path
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.errors import AlreadyExistsError, InvalidInputError, RepositoryNotFoundError
from lamella_engine.executor import Executor
from lamella_engine.jobs import OBJECT_DIRECTORIES
from lamella_engine.objects import open_objects
from lamella_engine.service.access import repository_not_found
from lamella_engine.signing import Signer

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}(?:/[a-z0-9][a-z0-9._-]{0,62}){0,3}")
# A repository's own directories, and the root's: a name with one of these in it could lie inside another repository.
_TAKEN = frozenset((*OBJECT_DIRECTORIES, "index", "probe", "access"))


def check_repository_name(name: str) -> str:
    """Return ``name`` if a service may have a repository of that name; raises InvalidInputError."""
    if not _NAME.fullmatch(name) or ".." in name or not _TAKEN.isdisjoint(name.split("/")):
        raise InvalidInputError(
            f"{name!r} cannot name a repository: use lower-case letters, digits and . _ - in at most four parts with / "
            f"between them, none of them {', '.join(sorted(_TAKEN))}",
            kind="bad_repository_name",
            name=name,
        )
    return name


class Repositories:
    """The repositories below a root. Safe for several threads.

    Parameters
    ----------
    root
        A directory, or a URL of an object store.
    executor
        Runs the work for all of them.
    signer
        Signs what is recorded in them.
    require_signed
        Whether each repository is made to take nothing from now on that is not signed by this signer, or by those whom
        it lists already.
    """

    def __init__(
        self, root: str, executor: Executor, *, signer: Signer | None = None, require_signed: bool = False
    ) -> None:
        if require_signed and signer is None:
            raise InvalidInputError("who requires signatures has to sign: give a key too", kind="bad_option")
        self._require_signed = require_signed
        self._root = root.rstrip("/")
        self._executor = executor
        self._signer = signer
        self._open: dict[str, PackedStore] = {}
        self._lock = threading.Lock()

    def create(self, name: str, *, max_depth: int) -> PackedStore:
        """Make a repository; raises AlreadyExistsError."""
        place = self._place(check_repository_name(name))
        objects = open_objects(place, create=True)
        path = index_path(objects, place)
        try:
            store = PackedStore.create(
                objects, self._executor, index_path=path, max_depth=max_depth, signer=self._signer
            )
        except AlreadyExistsError:
            raise AlreadyExistsError(
                f"there is a repository {name} already: use it as it is, or choose another name",
                kind="repository_exists",
                repository=name,
            ) from None
        return self._kept(name, store)

    def open(self, name: str) -> PackedStore:
        """Return a repository; raises RepositoryNotFoundError."""
        with self._lock:
            store = self._open.get(name)
        if store is not None:
            return store
        try:
            place = self._place(check_repository_name(name))
            objects = open_objects(place)
            path = index_path(objects, place)
            store = PackedStore(objects, self._executor, index_path=path, signer=self._signer)
        except (RepositoryNotFoundError, InvalidInputError):
            raise repository_not_found(name) from None
        return self._kept(name, store)

    def _kept(self, name: str, store: PackedStore) -> PackedStore:
        if self._require_signed and self._signer is not None and not store.log.state.signers:
            store.log.require_signed([self._signer.public])
        with self._lock:
            return self._open.setdefault(name, store)

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}" if "://" in self._root else str(Path(self._root, *name.split("/")))
