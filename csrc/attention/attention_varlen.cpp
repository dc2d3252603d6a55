// Attention of sequences packed one behind the other: the kernels of attention on each sequence, in
// tasks of about equal work, so that one long sequence among short ones keeps all threads busy.
#include <cstring>

#include "attention/attention_op.h"

namespace udl {
namespace {

// The starts of the sequences, and the total length behind them.
std::vector<int64_t> starts_of(const Tensor& cu_seqlens, int64_t rows, const char* name) {
  const auto* data = static_cast<const int64_t*>(cu_seqlens.const_data_ptr());
  std::vector<int64_t> starts(data, data + cu_seqlens.numel());
  bool fits = !starts.empty() && starts.front() == 0 && starts.back() <= rows;
  for (size_t i = 1; i < starts.size() && fits; ++i) fits = starts[i] >= starts[i - 1];
  STD_TORCH_CHECK(fits, "attention_varlen: ", name, " must begin at 0, not decrease and end by ",
                  rows);
  return starts;
}

struct Request {
  const Tensor &q, &k, &v, &cu_seqlens_q, &cu_seqlens_k;
  const std::optional<Tensor>&alibi_slopes, &sinks;
  int64_t causal, left, right;
  double scale, softcap, dropout_p;
  const std::optional<Tensor>& seed;
};

// Rows [first, ...) of a packed tensor [N, H, D] as those of one sample.
Heads rows_from(const Tensor& x, int64_t first) {
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  return {data + first * x.stride(0) * element_size(dtype_of(x)), 0, x.stride(1), x.stride(0), 1};
}

void* shifted(void* data, int64_t elements, Dtype dtype) {
  return static_cast<char*>(data) + elements * element_size(dtype);
}

// The kernels' arguments for every sequence that has queries and keys.
struct Sequences {
  explicit Sequences(const Request& request)
      : q_starts(starts_of(request.cu_seqlens_q, request.q.size(0), "cu_seqlens_q")),
        k_starts(starts_of(request.cu_seqlens_k, request.k.size(0), "cu_seqlens_k")),
        acc(acc_dtype(dtype_of(request.q))) {
    STD_TORCH_CHECK(q_starts.size() == k_starts.size(),
                    "attention_varlen: as many sequences of keys as of queries");
    UDL_CALL(attention_query_block)(acc, &query_block);
    Attention common;
    common.dtype = dtype_of(request.q);
    common.batches = 1;
    common.heads = request.q.size(1);
    common.key_heads = request.k.size(1);
    common.width = request.q.size(2);
    common.value_width = request.v.size(2);
    common.row_stride = request.q.size(0);
    common.sinks = data_of<void>(request.sinks);
    common.left = request.left;
    common.right = request.right;
    common.scale = request.scale;
    common.softcap = request.softcap;
    common.dropout = make_dropout(request.dropout_p, request.seed);
    int64_t flags = 0;
    for (size_t s = 0; s + 1 < q_starts.size(); ++s) {
      Attention args = common;
      args.queries = q_starts[s + 1] - q_starts[s];
      args.keys = k_starts[s + 1] - k_starts[s];
      if (args.queries == 0) continue;
      args.q = rows_from(request.q, q_starts[s]);
      args.k = rows_from(request.k, k_starts[s]);
      args.v = rows_from(request.v, k_starts[s]);
      args.offset = request.causal == 1 ? args.keys - args.queries : 0;
      args.dropout_row = q_starts[s];
      const auto* slopes = data_of<char>(request.alibi_slopes);
      if (slopes != nullptr) {
        args.alibi_slopes = slopes + static_cast<int64_t>(s) * args.heads * element_size(acc);
      }
      flags += args.key_heads * key_blocks(args);
      work += args.queries * args.keys * args.heads * args.width;
      each.push_back(args);
      first_query.push_back(q_starts[s]);
      first_key.push_back(k_starts[s]);
    }
    unclean.resize(static_cast<size_t>(flags));
    uint8_t* at = unclean.data();
    for (Attention& args : each) {
      args.unclean = at;
      at += args.key_heads * key_blocks(args);
    }
    run_tasks(size(), work, [&](int64_t s) {
      UDL_CALL(attention_find_unclean)(each[s], 0, each[s].key_heads);
    });
  }
  int64_t size() const { return static_cast<int64_t>(each.size()); }
  int64_t query_blocks(const Attention& args) const {
    return (args.queries + query_block - 1) / query_block;
  }

