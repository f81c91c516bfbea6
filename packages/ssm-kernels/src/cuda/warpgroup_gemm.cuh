// Products of matrices by the 128 threads of a warpgroup, on the tensor cores of Hopper:
// accumulators (64 x N) += left (64 x K) times right (K x N). A product is begun, goes on beside
// its warpgroup, and is waited for. The other file, beside tile_gemm.cuh, that knows CUTLASS.
//
// Where the thread t has the accumulators [n][i], with g = t % 32 / 4:
//   (t / 32 * 16 + g + i / 2 * 8, 8 n + 2 (t % 4) + i % 2)
// so those of a warp are what tile_gemm.cuh calls accumulators, 16 rows of them, and its left
// fragments are left fragments here.   PTX ISA, wgmma.m64nNk16
#pragma once

#include "tile_gemm.cuh"

#if defined(__CUDACC__) && defined(SSM_CUTLASS)
#include <cute/arch/mma_sm90_gmma.hpp>
#else
#include <array>
#include <cstring>
#endif

namespace ssm::cuda {

/// Whether the code that is being compiled can run on warpgroups.
constexpr bool kHasWarpgroups =
#if !defined(__CUDACC__) || (defined(SSM_CUTLASS) && defined(__CUDA_ARCH_FEAT_SM90_ALL))
    true;
#else
    false;
#endif

/// A matrix of 64 rows in the block's memory of elements, in slabs of 64 columns. The eighths of a
/// row of a slab are swapped by the number of the row: a column of eighths, as well as a row, lies
/// in all banks. Its place is a multiple of kSlab / 8: 1024 bytes.
struct Swizzled {
    static constexpr int kRows = 64, kSlab = kRows * 64;
    int place;
    SSM_DEVICE int at(unsigned row, unsigned column) const {
        const unsigned eighth = (column / 8 ^ row) % 8;
        return place + static_cast<int>(column / 64 * kSlab + row * 64 + eighth * 8 + column % 8);
    }
};

/// What says to a product where 16 of the depth of a swizzled matrix lie, from k on: addresses in
/// units of 16 bytes. If rows are k: the next 64 columns are a slab further, the next 8 rows 1024
/// bytes. Else the next 8 rows are that.   PTX ISA, matrix descriptor
template <bool kRowsAreK>
SSM_DEVICE std::uint64_t descriptor(std::uint32_t address, int k) {
    constexpr std::uint64_t kLeading = kRowsAreK ? Swizzled::kSlab * 2 : 16, kStride = 1024;
    constexpr std::uint64_t kSwizzle128 = 1;
    address += kRowsAreK ? k * 128 : k / 64 * (Swizzled::kSlab * 2) + k % 64 * 2;
    return address >> 4 | kLeading >> 4 << 16 | kStride >> 4 << 32 | kSwizzle128 << 62;
}

/// The compiler has computed these here: not later, and nothing from them before.
template <class Real, int kTiles>
SSM_DEVICE void settle([[maybe_unused]] Real (&sums)[kTiles][4]) {
#if defined(__CUDACC__)
    SSM_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
#endif
}

#if defined(__CUDACC__)
#if defined(SSM_CUTLASS)

template <class Element, int kColumns, bool kRowsAreK>
struct WarpgroupCore;
#define SSM_WARPGROUP_CORE(type, columns, name)                                                   \
    template <bool kRowsAreK>                                                                     \
    struct WarpgroupCore<type, columns, kRowsAreK> {                                              \
        using Major = cute::SM90::GMMA::Major;                                                    \
        static constexpr Major kRight = kRowsAreK ? Major::MN : Major::K;                         \
        using FromMemory = cute::SM90::GMMA::MMA_64x##columns##x16_##name##_SS<Major::K, kRight>; \
        using FromRegisters =                                                                     \
            cute::SM90::GMMA::MMA_64x##columns##x16_##name##_RS<Major::K, kRight>;                \
    };
SSM_WARPGROUP_CORE(Bf16, 64, F32BF16BF16)
SSM_WARPGROUP_CORE(Bf16, 128, F32BF16BF16)
SSM_WARPGROUP_CORE(F16, 64, F32F16F16)
SSM_WARPGROUP_CORE(F16, 128, F32F16F16)
#undef SSM_WARPGROUP_CORE

/// One instruction; `left` is a descriptor or four registers.
template <class Atom, int kTiles, int... kPlaces, class... Left>
SSM_DEVICE void multiply_once(float (&sums)[kTiles][4], std::integer_sequence<int, kPlaces...>,
                              bool add, std::uint64_t right, Left... left) {
    using Out = cute::SM90::GMMA::ScaleOut;
    Atom::fma(left..., right, sums[kPlaces / 4][kPlaces % 4]..., add ? Out::One : Out::Zero);
}

#endif

/// Begins sums = left times right, or sums += that. `sums(thread)` is Real[N / 8][4]; the left
/// matrix is a Swizzled, (row, k), or left(thread, k) is a Fragment of 16 columns; the right one is
/// stored as (column, k), or, if rows are k, as (k, column). Until finish_products the sums may not
/// be touched, nor what lies in shared memory written.
template <int kDepth, bool kRowsAreK, class Group, class Sums, class Left>
SSM_DEVICE void begin_product(Group& group, bool add, Sums&& sums_of, Left&& left,
                              const Swizzled& right) {
#if defined(SSM_CUTLASS)
    using Element = typename Group::Element;
    auto& sums = sums_of(0);
    constexpr int kTiles = std::extent_v<std::remove_reference_t<decltype(sums)>>;
    using Core = WarpgroupCore<Element, 8 * kTiles, kRowsAreK>;
    // The instruction would not read them; the compiler takes them for read, and would keep them.
    SSM_UNROLL
    for (int i = 0; i < 4 * kTiles && !add; ++i) sums[i / 4][i % 4] = 0;
    const std::make_integer_sequence<int, 4 * kTiles> places;
    const std::uint32_t from = group.address_of(right.place);
    if constexpr (std::is_same_v<std::decay_t<Left>, Swizzled>) {
        const std::uint32_t left_from = group.address_of(left.place);
        settle(sums);
        cute::warpgroup_arrive();
        SSM_UNROLL
        for (int k = 0; k < kDepth; k += 16)
            multiply_once<typename Core::FromMemory>(sums, places, add || k > 0,
                                                     descriptor<kRowsAreK>(from, k),
                                                     descriptor<false>(left_from, k));
    } else {
        Fragment<Element> a[kDepth / 16];
        SSM_UNROLL
        for (int k = 0; k < kDepth; k += 16) {
            a[k / 16] = left(0, k);
            for (auto& pair : a[k / 16].of) cute::warpgroup_fence_operand(pair.bits);
        }
        settle(sums);
        cute::warpgroup_arrive();
        SSM_UNROLL
        for (int k = 0; k < kDepth; k += 16) {
            const auto& of = a[k / 16].of;
            multiply_once<typename Core::FromRegisters>(sums, places, add || k > 0,
                                                        descriptor<kRowsAreK>(from, k), of[0].bits,
                                                        of[1].bits, of[2].bits, of[3].bits);
        }
    }
    cute::warpgroup_commit_batch();
#endif
}

/// Waits for all products of the warpgroup but the last kPending, one of which has these sums.
template <int kPending, class Group, class Sums>
SSM_DEVICE void finish_products(Group&, Sums&& sums_of) {
#if defined(SSM_CUTLASS)
    cute::warpgroup_wait<kPending>();
    settle(sums_of(0));
#endif
}

#else

/// Where a product finds an element of an operand by its descriptor: the address in bytes of number
/// `other` of its rows or columns, and k below 16. All layouts of the PTX ISA, in which a unit is
/// 16 bytes.
inline std::uint32_t address_by(std::uint64_t descriptor, bool rows_are_k, int other, int k) {
    const auto field = [&](int bit) {
        return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) << 4;
    };
    const std::uint32_t start = field(0), leading = field(16), stride = field(32);
    const auto mode = static_cast<int>(descriptor >> 62);
    if ((descriptor >> 49 & 7) != 0)
        throw std::logic_error("descriptor with an offset of its base");
    const int width = mode == 0 ? 1 : 16 >> mode;  // units that are swapped
    const int unit = (rows_are_k ? other : k) / 8, within = (rows_are_k ? other : k) % 8 * 2;
    const int line = rows_are_k ? k : other;
    std::uint32_t address = start + within + line % 8 * 16 * width;
    if (mode == 0)
        address +=
            rows_are_k ? unit * stride + line / 8 * leading : unit * leading + line / 8 * stride;
    else
        address += unit % width * 16 + unit / width * leading + line / 8 * stride;
    return address ^ (address >> 7 & (width - 1)) << 4;
}

