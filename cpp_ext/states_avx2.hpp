// The states of a rANS coder in registers of eight, which the loops of the residual coder and of the float coder share.
// Lanes have up to four bytes here, and there are 16 or 32 streams; what is left, the last block of a chunk if it is
// short included, goes through the scalar loops.
#pragma once

#include <cstring>

#include "avx2.hpp"
#include "rans.hpp"

namespace lamella::rans {
namespace {

template <size_t N>
struct Constant {
    static constexpr size_t value = N;
};

// Calls `what` with the width of a lane as a Constant, or `otherwise` with nothing where vectors do not go. What is
// called should not be inlined: of one function with all variants in it the compiler makes a worse one of each.
template <class What, class Otherwise>
auto with_width(size_t width, What what, Otherwise otherwise) {
    switch (width) {
        case 1:
            return what(Constant<1>{});
        case 2:
            return what(Constant<2>{});
        case 4:
            return what(Constant<4>{});
        default:
            return otherwise();
    }
}

// The same with the number of registers that hold the states as the second Constant.
template <class What, class Otherwise>
auto with_registers(size_t width, unsigned streams, What what, Otherwise otherwise) {
    const auto of_width = [&](auto w) {
        switch (streams) {
            case 16:
                return what(w, Constant<2>{});
            case 32:
                return what(w, Constant<4>{});
            default:
                return otherwise();
        }
    };
    return with_width(width, of_width, otherwise);
}

// Contexts are computed as bytes, which is possible where a lane has at most eight bits from `shift` to its sign: in
// all float types.
inline bool has_byte_magnitudes(unsigned width, unsigned shift) { return 8 * width - 1 <= shift + 8; }

// The contexts of run_lanes lanes by their base or guide, as bytes in order.
template <size_t W>
struct Contexts {
    Magnitudes<W> exponent_of;
    Vector lows;
    Contexts(unsigned shift, uint32_t low) : exponent_of(shift), lows(LanesOf<1>::all(low < 0xff ? low : 0xff)) {}
    Vector operator()(const uint8_t* base) const {
        const Vector exponents = to_bytes<W>([&](size_t i) { return exponent_of(load_vector(base + 32 * i)); });
        return _mm256_min_epu8(_mm256_subs_epu8(exponents, lows), LanesOf<1>::all(contexts - 1));
    }
};

// Reading.

// Words of a source, such that a whole block can be read before anything is checked: near their end, reading goes on in
// a copy with zeros after it. A lane of four bytes takes three at most: one for its symbol, two for raw bits.
constexpr size_t block_words_nbytes = 2 * (3 * block_lanes + 8);

struct Window {
    const uint8_t* words;
    const uint8_t* words_end;
    bool copied = false;
    uint8_t last_words[2 * block_words_nbytes];

    explicit Window(const Source& from) : words(from.words), words_end(from.words_end) {}

    void prepare_block() {
        const auto left = static_cast<size_t>(words_end - words);
        if (left >= block_words_nbytes || copied) return;
        std::memset(last_words, 0, sizeof last_words);
        std::memcpy(last_words, words, left);
        words = last_words;
        words_end = last_words + left;
        copied = true;
    }

    // Whether the last block found all that it took.
    bool holds() const { return words <= words_end; }

    // Between the calls of these two it is the source that is read.
    void give_back(Source& to) const { to.words = to.words_end - (words_end - words); }
    void take_back(const Source& from) { words = words_end - (from.words_end - from.words); }
};

// Where the table of each context begins, in units that make a byte of it.
constexpr unsigned table_shift = 8;
struct Tables {
    uint8_t of_class[classes][contexts];
    explicit Tables(const TableMap& table_of) {
        for (unsigned c = 0; c < classes; ++c) {
            for (unsigned i = 0; i < contexts; ++i) {
                of_class[c][i] = static_cast<uint8_t>(table_of[c][i] << (probability_bits - table_shift));
            }
        }
    }
};

// The tables of a run, as bytes of Tables, to where they begin among the slots, 16 bits each: lanes i and i + 8 of
// either half side by side.
[[gnu::always_inline]] inline void to_places(Vector tables, Vector (&places)[2]) {
    // Each byte goes to the upper half of 16 bits.
    const Vector pairs = _mm256_add_epi32(
        _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), all(0x01000100)), all(0x08800080));
    places[0] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(tables, 0x44), pairs);
    places[1] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(tables, 0xee), pairs);
}

