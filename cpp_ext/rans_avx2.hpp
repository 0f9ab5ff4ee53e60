// What reading and writing the lanes of dense blocks with AVX2 share.
#pragma once

#include "states_avx2.hpp"

namespace lamella::rans {

// Of rans_avx2_read.cc; the other loops are in rans_avx2_write.cc.
bool read_avx2(const Model& model, const Slot* slots, const std::uint8_t* block_classes, Source& from,
               const std::uint8_t* base, std::size_t first, std::size_t n, std::uint8_t* out) noexcept;

namespace {

inline Vector drift_bins(Vector base) {
    return _mm256_and_si256(_mm256_srli_epi32(base, drift_shift), all(contexts - 1));
}

// The contexts of run_lanes lanes of a drifting block, as bytes in order.
inline Vector drift_contexts(const uint8_t* base) {
    return to_bytes<4>([=](size_t i) { return drift_bins(load_vector(base + 32 * i)); });
}

// The offsets of eight lanes that drift.
struct Offsets {
    Vector quarters[4];
    explicit Offsets(const Model& model) {
        for (int i = 0; i < 4; ++i) quarters[i] = load_vector(model.offsets + 8 * i);
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
inline Vector raw_bits_of(Vector symbols) {
    const Vector has = _mm256_cmpgt_epi32(symbols, all(direct - 1));
    return _mm256_and_si256(has, _mm256_sub_epi32(_mm256_srli_epi32(symbols, 1), all(direct / 2 - 4)));
}

inline Vector low_bits(Vector of, Vector bits) { return _mm256_andnot_si256(_mm256_sllv_epi32(all(~0u), bits), of); }

}  // namespace
}  // namespace lamella::rans
