// What the backward of the selective scan reads and writes besides the inputs: the gradients, the
// working memory, and a tile of them in shared memory, with the ways to it and from it.
#pragma once

#include "selective_scan_tile.cuh"

namespace ssm::cuda {

/// Values of a thread that change from slab to slab: its carry and its sums for dA.
constexpr int kScanWaiting = 2 * kScanStates;

/// The gradients, and the sums of the blocks, which later launches add in a fixed order.
template <class Real>
struct ScanGradients {
    Plane<3> dy, du, ddelta, dz;           // (B, D, L)
    Plane<3> dlast_state, dinitial_state;  // (S, D, N)
    const Real* checkpoints;               // (B, ceil(L / kScanTile), N, D)
    Real *dA, *dB, *dC;                    // (B, segments, D, N); dB and dC where constant
    Real *dD, *dbias;                      // (B, segments, D)
    Real *all_dB, *all_dC;                 // (B, blocks along D, L, N), where not constant
    Real* waiting;                         // (block, slab, value, thread)
};

/// Cuts the working memory into pieces; with null for memory it only counts.
template <class Real>
struct Workspace {
    Real* memory;
    std::int64_t used = 0;

    Real* take(bool wanted, std::int64_t elements) {
        if (!wanted) return nullptr;
        const std::int64_t place = used;
        used += (elements + 3) / 4 * 4;
        return memory == nullptr ? nullptr : memory + place;
    }
    void lay_out(const ScanInputs& in, bool with_D, bool with_bias, ScanGradients<Real>& out) {
        const std::int64_t channels = in.batch * in.segments * in.dim;
        const std::int64_t streams = in.batch * in.blocks_along * in.seqlen * in.dstate;
        const std::int64_t slab = kMostLanes * kScanStates;
        const std::int64_t slabs = (in.dstate + slab - 1) / slab;
        out.dA = take(true, channels * in.dstate);
        out.dB = take(in.constant_B, channels * in.dstate);
        out.dC = take(in.constant_C, channels * in.dstate);
        out.dD = take(with_D, channels);
        out.dbias = take(with_bias, channels);
        out.all_dB = take(!in.constant_B, streams);
        out.all_dC = take(!in.constant_C, streams);
        out.waiting = take(slabs > 1, scan_parts(in) * slabs * kScanWaiting * kScanThreads);
    }
};

template <class Real>
std::int64_t workspace_bytes(const ScanInputs& in) {
    Workspace<Real> workspace{nullptr, SegmentEnds<Real>::size(in)};
    ScanGradients<Real> unused{};
    workspace.lay_out(in, static_cast<bool>(in.D), static_cast<bool>(in.dt_bias), unused);
    return workspace.used * static_cast<std::int64_t>(sizeof(Real));
}

/// What a block has of a tile and of one slab of its states: its places in shared memory and the
/// registers of its threads. kEnds: only the ends of the segments are wanted.
template <class Real, int kLanes, bool kEnds>
struct ScanGradientTile {
    static constexpr int kThreads = kScanThreads;
    static constexpr int kChannels = kThreads / kLanes;
    static constexpr int kSlab = kLanes * kScanStates;
    static constexpr int kGroup = 4;  // steps
    static constexpr int kGroups = kScanTile / kGroup;
    static constexpr int kPairs = kGroup * kScanStates;  // steps and states of a thread in a group
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kRow = kChannels + 1;
    static constexpr int kSums = kGroup * kSlab;  // steps and states of a block in a group
    // Places in shared memory; what is read four at a time comes first.
    // B or C of a tile, or, where they are constant, as their threads own them.
    static constexpr int kMatrix =
        kScanTile * kSlab > kThreads* kScanStates ? kScanTile * kSlab : kThreads * kScanStates;
    static constexpr int kB = 0, kC = kB + kMatrix, kStarts = kC + kMatrix;
    static constexpr int kPartial = kStarts + kGroups * kScanStates * kThreads;
    static constexpr int kU = kPartial + 2 * 2 * kWarps * kSums;
    static constexpr int kDt = kU + kScanTile * kRow, kDp = kDt + kScanTile * kRow;
    static constexpr int kP = kDp + kScanTile * kRow, kDu = kP + kScanTile * kRow;
    static constexpr int kDd = kDu + kScanTile * kRow, kEnd = kDd + kScanTile * kRow;
    static_assert(kLanes == kMostLanes || sizeof(Real) > 4 || kEnd * sizeof(Real) <= kSharedOfAll);

    struct Registers {
        Real A[kScanStates], carry[kScanStates];
        Real dA[kScanStates];
        Real h[kScanStates];
        Real decay[kGroup][kScanStates], before[kGroup][kScanStates];
        Real products[kPairs];  // dC or dB of a group, to be summed over channels
        Real sums[2 * kGroup];  // du and ddt of a group, to be summed over states
        Real p[kGroup];
        Real dD, dbias, time, open;
    };

    ScanInputs in;
    ScanGradients<Real> out;
    SegmentEnds<Real> ends;

    std::int64_t shared_size() const { return kEnd; }

    static SSM_DEVICE int channel_of(int thread) { return thread / kLanes; }
    static SSM_DEVICE std::int64_t state_of(int thread, int slab) {
        return std::int64_t{slab} * kSlab + thread % kLanes * kScanStates;
    }

