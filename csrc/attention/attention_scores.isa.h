// Blocks of scores [keys, queries] and everything that changes a score between the product and the
// softmax. To be included by *.isa.cpp only.
#pragma once

#include "attention/attention.isa.h"

namespace udl::UDL_ISA {
namespace {

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
