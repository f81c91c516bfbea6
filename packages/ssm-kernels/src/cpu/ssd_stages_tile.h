// What the stages share: dense products of small tiles, and which steps of a chunk count.
#pragma once

#include <ssm/ssd_stages.h>

#include "../op/runs.h"
#include "gemm.h"
#include "step_size.h"

namespace ssm::cpu::SSM_ISA {

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

/// Takes apart the number of a task: the index that varies fastest comes first.
struct TaskIndex {
    std::int64_t rest;

    std::int64_t next(std::int64_t count) {
        const std::int64_t index = rest % count;
        rest /= count;
        return index;
    }
};

/// An operand that is broadcast: element (row, step) is at data[row * row_stride + step *
/// step_stride].
template <class T>
struct Factor {
    const T* data;
    std::int64_t row_stride;
    std::int64_t step_stride;
};

/// Which a(r, k) are read: all, those with k <= r, or those with k >= r.
enum class Triangle { whole, lower, upper };

/// out[r, c] += sum over k of a(r, k) b[k, c] for c < width, a multiple of the panel.
template <class T, Triangle triangle = Triangle::whole>
static void multiply(T* out, std::int64_t out_pitch, const Factor<T>& a, const T* b,
                     std::int64_t b_pitch, std::int64_t rows, std::int64_t depth,
                     std::int64_t width) {
    for (std::int64_t c = 0; c < width; c += kPanel<T>)
        for_row_blocks(rows, [&]<int R>(std::int64_t r) {
            const std::int64_t row = a.row_stride, step = a.step_stride;
            const T* const factors = a.data + r * row;
            T* const place = out + r * out_pitch + c;
            Block<T, R> sums;
            Block<T, R>::load_from(sums, place, out_pitch);
            if constexpr (triangle == Triangle::whole) {
                Block<T, R>::multiply_add(sums, factors, row, step, b + c, b_pitch, depth);
            } else if constexpr (triangle == Triangle::lower) {
                Block<T, R>::multiply_add(sums, factors, row, step, b + c, b_pitch, r);
                Block<T, R>::multiply_add_lower(sums, factors + r * step, row, step,
                                                b + r * b_pitch + c, b_pitch);
            } else {
                Block<T, R>::multiply_add_upper(sums, factors + r * step, row, step,
                                                b + r * b_pitch + c, b_pitch);
                Block<T, R>::multiply_add(sums, factors + (r + R) * step, row, step,
                                          b + (r + R) * b_pitch + c, b_pitch, depth - r - R);
            }
            Block<T, R>::store_to(place, out_pitch, sums);
        });
}

SSM_INLINE Plane transposed(const Plane& plane) {
    return {plane.data, plane.dtype, plane.column_stride, plane.row_stride};
}

/// The part of a plane from a row and a column on.
SSM_INLINE Plane shifted(const Plane& plane, std::int64_t row, std::int64_t column) {
    const std::int64_t offset = row * plane.row_stride + column * plane.column_stride;
    return {static_cast<char*>(plane.data) + offset * dtype_bytes(plane.dtype), plane.dtype,
            plane.row_stride, plane.column_stride};
}

/// The least multiple of the panel that holds `count`.
template <class T>
SSM_INLINE std::int64_t padded(std::int64_t count) {
    return round_up(count, kPanel<T>);
}

/// load_tile, and zeros from `columns` to `pitch`.
template <class T>
SSM_INLINE void load_padded(T* tile, std::int64_t pitch, const Plane& plane, std::int64_t rows,
                            std::int64_t columns) {
    load_tile(tile, pitch, plane, rows, columns);
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = columns; c < pitch; ++c) tile[r * pitch + c] = T(0);
}

