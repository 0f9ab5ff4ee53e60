// What the fuzz targets share: chunks, and how to fail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace {

using Bytes = std::vector<std::uint8_t>;

void require(bool holds) {
    if (!holds) std::abort();
}

Bytes make_base(std::size_t nbytes, std::size_t width, std::uint32_t seed, bool noise) {
    Bytes base(nbytes);
    std::uint32_t x = seed * 2654435761u + 1;
    for (std::size_t i = 0; i < nbytes; ++i) {
        x ^= x << 13, x ^= x >> 17, x ^= x << 5;
        base[i] = static_cast<std::uint8_t>(x >> 8);
        // Exponents near that of 0.05, as weights have them.
        if (!noise && i % width == width - 1) base[i] = static_cast<std::uint8_t>((base[i] & 0x80) | (0x3c + (x & 1)));
    }
    return base;
}

}  // namespace
