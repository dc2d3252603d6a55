// What attention's forward and backward share: blocks of scores [keys, queries], the products over
// them, and everything that changes a score. To be included by *.isa.cpp only.
#pragma once

#include "activation.isa.h"
#include "attention/attention.h"
#include "transpose.isa.h"
#include "vec.h"

namespace udl::UDL_ISA {
namespace {

// A product's tile: kVectors of lanes times kTile numbers, so that the sums and what they are made of
// fill the registers.
#if defined(UDL_AVX512) || defined(__aarch64__)
constexpr int kVectors = 4, kTile = 6;
#else
constexpr int kVectors = 2, kTile = 4;
#endif
template <class A>
constexpr int64_t kQueryBlock = kVectors * kLanes<A>;
constexpr double kLowest = -INFINITY;
template <class A>
constexpr int64_t whole_lanes(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}
// Scores are held times log2(e), so that weights are powers of two.
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

UDL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
UDL_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A block of queries of one head, and the keys that any of them may see.
struct QueryBlock {
  int64_t b, h, first, rows, key_begin, key_end;
  int vectors;  // of lanes, in which the rows are
};

// tile(integral_constant) with a number of vectors that serves a block: 1, 2 or all.
template <class Body>
UDL_INLINE void with_vectors(int vectors, Body body) {
  if (vectors == 1) return body(std::integral_constant<int, 1>{});
  if (vectors == 2) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, kVectors>{});
}
UDL_INLINE int vectors_for(int64_t rows, int64_t lanes) {
  return rows <= lanes ? 1 : rows <= 2 * lanes ? 2 : kVectors;
}

template <class A>
QueryBlock query_block(const Attention& args, int64_t b, int64_t h, int64_t index) {
  QueryBlock block{b, h, index * kQueryBlock<A>, 0, 0, 0, 0};
  block.rows = least(kQueryBlock<A>, args.queries - block.first);
  block.vectors = vectors_for(block.rows, kLanes<A>);
  const int64_t last = block.first + block.rows - 1;
  int64_t keys = args.keys;
  if (args.key_lengths != nullptr) keys = most(0, least(keys, args.key_lengths[b]));
  const int64_t limit = args.keys + args.queries;  // beyond any distance, so that sums stay small
  block.key_begin = most(0, block.first + args.offset - least(args.left, limit + args.queries));
  block.key_end = least(keys, last + args.offset + least(args.right, limit + args.queries) + 1);
  if (args.ranges != nullptr) {
    const int64_t* range = args.ranges + b * args.ranges_batch + 2 * block.first;
    int64_t low = args.keys, high = 0;
    for (int64_t i = 0; i < block.rows; ++i) {
      if (range[2 * i] < range[2 * i + 1]) {
        low = least(low, range[2 * i]);
        high = most(high, range[2 * i + 1]);
      }
    }
    block.key_begin = most(block.key_begin, low);
    block.key_end = least(block.key_end, high);
  }
  block.key_begin = block.key_begin / kKeyBlock * kKeyBlock;
  return block;
}

// How much of a tile, the block's queries against keys [first, first + n), the block mask shows.
enum class Shown { none, some, all };
UDL_INLINE Shown shown_of(const Attention& args, const QueryBlock& block, int64_t first, int64_t n) {
  if (args.block_mask.data == nullptr) return Shown::all;
  bool any = false, all = true;
  const int64_t size = args.block_size, element = args.block_mask.element;
  for (int64_t i = block.first / size; i * size < block.first + block.rows; ++i) {
    const uint8_t* row = args.block_mask.at<uint8_t>(block.b, block.h, i);
    for (int64_t j = first / size; j * size < first + n; ++j) {
      any = any || row[j * element] != 0;
      all = all && row[j * element] != 0;
    }
  }
  return all ? Shown::all : any ? Shown::some : Shown::none;
}

// kJ rows of a product (see below).
template <int kJ, int kR, bool kAdd, class A>
UDL_INLINE void product_tile(const A* left, int64_t stride, int64_t step, const A* right,
                             int64_t right_stride, int64_t depth, A factor, A* out,
                             int64_t out_stride) {
  vec_t<A> sums[kJ][kR] = {};
  for (int64_t d = 0; d < depth; ++d) {
    vec_t<A> lanes[kR];
    for (int r = 0; r < kR; ++r) lanes[r] = load(right + r * kLanes<A>, Full{});
    for (int j = 0; j < kJ; ++j) {
      const vec_t<A> one = splat<A>(left[j * stride]);
      for (int r = 0; r < kR; ++r) sums[j][r] += one * lanes[r];
    }
    left += step;
    right += right_stride;
  }
  for (int j = 0; j < kJ; ++j) {
    for (int r = 0; r < kR; ++r) {
      A* at = out + j * out_stride + r * kLanes<A>;
      // Added only when complete: the rounding of a long sum grows with its blocks alone.
      store(at, kAdd ? load(static_cast<const A*>(at), Full{}) + sums[j][r] : sums[j][r] * factor,
            Full{});
    }
  }
}

// out[i][lanes] = factor * sum over d of left(i, d) * right[d][lanes], or that sum added to it (kAdd),
// where left(i, d) = left[i * stride + d * step]; kR vectors of lanes.
template <int kR, bool kAdd, class A>
void product(const A* left, int64_t stride, int64_t step, int64_t rows, const A* right,
             int64_t right_stride, int64_t depth, A factor, A* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + kTile <= rows; i += kTile) {
    product_tile<kTile, kR, kAdd>(left + i * stride, stride, step, right, right_stride, depth, factor,
                                  out + i * out_stride, out_stride);
  }
  const A* rest = left + i * stride;
  A* to = out + i * out_stride;
  const auto tile = [=](auto count) UDL_LAMBDA {
    product_tile<decltype(count)::value, kR, kAdd>(rest, stride, step, right, right_stride, depth,
                                                   factor, to, out_stride);
  };
  switch (rows - i) {
    case 5:
      return tile(std::integral_constant<int, 5>{});
    case 4:
      return tile(std::integral_constant<int, 4>{});
    case 3:
      return tile(std::integral_constant<int, 3>{});
    case 2:
      return tile(std::integral_constant<int, 2>{});
    case 1:
      return tile(std::integral_constant<int, 1>{});
    default:
      return;
  }
}

