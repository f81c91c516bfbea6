// The five stages of the chunked state-space dual scan. Products of matrices run on blocks of rows
// times vectors; a task owns one block of one output. docs/ops/ssd_stages.md#algorithm
#include <ssm/ssd_stages.h>

#include "../op/scratch.h"
#include "parallel.h"
#include "ssd_stages_tile.h"

namespace ssm::cpu::SSM_ISA {

namespace {

constexpr std::int64_t kRowBlock = 64;       // rows of an output tile
constexpr std::int64_t kDepthBlock = 128;    // terms of its sums that are in cache at a time
constexpr std::int64_t kWidthBlock = 128;    // its columns
constexpr std::int64_t kHeadBlock = 32;      // heads whose step sizes are summed side by side
constexpr std::int64_t kTaskStates = 4096;   // state elements that one task passes on
constexpr std::int64_t kSerialWork = 65536;  // operations below which waking a thread costs more

SSM_INLINE std::int64_t blocks_of(std::int64_t size, std::int64_t block) {
    return (size + block - 1) / block;
}

SSM_INLINE int threads_for(std::int64_t work, int threads) {
    return work <= kSerialWork ? 1 : threads;
}

template <class T>
SSM_INLINE T element(const TensorView& view, std::int64_t offset) {
    T value;
    load_tile(&value, 1, plane_at(view, offset, 1, 1), 1, 1);
    return value;
}

/// Offset of (row, head, chunk, 0) in an array (B, H, C, Q).
SSM_INLINE std::int64_t line_offset(const TensorView& view, std::int64_t row, std::int64_t head,
                                    std::int64_t chunk) {
    return row * view.stride[0] + head * view.stride[1] + chunk * view.stride[2];
}

// Step sizes and decays ---------------------------------------------------------------------------

/// What one head block adds up, and the parameters of its heads.
template <class T>
struct HeadBlock {
    double total[kHeadBlock];
    double A[kHeadBlock];
    T bias[kHeadBlock];
    T step[kRowBlock * kHeadBlock];   // [step][head]
    T decay[kRowBlock * kHeadBlock];  // [step][head]
};

/// bias, softplus and clamp; NaN stays NaN.
template <class T>
SSM_INLINE Vec<T> step_size(Vec<T> v, Vec<T> bias, bool is_soft, T low, T high) {
    v += bias;
    if (is_soft) v = softplus<T>(v);
    v = v < low ? broadcast(low) : v;
    return v > high ? broadcast(high) : v;
}

template <class T>
void cumsum(const SsdChunkCumsumArgs& args, int threads) {
    const std::int64_t seqlen = args.dt.shape[1], heads = args.dt.shape[2];
    const std::int64_t nchunks = args.dt_out.shape[2], size = args.dt_out.shape[3];
    const std::int64_t blocks = blocks_of(heads, kHeadBlock);
    const T low = static_cast<T>(args.dt_low), high = static_cast<T>(args.dt_high);
    const int used = threads_for(16 * args.dt.shape[0] * nchunks * size * heads, threads);
    const Scratch scratch(sizeof(HeadBlock<T>) * static_cast<std::size_t>(used));
    parallel_for(args.dt.shape[0] * nchunks * blocks, used, [&](std::int64_t task, int thread) {
        HeadBlock<T>& at = static_cast<HeadBlock<T>*>(scratch.data())[thread];
        const std::int64_t h0 = task % blocks * kHeadBlock, width = min(kHeadBlock, heads - h0);
        const std::int64_t chunk = task / blocks % nchunks, row = task / blocks / nchunks;
        T A[kHeadBlock] = {};
        load_tile(A, 0, plane_at(args.A, h0 * args.A.stride[0], 0, args.A.stride[0]), 1, width);
        for (std::int64_t h = 0; h < kHeadBlock; ++h) at.A[h] = static_cast<double>(A[h]);
        fill(at.total, kHeadBlock, 0.0);
        fill(at.bias, kHeadBlock, T(0));
        if (args.dt_bias.ndim >= 0) {
            const std::int64_t stride = args.dt_bias.stride[0];
            load_tile(at.bias, 0, plane_at(args.dt_bias, h0 * stride, 0, stride), 1, width);
        }
        for (std::int64_t i0 = 0; i0 < size; i0 += kRowBlock) {
            const std::int64_t rows = min(kRowBlock, size - i0), t0 = chunk * size + i0;
            const std::int64_t inside = max(0, min(rows, seqlen - t0));
            const std::int64_t offset =
                row * args.dt.stride[0] + t0 * args.dt.stride[1] + h0 * args.dt.stride[2];
            load_padded(at.step, kHeadBlock,
                        plane_at(args.dt, offset, args.dt.stride[1], args.dt.stride[2]), inside,
                        width);
            for (std::int64_t i = 0; i < rows; ++i) {
                T* const step = at.step + i * kHeadBlock;
                T* const decay = at.decay + i * kHeadBlock;
                const bool skipped =
                    i >= inside || (args.seq_idx.ndim >= 0 &&
                                    static_cast<const std::int32_t*>(
                                        args.seq_idx.data)[row * args.seq_idx.stride[0] +
                                                           (t0 + i) * args.seq_idx.stride[1]] < 0);
                if (skipped) fill(step, kHeadBlock, T(0));
                for (std::int64_t h = 0; h < kHeadBlock && !skipped; h += kLanes<T>)
                    store<T>(step + h, step_size<T>(load<T>(step + h), load<T>(at.bias + h),
                                                    args.softplus, low, high));
                for (std::int64_t h = 0; h < kHeadBlock; ++h) {
                    at.total[h] += static_cast<double>(step[h]) * at.A[h];
                    decay[h] = static_cast<T>(at.total[h]);
                }
            }
            const auto put = [&](const TensorView& to, const T* tile) {
                const std::int64_t begin = line_offset(to, row, h0, chunk) + i0 * to.stride[3];
                store_tile(plane_at(to, begin, to.stride[3], to.stride[1]), tile, kHeadBlock, rows,
                           width);
            };
            put(args.dt_out, at.step);
            put(args.dA_cumsum, at.decay);
        }
    });
}

// What a chunk adds to the state ------------------------------------------------------------------

template <class T>
void chunk_state(const SsdChunkStateArgs& args, const std::int64_t* origins, int threads) {
    const std::int64_t *const shape = args.x.shape, *const xs = args.x.stride;
    const std::int64_t batch = shape[0], seqlen = shape[1], heads = shape[2], headdim = shape[3];
    const std::int64_t dstate = args.B.shape[3], nchunks = args.dt.shape[2];
    const std::int64_t size = args.dt.shape[3], per_group = heads / args.B.shape[2];
    const std::int64_t wide = padded<T>(min(dstate, kWidthBlock)), tall = min(headdim, kRowBlock);
    const std::int64_t row_blocks = blocks_of(headdim, kRowBlock);
    const std::int64_t width_blocks = blocks_of(dstate, kWidthBlock);
    const std::int64_t deep = min(size, kDepthBlock), line = padded<T>(deep);
    const std::int64_t elements = 2 * line + (deep + tall) * wide + deep * tall;
    const std::int64_t work = batch * heads * nchunks * size * headdim * dstate;
    const int used = threads_for(work, threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * used));
    const std::int64_t tasks = batch * nchunks * heads * row_blocks * width_blocks;
    parallel_for(tasks, used, [&](std::int64_t task, int thread) {
        T* const weight = static_cast<T*>(scratch.data()) + elements * thread;
        T* const step = weight + line;
        T* const B = step + line;
        T* const sum = B + deep * wide;
        T* const x = sum + tall * wide;
        std::int64_t rest = task;
        const auto next = [&](std::int64_t count) {
            const std::int64_t index = rest % count;
            rest /= count;
            return index;
        };
        const std::int64_t n0 = next(width_blocks) * kWidthBlock, p0 = next(row_blocks) * kRowBlock;
        const std::int64_t head = next(heads), chunk = next(nchunks), row = rest;
        const std::int64_t width = min(kWidthBlock, dstate - n0), rows = min(tall, headdim - p0);
        const std::int64_t pitch = padded<T>(width);
        const ChunkSteps steps(origins, row, chunk, size, seqlen);
        const std::int64_t open = steps.open_at_end();
        const TensorView& decay = args.dA_cumsum;
        const std::int64_t decay_at = line_offset(decay, row, head, chunk);
        const std::int64_t dt_at = line_offset(args.dt, row, head, chunk);
        const Vec<T> last = broadcast(element<T>(decay, decay_at + (size - 1) * decay.stride[3]));
        fill(sum, rows * pitch, T(0));
        for (std::int64_t k0 = max(open, 0) / deep * deep; k0 < steps.count; k0 += deep) {
            const std::int64_t depth = min(deep, steps.count - k0), t0 = steps.first + k0;
            load_padded(weight, line,
                        plane_at(decay, decay_at + k0 * decay.stride[3], 0, decay.stride[3]), 1,
                        depth);
            load_padded(step, line,
                        plane_at(args.dt, dt_at + k0 * args.dt.stride[3], 0, args.dt.stride[3]), 1,
                        depth);
            for (std::int64_t k = 0; k < depth; k += kLanes<T>)
                store<T>(weight + k, exp_any<T>(last - load<T>(weight + k)) * load<T>(step + k));
            load_padded(B, pitch,
                        plane_at(args.B,
                                 row * args.B.stride[0] + t0 * args.B.stride[1] +
                                     head / per_group * args.B.stride[2] + n0 * args.B.stride[3],
                                 args.B.stride[1], args.B.stride[3]),
                        depth, width);
            load_tile(x, rows,
                      plane_at(args.x, row * xs[0] + t0 * xs[1] + head * xs[2] + p0 * xs[3], xs[1],
                               xs[3]),
                      depth, rows);
            for (std::int64_t k = 0; k < depth; ++k) {
                // Only what the last sequence of the chunk does is handed on.
                const bool hands_on = steps.origin(k0 + k) == open;
                if (!hands_on) fill(B + k * pitch, pitch, T(0));
                for (std::int64_t p = 0; p < rows; ++p)
                    x[k * rows + p] = hands_on ? x[k * rows + p] * weight[k] : T(0);
            }
            multiply<T>(sum, pitch, {x, 1, rows}, B, pitch, rows, depth, pitch);
        }
        const std::int64_t* const to = args.states.stride;
        store_tile(plane_at(args.states,
                            row * to[0] + chunk * to[1] + head * to[2] + p0 * to[3] + n0 * to[4],
                            to[3], to[4]),
                   sum, pitch, rows, width);
    });
}

// From chunk to chunk -----------------------------------------------------------------------------

template <class T>
void pass_states(const SsdStatePassingArgs& args, const std::int64_t* origins, int threads) {
    const std::int64_t* const shape = args.states.shape;
    const std::int64_t batch = shape[0], nchunks = shape[1], heads = shape[2], headdim = shape[3];
    const std::int64_t dstate = shape[4], size = args.dA_cumsum.shape[3];
    const std::int64_t seqlen = origins == nullptr ? nchunks * size : args.seq_idx.shape[1];
    const std::int64_t width = min(dstate, kTaskStates),
                       width_blocks = blocks_of(dstate, kTaskStates);
    const std::int64_t pitch = padded<T>(width), tall = max(1, kTaskStates / max(pitch, 1));
    const std::int64_t row_blocks = blocks_of(headdim, tall), elements = 2 * tall * pitch;
    const int used = threads_for(batch * nchunks * heads * headdim * dstate, threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * used));
    const std::int64_t tasks = batch * heads * row_blocks * width_blocks;
    parallel_for(tasks, used, [&](std::int64_t task, int thread) {
        T* const h = static_cast<T*>(scratch.data()) + elements * thread;
        T* const added = h + tall * pitch;
        const std::int64_t n0 = task % width_blocks * kTaskStates;
        const std::int64_t p0 = task / width_blocks % row_blocks * tall;
        const std::int64_t line = task / width_blocks / row_blocks;
        const std::int64_t head = line % heads, row = line / heads;
        const std::int64_t rows = min(tall, headdim - p0), columns = min(width, dstate - n0);
        // (B, H, P, N), or (B, C, H, P, N) at one chunk.
        const auto whole = [&](const TensorView& view) {
            const std::int64_t* const s = view.stride;
            return plane_at(view, row * s[0] + head * s[1] + p0 * s[2] + n0 * s[3], s[2], s[3]);
        };
        const auto part = [&](const TensorView& view, std::int64_t chunk) {
            const std::int64_t* const s = view.stride;
            return plane_at(view, row * s[0] + chunk * s[1] + head * s[2] + p0 * s[3] + n0 * s[4],
                            s[3], s[4]);
        };
        fill(h, 2 * tall * pitch, T(0));
        if (args.initial_states.ndim >= 0)
            load_tile(h, pitch, whole(args.initial_states), rows, columns);
        for (std::int64_t chunk = 0; chunk < nchunks; ++chunk) {
            load_tile(added, pitch, part(args.states, chunk), rows, columns);
            store_tile(part(args.states_in, chunk), h, pitch, rows, columns);
            const ChunkSteps steps(origins, row, chunk, size, seqlen);
            if (steps.open_at_end() != Origin::kEntered) {
                copy_row(h, added, rows * pitch);
                continue;
            }
            const TensorView& decay = args.dA_cumsum;
            const Vec<T> factor = exp_any<T>(broadcast(element<T>(
                decay, line_offset(decay, row, head, chunk) + (size - 1) * decay.stride[3])));
            for (std::int64_t i = 0; i < rows * pitch; i += kLanes<T>)
                store<T>(h + i, factor * load<T>(h + i) + load<T>(added + i));
        }
        if (args.final_states.ndim >= 0)
            store_tile(whole(args.final_states), h, pitch, rows, columns);
    });
}

