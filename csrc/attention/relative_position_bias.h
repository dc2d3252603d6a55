// Biases gathered by relative position, on the C++ side: the arguments of the kernels.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace udl {

struct RelativePositionBias {
  Dtype dtype = Dtype::f32;
  bool wide_index = false;     // int64 instead of int32
  const void* index = nullptr;  // [positions], each in [0, n)
  int64_t n = 0, heads = 0, positions = 0;
  int64_t row = 0;   // heads, rounded up to whole vectors
  int64_t chunk = 0;  // positions of a unit
  uint8_t* fits = nullptr;      // [chunks]
  const void* table = nullptr;  // forward: [n, row]
  void* out = nullptr;          // forward: [heads, positions]
  const void* dout = nullptr;   // backward: [heads, positions]
  void* partials = nullptr;     // backward: [chunks, n, heads], accumulation type
};

// A chunk's own sums are a table each: none shorter than this, and together they take no more than an
// eighth of the elements of dout. A function of extents alone, as the order of the sums has to be.
UDL_ALWAYS_INLINE int64_t relative_position_chunk(int64_t n) {
  constexpr int64_t kShortest = 2048;
  return 8 * n > kShortest ? 8 * n : kShortest;
}

}  // namespace udl

// *lanes = heads of a vector.
UDL_KERNEL(relative_position_lanes, (Dtype acc, int64_t* lanes))
// Units: chunks of positions. fits[chunk] = whether all of its values lie in [0, n).
UDL_KERNEL(relative_position_fits, (const RelativePositionBias& args, int64_t begin, int64_t end))
// Units: chunks of positions.
UDL_KERNEL(relative_position_gather, (const RelativePositionBias& args, int64_t begin, int64_t end))
UDL_KERNEL(relative_position_sum, (const RelativePositionBias& args, int64_t begin, int64_t end))
