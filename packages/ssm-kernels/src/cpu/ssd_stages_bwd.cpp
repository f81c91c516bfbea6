// The five stages of the chunked state-space dual scan, backward. A task owns one block of one
// gradient; what several tasks add to waits in a line per task and is added in their order.
// docs/ops/ssd_stages.md#backward
#include "../op/scratch.h"
#include "parallel.h"
#include "ssd_stages_adjoint.h"

namespace ssm::cpu::SSM_ISA {

namespace {

// Step sizes and decays ---------------------------------------------------------------------------

/// Gradients of the parameters of one head from one chunk.
struct HeadGradients {
    double A, bias;
};

template <class T>
void differentiate_cumsum(const SsdChunkCumsumArgs& args, const SsdChunkCumsumGrads& grads,
                          int threads) {
    const TensorView& first = grads.ddt_out.ndim >= 0 ? grads.ddt_out : grads.ddA_cumsum;
    const std::int64_t batch = args.dt.shape[0], seqlen = args.dt.shape[1];
    const std::int64_t heads = args.dt.shape[2], nchunks = first.shape[2], size = first.shape[3];
    const std::int64_t blocks = blocks_of(heads, kHeadBlock);
    const T low = static_cast<T>(args.dt_low), high = static_cast<T>(args.dt_high);
    const int used = threads_for(32 * batch * nchunks * size * heads, threads);
    const std::size_t local = round_up(sizeof(HeadLanes<T>), 64) * static_cast<std::size_t>(used);
    const Scratch scratch(local + sizeof(HeadGradients) *
                                      static_cast<std::size_t>(batch * nchunks * heads));
    auto* const partial =
        reinterpret_cast<HeadGradients*>(static_cast<char*>(scratch.data()) + local);
    parallel_for(batch * nchunks * blocks, used, [&](std::int64_t task, int thread) {
        HeadLanes<T>& at = *reinterpret_cast<HeadLanes<T>*>(
            static_cast<char*>(scratch.data()) + round_up(sizeof(HeadLanes<T>), 64) * thread);
        TaskIndex index{task};
        const std::int64_t h0 = index.next(blocks) * kHeadBlock;
        const std::int64_t width = min(kHeadBlock, heads - h0);
        const std::int64_t chunk = index.next(nchunks), row = index.rest;
        at.load_parameters(args, h0, width);
        T dstep[kRowBlock * kHeadBlock];
        double dA[kHeadBlock] = {}, dbias[kHeadBlock] = {};
        for (std::int64_t i0 = (size - 1) / kRowBlock * kRowBlock; i0 >= 0; i0 -= kRowBlock) {
            const std::int64_t rows = min(kRowBlock, size - i0), t0 = chunk * size + i0;
            at.load_steps(args, row, t0, rows, seqlen, h0, width);
            const auto get = [&](T* tile, const TensorView& from) {
                fill(tile, kRowBlock * kHeadBlock, T(0));
                if (from.ndim >= 0)
                    load_tile(tile, kHeadBlock, at.chunk_of(from, row, h0, chunk, i0), rows, width);
            };
            get(dstep, grads.ddt_out);
            get(at.decay, grads.ddA_cumsum);
            // A step stands in its own sum and in all that follow: `total` runs from the end.
            for (std::int64_t i = rows; i-- > 0;) {
                const std::int64_t line = i * kHeadBlock;
                const bool takes = at.is_step(args, row, t0 + i, seqlen);
                for (std::int64_t h = 0; h < kHeadBlock; ++h) {
                    at.total[h] += static_cast<double>(at.decay[line + h]);
                    if (!takes) continue;
                    dA[h] += static_cast<double>(at.step[line + h]) * at.total[h];
                    dstep[line + h] += static_cast<T>(at.A[h] * at.total[h]);
                }
                for (std::int64_t h = 0; h < kHeadBlock; h += kLanes<T>)
                    store<T>(dstep + line + h,
                             takes ? step_size_gradient<T>(load<T>(at.raw + line + h),
                                                           load<T>(dstep + line + h), args.softplus,
                                                           low, high)
                                   : zero<T>());
                for (std::int64_t h = 0; h < kHeadBlock; ++h)
                    dbias[h] += static_cast<double>(dstep[line + h]);
            }
            store_tile(at.steps_of(grads.ddt, row, t0, h0), dstep, kHeadBlock,
                       max(0, min(rows, seqlen - t0)), width);
        }
        for (std::int64_t h = 0; h < width; ++h)
            partial[(row * nchunks + chunk) * heads + h0 + h] = {dA[h], dbias[h]};
    });
    for (std::int64_t h = 0; h < heads; ++h) {
        HeadGradients sum{0.0, 0.0};
        for (std::int64_t i = 0; i < batch * nchunks; ++i) {
            sum.A += partial[i * heads + h].A;
            sum.bias += partial[i * heads + h].bias;
        }
        const auto put = [&](const TensorView& to, double value) {
            const T rounded = static_cast<T>(value);
            store_tile(plane_at(to, h * to.stride[0], 0, 0), &rounded, 0, 1, 1);
        };
        put(grads.dA, sum.A);
        if (args.dt_bias.ndim >= 0) put(grads.ddt_bias, sum.bias);
    }
}

// What a chunk adds to the state ------------------------------------------------------------------

/// Working memory of kRowBlock steps of one group.
template <class T>
struct StateAdjointTile {
    std::int64_t tall, wide;  // channels and states, as whole panels
    T* x;                     // [step][channel]
    T* product;               // [step][channel]  dstates B
    T* B;                     // [step][state]
    T* dB;                    // [step][state]
    T* buffer;

