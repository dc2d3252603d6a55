// group_norm's backward in channels-last: per-channel sums of chunks of positions, folded to groups,
// then one pass that writes.
#include "normalization/group_norm_lines.isa.h"

namespace udl::UDL_ISA {
namespace {

constexpr int64_t kFolded = 512;  // channels folded together

// Adds g and g * (x - mean) of some positions to the sums, where g = dy.
template <int kCount, class T>
UDL_INLINE void add_rows(const GroupNormBackward& args, int64_t n, int64_t p,
                         const acc_t<T>* mean, acc_t<T>* g_sums, acc_t<T>* deviation_sums) {
  using A = acc_t<T>;
  const RowPointers<const T, kCount> dy(args.dy.at<T>(n, 0, p), args.dy.position);
  const RowPointers<const T, kCount> x(args.x.at<T>(n, 0, p), args.x.position);
  for_packs<T>(args.channels, [=](int64_t c, auto tag) UDL_LAMBDA {
    const Pack<A> centre = load_ordered<T>(mean + c);
    Pack<A> s1 = load_ordered<T>(g_sums + c), s2 = load_ordered<T>(deviation_sums + c);
    for (int k = 0; k < kCount; ++k) {
      const Pack<A> g = load_pack(dy.at[k] + c, tag);
      s1 = s1 + g;
      s2 = s2 + g * (load_pack(x.at[k] + c, tag) - centre);
    }
    store_ordered<T>(g_sums + c, s1);
    store_ordered<T>(deviation_sums + c, s2);
  });
}

// The same with an activation: g = dy * act'(norm(x) + residual), which is written down.
template <int kCount, class T>
void add_activated(const GroupNormBackward& args, int64_t n, int64_t p,
                   ChannelVectors<T>& vectors, acc_t<T>* g_sums, acc_t<T>* deviation_sums) {
  using A = acc_t<T>;
  UDL_LINES A scratch[kScratch];
  const int64_t C = args.channels;
  for (int64_t c = 0; c < C; c += kScratchChannels<T>) {
    const int64_t channels = least(kScratchChannels<T>, C - c), row = whole_packs<T>(channels);
    fill_scratch<kCount>(args, n, p, c, channels, vectors, static_cast<A*>(scratch));
    activate_grad_block(args, static_cast<A*>(scratch), kCount * row);
    const RowPointers<const T, kCount> dy(args.dy.at<T>(n, c, p), args.dy.position);
    const RowPointers<const T, kCount> x(args.x.at<T>(n, c, p), args.x.position);
    const RowPointers<T, kCount> out(
        static_cast<T*>(args.gradient) + (n * args.positions + p) * C + c, C);
    const A* block = scratch;
    for_packs<T>(channels, [=, &vectors](int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> centre = load_ordered<T>(vectors[0] + c + i);
      A *g_sum = g_sums + c + i, *deviation_sum = deviation_sums + c + i;
      Pack<A> s1 = load_ordered<T>(g_sum), s2 = load_ordered<T>(deviation_sum);
      for (int k = 0; k < kCount; ++k) {
        const Pack<A> g =
            load_pack(dy.at[k] + i, tag) * load_ordered<T>(block + k * row + i);
        store_pack(out.at[k] + i, g, tag);
        s1 = s1 + g;
        s2 = s2 + g * (load_pack(x.at[k] + i, tag) - centre);
      }
      store_ordered<T>(g_sum, s1);
      store_ordered<T>(deviation_sum, s2);
    });
  }
}

template <class T>
void chunk_sums(const GroupNormBackward& args, const Chunk& chunk, ChannelVectors<T>& vectors,
                ChannelVectors<T>& sums) {
  using A = acc_t<T>;
  sums.clear(2);
  A *g_sums = sums[0], *deviation_sums = sums[1];
  const bool activated = args.act != Activation::identity;
  for_row_groups<kRows>(rows_together(args, 2), chunk.first, chunk.last, [&](int64_t p, auto rows) UDL_LAMBDA {
    constexpr int kCount = decltype(rows)::value;
    if (activated) {
      add_activated<kCount>(args, chunk.n, p, vectors, g_sums, deviation_sums);
    } else {
      add_rows<kCount, T>(args, chunk.n, p, vectors[0], g_sums, deviation_sums);
    }
  });
  A* out = static_cast<A*>(args.partials) +
           (chunk.n * args.chunks + chunk.index) * 2 * args.channels;
  sums.copy_natural(0, out);
  sums.copy_natural(1, out + args.channels);
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
  const double count = static_cast<double>(D * args.positions);
  double group_s1 = 0, group_s2 = 0;
  for (int64_t start = 0, g = 0, within = 0; start < C; start += kFolded) {
    const int64_t channels = least(kFolded, C - start);
    double s1[kFolded] = {}, s2[kFolded] = {};
    for (int64_t k = 0; k < args.chunks; ++k) {
      const A* row = partials + k * 2 * C + start;
      for (int64_t c = 0; c < channels; ++c) s1[c] += static_cast<double>(row[c]);
      for (int64_t c = 0; c < channels; ++c) s2[c] += static_cast<double>(row[C + c]);
    }
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t c = start + i;
      const double deviation = s2[i] - static_cast<double>(rest[g]) * s1[i];
      const A weight = parameter<A>(args.weight, args.affine_stride, n, c, A(1));
      dbias[c] = static_cast<A>(s1[i]);
      dweight[c] = static_cast<A>(deviation * static_cast<double>(rstd[g]));
      group_s1 += static_cast<double>(weight) * s1[i];
      group_s2 += static_cast<double>(weight) * s2[i];
      if (++within < D) continue;
      const DxFactors<A> found = dx_factors(group_s1, group_s2, rstd[g], rest[g], count);
      factors[g] = found.by_deviation;
      factors[args.groups + g] = found.constant;
      group_s1 = group_s2 = 0;
      within = 0;
      ++g;
    }
  }
}

// Per-channel rstd, by_deviation and constant of a sample, in natural order.
template <class T>
void sample_factors(const GroupNormBackward& args, int64_t n, ChannelVectors<T>& vectors) {
  using A = acc_t<T>;
  const A* rstd = static_cast<const A*>(args.rstd) + n * args.groups;
  const A* factors = static_cast<const A*>(args.factors) + n * 2 * args.groups;
  const A* sources[3] = {rstd, factors, factors + args.groups};
  for (int k = 0; k < 3; ++k) {
    const A* source = sources[k];
    A* out = vectors[k];
    for_channels(args, [=](int64_t c, int64_t g) UDL_LAMBDA { out[c] = source[g]; });
  }
}

template <int kCount, class T>
UDL_INLINE void dx_rows(const GroupNormBackward& args, int64_t n, int64_t p,
                        ChannelVectors<T>& affine, ChannelVectors<T>& factors) {
  using A = acc_t<T>;
  const int64_t C = args.channels, offset = (n * args.positions + p) * C;
  const bool activated = args.act != Activation::identity;
  const RowPointers<const T, kCount> x(args.x.at<T>(n, 0, p), args.x.position);
  const RowPointers<const T, kCount> g(
      activated ? static_cast<const T*>(args.gradient) + offset : args.dy.at<T>(n, 0, p),
      activated ? C : args.dy.position);
  const RowPointers<T, kCount> dx(static_cast<T*>(args.dx) + offset, C);
  for_packs<T>(C, [=, &affine, &factors](int64_t c, auto tag) UDL_LAMBDA {
    const Pack<A> mean = load_ordered<T>(affine[0] + c), scale = load_ordered<T>(affine[1] + c);
    const Pack<A> rstd = load_ordered<T>(factors[0] + c);
    const Pack<A> by_deviation = load_ordered<T>(factors[1] + c);
    const Pack<A> constant = load_ordered<T>(factors[2] + c);
    for (int k = 0; k < kCount; ++k) {
      const Pack<A> x_hat = (load_pack(x.at[k] + c, tag) - mean) * rstd;
      const Pack<A> scaled = load_pack(g.at[k] + c, tag) * scale;
      store_pack(dx.at[k] + c, scaled - x_hat * by_deviation - constant, tag);
    }
  });
}

template <class T>
struct Vectors {
  ChannelVectors<T> affine, work;
  explicit Vectors(int64_t channels) : affine(channels, 3), work(channels, 3) {}
};

template <class T>
void sum_chunks(const GroupNormBackward& args, int64_t begin, int64_t end, Vectors<T>& vectors) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk chunk = chunk_of(args, unit);
    if (unit == begin || chunk.index == 0) {
      sample_affine(args, chunk.n, vectors.affine);
      vectors.affine.arrange(3);
    }
    chunk_sums(args, chunk, vectors.affine, vectors.work);
  }
}

