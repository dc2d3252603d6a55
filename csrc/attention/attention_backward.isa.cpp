// Attention's backward. Weights and their gradients are computed again block by block from the saved
// LSE. Every sum runs over blocks of keys or of queries in their order, whoever computes it: a pass for
// dq alone and one for dk and dv alone give the bits of one pass for all three.
#include "attention/attention_pairs.isa.h"

namespace udl::UDL_ISA {
namespace {

// Whether products run on pairs: of an even width, whose queries can be paired along it.
template <class T>
UDL_INLINE bool uses_pairs(const Attention& args) {
  return kHasPairs<T> && args.width % 2 == 0 && args.value_width % 2 == 0;
}

// What a range of query blocks of one head needs, [blocks] of each: queries and dout turned to lanes
// and by rows, and the sums of dq. On pairs the first four hold pairs, and half as many.
template <class T>
struct HeadPanels {
  using A = acc_t<T>;
  static constexpr int64_t B = kQueryBlock<A>;
  HeadPanels(const Attention& args, int64_t blocks, bool with_dq)
      : row(whole_lanes<A>(args.width)),
        value_row(whole_lanes<A>(args.value_width)),
        lanes(uses_pairs<T>(args) ? B / 2 : B),
        width(args.width),
        value_width(args.value_width),
        turned_array(blocks * lanes * width),
        turned_dout_array(blocks * lanes * value_width),
        row_array(blocks * lanes * row),
        dout_array(blocks * lanes * value_row),
        dq_array(with_dq ? blocks * B * width : 0),
        lse_array(blocks * B),
        rest_array(blocks * B),
        delta_array(blocks * B) {}
  A* turned(int64_t i) const { return turned_array.data() + i * lanes * width; }
  A* turned_dout(int64_t i) const { return turned_dout_array.data() + i * lanes * value_width; }
  A* rows(int64_t i) const { return row_array.data() + i * lanes * row; }
  A* dout(int64_t i) const { return dout_array.data() + i * lanes * value_row; }
  A* dq(int64_t i) const { return dq_array.data() + i * B * width; }
  A* lse(int64_t i) const { return lse_array.data() + i * B; }
  A* rest(int64_t i) const { return rest_array.data() + i * B; }
  A* delta(int64_t i) const { return delta_array.data() + i * B; }

  int64_t row, value_row, lanes, width, value_width;
  Array<A> turned_array, turned_dout_array, row_array, dout_array, dq_array;
  // The logarithms to base 2, and by what weights are multiplied for what rounding took from them.
  Array<A> lse_array, rest_array, delta_array;
};
template <class A>
UDL_INLINE uint32_t* as_pairs(A* panel) {
  return reinterpret_cast<uint32_t*>(panel);
}

// Rows of T, padded with zeros to `padded`.
template <class T>
void copy_rows(const T* rows, int64_t stride, int64_t count, int64_t width, int64_t padded,
               acc_t<T>* out) {
  for (int64_t i = 0; i < count; ++i) load_row(rows + i * stride, width, out + i * padded);
}

template <class T>
void fill_panels(const Attention& args, const QueryBlock& block, int64_t i, HeadPanels<T>& panels) {
  using A = acc_t<T>;
  constexpr int64_t B = kQueryBlock<A>;
  const T* q = args.q.at<T>(block.b, block.h, block.first);
  const T* dout = args.dout.at<T>(block.b, block.h, block.first);
  if constexpr (kHasPairs<T>) {
    if (uses_pairs<T>(args)) {
      turn_pairs(q, args.q.row, block.rows, args.width, as_pairs(panels.turned(i)));
      turn_pairs(dout, args.dout.row, block.rows, args.value_width,
                 as_pairs(panels.turned_dout(i)));
      pair_rows(q, args.q.row, block.rows, args.width, panels.row, as_pairs(panels.rows(i)));
      pair_rows(dout, args.dout.row, block.rows, args.value_width, panels.value_row,
                as_pairs(panels.dout(i)));
    }
  }
  if (!uses_pairs<T>(args)) {
    turn_rows(q, args.q.row, block.rows, args.width, panels.turned(i));
    turn_rows(dout, args.dout.row, block.rows, args.value_width, panels.turned_dout(i));
    copy_rows(q, args.q.row, block.rows, args.width, panels.row, panels.rows(i));
    copy_rows(dout, args.dout.row, block.rows, args.value_width, panels.value_row, panels.dout(i));
  }
  const int64_t at = args.row_at(block.b, block.h, block.first);
  for (int64_t k = 0; k < B; ++k) {
    const bool inside = k < block.rows;
    const A lse = inside ? static_cast<const A*>(args.lse)[at + k] : A(0);
    // A row that sees nothing, and a lane without a row, have weights of exp(-inf).
    const double exact = inside && lse != static_cast<A>(kLowest)
                             ? static_cast<double>(lse) * kLog2E
                             : static_cast<double>(INFINITY);
    const double rounding = static_cast<double>(static_cast<A>(exact)) - exact;
    panels.lse(i)[k] = static_cast<A>(exact);
    panels.rest(i)[k] = static_cast<A>(rounding - rounding == 0 ? 1 + rounding * kLn2 : 1.0);
    panels.delta(i)[k] = inside ? static_cast<const A*>(args.delta)[at + k] : A(0);
  }
}

// A block of keys and what one thread works with beside it.
template <class T>
struct KeyBlock {
  using A = acc_t<T>;
  static constexpr int64_t B = kQueryBlock<A>;
  explicit KeyBlock(const Attention& args)
      : row(whole_lanes<A>(args.width)),
        value_row(whole_lanes<A>(args.value_width)),
        key_array(std::is_same_v<T, A> ? 0 : kKeyBlock * args.width),
        value_array(std::is_same_v<T, A> ? 0 : kKeyBlock * args.value_width),
        dk(kKeyBlock * row),
        dv(kKeyBlock * value_row),
        weights(kKeyBlock * B),
        gradients(kKeyBlock * B),
        turned(kKeyBlock * B),
        rows(kKeyBlock * B),
        slope(args.softcap > 0 ? kKeyBlock * B : 0),
        pairs(uses_pairs<T>(args)),
        score_pairs(pairs ? kKeyBlock * B / 2 : 0),
        key_pairs(pairs ? kKeyBlock / 2 * row : 0) {}