// C B^T -------------------------------------------------------------------------------------------

template <class T>
void bmm(const SsdBmmChunkArgs& args, int threads) {
    const std::int64_t *const cs = args.C.stride, *const bs = args.B.stride;
    const std::int64_t batch = args.C.shape[0], seqlen = args.C.shape[1], dstate = args.C.shape[3];
    const std::int64_t nchunks = args.CB.shape[1], groups = args.CB.shape[2];
    const std::int64_t size = args.CB.shape[3], blocks = blocks_of(size, kRowBlock);
    const std::int64_t of_c = groups / args.C.shape[2], of_b = groups / args.B.shape[2];
    const std::int64_t tall = min(size, kRowBlock), wide = padded<T>(min(size, kWidthBlock));
    const std::int64_t deep = min(dstate, kDepthBlock);
    const std::int64_t elements = (tall + deep) * wide + tall * deep;
    const int used = threads_for(batch * nchunks * groups * size * size * dstate, threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * used));
    parallel_for(batch * nchunks * groups * blocks, used, [&](std::int64_t task, int thread) {
        T* const sum = static_cast<T*>(scratch.data()) + elements * thread;
        T* const B = sum + tall * wide;
        T* const C = B + deep * wide;
        const std::int64_t i0 = task % blocks * kRowBlock, group = task / blocks % groups;
        const std::int64_t chunk = task / blocks / groups % nchunks;
        const std::int64_t row = task / blocks / groups / nchunks;
        const std::int64_t t0 = chunk * size, count = min(size, seqlen - t0);
        const std::int64_t rows = min(tall, size - i0), inside = max(0, min(rows, count - i0));
        for (std::int64_t j0 = 0; j0 < size; j0 += kWidthBlock) {
            const std::int64_t columns = min(kWidthBlock, size - j0);
            const std::int64_t pitch = padded<T>(columns), given = max(0, min(columns, count - j0));
            fill(sum, rows * pitch, T(0));
            for (std::int64_t n0 = 0; n0 < dstate && inside > 0; n0 += kDepthBlock) {
                const std::int64_t depth = min(kDepthBlock, dstate - n0);
                load_tile(
                    C, depth,
                    plane_at(args.C,
                             row * cs[0] + (t0 + i0) * cs[1] + group / of_c * cs[2] + n0 * cs[3],
                             cs[1], cs[3]),
                    inside, depth);
                load_padded(
                    B, pitch,
                    plane_at(args.B,
                             row * bs[0] + (t0 + j0) * bs[1] + group / of_b * bs[2] + n0 * bs[3],
                             bs[3], bs[1]),
                    depth, given);
                multiply<T>(sum, pitch, {C, depth, 1}, B, pitch, inside, depth, pitch);
            }
            const std::int64_t* const to = args.CB.stride;
            store_tile(
                plane_at(args.CB,
                         row * to[0] + chunk * to[1] + group * to[2] + i0 * to[3] + j0 * to[4],
                         to[3], to[4]),
                sum, pitch, rows, columns);
        }
    });
}

