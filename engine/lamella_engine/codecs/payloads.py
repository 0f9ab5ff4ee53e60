"""The payload of a chunk in one encoding, which need not be the smallest."""

from lamella_engine import _kernels, decays
from lamella_engine.codecs.checks import Bytes
from lamella_engine.codecs.encodings import Encoding
from lamella_engine.codecs.planes import encode_planes
from lamella_engine.codecs.scratch import scratch

CODED = frozenset((Encoding.DECAYED_RANS, Encoding.RESIDUAL_RANS, Encoding.FLOAT_RANS, Encoding.GUIDED_RANS))
"""Encodings of the entropy coders of floats."""


def payload_of(
    encoding: Encoding, source: Bytes, other: Bytes | None, *, width: int, floating: bool, limit: int
) -> bytes | None:
    """Return the payload of one encoding, or None if it is not shorter than ``limit``."""
    if encoding not in CODED:
        return encode_planes(encoding, source, other, width=width, floating=floating, limit=limit)
    out = scratch.coded(max(limit - 1, 0))
    prefix = b""
    workspace = scratch.workspace(source.size, width)
    if encoding is Encoding.DECAYED_RANS:
        assert other is not None
        decay = decays.likeliest(other, source)
        if decay is None:
            return None
        prefix = decays.LAYOUT.pack(*decay)
        other = scratch.decay(decay, other)
        source = scratch.fold(source, other)
        encoding = Encoding.RESIDUAL_RANS
    if encoding is Encoding.RESIDUAL_RANS:
        assert other is not None
        nbytes = _kernels.residual_encode(source, other, width, workspace, out)
    else:
        nbytes = _kernels.float_encode(source, other, width, workspace, out)
    return prefix + out[:nbytes].tobytes() if nbytes and nbytes + len(prefix) < limit else None