  void open(const Attention& args, int64_t batch, int64_t head, int64_t start) {
    b = batch;
    first = start;
    n = least(kKeyBlock, args.keys - first);
    key_rows = args.k.at<T>(b, head, first);
    value_rows = args.v.at<T>(b, head, first);
    if constexpr (kHasPairs<T>) {
      if (pairs) pair_rows(key_rows, args.k.row, n, args.width, row, key_pairs.data());
    }
    if (pairs) return;
    keys = panel_of(key_rows, args.k.row, n, args.width, key_array.data());
    values = panel_of(value_rows, args.v.row, n, args.value_width, value_array.data());
  }

  int64_t row, value_row, b = 0, first = 0, n = 0;
  const T *key_rows = nullptr, *value_rows = nullptr;
  Panel<T> keys{}, values{};
  Array<A> key_array, value_array, dk, dv, weights, gradients, turned, rows, slope;
  bool pairs;
  Array<uint32_t> score_pairs, key_pairs;
};

// The scores of a block before anything changes them, and the gradients of the weights.
template <class T>
void multiply_block(const Attention& args, int vectors, int64_t i, const HeadPanels<T>& panels,
                    KeyBlock<T>& work) {
  using A = acc_t<T>;
  A *weights = work.weights.data(), *gradients = work.gradients.data();
  if constexpr (kHasPairs<T>) {
    if (work.pairs) {
      const auto left = [](const T* rows, int64_t row) UDL_LAMBDA {
        return LeftPairs{reinterpret_cast<const char*>(rows), 2 * row, 4};
      };
      lanes_pair_product<false>(vectors, left(work.key_rows, args.k.row), work.n,
                                as_pairs(panels.turned(i)), args.width / 2,
                                score_factor<float>(args), weights);
      lanes_pair_product<false>(vectors, left(work.value_rows, args.v.row), work.n,
                                as_pairs(panels.turned_dout(i)), args.value_width / 2, 1,
                                gradients);
      return;
    }
  }
  lanes_product<false>(vectors, work.keys.data, work.keys.stride, 1, work.n,
                       static_cast<const A*>(panels.turned(i)), args.width, score_factor<A>(args),
                       weights);
  lanes_product<false>(vectors, work.values.data, work.values.stride, 1, work.n,
                       static_cast<const A*>(panels.turned_dout(i)), args.value_width, A(1),
                       gradients);
}

// The weights of a block (times what dropout keeps of them) and the gradients of its scores, before
// the softcap and the scale.
template <class T>
void block_gradients(const Attention& args, const QueryBlock& block, int64_t i,
                     const HeadPanels<T>& panels, KeyBlock<T>& work) {
  using A = acc_t<T>;
  constexpr int64_t B = kQueryBlock<A>;
  const int64_t n = work.n;
  A *weights = work.weights.data(), *gradients = work.gradients.data();
  multiply_block(args, block.vectors, i, panels, work);
  const Scores<A> scores{weights, work.turned.data(), work.rows.data(),
                         args.softcap > 0 ? work.slope.data() : nullptr};
  change_scores(args, block, scores, work.first, n);
  if (args.key_lengths != nullptr) {
    for (int64_t k = most(0, args.key_lengths[block.b] - work.first); k < n; ++k) {
      for (int64_t lane = 0; lane < B; ++lane) weights[k * B + lane] = static_cast<A>(kLowest);
    }
  }
  if (args.dropout.active) draw_dropout(args, block, scores, work.first);
  for (int r = 0; r < block.vectors; ++r) {
    const vec_t<A> lse = load(static_cast<const A*>(panels.lse(i)) + r * kLanes<A>, Full{});
    const vec_t<A> rest = load(static_cast<const A*>(panels.rest(i)) + r * kLanes<A>, Full{});
    const vec_t<A> delta = load(static_cast<const A*>(panels.delta(i)) + r * kLanes<A>, Full{});
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = k * B + r * kLanes<A>;
      vec_t<A> p = exp2_of(load(static_cast<const A*>(weights) + at, Full{}) - lse) * rest;
      vec_t<A> dp = load(static_cast<const A*>(gradients) + at, Full{});
      vec_t<A> kept = splat<A>(1);
      if (args.dropout.active) kept = load(static_cast<const A*>(scores.turned) + at, Full{});
      dp = kept == 0 ? vec_t<A>{} : dp * kept;
      // A weight of 0 takes nothing, not even NaN.
      store(gradients + at, p == 0 ? vec_t<A>{} : p * (dp - delta), Full{});
      store(weights + at, p * kept, Full{});
    }
  }
  // An odd last query is paired with a lane that has none, and may hold NaN: 0 times that is NaN too.
  for (int64_t k = 0; work.pairs && block.rows % 2 != 0 && k < n; ++k) {
    weights[k * B + block.rows] = gradients[k * B + block.rows] = A(0);
  }
}

// Where the keys may not be finite, sums over them leave out weights of 0.
template <class T>
void add_dq(const Attention& args, const QueryBlock& block, KeyBlock<T>& work, acc_t<T>* dq) {
  using A = acc_t<T>;
  const A* gradients = work.gradients.data();
  if (is_unclean(args, block.b, block.h, work.first, kUncleanKeys)) {
    const Panel<T> keys =
        panel_of(work.key_rows, args.k.row, work.n, args.width, work.key_array.data());
    careful_product(block.vectors, keys.data, 1, keys.stride, args.width, gradients, work.n, dq);
    return;
  }
  if constexpr (kHasPairs<T>) {
    if (work.pairs) {
      pair_keys(gradients, work.n, work.score_pairs.data());
      const LeftPairs left{reinterpret_cast<const char*>(work.key_pairs.data()), 4, 4 * work.row};
      lanes_pair_product<true>(block.vectors, left, args.width, work.score_pairs.data(),
                               (work.n + 1) / 2, 1, dq);
      return;
    }
  }
  lanes_product<true>(block.vectors, work.keys.data, 1, work.keys.stride, args.width, gradients,
                      work.n, A(1), dq);
}

// sums[key][...] += sum over the block's queries of scores[key][query] * rows[query][...].
template <class T>
void add_rows(const QueryBlock& block, KeyBlock<T>& work, const acc_t<T>* scores,
              acc_t<T>* rows, int64_t row, acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int64_t B = kQueryBlock<A>;
  if constexpr (kHasPairs<T>) {
    if (work.pairs) {
      pair_lanes(scores, work.n, work.score_pairs.data());
      const LeftPairs left{reinterpret_cast<const char*>(work.score_pairs.data()), 2 * B, 4};
      add_wide_pairs(left, work.n, as_pairs(rows), row, (block.rows + 1) / 2, sums, row);
      return;
    }
  }
  add_wide_product(scores, B, 1, work.n, static_cast<const A*>(rows), row, block.rows, sums, row,
                   row / kLanes<A>);
}

// A range of the blocks of keys and of queries of one key head.
struct Range {
  int64_t b, head, first_key, last_key, first_query, last_query;
};

template <class T>
void write_keys(const Attention& args, const Range& range, const KeyBlock<T>& work) {
  using A = acc_t<T>;
  const A scale = static_cast<A>(args.scale);
  const auto write = [&](const Heads& to, const A* from, int64_t padded, int64_t width, A factor) {
    for (int64_t k = 0; k < work.n; ++k) {
      store_row(from + k * padded, width, factor, to.to<T>(range.b, range.head, work.first + k));
    }
  };
  if (args.dk.data != nullptr) write(args.dk, work.dk.data(), work.row, args.width, scale);
  if (args.dv.data != nullptr) write(args.dv, work.dv.data(), work.value_row, args.value_width, A(1));
}

template <class T>
void backward_range(const Attention& args, const Range& range, KeyBlock<T>& work) {
  using A = acc_t<T>;
  constexpr int64_t B = kQueryBlock<A>;
  const bool with_dq = args.dq.data != nullptr;
  const bool with_keys = args.dk.data != nullptr || args.dv.data != nullptr;
  const int64_t group = args.group(), blocks = range.last_query - range.first_query;
  HeadPanels<T> panels(args, blocks * group, with_dq);
  if (with_dq) panels.dq_array.clear();
  const auto block_at = [&](int64_t i) UDL_LAMBDA {
    return query_block<A>(args, range.b, range.head * group + i / blocks,
                          range.first_query + i % blocks);
  };
  for (int64_t i = 0; i < blocks * group; ++i) fill_panels(args, block_at(i), i, panels);
  for (int64_t key = range.first_key; key < range.last_key; ++key) {
    work.open(args, range.b, range.head, key * kKeyBlock);
    work.dk.clear();
    work.dv.clear();
    for (int64_t i = 0; i < blocks * group; ++i) {
      const QueryBlock block = block_at(i);
      if (work.first >= block.key_end || work.first + work.n <= block.key_begin) continue;
      if (shown_of(args, block, work.first, work.n) == Shown::none) continue;
      block_gradients(args, block, i, panels, work);
      if (args.softcap > 0) {
        const auto slope = [&](vec_t<A> g, int r, int64_t k) UDL_LAMBDA {
          const A* at = work.slope.data() + k * B + r * kLanes<A>;
          return g == 0 ? g : g * load(at, Full{});
        };
        for_scores(block.vectors, work.gradients.data(), work.n, slope);
      }
      if (with_keys) {
        add_rows(block, work, static_cast<const A*>(work.weights.data()), panels.dout(i),
                 panels.value_row, work.dv.data());
        add_rows(block, work, static_cast<const A*>(work.gradients.data()), panels.rows(i),
                 panels.row, work.dk.data());
      }
      if (with_dq) add_dq(args, block, work, panels.dq(i));
    }
    if (with_keys) write_keys(args, range, work);
  }
  if (!with_dq) return;
  UDL_LINES A factors[B];
  for (int64_t i = 0; i < B; ++i) factors[i] = static_cast<A>(args.scale);
  for (int64_t i = 0; i < blocks * group; ++i) {
    const QueryBlock block = block_at(i);
    turn_back(static_cast<const A*>(panels.dq(i)), args.width, static_cast<const A*>(factors),
              block.rows, args.dq.to<T>(block.b, block.h, block.first), args.dq.row);
  }
}

// Adds the gradients of a block of scores to the bias's gradient, row by row.
template <class T>
void add_dbias(const Attention& args, const QueryBlock& block, KeyBlock<T>& work, acc_t<T>* dbias) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>, B = kQueryBlock<A>;
  const A* gradients = work.gradients.data();
  for (int64_t i = 0; i < block.rows; i += L) {
    for (int64_t k = 0; k < work.n; k += L) {
      turn_tile(gradients + k * B + i, B, work.rows.data() + i * kKeyBlock + k, kKeyBlock);
    }
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    const A* row = work.rows.data() + i * kKeyBlock;
    A* sums = dbias + (args.bias_queries > 1 ? block.first + i : 0) * args.bias_keys;
    if (args.bias_keys > 1) {
      sums += work.first;
      int64_t k = 0;
      for (; k + L <= work.n; k += L) {
        store(sums + k, load(static_cast<const A*>(sums) + k, Full{}) + load(row + k, Full{}),
              Full{});
      }
      for (; k < work.n; ++k) sums[k] += row[k];
    } else {
      for (int64_t k = 0; k < work.n; ++k) *sums += row[k];
    }
  }
}

