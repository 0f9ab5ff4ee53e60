"""The coders that ``codec`` compares, each run by whichever Python has it, in a process of its own.

    python -m benchmarks.coders JOB     takes commands from standard input, answers each with a line of JSON

It begins with the version of the coder, or null if that is not installed. ``check`` codes all of the job once, compares
what comes back, and answers with the bytes stored of each run. ``encode N``, ``decode N`` and ``copy N`` do all of it
once more on N threads, 1 or 2, and answer with ``Seconds``; only lamella's codec may be used by two threads at once.
Only NumPy is imported before a coder is asked for.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

_Bytes = NDArray[np.uint8]

_RING_NBYTES = 64 << 20  # written in a circle: more than any cache holds, and mapped from the start
_THREADS = 2
_ZSTD_LEVEL = 3
_PCODEC_LEVEL = 8


@dataclass(frozen=True, slots=True)
class Job:
    """What a process codes: runs of bytes."""

    coder: str
    folder: str
    """Where they lie, in the files ``child`` and ``base``."""
    dtype: str
    """Lamella's name of a floating dtype."""
    width: int
    """Bytes of a value."""
    runs: Sequence[tuple[int, int]]
    """First and one past the last byte of each, in both files."""
    guides: Sequence[int | None]
    """Of runs of first moments, the first byte of their second moments in ``child``."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """What one pass over the job took."""

    wall: float
    cpu: float
    """Of all threads together."""


class Coder:
    """Turns a run of values into something that is stored, and back."""

    package: ClassVar[str]
    """The Python package that it comes from."""
    whole_tensors: ClassVar[bool] = False
    """Whether its runs end where tensors do; others get all tensors in a row, in runs of the same length."""

    def __init__(self, job: Job) -> None:
        self.dtype = job.dtype
        self.width = job.width

    def encode(self, child: _Bytes, base: _Bytes, guide: _Bytes | None) -> Any:
        """Return what is stored of a run. ``guide``, as long as the run, is what an optimizer keeps beside it."""
        raise NotImplementedError

    def decode(self, stored: Any, base: _Bytes, guide: _Bytes | None, out: _Bytes) -> None:
        """Write the run to ``out``."""
        raise NotImplementedError

    def nbytes(self, stored: Any) -> int:
        """Return how long it is, all that decoding needs included."""
        return len(stored)


class Zstd(Coder):
    """``zstd -3``, without a base."""

    package = "zstandard"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        zstandard = import_module("zstandard")
        self._compress = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress
        self._decompress = zstandard.ZstdDecompressor().decompress

    def encode(self, child: _Bytes, base: _Bytes, guide: _Bytes | None) -> Any:
        return self._compress(child)

    def decode(self, stored: Any, base: _Bytes, guide: _Bytes | None, out: _Bytes) -> None:
        out[:] = np.frombuffer(self._decompress(stored), np.uint8)


class Planes(Zstd):
    """Byte planes, each ``zstd -3``, without a base."""

    def encode(self, child: _Bytes, base: _Bytes, guide: _Bytes | None) -> Any:
        return [self._compress(plane) for plane in np.ascontiguousarray(child.reshape(-1, self.width).T)]

    def decode(self, stored: Any, base: _Bytes, guide: _Bytes | None, out: _Bytes) -> None:
        for number, frame in enumerate(stored):
            out[number :: self.width] = np.frombuffer(self._decompress(frame), np.uint8)

    def nbytes(self, stored: Any) -> int:
        return sum(4 + len(frame) for frame in stored)


class BitX(Planes):
    """As ZipLLM publishes it: XOR with the base, byte planes, each ``zstd -3``."""

    def encode(self, child: _Bytes, base: _Bytes, guide: _Bytes | None) -> Any:
        return super().encode(child ^ base, base, guide)

    def decode(self, stored: Any, base: _Bytes, guide: _Bytes | None, out: _Bytes) -> None:
        super().decode(stored, base, guide, out)
        out ^= base


class ZipNN(Coder):
    """ZipNN, told the dtype, without a base. It overwrites what it compresses, so that is a copy."""

    package = "zipnn"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._codec = import_module("zipnn").ZipNN(bytearray_dtype=self.dtype, threads=1)

    def encode(self, child: _Bytes, base: _Bytes, guide: _Bytes | None) -> Any:
        return self._codec.compress(bytearray(child))

    def decode(self, stored: Any, base: _Bytes, guide: _Bytes | None, out: _Bytes) -> None:
        out[:] = np.frombuffer(self._codec.decompress(stored), np.uint8)


class Pcodec(Coder):
    """pcodec at level 8 on the difference from the base, in integers that order as the floats do."""

    package = "pcodec"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        pcodec, self._standalone = import_module("pcodec"), import_module("pcodec.standalone")
        self._configuration = pcodec.ChunkConfig(compression_level=_PCODEC_LEVEL)
        self._integers = np.dtype(f"<i{self.width}")

    def encode(self, child: _Bytes, base: _Bytes, guide: _Bytes | None) -> Any:
        return self._standalone.simple_compress(self._ordered(child) - self._ordered(base), self._configuration)

    def decode(self, stored: Any, base: _Bytes, guide: _Bytes | None, out: _Bytes) -> None:
        values = out.view(self._integers)
        self._standalone.simple_decompress_into(stored, values)
        values += self._ordered(base)
        values[:] = self._ordered(out)

    def _ordered(self, floats: _Bytes) -> NDArray[Any]:
        """Return the bits, all below the sign flipped where that is set; which undoes itself."""
        bits = floats.view(self._integers)
        flipped: NDArray[Any] = bits ^ ((bits >> (8 * self.width - 1)) & np.iinfo(self._integers).max)
        return flipped


class Lamella(Coder):
    """Lamella's codec."""

    package = "lamella"
    whole_tensors = True

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._codecs = import_module("lamella_engine.codecs")

    def encode(self, child: _Bytes, base: _Bytes | None, guide: _Bytes | None) -> Any:
        return self._codecs.encode(child, width=self.width, floating=True, base=base, guide=guide)

    def decode(self, stored: Any, base: _Bytes, guide: _Bytes | None, out: _Bytes) -> None:
        against = guide if stored.against is self._codecs.Against.GUIDE else base
        self._codecs.decode(stored.encoding, stored.payload, out, width=self.width, base=against)

    def nbytes(self, stored: Any) -> int:
        return len(stored.payload)


