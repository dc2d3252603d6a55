// The row kernels behind layer_norm (kCenter) and rms_norm, one row at a time: statistics in two
// passes over a row that stays in the L1 or L2 cache.
#pragma once

#include "normalization/row_norm.h"
#include "normalization/row_norm_narrow.isa.h"
#include "vec.h"

namespace udl::UDL_ISA {
namespace {

// From 8 KB a row (kWide), the lines of its result are fetched for writing while it is summed: 1.3
// times faster at 4096 float32 columns, but slower for narrow rows, which the hardware foresees.
template <class T>
UDL_INLINE bool is_wide(int64_t n) {
  return n * static_cast<int64_t>(sizeof(T)) >= 8192;
}

// Whether to fetch the row after the next while one is written: 1.4 times faster where all fits the L2
// cache, 1.3 times slower from memory.
UDL_INLINE bool fetches_ahead(int64_t bytes_of_all_rows) { return bytes_of_all_rows <= 1 << 20; }

// Sums over wider rows are added up from pieces of this width, which bounds their rounding error.
constexpr int64_t kPiece = 4096;

template <class A>
struct Moments {
  A mean;  // 0 without centring
  A rstd;
};

// First pass: the mean (kCenter) or the mean square of x. y is where the row's result will go.
template <bool kCenter, bool kWide, class T, class Y>
acc_t<T> first_moment(const T* x, int64_t n, const Y* y) {
  using A = acc_t<T>;
  A sum = 0;
  for (int64_t start = 0; start < n; start += kPiece) {
    const T* piece = x + start;
    sum += sum_packs<T>(n - start < kPiece ? n - start : kPiece,
                        [=](int64_t i, auto tag) UDL_LAMBDA {
                          if (kWide) prefetch_pack_write(y + start + i);
                          const Pack<A> v = load_pack(piece + i, tag);
                          return kCenter ? v : v * v;
                        });
  }
  return sum / static_cast<A>(n);
}

// Second pass: the mean square of x - mean.
template <class T>
acc_t<T> variance_around(const T* x, int64_t n, acc_t<T> mean) {
  using A = acc_t<T>;
  A sum = 0;
  for (int64_t start = 0; start < n; start += kPiece) {
    const T* piece = x + start;
    sum += sum_packs<T>(n - start < kPiece ? n - start : kPiece,
                        [=](int64_t i, auto tag) UDL_LAMBDA {
                          const Pack<A> d = keep<T>(load_pack(piece + i, tag) - mean, tag);
                          return d * d;
                        });
  }
  return sum / static_cast<A>(n);
}

// The affine parameters in the pack order of the rows.
template <class T>
struct Affine {
  PackOrder<T> weight, bias;
};

template <bool kCenter, class T>
UDL_INLINE Pack<acc_t<T>> normalise(Pack<acc_t<T>> v, acc_t<T> mean, acc_t<T> rstd) {
  return kCenter ? (v - mean) * rstd : v * rstd;
}

// One row of the result; next is the row to fetch meanwhile.
template <bool kCenter, class T>
void write_row(const RowNormForward& args, const Affine<T>& affine, const T* x, const T* next, T* y,
               acc_t<T> mean, acc_t<T> rstd) {
  using A = acc_t<T>;
  const A* weight = affine.weight.data();
  const A* bias = affine.bias.data();
  const auto write = [=](auto apply) UDL_LAMBDA {
    for_packs<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
      prefetch_pack(next + i);
      store_pack(y + i, apply(i, normalise<kCenter, T>(load_pack(x + i, tag), mean, rstd)), tag);
    });
  };
  if (weight == nullptr && bias == nullptr) {
    write([](int64_t, Pack<A> v) UDL_LAMBDA { return v; });
  } else if (bias == nullptr && args.cast_before_weight) {
    write([=](int64_t i, Pack<A> v) UDL_LAMBDA {
      return round_pack<T>(v) * load_ordered<T>(weight + i);
    });
  } else if (bias == nullptr) {
    write([=](int64_t i, Pack<A> v) UDL_LAMBDA { return v * load_ordered<T>(weight + i); });
  } else if (weight == nullptr) {
    write([=](int64_t i, Pack<A> v) UDL_LAMBDA { return v + load_ordered<T>(bias + i); });
  } else {
    write([=](int64_t i, Pack<A> v) UDL_LAMBDA {
      return v * load_ordered<T>(weight + i) + load_ordered<T>(bias + i);
    });
  }
}

