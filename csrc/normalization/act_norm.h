#pragma once

#include "dtype.h"
#include "isa.h"
#include "rows.h"

namespace udl {

// y = (x + bias) * scale, in rows of n elements; with dy, the gradient dx = dy * scale and the sums
// of dy and of dy * y over chunks of rows.
// Either every element of a row has its own parameters (`columns`: bias and scale are [n], and a chunk
// owns a line of n sums), or a row has one pair: that of channel row % channels (a chunk is then one
// row, and owns one sum).
struct ActNorm {
  Dtype dtype = Dtype::f32;
  bool columns = false;
  int64_t n = 0;
  int64_t rows = 0;
  int64_t chunk_rows = 1;
  int64_t channels = 0;
  Rows x;
  Rows dy;                      // data is null in the forward
  const void* scale = nullptr;  // accumulation type
  const void* bias = nullptr;
  void* out = nullptr;           // [rows, n]; null where dx is not wanted
  void* dy_sums = nullptr;       // backward, accumulation type
  void* product_sums = nullptr;  // backward, accumulation type
};

}  // namespace udl

// Units are chunks.
UDL_KERNEL(act_norm, (const ActNorm& args, int64_t begin, int64_t end))
