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
"""

import struct
import threading
from collections.abc import Sequence
from enum import Enum, IntEnum
from typing import NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from lamella_engine import _kernels, casts, decays
from lamella_engine.casts import Cast
from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.decays import Decay
from lamella_engine.dtypes import Dtype
from lamella_engine.errors import CorruptionError, InvalidInputError, UnsupportedFormatError
from lamella_engine.model import Buffer
from lamella_engine.moments import Moments, elements

_Bytes = NDArray[np.uint8]


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


_ENCODINGS = frozenset(Encoding)
_CASTS = frozenset(Cast)


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
        """Which of the arguments of :func:`encode` is the base of :func:`decode`."""
        if self.encoding is Encoding.GUIDED_RANS:
            return Against.GUIDE
        return Against.BASE if needs_base(self.encoding) else Against.NOTHING


class _Form(IntEnum):
    """How one plane is stored: append only, like :class:`Encoding`."""

    STORED = 0
    ZSTD = 1
    CONSTANT = 2


_PLANE_HEADER = struct.Struct("<BI")
_WIDTHS = (1, 2, 4, 8)


def _compressor(level: int, **choices: int) -> zstandard.ZstdCompressor:
    # With a window that holds any chunk, zstd writes single-segment frames, whose window is the content: a reader then
    # decompresses straight into its buffer instead of through a window of its own.
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(
            level,
            window_log=MAX_CELL_NBYTES.bit_length() - 1,
            write_content_size=True,
            write_checksum=False,
            write_dict_id=False,
            **choices,
        )
    )


class _Worker(threading.local):
    """What one thread reuses: zstd contexts, which two threads may not share, and memory that is already mapped."""

    def __init__(self) -> None:
        # Bytes of floats repeat by chance, and a match found by chance costs more than the literals it replaces. With
        # the longest minimal match and the smallest hash table zstd finds runs and otherwise codes by Huffman.
        # all-MiniLM-L6-v2 on one core, bits per byte and encode / decode GB/s:
        #                              these choices        level 1              level 3
        #   exponents                  2.74 0.93 / 2.25     2.95 0.33 / 1.22     3.35 0.16 / 0.80
        #   low bf16 residuals         1.60 0.69 / 1.97     1.75 0.49 / 1.72     1.85 0.29 / 1.47
        # Planes that do not compress are given up at 4 GB/s, sooner than a histogram would tell.
        self.floats = _compressor(1, min_match=7, hash_log=6)
        # Integers and files repeat by design.
        self.others = _compressor(3)
        self.decompressor = zstandard.ZstdDecompressor()
        self.scratch = np.empty(MAX_CELL_NBYTES, np.uint8)
        self._derived = np.empty(0, np.uint8)
        self._folded = np.empty(0, np.uint8)
        self._workspace = np.empty(0, np.uint8)

    def planes(self, width: int, lanes: int) -> NDArray[np.uint8]:
        """Return memory for ``width`` planes, which the thread's next call of this overwrites."""
        return self.scratch[: width * lanes].reshape(width, lanes)

    def cast(self, cast: Cast, source: _Bytes, nbytes: int) -> _Bytes:
        """Return what a cast makes of ``source``: ``nbytes``, which the thread's next call of this overwrites."""
        derived = self._derive(nbytes)
        casts.apply(cast, source, derived)
        return derived

    def decay(self, decay: Decay, source: _Bytes) -> _Bytes:
        """Return what a decay leaves of ``source``, which the thread's next call of this or of ``cast`` overwrites."""
        derived = self._derive(source.size)
        decays.apply(decay, source, derived)
        return derived

    def _derive(self, nbytes: int) -> _Bytes:
        if self._derived.size < nbytes:
            self._derived = np.empty(MAX_CELL_NBYTES, np.uint8)
        return self._derived[:nbytes]

    def fold(self, source: _Bytes, decayed: _Bytes) -> _Bytes:
        """Return ``source`` folded, which the thread's next call of this overwrites."""
        if self._folded.size < source.size:
            self._folded = np.empty(MAX_CELL_NBYTES, np.uint8)
        folded = self._folded[: source.size]
        _kernels.decay_fold(source, decayed, folded)
        return folded

    def workspace(self, nbytes: int, width: int) -> NDArray[np.uint8]:
        """Return what the residual coder needs to code a chunk of ``nbytes``, with whatever it last held."""
        needed = _kernels.coder_workspace(nbytes, width)
        if self._workspace.size < needed:
            self._workspace = np.empty(needed, np.uint8)
        return self._workspace


