// A tensor seen as rows: where each row starts, for any strides of the leading dimensions.
#pragma once

#include <cstdint>

namespace udl {

struct Rows {
  static constexpr int kMaxDims = 6;
  const void* data = nullptr;
  int ndim = 0;  // leading dimensions that could not be merged; 0 for a single row
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  __attribute__((always_inline)) int64_t offset(int64_t row) const {
    return ndim == 1 ? row * stride[0] : general_offset(row);
  }
  template <class T>
  __attribute__((always_inline)) const T* row(int64_t index) const {
    return static_cast<const T*>(data) + offset(index);
  }

 private:
  int64_t general_offset(int64_t row) const;  // out of line: this header serves every ISA
};

}  // namespace udl
