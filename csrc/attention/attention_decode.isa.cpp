// Decoding: scores and weighted sums of a chunk of keys by rows of queries, read once, with the width
// along the vectors; then the chunks of a row are merged in their order.
#include "attention/attention_decode.h"

#include "attention/attention_pairs.isa.h"

namespace udl::UDL_ISA {
namespace {

// Rotates the pairs of a row by the angles of a position.
template <class A>
void rotate_row(const Angles& rotary, int64_t position, A* row) {
  const int64_t last = rotary.positions - 1;
  const int64_t at = most(0, least(position, last)) * rotary.half;
  const A* cos = static_cast<const A*>(rotary.cos) + at;
  const A* sin = static_cast<const A*>(rotary.sin) + at;
  const int64_t step = rotary.interleaved ? 2 : 1, apart = rotary.interleaved ? 1 : rotary.half;
  for (int64_t i = 0; i < rotary.half; ++i) {
    A &x = row[i * step], &y = row[i * step + apart];
    const A turned = x * cos[i] - y * sin[i];
    y = y * cos[i] + x * sin[i];
    x = turned;
  }
}

// A chunk's queries and working memory. Queries lie in T's pack order, padded with zeros.
template <class T>
struct Chunk {
  using A = acc_t<T>;
  explicit Chunk(const Decode& args)
      : row(whole_packs<T>(args.width)),
        value_row(whole_packs<T>(args.value_width)),
        natural(row),
        queries(args.rows() * row),
        scores(args.rows() * kKeyBlock),
        out(args.rows() * value_row),
        peak(args.rows()),
        sum(args.rows()),
        low(args.rows()),
        high(args.rows()),
        pairs(kHasPairs<T> && args.rotary.cos == nullptr),
        query_pairs(pairs ? args.rows() * row / 2 : 0) {}

