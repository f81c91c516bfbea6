// The SwiGLU activation, forward and backward: contract only.
// Mathematics, algorithm and numerics: docs/ops/swiglu.md
#pragma once

#include <ssm/device.h>
#include <ssm/tensor.h>

namespace ssm {

/// y = silu(gate) up,  silu(g) = g / (1 + exp(-g)).        Shazeer 2020, eq. 5
///
/// Activations are f64, f32, bf16 or f16 in any mix and any strides, with 1 to 6 axes. Without `up`
/// the last axis of `gate` holds both halves, the gate first. Arithmetic is f64 when gate is f64,
/// else f32.
struct SwigluArgs {
    TensorView gate{};  // (..., D) | (..., 2 D)   in
    TensorView up{};    // (..., D)                in, optional
    TensorView y{};     // (..., D)                out
};

struct SwigluGrads {
    TensorView dy{};     // (..., D)    in
    TensorView dgate{};  // as gate    out
    TensorView dup{};    // as up      out, given where up is
};

/// Throws std::invalid_argument naming the argument, the rule and the value.
SSM_API void swiglu_fwd(const SwigluArgs& args, const Exec& exec = {});

/// Reads the inputs again; `y` is not read.
SSM_API void swiglu_bwd(const SwigluArgs& args, const SwigluGrads& grads, const Exec& exec = {});

}  // namespace ssm
