// The second and the third stage of the state-space dual scan, backward: what a chunk adds to the
// state, and how the state goes from chunk to chunk.
#pragma once

#include "ssd_stages_tile.cuh"

namespace ssm::cuda {

// What a chunk adds to the state ----------------------------------------------------------------

/// What both kernels of the second stage read.
template <class Scalar>
struct StateAdjoint : StageTiles<Scalar> {
    using Tiles = StageTiles<Scalar>;
    using typename Tiles::Real;

    Plane<4> x, B, dt, dA_cumsum;
    StageIds ids;
    Plane<5> dstates;
    std::int64_t batch, seqlen, heads, headdim, dstate, chunks, size, groups, group_heads;
    std::int64_t step_tiles, state_tiles;

    StateAdjoint() = default;
    StateAdjoint(const SsdChunkStateArgs& args, const SsdChunkStateGrads& grads)
        : x(plane<4>(args.x)),
          B(plane<4>(args.B)),
          dt(plane<4>(args.dt)),
          dA_cumsum(plane<4>(args.dA_cumsum)),
          ids{plane<2>(args.seq_idx)},
          dstates(plane<5>(grads.dstates)),
          batch(args.x.shape[0]),
          seqlen(args.x.shape[1]),
          heads(args.x.shape[2]),
          headdim(args.x.shape[3]),
          dstate(args.B.shape[3]),
          chunks(args.dt.shape[2]),
          size(args.dt.shape[3]),
          groups(args.B.shape[2]),
          group_heads(heads / groups),
          step_tiles(stage_tiles(size < seqlen ? size : seqlen)),
          state_tiles(stage_tiles(dstate)) {}

    SSM_DEVICE Real line(const Plane<4>& tensor, std::int64_t row, std::int64_t head,
                         std::int64_t chunk, std::int64_t step) const {
        return tensor.template load<Real>(line_at(tensor, row, head, chunk, step));
    }
};

/// dx, ddt and ddA_cumsum of one chunk and head.
template <class Scalar>
struct DifferentiateAdded : StateAdjoint<Scalar> {
    using Base = StateAdjoint<Scalar>;
    using typename Base::Real;
    static constexpr int kBlocksPerUnit = 3;

    struct Registers {
        Real sums[Base::kSums][4];
        Real dots[2];  // of x and what it is multiplied with, of the rows of a thread
        Real total;    // gradient of the decay of the chunk
    };

    Plane<4> dx, ddt, ddA_cumsum;

    using Base::Base;
    std::int64_t blocks() const { return this->batch * this->chunks * this->heads; }
    std::int64_t shared_size() const { return Base::kThreads / kWarp; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex rest{index};
        const std::int64_t head = rest.next(this->heads), chunk = rest.next(this->chunks);
        const std::int64_t row = rest.rest, first = chunk * this->size;
        const std::int64_t end = least(first + this->size, this->seqlen);
        const std::int64_t open =
            StageWalk(this->ids, row, first, end).last_start(block, this->ids);
        const Real last = this->line(this->dA_cumsum, row, head, chunk, this->size - 1);
        block.each([&](int, Registers& r) { r.total = 0; });
        for (std::int64_t i = 0; i < this->size; i += kStageTile) {
            const std::uint64_t hands_on =
                kept_steps(block, this->ids, row, first + i, end) & ~first_bits(open - i);
            block.each([&](int, Registers& r) { r.dots[0] = r.dots[1] = 0; });
            for (std::int64_t p = 0; p < this->headdim && first + i < end; p += kStageTile)
                add_slab(block, row, chunk, head, i, p, end, last, hands_on);
            block.template sum_lanes<4>([](Registers& r) -> auto& { return r.dots[0]; });
            block.template sum_lanes<4>([](Registers& r) -> auto& { return r.dots[1]; });
            block.each([&](int thread, Registers& r) {
                if (thread % 4 != 0) return;
                for (int half = 0; half < 2; ++half) {
                    const int in_tile = Base::row_of(thread, half);
                    const std::int64_t step = i + in_tile;
                    if (step >= this->size) continue;
                    Real dstep = 0, through = 0;
                    if (hands_on >> in_tile & 1) {
                        dstep = into(row, chunk, head, step, last) * r.dots[half];
                        through = this->line(this->dt, row, head, chunk, step) * dstep;
                    }
                    ddt.store(line_at(ddt, row, head, chunk, step), dstep);
                    // The last step of a whole chunk has its own decay on both sides.
                    if (step == this->size - 1) continue;
                    r.total += through;
                    ddA_cumsum.store(line_at(ddA_cumsum, row, head, chunk, step), -through);
                }
            });
        }
        block.template sum_lanes<8, 4>([](Registers& r) -> auto& { return r.total; });
        block.each([&](int thread, Registers& r) {
            if (thread % kWarp == 0) block.write(thread / kWarp, r.total);
        });
        block.barrier();
        block.each([&](int thread, Registers&) {
            if (thread != 0) return;
            Real sum = 0;
            for (int warp = 0; warp < Base::kThreads / kWarp; ++warp) sum += block.read(warp);
            ddA_cumsum.store(line_at(ddA_cumsum, row, head, chunk, this->size - 1), sum);
        });
    }

