"""The repositories below one root, opened when they are asked for, and closed when others have been since."""

import re
import threading
from collections import OrderedDict
from pathlib import Path
from weakref import WeakValueDictionary

from lamella_engine.chunk_index import index_path
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.errors import AlreadyExistsError, InvalidInputError, RepositoryNotFoundError
from lamella_engine.executor import Executor
from lamella_engine.jobs import OBJECT_DIRECTORIES
from lamella_engine.objects import open_objects
from lamella_engine.service.access import repository_not_found
from lamella_engine.signing import Signer

KEPT_OPEN = 128
"""Repositories that stay open though nothing uses them, those that were asked for last.

Each has three files open, of its chunk index, where a process may have 1,024 by default; and 0.1 MB or more of what was
looked at. To open one again and read 50 small tensors of it takes 17 ms on a disk."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}(?:/[a-z0-9][a-z0-9._-]{0,62}){0,3}")
# A repository's own directories, and the root's: a name with one of these in it could lie inside another repository.
_TAKEN = frozenset((*OBJECT_DIRECTORIES, "incoming", "index", "probe", "access"))


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

    One that anybody holds is not opened a second time: calls that wait for each other meet at one store.

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
        self._open: WeakValueDictionary[str, PackedStore] = WeakValueDictionary()
        """All that anybody holds."""
        self._recent: OrderedDict[str, PackedStore] = OrderedDict()
        """Those that were asked for last, held here."""
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
        return self._kept(name, self._signed(store))

    def open(self, name: str) -> PackedStore:
        """Return a repository; raises RepositoryNotFoundError."""
        with self._lock:
            store = self._open.get(name)
        if store is not None:
            return self._kept(name, store)
        try:
            place = self._place(check_repository_name(name))
            objects = open_objects(place)
            path = index_path(objects, place)
            store = PackedStore(objects, self._executor, index_path=path, signer=self._signer)
        except (RepositoryNotFoundError, InvalidInputError):
            raise repository_not_found(name) from None
        return self._kept(name, self._signed(store))

    def _signed(self, store: PackedStore) -> PackedStore:
        if self._require_signed and self._signer is not None and not store.log.state.signers:
            store.log.require_signed([self._signer.public])
        return store

    def _kept(self, name: str, store: PackedStore) -> PackedStore:
        """Return the store of this name that others have, if any have; let go of those that were asked for long ago."""
        dropped = []  # until the lock is free: the last to hold a store closes its files
        with self._lock:
            store = self._open.setdefault(name, store)
            self._recent[name] = store
            self._recent.move_to_end(name)
            while len(self._recent) > KEPT_OPEN:
                dropped.append(self._recent.popitem(last=False))
        return store

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}" if "://" in self._root else str(Path(self._root, *name.split("/")))
