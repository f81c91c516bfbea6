// The front of the five stages: checks once, then hands canonical views to the chosen kernel.
#include <ssm/ssd_stages.h>

#include <charconv>
#include <numeric>
#include <vector>

#include "check.h"
#include "isa.h"
#include "runs.h"

SSM_CPU_KERNEL(ssd_chunk_cumsum_fwd, const SsdChunkCumsumArgs&, int)
SSM_CPU_KERNEL(ssd_chunk_state_fwd, const SsdChunkStateArgs&, const std::int64_t*, int)
SSM_CPU_KERNEL(ssd_state_passing_fwd, const SsdStatePassingArgs&, const std::int64_t*, int)
SSM_CPU_KERNEL(ssd_bmm_chunk_fwd, const SsdBmmChunkArgs&, int)
SSM_CPU_KERNEL(ssd_chunk_output_fwd, const SsdChunkOutputArgs&, const std::int64_t*, int)

namespace ssm {

namespace {

std::int64_t chunk_count(std::int64_t seqlen, std::int64_t chunk) {
    return (seqlen + chunk - 1) / chunk;
}

// The shortest text that reads back as the same number, as Python spells it.
std::string number_text(double value) {
    char digits[32];
    std::string text(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
    return text.find_first_of(".enf") == std::string::npos ? text + ".0" : text;
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
                    std::string_view letters) const {
        rank(name, view, ndim, letters);
        floating(name, view);
        check_device_served(op_, view.device);
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
                   const Axis& heads, std::int64_t seqlen) const {
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
                const Axis& seqlen, std::int64_t heads) const {
        rank(name, view, 4, form("(B, L, G, N)", {batch.size, seqlen.size}, ", 1, N)"));
        input(name, view, {batch, seqlen, {"G", view.shape[2]}, {"N", view.shape[3]}});
        groups(name, view.shape[2], heads);
    }
    void ids(const TensorView& view, const Axis& batch, const Axis& seqlen) const {
        if (present(view)) indices("seq_idx", view, {batch, seqlen});
    }

  private:
    const char* op_;
};

// For each step of (B, L): kSkipped, kEntered if its sequence was open before the chunk or is the
// first of the row, else the place in the chunk where its sequence begins. Null without `seq_idx`:
// then every step is of the row's first sequence.
class Origins {
  public:
    Origins(const char* op, const TensorView& seq_idx, std::int64_t batch, std::int64_t seqlen,
            std::int64_t chunk) {
        if (!present(seq_idx)) return;
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

}  // namespace

void ssd_chunk_cumsum_fwd(const SsdChunkCumsumArgs& args, const Exec& exec) {
    constexpr const char* op = "ssd_chunk_cumsum";
    const StageChecker check(op, args.dt);
    check.main_input("dt", args.dt, 3, "(B, L, H)");
    const Axis batch{"B", args.dt.shape[0]}, seqlen{"L", args.dt.shape[1]};
    const Axis heads{"H", args.dt.shape[2]};
    check.input("A", args.A, {heads});
    check.optional_input("dt_bias", args.dt_bias, {heads});
    check.ids(args.seq_idx, batch, seqlen);
    check.in_chunks("dt_out", args.dt_out, batch, heads, seqlen.size);
    check.no_overlap("dt_out", args.dt_out);
    check.output("dA_cumsum", args.dA_cumsum,
                 {batch, heads, {"C", args.dt_out.shape[2]}, {"Q", args.dt_out.shape[3]}});
    // Written so that NaN is refused as well.
    if (!(args.dt_low <= args.dt_high))
        check.fail("dt_limit", "be (low, high)",
                   "(" + number_text(args.dt_low) + ", " + number_text(args.dt_high) + ")");
    if (present(args.seq_idx))
        RunTable(op, args.seq_idx, batch.size, seqlen.size, false, RunTable::kAnyNumber);
    cpu::ssd_chunk_cumsum_fwd.active()(args, thread_count(exec));
}

void ssd_chunk_state_fwd(const SsdChunkStateArgs& args, const Exec& exec) {
    constexpr const char* op = "ssd_chunk_state";
    const StageChecker check(op, args.x);
    check.main_input("x", args.x, 4, "(B, L, H, P)");
    const Axis batch{"B", args.x.shape[0]}, seqlen{"L", args.x.shape[1]};
    const Axis heads{"H", args.x.shape[2]};
    check.matrix("B", args.B, batch, seqlen, heads.size);
    check.in_chunks("dt", args.dt, batch, heads, seqlen.size);
    const Axis chunks{"C", args.dt.shape[2]}, steps{"Q", args.dt.shape[3]};
    check.input("dA_cumsum", args.dA_cumsum, {batch, heads, chunks, steps});
    check.ids(args.seq_idx, batch, seqlen);
    check.output("states", args.states,
                 {batch, chunks, heads, {"P", args.x.shape[3]}, {"N", args.B.shape[3]}});
    const Origins origins(op, args.seq_idx, batch.size, seqlen.size, steps.size);
    cpu::ssd_chunk_state_fwd.active()(args, origins.data(), thread_count(exec));
}

void ssd_state_passing_fwd(const SsdStatePassingArgs& args, const Exec& exec) {
    constexpr const char* op = "ssd_state_passing";
    const StageChecker check(op, args.states);
    check.main_input("states", args.states, 5, "(B, C, H, P, N)");
    const std::int64_t* const shape = args.states.shape;
    const Axis batch{"B", shape[0]}, chunks{"C", shape[1]}, heads{"H", shape[2]};
    const Axis headdim{"P", shape[3]}, dstate{"N", shape[4]};
    check.rank("dA_cumsum", args.dA_cumsum, 4,
               check.form("(B, H, C, Q)", {batch.size, heads.size, chunks.size}, ", Q)"));
    const Axis steps{"Q", args.dA_cumsum.shape[3]};
    check.input("dA_cumsum", args.dA_cumsum, {batch, heads, chunks, steps});
    check.chunk("dA_cumsum", steps.size);
    check.optional_input("initial_states", args.initial_states, {batch, heads, headdim, dstate});
    std::int64_t seqlen = 0;
    if (present(args.seq_idx)) {
        check.rank("seq_idx", args.seq_idx, 2, check.form("(B, L)", {batch.size}, ", L)"));
        seqlen = args.seq_idx.shape[1];
        check.ids(args.seq_idx, batch, {"L", seqlen});
        if (chunk_count(seqlen, steps.size) != chunks.size)
            check.fail("seq_idx",
                       "have the steps of " + std::to_string(chunks.size) + " chunks of " +
                           std::to_string(steps.size),
                       std::to_string(seqlen));
    }
    check.output("states_in", args.states_in, {batch, chunks, heads, headdim, dstate});
    check.optional_output("final_states", args.final_states, {batch, heads, headdim, dstate});
    const Origins origins(op, args.seq_idx, batch.size, seqlen, steps.size);
    cpu::ssd_state_passing_fwd.active()(args, origins.data(), thread_count(exec));
}

void ssd_bmm_chunk_fwd(const SsdBmmChunkArgs& args, const Exec& exec) {
    const StageChecker check("ssd_bmm_chunk", args.C);
    check.main_input("C", args.C, 4, "(B, L, G, N)");
    const Axis batch{"B", args.C.shape[0]}, seqlen{"L", args.C.shape[1]};
    const std::int64_t of_c = args.C.shape[2];
    if (of_c < 1) check.fail("C", "have at least 1 group", std::to_string(of_c));
    check.rank("B", args.B, 4,
               check.form("(B, L, G, N)", {batch.size, seqlen.size, 1, args.C.shape[3]}, ")"));
    const std::int64_t of_b = args.B.shape[2];
    check.input("B", args.B, {batch, seqlen, {"G", of_b}, {"N", args.C.shape[3]}});
    if (of_b < 1) check.fail("B", "have at least 1 group", std::to_string(of_b));
    check.rank("CB", args.CB, 5, "(B, C, G, Q, Q)");
    const Axis steps{"Q", args.CB.shape[3]};
    check.chunk("CB", steps.size);
    const Axis chunks{"C", chunk_count(seqlen.size, steps.size)};
    check.output("CB", args.CB, {batch, chunks, {"G", std::lcm(of_b, of_c)}, steps, steps});
    cpu::ssd_bmm_chunk_fwd.active()(args, thread_count(exec));
}

void ssd_chunk_output_fwd(const SsdChunkOutputArgs& given, const Exec& exec) {
    constexpr const char* op = "ssd_chunk_output";
    SsdChunkOutputArgs args = given;
    const StageChecker check(op, args.x);
    check.main_input("x", args.x, 4, "(B, L, H, P)");
    const Axis batch{"B", args.x.shape[0]}, seqlen{"L", args.x.shape[1]};
    const Axis heads{"H", args.x.shape[2]}, headdim{"P", args.x.shape[3]};
    check.in_chunks("dt", args.dt, batch, heads, seqlen.size);
    const Axis chunks{"C", args.dt.shape[2]}, steps{"Q", args.dt.shape[3]};
    check.input("dA_cumsum", args.dA_cumsum, {batch, heads, chunks, steps});
    check.rank(
        "CB", args.CB, 5,
        check.form("(B, C, G, Q, Q)", {batch.size, chunks.size, 1, steps.size, steps.size}, ")"));
    check.input("CB", args.CB, {batch, chunks, {"G", args.CB.shape[2]}, steps, steps});
    check.groups("CB", args.CB.shape[2], heads.size);
    check.matrix("C", args.C, batch, seqlen, heads.size);
    check.input("states_in", args.states_in,
                {batch, chunks, heads, headdim, {"N", args.C.shape[3]}});
    if (present(args.D) && args.D.ndim == 1) {
        check.input("D", args.D, {heads});
        args.D.ndim = 2;
        args.D.shape[1] = headdim.size;
        args.D.stride[1] = 0;
    } else {
        check.optional_input("D", args.D, {heads, headdim});
    }
    check.optional_input("z", args.z, {batch, seqlen, heads, headdim});
    check.ids(args.seq_idx, batch, seqlen);
    check.output("y", args.y, {batch, seqlen, heads, headdim});
    const Origins origins(op, args.seq_idx, batch.size, seqlen.size, steps.size);
    cpu::ssd_chunk_output_fwd.active()(args, origins.data(), thread_count(exec));
}

}  // namespace ssm
