// Batch norm on the C++ side: how a tensor is seen by channels, and the arguments of the kernels.
#pragma once

#include "activation.h"
#include "dtype.h"
#include "isa.h"
#include "rows.h"

namespace udl {

// A tensor [N, C, *] in one of two forms. As planes: for every channel N rows of `length` elements
// that are contiguous in memory. As columns: N * length rows of one element a channel, the channels
// contiguous.
struct Channels {
  void* data = nullptr;  // null where the tensor is absent
  Rows rows;
  int64_t stride = 1;  // from one channel to the next, in elements

  template <class T>
  __attribute__((always_inline)) T* at(int64_t channel, int64_t row) const {
    return static_cast<T*>(data) + rows.offset(row) + channel * stride;
  }
};

struct BatchNorm {
  Dtype dtype = Dtype::f32;
  bool columns = false;
  int64_t channels = 0;
  int64_t fold = 1;  // as columns: how many elements of each channel a row holds, one after another
  int64_t rows = 0;
  int64_t length = 1;      // of a row; 1 as columns
  int64_t chunk_rows = 0;  // rows summed together
  int64_t pieces = 1;      // into which a long row is cut, a chunk each
  int64_t chunks = 0;
  Activation activation = Activation::identity;
  double slope = 0;
  double eps = 0;
  // Forward: y = act((x - mean) * rstd * weight + bias + residual). The mean is kept in two parts,
  // so that a large one costs no digits.
  Channels x, residual, y;
  const void* weight = nullptr;  // [C], accumulation type, as all below; null for ones
  const void* bias = nullptr;    // null for zeros
  void* partials = nullptr;      // [chunks, 3 or 2, fold, C]
  void* mean = nullptr;
  void* remainder = nullptr;  // the exact mean minus `mean`
  void* rstd = nullptr;
  void* alpha = nullptr;            // weight * rstd
  void* shift = nullptr;            // bias - remainder * alpha
  double* batch_mean = nullptr;     // [C]
  double* batch_squares = nullptr;  // [C], the sum of squares around the mean
  // Backward. g = dy * act'(pre-activation), which is found again from x (and the residual), or,
  // where its sign says all, from y.
  Channels dy, dx, dresidual;
  bool from_output = false;  // whether `y` is the forward's output, to be used so
  bool frozen = false;       // whether the statistics are constants (evaluation)
  double* g_sum = nullptr;   // [C]
  double* h_sum = nullptr;   // [C], the sum of g * (x - mean)
  double count = 0;          // elements that the two sums cover
  void* h_factor = nullptr;  // dx = (g + (x - mean) * rstd * h_factor) * alpha + offset
  void* offset = nullptr;

  UDL_ALWAYS_INLINE int64_t columns_wide() const { return channels * fold; }
};

// Elements of a channel that are summed in the accumulation type before double precision takes over;
// as planes they stay in the L1 cache between the two passes of the variance.
constexpr int64_t kChunk = 4096;

// What may be expected to stay in a core's own cache, of 1 MB on the machine measured.
constexpr int64_t kCacheBytes = 1 << 19;

// As columns, rows of few channels that follow one another in memory are taken as one of up to this
// many columns: rows of 16 channels alone were four times slower. A function of the extents.
constexpr int64_t kFolded = 256;
UDL_ALWAYS_INLINE int64_t fold_of(int64_t channels, int64_t rows) {
  int64_t fold = 1;
  while (2 * fold * channels <= kFolded && rows % (2 * fold) == 0) fold *= 2;
  return fold;
}

// Cuts a channel into chunks: a function of the reduced extent alone.
UDL_ALWAYS_INLINE void cut_into_chunks(BatchNorm& args) {
  if (args.columns) {
    args.chunk_rows = args.rows < 8192 ? 64 : 256;
    args.pieces = 1;
  } else {
    args.pieces = (args.length + kChunk - 1) / kChunk;
    args.chunk_rows = args.length < kChunk ? kChunk / args.length : 1;
  }
  args.chunks = (args.rows + args.chunk_rows - 1) / args.chunk_rows * args.pieces;
}

struct Chunk {
  int64_t first_row, last_row;
  int64_t begin, n;  // elements of every row
  UDL_ALWAYS_INLINE int64_t count() const { return (last_row - first_row) * n; }
};

UDL_ALWAYS_INLINE Chunk chunk_of(const BatchNorm& args, int64_t index) {
  const int64_t first = index / args.pieces * args.chunk_rows;
  const int64_t last = first + args.chunk_rows;
  const int64_t begin = index % args.pieces * kChunk;
  const int64_t n = args.length - begin;
  return {first, last < args.rows ? last : args.rows, begin,
          args.pieces > 1 && n > kChunk ? kChunk : n};
}

// As planes, this many neighbouring channels are handled together: memory is then read in runs of
// a few hundred elements even where the planes are small.
constexpr int64_t kMostTogether = 64;
UDL_ALWAYS_INLINE int64_t group_channels(const BatchNorm& args) {
  const int64_t together = 512 / args.length;
  return together < 1 ? 1 : together > kMostTogether ? kMostTogether : together;
}

// As columns, the most that are handled together: whole rows of most networks. (Parts of rows came from
// memory 1.3 times slower.)
constexpr int64_t kColumns = 1024;
// As many of them as let all rows stay in the L2 cache between the sums and the writing.
UDL_ALWAYS_INLINE int64_t columns_together(const BatchNorm& args) {
  if (args.fold > 1) return kColumns;
  int64_t together = kColumns;
  while (together > 64 && args.rows * together * element_size(args.dtype) > kCacheBytes) together /= 2;
  return together;
}

}  // namespace udl

// Whole channels: `begin` to `end` count groups of them (planes) or are channels (columns). The
// statistics and then y, or the sums and then dx; x is read from memory once if it fits the cache.
UDL_KERNEL(batch_norm_planes_forward, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_planes_backward, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_columns_forward, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_columns_backward, (const BatchNorm& args, int64_t begin, int64_t end))
// The same in steps. A unit is one chunk of one group of channels (planes) or of kColumns channels;
// to write as columns it is a row.
UDL_KERNEL(batch_norm_planes_moments, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_planes_write, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_planes_sums, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_planes_gradient, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_columns_moments, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_columns_write, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_columns_sums, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_columns_gradient, (const BatchNorm& args, int64_t begin, int64_t end))
// Between the steps, for channels `begin` to `end`: from partials to statistics and coefficients.
UDL_KERNEL(batch_norm_finish_moments, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_finish_sums, (const BatchNorm& args, int64_t begin, int64_t end))
// From statistics that are given, and from sums that are given.
UDL_KERNEL(batch_norm_coefficients, (const BatchNorm& args, int64_t begin, int64_t end))
UDL_KERNEL(batch_norm_gradient_coefficients, (const BatchNorm& args, int64_t begin, int64_t end))
