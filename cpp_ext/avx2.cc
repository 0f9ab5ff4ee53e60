// The AVX2 variant. Only entered on a CPU that has AVX2, F16C and POPCNT; see CMakeLists.txt for why what comes from a
// header has to be static or in an unnamed namespace. Intrinsics are the one exception, since they are always inlined.
#include "avx2.hpp"

#include <cstring>

#include "floats.hpp"
#include "kernels.hpp"
#include "rans.hpp"

namespace lamella {
namespace {

// Work goes in blocks of 32 lanes of W bytes: W registers, which become W planes of one register each.
constexpr size_t block = 32;

// deinterleave<H>: from two registers of lanes of 2H bytes, in order, the lower and the upper halves, in order.
// interleave<H> is its inverse. Packs and unpacks work within 128 bits, hence the permutations.
template <size_t H>
void deinterleave(Vector first, Vector second, Vector& low, Vector& high) {
    Vector l, h;
    if constexpr (H == 1) {
        const Vector mask = _mm256_set1_epi16(0x00ff);
        l = _mm256_packus_epi16(_mm256_and_si256(first, mask), _mm256_and_si256(second, mask));
        h = _mm256_packus_epi16(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8));
    } else if constexpr (H == 2) {
        const Vector mask = _mm256_set1_epi32(0x0000ffff);
        l = _mm256_packus_epi32(_mm256_and_si256(first, mask), _mm256_and_si256(second, mask));
        h = _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16));
    } else {
        const __m256 f = _mm256_castsi256_ps(first), s = _mm256_castsi256_ps(second);
        l = _mm256_castps_si256(_mm256_shuffle_ps(f, s, 0x88));
        h = _mm256_castps_si256(_mm256_shuffle_ps(f, s, 0xdd));
    }
    low = _mm256_permute4x64_epi64(l, 0xd8);
    high = _mm256_permute4x64_epi64(h, 0xd8);
}

template <size_t H>
void interleave(Vector low, Vector high, Vector& first, Vector& second) {
    Vector a, b;
    if constexpr (H == 1) {
        a = _mm256_unpacklo_epi8(low, high);
        b = _mm256_unpackhi_epi8(low, high);
    } else if constexpr (H == 2) {
        a = _mm256_unpacklo_epi16(low, high);
        b = _mm256_unpackhi_epi16(low, high);
    } else {
        a = _mm256_unpacklo_epi32(low, high);
        b = _mm256_unpackhi_epi32(low, high);
    }
    first = _mm256_permute2x128_si256(a, b, 0x20);
    second = _mm256_permute2x128_si256(a, b, 0x31);
}

template <size_t W>
void lanes_to_planes(const Vector* lanes, Vector* planes) {
    if constexpr (W == 1) {
        planes[0] = lanes[0];
    } else {
        Vector low[W / 2], high[W / 2];
        for (size_t i = 0; i < W / 2; ++i) deinterleave<W / 2>(lanes[2 * i], lanes[2 * i + 1], low[i], high[i]);
        lanes_to_planes<W / 2>(low, planes);
        lanes_to_planes<W / 2>(high, planes + W / 2);
    }
}

template <size_t W>
void planes_to_lanes(const Vector* planes, Vector* lanes) {
    if constexpr (W == 1) {
        lanes[0] = planes[0];
    } else {
        Vector low[W / 2], high[W / 2];
        planes_to_lanes<W / 2>(planes, low);
        planes_to_lanes<W / 2>(planes + W / 2, high);
        for (size_t i = 0; i < W / 2; ++i) interleave<W / 2>(low[i], high[i], lanes[2 * i], lanes[2 * i + 1]);
    }
}

template <size_t W>
struct Plain {
    static constexpr bool has_base = false;
    static Vector forward(Vector x, Vector) { return x; }
    static Vector inverse(Vector z, Vector) { return z; }
};

template <size_t W>
struct Xor {
    static constexpr bool has_base = true;
    static Vector forward(Vector x, Vector base) { return _mm256_xor_si256(x, base); }
    static Vector inverse(Vector z, Vector base) { return _mm256_xor_si256(z, base); }
};

