// A machine that executes PTX, what nvcc makes of a kernel, 32 lanes at a time: tests run the code
// of the device on it where there is no GPU.
//
// It is stricter than a GPU. Errors are: an access that is not aligned, or outside of shared
// memory; lanes of a warp that wait at different places; barriers that never meet; an operand of a
// product that changes before the product was waited for. Shared memory begins as NaN, and so is
// there what a thread has begun to copy and not waited for. What a GPU has and this machine has
// not: time, what warps see of each other between barriers, and its rounding of exponentials and of
// products of matrices.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr std::uint32_t kAllLanes = 0xffffffffu;
/// Where the shared memory of a block begins, as on Hopper.
constexpr std::uint32_t kSharedBase = 1024;

[[noreturn]] inline void fault(const std::string& what) { throw std::logic_error("PTX: " + what); }

struct Warp;
struct Instruction;

/// What the scheduler has to know: an instruction of each lane, or one of all lanes of a warp
/// together, a barrier, a branch or the end.
enum class Kind { lanes, warp, barrier, branch, end };

struct Instruction {
    void (*execute)(Warp&, const Instruction&) = nullptr;
    Kind kind = Kind::lanes;
    std::vector<int> operands;  // registers in the order of the text; numbers are registers too
    int first = 0;              // how many of them are in the first operand
    std::int64_t offset = 0;    // of the address
    int bytes = 0;              // of one element in memory
    bool is_signed = false;
    int predicate = -1;
    bool negated = false;
    int target = -1;
    std::string text;
};

struct Parameter {
    std::string name;
    std::size_t bytes, offset;
};

struct Kernel {
    std::string name;
    std::string text;    // until it is parsed
    std::string shared;  // the name of the shared memory
    std::vector<Parameter> parameters;
    std::size_t parameter_bytes = 0;
    std::vector<Instruction> code;
    std::uint32_t most_threads = 1024;  // of a block
    int registers = 0;
    std::map<std::uint64_t, int> numbers;  // registers that hold what the text spells out
    std::map<std::string, int> specials;   // %tid.x and its like, and addresses of parameters
    bool on_warpgroups = false;            // has products of warpgroups
};

struct Launch {
    const Kernel& kernel;
    std::uint32_t blocks, threads, shared_bytes;
    std::vector<char> parameters;
};

struct Block {
    const Launch& launch;
    std::uint32_t index;
    std::vector<char> shared;
};

/// 16 bytes on their way to shared memory, or as many zeros.
struct Copy {
    std::uint32_t to;
    const char* from;
    bool is_zero;
    int group;
};

/// A product of a warpgroup that is under way: the 16 rows of one warp, 16 deep.
struct Product {
    int group;
    std::vector<int> sums;  // registers
    bool bfloat16;
    bool left_in_registers, right_is_transposed;
    std::vector<float> before =
        {};  // [register][lane], of the first of those that add to each other
    bool follows = false, adds = false;       // adds to the one before it, or to what there was
    std::uint64_t left_at = 0, right_at = 0;  // descriptors
    std::vector<std::uint16_t> left = {}, right = {};  // [row][k] and [column][k]
};

/// Lanes that are at one place of the code.
struct Convoy {
    int at;
    std::uint32_t lanes;
    bool waits;  // for the other lanes of the warp
};

struct Warp {
    Block& block;
    const int index;
    std::vector<std::uint64_t> registers = {};  // of 64 bits, [register][lane]
    std::vector<Convoy> convoys = {};
    std::uint32_t alive = kAllLanes;
    std::uint32_t active = kAllLanes;  // lanes that execute the instruction
    int barrier = -1;                  // where it waits
    std::uint32_t barrier_threads = 0;
    bool done = false;
    std::vector<Copy> copies[kLanes] = {};
    int copy_group[kLanes] = {};
    std::vector<Product> products = {};
    int product_group = 0;

    std::uint64_t* lanes_of(int number) { return registers.data() + kLanes * number; }
    std::uint64_t* operand(const Instruction& in, int place) {
        return lanes_of(in.operands[place]);
    }
    /// What all lanes have.
    std::uint64_t common(const Instruction& in, int place) {
        const std::uint64_t* const values = operand(in, place);
        for (int lane = 1; lane < kLanes; ++lane)
            if (values[lane] != values[0]) fault("lanes differ in an operand of " + in.text);
        return values[0];
    }
    /// For an operand that names the lanes of an instruction.
    void expect_all_lanes(const Instruction& in, int place) {
        if (static_cast<std::uint32_t>(common(in, place)) != kAllLanes)
            fault("not for all lanes: " + in.text);
    }
    char* shared(std::uint64_t address, int bytes, const Instruction& in) {
        const std::uint64_t offset = address - kSharedBase;
        if (offset + bytes > block.launch.shared_bytes)
            fault("outside of shared memory: " + in.text);
        if (address % bytes != 0) fault("not aligned: " + in.text);
        return block.shared.data() + offset;
    }
    template <class Use>
    void for_active(Use&& use) {
        for (int lane = 0; lane < kLanes; ++lane)
            if (active >> lane & 1) use(lane);
    }
};

/// A register as a value: its low bits.
template <class T>
T from_bits(std::uint64_t bits) {
    if constexpr (std::is_same_v<T, bool>)
        return bits & 1;
    else if constexpr (sizeof(T) == 8)
        return std::bit_cast<T>(bits);
    else if constexpr (sizeof(T) == 4)
        return std::bit_cast<T>(static_cast<std::uint32_t>(bits));
    else if constexpr (sizeof(T) == 2)
        return std::bit_cast<T>(static_cast<std::uint16_t>(bits));
    else
        return std::bit_cast<T>(static_cast<std::uint8_t>(bits));
}
template <class T>
std::uint64_t to_bits(T value) {
    if constexpr (std::is_same_v<T, bool>)
        return value;
    else if constexpr (sizeof(T) == 8)
        return std::bit_cast<std::uint64_t>(value);
    else if constexpr (sizeof(T) == 4)
        return std::bit_cast<std::uint32_t>(value);
    else
        return std::bit_cast<std::uint16_t>(value);
}

/// An element of 16 bits as a number.
inline float widened(std::uint64_t bits, bool bfloat16) {
    if (bfloat16) return std::bit_cast<float>(static_cast<std::uint32_t>(bits << 16));
    return static_cast<float>(std::bit_cast<_Float16>(static_cast<std::uint16_t>(bits)));
}

// Each fills in what it knows of an instruction, and says whether it knows it.
bool know_arithmetic(const std::string& opcode, Instruction& in);
bool know_memory(const std::string& opcode, Instruction& in);
bool know_warp(const std::string& opcode, Instruction& in);
bool know_warpgroup(const std::string& opcode, Instruction& in);

/// The kernels of a module, not yet parsed, by name.
std::map<std::string, Kernel> kernels_of(const std::string& module);
void parse(Kernel& kernel);
/// Executes all blocks. Throws std::logic_error at the first fault.
void run(const Launch& launch);

}  // namespace ptx
