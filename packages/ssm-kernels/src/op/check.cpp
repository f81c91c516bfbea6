#include "check.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace ssm {

namespace {

std::string tuple_text(const std::int64_t* sizes, int count) {
    std::string text = "(";
    for (int i = 0; i < count; ++i) {
        if (i > 0) text += ", ";
        text += std::to_string(sizes[i]);
    }
    return text + (count == 1 ? ",)" : ")");
}

// Strides of an empty array mean nothing.
bool is_empty(const TensorView& view) {
    for (int i = 0; i < view.ndim; ++i)
        if (view.shape[i] == 0) return true;
    return false;
}

}  // namespace

void fail(std::string_view op, std::string_view argument, std::string_view rule,
          std::string_view got) {
    std::string message;
    message.append(op).append(": ").append(argument).append(" must ").append(rule);
    message.append(", got ").append(got);
    throw std::invalid_argument(message);
}

std::string device_text(const Device& device) {
    switch (device.type) {
        case DeviceType::cpu:
            return "cpu";
        case DeviceType::cuda:
            return "cuda:" + std::to_string(device.index);
        case DeviceType::other:
            break;
    }
    return "an unknown device";
}

const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::f64:
            return "float64";
        case DType::f32:
            return "float32";
        case DType::bf16:
            return "bfloat16";
        case DType::f16:
            return "float16";
        case DType::i64:
            return "int64";
        case DType::i32:
            return "int32";
        case DType::i8:
            return "int8";
        case DType::u8:
            return "uint8";
        case DType::other:
            break;
    }
    return "an unsupported dtype";
}

std::string shape_text(const TensorView& view) { return tuple_text(view.shape, view.ndim); }

bool is_float(DType dtype) {
    return dtype == DType::f64 || dtype == DType::f32 || dtype == DType::bf16 ||
           dtype == DType::f16;
}

bool has_shape_of(const TensorView& view, const TensorView& other) {
    bool same = view.ndim == other.ndim;
    for (int i = 0; same && i < view.ndim; ++i) same = view.shape[i] == other.shape[i];
    return same;
}

