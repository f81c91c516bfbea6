// Rows: the last axis of tensors of any rank, what normalisations and gates walk along.
#pragma once

#include <ssm/tensor.h>

#include <initializer_list>

#include "pack.h"
#include "parallel.h"
#include "tile.h"

namespace ssm::cpu::SSM_ISA {

constexpr int kSums = 4;    // vectors that are summed together, so that additions overlap
constexpr int kStores = 2;  // vectors that are stored together: longer bursts stall on the memory
constexpr std::int64_t kTaskElements = 16384;
constexpr std::int64_t kSerialElements = 32768;  // below, waking a thread costs more than it gains
constexpr std::int64_t kPartials = 64;           // partial sums of the gradients of weights
constexpr std::int64_t kPartialElements = 1 << 22;
constexpr std::int64_t kReduceColumns = 512;
// Outputs that cannot stay in any cache bypass them: the read for ownership is a third of a copy.
constexpr std::int64_t kStreamBytes = 16 << 20;

// Offset of a row in a view whose leading axes may not merge into one.
SSM_INLINE std::int64_t row_offset(const TensorView& view, std::int64_t row) {
    std::int64_t offset = 0;
    for (int axis = view.ndim - 2; axis > 0; --axis) {
        offset += row % view.shape[axis] * view.stride[axis];
        row /= view.shape[axis];
    }
    return offset + row * view.stride[0];
}

template <class E>
constexpr DType kElement = std::is_same_v<E, double>     ? DType::f64
                           : std::is_same_v<E, BFloat16> ? DType::bf16
                           : std::is_same_v<E, Float16>  ? DType::f16
                                                         : DType::f32;

/// The rows of one tensor as arrays of E: in place where they are that already, else through a line
/// of scratch. A tensor of another type is converted, for which E must be a compute type.
template <class E>
struct RowLines {
    const TensorView& view;
    E* line;
    std::int64_t dim;
    std::int64_t offset;  // of the first column
    bool direct;

    RowLines(const TensorView& tensor, void* scratch_line, std::int64_t columns,
             std::int64_t first_column = 0)
        : view(tensor),
          line(static_cast<E*>(scratch_line)),
          dim(columns),
          offset(tensor.ndim >= 0 ? first_column * tensor.stride[tensor.ndim - 1] : 0),
          direct(tensor.ndim >= 0 && tensor.dtype == kElement<E> &&
                 (columns == 1 || tensor.stride[tensor.ndim - 1] == 1)) {}

    bool given() const { return view.ndim >= 0; }
    E* place(std::int64_t row) const {
        return direct ? static_cast<E*>(view.data) + row_offset(view, row) + offset : line;
    }
    Plane plane(std::int64_t row) const {
        return plane_at(view, row_offset(view, row) + offset, 0, view.stride[view.ndim - 1]);
    }
    const E* read(std::int64_t row) const {
        if (direct) return place(row);
        const Plane from = plane(row);
        if constexpr (kIsCompute) {
            load_tile(line, 0, from, 1, dim);
        } else {
            for (std::int64_t i = 0; i < dim; ++i)
                line[i] = static_cast<const E*>(from.data)[i * from.column_stride];
        }
        return line;
    }
    /// Brings `values` to the tensor's type and place, unless they were computed there.
    void write(std::int64_t row, const E* values) const {
        if (direct) {
            if (E* to = place(row); to != values)
                std::memcpy(to, values, sizeof(E) * static_cast<std::size_t>(dim));
            return;
        }
        const Plane to = plane(row);
        if constexpr (kIsCompute) {
            store_tile(to, values, 0, 1, dim);
        } else {
            for (std::int64_t i = 0; i < dim; ++i)
                static_cast<E*>(to.data)[i * to.column_stride] = values[i];
        }
    }

  private:
    static constexpr bool kIsCompute = std::is_same_v<E, float> || std::is_same_v<E, double>;
};

/// What is read next: fetched while a pass works in the first-level cache, which would otherwise
/// leave the memory idle. Into the second level: the first one has the row at work and the weights.
template <class E>
struct Ahead {
    const E* from;
    std::int64_t mask;  // 0 where there is nothing to fetch: then one place again and again

