// Loops that run into one limit of the processor each, so that a benchmark can name its distance.
#include "../op/ceiling.h"

#include "vmath.h"

namespace ssm::cpu::SSM_ISA {

namespace {

// Enough chains for the units of latency 4, few enough to stay in registers: two units and the 16
// registers of AVX2, up to four units and 32 registers on 64-bit Arm.
#if defined(__aarch64__)
constexpr int kChains = 24;
#else
constexpr int kChains = 12;
#endif
constexpr std::int64_t kExpElements = 2048;  // read and written within the first-level cache

// Keeps a value that nothing reads, and hides it from the optimiser where something does.
template <class V>
SSM_INLINE void keep(V& value) {
#if defined(__x86_64__)
    asm volatile("" : "+x"(value));
#else
    asm volatile("" : "+w"(value));
#endif
}

void multiply_add(std::int64_t rounds) {
    Vec<float> x[kChains], factor = broadcast(1e-9f);
    keep(factor);
    for (int i = 0; i < kChains; ++i) x[i] = broadcast(static_cast<float>(i));
    // The term is x itself: Arm's instruction overwrites its term, another one would be copied.
    for (std::int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24
        for (int i = 0; i < kChains; ++i) x[i] = x[i] * factor + x[i];
    for (int i = 0; i < kChains; ++i) keep(x[i]);
}

// The shortest e^x that is right for normal results: no NaN, no infinity, no denormals. The ceiling
// of a kernel is what the machine can do, not what vmath.h makes of it.
SSM_INLINE Vec<float> shortest_exp(Vec<float> x) {
    x = x * kLog2e<float>;
#if defined(__AVX512F__)
    const Vec<float> n = round_even(x);
    return scale_by_power(exp2_fraction(x - n), n);
#else
    typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
    x = at_least(x, broadcast(-126.0f));
    const Vec<float> shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits hold the integer part
    const Vec<float> p = exp2_fraction(x - (shifted - 12582912.0f));
    return (Vec<float>)((Bits)p + ((Bits)shifted << 23));
#endif
}

void exponentials(std::int64_t rounds) {
    alignas(64) float x[kExpElements], y[kExpElements];
    for (std::int64_t i = 0; i < kExpElements; ++i) x[i] = static_cast<float>(i) * -0.01f;
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 4
        for (std::int64_t i = 0; i < kExpElements; i += kLanes<float>)
            store<float>(y + i, shortest_exp(load<float>(x + i)));
        asm volatile("" : : "r"(x), "r"(y) : "memory");
    }
}

SSM_INLINE void stream(float* to, Vec<float> v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, (__m256)v);
#elif defined(__x86_64__)
    _mm_stream_ps(to, (__m128)v);
#else
    store<float>(to, v);
#endif
}

// `elements` is a multiple of 64 and both arrays are aligned to a cache line.
template <bool kStream>
void copy(float* to, const float* from, std::int64_t elements, std::int64_t rounds) {
    for (std::int64_t round = 0; round < rounds; ++round) {
        for (std::int64_t i = 0; i < elements; i += 64) {
#pragma GCC unroll 16
            for (std::int64_t j = i; j < i + 64; j += kLanes<float>) {
                const Vec<float> v = load<float>(from + j);
                if constexpr (kStream)
                    stream(to + j, v);
                else
                    store<float>(to + j, v);
            }
            // Without this the loop becomes a call of memcpy, with a policy of its own.
            asm volatile("" : : : "memory");
        }
#if defined(__x86_64__)
        if constexpr (kStream) _mm_sfence();
#endif
    }
}

}  // namespace

void ceiling(const Ceiling& which, std::int64_t rounds, double& work) {
    const std::int64_t elements = which.elements;
    std::int64_t per_round = 2 * static_cast<std::int64_t>(sizeof(float)) * elements;
    switch (which.kind) {
        case Ceiling::fma:
            multiply_add(rounds);
            per_round = kChains * kLanes<float>;
            break;
        case Ceiling::exp:
            exponentials(rounds);
            per_round = kExpElements;
            break;
        case Ceiling::copy:
            copy<false>(which.memory + elements, which.memory, elements, rounds);
            break;
        case Ceiling::copy_streamed:
            copy<true>(which.memory + elements, which.memory, elements, rounds);
            break;
    }
    work = static_cast<double>(per_round) * static_cast<double>(rounds);
}

}  // namespace ssm::cpu::SSM_ISA
