#include "scratch.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>

#include "huge_pages.h"

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#include <unistd.h>
#define SSM_HAS_MMAP
#endif

namespace ssm {

namespace {

constexpr std::size_t kLine = 64;
constexpr std::align_val_t kAlignment{kLine};

struct KeptBlock {
    void* data = nullptr;
    std::size_t bytes = 0;
    bool lent = false;
    ~KeptBlock() { ::operator delete(data, kAlignment); }
};
thread_local KeptBlock kept;

std::atomic<bool> guards{false};

std::size_t round_up(std::size_t bytes, std::size_t unit) {
    return (bytes + unit - 1) / unit * unit;
}

#if defined(SSM_HAS_MMAP)
std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

/// Pages of NaN and, behind the first `inside` bytes, one that nobody may touch.
char* map_guarded(std::size_t inside) {
    void* const memory = mmap(nullptr, inside + page_bytes(), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(static_cast<char*>(memory) + inside, page_bytes(), PROT_NONE);
    std::memset(memory, 0xff, inside);
    return static_cast<char*>(memory);
}
#endif

}  // namespace

void guard_scratch(bool on) {
#if !defined(SSM_HAS_MMAP)
    if (on) throw std::runtime_error("guard_scratch: needs mmap, which this system has not");
#endif
    guards.store(on, std::memory_order_relaxed);
}

Scratch::Scratch(std::size_t bytes) : data_(nullptr), guarded_(0) {
    if (bytes == 0) return;
#if defined(SSM_HAS_MMAP)
    if (guards.load(std::memory_order_relaxed)) {
        guarded_ = round_up(bytes, page_bytes());
        data_ = map_guarded(guarded_) + guarded_ - round_up(bytes, kLine);
        return;
    }
#endif
    if (kept.lent || bytes >= kFreshBytes) {
        data_ = ::operator new(bytes, kAlignment);
        prefer_huge_pages(data_, bytes);
        return;
    }
    if (kept.bytes < bytes) {
        ::operator delete(kept.data, kAlignment);
        kept.data = nullptr;
        kept.bytes = 0;
        kept.data = ::operator new(bytes, kAlignment);
        kept.bytes = bytes;
    }
    kept.lent = true;
    data_ = kept.data;
}

Scratch::~Scratch() {
#if defined(SSM_HAS_MMAP)
    if (guarded_ > 0) {
        // It begins in the first of its pages.
        const std::size_t into = reinterpret_cast<std::uintptr_t>(data_) % page_bytes();
        munmap(static_cast<char*>(data_) - into, guarded_ + page_bytes());
        return;
    }
#endif
    if (data_ != nullptr && data_ == kept.data)
        kept.lent = false;
    else
        ::operator delete(data_, kAlignment);
}

}  // namespace ssm
