// LayerNorm and RMSNorm in groups, times a gate, forward and backward: contract only.
// Mathematics, algorithm and numerics: docs/ops/gated_norm.md
#pragma once

#include <ssm/device.h>
#include <ssm/tensor.h>

namespace ssm {

/// One group per row; no number that a caller would compute.
inline constexpr std::int64_t kWholeRow = INT64_MIN;

/// y = (n(x) weight + bias) silu(z), or y = n(x silu(z)) weight + bias, where
/// n(s) = (s - mean) rstd, with mean 0 for RMSNorm and rstd = 1 / sqrt(mean((s - mean)^2) + eps),
/// in every group of `group_size` neighbours.        Dao & Gu 2024, section 7.1
///
/// Activations are f64, f32, bf16 or f16 in any mix and any strides, with 1 to 6 axes of which the
/// last one is normalised. Arithmetic is f64 when x is f64, else f32. M is the number of groups:
/// that of rows times D / group_size.
struct GatedNormArgs {
    TensorView x{};       // (..., D)   in
    TensorView weight{};  // (D)        in
    TensorView bias{};    // (D)        in, optional
    TensorView z{};       // as x       in, optional
    TensorView y{};       // as x       out
    TensorView mean{};    // (M)        compute type; out, optional, not for RMSNorm
    TensorView rstd{};    // (M)        compute type; out, optional
    bool is_rms = true;
    double eps = 1e-5;
    std::int64_t group_size = kWholeRow;  // divides D
    bool norm_before_gate = true;
};

struct GatedNormGrads {
    TensorView dy{};       // as x   in
    TensorView dx{};       // as x   out
    TensorView dz{};       // as x   out, given where z is
    TensorView dweight{};  // (D)    out, optional
    TensorView dbias{};    // (D)    out, optional
};

/// Throws std::invalid_argument naming the argument, the rule and the value.
SSM_API void gated_norm_fwd(const GatedNormArgs& args, const Exec& exec = {});

/// Needs `mean` (LayerNorm) and `rstd` as the forward wrote them. `y` and `eps` are not read.
SSM_API void gated_norm_bwd(const GatedNormArgs& args, const GatedNormGrads& grads,
                            const Exec& exec = {});

/// Bytes of `Exec::workspace` that the backward needs, from x and group_size.
SSM_API std::int64_t gated_norm_bwd_workspace(const GatedNormArgs& args);

}  // namespace ssm
