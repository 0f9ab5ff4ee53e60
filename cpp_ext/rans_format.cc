// The payload of the residual coder, as FORMAT.md defines it: its header, its tables, and how a payload is read.
#include <bit>
#include <cstring>

#include "rans.hpp"

namespace lamella::rans {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr unsigned shift_bits = 6, low_bits = 12, streams_bits = 3, tables_bits = 5;

// A frequency is written as its length in bits and the highest of them: its error of at most 1/16 costs less than the
// bits left out would.
constexpr unsigned kept_bits = 4;
constexpr unsigned longest_frequency = probability_bits;

// What a frequency's length is expected to be where no other frequency tells.
constexpr unsigned expected_length = 6;

// Lengths of frequencies are written against that of the symbol two before, which for residuals is the next one of the
// same sign.
class Expectation {
  public:
    unsigned next() const { return two_before_; }
    void saw(unsigned length) {
        two_before_ = before_;
        before_ = length;
    }

  private:
    unsigned two_before_ = expected_length, before_ = expected_length;
};

// A class that no block had as its predecessor has no table; whatever follows it is equal to its base.
constexpr Slot always_equal = scale;

const char* read_table(BitReader& from, unsigned symbols, Frequencies& to) {
    std::memset(to, 0, sizeof to);
    const auto field = static_cast<unsigned>(std::bit_width(symbols - 1));
    const auto last = static_cast<unsigned>(from.take(field)), peak = static_cast<unsigned>(from.take(field));
    if (last >= symbols || peak > last) return "table with symbols that there are not";
    uint32_t sum = 0;
    Expectation expected;
    for (unsigned s = 0; s <= last; ++s) {
        if (s == peak) {
            expected.saw(longest_frequency);
            continue;
        }
        const int length = static_cast<int>(expected.next()) + from.take_near();
        if (from.failed() || length < 0 || length > static_cast<int>(longest_frequency))
            return "frequency out of range";
        expected.saw(static_cast<unsigned>(length));
        if (length == 0) continue;
        const unsigned below = static_cast<unsigned>(length) - 1;
        const unsigned kept = below < kept_bits - 1 ? below : kept_bits - 1;
        to[s] = static_cast<uint16_t>((1u << kept | from.take(kept)) << (below - kept));
        sum += to[s];
    }
    if (sum >= scale) return "table whose frequencies are more than all";
    to[peak] = static_cast<uint16_t>(scale - sum);
    return nullptr;
}

void make_slots(const Frequencies& frequencies, unsigned symbols, Slot* slots) {
    for (unsigned s = 0; s < symbols; ++s) {
        for (uint32_t i = 0; i < frequencies[s]; ++i) *slots++ = s << 24 | i << 12 | frequencies[s];
    }
}

const char* read_header(BitReader& from, Model& model, Slot* class_slots, Slot* slots) {
    model.shift = static_cast<unsigned>(from.take(shift_bits));
    model.low = static_cast<uint32_t>(from.take(low_bits));
    if (model.shift >= 8 * model.width) return "context outside of its lane";
    const auto log_streams = static_cast<unsigned>(from.take(streams_bits));
    model.streams = 1u << log_streams;
    if (model.streams > max_streams) return "more than 32 streams";
    model.drift = from.take(1) != 0;
    if (model.drift && model.width != 4) return "drift in lanes that are not four bytes";
    std::int64_t offset = 0;
    for (unsigned i = 0; i < contexts; ++i) {
        if (model.drift) offset += from.take_signed();
        if (offset != static_cast<std::int32_t>(offset)) return "drift out of range";
        model.offsets[i] = static_cast<std::int32_t>(offset);
    }
    unsigned used;
    if (const char* fault = read_class_tables(from, class_slots, used)) return fault;
    if (!model.drift && (used >> drift_class & 1) != 0) return "drifting block without a drift";
    if (const char* fault =
            read_tables(from, symbol_count(model.width), used, contexts, model.tables, model.table_of, slots))
        return fault;
    return end_header(from);
}

constexpr const char* short_stream = "payload that ends before its lanes, or patches what is none";

// A payload of which all that stands before its lanes has been read.
struct Reading {
    Model model;
    Source from;
    const Slot* slots;
    const uint8_t* block_classes;
};

// nullptr, or what is wrong.
const char* begin(const uint8_t* payload, size_t nbytes, size_t n, size_t width, uint8_t* workspace, Reading& to) {
    const auto [class_slots, slots, block_classes] = decoder_room(workspace);
    to.slots = slots;
    to.block_classes = block_classes;

    Model& model = to.model;
    Source& from = to.from;
    model.width = static_cast<unsigned>(width);
    BitReader header(payload, nbytes);
    if (const char* fault = read_header(header, model, class_slots, slots)) return fault;
    if (const char* fault = read_states(payload + header.nbytes(), payload + nbytes, model.streams, from)) return fault;
    return read_classes(class_slots, model.streams, from, block_count(n), block_classes) ? nullptr : short_stream;
}

// nullptr if all lanes have been read and nothing is left, else what is wrong.
const char* end(const Reading& reading) {
    return ends(reading.from, reading.model.streams) ? nullptr : "payload that does not end with its lanes";
}

// What is decoded at a time to be measured: base, other and slice together stay in the smallest cache beside the tables
// in use.
constexpr size_t slice_nbytes = 4096;

void write_table(BitWriter& to, const Table& table, unsigned symbols) {
    const auto& [present, peak, frequencies] = table;
    const auto field = static_cast<unsigned>(std::bit_width(symbols - 1));
    unsigned last = symbols - 1;
    while (frequencies[last] == 0) --last;
    to.put(last, field);
    to.put(peak, field);
    Expectation expected;
    for (unsigned s = 0; s <= last; ++s) {
        if (s == peak) {
            expected.saw(longest_frequency);
            continue;
        }
        const auto length = static_cast<unsigned>(std::bit_width(frequencies[s]));
        to.put_near(static_cast<int>(length) - static_cast<int>(expected.next()));
        expected.saw(length);
        if (length == 0) continue;
        const unsigned kept = length < kept_bits ? length - 1 : kept_bits - 1;
        to.put(frequencies[s] >> (length - 1 - kept), kept);
    }
}

}  // namespace

