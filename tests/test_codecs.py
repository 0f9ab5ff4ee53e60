"""Chunks come back bit for bit, and no payload, however it lies, gives anything but a CorruptionError."""

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from strategies import ChunkPair, chunk_pairs

from lamella_engine.chunking import MAX_CELL_NBYTES
from lamella_engine.codecs import Against, Encoding, decode, encode, needs_base
from lamella_engine.dtypes import dtype_named
from lamella_engine.errors import CorruptionError, InvalidInputError, UnsupportedFormatError

PLANE_ENCODINGS = (Encoding.PLANES, Encoding.XOR_PLANES, Encoding.RESIDUAL_PLANES)


def decoded(encoding, payload, nbytes, *, width, base=None) -> bytes:
    out = bytearray(nbytes)
    decode(encoding, payload, out, width=width, base=base)
    return bytes(out)


def weights(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count) * 0.02


def encoded_size(pair: ChunkPair, base, *, floating=None) -> int:
    floating = pair.dtype.floating if floating is None else floating
    return len(encode(pair.chunk, width=pair.dtype.lane, floating=floating, base=base).payload)


@given(pair=chunk_pairs(), with_base=st.booleans())
def test_any_chunk_comes_back_bit_for_bit(pair, with_base):
    base = pair.base if with_base else None
    encoding, payload = encode(pair.chunk, width=pair.dtype.lane, floating=pair.dtype.floating, base=base)
    needed = base if needs_base(encoding) else None
    assert decoded(encoding, payload, len(pair.chunk), width=pair.dtype.lane, base=needed) == pair.chunk


@given(pair=chunk_pairs())
def test_no_payload_is_longer_than_its_chunk_and_none_gains_from_fewer_candidates(pair):
    with_base, alone = encoded_size(pair, pair.base), encoded_size(pair, None)
    assert with_base <= alone <= len(pair.chunk)
    assert encode(pair.chunk, width=pair.dtype.lane, floating=pair.dtype.floating, base=pair.base).encoding in Encoding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_tuned_chunk_is_stored_as_residuals_in_less_than_xor_needs(dtype):
    numpy = dtype_named(dtype).numpy
    before = weights(1 << 15)
    after = before + weights(1 << 15, seed=1) * 0.001
    chunk, base = after.astype(numpy).tobytes(), before.astype(numpy).tobytes()
    width = dtype_named(dtype).lane
    residual = encode(chunk, width=width, floating=True, base=base)
    xor = encode(bytes(a ^ b for a, b in zip(chunk, base, strict=True)), width=width, floating=True)
    assert residual.encoding is Encoding.RESIDUAL_RANS
    assert len(residual.payload) < len(xor.payload)
    assert decoded(*residual, len(chunk), width=width, base=base) == chunk


def test_integers_are_stored_as_xor_if_that_is_smaller():
    base = np.random.default_rng(0).integers(0, 2**63, 4096)
    chunk = base.copy()
    chunk[::50] += 1
    encoding, payload = encode(chunk.tobytes(), width=8, floating=False, base=base.tobytes())
    assert encoding is Encoding.XOR_PLANES
    assert decoded(encoding, payload, chunk.nbytes, width=8, base=base.tobytes()) == chunk.tobytes()


def test_a_base_that_does_not_help_is_left_out():
    chunk = weights(1 << 14).tobytes()
    noise = np.random.default_rng(0).bytes(len(chunk))
    assert encode(chunk, width=4, floating=True, base=noise).encoding is Encoding.PLANES


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("count", [129, 2000, 20_000, 200_000])
def test_a_wrong_base_costs_at_most_sixteen_bytes(dtype, count):
    found = dtype_named(dtype)
    chunk, wrong = (
        (weights(count, seed=seed) * (1 + seed)).astype(np.float32).astype(found.numpy).tobytes() for seed in (0, 1)
    )
    noise = np.random.default_rng(0).bytes(len(chunk))
    alone = len(encode(chunk, width=found.lane, floating=True).payload)
    for base in (wrong, noise, bytes(len(chunk)), chunk[::-1]):
        encoded = encode(chunk, width=found.lane, floating=True, base=base)
        assert len(encoded.payload) <= alone + 16
        encoded = encode(chunk, width=found.lane, floating=True, base=base, guide=wrong)
        assert len(encoded.payload) <= alone + 16


def rows(seed: int, count: int, length: int, *, zero: float = 0.0) -> np.ndarray:
    """Return rows of weights, of which a share is zero, as in embeddings of words that no text has."""
    drawn = weights(count * length, seed=seed).astype(np.float32).reshape(count, length)
    drawn[np.random.default_rng(seed).random(count) < zero] = 0
    return drawn


