// Selective scan, forward. A task owns one row and some blocks of 32 channels of it; lanes are
// channels, so a state element of all lanes is one vector and no sum crosses lanes.
// docs/ops/selective_scan.md#algorithm
#include "../op/scratch.h"
#include "gate.h"
#include "parallel.h"
#include "selective_scan_tile.h"

namespace ssm::cpu::SSM_ISA {

namespace {

// Between rows of a tile of [step][channel] and of one of [channel][step].
constexpr std::int64_t kTilePitch = kScanChannels;
static_assert(kScanChannels == kScanSteps);

// Advances kStates states of one vector of channels over the steps [begin, end) of a tile and adds
// their part of the output.
template <class T, int kStates, bool kConstB, bool kConstC, bool kInRange>
SSM_INLINE void scan_states(const ScanTile<T>& tile, const NextTile& next, std::int64_t dstate,
                            std::int64_t first, std::int64_t lane, std::int64_t begin,
                            std::int64_t end) {
    T* const state = tile.h + first * kScanChannels + lane;
    const T* const rate = tile.A + first * kScanChannels + lane;
    Vec<T> h[kStates];
    for (int n = 0; n < kStates; ++n) h[n] = load<T>(state + n * kScanChannels);
    for (std::int64_t t = begin; t < end; ++t) {
        if (first + lane == 0)
            for (int i = 0; i < next.count; ++i) NextTile::request(next, i, t);
        const Vec<T> dt = load<T>(tile.dt + t * kScanChannels + lane);
        const Vec<T> dtu = load<T>(tile.dtu + t * kScanChannels + lane);
        // Two sums, since one would chain kStates dependent additions.
        Vec<T> even = load<T>(tile.y + t * kScanChannels + lane), odd = zero<T>();
        constexpr int kGroup = kStates < 4 ? kStates : 4;
#pragma GCC unroll 4
        for (int m = 0; m < kStates; m += kGroup) {
            Vec<T> a[kGroup];
#pragma GCC unroll 4
            for (int i = 0; i < kGroup; ++i) a[i] = dt * load<T>(rate + (m + i) * kScanChannels);
            decay<T, kInRange, kGroup>(a);
#pragma GCC unroll 4
            for (int i = 0; i < kGroup; ++i) {
                const int n = m + i;
                h[n] =
                    a[i] * h[n] + dtu * input_vector<kConstB>(tile.B, dstate, t, first + n, lane);
                (n % 2 == 0 ? even : odd) +=
                    h[n] * input_vector<kConstC>(tile.C, dstate, t, first + n, lane);
            }
        }
        store<T>(tile.y + t * kScanChannels + lane, even + odd);
    }
    for (int n = 0; n < kStates; ++n) store<T>(state + n * kScanChannels, h[n]);
}

template <class T, bool kConstB, bool kConstC, bool kInRange>
void scan_run(const ScanTile<T>& tile, const NextTile& next, std::int64_t dstate,
              std::int64_t width, std::int64_t begin, std::int64_t end) {
    for (std::int64_t lane = 0; lane < width; lane += kLanes<T>) {
        std::int64_t n = 0;
        // Sixteen states fill 32 registers. Where there are 16, states that lie in memory cost less
        // than more passes over the steps. A constant B or C is rare and stays small.
        if constexpr (!kConstB && !kConstC)
            for (; n + 16 <= dstate; n += 16)
                scan_states<T, 16, kConstB, kConstC, kInRange>(tile, next, dstate, n, lane, begin,
                                                               end);
        for (; n + 4 <= dstate; n += 4)
            scan_states<T, 4, kConstB, kConstC, kInRange>(tile, next, dstate, n, lane, begin, end);
        for (; n < dstate; ++n)
            scan_states<T, 1, kConstB, kConstC, kInRange>(tile, next, dstate, n, lane, begin, end);
    }
}

template <class T, bool kInRange>
auto scan_of(const SelectiveScanArgs& args) {
    return by_inputs(args, []<bool kConstB, bool kConstC>() {
        return &scan_run<T, kConstB, kConstC, kInRange>;
    });
}

// out = y silu(z), in whole vectors of each row.
template <class T>
void gate(const Rows<const T>& y, const Rows<const T>& z, const Rows<T>& out, std::int64_t rows,
          std::int64_t columns) {
    const auto gate_rows = [&]<int kCount>(std::int64_t row,
                                           std::int64_t c) __attribute__((always_inline)) {
        Pack<T, kCount> weight;
        SSM_EACH(i) weight.v[i] = load<T>(z.data + (row + i) * z.pitch + c);
        weight = silu(weight);
        SSM_EACH(i) {
            store<T>(out.data + (row + i) * out.pitch + c,
                     load<T>(y.data + (row + i) * y.pitch + c) * weight.v[i]);
        }
    };
    for (std::int64_t c = 0; c < columns; c += kLanes<T>) {
        std::int64_t row = 0;
        for (; row + 4 <= rows; row += 4) gate_rows.template operator()<4>(row, c);
        for (; row < rows; ++row) gate_rows.template operator()<1>(row, c);
    }
}

// y = tile silu(z), where the rows of the planes are those of the tile. `spare` is another tile.
template <class T>
void store_gated(const Plane& y, const Plane& z, T* tile, T* spare, std::int64_t rows,
                 std::int64_t columns) {
    const bool direct = is_dense<T>(y, columns);
    gate<T>({tile, kTilePitch}, rows_of(z, spare, kTilePitch, rows, columns),
            direct ? Rows<T>{static_cast<T*>(y.data), y.row_stride} : Rows<T>{tile, kTilePitch},
            rows, columns);
    if (!direct) store_tile(y, tile, kTilePitch, rows, columns);
}

SSM_INLINE Plane transposed(const Plane& plane) {
    return {plane.data, plane.dtype, plane.column_stride, plane.row_stride};
}

// Skipped steps give 0, whatever their inputs hold.
template <class T>
void clear_gaps(const ScanTile<T>& tile, const Run* run, const Run* end_run, std::int64_t t0,
                std::int64_t steps) {
    const auto clear = [&](std::int64_t begin, std::int64_t end) {
        if (begin < end)
            std::memset(tile.y + begin * kScanChannels, 0,
                        sizeof(T) * static_cast<std::size_t>((end - begin) * kScanChannels));
    };
    std::int64_t done = 0;
    for (; run < end_run && run->begin < t0 + steps; ++run) {
        clear(done, run->begin - t0);
        done = run->end - t0;
    }
    clear(done, steps);
}

// One tile of one block. `run` is the first run of the row that ends behind the tile's begin.
template <class T>
void scan_tile(const SelectiveScanArgs& args, const Runs& runs, const ScanShape& shape,
               const ScanBlock& block, const ScanTile<T>& tile, const NextTile& next,
               const Run* run, std::int64_t t0, std::int64_t steps) {
    const Run* const first_run = run;
    const Run* const end_run = runs.runs + runs.row_begin[block.row + 1];
    const bool in_range = tile.load_inputs(args, block, t0, steps);
    const auto scan = in_range ? scan_of<T, kBoundsExp2<T>>(args) : scan_of<T, false>(args);
    if (args.checkpoints.ndim >= 0)
        store_tile(checkpoint_plane(args.checkpoints, block, t0), tile.h, kScanChannels,
                   shape.dstate, block.width);
    for (; run < end_run && run->begin < t0 + steps; ++run) {
        const std::int64_t begin = max(run->begin - t0, 0), end = min(run->end - t0, steps);
        if (run->begin >= t0) tile.enter(args, shape, block, run->state_in);
        scan(tile, next, shape.dstate, block.padded_width, begin, end);
        if (run->end > t0 + steps) break;
        if (args.last_state.ndim >= 0 && run->state_out != Run::kNone)
            store_tile(channel_state_plane(args.last_state, run->state_out, block.channel), tile.h,
                       kScanChannels, shape.dstate, block.width);
    }
    const Plane y = sequence_plane(args.y, block, t0);
    const bool gated = args.z.ndim >= 0;
    const Plane z = gated ? sequence_plane(args.z, block, t0) : y;
    if (gated && runs.covers_all) {
        if (y.row_stride != 1 || z.row_stride != 1)
            return store_gated(y, z, tile.y, tile.z, steps, block.width);
        // Where steps are adjacent in memory, y is transposed before its gate: then z need not be.
        store_columns(tile.z, kTilePitch, tile.y, kScanChannels, steps, block.width);
        return store_gated(transposed(y), transposed(z), tile.z, tile.y, block.width, steps);
    }
    if (gated)
        gate<T>({tile.y, kScanChannels}, rows_of(z, tile.z, kScanChannels, steps, block.width),
                {tile.y, kScanChannels}, steps, block.width);
    if (!runs.covers_all) clear_gaps(tile, first_run, end_run, t0, steps);
    store_tile(y, tile.y, kScanChannels, steps, block.width);
}

// Adjacent blocks of one row go through each stretch of time together: a page of the inputs holds
// only a few steps of all channels.
template <class T>
void scan_blocks(const SelectiveScanArgs& args, const Runs& runs, const ScanShape& shape,
                 std::int64_t row, std::int64_t first, std::int64_t count, T* memory) {
    ScanBlock blocks[ScanShape::kMostBlocks];
    ScanTile<T> tiles[ScanShape::kMostBlocks];
    for (std::int64_t i = 0; i < count; ++i) {
        blocks[i] = shape.block(row, first + i, kLanes<T>);
        tiles[i] = ScanTile<T>(memory + i * ScanTile<T>::elements(shape.dstate, Keep::outputs),
                               shape.dstate, Keep::outputs);
        tiles[i].clear();
        tiles[i].load_parameters(args, shape, blocks[i]);
        tiles[i].share_steps(tiles[0], args);
    }
    const Run* run = runs.runs + runs.row_begin[row];
    const Run* const end_run = runs.runs + runs.row_begin[row + 1];
    for (std::int64_t t0 = 0; t0 < shape.seqlen; t0 += kScanSteps) {
        const std::int64_t steps = min(kScanSteps, shape.seqlen - t0);
        for (std::int64_t i = 0; i < count; ++i) {
            if (i == 0) tiles[i].load_groups(args, shape, blocks[i], t0, steps);
            const bool is_last = i + 1 == count;
            const ScanBlock& upcoming = blocks[is_last ? 0 : i + 1];
            const std::int64_t t_next = is_last ? t0 + steps : t0;
            const NextTile next({&args.u, &args.delta, &args.z, &args.y}, args.checkpoints, shape,
                                upcoming, t_next);
            scan_tile(args, runs, shape, blocks[i], tiles[i], next, run, t0, steps);
        }
        while (run < end_run && run->end <= t0 + steps) ++run;
    }
}

template <class T>
void scan_rows(const SelectiveScanArgs& args, const Runs& runs, int threads) {
    const ScanShape shape(args);
    // A sequence without steps hands its state on unchanged.
    if (args.last_state.ndim >= 0 && (shape.seqlen == 0 || !runs.covers_all))
        copy_states<T>(args.initial_state, args.last_state, threads);
    if (shape.seqlen == 0) return;
    const std::int64_t most = shape.blocks_per_task(threads);
    const std::int64_t elements = most * ScanTile<T>::elements(shape.dstate, Keep::outputs);
    const std::int64_t per_group = (shape.blocks_per_group + most - 1) / most;
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * threads));
    parallel_for(shape.batch * shape.groups * per_group, threads,
                 [&](std::int64_t task, int thread) {
                     const std::int64_t group = task / per_group % shape.groups;
                     const std::int64_t first = task % per_group * most;
                     scan_blocks<T>(args, runs, shape, task / per_group / shape.groups,
                                    group * shape.blocks_per_group + first,
                                    min(most, shape.blocks_per_group - first),
                                    static_cast<T*>(scratch.data()) + elements * thread);
                 });
}

}  // namespace

void selective_scan_fwd(const SelectiveScanArgs& args, const Runs& runs, int threads) {
    if (args.u.dtype == DType::f64)
        scan_rows<double>(args, runs, threads);
    else
        scan_rows<float>(args, runs, threads);
}

}  // namespace ssm::cpu::SSM_ISA
