// From pairs of steps and from channels to the gradients of the step sizes of one head in a piece.
// Nothing is found as a difference of sums: behind a large step size it would lose small gradients.
#pragma once

#include "ssd_chunk_scan_adjoint.cuh"

namespace ssm::cuda {

/// What the accumulators of pairs of steps, 4 x 4 per thread, are in shared memory: those of the
/// blocks of 16 x 16 pairs on the diagonal and below it, which steps reach steps before them in. A
/// warp has 16 rows of a tile and half of its columns.
struct SsdLowerBlocks {
    static constexpr int kSide = 16, kRows = kSsdTile / kSide;
    static constexpr int kSize = kRows * (kRows + 1) / 2 * kSide * kSide;

    /// Whether the accumulators [n] of a thread are of such a block.
    static SSM_DEVICE bool has(int thread, int n) {
        const int warp = thread / kWarp;
        return warp / kRows * (kRows / 2) + n / 2 <= warp % kRows;
    }
    /// The place of accumulator [n][i].
    static SSM_DEVICE int place(int thread, int n, int i) {
        const int warp = thread / kWarp, row = warp % kRows;
        const int block = row * (row + 1) / 2 + warp / kRows * (kRows / 2);
        return block * kSide * kSide + thread % kWarp + (4 * n + i) * kWarp;
    }
};

/// The two numbers that get(registers) refers to become their sums over four lanes.
template <class Block, class Get>
SSM_DEVICE void sum_ssd_rows(Block& block, Get&& get) {
    SSM_UNROLL
    for (int half = 0; half < 2; ++half)
        block.template sum_lanes<4>([=](auto& r) -> auto& { return get(r)[half]; });
}

/// Sums in shared memory from `kFirst` on. W = <dY, X> S decay, for pairs of a step and an earlier
/// one; columns do not have the step sizes in them, rows and near pairs do. A warp has 16 rows of a
/// tile and half of its columns.
template <int kFirst, int kWarps>
struct SsdHeadSums {
    static constexpr int kBlock = 16, kBlocks = kSsdTile / kBlock;
    static constexpr int kNearRow = kBlock + 1;
    static constexpr int kRows = kFirst;  // of W left of the blocks of the diagonal, two halves
    static constexpr int kColumns = kRows + 2 * kSsdTile;          // of W, per block of rows
    static constexpr int kNear = kColumns + kBlocks * kSsdTile;    // W in blocks of the diagonal
    static constexpr int kDiagonal = kNear + kSsdTile * kNearRow;  // W of a step and itself
    static constexpr int kOfH = kDiagonal + kSsdTile;              // <dY, C H>, two halves
    static constexpr int kOfdH = kOfH + 2 * kSsdTile;              // <X, B dH>, two halves
    static constexpr int kThrough = kOfdH + 2 * kSsdTile;          // <H, dH>, one sum per warp
    static constexpr int kCrossing = kThrough + kWarps;            // W from before a step to it on
    static constexpr int kFromEnd = kCrossing + kSsdTile;          // e <dY, C H> from a step on
    static constexpr int kFromBegin = kFromEnd + kSsdTile;         // w <X, B dH> before a step
    static constexpr int kEnd = kFromBegin + kSsdTile;

    static SSM_DEVICE int near(int to, int from) { return kNear + to * kNearRow + from % kBlock; }

    template <class Block, class Real>
    static SSM_DEVICE void add(Block& block, int place, Real value, bool adds) {
        block.write(place, adds ? block.read(place) + value : value);
    }

    /// Writes what the lanes of a warp have summed of one slab of channels: over pairs of steps.
    template <class Block, class Registers>
    static SSM_DEVICE void write_pairs(Block& block, int thread, bool adds, const Registers& r) {
        const int warp = thread / kWarp, lane = thread % kWarp, value = lane / 4;
        const int half = warp / kBlocks;
        const int column = half * (kSsdTile / 2) + value / 2 * 8 + lane % 4 * 2 + value % 2;
        add(block, kColumns + warp % kBlocks * kSsdTile + column, r.columns[0], adds);
        write_rows(block, thread, kRows, adds, r.rows);
    }
    /// And over channels.
    template <class Block, class Registers>
    static SSM_DEVICE void write_channels(Block& block, int thread, bool adds, const Registers& r) {
        if (thread % kWarp == 0) add(block, kThrough + thread / kWarp, r.through, adds);
        write_rows(block, thread, kOfH, adds, r.of_H);
        write_rows(block, thread, kOfdH, adds, r.of_dH);
    }
    template <class Block, class Real>
    static SSM_DEVICE void write_rows(Block& block, int thread, int to, bool adds,
                                      const Real (&rows)[2]) {
        const int warp = thread / kWarp, lane = thread % kWarp;
        const int place = to + warp / kBlocks * kSsdTile + warp % kBlocks * kBlock + lane / 4;
        if (lane % 4 != 0) return;
        add(block, place, rows[0], adds);
        add(block, place + 8, rows[1], adds);
    }

    template <class Block>
    static SSM_DEVICE auto halves(Block& block, int place) {
        return block.read(place) + block.read(place + kSsdTile);
    }

