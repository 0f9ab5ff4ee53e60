// The kernels' contract. Every variant of an instruction set fills one table of these functions, and every variant
// returns bit for bit what the scalar one returns; scalar.cc is the reference, written to be read.
//
// Rules that hold for all of them, checked by bindings.cc, which is their only caller:
//   * nothing allocates, throws, or keeps a pointer;
//   * no alignment is asked for; inputs may be the same memory, outputs are disjoint from everything;
//   * `width` is 1, 2, 4 or 8: the bytes of a lane, one little-endian machine number;
//   * `n` counts lanes and may be 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamella {

namespace rans {
struct Loops;
}
namespace floats {
struct Loops;
}

// What a lane is to `moments`.
enum class Kind : std::uint8_t {
    table8,  // any one-byte type: `table` gives the value of each of the 256 bytes
    int16,
    uint16,
    int32,
    uint32,
    int64,
    uint64,
    float16,
    bfloat16,
    float32,
    float64,
    complex64,   // two float32 lanes an element
    complex128,  // two float64 lanes an element
};

// Bytes of one element and of one lane; they differ for complex kinds.
static constexpr std::size_t element_width(Kind kind) {
    switch (kind) {
        case Kind::table8:
            return 1;
        case Kind::int16:
        case Kind::uint16:
        case Kind::float16:
        case Kind::bfloat16:
            return 2;
        case Kind::int32:
        case Kind::uint32:
        case Kind::float32:
            return 4;
        case Kind::int64:
        case Kind::uint64:
        case Kind::float64:
        case Kind::complex64:
            return 8;
        case Kind::complex128:
            return 16;
    }
    return 0;
}

// Conversions between floats of 2 and 4 bytes, in integers alone, so that every machine gives the same bits. To a
// narrower type: the nearest value, ties to even; what is too large becomes infinite; NaN keeps its sign and the
// highest bits of its payload, with the quiet bit set. To a wider type: exactly, NaN payloads too.
enum class Cast : std::uint8_t {
    float32_to_bfloat16,
    float32_to_float16,
    bfloat16_to_float32,
    float16_to_float32,
};

// Bytes of a lane before and after.
static constexpr std::size_t source_width(Cast how) {
    return how == Cast::float32_to_bfloat16 || how == Cast::float32_to_float16 ? 4 : 2;
}
static constexpr std::size_t target_width(Cast how) { return 6 - source_width(how); }

// Sums over the lanes of a and b, all in float64. A NaN is always the one quiet NaN without payload.
struct Moments {
    std::uint64_t changed;       // elements whose bits differ
    double squared_difference;   // sum (a - b)^2
    double absolute_difference;  // sum |a - b|
    double largest_difference;   // max |a - b|, 0 for n = 0, NaN if any difference is NaN
    double dot;                  // sum a * b
    double squared_a;            // sum a^2
    double squared_b;            // sum b^2
};

// The same while elements are added: lane i goes to the sums at i % stride, and `finish` adds those up in one fixed
// order. Eight float64 are two AVX2 registers, enough to hide the latency of an addition.
inline constexpr std::size_t stride = 8;
struct PartialSums {
    std::uint64_t changed;
    double squared_difference[stride];
    double absolute_difference[stride];
    double largest_difference[stride];  // ignores NaN, which the absolute difference remembers
    double dot[stride];
    double squared_a[stride];
    double squared_b[stride];
};
Moments finish(const PartialSums& partial) noexcept;

struct Kernels {
    const char* isa;

    // planes[p * n + i] = byte p of src[i].
    void (*split_planes)(const std::uint8_t* src, std::size_t n, std::size_t width, std::uint8_t* planes) noexcept;

    // planes[p * n + i] = byte p of (src[i] ^ base[i]).
    void (*xor_split)(const std::uint8_t* src, const std::uint8_t* base, std::size_t n, std::size_t width,
                      std::uint8_t* planes) noexcept;