/// out[r, c] += sum over k of a(r, k) plane(k, c), the plane brought through `buffer`, which holds
/// kDepthBlock rows of `buffer_pitch` >= min(padded(width), kWidthBlock) elements.
template <class T>
static void multiply_plane(T* out, std::int64_t out_pitch, const Factor<T>& a, const Plane& plane,
                           T* buffer, std::int64_t rows, std::int64_t depth, std::int64_t width) {
    for (std::int64_t c = 0; c < width; c += kWidthBlock) {
        const std::int64_t columns = min(kWidthBlock, width - c), pitch = padded<T>(columns);
        for (std::int64_t k = 0; k < depth; k += kDepthBlock) {
            const std::int64_t terms = min(kDepthBlock, depth - k);
            load_padded(buffer, pitch, shifted(plane, k, c), terms, columns);
            multiply<T>(out + c, out_pitch,
                        {a.data + k * a.step_stride, a.row_stride, a.step_stride}, buffer, pitch,
                        rows, terms, pitch);
        }
    }
}

/// The elements from i on of one line (row, head, chunk) of an array (B, H, C, Q), as a row.
SSM_INLINE Plane line_at(const TensorView& view, std::int64_t row, std::int64_t head,
                         std::int64_t chunk, std::int64_t i) {
    const std::int64_t* const s = view.stride;
    return plane_at(view, row * s[0] + head * s[1] + chunk * s[2] + i * s[3], 0, s[3]);
}

/// The first element of a plane.
template <class T>
SSM_INLINE T element(const Plane& plane) {
    T value;
    load_tile(&value, 1, plane, 1, 1);
    return value;
}

/// Rows t.. and columns c.. of one head or group of an array (B, L, H, P) or (B, L, G, N).
SSM_INLINE Plane steps_at(const TensorView& view, std::int64_t row, std::int64_t t,
                          std::int64_t head, std::int64_t c) {
    const std::int64_t* const s = view.stride;
    return plane_at(view, row * s[0] + t * s[1] + head * s[2] + c * s[3], s[1], s[3]);
}

/// Rows p.. and columns n.. of the state of one chunk and head, from an array (B, C, H, P, N).
SSM_INLINE Plane state_at(const TensorView& view, std::int64_t row, std::int64_t chunk,
                          std::int64_t head, std::int64_t p, std::int64_t n) {
    const std::int64_t* const s = view.stride;
    return plane_at(view, row * s[0] + chunk * s[1] + head * s[2] + p * s[3] + n * s[4], s[3],
                    s[4]);
}

/// Rows i.. and columns j.. of one chunk and group, from an array (B, C, G, Q, Q).
SSM_INLINE Plane pairs_at(const TensorView& view, std::int64_t row, std::int64_t chunk,
                          std::int64_t group, std::int64_t i, std::int64_t j) {
    return state_at(view, row, chunk, group, i, j);
}

template <class T>
SSM_INLINE void fill(T* to, std::int64_t count, T value) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = value;
}

/// e^x for any x: 0 or close to it, or infinity, beyond the range of exp_bounded.
template <class T>
SSM_INLINE Vec<T> exp_any(Vec<T> x) {
    return decay_of<T>(x * kLog2e<T>);
}

/// One chunk of one row of the batch: its steps before L, and what its sequences say of each.
/// `origins` is null without sequences.
struct ChunkSteps {
    const std::int64_t* origins;
    std::int64_t first;  // step of the row at which the chunk begins
    std::int64_t count;

    ChunkSteps(const std::int64_t* all, std::int64_t row, std::int64_t chunk, std::int64_t size,
               std::int64_t seqlen)
        : origins(all == nullptr ? nullptr : all + row * seqlen + chunk * size),
          first(chunk * size),
          count(min(size, seqlen - chunk * size)) {}

    std::int64_t origin(std::int64_t i) const {
        return origins == nullptr ? Origin::kEntered : origins[i];
    }
    bool keeps(std::int64_t i) const { return origin(i) != Origin::kSkipped; }
    bool enters(std::int64_t i) const { return origin(i) == Origin::kEntered; }
    /// Origin of the sequence that is open at the end; Origin::kEntered if all steps are skipped.
    std::int64_t open_at_end() const {
        for (std::int64_t i = count; i-- > 0 && origins != nullptr;)
            if (keeps(i)) return origins[i];
        return Origin::kEntered;
    }
};