// The largest |x| of a row, NaN where there is one.
template <class T>
acc_t<T> largest_magnitude(const T* x, int64_t n) {
  acc_t<T> largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> magnitude = std::fabs(load_one(x + i));
    if (!(magnitude <= largest)) largest = magnitude;
    if (magnitude != magnitude) break;
  }
  return largest;
}

// A row of finite values whose sums overflow: everything is computed on x / largest.
template <bool kCenter, class T>
__attribute__((noinline)) Moments<acc_t<T>> scaled_row(const RowNormForward& args, const T* x, T* y,
                                                       acc_t<T> largest) {
  using A = acc_t<T>;
  Array<A> array(args.n);
  A* scaled = array.data();
  for (int64_t i = 0; i < args.n; ++i) scaled[i] = load_one(x + i) / largest;
  const A first = first_moment<kCenter, false>(static_cast<const A*>(scaled), args.n, scaled);
  const A mean = kCenter ? first : A(0);
  const A variance =
      kCenter ? variance_around(static_cast<const A*>(scaled), args.n, mean) : first;
  const A rstd = 1 / std::sqrt(variance + static_cast<A>(args.eps) / largest / largest);
  const A* weight = static_cast<const A*>(args.weight);
  const A* bias = static_cast<const A*>(args.bias);
  for (int64_t i = 0; i < args.n; ++i) {
    A value = (scaled[i] - mean) * rstd;
    if (args.cast_before_weight) value = round_to(splat<A>(value), T{})[0];
    if (weight != nullptr) value *= weight[i];
    store_one(y + i, bias != nullptr ? value + bias[i] : value);
  }
  return {mean * largest, rstd / largest};
}

constexpr int kDropoutBlock = 64;  // elements whose random words are drawn together

// body(i, factor, tag) for every pack of row `row`, with what its elements are multiplied by.
template <class T, class Body>
UDL_INLINE void for_dropout_packs(const Dropout& dropout, int64_t row, int64_t n, Body body) {
  using A = acc_t<T>;
  UDL_LINES A factors[kDropoutBlock], ordered[kDropoutBlock];
  for (int64_t start = 0; start < n; start += kDropoutBlock) {
    dropout_factors<kDropoutBlock / 4>(dropout, row, start / 4, factors);
    to_pack_order<T>(factors, ordered, kDropoutBlock);
    const A* factor = ordered;
    for_packs<T>(n - start < kDropoutBlock ? n - start : kDropoutBlock,
                 [=](int64_t i, auto tag) UDL_LAMBDA {
                   body(start + i, load_ordered<T>(factor + i), tag);
                 });
  }
}

// v * factor, and 0 where the factor is 0, whatever v is.
template <class T>
UDL_INLINE Pack<acc_t<T>> drop(Pack<acc_t<T>> v, Pack<acc_t<T>> factor) {
  const Pack<acc_t<T>> product = v * factor;
  return {factor.a == 0 ? factor.a : product.a, factor.b == 0 ? factor.b : product.b};
}

