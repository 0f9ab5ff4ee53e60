// The float coder's loops over lanes: the reference, written to be read.
#include <cstring>

#include "floats.hpp"

namespace lamella::floats {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

template <class U>
unsigned top_of(const Model& model, U lane) {
    return static_cast<unsigned>((lane & (sign_bit<U> - 1)) >> model.cut);
}

unsigned symbol_of(const Model& model, unsigned top) {
    if (top == 0) return 0;
    const unsigned at = top - model.first;  // more than all values for a top below the first
    return (at < model.values ? at : model.values) + 1;
}

template <class U>
uint64_t raw_of(const Model& model, U lane) {
    const unsigned below = model.cut - model.trailing;
    const uint64_t sign = (lane & sign_bit<U>) != 0 ? 1 : 0;
    return (static_cast<uint64_t>(lane) >> model.trailing & ((uint64_t{1} << below) - 1)) | sign << below;
}

template <class U>
U from_parts(const Model& model, unsigned top, uint64_t raw) {
    const unsigned below = model.cut - model.trailing;
    const uint64_t lane = (raw & ((uint64_t{1} << below) - 1)) << model.trailing | static_cast<uint64_t>(top)
                                                                                       << model.cut;
    return static_cast<U>(lane | (raw >> below != 0 ? sign_bit<U> : U{0}));
}

template <class U>
unsigned context_of(const Model& model, const uint8_t* guide, size_t i) {
    if (guide == nullptr) return 0;
    const auto magnitude = static_cast<uint64_t>(load<U>(guide + i * sizeof(U)) & (sign_bit<U> - 1));
    return rans::exponent_context(model, magnitude);
}

// Calls take(bits, offset, nbytes, at) for each piece of the raw bits of a block: its length, the lowest raw bit that
// it holds, how many bytes its pieces are, and the first of them.
template <class Bytes, class Take>
void for_each_piece(unsigned bits, size_t lanes, Bytes* raw, Take take) {
    unsigned offset = 0;
    for (unsigned piece = longest_piece; piece > 0; piece /= 2) {
        if ((bits & piece) == 0) continue;
        const size_t nbytes = piece_nbytes(lanes, piece);
        take(piece, offset, nbytes, raw);
        offset += piece;
        raw += nbytes;
    }
}

void put_raw(const uint64_t* values, unsigned bits, size_t lanes, uint8_t* raw) {
    for_each_piece(bits, lanes, raw, [=](unsigned piece, unsigned offset, size_t nbytes, uint8_t* to) {
        std::memset(to, 0, nbytes);
        for (size_t i = 0; i < lanes; ++i) {
            const uint64_t part = values[i] >> offset & ((uint64_t{1} << piece) - 1);
            if (piece >= 8) {
                std::memcpy(to + i * (piece / 8), &part, piece / 8);
            } else {
                to[i % nbytes] = static_cast<uint8_t>(to[i % nbytes] | part << (piece * (i / nbytes)));
            }
        }
    });
}

void take_raw(const uint8_t* raw, unsigned bits, size_t lanes, uint64_t* values) {
    std::memset(values, 0, lanes * sizeof *values);
    for_each_piece(bits, lanes, raw, [=](unsigned piece, unsigned offset, size_t nbytes, const uint8_t* from) {
        for (size_t i = 0; i < lanes; ++i) {
            uint64_t part = 0;
            if (piece >= 8) {
                std::memcpy(&part, from + i * (piece / 8), piece / 8);
            } else {
                part = static_cast<uint64_t>(from[i % nbytes]) >> (piece * (i / nbytes)) & ((1u << piece) - 1);
            }
            values[i] |= part << offset;
        }
    });
}

template <class U>
bool is_zero(const uint8_t* lanes, size_t count) {
    U any = 0;
    for (size_t i = 0; i < count; ++i) any = static_cast<U>(any | load<U>(lanes + i * sizeof(U)));
    return any == 0;
}

template <class U>
uint8_t* split(const Model& model, const uint8_t* weight_table, const uint8_t* src, const uint8_t* guide, size_t n,
               const Lanes& to, uint8_t* raw) {
    const unsigned bits = raw_bits(model);
    for (size_t at = 0; at < n; at += block_lanes) {
        const size_t count = lanes_of_block(n, at);
        uint32_t& level = to.levels[at / block_lanes];
        level = 0;
        if (is_zero<U>(src + at * sizeof(U), count)) continue;
        uint64_t values[block_lanes];
        for (size_t j = 0; j < count; ++j) {
            const U lane = load<U>(src + (at + j) * sizeof(U));
            const unsigned symbol = symbol_of(model, top_of(model, lane));
            to.symbols[at + j] = static_cast<uint8_t>(symbol);
            if (guide != nullptr) to.contexts[at + j] = static_cast<uint8_t>(context_of<U>(model, guide, at + j));
            level += weight_table[weight_of(model, symbol)];
            values[j] = raw_of(model, lane);
        }
        put_raw(values, bits, count, raw);
        raw += raw_nbytes(count, bits);
    }
    return raw;
}

template <class U>
void write(const Model& model, const Step* steps, const uint8_t* block_classes, const Lanes& from, const uint8_t* src,
           bool guided, size_t n, Sink& sink) {
    for (size_t i = n; i-- > 0;) {
        const unsigned block_class = block_classes[i / block_lanes];
        if (block_class == zero_class) continue;
        const unsigned table = model.table_of[block_class][guided ? from.contexts[i] : 0];
        Step step = steps[table * symbol_stride + from.symbols[i]];
        if ((step.packed & escape_mark) != 0) {
            const auto top = static_cast<uint16_t>(top_of(model, load<U>(src + i * sizeof(U))));
            sink.escapes -= sizeof top;
            std::memcpy(sink.escapes, &top, sizeof top);
            step.packed &= ~escape_mark;
        }
        rans::code(step, sink.to.states[i % model.streams], sink.to.words);
    }
}

template <class U>
bool read(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& source, const uint8_t* guide,
          size_t first, size_t n, uint8_t* out) {
    rans::Source& from = source.from;
    const unsigned bits = raw_bits(model), escape = escape_of(model);
    for (size_t at = first * block_lanes; at < n; at += block_lanes) {
        const size_t count = lanes_of_block(n, at);
        const unsigned block_class = block_classes[at / block_lanes];
        if (block_class == zero_class) {
            std::memset(out + at * sizeof(U), 0, count * sizeof(U));
            continue;
        }
        uint64_t values[block_lanes];
        take_raw(source.raw, bits, count, values);
        for (size_t i = at; i < at + count; ++i) {
            const size_t table = model.table_of[block_class][context_of<U>(model, guide, i)];
            unsigned symbol;
            if (!rans::take_symbol(from, from.states[i % model.streams], slots + (table << rans::probability_bits),
                                   symbol))
                return false;
            unsigned top = symbol == 0 ? 0 : model.first + symbol - 1;
            if (symbol == escape) {
                if (source.escapes == source.escapes_end) return false;
                top = load<uint16_t>(source.escapes);
                source.escapes += 2;
                if (top >> top_bits(model) != 0) return false;
            }
            store(out + i * sizeof(U), from_parts<U>(model, top, values[i - at]));
        }
        source.raw += raw_nbytes(count, bits);
    }
    return true;
}

uint8_t* split_any(const Model& model, const uint8_t* weight_table, const uint8_t* src, const uint8_t* guide, size_t n,
                   const Lanes& to, uint8_t* raw) noexcept {
    return with_lane(model.width,
                     [&](auto lane) { return split<decltype(lane)>(model, weight_table, src, guide, n, to, raw); });
}

void write_any(const Model& model, const Step* steps, const uint8_t* block_classes, const Lanes& from,
               const uint8_t* src, bool guided, size_t n, Sink& to) noexcept {
    with_lane(model.width,
              [&](auto lane) { write<decltype(lane)>(model, steps, block_classes, from, src, guided, n, to); });
}

bool read_any(const Model& model, const Slot* slots, const uint8_t* block_classes, Source& source, const uint8_t* guide,
              size_t first, size_t n, uint8_t* out) noexcept {
    return with_lane(model.width, [&](auto lane) {
        return read<decltype(lane)>(model, slots, block_classes, source, guide, first, n, out);
    });
}

}  // namespace

const Loops scalar_loops = {split_any, write_any, read_any};

}  // namespace lamella::floats