    SSM_DEVICE bool exists(const ScanPart& part, int thread, int slab, int s) const {
        return s < owned_by<kLanes>(in, part, thread, slab).states;
    }
    SSM_DEVICE Real decay_rate(const ScanPart& part, int thread, int slab, int s) const {
        if (!exists(part, thread, slab, s)) return 0;
        return in.A.template load<Real>((part.first_channel + channel_of(thread)) * in.A.stride[0] +
                                        (state_of(thread, slab) + s) * in.A.stride[1]);
    }

    /// u, dt and dp = dy silu(z): zero where there is no step, or one that is skipped.
    template <class Block>
    SSM_DEVICE void load(Block& block, const ScanPart& part, int thread, std::int64_t begin,
                         int steps, std::uint32_t skipped) const {
        const bool along_steps = in.u.stride[2] == 1;
        load_tile<Real, kChannels>(block, thread, kU, in.u, part, begin, steps, along_steps);
        load_tile<Real, kChannels>(block, thread, kDt, in.delta, part, begin, steps, along_steps);
        load_tile<Real, kChannels>(block, thread, kDp, out.dy, part, begin, steps, along_steps);
        add_bias<Real, kChannels>(in, block, thread, kDt, part, along_steps);
        each_element<kChannels>(thread, along_steps, [&](int step, int channel) {
            const int place = step * kRow + channel;
            const bool counts = step < steps && channel < part.channels && !(skipped >> step & 1);
            const Real delta = block.read(kDt + place);
            block.write(kDt + place, !counts ? Real(0) : in.softplus ? softplus(delta) : delta);
            if (!counts) {
                block.write(kU + place, 0);
                block.write(kDp + place, 0);
            } else if (in.z) {
                const Real z = in.z.template load<Real>(
                    part.row * in.z.stride[0] + (part.first_channel + channel) * in.z.stride[1] +
                    (begin + step) * in.z.stride[2]);
                block.write(kDp + place, block.read(kDp + place) * silu(z));
            }
        });
    }

    /// A, B and C of one slab.
    template <class Block>
    SSM_DEVICE void load_slab(Block& block, const ScanPart& part, int thread, std::int64_t begin,
                              int slab, int steps, std::uint32_t skipped, Registers& r) const {
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s) {
            r.A[s] = decay_rate(part, thread, slab, s);
            const std::int64_t channel = part.first_channel + channel_of(thread);
            const auto constant = [&](const Plane<4>& tensor) {
                return exists(part, thread, slab, s)
                           ? tensor.template load<Real>(channel * tensor.stride[0] +
                                                        (state_of(thread, slab) + s) *
                                                            tensor.stride[1])
                           : Real(0);
            };
            if (in.constant_B) block.write(kB + thread * kScanStates + s, constant(in.B));
            if (in.constant_C) block.write(kC + thread * kScanStates + s, constant(in.C));
        }
        if (!in.constant_B && !kEnds)
            load_states<Real, kSlab>(in, block, part, thread, kB, in.B, in.group_dim_B, begin, slab,
                                     steps, skipped);
        if (!in.constant_C)
            load_states<Real, kSlab>(in, block, part, thread, kC, in.C, in.group_dim_C, begin, slab,
                                     steps, skipped);
    }

    template <class Block>
    SSM_DEVICE void read_states(Block& block, int thread, int step, bool is_constant, int place,
                                Real (&values)[kScanStates]) const {
        block.read4(is_constant ? place + thread * kScanStates
                                : place + step * kSlab + thread % kLanes * kScanStates,
                    values);
    }

    /// du, ddelta and dz of a tile.
    template <class Block>
    SSM_DEVICE void store(Block& block, const ScanPart& part, int thread, std::int64_t begin,
                          int steps, std::uint32_t skipped) const {
        const bool along_steps = out.du.stride[2] == 1;
        each_element<kChannels>(thread, along_steps, [&](int step, int channel) {
            if (step >= steps || channel >= part.channels) return;
            const int place = step * kRow + channel;
            const std::int64_t d = part.first_channel + channel, t = begin + step;
            const bool counts = !(skipped >> step & 1);
            const auto offset = [&](const Plane<3>& tensor) {
                return part.row * tensor.stride[0] + d * tensor.stride[1] + t * tensor.stride[2];
            };
            const Real D = in.D ? in.D.template load<Real>(d * in.D.stride[0]) : Real(0);
            const Real u = block.read(kU + place);
            block.write(kDu + place,
                        counts ? block.read(kDu + place) + D * block.read(kDp + place) : Real(0));
            Real ddelta = counts ? block.read(kDd + place) : Real(0);
            // The slope of softplus: 1 / (1 + exp(-delta)) = 1 - exp(-dt).
            if (in.softplus) ddelta *= counts ? -expm1_of(-block.read(kDt + place)) : Real(0);
            block.write(kDd + place, ddelta);
            if (!out.dz) return;
            Real dz = 0;
            if (counts) {
                const Real z = in.z.template load<Real>(offset(in.z));
                const Real p = block.read(kP + place) + D * u;
                dz = out.dy.template load<Real>(offset(out.dy)) * p * silu_slope(z, sigmoid(z));
            }
            out.dz.store(offset(out.dz), dz);
        });
        store_tile<Real, kChannels>(block, thread, kDu, out.du, part, begin, steps, along_steps);
        store_tile<Real, kChannels>(block, thread, kDd, out.ddelta, part, begin, steps,
                                    along_steps);
    }
};

}  // namespace ssm::cuda
