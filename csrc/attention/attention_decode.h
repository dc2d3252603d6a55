// Attention of a few queries over a cache of keys and values, cut along the keys. All queries that
// share a key head are the rows of one problem, so that the cache is read once.
#pragma once

#include "attention/attention.h"

namespace udl {

// Angles by position, and which elements of a row are a pair.
struct Angles {
  const void* cos = nullptr;  // [positions, half], accumulation type; null without rotation
  const void* sin = nullptr;
  int64_t half = 0, positions = 0;
  bool interleaved = false;
};

// Where the rows of a cache lie: by sample, or in pages of a table.
struct Cache {
  Heads heads;                     // [B or pages, key heads, rows, D]
  const int64_t* table = nullptr;  // [B, table_row]; null where not paged
  int64_t table_row = 0, page_size = 0;

  template <class T>
  UDL_ALWAYS_INLINE const T* row(int64_t b, int64_t head, int64_t j) const {
    if (table == nullptr) return heads.at<T>(b, head, j);
    return heads.at<T>(table[b * table_row + j / page_size], head, j % page_size);
  }
};

struct Decode {
  Dtype dtype = Dtype::f32;
  int64_t batches = 0, heads = 0, key_heads = 0, queries = 0, width = 0, value_width = 0;
  Heads q, out;
  Cache k, v;
  const int64_t* lengths = nullptr;    // [B]
  const void* alibi_slopes = nullptr;  // [B, H], accumulation type
  const void* sinks = nullptr;         // [H], accumulation type
  // Query i stands at p = length - queries + i, and sees key j where -left <= j - p <= right.
  int64_t left = 0, right = 0;
  double scale = 1, softcap = 0;
  Angles rotary;
  // Partial results of each chunk of keys: `chunk_starts` counts the chunks before sample b.
  const int64_t* chunk_starts = nullptr;  // [B + 1]
  void* partial_out = nullptr;  // [chunks, key heads, rows, value_width], accumulation type
  void* partial_peak = nullptr; // [chunks, key heads, rows]: the largest score, times log2(e)
  void* partial_sum = nullptr;  // likewise: the sum of weights against it
  void* lse = nullptr;          // [B, H, T], accumulation type

  UDL_ALWAYS_INLINE int64_t group() const { return heads / key_heads; }
  // Rows of one key head: query head by query head, T each.
  UDL_ALWAYS_INLINE int64_t rows() const { return group() * queries; }
};

// Keys of one chunk, counted from key 0: the order of a row's sums is a function of its keys alone.
constexpr int64_t kDecodeChunk = 512;

// New rows for a cache, of keys (rotated) or of values.
struct Append {
  Dtype dtype = Dtype::f32;
  int64_t batches = 0, key_heads = 0, rows = 0, width = 0;
  Heads from;
  Cache to;
  const int64_t* starts = nullptr;  // [B]
  Angles rotary;
};

}  // namespace udl

// Units: chunks * key heads.
UDL_KERNEL(attention_decode_partial, (const Decode& args, int64_t begin, int64_t end))
// Units: B * H * T.
UDL_KERNEL(attention_decode_merge, (const Decode& args, int64_t begin, int64_t end))
// Units: B * key heads.
UDL_KERNEL(attention_decode_append, (const Append& args, int64_t begin, int64_t end))