template <size_t W>
struct Residual {
    static constexpr bool has_base = true;
    using L = LanesOf<W>;
    static Vector negate_where(Vector v, Vector mask) { return L::subtract(_mm256_xor_si256(v, mask), mask); }
    static Vector ordered(Vector v) { return _mm256_xor_si256(v, _mm256_and_si256(L::negative(v), L::below_sign())); }
    static Vector forward(Vector x, Vector base) {
        const Vector d = negate_where(L::subtract(ordered(x), ordered(base)), L::negative(base));
        return _mm256_xor_si256(L::add(d, d), L::negative(d));
    }
    static Vector inverse(Vector z, Vector base) {
        const Vector odd = L::subtract(_mm256_setzero_si256(), _mm256_and_si256(z, L::all(1)));
        const Vector d = negate_where(_mm256_xor_si256(L::half(z), odd), L::negative(base));
        return ordered(L::add(ordered(base), d));
    }
};

// One block of lanes to one register a plane; plane p starts at planes + p * n.
template <size_t W, class Relation>
void split_block(const uint8_t* src, const uint8_t* base, size_t n, uint8_t* planes) {
    Vector lanes[W], out[W];
    for (size_t k = 0; k < W; ++k) {
        lanes[k] = load_vector(src + k * block);
        if constexpr (Relation::has_base) lanes[k] = Relation::forward(lanes[k], load_vector(base + k * block));
    }
    lanes_to_planes<W>(lanes, out);
    for (size_t p = 0; p < W; ++p) store_vector(planes + p * n, out[p]);
}

template <size_t W, class Relation>
void merge_block(const uint8_t* const* planes, size_t at, const uint8_t* base, uint8_t* out) {
    Vector in[W], lanes[W];
    for (size_t p = 0; p < W; ++p) in[p] = load_vector(planes[p] + at);
    planes_to_lanes<W>(in, lanes);
    for (size_t k = 0; k < W; ++k) {
        if constexpr (Relation::has_base) lanes[k] = Relation::inverse(lanes[k], load_vector(base + k * block));
        store_vector(out + k * block, lanes[k]);
    }
}

// What is left after the last whole block goes through one more block, padded with zeros.
template <size_t W, class Relation>
void split(const uint8_t* src, const uint8_t* base, size_t n, uint8_t* planes) {
    size_t i = 0;
    for (; i + block <= n; i += block) {
        split_block<W, Relation>(src + i * W, Relation::has_base ? base + i * W : nullptr, n, planes + i);
    }
    if (i == n) return;
    uint8_t tail[W * block] = {}, base_tail[W * block] = {}, out[W * block];
    std::memcpy(tail, src + i * W, (n - i) * W);
    if constexpr (Relation::has_base) std::memcpy(base_tail, base + i * W, (n - i) * W);
    split_block<W, Relation>(tail, base_tail, block, out);
    for (size_t p = 0; p < W; ++p) std::memcpy(planes + p * n + i, out + p * block, n - i);
}

template <size_t W, class Relation>
void merge(const uint8_t* const* planes, const uint8_t* base, size_t n, uint8_t* out) {
    size_t i = 0;
    for (; i + block <= n; i += block) {
        merge_block<W, Relation>(planes, i, Relation::has_base ? base + i * W : nullptr, out + i * W);
    }
    if (i == n) return;
    uint8_t tail[W * block] = {}, base_tail[W * block] = {}, lanes[W * block];
    const uint8_t* tails[W];
    for (size_t p = 0; p < W; ++p) {
        tails[p] = tail + p * block;
        std::memcpy(tail + p * block, planes[p] + i, n - i);
    }
    if constexpr (Relation::has_base) std::memcpy(base_tail, base + i * W, (n - i) * W);
    merge_block<W, Relation>(tails, 0, base_tail, lanes);
    std::memcpy(out + i * W, lanes, (n - i) * W);
}

template <template <size_t> class Relation>
void split_any(const uint8_t* src, const uint8_t* base, size_t n, size_t width, uint8_t* planes) {
    switch (width) {
        case 1:
            return split<1, Relation<1>>(src, base, n, planes);
        case 2:
            return split<2, Relation<2>>(src, base, n, planes);
        case 4:
            return split<4, Relation<4>>(src, base, n, planes);
        default:
            return split<8, Relation<8>>(src, base, n, planes);
    }
}

