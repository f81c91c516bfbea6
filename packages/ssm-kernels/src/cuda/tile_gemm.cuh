// Products of small matrices by the lanes of a warp: accumulators (16 x 8) += left (16 x 16) times
// right (16 x 8), on tensor cores where the CUTLASS headers are there. Only this file and
// warpgroup_gemm.cuh know them.
//
// Where the lane l, with g = l / 4 and t = l % 4, has the elements of a fragment:
//   left         pairs of neighbours along k: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   right        pairs of neighbours along k: (2t, g), (2t + 8, g); one Fragment is two of them
//   accumulators (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// so two neighbouring accumulators, rounded, are a left fragment.   PTX ISA, mma.m16n8k16
#pragma once

#include "element.cuh"

#if defined(__CUDACC__) && defined(SSM_CUTLASS)
#include <cute/arch/mma_sm80.hpp>
#endif

namespace ssm::cuda {

/// Whether products of an element type are one instruction; others need registers to be made. The
/// host goes the way of tensor cores.
template <class Element>
constexpr bool kIsOneInstruction =
#if defined(SSM_CUTLASS) || !defined(__CUDACC__)
    sizeof(Element) == 2;
#else
    false;
#endif

/// What a lane has of a left operand, or of two right operands side by side.
template <class Element>
struct Fragment {
    Pair<Element> of[4];
};

/// A matrix in the block's memory of elements: row r begins at place + r stride. Without conflicts
/// of banks if stride / 8 is odd.
struct Matrix {
    int place, stride;
    SSM_DEVICE int at(int row, int column) const { return place + row * stride + column; }
};

/// The stride of rows of `columns` elements, a multiple of 16.
SSM_BOTH constexpr int matrix_stride(int columns) { return columns + 8; }

// Elements --------------------------------------------------------------------------------------

template <class Element>
SSM_DEVICE auto first_of(Pair<Element> pair) {
    if constexpr (sizeof(Element) == 2)
        return widen(Element{static_cast<std::uint16_t>(pair.bits)});
    else
        return widen(pair.of[0]);
}
template <class Element>
SSM_DEVICE auto second_of(Pair<Element> pair) {
    if constexpr (sizeof(Element) == 2)
        return widen(Element{static_cast<std::uint16_t>(pair.bits >> 16)});
    else
        return widen(pair.of[1]);
}

/// The finite number next to a value that an operand of a product can hold: a state beyond the
/// range of float16 stays large, and does not become infinite. NaN stays NaN.
template <class Element, class Real>
SSM_DEVICE Real finite(Real value) {
    if constexpr (std::is_same_v<Element, F16>) {
        constexpr Real kMost = 65504;
        value = value > kMost ? kMost : value;
        value = value < -kMost ? -kMost : value;
    }
    return value;
}

/// Two values, each rounded once.
template <class Element, class Real>
SSM_DEVICE Pair<Element> pair_of(Real first, Real second) {
#if defined(__CUDACC__)
    if constexpr (std::is_same_v<Element, Bf16>) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
        return {*reinterpret_cast<const std::uint32_t*>(&two)};
    }
#endif
    Element two[2];
    narrow(first, two[0]);
    narrow(second, two[1]);
    if constexpr (sizeof(Element) == 2)
        return {two[0].bits | static_cast<std::uint32_t>(two[1].bits) << 16};
    else
        return {{two[0], two[1]}};
}

/// The same for an operand of a product.
template <class Element, class Real>
SSM_DEVICE Pair<Element> operand(Real first, Real second) {
    return pair_of<Element>(finite<Element>(first), finite<Element>(second));
}

/// A left fragment from two accumulators that are neighbours along their columns.
template <class Element, class Real>
SSM_DEVICE Fragment<Element> left_of(const Real (&near)[4], const Real (&far)[4]) {
    return {{operand<Element>(near[0], near[1]), operand<Element>(near[2], near[3]),
             operand<Element>(far[0], far[1]), operand<Element>(far[2], far[3])}};
}

// Memory ----------------------------------------------------------------------------------------

/// Loads the left operand whose first element is (row, k) of a matrix stored as (row, k), or, if it
/// is transposed, as (k, row). `get(lane)` is a Fragment.
template <bool kTransposed = false, class Warp, class Stored, class Get>
SSM_DEVICE void load_left(Warp& warp, const Stored& from, int row, int k, Get&& get) {
    warp.template load<kTransposed>(
        [&](int lane) {
            const int low = lane % 16, high = lane / 16 * 8;
            const int across = lane % 8 + high, eighth = lane / 8 % 2 * 8;
            return kTransposed ? from.at(k + across, row + eighth) : from.at(row + low, k + high);
        },
        get);
}

/// Loads the two right operands whose first elements are (k, column) and (k, column + 8) of a
/// matrix stored as (column, k), or, if it is transposed, as (k, column).
template <bool kTransposed = false, class Warp, class Stored, class Get>
SSM_DEVICE void load_right(Warp& warp, const Stored& from, int k, int column, Get&& get) {
    warp.template load<kTransposed>(
        [&](int lane) {
            const int low = lane % 16, high = lane / 16 * 8;
            const int across = lane % 8 + high, eighth = lane / 8 % 2 * 8;
            return kTransposed ? from.at(k + low, column + high)
                               : from.at(column + across, k + eighth);
        },
        get);
}

// Products --------------------------------------------------------------------------------------

#if defined(__CUDACC__)

