// The payload of the float coder, as FORMAT.md defines it: its header, and how a payload is read.
#include <bit>

#include "floats.hpp"

namespace lamella::floats {
namespace {

using std::size_t;
using std::uint32_t;
using std::uint8_t;

constexpr unsigned cut_bits = 6, first_bits = most_top_bits, values_bits = 8, trailing_bits = 6, streams_bits = 3;
constexpr unsigned shift_bits = 6, low_bits = 12;
constexpr auto raw_nbytes_bits = static_cast<unsigned>(std::bit_width(most_raw_nbytes));

const char* read_header(rans::BitReader& from, bool guided, Model& model, Slot* class_slots, Slot* slots,
                        size_t& raw_nbytes) {
    const auto take = [&from](unsigned bits) { return static_cast<unsigned>(from.take(bits)); };
    model.cut = take(cut_bits);
    if (model.cut + 1 >= 8 * model.width || top_bits(model) > most_top_bits)
        return "tops of more than 16 bits, or none";
    model.first = take(first_bits);
    model.values = take(values_bits);
    if (model.values == 0 || model.values > most_values || model.first == 0 ||
        (model.first + model.values - 1) >> top_bits(model) != 0)
        return "window of tops that there are not";
    model.trailing = take(trailing_bits);
    if (model.trailing > model.cut) return "trailing zeros that reach into tops";
    model.has_signs = take(1) != 0;
    const unsigned log_streams = take(streams_bits);
    model.streams = 1u << log_streams;
    if (model.streams > rans::max_streams) return "more than 32 streams";
    if (guided) {
        model.shift = take(shift_bits);
        model.low = take(low_bits);
        if (model.shift >= 8 * model.width) return "context outside of its lane";
    }
    unsigned used;
    if (const char* fault = rans::read_class_tables(from, class_slots, used)) return fault;
    if (const char* fault = rans::read_tables(from, symbol_count(model), used, guided ? rans::contexts : 1,
                                              model.tables, model.table_of, slots))
        return fault;
    raw_nbytes = static_cast<size_t>(from.take(raw_nbytes_bits));
    return rans::end_header(from);
}

}  // namespace

size_t decoder_workspace(size_t n) noexcept { return rans::decoder_workspace(n); }

const char* decode(const Loops& loops, const uint8_t* payload, size_t nbytes, const uint8_t* guide, size_t n,
                   size_t width, uint8_t* workspace, uint8_t* out) noexcept {
    const rans::Room room = rans::decoder_room(workspace);
    Model model{};
    model.width = static_cast<unsigned>(width);
    Source source;
    rans::Source& from = source.from;
    rans::BitReader header(payload, nbytes);
    size_t stored;  // raw bytes and escapes
    if (const char* fault = read_header(header, guide != nullptr, model, room.class_slots, room.slots, stored))
        return fault;
    if (stored > nbytes - header.nbytes()) return "raw bits that are longer than the payload";
    source.raw = payload + header.nbytes();
    source.escapes_end = source.raw + stored;
    if (const char* fault = rans::read_states(source.escapes_end, payload + nbytes, model.streams, from)) return fault;
    const char* short_stream = "payload that ends before its lanes";
    const size_t blocks = block_count(n);
    if (!rans::read_classes(room.class_slots, model.streams, from, blocks, room.block_classes)) return short_stream;

    size_t needed = 0;
    for (size_t k = 0; k < blocks; ++k) {
        if (room.block_classes[k] == zero_class) continue;
        needed += raw_nbytes(lanes_of_block(n, k * block_lanes), raw_bits(model));
    }
    if (needed > stored || (stored - needed) % 2 != 0) return "raw bytes that are not those of lanes";
    source.escapes = source.raw + needed;
    if (!loops.read(model, room.slots, room.block_classes, source, guide, 0, n, out)) return short_stream;
    return rans::ends(from, model.streams) && source.escapes == source.escapes_end
               ? nullptr
               : "payload that does not end with its lanes";
}

void write_header(rans::BitWriter& to, const Model& model, bool guided, const rans::Table* class_tables,
                  const rans::Table* tables, size_t raw_nbytes) {
    to.put(model.cut, cut_bits);
    to.put(model.first, first_bits);
    to.put(model.values, values_bits);
    to.put(model.trailing, trailing_bits);
    to.put(model.has_signs, 1);
    to.put(rans::log_of(model.streams), streams_bits);
    if (guided) {
        to.put(model.shift, shift_bits);
        to.put(model.low, low_bits);
    }
    const unsigned used = rans::write_class_tables(to, class_tables);
    rans::write_tables(to, symbol_count(model), used, guided ? rans::contexts : 1, model.tables, model.table_of,
                       tables);
    to.put(raw_nbytes, raw_nbytes_bits);
}

}  // namespace lamella::floats
