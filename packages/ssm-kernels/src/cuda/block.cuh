// A thread block, as kernels see it. A kernel is written once and executed twice: by the device,
// and by the host in tests (block_host.cuh), where every access to shared memory is checked.
//
// A kernel is a plain struct of parameters with
//   kThreads            threads of a block
//   Registers           what one thread keeps from phase to phase
//   shared_size()       elements of shared memory, each of the compute type
//   operator()(block, index)   the work of one block
// and, where it multiplies matrices (tile_gemm.cuh),
//   Element             the type of their elements
//   matrix_size()       elements of shared memory of that type, which come before the others; for
//                       both the host and the device (SSM_BOTH)
// Its body is a sequence of phases: block.each(f) runs f(thread, registers) on every thread, and
// block.barrier() lets a phase read what other threads wrote in one before. Control flow around
// phases is the same for all threads of the block. block.each_warp(f) runs f(warp) on every warp;
// inside, phases are warp.each(f) and what the lanes of a warp do together, and control flow is the
// same for all lanes of the warp.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define SSM_DEVICE __device__ __forceinline__
#define SSM_BOTH __host__ __device__
#define SSM_UNROLL _Pragma("unroll")
#define SSM_UNROLL_TWICE _Pragma("unroll 2")
#define SSM_ROLLED _Pragma("unroll 1")
#define SSM_PRAGMA(text) _Pragma(#text)
#define SSM_UNROLL_BY(count) SSM_PRAGMA(unroll count)
#else
#define SSM_DEVICE inline
#define SSM_BOTH
#define SSM_UNROLL
#define SSM_UNROLL_TWICE
#define SSM_ROLLED
#define SSM_UNROLL_BY(count)
#endif

namespace ssm::cuda {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 4 * kWarp;

/// Two neighbours of a matrix: on the device, with elements of 16 bits, one register.
template <class Element, bool kPacked = sizeof(Element) == 2>
struct Pair {
    Element of[2];
};
template <class Element>
struct Pair<Element, true> {
    std::uint32_t bits;
};

/// The element type of a kernel's matrices; char where it has none.
template <class Kernel, class = void>
struct MatrixElement {
    using Type = char;
    static std::int64_t size(const Kernel&) { return 0; }
};
template <class Kernel>
struct MatrixElement<Kernel, std::void_t<typename Kernel::Element>> {
    using Type = typename Kernel::Element;
    static std::int64_t size(const Kernel& kernel) { return kernel.matrix_size(); }
};

/// Whether the warpgroups of a kernel multiply matrices together (warpgroup_gemm.cuh): then it has
/// a type HasProducts.
template <class Kernel, class = void>
constexpr bool kHasProducts = false;
template <class Kernel>
constexpr bool kHasProducts<Kernel, typename Kernel::HasProducts> = true;

/// Keeps accesses to memory before it from those after it; all lanes of a warp are here. The
/// compiler would begin a long row of them at once, for which there are no registers.
SSM_DEVICE void keep_order() {
#if defined(__CUDACC__)
    __syncwarp();
#endif
}

#if defined(__CUDACC__)

/// One value per lane of a warp, for the duration of a phase of the warp.
template <class Value>
struct PerLane {
    Value value;
    SSM_DEVICE Value& operator()(int) { return value; }
};

/// One value per warpgroup.
template <class Value>
struct PerWarpgroup {
    Value value;
    SSM_DEVICE Value& operator()(int) { return value; }
};

/// Ends the launch with an error.
SSM_DEVICE void stop() { __trap(); }

/// The number of a thread, as the compiler does not know it: what depends on it is worked out where
/// it is used, and not kept in registers for all of a long loop.
SSM_DEVICE int fresh(int thread) {
    asm volatile("" : "+r"(thread));
    return thread;
}

template <class Block>
class Warp {
  public:
    using Real = typename Block::RealType;
    using Element = typename Block::ElementType;

    SSM_DEVICE explicit Warp(Block& block) : index(block.thread_ / kWarp), block_(block) {}

    const int index;

    SSM_DEVICE auto& registers(int) { return block_.registers_; }

    template <class Phase>
    SSM_DEVICE void each(Phase&& phase) {
        phase(block_.thread_ % kWarp, block_.registers_);
    }

