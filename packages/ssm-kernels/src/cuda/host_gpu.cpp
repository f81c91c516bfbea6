// What tests load in place of the extension module _cuda: the kernels linked with this file, and
// the GPU that they find, in place of a driver's. It is as large as Hopper, unless a test says
// less, and tests choose whether it is one.
#include "host_gpu.h"

#include <utility>

#include "architecture.h"
#include "device.h"
#include "kernels.h"

namespace ssm::cuda {

std::int64_t host_warpgroup_blocks = 0;
std::int64_t host_shared = 227 << 10;

namespace {

bool is_hopper = false;

}  // namespace

void check_architecture(const char*, int) {}
std::int64_t shared_of_block(const Device&) { return host_shared; }
std::int64_t shared_of_multiprocessor(const Device&) { return host_shared + 1024; }
bool has_warpgroups(const Device&, bool) { return is_hopper; }

}  // namespace ssm::cuda

extern "C" SSM_API const void* ssm_cuda_host_kernels() {
    static constexpr ssm::cuda::Kernels kernels = ssm::cuda::linked_kernels(ssm::DeviceType::cpu);
    return &kernels;
}

/// From now on a block has at most `bytes` of shared memory.
extern "C" SSM_API void ssm_cuda_host_set_shared(std::int64_t bytes) {
    ssm::cuda::host_shared = bytes;
}

/// Lets the kernels for the warpgroups of Hopper serve wherever they can, or nowhere; says how many
/// blocks of them have run since the call before.
extern "C" SSM_API std::int64_t ssm_cuda_host_use_warpgroups(bool use) {
    ssm::cuda::is_hopper = use;
    return std::exchange(ssm::cuda::host_warpgroup_blocks, 0);
}
