// What the passes of linear attention share: rows as panels, feature maps, products with a triangle of
// scores, and the sums of chunks. To be included by *.isa.cpp only.
#pragma once

#include "attention/attention.isa.h"
#include "attention/linear_attention.h"

namespace udl::UDL_ISA {
namespace {

// Rows of a triangle that are multiplied together.
constexpr int64_t kStep = 16;

// The lanes of a width, [rows][whole_lanes].
template <class A>
UDL_INLINE int64_t state_row(const LinearAttention& args) {
  return whole_lanes<A>(args.state == StateOf::keys_turned ? args.width : args.value_width);
}
UDL_INLINE int64_t state_rows(const LinearAttention& args) {
  return args.state == StateOf::keys_turned ? args.value_width : args.width;
}

// A state in the layout of `carry`: kv [state_rows][state_row], behind it z [lanes of the width].
template <class A>
struct State {
  A *kv, *z;
  State(const LinearAttention& args, void* base, int64_t index)
      : kv(static_cast<A*>(base) + index * args.state_size),
        z(kv + state_rows(args) * state_row<A>(args)) {}
};

// out (+)= product's sum over any number of vectors of lanes.
template <bool kAdd, class A>
void wide_product(const A* left, int64_t stride, int64_t step, int64_t rows, const A* right,
                  int64_t right_stride, int64_t depth, A* out, int64_t out_stride,
                  int64_t vectors) {
  const auto at = [=](int64_t r, auto count) UDL_LAMBDA {
    product<decltype(count)::value, kAdd>(left, stride, step, rows, right + r * kLanes<A>,
                                          right_stride, depth, A(1), out + r * kLanes<A>,
                                          out_stride);
  };
  int64_t r = 0;
  for (; r + kVectors <= vectors; r += kVectors) at(r, std::integral_constant<int, kVectors>{});
  if constexpr (kVectors > 3) {
    if (vectors - r == 3) return at(r, std::integral_constant<int, 3>{});
  }
  if (vectors - r >= 2) {
    at(r, std::integral_constant<int, 2>{});
    r += 2;
  }
  if (r < vectors) at(r, std::integral_constant<int, 1>{});
}

// body(integral_constant) with the feature map.
template <class Body>
UDL_INLINE void with_feature(Feature feature, Body body) {
  switch (feature) {
    case Feature::identity:
      return body(std::integral_constant<Feature, Feature::identity>{});
    case Feature::elu_plus_one:
      return body(std::integral_constant<Feature, Feature::elu_plus_one>{});
    case Feature::relu:
      return body(std::integral_constant<Feature, Feature::relu>{});
  }
}

template <Feature feature, class V>
UDL_INLINE V feature_of(V x) {
  if constexpr (feature == Feature::elu_plus_one) {
    const V e = exp_of(x);
    return x > 0 ? x + 1 : e;
  } else if constexpr (feature == Feature::relu) {
    return x < 0 ? V{} : x;
  } else {
    return x;
  }
}

// The derivative at x, where the map gives y.
template <Feature feature, class V>
UDL_INLINE V feature_slope(V x, V y) {
  if constexpr (feature == Feature::elu_plus_one) {
    return x > 0 ? V{} + 1 : y;
  } else if constexpr (feature == Feature::relu) {
    return x <= 0 ? V{} : V{} + 1;
  } else {
    return V{} + 1;
  }
}

// body(d, tag) over the lanes of a row.
template <class A, class Body>
UDL_INLINE void for_lanes(int64_t width, Body body) {
  int64_t d = 0;
  for (; d + kLanes<A> <= width; d += kLanes<A>) body(d, Full{});
  if (d < width) body(d, Tail{static_cast<int>(width - d)});
}
template <class A>
UDL_INLINE vec_t<A> kept_lanes(vec_t<A> v, Full) {
  return v;
}
template <class A>
UDL_INLINE vec_t<A> kept_lanes(vec_t<A> v, Tail t) {
  return first_lanes<A>(v, t.n);
}

// Rows of T through the feature map, padded with zeros to whole lanes.
template <class T>
void map_rows(Feature feature, const T* rows, int64_t stride, int64_t count, int64_t width,
              acc_t<T>* out) {
  using A = acc_t<T>;
  const int64_t padded = whole_lanes<A>(width);
  with_feature(feature, [=](auto map) UDL_LAMBDA {
    for (int64_t i = 0; i < count; ++i) {
      for_lanes<A>(width, [=](int64_t d, auto tag) UDL_LAMBDA {
        const vec_t<A> y = feature_of<decltype(map)::value>(load(rows + i * stride + d, tag));
        store(out + i * padded + d, kept_lanes<A>(y, tag), Full{});
      });
    }
  });
}

// Rows of T as they are: where they lie if they can be read in whole lanes, or a copy.
template <class T>
Panel<T> plain_rows(const T* rows, int64_t stride, int64_t count, int64_t width, acc_t<T>* copy) {
  using A = acc_t<T>;
  if constexpr (std::is_same_v<T, A>) {
    if (width % kLanes<A> == 0) return {rows, stride};
  }
  map_rows(Feature::identity, rows, stride, count, width, copy);
  return {copy, whole_lanes<A>(width)};
}

// out[d][i] = rows[i][d], up to whole lanes of rows, which are zeros from `count` on; the width is of
// whole lanes.
template <class A>
void turn_panel(const A* rows, int64_t stride, int64_t count, int64_t width, A* out,
                int64_t out_stride) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t i = 0; i < count; i += L) {
    if (i + L <= count) {
      for (int64_t d = 0; d < width; d += L) {
        turn_tile(rows + i * stride + d, stride, out + d * out_stride + i, out_stride);
      }
      continue;
    }
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t k = 0; k < L; ++k) {
        out[d * out_stride + i + k] = i + k < count ? rows[(i + k) * stride + d] : A(0);
      }
    }
  }
}

