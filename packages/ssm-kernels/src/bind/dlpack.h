// The part of the DLPack 1.x ABI that the bindings read
// (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace ssm::dlpack {

struct Device {
    std::int32_t type;  // 1 CPU, 2 CUDA
    std::int32_t id;
};

struct DataType {
    std::uint8_t code;  // 0 int, 1 unsigned, 2 float, 4 bfloat, 6 bool
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // elements; may be null for a dense row-major tensor
    std::uint64_t byte_offset;
};

struct Version {
    std::uint32_t major;
    std::uint32_t minor;
};

/// What a tensor type offers under `__dlpack_c_exchange_api__`. Only the borrowing entry is called.
struct ExchangeApi {
    Version version;
    ExchangeApi* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*borrow_from_object)(void* object,
                              Tensor* out);  // 0 on success, else a Python error is set
    int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

}  // namespace ssm::dlpack
