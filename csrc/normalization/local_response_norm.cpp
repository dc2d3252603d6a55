#include "normalization/local_response_norm.h"

#include "normalization/channels_op.h"

namespace udl {
namespace {

Tensor run(const Tensor& x, const Tensor* dy, int64_t size, double alpha, double beta, double k) {
  std::optional<Tensor> x_owner, dy_owner;
  const bool channels_last = is_channels_last(x);
  LocalResponseNorm args;
  args.dtype = dtype_of(x);
  args.x = view_channels(x, channels_last, x_owner);
  if (dy != nullptr) args.dy = view_channels(*dy, channels_last, dy_owner);
  args.before = std::min(size / 2, args.x.channels - 1);  // beyond the tensor lie only zeros
  args.after = std::min((size - 1) / 2, args.x.channels - 1);
  args.scale = alpha / static_cast<double>(size);
  args.beta = beta;
  args.k = k;
  Tensor out = empty_channels(x, channels_last);
  args.out = out.mutable_data_ptr();
  const int64_t positions = std::min(args.unit_positions(), args.x.positions);
  parallel_units(args.x.batch * args.units_per_sample(), positions * args.x.channels,
                 [&](int64_t begin, int64_t end) {
                   UDL_CALL(local_response_norm)(args, begin, end);
                 });
  return out;
}

Tensor local_response_norm_fwd(const Tensor& x, int64_t size, double alpha, double beta, double k) {
  return run(x, nullptr, size, alpha, beta, k);
}

Tensor local_response_norm_bwd(const Tensor& dy, const Tensor& x, int64_t size, double alpha,
                               double beta, double k) {
  return run(x, &dy, size, alpha, beta, k);
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("local_response_norm_fwd", TORCH_BOX(&udl::local_response_norm_fwd));
  m.impl("local_response_norm_bwd", TORCH_BOX(&udl::local_response_norm_bwd));
}
