// Applies the functions of vmath.h and gate.h to whole arrays, so that tests can measure their
// error.
#include <ssm/tensor.h>

#include "gate.h"

namespace ssm::cpu::SSM_ISA {

namespace {

template <class T>
Vec<T> apply(int function, Vec<T> x) {
    switch (function) {
        case 0:
            return exp2<T>(x);
        case 1:
            exp_bounded<1>(&x);
            return x;
        case 2:
            log1p_unit<1>(&x);
            return x;
        case 3:
            return softplus<T>(x);
        case 4:
            return sigmoid<T>(x);
        default:
            return silu<T>(x);
    }
}

template <class T>
void apply_all(int function, const T* x, T* y, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += kLanes<T>) {
        const std::int64_t left = count - i;
        const auto bytes =
            sizeof(T) * static_cast<std::size_t>(left < kLanes<T> ? left : kLanes<T>);
        T line[kLanes<T>] = {};
        std::memcpy(line, x + i, bytes);
        store<T>(line, apply<T>(function, load<T>(line)));
        std::memcpy(y + i, line, bytes);
    }
}

}  // namespace

void vmath(int function, const TensorView& x, const TensorView& y) {
    if (x.dtype == DType::f64)
        apply_all(function, static_cast<const double*>(x.data), static_cast<double*>(y.data),
                  x.shape[0]);
    else
        apply_all(function, static_cast<const float*>(x.data), static_cast<float*>(y.data),
                  x.shape[0]);
}

}  // namespace ssm::cpu::SSM_ISA
