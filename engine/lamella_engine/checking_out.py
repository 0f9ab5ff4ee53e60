"""From a version to whoever wants it: files in a directory, new tensors, or memory that is there already."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lamella_engine.checkpoints import NewFile, to_numpy, write_files
from lamella_engine.content_store.seam import ContentStore, Reading
from lamella_engine.executor import Executor
from lamella_engine.filling import fill
from lamella_engine.model import Progress, TensorSpec, VersionId
from lamella_engine.reading import Reader, Selection
from lamella_engine.torch_tensors import to_torch
from lamella_engine.version_files import VersionFiles, selected_files


class Checkout:
    """One checkout. Each method does all of it, in one of the ways.

    Parameters
    ----------
    store, executor
        Where from, and what decodes.
    version
        Which version.
    selection
        Which tensors of it.
    check
        Whether to compute every chunk's id again.
    progress
        Is told, in the caller's thread, how far it is.
    """

    def __init__(
        self,
        store: ContentStore,
        executor: Executor,
        version: VersionId,
        selection: Selection,
        *,
        check: bool,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._version = version
        self._selection = selection
        self._manifest = store.manifest(version)
        self._progress = progress
        self._total_nbytes = self._done_nbytes = self._read_nbytes = 0
        self._reader = Reader(store, executor, check=check, watch=None if progress is None else self._watch)

    def to_files(self, out: Path, *, overwrite: bool) -> dict[str, Path]:
        """Write the files that were pushed, or, of a selection, one safetensors file and its index."""
        files = VersionFiles(self._reader, self._version)
        wanted = list(files.files.values()) if self._selection.everything else selected_files(self._specs())
        self._total_nbytes = sum(file.nbytes - len(file.head) for file in wanted)
        return self._written(out, files.new_files(wanted), overwrite=overwrite)

    def to_zarr(self, out: Path, *, overwrite: bool) -> dict[str, Path]:
        """Write a plain Zarr v3 hierarchy."""
        from lamella_engine.zarr_store import VersionStore  # on use: zarr takes 0.4 s to import

        keys = VersionStore(self._reader, self._version, self._specs(), {}).files()
        new = (NewFile(key, len(data), partial(list, [data])) for key, data in keys)
        return self._written(out, new, overwrite=overwrite)

    def to_tensors(self, framework: Literal["numpy", "torch"]) -> dict[str, Any]:
        """Return new arrays or tensors."""
        convert = to_torch if framework == "torch" else to_numpy
        tensors = self._reader.tensors(self._version, self._specs())
        found = {spec.name: convert(data, spec.dtype, spec.shape) for spec, data in tensors}
        self._finish()
        return found

    def to_memory(self, into: Mapping[str, Any], *, have: VersionId | None) -> dict[str, Any]:
        """Fill the caller's memory; see :func:`~lamella_engine.filling.fill`."""
        self._specs()
        found = fill(self._reader, self._version, into, self._selection, have=have)
        self._finish()
        return found

    def _specs(self) -> list[TensorSpec]:
        specs = list(self._selection.tensors(self._manifest))
        self._total_nbytes = sum(spec.nbytes for spec in specs)
        return specs

    def _written(self, out: Path, files: Iterable[NewFile], *, overwrite: bool) -> dict[str, Path]:
        found = write_files(out, files, overwrite=overwrite)
        self._finish()
        return found

    def _watch(self, reading: Reading) -> None:
        self._read_nbytes += sum(len(blob.payload) for blob in reading.chain)
        self._done_nbytes += reading.chain[-1].decoded_nbytes if reading.chain else 0
        self._tell(min(self._done_nbytes, self._total_nbytes))

    def _finish(self) -> None:
        self._tell(self._total_nbytes)  # also what needed no reading

    def _tell(self, done_nbytes: int) -> None:
        if self._progress is not None:
            self._progress(Progress(done_nbytes, self._total_nbytes, self._read_nbytes))
