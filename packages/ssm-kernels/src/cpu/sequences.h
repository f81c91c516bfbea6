// Sequences inside rows: what the kernels that walk them share.
#pragma once

#include "../op/runs.h"
#include "parallel.h"
#include "tile.h"

namespace ssm::cpu::SSM_ISA {

/// The first run of a row that ends after step t.
SSM_INLINE const Run* first_run_after(const Runs& runs, std::int64_t row, std::int64_t t) {
    const Run* low = runs.runs + runs.row_begin[row];
    std::int64_t count = runs.row_begin[row + 1] - runs.row_begin[row];
    while (count > 0) {
        const std::int64_t half = count / 2;
        if (low[half].end <= t) {
            low += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return low;
}

/// to = from, or zero where `from` is absent: states of shape (S, D, N) or (S, H, P, N).
template <class T>
void copy_states(const TensorView& from, const TensorView& to, int threads) {
    const int last = to.ndim - 1;
    const std::int64_t heads = to.ndim == 4 ? to.shape[1] : 1;
    parallel_for(to.shape[0] * heads, threads, [&](std::int64_t task, int) {
        const std::int64_t sequence = task / heads, head = task % heads;
        constexpr std::int64_t kLine = 64;
        T line[kLine] = {};
        for (std::int64_t row = 0; row < to.shape[last - 1]; ++row)
            for (std::int64_t n = 0; n < to.shape[last]; n += kLine) {
                const std::int64_t count = min(kLine, to.shape[last] - n);
                const auto part = [&](const TensorView& view) {
                    return plane_at(view,
                                    sequence * view.stride[0] + head * view.stride[1] +
                                        row * view.stride[last - 1] + n * view.stride[last],
                                    0, view.stride[last]);
                };
                if (from.ndim >= 0) load_tile(line, 0, part(from), 1, count);
                store_tile(part(to), line, 0, 1, count);
            }
    });
}

}  // namespace ssm::cpu::SSM_ISA
