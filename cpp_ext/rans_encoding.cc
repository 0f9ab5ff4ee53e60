// What encoders share: see rans_encoding.hpp.
#include "rans_encoding.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace lamella::rans {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

// log2(1 + i / 256) in 2^-16, by squaring.
constexpr std::array<uint32_t, 257> make_logarithms() {
    std::array<uint32_t, 257> table{};
    for (uint64_t i = 0; i <= 256; ++i) {
        uint64_t x = (256 + i) << 22;  // in 2^-30
        uint32_t log = 0;
        if (i == 256) x >>= 1, log = 1;
        for (int bit = 0; bit < 16; ++bit) {
            x = x * x >> 30;
            log <<= 1;
            if (x >= uint64_t{2} << 30) x >>= 1, ++log;
        }
        table[i] = log;
    }
    return table;
}
constexpr auto logarithms = make_logarithms();

// v log2 v.
constexpr Cost compute_entropy_term(uint64_t v) {
    if (v < 2) return 0;
    const auto highest = static_cast<unsigned>(std::bit_width(v)) - 1;
    const uint64_t fraction = v << (63 - highest) << 1 >> 40;  // below the highest bit, in 2^-24
    const auto i = static_cast<size_t>(fraction >> 16);
    const uint64_t between = (logarithms[i + 1] - logarithms[i]) * (fraction & 0xffff) >> 16;
    return static_cast<Cost>(v * ((uint64_t{highest} << 16) + logarithms[i] + between));
}

// Most counts are small, and most of the time that choosing tables takes would go into these.
constexpr size_t small_counts = 1 << 11;
constexpr std::array<uint32_t, small_counts> make_small_terms() {
    std::array<uint32_t, small_counts> table{};
    for (size_t v = 0; v < small_counts; ++v) table[v] = static_cast<uint32_t>(compute_entropy_term(v));
    return table;
}
constexpr auto small_terms = make_small_terms();

// Tables: contexts in the order of their mean symbols, and the neighbours that lose least by sharing a table merged
// until no more than 16 are left and sharing no longer pays.

struct Group {
    uint32_t* counts;
    uint32_t symbols;  // those from this one on do not occur
    uint32_t mean;     // in 2^-8
    uint64_t total;
    uint16_t context;
    uint16_t next;  // the group after this one, or `none`
    uint16_t before;
    bool merged;  // whether it is part of another
    Cost cost;    // of all its symbols, table included
    Cost loss;    // of merging it with `next`
};
constexpr uint16_t none = 0xffff;

// A context with less than this share of a chunk's symbols has no say in which others it shares a table with.
constexpr unsigned few_symbols = 1 << 10;

Cost cost_of(const Group& a) {
    Cost cost = 16 * one_bit + entropy_term(a.total);
    for (unsigned s = 0; s < a.symbols; ++s) {
        if (a.counts[s] != 0) cost += 5 * one_bit - entropy_term(a.counts[s]);
    }
    return cost;
}

Cost cost_of_both(const Group& a, const Group& b) {
    Cost cost = 16 * one_bit + entropy_term(a.total + b.total);
    for (unsigned s = 0; s < std::max(a.symbols, b.symbols); ++s) {
        const uint32_t count = a.counts[s] + b.counts[s];
        if (count != 0) cost += 5 * one_bit - entropy_term(count);
    }
    return cost;
}

// All but the costs.
void merge(Group& a, Group& b) {
    for (unsigned s = 0; s < b.symbols; ++s) a.counts[s] += b.counts[s];
    a.symbols = std::max(a.symbols, b.symbols);
    a.total += b.total;
    b.merged = true;
}

}  // namespace

Cost entropy_term(uint64_t v) { return v < small_counts ? small_terms[v] : compute_entropy_term(v); }

uint32_t lowest_context(const uint8_t* lanes, size_t n, size_t width, unsigned shift, uint32_t* scratch) {
    const unsigned bits = 8 * static_cast<unsigned>(width) - 1 - shift;
    if (bits <= 5) return 0;
    const size_t values = size_t{1} << bits;
    std::memset(scratch, 0, values * sizeof *scratch);
    const size_t step = std::max<size_t>(1, n >> 10);
    uint32_t total = 0;
    for (size_t i = 0; i < n; i += step, ++total) ++scratch[lane_at(lanes, i, width) >> shift & (values - 1)];
    size_t highest = values - 1;
    for (uint32_t above = 0; highest > 0 && above + scratch[highest] <= total / 1024; --highest) {
        above += scratch[highest];
    }
    return highest < contexts ? 0 : static_cast<uint32_t>(highest) - (contexts - 2);
}

