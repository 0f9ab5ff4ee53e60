// What the files of the AVX2 variant are made of: registers of lanes. Everything is in an unnamed namespace, so that no
// object file takes another's copy of it; see avx2.cc for the rules of a file that includes this.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace lamella {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

using Vector = __m256i;

inline Vector load_vector(const void* p) { return _mm256_loadu_si256(static_cast<const Vector*>(p)); }
inline void store_vector(void* p, Vector v) { _mm256_storeu_si256(static_cast<Vector*>(p), v); }
inline __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load_quarter(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

inline Vector all(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
inline Vector concatenate(__m128i low, __m128i high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
inline __m128i by(unsigned bits) { return _mm_cvtsi32_si128(static_cast<int>(bits)); }  // to shift all lanes by

// The highest bits of all lanes of four bytes, and of one byte.
inline unsigned mask_of(Vector v) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(v))); }
inline unsigned mask_of_bytes(Vector v) { return static_cast<unsigned>(_mm256_movemask_epi8(v)); }
inline unsigned count_bits(unsigned mask) { return static_cast<unsigned>(_mm_popcnt_u32(mask)); }

// Of 32 bytes.
inline uint32_t sum_of_bytes(Vector v) {
    const Vector sums = _mm256_sad_epu8(v, _mm256_setzero_si256());
    const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(halves)) + static_cast<uint32_t>(_mm_extract_epi32(halves, 2));
}

// Lanes of b where `by` is negative, else of a.
inline Vector choose(Vector a, Vector b, Vector by) {
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(by)));
}

// Four registers of 32-bit lanes below 256 to one of bytes, in order.
inline Vector pack(Vector a, Vector b, Vector c, Vector d) {
    const Vector packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Two registers of 16-bit lanes below 256 to one of bytes, and two of 32-bit lanes below 2^16 to one of 16 bits.
inline Vector pack(Vector a, Vector b) { return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8); }
inline Vector pack_words(Vector a, Vector b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8); }

// The W registers of 32 lanes of W bytes that are below 256, to one of bytes; of(i) is register i.
template <size_t W, class Registers>
inline Vector to_bytes(Registers of) {
    if constexpr (W == 1) return of(0);
    if constexpr (W == 2) return pack(of(0), of(1));
    if constexpr (W == 4) return pack(of(0), of(1), of(2), of(3));
}

// Eight lanes of W bytes, as 32 bits each.
template <size_t W>
inline Vector load_eight(const uint8_t* from) {
    if constexpr (W == 1) return _mm256_cvtepu8_epi32(load_quarter(from));
    if constexpr (W == 2) return _mm256_cvtepu16_epi32(load_half(from));
    if constexpr (W == 4) return load_vector(from);
}

// Arithmetic on lanes of W bytes.
template <size_t W>
struct LanesOf {
    static Vector all(uint64_t value) {
        if constexpr (W == 1) return _mm256_set1_epi8(static_cast<char>(value));
        if constexpr (W == 2) return _mm256_set1_epi16(static_cast<short>(value));
        if constexpr (W == 4) return _mm256_set1_epi32(static_cast<int>(value));
        if constexpr (W == 8) return _mm256_set1_epi64x(static_cast<long long>(value));
    }
    static constexpr uint64_t sign = uint64_t{1} << (8 * W - 1);
    static Vector below_sign() { return all(sign - 1); }
    static Vector add(Vector a, Vector b) {
        if constexpr (W == 1) return _mm256_add_epi8(a, b);
        if constexpr (W == 2) return _mm256_add_epi16(a, b);
        if constexpr (W == 4) return _mm256_add_epi32(a, b);
        if constexpr (W == 8) return _mm256_add_epi64(a, b);
    }
    static Vector subtract(Vector a, Vector b) {
        if constexpr (W == 1) return _mm256_sub_epi8(a, b);
        if constexpr (W == 2) return _mm256_sub_epi16(a, b);
        if constexpr (W == 4) return _mm256_sub_epi32(a, b);
        if constexpr (W == 8) return _mm256_sub_epi64(a, b);
    }
    // All ones in lanes that are equal, or whose sign bit is set.
    static Vector equal(Vector a, Vector b) {
        if constexpr (W == 1) return _mm256_cmpeq_epi8(a, b);
        if constexpr (W == 2) return _mm256_cmpeq_epi16(a, b);
        if constexpr (W == 4) return _mm256_cmpeq_epi32(a, b);
        if constexpr (W == 8) return _mm256_cmpeq_epi64(a, b);
    }
    static Vector negative(Vector v) {
        const Vector zero = _mm256_setzero_si256();
        if constexpr (W == 1) return _mm256_cmpgt_epi8(zero, v);
        if constexpr (W == 2) return _mm256_srai_epi16(v, 15);
        if constexpr (W == 4) return _mm256_srai_epi32(v, 31);
        if constexpr (W == 8) return _mm256_cmpgt_epi64(zero, v);
    }
    // The smaller ones of unsigned lanes.
    static Vector min(Vector a, Vector b) {
        if constexpr (W == 1) return _mm256_min_epu8(a, b);
        if constexpr (W == 2) return _mm256_min_epu16(a, b);
        if constexpr (W == 4) return _mm256_min_epu32(a, b);
    }
    // There is no shift of bytes: these shift pairs, and what leaves a byte enters its neighbour.
    static Vector left(Vector v, __m128i bits) {
        if constexpr (W <= 2) return _mm256_sll_epi16(v, bits);
        if constexpr (W == 4) return _mm256_sll_epi32(v, bits);
    }
    static Vector right(Vector v, __m128i bits) {
        if constexpr (W <= 2) return _mm256_srl_epi16(v, bits);
        if constexpr (W == 4) return _mm256_srl_epi32(v, bits);
    }
    // Unsigned halves.
    static Vector half(Vector v) {
        if constexpr (W == 1) return _mm256_and_si256(_mm256_srli_epi16(v, 1), below_sign());
        if constexpr (W == 2) return _mm256_srli_epi16(v, 1);
        if constexpr (W == 4) return _mm256_srli_epi32(v, 1);
        if constexpr (W == 8) return _mm256_srli_epi64(v, 1);
    }
};

// Lanes of W bytes to their bits below the sign, >> shift.
template <size_t W>
struct Magnitudes {
    __m128i shift;
    Vector inside;
    explicit Magnitudes(unsigned shift_by)
        : shift(by(shift_by)), inside(LanesOf<W>::all((LanesOf<W>::sign - 1) >> shift_by)) {}
    Vector operator()(Vector v) const { return _mm256_and_si256(LanesOf<W>::right(v, shift), inside); }
};

// 32 bytes, each below 32, to the bytes that a table of 32 has for them.
struct Lookup {
    Vector low, high;
    explicit Lookup(const uint8_t* table)
        : low(_mm256_broadcastsi128_si256(load_half(table))),
          high(_mm256_broadcastsi128_si256(load_half(table + 16))) {}
    Vector operator()(Vector at) const {
        return _mm256_blendv_epi8(_mm256_shuffle_epi8(low, at), _mm256_shuffle_epi8(high, at),
                                  _mm256_slli_epi16(at, 3));
    }
};

}  // namespace
}  // namespace lamella
