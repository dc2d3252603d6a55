// Attention's forward: blocks of queries, each over its blocks of keys with an online softmax.
#include "attention/attention_pairs.isa.h"

namespace udl::UDL_ISA {
namespace {

// Working memory of one thread.
template <class T>
struct Forward {
  using A = acc_t<T>;
  static constexpr int64_t B = kQueryBlock<A>;
  explicit Forward(const Attention& args)
      : queries(args.width * B),
        scores(kKeyBlock * B),
        turned(extra(args)),
        rows(extra(args)),
        out(args.value_width * B),
        keys(std::is_same_v<T, A> ? 0 : kKeyBlock * args.width),
        values(std::is_same_v<T, A> ? 0 : kKeyBlock * args.value_width),
        pairs(kHasPairs<T> && args.width % 2 == 0),
        value_row(whole_lanes<A>(args.value_width)),
        weight_pairs(pairs ? kKeyBlock / 2 * B : 0),
        value_pairs(pairs ? kKeyBlock / 2 * value_row : 0) {}
  Array<A> queries, scores, turned, rows, out, keys, values;
  // Whether products run on pairs; the queries then are pairs too.
  bool pairs;
  int64_t value_row;
  Array<uint32_t> weight_pairs, value_pairs;
  UDL_LINES A largest[B], sum[B], factor[B];

