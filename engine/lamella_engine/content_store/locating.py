"""Where a version lies: in which packs, cell by cell, and on which others those stand."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from lamella_engine.content_store.manifest import Manifest
from lamella_engine.content_store.packs import Packs
from lamella_engine.content_store.reader import PackedReader, as_long_as
from lamella_engine.errors import CorruptionError, InvalidInputError
from lamella_engine.format.version import Description, PackRef
from lamella_engine.model import ChunkId

Runs = tuple[tuple[int, int], ...]
"""Packs of chunks in order: how many lie in the one of which number, then in the next."""


class Located(NamedTuple):
    """What a version's locator says of packs, which it numbers."""

    packs: tuple[PackRef, ...]
    """The closure: all that hold its chunks, or a base of one."""
    manifest_runs: Runs
    cell_runs: Runs


def locate(
    description: Description,
    pack_of: Callable[[ChunkId], str],
    packs: Packs,
    reader: PackedReader,
    check: Callable[[Manifest], None],
) -> Located:
    """Find the packs of a version's closure.

    Parameters
    ----------
    description
        The version.
    pack_of
        Names the pack that holds a chunk; what it raises is raised.
    packs, reader
        The store that has those packs.
    check
        Raises CorruptionError (``bad_attachment``) for a manifest that is not wanted.

    Raises
    ------
    InvalidInputError
        The description is not that of the chunks which it names.
    CorruptionError
        A pack is damaged.
    """
    try:
        return _locate(description, pack_of, packs, reader, check)
    except CorruptionError as error:
        # If no chunk of the manifest is damaged where it is stored, which an error of that names, it is what the
        # description says that is wrong, or a chunk was not what its writer said.
        if error.kind not in _WRONG or "object" in error.context:
            raise
        message = f"the description of the version does not fit what was pushed: {error.message}"
        raise InvalidInputError(message, kind="wrong_description") from error


_WRONG = ("bad_attachment", "bad_chunk", "bad_digest", "bad_json", "bad_length", "bad_manifest", "bad_payload")


def _locate(
    description: Description,
    pack_of: Callable[[ChunkId], str],
    packs: Packs,
    reader: PackedReader,
    check: Callable[[Manifest], None],
) -> Located:
    numbers: dict[str, int] = {}
    closure: dict[tuple[ChunkId, str], int] = {}

    def number_of(pack: str) -> int:
        return numbers.setdefault(pack, len(numbers))

    def place(chunk: ChunkId, nbytes: int) -> int:
        pack = pack_of(chunk)
        closure[chunk, pack] = nbytes
        return number_of(pack)

    def load(at: int) -> bytes:
        chunk, nbytes = description.manifest_chunks[at]
        return bytes(reader.decoded(packs.find(chunk, [pack_of(chunk)]), nbytes, check=True))

    manifest_runs = _runs(place(chunk, nbytes) for chunk, nbytes in description.manifest_chunks)
    manifest = Manifest(description, load)
    manifest.check()
    check(manifest)
    cell_runs = _runs(None if row.chunk is None else place(row.chunk, row.nbytes) for row in manifest.all_rows())
    for (chunk, pack), nbytes in sorted(closure.items(), key=_pack):  # pack by pack: each index is parsed once
        for link in reader.chain(as_long_as(nbytes, packs.find(chunk, [pack]))):
            number_of(link.pack)
    return Located(tuple(packs.ref(name) for name in numbers), manifest_runs, cell_runs)


def _pack(item: tuple[tuple[ChunkId, str], int]) -> str:
    return item[0][1]


def _runs(numbers: Iterable[int | None]) -> Runs:
    """Join equal neighbours into (count, number); None joins whatever is before it."""

    def filled() -> Iterator[int]:
        last = 0
        for number in numbers:
            last = last if number is None else number
            yield last

    return tuple((sum(1 for _ in run), number) for number, run in groupby(filled()))