template <class T>
void bias_unit(const Attention& args, int64_t unit, KeyBlock<T>& work) {
  using A = acc_t<T>;
  const int64_t all = (args.queries + kQueryBlock<A> - 1) / kQueryBlock<A>;
  const int64_t parts = args.bias_queries > 1 ? all : 1;
  const int64_t slice = unit / parts, part = unit % parts;
  const int64_t first = parts > 1 ? part : 0, last = parts > 1 ? part + 1 : all;
  A* dbias = static_cast<A*>(args.dbias) + slice * args.bias_queries * args.bias_keys;
  const int64_t bias_b = slice / args.bias_heads, bias_h = slice % args.bias_heads;
  HeadPanels<T> panels(args, 1, false);
  for (int64_t b = 0; b < args.batches; ++b) {
    if (args.bias_batches > 1 && b != bias_b) continue;
    for (int64_t h = 0; h < args.heads; ++h) {
      if (args.bias_heads > 1 && h != bias_h) continue;
      for (int64_t index = first; index < last; ++index) {
        const QueryBlock block = query_block<A>(args, b, h, index);
        fill_panels(args, block, 0, panels);
        for (int64_t key = block.key_begin; key < block.key_end; key += kKeyBlock) {
          const int64_t n = least(kKeyBlock, args.keys - key);
          if (shown_of(args, block, key, n) == Shown::none) continue;
          work.open(args, b, h / args.group(), key);
          block_gradients(args, block, 0, panels, work);
          add_dbias(args, block, work, dbias);
        }
      }
    }
  }
}

}  // namespace

