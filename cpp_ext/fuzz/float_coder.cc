// Any bytes as a payload of the float coder, or as a chunk to encode: what a sanitizer should watch.
//
//   make fuzz
//
// Every variant must agree with the scalar one: on whether a payload is one, and on each byte that comes of it.
//
// An input is: one byte of flags (bits 0-1 log2 of the width, bit 2 encode, bit 3 a chunk of noise, bits 4-5 many
// lanes, bit 6 a guide, bit 7 zeros in the second half), two bytes that say how many lanes, one byte that seeds the
// chunk and the guide; then the payload, or what is added to the chunk.
#include <algorithm>
#include <cstdint>

#include "../floats.hpp"
#include "chunks.hpp"

namespace {

using lamella::floats::Loops;

constexpr const Loops* variants[] = {
    &lamella::floats::scalar_loops,
#ifdef LAMELLA_HAVE_AVX2
    &lamella::floats::avx2_loops,
#endif
};

// What is coded: `guide` is empty if there is none. Each in memory of exactly its size, so that a sanitizer sees the
// first byte beyond.
struct Case {
    std::size_t n, width;
    Bytes guide;
    const std::uint8_t* guiding() const { return guide.empty() ? nullptr : guide.data(); }
};

const char* decode(const Loops& loops, const Case& of, const Bytes& payload, Bytes& out) {
    Bytes workspace(lamella::floats::decoder_workspace(of.n));
    return lamella::floats::decode(loops, payload.data(), payload.size(), of.guiding(), of.n, of.width,
                                   workspace.data(), out.data());
}

std::size_t encode(const Loops& loops, const Case& of, const Bytes& chunk, Bytes& out) {
    Bytes workspace(lamella::floats::encoder_workspace(of.n, of.width));
    return lamella::floats::encode(loops, chunk.data(), of.guiding(), of.n, of.width, workspace.data(), out.data(),
                                   out.size());
}

void check_payload(const Case& of, const Bytes& payload) {
    Bytes first;
    bool refused = false;
    for (const Loops* loops : variants) {
        Bytes out(of.n * of.width);
        const bool refuses = decode(*loops, of, payload, out) != nullptr;
        if (loops == variants[0]) first = out, refused = refuses;
        require(refuses == refused && (refused || out == first));
    }
}

void check_chunk(const Case& of, const Bytes& chunk) {
    Bytes first;
    for (const Loops* loops : variants) {
        Bytes payload(2 * chunk.size() + 4096);
        payload.resize(encode(*loops, of, chunk, payload));
        if (loops == variants[0]) first = payload;
        require(!payload.empty() && payload == first);
        Bytes out(chunk.size());
        require(decode(*loops, of, payload, out) == nullptr && out == chunk);
        // With less room than it takes there is no payload, and nothing is written past the room.
        Bytes small(payload.size() - 1);
        require(encode(*loops, of, chunk, small) == 0);
    }
    check_payload(of, first);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < 4) return 0;
    const unsigned flags = data[0];
    Case of{};
    of.width = std::size_t{1} << (flags & 3);
    // Enough lanes for each number of streams that an encoder chooses.
    constexpr std::size_t times[] = {1, 8, 48, 180};
    of.n = (1 + static_cast<std::size_t>(data[1] | data[2] << 8) % 1500) * times[flags >> 4 & 3];
    if ((flags & 64) != 0) of.guide = make_base(of.n * of.width, of.width, data[3] + 1u, false);
    const Bytes rest(data + 4, data + size);
    if ((flags & 4) == 0) {
        check_payload(of, rest);
        return 0;
    }
    Bytes chunk = make_base(of.n * of.width, of.width, data[3], (flags & 8) != 0);
    for (std::size_t i = 0; i < chunk.size() && !rest.empty(); ++i) {
        chunk[i] = static_cast<std::uint8_t>(chunk[i] + rest[i % rest.size()]);
    }
    if ((flags & 128) != 0) std::fill(chunk.begin() + static_cast<std::ptrdiff_t>(chunk.size() / 2), chunk.end(), 0);
    check_chunk(of, chunk);
    return 0;
}