template <template <size_t> class Relation>
void merge_any(const uint8_t* const* planes, const uint8_t* base, size_t n, size_t width, uint8_t* out) {
    switch (width) {
        case 1:
            return merge<1, Relation<1>>(planes, base, n, out);
        case 2:
            return merge<2, Relation<2>>(planes, base, n, out);
        case 4:
            return merge<4, Relation<4>>(planes, base, n, out);
        default:
            return merge<8, Relation<8>>(planes, base, n, out);
    }
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

// Lanes as float64: `four(p)` gives the four lanes at p, or `eight(p)` the eight where that is cheaper.

struct Eight {
    __m256d low, high;
};

struct Table8 {
    static constexpr size_t width = 1;
    const double* table;
    __m256d four(const uint8_t* p) const { return _mm256_setr_pd(table[p[0]], table[p[1]], table[p[2]], table[p[3]]); }
};

struct Int16 {
    static constexpr size_t width = 2;
    __m256d four(const uint8_t* p) const { return _mm256_cvtepi32_pd(_mm_cvtepi16_epi32(load_quarter(p))); }
};

struct UInt16 {
    static constexpr size_t width = 2;
    __m256d four(const uint8_t* p) const { return _mm256_cvtepi32_pd(_mm_cvtepu16_epi32(load_quarter(p))); }
};

struct Int32 {
    static constexpr size_t width = 4;
    __m256d four(const uint8_t* p) const { return _mm256_cvtepi32_pd(load_half(p)); }
};

struct UInt32 {
    static constexpr size_t width = 4;
    __m256d four(const uint8_t* p) const {
        // Below 2^32, the bits of 2^52 or-ed with u are those of 2^52 + u.
        const __m256d two52 = _mm256_set1_pd(4503599627370496.0);
        const Vector bits = _mm256_or_si256(_mm256_cvtepu32_epi64(load_half(p)), _mm256_castpd_si256(two52));
        return _mm256_sub_pd(_mm256_castsi256_pd(bits), two52);
    }
};

template <class T>
struct Integer64 {
    static constexpr size_t width = 8;
    __m256d four(const uint8_t* p) const {  // AVX2 has no conversion of 64-bit integers
        T v[4];
        std::memcpy(v, p, sizeof v);
        return _mm256_setr_pd(static_cast<double>(v[0]), static_cast<double>(v[1]), static_cast<double>(v[2]),
                              static_cast<double>(v[3]));
    }
};

struct Float16 {
    static constexpr size_t width = 2;
    Eight eight(const uint8_t* p) const {
        const __m256 lanes = _mm256_cvtph_ps(load_half(p));
        return {_mm256_cvtps_pd(_mm256_castps256_ps128(lanes)), _mm256_cvtps_pd(_mm256_extractf128_ps(lanes, 1))};
    }
};

struct BFloat16 {
    static constexpr size_t width = 2;
    Eight eight(const uint8_t* p) const {  // a bfloat16 is the high half of a float32
        const __m128i lanes = load_half(p), zero = _mm_setzero_si128();
        return {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpacklo_epi16(zero, lanes))),
                _mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpackhi_epi16(zero, lanes)))};
    }
};

struct Float32 {
    static constexpr size_t width = 4;
    __m256d four(const uint8_t* p) const { return _mm256_cvtps_pd(_mm_castsi128_ps(load_half(p))); }
};

struct Float64 {
    static constexpr size_t width = 8;
    __m256d four(const uint8_t* p) const { return _mm256_castsi256_pd(load_vector(p)); }
};

template <class Lane>
Eight eight(const Lane& lane, const uint8_t* p) {
    if constexpr (requires { lane.eight(p); }) {
        return lane.eight(p);
    } else {
        return {lane.four(p), lane.four(p + 4 * Lane::width)};
    }
}

