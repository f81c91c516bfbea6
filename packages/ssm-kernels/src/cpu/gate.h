// The SiLU of gates: the sigmoid as a factor beside its own argument.
#pragma once

#include "pack.h"

namespace ssm::cpu::SSM_ISA {

// Vectors that go through a sigmoid together, as measured.
constexpr int kGates = kVectorBytes == 64 ? 2 : 4;

/// 1 / (1 + exp(-x)) where x itself is another factor: a NaN in x may be lost here, and below -87
/// there is 0, or x of any size times what is left would be seen. The exponent is reduced by one
/// fused operation, so that the relative error grows with |x|, by a quarter of a unit in the last
/// place per unit of x; below x = -3 the sigmoid falls faster than that.
template <int kCount>
SSM_INLINE Pack<float, kCount> sigmoid_factor(const Pack<float, kCount>& at) {
    Pack<float, kCount> out;
    Vec<float>* const b = out.v;
#if defined(__AVX2__)
    Vec<float> x[kCount], n[kCount];
#endif
#if defined(__AVX512F__)
    const __m512 rate = _mm512_set1_ps(-kLog2e<float>);
    // The smaller magnitude of x and 87 with the sign of x: two bounds in one operation.
    SSM_EACH(i) x[i] = (Vec<float>)_mm512_range_ps((__m512)at.v[i], _mm512_set1_ps(87.0f), 2);
    SSM_EACH(i) b[i] = x[i] * (Vec<float>)rate + kCounts32nds;
    SSM_EACH(i) n[i] = b[i] - kCounts32nds;
    SSM_EACH(i) x[i] = (Vec<float>)_mm512_fmsub_ps((__m512)x[i], rate, (__m512)n[i]);
    exp2_sum<kCount>(x, n, b);
    SSM_EACH(i) b[i] = x[i] + 1.0f;
    SSM_EACH(i) {
        const __mmask16 seen =
            _mm512_cmp_ps_mask((__m512)at.v[i], _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
        x[i] = (Vec<float>)_mm512_maskz_rcp14_ps(seen, (__m512)b[i]);
    }
    SSM_EACH(i) b[i] = 1.0f - b[i] * x[i];
    SSM_EACH(i) b[i] = b[i] * x[i] + x[i];
#elif defined(__AVX2__)
    typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
    const __m256 rate = _mm256_set1_ps(-kLog2e<float>);
    SSM_EACH(i) x[i] = at_most(at_least(at.v[i], broadcast(-87.0f)), broadcast(87.0f));
    // 1.5 * 2^23: the low bits of the sum hold the integer part.
    SSM_EACH(i) n[i] = x[i] * (Vec<float>)rate + 12582912.0f;
    SSM_EACH(i) b[i] = n[i] - 12582912.0f;
    SSM_EACH(i) x[i] = (Vec<float>)_mm256_fmsub_ps((__m256)x[i], rate, (__m256)b[i]);
    exp2_fraction<kCount>(x);
    SSM_EACH(i) b[i] = (Vec<float>)((Bits)x[i] + ((Bits)n[i] << 23)) + 1.0f;
    // A division: from the estimate of this instruction set, 1 / 1 would not be 1, and 1 - sigmoid
    // stands beside x.
    SSM_EACH(i) b[i] = 1.0f / b[i];
    SSM_EACH(i) {
        const __m256 seen = _mm256_cmp_ps((__m256)at.v[i], _mm256_set1_ps(-87.0f), _CMP_GE_OQ);
        b[i] = (Vec<float>)_mm256_and_ps((__m256)b[i], seen);
    }
#else
    SSM_EACH(i) b[i] = at.v[i];
    sigmoid<float, kCount>(b);
    SSM_EACH(i) b[i] = select<float>(at.v[i] < -87.0f, zero<float>(), b[i]);
#endif
    return out;
}
template <int kCount>
SSM_INLINE Pack<double, kCount> sigmoid_factor(Pack<double, kCount> x) {
    SSM_EACH(i) x.v[i] = select<double>(x.v[i] < -700.0, zero<double>(), sigmoid<double>(x.v[i]));
    return x;
}

/// The gradient of x sigmoid(x), from q = x sigmoid(x) and s = sigmoid(x).
template <class T, int kCount>
SSM_INLINE Pack<T, kCount> silu_slope(const Pack<T, kCount>& q, const Pack<T, kCount>& s) {
    Pack<T, kCount> slope;
    SSM_EACH(i) slope.v[i] = q.v[i] * (T(1) - s.v[i]) + s.v[i];
    return slope;
}

}  // namespace ssm::cpu::SSM_ISA
