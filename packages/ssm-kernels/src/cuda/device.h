// What the CUDA runtime says of the machine.
#pragma once

#include <string>

namespace ssm::cuda {

/// 0 where the driver is missing or too old.
int device_count();
std::string device_name(int index);
/// False where there is no such GPU.
bool compute_capability(int index, int* major, int* minor);
/// The runtime's reason why there is no device, or an empty text.
const char* device_fault();

}  // namespace ssm::cuda
