// The forward of the selective scan on the device: a lane scan. kLanes threads own a channel and
// kScanStates states each, and walk the steps one after the other, tile by tile.
#include "kernels.h"
#include "selective_scan_tile.cuh"

namespace ssm::cuda {

namespace {

/// kEnds: only write the ends of the segments.
template <class Real, int kLanes, bool kEnds>
struct Forward {
    static constexpr int kThreads = kScanThreads;
    static constexpr int kBlocksPerUnit = kBeforeHopper && kLanes == 16 && !kEnds ? 1 : 2;
    static constexpr int kChannels = kThreads / kLanes;
    static constexpr int kSlab = kLanes * kScanStates;
    static constexpr int kGroup = 4;  // steps whose outputs are summed over lanes together
    static constexpr int kRow = kChannels + 1;
    // Places in shared memory. B and C first: their rows are read four at a time.
    static constexpr int kB = 0, kC = kB + kScanTile * kSlab, kU = kC + kScanTile * kSlab;
    static constexpr int kDt = kU + kScanTile * kRow, kY = kDt + kScanTile * kRow;
    // Constant B and C, as their threads own them, and the states of the slabs.
    static constexpr int kOwnB = (kY + kScanTile * kRow + 3) / 4 * 4;
    static constexpr int kOwnC = kOwnB + kThreads * kScanStates;
    static constexpr int kWaiting = kOwnC + kThreads * kScanStates;

    struct Registers {
        Real h[kScanStates], A[kScanStates];
        Real y[kGroup];
        Real time, open;
    };

    ScanInputs in;
    Plane<3> y;           // (B, D, L)
    Plane<3> last_state;  // (S, D, N)
    Real* checkpoints;    // (B, ceil(L / kScanTile), N, D): the states that enter the tiles
    SegmentEnds<Real> ends;

    /// Only the widest arrangement meets more states than its lanes hold.
    SSM_DEVICE int slabs() const {
        return kLanes < kMostLanes ? 1 : static_cast<int>((in.dstate + kSlab - 1) / kSlab);
    }
    std::int64_t shared_size() const {
        const std::int64_t slabs = (in.dstate + kSlab - 1) / kSlab;
        return kWaiting + (slabs > 1 ? slabs * kThreads * kScanStates : 0);
    }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const ScanPart part = scan_part<kChannels>(in, index);
        const int slabs = this->slabs();
        std::int32_t sequence = sequence_before(in, part.row, part.begin);
        for (int slab = 0; slab < slabs; ++slab)
            block.each([&](int thread, Registers& r) {
                enter(block, part, thread, slab, r);
                if (slabs > 1) wait(block, slab, thread, r);
            });
        for (std::int64_t begin = part.begin; begin < part.end; begin += kScanTile) {
            const int steps =
                static_cast<int>(part.end - begin < kScanTile ? part.end - begin : kScanTile);
            block.barrier();
            block.each([&](int thread, Registers&) { load(block, part, thread, begin, steps); });
            const std::int32_t before = sequence;
            for (int slab = 0; slab < slabs; ++slab) {
                if (slab > 0) block.barrier();
                block.each([&](int thread, Registers&) {
                    load_slab(block, part, thread, begin, slab, steps);
                });
                block.barrier();
                sequence = scan(block, part, slab, before, begin, steps);
            }
            block.barrier();
            if constexpr (!kEnds)
                block.each(
                    [&](int thread, Registers&) { store(block, part, thread, begin, steps); });
        }
        for (int slab = 0; slab < slabs; ++slab)
            block.each([&](int thread, Registers& r) {
                if (slabs > 1) resume(block, slab, thread, r);
                leave(part, thread, slab, sequence, r);
            });
    }

  private:
    static SSM_DEVICE int channel_of(int thread) { return thread / kLanes; }
    static SSM_DEVICE std::int64_t state_of(int thread, int slab) {
        return std::int64_t{slab} * kSlab + thread % kLanes * kScanStates;
    }