  private:
    /// The decay from a step to the end of the chunk.
    SSM_DEVICE Real into(std::int64_t row, std::int64_t chunk, std::int64_t head, std::int64_t step,
                         Real last) const {
        return exp_of(last - this->line(this->dA_cumsum, row, head, chunk, step));
    }

    /// dx of a tile of steps and channels, and its share of the rows' dots.
    template <class Block>
    SSM_DEVICE void add_slab(Block& block, std::int64_t row, std::int64_t chunk, std::int64_t head,
                             std::int64_t i, std::int64_t p, std::int64_t end, Real last,
                             std::uint64_t hands_on) const {
        const std::int64_t t = chunk * this->size + i, group = quotient(head, this->group_heads);
        block.each([&](int, Registers& r) { Base::clear(r.sums); });
        for (std::int64_t n = 0; n < this->dstate && hands_on != 0; n += kStageTile) {
            const auto write = [&](int thread) {
                Base::fill(block, thread, Base::left(), steps_of(this->B, row, t, group, n),
                           end - t, this->dstate - n);
                Base::fill(block, thread, Base::right(),
                           chunk_of(this->dstates, row, chunk, head, p, n), this->headdim - p,
                           this->dstate - n);
            };
            Base::template add<false, false>(block, write,
                                             [](Registers& r) -> auto& { return r.sums; });
        }
        block.each([&](int thread, Registers& r) {
            Base::with_memory(thread, r.sums, steps_of(this->x, row, t, head, p), end - t,
                              this->headdim - p,
                              [&](const auto& spot, Real sum, const auto& memory) {
                                  r.dots[spot.i / 2] += sum * Base::number(memory);
                              });
            Base::scale_rows(thread, r.sums, [&](int in_tile) -> typename Base::Factor {
                if (!(hands_on >> in_tile & 1)) return {false, 0};
                return {true, into(row, chunk, head, i + in_tile, last) *
                                  this->line(this->dt, row, head, chunk, i + in_tile)};
            });
            Base::store(thread, r.sums, steps_of(dx, row, t, head, p), end - t, this->headdim - p);
        });
    }
};

/// dB, added up over the heads of a group.
template <class Scalar>
struct DifferentiateAdding : StateAdjoint<Scalar> {
    using Base = StateAdjoint<Scalar>;
    using typename Base::Real, typename Base::Registers;

    Plane<4> dB;

    using Base::Base;
    std::int64_t blocks() const {
        return this->batch * this->chunks * this->groups * this->step_tiles * this->state_tiles;
    }
    std::int64_t shared_size() const { return kStageTile; }  // the weights of a tile of steps

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex rest{index};
        const std::int64_t n = rest.next(this->state_tiles) * kStageTile;
        const std::int64_t i = rest.next(this->step_tiles) * kStageTile;
        const std::int64_t group = rest.next(this->groups), chunk = rest.next(this->chunks);
        const std::int64_t row = rest.rest, first = chunk * this->size, t = first + i;
        const std::int64_t end = least(first + this->size, this->seqlen);
        if (t >= end) return;
        const std::int64_t open =
            StageWalk(this->ids, row, first, end).last_start(block, this->ids);
        const std::uint64_t hands_on =
            kept_steps(block, this->ids, row, t, end) & ~first_bits(open - i);
        block.each([&](int, Registers& r) { Base::clear(r.sums); });
        for (std::int64_t head = group * this->group_heads;
             head < (group + 1) * this->group_heads && hands_on != 0; ++head) {
            const Real last = this->line(this->dA_cumsum, row, head, chunk, this->size - 1);
            block.each([&](int thread, Registers&) {
                if (thread >= kStageTile) return;
                const auto value = [&](const Plane<4>& tensor) {
                    return this->line(tensor, row, head, chunk, i + thread);
                };
                block.write(thread, hands_on >> thread & 1
                                        ? exp_of(last - value(this->dA_cumsum)) * value(this->dt)
                                        : Real(0));
            });
            block.barrier();
            for (std::int64_t p = 0; p < this->headdim; p += kStageTile) {
                const auto write = [&](int thread) {
                    Base::fill(block, thread, Base::left(), steps_of(this->x, row, t, head, p),
                               end - t, this->headdim - p, [&](int step, int, Real value) {
                                   return hands_on >> step & 1 ? value * block.read(step) : Real(0);
                               });
                    Base::fill(block, thread, Base::right(),
                               chunk_of(this->dstates, row, chunk, head, p, n), this->headdim - p,
                               this->dstate - n);
                };
                Base::template add<false, true>(block, write,
                                                [](Registers& r) -> auto& { return r.sums; });
            }
        }
        block.each([&](int thread, Registers& r) {
            Base::scale_rows(thread, r.sums, [&](int step) -> typename Base::Factor {
                return {(hands_on >> step & 1) != 0, 1};
            });
            Base::store(thread, r.sums, steps_of(dB, row, t, group, n), end - t, this->dstate - n);
        });
    }
};

