// The kernels behind group_norm, instance_norm (a group for each channel) and their fused forms:
// y = act((x - mean) * rstd * weight + bias + residual), statistics per sample and group.
//
// Two layouts: "planes" (a channel's positions lie side by side, a group's channels one after the
// other) and "lines" (a position's channels lie side by side, channels-last).
#pragma once

#include "activation.h"
#include "dtype.h"
#include "isa.h"

namespace udl {

// A tensor [samples, channels, positions], by its strides in elements.
struct Maps {
  const void* data = nullptr;
  int64_t sample = 0, channel = 0, position = 0;

  template <class T>
  UDL_ALWAYS_INLINE const T* at(int64_t n, int64_t c, int64_t p) const {
    return static_cast<const T*>(data) + n * sample + c * channel + p * position;
  }
};

struct GroupNormSizes {
  Dtype dtype = Dtype::f32;
  int64_t samples = 0, channels = 0, groups = 0, positions = 0;
  int64_t group_channels = 0;   // channels / groups
  int64_t block_groups = 1;     // planes: groups a unit of work takes
  int64_t chunk_positions = 0;  // lines: positions whose sums are kept apart
  int64_t chunks = 0;
  Activation act = Activation::identity;
  double slope = 0;
};

// Weight and bias lie affine_stride elements apart from sample to sample: 0, or channels where each
// sample has its own. Parameters and statistics are of the accumulation type.
struct GroupNormForward : GroupNormSizes {
  double eps = 0;
  Maps x, residual;  // residual: data is null without
  Maps lines;        // where x has to be turned from lines to planes first, into y; else null
  const void* weight = nullptr;
  const void* bias = nullptr;
  int64_t affine_stride = 0;
  void* y = nullptr;         // dense, in the layout of the kernel
  void* mean = nullptr;      // [samples, groups]
  void* rstd = nullptr;
  void* var = nullptr;
  void* rest = nullptr;      // what the type of mean could not hold of it
  void* partials = nullptr;  // lines: [samples, chunks, 2, channels], means and squared deviations
};

struct GroupNormBackward : GroupNormSizes {
  Maps dy, x, residual;
  Maps lines;  // as in the forward, into dx
  const void* weight = nullptr;
  const void* bias = nullptr;
  int64_t affine_stride = 0;
  const void* mean = nullptr;
  const void* rstd = nullptr;
  const void* rest = nullptr;
  void* dx = nullptr;        // null when not wanted
  void* gradient = nullptr;  // with an activation: dy * act', dense; the residual's gradient, or dx
  void* dweight = nullptr;   // [samples, channels]
  void* dbias = nullptr;     // [samples, channels]
  void* partials = nullptr;  // lines: [samples, chunks, 2, channels], sums of g and g * (x - mean)
  void* factors = nullptr;   // lines: [samples, 2, groups], what dx takes off (see dx_factors)
};

}  // namespace udl

// Units: samples * ceil(groups / block_groups).
UDL_KERNEL(group_norm_planes_forward, (const GroupNormForward& args, int64_t begin, int64_t end))
UDL_KERNEL(group_norm_planes_backward, (const GroupNormBackward& args, int64_t begin, int64_t end))
// All of a forward or a backward in lines, sample by sample. Units: samples.
UDL_KERNEL(group_norm_lines_forward, (const GroupNormForward& args, int64_t begin, int64_t end))
UDL_KERNEL(group_norm_lines_backward, (const GroupNormBackward& args, int64_t begin, int64_t end))
// The same in steps. Units: samples * chunks, for a fold samples.
UDL_KERNEL(group_norm_lines_moments, (const GroupNormForward& args, int64_t begin, int64_t end))
UDL_KERNEL(group_norm_lines_fold, (const GroupNormForward& args, int64_t begin, int64_t end))
UDL_KERNEL(group_norm_lines_write, (const GroupNormForward& args, int64_t begin, int64_t end))
UDL_KERNEL(group_norm_lines_sums, (const GroupNormBackward& args, int64_t begin, int64_t end))
UDL_KERNEL(group_norm_lines_fold_sums, (const GroupNormBackward& args, int64_t begin, int64_t end))
UDL_KERNEL(group_norm_lines_dx, (const GroupNormBackward& args, int64_t begin, int64_t end))