    template <class Block>
    static SSM_DEVICE void wait(Block& block, int slab, int thread, const Registers& r) {
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s)
            block.write(kWaiting + (slab * kScanStates + s) * kThreads + thread, r.h[s]);
    }
    template <class Block>
    static SSM_DEVICE void resume(Block& block, int slab, int thread, Registers& r) {
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s)
            r.h[s] = block.read(kWaiting + (slab * kScanStates + s) * kThreads + thread);
    }

    /// A, and B and C where these do not change from step to step.
    template <class Block>
    SSM_DEVICE void load_constants(Block& block, const ScanPart& part, int thread, int slab,
                                   Registers& r) const {
        const std::int64_t channel = part.first_channel + channel_of(thread);
        const bool owned = channel_of(thread) < part.channels;
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s) {
            const std::int64_t state = state_of(thread, slab) + s;
            const bool exists = owned && state < in.dstate;
            const auto at = [&](const auto& tensor) {
                return exists ? tensor.template load<Real>(channel * tensor.stride[0] +
                                                           state * tensor.stride[1])
                              : Real(0);
            };
            r.A[s] = at(in.A) * static_cast<Real>(kLog2e);
            if (in.constant_B) block.write(kOwnB + thread * kScanStates + s, at(in.B));
            if (in.constant_C) block.write(kOwnC + thread * kScanStates + s, at(in.C));
        }
    }

    /// The state that enters the segment: what the segments before it make of the initial one.
    template <class Block>
    SSM_DEVICE void enter(Block& block, const ScanPart& part, int thread, int slab,
                          Registers& r) const {
        load_constants(block, part, thread, slab, r);
        r.time = 0;
        r.open = 1;
        const ScanOwned owned = owned_by<kLanes>(in, part, thread, slab);
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s) {
            r.h[s] = 0;
            if (kEnds || s >= owned.states) continue;
            // With states per sequence the first sequence begins like every other one.
            if (!in.state_per_sequence)
                r.h[s] = state_at<Real>(in.initial_state, part.row, owned, s);
            for (std::int64_t segment = 0; segment < part.segment; ++segment)
                r.h[s] = ends.pass(in, part.row, segment, owned.channel, owned.state + s, r.A[s],
                                   r.h[s]);
        }
    }

    template <class Block>
    SSM_DEVICE void load(Block& block, const ScanPart& part, int thread, std::int64_t begin,
                         int steps) const {
        const bool along_steps = in.u.stride[2] == 1;
        load_tile<Real, kChannels>(block, thread, kU, in.u, part, begin, steps, along_steps);
        load_tile<Real, kChannels>(block, thread, kDt, in.delta, part, begin, steps, along_steps);
        add_bias<Real, kChannels>(in, block, thread, kDt, part, along_steps);
        if (!in.softplus) return;
        each_element<kChannels>(thread, along_steps, [&](int step, int channel) {
            const int place = kDt + step * kRow + channel;
            block.write(place, softplus(block.read(place)));
        });
    }

    template <class Block>
    SSM_DEVICE void load_slab(Block& block, const ScanPart& part, int thread, std::int64_t begin,
                              int slab, int steps) const {
        if (!in.constant_B)
            load_states<Real, kSlab>(in, block, part, thread, kB, in.B, in.group_dim_B, begin, slab,
                                     steps);
        if (!kEnds && !in.constant_C)
            load_states<Real, kSlab>(in, block, part, thread, kC, in.C, in.group_dim_C, begin, slab,
                                     steps);
    }

    /// The recurrence over one tile, for the states of one slab. Takes the sequence before the tile
    /// and returns that of its end.
    template <class Block>
    SSM_DEVICE std::int32_t scan(Block& block, const ScanPart& part, int slab,
                                 std::int32_t sequence, std::int64_t begin, int steps) const {
        const bool one_slab = slabs() == 1;
        block.each([&](int thread, Registers& r) {
            if (!one_slab) {
                resume(block, slab, thread, r);
                load_constants(block, part, thread, slab, r);
            }
            if (!kEnds && checkpoints != nullptr) save(part, thread, slab, begin / kScanTile, r);
        });
        for (int first = 0; first < steps;) {
            const std::int32_t next = sequence_at(in, part.row, begin + first);
            const int last =
                static_cast<int>(end_of_run(in, part.row, begin + first, begin + steps) - begin);
            if (next >= 0) {
                if (next != sequence)
                    block.each([&](int thread, Registers& r) {
                        begin_sequence(part, thread, slab, sequence, next, r);
                    });
                sequence = next;
                for (int step = first; step < last; step += kGroup)
                    advance(block, slab, step, last);
            }
            first = last;
        }
        if (!one_slab) block.each([&](int thread, Registers& r) { wait(block, slab, thread, r); });
        return sequence;
    }

    /// kGroup steps, as far as they lie before `last`.
    template <class Block>
    SSM_DEVICE void advance(Block& block, int slab, int first, int last) const {
        block.each([&](int thread, Registers& r) {
            const int channel = channel_of(thread), lane = thread % kLanes;
            const int place_B = (in.constant_B ? kOwnB + thread * kScanStates
                                               : kB + first * kSlab + lane * kScanStates);
            const int place_C = (in.constant_C ? kOwnC + thread * kScanStates
                                               : kC + first * kSlab + lane * kScanStates);
            SSM_UNROLL
            for (int k = 0; k < kGroup; ++k) {
                r.y[k] = 0;
                const int step = first + k;
                if (step >= last) continue;
                const Real dt = block.read(kDt + step * kRow + channel);
                const Real input = dt * block.read(kU + step * kRow + channel);
                Real B[kScanStates], C[kScanStates];
                block.read4(place_B + (in.constant_B ? 0 : k * kSlab), B);
                if constexpr (!kEnds) block.read4(place_C + (in.constant_C ? 0 : k * kSlab), C);
                SSM_UNROLL
                for (int s = 0; s < kScanStates; ++s) {
                    r.h[s] = exp2_of(dt * r.A[s]) * r.h[s] + input * B[s];
                    if constexpr (!kEnds) r.y[k] += r.h[s] * C[s];
                }
                if (kEnds && slab == 0) r.time += dt;
            }
        });
        if constexpr (kEnds) return;
        block.template scatter_sums<kGroup, 4, 1>(
            [](Registers& r) -> Real(&)[kGroup] { return r.y; });
        block.template sum_lanes<kLanes / 4, 4>([](Registers& r) -> Real& { return r.y[0]; });
        block.each([&](int thread, Registers& r) {
            const int lane = thread % kLanes;
            if (lane >= kGroup || first + lane >= last) return;
            const int place = kY + (first + lane) * kRow + channel_of(thread);
            block.write(place, slab > 0 ? block.read(place) + r.y[0] : r.y[0]);
        });
    }

    /// Ends a sequence, if there was one in the row, and begins the next.
    SSM_DEVICE void begin_sequence(const ScanPart& part, int thread, int slab, std::int32_t before,
                                   std::int32_t next, Registers& r) const {
        // The first sequence of a row goes on from the state of the row, which is there already.
        if (before < 0 && !in.state_per_sequence) return;
        if (!kEnds && before >= 0 && in.state_per_sequence)
            put_states(last_state, before, owned_by<kLanes>(in, part, thread, slab), r.h);
        if (slab == 0) r.time = r.open = 0;
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s)
            r.h[s] = in.state_per_sequence
                         ? state_at<Real>(in.initial_state, next,
                                          owned_by<kLanes>(in, part, thread, slab), s)
                         : Real(0);
    }

    SSM_DEVICE void save(const ScanPart& part, int thread, int slab, std::int64_t tile,
                         const Registers& r) const {
        if (channel_of(thread) >= part.channels) return;
        const std::int64_t tiles = (in.seqlen + kScanTile - 1) / kScanTile;
        Real* states = checkpoints + (part.row * tiles + tile) * in.dstate * in.dim;
        SSM_UNROLL
        for (int s = 0; s < kScanStates; ++s)
            if (state_of(thread, slab) + s < in.dstate)
                states[(state_of(thread, slab) + s) * in.dim + part.first_channel +
                       channel_of(thread)] = r.h[s];
    }

    /// y = (sum + D u) silu(z), and 0 where a step is skipped.
    template <class Block>
    SSM_DEVICE void store(Block& block, const ScanPart& part, int thread, std::int64_t begin,
                          int steps) const {
        const bool along_steps = y.stride[2] == 1;
        each_element<kChannels>(thread, along_steps, [&](int step, int channel) {
            if (step >= steps || channel >= part.channels) return;
            const int place = kY + step * kRow + channel;
            const std::int64_t d = part.first_channel + channel, t = begin + step;
            if (sequence_at(in, part.row, t) < 0) return block.write(place, Real(0));
            if (!in.D && !in.z) return;
            Real value = block.read(place);
            if (in.D)
                value += in.D.template load<Real>(d * in.D.stride[0]) *
                         block.read(kU + step * kRow + channel);
            if (in.z)
                value *= silu(in.z.template load<Real>(part.row * in.z.stride[0] +
                                                       d * in.z.stride[1] + t * in.z.stride[2]));
            block.write(place, value);
        });
        store_tile<Real, kChannels>(block, thread, kY, y, part, begin, steps, along_steps);
    }

    SSM_DEVICE void leave(const ScanPart& part, int thread, int slab, std::int32_t sequence,
                          const Registers& r) const {
        if constexpr (kEnds) {
            if (channel_of(thread) >= part.channels) return;
            const std::int64_t place = (part.row * in.segments + part.segment) * in.dim +
                                       part.first_channel + channel_of(thread);
            SSM_UNROLL
            for (int s = 0; s < kScanStates; ++s)
                if (state_of(thread, slab) + s < in.dstate)
                    ends.own[place * in.dstate + state_of(thread, slab) + s] = r.h[s];
            if (thread % kLanes == 0 && slab == 0) {
                ends.time[place] = r.time;
                ends.open[place] = r.open;
            }
        } else if (part.end == in.seqlen && (sequence >= 0 || !in.state_per_sequence)) {
            put_states(last_state, in.state_per_sequence ? sequence : part.row,
                       owned_by<kLanes>(in, part, thread, slab), r.h);
        }
    }
};

