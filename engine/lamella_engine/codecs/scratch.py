"""What one thread uses again and again: memory that is already mapped, since first touch of fresh memory is slow."""

import threading

import numpy as np

from lamella_engine import _kernels, casts, decays
from lamella_engine.casts import Cast
from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.codecs.checks import Bytes
from lamella_engine.decays import Decay


class _Scratch(threading.local):
    def __init__(self) -> None:
        self._lanes = np.empty(MAX_CELL_NBYTES, np.uint8)
        self._derived = np.empty(0, np.uint8)
        self._folded = np.empty(0, np.uint8)
        self._workspace = np.empty(0, np.uint8)

    def coded(self, nbytes: int) -> Bytes:
        """Return memory for a payload, which the thread's next call of this or of ``planes`` overwrites."""
        return self._lanes[:nbytes]

    def planes(self, width: int, lanes: int) -> Bytes:
        """Return memory for ``width`` planes, which the thread's next call of this or of ``coded`` overwrites."""
        return self._lanes[: width * lanes].reshape(width, lanes)

    def cast(self, cast: Cast, source: Bytes, nbytes: int) -> Bytes:
        """Return what a cast makes of ``source``: ``nbytes``, which the thread's next call of this overwrites."""
        derived = self._derive(nbytes)
        casts.apply(cast, source, derived)
        return derived

    def decay(self, decay: Decay, source: Bytes) -> Bytes:
        """Return what a decay leaves of ``source``, which the thread's next call of this or of ``cast`` overwrites."""
        derived = self._derive(source.size)
        decays.apply(decay, source, derived)
        return derived

    def _derive(self, nbytes: int) -> Bytes:
        if self._derived.size < nbytes:
            self._derived = np.empty(MAX_CELL_NBYTES, np.uint8)
        return self._derived[:nbytes]

    def fold(self, source: Bytes, decayed: Bytes) -> Bytes:
        """Return ``source`` folded, which the thread's next call of this overwrites."""
        if self._folded.size < source.size:
            self._folded = np.empty(MAX_CELL_NBYTES, np.uint8)
        folded = self._folded[: source.size]
        _kernels.decay_fold(source, decayed, folded)
        return folded

    def workspace(self, nbytes: int, width: int) -> Bytes:
        """Return what an entropy coder needs to code a chunk of ``nbytes``, with whatever it last held."""
        needed = _kernels.coder_workspace(nbytes, width)
        if self._workspace.size < needed:
            self._workspace = np.empty(needed, np.uint8)
        return self._workspace


scratch = _Scratch()
