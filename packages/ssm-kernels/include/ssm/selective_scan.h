// The selective scan of Mamba-1, forward and backward: contract only.
// Mathematics, algorithm and numerics: docs/ops/selective_scan.md
#pragma once

#include <ssm/device.h>
#include <ssm/tensor.h>

namespace ssm {

/// Steps between two saved states. The forward keeps one state per this many steps and the
/// backward computes the ones in between again.
inline constexpr int kSelectiveScanCheckpoint = 32;

/// dt_t = softplus?(delta_t + dt_bias),  h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,
/// y_t = (sum_n C_t h_t + D u_t) silu(z_t).            Gu & Dao 2023, arXiv:2312.00752, eq. 2-4
///
/// Activations are f64, f32, bf16 or f16 in any mix and any strides. Arithmetic and states are
/// f64 when u is f64, else f32. L = 0 and empty batches are allowed.
struct SelectiveScanArgs {
    TensorView u{};              // (B, D, L)     in
    TensorView delta{};          // (B, D, L)     in
    TensorView A{};              // (D, N)        in
    TensorView B{};              // (D, N) | (B, N, L) | (B, G, N, L)   in, G divides D
    TensorView C{};              // as B          in
    TensorView D{};              // (D)           in, optional
    TensorView z{};              // (B, D, L)     in, optional
    TensorView dt_bias{};        // (D)           in, optional
    TensorView initial_state{};  // (S, D, N)     in, optional
    TensorView
        seq_idx{};   // (B, L) i32    in, optional: equal neighbours are one sequence, -1 skips
    TensorView y{};  // (B, D, L)     out
    TensorView last_state{};   // (S, D, N)     out, optional
    TensorView checkpoints{};  // (B, ceil(L / 32), N, D) contiguous, compute type   out, optional
    bool softplus = false;
    // True: seq_idx holds sequence numbers 0..S-1 and states are per sequence. False: S = B.
    bool state_per_sequence = false;
};

struct SelectiveScanGrads {
    TensorView dy{};              // (B, D, L)    in
    TensorView dlast_state{};     // (S, D, N)    in, optional
    TensorView du{};              // (B, D, L)    out
    TensorView ddelta{};          // (B, D, L)    out
    TensorView dA{};              // (D, N)       out
    TensorView dB{};              // as B         out
    TensorView dC{};              // as C         out
    TensorView dD{};              // (D)          out, with D
    TensorView dz{};              // (B, D, L)    out, with z
    TensorView ddt_bias{};        // (D)          out, with dt_bias
    TensorView dinitial_state{};  // (S, D, N)    out, optional
};

/// Throws std::invalid_argument naming the argument, the rule and the value.
SSM_API void selective_scan_fwd(const SelectiveScanArgs& args, const Exec& exec = {});

/// Needs `args.checkpoints` as the forward wrote it; `args.y` and `args.last_state` are not read.
SSM_API void selective_scan_bwd(const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
                                const Exec& exec = {});

/// Bytes of `Exec::workspace`, from u, A, B and C; the backward also looks whether D and dt_bias
/// are there.
SSM_API std::int64_t selective_scan_fwd_workspace(const SelectiveScanArgs& args);
SSM_API std::int64_t selective_scan_bwd_workspace(const SelectiveScanArgs& args);

}  // namespace ssm