    /// What get(lane) refers to becomes its sum over the lanes up to this one.
    template <class Get>
    SSM_DEVICE void prefix_sum(Get&& get) {
        auto& value = get(0);
        SSM_UNROLL
        for (int offset = 1; offset < kWarp; offset *= 2) {
            const auto other = __shfl_up_sync(0xffffffffu, value, offset);
            if (static_cast<int>(threadIdx.x) % kWarp >= offset) value += other;
        }
    }

    /// What get(lane) refers to becomes that of the lane before, and 0 in the first one.
    template <class Get>
    SSM_DEVICE void shift(Get&& get) {
        auto& value = get(0);
        const auto before = __shfl_up_sync(0xffffffffu, value, 1);
        value = static_cast<int>(threadIdx.x) % kWarp > 0 ? before : 0;
    }

    /// What get(lane) refers to becomes that of one lane.
    template <class Get>
    SSM_DEVICE void broadcast(int lane, Get&& get) {
        auto& value = get(0);
        value = __shfl_sync(0xffffffffu, value, lane);
    }

    /// Four matrices of 8 x 8 elements, of which place_of(8 m + r) is the row r of matrix m: 8
    /// neighbours whose place is a multiple of 8. Afterwards the pair m of a lane holds the columns
    /// 2 (lane % 4), ... of the row lane / 4; transposed, the rows 2 (lane % 4), ... of that
    /// column.
    template <bool kTransposed, class Place, class Get>
    SSM_DEVICE void load(Place&& place_of, Get&& get) {
        const int lane = block_.thread_ % kWarp;
        Pair<Element>* const pairs = get(lane).of;
        if constexpr (sizeof(Element) == 2) {
            const unsigned address =
                static_cast<unsigned>(__cvta_generic_to_shared(block_.matrices_ + place_of(lane)));
            if constexpr (kTransposed)
                asm volatile(
                    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                    : "=r"(pairs[0].bits), "=r"(pairs[1].bits), "=r"(pairs[2].bits),
                      "=r"(pairs[3].bits)
                    : "r"(address)
                    : "memory");
            else
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(pairs[0].bits), "=r"(pairs[1].bits), "=r"(pairs[2].bits),
                               "=r"(pairs[3].bits)
                             : "r"(address)
                             : "memory");
        } else {
            // In the order of the program, as ldmatrix: loads that came earlier would take
            // registers.
            SSM_UNROLL
            for (int m = 0; m < 4; ++m) {
                const int row = kTransposed ? 2 * (lane % 4) : lane / 4;
                const int column = kTransposed ? lane / 4 : 2 * (lane % 4);
                const Element* const first = block_.matrices_ + place_of(8 * m + row) + column;
                const auto at = static_cast<unsigned>(__cvta_generic_to_shared(first));
                if constexpr (kTransposed) {
                    const Element* const next =
                        block_.matrices_ + place_of(8 * m + row + 1) + column;
                    const auto below = static_cast<unsigned>(__cvta_generic_to_shared(next));
                    asm volatile("ld.shared.f32 %0, [%1];"
                                 : "=f"(pairs[m].of[0])
                                 : "r"(at)
                                 : "memory");
                    asm volatile("ld.shared.f32 %0, [%1];"
                                 : "=f"(pairs[m].of[1])
                                 : "r"(below)
                                 : "memory");
                } else {
                    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                                 : "=f"(pairs[m].of[0]), "=f"(pairs[m].of[1])
                                 : "r"(at)
                                 : "memory");
                }
            }
        }
    }

    /// Writes what `load` reads.
    template <bool kTransposed, class Place, class Get>
    SSM_DEVICE void store(Place&& place_of, Get&& get) {
        static_assert(sizeof(Element) == 2);
#if __CUDA_ARCH__ >= 900
        const int lane = block_.thread_ % kWarp;
        const Pair<Element>* const pairs = get(lane).of;
        const auto address =
            static_cast<unsigned>(__cvta_generic_to_shared(block_.matrices_ + place_of(lane)));
        if constexpr (kTransposed)
            asm volatile(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                    address),
                "r"(pairs[0].bits), "r"(pairs[1].bits), "r"(pairs[2].bits), "r"(pairs[3].bits)
                : "memory");
        else
            asm volatile(
                "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                "r"(pairs[0].bits), "r"(pairs[1].bits), "r"(pairs[2].bits), "r"(pairs[3].bits)
                : "memory");
