"""The seam: everything above it speaks in versions, cells and blobs, everything below in objects or messages.

No call takes a bare chunk id: what can be read is what a version names.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lamella_engine.content_store.manifest import Manifest
from lamella_engine.errors import LamellaError
from lamella_engine.format.version import Description
from lamella_engine.model import Buffer, Cell, ChunkId, PushId, RefInfo, RefKind, VersionId
from lamella_engine.sketches import Sketch

COMPANION_REACH = 8
"""So many cells back may a companion lie: the blobs of so many are held."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A chunk as stored, on its way between a store and whoever encodes or decodes it."""

    chunk: ChunkId
    encoding: int
    """See codecs.Encoding."""
    width: int
    """Bytes of one lane."""
    decoded_nbytes: int
    payload: Buffer
    base: ChunkId | None
    """The chunk that must be decoded first, for a delta."""
    read: Callable[[], Buffer] | None = field(default=None, compare=False)
    """Reads the chunk again, for a store that is given a payload which does not decode to it; None if nothing can."""
    floating: bool = field(default=False, compare=False)
    """Whether lanes are floats, for a store that encodes the chunk once more."""
    digest: bytes | None = field(default=None, compare=False)
    """Of the payload (``format.digests.blob_digest``), where it has been checked."""
    doubtful: bool = field(default=False, compare=False)
    """Whether nobody but its writer has ever decoded it: what it decodes to is to be compared with its chunk id."""
    keep: Callable[[Buffer], None] | None = field(default=None, compare=False)
    """Is shown the chunk by whoever decodes it, for a store that keeps some near."""


class Reading(NamedTuple):
    """What it takes to have one cell."""

    cell: Cell
    chain: tuple[Blob, ...]
    """Each the base of the next; the last decodes to the cell. The first is a full blob, or a delta against the chunk
    that the caller said to hold. Empty if the caller holds the cell already."""


class Stored(NamedTuple):
    """A blob as a store keeps it, without its payload."""

    chunk: ChunkId
    decoded_nbytes: int
    encoded_nbytes: int


class Planned(NamedTuple):
    """A cell of the version that is being pushed."""

    cell: Cell
    chunk: ChunkId
    companion: Cell | None = None
    """Another cell of it, within ``COMPANION_REACH`` before this one, whose chunk this one may be made against too."""
    nbytes: int = 0
    """Bytes that the caller holds until it has the answer."""


class Missing(NamedTuple):
    """A cell whose chunk the store wants to be given."""

    cell: Cell
    chunk: ChunkId
    base: ChunkId | None
    """What a delta would be against, if the store prefers one; :meth:`Push.base` gives its bytes."""
    companion: ChunkId | None
    """The chunk of the companion, if a blob may be made against it; the caller has its bytes."""


class Parent(NamedTuple):
    """A version by its place in the repository."""

    id: VersionId
    model: str
    number: int


@dataclass(frozen=True, slots=True)
class Recorded:
    """A version as the log records it."""

    id: VersionId
    model: str
    number: int
    description: Description
    parents: tuple[Parent, ...]


@dataclass(frozen=True, slots=True)
class RefUpdate:
    """A ref to be set or deleted."""

    model: str
    name: str
    kind: RefKind
    number: int | None
    """The version to stand at; None to delete the ref."""


