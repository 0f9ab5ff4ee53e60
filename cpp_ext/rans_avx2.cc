// The residual coder's loops over lanes with AVX2, for lanes of up to four bytes and at least 8 streams; what is
// left, the last block if it is short included, goes through the scalar ones. See avx2.cc for the rules of such a file.
#include <immintrin.h>

#include <cstring>

#include "rans.hpp"

namespace lamella::rans {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

using Vector = __m256i;

Vector load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Vector*>(p)); }
void store(uint8_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<Vector*>(p), v); }
Vector load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Vector*>(p)); }
void store(uint32_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<Vector*>(p), v); }

template <class T>
T load_scalar(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

Vector all(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
int mask_of(Vector v) { return _mm256_movemask_ps(_mm256_castsi256_ps(v)); }
unsigned count(int mask) { return static_cast<unsigned>(_mm_popcnt_u32(static_cast<unsigned>(mask))); }

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

// Four registers of 32-bit lanes below 256 to one of bytes, in order.
Vector pack(Vector a, Vector b, Vector c, Vector d) {
    const Vector packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// 32 bytes, each below 32, to the bytes that a table of 32 has for them.
struct Lookup {
    Vector low, high;
    explicit Lookup(const uint8_t* table)
        : low(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))),
          high(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16)))) {}
    Vector operator()(Vector at) const {
        return _mm256_blendv_epi8(_mm256_shuffle_epi8(low, at), _mm256_shuffle_epi8(high, at),
                                  _mm256_slli_epi16(at, 3));
    }
};

// Lanes of W bytes, in registers of 32 / W.
template <size_t W>
struct Lanes;

template <>
struct Lanes<1> {
    static Vector negative(Vector v) { return _mm256_cmpgt_epi8(_mm256_setzero_si256(), v); }
    static Vector below_sign() { return _mm256_set1_epi8(0x7f); }
    static Vector add(Vector a, Vector b) { return _mm256_add_epi8(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm256_sub_epi8(a, b); }
    // There is no shift of bytes: shift pairs and drop what came from the neighbour.
    static Vector half(Vector v) { return _mm256_and_si256(_mm256_srli_epi16(v, 1), below_sign()); }
    static Vector one() { return _mm256_set1_epi8(1); }

    static Vector contexts_of(const uint8_t* base, __m128i shift, uint32_t low) {
        const Vector inside = _mm256_set1_epi8(static_cast<char>(0x7f >> _mm_cvtsi128_si32(shift)));
        const Vector magnitude = _mm256_and_si256(_mm256_srl_epi16(load(base), shift), inside);
        const Vector lows = _mm256_set1_epi8(static_cast<char>(low < 0xff ? low : 0xff));
        return _mm256_min_epu8(_mm256_subs_epu8(magnitude, lows), _mm256_set1_epi8(contexts - 1));
    }

    static void store_symbols(uint8_t* to, const Vector (&s)[4]) { store(to, pack(s[0], s[1], s[2], s[3])); }
    static Vector load_eight(const uint8_t* from) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    }
    static void store_eight(uint8_t* to, Vector v) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(pack(v, v, v, v)));
    }
};

template <>
struct Lanes<2> {
    static Vector negative(Vector v) { return _mm256_srai_epi16(v, 15); }
    static Vector below_sign() { return _mm256_set1_epi16(0x7fff); }
    static Vector add(Vector a, Vector b) { return _mm256_add_epi16(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm256_sub_epi16(a, b); }
    static Vector half(Vector v) { return _mm256_srli_epi16(v, 1); }
    static Vector one() { return _mm256_set1_epi16(1); }

    // The contexts of 32 lanes, as bytes in order.
    static Vector contexts_of(const uint8_t* base, __m128i shift, uint32_t low) {
        const Vector first = _mm256_srl_epi16(_mm256_and_si256(load(base), below_sign()), shift);
        const Vector second = _mm256_srl_epi16(_mm256_and_si256(load(base + 32), below_sign()), shift);
        const Vector lows = _mm256_set1_epi16(static_cast<short>(low));
        const Vector top = _mm256_set1_epi16(contexts - 1);
        const Vector packed = _mm256_packus_epi16(_mm256_min_epu16(_mm256_subs_epu16(first, lows), top),
                                                  _mm256_min_epu16(_mm256_subs_epu16(second, lows), top));
        return _mm256_permute4x64_epi64(packed, 0xd8);
    }

    // Symbols of 32 lanes, four registers of eight.
    static void store_symbols(uint8_t* to, const Vector (&s)[4]) {
        store(to, _mm256_permute4x64_epi64(_mm256_packus_epi32(s[0], s[1]), 0xd8));
        store(to + 32, _mm256_permute4x64_epi64(_mm256_packus_epi32(s[2], s[3]), 0xd8));
    }
    // Eight of them.
    static Vector load_eight(const uint8_t* from) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static void store_eight(uint8_t* to, Vector v) {
        const Vector packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
    }
};

template <>
struct Lanes<4> {
    static Vector negative(Vector v) { return _mm256_srai_epi32(v, 31); }
    static Vector below_sign() { return all(0x7fffffff); }
    static Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm256_sub_epi32(a, b); }
    static Vector half(Vector v) { return _mm256_srli_epi32(v, 1); }
    static Vector one() { return all(1); }

