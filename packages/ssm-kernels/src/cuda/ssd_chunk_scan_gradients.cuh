// The gradients of the state-space dual scan in a tile, given the state that enters it and the
// gradient of the one that leaves it. A block owns a tile of one row and a slice of the heads that
// share B and C, and adds the gradients of B and C over its heads before they go to memory:
//   dX = M^T dY + w B dH + D dY,  dC = sum of e dY H + dS B,  dB = sum of w X dH + dS^T C,
//   dS = sum of (dY X^T) . decay . step size
#pragma once

#include "ssd_chunk_scan_sums.cuh"

namespace ssm::cuda {

template <class Real, class Matter, int kStates>
struct SsdDifferentiate {
    static constexpr int kThreads = 256;
    static constexpr int kBlocksPerUnit = 1;
    using Element = Matter;

    // Products side by side in a loop: fragments of float32 take twice the registers.
    static constexpr int kAhead = sizeof(Element) == 2 ? 2 : 1;
    // A warp owns 16 steps of its matrices, and half of the columns.
    static constexpr int kRows = kSsdTile / 16;
    static constexpr int kHalf = kSsdTile / 2, kStateHalf = kStates / 2;
    // Places in the memory of matrices: a slab of states of C, B, H and dH, then X, dY and M.
    static constexpr int kAcross = matrix_stride(kStates), kAcrossX = matrix_stride(kSsdChannels);
    static constexpr int kSmall = 4 * kSsdTile * kAcross;
    static constexpr int kMatrices = kSmall + 3 * kSsdTile * kAcrossX;
    // In the other memory, behind the decays: D, sums per step of one head, quarters of the
    // steps' sums of dY X; as accumulators of the threads, S = C B^T and its gradient, as far as
    // steps reach steps before them.
    static constexpr int kD = kSsdDecaysEnd, kSums = kD + kSsdChannels;
    using Sums = SsdHeadSums<kSums, kThreads / kWarp>;
    static constexpr int kdD = Sums::kEnd, kS = kdD + 4 * kSsdChannels;
    using Lower = SsdLowerBlocks;
    static constexpr int kdS = kS + Lower::kSize, kEnd = kdS + Lower::kSize;

    struct Registers {
        Real dB[kStates / 16][4], dC[kStates / 16][4];
        Real w[4][4];           // S, or dY X^T
        Real y[4][4], v[4][4];  // C H, then Y;  B dH, then dX
        Real columns[8], rows[2], of_H[2], of_dH[2], through;
        Real raw[2];     // of the step sizes, in one warp
        Real dA, dbias;  // of a step
    };

    SsdInputs in;
    SsdGradients<Real> out;
    std::int64_t window;

    std::int64_t shared_size() const { return kEnd; }
    SSM_BOTH std::int64_t matrix_size() const { return kMatrices; }

    std::int64_t blocks() const {
        const std::int64_t left = out.tiles - window * out.window_tiles;
        return in.batch * out.slices * (left < out.window_tiles ? left : out.window_tiles);
    }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        SsdShare share = ssd_share(in, out, window, index, kStates);
        std::int64_t begin = std::int64_t{share.tile} * kSsdTile, end = begin + kSsdTile;
        end = end < in.seqlen ? end : in.seqlen;
        while (begin < end) {
            // A walk of its own for every piece: it need not stay in registers.
            const SsdPiece piece = SsdWalk<Real, false>(out, share.row, begin, end).next(block, in);
            begin = piece.begin + piece.steps;
            share.is_last = begin == end;
            differentiate(block, share, piece);
            block.barrier();
            share.is_first = false;
        }
    }

  private:
    static SSM_DEVICE Matrix C_of() { return {0, kAcross}; }
    static SSM_DEVICE Matrix B_of() { return {kSsdTile * kAcross, kAcross}; }
    static SSM_DEVICE Matrix H_of() { return {2 * kSsdTile * kAcross, kAcross}; }
    static SSM_DEVICE Matrix dH_of() { return {3 * kSsdTile * kAcross, kAcross}; }
    static SSM_DEVICE Matrix X_of() { return {kSmall, kAcrossX}; }
    static SSM_DEVICE Matrix dY_of() { return {kSmall + kSsdTile * kAcrossX, kAcrossX}; }
    static SSM_DEVICE Matrix M_of() { return {kSmall + 2 * kSsdTile * kAcrossX, kAcrossX}; }

