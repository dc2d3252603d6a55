// The square root of a vector.
#pragma once

#include "vec.h"

namespace udl::UDL_ISA {
namespace {

UDL_INLINE f32v root(f32v v) {
#if UDL_VECTOR_BYTES == 64
  return (f32v)_mm512_maskz_sqrt_ps((__mmask16)-1, (__m512)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
UDL_INLINE f64v root(f64v v) {
#if UDL_VECTOR_BYTES == 64
  return (f64v)_mm512_maskz_sqrt_pd((__mmask8)-1, (__m512d)v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

}  // namespace
}  // namespace udl::UDL_ISA