template <class T>
void dx_chunks(const GroupNormBackward& args, int64_t begin, int64_t end, Vectors<T>& vectors) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk chunk = chunk_of(args, unit);
    if (unit == begin || chunk.index == 0) {
      sample_affine(args, chunk.n, vectors.affine);
      vectors.affine.arrange(2);
      sample_factors(args, chunk.n, vectors.work);
      vectors.work.arrange(3);
    }
    for_row_groups<kRows>(rows_together(args, 2), chunk.first, chunk.last, [&](int64_t p, auto rows) UDL_LAMBDA {
      dx_rows<decltype(rows)::value>(args, chunk.n, p, vectors.affine, vectors.work);
    });
  }
}

}  // namespace

void group_norm_lines_backward(const GroupNormBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Vectors<T> vectors(args.channels);
    for (int64_t n = begin; n < end; ++n) {
      sum_chunks(args, n * args.chunks, (n + 1) * args.chunks, vectors);
      fold_sums<T>(args, n);
      if (args.dx == nullptr) continue;
      dx_chunks(args, n * args.chunks, (n + 1) * args.chunks, vectors);
    }
  });
}

void group_norm_lines_sums(const GroupNormBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    Vectors<decltype(type)> vectors(args.channels);
    sum_chunks(args, begin, end, vectors);
  });
}

void group_norm_lines_fold_sums(const GroupNormBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t n = begin; n < end; ++n) fold_sums<decltype(type)>(args, n);
  });
}

void group_norm_lines_dx(const GroupNormBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    Vectors<decltype(type)> vectors(args.channels);
    dx_chunks(args, begin, end, vectors);
  });
}

}  // namespace udl::UDL_ISA
