// Where a block has what it differentiates in a tile of the state-space dual scan: matrices and
// sums in shared memory, the rest in registers; and which rows and columns of the matrices a warp
// owns.
#pragma once

#include "ssd_chunk_scan_sums.cuh"

namespace ssm::cuda {

template <class Real, class Matter, int kStates>
struct SsdGradientShape {
    static constexpr int kThreads = 256;
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

    /// Where products take registers of their own, those are not for places of lanes.
    template <class Block>
    static SSM_DEVICE void forget(Block& block) {
        if constexpr (!kIsOneInstruction<Element>) block.forget();
    }
    template <class Block>
    static SSM_DEVICE void arrive(Block& block) {
        block.each([&](int thread, Registers&) { block.wait_for_copies(thread); });
        block.barrier();
        forget(block);
    }

    /// sums += left right^T. `is_causal`: for pairs of steps, as far as they reach steps before
    /// them.
    template <int kColumns, bool is_causal, class Warp, class Get>
    static SSM_DEVICE void multiply_rows(Warp& warp, const Matrix& left_of, const Matrix& right_of,
                                         Get&& get) {
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
};

}  // namespace ssm::cuda
