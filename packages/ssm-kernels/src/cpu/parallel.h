// Work sharing. The only file with an OpenMP directive.
#pragma once

#include <omp.h>

#include "simd.h"

namespace ssm::cpu::SSM_ISA {

/// Calls body(task, thread) for each task in [0, tasks), thread in [0, threads).
/// How tasks are cut may not depend on `threads`: then results do not depend on it either.
/// The thread count is a clause of this region; the process-wide setting belongs to others.
template <class Body>
static inline void parallel_for(std::int64_t tasks, int threads, const Body& body) {
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads <= 1) {
        for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
}

/// The same for tasks of one cost: thread i takes the i-th share of them, so that in the next call
/// the same data meets the same cache.
template <class Body>
static inline void parallel_for_shares(std::int64_t tasks, int threads, const Body& body) {
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads <= 1) {
        for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
}

}  // namespace ssm::cpu::SSM_ISA