// Summed in the order of the products of dout and the values: where a query sees one key alone, the two
// are then equal and its gradients exactly 0.
void attention_delta(const Attention& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    constexpr int64_t B = kQueryBlock<A>;
    const Array<A> dout(args.value_width * B), out(args.value_width * B);
    UDL_LINES A sums[B];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / args.heads, h = unit % args.heads;
      for (int64_t first = 0; first < args.queries; first += B) {
        const int64_t rows = least(B, args.queries - first);
        turn_rows(args.dout.at<T>(b, h, first), args.dout.row, rows, args.value_width, dout.data());
        turn_rows(args.out.at<T>(b, h, first), args.out.row, rows, args.value_width, out.data());
        for (int r = 0; r < kVectors; ++r) {
          vec_t<A> sum{};
          for (int64_t d = 0; d < args.value_width; ++d) {
            const int64_t at = d * B + r * kLanes<A>;
            sum += load(static_cast<const A*>(out.data()) + at, Full{}) *
                   load(static_cast<const A*>(dout.data()) + at, Full{});
          }
          store(sums + r * kLanes<A>, sum, Full{});
        }
        A* delta = static_cast<A*>(args.delta) + args.row_at(b, h, first);
        for (int64_t i = 0; i < rows; ++i) {
          delta[i] = sums[i];
          if (args.dlse.data != nullptr) delta[i] -= *args.dlse.at<A>(b, h, first + i);
        }
      }
    }
  });
}

void attention_backward(const Attention& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    KeyBlock<T> work(args);
    const int64_t queries = (args.queries + kQueryBlock<A> - 1) / kQueryBlock<A>;
    const int64_t parts = args.key_parts * args.query_parts;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / parts, part = unit % parts;
      const int64_t kp = part % args.key_parts, qp = part / args.key_parts;
      const Range range{head / args.key_heads,
                        head % args.key_heads,
                        kp * key_blocks(args) / args.key_parts,
                        (kp + 1) * key_blocks(args) / args.key_parts,
                        qp * queries / args.query_parts,
                        (qp + 1) * queries / args.query_parts};
      backward_range(args, range, work);
    }
  });
}

void attention_bias_backward(const Attention& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    KeyBlock<decltype(type)> work(args);
    for (int64_t unit = begin; unit < end; ++unit) bias_unit(args, unit, work);
  });
}

}  // namespace udl::UDL_ISA
