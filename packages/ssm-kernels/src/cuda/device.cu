#include <cuda_runtime.h>

#include "device.h"

namespace ssm::cuda {

int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string device_name(int index) {
    cudaDeviceProp properties;
    return cudaGetDeviceProperties(&properties, index) == cudaSuccess ? properties.name : "";
}

bool compute_capability(int index, int* major, int* minor) {
    return cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
           cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, index) == cudaSuccess;
}

std::int64_t shared_of_block(const Device& device) {
    int bytes = 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index);
    return bytes;
}

std::int64_t shared_of_multiprocessor(const Device& device) {
    int bytes = 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.index);
    return bytes;
}

bool has_warpgroups([[maybe_unused]] const Device& device, [[maybe_unused]] bool is_worth) {
#if defined(SSM_HOPPER) && defined(SSM_CUTLASS)
    int major = 0, minor = 0;
    return is_worth && compute_capability(device.index, &major, &minor) && major == 9 && minor == 0;
#else
    return false;
#endif
}

const char* device_fault() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace ssm::cuda