/// Up to kHeadBlock heads side by side, in lanes: their parameters, and what one chunk adds up.
template <class T>
struct HeadLanes {
    double total[kHeadBlock];
    double A[kHeadBlock];
    T bias[kHeadBlock];
    T raw[kRowBlock * kHeadBlock];    // [step][head]  dt + dt_bias
    T step[kRowBlock * kHeadBlock];   // [step][head]  step size, 0 where there is no step
    T decay[kRowBlock * kHeadBlock];  // [step][head]

    void load_parameters(const SsdChunkCumsumArgs& args, std::int64_t h0, std::int64_t width) {
        const auto values = [&](const TensorView& view) {
            return plane_at(view, h0 * view.stride[0], 0, view.stride[0]);
        };
        fill(total, kHeadBlock, 0.0);
        fill(bias, kHeadBlock, T(0));
        load_tile(bias, 0, values(args.A), 1, width);
        for (std::int64_t h = 0; h < kHeadBlock; ++h) A[h] = static_cast<double>(bias[h]);
        fill(bias, kHeadBlock, T(0));
        if (args.dt_bias.ndim >= 0) load_tile(bias, 0, values(args.dt_bias), 1, width);
    }

    /// The step sizes of steps t.. t + count of a row, of which those from `end` on do not exist.
    void load_steps(const SsdChunkCumsumArgs& args, std::int64_t row, std::int64_t t,
                    std::int64_t count, std::int64_t end, std::int64_t h0, std::int64_t width) {
        const T low = static_cast<T>(args.dt_low), high = static_cast<T>(args.dt_high);
        load_padded(raw, kHeadBlock, steps_of(args.dt, row, t, h0), max(0, min(count, end - t)),
                    width);
        for (std::int64_t i = 0; i < count; ++i) {
            const bool takes = is_step(args, row, t + i, end);
            for (std::int64_t h = i * kHeadBlock; h < (i + 1) * kHeadBlock; h += kLanes<T>) {
                const Vec<T> x = load<T>(raw + h) + load<T>(bias + h - i * kHeadBlock);
                store<T>(raw + h, x);
                store<T>(step + h, takes ? step_size<T>(x, args.softplus, low, high) : zero<T>());
            }
        }
    }

    static bool is_step(const SsdChunkCumsumArgs& args, std::int64_t row, std::int64_t t,
                        std::int64_t end) {
        const TensorView& ids = args.seq_idx;
        return t < end &&
               (ids.ndim < 0 || static_cast<const std::int32_t*>(
                                    ids.data)[row * ids.stride[0] + t * ids.stride[1]] >= 0);
    }
    /// Steps t.. and heads h0.. of an array (B, L, H).
    static Plane steps_of(const TensorView& view, std::int64_t row, std::int64_t t,
                          std::int64_t h0) {
        const std::int64_t* const s = view.stride;
        return plane_at(view, row * s[0] + t * s[1] + h0 * s[2], s[1], s[2]);
    }
    /// Steps i.. of one chunk, as rows, and heads h0.. of an array (B, H, C, Q).
    static Plane chunk_of(const TensorView& view, std::int64_t row, std::int64_t h0,
                          std::int64_t chunk, std::int64_t i) {
        const std::int64_t* const s = view.stride;
        return plane_at(view, row * s[0] + h0 * s[1] + chunk * s[2] + i * s[3], s[3], s[1]);
    }
};

/// How the states (B, C, H, P, N) are cut into blocks of at most kTaskStates elements, each of
/// which goes from chunk to chunk alone.
template <class T>
struct PassingCut {
    std::int64_t batch, nchunks, heads, headdim, dstate, size, seqlen;
    std::int64_t width, width_blocks, pitch, tall, row_blocks;

    PassingCut(const SsdStatePassingArgs& args, bool has_ids)
        : batch(args.states_in.shape[0]),
          nchunks(args.states_in.shape[1]),
          heads(args.states_in.shape[2]),
          headdim(args.states_in.shape[3]),
          dstate(args.states_in.shape[4]),
          size(args.dA_cumsum.shape[3]),
          seqlen(has_ids ? args.seq_idx.shape[1] : nchunks * size),
          width(min(dstate, kTaskStates)),
          width_blocks(blocks_of(dstate, kTaskStates)),
          pitch(padded<T>(width)),
          tall(max(1, kTaskStates / max(pitch, 1))),
          row_blocks(blocks_of(headdim, tall)) {}

