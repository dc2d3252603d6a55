// From an operator's arguments to the dropout that its kernels draw. For operators' own .cpp files.
#pragma once

#include "philox.h"
#include "tensor.h"

namespace udl {

inline Dropout make_dropout(double p, const std::optional<Tensor>& seed) {
  Dropout dropout;
  if (p <= 0 || !seed.has_value()) return dropout;
  dropout.active = true;
  dropout.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  dropout.threshold = p >= 1 ? 0xffffffffu : static_cast<uint32_t>(p * 4294967296.0);
  dropout.scale = p >= 1 ? 0.0 : 1.0 / (1.0 - p);
  return dropout;
}

}  // namespace udl
