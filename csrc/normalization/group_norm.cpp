#include "normalization/group_norm.h"

#include <tuple>

#include "tensor.h"

namespace udl {
namespace {

// Where all positions of a tensor [samples, channels, ...] are one stride apart: that stride, else -1.
int64_t position_stride(const Tensor& tensor) {
  int64_t stride = -1, span = 0;
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    if (tensor.size(d) == 1) continue;
    if (stride >= 0 && tensor.stride(d) != span) return -1;
    if (stride < 0) stride = tensor.stride(d);
    span = tensor.stride(d) * tensor.size(d);
  }
  return stride < 0 ? 1 : stride;
}

bool is_planes(const Tensor& tensor) { return position_stride(tensor) == 1; }

bool is_lines(const Tensor& tensor) {
  return (tensor.stride(1) == 1 || tensor.size(1) == 1) && position_stride(tensor) >= 0;
}

Maps maps_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), position_stride(tensor)};
}

Tensor lines_copy(const Tensor& tensor) {
  using torch::headeronly::MemoryFormat;
  if (tensor.dim() < 4) return torch::stable::contiguous(tensor);
  return torch::stable::contiguous(tensor, tensor.dim() == 4 ? MemoryFormat::ChannelsLast
                                                             : MemoryFormat::ChannelsLast3d);
}

// A result: dense, contiguous or channels-last.
Tensor empty_result(const Tensor& x, bool channels_last) {
  if (!channels_last) return empty_contiguous_like(x);
  int64_t strides[kMaxTensorDims];
  int64_t stride = x.size(1);
  strides[1] = 1;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    strides[d] = stride;
    stride *= x.size(d);
  }
  strides[0] = stride;
  return empty_strided(x.sizes().data(), strides, x.dim(), dtype_of(x));
}

// How a call runs: the kernel, and x in the form it takes.
enum class Way { planes, lines, lines_to_planes };

struct Input {
  Way way;
  Tensor x;
};

constexpr int64_t kLeastChunk = 64;  // positions

// Sizes of the problem, and x as the kernel takes it. Turning is left to the kernel where nothing
// else has to be read in the result's layout.
Input prepare(GroupNormSizes& sizes, const Tensor& x, int64_t groups, int64_t act, double slope,
              bool channels_last, bool residual) {
  sizes.dtype = dtype_of(x);
  sizes.samples = x.size(0);
  sizes.channels = x.size(1);
  sizes.groups = groups;
  sizes.group_channels = sizes.channels / groups;
  sizes.positions = x.numel() / (sizes.samples * sizes.channels);
  sizes.act = static_cast<Activation>(act);
  sizes.slope = slope;
  // By the sizes alone, so that the order of the sums is theirs alone too; few enough for a plain
  // float32 sum.
  sizes.chunk_positions =
      std::clamp<int64_t>(65536 / sizes.channels / kLeastChunk * kLeastChunk, kLeastChunk, 256);
  sizes.chunks = (sizes.positions + sizes.chunk_positions - 1) / sizes.chunk_positions;
  if (channels_last || (sizes.positions == 1 && is_lines(x))) {
    return {Way::lines, is_lines(x) ? x : lines_copy(x)};
  }
  const bool side_by_side = sizes.group_channels == 1 || x.stride(1) == sizes.positions;
  if (is_planes(x) && side_by_side) return {Way::planes, x};
  if (is_lines(x) && sizes.act == Activation::identity && !residual) {
    constexpr int64_t kTileChannels = 16;
    sizes.block_groups = (kTileChannels + sizes.group_channels - 1) / sizes.group_channels;
    return {Way::lines_to_planes, x};
  }
  return {Way::planes, torch::stable::contiguous(x)};
}

// A second tensor of x's shape, in a form that the kernel can read beside x.
Tensor beside(Way way, const Tensor& tensor) {
  if (way == Way::lines) return is_lines(tensor) ? tensor : lines_copy(tensor);
  return is_planes(tensor) ? tensor : torch::stable::contiguous(tensor);
}

