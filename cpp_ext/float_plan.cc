// What the float coder's encoder chooses: where tops begin, which of them have symbols, classes of blocks, tables. A
// reader follows whatever is chosen here, so all of this may change; integers alone decide, so that it is the same on
// every machine.
#include <algorithm>
#include <bit>
#include <cstring>

#include "floats.hpp"
#include "rans_encoding.hpp"

namespace lamella::floats {
namespace {

using rans::Cost;
using rans::one_bit;
using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

// What several functions below need to know, and memory for what they find.
struct Plan {
    const Loops& loops;
    const uint8_t* src;
    const uint8_t* guide;
    size_t n;
    size_t width;
    size_t blocks;

    Model model;
    unsigned kept_mantissa;  // bits of the mantissa in a top
    Lanes lanes;
    uint8_t* block_classes;
    uint32_t* counts;  // of symbols, by class and context, `banks` times
    Step* steps;
    uint8_t* words_end;
    uint8_t* escapes_end;
    uint8_t* raw;
    rans::Table class_tables[rans::classes];
    rans::Table tables[rans::max_tables];

    unsigned contexts() const { return guide == nullptr ? 1 : rans::contexts; }
    size_t lanes_of(size_t block) const { return lanes_of_block(n, block * block_lanes); }
};

// Neighbours often have the same symbol, and would wait for one another: they have counters of their own.
constexpr size_t banks = 4;
constexpr size_t most_counts = rans::all_contexts * symbol_stride;

// Bits that any lane has.
uint64_t any_bits(const Plan& plan) {
    uint64_t any = 0;
    const size_t nbytes = plan.n * plan.width, whole = nbytes / 8 * 8;
    for (size_t i = 0; i < whole; i += 8) {
        any |= load<uint64_t>(plan.src + i);
    }
    for (size_t i = whole; i < nbytes; ++i) any |= uint64_t{plan.src[i]} << (8 * (i % 8));
    for (size_t bits = 32; bits >= 8 * plan.width; bits /= 2) any |= any >> bits;
    return plan.width == 8 ? any : any & ((uint64_t{1} << (8 * plan.width)) - 1);
}

// Where tops begin. Only the lanes tell: a width of two is bfloat16 or float16.

// Tops that may be tried, of the float types of a width: how many bits of which mantissa they leave raw.
struct Candidates {
    unsigned finest;  // cut
    unsigned count;   // cuts finest .. finest + count - 1
};

Candidates candidates_of(size_t width) {
    switch (width) {
        case 1:
            return {0, 3};
        case 2:
            return {5, 6};
        case 4:
            return {21, 3};
        default:
            return {50, 3};
    }
}

// Of the mantissa above a cut; of the two types of two bytes, the one for which a cut near this one is worth trying.
unsigned kept_mantissa(size_t width, unsigned cut) {
    const unsigned mantissa = width == 1 ? 3 : width == 2 ? (cut < 8 ? 7 : 10) : width == 4 ? 23 : 52;
    return mantissa - cut;
}

constexpr size_t most_samples = 1 << 13;
constexpr size_t sampled_run = 64;

// How often each of the finest tops occurs among some lanes; returns how many lanes there were.
size_t sample_tops(const Plan& plan, unsigned cut, uint32_t* seen) {
    const size_t values = size_t{1} << (8 * plan.width - 1 - cut);
    std::memset(seen, 0, values * sizeof *seen);
    const size_t runs = std::max<size_t>(1, std::min(plan.n, most_samples) / sampled_run);
    const size_t apart = plan.n / runs;
    size_t samples = 0;
    for (size_t r = 0; r < runs; ++r) {
        const size_t end = runs == 1 ? std::min(plan.n, most_samples) : r * apart + sampled_run;
        for (size_t i = r * apart; i < end; ++i, ++samples) {
            ++seen[rans::lane_at(plan.src, i, plan.width) >> cut & (values - 1)];
        }
    }
    return samples;
}

// The window of tops that have symbols: all that were seen, with room for those that were not, or the highest ones.
void choose_window(const uint32_t* seen, size_t values, Model& model) {
    // A sample lacks a few of the tops of its chunk.
    constexpr size_t unseen = 4;
    size_t first = 1, last = values - 1;
    while (first < last && seen[first] == 0) ++first;
    uint32_t above = 0;
    const uint32_t rare = most_samples / 2048;  // so few may be escapes
    size_t highest = last;
    while (highest > first && seen[highest] == 0) --highest;
    last = highest;
    if (highest - first + 1 > most_values) {
        while (last > first && above + seen[last] <= rare) above += seen[last--];
        first = std::max(first, last < most_values ? 1 : last - most_values + 1);
    }
    const size_t room = most_values - (last - first + 1);
    last = std::min({values - 1, last + unseen, last + room});
    first -= std::min({first - 1, unseen, most_values - (last - first + 1)});
    model.first = static_cast<unsigned>(first);
    model.values = static_cast<unsigned>(last - first + 1);
}

// What a chunk takes if its tops are as those of a sample, by one table, in `one_bit`s a sample.
Cost cost_of(const Plan& plan, const uint32_t* seen, size_t values, size_t samples, const Model& model) {
    Cost tops = rans::entropy_term(samples);
    uint64_t distinct = 0, escaped = 0, rare = 0;
    for (size_t top = 0; top < values; ++top) {
        if (top != 0 && (top < model.first || top >= model.first + model.values)) {
            escaped += seen[top];
            continue;
        }
        tops -= rans::entropy_term(seen[top]);
        distinct += seen[top] != 0 ? 1 : 0;
        rare += seen[top] != 0 && seen[top] * rans::scale < 2 * samples ? 1 : 0;
    }
    tops += static_cast<Cost>(escaped) * most_top_bits * one_bit - rans::entropy_term(escaped);
    // An estimate from a sample is too low by 1 / (2 ln 2) bits for every symbol that it knows.
    tops += static_cast<Cost>(distinct) * one_bit * 72 / 100;
    // A frequency of 1 is more than a rare one should have, and the others lack it.
    tops += static_cast<Cost>(rare * samples) * one_bit / (2 * rans::scale);
    // Tables hold about five bits a symbol; a chunk of many blocks has several.
    const uint64_t tables = std::min<uint64_t>(rans::classes - 1, 1 + plan.blocks / 512);
    const uint64_t header = distinct * 5 * tables * one_bit * samples / plan.n;
    return tops + static_cast<Cost>(header) + static_cast<Cost>(samples) * raw_bits(model) * one_bit;
}

void choose_tops(Plan& plan) {
    Model& model = plan.model;
    const uint64_t any = any_bits(plan);
    const auto zeros = static_cast<unsigned>(any == 0 ? 8 * plan.width : std::countr_zero(any));
    model.has_signs = (any >> (8 * plan.width - 1)) != 0;
    const auto [finest, count] = candidates_of(plan.width);
    uint32_t* seen = plan.counts;  // not in use yet, and larger
    const size_t samples = sample_tops(plan, finest, seen);
    Cost least = 0;
    Model best{};
    for (unsigned i = 0; i < count; ++i) {
        model.cut = finest + i;
        model.trailing = std::min(zeros, model.cut);
        const size_t values = size_t{1} << top_bits(model);
        for (size_t top = 0; i > 0 && top < values; ++top) seen[top] = seen[2 * top] + seen[2 * top + 1];
        choose_window(seen, values, model);
        const Cost cost = cost_of(plan, seen, values, samples, model);
        if (i == 0 || cost < least) least = cost, best = model;
    }
    model = best;
    plan.kept_mantissa = kept_mantissa(plan.width, model.cut);
}

void choose_contexts(Plan& plan) {
    if (plan.guide == nullptr) return;
    plan.model.shift = plan.model.cut + plan.kept_mantissa;
    plan.model.low = rans::lowest_context(plan.guide, plan.n, plan.width, plan.model.shift, plan.counts);
}

// Classes: how large the lanes of a block are.

// A lane's weight is the square root of its magnitude: of what can be summed in bytes, the sum of these tells best how
// large the others of a block are.
void make_weights(const Plan& plan, uint8_t* table) {
    // 2^(-1/2), 2^(-1/4), ... of 2^16: from one top to the next by how many tops an octave has.
    constexpr uint32_t ratios[] = {46341, 55109, 60097, 62757};
    uint64_t weight = 255 << 16;
    for (unsigned i = rans::contexts; i-- > 0; weight = weight * ratios[plan.kept_mantissa] >> 16) {
        table[i] = static_cast<uint8_t>(std::max<uint64_t>(1, weight >> 16));
    }
}

// Logarithms of levels, in bins of 1/64 of an octave of weights.
constexpr unsigned bins_of_octave = 64, level_bins = 16 * bins_of_octave;
constexpr unsigned most_centers = rans::classes - 1;

unsigned bin_of(const Plan& plan, size_t block) {
    // As if the last block were whole.
    const uint64_t level = uint64_t{plan.lanes.levels[block]} * block_lanes / plan.lanes_of(block);
    return static_cast<unsigned>(rans::entropy_term(level) / static_cast<Cost>(level) / (one_bit / bins_of_octave));
}

// k-means of the bins of blocks. A block stays in the class of the one before it if another is hardly nearer, since
// changes are what classes cost.
void classify(Plan& plan) {
    constexpr unsigned reluctance = 7;
    uint32_t found[level_bins] = {};
    uint32_t blocks = 0;
    for (size_t k = 0; k < plan.blocks; ++k) {
        plan.block_classes[k] = zero_class;
        if (plan.lanes.levels[k] == 0) continue;
        // From here on a level is a bin; 0 is still that of a zero block.
        const unsigned bin = bin_of(plan, k);
        plan.lanes.levels[k] = bin + 1;
        ++found[bin];
        ++blocks;
    }
    // A guide says more than a class does.
    const unsigned centers = std::min<unsigned>(most_centers, 1 + blocks / 16);
    unsigned center[most_centers];
    uint32_t before = 0;
    unsigned next = 0;
    for (unsigned bin = 0; bin < level_bins; before += found[bin++]) {
        while (next < centers && uint64_t{before + found[bin]} * 2 * centers > uint64_t{blocks} * (2 * next + 1)) {
            center[next++] = bin;
        }
    }
    while (next < centers) center[next++] = 0;
    uint8_t nearest[level_bins];
    for (int round = 0; round < 16; ++round) {
        uint64_t sums[most_centers] = {}, counts[most_centers] = {};
        unsigned c = 0;
        for (unsigned bin = 0; bin < level_bins; ++bin) {
            while (c + 1 < centers && 2 * bin > center[c] + center[c + 1]) ++c;
            nearest[bin] = static_cast<uint8_t>(c);
            sums[c] += uint64_t{bin} * found[bin];
            counts[c] += found[bin];
        }
        for (c = 0; c < centers; ++c) {
            if (counts[c] != 0) center[c] = static_cast<unsigned>((sums[c] + counts[c] / 2) / counts[c]);
        }
    }
    const auto distance = [&](unsigned bin, unsigned c) { return bin < center[c] ? center[c] - bin : bin - center[c]; };
    unsigned last = 0;
    for (size_t k = 0; k < plan.blocks; ++k) {
        if (plan.lanes.levels[k] == 0) continue;
        const unsigned bin = plan.lanes.levels[k] - 1;
        if (distance(bin, last) > distance(bin, nearest[bin]) + reluctance) last = nearest[bin];
        plan.block_classes[k] = static_cast<uint8_t>(zero_class + 1 + last);
    }
}

// Blocks that are counted, of many: tables from some of them are as good.
size_t counted_step(const Plan& plan) { return plan.blocks >= 1024 ? 2 : 1; }

// Adds the lanes of one block to the counters of its class.
void count_block(const Plan& plan, size_t block, size_t counters) {
    uint32_t* counts = plan.counts + plan.block_classes[block] * plan.contexts() * symbol_stride;
    const uint8_t* symbols = plan.lanes.symbols + block * block_lanes;
    const uint8_t* contexts = plan.lanes.contexts + block * block_lanes;
    const size_t lanes = plan.lanes_of(block), in_banks = lanes / banks * banks;
    const auto add = [&](size_t j, size_t bank) {
        const size_t of_context = plan.guide == nullptr ? 0 : contexts[j] * symbol_stride;
        ++counts[bank * counters + of_context + symbols[j]];
    };
    for (size_t j = 0; j < in_banks; j += banks) {
        for (size_t bank = 0; bank < banks; ++bank) add(j + bank, bank);
    }
    for (size_t j = in_banks; j < lanes; ++j) add(j, 0);
}

void count_symbols(Plan& plan) {
    const size_t counters = size_t{rans::classes} * plan.contexts() * symbol_stride;
    std::memset(plan.counts, 0, banks * counters * sizeof *plan.counts);
    const size_t step = counted_step(plan);
    size_t seen = 0;  // of blocks that have symbols: all of these may lie at odd places, and there must be a table then
    for (size_t k = 0; k < plan.blocks; ++k) {
        if (plan.block_classes[k] != zero_class && seen++ % step == 0) count_block(plan, k, counters);
    }
    for (size_t i = 0; i < counters; ++i) {
        uint32_t sum = 0;
        for (size_t bank = 0; bank < banks; ++bank) sum += plan.counts[bank * counters + i];
        plan.counts[i] = sum * static_cast<uint32_t>(step);
    }
}

// A symbol too rare for a table would take from the others more than an escape costs it.
void choose_tables(Plan& plan) {
    const unsigned symbols = symbol_count(plan.model), escape = escape_of(plan.model);
    uint32_t* merged[rans::max_tables];
    plan.model.tables =
        rans::merge_tables(plan.counts, plan.contexts(), symbol_stride, symbols, plan.model.table_of, merged);
    for (unsigned t = 0; t < plan.model.tables; ++t) {
        uint32_t* counts = merged[t];
        uint64_t total = 0;
        for (unsigned s = 0; s < symbols; ++s) total += counts[s];
        // What was not counted may be an escape.
        if (counted_step(plan) > 1) ++counts[escape];
        for (unsigned s = 0; s < escape; ++s) {
            if (uint64_t{counts[s]} * rans::scale * 12 >= total) continue;
            counts[escape] += counts[s];
            counts[s] = 0;
        }
        rans::normalize(counts, symbols, plan.tables[t]);
        Step* steps = plan.steps + t * symbol_stride;
        rans::make_steps(plan.tables[t], symbols, steps);
        Step marked = steps[escape];
        marked.packed |= escape_mark;
        for (unsigned s = 0; s < symbol_stride; ++s) {
            if (s >= escape || plan.tables[t].frequencies[s] == 0) steps[s] = marked;
        }
    }
}

// Without a guide, classes that share a table are one class.
void join_classes(Plan& plan) {
    if (plan.guide != nullptr) return;
    for (size_t k = 0; k < plan.blocks; ++k) {
        uint8_t& block_class = plan.block_classes[k];
        if (block_class != zero_class) {
            block_class = static_cast<uint8_t>(zero_class + 1 + plan.model.table_of[block_class][0]);
        }
    }
    for (unsigned c = 0; c < rans::classes; ++c) {
        const unsigned table = c == 0 ? 0 : std::min(c - 1, plan.model.tables == 0 ? 0 : plan.model.tables - 1);
        plan.model.table_of[c][0] = static_cast<uint8_t>(table);
    }
}

uint8_t* lay_out(Plan& plan, uint8_t* workspace) {
    using rans::slack;
    const size_t padded = plan.blocks * block_lanes + slack;
    rans::Arena arena(workspace);
    plan.lanes.symbols = arena.take<uint8_t>(padded);
    plan.lanes.contexts = arena.take<uint8_t>(padded);
    plan.lanes.levels = arena.take<uint32_t>(plan.blocks);
    plan.block_classes = arena.take<uint8_t>(plan.blocks);
    plan.counts = arena.take<uint32_t>(banks * most_counts);
    plan.steps = arena.take<Step>(rans::max_tables * symbol_stride);
    // A lane and a block each give at most one word of two bytes.
    const size_t words = 2 * (plan.n + plan.blocks) + slack;
    plan.words_end = arena.take<uint8_t>(words) + words;
    // Raw bits, which are fewer than a lane has, and after them as many escapes as there are, from their end.
    plan.raw = arena.take<uint8_t>(plan.n * plan.width + plan.blocks + slack);
    plan.escapes_end = arena.take<uint8_t>(2 * plan.n + slack) + 2 * plan.n;
    return arena.at();
}

Plan make_plan(const Loops& loops, const uint8_t* src, const uint8_t* guide, size_t n, size_t width) {
    Plan plan{loops, src, guide, n, width, block_count(n), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    plan.model.width = static_cast<unsigned>(width);
    return plan;
}

}  // namespace

size_t encoder_workspace(size_t n, size_t width) noexcept {
    Plan plan = make_plan(scalar_loops, nullptr, nullptr, n, width);
    return rans::nbytes_of([&plan](uint8_t* at) { return lay_out(plan, at); });
}

size_t encode(const Loops& loops, const uint8_t* src, const uint8_t* guide, size_t n, size_t width, uint8_t* workspace,
              uint8_t* out, size_t room) noexcept {
    Plan plan = make_plan(loops, src, guide, n, width);
    lay_out(plan, workspace);
    choose_tops(plan);
    choose_contexts(plan);
    uint8_t weight_table[weights];
    make_weights(plan, weight_table);
    uint8_t* raw_end = loops.split(plan.model, weight_table, src, guide, n, plan.lanes, plan.raw);
    classify(plan);
    count_symbols(plan);
    choose_tables(plan);
    join_classes(plan);
    Step class_steps[rans::classes * rans::classes];
    rans::choose_class_tables(plan.block_classes, plan.blocks, plan.class_tables, class_steps);

    const auto zero = static_cast<size_t>(std::count(plan.block_classes, plan.block_classes + plan.blocks, zero_class));
    plan.model.streams = rans::streams_for((plan.blocks - zero) * block_lanes);
    Sink sink{rans::empty_sink(plan.words_end), plan.escapes_end};
    loops.write(plan.model, plan.steps, plan.block_classes, plan.lanes, src, guide != nullptr, n, sink);
    rans::write_classes(class_steps, plan.block_classes, plan.blocks, plan.model.streams, sink.to);

    const auto raw = static_cast<size_t>(raw_end - plan.raw);
    const auto escapes = static_cast<size_t>(plan.escapes_end - sink.escapes);
    if (raw + escapes > std::min(room, most_raw_nbytes)) return 0;
    std::memmove(raw_end, sink.escapes, escapes);
    rans::BitWriter header(out, room);
    write_header(header, plan.model, guide != nullptr, plan.class_tables, plan.tables, raw + escapes);
    return rans::finish_payload(header, plan.raw, raw + escapes, sink.to, plan.words_end, plan.model.streams, out,
                                room);
}

}  // namespace lamella::floats
