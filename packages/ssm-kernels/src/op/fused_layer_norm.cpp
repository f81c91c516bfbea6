// The front of the fused norm: checks once, then hands views with few axes to the chosen kernel.
#include <ssm/fused_layer_norm.h>

#include "cuda_kernels.h"
#include "isa.h"
#include "rows.h"

SSM_CPU_KERNEL(fused_layer_norm_fwd, const FusedLayerNormArgs&, int)
SSM_CPU_KERNEL(fused_layer_norm_bwd, const FusedLayerNormArgs&, const FusedLayerNormGrads&, int)

namespace ssm {

namespace {

constexpr const char* kOp = "fused_layer_norm";

void check_inputs(RowChecker& check, const FusedLayerNormArgs& args) {
    check.main("x");
    const Axis dim{"D", args.x.shape[args.x.ndim - 1]};
    check.input("weight", args.weight, {dim});
    check.optional_input("bias", args.bias, {dim});
    check.optional_like_main("residual", args.residual);
}

}  // namespace

void fused_layer_norm_fwd(const FusedLayerNormArgs& given, const Exec& exec) {
    FusedLayerNormArgs args = given;
    RowChecker check(kOp, given.x);
    check_inputs(check, args);
    check.output_like_main("y", args.y);
    check.optional_like_main("residual_out", args.residual_out);
    if (present(args.residual_out))
        check.carried("residual_out", args.residual_out, "residual", args.residual);
    check.output_statistics(args.mean, args.rstd, args.is_rms, {"M", row_count(args.x)});
    // Written so that NaN is refused as well.
    if (!(args.eps > 0)) check.fail("eps", "be positive", number_text(args.eps));
    for (TensorView* view : {&args.x, &args.residual, &args.y, &args.residual_out})
        *view = merge_rows(*view);
    if (const auto* gpu = cuda_kernels(kOp, args.x.device))
        return gpu->fused_layer_norm_fwd(args, exec);
    cpu::fused_layer_norm_fwd.active()(args, thread_count(exec));
}

void fused_layer_norm_bwd(const FusedLayerNormArgs& given, const FusedLayerNormGrads& given_grads,
                          const Exec& exec) {
    FusedLayerNormArgs args = given;
    FusedLayerNormGrads grads = given_grads;
    RowChecker check(kOp, given.x);
    check_inputs(check, args);
    check.statistics(args.mean, args.rstd, args.is_rms, {"M", row_count(args.x)});
    check.like_main("dy", grads.dy);
    check.optional_like_main("dresidual_out", grads.dresidual_out);
    check.output_like_main("dx", grads.dx);
    check.optional_output_like_main("dresidual", grads.dresidual);
    const Axis dim{"D", args.x.shape[args.x.ndim - 1]};
    check.optional_output("dweight", grads.dweight, {dim});
    check.optional_output("dbias", grads.dbias, {dim});
    for (TensorView* view :
         {&args.x, &args.residual, &grads.dy, &grads.dresidual_out, &grads.dx, &grads.dresidual})
        *view = merge_rows(*view);
    if (const auto* gpu = cuda_kernels(kOp, args.x.device)) {
        const WithWorkspace with(kOp, exec, args.x.device,
                                 gpu->fused_layer_norm_bwd_workspace(args));
        return gpu->fused_layer_norm_bwd(args, grads, with.exec());
    }
    cpu::fused_layer_norm_bwd.active()(args, grads, thread_count(exec));
}

std::int64_t fused_layer_norm_bwd_workspace(const FusedLayerNormArgs& args) {
    RowChecker(kOp, args.x).main("x");
    const auto* gpu = cuda_kernels(kOp, args.x.device);
    return gpu != nullptr ? gpu->fused_layer_norm_bwd_workspace(args) : 0;
}

}  // namespace ssm
