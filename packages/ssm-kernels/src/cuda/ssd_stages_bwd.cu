// The five stages of the state-space dual scan on the device, backward. A block owns one tile of
// one gradient. docs/ops/ssd_stages.md#backward
#include "kernels.h"
#include "ssd_stages_gradients.cuh"
#include "ssd_stages_states.cuh"
#include "ssd_stages_sums.cuh"

namespace ssm::cuda {

namespace {

// C B^T -----------------------------------------------------------------------------------------

/// dC = dCB B, or, of the right factor, dB = dCB^T C.
template <class Scalar, bool kOfRight>
struct DifferentiateFactor : StageTiles<Scalar> {
    using Tiles = StageTiles<Scalar>;
    using typename Tiles::Real, typename Tiles::Registers;

    Plane<5> dCB;
    Plane<4> other, gradient;
    std::int64_t batch, seqlen, dstate, chunks, groups, size, step_tiles, state_tiles;
    std::int64_t merged, shared_by_other;  // groups of CB that one of ours, and of the other, has

    DifferentiateFactor(const TensorView& gradient, const TensorView& other, const TensorView& dCB)
        : dCB(plane<5>(dCB)),
          other(plane<4>(other)),
          gradient(plane<4>(gradient)),
          batch(gradient.shape[0]),
          seqlen(gradient.shape[1]),
          dstate(gradient.shape[3]),
          chunks(dCB.shape[1]),
          groups(gradient.shape[2]),
          size(dCB.shape[3]),
          step_tiles(stage_tiles(size < seqlen ? size : seqlen)),
          state_tiles(stage_tiles(dstate)),
          merged(dCB.shape[2] / groups),
          shared_by_other(dCB.shape[2] / other.shape[2]) {}

    std::int64_t blocks() const { return batch * chunks * groups * step_tiles * state_tiles; }
    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex rest{index};
        const std::int64_t n = rest.next(state_tiles) * kStageTile;
        const std::int64_t i = rest.next(step_tiles) * kStageTile;
        const std::int64_t group = rest.next(groups), chunk = rest.next(chunks), row = rest.rest;
        const std::int64_t first = chunk * size, count = least(size, seqlen - first);
        if (i >= count) return;
        block.each([&](int, Registers& r) { Tiles::clear(r.sums); });
        for (std::int64_t pairs = group * merged; pairs < (group + 1) * merged; ++pairs)
            for (std::int64_t k = 0; k < count; k += kStageTile) {
                const auto write = [&](int thread) {
                    if constexpr (kOfRight)
                        Tiles::fill(block, thread, Tiles::left(),
                                    chunk_of(dCB, row, chunk, pairs, k, i), count - k, count - i);
                    else
                        Tiles::fill(block, thread, Tiles::left(),
                                    chunk_of(dCB, row, chunk, pairs, i, k), count - i, count - k);
                    Tiles::fill(
                        block, thread, Tiles::right(),
                        steps_of(other, row, first + k, quotient(pairs, shared_by_other), n),
                        count - k, dstate - n);
                };
                Tiles::template add<kOfRight, true>(block, write,
                                                    [](Registers& r) -> auto& { return r.sums; });
            }
        block.each([&](int thread, Registers& r) {
            Tiles::store(thread, r.sums, steps_of(gradient, row, first + i, group, n), count - i,
                         dstate - n);
        });
    }
};

// Launchers -------------------------------------------------------------------------------------

template <class Real>
std::int64_t bytes_of(std::int64_t count) {
    return count * static_cast<std::int64_t>(sizeof(Real));
}

template <class Real, class Kernel>
void begin(const char* op, const Kernel& kernel, const Device& device, const Exec& exec) {
    launch<Real>(op, kernel, kernel.blocks(), device, exec);
}

template <class Real, class Term>
void add_lines(const char* op, const Term* from, const TensorView& to, std::int64_t count,
               std::int64_t inner, const Exec& exec) {
    const AddLines<Real, Term> kernel{from, plane<2>(to), to.shape[0], count, inner};
    begin<Real>(op, kernel, to.device, exec);
}

}  // namespace

