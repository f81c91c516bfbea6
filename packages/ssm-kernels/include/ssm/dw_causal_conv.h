// The short causal convolution of every channel with its own filter: contract only.
// Mathematics, algorithm and numerics: docs/ops/dw_causal_conv.md
#pragma once

#include <ssm/device.h>
#include <ssm/tensor.h>

namespace ssm {

/// y_t = act(bias + sum_k weight_k x_{t-(W-1)+k}), act = SiLU or identity.
/// Gu & Dao 2023, arXiv:2312.00752, section 3.4
///
/// Before the first step of a sequence lies its initial state, or zero. Skipped steps are as if
/// they were not there: y is 0 and x is not read. Every array is f64, f32, bf16 or f16 in any mix
/// and any strides. Arithmetic is f64 when x is f64, else f32. W >= 1; L = 0 and empty batches are
/// allowed.
struct DwCausalConvArgs {
    TensorView x{};              // (B, D, L)                in
    TensorView weight{};         // (D, W) | (D, 1, W)       in
    TensorView bias{};           // (D)                      in, optional
    TensorView initial_state{};  // (S, D, W - 1)            in, optional: oldest input first
    TensorView seq_idx{};  // (B, L) i32   in, optional: equal neighbours are one sequence, -1 skips
    TensorView y{};        // (B, D, L)                out
    TensorView final_state{};  // (S, D, W - 1)            out, optional
    bool silu = false;
    // True: seq_idx holds sequence numbers 0..S-1 and states are per sequence. False: S = B.
    bool state_per_sequence = false;
};

struct DwCausalConvGrads {
    TensorView dy{};              // (B, D, L)        in
    TensorView dfinal_state{};    // (S, D, W - 1)    in, optional
    TensorView dx{};              // (B, D, L)        out
    TensorView dweight{};         // as weight        out
    TensorView dbias{};           // (D)              out, with bias
    TensorView dinitial_state{};  // (S, D, W - 1)    out, optional
};

/// Throws std::invalid_argument naming the argument, the rule and the value.
SSM_API void dw_causal_conv_fwd(const DwCausalConvArgs& args, const Exec& exec = {});

/// `args.y` and `args.final_state` are not read.
SSM_API void dw_causal_conv_bwd(const DwCausalConvArgs& args, const DwCausalConvGrads& grads,
                                const Exec& exec = {});

/// Bytes of `Exec::workspace` that the backward needs, from x, weight, dy and dx; 0 on the CPU.
SSM_API std::int64_t dw_causal_conv_bwd_workspace(const DwCausalConvArgs& args,
                                                  const DwCausalConvGrads& grads);

}  // namespace ssm
