// The forward of the causal convolution on the device. Where the filter is short and memory is made
// of packs, a thread keeps the last inputs in registers and walks the steps of a pack of channels,
// or the steps of one pack; everything else goes element by element.
#include "dw_causal_conv_tile.cuh"
#include "kernels.h"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "dw_causal_conv";
/// Blocks that fill a GPU. With fewer, a block walks fewer steps.
constexpr std::int64_t kFullDevice = 528;
constexpr std::int64_t kMostSteps = 64, kLeastSteps = 16;

/// Leaves the outputs of a step in `values`, which holds its inputs.
template <class Real, int kChannels>
SSM_DEVICE void advance(const ConvInputs& in, Walk<Real, kChannels>& walk, std::int64_t row,
                        std::int64_t channel, std::int64_t step, Real (&values)[kChannels]) {
    const std::int32_t next = in.sequence_at(row, step);
    if (next < 0) {
        for (Real& value : values) value = 0;
        return;
    }
    if (next != walk.sequence) walk.change(in, row, channel, step, next);
    walk.take(values);
    SSM_UNROLL
    for (int c = 0; c < kChannels; ++c) {
        const Real sum = walk.filter(c);
        values[c] = in.silu ? silu(sum) : sum;
    }
}

/// A thread walks some steps of a pack of channels.
template <class Memory, class Real>
struct ChannelPacks {
    static constexpr int kThreads = kConvThreads;
    static constexpr int kBlocksPerUnit = 3;
    static constexpr int kPack = Pack<Memory>::kWidth;
    static constexpr int kAhead = 4;  // steps whose inputs are under way at a time
    struct Registers {};

    ConvInputs in;
    Plane<3> y;
    std::int64_t tiles, parts, steps;  // blocks along channels and along steps, steps of a block

    ChannelPacks(const ConvInputs& inputs, const Plane<3>& output)
        : in(inputs), y(output), tiles(conv_blocks(in.dim / kPack)) {
        for (steps = kMostSteps;; steps /= 2) {
            parts = (in.seqlen + steps - 1) / steps;
            if (blocks() >= kFullDevice || steps == kLeastSteps) break;
        }
    }
    std::int64_t blocks() const { return in.batch * parts * tiles; }
    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t line = quotient(index, tiles), row = quotient(line, parts);
            const std::int64_t channel = ((index - line * tiles) * kThreads + thread) * kPack;
            const std::int64_t begin = (line - row * parts) * steps;
            const std::int64_t end = begin + steps < in.seqlen ? begin + steps : in.seqlen;
            if (channel >= in.dim) return;
            Walk<Real, kPack> walk;
            walk.begin(in, row, channel, begin);
            const Memory* from =
                static_cast<const Memory*>(in.x.data) + in.offset(in.x, row, channel, begin);
            Memory* to = static_cast<Memory*>(y.data) + in.offset(y, row, channel, begin);
            SSM_ROLLED
            for (std::int64_t step = begin; step < end; step += kAhead) {
                Pack<Memory> packs[kAhead];
                SSM_UNROLL
                for (int i = 0; i < kAhead; ++i)
                    if (step + i < end)
                        packs[i] =
                            *reinterpret_cast<const Pack<Memory>*>(from + i * in.x.stride[2]);
                SSM_UNROLL
                for (int i = 0; i < kAhead; ++i) {
                    if (step + i >= end) continue;
                    Real values[kPack];
                    SSM_UNROLL
                    for (int c = 0; c < kPack; ++c)
                        values[c] = static_cast<Real>(widen(packs[i].of[c]));
                    advance(in, walk, row, channel, step + i, values);
                    SSM_UNROLL
                    for (int c = 0; c < kPack; ++c) narrow(values[c], packs[i].of[c]);
                    *reinterpret_cast<Pack<Memory>*>(to + i * y.stride[2]) = packs[i];
                }
                from += kAhead * in.x.stride[2];
                to += kAhead * y.stride[2];
            }
        });
    }
};

/// A thread takes one pack of steps of a channel.
template <class Memory, class Real>
struct StepPacks {
    static constexpr int kThreads = kConvThreads;
    static constexpr int kBlocksPerUnit = 8;
    static constexpr int kPack = Pack<Memory>::kWidth;
    struct Registers {};

