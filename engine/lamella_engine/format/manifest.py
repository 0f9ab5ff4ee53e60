"""The manifest: what a version is. Structure pages name its tensors, cell pages hold a row for each cell.

Both are ordinary chunks of opaque bytes, so versions share the pages that are equal (FORMAT.md, "Manifest").
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from lamella_engine.dtypes import dtype_named
from lamella_engine.errors import CorruptionError, InvalidInputError, LimitError, UnsupportedFormatError
from lamella_engine.format import canonical
from lamella_engine.format.digests import DIGEST_NBYTES, Context, Digester
from lamella_engine.model import ChunkId, TensorSpec

PAGE_NBYTES = 1 << 16
"""A page ends before the row that would make it longer; a row that is longer by itself has a page of its own."""

INLINE_NBYTES = 32
"""A cell of at most this many bytes stands in its row itself: no longer than the digest it replaces, and one read
less."""

MAX_NAME_NBYTES = 1 << 14
MAX_RANK = 32
MAX_TENSORS = 1_000_000
MAX_ELEMENTS = 1 << 56
"""Of one tensor, and of the axes of an empty one that are not 0: no library could be asked for an array beyond it."""


@dataclass(frozen=True, slots=True)
class CellPage:
    """A run of the cell table."""

    chunk: ChunkId
    nbytes: int
    first_cell: int
    """Number of its first cell, counted over the whole version."""


@dataclass(frozen=True, slots=True)
class StructurePage:
    """A run of tensors in name order, with the pages of their cells."""

    chunk: ChunkId
    nbytes: int
    first_name: str
    first_cell: int
    cells: tuple[CellPage, ...]


def structure_row(spec: TensorSpec) -> bytes:
    """Return the line that stands for a tensor in a structure page, and in the digest that is the structure's id.

    Raises LimitError for a name, rank or shape past the format's limits, InvalidInputError for a name that is no text.
    """
    row = canonical.dumps([spec.name, spec.dtype.name, spec.shape]) + b"\n"
    _check_limits(spec)
    return row


def structure_pages(structure: Sequence[TensorSpec]) -> Iterator[tuple[bytes, Sequence[TensorSpec]]]:
    """Cut a structure, in name order, into pages; yield each page's bytes with the tensors in it."""
    if len(structure) > MAX_TENSORS:
        raise LimitError(f"{len(structure)} tensors are more than {MAX_TENSORS}", kind="tensor_limit")
    rows: list[bytes] = []
    nbytes = first = 0
    for at, spec in enumerate(structure):
        row = structure_row(spec)
        if rows and nbytes + len(row) > PAGE_NBYTES:
            yield b"".join(rows), structure[first:at]
            rows, nbytes, first = [], 0, at
        rows.append(row)
        nbytes += len(row)
    if rows:
        yield b"".join(rows), structure[first:]


def _check_limits(spec: TensorSpec) -> None:
    if (
        len(spec.name.encode()) > MAX_NAME_NBYTES
        or len(spec.shape) > MAX_RANK
        or prod(filter(None, spec.shape)) > MAX_ELEMENTS
    ):
        raise LimitError(
            f"tensor {spec.name[:80]!r} of rank {len(spec.shape)} is past a limit: names have at most "
            f"{MAX_NAME_NBYTES} bytes, tensors at most {MAX_RANK} axes and {MAX_ELEMENTS} elements",
            kind="tensor_limit",
        )


def structure_id(pages: Iterable[bytes]) -> str:
    """Return the id of the structure that has these pages, in order."""
    digester = Digester(Context.STRUCTURE)
    for page in pages:
        digester.update(page)
    return digester.digest().hex()


def parse_structure_page(page: bytes) -> list[TensorSpec]:
    """Parse a structure page.

    Raises CorruptionError unless its rows are canonical and in strict name order, and UnsupportedFormatError for a
    dtype that this lamella does not know.
    """
    rows = canonical.load_lines(page, what="a structure page")
    if not rows:
        raise CorruptionError("a structure page has no rows", kind="bad_manifest")
    canonical.conform(rows, [(str, str, [int])], what="a structure page")
    specs: list[TensorSpec] = []
    for name, dtype, shape in rows:
        if specs and name <= specs[-1].name:
            raise CorruptionError("a structure page is not in name order", kind="bad_manifest")
        try:
            spec = TensorSpec(name, dtype_named(dtype), tuple(shape))
            _check_limits(spec)
            _ = spec.nbytes
        except (InvalidInputError, LimitError) as error:
            if error.kind == "unknown_dtype":
                raise UnsupportedFormatError(f"tensor {name[:80]!r} is of dtype {dtype!r}: upgrade lamella") from None
            raise CorruptionError(f"a structure page is damaged: {error}", kind="bad_manifest") from None
        specs.append(spec)
    return specs


def row_nbytes(cell_nbytes: int) -> int:
    """Return how long the row of a cell of ``cell_nbytes`` is."""
    return cell_nbytes if cell_nbytes <= INLINE_NBYTES else DIGEST_NBYTES


class CellTable:
    """The rows of one structure page's cells, cut into pages as they come.

    Parameters
    ----------
    first_cell
        Number of the first cell, counted over the whole version.
    """

    def __init__(self, first_cell: int) -> None:
        self.first_cell = first_cell
        self._next_cell = first_cell
        self._pages: list[tuple[bytes, int]] = []
        self._rows = bytearray()
        self._page_start = first_cell

    def add(self, row: bytes) -> None:
        """Add the next cell's row."""
        if len(self._rows) + len(row) > PAGE_NBYTES:
            self._close()
        self._rows += row
        self._next_cell += 1

    def pages(self) -> list[tuple[bytes, int]]:
        """Return the pages, each with the number of its first cell. No row may be added afterwards."""
        if self._rows:
            self._close()
        return self._pages

    def _close(self) -> None:
        self._pages.append((bytes(self._rows), self._page_start))
        self._rows.clear()
        self._page_start = self._next_cell


def cell_rows(page: bytes, lengths: Iterable[int]) -> Iterator[bytes]:
    """Yield the rows of a cell page whose cells have the decoded ``lengths``.

    Raises CorruptionError if they do not fill it.
    """
    at = 0
    for cell_nbytes in lengths:
        row = page[at : at + row_nbytes(cell_nbytes)]
        at += row_nbytes(cell_nbytes)
        if at > len(page):
            break
        yield row
    if at != len(page):
        raise CorruptionError("a cell page is not as long as its cells say", kind="bad_manifest")
