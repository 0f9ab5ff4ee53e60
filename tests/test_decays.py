"""Decays: what an optimizer's second moments are to those before, exactly as FORMAT.md says, on any bits."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella_engine import _kernels, decays
from lamella_engine.codecs import Encoding, decode, encode
from lamella_engine.decays import Decay
from lamella_engine.errors import CorruptionError

BETA2 = np.float32(0.999)


def moments(count: int, *, steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return second moments of gradients, some of which are always 0, and those ``steps`` steps later."""
    random = np.random.default_rng(seed)
    size = np.exp(random.standard_normal(count) * 2 - 8).astype(np.float32)
    size[random.random(count) < 0.1] = 0
    size[: count // 4] = 0
    before = (size * size * np.float32(0.05)).astype(np.float32)
    after = before.copy()
    unseen = random.random(count) < 0.2
    for _ in range(steps):
        gradient = np.where(unseen, 0, size * random.standard_normal(count)).astype(np.float32)
        after = after * BETA2 + (1 - BETA2) * gradient * gradient
    return before, after


def coded(after: np.ndarray, before: np.ndarray) -> tuple[Encoding, bytes]:
    return encode(after.tobytes(), width=4, floating=True, base=before.tobytes())


@pytest.mark.parametrize("steps", [1, 40, 1000])
def test_second_moments_are_coded_against_what_is_left_of_those_before(steps):
    before, after = moments(100_000, steps=steps)
    encoding, payload = coded(after, before)
    assert encoding is Encoding.DECAYED_RANS
    out = np.empty_like(after)
    decode(encoding, payload, out.view(np.uint8), width=4, base=before.tobytes())
    assert out.tobytes() == after.tobytes()


def test_a_decay_saves_a_bit_of_every_lane():
    before, after = moments(100_000, steps=40)
    _, payload = coded(after, before)
    workspace, out = np.empty(_kernels.coder_workspace(after.nbytes, 4), np.uint8), np.empty(after.nbytes, np.uint8)
    plain = _kernels.residual_encode(after.view(np.uint8), before.view(np.uint8), 4, workspace, out)
    # A quarter of the lanes is 0, and more do not move; those that do have no sign and are nearer.
    assert 8 * len(payload) < 8 * plain - 0.5 * after.size


def test_lanes_that_only_decay_cost_next_to_nothing():
    before, _ = moments(100_000, steps=0)
    after = before.copy()
    for _ in range(40):
        after *= BETA2
    encoding, payload = coded(after, before)
    assert encoding is Encoding.DECAYED_RANS
    assert 8 * len(payload) < 4 * after.size


@pytest.mark.parametrize(
    "break_one",
    [
        lambda before, after: before.__setitem__(0, -1.0),
        lambda before, after: after.__setitem__(0, -0.0),
        lambda before, after: after.__setitem__(slice(None), before),
        lambda before, after: after.__setitem__(slice(None), before / 1000),
        lambda before, after: before.__setitem__(slice(None), 0),
        lambda before, after: after.__setitem__(slice(None), np.nan),
    ],
    ids=["signs before", "signs after", "equal", "less than 1/256", "nothing to decay", "NaN"],
)
def test_what_does_not_decay_is_told_at_once(break_one):
    before, after = moments(1000, steps=40)
    break_one(before, after)
    assert decays.likeliest(before.view(np.uint8), after.view(np.uint8)) is None


def test_the_least_growth_is_the_decay():
    before, after = moments(5000, steps=40)
    halvings, factor = decays.likeliest(before.view(np.uint8), after.view(np.uint8))
    assert halvings == 0
    assert abs(factor / 2**32 - 0.999**40) < 1e-5
    halvings, factor = decays.likeliest(before.view(np.uint8), (before * np.float32(0.11)).view(np.uint8))
    assert halvings == 3
    assert abs(factor / 2**35 - 0.11) < 1e-6


LANES = st.lists(
    st.one_of(
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**9 - 1).map(lambda high: high << 23),
        st.sampled_from([0, 1, 0x7FFFFF, 0x800000, 0x7F800000, 0x7FC00001, 0x80000000, 0x01000000, 0xFFFFFFFF]),
    ),
    min_size=1,
    max_size=40,
)
FACTORS = st.one_of(st.integers(2**31, 2**32 - 1), st.sampled_from([2**31, 2**31 + 1, 2**32 - 1]))