// s = residual + dropout(x), rounded to T.
template <class T>
void add_row(const RowNormForward& args, int64_t row, const T* x, T* sum) {
  const T* residual = args.residual.row<T>(row);
  if (!args.dropout.active) {
    for_packs<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
      store_pack(sum + i, load_pack(residual + i, tag) + load_pack(x + i, tag), tag);
    });
    return;
  }
  for_dropout_packs<T>(
      args.dropout, row, args.n, [=](int64_t i, Pack<acc_t<T>> factor, auto tag) UDL_LAMBDA {
        const Pack<acc_t<T>> dropped = round_pack<T>(drop<T>(load_pack(x + i, tag), factor));
        store_pack(sum + i, load_pack(residual + i, tag) + dropped, tag);
      });
}

// A row whose first pass is done.
template <class T>
struct ForwardRow {
  const T* x;
  T* y;
  acc_t<T> first;
};

template <bool kCenter, bool kWide, class T>
ForwardRow<T> start_row(const RowNormForward& args, int64_t row) {
  const T* x = args.x.row<T>(row);
  T* y = static_cast<T*>(args.y) + row * args.n;
  if (args.residual.data != nullptr) {
    T* sum = static_cast<T*>(args.sum) + row * args.n;
    add_row(args, row, x, sum);
    x = sum;
  }
  return {x, y, first_moment<kCenter, kWide>(x, args.n, y)};
}

// The first pass of the next row stands between the second pass and the writing of a row, so that
// no pass waits for the sum across lanes, the division and the root before it.
template <bool kCenter, bool kWide, class T>
void forward_rows(const RowNormForward& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const Affine<T> affine{{args.weight, args.n}, {args.bias, args.n}};
  const int64_t row_bytes = args.n * static_cast<int64_t>(sizeof(T));
  const bool fetch = kWide || fetches_ahead(2 * row_bytes * (end - begin));
  ForwardRow<T> next = start_row<kCenter, kWide, T>(args, begin);
  for (int64_t r = begin; r < end; ++r) {
    const ForwardRow<T> row = next;
    const A variance = kCenter ? variance_around(row.x, args.n, row.first) : row.first;
    if (r + 1 < end) next = start_row<kCenter, kWide, T>(args, r + 1);
    Moments<A> moments{kCenter ? row.first : A(0),
                       1 / std::sqrt(variance + static_cast<A>(args.eps))};
    const A largest = std::isfinite(variance) ? A(0) : largest_magnitude(row.x, args.n);
    if (largest > 0 && std::isfinite(largest)) {
      moments = scaled_row<kCenter>(args, row.x, row.y, largest);
    } else {
      const T* ahead = fetch && r + 2 < end ? args.x.row<T>(r + 2) : row.x;
      write_row<kCenter>(args, affine, row.x, ahead, row.y, moments.mean, moments.rstd);
    }
    if (args.mean != nullptr) static_cast<A*>(args.mean)[r] = moments.mean;
    if (args.rstd != nullptr) static_cast<A*>(args.rstd)[r] = moments.rstd;
  }
}

template <bool kCenter, class T>
void forward_narrow(const RowNormForward& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  for (int64_t r = begin; r < end; r += L) {
    const int64_t count = end - r < L ? end - r : L;
    const T* x = args.x.row<T>(r);
    T* y = static_cast<T*>(args.y) + r * args.n;
    vec_t<A> mean, rstd;
    const vec_t<A> variance = forward_block<kCenter>(args, x, y, count, mean, rstd);
    for (int64_t k = 0; k < count; ++k) {
      if (std::isfinite(variance[k])) continue;
      const T* row = x + k * args.n;
      const A largest = largest_magnitude(row, args.n);
      if (!(largest > 0 && std::isfinite(largest))) continue;
      const Moments<A> redone = scaled_row<kCenter>(args, row, y + k * args.n, largest);
      mean[k] = redone.mean;
      rstd[k] = redone.rstd;
    }
    const Tail tail{static_cast<int>(count)};
    if (args.mean != nullptr) store(static_cast<A*>(args.mean) + r, mean, tail);
    if (args.rstd != nullptr) store(static_cast<A*>(args.rstd) + r, rstd, tail);
  }
}

