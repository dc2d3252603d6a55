// What attention's kernels share: blocks of queries, the keys they may see, and the products over the
// scores [keys, queries] of a block. To be included by *.isa.cpp only.
#pragma once

#include "activation.isa.h"
#include "attention/attention.h"
#include "transpose.isa.h"
#include "vec.h"

namespace udl::UDL_ISA {
namespace {

// A product's tile: kVectors of lanes times kTile numbers, so that the sums and what they are made of
// fill the registers.
#if defined(UDL_AVX512) || defined(__aarch64__)
constexpr int kVectors = 4, kTile = 6;
#else
constexpr int kVectors = 2, kTile = 4;
#endif
template <class A>
constexpr int64_t kQueryBlock = kVectors * kLanes<A>;
constexpr double kLowest = -INFINITY;
template <class A>
constexpr int64_t whole_lanes(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}
// Scores are held times log2(e), so that weights are powers of two.
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

UDL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
UDL_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A block of queries of one head, and the keys that any of them may see.
struct QueryBlock {
  int64_t b, h, first, rows, key_begin, key_end;
  int vectors;  // of lanes, in which the rows are
};

// tile(integral_constant) with a number of vectors that serves a block: 1, 2 or all.
template <class Body>
UDL_INLINE void with_vectors(int vectors, Body body) {
  if (vectors == 1) return body(std::integral_constant<int, 1>{});
  if (vectors == 2) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, kVectors>{});
}
UDL_INLINE int vectors_for(int64_t rows, int64_t lanes) {
  return rows <= lanes ? 1 : rows <= 2 * lanes ? 2 : kVectors;
}

template <class A>
QueryBlock query_block(const Attention& args, int64_t b, int64_t h, int64_t index) {
  QueryBlock block{b, h, index * kQueryBlock<A>, 0, 0, 0, 0};
  block.rows = least(kQueryBlock<A>, args.queries - block.first);
  block.vectors = vectors_for(block.rows, kLanes<A>);
  const int64_t last = block.first + block.rows - 1;
  int64_t keys = args.keys;
  if (args.key_lengths != nullptr) keys = most(0, least(keys, args.key_lengths[b]));
  const int64_t limit = args.keys + args.queries;  // beyond any distance, so that sums stay small
  block.key_begin = most(0, block.first + args.offset - least(args.left, limit + args.queries));
  block.key_end = least(keys, last + args.offset + least(args.right, limit + args.queries) + 1);
  if (args.ranges != nullptr) {
    const int64_t* range = args.ranges + b * args.ranges_batch + 2 * block.first;
    int64_t low = args.keys, high = 0;
    for (int64_t i = 0; i < block.rows; ++i) {
      if (range[2 * i] < range[2 * i + 1]) {
        low = least(low, range[2 * i]);
        high = most(high, range[2 * i + 1]);
      }
    }
    block.key_begin = most(block.key_begin, low);
    block.key_end = least(block.key_end, high);
  }
  block.key_begin = block.key_begin / kKeyBlock * kKeyBlock;
  return block;
}

// How much of a tile, the block's queries against keys [first, first + n), the block mask shows.
enum class Shown { none, some, all };
UDL_INLINE Shown shown_of(const Attention& args, const QueryBlock& block, int64_t first, int64_t n) {
  if (args.block_mask.data == nullptr) return Shown::all;
  bool any = false, all = true;
  const int64_t size = args.block_size, element = args.block_mask.element;
  for (int64_t i = block.first / size; i * size < block.first + block.rows; ++i) {
    const uint8_t* row = args.block_mask.at<uint8_t>(block.b, block.h, i);
    for (int64_t j = first / size; j * size < first + n; ++j) {
      any = any || row[j * element] != 0;
      all = all && row[j * element] != 0;
    }
  }
  return all ? Shown::all : any ? Shown::some : Shown::none;
}

// kJ rows of a product (see below).
template <int kJ, int kR, bool kAdd, class A>
UDL_INLINE void product_tile(const A* left, int64_t stride, int64_t step, const A* right,
                             int64_t right_stride, int64_t depth, A factor, A* out,
                             int64_t out_stride) {
  vec_t<A> sums[kJ][kR] = {};
  for (int64_t d = 0; d < depth; ++d) {
    vec_t<A> lanes[kR];
    for (int r = 0; r < kR; ++r) lanes[r] = load(right + r * kLanes<A>, Full{});
    for (int j = 0; j < kJ; ++j) {
      const vec_t<A> one = splat<A>(left[j * stride]);
      for (int r = 0; r < kR; ++r) sums[j][r] += one * lanes[r];
    }
    left += step;
    right += right_stride;
  }
  for (int j = 0; j < kJ; ++j) {
    for (int r = 0; r < kR; ++r) {
      A* at = out + j * out_stride + r * kLanes<A>;
      // Added only when complete: the rounding of a long sum grows with its blocks alone.
      store(at, kAdd ? load(static_cast<const A*>(at), Full{}) + sums[j][r] : sums[j][r] * factor,
            Full{});
    }
  }
}

// out[i][lanes] = factor * sum over d of left(i, d) * right[d][lanes], or that sum added to it (kAdd),
// where left(i, d) = left[i * stride + d * step]; kR vectors of lanes.
template <int kR, bool kAdd, class A>
void product(const A* left, int64_t stride, int64_t step, int64_t rows, const A* right,
             int64_t right_stride, int64_t depth, A factor, A* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + kTile <= rows; i += kTile) {
    product_tile<kTile, kR, kAdd>(left + i * stride, stride, step, right, right_stride, depth, factor,
                                  out + i * out_stride, out_stride);
  }
  const A* rest = left + i * stride;
  A* to = out + i * out_stride;
  const auto tile = [=](auto count) UDL_LAMBDA {
    product_tile<decltype(count)::value, kR, kAdd>(rest, stride, step, right, right_stride, depth,
                                                   factor, to, out_stride);
  };
  switch (rows - i) {
    case 5:
      return tile(std::integral_constant<int, 5>{});
    case 4:
      return tile(std::integral_constant<int, 4>{});
    case 3:
      return tile(std::integral_constant<int, 3>{});
    case 2:
      return tile(std::integral_constant<int, 2>{});
    case 1:
      return tile(std::integral_constant<int, 1>{});
    default:
      return;
  }
}

