"""A version's description (what it is, and the source of its id) and its locator (where it was written).

Both stand, a line of canonical JSON each, in one metadata object (FORMAT.md, "Version" and "Locator"). The id is the
digest of the first line alone: the second may say something else in a copy of the repository.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from lamella_engine.errors import CorruptionError, LimitError, UnsupportedFormatError
from lamella_engine.format import canonical
from lamella_engine.format.digests import DIGEST_NBYTES, Context, digest
from lamella_engine.format.manifest import MAX_TENSORS, CellPage, StructurePage
from lamella_engine.format.names import check_named, parse_pack_name, push_id
from lamella_engine.format.pack import FOOTER_NBYTES, MAX_INDEX_NBYTES
from lamella_engine.model import AttachmentRole, ChunkId, PushId, VersionId

VERSION_FORMAT = 0

MAX_METADATA_NBYTES = 1 << 28
"""Longest metadata object; 256 MiB is the table of contents of some 4 TB of weights in which no two neighbours share
a pack."""

MAX_CELLS = 1 << 40
"""Most cells of a version: numbers of cells stay far within 64 bits, whatever a description says."""


@dataclass(frozen=True, slots=True)
class AttachmentPages:
    """An attachment as a version lists it."""

    path: str
    role: AttachmentRole
    chunks: tuple[tuple[ChunkId, int], ...]
    """Its bytes in order: id and length of each chunk."""
    prefix: str = ""
    """What tensors' names have in the version before the names that this header gives them."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole attachment."""
        return sum(nbytes for _, nbytes in self.chunks)


@dataclass(frozen=True, slots=True)
class SketchLanes:
    """The lanes of one width in a version's sketch."""

    chunk: ChunkId
    nbytes: int
    width: int


@dataclass(frozen=True, slots=True)
class Description:
    """Everything that a version's id is the digest of."""

    model: str
    push: PushId
    """The push that made it; keeps two versions apart that are equal in everything else."""
    structure_id: str
    parameters_id: str
    tensor_count: int
    cell_count: int
    decoded_nbytes: int
    """Bytes of all its tensors."""
    pages: tuple[StructurePage, ...]
    attachments: tuple[AttachmentPages, ...]
    parents: tuple[VersionId, ...]
    message: str
    author: str
    created: str
    """UTC, ISO 8601 with microseconds; information only."""
    metrics: Mapping[str, Any]
    recipe: Any
    sketches: tuple[SketchLanes, ...] = ()
    """By ascending width."""

    @property
    def manifest_chunks(self) -> tuple[tuple[ChunkId, int], ...]:
        """The version's own chunks in the order that its locator counts them: id and decoded length.

        Each structure page, followed by the cell pages of its tensors; then the chunks of each attachment; then the
        sketches.
        """
        found: list[tuple[ChunkId, int]] = []
        for page in self.pages:
            found.append((page.chunk, page.nbytes))
            found += ((cells.chunk, cells.nbytes) for cells in page.cells)
        for attachment in self.attachments:
            found += attachment.chunks
        found += ((lanes.chunk, lanes.nbytes) for lanes in self.sketches)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class PackRef:
    """A pack with what a reader needs to fetch its index in one range."""

    name: str
    nbytes: int
    index_nbytes: int


@dataclass(frozen=True, slots=True)
class Locator:
    """Where a version was written. Names packs as they were then; a reader maps replaced ones through the log."""

    number: int
    """The version's number in its model, which the log confirms."""
    parents: tuple[tuple[str, int], ...]
    """Model and number of each parent, in the order of the description."""
    packs: tuple[PackRef, ...]
    """Every pack of the closure: those that hold its chunks, and those that hold their bases."""
    manifest_runs: tuple[tuple[int, int], ...]
    """(count, position in ``packs``) over :attr:`Description.manifest_chunks`."""
    cell_runs: tuple[tuple[int, int], ...]
    """(count, position in ``packs``) over all cells; what it says of a cell that stands in its row means nothing."""
    doubtful: tuple[int, ...] = ()
    """Positions in ``packs``, ascending, of those that only their writers had decoded: the log knows whether others
    have since. Of the rest nobody needs to ask."""


_DESCRIPTION = {
    "attachments": [{"chunks": [(str, int)], "path": str, "prefix": str, "role": str}],
    "author": str,
    "created": str,
    "format": int,
    "message": str,
    "metrics": {str: float},
    "model": str,
    "parameters": str,
    "parents": [str],
    "push": str,
    "recipe": object,
    "sketches": [(str, int, int)],
    "structure": {
        "cells": int,
        "id": str,
        "nbytes": int,
        "pages": [(str, int, str, int, [(str, int, int)])],
        "tensors": int,
    },
}

