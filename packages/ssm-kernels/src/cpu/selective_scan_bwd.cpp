// Selective scan, backward. A task owns some blocks of channels of one row and walks their tiles of
// 32 steps from the last to the first; what rows and channels share is added in a fixed order at
// the end. docs/ops/selective_scan.md#backward
#include "../op/scratch.h"
#include "selective_scan_adjoint.h"

namespace ssm::cpu::SSM_ISA {

namespace {

constexpr std::int64_t kMaxSplits = 8;
constexpr std::int64_t kMostTogether = 4;      // splits of one task
constexpr std::int64_t kMostStates = 1 << 14;  // of one task, as far as possible

// The cut of one call and the working memory that outlives a tile.
template <class T>
struct BackwardPlan {
    ScanShape shape;
    std::int64_t splits;  // parts of a group's channels, each with its own partial dB and dC
    std::int64_t tasks;   // of a group: some neighbouring splits each
    T* sums;              // [row][block] of BlockSums
    T* partial_dB;        // [split][row][group][step][state]
    T* partial_dC;

    BackwardPlan(const SelectiveScanArgs& args, int threads)
        : shape(args),
          splits(min(kMaxSplits, shape.blocks_per_group)),
          tasks(splits),
          sums(nullptr),
          partial_dB(nullptr),
          partial_dC(nullptr) {
        // Channels that are neighbours in memory share pages: as few tasks as leave work for all
        // threads. No sum crosses a split before the end, so that the cut changes no result.
        if (args.u.stride[1] != 1 || splits == 0) return;
        const std::int64_t states = shape.blocks_per_group * kScanChannels * shape.dstate;
        const std::int64_t fewest =
            max((splits + kMostTogether - 1) / kMostTogether, min(splits, states / kMostStates));
        tasks = fewest_for_all(fewest, splits, shape.batch * shape.groups, threads);
    }

