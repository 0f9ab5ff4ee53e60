"""The safetensors format: one strict parser for what is read, stored and written, and files as checkpoints.

A file is a length of 8 bytes (little-endian), a JSON header of that length, and the tensors' bytes without a hole:

    {"__metadata__": {"format": "pt"}, "wte": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}

The header is read by its own grammar, three levels deep, whose only numbers are naturals. So nothing in a hostile file
(nesting, floats, huge numerals, lists without end) takes more memory than the tensors that it names.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from lamella_engine.checkpoints.files import check_attachment_path
from lamella_engine.checkpoints.sources import SourceFile
from lamella_engine.chunking import Region
from lamella_engine.dtypes import Dtype, dtype_of_safetensors
from lamella_engine.errors import InvalidInputError, LimitError, TensorNotFoundError
from lamella_engine.model import Attachment, Buffer, TensorSpec

# Longest header in bytes; the format's own limit, which every reader of it shares.
MAX_HEADER_NBYTES = 100_000_000

# Most keys of one object: tensors of a file, or lines of its metadata. The largest models have tens of thousands of
# tensors; a million take about 0.5 GB to hold.
MAX_ENTRIES = 1_000_000

# Most axes of a tensor: as many as NumPy had until version 2, and more than any framework computes with.
MAX_RANK = 32

# Longest tensor in bytes, counting axes of length 0 as 1: what an array library can address with a signed 64-bit int.
_MAX_TENSOR_NBYTES = (1 << 63) - 1

_PREFIX_NBYTES = 8

MAX_FILE_HEADER_NBYTES = _PREFIX_NBYTES + MAX_HEADER_NBYTES
"""Longest beginning of a file: the length of the header, and the header."""

_METADATA = "__metadata__"

# The reference writer lays tensors out by dtype in this order, then by name: larger elements first, and its own order
# among those of one size.
# fmt: off
_WRITING_ORDER = (
    "U64", "I64", "F64", "C64",
    "F32", "U32", "I32",
    "BF16", "F16", "U16", "I16",
    "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8",
    "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)
# fmt: on

_SPACE = rb"[ \t\n\r]*+"
_STRING = re.compile(rb'"((?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+)"' + _SPACE)
# At most MAX_RANK + 1 numbers of at most 20 digits (2^64 has 20): one too many is seen, a million are not collected.
_NATURAL = rb"(?:0|[1-9][0-9]{0,19})" + _SPACE
_NATURALS = re.compile(rb"\[%b((?:%b(?:,%b%b){0,%d})?)\]%b" % (_SPACE, _NATURAL, _SPACE, _NATURAL, MAX_RANK, _SPACE))
_SPACES = re.compile(_SPACE)

# First bytes of files that are taken for safetensors files, and what to do about them.
_LOOKALIKES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with 'git lfs pull'"),
    (b"PK\x03\x04", "a ZIP archive, as torch.save and numpy.savez write: load it and push its tensors"),
    (b"GGUF", "a GGUF file: convert it to safetensors"),
    (b"\x7fELF", "an ELF program"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file: load it and push its tensors"),
    (b"\x93NUMPY", "a NumPy array file: load it and push its arrays"),
    *(
        (b"\x80" + bytes([version]), "a Python pickle, which can run code when loaded: convert it to safetensors")
        for version in range(2, 6)
    ),
)


class PlacedTensor(NamedTuple):
    """One tensor of a file."""

    spec: TensorSpec
    start: int
    """Its first byte in the file."""
    stop: int
    """One past its last byte in the file."""


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """Everything that a safetensors file says before its tensors' bytes."""

    header: bytes
    """The file's beginning, verbatim: 8 bytes of length, then JSON."""
    tensors: tuple[PlacedTensor, ...]
    """In file order; the first starts where the header ends, each starts where the one before stops."""
    metadata: Mapping[str, str] | None
    """What stands under ``__metadata__``, or None without it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.tensors[-1].stop if self.tensors else len(self.header)

    @property
    def structure(self) -> tuple[TensorSpec, ...]:
        """The tensors sorted by name."""
        return self.named("")

    def named(self, prefix: str) -> tuple[TensorSpec, ...]:
        """Return the tensors sorted by name, with ``prefix`` before each name."""
        specs = (tensor.spec for tensor in self.tensors)
        return tuple(sorted((replace(spec, name=prefix + spec.name) for spec in specs), key=lambda spec: spec.name))

    @classmethod
    def from_header(
        cls, header: bytes, *, source: str = "the safetensors header", most_tensors: int = MAX_ENTRIES
    ) -> Self:
        """Parse a header with its 8 bytes of length.

        Parameters
        ----------
        header
            Exactly the bytes before the first tensor's.
        source
            What to call it in messages.
        most_tensors
            How many it may name.

        Raises
        ------
        InvalidInputError
            The kinds are ``truncated``, ``header_too_long``, ``bad_header``, ``duplicate_key``, ``bad_tensor_name``,
            ``unknown_dtype``, ``bad_shape``, ``bad_offsets``, ``wrong_length`` (shape and offsets disagree),
            ``misaligned_tensor`` and ``bad_metadata``.
        LimitError
            More than ``most_tensors`` tensors or MAX_ENTRIES lines of metadata (``too_many_entries``).
        """
        length = _header_nbytes(header[:_PREFIX_NBYTES], source)
        if len(header) != _PREFIX_NBYTES + length:
            raise InvalidInputError(
                f"{source} has {len(header)} bytes where its length says {_PREFIX_NBYTES + length}", kind="truncated"
            )
        tensors, metadata = _parse(header[_PREFIX_NBYTES:], source, most_tensors)
        return cls(header, tensors, metadata)

    @classmethod
    def canonical(cls, structure: Sequence[TensorSpec], *, metadata: Mapping[str, str] | None = None) -> Self:
        """Lay tensors out exactly as the reference writer (``safetensors`` 0.8) would.

        Parameters
        ----------
        structure
            In any order.
        metadata
            Goes under ``__metadata__`` in this order. (The reference writes several keys in a random order.)

        Raises
        ------
        InvalidInputError
            A dtype that safetensors lacks (``unknown_dtype``), a name twice (``duplicate_key``) or reserved
            (``bad_tensor_name``), a header beyond the format's limit (``header_too_long``).
        """
        entries: dict[str, object] = {} if metadata is None else {_METADATA: dict(metadata)}
        ordered = sorted(structure, key=lambda spec: (_WRITING_ORDER.index(_safetensors_name(spec)), spec.name))
        ends = list(accumulate((spec.nbytes for spec in ordered), initial=0))
        for spec, offsets in zip(ordered, pairwise(ends), strict=True):
            if spec.name == _METADATA:
                raise InvalidInputError(
                    f"no tensor of a safetensors file may be named {_METADATA}", kind="bad_tensor_name"
                )
            if spec.name in entries:
                raise InvalidInputError(f"two tensors are named {spec.name[:80]!r}", kind="duplicate_key")
            entries[spec.name] = {"dtype": spec.dtype.safetensors, "shape": spec.shape, "data_offsets": offsets}
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        # Through the one parser: what could not be read back is not written.
        return cls.from_header(len(text).to_bytes(_PREFIX_NBYTES, "little") + text)


def _safetensors_name(spec: TensorSpec) -> str:
    if spec.dtype.safetensors is None:
        raise InvalidInputError(
            f"tensor {spec.name[:80]!r} is {spec.dtype.name}, which safetensors files cannot hold: check out as arrays",
            kind="unknown_dtype",
            dtype=spec.dtype.name,
        )
    return spec.dtype.safetensors


def _header_nbytes(prefix: bytes, source: str) -> int:
    """Return N, the length that the first 8 bytes of a file announce."""
    if len(prefix) < _PREFIX_NBYTES:
        raise InvalidInputError(
            f"{source} ends after {len(prefix)} bytes: a safetensors file has at least 10", kind="truncated"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_NBYTES:
        raise InvalidInputError(
            f"{source} is no safetensors file, its first bytes announce too long a header: push such a file, or a "
            "directory, which may hold files of any kind",
            kind="header_too_long",
        )
    return length


def _too_many(source: str, most: int) -> LimitError:
    return LimitError(f"{source} has more than {most} entries in one object", kind="too_many_entries")


class _Cursor:
    """A place in a header that moves over whole tokens and the space behind them."""

    def __init__(self, text: bytes, source: str) -> None:
        self._text = text
        self._at = 0
        self._source = source

    def refuse(self, problem: str, kind: str) -> InvalidInputError:
        return InvalidInputError(f"{self._source}: {problem} (byte {self._at} of the header)", kind=kind)

    def take(self, mark: bytes) -> bool:
        """Move over ``mark``, one byte, if it stands here."""
        if not self._text.startswith(mark, self._at):
            return False
        self._at += 1
        if self._text[self._at : self._at + 1].isspace():
            space = _SPACES.match(self._text, self._at)
            self._at = space.end() if space else self._at
        return True

    def expect(self, mark: bytes, kind: str = "bad_header") -> None:
        if not self.take(mark):
            raise self.refuse(f"expected {mark.decode()!r}", kind)

    def string(self, kind: str = "bad_header") -> str:
        """Read a string; one that is none is refused as ``kind``."""
        found = _STRING.match(self._text, self._at)
        if found is None:
            raise self.refuse("expected a string", kind)
        body = found[1]
        try:
            value = body.decode()
            if b"\\" in body:
                value = json.loads(f'"{value}"')
                value.encode()  # refuses half of a surrogate pair
        except ValueError as error:
            raise self.refuse("a string is not valid UTF-8 or has a bad escape", "bad_header") from error
        self._at = found.end()
        return value

    def naturals(self, what: str, kind: str) -> tuple[int, ...]:
        """Read a list of at most MAX_RANK + 1 natural numbers below 10^20."""
        found = _NATURALS.match(self._text, self._at)
        if found is None:
            raise self.refuse(f"{what} is no list of at most {MAX_RANK} natural numbers", kind)
        self._at = found.end()
        return tuple(map(int, found[1].split(b","))) if found[1] else ()

    def keys(self, kind: str = "bad_header") -> Iterator[str]:
        """Yield each key of the object that stands here; the caller reads its value before asking for the next.

        What is no object is refused as ``kind``.
        """
        self.expect(b"{", kind)
        if self.take(b"}"):
            return
        seen: set[str] = set()
        while True:
            key = self.string()
            if key in seen:
                raise self.refuse(f"{key[:80]!r} stands there twice", "duplicate_key")
            if len(seen) == MAX_ENTRIES:
                raise _too_many(self._source, MAX_ENTRIES)
            seen.add(key)
            self.expect(b":")
            yield key
            if self.take(b"}"):
                return
            self.expect(b",")

    @property
    def ended(self) -> bool:
        return self._at == len(self._text)


def _parse(text: bytes, source: str, most_tensors: int) -> tuple[tuple[PlacedTensor, ...], dict[str, str] | None]:
    """Read a header without its length; returns the tensors in file order and the metadata."""
    stripped = text.rstrip(b" ")
    if not (stripped.startswith(b"{") and stripped.endswith(b"}")):
        raise InvalidInputError(
            f"{source} is no safetensors header: it must be one JSON object, followed by nothing but spaces",
            kind="bad_header",
        )
    cursor = _Cursor(stripped, source)
    tensors: list[PlacedTensor] = []
    metadata: dict[str, str] | None = None
    for name in cursor.keys():  # noqa: SIM118 (not a mapping)
        if name == _METADATA:
            metadata = {key: cursor.string("bad_metadata") for key in cursor.keys("bad_metadata")}
        elif len(tensors) == most_tensors:
            raise _too_many(source, most_tensors)
        else:
            tensors.append(_placed_tensor(cursor, name, len(text) + _PREFIX_NBYTES))
    if not cursor.ended:
        raise cursor.refuse("something follows the header's object", "bad_header")
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = len(text) + _PREFIX_NBYTES
    for tensor in tensors:
        if tensor.start != end:
            problem = "overlaps the one before it" if tensor.start < end else "leaves a hole before it"
            raise InvalidInputError(f"{source}: tensor {tensor.spec.name[:80]!r} {problem}", kind="bad_offsets")
        end = tensor.stop
    return tuple(tensors), metadata


def _placed_tensor(cursor: _Cursor, name: str, data_start: int) -> PlacedTensor:
    """Read what a header says of one tensor; the tensors' bytes begin at ``data_start`` in the file."""
    dtype: Dtype | None = None
    shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    shown = f"tensor {name[:80]!r}"
    for field in cursor.keys():  # noqa: SIM118 (not a mapping)
        if field == "dtype":
            written = cursor.string("unknown_dtype")
            try:
                dtype = dtype_of_safetensors(written)
            except InvalidInputError as error:
                raise cursor.refuse(f"{shown}: {error}", error.kind) from None
        elif field == "shape":
            shape = cursor.naturals(f"the shape of {shown}", "bad_shape")
        elif field == "data_offsets":
            offsets = cursor.naturals(f"data_offsets of {shown}", "bad_offsets")
        else:
            raise cursor.refuse(f"{shown} has a field {field[:80]!r} that the format lacks", "bad_header")
    if dtype is None or shape is None or offsets is None:
        raise cursor.refuse(f"{shown} lacks its dtype, shape or data_offsets", "bad_header")
    if len(shape) > MAX_RANK:
        raise cursor.refuse(f"{shown} has more than {MAX_RANK} axes", "bad_shape")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise cursor.refuse(f"{shown} has data_offsets that are no [begin, end]", "bad_offsets")
    bits = dtype.bits
    for length in shape:
        bits *= max(length, 1)
    if bits > 8 * _MAX_TENSOR_NBYTES:
        raise cursor.refuse(f"{shown} is larger than any array can be", "bad_shape")
    spec = TensorSpec(name, dtype, shape)
    try:
        nbytes = spec.nbytes
    except InvalidInputError as error:
        raise cursor.refuse(f"{shown}: {error}", error.kind) from None
    if offsets[1] - offsets[0] != nbytes:
        raise cursor.refuse(
            f"{shown} takes {offsets[1] - offsets[0]} bytes where its shape needs {nbytes}", "wrong_length"
        )
    return PlacedTensor(spec, data_start + offsets[0], data_start + offsets[1])


