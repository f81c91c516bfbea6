// The front of the five stages: checks once, then hands canonical views to the chosen kernel.
#include <ssm/ssd_stages.h>

#include <numeric>
#include <vector>

#include "check.h"
#include "cuda_kernels.h"
#include "isa.h"
#include "rows.h"
#include "runs.h"

SSM_CPU_KERNEL(ssd_chunk_cumsum_fwd, const SsdChunkCumsumArgs&, int)
SSM_CPU_KERNEL(ssd_chunk_state_fwd, const SsdChunkStateArgs&, const std::int64_t*, int)
SSM_CPU_KERNEL(ssd_state_passing_fwd, const SsdStatePassingArgs&, const std::int64_t*, int)
SSM_CPU_KERNEL(ssd_bmm_chunk_fwd, const SsdBmmChunkArgs&, int)
SSM_CPU_KERNEL(ssd_chunk_output_fwd, const SsdChunkOutputArgs&, const std::int64_t*, int)
SSM_CPU_KERNEL(ssd_chunk_cumsum_bwd, const SsdChunkCumsumArgs&, const SsdChunkCumsumGrads&, int)
SSM_CPU_KERNEL(ssd_chunk_state_bwd, const SsdChunkStateArgs&, const SsdChunkStateGrads&,
               const std::int64_t*, int)
SSM_CPU_KERNEL(ssd_state_passing_bwd, const SsdStatePassingArgs&, const SsdStatePassingGrads&,
               const std::int64_t*, int)
SSM_CPU_KERNEL(ssd_bmm_chunk_bwd, const SsdBmmChunkArgs&, const SsdBmmChunkGrads&, int)
SSM_CPU_KERNEL(ssd_chunk_output_bwd, const SsdChunkOutputArgs&, const SsdChunkOutputGrads&,
               const std::int64_t*, int)

namespace ssm {

namespace {

std::int64_t chunk_count(std::int64_t seqlen, std::int64_t chunk) {
    return (seqlen + chunk - 1) / chunk;
}

class StageChecker : public Checker {
  public:
    StageChecker(const char* op, const TensorView& main) : Checker(op, main.device), op_(op) {}

    /// Letters, and what is known of the sizes: "(B, L, G, N) = (2, 6" and the end.
    static std::string form(std::string_view letters, std::initializer_list<std::int64_t> sizes,
                            std::string_view end) {
        std::string text(letters);
        for (const std::int64_t size : sizes)
            text += (text.size() == letters.size() ? " = (" : ", ") + std::to_string(size);
        return text.append(end);
    }
    /// The first argument: any sizes of this rank.
    void main_input(std::string_view name, const TensorView& view, int ndim,
                    std::string_view letters) {
        rank(name, view, ndim, letters);
        floating(name, view);
        cuda_kernels(op_, view.device);  // refuses a device that nothing serves
        device(name, view);
    }
    void groups(std::string_view name, std::int64_t count, std::int64_t heads) const {
        if (count < 1 || heads % count != 0)
            fail(name, "have a group count that divides H = " + std::to_string(heads),
                 std::to_string(count));
    }
    void chunk(std::string_view name, std::int64_t size) const {
        if (size < 1) fail(name, "have at least 1 step per chunk", std::to_string(size));
    }
    /// (B, H, C, Q) with the chunks of L steps; Q is its own.
    void in_chunks(std::string_view name, const TensorView& view, const Axis& batch,
                   const Axis& heads, std::int64_t seqlen) {
        rank(name, view, 4, form("(B, H, C, Q)", {batch.size, heads.size}, ", C, Q)"));
        const Axis chunks{"C", view.shape[2]}, steps{"Q", view.shape[3]};
        shape(name, view, {batch, heads, chunks, steps});
        chunk(name, steps.size);
        if (chunks.size != chunk_count(seqlen, steps.size))
            fail(name,
                 "have ceil(L / Q) chunks for L = " + std::to_string(seqlen) +
                     " and Q = " + std::to_string(steps.size),
                 std::to_string(chunks.size));
        floating(name, view);
        device(name, view);
    }
    /// B or C of `heads` heads.
    void matrix(std::string_view name, const TensorView& view, const Axis& batch,
                const Axis& seqlen, std::int64_t heads) {
        rank(name, view, 4, form("(B, L, G, N)", {batch.size, seqlen.size}, ", 1, N)"));
        input(name, view, {batch, seqlen, {"G", view.shape[2]}, {"N", view.shape[3]}});
        groups(name, view.shape[2], heads);
    }
    void ids(const TensorView& view, const Axis& batch, const Axis& seqlen) {
        if (present(view)) indices("seq_idx", view, {batch, seqlen});
    }

