#include "normalization/center_rows.h"

#include "tensor.h"

namespace udl {
namespace {

Tensor center_rows_fwd(const Tensor& x) {
  const int64_t n = x.sizes()[x.dim() - 1];
  std::optional<Tensor> owner;
  const Rows rows = rows_of(x, n, owner);
  Tensor y = empty_contiguous_like(x);
  void* out = y.mutable_data_ptr();
  const Dtype dtype = dtype_of(x);
  const auto kernel = UDL_CALL(center_rows);
  parallel_units(x.numel() / n, n, [&](int64_t begin, int64_t end) {
    kernel(dtype, rows, out, n, begin, end);
  });
  return y;
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("center_rows_fwd", TORCH_BOX(&udl::center_rows_fwd));
}
