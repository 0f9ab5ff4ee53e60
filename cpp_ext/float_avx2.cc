// The float coder's loops over lanes with AVX2, for lanes of up to four bytes and at least 8 streams; what is left, the
// last block if it is short included, goes through the scalar ones. See avx2.cc for the rules of such a file.
#include <immintrin.h>

#include <cstring>

#include "floats.hpp"

namespace lamella::floats {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

using Vector = __m256i;

Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const Vector*>(p)); }
void store(void* p, Vector v) { _mm256_storeu_si256(static_cast<Vector*>(p), v); }
__m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
__m128i load_quarter(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

template <class T>
T load_scalar(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

Vector all(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
Vector all16(uint32_t value) { return _mm256_set1_epi16(static_cast<short>(value)); }
Vector all8(uint32_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }
__m128i times(unsigned bits) { return _mm_cvtsi32_si128(static_cast<int>(bits)); }  // a number of bits to shift by
int mask_of(Vector v) { return _mm256_movemask_ps(_mm256_castsi256_ps(v)); }
unsigned count(int mask) { return static_cast<unsigned>(_mm_popcnt_u32(static_cast<unsigned>(mask))); }

// Four registers of 32-bit lanes below 256 to one of bytes, in order; and two of 16 bits.
Vector pack(Vector a, Vector b, Vector c, Vector d) {
    const Vector packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
Vector pack(Vector a, Vector b) { return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8); }

// 32 bytes, each below 32, to the bytes that a table of 32 has for them.
struct Lookup {
    Vector low, high;
    explicit Lookup(const uint8_t* table)
        : low(_mm256_broadcastsi128_si256(load_half(table))),
          high(_mm256_broadcastsi128_si256(load_half(table + 16))) {}
    Vector operator()(Vector at) const {
        return _mm256_blendv_epi8(_mm256_shuffle_epi8(low, at), _mm256_shuffle_epi8(high, at),
                                  _mm256_slli_epi16(at, 3));
    }
};

// For each set of lanes that need a word: the shuffle that gives each of them the next one, and 0 to the others.
struct Spread {
    alignas(32) uint8_t of_set[256][32];
};
constexpr Spread make_spread() {
    Spread spread{};
    for (unsigned set = 0; set < 256; ++set) {
        uint8_t next = 0;
        for (unsigned lane = 0; lane < 8; ++lane) {
            const bool needs = (set >> lane & 1) != 0;
            for (unsigned byte = 0; byte < 4; ++byte) {
                spread.of_set[set][4 * lane + byte] = needs && byte < 2 ? static_cast<uint8_t>(next + byte) : 0x80;
            }
            if (needs) next = static_cast<uint8_t>(next + 2);
        }
    }
    return spread;
}
constexpr Spread spread = make_spread();

// For each set of lanes that give a word away: those lanes, at the end of eight.
struct Squeeze {
    uint8_t lane_of[256][8];
};
constexpr Squeeze make_squeeze() {
    Squeeze squeeze{};
    for (unsigned set = 0; set < 256; ++set) {
        unsigned free = 8;
        for (unsigned lane = 8; lane-- > 0;) {
            if ((set >> lane & 1) != 0) squeeze.lane_of[set][--free] = static_cast<uint8_t>(lane);
        }
    }
    return squeeze;
}
constexpr Squeeze squeeze = make_squeeze();

// Of 32 lanes: contexts by their guide, and tops.
template <size_t W>
struct Lanes32;

template <>
struct Lanes32<1> {
    static Vector magnitudes(const uint8_t* lanes, unsigned shift) {
        return _mm256_and_si256(_mm256_srl_epi16(load(lanes), times(shift)), all8(0x7fu >> shift));
    }
    static Vector contexts(const uint8_t* guide, unsigned shift, uint32_t low) {
        return _mm256_min_epu8(_mm256_subs_epu8(magnitudes(guide, shift), all8(low < 0xff ? low : 0xff)),
                               all8(rans::contexts - 1));
    }
    static Vector symbols(const Model& model, const uint8_t* lanes) {
        const Vector top = magnitudes(lanes, model.cut);
        const Vector at = _mm256_min_epu8(_mm256_sub_epi8(top, all8(model.first)), all8(model.values));
        return _mm256_andnot_si256(_mm256_cmpeq_epi8(top, _mm256_setzero_si256()), _mm256_add_epi8(at, all8(1)));
    }
};

template <>
struct Lanes32<2> {
    static Vector magnitudes(const uint8_t* lanes, unsigned shift) {
        return _mm256_srl_epi16(_mm256_and_si256(load(lanes), all16(0x7fff)), times(shift));
    }
    static Vector contexts(const uint8_t* guide, unsigned shift, uint32_t low) {
        const auto sixteen = [=](const uint8_t* lanes) {
            return _mm256_min_epu16(_mm256_subs_epu16(magnitudes(lanes, shift), all16(low)), all16(rans::contexts - 1));
        };
        return pack(sixteen(guide), sixteen(guide + 32));
    }
    static Vector symbols(const Model& model, const uint8_t* lanes) {
        const auto sixteen = [&model](const uint8_t* from) {
            const Vector top = magnitudes(from, model.cut);
            const Vector at = _mm256_min_epu16(_mm256_sub_epi16(top, all16(model.first)), all16(model.values));
            return _mm256_andnot_si256(_mm256_cmpeq_epi16(top, _mm256_setzero_si256()), _mm256_add_epi16(at, all16(1)));
        };
        return pack(sixteen(lanes), sixteen(lanes + 32));
    }
};

template <>
struct Lanes32<4> {
    static Vector magnitudes(const uint8_t* lanes, unsigned shift) {
        return _mm256_srl_epi32(_mm256_and_si256(load(lanes), all(0x7fffffff)), times(shift));
    }
    static Vector contexts(const uint8_t* guide, unsigned shift, uint32_t low) {
        const auto eight = [=](const uint8_t* lanes) {
            const Vector above = _mm256_sub_epi32(magnitudes(lanes, shift), all(low));
            return _mm256_min_epi32(_mm256_max_epi32(above, _mm256_setzero_si256()), all(rans::contexts - 1));
        };
        return pack(eight(guide), eight(guide + 32), eight(guide + 64), eight(guide + 96));
    }
    static Vector symbols(const Model& model, const uint8_t* lanes) {
        const auto eight = [&model](const uint8_t* from) {
            const Vector top = magnitudes(from, model.cut);
            const Vector at = _mm256_min_epu32(_mm256_sub_epi32(top, all(model.first)), all(model.values));
            return _mm256_andnot_si256(_mm256_cmpeq_epi32(top, _mm256_setzero_si256()), _mm256_add_epi32(at, all(1)));
        };
        return pack(eight(lanes), eight(lanes + 32), eight(lanes + 64), eight(lanes + 96));
    }
};

// Raw bits of a block, cut into what vectors handle: pairs of bytes, bytes, and what is left as bytes too.
struct Pieces {
    unsigned bits;  // all of them
    size_t byte_at, rest_at;
    explicit Pieces(unsigned raw_bits)
        : bits(raw_bits),
          byte_at((raw_bits & 16) != 0 ? 2 * block_lanes : 0),
          rest_at(byte_at + ((raw_bits & 8) != 0 ? block_lanes : 0)) {}
    bool has_pairs() const { return (bits & 16) != 0; }
    bool has_bytes() const { return (bits & 8) != 0; }
    unsigned rest() const { return bits & 7; }
};

// The pieces shorter than a byte, as bytes of 32 lanes each.
void join_rest(const uint8_t* raw, unsigned rest, Vector (&to)[4]) {
    unsigned offset = 0;
    for (Vector& v : to) v = _mm256_setzero_si256();
    if ((rest & 4) != 0) {
        const Vector first = load(raw), second = load(raw + 32), low = all8(0xf);
        to[0] = _mm256_and_si256(first, low);
        to[1] = _mm256_and_si256(second, low);
        to[2] = _mm256_and_si256(_mm256_srli_epi16(first, 4), low);
        to[3] = _mm256_and_si256(_mm256_srli_epi16(second, 4), low);
        raw += 64;
        offset = 4;
    }
    if ((rest & 2) != 0) {
        const Vector four = load(raw);
        for (unsigned i = 0; i < 4; ++i) {
            const Vector two = _mm256_and_si256(_mm256_srl_epi16(four, times(2 * i)), all8(3));
            to[i] = _mm256_or_si256(to[i], _mm256_sll_epi16(two, times(offset)));
        }
        raw += 32;
        offset += 2;
    }
    if ((rest & 1) != 0) {
        const Vector eight = _mm256_broadcastsi128_si256(load_half(raw));
        for (unsigned i = 0; i < 4; ++i) {
            const Vector bit =
                _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi8(static_cast<char>(1u << (2 * i)))),
                                        _mm_set1_epi8(static_cast<char>(2u << (2 * i))), 1);
            const Vector is_set = _mm256_cmpeq_epi8(_mm256_and_si256(eight, bit), bit);
            to[i] = _mm256_or_si256(to[i], _mm256_and_si256(is_set, all8(1u << offset)));
        }
    }
}

uint8_t* cut_rest(const Vector (&from)[4], unsigned rest, uint8_t* raw) {
    unsigned offset = 0;
    if ((rest & 4) != 0) {
        const Vector low = all8(0xf);
        for (unsigned i = 0; i < 2; ++i) {
            const Vector high = _mm256_andnot_si256(low, _mm256_slli_epi16(from[2 + i], 4));
            store(raw + 32 * i, _mm256_or_si256(_mm256_and_si256(from[i], low), high));
        }
        raw += 64;
        offset = 4;
    }
    if ((rest & 2) != 0) {
        Vector four = _mm256_setzero_si256();
        for (unsigned i = 0; i < 4; ++i) {
            const Vector two = _mm256_and_si256(_mm256_srl_epi16(from[i], times(offset)), all8(3));
            four = _mm256_or_si256(four, _mm256_sll_epi16(two, times(2 * i)));
        }
        store(raw, four);
        raw += 32;
        offset += 2;
    }
    if ((rest & 1) != 0) {
        __m128i eight = _mm_setzero_si128();
        for (unsigned i = 0; i < 4; ++i) {
            const Vector bit = _mm256_and_si256(_mm256_srl_epi16(from[i], times(offset)), all8(1));
            const __m128i first = _mm256_castsi256_si128(bit), second = _mm256_extracti128_si256(bit, 1);
            eight = _mm_or_si128(eight, _mm_sll_epi16(first, times(2 * i)));
            eight = _mm_or_si128(eight, _mm_sll_epi16(second, times(2 * i + 1)));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(raw), eight);
        raw += 16;
    }
    return raw;
}

// Decoding.

// Words of a source, such that a whole block can be read before anything is checked: near their end, reading goes on in
// a copy with zeros after it.
constexpr size_t block_words_nbytes = 2 * (block_lanes + 8);

struct Words {
    const uint8_t* at;
    const uint8_t* end;
    bool copied = false;
    uint8_t last[2 * block_words_nbytes];

    explicit Words(const rans::Source& from) : at(from.words), end(from.words_end) {}

    void prepare_block() {
        const auto left = static_cast<size_t>(end - at);
        if (left >= block_words_nbytes || copied) return;
        std::memset(last, 0, sizeof last);
        std::memcpy(last, at, left);
        at = last;
        end = last + left;
        copied = true;
    }
    // Whether the last block found all that it took.
    bool holds() const { return at <= end; }
    void give_back(rans::Source& to) const { to.words = to.words_end - (end - at); }
};

// The slots at eight places, by single loads: gathers are slower on the CPUs that this was measured on.
Vector slots_at(const Slot* slots, Vector places) {
    const auto four = [slots](__m128i of) {
        const auto a = static_cast<uint64_t>(_mm_cvtsi128_si64(of)),
                   b = static_cast<uint64_t>(_mm_extract_epi64(of, 1));
        __m128i v = _mm_cvtsi32_si128(static_cast<int>(slots[a & 0xffffffff]));
        v = _mm_insert_epi32(v, static_cast<int>(slots[a >> 32]), 1);
        v = _mm_insert_epi32(v, static_cast<int>(slots[b & 0xffffffff]), 2);
        return _mm_insert_epi32(v, static_cast<int>(slots[b >> 32]), 3);
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(four(_mm256_castsi256_si128(places))),
                                   four(_mm256_extracti128_si256(places, 1)), 1);
}

// Decodes one symbol with each of eight states; `tables` are where the slots of their lanes begin.
[[gnu::always_inline]] inline Vector step(Vector& state, Vector tables, const Slot* slots, const uint8_t*& words) {
    const Vector twelve = all(0xfff);
    const Vector slot = slots_at(slots, _mm256_or_si256(tables, _mm256_and_si256(state, all(rans::scale - 1))));
    const Vector product =
        _mm256_mullo_epi32(_mm256_and_si256(slot, twelve), _mm256_srli_epi32(state, rans::probability_bits));
    const Vector next = _mm256_add_epi32(product, _mm256_and_si256(_mm256_srli_epi32(slot, 12), twelve));
    const Vector needy = _mm256_cmpgt_epi32(all(rans::low_state), next);
    const int set = mask_of(needy);
    const Vector given = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_half(words)), load(spread.of_set[set]));
    words += 2 * count(set);
    state = _mm256_or_si256(_mm256_sllv_epi32(next, _mm256_and_si256(needy, all(16))), given);
    return _mm256_srli_epi32(slot, 24);
}

