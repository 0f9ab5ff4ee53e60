"""Decays: floats that shrink by one factor and only grow besides, as second moments do. Pure functions.

An optimizer's ``exp_avg_sq`` is, at every step, ``beta2`` times what it was, plus a square: no lane falls below
``beta2 ** steps`` times its base, and how far above that it is takes fewer bits than how far from its base.
``cpp_ext/kernels.hpp`` and FORMAT.md define the bits, which integers alone decide.
"""

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamella_engine import _kernels

Bytes = NDArray[np.uint8]


class Decay(NamedTuple):
    """A factor between 2^-8 and 1."""

    halvings: int
    """0 to 7."""
    factor: int
    """2^31 to 2^32 - 1: the factor times 2^(32 + halvings)."""


WIDTH = 4
"""Bytes of a lane of what decays: optimizers keep their moments in float32."""

LAYOUT = struct.Struct("<BI")
"""How a decay is stored: its fields."""

MOST_HALVINGS = 7

# Lanes that are looked at for the least growth of any; one of as many is below what is left of its base then, and takes
# 30 bits.
_SAMPLED = 1 << 13


def likeliest(base: Bytes, chunk: Bytes) -> Decay | None:
    """Return the decay after which chunk is nowhere below base, judged from some lanes.

    Parameters
    ----------
    base, chunk
        Lanes of float32, as many of each.

    Returns
    -------
    Decay or None
        None if lanes have signs, or do not decay, or by more than a decay can say.
    """
    step = max(1, chunk.size // 4 // _SAMPLED)
    with np.errstate(invalid="ignore"):
        before, after = (np.ascontiguousarray(lanes.view("<f4")[::step]).astype(np.float64) for lanes in (base, chunk))
        if np.signbit(before).any() or np.signbit(after).any():
            return None
        positive = before > np.finfo(np.float32).tiny * 2.0**MOST_HALVINGS
        least = float((after[positive] / before[positive]).min(initial=1.0))
    # NaN compares as false.
    if not 2.0 ** -(MOST_HALVINGS + 1) <= least < 1.0:
        return None
    mantissa, exponent = np.frexp(least)
    return Decay(-int(exponent), int(mantissa * 2.0**32))


def apply(decay: Decay, base: Bytes, out: Bytes) -> None:
    """Write what is left of ``base``."""
    _kernels.decay(base, decay.factor, decay.halvings, out)
