// Any bytes as a payload of the float coder: what a sanitizer should watch.
//
//   make fuzz
//
// Every variant must agree with the scalar one: on whether lanes can be read, and on each byte that comes of them.
//
// Flags of an input (chunks.hpp): bit 2 a guide, bit 3 a guide of noise.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../floats.hpp"
#include "chunks.hpp"

namespace {

using lamella::floats::Loops;
using lamella::floats::Model;
using lamella::floats::Slot;
using lamella::floats::Source;

// The loops of all variants at once: what stands before the lanes is read once, by code that they share.
bool read(const Model& model, const Slot* slots, const std::uint8_t* block_classes, Source& source,
          const std::uint8_t* guide, std::size_t first, std::size_t n, std::uint8_t* out) noexcept {
    Source same = source;
    Bytes expected(n * model.width);
    const bool reads =
        lamella::floats::scalar_loops.read(model, slots, block_classes, same, guide, first, n, expected.data());
    require(lamella::floats::avx2_loops.read(model, slots, block_classes, source, guide, first, n, out) == reads);
    if (!reads) return false;
    require(std::memcmp(out, expected.data(), expected.size()) == 0);
    require(source.from.words == same.from.words && source.raw == same.raw && source.escapes == same.escapes);
    require(std::equal(source.from.states, source.from.states + model.streams, same.from.states));
    return true;
}

constexpr Loops loops = {nullptr, nullptr, read};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < PayloadInput::prefix) return 0;
    const PayloadInput input(data, size);
    Bytes guide, out(input.n * input.width);
    if ((input.flags & 4) != 0) guide = make_lanes(input.n, input.width, input.seed, (input.flags & 8) != 0);
    lamella::floats::decode(loops, input.payload, input.payload_nbytes, guide.empty() ? nullptr : guide.data(), input.n,
                            input.width,
                            workspace_of(lamella::floats::decoder_workspace(input.n),
                                         lamella::floats::decoder_workspace(PayloadInput::most_lanes)),
                            out.data());
    return 0;
}