// The outputs -------------------------------------------------------------------------------------

/// Rows i0.. of one chunk and head, columns p0..
struct OutputBlock {
    std::int64_t row, chunk, head, i0, p0, rows, columns;
};

/// Working memory of one task; every tile has whole vectors in a line.
template <class T>
struct OutputTile {
    std::int64_t wide;  // columns of y, whole vectors
    T* y;               // [step][column]
    T* operand;         // [step or state][column]: x, states
    T* factor;          // [step][step or state]: weights, C
    T* decay_i;         // [step], of the rows
    T* decay_j;         // [step], of the terms
    T* step;            // [step]: dt of the terms

    static std::int64_t elements(std::int64_t wide) {
        return (kRowBlock + kDepthBlock) * wide + kRowBlock * kDepthBlock + 3 * kRowBlock;
    }
    OutputTile(T* memory, std::int64_t width)
        : wide(width),
          y(memory),
          operand(y + kRowBlock * wide),
          factor(operand + kDepthBlock * wide),
          decay_i(factor + kRowBlock * kDepthBlock),
          decay_j(decay_i + kRowBlock),
          step(decay_j + kRowBlock) {}
};

/// Plane of rows t0.. and columns p0.. of an array (B, L, H, P).
SSM_INLINE Plane activation(const TensorView& view, const OutputBlock& at, std::int64_t t0) {
    const std::int64_t* const s = view.stride;
    return plane_at(view, at.row * s[0] + t0 * s[1] + at.head * s[2] + at.p0 * s[3], s[1], s[3]);
}

