// group_norm in channels-last: per-channel sums over chunks of positions, folded to groups, then one
// pass that writes. A pack of channels is taken through a block of positions at a time, so that its
// parameters and sums stay in registers and the block's lines in the L1 cache.
#include "normalization/group_norm.isa.h"

namespace udl::UDL_ISA {
namespace {

constexpr int64_t kPositions = 64;  // positions of a block of sums
constexpr int64_t kWritten = 16;    // positions of a block that is written
constexpr int64_t kChannels = 512;  // channels folded together

UDL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Chunk {
  int64_t n, index, first, last;  // sample, number within it, positions
};
UDL_INLINE Chunk chunk_of(const GroupNormSizes& args, int64_t unit) {
  const int64_t n = unit / args.chunks, index = unit % args.chunks;
  const int64_t first = index * args.chunk_positions;
  return {n, index, first, least(first + args.chunk_positions, args.positions)};
}

// Working vectors over the channels, in pack order.
template <class T>
class ChannelVectors {
 public:
  using A = acc_t<T>;
  ChannelVectors(int64_t channels, int count)
      : width_(whole_packs<T>(channels)), data_(new A[static_cast<size_t>(width_ * count)]()) {}
  ChannelVectors(const ChannelVectors&) = delete;
  ChannelVectors& operator=(const ChannelVectors&) = delete;
  ~ChannelVectors() { delete[] data_; }
  A* operator[](int index) { return data_ + index * width_; }
  void clear(int count) { std::memset(data_, 0, static_cast<size_t>(width_ * count) * sizeof(A)); }

