// Squares of elements in registers: lines that become columns, and sums over lanes.
#pragma once

#include <utility>

#include "simd.h"

namespace ssm::cpu::SSM_ISA {

// The unit of a transpose: pieces of 16 bytes, from as many lines as two of them have elements
// where a register holds two, else as one has. The second piece is loaded to where it belongs, so
// that what is left are exchanges within 16 bytes. Registers of 64 bytes were slower (Zen 4).
template <class T>
struct Square {
    static constexpr int kPieces = kVectorBytes < 32 ? 1 : 2;
    static constexpr int kElements = 16 / sizeof(T);
    static constexpr int kLines = kPieces * kElements;
    typedef T Line __attribute__((vector_size(16 * kPieces)));
};

template <class T>
SSM_INLINE typename Square<T>::Line load_pieces(const T* from, const T* other) {
    typename Square<T>::Line line;
#if defined(__AVX2__)
    __m128i low, high;
    std::memcpy(&low, from, sizeof low);
    std::memcpy(&high, other, sizeof high);
    line = (typename Square<T>::Line)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
#else
    (void)other;
    std::memcpy(&line, from, sizeof line);
#endif
    return line;
}

// Elements of a and b in turn, from the first (kHalf = 0) or the second half of each piece.
template <class T, int kHalf, int... kIndex>
SSM_INLINE typename Square<T>::Line interleave(typename Square<T>::Line a,
                                               typename Square<T>::Line b,
                                               std::integer_sequence<int, kIndex...>) {
    constexpr int n = Square<T>::kElements;
    return shuffle<T, (kIndex / n * n + kHalf * n / 2 + kIndex % n / 2 +
                       kIndex % 2 * Square<T>::kLines)...>(a, b);
}

/// to[e * to_pitch + l] = from[l * from_pitch + e] for Square<T>::kLines lines l of
/// Square<T>::kElements elements e.
template <class T>
SSM_INLINE void transpose_square(T* to, std::int64_t to_pitch, const T* from,
                                 std::int64_t from_pitch) {
    constexpr int n = Square<T>::kElements;
    const auto lanes = std::make_integer_sequence<int, Square<T>::kLines>{};
    typename Square<T>::Line lines[n], next[n];
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i)
        lines[i] = load_pieces(from + i * from_pitch, from + (n + i) * from_pitch);
#pragma GCC unroll 2
    for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 2
        for (int i = 0; i < n / 2; ++i) {
            next[2 * i] = interleave<T, 0>(lines[i], lines[i + n / 2], lanes);
            next[2 * i + 1] = interleave<T, 1>(lines[i], lines[i + n / 2], lanes);
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) lines[i] = next[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) std::memcpy(to + i * to_pitch, &lines[i], sizeof lines[i]);
}

/// The same for any number of whole squares. Of the two sides, the one whose lines are farther
/// apart is walked line by line: where they lie pages apart, few of them fit side by side in the
/// cache.
template <class T>
static inline void transpose(T* to, std::int64_t to_pitch, const T* from, std::int64_t from_pitch,
                             std::int64_t lines, std::int64_t elements) {
    constexpr std::int64_t kLines = Square<T>::kLines, kElements = Square<T>::kElements;
    const auto square = [&](std::int64_t l, std::int64_t e) __attribute__((always_inline)) {
        transpose_square(to + e * to_pitch + l, to_pitch, from + l * from_pitch + e, from_pitch);
    };
    if (from_pitch >= to_pitch)
        for (std::int64_t l = 0; l < lines; l += kLines)
            for (std::int64_t e = 0; e < elements; e += kElements) square(l, e);
    else
        for (std::int64_t e = 0; e < elements; e += kElements)
            for (std::int64_t l = 0; l < lines; l += kLines) square(l, e);
}

// One round of the sum below: lanes of a where bit kBlock is 0, of b where it is 1, each plus its
// partner across that bit. Two blends and one permutation: there are more units for a blend.
template <class T, int kBlock, int... kIndex>
SSM_INLINE Vec<T> fold_lanes(Vec<T> a, Vec<T> b, std::integer_sequence<int, kIndex...>) {
    constexpr int n = kLanes<T>;
    const Vec<T> own = shuffle<T, ((kIndex & kBlock) ? n + kIndex : kIndex)...>(a, b);
    const Vec<T> other = shuffle<T, ((kIndex & kBlock) ? kIndex : n + kIndex)...>(a, b);
    return own + shuffle<T, (kIndex ^ kBlock)...>(other, other);
}

/// Sums over lanes of kRows rows in one vector: lane i is part of the sum of rows[i % kRows], and
/// all of it if there are as many rows as lanes. Uses up `rows`. Rows that this has made of kBlock
/// rows each, in every kBlock-th place, are summed on.
template <class T, int kRows = kLanes<T>, int kBlock = 1>
SSM_INLINE Vec<T> sum_lanes(Vec<T>* rows) {
    if constexpr (kBlock == kRows) {
        return rows[0];
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i += 2 * kBlock)
            rows[i] = fold_lanes<T, kBlock>(rows[i], rows[i + kBlock],
                                            std::make_integer_sequence<int, kLanes<T>>{});
        return sum_lanes<T, kRows, 2 * kBlock>(rows);
    }
}
template <class T>
SSM_INLINE Vec<T> sum_lanes_of(const T* rows) {
    Vec<T> square[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) square[i] = load<T>(rows + i * kLanes<T>);
    return sum_lanes<T>(square);
}

}  // namespace ssm::cpu::SSM_ISA
