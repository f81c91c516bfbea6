#include "vmath.h"

#include <cstring>

#include "check.h"
#include "isa.h"

SSM_CPU_KERNEL(vmath, int, const TensorView&, const TensorView&)

namespace ssm {

void vmath(const char* function, const TensorView& x, const TensorView& y) {
    constexpr const char* kFunctions[] = {"exp2",     "exp_bounded", "log1p_unit",
                                          "softplus", "sigmoid",     "silu"};
    Checker check("vmath", x.device);
    check.rank("x", x, 1, "(n,)");
    check.output("y", y, {{"n", x.shape[0]}});
    check.contiguous("x", x);
    check.contiguous("y", y);
    if (x.dtype != DType::f32 && x.dtype != DType::f64)
        check.fail("x", "have dtype float32 or float64", dtype_name(x.dtype));
    check.dtype("y", y, x.dtype);
    for (int i = 0; i < 6; ++i)
        if (std::strcmp(function, kFunctions[i]) == 0) return cpu::vmath.active()(i, x, y);
    check.fail("function", "be one of the vector functions", function);
}

}  // namespace ssm
