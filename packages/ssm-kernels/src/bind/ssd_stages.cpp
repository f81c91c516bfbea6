// Python binding of the five stages of the state-space dual scan.
#include <nanobind/stl/pair.h>
#include <ssm/ssd_stages.h>

#include <limits>
#include <utility>

#include "tensor_arg.h"

namespace ssm::bind {

using namespace nb::literals;

namespace {

void chunk_cumsum(const Input& dt, const Input& A, const Input& dt_bias, const Input& seq_idx,
                  const Output& dt_out, const Output& dA_cumsum, bool softplus,
                  std::pair<double, double> dt_limit, int num_threads, std::intptr_t stream) {
    constexpr const char* op = "ssd_chunk_cumsum";
    const SsdChunkCumsumArgs args{.dt = view(op, "dt", dt),
                                  .A = view(op, "A", A),
                                  .dt_bias = view(op, "dt_bias", dt_bias),
                                  .seq_idx = view(op, "seq_idx", seq_idx),
                                  .dt_out = view(op, "dt_out", dt_out),
                                  .dA_cumsum = view(op, "dA_cumsum", dA_cumsum),
                                  .softplus = softplus,
                                  .dt_low = dt_limit.first,
                                  .dt_high = dt_limit.second};
    const nb::gil_scoped_release unlocked;
    ssd_chunk_cumsum_fwd(args, {.num_threads = num_threads, .stream = stream});
}

void chunk_state(const Input& x, const Input& B, const Input& dt, const Input& dA_cumsum,
                 const Input& seq_idx, const Output& states, int num_threads,
                 std::intptr_t stream) {
    constexpr const char* op = "ssd_chunk_state";
    const SsdChunkStateArgs args{.x = view(op, "x", x),
                                 .B = view(op, "B", B),
                                 .dt = view(op, "dt", dt),
                                 .dA_cumsum = view(op, "dA_cumsum", dA_cumsum),
                                 .seq_idx = view(op, "seq_idx", seq_idx),
                                 .states = view(op, "states", states)};
    const nb::gil_scoped_release unlocked;
    ssd_chunk_state_fwd(args, {.num_threads = num_threads, .stream = stream});
}

void state_passing(const Input& states, const Input& dA_cumsum, const Input& initial_states,
                   const Input& seq_idx, const Output& states_in, const Output& final_states,
                   int num_threads, std::intptr_t stream) {
    constexpr const char* op = "ssd_state_passing";
    const SsdStatePassingArgs args{.states = view(op, "states", states),
                                   .dA_cumsum = view(op, "dA_cumsum", dA_cumsum),
                                   .initial_states = view(op, "initial_states", initial_states),
                                   .seq_idx = view(op, "seq_idx", seq_idx),
                                   .states_in = view(op, "states_in", states_in),
                                   .final_states = view(op, "final_states", final_states)};
    const nb::gil_scoped_release unlocked;
    ssd_state_passing_fwd(args, {.num_threads = num_threads, .stream = stream});
}

void bmm_chunk(const Input& C, const Input& B, const Output& CB, int num_threads,
               std::intptr_t stream) {
    constexpr const char* op = "ssd_bmm_chunk";
    const SsdBmmChunkArgs args{
        .C = view(op, "C", C), .B = view(op, "B", B), .CB = view(op, "CB", CB)};
    const nb::gil_scoped_release unlocked;
    ssd_bmm_chunk_fwd(args, {.num_threads = num_threads, .stream = stream});
}

void chunk_output(const Input& CB, const Input& x, const Input& dt, const Input& dA_cumsum,
                  const Input& C, const Input& states_in, const Input& D, const Input& z,
                  const Input& seq_idx, const Output& y, int num_threads, std::intptr_t stream) {
    constexpr const char* op = "ssd_chunk_output";
    const SsdChunkOutputArgs args{.CB = view(op, "CB", CB),
                                  .x = view(op, "x", x),
                                  .dt = view(op, "dt", dt),
                                  .dA_cumsum = view(op, "dA_cumsum", dA_cumsum),
                                  .C = view(op, "C", C),
                                  .states_in = view(op, "states_in", states_in),
                                  .D = view(op, "D", D),
                                  .z = view(op, "z", z),
                                  .seq_idx = view(op, "seq_idx", seq_idx),
                                  .y = view(op, "y", y)};
    const nb::gil_scoped_release unlocked;
    ssd_chunk_output_fwd(args, {.num_threads = num_threads, .stream = stream});
}

void chunk_cumsum_backward(const Input& dt, const Input& A, const Input& dt_bias,
                           const Input& seq_idx, const Input& ddt_out, const Input& ddA_cumsum,
                           const Output& ddt, const Output& dA, const Output& ddt_bias,
                           bool softplus, std::pair<double, double> dt_limit, int num_threads,
                           std::intptr_t stream, const Output& workspace) {
    constexpr const char* op = "ssd_chunk_cumsum";
    const SsdChunkCumsumArgs args{.dt = view(op, "dt", dt),
                                  .A = view(op, "A", A),
                                  .dt_bias = view(op, "dt_bias", dt_bias),
                                  .seq_idx = view(op, "seq_idx", seq_idx),
                                  .softplus = softplus,
                                  .dt_low = dt_limit.first,
                                  .dt_high = dt_limit.second};
    const SsdChunkCumsumGrads grads{.ddt_out = view(op, "ddt_out", ddt_out),
                                    .ddA_cumsum = view(op, "ddA_cumsum", ddA_cumsum),
                                    .ddt = view(op, "ddt", ddt),
                                    .dA = view(op, "dA", dA),
                                    .ddt_bias = view(op, "ddt_bias", ddt_bias)};
    const nb::gil_scoped_release unlocked;
    ssd_chunk_cumsum_bwd(args, grads, settings(op, num_threads, stream, workspace));
}

void chunk_state_backward(const Input& x, const Input& B, const Input& dt, const Input& dA_cumsum,
                          const Input& seq_idx, const Input& dstates, const Output& dx,
                          const Output& dB, const Output& ddt, const Output& ddA_cumsum,
                          int num_threads, std::intptr_t stream) {
    constexpr const char* op = "ssd_chunk_state";
    const SsdChunkStateArgs args{.x = view(op, "x", x),
                                 .B = view(op, "B", B),
                                 .dt = view(op, "dt", dt),
                                 .dA_cumsum = view(op, "dA_cumsum", dA_cumsum),
                                 .seq_idx = view(op, "seq_idx", seq_idx)};
    const SsdChunkStateGrads grads{.dstates = view(op, "dstates", dstates),
                                   .dx = view(op, "dx", dx),
                                   .dB = view(op, "dB", dB),
                                   .ddt = view(op, "ddt", ddt),
                                   .ddA_cumsum = view(op, "ddA_cumsum", ddA_cumsum)};
    const nb::gil_scoped_release unlocked;
    ssd_chunk_state_bwd(args, grads, {.num_threads = num_threads, .stream = stream});
}

void state_passing_backward(const Input& states_in, const Input& dA_cumsum, const Input& seq_idx,
                            const Input& dstates_in, const Input& dfinal_states,
                            const Output& dstates, const Output& ddA_cumsum,
                            const Output& dinitial_states, int num_threads, std::intptr_t stream,
                            const Output& workspace) {
    constexpr const char* op = "ssd_state_passing";
    const SsdStatePassingArgs args{.dA_cumsum = view(op, "dA_cumsum", dA_cumsum),
                                   .seq_idx = view(op, "seq_idx", seq_idx),
                                   .states_in = view(op, "states_in", states_in)};
    const SsdStatePassingGrads grads{
        .dstates_in = view(op, "dstates_in", dstates_in),
        .dfinal_states = view(op, "dfinal_states", dfinal_states),
        .dstates = view(op, "dstates", dstates),
        .ddA_cumsum = view(op, "ddA_cumsum", ddA_cumsum),
        .dinitial_states = view(op, "dinitial_states", dinitial_states)};
    const nb::gil_scoped_release unlocked;
    ssd_state_passing_bwd(args, grads, settings(op, num_threads, stream, workspace));
}

void bmm_chunk_backward(const Input& C, const Input& B, const Input& dCB, const Output& dC,
                        const Output& dB, int num_threads, std::intptr_t stream) {
    constexpr const char* op = "ssd_bmm_chunk";
    const SsdBmmChunkArgs args{.C = view(op, "C", C), .B = view(op, "B", B)};
    const SsdBmmChunkGrads grads{
        .dCB = view(op, "dCB", dCB), .dC = view(op, "dC", dC), .dB = view(op, "dB", dB)};
    const nb::gil_scoped_release unlocked;
    ssd_bmm_chunk_bwd(args, grads, {.num_threads = num_threads, .stream = stream});
}

void chunk_output_backward(const Input& CB, const Input& x, const Input& dt, const Input& dA_cumsum,
                           const Input& C, const Input& states_in, const Input& D, const Input& z,
                           const Input& seq_idx, const Input& dy, const Output& dCB,
                           const Output& dx, const Output& ddt, const Output& ddA_cumsum,
                           const Output& dC, const Output& dstates_in, const Output& dD,
                           const Output& dz, int num_threads, std::intptr_t stream,
                           const Output& workspace) {
    constexpr const char* op = "ssd_chunk_output";
    const SsdChunkOutputArgs args{.CB = view(op, "CB", CB),
                                  .x = view(op, "x", x),
                                  .dt = view(op, "dt", dt),
                                  .dA_cumsum = view(op, "dA_cumsum", dA_cumsum),
                                  .C = view(op, "C", C),
                                  .states_in = view(op, "states_in", states_in),
                                  .D = view(op, "D", D),
                                  .z = view(op, "z", z),
                                  .seq_idx = view(op, "seq_idx", seq_idx)};
    const SsdChunkOutputGrads grads{.dy = view(op, "dy", dy),
                                    .dCB = view(op, "dCB", dCB),
                                    .dx = view(op, "dx", dx),
                                    .ddt = view(op, "ddt", ddt),
                                    .ddA_cumsum = view(op, "ddA_cumsum", ddA_cumsum),
                                    .dC = view(op, "dC", dC),
                                    .dstates_in = view(op, "dstates_in", dstates_in),
                                    .dD = view(op, "dD", dD),
                                    .dz = view(op, "dz", dz)};
    const nb::gil_scoped_release unlocked;
    ssd_chunk_output_bwd(args, grads, settings(op, num_threads, stream, workspace));
}

std::int64_t cumsum_workspace(const Input& dt, const Input& ddt_out, const Input& ddA_cumsum) {
    constexpr const char* op = "ssd_chunk_cumsum";
    return ssd_chunk_cumsum_bwd_workspace({.dt = view(op, "dt", dt)},
                                          {.ddt_out = view(op, "ddt_out", ddt_out),
                                           .ddA_cumsum = view(op, "ddA_cumsum", ddA_cumsum)});
}

std::int64_t passing_workspace(const Input& states_in, const Input& dA_cumsum) {
    constexpr const char* op = "ssd_state_passing";
    return ssd_state_passing_bwd_workspace({.dA_cumsum = view(op, "dA_cumsum", dA_cumsum),
                                            .states_in = view(op, "states_in", states_in)});
}

std::int64_t output_workspace(const Input& CB, const Input& x, const Input& dt, const Input& C,
                              const Input& D, const Input& z) {
    constexpr const char* op = "ssd_chunk_output";
    return ssd_chunk_output_bwd_workspace({.CB = view(op, "CB", CB),
                                           .x = view(op, "x", x),
                                           .dt = view(op, "dt", dt),
                                           .C = view(op, "C", C),
                                           .D = view(op, "D", D),
                                           .z = view(op, "z", z)});
}

}  // namespace

void register_ssd_stages(nb::module_& module) {
    const auto none = nb::none();
    const std::pair<double, double> no_limit{0.0, std::numeric_limits<double>::infinity()};
    module.def("ssd_chunk_cumsum_fwd", &chunk_cumsum, "dt"_a.none(), "A"_a.none(),
               "dt_bias"_a = none, "seq_idx"_a = none, nb::kw_only(), "dt_out"_a.none(),
               "dA_cumsum"_a.none(), "softplus"_a = false, "dt_limit"_a = no_limit,
               "num_threads"_a = 0, "stream"_a = 0,
               R"(Compute step sizes and logarithmic decays by chunk and write them.

dt_out = clamp(softplus(dt + dt_bias)) and, within each chunk, the sums of dt_out A up to and with
each step: Dao & Gu 2024, arXiv:2405.21060, listing 1.

Args:
    dt: (B, L, H), float64 | float32 | bfloat16 | float16, like every array of numbers in any mix
        and any strides.
    A, dt_bias: (H,).
    seq_idx: (B, L), int32. -1 skips a step: its size is 0.
    dt_out, dA_cumsum: (B, H, C, Q) with C = ceil(L / Q). Outputs; written completely.
    softplus: Apply softplus to the step size.
    dt_limit: (low, high), to which the step size is clamped last.
    num_threads: 0 means the process-wide setting.
    stream: A CUDA stream handle; not used on the CPU.

Raises:
    ValueError: a shape, dtype, device or value breaks the contract; the message names the argument.
    TypeError: an argument is not an array with DLPack, or an output is read-only.
)");
    module.def("ssd_chunk_state_fwd", &chunk_state, "x"_a.none(), "B"_a.none(), "dt"_a.none(),
               "dA_cumsum"_a.none(), "seq_idx"_a = none, nb::kw_only(), "states"_a.none(),
               "num_threads"_a = 0, "stream"_a = 0,
               R"(Compute the state that each chunk adds and write it.

The sum of exp(dA_cumsum_last - dA_cumsum_t) dt_t x_t B_t^T over the steps of the sequence that is
open at the end of the chunk: Dao & Gu 2024, arXiv:2405.21060, section 6.

Args:
    x: (B, L, H, P).
    B: (B, L, G, N), G divides H.
    dt, dA_cumsum: (B, H, C, Q), as ssd_chunk_cumsum_fwd wrote them.
    seq_idx: (B, L), int32. Equal neighbours are one sequence, -1 skips a step.
    states: (B, C, H, P, N). Output; written completely.
    num_threads: 0 means the process-wide setting.
    stream: A CUDA stream handle; not used on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_state_passing_fwd", &state_passing, "states"_a.none(), "dA_cumsum"_a.none(),
               "initial_states"_a = none, "seq_idx"_a = none, nb::kw_only(), "states_in"_a.none(),
               "final_states"_a = none, "num_threads"_a = 0, "stream"_a = 0,
               R"(Pass the state from chunk to chunk and write what enters each.

h = exp(dA_cumsum_last) h + states, without its first term where a sequence starts in the chunk:
Dao & Gu 2024, arXiv:2405.21060, section 6.

Args:
    states: (B, C, H, P, N). What each chunk adds, from ssd_chunk_state_fwd.
    dA_cumsum: (B, H, C, Q), from ssd_chunk_cumsum_fwd.
    initial_states: (B, H, P, N). Before the first step; zero when None.
    seq_idx: (B, L), int32, as in ssd_chunk_state_fwd.
    states_in: (B, C, H, P, N). Output; the state that enters each chunk.
    final_states: (B, H, P, N). Output; the state after the last chunk.
    num_threads: 0 means the process-wide setting.
    stream: A CUDA stream handle; not used on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_bmm_chunk_fwd", &bmm_chunk, "C"_a.none(), "B"_a.none(), nb::kw_only(),
               "CB"_a.none(), "num_threads"_a = 0, "stream"_a = 0,
               R"(Multiply C and B of all pairs of steps of each chunk and write the products.

CB_ij = C_i . B_j: Dao & Gu 2024, arXiv:2405.21060, section 6.

Args:
    C, B: (B, L, G, N), with group counts of their own.
    CB: (B, C, G, Q, Q), G the least common multiple of both group counts. Output; 0 beyond L.
    num_threads: 0 means the process-wide setting.
    stream: A CUDA stream handle; not used on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_chunk_output_fwd", &chunk_output, "CB"_a.none(), "x"_a.none(), "dt"_a.none(),
               "dA_cumsum"_a.none(), "C"_a.none(), "states_in"_a.none(), "D"_a = none, "z"_a = none,
               "seq_idx"_a = none, nb::kw_only(), "y"_a.none(), "num_threads"_a = 0, "stream"_a = 0,
               R"(Compute the outputs from what the other stages wrote.

y_i = (sum over j <= i of CB_ij exp(dA_cumsum_i - dA_cumsum_j) dt_j x_j + exp(dA_cumsum_i)
states_in C_i + D x_i) silu(z_i), within sequences: Dao & Gu 2024, arXiv:2405.21060, section 6.

Args:
    CB: (B, C, G, Q, Q), G divides H; read for j <= i.
    x, z: (B, L, H, P).
    dt, dA_cumsum: (B, H, C, Q), from ssd_chunk_cumsum_fwd.
    C: (B, L, G, N), with a group count of its own.
    states_in: (B, C, H, P, N), from ssd_state_passing_fwd.
    D: (H,) or (H, P).
    seq_idx: (B, L), int32, as in ssd_chunk_state_fwd.
    y: (B, L, H, P). Output; written completely, 0 where a step is skipped.
    num_threads: 0 means the process-wide setting.
    stream: A CUDA stream handle; not used on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_chunk_cumsum_bwd", &chunk_cumsum_backward, "dt"_a.none(), "A"_a.none(),
               "dt_bias"_a = none, "seq_idx"_a = none, nb::kw_only(), "ddt_out"_a = none,
               "ddA_cumsum"_a = none, "ddt"_a.none(), "dA"_a.none(), "ddt_bias"_a = none,
               "softplus"_a = false, "dt_limit"_a = no_limit, "num_threads"_a = 0, "stream"_a = 0,
               "workspace"_a = none,
               R"(Gradients of ssd_chunk_cumsum_fwd.

Args:
    dt, A, dt_bias, seq_idx, softplus, dt_limit: as the forward got them.
    ddt_out, ddA_cumsum: (B, H, C, Q). Gradients of its outputs; one of them may be None.
    ddt: (B, L, H). Output.
    dA, ddt_bias: (H,). Outputs; ddt_bias stays None without dt_bias.
    num_threads: 0 means the process-wide setting.
    stream: A CUDA stream handle; not used on the CPU.
    workspace: On a GPU, memory of the size that ssd_chunk_cumsum_bwd_workspace says.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_chunk_state_bwd", &chunk_state_backward, "x"_a.none(), "B"_a.none(),
               "dt"_a.none(), "dA_cumsum"_a.none(), "seq_idx"_a = none, nb::kw_only(),
               "dstates"_a.none(), "dx"_a.none(), "dB"_a.none(), "ddt"_a.none(),
               "ddA_cumsum"_a.none(), "num_threads"_a = 0, "stream"_a = 0,
               R"(Gradients of ssd_chunk_state_fwd.

Args:
    x, B, dt, dA_cumsum, seq_idx: as the forward got them.
    dstates: (B, C, H, P, N). Gradient of states.
    dx, dB, ddt, ddA_cumsum: as x, B, dt and dA_cumsum. Outputs; written completely.
    num_threads: 0 means the process-wide setting.
    stream: A CUDA stream handle; not used on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_state_passing_bwd", &state_passing_backward, "states_in"_a.none(),
               "dA_cumsum"_a.none(), "seq_idx"_a = none, nb::kw_only(), "dstates_in"_a = none,
               "dfinal_states"_a = none, "dstates"_a.none(), "ddA_cumsum"_a.none(),
               "dinitial_states"_a = none, "num_threads"_a = 0, "stream"_a = 0,
               "workspace"_a = none,
               R"(Gradients of ssd_state_passing_fwd.

Args:
    states_in: (B, C, H, P, N), as the forward wrote it.
    dA_cumsum, seq_idx: as the forward got them.
    dstates_in: (B, C, H, P, N). Gradient of states_in; zero when None.
    dfinal_states: (B, H, P, N). Gradient of final_states; zero when None.
    dstates: (B, C, H, P, N). Output; written completely.
    ddA_cumsum: (B, H, C, Q). Output; written completely.
    dinitial_states: (B, H, P, N). Output; not computed when None.
    num_threads: 0 means the process-wide setting.
    stream: A CUDA stream handle; not used on the CPU.
    workspace: On a GPU, memory of the size that ssd_state_passing_bwd_workspace says.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_bmm_chunk_bwd", &bmm_chunk_backward, "C"_a.none(), "B"_a.none(), nb::kw_only(),
               "dCB"_a.none(), "dC"_a.none(), "dB"_a.none(), "num_threads"_a = 0, "stream"_a = 0,
               R"(Gradients of ssd_bmm_chunk_fwd.

Args:
    C, B: as the forward got them.
    dCB: (B, C, G, Q, Q). Gradient of CB; not read beyond L.
    dC, dB: as C and B. Outputs; written completely.
    num_threads: 0 means the process-wide setting.
    stream: A CUDA stream handle; not used on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_chunk_output_bwd", &chunk_output_backward, "CB"_a.none(), "x"_a.none(),
               "dt"_a.none(), "dA_cumsum"_a.none(), "C"_a.none(), "states_in"_a.none(),
               "D"_a = none, "z"_a = none, "seq_idx"_a = none, nb::kw_only(), "dy"_a.none(),
               "dCB"_a.none(), "dx"_a.none(), "ddt"_a.none(), "ddA_cumsum"_a.none(), "dC"_a.none(),
               "dstates_in"_a.none(), "dD"_a = none, "dz"_a = none, "num_threads"_a = 0,
               "stream"_a = 0, "workspace"_a = none,
               R"(Gradients of ssd_chunk_output_fwd.

Args:
    CB, x, dt, dA_cumsum, C, states_in, D, z, seq_idx: as the forward got them.
    dy: (B, L, H, P). Gradient of y.
    dCB, dx, ddt, ddA_cumsum, dC, dstates_in: as their inputs. Outputs; written completely, dCB with
        0 for j > i.
    dD, dz: as D and z. Outputs; None without their inputs.
    num_threads: 0 means the process-wide setting.
    stream: A CUDA stream handle; not used on the CPU.
    workspace: On a GPU, memory of the size that ssd_chunk_output_bwd_workspace says.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_chunk_cumsum_bwd_workspace", &cumsum_workspace, "dt"_a.none(),
               "ddt_out"_a = none, "ddA_cumsum"_a = none,
               R"(Say how much working memory ssd_chunk_cumsum_bwd needs.

Args:
    dt, ddt_out, ddA_cumsum: as the backward gets them.

Returns:
    Bytes of `workspace`; 0 on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_state_passing_bwd_workspace", &passing_workspace, "states_in"_a.none(),
               "dA_cumsum"_a.none(),
               R"(Say how much working memory ssd_state_passing_bwd needs.

Args:
    states_in, dA_cumsum: as the backward gets them.

Returns:
    Bytes of `workspace`; 0 on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
    module.def("ssd_chunk_output_bwd_workspace", &output_workspace, "CB"_a.none(), "x"_a.none(),
               "dt"_a.none(), "C"_a.none(), "D"_a = none, "z"_a = none,
               R"(Say how much working memory ssd_chunk_output_bwd needs.

Args:
    CB, x, dt, C, D, z: as the backward gets them.

Returns:
    Bytes of `workspace`; 0 on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_cumsum_fwd.
)");
}

}  // namespace ssm::bind
