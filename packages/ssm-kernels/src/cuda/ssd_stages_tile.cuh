// What the stages of the state-space dual scan share: tiles of matrices as operands and sums of
// products, and the sequences of a chunk. Operands are of the compute type: what the stages hand
// to each other lies in memory in float32, and products keep that accuracy.
#pragma once

#include <ssm/ssd_stages.h>

#include "ssd_chunk_scan_tile.cuh"

namespace ssm::cuda {

constexpr int kStageTile = kSsdTile;  // rows and columns of a tile

SSM_DEVICE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
SSM_DEVICE std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

inline std::int64_t stage_tiles(std::int64_t size) { return (size + kStageTile - 1) / kStageTile; }

/// Takes apart the number of a block: the index that varies fastest comes first.
struct StageIndex {
    std::int64_t rest;
    SSM_DEVICE std::int64_t next(std::int64_t count) {
        const std::int64_t whole = quotient(rest, count), index = rest - whole * count;
        rest = whole;
        return index;
    }
};

// Sequences -------------------------------------------------------------------------------------

/// The sequence numbers (B, L) of the stages, whose states are those of rows.
struct StageIds {
    Plane<2> seq_idx;
    static constexpr bool state_per_sequence = false;
    static constexpr std::int64_t num_states = -1;
};

/// The steps of one tile of a chunk, as bits.
struct StageSteps {
    std::uint64_t kept;    // neither skipped nor beyond the end
    std::uint64_t starts;  // begin a sequence
    std::int64_t start;    // place in the chunk where the open one began, or -1: before the chunk

    SSM_DEVICE bool keeps(int step) const { return kept >> step & 1; }
    /// Whether the state that enters the chunk enters this step.
    SSM_DEVICE bool enters(int step) const {
        return keeps(step) && start < 0 && !(starts & ~std::uint64_t{0} >> (kStageTile - 1 - step));
    }
    /// The first step, counted from the place `from` of the chunk, that a step sees; `own` is the
    /// place of the tile.
    SSM_DEVICE std::int64_t first_seen(int step, std::int64_t own, std::int64_t from) const {
        const std::uint64_t upto = starts & ~std::uint64_t{0} >> (kStageTile - 1 - step);
        const std::int64_t first = upto != 0 ? own + highest_bit(upto) : most(start, 0);
        return first - from;
    }
};

SSM_DEVICE std::uint64_t first_bits(std::int64_t count) {
    if (count <= 0) return 0;
    return count >= 64 ? ~std::uint64_t{0} : ~std::uint64_t{0} >> (64 - count);
}

/// Walks the tiles of one chunk.
class StageWalk {
  public:
    SSM_DEVICE StageWalk(const StageIds& ids, std::int64_t row, std::int64_t first,
                         std::int64_t end)
        : row_(row), first_(first), tile_(first - kStageTile), end_(end) {
        if (ids.seq_idx) before_ = sequence_before(ids, row, first);
    }

    /// The steps of the next tile.
    template <class Block>
    SSM_DEVICE StageSteps next(Block& block, const StageIds& ids) {
        if (marks_.starts != 0) start_ = tile_ - first_ + highest_bit(marks_.starts);
        tile_ += kStageTile;
        std::uint64_t kept = first_bits(end_ - tile_);
        if (ids.seq_idx) {
            marks_ = ssd_marks(block, ids, row_, tile_, end_, before_);
            kept &= ~marks_.skipped;
            if (kept != 0) before_ = sequence_at(ids, row_, tile_ + highest_bit(kept));
        }
        return {kept, marks_.starts, start_};
    }
    /// Place in the chunk of the last start, or -1; after the last tile.
    template <class Block>
    SSM_DEVICE std::int64_t last_start(Block& block, const StageIds& ids) {
        if (!ids.seq_idx) return -1;
        while (tile_ < end_) next(block, ids);
        return start_;
    }

