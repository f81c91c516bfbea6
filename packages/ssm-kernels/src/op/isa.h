// Declares the CPU entries of one operator, one per instruction set, and picks one at run time.
// The macro declares what the translation units of src/cpu define with SSM_ISA as the namespace.
#pragma once

#include <ssm/device.h>

namespace ssm {

inline int thread_count(const Exec& exec) {
    const int wanted = exec.num_threads > 0 ? exec.num_threads : num_threads();
    return wanted < kMostThreads ? wanted : kMostThreads;
}

/// The same kernel compiled for each instruction set. Null where this build has none.
template <class Function>
struct PerIsa {
    Function* baseline;
    Function* avx2;
    Function* avx512;

    Function* active() const {
        switch (active_isa()) {
            case Isa::avx512:
                return avx512;
            case Isa::avx2:
                return avx2;
            case Isa::baseline:
                break;
        }
        return baseline;
    }
};

}  // namespace ssm

// SSM_CPU_KERNEL(name, arguments...): declares ssm::cpu::<isa>::name and defines ssm::cpu::name.
#if defined(__x86_64__)
#define SSM_CPU_KERNEL(name, ...)                                                          \
    namespace ssm::cpu {                                                                   \
    namespace baseline {                                                                   \
    void name(__VA_ARGS__);                                                                \
    }                                                                                      \
    namespace avx2 {                                                                       \
    void name(__VA_ARGS__);                                                                \
    }                                                                                      \
    namespace avx512 {                                                                     \
    void name(__VA_ARGS__);                                                                \
    }                                                                                      \
    constexpr PerIsa<void(__VA_ARGS__)> name{&baseline::name, &avx2::name, &avx512::name}; \
    }
#else
#define SSM_CPU_KERNEL(name, ...)                                                \
    namespace ssm::cpu {                                                         \
    namespace baseline {                                                         \
    void name(__VA_ARGS__);                                                      \
    }                                                                            \
    constexpr PerIsa<void(__VA_ARGS__)> name{&baseline::name, nullptr, nullptr}; \
    }
#endif
