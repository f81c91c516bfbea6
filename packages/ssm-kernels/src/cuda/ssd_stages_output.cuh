// The outputs of a chunk before the gate: what the last stage computes, and its backward again.
#pragma once

#include "ssd_stages_tile.cuh"

namespace ssm::cuda {

/// The tensors of the last stage, and tiles of 64 steps and 64 channels of one head:
///   o = exp(a) C h  +  M x  +  D x   with  M = CB . decay . step size
template <class Scalar>
struct StageOutputs : StageTiles<Scalar> {
    using Tiles = StageTiles<Scalar>;
    using typename Tiles::Factor, typename Tiles::Real;

    // Places in shared memory, kStageTile numbers each: sums of decays of the rows, and of the
    // terms; the terms' step sizes; the first term that a row sees; and D.
    static constexpr int kRows = 0, kTerms = kStageTile, kSizes = 2 * kStageTile;
    static constexpr int kFirst = 3 * kStageTile, kD = 4 * kStageTile;

    Plane<5> CB, states_in;
    Plane<4> x, z, dt, dA_cumsum, C;
    Plane<2> D;
    StageIds ids;
    std::int64_t batch, seqlen, heads, headdim, dstate, chunks, size;
    std::int64_t heads_of_CB, heads_of_C;  // that share one
    std::int64_t step_tiles, channel_tiles, state_tiles;

    void take(const SsdChunkOutputArgs& args) {
        CB = plane<5>(args.CB), states_in = plane<5>(args.states_in), x = plane<4>(args.x);
        z = plane<4>(args.z), dt = plane<4>(args.dt), dA_cumsum = plane<4>(args.dA_cumsum);
        C = plane<4>(args.C), D = plane<2>(args.D), ids = {plane<2>(args.seq_idx)};
        batch = args.x.shape[0], seqlen = args.x.shape[1], heads = args.x.shape[2];
        headdim = args.x.shape[3], dstate = args.C.shape[3], chunks = args.dt.shape[2];
        size = args.dt.shape[3];
        heads_of_CB = heads / args.CB.shape[2], heads_of_C = heads / args.C.shape[2];
        step_tiles = stage_tiles(size < seqlen ? size : seqlen);
        channel_tiles = stage_tiles(headdim), state_tiles = stage_tiles(dstate);
    }
    std::int64_t blocks() const { return batch * chunks * heads * step_tiles * channel_tiles; }
    std::int64_t shared_size() const { return kD + kStageTile; }

    /// A tile of outputs.
    struct Place {
        std::int64_t row, chunk, head, step, channel;  // the first of each, the step in its chunk
        std::int64_t first;                            // step of the row at which the chunk begins
        std::int64_t rows, columns;                    // that are left from the first on
    };
    SSM_DEVICE Place place_of(std::int64_t index) const {
        StageIndex rest{index};
        Place at;
        at.channel = rest.next(channel_tiles) * kStageTile, at.head = rest.next(heads);
        at.step = rest.next(step_tiles) * kStageTile, at.chunk = rest.next(chunks);
        at.row = rest.rest, at.first = at.chunk * size;
        at.rows = least(size, seqlen - at.first) - at.step, at.columns = headdim - at.channel;
        return at;
    }
    SSM_DEVICE Plane<2> tile_of(const Plane<4>& tensor, const Place& at) const {
        return steps_of(tensor, at.row, at.first + at.step, at.head, at.channel);
    }
    SSM_DEVICE Real line(const Plane<4>& tensor, const Place& at, std::int64_t step) const {
        return tensor.template load<Real>(line_at(tensor, at.row, at.head, at.chunk, step));
    }

    /// The sums become the outputs before the gate; rows of skipped steps hold anything.
    template <class Block>
    SSM_DEVICE StageSteps compute(Block& block, const Place& at) const {
        StageWalk walk(ids, at.row, at.first, least(at.first + size, seqlen));
        StageSteps steps = walk.next(block, ids);
        for (std::int64_t i = 0; i < at.step; i += kStageTile) steps = walk.next(block, ids);
        block.each([&](int thread, auto& r) {
            Tiles::clear(r.sums);
            if (thread >= kStageTile) return;
            block.write(kRows + thread,
                        thread < at.rows ? line(dA_cumsum, at, at.step + thread) : Real(0));
            block.write(kD + thread,
                        D && thread < at.columns
                            ? D.template load<Real>(at.head * D.stride[0] +
                                                    (at.channel + thread) * D.stride[1])
                            : Real(0));
        });
        block.barrier();
        if (steps.start < 0) add_entering(block, at, steps);
        // What comes before the sequence of the first row is not read.
        for (std::int64_t j = most(steps.start, 0) / kStageTile * kStageTile; j <= at.step;
             j += kStageTile)
            attend(block, at, steps, j);
        if (!D) return steps;
        block.each([&](int thread, auto& r) {
            Tiles::with_memory(thread, r.sums, tile_of(x, at), at.rows, at.columns,
                               [&](const auto& spot, Real& sum, const auto& memory) {
                                   sum += block.read(kD + spot.column) * Tiles::number(memory);
                               });
        });
        return steps;
    }

