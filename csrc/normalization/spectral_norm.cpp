#include "normalization/spectral_norm.h"

#include <cmath>
#include <tuple>

#include "normalization/row_norm_op.h"

namespace udl {
namespace {

// A vector of the accumulation type, as a tensor.
struct Vector {
  Vector(int64_t n, Dtype dtype)
      : acc(dtype), tensor(empty({n}, dtype)), values(tensor.mutable_data_ptr()) {}
  double at(int64_t i) const {
    return acc == Dtype::f64 ? static_cast<const double*>(values)[i]
                             : static_cast<double>(static_cast<const float*>(values)[i]);
  }
  void set(int64_t i, double value) {
    if (acc == Dtype::f64) {
      static_cast<double*>(values)[i] = value;
    } else {
      static_cast<float*>(values)[i] = static_cast<float>(value);
    }
  }
  void copy(const Tensor& from) {
    const AccVector source(from, acc);
    UDL_CALL(convert)(acc, source.data(), acc, values, from.numel(), 0.0);
  }
  Dtype acc;
  Tensor tensor;
  void* values;
};

// Divides by the norm, at least eps; a sum in the order of the elements, in double precision.
void normalise(Vector& vector, double eps) {
  const int64_t n = vector.tensor.numel();
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += vector.at(i) * vector.at(i);
  const double norm = std::sqrt(squares);
  const double divisor = norm < eps ? eps : norm;
  for (int64_t i = 0; i < n; ++i) vector.set(i, vector.at(i) / divisor);
}

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (int64_t i = 0; i < a.tensor.numel(); ++i) sum += a.at(i) * b.at(i);
  return sum;
}

void times(SpectralNorm args, Vector& v, Vector& out) {
  args.v = v.values;
  args.out = out.values;
  parallel_units(args.rows, args.n, [&](int64_t begin, int64_t end) {
    UDL_CALL(spectral_norm_times)(args, begin, end);
  });
}

void times_left(SpectralNorm args, Vector& u, Vector& out) {
  args.u = u.values;
  args.out = out.values;
  parallel_units((args.n + kSpectralColumns - 1) / kSpectralColumns, args.rows * kSpectralColumns,
                 [&](int64_t begin, int64_t end) {
                   UDL_CALL(spectral_norm_times_left)(args, begin, end);
                 });
}

// The power iteration. It starts from u (v, u, v, u ...) or, without one, from v (u, v, u, v ...), and
// returns sigma.
double iterate(const SpectralNorm& args, bool from_u, bool have_v, int64_t iterations, double eps,
               Vector& u, Vector& v) {
  Vector column(args.rows, u.acc), row(args.n, u.acc);
  for (int64_t i = 0; i < iterations; ++i) {
    if (from_u) {
      times_left(args, u, row);
      v.copy(row.tensor);
      normalise(v, eps);
    }
    times(args, v, column);
    u.copy(column.tensor);
    normalise(u, eps);
    if (from_u) continue;
    times_left(args, u, row);
    v.copy(row.tensor);
    normalise(v, eps);
  }
  if (iterations > 0) return from_u ? dot(u, column) : dot(v, row);
  if (!have_v) {
    times_left(args, u, row);
    v.copy(row.tensor);
    normalise(v, eps);
    return dot(v, row);
  }
  times(args, v, column);
  return dot(u, column);
}

SpectralNorm view_matrix(const Tensor& weight, std::optional<Tensor>& owner) {
  SpectralNorm args;
  args.dtype = dtype_of(weight);
  args.rows = weight.size(0);
  args.n = weight.numel() / args.rows;
  args.matrix = rows_of(weight, args.n, owner);
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spectral_norm_fwd(const Tensor& weight,
                                                             const std::optional<Tensor>& u,
                                                             const std::optional<Tensor>& v,
                                                             int64_t iterations, double eps) {
  std::optional<Tensor> owner;
  SpectralNorm args = view_matrix(weight, owner);
  const Dtype acc = acc_dtype(args.dtype);
  Vector new_u(args.rows, acc), new_v(args.n, acc), sigma(1, acc);
  if (u.has_value()) new_u.copy(*u);
  if (v.has_value()) new_v.copy(*v);
  sigma.set(0, iterate(args, u.has_value(), v.has_value(), iterations, eps, new_u, new_v));
  Tensor w = empty_contiguous_like(weight);
  args.inverse_sigma = 1 / sigma.at(0);
  args.out = w.mutable_data_ptr();
  parallel_units(args.rows, args.n, [&](int64_t begin, int64_t end) {
    UDL_CALL(spectral_norm_scale)(args, begin, end);
  });
  return {std::move(w), std::move(new_u.tensor), std::move(new_v.tensor), std::move(sigma.tensor)};
}

Tensor spectral_norm_bwd(const Tensor& dy, const Tensor& weight, const Tensor& u, const Tensor& v,
                         const Tensor& sigma) {
  std::optional<Tensor> owner, dy_owner;
  SpectralNorm args = view_matrix(weight, owner);
  args.dy = rows_of(dy, args.n, dy_owner);
  const Dtype acc = acc_dtype(args.dtype);
  Vector dots(args.rows, acc), scale(1, acc);
  scale.copy(sigma);
  args.inverse_sigma = 1 / scale.at(0);
  args.out = dots.values;
  parallel_units(args.rows, args.n, [&](int64_t begin, int64_t end) {
    UDL_CALL(spectral_norm_dots)(args, begin, end);
  });
  for (int64_t r = 0; r < args.rows; ++r) args.dot += dots.at(r);
  args.dot *= args.inverse_sigma;
  const AccVector u_acc(u, acc), v_acc(v, acc);
  args.u = u_acc.data();
  args.v = v_acc.data();
  Tensor dw = empty_contiguous_like(weight);
  args.out = dw.mutable_data_ptr();
  parallel_units(args.rows, args.n, [&](int64_t begin, int64_t end) {
    UDL_CALL(spectral_norm_scale)(args, begin, end);
  });
  return dw;
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("spectral_norm_fwd", TORCH_BOX(&udl::spectral_norm_fwd));
  m.impl("spectral_norm_bwd", TORCH_BOX(&udl::spectral_norm_bwd));
}
