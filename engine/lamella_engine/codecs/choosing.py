"""Encoding: the smallest of the payloads that a chunk may have."""

import numpy as np

from lamella_engine import _kernels, casts, decays
from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.codecs.checks import Bytes, as_bytes, is_chunk
from lamella_engine.codecs.encodings import Encoded, Encoding, fits
from lamella_engine.codecs.payloads import CODED, payload_of
from lamella_engine.codecs.scratch import scratch
from lamella_engine.errors import InvalidInputError
from lamella_engine.model import Buffer


def encode(
    chunk: Buffer, *, width: int, floating: bool, base: Buffer | None = None, guide: Buffer | None = None
) -> Encoded:
    """Encode a chunk as the smallest of its candidates.

    Candidates are ``RAW``, ``CONSTANT`` and ``PLANES``; with a base also ``XOR_PLANES`` and, for floats,
    ``RESIDUAL_PLANES``. From 128 lanes on, floats have ``FLOAT_RANS``, with a base ``RESIDUAL_RANS``, and with a guide
    ``GUIDED_RANS``. Each plane is stored in its smallest form. What is likely to lose is only tried if a sample of a
    long chunk says that it could win.

    Parameters
    ----------
    chunk
        At most 4 MiB, whole lanes, contiguous.
    width
        Bytes of a lane: 1, 2, 4 or 8.
    floating
        Whether lanes are floats (``Dtype.floating``).
    base
        Decoded bytes of another chunk of as many lanes, expected to be like this one: of lanes as long, or of floats
        half or twice as long, of which it may be a cast.
    guide
        Decoded bytes of another chunk of the same length, whose lanes say how large those of this one are: of the
        second moments of an optimizer, whose first moments this holds.

    Raises
    ------
    InvalidInputError
        A length or the width breaks these rules.
    """
    source = as_bytes(chunk, what="chunk")
    if not is_chunk(source.size, width):
        raise InvalidInputError(
            f"{source.size} bytes are no chunk: a chunk is whole lanes of 1, 2, 4 or 8 bytes (here {width}), at most"
            f" {MAX_CELL_NBYTES} bytes in all",
            kind="not_a_chunk",
            nbytes=source.size,
            width=width,
        )
    reference = None if base is None else as_bytes(base, what="base")
    if reference is not None and not fits(reference.size, source.size, floating=floating):
        raise _misfit("base", reference.size, source.size)
    guiding = None if guide is None else as_bytes(guide, what="guide")
    if guiding is not None and guiding.size != source.size:
        raise _misfit("guide", guiding.size, source.size)
    if reference is not None and reference.size != source.size:
        return _encode_cast(source, reference, width=width)
    if source.size and _kernels.is_constant(source, width):
        return Encoded(Encoding.CONSTANT, source[:width].tobytes())
    # The likeliest winner goes first, so that the others are given up early. What has a guide is seldom like its base:
    # first moments are new after a few steps.
    against: list[tuple[Encoding, Bytes | None]] = []
    if floating and source.size >= _FEWEST_CODED * width:
        if guiding is not None:
            against.append((Encoding.GUIDED_RANS, guiding))
        if reference is not None:
            if width == decays.WIDTH:
                against.append((Encoding.DECAYED_RANS, reference))
            against.append((Encoding.RESIDUAL_RANS, reference))
        against.append((Encoding.FLOAT_RANS, None))
    if reference is not None:
        if floating:
            against.append((Encoding.RESIDUAL_PLANES, reference))
        against.append((Encoding.XOR_PLANES, reference))
    against.append((Encoding.PLANES, None))
    best, size = Encoded(Encoding.RAW, b""), source.size
    for encoding, other in against:
        if best.payload and floating and not _plausible(encoding, source, other, width=width, limit=size):
            continue
        payload = payload_of(encoding, source, other, width=width, floating=floating, limit=size)
        if payload is not None:
            best, size = Encoded(encoding, payload), len(payload)
    return best if best.payload else Encoded(Encoding.RAW, source.tobytes())


def _misfit(what: str, actual: int, expected: int) -> InvalidInputError:
    return InvalidInputError(
        f"a {what} of {actual} bytes does not fit a chunk of {expected}: leave it out",
        kind="base_length",
        expected=expected,
        actual=actual,
    )


def _encode_cast(source: Bytes, base: Bytes, *, width: int) -> Encoded:
    """Encode floats against a base of another width, if one is near a cast of the other."""
    cast = casts.likeliest(base, source, width)
    if cast is None:
        return encode(source.data, width=width, floating=True)
    reference = scratch.cast(cast, base, source.size)
    number = bytes([cast])
    if np.array_equal(source, reference):
        return Encoded(Encoding.CAST, number)
    payload = None
    if source.size >= _FEWEST_CODED * width:
        payload = payload_of(Encoding.RESIDUAL_RANS, source, reference, width=width, floating=True, limit=source.size)
    alone = encode(source.data, width=width, floating=True)
    if payload is not None and len(number) + len(payload) < len(alone.payload):
        return Encoded(Encoding.CAST, number + payload)
    return alone


# Lanes of one block. What the coder could save on fewer of them a blob's row in its pack takes three times over.
_FEWEST_CODED = 128

# A sample is 1/128 of a chunk, so that three of them cost a twentieth of what the coder does, in 64 runs: rows of a
# tensor differ more than lanes of a row. Below 2,048 lanes a sample is mostly zstd's own headers.
_SAMPLE = 128
_RUNS = 64
_SHORTEST_RUN = 32
# A sample is off by a few per cent, and by its headers too long. The coder usually wins by 10 to 40.
_DOUBT = 0.96
# Bytes that a coder needs for tables and states, whatever it codes.
_CODED_HEADER = 256


def _plausible(encoding: Encoding, source: Bytes, other: Bytes | None, *, width: int, limit: int) -> bool:
    """Whether the payload of floats in an encoding could be shorter than ``limit``, judged from a sample."""
    lanes = source.size // width
    between = lanes // _RUNS
    run = max(_SHORTEST_RUN, between // _SAMPLE)
    if between < 4 * run:
        return True
    sample, sampled_other = (
        None if whole is None else whole[: _RUNS * between * width].reshape(_RUNS, -1)[:, : run * width].reshape(-1)
        for whole in (source, other)
    )
    assert sample is not None
    room = int(limit * sample.size / source.size / _DOUBT) + (_CODED_HEADER if encoding in CODED else 0)
    return payload_of(encoding, sample, sampled_other, width=width, floating=True, limit=room) is not None
