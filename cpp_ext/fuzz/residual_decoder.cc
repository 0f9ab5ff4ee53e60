// Any bytes as a payload of the residual coder: what a sanitizer should watch.
//
//   make fuzz
//
// Every variant must agree with the scalar one: on whether lanes can be read, on each byte that comes of them, and on
// how far they are from the base, measured while they are decoded or afterwards.
//
// Flags of an input (chunks.hpp): bit 2 a base of noise, bit 3 measure from something else than the base, bit 4 measure
// without vectors, bit 5 the base has decayed.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../rans.hpp"
#include "chunks.hpp"

namespace {

using lamella::Kind;
using lamella::rans::Loops;
using lamella::rans::Model;
using lamella::rans::Slot;
using lamella::rans::Source;

bool lanes_were_read;

// The loops of all variants at once: what stands before the lanes is read once, by code that they share.
bool read(const Model& model, const Slot* slots, const std::uint8_t* block_classes, Source& from,
          const std::uint8_t* base, std::size_t first, std::size_t n, std::uint8_t* out) noexcept {
    lanes_were_read = true;
    Source same = from;
    Bytes expected(n * model.width);
    const bool reads =
        lamella::rans::scalar_loops.read(model, slots, block_classes, same, base, first, n, expected.data());
    require(lamella::rans::avx2_loops.read(model, slots, block_classes, from, base, first, n, out) == reads);
    if (!reads) return false;
    require(std::memcmp(out, expected.data(), expected.size()) == 0);
    require(from.words == same.words && from.patching == same.patching);
    require(std::equal(from.states, from.states + model.streams, same.states));
    return true;
}

constexpr Loops loops = {nullptr, nullptr, nullptr, nullptr, read};

std::uint8_t* workspace_for(std::size_t n) {
    return workspace_of(lamella::rans::decoder_workspace(n),
                        lamella::rans::decoder_workspace(PayloadInput::most_lanes));
}

// Of `from`, which is the base or as long, against what a payload stands for: `out`, unless the payload is refused.
void check_moments(const PayloadInput& input, const Bytes& base, const Bytes& from, bool refused, const Bytes& out) {
    constexpr Kind kinds[] = {Kind::table8, Kind::bfloat16, Kind::float32, Kind::float64};
    const Kind kind = kinds[input.flags & 3];
    double table[256];
    for (int i = 0; i < 256; ++i) table[i] = i - 99;
    lamella::Kernels kernels = (input.flags & 16) != 0 ? lamella::scalar_kernels : lamella::avx2_kernels;
    kernels.coder = &loops;
    lamella::PartialSums sums = {}, expected = {};
    const char* fault =
        lamella::rans::add_moments(kernels, input.payload, input.payload_nbytes, base.data(), from.data(), input.n,
                                   input.width, kind, table, workspace_for(input.n), sums);
    require((fault != nullptr) == refused);
    if (refused) return;
    lamella::scalar_kernels.add_moments(from.data(), out.data(), input.n, kind, table, expected);
    const lamella::Moments found = lamella::finish(sums), wanted = lamella::finish(expected);
    require(std::memcmp(&found, &wanted, sizeof found) == 0);
}

// What folded lanes stand for folds to them again.
void check_decay(const Bytes& decayed, const Bytes& out) {
    Bytes lanes(out.size()), folded(out.size());
    lamella::decay_unfold(out.data(), decayed.data(), out.size() / 4, lanes.data());
    lamella::decay_fold(lanes.data(), decayed.data(), out.size() / 4, folded.data());
    require(folded == out);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < PayloadInput::prefix) return 0;
    const PayloadInput input(data, size);
    Bytes base = make_lanes(input.n, input.width, input.seed, (input.flags & 4) != 0);
    const bool decayed = input.width == 4 && (input.flags & 32) != 0;
    if (decayed) base = make_decayed(base, input.seed);
    Bytes out(base.size());
    lanes_were_read = false;
    const char* fault = lamella::rans::decode(loops, input.payload, input.payload_nbytes, base.data(), input.n,
                                              input.width, workspace_for(input.n), out.data());
    // What is refused before its lanes is refused in the same place when it is measured.
    if (!lanes_were_read) return 0;
    const Bytes from = (input.flags & 8) != 0 ? Bytes(base.rbegin(), base.rend()) : base;
    check_moments(input, base, from, fault != nullptr, out);
    if (decayed && fault == nullptr) check_decay(base, out);
    return 0;
}
