// The vector functions of the active instruction set, for the tests that measure their error.
#pragma once

#include <ssm/tensor.h>

namespace ssm {

/// y[i] = function(x[i]) for contiguous one-dimensional f32 or f64 arrays of one length.
void vmath(const char* function, const TensorView& x, const TensorView& y);

}  // namespace ssm
