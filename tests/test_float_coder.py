"""The float coder, alone and guided: FORMAT.md is all it takes to read it, every variant writes the same bytes, and no
payload, however it lies, gives anything but a CorruptionError."""

from collections.abc import Iterator

import numpy as np
import pytest
from coders import Bits, Writer, running, variants, weights
from hypothesis import given
from hypothesis import strategies as st
from strategies import ChunkPair, chunk_pairs, lanes

from lamella_engine import _kernels, codecs
from lamella_engine.codecs import Encoding, decode, encode
from lamella_engine.codecs.payloads import payload_of
from lamella_engine.errors import CorruptionError

WIDTHS = (1, 2, 4, 8)


@pytest.fixture(scope="module", params=variants())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param):
        yield request.param


def as_bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def coded(x: np.ndarray, guide: np.ndarray | None = None) -> bytes:
    """Return the payload of the float coder, whether or not it is worth it."""
    workspace = np.empty(_kernels.coder_workspace(x.nbytes, x.itemsize), np.uint8)
    # Guards before and after show what is written out of bounds.
    room = 2 * x.nbytes + 4096
    memory = np.full(room + 128, 0xA5, np.uint8)
    nbytes = _kernels.float_encode(
        as_bytes(x), None if guide is None else as_bytes(guide), x.itemsize, workspace, memory[64 : 64 + room]
    )
    assert 0 < nbytes <= room
    assert set(memory[:64]) == set(memory[64 + nbytes :]) == {0xA5}
    return memory[64 : 64 + nbytes].tobytes()


def decoded(payload: bytes, like: np.ndarray, guide: np.ndarray | None = None) -> bytes:
    memory = np.full(like.nbytes + 128, 0xA5, np.uint8)
    out = memory[64 : 64 + like.nbytes]
    encoding = Encoding.FLOAT_RANS if guide is None else Encoding.GUIDED_RANS
    try:
        decode(encoding, payload, out, width=like.itemsize, base=None if guide is None else guide.tobytes())
    finally:
        assert set(memory[:64]) == set(memory[-64:]) == {0xA5}
    return out.tobytes()


