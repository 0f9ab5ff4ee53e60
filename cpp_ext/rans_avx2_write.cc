// Writing the lanes of dense blocks with AVX2.
#include "rans_avx2.hpp"

#include <cstring>

namespace lamella::rans {
namespace {

// See lanes_of in rans_avx2_read.cc, of which this is the inverse.
template <size_t W>
Vector residuals_of(Vector x, Vector base, Vector offset) {
    using L = LanesOf<W>;
    const Vector crossed = L::negative(_mm256_xor_si256(x, base));
    const Vector sum = _mm256_xor_si256(x, _mm256_and_si256(crossed, L::below_sign()));
    const Vector d = L::subtract(L::subtract(sum, base), offset);
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

// Symbols of a run's residuals.
template <size_t W>
Vector symbols_of_run(const uint8_t* z) {
    Vector any = load_vector(z);
    for (size_t i = 1; i < W; ++i) any = _mm256_or_si256(any, load_vector(z + 32 * i));
    if constexpr (W == 4) {
        if (mask_of(any) != 0) {
            uint8_t symbols[run_lanes];
            for (size_t i = 0; i < run_lanes; ++i) {
                symbols[i] = static_cast<uint8_t>(symbol_of(load<uint32_t>(z + 4 * i)));
            }
            return load_vector(symbols);
        }
    } else if (_mm256_testz_si256(any, LanesOf<W>::all(~uint64_t{direct - 1}))) {
        return to_bytes<W>([z](size_t i) { return load_vector(z + 32 * i); });
    }
    return to_bytes<4>([z](size_t i) { return symbols_of(load_eight<W>(z + 8 * W * i)); });
}

// How many lanes of a block differ, up to the first more than most_patches.
template <size_t W>
unsigned count_changed(const uint8_t* a, const uint8_t* b) {
    unsigned changed = 0;
    for (size_t i = 0; i < block_lanes * W && changed <= most_patches; i += 64) {
        const unsigned first = mask_of_bytes(LanesOf<W>::equal(load_vector(a + i), load_vector(b + i)));
        const unsigned second = mask_of_bytes(LanesOf<W>::equal(load_vector(a + i + 32), load_vector(b + i + 32)));
        changed += (64 - count_bits(first) - count_bits(second)) / static_cast<unsigned>(W);
    }
    return changed;
}

// Symbols of one block, and their sum.
template <size_t W, bool Drift>
uint64_t symbolize_block(const uint8_t* x, const uint8_t* base, const Offsets& offset_of, uint8_t* residuals,
                         uint8_t* symbols) {
    for (size_t i = 0; i < block_lanes * W; i += 32) {
        const Vector lanes = load_vector(base + i);
        const Vector offset = Drift ? offset_of(lanes) : _mm256_setzero_si256();
        store_vector(residuals + i, residuals_of<W>(load_vector(x + i), lanes, offset));
    }
    uint64_t sum = 0;
    for (size_t i = 0; i < block_lanes; i += run_lanes) {
        const Vector found = symbols_of_run<W>(residuals + i * W);
        store_vector(symbols + i, found);
        sum += sum_of_bytes(found);
    }
    return sum;
}

unsigned count_direct(const uint8_t* symbols) {
    unsigned found = 0;
    for (size_t i = 0; i < block_lanes; i += 32) {
        found += count_bits(mask_of_bytes(_mm256_cmpgt_epi8(LanesOf<1>::all(direct), load_vector(symbols + i))));
    }
    return found;
}

template <size_t W>
[[gnu::noinline]] void symbolize(const Model& model, const uint8_t* src, const uint8_t* base, size_t n,
                                 const Symbols& to) {
    const Offsets offset_of(model);
    const Contexts<W> contexts_of(model.shift, model.low);
    size_t at = 0;
    for (; at + block_lanes <= n; at += block_lanes) {
        const uint8_t *x = src + at * W, *b = base + at * W;
        const Symbols block = from_lane(to, at, W);
        const unsigned changed = count_changed<W>(x, b);
        if (changed == 0) {
            *block.kinds = equal_class;
            continue;
        }
        if (to.patches && changed <= most_patches) {
            *block.kinds = patched_class;
            find_patches(x, b, block_lanes, W, block);
            continue;
        }
        *block.kinds = ordinary_kind;
        const uint64_t ordinary = symbolize_block<W, false>(x, b, offset_of, block.residuals, block.symbols);
        if constexpr (W == 4) {
            if (model.drift) {
                alignas(32) uint8_t residuals[block_lanes * W], symbols[block_lanes];
                const uint64_t drifting = symbolize_block<W, true>(x, b, offset_of, residuals, symbols);
                if (4 * count_direct(symbols) >= 3 * block_lanes && drifting < ordinary) {
                    *block.kinds = drift_class;
                    std::memcpy(block.residuals, residuals, sizeof residuals);
                    std::memcpy(block.symbols, symbols, sizeof symbols);
                    for (size_t i = 0; i < block_lanes; i += run_lanes) {
                        store_vector(block.contexts + i, drift_contexts(b + i * W));
                    }
                    continue;
                }
            }
        }
        for (size_t i = 0; i < block_lanes; i += run_lanes) {
            store_vector(block.contexts + i, contexts_of(b + i * W));
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
            found = _mm256_add_epi64(found, _mm256_sad_epu8(load_vector(of.symbols + i), zero));
            wanted = _mm256_add_epi64(wanted, _mm256_sad_epu8(expected_of(load_vector(of.contexts + i)), zero));
        }
        const Vector sums = _mm256_sub_epi64(_mm256_add_epi64(found, found), wanted);
        const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        activities[k] = static_cast<std::int32_t>(_mm_cvtsi128_si64(halves) + _mm_extract_epi64(halves, 1));
    }
    if (k * block_lanes < n) {
        scalar_loops.measure(from_lane(of, k * block_lanes, 0), expected, n - k * block_lanes, activities + k);
    }
}

// Most lanes of a quiet block count on one counter, and would wait for one another: odd lanes have counters of their
// own.
template <size_t W>
void count(const Symbols& of, const uint8_t* block_classes, size_t n, uint32_t* counters) {
    constexpr size_t of_class = contexts * symbol_stride(W);
    for (size_t k = 0; k < n / block_lanes; ++k) {
        if (!is_dense(block_classes[k])) continue;
        uint32_t *even = counters + block_classes[k] * of_class, *odd = even + classes * of_class;
        for (size_t i = k * block_lanes; i < (k + 1) * block_lanes; i += 32) {
            alignas(32) uint64_t numbers[8];
            numbers_of<symbol_stride(W)>(load_vector(of.contexts + i), load_vector(of.symbols + i), numbers);
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

[[gnu::always_inline]] inline void code_bits(Vector& state, Vector value, Vector bits, uint8_t*& words) {
    const Vector keeps = _mm256_cmpgt_epi32(all(1), _mm256_srlv_epi32(state, _mm256_sub_epi32(all(31), bits)));
    state = _mm256_or_si256(_mm256_sllv_epi32(give(state, keeps, words), bits), low_bits(value, bits));
}

// The raw bits of a run that has some.
template <size_t W, size_t R>
[[gnu::always_inline]] inline void code_raw_bits(const uint8_t* symbols, const uint8_t* residuals, Vector (&states)[R],
                                                 uint8_t*& words) {
    const Vector most = all(most_raw_bits);
    Vector lengths[4];
    for (size_t i = 0; i < 4; ++i) lengths[i] = raw_bits_of(load_eight<1>(symbols + 8 * i));
    if constexpr (W == 4) {
        const Vector longest =
            _mm256_max_epi32(_mm256_max_epi32(lengths[0], lengths[1]), _mm256_max_epi32(lengths[2], lengths[3]));
        if (mask_of(_mm256_cmpgt_epi32(longest, most)) != 0) {
            for (size_t i = 4; i-- > 0;) {
                const Vector left = _mm256_max_epi32(_mm256_sub_epi32(lengths[i], most), _mm256_setzero_si256());
                const Vector above = _mm256_srli_epi32(load_eight<W>(residuals + 8 * W * i), most_raw_bits);
                code_bits(states[i % R], above, left, words);
                lengths[i] = _mm256_min_epi32(lengths[i], most);
            }
        }
    }
    for (size_t i = 4; i-- > 0;) {
        code_bits(states[i % R], load_eight<W>(residuals + 8 * W * i), lengths[i], words);
    }
}

// Dense blocks from `first` to before `end`.
template <size_t W, size_t R>
void write_dense(const Model& model, const Step* steps, const uint8_t* block_classes, const Symbols& from, size_t first,
                 size_t end, Sink& to) {
    Vector states[R];
    for (size_t r = 0; r < R; ++r) states[r] = load_vector(to.states + 8 * r);
    uint8_t* words = to.words;
    for (size_t k = end; k-- > first;) {
        const Lookup table_of(model.table_of[block_classes[k]]);
        for (size_t i = (k + 1) * block_lanes; i > k * block_lanes;) {
            i -= run_lanes;
            const Vector tables = table_of(load_vector(from.contexts + i)), symbols = load_vector(from.symbols + i);
            alignas(32) uint64_t at[8];
            numbers_of<symbol_stride(W)>(tables, symbols, at);
            if (mask_of_bytes(_mm256_cmpgt_epi8(symbols, LanesOf<1>::all(direct - 1))) != 0) {
                code_raw_bits<W>(from.symbols + i, from.residuals + i * W, states, words);
            }
            code_symbols(Steps(steps, at + 6), states[3 % R], words);
            code_symbols(Steps(steps, at + 4), states[2 % R], words);
            code_symbols(Steps(steps, at + 2), states[1 % R], words);
            code_symbols(Steps(steps, at), states[0], words);
        }
    }
    to.words = words;
    for (size_t r = 0; r < R; ++r) store_vector(to.states + 8 * r, states[r]);
}

template <size_t W, size_t R>
[[gnu::noinline]] void write(const Model& model, const Step* steps, const uint8_t* block_classes, const Symbols& from,
                             size_t n, Sink& to) {
    const size_t whole = n / block_lanes;
    scalar_loops.write(model, steps, block_classes + whole, from_lane(from, whole * block_lanes, W),
                       n - whole * block_lanes, to);
    for (size_t end = whole; end > 0;) {
        size_t first = end;
        while (first > 0 && is_dense(block_classes[first - 1])) --first;
        if (first < end) {
            write_dense<W, R>(model, steps, block_classes, from, first, end, to);
        } else if (block_classes[--first] == patched_class) {
            write_patches(model, steps, from_lane(from, first * block_lanes, W), to);
        }
        end = first;
    }
}

void symbolize_any(const Model& model, const uint8_t* src, const uint8_t* base, size_t n, const Symbols& to) noexcept {
    with_width(
        model.width, [&](auto w) { symbolize<w.value>(model, src, base, n, to); },
        [&] { scalar_loops.symbolize(model, src, base, n, to); });
}

void write_any(const Model& model, const Step* steps, const uint8_t* block_classes, const Symbols& from, size_t n,
               Sink& to) noexcept {
    with_registers(
        model.width, model.streams,
        [&](auto w, auto r) { write<w.value, r.value>(model, steps, block_classes, from, n, to); },
        [&] { scalar_loops.write(model, steps, block_classes, from, n, to); });
}

}  // namespace

const Loops avx2_loops = {symbolize_any, measure, count_any, write_any, read_avx2};

}  // namespace lamella::rans
