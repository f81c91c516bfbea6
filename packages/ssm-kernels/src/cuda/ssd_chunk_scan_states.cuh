// The chains of the backward of the state-space dual scan: the states that enter the tiles, from
// the first tile on, and the gradients of the states that leave them, from the last one on:
//   H = decay H + (w X)^T B,  dH = decay dH + (e dY)^T C
// A block owns a slab of channels and a slab of states of one head of one row.
#pragma once

#include "ssd_chunk_scan_adjoint.cuh"

namespace ssm::cuda {

template <class Real, class Matter>
struct SsdStates {
    static constexpr int kThreads = kSsdThreads;
    static constexpr int kBlocksPerUnit = sizeof(Matter) == 2 ? 3 : 2;
    using Element = Matter;

    static constexpr int kSlab = 64;  // states of a block
    // Places in the memory of matrices, twice: what is weighed, X or dY, and B or C.
    static constexpr int kAcross = matrix_stride(kSsdChannels), kAcrossSlab = matrix_stride(kSlab);
    static constexpr int kStage = kSsdTile * (kAcross + kAcrossSlab);

    struct Registers {
        Real h[kSlab / 8][4];
        Real raw[2];  // of the step sizes of the next piece, in one warp
    };

    SsdInputs in;
    SsdGradients<Real> out;
    std::int64_t window;
    bool only_enters;  // walk forward to the end of the window, and save nothing else

    std::int64_t shared_size() const { return kSsdDecaysEnd; }
    SSM_BOTH std::int64_t matrix_size() const { return 2 * kStage; }

    std::int64_t parts() const {
        return in.batch * in.heads * in.slabs * ((in.dstate + kSlab - 1) / kSlab);
    }
    std::int64_t blocks() const { return only_enters ? parts() : 2 * parts(); }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const std::int64_t state_slabs = (in.dstate + kSlab - 1) / kSlab;
        const std::int64_t above = quotient(index, state_slabs);
        const std::int64_t heads = quotient(above, in.slabs), rows = quotient(heads, in.heads);
        SsdPart part{};
        part.first_channel = (above - heads * in.slabs) * kSsdChannels;
        part.head = heads - rows * in.heads;
        const bool back = rows >= in.batch;
        part.row = back ? rows - in.batch : rows;
        part.begin = window * out.window_steps();
        part.end = part.begin + out.window_steps();
        if (part.end > in.seqlen) part.end = in.seqlen;
        const std::int64_t left = in.headdim - part.first_channel;
        part.channels = static_cast<int>(left < kSsdChannels ? left : kSsdChannels);
        const std::int64_t first_state = (index - above * state_slabs) * kSlab;
        back ? walk<true>(block, part, first_state) : walk<false>(block, part, first_state);
    }

  private:
    static SSM_DEVICE Matrix weighed(int stage) { return {stage * kStage, kAcross}; }
    static SSM_DEVICE Matrix other(int stage) {
        return {stage * kStage + kSsdTile * kAcross, kAcrossSlab};
    }

    template <bool kBack, class Block>
    SSM_DEVICE void walk(Block& block, const SsdPart& part, std::int64_t first_state) const {
        SsdWalk<Real, kBack> pieces(out, part.row, part.begin, part.end);
        block.each([&](int thread, Registers& r) { enter<kBack>(part, first_state, thread, r); });
        SsdPiece piece = pieces.next(block, in);
        int stage = 0;
        if (piece.steps > 0) fetch<kBack>(block, part, first_state, piece, stage);
        while (piece.steps > 0) {
            const std::int64_t edge = kBack ? piece.begin + piece.steps : piece.begin;
            if (!only_enters && (edge % kSsdTile == 0 || edge == in.seqlen))
                block.each([&](int thread, Registers& r) {
                    save(part, static_cast<Element*>(kBack ? out.dH : out.H),
                         piece.begin / kSsdTile, first_state, thread, r);
                });
            if (!kBack && piece.starts)
                block.each([&](int thread, Registers& r) {
                    take(part, given(in.initial_states, part, piece.sequence), first_state, thread,
                         r);
                });
            block.each_warp([&](auto& warp) {
                if (warp.index == 0)
                    write_all_decays<Real>(
                        block, warp, in, part.head, piece,
                        [&](int lane) -> auto& { return warp.registers(lane).raw; });
            });
            block.each([&](int thread, Registers&) { block.wait_for_copies(thread); });
            block.barrier();
            const SsdPiece next = pieces.next(block, in);
            if (next.steps > 0) fetch<kBack>(block, part, first_state, next, 1 - stage);
            advance<kBack>(block, piece, stage);
            if (kBack && piece.starts)
                block.each([&](int thread, Registers& r) {
                    put(part, given(out.dinitial_states, part, piece.sequence), first_state, thread,
                        r);
                    take(part, given(out.dfinal_states, part, piece.before), first_state, thread,
                         r);
                });
            block.barrier();
            stage = 1 - stage;
            piece = next;
        }
        block.each([&](int thread, Registers& r) { leave<kBack>(part, first_state, thread, r); });
    }

