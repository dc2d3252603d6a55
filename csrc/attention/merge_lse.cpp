#include "attention/merge_lse.h"

#include <tuple>

#include "attention/heads_op.h"

namespace udl {
namespace {

MergeLse arguments(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                   const Tensor& lse_b, bool heads_last) {
  MergeLse args;
  args.dtype = dtype_of(out_a);
  args.heads_last = heads_last;
  args.batches = out_a.size(0);
  args.heads = out_a.size(1);
  args.rows = out_a.size(2);
  args.width = out_a.size(3);
  args.a = heads_of(out_a);
  args.b = heads_of(out_b);
  args.lse_a = heads_of(lse_a);
  args.lse_b = heads_of(lse_b);
  return args;
}

template <class Kernel>
void run(const MergeLse& args, Kernel kernel) {
  parallel_units(args.batches * args.heads * args.rows, args.width,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

std::tuple<Tensor, Tensor> merge_lse_fwd(const Tensor& out_a, const Tensor& lse_a,
                                         const Tensor& out_b, const Tensor& lse_b,
                                         bool heads_last) {
  MergeLse args = arguments(out_a, lse_a, out_b, lse_b, heads_last);
  Tensor out = empty_heads(out_a, args.width, heads_last);
  Tensor lse = empty_contiguous_like(lse_a);
  args.out = heads_of(out);
  args.lse = heads_of(lse);
  run(args, UDL_CALL(merge_lse_forward));
  return {std::move(out), std::move(lse)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_lse_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& out_a,
    const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b, bool heads_last, bool need_out,
    bool need_lse) {
  MergeLse args = arguments(out_a, lse_a, out_b, lse_b, heads_last);
  args.dout = heads_of(dout);
  args.dlse = heads_of(dlse);
  const auto gradient = [&] {
    return need_out ? empty_heads(out_a, args.width, heads_last) : empty({0}, Dtype::f32);
  };
  const auto lse_gradient = [&] {
    return need_lse ? empty_contiguous_like(lse_a) : empty({0}, Dtype::f32);
  };
  Tensor da = gradient(), db = gradient(), dlse_a = lse_gradient(), dlse_b = lse_gradient();
  if (need_out) {
    args.da = heads_of(da);
    args.db = heads_of(db);
  }
  if (need_lse) {
    args.dlse_a = heads_of(dlse_a);
    args.dlse_b = heads_of(dlse_b);
  }
  run(args, UDL_CALL(merge_lse_backward));
  return {std::move(da), std::move(dlse_a), std::move(db), std::move(dlse_b)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("merge_lse_fwd", TORCH_BOX(&udl::merge_lse_fwd));
  m.impl("merge_lse_bwd", TORCH_BOX(&udl::merge_lse_bwd));
}
