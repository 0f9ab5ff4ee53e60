"""Reading a manifest page by page, so that one layer costs its own pages only."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice

from lamella_engine.errors import CorruptionError, TensorNotFoundError
from lamella_engine.format.digests import Context, Digester, chunk_id
from lamella_engine.format.manifest import INLINE_NBYTES, cell_rows, parse_structure_page, structure_id
from lamella_engine.format.version import Description
from lamella_engine.model import Cell, ChunkId, TensorSpec

PAGES_KEPT = 16
"""Parsed pages of each kind kept for each manifest: some 2,000 rows a page, 8 MB in all. Reading goes by name, page
by page."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the cell table."""

    cell: Cell
    position: int
    """The cell's number, counted over the whole version."""
    nbytes: int
    """Decoded length of the cell."""
    content: bytes
    """The cell's bytes if it is short enough to stand in its row, else its chunk id."""

    @property
    def inline(self) -> bytes | None:
        """The cell's bytes, or None if a blob holds them."""
        return self.content if self.nbytes <= INLINE_NBYTES else None

    @property
    def chunk(self) -> ChunkId | None:
        """The cell's chunk id, or None if the cell stands in its row."""
        return None if self.nbytes <= INLINE_NBYTES else ChunkId(self.content)


@dataclass(frozen=True, slots=True)
class _Page:
    """A parsed structure page."""

    specs: list[TensorSpec]
    position_of: dict[str, int]
    """Name -> place in ``specs``."""
    first_cells: list[int]
    """For each tensor, the number of its first cell; then one past the last cell of the page."""