// How many of the elements of E bytes in `nbytes` (8 lanes: 8, 16, 32 or 64) differ.
template <size_t E, size_t nbytes>
uint64_t changed(const uint8_t* a, const uint8_t* b) {
    const auto count = [](int mask) { return count_bits(static_cast<unsigned>(mask)); };
    if constexpr (nbytes == 8) {
        return 8 - count(_mm_movemask_epi8(_mm_cmpeq_epi8(load_quarter(a), load_quarter(b))) & 0xff);
    } else if constexpr (nbytes == 16) {
        return 8 - count(_mm_movemask_epi8(_mm_cmpeq_epi16(load_half(a), load_half(b)))) / 2;
    } else if constexpr (nbytes == 64) {
        return changed<E, 32>(a, b) + changed<E, 32>(a + 32, b + 32);
    } else if constexpr (E == 4) {
        return 8 - count_bits(mask_of(_mm256_cmpeq_epi32(load_vector(a), load_vector(b))));
    } else {
        const int equal = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(load_vector(a), load_vector(b))));
        if constexpr (E == 8) return 4 - count(equal);
        return 2 - count(equal & (equal >> 1) & 5);
    }
}

// Half of the partial sums: those of lanes 0-3 or of lanes 4-7 of every stride.
struct HalfSums {
    __m256d squared_difference, absolute_difference, dot, squared_a, squared_b;

    HalfSums(const PartialSums& sums, size_t first)
        : squared_difference(_mm256_loadu_pd(sums.squared_difference + first)),
          absolute_difference(_mm256_loadu_pd(sums.absolute_difference + first)),
          dot(_mm256_loadu_pd(sums.dot + first)),
          squared_a(_mm256_loadu_pd(sums.squared_a + first)),
          squared_b(_mm256_loadu_pd(sums.squared_b + first)) {}

    void store(PartialSums& sums, size_t first) const {
        _mm256_storeu_pd(sums.squared_difference + first, squared_difference);
        _mm256_storeu_pd(sums.absolute_difference + first, absolute_difference);
        _mm256_storeu_pd(sums.dot + first, dot);
        _mm256_storeu_pd(sums.squared_a + first, squared_a);
        _mm256_storeu_pd(sums.squared_b + first, squared_b);
    }

    // `largest` is one for both halves: a maximum does not depend on the order, and this loop is short of registers.
    template <bool same>
    void add(__m256d x, __m256d y, __m256d& largest) {
        if constexpr (!same) {
            const __m256d difference = _mm256_sub_pd(x, y);
            const __m256d magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), difference);
            squared_difference = _mm256_add_pd(squared_difference, _mm256_mul_pd(difference, difference));
            absolute_difference = _mm256_add_pd(absolute_difference, magnitude);
            // Of a NaN and a number this gives the second, the number.
            largest = _mm256_max_pd(magnitude, largest);
        }
        dot = _mm256_add_pd(dot, _mm256_mul_pd(x, y));
        squared_a = _mm256_add_pd(squared_a, _mm256_mul_pd(x, x));
        squared_b = _mm256_add_pd(squared_b, _mm256_mul_pd(y, y));
    }
};

// Whether any difference was a NaN.
bool has_nan(const HalfSums& low, const HalfSums& high) {
    return _mm256_movemask_pd(_mm256_cmp_pd(low.absolute_difference, high.absolute_difference, _CMP_UNORD_Q)) != 0;
}

