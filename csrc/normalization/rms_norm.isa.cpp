#include "normalization/rms_norm.h"

#include "normalization/row_norm.isa.h"

namespace udl::UDL_ISA {

void rms_norm_forward(const RowNormForward& args, int64_t begin, int64_t end) {
  row_norm_forward<false>(args, begin, end);
}

void rms_norm_backward(const RowNormBackward& args, int64_t begin, int64_t end) {
  row_norm_backward<false>(args, begin, end);
}

}  // namespace udl::UDL_ISA
