// What both walks of local_response_norm compute alike: the powers, and blocks near overflow.
#pragma once

#include "normalization/local_response_norm.h"
#include "normalization/root.isa.h"

namespace udl::UDL_ISA {
namespace {

UDL_INLINE float power_of(float x, float y) { return __builtin_powf(x, y); }
UDL_INLINE double power_of(double x, double y) { return __builtin_pow(x, y); }

// s^-beta and 1 / s.
template <class V>
struct Powers {
  V power, inverse;
};

template <class A>
UDL_INLINE Powers<vec_t<A>> powers(vec_t<A> s, A beta) {
  if (beta == A(0.75)) {
    const vec_t<A> r = 1 / root(s);
    return {r * root(r), r * r};
  }
  if (beta == A(0.5)) {
    const vec_t<A> r = 1 / root(s);
    return {r, r * r};
  }
  const vec_t<A> inverse = 1 / s;
  if (beta == A(1)) return {inverse, inverse};
  vec_t<A> power;
  for (int i = 0; i < kLanes<A>; ++i) power[i] = power_of(static_cast<A>(s[i]), -beta);
  return {power, inverse};
}

// Sums beyond this are redone in double precision: their powers leave the range of float32, or they
// have left it themselves.
constexpr float kLargestSum = 1e25f;

template <class V>
UDL_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class A>
UDL_INLINE bool any_above(vec_t<A> v, A limit) {
  for (int i = 0; i < kLanes<A>; ++i) {
    if (v[i] > limit) return true;
  }
  return false;
}

// Where the channels and positions of a block lie, in elements.
struct BlockStrides {
  int64_t channel, position;
};

// One block in double precision throughout, one position after the other.
template <class T>
__attribute__((noinline)) void redo_block(const LocalResponseNorm& args, int64_t positions,
                                          const T* x, BlockStrides x_at, const T* dy,
                                          BlockStrides dy_at, T* out, BlockStrides out_at) {
  const int64_t channels = args.x.channels;
  const Array<double> array(3 * channels);
  double* s = array.data();
  double *value = s + channels, *q = value + channels;
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t c = 0; c < channels; ++c) {
      value[c] = load_one(x + c * x_at.channel + p * x_at.position);
    }
    const auto window = [=](int64_t first, int64_t last, auto term) UDL_LAMBDA {
      double sum = 0;
      for (int64_t j = first > 0 ? first : 0; j <= last && j < channels; ++j) sum += term(j);
      return sum;
    };
    for (int64_t c = 0; c < channels; ++c) {
      const double squares = window(c - args.before, c + args.after, [=](int64_t j) UDL_LAMBDA {
        return value[j] * value[j];
      });
      s[c] = args.k + args.scale * squares;
      const double power = power_of(s[c], -args.beta);
      const double direct =
          dy == nullptr ? value[c] : load_one(dy + c * dy_at.channel + p * dy_at.position);
      q[c] = direct * power * (dy == nullptr ? 1.0 : value[c] / s[c]);
      s[c] = direct * power;
    }
    for (int64_t c = 0; c < channels; ++c) {
      double result = s[c];
      if (dy != nullptr) {
        result -= 2 * args.scale * args.beta * value[c] *
                  window(c - args.after, c + args.before, [=](int64_t j) UDL_LAMBDA { return q[j]; });
      }
      store_one(out + c * out_at.channel + p * out_at.position, static_cast<acc_t<T>>(result));
    }
  }
}

}  // namespace
}  // namespace udl::UDL_ISA
