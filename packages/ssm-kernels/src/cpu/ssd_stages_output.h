// The outputs of a chunk before the gate: what the last stage computes, and its backward again.
#pragma once

#include "ssd_stages_tile.h"

namespace ssm::cpu::SSM_ISA {

/// Rows i0.. of one chunk and head, columns p0..
struct OutputBlock {
    std::int64_t row, chunk, head, i0, p0, rows, columns;
};

/// How the outputs are cut into blocks; some have no rows.
struct OutputCut {
    std::int64_t batch, seqlen, heads, headdim, dstate, nchunks, size, row_blocks, width_blocks;

    explicit OutputCut(const SsdChunkOutputArgs& args)
        : batch(args.x.shape[0]),
          seqlen(args.x.shape[1]),
          heads(args.x.shape[2]),
          headdim(args.x.shape[3]),
          dstate(args.C.shape[3]),
          nchunks(args.dt.shape[2]),
          size(args.dt.shape[3]),
          row_blocks(blocks_of(min(size, seqlen), kRowBlock)),
          width_blocks(blocks_of(headdim, kWidthBlock)) {}

    std::int64_t work() const { return batch * seqlen * heads * headdim * (size / 2 + dstate); }
    std::int64_t tasks() const { return batch * nchunks * heads * row_blocks * width_blocks; }
    OutputBlock block(std::int64_t task) const {
        TaskIndex index{task};
        OutputBlock at{};
        at.p0 = index.next(width_blocks) * kWidthBlock;
        at.i0 = index.next(row_blocks) * kRowBlock;
        at.head = index.next(heads);
        at.chunk = index.next(nchunks);
        at.row = index.rest;
        at.rows = min(kRowBlock, min(size, seqlen - at.chunk * size) - at.i0);
        at.columns = min(kWidthBlock, headdim - at.p0);
        return at;
    }
};

/// Working memory of one block of outputs; every tile has whole panels in a line.
template <class T>
struct OutputTile {
    T* y;        // [step][column]
    T* operand;  // [step or state][column]: x, states
    T* factor;   // [step][step or state]: weights, C
    T* decay;    // [step], of the rows

    static std::int64_t elements(std::int64_t wide) {
        return (kRowBlock + kDepthBlock) * wide + kRowBlock * kDepthBlock + kRowBlock;
    }
    OutputTile(T* memory, std::int64_t wide)
        : y(memory),
          operand(y + kRowBlock * wide),
          factor(operand + kDepthBlock * wide),
          decay(factor + kRowBlock * kDepthBlock) {}
};

/// Up to kRowBlock steps as terms of sums: steps j0.. of a chunk and head.
template <class T>
struct Terms {
    T decay[kRowBlock];
    T step[kRowBlock];   // 0 where skipped
    T place[kRowBlock];  // its number in the block, -1 where there is no step or it is skipped
    std::int64_t begin, count;

    Terms(const SsdChunkOutputArgs& args, const ChunkSteps& steps, std::int64_t row,
          std::int64_t chunk, std::int64_t head, std::int64_t j0)
        : begin(j0), count(min(kRowBlock, steps.count - j0)) {
        load_padded(decay, kRowBlock, line_at(args.dA_cumsum, row, head, chunk, j0), 1, count);
        load_padded(step, kRowBlock, line_at(args.dt, row, head, chunk, j0), 1, count);
        for (std::int64_t j = 0; j < kRowBlock; ++j) {
            const bool keeps = j < count && steps.keeps(j0 + j);
            place[j] = keeps ? static_cast<T>(j) : T(-1);
            if (!keeps) step[j] = T(0);
        }
    }

