"""The encodings: their numbers, and what a payload of each is made against."""

from enum import Enum, IntEnum
from typing import NamedTuple


class Encoding(IntEnum):
    """How a payload is made. Stored with every blob: add, never renumber, never reuse."""

    RAW = 0
    CONSTANT = 1
    PLANES = 2
    XOR_PLANES = 3
    RESIDUAL_PLANES = 4
    RESIDUAL_RANS = 5
    FLOAT_RANS = 6
    GUIDED_RANS = 7
    CAST = 8
    DECAYED_RANS = 9


class Against(Enum):
    """What a payload was made against, and what it is decoded with."""

    NOTHING = "nothing"
    BASE = "base"
    GUIDE = "guide"


class Encoded(NamedTuple):
    """A payload and what it takes to read it."""

    encoding: Encoding
    payload: bytes

    @property
    def against(self) -> Against:
        """Which of the arguments of ``encode`` is the base of ``decode``."""
        if self.encoding is Encoding.GUIDED_RANS:
            return Against.GUIDE
        return Against.BASE if needs_base(self.encoding) else Against.NOTHING


def needs_base(encoding: int) -> bool:
    """Whether a payload of this encoding can only be decoded with its base."""
    return encoding in _NEEDS_BASE


_NEEDS_BASE = frozenset(
    (
        Encoding.XOR_PLANES,
        Encoding.RESIDUAL_PLANES,
        Encoding.RESIDUAL_RANS,
        Encoding.GUIDED_RANS,
        Encoding.CAST,
        Encoding.DECAYED_RANS,
    )
)


def fits(base_nbytes: int, nbytes: int, *, floating: bool) -> bool:
    """Whether a chunk can be encoded against a base of that length: the same, or that of floats of another width."""
    return base_nbytes == nbytes or (floating and 2 * min(base_nbytes, nbytes) == max(base_nbytes, nbytes))


def is_measurable(encoding: int) -> bool:
    """Whether :func:`~lamella_engine.codecs.measure` takes payloads of this encoding."""
    return encoding == Encoding.RESIDUAL_RANS
