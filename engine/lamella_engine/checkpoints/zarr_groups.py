"""Zarr v3 groups as checkpoints: whatever chunks, codecs, orders and nesting their arrays have.

An array's chunks rarely are the cells of the grid. So it is read in bands, runs of its C-order bytes that are made of
whole chunks: each chunk is decoded once, and what a push has in memory does not grow with the array.

Importing this module imports zarr, so modules that are loaded with ``lamella`` import it on use only.
"""

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import zarr
from zarr.buffer.cpu import NDBuffer
from zarr.core.metadata import ArrayV3Metadata
from zarr.errors import ZarrUserWarning
from zarr.storage import StorePath

from lamella_engine.checkpoints.zarr_directories import ZarrDirectory
from lamella_engine.checkpoints.zarr_metadata import StoredArray, refusing, stored_array
from lamella_engine.chunking import Grid, Region
from lamella_engine.dtypes import dtype_named
from lamella_engine.errors import InvalidInputError, LamellaError, StorageError, TensorNotFoundError
from lamella_engine.model import Attachment, Buffer, TensorSpec
from lamella_engine.zarr_arrays import ATTRIBUTE, node_name

if TYPE_CHECKING:
    from zarr.abc.store import Store

# Bytes of bands that are kept for the cells to come. Cells are asked for in order, so that two bands nearly always do.
_KEPT_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Source:
    """One tensor in a Zarr store."""

    spec: TensorSpec
    array: "zarr.Array[Any]"
    bands: Grid


class ZarrCheckpoint:
    """A Zarr v3 group as a checkpoint. Attributes of groups and arrays are not kept, but for what lamella puts there.

    A tensor's name is the path of its array's node, with ``/`` between groups. The last part is what the array's
    attribute ``lamella`` calls it, if that is how :func:`~lamella_engine.zarr_arrays.node_name` would name the node; so
    a version that was viewed or exported comes back under its own names.

    Parameters
    ----------
    source
        An open group, of any store; or a directory, which is trusted in nothing.

    Raises
    ------
    InvalidInputError
        Two arrays have one name (``duplicate_name``), a name is no Unicode (``bad_tensor_name``), the attribute says
        what the array is not (``bad_attribute``); or a kind of
        :class:`~lamella_engine.checkpoints.zarr_directories.ZarrDirectory` or
        :func:`~lamella_engine.checkpoints.zarr_metadata.stored_array`.
    LimitError
        As those raise it.
    """

    def __init__(self, source: "zarr.Group | ZarrDirectory | str | os.PathLike[str]") -> None:
        self._directory: ZarrDirectory | None = None
        store: Store
        if isinstance(source, zarr.Group):
            arrays, store, root = _arrays_of(source), source.store, source.path
        else:
            self._directory = source if isinstance(source, ZarrDirectory) else ZarrDirectory(source)
            arrays, store, root = self._directory.arrays, self._directory.store, ""
        self._sources: dict[str, _Source] = {}
        for node, array in arrays.items():
            found = _source(node, array, StorePath(store, f"{root}/{node}" if root else node))
            if found.spec.name in self._sources:
                raise InvalidInputError(f"two arrays are named {found.spec.name[:80]!r}", kind="duplicate_name")
            self._sources[found.spec.name] = found
        self.structure: tuple[TensorSpec, ...] = tuple(
            sorted((found.spec for found in self._sources.values()), key=lambda spec: spec.name)
        )
        self.random_access = False
        self.attachments: tuple[Attachment, ...] = ()
        self._bands = _Bands()
        self._closed = False

    def read(self, tensor: TensorSpec, region: Region, out: Buffer | None = None) -> Buffer:
        """See :meth:`Checkpoint.read`; a view of a decoded band where one holds the whole cell."""
        if self._closed:
            raise InvalidInputError("the checkpoint was closed: open it again", kind="closed")
        source = self._sources.get(tensor.name)
        if source is None:
            raise TensorNotFoundError(f"there is no tensor {tensor.name[:80]!r}", tensor=tensor.name)
        target: memoryview | None = None
        for number in source.bands.cells_between(region.start, region.stop):
            place = source.bands.region(number)
            band = self._band(source, number, place)
            start, stop = max(region.start, place.start), min(region.stop, place.stop)
            part = band[start - place.start : stop - place.start]
            if part.nbytes == region.nbytes:
                return part
            if target is None:
                target = np.empty(region.nbytes, np.uint8).data if out is None else memoryview(out)[: region.nbytes]
            target[start - region.start : stop - region.start] = part
        return b"" if target is None else target

    def check_unchanged(self) -> None:
        """See :meth:`Checkpoint.check_unchanged`: changes of a directory are seen, those of other stores are not."""
        if self._directory is not None:
            self._directory.check_unchanged()

    def close(self) -> None:
        """Let go of the arrays. Doing it twice is harmless."""
        self._closed = True
        self._sources = {}
        self._bands = _Bands()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _band(self, source: _Source, number: int, place: Region) -> memoryview:
        return self._bands.get(source.spec.name, number, place.nbytes, lambda: _decoded(source, place))


