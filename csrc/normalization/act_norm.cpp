#include "normalization/act_norm.h"

#include <cmath>
#include <tuple>

#include "normalization/channels_op.h"
#include "normalization/row_norm.h"
#include "normalization/row_norm_op.h"

namespace udl {
namespace {

// Planes smaller than this are not walked one by one: a whole sample is one row then, with the
// parameters repeated for every position.
constexpr int64_t kSmallPlane = 256;

template <class Value>
std::vector<char> repeated(int64_t channels, int64_t times, Dtype acc, Value value) {
  std::vector<char> out(static_cast<size_t>(channels * times * element_size(acc)));
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < times; ++t) {
      if (acc == Dtype::f64) {
        reinterpret_cast<double*>(out.data())[c * times + t] = value(c);
      } else {
        reinterpret_cast<float*>(out.data())[c * times + t] = static_cast<float>(value(c));
      }
    }
  }
  return out;
}

double element(const std::vector<char>& values, Dtype acc, int64_t i) {
  return acc == Dtype::f64 ? reinterpret_cast<const double*>(values.data())[i]
                           : static_cast<double>(reinterpret_cast<const float*>(values.data())[i]);
}

std::vector<char> in_double(const Tensor& tensor) {
  std::optional<Tensor> owner;
  if (!tensor.is_contiguous()) owner = torch::stable::contiguous(tensor);
  const Tensor& source = owner.has_value() ? *owner : tensor;
  std::vector<char> wide(static_cast<size_t>(tensor.numel() * 8));
  const Dtype dtype = dtype_of(tensor);
  if (dtype == Dtype::f64) {
    UDL_CALL(convert)(dtype, source.const_data_ptr(), dtype, wide.data(), tensor.numel(), 0.0);
    return wide;
  }
  std::vector<char> narrow(static_cast<size_t>(tensor.numel() * 4));
  UDL_CALL(convert)(dtype, source.const_data_ptr(), Dtype::f32, narrow.data(), tensor.numel(), 0.0);
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    reinterpret_cast<double*>(wide.data())[i] = element(narrow, Dtype::f32, i);
  }
  return wide;
}

// The lines of a view, or whole samples as rows.
Rows act_norm_rows(ChannelView view, const Tensor& tensor, bool samples,
                   std::optional<Tensor>& owner) {
  if (!samples) return line_rows(view);
  if (view.step != view.positions && view.channels != 1) {
    owner = torch::stable::contiguous(tensor);
    view = view_channels(*owner, false);
  }
  Rows rows;
  rows.data = view.data;
  rows.ndim = 1;
  rows.size[0] = view.batch;
  rows.stride[0] = view.batch_stride;
  return rows;
}

// How a tensor is cut into rows, and the parameters as these rows need them.
struct Plan {
  Plan(const Tensor& x, const Tensor& log_scale, const Tensor& bias)
      : channels_last(is_channels_last(x)),
        acc(acc_dtype(dtype_of(x))),
        view(view_channels(x, channels_last, owner)) {
    log_scales = in_double(log_scale);
    const std::vector<char> biases = in_double(bias);
    const int64_t channels = view.channels;
    args.dtype = dtype_of(x);
    args.channels = channels;
    const bool merged = !view.last && view.positions < kSmallPlane;
    args.columns = view.last || merged;
    times = merged ? view.positions : 1;
    scale = repeated(channels, times, acc,
                     [&](int64_t c) { return std::exp(element(log_scales, Dtype::f64, c)); });
    shift = repeated(channels, times, acc,
                     [&](int64_t c) { return element(biases, Dtype::f64, c); });
    args.scale = scale.data();
    args.bias = shift.data();
    args.n = args.columns ? channels * times : view.positions;
    args.rows = merged ? view.batch : view.batch * (view.last ? view.positions : channels);
    args.chunk_rows = args.columns ? row_norm_chunk_rows(args.n) : 1;
    args.x = act_norm_rows(view, x, merged, owner);
  }
  void run() const {
    const int64_t chunks = this->chunks();
    parallel_units(chunks, args.n * args.chunk_rows, [&](int64_t begin, int64_t end) {
      UDL_CALL(act_norm)(args, begin, end);
    });
  }
  int64_t chunks() const { return (args.rows + args.chunk_rows - 1) / args.chunk_rows; }

