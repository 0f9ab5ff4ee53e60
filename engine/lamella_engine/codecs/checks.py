"""What the encoder and the decoder demand alike: what is a chunk, and that a payload does not lie."""

import numpy as np
from numpy.typing import NDArray

from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.errors import CorruptionError, InvalidInputError
from lamella_engine.model import Buffer

Bytes = NDArray[np.uint8]

_WIDTHS = (1, 2, 4, 8)


def as_bytes(buffer: Buffer | Bytes, *, what: str) -> Bytes:
    """Return the buffer as a 1-d array of bytes without copying."""
    try:
        return np.frombuffer(buffer, np.uint8)
    except (ValueError, BufferError) as error:
        raise InvalidInputError(
            f"{what} is not contiguous memory ({error}): copy it first", kind="not_contiguous"
        ) from None


def is_chunk(nbytes: int, width: int) -> bool:
    """Whether a chunk may be that long, with lanes of that width."""
    return width in _WIDTHS and nbytes % width == 0 and nbytes <= MAX_CELL_NBYTES


def check_chunk(nbytes: int, width: int) -> None:
    """Raise CorruptionError unless a chunk may be that long, with lanes of that width."""
    check(is_chunk(nbytes, width), f"{nbytes} bytes of lanes of {width} are no chunk")


def check(holds: bool, lie: str) -> None:
    """Raise CorruptionError, which says that the payload lies so, unless a rule holds."""
    if not holds:
        raise corrupt(lie)


def corrupt(lie: str) -> CorruptionError:
    """Return the error of a payload that lies."""
    return CorruptionError(f"blob is damaged: {lie}; restore it from another copy", kind="bad_payload")