  std::vector<int64_t> q_starts, k_starts;
  Dtype acc;
  std::vector<Attention> each;
  std::vector<int64_t> first_query, first_key;  // of each
  std::vector<uint8_t> unclean;
  int64_t query_block = 0, work = 0;
};

// Units [begin, end) of a sequence's kernel, and about how much work they are.
struct Task {
  const Attention* args;
  int64_t begin, end, work;
};

// Cuts `units` of together `work` into tasks of at most about `limit`.
void add_tasks(std::vector<Task>& tasks, const Attention& args, int64_t units, int64_t work,
               int64_t limit) {
  const int64_t parts =
      std::min(units, std::max<int64_t>(1, work / std::max<int64_t>(1, limit)));
  for (int64_t i = 0; i < parts; ++i) {
    tasks.push_back({&args, i * units / parts, (i + 1) * units / parts, work / parts});
  }
}

template <class Body>
void run_largest_first(std::vector<Task>& tasks, int64_t work, const Body& body) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.work > b.work; });
  run_tasks(static_cast<int64_t>(tasks.size()), work, [&](int64_t i) { body(tasks[i]); });
}

int64_t task_limit(int64_t work) { return work / (8 * torch::stable::get_num_threads()) + 1; }

// Rows of a packed result that no sequence writes are zero.
void clear_rows(Tensor& x, int64_t first, int64_t last) {
  const int64_t row = x.stride(0) * element_size(dtype_of(x));
  if (first < last) {
    std::memset(static_cast<char*>(x.mutable_data_ptr()) + first * row, 0,
                static_cast<size_t>((last - first) * row));
  }
}

void fill_lse(const Sequences& sequences, Tensor& lse) {
  const int64_t heads = lse.size(0), rows = lse.size(1);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = sequences.q_starts.back(); i < rows; ++i) {
      void* at = shifted(lse.mutable_data_ptr(), h * rows + i, sequences.acc);
      if (sequences.acc == Dtype::f64) {
        *static_cast<double*>(at) = -INFINITY;
      } else {
        *static_cast<float*>(at) = -INFINITY;
      }
    }
  }
}

std::tuple<Tensor, Tensor> attention_varlen_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, int64_t causal, int64_t left, int64_t right, double scale,
    double softcap, double dropout_p, const std::optional<Tensor>& seed) {
  Sequences sequences({q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, causal, left,
                       right, scale, softcap, dropout_p, seed});
  Tensor out = empty({q.size(0), q.size(1), v.size(2)}, dtype_of(q));
  Tensor lse = empty({q.size(1), q.size(0)}, sequences.acc);
  clear_rows(out, sequences.q_starts.back(), q.size(0));
  fill_lse(sequences, lse);
  std::vector<Task> tasks;
  for (int64_t s = 0; s < sequences.size(); ++s) {
    Attention& args = sequences.each[s];
    args.out = rows_from(out, sequences.first_query[s]);
    args.lse = shifted(lse.mutable_data_ptr(), sequences.first_query[s], sequences.acc);
    const int64_t work = args.queries * args.keys * args.heads * args.width;
    add_tasks(tasks, args, args.heads * sequences.query_blocks(args), work,
              task_limit(sequences.work));
  }
  run_largest_first(tasks, sequences.work, [](const Task& task) {
    UDL_CALL(attention_forward)(*task.args, task.begin, task.end);
  });
  return {std::move(out), std::move(lse)};
}

// A long sequence is cut into parts, with one pass for dk and dv and one for dq; the others take all
// three gradients in one pass. The bits are the same.
void run_backward(Sequences& sequences) {
  std::vector<Attention> passes;
  passes.reserve(sequences.each.size() * 2);
  std::vector<Task> tasks;
  const int64_t limit = task_limit(sequences.work);
  const auto add = [&](Attention args, int64_t parts, bool by_keys) {
    args.key_parts = by_keys ? parts : 1;
    args.query_parts = by_keys ? 1 : parts;
    passes.push_back(args);
    add_tasks(tasks, passes.back(), args.key_heads * parts,
              args.queries * args.keys * args.heads * args.width, limit);
  };
  for (const Attention& args : sequences.each) {
    if (args.keys == 0) continue;
    const int64_t head_work = args.queries * args.keys * args.group() * args.width;
    const int64_t parts = std::max<int64_t>(1, head_work / limit);
    const bool with_keys = args.dk.data != nullptr, with_dq = args.dq.data != nullptr;
    if (parts == 1 && with_keys && with_dq) {
      add(args, 1, true);
      continue;
    }
    Attention pass = args;
    pass.dq = Heads{};
    if (with_keys) add(pass, std::min(parts, key_blocks(args)), true);
    pass = args;
    pass.dk = pass.dv = Heads{};
    if (with_dq) add(pass, std::min(parts, sequences.query_blocks(args)), false);
  }
  run_largest_first(tasks, sequences.work, [](const Task& task) {
    UDL_CALL(attention_backward)(*task.args, task.begin, task.end);
  });
}