// Two registers of slots, at sixteen places of 16 bits each: those of the first register and of the second alternate.
// By single loads: gathers are slower on the CPUs that this was measured on. What they wait for is the way from vectors
// to addresses, so four places go it at a time.
struct Slots {
    Vector first, second;
    [[gnu::always_inline]] Slots(const Slot* slots, Vector places) {
        const __m128i low = _mm256_castsi256_si128(places), high = _mm256_extracti128_si256(places, 1);
        const auto a = static_cast<uint64_t>(_mm_cvtsi128_si64(low)),
                   b = static_cast<uint64_t>(_mm_extract_epi64(low, 1));
        const auto c = static_cast<uint64_t>(_mm_cvtsi128_si64(high)),
                   d = static_cast<uint64_t>(_mm_extract_epi64(high, 1));
        const auto four = [slots](uint64_t p, uint64_t q) {
            const auto two = [slots](uint64_t i) {
                const __m128i one = _mm_cvtsi32_si128(static_cast<int>(slots[i & 0xffff]));
                return _mm_insert_epi32(one, static_cast<int>(slots[i >> 32 & 0xffff]), 1);
            };
            return _mm_unpacklo_epi64(two(p), two(q));
        };
        first = concatenate(four(a, b), four(c, d));
        second = concatenate(four(a >> 16, b >> 16), four(c >> 16, d >> 16));
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

// Steps of all R registers go side by side: one register alone would wait for itself, and the next one with it.

// Gives those states a word that are too low.
template <size_t R>
[[gnu::always_inline]] inline void refill(Vector (&states)[R], const uint8_t*& words) {
    Vector negative_if_low[R];
    unsigned sets[R];
    for (size_t r = 0; r < R; ++r) {
        negative_if_low[r] = _mm256_sub_epi32(states[r], all(low_state));
        sets[r] = mask_of(negative_if_low[r]);
    }
    for (size_t r = 0; r < R; ++r) {
        const Vector next = _mm256_broadcastsi128_si256(load_half(words));
        const Vector given = _mm256_shuffle_epi8(next, load_vector(spread.of_set[sets[r]]));
        words += 2 * size_t{count_bits(sets[r])};
        states[r] = choose(states[r], _mm256_or_si256(_mm256_slli_epi32(states[r], 16), given), negative_if_low[r]);
    }
}

// Decodes one symbol with each state. `tables` are where the tables of their lanes begin among the slots, in the order
// that Slots wants.
template <size_t R>
[[gnu::always_inline]] inline void take_symbols(Vector (&states)[R], const Vector* tables, const Slot* slots,
                                                const uint8_t*& words, Vector* symbols) {
    const auto step = [](Vector& state, Vector slot) {
        const Vector frequency = _mm256_and_si256(slot, all(0xfff));
        const Vector rest = _mm256_and_si256(_mm256_srli_epi32(slot, 12), all(0xfff));
        const Vector quotient = _mm256_srli_epi32(state, probability_bits);
        state = _mm256_add_epi32(_mm256_mullo_epi32(frequency, quotient), rest);
        return _mm256_srli_epi32(slot, 24);
    };
    for (size_t r = 0; r < R; r += 2) {
        const Vector pairs = _mm256_blend_epi16(states[r], _mm256_slli_epi32(states[r + 1], 16), 0xaa);
        const Vector in_table = _mm256_and_si256(pairs, LanesOf<2>::all(scale - 1));
        const Slots found(slots, _mm256_or_si256(tables[r / 2], in_table));
        symbols[r] = step(states[r], found.first);
        symbols[r + 1] = step(states[r + 1], found.second);
    }
    refill(states, words);
}

// Writing.

// Of 32 lanes, contexts or tables * stride + symbol, 16 bits each.
template <size_t stride>
[[gnu::always_inline]] inline void numbers_of(Vector of_contexts, Vector of_symbols, uint64_t (&to)[8]) {
    if constexpr (stride == 256) {
        const Vector low = _mm256_unpacklo_epi8(of_symbols, of_contexts);
        const Vector high = _mm256_unpackhi_epi8(of_symbols, of_contexts);
        store_vector(to, _mm256_permute2x128_si256(low, high, 0x20));
        store_vector(to + 4, _mm256_permute2x128_si256(low, high, 0x31));
    } else {
        constexpr int log_stride = stride == 64 ? 6 : 7;
        static_assert(stride == 1u << log_stride);
        const auto number = [](__m128i context, __m128i symbol) {
            return _mm256_or_si256(_mm256_slli_epi16(_mm256_cvtepu8_epi16(context), log_stride),
                                   _mm256_cvtepu8_epi16(symbol));
        };
        store_vector(to, number(_mm256_castsi256_si128(of_contexts), _mm256_castsi256_si128(of_symbols)));
        store_vector(to + 4, number(_mm256_extracti128_si256(of_contexts, 1), _mm256_extracti128_si256(of_symbols, 1)));
    }
}

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

// The words that those of eight states give away that are not to keep all, and the states after it.
[[gnu::always_inline]] inline Vector give(Vector state, Vector keeps, uint8_t*& words) {
    const unsigned giving = ~mask_of(keeps) & 0xff;
    const Vector order = load_eight<1>(squeeze.lane_of[giving]);
    const Vector given = _mm256_and_si256(_mm256_permutevar8x32_epi32(state, order), all(0xffff));
    const __m128i given16 = _mm_packus_epi32(_mm256_castsi256_si128(given), _mm256_extracti128_si256(given, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words - 16), given16);
    words -= 2 * count_bits(giving);
    return _mm256_blendv_epi8(_mm256_srli_epi32(state, 16), state, keeps);
}

// The steps of eight lanes; `at` are their numbers, 16 bits each, four and four.
struct Steps {
    Vector reciprocal, packed;
    [[gnu::always_inline]] Steps(const Step* steps, const uint64_t* at) {
        const auto four = [&](unsigned lane) {
            const auto two = [&](uint64_t i, uint64_t j) {
                const __m128d one = _mm_load_sd(reinterpret_cast<const double*>(steps + (i & 0xffff)));
                return _mm_castpd_si128(_mm_loadh_pd(one, reinterpret_cast<const double*>(steps + (j & 0xffff))));
            };
            const uint64_t low = at[0] >> (16 * lane), high = at[1] >> (16 * lane);
            return _mm256_castsi256_ps(concatenate(two(low, low >> 16), two(high, high >> 16)));
        };
        const __m256 even = four(0), odd = four(2);
        reciprocal = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0x88));
        packed = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0xdd));
    }
};

// Codes one symbol with each of eight states.
[[gnu::always_inline]] inline void code_symbols(const Steps& steps, Vector& state, uint8_t*& words) {
    const Vector frequency = _mm256_and_si256(steps.packed, all(0xfff));
    const Vector x = give(state, _mm256_cmpgt_epi32(frequency, _mm256_srli_epi32(state, 31 - probability_bits)), words);
    const Vector even_product = _mm256_srli_epi64(_mm256_mul_epu32(x, steps.reciprocal), 32);
    const Vector odd_product = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(steps.reciprocal, 32));
    const Vector quotient =
        _mm256_srlv_epi32(_mm256_blend_epi32(even_product, odd_product, 0xaa), _mm256_srli_epi32(steps.packed, 25));
    const Vector bias = _mm256_and_si256(_mm256_srli_epi32(steps.packed, 12), all(0x1fff));
    state = _mm256_add_epi32(_mm256_add_epi32(x, bias),
                             _mm256_mullo_epi32(quotient, _mm256_sub_epi32(all(scale), frequency)));
}

}  // namespace
}  // namespace lamella::rans
