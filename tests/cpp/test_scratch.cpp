// Working memory under guard, as the tests of the kernels have it: a fault shows at once.
// Judge: the header.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "op/scratch.h"

namespace {

int failures = 0;

void check(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "FAILED: %s\n", what);
    ++failures;
}

/// Whether a process dies of writing there.
bool is_guarded(unsigned char* at) {
    const pid_t child = fork();
    if (child == 0) {
        *static_cast<volatile unsigned char*>(at) = 1;
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV;
}

unsigned char* bytes_of(const ssm::Scratch& scratch) {
    return static_cast<unsigned char*>(scratch.data());
}

}  // namespace

int main() {
    ssm::guard_scratch(true);
    for (const std::size_t bytes : {std::size_t{64}, std::size_t{4096}, std::size_t{100032}}) {
        const ssm::Scratch first(bytes), second(bytes);
        for (const ssm::Scratch* scratch : {&first, &second}) {
            unsigned char* const at = bytes_of(*scratch);
            check(reinterpret_cast<std::uintptr_t>(at) % 64 == 0, "a block begins a cache line");
            for (std::size_t i = 0; i < bytes; ++i) check(at[i] == 0xff, "a block begins as NaN");
            check(!is_guarded(at + bytes - 1), "the last byte is the caller's");
            check(is_guarded(at + bytes), "the byte behind it is nobody's");
            at[0] = 1;  // the next block must not show it
        }
    }
    ssm::guard_scratch(false);
    void* before = nullptr;
    {
        const ssm::Scratch scratch(4096);
        before = scratch.data();
    }
    const ssm::Scratch scratch(1024);
    check(scratch.data() == before, "without a guard a thread keeps its block");
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