// The same over the lanes of a block of queries.
template <bool kAdd, class A>
void lanes_product(int vectors, const A* left, int64_t stride, int64_t step, int64_t rows,
                   const A* right, int64_t depth, A factor, A* out) {
  constexpr int64_t B = kQueryBlock<A>;
  with_vectors(vectors, [=](auto count) UDL_LAMBDA {
    product<decltype(count)::value, kAdd>(left, stride, step, rows, right, B, depth, factor, out, B);
  });
}

// The sums over any multiple of the lanes, `vectors` of them.
template <class A>
void add_wide_product(const A* left, int64_t stride, int64_t step, int64_t rows, const A* right,
                  int64_t right_stride, int64_t depth, A* out, int64_t out_stride,
                  int64_t vectors) {
  int64_t r = 0;
  for (; r + kVectors <= vectors; r += kVectors) {
    product<kVectors, true>(left, stride, step, rows, right + r * kLanes<A>, right_stride, depth,
                            A(1), out + r * kLanes<A>, out_stride);
  }
  for (; r < vectors; ++r) {
    product<1, true>(left, stride, step, rows, right + r * kLanes<A>, right_stride, depth, A(1),
                     out + r * kLanes<A>, out_stride);
  }
}

// One row of T in the accumulation type, with zeros behind it up to whole vectors.
template <class T>
UDL_INLINE void load_row(const T* from, int64_t width, acc_t<T>* to) {
  using A = acc_t<T>;
  int64_t d = 0;
  for (; d + kLanes<A> <= width; d += kLanes<A>) store(to + d, load(from + d, Full{}), Full{});
  if (d < width) store(to + d, load(from + d, Tail{static_cast<int>(width - d)}), Full{});
}