    std::int64_t first_split(std::int64_t task) const { return task * splits / tasks; }
    std::int64_t most_blocks() const {  // of a task
        if (tasks == 0) return 0;
        return (splits + tasks - 1) / tasks * ((shape.blocks_per_group + splits - 1) / splits);
    }
    /// The first block of a part of a group's channels.
    std::int64_t first_block(std::int64_t group, std::int64_t split) const {
        return group * shape.blocks_per_group + split * shape.blocks_per_group / splits;
    }
    std::int64_t sum_elements() const {
        return shape.batch * shape.blocks_per_row() * BlockSums<T>::elements(shape.dstate);
    }
    std::int64_t partial_elements() const {
        return splits * shape.batch * shape.groups * shape.dstate * shape.seqlen;
    }
    BlockSums<T> block_sums(std::int64_t row, std::int64_t index) const {
        return {
            sums + (row * shape.blocks_per_row() + index) * BlockSums<T>::elements(shape.dstate),
            shape.dstate};
    }
    T* partial(T* base, std::int64_t split, std::int64_t row, std::int64_t group) const {
        return base +
               ((split * shape.batch + row) * shape.groups + group) * shape.dstate * shape.seqlen;
    }
};

// Some parts of the channels of one group of one row, over all of its tiles.
template <class T>
void differentiate_splits(const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
                          const Runs& runs, const BackwardPlan<T>& plan, std::int64_t row,
                          std::int64_t group, std::int64_t first_split, std::int64_t last_split,
                          T* memory) {
    const ScanShape& shape = plan.shape;
    ScanTile<T> tile(memory, shape.dstate, Keep::inputs);
    const GradTile<T> grad(tile.end, shape.dstate);
    tile.clear();
    T* const parameters = tile.end + GradTile<T>::elements(shape.dstate);
    const std::int64_t each = ScanTile<T>::parameter_elements(shape.dstate);
    const std::int64_t first = plan.first_block(group, first_split);
    const std::int64_t last = plan.first_block(group, last_split);
    std::memset(parameters, 0, sizeof(T) * static_cast<std::size_t>((last - first) * each));
    for (std::int64_t index = first; index < last; ++index) {
        std::memset(plan.block_sums(row, index).dh, 0,
                    sizeof(T) * static_cast<std::size_t>(BlockSums<T>::elements(shape.dstate)));
        tile.place_parameters(args, parameters + (index - first) * each, shape.dstate);
        tile.load_parameters(args, shape, shape.block(row, index, kLanes<T>));
    }
    const auto lane_bytes =
        sizeof(T) * static_cast<std::size_t>(lane_sums<T>(shape.dstate) * kScanSteps * kLanes<T>);
    const Run* after = runs.runs + runs.row_begin[row + 1];
    const Run* const first_run = runs.runs + runs.row_begin[row];
    for (std::int64_t t0 = (shape.seqlen - 1) / kScanSteps * kScanSteps;
         t0 >= 0 && t0 < shape.seqlen; t0 -= kScanSteps) {
        const std::int64_t steps = min(kScanSteps, shape.seqlen - t0);
        while (after > first_run && (after - 1)->begin >= t0 + steps) --after;
        std::int64_t split = first_split;
        for (std::int64_t index = first; index < last; ++index) {
            const ScanBlock block = shape.block(row, index, kLanes<T>);
            if (index == plan.first_block(group, split)) {
                std::memset(grad.lane_dB, 0, lane_bytes);
                std::memset(grad.lane_dC, 0, lane_bytes);
            }
            // The lanes beyond a narrow block's width enter the sums of dB and dC: they must be
            // zero.
            if (block.width < block.padded_width) {
                const T* const end = tile.h + shape.dstate * kScanChannels;
                std::memset(tile.begin, 0, sizeof(T) * static_cast<std::size_t>(end - tile.begin));
                std::memset(grad.dy, 0, sizeof(T) * static_cast<std::size_t>(ScanTile<T>::kArea));
            }
            if (index == first) tile.load_groups(args, shape, block, t0, steps);
            tile.place_parameters(args, parameters + (index - first) * each, shape.dstate);
            const bool in_range = tile.load_inputs(args, block, t0, steps);
            load_output_gradient(args, grads, tile, grad, block, t0, steps);
            const bool is_last = index + 1 == last;
            const ScanBlock upcoming = shape.block(row, is_last ? first : index + 1, kLanes<T>);
            const std::int64_t t_next = is_last ? t0 - kScanSteps : t0;
            const NextTile next(
                {&args.u, &args.delta, &grads.dy, &grads.du, &grads.ddelta, &args.z, &grads.dz},
                args.checkpoints, shape, upcoming, t_next);
            differentiate_tile(args, grads, runs, shape, block, tile, grad,
                               plan.block_sums(row, index), next, t0, steps, in_range, after);
            store_tile(sequence_plane(grads.du, block, t0), grad.ddtu, kScanChannels, steps,
                       block.width);
            store_tile(sequence_plane(grads.ddelta, block, t0), grad.ddt, kScanChannels, steps,
                       block.width);
            if (args.z.ndim >= 0)
                store_tile(sequence_plane(grads.dz, block, t0), grad.dz, kScanChannels, steps,
                           block.width);
            if (index + 1 < plan.first_block(group, split + 1)) continue;
            if (args.B.ndim == 4)
                reduce_lanes(plan.partial(plan.partial_dB, split, row, group) + t0 * shape.dstate,
                             grad.lane_dB, shape.dstate, steps);
            if (args.C.ndim == 4)
                reduce_lanes(plan.partial(plan.partial_dC, split, row, group) + t0 * shape.dstate,
                             grad.lane_dC, shape.dstate, steps);
            ++split;
        }
    }
}

// dB or dC (B, G, N, L) from the partial sums, in the order of groups and splits.
template <class T>
void reduce_partials(const BackwardPlan<T>& plan, T* partials, const TensorView& out, T* local,
                     std::int64_t per_thread, int threads) {
    const ScanShape& shape = plan.shape;
    const std::int64_t groups = out.shape[1], dstate = shape.dstate;
    const std::int64_t merged = shape.groups / groups;  // groups of channels per group of `out`
    const std::int64_t tiles = (shape.seqlen + kScanSteps - 1) / kScanSteps;
    parallel_for(shape.batch * groups * tiles, threads, [&](std::int64_t task, int thread) {
        const std::int64_t t0 = task % tiles * kScanSteps, group = task / tiles % groups;
        const std::int64_t row = task / tiles / groups, steps = min(kScanSteps, shape.seqlen - t0);
        T* const total = local + per_thread * thread;
        std::memset(total, 0, sizeof(T) * static_cast<std::size_t>(steps * dstate));
        for (std::int64_t part = 0; part < merged * plan.splits; ++part) {
            const T* const from = plan.partial(partials, part % plan.splits, row,
                                               group * merged + part / plan.splits) +
                                  t0 * dstate;
            for (std::int64_t i = 0; i < steps * dstate; ++i) total[i] += from[i];
        }
        store_tile(plane_at(out, row * out.stride[0] + group * out.stride[1] + t0 * out.stride[3],
                            out.stride[3], out.stride[2]),
                   total, dstate, steps, dstate);
    });
}

// Adds the rows' sums of one block in order and stores the gradients that belong to channels.
template <class T>
void reduce_rows(const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
                 const BackwardPlan<T>& plan, std::int64_t index, T* memory) {
    const ScanShape& shape = plan.shape;
    const ScanBlock block = shape.block(0, index, kLanes<T>);
    const std::int64_t elements = BlockSums<T>::elements(shape.dstate);
    const BlockSums<T> total(memory, shape.dstate);
    std::memset(memory, 0, sizeof(T) * static_cast<std::size_t>(elements));
    for (std::int64_t row = 0; row < shape.batch; ++row) {
        const T* const from = plan.block_sums(row, index).dh;
        for (std::int64_t i = 0; i < elements; ++i) memory[i] += from[i];
    }
    store_tile(channel_state_plane(grads.dA, 0, block.channel), total.dA, kScanChannels,
               shape.dstate, block.width);
    if (args.B.ndim == 2)
        store_tile(channel_state_plane(grads.dB, 0, block.channel), total.dB, kScanChannels,
                   shape.dstate, block.width);
    if (args.C.ndim == 2)
        store_tile(channel_state_plane(grads.dC, 0, block.channel), total.dC, kScanChannels,
                   shape.dstate, block.width);
    if (args.D.ndim >= 0)
        store_tile(channel_plane(grads.dD, block.channel), total.dD, kScanChannels, 1, block.width);
    if (args.dt_bias.ndim >= 0)
        store_tile(channel_plane(grads.ddt_bias, block.channel), total.dbias, kScanChannels, 1,
                   block.width);
}

template <class T>
void differentiate_rows(const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
                        const Runs& runs, int threads) {
    BackwardPlan<T> plan(args, threads);
    const ScanShape& shape = plan.shape;
    const std::int64_t partial_b = args.B.ndim == 4 ? plan.partial_elements() : 0;
    const std::int64_t partial_c = args.C.ndim == 4 ? plan.partial_elements() : 0;
    const std::int64_t per_thread =
        ScanTile<T>::elements(shape.dstate, Keep::inputs) + GradTile<T>::elements(shape.dstate) +
        plan.most_blocks() * ScanTile<T>::parameter_elements(shape.dstate);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(plan.sum_elements() + partial_b +
                                                               partial_c + per_thread * threads));
    plan.sums = static_cast<T*>(scratch.data());
    plan.partial_dB = plan.sums + plan.sum_elements();
    plan.partial_dC = plan.partial_dB + partial_b;
    T* const local = plan.partial_dC + partial_c;
    if (grads.dinitial_state.ndim >= 0 && (shape.seqlen == 0 || !runs.covers_all))
        copy_states<T>(grads.dlast_state, grads.dinitial_state, threads);
    const std::int64_t tasks = plan.tasks;
    parallel_for(shape.batch * shape.groups * tasks, threads, [&](std::int64_t task, int thread) {
        differentiate_splits(args, grads, runs, plan, task / (shape.groups * tasks),
                             task / tasks % shape.groups, plan.first_split(task % tasks),
                             plan.first_split(task % tasks + 1), local + per_thread * thread);
    });
    if (args.B.ndim == 4)
        reduce_partials(plan, plan.partial_dB, grads.dB, local, per_thread, threads);
    if (args.C.ndim == 4)
        reduce_partials(plan, plan.partial_dC, grads.dC, local, per_thread, threads);
    parallel_for(shape.blocks_per_row(), threads, [&](std::int64_t index, int thread) {
        reduce_rows(args, grads, plan, index, local + per_thread * thread);
    });
}

}  // namespace

void selective_scan_bwd(const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
                        const Runs& runs, int threads) {
    if (args.u.dtype == DType::f64)
        differentiate_rows<double>(args, grads, runs, threads);
    else
        differentiate_rows<float>(args, grads, runs, threads);
}

}  // namespace ssm::cpu::SSM_ISA
