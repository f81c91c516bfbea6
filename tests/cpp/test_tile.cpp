// Rectangles of tensors in and out of tiles: every element at its place, and nothing beside them.
// Judge: the definition in the header, element by element. Values are small integers, which every
// type holds: rounding has its own tests.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/tile.h"

namespace {

using ssm::DType;
using ssm::cpu::SSM_ISA::Plane;

int failures = 0;

void check(bool good, const char* what, DType dtype, std::size_t compute, const Plane& plane,
           std::int64_t rows, std::int64_t columns) {
    if (good || ++failures > 20) return;
    std::fprintf(stderr, "FAILED: %s, type %d, %zu bytes, %d x %d, strides %d and %d\n", what,
                 static_cast<int>(dtype), compute, static_cast<int>(rows),
                 static_cast<int>(columns), static_cast<int>(plane.row_stride),
                 static_cast<int>(plane.column_stride));
}

int value_at(std::int64_t row, std::int64_t column) {
    return static_cast<int>((row * 67 + column * 5 + row * column) % 251) - 125;
}

/// The bits of a small integer in a type, and how many bytes they take.
std::uint64_t encode(DType dtype, int value) {
    const auto bits = [](auto number) {
        std::uint64_t result = 0;
        std::memcpy(&result, &number, sizeof number);
        return result;
    };
    if (dtype == DType::f64) return bits(static_cast<double>(value));
    const std::uint64_t single = bits(static_cast<float>(value));
    if (dtype == DType::f32) return single;
    if (dtype == DType::bf16) return single >> 16;
    if (value == 0) return 0;
    const int size = std::abs(value), exponent = std::ilogb(size);
    return (value < 0 ? 0x8000u : 0u) + static_cast<unsigned>((exponent + 15) << 10) +
           (static_cast<unsigned>(size << (10 - exponent)) & 0x3ffu);
}
std::size_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

constexpr int kNobody = 77;  // around the rectangles

template <class T>
void check_rectangle(DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t row_stride,
                     std::int64_t column_stride) {
    const std::size_t size = bytes_of(dtype), margin = 64;
    const std::int64_t extent = rows * row_stride + columns * column_stride;
    std::vector<unsigned char> tensor(2 * margin + size * static_cast<std::size_t>(extent + 1));
    const auto place = [&](std::int64_t row, std::int64_t column) {
        return margin + size * static_cast<std::size_t>(row * row_stride + column * column_stride);
    };
    std::memset(tensor.data(), kNobody, tensor.size());
    const std::vector<unsigned char> blank = tensor;
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = 0; c < columns; ++c) {
            const std::uint64_t bits = encode(dtype, value_at(r, c));
            std::memcpy(tensor.data() + place(r, c), &bits, size);
        }

    const std::int64_t pitch = columns + 3, first = 16;
    const Plane plane{tensor.data() + margin, dtype, row_stride, column_stride};
    std::vector<T> tile(static_cast<std::size_t>(rows * pitch + 2 * first), T(kNobody));
    std::vector<T> expected = tile;
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = 0; c < columns; ++c)
            expected[static_cast<std::size_t>(first + r * pitch + c)] =
                static_cast<T>(value_at(r, c));
    ssm::cpu::SSM_ISA::load_tile(tile.data() + first, pitch, plane, rows, columns);
    check(tile == expected, "load_tile", dtype, sizeof(T), plane, rows, columns);

    std::vector<unsigned char> stored = blank;
    const Plane target{stored.data() + margin, dtype, row_stride, column_stride};
    ssm::cpu::SSM_ISA::store_tile(target, expected.data() + first, pitch, rows, columns);
    check(stored == tensor, "store_tile", dtype, sizeof(T), plane, rows, columns);
}

template <class T>
void check_type(DType dtype) {
    for (std::int64_t rows = 0; rows <= 40; ++rows)
        for (std::int64_t columns = 0; columns <= 40; ++columns) {
            check_rectangle<T>(dtype, rows, columns, columns + 1, 1);
            check_rectangle<T>(dtype, rows, columns, 1, rows + 1);
            check_rectangle<T>(dtype, rows, columns, 2, 2 * rows + 1);
        }
    // More than one block of lines that are converted.
    check_rectangle<T>(dtype, 101, 57, 1, 128);
    check_rectangle<T>(dtype, 57, 101, 128, 1);
}

}  // namespace

int main() {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
        check_type<float>(dtype);
        check_type<double>(dtype);
    }
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