class ContentStore(Protocol):
    """A repository's content. Safe for several threads."""

    vouches: bool
    """Whether a payload that is read has been held against a digest which leads up to the log. If not, it may be
    anything, and whoever decodes it has to compute the chunk's id."""

    def close(self) -> None:
        """Release what is held. Idempotent."""

    def resolve(self, revision: str) -> VersionId:
        """Return the version that a revision names; see ``content_store.revisions`` for the ways to name one.

        Raises InvalidInputError for what is no revision, NotFoundError for what names nothing.
        """

    def version(self, id: VersionId) -> Recorded:
        """Return what the repository records of a version; raises VersionNotFoundError."""

    def ancestors(self, id: VersionId) -> Iterator[Recorded]:
        """Yield a version and those before it along first parents, newest first; raises VersionNotFoundError."""

    def manifest(self, id: VersionId) -> Manifest:
        """Return a version's manifest, whose pages are read as they are needed."""

    def models(self) -> list[str]:
        """Return the names of all models that have versions."""

    def refs(self, model: str) -> list[RefInfo]:
        """Return the refs of a model by name."""

    def watch(self, model: str, ref: str, after: int) -> Iterator[Recorded]:
        """Yield the version at which a branch or alias stands, and each to which it moves, as it moves.

        The first one only if its number is not ``after``. Ends when it is closed. Whoever is slower than the ref may be
        given only the newest. Raises RefNotFoundError, also later if the ref is deleted.
        """

    def read(self, id: VersionId, cells: Iterable[Cell], have: VersionId | None = None) -> Iterator[Reading]:
        """Yield what it takes to have each of ``cells``, in their order. Digests of payloads have been checked.

        ``have`` is a version whose cells the caller holds. Where it has a tensor of the same name, dtype and shape, and
        the chunk that stands in its cell occurs in the chain, only what follows that chunk is read and yielded.

        Raises TensorNotFoundError, or CorruptionError for a chunk that is missing or damaged.
        """

    def locate(self, id: VersionId, cells: Iterable[Cell]) -> Iterator[tuple[Cell, tuple[Stored, ...]]]:
        """Yield each cell with the blobs that reading it takes, in the order of a chain, without reading them.

        A cell that stands in its row takes none. Raises as :meth:`read` does.
        """

    def begin(
        self, model: str, branch: str, *, parent: VersionId | None, push_id: PushId, part: bool = False
    ) -> "Push":
        """Start a push to a branch.

        ``parent`` must be the head of the branch if it exists, and defaults to it; on a new branch it is where the
        branch starts. ``part`` says that this push is to end as a part of another one: of many at a time, each of which
        looks for equal chunks where its cells lie in the parent, and little beyond. Raises ConflictError if it is
        another version.
        """

    def update_refs(self, updates: Sequence[RefUpdate]) -> None:
        """Set or delete refs, all or none.

        Raises AlreadyExistsError for a tag that stands elsewhere or a name of another kind, RefNotFoundError for
        deleting what is not there, VersionNotFoundError for a number that the model lacks.
        """


class Push(Protocol):
    """One push in flight, driven by one thread; :meth:`base` and :meth:`keep` alone may be called from several."""

    id: PushId
    model: str
    parents: tuple[Parent, ...]

    def consider(self, sketch: Sketch) -> None:
        """Choose where bases are taken from: for each tensor the parent, or the version that it is nearest to.

        To be called before anything is planned; without it the parent is taken.
        """

    def plan(self, cells: Iterable[Planned]) -> Iterator[Missing | None]:
        """Yield one answer for each cell, in order: None if its chunk is live or has been called missing before.

        A cell's companion must be planned before it, and its blob, if it is missing, be written before.

        May call a chunk missing that is stored (it costs bytes); never calls one present that is not live.
        """

    def base(self, missing: Missing) -> Buffer | None:
        """Return the decoded bytes that a delta for ``missing`` is made against, which must name one.

        None if they cannot be had here: a blob that is made without them is made once more where they can.
        """

    def keep(self, blob: Blob, data: Buffer) -> None:
        """Be shown a blob and its chunk by whoever encodes it, for a store that keeps some near. Raises nothing."""

    def write(self, blobs: Iterable[Blob]) -> None:
        """Store blobs, in the order in which they are to lie. Every one is decoded and its chunk id compared first.

        One that does not decode to its chunk is stored as the chunk itself, with a warning, if that can be read again
        and is what it was: then whoever encoded it has erred. Raises InvalidInputError (``wrong_blob``) if not. What a
        failed call wrote is harmless.
        """

    def part(self) -> bytes:
        """End as a part of another push to the same branch, and return what :meth:`join` of that one takes.

        For checkpoints that several processes hold: each stores its cells by a push of its own, and one of them records
        the version. What was written is that push's from now on: nothing but a collection of garbage removes it.
        Repeating it is safe. Raises InvalidInputError if a chunk that was called missing was not written.
        """

    def join(self, part: bytes) -> None:
        """Have everything that a part stored, or found live, count as planned and written here.

        ``part`` is what :meth:`part` of a push to this store returned. Repeating it is safe. Raises InvalidInputError
        (``bad_part``) for anything else.
        """

    def restart(self, error: LamellaError) -> bool:
        """Begin anew after an error, with the same id and parents, if that makes sense; say whether it did.

        If so, everything has to be planned and written again. Raises ConflictError if the branch has moved.
        """

    def abandon(self) -> None:
        """Give up: remove what was written, as far as it can be, and raise nothing.

        Not after a :meth:`commit` whose outcome is unknown.
        """

    def commit(self, description: Description) -> Recorded:
        """Record the version and move its branch, if that still stands where this push found it.

        Atomic: raises ConflictError and changes nothing visible otherwise. Repeating it is safe. If the branch's head
        equals the version in parameters, attachments, recipe, metrics and message, nothing is recorded and that head
        is returned.

        Raises InvalidInputError if the description names a chunk that was neither planned nor written.
        """
