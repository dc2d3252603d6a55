#pragma once

#include "isa.h"
#include "rows.h"
#include "dtype.h"

namespace udl {

// w = v * g / |v| for every row of n elements; with dy, the gradients to v and g instead.
struct WeightNorm {
  Dtype dtype = Dtype::f32;
  int64_t n = 0;
  Rows v;
  Rows dy;                  // data is null in the forward
  const void* g = nullptr;  // [rows], accumulation type
  void* norm = nullptr;     // [rows], accumulation type
  void* out = nullptr;      // [rows, n], w or the gradient to v; null where that is not wanted
  void* dg = nullptr;       // [rows], accumulation type; backward
};

}  // namespace udl

UDL_KERNEL(weight_norm, (const WeightNorm& args, int64_t begin, int64_t end))
