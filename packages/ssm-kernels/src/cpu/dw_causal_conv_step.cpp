// Causal convolution, one token or a few. A task owns a range of channels of one batch row; lanes
// are channels. Its state and its tokens form one line of steps, over which the filter runs.
// docs/ops/dw_causal_conv_step.md#algorithm
#include <ssm/dw_causal_conv_step.h>

#include "../op/scratch.h"
#include "dw_causal_conv_filter.h"

namespace ssm::cpu::SSM_ISA {

namespace {

constexpr LaneAxis kAxis = LaneAxis::channel;
constexpr std::int64_t kBlock = 512;  // channels of a task: a line of a tile
constexpr std::int64_t kTokens = 8;   // tokens of a pass over the tile
constexpr std::int64_t kAlone =
    1 << 16;  // below this many products a second thread costs more than it gives

// A state whose K inputs of a channel are adjacent, to and from [step][channel].
template <int kSteps, class T, class E>
void split_states(T* __restrict to, const E* __restrict from, std::int64_t channels) {
    for (std::int64_t c = 0; c < channels; ++c)
        for (int k = 0; k < kSteps; ++k)
            to[k * kBlock + c] = static_cast<T>(widen(from[c * kSteps + k]));
}
template <int kSteps, class T, class E>
void join_states(E* __restrict to, const T* __restrict from, std::int64_t channels) {
    for (std::int64_t c = 0; c < channels; ++c)
        for (int k = 0; k < kSteps; ++k) narrow(to + c * kSteps + k, from[k * kBlock + c]);
}

bool is_dense(const TensorView& state) {
    return state.stride[2] == 1 && state.stride[1] == state.shape[2];
}

template <class T>
void load_weight(T* to, const TensorView& weight, const Channels& channels) {
    const Plane plane =
        plane_at(weight, channels.first * weight.stride[0], weight.stride[1], weight.stride[0]);
    if (weight.shape[1] == 4 && weight.stride[1] == 1 && weight.stride[0] == 4)
        visit_elements(plane, [&](const auto* from) { split_states<4>(to, from, channels.count); });
    else
        load_tile(to, kBlock, plane, weight.shape[1], channels.count);
}

template <class T>
void load_state(T* line, const TensorView& state, std::int64_t row, const Channels& channels) {
    const std::int64_t memory = state.shape[2];
    if (is_dense(state) && (memory == 3 || memory == 4)) {
        visit_elements(steps_plane<kAxis>(state, row, channels.first, 0), [&](const auto* from) {
            if (memory == 3)
                split_states<3>(line, from, channels.count);
            else
                split_states<4>(line, from, channels.count);
        });
    } else if (memory > 0) {
        load_steps<kAxis>(line, kBlock, state, row, channels, 0, memory);
    }
}

template <class T>
void store_state(const TensorView& state, std::int64_t row, const Channels& channels,
                 const T* line) {
    const std::int64_t memory = state.shape[2];
    if (is_dense(state) && (memory == 3 || memory == 4)) {
        visit_elements(steps_plane<kAxis>(state, row, channels.first, 0), [&](auto* to) {
            if (memory == 3)
                join_states<3>(to, line, channels.count);
            else
                join_states<4>(to, line, channels.count);
        });
    } else if (memory > 0) {
        store_steps<kAxis>(state, row, channels, 0, line, kBlock, memory);
    }
}

// The steps of a line that lie before its tokens: the whole state if it is shifted, so that what is
// left of the line afterwards is the new state; else the W - 1 inputs that the filter needs.
std::int64_t history_of(const DwCausalConvStepArgs& args) {
    return args.cache_seqlens.ndim >= 0 ? args.weight.shape[1] - 1 : args.conv_state.shape[2];
}

template <class T>
std::int64_t elements_of(const DwCausalConvStepArgs& args) {
    return (history_of(args) + 2 * kTokens + args.weight.shape[1] + 1) * kBlock;
}

template <class T>
void step_block(const DwCausalConvStepArgs& args, std::int64_t row, std::int64_t slot,
                const Channels& channels, T* memory) {
    const std::int64_t width = args.weight.shape[1], history = history_of(args);
    const std::int64_t tokens = args.x.shape[2], size = args.conv_state.shape[2];
    const bool circular = args.cache_seqlens.ndim >= 0;
    T* const line = memory;
    T* const out = line + (history + kTokens) * kBlock;
    T* const weight = out + kTokens * kBlock;
    T* const bias = weight + width * kBlock;
    load_weight(weight, args.weight, channels);
    if (args.bias.ndim >= 0)
        load_tile(bias, 0,
                  plane_at(args.bias, channels.first * args.bias.stride[0], 0, args.bias.stride[0]),
                  1, channels.count);
    else
        std::memset(bias, 0, sizeof(T) * kBlock);
    const std::int64_t seen = circular
                                  ? static_cast<const std::int32_t*>(
                                        args.cache_seqlens.data)[row * args.cache_seqlens.stride[0]]
                                  : 0;
    if (circular) {
        for (std::int64_t i = 0; i < history; ++i) {
            // seen - history may be negative; the memory is at least as long as the history.
            const std::int64_t position = (seen - history + i + size) % size;
            load_steps<kAxis>(line + i * kBlock, kBlock, args.conv_state, slot, channels, position,
                              1);
        }
    } else {
        load_state(line, args.conv_state, slot, channels);
    }
    const Taps<T> taps{weight, kBlock, bias, width};
    const auto filter_tile = choose_filter<kAxis, T, T>(width, args.silu);
    for (std::int64_t t = 0; t < tokens; t += kTokens) {
        const std::int64_t count = min(kTokens, tokens - t);
        load_steps<kAxis>(line + history * kBlock, kBlock, args.x, row, channels, t, count);
        filter_tile(
            {line + (history - (width - 1)) * kBlock, kBlock, out, kBlock, channels.count, count},
            taps);
        store_steps<kAxis>(args.y, row, channels, t, out, kBlock, count);
        if (circular && size > 0)
            for (std::int64_t i = 0; i < count; ++i)
                store_steps<kAxis>(args.conv_state, slot, channels, (seen + t + i) % size,
                                   line + (history + i) * kBlock, kBlock, 1);
        std::memmove(line, line + count * kBlock,
                     sizeof(T) * static_cast<std::size_t>(history * kBlock));
    }
    if (!circular && tokens > 0) store_state(args.conv_state, slot, channels, line);
}

template <class T>
void step_rows(const DwCausalConvStepArgs& args, int threads) {
    const std::int64_t dim = args.x.shape[1], tokens = args.x.shape[2];
    const std::int64_t blocks = (dim + kBlock - 1) / kBlock, tasks = args.x.shape[0] * blocks;
    if (args.x.shape[0] * dim * tokens * args.weight.shape[1] < kAlone) threads = 1;
    const std::int64_t elements = elements_of<T>(args);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * threads));
    parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
        const std::int64_t row = task / blocks, first = task % blocks * kBlock;
        const Channels channels{first, min(kBlock, dim - first)};
        const TensorView& indices = args.state_indices;
        const std::int64_t slot =
            indices.ndim < 0
                ? row
                : static_cast<const std::int32_t*>(indices.data)[row * indices.stride[0]];
        T* const memory = static_cast<T*>(scratch.data()) + elements * thread;
        if (slot >= 0) return step_block<T>(args, row, slot, channels, memory);
        std::memset(memory, 0, sizeof(T) * kBlock);
        store_zeros<kAxis>(args.y, row, channels, 0, tokens, memory, max(tokens, 1));
    });
}

}  // namespace

void dw_causal_conv_step_fwd(const DwCausalConvStepArgs& args, int threads) {
    if (args.x.dtype == DType::f64)
        step_rows<double>(args, threads);
    else
        step_rows<float>(args, threads);
}

}  // namespace ssm::cpu::SSM_ISA
