"""What is measured while it is decoded is measured as if it had been decoded first, bit for bit, whatever its bits."""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import chunk_pairs, lanes
from support import new_repository

from lamella_engine import _kernels, casts, codecs
from lamella_engine.casts import Cast
from lamella_engine.codecs import Encoding
from lamella_engine.content_store.decoding import decode_chain, measure_chains
from lamella_engine.content_store.seam import Blob
from lamella_engine.dtypes import DTYPES, Dtype, dtype_named
from lamella_engine.errors import CorruptionError, InvalidInputError
from lamella_engine.format.digests import chunk_id
from lamella_engine.moments import Moments, moments

ISAS = ("scalar", _kernels.isa())
NUMBERS = tuple(dtype for dtype in DTYPES if not dtype.opaque)
WIDTHS = (1, 2, 4, 8)

# Of lanes: shorter than a block, around one, around a slice of 4 KiB of each width, and several slices with a tail.
LENGTHS = (1, 7, 8, 127, 128, 129, 511, 512, 513, 1000, 2048, 2049, 4096 + 130, 9001)


@contextmanager
def running(isa: str) -> Iterator[None]:
    before = _kernels.isa()
    _kernels.set_isa(isa)
    try:
        yield
    finally:
        _kernels.set_isa(before)


def coded(chunk: bytes, base: bytes, width: int) -> bytes:
    workspace = np.empty(_kernels.coder_workspace(len(chunk), width), np.uint8)
    room = np.empty(2 * len(chunk) + 4096, np.uint8)
    source, reference = np.frombuffer(chunk, np.uint8), np.frombuffer(base, np.uint8)
    nbytes = _kernels.residual_encode(source, reference, width, workspace, room)
    assert nbytes
    return room[:nbytes].tobytes()


def bits(found: Moments) -> tuple[int, int, bytes]:
    count, changed, *sums = astuple(found)
    return count, changed, struct.pack("<6d", *sums)


def nudged(base: bytes, width: int, *, seed: int) -> bytes:
    """Return the lanes with half of their blocks moved a little, a few lanes in some anywhere, and one in one."""
    random = np.random.default_rng(seed)
    x = np.frombuffer(base, f"<u{width}").copy()
    for first in range(0, x.size, 128):
        block = x[first : first + 128]
        kind = random.integers(0, 6)
        if kind < 3:
            block += random.integers(0, 5, block.size).astype(x.dtype)
        elif kind == 3:
            block[:: random.integers(1, 60)] = np.frombuffer(random.bytes(width), x.dtype)[0]
        elif kind == 4:
            block[random.integers(0, block.size)] ^= x.dtype.type(1)
    return x.tobytes()


def specials(width: int, length: int, *, seed: int) -> bytes:
    """Return lanes of which many are infinite, NaN, zeros of both signs or subnormal, in runs and alone."""
    random = np.random.default_rng(seed)
    x = np.frombuffer(random.bytes(length * width), f"<u{width}").copy()
    top = {1: [0x7C, 0x7F, 0x80, 0], 2: [0x7C00, 0x7F80, 0x7FC1, 0x8000]}.get(width)
    if top is None:
        top = {4: [0x7F800000, 0xFF800000, 0x7FC00001, 0x80000000]}.get(width, [0x7FF << 52, 0xFFF << 52, 1 << 63, 1])
    for first in range(0, length, 40):
        x[first : first + random.integers(0, 20)] = top[random.integers(0, 4)]
    return x.tobytes()


def weights(dtype: Dtype, length: int, *, seed: int) -> bytes:
    assert dtype.numpy is not None
    if dtype.numpy.kind in "biu":
        return np.random.default_rng(seed).bytes(length * dtype.lane)
    lane = np.dtype(f"f{dtype.lane}") if dtype.numpy.kind == "c" else dtype.numpy
    return (np.random.default_rng(seed).standard_normal(length) * 0.05).astype(lane).tobytes()


