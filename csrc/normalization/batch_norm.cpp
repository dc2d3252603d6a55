#include "normalization/batch_norm.h"

#include <memory>
#include <tuple>

#include "tensor.h"

namespace udl {
namespace {

using torch::headeronly::MemoryFormat;

// Whether torch would give a result of this tensor a channels-last layout.
bool suggests_channels_last(const Tensor& x) {
  const int64_t dim = x.dim();
  if (dim != 4 && dim != 5) return false;
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (int64_t k = 0; k < dim; ++k) {
    const int64_t d = k == 0 ? 1 : k == dim - 1 ? 0 : dim - k;  // channels, width, ..., batch
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;  // nothing but channels: either would do
    least = strides[d] * std::max<int64_t>(sizes[d], 1);
  }
  return true;
}

// The form in which a call is computed: that of its result.
struct Form {
  explicit Form(const Tensor& x)
      : channels_last(suggests_channels_last(x)),
        columns(channels_last || x.numel() == x.size(0) * x.size(1)),
        fold(columns ? fold_of(x.size(1), x.numel() / x.size(1)) : 1) {}
  bool channels_last;
  bool columns;
  int64_t fold;
};

// An uninitialised result shaped and typed like x.
Tensor empty_in_form(const Tensor& x, const Form& form) {
  if (!form.channels_last) return empty_contiguous_like(x);
  const auto sizes = x.sizes();
  const int64_t dim = x.dim();
  int64_t strides[5];
  strides[1] = 1;
  int64_t stride = sizes[1];
  for (int64_t d = dim - 1; d >= 2; --d) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  strides[0] = stride;
  return empty_strided(sizes.data(), strides, dim, dtype_of(x));
}

// The tensor by channels, if it lies so in memory.
bool see_channels(const Tensor& tensor, const Form& form, Channels& out) {
  const bool columns = form.columns;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t dim = tensor.dim();
  Rows& rows = out.rows;
  rows.ndim = 0;
  out.stride = strides[1];
  if (columns && sizes[1] != 1 && strides[1] != 1) return false;
  int64_t inner = 1;
  for (int64_t d = dim - 1; d >= 2 && !columns; --d) {
    if (sizes[d] != 1 && strides[d] != inner) return false;
    inner *= sizes[d];
  }
  for (int64_t d = 0; d < (columns ? dim : 1); ++d) {
    if (d == 1 || sizes[d] == 1) continue;
    const int last = rows.ndim - 1;
    if (last >= 0 && rows.stride[last] == strides[d] * sizes[d]) {
      rows.size[last] *= sizes[d];
      rows.stride[last] = strides[d];
    } else if (rows.ndim == Rows::kMaxDims) {
      return false;
    } else {
      rows.size[rows.ndim] = sizes[d];
      rows.stride[rows.ndim++] = strides[d];
    }
  }
  if (form.fold > 1) {
    if (rows.ndim > 1 || rows.stride[0] != sizes[1]) return false;
    rows.size[0] /= form.fold;
    rows.stride[0] *= form.fold;
  }
  if (rows.ndim == 0) rows.ndim = 1;
  return true;
}

// The tensor by channels; copied into `owner`, which must outlive the result, where it has to be.
Channels channels_of(const Tensor& tensor, const Form& form, std::optional<Tensor>& owner) {
  Channels out;
  if (!see_channels(tensor, form, out)) {
    const MemoryFormat format = !form.channels_last ? MemoryFormat::Contiguous
                                : tensor.dim() == 4 ? MemoryFormat::ChannelsLast
                                                    : MemoryFormat::ChannelsLast3d;
    owner = torch::stable::contiguous(tensor, format);
    STD_TORCH_CHECK(see_channels(*owner, form, out), "udlkernels: no view by channels");
  }
  // One type serves what is read and what is written.
  out.data = const_cast<void*>((owner.has_value() ? *owner : tensor).const_data_ptr());
  return out;
}

Channels channels_of(Tensor& result, const Form& form) {
  Channels out;
  see_channels(result, form, out);
  out.data = result.mutable_data_ptr();
  return out;
}

// Working memory, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(new char[static_cast<size_t>(bytes)]), next_(data_.get()) {}
  char* take(int64_t bytes) {
    char* taken = next_;
    next_ += bytes;
    return taken;
  }

