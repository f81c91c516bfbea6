// One token, or a few, of the causal convolution on the device. A thread owns a channel.
#include "kernels.h"
#include "launch.cuh"
#include "numerics.cuh"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "dw_causal_conv_step";
constexpr int kBlock = 128;

/// The problem in plain numbers, in the canonical form of the front.
struct ConvStepInputs {
    Plane<3> x, y;                          // (B, D, T)
    Plane<3> conv_state;                    // (R, D, K)
    Plane<2> weight;                        // (D, W)
    Plane<1> bias;                          // (D)
    Plane<1> cache_seqlens, state_indices;  // (B), int32
    std::int64_t batch, dim, tokens, width, memory, num_states;
    std::int64_t tiles;  // blocks of one row
    bool silu;

    explicit ConvStepInputs(const DwCausalConvStepArgs& args)
        : x(plane<3>(args.x)),
          y(plane<3>(args.y)),
          conv_state(plane<3>(args.conv_state)),
          weight(plane<2>(args.weight)),
          bias(plane<1>(args.bias)),
          cache_seqlens(plane<1>(args.cache_seqlens)),
          state_indices(plane<1>(args.state_indices)),
          batch(args.x.shape[0]),
          dim(args.x.shape[1]),
          tokens(args.x.shape[2]),
          width(args.weight.shape[1]),
          memory(args.conv_state.shape[2]),
          num_states(args.conv_state.shape[0]),
          tiles((dim + kBlock - 1) / kBlock),
          silu(args.silu) {}

    static SSM_DEVICE std::int32_t index_at(const Plane<1>& indices, std::int64_t row) {
        return static_cast<const std::int32_t*>(indices.data)[row * indices.stride[0]];
    }
    static SSM_DEVICE std::int64_t offset(const Plane<3>& tensor, std::int64_t row,
                                          std::int64_t channel, std::int64_t step) {
        return row * tensor.stride[0] + channel * tensor.stride[1] + step * tensor.stride[2];
    }
    template <class Real>
    SSM_DEVICE Real bias_of(std::int64_t channel) const {
        return bias ? bias.template load<Real>(channel * bias.stride[0]) : Real(0);
    }
    template <class Real>
    SSM_DEVICE Real tap(std::int64_t channel, std::int64_t k) const {
        return weight.template load<Real>(channel * weight.stride[0] + k * weight.stride[1]);
    }
    template <class Real>
    SSM_DEVICE void put(std::int64_t row, std::int64_t channel, std::int64_t token,
                        Real sum) const {
        y.store(offset(y, row, channel, token), silu ? ssm::cuda::silu(sum) : sum);
    }

    /// Calls step(row, channel, slot) for the channel of a thread, or zeroes y where it is skipped.
    template <class Real, class Use>
    SSM_DEVICE void with_channel(std::int64_t index, int thread, Use&& use) const {
        const std::int64_t row = quotient(index, tiles);
        const std::int64_t channel = (index - row * tiles) * kBlock + thread;
        if (channel >= dim) return;
        const std::int64_t slot = state_indices ? index_at(state_indices, row) : row;
        if (slot >= 0 && slot < num_states) return use(row, channel, slot);
        for (std::int64_t token = 0; token < tokens; ++token)
            y.store(offset(y, row, channel, token), Real(0));
    }
};

/// The usual state: shifted, four inputs that are moved as one.
template <class Memory, class Real>
struct PackedStep {
    static constexpr int kThreads = kBlock;
    static constexpr int kBlocksPerUnit = 8;
    static constexpr int kMemory = 4;
    struct Registers {};
    using Window = Pack<Memory, kMemory>;

    ConvStepInputs in;

