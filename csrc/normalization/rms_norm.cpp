#include "normalization/rms_norm.h"

#include <tuple>

#include "normalization/row_norm_op.h"

namespace udl {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& residual,
                                   const std::optional<Tensor>& weight, int64_t n, double eps,
                                   double weight_offset, bool cast_before_weight, double dropout_p,
                                   const std::optional<Tensor>& seed, std::optional<Tensor>& sum) {
  const Dtype acc = acc_dtype(dtype_of(x));
  const AccVector weight_acc(weight, acc, weight_offset);
  Tensor rstd = empty({x.numel() / n}, acc);
  RowNormForward args;
  args.n = n;
  args.eps = eps;
  args.cast_before_weight = cast_before_weight;
  args.weight = weight_acc.data();
  args.rstd = rstd.mutable_data_ptr();
  args.dropout = make_dropout(dropout_p, seed);
  return {run_forward(UDL_CALL(rms_norm_forward), args, x, residual, sum), std::move(rstd)};
}

RowNormGradients gradients(const Tensor& dy, const std::optional<Tensor>& ds, const Tensor& x,
                           const std::optional<Tensor>& weight, const Tensor& rstd, int64_t n,
                           double weight_offset, double dropout_p,
                           const std::optional<Tensor>& seed, bool need_dx, bool need_dweight) {
  const AccVector weight_acc(weight, acc_dtype(dtype_of(x)), weight_offset);
  RowNormBackward args;
  args.n = n;
  args.weight = weight_acc.data();
  args.rstd = rstd.const_data_ptr();
  args.dropout = make_dropout(dropout_p, seed);
  RowNormWanted wanted;
  wanted.dx = need_dx;
  wanted.dweight = need_dweight && weight.has_value() ? &*weight : nullptr;
  return run_backward(UDL_CALL(rms_norm_backward), args, dy, x, ds, wanted);
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                                        int64_t n, double eps, double weight_offset,
                                        bool cast_before_weight) {
  std::optional<Tensor> sum;
  return forward(x, std::nullopt, weight, n, eps, weight_offset, cast_before_weight, 0.0,
                 std::nullopt, sum);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x,
                                        const std::optional<Tensor>& weight, const Tensor& rstd,
                                        int64_t n, double weight_offset, bool need_dx,
                                        bool need_dweight) {
  RowNormGradients out = gradients(dy, std::nullopt, x, weight, rstd, n, weight_offset, 0.0,
                                   std::nullopt, need_dx, need_dweight);
  return {or_empty(out.dx), or_empty(out.dweight)};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x, const Tensor& residual,
                                                    const std::optional<Tensor>& weight, int64_t n,
                                                    double eps, double weight_offset,
                                                    bool cast_before_weight, double dropout_p,
                                                    const std::optional<Tensor>& seed) {
  std::optional<Tensor> sum;
  auto [y, rstd] = forward(x, residual, weight, n, eps, weight_offset, cast_before_weight,
                           dropout_p, seed, sum);
  return {std::move(y), std::move(*sum), std::move(rstd)};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_bwd(
    const Tensor& dy, const std::optional<Tensor>& ds, const Tensor& sum,
    const std::optional<Tensor>& weight, const Tensor& rstd, int64_t n, double weight_offset,
    double dropout_p, const std::optional<Tensor>& seed, bool need_dweight) {
  RowNormGradients out = gradients(dy, ds, sum, weight, rstd, n, weight_offset, dropout_p, seed,
                                   true, need_dweight);
  return {or_empty(out.dx), or_empty(out.dx_dropped), or_empty(out.dweight)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&udl::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&udl::rms_norm_bwd));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&udl::add_rms_norm_fwd));
  m.impl("add_rms_norm_bwd", TORCH_BOX(&udl::add_rms_norm_bwd));
}
