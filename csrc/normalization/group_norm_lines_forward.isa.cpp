// group_norm's forward in channels-last: per-channel moments of chunks of positions, folded to
// groups, then one pass that writes.
#include "normalization/group_norm_lines.isa.h"

namespace udl::UDL_ISA {
namespace {

constexpr int64_t kGuess = 16;  // positions whose mean a chunk's squares are taken around

// Adds the x - around of some positions, and their squares, to the sums.
template <int kCount, class T>
UDL_INLINE void add_rows(const T* x, int64_t stride, int64_t channels, const acc_t<T>* around,
                         acc_t<T>* sums, acc_t<T>* squares) {
  using A = acc_t<T>;
  const RowPointers<const T, kCount> rows(x, stride);
  for_packs<T>(channels, [=](int64_t c, auto tag) UDL_LAMBDA {
    const Pack<A> centre = load_ordered<T>(around + c);
    Pack<A> sum = load_ordered<T>(sums + c), square = load_ordered<T>(squares + c);
    for (int k = 0; k < kCount; ++k) {
      const Pack<A> d = load_pack(rows.at[k] + c, tag) - centre;
      sum = sum + d;
      square = square + d * d;
    }
    store_ordered<T>(sums + c, sum);
    store_ordered<T>(squares + c, square);
  });
}

template <class T>
void sum_around(const GroupNormForward& args, const Chunk& chunk, int64_t last,
                ChannelVectors<T>& vectors) {
  using A = acc_t<T>;
  A *around = vectors[0], *sums = vectors[1], *squares = vectors[2];
  std::memset(sums, 0, static_cast<size_t>(2 * (squares - sums)) * sizeof(A));
  for_row_groups<kRows>(rows_together(args, 1), chunk.first, last, [&](int64_t p, auto rows) UDL_LAMBDA {
    add_rows<decltype(rows)::value>(args.x.at<T>(chunk.n, 0, p), args.x.position, args.channels,
                                    static_cast<const A*>(around), sums, squares);
  });
}

// Puts the mean into the place of `around`, and tells whether `around` was near enough to it for
// the squares to keep all but two bits.
template <class T>
bool centre(int64_t channels, int64_t positions, ChannelVectors<T>& vectors) {
  using A = acc_t<T>;
  A *around = vectors[0], *sums = vectors[1], *squares = vectors[2];
  const A one_over = A(1) / static_cast<A>(positions);
  bool near = true;
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    const vec_t<A> sum = load(sums + c, Full{}), square = load(squares + c, Full{});
    const vec_t<A> excess = sum * sum * one_over;
    store(around + c, load(around + c, Full{}) + sum * one_over, Full{});
    store(squares + c, square - excess, Full{});
    const auto far = !(excess <= square * A(0.75));
    for (int i = 0; i < kLanes<A>; ++i) near = near && far[i] == 0;
  }
  return near;
}

// Means and squared deviations of every channel over one chunk. The squares are taken around the
// mean of the chunk's first positions; where that is too far off, again around the chunk's.
template <class T>
void chunk_moments(const GroupNormForward& args, const Chunk& chunk, ChannelVectors<T>& vectors) {
  const int64_t positions = chunk.last - chunk.first, width = vectors[1] - vectors[0];
  vectors.clear(1);
  sum_around(args, chunk, chunk.first + least(kGuess, positions), vectors);
  centre(width, least(kGuess, positions), vectors);
  sum_around(args, chunk, chunk.last, vectors);
  if (!centre(width, positions, vectors)) {
    sum_around(args, chunk, chunk.last, vectors);
    centre(width, positions, vectors);
  }
  acc_t<T>* out = static_cast<acc_t<T>*>(args.partials) +
                  (chunk.n * args.chunks + chunk.index) * 2 * args.channels;
  vectors.copy_natural(0, out);
  vectors.copy_natural(2, out + args.channels);
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

template <int kCount, class T>
UDL_INLINE void write_rows(const GroupNormForward& args, int64_t n, int64_t p,
                           ChannelVectors<T>& vectors) {
  const int64_t C = args.channels;
  const RowPointers<const T, kCount> x(args.x.at<T>(n, 0, p), args.x.position);
  const RowPointers<T, kCount> y(static_cast<T*>(args.y) + (n * args.positions + p) * C, C);
  for_packs<T>(C, [=, &vectors](int64_t c, auto tag) UDL_LAMBDA {
    const Affine<acc_t<T>> affine = affine_at(vectors, c);
    for (int k = 0; k < kCount; ++k) {
      store_pack(y.at[k] + c, normalise(load_pack(x.at[k] + c, tag), affine), tag);
    }
  });
}

template <int kCount, class T>
void write_activated(const GroupNormForward& args, int64_t n, int64_t p,
                     ChannelVectors<T>& vectors) {
  using A = acc_t<T>;
  UDL_LINES A scratch[kScratch];
  const int64_t C = args.channels;
  for (int64_t c = 0; c < C; c += kScratchChannels<T>) {
    const int64_t channels = least(kScratchChannels<T>, C - c), row = whole_packs<T>(channels);
    fill_scratch<kCount>(args, n, p, c, channels, vectors, static_cast<A*>(scratch));
    activate_block(args, static_cast<A*>(scratch), kCount * row);
    const RowPointers<T, kCount> y(static_cast<T*>(args.y) + (n * args.positions + p) * C + c, C);
    for_packs<T>(channels,
                 [=, block = static_cast<const A*>(scratch)](int64_t i, auto tag) UDL_LAMBDA {
                   for (int k = 0; k < kCount; ++k) {
                     store_pack(y.at[k] + i, load_ordered<T>(block + k * row + i), tag);
                   }
                 });
  }
}

template <class T>
void write_chunk(const GroupNormForward& args, const Chunk& chunk, ChannelVectors<T>& vectors) {
  const bool direct = args.act == Activation::identity && args.residual.data == nullptr;
  for_row_groups<kRows>(rows_together(args, 1), chunk.first, chunk.last, [&](int64_t p, auto rows) UDL_LAMBDA {
    if (direct) {
      write_rows<decltype(rows)::value>(args, chunk.n, p, vectors);
    } else {
      write_activated<decltype(rows)::value>(args, chunk.n, p, vectors);
    }
  });
}

template <class T>
void moments_of_chunks(const GroupNormForward& args, int64_t begin, int64_t end,
                       ChannelVectors<T>& vectors) {
  for (int64_t unit = begin; unit < end; ++unit) {
    chunk_moments(args, chunk_of(args, unit), vectors);
  }
}

template <class T>
void fold_groups(const GroupNormForward& args, int64_t n) {
  for (int64_t g = 0; g < args.groups; ++g) fold_group<T>(args, n, g);
}

template <class T>
void write_chunks(const GroupNormForward& args, int64_t begin, int64_t end,
                  ChannelVectors<T>& vectors) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk chunk = chunk_of(args, unit);
    if (unit == begin || chunk.index == 0) {
      sample_affine(args, chunk.n, vectors);
      vectors.arrange(3);
    }
    write_chunk(args, chunk, vectors);
  }
}

}  // namespace

void group_norm_lines_forward(const GroupNormForward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    ChannelVectors<T> vectors(args.channels, 3);
    for (int64_t n = begin; n < end; ++n) {
      moments_of_chunks(args, n * args.chunks, (n + 1) * args.chunks, vectors);
      fold_groups<T>(args, n);
      write_chunks(args, n * args.chunks, (n + 1) * args.chunks, vectors);
    }
  });
}

void group_norm_lines_moments(const GroupNormForward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    ChannelVectors<decltype(type)> vectors(args.channels, 3);
    moments_of_chunks(args, begin, end, vectors);
  });
}

void group_norm_lines_fold(const GroupNormForward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t n = begin; n < end; ++n) fold_groups<decltype(type)>(args, n);
  });
}

void group_norm_lines_write(const GroupNormForward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    ChannelVectors<decltype(type)> vectors(args.channels, 3);
    write_chunks(args, begin, end, vectors);
  });
}

}  // namespace udl::UDL_ISA
