// Reading the lanes of dense blocks with AVX2.
#include "rans_avx2.hpp"

#include <cstring>

namespace lamella::rans {
namespace {

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
    using L = LanesOf<W>;
    const Vector odd = L::subtract(_mm256_setzero_si256(), _mm256_and_si256(z, L::all(1)));
    const Vector d = L::add(_mm256_xor_si256(L::half(z), odd), offset);
    const Vector sum = L::add(base, d);
    return _mm256_xor_si256(sum, _mm256_and_si256(L::negative(_mm256_xor_si256(sum, base)), L::below_sign()));
}

// Four registers of 32-bit lanes to W of lanes of W bytes, which hold them.
template <size_t W>
void narrow(const Vector (&wide)[4], Vector (&to)[W]) {
    if constexpr (W == 1) to[0] = pack(wide[0], wide[1], wide[2], wide[3]);
    if constexpr (W == 2) to[0] = pack_words(wide[0], wide[1]), to[1] = pack_words(wide[2], wide[3]);
    if constexpr (W == 4) std::memcpy(to, wide, sizeof to);
}

// One dense block. R registers hold the states. What needs no state is done before and after, for the whole block: the
// CPU sees so many instructions ahead, and with the ones that wait for each other alone among them it sees more of
// them.
template <size_t W, size_t R, bool Drift>
void read_block(const Model& model, const Slot* slots, const uint8_t* tables, Vector (&states)[R], Window& from,
                const uint8_t* base, uint8_t* out) {
    const uint8_t* words = from.words;
    const Lookup table_of(tables);
    const Contexts<W> contexts_of(model.shift, model.low);
    constexpr size_t runs = block_lanes / run_lanes;
    Vector places[runs][2], residuals[runs][W];
    for (size_t i = 0; i < runs; ++i) {
        const uint8_t* run = base + i * run_lanes * W;
        to_places(table_of(Drift ? drift_contexts(run) : contexts_of(run)), places[i]);
    }
    for (size_t i = 0; i < runs; ++i) {
        Vector z[4];
        for (size_t j = 0; j < 4; j += R) take_symbols(states, places[i] + j / 2, slots, words, z + j);
        const Vector any = _mm256_or_si256(_mm256_or_si256(z[0], z[1]), _mm256_or_si256(z[2], z[3]));
        if (!_mm256_testz_si256(any, all(~(direct - 1)))) add_raw_bits<W>(z, states, words);
        narrow(z, residuals[i]);
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
[[gnu::noinline]] bool read(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from,
                            const uint8_t* base, size_t first, size_t n, uint8_t* out) {
    Window window(from);
    const Tables tables(model.table_of);
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

}  // namespace

bool read_avx2(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from, const uint8_t* base,
               size_t first, size_t n, uint8_t* out) noexcept {
    const auto scalar = [&] { return scalar_loops.read(model, slots, block_classes, from, base, first, n, out); };
    if (!has_byte_magnitudes(model.width, model.shift)) return scalar();
    return with_registers(
        model.width, model.streams,
        [&](auto w, auto r) { return read<w.value, r.value>(model, slots, block_classes, from, base, first, n, out); },
        scalar);
}

}  // namespace lamella::rans
