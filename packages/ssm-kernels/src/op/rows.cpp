#include "rows.h"

#include <charconv>

namespace ssm {

std::int64_t row_count(const TensorView& x) {
    std::int64_t rows = 1;
    for (int axis = 0; axis + 1 < x.ndim; ++axis) rows *= x.shape[axis];
    return rows;
}

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

std::string number_text(double value) {
    char digits[32];
    std::string text(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
    return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
}

void RowChecker::main(std::string_view name) {
    given(name, main_);
    if (main_.ndim < 1) fail(name, "have shape (..., D)", "()");
    floating(name, main_);
    device(name, main_);
}

void RowChecker::like_main(std::string_view name, const TensorView& view) {
    like(name, view, main_);
}

void RowChecker::like(std::string_view name, const TensorView& view, const TensorView& other) {
    given(name, view);
    if (!has_shape_of(view, other))
        fail(name, "have shape (..., D) = " + shape_text(other), shape_text(view));
    floating(name, view);
    device(name, view);
}

void RowChecker::optional_like_main(std::string_view name, const TensorView& view) {
    if (present(view)) like_main(name, view);
}

void RowChecker::output_like_main(std::string_view name, const TensorView& view) {
    like_main(name, view);
    written(name, view);
}

void RowChecker::optional_output_like_main(std::string_view name, const TensorView& view) {
    if (present(view)) output_like_main(name, view);
}

void RowChecker::statistic(std::string_view name, const TensorView& view, Axis axis) {
    input(name, view, {axis});
    dtype(name, view, main_.dtype == DType::f64 ? DType::f64 : DType::f32);
}

void RowChecker::refuse_mean(const TensorView& mean, bool is_rms) const {
    if (is_rms && present(mean)) fail("mean", "be None with is_rms", "an array");
}

void RowChecker::output_statistics(const TensorView& mean, const TensorView& rstd, bool is_rms,
                                   Axis axis) {
    refuse_mean(mean, is_rms);
    const auto optional = [&](std::string_view name, const TensorView& view) {
        if (!present(view)) return;
        statistic(name, view, axis);
        written(name, view);
    };
    optional("mean", mean);
    optional("rstd", rstd);
}

void RowChecker::statistics(const TensorView& mean, const TensorView& rstd, bool is_rms,
                            Axis axis) {
    refuse_mean(mean, is_rms);
    if (!is_rms) statistic("mean", mean, axis);
    statistic("rstd", rstd, axis);
}

}  // namespace ssm
