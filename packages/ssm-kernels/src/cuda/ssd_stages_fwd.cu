// The five stages of the state-space dual scan on the device, forward. A block owns one tile of one
// output and adds up its products; step sizes are summed by the lanes of a warp, states are passed
// on by one thread each. docs/ops/ssd_stages.md#on-a-gpu
#include "kernels.h"
#include "ssd_stages_output.cuh"

namespace ssm::cuda {

namespace {

// Step sizes and decays -------------------------------------------------------------------------

template <class Real>
struct ChunkSums {
    static constexpr int kThreads = 128, kWarps = kThreads / kWarp;
    static constexpr int kBlocksPerUnit = 4;
    static constexpr int kHeads = kWarp, kOwn = kHeads / kWarps;  // of a block, and of a warp
    static constexpr int kAcross = kHeads + 1;                    // between steps in shared memory

    struct Registers {
        double total;  // of a head of the warp: the lane says which
    };
    struct Sum {
        double upto, all;  // of the steps of this call, and with those before them
        Real size;
    };

    Plane<3> dt;
    Plane<1> A, dt_bias;
    StageIds ids;
    Plane<4> dt_out, dA_cumsum;
    std::int64_t seqlen, heads, chunks, size, parts;
    double dt_low, dt_high;
    bool softplus;

    std::int64_t shared_size() const { return kStageTile * kAcross; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex at{index};
        const std::int64_t first_head = at.next(parts) * kHeads, chunk = at.next(chunks);
        const std::int64_t row = at.rest;
        block.each([&](int, Registers& r) { r.total = 0; });
        for (std::int64_t place = 0; place < size; place += kStageTile) {
            const std::int64_t step = chunk * size + place;
            const std::int64_t steps = least(size - place, kStageTile);
            block.each([&](int thread, Registers&) {
                SSM_UNROLL_TWICE
                for (int i = thread; i < kStageTile * kHeads; i += kThreads)
                    block.write(i / kHeads * kAcross + i % kHeads,
                                size_of(row, step + i / kHeads, first_head + i % kHeads,
                                        i / kHeads < steps));
            });
            block.barrier();
            block.each_warp([&](auto& warp) {
                SSM_ROLLED
                for (int i = 0; i < kOwn; ++i) {
                    if (first_head + warp.index * kOwn + i >= heads) break;
                    for (int first = 0; first < kStageTile && first < steps; first += kWarp)
                        add_steps(block, warp, i, first_head, row, chunk, place, first, steps);
                }
            });
            block.barrier();
        }
    }

  private:
    /// The step size, 0 where there is no step.
    SSM_DEVICE Real size_of(std::int64_t row, std::int64_t step, std::int64_t head,
                            bool exists) const {
        if (!exists || step >= seqlen || head >= heads || sequence_at(ids, row, step) < 0) return 0;
        Real raw =
            dt.template load<Real>(row * dt.stride[0] + step * dt.stride[1] + head * dt.stride[2]);
        if (dt_bias) raw += dt_bias.template load<Real>(head * dt_bias.stride[0]);
        return step_size(*this, raw);
    }

    /// Adds up 32 steps of one head, and writes them.
    template <class Block, class Warp>
    SSM_DEVICE void add_steps(Block& block, Warp& warp, int own, std::int64_t first_head,
                              std::int64_t row, std::int64_t chunk, std::int64_t place, int first,
                              std::int64_t steps) const {
        const std::int64_t head = first_head + warp.index * kOwn + own;
        PerLane<Sum> lanes;
        const double rate = A.template load<Real>(head * A.stride[0]);
        warp.each([&](int lane, Registers&) {
            Sum& sum = lanes(lane);
            sum.size = block.read((first + lane) * kAcross + warp.index * kOwn + own);
            sum.upto = static_cast<double>(sum.size) * rate;
        });
        warp.prefix_sum([&](int lane) -> double& { return lanes(lane).upto; });
        warp.each([&](int lane, Registers& r) { lanes(lane).all = r.total; });
        warp.broadcast(own, [&](int lane) -> double& { return lanes(lane).all; });
        warp.each([&](int lane, Registers&) {
            Sum& sum = lanes(lane);
            sum.all += sum.upto;
            if (first + lane >= steps) return;
            const std::int64_t step = place + first + lane;
            dt_out.store(line_at(dt_out, row, head, chunk, step), sum.size);
            dA_cumsum.store(line_at(dA_cumsum, row, head, chunk, step), static_cast<Real>(sum.all));
        });
        warp.broadcast(kWarp - 1, [&](int lane) -> double& { return lanes(lane).all; });
        warp.each([&](int lane, Registers& r) {
            if (lane == own) r.total = lanes(lane).all;
        });
    }
};

// What a chunk adds to the state ----------------------------------------------------------------

template <class Scalar>
struct ChunkStates : StageTiles<Scalar> {
    using Tiles = StageTiles<Scalar>;
    using typename Tiles::Real, typename Tiles::Registers;