    static Vector contexts_of(const uint8_t* base, __m128i shift, uint32_t low) {
        Vector c[4];
        for (int i = 0; i < 4; ++i) {
            const Vector magnitude = _mm256_srl_epi32(_mm256_and_si256(load(base + 32 * i), below_sign()), shift);
            c[i] = _mm256_max_epi32(_mm256_sub_epi32(magnitude, all(low)), _mm256_setzero_si256());
            c[i] = _mm256_min_epi32(c[i], all(contexts - 1));
        }
        return pack(c[0], c[1], c[2], c[3]);
    }

    static void store_symbols(uint8_t* to, const Vector (&s)[4]) {
        for (int i = 0; i < 4; ++i) store(to + 32 * i, s[i]);
    }
    static Vector load_eight(const uint8_t* from) { return load(from); }
    static void store_eight(uint8_t* to, Vector v) { store(to, v); }
};

Vector drift_bins(Vector base) { return _mm256_and_si256(_mm256_srli_epi32(base, drift_shift), all(contexts - 1)); }

Vector drift_contexts(const uint8_t* base) {
    return pack(drift_bins(load(base)), drift_bins(load(base + 32)), drift_bins(load(base + 64)),
                drift_bins(load(base + 96)));
}

// The offsets of eight lanes that drift.
struct Offsets {
    Vector quarters[4];
    explicit Offsets(const Model& model) {
        for (int i = 0; i < 4; ++i) {
            quarters[i] = _mm256_loadu_si256(reinterpret_cast<const Vector*>(model.offsets + 8 * i));
        }
    }
    Vector operator()(Vector base) const {
        const Vector bin = drift_bins(base);
        const auto select = [](Vector a, Vector b, Vector by) {
            return _mm256_castps_si256(
                _mm256_blendv_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(by)));
        };
        Vector found[4];
        for (int i = 0; i < 4; ++i) found[i] = _mm256_permutevar8x32_epi32(quarters[i], bin);
        const Vector bit3 = _mm256_slli_epi32(bin, 28), bit4 = _mm256_slli_epi32(bin, 27);
        return select(select(found[0], found[1], bit3), select(found[2], found[3], bit3), bit4);
    }
};

// The four bytes at eight places, by single loads: gathers are slower on the CPUs that this was measured on, and so is
// taking the places through memory.
template <size_t scale_of_index>
Vector gather(const uint8_t* from, Vector places) {
    const __m128i first = _mm256_castsi256_si128(places), second = _mm256_extracti128_si256(places, 1);
    const auto four = [from](__m128i of) {
        const auto a = static_cast<uint64_t>(_mm_cvtsi128_si64(of));
        const auto b = static_cast<uint64_t>(_mm_extract_epi64(of, 1));
        const auto value = [from](uint64_t i) { return load_scalar<int>(from + i * scale_of_index); };
        __m128i v = _mm_cvtsi32_si128(value(a & 0xffffffff));
        v = _mm_insert_epi32(v, value(a >> 32), 1);
        v = _mm_insert_epi32(v, value(b & 0xffffffff), 2);
        return _mm_insert_epi32(v, value(b >> 32), 3);
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(four(first)), four(second), 1);
}

// Words and raw bits of a source, such that a whole block can be read before anything is checked: near their ends,
// reading goes on in a copy with zeros after it.
constexpr size_t block_words_nbytes = 2 * (block_lanes + 8);
constexpr size_t block_raw_nbytes = block_lanes * 30 / 8 + 16;

struct Window {
    const uint8_t* words;
    const uint8_t* words_end;
    const uint8_t* raw;
    uint64_t bit;   // of raw
    uint64_t bits;  // in raw
    bool copied_words = false, copied_raw = false;
    uint8_t last_words[2 * block_words_nbytes];
    uint8_t last_raw[2 * block_raw_nbytes];

    explicit Window(const Source& from)
        : words(from.words),
          words_end(from.words_end),
          raw(from.raw),
          bit(from.bit),
          bits(8 * static_cast<uint64_t>(from.raw_nbytes)) {}

