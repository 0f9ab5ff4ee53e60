// The residual coder: a chunk as entropy-coded residuals against its base. FORMAT.md, "RESIDUAL_RANS", defines the
// payload; this header holds what the parts of the coder share:
//
//   rans_format.cc   the payload's header, the tables, and reading a whole payload
//   rans_plan.cc     what the encoder chooses, and writing a whole payload
//   rans_encoding.hpp, rans_encoding.cc
//                    what encoders of both coders do: choosing tables, and coding classes
//   rans_patches.cc  blocks of which few lanes differ from their base
//   rans_scalar.cc   the loops over the lanes of the others, written to be read
//   states_avx2.hpp, rans_avx2.hpp, rans_avx2_read.cc, rans_avx2_write.cc
//                    the same loops, bit for bit, with vectors
//
// Nothing allocates: what does not fit on a stack lies in a workspace that the caller passes. Functions of this header
// are static, so that no object file takes another's copy of them (see CMakeLists.txt).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"
#include "lanes.hpp"

namespace lamella::rans {

inline constexpr std::size_t block_lanes = 128;
static constexpr std::size_t block_count(std::size_t n) { return (n + block_lanes - 1) / block_lanes; }

// Of n lanes, how many are in the block that begins with lane `at`.
static constexpr std::size_t lanes_of_block(std::size_t n, std::size_t at) {
    return n - at < block_lanes ? n - at : block_lanes;
}

// What a block is. An equal one is its base, and a patched one is that but for a few lanes. The others are dense: each
// of their lanes is coded, in drifting ones against an offset that depends on the base's mantissa; the classes between
// tell quiet blocks from lively ones.
inline constexpr unsigned classes = 8;
inline constexpr unsigned equal_class = 0;
inline constexpr unsigned patched_class = 1;
inline constexpr unsigned first_activity = 2, last_activity = 6;
inline constexpr unsigned drift_class = 7;
static constexpr bool is_dense(unsigned block_class) { return block_class > patched_class; }

// What the encoder takes a dense block for before it has compared it with the others, unless it drifts.
inline constexpr unsigned ordinary_kind = first_activity;

// Of the lanes of a dense block so many have their symbols coded before the raw bits of any.
inline constexpr std::size_t run_lanes = 32;

inline constexpr unsigned contexts = 32;
inline constexpr unsigned max_tables = 16;
inline constexpr unsigned max_streams = 32;

// States stay in [low_state, 2^31); a probability is a frequency of 2^11, and each table's frequencies add up to that.
inline constexpr unsigned probability_bits = 11;
inline constexpr std::uint32_t scale = 1u << probability_bits;
inline constexpr std::uint32_t low_state = 1u << 15;

// Residuals below this are symbols themselves. Above it, a symbol says how long a residual is and what its second
// highest bit is; the bits below that one are raw: taken from a state as they are, so many at a time at most.
inline constexpr unsigned direct = 32;
inline constexpr unsigned most_raw_bits = 15;

static constexpr unsigned symbol_count(std::size_t width) {
    return direct + 2 * (8 * static_cast<unsigned>(width) - 5);
}
static constexpr unsigned symbol_of(std::uint64_t residual) {
    if (residual < direct) return static_cast<unsigned>(residual);
    // Not std::bit_width, a template that objects of other flags would share.
    const auto highest = 63 - static_cast<unsigned>(__builtin_clzll(residual));
    return direct + 2 * (highest - 5) + static_cast<unsigned>(residual >> (highest - 1) & 1);
}
static constexpr unsigned raw_bits(unsigned symbol) { return symbol < direct ? 0 : 4 + (symbol - direct) / 2; }

// Tables of all widths are laid out for as many symbols as a byte holds, or fewer where that is enough.
static constexpr unsigned symbol_stride(std::size_t width) { return width <= 2 ? 64 : width == 4 ? 128 : 256; }

// Which table codes a lane, by the class of its block and its own context.
using TableMap = std::uint8_t[classes][contexts];

// All that a payload's header says about how residuals are modelled.
struct Model {
    unsigned width;    // bytes of a lane
    unsigned streams;  // interleaved states: 1, 2, 4, 8, 16 or 32
    unsigned shift;    // context of a lane = its base's bits below the sign, >> shift, - low, within 0 .. 31
    std::uint32_t low;
    bool drift;  // whether `offsets` are used
    std::int32_t offsets[contexts];
    unsigned tables;
    TableMap table_of;
};

// Where a drifting lane's context and offset are: the five bits above this one, the highest of a float32's mantissa.
inline constexpr unsigned drift_shift = 18;

// One of the 2^11 slots of a table to decode with: symbol << 24 | slot - first slot of the symbol << 12 | frequency.
using Slot = std::uint32_t;

// The context of a lane by the bits below the sign of its base; for the float coder's model, of its guide.
template <class Model>
static unsigned exponent_context(const Model& model, std::uint64_t magnitude) {
    const std::uint64_t exponent = magnitude >> model.shift;
    if (exponent <= model.low) return 0;
    return exponent - model.low < contexts ? static_cast<unsigned>(exponent - model.low) : contexts - 1;
}

// What is being read. All of it was checked to lie in the payload.
struct Source {
    const std::uint8_t* words;  // 16 bits each
    const std::uint8_t* words_end;
    std::uint32_t states[max_streams];
    std::size_t patching;  // how many symbols of patched blocks have been read, of which each takes the next state
};

// What decoding takes from a state. False if the words end before it is whole again.
static inline bool refill(Source& from, std::uint32_t& state) {
    if (state >= low_state) return true;
    if (from.words == from.words_end) return false;
    state = state << 16 | load<std::uint16_t>(from.words);
    from.words += 2;
    return true;
}

static inline bool take_symbol(Source& from, std::uint32_t& state, const Slot* slots, unsigned& symbol) {
    const Slot slot = slots[state & (scale - 1)];
    symbol = slot >> 24;
    state = (slot & 0xfff) * (state >> probability_bits) + (slot >> 12 & 0xfff);
    return refill(from, state);
}

// At most most_raw_bits.
static inline bool take_bits(Source& from, std::uint32_t& state, unsigned bits, unsigned& value) {
    value = state & ((1u << bits) - 1);
    state >>= bits;
    return refill(from, state);
}

// How a table codes one symbol: x becomes x + bias + x / frequency * (2^11 - frequency), where the quotient is
// x * reciprocal >> 32 >> shift.
struct Step {
    std::uint32_t reciprocal;
    std::uint32_t packed;  // shift << 25 | bias << 12 | frequency
};

// What the lanes of a chunk are to the encoder. A patched block has its patches in place of its lanes, and behind them
// the symbol that ends them; where a patch lies within its block stands in place of its context.
struct Symbols {
    std::uint8_t* symbols;    // of every lane, and
    std::uint8_t* contexts;   // their contexts, padded to whole blocks; undefined in equal blocks
    std::uint8_t* residuals;  // lanes of the chunk's width
    std::uint8_t* kinds;      // of every block: equal_class, patched_class, drift_class or ordinary_kind
    bool patches;             // whether a block may be patched
};

static inline Symbols from_lane(const Symbols& of, std::size_t at, std::size_t width) {
    return {of.symbols + at, of.contexts + at, of.residuals + at * width, of.kinds + at / block_lanes, of.patches};
}

// What is being written: words from their end downwards, because rANS decodes in the opposite order.
struct Sink {
    std::uint8_t* words;
    std::uint32_t states[max_streams];
    std::size_t patching;  // how many symbols of patched blocks are left to write
};

// Blocks with no more changed lanes than this are patched. A patch costs 7 bits to say where it is, and reading one
// about as long as reading ten lanes of a dense block.
inline constexpr unsigned most_patches = 8;
inline constexpr std::uint8_t end_of_patches = 0;
inline constexpr unsigned position_bits = 7;
static_assert(block_lanes == 1u << position_bits);

// The loops over lanes; both variants have the same.
struct Loops {
    // Residuals, symbols and contexts of n lanes. `model` says shift, low and drift; a block drifts if
    // three quarters of its symbols are direct then, and the sum of all is smaller. It is patched if `to` allows it,
    // and at most most_patches of its lanes, and no more than one in block_lanes / most_patches, differ from the base.
    void (*symbolize)(const Model& model, const std::uint8_t* src, const std::uint8_t* base, std::size_t n,
                      const Symbols& to) noexcept;