 private:
  int64_t width_;
  A* data_;
};

// Mean and squared deviations of one pack of channels over a block of positions, merged (Chan) into
// those of `seen` positions before it.
template <class T, class Tag>
UDL_INLINE void add_moments(const T* x, int64_t stride, int64_t positions, int64_t seen,
                            acc_t<T>* means, acc_t<T>* m2s, Tag tag) {
  using A = acc_t<T>;
  Pack<A> s{}, t{};
  int64_t p = 0;
  for (; p + 2 <= positions; p += 2) {
    s = s + load_pack(x + p * stride, tag);
    t = t + load_pack(x + (p + 1) * stride, tag);
  }
  if (p < positions) s = s + load_pack(x + p * stride, tag);
  const A one_over = A(1) / static_cast<A>(positions);
  const Pack<A> mean = (s + t) * one_over;
  Pack<A> rest{}, squares{};
  for (p = 0; p < positions; ++p) {
    const Pack<A> d = load_pack(x + p * stride, tag) - mean;
    rest = rest + d;
    squares = squares + d * d;
  }
  // What rounding left in the mean goes into it now, and out of the squares.
  const Pack<A> its_mean = mean + rest * one_over;
  const Pack<A> its_m2 = squares - rest * rest * one_over;
  const Pack<A> old_mean = load_ordered<T>(means), old_m2 = load_ordered<T>(m2s);
  const Pack<A> delta = its_mean - old_mean;
  const A total = static_cast<A>(seen + positions);
  const A share = static_cast<A>(positions) / total;
  store_ordered<T>(means, old_mean + delta * share);
  store_ordered<T>(m2s, old_m2 + its_m2 + delta * delta * (share * static_cast<A>(seen)));
}

template <class T>
void chunk_moments(const GroupNormForward& args, const Chunk& chunk, ChannelVectors<T>& vectors) {
  using A = acc_t<T>;
  vectors.clear(2);
  A *means = vectors[0], *m2s = vectors[1];
  const int64_t stride = args.x.position;
  for (int64_t p = chunk.first; p < chunk.last; p += kPositions) {
    const T* x = args.x.at<T>(chunk.n, 0, p);
    const int64_t positions = least(kPositions, chunk.last - p), seen = p - chunk.first;
    for_packs<T>(args.channels, [=](int64_t c, auto tag) UDL_LAMBDA {
      add_moments(x + c, stride, positions, seen, means + c, m2s + c, tag);
    });
  }
  A* out = static_cast<A*>(args.partials) +
           (chunk.n * args.chunks + chunk.index) * 2 * args.channels;
  from_pack_order<T>(means, out, args.channels);
  from_pack_order<T>(m2s, out + args.channels, args.channels);
}

// The statistics of one group from those of its channels in every chunk, around their common mean.
template <class T>
void fold_group(const GroupNormForward& args, int64_t n, int64_t g) {
  using A = acc_t<T>;
  const int64_t D = args.group_channels, C = args.channels;
  const A* partials = static_cast<const A*>(args.partials) + n * args.chunks * 2 * C + g * D;
  const auto positions_of = [&](int64_t k) UDL_LAMBDA {
    return static_cast<double>(
        least(args.chunk_positions, args.positions - k * args.chunk_positions));
  };
  double sum = 0;
  for (int64_t k = 0; k < args.chunks; ++k) {
    double means = 0;
    for (int64_t c = 0; c < D; ++c) means += static_cast<double>(partials[k * 2 * C + c]);
    sum += means * positions_of(k);
  }
  Moments moments;
  moments.n = static_cast<double>(D * args.positions);
  moments.mean = sum / moments.n;
  for (int64_t k = 0; k < args.chunks; ++k) {
    double within = 0, between = 0;
    for (int64_t c = 0; c < D; ++c) {
      const double delta = static_cast<double>(partials[k * 2 * C + c]) - moments.mean;
      within += static_cast<double>(partials[k * 2 * C + C + c]);
      between += delta * delta;
    }
    moments.m2 += within + between * positions_of(k);
  }
  if (moments.m2 < 0) moments.m2 = 0;
  finish_statistics<T>(args, n, g, moments);
}

// body(c, g) for every channel and its group.
template <class Body>
UDL_INLINE void for_channels(const GroupNormSizes& args, Body body) {
  for (int64_t g = 0; g < args.groups; ++g) {
    const int64_t first = g * args.group_channels;
    for (int64_t c = first; c < first + args.group_channels; ++c) body(c, g);
  }
}

// Per-channel mean, weight * rstd and bias of a sample, in pack order.
template <class T, class Args>
void sample_affine(const Args& args, int64_t n, ChannelVectors<T>& vectors, acc_t<T>* natural) {
  using A = acc_t<T>;
  const A* mean = static_cast<const A*>(args.mean) + n * args.groups;
  const A* rstd = static_cast<const A*>(args.rstd) + n * args.groups;
  const A* rest = static_cast<const A*>(args.rest) + n * args.groups;
  const A* weight = static_cast<const A*>(args.weight);
  const A* bias = static_cast<const A*>(args.bias);
  for_channels(args, [=](int64_t c, int64_t g) UDL_LAMBDA { natural[c] = mean[g]; });
  to_pack_order<T>(natural, vectors[0], args.channels);
  if (weight != nullptr) {
    const A* own = weight + n * args.affine_stride;
    for_channels(args, [=](int64_t c, int64_t g) UDL_LAMBDA { natural[c] = rstd[g] * own[c]; });
  } else {
    for_channels(args, [=](int64_t c, int64_t g) UDL_LAMBDA { natural[c] = rstd[g]; });
  }
  to_pack_order<T>(natural, vectors[1], args.channels);
  for_channels(args, [=](int64_t c, int64_t g) UDL_LAMBDA { natural[c] *= -rest[g]; });
  if (bias != nullptr) {
    const A* own = bias + n * args.affine_stride;
    for_channels(args, [=](int64_t c, int64_t) UDL_LAMBDA { natural[c] += own[c]; });
  }
  to_pack_order<T>(natural, vectors[2], args.channels);
}

template <class A>
struct Affine {
  Pack<A> mean, scale, shift;
};
template <class T>
UDL_INLINE Affine<acc_t<T>> affine_at(ChannelVectors<T>& vectors, int64_t c) {
  return {load_ordered<T>(vectors[0] + c), load_ordered<T>(vectors[1] + c),
          load_ordered<T>(vectors[2] + c)};
}
template <class A>
UDL_INLINE Pack<A> normalise(Pack<A> x, const Affine<A>& affine) {
  return (x - affine.mean) * affine.scale + affine.shift;
}

// norm(x) + residual of one pack of channels at `positions` positions, a pack after the other.
template <class T, class Tag>
UDL_INLINE void fill_scratch(const T* x, int64_t stride, const T* residual,
                             int64_t residual_stride, int64_t positions,
                             const Affine<acc_t<T>>& affine, acc_t<T>* scratch, Tag tag) {
  for (int64_t p = 0; p < positions; ++p) {
    Pack<acc_t<T>> pre = normalise(load_pack(x + p * stride, tag), affine);
    if (residual != nullptr) pre = pre + load_pack(residual + p * residual_stride, tag);
    store_ordered<T>(scratch + p * kPack<T>, pre);
  }
}

template <class T>
UDL_INLINE const T* residual_at(const Maps& residual, int64_t n, int64_t p) {
  return residual.data != nullptr ? residual.at<T>(n, 0, p) : nullptr;
}

template <class T>
void write_chunk(const GroupNormForward& args, const Chunk& chunk, ChannelVectors<T>& vectors) {
  using A = acc_t<T>;
  const int64_t stride = args.x.position, C = args.channels;
  const bool direct = args.act == Activation::identity && args.residual.data == nullptr;
  A scratch[kWritten * kPack<T>];
  for (int64_t p = chunk.first; p < chunk.last; p += kWritten) {
    const int64_t positions = least(kWritten, chunk.last - p);
    const T* x = args.x.at<T>(chunk.n, 0, p);
    const T* residual = residual_at<T>(args.residual, chunk.n, p);
    T* y = static_cast<T*>(args.y) + (chunk.n * args.positions + p) * C;
    for_packs<T>(C, [&, x, y, stride, positions, C](int64_t c, auto tag) UDL_LAMBDA {
      const Affine<A> affine = affine_at(vectors, c);
      if (direct) {
        for (int64_t i = 0; i < positions; ++i) {
          store_pack(y + i * C + c, normalise(load_pack(x + i * stride + c, tag), affine), tag);
        }
        return;
      }
      fill_scratch(x + c, stride, residual != nullptr ? residual + c : nullptr,
                   args.residual.position, positions, affine, static_cast<A*>(scratch), tag);
      activate_block(args, static_cast<A*>(scratch), positions * kPack<T>);
      for (int64_t i = 0; i < positions; ++i) {
        store_pack(y + i * C + c, load_ordered<T>(scratch + i * kPack<T>), tag);
      }
    });
  }
}

template <class T>
void write_chunks(const GroupNormForward& args, int64_t begin, int64_t end) {
  ChannelVectors<T> vectors(args.channels, 4);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk chunk = chunk_of(args, unit);
    if (unit == begin || chunk.index == 0) sample_affine(args, chunk.n, vectors, vectors[3]);
    write_chunk(args, chunk, vectors);
  }
}

// Sums of g and g * (x - mean) of one pack of channels over a block, added to those before.
template <class T, class Tag>
UDL_INLINE void add_sums(const T* dy, int64_t dy_stride, const T* x, int64_t stride,
                         int64_t positions, Pack<acc_t<T>> mean, acc_t<T>* g_sums,
                         acc_t<T>* deviation_sums, Tag tag) {
  using A = acc_t<T>;
  Pack<A> s1{}, s2{};
  for (int64_t p = 0; p < positions; ++p) {
    const Pack<A> g = load_pack(dy + p * dy_stride, tag);
    s1 = s1 + g;
    s2 = s2 + g * (load_pack(x + p * stride, tag) - mean);
  }
  store_ordered<T>(g_sums, load_ordered<T>(g_sums) + s1);
  store_ordered<T>(deviation_sums, load_ordered<T>(deviation_sums) + s2);
}

// The same with an activation: g = dy * act'(norm(x) + residual), which is written to `out`.
template <class T, class Tag>
UDL_INLINE void add_activated(const GroupNormBackward& args, const T* dy, const T* x,
                              const T* residual, T* out, int64_t positions,
                              const Affine<acc_t<T>>& affine, acc_t<T>* g_sums,
                              acc_t<T>* deviation_sums, Tag tag) {
  using A = acc_t<T>;
  A scratch[kPositions * kPack<T>];
  fill_scratch(x, args.x.position, residual, args.residual.position, positions, affine,
               static_cast<A*>(scratch), tag);
  activate_grad_block(args, static_cast<A*>(scratch), positions * kPack<T>);
  Pack<A> s1{}, s2{};
  for (int64_t p = 0; p < positions; ++p) {
    const Pack<A> g = load_pack(dy + p * args.dy.position, tag) *
                      load_ordered<T>(static_cast<const A*>(scratch) + p * kPack<T>);
    store_pack(out + p * args.channels, g, tag);
    s1 = s1 + g;
    s2 = s2 + g * (load_pack(x + p * args.x.position, tag) - affine.mean);
  }
  store_ordered<T>(g_sums, load_ordered<T>(g_sums) + s1);
  store_ordered<T>(deviation_sums, load_ordered<T>(deviation_sums) + s2);
}

template <class T>
void chunk_sums(const GroupNormBackward& args, const Chunk& chunk, ChannelVectors<T>& vectors,
                ChannelVectors<T>& sums) {
  using A = acc_t<T>;
  sums.clear(2);
  const bool activated = args.act != Activation::identity;
  A *g_sums = sums[0], *deviation_sums = sums[1];
  for (int64_t p = chunk.first; p < chunk.last; p += kPositions) {
    const int64_t positions = least(kPositions, chunk.last - p);
    const T *dy = args.dy.at<T>(chunk.n, 0, p), *x = args.x.at<T>(chunk.n, 0, p);
    const T* residual = residual_at<T>(args.residual, chunk.n, p);
    T* out = static_cast<T*>(args.gradient) + (chunk.n * args.positions + p) * args.channels;
    for_packs<T>(args.channels, [&](int64_t c, auto tag) UDL_LAMBDA {
      if (activated) {
        add_activated(args, dy + c, x + c, residual != nullptr ? residual + c : nullptr, out + c,
                      positions, affine_at(vectors, c), g_sums + c, deviation_sums + c, tag);
      } else {
        add_sums(dy + c, args.dy.position, x + c, args.x.position, positions,
                 load_ordered<T>(vectors[0] + c), g_sums + c, deviation_sums + c, tag);
      }
    });
  }
  A* partials = static_cast<A*>(args.partials) +
                (chunk.n * args.chunks + chunk.index) * 2 * args.channels;
  from_pack_order<T>(g_sums, partials, args.channels);
  from_pack_order<T>(deviation_sums, partials + args.channels, args.channels);
}

template <class T>
void sum_chunks(const GroupNormBackward& args, int64_t begin, int64_t end) {
  ChannelVectors<T> vectors(args.channels, 4), sums(args.channels, 2);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk chunk = chunk_of(args, unit);
    if (unit == begin || chunk.index == 0) sample_affine(args, chunk.n, vectors, vectors[3]);
    chunk_sums(args, chunk, vectors, sums);
  }
}