  int64_t row, value_row;
  Array<A> natural, queries, scores, out, peak, sum;
  Array<int64_t> low, high;  // the keys a row sees
  // Whether scores are sums of products of pairs: of queries as they came, not rotated.
  bool pairs;
  Array<uint32_t> query_pairs;
  // Rows of a block's keys and values, and of the keys of the next.
  const T *key_rows[kKeyBlock], *value_rows[kKeyBlock], *next_rows[kKeyBlock];
};

// rows[k] = row first + k of the cache for k < n, behind it the last one.
template <class T>
void find_rows(const Cache& cache, int64_t b, int64_t head, int64_t first, int64_t n,
               const T** rows) {
  const int64_t page = cache.table == nullptr ? first + n : cache.page_size;
  for (int64_t k = 0; k < n;) {
    const int64_t j = first + k, end = least(n, k + page - j % page);
    const T* row = cache.row<T>(b, head, j);
    for (; k < end; ++k, row += cache.heads.row) rows[k] = row;
  }
  for (int64_t k = n; k < kKeyBlock; ++k) rows[k] = rows[n - 1];
}

template <class T>
UDL_INLINE void prefetch_row(const T* row, int64_t width) {
  const char* at = reinterpret_cast<const char*>(row);
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

template <class T>
void load_queries(const Decode& args, int64_t b, int64_t head, Chunk<T>& work) {
  using A = acc_t<T>;
  const int64_t length = args.lengths[b];
  const int64_t far = length + args.queries;  // beyond any distance
  for (int64_t r = 0; r < args.rows(); ++r) {
    const int64_t h = head * args.group() + r / args.queries, t = r % args.queries;
    const T* from = args.q.at<T>(b, h, t);
    load_row(from, args.width, work.natural.data());
    if (work.pairs) {
      uint32_t* pairs = work.query_pairs.data() + r * work.row / 2;
      std::memset(pairs, 0, static_cast<size_t>(work.row) * sizeof(T));
      std::memcpy(pairs, from, static_cast<size_t>(args.width) * sizeof(T));
    }
    const int64_t position = length - args.queries + t;
    if (args.rotary.cos != nullptr) rotate_row(args.rotary, position, work.natural.data());
    to_pack_order<T>(work.natural.data(), work.queries.data() + r * work.row, args.width);
    work.low.data()[r] = most(0, position - least(args.left, 2 * far));
    work.high.data()[r] = least(length, position + least(args.right, 2 * far) + 1);
    work.peak.data()[r] = static_cast<A>(kLowest);
    work.sum.data()[r] = A(0);
  }
  work.out.clear();
}

// scores[r * kKeyBlock + k] for kR queries and kK keys, whose products fill one vector.
template <int kR, class A>
UDL_INLINE void store_tile(vec_t<A>* sums, A factor, A* scores) {
  constexpr int kK = kLanes<A> / kR;
  UDL_LINES A found[kLanes<A>];
  store(static_cast<A*>(found), sum_each<A>(sums) * factor, Full{});
  for (int r = 0; r < kR; ++r) std::memcpy(scores + r * kKeyBlock, found + r * kK, kK * sizeof(A));
}

template <int kR, class T>
UDL_INLINE void score_tile(const acc_t<T>* queries, int64_t row, const T* const* keys,
                           int64_t width, acc_t<T> factor, acc_t<T>* scores) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, kK = L / kR;
  vec_t<A> sums[L] = {};
  const auto step = [&](int64_t d, auto part) UDL_LAMBDA {
    Pack<A> query[kR];
    for (int r = 0; r < kR; ++r) query[r] = load_ordered<T>(queries + r * row + d);
    for (int k = 0; k < kK; ++k) {
      const Pack<A> key = load_pack(keys[k] + d, part);
      for (int r = 0; r < kR; ++r) {
        sums[r * kK + k] += query[r].a * key.a;
        sums[r * kK + k] += query[r].b * key.b;
      }
    }
  };
  int64_t d = 0;
  for (; d + kPack<T> <= width; d += kPack<T>) step(d, Full{});
  if (d < width) step(d, Tail{static_cast<int>(width - d)});
  store_tile<kR, A>(static_cast<vec_t<A>*>(sums), factor, scores);
}

#if defined(UDL_ISA_avx512_bf16)
UDL_INLINE u32v load_bits(const bf16* p, Full) {
  u32v bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}
UDL_INLINE u32v load_bits(const bf16* p, Tail t) {
  return (u32v)_mm512_maskz_loadu_epi16((1u << t.n) - 1, p);
}

// The same on pairs of bfloat16 as they lie.
template <int kR>
UDL_INLINE void score_pairs(const uint32_t* queries, int64_t row, const bf16* const* keys,
                            int64_t width, float factor, float* scores) {
  constexpr int L = kLanes<float>, kK = L / kR;
  f32v sums[L] = {};
  const auto step = [&](int64_t d, auto part) UDL_LAMBDA {
    u32v query[kR];
    for (int r = 0; r < kR; ++r) query[r] = load_pairs(queries + (r * row + d) / 2);
    for (int k = 0; k < kK; ++k) {
      const u32v key = load_bits(keys[k] + d, part);
      for (int r = 0; r < kR; ++r) {
        sums[r * kK + k] = add_pairs(sums[r * kK + k], query[r], key);
      }
    }
  };
  int64_t d = 0;
  for (; d + 2 * L <= width; d += 2 * L) step(d, Full{});
  if (d < width) step(d, Tail{static_cast<int>(width - d)});
  store_tile<kR, float>(static_cast<f32v*>(sums), factor, scores);
}
#endif

// scores[r][k] for kR rows and a block of keys; behind the last key they are those of some key.
template <int kR, class T>
void score_rows(const Decode& args, Chunk<T>& work, int64_t r0, int64_t n) {
  using A = acc_t<T>;
  constexpr int kK = kLanes<A> / kR;
  const A factor = static_cast<A>(args.softcap > 0 ? args.scale : args.scale * kLog2E);
  for (int64_t first = 0; first < n; first += kK) {
    for (int64_t i = first; r0 == 0 && i < first + kK; ++i) {
      prefetch_row(work.value_rows[i], args.value_width);
      prefetch_row(work.next_rows[i], args.width);
    }
    A* scores = work.scores.data() + r0 * kKeyBlock + first;
#if defined(UDL_ISA_avx512_bf16)
    if constexpr (kHasPairs<T>) {
      if (work.pairs) {
        score_pairs<kR>(work.query_pairs.data() + r0 * work.row / 2, work.row,
                        work.key_rows + first, args.width, factor, scores);
        continue;
      }
    }
#endif
    score_tile<kR>(static_cast<const A*>(work.queries.data()) + r0 * work.row, work.row,
                   work.key_rows + first, args.width, factor, scores);
  }
}

// Everything between the product and the softmax, on one row of a block of keys.
template <class T>
void change_row(const Decode& args, Chunk<T>& work, int64_t b, int64_t head, int64_t r,
                int64_t first, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  A* scores = work.scores.data() + r * kKeyBlock;
  const int64_t h = head * args.group() + r / args.queries;
  const int64_t position = args.lengths[b] - args.queries + r % args.queries;
  const int64_t low = work.low.data()[r] - first, high = least(work.high.data()[r] - first, n);
  const bool inside = low <= 0 && high >= kKeyBlock;
  for (int64_t k = 0; k < kKeyBlock; k += L) {
    vec_t<A> s = load(static_cast<const A*>(scores) + k, Full{});
    if (args.softcap > 0) {
      s = tanh_of(s * static_cast<A>(1 / args.softcap)) * static_cast<A>(args.softcap * kLog2E);
    }
    if (args.alibi_slopes != nullptr) {
      const A slope = static_cast<const A*>(args.alibi_slopes)[b * args.heads + h] *
                      static_cast<A>(kLog2E);
      s = s - slope * magnitude(lane_numbers<A>(0) + static_cast<A>(first + k - position));
    }
    if (!inside) {
      const vec_t<A> key = lane_numbers<A>(0) + static_cast<A>(k);
      const vec_t<A> masked = splat<A>(static_cast<A>(kLowest));
      const A begin = static_cast<A>(most(-1, least(low, kKeyBlock)));
      const A end = static_cast<A>(most(-1, least(high, kKeyBlock)));
      s = key < begin ? masked : s;
      s = key >= end ? masked : s;
    }
    store(scores + k, s, Full{});
  }
}

template <class A>
UDL_INLINE A largest_lane(vec_t<A> v) {
  A largest = v[0];
  for (int i = 1; i < kLanes<A>; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// Scores become weights; what was summed before is brought to the new largest score.
template <class T>
void soften_row(Chunk<T>& work, int64_t r, int64_t value_width) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  A* scores = work.scores.data() + r * kKeyBlock;
  vec_t<A> largest = splat<A>(work.peak.data()[r]);
  for (int64_t k = 0; k < kKeyBlock; k += L) {
    const vec_t<A> s = load(static_cast<const A*>(scores) + k, Full{});
    largest = s > largest ? s : largest;
  }
  const A peak = largest_lane<A>(largest), before = work.peak.data()[r];
  const A base = peak == static_cast<A>(kLowest) ? A(0) : peak;
  vec_t<A> sum{};
  for (int64_t k = 0; k < kKeyBlock; k += L) {
    const vec_t<A> p = exp2_of(load(static_cast<const A*>(scores) + k, Full{}) - base);
    sum += p;
    store(scores + k, p, Full{});
  }
  if (peak != before) {
    const A factor = exp2_of(splat<A>(before - base))[0];
    work.sum.data()[r] *= factor;
    A* out = work.out.data() + r * work.value_row;
    for (int64_t d = 0; d < value_width; d += L) {
      store(out + d, load(static_cast<const A*>(out) + d, Full{}) * factor, Full{});
    }
  }
  work.sum.data()[r] += sum_lanes(sum);
  work.peak.data()[r] = peak;
}

// out[r][...] += the weights of keys [begin, end) times their values: kR rows, kC packs of columns.
template <int kR, int kC, class T, class Part>
UDL_INLINE void add_columns(Chunk<T>& work, int64_t r0, int64_t d, int64_t begin, int64_t end,
                            Part part) {
  using A = acc_t<T>;
  A* out = work.out.data() + r0 * work.value_row + d;
  const A* weights = work.scores.data() + r0 * kKeyBlock;
  Pack<A> sums[kR][kC];
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) {
      sums[r][c] = load_ordered<T>(out + r * work.value_row + c * kPack<T>);
    }
  }
  for (int64_t k = begin; k < end; ++k) {
    Pack<A> value[kC];
    for (int c = 0; c < kC; ++c) value[c] = load_pack(work.value_rows[k] + d + c * kPack<T>, part);
    for (int r = 0; r < kR; ++r) {
      const vec_t<A> weight = splat<A>(weights[r * kKeyBlock + k]);
      for (int c = 0; c < kC; ++c) {
        sums[r][c].a += weight * value[c].a;
        sums[r][c].b += weight * value[c].b;
      }
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) {
      store_ordered<T>(out + r * work.value_row + c * kPack<T>, sums[r][c]);
    }
  }
}

template <int kR, class T>
void add_values(const Decode& args, Chunk<T>& work, int64_t r0, int64_t begin, int64_t end) {
  if (begin >= end) return;
  int64_t d = 0;
  for (; d + 2 * kPack<T> <= args.value_width; d += 2 * kPack<T>) {
    add_columns<kR, 2>(work, r0, d, begin, end, Full{});
  }
  for (; d + kPack<T> <= args.value_width; d += kPack<T>) {
    add_columns<kR, 1>(work, r0, d, begin, end, Full{});
  }
  if (d < args.value_width) {
    const Tail tail{static_cast<int>(args.value_width - d)};
    add_columns<kR, 1>(work, r0, d, begin, end, tail);
  }
}

// kR rows against a block of keys. A key that only some of them see meets the others with no product
// at all: 0 times NaN would be NaN.
template <int kR, class T>
void attend_rows(const Decode& args, Chunk<T>& work, int64_t b, int64_t head, int64_t r0,
                 int64_t first, int64_t n) {
  int64_t low = 0, high = n;
  for (int64_t r = r0; r < r0 + kR; ++r) {
    low = most(low, work.low.data()[r] - first);
    high = least(high, work.high.data()[r] - first);
  }
  score_rows<kR>(args, work, r0, n);
  for (int64_t r = r0; r < r0 + kR; ++r) {
    change_row(args, work, b, head, r, first, n);
    soften_row(work, r, work.value_row);
  }
  const auto alone = [&](int64_t begin, int64_t end) UDL_LAMBDA {
    for (int64_t r = r0; r < r0 + kR; ++r) {
      add_values<1>(args, work, r, most(begin, work.low.data()[r] - first),
                    least(end, work.high.data()[r] - first));
    }
  };
  if (low >= high) return alone(0, n);
  alone(0, low);
  add_values<kR>(args, work, r0, low, high);
  alone(high, n);
}

template <class T>
void attend_block(const Decode& args, Chunk<T>& work, int64_t b, int64_t head, int64_t first,
                  int64_t n, int64_t end) {
  const int64_t next = first + n < end ? first + n : first;
  find_rows(args.k, b, head, first, n, static_cast<const T**>(work.key_rows));
  find_rows(args.v, b, head, first, n, static_cast<const T**>(work.value_rows));
  find_rows(args.k, b, head, next, least(kKeyBlock, end - next),
            static_cast<const T**>(work.next_rows));
  int64_t r = 0;
  for (; kLanes<acc_t<T>> >= 4 && r + 4 <= args.rows(); r += 4) {
    attend_rows<kLanes<acc_t<T>> >= 4 ? 4 : 2>(args, work, b, head, r, first, n);
  }
  for (; r + 2 <= args.rows(); r += 2) attend_rows<2>(args, work, b, head, r, first, n);
  for (; r < args.rows(); ++r) attend_rows<1>(args, work, b, head, r, first, n);
}

template <class T>
void decode_unit(const Decode& args, int64_t b, int64_t unit, Chunk<T>& work) {
  using A = acc_t<T>;
  const int64_t chunk = unit / args.key_heads - args.chunk_starts[b];
  const int64_t head = unit % args.key_heads;
  load_queries(args, b, head, work);
  int64_t begin = args.lengths[b], end = 0;
  for (int64_t r = 0; r < args.rows(); ++r) {
    begin = least(begin, work.low.data()[r]);
    end = most(end, work.high.data()[r]);
  }
  const int64_t chunk_end = least((chunk + 1) * kDecodeChunk, end);
  begin = most(begin / kKeyBlock * kKeyBlock, chunk * kDecodeChunk);
  for (int64_t first = begin; first < chunk_end; first += kKeyBlock) {
    attend_block(args, work, b, head, first, least(kKeyBlock, chunk_end - first), end);
  }
  const int64_t at = unit * args.rows();
  for (int64_t r = 0; r < args.rows(); ++r) {
    static_cast<A*>(args.partial_peak)[at + r] = work.peak.data()[r];
    static_cast<A*>(args.partial_sum)[at + r] = work.sum.data()[r];
    from_pack_order<T>(work.out.data() + r * work.value_row,
                       static_cast<A*>(args.partial_out) + (at + r) * args.value_width,
                       args.value_width);
  }
}

// One row of the result from its chunks.
template <class T>
void merge_row(const Decode& args, int64_t unit, acc_t<T>* sums) {
  using A = acc_t<T>;
  const int64_t t = unit % args.queries, h = unit / args.queries % args.heads;
  const int64_t b = unit / args.queries / args.heads, head = h / args.group();
  const int64_t row = h % args.group() * args.queries + t;
  const A *peaks = static_cast<const A*>(args.partial_peak);
  const A* partial_sums = static_cast<const A*>(args.partial_sum);
  const auto at = [&](int64_t chunk) UDL_LAMBDA {
    return (chunk * args.key_heads + head) * args.rows() + row;
  };
  const A* sinks = static_cast<const A*>(args.sinks);
  A peak = sinks != nullptr ? sinks[h] * static_cast<A>(kLog2E) : static_cast<A>(kLowest);
  const int64_t begin = args.chunk_starts[b], end = args.chunk_starts[b + 1];
  const A sink = peak;
  for (int64_t c = begin; c < end; ++c) peak = peaks[at(c)] > peak ? peaks[at(c)] : peak;
  const A base = peak == static_cast<A>(kLowest) ? A(0) : peak;
  A sum = exp2_of(splat<A>(sink - base))[0];
  for (int64_t d = 0; d < args.value_width; ++d) sums[d] = A(0);
  for (int64_t c = begin; c < end; ++c) {
    // Not skipped where NaN.
    if (partial_sums[at(c)] == 0) continue;
    const A factor = exp2_of(splat<A>(peaks[at(c)] - base))[0];
    sum += partial_sums[at(c)] * factor;
    const A* from = static_cast<const A*>(args.partial_out) + at(c) * args.value_width;
    for (int64_t d = 0; d < args.value_width; ++d) sums[d] += from[d] * factor;
  }
  const A inverse = sum == 0 ? A(0) : 1 / sum;
  store_row(static_cast<const A*>(sums), args.value_width, inverse, args.out.to<T>(b, h, t));
  const double lse = static_cast<double>(peak) * kLn2 + std::log(static_cast<double>(sum));
  static_cast<A*>(args.lse)[unit] = static_cast<A>(lse);
}

}  // namespace

