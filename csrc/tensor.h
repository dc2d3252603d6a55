// Thin helpers over torch's stable tensor: element types, rows, allocation, parallel loops.
// To be included by the operators' own .cpp files.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "dtype.h"
#include "reduce.h"
#include "rows.h"

namespace udl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "udlkernels: element type not supported by this kernel");
  }
}

inline ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return ScalarType::Double;
    case Dtype::bf16:
      return ScalarType::BFloat16;
    case Dtype::f16:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}

inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t ndim,
                            Dtype dtype) {
  int32_t code = aoti_torch_dtype_float32();
  if (dtype == Dtype::f64) code = aoti_torch_dtype_float64();
  if (dtype == Dtype::bf16) code = aoti_torch_dtype_bfloat16();
  if (dtype == Dtype::f16) code = aoti_torch_dtype_float16();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      ndim, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

constexpr int64_t kMaxTensorDims = 64;  // torch's own limit

inline Tensor empty(const int64_t* sizes, int64_t ndim, Dtype dtype) {
  int64_t strides[kMaxTensorDims];
  int64_t stride = 1;
  for (int64_t d = ndim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(sizes, strides, ndim, dtype);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

inline Tensor empty_contiguous_like(const Tensor& tensor) {
  return empty(tensor.sizes().data(), tensor.dim(), dtype_of(tensor));
}

// The tensor as rows of n elements that are contiguous in memory. A layout that is not of this form
// is copied into `owner` first, which must outlive the rows.
inline Rows rows_of(const Tensor& tensor, int64_t n, std::optional<Tensor>& owner) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    Rows rows;
    const Tensor& source = owner.has_value() ? *owner : tensor;
    const auto sizes = source.sizes();
    const auto strides = source.strides();
    int64_t inner = 1;
    int64_t d = static_cast<int64_t>(sizes.size()) - 1;
    bool fits = true;
    for (; d >= 0 && inner < n; --d) {
      if (sizes[d] != 1 && strides[d] != inner) fits = false;
      inner *= sizes[d];
    }
    for (int64_t outer = 0; outer <= d && fits; ++outer) {
      if (sizes[outer] == 1) continue;
      const int last = rows.ndim - 1;
      if (last >= 0 && rows.stride[last] == strides[outer] * sizes[outer]) {
        rows.size[last] *= sizes[outer];
        rows.stride[last] = strides[outer];
      } else if (rows.ndim == Rows::kMaxDims) {
        fits = false;
      } else {
        rows.size[rows.ndim] = sizes[outer];
        rows.stride[rows.ndim] = strides[outer];
        ++rows.ndim;
      }
    }
    if (fits) {
      rows.data = source.const_data_ptr();
      return rows;
    }
    owner = torch::stable::contiguous(tensor);
  }
  STD_TORCH_CHECK(false, "udlkernels: tensor cannot be seen as rows");
}

// A parameter vector in the accumulation type, plus `add`: the tensor's own memory where it already
// is so (the tensor must outlive it).
class AccVector {
 public:
  AccVector(const std::optional<Tensor>& tensor, Dtype acc, double add = 0.0) {
    if (!tensor.has_value()) return;
    if (!tensor->is_contiguous()) owner_ = torch::stable::contiguous(*tensor);
    const Tensor& source = owner_.has_value() ? *owner_ : *tensor;
    const Dtype dtype = dtype_of(source);
    if (dtype == acc && add == 0.0) {
      data_ = source.const_data_ptr();
      return;
    }
    const int64_t n = source.numel();
    buffer_.resize(static_cast<size_t>(n * element_size(acc)));
    UDL_CALL(convert)(dtype, source.const_data_ptr(), acc, buffer_.data(), n, add);
    data_ = buffer_.data();
  }
  // value repeated n times.
  AccVector(double value, int64_t n, Dtype acc) {
    buffer_.resize(static_cast<size_t>(n * element_size(acc)));
    for (int64_t i = 0; i < n; ++i) {
      if (acc == Dtype::f64) {
        reinterpret_cast<double*>(buffer_.data())[i] = value;
      } else {
        reinterpret_cast<float*>(buffer_.data())[i] = static_cast<float>(value);
      }
    }
    data_ = buffer_.data();
  }
  AccVector(AccVector&&) = default;
  AccVector& operator=(AccVector&&) = default;
  const void* data() const { return data_; }

 private:
  std::optional<Tensor> owner_;
  std::vector<char> buffer_;
  const void* data_ = nullptr;
};

// Work below this many elements is not worth a second thread: a parallel region costs about what a
// pass over so many elements does.
constexpr int64_t kGrainElements = 32768;

// body(begin, end) over units of unit_elements elements each.
template <class Body>
inline void parallel_units(int64_t units, int64_t unit_elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, unit_elements));
  if (units <= grain) {
    if (units > 0) body(int64_t{0}, units);
    return;
  }
  torch::stable::parallel_for(0, units, grain, body);
}

// The partial sums [count, width] of type acc added up in their order, into a contiguous tensor of
// width elements.
inline void sum_into(const std::vector<char>& partials, int64_t count, int64_t width, Dtype acc,
                     const Tensor& out) {
  const Dtype dtype = dtype_of(out);
  void* data = out.mutable_data_ptr();
  constexpr int64_t kBlock = 64;
  parallel_units((width + kBlock - 1) / kBlock, kBlock * count, [&](int64_t begin, int64_t end) {
    UDL_CALL(sum_partials)
    (acc, partials.data(), count, width, dtype, data, begin * kBlock,
     std::min(end * kBlock, width));
  });
}

// The same, as a tensor shaped and typed like `like`.
inline Tensor reduce_partials(const std::vector<char>& partials, int64_t count, int64_t width,
                              Dtype acc, const Tensor& like) {
  Tensor out = empty_contiguous_like(like);
  sum_into(partials, count, width, acc, out);
  return out;
}

}  // namespace udl
