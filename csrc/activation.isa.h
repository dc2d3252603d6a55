// Activations and their derivatives on packs. In float32 without a call to the math library: exp by
// a polynomial on [-ln 2 / 2, ln 2 / 2], erfc by exp(-z^2) times a polynomial in 1 / (1 + 0.35 z);
// both within about 2 units in the last place. To be included by *.isa.cpp only.
#pragma once

#include "activation.h"
#include "vec.h"

namespace udl::UDL_ISA {
namespace {

// max(v, low) and min(v, high) that keep a NaN in v.
UDL_INLINE f32v at_least(f32v v, float low) {
#if defined(UDL_AVX512)
  // With a NaN this gives its second operand.
  return (f32v)_mm512_maskz_max_ps((__mmask16)0xffff, (__m512)splat<float>(low), (__m512)v);
#else
  return v < low ? splat<float>(low) : v;
#endif
}
UDL_INLINE f32v at_most(f32v v, float high) {
#if defined(UDL_AVX512)
  return (f32v)_mm512_maskz_min_ps((__mmask16)0xffff, (__m512)splat<float>(high), (__m512)v);
#else
  return v > high ? splat<float>(high) : v;
#endif
}
UDL_INLINE f64v at_least(f64v v, double low) { return v < low ? splat<double>(low) : v; }
UDL_INLINE f64v at_most(f64v v, double high) { return v > high ? splat<double>(high) : v; }

// 1 / v for v in [1, 2^117].
UDL_INLINE f32v reciprocal(f32v v) {
#if defined(UDL_AVX512)
  // A division takes three times as long as this estimate and a step of Newton's method.
  const f32v r = (f32v)_mm512_maskz_rcp14_ps((__mmask16)0xffff, (__m512)v);
  return r + r * (1.0f - v * r);
#else
  return 1.0f / v;
#endif
}
UDL_INLINE f64v reciprocal(f64v v) { return 1.0 / v; }

constexpr double kLargest = 80;  // up to here the reciprocal of exp(x) is a normal float

// exp(x) for x <= kLargest.
UDL_INLINE f32v exp_of(f32v x) {
  x = at_least(x, -110.0f);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const f32v shifted = x * 0x1.715476p+0f + kRound, n = shifted - kRound;
  // ln 2 in two parts, the first with few enough bits that its product with n is exact.
  const f32v r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  f32v p = splat<float>(0.0013814467238262296f);
  p = p * r + 0.008368780836462975f;
  p = p * r + 0.04166839271783829f;
  p = p * r + 0.1666651964187622f;
  p = p * r + 0.4999999403953552f;
  const f32v e = (p * r + 1.0f) * r + 1.0f;
#if defined(UDL_AVX512)
  return (f32v)_mm512_maskz_scalef_ps((__mmask16)0xffff, (__m512)e, (__m512)n);
#else
  // times 2^n in two steps, since 2^n itself may be subnormal; the low bits of shifted hold n.
  const i32v whole = bit_cast<i32v>(shifted) - bit_cast<i32v>(splat<float>(kRound));
  const i32v half = whole >> 1;
  return e * bit_cast<f32v>((half + 127) << 23) * bit_cast<f32v>((whole - half + 127) << 23);
#endif
}
UDL_INLINE f64v exp_of(f64v x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

UDL_INLINE f32v magnitude(f32v x) {
  return bit_cast<f32v>(bit_cast<u32v>(x) & 0x7fffffffu);
}
UDL_INLINE f64v magnitude(f64v x) { return x < 0 ? -x : x; }

// The normal distribution function, given exp(-x^2 / 2): near zero by the series of its odd part,
// whose error is smaller, beyond by erfc.
UDL_INLINE f32v normal_cdf(f32v x, f32v gauss) {
  const f32v u = reciprocal(0.24748737341529164f * at_most(magnitude(x), 1e9f) + 1.0f);
  f32v p = splat<float>(0.03966778889298439f);
  p = p * u - 0.16598530113697052f;
  p = p * u + 0.19852523505687714f;
  p = p * u - 0.05116860941052437f;
  p = p * u + 0.10719817876815796f;
  p = p * u + 0.134805828332901f;
  p = p * u + 0.1552293598651886f;
  p = p * u + 0.1869973987340927f;
  p = p * u + 0.1972525268793106f;
  p = p * u + 0.19747759401798248f;
  const f32v tail = (0.5f * gauss) * (p * u);
  const f32v t = x * x;
  f32v q = splat<float>(4.760749447996204e-07f);
  q = q * t - 9.05844171938952e-06f;
  q = q * t + 0.00011503215500852093f;
  q = q * t - 0.0011871096212416887f;
  q = q * t + 0.009973499923944473f;
  q = q * t - 0.06649037450551987f;
  q = q * t + 0.3989422917366028f;
  const f32v beyond = x < 0 ? tail : 1.0f - tail;
  return t > 1.5625f ? beyond : x * q + 0.5f;
}
UDL_INLINE f64v normal_cdf(f64v x, f64v) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752440);
  return x;
}

// The logistic function and its derivative, from exp(-|x|), so that neither loses digits.
template <class V>
struct Logistic {
  V value, slope;
};
template <class V>
UDL_INLINE Logistic<V> logistic(V x) {
  const V e = exp_of(-magnitude(x));
  const V q = reciprocal(e + 1);
  const V eq = e * q;
  return {x < 0 ? eq : q, eq * q};
}

constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kCubic = 0.044715;
constexpr double kInverseSqrt2Pi = 0.39894228040143267794;

template <Activation act, class A>
UDL_INLINE vec_t<A> activate_vector(vec_t<A> x, A slope) {
  using V = vec_t<A>;
  if constexpr (act == Activation::relu) {
    return x < 0 ? V{} : x;
  } else if constexpr (act == Activation::leaky_relu) {
    return x > 0 ? x : x * slope;
  } else if constexpr (act == Activation::gelu) {
    return x * normal_cdf(x, exp_of(x * x * A(-0.5)));
  } else if constexpr (act == Activation::gelu_tanh) {
    // (1 + tanh u) / 2 is the logistic function of 2u; below -12 it is zero.
    const V v = at_least(x, A(-12));
    const V u = v * (v * v * A(-2 * kSqrt2OverPi * kCubic) - A(2 * kSqrt2OverPi));
    return v * reciprocal(exp_of(at_most(u, A(kLargest))) + 1);
  } else if constexpr (act == Activation::silu) {
    const V v = at_least(x, A(-kLargest));
    return v * reciprocal(exp_of(-v) + 1);
  } else {
    return x;
  }
}

template <Activation act, class A>
UDL_INLINE vec_t<A> activate_grad_vector(vec_t<A> x, A slope) {
  using V = vec_t<A>;
  if constexpr (act == Activation::relu) {
    return x <= 0 ? V{} : V{} + 1;
  } else if constexpr (act == Activation::leaky_relu) {
    return x > 0 ? V{} + 1 : V{} + slope;
  } else if constexpr (act == Activation::gelu) {
    const V gauss = exp_of(x * x * A(-0.5));
    return normal_cdf(x, gauss) + x * gauss * A(kInverseSqrt2Pi);
  } else if constexpr (act == Activation::gelu_tanh) {
    const V square = x * x;
    const V u = x * (square * A(2 * kSqrt2OverPi * kCubic) + A(2 * kSqrt2OverPi));
    const Logistic<V> s = logistic(u);
    const V du = square * A(6 * kSqrt2OverPi * kCubic) + A(2 * kSqrt2OverPi);
    return s.value + x * s.slope * du;
  } else if constexpr (act == Activation::silu) {
    const Logistic<V> s = logistic(x);
    return s.value + x * s.slope;
  } else {
    return V{} + 1;
  }
}

// act(x); slope is leaky_relu's factor for negative values.
template <Activation act, class A>
UDL_INLINE Pack<A> activate(Pack<A> x, A slope) {
  return {activate_vector<act, A>(x.a, slope), activate_vector<act, A>(x.b, slope)};
}

// The derivative of act at its argument `pre`.
template <Activation act, class A>
UDL_INLINE Pack<A> activate_grad(Pack<A> pre, A slope) {
  return {activate_grad_vector<act, A>(pre.a, slope), activate_grad_vector<act, A>(pre.b, slope)};
}

}  // namespace
}  // namespace udl::UDL_ISA
