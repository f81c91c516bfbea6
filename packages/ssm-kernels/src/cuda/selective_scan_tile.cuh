// What the forward and the backward of the selective scan share: how work is cut, how a tile of
// steps and channels comes into shared memory, and how a thread follows the sequences of its row.
#pragma once

#include <ssm/selective_scan.h>

#include <numeric>

#include "launch.cuh"
#include "numerics.cuh"
#include "sequences.cuh"

namespace ssm::cuda {

constexpr const char* kScanOp = "selective_scan";
constexpr int kScanTile = kSelectiveScanCheckpoint;  // steps of a tile
constexpr int kScanStates = 4;                       // of one thread
constexpr int kScanThreads = 256;

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
    std::int64_t blocks_along;              // blocks along all channels
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
    in.blocks_along = groups * in.group_tiles;

    // Cutting walks the steps twice: it takes more than two segments to gain.
    const Segments cut = cut_segments(in.seqlen, kScanTile, in.batch * in.blocks_along, 4);
    in.segments = cut.count, in.segment_steps = cut.steps;
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

/// What a segment does to the state, or the gradient of one, that enters it: decay * entering +
/// own, with decay = exp(A * time) or, where `open` is 0 because a sequence began, 0.
template <class Real>
struct SegmentEnds {
    Real* own = nullptr;   // (B, segments, D, N)
    Real* time = nullptr;  // (B, segments, D)
    Real* open = nullptr;  // (B, segments, D)

    SegmentEnds() = default;
    SegmentEnds(const ScanInputs& in, Real* memory) {
        const std::int64_t channels = in.batch * in.segments * in.dim;
        own = memory, time = own + channels * in.dstate, open = time + channels;
    }
    /// Elements, as many as keep what comes after them aligned.
    static std::int64_t size(const ScanInputs& in) {
        const std::int64_t all = in.batch * in.segments * in.dim * (in.dstate + 2);
        return in.segments > 1 ? (all + 3) / 4 * 4 : 0;
    }
    /// What `segment` makes of an entering value; A in units of log2.
    SSM_DEVICE Real pass(const ScanInputs& in, std::int64_t row, std::int64_t segment,
                         std::int64_t channel, std::int64_t state, Real A, Real entering) const {
        const std::int64_t place = (row * in.segments + segment) * in.dim + channel;
        const Real added = own[place * in.dstate + state];
        return open[place] != 0 ? exp2_of(A * time[place]) * entering + added : added;
    }
};

/// to = from, or 0: states (S, D, N) of sequences without steps.
template <class Real>
struct CopyStates {
    static constexpr int kThreads = kScanThreads;
    static constexpr int kBlocksPerUnit = 1;
    struct Registers {};

    Plane<3> from, to;
    std::int64_t dim, dstate, elements;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t element = index * kThreads + thread;
            if (element >= elements) return;
            const std::int64_t state = element % dstate, channel = element / dstate % dim;
            const std::int64_t sequence = element / dstate / dim;
            const auto offset = [&](const Plane<3>& tensor) {
                return sequence * tensor.stride[0] + channel * tensor.stride[1] +
                       state * tensor.stride[2];
            };
            to.store(offset(to), from ? from.template load<Real>(offset(from)) : Real(0));
        });
    }
};

template <class Real>
void copy_states(const ScanInputs& in, const Plane<3>& from, const Plane<3>& to,
                 const Device& device, const Exec& exec) {
    const CopyStates<Real> kernel{from, to, in.dim, in.dstate, in.num_states * in.dim * in.dstate};
    launch<Real>(kScanOp, kernel, (kernel.elements + kScanThreads - 1) / kScanThreads, device,
                 exec);
}

/// Blocks of one launch over all channels and segments.
inline std::int64_t scan_parts(const ScanInputs& in) {
    return in.batch * in.segments * in.blocks_along;
}

/// Steps of a tile as bits.
struct ScanMarks {
    std::uint32_t skipped, begins;
};

