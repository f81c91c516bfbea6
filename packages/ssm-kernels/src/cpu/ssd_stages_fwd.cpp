// The five stages of the chunked state-space dual scan, forward. A task owns one block of one
// output. docs/ops/ssd_stages.md#algorithm
#include "../op/scratch.h"
#include "parallel.h"
#include "ssd_stages_output.h"

namespace ssm::cpu::SSM_ISA {

namespace {

// Step sizes and decays ---------------------------------------------------------------------------

template <class T>
void cumsum(const SsdChunkCumsumArgs& args, int threads) {
    const std::int64_t seqlen = args.dt.shape[1], heads = args.dt.shape[2];
    const std::int64_t nchunks = args.dt_out.shape[2], size = args.dt_out.shape[3];
    const std::int64_t blocks = blocks_of(heads, kHeadBlock);
    const int used = threads_for(16 * args.dt.shape[0] * nchunks * size * heads, threads);
    const Scratch scratch(sizeof(HeadLanes<T>) * static_cast<std::size_t>(used));
    parallel_for(args.dt.shape[0] * nchunks * blocks, used, [&](std::int64_t task, int thread) {
        HeadLanes<T>& at = static_cast<HeadLanes<T>*>(scratch.data())[thread];
        TaskIndex index{task};
        const std::int64_t h0 = index.next(blocks) * kHeadBlock;
        const std::int64_t width = min(kHeadBlock, heads - h0);
        const std::int64_t chunk = index.next(nchunks), row = index.rest;
        at.load_parameters(args, h0, width);
        for (std::int64_t i0 = 0; i0 < size; i0 += kRowBlock) {
            const std::int64_t rows = min(kRowBlock, size - i0);
            at.load_steps(args, row, chunk * size + i0, rows, seqlen, h0, width);
            for (std::int64_t i = 0; i < rows; ++i)
                for (std::int64_t h = 0; h < kHeadBlock; ++h) {
                    at.total[h] += static_cast<double>(at.step[i * kHeadBlock + h]) * at.A[h];
                    at.decay[i * kHeadBlock + h] = static_cast<T>(at.total[h]);
                }
            const auto put = [&](const TensorView& to, const T* tile) {
                store_tile(at.chunk_of(to, row, h0, chunk, i0), tile, kHeadBlock, rows, width);
            };
            put(args.dt_out, at.step);
            put(args.dA_cumsum, at.decay);
        }
    });
}

// What a chunk adds to the state ------------------------------------------------------------------

template <class T>
void chunk_state(const SsdChunkStateArgs& args, const std::int64_t* origins, int threads) {
    const std::int64_t* const shape = args.x.shape;
    const std::int64_t batch = shape[0], seqlen = shape[1], heads = shape[2], headdim = shape[3];
    const std::int64_t dstate = args.B.shape[3], nchunks = args.dt.shape[2];
    const std::int64_t size = args.dt.shape[3], per_group = heads / args.B.shape[2];
    const std::int64_t wide = padded<T>(min(dstate, kWidthBlock)), tall = min(headdim, kRowBlock);
    const std::int64_t row_blocks = blocks_of(headdim, kRowBlock);
    const std::int64_t width_blocks = blocks_of(dstate, kWidthBlock);
    const std::int64_t deep = min(size, kDepthBlock), line = padded<T>(deep);
    const std::int64_t elements = StateSum<T>::elements(deep, tall, wide);
    const int used = threads_for(batch * heads * nchunks * size * headdim * dstate, threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * used));
    const std::int64_t tasks = batch * nchunks * heads * row_blocks * width_blocks;
    parallel_for(tasks, used, [&](std::int64_t task, int thread) {
        const StateSum<T> tile(static_cast<T*>(scratch.data()) + elements * thread, deep, tall,
                               wide);
        TaskIndex index{task};
        const std::int64_t n0 = index.next(width_blocks) * kWidthBlock;
        const std::int64_t p0 = index.next(row_blocks) * kRowBlock;
        const std::int64_t head = index.next(heads), chunk = index.next(nchunks), row = index.rest;
        const std::int64_t width = min(kWidthBlock, dstate - n0), rows = min(tall, headdim - p0);
        const ChunkSteps steps(origins, row, chunk, size, seqlen);
        const std::int64_t open = steps.open_at_end();
        const T last = element<T>(line_at(args.dA_cumsum, row, head, chunk, size - 1));
        // Only what the last sequence of the chunk does is handed on.
        tile.compute(
            steps_at(args.x, row, steps.first, head, p0),
            steps_at(args.B, row, steps.first, head / per_group, n0), max(open, 0) / deep * deep,
            steps.count, rows, width,
            [&](std::int64_t k0, std::int64_t depth) {
                load_padded(tile.weight, line, line_at(args.dA_cumsum, row, head, chunk, k0), 1,
                            depth);
                load_padded(tile.line, line, line_at(args.dt, row, head, chunk, k0), 1, depth);
                for (std::int64_t k = 0; k < depth; k += kLanes<T>)
                    store<T>(tile.weight + k,
                             exp_any<T>(last - load<T>(tile.weight + k)) * load<T>(tile.line + k));
            },
            [&](std::int64_t k) { return steps.origin(k) == open; });
        store_tile(state_at(args.states, row, chunk, head, p0, n0), tile.sum, padded<T>(width),
                   rows, width);
    });
}

// From chunk to chunk -----------------------------------------------------------------------------

template <class T>
void pass_states(const SsdStatePassingArgs& args, const std::int64_t* origins, int threads) {
    const PassingCut<T> cut(args, origins != nullptr);
    const std::int64_t elements = 2 * cut.elements(), pitch = cut.pitch;
    const int used = threads_for(cut.work(), threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * used));
    parallel_for(cut.batch * cut.heads * cut.blocks(), used, [&](std::int64_t task, int thread) {
        T* const h = static_cast<T*>(scratch.data()) + elements * thread;
        T* const added = h + cut.elements();
        const auto at = cut.block(task);
        fill(h, elements, T(0));
        if (args.initial_states.ndim >= 0)
            load_tile(h, pitch, cut.whole(args.initial_states, at), at.rows, at.columns);
        for (std::int64_t chunk = 0; chunk < cut.nchunks; ++chunk) {
            load_tile(added, pitch, cut.part(args.states, at, chunk), at.rows, at.columns);
            store_tile(cut.part(args.states_in, at, chunk), h, pitch, at.rows, at.columns);
            T factor;
            if (!cut.goes_on(args, origins, at, chunk, &factor)) {
                copy_row(h, added, at.rows * pitch);
                continue;
            }
            for (std::int64_t i = 0; i < at.rows * pitch; i += kLanes<T>)
                store<T>(h + i, factor * load<T>(h + i) + load<T>(added + i));
        }
        if (args.final_states.ndim >= 0)
            store_tile(cut.whole(args.final_states, at), h, pitch, at.rows, at.columns);
    });
}

