// The gradients of what the last stage of the state-space dual scan multiplies: x, the states that
// enter a chunk, C. docs/ops/ssd_stages.md#backward
#pragma once

#include "ssd_stages_adjoint.cuh"

namespace ssm::cuda {

// Inputs ----------------------------------------------------------------------------------------

/// dx, and dD of each tile of steps.
template <class Scalar>
struct DifferentiateInputs : OutputAdjoint<Scalar> {
    using Base = OutputAdjoint<Scalar>;
    using typename Base::Place, typename Base::Real;
    static constexpr int kBlocksPerUnit = 2;
    static constexpr int kColumns = Base::kD + kStageTile;

    struct Registers {
        Real sums[Base::kSums][4], g[Base::kSums][4];
        Real columns[2 * Base::kSums];
    };

    Plane<4> dx;

    std::int64_t shared_size() const { return kColumns + Base::kWarps * kStageTile; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const Place own = this->place_of(index);
        if (own.rows <= 0) {
            if (this->D)
                block.each([&](int thread, Registers&) { store_skip(own, thread, Real(0)); });
            return;
        }
        const std::int64_t j = own.step, count = own.step + own.rows;
        StageWalk walk(this->ids, own.row, own.first, own.first + count);
        StageSteps steps = walk.next(block, this->ids);
        for (std::int64_t k = 0; k < j; k += kStageTile) steps = walk.next(block, this->ids);
        const std::uint64_t kept = steps.kept;
        block.each([&](int, Registers& r) { Base::clear(r.sums); });
        for (std::int64_t i = j; i < count; i += kStageTile) {
            if (i > j) steps = walk.next(block, this->ids);
            if (steps.start >= j + kStageTile) break;  // nothing later sees these terms
            Place at = own;
            at.step = i, at.rows = count - i;
            add_rows(block, at, steps, j);
        }
        if (this->D) add_skip(block, own, kept);
        block.each([&](int thread, Registers& r) {
            Base::scale_rows(thread, r.sums, [&](int row) -> typename Base::Factor {
                return {(kept >> row & 1) != 0, 1};
            });
            Base::store(thread, r.sums, this->tile_of(dx, own), own.rows, own.columns);
        });
    }

  private:
    /// sums += M^T g for the steps of a tile and the terms from j on.
    template <class Block>
    SSM_DEVICE void add_rows(Block& block, const Place& at, const StageSteps& steps,
                             std::int64_t j) const {
        const std::uint64_t kept = this->load_terms(block, at, steps, j);
        block.each([&](int thread, Registers&) {
            if (thread < kStageTile)
                block.write(Base::kRows + thread,
                            steps.keeps(thread) ? this->line(this->dA_cumsum, at, at.step + thread)
                                                : Real(0));
        });
        block.barrier();
        const auto write = [&](int thread) {
            Base::fill(block, thread, Base::left(),
                       chunk_of(this->CB, at.row, at.chunk, quotient(at.head, this->heads_of_CB),
                                at.step, j),
                       at.rows, at.step + at.rows - j, [&](int row, int term, Real value) {
                           return steps.keeps(row)
                                      ? this->weight(block, at, kept, j, row, term, value)
                                      : Real(0);
                       });
            Base::fill(
                block, thread, Base::right(), this->tile_of(this->g, at), at.rows, at.columns,
                [&](int row, int, Real value) { return steps.keeps(row) ? value : Real(0); });
        };
        Base::template add<true, true>(block, write, [](Registers& r) -> auto& { return r.sums; });
    }

