// One token, or a few, of the short causal convolution: contract only.
// Mathematics, algorithm and numerics: docs/ops/dw_causal_conv_step.md
#pragma once

#include <ssm/device.h>
#include <ssm/tensor.h>

namespace ssm {

/// dw_causal_conv over the tokens of this call, with `conv_state` as the inputs before them.
///
/// Without `cache_seqlens` the state is shifted and its newest input is the last one. With it the
/// state is a circular buffer: token t is kept at position (cache_seqlens + t) mod K.
/// Every array but the indices is f64, f32, bf16 or f16 in any mix and any strides. Arithmetic is
/// f64 when x is f64, else f32.
struct DwCausalConvStepArgs {
    TensorView x{};           // (B, D) | (B, D, T)     in
    TensorView conv_state{};  // (R, D, K), K >= W - 1  in and out: the last K inputs
    TensorView weight{};      // (D, W) | (D, 1, W)     in
    TensorView bias{};        // (D)                    in, optional
    TensorView
        cache_seqlens{};  // (B) i32                in, optional: tokens seen before this call
    TensorView state_indices{};  // (B) i32   in, optional: row of conv_state, -1 skips; else R = B
    TensorView y{};              // as x                   out; 0 in skipped rows
    bool silu = false;
};

/// Throws std::invalid_argument naming the argument, the rule and the value; nothing is written
/// then.
SSM_API void dw_causal_conv_step_fwd(const DwCausalConvStepArgs& args, const Exec& exec = {});

}  // namespace ssm
