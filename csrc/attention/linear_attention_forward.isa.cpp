// Linear attention's states, and its forward: a chunk of queries meets the state, and with a causal
// mask the triangle of scores of its own chunk.
#include "attention/linear_attention.isa.h"

namespace udl::UDL_ISA {
namespace {

// Working memory of the sums of chunks.
template <class T>
struct Summing {
  explicit Summing(const LinearAttention& args)
      : keys(args), queries(args, args.state == StateOf::queries) {}
  KeyChunk<T> keys;
  QueryChunk<T> queries;
};

template <class T>
void sum_chunk(const LinearAttention& args, int64_t state, int64_t chunk, Summing<T>& work,
               State<acc_t<T>> sum) {
  const int64_t b = state / args.key_heads, h = state % args.key_heads;
  if (args.state == StateOf::queries) {
    std::memset(sum.kv, 0, static_cast<size_t>(args.state_size) * sizeof(acc_t<T>));
    for (int64_t g = 0; g < args.group(); ++g) {
      work.queries.open(args, b, h * args.group() + g, chunk);
      add_queries(args, work.queries, sum);
    }
  } else {
    work.keys.open(args, b, h, chunk);
    sum_keys(args, work.keys, sum);
  }
}

// body(number in the caller's tensor, number in the state) for all of one state.
template <class A, class Body>
UDL_INLINE void for_state(const LinearAttention& args, Body body) {
  const bool turned = args.state == StateOf::keys_turned;
  const int64_t row = state_row<A>(args);
  for (int64_t d = 0; d < args.width; ++d) {
    for (int64_t e = 0; e < args.value_width; ++e) {
      body(d * args.value_width + e, turned ? e * row + d : d * row + e);
    }
  }
}

template <class A>
void load_state(const LinearAttention& args, int64_t index) {
  const State<A> carry(args, args.carry, index);
  std::memset(carry.kv, 0, static_cast<size_t>(args.state_size) * sizeof(A));
  if (args.before.kv == nullptr) return;
  const A* kv = static_cast<const A*>(args.before.kv) + index * args.width * args.value_width;
  for_state<A>(args, [=](int64_t from, int64_t to) UDL_LAMBDA { carry.kv[to] = kv[from]; });
  std::memcpy(carry.z, static_cast<const A*>(args.before.z) + index * args.width,
              static_cast<size_t>(args.width) * sizeof(A));
}

template <class A>
void store_state(const LinearAttention& args, int64_t index) {
  const State<A> carry(args, args.carry, index);
  A* kv = static_cast<A*>(args.after.kv) + index * args.width * args.value_width;
  for_state<A>(args, [=](int64_t to, int64_t from) UDL_LAMBDA { kv[to] = carry.kv[from]; });
  std::memcpy(static_cast<A*>(args.after.z) + index * args.width, carry.z,
              static_cast<size_t>(args.width) * sizeof(A));
}

// Working memory of the forward.
template <class T>
struct Forward {
  using A = acc_t<T>;
  explicit Forward(const LinearAttention& args)
      : keys(args),
        queries(args, false),
        turned_keys(args.causal ? keys.row * kChunk : 0),
        scores(args.causal ? kChunk * kChunk : 0),
        out(kChunk * keys.value_row),
        sum(carries(args) ? args.state_size : 0) {}
  KeyChunk<T> keys;
  QueryChunk<T> queries;
  Array<A> turned_keys, scores, out, sum;
  int64_t step = kStep;
};

template <class T>
void forward_queries(const LinearAttention& args, Forward<T>& work, State<acc_t<T>> state) {
  using A = acc_t<T>;
  const QueryChunk<T>& chunk = work.queries;
  const A* queries = chunk.queries();
  A *out = work.out.data(), *scores = work.scores.data();
  const int64_t row = chunk.value_row;
  wide_product<false>(queries, chunk.row, 1, chunk.n, static_cast<const A*>(state.kv), row,
                      args.width, out, row, row / kLanes<A>);
  if (args.causal) {
    lower_scores(queries, chunk.row, static_cast<const A*>(work.turned_keys.data()), args.width,
                 chunk.n, work.step, scores);
    add_lower(static_cast<const A*>(scores), work.keys.values.data, work.keys.values.stride,
              chunk.n, work.step, out, row);
  }
  for (int64_t i = 0; i < chunk.n; ++i) {
    A divisor = dot(queries + i * chunk.row, static_cast<const A*>(state.z), chunk.row);
    if (args.causal) divisor += row_sum(static_cast<const A*>(scores) + i * kChunk);
    const A factor = divisor == 0 ? A(0) : 1 / divisor;
    T* to = args.out.to<T>(chunk.b, chunk.h, chunk.first + i);
    for_lanes<A>(args.value_width, [=](int64_t d, auto tag) UDL_LAMBDA {
      const vec_t<A> v = load(static_cast<const A*>(out) + i * row + d, Full{});
      store(to + d, divisor == 0 ? vec_t<A>{} : v * factor, tag);
    });
  }
}

// One chunk of all query heads that share a key head.
template <class T>
void forward_chunk(const LinearAttention& args, int64_t index, int64_t chunk, Forward<T>& work,
                   State<acc_t<T>> state) {
  const int64_t b = index / args.key_heads, h = index % args.key_heads;
  if (args.causal) {
    work.keys.open(args, b, h, chunk);
    turn_panel(work.keys.keys(), work.keys.row, work.keys.n, work.keys.row,
               work.turned_keys.data(), kChunk);
    work.step = work.keys.finite() ? kStep : 1;
  }
  for (int64_t g = 0; g < args.group(); ++g) {
    work.queries.open(args, b, h * args.group() + g, chunk);
    forward_queries(args, work, state);
  }
}

}  // namespace

void linear_attention_state_size(const LinearAttention& args, int64_t* size) {
  if (args.dtype == Dtype::f64) {
    *size = state_rows(args) * state_row<double>(args) + whole_lanes<double>(args.width);
  } else {
    *size = state_rows(args) * state_row<float>(args) + whole_lanes<float>(args.width);
  }
}

void linear_attention_load(const LinearAttention& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args.dtype == Dtype::f64 ? load_state<double>(args, i) : load_state<float>(args, i);
  }
}

