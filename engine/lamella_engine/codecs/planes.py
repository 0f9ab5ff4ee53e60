"""Planes: a sequence of lanes as its bytes 0, its bytes 1, and so on, each in the form that takes least."""

import struct
import threading
from collections.abc import Sequence
from enum import IntEnum

import zstandard

from lamella_engine import _kernels
from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.codecs.checks import Bytes, check, corrupt
from lamella_engine.codecs.encodings import Encoding
from lamella_engine.codecs.scratch import scratch


class Form(IntEnum):
    """How one plane is stored: append only, like :class:`Encoding`."""

    STORED = 0
    ZSTD = 1
    CONSTANT = 2


PLANE_HEADER = struct.Struct("<BI")
"""Form and length of a plane."""


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


class _Contexts(threading.local):
    """What one thread compresses with: two threads may not share a context of zstd."""

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


_contexts = _Contexts()


def encode_planes(
    encoding: Encoding, source: Bytes, base: Bytes | None, *, width: int, floating: bool, limit: int
) -> bytes | None:
    """Return the payload of one planes encoding, or None as soon as it cannot be shorter than ``limit``."""
    length = source.size // width
    planes = scratch.planes(width, length)
    if base is None or encoding is Encoding.PLANES:
        _kernels.split_planes(source, planes)
    elif encoding is Encoding.XOR_PLANES:
        _kernels.xor_split(source, base, planes)
    else:
        _kernels.residual_split(source, base, planes)
    compressor = _contexts.floats if floating else _contexts.others
    parts: list[bytes | memoryview] = []
    size = width * PLANE_HEADER.size
    for plane in planes:
        if size >= limit:
            return None
        form: Form = Form.STORED
        stored: bytes | memoryview = plane.data
        if _kernels.is_constant(plane, 1):
            form, stored = Form.CONSTANT, stored[:1]
        elif len(frame := compressor.compress(stored)) < length:
            form, stored = Form.ZSTD, frame
        parts += (PLANE_HEADER.pack(form, len(stored)), stored)
        size += len(stored)
    return b"".join(parts) if size < limit else None


def decode_planes(payload: Bytes, width: int, length: int) -> Sequence[Bytes]:
    """Return the planes, each in the payload itself if stored there plainly, else in this thread's scratch."""
    planes: list[Bytes] = []
    view = payload.data
    at = 0
    for room in scratch.planes(width, length):
        check(payload.size - at >= PLANE_HEADER.size, "payload that ends within a plane's header")
        form, size = PLANE_HEADER.unpack_from(view, at)
        at += PLANE_HEADER.size
        check(size <= payload.size - at, "plane that is longer than its payload")
        if form == Form.STORED:
            check(size == length, f"stored plane of {size} bytes for {length} lanes")
            planes.append(payload[at : at + size])
        elif form == Form.ZSTD:
            check(size < length, f"zstd plane of {size} bytes for {length} lanes")
            _decompress(view[at : at + size], room)
            planes.append(room)
        elif form == Form.CONSTANT:
            check(size == 1, f"constant plane of {size} bytes")
            room.fill(view[at])
            planes.append(room)
        else:
            raise corrupt(f"plane of unknown form {form}")
        at += size
    check(at == payload.size, f"{payload.size - at} bytes after the last plane")
    return planes


def _decompress(frame: memoryview, out: Bytes) -> None:
    """Decompress exactly one frame, which must fill ``out`` exactly."""
    try:
        header = zstandard.get_frame_parameters(frame)
        # A skippable frame has no window, so this turns it away as well.
        plain = header.content_size == header.window_size == out.size
        check(plain and not header.dict_id and not header.has_checksum, "zstd frame with other options than lamella's")
        check(_frame_nbytes(frame) == len(frame), "zstd frame that does not end with its plane")
        whole = _contexts.decompressor.stream_reader(frame).readinto(out.data) == out.size
    except zstandard.ZstdError as error:
        raise corrupt(f"zstd frame that does not decompress ({error})") from None
    check(whole, "zstd frame that is shorter than its plane")


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
