// Process-wide choices: instruction set and threads.
#include <ssm/device.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ssm {

namespace {

constexpr Isa kPriority[] = {Isa::avx512, Isa::avx2, Isa::baseline};

Isa choose_isa() {
    const char* wanted = std::getenv("SSM_ISA");
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, "auto") == 0) {
        for (const Isa isa : kPriority)
            if (isa_available(isa)) return isa;
    }
    for (const Isa isa : kPriority) {
        if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
        if (!isa_available(isa))
            throw std::runtime_error(
                "SSM_ISA must name an instruction set of this processor, got " +
                std::string(wanted));
        return isa;
    }
    throw std::runtime_error("SSM_ISA must be auto, baseline, avx2 or avx512, got " +
                             std::string(wanted));
}

std::atomic<int> thread_setting{0};

#if defined(__x86_64__)
// Parts of x86-64-v3 that __builtin_cpu_supports does not know everywhere.
bool has_f16c_movbe_lzcnt() {
    constexpr unsigned kF16c = 1u << 29, kMovbe = 1u << 22, kLzcnt = 1u << 5;
    unsigned a, b, basic, extended, d;
    return __get_cpuid(1, &a, &b, &basic, &d) && __get_cpuid(0x80000001, &a, &b, &extended, &d) &&
           (basic & kF16c) != 0 && (basic & kMovbe) != 0 && (extended & kLzcnt) != 0;
}
#endif

}  // namespace

// x86-64-v4 and -v3 by their parts: compilers before GCC 12 and Clang 18 do not know the levels.
bool isa_available(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::avx512:
            return isa_available(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                   has_f16c_movbe_lzcnt();
        case Isa::baseline:
            return true;
    }
#endif
    return isa == Isa::baseline;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        case Isa::baseline:
            break;
    }
    return "baseline";
}

Isa active_isa() {
    static const Isa isa = choose_isa();
    return isa;
}

int num_threads() {
    const int count = thread_setting.load(std::memory_order_relaxed);
#if defined(_OPENMP)
    return count > 0 ? count : omp_get_max_threads();
#else
    return count > 0 ? count : 1;
#endif
}

void set_num_threads(int count) {
    if (count < 1)
        throw std::invalid_argument("set_num_threads: count must be at least 1, got " +
                                    std::to_string(count));
    thread_setting.store(count, std::memory_order_relaxed);
}

const char* version() { return SSM_VERSION; }

}  // namespace ssm
