// The filter itself on dense lines: what the forward and the step of the causal convolution share.
#pragma once

#include "dw_causal_conv_tile.h"
#include "gate.h"

namespace ssm::cpu::SSM_ISA {

/// Up to a vector's worth of elements, zero in the other lanes.
template <class T>
SSM_INLINE Vec<T> load_part(const T* from, std::int64_t count) {
    T line[kLanes<T>] = {};
    std::memcpy(line, from, sizeof(T) * static_cast<std::size_t>(count));
    return load<T>(line);
}
template <class T>
SSM_INLINE void store_part(T* to, Vec<T> v, std::int64_t count) {
    T line[kLanes<T>];
    store<T>(line, v);
    std::memcpy(to, line, sizeof(T) * static_cast<std::size_t>(count));
}

/// The taps and bias of a range of channels: [channel][tap] for lanes of time, [tap][channel] for
/// lanes of channels; `pitch` lies between two lines.
template <class T>
struct Taps {
    const T* weight;
    std::int64_t pitch;
    const T* bias;
    std::int64_t width;
};

/// Lines of input and output. Input step i is `width - 1` steps before output step i, so that tap k
/// of output step i meets input step i + k.
template <class E>
struct Lines {
    const E* in;
    std::int64_t in_pitch;
    E* out;
    std::int64_t out_pitch;
    std::int64_t channels;
    std::int64_t steps;
};

/// Lanes of time: one channel after the other.
template <class T, int kWidth, bool kSilu>
static void filter_channels(const Lines<T>& lines, const Taps<T>& taps) {
    constexpr std::int64_t n = kLanes<T>;
    const std::int64_t width = kWidth > 0 ? kWidth : taps.width, steps = lines.steps;
    for (std::int64_t c = 0; c < lines.channels; ++c) {
        const T* const in = lines.in + c * lines.in_pitch;
        T* const out = lines.out + c * lines.out_pitch;
        const T* const weight = taps.weight + c * taps.pitch;
        const Vec<T> bias = broadcast(taps.bias[c]);
        const auto at = [&]<int kCount>(std::int64_t t) __attribute__((always_inline)) {
            Pack<T, kCount> sum;
            SSM_EACH(i) sum.v[i] = bias;
#pragma GCC unroll 4
            for (std::int64_t k = 0; k < width; ++k)
                SSM_EACH(i) sum.v[i] += load<T>(in + t + i * n + k) * broadcast(weight[k]);
            if constexpr (kSilu) sum = silu(sum);
            SSM_EACH(i) store<T>(out + t + i * n, sum.v[i]);
        };
        if (steps < n) {
            Pack<T, 1> sum{{bias}};
            for (std::int64_t k = 0; k < width; ++k)
                sum.v[0] += load_part<T>(in + k, steps) * broadcast(weight[k]);
            if constexpr (kSilu) sum = silu(sum);
            store_part<T>(out, sum.v[0], steps);
            continue;
        }
        std::int64_t t = 0;
        for (; t + 4 * n <= steps; t += 4 * n) at.template operator()<4>(t);
        for (; t + n <= steps; t += n) at.template operator()<1>(t);
        // The last vector overlaps the one before: the same values once more, and nothing beyond.
        if (t < steps) at.template operator()<1>(steps - n);
    }
}

/// The same channels of several steps, `pitch` apart.
template <class T, class E, int kCount>
SSM_INLINE void put_steps(E* to, std::int64_t pitch, const Pack<T, kCount>& p) {
    if constexpr (kPairs<T, E, kCount>) {
        constexpr std::size_t bytes = sizeof(E) * kLanes<T>;
        for (int i = 0; i < kCount; i += 2) {
            const Words pair = narrow_pair(p.v[i], p.v[i + 1]);
            std::memcpy(to + i * pitch, &pair, bytes);
            std::memcpy(to + (i + 1) * pitch, reinterpret_cast<const char*>(&pair) + bytes, bytes);
        }
    } else {
        SSM_EACH(i) narrow_vector<T>(to + i * pitch, p.v[i]);
    }
}

/// Lanes of channels: a few steps at a time, so that an input is loaded once for its taps.
/// Lines shorter than a vector must have room for one.
template <class T, class E, int kWidth, bool kSilu>
static void filter_steps(const Lines<E>& lines, const Taps<T>& taps) {
    constexpr std::int64_t n = kLanes<T>;
    const std::int64_t width = kWidth > 0 ? kWidth : taps.width;
    const std::int64_t last = max(lines.channels - n, 0);
    const auto rows = [&]<int kRows>(std::int64_t t) __attribute__((always_inline)) {
        const E* const in = lines.in + t * lines.in_pitch;
        E* const out = lines.out + t * lines.out_pitch;
        for (std::int64_t column = 0; column < lines.channels; column += n) {
            const std::int64_t c = min(column, last);
            Pack<T, kRows> sum;
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) sum.v[i] = load<T>(taps.bias + c);
            if constexpr (kWidth > 0) {
                // Input step s meets tap s - i of output step i; taps in rising order for each i.
#pragma GCC unroll 8
                for (int s = 0; s < kWidth + kRows - 1; ++s) {
                    const Vec<T> x = widen_vector<T>(in + s * lines.in_pitch + c);
#pragma GCC unroll 4
                    for (int i = 0; i < kRows; ++i)
                        if (s >= i && s - i < kWidth)
                            sum.v[i] += x * load<T>(taps.weight + (s - i) * taps.pitch + c);
                }
            } else {
                for (std::int64_t k = 0; k < width; ++k) {
                    const Vec<T> weight = load<T>(taps.weight + k * taps.pitch + c);
#pragma GCC unroll 4
                    for (int i = 0; i < kRows; ++i)
                        sum.v[i] += widen_vector<T>(in + (i + k) * lines.in_pitch + c) * weight;
                }
            }
            if constexpr (kSilu) sum = silu(sum);
            put_steps<T>(out + c, lines.out_pitch, sum);
        }
    };
    std::int64_t t = 0;
    for (; t + 4 <= lines.steps; t += 4) rows.template operator()<4>(t);
    for (; t < lines.steps; ++t) rows.template operator()<1>(t);
}

/// Elements of E are converted on their way, where lanes are channels.
template <LaneAxis axis, class T, class E, int kWidth, bool kSilu>
static void filter(const Lines<E>& lines, const Taps<T>& taps) {
    if constexpr (axis == LaneAxis::time)
        filter_channels<T, kWidth, kSilu>(lines, taps);
    else
        filter_steps<T, E, kWidth, kSilu>(lines, taps);
}

template <class T, class E>
using Filter = void (*)(const Lines<E>&, const Taps<T>&);

/// The loop for a width; float has its own for the widths in use.
template <LaneAxis axis, class T, class E>
SSM_INLINE Filter<T, E> choose_filter(std::int64_t width, bool silu) {
#define SSM_FILTER(kWidth) \
    (silu ? &filter<axis, T, E, kWidth, true> : &filter<axis, T, E, kWidth, false>)
    if constexpr (sizeof(T) == sizeof(float)) {
        if (width == 2) return SSM_FILTER(2);
        if (width == 3) return SSM_FILTER(3);
        if (width == 4) return SSM_FILTER(4);
    }
    return SSM_FILTER(0);
#undef SSM_FILTER
}

}  // namespace ssm::cpu::SSM_ISA