  private:
    const char* op_;
};

// The sizes of one call, once its inputs are checked.
struct Sizes {
    Axis batch{"B", 0}, seqlen{"L", 0}, heads{"H", 0}, headdim{"P", 0}, dstate{"N", 0};
    Axis chunks{"C", 0}, steps{"Q", 0}, groups{"G", 0};
};

// For each step of (B, L): kSkipped, kEntered if its sequence was open before the chunk or is the
// first of the row, else the place in the chunk where its sequence begins. Null without `seq_idx`:
// then every step is of the row's first sequence.
class Origins {
  public:
    Origins(const char* op, const TensorView& seq_idx, const Sizes& sizes) {
        if (!present(seq_idx)) return;
        const std::int64_t batch = sizes.batch.size, seqlen = sizes.seqlen.size;
        const std::int64_t chunk = sizes.steps.size;
        const RunTable table(op, seq_idx, batch, seqlen, false, RunTable::kAnyNumber);
        const Runs& runs = table.view();
        origins_.assign(static_cast<std::size_t>(batch * seqlen), Origin::kSkipped);
        for (std::int64_t row = 0; row < batch; ++row) {
            std::int64_t start = -1;  // of the open sequence; the first one began before the row
            for (std::int64_t i = runs.row_begin[row]; i < runs.row_begin[row + 1]; ++i) {
                const Run& run = runs.runs[i];
                if (run.state_in == Run::kZero) start = run.begin;
                for (std::int64_t t = run.begin; t < run.end; ++t) {
                    const std::int64_t first = t - t % chunk;
                    origins_[static_cast<std::size_t>(row * seqlen + t)] =
                        start < first ? Origin::kEntered : start - first;
                }
            }
        }
    }
    const std::int64_t* data() const { return origins_.empty() ? nullptr : origins_.data(); }