REPEATING = np.resize(rows(1, 6, 100), (100, 100))
SPARSE = rows(1, 1000, 384, zero=0.5)
EMBEDDING = rows(1, 1000, 384, zero=0.3)

MISLEADING = {
    "rows that repeat, guided by themselves": (REPEATING, None, REPEATING * 3),
    "rows that repeat, shifted": (REPEATING, np.roll(REPEATING, 7), None),
    "rows that repeat, with noise": (REPEATING, REPEATING * (1 + rows(6, 100, 100)), None),
    "zero rows, against zeros": (EMBEDDING, np.zeros_like(EMBEDDING), None),
    "zero rows, shifted": (EMBEDDING, np.roll(EMBEDDING, 7), None),
    "zero rows, half of all equal": (SPARSE, np.vstack((SPARSE[:500], rows(100, 1000, 384)[500:])), None),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("way", MISLEADING)
def test_what_a_sample_does_not_show_costs_at_most_sixteen_bytes_as_well(way, dtype):
    found = dtype_named(dtype)
    chunk, base, guide = (None if it is None else it.astype(found.numpy).tobytes() for it in MISLEADING[way])
    alone = encode(chunk, width=found.lane, floating=True)
    encoded = encode(chunk, width=found.lane, floating=True, base=base, guide=guide)
    assert len(encoded.payload) <= len(alone.payload) + 16


def test_what_a_payload_was_made_against_is_what_decodes_it():
    random = np.random.default_rng(0)
    size = np.exp(2 * random.standard_normal(1 << 15))
    chunk = (size * random.standard_normal(1 << 15)).astype(np.float32).tobytes()
    guide = (size * size).astype(np.float32).tobytes()
    others = {Against.NOTHING: None, Against.BASE: bytes(reversed(chunk)), Against.GUIDE: guide}
    tried = set()
    for base in (None, chunk[:-4] + bytes(4), others[Against.BASE]):
        others[Against.BASE] = base
        for guiding in (None, guide):
            encoded = encode(chunk, width=4, floating=True, base=base, guide=guiding)
            assert needs_base(encoded.encoding) == (encoded.against is not Against.NOTHING)
            assert decoded(*encoded, len(chunk), width=4, base=others[encoded.against]) == chunk
            tried.add(encoded.against)
    assert tried == set(Against)


def test_a_guide_of_another_length_is_refused():
    with pytest.raises(InvalidInputError, match="guide of 4 bytes"):
        encode(bytes(8), width=4, floating=True, guide=bytes(4))


def test_noise_is_stored_raw():
    noise = np.random.default_rng(0).bytes(1 << 16)
    assert encode(noise, width=4, floating=True) == (Encoding.RAW, noise)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_constant_chunk_is_one_lane_whatever_its_base(width):
    lane = bytes(range(1, width + 1))
    encoding, payload = encode(lane * 999, width=width, floating=True, base=bytes(999 * width))
    assert (encoding, payload) == (Encoding.CONSTANT, lane)
    assert decoded(encoding, payload, 999 * width, width=width) == lane * 999


def test_an_empty_chunk_is_raw():
    assert encode(b"", width=4, floating=True, base=b"") == (Encoding.RAW, b"")
    assert decoded(Encoding.RAW, b"", 0, width=4) == b""


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_the_longest_chunk_comes_back(width):
    chunk = np.tile(weights(1 << 17), 4).tobytes()
    assert len(chunk) == MAX_CELL_NBYTES
    encoding, payload = encode(chunk, width=width, floating=False)
    assert decoded(encoding, payload, len(chunk), width=width) == chunk


def test_every_kind_of_memory_can_be_read_and_written():
    chunk = weights(100).astype(np.float16)
    raw = chunk.tobytes()
    expected = encode(raw, width=2, floating=True, base=bytes(200))
    for given_chunk in (bytearray(raw), memoryview(raw), np.frombuffer(raw, np.uint8)):
        for base in (bytearray(200), memoryview(bytes(200)), np.zeros(200, np.uint8)):
            assert encode(given_chunk, width=2, floating=True, base=base) == expected
    for out in (bytearray(200), memoryview(bytearray(200)), np.empty(200, np.uint8)):
        decode(expected.encoding, memoryview(expected.payload), out, width=2, base=bytes(200))
        assert bytes(out) == raw


def test_threads_do_not_share_scratch():
    chunks = [weights(20000, seed=seed).tobytes() for seed in range(16)]
    base = weights(20000, seed=99).tobytes()

    def there_and_back(chunk: bytes) -> bytes:
        encoding, payload = encode(chunk, width=4, floating=True, base=base)
        return decoded(encoding, payload, len(chunk), width=4, base=base)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(there_and_back, chunks * 4)) == chunks * 4


# The format, written out by hand from the tables at the top of codecs.


def plane(form: int, data: bytes, *, length: int | None = None) -> bytes:
    return struct.pack("<BI", form, len(data) if length is None else length) + data


