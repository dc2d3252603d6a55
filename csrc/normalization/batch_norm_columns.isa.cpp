// Batch norm over columns: a row holds one element of every channel. Sums run down the rows of a
// chunk, four rows at a time, in an array that stays in the L1 cache.
#include "normalization/batch_norm.h"
#include "normalization/batch_norm.isa.h"

namespace udl::UDL_ISA {
namespace {

constexpr int kRowsTogether = 4;

// body(pointers to k rows, integral_constant k) down the rows of a chunk.
template <class Body>
UDL_INLINE void for_row_groups(const Chunk& chunk, Body body) {
  int64_t r = chunk.first_row;
  for (; r + kRowsTogether <= chunk.last_row; r += kRowsTogether) {
    body(r, std::integral_constant<int, kRowsTogether>{});
  }
  for (; r < chunk.last_row; ++r) body(r, std::integral_constant<int, 1>{});
}

// Moments of channels [first, first + n) in one chunk, n <= kColumns, as in the planes.
template <class T>
void chunk_moments(const BatchNorm& args, int64_t first, int64_t n, int64_t index) {
  using A = acc_t<T>;
  const Chunk chunk = chunk_of(args, index);
  A mean[kColumns] = {}, sum[kColumns] = {}, squares[kColumns] = {};
  for_row_groups(chunk, [&](int64_t r, auto count) UDL_LAMBDA {
    constexpr int K = decltype(count)::value;
    const T* x[K];
    for (int k = 0; k < K; ++k) x[k] = args.x.at<T>(first, r + k);
    for_packs<T>(n, [&](int64_t i, auto tag) UDL_LAMBDA {
      Pack<A> s = load_pack(x[0] + i, tag);
      for (int k = 1; k < K; ++k) s = s + load_pack(x[k] + i, tag);
      store_ordered<T>(mean + i, load_ordered<T>(mean + i) + s);
    });
  });
  const A scale = 1 / static_cast<A>(chunk.count());
  for (int64_t i = 0; i < n; i += kPack<T>) {
    store_ordered<T>(mean + i, load_ordered<T>(mean + i) * scale);
  }
  for_row_groups(chunk, [&](int64_t r, auto count) UDL_LAMBDA {
    constexpr int K = decltype(count)::value;
    const T* x[K];
    for (int k = 0; k < K; ++k) x[k] = args.x.at<T>(first, r + k);
    for_packs<T>(n, [&](int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> around = load_ordered<T>(mean + i);
      Pack<A> s = load_ordered<T>(sum + i), q = load_ordered<T>(squares + i);
      for (int k = 0; k < K; ++k) {
        const Pack<A> d = load_pack(x[k] + i, tag) - around;
        s = s + d;
        q = q + d * d;
      }
      store_ordered<T>(sum + i, s);
      store_ordered<T>(squares + i, q);
    });
  });
  A* partials = static_cast<A*>(args.partials) + 3 * index * args.channels + first;
  from_pack_order<T>(mean, partials, n);
  from_pack_order<T>(sum, partials + args.channels, n);
  from_pack_order<T>(squares, partials + 2 * args.channels, n);
}

template <Kind kKind, class T>
void write_rows(const BatchNorm& args, const ManyChannels<T>& values, int64_t first, int64_t n,
                int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const Run<T> run(args, first, r, 0);
    write_run<kKind>(args, run, run.x, n, values);
  }
}

template <Kind kKind, class T>
void chunk_sums(const BatchNorm& args, const ManyChannels<T>& values, int64_t first, int64_t n,
                int64_t index) {
  using A = acc_t<T>;
  const Chunk chunk = chunk_of(args, index);
  A g[kColumns] = {}, h[kColumns] = {};
  for (int64_t r = chunk.first_row; r < chunk.last_row; ++r) {
    sum_run<kKind>(args, Run<T>(args, first, r, 0), n, values,
                   [&](int64_t i, Pack<A> a, Pack<A> b) UDL_LAMBDA {
                     store_ordered<T>(g + i, load_ordered<T>(g + i) + a);
                     store_ordered<T>(h + i, load_ordered<T>(h + i) + b);
                   });
  }
  A* partials = static_cast<A*>(args.partials) + 2 * index * args.channels + first;
  from_pack_order<T>(g, partials, n);
  from_pack_order<T>(h, partials + args.channels, n);
}

template <Kind kKind, class T>
void gradient_rows(const BatchNorm& args, const ManyChannels<T>& values, int64_t first, int64_t n,
                   int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    Run<T> run(args, first, r, 0);
    if (run.dresidual != nullptr) {  // g is there already
      run.dy = run.dresidual;
      gradient_run<Kind::identity>(args, run, run.x, run.dy, n, values);
    } else {
      gradient_run<kKind>(args, run, run.x, run.dy, n, values);
    }
  }
}

// step(first channel, number of channels, chunk) for units [begin, end).
template <class Step>
UDL_INLINE void for_units(const BatchNorm& args, int64_t begin, int64_t end, Step step) {
  const int64_t blocks = (args.channels + kColumns - 1) / kColumns;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % blocks * kColumns;
    const int64_t left = args.channels - first;
    step(first, left < kColumns ? left : kColumns, unit / blocks);
  }
}

// step(first channel, number of channels) for channels [begin, end).
template <class Step>
UDL_INLINE void for_blocks(const BatchNorm& args, int64_t begin, int64_t end, Step step) {
  const int64_t together = columns_together(args);
  for (int64_t first = begin; first < end; first += together) {
    step(first, end - first < together ? end - first : together);
  }
}

}  // namespace

void batch_norm_columns_moments(const BatchNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for_units(args, begin, end, [&](int64_t first, int64_t n, int64_t chunk) {
      chunk_moments<decltype(type)>(args, first, n, chunk);
    });
  });
}

void batch_norm_columns_write(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    using T = decltype(type);
    const ManyChannels<T> values(args, 0, args.channels);
    write_rows<decltype(kind)::value, T>(args, values, 0, args.channels, begin, end);
  });
}

void batch_norm_columns_sums(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    using T = decltype(type);
    for_units(args, begin, end, [&](int64_t first, int64_t n, int64_t chunk) {
      chunk_sums<decltype(kind)::value, T>(args, ManyChannels<T>(args, first, n), first, n, chunk);
    });
  });
}

void batch_norm_columns_gradient(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    using T = decltype(type);
    const ManyChannels<T> values(args, 0, args.channels);
    gradient_rows<decltype(kind)::value, T>(args, values, 0, args.channels, begin, end);
  });
}

void batch_norm_columns_forward(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    using T = decltype(type);
    for_blocks(args, begin, end, [&](int64_t first, int64_t n) {
      for (int64_t k = 0; k < args.chunks; ++k) chunk_moments<T>(args, first, n, k);
      batch_norm_finish_moments(args, first, first + n);
      const ManyChannels<T> values(args, first, n);
      write_rows<decltype(kind)::value, T>(args, values, first, n, 0, args.rows);
    });
  });
}

void batch_norm_columns_backward(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    using T = decltype(type);
    constexpr Kind kKind = decltype(kind)::value;
    for_blocks(args, begin, end, [&](int64_t first, int64_t n) {
      const ManyChannels<T> known(args, first, n);
      for (int64_t k = 0; k < args.chunks; ++k) chunk_sums<kKind, T>(args, known, first, n, k);
      batch_norm_finish_sums(args, first, first + n);
      const ManyChannels<T> values(args, first, n);
      gradient_rows<kKind, T>(args, values, first, n, 0, args.rows);
    });
  });
}

}  // namespace udl::UDL_ISA
