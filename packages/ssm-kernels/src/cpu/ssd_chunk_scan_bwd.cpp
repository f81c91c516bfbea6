// State-space dual scan, backward. A task owns one row and a block of heads that share B and C; it
// walks the stretches between checkpoints, and the chunks inside, from the last to the first.
// docs/ops/ssd_chunk_scan.md#backward
#include "../op/scratch.h"
#include "ssd_chunk_scan_adjoint.h"

namespace ssm::cpu::SSM_ISA {

namespace {

constexpr std::int64_t kStretch = kSsdChunkScanCheckpoint;
constexpr std::int64_t kChunks = kStretch / kChunk;  // chunks of a stretch

// Eight blocks, as far as there are heads, whatever the number of threads: the shares of dB and dC
// that are summed in the end are those of blocks.
template <class T>
SsdShape shape_of(const SsdChunkScanArgs& args) {
    SsdShape shape(args, kPanel<T>);
    shape.cut(8, 1 << 16);
    return shape;
}

// Memory that outlives a task: sums per row and head, and per block its share of dB and dC.
template <class T>
struct BackwardPlan {
    SsdShape shape;
    PairProducts<T> products;
    T* sums = nullptr;
    T* partial_dB = nullptr;  // [block of the group][row][group][chunk][state][step]
    T* partial_dC = nullptr;

    explicit BackwardPlan(const SsdChunkScanArgs& args)
        : shape(shape_of<T>(args)), products(shape) {}

    std::int64_t sum_elements() const {
        return shape.batch * shape.heads * HeadSums<T>::elements(shape);
    }
    HeadSums<T> head_sums(std::int64_t row, std::int64_t head) const {
        return HeadSums<T>(sums + (row * shape.heads + head) * HeadSums<T>::elements(shape));
    }

    std::int64_t partial_elements() const {
        return shape.batch * shape.blocks_per_row() * products.chunks * kChunk * shape.dstate;
    }
    /// Of the chunk in which step t is.
    T* partial(T* partials, std::int64_t part, std::int64_t row, std::int64_t group,
               std::int64_t t) const {
        const std::int64_t chunk =
            ((part * shape.batch + row) * shape.groups + group) * products.chunks + t / kChunk;
        return partials + chunk * kChunk * shape.dstate;
    }
};

// Dense arrays of one task.
template <class T>
struct BackwardTile {
    T* begin;
    T* entries;  // [chunk of the stretch][head][state]  states that enter the chunks
    T* fresh;    // a state with which a sequence starts inside a chunk
    T* dstates;  // [head][state]
    AdjointTile<T> adjoint;
    GroupTile<T> group;
    HeadParameters<T> heads;
    StepSizes<T> sizes;

    static std::int64_t elements(const SsdShape& shape) {
        return (shape.most_heads() * (kChunks + 1) + 1) * shape.state_elements() +
               AdjointTile<T>::elements(shape) + GroupTile<T>::elements(shape) +
               HeadParameters<T>::elements(shape) + StepSizes<T>::elements(shape);
    }

    BackwardTile(T* memory, const SsdShape& shape)
        : begin(memory),
          entries(memory),
          fresh(entries + kChunks * shape.most_heads() * shape.state_elements()),
          dstates(fresh + shape.state_elements()),
          adjoint(dstates + shape.most_heads() * shape.state_elements(), shape),
          group(adjoint.X + AdjointTile<T>::elements(shape)),
          heads(group.memory + GroupTile<T>::elements(shape), shape),
          sizes(heads.rate + HeadParameters<T>::elements(shape), shape) {}