  private:
    std::int64_t row_, first_, tile_, end_, start_ = -1;
    std::int32_t before_ = -1;
    SsdMarks marks_;
};

/// The steps of the tile at `begin` that are neither skipped nor beyond the end, as bits.
template <class Block>
SSM_DEVICE std::uint64_t kept_steps(Block& block, const StageIds& ids, std::int64_t row,
                                    std::int64_t begin, std::int64_t end) {
    if (!ids.seq_idx) return first_bits(end - begin);
    std::uint64_t kept = 0;
    for (int half = 0; half < kStageTile; half += kWarp)
        kept |= static_cast<std::uint64_t>(block.vote([&](int thread) {
                    const std::int64_t step = begin + half + thread % kWarp;
                    return step < end && sequence_at(ids, row, step) >= 0;
                }))
                << half;
    return kept;
}

// Matrices in memory ----------------------------------------------------------------------------

/// Two axes of a tensor, from an element on.
template <int kDims>
SSM_DEVICE Plane<2> part_of(const Plane<kDims>& tensor, std::int64_t offset, int rows,
                            int columns) {
    const int bytes = tensor.dtype == DType::f64 ? 8 : tensor.dtype == DType::f32 ? 4 : 2;
    Plane<2> part;
    part.data = static_cast<char*>(tensor.data) + offset * bytes;
    part.stride[0] = tensor.stride[rows], part.stride[1] = tensor.stride[columns];
    part.dtype = tensor.dtype;
    return part;
}

/// Steps and columns of one head or group of a tensor (B, L, H, P) or (B, L, G, N).
SSM_DEVICE Plane<2> steps_of(const Plane<4>& tensor, std::int64_t row, std::int64_t step,
                             std::int64_t head, std::int64_t column) {
    return part_of(tensor,
                   row * tensor.stride[0] + step * tensor.stride[1] + head * tensor.stride[2] +
                       column * tensor.stride[3],
                   1, 3);
}
/// An element of a tensor (B, C, H, P, N).
SSM_DEVICE std::int64_t state_at(const Plane<5>& tensor, std::int64_t row, std::int64_t chunk,
                                 std::int64_t head, std::int64_t p, std::int64_t n) {
    return row * tensor.stride[0] + chunk * tensor.stride[1] + head * tensor.stride[2] +
           p * tensor.stride[3] + n * tensor.stride[4];
}
/// Channels and states of one chunk and head of a tensor (B, C, H, P, N); pairs of steps of one
/// chunk and group of (B, C, G, Q, Q).
SSM_DEVICE Plane<2> chunk_of(const Plane<5>& tensor, std::int64_t row, std::int64_t chunk,
                             std::int64_t head, std::int64_t p, std::int64_t n) {
    return part_of(tensor, state_at(tensor, row, chunk, head, p, n), 3, 4);
}
/// An element of a tensor (B, H, C, Q) or (B, H, P, N).
SSM_DEVICE std::int64_t line_at(const Plane<4>& tensor, std::int64_t row, std::int64_t head,
                                std::int64_t chunk, std::int64_t step) {
    return row * tensor.stride[0] + head * tensor.stride[1] + chunk * tensor.stride[2] +
           step * tensor.stride[3];
}

/// How the states (B, C, H, P, N) are cut into parts, each of which goes from chunk to chunk alone.
struct StagePassing {
    static constexpr int kThreads = 128, kOwn = 4;  // elements of a thread

    StageIds ids;
    std::int64_t batch, chunks, heads, headdim, dstate, size, seqlen, parts;

    StagePassing() = default;
    explicit StagePassing(const SsdStatePassingArgs& args)
        : ids{plane<2>(args.seq_idx)},
          batch(args.states_in.shape[0]),
          chunks(args.states_in.shape[1]),
          heads(args.states_in.shape[2]),
          headdim(args.states_in.shape[3]),
          dstate(args.states_in.shape[4]),
          size(args.dA_cumsum.shape[3]),
          seqlen(args.seq_idx.ndim == kAbsent ? chunks * size : args.seq_idx.shape[1]),
          parts((headdim * dstate + kThreads * kOwn - 1) / (kThreads * kOwn)) {}