// What makes lanes of tops and raw bits. An escape is taken for the top after the window: what is written for it is off
// by a difference of tops.
template <size_t W>
struct Join;

template <>
struct Join<1> {
    static void lanes(const Model& model, const Pieces&, const Vector (&)[4], Vector symbols, const uint8_t*,
                      const uint8_t* rest, size_t, uint8_t* out) {
        const unsigned below = model.cut - model.trailing;
        const Vector raw = load(rest);
        const Vector none = _mm256_cmpeq_epi8(symbols, _mm256_setzero_si256());
        const Vector top = _mm256_andnot_si256(none, _mm256_add_epi8(symbols, all8(model.first - 1)));
        const Vector high = _mm256_and_si256(_mm256_sll_epi16(top, times(model.cut)), all8(0xffu << model.cut));
        const Vector low = _mm256_sll_epi16(_mm256_and_si256(raw, all8((1u << below) - 1)), times(model.trailing));
        const Vector sign = _mm256_and_si256(_mm256_sll_epi16(raw, times(7 - below)), all8(0x80));
        store(out, _mm256_add_epi8(high, _mm256_or_si256(low, sign)));
    }
};

template <>
struct Join<2> {
    static void lanes(const Model& model, const Pieces& pieces, const Vector (&)[4], Vector symbols,
                      const uint8_t* block, const uint8_t* rest, size_t at, uint8_t* out) {
        const unsigned below = model.cut - model.trailing;
        for (size_t i = 0; i < 32; i += 16) {
            Vector raw = _mm256_cvtepu8_epi16(load_half(rest + i));
            if (pieces.has_bytes()) {
                const Vector bytes = _mm256_cvtepu8_epi16(load_half(block + pieces.byte_at + at + i));
                raw = _mm256_or_si256(_mm256_slli_epi16(raw, 8), bytes);
            }
            const Vector symbol =
                _mm256_cvtepu8_epi16(i == 0 ? _mm256_castsi256_si128(symbols) : _mm256_extracti128_si256(symbols, 1));
            const Vector none = _mm256_cmpeq_epi16(symbol, _mm256_setzero_si256());
            const Vector top = _mm256_andnot_si256(none, _mm256_add_epi16(symbol, all16(model.first - 1)));
            const Vector low = _mm256_sll_epi16(_mm256_and_si256(raw, all16((1u << below) - 1)), times(model.trailing));
            const Vector sign = _mm256_slli_epi16(_mm256_srl_epi16(raw, times(below)), 15);
            store(out + 2 * i, _mm256_add_epi16(_mm256_sll_epi16(top, times(model.cut)), _mm256_or_si256(low, sign)));
        }
    }
};