    void prepare_block() {
        const auto words_left = static_cast<size_t>(words_end - words);
        if (words_left < block_words_nbytes && !copied_words) {
            std::memset(last_words, 0, sizeof last_words);
            std::memcpy(last_words, words, words_left);
            words = last_words;
            words_end = last_words + words_left;
            copied_words = true;
        }
        if (bits - bit < 8 * block_raw_nbytes && !copied_raw) {
            const auto raw_left = static_cast<size_t>(bits / 8 - bit / 8);
            std::memset(last_raw, 0, sizeof last_raw);
            std::memcpy(last_raw, raw + bit / 8, raw_left);
            raw = last_raw;
            bit %= 8;
            bits = 8 * static_cast<uint64_t>(raw_left);
            copied_raw = true;
        }
    }

    // Whether the last block found all that it took.
    bool holds() const { return words <= words_end && bit <= bits; }

    void give_back(Source& to) const {
        to.words = to.words_end - (words_end - words);
        to.bit = 8 * static_cast<uint64_t>(to.raw_nbytes) - (bits - bit);
    }
};

// Decodes one symbol with each of eight states; `tables` are the tables of their lanes.
Vector step(Vector& state, Vector tables, const uint8_t* slots, const uint8_t*& words) {
    const Vector twelve = all(0xfff);
    const Vector at =
        _mm256_or_si256(_mm256_slli_epi32(tables, probability_bits), _mm256_and_si256(state, all(scale - 1)));
    const Vector slot = gather<sizeof(Slot)>(slots, at);
    const Vector next =
        _mm256_add_epi32(_mm256_mullo_epi32(_mm256_and_si256(slot, twelve), _mm256_srli_epi32(state, probability_bits)),
                         _mm256_and_si256(_mm256_srli_epi32(slot, 12), twelve));
    const Vector needy = _mm256_cmpgt_epi32(all(low_state), next);
    const int set = mask_of(needy);
    const Vector eight_words = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
    const Vector given = _mm256_shuffle_epi8(eight_words, load(spread.of_set[set]));
    words += 2 * count(set);
    state = _mm256_or_si256(_mm256_sllv_epi32(next, _mm256_and_si256(needy, all(16))), given);
    return _mm256_srli_epi32(slot, 24);
}

// Residuals of eight symbols.
Vector with_raw_bits(Vector symbols, Window& from) {
    const Vector beyond = _mm256_sub_epi32(symbols, all(direct));
    const Vector has = _mm256_cmpgt_epi32(symbols, all(direct - 1));
    const Vector lengths = _mm256_and_si256(has, _mm256_add_epi32(_mm256_srai_epi32(beyond, 1), all(4)));
    // Where each begins: the sum of the lengths before it.
    Vector ends = _mm256_add_epi32(lengths, _mm256_slli_si256(lengths, 4));
    ends = _mm256_add_epi32(ends, _mm256_slli_si256(ends, 8));
    const Vector first_half = _mm256_permutevar8x32_epi32(ends, all(3));
    ends = _mm256_add_epi32(ends, _mm256_blend_epi32(_mm256_setzero_si256(), first_half, 0xf0));
    const auto skip = static_cast<uint32_t>(from.bit % 8);
    const Vector starts = _mm256_add_epi32(_mm256_sub_epi32(ends, lengths), all(skip));
    const uint8_t* raw = from.raw + from.bit / 8;
    from.bit += static_cast<uint32_t>(_mm256_extract_epi32(ends, 7));
    Vector bits;
    if (mask_of(_mm256_cmpgt_epi32(lengths, all(25))) == 0) {  // four bytes hold them wherever they begin
        bits = _mm256_srlv_epi32(gather<1>(raw, _mm256_srli_epi32(starts, 3)), _mm256_and_si256(starts, all(7)));
    } else {
        uint32_t start[8], found[8];
        store(start, starts);
        for (int i = 0; i < 8; ++i) {
            found[i] = static_cast<uint32_t>(load_scalar<uint64_t>(raw + start[i] / 8) >> (start[i] % 8));
        }
        bits = load(found);
    }
    bits = _mm256_andnot_si256(_mm256_sllv_epi32(all(~0u), lengths), bits);
    const Vector top = _mm256_sllv_epi32(_mm256_or_si256(_mm256_and_si256(symbols, all(1)), all(2)), lengths);
    return _mm256_blendv_epi8(symbols, _mm256_or_si256(top, bits), has);
}

template <size_t W>
Vector apply(Vector z, Vector base, Vector offset) {
    using L = Lanes<W>;
    const Vector odd = L::subtract(_mm256_setzero_si256(), _mm256_and_si256(z, L::one()));
    const Vector sign = L::negative(base);
    Vector d = L::add(_mm256_xor_si256(L::half(z), odd), offset);
    d = L::subtract(_mm256_xor_si256(d, sign), sign);
    const Vector ordered = L::add(_mm256_xor_si256(base, _mm256_and_si256(sign, L::below_sign())), d);
    return _mm256_xor_si256(ordered, _mm256_and_si256(L::negative(ordered), L::below_sign()));
}