// The same over the lanes of a block of queries.
template <bool kAdd, class A>
void lanes_product(int vectors, const A* left, int64_t stride, int64_t step, int64_t rows,
                   const A* right, int64_t depth, A factor, A* out) {
  constexpr int64_t B = kQueryBlock<A>;
  with_vectors(vectors, [=](auto count) UDL_LAMBDA {
    product<decltype(count)::value, kAdd>(left, stride, step, rows, right, B, depth, factor, out, B);
  });
}

// The sums over any multiple of the lanes, `vectors` of them.
template <class A>
void add_wide_product(const A* left, int64_t stride, int64_t step, int64_t rows, const A* right,
                  int64_t right_stride, int64_t depth, A* out, int64_t out_stride,
                  int64_t vectors) {
  int64_t r = 0;
  for (; r + kVectors <= vectors; r += kVectors) {
    product<kVectors, true>(left, stride, step, rows, right + r * kLanes<A>, right_stride, depth,
                            A(1), out + r * kLanes<A>, out_stride);
  }
  for (; r < vectors; ++r) {
    product<1, true>(left, stride, step, rows, right + r * kLanes<A>, right_stride, depth, A(1),
                     out + r * kLanes<A>, out_stride);
  }
}

// Rows of T as rows of the accumulation type: where they lie, or a copy of them.
template <class T>
struct Panel {
  using A = acc_t<T>;
  const A* data;
  int64_t stride;
};
template <class T>
Panel<T> panel_of(const T* rows, int64_t stride, int64_t count, int64_t width, acc_t<T>* copy) {
  using A = acc_t<T>;
  if constexpr (std::is_same_v<T, A>) {
    return {rows, stride};
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const T* from = rows + i * stride;
      A* to = copy + i * width;
      int64_t d = 0;
      for (; d + kLanes<A> <= width; d += kLanes<A>) store(to + d, load(from + d, Full{}), Full{});
      for (; d < width; ++d) to[d] = load_one(from + d);
    }
    return {copy, width};
  }
}