template <>
struct Join<4> {
    static void lanes(const Model& model, const Pieces& pieces, const Vector (&symbols)[4], Vector,
                      const uint8_t* block, const uint8_t* rest, size_t at, uint8_t* out) {
        const unsigned below = model.cut - model.trailing;
        const __m128i rest_shift = times(pieces.bits & 24), bytes_shift = times(pieces.bits & 16);
        for (size_t i = 0; i < 4; ++i) {
            Vector raw = _mm256_sll_epi32(_mm256_cvtepu8_epi32(load_quarter(rest + 8 * i)), rest_shift);
            if (pieces.has_bytes()) {
                const Vector bytes = _mm256_cvtepu8_epi32(load_quarter(block + pieces.byte_at + at + 8 * i));
                raw = _mm256_or_si256(raw, _mm256_sll_epi32(bytes, bytes_shift));
            }
            if (pieces.has_pairs()) {
                raw = _mm256_or_si256(raw, _mm256_cvtepu16_epi32(load_half(block + 2 * (at + 8 * i))));
            }
            const Vector none = _mm256_cmpeq_epi32(symbols[i], _mm256_setzero_si256());
            const Vector top = _mm256_andnot_si256(none, _mm256_add_epi32(symbols[i], all(model.first - 1)));
            const Vector low = _mm256_sll_epi32(_mm256_and_si256(raw, all((1u << below) - 1)), times(model.trailing));
            const Vector sign = _mm256_slli_epi32(_mm256_srl_epi32(raw, times(below)), 31);
            store(out + 32 * i, _mm256_add_epi32(_mm256_sll_epi32(top, times(model.cut)), _mm256_or_si256(low, sign)));
        }
    }
};

