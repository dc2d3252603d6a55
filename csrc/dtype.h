// Element types of the kernels, and the type they accumulate in.
#pragma once

#include <cstdint>

// This header serves every ISA: a function here must never be emitted as a symbol of its own, or the
// linker could hand one ISA's code to all.
#define UDL_ALWAYS_INLINE inline __attribute__((always_inline))

namespace udl {

enum class Dtype : int { f32, f64, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccOf<T>::type;

UDL_ALWAYS_INLINE int64_t element_size(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}
UDL_ALWAYS_INLINE Dtype acc_dtype(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// Calls body(T{}) with the C++ type of dtype.
template <class Body>
UDL_ALWAYS_INLINE void with_type(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::f32:
      return body(float{});
    case Dtype::f64:
      return body(double{});
    case Dtype::bf16:
      return body(bf16{});
    case Dtype::f16:
      return body(f16{});
  }
}

}  // namespace udl