  ActNorm args;
  std::optional<Tensor> owner;
  bool channels_last;
  Dtype acc;
  ChannelView view;
  int64_t times = 1;
  std::vector<char> log_scales, scale, shift;
};

std::tuple<Tensor, Tensor> act_norm_fwd(const Tensor& x, const Tensor& log_scale,
                                        const Tensor& bias) {
  Plan plan(x, log_scale, bias);
  Tensor y = empty_channels(x, plan.channels_last);
  plan.args.out = y.mutable_data_ptr();
  plan.run();
  double sum = 0;
  for (int64_t c = 0; c < plan.view.channels; ++c) sum += element(plan.log_scales, Dtype::f64, c);
  Tensor logdet = empty({plan.view.batch}, plan.acc);
  for (int64_t b = 0; b < plan.view.batch; ++b) {
    const double value = sum * static_cast<double>(plan.view.positions);
    if (plan.acc == Dtype::f64) {
      static_cast<double*>(logdet.mutable_data_ptr())[b] = value;
    } else {
      static_cast<float*>(logdet.mutable_data_ptr())[b] = static_cast<float>(value);
    }
  }
  return {std::move(y), std::move(logdet)};
}

// The sums of all chunks for each channel, plus `more`, as a tensor like `like`.
Tensor channel_sums(const Plan& plan, const std::vector<char>& sums, double more,
                    const Tensor& like) {
  const int64_t channels = plan.view.channels, size = element_size(plan.acc);
  const int64_t width = plan.args.columns ? plan.args.n : channels;
  const int64_t count = static_cast<int64_t>(sums.size()) / (width * size);
  std::vector<char> total(static_cast<size_t>(width * 8)), folded;
  constexpr int64_t kBlock = 64;
  parallel_units((width + kBlock - 1) / kBlock, kBlock * count, [&](int64_t begin, int64_t end) {
    UDL_CALL(sum_partials)
    (plan.acc, sums.data(), count, width, Dtype::f64, total.data(), begin * kBlock,
     std::min(end * kBlock, width));
  });
  folded = repeated(channels, 1, Dtype::f64, [&](int64_t c) {
    double sum = more;
    for (int64_t t = 0; t < plan.times; ++t) sum += element(total, Dtype::f64, c * plan.times + t);
    return sum;
  });
  Tensor out = empty_contiguous_like(like);
  UDL_CALL(sum_partials)
  (Dtype::f64, folded.data(), 1, channels, dtype_of(like), out.mutable_data_ptr(), 0, channels);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> act_norm_bwd(const Tensor& dy, const Tensor& dlogdet,
                                                const Tensor& x, const Tensor& log_scale,
                                                const Tensor& bias, bool need_dx) {
  Plan plan(x, log_scale, bias);
  std::optional<Tensor> dy_owner, dx;
  const ChannelView dy_view = view_channels(dy, plan.channels_last, dy_owner);
  plan.args.dy = act_norm_rows(dy_view, dy, plan.times != 1, dy_owner);
  if (need_dx) {
    dx = empty_channels(x, plan.channels_last);
    plan.args.out = dx->mutable_data_ptr();
  }
  const int64_t lines = plan.args.columns ? plan.args.n : 1;
  std::vector<char> sums(static_cast<size_t>(plan.chunks() * lines * element_size(plan.acc)));
  std::vector<char> products(sums.size());
  plan.args.dy_sums = sums.data();
  plan.args.product_sums = products.data();
  plan.run();
  const std::vector<char> dlogdets = in_double(dlogdet);
  double sum = 0;
  for (int64_t b = 0; b < plan.view.batch; ++b) sum += element(dlogdets, Dtype::f64, b);
  sum *= static_cast<double>(plan.view.positions);
  Tensor dlog_scale = channel_sums(plan, products, sum, log_scale);
  return {or_empty(dx), std::move(dlog_scale), channel_sums(plan, sums, 0.0, bias)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("act_norm_fwd", TORCH_BOX(&udl::act_norm_fwd));
  m.impl("act_norm_bwd", TORCH_BOX(&udl::act_norm_bwd));
}
