// The entry points of the CUDA runtime that nvcc's host code calls, with the interpreter behind
// them in place of a GPU, whose memory is the host's; and what tests ask of the kernels linked with
// it.
#include <ssm/device.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>

#include "cuda/host_gpu.h"
#include "machine.h"

namespace {

struct Size {  // dim3
    unsigned x, y, z;
};

struct Configuration {
    Size blocks, threads;
    std::size_t shared_bytes;
    void* stream;
};
thread_local Configuration next_launch;

/// Names of kernels by the functions that stand for them on the host.
std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> made;
    return made;
}

/// Shared memory that launches asked for, by the same functions.
std::map<const void*, std::size_t>& asked() {
    static std::map<const void*, std::size_t> made;
    return made;
}

std::mutex one_at_a_time;

/// The modules of the folder that SSM_TEST_PTX names.
std::map<std::string, ptx::Kernel> read_kernels() {
    const char* const folder = std::getenv("SSM_TEST_PTX");
    if (folder == nullptr) ptx::fault("SSM_TEST_PTX must name the folder of the modules");
    std::map<std::string, ptx::Kernel> kernels;
    for (const auto& file : std::filesystem::directory_iterator(folder)) {
        if (file.path().extension() != ".ptx") continue;
        std::stringstream text;
        text << std::ifstream(file.path()).rdbuf();
        kernels.merge(ptx::kernels_of(text.str()));
    }
    return kernels;
}

ptx::Kernel& kernel_of(const void* function) {
    static std::map<std::string, ptx::Kernel> kernels = read_kernels();
    const auto found = kernels.find(names().at(function));
    if (found == kernels.end()) ptx::fault("no module has " + names().at(function));
    if (found->second.code.empty()) ptx::parse(found->second);
    return found->second;
}

void run(const ptx::Kernel& kernel, const Configuration& at, void** arguments,
         std::size_t asked_for) {
    constexpr std::size_t kWithoutAsking = 48 << 10;
    if (at.shared_bytes > std::max(kWithoutAsking, asked_for))
        ptx::fault("more shared memory than " + kernel.name + " asked for");
    if (std::max({at.blocks.y, at.blocks.z, at.threads.y, at.threads.z}) > 1)
        ptx::fault("a launch of more than one dimension");
    if (at.threads.x > kernel.most_threads)
        ptx::fault("more threads than " + kernel.name + " is compiled for");
    ptx::Launch launch{kernel, at.blocks.x, at.threads.x,
                       static_cast<std::uint32_t>(at.shared_bytes),
                       std::vector<char>(kernel.parameter_bytes)};
    for (const ptx::Parameter& parameter : kernel.parameters)
        std::memcpy(launch.parameters.data() + parameter.offset, *arguments++, parameter.bytes);
    ptx::run(launch);
    if (kernel.on_warpgroups) ssm::cuda::host_warpgroup_blocks += at.blocks.x;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
    names()[function] = name;
}
unsigned __cudaPushCallConfiguration(Size blocks, Size threads, std::size_t shared_bytes,
                                     void* stream) {
    next_launch = {blocks, threads, shared_bytes, stream};
    return 0;
}
int __cudaPopCallConfiguration(Size* blocks, Size* threads, std::size_t* shared_bytes,
                               void** stream) {
    *blocks = next_launch.blocks, *threads = next_launch.threads;
    *shared_bytes = next_launch.shared_bytes, *stream = next_launch.stream;
    return 0;
}
int cudaLaunchKernel(const void* function, Size blocks, Size threads, void** arguments,
                     std::size_t shared_bytes, void* stream) {
    const std::lock_guard hold(one_at_a_time);
    run(kernel_of(function), {blocks, threads, shared_bytes, stream}, arguments, asked()[function]);
    return 0;
}
int __cudaGetKernel(const void** kernel, const void* function) {
    *kernel = function;
    return 0;
}
int __cudaLaunchKernel(const void* function, Size blocks, Size threads, void** arguments,
                       std::size_t shared_bytes, void* stream) {
    return cudaLaunchKernel(function, blocks, threads, arguments, shared_bytes, stream);
}
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
    constexpr int kMaxDynamicSharedMemorySize = 8, kInvalidValue = 1;
    if (attribute != kMaxDynamicSharedMemorySize || value > ssm::cuda::host_shared)
        return kInvalidValue;
    const std::lock_guard hold(one_at_a_time);
    asked()[function] = static_cast<std::size_t>(value);
    return 0;
}
int cudaGetDevice(int* device) { return *device = 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetLastError() { return 0; }
const char* cudaGetErrorName(int) { return "cudaSuccess"; }
const char* cudaGetErrorString(int) { return "no error"; }

/// Runs the first kernel of a module, whose parameters are pointers; says what is wrong.
SSM_API const char* ssm_ptx_run(const char* module, unsigned blocks, unsigned threads,
                                unsigned shared_bytes, void** arguments) {
    static std::string said;
    said.clear();
    try {
        auto kernels = ptx::kernels_of(module);
        ptx::Kernel& kernel = kernels.begin()->second;
        ptx::parse(kernel);
        run(kernel, {{blocks, 1, 1}, {threads, 1, 1}, shared_bytes, nullptr}, arguments, 0);
    } catch (const std::logic_error& fault) {
        said = fault.what();
    }
    return said.c_str();
}

}  // extern "C"
