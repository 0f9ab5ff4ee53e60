// The residual coder's loops over lanes: the reference, written to be read.
#include <bit>
#include <cstring>

#include "rans.hpp"

namespace lamella::rans {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

template <class U>
U load(const uint8_t* p) {
    U value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

template <class U>
void store(uint8_t* p, U value) {
    std::memcpy(p, &value, sizeof value);
}

template <class U>
constexpr U sign_bit = static_cast<U>(U{1} << (8 * sizeof(U) - 1));

// See kernels.hpp, residual_split: `delta` is its d, `zigzag` makes d its residual.
template <class U>
U ordered(U u) {
    return (u & sign_bit<U>) ? static_cast<U>(u ^ (sign_bit<U> - 1)) : u;
}

template <class U>
U delta(U x, U base) {
    const U d = static_cast<U>(ordered(x) - ordered(base));
    return (base & sign_bit<U>) ? static_cast<U>(0 - d) : d;
}

template <class U>
U from_delta(U d, U base) {
    if (base & sign_bit<U>) d = static_cast<U>(0 - d);
    return ordered(static_cast<U>(ordered(base) + d));
}

template <class U>
U zigzag(U d) {
    return static_cast<U>((d << 1) ^ ((d & sign_bit<U>) ? static_cast<U>(~U{0}) : U{0}));
}

template <class U>
U from_zigzag(U z) {
    return static_cast<U>((z >> 1) ^ (0 - (z & 1)));
}

unsigned symbol_of(uint64_t z) {
    if (z < direct) return static_cast<unsigned>(z);
    const unsigned highest = static_cast<unsigned>(std::bit_width(z)) - 1;
    return direct + 2 * (highest - 5) + static_cast<unsigned>(z >> (highest - 1) & 1);
}

template <class U>
unsigned context_of(const Model& model, unsigned block_class, U base) {
    if constexpr (sizeof(U) == 4) {
        if (block_class == drift_class) return base >> drift_shift & (contexts - 1);
    }
    const uint64_t magnitude = static_cast<uint64_t>(base & (sign_bit<U> - 1)) >> model.shift;
    if (magnitude <= model.low) return 0;
    return magnitude - model.low < contexts ? static_cast<unsigned>(magnitude - model.low) : contexts - 1;
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
        const size_t count = n - at < block_lanes ? n - at : block_lanes;
        const uint8_t *x = src + at * sizeof(U), *b = base + at * sizeof(U);
        uint8_t& kind = to.kinds[at / block_lanes];
        kind = equal_class;
        if (std::memcmp(x, b, count * sizeof(U)) == 0) continue;
        kind = drifts<U>(model, x, b, count) ? drift_class : ordinary_kind;
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
        if (block_class == equal_class) continue;
        ++counters[(block_class * contexts + of.contexts[i]) * symbol_stride(width) + of.symbols[i]];
    }
}

template <class U>
void write(const Model& model, const Step* steps, const uint8_t* block_classes, const Symbols& from, size_t n,
           Sink& to) {
    uint64_t waiting = 0;  // raw bits that do not fill a byte yet
    unsigned waiting_bits = 0;
    for (size_t i = 0; i < n; ++i) {
        if (block_classes[i / block_lanes] == equal_class) continue;
        const unsigned bits = raw_bits(from.symbols[i]);
        const uint64_t raw = load<U>(from.residuals + i * sizeof(U)) & ((uint64_t{1} << bits) - 1);
        waiting |= raw << waiting_bits;
        if (waiting_bits + bits >= 64) {
            store(to.raw, waiting);
            to.raw += 8;
            waiting = waiting_bits == 0 ? 0 : raw >> (64 - waiting_bits);
            waiting_bits = waiting_bits + bits - 64;
        } else {
            waiting_bits += bits;
        }
    }
    for (; waiting_bits > 0; waiting_bits -= waiting_bits < 8 ? waiting_bits : 8, waiting >>= 8) {
        *to.raw++ = static_cast<uint8_t>(waiting);
    }
    for (size_t i = n; i-- > 0;) {
        const unsigned block_class = block_classes[i / block_lanes];
        if (block_class == equal_class) continue;
        const unsigned table = model.table_of[block_class][from.contexts[i]];
        code(steps[table * symbol_stride(sizeof(U)) + from.symbols[i]], to.states[i % model.streams], to.words);
    }
}

// The next `bits` raw bits, at most 62. False if there are not so many.
bool take(Source& from, unsigned bits, uint64_t& value) {
    if (from.bit + bits > 8 * static_cast<uint64_t>(from.raw_nbytes)) return false;
    const size_t at = static_cast<size_t>(from.bit / 8);
    const unsigned skip = from.bit % 8;
    from.bit += bits;
    uint8_t window[16] = {};
    std::memcpy(window, from.raw + at, from.raw_nbytes - at < 9 ? from.raw_nbytes - at : 9);
    value = load<uint64_t>(window) >> skip;
    if (skip != 0) value |= static_cast<uint64_t>(window[8]) << (64 - skip);
    value &= (uint64_t{1} << bits) - 1;
    return true;
}

template <class U>
bool read(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from, const uint8_t* base,
          size_t first, size_t n, uint8_t* out) {
    for (size_t at = first * block_lanes; at < n; at += block_lanes) {
        const size_t end = n - at < block_lanes ? n : at + block_lanes;
        const unsigned block_class = block_classes[at / block_lanes];
        if (block_class == equal_class) {
            std::memcpy(out + at * sizeof(U), base + at * sizeof(U), (end - at) * sizeof(U));
            continue;
        }
        for (size_t i = at; i < end; ++i) {
            const U reference = load<U>(base + i * sizeof(U));
            const unsigned table = model.table_of[block_class][context_of(model, block_class, reference)];
            uint32_t& state = from.states[i % model.streams];
            const Slot slot = slots[table << probability_bits | (state & (scale - 1))];
            state = (slot & 0xfff) * (state >> probability_bits) + (slot >> 12 & 0xfff);
            if (state < low_state) {
                if (from.words == from.words_end) return false;
                state = state << 16 | load<uint16_t>(from.words);
                from.words += 2;
            }
            const unsigned symbol = slot >> 24;
            uint64_t z = symbol;
            if (symbol >= direct) {
                const unsigned bits = raw_bits(symbol);
                if (!take(from, bits, z)) return false;
                z |= uint64_t{2 | (symbol & 1)} << bits;
            }
            const U d = static_cast<U>(from_zigzag(static_cast<U>(z)) + offset_of(model, block_class, reference));
            store(out + i * sizeof(U), from_delta(d, reference));
        }
    }
    return true;
}

void symbolize_any(const Model& model, const uint8_t* src, const uint8_t* base, size_t n, const Symbols& to) noexcept {
    switch (model.width) {
        case 1:
            return symbolize<uint8_t>(model, src, base, n, to);
        case 2:
            return symbolize<uint16_t>(model, src, base, n, to);
        case 4:
            return symbolize<uint32_t>(model, src, base, n, to);
        default:
            return symbolize<uint64_t>(model, src, base, n, to);
    }
}

void write_any(const Model& model, const Step* steps, const uint8_t* block_classes, const Symbols& from, size_t n,
               Sink& to) noexcept {
    switch (model.width) {
        case 1:
            return write<uint8_t>(model, steps, block_classes, from, n, to);
        case 2:
            return write<uint16_t>(model, steps, block_classes, from, n, to);
        case 4:
            return write<uint32_t>(model, steps, block_classes, from, n, to);
        default:
            return write<uint64_t>(model, steps, block_classes, from, n, to);
    }
}

bool read_any(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& from, const uint8_t* base,
              size_t first, size_t n, uint8_t* out) noexcept {
    switch (model.width) {
        case 1:
            return read<uint8_t>(model, slots, block_classes, from, base, first, n, out);
        case 2:
            return read<uint16_t>(model, slots, block_classes, from, base, first, n, out);
        case 4:
            return read<uint32_t>(model, slots, block_classes, from, base, first, n, out);
        default:
            return read<uint64_t>(model, slots, block_classes, from, base, first, n, out);
    }
}

}  // namespace

// Defined here, for the baseline CPU, since the classes of blocks are coded by it too.
void code(const Step& step, uint32_t& state, uint8_t*& words) noexcept {
    const uint32_t frequency = step.packed & 0xfff;
    if (state >> (31 - probability_bits) >= frequency) {
        words -= 2;
        store(words, static_cast<uint16_t>(state));
        state >>= 16;
    }
    const auto quotient = static_cast<uint32_t>(uint64_t{state} * step.reciprocal >> 32) >> (step.packed >> 25);
    state += (step.packed >> 12 & 0x1fff) + quotient * (scale - frequency);
}

const Loops scalar_loops = {symbolize_any, measure, count, write_any, read_any};

}  // namespace lamella::rans
