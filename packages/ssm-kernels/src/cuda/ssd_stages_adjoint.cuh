// The last stage of the state-space dual scan, backward: one kernel per gradient. What several
// blocks give to one number waits in working memory, and is added in the order of the blocks.
// docs/ops/ssd_stages.md#backward
#pragma once

#include "ssd_stages_output.cuh"

namespace ssm::cuda {

/// Working memory of the gradients of the outputs, in the compute type.
template <class Real>
struct OutputSums {
    Real* g = nullptr;         // (B, L, H, P): of the outputs before the gate, with a gate
    Real* rows = nullptr;      // (B, C, H, I, J, 64): of pairs of tiles, da of the rows
    Real* columns = nullptr;   // (B, C, H, I, J, 64): and of the terms, divided by -dt
    Real* diagonal = nullptr;  // (B, C, H, I, 64): ddt of pairs of a step with itself
    Real* entering = nullptr;  // (B, C, H, I, tiles of N, 64): da of what enters
    Real* skips = nullptr;     // (H, B, C, I, P): dD

    /// Lays it out from `memory` on; returns the number of elements.
    template <class Problem>
    std::int64_t lay_out(const Problem& of, Real* memory) {
        const std::int64_t heads = of.batch * of.chunks * of.heads, tiles = of.step_tiles;
        std::int64_t used = 0;
        const auto take = [&](Real*& part, std::int64_t count) {
            part = memory == nullptr ? nullptr : memory + used;
            used += count;
        };
        take(g, of.z.data != nullptr ? of.batch * of.seqlen * of.heads * of.headdim : 0);
        take(rows, heads * tiles * tiles * kStageTile);
        take(columns, heads * tiles * tiles * kStageTile);
        take(diagonal, heads * tiles * kStageTile);
        take(entering, heads * tiles * of.state_tiles * kStageTile);
        take(skips, of.D.data != nullptr ? heads * tiles * of.headdim : 0);
        return used;
    }
};

/// What the kernels of this file read.
template <class Scalar>
struct OutputAdjoint : StageOutputs<Scalar> {
    using Outputs = StageOutputs<Scalar>;
    using typename Outputs::Place, typename Outputs::Real, typename Outputs::Tiles;

    static constexpr int kWarps = Outputs::kThreads / kWarp;

    Plane<4> g;  // gradient of the outputs before the gate
    OutputSums<Real> sums;

    /// The number of a tile of steps of one head: where its lines of sums are.
    SSM_DEVICE std::int64_t line_of(std::int64_t row, std::int64_t chunk, std::int64_t head,
                                    std::int64_t tile) const {
        return ((row * this->chunks + chunk) * this->heads + head) * this->step_tiles + tile;
    }
    SSM_DEVICE std::int64_t pair_line(std::int64_t row, std::int64_t chunk, std::int64_t head,
                                      std::int64_t i, std::int64_t j) const {
        return (line_of(row, chunk, head, i) * this->step_tiles + j) * kStageTile;
    }

    /// Adds up the columns of a tile, of which each thread has the sums over its two rows, to
    /// kWarps lines of shared memory; after a barrier column_sum has them.
    template <class Block>
    static SSM_DEVICE void add_columns(Block& block, int to) {
        constexpr int kRowLanes = kWarp / 4;
        block.template scatter_sums<2 * Tiles::kSums, kRowLanes, 4>(
            [](auto& r) -> auto& { return r.columns; });
        block.each([&](int thread, auto& r) {
            const int column = thread % kWarp / 4 * 8 + thread % 4 * 2;
            for (int i = 0; i < 2; ++i)
                block.write(to + thread / kWarp * kStageTile + column + i, r.columns[i]);
        });
    }
    template <class Block>
    static SSM_DEVICE Real column_sum(Block& block, int from, int column) {
        Real sum = 0;
        SSM_UNROLL
        for (int warp = 0; warp < kWarps; ++warp)
            sum += block.read(from + warp * kStageTile + column);
        return sum;
    }
};

// The gate --------------------------------------------------------------------------------------

/// dz, and the gradients of the outputs before the gate.
template <class Scalar>
struct DifferentiateGates : OutputAdjoint<Scalar> {
    using Base = OutputAdjoint<Scalar>;
    using typename Base::Place, typename Base::Real;
    static constexpr int kBlocksPerUnit = 3;

    struct Registers {
        Real sums[Base::kSums][4], other[Base::kSums][4];
    };