/// y += sum of the weights of steps j0.. times their x.
template <class T>
void attend(const SsdChunkOutputArgs& args, const ChunkSteps& steps, const OutputBlock& at,
            std::int64_t j0, std::int64_t group, const OutputTile<T>& tile) {
    constexpr std::int64_t n = kLanes<T>;
    const std::int64_t depth = min(kRowBlock, steps.count - j0);
    const std::int64_t pitch = padded<T>(at.columns);
    const std::int64_t* const s = args.CB.stride;
    load_padded(
        tile.factor, kRowBlock,
        plane_at(args.CB, at.row * s[0] + at.chunk * s[1] + group * s[2] + at.i0 * s[3] + j0 * s[4],
                 s[3], s[4]),
        at.rows, depth);
    const auto load_line = [&](T* to, const TensorView& view) {
        const std::int64_t begin = line_offset(view, at.row, at.head, at.chunk);
        load_padded(to, kRowBlock, plane_at(view, begin + j0 * view.stride[3], 0, view.stride[3]),
                    1, depth);
    };
    load_line(tile.decay_j, args.dA_cumsum);
    load_line(tile.step, args.dt);
    load_padded(tile.operand, pitch, activation(args.x, at, steps.first + j0), depth, at.columns);
    // Skipped terms are selected away: by their place, or by what stands at their place.
    T kept[kRowBlock];
    for (std::int64_t j = 0; j < kRowBlock; ++j) {
        const bool keeps = j < depth && steps.keeps(j0 + j);
        kept[j] = keeps ? static_cast<T>(j) : T(-1);
        if (j < depth && !keeps) fill(tile.operand + j * pitch, pitch, T(0));
    }
    for (std::int64_t i = 0; i < at.rows; ++i) {
        T* const line = tile.factor + i * kRowBlock;
        const std::int64_t origin = steps.origin(at.i0 + i);
        // Steps first..last of this block are of the sequence of i, and not after i.
        const T first = static_cast<T>(max(0, min(kRowBlock, max(0, origin) - j0)));
        const T last =
            origin == Origin::kSkipped ? T(-1) : static_cast<T>(min(kRowBlock, at.i0 + i - j0));
        const Vec<T> decay = broadcast(tile.decay_i[i]);
        for (std::int64_t j = 0; j < padded<T>(depth); j += n) {
            const Vec<T> place = load<T>(kept + j), zeros = zero<T>();
            const Vec<T> weight = exp_any<T>(decay - load<T>(tile.decay_j + j)) *
                                  load<T>(tile.step + j) * load<T>(line + j);
            const Vec<T> inside = place <= last ? weight : zeros;
            store<T>(line + j, place >= first ? inside : zeros);
        }
    }
    multiply<T>(tile.y, pitch, {tile.factor, kRowBlock, 1}, tile.operand, pitch, at.rows, depth,
                pitch, j0 == at.i0);
}