/// What sums are while a product adds to them.
template <class Real>
bool is_unknown(Real value) {
    const Real unknown = static_cast<Real>(__builtin_nanf("0x5eed"));
    return std::memcmp(&value, &unknown, sizeof value) == 0;
}

template <int kDepth, bool kRowsAreK, class Group, class Sums, class Left>
void begin_product(Group& group, bool add, Sums&& sums_of, Left&& left, const Swizzled& right) {
    using Real = typename Group::Real;
    constexpr int kTiles = std::extent_v<std::remove_reference_t<decltype(sums_of(0))>>;
    constexpr int kColumns = 8 * kTiles;
    struct Matrices {
        Real left[Swizzled::kRows][kDepth], right[kDepth][kColumns];
        Real sums[Swizzled::kRows][kColumns];
    };
    auto matrices = std::make_shared<Matrices>();
    std::vector<int> places;
    const std::uint32_t from = group.address_of(right.place);
    for (int k = 0; k < kDepth; ++k)
        for (int column = 0; column < kColumns; ++column)
            matrices->right[k][column] = widen(group.begin_product(
                address_by(descriptor<kRowsAreK>(from, k / 16 * 16), kRowsAreK, column, k % 16),
                places));
    if constexpr (std::is_same_v<std::decay_t<Left>, Swizzled>) {
        const std::uint32_t left_from = group.address_of(left.place);
        for (int row = 0; row < Swizzled::kRows; ++row)
            for (int k = 0; k < kDepth; ++k)
                matrices->left[row][k] = widen(group.begin_product(
                    address_by(descriptor<false>(left_from, k / 16 * 16), false, row, k % 16),
                    places));
    } else {
        for (int thread = 0; thread < kWarpgroup; ++thread)
            for (int k = 0; k < kDepth; k += 16)
                for (int pair = 0; pair < 4; ++pair) {
                    const auto two = left(thread, k).of[pair];
                    const int row = thread / kWarp * 16 + thread % kWarp / 4 + pair % 2 * 8;
                    Real* const to = matrices->left[row] + k + thread % 4 * 2 + pair / 2 * 8;
                    to[0] = first_of(two), to[1] = second_of(two);
                }
    }
    const auto each_sum = [](auto&& use) {
        for (int thread = 0; thread < kWarpgroup; ++thread)
            for (int n = 0; n < kTiles; ++n)
                for (int i = 0; i < 4; ++i)
                    use(thread, n, i, thread / kWarp * 16 + thread % kWarp / 4 + i / 2 * 8,
                        8 * n + thread % 4 * 2 + i % 2);
    };
    each_sum([&](int thread, int n, int i, int row, int column) {
        Real& sum = sums_of(thread)[n][i];
        if (add && is_unknown(sum)) group.fault("given sums that another product adds to");
        matrices->sums[row][column] = add ? sum : Real(0);
        sum = static_cast<Real>(__builtin_nanf("0x5eed"));
    });
    for (int row = 0; row < Swizzled::kRows; ++row)
        for (int k = 0; k < kDepth; ++k)
            for (int column = 0; column < kColumns; ++column)
                matrices->sums[row][column] += matrices->left[row][k] * matrices->right[k][column];
    group.commit_products(std::move(places), [&group, sums_of, matrices, each_sum] {
        each_sum([&](int thread, int n, int i, int row, int column) {
            Real& sum = sums_of(thread)[n][i];
            if (!is_unknown(sum)) group.fault("left with sums that changed under a product");
            sum = matrices->sums[row][column];
        });
    });
}

template <int kPending, class Group, class Sums>
void finish_products(Group& group, Sums&&) {
    group.wait_for_products(kPending);
}

#endif

}  // namespace ssm::cuda
