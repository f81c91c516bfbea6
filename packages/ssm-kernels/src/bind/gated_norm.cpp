// Python binding of the gated norm.
#include <nanobind/stl/optional.h>
#include <ssm/gated_norm.h>

#include "tensor_arg.h"

namespace ssm::bind {

using namespace nb::literals;

namespace {

constexpr const char* kOp = "gated_norm";

void forward(const Input& x, const Input& weight, const Input& bias, const Input& z,
             const Output& y, const Output& mean, const Output& rstd, bool is_rms, double eps,
             std::optional<std::int64_t> group_size, bool norm_before_gate, int num_threads,
             std::intptr_t stream) {
    const GatedNormArgs args{.x = view(kOp, "x", x),
                             .weight = view(kOp, "weight", weight),
                             .bias = view(kOp, "bias", bias),
                             .z = view(kOp, "z", z),
                             .y = view(kOp, "y", y),
                             .mean = view(kOp, "mean", mean),
                             .rstd = view(kOp, "rstd", rstd),
                             .is_rms = is_rms,
                             .eps = eps,
                             .group_size = group_size.value_or(kWholeRow),
                             .norm_before_gate = norm_before_gate};
    const nb::gil_scoped_release unlocked;
    gated_norm_fwd(args, {.num_threads = num_threads, .stream = stream});
}

void backward(const Input& x, const Input& weight, const Input& bias, const Input& z,
              const Input& mean, const Input& rstd, const Input& dy, const Output& dx,
              const Output& dz, const Output& dweight, const Output& dbias, bool is_rms,
              std::optional<std::int64_t> group_size, bool norm_before_gate, int num_threads,
              std::intptr_t stream, const Output& workspace) {
    const GatedNormArgs args{.x = view(kOp, "x", x),
                             .weight = view(kOp, "weight", weight),
                             .bias = view(kOp, "bias", bias),
                             .z = view(kOp, "z", z),
                             .mean = view(kOp, "mean", mean),
                             .rstd = view(kOp, "rstd", rstd),
                             .is_rms = is_rms,
                             .group_size = group_size.value_or(kWholeRow),
                             .norm_before_gate = norm_before_gate};
    const GatedNormGrads grads{.dy = view(kOp, "dy", dy),
                               .dx = view(kOp, "dx", dx),
                               .dz = view(kOp, "dz", dz),
                               .dweight = view(kOp, "dweight", dweight),
                               .dbias = view(kOp, "dbias", dbias)};
    const nb::gil_scoped_release unlocked;
    gated_norm_bwd(args, grads, settings(kOp, num_threads, stream, workspace));
}

}  // namespace

void register_gated_norm(nb::module_& module) {
    const auto none = nb::none();
    module.def("gated_norm_fwd", &forward, "x"_a.none(), "weight"_a.none(), "bias"_a = none,
               "z"_a = none, nb::kw_only(), "y"_a.none(), "mean"_a = none, "rstd"_a = none,
               "is_rms"_a = true, "eps"_a = 1e-5, "group_size"_a = none,
               "norm_before_gate"_a = true, "num_threads"_a = 0, "stream"_a = 0,
               R"(Normalise groups of the last axis, multiply by silu(z) and write the result.

y = (n(x) weight + bias) silu(z), or y = n(x silu(z)) weight + bias: Dao & Gu 2024,
arXiv:2405.21060, section 7.1; n is RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4) or
LayerNorm (Ba et al. 2016, arXiv:1607.06450, eq. 4).

Args:
    x, z: (..., D), up to 6 axes, float64 | float32 | bfloat16 | float16 in any mix, any strides.
    weight, bias: (D,).
    y: (..., D). Output; written completely.
    mean, rstd: (M,), M the number of rows times that of groups, float64 when x is, else float32.
        Outputs that gated_norm_bwd needs; mean stays None with is_rms.
    is_rms: Divide by the root mean square and leave the mean in.
    eps: Added to the variance; positive.
    group_size: Channels that share their statistics; divides D. None takes all.
    norm_before_gate: Gate what was normalised instead of normalising what was gated.
    num_threads: 0 means the process-wide setting; not used on a GPU.
    stream: handle of the CUDA stream, 0 the legacy default stream; not used on the CPU.

Raises:
    ValueError: a shape, dtype, device or value breaks the contract; the message names the argument.
    TypeError: an argument is not an array with DLPack, or an output is read-only.
)");
    module.def("gated_norm_bwd", &backward, "x"_a.none(), "weight"_a.none(), "bias"_a = none,
               "z"_a = none, nb::kw_only(), "mean"_a = none, "rstd"_a.none(), "dy"_a.none(),
               "dx"_a.none(), "dz"_a = none, "dweight"_a = none, "dbias"_a = none,
               "is_rms"_a = true, "group_size"_a = none, "norm_before_gate"_a = true,
               "num_threads"_a = 0, "stream"_a = 0, "workspace"_a = none,
               R"(Gradients of gated_norm_fwd.

Args:
    x, weight, bias, z, is_rms, group_size, norm_before_gate: as the forward got them.
    mean, rstd: as the forward wrote them; mean stays None with is_rms.
    dy: (..., D). Gradient of y.
    dx, dz: (..., D). Outputs; dz stays None without z.
    dweight, dbias: (D,). Outputs; not computed when None.
    workspace: contiguous, of the inputs' device, at least gated_norm_bwd_workspace bytes; None where
        these are 0.

Raises:
    ValueError, TypeError: as gated_norm_fwd.
)");
    module.def(
        "gated_norm_bwd_workspace",
        [](const Input& x, std::optional<std::int64_t> group_size) {
            return gated_norm_bwd_workspace(
                {.x = view(kOp, "x", x), .group_size = group_size.value_or(kWholeRow)});
        },
        "x"_a.none(), "group_size"_a = none,
        R"(Bytes of working memory of gated_norm_bwd on this input.

Args:
    x, group_size: as for gated_norm_bwd. Of x only shape, dtype and device are looked at.

Returns:
    Bytes; 0 on the CPU.

Raises:
    ValueError, TypeError: as gated_norm_fwd.
)");
}

}  // namespace ssm::bind