    /// The terms that step i sees, not after i and of its sequence: places first to last.
    struct Reach {
        T first, last;
    };
    Reach reach_of(const ChunkSteps& steps, std::int64_t i) const {
        const std::int64_t origin = steps.origin(i);
        return {static_cast<T>(max(0, min(kRowBlock, max(0, origin) - begin))),
                origin == Origin::kSkipped ? T(-1) : static_cast<T>(min(kRowBlock, i - begin))};
    }
    /// Selects what a step sees from the vector of terms from j on; elsewhere is 0.
    Vec<T> seen(const Reach& reach, std::int64_t j, Vec<T> value) const {
        const Vec<T> at = load<T>(place + j), zeros = zero<T>();
        const Vec<T> inside = at <= reach.last ? value : zeros;
        return at >= reach.first ? inside : zeros;
    }
};

/// tile rows = those of a plane of steps from i0 on; a skipped step is a row of 0.
template <class T>
void load_kept(T* tile, std::int64_t pitch, const Plane& plane, const ChunkSteps& steps,
               std::int64_t i0, std::int64_t rows, std::int64_t columns) {
    load_padded(tile, pitch, plane, rows, columns);
    for (std::int64_t i = 0; i < rows; ++i)
        if (!steps.keeps(i0 + i)) fill(tile + i * pitch, pitch, T(0));
}

/// y += sum of the weights of steps j0.. times their x.
template <class T>
void attend(const SsdChunkOutputArgs& args, const ChunkSteps& steps, const OutputBlock& at,
            std::int64_t j0, std::int64_t group, const OutputTile<T>& tile) {
    const std::int64_t pitch = padded<T>(at.columns);
    const Terms<T> terms(args, steps, at.row, at.chunk, at.head, j0);
    load_padded(tile.factor, kRowBlock, pairs_at(args.CB, at.row, at.chunk, group, at.i0, j0),
                at.rows, terms.count);
    load_kept(tile.operand, pitch, steps_at(args.x, at.row, steps.first + j0, at.head, at.p0),
              steps, j0, terms.count, at.columns);
    for (std::int64_t i = 0; i < at.rows; ++i) {
        T* const line = tile.factor + i * kRowBlock;
        const auto reach = terms.reach_of(steps, at.i0 + i);
        const Vec<T> decay = broadcast(tile.decay[i]);
        for (std::int64_t j = 0; j < round_up(terms.count, kLanes<T>); j += kLanes<T>) {
            const Vec<T> weight = exp_any<T>(decay - load<T>(terms.decay + j)) *
                                  load<T>(terms.step + j) * load<T>(line + j);
            store<T>(line + j, terms.seen(reach, j, weight));
        }
    }
    const Factor<T> weights{tile.factor, kRowBlock, 1};
    if (j0 == at.i0)
        multiply<T, Triangle::lower>(tile.y, pitch, weights, tile.operand, pitch, at.rows,
                                     terms.count, pitch);
    else
        multiply<T>(tile.y, pitch, weights, tile.operand, pitch, at.rows, terms.count, pitch);
}

/// y += exp(dA_cumsum) states_in C for the first `rows` rows, to which the state is known.
template <class T>
void add_entering(const SsdChunkOutputArgs& args, const ChunkSteps& steps, const OutputBlock& at,
                  std::int64_t rows, const OutputTile<T>& tile) {
    const std::int64_t dstate = args.C.shape[3];
    const std::int64_t group = at.head / (args.x.shape[2] / args.C.shape[2]);
    T into[kRowBlock];
    for (std::int64_t i = 0; i < kRowBlock; i += kLanes<T>)
        store<T>(into + i, exp_any<T>(load<T>(tile.decay + i)));
    for (std::int64_t n0 = 0; n0 < dstate; n0 += kDepthBlock) {
        const std::int64_t depth = min(kDepthBlock, dstate - n0);
        load_tile(tile.factor, kDepthBlock,
                  steps_at(args.C, at.row, steps.first + at.i0, group, n0), rows, depth);
        for (std::int64_t i = 0; i < rows; ++i)
            for (std::int64_t k = 0; k < depth; ++k) tile.factor[i * kDepthBlock + k] *= into[i];
        multiply_plane<T>(
            tile.y, padded<T>(at.columns), {tile.factor, kDepthBlock, 1},
            transposed(state_at(args.states_in, at.row, at.chunk, at.head, at.p0, n0)),
            tile.operand, rows, depth, at.columns);
    }
}

/// tile.y = the outputs before the gate. Rows of skipped steps hold anything.
template <class T>
void compute_outputs(const SsdChunkOutputArgs& args, const ChunkSteps& steps, const OutputBlock& at,
                     const OutputTile<T>& tile) {
    const std::int64_t pitch = padded<T>(at.columns);
    const std::int64_t group = at.head / (args.x.shape[2] / args.CB.shape[2]);
    load_padded(tile.decay, kRowBlock, line_at(args.dA_cumsum, at.row, at.head, at.chunk, at.i0), 1,
                at.rows);
    fill(tile.y, at.rows * pitch, T(0));
    // Where all rows are of a sequence that begins in the chunk, what comes before it is not read.
    std::int64_t entering = 0, earliest = at.i0;
    for (std::int64_t i = 0; i < at.rows; ++i) {
        const std::int64_t origin = steps.origin(at.i0 + i);
        if (origin == Origin::kEntered) entering = i + 1;
        if (origin != Origin::kSkipped) earliest = min(earliest, max(0, origin));
    }
    for (std::int64_t j0 = earliest / kRowBlock * kRowBlock; j0 <= at.i0; j0 += kRowBlock)
        attend<T>(args, steps, at, j0, group, tile);
    if (entering > 0) add_entering<T>(args, steps, at, entering, tile);
    if (args.D.ndim < 0) return;
    T* const D = tile.factor;
    load_padded(D, pitch,
                plane_at(args.D, at.head * args.D.stride[0] + at.p0 * args.D.stride[1], 0,
                         args.D.stride[1]),
                1, at.columns);
    load_padded(tile.operand, pitch, steps_at(args.x, at.row, steps.first + at.i0, at.head, at.p0),
                at.rows, at.columns);
    for (std::int64_t i = 0; i < at.rows; ++i)
        for (std::int64_t p = 0; p < pitch; ++p)
            tile.y[i * pitch + p] += D[p] * tile.operand[i * pitch + p];
}

}  // namespace ssm::cpu::SSM_ISA