// One row of the backward, and the two means of the chain rule through its statistics: of
// g = dy * weight and of g * x_hat.
template <class T>
struct BackwardRow {
  const T *dy, *x, *ds;
  T* dx;
  acc_t<T> mean, rstd, g_mean, h_mean;
};

template <bool kCenter, class T>
BackwardRow<T> gradient_row(const RowNormBackward& args, int64_t r) {
  using A = acc_t<T>;
  return {args.dy.row<T>(r),
          args.x.row<T>(r),
          args.ds.data != nullptr ? args.ds.row<T>(r) : nullptr,
          args.dx != nullptr ? static_cast<T*>(args.dx) + r * args.n : nullptr,
          kCenter ? static_cast<const A*>(args.mean)[r] : A(0),
          static_cast<const A*>(args.rstd)[r],
          0,
          0};
}

// The sums behind the two means of a row, one pack after another.
template <class A>
struct GradientSums {
  Pack<A> g{}, h{};
};

template <bool kCenter, bool kWide, class T, class Tag>
UDL_INLINE void add_gradient(GradientSums<acc_t<T>>& sums, const BackwardRow<T>& row, int64_t i,
                             const Pack<acc_t<T>>* w, Tag tag) {
  if (kWide) prefetch_pack_write(row.dx + i);
  Pack<acc_t<T>> g = load_pack(row.dy + i, tag);
  if (w != nullptr) g = g * *w;
  if (kCenter) sums.g = sums.g + g;
  sums.h = sums.h + g * normalise<kCenter, T>(load_pack(row.x + i, tag), row.mean, row.rstd);
}

template <bool kCenter, class T>
UDL_INLINE void finish_gradient(BackwardRow<T>& row, const GradientSums<acc_t<T>>& sums, int64_t n) {
  const acc_t<T> count = static_cast<acc_t<T>>(n);
  if (kCenter) row.g_mean = sum_lanes(sums.g.a + sums.g.b) / count;
  row.h_mean = sum_lanes(sums.h.a + sums.h.b) / count;
}

// The means of kRows rows, for which nothing else is to be done meanwhile.
template <bool kCenter, bool kWeight, bool kWide, int kRows, class T>
void gather_rows(const RowNormBackward& args, BackwardRow<T>* rows, const acc_t<T>* weight) {
  using A = acc_t<T>;
  for (int k = 0; k < kRows; ++k) {
    const BackwardRow<T> row = rows[k];
    GradientSums<A> sums;
    for_packs<T>(args.n, [&sums, row, weight](int64_t i, auto tag) UDL_LAMBDA {
      Pack<A> w{};
      if (kWeight) w = load_ordered<T>(weight + i);
      add_gradient<kCenter, kWide>(sums, row, i, kWeight ? &w : nullptr, tag);
    });
    finish_gradient<kCenter>(rows[k], sums, args.n);
  }
}

