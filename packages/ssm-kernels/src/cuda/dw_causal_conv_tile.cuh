// What the forward and the backward of the causal convolution share: how a thread finds the inputs
// that the filter sees at a step, across skipped steps, sequences and states.
#pragma once

#include <ssm/dw_causal_conv.h>

#include "launch.cuh"
#include "numerics.cuh"

namespace ssm::cuda {

constexpr int kConvThreads = 128;
constexpr int kConvTaps = 4;  // of the filters that threads keep in registers

/// Before a step: `have` inputs of its sequence, the oldest of them at `step`, and before those the
/// end of an initial state, or zeros where `state` is negative.
struct Reach {
    std::int64_t step, have, state;
};

/// The inputs in plain numbers.
struct ConvInputs {
    Plane<3> x;              // (B, D, L)
    Plane<2> weight;         // (D, W)
    Plane<1> bias;           // (D)
    Plane<3> initial_state;  // (S, D, W - 1)
    Plane<2> seq_idx;        // (B, L), int32
    std::int64_t batch, dim, seqlen, width, num_states;
    bool silu, state_per_sequence;
    bool along_steps;  // the steps of a channel are neighbours in memory

    ConvInputs(const DwCausalConvArgs& args, std::int64_t states)
        : x(plane<3>(args.x)),
          weight(plane<2>(args.weight)),
          bias(plane<1>(args.bias)),
          initial_state(plane<3>(args.initial_state)),
          seq_idx(plane<2>(args.seq_idx)),
          batch(args.x.shape[0]),
          dim(args.x.shape[1]),
          seqlen(args.x.shape[2]),
          width(args.weight.shape[1]),
          num_states(states),
          silu(args.silu),
          state_per_sequence(args.state_per_sequence),
          along_steps(args.x.stride[2] == 1) {}

    std::int64_t elements() const { return batch * dim * seqlen; }

    static SSM_DEVICE std::int64_t offset(const Plane<3>& tensor, std::int64_t row,
                                          std::int64_t channel, std::int64_t step) {
        return row * tensor.stride[0] + channel * tensor.stride[1] + step * tensor.stride[2];
    }
    template <class Real>
    SSM_DEVICE Real input(std::int64_t row, std::int64_t channel, std::int64_t step) const {
        return x.template load<Real>(offset(x, row, channel, step));
    }
    template <class Real>
    SSM_DEVICE Real tap(std::int64_t channel, std::int64_t k) const {
        return weight.template load<Real>(channel * weight.stride[0] + k * weight.stride[1]);
    }
    template <class Real>
    SSM_DEVICE Real bias_of(std::int64_t channel) const {
        return bias ? bias.template load<Real>(channel * bias.stride[0]) : Real(0);
    }
    /// An input of the state `reach.state`, oldest first.
    template <class Real>
    SSM_DEVICE Real remembered(std::int64_t state, std::int64_t channel, std::int64_t place) const {
        if (!initial_state || state < 0) return 0;
        return initial_state.template load<Real>(offset(initial_state, state, channel, place));
    }

    /// The sequence of a step, or -1 where it is skipped. The numbers were not looked at before the
    /// launch: one without a state is no sequence.
    SSM_DEVICE std::int32_t sequence_at(std::int64_t row, std::int64_t step) const {
        if (!seq_idx) return 0;
        const std::int32_t id = static_cast<const std::int32_t*>(
            seq_idx.data)[row * seq_idx.stride[0] + step * seq_idx.stride[1]];
        const bool has_state = !state_per_sequence || num_states < 0 || id < num_states;
        return id >= 0 && has_state ? id : -1;
    }
    /// The last step before `step`, or the first after it, that is not skipped; -1 or seqlen.
    SSM_DEVICE std::int64_t step_before(std::int64_t row, std::int64_t step) const {
        do --step;
        while (step >= 0 && sequence_at(row, step) < 0);
        return step;
    }
    SSM_DEVICE std::int64_t step_after(std::int64_t row, std::int64_t step) const {
        do ++step;
        while (step < seqlen && sequence_at(row, step) < 0);
        return step;
    }
    /// The state that belongs to a sequence of a row. Without states per sequence the first and the
    /// last sequence of a row have that of the row.
    SSM_DEVICE std::int64_t state_of(std::int64_t row, std::int32_t sequence) const {
        return state_per_sequence ? sequence : row;
    }

    /// What `sequence` brings to `step`.
    SSM_DEVICE Reach reach(std::int64_t row, std::int64_t step, std::int32_t sequence) const {
        const std::int64_t wanted = width - 1;
        if (!seq_idx) {
            const std::int64_t have = step < wanted ? step : wanted;
            return {step - have, have, row};
        }
        Reach found{step, 0, state_of(row, sequence)};
        while (found.have < wanted) {
            const std::int64_t before = step_before(row, found.step);
            if (before < 0) break;
            if (sequence_at(row, before) != sequence) {
                if (!state_per_sequence) found.state = -1;
                break;
            }
            found.step = before;
            ++found.have;
        }
        return found;
    }

