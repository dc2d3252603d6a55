// Rotary positions on the C++ side: the arguments of the kernel.
#pragma once

#include "attention/heads.h"
#include "dtype.h"
#include "isa.h"

namespace udl {

struct Rotary {
  Dtype dtype = Dtype::f32, table_dtype = Dtype::f32;
  bool interleaved = false;  // pairs (2 i, 2 i + 1) instead of (i, i + half)
  bool inverse = false;      // rotate by -sin
  bool heads_last = false;   // memory holds the heads of a position side by side
  int64_t batches = 0, heads = 0, positions = 0, width = 0, half = 0;
  int64_t block = 0;  // positions of a unit, whose part of the tables is brought into order once
  Heads cos, sin;     // by batch and row
  Heads x;
  Heads out;  // may be x itself
};

}  // namespace udl

// Units: B * blocks of positions.
UDL_KERNEL(apply_rotary, (const Rotary& args, int64_t begin, int64_t end))