// Whether all numbers of a panel are finite.
template <class A>
bool is_finite(const A* rows, int64_t stride, int64_t count, int64_t width) {
  vec_t<A> sum{};
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += kLanes<A>) sum += load(rows + i * stride + d, Full{}) * A(0);
  }
  return sum_lanes(sum) == 0;
}

template <class A>
UDL_INLINE A dot(const A* a, const A* b, int64_t padded) {
  vec_t<A> sum{};
  for (int64_t d = 0; d < padded; d += kLanes<A>) sum += load(a + d, Full{}) * load(b + d, Full{});
  return sum_lanes(sum);
}

template <class A>
UDL_INLINE A row_sum(const A* scores) {
  vec_t<A> sum{};
  for (int64_t j = 0; j < kChunk; j += kLanes<A>) sum += load(scores + j, Full{});
  return sum_lanes(sum);
}

// Keys and values of one chunk.
template <class T>
struct KeyChunk {
  using A = acc_t<T>;
  explicit KeyChunk(const LinearAttention& args)
      : row(whole_lanes<A>(args.width)),
        value_row(whole_lanes<A>(args.value_width)),
        key_array(kChunk * row),
        value_array(kChunk * value_row) {}

  void open(const LinearAttention& args, int64_t batch, int64_t head, int64_t chunk) {
    b = batch;
    h = head;
    first = chunk * kChunk;
    n = least(kChunk, args.keys - first);
    map_rows(args.feature, args.k.at<T>(b, h, first), args.k.row, n, args.width, key_array.data());
    values = plain_rows(args.v.at<T>(b, h, first), args.v.row, n, args.value_width,
                        value_array.data());
  }
  const A* keys() const { return key_array.data(); }
  bool finite() const {
    return is_finite(keys(), row, n, row) && is_finite(values.data, values.stride, n, value_row);
  }

  int64_t row, value_row, b = 0, h = 0, first = 0, n = 0;
  Panel<T> values{nullptr, 0};
  Array<A> key_array, value_array;
};

// Queries of one chunk of a query head, and their gradients.
template <class T>
struct QueryChunk {
  using A = acc_t<T>;
  QueryChunk(const LinearAttention& args, bool backward)
      : row(whole_lanes<A>(args.width)),
        value_row(whole_lanes<A>(args.value_width)),
        query_array(kChunk * row),
        dout_array(backward ? kChunk * value_row : 0) {}

  void open(const LinearAttention& args, int64_t batch, int64_t head, int64_t chunk) {
    b = batch;
    h = head;
    first = chunk * kChunk;
    n = least(kChunk, args.queries - first);
    map_rows(args.feature, args.q.at<T>(b, h, first), args.q.row, n, args.width,
             query_array.data());
    if (args.dout.data == nullptr) return;
    dout = plain_rows(args.dout.at<T>(b, h, first), args.dout.row, n, args.value_width,
                      dout_array.data());
  }
  A* queries() const { return query_array.data(); }
  bool finite() const {
    return is_finite(static_cast<const A*>(queries()), row, n, row) &&
           is_finite(dout.data, dout.stride, n, value_row);
  }
  // Where the chunk's rows stand in what has one number a query.
  int64_t at(const LinearAttention& args) const {
    return (b * args.heads + h) * args.queries + first;
  }

  int64_t row, value_row, b = 0, h = 0, first = 0, n = 0;
  Panel<T> dout{nullptr, 0};
  Array<A> query_array, dout_array;
};

// scores[i][j], kChunk apart, for j <= i < n; zeros beside them as far as other products read.
// A step of 1 keeps numbers that are not finite from rows that must not meet them.
template <class A>
void lower_scores(const A* left, int64_t stride, const A* right, int64_t depth, int64_t n,
                  int64_t step, A* scores) {
  for (int64_t i = 0; i < n; i += step) {
    const int64_t rows = least(step, n - i), lanes = whole_lanes<A>(i + rows);
    wide_product<false>(left + i * stride, stride, 1, rows, right, kChunk, depth,
                        scores + i * kChunk, kChunk, lanes / kLanes<A>);
    for (int64_t r = i; r < i + rows; ++r) {
      std::memset(scores + r * kChunk + r + 1, 0, static_cast<size_t>(kChunk - r - 1) * sizeof(A));
    }
  }
}

