// The state-space dual scan: sizes, the cut of the work, the sequences inside a chunk, and where
// the tensors lie.
#pragma once

#include <ssm/ssd_chunk_scan.h>

#include "gemm.h"
#include "sequences.h"

namespace ssm::cpu::SSM_ISA {

/// Steps of a chunk. The work inside a chunk grows with it, the traffic of states shrinks.
constexpr std::int64_t kChunk = 32;
static_assert(kSsdChunkScanCheckpoint % kChunk == 0);

/// Sizes of one call and its cut into blocks of heads.
struct SsdShape {
    std::int64_t batch, seqlen, heads, headdim, dstate;
    std::int64_t padded_headdim;   // headdim rounded up to whole panels
    std::int64_t groups;           // runs of heads that share both B and C
    std::int64_t heads_per_group;  // 0 without heads
    std::int64_t blocks_per_group = 0;

    SsdShape(const SsdChunkScanArgs& args, std::int64_t panel)
        : batch(args.X.shape[0]),
          seqlen(args.X.shape[1]),
          heads(args.X.shape[2]),
          headdim(args.X.shape[3]),
          dstate(args.B.shape[3]),
          padded_headdim(round_up(headdim, panel)) {
        // B and C may have different group counts: the least common multiple cuts at both.
        groups = least_common_multiple(args.B.shape[2], args.C.shape[2]);
        heads_per_group = heads / groups;
    }

    /// As many blocks as there have to be for a block's states to have `most_states` elements,
    /// which stay in the second-level cache, and at least `blocks`.
    void cut(std::int64_t blocks, std::int64_t most_states) {
        const std::int64_t fitting = max(1, most_states / max(1, state_elements()));
        const std::int64_t needed = (heads_per_group + fitting - 1) / fitting;
        blocks_per_group = min(max(blocks, needed), heads_per_group);
    }

    std::int64_t state_elements() const { return dstate * padded_headdim; }
    std::int64_t blocks_per_row() const { return groups * blocks_per_group; }
    std::int64_t most_heads() const {
        return blocks_per_group == 0 ? 0
                                     : (heads_per_group + blocks_per_group - 1) / blocks_per_group;
    }
};

/// Some heads of one row that share their B and C.
struct HeadBlock {
    std::int64_t row;
    std::int64_t first;
    std::int64_t count;

    /// Block `index` of a row, groups in order.
    HeadBlock(const SsdShape& shape, std::int64_t row, std::int64_t index) : row(row) {
        const std::int64_t base = index / shape.blocks_per_group * shape.heads_per_group;
        const std::int64_t part = index % shape.blocks_per_group;
        const std::int64_t begin = part * shape.heads_per_group / shape.blocks_per_group;
        first = base + begin;
        count = (part + 1) * shape.heads_per_group / shape.blocks_per_group - begin;
    }
};

/// The steps that one sequence has in one chunk: pieces of its runs, without the skipped steps.
struct Segment {
    const Run* first;
    const Run* last;
    std::int64_t begin, end;  // the chunk
    std::int64_t at;          // steps of the chunk's segments before
    std::int64_t steps;
    bool enters;  // the sequence starts here: its state does not come from the chunk before
    bool leaves;  // the sequence ends here

    std::int64_t first_step() const { return max(first->begin, begin); }

    /// Calls body(at, t, count): `count` steps from t on are the segment's steps from `at` on.
    template <class Body>
    SSM_INLINE void for_pieces(const Segment& segment, const Body& body) {
        std::int64_t at = 0;
        for (const Run* run = segment.first; run <= segment.last; ++run) {
            const std::int64_t t = max(run->begin, segment.begin);
            const std::int64_t count = min(run->end, segment.end) - t;
            body(at, t, count);
            at += count;
        }
    }
};

/// Cuts the chunk [begin, end) of a row into segments, in order of time; there are at most kChunk.
/// `runs` to `runs_end` are the runs of the row that end behind `begin`.
static inline std::int64_t cut_chunk(Segment* segments, const Run* runs, const Run* runs_end,
                                     std::int64_t begin, std::int64_t end) {
    std::int64_t count = 0, done = 0;
    for (const Run* run = runs; run < runs_end && run->begin < end; ++run) {
        const std::int64_t steps = min(run->end, end) - max(run->begin, begin);
        const bool goes_on = run->begin < begin || run->state_in == Run::kContinue;
        if (goes_on && count > 0) {
            segments[count - 1].last = run;
            segments[count - 1].steps += steps;
        } else {
            segments[count++] = {run, run, begin, end, done, steps, !goes_on, false};
        }
        const bool returns = run + 1 < runs_end && run[1].state_in == Run::kContinue;
        done += steps;
        segments[count - 1].leaves = run->end <= end && !returns;
    }
    return count;
}

/// Calls body(t, count) for the stretches of skipped steps of a chunk.
template <class Body>
SSM_INLINE void for_gaps(const Run* runs, const Run* runs_end, std::int64_t begin, std::int64_t end,
                         const Body& body) {
    std::int64_t done = begin;
    for (const Run* run = runs; run < runs_end && run->begin < end; ++run) {
        if (done < run->begin) body(done, run->begin - done);
        done = run->end;
    }
    if (done < end) body(done, end - done);
}

SSM_INLINE Plane transposed(const Plane& plane) {
    return {plane.data, plane.dtype, plane.column_stride, plane.row_stride};
}

/// (B, L, H, P) or (B, L, G, N) at one head or group from step t on: rows are steps.
SSM_INLINE Plane steps_plane(const TensorView& view, std::int64_t row, std::int64_t head,
                             std::int64_t t) {
    return plane_at(view, row * view.stride[0] + t * view.stride[1] + head * view.stride[2],
                    view.stride[1], view.stride[3]);
}

/// (B, L, H) from step t on: rows are heads, columns are steps.
SSM_INLINE Plane sizes_plane(const TensorView& view, std::int64_t row, std::int64_t head,
                             std::int64_t t) {
    return plane_at(view, row * view.stride[0] + t * view.stride[1] + head * view.stride[2],
                    view.stride[2], view.stride[1]);
}

/// (S, H, P, N) at one sequence and head: rows are states, columns are channels.
SSM_INLINE Plane state_plane(const TensorView& view, std::int64_t sequence, std::int64_t head) {
    return plane_at(view, sequence * view.stride[0] + head * view.stride[1], view.stride[3],
                    view.stride[2]);
}

/// (B, saved, H, N, P) at the checkpoint of step t: rows are states, columns are channels.
SSM_INLINE Plane checkpoint_plane(const TensorView& view, std::int64_t row, std::int64_t head,
                                  std::int64_t t) {
    return plane_at(
        view,
        row * view.stride[0] + t / kSsdChunkScanCheckpoint * view.stride[1] + head * view.stride[2],
        view.stride[3], view.stride[4]);
}

SSM_INLINE std::int64_t group_of(const SsdShape& shape, const TensorView& view, std::int64_t head) {
    return head / (shape.heads / view.shape[2]);
}

}  // namespace ssm::cpu::SSM_ISA
