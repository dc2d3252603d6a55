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

template <class T>
void forward_row(const WeightNorm& args, int64_t row) {
  using A = acc_t<T>;
  const T* v = args.v.row<T>(row);
  T* out = static_cast<T*>(args.out) + row * args.n;
  const A squares = sum_row<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
    prefetch_pack_write(out + i);
    const Pack<A> value = load_pack(v + i, tag);
    return value * value;
  });
  const A norm = std::isfinite(squares) ? std::sqrt(squares) : scaled_norm(v, args.n);
  static_cast<A*>(args.norm)[row] = norm;
  const A factor = static_cast<const A*>(args.g)[row] / norm;
  for_packs<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
    store_pack(out + i, load_pack(v + i, tag) * factor, tag);
  });
}

// dg = sum of dy * v / |v|, dv = g / |v| (dy - dg v / |v|).
template <class T>
void backward_row(const WeightNorm& args, int64_t row) {
  using A = acc_t<T>;
  const T* v = args.v.row<T>(row);
  const T* dy = args.dy.row<T>(row);
  const A inverse = 1 / static_cast<const A*>(args.norm)[row];
  const A dg = sum_row<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
    return load_pack(dy + i, tag) * (load_pack(v + i, tag) * inverse);
  });
  static_cast<A*>(args.dg)[row] = dg;
  if (args.out == nullptr) return;
  T* out = static_cast<T*>(args.out) + row * args.n;
  const A factor = static_cast<const A*>(args.g)[row] * inverse;
  for_packs<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
    const Pack<A> direction = load_pack(v + i, tag) * inverse;
    store_pack(out + i, (load_pack(dy + i, tag) - direction * dg) * factor, tag);
  });
}

}  // namespace

void weight_norm(const WeightNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      if (args.dy.data != nullptr) {
        backward_row<T>(args, row);
      } else {
        forward_row<T>(args, row);
      }
    }
  });
}

}  // namespace udl::UDL_ISA
