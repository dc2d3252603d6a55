// Rows of at most 16 elements, a row a lane: a row at a time would spend its time on sums across
// lanes and on tails (5 to 10 times slower at width 1 to 7). A block of rows is turned so that each
// of its columns is one vector, computed on, and turned back.
#pragma once

#include "normalization/row_norm.h"
#include "vec.h"

namespace udl::UDL_ISA {
namespace {

constexpr int64_t kNarrow = 16;

inline bool one_after_another(const Rows& rows, int64_t n) {
  return rows.ndim == 0 || (rows.ndim == 1 && rows.stride[0] == n);
}

// Up to kLanes rows of n elements as columns[n][kLanes]; lanes without a row hold zeros.
template <class T>
void turn_in(const T* rows, int64_t n, int64_t count, acc_t<T>* columns) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  A flat[kNarrow * L];
  for (int64_t i = 0; i < n * L; i += L) {
    const int64_t left = n * count - i;
    const vec_t<A> v = left >= L  ? load(rows + i, Full{})
                       : left > 0 ? load(rows + i, Tail{static_cast<int>(left)})
                                  : vec_t<A>{};
    store(flat + i, v, Full{});
  }
  for (int r = 0; r < L; ++r) {
    for (int64_t j = 0; j < n; ++j) columns[j * L + r] = flat[r * n + j];
  }
}

template <class T>
void turn_out(const acc_t<T>* columns, int64_t n, int64_t count, T* rows) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  A flat[kNarrow * L];
  for (int r = 0; r < L; ++r) {
    for (int64_t j = 0; j < n; ++j) flat[r * n + j] = columns[j * L + r];
  }
  for (int64_t i = 0; i < n * count; i += L) {
    const int64_t left = n * count - i;
    if (left >= L) {
      store(rows + i, load(flat + i, Full{}), Full{});
    } else {
      store(rows + i, load(flat + i, Full{}), Tail{static_cast<int>(left)});
    }
  }
}

template <class A>
UDL_INLINE vec_t<A> root(vec_t<A> v) {
  for (int i = 0; i < kLanes<A>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// One block of the forward; where a variance is not finite the caller redoes the row.
template <bool kCenter, class T>
vec_t<acc_t<T>> forward_block(const RowNormForward& args, const T* x, T* y, int64_t count,
                              vec_t<acc_t<T>>& mean, vec_t<acc_t<T>>& rstd) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const int64_t n = args.n;
  const A* weight = static_cast<const A*>(args.weight);
  const A* bias = static_cast<const A*>(args.bias);
  A columns[kNarrow * L];
  turn_in(x, n, count, columns);
  mean = vec_t<A>{};
  for (int64_t j = 0; kCenter && j < n; ++j) mean += load(columns + j * L, Full{});
  mean /= static_cast<A>(n);
  vec_t<A> squares{};
  for (int64_t j = 0; j < n; ++j) {
    const vec_t<A> d = load(columns + j * L, Full{}) - mean;
    squares += d * d;
  }
  const vec_t<A> variance = squares / static_cast<A>(n);
  rstd = 1 / root<A>(variance + static_cast<A>(args.eps));
  for (int64_t j = 0; j < n; ++j) {
    vec_t<A> v = (load(columns + j * L, Full{}) - mean) * rstd;
    if (args.cast_before_weight) v = round_to(v, T{});
    if (weight != nullptr) v *= weight[j];
    if (bias != nullptr) v += bias[j];
    store(columns + j * L, v, Full{});
  }
  turn_out(columns, n, count, y);
  return variance;
}

// Gradients of the rows of one chunk; sums hold dweight and dbias, n vectors each.
template <bool kCenter, class T>
void backward_narrow_chunk(const RowNormBackward& args, int64_t first, int64_t last,
                           acc_t<T>* dweight, acc_t<T>* dbias) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const int64_t n = args.n;
  const A* weight = static_cast<const A*>(args.weight);
  A dy[kNarrow * L], x_hat[kNarrow * L];
  vec_t<A> dw[kNarrow] = {}, db[kNarrow] = {};
  for (int64_t r = first; r < last; r += L) {
    const int64_t count = last - r < L ? last - r : L;
    const Tail tail{static_cast<int>(count)};
    vec_t<A> mean{};
    if (kCenter) mean = load(static_cast<const A*>(args.mean) + r, tail);
    const vec_t<A> rstd = load(static_cast<const A*>(args.rstd) + r, tail);
    turn_in(args.dy.row<T>(r), n, count, dy);
    turn_in(args.x.row<T>(r), n, count, x_hat);
    vec_t<A> g_mean{}, h_mean{};
    for (int64_t j = 0; j < n; ++j) {
      const vec_t<A> d = load(dy + j * L, Full{});
      const vec_t<A> h = (load(x_hat + j * L, Full{}) - mean) * rstd;
      const vec_t<A> g = rounded(Pack<A>{weight != nullptr ? d * weight[j] : d, d}).a;
      store(x_hat + j * L, h, Full{});
      store(dy + j * L, g, Full{});
      dw[j] += d * h;
      db[j] += d;
      if (kCenter) g_mean += g;
      h_mean += g * h;
    }
    g_mean /= static_cast<A>(n);
    h_mean /= static_cast<A>(n);
    if (args.dx == nullptr) continue;
    for (int64_t j = 0; j < n; ++j) {
      const vec_t<A> h = load(x_hat + j * L, Full{});
      store(dy + j * L, (load(dy + j * L, Full{}) - g_mean - h * h_mean) * rstd, Full{});
    }
    turn_out(dy, n, count, static_cast<T*>(args.dx) + r * n);
  }
  for (int64_t j = 0; j < n; ++j) {
    if (dweight != nullptr) dweight[j] = sum_lanes(dw[j]);
    if (dbias != nullptr) dbias[j] = sum_lanes(db[j]);
  }
}

}  // namespace
}  // namespace udl::UDL_ISA
