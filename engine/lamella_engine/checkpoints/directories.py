"""Directories as people keep models in them: safetensors files, sharded or not, with everything that stands beside.

Every file comes back byte for byte. Tensors of safetensors files become tensors of the version; what else there is
(config, tokenizer, index of shards, optimizer state in whatever format) is kept as opaque bytes.

Names. A tensor of a file at the top has the name that the file gives it, so that shards are one model, and the same
model as a state dict. One of a file further down has the file's directory before it (``unet/conv_in.weight``), for
pipelines keep several models side by side. If two tensors would have one name all the same, as in two precisions of one
model in one directory, every name has the whole path of its file before it (``model.fp16.safetensors/conv_in.weight``):
no path of a file is the beginning of another's, so that is enough.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from lamella_engine.checkpoints.files import DRAFT_PREFIX, check_attachment_path, is_repository
from lamella_engine.checkpoints.safetensors import MAX_HEADER_NBYTES, SafetensorsCheckpoint
from lamella_engine.checkpoints.sources import SourceFile
from lamella_engine.chunking import Region
from lamella_engine.errors import (
    InvalidInputError,
    LimitError,
    PermissionDeniedError,
    StorageError,
    TensorNotFoundError,
)
from lamella_engine.model import Attachment, Buffer, TensorSpec

MAX_FILES = 100_000
"""Most files of a directory: each takes a line of the version's metadata. The largest published models have some
hundreds."""

MAX_DEPTH = 64
"""Most directories inside one another; the deepest that are known have five."""


class DirectoryCheckpoint:
    """A directory as a checkpoint.

    Left out are hidden directories (``.git``, ``.cache``), empty ones, and what a killed checkout left behind.

    Parameters
    ----------
    path
        The directory, or a symbolic link to it. In it, symbolic links are followed to regular files (a Hugging Face
        cache holds nothing else), never to directories.

    Raises
    ------
    InvalidInputError
        It holds what is neither directory nor regular file (``not_a_file``), a name that no checkout could create
        (``bad_path``), a lamella repository (``nested_repository``), or an index that names a shard that is not there
        (``missing_shard``); or a kind of :class:`SafetensorsCheckpoint`.
    LimitError
        More than MAX_FILES files (``too_many_files``).
    StorageError
        It cannot be listed.
    """

    def __init__(self, path: "str | os.PathLike[str]") -> None:
        self._root = os.path.abspath(os.fsdecode(path))
        names = sorted(_files_below(self._root))
        with ExitStack() as opened:
            self._weights = self._opened_weights([name for name in names if name.endswith(".safetensors")], opened)
            files = [self._opaque(name) for name in names if not name.endswith(".safetensors")]
            self._check_indexes(names)
            self._close = opened.pop_all().close
        self._others = [file for _, file in files]
        self.structure: tuple[TensorSpec, ...] = tuple(
            sorted((spec for file in self._weights for spec in file.structure), key=lambda spec: spec.name)
        )
        self._file_of = {spec.name: file for file in self._weights for spec in file.structure}
        attachments = [attachment for file in self._weights for attachment in file.attachments]
        attachments += [self._attachment(name, file) for name, file in files]
        self.random_access = True
        self.attachments: tuple[Attachment, ...] = tuple(sorted(attachments, key=lambda item: item.path))

    def read(self, tensor: TensorSpec, region: Region, out: Buffer | None = None) -> Buffer:
        """See :meth:`Checkpoint.read`; always fills ``out``."""
        file = self._file_of.get(tensor.name)
        if file is None:
            raise TensorNotFoundError(f"{self._root} has no tensor {tensor.name[:80]!r}", tensor=tensor.name)
        return file.read(tensor, region, out)

    def check_unchanged(self) -> None:
        """See :meth:`Checkpoint.check_unchanged`: each file must be what it was; files that came are no part of it."""
        for weights in self._weights:
            weights.check_unchanged()
        for file in self._others:
            file.opened_again().close()

    def close(self) -> None:
        """Let go of the files. Doing it twice is harmless."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened_weights(self, names: list[str], opened: ExitStack) -> list[SafetensorsCheckpoint]:
        """Open the safetensors files with the prefixes that keep their tensors apart."""

        def open_all(prefixes: list[str]) -> list[SafetensorsCheckpoint]:
            return [
                opened.enter_context(SafetensorsCheckpoint(os.path.join(self._root, name), name=name, prefix=prefix))
                for name, prefix in zip(names, prefixes, strict=True)
            ]

        files = open_all([name[: name.rfind("/") + 1] for name in names])
        counts = Counter(spec.name for file in files for spec in file.structure)
        if not counts or counts.most_common(1)[0][1] == 1:
            return files
        opened.close()
        return open_all([f"{name}/" for name in names])

    def _opaque(self, name: str) -> tuple[str, SourceFile]:
        """Look at a file without keeping it open: there may be more of them than a process may have open."""
        with SourceFile(os.path.join(self._root, name)) as file:
            return name, file

    def _attachment(self, name: str, file: SourceFile) -> Attachment:
        def read(start: int, stop: int) -> bytes:
            with file.opened_again() as same:
                return same.read(start, stop)

        return Attachment(name, "file", file.nbytes, read)

    def _check_indexes(self, names: list[str]) -> None:
        """Refuse an index whose shards are not all there: half of a download is no model."""
        there = set(names)
        for name in names:
            if not name.endswith(".safetensors.index.json"):
                continue
            folder = name[: name.rfind("/") + 1]
            for shard in sorted(self._shards(name)):
                if folder + shard not in there:
                    raise InvalidInputError(
                        f"{os.path.join(self._root, name)} names {shard[:80]!r}, which is not there: fetch it, or "
                        "remove the index",
                        kind="missing_shard",
                    )

    def _shards(self, name: str) -> set[str]:
        """Return the files that an index names; none if it is no index at all, for then it is just a file."""
        with SourceFile(os.path.join(self._root, name)) as file:
            if file.nbytes > MAX_HEADER_NBYTES:
                return set()
            try:
                index: Any = json.loads(file.read(0, file.nbytes))
                return {shard for shard in index["weight_map"].values() if isinstance(shard, str)}
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
                return set()


