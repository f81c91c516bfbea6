// The front of the selective scan: checks once, then hands canonical views to the chosen kernel.
#include <ssm/selective_scan.h>

#include "check.h"
#include "cuda_kernels.h"
#include "isa.h"
#include "runs.h"

SSM_CPU_KERNEL(selective_scan_fwd, const SelectiveScanArgs&, const Runs&, int)
SSM_CPU_KERNEL(selective_scan_bwd, const SelectiveScanArgs&, const SelectiveScanGrads&, const Runs&,
               int)

namespace ssm {

namespace {

constexpr const char* kOp = "selective_scan";

// B or C as (D, N), or as (B, G, N, L) with a group axis put in where it was left out.
TensorView canonical_input(Checker& check, std::string_view name, TensorView view,
                           const SelectiveScanArgs& args) {
    const std::int64_t batch = args.u.shape[0], dim = args.u.shape[1], seqlen = args.u.shape[2];
    const std::int64_t dstate = args.A.shape[1];
    check.given(name, view);
    if (view.ndim == 2) {
        check.input(name, view, {{"D", dim}, {"N", dstate}});
        return view;
    }
    if (view.ndim == 3) {
        check.input(name, view, {{"B", batch}, {"N", dstate}, {"L", seqlen}});
        view.ndim = 4;
        for (int axis = 3; axis > 1; --axis) {
            view.shape[axis] = view.shape[axis - 1];
            view.stride[axis] = view.stride[axis - 1];
        }
        view.shape[1] = 1;
        return view;
    }
    const std::int64_t groups = view.ndim == 4 ? view.shape[1] : 1;
    check.input(name, view, {{"B", batch}, {"G", groups}, {"N", dstate}, {"L", seqlen}});
    if (groups < 1 || dim % groups != 0)
        check.fail(name, "have a group count that divides D = " + std::to_string(dim),
                   std::to_string(groups));
    return view;
}

/// u, A, B and C, which say how large the problem is.
void check_sizes(Checker& check, SelectiveScanArgs& args) {
    check.rank("u", args.u, 3, "(B, D, L)");
    check.floating("u", args.u);
    check.rank("A", args.A, 2, "(D, N)");
    check.input("A", args.A, {{"D", args.u.shape[1]}, {"N", args.A.shape[1]}});
    args.B = canonical_input(check, "B", args.B, args);
    args.C = canonical_input(check, "C", args.C, args);
}

struct Checked {
    SelectiveScanArgs args;
    std::int64_t num_states;
};

// Checks the inputs in argument order and brings B and C to their canonical form.
// `states` are the arguments of shape (S, D, N), of which the first one given says what S is.
Checked check_inputs(Checker& check, const SelectiveScanArgs& given,
                     std::initializer_list<TensorView> states) {
    SelectiveScanArgs args = given;
    check.rank("u", args.u, 3, "(B, D, L)");
    const Axis batch{"B", args.u.shape[0]}, dim{"D", args.u.shape[1]}, seqlen{"L", args.u.shape[2]};
    check.input("u", args.u, {batch, dim, seqlen});
    (void)cuda_kernels(kOp, args.u.device);  // refuses a device that nothing serves
    check.input("delta", args.delta, {batch, dim, seqlen});
    check.rank("A", args.A, 2, "(D, N)");
    const Axis dstate{"N", args.A.shape[1]};
    check.input("A", args.A, {dim, dstate});
    args.B = canonical_input(check, "B", args.B, args);
    args.C = canonical_input(check, "C", args.C, args);
    check.optional_input("D", args.D, {dim});
    check.optional_input("z", args.z, {batch, dim, seqlen});
    check.optional_input("dt_bias", args.dt_bias, {dim});
    std::int64_t num_states = batch.size;
    if (args.state_per_sequence) {
        check.given("seq_idx", args.seq_idx);
        num_states = RunTable::kAnyNumber;
        for (const TensorView& state : states)
            if (state.ndim == 3) {
                num_states = state.shape[0];
                break;
            }
    }
    check.optional_input("initial_state", args.initial_state, {{"S", num_states}, dim, dstate});
    if (present(args.seq_idx)) check.indices("seq_idx", args.seq_idx, {batch, seqlen});
    return {args, num_states};
}

void check_checkpoints(Checker& check, const SelectiveScanArgs& args) {
    const std::int64_t chunks =
        (args.u.shape[2] + kSelectiveScanCheckpoint - 1) / kSelectiveScanCheckpoint;
    check.input("checkpoints", args.checkpoints,
                {{"B", args.u.shape[0]},
                 {"ceil(L / 32)", chunks},
                 {"N", args.A.shape[1]},
                 {"D", args.u.shape[1]}});
    check.dtype("checkpoints", args.checkpoints,
                args.u.dtype == DType::f64 ? DType::f64 : DType::f32);
    check.contiguous("checkpoints", args.checkpoints);
}

/// What one direction's entry of the table says; 0 on the CPU.
std::int64_t workspace_bytes(SelectiveScanArgs args,
                             std::int64_t (*cuda::Kernels::*entry)(const SelectiveScanArgs&)) {
    Checker check(kOp, args.u.device);
    check_sizes(check, args);
    const auto* gpu = cuda_kernels(kOp, args.u.device);
    return gpu != nullptr ? (gpu->*entry)(args) : 0;
}

}  // namespace

void selective_scan_fwd(const SelectiveScanArgs& given, const Exec& exec) {
    Checker check(kOp, given.u.device);
    const auto [args, num_states] =
        check_inputs(check, given, {given.initial_state, given.last_state});
    const Axis batch{"B", args.u.shape[0]}, dim{"D", args.u.shape[1]}, seqlen{"L", args.u.shape[2]};
    check.output("y", args.y, {batch, dim, seqlen});
    check.optional_carried("last_state", args.last_state,
                           {{"S", num_states}, dim, {"N", args.A.shape[1]}}, "initial_state",
                           args.initial_state);
    if (present(args.checkpoints)) {
        check_checkpoints(check, args);
        check.written("checkpoints", args.checkpoints);
    }
    if (const auto* gpu = cuda_kernels(kOp, args.u.device)) {
        const WithWorkspace with(kOp, exec, args.u.device, gpu->selective_scan_fwd_workspace(args));
        return gpu->selective_scan_fwd(args, num_states, with.exec());
    }
    const RunTable runs(kOp, args.seq_idx, batch.size, seqlen.size, args.state_per_sequence,
                        num_states);
    cpu::selective_scan_fwd.active()(args, runs.view(), thread_count(exec));
}

std::int64_t selective_scan_fwd_workspace(const SelectiveScanArgs& args) {
    return workspace_bytes(args, &cuda::Kernels::selective_scan_fwd_workspace);
}

std::int64_t selective_scan_bwd_workspace(const SelectiveScanArgs& args) {
    return workspace_bytes(args, &cuda::Kernels::selective_scan_bwd_workspace);
}

void selective_scan_bwd(const SelectiveScanArgs& given, const SelectiveScanGrads& grads,
                        const Exec& exec) {
    Checker check(kOp, given.u.device);
    const auto [args, num_states] =
        check_inputs(check, given, {given.initial_state, grads.dlast_state, grads.dinitial_state});
    const Axis batch{"B", args.u.shape[0]}, dim{"D", args.u.shape[1]}, seqlen{"L", args.u.shape[2]};
    const Axis dstate{"N", args.A.shape[1]}, states{"S", num_states};
    check.given("checkpoints", args.checkpoints);
    check_checkpoints(check, args);
    check.input("dy", grads.dy, {batch, dim, seqlen});
    check.optional_input("dlast_state", grads.dlast_state, {states, dim, dstate});
    check.output("du", grads.du, {batch, dim, seqlen});
    check.output("ddelta", grads.ddelta, {batch, dim, seqlen});
    check.output("dA", grads.dA, {dim, dstate});
    SelectiveScanGrads canonical = grads;
    canonical.dB = canonical_input(check, "dB", grads.dB, args);
    canonical.dC = canonical_input(check, "dC", grads.dC, args);
    check.same_shape("dB", canonical.dB, args.B);
    check.same_shape("dC", canonical.dC, args.C);
    check.written("dB", grads.dB);
    check.written("dC", grads.dC);
    if (present(args.D)) check.output("dD", grads.dD, {dim});
    if (present(args.z)) check.output("dz", grads.dz, {batch, dim, seqlen});
    if (present(args.dt_bias)) check.output("ddt_bias", grads.ddt_bias, {dim});
    check.optional_output("dinitial_state", grads.dinitial_state, {states, dim, dstate});
    if (const auto* gpu = cuda_kernels(kOp, args.u.device)) {
        const WithWorkspace with(kOp, exec, args.u.device, gpu->selective_scan_bwd_workspace(args));
        return gpu->selective_scan_bwd(args, canonical, num_states, with.exec());
    }
    const RunTable runs(kOp, args.seq_idx, batch.size, seqlen.size, args.state_per_sequence,
                        num_states);
    cpu::selective_scan_bwd.active()(args, canonical, runs.view(), thread_count(exec));
}

}  // namespace ssm
