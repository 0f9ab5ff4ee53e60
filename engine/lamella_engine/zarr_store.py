"""A version as a Zarr v3 hierarchy: one flat group, read-only, whose chunks are the cells of the grid.

Importing this module imports zarr, so modules that are loaded with ``lamella`` import it on use only.

Zarr sees plain little-endian bytes, which any of its implementations can read. Deltas and codecs stay below: a delta
needs two chunks where a Zarr codec sees one.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from lamella_engine.errors import InvalidInputError
from lamella_engine.executor import InlineExecutor
from lamella_engine.model import Buffer, Cell, TensorSpec, VersionId
from lamella_engine.reading import Reader
from lamella_engine.zarr_arrays import array_metadata, chunk_shape, node_name, register_dtypes

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer as ZarrBuffer
    from zarr.core.buffer import BufferPrototype

_METADATA = "zarr.json"
_NATURAL = re.compile(r"0|[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True)
class _Node:
    """One tensor as an array."""

    spec: TensorSpec
    counts: tuple[int, ...]
    """Number of chunks on each axis of the array."""
    nbytes: int
    """Bytes of each chunk; edge chunks are padded to it."""

    def keys(self) -> Iterator[str]:
        """Yield the keys of the chunks in order of cells, without the node's name."""
        return ("/".join(["c", *map(str, at)]) for at in np.ndindex(self.counts))

    def number(self, key: str) -> int | None:
        """Return the number of the cell that has this key, or None if none has."""
        first, *digits = key.split("/")
        if first != "c" or len(digits) != len(self.counts) or not all(map(_NATURAL.fullmatch, digits)):
            return None
        number = 0
        for at, count in zip(map(int, digits), self.counts, strict=True):
            if at >= count:
                return None
            number = number * count + at
        return number


