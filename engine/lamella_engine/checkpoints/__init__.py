"""Checkpoints: tensors in files and in memory, as named runs of bytes, and back.

    tensors       arrays and torch tensors in memory
    safetensors   the file format: its one parser, files to read, layouts to write
    directories   safetensors files with everything that stands beside them
    zarr_groups   Zarr v3 hierarchies, re-gridded: those of directories (zarr_directories, which looks through them
                  first; zarr_metadata, its one parser and codecs with bounds), and the one that a transaction fills
                  (zarr_spool)
    arrivals      parts of tensors on their way from a GPU, into a ring of pinned memory; pages, that memory
    staging       copies of tensors in memory
    shards        boxes of tensors, where several workers have a checkpoint together
    sources       files to read: with pread, and noticed when they change
    files         writing files whole or not at all

A checkpoint tells a push what is there (structure, attachments) and hands out one cell's bytes at a time.
"""

import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeGuard

from lamella_engine.checkpoints.directories import DirectoryCheckpoint
from lamella_engine.checkpoints.files import NewFile, check_attachment_paths, write_files
from lamella_engine.checkpoints.safetensors import (
    MAX_FILE_HEADER_NBYTES,
    PlacedTensor,
    SafetensorsCheckpoint,
    SafetensorsLayout,
)
from lamella_engine.checkpoints.tensors import MemoryCheckpoint, to_numpy
from lamella_engine.chunking import Region
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import Attachment, Buffer, TensorSpec

if TYPE_CHECKING:
    import zarr

__all__ = [
    "MAX_FILE_HEADER_NBYTES",
    "Checkpoint",
    "DirectoryCheckpoint",
    "MemoryCheckpoint",
    "NewFile",
    "PlacedTensor",
    "SafetensorsCheckpoint",
    "SafetensorsLayout",
    "check_attachment_paths",
    "expect",
    "open_checkpoint",
    "to_numpy",
    "write_files",
]


class Checkpoint(Protocol):
    """Where a push gets its tensors from. Reading is safe from several threads; closing is for when they are done."""

    structure: tuple[TensorSpec, ...]
    """The tensors, sorted by name (code points)."""
    attachments: tuple[Attachment, ...]
    """What else it takes to give the source back byte for byte."""
    random_access: bool
    """Whether any run of a tensor's bytes can be read for about what it is long, not only cells."""

    def read(self, tensor: TensorSpec, region: Region, out: Buffer | None = None) -> Buffer:
        """Return the bytes of one cell, little-endian and in C order.

        Parameters
        ----------
        tensor
            One of ``structure``.
        region
            A place in ``tensor.grid``; with ``random_access`` any box that is one run of bytes.
        out : writable bytes, at least ``region.nbytes``, or None
            Memory to use if the source cannot lend its own. A caller that gives the same memory again and again spares
            the system new pages for every cell.

        Returns
        -------
        Buffer
            Exactly ``region.nbytes`` bytes, to be read only: a view of the tensor itself, or of ``out``, or new. Valid
            as long as ``out`` is not used again and the tensor not changed.

        Raises
        ------
        TensorNotFoundError
            There is no such tensor.
        InvalidInputError
            The source was cut short or freed meanwhile (``source_changed``, ``freed_tensor``), or the checkpoint was
            closed (``closed``).
        StorageError
            The file could not be read.
        """

    def check_unchanged(self) -> None:
        """Raise InvalidInputError (``source_changed``) if the source was seen to change since it was opened."""

    def close(self) -> None:
        """Let go of the source. Doing it twice is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_checkpoint(source: object) -> Checkpoint:
    """Open a checkpoint for reading.

    Parameters
    ----------
    source
        A mapping of names to torch tensors or NumPy arrays; the path of a ``.safetensors`` file, of a directory or of a
        Zarr v3 directory; or a ``zarr.Group``.

    Raises
    ------
    InvalidInputError
        None of these (``bad_source``), or what :class:`MemoryCheckpoint`, :class:`SafetensorsCheckpoint`,
        :class:`DirectoryCheckpoint` or ``ZarrCheckpoint`` refuses.
    NotFoundError
        There is no such file.
    """
    if isinstance(source, Mapping):
        return MemoryCheckpoint(source)
    if source == "":
        raise InvalidInputError("the source is empty: name a file or a directory", kind="bad_source")
    if _is_zarr(source):
        from lamella_engine.checkpoints.zarr_groups import ZarrCheckpoint  # on use: zarr takes 0.4 s to import

        return ZarrCheckpoint(source)
    if isinstance(source, str | os.PathLike):
        return DirectoryCheckpoint(source) if os.path.isdir(source) else SafetensorsCheckpoint(source)
    raise InvalidInputError(
        f"cannot read tensors from a {type(source).__name__}: give a mapping of names to tensors, as state_dict() is, "
        "or a path; lamella.torch.push takes modules",
        kind="bad_source",
    )


def expect(checkpoint: Checkpoint, tensor: TensorSpec, region: Region) -> None:
    """Say that a part of a tensor will be read soon: what lies on a GPU is on its way from then on.

    What is not read after all is let go of when the checkpoint is closed. Raises what reading it would.
    """
    if isinstance(checkpoint, MemoryCheckpoint):
        checkpoint.expect(tensor, region)


def _is_zarr(source: object) -> "TypeGuard[zarr.Group | str | os.PathLike[str]]":
    """Whether a source is Zarr's, of whatever version; never imports zarr."""
    if isinstance(source, str | os.PathLike):
        return any(os.path.lexists(os.path.join(source, name)) for name in ("zarr.json", ".zgroup", ".zarray"))
    # A program that holds a group has imported zarr already.
    module = sys.modules.get("zarr")
    return module is not None and isinstance(source, module.Group)
