// Around the backward of the selective scan: the gradients, the working memory, and the launches
// that add the sums of the blocks.
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

/// to[d, n] = the sum over j of from[j, d, n].
template <class Real>
struct SumParts {
    static constexpr int kThreads = kScanThreads;
    static constexpr int kBlocksPerUnit = 1;
    struct Registers {};

    const Real* from;
    Plane<2> to;
    std::int64_t parts, dim, dstate;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t element = index * kThreads + thread;
            if (element >= dim * dstate) return;
            Real sum = 0;
            for (std::int64_t part = 0; part < parts; ++part)
                sum += from[part * dim * dstate + element];
            to.store(element / dstate * to.stride[0] + element % dstate * to.stride[1], sum);
        });
    }
};

/// to[b, g, n, l] = the sum over the blocks of group g of from[b, block, l, n].
template <class Real>
struct SumBlocks {
    static constexpr int kThreads = kScanThreads;
    static constexpr int kBlocksPerUnit = 1;
    struct Registers {};

    const Real* from;
    Plane<4> to;
    std::int64_t groups, group_blocks, seqlen, dstate, elements;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t element = index * kThreads + thread;
            if (element >= elements) return;
            const std::int64_t of_group = seqlen * dstate, group = element / of_group;
            const std::int64_t place = element % of_group;
            Real sum = 0;
            for (std::int64_t i = 0; i < group_blocks; ++i)
                sum += from[(group * group_blocks + i) * of_group + place];
            to.store(group / groups * to.stride[0] + group % groups * to.stride[1] +
                         place % dstate * to.stride[2] + place / dstate * to.stride[3],
                     sum);
        });
    }
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

template <class Real>
void sum_parts(const ScanInputs& in, const Real* from, const TensorView& to, std::int64_t dstate,
               const Device& device, const Exec& exec) {
    if (from == nullptr) return;
    const SumParts<Real> kernel{from, plane<2>(to), in.batch * in.segments, in.dim, dstate};
    launch<Real>(kScanOp, kernel, (in.dim * dstate + kScanThreads - 1) / kScanThreads, device,
                 exec);
}

template <class Real>
void sum_blocks(const ScanInputs& in, const Real* from, const TensorView& to, const Device& device,
                const Exec& exec) {
    if (from == nullptr) return;
    const std::int64_t groups = to.shape[1];
    const SumBlocks<Real> kernel{from,
                                 plane<4>(to),
                                 groups,
                                 in.blocks_along / groups,
                                 in.seqlen,
                                 in.dstate,
                                 in.batch * groups * in.seqlen * in.dstate};
    launch<Real>(kScanOp, kernel, (kernel.elements + kScanThreads - 1) / kScanThreads, device,
                 exec);
}

}  // namespace ssm::cuda