// Subtracts without asking whether the bits are equal, which is only wrong for lanes that are not finite. Those show as
// the first NaN of all differences: then this is false, and the sums are as they were. `same`: b is a itself.
template <bool same, size_t lanes_per_element, class Lane>
bool add_finite(const uint8_t* a, const uint8_t* b, size_t n, Lane lane, PartialSums& sums) {
    constexpr size_t element = lanes_per_element * Lane::width;
    constexpr size_t step = stride * Lane::width;
    const size_t nbytes = n * element;
    if constexpr (same) b = a;
    HalfSums low(sums, 0), high(sums, 4);
    const bool had_nan = has_nan(low, high);
    __m256d largest =
        _mm256_max_pd(_mm256_loadu_pd(sums.largest_difference), _mm256_loadu_pd(sums.largest_difference + 4));
    uint64_t differing = 0;
    size_t at = 0;
    for (; at + step <= nbytes; at += step) {
        const Eight x = eight(lane, a + at), y = eight(lane, b + at);
        low.add<same>(x.low, y.low, largest);
        high.add<same>(x.high, y.high, largest);
        if constexpr (!same) differing += changed<element, step>(a + at, b + at);
    }
    if (at < nbytes) {
        // Lanes past the end count as +0.0, which changes no sum. They are masked because a byte 0 may mean another
        // number.
        uint8_t tail_a[step] = {}, tail_b[step] = {};
        std::memcpy(tail_a, a + at, nbytes - at);
        std::memcpy(tail_b, b + at, nbytes - at);
        uint64_t inside[stride] = {};
        for (size_t i = 0; i < (nbytes - at) / Lane::width; ++i) inside[i] = ~uint64_t{0};
        const __m256d in_low = _mm256_loadu_pd(reinterpret_cast<const double*>(inside));
        const __m256d in_high = _mm256_loadu_pd(reinterpret_cast<const double*>(inside + 4));
        const Eight x = eight(lane, tail_a), y = eight(lane, tail_b);
        low.add<same>(_mm256_and_pd(x.low, in_low), _mm256_and_pd(y.low, in_low), largest);
        high.add<same>(_mm256_and_pd(x.high, in_high), _mm256_and_pd(y.high, in_high), largest);
        if constexpr (!same) differing += changed<element, step>(tail_a, tail_b);
    }
    if (!had_nan && has_nan(low, high)) return false;
    low.store(sums, 0);
    high.store(sums, 4);
    _mm256_storeu_pd(sums.largest_difference, largest);
    _mm256_storeu_pd(sums.largest_difference + 4, _mm256_setzero_pd());
    sums.changed += differing;
    return true;
}

template <size_t lanes_per_element, class Lane>
bool add(const uint8_t* a, const uint8_t* b, size_t n, Lane lane, PartialSums& sums) {
    return a == b ? add_finite<true, lanes_per_element>(a, b, n, lane, sums)
                  : add_finite<false, lanes_per_element>(a, b, n, lane, sums);
}

bool add_any(const uint8_t* a, const uint8_t* b, size_t n, Kind kind, const double* table, PartialSums& sums) {
    switch (kind) {
        case Kind::table8:
            return add<1>(a, b, n, Table8{table}, sums);
        case Kind::int16:
            return add<1>(a, b, n, Int16{}, sums);
        case Kind::uint16:
            return add<1>(a, b, n, UInt16{}, sums);
        case Kind::int32:
            return add<1>(a, b, n, Int32{}, sums);
        case Kind::uint32:
            return add<1>(a, b, n, UInt32{}, sums);
        case Kind::int64:
            return add<1>(a, b, n, Integer64<std::int64_t>{}, sums);
        case Kind::uint64:
            return add<1>(a, b, n, Integer64<uint64_t>{}, sums);
        case Kind::float16:
            return add<1>(a, b, n, Float16{}, sums);
        case Kind::bfloat16:
            return add<1>(a, b, n, BFloat16{}, sums);
        case Kind::float32:
            return add<1>(a, b, n, Float32{}, sums);
        case Kind::float64:
            return add<1>(a, b, n, Float64{}, sums);
        case Kind::complex64:
            return add<2>(a, b, n, Float32{}, sums);
        case Kind::complex128:
            return add<2>(a, b, n, Float64{}, sums);
    }
    return true;
}

void add_moments(const uint8_t* a, const uint8_t* b, size_t n, Kind kind, const double* table,
                 PartialSums& sums) noexcept {
    // What is not finite is rare in weights, and gets the careful definition.
    if (!add_any(a, b, n, kind, table, sums)) scalar_kernels.add_moments(a, b, n, kind, table, sums);
}

}  // namespace

const Kernels avx2_kernels = {
    "avx2",    split_planes,   xor_split,   residual_split,    merge_planes,
    xor_merge, residual_merge, add_moments, &rans::avx2_loops, &floats::avx2_loops,
};

}  // namespace lamella