// Rows of dq, or of dk and dv, of sequences that have no keys, or no queries.
void clear_unmatched(const Sequences& sequences, Tensor& x, bool of_queries) {
  const auto& own = of_queries ? sequences.q_starts : sequences.k_starts;
  const auto& other = of_queries ? sequences.k_starts : sequences.q_starts;
  for (size_t s = 0; s + 1 < own.size(); ++s) {
    if (other[s] == other[s + 1]) clear_rows(x, own[s], own[s + 1]);
  }
  clear_rows(x, own.back(), x.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_varlen_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, int64_t causal, int64_t left, int64_t right, double scale,
    double softcap, double dropout_p, const std::optional<Tensor>& seed, bool need_dq,
    bool need_dkv, bool need_dsinks) {
  Sequences sequences({q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, causal, left,
                       right, scale, softcap, dropout_p, seed});
  const Dtype acc = sequences.acc;
  const Tensor dout_rows = dout.stride(2) == 1 ? dout : torch::stable::contiguous(dout);
  std::vector<char> delta(static_cast<size_t>(lse.numel() * element_size(acc)));
  const auto result = [&](const Tensor& like, bool wanted) {
    return wanted ? empty({like.size(0), like.size(1), like.size(2)}, dtype_of(like))
                  : empty({0}, Dtype::f32);
  };
  Tensor dq = result(q, need_dq), dk = result(k, need_dkv), dv = result(v, need_dkv);
  if (need_dq) clear_unmatched(sequences, dq, true);
  if (need_dkv) {
    clear_unmatched(sequences, dk, false);
    clear_unmatched(sequences, dv, false);
  }
  std::vector<Task> tasks;
  for (int64_t s = 0; s < sequences.size(); ++s) {
    Attention& args = sequences.each[s];
    const int64_t query = sequences.first_query[s], key = sequences.first_key[s];
    args.out = rows_from(out, query);
    args.dout = rows_from(dout_rows, query);
    args.lse = shifted(const_cast<void*>(lse.const_data_ptr()), query, acc);  // only read here
    args.delta = shifted(delta.data(), query, acc);
    if (dlse.has_value()) {
      const auto* data = static_cast<const char*>(dlse->const_data_ptr());
      args.dlse = {data + query * element_size(acc), 0, dlse->stride(0), dlse->stride(1), 1};
    }
    if (need_dq) args.dq = rows_from(dq, query);
    if (need_dkv) {
      args.dk = rows_from(dk, key);
      args.dv = rows_from(dv, key);
    }
    add_tasks(tasks, args, args.heads, args.queries * args.heads * args.value_width,
              q.size(0) * args.heads * args.value_width / 16);
  }
  run_largest_first(tasks, dout.numel(), [](const Task& task) {
    UDL_CALL(attention_delta)(*task.args, task.begin, task.end);
  });
  run_backward(sequences);
  Attention whole = sequences.each.empty() ? Attention{} : sequences.each.front();
  whole.dtype = dtype_of(q);
  whole.queries = sequences.q_starts.back();
  whole.heads = q.size(1);
  whole.batches = sequences.each.empty() ? 0 : 1;
  whole.lse = const_cast<void*>(lse.const_data_ptr());
  whole.delta = delta.data();
  Tensor dsinks = sink_gradient(whole, need_dsinks);
  return {std::move(dq), std::move(dk), std::move(dv), std::move(dsinks)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("attention_varlen_fwd", TORCH_BOX(&udl::attention_varlen_fwd));
  m.impl("attention_varlen_bwd", TORCH_BOX(&udl::attention_varlen_bwd));
}
