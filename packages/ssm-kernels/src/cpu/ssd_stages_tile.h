// What the stages share: dense products of small tiles, and which steps of a chunk count.
#pragma once

#include <ssm/ssd_stages.h>

#include "../op/runs.h"
#include "tile.h"
#include "vmath.h"

namespace ssm::cpu::SSM_ISA {

// Rows times vectors of an accumulator block: as many as keep two multipliers busy, and fit beside
// their operands in 32 registers, or in 16.
constexpr int kProductRows = 4;
#if defined(__AVX512F__)
constexpr int kProductVectors = 4;
#else
constexpr int kProductVectors = 2;
#endif

/// An operand that is broadcast: element (row, step) is at data[row * row_stride + step * pitch].
template <class T>
struct Factor {
    const T* data;
    std::int64_t row_stride;
    std::int64_t step_stride;
};

/// out[r, v] += sum over k < depth of a(r, k) b[k, v] for a block of accumulators.
template <class T, int kRows, int kVectors>
SSM_INLINE void multiply_block(T* out, std::int64_t out_pitch, const Factor<T>& a, const T* b,
                               std::int64_t b_pitch, std::int64_t depth) {
    constexpr int n = kLanes<T>;
    Vec<T> sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = load<T>(out + r * out_pitch + v * n);
    for (std::int64_t k = 0; k < depth; ++k) {
        Vec<T> columns[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) columns[v] = load<T>(b + k * b_pitch + v * n);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const Vec<T> factor = broadcast(a.data[r * a.row_stride + k * a.step_stride]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * columns[v];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store<T>(out + r * out_pitch + v * n, sums[r][v]);
}

template <class T, int kRows>
SSM_INLINE void multiply_rows(T* out, std::int64_t out_pitch, const Factor<T>& a, const T* b,
                              std::int64_t b_pitch, std::int64_t depth, std::int64_t width) {
    constexpr std::int64_t n = kLanes<T>;
    std::int64_t c = 0;
    for (; c + kProductVectors * n <= width; c += kProductVectors * n)
        multiply_block<T, kRows, kProductVectors>(out + c, out_pitch, a, b + c, b_pitch, depth);
    for (; c < width; c += n)
        multiply_block<T, kRows, 1>(out + c, out_pitch, a, b + c, b_pitch, depth);
}

/// out[r, c] += sum over k of a(r, k) b[k, c] for c < width, a multiple of the lanes. With
/// `triangular`, a(r, k) is 0 for k > r, and k stops there.
template <class T>
static void multiply(T* out, std::int64_t out_pitch, const Factor<T>& a, const T* b,
                     std::int64_t b_pitch, std::int64_t rows, std::int64_t depth,
                     std::int64_t width, bool triangular = false) {
    std::int64_t r = 0;
    const auto step = [&](auto count) {
        constexpr int kRows = decltype(count)::value;
        const std::int64_t end = triangular ? min(depth, r + kRows) : depth;
        multiply_rows<T, kRows>(out + r * out_pitch, out_pitch,
                                {a.data + r * a.row_stride, a.row_stride, a.step_stride}, b,
                                b_pitch, end, width);
        r += kRows;
    };
    while (r + kProductRows <= rows) step(std::integral_constant<int, kProductRows>{});
    while (r < rows) step(std::integral_constant<int, 1>{});
}

/// The least multiple of the lanes that holds `count`.
template <class T>
SSM_INLINE std::int64_t padded(std::int64_t count) {
    return round_up(count, kLanes<T>);
}

/// load_tile, and zeros from `columns` to `pitch`.
template <class T>
SSM_INLINE void load_padded(T* tile, std::int64_t pitch, const Plane& plane, std::int64_t rows,
                            std::int64_t columns) {
    load_tile(tile, pitch, plane, rows, columns);
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = columns; c < pitch; ++c) tile[r * pitch + c] = T(0);
}

template <class T>
SSM_INLINE void fill(T* to, std::int64_t count, T value) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = value;
}

/// e^x, also beyond the range of exp_bounded: 0 or close to it, or infinity.
template <class T>
SSM_INLINE Vec<T> exp_any(Vec<T> x) {
    return exp2<T>(x * static_cast<T>(1.44269504088896340736));
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
    /// Origin of the sequence that is open at the end; Origin::kEntered if all steps are skipped.
    std::int64_t open_at_end() const {
        for (std::int64_t i = count; i-- > 0 && origins != nullptr;)
            if (keeps(i)) return origins[i];
        return Origin::kEntered;
    }
};

}  // namespace ssm::cpu::SSM_ISA