class LamellaAlone(Lamella):
    """Lamella's codec without a base."""

    def encode(self, child: _Bytes, base: _Bytes | None, guide: _Bytes | None) -> Any:
        return super().encode(child, None, None)


CODERS: Mapping[str, type[Coder]] = {
    "zstd-3": Zstd,
    "planes + zstd-3": Planes,
    "ZipNN": ZipNN,
    "lamella alone": LamellaAlone,
    "BitX": BitX,
    "pcodec of delta": Pcodec,
    "lamella": Lamella,
}


class Bench:
    """A job in memory, and what a coder made of it."""

    def __init__(self, job: Job, coder: Coder) -> None:
        self._coder = coder
        child, base = (np.fromfile(Path(job.folder, name), np.uint8) for name in ("child", "base"))
        self._runs = [
            (child[start:stop], base[start:stop], None if guide is None else child[guide : guide + stop - start])
            for (start, stop), guide in zip(job.runs, job.guides, strict=True)
        ]
        self._stored: list[Any] = [None] * len(self._runs)
        self._ring = np.zeros(_RING_NBYTES, np.uint8)
        self._outs = list(self._places())
        self._pool = ThreadPoolExecutor(_THREADS)  # kept: a thread's own memory is warm from its second pass on

    def answer(self, command: str) -> Any:
        """Do what a line says."""
        if command == "check":
            return self._check()
        name, threads = command.split()
        steps = {"encode": self._encode, "decode": self._decode, "copy": self._copy}
        return asdict(self._timed(steps[name], int(threads)))

    def _places(self) -> Iterator[_Bytes]:
        at = 0
        for child, _, _ in self._runs:
            at = 0 if at + child.size > self._ring.size else at
            yield self._ring[at : at + child.size]
            at += -(-child.size // 64) * 64

    def _check(self) -> list[int]:
        for number, (child, _, _) in enumerate(self._runs):
            self._encode(number)
            self._outs[number].fill(0xA5)
            self._decode(number)
            if not np.array_equal(self._outs[number], child):
                raise ValueError(f"run {number} did not come back")
        return [self._coder.nbytes(stored) for stored in self._stored]

    def _encode(self, number: int) -> None:
        self._stored[number] = self._coder.encode(*self._runs[number])

    def _decode(self, number: int) -> None:
        _, base, guide = self._runs[number]
        self._coder.decode(self._stored[number], base, guide, self._outs[number])

    def _copy(self, number: int) -> None:
        self._outs[number][:] = self._runs[number][0]

    def _timed(self, step: Callable[[int], None], threads: int) -> Seconds:
        each = map if threads == 1 else self._pool.map
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in each(step, range(len(self._runs))):
            pass
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def main() -> None:
    """Do the job whose path is the only argument, command by command."""
    fields: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job = Job(**fields)
    try:
        coder = CODERS[job.coder](job)
    except ModuleNotFoundError:
        _say(None)
        return
    _say(package_version(coder.package))
    bench = Bench(job, coder)
    for line in sys.stdin:
        _say(bench.answer(line.strip()))


def _say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
