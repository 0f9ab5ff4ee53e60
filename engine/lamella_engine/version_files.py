"""The files of a version: which there are, and any bytes of them, decoding only the cells that hold those.

Files that were pushed are there byte for byte. Tensors that were pushed from memory are ``model.safetensors``.
"""

import json
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from heapq import merge
from itertools import accumulate, zip_longest

from lamella_engine.checkpoints import MAX_FILE_HEADER_NBYTES, NewFile, SafetensorsLayout, check_attachment_paths
from lamella_engine.content_store.manifest import Manifest
from lamella_engine.errors import CorruptionError, InvalidInputError, LimitError, NotFoundError
from lamella_engine.format.version import AttachmentPages
from lamella_engine.model import Attachment, Buffer, Cell, TensorSpec, VersionId
from lamella_engine.reading import Reader

CANONICAL_FILE = "model.safetensors"
"""The file that tensors become which were in none: the name under which every tool looks for them."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A run of a file's bytes that cells hold."""

    start: int
    """Its first byte in the file."""
    nbytes: int
    cells: "TensorSpec | tuple[int, tuple[int, ...]]"
    """A tensor; or parts of an attachment: the place of the first in the manifest, and the length of each."""

    def overlapping(self, start: int, stop: int) -> Iterator[tuple[Cell, int]]:
        """Yield the cells that hold any of the file's bytes ``start`` to ``stop``, each with its place in the file."""
        start, stop = max(start - self.start, 0), min(stop - self.start, self.nbytes)
        if isinstance(self.cells, TensorSpec):
            grid = self.cells.grid
            for number in grid.cells_between(start, stop):
                yield Cell(self.cells.name, number), self.start + grid.region(number).start
            return
        place, lengths = self.cells
        for at, (begin, length) in enumerate(zip(accumulate(lengths, initial=0), lengths, strict=False)):
            if begin < stop and begin + length > start:
                yield Cell(None, place + at), self.start + begin


@dataclass(frozen=True, slots=True)
class VersionFile:
    """One file of a version."""

    path: str
    """Relative, ``/`` between parts; safe to create below a directory."""
    nbytes: int
    head: bytes
    """Its first bytes, if they are held here: the header of a safetensors file."""
    parts: tuple[_Part, ...]
    """What follows, without a hole."""


