// Parts of the kernels that every variant shares, compiled once, for the baseline CPU.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.hpp"

namespace lamella {
namespace {

double total(const double (&part)[stride]) {
    const double sum = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
    return std::isnan(sum) ? std::numeric_limits<double>::quiet_NaN() : sum;
}

double largest(const double (&part)[stride]) {
    double result = 0;
    for (double x : part) result = x > result ? x : result;
    return result;
}

std::uint16_t to_bfloat16(std::uint32_t u) {
    const bool nan = (u & 0x7fffffff) > 0x7f800000;
    const std::uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return static_cast<std::uint16_t>(nan ? u >> 16 | 0x40 : rounded);
}

std::uint16_t to_float16(std::uint32_t u) {
    const std::uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    std::uint32_t rounded;
    if (magnitude > 0x7f800000) {
        rounded = 0x7e00 | (magnitude >> 13 & 0x3ff);  // NaN
    } else if (magnitude >= 0x477ff000) {              // 65520, halfway past the largest finite value
        rounded = 0x7c00;
    } else if (magnitude >= 0x38800000) {  // 2^-14, the smallest normal value
        rounded = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else if (magnitude <= 0x33000000) {  // 2^-25, halfway to the smallest subnormal one
        rounded = 0;
    } else {
        const std::uint32_t shift = 126 - (magnitude >> 23);  // 14 to 24: one unit is 2^-24
        const std::uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
        rounded = (mantissa + (1u << (shift - 1)) - 1 + (mantissa >> shift & 1)) >> shift;
    }
    return static_cast<std::uint16_t>(sign | rounded);
}

std::uint32_t from_float16(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    if (magnitude >= 0x400) return sign | ((magnitude << 13) + 0x38000000);
    if (magnitude == 0) return sign;
    const auto above = static_cast<std::uint32_t>(std::countl_zero(magnitude));  // 22 to 31
    return sign | (134 - above) << 23 | (magnitude << (above - 8) & 0x7fffff);
}

template <class From, class To, To (*convert)(From)>
void cast_lanes(const std::uint8_t* src, std::size_t n, std::uint8_t* out) {
    for (std::size_t i = 0; i < n; ++i) {
        From from;
        std::memcpy(&from, src + i * sizeof from, sizeof from);
        const To to = convert(from);
        std::memcpy(out + i * sizeof to, &to, sizeof to);
    }
}

std::uint32_t from_bfloat16(std::uint16_t b) { return static_cast<std::uint32_t>(b) << 16; }

}  // namespace

void cast(const std::uint8_t* src, std::size_t n, Cast how, std::uint8_t* out) noexcept {
    using std::uint16_t, std::uint32_t;
    switch (how) {
        case Cast::float32_to_bfloat16:
            return cast_lanes<uint32_t, uint16_t, to_bfloat16>(src, n, out);
        case Cast::float32_to_float16:
            return cast_lanes<uint32_t, uint16_t, to_float16>(src, n, out);
        case Cast::bfloat16_to_float32:
            return cast_lanes<uint16_t, uint32_t, from_bfloat16>(src, n, out);
        case Cast::float16_to_float32:
            return cast_lanes<uint16_t, uint32_t, from_float16>(src, n, out);
    }
}

Moments finish(const PartialSums& partial) noexcept {
    const double absolute = total(partial.absolute_difference);
    return {partial.changed,
            total(partial.squared_difference),
            absolute,
            std::isnan(absolute) ? absolute : largest(partial.largest_difference),
            total(partial.dot),
            total(partial.squared_a),
            total(partial.squared_b)};
}

bool is_constant(const std::uint8_t* src, std::size_t nbytes, std::size_t width) noexcept {
    // All lanes are equal exactly when the bytes equal themselves shifted by one lane, and memcmp knows the CPU.
    return nbytes <= width || std::memcmp(src, src + width, nbytes - width) == 0;
}

}  // namespace lamella
