#include "normalization/layer_norm.h"

#include <tuple>

#include "normalization/row_norm_op.h"

namespace udl {
namespace {

// The statistics of all rows: means, then inverse deviations.
struct Statistics {
  explicit Statistics(const Tensor& stats, int64_t rows, Dtype acc)
      : mean(stats.const_data_ptr()),
        rstd(static_cast<const char*>(mean) + rows * element_size(acc)) {}
  const void* mean;
  const void* rstd;
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& residual,
                                   const std::optional<Tensor>& weight,
                                   const std::optional<Tensor>& bias, int64_t n, double eps,
                                   double dropout_p, const std::optional<Tensor>& seed,
                                   std::optional<Tensor>& sum) {
  const Dtype acc = acc_dtype(dtype_of(x));
  const AccVector weight_acc(weight, acc), bias_acc(bias, acc);
  const int64_t rows = x.numel() / n;
  Tensor stats = empty({2, rows}, acc);
  RowNormForward args;
  args.n = n;
  args.eps = eps;
  args.weight = weight_acc.data();
  args.bias = bias_acc.data();
  args.mean = stats.mutable_data_ptr();
  args.rstd = static_cast<char*>(args.mean) + rows * element_size(acc);
  args.dropout = make_dropout(dropout_p, seed);
  return {run_forward(UDL_CALL(layer_norm_forward), args, x, residual, sum), std::move(stats)};
}

RowNormGradients gradients(const Tensor& dy, const std::optional<Tensor>& ds, const Tensor& x,
                           const std::optional<Tensor>& weight, const Tensor& stats, int64_t n,
                           double dropout_p, const std::optional<Tensor>& seed,
                           const RowNormWanted& wanted) {
  const Dtype acc = acc_dtype(dtype_of(x));
  const AccVector weight_acc(weight, acc);
  const Statistics statistics(stats, x.numel() / n, acc);
  RowNormBackward args;
  args.n = n;
  args.weight = weight_acc.data();
  args.mean = statistics.mean;
  args.rstd = statistics.rstd;
  args.dropout = make_dropout(dropout_p, seed);
  return run_backward(UDL_CALL(layer_norm_backward), args, dy, x, ds, wanted);
}

RowNormWanted wanted_gradients(bool dx, bool dweight, bool dbias,
                               const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias) {
  return {dx, dweight && weight.has_value() ? &*weight : nullptr,
          dbias && bias.has_value() ? &*bias : nullptr};
}

std::tuple<Tensor, Tensor> layer_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& bias, int64_t n,
                                          double eps) {
  std::optional<Tensor> sum;
  return forward(x, std::nullopt, weight, bias, n, eps, 0.0, std::nullopt, sum);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const Tensor& stats, int64_t n, bool need_dx,
                                                  bool need_dweight, bool need_dbias) {
  RowNormGradients out =
      gradients(dy, std::nullopt, x, weight, stats, n, 0.0, std::nullopt,
                wanted_gradients(need_dx, need_dweight, need_dbias, weight, bias));
  return {or_empty(out.dx), or_empty(out.dweight), or_empty(out.dbias)};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_fwd(
    const Tensor& x, const Tensor& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, int64_t n, double eps, double dropout_p,
    const std::optional<Tensor>& seed) {
  std::optional<Tensor> sum;
  auto [y, stats] = forward(x, residual, weight, bias, n, eps, dropout_p, seed, sum);
  return {std::move(y), std::move(*sum), std::move(stats)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const Tensor& dy, const std::optional<Tensor>& ds, const Tensor& sum,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& stats,
    int64_t n, double dropout_p, const std::optional<Tensor>& seed, bool need_dweight,
    bool need_dbias) {
  RowNormGradients out = gradients(dy, ds, sum, weight, stats, n, dropout_p, seed,
                                   wanted_gradients(true, need_dweight, need_dbias, weight, bias));
  return {or_empty(out.dx), or_empty(out.dx_dropped), or_empty(out.dweight),
          or_empty(out.dbias)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&udl::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&udl::layer_norm_bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&udl::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&udl::add_layer_norm_bwd));
}