class Manifest:
    """The tensors and cells of one version. Safe for several threads.

    Parameters
    ----------
    description
        The version's.
    load
        Returns the bytes of a manifest chunk, by its place in ``description.manifest_chunks``; their digest has been
        checked.
    """

    def __init__(self, description: Description, load: Callable[[int], bytes]) -> None:
        self.description = description
        self._load = load
        self._first_names = [page.first_name for page in description.pages]
        self._chunk_places = list(accumulate((1 + len(page.cells) for page in description.pages), initial=0))
        self._page = lru_cache(PAGES_KEPT)(self._parse_page)
        self._cell_page = lru_cache(PAGES_KEPT)(self._parse_cell_page)

    def specs(self, prefix: str = "") -> Iterator[TensorSpec]:
        """Yield the tensors whose names begin with ``prefix``, by name; only the pages that hold them are read."""
        first = max(bisect_right(self._first_names, prefix) - 1, 0)
        for number in range(first, len(self._first_names)):
            if self._first_names[number] > prefix and not self._first_names[number].startswith(prefix):
                return
            for spec in self._page(number).specs:
                if spec.name.startswith(prefix):
                    yield spec

    def spec(self, name: str) -> TensorSpec:
        """Return one tensor; raises TensorNotFoundError."""
        number, at = self._find(name)
        return self._page(number).specs[at]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        try:
            self._find(name)
        except TensorNotFoundError:
            return False
        return True

    def row(self, name: str, index: int) -> Row:
        """Return the row of one cell of a tensor; raises TensorNotFoundError, IndexError."""
        number, at = self._find(name)
        page = self._page(number)
        region = page.specs[at].grid.region(index)
        return self._row(number, Cell(name, index), page.first_cells[at] + index, region.nbytes)

    def rows(self, name: str) -> Iterator[Row]:
        """Yield the rows of a tensor's cells in order, reading only their pages."""
        number, at = self._find(name)
        page = self._page(number)
        spec, first = page.specs[at], page.first_cells[at]
        count = page.first_cells[at + 1] - first
        grid = spec.grid
        for index in range(count):
            yield self._row(number, Cell(name, index), first + index, grid.cell_nbytes(index))

    def all_rows(self) -> Iterator[Row]:
        """Yield the row of every cell in order.

        At the end raises CorruptionError if their chunks are not those that the parameters id is the digest of.
        """
        parameters = Digester(Context.PARAMETERS)
        parameters.update(bytes.fromhex(self.description.structure_id))
        for page in range(len(self._first_names)):
            for spec in self._page(page).specs:
                for row in self.rows(spec.name):
                    parameters.update(chunk_id(row.content) if row.chunk is None else row.chunk)
                    yield row
        if parameters.digest().hex() != self.description.parameters_id:
            raise CorruptionError("the cells are not those that the parameters id is the digest of", kind="bad_digest")

    def check(self) -> None:
        """Read every page; raise CorruptionError unless they are what the description says, counts and ids included."""
        description = self.description
        tensors = cells = nbytes = 0
        for number, page in enumerate(description.pages):
            parsed = self._page(number)
            tensors += len(parsed.specs)
            cells = parsed.first_cells[-1]
            nbytes += sum(spec.nbytes for spec in parsed.specs)
            for at in range(len(page.cells)):
                self._cell_page(number, at)
        pages = (self._load(self._chunk_places[number]) for number in range(len(description.pages)))
        said = (description.tensor_count, description.cell_count, description.decoded_nbytes, description.structure_id)
        if (tensors, cells, nbytes, structure_id(pages)) != said:
            raise CorruptionError("a version's pages do not add up to what it says", kind="bad_manifest")

    @property
    def first_attachment_place(self) -> int:
        """Place of the first attachment's first part in ``Description.manifest_chunks``."""
        return self._chunk_places[-1]

    def chunk(self, place: int) -> bytes:
        """Return the bytes of one of ``Description.manifest_chunks``; raises CorruptionError."""
        return self._load(place)

    def holds(self, spec: TensorSpec) -> bool:
        """Whether there is a tensor of this name, dtype and shape."""
        return self.has(spec.name) and self.spec(spec.name) == spec

    def _find(self, name: str) -> tuple[int, int]:
        number = bisect_right(self._first_names, name) - 1
        if number >= 0:
            at = self._page(number).position_of.get(name)
            if at is not None:
                return number, at
        raise TensorNotFoundError(f"there is no tensor {name[:80]!r} in this version: show lists them", tensor=name)

    def _parse_page(self, number: int) -> _Page:
        page = self.description.pages[number]
        specs = parse_structure_page(self._load(self._chunk_places[number]))
        first_cells = list(accumulate((spec.grid.cell_count for spec in specs), initial=page.first_cell))
        following = self.description.pages[number + 1 : number + 2]
        stop = following[0].first_cell if following else self.description.cell_count
        last_name = following[0].first_name if following else None
        if (
            specs[0].name != page.first_name
            or (last_name is not None and specs[-1].name >= last_name)
            or first_cells[-1] != stop
            or bool(page.cells) != (stop > page.first_cell)
        ):
            raise CorruptionError("a structure page is not the one its version lists", kind="bad_manifest")
        return _Page(specs, {spec.name: at for at, spec in enumerate(specs)}, first_cells)

    def _parse_cell_page(self, number: int, at: int) -> list[bytes]:
        page = self.description.pages[number]
        parsed = self._page(number)
        first = page.cells[at].first_cell
        stop = page.cells[at + 1].first_cell if at + 1 < len(page.cells) else parsed.first_cells[-1]
        data = self._load(self._chunk_places[number] + 1 + at)
        return list(cell_rows(data, islice(_lengths(parsed, first), stop - first)))

    def _row(self, number: int, cell: Cell, position: int, nbytes: int) -> Row:
        cells = self.description.pages[number].cells
        at = bisect_right(cells, position, key=lambda page: page.first_cell) - 1
        rows = self._cell_page(number, at)
        place = position - cells[at].first_cell
        if place >= len(rows):
            raise CorruptionError("a cell page is shorter than its version says", kind="bad_manifest")
        return Row(cell, position, nbytes, rows[place])


def _lengths(page: _Page, first: int) -> Iterator[int]:
    """Yield the decoded lengths of a page's cells from cell number ``first`` on."""
    start = bisect_right(page.first_cells, first) - 1
    for at in range(start, len(page.specs)):
        grid = page.specs[at].grid
        skip = max(first - page.first_cells[at], 0)
        for index in range(skip, grid.cell_count):
            yield grid.cell_nbytes(index)