def _files_below(root: str) -> Iterator[str]:
    """Yield the path of every file below a directory, relative, ``/`` between parts."""
    count = 0
    pending = [""]
    while pending:
        folder = pending.pop()
        if is_repository(os.path.join(root, folder)):
            raise InvalidInputError(
                f"{os.path.join(root, folder)} is a lamella repository: keep it outside of what is pushed",
                kind="nested_repository",
            )
        for entry in _entries(os.path.join(root, folder)):
            name = folder + entry.name
            if entry.name.startswith(DRAFT_PREFIX):
                continue
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith("."):
                    if name.count("/") >= MAX_DEPTH:
                        raise LimitError(f"{entry.path} lies too deep: push a directory further down", kind="too_deep")
                    pending.append(f"{name}/")
                continue
            if not os.path.isfile(entry.path):  # follows symbolic links
                raise InvalidInputError(
                    f"{entry.path} is neither a directory nor a regular file, nor a link to one: remove it, or push "
                    "files by themselves",
                    kind="not_a_file",
                    path=entry.path,
                )
            count += 1
            if count > MAX_FILES:
                raise LimitError(f"{root} has more than {MAX_FILES} files: push less of it", kind="too_many_files")
            yield check_attachment_path(name)


def _entries(path: str) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(path) as found:
            return list(found)
    except PermissionError as error:
        raise PermissionDeniedError(f"{path} may not be listed: ask for access, or push less") from error
    except OSError as error:
        raise StorageError(f"cannot list {path}: {error.strerror}", kind="read_failed") from error
