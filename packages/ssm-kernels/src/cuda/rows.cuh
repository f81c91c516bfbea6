// Rows of tensors: how they are cut among threads, and how a thread's part of a row moves between
// memory of any type and layout and its registers.
#pragma once

#include "launch.cuh"

namespace ssm::cuda {

constexpr int kRowThreads = 512;
/// Columns of one thread: a block keeps rows of up to 8192 in registers.
constexpr int kRowElements = 16;

/// What a thread owns of a row: packs of neighbours from `column` on, `stride` apart, as far as
/// they lie within the `left` columns from there.
struct RowPart {
    std::int64_t row, column;
    int left, stride;
};

/// How rows are cut into groups with statistics of their own, and these among threads: 2^lane_bits
/// neighbouring threads, at least a warp, own a group. Wider groups than a block has registers for
/// are walked in slabs.
struct RowCut {
    std::int64_t rows, groups, size, slabs;  // size: columns of a group
    int lane_bits = 5, lanes, slab_size;
    int slots;  // groups that a block works on at a time

    RowCut(std::int64_t rows, std::int64_t columns, std::int64_t size)
        : rows(rows), groups(size == columns ? 1 : columns / size), size(size) {
        while (1 << lane_bits < kRowThreads && (size - 1) >> lane_bits >= kRowElements) ++lane_bits;
        lanes = 1 << lane_bits;
        slots = kRowThreads / lanes;
        slab_size = lanes * kRowElements;
        slabs = (size + slab_size - 1) / slab_size;
    }

    SSM_DEVICE int slot(int thread) const { return thread >> lane_bits; }
    SSM_DEVICE int lane(int thread) const { return thread & (lanes - 1); }

    template <int kWidth>
    SSM_DEVICE RowPart part(std::int64_t row, std::int64_t group, std::int64_t slab,
                            int thread) const {
        const int own = lane(thread) * kWidth;
        const std::int64_t rest = size - slab * slab_size;
        const int left = rest < slab_size ? static_cast<int>(rest) : slab_size;
        return {row, group * size + slab * slab_size + own, row < rows ? left - own : 0,
                lanes * kWidth};
    }
};

/// Elements of any type, `step` apart, of which the first `count` exist; 0 beyond them.
template <class Real, int kWidth>
SSM_DEVICE Pack<Real, kWidth> gather(const void* data, DType dtype, std::int64_t offset,
                                     std::int64_t step, int count) {
    Pack<Real, kWidth> piece = {};
    visit(dtype, [&](auto* type) {
        using Memory = std::remove_pointer_t<decltype(type)>;
        const Memory* from = static_cast<const Memory*>(data) + offset;
        SSM_UNROLL
        for (int i = 0; i < kWidth; ++i)
            if (i < count) piece.of[i] = static_cast<Real>(widen(from[i * step]));
    });
    return piece;
}

/// Rows of any type and layout.
template <class Real, int kCount>
struct AnyRows {
    static constexpr int kWidth = kCount;
    using Piece = Pack<Real, kCount>;
    Rows rows;