    /// Writes what is known of the terms from the step j of the chunk on, as seen from the steps of
    /// the tile. Returns those that are not skipped.
    template <class Block>
    SSM_DEVICE std::uint64_t load_terms(Block& block, const Place& at, const StageSteps& steps,
                                        std::int64_t j) const {
        const std::uint64_t kept =
            kept_steps(block, ids, at.row, at.first + j, at.first + at.step + at.rows);
        block.each([&](int thread, auto&) {
            if (thread >= kStageTile) return;
            const bool keeps = kept >> thread & 1;
            block.write(kTerms + thread, keeps ? line(dA_cumsum, at, j + thread) : Real(0));
            block.write(kSizes + thread, keeps ? line(dt, at, j + thread) : Real(0));
            const std::int64_t first = steps.first_seen(thread, at.step, j);
            block.write(kFirst + thread, static_cast<Real>(least(first, kStageTile)));
        });
        return kept;
    }
    /// Whether a step of the tile sees a term: one of its sequence that is not after it.
    template <class Block>
    SSM_DEVICE bool sees(Block& block, const Place& at, std::uint64_t kept, std::int64_t j, int row,
                         int term) const {
        return j + term <= at.step + row && (kept >> term & 1) && term >= block.read(kFirst + row);
    }
    template <class Block>
    SSM_DEVICE Real between(Block& block, int row, int term) const {
        return exp_of(block.read(kRows + row) - block.read(kTerms + term));
    }
    /// M of a pair from its CB.
    template <class Block>
    SSM_DEVICE Real weight(Block& block, const Place& at, std::uint64_t kept, std::int64_t j,
                           int row, int term, Real value) const {
        // Chosen, not multiplied by 0: the decay from a later step may be infinite.
        if (!sees(block, at, kept, j, row, term)) return 0;
        return value * between(block, row, term) * block.read(kSizes + term);
    }

  private:
    /// sums = exp(a) C h, of the steps that the state enters.
    template <class Block>
    SSM_DEVICE void add_entering(Block& block, const Place& at, const StageSteps& steps) const {
        for (std::int64_t n = 0; n < dstate; n += kStageTile) {
            const auto write = [&](int thread) {
                Tiles::fill(
                    block, thread, Tiles::left(),
                    steps_of(C, at.row, at.first + at.step, quotient(at.head, heads_of_C), n),
                    at.rows, dstate - n);
                Tiles::fill(block, thread, Tiles::right(),
                            chunk_of(states_in, at.row, at.chunk, at.head, at.channel, n),
                            at.columns, dstate - n);
            };
            Tiles::template add<false, false>(block, write,
                                              [](auto& r) -> auto& { return r.sums; });
        }
        block.each([&](int thread, auto& r) {
            Tiles::scale_rows(thread, r.sums, [&](int row) -> Factor {
                return {steps.enters(row), exp_of(block.read(kRows + row))};
            });
        });
    }

    /// sums += M x for the terms from the step j of the chunk on.
    template <class Block>
    SSM_DEVICE void attend(Block& block, const Place& at, const StageSteps& steps,
                           std::int64_t j) const {
        const std::int64_t terms = at.step + at.rows - j;
        const std::uint64_t kept = load_terms(block, at, steps, j);
        block.barrier();
        const auto write = [&](int thread) {
            Tiles::fill(block, thread, Tiles::left(),
                        chunk_of(CB, at.row, at.chunk, quotient(at.head, heads_of_CB), at.step, j),
                        at.rows, terms, [&](int row, int term, Real value) {
                            return weight(block, at, kept, j, row, term, value);
                        });
            Tiles::fill(
                block, thread, Tiles::right(),
                steps_of(x, at.row, at.first + j, at.head, at.channel), terms, at.columns,
                [&](int term, int, Real value) { return kept >> term & 1 ? value : Real(0); });
        };
        Tiles::template add<false, true>(block, write, [](auto& r) -> auto& { return r.sums; });
    }
};

}  // namespace ssm::cuda