// Gradients of a sample's weight and bias from the sums of its chunks, and the factors of dx.
template <class T>
void fold_sums(const GroupNormBackward& args, int64_t n) {
  using A = acc_t<T>;
  const int64_t C = args.channels, D = args.group_channels;
  const A* partials = static_cast<const A*>(args.partials) + n * args.chunks * 2 * C;
  const A* rstd = static_cast<const A*>(args.rstd) + n * args.groups;
  const A* rest = static_cast<const A*>(args.rest) + n * args.groups;
  A* dweight = static_cast<A*>(args.dweight) + n * C;
  A* dbias = static_cast<A*>(args.dbias) + n * C;
  A* factors = static_cast<A*>(args.factors) + n * 2 * args.groups;
  double group_s1 = 0, group_s2 = 0;
  for (int64_t start = 0; start < C; start += kChannels) {
    const int64_t channels = least(kChannels, C - start);
    double s1[kChannels] = {}, s2[kChannels] = {};
    for (int64_t k = 0; k < args.chunks; ++k) {
      const A* row = partials + k * 2 * C + start;
      for (int64_t c = 0; c < channels; ++c) s1[c] += static_cast<double>(row[c]);
      for (int64_t c = 0; c < channels; ++c) s2[c] += static_cast<double>(row[C + c]);
    }
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t c = start + i, g = c / D;
      dbias[c] = static_cast<A>(s1[i]);
      dweight[c] = static_cast<A>((s2[i] - static_cast<double>(rest[g]) * s1[i]) *
                                  static_cast<double>(rstd[g]));
      const double weight =
          static_cast<double>(parameter<A>(args.weight, args.affine_stride, n, c, A(1)));
      group_s1 += weight * s1[i];
      group_s2 += weight * s2[i];
      if (c % D != D - 1) continue;
      const DxFactors<A> found =
          dx_factors(group_s1, group_s2, rstd[g], rest[g], static_cast<double>(D * args.positions));
      factors[g] = found.by_deviation;
      factors[args.groups + g] = found.constant;
      group_s1 = group_s2 = 0;
    }
  }
}

