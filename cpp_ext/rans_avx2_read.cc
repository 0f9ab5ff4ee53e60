// Reading the lanes of dense blocks with AVX2.
#include <cstring>

#include "rans_avx2.hpp"

namespace lamella::rans {
namespace {

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
            const auto slot = [slots](uint64_t i) { return _mm_cvtsi32_si128(static_cast<int>(slots[i & 0xffff])); };
            return _mm_unpacklo_epi64(_mm_unpacklo_epi32(slot(p), slot(p >> 32)),
                                      _mm_unpacklo_epi32(slot(q), slot(q >> 32)));
        };
        const auto join = [](__m128i lower, __m128i upper) {
            return _mm256_inserti128_si256(_mm256_castsi128_si256(lower), upper, 1);
        };
        first = join(four(a, b), four(c, d));
        second = join(four(a >> 16, b >> 16), four(c >> 16, d >> 16));
    }
};

// Words of a source, such that a whole block can be read before anything is checked: near their end, reading goes on in
// a copy with zeros after it.
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
        const Vector next = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
        const Vector given = _mm256_shuffle_epi8(next, load_vector(spread.of_set[sets[r]]));
        words += 2 * size_t{count(sets[r])};
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
        const Vector in_table = _mm256_and_si256(pairs, _mm256_set1_epi16(scale - 1));
        const Slots found(slots, _mm256_or_si256(tables[r / 2], in_table));
        symbols[r] = step(states[r], found.first);
        symbols[r + 1] = step(states[r + 1], found.second);
    }
    refill(states, words);
}

// Lengths become as many bits of the states.
template <size_t R>
[[gnu::always_inline]] inline void take_bits(Vector (&states)[R], const uint8_t*& words, Vector* lengths_to_bits) {
    for (size_t r = 0; r < R; ++r) {
        const Vector length = lengths_to_bits[r];
        lengths_to_bits[r] = low_bits(states[r], length);
        states[r] = _mm256_srlv_epi32(states[r], length);
    }
    refill(states, words);
}

// Symbols of a run become residuals.
template <size_t W, size_t R>
[[gnu::always_inline]] inline void add_raw_bits(Vector (&symbols)[4], Vector (&states)[R], const uint8_t*& words) {
    const Vector most = all(most_raw_bits);
    Vector lengths[4], bits[4];
    for (size_t i = 0; i < 4; ++i) {
        lengths[i] = raw_bits_of(symbols[i]);
        bits[i] = W == 4 ? _mm256_min_epi32(lengths[i], most) : lengths[i];
    }
    for (size_t i = 0; i < 4; i += R) take_bits(states, words, bits + i);
    if constexpr (W == 4) {
        const Vector longest =
            _mm256_max_epi32(_mm256_max_epi32(lengths[0], lengths[1]), _mm256_max_epi32(lengths[2], lengths[3]));
        if (mask_of(_mm256_cmpgt_epi32(longest, most)) != 0) {
            Vector left[4];
            for (size_t i = 0; i < 4; ++i) left[i] = _mm256_sub_epi32(lengths[i], _mm256_min_epi32(lengths[i], most));
            for (size_t i = 0; i < 4; i += R) take_bits(states, words, left + i);
            for (size_t i = 0; i < 4; ++i)
                bits[i] = _mm256_or_si256(bits[i], _mm256_slli_epi32(left[i], most_raw_bits));
        }
    }
    for (size_t i = 0; i < 4; ++i) {
        const Vector has = _mm256_cmpgt_epi32(symbols[i], all(direct - 1));
        const Vector highest = _mm256_or_si256(_mm256_and_si256(symbols[i], all(1)), all(2));
        const Vector top = _mm256_blendv_epi8(symbols[i], highest, has);
        symbols[i] = _mm256_or_si256(_mm256_sllv_epi32(top, lengths[i]), bits[i]);
    }
}

// The lanes of residuals. With t = base + d, from_delta gives t where that has the sign of the base, and else, where
// the sum left the half of the numbers that it began in, t with all bits below the sign flipped.
template <size_t W>
Vector lanes_of(Vector z, Vector base, Vector offset) {
    using L = Lanes<W>;
    const Vector odd = L::subtract(_mm256_setzero_si256(), _mm256_and_si256(z, L::one()));
    const Vector d = L::add(_mm256_xor_si256(L::half(z), odd), offset);
    const Vector sum = L::add(base, d);
    return _mm256_xor_si256(sum, _mm256_and_si256(L::negative(_mm256_xor_si256(sum, base)), L::below_sign()));
}

// Where the table of each context begins, in units that make a byte of it.
constexpr unsigned table_shift = 8;
struct Tables {
    uint8_t of_class[classes][contexts];
    explicit Tables(const Model& model) {
        for (unsigned c = 0; c < classes; ++c) {
            for (unsigned i = 0; i < contexts; ++i) {
                of_class[c][i] = static_cast<uint8_t>(model.table_of[c][i] << (probability_bits - table_shift));
            }
        }
    }
};