    std::int64_t work() const { return batch * nchunks * heads * headdim * dstate; }
    std::int64_t blocks() const { return row_blocks * width_blocks; }  // of one state
    std::int64_t elements() const { return tall * pitch; }

    struct Block {
        std::int64_t row, head, number, p0, n0, rows, columns;
    };
    Block block(std::int64_t task) const {
        TaskIndex index{task};
        const std::int64_t number = index.next(blocks()), head = index.next(heads);
        const std::int64_t p0 = number / width_blocks * tall;
        const std::int64_t n0 = number % width_blocks * kTaskStates;
        return {index.rest, head, number, p0, n0, min(tall, headdim - p0), min(width, dstate - n0)};
    }
    /// Whether the state goes on through a chunk, and with which factor.
    bool goes_on(const SsdStatePassingArgs& args, const std::int64_t* origins, const Block& at,
                 std::int64_t chunk, T* factor) const {
        if (ChunkSteps(origins, at.row, chunk, size, seqlen).open_at_end() != Origin::kEntered)
            return false;
        const T decay = element<T>(line_at(args.dA_cumsum, at.row, at.head, chunk, size - 1));
        *factor = exp_any<T>(broadcast(decay))[0];
        return true;
    }
    /// The block in an array (B, H, P, N).
    static Plane whole(const TensorView& view, const Block& at) {
        const std::int64_t* const s = view.stride;
        return plane_at(view, at.row * s[0] + at.head * s[1] + at.p0 * s[2] + at.n0 * s[3], s[2],
                        s[3]);
    }
    /// The block at one chunk in an array (B, C, H, P, N).
    static Plane part(const TensorView& view, const Block& at, std::int64_t chunk) {
        return state_at(view, at.row, chunk, at.head, at.p0, at.n0);
    }
};

/// A block of a state that a chunk adds, and what it is summed from.
template <class T>
struct StateSum {
    std::int64_t deep, tall, wide;  // most terms at a time, rows, and columns as whole panels
    T* sum;                         // [channel][state]
    T* matrix;                      // [step][state]
    T* rows;                        // [step][channel]
    T* weight;                      // [step]
    T* line;                        // [step], for what a weight is made from

    static std::int64_t elements(std::int64_t deep, std::int64_t tall, std::int64_t wide) {
        return (tall + deep) * wide + deep * tall + 2 * padded<T>(deep);
    }
    StateSum(T* memory, std::int64_t deep, std::int64_t tall, std::int64_t wide)
        : deep(deep),
          tall(tall),
          wide(wide),
          sum(memory),
          matrix(sum + tall * wide),
          rows(matrix + deep * wide),
          weight(rows + deep * tall),
          line(weight + padded<T>(deep)) {}

    /// sum = that over the steps k of [begin, end) with counts(k) of the k-th weight times the
    /// outer product of the k-th rows of `channels` and `states`; load_weights(k, depth) loads.
    /// What a step that does not count holds is not used.
    template <class Weights, class Counts>
    void compute(const Plane& channels, const Plane& states, std::int64_t begin, std::int64_t end,
                 std::int64_t height, std::int64_t width, const Weights& load_weights,
                 const Counts& counts) const {
        const std::int64_t pitch = padded<T>(width);
        fill(sum, height * pitch, T(0));
        for (std::int64_t k0 = begin; k0 < end; k0 += deep) {
            const std::int64_t depth = min(deep, end - k0);
            load_weights(k0, depth);
            load_padded(matrix, pitch, shifted(states, k0, 0), depth, width);
            load_tile(rows, height, shifted(channels, k0, 0), depth, height);
            for (std::int64_t k = 0; k < depth; ++k) {
                const bool is_in = counts(k0 + k);
                if (!is_in) fill(matrix + k * pitch, pitch, T(0));
                for (std::int64_t p = 0; p < height; ++p)
                    rows[k * height + p] = is_in ? rows[k * height + p] * weight[k] : T(0);
            }
            multiply<T>(sum, pitch, {rows, 1, height}, matrix, pitch, height, depth, pitch);
        }
    }
};

}  // namespace ssm::cpu::SSM_ISA