    /// sums += D g, and dD.
    template <class Block>
    SSM_DEVICE void add_skip(Block& block, const Place& own, std::uint64_t kept) const {
        block.each([&](int thread, Registers& r) {
            if (thread < kStageTile)
                block.write(Base::kD + thread, thread < own.columns
                                                   ? this->D.template load<Real>(
                                                         own.head * this->D.stride[0] +
                                                         (own.channel + thread) * this->D.stride[1])
                                                   : Real(0));
            Base::clear(r.g);
            SSM_UNROLL
            for (Real& column : r.columns) column = 0;
        });
        block.barrier();
        block.each([&](int thread, Registers& r) {
            Base::with_memory(thread, r.sums, this->tile_of(this->g, own), own.rows, own.columns,
                              [&](const auto& spot, Real& sum, const auto& memory) {
                                  if (!(kept >> spot.row & 1)) return;
                                  const Real g = Base::number(memory);
                                  sum += block.read(Base::kD + spot.column) * g;
                                  r.g[spot.n][spot.i] = g;
                              });
            Base::with_memory(thread, r.sums, this->tile_of(this->x, own), own.rows, own.columns,
                              [&](const auto& spot, Real, const auto& memory) {
                                  if (kept >> spot.row & 1)
                                      r.columns[2 * spot.n + spot.i % 2] +=
                                          r.g[spot.n][spot.i] * Base::number(memory);
                              });
        });
        Base::add_columns(block, kColumns);
        block.barrier();
        block.each([&](int thread, Registers&) {
            if (thread < kStageTile)
                store_skip(own, thread, Base::column_sum(block, kColumns, thread));
        });
    }

    SSM_DEVICE void store_skip(const Place& own, int column, Real sum) const {
        if (column >= kStageTile || column >= own.columns) return;
        const std::int64_t line =
            ((own.head * this->batch + own.row) * this->chunks + own.chunk) * this->step_tiles +
            own.step / kStageTile;
        this->sums.skips[line * this->headdim + own.channel + column] = sum;
    }
};

// States ----------------------------------------------------------------------------------------

/// dstates_in: sums of exp(a) g C^T over the steps that the state enters.
template <class Scalar>
struct DifferentiateEntering : OutputAdjoint<Scalar> {
    using Base = OutputAdjoint<Scalar>;
    using typename Base::Place, typename Base::Real, typename Base::Registers;
    static constexpr int kBlocksPerUnit = kBeforeHopper ? 3 : Base::kBlocksPerUnit;

    Plane<5> dstates_in;

    std::int64_t blocks() const {
        return this->batch * this->chunks * this->heads * this->channel_tiles * this->state_tiles;
    }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex rest{index};
        Place at{};
        const std::int64_t n = rest.next(this->state_tiles) * kStageTile;
        at.channel = rest.next(this->channel_tiles) * kStageTile;
        at.head = rest.next(this->heads), at.chunk = rest.next(this->chunks), at.row = rest.rest;
        at.first = at.chunk * this->size, at.columns = this->headdim - at.channel;
        const std::int64_t count = least(this->size, this->seqlen - at.first);
        StageWalk walk(this->ids, at.row, at.first, at.first + count);
        block.each([&](int, Registers& r) { Base::clear(r.sums); });
        for (at.step = 0; at.step < count; at.step += kStageTile) {
            at.rows = count - at.step;
            const StageSteps steps = walk.next(block, this->ids);
            if (steps.start >= 0) break;
            block.each([&](int thread, Registers&) {
                if (thread < kStageTile)
                    block.write(Base::kRows + thread,
                                steps.enters(thread)
                                    ? exp_of(this->line(this->dA_cumsum, at, at.step + thread))
                                    : Real(0));
            });
            block.barrier();
            const auto write = [&](int thread) {
                Base::fill(block, thread, Base::left(), this->tile_of(this->g, at), at.rows,
                           at.columns, [&](int row, int, Real value) {
                               return steps.enters(row) ? value * block.read(Base::kRows + row)
                                                        : Real(0);
                           });
                Base::fill(block, thread, Base::right(),
                           steps_of(this->C, at.row, at.first + at.step,
                                    quotient(at.head, this->heads_of_C), n),
                           at.rows, this->dstate - n, [&](int row, int, Real value) {
                               return steps.enters(row) ? value : Real(0);
                           });
            };
            Base::template add<true, true>(block, write,
                                           [](Registers& r) -> auto& { return r.sums; });
        }
        block.each([&](int thread, Registers& r) {
            Base::store(thread, r.sums,
                        chunk_of(dstates_in, at.row, at.chunk, at.head, at.channel, n), at.columns,
                        this->dstate - n);
        });
    }
};

