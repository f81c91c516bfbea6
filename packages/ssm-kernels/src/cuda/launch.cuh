// Starts kernels on a device and a stream; in tests the host executes them block by block.
#pragma once

#include <ssm/device.h>

#include <stdexcept>
#include <string>

#include "architecture.h"
#include "device.h"
#include "element.cuh"
#if !defined(__CUDACC__)
#include "host_gpu.h"
#endif

namespace ssm::cuda {

/// Blocks of one launch: the rest of the work is done by the same blocks in turn. The number is
/// fixed, so that nothing depends on the device.
constexpr std::int64_t kMostBlocks = std::int64_t{1} << 30;

/// Shared memory of a block of a kernel.
template <class Real, class Kernel>
std::int64_t shared_bytes(const Kernel& kernel) {
    using Matrices = MatrixElement<Kernel>;
    return kernel.shared_size() * static_cast<std::int64_t>(sizeof(Real)) +
           Matrices::size(kernel) * static_cast<std::int64_t>(sizeof(typename Matrices::Type));
}

/// Bytes of shared memory that a block can have on every GPU since Ampere: those of the data
/// centre have more, those with compute capability 8.6, 8.9 and 12.0 do not.
constexpr int kSharedOfAll = 99 << 10;

/// The generation that code is compiled for. Compilers need more registers before Hopper and after
/// it: there, some kernels ask for fewer blocks, or fetch less at a time.
#if defined(__CUDA_ARCH__)
constexpr bool kBeforeHopper = __CUDA_ARCH__ < 900, kAfterHopper = __CUDA_ARCH__ >= 1000;
#else
constexpr bool kBeforeHopper = false, kAfterHopper = false;
#endif

/// A number that, after Hopper, the compiler does not look through: it would keep an address for
/// every access that depends on it from one turn of a loop to the next, and spill.
SSM_DEVICE std::int64_t opaque(std::int64_t number) {
#if defined(__CUDA_ARCH__)
    if (kAfterHopper) asm volatile("" : "+l"(number));
#endif
    return number;
}

/// Throws std::runtime_error where a block of a kernel cannot have the shared memory it needs.
template <class Real, class Kernel>
void check_room(const char* op, const Kernel& kernel, const Device& device) {
    if (sizeof(Real) > 4) return;  // the host's alone
    const std::int64_t bytes = shared_bytes<Real>(kernel), most = shared_of_block(device);
    if (bytes > most)
        throw std::runtime_error(std::string(op) + ": the GPU must have " + std::to_string(bytes) +
                                 " bytes of shared memory for a block of these sizes, got " +
                                 std::to_string(most));
}

#if defined(__CUDACC__)

[[noreturn]] inline void fail_launch(const char* op, cudaError_t error) {
    throw std::runtime_error(std::string(op) + ": the launch must succeed, got " +
                             cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

template <class Kernel, class Real>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerUnit)
    run(const __grid_constant__ Kernel kernel, std::int64_t count) {
    extern __shared__ __align__(1024) float4 shared[];
    for (std::int64_t index = blockIdx.x; index < count; index += gridDim.x) {
        Block<Kernel, Real> block(shared, kernel);
        kernel(block, index);
        if (index + gridDim.x < count) __syncthreads();  // the next one writes the same memory
    }
}

/// Makes the device of the tensors the current one for the duration of a call.
class OnDevice {
  public:
    OnDevice(const char* op, const Device& device) {
        check_architecture(op, device.index);
        check(op, cudaGetDevice(&before_));
        if (device.index != before_) check(op, cudaSetDevice(device.index));
        changed_ = device.index != before_;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    static void check(const char* op, cudaError_t error) {
        if (error != cudaSuccess) fail_launch(op, error);
    }
    int before_ = 0;
    bool changed_ = false;
};

/// Runs `kernel` on `count` blocks. Throws std::runtime_error when the launch fails.
template <class Real, class Kernel>
void launch(const char* op, const Kernel& kernel, std::int64_t count, const Device& device,
            const Exec& exec) {
    if (count == 0) return;
    const OnDevice on(op, device);
    const std::int64_t bytes = shared_bytes<Real>(kernel);
    constexpr std::int64_t kWithoutAsking = 48 << 10;
    if (bytes > kWithoutAsking) {
        check_room<Real>(op, kernel, device);
        const cudaError_t error =
            cudaFuncSetAttribute(run<Kernel, Real>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes));
        if (error != cudaSuccess) fail_launch(op, error);
    }
    const auto blocks = static_cast<unsigned>(count < kMostBlocks ? count : kMostBlocks);
    run<Kernel, Real>
        <<<blocks, Kernel::kThreads, bytes, reinterpret_cast<cudaStream_t>(exec.stream)>>>(kernel,
                                                                                           count);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) fail_launch(op, error);
}

#else

template <class Real, class Kernel>
void launch(const char* op, const Kernel& kernel, std::int64_t count, const Device& device,
            const Exec&) {
    if (count == 0) return;
    check_room<Real>(op, kernel, device);
    // From both ends to the middle, unlike a GPU: what depends on the order of blocks is a fault,
    // whether the first or the last of them has to come last.
    for (std::int64_t turn = 0; turn < count; ++turn) {
        const std::int64_t index = turn % 2 == 0 ? count - 1 - turn / 2 : turn / 2;
        auto block = std::make_unique<Block<Kernel, Real>>(kernel);
        kernel(*block, index);
        host_warpgroup_blocks += kHasProducts<Kernel>;
    }
}

#endif

/// Calls `start` with a value of the memory type `dtype`.
template <class Start>
void with_memory_type(DType dtype, Start&& start) {
#if !defined(__CUDACC__)
    if (dtype == DType::f64) return start(double{});
#endif
    if (dtype == DType::bf16) return start(Bf16{});
    if (dtype == DType::f16) return start(F16{});
    start(float{});
}

/// Calls `start` with a value of the compute type: float on a device; in tests, double where the
/// CPU kernels compute in that.
template <class Start>
void with_compute_type([[maybe_unused]] DType main, Start&& start) {
#if !defined(__CUDACC__)
    if (main == DType::f64) return start(double{});
#endif
    start(float{});
}

}  // namespace ssm::cuda
