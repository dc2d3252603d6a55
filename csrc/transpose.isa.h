// Turns [positions, channels] into [channels, positions] by square tiles in registers.
// To be included by *.isa.cpp only.
#pragma once

#include <utility>

#include "vec.h"

namespace udl::UDL_ISA {
namespace {

// Bits of one element, and a vector of as many of them as the accumulation type has lanes.
template <class T>
struct Bits {
  using vec = u16v;
};
template <>
struct Bits<float> {
  using vec = f32v;
};
template <>
struct Bits<double> {
  using vec = f64v;
};

// a0 b0 a1 b1 ... from the lower (kHigh: upper) halves of a and b.
template <bool kHigh, class V>
UDL_INLINE V interleave(V a, V b) {
  constexpr int L = sizeof(V) / sizeof(a[0]);
  constexpr int h = kHigh ? L / 2 : 0;
  if constexpr (L == 2) {
    return __builtin_shufflevector(a, b, h, L + h);
  } else if constexpr (L == 4) {
    return __builtin_shufflevector(a, b, h, L + h, h + 1, L + h + 1);
  } else if constexpr (L == 8) {
    return __builtin_shufflevector(a, b, h, L + h, h + 1, L + h + 1, h + 2, L + h + 2, h + 3,
                                   L + h + 3);
  } else {
    return __builtin_shufflevector(a, b, h, L + h, h + 1, L + h + 1, h + 2, L + h + 2, h + 3,
                                   L + h + 3, h + 4, L + h + 4, h + 5, L + h + 5, h + 6, L + h + 6,
                                   h + 7, L + h + 7);
  }
}

// One L x L tile: rows `stride` elements apart into rows `out_stride` apart. Interleaving rows i and
// i + L / 2, log2(L) times over, is the transposition.
template <class T>
UDL_INLINE void turn_tile(const T* x, int64_t stride, T* out, int64_t out_stride) {
  using V = typename Bits<T>::vec;
  constexpr int L = kLanes<acc_t<T>>;
  V rows[L], mixed[L];
  for (int i = 0; i < L; ++i) std::memcpy(&rows[i], x + i * stride, sizeof(V));
  for (int step = 1; step < L; step *= 2) {
    for (int i = 0; i < L / 2; ++i) {
      mixed[2 * i] = interleave<false>(rows[i], rows[i + L / 2]);
      mixed[2 * i + 1] = interleave<true>(rows[i], rows[i + L / 2]);
    }
    for (int i = 0; i < L; ++i) rows[i] = mixed[i];
  }
  for (int i = 0; i < L; ++i) std::memcpy(out + i * out_stride, &rows[i], sizeof(V));
}

// planes[c * positions + p] = lines[p * stride + c].
template <class T>
void lines_to_planes(const T* lines, int64_t stride, int64_t positions, int64_t channels,
                     T* planes) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  int64_t p = 0;
  for (; p + L <= positions; p += L) {
    const T* from = lines + p * stride;
    int64_t c = 0;
    for (; c + L <= channels; c += L) {
      turn_tile(from + c, stride, planes + c * positions + p, positions);
    }
    for (; c < channels; ++c) {
      for (int64_t i = 0; i < L; ++i) planes[c * positions + p + i] = from[i * stride + c];
    }
  }
  for (; p < positions; ++p) {
    for (int64_t c = 0; c < channels; ++c) planes[c * positions + p] = lines[p * stride + c];
  }
}

// The sums of kLanes vectors as one vector, by halves, quarters, ...: each is added up alike.
constexpr int half_of(int lane, int width, int lanes, int upper) {
  const int segment = lane / width;
  return segment % 2 * lanes + segment / 2 * 2 * width + lane % width + upper * width;
}
template <int kWidth, class V, int... kLane>
UDL_INLINE V fold_pair(V x, V y, std::integer_sequence<int, kLane...>) {
  constexpr int L = sizeof...(kLane);
  return __builtin_shufflevector(x, y, half_of(kLane, kWidth, L, 0)...) +
         __builtin_shufflevector(x, y, half_of(kLane, kWidth, L, 1)...);
}
template <class A, int kWidth = kLanes<A> / 2>
UDL_INLINE vec_t<A> sum_each(vec_t<A>* v) {
  using Lanes = std::make_integer_sequence<int, kLanes<A>>;
  for (int i = 0; i < kWidth; ++i) v[i] = fold_pair<kWidth>(v[i], v[i + kWidth], Lanes{});
  if constexpr (kWidth > 1) {
    return sum_each<A, kWidth / 2>(v);
  } else {
    return v[0];
  }
}

}  // namespace
}  // namespace udl::UDL_ISA
