#include "normalization/weight_norm.h"

#include <tuple>

#include "normalization/row_norm_op.h"

namespace udl {
namespace {

std::tuple<Tensor, Tensor> weight_norm_fwd(const Tensor& v, const Tensor& g) {
  const Dtype acc = acc_dtype(dtype_of(v));
  const AccVector g_acc(g, acc);
  const int64_t rows = v.size(0);
  std::optional<Tensor> owner;
  Tensor w = empty_contiguous_like(v), norm = empty({rows}, acc);
  WeightNorm args;
  args.dtype = dtype_of(v);
  args.n = v.numel() / rows;
  args.v = rows_of(v, args.n, owner);
  args.g = g_acc.data();
  args.norm = norm.mutable_data_ptr();
  args.out = w.mutable_data_ptr();
  parallel_units(rows, args.n, [&](int64_t begin, int64_t end) {
    UDL_CALL(weight_norm)(args, begin, end);
  });
  return {std::move(w), std::move(norm)};
}

std::tuple<Tensor, Tensor> weight_norm_bwd(const Tensor& dy, const Tensor& v, const Tensor& g,
                                           const Tensor& norm, bool need_dv) {
  const Dtype acc = acc_dtype(dtype_of(v));
  const AccVector g_acc(g, acc);
  const int64_t rows = v.size(0);
  std::optional<Tensor> v_owner, dy_owner, dv;
  Tensor dg_acc = empty({rows}, acc), dg = empty_contiguous_like(g);
  WeightNorm args;
  args.dtype = dtype_of(v);
  args.n = v.numel() / rows;
  args.v = rows_of(v, args.n, v_owner);
  args.dy = rows_of(dy, args.n, dy_owner);
  args.g = g_acc.data();
  args.norm = const_cast<void*>(norm.const_data_ptr());  // only read with dy
  args.dg = dg_acc.mutable_data_ptr();
  if (need_dv) {
    dv = empty_contiguous_like(v);
    args.out = dv->mutable_data_ptr();
  }
  parallel_units(rows, args.n, [&](int64_t begin, int64_t end) {
    UDL_CALL(weight_norm)(args, begin, end);
  });
  UDL_CALL(sum_partials)
  (acc, dg_acc.const_data_ptr(), 1, rows, dtype_of(g), dg.mutable_data_ptr(), 0, rows);
  return {or_empty(dv), std::move(dg)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("weight_norm_fwd", TORCH_BOX(&udl::weight_norm_fwd));
  m.impl("weight_norm_bwd", TORCH_BOX(&udl::weight_norm_bwd));
}