// With more escapes than this in a block, vectors read raw bits faster than one at a time.
constexpr unsigned many_escapes = block_lanes / 4;

// One block that is not equal to its base. R registers hold the states.
template <size_t W, size_t R>
void read_block(const Model& model, const uint8_t* slots, unsigned block_class, Vector (&states)[R], Window& from,
                const uint8_t* base, uint8_t* out) {
    const Lookup table_of(model.table_of[block_class]);
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(model.shift));
    const bool drift = W == 4 && block_class == drift_class;
    alignas(32) uint8_t residuals[block_lanes * W];
    uint32_t escapes[block_lanes / 32];
    const uint8_t* words = from.words;
    for (size_t g = 0; g < block_lanes / 32; ++g) {
        const uint8_t* lanes = base + g * 32 * W;
        const Vector tables = table_of(drift ? drift_contexts(lanes) : Lanes<W>::contexts_of(lanes, shift, model.low));
        const __m128i low = _mm256_castsi256_si128(tables), high = _mm256_extracti128_si256(tables, 1);
        Vector symbols[4];
        symbols[0] = step(states[0 % R], _mm256_cvtepu8_epi32(low), slots, words);
        symbols[1] = step(states[1 % R], _mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)), slots, words);
        symbols[2] = step(states[2 % R], _mm256_cvtepu8_epi32(high), slots, words);
        symbols[3] = step(states[3 % R], _mm256_cvtepu8_epi32(_mm_srli_si128(high, 8)), slots, words);
        const Vector bytes = pack(symbols[0], symbols[1], symbols[2], symbols[3]);
        escapes[g] =
            static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi8(bytes, _mm256_set1_epi8(direct - 1))));
        Lanes<W>::store_symbols(residuals + g * 32 * W, symbols);
    }
    from.words = words;

    unsigned escaped = 0;
    for (const uint32_t set : escapes) escaped += count(static_cast<int>(set));
    if (escaped > many_escapes) {
        for (size_t i = 0; i < block_lanes * W; i += 8 * W) {
            Lanes<W>::store_eight(residuals + i, with_raw_bits(Lanes<W>::load_eight(residuals + i), from));
        }
    } else if (escaped > 0) {
        for (size_t half = 0; half < 2; ++half) {
            uint8_t* z = residuals + half * 64 * W;
            for (uint64_t set = escapes[2 * half] | static_cast<uint64_t>(escapes[2 * half + 1]) << 32; set != 0;
                 set &= set - 1) {
                const auto i = static_cast<size_t>(__builtin_ctzll(set));
                const unsigned symbol = z[i * W];
                const unsigned bits = 4 + (symbol - direct) / 2;
                const uint64_t raw = load_scalar<uint64_t>(from.raw + from.bit / 8) >> (from.bit % 8);
                from.bit += bits;
                const auto value = static_cast<uint32_t>((2 | (symbol & 1)) << bits | (raw & ((1u << bits) - 1)));
                std::memcpy(z + i * W, &value, W);
            }
        }
    }

    if (drift) {
        const Offsets offset_of(model);
        for (size_t i = 0; i < block_lanes * W; i += 32) {
            const Vector lanes = load(base + i);
            store(out + i, apply<W>(load(residuals + i), lanes, offset_of(lanes)));
        }
    } else {
        for (size_t i = 0; i < block_lanes * W; i += 32) {
            store(out + i, apply<W>(load(residuals + i), load(base + i), _mm256_setzero_si256()));
        }
    }
}

template <size_t W, size_t R>
bool read(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from, const uint8_t* base,
          size_t first, size_t n, uint8_t* out) {
    Window window(from);
    Vector states[R];
    for (size_t r = 0; r < R; ++r) states[r] = load(from.states + 8 * r);
    size_t k = first;
    for (; k < n / block_lanes; ++k) {
        const size_t at = k * block_lanes * W;
        if (block_classes[k] == equal_class) {
            std::memcpy(out + at, base + at, block_lanes * W);
            continue;
        }
        window.prepare_block();
        read_block<W, R>(model, reinterpret_cast<const uint8_t*>(slots), block_classes[k], states, window, base + at,
                         out + at);
        if (!window.holds()) return false;
    }
    for (size_t r = 0; r < R; ++r) store(from.states + 8 * r, states[r]);
    window.give_back(from);
    return scalar_loops.read(model, slots, block_classes, from, base, k, n, out);
}

template <size_t W>
bool read_streams(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from,
                  const uint8_t* base, size_t first, size_t n, uint8_t* out) {
    switch (model.streams) {
        case 8:
            return read<W, 1>(model, slots, block_classes, from, base, first, n, out);
        case 16:
            return read<W, 2>(model, slots, block_classes, from, base, first, n, out);
        case 32:
            return read<W, 4>(model, slots, block_classes, from, base, first, n, out);
        default:
            return scalar_loops.read(model, slots, block_classes, from, base, first, n, out);
    }
}