// Per-channel rstd, by_deviation and constant of a sample, in pack order.
template <class T>
void sample_factors(const GroupNormBackward& args, int64_t n, ChannelVectors<T>& vectors,
                    acc_t<T>* natural) {
  using A = acc_t<T>;
  const A* rstd = static_cast<const A*>(args.rstd) + n * args.groups;
  const A* factors = static_cast<const A*>(args.factors) + n * 2 * args.groups;
  const A* sources[3] = {rstd, factors, factors + args.groups};
  for (int k = 0; k < 3; ++k) {
    const A* source = sources[k];
    for_channels(args, [=](int64_t c, int64_t g) UDL_LAMBDA { natural[c] = source[g]; });
    to_pack_order<T>(natural, vectors[k], args.channels);
  }
}

template <class T>
void dx_chunk(const GroupNormBackward& args, const Chunk& chunk, ChannelVectors<T>& affine,
              ChannelVectors<T>& factors) {
  using A = acc_t<T>;
  const int64_t C = args.channels, stride = args.x.position;
  const bool activated = args.act != Activation::identity;
  const int64_t g_stride = activated ? C : args.dy.position;
  for (int64_t p = chunk.first; p < chunk.last; p += kWritten) {
    const int64_t positions = least(kWritten, chunk.last - p);
    const int64_t offset = (chunk.n * args.positions + p) * C;
    const T* x = args.x.at<T>(chunk.n, 0, p);
    const T* g = activated ? static_cast<const T*>(args.gradient) + offset
                           : args.dy.at<T>(chunk.n, 0, p);
    T* dx = static_cast<T*>(args.dx) + offset;
    for_packs<T>(C, [&, x, g, dx, stride, g_stride, positions, C](int64_t c, auto tag) UDL_LAMBDA {
      const Pack<A> mean = load_ordered<T>(affine[0] + c), scale = load_ordered<T>(affine[1] + c);
      const Pack<A> rstd = load_ordered<T>(factors[0] + c);
      const Pack<A> by_deviation = load_ordered<T>(factors[1] + c);
      const Pack<A> constant = load_ordered<T>(factors[2] + c);
      for (int64_t i = 0; i < positions; ++i) {
        const Pack<A> x_hat = (load_pack(x + i * stride + c, tag) - mean) * rstd;
        const Pack<A> scaled = load_pack(g + i * g_stride + c, tag) * scale;
        store_pack(dx + i * C + c, scaled - x_hat * by_deviation - constant, tag);
      }
    });
  }
}

