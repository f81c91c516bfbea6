// The front of the SwiGLU activation: checks once, then hands two halves with few axes to the
// chosen kernel.
#include <ssm/swiglu.h>

#include "cuda_kernels.h"
#include "isa.h"
#include "rows.h"

SSM_CPU_KERNEL(swiglu_fwd, const SwigluArgs&, int)
SSM_CPU_KERNEL(swiglu_bwd, const SwigluArgs&, const SwigluGrads&, int)

namespace ssm {

namespace {

constexpr const char* kOp = "swiglu";

/// The first or the second half of the last axis.
TensorView half_of(const TensorView& packed, int which) {
    TensorView half = packed;
    const int last = packed.ndim - 1;
    half.shape[last] = packed.shape[last] / 2;
    half.data = static_cast<char*>(packed.data) +
                which * half.shape[last] * packed.stride[last] * element_bytes(packed.dtype);
    return half;
}

/// Checks gate and up; makes two halves of a packed gate.
void check_inputs(RowChecker& check, SwigluArgs& args) {
    check.main("gate");
    if (present(args.up)) return check.like_main("up", args.up);
    const std::int64_t width = args.gate.shape[args.gate.ndim - 1];
    if (width % 2 != 0)
        check.fail("gate", "have an even last axis without up", std::to_string(width));
    args.up = half_of(args.gate, 1);
    args.gate = half_of(args.gate, 0);
}

/// Brings views of one shape to as few axes as all of them allow, at best to one row.
void merge(std::initializer_list<TensorView*> views) {
    bool is_dense = true;
    for (TensorView* view : views) {
        *view = merge_rows(*view);
        const int last = view->ndim - 1;
        is_dense = is_dense && view->ndim == 2 && view->stride[last] == 1 &&
                   (view->shape[0] == 1 || view->stride[0] == view->shape[last]);
    }
    if (!is_dense) return;
    for (TensorView* view : views) {
        view->shape[1] *= view->shape[0];
        view->shape[0] = 1;
    }
}

}  // namespace

void swiglu_fwd(const SwigluArgs& given, const Exec& exec) {
    SwigluArgs args = given;
    RowChecker check(kOp, given.gate);
    check_inputs(check, args);
    check.like("y", args.y, args.gate);
    check.written("y", args.y);
    merge({&args.gate, &args.up, &args.y});
    if (const auto* gpu = cuda_kernels(kOp, args.gate.device)) return gpu->swiglu_fwd(args, exec);
    cpu::swiglu_fwd.active()(args, thread_count(exec));
}

void swiglu_bwd(const SwigluArgs& given, const SwigluGrads& given_grads, const Exec& exec) {
    SwigluArgs args = given;
    SwigluGrads grads = given_grads;
    RowChecker check(kOp, given.gate);
    check_inputs(check, args);
    check.like("dy", grads.dy, args.gate);
    check.output_like_main("dgate", grads.dgate);
    if (present(given.up)) {
        check.output_like_main("dup", grads.dup);
    } else {
        if (present(grads.dup)) check.fail("dup", "be None without up", "an array");
        grads.dup = half_of(grads.dgate, 1);
        grads.dgate = half_of(grads.dgate, 0);
    }
    merge({&args.gate, &args.up, &grads.dy, &grads.dgate, &grads.dup});
    if (const auto* gpu = cuda_kernels(kOp, args.gate.device))
        return gpu->swiglu_bwd(args, grads, exec);
    cpu::swiglu_bwd.active()(args, grads, thread_count(exec));
}

}  // namespace ssm
