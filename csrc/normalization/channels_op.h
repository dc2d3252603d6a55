// How the operators see a tensor [B, C, ...] as a ChannelView, and allocate results beside it.
// udlkernels/normalization/_channels.py states the same rules for shapes without data.
#pragma once

#include "normalization/channels.h"
#include "tensor.h"

namespace udl {

// Whether the dimensions after the channels lie in memory as one, `step` elements apart (0: any).
inline bool positions_merge(const Tensor& tensor, int64_t step) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 2; --d) {
    if (sizes[d] == 1) continue;
    if (step == 0) step = strides[d];
    if (strides[d] != step) return false;
    step *= sizes[d];
  }
  return true;
}

// Whether a result in the layout of this tensor has its channels innermost.
inline bool is_channels_last(const Tensor& tensor) {
  return !positions_merge(tensor, 1) && tensor.stride(1) == 1 && positions_merge(tensor, 0);
}

// A dense tensor shaped and typed as `like`, channels innermost if so asked.
inline Tensor empty_channels(const Tensor& like, bool channels_last) {
  if (!channels_last) return empty_contiguous_like(like);
  int64_t strides[kMaxTensorDims];
  int64_t stride = like.size(1);
  strides[1] = 1;
  for (int64_t d = like.dim() - 1; d >= 2; --d) {
    strides[d] = stride;
    stride *= like.size(d);
  }
  strides[0] = stride;
  return empty_strided(like.sizes().data(), strides, like.dim(), dtype_of(like));
}

inline ChannelView view_channels(const Tensor& tensor, bool last) {
  ChannelView view;
  view.data = tensor.const_data_ptr();
  view.last = last;
  view.batch = tensor.size(0);
  view.channels = tensor.size(1);
  view.positions = 1;
  view.batch_stride = tensor.stride(0);
  view.step = last ? 0 : tensor.stride(1);
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    if (last && view.step == 0 && tensor.size(d) != 1) view.step = tensor.stride(d);
    view.positions *= tensor.size(d);
  }
  return view;
}

// The tensor walked as `last` says, copied into `owner` where its layout has no such form; without
// positions to walk (P = 1) the channels are always innermost.
inline ChannelView view_channels(const Tensor& tensor, bool channels_last,
                                 std::optional<Tensor>& owner) {
  int64_t positions = 1;
  for (int64_t d = 2; d < tensor.dim(); ++d) positions *= tensor.size(d);
  const bool last = channels_last || positions == 1;
  const bool rows = tensor.stride(1) == 1 || tensor.size(1) == 1;
  if (last ? rows && positions_merge(tensor, 0) : positions_merge(tensor, 1)) {
    return view_channels(tensor, last);
  }
  owner = empty_channels(tensor, channels_last);
  torch::stable::copy_(*owner, tensor);
  return view_channels(*owner, last);
}

// The lines of a view as rows: planes in the order of samples and channels, or positions in that of
// samples and places.
inline Rows line_rows(const ChannelView& view) {
  const int64_t lines = view.last ? view.positions : view.channels;
  Rows rows;
  rows.data = view.data;
  const bool merged = lines == 1 || view.batch == 1 || view.batch_stride == lines * view.step;
  rows.ndim = merged ? 1 : 2;
  rows.size[0] = merged ? view.batch * lines : view.batch;
  rows.stride[0] = merged && lines > 1 ? view.step : view.batch_stride;
  if (!merged) {
    rows.size[1] = lines;
    rows.stride[1] = view.step;
  }
  return rows;
}

}  // namespace udl
