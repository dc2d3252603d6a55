// What the plane and the line kernels of group_norm share: moments and their merging, the redoing of
// a group whose squares overflow, activations on a scratch block.
#pragma once

#include "activation.isa.h"
#include "normalization/group_norm.h"
#include "vec.h"

namespace udl::UDL_ISA {
namespace {

// Activations run on blocks of this many elements, in the accumulation type and in pack order, which
// stay in the L1 cache: one copy of their code serves all element types and layouts.
constexpr int64_t kScratch = 1024;

template <Activation act, class A>
UDL_INLINE void activate_loop(A* block, int64_t n, A slope) {
  for (int64_t i = 0; i < n; i += 2 * kLanes<A>) {
    const Pack<A> v{load(block + i, Full{}), load(block + i + kLanes<A>, Full{})};
    const Pack<A> out = activate<act, A>(v, slope);
    store(block + i, out.a, Full{});
    store(block + i + kLanes<A>, out.b, Full{});
  }
}
template <Activation act, class A>
UDL_INLINE void activate_grad_loop(A* block, int64_t n, A slope) {
  for (int64_t i = 0; i < n; i += 2 * kLanes<A>) {
    const Pack<A> v{load(block + i, Full{}), load(block + i + kLanes<A>, Full{})};
    const Pack<A> out = activate_grad<act, A>(v, slope);
    store(block + i, out.a, Full{});
    store(block + i + kLanes<A>, out.b, Full{});
  }
}

// act of n values in place; n counts whole packs.
template <class A>
__attribute__((noinline)) void activate_block(const GroupNormSizes& args, A* block, int64_t n) {
  with_activation(args.act, [&](auto act) UDL_LAMBDA {
    activate_loop<decltype(act)::value, A>(block, n, static_cast<A>(args.slope));
  });
}
// The derivative of act at n values in place.
template <class A>
__attribute__((noinline)) void activate_grad_block(const GroupNormSizes& args, A* block,
                                                   int64_t n) {
  with_activation(args.act, [&](auto act) UDL_LAMBDA {
    activate_grad_loop<decltype(act)::value, A>(block, n, static_cast<A>(args.slope));
  });
}

// Number, mean and sum of squared deviations of values seen so far.
struct Moments {
  double n = 0, mean = 0, m2 = 0;

  // Chan's merge.
  UDL_INLINE void add(double count, double its_mean, double its_m2) {
    const double total = n + count, delta = its_mean - mean;
    mean += delta * (count / total);
    m2 += its_m2 + delta * delta * (n * count / total);
    n = total;
  }
};

// Writes down the statistics of one group.
template <class A>
UDL_INLINE void keep_statistics(const GroupNormForward& args, int64_t index, double mean, double var,
                                double rstd) {
  const A kept = static_cast<A>(mean);
  const A rest = static_cast<A>(mean - static_cast<double>(kept));
  static_cast<A*>(args.mean)[index] = kept;
  static_cast<A*>(args.rest)[index] = rest - rest == 0 ? rest : A(0);
  static_cast<A*>(args.var)[index] = static_cast<A>(var);
  static_cast<A*>(args.rstd)[index] = static_cast<A>(rstd);
}

// The statistics of a group, a value at a time, on x / largest: for finite values whose sums or
// squares overflow. Without such values, as computed: NaN.
template <class T>
__attribute__((noinline)) void scaled_statistics(const GroupNormForward& args, int64_t n, int64_t g,
                                                 const Moments& moments) {
  using A = acc_t<T>;
  const int64_t first = g * args.group_channels, index = n * args.groups + g;
  double largest = 0;
  for (int64_t c = 0; c < args.group_channels; ++c) {
    for (int64_t p = 0; p < args.positions; ++p) {
      const double v = std::fabs(static_cast<double>(load_one(args.x.at<T>(n, first + c, p))));
      if (!(v <= largest)) largest = v;
      if (v != v) break;
    }
    if (largest != largest) break;
  }
  if (!(largest > 0 && std::isfinite(largest))) {
    const double var = moments.m2 / moments.n;
    return keep_statistics<A>(args, index, moments.mean, var, 1 / std::sqrt(var + args.eps));
  }
  const double count = static_cast<double>(args.group_channels * args.positions);
  double sum = 0, squares = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const double mean = sum / count;
    for (int64_t c = 0; c < args.group_channels; ++c) {
      for (int64_t p = 0; p < args.positions; ++p) {
        const double v = static_cast<double>(load_one(args.x.at<T>(n, first + c, p))) / largest;
        if (pass == 0) sum += v;
        if (pass == 1) squares += (v - mean) * (v - mean);
      }
    }
  }
  const double var = squares / count;
  const double rstd = 1 / std::sqrt(var + args.eps / largest / largest) / largest;
  keep_statistics<A>(args, index, sum / count * largest, var * largest * largest, rstd);
}

template <class T>
UDL_INLINE void finish_statistics(const GroupNormForward& args, int64_t n, int64_t g,
                                  const Moments& moments) {
  using A = acc_t<T>;
  const double var = moments.m2 / moments.n;
  // What overflows the accumulation type has lost digits on the way already.
  if (!std::isfinite(static_cast<A>(var))) return scaled_statistics<T>(args, n, g, moments);
  keep_statistics<A>(args, n * args.groups + g, moments.mean, var, 1 / std::sqrt(var + args.eps));
}

// weight[c] * rstd and so on read a missing weight as ones and a missing bias as zeros.
template <class A>
UDL_INLINE A parameter(const void* values, int64_t stride, int64_t n, int64_t c, A missing) {
  return values != nullptr ? static_cast<const A*>(values)[n * stride + c] : missing;
}

// With x - mean taken from the mean as kept, `rest` short of exact, and s1, s2 the group's sums of
// weight * g and weight * g * (x - mean):
// dx = g * weight * rstd - (x - mean) * rstd * by_deviation - constant.
template <class A>
struct DxFactors {
  A by_deviation, constant;
};
template <class A>
UDL_INLINE DxFactors<A> dx_factors(double s1, double s2, A rstd, A rest, double count) {
  const double r = static_cast<double>(rstd), lost = static_cast<double>(rest);
  const double by_deviation = r * (r * (s2 - lost * s1) / count);
  return {static_cast<A>(by_deviation),
          static_cast<A>(r * (s1 / count) - lost * r * by_deviation)};
}

}  // namespace
}  // namespace udl::UDL_ISA
