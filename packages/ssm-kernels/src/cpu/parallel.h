// Work sharing. The only file with an OpenMP directive.
#pragma once

#include <ssm/device.h>

#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace ssm::cpu::SSM_ISA {

/// Tasks that one thread begins with. On a line of its own: its thread takes from it all the time.
struct alignas(64) Share {
    std::int64_t next, end;
};

/// The next task of a share, or one that is not before its end.
SSM_INLINE std::int64_t take(Share& share) {
    return __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED);
}

#if defined(_OPENMP)
/// Each thread does its share of neighbouring tasks, the same one in every call, since its cache
/// may still hold what they read or wrote; whoever is done helps the others.
/// The thread count is a clause of this region; the process-wide setting belongs to others.
template <class Body>
static inline void share_out(std::int64_t tasks, int threads, const Body& body) {
    Share shares[kMostThreads];
    const std::int64_t each = tasks / threads, more = tasks % threads;
    for (std::int64_t i = 0, begin = 0; i < threads; ++i) {
        shares[i] = {begin, begin + each + (i < more)};
        begin = shares[i].end;
    }
#pragma omp parallel num_threads(threads)
    {
        const int own = omp_get_thread_num();
        for (int i = 0; i < threads; ++i) {
            Share& share = shares[(own + i) % threads];
            for (std::int64_t task = take(share); task < share.end; task = take(share))
                body(task, own);
        }
    }
}

/// The same, but nobody helps.
template <class Body>
static inline void keep_apart(std::int64_t tasks, int threads, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
}
#endif

/// What a thread does when its share is done. Steps of decoding wait: their states lie in the cache
/// of the thread that had them in the call before, and a helper would move them to its own, only to
/// give them back in the next call.
enum class WhenDone { help, wait };

/// How many parts, from `fewest` to `most`, each of `each` equal pieces of work is cut into: as few
/// as keep all threads busy, as many tasks as threads or a multiple, or four per thread.
SSM_INLINE std::int64_t fewest_for_all(std::int64_t fewest, std::int64_t most, std::int64_t each,
                                       int threads) {
    std::int64_t count = fewest;
    while (count < most && each * count % threads != 0 && each * count < 4 * threads) ++count;
    return count;
}

/// Calls body(task, thread) for each task in [0, tasks), thread in [0, threads).
/// How tasks are cut may not depend on `threads`, unless no sum crosses the cut: then results do
/// not depend on it either. Without OpenMP the caller does them all.
template <class Body>
static inline void parallel_for(std::int64_t tasks, int threads, const Body& body,
                                [[maybe_unused]] WhenDone when_done = WhenDone::help) {
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads > kMostThreads) threads = kMostThreads;
#if defined(_OPENMP)
    if (threads > 1)
        return when_done == WhenDone::help ? share_out(tasks, threads, body)
                                           : keep_apart(tasks, threads, body);
#endif
    for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace ssm::cpu::SSM_ISA
