#include <ssm/dw_causal_conv_step.h>

#include "check.h"
#include "cuda_kernels.h"
#include "isa.h"

SSM_CPU_KERNEL(dw_causal_conv_step_fwd, const DwCausalConvStepArgs&, int)

namespace ssm {

namespace {

constexpr const char* kOp = "dw_causal_conv_step";

std::int32_t index_at(const TensorView& view, std::int64_t i) {
    return static_cast<const std::int32_t*>(view.data)[i * view.stride[0]];
}

void check_cache_seqlens(Checker& check, const TensorView& view, std::int64_t batch) {
    check.indices("cache_seqlens", view, {{"B", batch}});
    if (view.device.type != DeviceType::cpu) return;  // reading them would wait for the device
    for (std::int64_t b = 0; b < batch; ++b)
        if (index_at(view, b) < 0)
            check.fail("cache_seqlens", "not be negative", std::to_string(index_at(view, b)));
}

// (B, D) as (B, D, 1).
TensorView with_token_axis(TensorView view) {
    if (view.ndim != 2) return view;
    view.ndim = 3;
    view.shape[2] = 1;
    view.stride[2] = 1;
    return view;
}

}  // namespace

void dw_causal_conv_step_fwd(const DwCausalConvStepArgs& given, const Exec& exec) {
    DwCausalConvStepArgs args = given;
    Checker check(kOp, args.x.device);
    check.given("x", args.x);
    if (args.x.ndim != 2) check.rank("x", args.x, 3, "(B, D) or (B, D, T)");
    const bool several = args.x.ndim == 3;
    const Axis batch{"B", args.x.shape[0]}, dim{"D", args.x.shape[1]};
    const Axis tokens{"T", several ? args.x.shape[2] : 1};
    check.floating("x", args.x);
    check.device("x", args.x);
    check.rank("conv_state", args.conv_state, 3, "(R, D, K)");
    const Axis rows{"R", args.conv_state.shape[0]}, memory{"K", args.conv_state.shape[2]};
    check.output("conv_state", args.conv_state, {rows, dim, memory});
    check.given("weight", args.weight);
    if (args.weight.ndim == 3) {
        check.input("weight", args.weight, {dim, {"1", 1}, {"W", args.weight.shape[2]}});
        args.weight.ndim = 2;
        args.weight.shape[1] = args.weight.shape[2];
        args.weight.stride[1] = args.weight.stride[2];
    } else {
        check.rank("weight", args.weight, 2, "(D, W) or (D, 1, W)");
        check.input("weight", args.weight, {dim, {"W", args.weight.shape[1]}});
    }
    const std::int64_t width = args.weight.shape[1];
    if (width < 1) check.fail("weight", "have a width of at least 1", std::to_string(width));
    if (memory.size < width - 1)
        check.fail("conv_state", "hold at least W - 1 = " + std::to_string(width - 1) + " inputs",
                   std::to_string(memory.size));
    check.optional_input("bias", args.bias, {dim});
    if (present(args.cache_seqlens)) check_cache_seqlens(check, args.cache_seqlens, batch.size);
    if (present(args.state_indices))
        check.state_indices(args.state_indices, batch.size, rows.size);
    else if (rows.size != batch.size)
        check.fail("conv_state",
                   "have B = " + std::to_string(batch.size) + " rows without state_indices",
                   std::to_string(rows.size));
    if (several)
        check.output("y", args.y, {batch, dim, tokens});
    else
        check.output("y", args.y, {batch, dim});
    args.x = with_token_axis(args.x);
    args.y = with_token_axis(args.y);
    if (const auto* gpu = cuda_kernels(kOp, args.x.device))
        return gpu->dw_causal_conv_step_fwd(args, exec);
    cpu::dw_causal_conv_step_fwd.active()(args, thread_count(exec));
}

}  // namespace ssm
