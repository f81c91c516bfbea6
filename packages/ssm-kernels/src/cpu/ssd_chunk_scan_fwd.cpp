// State-space dual scan, forward. A task owns one row and a block of heads that share B and C; it
// walks the chunks, and lanes are the channels of a head.
// docs/ops/ssd_chunk_scan.md#algorithm
#include "../op/scratch.h"
#include "ssd_chunk_scan_tile.h"

namespace ssm::cpu::SSM_ISA {

namespace {

// Dense arrays of one chunk in the compute type. Rows of steps are kChunk long.
template <class T>
struct ForwardTile {
    T* begin;
    T* states;  // [head][panel][state][lane]
    T* mix;     // [j][i]  C_i . B_j exp(decay from j to i) s_j, for i from j on
    T* X;       // [step][channel]
    T* wX;      // [step][channel]  X times size and decay up to the end
    T* z;       // [step][channel]
    T* y;       // [step][channel]
    GroupTile<T> group;
    HeadParameters<T> heads;
    StepSizes<T> sizes;

    static std::int64_t elements(const SsdShape& shape) {
        return shape.most_heads() * shape.state_elements() + kChunk * kChunk +
               4 * kChunk * shape.padded_headdim + GroupTile<T>::elements(shape) +
               HeadParameters<T>::elements(shape) + StepSizes<T>::elements(shape);
    }

