"""What the tests of the coders share: the variants of the kernels, lanes to code, a reader and a writer of bits that
know FORMAT.md and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from lamella_engine import _kernels


def variants() -> list[str]:
    """Name the variants that this build and CPU have."""
    found = []
    before = _kernels.isa()
    for isa in ("scalar", "avx2"):
        try:
            _kernels.set_isa(isa)
        except ValueError:
            continue
        found.append(isa)
    _kernels.set_isa(before)
    return found


@contextmanager
def running(isa: str) -> Iterator[None]:
    before = _kernels.isa()
    _kernels.set_isa(isa)
    try:
        yield
    finally:
        _kernels.set_isa(before)


def weights(count: int, dtype: str, *, seed: int = 0) -> np.ndarray:
    """Return floats as lanes: ``bf16``, or a NumPy name."""
    values = np.random.default_rng(seed).standard_normal(count) * 0.05
    if dtype == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "e4m3":
        return (values.astype(np.float16).view(np.uint16) >> 7).astype(np.uint8)
    return values.astype(dtype).view(f"<u{np.dtype(dtype).itemsize}")


class Bits:
    def __init__(self, data: bytes) -> None:
        self.value, self.length, self.at = int.from_bytes(data, "little"), 8 * len(data), 0

    def take(self, count: int) -> int:
        assert self.at + count <= self.length
        found = self.value >> self.at & (1 << count) - 1
        self.at += count
        return found

    def zeros(self) -> int:
        count = 0
        while not self.take(1):
            count += 1
        return count

    def near(self) -> int:
        magnitude = self.zeros()
        return -magnitude if magnitude and self.take(1) else magnitude

    def far(self) -> int:
        k = self.zeros()
        u = 1 << k | self.take(k)
        return (u - 1) // 2 if u % 2 else -(u // 2)

    def table(self, symbols: int) -> list[int]:
        field = (symbols - 1).bit_length()
        last, peak = self.take(field), self.take(field)
        frequencies, lengths = [0] * symbols, [6, 6]
        for symbol in range(last + 1):
            length = 11
            if symbol != peak:
                length = lengths[-2] + self.near()
                if length:
                    kept = min(length - 1, 3)
                    frequencies[symbol] = (1 << kept | self.take(kept)) << (length - 1 - kept)
            lengths.append(length)
        frequencies[peak] = 2048 - sum(frequencies)
        return frequencies


class Writer:
    """Bits by hand."""

    def __init__(self) -> None:
        self.value = self.length = 0

    def put(self, value: int, count: int) -> "Writer":
        self.value |= value << self.length
        self.length += count
        return self

    def near(self, value: int) -> "Writer":
        self.put(1 << abs(value), abs(value) + 1)
        return self.put(value < 0, 1) if value else self

    def bytes(self) -> bytes:
        return self.value.to_bytes((self.length + 7) // 8, "little")
