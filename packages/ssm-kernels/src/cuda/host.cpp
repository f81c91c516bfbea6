// The CUDA kernels compiled for the host: what tests load in place of the extension module _cuda.
#include <ssm/device.h>

#include "kernels.h"

extern "C" SSM_API const void* ssm_cuda_host_kernels() {
    static constexpr ssm::cuda::Kernels kernels = ssm::cuda::linked_kernels(ssm::DeviceType::cpu);
    return &kernels;
}