BitReader::BitReader(const uint8_t* from, size_t nbytes) : from_(from), end_(8 * uint64_t{nbytes}) {}

bool BitReader::failed() const { return failed_; }

size_t BitReader::nbytes() const { return static_cast<size_t>((bit_ + 7) / 8); }

uint64_t BitReader::take(unsigned bits) {
    uint64_t value = 0;
    for (unsigned i = 0; i < bits; ++i) value |= static_cast<uint64_t>(next()) << i;
    return value;
}

int BitReader::take_near() {
    int magnitude = 0;
    while (next() == 0) {
        if (++magnitude == 32 || failed_) return fail();
    }
    return magnitude != 0 && next() != 0 ? -magnitude : magnitude;
}

std::int64_t BitReader::take_signed() {
    unsigned length = 0;
    while (next() == 0) {
        if (++length == 35 || failed_) return fail();
    }
    const uint64_t z = (uint64_t{1} << length | take(length)) - 1;
    return static_cast<std::int64_t>((z >> 1) ^ (0 - (z & 1)));
}

bool BitReader::is_padded() const { return bit_ % 8 == 0 || from_[bit_ / 8] >> (bit_ % 8) == 0; }

unsigned BitReader::next() {
    if (bit_ == end_) {
        failed_ = true;
        return 0;
    }
    const unsigned bit = from_[bit_ / 8] >> (bit_ % 8) & 1;
    ++bit_;
    return bit;
}

int BitReader::fail() {
    failed_ = true;
    return 0;
}

