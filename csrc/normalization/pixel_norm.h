#pragma once

#include "isa.h"
#include "normalization/channels.h"

namespace udl {

// y = x / sqrt(mean over channels of x^2 + eps) where positions are contiguous; with dy, the gradient
// to x instead. (Channels innermost are rows: rms_norm's kernel takes them.)
struct PixelNorm {
  static constexpr int64_t kBlock = 128;  // positions of a unit of work

  Dtype dtype = Dtype::f32;
  double eps = 0;
  ChannelView x;
  ChannelView dy;  // data is null in the forward
  void* out = nullptr;

  UDL_ALWAYS_INLINE int64_t units_per_sample() const {
    return (x.positions + kBlock - 1) / kBlock;
  }
};

}  // namespace udl

UDL_KERNEL(pixel_norm_planes, (const PixelNorm& args, int64_t begin, int64_t end))
