// Floats of four bytes against what is left of them after a decay. No kernel has a variant: the compiler's vectors are
// as fast as the coder that comes after needs.
#include "kernels.hpp"
#include "lanes.hpp"

namespace lamella {
namespace {

using std::size_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr unsigned mantissa_bits = 23;
constexpr uint32_t sign = 1u << 31, implicit = 1u << mantissa_bits, mantissa = implicit - 1, no_number = 255;

// Exchanges 0 and `decay_slack`.
uint32_t exchanged(uint32_t z) { return z == 0 ? decay_slack : z == decay_slack ? 0 : z; }

}  // namespace

void decay(const uint8_t* base, size_t n, uint32_t factor, unsigned halvings, uint8_t* out) noexcept {
    for (size_t i = 0; i < n; ++i) {
        const uint32_t b = load<uint32_t>(base + 4 * i), exponent = b >> mantissa_bits & 255;
        const uint64_t product = uint64_t{(b & mantissa) | implicit} * factor;
        const bool whole = product >> (mantissa_bits + 32) != 0;
        const uint32_t scaled = static_cast<uint32_t>(product >> (whole ? 32 : 31)) & mantissa;
        const uint32_t left = exponent - halvings - (whole ? 0 : 1);
        const bool fits = exponent != no_number && exponent > halvings + 1;
        store(out + 4 * i, fits ? (b & sign) | left << mantissa_bits | scaled : b);
    }
}

void decay_fold(const uint8_t* src, const uint8_t* decayed, size_t n, uint8_t* out) noexcept {
    for (size_t i = 0; i < n; ++i) {
        const uint32_t base = load<uint32_t>(decayed + 4 * i);
        const uint32_t z = exchanged(delta(load<uint32_t>(src + 4 * i), base) + decay_slack);
        store(out + 4 * i, from_delta(from_zigzag(z), base));
    }
}

void decay_unfold(const uint8_t* folded, const uint8_t* decayed, size_t n, uint8_t* out) noexcept {
    for (size_t i = 0; i < n; ++i) {
        const uint32_t base = load<uint32_t>(decayed + 4 * i);
        const uint32_t z = exchanged(zigzag(delta(load<uint32_t>(folded + 4 * i), base)));
        store(out + 4 * i, from_delta(z - decay_slack, base));
    }
}

}  // namespace lamella
