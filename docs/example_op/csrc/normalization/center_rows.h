#pragma once

#include "dtype.h"
#include "isa.h"
#include "rows.h"

// Rows [begin, end) of y = x - mean(x), n columns each.
UDL_KERNEL(center_rows, (Dtype dtype, const Rows& x, void* y, int64_t n, int64_t begin, int64_t end))
