// Writing floats with AVX2.
#include "float_avx2.hpp"

#include <cstring>

namespace lamella::floats {
namespace {

// The symbols of a run, as bytes in order.
template <size_t W>
Vector symbols_of_run(const Model& model, const Magnitudes<W>& top_of, const uint8_t* lanes) {
    using L = LanesOf<W>;
    return to_bytes<W>([&](size_t i) {
        const Vector top = top_of(load_vector(lanes + 32 * i));
        const Vector at = L::min(L::subtract(top, L::all(model.first)), L::all(model.values));
        return _mm256_andnot_si256(L::equal(top, _mm256_setzero_si256()), L::add(at, L::all(1)));
    });
}

// Lanes to their raw bits.
template <size_t W>
struct RawBits {
    using L = LanesOf<W>;
    __m128i trailing, to_sign;
    Vector below_cut, sign;
    explicit RawBits(const Model& model)
        : trailing(by(model.trailing)),
          to_sign(by(8 * W - 1 - (model.cut - model.trailing))),
          below_cut(L::all((1u << (model.cut - model.trailing)) - 1)),
          sign(L::all(1u << (model.cut - model.trailing))) {}
    Vector operator()(Vector lanes) const {
        return _mm256_or_si256(_mm256_and_si256(L::right(lanes, trailing), below_cut),
                               _mm256_and_si256(L::right(lanes, to_sign), sign));
    }
};

// Writes the pairs of bytes and the bytes of the raw bits of a run, whose first lane is the block's lane `at`; returns
// what is left of them as bytes.
template <size_t W>
Vector cut_raw(const RawBits<W>& raw_of, const Pieces& pieces, const uint8_t* lanes, uint8_t* block, size_t at) {
    Vector raw[W];
    for (size_t i = 0; i < W; ++i) raw[i] = raw_of(load_vector(lanes + 32 * i));
    if constexpr (W == 4) {
        if (pieces.has_pairs()) {
            for (size_t i = 0; i < 4; i += 2) {
                const Vector low = all(0xffff);
                store_vector(block + 2 * (at + 8 * i),
                             pack_words(_mm256_and_si256(raw[i], low), _mm256_and_si256(raw[i + 1], low)));
            }
            for (Vector& of : raw) of = _mm256_srli_epi32(of, 16);
        }
    }
    if constexpr (W > 1) {
        if (pieces.has_bytes()) {
            store_vector(block + pieces.byte_at + at,
                         to_bytes<W>([&raw](size_t i) { return _mm256_and_si256(raw[i], LanesOf<W>::all(0xff)); }));
            for (Vector& of : raw) of = LanesOf<W>::right(of, by(8));
        }
    }
    return to_bytes<W>([&raw](size_t i) { return raw[i]; });
}

// Writes the pieces shorter than a byte; returns their end.
uint8_t* cut_rest(const Vector (&from)[4], unsigned rest, uint8_t* raw) {
    unsigned offset = 0;
    if ((rest & 4) != 0) {
        const Vector low = LanesOf<1>::all(0xf);
        for (unsigned i = 0; i < 2; ++i) {
            const Vector high = _mm256_andnot_si256(low, _mm256_slli_epi16(from[2 + i], 4));
            store_vector(raw + 32 * i, _mm256_or_si256(_mm256_and_si256(from[i], low), high));
        }
        raw += 64;
        offset = 4;
    }
    if ((rest & 2) != 0) {
        Vector four = _mm256_setzero_si256();
        for (unsigned i = 0; i < 4; ++i) {
            const Vector two = _mm256_and_si256(_mm256_srl_epi16(from[i], by(offset)), LanesOf<1>::all(3));
            four = _mm256_or_si256(four, _mm256_sll_epi16(two, by(2 * i)));
        }
        store_vector(raw, four);
        raw += 32;
        offset += 2;
    }
    if ((rest & 1) != 0) {
        __m128i eight = _mm_setzero_si128();
        for (unsigned i = 0; i < 4; ++i) {
            const Vector bit = _mm256_and_si256(_mm256_srl_epi16(from[i], by(offset)), LanesOf<1>::all(1));
            const __m128i first = _mm256_castsi256_si128(bit), second = _mm256_extracti128_si256(bit, 1);
            eight = _mm_or_si128(eight, _mm_sll_epi16(first, by(2 * i)));
            eight = _mm_or_si128(eight, _mm_sll_epi16(second, by(2 * i + 1)));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(raw), eight);
        raw += 16;
    }
    return raw;
}

bool is_zero(const uint8_t* bytes, size_t nbytes) {
    Vector any = _mm256_setzero_si256();
    for (size_t i = 0; i < nbytes; i += 32) any = _mm256_or_si256(any, load_vector(bytes + i));
    return _mm256_testz_si256(any, any) != 0;
}

template <size_t W>
[[gnu::noinline]] uint8_t* split(const Model& model, const uint8_t* weight_table, const uint8_t* src,
                                 const uint8_t* guide, size_t n, const Lanes& to, uint8_t* raw) {
    const Pieces pieces(raw_bits(model));
    const Lookup weight(weight_table);
    const Contexts<W> contexts_of(model.shift, model.low);
    const Magnitudes<W> top_of(model.cut);
    const RawBits<W> raw_of(model);
    const Vector below = LanesOf<1>::all(model.values < weights ? 0 : model.values - (weights - 1));
    size_t at = 0;
    for (; at + block_lanes <= n; at += block_lanes) {
        const uint8_t* lanes = src + at * W;
        uint32_t& level = to.levels[at / block_lanes];
        level = 0;
        if (is_zero(lanes, block_lanes * W)) continue;
        Vector rest[4];
        for (size_t g = 0; g < 4; ++g) {
            const size_t first = run_lanes * g;
            const Vector symbols = symbols_of_run<W>(model, top_of, lanes + first * W);
            store_vector(to.symbols + at + first, symbols);
            const Vector above = _mm256_subs_epu8(symbols, below);
            level += sum_of_bytes(weight(_mm256_min_epu8(above, LanesOf<1>::all(weights - 1))));
            if (guide != nullptr) {
                store_vector(to.contexts + at + first, contexts_of(guide + (at + first) * W));
            }
            rest[g] = cut_raw<W>(raw_of, pieces, lanes + first * W, raw, first);
        }
        raw = cut_rest(rest, pieces.rest(), raw + pieces.rest_at);
    }
    if (at == n) return raw;
    const Lanes last{to.symbols + at, to.contexts + at, to.levels + at / block_lanes};
    return scalar_loops.split(model, weight_table, src + at * W, guide == nullptr ? nullptr : guide + at * W, n - at,
                              last, raw);
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
[[gnu::noinline]] void write(const Model& model, const Step* steps, const uint8_t* block_classes, const Lanes& from,
                             const uint8_t* src, bool guided, size_t n, Sink& sink) {
    const size_t whole = n / block_lanes;
    if (whole * block_lanes < n) {
        // A state is numbered by its lane in the chunk: 128 is a multiple of how many there are.
        const size_t at = whole * block_lanes;
        const Lanes last{from.symbols + at, from.contexts + at, from.levels + whole};
        scalar_loops.write(model, steps, block_classes + whole, last, src + at * W, guided, n - at, sink);
    }
    Vector states[R];
    for (size_t r = 0; r < R; ++r) states[r] = load_vector(sink.to.states + 8 * r);
    uint8_t *words = sink.to.words, *escapes = sink.escapes;
    for (size_t k = whole; k-- > 0;) {
        if (block_classes[k] == zero_class) continue;
        const Lookup table_of(model.table_of[block_classes[k]]);
        const Vector of_class = LanesOf<1>::all(model.table_of[block_classes[k]][0]);
        for (size_t i = (k + 1) * block_lanes; i > k * block_lanes;) {
            i -= run_lanes;
            const Vector tables = guided ? table_of(load_vector(from.contexts + i)) : of_class;
            alignas(32) uint64_t at[8];
            rans::numbers_of<symbol_stride>(tables, load_vector(from.symbols + i), at);
            for (size_t g = 4; g-- > 0;) {
                rans::Steps of_lanes(steps, at + 2 * g);
                const unsigned escaped = mask_of(of_lanes.packed);
                if (escaped != 0) {
                    add_escapes<W>(model, escaped, src + (i + 8 * g) * W, escapes);
                    of_lanes.packed = _mm256_and_si256(of_lanes.packed, all(~escape_mark));
                }
                rans::code_symbols(of_lanes, states[g % R], words);
            }
        }
    }
    sink.to.words = words;
    sink.escapes = escapes;
    for (size_t r = 0; r < R; ++r) store_vector(sink.to.states + 8 * r, states[r]);
}

uint8_t* split_any(const Model& model, const uint8_t* weight_table, const uint8_t* src, const uint8_t* guide, size_t n,
                   const Lanes& to, uint8_t* raw) noexcept {
    const auto scalar = [&] { return scalar_loops.split(model, weight_table, src, guide, n, to, raw); };
    if (guide != nullptr && !has_byte_magnitudes(model.width, model.shift)) return scalar();
    return rans::with_width(
        model.width, [&](auto w) { return split<w.value>(model, weight_table, src, guide, n, to, raw); }, scalar);
}

void write_any(const Model& model, const Step* steps, const uint8_t* block_classes, const Lanes& from,
               const uint8_t* src, bool guided, size_t n, Sink& to) noexcept {
    with_registers(
        model.width, model.streams,
        [&](auto w, auto r) { write<w.value, r.value>(model, steps, block_classes, from, src, guided, n, to); },
        [&] { scalar_loops.write(model, steps, block_classes, from, src, guided, n, to); });
}

}  // namespace

const Loops avx2_loops = {split_any, write_any, read_avx2};

}  // namespace lamella::floats