SSM_DEVICE ScanMarks scan_marks(const ScanInputs& in, std::int64_t row, std::int64_t begin,
                                int steps) {
    ScanMarks marks{0, 0};
    if (!in.seq_idx) return marks;
    std::int32_t sequence = sequence_before(in, row, begin);
    for (int step = 0; step < steps; ++step) {
        const std::int32_t next = sequence_at(in, row, begin + step);
        if (next < 0) marks.skipped |= 1u << step;
        if (next < 0 || next == sequence) continue;
        // The first sequence of a row goes on from the state of the row.
        if (sequence >= 0 || in.state_per_sequence) marks.begins |= 1u << step;
        sequence = next;
    }
    return marks;
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

/// Copies the states of one slab of B or C into shared memory, as (step, state). What does not
/// exist is zero, and so are the steps whose bit is in `skipped`.
template <class Real, int kSlab, class Block>
SSM_DEVICE void load_states(const ScanInputs& in, Block& block, const ScanPart& part, int thread,
                            int place, const Plane<4>& tensor, std::int64_t group_dim,
                            std::int64_t begin, int slab, int steps, std::uint32_t skipped = 0) {
    const bool steps_are_neighbours = tensor.stride[3] == 1;
    const std::int64_t first = std::int64_t{slab} * kSlab;
    const std::int64_t offset = part.row * tensor.stride[0] +
                                part.first_channel / group_dim * tensor.stride[1] +
                                first * tensor.stride[2] + begin * tensor.stride[3];
    visit(tensor.dtype, [&](auto* type) {
        using Memory = std::remove_pointer_t<decltype(type)>;
        const Memory* from = static_cast<const Memory*>(tensor.data) + offset;
        SSM_UNROLL_TWICE
        for (int element = thread; element < kScanTile * kSlab; element += kScanThreads) {
            const int step = steps_are_neighbours ? element % kScanTile : element / kSlab;
            const int state = steps_are_neighbours ? element / kScanTile : element % kSlab;
            const bool exists = step < steps && first + state < in.dstate && !(skipped >> step & 1);
            block.write(place + step * kSlab + state,
                        exists ? static_cast<Real>(widen(
                                     from[state * tensor.stride[2] + step * tensor.stride[3]]))
                               : Real(0));
        }
    });
}

/// The states that one thread owns in one slab: the first `states` of state, state + 1, ...
struct ScanOwned {
    std::int64_t channel, state;
    int states;
};

template <int kLanes>
SSM_DEVICE ScanOwned owned_by(const ScanInputs& in, const ScanPart& part, int thread, int slab) {
    ScanOwned owned{part.first_channel + thread / kLanes,
                    (std::int64_t{slab} * kLanes + thread % kLanes) * kScanStates, kScanStates};
    if (thread / kLanes >= part.channels || owned.state >= in.dstate)
        owned.states = 0;
    else if (in.dstate - owned.state < kScanStates)
        owned.states = static_cast<int>(in.dstate - owned.state);
    return owned;
}

/// One of the owned elements of states (S, D, N); 0 where there is none.
template <class Real>
SSM_DEVICE Real state_at(const Plane<3>& states, std::int64_t sequence, const ScanOwned& owned,
                         int s) {
    if (!states || s >= owned.states) return 0;
    return states.template load<Real>(sequence * states.stride[0] +
                                      owned.channel * states.stride[1] +
                                      (owned.state + s) * states.stride[2]);
}

template <class Real>
SSM_DEVICE void put_states(const Plane<3>& states, std::int64_t sequence, const ScanOwned& owned,
                           const Real (&values)[kScanStates]) {
    if (!states) return;
    SSM_UNROLL
    for (int s = 0; s < kScanStates; ++s)
        if (s < owned.states)
            states.store(sequence * states.stride[0] + owned.channel * states.stride[1] +
                             (owned.state + s) * states.stride[2],
                         values[s]);
}

}  // namespace ssm::cuda
