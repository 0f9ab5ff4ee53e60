// Any bytes as a payload of the residual coder, or as a chunk to encode: what a sanitizer should watch.
//
//   make fuzz
//
// Every variant must agree with the scalar one: on whether a payload is one, on each byte that comes of it, and on how
// far that is from the base, measured while it is decoded or afterwards.
//
// An input is: one byte of flags (bits 0-1 log2 of the width, bit 2 encode, bit 3 a base of noise, bits 4-5 many
// lanes, bit 6 measure from something else than the base), two bytes that say how many lanes, one byte that seeds the
// base; then the payload, or what is added to the base to make the chunk.
#include <cstdint>
#include <cstring>

#include "../rans.hpp"
#include "chunks.hpp"

namespace {

using lamella::Kernels;
using lamella::Kind;
using lamella::rans::Loops;

constexpr const Kernels* variants[] = {
    &lamella::scalar_kernels,
#ifdef LAMELLA_HAVE_AVX2
    &lamella::avx2_kernels,
#endif
};

// Each in memory of exactly its size, so that a sanitizer sees the first byte beyond.
const char* decode(const Loops& loops, const Bytes& payload, const Bytes& base, std::size_t width, Bytes& out) {
    const std::size_t n = base.size() / width;
    Bytes workspace(lamella::rans::decoder_workspace(n));
    return lamella::rans::decode(loops, payload.data(), payload.size(), base.data(), n, width, workspace.data(),
                                 out.data());
}

// Of `from`, which is the base or as long, against what a payload stands for: `out`, unless the payload is refused.
void check_moments(const Kernels& kernels, const Bytes& payload, const Bytes& base, const Bytes& from,
                   std::size_t width, bool refused, const Bytes& out) {
    constexpr Kind kinds[] = {Kind::table8, Kind::bfloat16, Kind::float32, Kind::float64};
    const Kind kind = kinds[width == 8 ? 3 : width / 2];
    double table[256];
    for (int i = 0; i < 256; ++i) table[i] = i - 99;
    const std::size_t n = base.size() / width;
    Bytes workspace(lamella::rans::decoder_workspace(n));
    lamella::PartialSums sums = {}, expected = {};
    const bool refuses = lamella::rans::add_moments(kernels, payload.data(), payload.size(), base.data(), from.data(),
                                                    n, width, kind, table, workspace.data(), sums) != nullptr;
    require(refuses == refused);
    if (refused) return;
    lamella::scalar_kernels.add_moments(from.data(), out.data(), n, kind, table, expected);
    const lamella::Moments found = lamella::finish(sums), wanted = lamella::finish(expected);
    require(std::memcmp(&found, &wanted, sizeof found) == 0);
}

void check_payload(const Bytes& payload, const Bytes& base, const Bytes& from, std::size_t width) {
    Bytes first;
    bool refused = false;
    for (const Kernels* kernels : variants) {
        Bytes out(base.size());
        const bool refuses = decode(*kernels->coder, payload, base, width, out) != nullptr;
        if (kernels == variants[0]) first = out, refused = refuses;
        require(refuses == refused && (refused || out == first));
        check_moments(*kernels, payload, base, from, width, refused, out);
    }
}

void check_chunk(const Bytes& chunk, const Bytes& base, const Bytes& from, std::size_t width) {
    const std::size_t n = base.size() / width;
    Bytes first;
    for (const Kernels* kernels : variants) {
        const Loops* loops = kernels->coder;
        Bytes workspace(lamella::rans::encoder_workspace(n, width)), payload(2 * chunk.size() + 4096);
        payload.resize(lamella::rans::encode(*loops, chunk.data(), base.data(), n, width, workspace.data(),
                                             payload.data(), payload.size()));
        if (kernels == variants[0]) first = payload;
        require(!payload.empty() && payload == first);
        Bytes out(base.size());
        require(decode(*loops, payload, base, width, out) == nullptr && out == chunk);
        // With less room than it takes there is no payload, and nothing is written past the room.
        Bytes small(payload.size() - 1);
        require(lamella::rans::encode(*loops, chunk.data(), base.data(), n, width, workspace.data(), small.data(),
                                      small.size()) == 0);
    }
    check_payload(first, base, from, width);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < 4) return 0;
    const std::size_t width = std::size_t{1} << (data[0] & 3);
    // Enough lanes for each number of streams that an encoder chooses.
    constexpr std::size_t times[] = {1, 8, 48, 180};
    const std::size_t n = (1 + static_cast<std::size_t>(data[1] | data[2] << 8) % 1500) * times[data[0] >> 4 & 3];
    const Bytes base = make_base(n * width, width, data[3], (data[0] & 8) != 0);
    const Bytes reversed(base.rbegin(), base.rend());
    const Bytes& from = (data[0] & 64) == 0 ? base : reversed;
    const Bytes rest(data + 4, data + size);
    if ((data[0] & 4) == 0) {
        check_payload(rest, base, from, width);
    } else {
        Bytes chunk = base;
        for (std::size_t i = 0; i < chunk.size() && !rest.empty(); ++i) {
            chunk[i] = static_cast<std::uint8_t>(chunk[i] + rest[i % rest.size()]);
        }
        check_chunk(chunk, base, from, width);
    }
    return 0;
}
