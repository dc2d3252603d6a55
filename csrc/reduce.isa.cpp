#include "reduce.h"

#include <type_traits>

#include "vec.h"

namespace udl::UDL_ISA {
namespace {

constexpr int64_t kColumns = 64;  // columns summed together

template <class A, class T>
void sum_columns(const A* partials, int64_t count, int64_t width, T* out, int64_t begin,
                 int64_t end) {
  for (int64_t j = begin; j < end; j += kColumns) {
    const int64_t n = end - j < kColumns ? end - j : kColumns;
    double sums[kColumns] = {};
    for (int64_t i = 0; i < count; ++i) {
      const A* row = partials + i * width + j;
      if (n == kColumns) {
        for (int64_t k = 0; k < kColumns; ++k) sums[k] += static_cast<double>(row[k]);
      } else {
        for (int64_t k = 0; k < n; ++k) sums[k] += static_cast<double>(row[k]);
      }
    }
    for (int64_t k = 0; k < n; ++k) store_one(out + j + k, static_cast<acc_t<T>>(sums[k]));
  }
}

}  // namespace

void convert(Dtype from, const void* src, Dtype to, void* dst, int64_t n, double add) {
  with_type(from, [=](auto from_type) {
    with_type(to, [=](auto to_type) {
      const auto* in = static_cast<const decltype(from_type)*>(src);
      auto* out = static_cast<decltype(to_type)*>(dst);
      using A = acc_t<decltype(from_type)>;
      if constexpr (std::is_same_v<A, acc_t<decltype(to_type)>>) {
        int64_t i = 0;
        for (; i + kLanes<A> <= n; i += kLanes<A>) {
          store(out + i, load(in + i, Full{}) + static_cast<A>(add), Full{});
        }
        const Tail tail{static_cast<int>(n - i)};
        store(out + i, load(in + i, tail) + static_cast<A>(add), tail);
      } else {
        for (int64_t i = 0; i < n; ++i) {
          store_one(out + i, static_cast<acc_t<decltype(to_type)>>(load_one(in + i) + add));
        }
      }
    });
  });
}

void sum_partials(Dtype acc, const void* partials, int64_t count, int64_t width, Dtype out_dtype,
                  void* out, int64_t begin, int64_t end) {
  with_type(out_dtype, [=](auto type) {
    using T = decltype(type);
    if (acc == Dtype::f64) {
      sum_columns(static_cast<const double*>(partials), count, width, static_cast<T*>(out), begin,
                  end);
    } else {
      sum_columns(static_cast<const float*>(partials), count, width, static_cast<T*>(out), begin,
                  end);
    }
  });
}

}  // namespace udl::UDL_ISA
