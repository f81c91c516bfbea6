// The front of the state-space dual scan: checks once, then hands the views to the chosen kernel.
#include <ssm/ssd_chunk_scan.h>

#include <cstdio>

#include "check.h"
#include "cuda_kernels.h"
#include "isa.h"
#include "runs.h"

SSM_CPU_KERNEL(ssd_chunk_scan_fwd, const SsdChunkScanArgs&, const Runs&, int)
SSM_CPU_KERNEL(ssd_chunk_scan_bwd, const SsdChunkScanArgs&, const SsdChunkScanGrads&, const Runs&,
               int)

namespace ssm {

namespace {

constexpr const char* kOp = "ssd_chunk_scan";

// The axes that every argument is made of.
struct Axes {
    Axis batch, seqlen, heads, headdim, dstate;
    Axis states;  // S
};

void check_group_input(Checker& check, std::string_view name, const TensorView& view,
                       const Axes& axes) {
    check.given(name, view);
    const Axis groups{"G", view.ndim == 4 ? view.shape[2] : 1};
    check.input(name, view, {axes.batch, axes.seqlen, groups, axes.dstate});
    if (groups.size < 1 || axes.heads.size % groups.size != 0)
        check.fail(name, "have a group count that divides H = " + std::to_string(axes.heads.size),
                   std::to_string(groups.size));
}

std::string number_text(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
}

// Checks the inputs in argument order. `states` are the arguments of shape (S, H, P, N), of which
// the first one given says what S is.
Axes check_inputs(Checker& check, const SsdChunkScanArgs& args,
                  std::initializer_list<TensorView> states) {
    check.rank("X", args.X, 4, "(B, L, H, P)");
    const std::int64_t* const sizes = args.X.shape;
    Axes axes{{"B", sizes[0]}, {"L", sizes[1]}, {"H", sizes[2]},
              {"P", sizes[3]}, {"N", 0},        {"S", sizes[0]}};
    check.input("X", args.X, {axes.batch, axes.seqlen, axes.heads, axes.headdim});
    const auto* gpu = cuda_kernels(kOp, args.X.device);  // refuses a device that nothing serves
    check.input("dt", args.dt, {axes.batch, axes.seqlen, axes.heads});
    check.input("A", args.A, {axes.heads});
    axes.dstate.size = args.B.ndim == 4 ? args.B.shape[3] : 1;
    check_group_input(check, "B", args.B, axes);
    if (gpu != nullptr && axes.dstate.size > kSsdChunkScanGpuStates)
        check.fail("B",
                   "have at most " + std::to_string(kSsdChunkScanGpuStates) + " states on a GPU",
                   std::to_string(axes.dstate.size));
    check_group_input(check, "C", args.C, axes);
    if (args.D.ndim == 2)
        check.input("D", args.D, {axes.heads, axes.headdim});
    else
        check.optional_input("D", args.D, {axes.heads});
    check.optional_input("z", args.z, {axes.batch, axes.seqlen, axes.heads, axes.headdim});
    check.optional_input("dt_bias", args.dt_bias, {axes.heads});
    if (args.state_per_sequence) {
        check.given("seq_idx", args.seq_idx);
        axes.states.size = RunTable::kAnyNumber;
        for (const TensorView& state : states)
            if (state.ndim == 4) {
                axes.states.size = state.shape[0];
                break;
            }
    }
    check.optional_input("initial_states", args.initial_states,
                         {axes.states, axes.heads, axes.headdim, axes.dstate});
    if (present(args.seq_idx)) check.indices("seq_idx", args.seq_idx, {axes.batch, axes.seqlen});
    if (!(args.dt_low <= args.dt_high))
        check.fail("dt_limit", "be (low, high)",
                   "(" + number_text(args.dt_low) + ", " + number_text(args.dt_high) + ")");
    return axes;
}

void check_checkpoints(Checker& check, const SsdChunkScanArgs& args, const Axes& axes) {
    const std::int64_t saved =
        (axes.seqlen.size + kSsdChunkScanCheckpoint - 1) / kSsdChunkScanCheckpoint;
    check.input("checkpoints", args.checkpoints,
                {axes.batch, {"ceil(L / 96)", saved}, axes.heads, axes.dstate, axes.headdim});
    check.dtype("checkpoints", args.checkpoints,
                args.X.dtype == DType::f64 ? DType::f64 : DType::f32);
    check.contiguous("checkpoints", args.checkpoints);
}

/// What one direction's entry of the table says; 0 on the CPU.
std::int64_t workspace_bytes(const SsdChunkScanArgs& args,
                             std::int64_t (*cuda::Kernels::*entry)(const SsdChunkScanArgs&)) {
    Checker check(kOp, args.X.device);
    check.rank("X", args.X, 4, "(B, L, H, P)");
    const Axis batch{"B", args.X.shape[0]}, seqlen{"L", args.X.shape[1]},
        heads{"H", args.X.shape[2]};
    const Axis dstate{"N", args.B.ndim == 4 ? args.B.shape[3] : 1};
    check_group_input(check, "B", args.B, {batch, seqlen, heads, {"P", 0}, dstate, batch});
    check_group_input(check, "C", args.C, {batch, seqlen, heads, {"P", 0}, dstate, batch});
    const auto* gpu = cuda_kernels(kOp, args.X.device);
    return gpu != nullptr ? (gpu->*entry)(args) : 0;
}

}  // namespace

void ssd_chunk_scan_fwd(const SsdChunkScanArgs& args, const Exec& exec) {
    Checker check(kOp, args.X.device);
    const Axes axes = check_inputs(check, args, {args.initial_states, args.final_states});
    check.output("y", args.y, {axes.batch, axes.seqlen, axes.heads, axes.headdim});
    check.optional_carried("final_states", args.final_states,
                           {axes.states, axes.heads, axes.headdim, axes.dstate}, "initial_states",
                           args.initial_states);
    if (present(args.checkpoints)) {
        check_checkpoints(check, args, axes);
        check.written("checkpoints", args.checkpoints);
    }
    if (const auto* gpu = cuda_kernels(kOp, args.X.device)) {
        const WithWorkspace with(kOp, exec, args.X.device, gpu->ssd_chunk_scan_fwd_workspace(args));
        return gpu->ssd_chunk_scan_fwd(args, axes.states.size, with.exec());
    }
    const RunTable runs(kOp, args.seq_idx, axes.batch.size, axes.seqlen.size,
                        args.state_per_sequence, axes.states.size);
    cpu::ssd_chunk_scan_fwd.active()(args, runs.view(), thread_count(exec));
}

std::int64_t ssd_chunk_scan_fwd_workspace(const SsdChunkScanArgs& args) {
    return workspace_bytes(args, &cuda::Kernels::ssd_chunk_scan_fwd_workspace);
}

std::int64_t ssd_chunk_scan_bwd_workspace(const SsdChunkScanArgs& args) {
    return workspace_bytes(args, &cuda::Kernels::ssd_chunk_scan_bwd_workspace);
}

void ssd_chunk_scan_bwd(const SsdChunkScanArgs& args, const SsdChunkScanGrads& grads,
                        const Exec& exec) {
    Checker check(kOp, args.X.device);
    const Axes axes = check_inputs(
        check, args, {args.initial_states, grads.dfinal_states, grads.dinitial_states});
    const auto* gpu = cuda_kernels(kOp, args.X.device);
    if (gpu == nullptr) {
        check.given("checkpoints", args.checkpoints);
        check_checkpoints(check, args, axes);
    }
    check.input("dy", grads.dy, {axes.batch, axes.seqlen, axes.heads, axes.headdim});
    check.optional_input("dfinal_states", grads.dfinal_states,
                         {axes.states, axes.heads, axes.headdim, axes.dstate});
    check.output("dX", grads.dX, {axes.batch, axes.seqlen, axes.heads, axes.headdim});
    check.output("ddt", grads.ddt, {axes.batch, axes.seqlen, axes.heads});
    check.output("dA", grads.dA, {axes.heads});
    check.output("dB", grads.dB, {axes.batch, axes.seqlen, {"G", args.B.shape[2]}, axes.dstate});
    check.output("dC", grads.dC, {axes.batch, axes.seqlen, {"G", args.C.shape[2]}, axes.dstate});
    if (args.D.ndim == 1) check.output("dD", grads.dD, {axes.heads});
    if (args.D.ndim == 2) check.output("dD", grads.dD, {axes.heads, axes.headdim});
    if (present(args.z))
        check.output("dz", grads.dz, {axes.batch, axes.seqlen, axes.heads, axes.headdim});
    if (present(args.dt_bias)) check.output("ddt_bias", grads.ddt_bias, {axes.heads});
    check.optional_output("dinitial_states", grads.dinitial_states,
                          {axes.states, axes.heads, axes.headdim, axes.dstate});
    if (gpu != nullptr) {
        const WithWorkspace with(kOp, exec, args.X.device, gpu->ssd_chunk_scan_bwd_workspace(args));
        return gpu->ssd_chunk_scan_bwd(args, grads, axes.states.size, with.exec());
    }
    const RunTable runs(kOp, args.seq_idx, axes.batch.size, axes.seqlen.size,
                        args.state_per_sequence, axes.states.size);
    cpu::ssd_chunk_scan_bwd.active()(args, grads, runs.view(), thread_count(exec));
}

}  // namespace ssm