    /// One state in memory: its first element, with the strides of channels and of states.
    struct State {
        void* data = nullptr;
        std::int64_t channel_stride = 0, state_stride = 0;
        DType dtype = DType::f32;
    };
    SSM_DEVICE State state_of(const Plane<4>& states, const SsdPart& part,
                              std::int64_t sequence) const {
        State found;
        if (!states || sequence < 0) return found;
        visit(states.dtype, [&](auto* type) {
            using Memory = std::remove_pointer_t<decltype(type)>;
            found.data = static_cast<Memory*>(states.data) + sequence * states.stride[0] +
                         part.head * states.stride[1];
        });
        found.channel_stride = states.stride[2], found.state_stride = states.stride[3];
        found.dtype = states.dtype;
        return found;
    }
    /// The state of a sequence that has one of its own.
    SSM_DEVICE State given(const Plane<4>& states, const SsdPart& part,
                           std::int64_t sequence) const {
        return in.state_per_sequence ? state_of(states, part, sequence) : State{};
    }
    /// A state in working memory (B, H, P, N).
    SSM_DEVICE State handed(Real* memory, const SsdPart& part) const {
        State found;
        found.data = memory + (part.row * in.heads + part.head) * in.headdim * in.dstate;
        found.channel_stride = in.dstate, found.state_stride = 1;
        found.dtype = sizeof(Real) == 8 ? DType::f64 : DType::f32;
        return found;
    }
    SSM_DEVICE State entering(const SsdPart& part, std::int64_t which) const {
        return handed(out.enters + which * in.batch * in.heads * in.headdim * in.dstate, part);
    }

    /// Calls use(h, offset) for the accumulators of a lane that exist, and their place in a state.
    template <class Use>
    SSM_DEVICE void each_state(const SsdPart& part, std::int64_t first_state, int thread,
                               Registers& r, const State& state, Use&& use) const {
        const int lane = thread % kWarp, channel = thread / kWarp * 16 + lane / 4;
        const int left = static_cast<int>(in.dstate - first_state) - lane % 4 * 2;
        std::int64_t offset = (part.first_channel + channel) * state.channel_stride +
                              (first_state + lane % 4 * 2) * state.state_stride;
        SSM_UNROLL
        for (int n = 0; n < kSlab / 8; ++n) {
            SSM_UNROLL
            for (int i = 0; i < 4; ++i)
                if (channel + i / 2 * 8 < part.channels && n * 8 + i % 2 < left)
                    use(r.h[n][i],
                        offset + i / 2 * 8 * state.channel_stride + i % 2 * state.state_stride);
            offset += 8 * state.state_stride;
        }
    }

    /// The accumulators become a state, or 0 where there is none.
    SSM_DEVICE void take(const SsdPart& part, const State& state, std::int64_t first_state,
                         int thread, Registers& r) const {
        SSM_UNROLL
        for (int i = 0; i < kSlab / 2; ++i) r.h[i / 4][i % 4] = 0;
        if (state.data == nullptr) return;
        visit(state.dtype, [&](auto* type) {
            using Memory = std::remove_pointer_t<decltype(type)>;
            const Memory* const from = static_cast<const Memory*>(state.data);
            each_state(part, first_state, thread, r, state, [&](Real& h, std::int64_t offset) {
                h = static_cast<Real>(widen(from[offset]));
            });
        });
    }
    SSM_DEVICE void put(const SsdPart& part, const State& state, std::int64_t first_state,
                        int thread, Registers& r) const {
        if (state.data == nullptr) return;
        visit(state.dtype, [&](auto* type) {
            using Memory = std::remove_pointer_t<decltype(type)>;
            Memory* const to = static_cast<Memory*>(state.data);
            each_state(part, first_state, thread, r, state,
                       [&](Real& h, std::int64_t offset) { narrow(h, to[offset]); });
        });
    }

