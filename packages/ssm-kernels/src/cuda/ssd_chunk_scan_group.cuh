// What the heads of a block share in a tile: S = C B^T, of which each makes an M of its own, and
// the gradients of S, B and C, which are added over the heads:
//   dS = sum of (dY X^T) . decay . step size,
//   dC = sum of e dY H + dS B,  dB = sum of w X dH + dS^T C
#pragma once

#include "ssd_chunk_scan_shape.cuh"

namespace ssm::cuda {

template <class Real, class Matter, int kStates>
struct SsdGroupGradients : SsdGradientShape<Real, Matter, kStates> {
    using Base = SsdGradientShape<Real, Matter, kStates>;
    using Base::B_of, Base::C_of, Base::H_of, Base::dH_of, Base::X_of, Base::dY_of, Base::M_of;
    using Base::first_row, Base::first_column, Base::first_state;
    using Base::in, Base::out, Base::kThreads, Base::kAhead, Base::kStateHalf, Base::kS, Base::kdS;
    using typename Base::Element, typename Base::Registers, typename Base::Lower;
    using typename Base::Sums;

    template <class Block>
    SSM_DEVICE void fetch_slab_of_groups(Block& block, const SsdShare& share, const SsdPiece& piece,
                                         int slab, int thread) const {
        const std::int64_t first = std::int64_t{slab} * kStates, states = in.dstate - first;
        fetch_rows<Element, kStates, kThreads>(block, thread, C_of(), in.C, in.copies_C, share.row,
                                               share.group_C, first, states, piece);
        fetch_rows<Element, kStates, kThreads>(block, thread, B_of(), in.B, in.copies_B, share.row,
                                               share.group_B, first, states, piece);
    }
    template <class Block>
    SSM_DEVICE void fetch_groups(Block& block, const SsdShare& share, const SsdPiece& piece,
                                 int slab) const {
        block.each([&](int thread, Registers&) {
            fetch_slab_of_groups(block, share, piece, slab, fresh(thread));
        });
        Base::arrive(block);
    }

    /// S = C B^T, as far as steps reach steps before them.
    template <class Block>
    SSM_DEVICE void multiply_steps(Block& block, const SsdShare& share,
                                   const SsdPiece& piece) const {
        block.each([&](int, Registers& r) {
            SSM_UNROLL
            for (int i = 0; i < 16; ++i) r.w[i / 4][i % 4] = 0;
        });
        for (int slab = 0; slab < share.slabs; ++slab) {
            if (slab > 0) block.barrier();
            fetch_groups(block, share, piece, slab);
            block.each_warp([&](auto& warp) {
                Base::template multiply_rows<kStates, true>(
                    warp, C_of(), B_of(), [](Registers& r) -> auto& { return r.w; });
            });
        }
        block.each([&](int thread, Registers& r) {
            SSM_UNROLL
            for (int i = 0; i < 16; ++i) {
                if (!Lower::has(thread, i / 4)) continue;
                const int place = Lower::place(thread, i / 4, i % 4);
                block.write(kS + place, r.w[i / 4][i % 4]);
                block.write(kdS + place, 0);
            }
        });
        if (share.slabs > 1) block.barrier();
    }

    /// What the pairs of steps give to a slab of channels. `adds`: to the sums of the slabs before.
    template <class Block>
    SSM_DEVICE void differentiate_pairs(Block& block, bool adds) const {
        block.each([&](int, Registers& r) {
            SSM_UNROLL
            for (int i = 0; i < 16; ++i) r.w[i / 4][i % 4] = 0;
        });
        block.each_warp([&](auto& warp) {
            Base::template multiply_rows<kSsdChannels, true>(
                warp, dY_of(), X_of(), [](Registers& r) -> auto& { return r.w; });
        });
        block.each([&](int thread, Registers& r) {
            weigh_pairs(block, fresh(thread), adds, r);
            if (in.D) sum_quarter(block, thread, dY_of(), X_of(), Base::kdD);
        });
        block.template scatter_sums<8, 8, 4>([](Registers& r) -> Real(&)[8] { return r.columns; });
        sum_ssd_rows(block, [](Registers& r) -> auto& { return r.rows; });
        block.each(
            [&](int thread, Registers& r) { Sums::write_pairs(block, fresh(thread), adds, r); });
    }

    template <class Block>
    SSM_DEVICE void clear_gradients(Block& block) const {
        block.each([&](int, Registers& r) {
            SSM_UNROLL
            for (int i = 0; i < kStates / 4; ++i) r.dB[i / 4][i % 4] = r.dC[i / 4][i % 4] = 0;
        });
    }

    /// dC += (e dY) H and dB += (w X) dH, of one slab of states.
    template <class Block>
    SSM_DEVICE void add_state_gradients(Block& block, const SsdPiece& piece) const {
        block.each_warp([&](auto& warp) {
            if (first_row(warp.index) >= piece.steps) return;
            add_weighed(block, warp, dY_of(), kSsdInto, H_of(),
                        [](Registers& r) -> auto& { return r.dC; });
            add_weighed(block, warp, X_of(), SsdDecays::kLeft, dH_of(),
                        [](Registers& r) -> auto& { return r.dB; });
        });
    }

