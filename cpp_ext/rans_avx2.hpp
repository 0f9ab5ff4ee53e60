// What reading and writing the lanes of dense blocks with AVX2 share. Lanes have up to four bytes here, and there are
// at least 16 streams; what is left, the last block if it is short included, goes through the scalar loops. See avx2.cc
// for the rules of such a file.
#pragma once

#include <immintrin.h>

#include "rans.hpp"

namespace lamella::rans {

using Vector = __m256i;

// Of rans_avx2_read.cc; the other loops are in rans_avx2_write.cc.
bool read_avx2(const Model& model, const Slot* slots, const std::uint8_t* block_classes, Source& from,
               const std::uint8_t* base, std::size_t first, std::size_t n, std::uint8_t* out) noexcept;

namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

Vector load_vector(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Vector*>(p)); }
Vector load_vector(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Vector*>(p)); }
void store_vector(uint8_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<Vector*>(p), v); }
void store_vector(uint32_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<Vector*>(p), v); }

Vector all(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
unsigned mask_of(Vector v) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(v))); }
unsigned count(unsigned mask) { return static_cast<unsigned>(_mm_popcnt_u32(mask)); }

// Lanes of b where `by` is negative, else of a.
Vector choose(Vector a, Vector b, Vector by) {
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(by)));
}

// Four registers of 32-bit lanes below 256 to one of bytes, in order.
Vector pack(Vector a, Vector b, Vector c, Vector d) {
    const Vector packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Two registers of 16-bit lanes below 256 to one of bytes, and two of 32-bit lanes below 2^16 to one of 16 bits.
Vector pack(Vector a, Vector b) { return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8); }
Vector pack_words(Vector a, Vector b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8); }

// 32 bytes, each below 32, to the bytes that a table of 32 has for them.
struct Lookup {
    Vector low, high;
    explicit Lookup(const uint8_t* table)
        : low(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))),
          high(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16)))) {}
    Vector operator()(Vector at) const {
        return _mm256_blendv_epi8(_mm256_shuffle_epi8(low, at), _mm256_shuffle_epi8(high, at),
                                  _mm256_slli_epi16(at, 3));
    }
};

// Lanes of W bytes, in registers of 32 / W. Where a base has at most eight bits from `shift` to its sign, which is so
// in all float types, contexts are computed as bytes.
template <size_t W>
struct Lanes;

template <>
struct Lanes<1> {
    static Vector negative(Vector v) { return _mm256_cmpgt_epi8(_mm256_setzero_si256(), v); }
    static Vector below_sign() { return _mm256_set1_epi8(0x7f); }
    static Vector add(Vector a, Vector b) { return _mm256_add_epi8(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm256_sub_epi8(a, b); }
    static Vector equal(Vector a, Vector b) { return _mm256_cmpeq_epi8(a, b); }
    // There is no shift of bytes: shift pairs and drop what came from the neighbour.
    static Vector half(Vector v) { return _mm256_and_si256(_mm256_srli_epi16(v, 1), below_sign()); }
    static Vector one() { return _mm256_set1_epi8(1); }

    // Of run_lanes lanes, their magnitudes >> shift.
    static Vector magnitudes(const uint8_t* base, __m128i shift) {
        const Vector inside = _mm256_set1_epi8(static_cast<char>(0x7f >> _mm_cvtsi128_si32(shift)));
        return _mm256_and_si256(_mm256_srl_epi16(load_vector(base), shift), inside);
    }
    // Of run_lanes lanes in four registers of 32 bits, W registers.
    static void narrow(const Vector (&wide)[4], Vector (&to)[1]) { to[0] = pack(wide[0], wide[1], wide[2], wide[3]); }
    static Vector load_eight(const uint8_t* from) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    }
};