    /// A quarter of the sum of W over the steps from step thread / 4 on and the steps before it.
    template <class Block>
    static SSM_DEVICE auto crossing(Block& block, int thread) {
        const int step = thread / 4, quarter = thread % 4, own = step / kBlock;
        typename Block::RealType sum = 0;
        SSM_UNROLL_TWICE
        for (int j = quarter * kBlock; j < (quarter + 1) * kBlock; ++j) {
            if (j >= step) break;
            typename Block::RealType column = 0;
            for (int below = own + 1; below < kBlocks; ++below)
                column += block.read(kColumns + below * kSsdTile + j);
            sum += column * block.read(SsdDecays::kStep + j);
        }
        constexpr int kShare = kBlock / 4;
        for (int i = own * kBlock + quarter * kShare; i < own * kBlock + (quarter + 1) * kShare;
             ++i) {
            if (i < step) continue;
            sum += halves(block, kRows + i);
            for (int j = own * kBlock; j < step; ++j) sum += block.read(near(i, j));
        }
        return sum;
    }

    /// The sums from the steps to the last one, and up to them from the first, by one warp.
    template <class Block, class Warp>
    static SSM_DEVICE void sum_along(Block& block, Warp& warp) {
        using Real = typename Block::RealType;
        struct Sums {
            double later[2], earlier[2];  // of two steps, from the end and from the begin
            double upto_later, upto_earlier;
        };
        PerLane<Sums> lanes;
        warp.each([&](int lane, auto&) {
            Sums& sums = lanes(lane);
            SSM_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int late = kSsdTile - 1 - 2 * lane - i, early = 2 * lane + i;
                sums.later[i] = block.read(kSsdInto + late) * halves(block, kOfH + late);
                sums.earlier[i] =
                    block.read(SsdDecays::kLeft + early) * halves(block, kOfdH + early);
            }
            sums.upto_later = sums.later[0] + sums.later[1];
            sums.upto_earlier = sums.earlier[0] + sums.earlier[1];
        });
        warp.prefix_sum([&](int lane) -> double& { return lanes(lane).upto_later; });
        warp.prefix_sum([&](int lane) -> double& { return lanes(lane).upto_earlier; });
        warp.each([&](int lane, auto&) {
            const Sums& sums = lanes(lane);
            const int late = kSsdTile - 1 - 2 * lane, early = 2 * lane;
            const double before = sums.upto_earlier - sums.earlier[1];
            block.write(kFromEnd + late, static_cast<Real>(sums.upto_later - sums.later[1]));
            block.write(kFromEnd + late - 1, static_cast<Real>(sums.upto_later));
            block.write(kFromBegin + early + 1, static_cast<Real>(before));
            block.write(kFromBegin + early, static_cast<Real>(before - sums.earlier[0]));
        });
    }

    /// ddt of a step, and its shares of dA and ddt_bias. The decay of a step stands in what enters
    /// and reaches it or a later step, in what an earlier one leaves or gives to it or a later one,
    /// and in what passes through.
    template <class Block, class Real, class Registers>
    static SSM_DEVICE void finish_step(Block& block, const SsdInputs& in,
                                       const SsdGradients<Real>& out, const SsdPart& part,
                                       const SsdPiece& piece, int step, Registers& r) {
        r.dA = r.dbias = 0;
        if (step >= piece.steps) return;
        const auto offset = [&](const Plane<3>& tensor) {
            return part.row * tensor.stride[0] + (piece.begin + step) * tensor.stride[1] +
                   part.head * tensor.stride[2];
        };
        if (!piece.has(step)) return out.ddt.store(offset(out.ddt), Real(0));
        Real through = 0, direct = block.read(kDiagonal + step);
        SSM_UNROLL
        for (int warp = 0; warp < kWarps; ++warp) through += block.read(kThrough + warp);
        SSM_UNROLL
        for (int rows = 0; rows < kBlocks; ++rows)
            direct += block.read(kColumns + rows * kSsdTile + step);
        const Real exponent = block.read(kCrossing + step) + block.read(kFromEnd + step) +
                              block.read(kFromBegin + step) +
                              block.read(kSsdInto + kSsdTile - 1) * through;
        direct +=
            halves(block, kOfdH + step) * decay_between(block.read(SsdDecays::kHigh + kSsdTile - 1),
                                                        block.read(SsdDecays::kLow + kSsdTile - 1),
                                                        block.read(SsdDecays::kHigh + step),
                                                        block.read(SsdDecays::kLow + step));
        const Real A = in.A.template load<Real>(part.head * in.A.stride[0]);
        Real raw = in.dt.template load<Real>(offset(in.dt));
        if (in.dt_bias) raw += in.dt_bias.template load<Real>(part.head * in.dt_bias.stride[0]);
        const Real size = in.softplus ? softplus(raw) : raw;
        // A clamped step size has no gradient; at the limits themselves it has.
        const bool passes =
            size >= static_cast<Real>(in.dt_low) && size <= static_cast<Real>(in.dt_high);
        const Real slope = in.softplus ? sigmoid(raw) : Real(1);
        r.dbias = passes ? (A * exponent + direct) * slope : Real(0);
        r.dA = exponent * block.read(SsdDecays::kStep + step);
        out.ddt.store(offset(out.ddt), r.dbias);
    }
};

/// The sum over a quarter of the steps of the products of two matrices (step, channel), at `to`:
/// all channels of a quarter, then the next.
template <class Block>
SSM_DEVICE void sum_quarter(Block& block, int thread, const Matrix& left, const Matrix& right,
                            int to) {
    const int channel = thread % kSsdChannels, first = thread / kSsdChannels * (kSsdTile / 4);
    typename Block::RealType sum = 0;
    SSM_UNROLL_TWICE
    for (int step = first; step < first + kSsdTile / 4; ++step)
        sum += widen(block.read_element(left.at(step, channel))) *
               widen(block.read_element(right.at(step, channel)));
    block.write(to + thread, sum);
}

}  // namespace ssm::cuda
