"""Casts between floats: a chunk that is another chunk in a narrower or a wider type. Pure functions.

Mixed-precision training writes the same weights twice, and people publish what they trained in float32 as bfloat16. The
bits of each cast are those that ``cpp_ext/kernels.hpp`` and FORMAT.md define, on every machine.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from lamella_engine import _kernels

Bytes = NDArray[np.uint8]


class Cast(IntEnum):
    """A conversion of lanes. Stored in payloads: add, never renumber, never reuse."""

    FLOAT32_TO_BFLOAT16 = 0
    FLOAT32_TO_FLOAT16 = 1
    BFLOAT16_TO_FLOAT32 = 2
    FLOAT16_TO_FLOAT32 = 3

    @property
    def source_width(self) -> int:
        """Bytes of a lane before."""
        return 4 if self in (Cast.FLOAT32_TO_BFLOAT16, Cast.FLOAT32_TO_FLOAT16) else 2

    @property
    def width(self) -> int:
        """Bytes of a lane after."""
        return 6 - self.source_width


_KERNELS = {cast: _kernels.Cast[cast.name] for cast in Cast}

# Lanes that are looked at to tell which cast it may be: few, because a wrong guess only costs the time of trying it.
_SAMPLED = 256


def apply(cast: Cast, source: Bytes, out: Bytes) -> None:
    """Convert the lanes of ``source``, of ``cast.source_width``, each to one of ``out``, of ``cast.width``."""
    _kernels.cast(source, _KERNELS[cast], out)


def likeliest(source: Bytes, target: Bytes, width: int) -> Cast | None:
    """Return the cast that brings ``source`` nearest to ``target``, judged from some lanes.

    Parameters
    ----------
    source
        Lanes of 2 or 4 bytes.
    target
        Lanes of ``width`` bytes.

    Returns
    -------
    Cast or None
        None if there are not as many lanes of another width, or if what they hold has nothing to do with each other.
    """
    fitting = [cast for cast in Cast if cast.width == width and source.size * width == target.size * cast.source_width]
    if not fitting or not target.size:
        return None
    step = max(1, target.size // width // _SAMPLED)
    wanted = target.view(f"<u{width}")[::step].astype(np.int64)
    lanes = np.ascontiguousarray(source.view(f"<u{fitting[0].source_width}")[::step])

    def apart(cast: Cast) -> float:
        found = np.empty(lanes.size, f"<u{width}")
        apply(cast, lanes.view(np.uint8), found.view(np.uint8))
        # How many bits the distance between the two has: those of a wrong type differ in their exponents.
        return float(np.log2(np.abs(found.astype(np.int64) - wanted) + 1.0).mean())

    nearest = min(fitting, key=apart)
    return nearest if apart(nearest) < _UNRELATED * width else None


# Bits of the distance for each byte of width. Independent normal weights differ in 11 bits of a bfloat16, 12.5 of a
# float16 and 27 of a float32; a bfloat16 with random low bits below its float32 base in 15 of 32, and one that is 5 %
# larger than its float32 in 3 of 16.
_UNRELATED = 5.0
