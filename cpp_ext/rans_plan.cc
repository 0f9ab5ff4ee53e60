// What the residual coder's encoder chooses: contexts, drift, classes of blocks, tables. A reader follows whatever is
// chosen here, so all of this may change; integers alone decide, so that it is the same on every machine.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "rans_plan.hpp"

namespace lamella::rans {
namespace {

using std::int32_t;
using std::int64_t;
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

uint32_t square_root(uint64_t v) {
    uint64_t root = 0;
    for (uint64_t bit = uint64_t{1} << 31; bit != 0; bit >>= 1) {
        if ((root + bit) * (root + bit) <= v) root += bit;
    }
    return static_cast<uint32_t>(root);
}

uint64_t lane_at(const uint8_t* lanes, size_t i, size_t width) {
    uint64_t value = 0;
    std::memcpy(&value, lanes + i * width, width);
    return value;
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

    size_t lanes_of(size_t block) const { return std::min(block_lanes, n - block * block_lanes); }
    unsigned context_of(uint64_t lane) const {
        const uint64_t magnitude = (lane & ((uint64_t{1} << (8 * width - 1)) - 1)) >> model.shift;
        return magnitude <= model.low ? 0
                                      : static_cast<unsigned>(std::min<uint64_t>(magnitude - model.low, contexts - 1));
    }
    uint32_t* counts_of(unsigned block_class, unsigned context) const {
        return counts + (block_class * contexts + context) * stride;
    }
};

constexpr size_t all_counts = size_t{classes} * contexts;

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
    uint32_t x, b;
    std::memcpy(&x, plan.src + 4 * i, 4);
    std::memcpy(&b, plan.base + 4 * i, 4);
    const auto ordered = [](uint32_t u) { return u >> 31 != 0 ? u ^ 0x7fffffff : u; };
    const uint32_t d = ordered(x) - ordered(b);
    return static_cast<int32_t>(b >> 31 != 0 ? 0 - d : d);
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
    const size_t counters = all_counts * plan.stride;
    std::memset(plan.counts, 0, 2 * counters * sizeof *plan.counts);
    plan.loops.count(plan.lanes, plan.block_classes, plan.n, plan.width, plan.counts);
    for (size_t i = 0; i < counters; ++i) plan.counts[i] += plan.counts[counters + i];
    plan.patch_symbols = count_patches(plan.lanes, plan.n, plan.width, plan.counts);
}

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
    plan.counts = arena.take<uint32_t>(2 * all_counts * plan.stride);
    plan.steps = arena.take<Step>(max_tables * plan.stride);
    // At most one word of two bytes for the class of a block, for the symbol of a lane, and for so many of its raw
    // bits; the few patches of a block take fewer than its lanes would.
    const size_t words =
        2 * (plan.blocks + plan.n * (1 + (8 * plan.width + most_raw_bits - 1) / most_raw_bits)) + slack;
    plan.words_end = arena.take<uint8_t>(words) + words;
    return arena.at();
}

Plan make_plan(const Loops& loops, const uint8_t* src, const uint8_t* base, size_t n, size_t width) {
    Plan plan{
        loops, src, base, n,  width, (n + block_lanes - 1) / block_lanes, symbol_stride(width), {}, {}, {}, {}, {},
        {},    {},  {},   {}, {}};
    plan.model.width = static_cast<unsigned>(width);
    return plan;
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
    Group groups[all_counts];
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

size_t encoder_workspace(size_t n, size_t width) noexcept {
    Plan plan = make_plan(scalar_loops, nullptr, nullptr, n, width);
    uint8_t* const start = reinterpret_cast<uint8_t*>(std::uintptr_t{64});
    return static_cast<size_t>(lay_out(plan, start) - start) + 64;
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
    Sink sink{plan.words_end, {}, plan.patch_symbols};
    std::fill(sink.states, sink.states + max_streams, low_state);
    loops.write(plan.model, plan.steps, plan.block_classes, plan.lanes, n, sink);
    write_classes(class_steps, plan.block_classes, plan.blocks, plan.model.streams, sink);

    BitWriter header(out, room);
    write_header(header, plan.model, plan.class_tables, plan.tables);
    return finish_payload(header, nullptr, 0, sink, plan.words_end, plan.model.streams, out, room);
}

}  // namespace lamella::rans
