// The SiLU of gates: the sigmoid as a factor beside its own argument.
#pragma once

#include "pack.h"

namespace ssm::cpu::SSM_ISA {

// Vectors that go through a sigmoid together, as measured.
constexpr int kGates = kVectorBytes == 64 ? 2 : 4;

#if !defined(__AVX512F__)
/// x between two bounds; NaN may become a bound.
SSM_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
#if defined(__AVX2__)
    return (Vec<float>)_mm256_max_ps(_mm256_min_ps((__m256)x, _mm256_set1_ps(high)),
                                     _mm256_set1_ps(low));
#elif defined(__SSE2__)
    return (Vec<float>)_mm_max_ps(_mm_min_ps((__m128)x, _mm_set1_ps(high)), _mm_set1_ps(low));
#else
    x = x > high ? broadcast(high) : x;
    return x < low ? broadcast(low) : x;
#endif
}
#endif

/// 1 + e^-x, infinite where that overflows: a quotient by it is then 0, as it should be. A NaN in x
/// may be lost. The exponent is reduced by one fused operation, so that the relative error grows
/// with -x, by a quarter of a unit in the last place per unit of x; below x = -3 the sigmoid falls
/// faster than that.
template <int kCount>
SSM_INLINE void one_plus_exp_minus(const Vec<float>* x, Vec<float>* sum) {
    Vec<float> f[kCount], n[kCount];
#if defined(__AVX512F__)
    const __m512 rate = _mm512_set1_ps(-kLog2e<float>), bound = _mm512_set1_ps(89.0f);
    // The smaller magnitude of x and 89 with the sign of x: two bounds in one operation.
    SSM_EACH(i) f[i] = (Vec<float>)_mm512_range_ps((__m512)x[i], bound, 2);
    SSM_EACH(i) sum[i] = f[i] * (Vec<float>)rate + kCounts32nds;
    SSM_EACH(i) n[i] = sum[i] - kCounts32nds;
    SSM_EACH(i) f[i] = (Vec<float>)_mm512_fmsub_ps((__m512)f[i], rate, (__m512)n[i]);
    exp2_sum<kCount>(f, n, sum);
    SSM_EACH(i) sum[i] = f[i] + 1.0f;
#else
    typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
    // 1.5 * 2^23 + 127: a sum with it is rounded to an integer and holds n + 127, the exponent of
    // 2^n, in its low bits. Exponents -126 .. 128 have bits, the last one those of infinity.
    constexpr float kMagic = 12582912.0f + 127.0f;
    SSM_EACH(i) f[i] = clamp(x[i], -88.75f, 87.0f);
    SSM_EACH(i) sum[i] = f[i] * -kLog2e<float> + kMagic;
    SSM_EACH(i) n[i] = sum[i] - kMagic;
#if defined(__FMA__)
    SSM_EACH(i) f[i] = fused(f[i], broadcast(-kLog2e<float>), -n[i]);
#else
    SSM_EACH(i) f[i] = rest_of_exponent(-f[i], n[i]);
#endif
    exp2_fraction<kCount>(f);
    SSM_EACH(i) sum[i] = f[i] * (Vec<float>)((Bits)sum[i] << 23) + 1.0f;
#endif
}
template <int kCount>
SSM_INLINE void one_plus_exp_minus(const Vec<double>* x, Vec<double>* sum) {
    SSM_EACH(i) sum[i] = per_lane<::exp>(-x[i]) + 1.0;
}

/// x / (1 + e^-x). The division runs beside the multiply-adds, of which an estimate of the
/// reciprocal would need more.
template <class T, int kCount>
SSM_INLINE Pack<T, kCount> silu(Pack<T, kCount> x) {
    Vec<T> divisor[kCount];
    one_plus_exp_minus<kCount>(x.v, divisor);
    SSM_EACH(i) x.v[i] = x.v[i] / divisor[i];
    return x;
}

template <class T>
SSM_INLINE Vec<T> silu(Vec<T> x) {
    return silu(Pack<T, 1>{{x}}).v[0];
}

/// 1 / (1 + e^-x) where x itself is another factor, in which a NaN is kept.
template <class T, int kCount>
SSM_INLINE Pack<T, kCount> sigmoid_factor(const Pack<T, kCount>& x) {
    Pack<T, kCount> s;
    one_plus_exp_minus<kCount>(x.v, s.v);
    SSM_EACH(i) s.v[i] = T(1) / s.v[i];
    return s;
}

/// The gradient of x sigmoid(x), from q = x sigmoid(x) and s = sigmoid(x).
template <class T, int kCount>
SSM_INLINE Pack<T, kCount> silu_slope(const Pack<T, kCount>& q, const Pack<T, kCount>& s) {
    Pack<T, kCount> slope;
    SSM_EACH(i) slope.v[i] = q.v[i] * (T(1) - s.v[i]) + s.v[i];
    return slope;
}

}  // namespace ssm::cpu::SSM_ISA
