// The products of attention on pairs of bfloat16 numbers, for the instruction that multiplies pairs
// and sums in float32: twice the speed of float32. A pair lies in 32 bits, the first number in the
// lower half. To be included by *.isa.cpp only.
#pragma once

#include "attention/attention_scores.isa.h"

namespace udl::UDL_ISA {
namespace {

#if defined(UDL_ISA_avx512_bf16)
template <class T>
constexpr bool kHasPairs = std::is_same_v<T, bf16>;
UDL_INLINE f32v add_pairs(f32v sum, u32v a, u32v b) {
  return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
// Two vectors, rounded, in their order.
UDL_INLINE u32v round_in_order(f32v a, f32v b) {
  return (u32v)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
#else
template <class T>
constexpr bool kHasPairs = false;
UDL_INLINE f32v add_pairs(f32v sum, u32v, u32v) { return sum; }
UDL_INLINE u32v round_in_order(f32v, f32v) { return u32v{}; }
#endif

UDL_INLINE u32v load_pairs(const uint32_t* p) {
  u32v v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
UDL_INLINE void store_pairs(uint32_t* p, u32v v) { std::memcpy(p, &v, sizeof(v)); }

// The left side of a product: the pair (i, d) stands at data + i * row + d * step, in bytes.
struct LeftPairs {
  const char* data;
  int64_t row, step;

  UDL_INLINE uint32_t at(int64_t offset) const {
    uint32_t pair;
    std::memcpy(&pair, data + offset, sizeof(pair));
    return pair;
  }
};

// out[i][lanes] (+)= factor * sum over d of left(i, d) * right[d][lanes], where left(i, d) and each
// right are pairs; kJ rows, kR vectors.
template <int kJ, int kR, bool kAdd>
UDL_INLINE void pair_tile(LeftPairs left, const uint32_t* right, int64_t right_row, int64_t depth,
                          float factor, float* out, int64_t out_row) {
  f32v sums[kJ][kR] = {};
  for (int64_t d = 0; d < depth; ++d) {
    u32v lanes[kR];
    for (int r = 0; r < kR; ++r) lanes[r] = load_pairs(right + r * kLanes<float>);
    for (int j = 0; j < kJ; ++j) {
      const u32v one = u32v{} + left.at(j * left.row);
      for (int r = 0; r < kR; ++r) sums[j][r] = add_pairs(sums[j][r], one, lanes[r]);
    }
    left.data += left.step;
    right += right_row;
  }
  for (int j = 0; j < kJ; ++j) {
    for (int r = 0; r < kR; ++r) {
      float* at = out + j * out_row + r * kLanes<float>;
      store(at,
            kAdd ? load(static_cast<const float*>(at), Full{}) + sums[j][r] : sums[j][r] * factor,
            Full{});
    }
  }
}

template <int kR, bool kAdd>
void pair_product(LeftPairs left, int64_t rows, const uint32_t* right, int64_t right_row,
                  int64_t depth, float factor, float* out, int64_t out_row) {
  int64_t i = 0;
  const auto tile = [&](auto count) UDL_LAMBDA {
    constexpr int kJ = decltype(count)::value;
    pair_tile<kJ, kR, kAdd>({left.data + i * left.row, left.row, left.step}, right, right_row,
                            depth, factor, out + i * out_row, out_row);
    i += kJ;
  };
  while (i + kTile <= rows) tile(std::integral_constant<int, kTile>{});
  while (i + 2 <= rows) tile(std::integral_constant<int, 2>{});
  if (i < rows) tile(std::integral_constant<int, 1>{});
}

// The same over the lanes of a block of queries.
template <bool kAdd>
void lanes_pair_product(int vectors, LeftPairs left, int64_t rows, const uint32_t* right,
                        int64_t depth, float factor, float* out) {
  constexpr int64_t B = kQueryBlock<float>;
  with_vectors(vectors, [=](auto count) UDL_LAMBDA {
    pair_product<decltype(count)::value, kAdd>(left, rows, right, B, depth, factor, out, B);
  });
}

// The sums over any number of vectors.
UDL_INLINE void add_wide_pairs(LeftPairs left, int64_t rows, const uint32_t* right,
                               int64_t right_row, int64_t depth, float* out, int64_t out_row) {
  constexpr int64_t L = kLanes<float>;
  int64_t r = 0;
  for (; r + kVectors * L <= out_row; r += kVectors * L) {
    pair_product<kVectors, true>(left, rows, right + r, right_row, depth, 1, out + r, out_row);
  }
  for (; r < out_row; r += L) {
    pair_product<1, true>(left, rows, right + r, right_row, depth, 1, out + r, out_row);
  }
}

// out[d][lane] = the pair d of row `lane` of a block of queries, of an even width; 0 without a row.
UDL_INLINE void turn_pairs(const bf16* rows, int64_t stride, int64_t count, int64_t width,
                           uint32_t* out) {
  constexpr int64_t L = kLanes<float>, B = kQueryBlock<float>;
  const int64_t pairs = width / 2;
  if (count < B) std::memset(out, 0, static_cast<size_t>(pairs * B) * sizeof(uint32_t));
  UDL_LINES float tile[L * L];
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const bf16* from = rows + i * stride;
    int64_t d = 0;
    for (; d + L <= pairs; d += L) {
      for (int64_t k = 0; k < L; ++k) {
        std::memcpy(tile + k * L, from + k * stride + 2 * d, sizeof(f32v));
      }
      UDL_LINES float turned[L * L];
      turn_tile(static_cast<const float*>(tile), L, static_cast<float*>(turned), L);
      for (int64_t k = 0; k < L; ++k) {
        std::memcpy(out + (d + k) * B + i, turned + k * L, sizeof(f32v));
      }
    }
    for (; d < pairs; ++d) {
      for (int64_t k = 0; k < L; ++k) {
        std::memcpy(out + d * B + i + k, from + k * stride + 2 * d, sizeof(uint32_t));
      }
    }
  }
  for (; i < count; ++i) {
    for (int64_t d = 0; d < pairs; ++d) {
      std::memcpy(out + d * B + i, rows + i * stride + 2 * d, sizeof(uint32_t));
    }
  }
}

// out[i / 2][d] = the numbers d of rows i and i + 1; 0 beyond `width`, up to `row`, and where there is
// no second row.
UDL_INLINE void pair_rows(const bf16* rows, int64_t stride, int64_t count, int64_t width,
                          int64_t row, uint32_t* out) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t i = 0; i < count; i += 2, out += row) {
    const bf16 *a = rows + i * stride, *b = a + stride;
    const bool both = i + 1 < count;
    for (int64_t d = 0; d < row; d += L) {
      const int64_t n = least(L, width - d);
      u16v low{}, high{};
      if (n == L) {
        std::memcpy(&low, a + d, sizeof(low));
        if (both) std::memcpy(&high, b + d, sizeof(high));
      } else if (n > 0) {
        std::memcpy(&low, a + d, static_cast<size_t>(n) * 2);
        if (both) std::memcpy(&high, b + d, static_cast<size_t>(n) * 2);
      }
      store_pairs(out + d, widen_lanes(low) | (widen_lanes(high) << 16));
    }
  }
}

// Rows of numbers [n][lanes] as pairs of rows, [(n + 1) / 2][lanes].
UDL_INLINE void pair_keys(const float* block, int64_t n, uint32_t* out) {
  constexpr int64_t L = kLanes<float>, B = kQueryBlock<float>;
  for (int64_t k = 0; k < n; k += 2) {
    for (int64_t i = 0; i < B; i += L) {
      const f32v a = load(block + k * B + i, Full{});
      const f32v b = k + 1 < n ? load(block + (k + 1) * B + i, Full{}) : f32v{};
      store_pairs(out + k / 2 * B + i, pack_bits({a, b}));
    }
  }
}

// Rows of numbers [n][lanes], rounded, as pairs of lanes, [n][lanes / 2].
UDL_INLINE void pair_lanes(const float* block, int64_t n, uint32_t* out) {
  constexpr int64_t L = kLanes<float>, B = kQueryBlock<float>;
  for (int64_t at = 0; at < n * B; at += 2 * L) {
    store_pairs(out + at / 2,
                round_in_order(load(block + at, Full{}), load(block + at + L, Full{})));
  }
}

}  // namespace
}  // namespace udl::UDL_ISA