std::int64_t ssd_chunk_cumsum_bwd_workspace(const SsdChunkCumsumArgs& args,
                                            const SsdChunkCumsumGrads& grads) {
    const TensorView& lines = grads.ddt_out.ndim == kAbsent ? grads.ddA_cumsum : grads.ddt_out;
    return 2 * bytes_of<double>(args.dt.shape[0] * args.dt.shape[2] * lines.shape[2]);
}

void ssd_chunk_cumsum_bwd(const SsdChunkCumsumArgs& args, const SsdChunkCumsumGrads& grads,
                          const Exec& exec) {
    constexpr const char* kOp = "ssd_chunk_cumsum";
    with_compute_type(args.dt.dtype, [&](auto real) {
        using Real = decltype(real);
        const TensorView& lines = grads.ddt_out.ndim == kAbsent ? grads.ddA_cumsum : grads.ddt_out;
        DifferentiateSums<Real> kernel{};
        kernel.dt = plane<3>(args.dt), kernel.ddt = plane<3>(grads.ddt);
        kernel.A = plane<1>(args.A), kernel.dt_bias = plane<1>(args.dt_bias);
        kernel.ids = {plane<2>(args.seq_idx)};
        kernel.ddt_out = plane<4>(grads.ddt_out), kernel.ddA_cumsum = plane<4>(grads.ddA_cumsum);
        kernel.batch = args.dt.shape[0], kernel.seqlen = args.dt.shape[1];
        kernel.heads = args.dt.shape[2], kernel.chunks = lines.shape[2];
        kernel.size = lines.shape[3];
        kernel.parts = (kernel.heads + kernel.kHeads - 1) / kernel.kHeads;
        kernel.dt_low = args.dt_low, kernel.dt_high = args.dt_high;
        kernel.softplus = args.softplus;
        const std::int64_t count = kernel.batch * kernel.chunks;
        kernel.dA = static_cast<double*>(exec.workspace);
        kernel.dbias = kernel.dA + count * kernel.heads;
        begin<Real>(kOp, kernel, args.dt.device, exec);
        add_lines<Real>(kOp, kernel.dA, grads.dA, count, 1, exec);
        if (args.dt_bias.ndim != kAbsent)
            add_lines<Real>(kOp, kernel.dbias, grads.ddt_bias, count, 1, exec);
    });
}

void ssd_chunk_state_bwd(const SsdChunkStateArgs& args, const SsdChunkStateGrads& grads,
                         const Exec& exec) {
    with_compute_type(args.x.dtype, [&](auto real) {
        using Real = decltype(real);
        DifferentiateAdded<Real> added(args, grads);
        added.dx = plane<4>(grads.dx), added.ddt = plane<4>(grads.ddt);
        added.ddA_cumsum = plane<4>(grads.ddA_cumsum);
        begin<Real>("ssd_chunk_state", added, args.x.device, exec);
        DifferentiateAdding<Real> adding(args, grads);
        adding.dB = plane<4>(grads.dB);
        begin<Real>("ssd_chunk_state", adding, args.x.device, exec);
    });
}

std::int64_t ssd_state_passing_bwd_workspace(const SsdStatePassingArgs& args) {
    const StagePassing cut(args);
    const std::int64_t count = cut.batch * cut.heads * cut.chunks * cut.shares();
    return args.states_in.dtype == DType::f64 ? bytes_of<double>(count) : bytes_of<float>(count);
}

