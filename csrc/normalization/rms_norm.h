#pragma once

#include "isa.h"
#include "normalization/row_norm.h"

UDL_KERNEL(rms_norm_forward, (const RowNormForward& args, int64_t begin, int64_t end))
UDL_KERNEL(rms_norm_backward, (const RowNormBackward& args, int64_t begin, int64_t end))
