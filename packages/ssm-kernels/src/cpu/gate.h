// The SiLU of gates: the sigmoid as a factor beside its own argument.
#pragma once

#include "vmath.h"

namespace ssm::cpu::SSM_ISA {

/// 1 / (1 + exp(-x)) where x itself is another factor: a NaN in x may be lost here, and below -87
/// there is 0, or x of any size times what is left would be seen. The exponent is reduced by one
/// fused operation, so that the relative error grows with |x|, by a quarter of a unit in the last
/// place per unit of x; below x = -3 the sigmoid falls faster than that.
SSM_INLINE Vec<float> sigmoid_factor(Vec<float> x) {
#if defined(__AVX512F__)
    const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
    // The smaller magnitude of x and 87 with the sign of x: two bounds in one operation.
    x = (Vec<float>)_mm512_range_ps((__m512)x, _mm512_set1_ps(87.0f), 2);
    const __m512 rate = _mm512_set1_ps(-1.44269504f);
    const Vec<float> n = round_even(x * (Vec<float>)rate);
    const Vec<float> f = (Vec<float>)_mm512_fmsub_ps((__m512)x, rate, (__m512)n);
    const __m512 b = (__m512)(scale_by_power(exp2_fraction(f), n) + 1.0f);
    const __m512 r = _mm512_maskz_rcp14_ps(seen, b);
    return (Vec<float>)_mm512_fmadd_ps(r, _mm512_fnmadd_ps(b, r, _mm512_set1_ps(1.0f)), r);
#elif defined(__AVX2__)
    const __m256 seen = _mm256_cmp_ps((__m256)x, _mm256_set1_ps(-87.0f), _CMP_GE_OQ);
    x = at_most(at_least(x, broadcast(-87.0f)), broadcast(87.0f));
    const __m256 rate = _mm256_set1_ps(-1.44269504f);
    const Vec<float> n = round_even(x * (Vec<float>)rate);
    const Vec<float> f = (Vec<float>)_mm256_fmsub_ps((__m256)x, rate, (__m256)n);
    const Vec<float> b = scale_by_power(exp2_fraction(f), n) + 1.0f;
    // A division: from the estimate of this instruction set, 1 / 1 would not be 1, and 1 - sigmoid
    // stands beside x.
    return (Vec<float>)_mm256_and_ps((__m256)(1.0f / b), seen);
#else
    return select<float>(x < -87.0f, zero<float>(), sigmoid<float>(x));
#endif
}
SSM_INLINE Vec<double> sigmoid_factor(Vec<double> x) {
    return select<double>(x < -700.0, zero<double>(), sigmoid<double>(x));
}

/// The gradient of x sigmoid(x), from q = x sigmoid(x) and s = sigmoid(x).
template <class T>
SSM_INLINE Vec<T> silu_slope(Vec<T> q, Vec<T> s) {
    return q * (T(1) - s) + s;
}

}  // namespace ssm::cpu::SSM_ISA