    Plane<4> x, B, dt, dA_cumsum;
    StageIds ids;
    Plane<5> states;
    std::int64_t seqlen, heads, headdim, dstate, chunks, size, group_heads;
    std::int64_t channel_tiles, state_tiles;

    std::int64_t shared_size() const { return kStageTile; }  // the weights of a tile of steps

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex at{index};
        const std::int64_t n0 = at.next(state_tiles) * kStageTile;
        const std::int64_t p0 = at.next(channel_tiles) * kStageTile;
        const std::int64_t head = at.next(heads), chunk = at.next(chunks), row = at.rest;
        const std::int64_t first = chunk * size, end = least(first + size, seqlen);
        block.each([&](int, Registers& r) { Tiles::clear(r.sums); });
        // Only what the last sequence of the chunk does is handed on.
        const std::int64_t open = StageWalk(ids, row, first, end).last_start(block, ids);
        const Real last =
            dA_cumsum.template load<Real>(line_at(dA_cumsum, row, head, chunk, size - 1));
        for (std::int64_t k = most(open, 0) / kStageTile * kStageTile; first + k < end;
             k += kStageTile) {
            const std::uint64_t kept =
                kept_steps(block, ids, row, first + k, end) & ~first_bits(open - k);
            block.each([&](int thread, Registers&) {
                if (thread >= kStageTile) return;
                const auto value = [&](const Plane<4>& line) {
                    return line.template load<Real>(line_at(line, row, head, chunk, k + thread));
                };
                block.write(thread, kept >> thread & 1 ? exp_of(last - value(dA_cumsum)) * value(dt)
                                                       : Real(0));
            });
            block.barrier();
            const auto write = [&](int thread) {
                Tiles::fill(block, thread, Tiles::left(), steps_of(x, row, first + k, head, p0),
                            end - first - k, headdim - p0, [&](int step, int, Real value) {
                                return kept >> step & 1 ? value * block.read(step) : Real(0);
                            });
                Tiles::fill(block, thread, Tiles::right(),
                            steps_of(B, row, first + k, quotient(head, group_heads), n0),
                            end - first - k, dstate - n0, [&](int step, int, Real value) {
                                return kept >> step & 1 ? value : Real(0);
                            });
            };
            Tiles::template add<true, true>(block, write,
                                            [](Registers& r) -> auto& { return r.sums; });
        }
        block.each([&](int thread, Registers& r) {
            Tiles::store(thread, r.sums, chunk_of(states, row, chunk, head, p0, n0), headdim - p0,
                         dstate - n0);
        });
    }
};

// From chunk to chunk ---------------------------------------------------------------------------

template <class Real>
struct PassStates {
    static constexpr int kThreads = StagePassing::kThreads;
    static constexpr int kBlocksPerUnit = 8;

    struct Registers {
        Real h[StagePassing::kOwn];
    };