    ForwardTile(T* memory, const SsdShape& shape)
        : begin(memory),
          states(memory),
          mix(states + shape.most_heads() * shape.state_elements()),
          X(mix + kChunk * kChunk),
          wX(X + kChunk * shape.padded_headdim),
          z(wX + kChunk * shape.padded_headdim),
          y(z + kChunk * shape.padded_headdim),
          group(y + kChunk * shape.padded_headdim),
          heads(group.memory + GroupTile<T>::elements(shape), shape),
          sizes(heads.rate + HeadParameters<T>::elements(shape), shape) {}
};

template <class T>
void scan_head(const SsdChunkScanArgs& args, const SsdShape& shape, const HeadBlock& block,
               const Segment& segment, const ForwardTile<T>& tile, std::int64_t h) {
    const std::int64_t head = block.first + h, pitch = shape.padded_headdim, steps = segment.steps;
    T* const state = tile.states + h * shape.state_elements();
    if (segment.enters) enter(state, args, shape, *segment.first, head);
    const T* const size = tile.sizes.size + h * kChunk;
    const T* const decay = tile.sizes.decay + h * kChunk;
    EndDecays<T> ends;
    ends.compute(decay, steps);
    T weight[kChunk];
    for (std::int64_t t = 0; t < kChunk; ++t) weight[t] = ends.out_of[t] * size[t];
    Segment::for_pieces(segment, [&](std::int64_t at, std::int64_t t, std::int64_t count) {
        load_scaled(tile.X + at * pitch, tile.wX + at * pitch, weight + at, shape,
                    steps_plane(args.X, block.row, head, t), count);
    });
    mix_steps(tile.mix, tile.group.CB, size, decay, steps);
    // Rows are read and written where they lie, if they are one piece of whole panels.
    const Plane y_plane = steps_plane(args.y, block.row, head, segment.first_step());
    const bool whole = segment.first == segment.last && shape.headdim == pitch;
    const bool in_place = whole && is_dense<T>(y_plane, pitch);
    const Rows<T> y = in_place ? Rows<T>{static_cast<T*>(y_plane.data), y_plane.row_stride}
                               : Rows<T>{tile.y, pitch};
    Rows<const T> z{nullptr, 0};
    if (args.z.ndim >= 0) {
        const Plane z_plane = steps_plane(args.z, block.row, head, segment.first_step());
        z = {tile.z, pitch};
        if (whole && is_dense<T>(z_plane, pitch))
            z = {static_cast<const T*>(z_plane.data), z_plane.row_stride};
        else
            Segment::for_pieces(segment, [&](std::int64_t at, std::int64_t t, std::int64_t count) {
                load_tile(tile.z + at * pitch, pitch, steps_plane(args.z, block.row, head, t),
                          count, shape.headdim);
            });
    }
    const bool is_empty = segment.enters && enters_empty(args, *segment.first);
    write_outputs(y, shape, tile.group, is_empty ? nullptr : state, tile.mix, tile.X,
                  tile.heads.skip + h * pitch, ends, z, steps);
    Ahead ahead = look_ahead<T>(shape, block, h, segment.begin, segment.end,
                                {&args.X, &args.y, &args.z}, {&args.B, &args.C});
    advance_state(state, state, shape, tile.group.B, tile.wX, ends.total, steps, ahead);
    if (!in_place)
        Segment::for_pieces(segment, [&](std::int64_t at, std::int64_t t, std::int64_t count) {
            store_tile(steps_plane(args.y, block.row, head, t), tile.y + at * pitch, pitch, count,
                       shape.headdim);
        });
    if (segment.leaves && args.final_states.ndim >= 0 && segment.last->state_out != Run::kNone)
        store_state(state_plane(args.final_states, segment.last->state_out, head), state, shape);
}

template <class T>
void scan_block(const SsdChunkScanArgs& args, const Runs& runs, const SsdShape& shape,
                const PairProducts<T>& products, const HeadBlock& block, T* memory) {
    ForwardTile<T> tile(memory, shape);
    clear(tile.begin, ForwardTile<T>::elements(shape));
    tile.heads.load(args, shape, block);
    const Run* run = runs.runs + runs.row_begin[block.row];
    const Run* const runs_end = runs.runs + runs.row_begin[block.row + 1];
    for (std::int64_t begin = 0; begin < shape.seqlen; begin += kChunk) {
        const std::int64_t end = min(begin + kChunk, shape.seqlen);
        if (args.checkpoints.ndim >= 0 && begin % kSsdChunkScanCheckpoint == 0)
            for (std::int64_t h = 0; h < block.count; ++h)
                store_state(checkpoint_plane(args.checkpoints, block.row, block.first + h, begin),
                            tile.states + h * shape.state_elements(), shape);
        while (run < runs_end && run->end <= begin) ++run;
        Segment segments[kChunk];
        const std::int64_t count = cut_chunk(segments, run, runs_end, begin, end);
        for (const Segment* segment = segments; segment < segments + count; ++segment) {
            tile.group.find_all(args, products, block, *segment);
            tile.sizes.load_from(args, tile.heads, block, *segment);
            for (std::int64_t h = 0; h < block.count; ++h)
                scan_head(args, shape, block, *segment, tile, h);
        }
        if (runs.covers_all) continue;
        clear(tile.y, kChunk * shape.padded_headdim);
        for_gaps(run, runs_end, begin, end, [&](std::int64_t t, std::int64_t steps) {
            for (std::int64_t h = 0; h < block.count; ++h)
                store_tile(steps_plane(args.y, block.row, block.first + h, t), tile.y,
                           shape.padded_headdim, steps, shape.headdim);
        });
    }
}

// Large blocks: the rows of neighbouring heads are neighbours in memory. But no thread should have
// to wait long for another. No sum crosses a head, so that the cut changes no result.
template <class T>
SsdShape shape_of(const SsdChunkScanArgs& args, int threads) {
    constexpr std::int64_t kMostStates = 1 << 17;
    SsdShape shape(args, kPanel<T>);
    shape.cut(1, kMostStates);
    shape.cut(fewest_for_all(shape.blocks_per_group, shape.heads_per_group,
                             shape.batch * shape.groups, threads),
              kMostStates);
    return shape;
}

template <class T>
void scan_rows(const SsdChunkScanArgs& args, const Runs& runs, int threads) {
    const SsdShape shape = shape_of<T>(args, threads);
    // A sequence without steps hands its state on unchanged.
    if (args.final_states.ndim >= 0 && (shape.seqlen == 0 || !runs.covers_all))
        copy_states<T>(args.initial_states, args.final_states, threads);
    const std::int64_t tasks = shape.seqlen == 0 ? 0 : shape.batch * shape.blocks_per_row();
    const std::int64_t elements = round_up(
        max(ForwardTile<T>::elements(shape), PairProducts<T>::local_elements(shape)), kPanel<T>);
    PairProducts<T> products(shape);
    const Scratch scratch(sizeof(T) *
                          static_cast<std::size_t>(elements * threads + products.elements()));
    T* const local = static_cast<T*>(scratch.data());
    products.data = local + elements * threads;
    products.compute(args, runs, local, elements, threads);
    parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
        const HeadBlock block(shape, task / shape.blocks_per_row(), task % shape.blocks_per_row());
        scan_block<T>(args, runs, shape, products, block, local + elements * thread);
    });
}

}  // namespace

void ssd_chunk_scan_fwd(const SsdChunkScanArgs& args, const Runs& runs, int threads) {
    if (args.X.dtype == DType::f64)
        scan_rows<double>(args, runs, threads);
    else
        scan_rows<float>(args, runs, threads);
}

}  // namespace ssm::cpu::SSM_ISA