 private:
  std::unique_ptr<char[]> data_;
  char* next_;
};

// A call's tensors and working memory.
struct Call {
  // vectors: how many [C] vectors of the accumulation type are needed beside the partial sums of
  // `sums` kinds.
  Call(const Tensor& x, int64_t vectors, int64_t sums) : form(x) {
    args.dtype = dtype_of(x);
    args.columns = form.columns;
    args.channels = x.size(1);
    const int64_t per_channel = x.numel() / args.channels;
    args.fold = form.fold;
    args.rows = form.columns ? per_channel / form.fold : x.size(0);
    args.length = per_channel / form.fold / args.rows;
    args.count = static_cast<double>(per_channel);
    cut_into_chunks(args);
    vector_bytes = args.channels * element_size(acc_dtype(args.dtype));
    scratch = Scratch(2 * doubles() + (vectors + sums * args.chunks * args.fold) * vector_bytes);
    args.x = channels_of(x, form, x_owner);
  }
  double* take_doubles() { return reinterpret_cast<double*>(scratch.take(doubles())); }
  void* take_vector() { return scratch.take(vector_bytes); }
  void* take_partials(int64_t sums) {
    return scratch.take(sums * args.chunks * args.fold * vector_bytes);
  }

  // The saved statistics [3, C]: mean, its remainder, inverse deviation.
  void use_stats(const Tensor& stats) {
    char* data = static_cast<char*>(const_cast<void*>(stats.const_data_ptr()));
    args.mean = data;
    args.remainder = data + vector_bytes;
    args.rstd = data + 2 * vector_bytes;
  }
  int64_t elements() const { return args.columns_wide() * args.rows * args.length; }

  Form form;
  BatchNorm args;
  std::optional<Tensor> x_owner, y_owner, residual_owner, dy_owner;
  Scratch scratch{0};
  int64_t vector_bytes = 0;

