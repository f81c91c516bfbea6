// The GPU that the host stands for in tests.
#pragma once

#include <cstdint>

namespace ssm::cuda {

/// How many blocks have run on the warpgroups of Hopper.
extern std::int64_t host_warpgroup_blocks;

/// Shared memory that a block can have.
extern std::int64_t host_shared;

}  // namespace ssm::cuda