// One dense block. R registers hold the states. What needs no state is done before and after, for the whole block: the
// CPU sees so many instructions ahead, and with the ones that wait for each other alone among them it sees more of
// them.
template <size_t W, size_t R, bool Drift>
void read_block(const Model& model, const Slot* slots, const uint8_t* tables, Vector (&states)[R], Window& from,
                const uint8_t* base, uint8_t* out) {
    const uint8_t* words = from.words;
    const Lookup table_of(tables);
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(model.shift));
    const uint32_t lowest = model.low;
    // Of 16 tables in either half of a register, those of lanes i and i + 8 side by side, in the upper halves of 16
    // bits.
    const Vector pairs = _mm256_add_epi32(
        _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), all(0x01000100)), all(0x08800080));
    constexpr size_t runs = block_lanes / run_lanes;
    Vector places[runs][2], residuals[runs][W];
    for (size_t i = 0; i < runs; ++i) {
        const Vector found = table_of(contexts_of<W, Drift>(base + i * run_lanes * W, shift, lowest));
        places[i][0] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(found, 0x44), pairs);
        places[i][1] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(found, 0xee), pairs);
    }
    for (size_t i = 0; i < runs; ++i) {
        Vector z[4];
        for (size_t j = 0; j < 4; j += R) take_symbols(states, places[i] + j / 2, slots, words, z + j);
        const Vector any = _mm256_or_si256(_mm256_or_si256(z[0], z[1]), _mm256_or_si256(z[2], z[3]));
        if (!_mm256_testz_si256(any, all(~(direct - 1)))) add_raw_bits<W>(z, states, words);
        Lanes<W>::narrow(z, residuals[i]);
    }
    for (size_t i = 0; i < runs * W; ++i) {
        const Vector lanes = load_vector(base + 32 * i);
        Vector offset = _mm256_setzero_si256();
        if constexpr (Drift) offset = Offsets(model)(lanes);
        store_vector(out + 32 * i, lanes_of<W>(residuals[i / W][i % W], lanes, offset));
    }
    from.words = words;
}

// Waiting for memory would add to waiting for states, where the CPU does not see far enough ahead by itself.
constexpr size_t fetched_ahead = 4;  // blocks
void fetch(const uint8_t* base, uint8_t* out, size_t at, size_t nbytes) {
    for (size_t i = at; i < at + nbytes; i += 64) {
        __builtin_prefetch(base + i);
        __builtin_prefetch(out + i, 1);
    }
}

// Dense blocks from `first` to before `end`. False if the words end before they do.
template <size_t W, size_t R>
bool read_dense(const Model& model, const Slot* slots, const Tables& tables, const uint8_t* block_classes,
                uint32_t* states_of, Window& window, const uint8_t* base, size_t first, size_t end, uint8_t* out) {
    Vector states[R];
    for (size_t r = 0; r < R; ++r) states[r] = load_vector(states_of + 8 * r);
    for (size_t k = first; k < end; ++k) {
        const uint8_t* lanes = base + k * block_lanes * W;
        uint8_t* to = out + k * block_lanes * W;
        const uint8_t* of_class = tables.of_class[block_classes[k]];
        window.prepare_block();
        fetch(base, out, (k + fetched_ahead < end ? k + fetched_ahead : end - 1) * block_lanes * W, block_lanes * W);
        if (W == 4 && block_classes[k] == drift_class) {
            read_block<W, R, W == 4>(model, slots, of_class, states, window, lanes, to);
        } else {
            read_block<W, R, false>(model, slots, of_class, states, window, lanes, to);
        }
        if (!window.holds()) return false;
    }
    for (size_t r = 0; r < R; ++r) store_vector(states_of + 8 * r, states[r]);
    return true;
}

template <size_t W, size_t R>
bool read(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from, const uint8_t* base,
          size_t first, size_t n, uint8_t* out) {
    Window window(from);
    const Tables tables(model);
    const size_t whole = n / block_lanes;
    size_t k = first;
    while (k < whole) {
        size_t end = k;
        while (end < whole && is_dense(block_classes[end])) ++end;
        if (k < end) {
            if (!read_dense<W, R>(model, slots, tables, block_classes, from.states, window, base, k, end, out))
                return false;
            k = end;
            continue;
        }
        const size_t at = k * block_lanes * W;
        if (block_classes[k++] == equal_class) {
            std::memcpy(out + at, base + at, block_lanes * W);
            continue;
        }
        window.give_back(from);
        if (!read_patches(model, slots, from, base + at, block_lanes, out + at)) return false;
        window.take_back(from);
    }
    window.give_back(from);
    return scalar_loops.read(model, slots, block_classes, from, base, k, n, out);
}

template <size_t W>
bool read_streams(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from,
                  const uint8_t* base, size_t first, size_t n, uint8_t* out) {
    switch (has_byte_magnitudes<W>(model) ? model.streams : 0) {
        case 16:
            return read<W, 2>(model, slots, block_classes, from, base, first, n, out);
        case 32:
            return read<W, 4>(model, slots, block_classes, from, base, first, n, out);
        default:
            return scalar_loops.read(model, slots, block_classes, from, base, first, n, out);
    }
}

}  // namespace

bool read_avx2(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from, const uint8_t* base,
               size_t first, size_t n, uint8_t* out) noexcept {
    switch (model.width) {
        case 1:
            return read_streams<1>(model, slots, block_classes, from, base, first, n, out);
        case 2:
            return read_streams<2>(model, slots, block_classes, from, base, first, n, out);
        case 4:
            return read_streams<4>(model, slots, block_classes, from, base, first, n, out);
        default:
            return scalar_loops.read(model, slots, block_classes, from, base, first, n, out);
    }
}

}  // namespace lamella::rans
