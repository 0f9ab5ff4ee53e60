// The float coder: a chunk by itself, or guided by another chunk, with the top bits of its lanes entropy-coded and all
// other bits as they are. FORMAT.md, "FLOAT_RANS", defines the payload; this header holds what the parts of the coder
// share, which are divided as those of the residual coder are (rans.hpp), whose tables and states it uses:
//
//   float_format.cc   the payload's header, and reading a whole payload
//   float_plan.cc     what the encoder chooses, and writing a whole payload
//   float_scalar.cc   the loops over lanes, written to be read
//   float_avx2.hpp, float_avx2_read.cc, float_avx2_write.cc, and states_avx2.hpp of the residual coder
//                     the same loops, bit for bit, with vectors
#pragma once

#include <cstddef>
#include <cstdint>

#include "rans.hpp"

namespace lamella::floats {

using rans::block_count;
using rans::block_lanes;
using rans::lanes_of_block;
using rans::Slot;
using rans::Step;
using rans::TableMap;

// Blocks of this class are all zero bytes; lanes of the other classes are coded.
inline constexpr unsigned zero_class = rans::equal_class;

// The symbols of tops: 0 for the top 0, 1 .. values for those of a window, values + 1 for all others, the escapes. A
// symbol fits a byte.
inline constexpr unsigned most_values = 254;
inline constexpr unsigned symbol_stride = 256;
inline constexpr unsigned most_top_bits = 16;

// All that a payload's header says about how lanes are modelled.
struct Model {
    unsigned width;    // bytes of a lane
    unsigned streams;  // interleaved states: 1, 2, 4, 8, 16 or 32
    unsigned cut;      // top of a lane = its bits below the sign, >> cut
    unsigned first;    // the window: tops first .. first + values - 1
    unsigned values;
    unsigned trailing;  // bits that are 0 in all lanes, the lowest, at most `cut`
    bool has_signs;     // whether any lane has its sign bit set
    unsigned shift;     // context of a lane = its guide's bits below the sign, >> shift, - low, within 0 .. 31
    std::uint32_t low;
    unsigned tables;
    TableMap table_of;
};

// Raw bytes and escapes of a chunk are no more than this.
inline constexpr std::size_t most_raw_nbytes = (1 << 22) - 1;

static constexpr unsigned top_bits(const Model& model) { return 8 * model.width - 1 - model.cut; }
static constexpr unsigned escape_of(const Model& model) { return model.values + 1; }
static constexpr unsigned symbol_count(const Model& model) { return model.values + 2; }

// What is left of a lane, least significant first: its bits from `trailing` to below `cut`, then its sign.
static constexpr unsigned raw_bits(const Model& model) {
    return model.cut - model.trailing + (model.has_signs ? 1 : 0);
}

// Raw bits are cut into pieces of these lengths, each at most once, the longest taking the lowest bits; a block's
// pieces of one length stand together. Pieces of bytes stand lane by lane. Of shorter ones, a byte holds those of lanes
// as far apart as the piece has bytes, so that a vector takes all its lanes' pieces with one shift and one mask.
inline constexpr unsigned longest_piece = 32;
static constexpr std::size_t piece_nbytes(std::size_t lanes, unsigned bits) { return (lanes * bits + 7) / 8; }
static constexpr std::size_t raw_nbytes(std::size_t lanes, unsigned bits) {
    std::size_t nbytes = 0;
    for (unsigned piece = longest_piece; piece > 0; piece /= 2) {
        if ((bits & piece) != 0) nbytes += piece_nbytes(lanes, piece);
    }
    return nbytes;
}

// What is being read. All of it was checked to lie in the payload, and raw bits are as many as the lanes take.
struct Source {
    rans::Source from;
    const std::uint8_t* raw;      // of the next block
    const std::uint8_t* escapes;  // tops of 16 bits each
    const std::uint8_t* escapes_end;
};

// What the lanes of a chunk are to the encoder.
struct Lanes {
    std::uint8_t* symbols;   // of every lane, and
    std::uint8_t* contexts;  // their contexts if there is a guide, padded to whole blocks; undefined in zero blocks
    std::uint32_t* levels;   // of every block: 0 if it is a zero block, else the sum of the weights of its lanes
};

// How large lanes are, by their symbol: the last of these for the highest of the window and for escapes, the one before
// for the symbol below, and so on; the first for all that are smaller.
inline constexpr unsigned weights = 32;
static constexpr unsigned weight_of(const Model& model, unsigned symbol) {
    const unsigned below = model.values < weights ? 0 : model.values - (weights - 1);
    const unsigned at = symbol < below ? 0 : symbol - below;
    return at < weights ? at : weights - 1;
}

// What is being written; escapes are, like words, from their end downwards.
struct Sink {
    rans::Sink to;
    std::uint8_t* escapes;
};

// Steps that code an escape are marked with this bit of Step::packed, which is not part of the step.
inline constexpr std::uint32_t escape_mark = 1u << 31;

// The loops over lanes; both variants have the same. `guide` is null where there is none.
struct Loops {
    // Symbols, contexts and levels of n lanes. Writes the raw bits of all blocks that are not zero; returns their end.
    std::uint8_t* (*split)(const Model& model, const std::uint8_t* weight_table, const std::uint8_t* src,
                           const std::uint8_t* guide, std::size_t n, const Lanes& to, std::uint8_t* raw) noexcept;

    // Code the tops of all blocks that are not zero, from the last lane to the first. `steps` holds symbol_stride of
    // them a table.
    void (*write)(const Model& model, const Step* steps, const std::uint8_t* block_classes, const Lanes& from,
                  const std::uint8_t* src, bool guided, std::size_t n, Sink& to) noexcept;

    // Lanes of n from block `first` on. False if the source ends before the lanes do, or escapes what no lane has.
    bool (*read)(const Model& model, const Slot* slots, const std::uint8_t* block_classes, Source& source,
                 const std::uint8_t* guide, std::size_t first, std::size_t n, std::uint8_t* out) noexcept;
};

extern const Loops scalar_loops;
#ifdef LAMELLA_HAVE_AVX2
extern const Loops avx2_loops;
#endif

// Bytes of memory that reading or writing n lanes takes, whatever they hold.
std::size_t decoder_workspace(std::size_t n) noexcept;
std::size_t encoder_workspace(std::size_t n, std::size_t width) noexcept;

// All of a payload that stands before its raw bits.
void write_header(rans::BitWriter& to, const Model& model, bool guided, const rans::Table* class_tables,
                  const rans::Table* tables, std::size_t raw_nbytes);

// Decode a payload into n lanes of out. `guide` is null for one that was written without. nullptr if it was one, else
// what is wrong with it: then out is undefined.
const char* decode(const Loops& loops, const std::uint8_t* payload, std::size_t nbytes, const std::uint8_t* guide,
                   std::size_t n, std::size_t width, std::uint8_t* workspace, std::uint8_t* out) noexcept;

// Encode n lanes, at least one; return the bytes of the payload, or 0 if it has more than `room`.
std::size_t encode(const Loops& loops, const std::uint8_t* src, const std::uint8_t* guide, std::size_t n,
                   std::size_t width, std::uint8_t* workspace, std::uint8_t* out, std::size_t room) noexcept;

}  // namespace lamella::floats