bool read_any(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from, const uint8_t* base,
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

// Encoding.

template <size_t W>
Vector residual_of(Vector x, Vector base, Vector offset) {
    using L = Lanes<W>;
    const auto ordered = [](Vector v) {
        return _mm256_xor_si256(v, _mm256_and_si256(L::negative(v), L::below_sign()));
    };
    const Vector sign = L::negative(base);
    Vector d = L::subtract(ordered(x), ordered(base));
    d = L::subtract(L::subtract(_mm256_xor_si256(d, sign), sign), offset);
    return _mm256_xor_si256(L::add(d, d), L::negative(d));
}

// Symbols of eight residuals below 2^31: the exponent of a float is how many bits an integer has.
Vector symbols_of(Vector z) {
    // Without the bits that could make rounding carry up to the highest one.
    const Vector kept = _mm256_andnot_si256(_mm256_srli_epi32(z, 8), z);
    const Vector as_float = _mm256_castps_si256(_mm256_cvtepi32_ps(kept));
    constexpr uint32_t of_direct = 2 * (127 + 5) - direct;  // of a float, the exponent and a bit of the mantissa
    const Vector bucket = _mm256_sub_epi32(_mm256_srli_epi32(as_float, 22), all(of_direct));
    return _mm256_blendv_epi8(bucket, z, _mm256_cmpgt_epi32(all(direct), z));
}

uint8_t symbol_of(uint32_t z) {
    if (z < direct) return static_cast<uint8_t>(z);
    const auto highest = static_cast<unsigned>(31 - __builtin_clz(z));
    return static_cast<uint8_t>(direct + 2 * (highest - 5) + (z >> (highest - 1) & 1));
}

// Symbols of 32 residuals.
Vector symbols_of_32(const uint8_t* z, Lanes<1>) {
    const Vector v = load(z);
    if (_mm256_testz_si256(v, _mm256_set1_epi8(static_cast<char>(~(direct - 1))))) return v;
    return pack(symbols_of(Lanes<1>::load_eight(z)), symbols_of(Lanes<1>::load_eight(z + 8)),
                symbols_of(Lanes<1>::load_eight(z + 16)), symbols_of(Lanes<1>::load_eight(z + 24)));
}

Vector symbols_of_32(const uint8_t* z, Lanes<2>) {
    const Vector first = load(z), second = load(z + 32);
    const Vector above = _mm256_set1_epi16(static_cast<short>(~(direct - 1)));
    if (_mm256_testz_si256(_mm256_or_si256(first, second), above)) {
        return _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xd8);
    }
    return pack(symbols_of(Lanes<2>::load_eight(z)), symbols_of(Lanes<2>::load_eight(z + 16)),
                symbols_of(Lanes<2>::load_eight(z + 32)), symbols_of(Lanes<2>::load_eight(z + 48)));
}

Vector symbols_of_32(const uint8_t* z, Lanes<4>) {
    const Vector a = load(z), b = load(z + 32), c = load(z + 64), d = load(z + 96);
    if (mask_of(_mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d))) == 0) {
        return pack(symbols_of(a), symbols_of(b), symbols_of(c), symbols_of(d));
    }
    uint8_t symbols[32];
    for (size_t i = 0; i < 32; ++i) symbols[i] = symbol_of(load_scalar<uint32_t>(z + 4 * i));
    return load(symbols);
}

uint64_t sum_of_bytes(Vector v) {
    const Vector sums = _mm256_sad_epu8(v, _mm256_setzero_si256());
    const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(halves)) + static_cast<uint64_t>(_mm_extract_epi64(halves, 1));
}

template <size_t W>
bool is_equal(const uint8_t* a, const uint8_t* b) {
    Vector difference = _mm256_setzero_si256();
    for (size_t i = 0; i < block_lanes * W; i += 32) {
        difference = _mm256_or_si256(difference, _mm256_xor_si256(load(a + i), load(b + i)));
    }
    return _mm256_testz_si256(difference, difference) != 0;
}

// Symbols of one block, and their sum.
template <size_t W>
uint64_t symbolize_block(const uint8_t* x, const uint8_t* base, const Offsets* offset_of, uint8_t* residuals,
                         uint8_t* symbols) {
    for (size_t i = 0; i < block_lanes * W; i += 32) {
        const Vector lanes = load(base + i);
        const Vector offset = offset_of == nullptr ? _mm256_setzero_si256() : (*offset_of)(lanes);
        store(residuals + i, residual_of<W>(load(x + i), lanes, offset));
    }
    uint64_t sum = 0;
    for (size_t i = 0; i < block_lanes; i += 32) {
        const Vector found = symbols_of_32(residuals + i * W, Lanes<W>{});
        store(symbols + i, found);
        sum += sum_of_bytes(found);
    }
    return sum;
}

