// The reference variant: the definitions of kernels.hpp, lane by lane.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "floats.hpp"
#include "kernels.hpp"
#include "lanes.hpp"
#include "rans.hpp"

namespace lamella {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

template <class U>
struct Plain {
    static U forward(U x, U) { return x; }
    static U inverse(U z, U) { return z; }
};

template <class U>
struct Xor {
    static U forward(U x, U base) { return static_cast<U>(x ^ base); }
    static U inverse(U z, U base) { return static_cast<U>(z ^ base); }
};

template <class U>
struct Residual {
    static U forward(U x, U base) { return zigzag(delta(x, base)); }
    static U inverse(U z, U base) { return from_delta(from_zigzag(z), base); }
};

template <class U, template <class> class Relation>
void split(const uint8_t* src, const uint8_t* base, size_t n, uint8_t* planes) {
    for (size_t i = 0; i < n; ++i) {
        const U b = base ? load<U>(base + i * sizeof(U)) : U{0};
        const U z = Relation<U>::forward(load<U>(src + i * sizeof(U)), b);
        for (size_t p = 0; p < sizeof(U); ++p) planes[p * n + i] = static_cast<uint8_t>(z >> (8 * p));
    }
}

template <class U, template <class> class Relation>
void merge(const uint8_t* const* planes, const uint8_t* base, size_t n, uint8_t* out) {
    for (size_t i = 0; i < n; ++i) {
        const U b = base ? load<U>(base + i * sizeof(U)) : U{0};
        U z = 0;
        for (size_t p = 0; p < sizeof(U); ++p) z = static_cast<U>(z | (static_cast<U>(planes[p][i]) << (8 * p)));
        store(out + i * sizeof(U), Relation<U>::inverse(z, b));
    }
}

template <template <class> class Relation>
void split_any(const uint8_t* src, const uint8_t* base, size_t n, size_t width, uint8_t* planes) {
    with_lane(width, [&](auto lane) { split<decltype(lane), Relation>(src, base, n, planes); });
}

template <template <class> class Relation>
void merge_any(const uint8_t* const* planes, const uint8_t* base, size_t n, size_t width, uint8_t* out) {
    with_lane(width, [&](auto lane) { merge<decltype(lane), Relation>(planes, base, n, out); });
}

void split_planes(const uint8_t* src, size_t n, size_t width, uint8_t* planes) noexcept {
    split_any<Plain>(src, nullptr, n, width, planes);
}

void xor_split(const uint8_t* src, const uint8_t* base, size_t n, size_t width, uint8_t* planes) noexcept {
    split_any<Xor>(src, base, n, width, planes);
}

void residual_split(const uint8_t* src, const uint8_t* base, size_t n, size_t width, uint8_t* planes) noexcept {
    split_any<Residual>(src, base, n, width, planes);
}

void merge_planes(const uint8_t* const* planes, size_t n, size_t width, uint8_t* out) noexcept {
    merge_any<Plain>(planes, nullptr, n, width, out);
}

void xor_merge(const uint8_t* const* planes, const uint8_t* base, size_t n, size_t width, uint8_t* out) noexcept {
    merge_any<Xor>(planes, base, n, width, out);
}

void residual_merge(const uint8_t* const* planes, const uint8_t* base, size_t n, size_t width, uint8_t* out) noexcept {
    merge_any<Residual>(planes, base, n, width, out);
}

// Values of lanes: `value(p)` is the float64 nearest to the lane at p.

struct Table8 {
    static constexpr size_t width = 1;
    const double* table;
    double value(const uint8_t* p) const { return table[*p]; }
};

template <class T>
struct Number {
    static constexpr size_t width = sizeof(T);
    double value(const uint8_t* p) const { return static_cast<double>(load<T>(p)); }
};

struct BFloat16 {
    static constexpr size_t width = 2;
    double value(const uint8_t* p) const {
        return std::bit_cast<float>(static_cast<uint32_t>(load<uint16_t>(p)) << 16);
    }
};

struct Float16 {
    static constexpr size_t width = 2;
    double value(const uint8_t* p) const {
        const uint16_t bits = load<uint16_t>(p);
        const int exponent = (bits >> 10) & 31;
        const double mantissa = bits & 1023;
        double magnitude;
        if (exponent == 31) {
            magnitude =
                mantissa == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
        } else if (exponent == 0) {
            magnitude = std::ldexp(mantissa, -24);
        } else {
            magnitude = std::ldexp(1024 + mantissa, exponent - 25);
        }
        return (bits & 0x8000) ? -magnitude : magnitude;
    }
};

template <class Lane>
void add(const uint8_t* a, const uint8_t* b, size_t n, size_t lanes_per_element, Lane lane, PartialSums& sums) {
    for (size_t i = 0; i < n * lanes_per_element; ++i) {
        const uint8_t *pa = a + i * Lane::width, *pb = b + i * Lane::width;
        const double x = lane.value(pa), y = lane.value(pb);
        const double difference = std::memcmp(pa, pb, Lane::width) == 0 ? 0.0 : x - y;
        const double magnitude = std::fabs(difference);
        const size_t j = i % stride;
        sums.squared_difference[j] += difference * difference;
        sums.absolute_difference[j] += magnitude;
        if (magnitude > sums.largest_difference[j]) sums.largest_difference[j] = magnitude;
        sums.dot[j] += x * y;
        sums.squared_a[j] += x * x;
        sums.squared_b[j] += y * y;
    }
    const size_t element = lanes_per_element * Lane::width;
    for (size_t i = 0; i < n; ++i) sums.changed += std::memcmp(a + i * element, b + i * element, element) != 0;
}

void add_moments(const uint8_t* a, const uint8_t* b, size_t n, Kind kind, const double* table,
                 PartialSums& sums) noexcept {
    switch (kind) {
        case Kind::table8:
            return add(a, b, n, 1, Table8{table}, sums);
        case Kind::int16:
            return add(a, b, n, 1, Number<std::int16_t>{}, sums);
        case Kind::uint16:
            return add(a, b, n, 1, Number<uint16_t>{}, sums);
        case Kind::int32:
            return add(a, b, n, 1, Number<std::int32_t>{}, sums);
        case Kind::uint32:
            return add(a, b, n, 1, Number<uint32_t>{}, sums);
        case Kind::int64:
            return add(a, b, n, 1, Number<std::int64_t>{}, sums);
        case Kind::uint64:
            return add(a, b, n, 1, Number<uint64_t>{}, sums);
        case Kind::float16:
            return add(a, b, n, 1, Float16{}, sums);
        case Kind::bfloat16:
            return add(a, b, n, 1, BFloat16{}, sums);
        case Kind::float32:
            return add(a, b, n, 1, Number<float>{}, sums);
        case Kind::float64:
            return add(a, b, n, 1, Number<double>{}, sums);
        case Kind::complex64:
            return add(a, b, n, 2, Number<float>{}, sums);
        case Kind::complex128:
            return add(a, b, n, 2, Number<double>{}, sums);
    }
}

}  // namespace

const Kernels scalar_kernels = {
    "scalar",  split_planes,   xor_split,   residual_split,      merge_planes,
    xor_merge, residual_merge, add_moments, &rans::scalar_loops, &floats::scalar_loops,
};

}  // namespace lamella
