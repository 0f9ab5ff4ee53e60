// Parts of the kernels that every variant shares, compiled once, for the baseline CPU.
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

}  // namespace

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