// One row of T from the accumulation type, times a factor; `from` holds whole vectors.
template <class T>
UDL_INLINE void store_row(const acc_t<T>* from, int64_t width, acc_t<T> factor, T* to) {
  using A = acc_t<T>;
  int64_t d = 0;
  for (; d + kLanes<A> <= width; d += kLanes<A>) store(to + d, load(from + d, Full{}) * factor, Full{});
  if (d < width) {
    store(to + d, load(from + d, Full{}) * factor, Tail{static_cast<int>(width - d)});
  }
}

// Rows of T as rows of the accumulation type: where they lie, or a copy of them.
template <class T>
struct Panel {
  using A = acc_t<T>;
  const A* data;
  int64_t stride;
};
template <class T>
Panel<T> panel_of(const T* rows, int64_t stride, int64_t count, int64_t width, acc_t<T>* copy) {
  using A = acc_t<T>;
  if constexpr (std::is_same_v<T, A>) {
    return {rows, stride};
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const T* from = rows + i * stride;
      A* to = copy + i * width;
      int64_t d = 0;
      for (; d + kLanes<A> <= width; d += kLanes<A>) store(to + d, load(from + d, Full{}), Full{});
      for (; d < width; ++d) to[d] = load_one(from + d);
    }
    return {copy, width};
  }
}

// out[d][lane] = rows[lane][d] for a block of queries; lanes without a query are 0.
template <class T>
void turn_rows(const T* rows, int64_t stride, int64_t count, int64_t width, acc_t<T>* out) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>, B = kQueryBlock<A>;
  if (count < B) std::memset(out, 0, static_cast<size_t>(width * B) * sizeof(A));
  UDL_LINES A tile[L * L];
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const T* from = rows + i * stride;
    int64_t d = 0;
    for (; d + L <= width; d += L) {
      for (int64_t k = 0; k < L; ++k) {
        store(tile + k * L, load(from + k * stride + d, Full{}), Full{});
      }
      turn_tile(static_cast<const A*>(tile), L, out + d * B + i, B);
    }
    for (; d < width; ++d) {
      for (int64_t k = 0; k < L; ++k) out[d * B + i + k] = load_one(from + k * stride + d);
    }
  }
  for (; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) out[d * B + i] = load_one(rows + i * stride + d);
  }
}

// rows[lane][d] = factors[lane] * block[d][lane] for the block's queries.
template <class T>
void turn_back(const acc_t<T>* block, int64_t width, const acc_t<T>* factors, int64_t count,
               T* rows, int64_t stride) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>, B = kQueryBlock<A>;
  UDL_LINES A tile[L * L], turned[L * L];
  for (int64_t i = 0; i < count; i += L) {
    const int64_t lanes = least(L, count - i);
    const vec_t<A> factor = load(factors + i, Full{});
    for (int64_t d = 0; d < width; d += L) {
      const int64_t n = least(L, width - d);
      for (int64_t k = 0; k < L; ++k) {
        const vec_t<A> v = k < n ? load(block + (d + k) * B + i, Full{}) * factor : vec_t<A>{};
        store(tile + k * L, v, Full{});
      }
      turn_tile(static_cast<const A*>(tile), L, static_cast<A*>(turned), L);
      for (int64_t k = 0; k < lanes; ++k) {
        T* to = rows + (i + k) * stride + d;
        const vec_t<A> v = load(static_cast<const A*>(turned) + k * L, Full{});
        if (n == L) {
          store(to, v, Full{});
        } else {
          store(to, v, Tail{static_cast<int>(n)});
        }
      }
    }
  }
}

}  // namespace
}  // namespace udl::UDL_ISA