    // How much livelier than expected each ordinary block is: the sum over its lanes of twice the symbol, less what is
    // expected of the context. Blocks of other kinds are left out.
    void (*measure)(const Symbols& of, const std::uint8_t* expected, std::size_t n, std::int32_t* activities) noexcept;

    // Count the symbols of all dense blocks. A symbol of a class and context has two counters, classes * contexts *
    // symbol_stride(width) apart: which of them counts a lane is the variant's affair.
    void (*count)(const Symbols& of, const std::uint8_t* block_classes, std::size_t n, std::size_t width,
                  std::uint32_t* counters) noexcept;

    // Code all blocks that are not equal to their base, from the last lane to the first. `steps` holds
    // symbol_stride(width) of them a table.
    void (*write)(const Model& model, const Step* steps, const std::uint8_t* block_classes, const Symbols& from,
                  std::size_t n, Sink& to) noexcept;

    // Lanes of n from block `first` on. False if the source ends before the lanes do, or patches what is no lane. A
    // chunk may be read in runs of whole blocks, one after the other.
    bool (*read)(const Model& model, const Slot* slots, const std::uint8_t* block_classes, Source& from,
                 const std::uint8_t* base, std::size_t first, std::size_t n, std::uint8_t* out) noexcept;
};

extern const Loops scalar_loops;
#ifdef LAMELLA_HAVE_AVX2
extern const Loops avx2_loops;
#endif

// Frequencies of symbols; those past the last symbol are 0.
using Frequencies = std::uint16_t[256];

// A table to code with. All frequencies are written but that of `peak`, which is what the others leave of 2^11.
struct Table {
    bool present;
    unsigned peak;
    Frequencies frequencies;
};

// Writes bits, the least significant of a byte first, and counts those that there is no room for.
class BitWriter {
  public:
    BitWriter(std::uint8_t* to, std::size_t room);
    void put(std::uint64_t value, unsigned bits);
    void put_near(int difference);        // 1 bit for 0, |difference| + 2 for others
    void put_signed(std::int64_t value);  // about 2 log2 |value| bits
    std::size_t nbytes() const;
    bool fits() const;

