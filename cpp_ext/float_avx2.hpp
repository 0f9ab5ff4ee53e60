// What reading and writing floats with AVX2 share.
#pragma once

#include "floats.hpp"
#include "states_avx2.hpp"

namespace lamella::floats {

// Of float_avx2_read.cc; the other loops are in float_avx2_write.cc.
bool read_avx2(const Model& model, const Slot* slots, const std::uint8_t* block_classes, Source& source,
               const std::uint8_t* guide, std::size_t first, std::size_t n, std::uint8_t* out) noexcept;

namespace {

using rans::Contexts;
using rans::has_byte_magnitudes;
using rans::run_lanes;
using rans::with_registers;

// Raw bits of a block, cut into what vectors handle: pairs of bytes, bytes, and what is left as bytes too.
struct Pieces {
    unsigned bits;  // all of them
    size_t byte_at, rest_at;
    explicit Pieces(unsigned raw_bits)
        : bits(raw_bits),
          byte_at((raw_bits & 16) != 0 ? 2 * block_lanes : 0),
          rest_at(byte_at + ((raw_bits & 8) != 0 ? block_lanes : 0)) {}
    bool has_pairs() const { return (bits & 16) != 0; }
    bool has_bytes() const { return (bits & 8) != 0; }
    unsigned rest() const { return bits & 7; }
};

}  // namespace
}  // namespace lamella::floats
