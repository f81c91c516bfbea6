// Rectangles of strided tensors in and out of local arrays of the compute type.
//
// Kernels compute on dense tiles only. All element types, strides and alignments end here, so a
// kernel has one instantiation per compute type.
#pragma once

#include <ssm/tensor.h>

#include <type_traits>

#include "element.h"
#include "transpose.h"

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

// Columns of another type than the tile's are converted in blocks: convert(row, column, height,
// width) for each, no higher than a line of cache and no wider than kBlockWidth.
template <class E>
constexpr std::int64_t kBlockHeight = 64 / sizeof(E);
constexpr std::int64_t kBlockWidth = 16;

template <class E, class Convert>
SSM_INLINE void for_converted_blocks(std::int64_t rows, std::int64_t columns,
                                     const Convert& convert) {
    for (std::int64_t c = 0; c < columns; c += kBlockWidth)
        for (std::int64_t r = 0; r < rows; r += kBlockHeight<E>)
            convert(r, c, min(kBlockHeight<E>, rows - r), min(kBlockWidth, columns - c));
}

/// load_tile for columns of adjacent elements.
template <class T, class E>
SSM_INLINE void load_columns(T* tile, std::int64_t pitch, const E* data, std::int64_t column_stride,
                             std::int64_t rows, std::int64_t columns) {
    const std::int64_t whole_rows = rows / Square<T>::kElements * Square<T>::kElements;
    const std::int64_t whole_columns = columns / Square<T>::kLines * Square<T>::kLines;
    if constexpr (std::is_same_v<T, E>) {
        transpose(tile, pitch, data, column_stride, whole_columns, whole_rows);
    } else {
        constexpr std::int64_t kPitch = kBlockHeight<E>;
        T block[kBlockWidth * kPitch];
        for_converted_blocks<E>(
            whole_rows, whole_columns,
            [&](std::int64_t r, std::int64_t c, std::int64_t height, std::int64_t width) {
                for (std::int64_t i = 0; i < width; ++i)
                    widen_row(block + i * kPitch, data + (c + i) * column_stride + r, height);
                transpose(tile + r * pitch + c, pitch, block, kPitch, width, height);
            });
    }
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
            tile[r * pitch + c] = static_cast<T>(widen(data[r + c * column_stride]));
}

/// store_tile for columns of adjacent elements.
template <class T, class E>
SSM_INLINE void store_columns(E* data, std::int64_t column_stride, const T* tile,
                              std::int64_t pitch, std::int64_t rows, std::int64_t columns) {
    const std::int64_t whole_rows = rows / Square<T>::kLines * Square<T>::kLines;
    const std::int64_t whole_columns = columns / Square<T>::kElements * Square<T>::kElements;
    if constexpr (std::is_same_v<T, E>) {
        transpose(data, column_stride, tile, pitch, whole_rows, whole_columns);
    } else {
        constexpr std::int64_t kPitch = kBlockHeight<E>;
        T block[kBlockWidth * kPitch];
        for_converted_blocks<E>(
            whole_rows, whole_columns,
            [&](std::int64_t r, std::int64_t c, std::int64_t height, std::int64_t width) {
                transpose(block, kPitch, tile + r * pitch + c, pitch, height, width);
                for (std::int64_t i = 0; i < width; ++i)
                    narrow_row(data + (c + i) * column_stride + r, block + i * kPitch, height);
            });
    }
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
            narrow(data + r + c * column_stride, tile[r * pitch + c]);
}

/// tile[row * pitch + column] = plane(row, column), as T.
template <class T>
static inline void load_tile(T* tile, std::int64_t pitch, const Plane& plane, std::int64_t rows,
                             std::int64_t columns) {
    visit_elements(plane, [&](const auto* data) {
        const std::int64_t row_stride = plane.row_stride, column_stride = plane.column_stride;
        if (column_stride == 1) {
            for (std::int64_t r = 0; r < rows; ++r)
                widen_row(tile + r * pitch, data + r * row_stride, columns);
        } else if (row_stride == 1) {
            load_columns(tile, pitch, data, column_stride, rows, columns);
        } else {
            for (std::int64_t r = 0; r < rows; ++r)
                for (std::int64_t c = 0; c < columns; ++c)
                    tile[r * pitch + c] =
                        static_cast<T>(widen(data[r * row_stride + c * column_stride]));
        }
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
    visit_elements(plane, [&](auto* data) {
        const std::int64_t row_stride = plane.row_stride, column_stride = plane.column_stride;
        if (column_stride == 1) {
            for (std::int64_t r = 0; r < rows; ++r)
                narrow_row(data + r * row_stride, tile + r * pitch, columns);
        } else if (row_stride == 1) {
            store_columns(data, column_stride, tile, pitch, rows, columns);
        } else {
            for (std::int64_t r = 0; r < rows; ++r)
                for (std::int64_t c = 0; c < columns; ++c)
                    narrow(data + r * row_stride + c * column_stride, tile[r * pitch + c]);
        }
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
    const char* const begin = stripes.data + index * stripes.pitch;
    const char* const end = begin + stripes.bytes;
    // From the start of its first line of cache: NumPy's large arrays begin 16 bytes into one.
    for (const char* line = begin - reinterpret_cast<std::uintptr_t>(begin) % 64; line < end;
         line += 64)
        __builtin_prefetch(line, 0, 2);
}

}  // namespace ssm::cpu::SSM_ISA