_worker = _Worker()


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
    source = _bytes(chunk, what="chunk")
    if not _is_chunk(source.size, width):
        raise InvalidInputError(
            f"{source.size} bytes are no chunk: a chunk is whole lanes of 1, 2, 4 or 8 bytes (here {width}), at most"
            f" {MAX_CELL_NBYTES} bytes in all",
            kind="not_a_chunk",
            nbytes=source.size,
            width=width,
        )
    reference = None if base is None else _bytes(base, what="base")
    if reference is not None and not fits(reference.size, source.size, floating=floating):
        raise _misfit("base", reference.size, source.size)
    guiding = None if guide is None else _bytes(guide, what="guide")
    if guiding is not None and guiding.size != source.size:
        raise _misfit("guide", guiding.size, source.size)
    if reference is not None and reference.size != source.size:
        return _encode_cast(source, reference, width=width)
    if source.size and _kernels.is_constant(source, width):
        return Encoded(Encoding.CONSTANT, source[:width].tobytes())
    # The likeliest winner goes first, so that the others are given up early. What has a guide is seldom like its base:
    # first moments are new after a few steps.
    against: list[tuple[Encoding, _Bytes | None]] = []
    if floating and source.size >= _FEWEST_CODED * width:
        if guiding is not None:
            against.append((Encoding.GUIDED_RANS, guiding))
        if reference is not None:
            if width == _DECAYING_WIDTH:
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
        payload = _encode_as(encoding, source, other, width=width, floating=floating, limit=size)
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


def _encode_cast(source: _Bytes, base: _Bytes, *, width: int) -> Encoded:
    """Encode floats against a base of another width, if one is near a cast of the other."""
    cast = casts.likeliest(base, source, width)
    if cast is None:
        return encode(source.data, width=width, floating=True)
    reference = _worker.cast(cast, base, source.size)
    number = bytes([cast])
    if np.array_equal(source, reference):
        return Encoded(Encoding.CAST, number)
    payload = None
    if source.size >= _FEWEST_CODED * width:
        payload = _encode_as(Encoding.RESIDUAL_RANS, source, reference, width=width, floating=True, limit=source.size)
    alone = encode(source.data, width=width, floating=True)
    if payload is not None and len(number) + len(payload) < len(alone.payload):
        return Encoded(Encoding.CAST, number + payload)
    return alone


def _encode_as(
    encoding: Encoding, source: _Bytes, other: _Bytes | None, *, width: int, floating: bool, limit: int
) -> bytes | None:
    """Return the payload of one encoding, or None if it is not shorter than ``limit``."""
    if encoding not in _CODED:
        return _encode_planes(encoding, source, other, width=width, floating=floating, limit=limit)
    out = _worker.scratch[: max(limit - 1, 0)]
    prefix = b""
    workspace = _worker.workspace(source.size, width)
    if encoding is Encoding.DECAYED_RANS:
        assert other is not None
        decay = decays.likeliest(other, source)
        if decay is None:
            return None
        prefix = decays.LAYOUT.pack(*decay)
        other = _worker.decay(decay, other)
        source = _worker.fold(source, other)
        encoding = Encoding.RESIDUAL_RANS
    if encoding is Encoding.RESIDUAL_RANS:
        assert other is not None
        nbytes = _kernels.residual_encode(source, other, width, workspace, out)
    else:
        nbytes = _kernels.float_encode(source, other, width, workspace, out)
    return prefix + out[:nbytes].tobytes() if nbytes and nbytes + len(prefix) < limit else None


# Lanes of what decays: optimizers keep their moments in float32.
_DECAYING_WIDTH = 4
_CODED = frozenset((Encoding.DECAYED_RANS, Encoding.RESIDUAL_RANS, Encoding.FLOAT_RANS, Encoding.GUIDED_RANS))

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


def _plausible(encoding: Encoding, source: _Bytes, other: _Bytes | None, *, width: int, limit: int) -> bool:
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
    room = int(limit * sample.size / source.size / _DOUBT) + (_CODED_HEADER if encoding in _CODED else 0)
    return _encode_as(encoding, sample, sampled_other, width=width, floating=True, limit=room) is not None


