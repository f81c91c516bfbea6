// The CUDA kernels compiled for the host: what tests load in place of the extension module _cuda.
#include "kernels.h"
#include "launch.cuh"

namespace ssm::cuda {

namespace {

/// A kernel that does wrong, in one of the ways that the host must see.
struct Wrong {
    static constexpr int kThreads = 32;
    static constexpr int kBlocksPerUnit = 1;
    struct Registers {};
    enum Kind { kNothing, kReadRace, kWriteRace, kUnwritten, kOutside } kind;

    std::int64_t shared_size() const { return kThreads; }

    template <class Block>
    void operator()(Block& block, std::int64_t) const {
        if (kind != kUnwritten) block.each([&](int thread, Registers&) { block.write(thread, 1); });
        if (kind != kReadRace) block.barrier();
        const int step = kind == kOutside ? kThreads : 1;
        block.each([&](int thread, Registers&) {
            block.read(thread + step < kThreads || kind == kOutside ? thread + step : 0);
        });
        if (kind != kWriteRace) block.barrier();
        block.each([&](int thread, Registers&) { block.write(thread, 2); });
    }
};

}  // namespace

}  // namespace ssm::cuda

extern "C" SSM_API const void* ssm_cuda_host_kernels() {
    static constexpr ssm::cuda::Kernels kernels = ssm::cuda::linked_kernels(ssm::DeviceType::cpu);
    return &kernels;
}

/// What the host says of a kernel that does wrong; an empty text if nothing.
extern "C" SSM_API const char* ssm_cuda_host_fault(int kind) {
    static std::string said;
    said.clear();
    try {
        const ssm::cuda::Wrong kernel{static_cast<ssm::cuda::Wrong::Kind>(kind)};
        ssm::cuda::launch<float>("wrong", kernel, 1, {}, {});
    } catch (const std::logic_error& fault) {
        said = fault.what();
    }
    return said.c_str();
}