unsigned count_direct(const uint8_t* symbols) {
    unsigned found = 0;
    for (size_t i = 0; i < block_lanes; i += 32) {
        found += count(_mm256_movemask_epi8(_mm256_cmpgt_epi8(_mm256_set1_epi8(direct), load(symbols + i))));
    }
    return found;
}

Symbols from_lane(const Symbols& all_lanes, size_t at, size_t width) {
    return {all_lanes.symbols + at, all_lanes.contexts + at, all_lanes.residuals + at * width,
            all_lanes.kinds + at / block_lanes};
}

template <size_t W>
void symbolize(const Model& model, const uint8_t* src, const uint8_t* base, size_t n, const Symbols& to) {
    const Offsets offset_of(model);
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(model.shift));
    size_t at = 0;
    for (; at + block_lanes <= n; at += block_lanes) {
        const uint8_t *x = src + at * W, *b = base + at * W;
        const Symbols block = from_lane(to, at, W);
        if (is_equal<W>(x, b)) {
            *block.kinds = equal_class;
            continue;
        }
        *block.kinds = ordinary_kind;
        const uint64_t ordinary = symbolize_block<W>(x, b, nullptr, block.residuals, block.symbols);
        if constexpr (W == 4) {
            if (model.drift) {
                alignas(32) uint8_t residuals[block_lanes * W], symbols[block_lanes];
                const uint64_t drifting = symbolize_block<W>(x, b, &offset_of, residuals, symbols);
                if (4 * count_direct(symbols) >= 3 * block_lanes && drifting < ordinary) {
                    *block.kinds = drift_class;
                    std::memcpy(block.residuals, residuals, sizeof residuals);
                    std::memcpy(block.symbols, symbols, sizeof symbols);
                    for (size_t i = 0; i < block_lanes; i += 32) store(block.contexts + i, drift_contexts(b + i * W));
                    continue;
                }
            }
        }
        for (size_t i = 0; i < block_lanes; i += 32) {
            store(block.contexts + i, Lanes<W>::contexts_of(b + i * W, shift, model.low));
        }
    }
    if (at < n) scalar_loops.symbolize(model, src + at * W, base + at * W, n - at, from_lane(to, at, W));
}

void measure(const Symbols& of, const uint8_t* expected, size_t n, std::int32_t* activities) noexcept {
    const Lookup expected_of(expected);
    size_t k = 0;
    for (; k < n / block_lanes; ++k) {
        if (of.kinds[k] != ordinary_kind) continue;
        Vector found = _mm256_setzero_si256(), wanted = found;
        for (size_t i = k * block_lanes; i < (k + 1) * block_lanes; i += 32) {
            const Vector zero = _mm256_setzero_si256();
            found = _mm256_add_epi64(found, _mm256_sad_epu8(load(of.symbols + i), zero));
            wanted = _mm256_add_epi64(wanted, _mm256_sad_epu8(expected_of(load(of.contexts + i)), zero));
        }
        const Vector sums = _mm256_sub_epi64(_mm256_add_epi64(found, found), wanted);
        const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        activities[k] = static_cast<std::int32_t>(_mm_cvtsi128_si64(halves) + _mm_extract_epi64(halves, 1));
    }
    if (k * block_lanes < n) {
        scalar_loops.measure(from_lane(of, k * block_lanes, 0), expected, n - k * block_lanes, activities + k);
    }
}

// Of 32 lanes, contexts * stride + symbol, 16 bits each; or tables in place of contexts.
template <size_t W>
void numbers_of(Vector of_contexts, Vector of_symbols, uint64_t (&to)[8]) {
    constexpr int log_stride = W <= 2 ? 6 : 7;
    static_assert(1u << log_stride == symbol_stride(W) && contexts << log_stride <= 1u << 16);
    const auto number = [](__m128i context, __m128i symbol) {
        return _mm256_or_si256(_mm256_slli_epi16(_mm256_cvtepu8_epi16(context), log_stride),
                               _mm256_cvtepu8_epi16(symbol));
    };
    _mm256_store_si256(reinterpret_cast<Vector*>(to),
                       number(_mm256_castsi256_si128(of_contexts), _mm256_castsi256_si128(of_symbols)));
    _mm256_store_si256(reinterpret_cast<Vector*>(to + 4),
                       number(_mm256_extracti128_si256(of_contexts, 1), _mm256_extracti128_si256(of_symbols, 1)));
}

