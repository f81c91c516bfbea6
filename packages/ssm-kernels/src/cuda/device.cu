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

const char* device_fault() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace ssm::cuda