  private:
    std::uint8_t* to_;
    std::size_t room_;
    std::size_t bit_ = 0;
};

// Reads what a BitWriter wrote; what it takes from past the end is 0, and it has failed.
class BitReader {
  public:
    BitReader(const std::uint8_t* from, std::size_t nbytes);
    std::uint64_t take(unsigned bits);
    int take_near();             // of differences within +-31; beyond them this fails
    std::int64_t take_signed();  // of numbers of 33 bits
    bool is_padded() const;      // whether nothing but zeros is left of the last byte
    bool failed() const;
    std::size_t nbytes() const;

  private:
    unsigned next();
    int fail();

    const std::uint8_t* from_;
    std::uint64_t end_;
    std::uint64_t bit_ = 0;
    bool failed_ = false;
};

// The parts of which payloads consist, for the float coder too (floats.hpp). What returns a text returns nullptr, or
// what is wrong.

// The tables of classes, and, as bits, which classes other than 0 they give a frequency.
const char* read_class_tables(BitReader& from, Slot* slots, unsigned& used);
unsigned write_class_tables(BitWriter& to, const Table* class_tables);

// The tables of lanes, and the map from `contexts_of_class` contexts of each used class to them.
const char* read_tables(BitReader& from, unsigned symbols, unsigned used, unsigned contexts_of_class, unsigned& tables,
                        TableMap& table_of, Slot* slots);
void write_tables(BitWriter& to, unsigned symbols, unsigned used, unsigned contexts_of_class, unsigned tables,
                  const TableMap& table_of, const Table* all_tables);

// Whether all of a header was there.
const char* end_header(const BitReader& from);

// The states and words of `to`, which end a payload.
const char* read_states(const std::uint8_t* at, const std::uint8_t* end, unsigned streams, Source& to);

unsigned log_of(unsigned streams);

// What a decoder's workspace is cut into.
struct Room {
    Slot* class_slots;
    Slot* slots;
    std::uint8_t* block_classes;
};
Room decoder_room(std::uint8_t* workspace);

// The classes of all blocks. False if the words end before they do.
bool read_classes(const Slot* class_slots, unsigned streams, Source& from, std::size_t blocks, std::uint8_t* to);

// Whether no word is left over, and every state is the one that the encoder began with.
bool ends(const Source& from, unsigned streams);

// A table for counts, such that it can be written and every symbol that occurs has a frequency.
void normalize(const std::uint32_t* counts, unsigned symbols, Table& to) noexcept;
void make_steps(const Table& table, unsigned symbols, Step* steps) noexcept;

// All of a payload that stands before its states.
void write_header(BitWriter& to, const Model& model, const Table* class_tables, const Table* tables);

// Code one symbol, or a value of at most most_raw_bits bits: the words and one state of a sink change.
void code(const Step& step, std::uint32_t& state, std::uint8_t*& words) noexcept;
void code_bits(unsigned value, unsigned bits, std::uint32_t& state, std::uint8_t*& words) noexcept;

// Whether a block of `count` lanes is patched; then its patches are listed.
bool find_patches(const std::uint8_t* src, const std::uint8_t* base, std::size_t count, std::size_t width,
                  const Symbols& block) noexcept;

// Count the symbols of all patched blocks of n lanes as Loops::count does; returns how many there are. Their contexts
// are how many patches come before in the block.
std::size_t count_patches(const Symbols& of, std::size_t n, std::size_t width, std::uint32_t* counters) noexcept;

// One patched block. Reading is false if the source ends before the patches do, or they are none of `count` lanes.
void write_patches(const Model& model, const Step* steps, const Symbols& block, Sink& to) noexcept;
bool read_patches(const Model& model, const Slot* slots, Source& from, const std::uint8_t* base, std::size_t count,
                  std::uint8_t* out) noexcept;

// Bytes of memory that reading or writing n lanes takes, whatever they hold.
std::size_t decoder_workspace(std::size_t n) noexcept;
std::size_t encoder_workspace(std::size_t n, std::size_t width) noexcept;

// Decode a payload into n lanes of out. nullptr if it was one, else what is wrong with it: then out is undefined.
const char* decode(const Loops& loops, const std::uint8_t* payload, std::size_t nbytes, const std::uint8_t* base,
                   std::size_t n, std::size_t width, std::uint8_t* workspace, std::uint8_t* out) noexcept;

// Add to `sums` the moments of `other`'s elements against those of the n lanes that a payload stands for, as if they
// had been decoded first. No more than a slice of them ever is, and blocks equal to the base are not even copied. n
// lanes are whole elements of `kind`, whose lanes may be of another width. nullptr, or what is wrong with the payload:
// then the sums are undefined.
const char* add_moments(const Kernels& kernels, const std::uint8_t* payload, std::size_t nbytes,
                        const std::uint8_t* base, const std::uint8_t* other, std::size_t n, std::size_t width,
                        Kind kind, const double* table, std::uint8_t* workspace, PartialSums& sums) noexcept;

// Encode n lanes, at least one; return the bytes of the payload, or 0 if it has more than `room`.
std::size_t encode(const Loops& loops, const std::uint8_t* src, const std::uint8_t* base, std::size_t n,
                   std::size_t width, std::uint8_t* workspace, std::uint8_t* out, std::size_t room) noexcept;

}  // namespace lamella::rans
