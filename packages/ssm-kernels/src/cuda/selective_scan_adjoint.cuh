// The selective scan backwards in one tile of one block: the states inside are computed again from
// its checkpoint, and then the adjoint runs back over them, group by group.
#pragma once

#include "selective_scan_gradients.cuh"

namespace ssm::cuda {

template <class Real, int kLanes, bool kEnds>
struct ScanAdjoint : ScanGradientTile<Real, kLanes, kEnds> {
    using Base = ScanGradientTile<Real, kLanes, kEnds>;
    using Base::channel_of, Base::state_of, Base::exists, Base::read_states;
    using Base::in, Base::out, Base::kThreads, Base::kSlab, Base::kRow;
    using Base::kB, Base::kC, Base::kU, Base::kDt, Base::kDp, Base::kStarts;
    using Base::kGroup, Base::kPairs, Base::kSums, Base::kWarps;
    using typename Base::Registers;

    /// Runs a tile forward: keeps the states that enter its groups and, for dz, p = sum_n C h.
    template <class Block>
    SSM_DEVICE void replay(Block& block, const ScanPart& part, int slab, std::int64_t begin,
                           int steps, const ScanMarks& marks) const {
        block.each([&](int thread, Registers& r) {
            const std::int64_t tiles = (in.seqlen + kScanTile - 1) / kScanTile;
            const Real* saved =
                out.checkpoints + (part.row * tiles + begin / kScanTile) * in.dstate * in.dim;
            SSM_UNROLL
            for (int s = 0; s < kScanStates; ++s)
                r.h[s] = exists(part, thread, slab, s)
                             ? saved[(state_of(thread, slab) + s) * in.dim + part.first_channel +
                                     channel_of(thread)]
                             : Real(0);
        });
        for (int group = 0; group * kGroup < steps; ++group) {
            const int first = group * kGroup;
            block.each([&](int thread, Registers& r) {
                SSM_UNROLL
                for (int s = 0; s < kScanStates; ++s)
                    block.write(kStarts + (group * kScanStates + s) * kThreads + thread, r.h[s]);
                // The last group is not left by this way, unless its outputs are wanted.
                if (!in.z && first + kGroup >= steps) return;
                SSM_UNROLL
                for (int k = 0; k < kGroup; ++k) {
                    Real decay[kScanStates], before[kScanStates], C[kScanStates];
                    forward_step(block, part, thread, slab, begin, first + k, marks, r, decay,
                                 before);
                    read_states(block, thread, first + k, in.constant_C, kC, C);
                    r.p[k] = 0;
                    SSM_UNROLL
                    for (int s = 0; s < kScanStates; ++s) r.p[k] += r.h[s] * C[s];
                }
            });
            if (!in.z) continue;
            block.template scatter_sums<kGroup, 4, 1>(
                [](Registers& r) -> Real(&)[kGroup] { return r.p; });
            block.template sum_lanes<kLanes / 4, 4>([](Registers& r) -> Real& { return r.p[0]; });
            block.each([&](int thread, Registers& r) {
                const int lane = thread % kLanes;
                if (lane >= kGroup) return;
                const int place = Base::kP + (first + lane) * kRow + channel_of(thread);
                block.write(place, slab > 0 ? block.read(place) + r.p[0] : r.p[0]);
            });
        }
    }