    ConvInputs in;
    Plane<3> y;
    std::int64_t line_packs, packs;  // of a channel, and in all

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t number = index * kThreads + thread;
            if (number >= packs) return;
            const std::int64_t line = quotient(number, line_packs), row = quotient(line, in.dim);
            const std::int64_t channel = line - row * in.dim;
            const std::int64_t step = (number - line * line_packs) * kPack;
            Pack<Memory> pack = *reinterpret_cast<const Pack<Memory>*>(
                static_cast<const Memory*>(in.x.data) + in.offset(in.x, row, channel, step));
            Walk<Real, 1> walk;
            walk.begin(in, row, channel, step);
            SSM_UNROLL
            for (int i = 0; i < kPack; ++i) {
                Real value[1] = {static_cast<Real>(widen(pack.of[i]))};
                advance(in, walk, row, channel, step + i, value);
                narrow(value[0], pack.of[i]);
            }
            *reinterpret_cast<Pack<Memory>*>(static_cast<Memory*>(y.data) +
                                             in.offset(y, row, channel, step)) = pack;
        });
    }
};

template <class Real>
struct Output {
    Plane<3> y;

    SSM_DEVICE void operator()(const ConvInputs& in, const ConvElement& at) const {
        Real value = 0;
        if (in.sequence_at(at.row, at.step) >= 0) {
            value = in.template filter<Real>(at.row, at.channel, at.step);
            if (in.silu) value = silu(value);
        }
        y.store(in.offset(y, at.row, at.channel, at.step), value);
    }
};

/// The inputs before what follows the last step of a sequence.
template <class Real>
struct FinalState {
    Plane<3> final_state;  // (S, D, W - 1)

    SSM_DEVICE void operator()(const ConvInputs& in, std::int64_t row, std::int64_t step,
                               std::int64_t channel) const {
        const std::int32_t sequence = in.sequence_at(row, step);
        const Reach from = in.reach(row, step + 1, sequence);
        const std::int64_t state = in.state_of(row, sequence);
        std::int64_t place = 0;
        const auto put = [&](Real value) {
            final_state.store(in.offset(final_state, state, channel, place++), value);
        };
        while (place < in.width - 1 - from.have)
            put(in.template remembered<Real>(from.state, channel, from.have + place));
        for (std::int64_t s = from.step; s <= step; ++s)
            if (in.sequence_at(row, s) >= 0) put(in.template input<Real>(row, channel, s));
    }
};

template <class Real, class Memory>
bool start_packed(const ConvInputs& in, const DwCausalConvArgs& args, const Exec& exec) {
    constexpr int kWidth = Pack<Memory>::kWidth;
    const auto both = [&](int axis) {
        return in_packs(args.x, axis, kWidth) && in_packs(args.y, axis, kWidth);
    };
    if (in.width > kConvTaps || args.x.dtype != args.y.dtype) return false;
    if (both(1)) {
        const ChannelPacks<Memory, Real> kernel(in, plane<3>(args.y));
        launch<Real>(kOp, kernel, kernel.blocks(), args.x.device, exec);
        return true;
    }
    if (!both(2)) return false;
    const std::int64_t line_packs = in.seqlen / kWidth;
    const StepPacks<Memory, Real> kernel{in, plane<3>(args.y), line_packs,
                                         in.batch * in.dim * line_packs};
    launch<Real>(kOp, kernel, conv_blocks(kernel.packs), args.x.device, exec);
    return true;
}

}  // namespace

void dw_causal_conv_fwd(const DwCausalConvArgs& args, std::int64_t num_states, const Exec& exec) {
    const ConvInputs in(args, num_states);
    const Device device = args.x.device;
    with_compute_type(args.x.dtype, [&](auto zero) {
        using Real = decltype(zero);
        bool packed = false;
        with_memory_type(args.x.dtype, [&](auto element) {
            packed = start_packed<Real, decltype(element)>(in, args, exec);
        });
        if (!packed) {
            const EachConvElement<Real, Output<Real>> each{in, {plane<3>(args.y)}};
            launch<Real>(kOp, each, conv_blocks(in.elements()), device, exec);
        }
        copy_conv_states<Real>(kOp, in, args.initial_state, args.final_state, device, exec);
        put_conv_states<Real, Edge::end>(
            kOp, in, args.final_state, FinalState<Real>{plane<3>(args.final_state)}, device, exec);
    });
}

}  // namespace ssm::cuda
