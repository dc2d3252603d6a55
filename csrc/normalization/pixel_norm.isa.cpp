#include "normalization/pixel_norm.h"

#include "normalization/root.isa.h"

namespace udl::UDL_ISA {
namespace {

constexpr int64_t kPiece = 32;  // channels added up before they join the sum: bounds its error

// Some packs of positions of one sample.
template <class T>
struct Strip {
  const T *x, *dy;
  T* out;
  int64_t x_step, dy_step, out_step, channels;
  double eps;
};

template <class A, int kPacks>
struct Sums {
  Pack<A> squares[kPacks] = {}, products[kPacks] = {};
};

// Sums over the channels of x^2 and, with kBackward, of x * dy.
template <bool kBackward, int kPacks, class T, class Tag>
UDL_INLINE Sums<acc_t<T>, kPacks> sum_channels(const Strip<T>& strip, Tag tag) {
  using A = acc_t<T>;
  Sums<A, kPacks> sums;
  for (int64_t start = 0; start < strip.channels; start += kPiece) {
    const int64_t end = start + kPiece < strip.channels ? start + kPiece : strip.channels;
    Sums<A, kPacks> piece;
    for (int64_t c = start; c < end; ++c) {
      const T* x = strip.x + c * strip.x_step;
      const T* dy = strip.dy + c * strip.dy_step;
      for (int k = 0; k < kPacks; ++k) {
        prefetch_pack_write(strip.out + c * strip.out_step + k * kPack<T>);
        const Pack<A> v = load_pack(x + k * kPack<T>, tag);
        piece.squares[k] = piece.squares[k] + v * v;
        if (!kBackward) continue;
        piece.products[k] = piece.products[k] + v * load_pack(dy + k * kPack<T>, tag);
      }
    }
    for (int k = 0; k < kPacks; ++k) {
      sums.squares[k] = sums.squares[k] + piece.squares[k];
      sums.products[k] = sums.products[k] + piece.products[k];
    }
  }
  return sums;
}

// One inverse root mean square, scaled by the largest value where the squares overflow.
template <class T>
acc_t<T> scaled_rstd(const T* x, int64_t step, int64_t channels, double eps) {
  using A = acc_t<T>;
  A largest = 0, sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const A magnitude = std::fabs(load_one(x + c * step));
    if (!(magnitude <= largest)) largest = magnitude;
    if (magnitude != magnitude) return magnitude;
  }
  if (!std::isfinite(largest) || largest == 0) largest = 1;
  for (int64_t c = 0; c < channels; ++c) {
    const A scaled = load_one(x + c * step) / largest;
    sum += scaled * scaled;
  }
  return 1 / std::sqrt(sum / static_cast<A>(channels) + static_cast<A>(eps) / largest / largest) /
         largest;
}

template <class T>
__attribute__((noinline)) Pack<acc_t<T>> redo_rstd(const Strip<T>& strip, const T* x, int n) {
  using A = acc_t<T>;
  A natural[kPack<T>] = {}, ordered[kPack<T>];
  for (int i = 0; i < n; ++i) {
    natural[i] = scaled_rstd(x + i, strip.x_step, strip.channels, strip.eps);
  }
  to_pack_order<T>(natural, ordered, kPack<T>);
  return load_ordered<T>(ordered);
}

UDL_INLINE int lanes(Full, int pack) { return pack; }
UDL_INLINE int lanes(Tail tail, int) { return tail.n; }

// Both passes over a strip, whose values the second finds in the cache.
template <bool kBackward, int kPacks, class T, class Tag>
void norm_strip(const Strip<T>& strip, Tag tag) {
  using A = acc_t<T>;
  Sums<A, kPacks> sums = sum_channels<kBackward, kPacks>(strip, tag);
  const A channels = static_cast<A>(strip.channels), eps = static_cast<A>(strip.eps);
  Pack<A> rstd[kPacks];
  for (int k = 0; k < kPacks; ++k) {
    const Pack<A> sum = sums.squares[k];
    rstd[k] = {1 / root(sum.a / channels + eps), 1 / root(sum.b / channels + eps)};
    if (!std::isfinite(sum_lanes(sum.a / channels + sum.b / channels))) {
      rstd[k] = redo_rstd(strip, strip.x + k * kPack<T>, lanes(tag, kPack<T>));
    }
    if (kBackward) sums.products[k] = sums.products[k] * rstd[k] / channels;
  }
  for (int64_t c = 0; c < strip.channels; ++c) {
    const T* x = strip.x + c * strip.x_step;
    const T* dy = strip.dy + c * strip.dy_step;
    T* out = strip.out + c * strip.out_step;
    for (int k = 0; k < kPacks; ++k) {
      const Pack<A> x_hat = load_pack(x + k * kPack<T>, tag) * rstd[k];
      Pack<A> result = x_hat;
      if (kBackward) {
        result = (load_pack(dy + k * kPack<T>, tag) - x_hat * sums.products[k]) * rstd[k];
      }
      store_pack(out + k * kPack<T>, result, tag);
    }
  }
}

template <bool kBackward, class T>
void run(const PixelNorm& args, int64_t begin, int64_t end) {
  constexpr int kTogether = 4;
  const int64_t units = args.units_per_sample(), positions = args.x.positions;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / units, first = unit % units * PixelNorm::kBlock;
    const int64_t last = first + PixelNorm::kBlock < positions ? first + PixelNorm::kBlock : positions;
    const auto strip = [&](int64_t p) {
      return Strip<T>{args.x.at<T>(sample, 0) + p,
                      kBackward ? args.dy.at<T>(sample, 0) + p : nullptr,
                      static_cast<T*>(args.out) + sample * args.x.channels * positions + p,
                      args.x.step,
                      args.dy.step,
                      positions,
                      args.x.channels,
                      args.eps};
    };
    int64_t p = first;
    for (; p + kTogether * kPack<T> <= last; p += kTogether * kPack<T>) {
      norm_strip<kBackward, kTogether>(strip(p), Full{});
    }
    for (; p + kPack<T> <= last; p += kPack<T>) norm_strip<kBackward, 1>(strip(p), Full{});
    if (p < last) norm_strip<kBackward, 1>(strip(p), Tail{static_cast<int>(last - p)});
  }
}

}  // namespace

void pixel_norm_planes(const PixelNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    if (args.dy.data != nullptr) {
      run<true, decltype(type)>(args, begin, end);
    } else {
      run<false, decltype(type)>(args, begin, end);
    }
  });
}

}  // namespace udl::UDL_ISA
