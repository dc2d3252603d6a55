// What the two forms of batch norm share: the loops along a row, and the arithmetic per channel.
#pragma once

#include "activation.isa.h"
#include "normalization/batch_norm.h"
#include "vec.h"

namespace udl::UDL_ISA {
namespace {

// Loops are compiled for these; `other` looks the activation up once a pack.
enum class Kind : int { identity, relu, other };

// Calls body(T{}, integral_constant<Kind>) for the element type and the activation of a call.
template <class Body>
UDL_INLINE void with_kind(const BatchNorm& args, Body body) {
  with_type(args.dtype, [&](auto type) {
    if (args.activation == Activation::identity) {
      body(type, std::integral_constant<Kind, Kind::identity>{});
    } else if (args.activation == Activation::relu) {
      body(type, std::integral_constant<Kind, Kind::relu>{});
    } else {
      body(type, std::integral_constant<Kind, Kind::other>{});
    }
  });
}

template <Kind kKind, class A>
UDL_INLINE Pack<A> apply_activation(const BatchNorm& args, Pack<A> z) {
  if constexpr (kKind == Kind::identity) return z;
  if constexpr (kKind == Kind::relu) return activate<Activation::relu>(z, A(0));
  Pack<A> out = z;
  if constexpr (kKind == Kind::other) {
    with_activation(args.activation, [&](auto act) UDL_LAMBDA {
      out = activate<decltype(act)::value>(z, static_cast<A>(args.slope));
    });
  }
  return out;
}

// dy * act'(pre).
template <Kind kKind, class A>
UDL_INLINE Pack<A> activation_gradient(const BatchNorm& args, Pack<A> dy, Pack<A> pre) {
  if constexpr (kKind == Kind::identity) return dy;
  // A selection, so that an infinite gradient is stopped too.
  if constexpr (kKind == Kind::relu) {
    return {pre.a <= 0 ? vec_t<A>{} : dy.a, pre.b <= 0 ? vec_t<A>{} : dy.b};
  }
  Pack<A> factor = dy;
  if constexpr (kKind == Kind::other) {
    with_activation(args.activation, [&](auto act) UDL_LAMBDA {
      factor = activate_grad<decltype(act)::value>(pre, static_cast<A>(args.slope));
    });
  }
  return dy * factor;
}

template <class A>
UDL_INLINE A value_of(const void* array, int64_t i, A otherwise) {
  return array != nullptr ? static_cast<const A*>(array)[i] : otherwise;
}

// What a loop needs of the channels it runs over: one channel's values along a plane, ...
template <class T>
struct OneChannel {
  using A = acc_t<T>;
  OneChannel(const BatchNorm& args, int64_t c)
      : mean_(static_cast<const A*>(args.mean)[c]),
        alpha_(static_cast<const A*>(args.alpha)[c]),
        shift_(static_cast<const A*>(args.shift)[c]),
        rstd_(static_cast<const A*>(args.rstd)[c]),
        h_factor_(value_of<A>(args.h_factor, c, 0)),
        offset_(value_of<A>(args.offset, c, 0)) {}
  UDL_INLINE A mean(int64_t) const { return mean_; }
  UDL_INLINE A alpha(int64_t) const { return alpha_; }
  UDL_INLINE A shift(int64_t) const { return shift_; }
  UDL_INLINE A rstd(int64_t) const { return rstd_; }
  UDL_INLINE A h_factor(int64_t) const { return h_factor_; }
  UDL_INLINE A offset(int64_t) const { return offset_; }

 private:
  A mean_, alpha_, shift_, rstd_, h_factor_, offset_;
};

// ... or those of n neighbouring channels from `first`, in the pack order of T.
template <class T>
struct ManyChannels {
  using A = acc_t<T>;
  ManyChannels(const BatchNorm& args, int64_t first, int64_t n)
      : mean_(from(args.mean, first), n),
        alpha_(from(args.alpha, first), n),
        shift_(from(args.shift, first), n),
        rstd_(from(args.rstd, first), n),
        h_factor_(from(args.h_factor, first), n),
        offset_(from(args.offset, first), n) {}
  UDL_INLINE Pack<A> mean(int64_t i) const { return load_ordered<T>(mean_.data() + i); }
  UDL_INLINE Pack<A> alpha(int64_t i) const { return load_ordered<T>(alpha_.data() + i); }
  UDL_INLINE Pack<A> shift(int64_t i) const { return load_ordered<T>(shift_.data() + i); }
  UDL_INLINE Pack<A> rstd(int64_t i) const { return load_ordered<T>(rstd_.data() + i); }
  UDL_INLINE Pack<A> h_factor(int64_t i) const { return load_ordered<T>(h_factor_.data() + i); }
  UDL_INLINE Pack<A> offset(int64_t i) const { return load_ordered<T>(offset_.data() + i); }

