// The last launches of the backward of the selective scan: the sums that the blocks left in working
// memory are added in a fixed order.
#pragma once

#include "selective_scan_tile.cuh"

namespace ssm::cuda {

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
