// One lane at a time: what the scalar loops are made of. Everything is static, so that no object file takes another's
// copy of it (see CMakeLists.txt).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lamella {

static_assert(std::endian::native == std::endian::little, "chunks are little-endian and read in place");

template <class T>
static T load(const std::uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

template <class T>
static void store(std::uint8_t* p, T value) {
    std::memcpy(p, &value, sizeof value);
}

// Calls `what` with a 0 of the unsigned type that is `width` bytes wide.
template <class Callable>
static decltype(auto) with_lane(std::size_t width, Callable what) {
    switch (width) {
        case 1:
            return what(std::uint8_t{});
        case 2:
            return what(std::uint16_t{});
        case 4:
            return what(std::uint32_t{});
        default:
            return what(std::uint64_t{});
    }
}

template <class U>
static constexpr U sign_bit = static_cast<U>(U{1} << (8 * sizeof(U) - 1));

// See kernels.hpp, residual_split: o, which is its own inverse, and d.
template <class U>
static U ordered(U u) {
    return (u & sign_bit<U>) ? static_cast<U>(u ^ (sign_bit<U> - 1)) : u;
}

template <class U>
static U delta(U x, U base) {
    const U d = static_cast<U>(ordered(x) - ordered(base));
    return (base & sign_bit<U>) ? static_cast<U>(0 - d) : d;
}

template <class U>
static U from_delta(U d, U base) {
    if (base & sign_bit<U>) d = static_cast<U>(0 - d);
    return ordered(static_cast<U>(ordered(base) + d));
}

// A residual is the zigzag of a delta.
template <class U>
static U zigzag(U d) {
    return static_cast<U>((d << 1) ^ ((d & sign_bit<U>) ? static_cast<U>(~U{0}) : U{0}));
}

template <class U>
static U from_zigzag(U z) {
    return static_cast<U>((z >> 1) ^ (0 - (z & 1)));
}

}  // namespace lamella