    Ahead(const RowLines<E>& rows, std::int64_t row, std::int64_t end) {
        const bool fetches = rows.direct && row < end;
        from = fetches ? rows.place(row) : rows.line;
        mask = fetches ? -1 : 0;
    }
    /// The same, from another column on.
    Ahead at(std::int64_t column) const {
        Ahead there = *this;
        there.from += column & mask;
        return there;
    }
    template <class T, int kCount>
    void fetch(std::int64_t i, Whole<kCount>) const {
        const E* const first = from + (i & mask);
        for (int at = 0; at < kCount * kLanes<T>; at += 64 / sizeof(E))
            __builtin_prefetch(first + at, 0, 2);
    }
    template <class T>
    void fetch(std::int64_t i, Part) const {
        __builtin_prefetch(from + (i & mask), 0, 2);
    }
};

/// A vector of parameters as a dense array of the compute type; null where it is not given.
template <class T>
const T* dense(const TensorView& view, T* line, std::int64_t dim) {
    if (view.ndim < 0) return nullptr;
    return RowLines<T>(view, line, dim).read(0);
}

/// Calls visitor(compute type, element type), as null pointers, for tensors of which the first is
/// the main input: their one type where it is one that vectors are widened from, else the compute
/// type, to which rows are converted.
template <class Visitor>
SSM_INLINE void visit_rows(std::initializer_list<const TensorView*> tensors,
                           const Visitor& visitor) {
    const DType main = (*tensors.begin())->dtype;
    bool same = true;
    for (const TensorView* tensor : tensors)
        same = same && (tensor->ndim < 0 || tensor->dtype == main);
    if (main == DType::f64)
        visitor(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    else if (same && main == DType::bf16)
        visitor(static_cast<float*>(nullptr), static_cast<BFloat16*>(nullptr));
    else if (same && main == DType::f16)
        visitor(static_cast<float*>(nullptr), static_cast<Float16*>(nullptr));
    else
        visitor(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
}

template <class T>
SSM_INLINE T* statistic(const TensorView& view, std::int64_t row) {
    return static_cast<T*>(view.data) + row * view.stride[0];
}

/// The sizes of a walk along rows.
struct RowShape {
    std::int64_t rows = 1;
    std::int64_t dim;
    std::int64_t pitch;  // elements of one scratch line

    explicit RowShape(const TensorView& x) : dim(x.shape[x.ndim - 1]) {
        for (int axis = 0; axis + 1 < x.ndim; ++axis) rows *= x.shape[axis];
        pitch = (dim + 31) / 32 * 32;
    }
    int threads(int wanted) const { return rows * dim <= kSerialElements ? 1 : wanted; }
    /// Whether an output is to be written past the caches, and can be.
    template <class T, class E = T>
    bool streams(const TensorView& out) const {
        constexpr int bytes = kLanes<T> * static_cast<int>(sizeof(E));
        constexpr int unit = kStreamed<T, E> * static_cast<int>(sizeof(E));
        bool aligned = sizeof(T) == 4 && bytes >= 16 && out.ndim >= 0 && out.dtype == kElement<E> &&
                       out.stride[out.ndim - 1] == 1 && dim % kLanes<T> == 0 &&
                       reinterpret_cast<std::uintptr_t>(out.data) % unit == 0 &&
                       rows * dim * static_cast<std::int64_t>(sizeof(E)) >= kStreamBytes;
        for (int axis = 0; axis + 1 < out.ndim; ++axis)
            aligned = aligned && out.stride[axis] % kStreamed<T, E> == 0;
        return aligned;
    }
};

/// out = the sum of `count` lines, in their order.
template <class T>
void reduce_partials(const TensorView& out, const T* partials, std::int64_t pitch,
                     std::int64_t count, std::int64_t dim, int threads) {
    if (out.ndim < 0) return;
    parallel_for((dim + kReduceColumns - 1) / kReduceColumns, threads, [&](std::int64_t task, int) {
        const std::int64_t first = task * kReduceColumns, width = min(kReduceColumns, dim - first);
        T sum[kReduceColumns] = {};
        for (std::int64_t line = 0; line < count; ++line)
            for (std::int64_t i = 0; i < width; ++i) sum[i] += partials[line * pitch + first + i];
        store_tile(plane_at(out, first * out.stride[0], 0, out.stride[0]), sum, 0, 1, width);
    });
}

}  // namespace ssm::cpu::SSM_ISA
