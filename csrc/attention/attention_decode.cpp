#include "attention/attention_decode.h"

#include <memory>

#include "attention/attention_op.h"

namespace udl {
namespace {

Cache cache_of(const Tensor& cache, const std::optional<Tensor>& block_table) {
  Cache found;
  found.heads = heads_of(cache);
  if (block_table.has_value()) {
    found.table = data_of<int64_t>(block_table);
    found.table_row = block_table->size(1);
    found.page_size = cache.size(2);
  }
  return found;
}

// Whether the rows [0, length) of every sample lie inside of the cache.
void check_lengths(const Tensor& lengths, int64_t added, const Tensor& cache,
                   const std::optional<Tensor>& block_table) {
  const auto* data = static_cast<const int64_t*>(lengths.const_data_ptr());
  const int64_t batches = lengths.size(0), page = cache.size(2);
  const int64_t capacity = block_table.has_value() ? block_table->size(1) * page : page;
  for (int64_t b = 0; b < batches; ++b) {
    STD_TORCH_CHECK(data[b] >= 0 && data[b] + added <= capacity,
                    "attention_decode: lengths from 0 to the cache's ", capacity);
    if (!block_table.has_value()) continue;
    const int64_t* table = data_of<int64_t>(block_table) + b * block_table->size(1);
    for (int64_t p = 0; p * page < data[b] + added; ++p) {
      STD_TORCH_CHECK(table[p] >= 0 && table[p] < cache.size(0),
                      "attention_decode: pages from 0 to the cache's ", cache.size(0));
    }
  }
}

Angles angles_of(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 bool interleaved) {
  Angles rotary;
  if (!cos.has_value()) return rotary;
  rotary.cos = data_of<void>(cos);
  rotary.sin = data_of<void>(sin);
  rotary.positions = cos->size(0);
  rotary.half = cos->size(1);
  rotary.interleaved = interleaved;
  return rotary;
}

void append(Tensor k_cache, Tensor v_cache, const Tensor& k_new, const Tensor& v_new,
            const Tensor& starts, const std::optional<Tensor>& block_table,
            const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool interleaved) {
  check_lengths(starts, k_new.size(2), k_cache, block_table);
  for (const bool keys : {true, false}) {
    const Tensor& from = keys ? k_new : v_new;
    Append args;
    args.dtype = dtype_of(from);
    args.batches = from.size(0);
    args.key_heads = from.size(1);
    args.rows = from.size(2);
    args.width = from.size(3);
    args.from = heads_of(from);
    args.to = cache_of(keys ? k_cache : v_cache, block_table);
    args.starts = static_cast<const int64_t*>(starts.const_data_ptr());
    if (keys) args.rotary = angles_of(cos, sin, interleaved);
    parallel_units(args.batches * args.key_heads, args.rows * args.width,
                   [&](int64_t begin, int64_t end) {
                     UDL_CALL(attention_decode_append)(args, begin, end);
                   });
  }
}

std::tuple<Tensor, Tensor> attention_decode_fwd(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, bool interleaved, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, int64_t left, int64_t right, double scale, double softcap,
    bool heads_last) {
  check_lengths(lengths, 0, k_cache, block_table);
  Decode args;
  args.dtype = dtype_of(q);
  args.batches = q.size(0);
  args.heads = q.size(1);
  args.queries = q.size(2);
  args.width = q.size(3);
  args.key_heads = k_cache.size(1);
  args.value_width = v_cache.size(3);
  args.q = heads_of(q);
  args.k = cache_of(k_cache, block_table);
  args.v = cache_of(v_cache, block_table);
  args.lengths = static_cast<const int64_t*>(lengths.const_data_ptr());
  args.alibi_slopes = data_of<void>(alibi_slopes);
  args.sinks = data_of<void>(sinks);
  args.left = left;
  args.right = right;
  args.scale = scale;
  args.softcap = softcap;
  args.rotary = angles_of(cos, sin, interleaved);
  const Dtype acc = acc_dtype(args.dtype);
  Tensor out = empty_heads(q, args.value_width, heads_last);
  Tensor lse = empty({args.batches, args.heads, args.queries}, acc);
  args.out = heads_of(out);
  args.lse = lse.mutable_data_ptr();

  std::vector<int64_t> starts(static_cast<size_t>(args.batches + 1));
  for (int64_t b = 0; b < args.batches; ++b) {
    starts[b + 1] = starts[b] + (args.lengths[b] + kDecodeChunk - 1) / kDecodeChunk;
  }
  args.chunk_starts = starts.data();
  const int64_t units = starts.back() * args.key_heads, rows = units * args.rows();
  const int64_t size = element_size(acc);
  const std::unique_ptr<char[]> memory(new char[rows * (args.value_width + 2) * size]);
  args.partial_out = memory.get();
  args.partial_peak = memory.get() + rows * args.value_width * size;
  args.partial_sum = memory.get() + rows * (args.value_width + 1) * size;
  parallel_units(units, kDecodeChunk * args.rows() * (args.width + args.value_width),
                 [&](int64_t begin, int64_t end) {
                   UDL_CALL(attention_decode_partial)(args, begin, end);
                 });
  const int64_t results = args.batches * args.heads * args.queries;
  parallel_units(results, units * args.value_width / std::max<int64_t>(1, args.batches),
                 [&](int64_t begin, int64_t end) {
                   UDL_CALL(attention_decode_merge)(args, begin, end);
                 });
  return {std::move(out), std::move(lse)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("attention_decode_append_", TORCH_BOX(&udl::append));
  m.impl("attention_decode_fwd", TORCH_BOX(&udl::attention_decode_fwd));
}
