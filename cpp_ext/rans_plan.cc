// What the residual coder's encoder chooses: contexts, drift, classes of blocks, tables. A reader follows whatever is
// chosen here, so all of this may change; integers alone decide, so that it is the same on every machine.
#include <algorithm>
#include <cstring>

#include "rans_encoding.hpp"

namespace lamella::rans {
namespace {

using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

uint32_t square_root(uint64_t v) {
    uint64_t root = 0;
    for (uint64_t bit = uint64_t{1} << 31; bit != 0; bit >>= 1) {
        if ((root + bit) * (root + bit) <= v) root += bit;
    }
    return static_cast<uint32_t>(root);
}

// What several functions below need to know, and memory for what they find.
struct Plan {
    const Loops& loops;
    const uint8_t* src;
    const uint8_t* base;
    size_t n;
    size_t width;
    size_t blocks;
    size_t stride;  // symbol_stride(width)

    Model model;
    Symbols lanes;
    uint8_t* block_classes;
    int32_t* activities;  // of blocks
    uint32_t* counts;     // of symbols, by class and context
    Step* steps;
    size_t patch_symbols;  // of all patched blocks
    uint8_t* words_end;
    Table class_tables[classes];
    Table tables[max_tables];

    size_t lanes_of(size_t block) const { return lanes_of_block(n, block * block_lanes); }
    unsigned context_of(uint64_t lane) const {
        return exponent_context(model, lane & ((uint64_t{1} << (8 * width - 1)) - 1));
    }
    uint32_t* counts_of(unsigned block_class, unsigned context) const {
        return counts + (block_class * contexts + context) * stride;
    }
};

// Contexts: where the exponent of these lanes is. Only the lanes tell: a width of two is bfloat16 or float16.

// Bits of the mantissa, of the float types of a width.
struct Layouts {
    unsigned count;
    unsigned mantissa_bits[2];
};

Layouts layouts_of(size_t width) {
    switch (width) {
        case 1:
            return {2, {3, 2}};
        case 2:
            return {2, {7, 10}};
        case 4:
            return {1, {23, 0}};
        default:
            return {1, {52, 0}};
    }
}

// The chunk's first lanes and a few from all over it.
constexpr size_t sampled_runs = 16, sampled_blocks = 2;

Cost sampled_cost(Plan& plan) {
    std::memset(plan.counts, 0, contexts * plan.stride * sizeof *plan.counts);
    const size_t run = sampled_blocks * block_lanes;
    const size_t runs = std::clamp<size_t>(plan.n / run, 1, sampled_runs);
    for (size_t r = 0; r < runs; ++r) {
        const size_t at = plan.blocks / runs * r * block_lanes;
        const size_t count = std::min(run, plan.n - at);
        plan.loops.symbolize(plan.model, plan.src + at * plan.width, plan.base + at * plan.width, count, plan.lanes);
        for (size_t i = 0; i < count; ++i) {
            if (is_dense(plan.lanes.kinds[i / block_lanes])) {
                ++plan.counts_of(0, plan.lanes.contexts[i])[plan.lanes.symbols[i]];
            }
        }
    }
    // What a symbol costs in a table, as far as the sample has to pay for it.
    const Cost of_symbol = static_cast<Cost>(5 * one_bit * std::min(runs * run, plan.n) / plan.n);
    Cost cost = 0;
    for (unsigned c = 0; c < contexts; ++c) {
        uint64_t total = 0;
        for (unsigned s = 0; s < symbol_count(plan.width); ++s) {
            const uint32_t count = plan.counts_of(0, c)[s];
            total += count;
            cost -= entropy_term(count);
            if (count != 0) cost += of_symbol;
        }
        cost += entropy_term(total);
    }
    return cost;
}

void choose_contexts(Plan& plan) {
    const Layouts layouts = layouts_of(plan.width);
    Cost least = 0;
    Model best{};
    for (unsigned i = 0; i < layouts.count; ++i) {
        plan.model.shift = layouts.mantissa_bits[i];
        plan.model.low = lowest_context(plan.base, plan.n, plan.width, plan.model.shift, plan.counts);
        const Cost cost = layouts.count == 1 ? 0 : sampled_cost(plan);
        if (i == 0 || cost < least) least = cost, best = plan.model;
    }
    plan.model = best;
}

// Patches: they cost the same wherever they lie. In the lanes of dense blocks a change costs less the likelier it is by
// its context, and that is worth more where changes keep to small exponents.

constexpr size_t patch_samples = 64;

// What a dense block costs beside its lanes' entropy: its class, which is less certain than that of a patched one, and
// what frequencies of few bits lose. Of 1 to 4 bits, 4 gave the fewest bytes on every corpus.
constexpr Cost beside_lanes = 4 * one_bit;

// Whether a chunk's patches, by those of some blocks, cost at most a 16th more than in dense blocks: so much are blocks
// worth that are read several times as fast.
void choose_patches(Plan& plan) {
    const size_t step = std::max<size_t>(1, plan.blocks / patch_samples);
    uint64_t lanes[contexts] = {}, changed[contexts] = {};
    uint64_t blocks = 0, patches = 0;
    for (size_t k = 0; k < plan.n / block_lanes; k += step) {
        const size_t at = k * block_lanes * plan.width;
        if (!find_patches(plan.src + at, plan.base + at, block_lanes, plan.width, plan.lanes)) continue;
        if (*plan.lanes.symbols == end_of_patches) continue;
        ++blocks;
        for (size_t i = 0; i < block_lanes; ++i) {
            ++lanes[plan.context_of(lane_at(plan.base, k * block_lanes + i, plan.width))];
        }
        for (size_t j = 0; plan.lanes.symbols[j] != end_of_patches; ++j, ++patches) {
            ++changed[plan.context_of(lane_at(plan.base, k * block_lanes + plan.lanes.contexts[j], plan.width))];
        }
    }
    // Of n things that fall into a and b: their entropy, n times.
    const auto split = [](uint64_t a, uint64_t b) { return entropy_term(a + b) - entropy_term(a) - entropy_term(b); };
    const Cost patched = static_cast<Cost>(patches) * position_bits * one_bit + split(patches, blocks);
    Cost dense = static_cast<Cost>(blocks) * beside_lanes;
    for (unsigned c = 0; c < contexts; ++c) dense += split(changed[c], lanes[c] - changed[c]);
    plan.lanes.patches = patched <= dense + dense / 16;
}

// Drift: weights without a gradient that only decay. Their delta depends on the mantissa alone, being what rounding
// made of a product.

int32_t delta_of(const Plan& plan, size_t i) {
    return static_cast<int32_t>(delta(load<uint32_t>(plan.src + 4 * i), load<uint32_t>(plan.base + 4 * i)));
}

constexpr size_t most_drift_samples = 1 << 13;
constexpr size_t drift_step = 4;  // lanes of a block that is looked at

// Finds blocks whose deltas lie close together and apart from 0, and sets the median of each bin of mantissas. A bin
// that none fell into takes its neighbour's.
void find_drift(Plan& plan) {
    if (plan.width != 4) return;
    const size_t most_blocks = most_drift_samples * drift_step / block_lanes;
    const size_t step = std::max<size_t>(1, plan.blocks / most_blocks + (plan.blocks % most_blocks != 0));
    auto* deltas = reinterpret_cast<int32_t*>(plan.counts);  // not in use yet, and larger
    auto* bins = reinterpret_cast<uint8_t*>(deltas + most_drift_samples);
    size_t found = 0, looked_at = 0;
    for (size_t k = 0; k + 1 <= plan.n / block_lanes; k += step, ++looked_at) {
        int64_t least = INT32_MAX, most = INT32_MIN;
        for (size_t j = 0; j < block_lanes; j += drift_step) {
            const int32_t d = delta_of(plan, k * block_lanes + j);
            deltas[found + j / drift_step] = d;
            bins[found + j / drift_step] =
                static_cast<uint8_t>(lane_at(plan.base, k * block_lanes + j, 4) >> drift_shift & (contexts - 1));
            least = std::min<int64_t>(least, d);
            most = std::max<int64_t>(most, d);
        }
        const int64_t middle = std::abs((least + most) / 2);
        const bool apart = least > 0 || most < 0;
        const bool close = most - least <= std::max<int64_t>(62, middle) && middle < 1 << 18;
        if (apart && close && middle > 4) found += block_lanes / drift_step;
    }
    if (found * 256 < looked_at * (block_lanes / drift_step) || found == 0) return;
    uint32_t starts[contexts + 1] = {};
    for (size_t i = 0; i < found; ++i) ++starts[bins[i] + 1];
    for (unsigned b = 0; b < contexts; ++b) starts[b + 1] += starts[b];
    int32_t* sorted = deltas + 2 * most_drift_samples;
    uint32_t at[contexts];
    std::copy(starts, starts + contexts, at);
    for (size_t i = 0; i < found; ++i) sorted[at[bins[i]]++] = deltas[i];
    bool known = false;
    for (unsigned b = 0; b < contexts; ++b) {
        int32_t *first = sorted + starts[b], *last = sorted + starts[b + 1];
        if (first == last) {
            if (known) plan.model.offsets[b] = plan.model.offsets[b - 1];
            continue;
        }
        int32_t* median = first + (last - first) / 2;
        std::nth_element(first, median, last);
        if (!known) std::fill(plan.model.offsets, plan.model.offsets + b, *median);
        plan.model.offsets[b] = *median;
        known = true;
    }
    plan.model.drift = true;
}

// Classes: how much larger a block's symbols are than their contexts would have them, on the scale of all blocks.

void classify(Plan& plan) {
    // Means of symbols by context, from some blocks, in halves, as a byte.
    const size_t step = std::max<size_t>(1, plan.blocks / 128);
    uint64_t sums[contexts] = {};
    uint32_t counts[contexts] = {};
    for (size_t k = 0; k < plan.blocks; k += step) {
        if (plan.lanes.kinds[k] != ordinary_kind) continue;
        for (size_t i = k * block_lanes; i < k * block_lanes + plan.lanes_of(k); ++i) {
            sums[plan.lanes.contexts[i]] += plan.lanes.symbols[i];
            ++counts[plan.lanes.contexts[i]];
        }
    }
    uint8_t expected[contexts];
    for (unsigned c = 0; c < contexts; ++c) {
        const uint64_t mean = counts[c] == 0 ? 0 : (2 * sums[c] + counts[c] / 2) / counts[c];
        expected[c] = counts[c] == 0 && c > 0 ? expected[c - 1] : static_cast<uint8_t>(std::min<uint64_t>(mean, 255));
    }
    plan.loops.measure(plan.lanes, expected, plan.n, plan.activities);
    int64_t sum = 0, squares = 0, count = 0;
    for (size_t k = 0; k < plan.blocks; ++k) {
        if (plan.lanes.kinds[k] != ordinary_kind) continue;
        const auto lanes = static_cast<int32_t>(plan.lanes_of(k));
        // As if the last block were whole.
        const int32_t activity = plan.activities[k] * static_cast<int32_t>(block_lanes) / lanes;
        plan.activities[k] = activity;
        sum += activity;
        squares += int64_t{activity} * activity;
        ++count;
    }
    const int64_t mean = count == 0 ? 0 : sum / count;
    const int64_t variance = count == 0 ? 0 : squares / count - mean * mean;
    const int64_t deviation = std::max<int64_t>(1, square_root(static_cast<uint64_t>(std::max<int64_t>(0, variance))));
    for (size_t k = 0; k < plan.blocks; ++k) {
        plan.block_classes[k] = plan.lanes.kinds[k];
        if (plan.lanes.kinds[k] != ordinary_kind) continue;
        // Classes are 10/11 of a standard deviation wide; blocks at the mean are in the third of them.
        const int64_t tenths = (plan.activities[k] - mean) * 11 / deviation + 47;
        plan.block_classes[k] = static_cast<uint8_t>(
            tenths < 10 * int64_t{first_activity} ? first_activity : std::min<int64_t>(tenths / 10, last_activity));
    }
}

void count_symbols(Plan& plan) {
    const size_t counters = all_contexts * plan.stride;
    std::memset(plan.counts, 0, 2 * counters * sizeof *plan.counts);
    plan.loops.count(plan.lanes, plan.block_classes, plan.n, plan.width, plan.counts);
    for (size_t i = 0; i < counters; ++i) plan.counts[i] += plan.counts[counters + i];
    plan.patch_symbols = count_patches(plan.lanes, plan.n, plan.width, plan.counts);
}

void choose_tables(Plan& plan) {
    const unsigned symbols = symbol_count(plan.width);
    uint32_t* merged[max_tables];
    plan.model.tables = merge_tables(plan.counts, contexts, plan.stride, symbols, plan.model.table_of, merged);
    for (unsigned t = 0; t < plan.model.tables; ++t) {
        normalize(merged[t], symbols, plan.tables[t]);
        make_steps(plan.tables[t], symbols, plan.steps + t * plan.stride);
    }
}

uint8_t* lay_out(Plan& plan, uint8_t* workspace) {
    const size_t padded = plan.blocks * block_lanes + slack;
    Arena arena(workspace);
    plan.lanes.symbols = arena.take<uint8_t>(padded);
    plan.lanes.contexts = arena.take<uint8_t>(padded);
    plan.lanes.residuals = arena.take<uint8_t>(padded * plan.width);
    plan.lanes.kinds = arena.take<uint8_t>(plan.blocks);
    plan.block_classes = arena.take<uint8_t>(plan.blocks);
    plan.activities = arena.take<int32_t>(plan.blocks);
    plan.counts = arena.take<uint32_t>(2 * all_contexts * plan.stride);
    plan.steps = arena.take<Step>(max_tables * plan.stride);
    // At most one word of two bytes for the class of a block, for the symbol of a lane, and for so many of its raw
    // bits; the few patches of a block take fewer than its lanes would.
    const size_t words =
        2 * (plan.blocks + plan.n * (1 + (8 * plan.width + most_raw_bits - 1) / most_raw_bits)) + slack;
    plan.words_end = arena.take<uint8_t>(words) + words;
    return arena.at();
}

Plan make_plan(const Loops& loops, const uint8_t* src, const uint8_t* base, size_t n, size_t width) {
    Plan plan{loops, src, base, n, width, block_count(n), symbol_stride(width), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    plan.model.width = static_cast<unsigned>(width);
    return plan;
}

}  // namespace

size_t encoder_workspace(size_t n, size_t width) noexcept {
    Plan plan = make_plan(scalar_loops, nullptr, nullptr, n, width);
    return nbytes_of([&plan](uint8_t* at) { return lay_out(plan, at); });
}

size_t encode(const Loops& loops, const uint8_t* src, const uint8_t* base, size_t n, size_t width, uint8_t* workspace,
              uint8_t* out, size_t room) noexcept {
    Plan plan = make_plan(loops, src, base, n, width);
    lay_out(plan, workspace);
    choose_contexts(plan);
    choose_patches(plan);
    find_drift(plan);
    loops.symbolize(plan.model, src, base, n, plan.lanes);
    classify(plan);
    count_symbols(plan);
    choose_tables(plan);
    Step class_steps[classes * classes];
    choose_class_tables(plan.block_classes, plan.blocks, plan.class_tables, class_steps);

    const auto dense =
        static_cast<size_t>(std::count_if(plan.block_classes, plan.block_classes + plan.blocks, is_dense));
    plan.model.streams = streams_for(dense * block_lanes);
    Sink sink = empty_sink(plan.words_end);
    sink.patching = plan.patch_symbols;
    loops.write(plan.model, plan.steps, plan.block_classes, plan.lanes, n, sink);
    write_classes(class_steps, plan.block_classes, plan.blocks, plan.model.streams, sink);

    BitWriter header(out, room);
    write_header(header, plan.model, plan.class_tables, plan.tables);
    return finish_payload(header, nullptr, 0, sink, plan.words_end, plan.model.streams, out, room);
}

}  // namespace lamella::rans
