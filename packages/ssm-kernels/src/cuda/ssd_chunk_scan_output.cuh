// The output of a slab of channels in a tile once more, and what its gradient gives to the
// channels:
//   Y = M X + e C H + D X,  dX = M^T dY + w B dH + D dY
#pragma once

#include "ssd_chunk_scan_group.cuh"

namespace ssm::cuda {

template <class Real, class Matter, int kStates>
struct SsdOutputGradients : SsdGroupGradients<Real, Matter, kStates> {
    using Base = SsdGroupGradients<Real, Matter, kStates>;
    using Base::B_of, Base::C_of, Base::H_of, Base::dH_of, Base::X_of, Base::dY_of, Base::M_of;
    using Base::first_row, Base::first_column;
    using Base::in, Base::out, Base::kThreads, Base::kAhead;
    using typename Base::Element, typename Base::Registers, typename Base::Sums;

    /// The state that enters the piece and the gradient of the one that leaves it. Inside a tile a
    /// piece begins a sequence.
    template <class Block>
    SSM_DEVICE void fetch_states(Block& block, const SsdShare& share, const SsdPart& part,
                                 const SsdPiece& piece, int slab, int thread) const {
        const std::int64_t first = std::int64_t{slab} * kStates;
        const auto saved = [&](const Matrix& to, const void* from) {
            copy_saved_states<Element, kStates, kThreads>(block, thread, to, in, out,
                                                          static_cast<const Element*>(from),
                                                          share.tile, part, first);
        };
        const auto given = [&](const Matrix& to, const Plane<4>& states) {
            const bool is_given = states && in.state_per_sequence && piece.sequence >= 0;
            fetch_given_states<Element, kStates, kThreads>(block, thread, to, in, states, is_given,
                                                           piece.sequence, part, first);
        };
        piece.starts ? given(H_of(), in.initial_states) : saved(H_of(), out.H);
        share.is_last ? saved(dH_of(), out.dH) : given(dH_of(), out.dfinal_states);
    }

    /// y = C H, v = B dH and <H, dH>; slab 0 of the states stays.
    template <class Block>
    SSM_DEVICE void multiply_states(Block& block, const SsdShare& share, const SsdPart& part,
                                    const SsdPiece& piece) const {
        block.each([&](int, Registers& r) {
            SSM_UNROLL
            for (int i = 0; i < 16; ++i) r.y[i / 4][i % 4] = r.v[i / 4][i % 4] = 0;
            r.through = 0;
        });
        for (int slab = share.slabs - 1; slab >= 0; --slab) {
            if (share.slabs > 1) {
                block.barrier();
                block.each([&](int thread, Registers&) {
                    this->fetch_slab_of_groups(block, share, piece, slab, fresh(thread));
                    if (slab + 1 < share.slabs)
                        fetch_states(block, share, part, piece, slab, thread);
                });
                Base::arrive(block);
            }
            block.each_warp([&](auto& warp) {
                Base::template multiply_rows<kStates, false>(
                    warp, C_of(), H_of(), [](Registers& r) -> auto& { return r.y; });
                Base::template multiply_rows<kStates, false>(
                    warp, B_of(), dH_of(), [](Registers& r) -> auto& { return r.v; });
            });
            block.each([&](int thread, Registers& r) {
                SSM_UNROLL_TWICE
                for (int i = 0; i < kSsdChannels * kStates / 2 / kThreads; ++i) {
                    const int pair = i * kThreads + thread;
                    const int channel = pair / (kStates / 2), column = pair % (kStates / 2) * 2;
                    const auto h = block.read_pair(H_of().at(channel, column));
                    const auto dh = block.read_pair(dH_of().at(channel, column));
                    r.through += first_of(h) * first_of(dh) + second_of(h) * second_of(dh);
                }
            });
        }
    }

    /// The rest of a slab of channels, when its states are multiplied.
    template <class Block>
    SSM_DEVICE void differentiate_channels(Block& block, const SsdShare& share, const SsdPart& part,
                                           const SsdPiece& piece, bool adds) const {
        block.each([&](int thread, Registers& r) { weigh_channels(block, fresh(thread), r); });
        sum_ssd_rows(block, [](Registers& r) -> auto& { return r.of_H; });
        sum_ssd_rows(block, [](Registers& r) -> auto& { return r.of_dH; });
        block.template sum_lanes<kWarp>([](Registers& r) -> Real& { return r.through; });
        block.each(
            [&](int thread, Registers& r) { Sums::write_channels(block, fresh(thread), adds, r); });
        block.barrier();
        block.each_warp([&](auto& warp) { multiply_inside(block, warp); });
        block.each(
            [&](int thread, Registers& r) { store(block, share, part, piece, fresh(thread), r); });
    }

