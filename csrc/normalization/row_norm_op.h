// The operators' side of the row kernels: from tensors to arguments, allocation, and the split over
// threads. layer_norm.cpp and rms_norm.cpp differ in what they pass here.
#pragma once

#include <utility>

#include "dropout_op.h"
#include "normalization/row_norm.h"
#include "tensor.h"

namespace udl {

using RowNormForwardKernel = void (*)(const RowNormForward&, int64_t, int64_t);
using RowNormBackwardKernel = void (*)(const RowNormBackward&, int64_t, int64_t);

// Fills in and runs a forward whose affine vectors, statistics and flags are set.
inline Tensor run_forward(RowNormForwardKernel kernel, RowNormForward& args, const Tensor& x,
                          const std::optional<Tensor>& residual, std::optional<Tensor>& sum) {
  std::optional<Tensor> x_owner, residual_owner;
  args.dtype = dtype_of(x);
  args.x = rows_of(x, args.n, x_owner);
  if (residual.has_value()) {
    args.residual = rows_of(*residual, args.n, residual_owner);
    sum = empty_contiguous_like(x);
    args.sum = sum->mutable_data_ptr();
  }
  Tensor y = empty_contiguous_like(x);
  args.y = y.mutable_data_ptr();
  parallel_units(x.numel() / args.n, args.n,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

struct RowNormGradients {
  std::optional<Tensor> dx, dx_dropped, dweight, dbias;
};

// An op returns a tensor of no elements for a gradient nobody asked for.
inline Tensor or_empty(std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::move(*tensor) : empty({0}, Dtype::f32);
}

// Which gradients a backward owes; weight and bias also tell their shape and type.
struct RowNormWanted {
  bool dx = true;
  const Tensor* dweight = nullptr;
  const Tensor* dbias = nullptr;
};

inline RowNormGradients run_backward(RowNormBackwardKernel kernel, RowNormBackward& args,
                                     const Tensor& dy, const Tensor& x,
                                     const std::optional<Tensor>& ds, const RowNormWanted& wanted) {
  std::optional<Tensor> dy_owner, x_owner, ds_owner;
  args.dtype = dtype_of(x);
  args.dy = rows_of(dy, args.n, dy_owner);
  args.x = rows_of(x, args.n, x_owner);
  if (ds.has_value()) args.ds = rows_of(*ds, args.n, ds_owner);
  args.rows = x.numel() / args.n;
  args.chunk_rows = row_norm_chunk_rows(args.n);
  const int64_t chunks = (args.rows + args.chunk_rows - 1) / args.chunk_rows;
  const Dtype acc = acc_dtype(args.dtype);
  const auto partials = [&](const Tensor* like) {
    const int64_t bytes = like != nullptr ? chunks * args.n * element_size(acc) : 0;
    return std::vector<char>(static_cast<size_t>(bytes));
  };
  std::vector<char> dweight = partials(wanted.dweight), dbias = partials(wanted.dbias);
  args.dweight = dweight.empty() ? nullptr : dweight.data();
  args.dbias = dbias.empty() ? nullptr : dbias.data();

  RowNormGradients out;
  if (wanted.dx) {
    out.dx = empty_contiguous_like(x);
    args.dx = out.dx->mutable_data_ptr();
  }
  if (wanted.dx && args.dropout.active) {
    out.dx_dropped = empty_contiguous_like(x);
    args.dx_dropped = out.dx_dropped->mutable_data_ptr();
  }
  parallel_units(chunks, args.n * args.chunk_rows,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (wanted.dweight != nullptr) {
    out.dweight = reduce_partials(dweight, chunks, args.n, acc, *wanted.dweight);
  }
  if (wanted.dbias != nullptr) {
    out.dbias = reduce_partials(dbias, chunks, args.n, acc, *wanted.dbias);
  }
  return out;
}

}  // namespace udl
