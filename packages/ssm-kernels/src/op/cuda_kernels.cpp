#include "cuda_kernels.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

#include "check.h"

namespace ssm {

namespace {

std::atomic<const cuda::Kernels*> kernels_in_use{nullptr};

}  // namespace

void use_cuda_kernels(const cuda::Kernels* kernels) { kernels_in_use = kernels; }

const cuda::Kernels* cuda_kernels(const char* op, const Device& device) {
    const cuda::Kernels* kernels = kernels_in_use;
    if (kernels != nullptr && kernels->serves == device.type) return kernels;
    if (device.type == DeviceType::cpu) return nullptr;
    throw std::runtime_error(std::string(op) +
                             ": tensors must be on the cpu while the extension module _cuda of "
                             "ssm-kernels is not loaded, got " +
                             device_text(device));
}

WithWorkspace::WithWorkspace(const char* op, const Exec& exec, const Device& device,
                             std::int64_t bytes)
    : exec_(exec) {
    if (device.type == DeviceType::cpu && exec.workspace == nullptr) {
        own_ = std::make_unique_for_overwrite<char[]>(static_cast<std::size_t>(bytes));
        std::memset(own_.get(), 0xff, static_cast<std::size_t>(bytes));  // NaN of every width
        exec_.workspace = own_.get();
        exec_.workspace_bytes = bytes;
    }
    if (exec_.workspace_bytes < bytes)
        fail(op, "workspace", "have at least " + std::to_string(bytes) + " bytes",
             std::to_string(exec_.workspace_bytes));
    if (reinterpret_cast<std::uintptr_t>(exec_.workspace) % 16 != 0)
        fail(op, "workspace", "be aligned to 16 bytes",
             "address " + std::to_string(reinterpret_cast<std::uintptr_t>(exec_.workspace)));
}

}  // namespace ssm
