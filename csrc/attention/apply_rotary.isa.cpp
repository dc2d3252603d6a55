#include "attention/apply_rotary.h"

#include <utility>

#include "transpose.isa.h"
#include "vec.h"

namespace udl::UDL_ISA {
namespace {

template <class V, size_t... I>
UDL_INLINE V every_other(V a, V b, std::index_sequence<I...>, int odd) {
  return odd ? __builtin_shufflevector(a, b, (2 * I + 1)...)
             : __builtin_shufflevector(a, b, (2 * I)...);
}
template <class V, size_t... I>
UDL_INLINE V swap_neighbours(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ 1)...);
}

// Up to a vector of the n values from p on, in the accumulation type; zeros behind them.
template <class T>
UDL_INLINE vec_t<acc_t<T>> load_first(const T* p, int64_t n) {
  if (n >= kLanes<acc_t<T>>) return load(p, Full{});
  return n > 0 ? load(p, Tail{static_cast<int>(n)}) : vec_t<acc_t<T>>{};
}

// One row of a table of type S in the order of T's packs, each value once (for pairs half a row apart).
template <class T, class S>
void order_halves(const S* table, int64_t half, acc_t<T> sign, acc_t<T>* ordered) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  constexpr std::make_index_sequence<L> lanes{};
  for (int64_t i = 0; i < half; i += kPack<T>) {
    const vec_t<A> a = load_first(table + i, half - i) * sign;
    const vec_t<A> b = i + L < half ? load_first(table + i + L, half - i - L) * sign : vec_t<A>{};
    if constexpr (kEvenOdd<T>) {
      store_ordered<T>(ordered + i, {every_other(a, b, lanes, 0), every_other(a, b, lanes, 1)});
    } else {
      store_ordered<T>(ordered + i, {a, b});
    }
  }
}

// The same with each value for both neighbours of a pair, which get the signs `first` and `second`.
template <class T, class S>
void order_pairs(const S* table, int64_t half, acc_t<T> first, acc_t<T> second,
                 acc_t<T>* ordered) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < half; i += kLanes<A>) {
    const vec_t<A> value = load_first(table + i, half - i);
    const vec_t<A> a = value * first, b = value * second;
    if constexpr (kEvenOdd<T>) {
      store_ordered<T>(ordered + 2 * i, {a, b});
    } else {
      store_ordered<T>(ordered + 2 * i, {interleave<false>(a, b), interleave<true>(a, b)});
    }
  }
}

// The neighbours of a pack's elements in their pairs.
template <class T>
UDL_INLINE Pack<acc_t<T>> partners(Pack<acc_t<T>> x) {
  if constexpr (kEvenOdd<T>) return {x.b, x.a};
  constexpr std::make_index_sequence<kLanes<acc_t<T>>> lanes{};
  return {swap_neighbours(x.a, lanes), swap_neighbours(x.b, lanes)};
}

// One head at one position. Both members of a pair are read before either is written.
template <class T>
UDL_INLINE void rotate(const Rotary& args, const acc_t<T>* cos, const acc_t<T>* sin, const T* x,
                       T* out) {
  using A = acc_t<T>;
  const int64_t half = args.half;
  if (args.interleaved) {
    for_packs<T>(2 * half, [=](int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> v = load_pack(x + i, tag);
      store_pack(out + i, v * load_ordered<T>(cos + i) + partners<T>(v) * load_ordered<T>(sin + i),
                 tag);
    });
  } else {
    for_packs<T>(half, [=](int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> c = load_ordered<T>(cos + i), s = load_ordered<T>(sin + i);
      const Pack<A> first = load_pack(x + i, tag), second = load_pack(x + half + i, tag);
      store_pack(out + i, first * c - second * s, tag);
      store_pack(out + half + i, second * c + first * s, tag);
    });
  }
  const int64_t rest = args.width - 2 * half;
  if (rest > 0 && out != x) {
    std::memcpy(out + 2 * half, x + 2 * half, static_cast<size_t>(rest) * sizeof(T));
  }
}

// The tables of positions first to last, as rotate reads them.
template <class T, class S>
void order_tables(const Rotary& args, int64_t b, int64_t first, int64_t last, int64_t row,
                  acc_t<T>* cos, acc_t<T>* sin) {
  using A = acc_t<T>;
  const A sign = args.inverse ? -1 : 1;
  for (int64_t t = first; t < last; ++t, cos += row, sin += row) {
    const S *c = args.cos.at<S>(b, 0, t), *s = args.sin.at<S>(b, 0, t);
    if (args.interleaved) {
      order_pairs<T>(c, args.half, A(1), A(1), cos);
      order_pairs<T>(s, args.half, -sign, sign, sin);
    } else {
      order_halves<T>(c, args.half, A(1), cos);
      order_halves<T>(s, args.half, sign, sin);
    }
  }
}

template <class T>
void run(const Rotary& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t blocks = (args.positions + args.block - 1) / args.block;
  const int64_t row = whole_packs<T>(args.interleaved ? 2 * args.half : args.half);
  const Array<A> cos(args.block * row), sin(args.block * row);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, first = unit % blocks * args.block;
    const int64_t rows = args.positions - first < args.block ? args.positions - first : args.block;
    if constexpr (std::is_same_v<A, double>) {
      order_tables<T, double>(args, b, first, first + rows, row, cos.data(), sin.data());
    } else {
      with_type(args.table_dtype, [&](auto type) {
        using S = decltype(type);
        if constexpr (std::is_same_v<acc_t<S>, float>) {
          order_tables<T, S>(args, b, first, first + rows, row, cos.data(), sin.data());
        }
      });
    }
    const int64_t outer = args.heads_last ? rows : args.heads;
    const int64_t inner = args.heads_last ? args.heads : rows;
    for (int64_t i = 0; i < outer; ++i) {
      for (int64_t j = 0; j < inner; ++j) {
        const int64_t h = args.heads_last ? j : i, t = args.heads_last ? i : j;
        rotate<T>(args, cos.data() + t * row, sin.data() + t * row, args.x.at<T>(b, h, first + t),
                  args.out.to<T>(b, h, first + t));
      }
    }
  }
}

}  // namespace

void apply_rotary(const Rotary& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { run<decltype(type)>(args, begin, end); });
}

}  // namespace udl::UDL_ISA
