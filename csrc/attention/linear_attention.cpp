#include "attention/linear_attention.h"

#include <tuple>

#include "tensor.h"

namespace udl {
namespace {

Heads heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), 1};
}

LinearState state_of(const std::optional<Tensor>& kv, const std::optional<Tensor>& z) {
  // Only written where it is a result.
  if (!kv.has_value() || !z.has_value()) return {};
  return {const_cast<void*>(kv->const_data_ptr()), const_cast<void*>(z->const_data_ptr())};
}

// Above so many bytes the chunks of a head follow each other, whatever the number of heads.
constexpr int64_t kLargestSums = int64_t{1} << 28;

// Which chunks a state gets before a pass: none, all, or with a causal mask those before each chunk,
// which the pass may also add as it goes along.
enum class Chunks { none, all, before_each };

class Call {
 public:
  Call(const Tensor& q, const Tensor& k, const Tensor& v, int64_t feature, bool causal)
      : acc(acc_dtype(dtype_of(q))) {
    args.dtype = dtype_of(q);
    args.feature = static_cast<Feature>(feature);
    args.causal = causal;
    args.batches = q.size(0);
    args.heads = q.size(1);
    args.queries = q.size(2);
    args.width = q.size(3);
    args.key_heads = k.size(1);
    args.keys = k.size(2);
    args.value_width = v.size(3);
    args.q = heads_of(q);
    args.k = heads_of(k);
    args.v = heads_of(v);
  }

  void open_state(StateOf state, LinearState before, Chunks which) {
    args.state = state;
    args.before = before;
    UDL_CALL(linear_attention_state_size)(args, &args.state_size);
    carry_ = empty({args.states() * args.state_size}, acc);
    args.carry = carry_->mutable_data_ptr();
    args.sums = nullptr;
    parallel_units(args.states(), args.state_size, [&](int64_t begin, int64_t end) {
      UDL_CALL(linear_attention_load)(args, begin, end);
    });
    if (which == Chunks::none) return;
    const int64_t chunks = state_chunks(args);
    const int64_t work = chunk_work() * (state == StateOf::queries ? args.group() : 1);
    if (!cut_heads(chunks)) {
      if (args.causal && which == Chunks::before_each) return;
      parallel_units(args.states(), chunks * work, [&](int64_t begin, int64_t end) {
        UDL_CALL(linear_attention_total)(args, begin, end);
      });
      return;
    }
    sums_ = empty({args.states() * chunks * args.state_size}, acc);
    args.sums = sums_->mutable_data_ptr();
    parallel_units(args.states() * chunks, work, [&](int64_t begin, int64_t end) {
      UDL_CALL(linear_attention_sums)(args, begin, end);
    });
    parallel_units(args.states() * state_pieces(args), chunks * kPiece,
                   [&](int64_t begin, int64_t end) {
                     UDL_CALL(linear_attention_scan)(args, begin, end);
                   });
  }

  // pass(begin, end) over its units: heads, or chunks of them.
  template <class Pass>
  void run(int64_t chunks, const Pass& pass) const {
    const int64_t head = chunks * args.group() * chunk_work();
    if (carries(args)) return parallel_units(args.states(), head, pass);
    parallel_units(args.states() * chunks, head / chunks, pass);
  }

  // after = carry.
  void close_state(LinearState after) {
    args.after = after;
    parallel_units(args.states(), args.state_size, [&](int64_t begin, int64_t end) {
      UDL_CALL(linear_attention_store)(args, begin, end);
    });
  }

  LinearAttention args;
  const Dtype acc;

 private:
  // In elements that take about as long as the products of one chunk.
  int64_t chunk_work() const {
    return kChunk * (args.width * args.value_width + kChunk * (args.width + args.value_width)) / 8;
  }
  // Whether chunks are summed each for itself, since heads do not fill the threads. The bits are the
  // same: a chunk's sum is complete before it is added to what stands before it.
  bool cut_heads(int64_t chunks) const {
    const int64_t threads = torch::stable::get_num_threads(), heads = args.states();
    const int64_t bytes = heads * chunks * args.state_size * element_size(acc);
    return chunks > 1 && heads % threads != 0 && heads < 4 * threads && bytes <= kLargestSums;
  }

