// The backward of the selective scan on the device: the lane scan of the forward, walked backwards.
// Every tile is run forward once from its saved state, to keep the state of every kGroup-th step,
// and then group by group: forward with all states in registers, and back.
#include "kernels.h"
#include "selective_scan_adjoint.cuh"
#include "selective_scan_sums.cuh"

namespace ssm::cuda {

namespace {

/// kEnds: only write the ends of the segments.
template <class Real, int kLanes, bool kEnds>
struct Backward : ScanAdjoint<Real, kLanes, kEnds> {
    using Base = ScanAdjoint<Real, kLanes, kEnds>;
    using Base::channel_of, Base::state_of, Base::exists;
    using Base::in, Base::out, Base::ends, Base::kThreads, Base::kSlab;
    using typename Base::Registers;
    /// Before Hopper, shared memory has room for one only.
    static constexpr int kBlocksPerUnit = kBeforeHopper || (kLanes == kMostLanes && !kEnds) ? 1 : 2;

    SSM_DEVICE int slabs() const {
        return kLanes < kMostLanes ? 1 : static_cast<int>((in.dstate + kSlab - 1) / kSlab);
    }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const ScanPart part = scan_part<Base::kChannels>(in, index);
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
                this->load(block, part, fresh(thread), begin, steps, marks.skipped);
            });
            for (int slab = 0; slab < slabs; ++slab) {
                if (slab > 0) block.barrier();
                block.each([&](int thread, Registers& r) {
                    if (slabs > 1) resume(index, slab, fresh(thread), r);
                    this->load_slab(block, part, fresh(thread), begin, slab, steps, marks.skipped,
                                    r);
                });
                block.barrier();
                if constexpr (!kEnds) this->replay(block, part, slab, begin, steps, marks);
                for (int group = (steps - 1) / Base::kGroup; group >= 0; --group)
                    this->go_back(block, part, slab, begin, group, marks);
                if (slabs > 1)
                    block.each(
                        [&](int thread, Registers& r) { wait(index, slab, fresh(thread), r); });
            }
            block.barrier();
            if constexpr (!kEnds) {
                block.each([&](int thread, Registers&) {
                    this->store(block, part, fresh(thread), begin, steps, marks.skipped);
                });
                if (out.dbias == nullptr) continue;
                block.barrier();
                block.each([&](int thread, Registers& r) {
                    for (int step = thread % kLanes; step < steps; step += kLanes)
                        if (channel_of(thread) < part.channels)
                            r.dbias +=
                                block.read(Base::kDd + step * Base::kRow + channel_of(thread));
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
            const Real A = this->decay_rate(part, thread, slab, s) * static_cast<Real>(kLog2e);
            for (std::int64_t segment = in.segments - 1; segment > part.segment; --segment)
                r.carry[s] =
                    ends.pass(in, part.row, segment, part.first_channel + channel_of(thread),
                              state_of(thread, slab) + s, A, r.carry[s]);
        }
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