    Plane<5> states, states_in;
    Plane<4> dA_cumsum, initial_states, final_states;
    StagePassing cut;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex at{index};
        const std::int64_t part = at.next(cut.parts), head = at.next(cut.heads), row = at.rest;
        block.each([&](int thread, Registers& r) {
            SSM_UNROLL
            for (Real& h : r.h) h = 0;
            if (!initial_states) return;
            cut.each(part, thread, [&](int i, std::int64_t p, std::int64_t n) {
                r.h[i] =
                    initial_states.template load<Real>(line_at(initial_states, row, head, p, n));
            });
        });
        for (std::int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
            const bool goes_on = cut.goes_on(block, row, chunk);
            const Real decay = exp_of(
                dA_cumsum.template load<Real>(line_at(dA_cumsum, row, head, chunk, cut.size - 1)));
            block.each([&](int thread, Registers& r) {
                cut.each(part, thread, [&](int i, std::int64_t p, std::int64_t n) {
                    const Real added =
                        states.template load<Real>(state_at(states, row, chunk, head, p, n));
                    states_in.store(state_at(states_in, row, chunk, head, p, n), r.h[i]);
                    // Selected: what does not go on may be no number.
                    r.h[i] = goes_on ? fma_of(decay, r.h[i], added) : added;
                });
            });
        }
        if (!final_states) return;
        block.each([&](int thread, Registers& r) {
            cut.each(part, thread, [&](int i, std::int64_t p, std::int64_t n) {
                final_states.store(line_at(final_states, row, head, p, n), r.h[i]);
            });
        });
    }
};

// C B^T -----------------------------------------------------------------------------------------

template <class Scalar>
struct ChunkProducts : StageTiles<Scalar> {
    using Tiles = StageTiles<Scalar>;
    using typename Tiles::Real, typename Tiles::Registers;

    Plane<4> C, B;
    Plane<5> CB;
    std::int64_t seqlen, dstate, chunks, groups, size, tiles;
    std::int64_t shared_by_C, shared_by_B;  // groups of CB that one of C, and of B, serves

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex at{index};
        const std::int64_t j = at.next(tiles) * kStageTile, i = at.next(tiles) * kStageTile;
        const std::int64_t group = at.next(groups), chunk = at.next(chunks), row = at.rest;
        const std::int64_t first = chunk * size, count = least(size, seqlen - first);
        block.each([&](int, Registers& r) { Tiles::clear(r.sums); });
        for (std::int64_t n = 0; n < dstate && i < count && j < count; n += kStageTile) {
            const auto write = [&](int thread) {
                Tiles::fill(block, thread, Tiles::left(),
                            steps_of(C, row, first + i, quotient(group, shared_by_C), n), count - i,
                            dstate - n);
                Tiles::fill(block, thread, Tiles::right(),
                            steps_of(B, row, first + j, quotient(group, shared_by_B), n), count - j,
                            dstate - n);
            };
            Tiles::template add<false, false>(block, write,
                                              [](Registers& r) -> auto& { return r.sums; });
        }
        block.each([&](int thread, Registers& r) {
            Tiles::store(thread, r.sums, chunk_of(CB, row, chunk, group, i, j), size - i, size - j);
        });
    }
};

// The outputs -----------------------------------------------------------------------------------

template <class Scalar>
struct ChunkOutputs : StageOutputs<Scalar> {
    using Outputs = StageOutputs<Scalar>;
    using typename Outputs::Real, typename Outputs::Registers, typename Outputs::Place;

    Plane<4> y;

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const Place at = this->place_of(index);
        if (at.rows <= 0) return;
        const StageSteps steps = this->compute(block, at);
        block.each([&](int thread, Registers& r) {
            if (this->z)
                Outputs::with_memory(
                    thread, r.sums, this->tile_of(this->z, at), at.rows, at.columns,
                    [](const auto&, Real& sum, const auto& z) { sum *= silu(Outputs::number(z)); });
            Outputs::with_memory(thread, r.sums, this->tile_of(y, at), at.rows, at.columns,
                                 [&](const auto& spot, Real sum, auto& memory) {
                                     narrow(steps.keeps(spot.row) ? sum : Real(0), memory);
                                 });
        });
    }
};

}  // namespace