/// y += exp(dA_cumsum) states_in C for the first `rows` rows, to which the state is known.
template <class T>
void add_entering(const SsdChunkOutputArgs& args, const ChunkSteps& steps, const OutputBlock& at,
                  std::int64_t rows, const OutputTile<T>& tile) {
    const std::int64_t dstate = args.C.shape[3], pitch = padded<T>(at.columns);
    const std::int64_t *const c = args.C.stride, *const h = args.states_in.stride;
    const std::int64_t group = at.head / (args.x.shape[2] / args.C.shape[2]);
    for (std::int64_t n0 = 0; n0 < dstate; n0 += kDepthBlock) {
        const std::int64_t depth = min(kDepthBlock, dstate - n0);
        load_tile(tile.factor, kDepthBlock,
                  plane_at(args.C,
                           at.row * c[0] + (steps.first + at.i0) * c[1] + group * c[2] + n0 * c[3],
                           c[1], c[3]),
                  rows, depth);
        for (std::int64_t i = 0; i < rows; ++i)
            for (std::int64_t k = 0; k < depth; ++k)
                tile.factor[i * kDepthBlock + k] *= tile.step[i];
        load_padded(
            tile.operand, pitch,
            plane_at(args.states_in,
                     at.row * h[0] + at.chunk * h[1] + at.head * h[2] + at.p0 * h[3] + n0 * h[4],
                     h[4], h[3]),
            depth, at.columns);
        multiply<T>(tile.y, pitch, {tile.factor, kDepthBlock, 1}, tile.operand, pitch, rows, depth,
                    pitch);
    }
}