// out[d][lane] = rows[lane][d] for a block of queries; lanes without a query are 0.
template <class T>
void turn_rows(const T* rows, int64_t stride, int64_t count, int64_t width, acc_t<T>* out) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>, B = kQueryBlock<A>;
  if (count < B) std::memset(out, 0, static_cast<size_t>(width * B) * sizeof(A));
  UDL_LINES A tile[L * L];
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const T* from = rows + i * stride;
    int64_t d = 0;
    for (; d + L <= width; d += L) {
      for (int64_t k = 0; k < L; ++k) {
        store(tile + k * L, load(from + k * stride + d, Full{}), Full{});
      }
      turn_tile(static_cast<const A*>(tile), L, out + d * B + i, B);
    }
    for (; d < width; ++d) {
      for (int64_t k = 0; k < L; ++k) out[d * B + i + k] = load_one(from + k * stride + d);
    }
  }
  for (; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) out[d * B + i] = load_one(rows + i * stride + d);
  }
}

// rows[lane][d] = factors[lane] * block[d][lane] for the block's queries.
template <class T>
void turn_back(const acc_t<T>* block, int64_t width, const acc_t<T>* factors, int64_t count,
               T* rows, int64_t stride) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>, B = kQueryBlock<A>;
  UDL_LINES A tile[L * L], turned[L * L];
  for (int64_t i = 0; i < count; i += L) {
    const int64_t lanes = least(L, count - i);
    const vec_t<A> factor = load(factors + i, Full{});
    for (int64_t d = 0; d < width; d += L) {
      const int64_t n = least(L, width - d);
      for (int64_t k = 0; k < L; ++k) {
        const vec_t<A> v = k < n ? load(block + (d + k) * B + i, Full{}) * factor : vec_t<A>{};
        store(tile + k * L, v, Full{});
      }
      turn_tile(static_cast<const A*>(tile), L, static_cast<A*>(turned), L);
      for (int64_t k = 0; k < lanes; ++k) {
        T* to = rows + (i + k) * stride + d;
        const vec_t<A> v = load(static_cast<const A*>(turned) + k * L, Full{});
        if (n == L) {
          store(to, v, Full{});
        } else {
          store(to, v, Tail{static_cast<int>(n)});
        }
      }
    }
  }
}

// One block of scores: keys [first, first + n) against the lanes of a block of queries.
template <class A>
struct Scores {
  A* at;     // [kKeyBlock][kQueryBlock]
  A* turned; // scratch of the same size: a bias, mask or dropout by rows, and turned to lanes
  A* rows;
  A* slope;  // with a softcap, what it multiplies gradients by; null if nobody asks
};

// body(lanes of key k, vector r, k) over the first `vectors` of a block.
template <class A, class Body>
UDL_INLINE void for_scores(int vectors, A* block, int64_t n, Body body) {
  for (int64_t k = 0; k < n; ++k) {
    for (int r = 0; r < vectors; ++r) {
      A* at = block + k * kQueryBlock<A> + r * kLanes<A>;
      store(at, body(load(static_cast<const A*>(at), Full{}), r, k), Full{});
    }
  }
}

template <class A>
UDL_INLINE vec_t<A> lane_numbers(int r) {
  vec_t<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = static_cast<A>(r * kLanes<A> + i);
  return v;
}