class SafetensorsCheckpoint:
    """A safetensors file as a checkpoint.

    Its one attachment is the file's header verbatim, from which a checkout rebuilds the file byte for byte.

    Parameters
    ----------
    path
        A regular file, or a symbolic link to one.
    name
        What a checkout shall call it, relative; by default its own name.
    prefix
        What the version's names of its tensors have before the names that it gives them.

    Raises
    ------
    InvalidInputError
        Not a regular file (``not_a_file``), not readable (``unreadable``), another format (``not_safetensors``), longer
        or shorter than its header says (``truncated``, ``trailing_bytes``), a name that no checkout could create
        (``bad_path``), or any kind of :meth:`SafetensorsLayout.from_header`.
    NotFoundError
        There is no such file (``file_not_found``).
    """

    def __init__(self, path: "str | os.PathLike[str]", *, name: str | None = None, prefix: str = "") -> None:
        location = os.path.abspath(os.fsdecode(path))
        name = check_attachment_path(os.path.basename(location) if name is None else name)
        self._file = SourceFile(location)
        try:
            self.layout = _read_layout(self._file)
        except BaseException:
            self.close()
            raise
        self.structure: tuple[TensorSpec, ...] = self.layout.named(prefix)
        self.random_access = True
        self.attachments: tuple[Attachment, ...] = (
            Attachment.of_bytes(name, "safetensors_header", self.layout.header, prefix=prefix),
        )
        self._starts = {prefix + tensor.spec.name: tensor.start for tensor in self.layout.tensors}
        self.fingerprint = self._file.fingerprint
        """See :attr:`SourceFile.fingerprint`."""

    def read(self, tensor: TensorSpec, region: Region, out: Buffer | None = None) -> Buffer:
        """See :meth:`Checkpoint.read`; always fills ``out``."""
        start = self._starts.get(tensor.name)
        if start is None:
            raise TensorNotFoundError(f"{self._file.path} has no tensor {tensor.name[:80]!r}", tensor=tensor.name)
        target = np.empty(region.nbytes, np.uint8) if out is None else np.frombuffer(out, np.uint8, region.nbytes)
        self._file.read_into(target.data, start + region.start)
        return target.data

    def check_unchanged(self) -> None:
        """See :meth:`Checkpoint.check_unchanged`: the open file and the name must be what they were."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Let go of the file. Doing it twice is harmless; a read in another thread must have ended."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_layout(file: SourceFile) -> SafetensorsLayout:
    """Read the header, once its length is known to be sane and inside the file."""
    beginning = file.read(0, min(file.nbytes, 32))
    for magic, description in _LOOKALIKES:
        # The length of a header of 640 bytes begins like a pickle, but then a brace follows it.
        if beginning.startswith(magic) and beginning[_PREFIX_NBYTES : _PREFIX_NBYTES + 1] != b"{":
            raise InvalidInputError(f"{file.path} looks like {description}", kind="not_safetensors")
    length = _header_nbytes(beginning[:_PREFIX_NBYTES], file.path)
    if length > file.nbytes - _PREFIX_NBYTES:
        raise InvalidInputError(
            f"{file.path} has {file.nbytes} bytes, fewer than its header needs: fetch it again", kind="truncated"
        )
    layout = SafetensorsLayout.from_header(file.read(0, _PREFIX_NBYTES + length), source=file.path)
    if layout.nbytes != file.nbytes:
        raise InvalidInputError(
            f"{file.path} has {file.nbytes} bytes where its header describes {layout.nbytes}: fetch it again",
            kind="truncated" if file.nbytes < layout.nbytes else "trailing_bytes",
        )
    return layout