void linear_attention_store(const LinearAttention& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args.dtype == Dtype::f64 ? store_state<double>(args, i) : store_state<float>(args, i);
  }
}

void linear_attention_total(const LinearAttention& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Summing<T> work(args);
    Array<A> sum(args.state_size);
    for (int64_t index = begin; index < end; ++index) {
      for (int64_t i = 0; i < state_chunks(args); ++i) {
        sum_chunk(args, index, chunk_at(args, i), work, State<A>(args, sum.data(), 0));
        add_state(args, State<A>(args, args.carry, index), static_cast<const A*>(sum.data()));
      }
    }
  });
}

void linear_attention_sums(const LinearAttention& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Summing<T> work(args);
    const int64_t chunks = state_chunks(args);
    for (int64_t unit = begin; unit < end; ++unit) {
      sum_chunk(args, unit / chunks, unit % chunks, work, State<acc_t<T>>(args, args.sums, unit));
    }
  });
}

void linear_attention_scan(const LinearAttention& args, int64_t begin, int64_t end) {
  const int64_t pieces = state_pieces(args), chunks = state_chunks(args);
  const auto scan = [&](auto type) UDL_LAMBDA {
    using A = decltype(type);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t index = unit / pieces, first = unit % pieces * kPiece;
      const int64_t last = least(args.state_size, first + kPiece);
      A* carry = static_cast<A*>(args.carry) + index * args.state_size;
      for (int64_t c = 0; c < chunks; ++c) {
        A* sums = static_cast<A*>(args.sums) +
                  (index * chunks + chunk_at(args, c)) * args.state_size;
        for (int64_t i = first; i < last; i += kLanes<A>) {
          const vec_t<A> before = load(static_cast<const A*>(carry) + i, Full{});
          store(carry + i, before + load(static_cast<const A*>(sums) + i, Full{}), Full{});
          store(sums + i, before, Full{});
        }
      }
    }
  };
  args.dtype == Dtype::f64 ? scan(double{}) : scan(float{});
}

void linear_attention_forward(const LinearAttention& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Forward<T> work(args);
    for_units<A>(
        args, query_chunks(args), begin, end,
        [&](int64_t index, int64_t chunk, State<A> state) {
          forward_chunk(args, index, chunk, work, state);
        },
        [&] {
          sum_keys(args, work.keys, State<A>(args, work.sum.data(), 0));
          return work.sum.data();
        });
  });
}

}  // namespace udl::UDL_ISA
