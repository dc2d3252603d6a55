// The ceiling of products: what the multiply-add units do on numbers that stay in registers.
#pragma once

#include "attention/attention_pairs.isa.h"
#include "measure.h"

namespace udl::UDL_ISA {
namespace {

// [peak]
UDL_INLINE f32v again(f32v sum, f32v a, f32v b) { return sum * a + b; }
UDL_INLINE f32v again(f32v sum, u32v a, u32v b) { return add_pairs(sum, a, b); }

// As many sums as hide the latency and fit the registers: 24, or 12 where there are 16 registers.
constexpr int kSums = 6 * kVectors;

template <class V>
__attribute__((noinline)) float only_multiply(int64_t turns, V a, V b) {
  f32v sums[6][kVectors];
  for (int i = 0; i < kSums; ++i) sums[i / kVectors][i % kVectors] = splat<float>(i);  // all differ
  for (; turns > 0; --turns) {
    for (auto& row : sums) {
      for (f32v& sum : row) sum = again(sum, a, b);
    }
  }
  f32v total{};
  for (auto& row : sums) {
    for (f32v sum : row) total += sum;
  }
  return sum_lanes(total);
}
// [end]

// Operations a second: of the dot product of pairs where T has one, else of float32.
template <class T>
double peak_rate() {
  constexpr int64_t kTurns = 200000;
  constexpr double kFlops = 2.0 * kTurns * kSums * kLanes<float>;
  volatile float sink = 0;
  if constexpr (kHasPairs<T>) {
    const u32v halves = u32v{} + 0x3f003f00u;
    return 2 * kFlops / seconds([&] { sink = only_multiply(kTurns, halves, halves); });
  } else {
    const f32v half = splat<float>(0.5f), one = splat<float>(1.0f);
    return kFlops / seconds([&] { sink = only_multiply(kTurns, half, one); });
  }
}

}  // namespace
}  // namespace udl::UDL_ISA
