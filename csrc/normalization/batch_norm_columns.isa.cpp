// Batch norm over columns: a row holds one element of every channel, or several of few channels. Sums
// run down the rows of a chunk, some rows at a time, in an array that stays in the L1 cache.
#include "normalization/batch_norm.h"
#include "normalization/batch_norm.isa.h"
#include "normalization/row_groups.isa.h"

namespace udl::UDL_ISA {
namespace {

// The runs of K rows, from column `first` on.
template <int K, class T, class Use>
UDL_INLINE void with_runs(const BatchNorm& args, int64_t first, int64_t r, Use use) {
  if constexpr (K == 1) {
    Run<T> run[1] = {{args, first, r, 0}};
    use(run);
  } else {
    static_assert(K == 4, "as listed");
    Run<T> run[4] = {{args, first, r, 0},
                     {args, first, r + 1, 0},
                     {args, first, r + 2, 0},
                     {args, first, r + 3, 0}};
    use(run);
  }
}

// Eight rows a visit of the sums that lie in the L1 cache: what waits for a stored sum to be loaded
// again takes as long as the loads of eight short rows.
constexpr int kSumRows = 8;

// Whether to take rows together in a pass that reads so many tensors.
UDL_INLINE bool rows_together(const BatchNorm& args, int64_t tensors) {
  return fit_together(tensors * args.rows * args.columns_wide() * element_size(args.dtype));
}

// The sum of K packs as a tree: short chains of additions.
template <int K, class A>
UDL_INLINE Pack<A> tree_sum(const Pack<A>* v) {
  if constexpr (K == 1) {
    return v[0];
  } else {
    return tree_sum<K / 2>(v) + tree_sum<K / 2>(v + K / 2);
  }
}

template <class T, class... Sums>
UDL_INLINE void clear(int64_t n, Sums*... sums) {
  const size_t bytes = static_cast<size_t>(whole_packs<T>(n)) * sizeof(acc_t<T>);
  (std::memset(sums, 0, bytes), ...);
}

// Moments of columns [first, first + n) in one chunk, n <= kColumns, as in the planes.
template <class T>
void chunk_moments(const BatchNorm& args, int64_t first, int64_t n, int64_t index) {
  using A = acc_t<T>;
  const Chunk chunk = chunk_of(args, index);
  UDL_LINES A mean[kColumns], sum[kColumns], squares[kColumns];
  clear<T>(n, mean, sum, squares);
  for_row_groups<kSumRows>(true, chunk.first_row, chunk.last_row, [&](int64_t r, auto count) UDL_LAMBDA {
    constexpr int K = decltype(count)::value;
    const T* x[K];
    for (int k = 0; k < K; ++k) x[k] = args.x.at<T>(first, r + k);
    for_packs<T>(n, [&, x](int64_t i, auto tag) UDL_LAMBDA {
      Pack<A> v[K];
      for (int k = 0; k < K; ++k) v[k] = load_pack(x[k] + i, tag);
      store_ordered<T>(mean + i, load_ordered<T>(mean + i) + tree_sum<K>(v));
    });
  });
  const A scale = 1 / static_cast<A>(chunk.count());
  for (int64_t i = 0; i < n; i += kPack<T>) {
    store_ordered<T>(mean + i, load_ordered<T>(mean + i) * scale);
  }
  for_row_groups<kSumRows>(true, chunk.first_row, chunk.last_row, [&](int64_t r, auto count) UDL_LAMBDA {
    constexpr int K = decltype(count)::value;
    const T* x[K];
    for (int k = 0; k < K; ++k) x[k] = args.x.at<T>(first, r + k);
    for_packs<T>(n, [&, x](int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> around = load_ordered<T>(mean + i);
      Pack<A> d[K];
      for (int k = 0; k < K; ++k) d[k] = load_pack(x[k] + i, tag) - around;
      const Pack<A> s = tree_sum<K>(d);
      for (int k = 0; k < K; ++k) d[k] = d[k] * d[k];
      store_ordered<T>(sum + i, load_ordered<T>(sum + i) + s);
      store_ordered<T>(squares + i, load_ordered<T>(squares + i) + tree_sum<K>(d));
    });
  });
  const int64_t width = args.columns_wide();
  A* partials = static_cast<A*>(args.partials) + 3 * index * width + first;
  from_pack_order<T>(mean, partials, n);
  from_pack_order<T>(sum, partials + width, n);
  from_pack_order<T>(squares, partials + 2 * width, n);
}

template <Kind kKind, class T>
void write_rows(const BatchNorm& args, const ManyChannels<T>& values, int64_t first, int64_t n,
                int64_t begin, int64_t end) {
  for_row_groups<kRows>(rows_together(args, 1), begin, end, [&](int64_t r, auto count) UDL_LAMBDA {
    with_runs<decltype(count)::value, T>(args, first, r, [&](auto& run) UDL_LAMBDA {
      write_runs<kKind>(args, run, n, values, [](int64_t) UDL_LAMBDA {});
    });
  });
}

template <Kind kKind, class T>
void chunk_sums(const BatchNorm& args, const ManyChannels<T>& values, int64_t first, int64_t n,
                int64_t index) {
  using A = acc_t<T>;
  const Chunk chunk = chunk_of(args, index);
  UDL_LINES A g[kColumns], h[kColumns];
  clear<T>(n, g, h);
  const bool together = rows_together(args, 2);
  for_row_groups<kRows>(together, chunk.first_row, chunk.last_row, [&](int64_t r, auto k) UDL_LAMBDA {
    with_runs<decltype(k)::value, T>(args, first, r, [&](auto& run) UDL_LAMBDA {
      sum_runs<kKind>(args, run, n, values, [&](int64_t i, auto add) UDL_LAMBDA {
        Pack<A> g_sum = load_ordered<T>(g + i), h_sum = load_ordered<T>(h + i);
        add(g_sum, h_sum);
        store_ordered<T>(g + i, g_sum);
        store_ordered<T>(h + i, h_sum);
      });
    });
  });
  const int64_t width = args.columns_wide();
  A* partials = static_cast<A*>(args.partials) + 2 * index * width + first;
  from_pack_order<T>(g, partials, n);
  from_pack_order<T>(h, partials + width, n);
}

template <Kind kKind, class T>
void gradient_rows(const BatchNorm& args, const ManyChannels<T>& values, int64_t first, int64_t n,
                   int64_t begin, int64_t end) {
  for_row_groups<kRows>(rows_together(args, 2), begin, end, [&](int64_t r, auto count) UDL_LAMBDA {
    with_runs<decltype(count)::value, T>(args, first, r, [&](auto& run) UDL_LAMBDA {
      const auto nothing = [](int64_t) UDL_LAMBDA {};
      if (run[0].dresidual != nullptr) {
        for (Run<T>& one : run) one.take_stored_gradient();
        gradient_runs<Kind::identity>(args, run, n, values, nothing);
      } else {
        gradient_runs<kKind>(args, run, n, values, nothing);
      }
    });
  });
}

// step(first column, number of columns, chunk) for units [begin, end).
template <class Step>
UDL_INLINE void for_units(const BatchNorm& args, int64_t begin, int64_t end, Step step) {
  const int64_t width = args.columns_wide();
  const int64_t blocks = (width + kColumns - 1) / kColumns;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % blocks * kColumns;
    const int64_t left = width - first;
    step(first, left < kColumns ? left : kColumns, unit / blocks);
  }
}

// step(first column, number of columns) for columns [begin, end).
template <class Step>
UDL_INLINE void for_blocks(const BatchNorm& args, int64_t begin, int64_t end, Step step) {
  const int64_t together = columns_together(args);
  for (int64_t first = begin; first < end; first += together) {
    step(first, end - first < together ? end - first : together);
  }
}

// Behind the channels of columns [first, first + n). Folded columns are always handled together.
UDL_INLINE int64_t last_channel(const BatchNorm& args, int64_t first, int64_t n) {
  return args.fold > 1 ? args.channels : first + n;
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
    const int64_t width = args.columns_wide();
    const ManyChannels<T> values(args, 0, width);
    write_rows<decltype(kind)::value, T>(args, values, 0, width, begin, end);
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
    const int64_t width = args.columns_wide();
    const ManyChannels<T> values(args, 0, width);
    gradient_rows<decltype(kind)::value, T>(args, values, 0, width, begin, end);
  });
}

void batch_norm_columns_forward(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    using T = decltype(type);
    for_blocks(args, begin, end, [&](int64_t first, int64_t n) {
      for (int64_t k = 0; k < args.chunks; ++k) chunk_moments<T>(args, first, n, k);
      batch_norm_finish_moments(args, first, last_channel(args, first, n));
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
      batch_norm_finish_sums(args, first, last_channel(args, first, n));
      const ManyChannels<T> values(args, first, n);
      gradient_rows<kKind, T>(args, values, first, n, 0, args.rows);
    });
  });
}

}  // namespace udl::UDL_ISA