  private:
    std::vector<std::int64_t> origins_;
};

constexpr const char* kCumsum = "ssd_chunk_cumsum";
constexpr const char* kState = "ssd_chunk_state";
constexpr const char* kPassing = "ssd_state_passing";
constexpr const char* kBmm = "ssd_bmm_chunk";
constexpr const char* kOutput = "ssd_chunk_output";

void check_range(const StageChecker& check, const SsdChunkCumsumArgs& args) {
    // Written so that NaN is refused as well.
    if (!(args.dt_low <= args.dt_high))
        check.fail("dt_limit", "be (low, high)",
                   "(" + number_text(args.dt_low) + ", " + number_text(args.dt_high) + ")");
}

void check_ids(const SsdChunkCumsumArgs& args, const Sizes& sizes) {
    if (present(args.seq_idx))
        RunTable(kCumsum, args.seq_idx, sizes.batch.size, sizes.seqlen.size, false,
                 RunTable::kAnyNumber);
}

Sizes check_inputs(StageChecker& check, const SsdChunkCumsumArgs& args) {
    check.main_input("dt", args.dt, 3, "(B, L, H)");
    Sizes sizes;
    sizes.batch.size = args.dt.shape[0];
    sizes.seqlen.size = args.dt.shape[1];
    sizes.heads.size = args.dt.shape[2];
    check.input("A", args.A, {sizes.heads});
    check.optional_input("dt_bias", args.dt_bias, {sizes.heads});
    check.ids(args.seq_idx, sizes.batch, sizes.seqlen);
    return sizes;
}

Sizes check_inputs(StageChecker& check, const SsdChunkStateArgs& args) {
    check.main_input("x", args.x, 4, "(B, L, H, P)");
    Sizes sizes;
    sizes.batch.size = args.x.shape[0];
    sizes.seqlen.size = args.x.shape[1];
    sizes.heads.size = args.x.shape[2];
    sizes.headdim.size = args.x.shape[3];
    check.matrix("B", args.B, sizes.batch, sizes.seqlen, sizes.heads.size);
    sizes.groups.size = args.B.shape[2];
    sizes.dstate.size = args.B.shape[3];
    check.in_chunks("dt", args.dt, sizes.batch, sizes.heads, sizes.seqlen.size);
    sizes.chunks.size = args.dt.shape[2];
    sizes.steps.size = args.dt.shape[3];
    check.input("dA_cumsum", args.dA_cumsum, {sizes.batch, sizes.heads, sizes.chunks, sizes.steps});
    check.ids(args.seq_idx, sizes.batch, sizes.seqlen);
    return sizes;
}

// `states`, by its name, gives the sizes: of the forward the input, of the backward what it saved.
Sizes check_inputs(StageChecker& check, const SsdStatePassingArgs& args, std::string_view name,
                   const TensorView& states) {
    check.main_input(name, states, 5, "(B, C, H, P, N)");
    Sizes sizes;
    sizes.batch.size = states.shape[0];
    sizes.chunks.size = states.shape[1];
    sizes.heads.size = states.shape[2];
    sizes.headdim.size = states.shape[3];
    sizes.dstate.size = states.shape[4];
    check.rank("dA_cumsum", args.dA_cumsum, 4,
               check.form("(B, H, C, Q)", {sizes.batch.size, sizes.heads.size, sizes.chunks.size},
                          ", Q)"));
    sizes.steps.size = args.dA_cumsum.shape[3];
    check.input("dA_cumsum", args.dA_cumsum, {sizes.batch, sizes.heads, sizes.chunks, sizes.steps});
    check.chunk("dA_cumsum", sizes.steps.size);
    check.optional_input("initial_states", args.initial_states,
                         {sizes.batch, sizes.heads, sizes.headdim, sizes.dstate});
    if (!present(args.seq_idx)) return sizes;
    check.rank("seq_idx", args.seq_idx, 2, check.form("(B, L)", {sizes.batch.size}, ", L)"));
    sizes.seqlen.size = args.seq_idx.shape[1];
    check.ids(args.seq_idx, sizes.batch, sizes.seqlen);
    if (chunk_count(sizes.seqlen.size, sizes.steps.size) != sizes.chunks.size)
        check.fail("seq_idx",
                   "have the steps of " + std::to_string(sizes.chunks.size) + " chunks of " +
                       std::to_string(sizes.steps.size),
                   std::to_string(sizes.seqlen.size));
    return sizes;
}

// `products`, by its name, gives the chunk: of the forward the output, of the backward its
// gradient.
Sizes check_inputs(StageChecker& check, const SsdBmmChunkArgs& args, std::string_view name,
                   const TensorView& products) {
    check.main_input("C", args.C, 4, "(B, L, G, N)");
    Sizes sizes;
    sizes.batch.size = args.C.shape[0];
    sizes.seqlen.size = args.C.shape[1];
    sizes.dstate.size = args.C.shape[3];
    const std::int64_t of_c = args.C.shape[2];
    if (of_c < 1) check.fail("C", "have at least 1 group", std::to_string(of_c));
    check.rank("B", args.B, 4,
               check.form("(B, L, G, N)",
                          {sizes.batch.size, sizes.seqlen.size, 1, sizes.dstate.size}, ")"));
    const std::int64_t of_b = args.B.shape[2];
    check.input("B", args.B, {sizes.batch, sizes.seqlen, {"G", of_b}, sizes.dstate});
    if (of_b < 1) check.fail("B", "have at least 1 group", std::to_string(of_b));
    check.rank(name, products, 5, "(B, C, G, Q, Q)");
    sizes.steps.size = products.shape[3];
    check.chunk(name, sizes.steps.size);
    sizes.chunks.size = chunk_count(sizes.seqlen.size, sizes.steps.size);
    sizes.groups.size = std::lcm(of_b, of_c);
    return sizes;
}

Sizes check_inputs(StageChecker& check, const SsdChunkOutputArgs& args) {
    check.main_input("x", args.x, 4, "(B, L, H, P)");
    Sizes sizes;
    sizes.batch.size = args.x.shape[0];
    sizes.seqlen.size = args.x.shape[1];
    sizes.heads.size = args.x.shape[2];
    sizes.headdim.size = args.x.shape[3];
    check.in_chunks("dt", args.dt, sizes.batch, sizes.heads, sizes.seqlen.size);
    sizes.chunks.size = args.dt.shape[2];
    sizes.steps.size = args.dt.shape[3];
    check.input("dA_cumsum", args.dA_cumsum, {sizes.batch, sizes.heads, sizes.chunks, sizes.steps});
    check.rank(
        "CB", args.CB, 5,
        check.form("(B, C, G, Q, Q)",
                   {sizes.batch.size, sizes.chunks.size, 1, sizes.steps.size, sizes.steps.size},
                   ")"));
    sizes.groups.size = args.CB.shape[2];
    check.input("CB", args.CB, {sizes.batch, sizes.chunks, sizes.groups, sizes.steps, sizes.steps});
    check.groups("CB", sizes.groups.size, sizes.heads.size);
    check.matrix("C", args.C, sizes.batch, sizes.seqlen, sizes.heads.size);
    sizes.dstate.size = args.C.shape[3];
    check.input("states_in", args.states_in,
                {sizes.batch, sizes.chunks, sizes.heads, sizes.headdim, sizes.dstate});
    if (args.D.ndim == 1)
        check.input("D", args.D, {sizes.heads});
    else
        check.optional_input("D", args.D, {sizes.heads, sizes.headdim});
    check.optional_input("z", args.z, {sizes.batch, sizes.seqlen, sizes.heads, sizes.headdim});
    check.ids(args.seq_idx, sizes.batch, sizes.seqlen);
    return sizes;
}

// D per head becomes D per channel, with a stride of 0.
void spread_over_channels(TensorView& D, const Sizes& sizes) {
    if (D.ndim != 1) return;
    D.ndim = 2;
    D.shape[1] = sizes.headdim.size;
    D.stride[1] = 0;
}

}  // namespace

void ssd_chunk_cumsum_fwd(const SsdChunkCumsumArgs& args, const Exec& exec) {
    StageChecker check(kCumsum, args.dt);
    const Sizes sizes = check_inputs(check, args);
    check.in_chunks("dt_out", args.dt_out, sizes.batch, sizes.heads, sizes.seqlen.size);
    check.written("dt_out", args.dt_out);
    check.output(
        "dA_cumsum", args.dA_cumsum,
        {sizes.batch, sizes.heads, {"C", args.dt_out.shape[2]}, {"Q", args.dt_out.shape[3]}});
    check_range(check, args);
    if (const auto* gpu = cuda_kernels(kCumsum, args.dt.device))
        return gpu->ssd_chunk_cumsum_fwd(args, exec);
    check_ids(args, sizes);
    cpu::ssd_chunk_cumsum_fwd.active()(args, thread_count(exec));
}

void ssd_chunk_cumsum_bwd(const SsdChunkCumsumArgs& args, const SsdChunkCumsumGrads& grads,
                          const Exec& exec) {
    StageChecker check(kCumsum, args.dt);
    const Sizes sizes = check_inputs(check, args);
    const bool has_steps = present(grads.ddt_out);
    const TensorView& first = has_steps ? grads.ddt_out : grads.ddA_cumsum;
    check.in_chunks(has_steps ? "ddt_out" : "ddA_cumsum", first, sizes.batch, sizes.heads,
                    sizes.seqlen.size);
    check.optional_input("ddA_cumsum", grads.ddA_cumsum,
                         {sizes.batch, sizes.heads, {"C", first.shape[2]}, {"Q", first.shape[3]}});
    check.output("ddt", grads.ddt, {sizes.batch, sizes.seqlen, sizes.heads});
    check.output("dA", grads.dA, {sizes.heads});
    if (present(args.dt_bias)) check.output("ddt_bias", grads.ddt_bias, {sizes.heads});
    check_range(check, args);
    if (const auto* gpu = cuda_kernels(kCumsum, args.dt.device)) {
        const WithWorkspace with(kCumsum, exec, args.dt.device,
                                 gpu->ssd_chunk_cumsum_bwd_workspace(args, grads));
        return gpu->ssd_chunk_cumsum_bwd(args, grads, with.exec());
    }
    check_ids(args, sizes);
    cpu::ssd_chunk_cumsum_bwd.active()(args, grads, thread_count(exec));
}

std::int64_t ssd_chunk_cumsum_bwd_workspace(const SsdChunkCumsumArgs& args,
                                            const SsdChunkCumsumGrads& grads) {
    StageChecker check(kCumsum, args.dt);
    check.main_input("dt", args.dt, 3, "(B, L, H)");
    const bool has_steps = present(grads.ddt_out);
    check.rank(has_steps ? "ddt_out" : "ddA_cumsum", has_steps ? grads.ddt_out : grads.ddA_cumsum,
               4, "(B, H, C, Q)");
    const auto* gpu = cuda_kernels(kCumsum, args.dt.device);
    return gpu != nullptr ? gpu->ssd_chunk_cumsum_bwd_workspace(args, grads) : 0;
}

void ssd_chunk_state_fwd(const SsdChunkStateArgs& args, const Exec& exec) {
    StageChecker check(kState, args.x);
    const Sizes sizes = check_inputs(check, args);
    check.output("states", args.states,
                 {sizes.batch, sizes.chunks, sizes.heads, sizes.headdim, sizes.dstate});
    if (const auto* gpu = cuda_kernels(kState, args.x.device))
        return gpu->ssd_chunk_state_fwd(args, exec);
    const Origins origins(kState, args.seq_idx, sizes);
    cpu::ssd_chunk_state_fwd.active()(args, origins.data(), thread_count(exec));
}

void ssd_chunk_state_bwd(const SsdChunkStateArgs& args, const SsdChunkStateGrads& grads,
                         const Exec& exec) {
    StageChecker check(kState, args.x);
    const Sizes sizes = check_inputs(check, args);
    check.input("dstates", grads.dstates,
                {sizes.batch, sizes.chunks, sizes.heads, sizes.headdim, sizes.dstate});
    check.output("dx", grads.dx, {sizes.batch, sizes.seqlen, sizes.heads, sizes.headdim});
    check.output("dB", grads.dB, {sizes.batch, sizes.seqlen, sizes.groups, sizes.dstate});
    check.output("ddt", grads.ddt, {sizes.batch, sizes.heads, sizes.chunks, sizes.steps});
    check.output("ddA_cumsum", grads.ddA_cumsum,
                 {sizes.batch, sizes.heads, sizes.chunks, sizes.steps});
    if (const auto* gpu = cuda_kernels(kState, args.x.device))
        return gpu->ssd_chunk_state_bwd(args, grads, exec);
    const Origins origins(kState, args.seq_idx, sizes);
    cpu::ssd_chunk_state_bwd.active()(args, grads, origins.data(), thread_count(exec));
}

void ssd_state_passing_fwd(const SsdStatePassingArgs& args, const Exec& exec) {
    StageChecker check(kPassing, args.states);
    const Sizes sizes = check_inputs(check, args, "states", args.states);
    check.output("states_in", args.states_in,
                 {sizes.batch, sizes.chunks, sizes.heads, sizes.headdim, sizes.dstate});
    check.optional_carried("final_states", args.final_states,
                           {sizes.batch, sizes.heads, sizes.headdim, sizes.dstate},
                           "initial_states", args.initial_states);
    if (const auto* gpu = cuda_kernels(kPassing, args.states.device))
        return gpu->ssd_state_passing_fwd(args, exec);
    const Origins origins(kPassing, args.seq_idx, sizes);
    cpu::ssd_state_passing_fwd.active()(args, origins.data(), thread_count(exec));
}

void ssd_state_passing_bwd(const SsdStatePassingArgs& args, const SsdStatePassingGrads& grads,
                           const Exec& exec) {
    StageChecker check(kPassing, args.states_in);
    const Sizes sizes = check_inputs(check, args, "states_in", args.states_in);
    check.optional_input("dstates_in", grads.dstates_in,
                         {sizes.batch, sizes.chunks, sizes.heads, sizes.headdim, sizes.dstate});
    check.optional_input("dfinal_states", grads.dfinal_states,
                         {sizes.batch, sizes.heads, sizes.headdim, sizes.dstate});
    check.output("dstates", grads.dstates,
                 {sizes.batch, sizes.chunks, sizes.heads, sizes.headdim, sizes.dstate});
    check.output("ddA_cumsum", grads.ddA_cumsum,
                 {sizes.batch, sizes.heads, sizes.chunks, sizes.steps});
    check.optional_output("dinitial_states", grads.dinitial_states,
                          {sizes.batch, sizes.heads, sizes.headdim, sizes.dstate});
    if (const auto* gpu = cuda_kernels(kPassing, args.states_in.device)) {
        const WithWorkspace with(kPassing, exec, args.states_in.device,
                                 gpu->ssd_state_passing_bwd_workspace(args));
        return gpu->ssd_state_passing_bwd(args, grads, with.exec());
    }
    const Origins origins(kPassing, args.seq_idx, sizes);
    cpu::ssd_state_passing_bwd.active()(args, grads, origins.data(), thread_count(exec));
}

std::int64_t ssd_state_passing_bwd_workspace(const SsdStatePassingArgs& args) {
    StageChecker check(kPassing, args.states_in);
    check_inputs(check, args, "states_in", args.states_in);
    const auto* gpu = cuda_kernels(kPassing, args.states_in.device);
    return gpu != nullptr ? gpu->ssd_state_passing_bwd_workspace(args) : 0;
}

void ssd_bmm_chunk_fwd(const SsdBmmChunkArgs& args, const Exec& exec) {
    StageChecker check(kBmm, args.C);
    const Sizes sizes = check_inputs(check, args, "CB", args.CB);
    check.output("CB", args.CB,
                 {sizes.batch, sizes.chunks, sizes.groups, sizes.steps, sizes.steps});
    if (const auto* gpu = cuda_kernels(kBmm, args.C.device))
        return gpu->ssd_bmm_chunk_fwd(args, exec);
    cpu::ssd_bmm_chunk_fwd.active()(args, thread_count(exec));
}

void ssd_bmm_chunk_bwd(const SsdBmmChunkArgs& args, const SsdBmmChunkGrads& grads,
                       const Exec& exec) {
    StageChecker check(kBmm, args.C);
    const Sizes sizes = check_inputs(check, args, "dCB", grads.dCB);
    check.input("dCB", grads.dCB,
                {sizes.batch, sizes.chunks, sizes.groups, sizes.steps, sizes.steps});
    check.output("dC", grads.dC, {sizes.batch, sizes.seqlen, {"G", args.C.shape[2]}, sizes.dstate});
    check.output("dB", grads.dB, {sizes.batch, sizes.seqlen, {"G", args.B.shape[2]}, sizes.dstate});
    if (const auto* gpu = cuda_kernels(kBmm, args.C.device))
        return gpu->ssd_bmm_chunk_bwd(args, grads, exec);
    cpu::ssd_bmm_chunk_bwd.active()(args, grads, thread_count(exec));
}

void ssd_chunk_output_fwd(const SsdChunkOutputArgs& given, const Exec& exec) {
    StageChecker check(kOutput, given.x);
    const Sizes sizes = check_inputs(check, given);
    SsdChunkOutputArgs args = given;
    spread_over_channels(args.D, sizes);
    check.output("y", args.y, {sizes.batch, sizes.seqlen, sizes.heads, sizes.headdim});
    if (const auto* gpu = cuda_kernels(kOutput, args.x.device))
        return gpu->ssd_chunk_output_fwd(args, exec);
    const Origins origins(kOutput, args.seq_idx, sizes);
    cpu::ssd_chunk_output_fwd.active()(args, origins.data(), thread_count(exec));
}

void ssd_chunk_output_bwd(const SsdChunkOutputArgs& given, const SsdChunkOutputGrads& grads,
                          const Exec& exec) {
    StageChecker check(kOutput, given.x);
    const Sizes sizes = check_inputs(check, given);
    SsdChunkOutputArgs args = given;
    spread_over_channels(args.D, sizes);
    check.input("dy", grads.dy, {sizes.batch, sizes.seqlen, sizes.heads, sizes.headdim});
    check.output("dCB", grads.dCB,
                 {sizes.batch, sizes.chunks, sizes.groups, sizes.steps, sizes.steps});
    check.output("dx", grads.dx, {sizes.batch, sizes.seqlen, sizes.heads, sizes.headdim});
    check.output("ddt", grads.ddt, {sizes.batch, sizes.heads, sizes.chunks, sizes.steps});
    check.output("ddA_cumsum", grads.ddA_cumsum,
                 {sizes.batch, sizes.heads, sizes.chunks, sizes.steps});
    check.output("dC", grads.dC, {sizes.batch, sizes.seqlen, {"G", args.C.shape[2]}, sizes.dstate});
    check.output("dstates_in", grads.dstates_in,
                 {sizes.batch, sizes.chunks, sizes.heads, sizes.headdim, sizes.dstate});
    if (given.D.ndim == 1) check.output("dD", grads.dD, {sizes.heads});
    if (given.D.ndim == 2) check.output("dD", grads.dD, {sizes.heads, sizes.headdim});
    if (present(args.z))
        check.output("dz", grads.dz, {sizes.batch, sizes.seqlen, sizes.heads, sizes.headdim});
    if (const auto* gpu = cuda_kernels(kOutput, args.x.device)) {
        const WithWorkspace with(kOutput, exec, args.x.device,
                                 gpu->ssd_chunk_output_bwd_workspace(args));
        return gpu->ssd_chunk_output_bwd(args, grads, with.exec());
    }
    const Origins origins(kOutput, args.seq_idx, sizes);
    cpu::ssd_chunk_output_bwd.active()(args, grads, origins.data(), thread_count(exec));
}

std::int64_t ssd_chunk_output_bwd_workspace(const SsdChunkOutputArgs& args) {
    StageChecker check(kOutput, args.x);
    check.main_input("x", args.x, 4, "(B, L, H, P)");
    check.rank("dt", args.dt, 4, "(B, H, C, Q)");
    check.rank("CB", args.CB, 5, "(B, C, G, Q, Q)");
    check.groups("CB", args.CB.shape[2], args.x.shape[2]);
    check.rank("C", args.C, 4, "(B, L, G, N)");
    check.groups("C", args.C.shape[2], args.x.shape[2]);
    const auto* gpu = cuda_kernels(kOutput, args.x.device);
    return gpu != nullptr ? gpu->ssd_chunk_output_bwd_workspace(args) : 0;
}

}  // namespace ssm