void attention_decode_partial(const Decode& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    Chunk<decltype(type)> work(args);
    int64_t b = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
      while (unit / args.key_heads >= args.chunk_starts[b + 1]) ++b;
      decode_unit(args, b, unit, work);
    }
  });
}

void attention_decode_merge(const Decode& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const Array<acc_t<T>> sums(whole_lanes<acc_t<T>>(args.value_width));
    for (int64_t unit = begin; unit < end; ++unit) merge_row<T>(args, unit, sums.data());
  });
}

void attention_decode_append(const Append& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const Array<A> row(whole_lanes<A>(args.width));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / args.key_heads, head = unit % args.key_heads;
      for (int64_t i = 0; i < args.rows; ++i) {
        const int64_t position = args.starts[b] + i;
        const T* from = args.from.at<T>(b, head, i);
        T* to = const_cast<T*>(args.to.row<T>(b, head, position));
        if (args.rotary.cos == nullptr) {
          std::memcpy(to, from, static_cast<size_t>(args.width) * sizeof(T));
          continue;
        }
        load_row(from, args.width, row.data());
        rotate_row(args.rotary, position, row.data());
        store_row(static_cast<const A*>(row.data()), args.width, A(1), to);
      }
    }
  });
}

}  // namespace udl::UDL_ISA