// Gradients of kRows rows together, so that the sums of the weight gradients are loaded and stored
// once for all of them; they are added in the order of the rows. Meanwhile (kNext) the means of the
// kRows rows in `next` are gathered: memory is read all the time, not only between the writes.
template <bool kCenter, bool kWeight, bool kSums, bool kWide, bool kNext, int kRows, class T>
void backward_rows(const RowNormBackward& args, const BackwardRow<T>* current, BackwardRow<T>* next,
                   const acc_t<T>* weight, acc_t<T>* dweight, acc_t<T>* dbias) {
  using A = acc_t<T>;
  BackwardRow<T> rows[kRows], later[kRows];
  GradientSums<A> sums[kRows];
  for (int k = 0; k < kRows; ++k) rows[k] = current[k];
  for (int k = 0; k < kRows && kNext; ++k) later[k] = next[k];
  for_packs<T>(args.n, [&, weight, dweight, dbias](int64_t i, auto tag) UDL_LAMBDA {
    Pack<A> dw{}, db{}, w{};
    if (kSums) dw = load_ordered<T>(dweight + i);
    if (kSums && kCenter) db = load_ordered<T>(dbias + i);
    if (kWeight) w = load_ordered<T>(weight + i);
    for (int k = 0; k < kRows; ++k) {
      const BackwardRow<T>& row = rows[k];
      const Pack<A> d = load_pack(row.dy + i, tag);
      const Pack<A> x_hat =
          normalise<kCenter, T>(load_pack(row.x + i, tag), row.mean, row.rstd);
      if (kSums) dw = dw + keep<T>(d * x_hat, tag);
      if (kSums && kCenter) db = db + d;
      if (row.dx == nullptr) continue;
      // Rounded, so that it cancels against its own mean where a row has one element.
      const Pack<A> g = kWeight ? rounded(d * w) : d;
      Pack<A> out = ((kCenter ? g - row.g_mean : g) - x_hat * row.h_mean) * row.rstd;
      if (row.ds != nullptr) out = out + load_pack(row.ds + i, tag);
      store_pack(row.dx + i, out, tag);
    }
    for (int k = 0; k < kRows && kNext; ++k) {
      add_gradient<kCenter, kWide>(sums[k], later[k], i, kWeight ? &w : nullptr, tag);
    }
    if (kSums) store_ordered<T>(dweight + i, dw);
    if (kSums && kCenter) store_ordered<T>(dbias + i, db);
  });
  for (int k = 0; k < kRows && kNext; ++k) finish_gradient<kCenter>(next[k], sums[k], args.n);
}

// Gradient to x of s = residual + dropout(x): the gradient to s through the same mask.
template <class T>
void drop_gradient_row(const RowNormBackward& args, int64_t row) {
  const T* dx = static_cast<const T*>(args.dx) + row * args.n;
  T* out = static_cast<T*>(args.dx_dropped) + row * args.n;
  for_dropout_packs<T>(args.dropout, row, args.n,
                       [=](int64_t i, Pack<acc_t<T>> factor, auto tag) UDL_LAMBDA {
                         store_pack(out + i, drop<T>(load_pack(dx + i, tag), factor), tag);
                       });
}

// Rows [begin, end), whose chunks' sums are handed to flush(chunk) and cleared after their last row.
template <bool kCenter, bool kWeight, bool kSums, bool kWide, int kRows, class T, class Flush>
void backward_range(const RowNormBackward& args, int64_t begin, int64_t end,
                    const acc_t<T>* weight, acc_t<T>* dweight, acc_t<T>* dbias, Flush flush) {
  BackwardRow<T> rows[kRows], next[kRows];
  const auto open = [&](BackwardRow<T>* group, int64_t r) UDL_LAMBDA {
    for (int k = 0; k < kRows; ++k) group[k] = gradient_row<kCenter, T>(args, r + k);
  };
  open(rows, begin);
  if (args.dx != nullptr) gather_rows<kCenter, kWeight, kWide, kRows>(args, rows, weight);
  for (int64_t r = begin; r < end; r += kRows) {
    const bool more = r + kRows < end && args.dx != nullptr;
    if (r + kRows < end) open(next, r + kRows);
    if (more) {
      backward_rows<kCenter, kWeight, kSums, kWide, true, kRows>(args, rows, next, weight, dweight,
                                                                 dbias);
    } else {
      backward_rows<kCenter, kWeight, kSums, kWide, false, kRows>(args, rows, next, weight, dweight,
                                                                  dbias);
    }
    for (int k = 0; k < kRows; ++k) rows[k] = next[k];
    if ((r + kRows) % args.chunk_rows == 0) flush((r + kRows) / args.chunk_rows - 1);
  }
}

