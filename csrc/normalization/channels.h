// A tensor [B, C, ...] as kernels across channels walk it: channel after channel, each a plane of
// positions that are contiguous in memory, or (last) position after position, each with its channels
// contiguous.
#pragma once

#include "dtype.h"

namespace udl {

struct ChannelView {
  const void* data = nullptr;
  bool last = false;
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t positions = 0;
  int64_t batch_stride = 0;  // in elements
  int64_t step = 0;          // from one plane (or one position) to the next

  template <class T>
  UDL_ALWAYS_INLINE const T* at(int64_t sample, int64_t index) const {
    return static_cast<const T*>(data) + sample * batch_stride + index * step;
  }
};

}  // namespace udl
