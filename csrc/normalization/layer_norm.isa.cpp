#include "normalization/layer_norm.h"

#include "normalization/row_norm.isa.h"

namespace udl::UDL_ISA {

void layer_norm_forward(const RowNormForward& args, int64_t begin, int64_t end) {
  row_norm_forward<true>(args, begin, end);
}

void layer_norm_backward(const RowNormBackward& args, int64_t begin, int64_t end) {
  row_norm_backward<true>(args, begin, end);
}

}  // namespace udl::UDL_ISA