def scaled(count: int, dtype: str, *, seed: int = 0) -> np.ndarray:
    """Return weights whose rows of 384 differ in scale, as lanes."""
    rows = np.exp(np.random.default_rng(seed + 1).standard_normal(count // 384 + 1))
    factor = np.repeat(rows, 384)[:count]
    if dtype == "bf16":
        values = (weights(count, "float32", seed=seed).view(np.float32) * factor).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "e4m3":
        return weights(count, "e4m3", seed=seed)
    return (weights(count, dtype, seed=seed).view(dtype) * factor).astype(dtype).view(f"<u{np.dtype(dtype).itemsize}")


def chunks() -> dict[str, np.ndarray]:
    found = {}
    for dtype in ("e4m3", "bf16", "float16", "float32", "float64"):
        for length in (1, 31, 127, 128, 129, 5000, 70_001):
            found[f"{dtype} {length}"] = scaled(length, dtype)
        x = found[f"{dtype} 70001"]
        bits = 8 * x.itemsize
        noise = np.frombuffer(np.random.default_rng(3).bytes(x.nbytes), x.dtype)
        rare = np.random.default_rng(4).random(x.size) < 0.01
        found[f"{dtype} noise"] = noise
        found[f"{dtype} with outliers"] = np.where(rare, noise, x)
        found[f"{dtype} with zeros"] = np.where(np.random.default_rng(5).random(x.size) < 0.3, 0, x).astype(x.dtype)
        found[f"{dtype} with rows of zeros"] = np.where(np.arange(x.size) // 1000 % 2 == 0, 0, x).astype(x.dtype)
        found[f"{dtype} without signs"] = x & x.dtype.type((1 << (bits - 1)) - 1)
        found[f"{dtype} negative"] = x | x.dtype.type(1 << (bits - 1))
        found[f"{dtype} with trailing zeros"] = x & x.dtype.type((1 << bits) - 4)
        found[f"{dtype} all zero"] = np.zeros_like(x)
        found[f"{dtype} all -0.0"] = np.full_like(x, 1 << (bits - 1))
        found[f"{dtype} all ones"] = ~np.zeros_like(x)
        found[f"{dtype} subnormal"] = x & x.dtype.type(1 << (bits - 1) | 3)
    wide = np.random.default_rng(6).integers(-126, 127, 70_001)
    found["float32 of all exponents"] = np.ldexp(scaled(70_001, "float32").view(np.float32), wide).view(np.uint32)
    found["float32 that holds bf16"] = found["bf16 70001"].astype(np.uint32) << 16
    found["float32 long"] = scaled(300_000, "float32")
    found["bf16 long"] = scaled(1_000_003, "bf16")
    return found


CHUNKS = chunks()
SHORT = [name for name, x in CHUNKS.items() if x.size <= 5000]


def guides(x: np.ndarray) -> list[np.ndarray | None]:
    """Return no guide, one of about the squares, and one that says nothing."""
    mask = x.dtype.type((1 << (8 * x.itemsize - 1)) - 1)
    noise = np.frombuffer(np.random.default_rng(9).bytes(x.nbytes), x.dtype)
    return [None, ((x & mask) ^ x.dtype.type(5)) >> x.dtype.type(1), noise]


@pytest.mark.parametrize("name", CHUNKS)
def test_lanes_come_back_bit_for_bit_from_the_same_payload_of_every_variant(name):
    x = CHUNKS[name]
    for guide in guides(x):
        payloads = set()
        for isa in variants():
            with running(isa):
                payloads.add(coded(x, guide))
                for payload in payloads:
                    assert decoded(payload, x, guide) == x.tobytes()
        assert len(payloads) == 1


@given(pair=chunk_pairs(), guided=st.booleans())
def test_any_lanes_come_back_bit_for_bit_from_one_payload(pair: ChunkPair, guided):
    x, guide = (np.frombuffer(side, f"<u{pair.dtype.lane}") for side in (pair.chunk, pair.base))
    if x.size == 0:
        return
    payloads = set()
    for isa in variants():
        with running(isa):
            payloads.add(coded(x, guide if guided else None))
            for payload in payloads:
                assert decoded(payload, x, guide if guided else None) == x.tobytes()
    assert len(payloads) == 1


@pytest.mark.parametrize("dtype", ["e4m3", "bf16", "float16", "float32", "float64"])
def test_every_length_up_to_three_blocks_comes_back(isa, dtype):
    x = scaled(300, dtype)
    for length in range(1, 300):
        assert decoded(coded(x[:length]), x[:length]) == x[:length].tobytes()
        assert decoded(coded(x[:length], x[-length:]), x[:length], x[-length:]) == x[:length].tobytes()


@pytest.mark.parametrize("streams_lanes", [500, 5000, 20_000, 100_000, 300_000])
@pytest.mark.parametrize("dtype", ["e4m3", "bf16", "float32"])
def test_every_number_of_streams_comes_back(isa, dtype, streams_lanes):
    x = scaled(streams_lanes, dtype)
    assert decoded(coded(x), x) == x.tobytes()


@pytest.mark.parametrize(("dtype", "exponent_at"), [("bf16", 7), ("float32", 23)])
def test_contexts_may_begin_lower_in_a_guide_than_any_encoder_has_them(isa, dtype, exponent_at):
    x = scaled(40_000, dtype)
    guide = guides(x)[1]
    payload = bytearray(coded(x, guide))
    header = Bits(bytes(payload[5:8]))  # of shift and low, which begin with byte 5
    assert header.take(6) == exponent_at
    contexts = np.clip((guide >> exponent_at).astype(np.int64) - header.take(12), 0, 31)
    assert len(np.unique(contexts)) > 10

    # The same contexts, in eleven bits and more of another guide.
    shift, low = 4, 1000
    payload[5], payload[6] = shift | (low & 3) << 6, low >> 2 & 255
    payload[7] = payload[7] & ~3 | low >> 10
    lower = ((contexts + low) << shift).astype(x.dtype)
    assert decoded(bytes(payload), x, lower) == x.tobytes()


# What it is worth.


def bits_per_lane(x: np.ndarray, guide: np.ndarray | None = None) -> float:
    return 8 * len(coded(x, guide)) / x.size


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 10.62), ("float16", 13.65), ("float32", 26.62)])
def test_weights_take_little_more_than_their_entropy(dtype, most):
    # A Gaussian of known scale has 2.047 bits plus log2 of its deviation in steps: 10.5 for bfloat16.
    assert bits_per_lane(scaled(1 << 20, dtype)) < most


