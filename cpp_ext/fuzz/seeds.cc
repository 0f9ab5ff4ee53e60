// Writes inputs for the decoders' fuzz targets that are payloads, in the format of today: an encoder makes them of few
// lanes, which nevertheless are of every width, in every number of streams, and of every class that a block may have.
//
//   build/fuzz/seeds DIRECTORY      which has a directory for each decoder
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>

#include "../floats.hpp"
#include "../rans.hpp"
#include "chunks.hpp"

namespace {

namespace floats = lamella::floats;
namespace rans = lamella::rans;

// Encoders choose streams by the number of lanes, but readers take any: these loops change what was chosen.
unsigned streams;

void write_residuals(const rans::Model& model, const rans::Step* steps, const std::uint8_t* block_classes,
                     const rans::Symbols& from, std::size_t n, rans::Sink& to) noexcept {
    const_cast<rans::Model&>(model).streams = streams;
    rans::scalar_loops.write(model, steps, block_classes, from, n, to);
}

void write_floats(const floats::Model& model, const rans::Step* steps, const std::uint8_t* block_classes,
                  const floats::Lanes& from, const std::uint8_t* src, bool guided, std::size_t n,
                  floats::Sink& to) noexcept {
    const_cast<floats::Model&>(model).streams = streams;
    floats::scalar_loops.write(model, steps, block_classes, from, src, guided, n, to);
}

// What happens to the blocks of a chunk, one after the other.
enum class Change { none, few, small, large, all, decay, round, zero };
constexpr Change changes[][4] = {
    {Change::none, Change::none, Change::none, Change::few},
    {Change::few, Change::few, Change::none, Change::few},
    {Change::small, Change::small, Change::large, Change::all},
    {Change::none, Change::few, Change::small, Change::zero},
    {Change::all, Change::all, Change::all, Change::all},
    {Change::decay, Change::decay, Change::decay, Change::few},
    {Change::large, Change::large, Change::zero, Change::none},
    {Change::small, Change::decay, Change::large, Change::few},
    {Change::round, Change::round, Change::round, Change::zero},
};

void change_lane(std::uint8_t* lane, std::size_t width, Change how, std::size_t i, std::uint32_t random) {
    std::uint64_t x = 0;
    std::memcpy(&x, lane, width);
    const bool moves = how != Change::few || i % 37 == 5;
    switch (how) {
        case Change::none:
            break;
        case Change::few:
        case Change::small:
            if (moves) x += random % 5 - 2;
            break;
        case Change::large:
            x += (random % 4001 - 2000) >> (width == 1 ? 8 : 0);
            break;
        case Change::all:
            x += std::uint64_t{random} << (4 * width);
            break;
        case Change::decay:
            x -= width == 4 ? ((x & 0x7fffff) + 0x800000) >> 14 : 1;
            break;
        case Change::round:
            x &= ~((std::uint64_t{1} << (4 * width)) - 1);
            break;
        case Change::zero:
            x = 0;
    }
    std::memcpy(lane, &x, width);
}

Bytes changed(Bytes lanes, std::size_t width, const Change (&to_blocks)[4], std::uint32_t random) {
    for (std::size_t i = 0; i < lanes.size() / width; ++i) {
        random = random * 1664525 + 1013904223;
        change_lane(&lanes[i * width], width, to_blocks[i / lamella::rans::block_lanes % 4], i, random >> 8);
    }
    return lanes;
}

void save(const std::string& directory, int number, unsigned flags, std::size_t n, unsigned seed,
          const Bytes& payload) {
    require(!payload.empty());
    const std::size_t lanes = n - 1;
    const unsigned char prefix[PayloadInput::prefix] = {
        static_cast<unsigned char>(flags), static_cast<unsigned char>(lanes), static_cast<unsigned char>(lanes >> 8),
        static_cast<unsigned char>(seed)};
    std::ofstream file(directory + "/seed-" + std::to_string(number), std::ios::binary);
    file.write(reinterpret_cast<const char*>(prefix), sizeof prefix);
    file.write(reinterpret_cast<const char*>(payload.data()), static_cast<std::streamsize>(payload.size()));
    require(file.good());
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) return 1;
    const std::string directory = arguments[1];
    rans::Loops residual_loops = rans::scalar_loops;
    residual_loops.write = write_residuals;
    floats::Loops float_loops = floats::scalar_loops;
    float_loops.write = write_floats;
    constexpr std::size_t lengths[] = {1, 100, 300, 600, 1500};
    int number = 0;
    for (unsigned log_width = 0; log_width < 4; ++log_width) {
        for (const auto& to_blocks : changes) {
            for (streams = 1; streams <= rans::max_streams; streams *= 2, ++number) {
                const std::size_t n = lengths[number % 5], width = std::size_t{1} << log_width;
                const auto seed = static_cast<std::uint8_t>(number);
                const bool noise = number % 7 == 3;
                const bool decayed = width == 4 && number % 2 != 0;
                Bytes base = make_lanes(n, width, seed, noise);
                if (decayed) base = make_decayed(base, seed);
                const Bytes chunk = changed(base, width, to_blocks, seed);
                Bytes workspace(std::max(rans::encoder_workspace(n, width), floats::encoder_workspace(n, width)));
                Bytes payload(2 * chunk.size() + 4096);
                const std::size_t nbytes = rans::encode(residual_loops, chunk.data(), base.data(), n, width,
                                                        workspace.data(), payload.data(), payload.size());
                save(directory + "/residual_decoder", number,
                     log_width | (noise ? 4 : 0) | (number % 3 << 3) | (decayed ? 32 : 0), n, seed,
                     Bytes(payload.begin(), payload.begin() + static_cast<std::ptrdiff_t>(nbytes)));
                const bool guided = number % 2 != 0;
                const std::size_t float_nbytes =
                    floats::encode(float_loops, chunk.data(), guided ? base.data() : nullptr, n, width,
                                   workspace.data(), payload.data(), payload.size());
                save(directory + "/float_decoder", number, log_width | (guided ? 4 : 0) | (guided && noise ? 8 : 0), n,
                     seed, Bytes(payload.begin(), payload.begin() + static_cast<std::ptrdiff_t>(float_nbytes)));
            }
        }
    }
    std::printf("%d payloads for each decoder\n", number);
}