class VersionFiles:
    """Reads the files of a version. Safe for several threads.

    Parameters
    ----------
    reader
        What decodes.
    version
        The version's id.
    """

    def __init__(self, reader: Reader, version: VersionId) -> None:
        self._reader = reader
        self._version = version
        self._manifest = reader.store.manifest(version)

    @cached_property
    def files(self) -> dict[str, VersionFile]:
        """Every file by its path, in order of paths.

        Raises
        ------
        CorruptionError
            As :meth:`check` does.
        InvalidInputError
            Tensors are in no file, and safetensors files cannot hold them (``unknown_dtype``).
        """
        found = dict(self._attached)
        if self._loose:
            file = canonical_file(list(self._manifest.specs()))
            found[file.path] = file
        return dict(sorted(found.items()))

    def check(self) -> None:
        """Raise CorruptionError as :func:`layouts` does."""
        _ = self._attached

    @property
    def _loose(self) -> bool:
        return _is_loose(self._manifest)

    @cached_property
    def _attached(self) -> dict[str, VersionFile]:
        """The files that were pushed, by path."""
        headers = layouts(self._manifest)
        found: dict[str, VersionFile] = {}
        for item, place in _placed_attachments(self._manifest):
            if item.role == "file":
                lengths = tuple(nbytes for _, nbytes in item.chunks)
                found[item.path] = VersionFile(item.path, item.nbytes, b"", (_Part(0, item.nbytes, (place, lengths)),))
            else:
                found[item.path] = _weights_file(item.path, headers[item.path], item.prefix)
        return found

    def __getitem__(self, path: str) -> VersionFile:
        try:
            return self._attached.get(path) or self.files[path]
        except KeyError:
            raise NotFoundError(
                f"the version has no file {path!r}: its files are {', '.join(list(self.files)[:5])}",
                kind="file_not_found",
                path=path,
            ) from None

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes of a file; raises NotFoundError (``file_not_found``)."""
        found = bytearray()
        for part in self.parts(self[path], start, stop):  # one by one: each is valid until the next only
            found += part
        return bytes(found)

    def new_files(self, files: Iterable[VersionFile]) -> Iterator[NewFile]:
        """Yield files as they can be written."""
        return (NewFile(file.path, file.nbytes, partial(self.parts, file)) for file in files)

    def parts(self, file: VersionFile, start: int = 0, stop: int | None = None) -> Iterator[Buffer]:
        """Yield the bytes of a file from ``start`` to before ``stop``, piece by piece.

        Each piece is valid until the next is asked for.
        """
        start, stop, _ = slice(start, stop).indices(file.nbytes)
        if start < min(stop, len(file.head)):
            yield memoryview(file.head)[start:stop]
        first = max(bisect_right(file.parts, start, key=_start) - 1, 0)
        last = bisect_right(file.parts, stop - 1, key=_start)
        begins: deque[int] = deque()

        def cells() -> Iterator[Cell]:
            for part in file.parts[first:last]:
                for cell, begin in part.overlapping(start, stop):
                    begins.append(begin)
                    yield cell

        for _, data in self._reader.stream(self._version, cells()):
            begin = begins.popleft()
            yield data[max(start - begin, 0) : stop - begin]


def layouts(manifest: Manifest) -> dict[str, SafetensorsLayout]:
    """Return what the headers of a version's safetensors files say, by path.

    Takes memory for what the headers say, and reads each page of the manifest once, whatever that is.

    Raises
    ------
    CorruptionError
        What is attached cannot become files (``bad_attachment``): a path is unsafe, or the headers together lay out
        other tensors than the version has.
    """
    description = manifest.description
    loose = _is_loose(manifest)
    try:
        check_attachment_paths([item.path for item in description.attachments] + [CANONICAL_FILE] * loose)
    except InvalidInputError as error:
        raise CorruptionError(f"the version's attachments are damaged: {error}", kind="bad_attachment") from None
    found: dict[str, SafetensorsLayout] = {}
    named: list[Iterator[TensorSpec]] = []
    room = description.tensor_count
    for item, place in _placed_attachments(manifest):
        if item.role == "safetensors_header":
            layout = found[item.path] = _layout(manifest, item, place, most_tensors=room)
            named.append(_named(layout, item.prefix))
            room -= len(layout.tensors)
    laid_out = merge(*named, key=lambda spec: spec.name)
    if not loose and any(one != other for one, other in zip_longest(laid_out, manifest.specs())):
        raise CorruptionError("the version has other tensors than the headers of its files", kind="bad_attachment")
    return found


def _is_loose(manifest: Manifest) -> bool:
    """Whether the tensors are in none of the files that were pushed."""
    headers = any(item.role == "safetensors_header" for item in manifest.description.attachments)
    return not headers and manifest.description.tensor_count > 0


def _placed_attachments(manifest: Manifest) -> Iterator[tuple[AttachmentPages, int]]:
    """Yield each attachment with the place of its first part in the manifest."""
    attachments = manifest.description.attachments
    places = accumulate((len(item.chunks) for item in attachments), initial=manifest.first_attachment_place)
    return zip(attachments, places, strict=False)


def _layout(manifest: Manifest, item: AttachmentPages, place: int, *, most_tensors: int) -> SafetensorsLayout:
    if item.nbytes > MAX_FILE_HEADER_NBYTES:  # before it is in memory
        raise CorruptionError(f"the header of {item.path!r} is longer than any can be", kind="bad_attachment")
    header = b"".join(manifest.chunk(place + at) for at in range(len(item.chunks)))
    try:
        return SafetensorsLayout.from_header(header, most_tensors=most_tensors)
    except (InvalidInputError, LimitError) as error:
        raise CorruptionError(f"the header of {item.path!r} is damaged: {error}", kind="bad_attachment") from None


def _named(layout: SafetensorsLayout, prefix: str) -> Iterator[TensorSpec]:
    """Yield the tensors as the version names them, by name; one by one, as a prefix that is wrong may be long."""
    return (replace(spec, name=prefix + spec.name) for spec in layout.structure)


def check_files(attachments: Sequence[Attachment], *, has_tensors: bool) -> None:
    """Raise InvalidInputError (``bad_path``, ``duplicate_path``) unless these can be the files of one version.

    Without a safetensors file among them, tensors take the name ``model.safetensors``.
    """
    loose = has_tensors and all(item.role == "file" for item in attachments)
    check_attachment_paths([item.path for item in attachments] + [CANONICAL_FILE] * loose)


def selected_files(specs: Sequence[TensorSpec]) -> list[VersionFile]:
    """Return the files that a selection of tensors becomes: one file, and an index that says so.

    Raises InvalidInputError if nothing is selected (``empty_selection``), or as :func:`canonical_file` does.
    """
    if not specs:
        raise InvalidInputError(
            "no tensor is selected, so there is no file to write: see include and exclude", kind="empty_selection"
        )
    weight_map = dict.fromkeys(sorted(spec.name for spec in specs), CANONICAL_FILE)
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    data = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
    return [canonical_file(specs), VersionFile(f"{CANONICAL_FILE}.index.json", len(data), data, ())]


def canonical_file(specs: Sequence[TensorSpec]) -> VersionFile:
    """Return the one file that tensors become which are in none.

    Raises InvalidInputError for tensors that safetensors files cannot hold (``unknown_dtype``).
    """
    return _weights_file(CANONICAL_FILE, SafetensorsLayout.canonical(specs), "")


def _start(part: _Part) -> int:
    return part.start


def _weights_file(path: str, layout: SafetensorsLayout, prefix: str) -> VersionFile:
    parts = tuple(
        _Part(tensor.start, tensor.stop - tensor.start, replace(tensor.spec, name=prefix + tensor.spec.name))
        for tensor in layout.tensors
    )
    return VersionFile(path, layout.nbytes, layout.header, parts)