    AnyRows() = default;
    explicit AnyRows(const TensorView& view) : rows(view) {}
    SSM_BOTH explicit operator bool() const { return static_cast<bool>(rows); }
};

/// Whether rows may be walked in slabs, with addresses that take more registers.
template <class Type>
inline constexpr bool kAnySize = false;
template <class Real, int kWidth>
inline constexpr bool kAnySize<AnyRows<Real, kWidth>> = true;

/// A pack of a thread's part of a row, 0 where the row ends.
template <class Memory, int kWidth>
SSM_DEVICE Pack<Memory, kWidth> load_piece(const PackedRows<Memory, kWidth>& rows,
                                           const RowPart& part, int k) {
    Pack<Memory, kWidth> piece = {};
    if (k * part.stride < part.left) piece = rows.load(part.row, part.column + k * part.stride);
    return piece;
}

template <class Memory, int kWidth>
SSM_DEVICE void store_piece(const PackedRows<Memory, kWidth>& rows, const RowPart& part, int k,
                            const Pack<Memory, kWidth>& piece) {
    if (k * part.stride < part.left) rows.store(part.row, part.column + k * part.stride, piece);
}

template <class Real, int kWidth>
SSM_DEVICE Pack<Real, kWidth> load_piece(const AnyRows<Real, kWidth>& any, const RowPart& part,
                                         int k) {
    const Rows& rows = any.rows;
    const std::int64_t step = rows.tensor.stride[rows.last];
    return gather<Real, kWidth>(rows.tensor.data, rows.tensor.dtype,
                                rows.row_offset(part.row) + (part.column + k * part.stride) * step,
                                step, part.left - k * part.stride);
}

template <class Real, int kWidth>
SSM_DEVICE void store_piece(const AnyRows<Real, kWidth>& any, const RowPart& part, int k,
                            const Pack<Real, kWidth>& piece) {
    const std::int64_t offset = any.rows.row_offset(part.row);
    SSM_UNROLL
    for (int i = 0; i < kWidth; ++i)
        if (k * part.stride + i < part.left)
            any.rows.store(offset, part.column + k * part.stride + i, piece.of[i]);
}

template <class From>
SSM_DEVICE void load_part(const From& from, const RowPart& part,
                          typename From::Piece (&pieces)[kRowElements / From::kWidth]) {
    SSM_UNROLL
    for (int k = 0; k < kRowElements / From::kWidth; ++k) pieces[k] = load_piece(from, part, k);
}

/// Values of the compute type into a row.
template <class Real, class To>
SSM_DEVICE void store_values(const To& to, const RowPart& part,
                             const Real (&values)[kRowElements]) {
    SSM_UNROLL
    for (int k = 0; k < kRowElements / To::kWidth; ++k) {
        typename To::Piece piece;
        SSM_UNROLL
        for (int i = 0; i < To::kWidth; ++i) narrow(values[k * To::kWidth + i], piece.of[i]);
        store_piece(to, part, k, piece);
    }
}

/// What stands in a vector along the columns, weight or bias, beside a pack of a row of type Main.
/// Beside PackedRows the vector is made of aligned packs too.
template <class Real, class Main>
SSM_DEVICE Pack<Real, Main::kWidth> vector_piece(const Plane<1>& vector, const RowPart& part,
                                                 int k) {
    constexpr int kWidth = Main::kWidth;
    const std::int64_t column = part.column + k * part.stride;
    if constexpr (kAnySize<Main>)
        return gather<Real, kWidth>(vector.data, vector.dtype, column * vector.stride[0],
                                    vector.stride[0], part.left - k * part.stride);
    else {
        Pack<Real, kWidth> values = {};
        if (k * part.stride < part.left)
            visit(vector.dtype, [&](auto* type) {
                using Memory = std::remove_pointer_t<decltype(type)>;
                const auto piece = *reinterpret_cast<const Pack<Memory, kWidth>*>(
                    static_cast<const Memory*>(vector.data) + column);
                SSM_UNROLL
                for (int i = 0; i < kWidth; ++i) values.of[i] = widen(piece.of[i]);
            });
        return values;
    }
}

/// Chooses what serves tensors of rows: calls start.operator()<Main, Side>() with PackedRows where
/// types, layouts and the width of groups allow it, else with AnyRows. All of `main` has the type
/// of its first tensor; `side`, which only kSide allows for, that type or float32. The width of
/// packs, kHalfWidth where all types are of 16 bits and else 4, depends on types alone, and so do
/// the sums: all layouts give the same bits. `vectors` may have any type.
template <class Real, bool kSide, int kHalfWidth, class Start>
void with_rows(const RowCut& cut, std::initializer_list<const TensorView*> main,
               std::initializer_list<const TensorView*> side,
               std::initializer_list<const TensorView*> vectors, Start&& start) {
    const DType dtype = (*main.begin())->dtype;
    DType other = dtype;
    for (const TensorView* view : side)
        if (view->ndim != kAbsent) other = view->dtype;
    bool packed = cut.slabs == 1 && cut.size % (dtype == DType::f32 ? 4 : 8) == 0, is_half = true;
    const auto look_at = [&](std::initializer_list<const TensorView*> views, DType wanted) {
        for (const TensorView* view : views) {
            packed = packed && is_packed(*view, wanted);
            is_half = is_half && (view->ndim == kAbsent || view->dtype == DType::bf16 ||
                                  view->dtype == DType::f16);
        }
    };
    look_at(main, dtype);
    look_at(side, other);
    for (const TensorView* view : vectors)
        packed = packed &&
                 (view->ndim == kAbsent ||
                  (view->stride[0] == 1 && reinterpret_cast<std::uintptr_t>(view->data) % 16 == 0));
    if constexpr (sizeof(Real) == sizeof(float)) {
        if (packed && (other == dtype || other == DType::f32))
            return with_memory_type(dtype, [&](auto element) {
                using Memory = decltype(element);
                if constexpr (kSide && sizeof(Memory) < sizeof(float))
                    if (other != dtype)
                        return start
                            .template operator()<PackedRows<Memory, 4>, PackedRows<float, 4>>();
                constexpr int kWidth = sizeof(Memory) < sizeof(float) ? kHalfWidth : 4;
                start.template operator()<PackedRows<Memory, kWidth>, PackedRows<Memory, kWidth>>();
            });
    }
    if (is_half)
        return start.template operator()<AnyRows<Real, kHalfWidth>, AnyRows<Real, kHalfWidth>>();
    start.template operator()<AnyRows<Real, 4>, AnyRows<Real, 4>>();
}

}  // namespace ssm::cuda
