// group_norm where a group's values lie side by side: statistics and result group by group, while
// the group stays in the cache.
#include "normalization/group_norm.isa.h"
#include "transpose.isa.h"

namespace udl::UDL_ISA {
namespace {

// Values whose moments are taken together, in the L1 cache, and then merged.
constexpr int64_t kBlock = 4096;
// Groups up to this size fetch the next one while they are written; larger ones leave that to the
// hardware, which does it better (15-40% slower with).
constexpr int64_t kFetched = 16 << 10;

UDL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Sums of x - around and of its square.
template <class T>
UDL_INLINE void sums_around(const T* x, int64_t n, acc_t<T> around, double& deviation,
                            double& squares) {
  using A = acc_t<T>;
  constexpr int64_t P = kPack<T>;
  Pack<A> s{}, t{}, u{}, v{};
  int64_t i = 0;
  for (; i + 2 * P <= n; i += 2 * P) {
    const Pack<A> d = load_pack(x + i, Full{}) - around, e = load_pack(x + i + P, Full{}) - around;
    s = s + d;
    t = t + e;
    u = u + d * d;
    v = v + e * e;
  }
  for_packs<T>(n - i, [&, x = x + i](int64_t k, auto tag) UDL_LAMBDA {
    const Pack<A> d = keep<T>(load_pack(x + k, tag) - around, tag);
    s = s + d;
    u = u + d * d;
  });
  deviation = static_cast<double>(sum_lanes((s.a + s.b) + (t.a + t.b)));
  squares = static_cast<double>(sum_lanes((u.a + u.b) + (v.a + v.b)));
}

// Merges a block. Its squares are taken around the mean of the blocks before it, or its own where
// it is the first; where that lies too far from the block's mean, again around the latter.
template <class T>
void add_block(Moments& moments, const T* x, int64_t n) {
  using A = acc_t<T>;
  A around = static_cast<A>(moments.mean);
  if (moments.n == 0) {
    around = sum_packs<T>(n, [=](int64_t i, auto tag) UDL_LAMBDA { return load_pack(x + i, tag); }) /
             static_cast<A>(n);
  }
  const double count = static_cast<double>(n);
  double deviation, squares;
  sums_around(x, n, around, deviation, squares);
  constexpr double kTooFar = 0.75;  // of the squares: the rest keeps all but two bits
  if (!(deviation * deviation <= kTooFar * count * squares)) {
    around += static_cast<A>(deviation / count);
    sums_around(x, n, around, deviation, squares);
  }
  const double m2 = squares - deviation * deviation / count;
  moments.add(count, static_cast<double>(around) + deviation / count, m2 < 0 ? 0 : m2);
}

// A stretch of one channel, or of a residual or gradient at the same place.
template <class T>
struct Stretch {
  const T *x, *residual, *ahead;
  T* y;
  int64_t n;
};
template <class A>
struct Affine {
  A mean, scale, shift;
};

// Of channel c of sample n, in the group whose statistics stand at `index`.
template <class A, class Args>
UDL_INLINE Affine<A> affine_of(const Args& args, int64_t index, int64_t n, int64_t c) {
  const A scale = static_cast<const A*>(args.rstd)[index] *
                  parameter<A>(args.weight, args.affine_stride, n, c, A(1));
  return {static_cast<const A*>(args.mean)[index], scale,
          parameter<A>(args.bias, args.affine_stride, n, c, A(0)) -
              static_cast<const A*>(args.rest)[index] * scale};
}

template <class T>
UDL_INLINE Pack<acc_t<T>> normalise(Pack<acc_t<T>> x, const Affine<acc_t<T>>& affine) {
  return (x - affine.mean) * affine.scale + affine.shift;
}

template <class T>
void write_stretch(const Stretch<T>& s, const Affine<acc_t<T>>& affine) {
  if (s.ahead == nullptr) {
    for_packs<T>(s.n, [=](int64_t i, auto tag) UDL_LAMBDA {
      store_pack(s.y + i, normalise<T>(load_pack(s.x + i, tag), affine), tag);
    });
    return;
  }
  for_packs<T>(s.n, [=](int64_t i, auto tag) UDL_LAMBDA {
    prefetch_pack(s.ahead + i);
    store_pack(s.y + i, normalise<T>(load_pack(s.x + i, tag), affine), tag);
  });
}

// norm(x) + residual of at most kScratch values.
template <class T>
void fill_scratch(const Stretch<T>& s, int64_t first, int64_t n, const Affine<acc_t<T>>& affine,
                  acc_t<T>* scratch) {
  const T* x = s.x + first;
  if (s.residual == nullptr) {
    for_packs<T>(n, [=](int64_t i, auto tag) UDL_LAMBDA {
      store_ordered<T>(scratch + i, normalise<T>(load_pack(x + i, tag), affine));
    });
  } else {
    const T* residual = s.residual + first;
    for_packs<T>(n, [=](int64_t i, auto tag) UDL_LAMBDA {
      store_ordered<T>(scratch + i, normalise<T>(load_pack(x + i, tag), affine) +
                                        load_pack(residual + i, tag));
    });
  }
}

template <class T>
void write_activated(const GroupNormSizes& args, const Stretch<T>& s,
                     const Affine<acc_t<T>>& affine) {
  using A = acc_t<T>;
  UDL_LINES A scratch[kScratch];
  for (int64_t first = 0; first < s.n; first += kScratch) {
    const int64_t n = least(s.n - first, kScratch);
    fill_scratch(s, first, n, affine, scratch);
    activate_block(args, scratch, whole_packs<T>(n));
    T* y = s.y + first;
    for_packs<T>(n, [=, block = static_cast<const A*>(scratch)](int64_t i, auto tag) UDL_LAMBDA {
      store_pack(y + i, load_ordered<T>(block + i), tag);
    });
  }
}

template <class T>
void forward_group(const GroupNormForward& args, int64_t n, int64_t g, const T* ahead) {
  using A = acc_t<T>;
  const int64_t channels = args.group_channels, first = g * channels;
  const int64_t size = channels * args.positions, index = n * args.groups + g;
  const T* x = args.x.at<T>(n, first, 0);
  T* y = static_cast<T*>(args.y) + (n * args.channels + first) * args.positions;
  Moments moments;
  for (int64_t i = 0; i < size; i += kBlock) {
    add_block(moments, x + i, least(size - i, kBlock));
  }
  finish_statistics<T>(args, n, g, moments);
  const bool direct = args.act == Activation::identity && args.residual.data == nullptr;
  for (int64_t k = 0; k < channels; ++k) {
    const int64_t c = first + k, offset = k * args.positions;
    const Affine<A> affine = affine_of<A>(args, index, n, c);
    const T* residual =
        args.residual.data != nullptr ? args.residual.at<T>(n, c, 0) : nullptr;
    const T* fetched = ahead != nullptr ? ahead + offset : nullptr;
    const Stretch<T> s{x + offset, residual, fetched, y + offset, args.positions};
    if (direct) {
      write_stretch(s, affine);
    } else {
      write_activated(args, s, affine);
    }
  }
}

// Channels of a block of groups, from lines to planes.
template <class T>
void turn_block(const GroupNormSizes& args, const Maps& lines, int64_t n, int64_t first,
                int64_t last, void* planes) {
  const int64_t c = first * args.group_channels;
  lines_to_planes(lines.at<T>(n, c, 0), lines.position, args.positions,
                  (last - first) * args.group_channels,
                  static_cast<T*>(planes) + (n * args.channels + c) * args.positions);
}

template <class T>
void forward_blocks(const GroupNormForward& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.groups + args.block_groups - 1) / args.block_groups;
  const bool small = args.group_channels * args.positions * int64_t{sizeof(T)} <= kFetched;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / blocks, first = unit % blocks * args.block_groups;
    const int64_t last = least(first + args.block_groups, args.groups);
    if (args.lines.data != nullptr) turn_block<T>(args, args.lines, n, first, last, args.y);
    for (int64_t g = first; g < last; ++g) {
      const int64_t next = (unit + 1) % blocks * args.group_channels;
      const bool fetch = small && unit + 1 < end && args.lines.data == nullptr;
      forward_group<T>(args, n, g, fetch ? args.x.at<T>((unit + 1) / blocks, next, 0) : nullptr);
    }
  }
}

