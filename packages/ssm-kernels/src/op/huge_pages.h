// Huge pages under memory that is taken afresh from the system.
#pragma once

#include <cstddef>

namespace ssm {

/// Allocators take as much as this for itself from the system, and give it back when it is freed.
inline constexpr std::size_t kFreshBytes = std::size_t{32} << 20;

/// Asks for huge pages under kFreshBytes or more; does nothing for less. Otherwise the first write
/// costs a page fault per 4096 bytes: more than most kernels need for the page.
void prefer_huge_pages(void* data, std::size_t bytes) noexcept;

}  // namespace ssm
