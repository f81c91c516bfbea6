// One token, or a few, of the selective state-space recurrence: contract only.
// Mathematics, algorithm and numerics: docs/ops/selective_state_step.md
#pragma once

#include <ssm/device.h>
#include <ssm/tensor.h>

namespace ssm {

/// dt = softplus?(dt + dt_bias),  h = exp(dt A) h + dt B x,  y = (sum_n C h + D x) silu(z), and h
/// is written back to `state`, rounded to its dtype once per call.
///                          Gu & Dao 2023, arXiv:2312.00752, eq. 2-4; Dao & Gu 2024,
///                          arXiv:2405.21060
///
/// Shapes are those of Mamba-1, with channels (D), when state has 3 axes, and those of Mamba-2,
/// with channels (H, P), when it has 4. If x has as many axes as state, it has a token axis T after
/// the batch axis, and so have dt, z, B, C and y. Activations and state are f64, f32, bf16 or f16
/// in any mix and any strides. Arithmetic is f64 when x is f64, else f32.
struct SelectiveStateStepArgs {
    TensorView state{};    // (R, D, N) | (R, H, P, N)               in and out
    TensorView x{};        // (B, D) | (B, H, P)                     in
    TensorView dt{};       // (B, D) | (B, H) or (B, H, P)           in
    TensorView A{};        // (D, N) | (H) or (H, P, N)              in
    TensorView B{};        // (B, N) or (B, G, N), G divides D or H  in
    TensorView C{};        // as B, with a G of its own              in
    TensorView D{};        // (D) | (H) or (H, P)                    in, optional
    TensorView z{};        // as x                                   in, optional
    TensorView dt_bias{};  // (D) | (H) or (H, P)                    in, optional
    TensorView
        state_indices{};  // (B) i32: the row of `state` of each batch row; -1 gives y = 0 and
                          // changes no state; no row twice         in, optional (then R = B)
    TensorView y{};       // as x                                   out
    bool softplus = true;
};

/// Throws std::invalid_argument naming the argument, the rule and the value.
SSM_API void selective_state_step_fwd(const SelectiveStateStepArgs& args, const Exec& exec = {});

}  // namespace ssm
