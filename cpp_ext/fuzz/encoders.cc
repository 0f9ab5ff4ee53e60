// Any lanes as a chunk to encode, against another one and by itself: what a sanitizer should watch.
//
//   make fuzz FUZZED=encoders FUZZ_RUNS=100000
//
// Every variant must write the payload that the scalar one writes, and read it back.
//
// An input is: one byte of flags (bits 0-1 log2 of the width, bit 3 a base of noise, bits 4-5 many lanes, bit 7 zeros
// in the second half), two bytes that say how many lanes, one byte that seeds the base; then what is added to the base
// to make the chunk.
#include <algorithm>
#include <cstdint>

#include "../floats.hpp"
#include "../rans.hpp"
#include "chunks.hpp"

namespace {

constexpr const lamella::Kernels* variants[] = {&lamella::scalar_kernels, &lamella::avx2_kernels};

// encode(kernels, workspace, out) and decode(kernels, payload, workspace, out) of one coder.
template <class Encode, class Decode>
void check(const Bytes& chunk, std::size_t encoder_workspace, std::size_t decoder_workspace, Encode encode,
           Decode decode) {
    Bytes first;
    for (const lamella::Kernels* kernels : variants) {
        Bytes workspace(encoder_workspace), payload(2 * chunk.size() + 4096);
        payload.resize(encode(*kernels, workspace.data(), payload));
        if (first.empty()) first = payload;
        require(!payload.empty() && payload == first);
        Bytes out(chunk.size()), reading(decoder_workspace);
        require(decode(*kernels, payload, reading.data(), out.data()) == nullptr && out == chunk);
        // With less room than it takes there is no payload, and nothing is written past the room.
        Bytes small(payload.size() - 1);
        require(encode(*kernels, workspace.data(), small) == 0);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    constexpr std::size_t prefix = 4;
    if (size < prefix) return 0;
    const unsigned flags = data[0];
    const std::size_t width = std::size_t{1} << (flags & 3);
    // Enough lanes for each number of streams that an encoder chooses, and for one that looks at some of them only.
    constexpr std::size_t times[] = {1, 6, 24, 96};
    const std::size_t n = (1 + static_cast<std::size_t>(data[1] | data[2] << 8) % 1500) * times[flags >> 4 & 3];
    const Bytes base = make_lanes(n, width, data[3], (flags & 8) != 0);
    Bytes chunk = base;
    for (std::size_t i = 0, j = prefix; i < chunk.size() && size > prefix; ++i, j = j + 1 < size ? j + 1 : prefix) {
        chunk[i] = static_cast<std::uint8_t>(chunk[i] + data[j]);
    }
    if ((flags & 128) != 0) std::fill(chunk.begin() + static_cast<std::ptrdiff_t>(chunk.size() / 2), chunk.end(), 0);

    using lamella::Kernels;
    check(
        chunk, lamella::rans::encoder_workspace(n, width), lamella::rans::decoder_workspace(n),
        [&](const Kernels& kernels, std::uint8_t* workspace, Bytes& out) {
            return lamella::rans::encode(*kernels.coder, chunk.data(), base.data(), n, width, workspace, out.data(),
                                         out.size());
        },
        [&](const Kernels& kernels, const Bytes& payload, std::uint8_t* workspace, std::uint8_t* out) {
            return lamella::rans::decode(*kernels.coder, payload.data(), payload.size(), base.data(), n, width,
                                         workspace, out);
        });
    for (const std::uint8_t* guide : {static_cast<const std::uint8_t*>(nullptr), base.data()}) {
        check(
            chunk, lamella::floats::encoder_workspace(n, width), lamella::floats::decoder_workspace(n),
            [&](const Kernels& kernels, std::uint8_t* workspace, Bytes& out) {
                return lamella::floats::encode(*kernels.float_coder, chunk.data(), guide, n, width, workspace,
                                               out.data(), out.size());
            },
            [&](const Kernels& kernels, const Bytes& payload, std::uint8_t* workspace, std::uint8_t* out) {
                return lamella::floats::decode(*kernels.float_coder, payload.data(), payload.size(), guide, n, width,
                                               workspace, out);
            });
    }
    return 0;
}