template <class T>
void dx_chunks(const GroupNormBackward& args, int64_t begin, int64_t end) {
  ChannelVectors<T> affine(args.channels, 4), factors(args.channels, 3);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk chunk = chunk_of(args, unit);
    if (unit == begin || chunk.index == 0) {
      sample_affine(args, chunk.n, affine, affine[3]);
      sample_factors(args, chunk.n, factors, affine[3]);
    }
    dx_chunk(args, chunk, affine, factors);
  }
}

}  // namespace

void group_norm_lines_moments(const GroupNormForward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    ChannelVectors<T> vectors(args.channels, 2);
    for (int64_t unit = begin; unit < end; ++unit) {
      chunk_moments(args, chunk_of(args, unit), vectors);
    }
  });
}

void group_norm_lines_fold(const GroupNormForward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t g = 0; g < args.groups; ++g) fold_group<decltype(type)>(args, n, g);
    }
  });
}

void group_norm_lines_write(const GroupNormForward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { write_chunks<decltype(type)>(args, begin, end); });
}

void group_norm_lines_sums(const GroupNormBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { sum_chunks<decltype(type)>(args, begin, end); });
}

void group_norm_lines_fold_sums(const GroupNormBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t n = begin; n < end; ++n) fold_sums<decltype(type)>(args, n);
  });
}

void group_norm_lines_dx(const GroupNormBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { dx_chunks<decltype(type)>(args, begin, end); });
}

}  // namespace udl::UDL_ISA
