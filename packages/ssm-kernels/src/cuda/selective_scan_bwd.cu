// The backward of the selective scan on the device: the lane scan of the forward, walked backwards.
// Every tile is run forward once from its saved state, to keep the state of every kGroup-th step,
// and then group by group: forward with all states in registers, and back.
#include "kernels.h"
#include "selective_scan_adjoint.cuh"

namespace ssm::cuda {

namespace {

/// kEnds: only write the ends of the segments.
template <class Real, int kLanes, bool kEnds>
struct Backward {
    static constexpr int kThreads = kScanThreads;
    /// Before Hopper, shared memory has room for one only.
    static constexpr int kBlocksPerUnit = kBeforeHopper || (kLanes == kMostLanes && !kEnds) ? 1 : 2;
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
    SSM_DEVICE int slabs() const {
        return kLanes < kMostLanes ? 1 : static_cast<int>((in.dstate + kSlab - 1) / kSlab);
    }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const ScanPart part = scan_part<kChannels>(in, index);
        const int slabs = this->slabs();
        for (int slab = 0; slab < slabs; ++slab)
            block.each([&](int thread, Registers& r) {
                enter(part, thread, slab, r);
                if (slabs > 1) wait(index, slab, thread, r);
            });
        const std::int64_t tiles = (part.end - part.begin + kScanTile - 1) / kScanTile;
        for (std::int64_t tile = tiles - 1; tile >= 0; --tile) {
            const std::int64_t begin = part.begin + tile * kScanTile;
            const int steps =
                static_cast<int>(part.end - begin < kScanTile ? part.end - begin : kScanTile);
            const ScanMarks marks = scan_marks(in, part.row, begin, steps);
            block.barrier();
            block.each([&](int thread, Registers&) {
                load(block, part, fresh(thread), begin, steps, marks.skipped);
            });
            for (int slab = 0; slab < slabs; ++slab) {
                if (slab > 0) block.barrier();
                block.each([&](int thread, Registers& r) {
                    if (slabs > 1) resume(index, slab, fresh(thread), r);
                    load_slab(block, part, fresh(thread), begin, slab, steps, marks.skipped, r);
                });
                block.barrier();
                if constexpr (!kEnds) replay(block, part, slab, begin, steps, marks);
                for (int group = (steps - 1) / kGroup; group >= 0; --group)
                    go_back(block, part, slab, begin, group, marks);
                if (slabs > 1)
                    block.each(
                        [&](int thread, Registers& r) { wait(index, slab, fresh(thread), r); });
            }
            block.barrier();
            if constexpr (!kEnds) {
                block.each([&](int thread, Registers&) {
                    store(block, part, fresh(thread), begin, steps, marks.skipped);
                });
                if (out.dbias == nullptr) continue;
                block.barrier();
                block.each([&](int thread, Registers& r) {
                    for (int step = thread % kLanes; step < steps; step += kLanes)
                        if (channel_of(thread) < part.channels)
                            r.dbias += block.read(kDd + step * kRow + channel_of(thread));
                });
            }
        }
        block.template sum_lanes<kLanes>([](Registers& r) -> Real& { return r.dbias; });
        for (int slab = 0; slab < slabs; ++slab) {
            block.each([&](int thread, Registers& r) {
                if (slabs > 1) resume(index, slab, thread, r);
            });
            leave(block, part, slab);
        }
    }

  private:
    static SSM_DEVICE int channel_of(int thread) { return thread / kLanes; }
    static SSM_DEVICE std::int64_t state_of(int thread, int slab) {
        return std::int64_t{slab} * kSlab + thread % kLanes * kScanStates;
    }

