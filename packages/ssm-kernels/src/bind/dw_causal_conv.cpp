// Python binding of the causal convolution.
#include <ssm/dw_causal_conv.h>

#include "tensor_arg.h"

namespace ssm::bind {

using namespace nb::literals;

namespace {

constexpr const char* kOp = "dw_causal_conv";

DwCausalConvArgs inputs(const Input& x, const Input& weight, const Input& bias,
                        const Input& initial_state, const Input& seq_idx, bool silu,
                        bool state_per_sequence) {
    return {.x = view(kOp, "x", x),
            .weight = view(kOp, "weight", weight),
            .bias = view(kOp, "bias", bias),
            .initial_state = view(kOp, "initial_state", initial_state),
            .seq_idx = view(kOp, "seq_idx", seq_idx),
            .silu = silu,
            .state_per_sequence = state_per_sequence};
}

void forward(const Input& x, const Input& weight, const Input& bias, const Input& initial_state,
             const Input& seq_idx, const Output& y, const Output& final_state, bool silu,
             bool state_per_sequence, int num_threads, std::intptr_t stream) {
    DwCausalConvArgs args =
        inputs(x, weight, bias, initial_state, seq_idx, silu, state_per_sequence);
    args.y = view(kOp, "y", y);
    args.final_state = view(kOp, "final_state", final_state);
    const nb::gil_scoped_release unlocked;
    dw_causal_conv_fwd(args, {.num_threads = num_threads, .stream = stream});
}

void backward(const Input& x, const Input& weight, const Input& bias, const Input& initial_state,
              const Input& seq_idx, const Input& dy, const Input& dfinal_state, const Output& dx,
              const Output& dweight, const Output& dbias, const Output& dinitial_state, bool silu,
              bool state_per_sequence, int num_threads, std::intptr_t stream,
              const Output& workspace) {
    const DwCausalConvArgs args =
        inputs(x, weight, bias, initial_state, seq_idx, silu, state_per_sequence);
    const DwCausalConvGrads grads{.dy = view(kOp, "dy", dy),
                                  .dfinal_state = view(kOp, "dfinal_state", dfinal_state),
                                  .dx = view(kOp, "dx", dx),
                                  .dweight = view(kOp, "dweight", dweight),
                                  .dbias = view(kOp, "dbias", dbias),
                                  .dinitial_state = view(kOp, "dinitial_state", dinitial_state)};
    const nb::gil_scoped_release unlocked;
    dw_causal_conv_bwd(args, grads, settings(kOp, num_threads, stream, workspace));
}

}  // namespace

void register_dw_causal_conv(nb::module_& module) {
    const auto none = nb::none();
    module.def("dw_causal_conv_fwd", &forward, "x"_a.none(), "weight"_a.none(), "bias"_a = none,
               "initial_state"_a = none, "seq_idx"_a = none, nb::kw_only(), "y"_a.none(),
               "final_state"_a = none, "silu"_a = false, "state_per_sequence"_a = false,
               "num_threads"_a = 0, "stream"_a = 0,
               R"(Convolve every channel with its own causal filter.

y_t = act(bias + sum_k weight_k x_{t-(W-1)+k}), act = SiLU or identity: Gu & Dao 2023,
arXiv:2312.00752, section 3.4.

Args:
    x: (B, D, L), float64 | float32 | bfloat16 | float16, any strides; so are all arrays below.
    weight: (D, W) or (D, 1, W), W at least 1.
    bias: (D,).
    initial_state: (S, D, W - 1). Inputs before the first step, oldest first; zero when None.
    seq_idx: (B, L) int32. Equal neighbours belong to one sequence, -1 skips a step.
    y: (B, D, L). Output; written completely, 0 in skipped steps.
    final_state: (S, D, W - 1). Output; the last inputs of each sequence.
    silu: Apply SiLU.
    state_per_sequence: States belong to the sequence numbers of seq_idx; otherwise S = B.
    num_threads: 0 means the process-wide setting; not used on a GPU.
    stream: handle of the CUDA stream, 0 the legacy default stream; not used on the CPU.

Raises:
    ValueError: a shape, dtype, device or value breaks the contract; the message names the argument.
    TypeError: an argument is not an array with DLPack, or an output is read-only.
)");
    module.def("dw_causal_conv_bwd", &backward, "x"_a.none(), "weight"_a.none(), "bias"_a = none,
               "initial_state"_a = none, "seq_idx"_a = none, nb::kw_only(), "dy"_a.none(),
               "dfinal_state"_a = none, "dx"_a.none(), "dweight"_a.none(), "dbias"_a = none,
               "dinitial_state"_a = none, "silu"_a = false, "state_per_sequence"_a = false,
               "num_threads"_a = 0, "stream"_a = 0, "workspace"_a = none,
               R"(Gradients of dw_causal_conv_fwd; the inputs are the ones the forward got.

Args:
    dy: (B, D, L). Gradient of y; not read in skipped steps.
    dfinal_state: (S, D, W - 1). Gradient of final_state; zero when None.
    dx, dweight, dbias, dinitial_state: outputs shaped like their inputs. dbias is needed where bias
        was given; dinitial_state is optional.
    workspace: contiguous, of the inputs' device, at least dw_causal_conv_bwd_workspace bytes; None
        where these are 0.

Raises:
    ValueError, TypeError: as dw_causal_conv_fwd.
)");
    module.def(
        "dw_causal_conv_bwd_workspace",
        [](const Input& x, const Input& weight, const Input& dy, const Output& dx) {
            return dw_causal_conv_bwd_workspace(
                {.x = view(kOp, "x", x), .weight = view(kOp, "weight", weight)},
                {.dy = view(kOp, "dy", dy), .dx = view(kOp, "dx", dx)});
        },
        "x"_a.none(), "weight"_a.none(), "dy"_a.none(), "dx"_a.none(),
        R"(Bytes of working memory of dw_causal_conv_bwd on these inputs.

Args:
    x, weight, dy, dx: as for dw_causal_conv_bwd. Only shapes, strides, dtypes, addresses and
        devices are looked at.

Returns:
    Bytes; 0 on the CPU.

Raises:
    ValueError, TypeError: as dw_causal_conv_fwd.
)");
}

}  // namespace ssm::bind
