// Which GPUs the code of this build runs on.
#pragma once

#include <string>

namespace ssm::cuda {

/// Names of the architectures with code in this build, such as "sm_90a compute_120".
const char* architectures();

/// Whether that code runs on a GPU of a compute capability: machine code (sm) runs on later minor
/// versions of its generation, and with an "a" on its own only; PTX (compute) on all later ones.
bool runs_on(int major, int minor);

/// What is wrong with GPU `index` for this build, and what to do about it; empty if nothing is.
std::string architecture_fault(int index);

/// Throws std::runtime_error unless the code of this build runs on GPU `index`. The driver is asked
/// once per GPU.
void check_architecture(const char* op, int index);

}  // namespace ssm::cuda
