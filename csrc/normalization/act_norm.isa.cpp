#include "normalization/act_norm.h"

#include "vec.h"

namespace udl::UDL_ISA {
namespace {

constexpr int64_t kPiece = 4096;  // sums over longer rows are added up from pieces of this width

template <class A>
UDL_INLINE Pack<A> splat_both(A value) {
  return {splat<A>(value), splat<A>(value)};
}

// A row with one scale and one bias.
template <class T>
void plane(const ActNorm& args, int64_t row) {
  using A = acc_t<T>;
  const int64_t channel = row % args.channels;
  const A scale = static_cast<const A*>(args.scale)[channel];
  const A bias = static_cast<const A*>(args.bias)[channel];
  const T* x = args.x.row<T>(row);
  T* out = args.out != nullptr ? static_cast<T*>(args.out) + row * args.n : nullptr;
  if (args.dy.data == nullptr) {
    for_packs<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
      store_pack(out + i, (load_pack(x + i, tag) + bias) * scale, tag);
    });
    return;
  }
  const T* dy = args.dy.row<T>(row);
  A dy_sum = 0, product_sum = 0;
  for (int64_t start = 0; start < args.n; start += kPiece) {
    const int64_t width = args.n - start < kPiece ? args.n - start : kPiece;
    Pack<A> sums{}, products{};
    for_packs<T>(width, [&, x, dy, out](int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> g = load_pack(dy + start + i, tag);  // zero behind the row's end
      sums = sums + g;
      products = products + g * ((load_pack(x + start + i, tag) + bias) * scale);
      if (out != nullptr) store_pack(out + start + i, g * scale, tag);
    });
    dy_sum += sum_lanes(sums.a + sums.b);
    product_sum += sum_lanes(products.a + products.b);
  }
  static_cast<A*>(args.dy_sums)[row] = dy_sum * scale;
  static_cast<A*>(args.product_sums)[row] = product_sum;
}

template <class T>
struct Lines {
  const acc_t<T>*scale, *bias;
  acc_t<T>*sums, *products;
};

template <class T>
void column_row(const ActNorm& args, int64_t row, const Lines<T>& lines) {
  using A = acc_t<T>;
  const Lines<T> at = lines;
  const T* x = args.x.row<T>(row);
  T* out = args.out != nullptr ? static_cast<T*>(args.out) + row * args.n : nullptr;
  if (args.dy.data == nullptr) {
    for_packs<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> moved = load_pack(x + i, tag) + load_ordered<T>(at.bias + i);
      store_pack(out + i, moved * load_ordered<T>(at.scale + i), tag);
    });
    return;
  }
  const T* dy = args.dy.row<T>(row);
  for_packs<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
    const Pack<A> g = load_pack(dy + i, tag) * load_ordered<T>(at.scale + i);
    const Pack<A> moved = load_pack(x + i, tag) + load_ordered<T>(at.bias + i);
    store_ordered<T>(at.sums + i, load_ordered<T>(at.sums + i) + g);
    store_ordered<T>(at.products + i, load_ordered<T>(at.products + i) + g * moved);
    if (out != nullptr) store_pack(out + i, g, tag);
  });
}

template <class T>
void run_columns(const ActNorm& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t n = args.n, width = args.dy.data != nullptr ? whole_packs<T>(n) : 0;
  const PackOrder<T> scale(args.scale, n), bias(args.bias, n);
  Array<A> array(2 * width);
  A* sums = array.data();
  const Lines<T> lines{scale.data(), bias.data(), sums, sums + width};
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    array.clear();
    const int64_t first = chunk * args.chunk_rows, last = first + args.chunk_rows;
    for (int64_t row = first; row < last && row < args.rows; ++row) column_row(args, row, lines);
    if (width == 0) continue;
    from_pack_order<T>(lines.sums, static_cast<A*>(args.dy_sums) + chunk * n, n);
    from_pack_order<T>(lines.products, static_cast<A*>(args.product_sums) + chunk * n, n);
  }
}

}  // namespace

void act_norm(const ActNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.columns) {
      run_columns<T>(args, begin, end);
    } else {
      for (int64_t row = begin; row < end; ++row) plane<T>(args, row);
    }
  });
}

}  // namespace udl::UDL_ISA
