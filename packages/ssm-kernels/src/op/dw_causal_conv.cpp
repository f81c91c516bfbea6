#include <ssm/dw_causal_conv.h>

#include "check.h"
#include "cuda_kernels.h"
#include "isa.h"
#include "runs.h"

SSM_CPU_KERNEL(dw_causal_conv_fwd, const DwCausalConvArgs&, const Runs&, int)
SSM_CPU_KERNEL(dw_causal_conv_bwd, const DwCausalConvArgs&, const DwCausalConvGrads&, const Runs&,
               int)

namespace ssm {

namespace {

constexpr const char* kOp = "dw_causal_conv";

// The filter as (D, W).
TensorView without_middle_axis(TensorView weight) {
    if (weight.ndim != 3) return weight;
    weight.ndim = 2;
    weight.shape[1] = weight.shape[2];
    weight.stride[1] = weight.stride[2];
    return weight;
}

TensorView canonical_weight(Checker& check, const DwCausalConvArgs& args) {
    const Axis dim{"D", args.x.shape[1]};
    check.given("weight", args.weight);
    if (args.weight.ndim == 3) {
        check.input("weight", args.weight, {dim, {"1", 1}, {"W", args.weight.shape[2]}});
    } else {
        check.rank("weight", args.weight, 2, "(D, W) or (D, 1, W)");
        check.input("weight", args.weight, {dim, {"W", args.weight.shape[1]}});
    }
    const TensorView weight = without_middle_axis(args.weight);
    if (weight.shape[1] < 1)
        check.fail("weight", "have a width of at least 1", std::to_string(weight.shape[1]));
    return weight;
}

struct Checked {
    DwCausalConvArgs args;
    std::int64_t num_states;
    Axis batch, dim, seqlen, states, memory;
};

// Checks the inputs in argument order. `states` are the arguments of shape (S, D, W - 1), of which
// the first one given says what S is.
Checked check_inputs(Checker& check, const DwCausalConvArgs& given,
                     std::initializer_list<TensorView> states) {
    DwCausalConvArgs args = given;
    check.rank("x", args.x, 3, "(B, D, L)");
    const Axis batch{"B", args.x.shape[0]}, dim{"D", args.x.shape[1]}, seqlen{"L", args.x.shape[2]};
    check.input("x", args.x, {batch, dim, seqlen});
    args.weight = canonical_weight(check, args);
    const std::int64_t width = args.weight.shape[1];
    check.optional_input("bias", args.bias, {dim});
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
    const Axis count{"S", num_states}, memory{"W - 1", width - 1};
    check.optional_input("initial_state", args.initial_state, {count, dim, memory});
    if (present(args.seq_idx)) check.indices("seq_idx", args.seq_idx, {batch, seqlen});
    return {args, num_states, batch, dim, seqlen, count, memory};
}

}  // namespace

void dw_causal_conv_fwd(const DwCausalConvArgs& given, const Exec& exec) {
    Checker check(kOp, given.x.device);
    const Checked in = check_inputs(check, given, {given.initial_state, given.final_state});
    check.output("y", in.args.y, {in.batch, in.dim, in.seqlen});
    check.optional_carried("final_state", in.args.final_state, {in.states, in.dim, in.memory},
                           "initial_state", in.args.initial_state);
    if (const auto* gpu = cuda_kernels(kOp, in.args.x.device))
        return gpu->dw_causal_conv_fwd(in.args, in.num_states, exec);
    const RunTable runs(kOp, in.args.seq_idx, in.batch.size, in.seqlen.size,
                        in.args.state_per_sequence, in.num_states);
    cpu::dw_causal_conv_fwd.active()(in.args, runs.view(), thread_count(exec));
}

void dw_causal_conv_bwd(const DwCausalConvArgs& given, const DwCausalConvGrads& given_grads,
                        const Exec& exec) {
    DwCausalConvGrads grads = given_grads;
    Checker check(kOp, given.x.device);
    const Checked in =
        check_inputs(check, given, {given.initial_state, grads.dfinal_state, grads.dinitial_state});
    check.input("dy", grads.dy, {in.batch, in.dim, in.seqlen});
    check.optional_input("dfinal_state", grads.dfinal_state, {in.states, in.dim, in.memory});
    check.output("dx", grads.dx, {in.batch, in.dim, in.seqlen});
    check.given("dweight", grads.dweight);
    check.same_shape("dweight", grads.dweight, given.weight);
    grads.dweight = without_middle_axis(grads.dweight);
    check.output("dweight", grads.dweight, {in.dim, {"W", in.args.weight.shape[1]}});
    if (present(in.args.bias)) check.output("dbias", grads.dbias, {in.dim});
    check.optional_output("dinitial_state", grads.dinitial_state, {in.states, in.dim, in.memory});
    if (const auto* gpu = cuda_kernels(kOp, in.args.x.device)) {
        const WithWorkspace with(kOp, exec, in.args.x.device,
                                 gpu->dw_causal_conv_bwd_workspace(in.args, grads));
        return gpu->dw_causal_conv_bwd(in.args, grads, in.num_states, with.exec());
    }
    const RunTable runs(kOp, in.args.seq_idx, in.batch.size, in.seqlen.size,
                        in.args.state_per_sequence, in.num_states);
    cpu::dw_causal_conv_bwd.active()(in.args, grads, runs.view(), thread_count(exec));
}

std::int64_t dw_causal_conv_bwd_workspace(const DwCausalConvArgs& given,
                                          const DwCausalConvGrads& grads) {
    DwCausalConvArgs args = given;
    Checker check(kOp, args.x.device);
    check.rank("x", args.x, 3, "(B, D, L)");
    check.floating("x", args.x);
    args.weight = canonical_weight(check, args);
    const Axis batch{"B", args.x.shape[0]}, dim{"D", args.x.shape[1]}, seqlen{"L", args.x.shape[2]};
    check.input("dy", grads.dy, {batch, dim, seqlen});
    check.input("dx", grads.dx, {batch, dim, seqlen});
    const auto* gpu = cuda_kernels(kOp, args.x.device);
    return gpu != nullptr ? gpu->dw_causal_conv_bwd_workspace(args, grads) : 0;
}

}  // namespace ssm