    T* entry(const SsdShape& shape, std::int64_t chunk, std::int64_t h) const {
        return entries + (chunk * shape.most_heads() + h) * shape.state_elements();
    }
};

// Everything of one call that a task reads.
template <class T>
struct Call {
    const SsdChunkScanArgs& args;
    const SsdChunkScanGrads& grads;
    const Runs& runs;
    const BackwardPlan<T>& plan;
};

template <class T>
void load_steps(T* tile, const TensorView& view, const SsdShape& shape, const HeadBlock& block,
                std::int64_t head, const Segment& segment) {
    Segment::for_pieces(segment, [&](std::int64_t at, std::int64_t t, std::int64_t count) {
        load_tile(tile + at * shape.padded_headdim, shape.padded_headdim,
                  steps_plane(view, block.row, head, t), count, shape.headdim);
    });
}

template <class T>
void store_steps(const TensorView& view, const T* tile, const SsdShape& shape,
                 const HeadBlock& block, std::int64_t head, const Segment& segment) {
    Segment::for_pieces(segment, [&](std::int64_t at, std::int64_t t, std::int64_t count) {
        store_tile(steps_plane(view, block.row, head, t), tile + at * shape.padded_headdim,
                   shape.padded_headdim, count, shape.headdim);
    });
}

// The states that enter the chunks of the stretch from `begin` on, from its checkpoint. Only the
// last sequence of a chunk goes on to the next.
template <class T>
void compute_entries(const Call<T>& call, const HeadBlock& block, BackwardTile<T>& tile,
                     const Run* run, const Run* runs_end, std::int64_t begin) {
    const SsdChunkScanArgs& args = call.args;
    const SsdShape& shape = call.plan.shape;
    const std::int64_t pitch = shape.padded_headdim,
                       stretch_end = min(begin + kStretch, shape.seqlen);
    for (std::int64_t h = 0; h < block.count; ++h)
        load_state(tile.entry(shape, 0, h), shape,
                   checkpoint_plane(args.checkpoints, block.row, block.first + h, begin));
    std::int64_t chunk = 0;
    for (std::int64_t t = begin; t + kChunk < stretch_end; t += kChunk, ++chunk) {
        while (run < runs_end && run->end <= t) ++run;
        Segment segments[kChunk];
        const std::int64_t count = cut_chunk(segments, run, runs_end, t, t + kChunk);
        if (count == 0) {
            std::memcpy(
                tile.entry(shape, chunk + 1, 0), tile.entry(shape, chunk, 0),
                sizeof(T) * static_cast<std::size_t>(shape.most_heads() * shape.state_elements()));
            continue;
        }
        const Segment& segment = segments[count - 1];
        tile.group.find_B(args, shape, block, segment);
        tile.sizes.load_from(args, tile.heads, block, segment);
        for (std::int64_t h = 0; h < block.count; ++h) {
            T* const state = tile.entry(shape, chunk + 1, h);
            if (segment.enters) enter(state, args, shape, *segment.first, block.first + h);
            const T* const before = segment.enters ? state : tile.entry(shape, chunk, h);
            load_steps(tile.adjoint.X, args.X, shape, block, block.first + h, segment);
            EndDecays<T> ends;
            ends.compute(tile.sizes.decay + h * kChunk, segment.steps);
            T weight[kChunk];
            for (std::int64_t i = 0; i < kChunk; ++i)
                weight[i] = ends.out_of[i] * tile.sizes.size[h * kChunk + i];
            scale_steps(tile.adjoint.X, tile.adjoint.X, weight, pitch, segment.steps);
            Ahead ahead =
                look_ahead<T>(shape, block, h, segment.begin, segment.end, {&args.X}, {&args.B});
            advance_state(state, before, shape, tile.group.B, tile.adjoint.X, ends.total,
                          segment.steps, ahead);
        }
    }
}

template <class T>
void differentiate_segment(const Call<T>& call, const HeadBlock& block, std::int64_t part,
                           BackwardTile<T>& tile, const Segment& segment, std::int64_t chunk) {
    const auto& [args, grads, runs, plan] = call;
    const SsdShape& shape = plan.shape;
    const std::int64_t group = block.first / shape.heads_per_group;
    T* const dB_t = plan.partial(plan.partial_dB, part, block.row, group, segment.begin);
    T* const dC_t = plan.partial(plan.partial_dC, part, block.row, group, segment.begin);
    AdjointTile<T> adjoint = tile.adjoint;
    const bool is_chunk = segment.steps == min(kChunk, shape.seqlen - segment.begin);
    if (is_chunk) {
        adjoint.dB_t = dB_t;
        adjoint.dC_t = dC_t;
    }
    tile.group.find_all(args, plan.products, block, segment);
    const auto transpose = [&](T* to, const T* from) {
        load_tile(to, kChunk, dense_plane(from, 1, shape.dstate), shape.dstate, segment.steps);
    };
    transpose(adjoint.B_t, tile.group.B);
    transpose(adjoint.C_t, tile.group.C);
    tile.sizes.load_from(args, tile.heads, block, segment);
    clear(adjoint.dCB, kChunk * kChunk);
    for (std::int64_t h = 0; h < block.count; ++h) {
        const std::int64_t head = block.first + h;
        const T* state = tile.entry(shape, chunk, h);
        if (segment.enters) {
            enter(tile.fresh, args, shape, *segment.first, head);
            state = tile.fresh;
        }
        T* const dstate = tile.dstates + h * shape.state_elements();
        if (segment.leaves) {
            clear(dstate, shape.state_elements());
            if (grads.dfinal_states.ndim >= 0 && segment.last->state_out != Run::kNone)
                load_state(dstate, shape,
                           state_plane(grads.dfinal_states, segment.last->state_out, head));
        }
        load_steps(adjoint.X, args.X, shape, block, head, segment);
        load_steps(adjoint.g, grads.dy, shape, block, head, segment);
        if (args.z.ndim >= 0) load_steps(adjoint.z, args.z, shape, block, head, segment);
        Ahead ahead =
            look_ahead<T>(shape, block, h, segment.begin, segment.begin - kChunk,
                          {&args.X, &args.z, &grads.dy, &grads.dX, &grads.dz}, {&args.B, &args.C});
        if (chunk == 0 && segment.begin >= kStretch)
            Ahead::add(ahead, {checkpoint_plane(args.checkpoints, block.row, head,
                                                segment.begin - kStretch),
                               shape.dstate, shape.headdim});
        differentiate_head(args, shape, adjoint, tile.group, tile.heads, tile.sizes,
                           plan.head_sums(block.row, head), state, dstate, h, segment.steps, ahead);
        store_steps(grads.dX, adjoint.y, shape, block, head, segment);
        if (args.z.ndim >= 0) store_steps(grads.dz, adjoint.z, shape, block, head, segment);
        if (segment.enters && segment.first->state_in >= 0 && grads.dinitial_states.ndim >= 0)
            store_state(state_plane(grads.dinitial_states, segment.first->state_in, head), dstate,
                        shape);
    }
    add_pair_products(adjoint, shape, tile.group, segment.steps);
    Segment::for_pieces(segment, [&](std::int64_t at, std::int64_t t, std::int64_t count) {
        store_tile(sizes_plane(grads.ddt, block.row, block.first, t), adjoint.ddt + at, kChunk,
                   block.count, count);
        if (is_chunk) return;
        const std::int64_t place = t - segment.begin;
        store_tile(dense_plane(dB_t + place, kChunk, 1), adjoint.dB_t + at, kChunk, shape.dstate,
                   count);
        store_tile(dense_plane(dC_t + place, kChunk, 1), adjoint.dC_t + at, kChunk, shape.dstate,
                   count);
    });
}

// Skipped steps have gradient 0, whatever their inputs hold.
template <class T>
void clear_steps(const Call<T>& call, const HeadBlock& block, std::int64_t part,
                 const BackwardTile<T>& tile, std::int64_t t, std::int64_t steps) {
    const auto& [args, grads, runs, plan] = call;
    const SsdShape& shape = plan.shape;
    T* const zeros = tile.adjoint.y;
    clear(zeros, kChunk * shape.padded_headdim);
    for (std::int64_t h = block.first; h < block.first + block.count; ++h) {
        for (const TensorView* view : {&grads.dX, &grads.dz})
            if (view->ndim >= 0)
                store_tile(steps_plane(*view, block.row, h, t), zeros, shape.padded_headdim, steps,
                           shape.headdim);
        const T none[kChunk] = {};
        store_tile(sizes_plane(grads.ddt, block.row, h, t), none, kChunk, 1, steps);
    }
    const std::int64_t group = block.first / shape.heads_per_group;
    for (T* partials : {plan.partial_dB, plan.partial_dC}) {
        T* const line = plan.partial(partials, part, block.row, group, t) + t % kChunk;
        for (std::int64_t n = 0; n < shape.dstate; ++n) clear(line + n * kChunk, steps);
    }
}

template <class T>
void differentiate_block(const Call<T>& call, const HeadBlock& block, std::int64_t part,
                         T* memory) {
    const auto& [args, grads, runs, plan] = call;
    const SsdShape& shape = plan.shape;
    BackwardTile<T> tile(memory, shape);
    clear(tile.begin, BackwardTile<T>::elements(shape));
    tile.heads.load(args, shape, block);
    for (std::int64_t h = 0; h < block.count; ++h)
        clear(plan.head_sums(block.row, block.first + h).dA, HeadSums<T>::elements(shape));
    const Run* const first_run = runs.runs + runs.row_begin[block.row];
    const Run* const runs_end = runs.runs + runs.row_begin[block.row + 1];
    const Run* run = runs_end;  // the first run that ends behind the chunk's begin
    for (std::int64_t stretch = (shape.seqlen - 1) / kStretch * kStretch;
         stretch >= 0 && stretch < shape.seqlen; stretch -= kStretch) {
        while (run > first_run && (run - 1)->end > stretch) --run;
        compute_entries(call, block, tile, run, runs_end, stretch);
        const std::int64_t last = min(stretch + kStretch, shape.seqlen) - 1;
        for (std::int64_t chunk = (last - stretch) / kChunk; chunk >= 0; --chunk) {
            const std::int64_t begin = stretch + chunk * kChunk;
            const std::int64_t end = min(begin + kChunk, shape.seqlen);
            const Run* here = run;
            while (here < runs_end && here->end <= begin) ++here;
            Segment segments[kChunk];
            for (std::int64_t i = cut_chunk(segments, here, runs_end, begin, end); i-- > 0;)
                differentiate_segment(call, block, part, tile, segments[i], chunk);
            if (!runs.covers_all)
                for_gaps(here, runs_end, begin, end, [&](std::int64_t t, std::int64_t steps) {
                    clear_steps(call, block, part, tile, t, steps);
                });
        }
    }
}

// dB or dC (B, L, G, N) from the blocks' shares, in the order of groups and blocks.
template <class T>
void reduce_partials(const BackwardPlan<T>& plan, T* partials, const TensorView& out, T* local,
                     std::int64_t per_thread, int threads) {
    const SsdShape& shape = plan.shape;
    const std::int64_t merged = shape.groups / out.shape[2];  // groups of heads per group of `out`
    const std::int64_t chunks = plan.products.chunks, elements = kChunk * shape.dstate;
    parallel_for(shape.batch * chunks, threads, [&](std::int64_t task, int thread) {
        const std::int64_t row = task / chunks, begin = task % chunks * kChunk;
        T* const sum = local + per_thread * thread;
        for (std::int64_t group = 0; group < out.shape[2]; ++group) {
            clear(sum, elements);
            for (std::int64_t i = 0; i < merged * shape.blocks_per_group; ++i) {
                const T* const from =
                    plan.partial(partials, i % shape.blocks_per_group, row,
                                 group * merged + i / shape.blocks_per_group, begin);
                for (std::int64_t k = 0; k < elements; k += kLanes<T>)
                    store<T>(sum + k, load<T>(sum + k) + load<T>(from + k));
            }
            store_tile(transposed(steps_plane(out, row, group, begin)), sum, kChunk, shape.dstate,
                       min(kChunk, shape.seqlen - begin));
        }
    });
}

// Adds the rows' sums of one head in order and stores the gradients that belong to the head.
template <class T>
void reduce_rows(const SsdChunkScanArgs& args, const SsdChunkScanGrads& grads,
                 const BackwardPlan<T>& plan, std::int64_t head, T* memory) {
    const SsdShape& shape = plan.shape;
    const std::int64_t elements = HeadSums<T>::elements(shape);
    clear(memory, elements);
    for (std::int64_t row = 0; row < shape.batch; ++row) {
        const T* const from = plan.head_sums(row, head).dA;
        for (std::int64_t i = 0; i < elements; ++i) memory[i] += from[i];
    }
    const HeadSums<T> total(memory);
    const auto place = [&](const TensorView& view) {
        return plane_at(view, head * view.stride[0], 0, view.ndim == 2 ? view.stride[1] : 0);
    };
    store_tile(place(grads.dA), total.dA, 0, 1, 1);
    if (args.dt_bias.ndim >= 0) store_tile(place(grads.ddt_bias), total.bias, 0, 1, 1);
    if (args.D.ndim == 2) store_tile(place(grads.dD), total.dD, 0, 1, shape.headdim);
    if (args.D.ndim != 1) return;
    T sum = 0;
    for (std::int64_t p = 0; p < shape.headdim; ++p) sum += total.dD[p];
    store_tile(place(grads.dD), &sum, 0, 1, 1);
}

template <class T>
void differentiate_rows(const SsdChunkScanArgs& args, const SsdChunkScanGrads& grads,
                        const Runs& runs, int threads) {
    BackwardPlan<T> plan(args);
    const SsdShape& shape = plan.shape;
    const std::int64_t per_thread =
        round_up(max(BackwardTile<T>::elements(shape), HeadSums<T>::elements(shape)), kPanel<T>);
    const Scratch scratch(
        sizeof(T) * static_cast<std::size_t>(per_thread * threads + plan.products.elements() +
                                             2 * plan.partial_elements() + plan.sum_elements()));
    T* const local = static_cast<T*>(scratch.data());
    plan.products.data = local + per_thread * threads;
    plan.partial_dB = plan.products.data + plan.products.elements();
    plan.partial_dC = plan.partial_dB + plan.partial_elements();
    plan.sums = plan.partial_dC + plan.partial_elements();
    if (grads.dinitial_states.ndim >= 0 && (shape.seqlen == 0 || !runs.covers_all))
        copy_states<T>(grads.dfinal_states, grads.dinitial_states, threads);
    plan.products.compute(args, runs, local, per_thread, threads);
    const Call<T> call{args, grads, runs, plan};
    parallel_for(shape.batch * shape.blocks_per_row(), threads, [&](std::int64_t task, int thread) {
        const std::int64_t index = task % shape.blocks_per_row();
        differentiate_block(call, HeadBlock(shape, task / shape.blocks_per_row(), index),
                            index % shape.blocks_per_group, local + per_thread * thread);
    });
    reduce_partials(plan, plan.partial_dB, grads.dB, local, per_thread, threads);
    reduce_partials(plan, plan.partial_dC, grads.dC, local, per_thread, threads);
    parallel_for(shape.heads, threads, [&](std::int64_t head, int thread) {
        reduce_rows(args, grads, plan, head, local + per_thread * thread);
    });
}

}  // namespace

void ssd_chunk_scan_bwd(const SsdChunkScanArgs& args, const SsdChunkScanGrads& grads,
                        const Runs& runs, int threads) {
    if (args.X.dtype == DType::f64)
        differentiate_rows<double>(args, grads, runs, threads);
    else
        differentiate_rows<float>(args, grads, runs, threads);
}

}  // namespace ssm::cpu::SSM_ISA
