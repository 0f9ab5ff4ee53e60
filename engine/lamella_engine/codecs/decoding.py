"""Decoding: from a payload, which is trusted in nothing, to a chunk, or to what a chunk measures against another."""

from lamella_engine import _kernels, decays
from lamella_engine.casts import Cast
from lamella_engine.codecs.checks import Bytes, as_bytes, check, check_chunk, corrupt
from lamella_engine.codecs.encodings import Encoding
from lamella_engine.codecs.planes import decode_planes
from lamella_engine.codecs.scratch import scratch
from lamella_engine.decays import Decay
from lamella_engine.dtypes import Dtype
from lamella_engine.errors import InvalidInputError, UnsupportedFormatError
from lamella_engine.model import Buffer
from lamella_engine.moments import Moments, elements

_ENCODINGS = frozenset(Encoding)
_CASTS = frozenset(Cast)


def decode(encoding: int, payload: Buffer, out: Buffer | Bytes, *, width: int, base: Buffer | None = None) -> None:
    """Decode one payload into ``out``.

    Parameters
    ----------
    encoding
        The :class:`Encoding` that the payload was stored with.
    payload
        Trusted in nothing: every length is checked before it is used, and no more memory is taken than ``out`` has.
    out
        Writable, contiguous, exactly as long as the chunk; its content is undefined if this raises.
    width
        Bytes of a lane, as encoded.
    base
        Decoded bytes of the base if :func:`needs_base`, else not looked at.

    Raises
    ------
    CorruptionError
        The payload breaks a rule of FORMAT.md, or its base is missing or of another length, or no chunk is that long
        or has such lanes.
    UnsupportedFormatError
        The encoding is newer than this build.
    InvalidInputError
        ``out`` is read-only or not contiguous.
    """
    target = as_bytes(out, what="out")
    if not target.flags.writeable:
        raise InvalidInputError("out is read-only: pass writable memory", kind="read_only")
    check_chunk(target.size, width)
    stored = as_bytes(payload, what="payload")
    if encoding == Encoding.RAW:
        check(stored.size == target.size, f"raw payload of {stored.size} bytes for a chunk of {target.size}")
        target[:] = stored
        return
    if encoding not in _ENCODINGS:
        raise UnsupportedFormatError(
            f"encoding {encoding} is newer than this lamella: upgrade it", kind="unknown_encoding", encoding=encoding
        )
    check(target.size > 0, "empty chunk that is not stored raw")
    if encoding == Encoding.CONSTANT:
        check(stored.size == width, f"constant payload of {stored.size} bytes for lanes of {width}")
        target.reshape(-1, width)[:] = stored
        return
    if encoding == Encoding.FLOAT_RANS:
        fault = _kernels.float_decode(stored, None, width, scratch.workspace(target.size, width), target)
        check(fault is None, str(fault))
        return
    if encoding == Encoding.PLANES:
        _kernels.merge_planes(decode_planes(stored, width, target.size // width), target)
        return
    reference = None if base is None else as_bytes(base, what="base")
    if encoding == Encoding.CAST:
        stored, reference = _decode_cast(stored, reference, width, target.size)
        if not stored.size:
            target[:] = reference
            return
        encoding = Encoding.RESIDUAL_RANS
    reference = _fitting(reference, target.size)
    if encoding == Encoding.DECAYED_RANS:
        stored, reference = _decode_decay(stored, reference, width)
    if encoding in (Encoding.RESIDUAL_RANS, Encoding.DECAYED_RANS, Encoding.GUIDED_RANS):
        coder = _kernels.float_decode if encoding == Encoding.GUIDED_RANS else _kernels.residual_decode
        fault = coder(stored, reference, width, scratch.workspace(target.size, width), target)
        check(fault is None, str(fault))
        if encoding == Encoding.DECAYED_RANS:
            _kernels.decay_unfold(target, reference, target)
        return
    merge = _kernels.xor_merge if encoding == Encoding.XOR_PLANES else _kernels.residual_merge
    merge(decode_planes(stored, width, target.size // width), reference, target)


def measure(payload: Buffer, other: Buffer, dtype: Dtype, *, width: int, base: Buffer | None) -> Moments:
    """Measure another chunk against the one that a payload stands for: ``moments(other, decoded)``, bit for bit.

    The chunk is measured while it is decoded, a few KiB at a time; blocks that equal the base not even that, if the
    other chunk is the base.

    Parameters
    ----------
    payload
        Of an encoding that :func:`is_measurable`; trusted in nothing, as by :func:`decode`.
    other
        Decoded bytes as long as the chunk, whole elements of ``dtype``; ``base`` itself is fastest.
    width, base
        As for :func:`decode`.

    Raises
    ------
    CorruptionError
        As :func:`decode`.
    InvalidInputError
        ``other`` is not whole elements, or the dtype is opaque.
    """
    left = as_bytes(other, what="other")
    kind, table = elements(dtype, left.size)
    check_chunk(left.size, width)
    check(left.size > 0, "empty chunk that is not stored raw")
    reference = _fitting(None if base is None else as_bytes(base, what="base"), left.size)
    stored = as_bytes(payload, what="payload")
    workspace = scratch.workspace(left.size, width)
    found = _kernels.residual_moments(left, stored, reference, width, workspace, kind, table)
    if isinstance(found, str):
        raise corrupt(found)
    return Moments.of_kernel(found)


def _fitting(base: Bytes | None, nbytes: int) -> Bytes:
    """Return the base of a delta that is ``nbytes`` long decoded, which has to be as long."""
    if base is None or base.size != nbytes:
        found = "no base" if base is None else f"a base of {base.size} bytes"
        raise corrupt(f"delta of {nbytes} bytes with {found}")
    return base


def _decode_cast(payload: Bytes, base: Bytes | None, width: int, nbytes: int) -> tuple[Bytes, Bytes]:
    """Return the rest of a payload of ``CAST``, and what the cast makes of the base, in this thread's scratch."""
    check(payload.size > 0, "empty payload of a cast")
    number = int(payload[0])
    if number not in _CASTS:
        raise UnsupportedFormatError(
            f"cast {number} is newer than this lamella: upgrade it", kind="unknown_encoding", encoding=number
        )
    cast = Cast(number)
    check(width == cast.width, f"cast to lanes of {cast.width} bytes for lanes of {width}")
    found = "no base" if base is None else f"a base of {base.size} bytes"
    if base is None or base.size * cast.width != nbytes * cast.source_width:
        raise corrupt(f"cast to {nbytes} bytes with {found}")
    return payload[1:], scratch.cast(cast, base, nbytes)


def _decode_decay(payload: Bytes, base: Bytes, width: int) -> tuple[Bytes, Bytes]:
    """Return the rest of a payload of ``DECAYED_RANS``, and what its decay leaves of the base, in scratch."""
    check(width == decays.WIDTH, f"decay of lanes of {width} bytes")
    check(payload.size >= decays.LAYOUT.size, "payload that ends within its decay")
    decay = Decay(*decays.LAYOUT.unpack_from(payload.data))
    possible = decay.halvings <= decays.MOST_HALVINGS and decay.factor >= 1 << 31
    check(possible, f"decay by {decay.factor} and {decay.halvings} halvings")
    return payload[decays.LAYOUT.size :], scratch.decay(decay, base)
