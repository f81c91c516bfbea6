// What the fronts of operators along the last axis share: their checks, and rows with few axes.
#pragma once

#include "check.h"

namespace ssm {

/// Number of rows: the product of all axes but the last.
std::int64_t row_count(const TensorView& view);

/// (..., D) with the leading axes merged where one stride serves both: (M, D) in the common case.
/// The kernels walk what is left, so that no layout needs a copy. What is absent stays absent.
TensorView merge_rows(const TensorView& view);

/// The shortest text that reads back as the same number, as Python spells it.
std::string number_text(double value);

/// Checks of arguments (..., D) that have the shape of the main input.
class RowChecker : public Checker {
  public:
    RowChecker(std::string_view op, const TensorView& main)
        : Checker(op, main.device), op_(op), main_(main) {}

    void main(std::string_view name);
    void like_main(std::string_view name, const TensorView& view);
    void like(std::string_view name, const TensorView& view, const TensorView& other);
    void optional_like_main(std::string_view name, const TensorView& view);
    void output_like_main(std::string_view name, const TensorView& view);
    void optional_output_like_main(std::string_view name, const TensorView& view);
    /// What a norm's forward gives where it is wanted, in the compute type; with is_rms no mean.
    void output_statistics(const TensorView& mean, const TensorView& rstd, bool is_rms, Axis axis);
    /// The same, as the backward takes it.
    void statistics(const TensorView& mean, const TensorView& rstd, bool is_rms, Axis axis);

  private:
    void refuse_mean(const TensorView& mean, bool is_rms) const;
    void statistic(std::string_view name, const TensorView& view, Axis axis);

    std::string_view op_;
    const TensorView& main_;
};

}  // namespace ssm