Maps planes_of(const GroupNormSizes& sizes, const void* data) {
  return {data, sizes.channels * sizes.positions, sizes.positions, 1};
}

int64_t affine_stride(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  const std::optional<Tensor>& either = weight.has_value() ? weight : bias;
  return either.has_value() && either->dim() == 2 ? either->size(1) : 0;
}

template <class Args>
void run_planes(void (*kernel)(const Args&, int64_t, int64_t), const Args& args) {
  const int64_t blocks = (args.groups + args.block_groups - 1) / args.block_groups;
  parallel_units(args.samples * blocks, args.block_groups * args.group_channels * args.positions,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class Args>
using Kernel = void (*)(const Args&, int64_t, int64_t);

// A call in lines: sample by sample where there are enough of them and one stays in the L2 cache,
// else step by step over the chunks of all. Either way gives the same bits.
template <class Args>
void run_lines(const Args& args, Kernel<Args> whole, Kernel<Args> sum, Kernel<Args> fold,
               Kernel<Args> write) {
  const int64_t sample = args.channels * args.positions, units = args.samples * args.chunks;
  constexpr int64_t kCached = 512 << 10;
  if (args.samples >= int64_t{torch::stable::get_num_threads()} &&
      sample * element_size(args.dtype) <= kCached) {
    parallel_units(args.samples, sample,
                   [&](int64_t begin, int64_t end) { whole(args, begin, end); });
    return;
  }
  const int64_t unit = sample / args.chunks;
  parallel_units(units, unit, [&](int64_t begin, int64_t end) { sum(args, begin, end); });
  parallel_units(args.samples, args.channels * args.chunks,
                 [&](int64_t begin, int64_t end) { fold(args, begin, end); });
  if (write == nullptr) return;
  parallel_units(units, unit, [&](int64_t begin, int64_t end) { write(args, begin, end); });
}

std::tuple<Tensor, Tensor> group_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& bias,
                                          const std::optional<Tensor>& residual, int64_t groups,
                                          double eps, int64_t act, double slope,
                                          bool channels_last) {
  GroupNormForward args;
  const Input input =
      prepare(args, x, groups, act, slope, channels_last, residual.has_value());
  const Dtype acc = acc_dtype(args.dtype);
  const AccVector weight_acc(weight, acc), bias_acc(bias, acc);
  const int64_t row = args.samples * groups * element_size(acc);
  Tensor y = empty_result(x, channels_last);
  Tensor stats = empty({4, args.samples, groups}, acc);
  char* statistics = static_cast<char*>(stats.mutable_data_ptr());
  args.eps = eps;
  args.weight = weight_acc.data();
  args.bias = bias_acc.data();
  args.affine_stride = affine_stride(weight, bias);
  args.y = y.mutable_data_ptr();
  args.mean = statistics;
  args.rstd = statistics + row;
  args.var = statistics + 2 * row;
  args.rest = statistics + 3 * row;
  args.x = maps_of(input.x);
  std::optional<Tensor> beside_x;
  if (residual.has_value()) {
    beside_x = beside(input.way, *residual);
    args.residual = maps_of(*beside_x);
  }
  if (input.way == Way::lines) {
    std::vector<char> partials(static_cast<size_t>(args.samples * args.chunks * 2 *
                                                   args.channels * element_size(acc)));
    args.partials = partials.data();
    run_lines(args, UDL_CALL(group_norm_lines_forward), UDL_CALL(group_norm_lines_moments),
              UDL_CALL(group_norm_lines_fold), UDL_CALL(group_norm_lines_write));
  } else {
    if (input.way == Way::lines_to_planes) {
      args.lines = args.x;
      args.x = planes_of(args, args.y);
    }
    run_planes(UDL_CALL(group_norm_planes_forward), args);
  }
  return {std::move(y), std::move(stats)};
}

// The weight's or the bias's gradient from those of all samples.
Tensor parameter_gradient(const GroupNormBackward& args, const std::vector<char>& samples,
                          const std::optional<Tensor>& like, bool wanted) {
  if (!wanted || !like.has_value()) return empty({0}, Dtype::f32);
  const bool own = args.affine_stride != 0;
  return reduce_partials(samples, own ? 1 : args.samples,
                         own ? args.samples * args.channels : args.channels,
                         acc_dtype(args.dtype), *like);
}

void run_backward(GroupNormBackward& args, Way way) {
  const size_t element = static_cast<size_t>(element_size(acc_dtype(args.dtype)));
  if (way == Way::lines) {
    std::vector<char> partials(
        static_cast<size_t>(args.samples * args.chunks * 2 * args.channels) * element);
    std::vector<char> factors(static_cast<size_t>(args.samples * 2 * args.groups) * element);
    args.partials = partials.data();
    args.factors = factors.data();
    run_lines(args, UDL_CALL(group_norm_lines_backward), UDL_CALL(group_norm_lines_sums),
              UDL_CALL(group_norm_lines_fold_sums),
              args.dx != nullptr ? UDL_CALL(group_norm_lines_dx) : nullptr);
    return;
  }
  if (way == Way::lines_to_planes) {
    args.lines = args.x;
    args.x = planes_of(args, args.dx);
  }
  run_planes(UDL_CALL(group_norm_planes_backward), args);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_bwd(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, const Tensor& stats,
    int64_t groups, int64_t act, double slope, bool channels_last, bool need_dx,
    bool need_dresidual, bool need_dweight, bool need_dbias) {
  GroupNormBackward args;
  const bool activated = static_cast<Activation>(act) != Activation::identity;
  const Input input = prepare(args, x, groups, act, slope, channels_last, false);
  const Dtype acc = acc_dtype(args.dtype);
  const AccVector weight_acc(weight, acc), bias_acc(bias, acc);
  const int64_t row = args.samples * groups * element_size(acc);
  const char* statistics = static_cast<const char*>(stats.const_data_ptr());
  args.weight = weight_acc.data();
  args.bias = bias_acc.data();
  args.affine_stride = affine_stride(weight, bias);
  args.mean = statistics;
  args.rstd = statistics + row;
  args.rest = statistics + 3 * row;
  args.x = maps_of(input.x);
  const Tensor dy_beside = beside(input.way, dy);
  args.dy = maps_of(dy_beside);
  std::optional<Tensor> residual_beside;
  if (activated && residual.has_value()) {
    residual_beside = beside(input.way, *residual);
    args.residual = maps_of(*residual_beside);
  }
  // Without a wanted tensor to hold them, g and the turned x still need a place.
  std::optional<Tensor> dx, gradient;
  const bool own_gradient = activated && (need_dresidual || !need_dx);
  if (need_dx || input.way == Way::lines_to_planes) dx = empty_result(x, channels_last);
  if (own_gradient) gradient = empty_result(x, channels_last);
  if (dx.has_value()) args.dx = dx->mutable_data_ptr();
  if (activated) args.gradient = own_gradient ? gradient->mutable_data_ptr() : args.dx;
  const size_t sums =
      static_cast<size_t>(args.samples * args.channels * element_size(acc));
  std::vector<char> dweight(sums), dbias(sums);
  args.dweight = dweight.data();
  args.dbias = dbias.data();
  run_backward(args, input.way);
  return {need_dx ? std::move(*dx) : empty({0}, Dtype::f32),
          activated && need_dresidual ? std::move(*gradient) : empty({0}, Dtype::f32),
          parameter_gradient(args, dweight, weight, need_dweight),
          parameter_gradient(args, dbias, bias, need_dbias)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("group_norm_fwd", TORCH_BOX(&udl::group_norm_fwd));
  m.impl("group_norm_bwd", TORCH_BOX(&udl::group_norm_bwd));
}