/// dC, added up over the heads of a group, and the decays of what enters.
template <class Scalar>
struct DifferentiateReading : OutputAdjoint<Scalar> {
    using Base = OutputAdjoint<Scalar>;
    using typename Base::Place, typename Base::Real;
    static constexpr int kBlocksPerUnit = 3;

    struct Registers {
        Real sums[Base::kSums][4], total[Base::kSums][4];
        Real rows[2];
    };

    Plane<4> dC;
    std::int64_t groups;

    std::int64_t blocks() const {
        return this->batch * this->chunks * groups * this->step_tiles * this->state_tiles;
    }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex rest{index};
        Place at{};
        const std::int64_t n = rest.next(this->state_tiles) * kStageTile;
        at.step = rest.next(this->step_tiles) * kStageTile;
        const std::int64_t group = rest.next(groups);
        at.chunk = rest.next(this->chunks), at.row = rest.rest;
        at.first = at.chunk * this->size;
        at.rows = least(this->size, this->seqlen - at.first) - at.step;
        if (at.rows <= 0) return;
        StageWalk walk(this->ids, at.row, at.first, at.first + at.step + at.rows);
        StageSteps steps = walk.next(block, this->ids);
        for (std::int64_t k = 0; k < at.step; k += kStageTile) steps = walk.next(block, this->ids);
        block.each([&](int, Registers& r) { Base::clear(r.total); });
        const std::int64_t from = group * this->heads_of_C;
        for (at.head = from; at.head < from + this->heads_of_C; ++at.head)
            add_head(block, at, steps, group, n);
        block.each([&](int thread, Registers& r) {
            Base::store(thread, r.total, steps_of(dC, at.row, at.first + at.step, group, n),
                        at.rows, this->dstate - n);
        });
    }

  private:
    template <class Block>
    SSM_DEVICE void add_head(Block& block, const Place& at, const StageSteps& steps,
                             std::int64_t group, std::int64_t n) const {
        block.each([&](int, Registers& r) {
            Base::clear(r.sums);
            r.rows[0] = r.rows[1] = 0;
        });
        for (std::int64_t p = 0; p < this->headdim && steps.start < 0; p += kStageTile) {
            const auto write = [&](int thread) {
                Base::fill(block, thread, Base::left(),
                           steps_of(this->g, at.row, at.first + at.step, at.head, p), at.rows,
                           this->headdim - p);
                Base::fill(block, thread, Base::right(),
                           chunk_of(this->states_in, at.row, at.chunk, at.head, p, n),
                           this->headdim - p, this->dstate - n);
            };
            Base::template add<false, true>(block, write,
                                            [](Registers& r) -> auto& { return r.sums; });
        }
        block.each([&](int thread, Registers& r) {
            Base::scale_rows(thread, r.sums, [&](int row) -> typename Base::Factor {
                const bool enters = row < at.rows && steps.enters(row);
                return {enters,
                        enters ? exp_of(this->line(this->dA_cumsum, at, at.step + row)) : Real(0)};
            });
            Base::with_memory(
                thread, r.sums, steps_of(this->C, at.row, at.first + at.step, group, n), at.rows,
                this->dstate - n, [&](const auto& spot, Real sum, const auto& memory) {
                    r.total[spot.n][spot.i] += sum;
                    if (steps.enters(spot.row)) r.rows[spot.i / 2] += sum * Base::number(memory);
                });
        });
        block.template sum_lanes<4>([](Registers& r) -> auto& { return r.rows[0]; });
        block.template sum_lanes<4>([](Registers& r) -> auto& { return r.rows[1]; });
        const std::int64_t line =
            this->line_of(at.row, at.chunk, at.head, at.step / kStageTile) * this->state_tiles +
            n / kStageTile;
        block.each([&](int thread, Registers& r) {
            if (thread % 4 != 0) return;
            for (int half = 0; half < 2; ++half)
                this->sums.entering[line * kStageTile + Base::row_of(thread, half)] = r.rows[half];
        });
    }
};

}  // namespace ssm::cuda