    std::int64_t blocks() const { return batch * heads * parts; }
    /// Warps that have elements of one state.
    SSM_BOTH std::int64_t shares() const { return parts * (kThreads / kWarp); }

    /// Whether the state that enters a chunk leaves it: no sequence starts there.
    template <class Block>
    SSM_DEVICE bool goes_on(Block& block, std::int64_t row, std::int64_t chunk) const {
        const std::int64_t first = chunk * size, end = least(first + size, seqlen);
        return StageWalk(ids, row, first, end).last_start(block, ids) < 0;
    }
    /// Calls use(i, p, n) for the elements of a thread.
    template <class Use>
    SSM_DEVICE void each(std::int64_t part, int thread, Use&& use) const {
        SSM_UNROLL
        for (int i = 0; i < kOwn; ++i) {
            const std::int64_t element = (part * kOwn + i) * kThreads + thread;
            const std::int64_t p = quotient(element, dstate);
            if (p < headdim) use(i, p, element - p * dstate);
        }
    }
};

// Tiles -----------------------------------------------------------------------------------------

/// A block of four warps that adds up products of tiles: each warp has 16 rows of the sums.
template <class Scalar>
struct StageTiles {
    static constexpr int kThreads = kSsdThreads;
    static constexpr int kBlocksPerUnit = 4;
    using Real = Scalar;
    using Element = Scalar;

    static constexpr int kAcross = matrix_stride(kStageTile);
    static constexpr int kSums = kStageTile / 8;

    struct Registers {
        Real sums[kSums][4];
    };

    SSM_BOTH std::int64_t matrix_size() const { return 2 * kStageTile * kAcross; }

    static SSM_DEVICE Matrix left() { return {0, kAcross}; }
    static SSM_DEVICE Matrix right() { return {kStageTile * kAcross, kAcross}; }

    static SSM_DEVICE void clear(Real (&sums)[kSums][4]) {
        SSM_UNROLL
        for (int i = 0; i < 4 * kSums; ++i) sums[i / 4][i % 4] = 0;
    }

    /// Writes a tile: use(row, column, value) of what exists, else 0.
    template <class Block, class Use>
    static SSM_DEVICE void fill(Block& block, int thread, const Matrix& to, const Plane<2>& from,
                                std::int64_t rows, std::int64_t columns, Use&& use) {
        constexpr int kPairs = kStageTile / 2, kRows = kThreads / kPairs;
        thread = fresh(thread);
        const int column = thread % kPairs * 2, end = static_cast<int>(least(rows, kStageTile));
        const bool has_first = column < columns, has_second = column + 1 < columns;
        visit(from.dtype, [&](auto* type) {
            using Memory = std::remove_pointer_t<decltype(type)>;
            const std::int64_t begin = thread / kPairs * from.stride[0] + column * from.stride[1];
            const Memory* at = static_cast<const Memory*>(from.data) + begin;
            SSM_UNROLL_BY(4)
            for (int row = thread / kPairs; row < kStageTile; row += kRows) {
                Real pair[2] = {0, 0};
                if (has_first && row < end) pair[0] = use(row, column, number(at[0]));
                if (has_second && row < end)
                    pair[1] = use(row, column + 1, number(at[from.stride[1]]));
                block.write_pair(to.at(row, column), operand<Element>(pair[0], pair[1]));
                at += kRows * from.stride[0];
            }
        });
    }
    /// As it lies.
    template <class Block>
    static SSM_DEVICE void fill(Block& block, int thread, const Matrix& to, const Plane<2>& from,
                                std::int64_t rows, std::int64_t columns) {
        fill(block, thread, to, from, rows, columns, [](int, int, Real value) { return value; });
    }