    static SSM_DEVICE int first_row(int warp) { return warp % kRows * 16; }
    static SSM_DEVICE int first_column(int warp) { return warp / kRows * kHalf; }
    static SSM_DEVICE int first_state(int warp) { return warp / kRows * kStateHalf; }

    template <class Block>
    SSM_DEVICE void differentiate(Block& block, const SsdShare& share,
                                  const SsdPiece& piece) const {
        multiply_steps(block, share, piece);
        for (int own = 0; own < share.slabs; ++own) {
            if (own > 0) fetch_groups(block, share, piece, own);
            block.each([&](int, Registers& r) {
                SSM_UNROLL
                for (int i = 0; i < kStates / 4; ++i) r.dB[i / 4][i % 4] = r.dC[i / 4][i % 4] = 0;
            });
            for (int h = 0; h < share.heads; ++h) {
                SsdPart part{};
                part.row = share.row, part.head = share.first_head + h;
                // The sums of a head without channels are zero, and wanted.
                const int slabs = in.slabs > 1 ? static_cast<int>(in.slabs) : 1;
                for (int slab = 0; slab < slabs; ++slab) {
                    part.first_channel = std::int64_t{slab} * kSsdChannels;
                    const std::int64_t left = in.headdim - part.first_channel;
                    part.channels = static_cast<int>(left < kSsdChannels ? left : kSsdChannels);
                    block.each([&](int thread, Registers& r) {
                        fetch_head(block, share, part, piece, own > 0 ? own : share.slabs - 1,
                                   fresh(thread), r);
                    });
                    if (slab == 0) write_decays_of(block, part, piece);
                    arrive(block);
                    if (own == 0) differentiate_pairs(block, slab > 0);
                    forget(block);
                    if (own == 0) multiply_states(block, share, part, piece);
                    forget(block);
                    add_state_gradients(block, piece);
                    forget(block);
                    if (own == 0) differentiate_channels(block, share, part, piece, slab > 0);
                    block.barrier();
                }
                if (own == 0) finish_head(block, share, part, piece);
            }
            add_step_gradients(block);
            block.each([&](int thread, Registers& r) {
                const int warp = thread / kWarp, lane = thread % kWarp;
                const std::int64_t state =
                    std::int64_t{own} * kStates + first_state(warp) + lane % 4 * 2;
                const std::int64_t first = share_row(out, share, piece, window) * in.dstate;
                const int row = first_row(warp) + lane / 4;
                put_share(in, piece, out.dB + first, row, state, r.dB);
                put_share(in, piece, out.dC + first, row, state, r.dC);
            });
            if (own + 1 < share.slabs) block.barrier();
        }
    }

    /// Where products take registers of their own, those are not for places of lanes.
    template <class Block>
    SSM_DEVICE void forget(Block& block) const {
        if constexpr (!kIsOneInstruction<Element>) block.forget();
    }
    template <class Block>
    SSM_DEVICE void arrive(Block& block) const {
        block.each([&](int thread, Registers&) { block.wait_for_copies(thread); });
        block.barrier();
        forget(block);
    }

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
        arrive(block);
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
                multiply_rows<kStates, true>(warp, C_of(), B_of(),
                                             [](Registers& r) -> auto& { return r.w; });
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

    /// sums += left right^T. `is_causal`: for pairs of steps, as far as they reach steps before
    /// them.
    template <int kColumns, bool is_causal, class Warp, class Get>
    SSM_DEVICE void multiply_rows(Warp& warp, const Matrix& left_of, const Matrix& right_of,
                                  Get&& get) const {
        const int row = first_row(warp.index), column = first_column(warp.index);
        PerLane<Fragment<Element>> left, right;
        SSM_UNROLL_BY(kAhead)
        for (int k = 0; k < kColumns; k += 16) {
            load_left(warp, left_of, row, k, left);
            SSM_UNROLL
            for (int n = 0; n < 2; ++n) {
                if (is_causal && column + n * 16 > row) continue;
                load_right(warp, right_of, k, column + n * 16, right);
                multiply_both(warp, left, right, [&](int lane, int side) -> auto& {
                    return get(warp.registers(lane))[2 * n + side];
                });
            }
        }
    }

