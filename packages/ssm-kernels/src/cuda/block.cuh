// A thread block, as kernels see it. A kernel is written once and executed twice: by the device,
// and by the host in tests, where every access to shared memory is checked.
//
// A kernel is a plain struct of parameters with
//   kThreads            threads of a block
//   Registers           what one thread keeps from phase to phase
//   shared_size()       elements of shared memory, each of the compute type
//   operator()(block, index)   the work of one block
// whose body is a sequence of phases: block.each(f) runs f(thread, registers) on every thread, and
// block.barrier() lets a phase read what other threads wrote in one before. Control flow around
// phases is the same for all threads of the block.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SSM_DEVICE __device__ __forceinline__
#define SSM_UNROLL _Pragma("unroll")
#define SSM_UNROLL_TWICE _Pragma("unroll 2")
#define SSM_ROLLED _Pragma("unroll 1")
#else
#include <memory>
#include <stdexcept>
#include <string>
#define SSM_DEVICE inline
#define SSM_UNROLL
#define SSM_UNROLL_TWICE
#define SSM_ROLLED
#endif

namespace ssm::cuda {

#if defined(__CUDACC__)

template <class Kernel, class Real>
class Block {
  public:
    SSM_DEVICE explicit Block(Real* shared) : shared_(shared) {}

    template <class Phase>
    SSM_DEVICE void each(Phase&& phase) {
        phase(static_cast<int>(threadIdx.x), registers_);
    }

    SSM_DEVICE void barrier() { __syncthreads(); }

    SSM_DEVICE Real read(int place) const { return shared_[place]; }
    SSM_DEVICE void write(int place, Real value) { shared_[place] = value; }

    /// Four neighbours; the place is a multiple of four.
    SSM_DEVICE void read4(int place, Real (&values)[4]) const {
        const float4 four = *reinterpret_cast<const float4*>(shared_ + place);
        values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
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

    Real* shared_;
    typename Kernel::Registers registers_;
};

#else

/// Runs the phases of one block in turn. Between two barriers no thread may read what another one
/// wrote, nor write what another one read or wrote, nor anyone read what was never written.
template <class Kernel, class Real>
class Block {
  public:
    explicit Block(std::int64_t shared_size)
        : size_(shared_size), cells_(new Cell[static_cast<std::size_t>(shared_size)]) {}

    template <class Phase>
    void each(Phase&& phase) {
        // Half of the phases run backwards: the order of threads must not matter.
        ++phases_;
        for (int i = 0; i < Kernel::kThreads; ++i) {
            thread_ = phases_ % 2 == 0 ? i : Kernel::kThreads - 1 - i;
            phase(static_cast<int>(thread_), registers_[thread_]);
        }
    }

    void barrier() { ++epoch_; }

    Real read(int place) {
        Cell& cell = at(place);
        if (cell.written == 0) fault("read before written", place);
        if (cell.written == epoch_ && cell.writer != thread_) fault("read in a race", place);
        cell.reader = cell.read == epoch_ && cell.reader != thread_ ? kSeveral : thread_;
        cell.read = epoch_;
        return cell.value;
    }

    void write(int place, Real value) {
        Cell& cell = at(place);
        if (cell.written == epoch_ && cell.writer != thread_) fault("written twice", place);
        if (cell.read == epoch_ && cell.reader != thread_) fault("written in a race", place);
        cell = {value, thread_, cell.reader, epoch_, cell.read};
    }

    void read4(int place, Real (&values)[4]) {
        if (place % 4 != 0) fault("read four at an odd address", place);
        for (int i = 0; i < 4; ++i) values[i] = read(place + i);
    }

    template <int kLanes, int kStride = 1, class Get>
    void sum_lanes(Get&& get) {
        for (int offset = kStride; offset < kStride * kLanes; offset *= 2) sum_pairs(offset, get);
    }
    template <class Get>
    void sum_lanes(int lanes, Get&& get) {
        for (int offset = 1; offset < lanes; offset *= 2) sum_pairs(offset, get);
    }

    template <int kValues, int kLanes, int kStride, class Get>
    void scatter_sums(Get&& get) {
        for (int lanes = kLanes / 2, half = kValues / 2; lanes > 0; lanes /= 2, half /= 2) {
            for (int t = 0; t < Kernel::kThreads; ++t) {
                if (t & lanes * kStride) continue;
                Real(&low)[kValues] = get(registers_[t]);
                Real(&high)[kValues] = get(registers_[t + lanes * kStride]);
                for (int i = 0; i < half; ++i) {
                    low[i] += high[i];
                    high[i] = high[i + half] + low[i + half];
                }
            }
        }
    }

  private:
    template <class Get>
    void sum_pairs(int offset, Get&& get) {
        for (int t = 0; t < Kernel::kThreads; ++t) {
            if (t & offset) continue;
            Real &low = get(registers_[t]), &high = get(registers_[t + offset]);
            low = high = low + high;
        }
    }

    static constexpr int kSeveral = -2;
    struct Cell {
        Real value{};
        int writer = -1, reader = -1;
        std::int64_t written = 0, read = 0;  // epochs
    };

    Cell& at(int place) {
        if (place < 0 || place >= size_) fault("out of bounds", place);
        return cells_[static_cast<std::size_t>(place)];
    }
    [[noreturn]] void fault(const char* what, int place) const {
        throw std::logic_error(std::string("shared memory ") + what + ": place " +
                               std::to_string(place) + " of " + std::to_string(size_) +
                               ", thread " + std::to_string(thread_));
    }

    std::int64_t size_;
    std::unique_ptr<Cell[]> cells_;
    typename Kernel::Registers registers_[Kernel::kThreads] = {};
    int thread_ = 0;
    std::int64_t epoch_ = 1, phases_ = 0;
};

#endif

}  // namespace ssm::cuda