def check_all_ways(chunk: bytes, base: bytes, dtype: Dtype, width: int, payload: bytes) -> None:
    """Against its base, itself, and something else: one result, from every variant."""
    with running("scalar"):
        expected = [bits(moments(other, chunk, dtype)) for other in (base, chunk, base[::-1])]
    for isa in ISAS:
        with running(isa):
            found = [
                bits(codecs.measure(payload, other, dtype, width=width, base=base))
                for other in (base, chunk, base[::-1])
            ]
        assert found == expected, isa


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
def test_a_delta_is_measured_as_what_it_decodes_to(dtype: Dtype):
    per_element = dtype.bits // 8 // dtype.lane
    for length in LENGTHS:
        for seed, make in enumerate((weights, lambda dtype, length, seed: specials(dtype.lane, length, seed=seed))):
            base = make(dtype, length * per_element, seed=seed)
            chunk = nudged(base, dtype.lane, seed=length)
            check_all_ways(chunk, base, dtype, dtype.lane, coded(chunk, base, dtype.lane))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["bool", "float16", "float32", "complex128"])
def test_the_lanes_of_the_payload_may_be_of_another_width_than_the_elements(width, name):
    """One chunk of two tensors is stored once, with the width of the one that came first."""
    for nbytes in (16, 128, 4096, 16 * 1000):
        base = specials(8, nbytes // 8, seed=width)
        chunk = nudged(base, width, seed=nbytes)
        check_all_ways(chunk, base, dtype_named(name), width, coded(chunk, base, width))


@given(pair=chunk_pairs(NUMBERS), data=st.data())
def test_any_bits_are_measured_as_what_they_decode_to(pair, data):
    width = pair.dtype.lane
    if not pair.chunk:
        return
    payload = coded(pair.chunk, pair.base, width)
    check_all_ways(pair.chunk, pair.base, pair.dtype, width, payload)
    other = data.draw(lanes(width, len(pair.base) // width)).tobytes()
    found = codecs.measure(payload, other, pair.dtype, width=width, base=pair.base)
    assert bits(found) == bits(moments(other, pair.chunk, pair.dtype))


@given(pair=chunk_pairs(NUMBERS))
def test_swapped_moments_are_those_of_the_swapped_chunks(pair):
    found = moments(pair.chunk, pair.base, pair.dtype)
    assert bits(found.swapped) == bits(moments(pair.base, pair.chunk, pair.dtype))


def test_a_nan_in_one_slice_leaves_what_other_slices_say_of_infinities():
    """Lanes that are equal and infinite differ by 0, whether a NaN came before, comes later, or never."""
    float32 = dtype_named("float32")
    base = np.frombuffer(weights(float32, 6000, seed=1), "<f4").copy()
    base[100:5900:512] = math.inf
    chunk = base.copy()
    chunk[1::3] += np.float32(1e-3)
    for at in (None, 0, 2000, 5999):
        odd = chunk.copy()
        if at is not None:
            odd[at] = math.nan
        payload = coded(odd.tobytes(), base.tobytes(), 4)
        check_all_ways(odd.tobytes(), base.tobytes(), float32, 4, payload)
        found = codecs.measure(payload, base.tobytes(), float32, width=4, base=base.tobytes())
        assert math.isnan(found.squared_difference) == math.isnan(found.largest_difference) == (at is not None)


def decoded_or_fault(payload: bytes, base: bytes, dtype: Dtype) -> tuple[bytes, str | None]:
    out = bytearray(len(base))
    try:
        codecs.decode(Encoding.RESIDUAL_RANS, payload, out, width=dtype.lane, base=base)
    except CorruptionError as error:
        return b"", str(error)
    return bytes(out), None


def measured_or_fault(payload: bytes, base: bytes, dtype: Dtype) -> tuple[Moments, str | None]:
    try:
        return codecs.measure(payload, base, dtype, width=dtype.lane, base=base), None
    except CorruptionError as error:
        return Moments(), str(error)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "bfloat16", "float32", "float64"])
def test_damage_is_corruption_exactly_where_decoding_says_so(name):
    dtype = dtype_named(name)
    base = weights(dtype, 1300, seed=3)
    payload = coded(nudged(base, dtype.lane, seed=4), base, dtype.lane)
    random = np.random.default_rng(5)
    damaged = [payload[:stop] for stop in range(0, len(payload), 7)] + [payload + b"\0", payload + b"\0\0"]
    for at in range(0, len(payload), 3):
        changed = bytearray(payload)
        changed[at] ^= int(random.integers(1, 256))
        damaged.append(bytes(changed))
    refused = 0
    for lie, isa in product(damaged, ISAS):
        with running(isa):
            out, fault = decoded_or_fault(lie, base, dtype)
            measured, same_fault = measured_or_fault(lie, base, dtype)
        assert same_fault == fault
        assert fault or bits(measured) == bits(moments(base, out, dtype))
        refused += fault is not None
    assert len(damaged) // 4 < refused < 2 * len(damaged)


@given(data=st.binary(max_size=400), width=st.sampled_from(WIDTHS))
def test_bytes_that_are_no_payload_are_corruption(data, width):
    base = np.arange(400, dtype=f"<u{width}").tobytes()
    dtype = dtype_named(f"uint{8 * width}")
    out, fault = decoded_or_fault(data, base, dtype)
    measured, same_fault = measured_or_fault(data, base, dtype)
    assert same_fault == fault
    assert fault or bits(measured) == bits(moments(base, out, dtype))


def test_wrong_calls_are_corruption_or_invalid_input():
    base = bytes(1024)
    payload = coded(base[:-1] + b"\1", base, 4)
    float32 = dtype_named("float32")
    for fields in ({"base": None}, {"base": base[:-4]}, {"width": 3}):
        with pytest.raises(CorruptionError):
            codecs.measure(payload, base, float32, **{"width": 4, "base": base} | fields)
    with pytest.raises(CorruptionError):
        codecs.measure(b"", b"", float32, width=4, base=b"")
    for other, dtype in ((base[:-1], float32), (base, next(dtype for dtype in DTYPES if dtype.opaque))):
        with pytest.raises(InvalidInputError):
            codecs.measure(payload, other, dtype, width=4, base=base)


def test_the_kernel_refuses_memory_that_does_not_fit():
    eight, four, empty = np.zeros(8, np.uint8), np.zeros(4, np.uint8), np.zeros(0, np.uint8)
    workspace = np.zeros(_kernels.coder_workspace(8, 2), np.uint8)
    int16, table8 = _kernels.Kind.INT16, _kernels.Kind.TABLE8
    for arguments in (
        (eight, eight, four, 2, workspace, int16),
        (empty, eight, empty, 2, workspace, int16),
        (eight, eight, eight, 3, workspace, int16),
        (eight, eight, eight, 2, four, int16),
        (eight, eight, eight, 2, workspace, _kernels.Kind.COMPLEX128),
        (eight, eight, eight, 2, workspace, table8),
        (eight, eight, eight, 2, workspace, int16, np.zeros(256)),
    ):
        with pytest.raises(ValueError, match=r"must|goes"):
            _kernels.residual_moments(*arguments)


# -- chains ------------------------------------------------------------------------------------------------------------

FLOAT32 = dtype_named("float32")


def family(count: int) -> list[np.ndarray]:
    """Return arrays each near the one before, with infinities and NaNs that stay and some that come and go."""
    base = np.frombuffer(weights(FLOAT32, 5000, seed=7), "<f4").copy()
    base[[3, 1500, 4999]] = [math.inf, math.nan, -0.0]
    found = [base]
    for seed in range(1, count):
        step = np.frombuffer(nudged(found[-1].tobytes(), 4, seed=seed), "<f4").copy()
        step[1000 + seed] = math.nan if seed % 2 else math.inf
        found.append(step)
    return found


X, Y, Z, W, V = family(5)


def blob(array: np.ndarray, base: np.ndarray | None = None, *, encoding: Encoding = Encoding.RESIDUAL_RANS) -> Blob:
    data = array.tobytes()
    if base is None:
        return Blob(chunk_id(data), Encoding.RAW, 4, len(data), data, None)
    against = base.tobytes()
    if encoding is Encoding.RESIDUAL_RANS:
        payload = coded(data, against, 4)
    else:
        encoding, payload = codecs.encode(data, width=4, floating=False, base=against)
        assert encoding is Encoding.XOR_PLANES
    return Blob(chunk_id(data), encoding, 4, len(data), payload, chunk_id(against))


XOR = Encoding.XOR_PLANES
CHAINS = {
    "a full blob each": ([blob(X)], [blob(Y)]),
    "the second stands on the first": ([blob(X)], [blob(Y, X)]),
    "the second stands on the first, and begins after it": ([blob(X)], [blob(Y, X)]),
    "the first stands on the second": ([blob(X), blob(Y, X)], [blob(X)]),
    "the same": ([blob(X), blob(Y, X)], [blob(X), blob(Y, X)]),
    "the same chunk of two copies": ([blob(X), blob(Y, X)], [blob(Y)]),
    "siblings": ([blob(X), blob(Y, X)], [blob(X), blob(Z, X)]),
    "cousins": ([blob(X), blob(Y, X), blob(W, Y)], [blob(X), blob(Z, X), blob(V, Z)]),
    "a grandchild": ([blob(X)], [blob(X), blob(Y, X), blob(Z, Y)]),
    "a grandparent": ([blob(X), blob(Y, X), blob(Z, Y)], [blob(X)]),
    "nothing in common": ([blob(X), blob(Y, X)], [blob(Z), blob(W, Z)]),
    "planes on the first": ([blob(X)], [blob(Y, X, encoding=XOR)]),
    "the first has planes on the second": ([blob(X), blob(Y, X, encoding=XOR)], [blob(X)]),
    "planes below": ([blob(X)], [blob(Y, X, encoding=XOR), blob(Z, Y)]),
}


def decoded(chain: list[Blob]) -> bytes:
    out = bytearray(chain[-1].decoded_nbytes)
    decode_chain(chain, memoryview(out))
    return bytes(out)


def definition(a: bytes, b: bytes) -> tuple[int, list[float]]:
    """Return how many differ, and the sums of their definitions in float64."""
    bits_differ = np.frombuffer(a, "<u4") != np.frombuffer(b, "<u4")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x, y = (np.frombuffer(side, "<f4").astype(np.float64) for side in (a, b))
        difference = np.abs(np.where(bits_differ, x - y, 0.0))
        sums = [(difference**2).sum(), difference.sum(), difference.max(), (x * y).sum(), (x * x).sum(), (y * y).sum()]
    return int(bits_differ.sum()), [float(total) for total in sums]


@pytest.mark.parametrize("check", [False, True], ids=["", "checked"])
@pytest.mark.parametrize("way", CHAINS)
def test_every_way_gives_what_decoding_both_gives(way, check):
    first, second = CHAINS[way]
    a, b = decoded(first), decoded(second if second[0].base is None else [*first, *second])
    found = measure_chains(first, second, FLOAT32, check=check)
    assert bits(found) == bits(moments(a, b, FLOAT32))
    changed, sums = definition(a, b)
    assert found.changed == changed
    for one, expected in zip(astuple(found)[2:], sums, strict=True):
        assert one == expected or math.isclose(one, expected, rel_tol=1e-12) or (one != one and expected != expected)


def test_chunks_that_stand_on_one_of_another_length_are_measured_too():
    """Casts of a chunk: it is decoded once, and what stands on it by a cast is decoded whole."""
    half = np.empty(X.nbytes // 2, np.uint8)
    casts.apply(Cast.FLOAT32_TO_BFLOAT16, X.view(np.uint8), half)
    nudge = np.frombuffer(nudged(half.tobytes(), 2, seed=1), "<u2")
    payloads = (b"", coded(nudge.tobytes(), half.tobytes(), 2))
    one, other = (
        Blob(
            chunk_id(data),
            Encoding.CAST,
            2,
            half.nbytes,
            bytes([Cast.FLOAT32_TO_BFLOAT16]) + payload,
            chunk_id(X.tobytes()),
        )
        for data, payload in zip((half.tobytes(), nudge.tobytes()), payloads, strict=True)
    )
    bfloat16 = dtype_named("bfloat16")
    found = measure_chains([blob(X), one], [blob(X), other], bfloat16, check=True)
    assert bits(found) == bits(moments(half.tobytes(), nudge.tobytes(), bfloat16))
    with pytest.raises(CorruptionError):
        measure_chains([blob(X), one], [blob(X)], bfloat16)


def test_of_the_same_chunk_nothing_more_needs_be_read():
    found = measure_chains([blob(X), blob(Y, X)], [], FLOAT32)
    assert bits(found) == bits(moments(Y.tobytes(), Y.tobytes(), FLOAT32))


@pytest.mark.parametrize(
    ("way", "decodes"),
    [
        ("the second stands on the first", 1),
        ("the first stands on the second", 1),
        ("the same", 2),
        ("siblings", 2),
        ("cousins", 4),
        ("a grandchild", 2),
        ("nothing in common", 3),
        ("planes on the first", 2),
    ],
)
def test_what_is_shared_is_decoded_once_and_the_last_delta_is_not_decoded(way, decodes, monkeypatch):
    done = []
    decode = codecs.decode
    monkeypatch.setattr(codecs, "decode", lambda *args, **kwargs: done.append(decode(*args, **kwargs)))
    measure_chains(*CHAINS[way], FLOAT32)
    assert len(done) == decodes


def test_chains_that_do_not_fit_are_corruption():
    x, y, z = blob(X), blob(Y, X), blob(Z, Y)
    odd = [
        ([y], [x], "bad_chain"),
        ([x], [z], "bad_chain"),
        ([x, z], [x], "bad_chain"),
        ([x], [x, y, replace(z, base=None)], "bad_chain"),
        ([x], [blob(X[:-4]), blob(Y[:-4], X[:-4])], "bad_length"),
        ([x], [blob(X[:-4])], "bad_length"),
        ([x], [replace(y, decoded_nbytes=y.decoded_nbytes - 4)], "bad_length"),
    ]
    for first, second, kind in odd:
        with pytest.raises(CorruptionError) as caught:
            measure_chains(first, second, FLOAT32)
        assert caught.value.kind == kind


LIAR = chunk_id(b"another chunk")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([blob(X)], [replace(blob(Y, X), chunk=LIAR)]),
        ([blob(X), replace(blob(Y, X), chunk=LIAR)], [blob(X)]),
        ([replace(blob(X), payload=W.tobytes())], [blob(Y, X)]),
        ([blob(Y)], [replace(blob(X), payload=W.tobytes())]),
        ([replace(blob(X), payload=W.tobytes())], [blob(X)]),
        ([blob(X), replace(blob(Y, X), chunk=LIAR)], [blob(X), blob(Z, X)]),
        ([blob(X), blob(Y, X)], [blob(X), replace(blob(Z, X), chunk=LIAR)]),
    ],
)
def test_a_blob_that_lies_about_its_chunk_is_found_if_chunks_are_checked(first, second):
    with pytest.raises(CorruptionError) as caught:
        measure_chains(first, second, FLOAT32, check=True)
    assert caught.value.kind == "bad_chunk"


# -- versions ----------------------------------------------------------------------------------------------------------


def test_versions_are_as_far_apart_as_their_tensors_however_they_stand_on_one_another():
    """One line with a step back, and a branch: every pair of versions, both ways round."""
    repo = new_repository()
    main, side = [X, Y, Z, X, W], [V, Y]
    for array in main:
        repo.push({"w": array, "same": X}, "m@main")
    for array in side:
        repo.push({"w": array, "same": X}, "m@side", parent="m@v1" if array is side[0] else None)
    arrays = [*main, *side]
    for (i, a), (j, b) in product(enumerate(arrays, 1), repeat=2):
        found = repo.distance(f"m@v{i}", f"m@v{j}")
        expected = moments(a.tobytes(), b.tobytes(), FLOAT32)
        part = found.per_tensor["w"]
        assert part.changed_count == found.changed_count == expected.changed
        assert repr((part.l2, part.l1, part.linf)) == repr(
            (math.sqrt(expected.squared_difference), expected.absolute_difference, expected.largest_difference)
        )
        assert math.isnan(part.cosine)  # of infinities, as NumPy has it
