// Python binding of the step of the causal convolution.
#include <ssm/dw_causal_conv_step.h>

#include "tensor_arg.h"

namespace ssm::bind {

using namespace nb::literals;

namespace {

constexpr const char* kOp = "dw_causal_conv_step";

void forward(const Input& x, const Output& conv_state, const Input& weight, const Input& bias,
             const Input& cache_seqlens, const Input& state_indices, const Output& y, bool silu,
             int num_threads, std::intptr_t stream) {
    const DwCausalConvStepArgs args{.x = view(kOp, "x", x),
                                    .conv_state = view(kOp, "conv_state", conv_state),
                                    .weight = view(kOp, "weight", weight),
                                    .bias = view(kOp, "bias", bias),
                                    .cache_seqlens = view(kOp, "cache_seqlens", cache_seqlens),
                                    .state_indices = view(kOp, "state_indices", state_indices),
                                    .y = view(kOp, "y", y),
                                    .silu = silu};
    const nb::gil_scoped_release unlocked;
    dw_causal_conv_step_fwd(args, {.num_threads = num_threads, .stream = stream});
}

}  // namespace

void register_dw_causal_conv_step(nb::module_& module) {
    const auto none = nb::none();
    module.def("dw_causal_conv_step_fwd", &forward, "x"_a.none(), "conv_state"_a.none(),
               "weight"_a.none(), "bias"_a = none, "cache_seqlens"_a = none,
               "state_indices"_a = none, nb::kw_only(), "y"_a.none(), "silu"_a = false,
               "num_threads"_a = 0, "stream"_a = 0,
               R"(Advance the causal convolution by one token, or a few, and its state in place.

Gu & Dao 2023, arXiv:2312.00752, section 3.4.

Args:
    x: (B, D) or (B, D, T), float64 | float32 | bfloat16 | float16, any strides; so are all arrays
        below but the indices.
    conv_state: (R, D, K), K at least W - 1. The last K inputs; updated.
    weight: (D, W) or (D, 1, W), W at least 1.
    bias: (D,).
    cache_seqlens: (B,) int32. Tokens seen before this call; makes the state a circular buffer in
        which token t lies at (cache_seqlens + t) mod K. Without it the state is shifted.
    state_indices: (B,) int32. Row of conv_state of each batch row, -1 skips it. Without it R = B.
    y: as x. Output; written completely, 0 in skipped rows.
    silu: Apply SiLU.
    num_threads: 0 means the process-wide setting; not used on a GPU.
    stream: handle of the CUDA stream, 0 the legacy default stream; not used on the CPU.

Raises:
    ValueError: a shape, dtype, device or value breaks the contract; the message names the argument.
        Nothing is written then.
    TypeError: an argument is not an array with DLPack, or an output is read-only.
)");
}

}  // namespace ssm::bind
