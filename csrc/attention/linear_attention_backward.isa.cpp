// Linear attention's backward. Queries: with g = S dout + sum over j of (v_j . dout) phi(k_j), in which
// S is the state, a row's dout . out is phi(q) . g over its denominator; so the output is not needed.
// Keys: the state of queries, from the last chunk on, gives them what later queries ask of them.
#include "attention/linear_attention.isa.h"

namespace udl::UDL_ISA {
namespace {

// Working memory of one thread.
template <class T>
struct Backward {
  using A = acc_t<T>;
  explicit Backward(const LinearAttention& args)
      : keys(args),
        queries(args, true),
        turned_keys(args.causal ? keys.row * kChunk : 0),
        turned_values(args.causal ? keys.value_row * kChunk : 0),
        scores(args.causal ? kChunk * kChunk : 0),
        gradients(args.causal ? kChunk * kChunk : 0),
        of_width(kChunk * keys.row),
        of_values(kChunk * keys.value_row),
        turned_state(keys.row * keys.value_row),
        sum(carries(args) ? args.state_size : 0) {}

  // Keys and values of a chunk, and turned where scores are formed.
  void open_keys(const LinearAttention& args, int64_t b, int64_t h, int64_t chunk) {
    keys.open(args, b, h, chunk);
    if (!args.causal) return;
    turn_panel(keys.keys(), keys.row, keys.n, keys.row, turned_keys.data(), kChunk);
    turn_panel(keys.values.data, keys.values.stride, keys.n, keys.value_row, turned_values.data(),
               kChunk);
    finite_keys = keys.finite();
  }
  // Queries of the same chunk, their scores and phi(q) . phi(k), dout . v.
  void open_queries(const LinearAttention& args, int64_t b, int64_t h, int64_t chunk) {
    queries.open(args, b, h, chunk);
    if (!args.causal) return;
    step = finite_keys && queries.finite() ? kStep : 1;
    lower_scores(static_cast<const A*>(queries.queries()), queries.row,
                 static_cast<const A*>(turned_keys.data()), args.width, queries.n, step,
                 scores.data());
    lower_scores(queries.dout.data, queries.dout.stride,
                 static_cast<const A*>(turned_values.data()), args.value_width, queries.n, step,
                 gradients.data());
  }
  // gradients = those of the scores, of row i: (gradient - delta) / denominator.
  void finish_gradients(int64_t i, A inverse, A delta) {
    A* row = gradients.data() + i * kChunk;
    for (int64_t j = 0; j <= i; j += kLanes<A>) {
      const vec_t<A> v = (load(static_cast<const A*>(row) + j, Full{}) - delta) * inverse;
      store(row + j, v, Full{});
    }
    std::memset(row + i + 1, 0, static_cast<size_t>(kChunk - i - 1) * sizeof(A));
  }