  private:
    /// <dY, C H> and <X, B dH> of the channels of a thread.
    template <class Block>
    SSM_DEVICE void weigh_channels(Block& block, int thread, Registers& r) const {
        const int lane = thread % kWarp, warp = thread / kWarp;
        SSM_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = first_row(warp) + lane / 4 + half * 8;
            r.of_H[half] = r.of_dH[half] = 0;
            SSM_UNROLL
            for (int n = 0; n < 4; ++n) {
                const int channel = first_column(warp) + n * 8 + lane % 4 * 2;
                const auto g = block.read_pair(dY_of().at(row, channel));
                const auto x = block.read_pair(X_of().at(row, channel));
                r.of_H[half] +=
                    r.y[n][2 * half] * first_of(g) + r.y[n][2 * half + 1] * second_of(g);
                r.of_dH[half] +=
                    r.v[n][2 * half] * first_of(x) + r.v[n][2 * half + 1] * second_of(x);
            }
        }
    }

    /// v = w v + M^T dY and, for dz, y = e y + M X.
    template <class Block, class Warp>
    SSM_DEVICE void multiply_inside(Block& block, Warp& warp) const {
        const int row = first_row(warp.index), column = first_column(warp.index);
        warp.each([&](int lane, Registers& r) {
            SSM_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int step = row + lane / 4 + half * 8;
                const Real left = block.read(SsdDecays::kLeft + step);
                const Real into = block.read(kSsdInto + step);
                SSM_UNROLL
                for (int n = 0; n < 4; ++n) {
                    r.v[n][2 * half] *= left, r.v[n][2 * half + 1] *= left;
                    r.y[n][2 * half] *= into, r.y[n][2 * half + 1] *= into;
                }
            }
        });
        PerLane<Fragment<Element>> left, right;
        SSM_UNROLL_BY(kAhead)
        for (int k = 0; k < kSsdTile; k += 16) {
            if (k >= row) {
                load_left<true>(warp, M_of(), row, k, left);
                SSM_UNROLL
                for (int n = 0; n < 2; ++n) {
                    load_right<true>(warp, dY_of(), k, column + n * 16, right);
                    multiply_both(warp, left, right, [&](int lane, int side) -> auto& {
                        return warp.registers(lane).v[2 * n + side];
                    });
                }
            }
            if (in.z && k <= row) {
                load_left(warp, M_of(), row, k, left);
                SSM_UNROLL
                for (int n = 0; n < 2; ++n) {
                    load_right<true>(warp, X_of(), k, column + n * 16, right);
                    multiply_both(warp, left, right, [&](int lane, int side) -> auto& {
                        return warp.registers(lane).y[2 * n + side];
                    });
                }
            }
        }
    }

    /// dX, dz and the share of dD.
    template <class Block>
    SSM_DEVICE void store(Block& block, const SsdShare& share, const SsdPart& part,
                          const SsdPiece& piece, int thread, Registers& r) const {
        const int lane = thread % kWarp, warp = thread / kWarp;
        const int row = first_row(warp) + lane / 4, column = first_column(warp) + lane % 4 * 2;
        SSM_UNROLL
        for (int n = 0; n < 4; ++n) {
            const int channel = column + n * 8;
            const Real D[2] = {block.read(Base::kD + channel), block.read(Base::kD + channel + 1)};
            SSM_UNROLL
            for (int half = 0; half < 2; ++half) {
                const auto g = block.read_pair(dY_of().at(row + half * 8, channel));
                const auto x = block.read_pair(X_of().at(row + half * 8, channel));
                r.v[n][2 * half] += D[0] * first_of(g), r.v[n][2 * half + 1] += D[1] * second_of(g);
                r.y[n][2 * half] += D[0] * first_of(x), r.y[n][2 * half + 1] += D[1] * second_of(x);
            }
        }
        if (in.z) {
            each_channel(part, piece, in.z, row, column, [&](int n, int i, auto element) {
                const Real z = static_cast<Real>(widen(element));
                r.y[n][i] *= silu_slope(z, sigmoid(z));
            });
            each_channel(part, piece, out.dy, row, column, [&](int n, int i, auto element) {
                r.y[n][i] *= static_cast<Real>(widen(element));
            });
            put_channels(part, piece, out.dz, out.packed_dz, row, column, r.y);
        }
        put_channels(part, piece, out.dX, out.packed_dX, row, column, r.v);
        if (in.D && thread < part.channels) {
            Real& dD =
                out.dD[((share.row * out.tiles + share.tile) * in.heads + part.head) * in.headdim +
                       part.first_channel + thread];
            Real sum = 0;
            SSM_UNROLL
            for (int quarter = 0; quarter < 4; ++quarter)
                sum += block.read(Base::kdD + quarter * kSsdChannels + thread);
            dD = share.is_first ? sum : dD + sum;
        }
    }
};

}  // namespace ssm::cuda
