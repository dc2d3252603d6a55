// How the operators make a Heads of a tensor, and allocate results beside it.
#pragma once

#include "attention/heads.h"
#include "tensor.h"

namespace udl {

inline Heads heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.dim() > 3 ? tensor.stride(3) : 1};
}

inline Heads heads_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? heads_of(*tensor) : Heads{};
}

// [B, H, T, D] like x but of the width given: contiguous, or a transposed view of [B, T, H, D].
inline Tensor empty_heads(const Tensor& x, int64_t width, bool heads_last) {
  const int64_t B = x.size(0), H = x.size(1), T = x.size(2);
  const int64_t sizes[4] = {B, H, T, width};
  const int64_t strides[4] = {H * T * width, heads_last ? width : T * width,
                              heads_last ? H * width : width, 1};
  return empty_strided(sizes, strides, 4, dtype_of(x));
}

}  // namespace udl
