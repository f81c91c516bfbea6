// Elementary functions on vectors. Bounds are measured by tests/kernels/test_vmath.py against
// float64 for every instruction set; docs/numerics.md lists them.
#pragma once

#include <cmath>

#include "simd.h"

namespace ssm::cpu::SSM_ISA {

/// Double lanes go through libm: float64 exists to prove the mathematics, not to be fast.
template <double (*Function)(double)>
SSM_INLINE Vec<double> per_lane(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = Function(x[i]);
    return x;
}

SSM_INLINE Vec<float> absolute(Vec<float> x) {
    typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
    return (Vec<float>)((Bits)x & 0x7fffffff);
}
SSM_INLINE Vec<double> absolute(Vec<double> x) {
    typedef std::int64_t Bits __attribute__((vector_size(kVectorBytes)));
    return (Vec<double>)((Bits)x & 0x7fffffffffffffff);
}

/// 2^f on [-0.5, 0.5]: minimax of degree 5 with the constant term held at 1, so that a decay of
/// exp(0) is exactly 1. Relative error with these coefficients: 9.5e-8.
SSM_INLINE Vec<float> exp2_fraction(Vec<float> f) {
    Vec<float> p = f * 1.32630632e-3f + 9.67138003e-3f;
    p = p * f + 5.55073637e-2f;
    p = p * f + 2.40222442e-1f;
    p = p * f + 6.93146978e-1f;
    return p * f + 1.0f;
}

/// Nearest integer for |x| < 2^22; larger values may come back unrounded.
SSM_INLINE Vec<float> round_even(Vec<float> x) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_roundscale_ps((__m512)x,
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the sum has no fraction bits left
#endif
}

/// min(x, bound); NaN in x stays NaN.
SSM_INLINE Vec<float> at_most(Vec<float> x, float bound) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
#else
    return x > bound ? broadcast(bound) : x;
#endif
}

/// max(x, bound); NaN in x stays NaN.
SSM_INLINE Vec<float> at_least(Vec<float> x, float bound) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#else
    return x < bound ? broadcast(bound) : x;
#endif
}

/// p * 2^n for p = 2^f, |f| <= 0.5, and integral n from -126 to 128.
SSM_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
    // NaN converts to an integer without low bits, which leaves the NaN in p as it is.
#if defined(__AVX2__)
    const Bits integer = (Bits)_mm256_cvtps_epi32((__m256)n);
#else
    const Bits integer = (Bits)(n + 12582912.0f) - 0x4b400000;
#endif
    return (Vec<float>)((Bits)p + (integer << 23));
#endif
}

/// 2^x. With AVX-512 results underflow gradually and the scaling instruction makes 0 of -infinity;
/// without it they end at 2^-126. 2^128 is infinity: exponent field 255 and no mantissa bits.
SSM_INLINE Vec<float> exp2(Vec<float> x) {
#if !defined(__AVX512F__)
    x = at_least(at_most(x, 128.0f), -126.0f);
#endif
    const Vec<float> n = round_even(x);
    return scale_by_power(exp2_fraction(x - n), n);
}
SSM_INLINE Vec<double> exp2(Vec<double> x) { return per_lane<::exp2>(x); }

/// e^x for -87 <= x <= 88. Cody and Waite: ln 2 in two parts, of which the first has so few bits
/// that n times it is exact, so that the error does not grow with |x|.
SSM_INLINE Vec<float> exp_bounded(Vec<float> x) {
    const Vec<float> n = round_even(x * 1.44269504e+0f);
    const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    return scale_by_power(exp2_fraction(r * 1.44269504e+0f), n);
}
SSM_INLINE Vec<double> exp_bounded(Vec<double> x) { return per_lane<::exp>(x); }

/// 1 / b for 1 <= b < 2^126: no special cases to keep.
SSM_INLINE Vec<float> reciprocal(Vec<float> b) {
#if defined(__AVX512F__)
    const Vec<float> r = (Vec<float>)_mm512_rcp14_ps((__m512)b);
    return r + r * (1.0f - b * r);
#else
    return 1.0f / b;
#endif
}
SSM_INLINE Vec<double> reciprocal(Vec<double> b) { return 1.0 / b; }

/// log(1 + t) for t in [0, 1]: 2 atanh(s), s = t / (2 + t), minimax of degree 4 in s^2.
SSM_INLINE Vec<float> log1p_unit(Vec<float> t) {
    const Vec<float> s = t * reciprocal(t + 2.0f);
    const Vec<float> q = s * s;
    Vec<float> p = q * 2.81783281e-1f + 2.79606042e-1f;
    p = p * q + 4.00249102e-1f;
    p = p * q + 6.66663147e-1f;
    return s * (p * q + 2.0f);
}
SSM_INLINE Vec<double> log1p_unit(Vec<double> t) { return per_lane<::log1p>(t); }

/// max(x, 0) + log1p(exp(-|x|)). Below -87 the result is exp(-87), which is under 2^-125.
SSM_INLINE Vec<float> softplus(Vec<float> x) {
    return at_least(x, 0.0f) + log1p_unit(exp_bounded(at_least(-absolute(x), -87.0f)));
}
SSM_INLINE Vec<double> softplus(Vec<double> x) {
    const Vec<double> positive = x < 0.0 ? Vec<double>{} : x;
    return positive + log1p_unit(exp_bounded(-absolute(x)));
}

/// 1 / (1 + exp(-x)); below -87 it stays at exp(-87).
SSM_INLINE Vec<float> sigmoid(Vec<float> x) {
    return reciprocal(exp_bounded(at_most(at_least(-x, -87.0f), 87.0f)) + 1.0f);
}
SSM_INLINE Vec<double> sigmoid(Vec<double> x) { return reciprocal(exp_bounded(-x) + 1.0); }

template <class T>
SSM_INLINE Vec<T> silu(Vec<T> x) {
    return x * sigmoid(x);
}

}  // namespace ssm::cpu::SSM_ISA
