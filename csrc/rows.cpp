#include "rows.h"

namespace udl {

int64_t Rows::general_offset(int64_t row) const {
  int64_t offset = 0;
  for (int d = ndim - 1; d >= 0; --d) {
    offset += row % size[d] * stride[d];
    row /= size[d];
  }
  return offset;
}

}  // namespace udl
