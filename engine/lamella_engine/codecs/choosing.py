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
    long chunk says that it could win. A base or a guide that is wrong costs no more than 16 bytes, for what needs none
    is not judged by a sample beside it.

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
    search = _Search(source, width, floating=floating)
    search.choose(reference, guiding)
    return search.best if search.best.payload else Encoded(Encoding.RAW, source.tobytes())


def _misfit(what: str, actual: int, expected: int) -> InvalidInputError:
    return InvalidInputError(
        f"a {what} of {actual} bytes does not fit a chunk of {expected}: leave it out",
        kind="base_length",
        expected=expected,
        actual=actual,
    )


def is_near_cast(chunk: Buffer, base: Buffer, *, width: int) -> bool:
    """Whether some lanes say that a chunk is, or nearly is, a cast of a base of another width."""
    return casts.likeliest(as_bytes(base, what="base"), as_bytes(chunk, what="chunk"), width) is not None


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

# A sample is 1/128 of a chunk, in 64 runs: rows of a tensor differ more than lanes of a row. Below 2,048 lanes a sample
# is mostly zstd's own headers.
_SAMPLE = 128
_RUNS = 64
_SHORTEST_RUN = 32
# A sample is off by a few per cent, and by its headers too long. The coder usually wins by 10 to 40.
_DOUBT = 0.96
# Bytes that a coder needs for tables and states, whatever it codes.
_CODED_HEADER = 256
# What FLOAT_RANS takes at least if PLANES take more than half of the chunk: five sixths of that, or 2.5 bits a lane
# less, for it saves at exponents alone, with seven tables where PLANES have one. In any case it takes a half. These are
# not proved: the least seen in 4,806 drawn chunks of 8,192 lanes and more was 0.841 and 2.2 bits less, of rows that
# differ by factors of e^20, and 0.604 of integers of few bits.
_MOST_OVER_CODED = 6 / 5
_MOST_SAVED = 2.5 / 8
_MOST_OVER_SHORT = 2


def _most_planes(coded: int, nbytes: int, width: int) -> int:
    """Return what ``PLANES`` take at most, of ``nbytes``, where ``FLOAT_RANS`` takes ``coded``."""
    long = min(_MOST_OVER_CODED * coded, coded + _MOST_SAVED * nbytes / width)
    return int(max(long, min(_MOST_OVER_SHORT * coded, nbytes / 2)))


class _Search:
    """The smallest payload of a chunk so far.

    Parameters
    ----------
    source
        The chunk.
    width, floating
        As for :func:`encode`.
    """

    def __init__(self, source: Bytes, width: int, *, floating: bool) -> None:
        self._source = source
        self._width = width
        self._floating = floating
        lanes = source.size // width
        self._between = lanes // _RUNS
        self._run = max(_SHORTEST_RUN, self._between // _SAMPLE)
        self._sampled = floating and self._between >= 4 * self._run
        self.best = Encoded(Encoding.RAW, b"")
        self.size = source.size

    def choose(self, base: Bytes | None, guide: Bytes | None) -> None:
        """Try every candidate that could be the smallest.

        The likeliest goes first, so that the others are given up early. What has a guide is seldom like its base: first
        moments are new after a few steps.
        """
        coded = self._floating and self._source.size >= _FEWEST_CODED * self._width
        if coded:
            if guide is not None:
                self._try(Encoding.GUIDED_RANS, guide)
            if base is not None:
                if self._width == decays.WIDTH:
                    self._try_if_plausible(Encoding.DECAYED_RANS, base)
                self._try_if_plausible(Encoding.RESIDUAL_RANS, base)
            if self.best.payload:
                self._try_alone()
            else:
                self._try(Encoding.FLOAT_RANS, None)
                self._try_if_plausible(Encoding.PLANES, None)
        if base is not None:
            if self._floating:
                self._try_if_plausible(Encoding.RESIDUAL_PLANES, base)
            self._try_if_plausible(Encoding.XOR_PLANES, base)
        if not coded:
            self._try(Encoding.PLANES, None)

    def _try_alone(self) -> None:
        """Try what needs no base, though a delta has been found: a wrong base must not cost more than a few bytes.

        A sample cannot promise that: it sees neither rows that repeat nor how many of them are zero. But planes that do
        not compress are given up fast; and where even they take too much, ``FLOAT_RANS`` does.
        """
        followed = _most_planes(self.size, self._source.size, self._width) if self._sampled else self.size
        planes = self._payload(Encoding.PLANES, None, limit=followed)
        if planes is not None and len(planes) < self.size:
            self._keep(Encoding.PLANES, planes)
        if planes is not None or not self._sampled:
            self._try(Encoding.FLOAT_RANS, None)

    def _try(self, encoding: Encoding, other: Bytes | None) -> None:
        payload = self._payload(encoding, other, limit=self.size)
        if payload is not None:
            self._keep(encoding, payload)

    def _try_if_plausible(self, encoding: Encoding, other: Bytes | None) -> None:
        if not self.best.payload or not self._sampled or self._is_plausible(encoding, other):
            self._try(encoding, other)

    def _is_plausible(self, encoding: Encoding, other: Bytes | None) -> bool:
        """Whether the payload in an encoding could be the smallest, judged from a sample."""
        sample = self._sample_of(self._source)
        room = int(self.size * sample.size / self._source.size / _DOUBT) + (_CODED_HEADER if encoding in CODED else 0)
        against = None if other is None else self._sample_of(other)
        return payload_of(encoding, sample, against, width=self._width, floating=True, limit=room) is not None

    def _sample_of(self, whole: Bytes) -> Bytes:
        runs = whole[: _RUNS * self._between * self._width].reshape(_RUNS, -1)
        return runs[:, : self._run * self._width].reshape(-1)

    def _payload(self, encoding: Encoding, other: Bytes | None, *, limit: int) -> bytes | None:
        return payload_of(encoding, self._source, other, width=self._width, floating=self._floating, limit=limit)

    def _keep(self, encoding: Encoding, payload: bytes) -> None:
        self.best, self.size = Encoded(encoding, payload), len(payload)
