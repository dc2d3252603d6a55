#pragma once

#include "dtype.h"
#include "isa.h"
#include "rows.h"

namespace udl {

// A matrix of so many rows of n elements, and the vectors beside it; all but the matrices are of the
// accumulation type.
struct SpectralNorm {
  Dtype dtype = Dtype::f32;
  int64_t rows = 0;
  int64_t n = 0;
  Rows matrix;
  Rows dy;
  const void* u = nullptr;  // [rows]
  const void* v = nullptr;  // [n]
  double inverse_sigma = 0;
  double dot = 0;           // of dy and the result
  void* out = nullptr;
};

}  // namespace udl

// out [rows] = matrix v, for a range of rows.
UDL_KERNEL(spectral_norm_times, (const SpectralNorm& args, int64_t begin, int64_t end))
// out [n] = u matrix, for a range of blocks of kSpectralColumns columns.
constexpr int64_t kSpectralColumns = 256;
UDL_KERNEL(spectral_norm_times_left, (const SpectralNorm& args, int64_t begin, int64_t end))
// out [rows] = the products of the rows of dy and of the matrix.
UDL_KERNEL(spectral_norm_dots, (const SpectralNorm& args, int64_t begin, int64_t end))
// out = matrix / sigma; with dy, (dy - dot u v^T) / sigma.
UDL_KERNEL(spectral_norm_scale, (const SpectralNorm& args, int64_t begin, int64_t end))
