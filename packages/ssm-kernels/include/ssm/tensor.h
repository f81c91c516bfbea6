// Plain data that every operator takes: element types, devices and strided views.
#pragma once

#include <cstdint>

namespace ssm {

enum class DType : std::uint8_t { f64, f32, bf16, f16, i64, i32, i8, u8, other };
enum class DeviceType : std::uint8_t { cpu, cuda, other };

struct Device {
    DeviceType type = DeviceType::cpu;
    std::int32_t index = 0;
};

inline constexpr int kMaxDims = 6;
inline constexpr int kAbsent = -1;

/// A borrowed strided array. Plain data on purpose: a member function here would be emitted by
/// translation units of different instruction sets, and the linker keeps only one of them.
struct TensorView {
    void* data = nullptr;
    DType dtype = DType::f32;
    Device device{};
    int ndim = kAbsent;  // kAbsent: the optional argument was not given
    std::int64_t shape[kMaxDims] = {};
    std::int64_t stride[kMaxDims] = {};  // in elements; 0 repeats, any other value is followed
};

}  // namespace ssm
