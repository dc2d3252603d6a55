#include "normalization/spectral_norm.h"

#include "vec.h"

namespace udl::UDL_ISA {
namespace {

constexpr int64_t kPiece = 4096;  // sums over longer rows are added up from pieces of this width
constexpr int64_t kRowPiece = 32;  // rows added up before they join a column's sum

template <class T, class Term>
UDL_INLINE acc_t<T> sum_row(int64_t n, Term term) {
  acc_t<T> sum = 0;
  for (int64_t start = 0; start < n; start += kPiece) {
    sum += sum_packs<T>(n - start < kPiece ? n - start : kPiece,
                        [=](int64_t i, auto tag) UDL_LAMBDA { return term(start + i, tag); });
  }
  return sum;
}

// One block of columns; sums are in T's pack order.
template <class T>
void left_block(const SpectralNorm& args, int64_t first, int64_t width) {
  using A = acc_t<T>;
  const A* u = static_cast<const A*>(args.u);
  UDL_LINES A total[kSpectralColumns] = {}, piece[kSpectralColumns];
  A *total_at = total, *piece_at = piece;
  for (int64_t start = 0; start < args.rows; start += kRowPiece) {
    const int64_t end = start + kRowPiece < args.rows ? start + kRowPiece : args.rows;
    std::memset(piece, 0, sizeof(piece));
    for (int64_t r = start; r < end; ++r) {
      const T* row = args.matrix.row<T>(r) + first;
      const T* ahead = args.matrix.row<T>(r + 4 < args.rows ? r + 4 : r) + first;
      const A factor = u[r];
      for_packs<T>(width, [=](int64_t i, auto tag) UDL_LAMBDA {
        prefetch_pack(ahead + i);
        store_ordered<T>(piece_at + i,
                         load_ordered<T>(piece_at + i) + load_pack(row + i, tag) * factor);
      });
    }
    for (int64_t i = 0; i < kSpectralColumns; i += kPack<T>) {
      store_ordered<T>(total_at + i, load_ordered<T>(total_at + i) + load_ordered<T>(piece_at + i));
    }
  }
  from_pack_order<T>(total, static_cast<A*>(args.out) + first, width);
}

template <class T>
void scale_rows(const SpectralNorm& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A inverse = static_cast<A>(args.inverse_sigma);
  const bool backward = args.dy.data != nullptr;
  const PackOrder<T> ordered(backward ? args.v : nullptr, args.n);
  const A* v = ordered.data();
  for (int64_t r = begin; r < end; ++r) {
    T* out = static_cast<T*>(args.out) + r * args.n;
    if (!backward) {
      const T* row = args.matrix.row<T>(r);
      for_packs<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
        store_pack(out + i, load_pack(row + i, tag) * inverse, tag);
      });
      continue;
    }
    const T* dy = args.dy.row<T>(r);
    const A factor = static_cast<const A*>(args.u)[r] * static_cast<A>(args.dot);
    for_packs<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> along = load_ordered<T>(v + i) * factor;
      store_pack(out + i, (load_pack(dy + i, tag) - along) * inverse, tag);
    });
  }
}

}  // namespace

void spectral_norm_times(const SpectralNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const PackOrder<T> ordered(args.v, args.n);
    const A* v = ordered.data();
    for (int64_t r = begin; r < end; ++r) {
      const T* row = args.matrix.row<T>(r);
      static_cast<A*>(args.out)[r] = sum_row<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
        return load_pack(row + i, tag) * load_ordered<T>(v + i);
      });
    }
  });
}

void spectral_norm_times_left(const SpectralNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kSpectralColumns, rest = args.n - first;
      left_block<decltype(type)>(args, first, rest < kSpectralColumns ? rest : kSpectralColumns);
    }
  });
}

void spectral_norm_dots(const SpectralNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = begin; r < end; ++r) {
      const T *row = args.matrix.row<T>(r), *dy = args.dy.row<T>(r);
      static_cast<acc_t<T>*>(args.out)[r] =
          sum_row<T>(args.n, [=](int64_t i, auto tag) UDL_LAMBDA {
            return load_pack(row + i, tag) * load_pack(dy + i, tag);
          });
    }
  });
}

void spectral_norm_scale(const SpectralNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { scale_rows<decltype(type)>(args, begin, end); });
}

}  // namespace udl::UDL_ISA