 private:
  static int64_t extra(const Attention& args) {
    const bool needed = args.bias.data != nullptr || args.mask.data != nullptr || args.dropout.active;
    return needed ? kKeyBlock * B : 0;
  }
};

// Updates the running maximum and sum with a block of scores, which become weights (where they are, or
// as pairs), and says by what to multiply what was summed before. Returns whether that is not 1
// everywhere.
template <class T>
bool soften(int vectors, Forward<T>& work, int64_t n, bool into_pairs) {
  using A = acc_t<T>;
  constexpr int64_t B = kQueryBlock<A>;
  bool moved = false;
  for (int r = 0; r < vectors; ++r) {
    A* scores = work.scores.data() + r * kLanes<A>;
    const vec_t<A> before = load(static_cast<const A*>(work.largest) + r * kLanes<A>, Full{});
    vec_t<A> largest = before;
    for (int64_t k = 0; k < n; ++k) {
      const vec_t<A> s = load(static_cast<const A*>(scores) + k * B, Full{});
      largest = s > largest ? s : largest;
    }
    const vec_t<A> base = largest == static_cast<A>(kLowest) ? vec_t<A>{} : largest;
    const vec_t<A> factor = exp2_of(before - base);
    vec_t<A> sum = load(static_cast<const A*>(work.sum) + r * kLanes<A>, Full{}) * factor;
    const auto weight = [=](int64_t k) UDL_LAMBDA {
      return exp2_of(load(static_cast<const A*>(scores) + k * B, Full{}) - base);
    };
    if (into_pairs) {
      if constexpr (kHasPairs<T>) {
        uint32_t* pairs = work.weight_pairs.data() + r * kLanes<A>;
        int64_t k = 0;
        for (; k + 1 < n; k += 2) {
          const f32v a = weight(k), b = weight(k + 1);
          sum += a + b;
          store_pairs(pairs + k / 2 * B, pack_bits({a, b}));
        }
        if (k < n) {
          const f32v a = weight(k);
          sum += a;
          store_pairs(pairs + k / 2 * B, pack_bits({a, f32v{}}));
        }
      }
    } else {
      for (int64_t k = 0; k < n; ++k) {
        const vec_t<A> p = weight(k);
        sum += p;
        store(scores + k * B, p, Full{});
      }
    }
    store(work.largest + r * kLanes<A>, largest, Full{});
    store(work.sum + r * kLanes<A>, sum, Full{});
    store(work.factor + r * kLanes<A>, factor, Full{});
    const auto changed = factor != 1;
    for (int i = 0; i < kLanes<A>; ++i) moved = moved || changed[i] != 0;
  }
  return moved;
}

template <class T>
void scale_out(const Attention& args, int vectors, Forward<T>& work) {
  using A = acc_t<T>;
  for_scores(vectors, work.out.data(), args.value_width, [&](vec_t<A> v, int r, int64_t) UDL_LAMBDA {
    return v * load(static_cast<const A*>(work.factor) + r * kLanes<A>, Full{});
  });
}

// The scores of a block of keys before anything changes them.
template <class T>
void multiply_keys(const Attention& args, const QueryBlock& block, Forward<T>& work, int64_t first,
                   int64_t n) {
  using A = acc_t<T>;
  const T* rows = args.k.at<T>(block.b, block.h / args.group(), first);
  if constexpr (kHasPairs<T>) {
    if (work.pairs) {
      const LeftPairs left{reinterpret_cast<const char*>(rows), 2 * args.k.row, 4};
      const auto* right = reinterpret_cast<const uint32_t*>(work.queries.data());
      lanes_pair_product<false>(block.vectors, left, n, right, args.width / 2,
                                score_factor<float>(args), work.scores.data());
      return;
    }
  }
  const Panel<T> keys = panel_of(rows, args.k.row, n, args.width, work.keys.data());
  lanes_product<false>(block.vectors, keys.data, keys.stride, 1, n,
                       static_cast<const A*>(work.queries.data()), args.width,
                       score_factor<A>(args), work.scores.data());
}

// Adds the values of a block of keys, weighted, to the result.
template <class T>
void add_values(const Attention& args, const QueryBlock& block, Forward<T>& work, int64_t first,
                int64_t n) {
  using A = acc_t<T>;
  const T* rows = args.v.at<T>(block.b, block.h / args.group(), first);
  const bool unclean = is_unclean(args, block.b, block.h, first, kUncleanValues);
  if constexpr (kHasPairs<T>) {
    if (work.pairs && !unclean) {
      if (args.dropout.active) pair_keys(work.scores.data(), n, work.weight_pairs.data());
      pair_rows(rows, args.v.row, n, args.value_width, work.value_row, work.value_pairs.data());
      const LeftPairs left{reinterpret_cast<const char*>(work.value_pairs.data()), 4,
                           4 * work.value_row};
      lanes_pair_product<true>(block.vectors, left, args.value_width, work.weight_pairs.data(),
                               (n + 1) / 2, 1, work.out.data());
      return;
    }
  }
  const Panel<T> values = panel_of(rows, args.v.row, n, args.value_width, work.values.data());
  const A* weights = work.scores.data();
  if (unclean) {
    careful_product(block.vectors, values.data, 1, values.stride, args.value_width, weights, n,
                    work.out.data());
  } else {
    lanes_product<true>(block.vectors, values.data, 1, values.stride, args.value_width, weights, n,
                        A(1), work.out.data());
  }
}

template <class T>
void forward_keys(const Attention& args, const QueryBlock& block, Forward<T>& work, int64_t first,
                  int64_t n) {
  using A = acc_t<T>;
  constexpr int64_t B = kQueryBlock<A>;
  multiply_keys(args, block, work, first, n);
  const Scores<A> scores{work.scores.data(), work.turned.data(), work.rows.data(), nullptr};
  change_scores(args, block, scores, first, n);
  const bool into_pairs = work.pairs && !args.dropout.active &&
                          !is_unclean(args, block.b, block.h, first, kUncleanValues);
  if (soften(block.vectors, work, n, into_pairs)) scale_out(args, block.vectors, work);
  if (args.dropout.active) {
    draw_dropout(args, block, scores, first);
    for_scores(block.vectors, work.scores.data(), n, [&](vec_t<A> p, int r, int64_t k) UDL_LAMBDA {
      return p * load(static_cast<const A*>(scores.turned) + k * B + r * kLanes<A>, Full{});
    });
  }
  add_values(args, block, work, first, n);
}

template <class T>
void turn_queries(const Attention& args, const QueryBlock& block, Forward<T>& work) {
  const T* rows = args.q.at<T>(block.b, block.h, block.first);
  if constexpr (kHasPairs<T>) {
    if (work.pairs) {
      turn_pairs(rows, args.q.row, block.rows, args.width,
                 reinterpret_cast<uint32_t*>(work.queries.data()));
      return;
    }
  }
  turn_rows(rows, args.q.row, block.rows, args.width, work.queries.data());
}

template <class T>
void forward_block(const Attention& args, const QueryBlock& block, Forward<T>& work) {
  using A = acc_t<T>;
  constexpr int64_t B = kQueryBlock<A>;
  turn_queries(args, block, work);
  work.out.clear();
  const A* sinks = static_cast<const A*>(args.sinks);
  for (int64_t i = 0; i < B; ++i) {
    work.largest[i] = sinks != nullptr ? sinks[block.h] * static_cast<A>(kLog2E)
                                       : static_cast<A>(kLowest);
    work.sum[i] = sinks != nullptr ? A(1) : A(0);
  }
  for (int64_t first = block.key_begin; first < block.key_end; first += kKeyBlock) {
    const int64_t n = least(kKeyBlock, block.key_end - first);
    if (shown_of(args, block, first, n) != Shown::none) forward_keys(args, block, work, first, n);
  }
  A* lse = static_cast<A*>(args.lse) + args.row_at(block.b, block.h, block.first);
  for (int64_t i = 0; i < B; ++i) {
    const A sum = work.sum[i];
    work.factor[i] = sum == 0 ? A(0) : 1 / sum;
    const double base = static_cast<double>(work.largest[i]);
    if (i < block.rows) lse[i] = static_cast<A>(base * kLn2 + std::log(static_cast<double>(sum)));
  }
  turn_back(static_cast<const A*>(work.out.data()), args.value_width,
            static_cast<const A*>(work.factor), block.rows,
            args.out.to<T>(block.b, block.h, block.first), args.out.row);
}

template <class T>
bool all_finite(const T* rows, int64_t stride, int64_t count, int64_t width) {
  using A = acc_t<T>;
  vec_t<A> sum{};
  A rest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows + i * stride;
    int64_t d = 0;
    for (; d + kLanes<A> <= width; d += kLanes<A>) sum += load(row + d, Full{}) * A(0);
    for (; d < width; ++d) rest += load_one(row + d) * A(0);
  }
  return sum_lanes(sum) + rest == 0;
}

}  // namespace

