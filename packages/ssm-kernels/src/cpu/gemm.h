// Small matrix products in registers: the inner loops of the state-space dual scan and its stages.
//
// A block of the result is a few rows of one panel, which is two vectors wide. One operand is
// broadcast element by element, the other is read as whole vectors.
#pragma once

#include <utility>

#include "gate.h"

namespace ssm::cpu::SSM_ISA {

template <class T>
constexpr std::int64_t kPanel = 2 * kLanes<T>;

// Rows of a block: twice as many accumulators as the multiply-add units need to stay busy, and with
// the panel's two vectors and a broadcast no more than the registers that there are (32 or 16).
constexpr std::int64_t kBlockRows = kVectorBytes == 64 ? 8 : 6;

/// Calls body.operator()<R>(first) for consecutive blocks of R <= kBlockRows rows that cover
/// [0, rows). The blocks differ by one row at most: a last block of one row would wait for itself.
template <class Body, int... kIndex>
SSM_INLINE void visit_block(std::int64_t count, std::int64_t first, const Body& body,
                            std::integer_sequence<int, kIndex...>) {
    (void)((count == kIndex + 1 ? (body.template operator()<kIndex + 1>(first), true) : false) ||
           ...);
}
template <class Body>
SSM_INLINE void for_row_blocks(std::int64_t rows, const Body& body) {
    const std::int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    for (std::int64_t block = 0, first = 0; block < blocks; ++block) {
        const std::int64_t next = rows * (block + 1) / blocks;
        visit_block(next - first, first, body, std::make_integer_sequence<int, kBlockRows>{});
        first = next;
    }
}

/// R rows of a panel.
template <class T, int R>
struct Block {
    Vec<T> rows[R][2];

    SSM_INLINE void clear(Block& block) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) block.rows[r][0] = block.rows[r][1] = zero<T>();
    }

    SSM_INLINE void load_from(Block& block, const T* from, std::int64_t pitch) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            block.rows[r][0] = load<T>(from + r * pitch);
            block.rows[r][1] = load<T>(from + r * pitch + kLanes<T>);
        }
    }

    SSM_INLINE void store_to(T* to, std::int64_t pitch, const Block& block) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            store<T>(to + r * pitch, block.rows[r][0]);
            store<T>(to + r * pitch + kLanes<T>, block.rows[r][1]);
        }
    }

    SSM_INLINE void add_to(T* to, std::int64_t pitch, const Block& block) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            T* const row = to + r * pitch;
            store<T>(row, load<T>(row) + block.rows[r][0]);
            store<T>(row + kLanes<T>, load<T>(row + kLanes<T>) + block.rows[r][1]);
        }
    }

    SSM_INLINE void scale(Block& block, T factor) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            block.rows[r][0] *= factor;
            block.rows[r][1] *= factor;
        }
    }

    /// Row r times factors[r].
    SSM_INLINE void scale_rows(Block& block, const T* factors) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            block.rows[r][0] *= factors[r];
            block.rows[r][1] *= factors[r];
        }
    }

    /// Each row times the panel `factors`.
    SSM_INLINE void scale_lanes(Block& block, const T* factors) {
        const Vec<T> left = load<T>(factors), right = load<T>(factors + kLanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            block.rows[r][0] *= left;
            block.rows[r][1] *= right;
        }
    }

    /// Row r += the panel `factors` times row r of `from`.
    SSM_INLINE void add_product(Block& block, const T* factors, const T* from, std::int64_t pitch) {
        const Vec<T> left = load<T>(factors), right = load<T>(factors + kLanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            block.rows[r][0] += left * load<T>(from + r * pitch);
            block.rows[r][1] += right * load<T>(from + r * pitch + kLanes<T>);
        }
    }

    /// Row r times silu of row r of `z`.
    SSM_INLINE void gate(Block& block, const T* z, std::int64_t pitch) {
        for (int r = 0; r < R; ++r) {
            const Pack<T, 2> weight = silu(take<T>(z + r * pitch, Whole<2>{}));
            for (int half = 0; half < 2; ++half) block.rows[r][half] *= weight.v[half];
        }
    }

    /// The panel `sums` += the sum over rows of `block` times `from`.
    SSM_INLINE void add_dot(T* sums, const Block& block, const T* from, std::int64_t pitch) {
        Vec<T> left = load<T>(sums), right = load<T>(sums + kLanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            left += block.rows[r][0] * load<T>(from + r * pitch);
            right += block.rows[r][1] * load<T>(from + r * pitch + kLanes<T>);
        }
        store<T>(sums, left);
        store<T>(sums + kLanes<T>, right);
    }

    /// block += sum over k of a[r * a_row + k * a_k] b[k * b_k + lane].
    SSM_INLINE void multiply_add(Block& block, const T* a, std::int64_t a_row, std::int64_t a_k,
                                 const T* b, std::int64_t b_k, std::int64_t count) {
        for (std::int64_t k = 0; k < count; ++k) {
            const Vec<T> left = load<T>(b), right = load<T>(b + kLanes<T>);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Vec<T> factor = broadcast(a[r * a_row]);
                block.rows[r][0] += factor * left;
                block.rows[r][1] += factor * right;
            }
            a += a_k;
            b += b_k;
        }
    }

    /// The same for one half of the panel.
    template <int kHalf>
    SSM_INLINE void multiply_add_half(Block& block, const T* a, std::int64_t a_row,
                                      std::int64_t a_k, const T* b, std::int64_t b_k,
                                      std::int64_t count) {
        for (std::int64_t k = 0; k < count; ++k) {
            const Vec<T> half = load<T>(b + kHalf * kLanes<T>);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) block.rows[r][kHalf] += broadcast(a[r * a_row]) * half;
            a += a_k;
            b += b_k;
        }
    }

    /// As multiply_add for R values of k, but row r takes only k <= r: what lies above is not read,
    /// so that a step's infinity does not meet the zero weight of an earlier one.
    SSM_INLINE void multiply_add_lower(Block& block, const T* a, std::int64_t a_row,
                                       std::int64_t a_k, const T* b, std::int64_t b_k) {
#pragma GCC unroll 16
        for (int k = 0; k < R; ++k) {
            const Vec<T> left = load<T>(b + k * b_k), right = load<T>(b + k * b_k + kLanes<T>);
#pragma GCC unroll 16
            for (int r = k; r < R; ++r) {
                const Vec<T> factor = broadcast(a[r * a_row + k * a_k]);
                block.rows[r][0] += factor * left;
                block.rows[r][1] += factor * right;
            }
        }
    }

    /// The same for the triangle above: row r takes only k >= r.
    SSM_INLINE void multiply_add_upper(Block& block, const T* a, std::int64_t a_row,
                                       std::int64_t a_k, const T* b, std::int64_t b_k) {
#pragma GCC unroll 16
        for (int k = 0; k < R; ++k) {
            const Vec<T> left = load<T>(b + k * b_k), right = load<T>(b + k * b_k + kLanes<T>);
#pragma GCC unroll 16
            for (int r = 0; r <= k; ++r) {
                const Vec<T> factor = broadcast(a[r * a_row + k * a_k]);
                block.rows[r][0] += factor * left;
                block.rows[r][1] += factor * right;
            }
        }
    }
};

}  // namespace ssm::cpu::SSM_ISA
