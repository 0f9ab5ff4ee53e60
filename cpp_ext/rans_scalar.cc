// The residual coder's loops over lanes: the reference, written to be read.
#include <cstring>

#include "rans.hpp"

namespace lamella::rans {
namespace {

using std::size_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

template <class U>
unsigned context_of(const Model& model, unsigned block_class, U base) {
    if constexpr (sizeof(U) == 4) {
        if (block_class == drift_class) return base >> drift_shift & (contexts - 1);
    }
    return exponent_context(model, static_cast<uint64_t>(base & (sign_bit<U> - 1)));
}

template <class U>
U offset_of(const Model& model, unsigned block_class, U base) {
    if (block_class != drift_class) return 0;
    return static_cast<U>(model.offsets[context_of(model, drift_class, base)]);
}

template <class U>
U residual_of(const Model& model, unsigned block_class, U x, U base) {
    return zigzag(static_cast<U>(delta(x, base) - offset_of(model, block_class, base)));
}

template <class U>
bool drifts(const Model& model, const uint8_t* src, const uint8_t* base, size_t count) {
    if (!model.drift) return false;
    size_t drifting = 0, ordinary = 0, near = 0;
    for (size_t j = 0; j < count; ++j) {
        const U x = load<U>(src + j * sizeof(U)), b = load<U>(base + j * sizeof(U));
        const unsigned symbol = symbol_of(residual_of(model, drift_class, x, b));
        near += symbol < direct;
        drifting += symbol;
        ordinary += symbol_of(residual_of(model, ordinary_kind, x, b));
    }
    return 4 * near >= 3 * count && drifting < ordinary;
}

template <class U>
void symbolize(const Model& model, const uint8_t* src, const uint8_t* base, size_t n, const Symbols& to) {
    for (size_t at = 0; at < n; at += block_lanes) {
        const size_t count = lanes_of_block(n, at);
        const uint8_t *x = src + at * sizeof(U), *b = base + at * sizeof(U);
        uint8_t& kind = to.kinds[at / block_lanes];
        kind = equal_class;
        if (std::memcmp(x, b, count * sizeof(U)) == 0) continue;
        kind = patched_class;
        if (to.patches && find_patches(x, b, count, sizeof(U), from_lane(to, at, sizeof(U)))) continue;
        kind = static_cast<uint8_t>(drifts<U>(model, x, b, count) ? drift_class : ordinary_kind);
        for (size_t j = 0; j < count; ++j) {
            const U reference = load<U>(b + j * sizeof(U));
            const U z = residual_of(model, kind, load<U>(x + j * sizeof(U)), reference);
            store(to.residuals + (at + j) * sizeof(U), z);
            to.symbols[at + j] = static_cast<uint8_t>(symbol_of(z));
            to.contexts[at + j] = static_cast<uint8_t>(context_of(model, kind, reference));
        }
    }
}

void measure(const Symbols& of, const uint8_t* expected, size_t n, std::int32_t* activities) noexcept {
    for (size_t k = 0; k * block_lanes < n; ++k) {
        if (of.kinds[k] != ordinary_kind) continue;
        activities[k] = 0;
        for (size_t i = k * block_lanes; i < n && i < (k + 1) * block_lanes; ++i) {
            activities[k] += 2 * of.symbols[i] - expected[of.contexts[i]];
        }
    }
}

void count(const Symbols& of, const uint8_t* block_classes, size_t n, size_t width, uint32_t* counters) noexcept {
    for (size_t i = 0; i < n; ++i) {
        const unsigned block_class = block_classes[i / block_lanes];
        if (!is_dense(block_class)) continue;
        ++counters[(block_class * contexts + of.contexts[i]) * symbol_stride(width) + of.symbols[i]];
    }
}

// How many of a residual's raw bits are coded in a round that comes after `done` of them.
unsigned in_round(unsigned symbol, unsigned done) {
    const unsigned bits = raw_bits(symbol);
    return bits <= done ? 0 : bits - done < most_raw_bits ? bits - done : most_raw_bits;
}

template <class U>
void write(const Model& model, const Step* steps, const uint8_t* block_classes, const Symbols& from, size_t n,
           Sink& to) {
    constexpr unsigned rounds = (8 * sizeof(U) - 2 + most_raw_bits - 1) / most_raw_bits;
    for (size_t end = n; end > 0;) {
        const size_t first = (end - 1) / run_lanes * run_lanes;
        const unsigned block_class = block_classes[first / block_lanes];
        if (block_class == patched_class && first % block_lanes == 0) {
            write_patches(model, steps, from_lane(from, first, sizeof(U)), to);
        }
        if (is_dense(block_class)) {
            for (unsigned done = rounds * most_raw_bits; done > 0;) {
                done -= most_raw_bits;
                for (size_t i = end; i-- > first;) {
                    const unsigned bits = in_round(from.symbols[i], done);
                    if (bits == 0) continue;
                    const auto value = static_cast<unsigned>(load<U>(from.residuals + i * sizeof(U)) >> done);
                    code_bits(value & ((1u << bits) - 1), bits, to.states[i % model.streams], to.words);
                }
            }
            for (size_t i = end; i-- > first;) {
                const unsigned table = model.table_of[block_class][from.contexts[i]];
                code(steps[table * symbol_stride(sizeof(U)) + from.symbols[i]], to.states[i % model.streams], to.words);
            }
        }
        end = first;
    }
}

template <class U>
bool read_run(const Model& model, const Slot* slots, unsigned block_class, Source& from, const uint8_t* base,
              size_t first, size_t count, uint8_t* out) {
    unsigned symbols[run_lanes];
    uint64_t residuals[run_lanes];
    unsigned longest = 0;
    for (size_t j = 0; j < count; ++j) {
        const unsigned context = context_of(model, block_class, load<U>(base + (first + j) * sizeof(U)));
        const Slot* table = slots + (model.table_of[block_class][context] << probability_bits);
        if (!take_symbol(from, from.states[(first + j) % model.streams], table, symbols[j])) return false;
        const unsigned bits = raw_bits(symbols[j]);
        residuals[j] = symbols[j] < direct ? symbols[j] : uint64_t{2 | (symbols[j] & 1)} << bits;
        longest = bits > longest ? bits : longest;
    }
    for (unsigned done = 0; done < longest; done += most_raw_bits) {
        for (size_t j = 0; j < count; ++j) {
            unsigned value;
            const unsigned bits = in_round(symbols[j], done);
            if (!take_bits(from, from.states[(first + j) % model.streams], bits, value)) return false;
            residuals[j] |= uint64_t{value} << done;
        }
    }
    for (size_t j = 0; j < count; ++j) {
        const U reference = load<U>(base + (first + j) * sizeof(U));
        const U d = from_zigzag(static_cast<U>(residuals[j]));
        store(out + (first + j) * sizeof(U),
              from_delta(static_cast<U>(d + offset_of(model, block_class, reference)), reference));
    }
    return true;
}

template <class U>
bool read(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from, const uint8_t* base,
          size_t first, size_t n, uint8_t* out) {
    for (size_t at = first * block_lanes; at < n; at += block_lanes) {
        const size_t end = at + lanes_of_block(n, at);
        const unsigned block_class = block_classes[at / block_lanes];
        const uint8_t* lanes = base + at * sizeof(U);
        uint8_t* to = out + at * sizeof(U);
        if (block_class == equal_class) std::memcpy(to, lanes, (end - at) * sizeof(U));
        if (block_class == patched_class && !read_patches(model, slots, from, lanes, end - at, to)) return false;
        if (!is_dense(block_class)) continue;
        for (size_t run = at; run < end; run += run_lanes) {
            const size_t count = end - run < run_lanes ? end - run : run_lanes;
            if (!read_run<U>(model, slots, block_class, from, base, run, count, out)) return false;
        }
    }
    return true;
}

void symbolize_any(const Model& model, const uint8_t* src, const uint8_t* base, size_t n, const Symbols& to) noexcept {
    with_lane(model.width, [&](auto lane) { symbolize<decltype(lane)>(model, src, base, n, to); });
}

void write_any(const Model& model, const Step* steps, const uint8_t* block_classes, const Symbols& from, size_t n,
               Sink& to) noexcept {
    with_lane(model.width, [&](auto lane) { write<decltype(lane)>(model, steps, block_classes, from, n, to); });
}

bool read_any(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from, const uint8_t* base,
              size_t first, size_t n, uint8_t* out) noexcept {
    return with_lane(model.width, [&](auto lane) {
        return read<decltype(lane)>(model, slots, block_classes, from, base, first, n, out);
    });
}

}  // namespace

// Defined here, for the baseline CPU, since classes and patches are coded by them too.
void code(const Step& step, uint32_t& state, uint8_t*& words) noexcept {
    const uint32_t frequency = step.packed & 0xfff;
    if (state >> (31 - probability_bits) >= frequency) {
        words -= 2;
        store(words, static_cast<std::uint16_t>(state));
        state >>= 16;
    }
    const auto quotient = static_cast<uint32_t>(uint64_t{state} * step.reciprocal >> 32) >> (step.packed >> 25);
    state += (step.packed >> 12 & 0x1fff) + quotient * (scale - frequency);
}

void code_bits(unsigned value, unsigned bits, uint32_t& state, uint8_t*& words) noexcept {
    if (state >> (31 - bits) != 0) {
        words -= 2;
        store(words, static_cast<std::uint16_t>(state));
        state >>= 16;
    }
    state = state << bits | value;
}

const Loops scalar_loops = {symbolize_any, measure, count, write_any, read_any};

}  // namespace lamella::rans
