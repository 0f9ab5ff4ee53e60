"""A repository as users hold it: push, checkout, log, diff, distance, refs. Written once, above the seam."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from lamella_engine.auditing import Act, NotedRead
from lamella_engine.background import Background, PushHandle
from lamella_engine.checking_out import Checkout
from lamella_engine.checkpoints import Checkpoint, open_checkpoint
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.content_store.revisions import parse_target
from lamella_engine.content_store.seam import ContentStore, Push, RefUpdate
from lamella_engine.cost import Cost, cost_of
from lamella_engine.distance import Distance
from lamella_engine.errors import InvalidInputError, LamellaError
from lamella_engine.executor import Executor
from lamella_engine.heads import Head
from lamella_engine.jobs import Diff, Jobs, LocalJobs, Stats
from lamella_engine.maintenance import Problem, Verification
from lamella_engine.model import Attachment, Progress, RefInfo, RefKind, VersionId
from lamella_engine.notes import attachments_of, notes_of
from lamella_engine.pushing import push_checkpoint
from lamella_engine.reading import Patterns, Reader, select
from lamella_engine.sharing import Sharing
from lamella_engine.spreading import SpreadJobs, Task, cluster_named
from lamella_engine.transaction import Transaction
from lamella_engine.version_files import check_files
from lamella_engine.versions import Version

Result = TypeVar("Result")


class Repository:
    """A repository: models, their versions, and refs to them. Safe for several threads and processes.

    Made by :func:`lamella.init` and :func:`lamella.open`; a context manager that closes it at the end.
    """

    __module__ = "lamella"

    def __init__(self, store: ContentStore, executor: Executor, jobs: Jobs, *, location: str | None = None) -> None:
        self._store = store
        self._executor = executor
        self._jobs = jobs
        self._location = location
        self._reader = Reader(store, executor)
        self.sharing = Sharing(store, executor, self._reader)
        """For workers that hold a checkpoint together: what ``lamella.torch`` and ``lamella.ray`` are made of."""
        self._background = Background()

    def __enter__(self) -> "Repository":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except LamellaError:
            if kind is None:  # else another error is on its way, and this one has been logged
                raise

    def close(self) -> None:
        """Wait for pushes that go on, then release threads, memory and files. Idempotent; no version needs it.

        Raises what a push with ``wait=False`` failed with, if nobody has asked it.
        """
        try:
            self._background.close()
        finally:
            self._store.close()

    # -- in ------------------------------------------------------------------------------------------------------------

    @overload
    def push(
        self,
        source: "Mapping[str, Any] | str | PathLike[str]",
        target: str,
        *,
        message: str = "",
        parent: str | None = None,
        metrics: Mapping[str, float] | None = None,
        recipe: Any = None,
        files: Mapping[str, bytes] | None = None,
        progress: Callable[[Progress], None] | None = None,
        wait: Literal[True] = True,
    ) -> Version: ...

    @overload
    def push(
        self,
        source: "Mapping[str, Any] | str | PathLike[str]",
        target: str,
        *,
        message: str = "",
        parent: str | None = None,
        metrics: Mapping[str, float] | None = None,
        recipe: Any = None,
        files: Mapping[str, bytes] | None = None,
        progress: Callable[[Progress], None] | None = None,
        wait: Literal[False],
    ) -> PushHandle: ...

    def push(
        self,
        source: "Mapping[str, Any] | str | PathLike[str]",
        target: str,
        *,
        message: str = "",
        parent: str | None = None,
        metrics: Mapping[str, float] | None = None,
        recipe: Any = None,
        files: Mapping[str, bytes] | None = None,
        progress: Callable[[Progress], None] | None = None,
        wait: bool = True,
    ) -> Version | PushHandle:
        """Store a checkpoint as a new version at the tip of a branch.

        Parameters
        ----------
        source
            A dict of torch tensors or NumPy arrays; the path of a ``.safetensors`` file, or of a directory with such
            files and others beside them (config, tokenizer, index of shards), which then check out byte for byte
            (hidden and empty directories are left out); a ``zarr.Group``, or the path of a Zarr v3 directory.
        target
            ``"model@branch"``. The branch is made if it is not there.
        message
            What to say about it.
        parent
            A revision. On a branch that exists it must be its head (the default); on a new one it is where the branch
            starts.
        metrics
            Numbers by name, such as ``{"loss": 0.31}``.
        recipe
            What made it: anything that JSON can hold.
        files
            Contents by path of more files to keep with the version.
        progress
            Is called, in the thread that pushes, with how far it is.
        wait
            Whether to return when the version is recorded; otherwise when the tensors have been copied, and the push
            goes on by itself. Pushes of a repository that nobody waits for are done one after the other, in the order
            of the calls, each on the head that the one before has left; at most two have copies of their tensors at a
            time, and a third waits for room. A path or a group is not copied, and must stay as it is.

        Returns
        -------
        Version
            The new version; or the branch's head, if that is equal in tensors, files, metrics, recipe and message.
        PushHandle
            Without ``wait``: tells when the tensors may change, and when there is a version. A failure that nobody
            asks for is logged, and raised by the next push to the branch, instead of it, or by :meth:`close`.

        Raises
        ------
        InvalidInputError
            The source or a name is malformed, or the source changed while it was read.
        ConflictError
            The branch is not, or no longer, where it was expected.
        OutcomeUnknownError
            The store did not say whether the version was recorded.
        """
        model, branch = parse_target(target)
        notes = notes_of(message, metrics, recipe)
        attached = attachments_of(files)
        if wait:
            self._background.settle(model, branch)
        else:
            self._background.raise_failure(model, branch)

        def record(checkpoint: Checkpoint) -> Version:
            push = self._begin(model, branch, None if parent is None else self._store.resolve(parent))
            recorded = push_checkpoint(push, checkpoint, self._executor, notes, files=attached, progress=progress)
            return Version(recorded, self._reader)

        checkpoint = _open_source(source, attached)
        if not wait:
            return self._background.start(model, branch, checkpoint, record)
        with checkpoint:
            return record(checkpoint)

    def transaction(
        self,
        target: str,
        *,
        message: str = "",
        parent: str | None = None,
        metrics: Mapping[str, float] | None = None,
        recipe: Any = None,
    ) -> "Transaction":
        """Write a version through Zarr; the parameters are those of :meth:`push`.

        >>> import lamella, numpy as np
        >>> repo = lamella.init("memory://transaction")
        >>> with repo.transaction("demo@main", message="first") as group:
        ...     array = group.create_array("w", shape=(2, 3), dtype="float32")
        ...     array[:] = 1
        >>> repo.version("demo@main")["w"][0]
        array([1., 1., 1.], dtype=float32)

        The block gets an empty, writable ``zarr.Group``. Its arrays are the version's tensors when the block ends,
        whatever their chunks and codecs; after an exception nothing is recorded. Arrays wait in a temporary directory
        until then (TMPDIR says where). Attributes and dimension names are not kept.

        Every bit of what is written is kept, with two exceptions that Zarr makes: a fill value of NaN stands for the
        canonical one, and an array of shards that is told not to write empty chunks drops those that equal its fill
        value, -0.0 among them.

        Raises
        ------
        ConflictError
            At the end: the branch moved meanwhile.
        """
        model, branch = parse_target(target)
        notes = notes_of(message, metrics, recipe)
        self._background.settle(model, branch)
        base = None if parent is None else self._store.resolve(parent)
        return Transaction(self._reader, self._executor, notes, lambda: self._begin(model, branch, base))

    def _begin(self, model: str, branch: str, parent: VersionId | None) -> Push:
        return self._store.begin(model, branch, parent=parent, push_id=new_push_id())

    # -- out -----------------------------------------------------------------------------------------------------------

    def version(self, revision: str) -> Version:
        """Return a version.

        ``revision`` is ``"bert@main"`` or another ref, ``"bert@v3"``, ``"bert@latest"``, ``"bert@best:accuracy"``, or
        at least 8 digits of an id; ``~N`` after it goes back N versions along first parents.

        Reads its metadata only. Raises NotFoundError if nothing has that name, InvalidInputError if it can be no name.
        """
        return self._version(self._store.resolve(revision))

    def _version(self, id: VersionId) -> Version:
        return Version(self._store.version(id), self._reader)

    def checkout(
        self,
        revision: str,
        out: "str | PathLike[str] | None" = None,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        into: Mapping[str, Any] | None = None,
        have: str | None = None,
        framework: Literal["numpy", "torch"] = "numpy",
        format: Literal["files", "zarr"] = "files",
        overwrite: bool = False,
        verify: Literal["blob", "chunk"] = "blob",
        progress: Callable[[Progress], None] | None = None,
    ) -> dict[str, Any]:
        """Get tensors back, in memory or as files.

        Parameters
        ----------
        revision
            Which version.
        out
            A directory, made if it is not there. Files that were pushed come back byte for byte; tensors that were
            pushed from memory become ``model.safetensors``; tensors that are selected become that and its index. None
            returns tensors.
        include, exclude
            Globs over tensor names, one or several. Only the bytes of selected tensors are read.
        into
            Memory to fill in place: a writable NumPy array or torch tensor for the name of each selected tensor, of its
            dtype and shape, such as a module's state dict. Not together with ``out``.
        have
            A revision that ``into`` holds: only what differs from it is read, and what is decoded against that memory
            is checked.
        framework
            What tensors are returned as, without ``into``.
        format
            What ``out`` gets: files, as said above, or a plain Zarr v3 hierarchy of the tensors.
        overwrite
            Whether files that are there, and differ, may be replaced.
        verify
            ``"blob"`` checks the digest of everything that is read; ``"chunk"`` also computes the id of what it
            decodes to, which is always done with what a service sends.
        progress
            Is called, in this thread, with how far the checkout is.

        Returns
        -------
        dict
            Name -> array or tensor, those of ``into`` if it is given; with ``out``, path of each file in it -> its
            :class:`pathlib.Path`.

        Raises
        ------
        InvalidInputError
            ``into`` differs from the version in names, dtypes or shapes (``structure_mismatch``; nothing is changed),
            or does not hold ``have`` (``not_held``).
        AlreadyExistsError
            A file is there, differs, and ``overwrite`` is off. No file is changed then.
        TensorNotFoundError
            A pattern of ``include`` matches nothing.
        CorruptionError
            Stored bytes are damaged; nothing half-written is left.
        """
        if framework not in ("numpy", "torch") or verify not in ("blob", "chunk") or format not in ("files", "zarr"):
            raise InvalidInputError(
                "framework is 'numpy' or 'torch', format is 'files' or 'zarr', verify is 'blob' or 'chunk'",
                kind="bad_option",
            )
        if (out is None and format != "files") or (framework == "torch" and (out is not None or into is not None)):
            raise InvalidInputError(
                "format says what is written to out, and framework what is returned without out and into",
                kind="bad_option",
            )
        if into is not None and out is not None:
            raise InvalidInputError("give out for files or into for memory, not both", kind="bad_option")
        if into is None and have is not None:
            raise InvalidInputError(
                "have says what the memory of into holds: give into, or leave have out", kind="bad_option"
            )
        checkout = Checkout(
            self._store,
            self._executor,
            self._store.resolve(revision),
            select(include, exclude),
            check=verify == "chunk",
            progress=progress,
        )
        if out is not None:
            if not fspath(out):
                raise InvalidInputError("out is empty: name a directory", kind="bad_path")
            return (checkout.to_zarr if format == "zarr" else checkout.to_files)(Path(out), overwrite=overwrite)
        if into is not None:
            return checkout.to_memory(into, have=None if have is None else self._store.resolve(have))
        return checkout.to_tensors(framework)

    def cost(self, revision: str, *, include: Patterns = None, exclude: Patterns = None) -> Cost:
        """Say what the selected tensors take to keep, and what a checkout of them would read; reads no weights."""
        id = self._store.resolve(revision)
        return cost_of(self._store, id, select(include, exclude).tensors(self._store.manifest(id)))

    def log(self, revision: str) -> Iterator[Version]:
        """Yield a version and its ancestors along first parents, newest first."""
        for recorded in self._store.ancestors(self._store.resolve(revision)):
            yield Version(recorded, self._reader)

    def watch(self, name: str, *, after: str | None = None) -> Iterator[Version]:
        """Yield the version at which a branch or alias stands, and each to which it moves, as it moves.

        Parameters
        ----------
        name
            ``"model@ref"``.
        after
            A revision that the caller has: the first one is yielded only if it is another.

        Never ends by itself: stop asking, or break. Whoever takes longer over one than the ref stays there may be given
        only the newest of the next. With ``checkout(..., into=tensors, have=...)`` a process follows another's training
        at the cost of what changes. Raises RefNotFoundError.

        >>> import lamella, numpy as np
        >>> repo = lamella.init("memory://watch")
        >>> first = repo.push({"w": np.zeros(3)}, "demo@main")
        >>> next(repo.watch("demo@main")) == first
        True
        """
        model, ref = parse_target(name)
        at = None if after is None else self._store.version(self._store.resolve(after))
        if at is not None and at.model != model:
            raise _another_model(after, at.model, model)
        for recorded in self._store.watch(model, ref, 0 if at is None else at.number):
            yield Version(recorded, self._reader)

    def diff(self, a: str, b: str) -> Diff:
        """Say which tensors differ between two versions; reads no weights."""
        return self._jobs.diff(self._store.resolve(a), self._store.resolve(b))

    def distance(self, a: str, b: str, *, include: Patterns = None, executor: str | None = None) -> Distance:
        """Measure two versions against each other, exactly and in float64; chunks that are equal are not read.

        Parameters
        ----------
        a, b
            Revisions.
        include
            Globs over tensor names.
        executor
            ``"ray"`` for the nodes of a Ray cluster, each of which has to see the repository where it was opened, and
            to have the credentials in its environment. The result has the same bits.

        Raises
        ------
        InvalidInputError
            A selected tensor is in one version only, or has another dtype or shape there; or there is no such executor
            (``bad_executor``), or its nodes could not open this repository (``not_shared``).
        StorageError
            The nodes of the executor are gone (``worker_lost``).
        """
        return self._jobs_by(executor).distance(self._store.resolve(a), self._store.resolve(b), select(include))

    # -- refs ----------------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Return the names of all models."""
        return self._store.models()

    def refs(self, model: str) -> list[RefInfo]:
        """Return the branches, tags and aliases of a model by name."""
        return self._store.refs(model)

    def branch(self, name: str, revision: str) -> None:
        """Make a branch at a version of its model, or move it there, also back."""
        self._set_ref("branch", name, revision)

    def tag(self, name: str, revision: str) -> None:
        """Make a tag. Raises AlreadyExistsError if it stands at another version: tags never move."""
        self._set_ref("tag", name, revision)

    def alias(self, name: str, revision: str) -> None:
        """Make an alias, such as ``"bert@production"``, or move it."""
        self._set_ref("alias", name, revision)

    def delete_ref(self, name: str) -> None:
        """Delete a branch, tag or alias. Versions stay. Raises RefNotFoundError."""
        model, ref = parse_target(name)
        self._store.update_refs([RefUpdate(model, ref, "branch", None)])

    def _set_ref(self, kind: RefKind, name: str, revision: str) -> None:
        model, ref = parse_target(name)
        at = self._store.version(self._store.resolve(revision))
        if at.model != model:
            raise _another_model(revision, at.model, model)
        self._store.update_refs([RefUpdate(model, ref, kind, at.number)])

    # -- the whole -----------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return how large the repository is. Lists every object."""
        return self._jobs.stats()

    def verify(self, deep: bool = False, *, doubtful: bool = False, executor: str | None = None) -> Verification:
        """Check everything that is stored; see :class:`lamella.Verification` for what was found.

        Changes nothing, with one exception: packs that only their writers had decoded (see ``serve --direct``) may
        serve any push once a deep check has found them right.

        Parameters
        ----------
        deep
            Whether to decode every blob too, and compute its chunk id again.
        doubtful
            Check only the packs that nobody but their writers has decoded; deeply.
        executor
            As for :meth:`distance`: its nodes check the packs, and this process the log and what versions say. The same
            problems are found. Not for a repository of a service, which does it where its bytes lie.
        """
        return self._jobs_by(executor).verify(deep=deep, doubtful=doubtful)

    def run_task(self, task: Task[Result]) -> Result:
        """Do a part of a job that is spread over several processes; executors are made of it."""
        return task(self._store, self._executor)

    def _jobs_by(self, executor: str | None) -> Jobs | SpreadJobs:
        if executor is None:
            return self._jobs
        if self._location is None:
            raise InvalidInputError(
                "no other process can open a repository in memory: leave executor out", kind="not_shared"
            )
        return SpreadJobs(self._store, self._executor, cluster_named(executor), self._location)

    def audit(self) -> Iterator[Act | NotedRead | Problem]:
        """Yield who did what: every act by the log, then every read that a service noted, and what is wrong of those.

        The chain of entries, their signatures and the segments that they vouch for are checked in this process, behind
        a service as in a directory, and the log has to lead to what this user has seen of it before. Nothing is checked
        before it is asked for: only who goes on to the end knows that all is well.

        Raises
        ------
        CorruptionError
            The log is not whole, not signed as it must be, or not the one that was seen before.
        PermissionDeniedError
            Of a service: for auditors and admins.
        """
        return self._jobs.audit()

    def signers(self) -> list[str]:
        """Return the public keys, in hex, of which one has to sign what is recorded; none if nothing need be signed.

        Raises InvalidInputError for a repository of a service.
        """
        return [key.hex() for key in self._jobs.signers()]

    def require_signed(self, keys: Iterable[str] = ()) -> list[str]:
        """Have this repository take nothing from now on that is not signed by one of these keys; return them.

        There is no way back: whoever has one of the keys may list others in their place, but never none.

        Parameters
        ----------
        keys
            Public keys, in hex, as ``keygen`` prints them; by default that of the key with which this repository was
            opened. That one has to be on the list that holds now, or on the first one.

        Raises
        ------
        PermissionDeniedError
            The repository was opened without a key (``no_signing_key``), or with another (``not_a_signer``).
        InvalidInputError
            A key is none, or the repository is one of a service, which signs by itself.
        """
        return [key.hex() for key in self._jobs.require_signed([_public_key(key) for key in keys])]