/// Without tensor cores: each lane fetches the rows and columns of its accumulators.
template <class Element>
SSM_DEVICE void multiply_plain(float (&sums)[4], const Pair<Element> (&left)[4],
                               const Pair<Element>* right) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    SSM_UNROLL
    for (int half = 0; half < 2; ++half) {
        // All of it at once would take more registers than there are.
        SSM_ROLLED
        for (int owner = 0; owner < 4; ++owner) {
            SSM_UNROLL
            for (int odd = 0; odd < 2; ++odd) {
                const auto fetch = [&](Pair<Element> two, int from) {
                    return __shfl_sync(0xffffffffu, odd == 0 ? first_of(two) : second_of(two),
                                       from + owner);
                };
                const float upper = fetch(left[2 * half], lane / 4 * 4);
                const float lower = fetch(left[2 * half + 1], lane / 4 * 4);
                const float near = fetch(right[half], lane % 4 * 8);
                const float far = fetch(right[half], lane % 4 * 8 + 4);
                sums[0] = fmaf(upper, near, sums[0]), sums[1] = fmaf(upper, far, sums[1]);
                sums[2] = fmaf(lower, near, sums[2]), sums[3] = fmaf(lower, far, sums[3]);
            }
        }
    }
}

#if defined(SSM_CUTLASS)

/// A float as the sum of two numbers with 11 significant bits, and an error of 2^-22.
struct Split {
    std::uint32_t high, low;
    SSM_DEVICE explicit Split(float value) {
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(value));
        const float rest = value - __uint_as_float(high);
        // Infinities have no rest.
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(rest == rest ? rest : 0.0f));
    }
};

/// Three products of the parts of floats; that of the low parts is beyond their accuracy. The
/// instruction takes 8 neighbours along k, the first of each pair as its columns t, the second as
/// t + 4: an order of the sum, the same for both operands.
SSM_DEVICE void multiply_split(float (&sums)[4], const Pair<float> (&left)[4],
                               const Pair<float>* right) {
    using Atom = cute::SM80_16x8x8_F32TF32TF32F32_TN;
    SSM_UNROLL
    for (int half = 0; half < 2; ++half) {
        const Pair<float>&upper = left[2 * half], &lower = left[2 * half + 1];
        const Split a0(upper.of[0]), a1(lower.of[0]), a2(upper.of[1]), a3(lower.of[1]);
        const Split b0(right[half].of[0]), b1(right[half].of[1]);
        float (&c)[4] = sums;
        Atom::fma(c[0], c[1], c[2], c[3], a0.low, a1.low, a2.low, a3.low, b0.high, b1.high, c[0],
                  c[1], c[2], c[3]);
        Atom::fma(c[0], c[1], c[2], c[3], a0.high, a1.high, a2.high, a3.high, b0.low, b1.low, c[0],
                  c[1], c[2], c[3]);
        Atom::fma(c[0], c[1], c[2], c[3], a0.high, a1.high, a2.high, a3.high, b0.high, b1.high,
                  c[0], c[1], c[2], c[3]);
    }
}

template <class Element>
struct TensorCore;
template <>
struct TensorCore<Bf16> {
    using Atom = cute::SM80_16x8x16_F32BF16BF16F32_TN;
};
template <>
struct TensorCore<F16> {
    using Atom = cute::SM80_16x8x16_F32F16F16F32_TN;
};

#endif

/// sums += left times the right operand `side` of two. `sums(lane)` is Real[4]; `left(lane)` and
/// `right(lane)` are Fragments.
template <class Warp, class Sums, class Left, class Right>
SSM_DEVICE void multiply(Warp&, Sums&& sums, Left&& left, Right&& right, int side) {
    using Element = typename Warp::Element;
    float (&c)[4] = sums(0);
    const auto& a = left(0).of;
    const Pair<Element>* const b = right(0).of + 2 * side;
#if defined(SSM_CUTLASS)
    if constexpr (sizeof(Element) == 2)
        TensorCore<Element>::Atom::fma(c[0], c[1], c[2], c[3], a[0].bits, a[1].bits, a[2].bits,
                                       a[3].bits, b[0].bits, b[1].bits, c[0], c[1], c[2], c[3]);
    else
        multiply_split(c, a, b);
#else
    multiply_plain<Element>(c, a, b);
#endif
}

#else

template <class Warp, class Sums, class Left, class Right>
void multiply(Warp&, Sums&& sums, Left&& left, Right&& right, int side) {
    using Real = typename Warp::Real;
    Real A[16][16], B[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, k = lane % 4 * 2;
        for (int pair = 0; pair < 4; ++pair) {
            const auto two = left(lane).of[pair];
            Real* const row = A[g + pair % 2 * 8] + k + pair / 2 * 8;
            row[0] = first_of(two), row[1] = second_of(two);
        }
        for (int pair = 0; pair < 2; ++pair) {
            const auto two = right(lane).of[2 * side + pair];
            B[k + pair * 8][g] = first_of(two), B[k + pair * 8 + 1][g] = second_of(two);
        }
    }
    for (int lane = 0; lane < kWarp; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            Real sum = sums(lane)[i];
            for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
            sums(lane)[i] = sum;
        }
}

#endif

/// sums(lane, side) += left times the right operand `side`, for both sides.
template <class Warp, class Left, class Right, class Sums>
SSM_DEVICE void multiply_both(Warp& warp, Left& left, Right& right, Sums&& sums) {
    SSM_UNROLL
    for (int side = 0; side < 2; ++side)
        multiply(warp, [&](int lane) -> auto& { return sums(lane, side); }, left, right, side);
}

}  // namespace ssm::cuda
