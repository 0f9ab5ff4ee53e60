// What the encoders of the residual coder and of the float coder share: what things cost, and how tables are chosen
// from counts. Only objects for the baseline CPU include this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "rans.hpp"

namespace lamella::rans {

// The unit of costs: 2^-16 bits.
using Cost = std::int64_t;
inline constexpr Cost one_bit = 1 << 16;

// v log2 v, for v below 2^40.
Cost entropy_term(std::uint64_t v);

static inline std::uint64_t lane_at(const std::uint8_t* lanes, std::size_t i, std::size_t width) {
    std::uint64_t value = 0;
    std::memcpy(&value, lanes + i * width, width);
    return value;
}

// Contexts of lanes are windows that end with the highest exponent that is not rare, and begin 31 below it: what is
// subtracted from bits below the sign >> shift. `scratch` has as many counters as those bits have values.
std::uint32_t lowest_context(const std::uint8_t* lanes, std::size_t n, std::size_t width, unsigned shift,
                             std::uint32_t* scratch);

// Contexts of all classes.
inline constexpr std::size_t all_contexts = std::size_t{classes} * contexts;

// Makes classes and contexts share tables. `counts` has `stride` counters of symbols for each of `contexts_of_class`
// contexts of each class; what shares a table is added up in one of them, to which `merged` points. Returns how many
// tables there are.
unsigned merge_tables(std::uint32_t* counts, unsigned contexts_of_class, std::size_t stride, unsigned symbols,
                      TableMap& table_of, std::uint32_t* (&merged)[max_tables]);

// The tables of classes, and how they code: classes steps each.
void choose_class_tables(const std::uint8_t* block_classes, std::size_t blocks, Table* tables, Step* steps);

// Words that end there, of which there are none yet, with all states as a reader has to leave them.
Sink empty_sink(std::uint8_t* words_end);

// Codes the classes of all blocks, which a reader takes first.
void write_classes(const Step* class_steps, const std::uint8_t* block_classes, std::size_t blocks, unsigned streams,
                   Sink& to);

unsigned streams_for(std::size_t coded_lanes);

// Writes what follows a header: raw bytes, states and words, which end at words_end. Returns the bytes of the payload,
// or 0 if it has more than `room`.
std::size_t finish_payload(const BitWriter& header, const std::uint8_t* raw, std::size_t raw_nbytes, const Sink& from,
                           const std::uint8_t* words_end, unsigned streams, std::uint8_t* out, std::size_t room);

// Vectors write up to this many bytes more than there are.
inline constexpr std::size_t slack = 64;

// Cuts a workspace into arrays.
class Arena {
  public:
    static constexpr std::uintptr_t alignment = 64;  // a line of the cache
    explicit Arena(std::uint8_t* at) : at_(at) {}
    template <class T>
    T* take(std::size_t count) {
        at_ += (alignment - reinterpret_cast<std::uintptr_t>(at_) % alignment) % alignment;
        T* found = reinterpret_cast<T*>(at_);
        at_ += count * sizeof(T);
        return found;
    }
    std::uint8_t* at() const { return at_; }

  private:
    std::uint8_t* at_;
};

// Bytes of memory from which `lay_out` can cut what it needs, wherever they lie: it takes where they begin, and returns
// where what it has cut ends.
template <class LayOut>
static std::size_t nbytes_of(LayOut lay_out) {
    auto* const start = reinterpret_cast<std::uint8_t*>(Arena::alignment);
    return static_cast<std::size_t>(lay_out(start) - start) + Arena::alignment;
}

}  // namespace lamella::rans
