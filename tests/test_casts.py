"""A chunk that is another one in a wider or a narrower type stores which cast, and nothing else."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella_engine import casts
from lamella_engine.casts import Cast
from lamella_engine.codecs import Encoding, decode, encode, is_near_cast
from lamella_engine.errors import CorruptionError, UnsupportedFormatError

TYPES = {
    Cast.FLOAT32_TO_BFLOAT16: (np.float32, ml_dtypes.bfloat16),
    Cast.FLOAT32_TO_FLOAT16: (np.float32, np.float16),
    Cast.BFLOAT16_TO_FLOAT32: (ml_dtypes.bfloat16, np.float32),
    Cast.FLOAT16_TO_FLOAT32: (np.float16, np.float32),
}


def cast_bits(cast: Cast, source: np.ndarray) -> np.ndarray:
    out = np.empty(source.size, f"<u{cast.width}")
    casts.apply(cast, source.view(np.uint8), out.view(np.uint8))
    return out


def weights(count: int, *, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(np.float32)


def every_16_bits() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16)


def around_every_16_bits() -> np.ndarray:
    """The float32 of every bfloat16 and float16, their neighbours, and those halfway to the next."""
    exact = np.concatenate(
        [cast_bits(Cast.BFLOAT16_TO_FLOAT32, every_16_bits()), cast_bits(Cast.FLOAT16_TO_FLOAT32, every_16_bits())]
    )
    return np.concatenate(
        [exact + np.uint32(step) for step in (0, 1, -1 % 2**32, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000)]
    )


@pytest.mark.parametrize("cast", Cast)
def test_values_are_those_of_the_nearest_and_ties_go_to_even(cast):
    before, after = TYPES[cast]
    source = every_16_bits() if cast.source_width == 2 else around_every_16_bits()
    numbers = source.view(before)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = numbers.astype(after).view(f"<u{cast.width}")
    finite = ~np.isnan(numbers.astype(np.float32))
    assert cast_bits(cast, source)[finite].tobytes() == expected[finite].tobytes()


def test_nan_keeps_its_sign_and_the_top_of_its_payload():
    source = np.array([0x7F800001, 0xFFABCDEF, 0x7FC00000], np.uint32)
    assert cast_bits(Cast.FLOAT32_TO_BFLOAT16, source).tolist() == [0x7FC0, 0xFFEB, 0x7FC0]
    assert cast_bits(Cast.FLOAT32_TO_FLOAT16, source).tolist() == [0x7E00, 0xFF5E, 0x7E00]
    assert cast_bits(Cast.FLOAT16_TO_FLOAT32, np.array([0x7C01, 0xFE00], np.uint16)).tolist() == [
        0x7F802000,
        0xFFC00000,
    ]


@pytest.mark.parametrize("cast", Cast)
@pytest.mark.parametrize("count", [1, 127, 4099])
def test_an_exact_cast_takes_one_byte(cast, count):
    before, after = TYPES[cast]
    base = weights(count).astype(before)
    chunk = base.astype(after).tobytes()
    encoding, payload = encode(chunk, width=cast.width, floating=True, base=base.tobytes())
    if count > 1:  # one lane is a constant
        assert (encoding, payload) == (Encoding.CAST, bytes([cast]))
    out = bytearray(len(chunk))
    decode(Encoding.CAST, bytes([cast]), out, width=cast.width, base=base.tobytes())
    assert out == chunk


@pytest.mark.parametrize("cast", Cast)
def test_a_tuned_copy_in_another_type_is_a_delta_against_the_cast(cast):
    before, after = TYPES[cast]
    base = weights(1 << 14).astype(before)
    tuned = (weights(1 << 14) + weights(1 << 14, seed=1) * 0.001).astype(after).tobytes()
    encoding, payload = encode(tuned, width=cast.width, floating=True, base=base.tobytes())
    alone = encode(tuned, width=cast.width, floating=True)
    assert encoding is Encoding.CAST
    assert len(payload) < 0.9 * len(alone.payload)
    out = bytearray(len(tuned))
    decode(encoding, payload, out, width=cast.width, base=base.tobytes())
    assert out == tuned


@given(st.binary(max_size=2000), st.integers(0, 2**32))
def test_a_base_of_another_width_never_costs_more_than_its_number(data, seed):
    chunk = data[: len(data) // 4 * 4]
    base = np.random.default_rng(seed).bytes(len(chunk) // 2)
    with_base = encode(chunk, width=4, floating=True, base=base or None)
    assert len(with_base.payload) <= len(encode(chunk, width=4, floating=True).payload)
    out = bytearray(len(chunk))
    decode(*with_base, out, width=4, base=base)
    assert out == chunk


@pytest.mark.parametrize(
    ("payload", "width", "base_nbytes"),
    [
        (b"", 2, 400),
        (b"\x00", 2, 398),
        (b"\x00", 2, 200),
        (b"\x00", 4, 400),
        (b"\x02", 2, 100),
        (b"\x00\x00", 2, 400),
        (b"\x01" + bytes(40), 2, 400),
    ],
)
def test_a_malformed_cast_is_corruption(payload, width, base_nbytes):
    with pytest.raises(CorruptionError):
        decode(Encoding.CAST, payload, bytearray(200), width=width, base=bytes(base_nbytes))


def test_a_cast_without_its_base_is_corruption_and_one_of_the_future_asks_for_an_upgrade():
    with pytest.raises(CorruptionError):
        decode(Encoding.CAST, b"\x00", bytearray(200), width=2)
    with pytest.raises(UnsupportedFormatError):
        decode(Encoding.CAST, b"\x04", bytearray(200), width=2, base=bytes(400))


def test_the_numbers_of_casts_never_change():
    assert {cast.name: cast.value for cast in Cast} == {
        "FLOAT32_TO_BFLOAT16": 0,
        "FLOAT32_TO_FLOAT16": 1,
        "BFLOAT16_TO_FLOAT32": 2,
        "FLOAT16_TO_FLOAT32": 3,
    }


def test_some_lanes_tell_what_may_be_a_cast():
    source = weights(5000)
    short = source.astype(ml_dtypes.bfloat16)
    near = (source * np.float32(1.01)).astype(ml_dtypes.bfloat16)
    other = weights(5000, seed=1).astype(ml_dtypes.bfloat16)
    found = [is_near_cast(target.tobytes(), source.tobytes(), width=2) for target in (short, near, other, short[:4999])]
    assert found == [True, True, False, False]
    assert is_near_cast(source.tobytes(), short.tobytes(), width=4)
    assert not is_near_cast(b"", b"", width=2)