  KeyChunk<T> keys;
  QueryChunk<T> queries;
  Array<A> turned_keys, turned_values, scores, gradients, of_width, of_values, turned_state, sum;
  bool finite_keys = true;
  int64_t step = kStep;
};

// A panel times the slope of the feature map, as rows of T.
template <class T>
void store_mapped(Feature feature, const T* x, int64_t stride, const acc_t<T>* y,
                  const acc_t<T>* gradients, int64_t count, int64_t width, T* to,
                  int64_t to_stride) {
  using A = acc_t<T>;
  const int64_t padded = whole_lanes<A>(width);
  with_feature(feature, [=](auto map) UDL_LAMBDA {
    for (int64_t i = 0; i < count; ++i) {
      for_lanes<A>(width, [=](int64_t d, auto tag) UDL_LAMBDA {
        const vec_t<A> slope = feature_slope<decltype(map)::value>(
            load(x + i * stride + d, tag), load(y + i * padded + d, Full{}));
        store(to + i * to_stride + d, load(gradients + i * padded + d, Full{}) * slope, tag);
      });
    }
  });
}

template <class T>
void backward_queries(const LinearAttention& args, Backward<T>& work, State<acc_t<T>> state) {
  using A = acc_t<T>;
  const QueryChunk<T>& chunk = work.queries;
  const A *queries = chunk.queries(), *z = state.z;
  A* found = work.of_width.data();
  wide_product<false>(chunk.dout.data, chunk.dout.stride, 1, chunk.n,
                      static_cast<const A*>(state.kv), chunk.row, args.value_width, found,
                      chunk.row, chunk.row / kLanes<A>);
  for (int64_t i = 0; i < chunk.n; ++i) {
    A* row = found + i * chunk.row;
    A divisor = dot(queries + i * chunk.row, z, chunk.row);
    A along = dot(queries + i * chunk.row, static_cast<const A*>(row), chunk.row);
    if (args.causal) {
      const A *scores = work.scores.data() + i * kChunk, *dots = work.gradients.data() + i * kChunk;
      divisor += row_sum(scores);
      along += dot(scores, dots, kChunk);
    }
    const A inverse = divisor == 0 ? A(0) : 1 / divisor;
    const A delta = divisor == 0 ? A(0) : along * inverse;
    static_cast<A*>(args.inverse)[chunk.at(args) + i] = inverse;
    static_cast<A*>(args.delta)[chunk.at(args) + i] = delta;
    for (int64_t d = 0; d < chunk.row; d += kLanes<A>) {
      const vec_t<A> g = load(static_cast<const A*>(row) + d, Full{}) - load(z + d, Full{}) * delta;
      store(row + d, g * inverse, Full{});
    }
    if (args.causal) work.finish_gradients(i, inverse, delta);
  }
  if (args.dq.data == nullptr) return;
  if (args.causal) {
    add_lower(static_cast<const A*>(work.gradients.data()), work.keys.keys(), chunk.row, chunk.n,
              work.step, found, chunk.row);
  }
  store_mapped(args.feature, args.q.at<T>(chunk.b, chunk.h, chunk.first), args.q.row, queries,
               static_cast<const A*>(found), chunk.n, args.width,
               args.dq.to<T>(chunk.b, chunk.h, chunk.first), args.dq.row);
}

template <class T>
void queries_chunk(const LinearAttention& args, int64_t index, int64_t chunk, Backward<T>& work,
                   State<acc_t<T>> state) {
  const int64_t b = index / args.key_heads, h = index % args.key_heads;
  if (args.causal) work.open_keys(args, b, h, chunk);
  for (int64_t g = 0; g < args.group(); ++g) {
    work.open_queries(args, b, h * args.group() + g, chunk);
    backward_queries(args, work, state);
  }
}

// What the queries of one head in the keys' own chunk add to the gradients of phi(k) and v.
template <class T>
void add_own_queries(const LinearAttention& args, Backward<T>& work) {
  using A = acc_t<T>;
  const QueryChunk<T>& chunk = work.queries;
  const A* inverse = static_cast<const A*>(args.inverse) + chunk.at(args);
  const A* delta = static_cast<const A*>(args.delta) + chunk.at(args);
  for (int64_t i = 0; i < chunk.n; ++i) {
    work.finish_gradients(i, inverse[i], delta[i]);
    A* row = work.scores.data() + i * kChunk;
    for (int64_t j = 0; j <= i; ++j) row[j] *= inverse[i];
  }
  add_upper(static_cast<const A*>(work.gradients.data()), static_cast<const A*>(chunk.queries()),
            chunk.row, chunk.n, work.step, work.of_width.data(), chunk.row);
  add_upper(static_cast<const A*>(work.scores.data()), chunk.dout.data, chunk.dout.stride, chunk.n,
            work.step, work.of_values.data(), chunk.value_row);
}

// dk and dv of a chunk; and in work.sum, where it carries the state, what its queries add to that.
template <class T>
void keys_chunk(const LinearAttention& args, int64_t index, int64_t chunk, Backward<T>& work,
                State<acc_t<T>> state) {
  using A = acc_t<T>;
  const int64_t b = index / args.key_heads, h = index % args.key_heads;
  work.open_keys(args, b, h, chunk);
  const KeyChunk<T>& keys = work.keys;
  A *dk = work.of_width.data(), *dv = work.of_values.data();
  turn_panel(static_cast<const A*>(state.kv), keys.value_row, args.width, keys.value_row,
             work.turned_state.data(), keys.row);
  wide_product<false>(keys.keys(), keys.row, 1, keys.n, static_cast<const A*>(state.kv),
                      keys.value_row, args.width, dv, keys.value_row, keys.value_row / kLanes<A>);
  wide_product<false>(keys.values.data, keys.values.stride, 1, keys.n,
                      static_cast<const A*>(work.turned_state.data()), keys.row, args.value_width,
                      dk, keys.row, keys.row / kLanes<A>);
  for (int64_t j = 0; j < keys.n; ++j) {
    for (int64_t d = 0; d < keys.row; d += kLanes<A>) {
      A* at = dk + j * keys.row + d;
      store(at, load(static_cast<const A*>(at), Full{}) +
                    load(static_cast<const A*>(state.z) + d, Full{}), Full{});
    }
  }
  work.sum.clear();
  for (int64_t g = 0; g < args.group() && args.causal; ++g) {
    work.open_queries(args, b, h * args.group() + g, chunk);
    add_own_queries(args, work);
    if (carries(args)) add_queries(args, work.queries, State<A>(args, work.sum.data(), 0));
  }
  store_mapped(args.feature, args.k.at<T>(b, h, keys.first), args.k.row, keys.keys(),
               static_cast<const A*>(dk), keys.n, args.width, args.dk.to<T>(b, h, keys.first),
               args.dk.row);
  store_mapped(Feature::identity, args.v.at<T>(b, h, keys.first), args.v.row,
               static_cast<const A*>(dv), static_cast<const A*>(dv), keys.n, args.value_width,
               args.dv.to<T>(b, h, keys.first), args.dv.row);
}

}  // namespace

void linear_attention_backward_queries(const LinearAttention& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Backward<T> work(args);
    for_units<A>(
        args, query_chunks(args), begin, end,
        [&](int64_t index, int64_t chunk, State<A> state) {
          queries_chunk(args, index, chunk, work, state);
        },
        [&] {
          sum_keys(args, work.keys, State<A>(args, work.sum.data(), 0));
          return work.sum.data();
        });
  });
}

void linear_attention_backward_keys(const LinearAttention& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Backward<T> work(args);
    for_units<A>(
        args, key_chunks(args), begin, end,
        [&](int64_t index, int64_t chunk, State<A> state) {
          keys_chunk(args, index, chunk, work, state);
        },
        [&] { return work.sum.data(); });
  });
}

}  // namespace udl::UDL_ISA