// From chunk to chunk ---------------------------------------------------------------------------

template <class Real>
struct DifferentiatePassing {
    static constexpr int kThreads = StagePassing::kThreads;
    static constexpr int kBlocksPerUnit = 8;

    struct Registers {
        Real dh[StagePassing::kOwn];
        Real sum;
    };

    Plane<5> states_in, dstates_in, dstates;
    Plane<4> dA_cumsum, dfinal_states, dinitial_states;
    StagePassing cut;
    Real* shares;  // (B, H, C, warps of all parts): of the decay of a chunk

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex rest{index};
        const std::int64_t part = rest.next(cut.parts), head = rest.next(cut.heads);
        const std::int64_t row = rest.rest;
        block.each([&](int thread, Registers& r) {
            SSM_UNROLL
            for (Real& dh : r.dh) dh = 0;
            if (!dfinal_states) return;
            cut.each(part, thread, [&](int i, std::int64_t p, std::int64_t n) {
                r.dh[i] =
                    dfinal_states.template load<Real>(line_at(dfinal_states, row, head, p, n));
            });
        });
        for (std::int64_t chunk = cut.chunks; chunk-- > 0;) {
            const bool goes_on = cut.goes_on(block, row, chunk);
            const Real decay = exp_of(
                dA_cumsum.template load<Real>(line_at(dA_cumsum, row, head, chunk, cut.size - 1)));
            block.each([&](int thread, Registers& r) {
                r.sum = 0;
                cut.each(part, thread, [&](int i, std::int64_t p, std::int64_t n) {
                    const auto at = [&](const Plane<5>& tensor) {
                        return state_at(tensor, row, chunk, head, p, n);
                    };
                    dstates.store(at(dstates), r.dh[i]);
                    const Real given =
                        dstates_in ? dstates_in.template load<Real>(at(dstates_in)) : Real(0);
                    // Selected: what does not go on may be no number.
                    if (goes_on) r.sum += states_in.template load<Real>(at(states_in)) * r.dh[i];
                    r.dh[i] = (goes_on ? decay * r.dh[i] : Real(0)) + given;
                });
            });
            block.template sum_lanes<kWarp>([](Registers& r) -> auto& { return r.sum; });
            block.each([&](int thread, Registers& r) {
                if (thread % kWarp != 0) return;
                const std::int64_t line = (row * cut.heads + head) * cut.chunks + chunk;
                shares[line * cut.shares() + part * (kThreads / kWarp) + thread / kWarp] =
                    goes_on ? decay * r.sum : Real(0);
            });
        }
        if (!dinitial_states) return;
        block.each([&](int thread, Registers& r) {
            cut.each(part, thread, [&](int i, std::int64_t p, std::int64_t n) {
                dinitial_states.store(line_at(dinitial_states, row, head, p, n), r.dh[i]);
            });
        });
    }
};

/// ddA_cumsum: only the last element of a line is read.
template <class Real>
struct FinishPassing {
    static constexpr int kThreads = 128;
    static constexpr int kBlocksPerUnit = 8;

    struct Registers {
        Real sum;
    };

    Plane<4> ddA_cumsum;
    StagePassing cut;
    const Real* shares;

    std::int64_t blocks() const { return cut.batch * cut.heads * cut.chunks; }
    std::int64_t shared_size() const { return kThreads / kWarp; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex rest{index};
        const std::int64_t chunk = rest.next(cut.chunks), head = rest.next(cut.heads);
        const std::int64_t row = rest.rest;
        block.each([&](int thread, Registers& r) {
            r.sum = 0;
            for (std::int64_t i = thread; i < cut.shares(); i += kThreads)
                r.sum += shares[index * cut.shares() + i];
            for (std::int64_t i = thread; i < cut.size - 1; i += kThreads)
                ddA_cumsum.store(line_at(ddA_cumsum, row, head, chunk, i), Real(0));
        });
        block.template sum_lanes<kWarp>([](Registers& r) -> auto& { return r.sum; });
        block.each([&](int thread, Registers& r) {
            if (thread % kWarp == 0) block.write(thread / kWarp, r.sum);
        });
        block.barrier();
        block.each([&](int thread, Registers&) {
            if (thread != 0) return;
            Real sum = 0;
            for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += block.read(warp);
            ddA_cumsum.store(line_at(ddA_cumsum, row, head, chunk, cut.size - 1), sum);
        });
    }
};

}  // namespace ssm::cuda
