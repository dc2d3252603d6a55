#include "attention/merge_lse.h"

#include "vec.h"

namespace udl::UDL_ISA {
namespace {

UDL_INLINE float exp_one(float x) { return __builtin_expf(x); }
UDL_INLINE double exp_one(double x) { return __builtin_exp(x); }
UDL_INLINE float log1p_one(float x) { return __builtin_log1pf(x); }
UDL_INLINE double log1p_one(double x) { return __builtin_log1p(x); }

// The shares of two parts, and which of them holds any keys at all.
template <class A>
struct Shares {
  bool has_a, has_b;
  A a, b, lse;
};

template <class A>
UDL_INLINE Shares<A> shares(A lse_a, A lse_b, bool with_lse) {
  const A nothing = -static_cast<A>(INFINITY);
  Shares<A> found{lse_a != nothing, lse_b != nothing, A(0), A(0), nothing};
  if (found.has_a && found.has_b) {
    const A d = lse_a - lse_b;
    const A e = exp_one(d > 0 ? -d : d);
    const A large = 1 / (1 + e), small = e / (1 + e);
    found.a = d > 0 ? large : small;
    found.b = d > 0 ? small : large;
    if (with_lse) {
      found.lse = lse_a == lse_b ? lse_a + static_cast<A>(0.69314718055994530942)
                                 : (d > 0 ? lse_a : lse_b) + log1p_one(e);
    }
  } else if (found.has_a) {
    found.a = 1;
    found.lse = lse_a;
  } else if (found.has_b) {
    found.b = 1;
    found.lse = lse_b;
  }
  return found;
}

// body(b, h, t) for rows begin to end in the order of memory.
template <class Body>
UDL_INLINE void for_rows(const MergeLse& args, int64_t begin, int64_t end, Body body) {
  const int64_t inner = args.heads_last ? args.heads : args.rows;
  const int64_t outer = args.heads_last ? args.rows : args.heads;
  int64_t j = begin % inner, i = begin / inner % outer, b = begin / inner / outer;
  for (int64_t n = begin; n < end; ++n) {
    body(b, args.heads_last ? j : i, args.heads_last ? i : j);
    if (++j < inner) continue;
    j = 0;
    if (++i < outer) continue;
    i = 0;
    ++b;
  }
}

template <class T>
void scaled(const T* x, acc_t<T> factor, T* out, int64_t n) {
  for_packs<T>(n, [=](int64_t i, auto tag) UDL_LAMBDA {
    store_pack(out + i, load_pack(x + i, tag) * factor, tag);
  });
}

template <class T>
void merge_row(const T* a, const T* b, const Shares<acc_t<T>>& share, T* out, int64_t n) {
  if (share.has_a && share.has_b) {
    for_packs<T>(n, [=](int64_t i, auto tag) UDL_LAMBDA {
      store_pack(out + i, load_pack(a + i, tag) * share.a + load_pack(b + i, tag) * share.b, tag);
    });
  } else if (share.has_a || share.has_b) {
    std::memcpy(out, share.has_a ? a : b, static_cast<size_t>(n) * sizeof(T));
  } else {
    std::memset(out, 0, static_cast<size_t>(n) * sizeof(T));
  }
}

template <class T>
void gradient_row(const MergeLse& args, int64_t b, int64_t h, int64_t t) {
  using A = acc_t<T>;
  const int64_t n = args.width;
  const Shares<A> share = shares(*args.lse_a.at<A>(b, h, t), *args.lse_b.at<A>(b, h, t), false);
  const T* dout = args.dout.at<T>(b, h, t);
  // A part without keys has gradients of zero whatever comes in.
  const auto give = [=](const Heads& to, bool has, A factor) {
    if (to.data == nullptr) return;
    T* out = to.to<T>(b, h, t);
    if (has) {
      scaled(dout, factor, out, n);
    } else {
      std::memset(out, 0, static_cast<size_t>(n) * sizeof(T));
    }
  };
  give(args.da, share.has_a, share.a);
  give(args.db, share.has_b, share.b);
  if (args.dlse_a.data == nullptr) return;
  A turn = 0;  // the derivative to the difference of the logarithms
  if (share.has_a && share.has_b) {
    const T *x = args.a.at<T>(b, h, t), *y = args.b.at<T>(b, h, t);
    turn = sum_packs<T>(n, [=](int64_t i, auto tag) UDL_LAMBDA {
      return load_pack(dout + i, tag) * (load_pack(x + i, tag) - load_pack(y + i, tag));
    }) * share.a * share.b;
  }
  const A dlse = args.dlse.data != nullptr ? *args.dlse.at<A>(b, h, t) : A(0);
  *args.dlse_a.to<A>(b, h, t) = share.has_a ? share.a * dlse + turn : A(0);
  *args.dlse_b.to<A>(b, h, t) = share.has_b ? share.b * dlse - turn : A(0);
}

}  // namespace

void merge_lse_forward(const MergeLse& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    for_rows(args, begin, end, [&](int64_t b, int64_t h, int64_t t) UDL_LAMBDA {
      const Shares<A> share = shares(*args.lse_a.at<A>(b, h, t), *args.lse_b.at<A>(b, h, t), true);
      *args.lse.to<A>(b, h, t) = share.lse;
      merge_row(args.a.at<T>(b, h, t), args.b.at<T>(b, h, t), share, args.out.to<T>(b, h, t),
                args.width);
    });
  });
}

void merge_lse_backward(const MergeLse& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for_rows(args, begin, end, [&](int64_t b, int64_t h, int64_t t) UDL_LAMBDA {
      gradient_row<decltype(type)>(args, b, h, t);
    });
  });
}

}  // namespace udl::UDL_ISA
