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

template <class T>
constexpr T kLog2e = static_cast<T>(1.44269504088896340736);

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
SSM_INLINE Vec<float> at_most(Vec<float> x, Vec<float> bound) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_min_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_min_ps((__m256)bound, (__m256)x);
#else
    return x > bound ? bound : x;
#endif
}
SSM_INLINE Vec<double> at_most(Vec<double> x, Vec<double> bound) { return x > bound ? bound : x; }

/// max(x, bound); NaN in x stays NaN.
SSM_INLINE Vec<float> at_least(Vec<float> x, Vec<float> bound) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_max_ps((__m256)bound, (__m256)x);
#else
    return x < bound ? bound : x;
#endif
}
SSM_INLINE Vec<double> at_least(Vec<double> x, Vec<double> bound) { return x < bound ? bound : x; }

/// p * 2^n for p = 2^f, |f| <= 0.5, and integral n from -126 to 128; with AVX-512 any n, of which
/// the floor counts.
SSM_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
#if defined(__AVX2__)
    // NaN converts to an integer without low bits, which leaves the NaN in p as it is.
    const Bits integer = (Bits)_mm256_cvtps_epi32((__m256)n);
#else
    // The low bits of the sum hold n; those of a NaN may hold anything, and are left out.
    const Bits integer = (Bits)(n + 12582912.0f) & (n == n);
#endif
    return (Vec<float>)((Bits)p + (integer << 23));
#endif
}

// What follows takes several vectors at once and does one operation for all before the next: in a
// single chain of operations each would wait for the one before, and the processor does not look
// far enough ahead to fill the gaps.
#define SSM_EACH(i) _Pragma("GCC unroll 4") for (int i = 0; i < kCount; ++i)

/// 2^f on [-0.5, 0.5], in place: minimax of degree 5 with the constant term held at 1, so that a
/// decay of exp(0) is exactly 1. Relative error with these coefficients: 9.5e-8.
template <int kCount>
SSM_INLINE void exp2_fraction(Vec<float>* f) {
    Vec<float> p[kCount];
    SSM_EACH(i) p[i] = f[i] * 1.32630632e-3f + 9.67138003e-3f;
    SSM_EACH(i) p[i] = p[i] * f[i] + 5.55073637e-2f;
    SSM_EACH(i) p[i] = p[i] * f[i] + 2.40222442e-1f;
    SSM_EACH(i) p[i] = p[i] * f[i] + 6.93146978e-1f;
    SSM_EACH(i) f[i] = p[i] * f[i] + 1.0f;
}
SSM_INLINE Vec<float> exp2_fraction(Vec<float> f) {
    exp2_fraction<1>(&f);
    return f;
}

#if defined(__AVX512F__)
/// 1.5 * 2^18: the last bit of a sum with it is worth 1/32.
constexpr float kCounts32nds = 393216.0f;

/// 2^(k/32) for k = 0 .. 31: two registers, between which one instruction chooses by lane.
alignas(64) constexpr float kExp2Table[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f,
    1.1637249f,  1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
    1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
    1.5759809f,  1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
    1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f,
};

/// 2^(n + f) in place of f, for |f| <= 1/64 and multiples n of 1/32, which the last five bits of
/// `places` count. In this range a polynomial of degree 2 has a relative error of 5.3e-8: three
/// fused operations less than in |f| <= 1/2, and for these the scan waits. Underflow is gradual.
template <int kCount>
SSM_INLINE void exp2_sum(Vec<float>* f, const Vec<float>* n, const Vec<float>* places) {
    Vec<float> power[kCount], q[kCount];
    SSM_EACH(i) {
        power[i] = (Vec<float>)_mm512_permutex2var_ps(
            _mm512_load_ps(kExp2Table), (__m512i)places[i], _mm512_load_ps(kExp2Table + 16));
    }
    SSM_EACH(i) q[i] = f[i] * 2.40226492e-1f + 6.93157315e-1f;
    SSM_EACH(i) f[i] *= power[i];
    SSM_EACH(i) f[i] = f[i] * q[i] + power[i];
    SSM_EACH(i) f[i] = scale_by_power(f[i], n[i]);
}
#endif

/// The part of an exponent of 2 that needs no polynomial: the nearest integer, with AVX-512 the
/// nearest multiple of 1/32.
SSM_INLINE Vec<float> round_exponent(Vec<float> x) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_roundscale_ps((__m512)x,
                                            5 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return round_even(x);
#endif
}

/// 2^(n + f) in place of f, where n = round_exponent(n + f).
template <int kCount>
SSM_INLINE void exp2_sum(Vec<float>* f, const Vec<float>* n) {
#if defined(__AVX512F__)
    Vec<float> places[kCount];  // beyond 2^17 any will do
    SSM_EACH(i) places[i] = n[i] + kCounts32nds;
    exp2_sum<kCount>(f, n, places);
#else
    exp2_fraction<kCount>(f);
    SSM_EACH(i) f[i] = scale_by_power(f[i], n[i]);
#endif
}

/// Whether exp2 has to bound its argument, so that exp2_bounded is cheaper.
template <class T>
constexpr bool kBoundsExp2 = sizeof(T) == sizeof(float) && kVectorBytes < 64;

