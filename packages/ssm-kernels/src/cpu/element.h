// Element types as stored, one by one, in vectors and in rows.
#pragma once

#include <type_traits>

#include "simd.h"

namespace ssm::cpu::SSM_ISA {

// Each knows how to become float and how to be rounded from it.
struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

SSM_INLINE float bits_to_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
SSM_INLINE std::uint32_t float_to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

SSM_INLINE double widen(double value) { return value; }
SSM_INLINE float widen(float value) { return value; }
SSM_INLINE float widen(BFloat16 value) {
    return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16);
}
SSM_INLINE float widen(Float16 value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    const std::uint32_t sign = (value.bits & 0x8000u) << 16;
    const std::uint32_t rest = value.bits & 0x7fffu;
    if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest << 13));  // inf, NaN
    // A multiplication by 2^112 moves the exponent and normalises subnormal numbers.
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
#endif
}

SSM_INLINE void narrow(double* to, double value) { *to = value; }
SSM_INLINE void narrow(float* to, double value) { *to = static_cast<float>(value); }
SSM_INLINE void narrow(BFloat16* to, double value) {
    const std::uint32_t bits = float_to_bits(static_cast<float>(value));
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to->bits = static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}
SSM_INLINE void narrow(Float16* to, double value) {
#if defined(__F16C__)
    to->bits =
        static_cast<std::uint16_t>(_cvtss_sh(static_cast<float>(value), _MM_FROUND_TO_NEAREST_INT));
#else
    const std::uint32_t bits = float_to_bits(static_cast<float>(value));
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t rest = bits & 0x7fffffffu;
    std::uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00u;  // NaN
    } else if (rest >= 0x477ff000u) {
        half = 0x7c00u;  // rounds beyond the largest half: infinity
    } else if (rest < 0x38800000u) {
        // Subnormal: adding 0.5 aligns the bits and rounds to nearest even.
        half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
    } else {
        half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    }
    to->bits = static_cast<std::uint16_t>(sign | half);
#endif
}

template <class T>
SSM_INLINE void copy_row(T* __restrict to, const T* __restrict from, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(to + i, load<T>(from + i));
    for (; i < count; ++i) to[i] = from[i];
}

typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));

// Whether a vector of T is made of adjacent elements of E by widen_lanes(), and back.
template <class T, class E>
inline constexpr bool kHasLanes = false;

#if defined(__x86_64__)
template <>
inline constexpr bool kHasLanes<float, BFloat16> = true;

#if defined(__AVX512F__)
typedef __m256i Halves;  // as many 16-bit elements as a vector has lanes

SSM_INLINE Vec<float> widen_halves(Halves halves) {
    // Word i of the source becomes the upper half of lane i.
    const __m512i places = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7,
                                            0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, places,
                                                      _mm512_castsi256_si512(halves));
}
/// The upper halves of the lanes of a, then of b.
SSM_INLINE Words upper_halves(Words a, Words b) {
    const __m512i places =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return (Words)_mm512_permutex2var_epi16((__m512i)a, places, (__m512i)b);
}
SSM_INLINE bool any_nan(Vec<float> a, Vec<float> b) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
}
#elif defined(__AVX2__)
typedef __m128i Halves;

SSM_INLINE Vec<float> widen_halves(Halves halves) {
    return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}
SSM_INLINE Words upper_halves(Words a, Words b) {
    const __m256i words = _mm256_packus_epi32((__m256i)(a >> 16), (__m256i)(b >> 16));
    return (Words)_mm256_permute4x64_epi64(words, 0xd8);
}
SSM_INLINE bool any_nan(Vec<float> a, Vec<float> b) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
}
#else
typedef double Halves;  // the one type of 8 bytes that lives in a vector register

SSM_INLINE Vec<float> widen_halves(Halves halves) {
    return (Vec<float>)_mm_unpacklo_epi16(_mm_setzero_si128(),
                                          _mm_castpd_si128(_mm_set_sd(halves)));
}
SSM_INLINE Words upper_halves(Words a, Words b) {
    return (Words)_mm_packs_epi32(_mm_srai_epi32((__m128i)a, 16), _mm_srai_epi32((__m128i)b, 16));
}
SSM_INLINE bool any_nan(Vec<float> a, Vec<float> b) {
    return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
}
#endif

