// Elementary functions on vectors. Bounds are measured by tests/kernels/test_vmath.py against
// float64 for every instruction set; docs/numerics.md lists them.
#pragma once

#include "simd.h"

#include <cmath>

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
/// exp(0) is exactly 1. Relative error of the polynomial: 9.2e-8.
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

/// p * 2^n for integral n and p in [0.5, 2]. Results below 2^-125 become zero where the instruction
/// set has no scaling instruction.
SSM_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
    Vec<float> c = n < -125.0f ? broadcast(-125.0f) : n;
    c = c > 128.0f ? broadcast(128.0f) : c;
    // 1.5 * 2^23 + c holds the integer c in its low bits. Half of the scale goes in here and the
    // factor 2 at the end, since 2^128 has no float.
    const Bits integer = (Bits)(c + 12582912.0f) - 0x4b400000;
    const Vec<float> r = p * (Vec<float>)((integer + 126) << 23);
    return n < -125.0f ? Vec<float>{} : r + r;
#endif
}

/// 2^x. The lower bound keeps -infinity out of x - n; 2^-200 is zero already.
SSM_INLINE Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
    x = (Vec<float>)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // NaN in x passes
#else
    x = x < -200.0f ? broadcast(-200.0f) : x;
#endif
    const Vec<float> n = round_even(x);
    return scale_by_power(exp2_fraction(x - n), n);
}
SSM_INLINE Vec<double> exp2(Vec<double> x) { return per_lane<::exp2>(x); }

/// e^x for x <= 0 with Cody and Waite's two-part ln 2, so that the error does not grow with |x|.
SSM_INLINE Vec<float> exp_negative(Vec<float> x) {
    x = x < -150.0f ? broadcast(-150.0f) : x;
    const Vec<float> n = round_even(x * 1.44269504f);
    const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    return scale_by_power(exp2_fraction(r * 1.44269504f), n);
}
SSM_INLINE Vec<double> exp_negative(Vec<double> x) { return per_lane<::exp>(x); }

/// a / b for b in [1, 4]: no special cases to keep.
SSM_INLINE Vec<float> divide_near_one(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
    const Vec<float> r = (Vec<float>)_mm512_rcp14_ps((__m512)b);
    return a * (r + r * (1.0f - b * r));
#else
    return a / b;
#endif
}
SSM_INLINE Vec<double> divide_near_one(Vec<double> a, Vec<double> b) { return a / b; }

/// log(1 + t) for t in [0, 1]: 2 atanh(s), s = t / (2 + t), minimax of degree 4 in s^2.
SSM_INLINE Vec<float> log1p_unit(Vec<float> t) {
    const Vec<float> s = divide_near_one(t, t + 2.0f);
    const Vec<float> q = s * s;
    Vec<float> p = broadcast(2.81783281e-1f);
    p = p * q + 2.79606042e-1f;
    p = p * q + 4.00249102e-1f;
    p = p * q + 6.66663147e-1f;
    return s * (p * q + 2.0f);
}
SSM_INLINE Vec<double> log1p_unit(Vec<double> t) { return per_lane<::log1p>(t); }

/// max(x, 0) + log1p(exp(-|x|)).
template <class T>
SSM_INLINE Vec<T> softplus(Vec<T> x) {
    const Vec<T> positive = select<T>(x < T(0), zero<T>(), x);
    return positive + log1p_unit(exp_negative(-absolute(x)));
}

/// 1 / (1 + exp(-x)) from exp(-|x|), which cannot overflow.
template <class T>
SSM_INLINE Vec<T> sigmoid(Vec<T> x) {
    const Vec<T> t = exp_negative(-absolute(x));
    return divide_near_one(select<T>(x < T(0), t, broadcast(T(1))), t + T(1));
}

template <class T>
SSM_INLINE Vec<T> silu(Vec<T> x) {
    return x * sigmoid<T>(x);
}

}  // namespace ssm::cpu::SSM_ISA