template <class T>
void output_block(const SsdChunkOutputArgs& args, const std::int64_t* origins,
                  const OutputBlock& at, const OutputTile<T>& tile) {
    const std::int64_t pitch = padded<T>(at.columns), size = args.dt.shape[3];
    const std::int64_t group = at.head / (args.x.shape[2] / args.CB.shape[2]);
    const ChunkSteps steps(origins, at.row, at.chunk, size, args.x.shape[1]);
    const TensorView& decay = args.dA_cumsum;
    load_padded(
        tile.decay_i, kRowBlock,
        plane_at(decay, line_offset(decay, at.row, at.head, at.chunk) + at.i0 * decay.stride[3], 0,
                 decay.stride[3]),
        1, at.rows);
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
    if (entering > 0) {
        for (std::int64_t i = 0; i < kRowBlock; i += kLanes<T>)
            store<T>(tile.step + i, exp_any<T>(load<T>(tile.decay_i + i)));
        add_entering<T>(args, steps, at, entering, tile);
    }
    const std::int64_t t0 = steps.first + at.i0;
    if (args.D.ndim >= 0) {
        T* const D = tile.factor;
        load_padded(D, pitch,
                    plane_at(args.D, at.head * args.D.stride[0] + at.p0 * args.D.stride[1], 0,
                             args.D.stride[1]),
                    1, at.columns);
        load_padded(tile.operand, pitch, activation(args.x, at, t0), at.rows, at.columns);
        for (std::int64_t i = 0; i < at.rows; ++i)
            for (std::int64_t p = 0; p < pitch; ++p)
                tile.y[i * pitch + p] += D[p] * tile.operand[i * pitch + p];
    }
    if (args.z.ndim >= 0) {
        load_padded(tile.operand, pitch, activation(args.z, at, t0), at.rows, at.columns);
        for (std::int64_t i = 0; i < at.rows * pitch; i += kLanes<T>)
            store<T>(tile.y + i, load<T>(tile.y + i) * silu<T>(load<T>(tile.operand + i)));
    }
    for (std::int64_t i = 0; i < at.rows; ++i)
        if (!steps.keeps(at.i0 + i)) fill(tile.y + i * pitch, pitch, T(0));
    store_tile(activation(args.y, at, t0), tile.y, pitch, at.rows, at.columns);
}

