"""The residual coder: FORMAT.md is all it takes to read it, every variant writes the same bytes, and no payload,
however it lies, gives anything but a CorruptionError."""

from collections.abc import Iterator

import numpy as np
import pytest
from coders import Bits, Writer, running, variants, weights
from hypothesis import given
from hypothesis import strategies as st
from strategies import ChunkPair, chunk_pairs, lanes

from lamella_engine import _kernels
from lamella_engine.codecs import Encoding, decode, encode
from lamella_engine.errors import CorruptionError

WIDTHS = (1, 2, 4, 8)


@pytest.fixture(scope="module", params=variants())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param):
        yield request.param


def coded(x, base) -> bytes:
    """Return the payload of the residual coder, whether or not it is worth it."""
    x, base = (np.ascontiguousarray(side).reshape(-1) for side in (x, base))
    workspace = np.empty(_kernels.coder_workspace(x.nbytes, x.itemsize), np.uint8)
    # Guards before and after show what is written out of bounds.
    room = 2 * x.nbytes + 4096
    memory = np.full(room + 128, 0xA5, np.uint8)
    nbytes = _kernels.residual_encode(
        x.view(np.uint8), base.view(np.uint8), x.itemsize, workspace, memory[64 : 64 + room]
    )
    assert 0 < nbytes <= room
    assert set(memory[:64]) == set(memory[64 + nbytes :]) == {0xA5}
    return memory[64 : 64 + nbytes].tobytes()


def decoded(payload: bytes, base) -> bytes:
    memory = np.full(base.nbytes + 128, 0xA5, np.uint8)
    out = memory[64 : 64 + base.nbytes]
    try:
        decode(Encoding.RESIDUAL_RANS, payload, out, width=base.itemsize, base=base.tobytes())
    finally:
        assert set(memory[:64]) == set(memory[-64:]) == {0xA5}
    return out.tobytes()


