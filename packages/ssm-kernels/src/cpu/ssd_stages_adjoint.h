// The last stage of the chunked state-space dual scan, backward, in five passes.
// docs/ops/ssd_stages.md#backward
#pragma once

#include "../op/scratch.h"
#include "parallel.h"
#include "ssd_stages_output.h"

namespace ssm::cpu::SSM_ISA {

/// dots[i] = a_i . b_i for rows of `pitch` elements, whole vectors.
template <class T>
void dot_rows(T* dots, const T* a, const T* b, std::int64_t pitch, std::int64_t rows) {
    T lines[kRowBlock * kLanes<T>] = {};
    for (std::int64_t i = 0; i < rows; ++i) {
        Vec<T> sum = zero<T>();
        for (std::int64_t p = i * pitch; p < (i + 1) * pitch; p += kLanes<T>)
            sum += load<T>(a + p) * load<T>(b + p);
        store<T>(lines + i * kLanes<T>, sum);
    }
    for (std::int64_t i = 0; i < kRowBlock; i += kLanes<T>)
        store<T>(dots + i, sum_lanes_of(lines + i * kLanes<T>));
}

/// a . b for whole vectors, in an order that depends on `count` alone.
template <class T>
T dot(const T* a, const T* b, std::int64_t count) {
    Vec<T> sums[4] = {};
    for (std::int64_t i = 0, v = 0; i < count; i += kLanes<T>, v = (v + 1) % 4)
        sums[v] += load<T>(a + i) * load<T>(b + i);
    return reduce_add<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/// row *= factor, or 0 whatever it holds.
template <class T>
SSM_INLINE void scale_row(T* row, std::int64_t pitch, T factor, bool counts) {
    for (std::int64_t p = 0; p < pitch; p += kLanes<T>)
        store<T>(row + p, counts ? load<T>(row + p) * factor : zero<T>());
}

/// Working memory of a block of kRowBlock terms j, with all steps i of the chunk that see them.
template <class T>
struct PairTile {
    std::int64_t tall;  // channels, whole panels
    T* CB;              // [i][j], from the first i that sees one
    T* dCB;             // [i][j]  summed over heads
    T* pairs;           // [i][j]  g_i . x_j; then the weights of the terms
    T* x;               // [j][channel]
    T* x_t;             // [channel][j]
    T* dx;              // [j][channel]
    T* g;               // [i][channel]
    T* D;               // [channel]

    static std::int64_t elements(std::int64_t size, std::int64_t tall) {
        return kRowBlock * (2 * size + kRowBlock + 4 * tall) + tall;
    }
    PairTile(T* memory, std::int64_t size, std::int64_t tall)
        : tall(tall),
          CB(memory),
          dCB(CB + size * kRowBlock),
          pairs(dCB + size * kRowBlock),
          x(pairs + kRowBlock * kRowBlock),
          x_t(x + kRowBlock * tall),
          dx(x_t + kRowBlock * tall),
          g(dx + kRowBlock * tall),
          D(g + kRowBlock * tall) {}
};

/// What the pairs of one head with a block of terms give to the terms.
template <class T>
struct TermSums {
    T step[kRowBlock] = {};   // gradient of dt
    T decay[kRowBlock] = {};  // of the sum of decays, divided by -dt
};

/// One block of pairs: adds up dCB and the terms' sums, leaves the weights in tile.pairs, and gives
/// the rows' gradients of the sum of decays.
template <class T>
void differentiate_pairs(const ChunkSteps& steps, const Terms<T>& terms, const T* decays,
                         std::int64_t i0, std::int64_t rows, const PairTile<T>& tile,
                         TermSums<T>& sums, T* ddecay) {
    T lines[kRowBlock * kLanes<T>] = {};
    const std::int64_t end = round_up(terms.count, kLanes<T>);
    for (std::int64_t i = 0; i < rows; ++i) {
        const std::int64_t at = (i0 - terms.begin + i) * kRowBlock;
        const auto reach = terms.reach_of(steps, i0 + i);
        const Vec<T> decay = broadcast(decays[i]);
        // A pair of a step with itself has no decay.
        const T self = static_cast<T>(i0 - terms.begin + i);
        Vec<T> sum = zero<T>();
        for (std::int64_t j = 0; j < end; j += kLanes<T>) {
            T* const pair = tile.pairs + i * kRowBlock + j;
            const Vec<T> between = exp_any<T>(decay - load<T>(terms.decay + j));
            const Vec<T> step = load<T>(terms.step + j);
            const Vec<T> CB = terms.seen(reach, j, load<T>(tile.CB + at + j));
            const Vec<T> gx = terms.seen(reach, j, load<T>(pair) * between);
            const Vec<T> product = gx * CB;
            store<T>(pair, terms.seen(reach, j, CB * between) * step);
            store<T>(tile.dCB + at + j, load<T>(tile.dCB + at + j) + gx * step);
            store<T>(sums.step + j, load<T>(sums.step + j) + product);
            const Vec<T> crossing = load<T>(terms.place + j) < self ? product : zero<T>();
            store<T>(sums.decay + j, load<T>(sums.decay + j) + crossing);
            sum += crossing * step;
        }
        store<T>(lines + i * kLanes<T>, sum);
    }
    for (std::int64_t i = 0; i < kRowBlock; i += kLanes<T>)
        store<T>(ddecay + i, sum_lanes_of(lines + i * kLanes<T>));
}

/// All gradients of one call.
template <class T>
class OutputAdjoint {
  public:
    OutputAdjoint(const SsdChunkOutputArgs& args, const SsdChunkOutputGrads& grads,
                  const std::int64_t* origins)
        : args_(args),
          grads_(grads),
          origins_(origins),
          cut_(args),
          blocks_(blocks_of(cut_.size, kRowBlock)),
          tall_(padded<T>(cut_.headdim)),
          wide_(padded<T>(cut_.dstate)),
          g_(grads.dy) {}

    void run(int threads) {
        const std::int64_t states = min(kWidthBlock, wide_);
        const std::int64_t lines = cut_.batch * cut_.nchunks * cut_.heads;
        const std::int64_t gated =
            args_.z.ndim >= 0 ? cut_.batch * cut_.seqlen * cut_.heads * cut_.headdim : 0;
        const std::int64_t decays = lines * blocks_ * cut_.size;
        const std::int64_t skips = args_.D.ndim >= 0 ? lines * blocks_ * tall_ : 0;
        local_ = max(max(OutputTile<T>::elements(min(kWidthBlock, tall_)),
                         PairTile<T>::elements(min(cut_.size, cut_.seqlen) + kRowBlock, tall_)),
                     max(StateSum<T>::elements(kDepthBlock, kRowBlock, states),
                         kRowBlock * (tall_ + 3 * wide_) + kDepthBlock * states));
        threads_ = threads_for(2 * cut_.work(), threads);
        const Scratch scratch(sizeof(T) *
                              static_cast<std::size_t>(gated + decays + skips + local_ * threads_));
        T* const gate = static_cast<T*>(scratch.data());
        decays_ = gate + gated;
        skips_ = decays_ + decays;
        memory_ = skips_ + skips;
        if (args_.z.ndim >= 0) differentiate_gates(gate);
        differentiate_terms();
        differentiate_states();
        differentiate_rows();
        if (args_.D.ndim >= 0) add_skips();
    }

  private:
    static constexpr DType kDType = std::is_same_v<T, double> ? DType::f64 : DType::f32;

    T* local(int thread) const { return memory_ + local_ * thread; }

    /// What the terms of block j give to the decays of their chunk: one line per head and block.
    T* decay_line(std::int64_t row, std::int64_t chunk, std::int64_t head, std::int64_t j) const {
        return decays_ +
               (((row * cut_.nchunks + chunk) * cut_.heads + head) * blocks_ + j) * cut_.size;
    }
    T* skip_line(std::int64_t row, std::int64_t chunk, std::int64_t head, std::int64_t j) const {
        return skips_ + (((row * cut_.nchunks + chunk) * cut_.heads + head) * blocks_ + j) * tall_;
    }
    ChunkSteps steps_of(std::int64_t row, std::int64_t chunk) const {
        return ChunkSteps(origins_, row, chunk, cut_.size, cut_.seqlen);
    }

    /// dz, and the gradients of the outputs before the gate, which take the place of dy.
    void differentiate_gates(T* gate) {
        g_.data = gate;
        g_.dtype = kDType;
        g_.stride[3] = 1;
        for (int axis = 2; axis >= 0; --axis)
            g_.stride[axis] = g_.stride[axis + 1] * g_.shape[axis + 1];
        parallel_for(cut_.tasks(), threads_, [&](std::int64_t task, int thread) {
            const OutputTile<T> tile(local(thread), min(kWidthBlock, tall_));
            const OutputBlock at = cut_.block(task);
            if (at.rows <= 0) return;
            const ChunkSteps steps = steps_of(at.row, at.chunk);
            const std::int64_t pitch = padded<T>(at.columns), t0 = steps.first + at.i0;
            compute_outputs<T>(args_, steps, at, tile);
            const auto plane = [&](const TensorView& view) {
                return steps_at(view, at.row, t0, at.head, at.p0);
            };
            load_padded(tile.operand, pitch, plane(args_.z), at.rows, at.columns);
            load_padded(tile.factor, pitch, plane(grads_.dy), at.rows, at.columns);
            for (std::int64_t i = 0; i < at.rows * pitch; i += kLanes<T>) {
                const Vec<T> dy = load<T>(tile.factor + i), z = load<T>(tile.operand + i);
                const Vec<T> s = sigmoid<T>(z), slope = s * (T(1) + z * (T(1) - s));
                store<T>(tile.operand + i, dy * load<T>(tile.y + i) * slope);
                store<T>(tile.factor + i, dy * s * z);
            }
            for (std::int64_t i = 0; i < at.rows; ++i)
                for (T* line : {tile.operand + i * pitch, tile.factor + i * pitch})
                    if (!steps.keeps(at.i0 + i)) fill(line, pitch, T(0));
            store_tile(plane(grads_.dz), tile.operand, pitch, at.rows, at.columns);
            store_tile(plane(g_), tile.factor, pitch, at.rows, at.columns);
        });
    }

    /// dCB, dx, ddt, and per block of terms what it gives to the decays and to dD. A task has the
    /// heads of a group.
    void differentiate_terms() {
        const std::int64_t groups = args_.CB.shape[2], per_group = cut_.heads / groups;
        parallel_for(
            cut_.batch * cut_.nchunks * groups * blocks_, threads_,
            [&](std::int64_t task, int thread) {
                const PairTile<T> tile(local(thread), min(cut_.size, cut_.seqlen) + kRowBlock,
                                       tall_);
                TaskIndex index{task};
                const std::int64_t j = index.next(blocks_), group = index.next(groups);
                const std::int64_t chunk = index.next(cut_.nchunks), row = index.rest;
                const std::int64_t j0 = j * kRowBlock, width = min(kRowBlock, cut_.size - j0);
                const ChunkSteps steps = steps_of(row, chunk);
                const std::int64_t seen = max(0, steps.count - j0);  // steps i from j0 on
                const auto store_rows = [&](const T* from, std::int64_t i, std::int64_t rows) {
                    store_tile(pairs_at(grads_.dCB, row, chunk, group, i, j0), from, kRowBlock,
                               rows, width);
                };
                fill(tile.pairs, kRowBlock * kRowBlock, T(0));
                for (std::int64_t i = 0; i < cut_.size; i += kRowBlock)
                    if (i < j0 || i >= steps.count)
                        store_rows(tile.pairs, i, min(kRowBlock, cut_.size - i));
                for (std::int64_t i = 0; i < seen; i += kRowBlock) {
                    const std::int64_t rows = min(kRowBlock, seen - i);
                    load_padded(tile.CB + i * kRowBlock, kRowBlock,
                                pairs_at(args_.CB, row, chunk, group, j0 + i, j0), rows,
                                min(width, seen));
                    fill(tile.dCB + i * kRowBlock, kRowBlock * kRowBlock, T(0));
                }
                for (std::int64_t h = group * per_group; h < (group + 1) * per_group; ++h)
                    differentiate_head(steps, row, chunk, h, j, tile);
                for (std::int64_t i = 0; i < seen; i += kRowBlock)
                    store_rows(tile.dCB + i * kRowBlock, j0 + i,
                               min(kRowBlock, cut_.size - j0 - i));
            });
    }

    /// One block of terms of one head.
    void differentiate_head(const ChunkSteps& steps, std::int64_t row, std::int64_t chunk,
                            std::int64_t head, std::int64_t j, const PairTile<T>& tile) const {
        const std::int64_t j0 = j * kRowBlock, width = min(kRowBlock, cut_.size - j0);
        const std::int64_t headdim = cut_.headdim, count = max(0, min(width, steps.count - j0));
        TermSums<T> sums;
        T* const ddecays = decay_line(row, chunk, head, j);
        if (count > 0) {
            const Terms<T> terms(args_, steps, row, chunk, head, j0);
            load_kept(tile.x, tall_, steps_at(args_.x, row, steps.first + j0, head, 0), steps, j0,
                      count, headdim);
            load_padded(tile.x_t, kRowBlock, {tile.x, kDType, 1, tall_}, tall_, count);
            fill(tile.dx, count * tall_, T(0));
            for (std::int64_t i0 = j0; i0 < steps.count; i0 += kRowBlock) {
                const std::int64_t rows = min(kRowBlock, steps.count - i0);
                T decays[kRowBlock];
                load_padded(decays, kRowBlock, line_at(args_.dA_cumsum, row, head, chunk, i0), 1,
                            rows);
                load_kept(tile.g, tall_, steps_at(g_, row, steps.first + i0, head, 0), steps, i0,
                          rows, headdim);
                if (i0 == j0 && args_.D.ndim >= 0)
                    differentiate_skip(row, chunk, head, j, count, tile);
                fill(tile.pairs, rows * kRowBlock, T(0));
                // On the diagonal only i >= j is used.
                const std::int64_t last = padded<T>(count);
                for (std::int64_t c = 0; c < last; c += kPanel<T>) {
                    const std::int64_t above = i0 == j0 ? min(c, rows) : 0;
                    multiply<T>(tile.pairs + above * kRowBlock + c, kRowBlock,
                                {tile.g + above * tall_, tall_, 1}, tile.x_t + c, kRowBlock,
                                rows - above, tall_, kPanel<T>);
                }
                T ddecay[kRowBlock];
                differentiate_pairs(steps, terms, decays, i0, rows, tile, sums, ddecay);
                std::memcpy(ddecays + i0, ddecay, sizeof(T) * static_cast<std::size_t>(rows));
                const Factor<T> weights{tile.pairs, 1, kRowBlock};
                if (i0 == j0)
                    multiply<T, Triangle::upper>(tile.dx, tall_, weights, tile.g, tall_, count,
                                                 rows, tall_);
                else
                    multiply<T>(tile.dx, tall_, weights, tile.g, tall_, count, rows, tall_);
            }
            for (std::int64_t i = 0; i < count; ++i) {
                ddecays[j0 + i] -= sums.decay[i] * terms.step[i];
                if (!steps.keeps(j0 + i)) fill(tile.dx + i * tall_, tall_, T(0));
            }
            store_tile(steps_at(grads_.dx, row, steps.first + j0, head, 0), tile.dx, tall_, count,
                       headdim);
        }
        store_tile(line_at(grads_.ddt, row, head, chunk, j0), sums.step, 0, 1, width);
    }

    /// dx = D g, and dD of the block.
    void differentiate_skip(std::int64_t row, std::int64_t chunk, std::int64_t head, std::int64_t j,
                            std::int64_t count, const PairTile<T>& tile) const {
        const TensorView& D = args_.D;
        load_padded(tile.D, tall_, plane_at(D, head * D.stride[0], 0, D.stride[1]), 1,
                    cut_.headdim);
        T* const sums = skip_line(row, chunk, head, j);
        fill(sums, tall_, T(0));
        for (std::int64_t i = 0; i < count; ++i)
            for (std::int64_t p = 0; p < tall_; p += kLanes<T>) {
                const Vec<T> g = load<T>(tile.g + i * tall_ + p);
                store<T>(tile.dx + i * tall_ + p, load<T>(tile.D + p) * g);
                store<T>(sums + p, load<T>(sums + p) + g * load<T>(tile.x + i * tall_ + p));
            }
    }

    /// dstates_in: each is what a chunk would add to a state that runs back in time.
    void differentiate_states() const {
        const std::int64_t per_group = cut_.heads / args_.C.shape[2];
        const std::int64_t row_blocks = blocks_of(cut_.headdim, kRowBlock);
        const std::int64_t width_blocks = blocks_of(cut_.dstate, kWidthBlock);
        const std::int64_t tasks =
            cut_.batch * cut_.nchunks * cut_.heads * row_blocks * width_blocks;
        parallel_for(tasks, threads_, [&](std::int64_t task, int thread) {
            const StateSum<T> tile(local(thread), kDepthBlock, kRowBlock, min(kWidthBlock, wide_));
            TaskIndex index{task};
            const std::int64_t n0 = index.next(width_blocks) * kWidthBlock;
            const std::int64_t p0 = index.next(row_blocks) * kRowBlock;
            const std::int64_t head = index.next(cut_.heads), chunk = index.next(cut_.nchunks);
            const std::int64_t row = index.rest;
            const std::int64_t columns = min(kWidthBlock, cut_.dstate - n0);
            const std::int64_t rows = min(kRowBlock, cut_.headdim - p0);
            const ChunkSteps steps = steps_of(row, chunk);
            tile.compute(
                steps_at(g_, row, steps.first, head, p0),
                steps_at(args_.C, row, steps.first, head / per_group, n0), 0, entering(steps), rows,
                columns,
                [&](std::int64_t k0, std::int64_t depth) {
                    load_padded(tile.weight, kDepthBlock,
                                line_at(args_.dA_cumsum, row, head, chunk, k0), 1, depth);
                    for (std::int64_t k = 0; k < depth; k += kLanes<T>)
                        store<T>(tile.weight + k, exp_any<T>(load<T>(tile.weight + k)));
                },
                [&](std::int64_t k) { return steps.enters(k); });
            store_tile(state_at(grads_.dstates_in, row, chunk, head, p0, n0), tile.sum,
                       padded<T>(columns), rows, columns);
        });
    }

    /// How many steps of a chunk can be such that the state reaches them.
    static std::int64_t entering(const ChunkSteps& steps) {
        for (std::int64_t i = steps.count; i > 0; --i)
            if (steps.enters(i - 1)) return i;
        return 0;
    }

    /// dC and ddA_cumsum. A task has a block of steps and the heads of a group.
    void differentiate_rows() const {
        const std::int64_t groups = args_.C.shape[2], per_group = cut_.heads / groups;
        parallel_for(
            cut_.batch * cut_.nchunks * groups * blocks_, threads_,
            [&](std::int64_t task, int thread) {
                T* const g = local(thread);                // [step][channel]
                T* const product = g + kRowBlock * tall_;  // [step][state]  g states_in
                T* const C = product + kRowBlock * wide_;
                T* const dC = C + kRowBlock * wide_;
                T* const buffer = dC + kRowBlock * wide_;
                TaskIndex index{task};
                const std::int64_t block = index.next(blocks_), group = index.next(groups);
                const std::int64_t chunk = index.next(cut_.nchunks), row = index.rest;
                const std::int64_t i0 = block * kRowBlock, rows = min(kRowBlock, cut_.size - i0);
                const ChunkSteps steps = steps_of(row, chunk);
                const std::int64_t inside = max(0, min(rows, steps.count - i0));
                const std::int64_t reached = max(0, min(inside, entering(steps) - i0));
                load_padded(C, wide_, steps_at(args_.C, row, steps.first + i0, group, 0), reached,
                            cut_.dstate);
                fill(dC, inside * wide_, T(0));
                for (std::int64_t h = group * per_group; h < (group + 1) * per_group; ++h) {
                    T ddecay[kRowBlock] = {}, into[kRowBlock] = {};
                    if (reached > 0) {
                        load_padded(into, kRowBlock, line_at(args_.dA_cumsum, row, h, chunk, i0), 1,
                                    reached);
                        for (std::int64_t i = 0; i < kRowBlock; i += kLanes<T>)
                            store<T>(into + i, exp_any<T>(load<T>(into + i)));
                        load_padded(g, tall_, steps_at(g_, row, steps.first + i0, h, 0), reached,
                                    cut_.headdim);
                        fill(product, reached * wide_, T(0));
                        multiply_plane<T>(product, wide_, {g, tall_, 1},
                                          state_at(args_.states_in, row, chunk, h, 0, 0), buffer,
                                          reached, cut_.headdim, cut_.dstate);
                        for (std::int64_t i = 0; i < reached; ++i) {
                            const std::int64_t line = i * wide_;
                            scale_row(product + line, wide_, into[i], steps.enters(i0 + i));
                            if (steps.enters(i0 + i))
                                for (std::int64_t n = line; n < line + wide_; n += kLanes<T>)
                                    store<T>(dC + n, load<T>(dC + n) + load<T>(product + n));
                            else
                                fill(C + line, wide_, T(0));
                        }
                        dot_rows(ddecay, product, C, wide_, reached);
                    }
                    for (std::int64_t i = 0; i < inside; ++i)
                        for (std::int64_t j = 0; j <= block; ++j)
                            ddecay[i] += decay_line(row, chunk, h, j)[i0 + i];
                    store_tile(line_at(grads_.ddA_cumsum, row, h, chunk, i0), ddecay, 0, 1, rows);
                }
                store_tile(steps_at(grads_.dC, row, steps.first + i0, group, 0), dC, wide_, inside,
                           cut_.dstate);
            });
    }

    /// dD from the blocks' shares, in the order of rows, chunks and blocks.
    void add_skips() const {
        const TensorView& out = grads_.dD;
        parallel_for(cut_.heads, threads_, [&](std::int64_t head, int thread) {
            T* const sum = local(thread);
            fill(sum, tall_, T(0));
            for (std::int64_t line = 0; line < cut_.batch * cut_.nchunks * blocks_; ++line) {
                const std::int64_t j = line % blocks_, chunk = line / blocks_ % cut_.nchunks;
                if (chunk * cut_.size + j * kRowBlock >= cut_.seqlen) continue;
                const T* const from = skip_line(line / blocks_ / cut_.nchunks, chunk, head, j);
                for (std::int64_t p = 0; p < tall_; ++p) sum[p] += from[p];
            }
            T total = 0;
            for (std::int64_t p = 0; p < cut_.headdim; ++p) total += sum[p];
            const bool per_head = out.ndim == 1;
            store_tile(plane_at(out, head * out.stride[0], 0, per_head ? 0 : out.stride[1]),
                       per_head ? &total : sum, 0, 1, per_head ? 1 : cut_.headdim);
        });
    }

    const SsdChunkOutputArgs& args_;
    const SsdChunkOutputGrads& grads_;
    const std::int64_t* origins_;
    const OutputCut cut_;
    const std::int64_t blocks_;  // of steps in a chunk
    const std::int64_t tall_;    // channels, whole panels
    const std::int64_t wide_;    // states, whole panels
    TensorView g_;               // gradients of the outputs before the gate
    T* decays_ = nullptr;
    T* skips_ = nullptr;
    T* memory_ = nullptr;  // of the threads
    std::int64_t local_ = 0;
    int threads_ = 1;
};

}  // namespace ssm::cpu::SSM_ISA