// Most lanes of a quiet block count on one counter, and would wait for one another: odd lanes have counters of their
// own.
template <size_t W>
void count(const Symbols& of, const uint8_t* block_classes, size_t n, uint32_t* counters) {
    constexpr size_t of_class = contexts * symbol_stride(W);
    for (size_t k = 0; k < n / block_lanes; ++k) {
        if (block_classes[k] == equal_class) continue;
        uint32_t *even = counters + block_classes[k] * of_class, *odd = even + classes * of_class;
        for (size_t i = k * block_lanes; i < (k + 1) * block_lanes; i += 32) {
            alignas(32) uint64_t numbers[8];
            numbers_of<W>(load(of.contexts + i), load(of.symbols + i), numbers);
            for (const uint64_t four : numbers) {
                ++even[four & 0xffff];
                ++odd[four >> 16 & 0xffff];
                ++even[four >> 32 & 0xffff];
                ++odd[four >> 48];
            }
        }
    }
}

void count_any(const Symbols& of, const uint8_t* block_classes, size_t n, size_t width, uint32_t* counters) noexcept {
    size_t counted = 0;
    if (width <= 4) {
        // Counters of narrow lanes are laid out alike.
        width <= 2 ? count<2>(of, block_classes, n, counters) : count<4>(of, block_classes, n, counters);
        counted = n / block_lanes * block_lanes;
    }
    scalar_loops.count(from_lane(of, counted, width), block_classes + counted / block_lanes, n - counted, width,
                       counters);
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

// Appends bits to bytes; up to seven of them wait. Writes eight bytes at a time.
struct RawBits {
    uint8_t* to;
    uint64_t waiting = 0;
    unsigned waiting_bits = 0;

    void put(uint64_t value, unsigned bits) {  // at most 56
        waiting |= value << waiting_bits;
        waiting_bits += bits;
        std::memcpy(to, &waiting, sizeof waiting);
        to += waiting_bits / 8;
        waiting >>= waiting_bits & 56;
        waiting_bits &= 7;
    }
    void finish() {
        if (waiting_bits != 0) *to++ = static_cast<uint8_t>(waiting);
    }
};

template <size_t W>
uint64_t raw_of(const uint8_t* residuals, unsigned bits) {
    uint32_t residual = 0;
    std::memcpy(&residual, residuals, W);
    return residual & ((1u << bits) - 1);
}

// The raw bits of 32 lanes, most of which have some, in pairs.
template <size_t W>
void put_all(const uint8_t* symbols, const uint8_t* residuals, RawBits& raw) {
    for (size_t i = 0; i < 32; i += 8) {
        const Vector of = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(symbols + i)));
        const Vector has = _mm256_cmpgt_epi32(of, all(direct - 1));
        const Vector beyond = _mm256_srli_epi32(_mm256_sub_epi32(of, all(direct)), 1);
        const Vector lengths = _mm256_and_si256(has, _mm256_add_epi32(beyond, all(4)));
        const Vector bits =
            _mm256_andnot_si256(_mm256_sllv_epi32(all(~0u), lengths), Lanes<W>::load_eight(residuals + i * W));
        const Vector even = _mm256_set1_epi64x(0xffffffff);
        const Vector first_length = _mm256_and_si256(lengths, even);
        const Vector pairs =
            _mm256_or_si256(_mm256_and_si256(bits, even), _mm256_sllv_epi64(_mm256_srli_epi64(bits, 32), first_length));
        alignas(32) uint64_t pair[4];
        alignas(32) uint32_t length[8];
        _mm256_store_si256(reinterpret_cast<Vector*>(pair), pairs);
        _mm256_store_si256(reinterpret_cast<Vector*>(length), lengths);
        for (size_t p = 0; p < 4; ++p) {
            const unsigned both = length[2 * p] + length[2 * p + 1];
            if (W == 4 && both > 56) {
                raw.put(pair[p] & ((uint64_t{1} << length[2 * p]) - 1), length[2 * p]);
                raw.put(pair[p] >> length[2 * p], length[2 * p + 1]);
            } else {
                raw.put(pair[p], both);
            }
        }
    }
}

template <size_t W>
void write_raw(const uint8_t* block_classes, const Symbols& from, size_t n, RawBits& raw) {
    for (size_t at = 0; at < n; at += block_lanes) {
        if (block_classes[at / block_lanes] == equal_class) continue;
        const size_t lanes = n - at < block_lanes ? n - at : block_lanes;
        // Symbols after the last lane are undefined, but there: they are masked.
        for (size_t i = at; i < at + lanes; i += 32) {
            const Vector symbols = load(from.symbols + i);
            auto set =
                static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi8(symbols, _mm256_set1_epi8(direct - 1))));
            if (at + lanes - i < 32) {
                set &= (1u << (at + lanes - i)) - 1;
            } else if (count(static_cast<int>(set)) > 8) {
                put_all<W>(from.symbols + i, from.residuals + i * W, raw);
                continue;
            }
            for (; set != 0; set &= set - 1) {
                const size_t lane = i + static_cast<size_t>(__builtin_ctz(set));
                const unsigned bits = 4 + (from.symbols[lane] - direct) / 2;
                raw.put(raw_of<W>(from.residuals + lane * W, bits), bits);
            }
        }
    }
}