def test_blocks_of_zeros_are_free():
    x = scaled(1 << 20, "float32")
    x[1 << 13 :] = 0
    assert len(coded(x)) < 1.01 * len(coded(x[: 1 << 13])) + 100


def test_bits_that_no_lane_has_are_free():
    narrow = scaled(1 << 18, "bf16")
    assert abs(len(coded(narrow.astype(np.uint32) << 16)) - len(coded(narrow))) <= 2
    positive = narrow & 0x7FFF
    assert len(coded(positive)) < len(coded(narrow)) - positive.size // 8 + 2


def test_a_guide_that_knows_how_large_lanes_are_saves_bits():
    random = np.random.default_rng(1)
    size = np.exp(2 * random.standard_normal(1 << 18))
    x = (size * random.standard_normal(1 << 18)).astype(np.float32).view(np.uint32)
    guide = (size * size).astype(np.float32).view(np.uint32)
    assert bits_per_lane(x, guide) < bits_per_lane(x) - 0.8
    encoded = encode(x.tobytes(), width=4, floating=True, guide=guide.tobytes())
    assert encoded.encoding is Encoding.GUIDED_RANS


def test_an_odd_value_costs_an_escape_and_spoils_nothing():
    x = scaled(1 << 16, "float32")
    alone = len(coded(x))
    x[[5, 70, 40_000]] = np.array([1e-38, 1e38, np.nan], np.float32).view(np.uint32)
    assert len(coded(x)) < alone + 250


# The format, read as FORMAT.md says, by something that knows nothing else.


