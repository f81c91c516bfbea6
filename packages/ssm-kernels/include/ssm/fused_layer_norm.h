// Residual addition with LayerNorm or RMSNorm, forward and backward: contract only.
// Mathematics, algorithm and numerics: docs/ops/fused_layer_norm.md
#pragma once

#include <ssm/device.h>
#include <ssm/tensor.h>

namespace ssm {

/// s = x + residual,  y = (s - mean) rstd weight + bias, with mean 0 for RMSNorm and
/// rstd = 1 / sqrt(mean((s - mean)^2) + eps).        Ba et al. 2016; Zhang & Sennrich 2019
///
/// Activations are f64, f32, bf16 or f16 in any mix and any strides, with 1 to 6 axes of which the
/// last one is normalised. Arithmetic is f64 when x is f64, else f32; M is the number of rows.
struct FusedLayerNormArgs {
    TensorView x{};             // (..., D)   in
    TensorView weight{};        // (D)        in
    TensorView bias{};          // (D)        in, optional
    TensorView residual{};      // as x       in, optional
    TensorView y{};             // as x       out
    TensorView residual_out{};  // as x       out, optional: s, rounded to its dtype
    TensorView mean{};          // (M)        compute type; out, optional, not for RMSNorm
    TensorView rstd{};          // (M)        compute type; out, optional
    bool is_rms = false;
    double eps = 1e-5;
};

struct FusedLayerNormGrads {
    TensorView dy{};             // as x   in
    TensorView dresidual_out{};  // as x   in, optional
    TensorView dx{};             // as x   out
    TensorView dresidual{};      // as x   out, optional: the values of dx in its own dtype
    TensorView dweight{};        // (D)    out, optional
    TensorView dbias{};          // (D)    out, optional
};

/// Throws std::invalid_argument naming the argument, the rule and the value.
SSM_API void fused_layer_norm_fwd(const FusedLayerNormArgs& args, const Exec& exec = {});

/// Needs `mean` (LayerNorm) and `rstd` as the forward wrote them, and s either as `x` alone or as
/// `x` and `residual`, which are added again. `y`, `residual_out`, `bias` and `eps` are not read.
SSM_API void fused_layer_norm_bwd(const FusedLayerNormArgs& args, const FusedLayerNormGrads& grads,
                                  const Exec& exec = {});

/// Bytes of `Exec::workspace` that the backward needs, from x.
SSM_API std::int64_t fused_layer_norm_bwd_workspace(const FusedLayerNormArgs& args);

}  // namespace ssm
