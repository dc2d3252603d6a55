// layer_norm with an affine map for each sample: the row kernels, called sample by sample.
#include <tuple>

#include "normalization/layer_norm.h"
#include "normalization/row_norm_op.h"

namespace udl {
namespace {

// The rows of x as samples of so many rows, each cut into chunks that no two samples share.
struct Samples {
  Samples(const Tensor& x, int64_t width)
      : count(x.size(0)),
        rows(x.numel() / width / x.size(0)),
        chunk_rows(row_norm_chunk_rows(width)),
        chunks((rows + chunk_rows - 1) / chunk_rows) {}
  int64_t count, rows, chunk_rows, chunks;
};

// body(sample, begin, end) over the chunks of each sample in a range of all chunks.
template <class Body>
void for_samples(const Samples& samples, int64_t begin, int64_t end, const Body& body) {
  while (begin < end) {
    const int64_t sample = begin / samples.chunks, first = begin % samples.chunks;
    const int64_t last = std::min(samples.chunks, first + end - begin);
    body(sample, first, last);
    begin += last - first;
  }
}

std::tuple<Tensor, Tensor> adaptive_layer_norm_fwd(const Tensor& x, const Tensor& scale,
                                                   const Tensor& shift, double eps) {
  const int64_t n = x.size(x.dim() - 1);
  const Samples samples(x, n);
  const Dtype dtype = dtype_of(x), acc = acc_dtype(dtype);
  const AccVector weight(scale, acc, 1.0), bias(shift, acc);
  const int64_t line = n * element_size(acc), count = samples.count * samples.rows;
  std::optional<Tensor> x_owner;
  Tensor stats = empty({2, count}, acc);
  Tensor y = empty_contiguous_like(x);
  RowNormForward args;
  args.dtype = dtype;
  args.n = n;
  args.eps = eps;
  args.x = rows_of(x, n, x_owner);
  args.y = y.mutable_data_ptr();
  args.mean = stats.mutable_data_ptr();
  args.rstd = static_cast<char*>(args.mean) + count * element_size(acc);
  const auto kernel = UDL_CALL(layer_norm_forward);
  parallel_units(
      samples.count * samples.chunks, n * std::min(samples.rows, samples.chunk_rows),
      [&](int64_t begin, int64_t end) {
        for_samples(samples, begin, end, [&](int64_t sample, int64_t first, int64_t last) {
          RowNormForward part = args;
          part.weight = static_cast<const char*>(weight.data()) + sample * line;
          part.bias = static_cast<const char*>(bias.data()) + sample * line;
          const int64_t start = sample * samples.rows;
          kernel(part, start + first * samples.chunk_rows,
                 start + std::min(samples.rows, last * samples.chunk_rows));
        });
      });
  return {std::move(y), std::move(stats)};
}

template <class T>
T* offset(T* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data == nullptr ? nullptr : static_cast<Byte*>(data) + bytes;
}

void advance_rows(Rows& rows, int64_t count, Dtype dtype) {
  rows.data = offset(rows.data, rows.offset(count) * element_size(dtype));
}

// Gradients of one sample's chunks, whose sums of weight and bias go to lines of their own.
void sample_backward(RowNormBackwardKernel kernel, RowNormBackward args, const Samples& samples,
                     int64_t sample, int64_t first, int64_t last) {
  const int64_t size = element_size(acc_dtype(args.dtype)), row = sample * samples.rows;
  advance_rows(args.dy, row, args.dtype);
  advance_rows(args.x, row, args.dtype);
  args.weight = offset(args.weight, sample * args.n * size);
  args.mean = offset(args.mean, row * size);
  args.rstd = offset(args.rstd, row * size);
  args.dx = offset(args.dx, row * args.n * element_size(args.dtype));
  args.dweight = offset(args.dweight, sample * samples.chunks * args.n * size);
  args.dbias = offset(args.dbias, sample * samples.chunks * args.n * size);
  kernel(args, first, last);
}

// [samples, chunks, n] summed over the chunks.
Tensor reduce_samples(const std::vector<char>& partials, const Samples& samples, int64_t n,
                      Dtype acc, const Tensor& like) {
  Tensor out = empty_contiguous_like(like);
  const Dtype dtype = dtype_of(like);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  parallel_units(samples.count, samples.chunks * n, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      UDL_CALL(sum_partials)
      (acc, partials.data() + sample * samples.chunks * n * element_size(acc), samples.chunks, n,
       dtype, data + sample * n * element_size(dtype), 0, n);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> adaptive_layer_norm_bwd(const Tensor& dy, const Tensor& x,
                                                           const Tensor& scale,
                                                           const Tensor& shift,
                                                           const Tensor& stats, bool need_dx,
                                                           bool need_dscale, bool need_dshift) {
  const int64_t n = x.size(x.dim() - 1);
  const Samples samples(x, n);
  const Dtype dtype = dtype_of(x), acc = acc_dtype(dtype);
  const AccVector weight(scale, acc, 1.0);
  std::optional<Tensor> x_owner, dy_owner, dx, dscale, dshift;
  RowNormBackward args;
  args.dtype = dtype;
  args.n = n;
  args.rows = samples.rows;
  args.chunk_rows = samples.chunk_rows;
  args.dy = rows_of(dy, n, dy_owner);
  args.x = rows_of(x, n, x_owner);
  args.weight = weight.data();
  args.mean = stats.const_data_ptr();
  args.rstd = offset(args.mean, samples.count * samples.rows * element_size(acc));
  const auto partials = [&](bool wanted) {
    const int64_t lines = wanted ? samples.count * samples.chunks : 0;
    return std::vector<char>(static_cast<size_t>(lines * n * element_size(acc)));
  };
  std::vector<char> scales = partials(need_dscale), shifts = partials(need_dshift);
  args.dweight = scales.empty() ? nullptr : scales.data();
  args.dbias = shifts.empty() ? nullptr : shifts.data();
  if (need_dx) {
    dx = empty_contiguous_like(x);
    args.dx = dx->mutable_data_ptr();
  }
  const auto kernel = UDL_CALL(layer_norm_backward);
  parallel_units(samples.count * samples.chunks, n * std::min(samples.rows, samples.chunk_rows),
                 [&](int64_t begin, int64_t end) {
                   for_samples(samples, begin, end,
                               [&](int64_t sample, int64_t first, int64_t last) {
                                 sample_backward(kernel, args, samples, sample, first, last);
                               });
                 });
  if (need_dscale) dscale = reduce_samples(scales, samples, n, acc, scale);
  if (need_dshift) dshift = reduce_samples(shifts, samples, n, acc, shift);
  return {or_empty(dx), or_empty(dscale), or_empty(dshift)};
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("adaptive_layer_norm_fwd", TORCH_BOX(&udl::adaptive_layer_norm_fwd));
  m.impl("adaptive_layer_norm_bwd", TORCH_BOX(&udl::adaptive_layer_norm_bwd));
}
