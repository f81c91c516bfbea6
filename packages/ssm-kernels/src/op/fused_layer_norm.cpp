// The front of the fused norm: checks once, then hands views with few axes to the chosen kernel.
#include <ssm/fused_layer_norm.h>

#include <charconv>

#include "check.h"
#include "isa.h"

SSM_CPU_KERNEL(fused_layer_norm_fwd, const FusedLayerNormArgs&, int)
SSM_CPU_KERNEL(fused_layer_norm_bwd, const FusedLayerNormArgs&, const FusedLayerNormGrads&, int)

namespace ssm {

namespace {

constexpr const char* kOp = "fused_layer_norm";

std::int64_t row_count(const TensorView& x) {
    std::int64_t rows = 1;
    for (int axis = 0; axis + 1 < x.ndim; ++axis) rows *= x.shape[axis];
    return rows;
}

// (..., D) with the leading axes merged where one stride serves both: (M, D) in the common case.
// The kernels walk what is left, so that no layout needs a copy.
TensorView merge_rows(const TensorView& view) {
    if (!present(view)) return view;
    TensorView merged = view;
    merged.ndim = 1;
    merged.shape[0] = 1;
    merged.stride[0] = 0;
    for (int axis = 0; axis + 1 < view.ndim; ++axis) {
        if (view.shape[axis] == 1) continue;
        const int last = merged.ndim - 1;
        if (merged.shape[last] == 1) {
            merged.shape[last] = view.shape[axis];
            merged.stride[last] = view.stride[axis];
        } else if (merged.stride[last] == view.shape[axis] * view.stride[axis]) {
            merged.shape[last] *= view.shape[axis];
            merged.stride[last] = view.stride[axis];
        } else {
            merged.shape[merged.ndim] = view.shape[axis];
            merged.stride[merged.ndim] = view.stride[axis];
            ++merged.ndim;
        }
    }
    merged.shape[merged.ndim] = view.shape[view.ndim - 1];
    merged.stride[merged.ndim] = view.stride[view.ndim - 1];
    ++merged.ndim;
    return merged;
}

// The shortest text that reads back as the same number, as Python spells it.
std::string number_text(double value) {
    char digits[32];
    std::string text(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
    return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
}

class NormChecker : public Checker {
  public:
    explicit NormChecker(const TensorView& x) : Checker(kOp, x.device), x_(x) {}

    void like_x(std::string_view name, const TensorView& view) const {
        given(name, view);
        bool same = view.ndim == x_.ndim;
        for (int i = 0; same && i < view.ndim; ++i) same = view.shape[i] == x_.shape[i];
        if (!same) fail(name, "have shape (..., D) = " + shape_text(x_), shape_text(view));
        floating(name, view);
        device(name, view);
    }
    void optional_like_x(std::string_view name, const TensorView& view) const {
        if (present(view)) like_x(name, view);
    }
    void output_like_x(std::string_view name, const TensorView& view) const {
        like_x(name, view);
        no_overlap(name, view);
    }
    void optional_output_like_x(std::string_view name, const TensorView& view) const {
        if (present(view)) output_like_x(name, view);
    }
    /// One value per row in the compute type.
    void statistic(std::string_view name, const TensorView& view) const {
        output(name, view, {{"M", row_count(x_)}});
        dtype(name, view, x_.dtype == DType::f64 ? DType::f64 : DType::f32);
    }

  private:
    const TensorView& x_;
};

void check_inputs(const NormChecker& check, const FusedLayerNormArgs& args) {
    check.given("x", args.x);
    if (args.x.ndim < 1) check.fail("x", "have shape (..., D)", "()");
    check.floating("x", args.x);
    check_device_served(kOp, args.x.device);
    check.device("x", args.x);
    const Axis dim{"D", args.x.shape[args.x.ndim - 1]};
    check.input("weight", args.weight, {dim});
    check.optional_input("bias", args.bias, {dim});
    check.optional_like_x("residual", args.residual);
}

}  // namespace

void fused_layer_norm_fwd(const FusedLayerNormArgs& given, const Exec& exec) {
    FusedLayerNormArgs args = given;
    const NormChecker check(given.x);
    check_inputs(check, args);
    check.output_like_x("y", args.y);
    check.optional_output_like_x("residual_out", args.residual_out);
    if (present(args.mean)) {
        if (args.is_rms) check.fail("mean", "be None with is_rms", "an array");
        check.statistic("mean", args.mean);
    }
    if (present(args.rstd)) check.statistic("rstd", args.rstd);
    // Written so that NaN is refused as well.
    if (!(args.eps > 0)) check.fail("eps", "be positive", number_text(args.eps));
    for (TensorView* view : {&args.x, &args.residual, &args.y, &args.residual_out})
        *view = merge_rows(*view);
    cpu::fused_layer_norm_fwd.active()(args, thread_count(exec));
}

void fused_layer_norm_bwd(const FusedLayerNormArgs& given, const FusedLayerNormGrads& given_grads,
                          const Exec& exec) {
    FusedLayerNormArgs args = given;
    FusedLayerNormGrads grads = given_grads;
    const NormChecker check(given.x);
    check_inputs(check, args);
    if (args.is_rms) {
        if (present(args.mean)) check.fail("mean", "be None with is_rms", "an array");
    } else {
        check.given("mean", args.mean);
        check.statistic("mean", args.mean);
    }
    check.given("rstd", args.rstd);
    check.statistic("rstd", args.rstd);
    check.like_x("dy", grads.dy);
    check.optional_like_x("dresidual_out", grads.dresidual_out);
    check.output_like_x("dx", grads.dx);
    check.optional_output_like_x("dresidual", grads.dresidual);
    const Axis dim{"D", args.x.shape[args.x.ndim - 1]};
    check.optional_output("dweight", grads.dweight, {dim});
    check.optional_output("dbias", grads.dbias, {dim});
    for (TensorView* view :
         {&args.x, &args.residual, &grads.dy, &grads.dresidual_out, &grads.dx, &grads.dresidual})
        *view = merge_rows(*view);
    cpu::fused_layer_norm_bwd.active()(args, grads, thread_count(exec));
}

}  // namespace ssm
