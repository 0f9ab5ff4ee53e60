// Reading floats with AVX2.
#include "float_avx2.hpp"

#include <cstring>

namespace lamella::floats {
namespace {

// The pieces shorter than a byte, as bytes of 32 lanes each.
void join_rest(const uint8_t* raw, unsigned rest, Vector (&to)[4]) {
    unsigned offset = 0;
    for (Vector& v : to) v = _mm256_setzero_si256();
    if ((rest & 4) != 0) {
        const Vector first = load_vector(raw), second = load_vector(raw + 32), low = LanesOf<1>::all(0xf);
        to[0] = _mm256_and_si256(first, low);
        to[1] = _mm256_and_si256(second, low);
        to[2] = _mm256_and_si256(_mm256_srli_epi16(first, 4), low);
        to[3] = _mm256_and_si256(_mm256_srli_epi16(second, 4), low);
        raw += 64;
        offset = 4;
    }
    if ((rest & 2) != 0) {
        const Vector four = load_vector(raw);
        for (unsigned i = 0; i < 4; ++i) {
            const Vector two = _mm256_and_si256(_mm256_srl_epi16(four, by(2 * i)), LanesOf<1>::all(3));
            to[i] = _mm256_or_si256(to[i], _mm256_sll_epi16(two, by(offset)));
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
            to[i] = _mm256_or_si256(to[i], _mm256_and_si256(is_set, LanesOf<1>::all(1u << offset)));
        }
    }
}

// The raw bits of the lanes in register i of a run; `at` is its first lane, and `rest` holds bytes.
template <size_t W>
Vector raw_of(const Pieces& pieces, const uint8_t* block, const uint8_t* rest, size_t at, size_t i) {
    at += i * (32 / W);
    if constexpr (W == 1) return load_vector(rest + at);
    if constexpr (W == 2) {
        const Vector raw = _mm256_cvtepu8_epi16(load_half(rest + at));
        if (!pieces.has_bytes()) return raw;
        return _mm256_or_si256(_mm256_slli_epi16(raw, 8), _mm256_cvtepu8_epi16(load_half(block + pieces.byte_at + at)));
    }
    if constexpr (W == 4) {
        Vector raw = _mm256_sll_epi32(load_eight<1>(rest + at), by(pieces.bits & 24));
        if (pieces.has_bytes()) {
            const Vector bytes = load_eight<1>(block + pieces.byte_at + at);
            raw = _mm256_or_si256(raw, _mm256_sll_epi32(bytes, by(pieces.bits & 16)));
        }
        return pieces.has_pairs() ? _mm256_or_si256(raw, load_eight<2>(block + 2 * at)) : raw;
    }
}

// Makes lanes of symbols and raw bits. An escape is taken for the top after the window: what is written for it is off
// by a difference of tops.
template <size_t W>
struct Join {
    using L = LanesOf<W>;
    __m128i cut, trailing, to_sign;
    Vector before_first, inside, below_cut;
    explicit Join(const Model& model)
        : cut(by(model.cut)),
          trailing(by(model.trailing)),
          to_sign(by(8 * W - 1 - (model.cut - model.trailing))),
          before_first(L::all(model.first - 1)),
          inside(L::all(~uint64_t{0} << model.cut)),
          below_cut(L::all((1u << (model.cut - model.trailing)) - 1)) {}
    Vector operator()(Vector symbols, Vector raw) const {
        const Vector none = L::equal(symbols, _mm256_setzero_si256());
        Vector top = L::left(_mm256_andnot_si256(none, L::add(symbols, before_first)), cut);
        if constexpr (W == 1) top = _mm256_and_si256(top, inside);
        const Vector low = L::left(_mm256_and_si256(raw, below_cut), trailing);
        const Vector sign = _mm256_and_si256(L::left(raw, to_sign), L::all(L::sign));
        return L::add(top, _mm256_or_si256(low, sign));
    }
};

// Puts the tops of escapes, `set`, in place of the one after the window.
template <size_t W>
bool put_escapes(const Model& model, uint32_t set, Source& source, uint8_t* out) {
    for (; set != 0; set &= set - 1) {
        if (source.escapes == source.escapes_end) return false;
        const uint32_t top = load<uint16_t>(source.escapes);
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
bool read_block(const Model& model, const Pieces& pieces, const Join<W>& join, const Slot* slots, const uint8_t* tables,
                Vector (&states)[R], rans::Window& from, Source& source, const uint8_t* guide, uint8_t* out) {
    Vector rest[4];
    join_rest(source.raw + pieces.rest_at, pieces.rest(), rest);
    alignas(32) uint8_t rests[block_lanes];
    for (size_t i = 0; i < 4; ++i) store_vector(rests + 32 * i, rest[i]);
    const Lookup table_of(tables);
    const Contexts<W> contexts_of(model.shift, model.low);
    const Slot* in_use = Guided ? slots : slots + (size_t{tables[0]} << rans::table_shift);
    const uint8_t* words = from.words;
    for (size_t at = 0; at < block_lanes; at += run_lanes) {
        Vector places[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        if constexpr (Guided) {
            rans::to_places(table_of(contexts_of(guide + at * W)), places);
        }
        Vector symbols[4];
        for (size_t i = 0; i < 4; i += R) rans::take_symbols(states, places + i / 2, in_use, words, symbols + i);
        const Vector packed = pack(symbols[0], symbols[1], symbols[2], symbols[3]);
        for (size_t i = 0; i < W; ++i) {
            Vector of_lanes = packed;
            if constexpr (W == 2) {
                of_lanes =
                    _mm256_cvtepu8_epi16(i == 0 ? _mm256_castsi256_si128(packed) : _mm256_extracti128_si256(packed, 1));
            }
            if constexpr (W == 4) of_lanes = symbols[i];
            store_vector(out + at * W + 32 * i, join(of_lanes, raw_of<W>(pieces, source.raw, rests, at, i)));
        }
        const unsigned escaped = mask_of_bytes(_mm256_cmpeq_epi8(packed, LanesOf<1>::all(escape_of(model))));
        if (escaped != 0 && !put_escapes<W>(model, escaped, source, out + at * W)) return false;
    }
    from.words = words;
    return true;
}

template <size_t W, size_t R, bool Guided>
[[gnu::noinline]] bool read(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& source,
                            const uint8_t* guide, size_t first, size_t n, uint8_t* out) {
    rans::Window window(source.from);
    const rans::Tables tables(model.table_of);
    const Pieces pieces(raw_bits(model));
    const Join<W> join(model);
    Vector states[R];
    for (size_t r = 0; r < R; ++r) states[r] = load_vector(source.from.states + 8 * r);
    size_t k = first;
    for (; k < n / block_lanes; ++k) {
        const size_t at = k * block_lanes * W;
        if (block_classes[k] == zero_class) {
            std::memset(out + at, 0, block_lanes * W);
            continue;
        }
        window.prepare_block();
        if (!read_block<W, R, Guided>(model, pieces, join, slots, tables.of_class[block_classes[k]], states, window,
                                      source, Guided ? guide + at : nullptr, out + at) ||
            !window.holds())
            return false;
        source.raw += raw_nbytes(block_lanes, pieces.bits);
    }
    for (size_t r = 0; r < R; ++r) store_vector(source.from.states + 8 * r, states[r]);
    window.give_back(source.from);
    return scalar_loops.read(model, slots, block_classes, source, guide, k, n, out);
}

}  // namespace

bool read_avx2(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& source,
               const uint8_t* guide, size_t first, size_t n, uint8_t* out) noexcept {
    const auto scalar = [&] { return scalar_loops.read(model, slots, block_classes, source, guide, first, n, out); };
    if (guide != nullptr && !has_byte_magnitudes(model.width, model.shift)) return scalar();
    return with_registers(
        model.width, model.streams,
        [&](auto w, auto r) {
            return guide == nullptr
                       ? read<w.value, r.value, false>(model, slots, block_classes, source, guide, first, n, out)
                       : read<w.value, r.value, true>(model, slots, block_classes, source, guide, first, n, out);
        },
        scalar);
}

}  // namespace lamella::floats