def _node(spec: TensorSpec) -> _Node:
    grid, chunk = spec.grid, chunk_shape(spec)
    counts = tuple(-(-length // step) for length, step in zip(grid.shape, chunk, strict=True))
    return _Node(spec, counts, prod(chunk) * grid.itemsize)


class VersionStore(Store):
    """A version as a Zarr store: metadata made from its structure, chunks decoded when they are asked for.

    Two are equal if they show the same version of the same repository, opened once. It cannot be pickled, for a
    repository cannot: open the version again in the other process.

    Parameters
    ----------
    reader
        What decodes.
    version
        The version's id.
    specs
        Its tensors, all or some.
    attributes
        Attributes of the group: anything that JSON can hold.

    Raises
    ------
    InvalidInputError
        A tensor's name is too long for a node (``bad_tensor_name``).
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(
        self, reader: Reader, version: VersionId, specs: Iterable[TensorSpec], attributes: Mapping[str, Any]
    ) -> None:
        super().__init__(read_only=True)
        self._reader = reader
        # Zarr asks for several chunks at a time, each from a thread of its own. The repository's threads must not be
        # needed for them: they may all be waiting for this store, when what it shows is pushed again.
        self._decoder = replace(reader, executor=InlineExecutor())
        self._version = version
        self._nodes = {node_name(spec.name): _node(spec) for spec in specs}
        arrays = {name: array_metadata(node.spec) for name, node in self._nodes.items()}
        group = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": dict(attributes),
            "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": arrays},
        }
        self._documents = {_METADATA: json.dumps(group).encode()}
        self._documents |= {f"{name}/{_METADATA}": json.dumps(array).encode() for name, array in arrays.items()}

    # -- bytes ---------------------------------------------------------------------------------------------------------

    async def get(
        self, key: str, prototype: "BufferPrototype", byte_range: ByteRequest | None = None
    ) -> "ZarrBuffer | None":
        """See :class:`zarr.abc.store.Store`; raises CorruptionError for a chunk that is damaged."""
        data: Buffer | None = self._documents.get(key)
        if data is None:
            cell = self._cell(key)
            if cell is None:
                return None
            data = await asyncio.to_thread(self._chunk, cell)
        return prototype.buffer.from_bytes(memoryview(data)[_bounds(byte_range, len(data))])

    async def get_partial_values(
        self, prototype: "BufferPrototype", key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> "list[ZarrBuffer | None]":
        """See :class:`zarr.abc.store.Store`."""
        return await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))

    async def exists(self, key: str) -> bool:
        """See :class:`zarr.abc.store.Store`."""
        return key in self._documents or self._cell(key) is not None

    async def getsize(self, key: str) -> int:
        """See :class:`zarr.abc.store.Store`; decodes nothing."""
        document = self._documents.get(key)
        if document is not None:
            return len(document)
        if self._cell(key) is None:
            raise FileNotFoundError(key)
        return self._nodes[key.partition("/")[0]].nbytes

    def files(self) -> Iterator[tuple[str, Buffer]]:
        """Yield every key with its bytes: what a directory needs to be this hierarchy. Chunks come in order of cells.

        The bytes are valid until the next item is asked for.
        """
        yield from self._documents.items()
        for name, node in self._nodes.items():
            cells = (Cell(node.spec.name, number) for number in range(node.spec.grid.cell_count))
            for key, (_, data) in zip(node.keys(), self._reader.stream(self._version, cells), strict=True):
                padding = bytes(node.nbytes - len(data))
                yield f"{name}/{key}", b"".join([data, padding]) if padding else data

    def _cell(self, key: str) -> Cell | None:
        """Return the cell whose chunk has this key, or None if no chunk has."""
        name, _, rest = key.partition("/")
        node = self._nodes.get(name)
        number = None if node is None else node.number(rest)
        return None if node is None or number is None else Cell(node.spec.name, number)

    def _chunk(self, cell: Cell) -> Buffer:
        """Decode one cell. What lies outside the array is zero."""
        node = self._nodes[node_name(str(cell.tensor))]
        memory = np.empty(node.nbytes, np.uint8)
        used = node.spec.grid.region(cell.number).nbytes
        memory[used:] = 0
        self._decoder.read_into(self._version, [(cell, memory.data[:used])])
        return memory.data

    # -- listing -------------------------------------------------------------------------------------------------------

    async def list(self) -> AsyncIterator[str]:
        """See :class:`zarr.abc.store.Store`."""
        for key in self._keys(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """See :class:`zarr.abc.store.Store`."""
        for key in self._keys(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """See :class:`zarr.abc.store.Store`."""
        folder = prefix.strip("/")
        if not folder:
            for name in (_METADATA, *self._nodes):
                yield name
            return
        for name in dict.fromkeys(key[len(folder) + 1 :].partition("/")[0] for key in self._keys(f"{folder}/")):
            yield name

    def _keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with ``prefix``."""
        if _METADATA.startswith(prefix):
            yield _METADATA
        node, slash, _ = prefix.partition("/")
        for name in [node] if slash else self._nodes:
            if name in self._nodes and name.startswith(node):
                keys = (f"{name}/{key}" for key in (_METADATA, *self._nodes[name].keys()))
                yield from (key for key in keys if key.startswith(prefix))

    # -- what it refuses -----------------------------------------------------------------------------------------------

    async def set(self, key: str, value: "ZarrBuffer") -> None:
        """Raise: a version never changes."""
        self._refuse()

    async def delete(self, key: str) -> None:
        """Raise: a version never changes."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise InvalidInputError("a version cannot be changed: write through a transaction", kind="read_only")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a version's Zarr store cannot be pickled: open the version again in the other process")

    # -- identity ------------------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        mine = (self._reader.store, self._version, self._nodes.keys())
        return isinstance(other, VersionStore) and mine == (other._reader.store, other._version, other._nodes.keys())

    def __hash__(self) -> int:
        return hash(self._version)

    def __repr__(self) -> str:
        return f"VersionStore({self._version[:12]})"

    def __dask_tokenize__(self) -> tuple[str, str]:
        """Name graphs of dask by the version: its id determines its bytes."""
        return "lamella", self._version


def _bounds(byte_range: ByteRequest | None, nbytes: int) -> slice:
    """Return the part of ``nbytes`` bytes that is asked for."""
    match byte_range:
        case None:
            return slice(nbytes)
        case RangeByteRequest(start, end):
            return slice(start, end)
        case OffsetByteRequest(offset):
            return slice(offset, nbytes)
        case SuffixByteRequest(suffix):
            return slice(max(0, nbytes - suffix), nbytes)


def open_group(
    reader: Reader, version: VersionId, specs: Iterable[TensorSpec], attributes: Mapping[str, Any] | None = None
) -> zarr.Group:
    """Open a version as a group, read-only and lazy; see :class:`VersionStore` for the parameters."""
    register_dtypes()
    store = VersionStore(reader, version, specs, attributes or {})
    return zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=True)