SSM_INLINE Vec<float> widen_lanes(const BFloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return widen_halves(halves);
}
/// Two vectors as one of 16-bit elements: for both NaN is looked for once.
SSM_INLINE Words narrow_pair(Vec<float> a, Vec<float> b) {
    Words low = (Words)a, high = (Words)b;
    low += 0x7fffu + (low >> 16 & 1u);  // to nearest even
    high += 0x7fffu + (high >> 16 & 1u);
    if (__builtin_expect(any_nan(a, b), 0)) {
        low = a != a ? (Words)a | 0x400000u : low;
        high = b != b ? (Words)b | 0x400000u : high;
    }
    return upper_halves(low, high);
}
SSM_INLINE void narrow_lanes(BFloat16* to, Vec<float> v) {
    const Words bits = (Words)v, near = bits + (0x7fffu + (bits >> 16 & 1u));
    const Words word = v != v ? bits | 0x400000u : near;
    const Words halves = upper_halves(word, word);
    std::memcpy(to, &halves, sizeof(Halves));
}
#endif

#if defined(__AVX2__)
template <>
inline constexpr bool kHasLanes<float, Float16> = true;

SSM_INLINE Vec<float> widen_lanes(const Float16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(halves);
#else
    return (Vec<float>)_mm256_cvtph_ps(halves);
#endif
}
SSM_INLINE void narrow_lanes(Float16* to, Vec<float> v) {
#if defined(__AVX512F__)
    const Halves halves = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const Halves halves = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
    std::memcpy(to, &halves, sizeof halves);
}
#endif

/// One vector from adjacent elements.
template <class T, class E>
SSM_INLINE Vec<T> widen_vector(const E* from) {
    if constexpr (std::is_same_v<T, E>) {
        return load<T>(from);
    } else if constexpr (kHasLanes<T, E>) {
        return widen_lanes(from);
    } else {
        T line[kLanes<T>];
        for (int i = 0; i < kLanes<T>; ++i) line[i] = static_cast<T>(widen(from[i]));
        return load<T>(line);
    }
}

/// As narrow() for every lane.
template <class T, class E>
SSM_INLINE void narrow_vector(E* to, Vec<T> v) {
    if constexpr (std::is_same_v<T, E>) {
        store<T>(to, v);
    } else if constexpr (kHasLanes<T, E>) {
        narrow_lanes(to, v);
    } else {
        T line[kLanes<T>];
        store<T>(line, v);
        for (int i = 0; i < kLanes<T>; ++i) narrow(to + i, line[i]);
    }
}

/// Converts `count` adjacent elements.
template <class T, class E>
SSM_INLINE void widen_row(T* __restrict to, const E* __restrict from, std::int64_t count) {
    if constexpr (std::is_same_v<T, E>) return copy_row(to, from, count);
    std::int64_t i = 0;
    if constexpr (kHasLanes<T, E>)
        for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(to + i, widen_lanes(from + i));
    for (; i < count; ++i) to[i] = static_cast<T>(widen(from[i]));
}
template <class T, class E>
SSM_INLINE void narrow_row(E* __restrict to, const T* __restrict from, std::int64_t count) {
    if constexpr (std::is_same_v<T, E>) return copy_row(to, from, count);
    std::int64_t i = 0;
    if constexpr (kHasLanes<T, E> && std::is_same_v<E, BFloat16>)
        for (; i + 2 * kLanes<T> <= count; i += 2 * kLanes<T>) {
            const Words pair = narrow_pair(load<T>(from + i), load<T>(from + i + kLanes<T>));
            std::memcpy(to + i, &pair, sizeof pair);
        }
    if constexpr (kHasLanes<T, E>)
        for (; i + kLanes<T> <= count; i += kLanes<T>) narrow_lanes(to + i, load<T>(from + i));
    for (; i < count; ++i) narrow(to + i, from[i]);
}

}  // namespace ssm::cpu::SSM_ISA