struct ChannelSums {
  double g = 0, g_deviation = 0;
};

// Sums over one stretch of g and g * (x - mean), where g = dy.
template <class T>
ChannelSums sum_stretch(const T* dy, const T* x, acc_t<T> mean, int64_t size) {
  using A = acc_t<T>;
  ChannelSums sums;
  for (int64_t first = 0; first < size; first += kBlock) {
    Pack<A> s1{}, s2{};
    for_packs<T>(least(size - first, kBlock),
                 [&s1, &s2, mean, dy = dy + first, x = x + first](int64_t i, auto tag) UDL_LAMBDA {
                   const Pack<A> g = load_pack(dy + i, tag);
                   s1 = s1 + g;
                   s2 = s2 + g * (load_pack(x + i, tag) - mean);
                 });
    sums.g += static_cast<double>(sum_lanes(s1.a + s1.b));
    sums.g_deviation += static_cast<double>(sum_lanes(s2.a + s2.b));
  }
  return sums;
}

// The same with an activation: g = dy * act'(norm(x) + residual), which is written down.
template <class T>
ChannelSums sum_activated(const GroupNormSizes& args, const T* dy, const Stretch<T>& s,
                                    const Affine<acc_t<T>>& affine) {
  using A = acc_t<T>;
  ChannelSums sums;
  UDL_LINES A scratch[kScratch];
  for (int64_t first = 0; first < s.n; first += kScratch) {
    const int64_t n = least(s.n - first, kScratch);
    fill_scratch(s, first, n, affine, scratch);
    activate_grad_block(args, scratch, whole_packs<T>(n));
    Pack<A> s1{}, s2{};
    for_packs<T>(n, [&s1, &s2, mean = affine.mean, dy = dy + first, x = s.x + first,
                     out = s.y + first, block = static_cast<const A*>(scratch)](
                        int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> g = keep<T>(load_pack(dy + i, tag) * load_ordered<T>(block + i), tag);
      store_pack(out + i, g, tag);
      s1 = s1 + g;
      s2 = s2 + g * (load_pack(x + i, tag) - mean);
    });
    sums.g += static_cast<double>(sum_lanes(s1.a + s1.b));
    sums.g_deviation += static_cast<double>(sum_lanes(s2.a + s2.b));
  }
  return sums;
}

