#include "normalization/center_rows.h"

#include "vec.h"

namespace udl::UDL_ISA {
namespace {

template <class T>
void center_row(const T* x, T* y, int64_t n) {
  using A = acc_t<T>;
  const A sum = sum_packs<T>(n, [=](int64_t i, auto tag) UDL_LAMBDA {
    return load_pack(x + i, tag);
  });
  const A mean = sum / static_cast<A>(n);
  for_packs<T>(n, [=](int64_t i, auto tag) UDL_LAMBDA {
    store_pack(y + i, load_pack(x + i, tag) - mean, tag);
  });
}

}  // namespace

void center_rows(Dtype dtype, const Rows& x, void* y, int64_t n, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = begin; r < end; ++r) center_row(x.row<T>(r), static_cast<T*>(y) + r * n, n);
  });
}

}  // namespace udl::UDL_ISA
