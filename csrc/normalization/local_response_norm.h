#pragma once

#include "isa.h"
#include "normalization/channels.h"

namespace udl {

// y = x * s^-beta, s = k + scale * (sum of x^2 over the channels c - before .. c + after); with dy,
// the gradient to x instead. Results are dense, in the order of x's walk.
struct LocalResponseNorm {
  // Positions (or elements of rows, with channels innermost) that a unit of work holds at a time: a
  // window's lines then stay in the L1 cache.
  static constexpr int64_t kBlock = 256;

  Dtype dtype = Dtype::f32;
  ChannelView x;
  ChannelView dy;  // data is null in the forward
  void* out = nullptr;
  int64_t before = 0;
  int64_t after = 0;
  double scale = 0;
  double beta = 0;
  double k = 0;

  UDL_ALWAYS_INLINE int64_t unit_positions() const {
    if (!x.last) return kBlock;
    const int64_t rows = 4 * kBlock / (x.channels + before + after);
    return rows > 1 ? rows : 1;
  }
  UDL_ALWAYS_INLINE int64_t units_per_sample() const {
    return (x.positions + unit_positions() - 1) / unit_positions();
  }
};

}  // namespace udl

UDL_KERNEL(local_response_norm, (const LocalResponseNorm& args, int64_t begin, int64_t end))