    /// bias + sum_k weight_k x_k at a step that is not skipped, from the oldest input to the
    /// newest.
    template <class Real>
    SSM_DEVICE Real filter(std::int64_t row, std::int64_t channel, std::int64_t step) const {
        const Reach from = reach(row, step, sequence_at(row, step));
        Real sum = bias_of<Real>(channel);
        std::int64_t k = 0;
        for (; k < width - 1 - from.have; ++k)
            sum = fma_of(remembered<Real>(from.state, channel, from.have + k),
                         tap<Real>(channel, k), sum);
        for (std::int64_t s = from.step; s <= step; ++s)
            if (s == step || sequence_at(row, s) >= 0)
                sum = fma_of(input<Real>(row, channel, s), tap<Real>(channel, k++), sum);
        return sum;
    }
};

/// The filters of kChannels neighbouring channels, and the inputs before the next step.
template <class Real, int kChannels>
struct Walk {
    Real taps[kConvTaps][kChannels], bias[kChannels], window[kConvTaps][kChannels];
    std::int32_t sequence;  // of the last step that was not skipped, or -1
    int missing;            // taps that the filter lacks

    SSM_DEVICE void begin(const ConvInputs& in, std::int64_t row, std::int64_t channel,
                          std::int64_t step) {
        load_filter(in, channel);
        resume(in, row, channel, step);
    }

    SSM_DEVICE void load_filter(const ConvInputs& in, std::int64_t channel) {
        missing = kConvTaps - static_cast<int>(in.width);
        SSM_UNROLL
        for (int c = 0; c < kChannels; ++c) {
            bias[c] = in.template bias_of<Real>(channel + c);
            SSM_UNROLL
            for (int k = 0; k < kConvTaps; ++k)
                taps[k][c] =
                    k < missing ? Real(0) : in.template tap<Real>(channel + c, k - missing);
        }
    }

    /// The inputs before a step, wherever the walk was.
    SSM_DEVICE void resume(const ConvInputs& in, std::int64_t row, std::int64_t channel,
                           std::int64_t step) {
        const std::int64_t before = in.step_before(row, step);
        sequence = before < 0 ? -1 : in.sequence_at(row, before);
        if (sequence >= 0) enter(in, row, channel, in.reach(row, step, sequence));
    }

    /// The inputs before a step, of which it is known how far they reach.
    SSM_DEVICE void enter(const ConvInputs& in, std::int64_t row, std::int64_t channel,
                          const Reach& from) {
        std::int64_t step = from.step;
        const int first = kConvTaps - static_cast<int>(from.have);  // in the window, of the steps
        SSM_UNROLL
        for (int k = 1; k < kConvTaps; ++k) {
            if (k <= missing) continue;
            const std::int64_t place = from.have + k - missing - 1;
            if (k >= first)
                while (in.sequence_at(row, step) < 0) ++step;
            SSM_UNROLL
            for (int c = 0; c < kChannels; ++c)
                window[k][c] = k < first
                                   ? in.template remembered<Real>(from.state, channel + c, place)
                                   : in.template input<Real>(row, channel + c, step);
            if (k >= first) ++step;
        }
    }

    /// A sequence begins at `step`. Returns whether it has a state.
    SSM_DEVICE bool change(const ConvInputs& in, std::int64_t row, std::int64_t channel,
                           std::int64_t step, std::int32_t next) {
        const bool has_state = in.state_per_sequence || sequence < 0;
        enter(in, row, channel, {step, 0, has_state ? in.state_of(row, next) : -1});
        sequence = next;
        return has_state;
    }

    /// The inputs of a step become the newest ones.
    SSM_DEVICE void take(const Real (&inputs)[kChannels]) {
        SSM_UNROLL
        for (int c = 0; c < kChannels; ++c) {
            SSM_UNROLL
            for (int k = 0; k + 1 < kConvTaps; ++k) window[k][c] = window[k + 1][c];
            window[kConvTaps - 1][c] = inputs[c];
        }
    }
    /// As ConvInputs::filter.
    SSM_DEVICE Real filter(int c) const {
        Real sum = bias[c];
        SSM_UNROLL
        for (int k = 0; k < kConvTaps; ++k)
            if (k >= missing) sum = fma_of(window[k][c], taps[k][c], sum);
        return sum;
    }
};

/// One element of (B, D, L), such that neighbouring numbers are neighbours in memory.
struct ConvElement {
    std::int64_t row, channel, step;

