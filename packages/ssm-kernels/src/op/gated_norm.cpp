// The front of the gated norm: checks once, then hands views with few axes to the chosen kernel.
#include <ssm/gated_norm.h>

#include "cuda_kernels.h"
#include "isa.h"
#include "rows.h"

SSM_CPU_KERNEL(gated_norm_fwd, const GatedNormArgs&, int)
SSM_CPU_KERNEL(gated_norm_bwd, const GatedNormArgs&, const GatedNormGrads&, int)

namespace ssm {

namespace {

constexpr const char* kOp = "gated_norm";

/// Checks x and group_size, puts the size of a group in place of kWholeRow and returns the axis M.
Axis check_sizes(RowChecker& check, GatedNormArgs& args) {
    check.main("x");
    const std::int64_t dim = args.x.shape[args.x.ndim - 1];
    if (args.group_size == kWholeRow) {
        args.group_size = dim;
        return {"M", row_count(args.x)};
    }
    const std::string got = std::to_string(args.group_size);
    if (args.group_size < 1) check.fail("group_size", "be at least 1", got);
    if (dim % args.group_size != 0)
        check.fail("group_size", "divide D = " + std::to_string(dim), got);
    return {"M", row_count(args.x) * (dim / args.group_size)};
}

/// Checks the inputs and returns the axis M.
Axis check_inputs(RowChecker& check, GatedNormArgs& args) {
    check.main("x");
    const Axis dim{"D", args.x.shape[args.x.ndim - 1]};
    check.input("weight", args.weight, {dim});
    check.optional_input("bias", args.bias, {dim});
    check.optional_like_main("z", args.z);
    return check_sizes(check, args);
}

}  // namespace

void gated_norm_fwd(const GatedNormArgs& given, const Exec& exec) {
    GatedNormArgs args = given;
    RowChecker check(kOp, given.x);
    const Axis groups = check_inputs(check, args);
    check.output_like_main("y", args.y);
    check.output_statistics(args.mean, args.rstd, args.is_rms, groups);
    // Written so that NaN is refused as well.
    if (!(args.eps > 0)) check.fail("eps", "be positive", number_text(args.eps));
    for (TensorView* view : {&args.x, &args.z, &args.y}) *view = merge_rows(*view);
    if (const auto* gpu = cuda_kernels(kOp, args.x.device)) return gpu->gated_norm_fwd(args, exec);
    cpu::gated_norm_fwd.active()(args, thread_count(exec));
}

void gated_norm_bwd(const GatedNormArgs& given, const GatedNormGrads& given_grads,
                    const Exec& exec) {
    GatedNormArgs args = given;
    GatedNormGrads grads = given_grads;
    RowChecker check(kOp, given.x);
    const Axis groups = check_inputs(check, args);
    check.statistics(args.mean, args.rstd, args.is_rms, groups);
    check.like_main("dy", grads.dy);
    check.output_like_main("dx", grads.dx);
    if (present(args.z))
        check.output_like_main("dz", grads.dz);
    else if (present(grads.dz))
        check.fail("dz", "be None without z", "an array");
    const Axis dim{"D", args.x.shape[args.x.ndim - 1]};
    check.optional_output("dweight", grads.dweight, {dim});
    check.optional_output("dbias", grads.dbias, {dim});
    for (TensorView* view : {&args.x, &args.z, &grads.dy, &grads.dx, &grads.dz})
        *view = merge_rows(*view);
    if (const auto* gpu = cuda_kernels(kOp, args.x.device)) {
        const WithWorkspace with(kOp, exec, args.x.device, gpu->gated_norm_bwd_workspace(args));
        return gpu->gated_norm_bwd(args, grads, with.exec());
    }
    cpu::gated_norm_bwd.active()(args, grads, thread_count(exec));
}

std::int64_t gated_norm_bwd_workspace(const GatedNormArgs& given) {
    GatedNormArgs args = given;
    RowChecker check(kOp, given.x);
    check_sizes(check, args);
    const auto* gpu = cuda_kernels(kOp, args.x.device);
    return gpu != nullptr ? gpu->gated_norm_bwd_workspace(args) : 0;
}

}  // namespace ssm
