// The filter itself on dense lines: what the forward and the step of the causal convolution share.
#pragma once

#include "dw_causal_conv_tile.h"

namespace ssm::cpu::SSM_ISA {

/// x between two bounds; NaN may become a bound.
SSM_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_max_ps(_mm512_min_ps((__m512)x, _mm512_set1_ps(high)),
                                     _mm512_set1_ps(low));
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_max_ps(_mm256_min_ps((__m256)x, _mm256_set1_ps(high)),
                                     _mm256_set1_ps(low));
#elif defined(__SSE2__)
    return (Vec<float>)_mm_max_ps(_mm_min_ps((__m128)x, _mm_set1_ps(high)), _mm_set1_ps(low));
#else
    x = x > high ? broadcast(high) : x;
    return x < low ? broadcast(low) : x;
#endif
}

/// 1 + e^-x, infinite where that overflows: then a quotient by it is 0, as it should be. For
/// several vectors at once, one stage after the other: in a single chain of operations each would
/// wait for the one before, and the processor does not look far enough ahead to fill the gaps.
template <int kCount>
SSM_INLINE void one_plus_exp_minus(const Vec<float>* x, Vec<float>* result) {
    typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
    // 1.5 * 2^23 + 127: a sum with it is rounded to an integer and holds n + 127, the exponent of
    // 2^n, in its low bits. Exponents -126 .. 128 have bits, the last one those of infinity.
    constexpr float kMagic = 12582912.0f + 127.0f;
    Vec<float> s[kCount], sum[kCount], f[kCount], p[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) s[i] = clamp(x[i], -88.75f, 87.0f);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sum[i] = s[i] * -kLog2e<float> + kMagic;
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) f[i] = rest_of_exponent(-s[i], sum[i] - kMagic);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) p[i] = exp2_fraction(f[i]);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) result[i] = p[i] * (Vec<float>)((Bits)sum[i] << 23) + 1.0f;
}
template <int kCount>
SSM_INLINE void one_plus_exp_minus(const Vec<double>* x, Vec<double>* result) {
    for (int i = 0; i < kCount; ++i) result[i] = per_lane<::exp>(-x[i]) + 1.0;
}

template <bool kSilu, class T, int kCount>
SSM_INLINE void activate(Vec<T>* x) {
    if constexpr (!kSilu) return;
    Vec<T> divisor[kCount];
    one_plus_exp_minus<kCount>(x, divisor);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) x[i] = x[i] / divisor[i];
}

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
template <class T>
struct Lines {
    const T* in;
    std::int64_t in_pitch;
    T* out;
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
            Vec<T> sum[kCount];
#pragma GCC unroll 4
            for (int i = 0; i < kCount; ++i) sum[i] = bias;
#pragma GCC unroll 4
            for (std::int64_t k = 0; k < width; ++k)
#pragma GCC unroll 4
                for (int i = 0; i < kCount; ++i)
                    sum[i] += load<T>(in + t + i * n + k) * broadcast(weight[k]);
            activate<kSilu, T, kCount>(sum);
#pragma GCC unroll 4
            for (int i = 0; i < kCount; ++i) store<T>(out + t + i * n, sum[i]);
        };
        if (steps < n) {
            Vec<T> sum = bias;
            for (std::int64_t k = 0; k < width; ++k)
                sum += load_part<T>(in + k, steps) * broadcast(weight[k]);
            activate<kSilu, T, 1>(&sum);
            store_part<T>(out, sum, steps);
            continue;
        }
        std::int64_t t = 0;
        for (; t + 4 * n <= steps; t += 4 * n) at.template operator()<4>(t);
        for (; t + n <= steps; t += n) at.template operator()<1>(t);
        // The last vector overlaps the one before: the same values once more, and nothing beyond.
        if (t < steps) at.template operator()<1>(steps - n);
    }
}

/// Lanes of channels: a few steps at a time, so that an input is loaded once for its taps.
/// Lines shorter than a vector must have room for one.
template <class T, int kWidth, bool kSilu>
static void filter_steps(const Lines<T>& lines, const Taps<T>& taps) {
    constexpr std::int64_t n = kLanes<T>;
    const std::int64_t width = kWidth > 0 ? kWidth : taps.width;
    const std::int64_t last = max(lines.channels - n, 0);
    const auto rows = [&]<int kRows>(std::int64_t t) __attribute__((always_inline)) {
        const T* const in = lines.in + t * lines.in_pitch;
        T* const out = lines.out + t * lines.out_pitch;
        for (std::int64_t column = 0; column < lines.channels; column += n) {
            const std::int64_t c = min(column, last);
            Vec<T> sum[kRows];
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) sum[i] = load<T>(taps.bias + c);
            if constexpr (kWidth > 0) {
                // Input step s meets tap s - i of output step i; taps in rising order for each i.
#pragma GCC unroll 8
                for (int s = 0; s < kWidth + kRows - 1; ++s) {
                    const Vec<T> x = load<T>(in + s * lines.in_pitch + c);
#pragma GCC unroll 4
                    for (int i = 0; i < kRows; ++i)
                        if (s >= i && s - i < kWidth)
                            sum[i] += x * load<T>(taps.weight + (s - i) * taps.pitch + c);
                }
            } else {
                for (std::int64_t k = 0; k < width; ++k) {
                    const Vec<T> weight = load<T>(taps.weight + k * taps.pitch + c);
#pragma GCC unroll 4
                    for (int i = 0; i < kRows; ++i)
                        sum[i] += load<T>(in + (i + k) * lines.in_pitch + c) * weight;
                }
            }
            activate<kSilu, T, kRows>(sum);
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) store<T>(out + i * lines.out_pitch + c, sum[i]);
        }
    };
    std::int64_t t = 0;
    for (; t + 4 <= lines.steps; t += 4) rows.template operator()<4>(t);
    for (; t < lines.steps; ++t) rows.template operator()<1>(t);
}

template <class T>
using Filter = void (*)(const Lines<T>&, const Taps<T>&);

/// The loop for a width; float has its own for the widths in use.
template <LaneAxis axis, class T>
SSM_INLINE Filter<T> choose_filter(std::int64_t width, bool silu) {
#define SSM_FILTER(kWidth, kSilu) \
    (axis == LaneAxis::time ? &filter_channels<T, kWidth, kSilu> : &filter_steps<T, kWidth, kSilu>)
    if constexpr (sizeof(T) == sizeof(float)) {
        if (width == 2) return silu ? SSM_FILTER(2, true) : SSM_FILTER(2, false);
        if (width == 3) return silu ? SSM_FILTER(3, true) : SSM_FILTER(3, false);
        if (width == 4) return silu ? SSM_FILTER(4, true) : SSM_FILTER(4, false);
    }
    return silu ? SSM_FILTER(0, true) : SSM_FILTER(0, false);
#undef SSM_FILTER
}

}  // namespace ssm::cpu::SSM_ISA
