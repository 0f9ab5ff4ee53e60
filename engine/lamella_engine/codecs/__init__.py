"""How a chunk becomes a blob's payload and back, or is measured on the way back. Pure functions.

A payload is of one of the encodings below. All integers are little-endian; a *lane* is one machine number of ``width``
bytes, a chunk is L lanes, and plane p of a sequence of lanes is the L bytes p of each (p = 0 is the least significant).

======================  ==  ============================================================================================
``RAW``                 0   the chunk's bytes; the only encoding of an empty chunk
``CONSTANT``            1   one lane; the chunk is that lane, L times
``PLANES``              2   the planes of the chunk
``XOR_PLANES``          3   the planes of chunk ^ base
``RESIDUAL_PLANES``     4   the planes of residual(chunk, base), lane by lane
``RESIDUAL_RANS``       5   residual(chunk, base), entropy-coded: ``cpp_ext/rans.hpp``, and FORMAT.md bit for bit
``FLOAT_RANS``          6   the chunk's floats, their highest bits entropy-coded: ``cpp_ext/floats.hpp``, and FORMAT.md
``GUIDED_RANS``         7   the same, with the lanes of the base, then called guide, as contexts
``CAST``                8   the number of a cast of the base, one byte: alone if the chunk is that cast, else before a
                            ``RESIDUAL_RANS`` payload against it
``DECAYED_RANS``        9   a decay of the base, and residual(chunk, what it leaves of the base) without signs, coded as
                            ``RESIDUAL_RANS``
======================  ==  ============================================================================================

Planes follow one another in order, ``width`` of them, with nothing before, between or after. Each is

==========  =====  =====================================================================================================
form        1      0 stored, 1 zstd, 2 constant
length      4      bytes that follow: L if stored, less than L if zstd, 1 if constant
bytes       ...    the plane; or one zstd frame of it; or the byte that it repeats
==========  =====  =====================================================================================================

A zstd frame (RFC 8878) here states its content size, which is L, and as window the same; it has neither checksum nor
dictionary (the blob's digest covers it, the chunk's id vouches for the result), and ends where the plane does.

``residual(x, base)`` for lanes of W bits, mod 2^W: let o(u) be u with all bits below the sign bit flipped if the sign
bit is set, which orders floats as integers do and is a bijection, NaN and -0.0 included. Let d = o(x) - o(base),
negated if the sign bit of ``base`` is set. The residual is 2d if d >= 0 as two's complement, else -2d - 1.

Where it stands, each line importing only from those below its own:

    choosing            encode: which encoding is the smallest
    payloads  decoding  the payload of one encoding; decode, and measure on the way
    planes              byte planes and their zstd frames
    scratch             memory that a thread uses again
    encodings  checks   their numbers, and what each is made against; what is a chunk, and what is a lie
"""

from lamella_engine.codecs.choosing import encode, is_near_cast
from lamella_engine.codecs.decoding import decode, measure
from lamella_engine.codecs.encodings import Against, Encoded, Encoding, fits, is_measurable, needs_base

__all__ = [
    "Against",
    "Encoded",
    "Encoding",
    "decode",
    "encode",
    "fits",
    "is_measurable",
    "is_near_cast",
    "measure",
    "needs_base",
]
