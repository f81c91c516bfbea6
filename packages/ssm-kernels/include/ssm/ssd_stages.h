// The five stages of the chunked state-space dual scan, forward and backward: contract only.
// Mathematics, layouts and numerics: docs/ops/ssd_stages.md
#pragma once

#include <ssm/device.h>
#include <ssm/tensor.h>

namespace ssm {

// A chunk has Q steps and there are C = ceil(L / Q) of them; what stands beyond L is not read.
// Every array of numbers is f64, f32, bf16 or f16 in any mix and any strides; arithmetic is f64
// when the main input is, else f32. `seq_idx`: equal neighbours are one sequence, -1 skips a step.
// Dao & Gu 2024, arXiv:2405.21060, section 6.

/// dt_out = clamp(softplus?(dt + dt_bias), low, high), 0 where skipped or beyond L;
/// dA_cumsum_i = sum of dt_out_k A over k <= i, in f64. Main input: dt. Q is that of dt_out.
struct SsdChunkCumsumArgs {
    TensorView dt{};         // (B, L, H)      in
    TensorView A{};          // (H)            in
    TensorView dt_bias{};    // (H)            in, optional
    TensorView seq_idx{};    // (B, L) i32     in, optional: only -1 matters here
    TensorView dt_out{};     // (B, H, C, Q)   out
    TensorView dA_cumsum{};  // (B, H, C, Q)   out
    bool softplus = false;
    double dt_low = 0.0;  // dt_limit
    double dt_high = __builtin_huge_val();
};

/// C = ceil(L / Q) for the Q of the output gradients; at least one of the two is given.
struct SsdChunkCumsumGrads {
    TensorView ddt_out{};     // (B, H, C, Q)   in, optional
    TensorView ddA_cumsum{};  // (B, H, C, Q)   in, optional
    TensorView ddt{};         // (B, L, H)      out
    TensorView dA{};          // (H)            out
    TensorView ddt_bias{};    // (H)            out, with dt_bias
};

/// states = sum of exp(dA_cumsum_last - dA_cumsum_t) dt_t x_t B_t^T over the steps of the sequence
/// that is open at the chunk's end. Main input: x.
struct SsdChunkStateArgs {
    TensorView x{};          // (B, L, H, P)      in
    TensorView B{};          // (B, L, G, N)      in, G divides H
    TensorView dt{};         // (B, H, C, Q)      in
    TensorView dA_cumsum{};  // (B, H, C, Q)      in
    TensorView seq_idx{};    // (B, L) i32        in, optional
    TensorView states{};     // (B, C, H, P, N)   out
};

struct SsdChunkStateGrads {
    TensorView dstates{};     // (B, C, H, P, N)   in
    TensorView dx{};          // (B, L, H, P)      out
    TensorView dB{};          // (B, L, G, N)      out
    TensorView ddt{};         // (B, H, C, Q)      out
    TensorView ddA_cumsum{};  // (B, H, C, Q)      out
};

/// h_0 = initial_states, h_c+1 = exp(dA_cumsum_last) h_c + states_c, without its first term where
/// a sequence starts in chunk c; states_in_c = h_c, final_states = h_C. Main input: states.
struct SsdStatePassingArgs {
    TensorView states{};          // (B, C, H, P, N)   in
    TensorView dA_cumsum{};       // (B, H, C, Q)      in
    TensorView initial_states{};  // (B, H, P, N)      in, optional
    TensorView seq_idx{};         // (B, L) i32        in, optional
    TensorView states_in{};       // (B, C, H, P, N)   out
    TensorView final_states{};    // (B, H, P, N)      out, optional
};

struct SsdStatePassingGrads {
    TensorView dstates_in{};       // (B, C, H, P, N)   in, optional
    TensorView dfinal_states{};    // (B, H, P, N)      in, optional
    TensorView dstates{};          // (B, C, H, P, N)   out
    TensorView ddA_cumsum{};       // (B, H, C, Q)      out
    TensorView dinitial_states{};  // (B, H, P, N)      out, optional
};

/// CB_ij = C_i . B_j for all steps i, j of a chunk, 0 beyond L. Main input: C. Q is that of CB.
struct SsdBmmChunkArgs {
    TensorView C{};   // (B, L, G, N)      in
    TensorView B{};   // (B, L, G, N)      in, with a group count of its own
    TensorView CB{};  // (B, C, G, Q, Q)   out, G the least common multiple of both group counts
};

struct SsdBmmChunkGrads {
    TensorView dCB{};  // (B, C, G, Q, Q)   in; not read beyond L
    TensorView dC{};   // as C              out
    TensorView dB{};   // as B              out
};

/// y_i = sum of CB_ij exp(dA_cumsum_i - dA_cumsum_j) dt_j x_j over j <= i of the same sequence,
/// + exp(dA_cumsum_i) states_in C_i if the state entered in that sequence, + D x_i; times
/// silu(z_i). Main input: x.
struct SsdChunkOutputArgs {
    TensorView CB{};         // (B, C, G, Q, Q)   in, G divides H; read for j <= i
    TensorView x{};          // (B, L, H, P)      in
    TensorView dt{};         // (B, H, C, Q)      in
    TensorView dA_cumsum{};  // (B, H, C, Q)      in
    TensorView C{};          // (B, L, G, N)      in, with a group count of its own
    TensorView states_in{};  // (B, C, H, P, N)   in
    TensorView D{};          // (H) | (H, P)      in, optional
    TensorView z{};          // (B, L, H, P)      in, optional
    TensorView seq_idx{};    // (B, L) i32        in, optional
    TensorView y{};          // (B, L, H, P)      out
};

struct SsdChunkOutputGrads {
    TensorView dy{};          // (B, L, H, P)      in
    TensorView dCB{};         // (B, C, G, Q, Q)   out; 0 for j > i
    TensorView dx{};          // (B, L, H, P)      out
    TensorView ddt{};         // (B, H, C, Q)      out
    TensorView ddA_cumsum{};  // (B, H, C, Q)      out
    TensorView dC{};          // (B, L, G, N)      out
    TensorView dstates_in{};  // (B, C, H, P, N)   out
    TensorView dD{};          // as D              out, with D
    TensorView dz{};          // (B, L, H, P)      out, with z
};

/// All throw std::invalid_argument naming the argument, the rule and the value.
SSM_API void ssd_chunk_cumsum_fwd(const SsdChunkCumsumArgs& args, const Exec& exec = {});
SSM_API void ssd_chunk_state_fwd(const SsdChunkStateArgs& args, const Exec& exec = {});
SSM_API void ssd_state_passing_fwd(const SsdStatePassingArgs& args, const Exec& exec = {});
SSM_API void ssd_bmm_chunk_fwd(const SsdBmmChunkArgs& args, const Exec& exec = {});
SSM_API void ssd_chunk_output_fwd(const SsdChunkOutputArgs& args, const Exec& exec = {});

/// The gradients. Of `args` the inputs are read, and no output but `states_in` in state_passing,
/// which does not read `states`: its arithmetic is f64 when `states_in` is.
SSM_API void ssd_chunk_cumsum_bwd(const SsdChunkCumsumArgs& args, const SsdChunkCumsumGrads& grads,
                                  const Exec& exec = {});
SSM_API void ssd_chunk_state_bwd(const SsdChunkStateArgs& args, const SsdChunkStateGrads& grads,
                                 const Exec& exec = {});
SSM_API void ssd_state_passing_bwd(const SsdStatePassingArgs& args,
                                   const SsdStatePassingGrads& grads, const Exec& exec = {});
SSM_API void ssd_bmm_chunk_bwd(const SsdBmmChunkArgs& args, const SsdBmmChunkGrads& grads,
                               const Exec& exec = {});
SSM_API void ssd_chunk_output_bwd(const SsdChunkOutputArgs& args, const SsdChunkOutputGrads& grads,
                                  const Exec& exec = {});

/// Bytes of `Exec::workspace` of the backward: from dt and the output gradients; from states_in and
/// dA_cumsum; from CB, x, dt and C, and whether D and z are there.
SSM_API std::int64_t ssd_chunk_cumsum_bwd_workspace(const SsdChunkCumsumArgs& args,
                                                    const SsdChunkCumsumGrads& grads);
SSM_API std::int64_t ssd_state_passing_bwd_workspace(const SsdStatePassingArgs& args);
SSM_API std::int64_t ssd_chunk_output_bwd_workspace(const SsdChunkOutputArgs& args);

}  // namespace ssm