    SSM_DEVICE ConvElement(const ConvInputs& in, std::int64_t number) {
        const std::int64_t inner = in.along_steps ? in.seqlen : in.dim;
        const std::int64_t line = quotient(number, inner);
        const std::int64_t outer = in.along_steps ? in.dim : in.seqlen;
        row = quotient(line, outer);
        channel = in.along_steps ? line - row * outer : number - line * inner;
        step = in.along_steps ? number - line * inner : line - row * outer;
    }
};

inline std::int64_t conv_blocks(std::int64_t threads) {
    return (threads + kConvThreads - 1) / kConvThreads;
}

/// Runs use(element) on every element.
template <class Real, class Use>
struct EachConvElement {
    static constexpr int kThreads = kConvThreads;
    static constexpr int kBlocksPerUnit = 4;
    struct Registers {};

    ConvInputs in;
    Use use;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t number = index * kThreads + thread;
            if (number < in.batch * in.dim * in.seqlen) use(in, ConvElement(in, number));
        });
    }
};

/// Which steps begin or end a sequence that has a state.
enum class Edge { begin, end };

/// Runs use(in, row, step, channel) for the channels of every step at an edge.
template <class Real, Edge kEdge, class Use>
struct EachConvEdge {
    static constexpr int kThreads = kConvThreads;
    static constexpr int kBlocksPerUnit = 4;
    struct Registers {};

    ConvInputs in;
    Use use;

    std::int64_t channel_tiles() const { return conv_blocks(in.dim); }
    /// Without sequences only the ends of the rows are edges.
    SSM_BOTH std::int64_t step_tiles() const {
        return in.seq_idx ? (in.seqlen + kThreads - 1) / kThreads : 1;
    }
    std::int64_t blocks() const { return in.batch * step_tiles() * channel_tiles(); }
    std::int64_t shared_size() const { return kThreads; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const std::int64_t tile = quotient(index, step_tiles());
        std::int64_t first = (index - tile * step_tiles()) * kThreads;
        if (!in.seq_idx && kEdge == Edge::end) first = in.seqlen - 1;
        const std::int64_t channel_tile = quotient(tile, in.batch);
        const std::int64_t row = tile - channel_tile * in.batch;
        const std::int64_t first_channel = channel_tile * kThreads;
        block.each([&](int thread, Registers&) {
            block.write(thread, is_edge(row, first + thread) ? Real(1) : Real(0));
        });
        block.barrier();
        block.each([&](int thread, Registers&) {
            const std::int64_t channel = first_channel + thread;
            if (channel >= in.dim) return;
            for (int i = 0; i < kThreads; ++i)
                if (block.read(i) != 0) use(in, row, first + i, channel);
        });
    }

  private:
    SSM_DEVICE bool is_edge(std::int64_t row, std::int64_t step) const {
        if (step >= in.seqlen || in.sequence_at(row, step) < 0) return false;
        const std::int64_t next =
            kEdge == Edge::end ? in.step_after(row, step) : in.step_before(row, step);
        if (next < 0 || next >= in.seqlen) return true;
        return in.state_per_sequence && in.sequence_at(row, next) != in.sequence_at(row, step);
    }
};

/// to = from, or 0: what remains of a sequence without steps.
template <class Real>
struct CopyConvStates {
    static constexpr int kThreads = kConvThreads;
    static constexpr int kBlocksPerUnit = 4;
    struct Registers {};

    Plane<3> from, to;  // (S, D, W - 1)
    std::int64_t dim, memory, elements;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t element = index * kThreads + thread;
            if (element >= elements) return;
            const std::int64_t place = element % memory, channel = element / memory % dim;
            const std::int64_t state = element / memory / dim;
            const auto at = [&](const Plane<3>& tensor) {
                return ConvInputs::offset(tensor, state, channel, place);
            };
            to.store(at(to), from ? from.template load<Real>(at(from)) : Real(0));
        });
    }
};

/// Starts copying `from` to `to`, what remains of the states of sequences without steps.
template <class Real>
void copy_conv_states(const char* op, const ConvInputs& in, const TensorView& from,
                      const TensorView& to, const Device& device, const Exec& exec) {
    if (to.ndim == kAbsent || in.width == 1 || (in.seqlen > 0 && !in.seq_idx)) return;
    const CopyConvStates<Real> copy{plane<3>(from), plane<3>(to), in.dim, in.width - 1,
                                    to.shape[0] * in.dim * (in.width - 1)};
    launch<Real>(op, copy, conv_blocks(copy.elements), device, exec);
}

/// Starts writing the states `to` at the edges of sequences.
template <class Real, Edge kEdge, class Use>
void put_conv_states(const char* op, const ConvInputs& in, const TensorView& to, const Use& use,
                     const Device& device, const Exec& exec) {
    if (to.ndim == kAbsent || in.width == 1 || in.seqlen == 0) return;
    const EachConvEdge<Real, kEdge, Use> edges{in, use};
    launch<Real>(op, edges, edges.blocks(), device, exec);
}

}  // namespace ssm::cuda
