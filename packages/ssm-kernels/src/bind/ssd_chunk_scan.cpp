// Python binding of the state-space dual scan.
#include <ssm/ssd_chunk_scan.h>

#include "tensor_arg.h"

namespace ssm::bind {

using namespace nb::literals;

namespace {

constexpr const char* kOp = "ssd_chunk_scan";

SsdChunkScanArgs inputs(const Input& X, const Input& dt, const Input& A, const Input& B,
                        const Input& C, const Input& D, const Input& z, const Input& dt_bias,
                        const Input& initial_states, const Input& seq_idx, double dt_low,
                        double dt_high, bool softplus, bool state_per_sequence) {
    return {.X = view(kOp, "X", X),
            .dt = view(kOp, "dt", dt),
            .A = view(kOp, "A", A),
            .B = view(kOp, "B", B),
            .C = view(kOp, "C", C),
            .D = view(kOp, "D", D),
            .z = view(kOp, "z", z),
            .dt_bias = view(kOp, "dt_bias", dt_bias),
            .initial_states = view(kOp, "initial_states", initial_states),
            .seq_idx = view(kOp, "seq_idx", seq_idx),
            .dt_low = dt_low,
            .dt_high = dt_high,
            .softplus = softplus,
            .state_per_sequence = state_per_sequence};
}

void forward(const Input& X, const Input& dt, const Input& A, const Input& B, const Input& C,
             const Input& D, const Input& z, const Input& dt_bias, const Input& initial_states,
             const Input& seq_idx, const Output& y, const Output& final_states,
             const Output& checkpoints, double dt_low, double dt_high, bool softplus,
             bool state_per_sequence, int num_threads, std::intptr_t stream,
             const Output& workspace) {
    SsdChunkScanArgs args = inputs(X, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_low,
                                   dt_high, softplus, state_per_sequence);
    args.y = view(kOp, "y", y);
    args.final_states = view(kOp, "final_states", final_states);
    args.checkpoints = view(kOp, "checkpoints", checkpoints);
    const nb::gil_scoped_release unlocked;
    ssd_chunk_scan_fwd(args, settings(kOp, num_threads, stream, workspace));
}

void backward(const Input& X, const Input& dt, const Input& A, const Input& B, const Input& C,
              const Input& D, const Input& z, const Input& dt_bias, const Input& initial_states,
              const Input& seq_idx, const Input& checkpoints, const Input& dy,
              const Input& dfinal_states, const Output& dX, const Output& ddt, const Output& dA,
              const Output& dB, const Output& dC, const Output& dD, const Output& dz,
              const Output& ddt_bias, const Output& dinitial_states, double dt_low, double dt_high,
              bool softplus, bool state_per_sequence, int num_threads, std::intptr_t stream,
              const Output& workspace) {
    SsdChunkScanArgs args = inputs(X, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_low,
                                   dt_high, softplus, state_per_sequence);
    args.checkpoints = view(kOp, "checkpoints", checkpoints);
    const SsdChunkScanGrads grads{.dy = view(kOp, "dy", dy),
                                  .dfinal_states = view(kOp, "dfinal_states", dfinal_states),
                                  .dX = view(kOp, "dX", dX),
                                  .ddt = view(kOp, "ddt", ddt),
                                  .dA = view(kOp, "dA", dA),
                                  .dB = view(kOp, "dB", dB),
                                  .dC = view(kOp, "dC", dC),
                                  .dD = view(kOp, "dD", dD),
                                  .dz = view(kOp, "dz", dz),
                                  .ddt_bias = view(kOp, "ddt_bias", ddt_bias),
                                  .dinitial_states = view(kOp, "dinitial_states", dinitial_states)};
    const nb::gil_scoped_release unlocked;
    ssd_chunk_scan_bwd(args, grads, settings(kOp, num_threads, stream, workspace));
}

std::int64_t forward_workspace(const Input& X, const Input& B, const Input& C) {
    return ssd_chunk_scan_fwd_workspace(
        {.X = view(kOp, "X", X), .B = view(kOp, "B", B), .C = view(kOp, "C", C)});
}

std::int64_t backward_workspace(const Input& X, const Input& B, const Input& C, const Input& D,
                                const Input& dt_bias, const Input& seq_idx) {
    return ssd_chunk_scan_bwd_workspace({.X = view(kOp, "X", X),
                                         .B = view(kOp, "B", B),
                                         .C = view(kOp, "C", C),
                                         .D = view(kOp, "D", D),
                                         .dt_bias = view(kOp, "dt_bias", dt_bias),
                                         .seq_idx = view(kOp, "seq_idx", seq_idx)});
}

}  // namespace

void register_ssd_chunk_scan(nb::module_& module) {
    const auto none = nb::none();
    constexpr double high = std::numeric_limits<double>::infinity();
    module.def(
        "ssd_chunk_scan_fwd", &forward, "X"_a.none(), "dt"_a.none(), "A"_a.none(), "B"_a.none(),
        "C"_a.none(), "D"_a = none, "z"_a = none, "dt_bias"_a = none, "initial_states"_a = none,
        "seq_idx"_a = none, nb::kw_only(), "y"_a.none(), "final_states"_a = none,
        "checkpoints"_a = none, "dt_low"_a = 0.0, "dt_high"_a = high, "softplus"_a = false,
        "state_per_sequence"_a = false, "num_threads"_a = 0, "stream"_a = 0, "workspace"_a = none,
        R"(Run the state-space dual scan and write the output and, where given, the final states.

y_t = (h_t C_t + D X_t) silu(z_t) with h_t = exp(s_t A) h_{t-1} + s_t X_t B_t^T and
s = clamp(softplus(dt + dt_bias), dt_low, dt_high): Dao & Gu 2024, arXiv:2405.21060, eq. 1.

Args:
    X, z: (B, L, H, P), float64 | float32 | bfloat16 | float16 in any mix, any strides.
    dt: (B, L, H).
    A: (H,). Continuous decay, negative for a stable scan.
    B, C: (B, L, G, N); G divides H and may differ between the two.
    D: (H,) or (H, P).
    dt_bias: (H,).
    initial_states: (S, H, P, N). State before the first step; zero when None.
    seq_idx: (B, L) int32. Equal neighbours belong to one sequence, -1 skips a step.
    y: (B, L, H, P). Output; written completely.
    final_states: (S, H, P, N). Output; the state after each sequence.
    checkpoints: (B, ceil(L / 96), H, N, P), contiguous, float64 when X is, else float32. Output
        that ssd_chunk_scan_bwd needs on the CPU; not written on a GPU.
    dt_low, dt_high: the step size is clamped to these last.
    softplus: Apply softplus to dt + dt_bias.
    state_per_sequence: States belong to the sequence numbers of seq_idx; otherwise S = B.
    num_threads: 0 means the process-wide setting; not used on a GPU.
    stream: handle of the CUDA stream, 0 the legacy default stream; not used on the CPU.
    workspace: contiguous, of the inputs' device, at least ssd_chunk_scan_fwd_workspace bytes; None
        where these are 0.

Raises:
    ValueError: a shape, dtype, device or value breaks the contract; the message names the argument.
    TypeError: an argument is not an array with DLPack, or an output is read-only.
)");
    module.def("ssd_chunk_scan_fwd_workspace", &forward_workspace, "X"_a.none(), "B"_a.none(),
               "C"_a.none(),
               R"(Say how much working memory ssd_chunk_scan_fwd needs.

Args:
    X, B, C: as for ssd_chunk_scan_fwd. Only shapes, dtypes and devices are looked at.

Returns:
    Bytes; 0 on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_scan_fwd.
)");
    module.def("ssd_chunk_scan_bwd_workspace", &backward_workspace, "X"_a.none(), "B"_a.none(),
               "C"_a.none(), "D"_a = none, "dt_bias"_a = none, "seq_idx"_a = none,
               R"(Say how much working memory ssd_chunk_scan_bwd needs.

Args:
    X, B, C, D, dt_bias, seq_idx: as for ssd_chunk_scan_bwd. Only shapes, dtypes and devices are
        looked at, and of the last three, whether they are there.

Returns:
    Bytes; 0 on the CPU.

Raises:
    ValueError, TypeError: as ssd_chunk_scan_fwd.
)");
    module.def("ssd_chunk_scan_bwd", &backward, "X"_a.none(), "dt"_a.none(), "A"_a.none(),
               "B"_a.none(), "C"_a.none(), "D"_a = none, "z"_a = none, "dt_bias"_a = none,
               "initial_states"_a = none, "seq_idx"_a = none, nb::kw_only(), "checkpoints"_a = none,
               "dy"_a.none(), "dfinal_states"_a = none, "dX"_a.none(), "ddt"_a.none(),
               "dA"_a.none(), "dB"_a.none(), "dC"_a.none(), "dD"_a = none, "dz"_a = none,
               "ddt_bias"_a = none, "dinitial_states"_a = none, "dt_low"_a = 0.0,
               "dt_high"_a = high, "softplus"_a = false, "state_per_sequence"_a = false,
               "num_threads"_a = 0, "stream"_a = 0, "workspace"_a = none,
               R"(Gradients of ssd_chunk_scan_fwd; the inputs are the ones the forward got.

Args:
    checkpoints: as ssd_chunk_scan_fwd wrote them; not used on a GPU.
    dy: (B, L, H, P). Gradient of y.
    dfinal_states: (S, H, P, N). Gradient of final_states; zero when None.
    dX, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states: outputs shaped like their inputs. dD, dz
        and ddt_bias are needed where the input was given; dinitial_states is optional.
    workspace: at least ssd_chunk_scan_bwd_workspace bytes.

Raises:
    ValueError, TypeError: as ssd_chunk_scan_fwd.
)");
}

}  // namespace ssm::bind