    static bool takes(const TensorView& state, std::int64_t width) {
        return state.shape[2] == kMemory && width <= kMemory && in_packs(state, 2, kMemory);
    }
    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            in.with_channel<Real>(
                index, thread, [&](std::int64_t row, std::int64_t channel, std::int64_t slot) {
                    auto* const state =
                        reinterpret_cast<Window*>(static_cast<Memory*>(in.conv_state.data) +
                                                  in.offset(in.conv_state, slot, channel, 0));
                    const Window before = *state;
                    const int missing = kMemory - static_cast<int>(in.width);  // taps
                    Real window[kMemory], taps[kMemory] = {};
                    SSM_UNROLL
                    for (int k = 0; k < kMemory; ++k) {
                        window[k] = static_cast<Real>(widen(before.of[k]));
                        if (k >= missing) taps[k] = in.template tap<Real>(channel, k - missing);
                    }
                    const Real bias = in.template bias_of<Real>(channel);
                    SSM_ROLLED
                    for (std::int64_t token = 0; token < in.tokens; ++token) {
                        SSM_UNROLL
                        for (int k = 0; k + 1 < kMemory; ++k) window[k] = window[k + 1];
                        window[kMemory - 1] =
                            in.x.template load<Real>(in.offset(in.x, row, channel, token));
                        Real sum = bias;
                        SSM_UNROLL
                        for (int k = 0; k < kMemory; ++k)
                            if (k >= missing) sum = fma_of(window[k], taps[k], sum);
                        in.put(row, channel, token, sum);
                    }
                    Window after;
                    SSM_UNROLL
                    for (int k = 0; k < kMemory; ++k) narrow(window[k], after.of[k]);
                    *state = after;
                });
        });
    }
};

/// Any state: its inputs are read where they lie, and moved after the last token.
template <class Real>
struct StridedStep {
    static constexpr int kThreads = kBlock;
    static constexpr int kBlocksPerUnit = 8;
    struct Registers {};

    ConvStepInputs in;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            in.with_channel<Real>(
                index, thread, [&](std::int64_t row, std::int64_t channel, std::int64_t slot) {
                    for (std::int64_t token = 0; token < in.tokens; ++token)
                        in.put(row, channel, token, sum(row, channel, slot, token));
                    remember(row, channel, slot);
                });
        });
    }

  private:
    /// Where the input of step `step` lies, or is to lie; the first token is step 0.
    SSM_DEVICE std::int64_t place(std::int64_t row, std::int64_t step) const {
        if (!in.cache_seqlens) return in.memory + step;
        const std::int64_t position =
            (ConvStepInputs::index_at(in.cache_seqlens, row) + step) % in.memory;
        return position < 0 ? position + in.memory : position;
    }

    SSM_DEVICE Real sum(std::int64_t row, std::int64_t channel, std::int64_t slot,
                        std::int64_t token) const {
        Real sum = in.template bias_of<Real>(channel);
        for (std::int64_t k = 0; k < in.width; ++k) {
            const std::int64_t step = token - (in.width - 1) + k;
            const Real input = step < 0
                                   ? in.conv_state.template load<Real>(
                                         in.offset(in.conv_state, slot, channel, place(row, step)))
                                   : in.x.template load<Real>(in.offset(in.x, row, channel, step));
            sum = fma_of(input, in.template tap<Real>(channel, k), sum);
        }
        return sum;
    }

    /// The last inputs of the call become the newest ones of the state.
    SSM_DEVICE void remember(std::int64_t row, std::int64_t channel, std::int64_t slot) const {
        const std::int64_t kept = in.memory < in.tokens ? in.memory : in.tokens;
        const auto state_at = [&](std::int64_t position) {
            return in.offset(in.conv_state, slot, channel, position);
        };
        if (!in.cache_seqlens)
            for (std::int64_t position = 0; position + kept < in.memory; ++position)
                in.conv_state.store(state_at(position), in.conv_state.template load<Real>(
                                                            state_at(position + in.tokens)));
        for (std::int64_t step = in.tokens - kept; step < in.tokens; ++step)
            in.conv_state.store(
                state_at(in.cache_seqlens ? place(row, step) : in.memory - in.tokens + step),
                in.x.template load<Real>(in.offset(in.x, row, channel, step)));
    }
};

}  // namespace

void dw_causal_conv_step_fwd(const DwCausalConvStepArgs& args, const Exec& exec) {
    const ConvStepInputs in(args);
    const Device device = args.x.device;
    const std::int64_t blocks = in.tokens > 0 ? in.batch * in.tiles : 0;
    with_compute_type(args.x.dtype, [&](auto zero) {
        using Real = decltype(zero);
        bool packed = args.cache_seqlens.ndim == kAbsent;
        with_memory_type(args.conv_state.dtype, [&](auto element) {
            using Kernel = PackedStep<decltype(element), Real>;
            packed = packed && Kernel::takes(args.conv_state, in.width);
            if (packed) launch<Real>(kOp, Kernel{in}, blocks, device, exec);
        });
        if (!packed) launch<Real>(kOp, StridedStep<Real>{in}, blocks, device, exec);
    });
}

}  // namespace ssm::cuda