// Puts the tops of escapes, `set`, in place of the one after the window.
template <size_t W>
bool put_escapes(const Model& model, uint32_t set, Source& source, uint8_t* out) {
    for (; set != 0; set &= set - 1) {
        if (source.escapes == source.escapes_end) return false;
        const uint32_t top = load_scalar<uint16_t>(source.escapes);
        source.escapes += 2;
        if (top >> top_bits(model) != 0) return false;
        uint8_t* to = out + W * static_cast<size_t>(__builtin_ctz(set));
        uint32_t lane = 0;
        std::memcpy(&lane, to, W);
        lane += (top - (model.first + model.values)) << model.cut;
        std::memcpy(to, &lane, W);
    }
    return true;
}

// One block that is not zero. R registers hold the states.
template <size_t W, size_t R, bool Guided>
bool read_block(const Model& model, const Pieces& pieces, const Slot* slots, unsigned block_class, Vector (&states)[R],
                Words& words, Source& source, const uint8_t* guide, uint8_t* out) {
    Vector rest[4];
    join_rest(source.raw + pieces.rest_at, pieces.rest(), rest);
    alignas(32) uint8_t rests[block_lanes];
    for (size_t i = 0; i < 4; ++i) store(rests + 32 * i, rest[i]);
    const Lookup table_of(model.table_of[block_class]);
    const Slot* of_class = Guided ? slots : slots + (size_t{model.table_of[block_class][0]} << rans::probability_bits);
    const uint8_t* at = words.at;
    for (size_t g = 0; g < block_lanes; g += 32) {
        Vector tables[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                            _mm256_setzero_si256()};
        if constexpr (Guided) {
            const Vector of = table_of(Lanes32<W>::contexts(guide + g * W, model.shift, model.low));
            const __m128i low = _mm256_castsi256_si128(of), high = _mm256_extracti128_si256(of, 1);
            const __m128i eights[4] = {low, _mm_srli_si128(low, 8), high, _mm_srli_si128(high, 8)};
            for (size_t i = 0; i < 4; ++i) {
                tables[i] = _mm256_slli_epi32(_mm256_cvtepu8_epi32(eights[i]), rans::probability_bits);
            }
        }
        Vector symbols[4];
        for (size_t i = 0; i < 4; ++i) symbols[i] = step(states[i % R], tables[i], of_class, at);
        const Vector packed = pack(symbols[0], symbols[1], symbols[2], symbols[3]);
        Join<W>::lanes(model, pieces, symbols, packed, source.raw, rests + g, g, out + g * W);
        const Vector escaped = _mm256_cmpeq_epi8(packed, all8(escape_of(model)));
        const auto set = static_cast<uint32_t>(_mm256_movemask_epi8(escaped));
        if (set != 0 && !put_escapes<W>(model, set, source, out + g * W)) return false;
    }
    words.at = at;
    return true;
}