    /// dC += dS B and dB += dS^T C.
    template <class Block>
    SSM_DEVICE void add_step_gradients(Block& block) const {
        block.each([&](int thread, Registers&) {
            SSM_UNROLL
            for (int n = 0; n < 4; ++n) {
                if (!Lower::has(thread, n)) continue;
                Real ds[4];
                SSM_UNROLL
                for (int i = 0; i < 4; ++i) ds[i] = block.read(kdS + Lower::place(thread, n, i));
                write_M(block, thread, n, ds);
            }
        });
        block.barrier();
        block.each_warp([&](auto& warp) {
            const int row = first_row(warp.index), column = first_state(warp.index);
            PerLane<Fragment<Element>> left, right;
            const auto multiply = [&](const Matrix& other, int k, auto&& get) {
                SSM_UNROLL
                for (int n = 0; n < kStateHalf / 16; ++n) {
                    load_right<true>(warp, other, k, column + n * 16, right);
                    multiply_both(warp, left, right, [&](int lane, int side) -> auto& {
                        return get(warp.registers(lane))[2 * n + side];
                    });
                }
            };
            SSM_UNROLL_BY(kAhead)
            for (int k = 0; k < kSsdTile; k += 16) {
                if (k <= row) {
                    load_left(warp, M_of(), row, k, left);
                    multiply(B_of(), k, [](Registers& r) -> auto& { return r.dC; });
                }
                if (k >= row) {
                    load_left<true>(warp, M_of(), row, k, left);
                    multiply(C_of(), k, [](Registers& r) -> auto& { return r.dB; });
                }
            }
        });
    }

    /// Stores dB and dC of the slab `own` of states.
    template <class Block>
    SSM_DEVICE void store_gradients(Block& block, const SsdShare& share, const SsdPiece& piece,
                                    int own) const {
        block.each([&](int thread, Registers& r) {
            const int warp = thread / kWarp, lane = thread % kWarp;
            const std::int64_t state =
                std::int64_t{own} * kStates + first_state(warp) + lane % 4 * 2;
            const std::int64_t first = share_row(out, share, piece, this->window) * in.dstate;
            const int row = first_row(warp) + lane / 4;
            put_share(in, piece, out.dB + first, row, state, r.dB);
            put_share(in, piece, out.dC + first, row, state, r.dC);
        });
    }

  private:
    /// M from S, to where all warps read it; the gradient of S; and the sums of W over rows and
    /// columns.
    template <class Block>
    SSM_DEVICE void weigh_pairs(Block& block, int thread, bool adds, Registers& r) const {
        const int warp = thread / kWarp, lane = thread % kWarp;
        const int row = first_row(warp), column = first_column(warp);
        SSM_UNROLL
        for (int i = 0; i < 8; ++i) r.columns[i] = 0;
        r.rows[0] = r.rows[1] = 0;
        SSM_UNROLL
        for (int n = 0; n < 4; ++n) {
            if (!Lower::has(thread, n)) continue;
            Real m[4];
            SSM_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int to = row + lane / 4 + i / 2 * 8;
                const int from = column + n * 8 + lane % 4 * 2 + i % 2;
                const Real decay = decay_between(
                    block.read(SsdDecays::kHigh + to), block.read(SsdDecays::kLow + to),
                    block.read(SsdDecays::kHigh + from), block.read(SsdDecays::kLow + from));
                const Real step = block.read(SsdDecays::kStep + from);
                // Chosen, not multiplied by 0: the decay from a later step may be infinite.
                const Real reached = from <= to ? r.w[n][i] * decay : Real(0);
                const int place = Lower::place(thread, n, i);
                const Real s = block.read(kS + place);
                m[i] = from <= to ? s * decay * step : Real(0);
                block.write(kdS + place, block.read(kdS + place) + reached * step);
                const Real product = reached * s;
                if (from == to) Sums::add(block, Sums::kDiagonal + to, product, adds);
                const Real off = from < to ? product : Real(0);
                r.columns[2 * n + i % 2] += off;
                if (column + n / 2 * 16 < row)
                    r.rows[i / 2] += off * step;
                else if (from < to)
                    Sums::add(block, Sums::near(to, from), off * step, adds);
            }
            write_M(block, thread, n, m);
        }
    }
    template <class Block>
    SSM_DEVICE void write_M(Block& block, int thread, int n, const Real (&m)[4]) const {
        const int warp = thread / kWarp, row = first_row(warp) + thread % kWarp / 4;
        const int column = first_column(warp) + n * 8 + thread % 4 * 2;
        block.write_pair(M_of().at(row, column), operand<Element>(m[0], m[1]));
        block.write_pair(M_of().at(row + 8, column), operand<Element>(m[2], m[3]));
    }

    template <class Block, class Warp, class Get>
    SSM_DEVICE void add_weighed(Block& block, Warp& warp, const Matrix& left_of, int weights,
                                const Matrix& right_of, Get&& get) const {
        const int row = first_row(warp.index), column = first_state(warp.index);
        PerLane<Fragment<Element>> left, right;
        SSM_UNROLL_BY(kAhead)
        for (int k = 0; k < kSsdChannels; k += 16) {
            load_left(warp, left_of, row, k, left);
            warp.each([&](int lane, Registers&) {
                SSM_UNROLL
                for (int m = 0; m < 4; ++m) {
                    const Real w = block.read(weights + row + lane / 4 + m % 2 * 8);
                    auto& pair = left(lane).of[m];
                    pair = operand<Element>(first_of(pair) * w, second_of(pair) * w);
                }
            });
            SSM_UNROLL
            for (int n = 0; n < kStateHalf / 16; ++n) {
                load_right<true>(warp, right_of, k, column + n * 16, right);
                multiply_both(warp, left, right, [&](int lane, int side) -> auto& {
                    return get(warp.registers(lane))[2 * n + side];
                });
            }
        }
    }
};

}  // namespace ssm::cuda