    static std::int64_t elements(std::int64_t tall, std::int64_t wide) {
        return 2 * kRowBlock * (tall + wide) + kDepthBlock * min(kWidthBlock, max(tall, wide));
    }
    StateAdjointTile(T* memory, std::int64_t tall, std::int64_t wide)
        : tall(tall),
          wide(wide),
          x(memory),
          product(x + kRowBlock * tall),
          B(product + kRowBlock * tall),
          dB(B + kRowBlock * wide),
          buffer(dB + kRowBlock * wide) {}
};

/// The gradients of one head in a block of steps; adds up dB, and returns the sum of the gradients
/// of the decays' logarithms of all steps but the last of a whole chunk.
template <class T>
T differentiate_state(const SsdChunkStateArgs& args, const SsdChunkStateGrads& grads,
                      const ChunkSteps& steps, std::int64_t open, std::int64_t row,
                      std::int64_t chunk, std::int64_t head, std::int64_t i0, std::int64_t rows,
                      std::int64_t inside, const StateAdjointTile<T>& tile) {
    const std::int64_t headdim = args.x.shape[3], dstate = args.B.shape[3];
    const std::int64_t size = args.dt.shape[3];
    T into[kRowBlock], step[kRowBlock], dots[kRowBlock], ddt[kRowBlock], ddecay[kRowBlock];
    const T last = element<T>(line_at(args.dA_cumsum, row, head, chunk, size - 1));
    load_padded(into, kRowBlock, line_at(args.dA_cumsum, row, head, chunk, i0), 1, rows);
    load_padded(step, kRowBlock, line_at(args.dt, row, head, chunk, i0), 1, rows);
    for (std::int64_t i = 0; i < kRowBlock; i += kLanes<T>)
        store<T>(into + i, exp_any<T>(last - load<T>(into + i)));
    load_padded(tile.x, tile.tall, steps_at(args.x, row, steps.first + i0, head, 0), inside,
                headdim);
    const Plane state = state_at(grads.dstates, row, chunk, head, 0, 0);
    fill(tile.product, inside * tile.tall, T(0));
    // Before the sequence that is open at the end nothing is handed on.
    const std::int64_t used = i0 + inside > max(open, 0) ? inside : 0;
    multiply_plane<T>(tile.product, tile.tall, {tile.B, tile.wide, 1}, transposed(state),
                      tile.buffer, used, dstate, headdim);
    dot_rows(dots, tile.x, tile.product, tile.tall, inside);
    T total = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
        const bool hands_on = i < inside && steps.origin(i0 + i) == open;
        const T weight = hands_on ? into[i] * step[i] : T(0);
        const T through = hands_on ? weight * dots[i] : T(0);
        ddt[i] = hands_on ? into[i] * dots[i] : T(0);
        // The last step of a whole chunk has its own decay on both sides.
        ddecay[i] = -through;
        if (i0 + i < size - 1) total += through;
        if (i >= inside) continue;
        scale_row(tile.product + i * tile.tall, tile.tall, weight, hands_on);
        scale_row(tile.x + i * tile.tall, tile.tall, weight, hands_on);
    }
    multiply_plane<T>(tile.dB, tile.wide, {tile.x, tile.tall, 1}, state, tile.buffer, used, headdim,
                      dstate);
    store_tile(steps_at(grads.dx, row, steps.first + i0, head, 0), tile.product, tile.tall, inside,
               headdim);
    store_tile(line_at(grads.ddt, row, head, chunk, i0), ddt, 0, 1, rows);
    store_tile(line_at(grads.ddA_cumsum, row, head, chunk, i0), ddecay, 0, 1,
               min(rows, size - 1 - i0));
    return total;
}

template <class T>
void differentiate_chunk_state(const SsdChunkStateArgs& args, const SsdChunkStateGrads& grads,
                               const std::int64_t* origins, int threads) {
    const std::int64_t* const shape = args.x.shape;
    const std::int64_t batch = shape[0], seqlen = shape[1], heads = shape[2], headdim = shape[3];
    const std::int64_t groups = args.B.shape[2], dstate = args.B.shape[3];
    const std::int64_t nchunks = args.dt.shape[2], size = args.dt.shape[3];
    const std::int64_t blocks = blocks_of(size, kRowBlock), per_group = heads / groups;
    const std::int64_t tall = padded<T>(headdim), wide = padded<T>(dstate);
    const std::int64_t elements = StateAdjointTile<T>::elements(tall, wide);
    const int used = threads_for(2 * batch * heads * nchunks * size * headdim * dstate, threads);
    const Scratch scratch(
        sizeof(T) * static_cast<std::size_t>(elements * used + batch * nchunks * heads * blocks));
    T* const totals = static_cast<T*>(scratch.data()) + elements * used;
    parallel_for(batch * nchunks * groups * blocks, used, [&](std::int64_t task, int thread) {
        const StateAdjointTile<T> tile(static_cast<T*>(scratch.data()) + elements * thread, tall,
                                       wide);
        TaskIndex index{task};
        const std::int64_t block = index.next(blocks), group = index.next(groups);
        const std::int64_t chunk = index.next(nchunks), row = index.rest, i0 = block * kRowBlock;
        const ChunkSteps steps(origins, row, chunk, size, seqlen);
        const std::int64_t open = steps.open_at_end(), rows = min(kRowBlock, size - i0);
        const std::int64_t inside = max(0, min(rows, steps.count - i0));
        load_padded(tile.B, wide, steps_at(args.B, row, steps.first + i0, group, 0), inside,
                    dstate);
        fill(tile.dB, inside * wide, T(0));
        for (std::int64_t head = group * per_group; head < (group + 1) * per_group; ++head)
            totals[((row * nchunks + chunk) * heads + head) * blocks + block] = differentiate_state(
                args, grads, steps, open, row, chunk, head, i0, rows, inside, tile);
        for (std::int64_t i = 0; i < inside; ++i)
            if (steps.origin(i0 + i) != open) fill(tile.dB + i * wide, wide, T(0));
        store_tile(steps_at(grads.dB, row, steps.first + i0, group, 0), tile.dB, wide, inside,
                   dstate);
    });
    for (std::int64_t line = 0; line < batch * nchunks * heads; ++line) {
        T total = 0;
        for (std::int64_t block = 0; block < blocks; ++block)
            total += totals[line * blocks + block];
        store_tile(line_at(grads.ddA_cumsum, line / heads / nchunks, line % heads,
                           line / heads % nchunks, size - 1),
                   &total, 0, 1, 1);
    }
}

// From chunk to chunk -----------------------------------------------------------------------------

template <class T>
void differentiate_passing(const SsdStatePassingArgs& args, const SsdStatePassingGrads& grads,
                           const std::int64_t* origins, int threads) {
    const PassingCut<T> cut(args, origins != nullptr);
    const std::int64_t elements = 2 * cut.elements(), pitch = cut.pitch, blocks = cut.blocks();
    const int used = threads_for(2 * cut.work(), threads);
    const std::int64_t lines = cut.batch * cut.heads;
    const Scratch scratch(sizeof(T) *
                          static_cast<std::size_t>(elements * used + lines * cut.nchunks * blocks));
    T* const partial = static_cast<T*>(scratch.data()) + elements * used;
    parallel_for(lines * blocks, used, [&](std::int64_t task, int thread) {
        T* const dh = static_cast<T*>(scratch.data()) + elements * thread;
        T* const tile = dh + cut.elements();
        const auto at = cut.block(task);
        const std::int64_t count = at.rows * pitch;
        fill(dh, elements, T(0));
        if (grads.dfinal_states.ndim >= 0)
            load_tile(dh, pitch, cut.whole(grads.dfinal_states, at), at.rows, at.columns);
        for (std::int64_t chunk = cut.nchunks; chunk-- > 0;) {
            store_tile(cut.part(grads.dstates, at, chunk), dh, pitch, at.rows, at.columns);
            T factor = 0, sum = 0;
            const bool goes_on = cut.goes_on(args, origins, at, chunk, &factor);
            if (goes_on) {
                load_tile(tile, pitch, cut.part(args.states_in, at, chunk), at.rows, at.columns);
                sum = factor * dot<T>(tile, dh, count);
            }
            partial[((at.row * cut.heads + at.head) * cut.nchunks + chunk) * blocks + at.number] =
                sum;
            if (grads.dstates_in.ndim >= 0)
                load_tile(tile, pitch, cut.part(grads.dstates_in, at, chunk), at.rows, at.columns);
            else
                fill(tile, count, T(0));
            // What does not go on is selected away: it may be no number.
            for (std::int64_t i = 0; i < count; i += kLanes<T>) {
                const Vec<T> kept = goes_on ? factor * load<T>(dh + i) : zero<T>();
                store<T>(dh + i, kept + load<T>(tile + i));
            }
        }
        if (grads.dinitial_states.ndim >= 0)
            store_tile(cut.whole(grads.dinitial_states, at), dh, pitch, at.rows, at.columns);
    });
    // Only the last element of a line of dA_cumsum is read.
    parallel_for(lines, used, [&](std::int64_t line, int) {
        const T zeros[kRowBlock] = {};
        for (std::int64_t chunk = 0; chunk < cut.nchunks; ++chunk) {
            const auto part = [&](std::int64_t i) {
                return line_at(grads.ddA_cumsum, line / cut.heads, line % cut.heads, chunk, i);
            };
            for (std::int64_t i = 0; i < cut.size - 1; i += kRowBlock)
                store_tile(part(i), zeros, 0, 1, min(kRowBlock, cut.size - 1 - i));
            T sum = 0;
            for (std::int64_t block = 0; block < blocks; ++block)
                sum += partial[(line * cut.nchunks + chunk) * blocks + block];
            store_tile(part(cut.size - 1), &sum, 0, 1, 1);
        }
    });
}

// C B^T -------------------------------------------------------------------------------------------

/// One factor's gradient: rows of `pairs`, dCB or its transpose, times the rows of the other.
template <class T, class Pairs>
void differentiate_factor(const TensorView& gradient, const TensorView& other, const Pairs& pairs,
                          std::int64_t groups, std::int64_t size, int threads) {
    const std::int64_t* const shape = gradient.shape;
    const std::int64_t batch = shape[0], seqlen = shape[1], own = shape[2], dstate = shape[3];
    const std::int64_t nchunks = blocks_of(seqlen, size), blocks = blocks_of(size, kRowBlock);
    const std::int64_t merged = groups / own, of_other = groups / other.shape[2];
    const std::int64_t wide = padded<T>(dstate);
    const std::int64_t elements =
        kRowBlock * (wide + kDepthBlock) + kDepthBlock * min(wide, kWidthBlock);
    const int used = threads_for(batch * seqlen * groups * size * dstate, threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * used));
    parallel_for(batch * nchunks * own * blocks, used, [&](std::int64_t task, int thread) {
        T* const sum = static_cast<T*>(scratch.data()) + elements * thread;
        T* const factor = sum + kRowBlock * wide;
        T* const buffer = factor + kRowBlock * kDepthBlock;
        TaskIndex index{task};
        const std::int64_t i0 = index.next(blocks) * kRowBlock, group = index.next(own);
        const std::int64_t chunk = index.next(nchunks), row = index.rest;
        const std::int64_t t0 = chunk * size, count = min(size, seqlen - t0);
        const std::int64_t rows = min(kRowBlock, count - i0);
        if (rows <= 0) return;
        fill(sum, rows * wide, T(0));
        for (std::int64_t g = group * merged; g < (group + 1) * merged; ++g)
            for (std::int64_t k = 0; k < count; k += kDepthBlock) {
                const std::int64_t depth = min(kDepthBlock, count - k);
                load_tile(factor, kDepthBlock, pairs(row, chunk, g, i0, k), rows, depth);
                multiply_plane<T>(sum, wide, {factor, kDepthBlock, 1},
                                  steps_at(other, row, t0 + k, g / of_other, 0), buffer, rows,
                                  depth, dstate);
            }
        store_tile(steps_at(gradient, row, t0 + i0, group, 0), sum, wide, rows, dstate);
    });
}