def _encode_planes(
    encoding: Encoding, source: _Bytes, base: _Bytes | None, *, width: int, floating: bool, limit: int
) -> bytes | None:
    """Return the payload of one planes encoding, or None as soon as it cannot be shorter than ``limit``."""
    length = source.size // width
    planes = _worker.planes(width, length)
    if base is None or encoding is Encoding.PLANES:
        _kernels.split_planes(source, planes)
    elif encoding is Encoding.XOR_PLANES:
        _kernels.xor_split(source, base, planes)
    else:
        _kernels.residual_split(source, base, planes)
    compressor = _worker.floats if floating else _worker.others
    parts: list[bytes | memoryview] = []
    size = width * _PLANE_HEADER.size
    for plane in planes:
        if size >= limit:
            return None
        form: _Form = _Form.STORED
        stored: bytes | memoryview = plane.data
        if _kernels.is_constant(plane, 1):
            form, stored = _Form.CONSTANT, stored[:1]
        elif len(frame := compressor.compress(stored)) < length:
            form, stored = _Form.ZSTD, frame
        parts += (_PLANE_HEADER.pack(form, len(stored)), stored)
        size += len(stored)
    return b"".join(parts) if size < limit else None


def decode(encoding: int, payload: Buffer, out: Buffer | _Bytes, *, width: int, base: Buffer | None = None) -> None:
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
    target = _bytes(out, what="out")
    if not target.flags.writeable:
        raise InvalidInputError("out is read-only: pass writable memory", kind="read_only")
    _check_chunk(target.size, width)
    stored = _bytes(payload, what="payload")
    if encoding == Encoding.RAW:
        _check(stored.size == target.size, f"raw payload of {stored.size} bytes for a chunk of {target.size}")
        target[:] = stored
        return
    if encoding not in _ENCODINGS:
        raise UnsupportedFormatError(
            f"encoding {encoding} is newer than this lamella: upgrade it", kind="unknown_encoding", encoding=encoding
        )
    _check(target.size > 0, "empty chunk that is not stored raw")
    if encoding == Encoding.CONSTANT:
        _check(stored.size == width, f"constant payload of {stored.size} bytes for lanes of {width}")
        target.reshape(-1, width)[:] = stored
        return
    if encoding == Encoding.FLOAT_RANS:
        fault = _kernels.float_decode(stored, None, width, _worker.workspace(target.size, width), target)
        _check(fault is None, str(fault))
        return
    if encoding == Encoding.PLANES:
        _kernels.merge_planes(_decode_planes(stored, width, target.size // width), target)
        return
    reference = None if base is None else _bytes(base, what="base")
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
        fault = coder(stored, reference, width, _worker.workspace(target.size, width), target)
        _check(fault is None, str(fault))
        if encoding == Encoding.DECAYED_RANS:
            _kernels.decay_unfold(target, reference, target)
        return
    merge = _kernels.xor_merge if encoding == Encoding.XOR_PLANES else _kernels.residual_merge
    merge(_decode_planes(stored, width, target.size // width), reference, target)


def is_measurable(encoding: int) -> bool:
    """Whether :func:`measure` takes payloads of this encoding."""
    return encoding == Encoding.RESIDUAL_RANS


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
    left = _bytes(other, what="other")
    kind, table = elements(dtype, left.size)
    _check_chunk(left.size, width)
    _check(left.size > 0, "empty chunk that is not stored raw")
    reference = _fitting(None if base is None else _bytes(base, what="base"), left.size)
    stored = _bytes(payload, what="payload")
    workspace = _worker.workspace(left.size, width)
    found = _kernels.residual_moments(left, stored, reference, width, workspace, kind, table)
    if isinstance(found, str):
        raise _corrupt(found)
    return Moments.of_kernel(found)


def _fitting(base: _Bytes | None, nbytes: int) -> _Bytes:
    """Return the base of a delta that is ``nbytes`` long decoded, which has to be as long."""
    if base is None or base.size != nbytes:
        found = "no base" if base is None else f"a base of {base.size} bytes"
        raise _corrupt(f"delta of {nbytes} bytes with {found}")
    return base


def _decode_cast(payload: _Bytes, base: _Bytes | None, width: int, nbytes: int) -> tuple[_Bytes, _Bytes]:
    """Return the rest of a payload of ``CAST``, and what the cast makes of the base, in this thread's scratch."""
    _check(payload.size > 0, "empty payload of a cast")
    number = int(payload[0])
    if number not in _CASTS:
        raise UnsupportedFormatError(
            f"cast {number} is newer than this lamella: upgrade it", kind="unknown_encoding", encoding=number
        )
    cast = Cast(number)
    _check(width == cast.width, f"cast to lanes of {cast.width} bytes for lanes of {width}")
    found = "no base" if base is None else f"a base of {base.size} bytes"
    if base is None or base.size * cast.width != nbytes * cast.source_width:
        raise _corrupt(f"cast to {nbytes} bytes with {found}")
    return payload[1:], _worker.cast(cast, base, nbytes)


def _decode_decay(payload: _Bytes, base: _Bytes, width: int) -> tuple[_Bytes, _Bytes]:
    """Return the rest of a payload of ``DECAYED_RANS``, and what its decay leaves of the base, in scratch."""
    _check(width == _DECAYING_WIDTH, f"decay of lanes of {width} bytes")
    _check(payload.size >= decays.LAYOUT.size, "payload that ends within its decay")
    decay = Decay(*decays.LAYOUT.unpack_from(payload.data))
    possible = decay.halvings <= decays.MOST_HALVINGS and decay.factor >= 1 << 31
    _check(possible, f"decay by {decay.factor} and {decay.halvings} halvings")
    return payload[decays.LAYOUT.size :], _worker.decay(decay, base)


def _decode_planes(payload: _Bytes, width: int, length: int) -> Sequence[_Bytes]:
    """Return the planes, each in the payload itself if stored there plainly, else in this thread's scratch."""
    planes: list[_Bytes] = []
    view = payload.data
    at = 0
    for room in _worker.planes(width, length):
        _check(payload.size - at >= _PLANE_HEADER.size, "payload that ends within a plane's header")
        form, size = _PLANE_HEADER.unpack_from(view, at)
        at += _PLANE_HEADER.size
        _check(size <= payload.size - at, "plane that is longer than its payload")
        if form == _Form.STORED:
            _check(size == length, f"stored plane of {size} bytes for {length} lanes")
            planes.append(payload[at : at + size])
        elif form == _Form.ZSTD:
            _check(size < length, f"zstd plane of {size} bytes for {length} lanes")
            _decompress(view[at : at + size], room)
            planes.append(room)
        elif form == _Form.CONSTANT:
            _check(size == 1, f"constant plane of {size} bytes")
            room.fill(view[at])
            planes.append(room)
        else:
            raise _corrupt(f"plane of unknown form {form}")
        at += size
    _check(at == payload.size, f"{payload.size - at} bytes after the last plane")
    return planes


def _decompress(frame: memoryview, out: _Bytes) -> None:
    """Decompress exactly one frame, which must fill ``out`` exactly."""
    try:
        header = zstandard.get_frame_parameters(frame)
        # A skippable frame has no window, so this turns it away as well.
        plain = header.content_size == header.window_size == out.size
        _check(plain and not header.dict_id and not header.has_checksum, "zstd frame with other options than lamella's")
        _check(_frame_nbytes(frame) == len(frame), "zstd frame that does not end with its plane")
        whole = _worker.decompressor.stream_reader(frame).readinto(out.data) == out.size
    except zstandard.ZstdError as error:
        raise _corrupt(f"zstd frame that does not decompress ({error})") from None
    _check(whole, "zstd frame that is shorter than its plane")


def _frame_nbytes(frame: memoryview) -> int:
    """Return where the frame ends by its own block headers, or more than ``frame`` has if it does not end in there."""
    at = zstandard.frame_header_size(frame)
    last = 0
    while not last:
        # RFC 8878, 3.1.1.2: 1 bit last, 2 bits type, 21 bits size; a run-length block (type 1) holds a single byte.
        header = int.from_bytes(frame[at : at + 3], "little")
        last = header & 1
        at += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)
        if at > len(frame):
            break
    return at


def _bytes(buffer: Buffer | _Bytes, *, what: str) -> _Bytes:
    """Return the buffer as a 1-d array of bytes without copying."""
    try:
        return np.frombuffer(buffer, np.uint8)
    except (ValueError, BufferError) as error:
        raise InvalidInputError(
            f"{what} is not contiguous memory ({error}): copy it first", kind="not_contiguous"
        ) from None


def _is_chunk(nbytes: int, width: int) -> bool:
    return width in _WIDTHS and nbytes % width == 0 and nbytes <= MAX_CELL_NBYTES


def _check_chunk(nbytes: int, width: int) -> None:
    _check(_is_chunk(nbytes, width), f"{nbytes} bytes of lanes of {width} are no chunk")


def _check(holds: bool, lie: str) -> None:
    if not holds:
        raise _corrupt(lie)


def _corrupt(lie: str) -> CorruptionError:
    return CorruptionError(f"blob is damaged: {lie}; restore it from another copy", kind="bad_payload")