template <size_t W, size_t R, bool Guided>
bool read(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& source, const uint8_t* guide,
          size_t first, size_t n, uint8_t* out) {
    Words words(source.from);
    const Pieces pieces(raw_bits(model));
    Vector states[R];
    for (size_t r = 0; r < R; ++r) states[r] = load(source.from.states + 8 * r);
    size_t k = first;
    for (; k < n / block_lanes; ++k) {
        const size_t at = k * block_lanes * W;
        if (block_classes[k] == zero_class) {
            std::memset(out + at, 0, block_lanes * W);
            continue;
        }
        words.prepare_block();
        if (!read_block<W, R, Guided>(model, pieces, slots, block_classes[k], states, words, source,
                                      Guided ? guide + at : nullptr, out + at) ||
            !words.holds())
            return false;
        source.raw += raw_nbytes(block_lanes, pieces.bits);
    }
    for (size_t r = 0; r < R; ++r) store(source.from.states + 8 * r, states[r]);
    words.give_back(source.from);
    return scalar_loops.read(model, slots, block_classes, source, guide, k, n, out);
}

template <size_t W, size_t R>
bool read_guided(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& source,
                 const uint8_t* guide, size_t first, size_t n, uint8_t* out) {
    return guide == nullptr ? read<W, R, false>(model, slots, block_classes, source, guide, first, n, out)
                            : read<W, R, true>(model, slots, block_classes, source, guide, first, n, out);
}