def documented_decode(payload: bytes, like: np.ndarray, guide: np.ndarray | None = None) -> list[int]:
    bits = 8 * like.itemsize
    header = Bits(payload)
    cut, first, values, trailing, signs = (header.take(n) for n in (6, 16, 8, 6, 1))
    streams = 1 << header.take(3)
    shift, low = (header.take(6), header.take(12)) if guide is not None else (0, 0)
    class_tables = [header.table(8) if header.take(1) else [2048] + [0] * 7 for _ in range(8)]
    tables = [header.table(values + 2) for _ in range(header.take(5))]
    table_of, current = {}, 0
    for block_class in range(1, 8):
        if len(tables) > 1 and any(table[block_class] for table in class_tables):
            for context in range(1 if guide is None else 32):
                table_of[block_class, context] = current = current + header.near()
    stored = header.take(22)
    start = (header.at + 7) // 8
    raw, words = payload[start : start + stored], Bits(payload[start + stored :])
    states = [words.take(32) for _ in range(streams)]

    def symbol(i: int, table: list[int]) -> int:
        state = states[i % streams]
        value, before, found = state % 2048, 0, 0
        while not before <= value < before + table[found]:
            before, found = before + table[found], found + 1
        state = table[found] * (state // 2048) + value - before
        states[i % streams] = state << 16 | words.take(16) if state < 1 << 15 else state
        return found

    block_classes = [0]
    for block in range((like.size + 127) // 128):
        block_classes.append(symbol(block, class_tables[block_classes[-1]]))
    lane_bits = cut - trailing + signs
    raw_bits, at = {}, 0
    for block, block_class in enumerate(block_classes[1:]):
        if block_class == 0:
            continue
        lanes_in = range(128 * block, min(128 * block + 128, like.size))
        offset = 0
        for piece in (32, 16, 8, 4, 2, 1):
            if not lane_bits & piece:
                continue
            nbytes = (len(lanes_in) * piece + 7) // 8
            for i, lane in enumerate(lanes_in):
                if piece >= 8:
                    begin = at + i * piece // 8
                    part = int.from_bytes(raw[begin : begin + piece // 8], "little")
                else:
                    part = raw[at + i % nbytes] >> (piece * (i // nbytes)) & ((1 << piece) - 1)
                raw_bits[lane] = raw_bits.get(lane, 0) | part << offset
            offset += piece
            at += nbytes
    escapes = [int.from_bytes(raw[i : i + 2], "little") for i in range(at, len(raw), 2)]
    out = []
    for i in range(like.size):
        block_class = block_classes[1 + i // 128]
        if block_class == 0:
            out.append(0)
            continue
        context = 0
        if guide is not None:
            context = min(31, max(0, ((int(guide[i]) & ((1 << (bits - 1)) - 1)) >> shift) - low))
        found = symbol(i, tables[table_of.get((block_class, context), 0)])
        top = 0 if found == 0 else escapes.pop(0) if found == values + 1 else first + found - 1
        below = raw_bits.get(i, 0)
        sign = below >> (cut - trailing) if signs else 0
        out.append(sign << (bits - 1) | top << cut | (below & ((1 << (cut - trailing)) - 1)) << trailing)
    assert not escapes
    assert words.at == words.length
    assert states == [1 << 15] * streams
    return out


@pytest.mark.parametrize("name", SHORT)
def test_the_document_is_all_it_takes_to_read_a_payload(name):
    x = CHUNKS[name]
    for guide in guides(x):
        assert documented_decode(coded(x, guide), x, guide) == x.tolist()


@pytest.mark.parametrize("dtype", ["e4m3", "bf16", "float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["with outliers", "with zeros", "with rows of zeros", "without signs", "noise"])
def test_the_document_is_all_it_takes_to_read_what_is_not_plain(dtype, kind):
    x = CHUNKS[f"{dtype} {kind}"][:20_000]
    assert documented_decode(coded(x), x) == x.tolist()


# Payloads that lie.


def refused_or_decoded(payload: bytes, like: np.ndarray, guide: np.ndarray | None = None) -> bool:
    """Whether it is corruption; anything else gives as many bytes as there are lanes."""
    try:
        return len(decoded(payload, like, guide)) != like.nbytes
    except CorruptionError:
        return True


DAMAGED = ["e4m3 129", "bf16 5000", "float16 with outliers", "float32 with rows of zeros", "float64 129"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_payload_with_any_byte_changed_is_corruption_or_other_lanes(isa, name):
    x = CHUNKS[name][:2500]
    for guide in guides(x)[:2]:
        payload = coded(x, guide)
        random = np.random.default_rng(0)
        refused = 0
        for at in range(0, len(payload), 1 + len(payload) // 1500):
            for flip in {0xFF, 1, int(random.integers(1, 256))}:
                damaged = bytearray(payload)
                damaged[at] ^= flip
                refused += refused_or_decoded(bytes(damaged), x, guide)
        assert refused > 20


@pytest.mark.parametrize("name", DAMAGED)
def test_a_payload_cut_anywhere_or_longer_is_corruption(isa, name):
    x = CHUNKS[name][:2500]
    for guide in guides(x)[:2]:
        payload = coded(x, guide)
        assert decoded(payload, x, guide) == x.tobytes()
        for stop in range(0, len(payload), 1 + len(payload) // 1500):
            assert refused_or_decoded(payload[:stop], x, guide), stop
        for more in (b"\x00", b"\x00\x00", payload):
            assert refused_or_decoded(payload + more, x, guide)


@given(data=st.binary(max_size=400), width=st.sampled_from(WIDTHS), guided=st.booleans())
def test_bytes_that_are_no_payload_are_corruption(data, width, guided):
    x = np.arange(400, dtype=f"<u{width}")
    for isa in variants():
        with running(isa):
            refused_or_decoded(data, x, x if guided else None)


@given(pair=chunk_pairs(), data=st.data())
def test_damage_anywhere_never_escapes(pair: ChunkPair, data):
    x, guide = (np.frombuffer(side, f"<u{pair.dtype.lane}") for side in (pair.chunk, pair.base))
    if x.size == 0:
        return
    for against in (None, guide):
        payload = bytearray(coded(x, against))
        for at in data.draw(st.lists(st.integers(0, 8 * len(payload) - 1), min_size=1, max_size=6)):
            payload[at // 8] ^= 1 << at % 8
        other = None if against is None else data.draw(lanes(x.itemsize, x.size))
        found = set()
        for isa in variants():
            with running(isa):
                refused_or_decoded(bytes(payload), x, against)
                try:
                    found.add(decoded(bytes(payload), x, other))
                except CorruptionError:
                    found.add(None)
        assert len(found) == 1


def header(*, cut=5, first=400, values=1, trailing=0, signs=0, log_streams=0) -> Writer:
    writer = Writer().put(cut, 6).put(first, 16).put(values, 8).put(trailing, 6).put(signs, 1).put(log_streams, 3)
    return class_tables(writer)


def class_tables(writer: Writer, *, block_class: int = 1) -> Writer:
    """After every class comes ``block_class``, for certain."""
    for _ in range(8):
        writer.put(1, 1).put(block_class, 3).put(block_class, 3)
        for symbol in range(block_class):
            writer.near(-6 if symbol < 2 else 0)
    return writer


def certain(writer: Writer, symbol: int) -> Writer:
    """Add one table of three symbols, of which all lanes have this one."""
    writer.put(1, 5).put(symbol, 2).put(symbol, 2)
    for before in range(symbol):
        writer.near(-6 if before < 2 else 0)
    return writer


STATE = (1 << 15).to_bytes(4, "little")
LANES = 100
RAW = bytes(range(LANES // 2)) + bytes(LANES // 8 + 1)  # 5 bits a lane: 4 and 1


def payload(
    writer: Writer, *, raw: bytes = RAW, escapes: bytes = b"", raw_nbytes: int | None = None, end: bytes = STATE
) -> bytes:
    return writer.put(len(raw + escapes) if raw_nbytes is None else raw_nbytes, 22).bytes() + raw + escapes + end


ESCAPED = (7).to_bytes(2, "little") * LANES
LIES = {
    "nothing": (b"", r"header|window|tops"),
    "tops of no bits": (header(cut=15).put(0, 400).bytes(), "tops of more"),
    "no window": (header(values=0).put(0, 400).bytes(), "window"),
    "a window that begins with 0": (header(first=0).put(0, 400).bytes(), "window"),
    "a window of 255": (header(values=255).put(0, 400).bytes(), "window"),
    "a window past the last top": (header(first=1024, values=1).put(0, 400).bytes(), "window"),
    "trailing zeros in tops": (header(trailing=6).put(0, 400).bytes(), "trailing"),
    "64 streams": (header(log_streams=6).put(0, 400).bytes(), "streams"),
    "no table": (payload(header().put(0, 5)), "tables"),
    "a header that is cut": (certain(header(), 1).bytes(), "header"),
    "raw bits that are not there": (payload(certain(header(), 1), raw_nbytes=LANES), "raw bits that are longer"),
    "too few raw bits": (payload(certain(header(), 1), raw=RAW[:-2]), "not those of lanes"),
    "half an escape": (payload(certain(header(), 1), escapes=b"\x00"), "not those of lanes"),
    "an escape too many": (payload(certain(header(), 1), escapes=b"\x00\x00"), "does not end"),
    "an escape too few": (payload(certain(header(), 2), escapes=ESCAPED[2:]), "ends before"),
    "an escape that is no top": (payload(certain(header(), 2), escapes=b"\x00\x04" * LANES), "ends before"),
    "no states": (payload(certain(header(), 1), end=b""), "states"),
    "half a word": (payload(certain(header(), 1), end=STATE + b"\x00"), "states"),
    "a state that is too low": (payload(certain(header(), 1), end=bytes(4)), "state out of range"),
    "a word too many": (payload(certain(header(), 1), end=STATE + b"\x00\x00"), "does not end"),
}


def test_payloads_written_by_hand_are_good_so_that_the_bad_ones_fail_for_their_reason(isa):
    x = np.zeros(LANES, np.uint16)
    for writer, escapes, top in (
        (certain(header(), 0), b"", 0),
        (certain(header(), 1), b"", 400),
        (certain(header(), 2), ESCAPED, 7),
    ):
        found = np.frombuffer(decoded(payload(writer, escapes=escapes), x), np.uint16)
        assert set(found >> 5) == {top}
        assert found[3] & 31 == 3


@pytest.mark.parametrize(("lying", "lie"), LIES.values(), ids=LIES)
def test_a_payload_that_lies_is_corruption(isa, lying, lie):
    with pytest.raises(CorruptionError, match=lie):
        decoded(lying, np.zeros(LANES, np.uint16))


def test_tops_of_seventeen_bits_are_corruption(isa):
    with pytest.raises(CorruptionError, match="tops of more"):
        decoded(header(cut=14).put(0, 400).bytes(), np.zeros(LANES, np.uint32))


def test_a_guided_context_outside_of_its_lane_is_corruption(isa):
    x = np.zeros(LANES, np.uint16)
    writer = Writer().put(5, 6).put(400, 16).put(1, 8).put(0, 6).put(0, 1).put(0, 3).put(16, 6).put(0, 400)
    with pytest.raises(CorruptionError, match="context outside"):
        decoded(writer.bytes(), x, x)


def test_a_guide_that_is_missing_or_of_another_length_is_corruption():
    x = scaled(1000, "bf16")
    guided = coded(x, x)
    for base in (None, x[:-1].tobytes()):
        with pytest.raises(CorruptionError, match="base"):
            decode(Encoding.GUIDED_RANS, guided, bytearray(x.nbytes), width=2, base=base)


def test_the_coder_refuses_memory_that_does_not_fit():
    eight, four, empty = np.zeros(8, np.uint8), np.zeros(4, np.uint8), np.zeros(0, np.uint8)
    workspace = np.zeros(_kernels.coder_workspace(8, 2), np.uint8)
    refused = [
        lambda: _kernels.float_encode(eight, four, 2, workspace, eight.copy()),
        lambda: _kernels.float_encode(empty, None, 2, workspace, eight.copy()),
        lambda: _kernels.float_encode(eight, None, 3, workspace, eight.copy()),
        lambda: _kernels.float_encode(eight, None, 2, four, eight.copy()),
        lambda: _kernels.float_decode(eight, four, 2, workspace, eight.copy()),
        lambda: _kernels.float_decode(eight, None, 2, workspace, empty.copy()),
        lambda: _kernels.float_decode(eight, None, 2, four, eight.copy()),
    ]
    for call in refused:
        with pytest.raises(ValueError, match="must"):
            call()


@pytest.mark.parametrize("name", ["bf16 70001", "bf16 noise"])
def test_a_payload_that_does_not_fit_is_none(isa, name):
    x = CHUNKS[name]
    workspace = np.empty(_kernels.coder_workspace(x.nbytes, 2), np.uint8)
    for room in (0, 1, 10, 100, 1000, x.nbytes // 2, len(coded(x)) - 1):
        memory = np.full(room + 64, 0xA5, np.uint8)
        assert _kernels.float_encode(as_bytes(x), None, 2, workspace, memory[:room]) == 0
        assert set(memory[room:]) == {0xA5}


def test_more_escapes_than_a_header_can_count_are_no_payload():
    x = np.frombuffer(np.random.default_rng(0).bytes(4 << 20), np.uint16).copy()
    # The encoder looks at 128 runs of 64 lanes to choose which tops are none.
    x.reshape(128, -1)[:, :64] = 0x3F80
    workspace = np.empty(_kernels.coder_workspace(x.nbytes, 2), np.uint8)
    assert _kernels.float_encode(as_bytes(x), None, 2, workspace, np.empty(8 << 20, np.uint8)) == 0


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("block", [0, 1, 3, 2001])
def test_few_blocks_that_are_not_zero_are_never_passed_over(width, block):
    lanes = np.zeros(1 << 18, f"<u{width}")
    lanes[128 * block : 128 * block + 12] = np.arange(1, 13) * 11
    chunk, guide = lanes.tobytes(), np.random.default_rng(0).bytes(lanes.nbytes)
    for encoding, other in ((Encoding.FLOAT_RANS, None), (Encoding.GUIDED_RANS, np.frombuffer(guide, np.uint8))):
        source = np.frombuffer(chunk, np.uint8)
        payload = payload_of(encoding, source, other, width=width, floating=True, limit=source.size)
        assert payload is not None
        out = bytearray(len(chunk))
        codecs.decode(encoding, payload, out, width=width, base=guide)
        assert out == chunk
