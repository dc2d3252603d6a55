// A tensor [B, H, T, D] as the kernels of this family see it.
#pragma once

#include "dtype.h"

namespace udl {

// By its strides in elements; the last is 1 unless `element` says otherwise.
struct Heads {
  const void* data = nullptr;  // null where the tensor is absent
  int64_t batch = 0, head = 0, row = 0, element = 1;

  template <class T>
  UDL_ALWAYS_INLINE const T* at(int64_t b, int64_t h, int64_t i) const {
    return static_cast<const T*>(data) + b * batch + h * head + i * row;
  }
  template <class T>
  UDL_ALWAYS_INLINE T* to(int64_t b, int64_t h, int64_t i) const {
    return const_cast<T*>(at<T>(b, h, i));
  }
};

}  // namespace udl
