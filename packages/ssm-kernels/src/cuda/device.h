// What the CUDA runtime says of the machine.
#pragma once

#include <ssm/tensor.h>

#include <cstdint>
#include <string>

namespace ssm::cuda {

/// 0 where the driver is missing or too old.
int device_count();
std::string device_name(int index);
/// False where there is no such GPU.
bool compute_capability(int index, int* major, int* minor);
/// Shared memory in bytes that a block of a kernel can have.
std::int64_t shared_of_block(const Device& device);
/// The same of a multiprocessor: how often blocks take what they could have at once may depend on
/// it, and no result.
std::int64_t shared_of_multiprocessor(const Device& device);
/// Whether kernels for the warpgroups of Hopper shall serve where that is worth it: the device runs
/// the code of sm_90a, and there is such.
bool has_warpgroups(const Device& device, bool is_worth);
/// The runtime's reason why there is no device, or an empty text.
const char* device_fault();

}  // namespace ssm::cuda
