// What the processor can do at most on the active instruction set, for tools/bench.py.
#pragma once

#include <cstdint>

namespace ssm {

/// One limit for one thread to run into.
struct Ceiling {
    enum Kind { fma, exp, copy, copy_streamed };
    Kind kind;
    float* memory;          // of a copy: elements to read, then elements to write
    std::int64_t elements;  // a multiple of 64
};

/// Runs a loop on every thread for about `seconds` and returns the sum of their rates.
///
/// Rates per second: "fma" multiply-adds of single floats (two operations
/// each), "exp" exponentials of single floats, "copy" and "copy_streamed" bytes read plus bytes
/// written; `bytes` is the size of both arrays of all threads and decides which cache serves.
/// Throws std::invalid_argument for an unknown name, threads below 1, seconds not in (0, 60] or a
/// copy of less than 512 bytes per thread; std::system_error if there are no threads to be had.
double ceiling(const char* name, int threads, double seconds, std::int64_t bytes);

}  // namespace ssm
