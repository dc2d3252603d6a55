// Linear attention on the C++ side: the arguments of the kernels. A sequence is cut into chunks; what
// earlier chunks sum to is the state, and inside a chunk the products of queries and keys are formed.
#pragma once

#include "attention/attention.h"

namespace udl {

enum class Feature : int { identity, elu_plus_one, relu };

// Which outer products a state sums: those of keys and values, [D, Dv] or turned to [Dv, D], or those
// of queries and gradients, which later chunks give to earlier ones.
enum class StateOf : int { keys, keys_turned, queries };

// kv [B, Hkv, D, Dv] and z [B, Hkv, D], contiguous, in the accumulation type; null where absent.
struct LinearState {
  void *kv = nullptr, *z = nullptr;
};

struct LinearAttention {
  Dtype dtype = Dtype::f32;
  Feature feature = Feature::identity;
  StateOf state = StateOf::keys;
  bool causal = false;
  int64_t batches = 0, heads = 0, key_heads = 0, queries = 0, keys = 0, width = 0, value_width = 0;
  Heads q, k, v, out;
  LinearState before, after;
  // Of each key head, `state_size` numbers: the state as it grows.
  void* carry = nullptr;
  // The same for each chunk: its own sum, then what it starts from. Null where a head's chunks follow
  // each other in one thread.
  void* sums = nullptr;
  int64_t state_size = 0;
  // Backward. data is null where not wanted.
  Heads dout, dq, dk, dv;
  // [B, H, T], accumulation type: 1 / denominator (0 for 0), and dout . out.
  void *inverse = nullptr, *delta = nullptr;

  UDL_ALWAYS_INLINE int64_t group() const { return heads / key_heads; }
  UDL_ALWAYS_INLINE int64_t states() const { return batches * key_heads; }
};

// Tokens of one chunk, from the first token on whatever is asked for: the order of a row's sums is a
// function of its own place.
constexpr int64_t kChunk = 64;
UDL_ALWAYS_INLINE int64_t chunks_of(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }
UDL_ALWAYS_INLINE int64_t query_chunks(const LinearAttention& args) {
  return chunks_of(args.queries);
}
UDL_ALWAYS_INLINE int64_t key_chunks(const LinearAttention& args) { return chunks_of(args.keys); }
// Chunks that the state sums.
UDL_ALWAYS_INLINE int64_t state_chunks(const LinearAttention& args) {
  return args.state == StateOf::queries ? query_chunks(args) : key_chunks(args);
}
// Whether a unit of the passes is a whole head, through which it carries the state.
UDL_ALWAYS_INLINE bool carries(const LinearAttention& args) {
  return args.causal && args.sums == nullptr;
}
// A state's numbers that are scanned together.
constexpr int64_t kPiece = 1024;
UDL_ALWAYS_INLINE int64_t state_pieces(const LinearAttention& args) {
  return (args.state_size + kPiece - 1) / kPiece;
}

}  // namespace udl

UDL_KERNEL(linear_attention_state_size, (const LinearAttention& args, int64_t* size))
// carry = before, and after = carry. Units: states.
UDL_KERNEL(linear_attention_load, (const LinearAttention& args, int64_t begin, int64_t end))
UDL_KERNEL(linear_attention_store, (const LinearAttention& args, int64_t begin, int64_t end))
// Adds all chunks to carry, in order. Units: states.
UDL_KERNEL(linear_attention_total, (const LinearAttention& args, int64_t begin, int64_t end))
// The same for few heads: each chunk's own sum. Units: states * chunks.
UDL_KERNEL(linear_attention_sums, (const LinearAttention& args, int64_t begin, int64_t end))
// Then what each chunk starts from, and carry. Units: states * pieces.
UDL_KERNEL(linear_attention_scan, (const LinearAttention& args, int64_t begin, int64_t end))
// Units of the rest: states * chunks, of queries or of keys; or states, where it carries them along.
UDL_KERNEL(linear_attention_forward, (const LinearAttention& args, int64_t begin, int64_t end))
// inverse and delta, and dq where wanted.
UDL_KERNEL(linear_attention_backward_queries,
           (const LinearAttention& args, int64_t begin, int64_t end))
// dk and dv.
UDL_KERNEL(linear_attention_backward_keys,
           (const LinearAttention& args, int64_t begin, int64_t end))
