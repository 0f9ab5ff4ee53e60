"""Versions into memory that is there already: tensors filled in place, and moved from one version to another.

Whatever can be wrong with a call is found before anything is read or written. After that only the store can fail, or
memory that does not hold the version it was said to hold.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lamella_engine.boxes import Box, box_of, copied, intersection, local
from lamella_engine.chunking import Region
from lamella_engine.content_store.decoding import check_chunk, decode_chain
from lamella_engine.content_store.manifest import Manifest
from lamella_engine.content_store.seam import Reading
from lamella_engine.errors import CorruptionError, InvalidInputError
from lamella_engine.executor import map_batched
from lamella_engine.format.digests import chunk_id
from lamella_engine.memories import ArrayMemory, Extent, Memory, memory_of
from lamella_engine.model import Cell, TensorSpec, VersionId
from lamella_engine.reading import CellPair, Reader, Selection
from lamella_engine.torch_tensors import count_change, is_torch_tensor

# Whether two views share an element is hard in general; beyond so many steps they are taken to. Views of one fused
# weight, which is what people have, take a handful.
OVERLAP_STEPS = 1_000_000

_staging = CellPair()


def fill(
    reader: Reader,
    version: VersionId,
    into: Mapping[str, Any],
    selection: Selection,
    *,
    have: VersionId | None = None,
) -> dict[str, Any]:
    """Decode the selected tensors of a version into the caller's memory.

    Parameters
    ----------
    reader
        With ``check``, the id of every cell is computed again, of those that are left as they are too.
    into
        Name -> writable NumPy array or torch tensor: exactly the selected tensors, each with the dtype and shape that
        it has in the version; what the selection leaves out is not looked at. Any strides, byte order and device;
        tensors may require grad. Contiguous memory of the CPU is decoded into directly, other memory by way of one
        cell for each thread. Tied names, which are the same memory, must be tied in the version too.
    have
        A version that the memory holds. Cells that are equal in both are neither read nor touched, others are decoded
        against what is there if they are deltas of it, and then checked.

    Returns
    -------
    dict
        Name -> the array or tensor of ``into``, for the selected names.

    Raises
    ------
    InvalidInputError
        Before anything is changed: ``structure_mismatch`` (names, dtypes or shapes differ), ``not_a_tensor``,
        ``read_only``, ``overlapping_memory``, ``tied_tensors`` (tied in memory and not in the version), or a kind of
        :func:`~lamella_engine.torch_tensors.check_storable`. Later: ``not_held``, the memory did not hold ``have``;
        that cell is as it was, others may have been moved.
    TensorNotFoundError
        A pattern of the selection matches nothing.
    CorruptionError
        Stored bytes are damaged. The content of ``into`` is undefined then, as it is if the store fails.
    """
    manifest = reader.store.manifest(version)
    specs = _match(list(selection.tensors(manifest)), into, selection)
    memories = {spec.name: memory_of(spec, into[spec.name]) for spec in specs}
    _check_no_overlap(memories)
    untied = _untied(specs, memories, manifest, None if have is None else reader.store.manifest(have))
    _Filling(reader, version, have, memories).run(untied, into)
    return {spec.name: into[spec.name] for spec in specs}


def fill_boxes(reader: Reader, version: VersionId, targets: Sequence[tuple[TensorSpec, Box, Any]]) -> None:
    """Decode boxes of tensors into the caller's memory, reading each cell that they touch once.

    Parameters
    ----------
    targets
        A tensor of the version, a box of it, and writable memory of the box's shape and the tensor's dtype: a NumPy
        array or torch tensor of any strides and device. A tensor whose dtype is opaque is filled whole.

    Raises
    ------
    InvalidInputError
        Memory is not as the box is (``structure_mismatch``), or what :func:`fill` refuses; nothing is changed then.
    CorruptionError
        Stored bytes are damaged. The content of the memory is undefined then.
    """
    wanted: dict[Cell, list[tuple[TensorSpec, Box, Memory]]] = {}
    for spec, box, value in targets:
        shape = tuple(stop - first for first, stop in box)
        memory = memory_of(TensorSpec(spec.name, spec.dtype, shape), value)
        place = ((0, spec.nbytes),) if spec.dtype.opaque else box
        for number in spec.grid.cells_in(place):
            wanted.setdefault(Cell(spec.name, number), []).append((spec, place, memory))

    def fill_cell(reading: Reading) -> None:
        takers = wanted.pop(reading.cell)
        region = takers[0][0].grid.region(reading.cell.number)
        whole = box_of(region)
        within = [(memory, box, intersection(box, whole)) for _, box, memory in takers]
        out: memoryview | None = None
        if len(takers) == 1 and within[0][2] == whole:
            memory, box, _ = within[0]
            out = memory.run(Region(local(whole, box), 0, region.nbytes))
        direct = out is not None
        if out is None:
            out = _staging.left.data[: region.nbytes]
        decode_chain(reading.chain, out, check=reader.checks)
        for memory, box, part in () if direct else within:
            assert part is not None
            memory.write(Region(local(part, box), 0, 0), copied(takers[0][0], whole, out, part))

    cells = sorted(wanted)
    try:
        for _ in map_batched(reader.executor, fill_cell, reader.read(version, cells), nbytes=_decoded_nbytes):
            pass
    finally:
        for _, _, value in targets:
            if is_torch_tensor(value):
                count_change(value)


def _decoded_nbytes(reading: Reading) -> int:
    return reading.chain[-1].decoded_nbytes


class _Filling:
    """One fill, after all checks."""

    def __init__(
        self, reader: Reader, version: VersionId, have: VersionId | None, memories: Mapping[str, "Memory"]
    ) -> None:
        self._reader = reader
        self._version = version
        self._have = have
        self._memories = memories
        self._regions: dict[Cell, Region] = {}

    def run(self, specs: list[TensorSpec], into: Mapping[str, Any]) -> None:
        touched: set[str] = set()

        def cells() -> Iterator[Cell]:
            for spec in specs:
                for number, region in enumerate(spec.grid.regions()):
                    cell = Cell(spec.name, number)
                    self._regions[cell] = region
                    yield cell

        def readings() -> Iterator[Reading]:
            for reading in self._reader.read(self._version, cells(), self._have):
                if reading.chain:
                    touched.add(reading.cell.tensor or "")
                yield reading

        def nbytes(reading: Reading) -> int:
            return self._regions[reading.cell].nbytes

        try:
            for _ in map_batched(self._reader.executor, self._fill_cell, readings(), nbytes=nbytes):
                pass
        finally:
            for name in touched:
                if is_torch_tensor(into[name]):
                    count_change(into[name])

    def _fill_cell(self, reading: Reading) -> None:
        cell, chain = reading
        region = self._regions.pop(cell)
        memory = self._memories[cell.tensor or ""]
        run = memory.run(region)
        if chain and chain[0].base is None:
            out = _staging.left.data[: region.nbytes] if run is None else run
            decode_chain(chain, out, check=self._reader.checks)
            if run is None:
                memory.write(region, out)
        elif chain or self._reader.check:
            self._move_cell(reading, region, memory, memory.read(region, _staging.right) if run is None else run)

    def _move_cell(self, reading: Reading, region: Region, memory: "Memory", held: memoryview) -> None:
        """Move a cell from the version that it is said to hold; if it does not hold that, it stays as it is."""
        cell, chain = reading
        try:
            if not chain:
                row = self._reader.store.manifest(self._version).row(cell.tensor or "", cell.number)
                check_chunk(chunk_id(row.content) if row.chunk is None else row.chunk, held)
                return
            out = _staging.left.data[: region.nbytes]
            decode_chain(chain, out, base=held, check=True)
        except CorruptionError as error:
            # The payload's digest was checked, so what does not fit it, even where a decoder trips, is the memory.
            if error.kind not in ("bad_chunk", "bad_payload"):
                raise
            raise InvalidInputError(
                f"the memory of {cell.tensor!r} does not hold version {self._have}: check out again without have, for "
                "other tensors may have been moved already",
                kind="not_held",
                tensor=cell.tensor,
            ) from None
        memory.write(region, out)


def _match(specs: list[TensorSpec], into: Mapping[str, Any], selection: Selection) -> list[TensorSpec]:
    """Return the selected tensors if ``into`` has them and no others that are selected."""
    if not isinstance(into, Mapping):
        raise InvalidInputError(
            f"into is a {type(into).__name__}: give a mapping of names to tensors, such as a state dict",
            kind="bad_option",
        )
    names = {spec.name for spec in specs}
    lacking = [spec.name for spec in specs if spec.name not in into]
    if lacking:
        raise _mismatch(
            lacking[0],
            f"into lacks {len(lacking)} of the version's tensors, such as {lacking[0]!r}: add them, or exclude them",
        )
    surplus = [name for name in into if name not in names and (not isinstance(name, str) or selection.has(name))]
    if surplus:
        raise _mismatch(
            surplus[0],
            f"the version lacks {len(surplus)} of the tensors in into, such as {surplus[0]!r}: take them out, or "
            "exclude them",
        )
    return specs


def _mismatch(name: object, message: str) -> InvalidInputError:
    return InvalidInputError(message, kind="structure_mismatch", tensor=str(name))


def _check_no_overlap(memories: Mapping[str, Memory]) -> None:
    """Raise InvalidInputError if two tensors share some of their memory; sharing all of it is being tied."""
    placed = sorted(
        ((memory.extent.device, memory.extent.start, memory.extent.stop, name) for name, memory in memories.items())
    )
    open_names: list[str] = []
    for device, start, stop, name in placed:
        if start == stop:
            continue
        open_names = [
            other
            for other in open_names
            if memories[other].extent.device == device and memories[other].extent.stop > start
        ]
        for other in open_names:
            if memories[other].extent != memories[name].extent and _share_elements(memories[other], memories[name]):
                raise InvalidInputError(
                    f"{other[:80]!r} and {name[:80]!r} share some of their memory: give each its own",
                    kind="overlapping_memory",
                    tensor=name,
                )
        open_names.append(name)


def _share_elements(one: Memory, other: Memory) -> bool:
    """Whether two memories of overlapping extent have an element in common, as far as it can be told."""
    if not (isinstance(one, ArrayMemory) and isinstance(other, ArrayMemory)):
        return True
    try:
        return np.shares_memory(one.array, other.array, max_work=OVERLAP_STEPS)  # type: ignore[arg-type]  # stubs know -1 and 0
    except np.exceptions.TooHardError:
        return True


def _untied(
    specs: list[TensorSpec], memories: Mapping[str, Memory], manifest: Manifest, held: Manifest | None
) -> list[TensorSpec]:
    """Return one tensor for each memory; raises InvalidInputError if names that share one differ in a version."""
    firsts: dict[Extent, TensorSpec] = {}
    for spec in specs:
        first = firsts.setdefault(memories[spec.name].extent, spec) if spec.nbytes else spec
        if first is spec:
            continue
        names = f"{first.name[:80]!r} and {spec.name[:80]!r}"
        if _contents(manifest, first) != _contents(manifest, spec):
            raise InvalidInputError(
                f"{names} are tied, but differ in the version: untie them, or exclude one",
                kind="tied_tensors",
                tensor=spec.name,
            )
        before = held and (_contents(held, first), _contents(held, spec))
        if before and None not in before and before[0] != before[1]:
            raise InvalidInputError(
                f"{names} are tied, but differ in the version that they are said to hold: check out without have",
                kind="not_held",
                tensor=spec.name,
            )
    return list(firsts.values())


def _contents(manifest: Manifest, spec: TensorSpec) -> list[bytes] | None:
    """Return what stands in a tensor's rows, or None if the version has no such tensor."""
    return [row.content for row in manifest.rows(spec.name)] if manifest.holds(spec) else None