// 2^x for x <= 128: a polynomial on [-1/2, 1/2] within 2e-9 and its rounding; exactly 1 at 0 and 0 at
// -inf. NaN stays.
UDL_INLINE f32v exp2_of(f32v x) {
#if defined(UDL_AVX512)
  const __m512 v = (__m512)x;
  const f32v n = (f32v)_mm512_maskz_roundscale_ps((__mmask16)0xffff, v, _MM_FROUND_TO_NEAREST_INT);
  const f32v f = (f32v)_mm512_maskz_reduce_ps((__mmask16)0xffff, v, _MM_FROUND_TO_NEAREST_INT);
#else
  x = at_least(x, -160.0f);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const f32v shifted = x + kRound, f = x - (shifted - kRound);
#endif
  f32v p = splat<float>(0.00015353361959569156f);
  p = p * f + 0.0013398875016719103f;
  p = p * f + 0.00961843691766262f;
  p = p * f + 0.055503323674201965f;
  p = p * f + 0.24022647738456726f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
#if defined(UDL_AVX512)
  return (f32v)_mm512_maskz_scalef_ps((__mmask16)0xffff, (__m512)p, (__m512)n);
#else
  // times 2^n in two steps, since 2^n itself may be subnormal; the low bits of shifted hold n.
  const i32v whole = bit_cast<i32v>(shifted) - bit_cast<i32v>(splat<float>(kRound));
  const i32v half = whole >> 1;
  return p * bit_cast<f32v>((half + 127) << 23) * bit_cast<f32v>((whole - half + 127) << 23);
#endif
}
UDL_INLINE f64v exp2_of(f64v x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

UDL_INLINE f32v tanh_of(f32v x) {
  const f32v t = x * x;
  f32v p = splat<float>(-1382.0f / 155925.0f);
  p = p * t + 62.0f / 2835.0f;
  p = p * t - 17.0f / 315.0f;
  p = p * t + 2.0f / 15.0f;
  p = p * t - 1.0f / 3.0f;
  const f32v near = x + x * (t * p);
  const f32v e = exp_of(-2.0f * magnitude(x));
  const f32v far = (1.0f - e) / (1.0f + e);
  return t < 0.0625f ? near : x < 0 ? -far : far;
}
UDL_INLINE f64v tanh_of(f64v x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

template <class A>
void cap_scores(const Attention& args, int vectors, const Scores<A>& scores, int64_t n) {
  const A cap = static_cast<A>(args.softcap), inverse = static_cast<A>(1 / args.softcap);
  for_scores(vectors, scores.at, n, [=](vec_t<A> s, int r, int64_t k) UDL_LAMBDA {
    const vec_t<A> t = tanh_of(s * inverse);
    if (scores.slope != nullptr) {
      store(scores.slope + k * kQueryBlock<A> + r * kLanes<A>, 1 - t * t, Full{});
    }
    return t * (cap * static_cast<A>(kLog2E));
  });
}

// Turns scores.rows [queries][kKeyBlock] to scores.turned [keys][queries].
template <class A>
void turn_scores(const Scores<A>& scores) {
  constexpr int64_t L = kLanes<A>, B = kQueryBlock<A>;
  for (int64_t i = 0; i < B; i += L) {
    for (int64_t k = 0; k < kKeyBlock; k += L) {
      turn_tile(static_cast<const A*>(scores.rows) + i * kKeyBlock + k, kKeyBlock,
                scores.turned + k * B + i, B);
    }
  }
}

// A row of numbers `step` apart, times log2(e).
template <class T>
UDL_INLINE void scaled_row(const T* from, int64_t step, int64_t n, acc_t<T>* row) {
  using A = acc_t<T>;
  constexpr A kFactor = static_cast<A>(kLog2E);
  int64_t k = 0;
  for (; step == 1 && k + kLanes<A> <= n; k += kLanes<A>) {
    store(row + k, load(from + k, Full{}) * kFactor, Full{});
  }
  for (; k < n; ++k) row[k] = load_one(from + k * step) * kFactor;
}

// Rows [first_row, first_row + count) of the bias against keys [first, first + n), kKeyBlock apart, with
// -inf where the mask forbids.
template <class A>
void bias_rows(const Attention& args, const QueryBlock& block, int64_t count, int64_t first,
               int64_t n, A* rows) {
  if (args.bias.data == nullptr) {
    std::memset(rows, 0, static_cast<size_t>(count * kKeyBlock) * sizeof(A));
  } else {
    with_type(args.bias_dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < count; ++i) {
        const T* bias =
            args.bias.at<T>(block.b, block.h, block.first + i) + first * args.bias.element;
        A* row = rows + i * kKeyBlock;
        if constexpr (std::is_same_v<acc_t<T>, A>) {
          scaled_row(bias, args.bias.element, n, row);
        } else {
          for (int64_t k = 0; k < n; ++k) {
            row[k] = static_cast<A>(load_one(bias + k * args.bias.element)) *
                     static_cast<A>(kLog2E);
          }
        }
      }
    });
  }
  for (int64_t i = 0; i < count && args.mask.data != nullptr; ++i) {
    const uint8_t* mask =
        args.mask.at<uint8_t>(block.b, block.h, block.first + i) + first * args.mask.element;
    A* row = rows + i * kKeyBlock;
    if (args.mask.element == 1) {
      for (int64_t k = 0; k < n; ++k) row[k] = mask[k] == 0 ? static_cast<A>(kLowest) : row[k];
    } else {
      for (int64_t k = 0; k < n; ++k) {
        if (mask[k * args.mask.element] == 0) row[k] = static_cast<A>(kLowest);
      }
    }
  }
}