def documented_decay(b: int, halvings: int, factor: int) -> int:
    e, m = b >> 23 & 255, b & 0x7FFFFF
    if e == 255 or e <= halvings + 1:
        return b
    p = (2**23 + m) * factor
    e, m = (e - halvings, p // 2**32 - 2**23) if p >= 2**55 else (e - halvings - 1, p // 2**31 - 2**23)
    return b & 1 << 31 | e << 23 | m


def ordered(u: int) -> int:
    return u ^ 0x7FFFFFFF if u >> 31 else u


def documented_delta(x: int, b: int) -> int:
    d = ordered(x) - ordered(b)
    return (-d if b >> 31 else d) % 2**32


def documented_unfold(y: int, b: int) -> int:
    d = documented_delta(y, b)
    z = 2 * d if d < 2**31 else 2 * (2**32 - d) - 1
    z = {0: 16, 16: 0}.get(z, z)
    d = (z - 16) % 2**32
    return ordered((ordered(b) + (-d if b >> 31 else d)) % 2**32)


@given(base=LANES, halvings=st.integers(0, 7), factor=FACTORS)
def test_what_a_decay_leaves_is_what_the_document_says(base, halvings, factor):
    lanes = np.array(base, np.uint32)
    out = np.empty_like(lanes)
    decays.apply(Decay(halvings, factor), lanes.view(np.uint8), out.view(np.uint8))
    assert out.tolist() == [documented_decay(b, halvings, factor) for b in base]


@given(base=LANES, seed=st.integers(0, 2**32 - 1), near=st.booleans())
def test_folding_has_an_inverse_which_the_document_says(base, seed, near):
    decayed = np.array(base, np.uint32)
    random = np.random.default_rng(seed)
    x = random.integers(0, 2**32, decayed.size, dtype=np.uint32)
    if near:
        x = decayed + random.integers(-20, 20, decayed.size).astype(np.uint32)
    folded, back = np.empty_like(x), np.empty_like(x)
    _kernels.decay_fold(x.view(np.uint8), decayed.view(np.uint8), folded.view(np.uint8))
    _kernels.decay_unfold(folded.view(np.uint8), decayed.view(np.uint8), back.view(np.uint8))
    assert back.tobytes() == x.tobytes()
    assert [documented_unfold(y, b) for y, b in zip(folded.tolist(), base, strict=True)] == x.tolist()


def test_a_lane_that_is_its_decayed_base_folds_to_it():
    decayed = np.array([0, 0x3F800000, 0x80000000, 0x7F800000, 0xBF800001], np.uint32)
    folded = np.empty_like(decayed)
    _kernels.decay_fold(decayed.view(np.uint8), decayed.view(np.uint8), folded.view(np.uint8))
    assert folded.tobytes() == decayed.tobytes()


@pytest.mark.parametrize(
    ("start", "lie"),
    [
        (b"", "within its decay"),
        (b"\x00\x00\x00\x00", "within its decay"),
        (struct.pack("<BI", 8, 1 << 31), "8 halvings"),
        (struct.pack("<BI", 0, (1 << 31) - 1), "decay by"),
    ],
)
def test_a_decay_that_lies_is_corruption(start, lie):
    before, after = moments(5000, steps=40)
    _, payload = coded(after, before)
    with pytest.raises(CorruptionError, match=lie):
        decode(Encoding.DECAYED_RANS, start + payload[5:] * (len(start) == 5), bytearray(20_000), width=4, base=before)


def test_a_decay_of_other_lanes_than_float32_is_corruption():
    before, after = moments(5000, steps=40)
    _, payload = coded(after, before)
    with pytest.raises(CorruptionError, match="lanes of 8 bytes"):
        decode(Encoding.DECAYED_RANS, payload, bytearray(20_000), width=8, base=before.tobytes())


@pytest.mark.parametrize("at", range(0, 60, 3))
def test_a_damaged_payload_is_corruption_or_other_lanes(at):
    before, after = moments(5000, steps=40)
    _, payload = coded(after, before)
    damaged = bytearray(payload)
    damaged[at] ^= 0x41
    out = np.empty_like(after)
    try:
        decode(Encoding.DECAYED_RANS, bytes(damaged), out.view(np.uint8), width=4, base=before.tobytes())
    except CorruptionError:
        return
    assert out.tobytes() != after.tobytes()


def test_the_kernels_refuse_memory_that_does_not_fit():
    eight, four, three = np.zeros(8, np.uint8), np.zeros(4, np.uint8), np.zeros(3, np.uint8)
    refused = [
        lambda: _kernels.decay(eight, 1 << 31, 0, four.copy()),
        lambda: _kernels.decay(three, 1 << 31, 0, three.copy()),
        lambda: _kernels.decay(four, 1 << 30, 0, four.copy()),
        lambda: _kernels.decay(four, 1 << 31, 8, four.copy()),
        lambda: _kernels.decay_fold(eight, four, eight.copy()),
        lambda: _kernels.decay_unfold(eight, eight, four.copy()),
    ]
    for call in refused:
        with pytest.raises(ValueError, match="must"):
            call()
