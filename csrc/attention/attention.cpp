#include "attention/attention_op.h"

namespace udl {
namespace {

// What forward and backward are told alike.
struct Request {
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&mask, &bias, &key_lengths, &alibi_slopes, &sinks, &ranges, &block_mask;
  int64_t block_size, offset, left, right;
  double scale, softcap, dropout_p;
  const std::optional<Tensor>& seed;
};

// The arguments of the kernels, and the flags that they read.
struct Call {
  explicit Call(const Request& request)
      : unclean(static_cast<size_t>(request.k.size(0) * request.k.size(1) *
                                    ((request.k.size(2) + kKeyBlock - 1) / kKeyBlock))) {
    args.dtype = dtype_of(request.q);
    args.batches = request.q.size(0);
    args.heads = request.q.size(1);
    args.queries = args.row_stride = request.q.size(2);
    args.width = request.q.size(3);
    args.key_heads = request.k.size(1);
    args.keys = request.k.size(2);
    args.value_width = request.v.size(3);
    args.q = heads_of(request.q);
    args.k = heads_of(request.k);
    args.v = heads_of(request.v);
    args.mask = heads_of(request.mask);
    args.bias = heads_of(request.bias);
    if (request.bias.has_value()) args.bias_dtype = dtype_of(*request.bias);
    args.key_lengths = data_of<int64_t>(request.key_lengths);
    args.ranges = data_of<int64_t>(request.ranges);
    args.ranges_batch = request.ranges.has_value() ? request.ranges->stride(0) : 0;
    args.block_mask = heads_of(request.block_mask);
    args.block_size = request.block_size;
    args.alibi_slopes = data_of<void>(request.alibi_slopes);
    args.sinks = data_of<void>(request.sinks);
    args.offset = request.offset;
    args.left = request.left;
    args.right = request.right;
    args.scale = request.scale;
    args.softcap = request.softcap;
    args.dropout = make_dropout(request.dropout_p, request.seed);
    args.unclean = unclean.data();
    UDL_CALL(attention_query_block)(acc_dtype(args.dtype), &query_block);
    parallel_units(args.batches * args.key_heads,
                   args.keys * (args.width + args.value_width),
                   [&](int64_t begin, int64_t end) {
                     UDL_CALL(attention_find_unclean)(args, begin, end);
                   });
  }
  int64_t query_blocks() const { return (args.queries + query_block - 1) / query_block; }
  // Multiplications of a product over all scores of one head.
  int64_t work() const { return args.queries * args.keys * args.width; }

