// The sequences of a row, as numbers in memory of the device.
#pragma once

#include "element.cuh"

namespace ssm::cuda {

/// The sequence of a step, or -1 where it is skipped.
template <class Inputs>
SSM_DEVICE std::int32_t sequence_at(const Inputs& in, std::int64_t row, std::int64_t step) {
    if (!in.seq_idx) return 0;
    const std::int32_t id = static_cast<const std::int32_t*>(
        in.seq_idx.data)[row * in.seq_idx.stride[0] + step * in.seq_idx.stride[1]];
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
