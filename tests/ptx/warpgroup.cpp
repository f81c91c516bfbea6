// Products of the four warps of a warpgroup: each computes its 16 rows of 64. They end when they
// are waited for, and not before. PTX ISA 9.0, section 9.7.15.
#include <algorithm>

#include "machine.h"

namespace ptx {

namespace {

constexpr int kDepth = 16, kRows = 16;
/// What sums are while a product adds to them: a NaN that nothing computes.
constexpr std::uint64_t kUnknown = 0x7fc05eed;

/// Where a descriptor finds the element `k` of a row of the left operand, or of a column of the
/// right one: in memory, eighths of 128 bytes are swapped by the number of the 128 bytes. 8 rows
/// follow each other closely, the next 8 after a stride; transposed, that holds for k, and 64
/// neighbours of one k lie together.
std::uint64_t address_by(std::uint64_t descriptor, bool transposed, int row, int k) {
    const auto field = [&](int bit) { return (descriptor >> bit & 0x3fff) << 4; };
    constexpr std::uint64_t kSwizzle128 = 1;
    if (descriptor >> 62 != kSwizzle128 || (descriptor >> 49 & 7) != 0)
        fault("a descriptor of another layout than the swizzle of 128 bytes");
    const std::uint64_t leading = field(16), stride = field(32);
    const std::uint64_t address =
        field(0) + (transposed ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                               : row / 8 * stride + row % 8 * 128 + k * 2);
    return address ^ (address >> 7 & 7) << 4;
}

std::vector<std::uint16_t> read(Warp& warp, const Instruction& in, std::uint64_t descriptor,
                                bool transposed, int first_row, int rows) {
    std::vector<std::uint16_t> elements(rows * kDepth);
    for (int row = 0; row < rows; ++row)
        for (int k = 0; k < kDepth; ++k)
            std::memcpy(&elements[row * kDepth + k],
                        warp.shared(address_by(descriptor, transposed, first_row + row, k), 2, in),
                        2);
    return elements;
}
std::vector<std::uint16_t> read_left(Warp& warp, const Instruction& in, const Product& product) {
    return read(warp, in, product.left_at, false, warp.index % 4 * kRows, kRows);
}
std::vector<std::uint16_t> read_right(Warp& warp, const Instruction& in, const Product& product) {
    return read(warp, in, product.right_at, product.right_is_transposed, 0,
                2 * static_cast<int>(product.sums.size()));
}

/// Operands: the sums; four registers or a descriptor of the left operand; a descriptor of the
/// right one; whether to add; two signs; whether the left one, if in memory, and the right one are
/// transposed.
void begin(Warp& warp, const Instruction& in) {
    const auto sums = in.operands.begin() + in.first;
    const auto last = static_cast<int>(in.operands.size()) - 1;
    Product product{.group = warp.product_group,
                    .sums = {in.operands.begin(), sums},
                    .bfloat16 = in.text.find("bf16") != std::string::npos,
                    .left_in_registers = last - in.first == 8,
                    .right_is_transposed = warp.common(in, last) != 0};
    int next = in.first;
    if (product.left_in_registers) {
        product.left.resize(kRows * kDepth);
        for (int part = 0; part < 4; ++part, ++next)
            for (int lane = 0; lane < kLanes; ++lane) {
                const int row = lane / 4 + part % 2 * 8, k = lane % 4 * 2 + part / 2 * 8;
                const std::uint64_t pair = warp.operand(in, next)[lane];
                product.left[row * kDepth + k] = static_cast<std::uint16_t>(pair);
                product.left[row * kDepth + k + 1] = static_cast<std::uint16_t>(pair >> 16);
            }
    } else {
        product.left_at = warp.common(in, next++);
        product.left = read_left(warp, in, product);
        if (warp.common(in, last - 1) != 0) fault("a transposed left operand: " + in.text);
    }
    product.right_at = warp.common(in, next++);
    product.right = read_right(warp, in, product);
    product.adds = warp.common(in, next++) & 1;
    if (warp.common(in, next) != 1 || warp.common(in, next + 1) != 1)
        fault("a negated operand: " + in.text);
    for (const Product& other : warp.products) product.follows |= other.sums == product.sums;
    if (!product.follows)
        for (const int sum : product.sums)
            for (int lane = 0; lane < kLanes; ++lane) {
                std::uint64_t& value = warp.lanes_of(sum)[lane];
                if (product.adds && from_bits<std::uint32_t>(value) == kUnknown)
                    fault("sums of another product are added to: " + in.text);
                product.before.push_back(from_bits<float>(value));
                value = kUnknown;
            }
    warp.products.push_back(std::move(product));
}

void add(const Product& product, std::vector<float>& sums) {
    const auto numbers = [&](const std::vector<std::uint16_t>& elements) {
        std::vector<float> made;
        for (const std::uint16_t element : elements)
            made.push_back(widened(element, product.bfloat16));
        return made;
    };
    const std::vector<float> left = numbers(product.left), right = numbers(product.right);
    for (int sum = 0; sum < static_cast<int>(product.sums.size()); ++sum)
        for (int lane = 0; lane < kLanes; ++lane) {
            const int row = lane / 4 + sum / 2 % 2 * 8;
            const int column = sum / 4 * 8 + lane % 4 * 2 + sum % 2;
            float& value = sums[sum * kLanes + lane];
            if (!product.adds) value = 0;
            for (int k = 0; k < kDepth; ++k)
                value += left[row * kDepth + k] * right[column * kDepth + k];
        }
}

void commit(Warp& warp, const Instruction&) { ++warp.product_group; }

/// Ends the products of all groups but the last ones, as many as the operand says.
void wait(Warp& warp, const Instruction& in) {
    const int end = warp.product_group - static_cast<int>(warp.common(in, 0));
    std::map<std::vector<int>, std::vector<float>> results;
    std::erase_if(warp.products, [&](const Product& product) {
        if (product.group >= end) return false;
        if (read_right(warp, in, product) != product.right ||
            (!product.left_in_registers && read_left(warp, in, product) != product.left))
            fault("an operand changed before its product was waited for");
        std::vector<float>& sums = results[product.sums];
        if (!product.follows) sums = product.before;
        add(product, sums);
        return true;
    });
    for (auto& [registers, sums] : results) {
        const auto next = std::find_if(warp.products.begin(), warp.products.end(),
                                       [&](auto& other) { return other.sums == registers; });
        if (next != warp.products.end()) {
            next->follows = false;
            next->before = sums;
            continue;
        }
        for (std::size_t sum = 0; sum < registers.size(); ++sum)
            for (int lane = 0; lane < kLanes; ++lane) {
                std::uint64_t& value = warp.lanes_of(registers[sum])[lane];
                if (from_bits<std::uint32_t>(value) != kUnknown)
                    fault("sums changed before their product was waited for");
                value = to_bits(sums[sum * kLanes + lane]);
            }
    }
}

void nothing(Warp&, const Instruction&) {}

}  // namespace

bool know_warpgroup(const std::string& opcode, Instruction& in) {
    if (opcode.starts_with("wgmma.mma_async.sync.aligned.m64n"))
        in.execute = begin;
    else if (opcode == "wgmma.commit_group.sync.aligned")
        in.execute = commit;
    else if (opcode == "wgmma.wait_group.sync.aligned")
        in.execute = wait;
    else if (opcode == "wgmma.fence.sync.aligned")
        in.execute = nothing;
    else
        return false;
    in.kind = Kind::warp;
    return true;
}

}  // namespace ptx
