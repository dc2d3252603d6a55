#include "normalization/weight_norm.h"

#include "vec.h"

namespace udl::UDL_ISA {
namespace {

constexpr int64_t kPiece = 4096;  // sums over longer rows are added up from pieces of this width

template <class T, class Term>
UDL_INLINE acc_t<T> sum_row(int64_t n, Term term) {
  acc_t<T> sum = 0;
  for (int64_t start = 0; start < n; start += kPiece) {
    sum += sum_packs<T>(n - start < kPiece ? n - start : kPiece,
                        [=](int64_t i, auto tag) UDL_LAMBDA { return term(start + i, tag); });
  }
  return sum;
}

// The norm of a row whose squares overflow although its values are finite.
template <class T>
__attribute__((noinline)) acc_t<T> scaled_norm(const T* v, int64_t n) {
  using A = acc_t<T>;
  A largest = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const A magnitude = std::fabs(load_one(v + i));
    if (magnitude != magnitude) return magnitude;
    if (magnitude > largest) largest = magnitude;
  }
  if (!std::isfinite(largest)) return largest;
  for (int64_t i = 0; i < n; ++i) {
    const A scaled = load_one(v + i) / largest;
    sum += scaled * scaled;
  }
  return largest * std::sqrt(sum);
}

// A row is written while the next one is summed, in one loop: memory is read all the time, and no pass
// waits for the sum across lanes, the root and the division. work(i, tag) is what else to do at i.
template <class T, class Work>
UDL_INLINE acc_t<T> row_norm(const WeightNorm& args, int64_t row, Work work) {
  using A = acc_t<T>;
  const T* v = args.v.row<T>(row);
  const A squares = sum_row<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
    work(i, tag);
    const Pack<A> value = load_pack(v + i, tag);
    return value * value;
  });
  return std::isfinite(squares) ? std::sqrt(squares) : scaled_norm(v, args.n);
}

template <class T>
void forward_rows(const WeightNorm& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  A next = row_norm<T>(args, begin, [](int64_t, auto) UDL_LAMBDA {});
  for (int64_t row = begin; row < end; ++row) {
    const A norm = next;
    static_cast<A*>(args.norm)[row] = norm;
    const A factor = static_cast<const A*>(args.g)[row] / norm;
    const T* v = args.v.row<T>(row);
    T* out = static_cast<T*>(args.out) + row * args.n;
    const auto write = [=](int64_t i, auto tag) UDL_LAMBDA {
      store_pack(out + i, load_pack(v + i, tag) * factor, tag);
    };
    if (row + 1 < end) {
      next = row_norm<T>(args, row + 1, write);
    } else {
      for_packs<T>(args.n, write);
    }
  }
}

// dg = sum of dy * v / |v|, dv = g / |v| (dy - dg v / |v|). With three streams as wide, fetching
// ahead or overlapping rows only crowds the cache (1.1 to 1.7 times slower).
template <class T>
void backward_rows(const WeightNorm& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T *v = args.v.row<T>(row), *dy = args.dy.row<T>(row);
    const A inverse = 1 / static_cast<const A*>(args.norm)[row];
    const A dg = sum_row<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
      return load_pack(dy + i, tag) * (load_pack(v + i, tag) * inverse);
    });
    static_cast<A*>(args.dg)[row] = dg;
    if (args.out == nullptr) continue;
    const A factor = static_cast<const A*>(args.g)[row] * inverse;
    T* out = static_cast<T*>(args.out) + row * args.n;
    for_packs<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> along = load_pack(v + i, tag) * inverse * dg;
      store_pack(out + i, (load_pack(dy + i, tag) - along) * factor, tag);
    });
  }
}

}  // namespace

void weight_norm(const WeightNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.dy.data != nullptr) {
      backward_rows<T>(args, begin, end);
    } else {
      forward_rows<T>(args, begin, end);
    }
  });
}

}  // namespace udl::UDL_ISA
