// What layer_norm and rms_norm share on the C++ side: the arguments of the row kernels.
#pragma once

#include "dtype.h"
#include "philox.h"
#include "rows.h"

namespace udl {

// y = (s - mean) * rstd * weight + bias for every row of width n, s = residual + dropout(x).
// Without centring the mean is left out and rstd is that of the mean square.
struct RowNormForward {
  Dtype dtype = Dtype::f32;
  bool cast_before_weight = false;
  int64_t n = 0;
  double eps = 0;
  Rows x;
  Rows residual;                 // data is null without a residual
  void* sum = nullptr;           // [rows, n], s; null without a residual
  const void* weight = nullptr;  // [n], accumulation type; null for ones
  const void* bias = nullptr;    // [n], accumulation type; null for zeros
  void* y = nullptr;             // [rows, n]
  void* mean = nullptr;          // [rows], accumulation type; null when not kept
  void* rstd = nullptr;          // [rows], accumulation type; null when not kept
  Dropout dropout;
};

// Gradients for chunks of chunk_rows rows, whose weight and bias sums go to a line each of the
// partials.
struct RowNormBackward {
  Dtype dtype = Dtype::f32;
  int64_t n = 0;
  int64_t rows = 0;
  int64_t chunk_rows = 0;
  Rows dy;
  Rows x;                         // what was normalised: x, or s with a residual
  Rows ds;                        // gradient that reaches s from elsewhere; data null without
  const void* weight = nullptr;   // as forward
  const void* mean = nullptr;
  const void* rstd = nullptr;
  void* dx = nullptr;             // [rows, n], gradient to s; null when not wanted
  void* dx_dropped = nullptr;     // [rows, n], gradient to x through the dropout; null without
  void* dweight = nullptr;        // [chunks, n] accumulation type; null when not wanted
  void* dbias = nullptr;
  Dropout dropout;
};

// Rows a chunk of the weight gradient takes: a function of the width alone, so that the order of
// the sum never depends on the machine or on the other rows. 64 rows cost nothing against one long
// sum at widths up to 2048; wider rows take fewer, for more chunks to share out. Even, for pairs.
UDL_ALWAYS_INLINE int64_t row_norm_chunk_rows(int64_t n) {
  const int64_t rows = 131072 / (n > 0 ? n : 1);
  return rows > 64 ? 64 : rows < 8 ? 8 : rows / 2 * 2;
}

}  // namespace udl
