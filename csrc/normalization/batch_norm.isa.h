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

// A [C] array from `first` on, over and over for n columns, in the pack order of T.
template <class T>
class ChannelVector {
  using A = acc_t<T>;

 public:
  ChannelVector(const void* array, int64_t channels, int64_t first, int64_t n)
      : repeated_(array != nullptr && n > channels ? n : 0),
        ordered_(repeat(static_cast<const A*>(array), channels, first, n), n) {}
  UDL_INLINE Pack<A> operator[](int64_t i) const { return load_ordered<T>(ordered_.data() + i); }

 private:
  const A* repeat(const A* array, int64_t channels, int64_t first, int64_t n) {
    if (array == nullptr) return nullptr;
    if (n <= channels) return array + first;
    for (int64_t i = 0; i < n; ++i) repeated_.data()[i] = array[i % channels];
    return repeated_.data();
  }
  Array<A> repeated_;
  PackOrder<T> ordered_;
};

// ... or those of the n columns from `first`.
template <class T>
struct ManyChannels {
  using A = acc_t<T>;
  ManyChannels(const BatchNorm& args, int64_t first, int64_t n)
      : mean_(args.mean, args.channels, first, n),
        alpha_(args.alpha, args.channels, first, n),
        shift_(args.shift, args.channels, first, n),
        rstd_(args.rstd, args.channels, first, n),
        h_factor_(args.h_factor, args.channels, first, n),
        offset_(args.offset, args.channels, first, n) {}
  UDL_INLINE Pack<A> mean(int64_t i) const { return mean_[i]; }
  UDL_INLINE Pack<A> alpha(int64_t i) const { return alpha_[i]; }
  UDL_INLINE Pack<A> shift(int64_t i) const { return shift_[i]; }
  UDL_INLINE Pack<A> rstd(int64_t i) const { return rstd_[i]; }
  UDL_INLINE Pack<A> h_factor(int64_t i) const { return h_factor_[i]; }
  UDL_INLINE Pack<A> offset(int64_t i) const { return offset_[i]; }

 private:
  ChannelVector<T> mean_, alpha_, shift_, rstd_, h_factor_, offset_;
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

  // The gradient before the activation is already where that to the residual belongs.
  UDL_INLINE void take_stored_gradient() { dy = dresidual; }

 private:
  static T* run_of(const Channels& tensor, int64_t channel, int64_t row, int64_t begin) {
    return tensor.data != nullptr ? tensor.at<T>(channel, row) + begin : nullptr;
  }
};

// y of K runs of the same channels; fetch(i) asks for what is needed next.
template <Kind kKind, int K, class T, class Values, class Fetch>
UDL_INLINE void write_runs(const BatchNorm& args, const Run<T> (&run)[K], int64_t n,
                           const Values& values, Fetch fetch) {
  using A = acc_t<T>;
  for_packs<T>(n, [&, run](int64_t i, auto tag) UDL_LAMBDA {
    fetch(i);
    const auto mean = values.mean(i), alpha = values.alpha(i), shift = values.shift(i);
    for (int k = 0; k < K; ++k) {
      Pack<A> z = (load_pack(run[k].x + i, tag) - mean) * alpha + shift;
      if (run[0].residual != nullptr) z = z + load_pack(run[k].residual + i, tag);
      store_pack(run[k].y + i, apply_activation<kKind>(args, z), tag);
    }
  });
}

// g of one pack, given d = x - mean.
template <Kind kKind, class T, class Values, class Tag>
UDL_INLINE Pack<acc_t<T>> gradient_pack(const BatchNorm& args, const Run<T>& run, int64_t i,
                                        Pack<acc_t<T>> d, const Values& values, Tag tag) {
  using A = acc_t<T>;
  const Pack<A> dy = load_pack(run.dy + i, tag);
  if constexpr (kKind == Kind::identity) return dy;
  Pack<A> pre;
  if (args.from_output) {
    pre = load_pack(static_cast<const T*>(run.y) + i, tag);
  } else {
    pre = d * values.alpha(i) + values.shift(i);
    if (run.residual != nullptr) pre = pre + load_pack(run.residual + i, tag);
  }
  return activation_gradient<kKind>(args, dy, pre);
}

// Adds K runs, in their order, to the two sums: sums(i, add) calls add(g, h) with those of pack i.
// Writes the gradient to the residual, and with frozen statistics that to x.
template <Kind kKind, int K, class T, class Values, class Sums>
UDL_INLINE void sum_runs(const BatchNorm& args, const Run<T> (&run)[K], int64_t n,
                         const Values& values, Sums sums) {
  using A = acc_t<T>;
  const bool writes_dx = args.frozen && run[0].dx != nullptr;
  for_packs<T>(n, [&, run, writes_dx](int64_t i, auto tag) UDL_LAMBDA {
    const auto mean = values.mean(i);
    sums(i, [&](Pack<A>& g_sum, Pack<A>& h_sum) UDL_LAMBDA {
      for (int k = 0; k < K; ++k) {
        const Pack<A> d = load_pack(run[k].x + i, tag) - mean;
        const Pack<A> g = gradient_pack<kKind>(args, run[k], i, d, values, tag);
        if (run[0].dresidual != nullptr) store_pack(run[k].dresidual + i, g, tag);
        if (writes_dx) store_pack(run[k].dx + i, g * values.alpha(i), tag);
        g_sum = g_sum + g;
        h_sum = h_sum + keep<T>(g * d, tag);
      }
    });
  });
}

// dx of K runs.
template <Kind kKind, int K, class T, class Values, class Fetch>
UDL_INLINE void gradient_runs(const BatchNorm& args, const Run<T> (&run)[K], int64_t n,
                              const Values& values, Fetch fetch) {
  using A = acc_t<T>;
  for_packs<T>(n, [&, run](int64_t i, auto tag) UDL_LAMBDA {
    fetch(i);
    const auto mean = values.mean(i), rstd = values.rstd(i), alpha = values.alpha(i);
    const auto h_factor = values.h_factor(i), offset = values.offset(i);
    for (int k = 0; k < K; ++k) {
      const Pack<A> d = load_pack(run[k].x + i, tag) - mean;
      const Pack<A> g = gradient_pack<kKind>(args, run[k], i, d, values, tag);
      const Pack<A> u = g + (d * rstd) * h_factor;
      store_pack(run[k].dx + i, u * alpha + offset, tag);
    }
  });
}

}  // namespace
}  // namespace udl::UDL_ISA