    /// sums(registers) += the product of two tiles, which write(thread) writes. The left one is
    /// stored as (row, k), or, if it is transposed, as (k, row); the right one as (column, k), or
    /// as (k, column).
    template <bool kLeftTransposed, bool kRightTransposed, class Block, class Write, class Get>
    static SSM_DEVICE void add(Block& block, Write&& write, Get&& sums) {
        block.forget();
        block.each([&](int thread, auto&) { write(thread); });
        block.barrier();
        block.each_warp([&](auto& warp) {
            PerLane<Fragment<Element>> a, b;
            SSM_ROLLED
            for (int k = 0; k < kStageTile; k += 16) {
                load_left<kLeftTransposed>(warp, left(), warp.index * 16, k, a);
                SSM_UNROLL
                for (int n = 0; n < kStageTile / 16; ++n) {
                    load_right<kRightTransposed>(warp, right(), k, n * 16, b);
                    multiply_both(warp, a, b, [&](int lane, int side) -> auto& {
                        return sums(warp.registers(lane))[2 * n + side];
                    });
                }
            }
        });
        block.barrier();
    }

    /// Where a sum is: sums[n][i] of its thread, and in the tile.
    struct Spot {
        int n, i, row, column;
    };
    static SSM_DEVICE int row_of(int thread, int half) {
        return thread / kWarp * 16 + thread % kWarp / 4 + half * 8;
    }

    /// Rows of sums times factor(row), or 0 where they do not count, whatever they hold.
    struct Factor {
        bool counts;
        Real by;
    };
    template <class FactorOf>
    static SSM_DEVICE void scale_rows(int thread, Real (&sums)[kSums][4], FactorOf&& factor) {
        SSM_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Factor own = factor(row_of(thread, half));
            SSM_UNROLL
            for (int n = 0; n < kSums; ++n) {
                SSM_UNROLL
                for (int i = 2 * half; i < 2 * half + 2; ++i)
                    sums[n][i] = own.counts ? sums[n][i] * own.by : Real(0);
            }
        }
    }
    /// Calls use(spot, sum, memory) for the sums that exist in a matrix in memory.
    template <class Use>
    static SSM_DEVICE void with_memory(int thread, Real (&sums)[kSums][4], const Plane<2>& matrix,
                                       std::int64_t rows, std::int64_t columns, Use&& use) {
        thread = fresh(thread);
        const int row = row_of(thread, 0), column = thread % 4 * 2;
        const bool here[2] = {row < rows, row + 8 < rows};
        const int end = static_cast<int>(least(columns, kStageTile));
        visit(matrix.dtype, [&](auto* type) {
            using Memory = std::remove_pointer_t<decltype(type)>;
            const std::int64_t begin = row * matrix.stride[0] + column * matrix.stride[1];
            Memory* at = static_cast<Memory*>(matrix.data) + begin;
            SSM_UNROLL
            for (int n = 0; n < kSums; ++n) {
                SSM_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const Spot spot{n, i, row + i / 2 * 8, n * 8 + column + i % 2};
                    if (here[i / 2] && spot.column < end)
                        use(spot, sums[n][i],
                            at[i / 2 * 8 * matrix.stride[0] + i % 2 * matrix.stride[1]]);
                }
                at += 8 * matrix.stride[1];
                // More accesses at a time would not leave registers for anything else.
                if (n % 2 == 1) keep_order();
            }
        });
    }
    static SSM_DEVICE void store(int thread, Real (&sums)[kSums][4], const Plane<2>& to,
                                 std::int64_t rows, std::int64_t columns) {
        with_memory(thread, sums, to, rows, columns,
                    [](const Spot&, Real sum, auto& memory) { narrow(sum, memory); });
    }
    /// The number of a memory cell.
    template <class Memory>
    static SSM_DEVICE Real number(const Memory& memory) {
        return static_cast<Real>(widen(memory));
    }
};

}  // namespace ssm::cuda