def _public_key(text: str) -> bytes:
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{64}", text):
        raise InvalidInputError(f"{text!r} is no public key: one is 64 hex digits, as keygen prints it", kind="bad_key")
    return bytes.fromhex(text)


def _another_model(revision: str | None, actual: str, wanted: str) -> InvalidInputError:
    return InvalidInputError(
        f"{revision} is a version of {actual}, not of {wanted}: name one of {wanted}", kind="another_model"
    )


def _open_source(source: object, attached: Sequence[Attachment]) -> Checkpoint:
    """Open what is to be pushed, if it can be a version together with files that are given beside it."""
    with ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(source))
        if not checkpoint.structure and not checkpoint.attachments and not attached:
            raise InvalidInputError(
                "there is nothing to push: the source has neither tensors nor files: check what was given",
                kind="empty_source",
            )
        check_files([*checkpoint.attachments, *attached], has_tensors=bool(checkpoint.structure))
        opened.pop_all()
    return checkpoint


def on_objects(store: PackedStore, *, seen: Collection[Head] = (), location: str | None = None) -> Repository:
    """Return the repository that a store holds, with jobs done in this process; ``seen`` as for them.

    ``location`` is where any other process would open it.
    """
    return Repository(store, store.executor, LocalJobs(store, store.executor, seen=seen), location=location)