template <class T>
struct Gradient {
  const T *g, *x;
  T* dx;
  int64_t n;
};

template <class T>
UDL_INLINE void write_dx(const Gradient<T>& s, acc_t<T> mean, acc_t<T> rstd, acc_t<T> scale,
                         DxFactors<acc_t<T>> factors, const T* next_g, const T* next_x) {
  const auto write = [=](auto fetch) UDL_LAMBDA {
    for_packs<T>(s.n, [=](int64_t i, auto tag) UDL_LAMBDA {
      if constexpr (decltype(fetch)::value) {
        prefetch_pack(next_g + i);
        prefetch_pack(next_x + i);
      }
      const auto x_hat = (load_pack(s.x + i, tag) - mean) * rstd;
      const auto scaled = load_pack(s.g + i, tag) * scale;
      store_pack(s.dx + i, scaled - x_hat * factors.by_deviation - factors.constant, tag);
    });
  };
  if (next_g != nullptr) {
    write(std::true_type{});
  } else {
    write(std::false_type{});
  }
}

// next: the sample and group to fetch meanwhile; none where negative.
template <class T>
void backward_group(const GroupNormBackward& args, int64_t n, int64_t g, int64_t next_n,
                    int64_t next_g) {
  using A = acc_t<T>;
  const int64_t channels = args.group_channels, first = g * channels;
  const int64_t index = n * args.groups + g, base = (n * args.channels + first) * args.positions;
  const A mean = static_cast<const A*>(args.mean)[index];
  const A rstd = static_cast<const A*>(args.rstd)[index];
  const A rest = static_cast<const A*>(args.rest)[index];
  const bool activated = args.act != Activation::identity;
  T* dx = args.dx != nullptr ? static_cast<T*>(args.dx) + base : nullptr;
  T* gradient = activated ? static_cast<T*>(args.gradient) + base : nullptr;
  double s1 = 0, s2 = 0;
  for (int64_t k = 0; k < channels; ++k) {
    const int64_t c = first + k, offset = k * args.positions;
    const T *dy = args.dy.at<T>(n, c, 0), *x = args.x.at<T>(n, c, 0);
    const A weight = parameter<A>(args.weight, args.affine_stride, n, c, A(1));
    ChannelSums sums;
    if (activated) {
      const Affine<A> affine = affine_of<A>(args, index, n, c);
      const T* residual =
          args.residual.data != nullptr ? args.residual.at<T>(n, c, 0) : nullptr;
      sums = sum_activated(args, dy, {x, residual, x, gradient + offset, args.positions}, affine);
    } else {
      sums = sum_stretch(dy, x, mean, args.positions);
    }
    const int64_t place = n * args.channels + c;
    static_cast<A*>(args.dbias)[place] = static_cast<A>(sums.g);
    static_cast<A*>(args.dweight)[place] =
        static_cast<A>((sums.g_deviation - static_cast<double>(rest) * sums.g) *
                       static_cast<double>(rstd));
    s1 += static_cast<double>(weight) * sums.g;
    s2 += static_cast<double>(weight) * sums.g_deviation;
  }
  if (dx == nullptr) return;
  const DxFactors<A> factors =
      dx_factors(s1, s2, rstd, rest, static_cast<double>(channels * args.positions));
  for (int64_t k = 0; k < channels; ++k) {
    const int64_t c = first + k, offset = k * args.positions;
    const A scale = rstd * parameter<A>(args.weight, args.affine_stride, n, c, A(1));
    const T* from = activated ? gradient + offset : args.dy.at<T>(n, c, 0);
    const bool fetch = next_n >= 0;
    const int64_t next_c = next_g * channels + k;
    write_dx<T>({from, args.x.at<T>(n, c, 0), dx + offset, args.positions}, mean, rstd, scale,
                factors, fetch ? args.dy.at<T>(next_n, next_c, 0) : nullptr,
                fetch ? args.x.at<T>(next_n, next_c, 0) : nullptr);
  }
}

template <class T>
void backward_blocks(const GroupNormBackward& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.groups + args.block_groups - 1) / args.block_groups;
  const bool small = args.group_channels * args.positions * int64_t{sizeof(T)} <= kFetched;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / blocks, first = unit % blocks * args.block_groups;
    const int64_t last = least(first + args.block_groups, args.groups);
    const bool turned = args.lines.data != nullptr;
    if (turned) turn_block<T>(args, args.lines, n, first, last, args.dx);
    for (int64_t g = first; g < last; ++g) {
      const bool fetch = small && !turned && unit + 1 < end;
      backward_group<T>(args, n, g, fetch ? (unit + 1) / blocks : -1, (unit + 1) % blocks);
    }
  }
}

}  // namespace

void group_norm_planes_forward(const GroupNormForward& args, int64_t begin, int64_t end) {
  with_type(args.dtype,
            [&](auto type) { forward_blocks<decltype(type)>(args, begin, end); });
}

void group_norm_planes_backward(const GroupNormBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype,
            [&](auto type) { backward_blocks<decltype(type)>(args, begin, end); });
}

}  // namespace udl::UDL_ISA
