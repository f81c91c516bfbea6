// Vectors of the instruction set that this translation unit is compiled for.
//
// Everything here lives in ssm::cpu::SSM_ISA and is always inlined: a function that the compiler
// emitted once per instruction set under one name could be served to an older processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SSM_INLINE static inline __attribute__((always_inline))

namespace ssm::cpu::SSM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kVectorBytes)));
};
/// Native vector of T. GCC's vector type: + - * / and comparisons work lane by lane, and a * b + c
/// becomes one fused operation where the instruction set has it.
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
SSM_INLINE Vec<T> load(const T* from) {
    Vec<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class T>
SSM_INLINE void store(T* to, Vec<T> v) {
    std::memcpy(to, &v, sizeof v);
}

template <class T>
SSM_INLINE Vec<T> broadcast(T value) {
    return value - Vec<T>{};
}

template <class T>
SSM_INLINE Vec<T> zero() {
    return Vec<T>{};
}

/// Lane numbers from `first` on.
template <class T>
SSM_INLINE Vec<T> lane_numbers(std::int64_t first) {
    T numbers[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) numbers[i] = static_cast<T>(first + i);
    return load<T>(numbers);
}

#if defined(__FMA__)
/// a * b + c, rounded once: written out where the product is wanted elsewhere as well, since a
/// compiler may then round it first.
SSM_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return (Vec<float>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#endif
}
#endif

/// Lane-wise choice; the mask is the result of a comparison.
template <class T, class Mask>
SSM_INLINE Vec<T> select(Mask mask, Vec<T> yes, Vec<T> no) {
    return mask ? yes : no;
}

/// Lanes of two vectors of T, of any length: indices count through `a`, then through `b`.
template <class T, int... kIndex, class V>
SSM_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, kIndex...);
#else  // GCC 11 knows no other
    using Index = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    typedef Index Places __attribute__((vector_size(sizeof(V))));
    return __builtin_shuffle(a, b, Places{kIndex...});
#endif
}

/// Sum of the lanes in a fixed order (halves, quarters, ...).
template <class T>
SSM_INLINE T reduce_add(Vec<T> v) {
    T lanes[kLanes<T>];
    store<T>(lanes, v);
    for (int width = kLanes<T> / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

}  // namespace ssm::cpu::SSM_ISA