unsigned merge_tables(uint32_t* counts, unsigned contexts_of_class, size_t stride, unsigned symbols, TableMap& table_of,
                      uint32_t* (&merged)[max_tables]) {
    Group groups[all_contexts];
    uint16_t count = 0;
    uint64_t all = 0;
    for (unsigned i = 0; i < classes * contexts_of_class; ++i) {
        uint32_t* of_context = counts + i * stride;
        uint64_t total = 0, weighted = 0;
        uint32_t past = 0;
        for (unsigned s = 0; s < symbols; ++s) {
            total += of_context[s];
            weighted += uint64_t{s} * of_context[s];
            past = of_context[s] != 0 ? s + 1 : past;
        }
        if (total == 0) continue;
        const auto mean = static_cast<uint32_t>(256 * weighted / total);
        groups[count++] = {of_context, past, mean, total, static_cast<uint16_t>(i), 0, 0, false, 0, 0};
        all += total;
    }
    std::sort(groups, groups + count, [](const Group& a, const Group& b) {
        return a.mean != b.mean ? a.mean < b.mean : a.context < b.context;
    });
    uint16_t last = none, left = 0;
    for (uint16_t i = 0; i < count; ++i) {
        if (last != none && groups[last].total <= all / few_symbols) {
            merge(groups[last], groups[i]);
            continue;
        }
        groups[i].before = last;
        if (last != none) groups[last].next = i;
        last = i;
        ++left;
    }
    if (last != none) groups[last].next = none;

    const auto find_loss = [&](uint16_t i) {
        Group& group = groups[i];
        if (group.next == none) return;
        const Group& next = groups[group.next];
        group.loss = cost_of_both(group, next) - group.cost - next.cost;
    };
    for (uint16_t i = 0; i < count; ++i) groups[i].cost = groups[i].merged ? 0 : cost_of(groups[i]);
    for (uint16_t i = 0; i < count; ++i) {
        if (!groups[i].merged) find_loss(i);
    }
    while (left > 1) {
        uint16_t best = none;
        for (uint16_t i = 0; i != none; i = groups[i].next) {
            if (groups[i].next != none && (best == none || groups[i].loss < groups[best].loss)) best = i;
        }
        if (left <= max_tables && groups[best].loss > 0) break;
        Group &group = groups[best], &next = groups[group.next];
        group.cost += next.cost + group.loss;
        merge(group, next);
        group.next = next.next;
        if (group.next != none) groups[group.next].before = best;
        find_loss(best);
        if (group.before != none) find_loss(group.before);
        --left;
    }

    // Contexts that do not occur get the table of their neighbour, which costs the fewest bits in the header.
    constexpr uint8_t absent = 0xff;
    std::memset(table_of, absent, sizeof table_of);
    unsigned tables = 0;
    for (uint16_t i = 0; i < count; ++i) {
        if (!groups[i].merged) merged[tables++] = groups[i].counts;
        table_of[groups[i].context / contexts_of_class][groups[i].context % contexts_of_class] =
            static_cast<uint8_t>(tables - 1);
    }
    uint8_t table = 0;
    for (auto& of_class : table_of) {
        for (auto& of_context : of_class) of_context = table = of_context == absent ? table : of_context;
    }
    return tables;
}

void choose_class_tables(const uint8_t* block_classes, size_t blocks, Table* tables, Step* steps) {
    uint32_t counts[classes][classes] = {};
    unsigned before = equal_class;
    for (size_t k = 0; k < blocks; ++k) {
        ++counts[before][block_classes[k]];
        before = block_classes[k];
    }
    for (unsigned c = 0; c < classes; ++c) {
        normalize(counts[c], classes, tables[c]);
        make_steps(tables[c], classes, steps + c * classes);
    }
}

void write_classes(const Step* class_steps, const uint8_t* block_classes, size_t blocks, unsigned streams, Sink& to) {
    for (size_t k = blocks; k-- > 0;) {
        const unsigned before = k == 0 ? equal_class : block_classes[k - 1];
        code(class_steps[before * classes + block_classes[k]], to.states[k % streams], to.words);
    }
}

Sink empty_sink(uint8_t* words_end) {
    Sink sink{words_end, {}, 0};
    std::fill(sink.states, sink.states + max_streams, low_state);
    return sink;
}

// Each stream costs about three bytes, and gives a vector unit more to do at once.
unsigned streams_for(size_t coded_lanes) {
    if (coded_lanes < 1 << 10) return 1;
    if (coded_lanes < 1 << 13) return 4;
    if (coded_lanes < 1 << 15) return 16;
    return 32;
}

size_t finish_payload(const BitWriter& header, const uint8_t* raw, size_t raw_nbytes, const Sink& from,
                      const uint8_t* words_end, unsigned streams, uint8_t* out, size_t room) {
    const auto words_nbytes = static_cast<size_t>(words_end - from.words);
    const size_t states_nbytes = sizeof(uint32_t) * streams;
    const size_t nbytes = header.nbytes() + raw_nbytes + states_nbytes + words_nbytes;
    if (!header.fits() || nbytes > room) return 0;
    out += header.nbytes();
    if (raw_nbytes != 0) std::memcpy(out, raw, raw_nbytes);
    std::memcpy(out + raw_nbytes, from.states, states_nbytes);
    std::memcpy(out + raw_nbytes + states_nbytes, from.words, words_nbytes);
    return nbytes;
}

}  // namespace lamella::rans
