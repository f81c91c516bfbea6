// Where and how a call runs: threads, stream, instruction set.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define SSM_API __declspec(dllexport)
#else
#define SSM_API __attribute__((visibility("default")))
#endif

namespace ssm {

/// OpenMP ends the process when the system refuses a thread: no call asks for more than these.
inline constexpr int kMostThreads = 256;

/// How one call runs. `num_threads` 0 means the process-wide setting and is not used on a GPU;
/// `stream` is a CUDA stream handle as an integer, 0 the legacy default stream, and is not used on
/// the CPU. `workspace` is memory of the tensors' device, aligned to 16 bytes, that the kernel may
/// write: <op>_<direction>_workspace says how many bytes a call needs, which is none on the CPU.
struct Exec {
    int num_threads = 0;
    std::intptr_t stream = 0;
    void* workspace = nullptr;
    std::int64_t workspace_bytes = 0;
};

enum class Isa : std::uint8_t { baseline, avx2, avx512 };

/// The instruction set that serves CPU calls: the best that the processor offers, or what the
/// environment variable SSM_ISA (auto, baseline, avx2, avx512) asks for.
/// Throws std::runtime_error when SSM_ISA names an unknown or unavailable instruction set.
SSM_API Isa active_isa();
SSM_API const char* isa_name(Isa isa);
SSM_API bool isa_available(Isa isa);

/// Threads used by calls that do not name a number. Starts as OpenMP's default; a build
/// without OpenMP takes one, whatever is asked for.
SSM_API int num_threads();
/// Throws std::invalid_argument when `count` is below 1.
SSM_API void set_num_threads(int count);

SSM_API const char* version();

}  // namespace ssm
