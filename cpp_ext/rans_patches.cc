// Blocks of which few lanes differ from their base: the rest is copied, so that a chunk of which a hundredth changed is
// read about as fast as memory is.
#include <cstring>

#include "rans.hpp"

namespace lamella::rans {
namespace {

using std::size_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

unsigned context_of_patch(size_t before) { return before < contexts ? static_cast<unsigned>(before) : contexts - 1; }

// Lanes of one block that differ, ascending; how many, or one more than `most`.
template <class U>
unsigned find_changed(const uint8_t* src, const uint8_t* base, size_t count, unsigned most, uint8_t* positions) {
    unsigned found = 0;
    const auto look_at = [&](size_t i) {
        if (load<U>(src + i * sizeof(U)) == load<U>(base + i * sizeof(U))) return;
        if (found < most) positions[found] = static_cast<uint8_t>(i);
        ++found;
    };
    constexpr size_t at_once = 32 / sizeof(U);
    size_t i = 0;
    for (; i + at_once <= count && found <= most; i += at_once) {
        uint64_t different = 0;
        for (size_t j = 0; j < 32; j += 8) {
            different |= load<uint64_t>(src + i * sizeof(U) + j) ^ load<uint64_t>(base + i * sizeof(U) + j);
        }
        for (size_t j = i; different != 0 && j < i + at_once; ++j) look_at(j);
    }
    for (; i < count; ++i) look_at(i);
    return found <= most ? found : most + 1;
}

template <class U>
bool find_patches(const uint8_t* src, const uint8_t* base, size_t count, const Symbols& block) {
    const auto most = static_cast<unsigned>(count / (block_lanes / most_patches));
    const unsigned found = find_changed<U>(src, base, count, most, block.contexts);
    if (found > most) return false;
    for (unsigned j = 0; j < found; ++j) {
        const size_t at = block.contexts[j] * sizeof(U);
        const U z = zigzag(delta(load<U>(src + at), load<U>(base + at)));
        store(block.residuals + j * sizeof(U), z);
        block.symbols[j] = static_cast<uint8_t>(symbol_of(z));
    }
    block.symbols[found] = end_of_patches;
    return true;
}

// Of patched blocks alone.
size_t symbols_in(const Symbols& block) {
    size_t found = 0;
    while (block.symbols[found++] != end_of_patches) {
    }
    return found;
}

template <class U>
void write(const Model& model, const Step* steps, const Symbols& block, Sink& to) {
    for (size_t j = symbols_in(block); j-- > 0;) {
        uint32_t& state = to.states[--to.patching & (model.streams - 1)];
        const unsigned symbol = block.symbols[j];
        if (symbol != end_of_patches) {
            const U z = load<U>(block.residuals + j * sizeof(U));
            for (unsigned bits = raw_bits(symbol); bits > 0;) {
                const unsigned last = (bits - 1) % most_raw_bits + 1;
                bits -= last;
                code_bits(static_cast<unsigned>(z >> bits) & ((1u << last) - 1), last, state, to.words);
            }
            code_bits(block.contexts[j], position_bits, state, to.words);
        }
        const unsigned table = model.table_of[patched_class][context_of_patch(j)];
        code(steps[table * symbol_stride(sizeof(U)) + symbol], state, to.words);
    }
}

template <class U>
bool read(const Model& model, const Slot* slots, Source& from, const uint8_t* base, size_t count, uint8_t* out) {
    size_t free = 0;  // the first lane that the next patch may be of
    for (size_t before = 0;; ++before) {
        uint32_t& state = from.states[from.patching++ & (model.streams - 1)];
        const unsigned table = model.table_of[patched_class][context_of_patch(before)];
        unsigned symbol, position;
        if (!take_symbol(from, state, slots + (table << probability_bits), symbol)) return false;
        if (symbol == end_of_patches) return true;
        if (!take_bits(from, state, position_bits, position) || position < free || position >= count) return false;
        free = position + 1;
        const unsigned bits = raw_bits(symbol);
        uint64_t z = symbol < direct ? symbol : uint64_t{2 | (symbol & 1)} << bits;
        for (unsigned done = 0; done < bits; done += most_raw_bits) {
            const unsigned taken = bits - done < most_raw_bits ? bits - done : most_raw_bits;
            unsigned value;
            if (!take_bits(from, state, taken, value)) return false;
            z |= uint64_t{value} << done;
        }
        const U reference = load<U>(base + position * sizeof(U));
        store(out + position * sizeof(U), from_delta(from_zigzag(static_cast<U>(z)), reference));
    }
}

}  // namespace

bool find_patches(const uint8_t* src, const uint8_t* base, size_t count, size_t width, const Symbols& block) noexcept {
    return with_lane(width, [&](auto lane) { return find_patches<decltype(lane)>(src, base, count, block); });
}

size_t count_patches(const Symbols& of, size_t n, size_t width, uint32_t* counters) noexcept {
    size_t total = 0;
    for (size_t first = 0; first < n; first += block_lanes) {
        const Symbols block = from_lane(of, first, width);
        if (*block.kinds != patched_class) continue;
        const size_t count = symbols_in(block);
        for (size_t j = 0; j < count; ++j) {
            const unsigned context = patched_class * contexts + context_of_patch(j);
            ++counters[context * symbol_stride(width) + block.symbols[j]];
        }
        total += count;
    }
    return total;
}

void write_patches(const Model& model, const Step* steps, const Symbols& block, Sink& to) noexcept {
    with_lane(model.width, [&](auto lane) { write<decltype(lane)>(model, steps, block, to); });
}

bool read_patches(const Model& model, const Slot* slots, Source& from, const uint8_t* base, size_t count,
                  uint8_t* out) noexcept {
    return with_lane(model.width, [&](auto lane) {
        // Most blocks are whole, and to copy as many bytes as the compiler knows of takes no call.
        if (count == block_lanes) {
            std::memcpy(out, base, block_lanes * sizeof lane);
        } else {
            std::memcpy(out, base, count * sizeof lane);
        }
        return read<decltype(lane)>(model, slots, from, base, count, out);
    });
}

}  // namespace lamella::rans
