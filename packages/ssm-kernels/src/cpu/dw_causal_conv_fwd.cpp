// Causal convolution, forward. A task owns a range of channels of one row over a range of steps; no
// task waits for another, since all that a step needs besides itself are the few inputs before it.
// docs/ops/dw_causal_conv.md#algorithm
#include <ssm/dw_causal_conv.h>

#include "../op/scratch.h"
#include "dw_causal_conv_filter.h"

namespace ssm::cpu::SSM_ISA {

namespace {

// The cut of the work and of the tiles, for one lane axis. A task is large enough to pay for its
// dispatch, a tile (input and output) fits in the L1 cache.
template <LaneAxis axis>
struct Cut {
    static constexpr bool kTime = axis == LaneAxis::time;
    static constexpr std::int64_t kChannels = kTime ? 16 : 512;
    static constexpr std::int64_t kSteps = kTime ? 2048 : 64;
    static constexpr std::int64_t kTileSteps = kTime ? 256 : 8;
};

// Dense arrays of one thread in the compute type.
template <LaneAxis axis, class T>
struct ConvTile {
    using C = Cut<axis>;
    std::int64_t in_pitch, out_pitch, taps_pitch;
    T* in;      // W - 1 + kTileSteps steps
    T* out;     // kTileSteps steps
    T* weight;  // [channel][tap] or [tap][channel]
    T* bias;    // [channel]
    T* zeros;   // a line of the longer side

    static std::int64_t elements(std::int64_t width) {
        const std::int64_t tile = (width - 1 + 2 * C::kTileSteps) * C::kChannels;
        return tile + (width + 1) * C::kChannels + max(C::kTileSteps, C::kChannels) + kLanes<T>;
    }

