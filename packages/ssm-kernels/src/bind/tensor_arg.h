// Python arrays as TensorView, without copies: the one place where Python objects become data.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <ssm/device.h>
#include <ssm/tensor.h>

#include <string>

namespace ssm::bind {

namespace nb = nanobind;

/// An argument as it came, and what keeps its memory alive during the call.
struct TensorArg {
    TensorView view{};
    nb::handle object{};
    nb::ndarray<nb::ro> held_input{};
    nb::ndarray<> held_output{};
    bool is_tensor = false;  // false: `object` gives no memory (None counts as an absent array)
};

/// Inputs may be read-only arrays, outputs may not.
struct Input : TensorArg {};
struct Output : TensorArg {};

/// Fills `arg` from `object`; false when it is neither None nor an array whose memory DLPack gives.
bool borrow(nb::handle object, TensorArg& arg, bool writable) noexcept;

[[noreturn]] void fail_type(const char* op, const char* name, const TensorArg& arg, bool writable);

/// The view of an argument, or TypeError `<op>: <name> must be ..., got <type>`.
inline TensorView view(const char* op, const char* name, const Input& arg) {
    if (!arg.is_tensor) fail_type(op, name, arg, false);
    return arg.view;
}
inline TensorView view(const char* op, const char* name, const Output& arg) {
    if (!arg.is_tensor) fail_type(op, name, arg, true);
    return arg.view;
}

/// The settings of a call. `workspace` is any contiguous array of the tensors' device.
Exec settings(const char* op, int num_threads, std::intptr_t stream, const Output& workspace);

}  // namespace ssm::bind

namespace nanobind::detail {

template <>
struct type_caster<ssm::bind::Input> {
    NB_TYPE_CASTER(ssm::bind::Input, const_name("object | None"))
    bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept {
        ssm::bind::borrow(source, value, false);
        return true;
    }
};

template <>
struct type_caster<ssm::bind::Output> {
    NB_TYPE_CASTER(ssm::bind::Output, const_name("object | None"))
    bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept {
        ssm::bind::borrow(source, value, true);
        return true;
    }
};

}  // namespace nanobind::detail
