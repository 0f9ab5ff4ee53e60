// What the fuzz targets share: memory of exactly the size it should have, so that a sanitizer sees the first byte
// beyond, chunks, and how to fail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../kernels.hpp"

namespace {

using Bytes = std::vector<std::uint8_t>;

void require(bool holds) {
    if (!holds) std::abort();
}

Bytes make_lanes(std::size_t n, std::size_t width, std::uint8_t seed, bool noise) {
    Bytes lanes(n * width);
    std::uint64_t x = (seed + 1) * 0x9e3779b97f4a7c15;
    for (std::size_t i = 0; i < n; ++i) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        std::memcpy(&lanes[i * width], &x, width);
        // Exponents near that of 0.05, as weights have them.
        std::uint8_t& top = lanes[i * width + width - 1];
        if (!noise) top = static_cast<std::uint8_t>((top & 0x80) | (0x3c + (x >> 63)));
    }
    return lanes;
}

// What is left of float32 lanes after some decay.
Bytes make_decayed(const Bytes& lanes, std::uint8_t seed) {
    Bytes left(lanes.size());
    lamella::decay(lanes.data(), lanes.size() / 4, 1u << 31 | seed * 0x01010101u, seed % 8, left.data());
    return left;
}

// What an input for a decoder begins with: one byte of flags, of which bits 0-1 are log2 of the width, two bytes that
// say how many lanes, one byte that seeds other chunks. A payload follows. Payloads of few lanes may have as many
// streams, classes and tables as others.
struct PayloadInput {
    static constexpr std::size_t prefix = 4, most_lanes = 1500;

    unsigned flags;
    std::size_t n, width;
    std::uint8_t seed;
    const std::uint8_t* payload;
    std::size_t payload_nbytes;

    PayloadInput(const std::uint8_t* data, std::size_t size)
        : flags(data[0]),
          n(1 + static_cast<std::size_t>(data[1] | data[2] << 8) % most_lanes),
          width(std::size_t{1} << (flags & 3)),
          seed(data[3]),
          payload(data + prefix),
          payload_nbytes(size - prefix) {}
};

// Memory to decode with, of `needed` bytes, of at most `most`. It is kept between runs, and ends where it was allocated
// to: to get and clear it each time would take longer than most decoding.
std::uint8_t* workspace_of(std::size_t needed, std::size_t most) {
    static Bytes kept(most);
    return kept.data() + (kept.size() - needed);
}

}  // namespace