template <class T>
void output(const SsdChunkOutputArgs& args, const std::int64_t* origins, int threads) {
    const std::int64_t* const shape = args.x.shape;
    const std::int64_t batch = shape[0], seqlen = shape[1], heads = shape[2], headdim = shape[3];
    const std::int64_t nchunks = args.dt.shape[2], size = args.dt.shape[3];
    const std::int64_t row_blocks = blocks_of(min(size, seqlen), kRowBlock);
    const std::int64_t width_blocks = blocks_of(headdim, kWidthBlock);
    const std::int64_t wide = padded<T>(min(headdim, kWidthBlock));
    const std::int64_t elements = OutputTile<T>::elements(wide);
    const std::int64_t work = batch * seqlen * heads * headdim * (size / 2 + args.C.shape[3]);
    const int used = threads_for(work, threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * used));
    const std::int64_t tasks = batch * nchunks * heads * row_blocks * width_blocks;
    parallel_for(tasks, used, [&](std::int64_t task, int thread) {
        const OutputTile<T> tile(static_cast<T*>(scratch.data()) + elements * thread, wide);
        std::int64_t rest = task;
        const auto next = [&](std::int64_t count) {
            const std::int64_t index = rest % count;
            rest /= count;
            return index;
        };
        OutputBlock at{};
        at.p0 = next(width_blocks) * kWidthBlock;
        at.i0 = next(row_blocks) * kRowBlock;
        at.head = next(heads);
        at.chunk = next(nchunks);
        at.row = rest;
        at.rows = min(kRowBlock, min(size, seqlen - at.chunk * size) - at.i0);
        at.columns = min(kWidthBlock, headdim - at.p0);
        if (at.rows > 0) output_block<T>(args, origins, at, tile);
    });
}

}  // namespace

void ssd_chunk_cumsum_fwd(const SsdChunkCumsumArgs& args, int threads) {
    args.dt.dtype == DType::f64 ? cumsum<double>(args, threads) : cumsum<float>(args, threads);
}

void ssd_chunk_state_fwd(const SsdChunkStateArgs& args, const std::int64_t* origins, int threads) {
    args.x.dtype == DType::f64 ? chunk_state<double>(args, origins, threads)
                               : chunk_state<float>(args, origins, threads);
}

void ssd_state_passing_fwd(const SsdStatePassingArgs& args, const std::int64_t* origins,
                           int threads) {
    args.states.dtype == DType::f64 ? pass_states<double>(args, origins, threads)
                                    : pass_states<float>(args, origins, threads);
}

void ssd_bmm_chunk_fwd(const SsdBmmChunkArgs& args, int threads) {
    args.C.dtype == DType::f64 ? bmm<double>(args, threads) : bmm<float>(args, threads);
}

void ssd_chunk_output_fwd(const SsdChunkOutputArgs& args, const std::int64_t* origins,
                          int threads) {
    args.x.dtype == DType::f64 ? output<double>(args, origins, threads)
                               : output<float>(args, origins, threads);
}

}  // namespace ssm::cpu::SSM_ISA