void ssd_chunk_cumsum_fwd(const SsdChunkCumsumArgs& args, const Exec& exec) {
    with_compute_type(args.dt.dtype, [&](auto real) {
        ChunkSums<decltype(real)> kernel{};
        kernel.dt = plane<3>(args.dt), kernel.A = plane<1>(args.A);
        kernel.dt_bias = plane<1>(args.dt_bias), kernel.ids = {plane<2>(args.seq_idx)};
        kernel.dt_out = plane<4>(args.dt_out), kernel.dA_cumsum = plane<4>(args.dA_cumsum);
        kernel.seqlen = args.dt.shape[1], kernel.heads = args.dt.shape[2];
        kernel.chunks = args.dt_out.shape[2], kernel.size = args.dt_out.shape[3];
        kernel.parts = (kernel.heads + kernel.kHeads - 1) / kernel.kHeads;
        kernel.dt_low = args.dt_low, kernel.dt_high = args.dt_high;
        kernel.softplus = args.softplus;
        launch<decltype(real)>("ssd_chunk_cumsum", kernel,
                               args.dt.shape[0] * kernel.chunks * kernel.parts, args.dt.device,
                               exec);
    });
}

void ssd_chunk_state_fwd(const SsdChunkStateArgs& args, const Exec& exec) {
    with_compute_type(args.x.dtype, [&](auto real) {
        ChunkStates<decltype(real)> kernel{};
        kernel.x = plane<4>(args.x), kernel.B = plane<4>(args.B), kernel.dt = plane<4>(args.dt);
        kernel.dA_cumsum = plane<4>(args.dA_cumsum), kernel.ids = {plane<2>(args.seq_idx)};
        kernel.states = plane<5>(args.states);
        kernel.seqlen = args.x.shape[1], kernel.heads = args.x.shape[2];
        kernel.headdim = args.x.shape[3], kernel.dstate = args.B.shape[3];
        kernel.chunks = args.dt.shape[2], kernel.size = args.dt.shape[3];
        kernel.group_heads = kernel.heads / args.B.shape[2];
        kernel.channel_tiles = stage_tiles(kernel.headdim);
        kernel.state_tiles = stage_tiles(kernel.dstate);
        launch<decltype(real)>("ssd_chunk_state", kernel,
                               args.x.shape[0] * kernel.chunks * kernel.heads *
                                   kernel.channel_tiles * kernel.state_tiles,
                               args.x.device, exec);
    });
}

void ssd_state_passing_fwd(const SsdStatePassingArgs& args, const Exec& exec) {
    with_compute_type(args.states.dtype, [&](auto real) {
        PassStates<decltype(real)> kernel{};
        kernel.states = plane<5>(args.states), kernel.states_in = plane<5>(args.states_in);
        kernel.dA_cumsum = plane<4>(args.dA_cumsum);
        kernel.initial_states = plane<4>(args.initial_states);
        kernel.final_states = plane<4>(args.final_states);
        kernel.cut = StagePassing(args);
        launch<decltype(real)>("ssd_state_passing", kernel, kernel.cut.blocks(), args.states.device,
                               exec);
    });
}

void ssd_bmm_chunk_fwd(const SsdBmmChunkArgs& args, const Exec& exec) {
    with_compute_type(args.C.dtype, [&](auto real) {
        ChunkProducts<decltype(real)> kernel{};
        kernel.C = plane<4>(args.C), kernel.B = plane<4>(args.B), kernel.CB = plane<5>(args.CB);
        kernel.seqlen = args.C.shape[1], kernel.dstate = args.C.shape[3];
        kernel.chunks = args.CB.shape[1], kernel.groups = args.CB.shape[2];
        kernel.size = args.CB.shape[3], kernel.tiles = stage_tiles(kernel.size);
        kernel.shared_by_C = kernel.groups / args.C.shape[2];
        kernel.shared_by_B = kernel.groups / args.B.shape[2];
        launch<decltype(real)>(
            "ssd_bmm_chunk", kernel,
            args.C.shape[0] * kernel.chunks * kernel.groups * kernel.tiles * kernel.tiles,
            args.C.device, exec);
    });
}

void ssd_chunk_output_fwd(const SsdChunkOutputArgs& args, const Exec& exec) {
    with_compute_type(args.x.dtype, [&](auto real) {
        ChunkOutputs<decltype(real)> kernel{};
        kernel.take(args);
        kernel.y = plane<4>(args.y);
        launch<decltype(real)>("ssd_chunk_output", kernel, kernel.blocks(), args.x.device, exec);
    });
}

}  // namespace ssm::cuda