// out[i] += sum over j <= i of scores[i][j] * right[j].
template <class A>
void add_lower(const A* scores, const A* right, int64_t right_stride, int64_t n, int64_t step,
               A* out, int64_t padded) {
  for (int64_t i = 0; i < n; i += step) {
    const int64_t rows = least(step, n - i);
    wide_product<true>(scores + i * kChunk, kChunk, 1, rows, right, right_stride, i + rows,
                       out + i * padded, padded, padded / kLanes<A>);
  }
}

// out[j] += sum over i >= j of scores[i][j] * right[i].
template <class A>
void add_upper(const A* scores, const A* right, int64_t right_stride, int64_t n, int64_t step,
               A* out, int64_t padded) {
  for (int64_t j = 0; j < n; j += step) {
    const int64_t rows = least(step, n - j);
    wide_product<true>(scores + j * kChunk + j, 1, kChunk, rows, right + j * right_stride,
                       right_stride, n - j, out + j * padded, padded, padded / kLanes<A>);
  }
}

// out += sum over the rows of a panel, times factors[i] where given.
template <class A>
void add_rows(const A* rows, int64_t padded, int64_t count, const A* factors, A* out) {
  for (int64_t d = 0; d < padded; d += kLanes<A>) {
    vec_t<A> sum{};
    for (int64_t i = 0; i < count; ++i) {
      const vec_t<A> v = load(rows + i * padded + d, Full{});
      sum += factors != nullptr ? v * factors[i] : v;
    }
    store(out + d, load(static_cast<const A*>(out) + d, Full{}) + sum, Full{});
  }
}

// sum = the outer products of a chunk of keys.
template <class T>
void sum_keys(const LinearAttention& args, const KeyChunk<T>& chunk, State<acc_t<T>> sum) {
  using A = acc_t<T>;
  const A *keys = chunk.keys(), *values = chunk.values.data;
  const int64_t stride = chunk.values.stride;
  if (args.state == StateOf::keys_turned) {
    wide_product<false>(values, 1, stride, args.value_width, keys, chunk.row, chunk.n, sum.kv,
                        chunk.row, chunk.row / kLanes<A>);
  } else {
    wide_product<false>(keys, 1, chunk.row, args.width, values, stride, chunk.n, sum.kv,
                        chunk.value_row, chunk.value_row / kLanes<A>);
  }
  std::memset(sum.z, 0, static_cast<size_t>(chunk.row) * sizeof(A));
  add_rows(keys, chunk.row, chunk.n, static_cast<const A*>(nullptr), sum.z);
}

// sum += the outer products of a chunk of queries, over their denominators, and of dout. The queries
// are scaled where they lie.
template <class T>
void add_queries(const LinearAttention& args, const QueryChunk<T>& chunk, State<acc_t<T>> sum) {
  using A = acc_t<T>;
  const A* inverse = static_cast<const A*>(args.inverse) + chunk.at(args);
  const A* delta = static_cast<const A*>(args.delta) + chunk.at(args);
  UDL_LINES A factors[kChunk];
  for (int64_t i = 0; i < chunk.n; ++i) {
    factors[i] = -delta[i];
    A* row = chunk.queries() + i * chunk.row;
    for (int64_t d = 0; d < chunk.row; d += kLanes<A>) {
      store(row + d, load(static_cast<const A*>(row) + d, Full{}) * inverse[i], Full{});
    }
  }
  const A* queries = chunk.queries();
  wide_product<true>(queries, 1, chunk.row, args.width, chunk.dout.data, chunk.dout.stride, chunk.n,
                     sum.kv, chunk.value_row, chunk.value_row / kLanes<A>);
  add_rows(queries, chunk.row, chunk.n, static_cast<const A*>(factors), sum.z);
}

// carry += sum.
template <class A>
void add_state(const LinearAttention& args, State<A> carry, const A* sum) {
  for (int64_t i = 0; i < args.state_size; i += kLanes<A>) {
    const vec_t<A> before = load(static_cast<const A*>(carry.kv) + i, Full{});
    store(carry.kv + i, before + load(sum + i, Full{}), Full{});
  }
}

// A head's chunk by its number in the order in which the state grows.
UDL_INLINE int64_t chunk_at(const LinearAttention& args, int64_t i) {
  return args.state == StateOf::queries ? query_chunks(args) - 1 - i : i;
}

// visit(head, chunk, state) over the units of a pass. Where it carries the state along, sum() then gives
// what the chunk adds to it.
template <class A, class Visit, class Sum>
UDL_INLINE void for_units(const LinearAttention& args, int64_t chunks, int64_t begin, int64_t end,
                          Visit visit, Sum sum) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (!carries(args)) {
      const int64_t index = unit / chunks;
      visit(index, unit % chunks,
            args.causal ? State<A>(args, args.sums, unit) : State<A>(args, args.carry, index));
      continue;
    }
    const State<A> carry(args, args.carry, unit);
    for (int64_t i = 0; i < chunks; ++i) {
      visit(unit, chunk_at(args, i), carry);
      add_state(args, carry, static_cast<const A*>(sum()));
    }
  }
}

}  // namespace
}  // namespace udl::UDL_ISA