template <size_t W>
bool read_streams(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& source,
                  const uint8_t* guide, size_t first, size_t n, uint8_t* out) {
    switch (model.streams) {
        case 8:
            return read_guided<W, 1>(model, slots, block_classes, source, guide, first, n, out);
        case 16:
            return read_guided<W, 2>(model, slots, block_classes, source, guide, first, n, out);
        case 32:
            return read_guided<W, 4>(model, slots, block_classes, source, guide, first, n, out);
        default:
            return scalar_loops.read(model, slots, block_classes, source, guide, first, n, out);
    }
}

bool read_any(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& source, const uint8_t* guide,
              size_t first, size_t n, uint8_t* out) noexcept {
    switch (model.width) {
        case 1:
            return read_streams<1>(model, slots, block_classes, source, guide, first, n, out);
        case 2:
            return read_streams<2>(model, slots, block_classes, source, guide, first, n, out);
        case 4:
            return read_streams<4>(model, slots, block_classes, source, guide, first, n, out);
        default:
            return scalar_loops.read(model, slots, block_classes, source, guide, first, n, out);
    }
}

// Encoding.

// Writes the pairs of bytes and the bytes of the raw bits of 32 lanes; returns what is left of them as bytes.
template <size_t W>
struct Cut;

template <>
struct Cut<1> {
    static Vector lanes(const Model& model, const Pieces&, const uint8_t* lanes, uint8_t*, size_t) {
        const unsigned below = model.cut - model.trailing;
        const Vector x = load(lanes), low = all8((1u << below) - 1);
        const Vector sign = _mm256_and_si256(_mm256_srl_epi16(x, times(7 - below)), all8(1u << below));
        return _mm256_or_si256(_mm256_and_si256(_mm256_srl_epi16(x, times(model.trailing)), low), sign);
    }
};

template <>
struct Cut<2> {
    static Vector lanes(const Model& model, const Pieces& pieces, const uint8_t* lanes, uint8_t* block, size_t at) {
        const unsigned below = model.cut - model.trailing;
        const auto raw_of = [=, &model](Vector x) {
            const Vector low = _mm256_and_si256(_mm256_srl_epi16(x, times(model.trailing)), all16((1u << below) - 1));
            return _mm256_or_si256(low, _mm256_sll_epi16(_mm256_srli_epi16(x, 15), times(below)));
        };
        Vector a = raw_of(load(lanes)), b = raw_of(load(lanes + 32));
        if (pieces.has_bytes()) {
            store(block + pieces.byte_at + at,
                  pack(_mm256_and_si256(a, all16(0xff)), _mm256_and_si256(b, all16(0xff))));
            a = _mm256_srli_epi16(a, 8);
            b = _mm256_srli_epi16(b, 8);
        }
        return pack(a, b);
    }
};

template <>
struct Cut<4> {
    static Vector lanes(const Model& model, const Pieces& pieces, const uint8_t* lanes, uint8_t* block, size_t at) {
        const unsigned below = model.cut - model.trailing;
        Vector raw[4];
        for (size_t i = 0; i < 4; ++i) {
            const Vector x = load(lanes + 32 * i);
            const Vector low = _mm256_and_si256(_mm256_srl_epi32(x, times(model.trailing)), all((1u << below) - 1));
            raw[i] = _mm256_or_si256(low, _mm256_sll_epi32(_mm256_srli_epi32(x, 31), times(below)));
        }
        if (pieces.has_pairs()) {
            const Vector low = all(0xffff);
            for (size_t i = 0; i < 4; i += 2) {
                const Vector pairs =
                    _mm256_packus_epi32(_mm256_and_si256(raw[i], low), _mm256_and_si256(raw[i + 1], low));
                store(block + 2 * (at + 8 * i), _mm256_permute4x64_epi64(pairs, 0xd8));
                raw[i] = _mm256_srli_epi32(raw[i], 16);
                raw[i + 1] = _mm256_srli_epi32(raw[i + 1], 16);
            }
        }
        if (pieces.has_bytes()) {
            const Vector low = all(0xff);
            store(block + pieces.byte_at + at, pack(_mm256_and_si256(raw[0], low), _mm256_and_si256(raw[1], low),
                                                    _mm256_and_si256(raw[2], low), _mm256_and_si256(raw[3], low)));
            for (Vector& of : raw) of = _mm256_srli_epi32(of, 8);
        }
        return pack(raw[0], raw[1], raw[2], raw[3]);
    }
};

uint32_t sum_of_bytes(Vector v) {
    const Vector sums = _mm256_sad_epu8(v, _mm256_setzero_si256());
    const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(halves)) + static_cast<uint32_t>(_mm_extract_epi32(halves, 2));
}

