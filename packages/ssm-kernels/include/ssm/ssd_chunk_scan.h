// The state-space dual scan of Mamba-2, forward and backward: contract only.
// Mathematics, algorithm and numerics: docs/ops/ssd_chunk_scan.md
#pragma once

#include <ssm/device.h>
#include <ssm/tensor.h>

#include <limits>

namespace ssm {

/// Steps between two saved states. The forward keeps one state per this many steps and the
/// backward computes the ones in between again.
inline constexpr int kSsdChunkScanCheckpoint = 96;

/// Most states of a head on a GPU.
inline constexpr int kSsdChunkScanGpuStates = 256;

/// s_t = clamp(softplus?(dt_t + dt_bias), low, high),  h_t = exp(s_t A) h_{t-1} + s_t X_t B_t^T,
/// y_t = (h_t C_t + D X_t) silu(z_t).            Dao & Gu 2024, arXiv:2405.21060, eq. 1
///
/// Tensors are f64, f32, bf16 or f16 in any mix and any strides. Arithmetic and states are f64 when
/// X is f64, else f32. L = 0 and empty batches are allowed. On a GPU N is at most
/// kSsdChunkScanGpuStates, and where X is bf16 or f16 matrices are multiplied in that type, with
/// sums in f32.
struct SsdChunkScanArgs {
    TensorView X{};               // (B, L, H, P)     in
    TensorView dt{};              // (B, L, H)        in
    TensorView A{};               // (H)              in
    TensorView B{};               // (B, L, G, N)     in, G divides H
    TensorView C{};               // (B, L, G, N)     in, with a group count of its own
    TensorView D{};               // (H) | (H, P)     in, optional
    TensorView z{};               // (B, L, H, P)     in, optional
    TensorView dt_bias{};         // (H)              in, optional
    TensorView initial_states{};  // (S, H, P, N)     in, optional
    TensorView
        seq_idx{};   // (B, L) i32       in, optional: equal neighbours are one sequence, -1 skips
    TensorView y{};  // (B, L, H, P)     out
    TensorView final_states{};  // (S, H, P, N)     out, optional
    TensorView
        checkpoints{};  // (B, ceil(L / 96), H, N, P) contiguous, compute type   out, optional
    double dt_low = 0.0;
    double dt_high = std::numeric_limits<double>::infinity();
    bool softplus = false;
    // True: seq_idx holds sequence numbers 0..S-1 and states are per sequence. False: S = B.
    bool state_per_sequence = false;
};

struct SsdChunkScanGrads {
    TensorView dy{};               // (B, L, H, P)     in
    TensorView dfinal_states{};    // (S, H, P, N)     in, optional
    TensorView dX{};               // (B, L, H, P)     out
    TensorView ddt{};              // (B, L, H)        out
    TensorView dA{};               // (H)              out
    TensorView dB{};               // as B             out
    TensorView dC{};               // as C             out
    TensorView dD{};               // as D             out, with D
    TensorView dz{};               // (B, L, H, P)     out, with z
    TensorView ddt_bias{};         // (H)              out, with dt_bias
    TensorView dinitial_states{};  // (S, H, P, N)     out, optional
};

/// Throws std::invalid_argument naming the argument, the rule and the value.
SSM_API void ssd_chunk_scan_fwd(const SsdChunkScanArgs& args, const Exec& exec = {});

/// Bytes of working memory that the forward needs; 0 on the CPU. Looks at the shapes of X and B.
SSM_API std::int64_t ssd_chunk_scan_fwd_workspace(const SsdChunkScanArgs& args);

/// Needs `args.checkpoints` as the forward wrote it, but on a GPU, where there are none; `args.y`
/// and `args.final_states` are not read.
SSM_API void ssd_chunk_scan_bwd(const SsdChunkScanArgs& args, const SsdChunkScanGrads& grads,
                                const Exec& exec = {});

/// The same of the backward. Looks also at the shape of C, and at whether there are D, dt_bias and
/// seq_idx.
SSM_API std::int64_t ssd_chunk_scan_bwd_workspace(const SsdChunkScanArgs& args);

}  // namespace ssm