    template <bool kBack>
    SSM_DEVICE void enter(const SsdPart& part, std::int64_t first_state, int thread,
                          Registers& r) const {
        State state;
        if constexpr (kBack) {
            if (part.end < in.seqlen)
                state = handed(out.leaves, part);
            else
                state = state_of(
                    out.dfinal_states, part,
                    in.state_per_sequence ? sequence_before(in, part.row, in.seqlen) : part.row);
        } else {
            // With states per sequence the first sequence begins like every other one.
            if (window > 0)
                state = entering(part, window);
            else if (!in.state_per_sequence)
                state = state_of(in.initial_states, part, part.row);
        }
        take(part, state, first_state, thread, r);
    }

    template <bool kBack>
    SSM_DEVICE void leave(const SsdPart& part, std::int64_t first_state, int thread,
                          Registers& r) const {
        State state;
        if constexpr (kBack) {
            if (window > 0)
                state = handed(out.leaves, part);
            else if (!in.state_per_sequence)
                state = state_of(out.dinitial_states, part, part.row);
        } else if (only_enters) {
            state = entering(part, window + 1);
        }
        put(part, state, first_state, thread, r);
    }

    /// Keeps a state at the edge of a tile, rounded to the type of the matrices.
    SSM_DEVICE void save(const SsdPart& part, Element* to, std::int64_t tile,
                         std::int64_t first_state, int thread, const Registers& r) const {
        const int lane = thread % kWarp;
        SSM_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int channel = thread / kWarp * 16 + lane / 4 + half * 8;
            if (channel >= part.channels) continue;
            Element* const own =
                to + out.state_row(in, tile, part.row, part.head, part.first_channel + channel);
            SSM_UNROLL
            for (int n = 0; n < kSlab / 8; ++n) {
                const std::int64_t state = first_state + n * 8 + lane % 4 * 2;
                if (state < out.row_states)
                    *reinterpret_cast<Pair<Element>*>(own + state) =
                        operand<Element>(r.h[n][2 * half], r.h[n][2 * half + 1]);
            }
        }
    }

    template <bool kBack, class Block>
    SSM_DEVICE void fetch(Block& block, const SsdPart& part, std::int64_t first_state,
                          const SsdPiece& piece, int stage) const {
        block.each([&](int thread, Registers& r) {
            const std::int64_t states = in.dstate - first_state;
            if constexpr (kBack) {
                fetch_output_gradients<Element, kThreads>(block, thread, weighed(stage), in, out,
                                                          part, piece);
                fetch_rows<Element, kSlab>(block, thread, other(stage), in.C, in.copies_C, part.row,
                                           part.head / in.group_heads_C, first_state, states,
                                           piece);
            } else {
                fetch_rows<Element, kSsdChannels>(block, thread, weighed(stage), in.X, in.copies_X,
                                                  part.row, part.head, part.first_channel,
                                                  part.channels, piece);
                fetch_rows<Element, kSlab>(block, thread, other(stage), in.B, in.copies_B, part.row,
                                           part.head / in.group_heads_B, first_state, states,
                                           piece);
            }
            if (thread < kWarp) fetch_steps(in, part.row, part.head, piece, thread, r.raw);
        });
    }

    /// h = decay h + weighed^T other.
    template <bool kBack, class Block>
    SSM_DEVICE void advance(Block& block, const SsdPiece& piece, int stage) const {
        constexpr int kWeights = kBack ? kSsdInto : SsdDecays::kLeft;
        block.each([&](int, Registers& r) {
            const Real decay = block.read(kSsdInto + kSsdTile - 1);
            SSM_UNROLL
            for (int i = 0; i < kSlab / 2; ++i) r.h[i / 4][i % 4] *= decay;
        });
        block.each_warp([&](auto& warp) {
            PerLane<Fragment<Element>> left, right;
            SSM_UNROLL
            for (int k = 0; k < kSsdTile; k += 16) {
                if (k >= piece.steps) continue;
                load_left<true>(warp, weighed(stage), warp.index * 16, k, left);
                warp.each([&](int lane, Registers&) {
                    SSM_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const int from = kWeights + k + half * 8 + lane % 4 * 2;
                        const Real w[2] = {block.read(from), block.read(from + 1)};
                        SSM_UNROLL
                        for (int row = 0; row < 2; ++row) {
                            auto& pair = left(lane).of[half * 2 + row];
                            pair = operand<Element>(first_of(pair) * w[0], second_of(pair) * w[1]);
                        }
                    }
                });
                SSM_UNROLL
                for (int n = 0; n < kSlab / 16; ++n) {
                    load_right<true>(warp, other(stage), k, n * 16, right);
                    multiply_both(warp, left, right, [&](int lane, int side) -> auto& {
                        return warp.registers(lane).h[2 * n + side];
                    });
                }
            }
        });
    }
};

}  // namespace ssm::cuda
