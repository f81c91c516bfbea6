// The sequences of a row, as numbers in memory of the device.
#pragma once

#include <algorithm>

#include "element.cuh"

namespace ssm::cuda {

/// The steps of a row as segments that run at the same time.
struct Segments {
    std::int64_t count, steps;  // steps of one: a multiple of the tile
};

/// Cuts rows into segments where `blocks` do not fill a GPU and at least `worth` segments come out,
/// fewer of which gain nothing. A function of sizes alone.
inline Segments cut_segments(std::int64_t seqlen, std::int64_t tile, std::int64_t blocks,
                             std::int64_t worth) {
    // Blocks that fill a GPU: a number of its own, so that no result depends on the device.
    constexpr std::int64_t kFullDevice = 264, kMost = 32, kLeastTiles = 4;
    const std::int64_t tiles = (seqlen + tile - 1) / tile;
    const std::int64_t count =
        std::min({blocks > 0 ? kFullDevice / blocks : 1, kMost, tiles / kLeastTiles});
    if (count < worth) return {1, tiles * tile};
    const std::int64_t segment_tiles = (tiles + count - 1) / count;
    return {(tiles + segment_tiles - 1) / segment_tiles, segment_tiles * tile};
}

/// Where the number of the sequence of a step lies.
template <class Inputs>
SSM_DEVICE const std::int32_t* sequence_place(const Inputs& in, std::int64_t row,
                                              std::int64_t step) {
    return static_cast<const std::int32_t*>(in.seq_idx.data) +
           (row * in.seq_idx.stride[0] + step * in.seq_idx.stride[1]);
}

/// The sequence of a step, or -1 where it is skipped.
template <class Inputs>
SSM_DEVICE std::int32_t sequence_at(const Inputs& in, std::int64_t row, std::int64_t step) {
    if (!in.seq_idx) return 0;
    const std::int32_t id = *sequence_place(in, row, step);
    // The values were not looked at before the launch: one without a state is no sequence.
    const bool has_state = !in.state_per_sequence || in.num_states < 0 || id < in.num_states;
    return id >= 0 && has_state ? id : -1;
}

/// The sequence of the last step before `step` that is not skipped, or -1.
template <class Inputs>
SSM_DEVICE std::int32_t sequence_before(const Inputs& in, std::int64_t row, std::int64_t step) {
    std::int32_t id = -1;
    while (step > 0 && id < 0) id = sequence_at(in, row, --step);
    return id;
}

}  // namespace ssm::cuda
