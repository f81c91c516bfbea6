#include "ceiling.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "isa.h"
#include "scratch.h"

SSM_CPU_KERNEL(ceiling, const Ceiling&, std::int64_t, double&)

namespace ssm {

namespace {

// Long against reading the clock, short against the scheduler's slice.
constexpr double kPart = 1e-3;

// One run of the loop: its rate per second, and how long it took.
struct Sample {
    double rate;
    double seconds;
};

Sample sample(const Ceiling& which, std::int64_t rounds) {
    using Clock = std::chrono::steady_clock;
    double work = 0;
    const Clock::time_point start = Clock::now();
    cpu::ceiling.active()(which, rounds, work);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    return {work / std::max(seconds, 1e-9), seconds};
}

// The best rate of one thread while all of them run: a neighbour can only make it slower. Its last
// part does not count, since it may have had the memory for itself.
double rate_of(const Ceiling& which, double seconds) {
    std::int64_t rounds = 1;
    while (sample(which, rounds).seconds < kPart) rounds *= 2;
    Sample last = sample(which, rounds);
    double best = last.rate;
    for (double spent = last.seconds; spent < seconds; spent += last.seconds) {
        best = std::max(best, last.rate);
        last = sample(which, rounds);
    }
    return best;
}

}  // namespace

double ceiling(const char* name, int threads, double seconds, std::int64_t bytes) {
    constexpr const char* kNames[] = {"fma", "exp", "copy", "copy_streamed"};
    const auto found = std::find_if(std::begin(kNames), std::end(kNames), [&](const char* known) {
        return std::strcmp(name, known) == 0;
    });
    if (found == std::end(kNames))
        fail("ceiling", "name", "be fma, exp, copy or copy_streamed", name);
    if (threads < 1) fail("ceiling", "threads", "be at least 1", std::to_string(threads));
    if (!(seconds > 0 && seconds <= 60))
        fail("ceiling", "seconds", "be in (0, 60]", std::to_string(seconds));
    Ceiling which{static_cast<Ceiling::Kind>(found - std::begin(kNames)), nullptr, 0};
    if (which.kind == Ceiling::copy || which.kind == Ceiling::copy_streamed) {
        which.elements = bytes / (2 * static_cast<std::int64_t>(sizeof(float)) * threads) / 64 * 64;
        if (which.elements < 64)
            fail("ceiling", "bytes", "be at least 512 per thread", std::to_string(bytes));
    }
    const Scratch memory(static_cast<std::size_t>(2 * which.elements * threads) * sizeof(float));
    std::vector<double> rates(static_cast<std::size_t>(threads));
    std::barrier start(threads);
    const auto run = [&](int thread) {
        Ceiling part = which;
        part.memory = static_cast<float*>(memory.data()) + 2 * which.elements * thread;
        std::fill(part.memory, part.memory + 2 * which.elements, 1.0f);
        start.arrive_and_wait();
        rates[static_cast<std::size_t>(thread)] = rate_of(part, seconds);
    };
    {
        std::vector<std::jthread> others;
        for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
        run(0);
    }
    double total = 0;
    for (const double rate : rates) total += rate;
    return total;
}

}  // namespace ssm