    SSM_DEVICE Real* waiting(std::int64_t index, int slab, int thread) const {
        return out.waiting + ((index * slabs() + slab) * kScanWaiting) * kThreads + thread;
    }
    SSM_DEVICE void wait(std::int64_t index, int slab, int thread, const Registers& r) const {
        Real* values = waiting(index, slab, thread);
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s) {
            values[(2 * s + 0) * kThreads] = r.carry[s];
            values[(2 * s + 1) * kThreads] = r.dA[s];
        }
    }
    SSM_DEVICE void resume(std::int64_t index, int slab, int thread, Registers& r) const {
        const Real* values = waiting(index, slab, thread);
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s) {
            r.carry[s] = values[(2 * s + 0) * kThreads];
            r.dA[s] = values[(2 * s + 1) * kThreads];
        }
    }

    SSM_DEVICE bool exists(const ScanPart& part, int thread, int slab, int s) const {
        return s < owned_by<kLanes>(in, part, thread, slab).states;
    }
    SSM_DEVICE Real decay_rate(const ScanPart& part, int thread, int slab, int s) const {
        if (!exists(part, thread, slab, s)) return 0;
        return in.A.template load<Real>((part.first_channel + channel_of(thread)) * in.A.stride[0] +
                                        (state_of(thread, slab) + s) * in.A.stride[1]);
    }

    /// The gradient of the state that leaves the segment.
    SSM_DEVICE void enter(const ScanPart& part, int thread, int slab, Registers& r) const {
        r.dD = r.dbias = r.time = 0;
        r.open = 1;
        const std::int32_t last =
            in.state_per_sequence ? sequence_before(in, part.row, in.seqlen) : 0;
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s) {
            r.dA[s] = r.carry[s] = 0;
            if (kEnds) continue;
            if (last >= 0)
                r.carry[s] =
                    state_at<Real>(out.dlast_state, in.state_per_sequence ? last : part.row,
                                   owned_by<kLanes>(in, part, thread, slab), s);
            if (!exists(part, thread, slab, s)) continue;
            const std::int64_t at = ((part.row * in.segments + part.segment) * in.dim +
                                     part.first_channel + channel_of(thread)) *
                                        in.dstate +
                                    state_of(thread, slab) + s;
            if (in.constant_B) out.dB[at] = 0;
            if (in.constant_C) out.dC[at] = 0;
            const Real A = decay_rate(part, thread, slab, s) * static_cast<Real>(kLog2e);
            for (std::int64_t segment = in.segments - 1; segment > part.segment; --segment)
                r.carry[s] =
                    ends.pass(in, part.row, segment, part.first_channel + channel_of(thread),
                              state_of(thread, slab) + s, A, r.carry[s]);
        }
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
                const int place = kP + (first + lane) * kRow + channel_of(thread);
                block.write(place, slab > 0 ? block.read(place) + r.p[0] : r.p[0]);
            });
        }
    }

    /// The gradients of one group of steps.
    template <class Block>
    SSM_DEVICE void go_back(Block& block, const ScanPart& part, int slab, std::int64_t begin,
                            int group, const ScanMarks& marks) const {
        const int first = group * kGroup;
        const int sums = kPartial + group % 2 * 2 * kWarps * kSums;
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
                const int to = (lane < 2 ? kDu : kDd) + place;
                block.write(to, slab > 0 ? block.read(to) + r.sums[i] : r.sums[i]);
            }
        });
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
                                 part.first_channel % in.group_dim / kChannels;
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

    /// What the threads summed over the segment.
    template <class Block>
    SSM_DEVICE void leave(Block& block, const ScanPart& part, int slab) const {
        block.each([&](int thread, Registers& r) {
            if (channel_of(thread) >= part.channels) return;
            const std::int64_t place = (part.row * in.segments + part.segment) * in.dim +
                                       part.first_channel + channel_of(thread);
            SSM_UNROLL
            for (int s = 0; s < kScanStates; ++s) {
                if (!exists(part, thread, slab, s)) continue;
                const std::int64_t at = place * in.dstate + state_of(thread, slab) + s;
                if constexpr (kEnds) {
                    ends.own[at] = r.carry[s];
                } else {
                    out.dA[at] = r.dA[s];
                }
            }
            if (thread % kLanes == 0 && slab == 0) {
                if constexpr (kEnds) {
                    ends.time[place] = r.time;
                    ends.open[place] = r.open;
                } else {
                    if (out.dD != nullptr) out.dD[place] = r.dD;
                    if (out.dbias != nullptr) out.dbias[place] = r.dbias;
                }
            }
            if (!kEnds && !in.state_per_sequence && part.segment == 0)
                put_states(out.dinitial_state, part.row, owned_by<kLanes>(in, part, thread, slab),
                           r.carry);
        });
    }
};

template <class Real, int kLanes>
void start(const ScanInputs& in, const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
           const Exec& exec) {
    const Device device = args.u.device;
    ScanGradients<Real> out{};
    out.dy = plane<3>(grads.dy), out.dz = plane<3>(grads.dz);
    out.du = plane<3>(grads.du), out.ddelta = plane<3>(grads.ddelta);
    out.dlast_state = plane<3>(grads.dlast_state);
    out.dinitial_state = plane<3>(grads.dinitial_state);
    out.checkpoints = static_cast<const Real*>(args.checkpoints.data);
    Workspace<Real> workspace{static_cast<Real*>(exec.workspace), SegmentEnds<Real>::size(in)};
    workspace.lay_out(in, static_cast<bool>(in.D), static_cast<bool>(in.dt_bias), out);

    SegmentEnds<Real> ends;
    if (in.segments > 1) {
        ends = {in, workspace.memory};
        launch<Real>(kScanOp, Backward<Real, kLanes, true>{in, out, ends}, scan_parts(in), device,
                     exec);
    }
    if (in.state_per_sequence && out.dinitial_state)
        copy_states<Real>(in, out.dlast_state, out.dinitial_state, device, exec);
    launch<Real>(kScanOp, Backward<Real, kLanes, false>{in, out, ends}, scan_parts(in), device,
                 exec);
    sum_parts(in, out.dA, grads.dA, in.dstate, device, exec);
    sum_parts(in, out.dB, grads.dB, in.dstate, device, exec);
    sum_parts(in, out.dC, grads.dC, in.dstate, device, exec);
    sum_parts(in, out.dD, grads.dD, 1, device, exec);
    sum_parts(in, out.dbias, grads.ddt_bias, 1, device, exec);
    sum_blocks(in, out.all_dB, grads.dB, device, exec);
    sum_blocks(in, out.all_dC, grads.dC, device, exec);
}

}  // namespace

std::int64_t selective_scan_bwd_workspace(const SelectiveScanArgs& args) {
    const ScanInputs in = scan_inputs(args, 0);
    return args.u.dtype == DType::f64 ? workspace_bytes<double>(in) : workspace_bytes<float>(in);
}

void selective_scan_bwd(const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
                        std::int64_t num_states, const Exec& exec) {
    const ScanInputs in = scan_inputs(args, num_states);
    with_compute_type(args.u.dtype, [&](auto zero) {
        using Real = decltype(zero);
        switch (scan_lanes(in.dstate)) {
            case 4:
                return start<Real, 4>(in, args, grads, exec);
            case 16:
                return start<Real, 16>(in, args, grads, exec);
            default:
                return start<Real, 32>(in, args, grads, exec);
        }
    });
}

}  // namespace ssm::cuda