def nudged(base: np.ndarray, *, seed: int, spread: float, share: float = 1.0) -> np.ndarray:
    """Return the lanes with a share of them moved by about ``spread`` steps, in rows of more and of less movement."""
    random = np.random.default_rng(seed)
    rows = np.repeat(random.random(base.size // 256 + 1), 256)[: base.size]
    steps = np.rint(random.standard_normal(base.size) * spread * rows).astype(np.int64)
    return base + np.where(random.random(base.size) < share, steps, 0).astype(base.dtype)


def patched(base: np.ndarray, *, seed: int, most: int) -> np.ndarray:
    """Return the lanes with up to ``most`` of each block changed, some by a step and some to anything."""
    random = np.random.default_rng(seed)
    x = base.copy()
    for start in range(0, base.size, 128):
        count = min(int(random.integers(0, most + 1)), base.size - start)
        changed = start + random.choice(min(128, base.size - start), count, replace=False)
        anything = np.frombuffer(random.bytes(count * base.itemsize), base.dtype)
        x[changed] = np.where(random.random(count) < 0.7, x[changed] + base.dtype.type(1), anything)
    return x


def decayed(base: np.ndarray, *, steps: int, seed: int = 0) -> np.ndarray:
    """Return float32 lanes as weight decay leaves them, but for some rows that were trained."""
    values = base.view(np.float32).copy()
    for _ in range(steps):
        values *= np.float32(1 - 2e-7)
    trained = np.repeat(np.random.default_rng(seed).random(base.size // 384 + 1) < 0.3, 384)[: base.size]
    return np.where(trained, nudged(base, seed=seed, spread=3000), values.view(np.uint32))


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for dtype in ("e4m3", "bf16", "float16", "float32", "float64"):
        for length in (1, 31, 127, 128, 129, 5000, 70001):
            base = weights(length, dtype)
            spread = {8: 1e12, 4: 2000, 2: 3, 1: 1}[base.itemsize]
            found[f"{dtype} tuned {length}"] = nudged(base, seed=1, spread=spread), base
        found[f"{dtype} sparse"] = nudged(base, seed=2, spread=2, share=0.02), base
        for length, most in ((5000, 12), (70001, 2)):
            found[f"{dtype} patched {length}"] = patched(base[:length], seed=4, most=most), base[:length]
        found[f"{dtype} equal"] = base, base
        found[f"{dtype} constant offset"] = base + base.dtype.type(9), base
        found[f"{dtype} unrelated"] = weights(base.size, dtype, seed=5), base
        one = base.copy()
        one[40000] ^= base.dtype.type(1)
        found[f"{dtype} one bit"] = one, base
        noise = np.frombuffer(np.random.default_rng(3).bytes(base.nbytes), base.dtype)
        found[f"{dtype} noise"] = noise, base
        found[f"{dtype} noise for a base"] = base, noise
        found[f"{dtype} extremes"] = ~base, base
    random = np.random.default_rng(11)
    common, rare = random.integers(0, 8, 70_001), 3 << random.integers(3, 61, 70_001)
    base = (weights(70_001, "float64") & np.uint64((1 << 52) - 1)) | np.uint64(1023 << 52)  # one context
    steps = np.where(random.random(70_001) < 0.997, common, rare >> random.integers(0, 2, 70_001)).astype(np.uint64)
    found["float64 many rare symbols"] = base + steps, base
    drifting = weights(300_000, "float32", seed=7)
    for steps in (3, 40, 120):
        found[f"float32 drift of {steps} steps"] = decayed(drifting, steps=steps), drifting
    return found


PAIRS = pairs()


@pytest.mark.parametrize("name", PAIRS)
def test_lanes_come_back_bit_for_bit(isa, name):
    x, base = PAIRS[name]
    assert decoded(coded(x, base), base) == x.tobytes()


@pytest.mark.parametrize("name", PAIRS)
def test_every_variant_writes_the_same_payload(name):
    x, base = PAIRS[name]
    payloads = set()
    for isa in variants():
        with running(isa):
            payloads.add(coded(x, base))
    assert len(payloads) == 1


@given(pair=chunk_pairs())
def test_any_lanes_come_back_bit_for_bit_from_one_payload(pair):
    x, base = (np.frombuffer(side, f"<u{pair.dtype.lane}") for side in (pair.chunk, pair.base))
    if x.size == 0:
        return
    payloads = set()
    for isa in variants():
        with running(isa):
            payloads.add(coded(x, base))
            for payload in payloads:
                assert decoded(payload, base) == x.tobytes()
    assert len(payloads) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_every_length_up_to_three_blocks_comes_back(isa, width):
    dtype = {1: "e4m3", 2: "bf16", 4: "float32", 8: "float64"}[width]
    base = weights(300, dtype)
    x = nudged(base, seed=1, spread=40)
    for length in range(1, 300):
        assert decoded(coded(x[:length], base[:length]), base[:length]) == x[:length].tobytes()


def test_encode_chooses_the_coder_where_it_wins_and_nothing_longer_than_it():
    for name in (
        "bf16 tuned 70001",
        "float16 tuned 70001",
        "float32 tuned 70001",
        "float64 tuned 70001",
        "bf16 sparse",
    ):
        x, base = PAIRS[name]
        found = encode(x.tobytes(), width=x.itemsize, floating=True, base=base.tobytes())
        assert found.encoding is Encoding.RESIDUAL_RANS
        assert found.payload == coded(x, base)
        out = bytearray(x.nbytes)
        decode(found.encoding, found.payload, out, width=x.itemsize, base=base.tobytes())
        assert bytes(out) == x.tobytes()


def test_a_long_chunk_with_its_signs_flipped_is_stored_as_xor():
    base = weights(100_000, "float32")
    encoding, payload = encode((base ^ np.uint32(1 << 31)).tobytes(), width=4, floating=True, base=base.tobytes())
    assert encoding is Encoding.XOR_PLANES
    assert len(payload) < 64


def test_drift_costs_less_than_a_tenth_of_a_bit():
    base = weights(200_000, "float32", seed=7)
    values = base.view(np.float32).copy()
    for _ in range(40):
        values *= np.float32(1 - 2e-7)
    assert 8 * len(coded(values.view(np.uint32), base)) < 0.1 * base.size


def test_a_hundredth_of_the_lanes_moved_by_a_step_costs_less_than_eleven_bits_each():
    base = weights(1 << 20, "bf16")
    moved = np.random.default_rng(0).random(base.size) < 0.01
    x = np.where(moved, base + np.uint16(1), base)
    assert 8 * len(coded(x, base)) < 11 * np.count_nonzero(moved)


def test_changes_of_small_lanes_alone_cost_less_than_to_say_where_they_are():
    base = weights(1 << 20, "bf16")
    small = (base & 0x7FFF) < np.quantile(base & 0x7FFF, 0.015)
    moved = small & (np.random.default_rng(0).random(base.size) < 0.6)
    assert 8 * len(coded(np.where(moved, base + np.uint16(1), base), base)) < 5 * np.count_nonzero(moved)


def test_blocks_that_equal_their_base_are_free():
    base = weights(1 << 20, "bf16")
    x = base.copy()
    x[:128] ^= np.arange(128, dtype=np.uint16)
    assert len(coded(x, base)) < 250


# The format, read as FORMAT.md says, by something that knows nothing else.


def documented_decode(payload: bytes, base: np.ndarray) -> list[int]:
    bits = 8 * base.itemsize
    mask, sign = (1 << bits) - 1, 1 << (bits - 1)
    header = Bits(payload)
    shift, low, streams, drift = header.take(6), header.take(12), 1 << header.take(3), header.take(1)
    offsets = np.cumsum([header.far() for _ in range(32)]).tolist() if drift else [0] * 32
    class_tables = [header.table(8) if header.take(1) else [2048] + [0] * 7 for _ in range(8)]
    tables = [header.table(32 + 2 * (bits - 5)) for _ in range(header.take(5))]
    table_of, current = {}, 0
    for block_class in range(1, 8):
        if len(tables) > 1 and any(table[block_class] for table in class_tables):
            for context in range(32):
                table_of[block_class, context] = current = current + header.near()
    words = Bits(payload[(header.at + 7) // 8 :])
    states = [words.take(32) for _ in range(streams)]

    def refilled(i: int, state: int) -> None:
        states[i % streams] = state << 16 | words.take(16) if state < 1 << 15 else state

    def symbol(i: int, table: list[int]) -> int:
        state = states[i % streams]
        value, first, found = state % 2048, 0, 0
        while not first <= value < first + table[found]:
            first, found = first + table[found], found + 1
        refilled(i, table[found] * (state // 2048) + value - first)
        return found

    def raw(i: int, count: int) -> int:
        state = states[i % streams]
        refilled(i, state >> count)
        return state & (1 << count) - 1

    def raw_bits(symbol: int) -> int:
        return 4 + (symbol - 32) // 2 if symbol >= 32 else 0

    def residual(symbol: int, below: int) -> int:
        return (2 | symbol % 2) << raw_bits(symbol) | below if symbol >= 32 else symbol

    def lane(b: int, z: int, offset: int) -> int:
        d = (z >> 1 ^ -(z & 1)) + offset
        ordered = b ^ (sign - 1) if b & sign else b
        ordered = (ordered + (-d if b & sign else d)) & mask
        return ordered ^ (sign - 1) if ordered & sign else ordered

    block_classes = [0]
    for block in range((base.size + 127) // 128):
        block_classes.append(symbol(block, class_tables[block_classes[-1]]))
    out = base.tolist()
    patching = 0

    def patch_block(block: range) -> None:
        nonlocal patching
        before, previous = 0, -1
        while found := symbol(patching, tables[table_of.get((1, min(31, before)), 0)]):
            position = raw(patching, 7)
            assert previous < position < len(block)
            parts = range(0, raw_bits(found), 15)
            below = sum(raw(patching, min(15, raw_bits(found) - done)) << done for done in parts)
            i = block[position]
            out[i] = lane(out[i], residual(found, below), 0)
            before, previous, patching = before + 1, position, patching + 1
        patching += 1

    def read_run(run: range, block_class: int) -> None:
        if block_class == 7:
            found_contexts = [out[i] >> 18 & 31 for i in run]
        else:
            found_contexts = [min(31, max(0, ((out[i] & ~sign) >> shift) - low)) for i in run]
        symbols, raws = [], [0] * len(run)
        for i, context in zip(run, found_contexts, strict=True):
            symbols.append(symbol(i, tables[table_of.get((block_class, context), 0)]))
        for done in range(0, bits, 15):
            for j, i in enumerate(run):
                count = min(15, raw_bits(symbols[j]) - done)
                if count > 0:
                    raws[j] |= raw(i, count) << done
        for j, i in enumerate(run):
            offset = offsets[found_contexts[j]] if block_class == 7 else 0
            out[i] = lane(out[i], residual(symbols[j], raws[j]), offset)

    for start in range(0, base.size, 128):
        block_class = block_classes[1 + start // 128]
        block = range(start, min(start + 128, base.size))
        if block_class == 1:
            patch_block(block)
        elif block_class > 1:
            for at in range(0, len(block), 32):
                read_run(block[at : at + 32], block_class)
    assert words.at == words.length
    assert states == [1 << 15] * streams
    return out


@pytest.mark.parametrize("name", [name for name, (x, _) in PAIRS.items() if x.size <= 5000])
def test_the_document_is_all_it_takes_to_read_a_payload(name):
    x, base = PAIRS[name]
    assert documented_decode(coded(x, base), base) == x.tolist()


@pytest.mark.parametrize("steps", [3, 120])
def test_the_document_is_all_it_takes_to_read_drift(steps):
    base = weights(40_000, "float32", seed=7)
    x = decayed(base, steps=steps)
    payload = coded(x, base)
    assert Bits(payload[2:]).take(16) >> 5 & 1 == 1  # drift, bit 21
    assert documented_decode(payload, base) == x.tolist()


# Payloads that lie.


def refused_or_decoded(payload: bytes, base: np.ndarray) -> bool:
    """Whether it is corruption; anything else gives as many bytes as the base has."""
    try:
        return len(decoded(payload, base)) != base.nbytes
    except CorruptionError:
        return True


DAMAGED = [
    "float32 patched 5000",
    "e4m3 tuned 129",
    "bf16 tuned 5000",
    "float16 sparse",
    "float32 tuned 5000",
    "float64 tuned 129",
]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_payload_with_any_byte_changed_is_corruption_or_other_lanes(isa, name):
    x, base = (side[:3000] for side in PAIRS[name])
    payload = coded(x, base)
    random = np.random.default_rng(0)
    refused = 0
    for at in range(len(payload)):
        for flip in {0xFF, 1, int(random.integers(1, 256))}:
            damaged = bytearray(payload)
            damaged[at] ^= flip
            refused += refused_or_decoded(bytes(damaged), base)
    # Raw bits are free to be anything, and most of what float64 needs.
    assert refused > len(payload) // 8


@pytest.mark.parametrize("name", DAMAGED)
def test_a_payload_cut_anywhere_or_longer_is_corruption(isa, name):
    x, base = (side[:3000] for side in PAIRS[name])
    payload = coded(x, base)
    assert decoded(payload, base) == x.tobytes()
    for stop in range(len(payload)):
        assert refused_or_decoded(payload[:stop], base), stop
    for more in (b"\x00", b"\x00\x00", payload):
        assert refused_or_decoded(payload + more, base)


@given(data=st.binary(max_size=400), width=st.sampled_from(WIDTHS))
def test_bytes_that_are_no_payload_are_corruption(data, width):
    base = np.arange(400, dtype=f"<u{width}")
    for isa in variants():
        with running(isa):
            refused_or_decoded(data, base)


@given(pair=chunk_pairs(), data=st.data())
def test_damage_anywhere_never_escapes(pair: ChunkPair, data):
    x, base = (np.frombuffer(side, f"<u{pair.dtype.lane}") for side in (pair.chunk, pair.base))
    if x.size == 0:
        return
    payload = bytearray(coded(x, base))
    for at in data.draw(st.lists(st.integers(0, 8 * len(payload) - 1), min_size=1, max_size=6)):
        payload[at // 8] ^= 1 << at % 8
    other = data.draw(lanes(base.itemsize, base.size))
    for isa in variants():
        with running(isa):
            refused_or_decoded(bytes(payload), base)
            refused_or_decoded(bytes(payload), other)


def header(*, shift=7, low=100, log_streams=0, drift=0) -> Writer:
    return Writer().put(shift, 6).put(low, 12).put(log_streams, 3).put(drift, 1)


def class_tables(writer: Writer, *, block_class: int = 2) -> Writer:
    """After every class comes ``block_class``, for certain."""
    for _ in range(8):
        writer.put(1, 1).put(block_class, 3).put(block_class, 3)
        for symbol in range(block_class):
            writer.near(-6 if symbol < 2 else 0)
    return writer


def constant_table(writer: Writer) -> Writer:
    """Symbol 0 for certain."""
    return writer.put(0, 6).put(0, 6)


STATE = (1 << 15).to_bytes(4, "little")
ONE_TABLE = constant_table(class_tables(header()).put(1, 5))
GOOD = Writer()
GOOD.value, GOOD.length = ONE_TABLE.value, ONE_TABLE.length
GOOD_HEADER = GOOD.bytes()


def lying_drift(number_bits: int) -> bytes:
    return header(drift=1).put(1 << number_bits, number_bits + 1).put(0, 64).bytes() + bytes(400)


def patches(symbol: int, *, bits: int = 0) -> Writer:
    """All blocks are patched, by this symbol for certain; the state gives these bits first."""
    writer = class_tables(header(), block_class=1).put(1, 5).put(symbol, 6).put(symbol, 6)
    for s in range(symbol):
        writer.near(-6 if s < 2 else 0)
    writer.put(0, -writer.length % 8)
    return writer.put(1 << 30 | bits, 32)


def patches_at(positions: list[int]) -> bytes:
    """A patch at each of these places, and then one at 0 of a state that has nothing left."""
    state, words = 1 << 15, b""
    for position in reversed(positions):
        if state >> (31 - 7):
            state, words = state >> 16, (state & 0xFFFF).to_bytes(2, "little") + words
        state = state << 7 | position
    return patches(1, bits=state ^ 1 << 30).bytes() + words


LIES = {
    "a patch before forty others": (patches_at([*range(40), 3]), "patches what is none"),
    "a patch before another": (patches(1, bits=5 | 5 << 7).bytes() + bytes(8), "patches what is none"),
    "a patch outside of its block": (
        patches(1, bits=126 | 127 << 7).bytes() + (1 | 1 << 7).to_bytes(2, "little"),
        "patches what is none",
    ),
    "patches that end before their places": (patches(1, bits=5 | 6 << 7).bytes(), "patches what is none"),
    "patches that end within a residual": (patches(53).bytes(), "patches what is none"),
    "nothing": (b"", r"header|symbols|frequency|table"),
    "a context outside of the lane": (header(shift=16).put(0, 400).bytes(), "context"),
    "64 streams": (header(log_streams=6).put(0, 400).bytes(), "streams"),
    "drift in two bytes": (header(drift=1).put(0, 400).bytes(), "drift"),
    "a class table with a peak that is not there": (
        header().put(1, 1).put(2, 3).put(3, 3).put(0, 400).bytes(),
        "symbols",
    ),
    "drifting blocks without a drift": (
        constant_table(class_tables(header(), block_class=7).put(1, 5)).bytes() + STATE,
        "without a drift",
    ),
    "no table": (class_tables(header()).put(0, 5).bytes() + STATE, "tables"),
    "17 tables": (class_tables(header()).put(17, 5).put(0, 900).bytes() + STATE, "tables"),
    "a symbol that lanes of two bytes do not have": (
        class_tables(header()).put(1, 5).put(54, 6).put(0, 6).put(0, 400).bytes(),
        "symbols",
    ),
    "a frequency of a negative length": (
        class_tables(header()).put(1, 5).put(1, 6).put(1, 6).near(-7).put(0, 400).bytes(),
        "frequency",
    ),
    "a frequency of twelve bits": (
        class_tables(header()).put(1, 5).put(1, 6).put(1, 6).near(6).put(0, 400).bytes(),
        "frequency",
    ),
    "a length that never ends": (class_tables(header()).put(1, 5).put(1, 6).put(1, 6).put(0, 400).bytes(), "frequency"),
    "frequencies that are more than all": (
        class_tables(header()).put(1, 5).put(2, 6).put(2, 6).near(5).put(7, 3).near(5).put(7, 3).put(0, 400).bytes(),
        "more than all",
    ),
    "a context of a table that is not there": (
        constant_table(constant_table(class_tables(header()).put(2, 5))).near(2).put(0, 400).bytes(),
        "context",
    ),
    "a context of table -1": (
        constant_table(constant_table(class_tables(header()).put(2, 5))).near(-1).put(0, 400).bytes(),
        "context",
    ),
    "a header that is not padded with zeros": (
        GOOD_HEADER[:-1] + bytes([GOOD_HEADER[-1] | 0x80]) + STATE,
        "middle of a byte",
    ),
    "no states": (GOOD_HEADER, "states"),
    "half a state": (GOOD_HEADER + STATE[:2], "states"),
    "half a word": (GOOD_HEADER + STATE + b"\x00", "states"),
    "a state that is too low": (GOOD_HEADER + (2**15 - 1).to_bytes(4, "little"), "state out of range"),
    "a state that is too high": (GOOD_HEADER + (2**31).to_bytes(4, "little"), "state out of range"),
    "a last state that is another": (GOOD_HEADER + (2**15 + 1).to_bytes(4, "little"), "does not end"),
    "a word too many": (GOOD_HEADER + STATE + b"\x00\x00", "does not end"),
}


def test_a_payload_written_by_hand_is_a_good_one_so_that_the_bad_ones_fail_for_their_reason(isa):
    base = np.arange(1000, dtype=np.uint16)
    assert decoded(GOOD_HEADER + STATE, base) == base.tobytes()


@pytest.mark.parametrize(("payload", "lie"), LIES.values(), ids=LIES)
def test_a_payload_that_lies_is_corruption(isa, payload, lie):
    with pytest.raises(CorruptionError, match=lie):
        decoded(payload, np.arange(1000, dtype=np.uint16))


@pytest.mark.parametrize("zeros", [33, 34, 35, 60])
def test_a_drift_beyond_32_bits_is_corruption(isa, zeros):
    with pytest.raises(CorruptionError, match=r"drift out of range|header"):
        decoded(lying_drift(zeros), np.arange(1000, dtype=np.uint32))


def test_the_coder_refuses_memory_that_does_not_fit():
    eight, four, empty = np.zeros(8, np.uint8), np.zeros(4, np.uint8), np.zeros(0, np.uint8)
    workspace = np.zeros(_kernels.coder_workspace(8, 2), np.uint8)
    refused = [
        lambda: _kernels.coder_workspace(9, 2),
        lambda: _kernels.coder_workspace(9, 3),
        lambda: _kernels.coder_workspace((4 << 20) + 8, 8),
        lambda: _kernels.residual_encode(eight, four, 2, workspace, eight.copy()),
        lambda: _kernels.residual_encode(empty, empty, 2, workspace, eight.copy()),
        lambda: _kernels.residual_encode(eight, eight, 3, workspace, eight.copy()),
        lambda: _kernels.residual_encode(eight, eight, 2, four, eight.copy()),
        lambda: _kernels.residual_decode(eight, four, 2, workspace, eight.copy()),
        lambda: _kernels.residual_decode(eight, empty, 2, workspace, empty.copy()),
        lambda: _kernels.residual_decode(eight, eight, 2, four, eight.copy()),
    ]
    for call in refused:
        with pytest.raises(ValueError, match="must"):
            call()


def test_a_payload_that_does_not_fit_is_none():
    x, base = PAIRS["bf16 noise"]
    workspace = np.empty(_kernels.coder_workspace(x.nbytes, 2), np.uint8)
    for room in (0, 1, 10, 100, 1000, x.nbytes // 2):
        memory = np.full(room + 64, 0xA5, np.uint8)
        assert _kernels.residual_encode(x.view(np.uint8), base.view(np.uint8), 2, workspace, memory[:room]) == 0
        assert set(memory[room:]) == {0xA5}
