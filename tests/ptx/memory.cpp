// Loads, stores and copies. Addresses of global memory and of parameters are those of the host.
// PTX ISA 9.0, section 9.7.9.
#include "machine.h"

namespace ptx {

namespace {

/// Where a lane's elements lie; the address is the operand `place`.
template <bool kShared>
char* elements(Warp& warp, const Instruction& in, int place, int count, int lane) {
    const std::uint64_t address = warp.operand(in, place)[lane] + in.offset;
    const int bytes = in.bytes * count;
    if constexpr (kShared) return warp.shared(address, bytes, in);
    if (address < 1 << 16) fault("no memory there: " + in.text);
    if (address % bytes != 0) fault("not aligned: " + in.text);
    return reinterpret_cast<char*>(address);
}

template <bool kShared>
void load(Warp& warp, const Instruction& in) {
    const int count = in.first, unused = 64 - 8 * in.bytes;
    warp.for_active([&](int lane) {
        const char* const from = elements<kShared>(warp, in, count, count, lane);
        for (int i = 0; i < count; ++i) {
            std::uint64_t bits = 0;
            std::memcpy(&bits, from + i * in.bytes, in.bytes);
            if (in.is_signed) bits = static_cast<std::int64_t>(bits << unused) >> unused;
            warp.operand(in, i)[lane] = bits;
        }
    });
}

template <bool kShared>
void store(Warp& warp, const Instruction& in) {
    const int count = static_cast<int>(in.operands.size()) - 1;
    warp.for_active([&](int lane) {
        char* const to = elements<kShared>(warp, in, 0, count, lane);
        for (int i = 0; i < count; ++i)
            std::memcpy(to + i * in.bytes, warp.operand(in, i + 1) + lane, in.bytes);
    });
}

/// cp.async of 16 bytes, of which the last operand says how many exist. They arrive when they are
/// waited for, and not before.
void begin_copy(Warp& warp, const Instruction& in) {
    warp.for_active([&](int lane) {
        const auto to = static_cast<std::uint32_t>(warp.operand(in, 0)[lane] + in.offset);
        const auto from = reinterpret_cast<const char*>(warp.operand(in, 1)[lane]);
        const bool is_partial = in.operands.size() > 3;
        const auto count = is_partial ? static_cast<std::uint32_t>(warp.operand(in, 3)[lane]) : 16;
        if (count != 0 && count != 16) fault("a copy of a part: " + in.text);
        if (count != 0 && reinterpret_cast<std::uint64_t>(from) % 16 != 0)
            fault("not aligned: " + in.text);
        std::memset(warp.shared(to, 16, in), 0xff, 16);
        warp.copies[lane].push_back({to, from, count == 0, warp.copy_group[lane]});
    });
}

/// Ends the copies of all groups but the last `pending` ones.
void finish_copies(Warp& warp, const Instruction& in, int lane, int pending) {
    std::erase_if(warp.copies[lane], [&](const Copy& copy) {
        if (copy.group >= warp.copy_group[lane] - pending) return false;
        char* const to = warp.shared(copy.to, 16, in);
        copy.is_zero ? std::memset(to, 0, 16) : std::memcpy(to, copy.from, 16);
        return true;
    });
}

void commit_copies(Warp& warp, const Instruction&) {
    warp.for_active([&](int lane) { ++warp.copy_group[lane]; });
}
void wait_for_group(Warp& warp, const Instruction& in) {
    const auto pending = static_cast<int>(warp.common(in, 0));
    warp.for_active([&](int lane) { finish_copies(warp, in, lane, pending); });
}
void wait_for_all(Warp& warp, const Instruction& in) {
    commit_copies(warp, in);
    warp.for_active([&](int lane) { finish_copies(warp, in, lane, 0); });
}

void nothing(Warp&, const Instruction&) {}

/// What a kernel does that was started where it cannot run.
void trap(Warp& warp, const Instruction&) { fault("a trap in " + warp.block.launch.kernel.name); }

}  // namespace

bool know_memory(const std::string& opcode, Instruction& in) {
    const bool is_load = opcode.starts_with("ld.");
    if (is_load || opcode.starts_with("st.")) {
        const std::string type = opcode.substr(opcode.rfind('.') + 1);
        in.bytes = std::stoi(type.substr(1)) / 8;
        in.is_signed = type[0] == 's';
        const bool shared = opcode.find(".shared") != std::string::npos;
        in.execute =
            is_load ? (shared ? load<true> : load<false>) : (shared ? store<true> : store<false>);
    } else if (opcode == "cp.async.cg.shared.global") {
        in.execute = begin_copy;
    } else if (opcode == "cp.async.commit_group") {
        in.execute = commit_copies;
    } else if (opcode == "cp.async.wait_group") {
        in.execute = wait_for_group;
    } else if (opcode == "cp.async.wait_all") {
        in.execute = wait_for_all;
    } else if (opcode == "prefetch.global.L1" || opcode == "fence.proxy.async.shared::cta") {
        in.execute = nothing;
    } else if (opcode == "trap") {
        in.execute = trap;
    } else {
        return false;
    }
    return true;
}

}  // namespace ptx