    /// What belongs to a head and a slab of its channels, and one slab of its states.
    template <class Block>
    SSM_DEVICE void fetch_head(Block& block, const SsdShare& share, const SsdPart& part,
                               const SsdPiece& piece, int slab, int thread, Registers& r) const {
        fetch_rows<Element, kSsdChannels, kThreads>(block, thread, X_of(), in.X, in.copies_X,
                                                    part.row, part.head, part.first_channel,
                                                    part.channels, piece);
        fetch_output_gradients<Element, kThreads>(block, thread, dY_of(), in, out, part, piece);
        fetch_states(block, share, part, piece, slab, thread);
        if (thread < kWarp && part.first_channel == 0)
            fetch_steps(in, part.row, part.head, piece, thread, r.raw);
        if (thread < kSsdChannels)
            block.write(kD + thread, in.D && thread < part.channels
                                         ? in.D.template load<Real>(part.head * in.D.stride[0] +
                                                                    (part.first_channel + thread) *
                                                                        in.D.stride[1])
                                         : Real(0));
    }

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

    template <class Block>
    SSM_DEVICE void write_decays_of(Block& block, const SsdPart& part,
                                    const SsdPiece& piece) const {
        block.each_warp([&](auto& warp) {
            if (warp.index == 0)
                write_all_decays<Real>(block, warp, in, part.head, piece,
                                       [&](int lane) -> auto& { return warp.registers(lane).raw; });
        });
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
                    fetch_slab_of_groups(block, share, piece, slab, fresh(thread));
                    if (slab + 1 < share.slabs)
                        fetch_states(block, share, part, piece, slab, thread);
                });
                arrive(block);
            }
            block.each_warp([&](auto& warp) {
                multiply_rows<kStates, false>(warp, C_of(), H_of(),
                                              [](Registers& r) -> auto& { return r.y; });
                multiply_rows<kStates, false>(warp, B_of(), dH_of(),
                                              [](Registers& r) -> auto& { return r.v; });
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

    /// What the pairs of steps give to a slab of channels. `adds`: to the sums of the slabs before.
    template <class Block>
    SSM_DEVICE void differentiate_pairs(Block& block, bool adds) const {
        block.each([&](int, Registers& r) {
            SSM_UNROLL
            for (int i = 0; i < 16; ++i) r.w[i / 4][i % 4] = 0;
        });
        block.each_warp([&](auto& warp) {
            multiply_rows<kSsdChannels, true>(warp, dY_of(), X_of(),
                                              [](Registers& r) -> auto& { return r.w; });
        });
        block.each([&](int thread, Registers& r) {
            weigh_pairs(block, fresh(thread), adds, r);
            if (in.D) sum_quarter(block, thread, dY_of(), X_of(), kdD);
        });
        block.template scatter_sums<8, 8, 4>([](Registers& r) -> Real(&)[8] { return r.columns; });
        sum_ssd_rows(block, [](Registers& r) -> auto& { return r.rows; });
        block.each(
            [&](int thread, Registers& r) { Sums::write_pairs(block, fresh(thread), adds, r); });
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
            const Real D[2] = {block.read(kD + channel), block.read(kD + channel + 1)};
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
                sum += block.read(kdD + quarter * kSsdChannels + thread);
            dD = share.is_first ? sum : dD + sum;
        }
    }

    /// ddt of a head, and its shares of dA and ddt_bias.
    template <class Block>
    SSM_DEVICE void finish_head(Block& block, const SsdShare& share, const SsdPart& part,
                                const SsdPiece& piece) const {
        block.each_warp([&](auto& warp) {
            if (warp.index == 0) Sums::sum_along(block, warp);
        });
        block.each(
            [&](int thread, Registers& r) { r.through = Sums::crossing(block, fresh(thread)); });
        block.template sum_lanes<4>([](Registers& r) -> Real& { return r.through; });
        block.each([&](int thread, Registers& r) {
            if (thread % 4 == 0) block.write(Sums::kCrossing + thread / 4, r.through);
        });
        block.barrier();
        block.each([&](int thread, Registers& r) {
            Sums::finish_step(block, in, out, part, piece, fresh(thread), r);
        });
        block.template sum_lanes<kWarp>([](Registers& r) -> Real& { return r.dA; });
        block.template sum_lanes<kWarp>([](Registers& r) -> Real& { return r.dbias; });
        block.each([&](int thread, Registers& r) {
            if (thread >= kSsdTile || thread % kWarp != 0) return;
            const std::int64_t place =
                ((share.row * out.tiles + share.tile) * kSsdHalves + thread / kWarp) * in.heads +
                part.head;
            out.dA[place] = share.is_first ? r.dA : out.dA[place] + r.dA;
            if (out.dbias != nullptr)
                out.dbias[place] = share.is_first ? r.dbias : out.dbias[place] + r.dbias;
        });
        block.barrier();
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
};

}  // namespace ssm::cuda
