// How the fronts reach the CUDA kernels, which the extension module _cuda brings when it is loaded.
#pragma once

#include <memory>

#include "../cuda/kernels.h"

namespace ssm {

/// Makes the fronts call these kernels, which must stay where they are; null takes them away.
SSM_API void use_cuda_kernels(const cuda::Kernels* kernels);

/// The kernels that serve tensors of a device, or null where those of the CPU do.
/// Throws std::runtime_error when there are none.
const cuda::Kernels* cuda_kernels(const char* op, const Device& device);

/// The settings of a call with working memory of at least the asked size.
class WithWorkspace {
  public:
    /// Throws std::invalid_argument when the caller's is too small or not aligned. Only on the CPU,
    /// where kernels written for CUDA run in tests, a missing one is made.
    WithWorkspace(const char* op, const Exec& exec, const Device& device, std::int64_t bytes);
    const Exec& exec() const { return exec_; }

  private:
    Exec exec_;
    std::unique_ptr<char[]> own_;
};

}  // namespace ssm
