// Instructions that compute in each lane by itself. PTX ISA 9.0, section 9.7.
#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "machine.h"

namespace ptx {

namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
using Execute = void (*)(Warp&, const Instruction&);
using Table = std::unordered_map<std::string, Execute>;

template <class Function, class Result, class... Operands, std::size_t... kPlaces>
void per_lane(Warp& warp, const Instruction& in, std::index_sequence<kPlaces...>) {
    std::uint64_t* const to = warp.operand(in, 0);
    const std::uint64_t* const from[] = {warp.operand(in, kPlaces + 1)...};
    const auto one = [&](int lane) {
        to[lane] = to_bits<Result>(Function{}(from_bits<Operands>(from[kPlaces][lane])...));
    };
    if (warp.active != kAllLanes) return warp.for_active(one);
    for (int lane = 0; lane < kLanes; ++lane) one(lane);
}

template <class Function, class Result, class... Operands>
Execute with_types(Result (Function::*)(Operands...) const) {
    return [](Warp& warp, const Instruction& in) {
        per_lane<Function, Result, Operands...>(warp, in, std::index_sequence_for<Operands...>{});
    };
}

/// The instruction that computes a function without state, whose arguments say its types.
template <class Function>
Execute of(Function) {
    return with_types(&Function::operator());
}

/// Right by any number of bits: the sign, or zeros, come in.
template <class T>
T shifted_right(T a, u32 by) {
    constexpr u32 kMost = 8 * sizeof(T) - 1;
    return by <= kMost ? a >> by : a >> kMost >> 1;
}

template <class T>
void add_words(Table& table, const std::string& type) {
    table["and" + type] = of([](T a, T b) -> T { return a & b; });
    table["or" + type] = of([](T a, T b) -> T { return a | b; });
    table["xor" + type] = of([](T a, T b) -> T { return a ^ b; });
    table["mov" + type] = table["cvta.to.global" + type] = of([](T a) -> T { return a; });
    table["selp" + type] = of([](T a, T b, bool which) -> T { return which ? a : b; });
}

template <class T>
void add_bits(Table& table, const std::string& type) {
    add_words<T>(table, type);
    table["not" + type] = of([](T a) -> T { return ~a; });
    table["shl" + type] = of([](T a, u32 by) -> T { return by < 8 * sizeof(T) ? a << by : 0; });
    table["clz" + type] = of([](T a) -> u32 { return std::countl_zero(a); });
    table["bfi" + type] = of([](T a, T b, u32 at, u32 count) -> T {
        const T ones = count < 8 * sizeof(T) ? (T(1) << count) - 1 : ~T(0);
        return (b & ~(ones << at)) | (a & ones) << at;
    });
}

/// Comparisons that are false where an operand is NaN.
template <class T>
void add_comparisons(Table& table, const std::string& type) {
    table["setp.eq" + type] = of([](T a, T b) { return a == b; });
    table["setp.ne" + type] = of([](T a, T b) { return a < b || a > b; });
    table["setp.lt" + type] = of([](T a, T b) { return a < b; });
    table["setp.le" + type] = of([](T a, T b) { return a <= b; });
    table["setp.gt" + type] = of([](T a, T b) { return a > b; });
    table["setp.ge" + type] = of([](T a, T b) { return a >= b; });
}

template <class T>
void add_integers(Table& table, const std::string& type) {
    using Unsigned = std::make_unsigned_t<T>;
    add_comparisons<T>(table, type);
    add_words<T>(table, type);
    table["neg" + type] = of([](Unsigned a) -> Unsigned { return -a; });
    table["add" + type] = of([](Unsigned a, Unsigned b) -> Unsigned { return a + b; });
    table["sub" + type] = of([](Unsigned a, Unsigned b) -> Unsigned { return a - b; });
    table["mul.lo" + type] = of([](Unsigned a, Unsigned b) -> Unsigned { return u64{a} * b; });
    table["mad.lo" + type] =
        of([](Unsigned a, Unsigned b, Unsigned c) -> Unsigned { return u64{a} * b + c; });
    table["div" + type] = of([](T a, T b) -> T { return b != 0 ? a / b : T(-1); });
    table["rem" + type] = of([](T a, T b) -> T { return b != 0 ? a % b : a; });
    table["min" + type] = of([](T a, T b) -> T { return a < b ? a : b; });
    table["max" + type] = of([](T a, T b) -> T { return a > b ? a : b; });
    table["shr" + type] = of([](T a, u32 by) -> T { return shifted_right(a, by); });
}

template <class T>
void add_floats(Table& table, const std::string& type) {
    add_comparisons<T>(table, type);
    add_words<std::conditional_t<sizeof(T) == 4, u32, u64>>(table, type);
    for (const std::string& rounded : {type, ".rn" + type}) {
        table["add" + rounded] = of([](T a, T b) -> T { return a + b; });
        table["sub" + rounded] = of([](T a, T b) -> T { return a - b; });
        table["mul" + rounded] = of([](T a, T b) -> T { return a * b; });
        table["div" + rounded] = of([](T a, T b) -> T { return a / b; });
    }
    table["fma.rn" + type] = of([](T a, T b, T c) -> T { return std::fma(a, b, c); });
    table["min" + type] = of([](T a, T b) -> T { return std::fmin(a, b); });
    table["max" + type] = of([](T a, T b) -> T { return std::fmax(a, b); });
    table["neg" + type] = of([](T a) -> T { return -a; });
    table["abs" + type] = of([](T a) -> T { return std::fabs(a); });
    table["rcp.rn" + type] = of([](T a) -> T { return 1 / a; });
    table["sqrt.rn" + type] = of([](T a) -> T { return std::sqrt(a); });
    // True where an operand is NaN.
    table["setp.equ" + type] = of([](T a, T b) { return !(a < b || a > b); });
    table["setp.neu" + type] = of([](T a, T b) { return !(a == b); });
    table["setp.ltu" + type] = of([](T a, T b) { return !(a >= b); });
    table["setp.leu" + type] = of([](T a, T b) { return !(a > b); });
    table["setp.gtu" + type] = of([](T a, T b) { return !(a <= b); });
    table["setp.geu" + type] = of([](T a, T b) { return !(a < b); });
    table["setp.nan" + type] = of([](T a, T b) { return a != a || b != b; });
    table["setp.num" + type] = of([](T a, T b) { return a == a && b == b; });
}

/// A conversion of integers: the source is cut or extended by its own type.
template <class To, class From>
void add_conversion(Table& table, const std::string& to, const std::string& from) {
    // A register is as wide as its declaration, which may be wider than the destination.
    using Wide = std::conditional_t<std::is_signed_v<To>, s64, u64>;
    table["cvt" + to + from] = of([](From a) -> Wide { return static_cast<To>(a); });
}
template <class From>
void add_conversions(Table& table, const std::string& from) {
    add_conversion<u8, From>(table, ".u8", from), add_conversion<s8, From>(table, ".s8", from);
    add_conversion<u16, From>(table, ".u16", from), add_conversion<s16, From>(table, ".s16", from);
    add_conversion<u32, From>(table, ".u32", from), add_conversion<s32, From>(table, ".s32", from);
    add_conversion<u64, From>(table, ".u64", from), add_conversion<s64, From>(table, ".s64", from);
    table["cvt.rn.f32" + from] = of([](From a) -> float { return a; });
}

float added_toward_zero(float a, float b) {
    const double exact = static_cast<double>(a) + b;
    const auto sum = static_cast<float>(exact);
    return std::fabs(sum) > std::fabs(exact) ? std::nextafter(sum, 0.0f) : sum;
}

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }

u16 to_bfloat16(float x) {
    if (x != x) return 0x7fff;
    const auto bits = std::bit_cast<u32>(x);
    return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// To 10 bits behind the point, halves away from zero.
u32 to_tf32(float x) {
    const auto bits = std::bit_cast<u32>(x);
    return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}

Table make_table() {
    Table table;
    add_bits<u16>(table, ".b16"), add_bits<u32>(table, ".b32"), add_bits<u64>(table, ".b64");
    add_integers<u16>(table, ".u16"), add_integers<s16>(table, ".s16");
    add_integers<u32>(table, ".u32"), add_integers<s32>(table, ".s32");
    add_integers<u64>(table, ".u64"), add_integers<s64>(table, ".s64");
    add_floats<float>(table, ".f32"), add_floats<double>(table, ".f64");
    add_words<bool>(table, ".pred");
    table["not.pred"] = of([](bool a) -> bool { return !a; });
    for (const std::string compared : {"setp.eq", "setp.ne"})
        for (const std::string width : {"16", "32", "64"})
            table[compared + ".b" + width] = table[compared + ".u" + width];
    table["bfe.u32"] = of([](u32 a, u32 at, u32 count) -> u32 {
        const u64 ones = (u64{1} << std::min(count & 255, 32u)) - 1;
        return static_cast<u32>(u64{a} >> std::min(at & 255, 32u) & ones);
    });
    table["mul.wide.s16"] = of([](s16 a, s16 b) -> s32 { return s32{a} * b; });
    table["mul.wide.u16"] = of([](u16 a, u16 b) -> u32 { return u32{a} * b; });
    table["mul.wide.s32"] = of([](s32 a, s32 b) -> s64 { return s64{a} * b; });
    table["mul.wide.u32"] = of([](u32 a, u32 b) -> u64 { return u64{a} * b; });
    table["add.rz.f32"] = of([](float a, float b) { return added_toward_zero(a, b); });
    table["ex2.approx.f32"] = of([](float a) -> float { return std::exp2(a); });
    table["ex2.approx.ftz.f32"] = of([](float a) { return flushed(std::exp2(flushed(a))); });
    add_conversions<u8>(table, ".u8"), add_conversions<s8>(table, ".s8");
    add_conversions<u16>(table, ".u16"), add_conversions<s16>(table, ".s16");
    add_conversions<u32>(table, ".u32"), add_conversions<s32>(table, ".s32");
    add_conversions<u64>(table, ".u64"), add_conversions<s64>(table, ".s64");
    table["cvt.rn.f32.f64"] = of([](double a) -> float { return static_cast<float>(a); });
    table["cvt.f64.f32"] = of([](float a) -> double { return a; });
    table["cvt.rni.f32.f32"] = of([](float a) -> float { return std::nearbyint(a); });
    table["cvt.f32.f16"] = of([](u16 a) { return widened(a, false); });
    table["cvt.rn.f16.f32"] =
        of([](float a) { return std::bit_cast<u16>(static_cast<_Float16>(a)); });
    table["cvt.rn.bf16.f32"] = of([](float a) { return to_bfloat16(a); });
    table["cvt.rn.bf16x2.f32"] =
        of([](float a, float b) -> u32 { return u32{to_bfloat16(a)} << 16 | to_bfloat16(b); });
    table["cvt.rna.tf32.f32"] = of([](float a) { return to_tf32(a); });
    return table;
}

/// One register from several, or several from one: the first has the lowest bits.
void pack(Warp& warp, const Instruction& in) {
    const bool unpacks = in.first > 1;
    const int parts = static_cast<int>(in.operands.size()) - 1, width = 8 * in.bytes / parts;
    const std::uint64_t ones = (std::uint64_t{1} << width) - 1;
    warp.for_active([&](int lane) {
        std::uint64_t whole = 0;
        for (int i = 0; i < parts; ++i)
            if (unpacks)
                warp.operand(in, i)[lane] = warp.operand(in, parts)[lane] >> i * width & ones;
            else
                whole |= (warp.operand(in, i + 1)[lane] & ones) << i * width;
        if (!unpacks) warp.operand(in, 0)[lane] = whole;
    });
}

}  // namespace

bool know_arithmetic(const std::string& opcode, Instruction& in) {
    static const Table table = make_table();
    if (opcode.starts_with("mov.b") && in.operands.size() > 2) {
        in.execute = pack;
        in.bytes = std::stoi(opcode.substr(5)) / 8;
        return true;
    }
    const auto found = table.find(opcode);
    if (found == table.end()) return false;
    in.execute = found->second;
    return true;
}

}  // namespace ptx