const char* read_class_tables(BitReader& from, Slot* slots, unsigned& used) {
    used = 0;
    for (unsigned c = 0; c < classes; ++c, slots += scale) {
        if (from.take(1) == 0) {
            for (uint32_t i = 0; i < scale; ++i) slots[i] = always_equal | i << 12;
            continue;
        }
        Frequencies frequencies;
        if (const char* fault = read_table(from, classes, frequencies)) return fault;
        for (unsigned s = 0; s < classes; ++s) used |= (frequencies[s] != 0 ? 1u : 0u) << s;
        make_slots(frequencies, classes, slots);
    }
    used &= ~(1u << equal_class);
    return nullptr;
}

const char* read_tables(BitReader& from, unsigned symbols, unsigned used, unsigned contexts_of_class, unsigned& tables,
                        TableMap& table_of, Slot* slots) {
    tables = static_cast<unsigned>(from.take(tables_bits));
    if (tables > max_tables || (tables == 0 && used != 0)) return "more tables than 16, or none";
    for (unsigned t = 0; t < tables; ++t, slots += scale) {
        Frequencies frequencies;
        if (const char* fault = read_table(from, symbols, frequencies)) return fault;
        make_slots(frequencies, symbols, slots);
    }
    std::memset(table_of, 0, sizeof table_of);
    int table = 0;
    for (unsigned c = 0; c < classes && tables > 1; ++c) {
        if ((used >> c & 1) == 0) continue;
        for (unsigned i = 0; i < contexts_of_class; ++i) {
            table += from.take_near();
            if (table < 0 || table >= static_cast<int>(tables)) return "context without a table";
            table_of[c][i] = static_cast<uint8_t>(table);
        }
    }
    return nullptr;
}

const char* end_header(const BitReader& from) {
    if (from.failed()) return "payload that ends within its header";
    return from.is_padded() ? nullptr : "header that ends in the middle of a byte";
}

const char* read_states(const uint8_t* at, const uint8_t* end, unsigned streams, Source& to) {
    const size_t nbytes = static_cast<size_t>(end - at), states_nbytes = sizeof(uint32_t) * streams;
    if (nbytes < states_nbytes || nbytes % 2 != 0) return "payload that ends within its states";
    std::memcpy(to.states, at, states_nbytes);
    to.words = at + states_nbytes;
    to.words_end = end;
    to.patching = 0;
    for (unsigned i = 0; i < streams; ++i) {
        if (to.states[i] < low_state || to.states[i] >= 1u << 31) return "state out of range";
    }
    return nullptr;
}

bool ends(const Source& from, unsigned streams) {
    for (unsigned i = 0; i < streams; ++i) {
        if (from.states[i] != low_state) return false;
    }
    return from.words == from.words_end;
}

bool read_classes(const Slot* slots, unsigned streams, Source& from, size_t blocks, uint8_t* to) {
    unsigned before = equal_class;
    for (size_t k = 0; k < blocks; ++k) {
        uint32_t& state = from.states[k % streams];
        if (!take_symbol(from, state, slots + (before << probability_bits), before)) return false;
        to[k] = static_cast<uint8_t>(before);
    }
    return true;
}

Room decoder_room(uint8_t* workspace) {
    workspace += (alignof(Slot) - reinterpret_cast<std::uintptr_t>(workspace) % alignof(Slot)) % alignof(Slot);
    Slot* class_slots = reinterpret_cast<Slot*>(workspace);
    Slot* slots = class_slots + classes * scale;
    return {class_slots, slots, reinterpret_cast<uint8_t*>(slots + max_tables * scale)};
}

size_t decoder_workspace(size_t n) noexcept {
    return sizeof(Slot) * (classes + max_tables) * scale + block_count(n) + alignof(Slot);
}

const char* decode(const Loops& loops, const uint8_t* payload, size_t nbytes, const uint8_t* base, size_t n,
                   size_t width, uint8_t* workspace, uint8_t* out) noexcept {
    Reading reading;
    if (const char* fault = begin(payload, nbytes, n, width, workspace, reading)) return fault;
    auto& [model, from, slots, block_classes] = reading;
    if (!loops.read(model, slots, block_classes, from, base, 0, n, out)) return short_stream;
    return end(reading);
}