template <class A>
UDL_INLINE vec_t<A> add_bias(vec_t<A> s, vec_t<A> bias) {
  return bias == static_cast<A>(kLowest) ? splat<A>(static_cast<A>(kLowest)) : s + bias;
}

template <class A>
void bias_scores(const Attention& args, const QueryBlock& block, const Scores<A>& scores,
                 int64_t first, int64_t n) {
  const bool same = (args.bias.data == nullptr || args.bias.row == 0) &&
                    (args.mask.data == nullptr || args.mask.row == 0);
  if (same) {
    bias_rows(args, block, 1, first, n, scores.rows);
    for_scores(block.vectors, scores.at, n, [&](vec_t<A> s, int, int64_t k) UDL_LAMBDA {
      return add_bias<A>(s, splat<A>(scores.rows[k]));
    });
    return;
  }
  bias_rows(args, block, block.rows, first, n, scores.rows);
  turn_scores(scores);
  for_scores(block.vectors, scores.at, n, [&](vec_t<A> s, int r, int64_t k) UDL_LAMBDA {
    const A* at = scores.turned + k * kQueryBlock<A> + r * kLanes<A>;
    return add_bias<A>(s, load(at, Full{}));
  });
}

template <class A>
void alibi_scores(const Attention& args, const QueryBlock& block, A* scores, int64_t first,
                  int64_t n) {
  const A slope = static_cast<const A*>(args.alibi_slopes)[block.b * args.heads + block.h] *
                  static_cast<A>(kLog2E);
  for_scores(block.vectors, scores, n, [=](vec_t<A> s, int r, int64_t k) UDL_LAMBDA {
    const A start = static_cast<A>(block.first + args.offset - first - k);
    return s - slope * magnitude(lane_numbers<A>(r) + start);
  });
}

// -inf outside of the window.
template <class A>
void window_scores(const Attention& args, const QueryBlock& block, A* scores, int64_t first,
                   int64_t n) {
  const int64_t last = first + n - 1, start = block.first + args.offset;
  const int64_t far = args.keys + args.queries + kKeyBlock + kQueryBlock<A>;
  const int64_t left = least(args.left, 2 * far), right = least(args.right, 2 * far);
  if (last - start <= right && first - (start + block.rows - 1) >= -left) return;
  for_scores(block.vectors, scores, n, [=](vec_t<A> s, int r, int64_t k) UDL_LAMBDA {
    const int64_t key = first + k - start;  // seen by lanes from key - right to key + left
    const A low = static_cast<A>(most(-1, least(key - right, kQueryBlock<A>)));
    const A high = static_cast<A>(most(-1, least(key + left, kQueryBlock<A>)));
    const vec_t<A> lane = lane_numbers<A>(r), masked = splat<A>(static_cast<A>(kLowest));
    const vec_t<A> above = lane < low ? masked : s;
    return lane > high ? masked : above;
  });
}

// -inf outside of each query's own range.
template <class A>
void range_scores(const Attention& args, const QueryBlock& block, A* scores, int64_t first,
                  int64_t n) {
  UDL_LINES A low[kQueryBlock<A>] = {}, high[kQueryBlock<A>] = {};
  const int64_t* range = args.ranges + block.b * args.ranges_batch + 2 * block.first;
  bool inside = true;
  for (int64_t i = 0; i < block.rows; ++i) {
    low[i] = static_cast<A>(most(0, least(range[2 * i] - first, kKeyBlock)));
    high[i] = static_cast<A>(most(0, least(range[2 * i + 1] - first, kKeyBlock)));
    inside = inside && range[2 * i] <= first && range[2 * i + 1] >= first + n;
  }
  if (inside) return;
  const vec_t<A> masked = splat<A>(static_cast<A>(kLowest));
  for_scores(block.vectors, scores, n, [&](vec_t<A> s, int r, int64_t k) UDL_LAMBDA {
    const vec_t<A> key = splat<A>(static_cast<A>(k));
    const vec_t<A> above = load(static_cast<const A*>(low) + r * kLanes<A>, Full{}) > key ? masked : s;
    return load(static_cast<const A*>(high) + r * kLanes<A>, Full{}) <= key ? masked : above;
  });
}