// C B^T -------------------------------------------------------------------------------------------

template <class T>
void bmm(const SsdBmmChunkArgs& args, int threads) {
    const std::int64_t batch = args.C.shape[0], seqlen = args.C.shape[1], dstate = args.C.shape[3];
    const std::int64_t nchunks = args.CB.shape[1], groups = args.CB.shape[2];
    const std::int64_t size = args.CB.shape[3], blocks = blocks_of(size, kRowBlock);
    const std::int64_t of_c = groups / args.C.shape[2], of_b = groups / args.B.shape[2];
    const std::int64_t tall = min(size, kRowBlock), wide = padded<T>(min(size, kWidthBlock));
    const std::int64_t elements = (tall + kDepthBlock) * wide + tall * dstate;
    const int used = threads_for(batch * nchunks * groups * size * size * dstate, threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * used));
    parallel_for(batch * nchunks * groups * blocks, used, [&](std::int64_t task, int thread) {
        T* const sum = static_cast<T*>(scratch.data()) + elements * thread;
        T* const B = sum + tall * wide;
        T* const C = B + kDepthBlock * wide;
        TaskIndex index{task};
        const std::int64_t i0 = index.next(blocks) * kRowBlock, group = index.next(groups);
        const std::int64_t chunk = index.next(nchunks), row = index.rest;
        const std::int64_t t0 = chunk * size, count = min(size, seqlen - t0);
        const std::int64_t rows = min(tall, size - i0), inside = max(0, min(rows, count - i0));
        load_tile(C, dstate, steps_at(args.C, row, t0 + i0, group / of_c, 0), inside, dstate);
        for (std::int64_t j0 = 0; j0 < size; j0 += kWidthBlock) {
            const std::int64_t columns = min(kWidthBlock, size - j0), pitch = padded<T>(columns);
            fill(sum, rows * pitch, T(0));
            if (inside > 0)
                multiply_plane<T>(sum, pitch, {C, dstate, 1},
                                  transposed(steps_at(args.B, row, t0 + j0, group / of_b, 0)), B,
                                  inside, dstate, max(0, min(columns, count - j0)));
            store_tile(pairs_at(args.CB, row, chunk, group, i0, j0), sum, pitch, rows, columns);
        }
    });
}

// The outputs -------------------------------------------------------------------------------------

template <class T>
void output_block(const SsdChunkOutputArgs& args, const std::int64_t* origins,
                  const OutputBlock& at, const OutputTile<T>& tile) {
    const ChunkSteps steps(origins, at.row, at.chunk, args.dt.shape[3], args.x.shape[1]);
    const std::int64_t pitch = padded<T>(at.columns), t0 = steps.first + at.i0;
    compute_outputs<T>(args, steps, at, tile);
    if (args.z.ndim >= 0) {
        load_padded(tile.operand, pitch, steps_at(args.z, at.row, t0, at.head, at.p0), at.rows,
                    at.columns);
        for (std::int64_t i = 0; i < at.rows * pitch; i += kLanes<T>)
            store<T>(tile.y + i, load<T>(tile.y + i) * silu<T>(load<T>(tile.operand + i)));
    }
    for (std::int64_t i = 0; i < at.rows; ++i)
        if (!steps.keeps(at.i0 + i)) fill(tile.y + i * pitch, pitch, T(0));
    store_tile(steps_at(args.y, at.row, t0, at.head, at.p0), tile.y, pitch, at.rows, at.columns);
}

template <class T>
void output(const SsdChunkOutputArgs& args, const std::int64_t* origins, int threads) {
    const OutputCut cut(args);
    const std::int64_t wide = padded<T>(min(cut.headdim, kWidthBlock));
    const std::int64_t elements = OutputTile<T>::elements(wide);
    const int used = threads_for(cut.work(), threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * used));
    parallel_for(cut.tasks(), used, [&](std::int64_t task, int thread) {
        const OutputTile<T> tile(static_cast<T*>(scratch.data()) + elements * thread, wide);
        const OutputBlock at = cut.block(task);
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