#endif
    }

  private:
    Block& block_;
};

/// Four warps that multiply matrices together (warpgroup_gemm.cuh).
template <class Block>
class Warpgroup {
  public:
    using Real = typename Block::RealType;
    using Element = typename Block::ElementType;

    SSM_DEVICE explicit Warpgroup(Block& block)
        : index(__shfl_sync(0xffffffffu, block.thread_ / kWarpgroup, 0)), block_(block) {}

    const int index;

    SSM_DEVICE auto& registers(int) { return block_.registers_; }

    /// Runs phase(thread, registers) with the number of the thread in the warpgroup.
    template <class Phase>
    SSM_DEVICE void each(Phase&& phase) {
        phase(block_.thread_ % kWarpgroup, block_.registers_);
    }
    template <class Phase>
    SSM_DEVICE void each_warp(Phase&& phase) {
        Warp<Block> warp(block_);
        phase(warp);
    }

    /// A barrier for the threads of the warpgroup.
    SSM_DEVICE void barrier() {
        asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "n"(kWarpgroup) : "memory");
    }

    SSM_DEVICE std::uint32_t address_of(int place) const { return block_.address_of(place); }

  private:
    Block& block_;
};

template <class Kernel, class Real>
class Block {
  public:
    using RealType = Real;
    using ElementType = typename MatrixElement<Kernel>::Type;

    SSM_DEVICE Block(float4* shared, const Kernel& kernel)
        : matrices_(reinterpret_cast<ElementType*>(shared)), shared_(nullptr) {
        std::int64_t elements = 0;
        if constexpr (!std::is_same_v<ElementType, char>) elements = kernel.matrix_size();
        shared_ = reinterpret_cast<Real*>(matrices_ + elements);
    }

    template <class Phase>
    SSM_DEVICE void each(Phase&& phase) {
        phase(thread_, registers_);
    }
    template <class Phase>
    SSM_DEVICE void each_warp(Phase&& phase) {
        Warp<Block> warp(*this);
        phase(warp);
    }

    /// Runs f(warpgroup) on every warpgroup; control flow inside is the same for all of its
    /// threads.
    template <class Phase>
    SSM_DEVICE void each_warpgroup(Phase&& phase) {
        Warpgroup<Block> group(*this);
        phase(group);
    }

    SSM_DEVICE void barrier() { __syncthreads(); }

    /// Makes the compiler compute again what it knows from the number of a thread: kept from turn
    /// to turn of a long loop, that takes the registers that sums need.
    SSM_DEVICE void forget() { asm volatile("" : "+r"(thread_)); }

    /// The lanes of a warp of which says(thread) is true, as bits. All warps find the same.
    template <class Says>
    SSM_DEVICE std::uint32_t vote(Says&& says) {
        return __ballot_sync(0xffffffffu, says(thread_));
    }

    SSM_DEVICE Real read(int place) const { return shared_[place]; }
    SSM_DEVICE void write(int place, Real value) { shared_[place] = value; }

    /// Two neighbours; the place is even.
    SSM_DEVICE void read2(int place, Real (&values)[2]) const {
        const float2 two = *reinterpret_cast<const float2*>(shared_ + place);
        values[0] = two.x, values[1] = two.y;
    }
    /// Four neighbours; the place is a multiple of four.
    SSM_DEVICE void read4(int place, Real (&values)[4]) const {
        const float4 four = *reinterpret_cast<const float4*>(shared_ + place);
        values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
    }

    /// Elements of matrices. The place of a pair is even.
    SSM_DEVICE ElementType read_element(int place) const { return matrices_[place]; }
    SSM_DEVICE void write_element(int place, ElementType value) { matrices_[place] = value; }
    SSM_DEVICE Pair<ElementType> read_pair(int place) const {
        return *reinterpret_cast<const Pair<ElementType>*>(matrices_ + place);
    }
    SSM_DEVICE void write_pair(int place, Pair<ElementType> pair) {
        *reinterpret_cast<Pair<ElementType>*>(matrices_ + place) = pair;
    }

