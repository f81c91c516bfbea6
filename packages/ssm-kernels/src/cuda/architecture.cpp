#include "architecture.h"

#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "device.h"

namespace ssm::cuda {

const char* architectures() { return SSM_GPU_ARCHS; }

bool runs_on(int major, int minor) {
    const int found = 10 * major + minor;
    std::istringstream names(architectures());
    for (std::string name; names >> name;) {
        const int built = std::atoi(name.c_str() + name.find('_') + 1);
        if (name.back() == 'a') {
            if (found == built) return true;
        } else if (name.rfind("sm_", 0) == 0) {
            if (found / 10 == built / 10 && found >= built) return true;
        } else if (found >= built) {
            return true;
        }
    }
    return false;
}

std::string architecture_fault(int index) {
    int major = 0, minor = 0;
    // Without a driver the launch says so, better than could be said here.
    if (!compute_capability(index, &major, &minor) || runs_on(major, minor)) return "";
    const std::string dot = std::to_string(major) + "." + std::to_string(minor);
    return "GPU " + std::to_string(index) +
           " must be of an architecture that ssm-kernels is built "
           "for (" +
           architectures() + "), got compute capability " + dot +
           ": build it with -Dgpu_archs=" + std::to_string(10 * major + minor);
}

void check_architecture(const char* op, int index) {
    constexpr int kRemembered = 64;
    static std::atomic<bool> fits[kRemembered];
    const bool remembered = index >= 0 && index < kRemembered;
    if (remembered && fits[index].load(std::memory_order_relaxed)) return;
    const std::string fault = architecture_fault(index);
    if (!fault.empty()) throw std::runtime_error(op + (": " + fault));
    if (remembered) fits[index].store(true, std::memory_order_relaxed);
}

}  // namespace ssm::cuda