const char* add_moments(const Kernels& kernels, const uint8_t* payload, size_t nbytes, const uint8_t* base,
                        const uint8_t* other, size_t n, size_t width, Kind kind, const double* table,
                        uint8_t* workspace, PartialSums& sums) noexcept {
    Reading reading;
    if (const char* fault = begin(payload, nbytes, n, width, workspace, reading)) return fault;
    auto& [model, from, slots, block_classes] = reading;
    uint8_t slice[slice_nbytes];
    const size_t blocks = block_count(n), most = slice_nbytes / (block_lanes * width);
    for (size_t k = 0, next; k < blocks; k = next) {
        const bool equal = block_classes[k] == equal_class;
        for (next = k + 1; next < blocks && (block_classes[next] == equal_class) == equal; ++next) {
            if (!equal && next - k == most) break;
        }
        const size_t lanes = (next == blocks ? n : next * block_lanes) - k * block_lanes;
        const size_t at = k * block_lanes * width;
        if (!equal && !kernels.coder->read(model, slots, block_classes + k, from, base + at, 0, lanes, slice))
            return short_stream;
        kernels.add_moments(other + at, equal ? base + at : slice, lanes * width / element_width(kind), kind, table,
                            sums);
    }
    return end(reading);
}

BitWriter::BitWriter(uint8_t* to, size_t room) : to_(to), room_(8 * room) {}

size_t BitWriter::nbytes() const { return (bit_ + 7) / 8; }

bool BitWriter::fits() const { return bit_ <= room_; }

void BitWriter::put(uint64_t value, unsigned bits) {
    while (bits > 0) {
        const auto skip = static_cast<unsigned>(bit_ % 8), taken = bits < 8 - skip ? bits : 8 - skip;
        if (bit_ < room_) {
            if (skip == 0) to_[bit_ / 8] = 0;
            to_[bit_ / 8] = static_cast<uint8_t>(to_[bit_ / 8] | (value & ((1u << taken) - 1)) << skip);
        }
        value >>= taken;
        bits -= taken;
        bit_ += taken;
    }
}

void BitWriter::put_near(int difference) {
    const auto magnitude = static_cast<unsigned>(difference < 0 ? -difference : difference);
    put(uint64_t{1} << magnitude, magnitude + 1);
    if (difference != 0) put(difference < 0 ? 1 : 0, 1);
}

void BitWriter::put_signed(std::int64_t value) {
    const uint64_t z = (static_cast<uint64_t>(value) << 1) ^ (value < 0 ? ~uint64_t{0} : 0);
    const auto length = static_cast<unsigned>(std::bit_width(z + 1)) - 1;
    put(uint64_t{1} << length, length + 1);
    put(z + 1, length);
}

