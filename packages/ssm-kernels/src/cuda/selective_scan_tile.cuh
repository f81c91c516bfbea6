// What the forward and the backward of the selective scan share: how work is cut, how a tile of
// steps and channels comes into shared memory, and how a thread follows the sequences of its row.
#pragma once

#include <ssm/selective_scan.h>

#include <algorithm>
#include <numeric>

#include "launch.cuh"
#include "numerics.cuh"

namespace ssm::cuda {

constexpr int kScanTile = kSelectiveScanCheckpoint;  // steps of a tile
constexpr int kScanStates = 4;                       // of one thread
constexpr int kScanThreads = 256;

/// Blocks that fill a GPU. With fewer the sequence is cut into segments that run at the same time.
/// A number of its own, not the device's, so that no result depends on the device.
constexpr std::int64_t kFullDevice = 264;
constexpr std::int64_t kMostSegments = 32;
constexpr std::int64_t kLeastSegmentTiles = 4;

/// The tensors that both directions read, and the problem in plain numbers. A block owns some
/// channels of one group of one row, and one segment of its steps.
struct ScanInputs {
    Plane<3> u, delta, z;    // (B, D, L)
    Plane<2> A;              // (D, N)
    Plane<4> B, C;           // (D, N) | (B, G, N, L)
    Plane<1> D, dt_bias;     // (D)
    Plane<3> initial_state;  // (S, D, N)
    Plane<2> seq_idx;        // (B, L), int32
    std::int64_t batch, dim, seqlen, dstate, num_states;
    std::int64_t group_dim_B, group_dim_C;  // channels that share B, and C
    std::int64_t group_dim, group_tiles;    // channels that share both, and blocks along them
    std::int64_t segments, segment_steps;   // the latter a multiple of kScanTile
    bool constant_B, constant_C, softplus, state_per_sequence;
};

/// Neighbouring threads that own the states of one channel.
constexpr int kMostLanes = 32;
inline int scan_lanes(std::int64_t dstate) {
    return dstate <= 4 * kScanStates ? 4 : dstate <= 16 * kScanStates ? 16 : kMostLanes;
}

inline ScanInputs scan_inputs(const SelectiveScanArgs& args, std::int64_t num_states) {
    ScanInputs in{};
    in.u = plane<3>(args.u), in.delta = plane<3>(args.delta), in.z = plane<3>(args.z);
    in.A = plane<2>(args.A), in.B = plane<4>(args.B), in.C = plane<4>(args.C);
    in.D = plane<1>(args.D), in.dt_bias = plane<1>(args.dt_bias);
    in.initial_state = plane<3>(args.initial_state), in.seq_idx = plane<2>(args.seq_idx);
    in.batch = args.u.shape[0], in.dim = args.u.shape[1], in.seqlen = args.u.shape[2];
    in.dstate = args.A.shape[1], in.num_states = num_states;
    in.constant_B = args.B.ndim == 2, in.constant_C = args.C.ndim == 2;
    in.softplus = args.softplus, in.state_per_sequence = args.state_per_sequence;
    const std::int64_t groups_B = in.constant_B ? 1 : args.B.shape[1];
    const std::int64_t groups_C = in.constant_C ? 1 : args.C.shape[1];
    const std::int64_t groups = std::lcm(groups_B, groups_C);
    in.group_dim_B = in.dim / groups_B, in.group_dim_C = in.dim / groups_C;
    in.group_dim = in.dim / groups;
    const std::int64_t channels = kScanThreads / scan_lanes(in.dstate);
    in.group_tiles = (in.group_dim + channels - 1) / channels;

    const std::int64_t tiles = (in.seqlen + kScanTile - 1) / kScanTile;
    const std::int64_t blocks = in.batch * groups * in.group_tiles;
    // Cutting walks the steps twice: it takes more than two segments to gain.
    std::int64_t segments = blocks > 0 ? kFullDevice / blocks : 1;
    segments = std::min({segments, kMostSegments, tiles / kLeastSegmentTiles});
    if (segments < 4) segments = 1;
    const std::int64_t segment_tiles = segments == 1 ? tiles : (tiles + segments - 1) / segments;
    in.segment_steps = segment_tiles * kScanTile;
    in.segments = segments == 1 ? 1 : (tiles + segment_tiles - 1) / segment_tiles;
    return in;
}

/// The part of the problem that one block works on.
struct ScanPart {
    std::int64_t row, first_channel, channels;  // channels: of this block, the last may have fewer
    std::int64_t segment, begin, end;           // steps
};

template <int kChannels>
SSM_DEVICE ScanPart scan_part(const ScanInputs& in, std::int64_t index) {
    ScanPart part;
    part.segment = index % in.segments;
    index /= in.segments;
    const std::int64_t tile = index % in.group_tiles;
    index /= in.group_tiles;
    const std::int64_t groups = in.dim / in.group_dim;
    part.first_channel = index % groups * in.group_dim + tile * kChannels;
    part.row = index / groups;
    const std::int64_t left = in.group_dim - tile * kChannels;
    part.channels = left < kChannels ? left : kChannels;
    part.begin = part.segment * in.segment_steps;
    part.end =
        part.begin + in.segment_steps < in.seqlen ? part.begin + in.segment_steps : in.seqlen;
    return part;
}

/// The sequence of a step, or -1 where it is skipped.
SSM_DEVICE std::int32_t sequence_at(const ScanInputs& in, std::int64_t row, std::int64_t step) {
    if (!in.seq_idx) return 0;
    const std::int32_t id = static_cast<const std::int32_t*>(
        in.seq_idx.data)[row * in.seq_idx.stride[0] + step * in.seq_idx.stride[1]];
    // The values were not looked at before the launch: one without a state is no sequence.
    return id >= 0 && (!in.state_per_sequence || id < in.num_states) ? id : -1;
}

/// The sequence of the last step before `step` that is not skipped, or -1.
SSM_DEVICE std::int32_t sequence_before(const ScanInputs& in, std::int64_t row, std::int64_t step) {
    std::int32_t id = -1;
    while (step > 0 && id < 0) id = sequence_at(in, row, --step);
    return id;
}

/// The end of the steps from `step` on that are of one sequence, or all skipped; at most `end`.
SSM_DEVICE std::int64_t end_of_run(const ScanInputs& in, std::int64_t row, std::int64_t step,
                                   std::int64_t end) {
    if (!in.seq_idx) return end;
    const std::int32_t id = sequence_at(in, row, step);
    do ++step;
    while (step < end && sequence_at(in, row, step) == id);
    return step;
}

/// Calls use(step, channel) for the elements of a tile that belong to one thread, in an order in
/// which neighbouring threads meet neighbouring memory.
template <int kChannels, class Use>
SSM_DEVICE void each_element(int thread, bool steps_are_neighbours, Use&& use) {
    SSM_UNROLL_TWICE
    for (int i = 0; i < kScanTile * kChannels / kScanThreads; ++i) {
        const int element = i * kScanThreads + thread;
        if (steps_are_neighbours)
            use(element % kScanTile, element / kScanTile);
        else
            use(element / kChannels, element % kChannels);
    }
}

/// The offset of the first element of a tile.
SSM_DEVICE std::int64_t tile_offset(const Plane<3>& tensor, const ScanPart& part,
                                    std::int64_t begin) {
    return part.row * tensor.stride[0] + part.first_channel * tensor.stride[1] +
           begin * tensor.stride[2];
}

/// Copies a tile of (B, D, L) into shared memory as (step, channel) with kChannels + 1 elements to
/// a row, so that both orders of walking it meet different banks. What does not exist is zero.
template <class Real, int kChannels, class Block>
SSM_DEVICE void load_tile(Block& block, int thread, int place, const Plane<3>& tensor,
                          const ScanPart& part, std::int64_t begin, int steps,
                          bool steps_are_neighbours) {
    visit(tensor.dtype, [&](auto* type) {
        using Memory = std::remove_pointer_t<decltype(type)>;
        const Memory* from =
            static_cast<const Memory*>(tensor.data) + tile_offset(tensor, part, begin);
        each_element<kChannels>(thread, steps_are_neighbours, [&](int step, int channel) {
            const bool exists = step < steps && channel < part.channels;
            block.write(place + step * (kChannels + 1) + channel,
                        exists ? static_cast<Real>(widen(
                                     from[channel * tensor.stride[1] + step * tensor.stride[2]]))
                               : Real(0));
        });
    });
}

template <class Real, int kChannels, class Block>
SSM_DEVICE void store_tile(Block& block, int thread, int place, const Plane<3>& tensor,
                           const ScanPart& part, std::int64_t begin, int steps,
                           bool steps_are_neighbours) {
    visit(tensor.dtype, [&](auto* type) {
        using Memory = std::remove_pointer_t<decltype(type)>;
        Memory* to = static_cast<Memory*>(tensor.data) + tile_offset(tensor, part, begin);
        each_element<kChannels>(thread, steps_are_neighbours, [&](int step, int channel) {
            if (step < steps && channel < part.channels)
                narrow(block.read(place + step * (kChannels + 1) + channel),
                       to[channel * tensor.stride[1] + step * tensor.stride[2]]);
        });
    });
}

/// delta -> delta + dt_bias, where a tile of delta lies in shared memory.
template <class Real, int kChannels, class Block>
SSM_DEVICE void add_bias(const ScanInputs& in, Block& block, int thread, int place,
                         const ScanPart& part, bool steps_are_neighbours) {
    if (!in.dt_bias) return;
    each_element<kChannels>(thread, steps_are_neighbours, [&](int step, int channel) {
        if (channel >= part.channels) return;
        const int at = place + step * (kChannels + 1) + channel;
        const std::int64_t offset = (part.first_channel + channel) * in.dt_bias.stride[0];
        block.write(at, block.read(at) + in.dt_bias.template load<Real>(offset));
    });
}

/// Copies the states [first, first + kSlab) of B or C, from `offset` on, into shared memory as
/// (step, state). What does not exist is zero.
template <class Real, int kSlab, class Block>
SSM_DEVICE void load_states(Block& block, int thread, int place, const Plane<4>& tensor,
                            std::int64_t offset, std::int64_t first, std::int64_t dstate,
                            int steps) {
    const bool steps_are_neighbours = tensor.stride[3] == 1;
    visit(tensor.dtype, [&](auto* type) {
        using Memory = std::remove_pointer_t<decltype(type)>;
        const Memory* from = static_cast<const Memory*>(tensor.data) + offset;
        SSM_UNROLL_TWICE
        for (int element = thread; element < kScanTile * kSlab; element += kScanThreads) {
            const int step = steps_are_neighbours ? element % kScanTile : element / kSlab;
            const int state = steps_are_neighbours ? element / kScanTile : element % kSlab;
            const bool exists = step < steps && first + state < dstate;
            block.write(
                place + step * kSlab + state,
                exists ? static_cast<Real>(widen(
                             from[(first + state) * tensor.stride[2] + step * tensor.stride[3]]))
                       : Real(0));
        }
    });
}

}  // namespace ssm::cuda