bool is_zero(const uint8_t* bytes, size_t nbytes) {
    Vector any = _mm256_setzero_si256();
    for (size_t i = 0; i < nbytes; i += 32) any = _mm256_or_si256(any, load(bytes + i));
    return _mm256_testz_si256(any, any) != 0;
}

template <size_t W>
uint8_t* split(const Model& model, const uint8_t* weight_table, const uint8_t* src, const uint8_t* guide, size_t n,
               const Lanes& to, uint8_t* raw) {
    const Pieces pieces(raw_bits(model));
    const Lookup weight(weight_table);
    const Vector below = all8(model.values < weights ? 0 : model.values - (weights - 1));
    size_t at = 0;
    for (; at + block_lanes <= n; at += block_lanes) {
        const uint8_t* lanes = src + at * W;
        uint32_t& level = to.levels[at / block_lanes];
        level = 0;
        if (is_zero(lanes, block_lanes * W)) continue;
        Vector rest[4];
        for (size_t g = 0; g < 4; ++g) {
            const size_t first = 32 * g;
            const Vector symbols = Lanes32<W>::symbols(model, lanes + first * W);
            store(to.symbols + at + first, symbols);
            level += sum_of_bytes(weight(_mm256_min_epu8(_mm256_subs_epu8(symbols, below), all8(weights - 1))));
            if (guide != nullptr) {
                store(to.contexts + at + first, Lanes32<W>::contexts(guide + (at + first) * W, model.shift, model.low));
            }
            rest[g] = Cut<W>::lanes(model, pieces, lanes + first * W, raw, first);
        }
        raw = cut_rest(rest, pieces.rest(), raw + pieces.rest_at);
    }
    if (at == n) return raw;
    const Lanes last{to.symbols + at, to.contexts + at, to.levels + at / block_lanes};
    return scalar_loops.split(model, weight_table, src + at * W, guide == nullptr ? nullptr : guide + at * W, n - at,
                              last, raw);
}

uint8_t* split_any(const Model& model, const uint8_t* weight_table, const uint8_t* src, const uint8_t* guide, size_t n,
                   const Lanes& to, uint8_t* raw) noexcept {
    switch (model.width) {
        case 1:
            return split<1>(model, weight_table, src, guide, n, to, raw);
        case 2:
            return split<2>(model, weight_table, src, guide, n, to, raw);
        case 4:
            return split<4>(model, weight_table, src, guide, n, to, raw);
        default:
            return scalar_loops.split(model, weight_table, src, guide, n, to, raw);
    }
}

// The steps of eight lanes; `at` are their numbers, 16 bits each, four and four.
struct Steps {
    Vector reciprocal, packed;
};
Steps steps_at(const uint64_t* at, const Step* steps) {
    const auto four = [&](unsigned lane) {
        const auto step_of = [&](uint64_t i) { return load_quarter(steps + (i & 0xffff)); };
        const uint64_t low = at[0] >> (16 * lane), high = at[1] >> (16 * lane);
        return _mm256_castsi256_ps(
            _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi64(step_of(low), step_of(low >> 16))),
                                    _mm_unpacklo_epi64(step_of(high), step_of(high >> 16)), 1));
    };
    const __m256 even = four(0), odd = four(2);
    return {_mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0x88)),
            _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0xdd))};
}

// Codes one symbol with each of eight states.
[[gnu::always_inline]] inline void code_eight(Vector& state, Vector reciprocal, Vector packed, uint8_t*& words) {
    const Vector frequency = _mm256_and_si256(packed, all(0xfff));
    const Vector fits = _mm256_cmpgt_epi32(frequency, _mm256_srli_epi32(state, 31 - rans::probability_bits));
    const int giving = ~mask_of(fits) & 0xff;
    const Vector order = _mm256_cvtepu8_epi32(load_quarter(squeeze.lane_of[giving]));
    const Vector given = _mm256_and_si256(_mm256_permutevar8x32_epi32(state, order), all(0xffff));
    const __m128i given16 = _mm_packus_epi32(_mm256_castsi256_si128(given), _mm256_extracti128_si256(given, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words - 16), given16);
    words -= 2 * count(giving);
    const Vector x = _mm256_blendv_epi8(_mm256_srli_epi32(state, 16), state, fits);
    const Vector even_product = _mm256_srli_epi64(_mm256_mul_epu32(x, reciprocal), 32);
    const Vector odd_product = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(reciprocal, 32));
    const Vector quotient =
        _mm256_srlv_epi32(_mm256_blend_epi32(even_product, odd_product, 0xaa), _mm256_srli_epi32(packed, 25));
    const Vector bias = _mm256_and_si256(_mm256_srli_epi32(packed, 12), all(0x1fff));
    state = _mm256_add_epi32(_mm256_add_epi32(x, bias),
                             _mm256_mullo_epi32(quotient, _mm256_sub_epi32(all(rans::scale), frequency)));
}

