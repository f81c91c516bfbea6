// What the lanes of a warp do together. PTX ISA 9.0, sections 9.7.13 and 9.7.14.
#include <algorithm>

#include "machine.h"

namespace ptx {

namespace {

enum class Shuffle { up, down, across, from };

/// Operands: the value, whether it came from a lane in reach, what is exchanged, a lane or a
/// distance, and the bounds of the reach.
template <Shuffle kHow>
void shuffle(Warp& warp, const Instruction& in) {
    warp.expect_all_lanes(in, in.first + 3);
    std::uint64_t given[kLanes];
    std::copy_n(warp.operand(in, in.first), kLanes, given);
    for (int lane = 0; lane < kLanes; ++lane) {
        const auto by = static_cast<int>(warp.operand(in, in.first + 1)[lane] & 31);
        const auto bounds = static_cast<int>(warp.operand(in, in.first + 2)[lane]);
        const int segment = bounds >> 8 & 31, clamp = bounds & 31;
        const int most = (lane & segment) | (clamp & ~segment);
        int source = 0;
        switch (kHow) {
            case Shuffle::up:
                source = lane - by;
                break;
            case Shuffle::down:
                source = lane + by;
                break;
            case Shuffle::across:
                source = lane ^ by;
                break;
            case Shuffle::from:
                source = (lane & segment) | (by & ~segment);
                break;
        }
        const bool in_reach = kHow == Shuffle::up ? source >= most : source <= most;
        warp.operand(in, 0)[lane] = given[in_reach ? source : lane];
        if (in.first > 1) warp.operand(in, 1)[lane] = in_reach;
    }
}

void ballot(Warp& warp, const Instruction& in) {
    warp.expect_all_lanes(in, 2);
    std::uint64_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= (warp.operand(in, 1)[lane] & 1) << lane;
    std::fill_n(warp.operand(in, 0), kLanes, bits);
}

void meet(Warp& warp, const Instruction& in) { warp.expect_all_lanes(in, 0); }

/// Four matrices of 8 x 8 elements of 16 bits: lane l has the elements 2 (l % 4) and the next of
/// the row l / 4 of each, or of that column. Lane 8 m + r names the row r of the matrix m in
/// memory.
template <bool kStores, bool kTransposed>
void move_matrices(Warp& warp, const Instruction& in) {
    std::uint16_t matrices[4][8][8];
    const auto rows = [&](auto&& move) {
        const int place = kStores ? 0 : 4;
        for (int lane = 0; lane < kLanes; ++lane)
            move(warp.shared(warp.operand(in, place)[lane] + in.offset, 16, in),
                 matrices[lane / 8][lane % 8]);
    };
    if (!kStores) rows([](char* at, auto& row) { std::memcpy(row, at, 16); });
    for (int lane = 0; lane < kLanes; ++lane)
        for (int m = 0; m < 4; ++m) {
            const int other = lane / 4, first = 2 * (lane % 4);
            auto& low = kTransposed ? matrices[m][first][other] : matrices[m][other][first];
            auto& high =
                kTransposed ? matrices[m][first + 1][other] : matrices[m][other][first + 1];
            std::uint64_t& pair = warp.operand(in, m + kStores)[lane];
            if (kStores)
                low = static_cast<std::uint16_t>(pair),
                high = static_cast<std::uint16_t>(pair >> 16);
            else
                pair = low | static_cast<std::uint32_t>(high) << 16;
        }
    if (kStores) rows([](char* at, auto& row) { std::memcpy(at, row, 16); });
}

/// mma.m16n8: D (16 x 8) = A (16 x K) B (K x 8) + C. Operands: four registers of D and of A, two of
/// B, four of C. A register of A or B has kWide neighbours along k: two of 16 bits, or one of tf32.
/// Where they lie: g = lane / 4, t = lane % 4; A at rows g, g + 8 and columns kWide t, that + K /
/// 2; B at rows as A's columns, column g; C and D at rows g, g + 8 and columns 2t, 2t + 1.
template <int kWide, bool kBfloat16>
void multiply(Warp& warp, const Instruction& in) {
    constexpr int kDepth = 8 * kWide;
    float A[16][kDepth], B[kDepth][8], C[16][8];
    const auto element = [](std::uint64_t bits, int i) {
        if (kWide == 1) return from_bits<float>(bits & ~std::uint64_t{0x1fff});
        return widened(bits >> 16 * i & 0xffff, kBfloat16);
    };
    for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < kWide; ++i) {
            for (int r = 0; r < 4; ++r)
                A[g + r % 2 * 8][kWide * t + i + r / 2 * kDepth / 2] =
                    element(warp.operand(in, 4 + r)[lane], i);
            for (int r = 0; r < 2; ++r)
                B[kWide * t + i + r * kDepth / 2][g] = element(warp.operand(in, 8 + r)[lane], i);
        }
        for (int r = 0; r < 4; ++r)
            C[g + r / 2 * 8][2 * t + r % 2] = from_bits<float>(warp.operand(in, 10 + r)[lane]);
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < kDepth; ++k)
            for (int column = 0; column < 8; ++column) C[row][column] += A[row][k] * B[k][column];
    for (int lane = 0; lane < kLanes; ++lane)
        for (int r = 0; r < 4; ++r)
            warp.operand(in, r)[lane] = to_bits(C[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]);
}

}  // namespace

bool know_warp(const std::string& opcode, Instruction& in) {
    using Execute = void (*)(Warp&, const Instruction&);
    static const std::map<std::string, Execute> table = {
        {"bar.warp.sync", meet},
        {"shfl.sync.up.b32", shuffle<Shuffle::up>},
        {"shfl.sync.down.b32", shuffle<Shuffle::down>},
        {"shfl.sync.bfly.b32", shuffle<Shuffle::across>},
        {"shfl.sync.idx.b32", shuffle<Shuffle::from>},
        {"vote.sync.ballot.b32", ballot},
        {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", move_matrices<false, false>},
        {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", move_matrices<false, true>},
        {"stmatrix.sync.aligned.m8n8.x4.shared.b16", move_matrices<true, false>},
        {"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", move_matrices<true, true>},
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", multiply<2, true>},
        {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", multiply<2, false>},
        {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", multiply<1, false>},
    };
    const auto found = table.find(opcode);
    if (found == table.end()) return false;
    in.execute = found->second;
    in.kind = Kind::warp;
    return true;
}

}  // namespace ptx