    // planes[p * n + i] = byte p of residual(src[i], base[i]), defined for a lane of W bits, mod 2^W (FORMAT.md):
    //   o(u)        u with its bits below the sign flipped if the sign bit is set: orders floats as integers, and is a
    //               bijection on all bit patterns, NaN payloads and -0.0 too
    //   d           o(x) - o(base), negated if base's sign bit is set (so that growth away from 0 is positive)
    //   residual    2d for d >= 0, else -2d - 1, with d read as two's complement ("zigzag")
    void (*residual_split)(const std::uint8_t* src, const std::uint8_t* base, std::size_t n, std::size_t width,
                           std::uint8_t* planes) noexcept;

    // The inverses. Plane p is read at planes[p][0 .. n): planes may lie apart, or be one another.
    void (*merge_planes)(const std::uint8_t* const* planes, std::size_t n, std::size_t width,
                         std::uint8_t* out) noexcept;
    void (*xor_merge)(const std::uint8_t* const* planes, const std::uint8_t* base, std::size_t n, std::size_t width,
                      std::uint8_t* out) noexcept;
    void (*residual_merge)(const std::uint8_t* const* planes, const std::uint8_t* base, std::size_t n,
                           std::size_t width, std::uint8_t* out) noexcept;

    // Add n *elements* to sums of Moments, which begin as zeros. Adding runs of elements one after the other gives the
    // sums of all of them, bit for bit, if every run but the last is whole strides of lanes. The difference of two
    // lanes with the same bits is 0, even for NaN and infinity: what did not change is at distance 0, and where a is b
    // itself differences cost nothing. `table` has 256 entries for Kind::table8 and is not read otherwise. 64-bit
    // integers are rounded to float64.
    void (*add_moments)(const std::uint8_t* a, const std::uint8_t* b, std::size_t n, Kind kind, const double* table,
                        PartialSums& sums) noexcept;

    // The loops of the residual coder, which rans.hpp defines.
    const rans::Loops* coder;

    // The loops of the float coder, which floats.hpp defines.
    const floats::Loops* float_coder;
};

extern const Kernels scalar_kernels;
#ifdef LAMELLA_HAVE_AVX2
extern const Kernels avx2_kernels;
#endif

// The table in use: the fastest this CPU runs, or the scalar one if the environment says LAMELLA_ISA=scalar.
const Kernels& active() noexcept;

// Uses the table named "scalar" or "avx2" from now on, in all threads. False if this build or CPU lacks it.
bool select(const char* isa) noexcept;

// Converts n lanes.
void cast(const std::uint8_t* src, std::size_t n, Cast how, std::uint8_t* out) noexcept;

// What is left of floats of four bytes after a decay: out[i] = base[i] * factor / 2^(32 + halvings), rounded towards 0,
// with factor from 2^31 on; numbers that would come near 0, infinity and NaN stay what they are (FORMAT.md).
void decay(const std::uint8_t* base, std::size_t n, std::uint32_t factor, unsigned halvings,
           std::uint8_t* out) noexcept;

// Lanes that grow from what is left of their base are above it: a residual would spend a bit to say so. out[i] is the
// lane whose residual against decayed[i] is the d of src[i] + decay_slack, so that rounding may leave it a little
// below. Of residuals, 0 and decay_slack change places: a lane that is its base folds to its base.
inline constexpr std::uint32_t decay_slack = 16;
void decay_fold(const std::uint8_t* src, const std::uint8_t* decayed, std::size_t n, std::uint8_t* out) noexcept;
void decay_unfold(const std::uint8_t* folded, const std::uint8_t* decayed, std::size_t n, std::uint8_t* out) noexcept;

// Whether all lanes of src (nbytes bytes, a multiple of width) are equal; true for none.
bool is_constant(const std::uint8_t* src, std::size_t nbytes, std::size_t width) noexcept;

}  // namespace lamella
