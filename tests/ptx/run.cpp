// Executes a launch: block after block, every second one with its warps backwards; of a block every
// warp to its next barrier; of a warp always the lanes that are furthest behind, so that lanes that
// parted meet again.
#include <algorithm>

#include "machine.h"

namespace ptx {

namespace {

std::uint64_t special(const std::string& name, const Warp& warp, int lane) {
    const Launch& launch = warp.block.launch;
    if (name == "%tid.x") return kLanes * warp.index + lane;
    if (name == "%ntid.x") return launch.threads;
    if (name == "%ctaid.x") return warp.block.index;
    if (name == "%nctaid.x") return launch.blocks;
    const auto& all = launch.kernel.parameters;
    const auto found =
        std::find_if(all.begin(), all.end(), [&](auto& p) { return p.name == name; });
    return reinterpret_cast<std::uint64_t>(launch.parameters.data() + found->offset);
}

Warp new_warp(Block& block, int index) {
    const Kernel& kernel = block.launch.kernel;
    Warp warp{.block = block, .index = index};
    warp.registers.resize(kernel.registers * kLanes);
    for (const auto& [bits, at] : kernel.numbers) std::fill_n(warp.lanes_of(at), kLanes, bits);
    return warp;
}

/// Puts a warp at the begin of the kernel, for another block. Registers keep what they had.
void begin(Warp& warp) {
    warp.convoys = {{0, kAllLanes, false}};
    warp.alive = kAllLanes;
    warp.done = false;
    for (auto& copies : warp.copies) copies.clear();
    for (const auto& [name, at] : warp.block.launch.kernel.specials)
        for (int lane = 0; lane < kLanes; ++lane)
            warp.lanes_of(at)[lane] = special(name, warp, lane);
}

/// Takes away the convoy that is furthest behind; the lanes of one that waits cannot go on alone.
Convoy next_convoy(Warp& warp) {
    auto& all = warp.convoys;
    const auto next = std::min_element(all.begin(), all.end(), [](auto& a, auto& b) {
        return a.waits != b.waits ? b.waits : a.at < b.at;
    });
    if (next->waits) {
        std::string places;
        for (const Convoy& convoy : all)
            places += "; " + warp.block.launch.kernel.code[convoy.at].text;
        fault("lanes of a warp wait at different places" + places);
    }
    const Convoy taken = *next;
    all.erase(next);
    return taken;
}

/// Joins the convoys at the place of this one; true if another is behind it and has to go first.
bool meet_others(Warp& warp, Convoy& convoy) {
    bool is_ahead = false;
    std::erase_if(warp.convoys, [&](const Convoy& other) {
        is_ahead |= !other.waits && other.at < convoy.at;
        if (other.at != convoy.at) return false;
        convoy.lanes |= other.lanes;
        return true;
    });
    return is_ahead;
}

std::uint32_t lanes_that_take_part(Warp& warp, const Instruction& in, const Convoy& convoy) {
    if (in.predicate < 0) return convoy.lanes;
    const std::uint64_t* const holds = warp.lanes_of(in.predicate);
    std::uint32_t lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane)
        lanes |= static_cast<std::uint32_t>(holds[lane] & 1) << lane;
    return (in.negated ? ~lanes : lanes) & convoy.lanes;
}

void wait_at_barrier(Warp& warp, const Instruction& in) {
    warp.barrier = static_cast<int>(warp.common(in, 0));
    warp.barrier_threads = in.operands.size() > 1 ? static_cast<std::uint32_t>(warp.common(in, 1))
                                                  : warp.block.launch.threads;
}

/// Executes a warp until it waits at a barrier, or is done.
void advance(Warp& warp) {
    const std::vector<Instruction>& code = warp.block.launch.kernel.code;
    while (!warp.convoys.empty()) {
        Convoy convoy = next_convoy(warp);
        while (convoy.lanes != 0) {
            if (!warp.convoys.empty() && meet_others(warp, convoy)) break;
            const Instruction& in = code[convoy.at];
            const std::uint32_t taking = lanes_that_take_part(warp, in, convoy);
            if (in.kind == Kind::branch) {
                if (taking != convoy.lanes) {
                    if (taking != 0) warp.convoys.push_back({in.target, taking, false});
                    convoy.lanes &= ~taking;
                    ++convoy.at;
                } else {
                    convoy.at = in.target;
                }
                continue;
            }
            if (in.kind == Kind::end) {
                warp.alive &= ~taking;
                convoy.lanes &= ~taking;
            } else if (in.kind == Kind::lanes) {
                warp.active = taking;
                if (taking != 0) in.execute(warp, in);
            } else if (taking != kAllLanes) {
                if (taking != convoy.lanes || warp.alive != kAllLanes)
                    fault("lanes are missing at " + in.text);
                convoy.waits = true;
                break;
            } else if (in.kind == Kind::warp) {
                warp.active = kAllLanes;
                in.execute(warp, in);
            } else {
                wait_at_barrier(warp, in);
                warp.convoys.push_back({convoy.at + 1, convoy.lanes, false});
                return;
            }
            ++convoy.at;
        }
        if (convoy.lanes != 0) warp.convoys.push_back(convoy);
    }
    if (!warp.products.empty()) fault("products that nobody waited for");
    warp.done = true;
}

/// Lets the warps go on that wait at a barrier where all are that it is for.
void open_barriers(std::vector<Warp>& warps) {
    bool any = false;
    constexpr int kBarriers = 16;
    for (int barrier = 0; barrier < kBarriers; ++barrier) {
        std::uint32_t here = 0, wanted = 0;
        for (const Warp& warp : warps)
            if (warp.barrier == barrier) here += kLanes, wanted = warp.barrier_threads;
        if (here == 0 || here != wanted) continue;
        any = true;
        for (Warp& warp : warps)
            if (warp.barrier == barrier) warp.barrier = -1;
    }
    if (!any) fault("barriers that never meet");
}

void run_block(Block& block, std::vector<Warp>& warps) {
    std::fill(block.shared.begin(), block.shared.end(), static_cast<char>(0xff));
    std::vector<Warp*> order;
    for (Warp& warp : warps) begin(warp), order.push_back(&warp);
    if (block.index % 2 != 0) std::reverse(order.begin(), order.end());
    while (true) {
        for (Warp* const warp : order)
            if (!warp->done && warp->barrier < 0) advance(*warp);
        if (std::all_of(warps.begin(), warps.end(), [](auto& warp) { return warp.done; })) return;
        open_barriers(warps);
    }
}

}  // namespace

void run(const Launch& launch) {
    if (launch.threads % kLanes != 0) fault("a block of a part of a warp");
    Block block{launch, 0, std::vector<char>(launch.shared_bytes)};
    std::vector<Warp> warps;
    for (std::uint32_t thread = 0; thread < launch.threads; thread += kLanes)
        warps.push_back(new_warp(block, static_cast<int>(thread / kLanes)));
    for (; block.index < launch.blocks; ++block.index) run_block(block, warps);
}

}  // namespace ptx
