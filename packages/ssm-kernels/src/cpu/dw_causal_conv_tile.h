// What the forward, the backward and the step of the causal convolution share: the choice of the
// lane axis, tiles in cache, and the inputs that lie around a step in its sequence.
#pragma once

#include "sequences.h"
#include "vmath.h"

namespace ssm::cpu::SSM_ISA {

/// What the lanes of a vector stand for: adjacent steps of one channel, or adjacent channels of one
/// step. A tile is [channel][step] or [step][channel] accordingly.
enum class LaneAxis { time, channel };

/// A range of channels of the batch.
struct Channels {
    std::int64_t first;
    std::int64_t count;
};

/// Lanes lie along the axis that is contiguous in memory, and never along one shorter than a vector
/// while the other is longer.
template <class T>
SSM_INLINE LaneAxis lane_axis(const TensorView& x) {
    const std::int64_t dim = x.shape[1], seqlen = x.shape[2];
    if (seqlen < kLanes<T> && seqlen < dim) return LaneAxis::channel;
    if (dim < kLanes<T> && dim < seqlen) return LaneAxis::time;
    return x.stride[1] == 1 && x.stride[2] != 1 ? LaneAxis::channel : LaneAxis::time;
}

template <LaneAxis axis>
SSM_INLINE std::int64_t lane_stride(const TensorView& view) {
    return view.stride[axis == LaneAxis::time ? 2 : 1];
}
template <LaneAxis axis>
SSM_INLINE std::int64_t line_stride(const TensorView& view) {
    return view.stride[axis == LaneAxis::time ? 1 : 2];
}

/// Elements between two steps of a tile.
template <LaneAxis axis>
SSM_INLINE std::int64_t step_pitch(std::int64_t pitch) {
    return axis == LaneAxis::time ? 1 : pitch;
}
template <LaneAxis axis>
SSM_INLINE std::int64_t channel_pitch(std::int64_t pitch) {
    return axis == LaneAxis::time ? pitch : 1;
}

/// Where a step of a channel lies in a tile, or in a tensor whose lines are `pitch` apart.
template <LaneAxis axis>
SSM_INLINE std::int64_t offset(std::int64_t pitch, std::int64_t channel, std::int64_t step) {
    return channel * channel_pitch<axis>(pitch) + step * step_pitch<axis>(pitch);
}

/// Whether lines of the tensor are arrays of E.
template <LaneAxis axis, class E>
SSM_INLINE bool is_direct(const TensorView& view) {
    constexpr DType kDType = std::is_same_v<E, double>     ? DType::f64
                             : std::is_same_v<E, float>    ? DType::f32
                             : std::is_same_v<E, BFloat16> ? DType::bf16
                                                           : DType::f16;
    return view.dtype == kDType && lane_stride<axis>(view) == 1;
}

/// (B, D, L), or states (S, D, W - 1), from step t of a row on.
template <LaneAxis axis>
SSM_INLINE Plane steps_plane(const TensorView& view, std::int64_t row, std::int64_t channel,
                             std::int64_t t) {
    return plane_at(view, row * view.stride[0] + channel * view.stride[1] + t * view.stride[2],
                    line_stride<axis>(view), lane_stride<axis>(view));
}

/// Steps [t, t + count) of `view` to the steps of a tile from `to` on.
template <LaneAxis axis, class T>
SSM_INLINE void load_steps(T* to, std::int64_t pitch, const TensorView& view, std::int64_t row,
                           const Channels& channels, std::int64_t t, std::int64_t count) {
    const bool by_time = axis == LaneAxis::time;
    load_tile(to, pitch, steps_plane<axis>(view, row, channels.first, t),
              by_time ? channels.count : count, by_time ? count : channels.count);
}

template <LaneAxis axis, class T>
SSM_INLINE void store_steps(const TensorView& view, std::int64_t row, const Channels& channels,
                            std::int64_t t, const T* from, std::int64_t pitch, std::int64_t count) {
    const bool by_time = axis == LaneAxis::time;
    store_tile(steps_plane<axis>(view, row, channels.first, t), from, pitch,
               by_time ? channels.count : count, by_time ? count : channels.count);
}

/// Zero in the steps [t, t + count) of a tile.
template <LaneAxis axis, class T>
SSM_INLINE void clear_steps(T* tile, std::int64_t pitch, std::int64_t channels,
                            std::int64_t count) {
    const bool by_time = axis == LaneAxis::time;
    const std::int64_t lines = by_time ? channels : count, length = by_time ? count : channels;
    for (std::int64_t i = 0; i < lines; ++i)
        std::memset(tile + i * pitch, 0, sizeof(T) * static_cast<std::size_t>(length));
}

/// Skipped steps give 0, whatever their inputs hold. `zeros` is one line of a tile.
template <LaneAxis axis, class T>
SSM_INLINE void store_zeros(const TensorView& view, std::int64_t row, const Channels& channels,
                            std::int64_t begin, std::int64_t end, const T* zeros,
                            std::int64_t longest) {
    for (std::int64_t t = begin; t < end; t += longest)
        store_steps<axis>(view, row, channels, t, zeros, 0, min(longest, end - t));
}

/// The last `memory` inputs of the sequence before step t of `run`, oldest first: steps of this
/// run, then of the runs that it continues, then the newest of the initial state.
template <LaneAxis axis, class T>
static inline void load_window(T* to, std::int64_t pitch, const TensorView& x,
                               const TensorView& initial_state, std::int64_t row, const Run* run,
                               const Channels& channels, std::int64_t t, std::int64_t memory) {
    std::int64_t missing = memory;
    for (;; t = (--run)->end) {
        const std::int64_t count = min(missing, t - run->begin);
        missing -= count;
        if (count > 0)
            load_steps<axis>(to + missing * step_pitch<axis>(pitch), pitch, x, row, channels,
                             t - count, count);
        if (missing == 0) return;
        if (run->state_in != Run::kContinue) break;
    }
    if (run->state_in == Run::kZero || initial_state.ndim < 0)
        clear_steps<axis>(to, pitch, channels.count, missing);
    else
        load_steps<axis>(to, pitch, initial_state, run->state_in, channels, memory - missing,
                         missing);
}

/// to = from, or zero where `from` is absent: states of shape (S, D, W - 1).
template <class T>
static inline void copy_conv_states(const TensorView& from, const TensorView& to, int threads) {
    constexpr std::int64_t kLine = 256;
    parallel_for(to.shape[0], threads, [&](std::int64_t sequence, int) {
        T line[kLine];
        std::memset(line, 0, sizeof line);
        for (std::int64_t k = 0; k < to.shape[2]; ++k)
            for (std::int64_t d = 0; d < to.shape[1]; d += kLine) {
                const Channels channels{d, min(kLine, to.shape[1] - d)};
                if (from.ndim >= 0)
                    load_steps<LaneAxis::channel>(line, kLine, from, sequence, channels, k, 1);
                store_steps<LaneAxis::channel>(to, sequence, channels, k, line, kLine, 1);
            }
    });
}

}  // namespace ssm::cpu::SSM_ISA