void ssd_state_passing_bwd(const SsdStatePassingArgs& args, const SsdStatePassingGrads& grads,
                           const Exec& exec) {
    constexpr const char* kOp = "ssd_state_passing";
    with_compute_type(args.states_in.dtype, [&](auto real) {
        using Real = decltype(real);
        DifferentiatePassing<Real> kernel{};
        kernel.states_in = plane<5>(args.states_in), kernel.dA_cumsum = plane<4>(args.dA_cumsum);
        kernel.dstates_in = plane<5>(grads.dstates_in), kernel.dstates = plane<5>(grads.dstates);
        kernel.dfinal_states = plane<4>(grads.dfinal_states);
        kernel.dinitial_states = plane<4>(grads.dinitial_states);
        kernel.cut = StagePassing(args), kernel.shares = static_cast<Real*>(exec.workspace);
        launch<Real>(kOp, kernel, kernel.cut.blocks(), args.states_in.device, exec);
        const FinishPassing<Real> finish{plane<4>(grads.ddA_cumsum), kernel.cut, kernel.shares};
        begin<Real>(kOp, finish, args.states_in.device, exec);
    });
}

void ssd_bmm_chunk_bwd(const SsdBmmChunkArgs& args, const SsdBmmChunkGrads& grads,
                       const Exec& exec) {
    with_compute_type(args.C.dtype, [&](auto real) {
        using Real = decltype(real);
        const DifferentiateFactor<Real, false> left(grads.dC, args.B, grads.dCB);
        begin<Real>("ssd_bmm_chunk", left, args.C.device, exec);
        const DifferentiateFactor<Real, true> right(grads.dB, args.C, grads.dCB);
        begin<Real>("ssd_bmm_chunk", right, args.C.device, exec);
    });
}

std::int64_t ssd_chunk_output_bwd_workspace(const SsdChunkOutputArgs& args) {
    StageOutputs<float> problem{};
    problem.take(args);
    OutputSums<float> sums;
    const std::int64_t count = sums.lay_out(problem, nullptr);
    return args.x.dtype == DType::f64 ? bytes_of<double>(count) : bytes_of<float>(count);
}

void ssd_chunk_output_bwd(const SsdChunkOutputArgs& args, const SsdChunkOutputGrads& grads,
                          const Exec& exec) {
    constexpr const char* kOp = "ssd_chunk_output";
    const Device device = args.x.device;
    with_compute_type(args.x.dtype, [&](auto real) {
        using Real = decltype(real);
        OutputAdjoint<Real> of{};
        of.take(args);
        of.sums.lay_out(of, static_cast<Real*>(exec.workspace));
        of.g = plane<4>(grads.dy);
        if (args.z.ndim != kAbsent) {
            of.g.data = of.sums.g;
            of.g.dtype = sizeof(Real) == 8 ? DType::f64 : DType::f32;
            std::int64_t stride = 1;
            for (int axis = 3; axis >= 0; --axis)
                of.g.stride[axis] = stride, stride *= args.x.shape[axis];
            begin<Real>(kOp, DifferentiateGates<Real>{of, plane<4>(grads.dy), plane<4>(grads.dz)},
                        device, exec);
        }
        begin<Real>(kOp,
                    DifferentiatePairs<Real>{of, plane<5>(grads.dCB), args.CB.shape[2],
                                             stage_tiles(of.size)},
                    device, exec);
        begin<Real>(kOp, DifferentiateInputs<Real>{of, plane<4>(grads.dx)}, device, exec);
        begin<Real>(kOp, DifferentiateEntering<Real>{of, plane<5>(grads.dstates_in)}, device, exec);
        begin<Real>(kOp, DifferentiateReading<Real>{of, plane<4>(grads.dC), args.C.shape[2]},
                    device, exec);
        begin<Real>(kOp, FinishSteps<Real>{of, plane<4>(grads.ddt), plane<4>(grads.ddA_cumsum)},
                    device, exec);
        if (args.D.ndim == kAbsent) return;
        const bool per_channel = grads.dD.ndim == 2;
        const std::int64_t lines = of.batch * of.chunks * of.step_tiles;
        add_lines<Real>(kOp, of.sums.skips, grads.dD, per_channel ? lines : lines * of.headdim,
                        per_channel ? of.headdim : 1, exec);
    });
}

}  // namespace ssm::cuda