    /// The gradients of one group of steps.
    template <class Block>
    SSM_DEVICE void go_back(Block& block, const ScanPart& part, int slab, std::int64_t begin,
                            int group, const ScanMarks& marks) const {
        const int first = group * kGroup;
        const int sums = Base::kPartial + group % 2 * 2 * kWarps * kSums;
        if constexpr (!kEnds) {
            block.each([&](int thread, Registers& r) {
                SSM_UNROLL
                for (int s = 0; s < kScanStates; ++s)
                    r.h[s] = block.read(kStarts + (group * kScanStates + s) * kThreads + thread);
                SSM_UNROLL
                for (int k = 0; k < kGroup; ++k) {
                    forward_step(block, part, thread, slab, begin, first + k, marks, r, r.decay[k],
                                 r.before[k]);
                    const Real dp = block.read(kDp + (first + k) * kRow + channel_of(thread));
                    SSM_UNROLL
                    for (int s = 0; s < kScanStates; ++s) {
                        r.products[k * kScanStates + s] = dp * r.h[s];
                    }
                }
                if (in.constant_C) add_products(part, thread, slab, out.dC, r);
            });
            if (!in.constant_C) sum_over_channels(block, sums + kWarps * kSums);
        }
        block.each([&](int thread, Registers& r) {
            SSM_UNROLL
            for (int k = kGroup - 1; k >= 0; --k)
                back_step(block, part, thread, slab, begin, first, k, marks, r);
            if (!kEnds && in.constant_B) add_products(part, thread, slab, out.dB, r);
        });
        if constexpr (kEnds) return;
        if (!in.constant_B) sum_over_channels(block, sums);
        if (!in.constant_B || !in.constant_C) {
            block.barrier();
            block.each([&](int thread, Registers&) {
                if (!in.constant_B)
                    sum_over_warps(block, part, thread, slab, begin + first, sums, out.all_dB);
                if (!in.constant_C)
                    sum_over_warps(block, part, thread, slab, begin + first, sums + kWarps * kSums,
                                   out.all_dC);
            });
        }
        block.template scatter_sums<2 * kGroup, 4, 1>(
            [](Registers& r) -> Real(&)[2 * kGroup] { return r.sums; });
        block.template sum_lanes<kLanes / 4, 4>([](Registers& r) -> Real& { return r.sums[0]; });
        block.template sum_lanes<kLanes / 4, 4>([](Registers& r) -> Real& { return r.sums[1]; });
        block.each([&](int thread, Registers& r) {
            const int lane = thread % kLanes;
            if (lane >= 4) return;
            SSM_UNROLL
            for (int i = 0; i < 2; ++i) {
                // Lanes 0 and 1 hold du of two steps each, lanes 2 and 3 ddt.
                const int place = (first + lane % 2 * 2 + i) * kRow + channel_of(thread);
                const int to = (lane < 2 ? Base::kDu : Base::kDd) + place;
                block.write(to, slab > 0 ? block.read(to) + r.sums[i] : r.sums[i]);
            }
        });
    }

  private:
    /// h after a step from h before it; keeps the latter and the decay where asked.
    template <class Block>
    SSM_DEVICE void forward_step(Block& block, const ScanPart& part, int thread, int slab,
                                 std::int64_t begin, int step, const ScanMarks& marks, Registers& r,
                                 Real (&decay)[kScanStates], Real (&before)[kScanStates]) const {
        const int place = step * kRow + channel_of(thread);
        const Real dt = block.read(kDt + place), input = dt * block.read(kU + place);
        Real B[kScanStates];
        read_states(block, thread, step, in.constant_B, kB, B);
        if (marks.begins >> step & 1) {
            SSM_UNROLL
            for (int s = 0; s < kScanStates; ++s)
                r.h[s] =
                    in.state_per_sequence
                        ? state_at<Real>(in.initial_state, sequence_at(in, part.row, begin + step),
                                         owned_by<kLanes>(in, part, thread, slab), s)
                        : Real(0);
        }
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s) {
            decay[s] = exp2_of(dt * (r.A[s] * static_cast<Real>(kLog2e)));
            before[s] = r.h[s];
            r.h[s] = decay[s] * r.h[s] + input * B[s];
        }
    }

    template <class Block>
    SSM_DEVICE void back_step(Block& block, const ScanPart& part, int thread, int slab,
                              std::int64_t begin, int first, int k, const ScanMarks& marks,
                              Registers& r) const {
        const int step = first + k, place = step * kRow + channel_of(thread);
        const Real dt = block.read(kDt + place), dp = block.read(kDp + place);
        Real B[kScanStates], C[kScanStates], du = 0, ddt = 0;
        read_states(block, thread, step, in.constant_C, kC, C);
        if constexpr (kEnds) {
            SSM_UNROLL
            for (int s = 0; s < kScanStates; ++s)
                r.carry[s] =
                    exp2_of(dt * (r.A[s] * static_cast<Real>(kLog2e))) * (C[s] * dp + r.carry[s]);
            if (slab == 0) r.time += dt;
        } else {
            const Real u = block.read(kU + place);
            read_states(block, thread, step, in.constant_B, kB, B);
            SSM_UNROLL
            for (int s = 0; s < kScanStates; ++s) {
                const Real dh = C[s] * dp + r.carry[s];
                const Real kept = r.decay[k][s] * r.before[k][s];
                r.carry[s] = r.decay[k][s] * dh;
                du += dh * B[s];
                ddt += dh * (r.A[s] * kept + B[s] * u);
                r.dA[s] += dh * dt * kept;
                r.products[k * kScanStates + s] = dh * (dt * u);
            }
            r.sums[k] = du * dt;
            r.sums[kGroup + k] = ddt;
            if (slab == 0) r.dD += dp * u;
        }
        if (marks.begins >> step & 1) begin_sequence(part, thread, slab, begin + step, r);
    }

