// The state-space dual scan backwards: gradients of one head in one segment.
// docs/ops/ssd_chunk_scan.md#backward
#pragma once

#include "ssd_chunk_scan_tile.h"

namespace ssm::cpu::SSM_ISA {

/// Sums over the steps of one row, for one head.
template <class T>
struct HeadSums {
    T* dA;    // one number
    T* bias;  // one number: gradient of dt_bias
    T* dD;    // [channel]

    static std::int64_t elements(const SsdShape& shape) { return 2 + shape.padded_headdim; }

    explicit HeadSums(T* memory) : dA(memory), bias(memory + 1), dD(memory + 2) {}
};

/// Dense arrays of one segment in the compute type. Rows of steps are kChunk long.
template <class T>
struct AdjointTile {
    T* X;     // [step][channel]
    T* X_t;   // [channel][step]
    T* g;     // [step][channel]  gradient of the output before the gate
    T* g_t;   // [channel][step]
    T* z;     // [step][channel]  gate; then its gradient
    T* y;     // [step][channel]  output before the gate; then rows that enter a state; then dX
    T* mix;   // [j][i]           C_i . B_j exp(decay from j to i) s_j, for i from j on
    T* gX;    // [j][i]           g_i . X_j; then the gradient of the log of the decay from j to i
    T* dCB;   // [j][i]           gradient of C_i . B_j, summed over heads
    T* B_t;   // [state][step]
    T* C_t;   // [state][step]
    T* dB_t;  // [state][step]    summed over heads
    T* dC_t;  // [state][step]    summed over heads
    T* ddt;   // [head][step]

    static std::int64_t elements(const SsdShape& shape) {
        return kChunk *
               (6 * shape.padded_headdim + 4 * shape.dstate + 3 * kChunk + shape.most_heads());
    }

