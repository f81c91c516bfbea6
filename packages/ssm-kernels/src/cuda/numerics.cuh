// Scalar functions of the compute type. On the device the exponential is the hardware's exp2, whose
// relative error is at most 2^-22 (CUDA PTX ISA, ex2.approx); tests run the host's.
#pragma once

#include "block.cuh"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace ssm::cuda {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

#if defined(__CUDACC__)
SSM_DEVICE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
SSM_DEVICE float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
SSM_DEVICE float log1p_of(float x) { return log1pf(x); }
SSM_DEVICE float expm1_of(float x) { return expm1f(x); }
SSM_DEVICE float reciprocal(float x) { return __frcp_rn(x); }
SSM_DEVICE float rsqrt_of(float x) { return 1.0f / sqrtf(x); }
#else
template <class Real>
Real exp2_of(Real x) {
    return std::exp2(x);
}
template <class Real>
Real fma_of(Real a, Real b, Real c) {
    return std::fma(a, b, c);
}
template <class Real>
Real log1p_of(Real x) {
    return std::log1p(x);
}
template <class Real>
Real expm1_of(Real x) {
    return std::expm1(x);
}
template <class Real>
Real reciprocal(Real x) {
    return 1 / x;
}
template <class Real>
Real rsqrt_of(Real x) {
    return 1 / std::sqrt(x);
}
#endif

/// exp(x) as exp2 of a product whose rounding error, which grows with |x|, is put back.
template <class Real>
SSM_DEVICE Real exp_of(Real x) {
    constexpr Real kHigh = static_cast<Real>(kLog2e);
    constexpr Real kLow = static_cast<Real>(kLog2e - static_cast<double>(kHigh));
    const Real power = x * kHigh;
    const Real lost = fma_of(x, kLow, fma_of(x, kHigh, -power));
    const Real result = exp2_of(power);
    const Real size = power < 0 ? -power : power;
    // From here on the result is infinite, or next to 0, and a part of it may be no number.
    constexpr Real kReach = sizeof(Real) == 4 ? 128 : 1024;
    return size < kReach ? fma_of(result, lost * static_cast<Real>(kLn2), result) : result;
}

/// 1 / (1 + exp(-x)): exp overflows to infinity, whose reciprocal is the right 0.
template <class Real>
SSM_DEVICE Real sigmoid(Real x) {
    return reciprocal(1 + exp_of(-x));
}

/// max(x, 0) + log1p(exp(-|x|)): keeps small step sizes, which log(1 + exp(x)) loses.
template <class Real>
SSM_DEVICE Real softplus(Real x) {
    const Real size = x < 0 ? -x : x;
    return (x > 0 ? x : Real(0)) + log1p_of(exp_of(-size));
}

template <class Real>
SSM_DEVICE Real silu(Real x) {
    return x * sigmoid(x);
}

/// The derivative of silu at x, whose sigmoid is `gate`.
template <class Real>
SSM_DEVICE Real silu_slope(Real x, Real gate) {
    return gate * (1 + x * (1 - gate));
}

}  // namespace ssm::cuda
