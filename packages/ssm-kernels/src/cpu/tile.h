// Rectangles of strided tensors in and out of local arrays of the compute type.
//
// Kernels compute on dense tiles only. All element types, strides and alignments end here, so a
// kernel has one instantiation per compute type.
#pragma once

#include <ssm/tensor.h>

#include <type_traits>
#include <utility>

#include "simd.h"

namespace ssm::cpu::SSM_ISA {

/// A rectangle of a tensor: element (row, column) is data[row * row_stride + column *
/// column_stride].
struct Plane {
    void* data;
    DType dtype;
    std::int64_t row_stride;
    std::int64_t column_stride;
};

SSM_INLINE std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
SSM_INLINE std::int64_t max(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

SSM_INLINE std::int64_t round_up(std::int64_t count, std::int64_t unit) {
    return (count + unit - 1) / unit * unit;
}
SSM_INLINE std::int64_t least_common_multiple(std::int64_t a, std::int64_t b) {
    std::int64_t divisor = a, rest = b;
    while (rest != 0) {
        const std::int64_t next = divisor % rest;
        divisor = rest;
        rest = next;
    }
    return a / divisor * b;
}

SSM_INLINE std::int64_t dtype_bytes(DType dtype) {
    switch (dtype) {
        case DType::f64:
        case DType::i64:
            return 8;
        case DType::f32:
        case DType::i32:
            return 4;
        case DType::bf16:
        case DType::f16:
            return 2;
        default:
            return 1;
    }
}

/// The rectangle that starts `offset` elements into `view`.
SSM_INLINE Plane plane_at(const TensorView& view, std::int64_t offset, std::int64_t row_stride,
                          std::int64_t column_stride) {
    return {static_cast<char*>(view.data) + offset * dtype_bytes(view.dtype), view.dtype,
            row_stride, column_stride};
}

// Element types as stored. Each knows how to become float and how to be rounded from it.
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

/// Calls visitor(typed pointer) with the stored element type of `plane`.
template <class Visitor>
SSM_INLINE void visit_elements(const Plane& plane, const Visitor& visitor) {
    switch (plane.dtype) {
        case DType::f64:
            visitor(static_cast<double*>(plane.data));
            break;
        case DType::bf16:
            visitor(static_cast<BFloat16*>(plane.data));
            break;
        case DType::f16:
            visitor(static_cast<Float16*>(plane.data));
            break;
        default:
            visitor(static_cast<float*>(plane.data));
            break;
    }
}

// One round of the transpose: exchanges the off-diagonal blocks of kBlock x kBlock elements.
template <class T, int kBlock, int... kIndex>
SSM_INLINE void transpose_round(Vec<T>* rows, std::integer_sequence<int, kIndex...>) {
    constexpr int n = kLanes<T>;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
        if ((i & kBlock) != 0) continue;
        const Vec<T> a = rows[i], b = rows[i + kBlock];
        rows[i] = shuffle<T, ((kIndex & kBlock) ? n + kIndex - kBlock : kIndex)...>(a, b);
        rows[i + kBlock] = shuffle<T, ((kIndex & kBlock) ? n + kIndex : kIndex + kBlock)...>(a, b);
    }
}

/// In-register transpose of a square of vectors.
template <class T>
SSM_INLINE void transpose_square(Vec<T>* rows) {
    constexpr int n = kLanes<T>;
    const auto lanes = std::make_integer_sequence<int, n>{};
    transpose_round<T, 1>(rows, lanes);
    if constexpr (n > 2) transpose_round<T, 2>(rows, lanes);
    if constexpr (n > 4) transpose_round<T, 4>(rows, lanes);
    if constexpr (n > 8) transpose_round<T, 8>(rows, lanes);
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
    if constexpr (kHasLanes<T, E>)
        for (; i + kLanes<T> <= count; i += kLanes<T>) narrow_lanes(to + i, load<T>(from + i));
    for (; i < count; ++i) narrow(to + i, from[i]);
}

/// Calls square(row, column) for every square of vectors of a rectangle whose rows are adjacent
/// elements of type E, and returns how many rows these cover. A line of cache is done with before
/// the next one comes: where columns lie pages apart, few of their lines fit side by side.
template <class T, class E, class Square>
SSM_INLINE std::int64_t for_squares(std::int64_t rows, std::int64_t columns, Square&& square) {
    constexpr std::int64_t n = kLanes<T>, kLine = 64 / sizeof(E) > n ? 64 / sizeof(E) : n;
    const std::int64_t end = rows / n * n;
    for (std::int64_t line = 0; line < end; line += kLine)
        for (std::int64_t c = 0; c + n <= columns; c += n)
            for (std::int64_t r = line; r < min(line + kLine, end); r += n) square(r, c);
    return end;
}

/// tile[row * pitch + column] = plane(row, column), as T.
template <class T>
static inline void load_tile(T* tile, std::int64_t pitch, const Plane& plane, std::int64_t rows,
                             std::int64_t columns) {
    constexpr int n = kLanes<T>;
    visit_elements(plane, [&](const auto* data) {
        const std::int64_t row_stride = plane.row_stride, column_stride = plane.column_stride;
        if (column_stride == 1) {
            for (std::int64_t r = 0; r < rows; ++r)
                widen_row(tile + r * pitch, data + r * row_stride, columns);
            return;
        }
        std::int64_t done = 0;
        if (row_stride == 1) {
            using Element = std::remove_cvref_t<decltype(*data)>;
            done = for_squares<T, Element>(rows, columns, [&](std::int64_t row, std::int64_t c) {
                Vec<T> square[n];
                for (int i = 0; i < n; ++i)
                    square[i] = widen_vector<T>(data + row + (c + i) * column_stride);
                transpose_square<T>(square);
                for (int r = 0; r < n; ++r) store<T>(tile + (row + r) * pitch + c, square[r]);
            });
            for (std::int64_t c = columns / n * n; c < columns; ++c)
                for (std::int64_t r = 0; r < done; ++r)
                    tile[r * pitch + c] = static_cast<T>(widen(data[r + c * column_stride]));
        }
        for (std::int64_t r = done; r < rows; ++r)
            for (std::int64_t c = 0; c < columns; ++c)
                tile[r * pitch + c] =
                    static_cast<T>(widen(data[r * row_stride + c * column_stride]));
    });
}

/// Rows of whole vectors in the compute type: a tile, or a tensor that needs no copy.
template <class T>
struct Rows {
    T* data;
    std::int64_t pitch;
};

/// Whether the rows of a plane can be used where they lie.
template <class T>
SSM_INLINE bool is_dense(const Plane& plane, std::int64_t columns) {
    const DType dtype = std::is_same_v<T, double> ? DType::f64 : DType::f32;
    return plane.dtype == dtype && plane.column_stride == 1 && columns % kLanes<T> == 0;
}

/// The rows of a plane where they lie if that is possible, else copied into a tile.
template <class T>
static inline Rows<const T> rows_of(const Plane& plane, T* tile, std::int64_t pitch,
                                    std::int64_t rows, std::int64_t columns) {
    if (is_dense<T>(plane, columns)) return {static_cast<const T*>(plane.data), plane.row_stride};
    load_tile(tile, pitch, plane, rows, columns);
    return {tile, pitch};
}

/// plane(row, column) = tile[row * pitch + column], rounded to the plane's type.
template <class T>
static inline void store_tile(const Plane& plane, const T* tile, std::int64_t pitch,
                              std::int64_t rows, std::int64_t columns) {
    constexpr int n = kLanes<T>;
    visit_elements(plane, [&](auto* data) {
        const std::int64_t row_stride = plane.row_stride, column_stride = plane.column_stride;
        if (column_stride == 1) {
            for (std::int64_t r = 0; r < rows; ++r)
                narrow_row(data + r * row_stride, tile + r * pitch, columns);
            return;
        }
        std::int64_t done = 0;
        if (row_stride == 1) {
            using Element = std::remove_cvref_t<decltype(*data)>;
            done = for_squares<T, Element>(rows, columns, [&](std::int64_t row, std::int64_t c) {
                Vec<T> square[n];
                for (int r = 0; r < n; ++r) square[r] = load<T>(tile + (row + r) * pitch + c);
                transpose_square<T>(square);
                for (int i = 0; i < n; ++i)
                    narrow_vector<T>(data + row + (c + i) * column_stride, square[i]);
            });
            for (std::int64_t c = columns / n * n; c < columns; ++c)
                for (std::int64_t r = 0; r < done; ++r)
                    narrow(data + r + c * column_stride, tile[r * pitch + c]);
        }
        for (std::int64_t r = done; r < rows; ++r)
            for (std::int64_t c = 0; c < columns; ++c)
                narrow(data + r * row_stride + c * column_stride, tile[r * pitch + c]);
    });
}

/// A rectangle as the lines that are adjacent elements: its rows or its columns, none if neither
/// is.
struct Stripes {
    const char* data;
    std::int64_t pitch, bytes, count;

    Stripes() = default;
    Stripes(const Plane& plane, std::int64_t rows, std::int64_t columns)
        : data(static_cast<const char*>(plane.data)) {
        const bool by_row = plane.column_stride == 1;
        const std::int64_t size = dtype_bytes(plane.dtype);
        pitch = (by_row ? plane.row_stride : plane.column_stride) * size;
        bytes = (by_row ? columns : rows) * size;
        count = by_row ? rows : plane.row_stride == 1 ? columns : 0;
    }
};

/// Asks for one of them, read or written next, into the second-level cache: they may lie pages
/// apart, which the processor does not foresee. (Always inlined: GCC takes a function of
/// nothing but prefetches for one without effects.)
SSM_INLINE void request_stripe(const Stripes& stripes, std::int64_t index) {
    if (index >= stripes.count) return;
    const char* const line = stripes.data + index * stripes.pitch;
    for (std::int64_t at = 0; at < stripes.bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
}

}  // namespace ssm::cpu::SSM_ISA
