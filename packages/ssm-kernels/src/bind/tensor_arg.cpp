#include "tensor_arg.h"

#include "../op/check.h"
#include "../op/huge_pages.h"
#include "dlpack.h"

namespace ssm::bind {

namespace {

DType dtype_of(std::uint8_t code, std::uint8_t bits) {
    if (code == 2)
        return bits == 64   ? DType::f64
               : bits == 32 ? DType::f32
               : bits == 16 ? DType::f16
                            : DType::other;
    if (code == 4 && bits == 16) return DType::bf16;
    if (code == 0)
        return bits == 64   ? DType::i64
               : bits == 32 ? DType::i32
               : bits == 8  ? DType::i8
                            : DType::other;
    if (code == 1 && bits == 8) return DType::u8;
    return DType::other;
}

Device device_of(std::int32_t type, std::int32_t id) {
    return {type == 1 ? DeviceType::cpu : type == 2 ? DeviceType::cuda : DeviceType::other, id};
}

bool fill(TensorView& view, const dlpack::Tensor& tensor) {
    if (tensor.ndim > kMaxDims) return false;
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view.dtype =
        tensor.dtype.lanes == 1 ? dtype_of(tensor.dtype.code, tensor.dtype.bits) : DType::other;
    view.device = device_of(tensor.device.type, tensor.device.id);
    view.ndim = tensor.ndim;
    std::int64_t dense = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
        view.shape[i] = tensor.shape[i];
        view.stride[i] = tensor.strides != nullptr ? tensor.strides[i] : dense;
        dense *= tensor.shape[i];
    }
    return true;
}

// The exchange tables of the last types seen: a model passes tensors and parameters. Per thread, so
// that nothing is locked; a reference keeps a type's address from being used again.
struct CachedApi {
    PyTypeObject* type = nullptr;
    const dlpack::ExchangeApi* api = nullptr;
};
constexpr std::size_t kCachedTypes = 4;
thread_local CachedApi cached[kCachedTypes];
thread_local std::size_t oldest = 0;

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
    for (const CachedApi& entry : cached)
        if (entry.type == type) return entry.api;
    PyObject* capsule =
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    if (capsule == nullptr) {
        PyErr_Clear();
        return nullptr;
    }
    auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
    Py_DECREF(capsule);
    PyErr_Clear();
    while (api != nullptr && api->version.major > 1) api = api->previous;
    if (api == nullptr || api->version.major != 1 || api->borrow_from_object == nullptr)
        return nullptr;
    Py_INCREF(type);
    Py_XDECREF(cached[oldest].type);
    cached[oldest] = {type, api};
    oldest = (oldest + 1) % kCachedTypes;
    return api;
}

template <class Array>
bool borrow_ndarray(nb::handle object, TensorArg& arg, Array& held) {
    if (!nb::try_cast<Array>(object, held, false) || !held.is_valid()) return false;
    if (held.ndim() > kMaxDims) return false;
    arg.view.data = const_cast<void*>(static_cast<const void*>(held.data()));
    arg.view.dtype =
        held.dtype().lanes == 1 ? dtype_of(held.dtype().code, held.dtype().bits) : DType::other;
    arg.view.device = device_of(held.device_type(), held.device_id());
    arg.view.ndim = static_cast<int>(held.ndim());
    for (int i = 0; i < arg.view.ndim; ++i) {
        arg.view.shape[i] = static_cast<std::int64_t>(held.shape(static_cast<std::size_t>(i)));
        arg.view.stride[i] = held.stride(static_cast<std::size_t>(i));
    }
    return true;
}

// torch negates some views only when they are read, which its DLPack interfaces do not tell. It
// makes such views of the imaginary parts of complex numbers, so all their strides are even; to ask
// every tensor would cost as much as a small kernel.
bool is_lazily_negated(nb::handle object, const TensorView& view) {
    for (int i = 0; i < view.ndim; ++i)
        if (view.shape[i] > 1 && view.stride[i] % 2 != 0) return false;
    PyObject* answer = PyObject_CallMethod(object.ptr(), "is_neg", nullptr);
    const bool negated = answer == Py_True;
    Py_XDECREF(answer);
    PyErr_Clear();  // other arrays have no such method
    return negated;
}

void prefer_huge_pages(const TensorView& view) {
    std::int64_t count = 1, span = 1;
    for (int i = 0; i < view.ndim; ++i) {
        count *= view.shape[i];
        span += (view.shape[i] - 1) * view.stride[i];
    }
    if (view.device.type != DeviceType::cpu || span != count) return;
    ssm::prefer_huge_pages(view.data, static_cast<std::size_t>(count * element_bytes(view.dtype)));
}

}  // namespace

bool borrow(nb::handle object, TensorArg& arg, bool writable) noexcept {
    arg.object = object;
    arg.is_tensor = true;
    if (object.is_none()) return true;
    if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
        dlpack::Tensor tensor{};
        if (api->borrow_from_object(object.ptr(), &tensor) == 0 && fill(arg.view, tensor)) {
            arg.is_tensor = !is_lazily_negated(object, arg.view);
            if (writable) prefer_huge_pages(arg.view);
            return arg.is_tensor;
        }
        PyErr_Clear();
    }
    try {
        arg.is_tensor = (writable ? borrow_ndarray(object, arg, arg.held_output)
                                  : borrow_ndarray(object, arg, arg.held_input)) &&
                        !is_lazily_negated(object, arg.view);
    } catch (...) {
        PyErr_Clear();
        arg.is_tensor = false;
    }
    if (writable && arg.is_tensor) prefer_huge_pages(arg.view);
    return arg.is_tensor;
}

Exec settings(const char* op, int num_threads, std::intptr_t stream, const Output& workspace) {
    const TensorView memory = view(op, "workspace", workspace);
    Exec exec{.num_threads = num_threads, .stream = stream};
    if (!present(memory)) return exec;
    Checker(op, memory.device).contiguous("workspace", memory);
    exec.workspace = memory.data;
    exec.workspace_bytes = element_bytes(memory.dtype);
    for (int axis = 0; axis < memory.ndim; ++axis) exec.workspace_bytes *= memory.shape[axis];
    return exec;
}

/// What an array says when it is asked for its memory; nothing if it gives it, or is no array. A
/// demand to stop, or the lack of memory, stays what it is.
static std::string refusal_of(nb::handle object, const TensorView& view) {
    if (!nb::hasattr(object, "__dlpack__")) return "";
    if (is_lazily_negated(object, view)) return ": a lazily negated view, without resolve_neg()";
    try {
        object.attr("__dlpack__")();
    } catch (const nb::python_error& error) {
        if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw;
        return std::string(": ") + nb::str(error.value()).c_str();
    }
    return "";
}

void fail_type(const char* op, const char* name, const TensorArg& arg, bool writable) {
    const nb::gil_scoped_acquire locked;  // settings() is called without
    const std::string type = nb::str(arg.object.type().attr("__name__")).c_str();
    throw nb::type_error((std::string(op) + ": " + name + " must be " +
                          (writable ? "a writable array or tensor" : "an array or tensor") +
                          " with DLPack and at most 6 axes, got " + type +
                          refusal_of(arg.object, arg.view))
                             .c_str());
}

}  // namespace ssm::bind
