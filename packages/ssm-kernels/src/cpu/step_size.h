// Step sizes of the state-space dual scan, their gradient, and decays.
#pragma once

#include "vmath.h"

namespace ssm::cpu::SSM_ISA {

/// clamp(softplus?(raw), low, high); NaN stays NaN.
template <class T>
SSM_INLINE Vec<T> step_size(Vec<T> raw, bool is_soft, T low, T high) {
    Vec<T> s = is_soft ? softplus<T>(raw) : raw;
    s = s < low ? broadcast(low) : s;
    return s > high ? broadcast(high) : s;
}

/// The gradient of `raw` from that of its step size. A clamped step size has none; at the limits
/// themselves it has.
template <class T>
SSM_INLINE Vec<T> step_size_gradient(Vec<T> raw, Vec<T> dsize, bool is_soft, T low, T high) {
    const Vec<T> s = is_soft ? softplus<T>(raw) : raw;
    const Vec<T> slope = is_soft ? sigmoid<T>(raw) : broadcast(T(1));
    return ((s >= low) & (s <= high)) ? dsize * slope : zero<T>();
}

/// 2^x for the logarithm of any decay, minus infinity included, which exp2 does not take.
template <class T>
SSM_INLINE Vec<T> decay_of(Vec<T> x) {
    return exp2<T>(at_most(at_least(x, broadcast(T(-1e4))), broadcast(T(1e4))));
}

}  // namespace ssm::cpu::SSM_ISA