 private:
  static const A* from(const void* array, int64_t first) {
    return array != nullptr ? static_cast<const A*>(array) + first : nullptr;
  }
  PackOrder<T> mean_, alpha_, shift_, rstd_, h_factor_, offset_;
};

// Pointers to one run of elements; null where a tensor is absent.
template <class T>
struct Run {
  Run(const BatchNorm& args, int64_t channel, int64_t row, int64_t begin)
      : x(args.x.at<T>(channel, row) + begin),
        residual(run_of(args.residual, channel, row, begin)),
        y(run_of(args.y, channel, row, begin)),
        dy(run_of(args.dy, channel, row, begin)),
        dx(run_of(args.dx, channel, row, begin)),
        dresidual(run_of(args.dresidual, channel, row, begin)) {}
  const T *x, *residual;
  T* y;
  const T* dy;
  T *dx, *dresidual;

 private:
  static T* run_of(const Channels& tensor, int64_t channel, int64_t row, int64_t begin) {
    return tensor.data != nullptr ? tensor.at<T>(channel, row) + begin : nullptr;
  }
};

// y of one run; `ahead` is what to fetch meanwhile.
template <Kind kKind, class T, class Values>
UDL_INLINE void write_run(const BatchNorm& args, const Run<T>& run, const T* ahead, int64_t n,
                          const Values& values) {
  using A = acc_t<T>;
  for_packs<T>(n, [&, run](int64_t i, auto tag) UDL_LAMBDA {
    prefetch_pack(ahead + i);
    Pack<A> z = (load_pack(run.x + i, tag) - values.mean(i)) * values.alpha(i) + values.shift(i);
    if (run.residual != nullptr) z = z + load_pack(run.residual + i, tag);
    store_pack(run.y + i, apply_activation<kKind>(args, z), tag);
  });
}

// g of one pack, given d = x - mean.
template <Kind kKind, class T, class Values, class Tag>
UDL_INLINE Pack<acc_t<T>> gradient_pack(const BatchNorm& args, const Run<T>& run, int64_t i,
                                        Pack<acc_t<T>> d, const Values& values, Tag tag) {
  using A = acc_t<T>;
  const Pack<A> dy = load_pack(run.dy + i, tag);
  if (kKind == Kind::identity) return dy;
  Pack<A> pre;
  if (args.from_output) {
    pre = load_pack(static_cast<const T*>(run.y) + i, tag);
  } else {
    pre = d * values.alpha(i) + values.shift(i);
    if (run.residual != nullptr) pre = pre + load_pack(run.residual + i, tag);
  }
  return activation_gradient<kKind>(args, dy, pre);
}

// The two sums over a run, added to g_sum(i) and h_sum(i), which return references. Writes the
// gradient to the residual, and with frozen statistics that to x.
template <Kind kKind, class T, class Values, class Add>
UDL_INLINE void sum_run(const BatchNorm& args, const Run<T>& run, int64_t n, const Values& values,
                        Add add) {
  using A = acc_t<T>;
  T* dx = args.frozen ? run.dx : nullptr;
  for_packs<T>(n, [&, run, dx](int64_t i, auto tag) UDL_LAMBDA {
    const Pack<A> d = load_pack(run.x + i, tag) - values.mean(i);
    const Pack<A> g = gradient_pack<kKind>(args, run, i, d, values, tag);
    if (run.dresidual != nullptr) store_pack(run.dresidual + i, g, tag);
    if (dx != nullptr) store_pack(dx + i, g * values.alpha(i), tag);
    add(i, g, keep<T>(g * d, tag));
  });
}

// dx of one run.
template <Kind kKind, class T, class Values>
UDL_INLINE void gradient_run(const BatchNorm& args, const Run<T>& run, const T* ahead_x,
                             const T* ahead_dy, int64_t n, const Values& values) {
  using A = acc_t<T>;
  for_packs<T>(n, [&, run](int64_t i, auto tag) UDL_LAMBDA {
    prefetch_pack(ahead_x + i);
    prefetch_pack(ahead_dy + i);
    const Pack<A> d = load_pack(run.x + i, tag) - values.mean(i);
    const Pack<A> g = gradient_pack<kKind>(args, run, i, d, values, tag);
    const Pack<A> u = g + (d * values.rstd(i)) * values.h_factor(i);
    store_pack(run.dx + i, u * values.alpha(i) + values.offset(i), tag);
  });
}

}  // namespace
}  // namespace udl::UDL_ISA