// The tops of eight lanes of which `set` are escapes, from the last to the first.
template <size_t W>
void add_escapes(const Model& model, unsigned set, const uint8_t* src, uint8_t*& escapes) {
    for (unsigned lane = 8; lane-- > 0;) {
        if ((set >> lane & 1) == 0) continue;
        uint32_t value = 0;
        std::memcpy(&value, src + lane * W, W);
        const auto top = static_cast<uint16_t>((value & ((1u << (8 * W - 1)) - 1)) >> model.cut);
        escapes -= sizeof top;
        std::memcpy(escapes, &top, sizeof top);
    }
}

template <size_t W, size_t R>
void write(const Model& model, const Step* steps, const uint8_t* block_classes, const Lanes& from, const uint8_t* src,
           bool guided, size_t n, Sink& sink) {
    const size_t whole = n / block_lanes;
    if (whole * block_lanes < n) {
        // A state is numbered by its lane in the chunk: 128 is a multiple of how many there are.
        const size_t at = whole * block_lanes;
        const Lanes last{from.symbols + at, from.contexts + at, from.levels + whole};
        scalar_loops.write(model, steps, block_classes + whole, last, src + at * W, guided, n - at, sink);
    }
    Vector states[R];
    for (size_t r = 0; r < R; ++r) states[r] = load(sink.to.states + 8 * r);
    uint8_t *words = sink.to.words, *escapes = sink.escapes;
    for (size_t k = whole; k-- > 0;) {
        if (block_classes[k] == zero_class) continue;
        const Lookup table_of(model.table_of[block_classes[k]]);
        const Vector of_class = all8(model.table_of[block_classes[k]][0]);
        for (size_t i = (k + 1) * block_lanes; i > k * block_lanes;) {
            i -= 32;
            const Vector tables = guided ? table_of(load(from.contexts + i)) : of_class,
                         symbols = load(from.symbols + i);
            // symbol + symbol_stride * table, 16 bits each.
            alignas(32) uint64_t at[8];
            const Vector low = _mm256_unpacklo_epi8(symbols, tables), high = _mm256_unpackhi_epi8(symbols, tables);
            store(at, _mm256_permute2x128_si256(low, high, 0x20));
            store(at + 4, _mm256_permute2x128_si256(low, high, 0x31));
            for (size_t g = 4; g-- > 0;) {
                auto [reciprocal, packed] = steps_at(at + 2 * g, steps);
                const int escaped = mask_of(packed);
                if (escaped != 0) {
                    add_escapes<W>(model, static_cast<unsigned>(escaped), src + (i + 8 * g) * W, escapes);
                    packed = _mm256_and_si256(packed, all(~escape_mark));
                }
                code_eight(states[g % R], reciprocal, packed, words);
            }
        }
    }
    sink.to.words = words;
    sink.escapes = escapes;
    for (size_t r = 0; r < R; ++r) store(sink.to.states + 8 * r, states[r]);
}

template <size_t W>
void write_streams(const Model& model, const Step* steps, const uint8_t* block_classes, const Lanes& from,
                   const uint8_t* src, bool guided, size_t n, Sink& to) {
    switch (model.streams) {
        case 8:
            return write<W, 1>(model, steps, block_classes, from, src, guided, n, to);
        case 16:
            return write<W, 2>(model, steps, block_classes, from, src, guided, n, to);
        case 32:
            return write<W, 4>(model, steps, block_classes, from, src, guided, n, to);
        default:
            return scalar_loops.write(model, steps, block_classes, from, src, guided, n, to);
    }
}

void write_any(const Model& model, const Step* steps, const uint8_t* block_classes, const Lanes& from,
               const uint8_t* src, bool guided, size_t n, Sink& to) noexcept {
    switch (model.width) {
        case 1:
            return write_streams<1>(model, steps, block_classes, from, src, guided, n, to);
        case 2:
            return write_streams<2>(model, steps, block_classes, from, src, guided, n, to);
        case 4:
            return write_streams<4>(model, steps, block_classes, from, src, guided, n, to);
        default:
            return scalar_loops.write(model, steps, block_classes, from, src, guided, n, to);
    }
}

}  // namespace

const Loops avx2_loops = {split_any, write_any, read_any};

}  // namespace lamella::floats