def _arrays_of(group: zarr.Group) -> dict[str, StoredArray]:
    arrays: dict[str, StoredArray] = {}
    with _quiet(), refusing("bad_metadata"):
        members = group.members(max_depth=None)
    for path, member in members:
        if isinstance(member, zarr.Group):
            continue
        metadata = member.metadata
        try:
            if not isinstance(metadata, ArrayV3Metadata):
                raise InvalidInputError("it is of Zarr format 2: convert it to format 3", kind="not_zarr_v3")
            fill = np.asarray(metadata.fill_value, metadata.data_type.to_native_dtype().newbyteorder("<")).tobytes()
            arrays[path] = stored_array(metadata.to_dict(), fill)
        except LamellaError as error:
            raise type(error)(f"{path}: {error}", kind=error.kind, **error.context) from error
    return arrays


def _source(node: str, stored: StoredArray, path: StorePath) -> _Source:
    *groups, last = node.split("/")
    described = stored.attributes.get(ATTRIBUTE)
    described = described if isinstance(described, Mapping) else {}
    spec = TensorSpec("/".join([*groups, _name(last, described)]), stored.dtype, stored.shape)
    if "dtype" in described:
        spec = _opaque(spec, described)
    try:
        spec.name.encode()
        bands = stored.bands()
    except UnicodeEncodeError:
        raise InvalidInputError(f"{node[:80]!r} is no valid Unicode: rename it", kind="bad_tensor_name") from None
    except LamellaError as error:
        raise type(error)(f"{node}: {error}", kind=error.kind, **error.context) from error
    with _quiet():
        array = zarr.Array(zarr.AsyncArray(metadata=stored.metadata, store_path=path))
    return _Source(spec, array, bands)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep zarr from saying that codecs around shards are slow: whoever wrote them has heard it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Combining a `sharding_indexed` codec", ZarrUserWarning)
        yield


def _name(node: str, described: Mapping[str, Any]) -> str:
    """Return the name that an array says to have, if its node is the one that such a name gets; else the node's."""
    name = described.get("name")
    try:
        return name if isinstance(name, str) and node_name(name) == node else node
    except (InvalidInputError, UnicodeEncodeError):
        return node


def _opaque(spec: TensorSpec, described: Mapping[str, Any]) -> TensorSpec:
    """Return the tensor of opaque dtype whose bytes an array shows."""
    name, shape = described["dtype"], described.get("shape")
    try:
        if isinstance(name, str) and isinstance(shape, list | tuple) and all(type(n) is int and n >= 0 for n in shape):
            found = TensorSpec(spec.name, dtype_named(name), tuple(shape))
            if found.dtype.opaque and spec.dtype.name == "uint8" and spec.shape == (found.nbytes,):
                return found
    except InvalidInputError:  # no such dtype, or a shape that does not end on a byte
        pass
    raise InvalidInputError(
        f"{spec.name[:80]!r} says in its attribute {ATTRIBUTE!r} to be what its bytes are not: remove the attribute",
        kind="bad_attribute",
    )


def _decoded(source: _Source, place: Region) -> memoryview:
    """Decode one band: the bytes of all of its chunks."""
    out = np.empty([part.stop - part.start for part in place.slices], source.array.dtype)
    try:
        source.array.get_basic_selection(place.slices, out=NDBuffer.from_numpy_array(out))
    except LamellaError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {source.spec.name[:80]!r}: {error}", kind="read_failed") from error
    except ValueError as error:
        raise InvalidInputError(
            f"{source.spec.name[:80]!r} has a chunk that cannot be decoded ({str(error)[:200]}): fetch or write it "
            "again",
            kind="bad_chunk",
        ) from error
    return out.reshape(-1).view(np.uint8).data.toreadonly()


class _Bands:
    """The bands that were decoded last, each of them once, whoever else waits for it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int], tuple[int, Future[memoryview]]] = OrderedDict()

    def get(self, name: str, number: int, nbytes: int, decode: Callable[[], memoryview]) -> memoryview:
        """Return a band of ``nbytes`` bytes, decoding it if nobody does."""
        key = name, number
        future: Future[memoryview] = Future()
        try:  # from before anybody can see the future: whatever comes, a signal too, whoever waits for it is told
            with self._lock:
                _, mine = self._kept.setdefault(key, (nbytes, future))
                self._kept.move_to_end(key)
                self._forget()
            if mine is not future:
                return mine.result()
            future.set_result(decode())
        except BaseException as error:
            with self._lock:
                if self._kept.get(key) == (nbytes, future):
                    del self._kept[key]
            if not future.done():
                future.set_exception(error)
            raise
        return future.result()

    def _forget(self) -> None:
        """Let go of the bands that were not asked for longest. Two stay at least: a cell may lie in both."""
        total = sum(nbytes for nbytes, _ in self._kept.values())
        while total > _KEPT_NBYTES and len(self._kept) > 2:
            _, (nbytes, _) = self._kept.popitem(last=False)
            total -= nbytes
