// Python binding of the fused norm.
#include <ssm/fused_layer_norm.h>

#include "tensor_arg.h"

namespace ssm::bind {

using namespace nb::literals;

namespace {

constexpr const char* kOp = "fused_layer_norm";

void forward(const Input& x, const Input& weight, const Input& bias, const Input& residual,
             const Output& y, const Output& residual_out, const Output& mean, const Output& rstd,
             bool is_rms, double eps, int num_threads, std::intptr_t stream) {
    const FusedLayerNormArgs args{.x = view(kOp, "x", x),
                                  .weight = view(kOp, "weight", weight),
                                  .bias = view(kOp, "bias", bias),
                                  .residual = view(kOp, "residual", residual),
                                  .y = view(kOp, "y", y),
                                  .residual_out = view(kOp, "residual_out", residual_out),
                                  .mean = view(kOp, "mean", mean),
                                  .rstd = view(kOp, "rstd", rstd),
                                  .is_rms = is_rms,
                                  .eps = eps};
    const nb::gil_scoped_release unlocked;
    fused_layer_norm_fwd(args, {.num_threads = num_threads, .stream = stream});
}

void backward(const Input& x, const Input& weight, const Input& residual, const Input& mean,
              const Input& rstd, const Input& dy, const Input& dresidual_out, const Output& dx,
              const Output& dresidual, const Output& dweight, const Output& dbias, bool is_rms,
              int num_threads, std::intptr_t stream, const Output& workspace) {
    const FusedLayerNormArgs args{.x = view(kOp, "x", x),
                                  .weight = view(kOp, "weight", weight),
                                  .residual = view(kOp, "residual", residual),
                                  .mean = view(kOp, "mean", mean),
                                  .rstd = view(kOp, "rstd", rstd),
                                  .is_rms = is_rms};
    const FusedLayerNormGrads grads{.dy = view(kOp, "dy", dy),
                                    .dresidual_out = view(kOp, "dresidual_out", dresidual_out),
                                    .dx = view(kOp, "dx", dx),
                                    .dresidual = view(kOp, "dresidual", dresidual),
                                    .dweight = view(kOp, "dweight", dweight),
                                    .dbias = view(kOp, "dbias", dbias)};
    const nb::gil_scoped_release unlocked;
    fused_layer_norm_bwd(args, grads, settings(kOp, num_threads, stream, workspace));
}

}  // namespace

void register_fused_layer_norm(nb::module_& module) {
    const auto none = nb::none();
    module.def("fused_layer_norm_fwd", &forward, "x"_a.none(), "weight"_a.none(), "bias"_a = none,
               "residual"_a = none, nb::kw_only(), "y"_a.none(), "residual_out"_a = none,
               "mean"_a = none, "rstd"_a = none, "is_rms"_a = false, "eps"_a = 1e-5,
               "num_threads"_a = 0, "stream"_a = 0,
               R"(Add the residual, normalise the last axis and write the result.

s = x + residual and y = (s - mean) rstd weight + bias: Ba et al. 2016, arXiv:1607.06450, eq. 4;
without the mean, Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

Args:
    x, residual: (..., D), up to 6 axes, float64 | float32 | bfloat16 | float16 in any mix, any strides.
    weight, bias: (D,).
    y: (..., D). Output; written completely.
    residual_out: (..., D). Output; s rounded to its dtype.
    mean, rstd: (M,), M the number of rows, float64 when x is, else float32. Outputs that
        fused_layer_norm_bwd needs; mean stays None with is_rms.
    is_rms: Divide by the root mean square and leave the mean in.
    eps: Added to the variance; positive.
    num_threads: 0 means the process-wide setting; not used on a GPU.
    stream: handle of the CUDA stream, 0 the legacy default stream; not used on the CPU.

Raises:
    ValueError: a shape, dtype, device or value breaks the contract; the message names the argument.
    TypeError: an argument is not an array with DLPack, or an output is read-only.
)");
    module.def("fused_layer_norm_bwd", &backward, "x"_a.none(), "weight"_a.none(),
               "residual"_a = none, nb::kw_only(), "mean"_a = none, "rstd"_a.none(), "dy"_a.none(),
               "dresidual_out"_a = none, "dx"_a.none(), "dresidual"_a = none, "dweight"_a = none,
               "dbias"_a = none, "is_rms"_a = false, "num_threads"_a = 0, "stream"_a = 0,
               "workspace"_a = none,
               R"(Gradients of fused_layer_norm_fwd.

Args:
    x, residual: as the forward got them; or x the sum s in the compute type and residual None.
    weight: (D,), as in the forward.
    mean, rstd: as the forward wrote them; mean stays None with is_rms.
    dy: (..., D). Gradient of y.
    dresidual_out: (..., D). Gradient of residual_out; zero when None.
    dx: (..., D). Output; the gradient of x and of the residual.
    dresidual: (..., D). Output; the same values, for a residual of another dtype.
    dweight, dbias: (D,). Outputs; not computed when None.
    workspace: contiguous, of the inputs' device, at least fused_layer_norm_bwd_workspace bytes; None
        where these are 0.

Raises:
    ValueError, TypeError: as fused_layer_norm_fwd.
)");
    module.def(
        "fused_layer_norm_bwd_workspace",
        [](const Input& x) { return fused_layer_norm_bwd_workspace({.x = view(kOp, "x", x)}); },
        "x"_a.none(),
        R"(Bytes of working memory of fused_layer_norm_bwd on this input.

Args:
    x: as for fused_layer_norm_bwd. Only its shape, dtype and device are looked at.

Returns:
    Bytes; 0 on the CPU.

Raises:
    ValueError, TypeError: as fused_layer_norm_fwd.
)");
}

}  // namespace ssm::bind