void normalize(const uint32_t* counts, unsigned symbols, Table& table) noexcept {
    Frequencies& to = table.frequencies;
    std::memset(to, 0, sizeof to);
    uint64_t total = 0;
    unsigned peak = 0;
    for (unsigned s = 0; s < symbols; ++s) {
        total += counts[s];
        if (counts[s] > counts[peak]) peak = s;
    }
    table.present = total != 0;
    table.peak = peak;
    if (total == 0) return;
    // In 256ths of a frequency. What rounding takes from one symbol the next one gets, as far as it hardly notices.
    constexpr std::int64_t unit = 256;
    std::int64_t carry = 0;
    uint32_t sum = 0;
    for (unsigned s = 0; s < symbols; ++s) {
        if (s == peak || counts[s] == 0) continue;
        const auto share = static_cast<std::int64_t>(uint64_t{counts[s]} * scale * unit / total);
        const std::int64_t most = share / 16;
        const std::int64_t wanted = share + (carry > most ? most : carry < -most ? -most : carry);
        auto f = static_cast<uint32_t>((wanted + unit / 2) / unit);
        const auto length = static_cast<unsigned>(std::bit_width(f));
        if (length > kept_bits)
            f = (f + (1u << (length - kept_bits - 1))) >> (length - kept_bits) << (length - kept_bits);
        if (f == 0) f = 1;
        carry += share - static_cast<std::int64_t>(f) * unit;
        to[s] = static_cast<uint16_t>(f);
        sum += f;
    }
    // The most frequent symbol gets what is left, and must not starve: many rare symbols were rounded up to 1.
    const auto share = static_cast<uint32_t>(uint64_t{counts[peak]} * scale / total);
    const uint32_t least = share - share / 8 < 1 ? 1 : share - share / 8;
    while (sum + least > scale) {
        unsigned rich = 0;
        for (unsigned s = 1; s < symbols; ++s) rich = to[s] > to[rich] ? s : rich;
        if (to[rich] <= 1) break;  // then sum < symbols, and far from scale
        const auto length = static_cast<unsigned>(std::bit_width(static_cast<unsigned>(to[rich]) - 1));
        const uint32_t step = length > kept_bits ? 1u << (length - kept_bits) : 1;
        to[rich] = static_cast<uint16_t>(to[rich] - step);
        sum -= step;
    }
    to[peak] = static_cast<uint16_t>(scale - sum);
}

void make_steps(const Table& table, unsigned symbols, Step* steps) noexcept {
    uint32_t first = 0;
    for (unsigned s = 0; s < symbols; ++s) {
        const uint32_t f = table.frequencies[s];
        if (f == 0) {
            steps[s] = {0, 0};
            continue;
        }
        if (f == 1) {
            // No reciprocal gives x / 1 itself: this one gives x - 1, and the bias makes up for it.
            steps[s] = {~uint32_t{0}, (first + scale - 1) << 12 | f};
        } else {
            const auto log = static_cast<unsigned>(std::bit_width(f - 1));
            const auto reciprocal = static_cast<uint32_t>(((uint64_t{1} << (log + 31)) + f - 1) / f);
            steps[s] = {reciprocal, (log - 1) << 25 | first << 12 | f};
        }
        first += f;
    }
}

unsigned write_class_tables(BitWriter& to, const Table* class_tables) {
    unsigned used = 0;
    for (unsigned c = 0; c < classes; ++c) {
        to.put(class_tables[c].present, 1);
        if (!class_tables[c].present) continue;
        write_table(to, class_tables[c], classes);
        for (unsigned s = 0; s < classes; ++s) used |= (class_tables[c].frequencies[s] != 0 ? 1u : 0u) << s;
    }
    return used & ~(1u << equal_class);
}

void write_tables(BitWriter& to, unsigned symbols, unsigned used, unsigned contexts_of_class, unsigned tables,
                  const TableMap& table_of, const Table* all_tables) {
    to.put(tables, tables_bits);
    for (unsigned t = 0; t < tables; ++t) write_table(to, all_tables[t], symbols);
    int table = 0;
    for (unsigned c = 0; c < classes && tables > 1; ++c) {
        if ((used >> c & 1) == 0) continue;
        for (unsigned i = 0; i < contexts_of_class; ++i) {
            to.put_near(table_of[c][i] - table);
            table = table_of[c][i];
        }
    }
}

unsigned log_of(unsigned streams) { return static_cast<unsigned>(std::bit_width(streams)) - 1; }

void write_header(BitWriter& to, const Model& model, const Table* class_tables, const Table* tables) {
    to.put(model.shift, shift_bits);
    to.put(model.low, low_bits);
    to.put(log_of(model.streams), streams_bits);
    to.put(model.drift, 1);
    for (unsigned i = 0; model.drift && i < contexts; ++i) {
        to.put_signed(std::int64_t{model.offsets[i]} - (i == 0 ? 0 : model.offsets[i - 1]));
    }
    const unsigned used = write_class_tables(to, class_tables);
    write_tables(to, symbol_count(model.width), used, contexts, model.tables, model.table_of, tables);
}

}  // namespace lamella::rans