template <class T>
void differentiate_bmm(const SsdBmmChunkArgs& args, const SsdBmmChunkGrads& grads, int threads) {
    const std::int64_t groups = grads.dCB.shape[2], size = grads.dCB.shape[3];
    const auto forward = [&](std::int64_t row, std::int64_t chunk, std::int64_t group,
                             std::int64_t i, std::int64_t j) {
        return pairs_at(grads.dCB, row, chunk, group, i, j);
    };
    const auto backward = [&](std::int64_t row, std::int64_t chunk, std::int64_t group,
                              std::int64_t j, std::int64_t i) {
        return transposed(pairs_at(grads.dCB, row, chunk, group, i, j));
    };
    differentiate_factor<T>(grads.dC, args.B, forward, groups, size, threads);
    differentiate_factor<T>(grads.dB, args.C, backward, groups, size, threads);
}

}  // namespace

void ssd_chunk_cumsum_bwd(const SsdChunkCumsumArgs& args, const SsdChunkCumsumGrads& grads,
                          int threads) {
    args.dt.dtype == DType::f64 ? differentiate_cumsum<double>(args, grads, threads)
                                : differentiate_cumsum<float>(args, grads, threads);
}

void ssd_chunk_state_bwd(const SsdChunkStateArgs& args, const SsdChunkStateGrads& grads,
                         const std::int64_t* origins, int threads) {
    args.x.dtype == DType::f64 ? differentiate_chunk_state<double>(args, grads, origins, threads)
                               : differentiate_chunk_state<float>(args, grads, origins, threads);
}

void ssd_state_passing_bwd(const SsdStatePassingArgs& args, const SsdStatePassingGrads& grads,
                           const std::int64_t* origins, int threads) {
    args.states_in.dtype == DType::f64
        ? differentiate_passing<double>(args, grads, origins, threads)
        : differentiate_passing<float>(args, grads, origins, threads);
}

void ssd_bmm_chunk_bwd(const SsdBmmChunkArgs& args, const SsdBmmChunkGrads& grads, int threads) {
    args.C.dtype == DType::f64 ? differentiate_bmm<double>(args, grads, threads)
                               : differentiate_bmm<float>(args, grads, threads);
}

void ssd_chunk_output_bwd(const SsdChunkOutputArgs& args, const SsdChunkOutputGrads& grads,
                          const std::int64_t* origins, int threads) {
    args.x.dtype == DType::f64 ? OutputAdjoint<double>(args, grads, origins).run(threads)
                               : OutputAdjoint<float>(args, grads, origins).run(threads);
}

}  // namespace ssm::cpu::SSM_ISA