    Plane<4> dy, dz;

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const Place at = this->place_of(index);
        if (at.rows <= 0) return;
        const StageSteps steps = this->compute(block, at);
        block.each([&](int thread, Registers& r) {
            const auto each = [&](const Plane<4>& tensor, auto&& use) {
                Base::with_memory(thread, r.sums, this->tile_of(tensor, at), at.rows, at.columns,
                                  use);
            };
            each(this->z, [&](const auto& spot, Real, const auto& z) {
                r.other[spot.n][spot.i] = Base::number(z);
            });
            each(dy, [&](const auto& spot, Real& sum, const auto& memory) {
                Real& other = r.other[spot.n][spot.i];
                const bool keeps = steps.keeps(spot.row);
                const Real z = other, gate = sigmoid(z), given = Base::number(memory);
                sum = keeps ? given * sum * silu_slope(z, gate) : Real(0);
                other = keeps ? given * gate * z : Real(0);
            });
            each(dz, [&](const auto&, Real sum, auto& memory) { narrow(sum, memory); });
            each(this->g, [&](const auto& spot, Real, auto& memory) {
                narrow(r.other[spot.n][spot.i], memory);
            });
        });
    }
};

// Pairs of steps --------------------------------------------------------------------------------

/// dCB of a tile of pairs, added up over the heads of a group, and what the pairs of each head give
/// to its step sizes and decays.
template <class Scalar>
struct DifferentiatePairs : OutputAdjoint<Scalar> {
    using Base = OutputAdjoint<Scalar>;
    using typename Base::Place, typename Base::Real;
    static constexpr int kBlocksPerUnit = 2;
    static constexpr int kColumns = Base::kD, kDiagonal = kColumns + Base::kWarps * kStageTile;

    struct Registers {
        Real sums[Base::kSums][4], total[Base::kSums][4];
        Real rows[2], columns[2 * Base::kSums];
    };

    Plane<5> dCB;
    std::int64_t groups, tiles;  // tiles of all steps of a chunk, also of those beyond L

    std::int64_t blocks() const { return this->batch * this->chunks * groups * tiles * tiles; }
    std::int64_t shared_size() const { return kDiagonal + kStageTile; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex rest{index};
        const std::int64_t j = rest.next(tiles) * kStageTile, i = rest.next(tiles) * kStageTile;
        const std::int64_t group = rest.next(groups);
        Place at{};
        at.chunk = rest.next(this->chunks), at.row = rest.rest;
        at.step = i, at.first = at.chunk * this->size;
        const std::int64_t count = least(this->size, this->seqlen - at.first);
        at.rows = count - i;
        block.each([&](int, Registers& r) { Base::clear(r.total); });
        if (i >= j && at.rows > 0) {
            StageWalk walk(this->ids, at.row, at.first, at.first + count);
            StageSteps steps = walk.next(block, this->ids);
            for (std::int64_t k = 0; k < i; k += kStageTile) steps = walk.next(block, this->ids);
            const std::int64_t from = group * this->heads_of_CB;
            for (at.head = from; at.head < from + this->heads_of_CB; ++at.head)
                add_head(block, at, steps, group, j);
        }
        block.each([&](int thread, Registers& r) {
            Base::store(thread, r.total, chunk_of(dCB, at.row, at.chunk, group, i, j),
                        this->size - i, this->size - j);
        });
    }

  private:
    template <class Block>
    SSM_DEVICE void add_head(Block& block, const Place& at, const StageSteps& steps,
                             std::int64_t group, std::int64_t j) const {
        const std::int64_t terms = at.step + at.rows - j;
        const std::uint64_t kept = this->load_terms(block, at, steps, j);
        block.each([&](int thread, Registers& r) {
            Base::clear(r.sums);
            SSM_UNROLL
            for (Real& column : r.columns) column = 0;
            r.rows[0] = r.rows[1] = 0;
            if (thread >= kStageTile) return;
            block.write(
                Base::kRows + thread,
                steps.keeps(thread) ? this->line(this->dA_cumsum, at, at.step + thread) : Real(0));
            block.write(kDiagonal + thread, Real(0));
        });
        block.barrier();
        for (std::int64_t p = 0; p < this->headdim; p += kStageTile) {
            const auto write = [&](int thread) {
                Base::fill(block, thread, Base::left(),
                           steps_of(this->g, at.row, at.first + at.step, at.head, p), at.rows,
                           this->headdim - p);
                Base::fill(block, thread, Base::right(),
                           steps_of(this->x, at.row, at.first + j, at.head, p), terms,
                           this->headdim - p);
            };
            Base::template add<false, false>(block, write,
                                             [](Registers& r) -> auto& { return r.sums; });
        }
        const Plane<2> products = chunk_of(this->CB, at.row, at.chunk, group, at.step, j);
        block.each([&](int thread, Registers& r) {
            Base::with_memory(thread, r.sums, products, at.rows, terms,
                              [&](const auto& spot, Real gx, const auto& CB) {
                                  add_pair(block, at, steps, kept, j, spot, gx, Base::number(CB),
                                           r);
                              });
        });
        block.template sum_lanes<4>([](Registers& r) -> auto& { return r.rows[0]; });
        block.template sum_lanes<4>([](Registers& r) -> auto& { return r.rows[1]; });
        const std::int64_t tile = at.step / kStageTile;
        const std::int64_t line = this->pair_line(at.row, at.chunk, at.head, tile, j / kStageTile);
        block.each([&](int thread, Registers& r) {
            if (thread % 4 != 0) return;
            for (int half = 0; half < 2; ++half)
                this->sums.rows[line + Base::row_of(thread, half)] = r.rows[half];
        });
        Base::add_columns(block, kColumns);
        block.barrier();
        block.each([&](int thread, Registers&) {
            if (thread >= kStageTile) return;
            this->sums.columns[line + thread] = Base::column_sum(block, kColumns, thread);
            if (at.step == j)
                this->sums.diagonal[this->line_of(at.row, at.chunk, at.head, tile) * kStageTile +
                                    thread] = block.read(kDiagonal + thread);
        });
    }

