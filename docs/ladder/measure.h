// What the ladders share: single numbers of an element type, random inputs, and times.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <new>
#include <vector>

#include "vec.h"

namespace udl::UDL_ISA {
namespace {

inline float widen(float v) { return v; }
inline float widen(bf16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline void narrow(float v, float* to) { *to = v; }
inline void narrow(float v, bf16* to) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  to->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Aligned to cache lines, as torch's tensors are.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  explicit Aligned(const Aligned<U>&) {}
  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <class T>
using Buffer = std::vector<T, Aligned<T>>;

// Between -largest and largest; other seeds, other numbers.
template <class T>
Buffer<T> random_values(int64_t count, float largest = 1, uint32_t seed = 12345) {
  Buffer<T> values(static_cast<size_t>(count));
  uint32_t state = seed;
  for (T& value : values) {
    state = state * 1664525u + 1013904223u;
    narrow(largest * (static_cast<float>(state >> 8) / (1 << 23) - 1), &value);
  }
  return values;
}

// The largest deviation from exact values, over the largest of them.
template <class T>
double deviation(const std::vector<double>& exact, const T* found) {
  double largest = 0, deviation = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    largest = std::max(largest, std::fabs(exact[i]));
    const double here = std::fabs(exact[i] - widen(found[i]));
    deviation = here <= deviation ? deviation : here;  // a NaN stays
  }
  return largest > 0 ? deviation / largest : deviation;
}

inline double seconds(const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline double median(std::vector<double>& values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

}  // namespace
}  // namespace udl::UDL_ISA