    ConvTile(T* memory, std::int64_t width) {
        in_pitch = C::kTime ? width - 1 + C::kTileSteps : C::kChannels;
        out_pitch = C::kTime ? C::kTileSteps : C::kChannels;
        taps_pitch = C::kTime ? width : C::kChannels;
        in = memory;
        out = in + (width - 1 + C::kTileSteps) * C::kChannels;
        weight = out + C::kTileSteps * C::kChannels;
        bias = weight + width * C::kChannels;
        zeros = bias + C::kChannels;
        std::memset(bias, 0, sizeof(T) * static_cast<std::size_t>(memory + elements(width) - bias));
    }
};

// E is the type of x and y where the filter reads and writes them itself, converting on its way.
template <LaneAxis axis, class T, class E>
void convolve_block(const DwCausalConvArgs& args, const Runs& runs, std::int64_t row,
                    const Channels& channels, std::int64_t first, std::int64_t last, T* memory) {
    using C = Cut<axis>;
    const std::int64_t width = args.weight.shape[1], history = width - 1;
    const ConvTile<axis, T> tile(memory, width);
    const Plane weight =
        plane_at(args.weight, channels.first * args.weight.stride[0],
                 args.weight.stride[C::kTime ? 0 : 1], args.weight.stride[C::kTime ? 1 : 0]);
    load_tile(tile.weight, tile.taps_pitch, weight, C::kTime ? channels.count : width,
              C::kTime ? width : channels.count);
    if (args.bias.ndim >= 0)
        load_tile(tile.bias, 0,
                  plane_at(args.bias, channels.first * args.bias.stride[0], 0, args.bias.stride[0]),
                  1, channels.count);
    const Taps<T> taps{tile.weight, tile.taps_pitch, tile.bias, width};
    const auto filter_tile = choose_filter<axis, T, T>(width, args.silu);
    const auto filter_tensor = choose_filter<axis, T, E>(width, args.silu);
    // Lines long enough for a vector need no tile.
    const bool is_long = axis == LaneAxis::time || channels.count >= kLanes<T>;
    const bool needs_no_tile = is_long && is_direct<axis, E>(args.x) && is_direct<axis, E>(args.y);
    constexpr std::int64_t kZeros = C::kTime ? C::kTileSteps : C::kSteps;
    const auto window = [&](const Run* run, std::int64_t t) {
        load_window<axis>(tile.in, tile.in_pitch, args.x, args.initial_state, row, run, channels, t,
                          history);
    };

    std::int64_t done = first;
    const Run* const end_run = runs.runs + runs.row_begin[row + 1];
    for (const Run* run = first_run_after(runs, row, first); run < end_run && run->begin < last;
         ++run) {
        const std::int64_t end = min(run->end, last);
        std::int64_t t = max(run->begin, first);
        store_zeros<axis>(args.y, row, channels, done, t, tile.zeros, kZeros);
        while (t < end) {
            // Only the first steps of a run reach back into what lies before it.
            const bool inside = t - run->begin >= history;
            if (inside && needs_no_tile) {
                const Plane x = steps_plane<axis>(args.x, row, channels.first, t - history);
                const Plane y = steps_plane<axis>(args.y, row, channels.first, t);
                filter_tensor(
                    {static_cast<const E*>(x.data), line_stride<axis>(args.x),
                     static_cast<E*>(y.data), line_stride<axis>(args.y), channels.count, end - t},
                    taps);
                break;
            }
            const std::int64_t steps =
                min(end - t, needs_no_tile ? min(history, C::kTileSteps) : C::kTileSteps);
            if (inside) {
                load_steps<axis>(tile.in, tile.in_pitch, args.x, row, channels, t - history,
                                 history + steps);
            } else {
                window(run, t);
                load_steps<axis>(tile.in + history * step_pitch<axis>(tile.in_pitch), tile.in_pitch,
                                 args.x, row, channels, t, steps);
            }
            Lines<T> lines{tile.in, tile.in_pitch, tile.out, tile.out_pitch, channels.count, steps};
            const bool writes_y = std::is_same_v<T, E> && needs_no_tile;
            if (writes_y) {
                lines.out = static_cast<T*>(steps_plane<axis>(args.y, row, channels.first, t).data);
                lines.out_pitch = line_stride<axis>(args.y);
            }
            filter_tile(lines, taps);
            if (!writes_y)
                store_steps<axis>(args.y, row, channels, t, tile.out, tile.out_pitch, steps);
            t += steps;
        }
        done = end;
        if (args.final_state.ndim >= 0 && run->state_out != Run::kNone && run->end <= last) {
            window(run, run->end);
            store_steps<axis>(args.final_state, run->state_out, channels, 0, tile.in, tile.in_pitch,
                              history);
        }
    }
    store_zeros<axis>(args.y, row, channels, done, last, tile.zeros, kZeros);
}

template <LaneAxis axis, class T, class E>
void convolve_rows(const DwCausalConvArgs& args, const Runs& runs, int threads) {
    using C = Cut<axis>;
    const std::int64_t dim = args.x.shape[1], seqlen = args.x.shape[2];
    const std::int64_t blocks = (dim + C::kChannels - 1) / C::kChannels;
    const std::int64_t parts = (seqlen + C::kSteps - 1) / C::kSteps;
    const std::int64_t elements =
        (ConvTile<axis, T>::elements(args.weight.shape[1]) + 15) / 16 * 16;
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * threads));
    parallel_for(args.x.shape[0] * blocks * parts, threads, [&](std::int64_t task, int thread) {
        const std::int64_t row = task / (blocks * parts), rest = task % (blocks * parts);
        // Neighbouring tasks are neighbours in memory.
        const std::int64_t block = C::kTime ? rest / parts : rest % blocks;
        const std::int64_t part = C::kTime ? rest % parts : rest / blocks;
        const Channels channels{block * C::kChannels,
                                min(C::kChannels, dim - block * C::kChannels)};
        convolve_block<axis, T, E>(args, runs, row, channels, part * C::kSteps,
                                   min((part + 1) * C::kSteps, seqlen),
                                   static_cast<T*>(scratch.data()) + elements * thread);
    });
}

template <class T, class E>
void convolve(const DwCausalConvArgs& args, const Runs& runs, int threads) {
    // A sequence without steps hands its state on unchanged.
    if (args.final_state.ndim >= 0 && (args.x.shape[2] == 0 || !runs.covers_all))
        copy_conv_states<T>(args.initial_state, args.final_state, threads);
    // Lanes of time meet each input once per tap: to convert it before is less work.
    if (lane_axis<T>(args.x) == LaneAxis::time)
        convolve_rows<LaneAxis::time, T, T>(args, runs, threads);
    else
        convolve_rows<LaneAxis::channel, T, E>(args, runs, threads);
}

}  // namespace

void dw_causal_conv_fwd(const DwCausalConvArgs& args, const Runs& runs, int threads) {
    if (args.x.dtype == DType::f64)
        convolve<double, double>(args, runs, threads);
    else if (kHasLanes<float, BFloat16> && args.x.dtype == DType::bf16)
        convolve<float, BFloat16>(args, runs, threads);
    else if (kHasLanes<float, Float16> && args.x.dtype == DType::f16)
        convolve<float, Float16>(args, runs, threads);
    else
        convolve<float, float>(args, runs, threads);
}

}  // namespace ssm::cpu::SSM_ISA