template <bool kCenter, bool kWeight, bool kSums, class T>
void backward_chunks(const RowNormBackward& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  // Pairs of rows where conversions or a wide row's sums cost more than memory does. From memory,
  // narrow rows go one at a time: twice the streams made them up to 1.6 times slower.
  const int64_t bytes = 3 * args.rows * args.n * static_cast<int64_t>(sizeof(T));
  const bool wide = is_wide<T>(args.n);
  const bool pairs = wide || (sizeof(T) == 2 && bytes <= 24 << 20);
  const int64_t n = args.n;
  const PackOrder<T> weight(args.weight, n);
  const int64_t width = kSums ? whole_packs<T>(n) : 0;
  Array<A> array(2 * width);  // dweight, then dbias
  array.clear();
  A* sums = array.data();
  const auto flush = [&](int64_t chunk) {
    const int64_t first = chunk * args.chunk_rows, next = first + args.chunk_rows;
    for (int64_t r = first; r < next && r < args.rows && args.dx_dropped != nullptr; ++r) {
      drop_gradient_row<T>(args, r);
    }
    if (kSums && args.dweight != nullptr) {
      from_pack_order<T>(sums, static_cast<A*>(args.dweight) + chunk * n, n);
    }
    if (kSums && args.dbias != nullptr) {
      from_pack_order<T>(sums + width, static_cast<A*>(args.dbias) + chunk * n, n);
    }
    array.clear();
  };
  const auto range = [&](auto is_wide, auto rows, int64_t first, int64_t last) UDL_LAMBDA {
    backward_range<kCenter, kWeight, kSums, decltype(is_wide)::value, decltype(rows)::value, T>(
        args, first, last, weight.data(), sums, sums + width, flush);
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  const int64_t first = begin * args.chunk_rows;
  const int64_t last = end * args.chunk_rows < args.rows ? end * args.chunk_rows : args.rows;
  const int64_t paired = pairs ? (last - first) / 2 * 2 + first : first;
  if (paired > first && wide) range(std::true_type{}, Two{}, first, paired);
  if (paired > first && !wide) range(std::false_type{}, Two{}, first, paired);
  if (last > paired) range(std::false_type{}, One{}, paired, last);
  if (last % args.chunk_rows != 0) flush(last / args.chunk_rows);
}

template <bool kCenter, class T>
void backward_narrow(const RowNormBackward& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * args.chunk_rows, next = first + args.chunk_rows;
    A* dweight = args.dweight != nullptr ? static_cast<A*>(args.dweight) + chunk * args.n : nullptr;
    A* dbias = args.dbias != nullptr ? static_cast<A*>(args.dbias) + chunk * args.n : nullptr;
    backward_narrow_chunk<kCenter, T>(args, first, next < args.rows ? next : args.rows, dweight,
                                      dbias);
  }
}

template <bool kCenter>
void row_norm_forward(const RowNormForward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.n <= kNarrow && args.residual.data == nullptr && one_after_another(args.x, args.n)) {
      forward_narrow<kCenter, T>(args, begin, end);
    } else if (is_wide<T>(args.n)) {
      forward_rows<kCenter, true, T>(args, begin, end);
    } else {
      forward_rows<kCenter, false, T>(args, begin, end);
    }
  });
}

template <bool kCenter>
void row_norm_backward(const RowNormBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const bool sums = args.dweight != nullptr || args.dbias != nullptr;
    if (args.n <= kNarrow && args.ds.data == nullptr && args.dx_dropped == nullptr &&
        one_after_another(args.x, args.n) && one_after_another(args.dy, args.n)) {
      backward_narrow<kCenter, T>(args, begin, end);
    } else if (args.weight != nullptr && sums) {
      backward_chunks<kCenter, true, true, T>(args, begin, end);
    } else if (args.weight != nullptr) {
      backward_chunks<kCenter, true, false, T>(args, begin, end);
    } else if (sums) {
      backward_chunks<kCenter, false, true, T>(args, begin, end);
    } else {
      backward_chunks<kCenter, false, false, T>(args, begin, end);
    }
  });
}

}  // namespace
}  // namespace udl::UDL_ISA