std::int64_t element_bytes(DType dtype) {
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

void Checker::given(std::string_view name, const TensorView& view) const {
    if (!present(view)) fail(name, "be given", "None");
}

void Checker::rank(std::string_view name, const TensorView& view, int ndim,
                   std::string_view letters) const {
    given(name, view);
    if (view.ndim != ndim) fail(name, "have shape " + std::string(letters), shape_text(view));
}

void Checker::shape(std::string_view name, const TensorView& view,
                    std::initializer_list<Axis> axes) const {
    given(name, view);
    bool same = view.ndim == static_cast<int>(axes.size());
    std::string letters = "(";
    std::int64_t sizes[kMaxDims] = {};
    int i = 0;
    for (const Axis& axis : axes) {
        if (i > 0) letters += ", ";
        letters += axis.letter;
        sizes[i] = axis.size;
        same = same && view.shape[i] == axis.size;
        ++i;
    }
    letters += i == 1 ? ",)" : ")";
    if (!same) fail(name, "have shape " + letters + " = " + tuple_text(sizes, i), shape_text(view));
}

void Checker::same_shape(std::string_view name, const TensorView& view,
                         const TensorView& like) const {
    if (!has_shape_of(view, like)) fail(name, "have shape " + shape_text(like), shape_text(view));
}

void Checker::floating(std::string_view name, const TensorView& view) const {
    const bool on_gpu = device_.type == DeviceType::cuda;
    if (!is_float(view.dtype) || (on_gpu && view.dtype == DType::f64))
        fail(name,
             on_gpu ? "have dtype float32, bfloat16 or float16 on a GPU"
                    : "have dtype float64, float32, bfloat16 or float16",
             dtype_name(view.dtype));
}

void Checker::dtype(std::string_view name, const TensorView& view, DType wanted) const {
    if (view.dtype != wanted)
        fail(name, std::string("have dtype ") + dtype_name(wanted), dtype_name(view.dtype));
}

void Checker::device(std::string_view name, const TensorView& view) {
    if (view.device.type != device_.type || view.device.index != device_.index)
        fail(name, "be on " + device_text(device_), device_text(view.device));
    std::int64_t count = 1;
    for (int i = 0; i < view.ndim; ++i) count *= view.shape[i];
    if (view.data == nullptr && count > 0) fail(name, "have storage", "a null data pointer");
    const auto address = reinterpret_cast<std::uintptr_t>(view.data);
    const auto bytes = static_cast<std::uintptr_t>(element_bytes(view.dtype));
    if (device_.type == DeviceType::cuda && count > 0 && address % bytes != 0)
        fail(name, "be aligned to its elements of " + std::to_string(bytes) + " bytes on a GPU",
             "address " + std::to_string(address));
    note(name, view);
}

void Checker::input(std::string_view name, const TensorView& view,
                    std::initializer_list<Axis> axes) {
    shape(name, view, axes);
    floating(name, view);
    device(name, view);
}

void Checker::optional_input(std::string_view name, const TensorView& view,
                             std::initializer_list<Axis> axes) {
    if (present(view)) input(name, view, axes);
}

void Checker::indices(std::string_view name, const TensorView& view,
                      std::initializer_list<Axis> axes) {
    shape(name, view, axes);
    dtype(name, view, DType::i32);
    device(name, view);
}

void Checker::state_indices(const TensorView& view, std::int64_t batch, std::int64_t rows) {
    indices("state_indices", view, {{"B", batch}});
    if (device_.type != DeviceType::cpu) return;  // reading them would wait for the device
    const auto row_of = [&view](std::int64_t b) {
        return static_cast<const std::int32_t*>(view.data)[b * view.stride[0]];
    };
    bool rising = true;  // the usual order, in which nothing can repeat
    std::int64_t last = -1;
    for (std::int64_t b = 0; b < batch; ++b) {
        const std::int32_t row = row_of(b);
        if (row < -1 || row >= rows)
            fail("state_indices", "lie in -1.." + std::to_string(rows - 1), std::to_string(row));
        if (row < 0) continue;
        rising = rising && row > last;
        last = row;
    }
    if (rising) return;
    std::vector<std::int32_t> used;
    used.reserve(static_cast<std::size_t>(batch));
    for (std::int64_t b = 0; b < batch; ++b)
        if (row_of(b) >= 0) used.push_back(row_of(b));
    std::sort(used.begin(), used.end());
    const auto twice = std::adjacent_find(used.begin(), used.end());
    if (twice != used.end()) fail("state_indices", "not name a row twice", std::to_string(*twice));
}

void Checker::no_overlap(std::string_view name, const TensorView& view) const {
    if (is_empty(view)) return;
    const auto size = [&view](int axis) { return std::abs(view.stride[axis]); };
    int order[kMaxDims];  // axes by rising stride
    int count = 0;
    for (int i = 0; i < view.ndim; ++i) {
        if (view.shape[i] == 1) continue;
        if (view.stride[i] == 0)
            fail(name, "not overlap itself", "stride 0 along axis " + std::to_string(i));
        int place = count++;
        for (; place > 0 && size(order[place - 1]) > size(i); --place)
            order[place] = order[place - 1];
        order[place] = i;
    }
    std::int64_t extent = 0;  // distance from the first to the last element of the axes so far
    for (int k = 0; k < count; ++k) {
        if (size(order[k]) <= extent)
            fail(name, "not overlap itself", "strides " + tuple_text(view.stride, view.ndim));
        extent += (view.shape[order[k]] - 1) * size(order[k]);
    }
}

void Checker::note(std::string_view name, const TensorView& view) {
    if (is_empty(view)) return;
    for (int i = 0; i < place_count_; ++i) {
        if (places_[i].data != view.data) continue;
        if (places_[i].name == name) return;
        if (places_[i].written) refuse_shared(places_[i].name, name);
    }
    if (place_count_ == kMostPlaces) throw std::logic_error("more arguments than places");
    places_[place_count_++] = {name, view.data, false};
}

void Checker::claim(std::string_view name, const TensorView& view, std::string_view from_name) {
    for (int i = 0; i < place_count_; ++i) {
        if (places_[i].data != view.data) continue;
        if (places_[i].name != name && places_[i].name != from_name)
            refuse_shared(name, places_[i].name);
        places_[i].written = true;
    }
}

void Checker::written(std::string_view name, const TensorView& view) {
    carried(name, view, name, view);
}

void Checker::carried(std::string_view name, const TensorView& view, std::string_view from_name,
                      const TensorView& from) {
    no_overlap(name, view);
    if (is_empty(view)) return;
    bool same = present(from) && view.dtype == from.dtype;
    for (int i = 0; same && i < view.ndim; ++i) same = view.stride[i] == from.stride[i];
    claim(name, view, same ? from_name : name);
}

void Checker::refuse_shared(std::string_view name, std::string_view other) const {
    fail(name, std::string("not share memory with ").append(other), "the same address");
}

void Checker::output(std::string_view name, const TensorView& view,
                     std::initializer_list<Axis> axes) {
    input(name, view, axes);
    written(name, view);
}

void Checker::optional_output(std::string_view name, const TensorView& view,
                              std::initializer_list<Axis> axes) {
    if (present(view)) output(name, view, axes);
}

void Checker::optional_carried(std::string_view name, const TensorView& view,
                               std::initializer_list<Axis> axes, std::string_view from_name,
                               const TensorView& from) {
    if (!present(view)) return;
    input(name, view, axes);
    carried(name, view, from_name, from);
}

void Checker::contiguous(std::string_view name, const TensorView& view) const {
    if (is_empty(view)) return;
    std::int64_t wanted = 1;
    for (int i = view.ndim - 1; i >= 0; --i) {
        if (view.shape[i] > 1 && view.stride[i] != wanted)
            fail(name, "be contiguous",
                 "stride " + std::to_string(view.stride[i]) + " along axis " + std::to_string(i));
        wanted *= view.shape[i];
    }
}

}  // namespace ssm