void attention_query_block(Dtype acc, int64_t* queries) {
  *queries = acc == Dtype::f64 ? kQueryBlock<double> : kQueryBlock<float>;
}

void attention_find_unclean(const Attention& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / args.key_heads, h = unit % args.key_heads;
      for (int64_t k = 0; k < key_blocks(args); ++k) {
        const int64_t first = k * kKeyBlock, n = least(kKeyBlock, args.keys - first);
        int found = 0;
        if (!all_finite(args.k.at<T>(b, h, first), args.k.row, n, args.width)) {
          found |= kUncleanKeys;
        }
        if (!all_finite(args.v.at<T>(b, h, first), args.v.row, n, args.value_width)) {
          found |= kUncleanValues;
        }
        args.unclean[unit * key_blocks(args) + k] = static_cast<uint8_t>(found);
      }
    }
  });
}

void attention_forward(const Attention& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Forward<T> work(args);
    const int64_t blocks = (args.queries + kQueryBlock<A> - 1) / kQueryBlock<A>;
    for (int64_t unit = begin; unit < end; ++unit) {
      // First and last blocks in turn: with a causal mask, neighbours cost as much together.
      const int64_t turn = unit % blocks, head = unit / blocks;
      const int64_t index = turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2;
      forward_block(args, query_block<A>(args, head / args.heads, head % args.heads, index), work);
    }
  });
}

}  // namespace udl::UDL_ISA