_LOCATOR = {
    "cells": [(int, int)],
    "manifest": [(int, int)],
    "number": int,
    "packs": [(str, int, int)],
    "parents": [(str, int)],
}
_WHERE_NEEDED = {"doubtful": [int]}
"""Fields that stand only in locators which they tell something of."""


def encode_description(description: Description) -> bytes:
    """Return the canonical bytes of a description; their digest is the version's id."""
    return canonical.dumps(
        {
            "attachments": [
                {
                    "chunks": [[chunk.hex(), nbytes] for chunk, nbytes in item.chunks],
                    "path": item.path,
                    "prefix": item.prefix,
                    "role": item.role,
                }
                for item in description.attachments
            ],
            "author": description.author,
            "created": description.created,
            "format": VERSION_FORMAT,
            "message": description.message,
            "metrics": description.metrics,
            "model": description.model,
            "parameters": description.parameters_id,
            "parents": list(description.parents),
            "push": description.push,
            "recipe": description.recipe,
            "sketches": [[lanes.chunk.hex(), lanes.nbytes, lanes.width] for lanes in description.sketches],
            "structure": {
                "cells": description.cell_count,
                "id": description.structure_id,
                "nbytes": description.decoded_nbytes,
                "pages": [
                    [
                        page.chunk.hex(),
                        page.nbytes,
                        page.first_name,
                        page.first_cell,
                        [[cells.chunk.hex(), cells.nbytes, cells.first_cell] for cells in page.cells],
                    ]
                    for page in description.pages
                ],
                "tensors": description.tensor_count,
            },
        }
    )


def version_id(description: bytes) -> VersionId:
    """Return the id of the version whose description has these bytes."""
    return VersionId(digest(Context.VERSION, description).hex())


def encode_metadata(description: bytes, locator: Locator) -> bytes:
    """Return the metadata object of a version; raises LimitError if it would be longer than any reader accepts."""
    second = canonical.dumps(
        {
            "cells": locator.cell_runs,
            "manifest": locator.manifest_runs,
            "number": locator.number,
            "packs": [[pack.name, pack.nbytes, pack.index_nbytes] for pack in locator.packs],
            "parents": locator.parents,
        }
        | ({"doubtful": locator.doubtful} if locator.doubtful else {})
    )
    data = description + b"\n" + second + b"\n"
    if len(data) > MAX_METADATA_NBYTES:
        raise LimitError(
            f"the description of this version takes {len(data)} bytes, and {MAX_METADATA_NBYTES} are the limit: keep a "
            "large recipe in a file beside it",
            kind="metadata_limit",
        )
    return data


def decode_description(line: bytes, *, expected: VersionId) -> Description:
    """Parse and check the description of version ``expected``; raises CorruptionError."""
    what = f"the metadata of version {expected[:12]}"
    if version_id(line) != expected:
        raise CorruptionError(f"{what} describes another version", kind="bad_digest")
    return _description(canonical.loads(line, what=what), what)


def decode_metadata(data: bytes, *, expected: VersionId) -> tuple[Description, Locator]:
    """Parse and check the metadata object of version ``expected``.

    Raises CorruptionError if the description's digest is another or a rule of FORMAT.md is broken.
    """
    what = f"the metadata of version {expected[:12]}"
    lines = data.split(b"\n", 3)
    if len(lines) != 3 or lines[2]:
        raise CorruptionError(f"{what} is not two lines", kind="bad_metadata")
    description = decode_description(lines[0], expected=expected)
    return description, _locator(canonical.loads(lines[1], what=what), description, what)


