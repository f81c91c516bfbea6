// Python binding of the selective scan.
#include <ssm/selective_scan.h>

#include "tensor_arg.h"

namespace ssm::bind {

using namespace nb::literals;

namespace {

constexpr const char* kOp = "selective_scan";

SelectiveScanArgs inputs(const Input& u, const Input& delta, const Input& A, const Input& B,
                         const Input& C, const Input& D, const Input& z, const Input& dt_bias,
                         const Input& initial_state, const Input& seq_idx, bool softplus,
                         bool state_per_sequence) {
    return {.u = view(kOp, "u", u),
            .delta = view(kOp, "delta", delta),
            .A = view(kOp, "A", A),
            .B = view(kOp, "B", B),
            .C = view(kOp, "C", C),
            .D = view(kOp, "D", D),
            .z = view(kOp, "z", z),
            .dt_bias = view(kOp, "dt_bias", dt_bias),
            .initial_state = view(kOp, "initial_state", initial_state),
            .seq_idx = view(kOp, "seq_idx", seq_idx),
            .softplus = softplus,
            .state_per_sequence = state_per_sequence};
}

void forward(const Input& u, const Input& delta, const Input& A, const Input& B, const Input& C,
             const Input& D, const Input& z, const Input& dt_bias, const Input& initial_state,
             const Input& seq_idx, const Output& y, const Output& last_state,
             const Output& checkpoints, bool softplus, bool state_per_sequence, int num_threads,
             std::intptr_t stream, const Output& workspace) {
    SelectiveScanArgs args = inputs(u, delta, A, B, C, D, z, dt_bias, initial_state, seq_idx,
                                    softplus, state_per_sequence);
    args.y = view(kOp, "y", y);
    args.last_state = view(kOp, "last_state", last_state);
    args.checkpoints = view(kOp, "checkpoints", checkpoints);
    const nb::gil_scoped_release unlocked;
    selective_scan_fwd(args, settings(kOp, num_threads, stream, workspace));
}

void backward(const Input& u, const Input& delta, const Input& A, const Input& B, const Input& C,
              const Input& D, const Input& z, const Input& dt_bias, const Input& initial_state,
              const Input& seq_idx, const Input& checkpoints, const Input& dy,
              const Input& dlast_state, const Output& du, const Output& ddelta, const Output& dA,
              const Output& dB, const Output& dC, const Output& dD, const Output& dz,
              const Output& ddt_bias, const Output& dinitial_state, bool softplus,
              bool state_per_sequence, int num_threads, std::intptr_t stream,
              const Output& workspace) {
    SelectiveScanArgs args = inputs(u, delta, A, B, C, D, z, dt_bias, initial_state, seq_idx,
                                    softplus, state_per_sequence);
    args.checkpoints = view(kOp, "checkpoints", checkpoints);
    const SelectiveScanGrads grads{.dy = view(kOp, "dy", dy),
                                   .dlast_state = view(kOp, "dlast_state", dlast_state),
                                   .du = view(kOp, "du", du),
                                   .ddelta = view(kOp, "ddelta", ddelta),
                                   .dA = view(kOp, "dA", dA),
                                   .dB = view(kOp, "dB", dB),
                                   .dC = view(kOp, "dC", dC),
                                   .dD = view(kOp, "dD", dD),
                                   .dz = view(kOp, "dz", dz),
                                   .ddt_bias = view(kOp, "ddt_bias", ddt_bias),
                                   .dinitial_state = view(kOp, "dinitial_state", dinitial_state)};
    const nb::gil_scoped_release unlocked;
    selective_scan_bwd(args, grads, settings(kOp, num_threads, stream, workspace));
}

template <std::int64_t (*bytes)(const SelectiveScanArgs&)>
std::int64_t workspace(const Input& u, const Input& A, const Input& B, const Input& C,
                       const Input& D, const Input& dt_bias) {
    return bytes({.u = view(kOp, "u", u),
                  .A = view(kOp, "A", A),
                  .B = view(kOp, "B", B),
                  .C = view(kOp, "C", C),
                  .D = view(kOp, "D", D),
                  .dt_bias = view(kOp, "dt_bias", dt_bias)});
}

}  // namespace

void register_selective_scan(nb::module_& module) {
    const auto none = nb::none();
    module.def("selective_scan_fwd", &forward, "u"_a.none(), "delta"_a.none(), "A"_a.none(),
               "B"_a.none(), "C"_a.none(), "D"_a = none, "z"_a = none, "dt_bias"_a = none,
               "initial_state"_a = none, "seq_idx"_a = none, nb::kw_only(), "y"_a.none(),
               "last_state"_a = none, "checkpoints"_a = none, "softplus"_a = false,
               "state_per_sequence"_a = false, "num_threads"_a = 0, "stream"_a = 0,
               "workspace"_a = none,
               R"(Run the selective scan and write the output and, where given, the last state.

y_t = (sum_n C_t h_t + D u_t) silu(z_t) with h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and
dt = softplus(delta + dt_bias): Gu & Dao 2023, arXiv:2312.00752, eq. 2-4.

Args:
    u, delta, z: (B, D, L), float64 | float32 | bfloat16 | float16 in any mix, any strides.
    A: (D, N). Continuous decay, negative for a stable scan.
    B, C: (D, N) constant over time, (B, N, L) or (B, G, N, L); G divides D.
    D, dt_bias: (D,).
    initial_state: (S, D, N). State before the first step; zero when None.
    seq_idx: (B, L) int32. Equal neighbours belong to one sequence, -1 skips a step.
    y: (B, D, L). Output; written completely.
    last_state: (S, D, N). Output; the state after each sequence.
    checkpoints: (B, ceil(L / 32), N, D), contiguous, float64 when u is, else float32. Output that
        selective_scan_bwd needs.
    softplus: Apply softplus to delta + dt_bias.
    state_per_sequence: States belong to the sequence numbers of seq_idx; otherwise S = B.
    num_threads: 0 means the process-wide setting; not used on a GPU.
    stream: handle of the CUDA stream, 0 the legacy default stream; not used on the CPU.
    workspace: contiguous, of the inputs' device, at least selective_scan_fwd_workspace bytes; None
        where these are 0.

Raises:
    ValueError: a shape, dtype, device or value breaks the contract; the message names the argument.
    TypeError: an argument is not an array with DLPack, or an output is read-only.
)");
    module.def("selective_scan_fwd_workspace", &workspace<selective_scan_fwd_workspace>,
               "u"_a.none(), "A"_a.none(), "B"_a.none(), "C"_a.none(), "D"_a = none,
               "dt_bias"_a = none,
               R"(Say how much working memory selective_scan_fwd needs.

Args:
    u, A, B, C, D, dt_bias: as for selective_scan_fwd. Only shapes, dtypes and devices are looked
        at, and of D and dt_bias, whether they are there.

Returns:
    Bytes; 0 on the CPU.

Raises:
    ValueError, TypeError: as selective_scan_fwd.
)");
    module.def("selective_scan_bwd_workspace", &workspace<selective_scan_bwd_workspace>,
               "u"_a.none(), "A"_a.none(), "B"_a.none(), "C"_a.none(), "D"_a = none,
               "dt_bias"_a = none,
               R"(Say how much working memory selective_scan_bwd needs.

Args:
    u, A, B, C, D, dt_bias: as for selective_scan_fwd_workspace.

Returns:
    Bytes; 0 on the CPU.

Raises:
    ValueError, TypeError: as selective_scan_fwd.
)");
    module.def("selective_scan_bwd", &backward, "u"_a.none(), "delta"_a.none(), "A"_a.none(),
               "B"_a.none(), "C"_a.none(), "D"_a = none, "z"_a = none, "dt_bias"_a = none,
               "initial_state"_a = none, "seq_idx"_a = none, nb::kw_only(), "checkpoints"_a.none(),
               "dy"_a.none(), "dlast_state"_a = none, "du"_a.none(), "ddelta"_a.none(),
               "dA"_a.none(), "dB"_a.none(), "dC"_a.none(), "dD"_a = none, "dz"_a = none,
               "ddt_bias"_a = none, "dinitial_state"_a = none, "softplus"_a = false,
               "state_per_sequence"_a = false, "num_threads"_a = 0, "stream"_a = 0,
               "workspace"_a = none,
               R"(Gradients of selective_scan_fwd; the inputs are the ones the forward got.

Args:
    checkpoints: as selective_scan_fwd wrote them.
    dy: (B, D, L). Gradient of y.
    dlast_state: (S, D, N). Gradient of last_state; zero when None.
    du, ddelta, dA, dB, dC, dD, dz, ddt_bias, dinitial_state: outputs shaped like their inputs. dD,
        dz and ddt_bias are needed where the input was given; dinitial_state is optional.
    workspace: at least selective_scan_bwd_workspace bytes.

Raises:
    ValueError, TypeError: as selective_scan_fwd.
)");
}

}  // namespace ssm::bind