 private:
  int64_t doubles() const { return args.channels * static_cast<int64_t>(sizeof(double)); }
};

using Kernel = void (*)(const BatchNorm&, int64_t, int64_t);

int64_t channel_groups(const BatchNorm& args) {
  const int64_t together = args.columns ? kColumns : group_channels(args);
  return (args.columns_wide() + together - 1) / together;
}

// The first step: sums of every chunk of every group.
void run_chunks(const Call& call, Kernel kernel) {
  const BatchNorm& args = call.args;
  const int64_t groups = channel_groups(args);
  parallel_units(groups * args.chunks, call.elements() / (groups * args.chunks),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void run_channels(const Call& call, Kernel kernel) {
  parallel_units(call.args.channels, 16 * call.args.chunks * call.args.fold,
                 [&](int64_t begin, int64_t end) { kernel(call.args, begin, end); });
}

// The last step: the writing, by chunks of planes or by rows.
void run_writing(const Call& call, Kernel kernel) {
  if (!call.args.columns) return run_chunks(call, kernel);
  parallel_units(call.args.rows, call.args.columns_wide(),
                 [&](int64_t begin, int64_t end) { kernel(call.args, begin, end); });
}

// Whether to hand out whole channels, whose x is then read from memory once. `tensors` of x's size
// are read. The bits of the result do not depend on the answer.
bool by_whole_channels(const Call& call, int64_t tensors) {
  const BatchNorm& args = call.args;
  if (call.elements() <= kGrainElements) return true;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = element_size(args.dtype) * tensors;
  if (args.columns) {
    return args.channels >= 64 * threads && args.rows * 64 * size <= 2 * kCacheBytes;
  }
  return channel_groups(args) >= 4 * threads && args.rows * args.length * size <= 4 * kCacheBytes;
}

void run_whole_channels(const Call& call, Kernel planes, Kernel columns) {
  const BatchNorm& args = call.args;
  if (!args.columns) {
    const int64_t groups = channel_groups(args);
    return parallel_units(groups, call.elements() / groups,
                          [&](int64_t begin, int64_t end) { planes(args, begin, end); });
  }
  const int64_t width = args.columns_wide();
  // 64 columns: whole cache lines for every element type. Folded ones hold parts of all channels.
  const int64_t block = args.fold > 1 ? width : 64;
  parallel_units((width + block - 1) / block, block * args.rows, [&](int64_t begin, int64_t end) {
    columns(args, begin * block, std::min(end * block, width));
  });
}

void gather_moments(const Call& call) {
  run_chunks(call, call.args.columns ? UDL_CALL(batch_norm_columns_moments)
                                     : UDL_CALL(batch_norm_planes_moments));
  run_channels(call, UDL_CALL(batch_norm_finish_moments));
}

void gather_sums(const Call& call) {
  run_chunks(call, call.args.columns ? UDL_CALL(batch_norm_columns_sums)
                                     : UDL_CALL(batch_norm_planes_sums));
  run_channels(call, UDL_CALL(batch_norm_finish_sums));
}

void write_result(const Call& call) {
  run_writing(call, call.args.columns ? UDL_CALL(batch_norm_columns_write)
                                      : UDL_CALL(batch_norm_planes_write));
}

void write_gradient(const Call& call) {
  run_writing(call, call.args.columns ? UDL_CALL(batch_norm_columns_gradient)
                                      : UDL_CALL(batch_norm_planes_gradient));
}

// out[i] = the tensor's values as doubles.
void read_doubles(const Tensor& tensor, double* out) {
  const Tensor source = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  const int64_t n = source.numel();
  if (dtype_of(source) == Dtype::f32) {
    const float* data = static_cast<const float*>(source.const_data_ptr());
    std::copy(data, data + n, out);
  } else {
    UDL_CALL(convert)(dtype_of(source), source.const_data_ptr(), Dtype::f64, out, n, 0.0);
  }
}

// A vector of doubles as a tensor of the type of `like`.
Tensor write_doubles(const double* values, int64_t n, Dtype dtype) {
  Tensor out = empty({n}, dtype);
  if (dtype == Dtype::f32) {
    std::copy(values, values + n, static_cast<float*>(out.mutable_data_ptr()));
  } else {
    UDL_CALL(convert)(Dtype::f64, values, dtype, out.mutable_data_ptr(), n, 0.0);
  }
  return out;
}

Tensor none() { return empty({0}, Dtype::f32); }

// (1 - momentum) * running + momentum * scale * batch.
Tensor moved_average(const std::optional<Tensor>& running, const double* batch, double scale,
                     double momentum) {
  if (!running.has_value()) return none();
  const int64_t n = running->numel();
  std::vector<double> values(static_cast<size_t>(n));
  read_doubles(*running, values.data());
  for (int64_t c = 0; c < n; ++c) {
    const size_t i = static_cast<size_t>(c);
    values[i] = (1 - momentum) * values[i] + momentum * (batch[c] * scale);
  }
  return write_doubles(values.data(), n, dtype_of(*running));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_fwd(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& running_mean,
    const std::optional<Tensor>& running_var, bool training, double momentum, double eps,
    int64_t activation, double negative_slope) {
  Call call(x, 2, training ? 3 : 0);
  BatchNorm& args = call.args;
  const Dtype acc = acc_dtype(args.dtype);
  const AccVector weight_acc(weight, acc), bias_acc(bias, acc);
  args.weight = weight_acc.data();
  args.bias = bias_acc.data();
  args.activation = static_cast<Activation>(activation);
  args.slope = negative_slope;
  args.eps = eps;
  Tensor stats = empty({3, args.channels}, acc);
  call.use_stats(stats);
  args.batch_mean = call.take_doubles();
  args.batch_squares = call.take_doubles();
  args.alpha = call.take_vector();
  args.shift = call.take_vector();
  if (residual.has_value()) args.residual = channels_of(*residual, call.form, call.residual_owner);
  Tensor y = empty_in_form(x, call.form);
  args.y = channels_of(y, call.form);
  if (!training) {
    read_doubles(*running_mean, args.batch_mean);
    read_doubles(*running_var, args.batch_squares);
    UDL_CALL(batch_norm_coefficients)(args, 0, args.channels);
    write_result(call);
    return {std::move(y), std::move(stats), none(), none()};
  }
  args.partials = call.take_partials(3);
  if (by_whole_channels(call, 1)) {
    run_whole_channels(call, UDL_CALL(batch_norm_planes_forward),
                       UDL_CALL(batch_norm_columns_forward));
  } else {
    gather_moments(call);
    write_result(call);
  }
  return {std::move(y), std::move(stats),
          moved_average(running_mean, args.batch_mean, 1.0, momentum),
          moved_average(running_var, args.batch_squares, 1 / (args.count - 1), momentum)};
}

// weight's gradient (or bias's): factor * sum, as the tensor's type; nothing where none is wanted.
Tensor parameter_gradient(const std::optional<Tensor>& like, bool wanted, const double* sum,
                          const Call& call, bool times_rstd) {
  if (!wanted || !like.has_value()) return none();
  const int64_t n = call.args.channels;
  std::vector<double> values(sum, sum + n);
  for (int64_t c = 0; c < n && times_rstd; ++c) {
    values[static_cast<size_t>(c)] *= acc_dtype(call.args.dtype) == Dtype::f64
                                          ? static_cast<const double*>(call.args.rstd)[c]
                                          : static_cast<const float*>(call.args.rstd)[c];
  }
  return write_doubles(values.data(), n, dtype_of(*like));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& y, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& stats, bool training, int64_t activation,
    double negative_slope, bool need_dx, bool need_dresidual, bool need_dweight, bool need_dbias) {
  Call call(x, 4, 2);
  BatchNorm& args = call.args;
  const Dtype acc = acc_dtype(args.dtype);
  const AccVector weight_acc(weight, acc), bias_acc(bias, acc);
  args.weight = weight_acc.data();
  args.bias = bias_acc.data();
  args.activation = static_cast<Activation>(activation);
  args.slope = negative_slope;
  args.frozen = !training;
  call.use_stats(stats);
  args.g_sum = call.take_doubles();
  args.h_sum = call.take_doubles();
  args.alpha = call.take_vector();
  args.shift = call.take_vector();
  args.h_factor = call.take_vector();
  args.offset = call.take_vector();
  args.partials = call.take_partials(2);
  UDL_CALL(batch_norm_coefficients)(args, 0, args.channels);
  args.dy = channels_of(dy, call.form, call.dy_owner);
  args.from_output = y.has_value();
  if (y.has_value()) args.y = channels_of(*y, call.form, call.y_owner);
  if (residual.has_value()) args.residual = channels_of(*residual, call.form, call.residual_owner);
  Tensor dx = need_dx ? empty_in_form(x, call.form) : none();
  if (need_dx) args.dx = channels_of(dx, call.form);
  Tensor dresidual = need_dresidual ? empty_in_form(x, call.form) : none();
  if (need_dresidual) args.dresidual = channels_of(dresidual, call.form);
  if (!need_dx || args.frozen) {
    gather_sums(call);
  } else if (by_whole_channels(call, 2)) {
    run_whole_channels(call, UDL_CALL(batch_norm_planes_backward),
                       UDL_CALL(batch_norm_columns_backward));
  } else {
    gather_sums(call);
    write_gradient(call);
  }
  return {std::move(dx), std::move(dresidual),
          parameter_gradient(weight, need_dweight, args.h_sum, call, true),
          parameter_gradient(bias, need_dbias, args.g_sum, call, false)};
}

// What SyncBatchNorm exchanges between processes, [2, C] in double precision: the mean and the sum of
// squares around it, or the sums of dy and of dy * (x - mean).

Tensor batch_norm_moments(const Tensor& x) {
  Call call(x, 2, 3);
  BatchNorm& args = call.args;
  Tensor stats = empty({3, args.channels}, acc_dtype(args.dtype));
  Tensor moments = empty({2, args.channels}, Dtype::f64);
  call.use_stats(stats);
  args.batch_mean = static_cast<double*>(moments.mutable_data_ptr());
  args.batch_squares = args.batch_mean + args.channels;
  args.alpha = call.take_vector();
  args.shift = call.take_vector();
  args.partials = call.take_partials(3);
  gather_moments(call);
  return moments;
}

Tensor batch_norm_sums(const Tensor& dy, const Tensor& x, const Tensor& stats) {
  Call call(x, 2, 2);
  BatchNorm& args = call.args;
  Tensor sums = empty({2, args.channels}, Dtype::f64);
  call.use_stats(stats);
  args.frozen = true;
  args.g_sum = static_cast<double*>(sums.mutable_data_ptr());
  args.h_sum = args.g_sum + args.channels;
  args.alpha = call.take_vector();
  args.shift = call.take_vector();
  args.partials = call.take_partials(2);
  UDL_CALL(batch_norm_coefficients)(args, 0, args.channels);
  args.dy = channels_of(dy, call.form, call.dy_owner);
  gather_sums(call);
  return sums;
}

// means: the two sums over all processes, divided by the count of all.
Tensor batch_norm_dx(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight,
                     const Tensor& stats, const Tensor& means) {
  Call call(x, 4, 0);
  BatchNorm& args = call.args;
  const AccVector weight_acc(weight, acc_dtype(args.dtype));
  std::vector<double> sums(static_cast<size_t>(2 * args.channels));
  read_doubles(means, sums.data());
  args.weight = weight_acc.data();
  args.g_sum = sums.data();
  args.h_sum = args.g_sum + args.channels;
  args.count = 1;
  call.use_stats(stats);
  args.alpha = call.take_vector();
  args.shift = call.take_vector();
  args.h_factor = call.take_vector();
  args.offset = call.take_vector();
  UDL_CALL(batch_norm_coefficients)(args, 0, args.channels);
  UDL_CALL(batch_norm_gradient_coefficients)(args, 0, args.channels);
  args.dy = channels_of(dy, call.form, call.dy_owner);
  Tensor dx = empty_in_form(x, call.form);
  args.dx = channels_of(dx, call.form);
  write_gradient(call);
  return dx;
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("batch_norm_fwd", TORCH_BOX(&udl::batch_norm_fwd));
  m.impl("batch_norm_bwd", TORCH_BOX(&udl::batch_norm_bwd));
  m.impl("batch_norm_moments", TORCH_BOX(&udl::batch_norm_moments));
  m.impl("batch_norm_sums", TORCH_BOX(&udl::batch_norm_sums));
  m.impl("batch_norm_dx", TORCH_BOX(&udl::batch_norm_dx));
}