template <class Real, int kLanes>
void start(const ScanInputs& in, const SelectiveScanArgs& args, const Exec& exec) {
    const Device device = args.u.device;
    const std::int64_t parts = scan_parts(in);
    const auto checkpoints =
        args.checkpoints.ndim == kAbsent ? nullptr : static_cast<Real*>(args.checkpoints.data);
    SegmentEnds<Real> ends;
    if (in.segments > 1) {
        ends = {in, static_cast<Real*>(exec.workspace)};
        launch<Real>(kScanOp, Forward<Real, kLanes, true>{in, {}, {}, nullptr, ends}, parts, device,
                     exec);
    }
    const Plane<3> last_state = plane<3>(args.last_state);
    if (in.state_per_sequence && last_state)
        copy_states<Real>(in, in.initial_state, last_state, device, exec);
    launch<Real>(kScanOp,
                 Forward<Real, kLanes, false>{in, plane<3>(args.y), last_state, checkpoints, ends},
                 parts, device, exec);
}

}  // namespace

std::int64_t selective_scan_fwd_workspace(const SelectiveScanArgs& args) {
    const ScanInputs in = scan_inputs(args, 0);
    return args.u.dtype == DType::f64 ? SegmentEnds<double>::size(in) * 8
                                      : SegmentEnds<float>::size(in) * 4;
}

void selective_scan_fwd(const SelectiveScanArgs& args, std::int64_t num_states, const Exec& exec) {
    const ScanInputs in = scan_inputs(args, num_states);
    with_compute_type(args.u.dtype, [&](auto zero) {
        using Real = decltype(zero);
        switch (scan_lanes(in.dstate)) {
            case 4:
                return start<Real, 4>(in, args, exec);
            case 16:
                return start<Real, 16>(in, args, exec);
            default:
                return start<Real, 32>(in, args, exec);
        }
    });
}

}  // namespace ssm::cuda
