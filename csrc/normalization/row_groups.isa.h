// How the channels-last kernels walk down rows. To be included by *.isa.cpp only.
#pragma once

#include "vec.h"

namespace udl::UDL_ISA {
namespace {

// Rows taken together share the loads of the channels' values, where the caches hold what a pass reads.
constexpr int kRows = 4;

// Whether to take rows together in a pass that reads so many bytes: from memory single rows came up to
// 1.4 times faster, in the order of their addresses, which the hardware foresees. The sums are the same
// either way.
UDL_INLINE bool fit_together(int64_t bytes) { return bytes <= 16 << 20; }

// body(r, integral_constant k) for rows [begin, end), K at a time if `together`, and then one by one.
template <int K, class Body>
UDL_INLINE void for_row_groups(bool together, int64_t begin, int64_t end, Body body) {
  int64_t r = begin;
  for (; together && r + K <= end; r += K) body(r, std::integral_constant<int, K>{});
  for (; r < end; ++r) body(r, std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace udl::UDL_ISA
