// Two partial results of attention into one, on the C++ side: the arguments of the kernels.
#pragma once

#include "attention/heads.h"
#include "dtype.h"
#include "isa.h"

namespace udl {

// Outputs are [B, H, T, D], logarithms [B, H, T] in the accumulation type.
struct MergeLse {
  Dtype dtype = Dtype::f32;
  bool heads_last = false;  // memory holds the heads of a position side by side
  int64_t batches = 0, heads = 0, rows = 0, width = 0;
  Heads a, b, lse_a, lse_b;
  Heads out, lse;    // forward
  Heads dout, dlse;  // backward; dlse may be absent
  // Data is null where not wanted.
  Heads da, db, dlse_a, dlse_b;
};

}  // namespace udl

// Units: rows of D elements, B * H * T, in the order of memory.
UDL_KERNEL(merge_lse_forward, (const MergeLse& args, int64_t begin, int64_t end))
UDL_KERNEL(merge_lse_backward, (const MergeLse& args, int64_t begin, int64_t end))
