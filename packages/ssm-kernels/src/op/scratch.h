// Working memory of one kernel call.
#pragma once

#include <cstddef>

namespace ssm {

/// Cache-line aligned memory for one call. The calling thread keeps its block for the next call, so
/// that repeated calls meet warm pages; blocks of 32 MiB and more go back to the system at once.
class Scratch {
  public:
    explicit Scratch(std::size_t bytes);  // throws std::bad_alloc
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* data() const { return data_; }

  private:
    void* data_;
    std::size_t guarded_;  // bytes before the guard, 0 without one
};

/// For tests: from now on every block is new, begins as NaN, and ends (to a cache line) where
/// access does. A block that an earlier call left too large, or with the right values, would hide a
/// fault.
void guard_scratch(bool on);  // throws std::runtime_error where the system has no such memory

}  // namespace ssm