    /// What the pair of a step and a term is for; gx is the product of its gradient and x.
    template <class Block, class Spot>
    SSM_DEVICE void add_pair(Block& block, const Place& at, const StageSteps& steps,
                             std::uint64_t kept, std::int64_t j, const Spot& spot, Real gx, Real CB,
                             Registers& r) const {
        if (!steps.keeps(spot.row) || !this->sees(block, at, kept, j, spot.row, spot.column))
            return;
        const Real step = block.read(Base::kSizes + spot.column);
        gx *= this->between(block, spot.row, spot.column);
        r.total[spot.n][spot.i] += gx * step;
        const Real product = gx * CB;
        // A pair of a step with itself does not decay.
        if (at.step == j && spot.row == spot.column) {
            block.write(kDiagonal + spot.row, product);
        } else {
            r.rows[spot.i / 2] += product * step;
            r.columns[2 * spot.n + spot.i % 2] += product;
        }
    }
};

// What is added up ------------------------------------------------------------------------------

/// ddt and ddA_cumsum from the sums of pairs and of what enters.
template <class Scalar>
struct FinishSteps : OutputAdjoint<Scalar> {
    using Base = OutputAdjoint<Scalar>;
    using typename Base::Place, typename Base::Real;
    static constexpr int kBlocksPerUnit = 8;
    struct Registers {};

    Plane<4> ddt, ddA_cumsum;

    std::int64_t elements() const { return this->batch * this->chunks * this->heads * this->size; }
    std::int64_t blocks() const { return (elements() + Base::kThreads - 1) / Base::kThreads; }
    std::int64_t shared_size() const { return 0; }
    SSM_BOTH std::int64_t matrix_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            StageIndex rest{index * Base::kThreads + thread};
            Place at{};
            at.step = rest.next(this->size), at.chunk = rest.next(this->chunks);
            at.head = rest.next(this->heads), at.row = rest.rest;
            at.first = at.chunk * this->size;
            if (at.row >= this->batch) return;
            const std::int64_t t = at.first + at.step;
            const bool keeps = t < this->seqlen && sequence_at(this->ids, at.row, t) >= 0;
            Real step = 0, decay = 0;
            if (keeps) add(at, step, decay);
            ddt.store(line_at(ddt, at.row, at.head, at.chunk, at.step), step);
            ddA_cumsum.store(line_at(ddA_cumsum, at.row, at.head, at.chunk, at.step), decay);
        });
    }

  private:
    SSM_DEVICE void add(const Place& at, Real& step, Real& decay) const {
        const std::int64_t tile = at.step / kStageTile, place = at.step % kStageTile;
        const std::int64_t own = this->line_of(at.row, at.chunk, at.head, tile);
        const std::int64_t count = least(this->size, this->seqlen - at.first);
        for (std::int64_t n = 0; n < this->state_tiles; ++n)
            decay += this->sums.entering[(own * this->state_tiles + n) * kStageTile + place];
        for (std::int64_t j = 0; j <= tile; ++j)
            decay += this->sums.rows[this->pair_line(at.row, at.chunk, at.head, tile, j) + place];
        for (std::int64_t i = tile; i * kStageTile < count; ++i)
            step += this->sums.columns[this->pair_line(at.row, at.chunk, at.head, i, tile) + place];
        decay -= step * this->line(this->dt, at, at.step);
        step += this->sums.diagonal[own * kStageTile + place];
    }
};

}  // namespace ssm::cuda