def _description(value: Any, what: str) -> Description:
    if isinstance(value, dict) and value.get("format") != VERSION_FORMAT:
        raise UnsupportedFormatError(f"{what} has format {value.get('format')!r}: upgrade lamella")
    canonical.conform(value, _DESCRIPTION, what=what)
    structure = value["structure"]
    attachments = []
    for item in value["attachments"]:
        if item["role"] not in get_args(AttachmentRole):
            raise UnsupportedFormatError(f"{what} has an attachment of role {item['role']!r}: upgrade lamella")
        chunks = tuple((_chunk(chunk, what), nbytes) for chunk, nbytes in item["chunks"])
        attachments.append(AttachmentPages(item["path"], item["role"], chunks, item["prefix"]))
    pages = tuple(
        StructurePage(
            _chunk(chunk, what),
            nbytes,
            first_name,
            first_cell,
            tuple(CellPage(_chunk(cells, what), cells_nbytes, first) for cells, cells_nbytes, first in cell_pages),
        )
        for chunk, nbytes, first_name, first_cell, cell_pages in structure["pages"]
    )
    names = [page.first_name for page in pages]
    firsts = [cells.first_cell for page in pages for cells in page.cells]
    starts = [page.first_cell for page in pages]
    owned = all(page.cells[0].first_cell == page.first_cell for page in pages if page.cells)
    if (
        names != sorted(set(names))
        or firsts != sorted(set(firsts))
        or starts != sorted(starts)
        or not owned
        or (starts[:1] or [0]) != [0]
        or any(first >= structure["cells"] for first in firsts)
        or any(start > structure["cells"] for start in starts)
        or structure["cells"] > MAX_CELLS
        or (not pages and structure["tensors"])
        or structure["tensors"] > MAX_TENSORS
    ):
        raise CorruptionError(f"{what} lists its pages out of order", kind="bad_metadata")
    sketches = tuple(SketchLanes(_chunk(chunk, what), nbytes, width) for chunk, nbytes, width in value["sketches"])
    widths = [lanes.width for lanes in sketches]
    if widths != sorted(set(widths)):
        raise CorruptionError(f"{what} lists its sketches out of order", kind="bad_metadata")
    for parent in (*value["parents"], structure["id"], value["parameters"]):
        _chunk(parent, what)
    return Description(
        model=value["model"],
        push=push_id(value["push"]),
        structure_id=structure["id"],
        parameters_id=value["parameters"],
        tensor_count=structure["tensors"],
        cell_count=structure["cells"],
        decoded_nbytes=structure["nbytes"],
        pages=pages,
        attachments=tuple(attachments),
        parents=tuple(VersionId(parent) for parent in value["parents"]),
        message=value["message"],
        author=value["author"],
        created=value["created"],
        metrics=value["metrics"],
        recipe=value["recipe"],
        sketches=sketches,
    )


def _locator(value: Any, description: Description, what: str) -> Locator:
    optional = _WHERE_NEEDED.keys() & value if isinstance(value, dict) else ()
    canonical.conform(value, _LOCATOR | {name: _WHERE_NEEDED[name] for name in optional}, what=what)
    packs = tuple(PackRef(name, nbytes, index_nbytes) for name, nbytes, index_nbytes in value["packs"])
    for pack in packs:
        parse_pack_name(pack.name)
        if pack.index_nbytes > min(pack.nbytes - FOOTER_NBYTES, MAX_INDEX_NBYTES):
            raise CorruptionError(f"{what} has a pack with an index that cannot be so long", kind="bad_metadata")
    for key, total in (("manifest", len(description.manifest_chunks)), ("cells", description.cell_count)):
        runs = value[key]
        if sum(count for count, _ in runs) != total or any(pack >= len(packs) for _, pack in runs):
            raise CorruptionError(f"{what} does not locate all its {key}", kind="bad_metadata")
    doubtful = tuple(value.get("doubtful", ()))
    if ("doubtful" in value and not doubtful) or doubtful != tuple(sorted({at for at in doubtful if at < len(packs)})):
        raise CorruptionError(f"{what} does not say which of its packs are doubtful", kind="bad_metadata")
    check_named(description.model, value["number"], what=what, kind="bad_metadata")
    for model, number in value["parents"]:
        check_named(model, number, what=what, kind="bad_metadata")
    if len(value["parents"]) != len(description.parents):
        raise CorruptionError(f"{what} does not locate all its parents", kind="bad_metadata")
    return Locator(
        number=value["number"],
        parents=tuple((model, number) for model, number in value["parents"]),
        packs=packs,
        manifest_runs=tuple((count, pack) for count, pack in value["manifest"]),
        cell_runs=tuple((count, pack) for count, pack in value["cells"]),
        doubtful=doubtful,
    )


def _chunk(text: str, what: str) -> ChunkId:
    try:
        chunk = bytes.fromhex(text)
    except ValueError:
        chunk = b""
    if len(chunk) != DIGEST_NBYTES or chunk.hex() != text:
        raise CorruptionError(f"{what} has {text[:80]!r} where a digest belongs", kind="bad_metadata")
    return ChunkId(chunk)