    /// A sequence began at a step: the gradient goes to its initial state, and the one of the state
    /// before comes from what ended there.
    SSM_DEVICE void begin_sequence(const ScanPart& part, int thread, int slab, std::int64_t t,
                                   Registers& r) const {
        if (slab == 0) r.time = r.open = 0;
        const std::int32_t before = sequence_before(in, part.row, t);
        if (!kEnds && in.state_per_sequence)
            put_states(out.dinitial_state, sequence_at(in, part.row, t),
                       owned_by<kLanes>(in, part, thread, slab), r.carry);
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s)
            r.carry[s] = in.state_per_sequence && before >= 0
                             ? state_at<Real>(out.dlast_state, before,
                                              owned_by<kLanes>(in, part, thread, slab), s)
                             : Real(0);
    }

    /// Adds the products of a group to the sums of a B or C that does not change with time. In
    /// memory: few models have one, and registers are short.
    SSM_DEVICE void add_products(const ScanPart& part, int thread, int slab, Real* sums,
                                 const Registers& r) const {
        const std::int64_t place = (part.row * in.segments + part.segment) * in.dim +
                                   part.first_channel + channel_of(thread);
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s) {
            if (!exists(part, thread, slab, s)) continue;
            Real sum = 0;
            SSM_UNROLL
            for (int k = 0; k < kGroup; ++k) sum += r.products[k * kScanStates + s];
            sums[place * in.dstate + state_of(thread, slab) + s] += sum;
        }
    }

    /// Sums the products of a group over the channels of each warp, as (warp, step, state).
    template <class Block>
    SSM_DEVICE void sum_over_channels(Block& block, int sums) const {
        constexpr int kShared = 32 / kLanes;  // channels of a warp
        constexpr int kKept = kPairs / kShared;
        block.template scatter_sums<kPairs, kShared, kLanes>(
            [](Registers& r) -> Real(&)[kPairs] { return r.products; });
        block.each([&](int thread, Registers& r) {
            const int lane = thread % kLanes, own = thread % 32 / kLanes, warp = thread / 32;
            SSM_UNROLL
            for (int i = 0; i < kKept; ++i) {
                const int pair = own * kKept + i;  // (step, state of the lane)
                block.write(sums + warp * kSums + pair / kScanStates * kSlab + lane * kScanStates +
                                pair % kScanStates,
                            r.products[i]);
            }
        });
    }

    /// Sums over the warps, into the place of this block along the channels.
    template <class Block>
    SSM_DEVICE void sum_over_warps(Block& block, const ScanPart& part, int thread, int slab,
                                   std::int64_t first_step, int sums, Real* to) const {
        const std::int64_t own = part.first_channel / in.group_dim * in.group_tiles +
                                 part.first_channel % in.group_dim / Base::kChannels;
        for (int place = thread; place < kSums; place += kThreads) {
            const std::int64_t step = first_step + place / kSlab;
            const std::int64_t state = std::int64_t{slab} * kSlab + place % kSlab;
            if (step >= part.end || state >= in.dstate) continue;
            Real sum = 0;
            SSM_UNROLL
            for (int warp = 0; warp < kWarps; ++warp)
                sum += block.read(sums + warp * kSums + place);
            to[((part.row * in.blocks_along + own) * in.seqlen + step) * in.dstate + state] = sum;
        }
    }
};

}  // namespace ssm::cuda
