"""Zarr v3 hierarchies in directories, looked through before anything of them is believed.

Importing this module imports zarr, so modules that are loaded with ``lamella`` import it on use only.
"""

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from lamella_engine.checkpoints.sources import SourceFile, source_changed
from lamella_engine.checkpoints.zarr_metadata import MAX_CHUNKS, StoredArray, stored_array
from lamella_engine.errors import InvalidInputError, LimitError, StorageError

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype

MAX_METADATA_NBYTES = 128 << 20
"""Most bytes of all ``zarr.json`` together: some 50,000 arrays, and the same consolidated."""

MAX_FILES = 1 << 20
"""Most files of a hierarchy: a model of 100 GB in zarr's usual 128 KiB chunks has that many."""

MAX_DEPTH = 64
"""Most directories inside one another."""

# Chunks that are not there are as good as chunks of fill values, and compressors make little of zeros. So much may come
# of nothing, and so much of each byte that is there: enough for the zeros of any optimizer, and not for petabytes.
MAX_UNSTORED_NBYTES = 64 << 30
MAX_RATIO = 1 << 10

_METADATA = "zarr.json"
_OF_V2 = {".zarray", ".zgroup", ".zattrs", ".zmetadata"}


class ZarrDirectory:
    """A directory that is a Zarr v3 group: its arrays, and a store that gives what was there when it was found.

    Symbolic links are followed to regular files, never to directories. Hidden files are left out.

    Parameters
    ----------
    path
        The directory, or a symbolic link to it.

    Raises
    ------
    InvalidInputError
        The kinds are ``not_zarr`` (a directory without ``zarr.json``), ``not_zarr_v3``, ``not_a_group`` (one array),
        ``not_a_file`` (neither directory nor regular file), ``stray_file``, ``stray_chunk`` (outside of its array's
        grid, or too long for it), ``bad_metadata``, ``duplicate_key``, ``stale_metadata`` (consolidated metadata that
        differs), or one of :func:`~lamella_engine.checkpoints.zarr_metadata.stored_array`.
    LimitError
        Too much of it (``too_many_files``, ``too_many_chunks``, ``too_deep``, ``metadata_too_long``), or
        ``too_little_stored`` for the sizes that it claims.
    StorageError
        It cannot be read.
    """

    def __init__(self, path: "str | os.PathLike[str]") -> None:
        self.root = os.path.abspath(os.fsdecode(path))
        self.arrays: dict[str, StoredArray] = {}
        """By path of the node, ``/`` between parts."""
        self._files: dict[str, SourceFile] = {}
        self._folders: dict[str, tuple[int, int, int]] = {}
        self._documents: dict[str, dict[str, Any]] = {}
        self._metadata_nbytes = 0
        self._read("", 0)
        self._check_consolidated()
        self._documents.clear()
        chunks = sum(array.chunk_count for array in self.arrays.values())
        if chunks > MAX_CHUNKS:
            raise LimitError(
                f"{self.root} has {chunks} chunks, more than {MAX_CHUNKS}: write larger ones, or push less of it",
                kind="too_many_chunks",
            )
        decoded = sum(array.nbytes for array in self.arrays.values())
        stored = sum(file.nbytes for file in self._files.values())
        if decoded > MAX_UNSTORED_NBYTES + MAX_RATIO * stored:
            raise LimitError(
                f"{self.root} says to hold {decoded} bytes, but its files hold {stored}: write every chunk",
                kind="too_little_stored",
            )
        self.store = _FileStore(self.root, self._files)

    def lacks_chunk(self, key: str) -> bool:
        """Whether ``key`` is that of a chunk in an array's grid, and there is no such file."""
        parts = key.split("/")
        arrays = ((self.arrays.get("/".join(parts[:at])), "/".join(parts[at:])) for at in range(1, len(parts)))
        return key not in self._files and any(array is not None and array.has_chunk(rest) for array, rest in arrays)

    def check_unchanged(self) -> None:
        """Raise InvalidInputError (``source_changed``) unless files and directories are what they were."""
        for file in self._files.values():
            file.opened_again().close()
        for folder, before in self._folders.items():
            if _folder_state(self._place(folder)) != before:
                raise source_changed(self._place(folder))

    # -- looking through -----------------------------------------------------------------------------------------------

    def _read(self, node: str, depth: int) -> None:
        """Read one node and everything below it."""
        entries = self._entries(node)
        metadata = entries.pop(_METADATA, None)
        if v2 := _OF_V2 & entries.keys():
            raise InvalidInputError(
                f"{self._place(node)} has {min(v2)}, which is of Zarr format 2: convert it to format 3",
                kind="not_zarr_v3",
            )
        if metadata is None:
            raise InvalidInputError(
                f"{self._place(node)} has no {_METADATA}: name the directory of a Zarr v3 group", kind="not_zarr"
            )
        document = self._document(node, self._file(metadata))
        if document.get("node_type") == "array":
            if not node:
                raise InvalidInputError(
                    f"{self.root} is one array: give the group that holds it, or push the array by name",
                    kind="not_a_group",
                )
            self._read_array(node, document, entries, depth)
            return
        self._check_group(node, document)
        for name, entry in sorted(entries.items()):
            child = f"{node}/{name}" if node else name
            if entry.is_dir(follow_symlinks=False):
                hidden = name.startswith(".") and not os.path.lexists(os.path.join(entry.path, _METADATA))
                if not hidden:
                    self._check_depth(entry.path, depth)
                    self._read(child, depth + 1)
                continue
            _check_regular(entry)
            if not name.startswith("."):
                raise InvalidInputError(
                    f"{entry.path} is no part of a Zarr group: remove it", kind="stray_file", path=entry.path
                )

    def _read_array(
        self, node: str, document: dict[str, Any], entries: "dict[str, os.DirEntry[str]]", depth: int
    ) -> None:
        array = self._array(node, document)
        for key, entry in self._chunks(node, "", entries, depth):
            if not array.has_chunk(key):
                raise InvalidInputError(
                    f"{entry.path} is no chunk of its array's grid: remove it, or write the array again",
                    kind="stray_chunk",
                )
            file = self._file(entry)
            if file.nbytes > array.max_encoded_nbytes:
                raise InvalidInputError(
                    f"{entry.path} has {file.nbytes} bytes, more than a chunk of its array can take: write it again",
                    kind="stray_chunk",
                )
            self._files[f"{node}/{key}"] = file
        self.arrays[node] = array

    def _chunks(
        self, node: str, prefix: str, entries: "dict[str, os.DirEntry[str]]", depth: int
    ) -> "Iterator[tuple[str, os.DirEntry[str]]]":
        """Yield what lies below an array that is not hidden, by key relative to the array."""
        for name, entry in sorted(entries.items()):
            if entry.is_dir(follow_symlinks=False):
                if not name.startswith("."):
                    self._check_depth(entry.path, depth)
                    below = self._entries(f"{node}/{prefix}{name}")
                    yield from self._chunks(node, f"{prefix}{name}/", below, depth + 1)
                continue
            _check_regular(entry)
            if not name.startswith("."):
                yield prefix + name, entry

    def _entries(self, folder: str) -> "dict[str, os.DirEntry[str]]":
        path = self._place(folder)
        self._folders[folder] = _folder_state(path)
        try:
            with os.scandir(path) as found:
                entries = {entry.name: entry for entry in found}
        except OSError as error:
            raise StorageError(f"cannot list {path}: {error.strerror}", kind="read_failed") from error
        if len(self._files) + len(entries) > MAX_FILES:
            raise LimitError(f"{self.root} has more than {MAX_FILES} files: use larger chunks", kind="too_many_files")
        return entries

    def _file(self, entry: "os.DirEntry[str]") -> SourceFile:
        _check_regular(entry)
        with SourceFile(entry.path) as file:
            return file

    def _check_depth(self, path: str, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise LimitError(f"{path} lies too deep: push a group further down", kind="too_deep")

    def _place(self, folder: str) -> str:
        return os.path.join(self.root, folder) if folder else self.root

    # -- metadata ------------------------------------------------------------------------------------------------------

    def _document(self, node: str, file: SourceFile) -> dict[str, Any]:
        self._metadata_nbytes += file.nbytes
        if self._metadata_nbytes > MAX_METADATA_NBYTES:
            raise LimitError(
                f"{self.root} has more than {MAX_METADATA_NBYTES} bytes of metadata with {file.path}: push less of it",
                kind="metadata_too_long",
            )
        with file.opened_again() as same:
            text = same.read(0, same.nbytes)
        try:
            document = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        except InvalidInputError as error:
            raise _at(file.path, error) from None
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"{file.path} is no JSON that can be read: {error}", kind="bad_metadata") from None
        if not isinstance(document, dict):
            raise InvalidInputError(f"{file.path} is no object", kind="bad_metadata")
        self._files[f"{node}/{_METADATA}" if node else _METADATA] = file
        self._documents[node] = document
        return document

    def _array(self, node: str, document: object) -> StoredArray:
        try:
            return stored_array(document)
        except (InvalidInputError, LimitError) as error:
            raise _at(self._place(node), error) from error

    def _check_group(self, node: str, document: Mapping[str, Any]) -> None:
        known = {"zarr_format", "node_type", "attributes", "consolidated_metadata"}
        extra = [document[key] for key in document.keys() - known]
        good = (
            document.get("node_type") == "group"
            and isinstance(document.get("attributes", {}), dict)
            and all(isinstance(field, dict) and field.get("must_understand") is False for field in extra)
        )
        if document.get("zarr_format") != 3:
            raise InvalidInputError(
                f"{self._place(node)} is not of Zarr format 3: convert it to format 3", kind="not_zarr_v3"
            )
        if not good:
            raise InvalidInputError(f"{self._place(node)} is neither a group nor an array", kind="bad_metadata")

    def _check_consolidated(self) -> None:
        """Refuse a group whose consolidated metadata is not what stands in its nodes: who knows which is meant."""
        for node, document in self._documents.items():
            consolidated = document.get("consolidated_metadata")
            if consolidated is None:
                continue
            prefix = f"{node}/" if node else ""
            below = {
                path.removeprefix(prefix): document
                for path, document in self._documents.items()
                if path != node and path.startswith(prefix)
            }
            said = consolidated.get("metadata") if isinstance(consolidated, dict) else None
            if (
                not isinstance(said, dict)
                or consolidated.get("kind") != "inline"
                or said.keys() != below.keys()
                or not all(self._agree(prefix + name, below[name], said[name]) for name in said)
            ):
                raise InvalidInputError(
                    f"{self._place(node)} has consolidated metadata that differs from its nodes: consolidate it again",
                    kind="stale_metadata",
                )

    def _agree(self, node: str, actual: dict[str, Any], said: object) -> bool:
        """Whether two documents mean the same; tools write them with different detail."""
        if not isinstance(said, dict) or actual.get("node_type") != said.get("node_type"):
            return False
        if actual == said:
            return True
        if actual["node_type"] == "group":
            return bool(actual.get("attributes", {}) == said.get("attributes", {}))
        mine, theirs = self.arrays[node], self._array(node, said)
        return mine.dtype == theirs.dtype and _text(mine) == _text(theirs)


