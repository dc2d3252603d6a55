#include "normalization/pixel_norm.h"

#include <tuple>

#include "normalization/channels_op.h"
#include "normalization/rms_norm.h"
#include "normalization/row_norm_op.h"

namespace udl {
namespace {

void run_planes(const ChannelView& x, const ChannelView& dy, double eps, Tensor& out) {
  PixelNorm args;
  args.dtype = dtype_of(out);
  args.eps = eps;
  args.x = x;
  args.dy = dy;
  args.out = out.mutable_data_ptr();
  parallel_units(x.batch * args.units_per_sample(),
                 x.channels * std::min(x.positions, PixelNorm::kBlock),
                 [&](int64_t begin, int64_t end) {
                   UDL_CALL(pixel_norm_planes)(args, begin, end);
                 });
}

std::tuple<Tensor, Tensor> pixel_norm_fwd(const Tensor& x, double eps) {
  std::optional<Tensor> owner;
  const bool channels_last = is_channels_last(x);
  const ChannelView view = view_channels(x, channels_last, owner);
  const Dtype acc = acc_dtype(dtype_of(x));
  const int64_t count = view.last ? view.batch * view.positions : 0;
  Tensor y = empty_channels(x, channels_last), rstd = empty({count}, acc);
  if (!view.last) {
    run_planes(view, ChannelView{}, eps, y);
    return {std::move(y), std::move(rstd)};
  }
  RowNormForward args;
  args.dtype = dtype_of(x);
  args.n = view.channels;
  args.eps = eps;
  args.x = line_rows(view);
  args.y = y.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  parallel_units(count, args.n, [&](int64_t begin, int64_t end) {
    UDL_CALL(rms_norm_forward)(args, begin, end);
  });
  return {std::move(y), std::move(rstd)};
}

Tensor pixel_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& rstd, double eps) {
  std::optional<Tensor> x_owner, dy_owner;
  const bool channels_last = is_channels_last(x);
  const ChannelView view = view_channels(x, channels_last, x_owner);
  const ChannelView dy_view = view_channels(dy, channels_last, dy_owner);
  Tensor dx = empty_channels(x, channels_last);
  if (!view.last) {
    run_planes(view, dy_view, eps, dx);
    return dx;
  }
  RowNormBackward args;
  args.dtype = dtype_of(x);
  args.n = view.channels;
  args.rows = view.batch * view.positions;
  args.chunk_rows = row_norm_chunk_rows(args.n);
  args.x = line_rows(view);
  args.dy = line_rows(dy_view);
  args.rstd = rstd.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  parallel_units((args.rows + args.chunk_rows - 1) / args.chunk_rows, args.n * args.chunk_rows,
                 [&](int64_t begin, int64_t end) {
                   UDL_CALL(rms_norm_backward)(args, begin, end);
                 });
  return dx;
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("pixel_norm_fwd", TORCH_BOX(&udl::pixel_norm_fwd));
  m.impl("pixel_norm_bwd", TORCH_BOX(&udl::pixel_norm_bwd));
}
