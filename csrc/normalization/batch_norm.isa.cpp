// The arithmetic per channel, in double precision: chunks are merged by Chan's formula.
#include "normalization/batch_norm.h"

#include "normalization/batch_norm.isa.h"

namespace udl::UDL_ISA {
namespace {

constexpr int64_t kBlock = 32;  // channels merged side by side

template <class A>
UDL_INLINE A* values(void* array) {
  return static_cast<A*>(array);
}

// Where the partial sums of `kinds` kinds of part k of a channel stand: chunk by chunk, and in each the
// folds. The kinds are columns_wide() apart.
template <class A>
UDL_INLINE const A* part_of(const BatchNorm& args, int64_t kinds, int64_t k, int64_t c) {
  return static_cast<const A*>(args.partials) + k / args.fold * kinds * args.columns_wide() +
         k % args.fold * args.channels + c;
}
UDL_INLINE int64_t part_count(const BatchNorm& args, int64_t k) {
  return chunk_of(args, k / args.fold).count();
}

// Mean and squares of channels [begin, end), from three kinds of partial sums: the rounded mean of a
// part, and the sums of the deviations from it and of their squares.
template <class A>
void merge_moments(const BatchNorm& args, int64_t begin, int64_t end) {
  const int64_t width = args.columns_wide(), parts = args.chunks * args.fold;
  for (int64_t c = begin; c < end; c += kBlock) {
    const int64_t n = end - c < kBlock ? end - c : kBlock;
    double mean[kBlock] = {}, squares[kBlock] = {};
    for (int64_t k = 0; k < parts; ++k) {
      const double count = static_cast<double>(part_count(args, k));
      const A* rounded = part_of<A>(args, 3, k, c);
      const A* sum = rounded + width;
      for (int64_t j = 0; j < n; ++j) {
        const double total = count * static_cast<double>(rounded[j]);
        // An infinite mean has no deviations.
        mean[j] += rounded[j] - rounded[j] == 0 ? total + static_cast<double>(sum[j]) : total;
      }
    }
    for (int64_t j = 0; j < n; ++j) mean[j] /= args.count;
    for (int64_t k = 0; k < parts; ++k) {
      const double count = static_cast<double>(part_count(args, k));
      const A* rounded = part_of<A>(args, 3, k, c);
      const A* sum = rounded + width;
      const A* square = sum + width;
      for (int64_t j = 0; j < n; ++j) {
        const double s = static_cast<double>(sum[j]);
        const double between = (static_cast<double>(rounded[j]) - mean[j]) + s / count;
        squares[j] += (static_cast<double>(square[j]) - s * s / count) + count * between * between;
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      args.batch_mean[c + j] = mean[j];
      args.batch_squares[c + j] = squares[j] < 0 ? 0 : squares[j];
    }
  }
}

// The coefficients of a channel whose mean and inverse deviation are known.
template <class A>
UDL_INLINE void set_channel(const BatchNorm& args, int64_t c, double mean, double rstd) {
  values<A>(args.mean)[c] = static_cast<A>(mean);
  values<A>(args.remainder)[c] = static_cast<A>(mean - static_cast<double>(values<A>(args.mean)[c]));
  values<A>(args.rstd)[c] = static_cast<A>(rstd);
}

// alpha and shift, the same in forward and backward.
template <class A>
UDL_INLINE void set_affine(const BatchNorm& args, int64_t c) {
  const A alpha = value_of<A>(args.weight, c, 1) * values<A>(args.rstd)[c];
  const double moved = static_cast<double>(values<A>(args.remainder)[c]) * static_cast<double>(alpha);
  values<A>(args.alpha)[c] = alpha;
  values<A>(args.shift)[c] =
      static_cast<A>(static_cast<double>(value_of<A>(args.bias, c, 0)) - moved);
}

// use(value) for every element of a channel, until it returns false.
template <class T, class Use>
UDL_INLINE void for_elements(const BatchNorm& args, int64_t c, Use use) {
  for (int64_t r = 0; r < args.rows; ++r) {
    for (int64_t k = 0; k < args.fold; ++k) {
      const T* x = args.x.at<T>(c + k * args.channels, r);
      for (int64_t i = 0; i < args.length; ++i) {
        if (!use(static_cast<double>(load_one(x + i)))) return;
      }
    }
  }
}

// A channel of finite values whose squares overflow: everything is computed on x / largest. Returns
// the inverse deviation, or NaN where the channel holds one or an infinity.
template <class T>
__attribute__((noinline)) double scaled_moments(const BatchNorm& args, int64_t c) {
  double largest = 0;
  for_elements<T>(args, c, [&](double x) UDL_LAMBDA {
    const double value = std::fabs(x);
    if (!(value <= largest)) largest = value;
    return value - value == 0;
  });
  if (!(largest - largest == 0)) return NAN;
  double mean = 0, squares = 0;
  for (int pass = 0; pass < 2; ++pass) {
    double sum = 0;
    for_elements<T>(args, c, [&](double x) UDL_LAMBDA {
      const double d = x / largest - mean;
      sum += pass == 0 ? d : d * d;
      return true;
    });
    (pass == 0 ? mean : squares) = pass == 0 ? sum / args.count : sum;
  }
  args.batch_mean[c] = mean * largest;
  args.batch_squares[c] = squares * largest * largest;
  return 1 / std::sqrt(squares / args.count + args.eps / largest / largest) / largest;
}

template <class T>
void finish_moments(const BatchNorm& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  merge_moments<A>(args, begin, end);
  for (int64_t c = begin; c < end; ++c) {
    const double squares = args.batch_squares[c];
    double rstd = 1 / std::sqrt(squares / args.count + args.eps);
    if (!(squares - squares == 0)) rstd = scaled_moments<T>(args, c);
    set_channel<A>(args, c, args.batch_mean[c], rstd);
    set_affine<A>(args, c);
  }
}

template <class A>
void gradient_coefficients(const BatchNorm& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const double rstd = static_cast<double>(values<A>(args.rstd)[c]);
    const double alpha = static_cast<double>(values<A>(args.alpha)[c]);
    const double remainder = static_cast<double>(values<A>(args.remainder)[c]);
    const double g_mean = args.g_sum[c] / args.count;
    const double h_mean = args.h_sum[c] / args.count * rstd;
    values<A>(args.h_factor)[c] = static_cast<A>(-h_mean);
    values<A>(args.offset)[c] = static_cast<A>((remainder * rstd * h_mean - g_mean) * alpha);
  }
}

// The sums of channels [begin, end), from two kinds of partial sums.
template <class A>
void merge_sums(const BatchNorm& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += kBlock) {
    const int64_t n = end - c < kBlock ? end - c : kBlock;
    double g[kBlock] = {}, h[kBlock] = {};
    for (int64_t k = 0; k < args.chunks * args.fold; ++k) {
      const A* g_part = part_of<A>(args, 2, k, c);
      const A* h_part = g_part + args.columns_wide();
      for (int64_t j = 0; j < n; ++j) {
        g[j] += static_cast<double>(g_part[j]);
        h[j] += static_cast<double>(h_part[j]);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      args.g_sum[c + j] = g[j];
      args.h_sum[c + j] = h[j] - static_cast<double>(values<A>(args.remainder)[c + j]) * g[j];
    }
  }
}

}  // namespace

void batch_norm_finish_moments(const BatchNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { finish_moments<decltype(type)>(args, begin, end); });
}

void batch_norm_finish_sums(const BatchNorm& args, int64_t begin, int64_t end) {
  with_type(acc_dtype(args.dtype), [&](auto type) {
    using A = acc_t<decltype(type)>;
    merge_sums<A>(args, begin, end);
    if (!args.frozen) gradient_coefficients<A>(args, begin, end);
  });
}

void batch_norm_coefficients(const BatchNorm& args, int64_t begin, int64_t end) {
  with_type(acc_dtype(args.dtype), [&](auto type) {
    using A = acc_t<decltype(type)>;
    for (int64_t c = begin; c < end; ++c) {
      if (args.batch_mean != nullptr) {
        set_channel<A>(args, c, args.batch_mean[c], 1 / std::sqrt(args.batch_squares[c] + args.eps));
      }
      set_affine<A>(args, c);
    }
  });
}

void batch_norm_gradient_coefficients(const BatchNorm& args, int64_t begin, int64_t end) {
  with_type(acc_dtype(args.dtype), [&](auto type) {
    gradient_coefficients<acc_t<decltype(type)>>(args, begin, end);
  });
}

}  // namespace udl::UDL_ISA