class _FileStore(LocalStore):
    """The files that were found, as long as they are what they were."""

    def __init__(self, root: str, files: Mapping[str, SourceFile]) -> None:
        super().__init__(root, read_only=True)
        self._files = files

    def get_sync(
        self, key: str, *, prototype: "BufferPrototype | None" = None, byte_range: ByteRequest | None = None
    ) -> "Buffer | None":
        known = self._files.get(key)
        if known is None:
            return None
        with known.opened_again() as file:
            match byte_range:
                case RangeByteRequest(start, end):
                    start, end = min(start, file.nbytes), min(end, file.nbytes)
                case OffsetByteRequest(offset):
                    start, end = min(offset, file.nbytes), file.nbytes
                case SuffixByteRequest(suffix):
                    start, end = max(0, file.nbytes - suffix), file.nbytes
                case _:
                    start, end = 0, file.nbytes
            data = np.empty(end - start, np.uint8)
            file.read_into(data.data, start)
        return (prototype or default_buffer_prototype()).buffer.from_array_like(data)

    async def get(
        self, key: str, prototype: "BufferPrototype | None" = None, byte_range: ByteRequest | None = None
    ) -> "Buffer | None":
        return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)


def _folder_state(path: str) -> tuple[int, int, int]:
    """Return what changes when something comes into a directory, or leaves it."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", kind="read_failed") from error
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _check_regular(entry: "os.DirEntry[str]") -> None:
    try:
        regular = entry.is_file()  # follows symbolic links
    except OSError:  # a link that leads to itself
        regular = False
    if not regular:
        raise InvalidInputError(
            f"{entry.path} is neither a directory, nor a regular file or a link to one: remove it",
            kind="not_a_file",
            path=entry.path,
        )


def _at(path: str, error: InvalidInputError | LimitError) -> InvalidInputError | LimitError:
    """Say where it is that something is wrong with."""
    return type(error)(f"{path}: {error}", kind=error.kind, **error.context)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidInputError("a key stands there twice in one object", kind="duplicate_key")
    return found


def _text(array: StoredArray) -> str:
    return json.dumps(array.metadata.to_dict(), sort_keys=True)
