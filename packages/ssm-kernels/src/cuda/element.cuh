// Elements of tensors on the device: any floating type in memory, the compute type in registers.
#pragma once

#include <ssm/tensor.h>

#include "block.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace ssm::cuda {

/// 16-bit types as they lie in memory.
struct Bf16 {
    std::uint16_t bits;
};
struct F16 {
    std::uint16_t bits;
};

#if defined(__CUDACC__)
SSM_DEVICE float widen(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
SSM_DEVICE float widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
SSM_DEVICE void narrow(float value, Bf16& x) {
    x.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
SSM_DEVICE void narrow(float value, F16& x) { x.bits = __half_as_ushort(__float2half_rn(value)); }
#else
inline float widen(Bf16 x) {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16);
}
inline float widen(F16 x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }
inline void narrow(float value, Bf16& x) {
    std::uint32_t bits = __builtin_bit_cast(std::uint32_t, value);
    if (value != value)
        bits |= 1u << 22;  // a NaN stays one when its low half is cut
    else
        bits += 0x7fff + (bits >> 16 & 1);
    x.bits = static_cast<std::uint16_t>(bits >> 16);
}
inline void narrow(float value, F16& x) {
    x.bits = __builtin_bit_cast(std::uint16_t, static_cast<_Float16>(value));
}
inline void narrow(double value, Bf16& x) { narrow(static_cast<float>(value), x); }
inline void narrow(double value, F16& x) { narrow(static_cast<float>(value), x); }
inline double widen(double x) { return x; }
inline void narrow(double value, double& x) { x = value; }
inline void narrow(double value, float& x) { x = static_cast<float>(value); }
inline void narrow(float value, double& x) { x = value; }
#endif
SSM_DEVICE float widen(float x) { return x; }
SSM_DEVICE void narrow(float value, float& x) { x = value; }

/// a / b, neither of them negative. A division of 64 bits takes longer than a short kernel has; few
/// numbers need one.
SSM_DEVICE std::int64_t quotient(std::int64_t a, std::int64_t b) {
    if ((a | b) >> 32 != 0) return a / b;
    return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
}

/// Calls `use` with a null pointer of the memory type: one branch for many elements.
template <class Use>
SSM_DEVICE void visit(DType dtype, Use&& use) {
    switch (dtype) {
        case DType::bf16:
            return use(static_cast<Bf16*>(nullptr));
        case DType::f16:
            return use(static_cast<F16*>(nullptr));
#if !defined(__CUDACC__)
        case DType::f64:
            return use(static_cast<double*>(nullptr));
#endif
        default:
            return use(static_cast<float*>(nullptr));
    }
}

/// A tensor with its strides in elements. Offsets are 64 bits wide.
template <int kDims>
struct Plane {
    void* data = nullptr;
    std::int64_t stride[kDims] = {};
    DType dtype = DType::f32;

    SSM_BOTH explicit operator bool() const { return data != nullptr; }

    template <class Real>
    SSM_DEVICE Real load(std::int64_t offset) const {
        Real value{};
        visit(dtype, [&](auto* type) {
            using Memory = std::remove_pointer_t<decltype(type)>;
            value = static_cast<Real>(widen(static_cast<const Memory*>(data)[offset]));
        });
        return value;
    }
    template <class Real>
    SSM_DEVICE void store(std::int64_t offset, Real value) const {
        visit(dtype, [&](auto* type) {
            using Memory = std::remove_pointer_t<decltype(type)>;
            narrow(value, static_cast<Memory*>(data)[offset]);
        });
    }
};

/// The plane of a view of at most kDims axes; an absent view has no data. A present view without
/// elements may have none either: nothing is read from it.
template <int kDims>
Plane<kDims> plane(const TensorView& view) {
    Plane<kDims> made;
    if (view.ndim == kAbsent) return made;
    made.data = view.data;
    made.dtype = view.dtype;
    for (int axis = 0; axis < kDims; ++axis)
        made.stride[axis] = axis < view.ndim ? view.stride[axis] : 0;
    return made;
}

/// Number of rows: the product of all axes but the last.
inline std::int64_t row_count(const TensorView& view) {
    std::int64_t rows = 1;
    for (int axis = 0; axis + 1 < view.ndim; ++axis) rows *= view.shape[axis];
    return rows;
}

/// Rows of any tensor: (..., columns) with as many leading axes as its layout needs.
struct Rows {
    Plane<kMaxDims> tensor;
    std::int64_t shape[kMaxDims] = {};
    int last = 0;  // the axis of the columns

    Rows() = default;
    explicit Rows(const TensorView& view) : tensor(plane<kMaxDims>(view)) {
        if (view.ndim == kAbsent) return;
        last = view.ndim - 1;
        for (int axis = 0; axis < view.ndim; ++axis) shape[axis] = view.shape[axis];
    }

    SSM_BOTH explicit operator bool() const { return static_cast<bool>(tensor); }
    SSM_DEVICE std::int64_t row_offset(std::int64_t row) const {
        std::int64_t offset = 0;
        for (int axis = last - 1; axis > 0; --axis) {
            offset += row % shape[axis] * tensor.stride[axis];
            row /= shape[axis];
        }
        return last > 0 ? offset + row * tensor.stride[0] : offset;
    }
    template <class Real>
    SSM_DEVICE Real load(std::int64_t row_offset, std::int64_t column) const {
        return tensor.load<Real>(row_offset + column * tensor.stride[last]);
    }
    template <class Real>
    SSM_DEVICE void store(std::int64_t row_offset, std::int64_t column, Real value) const {
        tensor.store(row_offset + column * tensor.stride[last], value);
    }
};

/// Neighbours of one type, moved as accesses of 16 bytes, or of one that is smaller.
template <class Memory, int kCount = 16 / sizeof(Memory)>
struct alignas(sizeof(Memory) * kCount < 16 ? sizeof(Memory) * kCount : 16) Pack {
    static constexpr int kWidth = kCount;
    Memory of[kWidth];
};

/// Whether a view is made of aligned packs of `width` neighbours along `axis`.
inline bool in_packs(const TensorView& view, int axis, int width) {
    const int bytes = width * (view.dtype == DType::f64 ? 8 : view.dtype == DType::f32 ? 4 : 2);
    bool all = view.stride[axis] == 1 && view.shape[axis] % width == 0 &&
               reinterpret_cast<std::uintptr_t>(view.data) % (bytes < 16 ? bytes : 16) == 0;
    for (int other = 0; other < view.ndim; ++other)
        all = all && (other == axis || view.shape[other] == 1 || view.stride[other] % width == 0);
    return all;
}

/// A matrix with unit stride along its columns, whose rows are made of aligned packs.
template <class Memory, int kCount = Pack<Memory>::kWidth>
struct PackedRows {
    static constexpr int kWidth = kCount;
    using Piece = Pack<Memory, kCount>;
    Memory* data = nullptr;
    std::int64_t stride = 0;

    PackedRows() = default;
    explicit PackedRows(const TensorView& view)
        : data(view.ndim == kAbsent ? nullptr : static_cast<Memory*>(view.data)),
          stride(view.ndim == kAbsent ? 0 : view.stride[0]) {}

    SSM_BOTH explicit operator bool() const { return data != nullptr; }
    SSM_DEVICE Piece load(std::int64_t row, std::int64_t column) const {
        return *reinterpret_cast<const Piece*>(data + row * stride + column);
    }
    SSM_DEVICE void store(std::int64_t row, std::int64_t column, const Piece& piece) const {
        *reinterpret_cast<Piece*>(data + row * stride + column) = piece;
    }
};

/// Whether a view, where it is given, is such a matrix of elements of `dtype`.
inline bool is_packed(const TensorView& view, DType dtype) {
    if (view.ndim == kAbsent) return true;
    const int width = dtype == DType::f64 ? 2 : dtype == DType::f32 ? 4 : 8;
    return view.dtype == dtype && view.ndim == 2 && in_packs(view, 1, width);
}

}  // namespace ssm::cuda