    AdjointTile(T* memory, const SsdShape& shape) {
        const auto take = [&memory](std::int64_t columns) {
            T* const area = memory;
            memory += kChunk * columns;
            return area;
        };
        for (T** area : {&X, &X_t, &g, &g_t, &z, &y}) *area = take(shape.padded_headdim);
        for (T** area : {&mix, &gX, &dCB}) *area = take(kChunk);
        for (T** area : {&B_t, &C_t, &dB_t, &dC_t}) *area = take(shape.dstate);
        ddt = take(shape.most_heads());
    }
};

/// What a product of rows with a state gives to dB or dC: gradient_t += size decay (state rows),
/// with a factor per step; `sizes` may be null, and the first head's sum begins at zero. dots = the
/// steps' sums over states of `matrix_t` times the product, without the sizes.
template <class T>
void add_state_products(T* gradient_t, bool is_first, T* dots, const SsdShape& shape,
                        const T* state, const T* rows_t, const T* matrix_t, const T* decays,
                        const T* sizes, std::int64_t steps) {
    for (std::int64_t t = 0; t < steps; t += kPanel<T>) {
        T sums[kPanel<T>] = {};
        for_row_blocks(shape.dstate, [&]<int R>(std::int64_t n) {
            Block<T, R> products;
            Block<T, R>::clear(products);
            for (std::int64_t p = 0; p < shape.padded_headdim; p += kPanel<T>)
                Block<T, R>::multiply_add(products, state + p * shape.dstate + n * kPanel<T>,
                                          kPanel<T>, 1, rows_t + p * kChunk + t, kChunk, kPanel<T>);
            Block<T, R>::scale_lanes(products, decays + t);
            Block<T, R>::add_dot(sums, products, matrix_t + n * kChunk + t, kChunk);
            if (sizes != nullptr) Block<T, R>::scale_lanes(products, sizes + t);
            if (is_first)
                Block<T, R>::store_to(gradient_t + n * kChunk + t, kChunk, products);
            else
                Block<T, R>::add_to(gradient_t + n * kChunk + t, kChunk, products);
        });
        std::memcpy(dots + t, sums, sizeof sums);
    }
}

/// gX[j][i] = g_i . X_j for i from j on.
template <class T>
void multiply_rows(const AdjointTile<T>& tile, const SsdShape& shape, std::int64_t steps) {
    for_row_blocks(steps, [&]<int R>(std::int64_t j) {
        for (std::int64_t i = j / kPanel<T> * kPanel<T>; i < steps; i += kPanel<T>) {
            Block<T, R> products;
            Block<T, R>::clear(products);
            const T *const X = tile.X_t + j, *const g = tile.g_t + i;
            if (j < i + kLanes<T>)
                Block<T, R>::multiply_add(products, X, 1, kChunk, g, kChunk, shape.padded_headdim);
            else
                Block<T, R>::template multiply_add_half<1>(products, X, 1, kChunk, g, kChunk,
                                                           shape.padded_headdim);
            Block<T, R>::store_to(tile.gX + j * kChunk + i, kChunk, products);
        }
    });
}

/// dX = mix^T g + w B dh + D g, into tile.y; w are the weights of the steps in the state that
/// leaves.
template <class T>
void write_input_gradient(const AdjointTile<T>& tile, const SsdShape& shape,
                          const GroupTile<T>& group, const T* dstate, const T* weight,
                          const T* skip, std::int64_t steps) {
    const std::int64_t pitch = shape.padded_headdim;
    for (std::int64_t p = 0; p < pitch; p += kPanel<T>)
        for_row_blocks(steps, [&]<int R>(std::int64_t j) {
            Block<T, R> dX;
            Block<T, R>::clear(dX);
            Block<T, R>::multiply_add(dX, group.B + j * shape.dstate, shape.dstate, 1,
                                      dstate + p * shape.dstate, kPanel<T>, shape.dstate);
            Block<T, R>::scale_rows(dX, weight + j);
            Block<T, R>::multiply_add_upper(dX, tile.mix + j * kChunk + j, kChunk, 1,
                                            tile.g + j * pitch + p, pitch);
            Block<T, R>::multiply_add(dX, tile.mix + j * kChunk + j + R, kChunk, 1,
                                      tile.g + (j + R) * pitch + p, pitch, steps - j - R);
            Block<T, R>::add_product(dX, skip + p, tile.g + j * pitch + p, pitch);
            Block<T, R>::store_to(tile.y + j * pitch + p, pitch, dX);
        });
}

/// dz and the gradient of the output before the gate, in the places of z and dy.
template <class T>
void differentiate_gate(const SsdShape& shape, const AdjointTile<T>& tile,
                        const GroupTile<T>& group, const EndDecays<T>& ends, const T* size,
                        const T* decay, const T* skip, const T* state, std::int64_t steps) {
    mix_steps(tile.mix, group.CB, size, decay, steps);
    write_outputs<T>({tile.y, shape.padded_headdim}, shape, group, state, tile.mix, tile.X, skip,
                     ends, {nullptr, 0}, steps);
    for (std::int64_t i = 0; i < steps * shape.padded_headdim; i += kLanes<T>) {
        const Vec<T> dy = load<T>(tile.g + i), z = load<T>(tile.z + i), gate = sigmoid<T>(z);
        store<T>(tile.z + i, dy * load<T>(tile.y + i) * gate * (T(1) + z * (T(1) - gate)));
        store<T>(tile.g + i, dy * gate * z);
    }
}

/// What the pairs of steps give: mix, dCB, and per step the gradients of its size (`direct`) and of
/// the logarithm of its decay (`crossing`).
template <class T>
void differentiate_pairs(const AdjointTile<T>& tile, const GroupTile<T>& group, const T* size,
                         const T* decay, T* direct, T* crossing, std::int64_t steps) {
    // One vector per step: the sum over its lanes comes last.
    T lines[kChunk * kLanes<T>] = {};
    for_decays<T>(decay, steps, [&](std::int64_t j, std::int64_t i, auto past, Vec<T> between) {
        const std::int64_t at = j * kChunk + i;
        const Vec<T> CB = load<T>(group.CB + at);
        const Vec<T> gX = past ? load<T>(tile.gX + at) * between : zero<T>();
        const Vec<T> product = past ? gX * CB : zero<T>();
        store<T>(tile.dCB + at, load<T>(tile.dCB + at) + gX * size[j]);
        store<T>(tile.mix + at, CB * between * size[j]);
        store<T>(tile.gX + at, product * size[j]);
        store<T>(lines + j * kLanes<T>, load<T>(lines + j * kLanes<T>) + product);
    });
    const auto sum_rows = [&](T* sums) {
        for (std::int64_t t = 0; t < kChunk; t += kLanes<T>)
            store<T>(sums + t, sum_lanes_of(lines + t * kLanes<T>));
    };
    sum_rows(direct);
    // The decay of step k stands in the decays from every j < k to every i >= k. Summing that
    // rectangle, which gains a row per step, takes no differences.
    constexpr int kVectors = kChunk / kLanes<T>;
    Vec<T> before[kVectors];
    for (int v = 0; v < kVectors; ++v) before[v] = zero<T>();
    for (std::int64_t k = 0; k < steps; ++k) {
        Vec<T> line = zero<T>();
        for (int v = static_cast<int>(k / kLanes<T>); v < kVectors; ++v) {
            const auto from_k = lane_numbers<T>(v * kLanes<T>) >= static_cast<T>(k);
            line += from_k ? before[v] : zero<T>();
            before[v] += load<T>(tile.gX + k * kChunk + v * kLanes<T>);
        }
        store<T>(lines + k * kLanes<T>, line);
    }
    sum_rows(crossing);
}

/// ddt of one head from the gradients of its step sizes; adds up that of dt_bias.
template <class T>
void differentiate_sizes(const SsdChunkScanArgs& args, T* ddt, const T* raw, const T* dsize,
                         T* bias, std::int64_t steps) {
    const T low = static_cast<T>(args.dt_low), high = static_cast<T>(args.dt_high);
    for (std::int64_t t = 0; t < kChunk; t += kLanes<T>) {
        const Vec<T> gradient =
            step_size_gradient<T>(load<T>(raw + t), load<T>(dsize + t), args.softplus, low, high);
        store<T>(ddt + t, lane_numbers<T>(t) < static_cast<T>(steps) ? gradient : zero<T>());
    }
    for (std::int64_t t = 0; t < steps; ++t) *bias += ddt[t];
}

/// Gradients of head h of a block in one segment. `state` is the state that enters the segment;
/// `dstate` is the gradient of the one that leaves it, and becomes that of the one that enters.
/// tile.X, tile.g (the gradient of y) and tile.z are loaded; dX stays in tile.y, dz in tile.z.
template <class T>
void differentiate_head(const SsdChunkScanArgs& args, const SsdShape& shape,
                        const AdjointTile<T>& tile, const GroupTile<T>& group,
                        const HeadParameters<T>& heads, const StepSizes<T>& sizes,
                        const HeadSums<T>& sums, const T* state, T* dstate, std::int64_t h,
                        std::int64_t steps, Ahead& ahead) {
    const std::int64_t pitch = shape.padded_headdim;
    const T *const size = sizes.size + h * kChunk, *const decay = sizes.decay + h * kChunk;
    const T* const skip = heads.skip + h * pitch;
    EndDecays<T> ends;
    ends.compute(decay, steps);
    if (args.z.ndim >= 0)
        differentiate_gate(shape, tile, group, ends, size, decay, skip, state, steps);
    for (std::int64_t p = 0; p < pitch; p += kLanes<T>) {
        Vec<T> dD = load<T>(sums.dD + p);
        for (std::int64_t at = p; at < steps * pitch; at += pitch)
            dD += load<T>(tile.g + at) * load<T>(tile.X + at);
        store<T>(sums.dD + p, dD);
    }
    load_tile(tile.X_t, kChunk, dense_plane(tile.X, 1, pitch), pitch, steps);
    load_tile(tile.g_t, kChunk, dense_plane(tile.g, 1, pitch), pitch, steps);
    multiply_rows(tile, shape, steps);
    T direct[kChunk], crossing[kChunk], into[kChunk], out_of[kChunk];
    differentiate_pairs(tile, group, size, decay, direct, crossing, steps);
    add_state_products<T>(tile.dC_t, h == 0, into, shape, state, tile.g_t, tile.C_t, ends.into,
                          nullptr, steps);
    add_state_products<T>(tile.dB_t, h == 0, out_of, shape, dstate, tile.X_t, tile.B_t, ends.out_of,
                          size, steps);
    T weight[kChunk];
    for (std::int64_t t = 0; t < steps; ++t) weight[t] = ends.out_of[t] * size[t];
    write_input_gradient(tile, shape, group, dstate, weight, skip, steps);
    scale_steps(tile.X, tile.g, ends.into, pitch, steps);
    T products[kPanel<T>] = {};  // of the state that enters and the gradient of the one that leaves
    advance_state(dstate, dstate, shape, group.C, tile.X, ends.total, steps, ahead,
                  [&]<int R>(const Block<T, R>& rows, std::int64_t place) {
                      Block<T, R>::add_dot(products, rows, state + place, kPanel<T>);
                  });

    // The decay of a step stands in what enters and reaches it or a later step, in what an earlier
    // one leaves, and in what passes through.
    const T rate = heads.rate[h] * static_cast<T>(0.6931471805599453);
    T dsize[kChunk] = {}, sum = 0;
    for (std::int64_t t = steps; t-- > 0;) crossing[t] += sum += into[t];
    T through = 0;
    for (const T product : products) through += product;
    sum = ends.total * through;
    for (std::int64_t t = 0; t < steps; ++t) {
        const T exponent = crossing[t] + sum;
        sum += out_of[t] * size[t];
        *sums.dA += exponent * size[t];
        dsize[t] = rate * exponent + (direct[t] + out_of[t]);
    }
    differentiate_sizes(args, tile.ddt + h * kChunk, sizes.raw + h * kChunk, dsize, sums.bias,
                        steps);
}

/// The products of dCB with B and C, once for all heads: dC_i += dCB_ij B_j, dB_j += dCB_ij C_i,
/// without the half of the pairs in which i comes before j.
template <class T>
void add_pair_products(const AdjointTile<T>& tile, const SsdShape& shape, const GroupTile<T>& group,
                       std::int64_t steps) {
    constexpr std::int64_t lanes = kLanes<T>, panel = kPanel<T>;
    const auto add = [&](T* gradient_t, const auto& multiply) {
        for (std::int64_t t = 0; t < steps; t += panel)
            for_row_blocks(shape.dstate, [&]<int R>(std::int64_t n) {
                Block<T, R> products;
                Block<T, R>::clear(products);
                multiply.template operator()<R>(products, n, t, min(t + lanes, steps));
                Block<T, R>::add_to(gradient_t + n * kChunk + t, kChunk, products);
            });
    };
    // The right half of a panel begins at `middle`.
    add(tile.dC_t, [&]<int R>(Block<T, R>& dC, std::int64_t n, std::int64_t t,
                              std::int64_t middle) __attribute__((always_inline)) {
        const std::int64_t end = min(t + panel, steps);
        Block<T, R>::multiply_add(dC, group.B + n, 1, shape.dstate, tile.dCB + t, kChunk, middle);
        Block<T, R>::template multiply_add_half<1>(dC, group.B + middle * shape.dstate + n, 1,
                                                   shape.dstate, tile.dCB + middle * kChunk + t,
                                                   kChunk, end - middle);
    });
    load_tile(tile.mix, kChunk, dense_plane(tile.dCB, 1, kChunk), kChunk, kChunk);
    add(tile.dB_t, [&]<int R>(Block<T, R>& dB, std::int64_t n, std::int64_t t,
                              std::int64_t middle) __attribute__((always_inline)) {
        Block<T, R>::template multiply_add_half<0>(dB, group.C + t * shape.dstate + n, 1,
                                                   shape.dstate, tile.mix + t * kChunk + t, kChunk,
                                                   middle - t);
        Block<T, R>::multiply_add(dB, group.C + middle * shape.dstate + n, 1, shape.dstate,
                                  tile.mix + middle * kChunk + t, kChunk, steps - middle);
    });
}

}  // namespace ssm::cpu::SSM_ISA