    /// A Pack of neighbours; the place is a multiple of their number.
    template <class Pack>
    SSM_DEVICE Pack read_pack(int place) const {
        return *reinterpret_cast<const Pack*>(matrices_ + place);
    }

    /// What this thread has written to the memory of matrices, or has waited for, can be seen by
    /// the products of warpgroups after the next barrier.
    SSM_DEVICE void fence_for_products() {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    SSM_DEVICE std::uint32_t address_of(int place) const {
        return static_cast<std::uint32_t>(__cvta_generic_to_shared(matrices_ + place));
    }

    /// Begins to bring what a pointer points to nearer, for a read to come.
    template <class Value>
    SSM_DEVICE void touch(const Value* from) {
        asm volatile("prefetch.global.L1 [%0];" ::"l"(from));
    }

    /// Begins to copy 16 bytes of elements, both ends aligned, or zeros where they do not exist.
    /// They are there when this thread has waited, and for others after the next barrier.
    SSM_DEVICE void copy(int place, const ElementType* from, bool exists) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                         static_cast<unsigned>(__cvta_generic_to_shared(matrices_ + place))),
                     "l"(from), "r"(exists ? 16 : 0)
                     : "memory");
    }
    /// Ends a group of copies of this thread.
    SSM_DEVICE void commit_copies(int) { asm volatile("cp.async.commit_group;" ::: "memory"); }
    /// Waits for all copies of this thread, or for all but its last group.
    SSM_DEVICE void wait_for_copies(int, bool all = true) {
        if (all)
            asm volatile("cp.async.wait_all;" ::: "memory");
        else
            asm volatile("cp.async.wait_group 1;" ::: "memory");
    }

    /// The sum of a register over the threads whose numbers differ in the bits kStride, 2 kStride,
    /// ... below kStride kLanes, in all of them; at most the 32 threads of a warp.
    template <int kLanes, int kStride = 1, class Get>
    SSM_DEVICE void sum_lanes(Get&& get) {
        Real& value = get(registers_);
        SSM_UNROLL
        for (int offset = kStride; offset < kStride * kLanes; offset *= 2)
            value += __shfl_xor_sync(0xffffffffu, value, offset);
    }

    /// The same over `lanes` neighbours, a power of two.
    template <class Get>
    SSM_DEVICE void sum_lanes(int lanes, Get&& get) {
        Real& value = get(registers_);
        for (int offset = 1; offset < lanes; offset *= 2)
            value += __shfl_xor_sync(0xffffffffu, value, offset);
    }

    /// Sums kValues registers over the kLanes threads whose numbers differ in the bits kStride,
    /// 2 kStride, ...: afterwards the first kValues / kLanes registers of a thread hold the sums of
    /// the values [own * kValues / kLanes, ...), where own is its place among these threads. Halves
    /// the values with every exchange, which costs a tenth of one sum_lanes per value.
    template <int kValues, int kLanes, int kStride, class Get>
    SSM_DEVICE void scatter_sums(Get&& get) {
        exchange<kValues / 2, kLanes / 2, kStride>(get(registers_));
    }

  private:
    friend class Warp<Block>;
    friend class Warpgroup<Block>;

    /// One step of scatter_sums: a template, since the compiler leaves such a loop as one, and the
    /// registers it indexes in memory.
    template <int kHalf, int kLanes, int kStride, int kValues>
    static SSM_DEVICE void exchange(Real (&values)[kValues]) {
        if constexpr (kLanes > 0) {
            const bool upper = threadIdx.x & kLanes * kStride;
            SSM_UNROLL
            for (int i = 0; i < kHalf; ++i) {
                const Real sent = upper ? values[i] : values[i + kHalf];
                const Real kept = upper ? values[i + kHalf] : values[i];
                values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kLanes * kStride);
            }
            exchange<kHalf / 2, kLanes / 2, kStride>(values);
        }
    }

    int thread_ = static_cast<int>(threadIdx.x);
    ElementType* matrices_;
    Real* shared_;
    typename Kernel::Registers registers_;
};

#endif

}  // namespace ssm::cuda

#if !defined(__CUDACC__)
#include "block_host.cuh"
#endif