  Attention args;
  std::vector<uint8_t> unclean;
  int64_t query_block = 0;
};

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& key_lengths,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& ranges, const std::optional<Tensor>& block_mask,
    int64_t block_size, int64_t offset, int64_t left, int64_t right, double scale, double softcap, double dropout_p,
    const std::optional<Tensor>& seed, bool heads_last) {
  Call call({q, k, v, mask, bias, key_lengths, alibi_slopes, sinks, ranges, block_mask, block_size,
             offset, left, right, scale, softcap, dropout_p, seed});
  Attention& args = call.args;
  Tensor out = empty_heads(q, args.value_width, heads_last);
  Tensor lse = empty({args.batches, args.heads, args.queries}, acc_dtype(args.dtype));
  args.out = heads_of(out);
  args.lse = lse.mutable_data_ptr();
  const int64_t blocks = call.query_blocks();
  parallel_units(args.batches * args.heads * blocks, call.work() / blocks / 8,
                 [&](int64_t begin, int64_t end) {
                   UDL_CALL(attention_forward)(args, begin, end);
                 });
  return {std::move(out), std::move(lse)};
}

// One pass for all three gradients costs five products a block; where there are too few heads for the
// threads, one pass for dq by queries and one for dk and dv by keys cost seven, and share out.
void run_backward(Call& call) {
  Attention& args = call.args;
  const int64_t heads = args.batches * args.key_heads;
  const int64_t threads = torch::stable::get_num_threads();
  const auto run = [&](int64_t key_parts, int64_t query_parts) {
    args.key_parts = key_parts;
    args.query_parts = query_parts;
    const int64_t units = heads * key_parts * query_parts;
    parallel_units(units, call.work() * args.group() / (key_parts * query_parts) / 2,
                   [&](int64_t begin, int64_t end) {
                     UDL_CALL(attention_backward)(args, begin, end);
                   });
  };
  const bool with_dq = args.dq.data != nullptr;
  const bool with_keys = args.dk.data != nullptr || args.dv.data != nullptr;
  if (!with_dq && !with_keys) return;
  const int64_t parts = (2 * threads + heads - 1) / heads;
  if (with_dq && with_keys && (heads % threads == 0 || heads >= 4 * threads || threads == 1)) {
    return run(1, 1);
  }
  const Heads dq = args.dq, dk = args.dk, dv = args.dv;
  if (with_keys) {
    args.dq = Heads{};
    run(std::min<int64_t>(parts, key_blocks(args)), 1);
    args.dq = dq;
  }
  if (with_dq) {
    args.dk = args.dv = Heads{};
    run(1, std::min<int64_t>(parts, call.query_blocks()));
    args.dk = dk;
    args.dv = dv;
  }
}

// The bias's gradient in its own shape: what was expanded is summed.
Tensor bias_gradient(Call& call, const Tensor& bias) {
  Attention& args = call.args;
  const auto extent = [&](int64_t d) { return bias.stride(d) == 0 ? 1 : bias.size(d); };
  args.bias_batches = extent(0);
  args.bias_heads = extent(1);
  args.bias_queries = extent(2);
  args.bias_keys = extent(3);
  const int64_t slices = args.bias_batches * args.bias_heads;
  const int64_t n = slices * args.bias_queries * args.bias_keys;
  const Dtype acc = acc_dtype(args.dtype);
  std::vector<char> sums(static_cast<size_t>(n * element_size(acc)));
  args.dbias = sums.data();
  const int64_t blocks = args.bias_queries > 1 ? call.query_blocks() : 1;
  parallel_units(slices * blocks, args.batches * args.heads * call.work() / (slices * blocks),
                 [&](int64_t begin, int64_t end) {
                   UDL_CALL(attention_bias_backward)(args, begin, end);
                 });
  Tensor dbias = empty({args.bias_batches, args.bias_heads, args.bias_queries, args.bias_keys},
                       dtype_of(bias));
  UDL_CALL(convert)(acc, sums.data(), dtype_of(bias), dbias.mutable_data_ptr(), n, 0.0);
  return dbias;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& key_lengths,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& ranges, const std::optional<Tensor>& block_mask,
    int64_t block_size, int64_t offset, int64_t left, int64_t right, double scale, double softcap, double dropout_p,
    const std::optional<Tensor>& seed, bool heads_last, bool need_dq, bool need_dkv,
    bool need_dbias, bool need_dsinks) {
  Call call({q, k, v, mask, bias, key_lengths, alibi_slopes, sinks, ranges, block_mask, block_size,
             offset, left, right, scale, softcap, dropout_p, seed});
  Attention& args = call.args;
  const Dtype acc = acc_dtype(args.dtype);
  const Tensor dout_rows = dout.stride(3) == 1 ? dout : torch::stable::contiguous(dout);
  args.dout = heads_of(dout_rows);
  args.dlse = heads_of(dlse);
  args.out = heads_of(out);
  args.lse = const_cast<void*>(lse.const_data_ptr());  // only read here
  std::vector<char> delta(
      static_cast<size_t>(args.batches * args.heads * args.queries * element_size(acc)));
  args.delta = delta.data();
  parallel_units(args.batches * args.heads, args.queries * args.value_width,
                 [&](int64_t begin, int64_t end) {
                   UDL_CALL(attention_delta)(args, begin, end);
                 });
  const auto result = [&](const Tensor& like, bool wanted) {
    return wanted ? empty_heads(like, like.size(3), heads_last) : empty({0}, Dtype::f32);
  };
  Tensor dq = result(q, need_dq), dk = result(k, need_dkv), dv = result(v, need_dkv);
  if (need_dq) args.dq = heads_of(dq);
  if (need_dkv) {
    args.dk = heads_of(dk);
    args.dv = heads_of(dv);
  }
  run_backward(call);
  Tensor dbias =
      need_dbias && bias.has_value() ? bias_gradient(call, *bias) : empty({0}, Dtype::f32);
  Tensor dsinks = sink_gradient(args, need_dsinks);
  return {std::move(dq), std::move(dk), std::move(dv), std::move(dbias), std::move(dsinks)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&udl::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&udl::attention_bwd));
}
