"""Memory of a push and of a checkout to files, whatever the size of the checkpoint.

    python -m benchmarks.memory [--random-gib 4] [--sparse-gib 64] [--directory DIR]

Writes one safetensors file of random bytes (nothing compresses, nothing is equal: the most data in flight) and a sparse
one (as many cells as fit), pushes each into a new repository, and prints by how much the process's anonymous memory
(RssAnon: pages of files do not count) grew at its peak, against the promise: 512 MiB + 64 bytes a cell.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lamella

BOUND_NBYTES = 512 << 20
BOUND_PER_CELL = 64
SAMPLE_S = 0.005
"""Between two looks at the memory; a 4 MiB buffer takes longer than that to be touched."""

TENSOR_NBYTES = 1 << 30


def rss_anon(process: int | str = "self") -> int:
    """Return the bytes of anonymous memory that a process holds, this one unless its id is given."""
    with open(f"/proc/{process}/status") as status:
        line = next(line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


@dataclass(slots=True)
class Growth:
    """By how much memory grew at its peak while something ran, and for how long it ran."""

    nbytes: int = 0
    seconds: float = 0.0


def measured(work: Callable[[], object]) -> Growth:
    """Run ``work`` and watch memory meanwhile."""
    growth, done = Growth(), threading.Event()
    before = rss_anon()

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            growth.nbytes = max(growth.nbytes, rss_anon() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        work()
    finally:
        growth.seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return growth


def write_checkpoint(path: Path, nbytes: int, *, random: bool) -> int:
    """Write a safetensors file of float32 tensors of 1 GiB, or less, each; return its number of cells (of 4 MiB)."""
    sizes = [min(TENSOR_NBYTES, nbytes - start) for start in range(0, nbytes, TENSOR_NBYTES)]
    header: dict[str, object] = {}
    start = 0
    for number, size in enumerate(sizes):
        header[f"t{number:04d}"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if random:
            for _ in range(0, nbytes, 1 << 22):
                file.write(os.urandom(1 << 22))
        else:
            file.truncate(file.tell() + nbytes)
    return sum(-(-size // (4 << 20)) for size in sizes)


def run(directory: Path, kind: str, gib: float) -> bool:
    """Push and check out one file; print a line for each; return whether both kept the promise."""
    nbytes = int(gib * (1 << 30)) & ~((1 << 22) - 1)
    source = directory / "source.safetensors"
    cells = write_checkpoint(source, nbytes, random=kind == "random")
    bound = BOUND_NBYTES + BOUND_PER_CELL * cells
    repo = lamella.init(directory / "repository")
    works: list[tuple[str, Callable[[], object]]] = [("push", lambda: repo.push(source, "m@main"))]
    if kind == "random":  # a sparse file comes back full of zeros, which would take its whole length on the disk
        works.append(("checkout", lambda: repo.checkout("m@main", directory / "out")))
    kept = True
    for name, work in works:
        growth = measured(work)
        kept &= growth.nbytes < bound
        print(
            f"{kind:7} {gib:6.1f} GiB {cells:7} cells  {name:9} {growth.seconds:7.1f} s  "
            f"RssAnon +{growth.nbytes / (1 << 20):6.1f} MiB of {bound / (1 << 20):.1f} MiB  {'ok' if kept else 'OVER'}",
            flush=True,
        )
    repo.close()
    return kept


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-gib", type=float, default=4)
    parser.add_argument("--sparse-gib", type=float, default=64)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    kept = True
    for kind, gib in (("random", options.random_gib), ("sparse", options.sparse_gib)):
        directory = Path(tempfile.mkdtemp(dir=options.directory))
        try:
            kept &= run(directory, kind, gib)
        finally:
            shutil.rmtree(directory)
    raise SystemExit(0 if kept else 1)


if __name__ == "__main__":
    main()