// -inf where the block mask hides the key.
template <class A>
void block_scores(const Attention& args, const QueryBlock& block, A* scores, int64_t first,
                  int64_t n) {
  const int64_t size = args.block_size;
  const vec_t<A> masked = splat<A>(static_cast<A>(kLowest));
  UDL_LINES A shown[kQueryBlock<A>] = {};
  for (int64_t k = 0; k < n;) {
    const int64_t column = (first + k) / size, end = least(n, (column + 1) * size - first);
    for (int64_t i = 0; i < block.rows; ++i) {
      const uint8_t* row = args.block_mask.at<uint8_t>(block.b, block.h, (block.first + i) / size);
      shown[i] = row[column * args.block_mask.element] != 0 ? A(1) : A(0);
    }
    for_scores(block.vectors, scores + k * kQueryBlock<A>, end - k,
               [&](vec_t<A> s, int r, int64_t) UDL_LAMBDA {
                 return load(static_cast<const A*>(shown) + r * kLanes<A>, Full{}) == 0 ? masked : s;
               });
    k = end;
  }
}

// What a product of queries and keys is multiplied by: a softcap puts the logarithm in itself.
template <class A>
UDL_INLINE A score_factor(const Attention& args) {
  return static_cast<A>(args.softcap > 0 ? args.scale : args.scale * kLog2E);
}

// Everything between the product and the softmax.
template <class A>
void change_scores(const Attention& args, const QueryBlock& block, const Scores<A>& scores,
                   int64_t first, int64_t n) {
  if (args.softcap > 0) cap_scores(args, block.vectors, scores, n);
  if (args.alibi_slopes != nullptr) alibi_scores(args, block, scores.at, first, n);
  if (args.bias.data != nullptr || args.mask.data != nullptr) {
    bias_scores(args, block, scores, first, n);
  }
  window_scores(args, block, scores.at, first, n);
  if (args.ranges != nullptr) range_scores(args, block, scores.at, first, n);
  if (shown_of(args, block, first, n) == Shown::some) {
    block_scores(args, block, scores.at, first, n);
  }
}

// scores.turned[key][lane] = 1 / (1 - p), or 0 where the weight is dropped.
template <class A>
void draw_dropout(const Attention& args, const QueryBlock& block, const Scores<A>& scores,
                  int64_t first) {
  const int64_t row = args.dropout_row + args.row_at(block.b, block.h, block.first);
  for (int64_t i = 0; i < block.rows; ++i) {
    dropout_factors<kKeyBlock / 4>(args.dropout, row + i, first / 4,
                                   scores.rows + i * kKeyBlock);
  }
  turn_scores(scores);
}

// Whether a block of keys holds numbers that are not finite: in the keys, or in the values.
enum Unclean : uint8_t { kUncleanKeys = 1, kUncleanValues = 2 };
UDL_INLINE bool is_unclean(const Attention& args, int64_t b, int64_t h, int64_t first,
                           Unclean what) {
  const int64_t head = b * args.key_heads + h / args.group();
  return (args.unclean[head * key_blocks(args) + first / kKeyBlock] & what) != 0;
}

// product<..., true> where a weight of 0 takes nothing, not even 0 * NaN. The weights are `right`.
template <class A>
__attribute__((noinline)) void careful_product(int vectors, const A* left, int64_t stride,
                                               int64_t step, int64_t rows, const A* right,
                                               int64_t depth, A* out) {
  constexpr int64_t B = kQueryBlock<A>;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < depth; ++d) {
      const vec_t<A> one = splat<A>(left[i * stride + d * step]);
      for (int r = 0; r < vectors; ++r) {
        A* at = out + i * B + r * kLanes<A>;
        const vec_t<A> weight = load(right + d * B + r * kLanes<A>, Full{});
        const vec_t<A> sum = load(static_cast<const A*>(at), Full{});
        store(at, weight == 0 ? sum : sum + one * weight, Full{});
      }
    }
  }
}

}  // namespace
}  // namespace udl::UDL_ISA