def frame(data: bytes, **options) -> bytes:
    options = {"write_content_size": 1, "write_checksum": 0, "window_log": 22, **options}
    parameters = zstandard.ZstdCompressionParameters.from_level(3, **options)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


LANES = 3000
RUN = b"ab" * (LANES // 2)
FRAME = frame(RUN)
STORED = plane(0, bytes(range(250)) * 12)


@pytest.mark.parametrize(
    ("encoding", "base", "expected"),
    [
        (Encoding.PLANES, None, [0x0201, 0x0202, 0x0203]),
        (Encoding.XOR_PLANES, [0xFFFF, 0x0000, 0x0203], [0xFDFE, 0x0202, 0x0000]),
        # Zigzag 0x0201 is -0x101, 0x0202 is +0x101, 0x0203 is -0x102; away from zero is up on both sides of it.
        (Encoding.RESIDUAL_PLANES, [0x3F80, 0x3F80, 0xBF80], [0x3E7F, 0x4081, 0xBE7E]),
    ],
)
def test_the_format_by_hand(encoding, base, expected):
    payload = plane(0, b"\x01\x02\x03") + plane(2, b"\x02")
    base_bytes = None if base is None else struct.pack("<3H", *base)
    assert decoded(encoding, payload, 6, width=2, base=base_bytes) == struct.pack("<3H", *expected)


def test_a_header_written_by_hand_is_a_good_one_so_that_the_bad_ones_fail_for_their_reason():
    assert decoded(Encoding.PLANES, plane(1, with_header(RUN, LANES)) + REST, 2 * LANES, width=2)[::2] == RUN


def test_a_zstd_plane_by_hand():
    payload = plane(1, FRAME) + plane(2, b"x")
    assert decoded(Encoding.PLANES, payload, 2 * LANES, width=2) == bytes(
        byte for low in RUN for byte in (low, ord("x"))
    )


def with_header(data: bytes, size: int, *, window: bytes = b"", dictionary: bytes = b"") -> bytes:
    """Return a frame of ``data`` whose header is written by hand, its size in eight bytes (RFC 8878, 3.1.1.1)."""
    whole = frame(data)
    descriptor = 0xC0 | (0 if window else 0x20) | len(dictionary)
    header = bytes([descriptor]) + window + dictionary + size.to_bytes(8, "little")
    return whole[:4] + header + whole[zstandard.frame_header_size(whole) :]


SKIPPABLE = struct.pack("<II", 0x184D2A50, LANES) + bytes(LANES - 100)
REST = plane(2, b"x")

MALFORMED = {
    "nothing": b"",
    "a header that ends early": plane(1, FRAME) + b"\x02\x01\x00",
    "a missing plane": STORED,
    "a plane longer than the payload": STORED + plane(0, b"x" * 10, length=LANES),
    "a length of 4 GiB": plane(1, FRAME, length=2**32 - 1) + REST,
    "bytes after the last plane": STORED + REST + b"\x00",
    "a plane too many": STORED + REST + REST,
    "an unknown form": STORED + plane(3, b"x"),
    "a stored plane that is short": plane(0, bytes(LANES - 1)) + REST,
    "a stored plane that is long": plane(0, bytes(LANES + 1)) + REST,
    "a constant of no bytes": STORED + plane(2, b""),
    "a constant of two bytes": STORED + plane(2, b"xx"),
    "an empty frame": plane(1, b"") + REST,
    "a frame that is no smaller than its plane": plane(1, frame(np.random.default_rng(0).bytes(LANES))) + REST,
    "noise for a frame": plane(1, np.random.default_rng(0).bytes(100)) + REST,
    "a frame of fewer bytes": plane(1, frame(RUN[:-1])) + REST,
    "a frame of more bytes": plane(1, frame(RUN + b"a")) + REST,
    "a frame without content size": plane(1, frame(RUN, write_content_size=0)) + REST,
    "a frame with a wider window": plane(1, with_header(RUN, LANES, window=b"\x60")) + REST,
    "a frame with a checksum": plane(1, frame(RUN, write_checksum=1)) + REST,
    "a frame that names a dictionary": plane(1, with_header(RUN, LANES, dictionary=b"\x07")) + REST,
    "a frame that says less than it holds": plane(1, with_header(RUN + b"a", LANES)) + REST,
    "a frame that says more than it holds": plane(1, with_header(RUN[:-1], LANES)) + REST,
    "a frame that says 2^62 bytes": plane(1, with_header(RUN, 1 << 62)) + REST,
    "two frames": plane(1, FRAME + FRAME) + REST,
    "a frame and then bytes": plane(1, FRAME + b"\x00") + REST,
    "a skippable frame": plane(1, SKIPPABLE) + REST,
    "a reserved block type": plane(1, FRAME[: zstandard.frame_header_size(FRAME)] + bytes([7, 0, 0])) + REST,
    "blocks that never end": plane(1, FRAME[: zstandard.frame_header_size(FRAME)] + bytes(300)) + REST,
}


@pytest.mark.parametrize("encoding", PLANE_ENCODINGS)
@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_payload_is_corruption(encoding, payload):
    with pytest.raises(CorruptionError):
        decoded(encoding, payload, 2 * LANES, width=2, base=bytes(2 * LANES))


@pytest.mark.parametrize("stop", range(len(FRAME)))
def test_a_frame_cut_anywhere_is_corruption(stop):
    with pytest.raises(CorruptionError):
        decoded(Encoding.PLANES, plane(1, FRAME[:stop]) + REST, 2 * LANES, width=2)


@pytest.mark.parametrize(
    ("encoding", "payload", "nbytes", "width"),
    [
        (Encoding.RAW, b"xyz", 4, 4),
        (Encoding.RAW, b"xyzxyz", 4, 4),
        (Encoding.CONSTANT, b"xyz", 8, 4),
        (Encoding.CONSTANT, b"wxyzw", 8, 4),
        (Encoding.CONSTANT, b"wxyz", 0, 4),
        (Encoding.PLANES, plane(0, b"") * 4, 0, 4),
        (Encoding.RAW, b"xyz", 3, 2),
        (Encoding.RAW, b"xyz", 3, 3),
        (Encoding.RAW, b"", 0, 0),
        (Encoding.CONSTANT, b"x", MAX_CELL_NBYTES + 1, 1),
    ],
)
def test_a_payload_of_another_length_is_corruption(encoding, payload, nbytes, width):
    with pytest.raises(CorruptionError):
        decoded(encoding, payload, nbytes, width=width)


@pytest.mark.parametrize("encoding", [Encoding.XOR_PLANES, Encoding.RESIDUAL_PLANES])
@pytest.mark.parametrize("base", [None, b"", b"12345", b"1234567"])
def test_a_delta_without_its_base_is_corruption(encoding, base):
    with pytest.raises(CorruptionError, match="base"):
        decoded(encoding, plane(2, b"x") + plane(2, b"y"), 6, width=2, base=base)


@given(pair=chunk_pairs(), data=st.data())
def test_flipped_bits_give_corruption_or_other_bytes_but_nothing_worse(pair, data):
    encoding, payload = encode(pair.chunk, width=pair.dtype.lane, floating=pair.dtype.floating, base=pair.base)
    damaged = bytearray(payload)
    for at in data.draw(st.lists(st.integers(0, 8 * len(payload) - 1), max_size=4)) if payload else ():
        damaged[at // 8] ^= 1 << at % 8
    try:
        out = decoded(encoding, bytes(damaged), len(pair.chunk), width=pair.dtype.lane, base=pair.base)
    except CorruptionError:
        assert bytes(damaged) != payload
    else:
        assert (out == pair.chunk) or bytes(damaged) != payload


@given(payload=st.binary(max_size=200), encoding=st.sampled_from(PLANE_ENCODINGS), width=st.sampled_from([1, 2, 4, 8]))
def test_random_payloads_are_corruption(payload, encoding, width):
    with pytest.raises(CorruptionError):
        decoded(encoding, payload, 800, width=width, base=bytes(800))


@pytest.mark.parametrize("encoding", [12, 255, -1])
def test_an_encoding_of_the_future_asks_for_an_upgrade(encoding):
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        decoded(encoding, b"", 4, width=4)


def test_wrong_calls_are_invalid_input():
    strided = memoryview(bytes(16))[::2]
    for call in (
        lambda: encode(b"abc", width=2, floating=True),
        lambda: encode(b"abc", width=3, floating=True),
        lambda: encode(bytes(MAX_CELL_NBYTES + 8), width=8, floating=True),
        lambda: encode(b"abcd", width=2, floating=True, base=b"abc"),
        lambda: encode(strided, width=2, floating=True),
        lambda: decode(Encoding.RAW, b"abcd", b"1234", width=2),
        lambda: decode(Encoding.RAW, b"abcd", memoryview(bytearray(8))[::2], width=2),
    ):
        with pytest.raises(InvalidInputError):
            call()


def test_the_numbers_of_encodings_never_change():
    assert {encoding.name: encoding.value for encoding in Encoding} == {
        "RAW": 0,
        "CONSTANT": 1,
        "PLANES": 2,
        "XOR_PLANES": 3,
        "RESIDUAL_PLANES": 4,
        "RESIDUAL_RANS": 5,
        "FLOAT_RANS": 6,
        "GUIDED_RANS": 7,
        "CAST": 8,
        "DECAYED_RANS": 9,
    }
