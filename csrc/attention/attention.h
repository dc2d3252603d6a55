// Attention on the C++ side: the arguments of the kernels. Scores are held with the queries along the
// vector lanes, so that keys and values are read where they lie, one number at a time for all lanes.
#pragma once

#include "attention/heads.h"
#include "dtype.h"
#include "isa.h"
#include "philox.h"

namespace udl {

struct Attention {
  Dtype dtype = Dtype::f32, bias_dtype = Dtype::f32;
  int64_t batches = 0, heads = 0, key_heads = 0, queries = 0, keys = 0, width = 0, value_width = 0;
  Heads q, k, v;
  Heads mask;  // one byte an element
  Heads bias;
  const int64_t* key_lengths = nullptr;  // [B]
  // Query i of sample b sees keys from ranges[b * ranges_batch + 2 * i] to before the number after it.
  const int64_t* ranges = nullptr;
  int64_t ranges_batch = 0;
  Heads block_mask;  // one byte for each block_size queries by block_size keys
  int64_t block_size = 0;
  const void* alibi_slopes = nullptr;    // [B, H], accumulation type
  const void* sinks = nullptr;           // [H], accumulation type
  // Key j is seen by query i where -left <= j - i - offset <= right.
  int64_t offset = 0, left = 0, right = 0;
  double scale = 1, softcap = 0;
  Dropout dropout;
  // Which blocks of keys hold a value that is not finite, [B, key heads, blocks]: bit 0 the keys, bit 1
  // the values. A weight of zero must not meet one in a product.
  uint8_t* unclean = nullptr;
  Heads out;
  void* lse = nullptr;  // [B, H, T], accumulation type, with row_stride from head to head
  int64_t row_stride = 0, dropout_row = 0;  // dropout's rows start there
  // Backward.
  Heads dout, dq, dk, dv;  // data is null where not wanted
  Heads dlse;            // [B, H, T], accumulation type
  void* delta = nullptr;       // as lse: dout . out - dlse
  int64_t key_parts = 1;       // into which the blocks of keys of a head are cut, ...
  int64_t query_parts = 1;     // ... and those of queries
  // The bias's gradient, accumulation type, [B or 1, H or 1, T or 1, S or 1] as the extents say.
  void* dbias = nullptr;
  int64_t bias_batches = 1, bias_heads = 1, bias_queries = 1, bias_keys = 1;

  UDL_ALWAYS_INLINE int64_t group() const { return heads / key_heads; }
  // Where a row of a head stands in lse and delta.
  UDL_ALWAYS_INLINE int64_t row_at(int64_t b, int64_t h, int64_t i) const {
    return (b * heads + h) * row_stride + i;
  }
};

// Keys of one block. Blocks start at multiples of it whatever is asked for, so that the order of a
// row's sums is a function of its keys alone.
constexpr int64_t kKeyBlock = 64;
UDL_ALWAYS_INLINE int64_t key_blocks(const Attention& args) {
  return (args.keys + kKeyBlock - 1) / kKeyBlock;
}

}  // namespace udl

// Queries of one block: a function of the instruction set and the accumulation type.
UDL_KERNEL(attention_query_block, (Dtype acc, int64_t* queries))
// Units: B * key heads.
UDL_KERNEL(attention_find_unclean, (const Attention& args, int64_t begin, int64_t end))
// Units: B * H * blocks of queries.
UDL_KERNEL(attention_forward, (const Attention& args, int64_t begin, int64_t end))
// Units: B * H.
UDL_KERNEL(attention_delta, (const Attention& args, int64_t begin, int64_t end))
// Units: B * key heads * key_parts * query_parts. Writes what is not null of dq, dk and dv: dq needs all
// keys (key_parts 1), dk and dv all queries (query_parts 1).
UDL_KERNEL(attention_backward, (const Attention& args, int64_t begin, int64_t end))
// Units: those of the bias's gradient, bias_batches * bias_heads * (blocks of queries, or 1).
UDL_KERNEL(attention_bias_backward, (const Attention& args, int64_t begin, int64_t end))
