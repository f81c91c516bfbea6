// What all heads of a group share in a chunk: B, C and their products.
#pragma once

#include "ssd_chunk_scan_shape.h"

namespace ssm::cpu::SSM_ISA {

template <class T>
void clear(T* area, std::int64_t count) {
    if (count > 0) std::memset(area, 0, sizeof(T) * static_cast<std::size_t>(count));
}

/// An array of the compute type as a plane.
template <class T>
SSM_INLINE Plane dense_plane(const T* data, std::int64_t row_stride, std::int64_t column_stride) {
    return {const_cast<T*>(data), sizeof(T) == sizeof(double) ? DType::f64 : DType::f32, row_stride,
            column_stride};
}

/// One of B and C at the steps of a segment, [step][state]: where it lies if it lies like that,
/// else copied into a tile. (Rows with gaps between them may fall on each other in the cache.)
template <class T>
const T* steps_of_group(T* tile, const TensorView& view, const SsdShape& shape, std::int64_t row,
                        std::int64_t head, const Segment& segment) {
    const std::int64_t group = group_of(shape, view, head);
    const Plane plane = steps_plane(view, row, group, segment.first_step());
    if (segment.first == segment.last && plane.row_stride == shape.dstate &&
        is_dense<T>(plane, shape.dstate))
        return static_cast<const T*>(plane.data);
    Segment::for_pieces(segment, [&](std::int64_t at, std::int64_t t, std::int64_t count) {
        load_tile(tile + at * shape.dstate, shape.dstate, steps_plane(view, row, group, t), count,
                  shape.dstate);
    });
    return tile;
}

/// C_i . B_j of the pairs of steps of all segments, [j][i] for i from j on: computed once per call,
/// since the heads of a group are cut into several tasks.
template <class T>
struct PairProducts {
    SsdShape shape;
    std::int64_t chunks;
    T* data = nullptr;

    explicit PairProducts(const SsdShape& shape)
        : shape(shape), chunks((shape.seqlen + kChunk - 1) / kChunk) {}

    std::int64_t elements() const { return shape.batch * shape.groups * chunks * kChunk * kChunk; }

    /// Elements of memory that a thread needs to compute them.
    static std::int64_t local_elements(const SsdShape& shape) { return 2 * kChunk * shape.dstate; }

    T* of(std::int64_t row, std::int64_t head, const Segment& segment) const {
        const std::int64_t group = head / shape.heads_per_group;
        const std::int64_t chunk = segment.begin / kChunk;
        return data +
               (((row * shape.groups + group) * chunks + chunk) * kChunk + segment.at) * kChunk;
    }

    /// Thread i works in local + i * per_thread.
    void compute(const SsdChunkScanArgs& args, const Runs& runs, T* local, std::int64_t per_thread,
                 int threads) const {
        if (shape.heads_per_group == 0) return;
        const std::int64_t tasks = shape.batch * shape.groups * chunks;
        parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
            const std::int64_t row = task / chunks / shape.groups;
            const std::int64_t head = task / chunks % shape.groups * shape.heads_per_group;
            const std::int64_t begin = task % chunks * kChunk;
            const Run* const runs_end = runs.runs + runs.row_begin[row + 1];
            Segment segments[kChunk];
            const std::int64_t count =
                cut_chunk(segments, first_run_after(runs, row, begin), runs_end, begin,
                          min(begin + kChunk, shape.seqlen));
            T* const B = local + thread * per_thread;
            for (const Segment* segment = segments; segment < segments + count; ++segment)
                multiply(args, *segment, row, head, B, B + kChunk * shape.dstate);
        });
    }

  private:
    void multiply(const SsdChunkScanArgs& args, const Segment& segment, std::int64_t row,
                  std::int64_t head, T* B_tile, T* C_t) const {
        const T* const B = steps_of_group(B_tile, args.B, shape, row, head, segment);
        Segment::for_pieces(segment, [&](std::int64_t at, std::int64_t t, std::int64_t count) {
            const Plane plane = steps_plane(args.C, row, group_of(shape, args.C, head), t);
            load_tile(C_t + at, kChunk, transposed(plane), shape.dstate, count);
        });
        T* const to = of(row, head, segment);
        for_row_blocks(segment.steps, [&]<int R>(std::int64_t j) {
            for (std::int64_t i = j / kPanel<T> * kPanel<T>; i < segment.steps; i += kPanel<T>) {
                Block<T, R> products;
                Block<T, R>::clear(products);
                Block<T, R>::multiply_add(products, B + j * shape.dstate, shape.dstate, 1, C_t + i,
                                          kChunk, shape.dstate);
                Block<T, R>::store_to(to + j * kChunk + i, kChunk, products);
            }
        });
    }
};

/// B and C of one segment, and their products.
template <class T>
struct GroupTile {
    T* memory;
    const T* B = nullptr;   // [step][state]
    const T* C = nullptr;   // [step][state]
    const T* CB = nullptr;  // [j][i]  C_i . B_j, for i from j on

    static std::int64_t elements(const SsdShape& shape) { return 2 * kChunk * shape.dstate; }

    explicit GroupTile(T* memory) : memory(memory) {}

    void find_B(const SsdChunkScanArgs& args, const SsdShape& shape, const HeadBlock& block,
                const Segment& segment) {
        B = steps_of_group(memory, args.B, shape, block.row, block.first, segment);
    }

    void find_all(const SsdChunkScanArgs& args, const PairProducts<T>& products,
                  const HeadBlock& block, const Segment& segment) {
        const SsdShape& shape = products.shape;
        find_B(args, shape, block, segment);
        C = steps_of_group(memory + kChunk * shape.dstate, args.C, shape, block.row, block.first,
                           segment);
        CB = products.of(block.row, block.first, segment);
    }
};

}  // namespace ssm::cpu::SSM_ISA
