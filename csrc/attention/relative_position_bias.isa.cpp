#include "attention/relative_position_bias.h"

#include "transpose.isa.h"
#include "vec.h"

namespace udl::UDL_ISA {
namespace {

UDL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// body(I{}) with the index's type.
template <class Body>
UDL_INLINE void with_index(const RelativePositionBias& args, Body body) {
  if (args.wide_index) return body(int64_t{});
  body(int32_t{});
}

// Positions p to p + L of heads h to h + L: rows of the table, turned.
template <class T, class I>
UDL_INLINE void gather_tile(const RelativePositionBias& args, const I* index, int64_t h,
                            int64_t p) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  const T* table = static_cast<const T*>(args.table) + h;
  UDL_LINES T rows[L * L];
  for (int64_t j = 0; j < L; ++j) {
    std::memcpy(rows + j * L, table + index[p + j] * args.row, L * sizeof(T));
  }
  T* out = static_cast<T*>(args.out) + h * args.positions + p;
  if (args.heads - h >= L) return turn_tile<T>(rows, L, out, args.positions);
  UDL_LINES T turned[L * L];
  turn_tile<T>(rows, L, turned, L);
  for (int64_t i = 0; i < args.heads - h; ++i) {
    std::memcpy(out + i * args.positions, turned + i * L, L * sizeof(T));
  }
}

template <class T, class I>
void gather(const RelativePositionBias& args, int64_t first, int64_t last) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  const I* index = static_cast<const I*>(args.index);
  const T* table = static_cast<const T*>(args.table);
  T* out = static_cast<T*>(args.out);
  const int64_t whole = first + (last - first) / L * L;
  for (int64_t h = 0; h < args.heads; h += L) {
    for (int64_t p = first; p < whole; p += L) gather_tile<T>(args, index, h, p);
  }
  for (int64_t h = 0; h < args.heads; ++h) {
    for (int64_t p = whole; p < last; ++p) {
      out[h * args.positions + p] = table[index[p] * args.row + h];
    }
  }
}

// L positions of dout for the heads h to h + L, turned; zeros where there are fewer.
template <class T>
UDL_INLINE void load_turned(const RelativePositionBias& args, int64_t h, int64_t p, int64_t count,
                            T* turned) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  const T* dout = static_cast<const T*>(args.dout) + h * args.positions + p;
  const int64_t heads = least(args.heads - h, L);
  if (heads == L && count == L) return turn_tile<T>(dout, args.positions, turned, L);
  UDL_LINES T rows[L * L];
  std::memset(rows, 0, sizeof(rows));
  for (int64_t i = 0; i < heads; ++i) {
    std::memcpy(rows + i * L, dout + i * args.positions, static_cast<size_t>(count) * sizeof(T));
  }
  turn_tile<T>(rows, L, turned, L);
}

// sums[index[p], h] += dout[h, p], position after position.
template <class T, class I>
void sum_chunk(const RelativePositionBias& args, int64_t first, int64_t last, acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  const I* index = static_cast<const I*>(args.index);
  UDL_LINES T turned[L * L];
  for (int64_t p = first; p < last; p += L) {
    const int64_t count = least(last - p, L);
    for (int64_t h = 0; h < args.heads; h += L) {
      load_turned<T>(args, h, p, count, turned);
      A* at = sums + index[p] * args.row + h;
      vec_t<A> sum = load(static_cast<const A*>(at), Full{});
      for (int64_t j = 0; j < count; ++j) {
        A* next = sums + index[p + j] * args.row + h;
        if (next != at) {  // T5's neighbours often share a bucket: their sum stays in a register
          store(at, sum, Full{});
          at = next;
          sum = load(static_cast<const A*>(at), Full{});
        }
        sum += load(static_cast<const T*>(turned) + j * L, Full{});
      }
      store(at, sum, Full{});
    }
  }
}

template <class T>
void sum_chunks(const RelativePositionBias& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  Array<A> array(args.n * args.row);
  A* sums = array.data();
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * args.chunk, last = least(first + args.chunk, args.positions);
    array.clear();
    with_index(args, [&](auto type) { sum_chunk<T, decltype(type)>(args, first, last, sums); });
    A* out = static_cast<A*>(args.partials) + chunk * args.n * args.heads;
    for (int64_t r = 0; r < args.n; ++r) {
      std::memcpy(out + r * args.heads, sums + r * args.row,
                  static_cast<size_t>(args.heads) * sizeof(A));
    }
  }
}

}  // namespace

void relative_position_lanes(Dtype acc, int64_t* lanes) {
  *lanes = acc == Dtype::f64 ? kLanes<double> : kLanes<float>;
}

void relative_position_fits(const RelativePositionBias& args, int64_t begin, int64_t end) {
  with_index(args, [&](auto type) {
    using I = decltype(type);
    const I* index = static_cast<const I*>(args.index);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = least((chunk + 1) * args.chunk, args.positions);
      I low = 0, high = 0;
      for (int64_t p = chunk * args.chunk; p < last; ++p) {
        low = index[p] < low ? index[p] : low;
        high = index[p] > high ? index[p] : high;
      }
      args.fits[chunk] = low >= 0 && high < args.n;
    }
  });
}

void relative_position_gather(const RelativePositionBias& args, int64_t begin, int64_t end) {
  const int64_t first = begin * args.chunk, last = least(end * args.chunk, args.positions);
  with_type(args.dtype, [&](auto type) {
    with_index(args, [&](auto index) {
      gather<decltype(type), decltype(index)>(args, first, last);
    });
  });
}

void relative_position_sum(const RelativePositionBias& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { sum_chunks<decltype(type)>(args, begin, end); });
}

}  // namespace udl::UDL_ISA
