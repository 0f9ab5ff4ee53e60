"""``lamella://`` for fsspec: the files of a version, read-only, for pandas, transformers and whatever else opens URLs.

    lamella://weights/bert@main/config.json          repository "weights", below the working directory
    lamella:///data/weights/bert@v3/model.safetensors
    lamella://bert@main/config.json                  with storage_options={"repo": "weights"}, or LAMELLA_REPO set

Between repository and file stands a revision, in which ``/`` is written ``%2F`` (``org%2Fbert@main``). Only chunks that
hold the bytes asked for are read. fsspec finds this module by itself; ``import lamella`` does not load it.

Errors are those that files have: FileNotFoundError, and OSError with EROFS for everything that would write. So torch's
distributed checkpoints, which take any URL that fsspec knows for a place to write to, fail at once.
"""

import errno
import io
import os
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, unquote

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

import lamella
from lamella_engine.errors import InvalidInputError, NotFoundError

Result = TypeVar("Result")

BLOCK_NBYTES = 256 << 10
"""Bytes that a buffered read asks for at a time: the header of a safetensors file needs no chunk of 4 MiB more."""


class LamellaFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The files of versions.

    Parameters
    ----------
    repo
        Directory or URL of the repository, for URLs that begin with a revision. By default the environment's
        LAMELLA_REPO, or else the working directory.
    """

    protocol = "lamella"
    root_marker = ""

    def __init__(self, repo: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._repo = repo
        self._open_repositories: dict[tuple[str, tuple[int, int] | None], lamella.Repository] = {}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List a directory of a version, or, of a repository, its branches, tags and aliases."""
        path = self._strip_protocol(path).rstrip("/")
        place, revision, inner = self._parse(path)
        files = self._version(path, place, revision).file_sizes if revision else {}
        if not revision:
            found = self._revisions(path, place)
        else:
            found = {path: files[inner]} if inner in files else _children(path, inner, files)
        if not found:
            raise _missing(path, files)
        entries = [
            {"name": name, "size": size or 0, "type": "directory" if size is None else "file"}
            for name, size in found.items()
        ]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Return name, size and type; a repository is a directory, and so is one of its revisions."""
        path = self._strip_protocol(path).rstrip("/")
        place, revision, inner = self._parse(path)
        if inner:
            found: dict[str, Any] = super().info(path, **options)
            return found
        if revision:
            self._version(path, place, revision)
        else:
            self._repository(path, place)
        return {"name": path, "size": 0, "type": "directory"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return bytes of a file, from ``start`` to before ``end``; negative ones count from its end."""
        version, inner = self._file(path)
        return _as_os_error(path, lambda: version.file(inner, start=start or 0, stop=end))

    def ukey(self, path: str) -> str:
        """Return what changes whenever the file does: its version and its path."""
        version, inner = self._file(path)
        return f"{version.id}/{inner}"

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> "LamellaFile":
        if mode != "rb":
            _refuse(path)
        version, inner = self._file(path)
        size = version.file_sizes.get(inner)
        if size is None:
            raise _missing(path, version.file_sizes)
        cache = {name: options[name] for name in ("cache_type", "cache_options") if options.get(name) is not None}
        return LamellaFile(
            self, path, mode, block_size or BLOCK_NBYTES, size=size, version=version, inner=inner, **cache
        )

    def _revisions(self, path: str, place: str) -> dict[str, int | None]:
        repo = self._repository(path, place)
        names = [f"{model}@{ref.name}" for model in repo.models() for ref in repo.refs(model)]
        prefix = f"{path}/" if path else ""
        return {prefix + quote(name, safe="@"): None for name in names}

    def _file(self, path: str) -> "tuple[lamella.Version, str]":
        path = self._strip_protocol(path)
        place, revision, inner = self._parse(path)
        if not revision or not inner:
            raise IsADirectoryError(errno.EISDIR, "lamella:// names a directory here, not a file", path)
        return self._version(path, place, revision), inner

    def _parse(self, path: str) -> tuple[str, str, str]:
        """Split a path into repository, revision ("" if it has none) and path of a file in the version."""
        parts = path.split("/")
        at = next((number for number, part in enumerate(parts) if "@" in part), len(parts))
        place = "/".join(parts[:at]) or ("/" if path.startswith("/") else "")
        if not place:
            place = self._repo or os.environ.get("LAMELLA_REPO") or "."
        elif self._repo is not None:
            raise ValueError(
                f"the repository is given twice, as repo={self._repo!r} and in lamella://{path}: choose one"
            )
        return place, unquote(parts[at]) if at < len(parts) else "", "/".join(parts[at + 1 :])

    def _version(self, path: str, place: str, revision: str) -> lamella.Version:
        return _as_os_error(path, lambda: self._repository(path, place).version(revision))

    def _repository(self, path: str, place: str) -> lamella.Repository:
        # A path is meant from where the process is now, and as what stands there now: this object outlives a change of
        # directory, and a repository that is made anew.
        known = (place, None) if "://" in place else (os.path.abspath(place), _identity(place))
        if known not in self._open_repositories:
            self._open_repositories[known] = _as_os_error(path, lambda: lamella.open(place))
        return self._open_repositories[known]

    # What would write. fsspec's other ways to do so lead to one of these.

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> NoReturn:
        """Refuse."""
        _refuse(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> NoReturn:
        """Refuse, also where there is such a directory: who makes one is about to write."""
        _refuse(path)

    def rmdir(self, path: str) -> NoReturn:
        """Refuse."""
        _refuse(path)

    def rm_file(self, path: str) -> NoReturn:
        """Refuse."""
        _refuse(path)

    def cp_file(self, path1: str, path2: str, **_: Any) -> NoReturn:
        """Refuse."""
        _refuse(path2)

    def touch(self, path: str, truncate: bool = True, **_: Any) -> NoReturn:
        """Refuse."""
        _refuse(path)


class LamellaFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file of one version; stays at that version when the branch moves."""

    def __init__(self, *arguments: Any, version: lamella.Version, inner: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._version = version
        self._inner = inner

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._version.file(self._inner, start=start, stop=end)

    def _upload_chunk(self, final: bool = False) -> NoReturn:
        raise io.UnsupportedOperation("write")


def _identity(path: str) -> tuple[int, int] | None:
    """Return what tells a directory from another that takes its place."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _children(path: str, inner: str, files: dict[str, int]) -> dict[str, int | None]:
    """Return what lies right below a directory of a version: files with their sizes, directories with None."""
    prefix = f"{inner}/" if inner else ""
    found: dict[str, int | None] = {}
    for name, size in files.items():
        if name.startswith(prefix):
            child, deeper, _ = name[len(prefix) :].partition("/")
            found[f"{path}/{child}"] = None if deeper else size
    return found


def _as_os_error(path: str, function: Callable[[], Result]) -> Result:
    """Return ``function()``; what names nothing, or can be no name, is a FileNotFoundError, as files have it."""
    try:
        return function()
    except (NotFoundError, InvalidInputError) as error:
        raise FileNotFoundError(errno.ENOENT, error.message, f"lamella://{path}") from error


def _missing(path: str, files: Iterable[str]) -> FileNotFoundError:
    there = ", ".join(islice(files, 5)) or "nothing yet"
    return FileNotFoundError(errno.ENOENT, f"there is nothing of that name, but {there}", f"lamella://{path}")


def _refuse(path: str) -> NoReturn:
    raise OSError(errno.EROFS, "lamella:// is read-only: make versions with lamella.Repository.push", path)
