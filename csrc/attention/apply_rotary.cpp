#include "attention/apply_rotary.h"

#include "attention/heads_op.h"

namespace udl {
namespace {

// x is [B, H, T, D], or [B, T, H, D] where the heads are last.
Heads in_layout(const Tensor& x, bool heads_last) {
  Heads heads = heads_of(x);
  if (heads_last) std::swap(heads.head, heads.row);
  return heads;
}

// [T, half] or [B, T, half].
Heads table_of(const Tensor& table) {
  Heads heads;
  heads.data = table.const_data_ptr();
  heads.batch = table.dim() == 3 ? table.stride(0) : 0;
  heads.row = table.stride(table.dim() - 2);
  return heads;
}

void rotate_into(const Tensor& out, const Tensor& x, const Tensor& cos, const Tensor& sin,
                 bool interleaved, bool inverse, bool heads_last) {
  Rotary args;
  args.dtype = dtype_of(x);
  args.table_dtype = dtype_of(cos);
  args.interleaved = interleaved;
  args.inverse = inverse;
  args.heads_last = heads_last;
  args.batches = x.size(0);
  args.heads = x.size(heads_last ? 2 : 1);
  args.positions = x.size(heads_last ? 1 : 2);
  args.width = x.size(3);
  args.half = cos.size(cos.dim() - 1);
  args.cos = table_of(cos);
  args.sin = table_of(sin);
  args.out = in_layout(out, heads_last);
  args.x = in_layout(x, heads_last);
  // Both tables of 16 positions and 128 numbers are 16 KB in float32: they stay in the first cache.
  constexpr int64_t kBlock = 16;
  const int64_t position = args.heads * args.width;
  args.block = std::clamp<int64_t>(kGrainElements / position, 1, kBlock);
  const int64_t blocks = (args.positions + args.block - 1) / args.block;
  const auto kernel = UDL_CALL(apply_rotary);
  parallel_units(args.batches * blocks, position * args.block,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor apply_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                    bool inverse, bool heads_last) {
  Tensor out = empty_contiguous_like(x);
  rotate_into(out, x, cos, sin, interleaved, inverse, heads_last);
  return out;
}

void apply_rotary_(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                   bool inverse, bool heads_last) {
  x.mutable_data_ptr();  // gives memory that is shared until written a copy of its own
  rotate_into(x, x, cos, sin, interleaved, inverse, heads_last);
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("apply_rotary", TORCH_BOX(&udl::apply_rotary));
  m.impl("apply_rotary_", TORCH_BOX(&udl::apply_rotary_));
}