template <>
struct Lanes<2> {
    static Vector negative(Vector v) { return _mm256_srai_epi16(v, 15); }
    static Vector below_sign() { return _mm256_set1_epi16(0x7fff); }
    static Vector add(Vector a, Vector b) { return _mm256_add_epi16(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm256_sub_epi16(a, b); }
    static Vector equal(Vector a, Vector b) { return _mm256_cmpeq_epi16(a, b); }
    static Vector half(Vector v) { return _mm256_srli_epi16(v, 1); }
    static Vector one() { return _mm256_set1_epi16(1); }

    static Vector magnitudes(const uint8_t* base, __m128i shift) {
        return pack(_mm256_srl_epi16(_mm256_and_si256(load_vector(base), below_sign()), shift),
                    _mm256_srl_epi16(_mm256_and_si256(load_vector(base + 32), below_sign()), shift));
    }
    static void narrow(const Vector (&wide)[4], Vector (&to)[2]) {
        to[0] = pack_words(wide[0], wide[1]);
        to[1] = pack_words(wide[2], wide[3]);
    }
    static Vector load_eight(const uint8_t* from) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
};

template <>
struct Lanes<4> {
    static Vector negative(Vector v) { return _mm256_srai_epi32(v, 31); }
    static Vector below_sign() { return all(0x7fffffff); }
    static Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm256_sub_epi32(a, b); }
    static Vector equal(Vector a, Vector b) { return _mm256_cmpeq_epi32(a, b); }
    static Vector half(Vector v) { return _mm256_srli_epi32(v, 1); }
    static Vector one() { return all(1); }

    static Vector magnitudes(const uint8_t* base, __m128i shift) {
        const auto eight = [=](size_t i) {
            return _mm256_srl_epi32(_mm256_and_si256(load_vector(base + 32 * i), below_sign()), shift);
        };
        return pack(eight(0), eight(1), eight(2), eight(3));
    }
    static void narrow(const Vector (&wide)[4], Vector (&to)[4]) {
        for (int i = 0; i < 4; ++i) to[i] = wide[i];
    }
    static Vector load_eight(const uint8_t* from) { return load_vector(from); }
};

// Whether the vectors know what contexts these are.
template <size_t W>
bool has_byte_magnitudes(const Model& model) {
    return 8 * W - 1 <= model.shift + 8;
}

Vector drift_bins(Vector base) { return _mm256_and_si256(_mm256_srli_epi32(base, drift_shift), all(contexts - 1)); }

// The contexts of run_lanes lanes of a dense block, as bytes in order.
template <size_t W, bool Drift>
Vector contexts_of(const uint8_t* base, __m128i shift, uint32_t low) {
    if constexpr (Drift) {
        return pack(drift_bins(load_vector(base)), drift_bins(load_vector(base + 32)),
                    drift_bins(load_vector(base + 64)), drift_bins(load_vector(base + 96)));
    } else {
        const Vector lows = _mm256_set1_epi8(static_cast<char>(low < 0xff ? low : 0xff));
        return _mm256_min_epu8(_mm256_subs_epu8(Lanes<W>::magnitudes(base, shift), lows),
                               _mm256_set1_epi8(contexts - 1));
    }
}

// The offsets of eight lanes that drift.
struct Offsets {
    Vector quarters[4];
    explicit Offsets(const Model& model) {
        for (int i = 0; i < 4; ++i) {
            quarters[i] = _mm256_loadu_si256(reinterpret_cast<const Vector*>(model.offsets + 8 * i));
        }
    }
    Vector operator()(Vector base) const {
        const Vector bin = drift_bins(base);
        Vector found[4];
        for (int i = 0; i < 4; ++i) found[i] = _mm256_permutevar8x32_epi32(quarters[i], bin);
        const Vector bit3 = _mm256_slli_epi32(bin, 28), bit4 = _mm256_slli_epi32(bin, 27);
        return choose(choose(found[0], found[1], bit3), choose(found[2], found[3], bit3), bit4);
    }
};

// Lengths of the raw bits of eight symbols; 0 for direct ones.
Vector raw_bits_of(Vector symbols) {
    const Vector has = _mm256_cmpgt_epi32(symbols, all(direct - 1));
    return _mm256_and_si256(has, _mm256_sub_epi32(_mm256_srli_epi32(symbols, 1), all(direct / 2 - 4)));
}

Vector low_bits(Vector of, Vector bits) { return _mm256_andnot_si256(_mm256_sllv_epi32(all(~0u), bits), of); }

}  // namespace
}  // namespace lamella::rans