// Codes one symbol with each of eight states; `at` are the numbers of their steps, 16 bits each, four and four.
void code_eight(Vector& state, const uint64_t* at, const Step* steps, uint8_t*& words) {
    const auto four = [&](unsigned lane) {
        const auto step_of = [&](uint64_t i) {
            return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(steps + (i & 0xffff)));
        };
        const uint64_t low = at[0] >> (16 * lane), high = at[1] >> (16 * lane);
        return _mm256_castsi256_ps(
            _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi64(step_of(low), step_of(low >> 16))),
                                    _mm_unpacklo_epi64(step_of(high), step_of(high >> 16)), 1));
    };
    const __m256 even = four(0), odd = four(2);
    const Vector reciprocal = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0x88));
    const Vector packed = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0xdd));
    const Vector frequency = _mm256_and_si256(packed, all(0xfff));
    const Vector fits = _mm256_cmpgt_epi32(frequency, _mm256_srli_epi32(state, 31 - probability_bits));
    const int giving = ~mask_of(fits) & 0xff;
    const Vector order =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(squeeze.lane_of[giving])));
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
                             _mm256_mullo_epi32(quotient, _mm256_sub_epi32(all(scale), frequency)));
}

template <size_t W, size_t R>
void write(const Model& model, const Step* steps, const uint8_t* block_classes, const Symbols& from, size_t n,
           Sink& to) {
    RawBits raw{to.raw};
    write_raw<W>(block_classes, from, n, raw);
    raw.finish();
    to.raw = raw.to;

    constexpr unsigned stride = symbol_stride(W);
    const size_t whole = n / block_lanes;
    for (size_t i = n; i-- > whole * block_lanes;) {
        if (block_classes[whole] == equal_class) break;
        const unsigned table = model.table_of[block_classes[whole]][from.contexts[i]];
        code(steps[table * stride + from.symbols[i]], to.states[i % model.streams], to.words);
    }
    Vector states[R];
    for (size_t r = 0; r < R; ++r) states[r] = load(to.states + 8 * r);
    uint8_t* words = to.words;
    for (size_t k = whole; k-- > 0;) {
        if (block_classes[k] == equal_class) continue;
        const Lookup table_of(model.table_of[block_classes[k]]);
        for (size_t i = (k + 1) * block_lanes; i > k * block_lanes;) {
            i -= 32;
            const Vector tables = table_of(load(from.contexts + i)), symbols = load(from.symbols + i);
            alignas(32) uint64_t at[8];
            numbers_of<W>(tables, symbols, at);
            code_eight(states[3 % R], at + 6, steps, words);
            code_eight(states[2 % R], at + 4, steps, words);
            code_eight(states[1 % R], at + 2, steps, words);
            code_eight(states[0], at, steps, words);
        }
    }
    to.words = words;
    for (size_t r = 0; r < R; ++r) store(to.states + 8 * r, states[r]);
}

template <size_t W>
void write_streams(const Model& model, const Step* steps, const uint8_t* block_classes, const Symbols& from, size_t n,
                   Sink& to) {
    switch (model.streams) {
        case 8:
            return write<W, 1>(model, steps, block_classes, from, n, to);
        case 16:
            return write<W, 2>(model, steps, block_classes, from, n, to);
        case 32:
            return write<W, 4>(model, steps, block_classes, from, n, to);
        default:
            return scalar_loops.write(model, steps, block_classes, from, n, to);
    }
}

void symbolize_any(const Model& model, const uint8_t* src, const uint8_t* base, size_t n, const Symbols& to) noexcept {
    switch (model.width) {
        case 1:
            return symbolize<1>(model, src, base, n, to);
        case 2:
            return symbolize<2>(model, src, base, n, to);
        case 4:
            return symbolize<4>(model, src, base, n, to);
        default:
            return scalar_loops.symbolize(model, src, base, n, to);
    }
}

void write_any(const Model& model, const Step* steps, const uint8_t* block_classes, const Symbols& from, size_t n,
               Sink& to) noexcept {
    switch (model.width) {
        case 1:
            return write_streams<1>(model, steps, block_classes, from, n, to);
        case 2:
            return write_streams<2>(model, steps, block_classes, from, n, to);
        case 4:
            return write_streams<4>(model, steps, block_classes, from, n, to);
        default:
            return scalar_loops.write(model, steps, block_classes, from, n, to);
    }
}

}  // namespace

const Loops avx2_loops = {symbolize_any, measure, count_any, write_any, read_any};

}  // namespace lamella::rans