/// 2^x for -126 <= x <= 128, in place; NaN stays NaN. With AVX-512 x may be any finite number, and
/// -infinity, of which the scaling instruction makes 0, whatever f is. Without it results end at
/// 2^-126; 2^128 is infinity: exponent field 255 and no mantissa bits.
template <int kCount>
SSM_INLINE void exp2_bounded(Vec<float>* x) {
    Vec<float> n[kCount];
    SSM_EACH(i) n[i] = round_exponent(x[i]);
    SSM_EACH(i) x[i] -= n[i];
    exp2_sum<kCount>(x, n);
}

/// 2^x, in place.
template <int kCount>
SSM_INLINE void exp2(Vec<float>* x) {
    if constexpr (kBoundsExp2<float>) {
        SSM_EACH(i) x[i] = at_least(at_most(x[i], broadcast(128.0f)), broadcast(-126.0f));
    }
    exp2_bounded<kCount>(x);
}
template <int kCount>
SSM_INLINE void exp2(Vec<double>* x) {
    for (int i = 0; i < kCount; ++i) x[i] = per_lane<::exp2>(x[i]);
}

/// x log2(e) - n for an n nearby, exact to the size of n, not of x, so that the error of an
/// exponential does not grow with |x|.
SSM_INLINE Vec<float> rest_of_exponent(Vec<float> x, Vec<float> n) {
#if defined(__FMA__)
    // The fused product is exact until n is taken off; the other factor is what the first lacks.
    return x * 1.92596299e-8f + fused(x, broadcast(kLog2e<float>), -n);
#else
    // Cody and Waite: ln 2 in two parts, the first with so few bits that n times it is exact.
    return ((x - n * 0.693359375f) + n * 2.12194440e-4f) * kLog2e<float>;
#endif
}

/// e^x for -87 <= x <= 88, in place.
template <int kCount>
SSM_INLINE void exp_bounded(Vec<float>* x) {
    Vec<float> n[kCount];
    SSM_EACH(i) n[i] = round_exponent(x[i] * kLog2e<float>);
    SSM_EACH(i) x[i] = rest_of_exponent(x[i], n[i]);
    exp2_sum<kCount>(x, n);
}
template <int kCount>
SSM_INLINE void exp_bounded(Vec<double>* x) {
    for (int i = 0; i < kCount; ++i) x[i] = per_lane<::exp>(x[i]);
}

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

/// log(1 + t) for t in [0, 1], in place: 2 atanh(s), s = t / (2 + t), minimax of degree 4 in s^2.
template <int kCount>
SSM_INLINE void log1p_unit(Vec<float>* t) {
    Vec<float> s[kCount], q[kCount], p[kCount];
    SSM_EACH(i) s[i] = reciprocal(t[i] + 2.0f);
    SSM_EACH(i) s[i] *= t[i];
    SSM_EACH(i) q[i] = s[i] * s[i];
    SSM_EACH(i) p[i] = q[i] * 2.81783281e-1f + 2.79606042e-1f;
    SSM_EACH(i) p[i] = p[i] * q[i] + 4.00249102e-1f;
    SSM_EACH(i) p[i] = p[i] * q[i] + 6.66663147e-1f;
    SSM_EACH(i) q[i] *= s[i];
    SSM_EACH(i) t[i] = q[i] * p[i] + (s[i] + s[i]);  // 2 s is exact, the rest is small
}
template <int kCount>
SSM_INLINE void log1p_unit(Vec<double>* t) {
    for (int i = 0; i < kCount; ++i) t[i] = per_lane<::log1p>(t[i]);
}

/// The largest |x| given to exp_bounded: e^-87 is under 2^-125, and e^-700 is a normal double.
template <class T>
constexpr T kExpBound = sizeof(T) == sizeof(float) ? T(87) : T(700);

/// max(x, 0) + log1p(exp(-|x|)), in place. Below -kExpBound the result stays at exp(-kExpBound).
template <class T, int kCount>
SSM_INLINE void softplus(Vec<T>* x) {
    Vec<T> e[kCount];
    SSM_EACH(i) e[i] = at_least(-absolute(x[i]), broadcast(-kExpBound<T>));
    exp_bounded<kCount>(e);
    log1p_unit<kCount>(e);
    SSM_EACH(i) x[i] = at_least(x[i], zero<T>()) + e[i];
}

/// 1 / (1 + exp(-x)), in place; below -kExpBound it stays at exp(-kExpBound).
template <class T, int kCount>
SSM_INLINE void sigmoid(Vec<T>* x) {
    SSM_EACH(i) x[i] = at_most(at_least(-x[i], broadcast(-kExpBound<T>)), broadcast(kExpBound<T>));
    exp_bounded<kCount>(x);
    SSM_EACH(i) x[i] = reciprocal(x[i] + T(1));
}

/// One vector.
template <class T>
SSM_INLINE Vec<T> exp2(Vec<T> x) {
    exp2<1>(&x);
    return x;
}
template <class T>
SSM_INLINE Vec<T> softplus(Vec<T> x) {
    softplus<T, 1>(&x);
    return x;
}
template <class T>
SSM_INLINE Vec<T> sigmoid(Vec<T> x) {
    sigmoid<T, 1>(&x);
    return x;
}

}  // namespace ssm::cpu::SSM_ISA
