// What the kernels of the forward of the state-space dual scan share: a chain, which walks a part
// piece by piece with the states in the registers of its threads.
#pragma once

#include <cmath>

#include "ssd_chunk_scan_tile.cuh"

namespace ssm::cuda {

/// What a segment does to the state that enters it: decay * entering + own, with decay = 2^time,
/// where time is minus infinity if a sequence began.
template <class Real>
struct SsdEnds {
    Real* own = nullptr;   // (B, segments, H, P, N)
    Real* time = nullptr;  // (B, segments, H)

    SsdEnds() = default;
    SsdEnds(const SsdInputs& in, Real* memory) {
        const std::int64_t heads = in.batch * in.segments * in.heads;
        own = memory, time = own + heads * in.headdim * in.dstate;
    }
    static std::int64_t size(const SsdInputs& in) {
        if (in.segments == 1) return 0;
        return in.batch * in.segments * in.heads * (in.headdim * in.dstate + 1);
    }
};

/// The tensors of a chain, and what it does to its states between pieces. A thread has those of
/// each_state<kOwnStates>: `Registers` is any type with h[kOwnStates / 8][4] and time.
template <class Real, int kOwnStates, int kAtOnce = 4, class Only = void>
struct SsdChain {
    SsdInputs in;
    Plane<4> y;             // (B, L, H, P)
    Plane<4> final_states;  // (S, H, P, N)
    SsdEnds<Real> ends{};
    bool only_ends = false;  // only write the ends of the segments

    void chain(const SsdInputs& inputs, const SsdChunkScanArgs& args, const Exec& exec) {
        in = inputs, y = plane<4>(args.y), final_states = plane<4>(args.final_states);
        if (in.segments > 1) ends = {in, static_cast<Real*>(exec.workspace)};
    }

    /// D of a channel of the slab, or 0.
    SSM_DEVICE Real skip_of(const SsdPart& part, int channel) const {
        if (!in.D || channel >= part.channels) return 0;
        return in.D.template load<Real>(part.head * in.D.stride[0] +
                                        (part.first_channel + channel) * in.D.stride[1]);
    }

    /// The state that enters the row.
    template <class Registers>
    SSM_DEVICE void enter(const SsdPart& part, int thread, Registers& r) const {
        r.time = 0;
        // With states per sequence the first sequence begins like every other one.
        const bool from_row = !only_ends && !in.state_per_sequence;
        take_state<Real, kOwnStates, kAtOnce, Only>(
            in, part, from_row ? in.initial_states : Plane<4>{}, part.row, thread, r.h);
    }

    /// What a segment before this one makes of the state.
    template <class Registers>
    SSM_DEVICE void pass(const SsdPart& part, int segment, int thread, Registers& r) const {
        const std::int64_t place = end_of(part, segment);
        const Real decay = exp2_of(ends.time[place]);
        const Real* const own = own_of(part, place);
        each_state<kOwnStates>(
            in, part, thread, in.dstate, 1, [&](int n, int i, bool exists, std::int64_t offset) {
                if (exists) r.h[n][i] = (decay != 0 ? decay * r.h[n][i] : 0) + own[offset];
            });
    }

    /// Ends the sequence before a piece that begins one, if there was one in the row.
    template <class Registers>
    SSM_DEVICE void end_sequence(const SsdPart& part, const SsdPiece& piece, int thread,
                                 const Registers& r) const {
        if (!only_ends && piece.before >= 0 && in.state_per_sequence)
            put_state<Real, kOwnStates, kAtOnce, Only>(in, part, final_states, piece.before, thread,
                                                       r.h);
    }

    /// Begins the sequence that a piece begins.
    template <class Registers>
    SSM_DEVICE void begin_sequence(const SsdPart& part, const SsdPiece& piece, int thread,
                                   Registers& r) const {
        r.time = -static_cast<Real>(INFINITY);
        take_state<Real, kOwnStates, kAtOnce, Only>(
            in, part, in.state_per_sequence ? in.initial_states : Plane<4>{}, piece.sequence,
            thread, r.h);
    }

    /// What is left of the states at the end of the part, whose last sequence this is.
    template <class Registers>
    SSM_DEVICE void leave(const SsdPart& part, std::int32_t sequence, int thread,
                          const Registers& r) const {
        if (only_ends) {
            const std::int64_t place = end_of(part, part.segment);
            Real* const own = own_of(part, place);
            each_state<kOwnStates>(in, part, thread, in.dstate, 1,
                                   [&](int n, int i, bool exists, std::int64_t offset) {
                                       if (exists) own[offset] = r.h[n][i];
                                   });
            if (thread == 0 && part.first_channel == 0) ends.time[place] = r.time;
        } else if (part.end == in.seqlen && (sequence >= 0 || !in.state_per_sequence)) {
            put_state<Real, kOwnStates, kAtOnce, Only>(
                in, part, final_states, in.state_per_sequence ? sequence : part.row, thread, r.h);
        }
    }

  private:
    SSM_DEVICE Real* own_of(const SsdPart& part, std::int64_t place) const {
        return ends.own + (place * in.headdim + part.first_channel) * in.dstate;
    }
    SSM_DEVICE std::int64_t end_of(const SsdPart& part, std::int64_t segment) const {
        return (part.row * in.segments + segment) * in.heads + part.head;
    }
};

/// Runs a kernel that is a chain on all of its blocks: twice, where work is cut along the steps.
template <class Real, class Kernel>
void run_ssd_chain(Kernel& kernel, const SsdChunkScanArgs& args, std::int64_t blocks,
                   const Exec& exec) {
    const SsdInputs& in = kernel.in;
    const Device device = args.X.device;
    if (in.segments > 1) {
        kernel.only_ends = true;
        launch<Real>(kSsdOp, kernel, blocks, device, exec);
        kernel.only_ends = false;
    }
    if (in.state_per_sequence && kernel.final_states)
        copy_ssd_states<Real>(in, in.initial_states, kernel.final_states, device, exec);
    launch<Real>(kSsdOp, kernel, blocks, device, exec);
}

/// Runs the forward on the warpgroups of Hopper, if they are there and fit the problem; says
/// whether it did.
bool starts_on_hopper(const SsdInputs& in, const SsdChunkScanArgs& args, const Exec& exec);

}  // namespace ssm::cuda