  std::optional<Tensor> carry_, sums_;
};

std::tuple<Tensor, Tensor, Tensor> linear_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& kv,
    const std::optional<Tensor>& z, int64_t feature_map, bool causal) {
  Call call(q, k, v, feature_map, causal);
  LinearAttention& args = call.args;
  Tensor out = empty({args.batches, args.heads, args.queries, args.value_width}, args.dtype);
  Tensor kv_out = empty({args.batches, args.key_heads, args.width, args.value_width}, call.acc);
  Tensor z_out = empty({args.batches, args.key_heads, args.width}, call.acc);
  args.out = heads_of(out);
  call.open_state(StateOf::keys, state_of(kv, z), Chunks::before_each);
  call.run(query_chunks(args), [&](int64_t begin, int64_t end) {
    UDL_CALL(linear_attention_forward)(args, begin, end);
  });
  call.close_state({kv_out.mutable_data_ptr(), z_out.mutable_data_ptr()});
  return {std::move(out), std::move(kv_out), std::move(z_out)};
}

// kv and z are the state that queries start from: with a causal mask the one before all keys, else the
// one after them.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd(
    const Tensor& dout, const std::optional<Tensor>& dkv_out, const std::optional<Tensor>& dz_out,
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& kv,
    const std::optional<Tensor>& z, int64_t feature_map, bool causal, bool need_dq, bool need_dkv,
    bool need_dstate) {
  Call call(q, k, v, feature_map, causal);
  LinearAttention& args = call.args;
  const Tensor dout_rows = dout.stride(3) == 1 ? dout : torch::stable::contiguous(dout);
  args.dout = heads_of(dout_rows);
  const auto result = [&](const Tensor& like, bool wanted) {
    return wanted ? empty_contiguous_like(like) : empty({0}, Dtype::f32);
  };
  Tensor dq = result(q, need_dq), dk = result(k, need_dkv), dv = result(v, need_dkv);
  if (need_dq) args.dq = heads_of(dq);
  const Tensor rows = empty({2, args.batches * args.heads * args.queries}, call.acc);
  args.inverse = rows.mutable_data_ptr();
  args.delta = static_cast<char*>(args.inverse) + rows.stride(0) * element_size(call.acc);
  call.open_state(StateOf::keys_turned, state_of(kv, z),
                  causal ? Chunks::before_each : Chunks::none);
  call.run(query_chunks(args), [&](int64_t begin, int64_t end) {
    UDL_CALL(linear_attention_backward_queries)(args, begin, end);
  });
  Tensor dkv = empty({0}, Dtype::f32), dz = empty({0}, Dtype::f32);
  if (need_dkv || need_dstate) {
    call.open_state(StateOf::queries, state_of(dkv_out, dz_out),
                    need_dkv ? Chunks::before_each : Chunks::all);
  }
  if (need_dkv) {
    args.dk = heads_of(dk);
    args.dv = heads_of(dv);
    call.run(key_chunks(args), [&](int64_t begin, int64_t end) {
      UDL_CALL(linear_attention_backward_keys)(args, begin, end);
    });
  }
  if (need_dstate) {
    dkv = empty({args.batches, args.key_heads, args.width, args.value_width}, call.acc);
    dz = empty({args.batches, args.key_heads, args.width}, call.acc);
    call.close_state({dkv.mutable_data_ptr(), dz.mutable_data_ptr()});
  }
  return {std::move(dq), std::move(dk), std::move(dv), std::move(dkv), std::move(dz)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("linear_attention_fwd", TORCH_BOX(&udl::linear_attention_fwd));
  m.impl("linear_attention_bwd", TORCH_BOX(&udl::linear_attention_bwd));
}
